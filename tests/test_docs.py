"""What the documentation shows is run: each page in order, from its first block to its last, on a database of its own.

A `text` block after another block is what comes out of that one. A block that begins with `# name.yaml` is that file.
Tables of formulas are priced by the engine and by the database, and the reference is written anew and compared.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
import reference
from places import ROOT
from psycopg import sql
from psycopg.conninfo import make_conninfo

from ducto_pg import CreditManager, PricingEngine, exactjson
from ducto_pg.embedded import Server

Connection = psycopg.Connection[Any]

PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
FROM_SCRATCH = {"README.md", "docs/operations.md"}
OF_ITS_OWNER = "docs/start.md"
RUN_ELSEWHERE = {"docs/supabase.md"}  # by test_supabase.py
RUN_BY_TEST_DRIVERS = "examples/drivers/"
NOT_RUN = ("make ", "pip ", "python3 -m venv ", "source ", "DUCTO_PG_TEST_VERSIONS=")
PROGRAMS = ("psql", "pg_dump", "curl")

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_END = re.compile(r"(;|\\gset)[ \t]*(?:--[^\n]*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A piece of a page, and what the page says comes out of it (None: nothing is said)."""

    place: str
    language: str
    text: str
    expected: str | None = None


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text("utf-8")
    found = list(_FENCE.finditer(text))
    for number, fence in enumerate(found):
        following = found[number + 1] if number + 1 < len(found) else None
        answers = following and following[1] == "text" and not text[fence.end() : following.start()].strip()
        if fence[1] != "text":
            place = f"{page}:{text.count(chr(10), 0, fence.start()) + 1}"
            yield Block(place, fence[1], fence[2], following[2] if following and answers else None)


class Reader:
    """Does what a page says, as its reader would."""

    def __init__(self, page: str, dsn: str, conn: Connection, folder: Path, path: str) -> None:
        self.conn, self.folder = conn, folder
        self.variables: dict[str, str] = {}
        self.names: dict[str, Any] = {"__name__": page}
        self.environment = {**os.environ, "DATABASE_URL": dsn, "PATH": path, "PYTHONPATH": str(ROOT)}

    def do(self, block: Block) -> None:
        said: str | None
        match block.language:
            case "sql":
                said = self.ask(block.text)
            case "python":
                said = self.execute(block)
            case "bash":
                said = self.shell(block.text)
            case "yaml":
                said = self.write(block.text)
            case _:
                pytest.fail(f"{block.place}: nobody runs {block.language}")
        if said is None:
            return
        if block.expected is None:
            assert "ERROR:" not in said, f"{block.place}: {said}"
        else:
            assert _plain(said) == _plain(block.expected), block.place

    def ask(self, text: str) -> str:
        """As psql does, `\\gset` and `:'name'` included."""
        said = []
        start = 0
        for end in _END.finditer(text):
            statement = text[start : end.start()]
            if statement.count("$$") % 2:
                continue
            start = end.end()
            for name, value in self.variables.items():
                statement = statement.replace(f":'{name}'", sql.Literal(value).as_string(self.conn))
            try:
                cursor = self.conn.execute(statement)
            except psycopg.Error as error:
                said += [f"ERROR:  {error.diag.message_primary}"]
                said += [f"HINT:  {error.diag.message_hint}"] if error.diag.message_hint else []
                continue
            if not cursor.description:
                continue
            head = [column.name for column in cursor.description]
            assert cursor.pgresult
            rows = [
                [(cursor.pgresult.get_value(row, column) or b"").decode() for column in range(len(head))]
                for row in range(cursor.pgresult.ntuples)
            ]
            if end[1] == r"\gset":
                self.variables |= dict(zip(head, rows[0], strict=True))
            else:
                said += [" | ".join(row) for row in [head, *rows]]
        assert not text[start:].strip(), f"no end: {text[start:]}"
        return "\n".join(said)

    def execute(self, block: Block) -> str:
        with redirect_stdout(StringIO()) as said:
            exec(compile(block.text, block.place, "exec"), self.names)
        return said.getvalue()

    def shell(self, text: str) -> str | None:
        """None where a program is asked for that this machine or its server comes without."""
        script = "\n".join(line for line in text.splitlines() if not line.startswith(NOT_RUN))
        if any(program in script and not shutil.which(program, path=self.environment["PATH"]) for program in PROGRAMS):
            return None
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def write(self, text: str) -> str:
        first = re.match(r"# (\S+\.yaml)\n", text)
        assert first, "a file's first line is its name"
        (self.folder / first[1]).write_text(text, "utf-8")
        return ""


def _plain(text: str) -> list[list[str]]:
    """Without what is drawn around it: a list of cells per line."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"[-+]+|\(\d+ rows?\)", line)]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.fixture
def path(server: Server, tmp_path: Path) -> str:
    """A PATH with `ducto-pg` of this checkout, `python` as it runs here, and the server's own programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, command in {"ducto-pg": f'"{sys.executable}" -m ducto_pg.cli', "python": f'"{sys.executable}"'}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    return os.pathsep.join([str(programs), str(server.bindir or programs), os.environ.get("PATH", "")])


@pytest.fixture
def owned(server: Server, server_conn: Connection) -> Iterator[str]:
    """The DSN of the database that `start.md` begins with, whose owner is no superuser; its roles go again."""
    roles = ("shop_owner", "shop_app", "shop_admin", "shop_reports")
    drop = ["drop database if exists shop with (force)", *(f"drop role if exists {role}" for role in roles)]
    create = [statement for statement in next(blocks(OF_ITS_OWNER)).text.split(";") if statement.strip()]
    for statement in [*drop, *create]:
        server_conn.execute(statement)
    try:
        yield make_conninfo(server.dsn("shop"), options="-c role=shop_owner")
    finally:
        for statement in drop:
            server_conn.execute(statement)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_ELSEWHERE])
def test_a_page_does_what_it_says(
    page: str,
    server: Server,
    tmp_path: Path,
    path: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [step for step in blocks(page) if RUN_BY_TEST_DRIVERS not in step.text]
    if page == OF_ITS_OWNER:
        dsn, steps = request.getfixturevalue("owned"), steps[1:]
    elif page in FROM_SCRATCH:
        dsn = server.dsn(request.getfixturevalue("server_conn").info.dbname)
    else:
        dsn = request.getfixturevalue("db")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    shutil.copy(ROOT / "examples" / "prices.yaml", tmp_path)
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.chdir(tmp_path)
    with psycopg.connect(dsn, autocommit=True) as conn:
        reader = Reader(page, dsn, conn, tmp_path, path)
        for block in steps:
            reader.do(block)
        assert CreditManager(conn).verify_ledger() == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text)):
        if not target.startswith("https://"):
            path = (ROOT / page).parent / target
            assert path.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("example", ["python_backend.py", "streaming.py"])
def test_an_example_runs_and_charges_nothing_when_run_again(example: str, db: str, path: str, tmp_path: Path) -> None:
    environment = {**os.environ, "DATABASE_URL": db, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / example)]
    ledgers = []
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=100, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "ledger: sound" in done.stdout
        with psycopg.connect(db) as conn:
            assert CreditManager(conn).verify_ledger() == []
            ledgers.append(conn.execute("select * from ducto_read.transactions order by transaction_id").fetchall())
    assert ledgers[0] == ledgers[1] != []


class TestPricing:
    """The tables of `pricing.md`."""

    TEXT = (ROOT / "docs" / "pricing.md").read_text("utf-8")
    ROWS = re.findall(r"^\| `([^`|]+)` \| `([^`|]+)` \| ([\d.]+) \|", TEXT, re.MULTILINE)

    def test_formulas_are_worth_what_it_says(self, conn: Connection) -> None:
        manager = CreditManager(conn)
        assert len(self.ROWS) > 30
        for formula, usage, value in self.ROWS:
            config = {"models": {"_default": formula}, "metrics": {"images": 0}, "unpriced": "warn"}
            metrics = exactjson.loads("{" + re.sub(r"(\w+): ", r'"\1": ', usage) + "}")
            manager.publish_pricing(config)
            assert str(PricingEngine.from_dict(config).calculate(metrics).total) == value, formula
            assert str(manager.calculate_cost(metrics).total) == value, formula

    def test_every_function_is_there(self) -> None:
        from ducto_pg.formula.fields import KNOWN_COUNTS
        from ducto_pg.formula.language import _FUNCTIONS

        for name in (*(f"{function}(" for function in _FUNCTIONS), *KNOWN_COUNTS):
            assert f"`{name}" in self.TEXT, name

    def test_every_config_key_is_there(self) -> None:
        from ducto_pg.models import PlanDefinition, PricingConfigData

        for name in (*PricingConfigData.model_fields, *PlanDefinition.model_fields):
            assert f"`{name}" in self.TEXT, name


def test_the_reference_is_what_this_release_says(conn: Connection) -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(conn), "make reference writes it anew"

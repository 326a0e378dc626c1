"""The examples of `examples/drivers/`: one small scenario, the same from every driver, told in the same words."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from places import ROOT
from program_helpers import environment, npm_packages
from test_docs import RUN_BY_TEST_DRIVERS, blocks

from ducto_pg import CreditManager
from ducto_pg.embedded import Server

Connection = psycopg.Connection[Any]

DRIVERS = ROOT / "examples" / "drivers"
PAGES = ("docs/any_language.md", "docs/migrations.md")
PROGRAMS = {"python": [sys.executable], "alembic": [sys.executable, "-m", "alembic"]}
SAID = """\
added 1000, balance 1000
held 54
charged 6 for 6.250000000, balance 994
refused: insufficient_credits
balance {}, reserved 0
refunded 6, balance 1000
"""


@pytest.fixture
def priced(conn: Connection) -> str:
    """The DSN of a database with the prices that the examples charge by."""
    CreditManager(conn).publish_pricing(ROOT / "examples" / "prices.yaml")
    return conn.info.dsn


def shown(part: str) -> list[str]:
    """The one command with this part, as a page shows it."""
    text = "".join(block.text for page in PAGES for block in blocks(page) if RUN_BY_TEST_DRIVERS in block.text)
    [line] = [line for line in text.splitlines() if part in line]
    program, *arguments = shlex.split(re.sub(r"\w+-user$|(?<=user_id=)\S+", "{user}", line))
    return [*PROGRAMS.get(program, [program]), *arguments]


def run(dsn: str, *command: str | Path, folder: Path = ROOT) -> str:
    """What a command prints, with this database in the PG… variables."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(dsn, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(dsn: str, *command: str | Path, folder: Path = ROOT) -> None:
    """The scenario is told, and told again when it is run again: but for the balance, and nothing is written."""
    user = "O'Brien:ü%s"
    assert run(dsn, *(str(part).format(user=user) for part in command), folder=folder) == SAID.format(994)
    assert run(dsn, *(str(part).format(user=user) for part in command), folder=folder) == SAID.format(1000)
    with CreditManager(dsn) as credits:
        assert [row.type for row in credits.list_transactions(user)] == ["refund", "usage", "purchase"]
        assert credits.verify_ledger() == []


def test_psql(priced: str, server: Server) -> None:
    folders = [str(server.bindir or ""), os.environ.get("PATH", "")]
    psql = shutil.which("psql", path=os.pathsep.join(folders))
    if not psql:
        pytest.skip("needs psql")
    check(priced, psql, *shown("psql.sql")[1:])


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_python(priced: str, driver: str) -> None:
    pytest.importorskip(driver)
    check(priced, *shown(f"{driver}_charge.py"))


def test_node(priced: str, tmp_path: Path) -> None:
    folder = tmp_path / "examples" / "drivers"
    folder.mkdir(parents=True)
    (folder / "node_modules").symlink_to(npm_packages(DRIVERS))
    shutil.copy(DRIVERS / "node_postgres.mjs", folder)
    check(priced, *shown("node_postgres.mjs"), folder=tmp_path)


def test_sqlalchemy_and_alembic(server_conn: Connection) -> None:
    pytest.importorskip("alembic")
    dsn = server_conn.info.dsn
    run(dsn, *shown("alembic.ini"))
    check(dsn, *shown("sqlalchemy_charge.py"))


def test_django(server_conn: Connection) -> None:
    pytest.importorskip("django")
    dsn = server_conn.info.dsn
    run(dsn, *shown("manage.py migrate"))
    check(dsn, *shown("manage.py charge"))


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_show_what_the_examples_do(page: str) -> None:
    """A block that names a file is a part of it."""
    text = (ROOT / page).read_text("utf-8")
    assert SAID.format(994) in text or page != PAGES[0]
    parts = re.findall(r"^```\w+ (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert parts
    for name, part in parts:
        lines = [line.strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
        wanted = [line.strip() for line in part.splitlines() if line.strip() not in ("", "…")]
        assert [line for line in wanted if line not in lines] == [], name

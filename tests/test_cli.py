"""The command line: what each command prints, and that every fault is one line and an exit code."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ducto_pg import __version__, quickstart
from ducto_pg.cli import main
from ducto_pg.embedded import Server

Connection = psycopg.Connection[tuple[Any, ...]]
Run = Callable[..., tuple[int, str, str]]

YAML = "models:\n  gpt-4o: input_tokens * 0.0025\n"
OTHER = '{"models": {"gpt-4o": "input_tokens * 0.003", "_default": "input_tokens"}, "min_balance": 7}'


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; answers exit code, output and complaint, which is at most one line."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        assert err.count("\n") <= 1
        return code, out, err

    return run


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds a.yaml, b.json and bad.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(YAML)
    Path("b.json").write_text(OTHER)
    Path("bad.yaml").write_text("models:\n  gpt-4o: inputTokens * 2\n")


@pytest.fixture
def empty(server: Server, server_conn: Connection) -> str:
    """The DSN of a database without ducto_pg."""
    return server.dsn(server_conn.info.dbname)


@pytest.fixture
def database(db: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """DATABASE_URL names `db`."""
    monkeypatch.setenv("DATABASE_URL", db)
    return db


def test_setup_says_what_it_made_then_that_nothing_is_left(run: Run, empty: str) -> None:
    code, out, _ = run("setup", "--dsn", empty)
    assert code == 0
    assert re.match(rf"ducto_pg {__version__} installed: \d+ tables, \d+ functions\n", out)
    assert "deduct" in out
    assert run("setup", "--dsn", empty) == (0, "nothing to change\n", "")
    assert json.loads(run("setup", "--dsn", empty, "--json")[1])["errors"] == []


def test_sql_is_what_setup_does(run: Run, server_conn: Connection, empty: str) -> None:
    code, out, _ = run("sql", "--grant-read-to", "somebody's")
    assert code == 0
    assert r"E'somebody''s'" in out
    server_conn.execute(run("sql")[1])
    assert run("verify", "--dsn", empty) == (0, "sound\n", "")


def test_prices_are_published_listed_activated_compared_and_exported(run: Run, files: None, database: str) -> None:
    assert run("pricing", "validate", "a.yaml") == (0, "a.yaml: sound (models: 1, plans: 0)\n", "")
    assert run("pricing", "list") == (0, "no version is published yet\n", "")
    assert run("pricing", "export") == (1, "", "ducto-pg: no pricing version is active yet\n")
    assert run("pricing", "publish", "a.yaml", "--label", "first") == (0, "version 1 published and active\n", "")
    assert run("pricing", "publish", "a.yaml", "--label", "first") == (0, "version 1 published and active\n", "")
    assert run("pricing", "publish", "b.json", "--no-activate") == (0, "version 2 published, not activated\n", "")
    lines = run("pricing", "list")[1].splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", lines[1].split()[1]], ["1", "active"]]
    assert lines[2].endswith("first")

    changes = '+ models._default: "input_tokens"\n~ models.gpt-4o: "input_tokens * 0.0025" -> "input_tokens * 0.003"'
    changed = run("pricing", "diff", "2")[1]
    assert all(line in changed.splitlines() for line in changes.splitlines())
    assert run("pricing", "diff", "1", "2") == run("pricing", "diff", "a.yaml", "b.json") == (0, changed, "")
    assert run("pricing", "diff", "a.yaml") == (0, "no difference\n", "")
    assert json.loads(run("pricing", "diff", "2", "--json")[1]) == changed.splitlines()

    assert run("pricing", "activate", "2") == (0, "version 2 active\n", "")
    Path("exported.json").write_text(run("pricing", "export")[1])
    assert run("pricing", "diff", "exported.json") == (0, "no difference\n", "")
    assert json.loads(run("pricing", "export", "1")[1])["models"] == {"gpt-4o": "input_tokens * 0.0025"}
    assert [item["active"] for item in json.loads(run("pricing", "list", "--json")[1])] == [True, False]


def test_a_compiled_script_publishes_without_python(run: Run, files: None, conn: Connection, database: str) -> None:
    code, out, _ = run("pricing", "compile", "a.yaml", "--label", "by hand")
    assert code == 0
    conn.execute(out)
    conn.execute(out)
    cost = conn.execute("""select total from ducto.calculate_cost('{"model": "gpt-4o", "input_tokens": 100}')""")
    assert str(cost.fetchall()) == "[(Decimal('0.2500'),)]"
    listed = run("pricing", "list")[1].splitlines()
    assert len(listed) == 2


def test_a_dash_is_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (YAML, OTHER):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert run("pricing", "validate", "-")[0] == 0


def test_verify_lists_what_does_not_hold(run: Run, conn: Connection, database: str) -> None:
    conn.execute("select ducto.add_credits('ann', 5)")
    assert run("verify") == (0, "sound\n", "")
    conn.execute("update ducto_private.accounts set balance = 6 where account_id = 'ann'")
    code, out, _ = run("verify")
    assert code == 1
    assert "ann" in out
    code, out, _ = run("verify", "--account", "ann", "--json")
    assert code == 1
    assert json.loads(out)[0]["account_id"] == "ann"
    assert run("verify", "--account", "bob") == (1, "", "ducto-pg: no such account: 'bob'\n")
    conn.execute("select ducto.add_credits('bob', 5)")
    assert run("verify", "--account", "bob") == (0, "sound\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pricing validate missing.yaml", "missing.yaml: No such file or directory"),
        ("pricing validate bad.yaml", "bad.yaml: models.gpt-4o: "),
        ("pricing compile .", ".: Is a directory"),
        ("pricing activate 9", "there is no pricing version 9"),
        ("pricing activate 99999999999", "there is no pricing version 99999999999"),
        ("pricing diff 9", "there is no pricing version 9"),
        ("pricing diff missing.yaml", "missing.yaml: No such file"),
        ("pricing export nine", "a version is a number or `active`, not 'nine'"),
        ("verify --dsn nonsense", "--dsn is no connection string (postgresql://user@host/database)"),
        ("verify --dsn host=/nowhere", "No such file or directory"),
        ("setup --dsn host=/nowhere", "No such file or directory"),
        ("setup --grant-to nobody-of-that-name", "nobody-of-that-name"),
        ("quickstart --trace missing.csv", "missing.csv: No such file or directory"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_1(run: Run, files: None, database: str, arguments: str, said: str) -> None:
    if arguments.startswith("pricing diff"):
        assert run("pricing", "publish", "a.yaml")[0] == 0
    code, out, err = run(*arguments.split())
    assert (code, out) == (1, "")
    assert err.startswith("ducto-pg: ")
    assert said in err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://u:secret@h/db", "has SQLAlchemy's form: write postgresql:// without +psycopg"),
        ("postgresql://u:secret@h/%zz", "is no connection string (postgresql://user@host/database)"),
        ("postgresql://u:x@secret@h/db", "is no connection string"),
        ("postgresql://u:secret/x@h/db", "is no connection string"),
        ("user=u password=secret nonsense", "is no connection string"),
    ],
)
def test_a_connection_string_is_never_repeated(run: Run, monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    for arguments, name in ((["verify"], "DATABASE_URL"), (["quickstart", "--dsn", url], "--dsn")):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith(f"ducto-pg: {name} {said}")
        assert "secret" not in err


def test_without_a_url_a_failing_connection_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("PGHOST", "/nowhere")
    assert run("verify")[2].endswith("; DATABASE_URL is not set: set it, or give --dsn\n")
    assert "DATABASE_URL" not in run("verify", "--dsn", "")[2]


def test_only_the_installer_publishes(run: Run, files: None, conn: Connection, database: str) -> None:
    conn.execute("create role ducto_no_publisher login")
    try:
        dsn = psycopg.conninfo.make_conninfo(database, user="ducto_no_publisher")
        err = run("pricing", "publish", "a.yaml", "--dsn", dsn)[2]
    finally:
        conn.execute("drop role ducto_no_publisher")
    assert "permission denied" in err
    assert err.endswith("; only the role that installed publishes\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [("sql >&-", "standard output is closed"), ("pricing validate - <&-", "standard input is closed")],
)
def test_a_closed_stream(command: str, said: str) -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m ducto_pg.cli {command}", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"ducto-pg: {said}\n")


def test_a_database_without_ducto_pg_is_told_so(run: Run, files: None, empty: str) -> None:
    said = "ducto-pg: this database does not have ducto_pg, or an older one: run ducto-pg setup\n"
    for command in (["verify"], ["pricing", "list"], ["pricing", "publish", "a.yaml"], ["pricing", "activate", "1"]):
        assert run(*command, "--dsn", empty) == (1, "", said)


@pytest.mark.parametrize("arguments", ["", "nonsense", "pricing", "pricing activate one", "pricing diff", "verify --x"])
def test_misuse_is_exit_code_2(arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pricing", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("validate", "publish", "list", "activate", "diff", "export", "compile"))


def test_the_shipped_prices_compile(run: Run) -> None:
    code, out, _ = run("pricing", "compile", str(quickstart._example("prices.yaml")))
    assert code == 0
    assert "ducto_private.publish" in out

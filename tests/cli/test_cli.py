"""The command line: what each command prints, and that every fault is one line and an exit code."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Clock

from ducto_pg import __version__, quickstart
from ducto_pg.cli import main
from ducto_pg.embedded import Server

Connection = psycopg.Connection[tuple[Any, ...]]
Run = Callable[..., tuple[int, str, str]]

PLANS = """
models: {gpt-4o: input_tokens * 0.0025}
plans: {pro: {id: pro, name: Pro, free_allowance: 20, features: {seats: 3}}}
min_balance: 0
"""
YAML = "models:\n  gpt-4o: input_tokens * 0.0025\n"
OTHER = '{"models": {"gpt-4o": "input_tokens * 0.003", "_default": "input_tokens"}, "min_balance": 7}'
REMARKS = ("ducto-pg: note: ", "ducto-pg: days and months are those of ")


def cells(out: str) -> list[list[str]]:
    """A table's words, line by line."""
    return [line.split() for line in out.splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; answers exit code, output and complaint, which is at most one line, without remarks."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        err = "".join(line for line in err.splitlines(True) if not line.startswith(REMARKS))
        assert err.count("\n") <= 1
        return code, out, err

    return run


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds a.yaml, b.json and bad.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(YAML)
    Path("b.json").write_text(OTHER)
    Path("plans.yaml").write_text(PLANS)
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
    assert re.fullmatch(rf"ducto_pg {__version__} installed: \d+ tables and views, \d+ RPCs\n", out)
    assert run("setup", "--dsn", empty) == (0, "nothing to change\n", "")
    code, _, problem = run("setup", "--dsn", empty, "--revoke-from", "nobody's")
    assert (code, '"nobody\'s" does not exist' in problem) == (1, True)
    assert run("setup", "--dsn", empty, "--grant-to", "pg_monitor") == (0, "rights set\n", "")
    assert json.loads(run("setup", "--dsn", empty, "--json")[1])["errors"] == []


def test_sql_is_what_setup_does(run: Run, server_conn: Connection, empty: str) -> None:
    code, out, _ = run("sql", "--grant-read-to", "somebody's")
    assert code == 0
    assert r"E'somebody''s'" in out
    server_conn.execute(run("sql")[1])
    assert run("verify", "--dsn", empty) == (0, "sound\n", "")


def test_prices_are_published_listed_activated_compared_and_exported(run: Run, files: None, database: str) -> None:
    assert run("pricing", "validate", "a.yaml") == (0, "a.yaml: sound (models: 1, plans: 0)\n", "")
    assert run("pricing", "list") == (0, "none\n", "")
    assert run("pricing", "export") == (1, "", "ducto-pg: no pricing version is active yet\n")
    assert run("pricing", "publish", "a.yaml", "--label", "first") == (0, "version 1 published and active\n", "")
    assert run("pricing", "publish", "a.yaml", "--label", "first") == (0, "version 1 published and active\n", "")
    assert run("pricing", "publish", "b.json", "--no-activate") == (0, "version 2 published, not activated\n", "")
    head, second, first = cells(run("pricing", "list")[1])
    assert head == ["version", "active", "created_at", "label"]
    assert (second[:2], first[:2], first[-1]) == (["2", "false"], ["1", "true"], "first")

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


def test_prices_are_scheduled_and_taken_back(run: Run, files: None, database: str, clock: Clock) -> None:
    clock.set("2026-05-31T12:00")
    assert run("pricing", "publish", "a.yaml")[0] == 0
    assert run("pricing", "publish", "b.json", "--at", "2026-06-01T00:00+02:00") == (
        0,
        "version 2 published, active from 2026-06-01T00:00:00+02:00\n",
        "",
    )
    assert json.loads(run("pricing", "export")[1])["models"] == {"gpt-4o": "input_tokens * 0.0025"}
    clock.set("2026-05-31T22:00")
    assert run("pricing", "diff", "b.json") == (0, "no difference\n", "")

    assert run("pricing", "activate", "1", "--at", "2026-07-01") == (
        0,
        "version 1 active from 2026-07-01T00:00:00+00:00\n",
        "",
    )
    assert run("pricing", "unschedule", "1") == (0, "version 1 not scheduled any more\n", "")
    code, out, err = run("pricing", "unschedule", "1")
    assert (code, out) == (1, "")
    assert err.startswith(
        "ducto-pg: version 1 is not scheduled (Only an activation with a time to come can be taken back"
    )
    assert json.loads(run("pricing", "activate", "1", "--at", "2026-07-01", "--json")[1])["version"] == 1
    said = "ducto-pg: p_at must be a time to come, not 2026-01-01 00:00:00"
    assert run("pricing", "publish", "a.yaml", "--at", "2026-01-01")[2].startswith(said)
    said = "ducto-pg: at is when the version becomes active, but activate is False\n"
    assert run("pricing", "publish", "a.yaml", "--at", "2026-07-01", "--no-activate") == (1, "", said)


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


@pytest.fixture
def shop(run: Run, files: None, database: str, conn: Connection) -> Connection:
    """Prices with a plan, `ann` with 100 credits of which 30 are charged, and the team `reds` that she is in."""
    assert run("pricing", "publish", "plans.yaml")[0] == 0
    assert cells(run("credit", "add", "ann", "100", "--type", "purchase", "--reference", "invoice-1")[1])[1:4] == [
        ["user_id", "ann"],
        ["amount", "100"],
        ["new_balance", "100"],
    ]
    conn.execute("select ducto.deduct_credits('ann', 30, p_model => 'gpt-4o')")
    assert cells(run("team", "create", "The Reds", "--team-id", "reds", "--initial-balance", "50")[1]) == [
        ["team_id", "reds"],
        ["name", "The", "Reds"],
        ["idempotent", "false"],
    ]
    assert cells(run("team", "add", "reds", "ann", "--spend-cap", "5")[1])[-1] == ["role", "member"]
    return conn


def test_credits_are_added_removed_refunded_and_listed(run: Run, shop: Connection) -> None:
    assert ["balance", "70"] in cells(run("balance", "ann")[1])
    assert json.loads(run("balance", "ann", "--json")[1])["available"] == 70
    assert ["balance", "0"] in cells(run("balance", "ann", "--at", "2020-01-01")[1])
    assert ["closing_balance", "70"] in cells(run("statement", "ann", "2020-01-01", "2090-01-01")[1])
    listed = cells(run("credit", "list", "ann")[1])
    columns = ["seq", "type", "amount", "allowance_used", "balance_after", "cost", "model", "created_at"]
    assert listed[0] == [*columns, "transaction_id"]
    assert [line[:7] for line in listed[1:]] == [
        ["2", "usage", "-30", "0", "70", "30", "gpt-4o"],
        ["1", "purchase", "100", "0", "100", listed[2][5], listed[2][6]],
    ]
    charge, grant = (line[-1] for line in listed[1:])
    assert ["amount", "10"] in cells(run("credit", "refund", charge, "--amount", "10")[1])
    assert ["amount", "-5"] in cells(run("credit", "remove", "ann", "5", "--transaction-id", grant)[1])
    assert ["credit_limit", "7"] in cells(run("credit", "limit", "ann", "7")[1])
    said = "ducto-pg: exceeds_grant: More than is left of the grant.\n"
    assert run("credit", "remove", "ann", "99", "--transaction-id", grant) == (1, "", said)
    code, out, err = run("credit", "remove", "ann", "99", "--transaction-id", grant, "--json")
    assert (code, json.loads(out)["error"], err) == (1, "exceeds_grant", said)
    assert run("credit", "list", "bob") == (0, "none\n", "")
    shop.execute("select ducto.deduct_credits('ann', 0, p_model => E'\\x1b[31m\\n')")
    assert cells(run("credit", "list", "ann", "--limit", "1")[1])[1][6] == r"'\x1b[31m\n'"
    assert [row["type"] for row in json.loads(run("credit", "list", "ann", "--json", "--type", "refund")[1])] == [
        "refund"
    ]


def test_plans_and_caps(run: Run, shop: Connection) -> None:
    assert cells(run("plan", "set", "ann", "pro")[1]) == [
        ["user_id", "ann"],
        ["plan_id", "pro"],
        ["idempotent", "false"],
    ]
    assert ["features", '{"seats":', "3}"] in cells(run("plan", "show", "ann")[1])
    assert ["allowance_remaining", "20"] in cells(run("plan", "allowance", "ann")[1])
    assert cells(run("plan", "feature", "ann", "sso")[1])[-1] == ["has_feature", "false"]
    assert run("plan", "set", "ann", "gold")[2].startswith("ducto-pg: plan_not_found: ")
    assert cells(run("plan", "remove", "ann")[1]) == [["user_id", "ann"], ["idempotent", "false"]]

    assert ["action", "warn"] in cells(run("cap", "set", "ann", "40", "--action", "warn")[1])
    names, cap = cells(run("cap", "list", "ann")[1])
    assert names == ["user_id", "cap_type", "limit", "action", "spent", "resets_at"]
    assert cap[:5] == ["ann", "daily", "40", "warn", "30"]
    checked = [["capped", "false"], ["current_spend", "30"], ["cap_limit", "40"], ["action", "warn"]]
    assert cells(run("cap", "check", "ann", "--amount", "11")[1]) == checked
    assert ["limit", "40"] in cells(run("cap", "remove", "ann", "daily")[1])
    assert run("cap", "remove", "ann", "daily")[0] == 1
    assert "p_cap_type" in run("cap", "set", "ann", "40", "--cap-type", "hourly")[2]


def test_teams_and_statistics(run: Run, shop: Connection) -> None:
    shop.execute("select ducto.deduct_team_credits('reds', 'ann', 4)")
    assert ["balance", "46"] in cells(run("team", "show", "reds")[1])
    assert cells(run("team", "members", "reds")[1]) == [
        ["user_id", "role", "spend_cap", "total_spent", "spend_cap_period", "spent"],
        ["ann", "member", "5", "4", "lifetime", "4"],
    ]
    assert run("team", "show", "blues")[2] == "ducto-pg: team_not_found: No such team.\n"
    assert run("team", "create", "Reds", "--team-id", "reds")[0] == 1

    assert ["total_credits_consumed", "34"] in cells(run("stats", "total")[1])
    assert cells(run("stats", "users")[1])[1][:3] == ["ann", "34", "2"]
    assert cells(run("stats", "models", "--start", "2020-01-01")[1])[1][:3] == ["gpt-4o", "30", "1"]
    assert run("stats", "days", "--end", "2020-01-01") == (0, "none\n", "")
    assert run("stats", "days", "--user-id", "nobody") == (0, "none\n", "")
    assert len(cells(run("stats", "top", "--limit", "1")[1])) == 2
    assert run("stats", "rollup")[0] == 0
    assert run("team", "remove", "reds", "ann")[0] == 0


def test_sweeping_goes_on_until_nothing_is_left(run: Run, shop: Connection, clock: Clock) -> None:
    for number in range(3):
        shop.execute(
            "select ducto.add_credits('u' || %s::text, 10, 'promotion', p_expires_at => %s)",
            [number, clock.now() + timedelta(hours=1)],
        )
    clock.advance(timedelta(hours=2))
    counts = [["expired_count", "3"], ["expired_amount", "30"]]
    assert cells(run("sweep", "--dry-run")[1]) == [*counts, ["dry_run", "true"], ["account_count", "3"]]
    assert cells(run("sweep", "--limit", "1")[1]) == [*counts, ["dry_run", "false"], ["account_count", "3"]]
    assert json.loads(run("sweep", "--json")[1])["expired_count"] == 0
    assert run("verify")[0] == 0


def test_events_are_fetched_and_acknowledged(run: Run, shop: Connection) -> None:
    events = json.loads(run("events", "fetch", "--json", "--lease-seconds", "1")[1])
    assert {event["type"] for event in events} >= {"account_opened"}
    ids = [event["event_id"] for event in events]
    assert run("events", "ack", *ids) == (0, f"{len(ids)}\n", "")
    assert run("events", "fetch") == (0, "none\n", "")


def test_publishing_tells_of_a_plan_that_has_gone(run: Run, shop: Connection) -> None:
    assert run("plan", "set", "ann", "pro")[0] == 0
    code, out, err = run("pricing", "publish", "a.yaml")
    assert (code, out) == (0, "version 2 published and active\n")
    assert "pro" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pricing validate missing.yaml", "missing.yaml: No such file or directory"),
        ("pricing validate bad.yaml", "bad.yaml: models.gpt-4o: "),
        ("pricing compile .", ".: Is a directory"),
        ("pricing activate 9", "there is no pricing version 9"),
        ("pricing activate 99999999999", "there is no pricing version 99999999999"),
        ("pricing unschedule 9", "there is no pricing version 9"),
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
    said = "ducto-pg: this database does not have ducto_pg, or an older one: name another, or run ducto-pg setup\n"
    for command in (["verify"], ["pricing", "list"], ["pricing", "publish", "a.yaml"], ["pricing", "activate", "1"]):
        assert run(*command, "--dsn", empty) == (1, "", said)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "nonsense",
        "pricing",
        "pricing activate one",
        "pricing activate 1 --at tomorrow",
        "pricing unschedule",
        "pricing diff",
        "verify --x",
        "credit add ann 1.5",
        "team show",
        "stats days --start yesterday",
        "events ack",
    ],
)
def test_misuse_is_exit_code_2(arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2


def test_a_time_is_iso_8601(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["stats", "days", "--start", "yesterday"])
    assert "'yesterday' is no ISO 8601 time, such as 2026-01-31T12:00+01:00" in capsys.readouterr().err


def test_help_says_what_arguments_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["credit", "add", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "AMOUNT whole credits" in out
    assert "--type TYPE (default: adjustment)" in out
    assert "an ISO 8601 time, in UTC if it has no offset" in out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pricing", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    names = ("validate", "publish", "list", "activate", "unschedule", "diff", "export", "compile", "import")
    assert all(name in out for name in names)


def test_the_shipped_prices_compile(run: Run) -> None:
    code, out, _ = run("pricing", "compile", str(quickstart._example("prices.yaml")))
    assert code == 0
    assert "ducto_private.publish" in out

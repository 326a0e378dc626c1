"""What somebody drops, replaces or disables is told by verify, and made again and named by the next setup."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from test_catalog import CONFIG
from test_install import catalog

import ducto_pg
from ducto_pg import CreditManager, SetupResult, embedded
from ducto_pg.cli import main
from ducto_pg.embedded import Server

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]

USAGE = {"model": "gpt-4", "input_tokens": 500}
NOTHING = SetupResult()
BALANCE = "function ducto.get_balance(text,timestamp with time zone)"
CLOCK = "function ducto_private.active_version(timestamp with time zone)"
VERSION = "function ducto.version()"
APPEND = "trigger append_only on ducto_private.transactions"

# What somebody did, and what the next setup says that it made again or dropped. verify names the same before.
DAMAGES = {
    "a dropped RPC": (
        "drop function ducto.get_balance",
        [BALANCE, "comment " + BALANCE],
    ),
    "a dropped helper": ("drop function ducto_private.active_version", [CLOCK]),
    "a replaced body": (
        "create or replace function ducto_private.active_version(p_now timestamptz) returns integer language sql"
        " stable set search_path = pg_catalog, pg_temp as 'select 1'",
        [CLOCK],
    ),
    "another return type": (
        "drop function ducto_private.active_version; create function ducto_private.active_version(p_now timestamptz)"
        " returns text language sql as 'select 1'",
        [CLOCK],
    ),
    "settings taken off": ("alter function ducto.version() reset all", [VERSION]),
    "a search path": ("alter function ducto.version() set search_path = public", [VERSION]),
    "another volatility": ("alter function ducto.version() volatile", [VERSION]),
    "the caller's rights": ("alter function ducto.version() security invoker", [VERSION]),
    "a helper with the owner's rights": (
        "alter function ducto_private.active_version(timestamptz) security definer",
        [CLOCK],
    ),
    "a disabled trigger": ("alter table ducto_private.transactions disable trigger append_only", [APPEND]),
    "a dropped trigger": ("drop trigger append_only on ducto_private.transactions", [APPEND]),
    "the triggers' function": (
        "drop function ducto_private.refuse_change cascade",
        [
            "function ducto_private.refuse_change()",
            APPEND,
            "trigger append_only on ducto_private.transaction_details",
            "trigger append_only_truncate on ducto_private.transactions",
            "trigger append_only_truncate on ducto_private.transaction_details",
        ],
    ),
    "another trigger of that name": (
        "drop trigger append_only on ducto_private.transactions; create trigger append_only after insert on"
        " ducto_private.transactions for each row execute function ducto_private.refuse_change()",
        [APPEND],
    ),
    "a dropped index": (
        "drop index ducto_private.transactions_key",
        ["index ducto_private.transactions_key"],
    ),
    "an index on something else": (
        "drop index ducto_private.transactions_key;"
        " create index transactions_key on ducto_private.transactions (account_id)",
        ["index ducto_private.transactions_key"],
    ),
    "a dropped CHECK": (
        "alter table ducto_private.credit_lots drop constraint credit_lots_amount_check",
        ["constraint credit_lots_amount_check on ducto_private.credit_lots"],
    ),
    "a dropped primary key, and what refers to it": (
        "alter table ducto_private.transactions drop constraint transactions_pkey cascade",
        [
            "constraint transactions_pkey on ducto_private.transactions",
            "constraint transaction_details_transaction_id_account_id_fkey on ducto_private.transaction_details",
        ],
    ),
    "a foreign key that is not enforced": (
        "alter table ducto_private.lot_entries disable trigger all",
        ["constraint lot_entries_lot_id_account_id_fkey on ducto_private.lot_entries"],
    ),
    "a dropped default": (
        "alter table ducto_private.transactions alter transaction_id drop default",
        ["default ducto_private.transactions.transaction_id"],
    ),
    "a dropped not null": (
        "alter table ducto_private.accounts alter balance drop not null",
        ["not null ducto_private.accounts.balance"],
    ),
    "a dropped view": (
        "drop view ducto_read.lots",
        ["view ducto_read.lots", "comment view ducto_read.lots"],
    ),
    "another view of that name": (
        "drop view ducto_read.lots; create view ducto_read.lots as select 1 as lot",
        ["view ducto_read.lots", "comment view ducto_read.lots"],
    ),
    "a dropped schema of views": (
        "drop schema ducto_read cascade",
        [
            f"{comment}{kind}"
            for comment in ("", "comment ")
            for kind in (
                "schema ducto_read",
                *(f"view ducto_read.{name}" for name in ("accounts", "lots", "reservations", "transactions")),
            )
        ],
    ),
    "a ghost of an RPC": (
        "create function ducto.get_balance(p_user_id text) returns integer language sql as 'select 1'",
        ["function ducto.get_balance(text) dropped"],
    ),
    "a ghost of a helper, which makes calls ambiguous": (
        "create function ducto_private.check_limit(p_limit integer, p_hint text default '', p_most integer default 9)"
        " returns void language sql as 'select'",
        ["function ducto_private.check_limit(integer,text,integer) dropped"],
    ),
    "a ghost of what is generated": (
        "create function ducto_private.evaluate(p_formula_id bigint) returns numeric language sql as 'select 1.0'",
        ["function ducto_private.evaluate(bigint) dropped"],
    ),
    "a looking function that says nothing": (
        "create or replace function ducto_private.drift() returns setof ducto_private.difference language sql"
        " as 'select (null::ducto_private.difference).* where false';"
        " drop function ducto_private.active_version",
        ["function ducto_private.drift()", CLOCK],
    ),
    "a catalog that hides": (
        "drop function ducto_private.active_version;"
        " create or replace function ducto_private.catalog() returns setof ducto_private.objects language sql"
        " as 'select o.* from ducto_private.objects as o'",
        ["function ducto_private.catalog()", CLOCK],
    ),
    "a dropped evaluate": (
        "drop function ducto_private.evaluate",
        ["function ducto_private.evaluate(bigint,jsonb,numeric[])"],
    ),
    "a replaced evaluate": (
        "create or replace function ducto_private.evaluate(p_formula_id bigint, p_usage jsonb, p_rates numeric[])"
        " returns numeric language sql stable as 'select 0.0'",
        ["function ducto_private.evaluate(bigint,jsonb,numeric[])"],
    ),
    "a dropped formula": ("drop function {formula}", ["function {formula}"]),
    "a replaced formula": (
        "create or replace function {short}(p_usage jsonb, p_rates numeric[]) returns numeric language plpgsql"
        " immutable parallel safe set search_path = pg_catalog, pg_temp as 'begin return 0; end'",
        ["function {formula}"],
    ),
    "a formula of another type": (
        "drop function {formula};"
        " create function {short}(p_usage jsonb, p_rates numeric[]) returns text language sql as 'select 1'",
        ["function {formula}"],
    ),
    "a procedure in its place": (
        "drop function ducto.version(); create procedure ducto.version() language sql as 'select 1'",
        [VERSION, "comment " + VERSION],
    ),
    "a ghost that is a procedure": (
        "create procedure ducto.version(p_of text) language sql as 'select 1'",
        ["function ducto.version(text) dropped"],
    ),
    "a ghost that is an aggregate": (
        "create aggregate ducto_private.floor_divide(integer) (sfunc = int4pl, stype = integer)",
        ["function ducto_private.floor_divide(integer) dropped"],
    ),
    "the type of the looking function": (
        "drop type ducto_private.difference cascade",
        ["type ducto_private.difference", "function ducto_private.drift()"],
    ),
    "another comment": (
        "comment on function ducto.version is 'mine'",
        ["comment function ducto.version()"],
    ),
}


@pytest.fixture
def priced(conn: Connection) -> Connection:
    """A database with prices, a charge, credits that expire, and a team."""
    credits = CreditManager(conn)
    credits.publish_pricing(CONFIG)
    credits.add_credits("alice", 1000).or_raise()
    credits.deduct("alice", USAGE).or_raise()
    return conn


def told(conn: Connection) -> set[str]:
    """The objects that verify names."""
    found = CreditManager(conn).verify_ledger()
    assert {(row.invariant, row.account_id) for row in found} <= {("catalog", "")}
    return {row.detail for row in found}


def nothing_to_do(conn: Connection, **options: Any) -> None:
    with conn.transaction():
        assert ducto_pg.setup(conn, **options) == NOTHING
        assert conn.execute("select pg_current_xact_id_if_assigned()").fetchone() == (None,)


def formulas(conn: Connection) -> dict[str, str]:
    row = conn.execute(
        "select p.oid::regprocedure::text, p.oid::regproc::text from ducto_private.formulas as f join pg_proc as p"
        " on p.proname = ducto_private.formula_name(f.formula_id) order by 1 limit 1"
    ).fetchone()
    assert row
    return {"formula": row[0], "short": row[1]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_told_repaired_and_named(priced: Connection, damage: str) -> None:
    statement, named = DAMAGES[damage]
    names = formulas(priced)
    expected = {name.replace("{formula}", names["formula"]) for name in named}
    before = catalog(priced)
    for name, text in names.items():
        statement = statement.replace("{" + name + "}", text)
    priced.execute(statement.encode())
    # A looking function that was replaced cannot be trusted: the next setup looks at it first.
    if "looking" not in damage and "hides" not in damage:
        assert told(priced) == {name.removesuffix(" dropped") for name in expected}
    result = ducto_pg.setup(priced)
    assert set(result.repaired) == expected, result.errors
    assert len(result.repaired) == len(expected)
    made = {name.partition("(")[0].removeprefix("function ") for name in expected if name.startswith("function ducto.")}
    assert set(result.rpcs_created) == {name for name in made if f"function {name}(text) dropped" not in expected}
    assert catalog(priced) == before
    assert told(priced) == set()
    nothing_to_do(priced)
    CreditManager(priced).deduct("alice", USAGE).or_raise()


# What setup cannot give back, or what stands in its way, and what it says.
REFUSED = {
    "a dropped table": ("drop table ducto_private.teams cascade", "table ducto_private.teams is missing"),
    "a dropped column": (
        "alter table ducto_private.transactions drop column metadata cascade",
        "column ducto_private.transactions.metadata is missing",
    ),
    "another type of a column": (
        "alter table ducto_private.deliveries alter attempts type bigint",
        "column ducto_private.deliveries.attempts is bigint, not integer",
    ),
    "another type of an answer": (
        "alter type ducto.violation add attribute more text",
        "drop type ducto.violation cascade",
    ),
    "what it remembers": ("drop table ducto_private.objects cascade", "table ducto_private.objects is missing"),
    "what it installed": ("drop table ducto_private.installation", "table ducto_private.installation is missing"),
    "its memory emptied": ("truncate ducto_private.objects", "lost their contents"),
    "rows that break a constraint": (
        "alter table ducto_private.teams drop constraint teams_name_check;"
        " insert into ducto_private.teams (account_id, name) values ('t', '')",
        "constraint teams_name_check on ducto_private.teams: check constraint",
    ),
    "a view of one's own on a ghost": (
        "create function ducto.version(p_of text) returns text language sql as 'select 1';"
        " create view mine as select ducto.version('x')",
        "function ducto.version(text): cannot drop function ducto.version(text) because other objects depend on it;"
        " view public.mine depends on",
    ),
    "a view of one's own on a function of another type": (
        "drop function ducto_private.active_version; create function ducto_private.active_version(p_now timestamptz)"
        " returns text language sql as 'select 1'; create view mine as select ducto_private.active_version(now())",
        f"{CLOCK}: cannot drop",
    ),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_what_cannot_be_repaired_is_named_and_nothing_changes(priced: Connection, damage: str) -> None:
    statement, message = REFUSED[damage]
    priced.execute("drop index ducto_private.prices_formula")
    priced.execute(statement.encode())
    before = catalog(priced)
    (error,) = ducto_pg.setup(priced).errors
    assert message in error
    assert catalog(priced) == before


def test_the_cure_of_a_changed_type(priced: Connection) -> None:
    before = catalog(priced)
    priced.execute("alter type ducto.violation add attribute more text")
    priced.execute("drop type ducto.violation cascade")
    assert "type ducto.violation" in ducto_pg.setup(priced).repaired
    assert catalog(priced) == before
    nothing_to_do(priced)


def test_what_is_the_owners_own_stays(priced: Connection) -> None:
    """verify names what could change what our calls do; an index for queries of one's own is nobody's business."""
    priced.execute("create function ducto_private.mine() returns integer language sql as 'select 1'")
    priced.execute("create index mine on ducto_private.transactions (model)")
    priced.execute("create unique index more on ducto_private.transactions (transaction_id)")
    priced.execute("create rule hide as on insert to ducto_private.events do instead nothing")
    priced.execute("create table kid () inherits (ducto_private.accounts)")
    for what in ("enable", "force"):
        priced.execute(f"alter table ducto_private.spend_caps {what} row level security".encode())
    priced.execute("alter table ducto_private.teams enable row level security")
    assert ducto_pg.setup(priced).repaired == ["revoke EXECUTE on routine ducto_private.mine() from public"]
    nothing_to_do(priced)
    assert told(priced) == {
        "function ducto_private.mine()",
        "index ducto_private.more",
        "rule hide on ducto_private.events",
        "child table public.kid of ducto_private.accounts",
        "row security ducto_private.spend_caps",
    }
    priced.execute("drop function ducto.version")
    assert "function ducto.version()" in ducto_pg.setup(priced).repaired
    row = priced.execute("select ducto_private.mine(), prosecdef, proconfig from pg_proc where proname = 'mine'")
    assert row.fetchone() == (1, False, None)


def test_the_command_line_says_so(priced: Connection, capsys: pytest.CaptureFixture[str]) -> None:
    priced.execute("alter table ducto_private.transactions disable trigger append_only")
    dsn = ("--dsn", priced.info.dsn)
    assert main(["verify", *dsn]) == 1
    assert APPEND in capsys.readouterr().out
    assert main(["setup", *dsn]) == 0
    assert capsys.readouterr().out == f"repaired: {APPEND}\n"
    assert main(["verify", *dsn]) == 0
    assert main(["setup", *dsn]) == 0
    assert capsys.readouterr().out == "sound\nnothing to change\n"


class TestNewRelease:
    """Other contents than those that installed, as of a release."""

    @pytest.fixture(autouse=True)
    def release(self, priced: Connection) -> None:
        priced.execute("update ducto_private.installation set contents = 'older'")

    def test_what_an_older_release_made_goes(self, priced: Connection) -> None:
        priced.execute("create function ducto.old() returns integer language sql as 'select 1'")
        priced.execute("create view ducto_read.old as select 1 as one")
        priced.execute("create function ducto_private.mine() returns integer language sql as 'select 1'")
        priced.execute("select ducto_private.store_objects('{function ducto_private.mine()}')")
        priced.execute("select ducto_private.apply_grants()")
        assert set(ducto_pg.setup(priced).repaired) == {"function ducto.old() dropped", "view ducto_read.old dropped"}
        assert told(priced) == {"function ducto_private.mine()"}
        nothing_to_do(priced)

    def test_an_argument_that_was_added_leaves_no_ghost(self, priced: Connection) -> None:
        ghost = "ducto_private.floor_divide(numeric)"
        priced.execute(f"create function {ghost} returns integer language sql as 'select 1'")
        priced.execute("select ducto_private.store_objects(), ducto_private.apply_grants()")
        assert ducto_pg.setup(priced).repaired == [f"function {ghost} dropped"]
        nothing_to_do(priced)

    def test_a_view_of_ones_own_on_what_would_go(self, priced: Connection) -> None:
        priced.execute("create function ducto.old() returns integer language sql as 'select 1'")
        priced.execute("select ducto_private.store_objects()")
        priced.execute("create view mine as select ducto.old()")
        before = catalog(priced)
        (error,) = ducto_pg.setup(priced).errors
        assert error.startswith("function ducto.old(): cannot drop function ducto.old() because other objects depend")
        assert catalog(priced) == before

    def test_damage_is_repaired_first(self, priced: Connection) -> None:
        before = catalog(priced)
        priced.execute("drop function ducto.version; drop trigger append_only on ducto_private.transactions")
        priced.execute("drop view ducto_private.ledger cascade")
        result = ducto_pg.setup(priced)
        assert {APPEND, VERSION, "view ducto_private.ledger"} <= set(result.repaired)
        assert catalog(priced) == before
        nothing_to_do(priced)

    def test_formulas_and_rights_are_named_too(self, priced: Connection) -> None:
        formula = formulas(priced)["formula"]
        priced.execute(f"drop function {formula}".encode())
        priced.execute("grant select on ducto_private.accounts to public")
        assert set(ducto_pg.setup(priced).repaired) == {
            f"function {formula}",
            "revoke SELECT on table ducto_private.accounts from public",
        }
        nothing_to_do(priced)

    def test_another_major_version_may_write_definitions_otherwise(self, priced: Connection) -> None:
        priced.execute("update ducto_private.installation set major = 1")
        priced.execute("update ducto_private.objects set definition = definition || ' ' where kind = 'constraint'")
        assert told(priced) == set()
        priced.execute("drop index ducto_private.prices_formula")
        assert told(priced) == {"index ducto_private.prices_formula"}
        assert ducto_pg.setup(priced).repaired == ["index ducto_private.prices_formula"]
        nothing_to_do(priced)


class TestGrants:
    @pytest.fixture
    def roles(self, server: Server) -> Iterator[list[str]]:
        names = ["ducto_drift_app", "ducto_drift_reader"]
        with psycopg.connect(server.dsn(), autocommit=True) as admin, ExitStack() as stack:
            for name in names:
                admin.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
                stack.callback(admin.execute, sql.SQL("drop role if exists {}").format(sql.Identifier(name)))
            yield names

    @pytest.fixture
    def granted(self, roles: list[str], priced: Connection) -> Connection:
        ducto_pg.setup(priced, grant_to=roles[0], grant_read_to=roles[1]).or_raise()
        nothing_to_do(priced, grant_to=roles[0])
        return priced

    @pytest.mark.parametrize(
        ("statement", "named"),
        [
            (
                "revoke usage on schema ducto from ducto_drift_app",
                ["grant USAGE on schema ducto to ducto_drift_app"],
            ),
            (
                "revoke execute on function ducto.version from ducto_drift_app",
                ["grant EXECUTE on routine ducto.version() to ducto_drift_app"],
            ),
            (
                "revoke select on ducto_read.lots from ducto_drift_reader",
                ["grant SELECT on table ducto_read.lots to ducto_drift_reader"],
            ),
            (
                "grant usage on schema ducto_private to public; grant select on ducto_private.accounts to public;"
                " grant execute on function ducto.version to public",
                [
                    "revoke EXECUTE on routine ducto.version() from public",
                    "revoke USAGE on schema ducto_private from public",
                    "revoke SELECT on table ducto_private.accounts from public",
                ],
            ),
        ],
    )
    def test_rights_lost_or_given_by_hand(self, granted: Connection, statement: str, named: list[str]) -> None:
        before = catalog(granted)
        granted.execute(statement.encode())
        assert catalog(granted) != before
        result = ducto_pg.setup(granted)
        assert (sorted(result.repaired), result.errors) == (sorted(named), [])
        nothing_to_do(granted)

    def test_a_dropped_function_comes_back_with_its_rights(self, granted: Connection) -> None:
        granted.execute("drop function ducto.version")
        assert set(ducto_pg.setup(granted).repaired) == {
            VERSION,
            "comment " + VERSION,
            "grant EXECUTE on routine ducto.version() to ducto_drift_app",
        }

    def test_a_role_that_was_dropped_is_forgotten_and_said_so(self, granted: Connection) -> None:
        granted.execute("drop owned by ducto_drift_app; drop role ducto_drift_app; create role ducto_drift_app")
        assert ducto_pg.setup(granted).repaired == ["role ducto_drift_app, which was dropped: forgotten"]
        row = granted.execute("select has_schema_privilege('ducto_drift_app', 'ducto', 'usage')").fetchone()
        assert row == (False,)
        nothing_to_do(granted)

    def test_a_copy_in_another_cluster_goes_by_names(self, granted: Connection) -> None:
        """There every cluster has its own number, and roles have others."""
        granted.execute("update ducto_private.grants set system_id = 1, role_id = 1")
        granted.execute("revoke usage on schema ducto from ducto_drift_app")
        assert ducto_pg.setup(granted).repaired == ["grant USAGE on schema ducto to ducto_drift_app"]
        nothing_to_do(granted)

    def test_a_restore_without_rights(self, server: Server, granted: Connection, tmp_path: Path) -> None:
        with restored(server, granted, tmp_path, [["--format=custom"]], ["--no-acl"]) as copy:
            assert told(copy) == set()
            result = ducto_pg.setup(copy)
            text = "\n".join(result.repaired)
            assert "grant USAGE on schema ducto to ducto_drift_app" in text
            assert "grant USAGE on schema ducto_read to ducto_drift_reader" in text
            assert "revoke EXECUTE on routine ducto." in text
            assert catalog(copy) == catalog(granted)
            nothing_to_do(copy)


class restored:
    """A copy of a database, by pg_dump with each of these options in turn; `between` two of them something happens."""

    def __init__(
        self,
        server: Server,
        conn: Connection,
        folder: Path,
        dumps: list[list[str]],
        options: list[str] | None = None,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        if not server.bindir or not (server.bindir / "pg_dump").exists():
            pytest.skip("needs a server started here, with its pg_dump")
        self._admin = psycopg.connect(server.dsn(), autocommit=True)
        self._name = sql.Identifier(f"{conn.info.dbname}_copy")
        self._dsn = server.dsn(f"{conn.info.dbname}_copy")
        self._admin.execute(sql.SQL("create database {} template template0").format(self._name))
        for number, dump in enumerate(dumps):
            file = folder / f"{number}.dump"
            run(
                server.bindir / "pg_dump",
                f"--dbname={server.dsn(conn.info.dbname)}",
                f"--file={file}",
                "--format=custom",
                *dump,
            )
            between()
        for number in range(len(dumps)):
            file = folder / f"{number}.dump"
            run(server.bindir / "pg_restore", f"--dbname={self._dsn}", "--exit-on-error", *(options or []), file)

    def __enter__(self) -> Connection:
        self._conn = psycopg.connect(self._dsn, autocommit=True)
        return self._conn

    def __exit__(self, *error: object) -> None:
        self._conn.close()
        self._admin.execute(sql.SQL("drop database {} with (force)").format(self._name))
        self._admin.close()


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# A formula that CONFIG lacks: its function is made by the publish that a copy does not see.
DEARER = {**CONFIG, "models": {"gpt-4": "(input_tokens + 7) * (output_tokens + 3) * 2"}}


class TestCopiesWithoutFunctions:
    def repaired(self, copy: Connection) -> None:
        """Until setup, a charge by the new price is an error that charges nothing; then it is that price."""
        manager = CreditManager(copy)
        balance = manager.get_balance("alice")
        with pytest.raises(ducto_pg.NotInstalledError, match=r"ducto_private\.formula_"):
            manager.deduct("alice", USAGE)
        with pytest.raises(ducto_pg.NotInstalledError):
            manager.calculate_cost(USAGE)
        assert manager.get_balance("alice") == balance
        missing = told(copy)
        assert any("formula_" in name for name in missing)
        result = ducto_pg.setup(copy)
        assert {name.replace(" ", "") for name in result.repaired} == {name.replace(" ", "") for name in missing}
        assert told(copy) == set()
        nothing_to_do(copy)
        assert manager.calculate_cost(USAGE).total == Decimal("3042.5")

    def test_schema_first_then_a_publish_then_the_data(
        self, server: Server, priced: Connection, tmp_path: Path
    ) -> None:
        def publish() -> None:
            CreditManager(priced).publish_pricing(DEARER)

        with restored(server, priced, tmp_path, [["--schema-only"], ["--data-only"]], between=publish) as copy:
            self.repaired(copy)
            assert catalog(copy) == catalog(priced)

    def test_logical_replication_with_a_publish_meanwhile(self, server: Server, tmp_path: Path) -> None:
        if not server.bindir or not (server.bindir / "pg_dump").exists():
            pytest.skip("needs a server started here, with its pg_dump")
        settings = {"fsync": "off", "wal_level": "logical"}
        with ExitStack() as stack:
            first = stack.enter_context(embedded.start(server.bindir, settings=settings))
            source = stack.enter_context(psycopg.connect(first.dsn(), autocommit=True))
            source.execute("create database copy")
            copy = stack.enter_context(psycopg.connect(first.dsn("copy"), autocommit=True))
            ducto_pg.setup(source).or_raise()
            manager = CreditManager(source)
            manager.publish_pricing(CONFIG)
            manager.add_credits("alice", 10000).or_raise()
            file = tmp_path / "schema.sql"
            run(server.bindir / "pg_dump", f"--dbname={first.dsn()}", f"--file={file}", "--schema-only")
            run(server.bindir / "psql", "-qXd", first.dsn("copy"), "-v", "ON_ERROR_STOP=1", "-f", file)
            source.execute("create publication ducto for all tables")
            source.execute("select pg_create_logical_replication_slot('ducto', 'pgoutput')")
            copy.execute(
                sql.SQL("create subscription ducto connection {} publication ducto with (create_slot = false)").format(
                    sql.Literal(first.dsn())
                )
            )
            manager.publish_pricing(DEARER)
            ready = (
                "select (select count(*) = 2 from ducto_private.pricing_versions)"
                " and not exists (select from pg_subscription_rel where srsubstate <> 'r')"
            )
            for _ in range(600):
                if copy.execute(ready).fetchone() == (True,):
                    break
                time.sleep(0.05)
            self.repaired(copy)
            copy.execute("drop subscription ducto")


class TestBadMoments:
    def test_a_charge_holds_the_table(self, priced: Connection, connect: Connect) -> None:
        priced.execute("drop function ducto.version; drop trigger append_only on ducto_private.transactions")
        before = catalog(priced)
        charge = connect(autocommit=False)
        CreditManager(charge).deduct("alice", USAGE).or_raise()
        assert ducto_pg.setup(priced, lock_timeout="50ms").errors == [
            f"{APPEND}: canceling statement due to lock timeout"
        ]
        assert catalog(priced) == before
        charge.rollback()
        assert APPEND in ducto_pg.setup(priced, lock_timeout="50ms").repaired

    def test_repairing_functions_waits_for_no_charge(self, priced: Connection, connect: Connect) -> None:
        charge = connect(autocommit=False)
        CreditManager(charge).deduct("alice", USAGE).or_raise()
        priced.execute("drop function ducto.version")
        assert VERSION in ducto_pg.setup(priced, lock_timeout="50ms").repaired

    def test_it_is_killed_half_way(self, priced: Connection, connect: Connect) -> None:
        priced.execute("drop function ducto.version; drop trigger append_only on ducto_private.transactions")
        before = catalog(priced)
        charge, victim = connect(autocommit=False), connect()
        CreditManager(charge).deduct("alice", USAGE).or_raise()
        results: list[SetupResult] = []
        thread = threading.Thread(target=lambda: results.append(ducto_pg.setup(victim, lock_timeout="60s")))
        thread.start()
        pid = [victim.info.backend_pid]
        while priced.execute("select cardinality(pg_blocking_pids(%s))", pid).fetchone() == (0,):
            pass
        priced.execute("select pg_terminate_backend(%s)", pid)
        thread.join()
        assert "terminating connection" in results[0].errors[0]
        assert catalog(priced) == before
        charge.rollback()
        assert {APPEND, VERSION} <= set(ducto_pg.setup(priced).repaired)

    def test_twenty_at_once_repair_once(self, priced: Connection) -> None:
        priced.execute("drop function ducto.version; drop view ducto_read.lots")
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(ducto_pg.setup, [priced.info.dsn] * 20))
        assert [result.errors for result in results] == [[]] * 20
        assert sorted(len(result.repaired) for result in results) == [0] * 19 + [4]

    def test_a_transaction_that_may_not_write(self, priced: Connection) -> None:
        priced.execute("drop function ducto.version")
        with priced.transaction(force_rollback=True):
            priced.execute("set transaction read only")
            assert told(priced) == {VERSION, "comment " + VERSION}
            (error,) = ducto_pg.setup(priced).errors
            assert error.startswith("this transaction is read-only: nothing was changed")

    def test_a_role_without_rights(self, priced: Connection) -> None:
        priced.execute("drop function ducto.version; create role ducto_drift_nobody login")
        try:
            with priced.transaction(force_rollback=True):
                priced.execute("set local role ducto_drift_nobody")
                (error,) = ducto_pg.setup(priced).errors
                assert "belongs to role postgres, not to ducto_drift_nobody" in error
        finally:
            priced.execute("drop role ducto_drift_nobody")

    def test_the_transaction_of_the_caller_takes_it_back(self, priced: Connection) -> None:
        priced.execute("drop function ducto.version")
        with priced.transaction(force_rollback=True):
            assert VERSION in ducto_pg.setup(priced).repaired
            assert ducto_pg.setup(priced) == NOTHING
        assert VERSION in ducto_pg.setup(priced).repaired

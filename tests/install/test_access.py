"""Who may call what, and what a caller who may plant objects and change settings gains by it: nothing."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.adapt import Buffer, Loader
from psycopg.conninfo import make_conninfo

import ducto_pg
from ducto_pg import CreditManager
from ducto_pg.embedded import Server
from ducto_pg.errors import DuctoError

Connection = psycopg.Connection[Any]
Role = Callable[..., str]
Denied = psycopg.errors.InsufficientPrivilege

# The audience of each function, by the contract.
CALL = {
    *("calculate_cost", "read_usage", "explain_transaction", "version"),
    *("get_active_pricing", "get_auto_topup", "get_balance", "get_pricing_config", "get_pricing_history"),
    *("get_reservation", "get_statement", "get_transaction", "list_reservations", "list_transactions"),
    *("reserve", "reserve_credits", "extend_reservation", "release_reservation"),
    *("deduct", "deduct_credits", "deduct_fixed", "deduct_batch", "refund_credits"),
    *("get_user_plan", "check_allowance", "check_feature", "check_spend_cap", "list_spend_caps"),
    *("get_team", "get_team_balance", "get_team_members"),
    *("reserve_team", "reserve_team_credits", "deduct_team", "deduct_team_credits"),
    *(
        "spend_by_user",
        "spend_by_model",
        "spend_by_label",
        "spend_margin",
        "daily_spend",
        "aggregate_stats",
        "top_users",
    ),
}
ADMIN = CALL | {
    *("activate_pricing", "unschedule_pricing", "add_credits", "remove_credits", "set_credit_limit", "verify_ledger"),
    *("merge_accounts", "set_user_plan", "set_spend_cap", "remove_spend_cap", "sweep_expired_credits"),
    *("create_team", "add_team_member", "remove_team_member", "fetch_events", "ack_events", "rollup_usage"),
    *("freeze_account", "set_low_balance", "set_auto_topup", "remove_auto_topup", "fail_topup"),
}
OWN = {"my_balance", "my_daily_spend", "my_plan", "my_statement", "my_transactions"}
OWNER_ONLY = {"erase_user"}
VIEWS = {"accounts", "lots", "reservations", "transactions"}

_numbers = count()


@pytest.fixture
def role(server: Server) -> Iterator[Role]:
    """Creates roles that are gone at the end; ask for it before the database that they get rights in."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin, ExitStack() as stack:

        def create(name: str = "") -> str:
            name = name or f"ducto_test_{os.getpid()}_{next(_numbers)}"
            admin.execute(sql.SQL("create role {} login password 'secret'").format(sql.Identifier(name)))
            stack.callback(admin.execute, sql.SQL("drop role if exists {}").format(sql.Identifier(name)))
            return name

        yield create


@pytest.fixture
def login(role: Role, db: str) -> Iterator[Callable[[str], Connection]]:
    """Opens sessions as a role."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(
            psycopg.connect(make_conninfo(db, user=name, password="secret"), autocommit=True)
        )


def names(conn: Connection, query: str, *arguments: object) -> set[str]:
    return {name for (name,) in conn.execute(query.encode(), arguments)}


class TestGrants:
    @pytest.mark.parametrize(
        ("given", "functions", "views"),
        [
            ({}, set(), set()),
            ({"grant_to": "x"}, CALL, set()),
            ({"grant_admin_to": "x"}, ADMIN, set()),
            ({"grant_read_to": "x"}, set(), VIEWS),
            ({"grant_to": "x", "grant_read_to": "x"}, CALL, VIEWS),
        ],
        ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
    )
    def test_a_role_has_what_it_was_given_and_nothing_else(
        self, role: Role, conn: Connection, given: dict[str, str], functions: set[str], views: set[str]
    ) -> None:
        name = role()
        ducto_pg.setup(conn, **dict.fromkeys(given, name)).or_raise()
        self.check(conn, name, functions, views)

    def test_roles_with_a_meaning_of_their_own(self, role: Role, conn: Connection) -> None:
        for name in ("service_role", "authenticated", "anon"):
            role(name)
        ducto_pg.setup(conn).or_raise()
        self.check(conn, "service_role", ADMIN, set())
        self.check(conn, "authenticated", OWN, set())
        self.check(conn, "anon", set(), set())

    def test_every_function_has_an_audience(self, conn: Connection) -> None:
        found = names(conn, "select proname from pg_proc where pronamespace = 'ducto'::regnamespace")
        assert found == ADMIN | OWN | OWNER_ONLY
        for name, audience in conn.execute(
            "select p.proname, ducto_private.audiences(p.proname)"
            " from pg_proc as p where p.pronamespace = 'ducto'::regnamespace"
        ):
            expected = ["call", "admin"] if name in CALL else ["admin"] if name in ADMIN else ["own"]
            assert audience == (expected if name not in OWNER_ONLY else []), name

    @staticmethod
    def check(
        conn: Connection, role: str, functions: set[str], views: set[str], schemas: set[str] | None = None
    ) -> None:
        ours = "in ('ducto', 'ducto_private', 'ducto_read')"
        assert functions == names(
            conn,
            "select p.proname from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace"
            f" where n.nspname {ours} and has_function_privilege(%s, p.oid, 'execute')",
            role,
        )
        for right in ("select", "insert", "update", "delete", "truncate", "references", "trigger"):
            assert (views if right == "select" else set()) == names(
                conn,
                "select c.relname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace"
                f" where n.nspname {ours} and c.relkind in ('r', 'v', 'm', 'p', 'f')"
                f" and has_table_privilege(%s, c.oid, '{right}')",
                role,
            )
        assert not names(
            conn,
            "select c.relname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace"
            f" where n.nspname {ours} and case c.relkind when 'S'"
            " then has_sequence_privilege(%s, c.oid, 'usage, select, update') else false end",
            role,
        )
        schemas = schemas or {*(["ducto"] if functions else []), *(["ducto_read"] if views else [])}
        query = f"select n.nspname from pg_namespace as n where n.nspname {ours} and has_schema_privilege(%s, n.oid, "
        assert schemas == names(conn, query + "'usage')", role)
        assert not names(conn, query + "'create')", role)


# What to try on each function, relation, type and sequence of ours.
ATTEMPTS = """
select p.proname, format('select %I.%I(%s)', n.nspname, p.proname, (
  select string_agg('null::' || a.type::regtype, ', ' order by a.place)
  from unnest(p.proargtypes) with ordinality as a (type, place)))
from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace
where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
union all
select 'relation', format(s.statement, n.nspname, c.relname)
from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
cross join unnest(array['select from %I.%I', 'delete from %I.%I', 'truncate %I.%I', 'copy %I.%I to stdout',
  'do $$begin lock table %I.%I; end$$', 'alter table %I.%I disable trigger all', 'drop table %I.%I',
  'create trigger t after insert on %I.%I execute function suppress_redundant_updates_trigger()',
  'create index on %I.%I ((1))', 'create rule r as on insert to %I.%I do instead nothing']) as s (statement)
where n.nspname in ('ducto_private', 'ducto_read') and c.relkind = 'r'
union all
select case n.nspname when 'ducto' then 'type' end, format('select null::%I.%I', n.nspname, t.typname)
from pg_type as t join pg_namespace as n on n.oid = t.typnamespace
where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
union all
select 'view', format('select from %s', c.oid::regclass)
from pg_class as c where c.relnamespace = 'ducto_read'::regnamespace
union all
select 'sequence', format('select nextval(%L)', c.oid::regclass)
from pg_class as c where c.relnamespace = 'ducto_private'::regnamespace and c.relkind = 'S'
"""


class TestNoWayIn:
    """As a role that may connect, and as one that may also charge: every function, relation and type is tried."""

    @pytest.mark.parametrize("granted", [False, True], ids=["no rights", "may charge"])
    def test_every_object_is_tried(
        self, role: Role, conn: Connection, login: Callable[[str], Connection], granted: bool
    ) -> None:
        name = role()
        ducto_pg.setup(conn, grant_to=[name] if granted else []).or_raise()
        manager = CreditManager(conn)
        manager.publish_pricing(PRICES)
        manager.add_credits("alice", 100).or_raise()
        before = conn.execute("select a from ducto_private.accounts as a").fetchall()
        attempts = [
            statement
            for name, statement in conn.execute(ATTEMPTS.encode())
            if not (granted and (name in CALL or name == "type"))
        ]
        attempts += [
            f"set role {conn.info.user}",
            f"set session authorization {conn.info.user}",
            f"grant {conn.info.user} to {name}",
            "create function ducto.mine() returns void language sql as 'select'",
            "create table ducto_private.mine ()",
            "create view ducto_read.mine as select 1",
            "create or replace function ducto_private.new_id() returns uuid language sql as 'select null'",
            "create or replace function ducto.version() returns text language sql as 'select null'",
            "alter function ducto.version() set search_path = public",
            "alter function ducto.version() security invoker",
            "alter schema ducto rename to mine",
            "drop schema ducto cascade",
            "set session_replication_role = replica",
            "set plpgsql.variable_conflict = use_variable",
            "alter system set jit = off",
            f"alter default privileges for role {conn.info.user} grant execute on functions to public",
            "create event trigger mine on ddl_command_end execute function suppress_redundant_updates_trigger()",
            "copy (select 1) to program 'id'",
        ]
        session = login(name)
        let_in = []
        for statement in attempts:
            try:
                session.execute(statement.encode())
            except (Denied, psycopg.errors.InvalidGrantOperation):
                pass
            except psycopg.Error as error:
                let_in.append((statement, error.sqlstate, str(error)))
            else:
                let_in.append((statement, "", "went through"))
        assert let_in == []
        assert conn.execute("select a from ducto_private.accounts as a").fetchall() == before
        assert len(attempts) > 150
        TestGrants.check(conn, name, CALL if granted else set(), set())

    def test_a_caller_is_not_an_admin(self, role: Role, conn: Connection, login: Callable[[str], Connection]) -> None:
        caller, admin = role(), role()
        ducto_pg.setup(conn, grant_to=caller, grant_admin_to=admin).or_raise()
        CreditManager(conn).publish_pricing(PRICES)
        boss, clerk = CreditManager(login(admin)), CreditManager(login(caller))
        boss.add_credits("alice", 100).or_raise()
        assert clerk.deduct_credits("alice", 20).or_raise().balance_after == 90
        for attempt in (
            lambda: clerk.add_credits("alice", 1),
            lambda: clerk.remove_credits("alice", 1),
            lambda: clerk.set_credit_limit("alice", 1),
            lambda: clerk.set_user_plan("alice"),
            lambda: clerk.set_spend_cap("alice", 1),
            lambda: clerk.remove_spend_cap("alice", "daily"),
            lambda: clerk.create_team("mine", 1000),
            lambda: clerk.add_team_member("crew", "alice"),
            lambda: clerk.remove_team_member("crew", "alice"),
            lambda: clerk.sweep_expired_credits(),
            lambda: clerk.fetch_events(),
            lambda: clerk.ack_events([]),
            lambda: clerk.rollup_usage(),
            lambda: clerk.erase_user("alice"),
            lambda: boss.erase_user("alice"),
            lambda: clerk.my_balance(),
            lambda: boss.my_transactions(),
            lambda: clerk.my_statement(None, None),
            lambda: boss.my_daily_spend(None, None),
            lambda: clerk.activate_pricing(1),
            lambda: clerk.verify_ledger(),
            lambda: clerk.publish_pricing(PRICES, "mine"),
            lambda: boss.publish_pricing(PRICES, "mine"),
        ):
            with pytest.raises(Denied):
                attempt()
        assert CreditManager(conn).get_balance("alice").balance == 90
        assert len(boss.get_pricing_history()) == 1


# Prices whose every name needs quoting.
ODD = "it's a \\'model\\' \\"
PRICES: dict[str, Any] = {
    "match": "prefix",
    "free": ["input_tokens", "output_tokens"],
    "models": {
        ODD: "input_tokens * 0.01 + output_tokens / 30",
        "back\\slash": "input_tokens // 7 + (1 if 'a\\\\' in model else 0)",
        "$$;select 'x'--": "tier(input_tokens, 10, 1, 2)",
        "E'\\''": "percentile(50, 1, input_tokens)",
        "plain": "input_tokens * 0.5",
    },
    "tools": {"b'rowse\\": "tool_calls * 2", "_default": "tool_calls % 3"},
    "search": {"costs": "search_queries * 2 if search_queries > 1 else 0"},
    "cache": {"discount": "cache_read_tokens * -0.001"},
    "fixed": {"re'port\\": 7},
    "metrics": {"images": 0},
    "plans": {
        "fr'ee\\": {
            "id": "fr'ee\\",
            "name": "It's \\ free",
            "free_allowance": 10,
            "rate_overrides": {ODD: "input_tokens * 0.02"},
            "features": {"f'eat\\": [1]},
        }
    },
    "default_plan": "fr'ee\\",
    "timezone": "Asia/Kolkata",
    "min_balance": 0,
}

_OWN = {"user_id", "refers_to", "account_id", "seq", "created_at", "expires_at", "ended_at", "timestamp"}
_OWN |= {"period_start", "period_end", "top_user"}


def scenario(manager: CreditManager, admin: CreditManager, user: str) -> list[Any]:
    """Every call that a caller may make, and what it answered, without ids and times."""
    answers: list[Any] = []
    before = datetime.now(UTC) - timedelta(seconds=5)

    def note(answer: Any) -> Any:
        for one in answer if isinstance(answer, list) else [answer]:
            fields = one.model_dump() if hasattr(one, "model_dump") else {"answer": one}
            answers.append({key: value for key, value in fields.items() if key not in _OWN and not key.endswith("_id")})
            if (when := fields.get("created_at")) and "account_id" in fields:
                assert before < datetime.fromisoformat(str(when)) < before + timedelta(seconds=60)
        return answer

    def fails(attempt: Callable[[], Any]) -> None:
        with pytest.raises(DuctoError) as raised:
            attempt()
        answers.append((raised.value.code, raised.value.message, raised.value.hint))

    usage = {
        "model": ODD,
        "input_tokens": 1000,
        "output_tokens": 7,
        "tool_calls": ["b'rowse\\", "x"],
        "search_queries": 3,
    }
    metadata = {"it's": 'a \\ "quote"', "nested": {"\\": [1, None]}}
    key = "key's \\"
    note(manager.version())
    note(manager.get_active_pricing())
    note(manager.get_pricing_history())
    note(manager.get_pricing_config(1))
    note(manager.calculate_cost(usage, user))
    for model in PRICES["models"]:
        note(manager.calculate_cost({"model": f"{model}-2024", "input_tokens": 15, "cache_read_tokens": 3}))
    note(manager.get_balance(user))
    note(manager.deduct(user, {"model": ODD, "input_tokens": 100}))
    admin.add_credits(user, 1000)
    charge = note(manager.deduct(user, usage, key, metadata))
    note(manager.deduct(user, usage, key, metadata))
    note(manager.deduct_credits(user, 1, idempotency_key=key))
    note(manager.deduct_fixed(user, "re'port\\"))
    hold = note(manager.reserve(user, usage, "o'p\\", metadata, idempotency_key=key))
    note(manager.reserve(user, usage, "o'p\\", idempotency_key=key))
    note(manager.extend_reservation(hold.reservation_id, 5, 900))
    note(manager.deduct_credits(user, 3, hold.reservation_id, model="E'\\''", final=False))
    note(manager.list_reservations(user))
    note(manager.deduct(user, usage, reservation_id=hold.reservation_id))
    note(manager.get_reservation(hold.reservation_id))
    note(manager.release_reservation(note(manager.reserve_credits(user, 5, ttl_seconds=60)).reservation_id))
    note(manager.refund_credits(charge.transaction_id, 2, "it's \\", metadata))
    note(manager.refund_credits(charge.transaction_id))
    note(manager.reserve_credits(user, 100000))
    note(manager.get_transaction("it's \\"))
    note(manager.get_transaction(user_id=user, idempotency_key=key))
    note(manager.explain_transaction(charge.transaction_id))
    note(manager.list_transactions(user, from_=before, to=before + timedelta(seconds=60)))
    note(manager.get_balance(user, datetime.now(UTC)))
    spend(note, manager, admin, user, usage)
    fails(lambda: manager.deduct(user, {"model": "unheard 'of\\", "input_tokens": 1}))
    fails(lambda: manager.deduct(user, {**usage, "inputTokens": 1}))
    fails(lambda: manager.deduct_fixed(user, "re'port"))
    fails(lambda: manager.deduct_credits(user, -1))
    fails(lambda: manager.deduct_credits(f" {user}", 1))
    fails(lambda: manager.reserve_credits(user, 1, ttl_seconds=0))
    return answers


def spend(
    note: Callable[[Any], Any], manager: CreditManager, admin: CreditManager, user: str, usage: Mapping[str, Any]
) -> None:
    """The part of the scenario with a plan, caps, lots, a team, a batch and statistics."""
    start, end = datetime.now(UTC), datetime.now(UTC) + timedelta(minutes=1)
    team, key = f'{user}\'s \\ "team"', "ke'y \\"
    admin.set_user_plan(user, "fr'ee\\").or_raise()
    admin.set_spend_cap(user, 2000, "monthly", ODD, "warn").or_raise()
    admin.add_credits(user, 50, "promotion", expires_at=end).or_raise()
    admin.create_team("it's a \\ team", 500, team_id=team).or_raise()
    admin.add_team_member(team, user, "o'wner\\", 50, "daily").or_raise()
    note(manager.get_user_plan(user))
    note(manager.check_allowance(user))
    note(manager.check_feature(user, "f'eat\\"))
    note(manager.check_feature(user, "it's \\"))
    note(manager.list_spend_caps(user))
    note(manager.check_spend_cap(user, ODD, 1950))
    note(manager.get_team(team))
    note(manager.get_team_balance(team))
    hold = note(manager.reserve_team(team, user, usage, "o'p\\", idempotency_key=key))
    note(manager.deduct_team(team, user, usage, key, {"it's": "\\"}, hold.reservation_id))
    note(manager.reserve_team_credits(team, user, 5, model="E'\\''"))
    note(manager.deduct_team_credits(team, user, 1000))
    note(manager.deduct_team_credits(team, f"no {user}", 1))
    note(manager.get_team_members(team))
    note(
        manager.deduct_batch(
            [
                {"user_id": user, "metrics": usage, "idempotency_key": f"batch {key}"},
                {"user_id": user, "job": "re'port\\"},
                {"team_id": team, "user_id": user, "amount": 2, "model": "plain", "metadata": {"\\": "'"}},
                {"user_id": user, "amount": -1},
                {"user_id": user, "metrics": {"model": "unheard 'of\\", "input_tokens": 1}},
            ]
        )
    )
    note([row for row in manager.spend_by_user(start, end) if row.user_id == user])
    note(manager.spend_by_user(start, end, user))
    note(manager.spend_by_model(start, end, team))
    note(manager.get_statement(user, start, end))
    note(manager.spend_by_model(start, end))
    note(manager.spend_margin(start, end))
    note(manager.daily_spend(start, end))
    note(manager.top_users(1, start, end))
    note(manager.aggregate_stats(start, end))


@pytest.fixture
def admin(role: Role, conn: Connection) -> CreditManager:
    """The owner's own session."""
    manager = CreditManager(conn)
    manager.publish_pricing(PRICES)
    return manager


@pytest.fixture
def caller(role: Role, admin: CreditManager, conn: Connection) -> str:
    """A role that may charge, use temporary objects and create in `public`."""
    name = role()
    conn.execute(f"grant create on schema public to {name}")
    ducto_pg.setup(conn, grant_to=name).or_raise()
    return name


@pytest.fixture
def expected(caller: str, admin: CreditManager, login: Callable[[str], Connection]) -> list[Any]:
    """What the scenario answers where nobody plants anything."""
    return scenario(CreditManager(login(caller)), admin, "an honest 'user\\")


TYPES = [
    *("text", "int4", "int8", "bool", "numeric", "jsonb", "uuid", "timestamptz"),
    *("timestamp", "interval", "name", "oid", "xid8", "bytea", "float8"),
]

# What a planted object does when it is used: it notes as whom, and as the owner it takes all it can.
TRAP = """
create function {schema}.trap(p_name pg_catalog.text) returns boolean language plpgsql
set search_path = pg_catalog as $$
begin
  perform pg_catalog.set_config('trap.sprung', pg_catalog.concat_ws(' ',
    pg_catalog.current_setting('trap.sprung', true), current_user, p_name), false);
  if current_user <> session_user then
    update ducto_private.accounts set balance = balance + 1000000;
  end if;
  return true;
end $$
"""


def plant(session: Connection, conn: Connection, schema: str) -> int:
    """Plants in a schema, under every name that the text of our functions holds, whatever can be planted."""
    words = names(
        conn,
        r"""
        select distinct w.word[1]
        from pg_proc as p cross join regexp_matches(p.prosrc || p.proname, '[a-z_][a-z0-9_]*', 'gi') as w (word)
        where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace)
        union select c.relname from pg_class as c where c.relnamespace = 'ducto_private'::regnamespace
        union select t.typname from pg_type as t
        where t.typnamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace)
        """,
    ) | {*TYPES, "int2", "varchar", "bpchar", "char", "_text", "_int8", "_numeric"}
    bases = names(conn, "select typname from pg_type where typtype = 'b' and typnamespace = 'pg_catalog'::regnamespace")
    session.execute(TRAP.format(schema=schema).encode())
    statements = []
    for word in sorted(words):
        name = sql.Identifier(word).as_string(conn)
        if word in bases:
            statements.append(f"create domain {schema}.{name} as pg_catalog.{name} check ({schema}.trap('{word}'))")
        else:
            statements.append(f"create {'temp ' if schema == 'pg_temp' else ''}table {schema}.{name} ()")
        statements.append(
            f"create function {schema}.{name}() returns boolean language sql as $$ select {schema}.trap('{word}') $$"
        )
    statements += [
        f'create function {schema}.{name}({arguments}) returns pg_catalog."{result}" language plpgsql as'
        f" $$ begin perform {schema}.trap('{name}'); return null; end $$"
        for name, result, arguments in conn.execute(
            """
            select quote_ident(p.proname), r.typname,
              string_agg(format('pg_catalog.%%I', t.typname), ', ' order by a.place)
            from pg_proc as p
            join pg_type as r on r.oid = p.prorettype
            cross join unnest(p.proargtypes) with ordinality as a (type, place)
            join pg_type as t on t.oid = a.type
            where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = any (%s) and r.typtype <> 'p'
            group by p.oid, p.proname, r.typname
            having bool_and(t.typtype <> 'p')
            """,
            [list(words)],
        )
    ]
    for operator, result, right, left in conn.execute(
        """
        select o.oprname, r.typname, format('pg_catalog.%%I', t.typname), 'pg_catalog.' || quote_ident(l.typname)
        from pg_operator as o
        join pg_type as r on r.oid = o.oprresult
        join pg_type as t on t.oid = o.oprright
        left join pg_type as l on l.oid = o.oprleft
        where o.oprnamespace = 'pg_catalog'::regnamespace
          and t.typname = any (%s) and (l.typname is null or l.typname = any (%s))
          and exists (select from pg_proc as p where position(o.oprname in p.prosrc) > 0
            and p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace))
        """,
        [TYPES, TYPES],
    ).fetchall():
        function = f'{schema}."trap {operator} {result}"'
        arguments = ", ".join(filter(None, (left, right)))
        sides = f"leftarg = {left}, rightarg = {right}" if left else f"rightarg = {right}"
        statements += [
            f'create function {function}({arguments}) returns pg_catalog."{result}" language plpgsql as'
            f" $$ begin perform {schema}.trap('{operator}'); return null; end $$",
            f"create operator {schema}.{operator} (function = {function}, {sides})",
        ]
    for type_name in TYPES:
        own, to_own, from_own = (f'{schema}."{word} {type_name}"' for word in ("own", "to own", "from own"))
        body = f"language plpgsql as $$ begin perform {schema}.trap('cast'); return null; end $$"
        statements += [
            f"create type {own} as (value integer)",
            f"create function {to_own}(pg_catalog.{type_name}) returns {own} {body}",
            f"create function {from_own}({own}) returns pg_catalog.{type_name} {body}",
            f"create cast (pg_catalog.{type_name} as {own}) with function {to_own} as implicit",
            f"create cast ({own} as pg_catalog.{type_name}) with function {from_own} as implicit",
        ]
    planted = 0
    for statement in statements:
        with suppress(psycopg.errors.DuplicateObject, psycopg.errors.DuplicateFunction, psycopg.errors.DuplicateTable):
            session.execute(statement.encode())
            planted += 1
    return planted


class TestPlanted:
    def test_the_traps_would_spring(self, caller: str, login: Callable[[str], Connection], conn: Connection) -> None:
        """On definer functions of the owner that look where the caller says."""
        session = login(caller)
        for schema in ("pg_temp", "public"):
            plant(session, conn, schema)
        session.execute(
            'create function public.takes_own(value public."own int4") returns boolean language plpgsql'
            " as 'begin return true; end'"
        )
        for name, body in {
            "type": "declare v text; begin v := 'x'; return true; end",
            "function": "begin return jsonb_typeof('1'::pg_catalog.jsonb) is null; end",
            "operator": "begin return 1 = 1; end",
            "cast": "begin return public.takes_own(1); end",
        }.items():
            conn.execute(
                f"create function ducto.careless_{name}() returns boolean language plpgsql security definer"
                f" as $$ {body} $$; grant execute on function ducto.careless_{name} to {caller}"
            )
            session.execute("set search_path = public, pg_temp, pg_catalog; set trap.sprung = ''")
            session.execute(f"select ducto.careless_{name}()".encode())
            sprung = session.execute("select pg_catalog.current_setting('trap.sprung')").fetchone()
            assert sprung
            assert conn.info.user in sprung[0].split(), name

    def test_objects_under_every_name_that_is_used(
        self,
        caller: str,
        admin: CreditManager,
        expected: list[Any],
        login: Callable[[str], Connection],
        conn: Connection,
    ) -> None:
        session = login(caller)
        for schema in ("pg_temp", "public"):
            assert plant(session, conn, schema) > 1000
        for number, path in enumerate(
            ("pg_temp, public, pg_catalog", "public, pg_temp", "ducto, public, pg_catalog", "")
        ):
            session.execute("select pg_catalog.set_config('search_path', %s::pg_catalog.text, false)", [path])
            assert scenario(CreditManager(session), admin, f"user {number}") == expected, path
            sprung = session.execute("select pg_catalog.current_setting('trap.sprung', true)").fetchone()
            assert sprung
            owner = conn.info.user
            assert owner not in (sprung[0] or "").split(), path
        # In public they lie in everybody's way: another caller's, and the owner's own.
        assert scenario(CreditManager(login(caller)), admin, "another") == expected
        admin.publish_pricing({**PRICES, "fixed": {"other": 1}})
        admin.activate_pricing(1)
        assert ducto_pg.setup(conn).or_raise().success
        assert admin.verify_ledger() == []


SETTINGS: dict[str, Mapping[str, str]] = {
    "strings are read with escapes": {"standard_conforming_strings": "off", "backslash_quote": "on"},
    "strings are read with escapes, quotes never": {"standard_conforming_strings": "off", "backslash_quote": "off"},
    "asserts are off, all warnings are errors": {
        "plpgsql.check_asserts": "off",
        "plpgsql.extra_errors": "all",
        "plpgsql.extra_warnings": "all",
        "plpgsql.print_strict_params": "on",
    },
    "an odd place": {
        "TimeZone": "<odd>-13:37",
        "DateStyle": "SQL, DMY",
        "IntervalStyle": "sql_standard",
        "timezone_abbreviations": "India",
    },
    "another odd place": {"TimeZone": "Pacific/Apia", "DateStyle": "German", "IntervalStyle": "postgres_verbose"},
    "null = null": {"transform_null_equals": "on", "array_nulls": "off"},
    "another language": {"lc_monetary": "C", "lc_numeric": "C", "lc_time": "C", "client_encoding": "LATIN1"},
    "generic plans": {"plan_cache_mode": "force_generic_plan", "enable_indexscan": "off", "enable_bitmapscan": "off"},
    "custom plans": {"plan_cache_mode": "force_custom_plan", "jit_above_cost": "0", "from_collapse_limit": "1"},
    "no path": {"search_path": "", "row_security": "off", "default_transaction_deferrable": "on"},
    "floats cut short": {"extra_float_digits": "-15", "bytea_output": "escape", "xmlbinary": "hex"},
    "strict by default": {"default_transaction_isolation": "serializable"},
}


class Unread(Loader):
    """psycopg reads times in one DateStyle only; these tests do not compare them."""

    def load(self, data: Buffer) -> datetime:
        return datetime.now(UTC)


# What a caller may not leave on: it ends or closes his own session, or floods the server's log.
LEFT_ALONE = ("exit_on_error", "default_transaction_read_only", "transaction_", "debug_print", "trace_")


class TestSettings:
    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
    def test_no_setting_of_the_caller_changes_an_answer(
        self,
        caller: str,
        admin: CreditManager,
        expected: list[Any],
        login: Callable[[str], Connection],
        settings: Mapping[str, str],
    ) -> None:
        session = login(caller)
        session.execute("do 'begin end'")
        if "DateStyle" in settings:
            session.adapters.register_loader("timestamptz", Unread)
        for name, value in settings.items():
            session.execute("select set_config(%s, %s, false)", [name, value])
        assert scenario(CreditManager(session), admin, "user") == expected
        assert admin.verify_ledger() == []

    @pytest.mark.parametrize("turn", range(3))
    def test_every_switch_there_is(
        self, caller: str, admin: CreditManager, expected: list[Any], login: Callable[[str], Connection], turn: int
    ) -> None:
        session = login(caller)
        session.execute("do 'begin end'")
        switches = session.execute(
            "select s.name, coalesce(s.enumvals, array['on', 'off']), s.reset_val from pg_settings as s"
            " where s.context = 'user' and s.vartype in ('bool', 'enum')"
        ).fetchall()
        assert len(switches) > 40
        for name, values, usual in switches:
            if not name.startswith(LEFT_ALONE):
                others = [value for value in values if value != usual]
                if others:  # a build may know only one, such as pglz
                    session.execute("select set_config(%s, %s, false)", [name, others[turn % len(others)]])
        assert scenario(CreditManager(session), admin, "user") == expected
        assert admin.verify_ledger() == []

    def test_the_owner_publishes_with_odd_settings(self, admin: CreditManager, conn: Connection, db: str) -> None:
        for number, settings in enumerate(SETTINGS.values()):
            with psycopg.connect(db, autocommit=True) as session:
                session.execute("do 'begin end'")
                for name, value in settings.items():
                    session.execute("select set_config(%s, %s, false)", [name, value])
                prices = {**PRICES, "models": {**PRICES["models"], f"x'{number}\\": "input_tokens * 3"}}
                owner = CreditManager(session)
                version = owner.publish_pricing(prices).version
                # The text of setup itself is not in every encoding; it says so.
                assert ducto_pg.setup(session).success == ("client_encoding" not in settings)
                assert owner.calculate_cost({"model": f"x'{number}\\", "input_tokens": 2}).total == 6
            config = admin.get_pricing_config(version or 0).config
            assert config
            assert config.model_dump()["models"] == prices["models"]

    def test_a_read_only_caller_writes_nothing(
        self, caller: str, admin: CreditManager, login: Callable[[str], Connection]
    ) -> None:
        admin.add_credits("alice", 10).or_raise()
        session = login(caller)
        session.execute("set default_transaction_read_only = on")
        manager = CreditManager(session)
        assert manager.get_balance("alice").balance == 10
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            manager.deduct_credits("alice", 1)
        assert admin.get_balance("alice").balance == 10

    def test_a_caller_who_may_switch_triggers_off(
        self,
        caller: str,
        admin: CreditManager,
        expected: list[Any],
        login: Callable[[str], Connection],
        conn: Connection,
    ) -> None:
        if conn.info.server_version < 150000:
            pytest.skip("before PostgreSQL 15 only a superuser may set session_replication_role")
        conn.execute(f"grant set on parameter session_replication_role to {caller}")
        try:
            session = login(caller)
            session.execute("set session_replication_role = replica")
            assert scenario(CreditManager(session), admin, "user") == expected
            with pytest.raises(Denied):
                session.execute("update ducto_private.transactions set amount = 1")
            assert admin.verify_ledger() == []
        finally:
            conn.execute(f"revoke set on parameter session_replication_role from {caller}")

    def test_the_clock_is_the_servers(
        self, caller: str, admin: CreditManager, login: Callable[[str], Connection]
    ) -> None:
        admin.add_credits("alice", 10).or_raise()
        session = login(caller)
        for schema in ("pg_temp", "public"):
            for name in ("clock", "clock_timestamp", "now"):
                session.execute(
                    f"create function {schema}.{name}() returns timestamptz language sql as"
                    " 'select timestamptz ''2001-01-01'''".encode()
                )
            session.execute(f"create table {schema}.fake_clock as select timestamptz '2001-01-01' as now".encode())
        for setting in ("ducto.clock", "ducto_private.clock", "ducto.now", "ducto_pg.clock"):
            session.execute("select set_config(%s, '2001-01-01', false)", [setting])
        session.execute("set search_path = pg_temp, public, pg_catalog")
        answer = CreditManager(session).deduct_credits("alice", 1).or_raise()
        row = admin.get_transaction(answer.transaction_id)
        assert abs(datetime.fromisoformat(str(row.created_at)) - datetime.now(UTC)) < timedelta(minutes=1)

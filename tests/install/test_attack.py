"""What an attacker tries who holds a token, a forged one or a login, and what a hostile text does: nothing.

The attempts walk the catalog, so that a new function, table or type is tried without being named here.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from conftest import _database
from supabase_helpers import (
    API_ROLES,
    PASSWORD,
    SECRET,
    SERVER_SIDE,
    Api,
    postgrest,
    signed_in,
    supabase_roles,
    token,
)
from test_access import ADMIN, ATTEMPTS, PRICES, admin, caller, expected, login, plant, role, scenario

import ducto_pg
from ducto_pg import CreditManager
from ducto_pg.embedded import Server

__all__ = ["admin", "caller", "expected", "login", "role"]

Connection = psycopg.Connection[Any]
Denied = psycopg.errors.InsufficientPrivilege

FUNCTIONS = """
select n.nspname, p.proname, coalesce(p.proargnames, '{}'), p.proargtypes::regtype[]::text[], p.pronargdefaults
from pg_proc as p
join pg_namespace as n on n.oid = p.pronamespace
where n.nspname in ('ducto', 'ducto_private', 'ducto_read') and p.prokind = 'f'
order by 1, 2
"""


@pytest.fixture(scope="module")
def roles(server: Server) -> Iterator[None]:
    with supabase_roles(server):
        yield


@pytest.fixture
def victim(roles: None, conn: Connection) -> CreditManager:
    return with_a_victim(conn)


def with_a_victim(conn: Connection) -> CreditManager:
    """A database as at Supabase, in which alice has something to steal; the owner's session."""
    ducto_pg.setup(conn).or_raise()
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"any": "input_tokens"}, "fixed": {"report": 7}})
    manager.add_credits("alice", 1234567, "purchase", reference="alice's invoice").or_raise()
    manager.add_credits("mallory", 3).or_raise()
    manager.deduct_credits("alice", 7, metadata={"secret": "alice's"}).or_raise()
    return manager


@pytest.fixture
def api(victim: CreditManager, db: str) -> Iterator[Api]:
    with postgrest(db) as running:
        yield running


def tables(conn: Connection) -> str:
    """What our tables hold."""
    names = conn.execute(
        "select c.oid::regclass::text from pg_class as c"
        " where c.relnamespace = 'ducto_private'::regnamespace and c.relkind = 'r' order by 1"
    ).fetchall()
    rows = [row for (name,) in names for row in conn.execute(f"select r::text from {name} as r order by 1".encode())]
    assert "1234567" in str(rows)
    return str(rows)


# What end users may ask, and what they must say.
MINE: dict[str, dict[str, None]] = {
    **{name: {} for name in ("my_balance", "my_transactions", "my_plan")},
    **{name: {"p_start": None, "p_end": None} for name in ("my_statement", "my_daily_spend")},
}
NOBODIES: dict[str, str | None] = {
    "no token": None,
    "anon's": token(role="anon"),
    "a token without a role": token(sub="alice"),
    "signed with another secret": token("x" * 48, role="service_role", sub="alice"),
    "not signed": token("", {"alg": "none", "typ": "JWT"}, role="service_role", sub="alice")[: -len("x" * 43)],
    "expired": token(role="service_role", sub="alice", exp=1_000_000_000),
    "not yet valid": token(role="service_role", sub="alice", nbf=4_000_000_000),
    "changed after it was signed": SERVER_SIDE[:-4] + "AAAA",
    "a superuser's": token(role="postgres", sub="alice"),
    "PostgREST's own": token(role="authenticator", sub="alice"),
    "of a role that is a statement": token(role="service_role; set role postgres", sub="alice"),
    "of a role that is a list": token(role=["service_role"], sub="alice"),
    "garbage": "garbage",
}


PATHS = [
    "accounts",
    "transactions",
    "ducto_private.accounts",
    "ducto_read.transactions",
    "rpc/clock",
    "rpc/publish",
    "rpc/my_balance()",
    "rpc/my_balance?select=*,accounts(*)",
    "rpc/my_balance?select=balance::regclass,user_id->clock",
    "rpc/my_transactions?limit=1&offset=-1",
    "rpc/my_transactions?account_id=eq.alice",
    "rpc/my_transactions?or=(account_id.eq.alice)",
    "rpc/my_transactions?p_user_id=alice",
]
FOREIGN_SCHEMAS = ("ducto_private", "ducto_read", "public", "pg_catalog", "information_schema")


@pytest.fixture(scope="module")
def shared(roles: None, server: Server, template_db: str) -> Iterator[Connection]:
    with _database(server, template_db) as (_, dsn), psycopg.connect(dsn, autocommit=True) as connection:
        with_a_victim(connection)
        yield connection


@pytest.fixture(scope="module")
def door(shared: Connection, server: Server) -> Iterator[Api]:
    with postgrest(server.dsn(shared.info.dbname)) as running:
        yield running


class TestTokens:
    """Through PostgREST; nothing of this changes anything, so that one database serves all."""

    @pytest.mark.parametrize("forged", NOBODIES.values(), ids=NOBODIES.keys())
    def test_nobody_may_anything(self, door: Api, shared: Connection, forged: str | None) -> None:
        before = tables(shared)
        for schema, name, names, _, _ in shared.execute(FUNCTIONS.encode()).fetchall():
            if schema == "ducto":
                reply = door.ask(f"rpc/{name}", dict.fromkeys(names), forged)
                assert reply.status in (400, 401, 403), (name, reply)
                assert reply.body["code"] in ("42501", "22023", "22P02", "PGRST301", "PGRST302"), (name, reply)
                assert "alice" not in str(reply.body), (name, reply)
        assert tables(shared) == before

    def test_an_end_user_may_only_his_own(self, door: Api, shared: Connection) -> None:
        before = tables(shared)
        mallory = signed_in("mallory")
        answered = set()
        for schema, name, names, _, _ in shared.execute(FUNCTIONS.encode()).fetchall():
            if schema != "ducto":
                continue
            for arguments in (dict.fromkeys(names), dict.fromkeys(names, "alice"), {}):
                reply = door.ask(f"rpc/{name}", arguments, mallory)
                assert "1234560" not in str(reply.body), (name, reply)
                if reply.status == 200:
                    assert "alice" not in str(reply.body), (name, reply)
                    answered.add(name)
                else:
                    assert reply.body["code"] in ("42501", "22P02", "22007", "42883", "PGRST202"), (name, reply)
        assert answered == {name for name in answered if name.startswith("my_")} != set()
        assert door.ask("rpc/my_balance", {}, mallory).body["balance"] == 3
        assert [row["amount"] for row in door.ask("rpc/my_transactions", {}, mallory).body] == [3]
        assert tables(shared) == before

    def test_the_server_side_is_an_admin_and_no_more(self, door: Api, shared: Connection) -> None:
        for schema, name, names, _, _ in shared.execute(FUNCTIONS.encode()).fetchall():
            if schema == "ducto":
                reply = door.ask(f"rpc/{name}", dict.fromkeys(names))
                assert (reply.status == 403) is (name not in ADMIN), (name, reply)

    @pytest.mark.parametrize(
        "claims",
        [
            {},
            *({"sub": sub} for sub in (None, 1, True, ["alice"], {"sub": "alice"}, "", " alice", "alice\n", "\0alice")),
            *({"sub": sub} for sub in ("x" * 300, "alice\0", "\ud800", "' or true --", "alice' --")),
            {"user": "alice", "sub ": "alice"},
            {"app_metadata": {"sub": "alice"}},
        ],
        ids=repr,
    )
    def test_a_sub_that_is_not_quite_alices(self, door: Api, claims: dict[str, Any]) -> None:
        for name, arguments in MINE.items():
            reply = door.ask(f"rpc/{name}", arguments, token(role="authenticated", **claims))
            assert "1234560" not in str(reply.body)
            assert "secret" not in str(reply.body)
            assert reply.status in (200, 400, 401, 403), reply

    def test_what_else_a_request_may_carry(self, door: Api, shared: Connection) -> None:
        before = tables(shared)
        mallory = signed_in("mallory")
        for headers in (
            {"request.jwt.claims": '{"sub": "alice"}', "Role": "service_role"},
            {"Prefer": "params=single-object"},
            {"Prefer": "tx=commit, handling=lenient, timezone=<odd>-13:37"},
            {"Cookie": 'request.jwt.claims={"sub": "alice"}'},
            {"X-Forwarded-For": "127.0.0.1", "Apikey": SECRET},
            {"Accept": "application/vnd.pgrst.plan+json; options=analyze|verbose|settings|buffers"},
            {"Accept": "text/csv"},
        ):
            for name, arguments in MINE.items():
                reply = door.ask(f"rpc/{name}", arguments, mallory, **headers)
                assert "1234560" not in str(reply.body), headers
                assert "secret" not in str(reply.body), headers
        for path in PATHS:
            for who in (mallory, SERVER_SIDE):
                reply = door.ask(path, None, who)
                assert "1234560" not in str(reply.body), (path, reply)
                assert "secret" not in str(reply.body), (path, reply)
        for schema in (*FOREIGN_SCHEMAS, 'ducto", "ducto_private'):
            for who in (mallory, SERVER_SIDE):
                assert door.ask("rpc/version", {}, who, Content_Profile=schema).body["code"] == "PGRST106"
                assert door.ask("accounts", None, who, Accept_Profile=schema).body["code"] == "PGRST106"
        for method in ("PUT", "PATCH", "DELETE"):
            assert door.ask("rpc/my_balance", "{}", mallory, method).status in (400, 404, 405)
        assert tables(shared) == before

    def test_private_schemas_exposed_by_mistake(self, shared: Connection, server: Server) -> None:
        relations = shared.execute(
            "select n.nspname, c.relname from pg_class as c join pg_namespace as n on n.oid = c.relnamespace"
            " where n.nspname in ('ducto_private', 'ducto_read') and c.relkind in ('r', 'v')"
        ).fetchall()
        before = tables(shared)
        with postgrest(server.dsn(shared.info.dbname), schemas="ducto,ducto_private,ducto_read") as door:
            for who in (None, signed_in("mallory"), SERVER_SIDE):
                for schema, name in relations:
                    for body in (None, "{}"):
                        reply = door.ask(name, body, who, Accept_Profile=schema, Content_Profile=schema)
                        assert reply.body["code"] == "42501", (schema, name, reply)
                for schema, name, names, _, _ in shared.execute(FUNCTIONS.encode()).fetchall():
                    if schema != "ducto":
                        reply = door.ask(f"rpc/{name}", dict.fromkeys(names), who, Content_Profile=schema)
                        assert reply.body["code"] in ("42501", "PGRST202"), (schema, name, reply)
        assert tables(shared) == before


class TestRolesOfSupabase:
    """In SQL, which PostgREST does not give them, and with what an owner may have granted by default."""

    @pytest.mark.parametrize("name", API_ROLES)
    @pytest.mark.parametrize("generous", [False, True], ids=["", "granted by default"])
    def test_every_object_is_tried(
        self, roles: None, server: Server, server_conn: Connection, name: str, generous: bool
    ) -> None:
        conn = server_conn
        if generous:
            for what in ("tables", "functions", "sequences", "types", "schemas"):
                conn.execute(f"alter default privileges grant all on {what} to anon, authenticated".encode())
        ducto_pg.setup(conn).or_raise()
        manager = CreditManager(conn)
        manager.publish_pricing(PRICES)
        manager.add_credits("alice", 100).or_raise()
        own = {what for what, _ in conn.execute(ATTEMPTS.encode()) if what and what.startswith("my_")}
        may = {"service_role": ADMIN | {"type"}, "authenticated": own | {"type"}, "anon": set[str]()}[name]
        with psycopg.connect(
            psycopg.conninfo.make_conninfo(server.dsn(conn.info.dbname), user="authenticator", password=PASSWORD),
            autocommit=True,
        ) as session:
            session.execute(f"set role {name}".encode())
            let_in = []
            for what, statement in conn.execute(ATTEMPTS.encode()).fetchall():
                if what in may:
                    continue
                try:
                    session.execute(statement.encode())
                except Denied:
                    continue
                except psycopg.Error as error:
                    let_in.append((statement, str(error)))
                else:
                    let_in.append((statement, "went through"))
            assert let_in == []
        assert manager.get_balance("alice").balance == 100
        assert manager.verify_ledger() == []


def test_objects_planted_before_the_install(
    server: Server, role: Callable[..., str], conn: Connection, server_conn: Connection, admin: CreditManager
) -> None:
    """By a role that may create in `public`, which the installer has on its path."""
    name = role()
    server_conn.execute(f"grant create on schema public to {name}".encode())
    dsn = psycopg.conninfo.make_conninfo(server.dsn(server_conn.info.dbname), user=name, password="secret")
    with psycopg.connect(dsn, autocommit=True) as session:
        assert plant(session, conn, "public") > 1000
    owner = server_conn.info.user
    for path in ("public, pg_temp, pg_catalog", "pg_temp, public", '"$user", public'):
        server_conn.execute("select pg_catalog.set_config('search_path', %s::pg_catalog.text, false)", [path])
        ducto_pg.setup(server_conn).or_raise()
    manager = CreditManager(server_conn)
    manager.publish_pricing(PRICES)
    for found, elsewhere in zip(scenario(manager, manager, "user"), scenario(admin, admin, "user"), strict=True):
        assert found == elsewhere or found.pop("id") != elsewhere.pop("id")
        assert found == elsewhere
    assert manager.verify_ledger() == []
    sprung = server_conn.execute("select pg_catalog.current_setting('trap.sprung', true)").fetchone()
    assert sprung
    assert owner not in (sprung[0] or "").split()


DEEP = 5000
TEXTS = {
    "empty": "",
    "a blank": " ",
    "a quote": "'",
    "a statement": "'; drop schema ducto cascade; --",
    "a statement in dollars": "$$; drop schema ducto cascade; $$",
    "a format": "%s %I %L %n %1$s",
    "a backslash": "\\'\\",
    "a path": "../../../etc/passwd",
    "JSON": '{"user_id": "alice"}',
    "a name of ours": "_default",
    "a pattern": "a%_*.(",
    "letters of all kinds": "ü🦆é\u202e\u200b\ufeff\U0010ffff",
    "control letters": "\x01\x1b[31m\r\n\t\x7f",
    "a megabyte": "x" * 2**20,
    "a megabyte of ducks": "🦆" * 2**18,
    "a number": "1e999999",
    "an id": "00000000-0000-7000-8000-000000000000",
    "alice": "alice",
}
OBJECTS = {
    "null": "null",
    "a text": '"alice"',
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "deep within": '{"model": "any", "input_tokens": ' + "[" * DEEP + "]" * DEEP + "}",
    "a deep element": '[{"user_id": "mallory", "amount": ' + "[" * DEEP + "]" * DEEP + "}]",
    "a list without end": "[" + "1," * 10**5 + "1]",
    "many keys": "{" + ",".join(f'"k{number}": 1' for number in range(10**4)) + "}",
    "a number of many digits": '{"model": "any", "input_tokens": ' + "9" * 10**5 + "}",
    "a number beyond": '{"model": "any", "input_tokens": 1e100000}',
    "a number next to nothing": '{"model": "any", "input_tokens": 1e-16000}',
    "a metric next to nothing": '{"model": "any", "points": 1e-16000}',
    "tools without end": '{"model": "any", "tool_calls": [' + '"x",' * 10**4 + '"x"]}',
    "a tool of a megabyte": '{"model": "any", "tool_calls": ["' + "x" * 2**20 + '"]}',
    "a model of a megabyte": '{"model": "' + "x" * 2**20 + '"}',
    "a model that is a statement": '{"model": "\'; drop schema ducto cascade; --", "input_tokens": 1}',
    "a key that is a statement": '{"model": "any", "\'); drop schema ducto cascade; --": 1}',
    "a charge of another kind": '[{"user_id": "mallory", "amount": 1, "metrics": {}, "job": "report"}]',
    "charges without end": "[" + '{"user_id": "mallory", "amount": 1},' * 2000 + "1]",
    "what is not text": '[{"user_id": ["alice"], "amount": {"a": 1}, "idempotency_key": 1, "final": "x"}]',
}
# What each kind of argument is where it is not what is tried.
USUAL = {
    "p_account_id": "mallory",
    "p_amount": 1,
    "p_cap_type": "daily",
    "p_charges": '[{"user_id": "mallory", "amount": 0}]',
    "p_feature": "seats",
    "p_ids": ["x"],
    "p_job_name": "report",
    "p_key": "k",
    "p_threshold": 5,
    "p_from": "mallory",
    "p_into": "eve",
    "p_limit": 5,
    "p_metrics": '{"model": "any"}',
    "p_name": "Crew",
    "p_reservation_id": "x",
    "p_team_id": "crew",
    "p_transaction_id": "x",
    "p_user_id": "mallory",
    "p_start": None,
    "p_end": None,
    "p_version": 1,
    "p_body": '{"prompt_tokens": 3}',
}


def told(conn: Connection, statement: str, values: list[Any]) -> str:
    """The SQLSTATE of a statement and what it says; nothing where it answers."""
    try:
        conn.execute(statement.encode(), values)
        return ""
    except psycopg.Error as error:
        return f"{error.sqlstate} {error}"


class TestHostile:
    def test_every_argument(self, victim: CreditManager, conn: Connection) -> None:
        """Each is answered, refused or raised by name, in good time, and alice's account is what it was."""
        victim.create_team("Crew", 100, team_id="crew").or_raise()
        victim.add_team_member("crew", "mallory").or_raise()
        functions = conn.execute(FUNCTIONS.encode()).fetchall()
        catalog = conn.execute("select count(*) from pg_proc").fetchone()
        mine = "select a from ducto_private.accounts as a where account_id = 'alice'"
        alices = conn.execute(mine).fetchall()
        conn.execute("set statement_timeout = '5s'")
        conn.execute("select set_config('request.jwt.claims', '{\"sub\": \"mallory\"}', false)")
        tried = 0
        for schema, name, names, types, defaults in functions:
            if schema != "ducto":
                continue
            needed = names[: len(names) - defaults]
            for argument, kind in zip(names, types, strict=True):
                values = {"text": TEXTS, "jsonb": OBJECTS, "text[]": TEXTS}.get(kind, {})
                for what, value in values.items():
                    if value == "alice" and argument in ("p_user_id", "p_account_id", "p_from", "p_into"):
                        continue
                    given = {**{key: USUAL[key] for key in needed}, argument: [value] if kind == "text[]" else value}
                    call = f"select ducto.{name}({', '.join(f'{key} => %s' for key in given)})"
                    tried += 1
                    said = told(conn, call, list(given.values()))
                    assert re.match("22|DU|54001|$", said), (name, argument, what, said[:300])
                    assert len(said) < 3000, (name, argument, what)
        assert tried > 1000
        conn.execute("reset statement_timeout")
        assert conn.execute(mine).fetchall() == alices
        assert conn.execute("select count(*) from pg_proc").fetchone() == catalog
        assert victim.verify_ledger() == []

    def test_texts_come_back_as_they_were(self, victim: CreditManager, api: Api) -> None:
        for what, text in TEXTS.items():
            if not text.strip() or len(text) > 255 or text != text.strip():
                continue
            metadata = {text: text, "list": [text]}
            arguments = {"p_user_id": f"u{text}", "p_amount": 5, "p_idempotency_key": text, "p_metadata": metadata}
            first = api.ask("rpc/add_credits", arguments | {"p_reference": text})
            assert (first.status, first.body["error"]) == (200, None), (what, first)
            assert api.ask("rpc/add_credits", arguments).body["idempotent"] is True, what
            if ":" in text:  # a sub with a colon must be a URI
                continue
            mine = api.ask("rpc/my_transactions", {}, signed_in(f"u{text}")).body
            assert [row["metadata"] for row in mine] == [metadata], what
            assert [row["reference"] for row in mine] == [text], what
        assert victim.verify_ledger() == []

    def test_what_json_may_hold_and_postgresql_not(self, api: Api, conn: Connection) -> None:
        before = tables(conn)
        for text in (r"\u0000", r"a\u0000b", r"\ud800", r"\udfff\ud800"):
            for body in (
                f'{{"p_user_id": "{text}", "p_amount": 1}}',
                f'{{"p_user_id": "mallory", "p_amount": 1, "p_metadata": {{"{text}": 1}}}}',
                f'{{"p_user_id": "mallory", "p_amount": 1, "p_idempotency_key": "{text}"}}',
            ):
                assert api.ask("rpc/add_credits", body).status == 400, body
        deep = "[" * 100000 + "]" * 100000
        started = time.monotonic()
        for body in ("{", '{"p_user_id": "mallory", "p_amount": 1, "p_metadata": ' + deep + "}"):
            assert api.ask("rpc/add_credits", body).status in (400, 413), body[:50]
        assert time.monotonic() - started < 10
        assert api.ask("rpc/version", {}).status == 200
        assert tables(conn) == before

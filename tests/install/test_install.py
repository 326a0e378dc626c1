"""setup(): everything or nothing, once or twenty times, in whose transaction and with whose rights."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

import ducto_pg
from ducto_pg.embedded import Server
from ducto_pg.install import sqlfiles
from ducto_pg.install.sqlfiles import SqlFile

Connection = psycopg.Connection[Any]
Role = Callable[..., str]
Ship = Callable[..., None]

CATALOG = """
select array_agg(o.line order by o.line) from (
  select concat_ws(' ', 'function', p.oid::regprocedure, md5(pg_get_functiondef(p.oid)), p.proacl,
    obj_description(p.oid, 'pg_proc')) as line
  from pg_proc as p where p.pronamespace::regnamespace::text like 'ducto%'
  union all
  select concat_ws(' ', 'relation', c.oid::regclass, c.relkind, c.relacl, c.reloptions,
    obj_description(c.oid, 'pg_class'),
    (select array_agg((a.attname, a.atttypid::regtype, a.attnotnull, pg_get_expr(d.adbin, d.adrelid)) order by a.attnum)
      from pg_attribute as a left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
      where a.attrelid = c.oid and a.attnum > 0),
    case when c.relkind = 'i' then pg_get_indexdef(c.oid) when c.relkind = 'v' then pg_get_viewdef(c.oid) end)
  from pg_class as c where c.relnamespace::regnamespace::text like 'ducto%'
  union all
  select concat_ws(' ', 'constraint', c.conrelid::regclass, pg_get_constraintdef(c.oid))
  from pg_constraint as c where c.connamespace::regnamespace::text like 'ducto%'
  union all
  select concat_ws(' ', 'trigger', pg_get_triggerdef(t.oid)) from pg_trigger as t where not t.tgisinternal
  union all
  select concat_ws(' ', 'schema', n.nspname, n.nspacl) from pg_namespace as n where n.nspname like 'ducto%'
) as o
"""
SETTINGS = ["search_path", "lock_timeout", "role", "client_min_messages", "standard_conforming_strings"]


@pytest.fixture
def role(server: Server) -> Iterator[Role]:
    """Creates roles that are gone at the end; ask for it before the database that they get rights in."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin, ExitStack() as stack:

        def create(name: str, options: str = "login") -> str:
            admin.execute(sql.SQL("create role {} " + options).format(sql.Identifier(name)))
            stack.callback(admin.execute, sql.SQL("drop role if exists {}").format(sql.Identifier(name)))
            return name

        yield create


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Ship:
    """Makes the package ship further files, or others under the names of its own."""
    true_read = sqlfiles.read

    def ship_files(**folders: dict[str, str]) -> None:
        def read(folder: str) -> list[SqlFile]:
            texts = {file.name: file.text for file in true_read(folder)} | folders.get(folder, {})
            return [SqlFile(name, text) for name, text in sorted(texts.items())]

        monkeypatch.setattr(sqlfiles, "read", read)

    return ship_files


def value(conn: Connection, query: str, *arguments: Any) -> Any:
    row = conn.execute(query, arguments or None).fetchone()
    assert row
    return row[0]


def settings(conn: Connection) -> list[str]:
    return [value(conn, "select current_setting(%s)", name) for name in SETTINGS]


def dsn_of(conn: Connection, **options: str) -> str:
    return psycopg.conninfo.make_conninfo(conn.info.dsn, **options)


def catalog(conn: Connection) -> Any:
    return value(conn, CATALOG)


NEW_FUNCTION = {
    "70_more.sql": "create or replace function ducto.get_more() returns integer language sql stable as 'select 1';"
    " create or replace function ducto.give_more() returns integer language sql stable as 'select 1';"
    " create or replace function ducto.my_more() returns integer language sql stable as 'select 1';"
}


class TestOnceAndAgain:
    def test_it_says_what_it_made_and_a_second_run_writes_nothing(self, server_conn: Connection) -> None:
        first = ducto_pg.setup(server_conn)
        assert first.success
        assert {"ducto_private.accounts", "ducto_private.transactions"} <= set(first.tables_created)
        assert {"ducto.deduct", "ducto.version"} <= set(first.rpcs_created)
        with server_conn.transaction():
            assert ducto_pg.setup(server_conn) == ducto_pg.SetupResult()
            assert value(server_conn, "select pg_current_xact_id_if_assigned()") is None

    def test_twenty_at_once_install_once(self, server_conn: Connection) -> None:
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(ducto_pg.setup, [server_conn.info.dsn] * 20))
        assert [result.errors for result in results] == [[]] * 20
        assert sorted(bool(result.tables_created) for result in results) == [False] * 19 + [True]

    def test_a_new_package_upgrades_and_reports_only_what_changed(self, conn: Connection, ship: Ship) -> None:
        ship(migrations={"9000_more.sql": "create table ducto_private.more (id bigint primary key);"}, sql=NEW_FUNCTION)
        assert ducto_pg.setup(conn) == ducto_pg.SetupResult(
            tables_created=["ducto_private.more"], rpcs_created=["ducto.get_more", "ducto.give_more", "ducto.my_more"]
        )
        assert ducto_pg.setup(conn) == ducto_pg.SetupResult()

    def test_a_failing_file_is_named_and_nothing_changes(self, conn: Connection, ship: Ship) -> None:
        before = catalog(conn)
        ship(sql={**NEW_FUNCTION, "71_bad.sql": "select 100 % 0;"})
        assert ducto_pg.setup(conn).errors == ["71_bad.sql: division by zero"]
        assert catalog(conn) == before
        with pytest.raises(ducto_pg.DuctoError, match="71_bad"):
            ducto_pg.setup(conn).or_raise()


class TestRefusals:
    def test_an_edited_migration_is_named(self, conn: Connection, ship: Ship) -> None:
        ship(migrations={"0001_ledger.sql": "select 1;"}, sql=NEW_FUNCTION)
        before = catalog(conn)
        result = ducto_pg.setup(conn)
        assert "migration 0001_ledger.sql was edited" in result.errors[0]
        assert catalog(conn) == before

    @pytest.mark.parametrize(
        "newer",
        [
            "insert into ducto_private.schema_migrations (name, checksum) values ('9999_later.sql', 'x')",
            "update ducto_private.installation set version = '0.10000.0', contents = 'x'",
        ],
    )
    def test_a_database_of_a_newer_version(self, conn: Connection, newer: str) -> None:
        conn.execute(newer)
        before = catalog(conn)
        assert "newer ducto_pg" in ducto_pg.setup(conn).errors[0]
        assert catalog(conn) == before

    @pytest.mark.parametrize(
        ("plant", "named"),
        [
            ("create schema ducto", "schema ducto "),
            ("create schema ducto_read", "schema ducto_read "),
            ("create function ducto.deduct() returns text language sql as 'select 1'", "function ducto.deduct() "),
            ("create type ducto.balance_result as (balance bigint)", "type ducto.balance_result "),
            ("create domain ducto_private.text as text", "type ducto_private.text "),
            ("create table ducto_private.accounts ()", "table ducto_private.accounts "),
            ("create view ducto_private.schema_migrations as select 1", "view ducto_private.schema_migrations "),
            ("create operator ducto.= (function = int4eq, leftarg = integer, rightarg = integer)", "operator ducto.="),
        ],
    )
    @pytest.mark.parametrize("superuser", [True, False])
    def test_a_planted_object(
        self, role: Role, server_conn: Connection, plant: str, named: str, superuser: bool
    ) -> None:
        attacker, installer = role("ducto_attacker"), role("ducto_installer")
        server_conn.execute(
            "grant create on database " + server_conn.info.dbname + " to ducto_attacker, ducto_installer"
        )
        if not superuser:
            server_conn.execute(f"set role {installer}")
        if not plant.startswith("create schema"):
            server_conn.execute("create schema ducto")
            server_conn.execute("create schema ducto_private")
            server_conn.execute("grant create, usage on schema ducto, ducto_private to ducto_attacker")
        with psycopg.connect(dsn_of(server_conn, user=attacker), autocommit=True) as session:
            session.execute(plant)
        before = catalog(server_conn)
        result = ducto_pg.setup(server_conn)
        assert named in result.errors[0]
        assert f"belongs to role {attacker}" in result.errors[0]
        assert catalog(server_conn) == before

    def test_a_planted_ledger_of_migrations_gets_nothing_of_a_superuser(
        self, role: Role, server_conn: Connection
    ) -> None:
        attacker = role("ducto_attacker")
        server_conn.execute("grant create on database " + server_conn.info.dbname + " to ducto_attacker")
        with psycopg.connect(dsn_of(server_conn, user=attacker), autocommit=True) as session:
            session.execute("create schema ducto_private")
            session.execute(
                "create function ducto_private.spy() returns text language plpgsql as $$ begin"
                " execute 'reset role'; execute 'alter role ducto_attacker superuser'; return 'x'; end $$"
            )
            session.execute("create table ducto_private.schema_migrations (name text, checksum text)")
            session.execute("insert into ducto_private.schema_migrations values ('0000_installation.sql', 'x')")
            session.execute(
                "alter table ducto_private.schema_migrations enable row level security, force row level security"
            )
            session.execute(
                "create policy spy on ducto_private.schema_migrations using (ducto_private.spy() is not null)"
            )
        assert "belongs to role ducto_attacker" in ducto_pg.setup(server_conn).errors[0]
        assert value(server_conn, "select rolsuper from pg_roles where rolname = 'ducto_attacker'") is False

    def test_a_role_that_may_not_create(self, role: Role, server_conn: Connection) -> None:
        result = ducto_pg.setup(dsn_of(server_conn, user=role("ducto_nobody")))
        assert "permission denied for database" in result.errors[0]

    def test_a_database_that_is_not_utf8(self, server: Server) -> None:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("create database ducto_latin encoding 'LATIN1' locale 'C' template template0")
            try:
                assert "encoding UTF8" in ducto_pg.setup(server.dsn("ducto_latin")).errors[0]
            finally:
                admin.execute("drop database ducto_latin with (force)")

    def test_misuse(self, conn: Connection) -> None:
        with pytest.raises(TypeError, match="DSN"):
            ducto_pg.setup(object())  # type: ignore[arg-type]
        for url in ("postgresql+psycopg://u:secret@h/db", "postgresql://u:x@secret@h/db", "secret"):
            with pytest.raises(ducto_pg.InvalidArgumentError, match="the DSN ") as caught:
                ducto_pg.setup(url)
            assert "secret" not in str(caught.value)
        sqlalchemy = pytest.importorskip("sqlalchemy")
        with closing(sqlite3.connect(":memory:")) as other, pytest.raises(TypeError, match="DSN"):
            ducto_pg.setup(other)  # type: ignore[arg-type]
        engine = sqlalchemy.create_engine("sqlite://")
        with engine.connect() as other, pytest.raises(TypeError, match="PostgreSQL"):
            ducto_pg.setup(other)
        engine.dispose()
        assert ducto_pg.setup("host=/nowhere").errors
        assert "lock_timeout" in ducto_pg.setup(conn, lock_timeout="soon").errors[0]
        for roles in (5, None, [1]):
            with pytest.raises(TypeError, match="roles are named by text"):
                ducto_pg.setup(conn, grant_to=roles)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="lock_timeout takes text"):
            ducto_pg.setup(conn, lock_timeout=5)  # type: ignore[arg-type]
        for options in ({"lock_timeout": "5\0"}, {"grant_to": "a\0"}):
            with pytest.raises(ducto_pg.InvalidArgumentError, match="not "):
                ducto_pg.setup(conn, **options)
        assert 'role "nobody" does not exist' in ducto_pg.setup(conn, grant_to="nobody").errors[0]


class TestOwner:
    def test_the_owner_stays_when_a_superuser_upgrades(self, role: Role, server_conn: Connection, ship: Ship) -> None:
        owner, other = role("ducto_owner"), role("ducto_other")
        server_conn.execute(f"alter database {server_conn.info.dbname} owner to {owner}")
        ducto_pg.setup(dsn_of(server_conn, user=owner)).or_raise()
        ship(migrations={"9000_more.sql": "create table ducto_private.more (id bigint);"}, sql=NEW_FUNCTION)
        refused = ducto_pg.setup(dsn_of(server_conn, user=other))
        assert f"belongs to role {owner}, not to {other}" in refused.errors[0]
        assert ducto_pg.setup(server_conn).tables_created == ["ducto_private.more"]
        owners = value(
            server_conn,
            "select array_agg(distinct o.owner::regrole::text) from (select relowner as owner from pg_class"
            " where relnamespace::regnamespace::text like 'ducto%' union select proowner from pg_proc"
            " where pronamespace::regnamespace::text like 'ducto%') as o",
        )
        assert owners == [owner]
        assert value(server_conn, "select current_user") == "postgres"

    def test_schemas_that_a_dba_made_for_the_installer_will_do(self, role: Role, server_conn: Connection) -> None:
        owner = role("ducto_owner")
        for schema in ("ducto", "ducto_private", "ducto_read"):
            server_conn.execute(f"create schema {schema} authorization {owner}")
        assert ducto_pg.setup(dsn_of(server_conn, user=owner)).errors == []


class TestTransactions:
    def test_an_idle_connection_is_left_for_the_caller_to_commit(self, server_conn: Connection) -> None:
        with psycopg.connect(server_conn.info.dsn) as mine:
            ducto_pg.setup(mine).or_raise()
            assert mine.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
            mine.rollback()
            assert value(server_conn, "select to_regnamespace('ducto')") is None
            ducto_pg.setup(mine).or_raise()
            mine.commit()
        assert value(server_conn, "select to_regnamespace('ducto')")

    def test_a_failure_leaves_the_rest_of_the_transaction(self, server_conn: Connection, ship: Ship) -> None:
        ship(sql={"71_bad.sql": "select 1 / 0;"})
        with psycopg.connect(server_conn.info.dsn) as mine:
            mine.execute("create table mine (id integer)")
            assert not ducto_pg.setup(mine).success
            mine.execute("insert into mine values (1)")
        assert value(server_conn, "select count(*) from mine") == 1
        assert value(server_conn, "select to_regnamespace('ducto')") is None

    def test_autocommit_is_a_transaction_of_its_own(self, server_conn: Connection, ship: Ship) -> None:
        ducto_pg.setup(server_conn).or_raise()
        assert server_conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        ship(sql={"71_bad.sql": "select 1 / 0;"})
        assert not ducto_pg.setup(server_conn).success
        assert server_conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE

    def test_inside_transaction_blocks(self, server_conn: Connection) -> None:
        with server_conn.transaction(force_rollback=True):
            ducto_pg.setup(server_conn).or_raise()
        assert value(server_conn, "select to_regnamespace('ducto')") is None

    @pytest.mark.parametrize("works", [True, False])
    def test_settings_are_put_back(self, server_conn: Connection, ship: Ship, works: bool) -> None:
        if not works:
            ship(sql={"71_bad.sql": "select 1 / 0;"})
        server_conn.execute("create schema odd; create domain odd.text as pg_catalog.text")
        server_conn.execute("set standard_conforming_strings = off; set client_min_messages = error")
        with server_conn.transaction():
            server_conn.execute("set search_path = odd, pg_catalog; set local lock_timeout = '7s'")
            before = settings(server_conn)
            assert ducto_pg.setup(server_conn).success is works
            assert settings(server_conn) == before
        assert value(server_conn, "select current_setting('search_path')") == "odd, pg_catalog"
        assert value(server_conn, "select current_setting('lock_timeout')") == "0"

    def test_an_aborted_transaction_is_an_error(self, conn: Connection) -> None:
        with conn.transaction(force_rollback=True):
            with pytest.raises(psycopg.errors.DivisionByZero):
                conn.execute("select 1 / 0")
            assert "aborted" in ducto_pg.setup(conn).errors[0]

    def test_a_snapshot_older_than_the_installation(self, server_conn: Connection) -> None:
        with psycopg.connect(server_conn.info.dsn) as mine:
            mine.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            mine.execute("select 1 from pg_class")
            ducto_pg.setup(server_conn).or_raise()
            assert "Try again" in ducto_pg.setup(mine).errors[0]
            mine.commit()
            assert ducto_pg.setup(mine) == ducto_pg.SetupResult()

    def test_a_table_in_use_is_waited_for_no_longer_than_told(
        self, conn: Connection, ship: Ship, connect: Callable[..., Connection]
    ) -> None:
        ship(migrations={"9000_more.sql": "alter table ducto_private.accounts add column more text;"})
        user = connect(autocommit=False)
        user.execute("select from ducto_private.accounts")
        result = ducto_pg.setup(conn, lock_timeout="50ms")
        assert result.errors == ["9000_more.sql: canceling statement due to lock timeout"]
        user.rollback()
        assert ducto_pg.setup(conn, lock_timeout="50ms").tables_created == ["ducto_private.accounts"]

    def test_a_server_that_goes_away(self, conn: Connection, connect: Callable[..., Connection]) -> None:
        holder, victim = connect(autocommit=False), connect()
        holder.execute("select ducto_private.lock_setup()")
        results: list[ducto_pg.SetupResult] = []
        thread = threading.Thread(target=lambda: results.append(ducto_pg.setup(victim)))
        thread.start()
        while not value(conn, "select count(*) from pg_stat_activity where wait_event = 'advisory'"):
            pass
        conn.execute("select pg_terminate_backend(%s)", [victim.info.backend_pid])
        thread.join()
        assert "terminating connection" in results[0].errors[0]
        assert "the connection is" in ducto_pg.setup(victim).errors[0]


class TestOtherConnections:
    def test_async(self, server_conn: Connection) -> None:
        async def main() -> None:
            assert (await ducto_pg.asetup(server_conn.info.dsn)).rpcs_created
            async with await psycopg.AsyncConnection.connect(server_conn.info.dsn) as mine:
                assert await ducto_pg.asetup(mine) == ducto_pg.SetupResult()
                assert mine.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
            assert (await ducto_pg.asetup("host=/nowhere")).errors
            with pytest.raises(TypeError, match="DSN"):
                await ducto_pg.asetup(server_conn)  # type: ignore[arg-type]

        asyncio.run(main())

    @pytest.mark.parametrize("isolation", ["READ COMMITTED", "AUTOCOMMIT"])
    def test_sqlalchemy(self, server_conn: Connection, isolation: Any, ship: Ship) -> None:
        sqlalchemy = pytest.importorskip("sqlalchemy")
        engine = sqlalchemy.create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(server_conn.info.dsn), isolation_level=isolation
        )
        with engine.connect() as mine:
            assert ducto_pg.setup(mine).rpcs_created
            mine.rollback()
        with engine.connect() as mine:
            assert bool(ducto_pg.setup(mine).rpcs_created) is (isolation != "AUTOCOMMIT")
            mine.commit()
        ship(sql={"71_bad.sql": "select 100 % 0;"})
        with engine.begin() as mine:
            mine.exec_driver_sql("create table mine ()")
            assert ducto_pg.setup(mine).errors == ["71_bad.sql: division by zero"]
        assert value(server_conn, "select to_regclass('mine')")
        assert value(server_conn, "select to_regprocedure('ducto.version()')")
        engine.dispose()

    def test_async_sqlalchemy(self, server_conn: Connection) -> None:
        pytest.importorskip("greenlet")
        asynchronous = pytest.importorskip("sqlalchemy.ext.asyncio")

        async def main() -> None:
            engine = asynchronous.create_async_engine(
                "postgresql+psycopg://",
                async_creator=lambda: psycopg.AsyncConnection.connect(server_conn.info.dsn),
            )
            async with engine.begin() as mine:
                assert (await ducto_pg.asetup(mine)).rpcs_created
            await engine.dispose()

        asyncio.run(main())
        assert ducto_pg.setup(server_conn) == ducto_pg.SetupResult()


class TestAccess:
    def test_nobody_else_may_anything(self, conn: Connection) -> None:
        assert (
            value(
                conn,
                """
                select array_agg(o.name) from (
                  select p.oid::regprocedure::text as name, coalesce(p.proacl, acldefault('f', p.proowner)) as acl,
                    p.proowner as owner
                  from pg_proc as p where p.pronamespace::regnamespace::text like 'ducto%'
                  union all
                  select c.oid::regclass::text, c.relacl, c.relowner
                  from pg_class as c where c.relnamespace::regnamespace::text like 'ducto%'
                  union all
                  select n.nspname, n.nspacl, n.nspowner from pg_namespace as n where n.nspname like 'ducto%'
                ) as o, aclexplode(o.acl) as a
                where a.grantee <> o.owner
                """,
            )
            is None
        )

    def test_roles_keep_their_rights_on_what_is_new_until_revoked(
        self, role: Role, conn: Connection, ship: Ship
    ) -> None:
        caller, admin, reader = role("ducto caller"), role("Ducto-Admin"), role("ducto'reader\\$ducto_pg$")
        ducto_pg.setup(conn, grant_to=caller, grant_admin_to=[admin], grant_read_to=(reader,)).or_raise()
        with conn.transaction():
            ducto_pg.setup(conn, grant_to=[caller]).or_raise()
            assert value(conn, "select pg_current_xact_id_if_assigned()") is None

        def may(who: str, function: str) -> bool:
            return bool(value(conn, "select has_function_privilege(%s, %s::regproc, 'execute')", who, function))

        ship(sql=NEW_FUNCTION)
        ducto_pg.setup(conn).or_raise()
        rights = {
            function: [may(who, function) for who in (caller, admin, reader)]
            for function in ("ducto.deduct", "ducto.get_more", "ducto.give_more", "ducto.add_credits", "ducto.my_more")
        }
        assert rights == {
            "ducto.deduct": [True, True, False],
            "ducto.get_more": [True, True, False],
            "ducto.give_more": [False, True, False],
            "ducto.add_credits": [False, True, False],
            "ducto.my_more": [False, False, False],
        }
        assert value(conn, "select has_table_privilege(%s, 'ducto_read.accounts', 'select')", reader)
        assert not value(conn, "select has_table_privilege(%s, 'ducto_private.accounts', 'select')", reader)
        ducto_pg.setup(conn, revoke_from=[caller, admin, reader]).or_raise()
        assert not any(may(who, "ducto.version") for who in (caller, admin))
        assert not value(conn, "select exists (select from ducto_private.grants)")
        assert not value(conn, "select has_schema_privilege(%s, 'ducto_read', 'usage')", reader)

    def test_a_restore_of_the_schema_alone_is_told_so(self, conn: Connection) -> None:
        conn.execute("delete from ducto_private.installation")
        (error,) = ducto_pg.setup(conn).errors
        assert "lost their contents" in error

    def test_a_role_that_does_not_exist_has_no_rights_to_lose(self, role: Role, conn: Connection) -> None:
        caller = role("ducto caller")
        ducto_pg.setup(conn, grant_to=caller).or_raise()
        (error,) = ducto_pg.setup(conn, revoke_from="ducto_caller").errors
        assert "ducto_caller" in error
        assert value(conn, "select has_schema_privilege(%s, 'ducto', 'usage')", caller)

    def test_supabase_roles(self, role: Role, server_conn: Connection) -> None:
        service, user, anon = (role(name, "nologin") for name in ("service_role", "authenticated", "anon"))
        server_conn.execute("alter default privileges grant all on tables to anon, authenticated")
        server_conn.execute("alter default privileges grant all on functions to anon, authenticated")
        ducto_pg.setup(server_conn).or_raise()

        def callable_by(who: str) -> set[str]:
            names = server_conn.execute(
                "select p.proname from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace where n.nspname"
                " like 'ducto%%' and has_schema_privilege(%s, n.oid, 'usage') and has_function_privilege(%s, p.oid,"
                " 'execute')",
                [who, who],
            ).fetchall()
            return {name for (name,) in names}

        assert {"deduct", "add_credits", "version"} <= callable_by(service)
        assert all(name.startswith("my_") for name in callable_by(user))
        assert callable_by(anon) == set()
        assert not value(server_conn, "select has_table_privilege(%s, 'ducto_private.accounts', 'select')", user)
        for end_user in (user, anon):
            assert "end users" in ducto_pg.setup(server_conn, grant_to=end_user).errors[0]
        ducto_pg.setup(server_conn, revoke_from=service).or_raise()
        ducto_pg.setup(server_conn).or_raise()
        assert callable_by(service) == set()
        ducto_pg.setup(server_conn, grant_to=service).or_raise()
        assert {"deduct", "add_credits"} <= callable_by(service)

    def test_a_role_made_anew_is_not_the_one_that_was_granted(self, role: Role, conn: Connection) -> None:
        name = role("ducto_again")
        ducto_pg.setup(conn, grant_to=name).or_raise()
        conn.execute(f"drop owned by {name}; drop role {name}; create role {name}")
        ducto_pg.setup(conn).or_raise()
        assert not value(conn, "select has_schema_privilege(%s, 'ducto', 'usage')", name)

    def test_what_was_granted_by_accident_goes(self, conn: Connection) -> None:
        conn.execute("grant execute on all functions in schema ducto_private to public")
        conn.execute("grant usage on schema ducto_private to public; grant select on ducto_read.accounts to public")
        ducto_pg.setup(conn).or_raise()
        self.test_nobody_else_may_anything(conn)


class TestScript:
    def test_it_does_what_setup_does(self, server_conn: Connection, conn: Connection) -> None:
        server_conn.execute("set standard_conforming_strings = off")
        server_conn.execute(ducto_pg.script())
        assert catalog(server_conn) == catalog(conn)
        rows = "select array_agg((m.name, m.checksum) order by m.name)::text from ducto_private.schema_migrations as m"
        assert value(server_conn, rows) == value(conn, rows)
        with server_conn.transaction():
            server_conn.execute(ducto_pg.script())
            assert value(server_conn, "select pg_current_xact_id_if_assigned()") is None
        assert ducto_pg.setup(server_conn) == ducto_pg.SetupResult()

    def test_through_psql(self, server: Server, server_conn: Connection, tmp_path: Path) -> None:
        psql = server.bindir and server.bindir / "psql"
        if not psql or not psql.exists():
            pytest.skip("this server comes without psql")
        file = tmp_path / "ducto_pg.sql"
        file.write_text(ducto_pg.script(), "utf-8")
        for _ in range(2):
            subprocess.run(
                [psql, "-qX", "-v", "ON_ERROR_STOP=1", "-d", server.dsn(server_conn.info.dbname), "-f", file],
                check=True,
            )
        assert ducto_pg.setup(server_conn) == ducto_pg.SetupResult()


def test_import_is_light() -> None:
    code = "import sys, ducto_pg; print({'sqlglot', 'yaml', 'rich', 'typer', 'psycopg'} & set(sys.modules))"
    path = os.pathsep.join([str(Path(ducto_pg.__file__).parents[1]), *sys.path])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert run.stdout == "set()\n", run.stderr


def test_the_files_are_found_in_a_zip(tmp_path: Path) -> None:
    package = Path(ducto_pg.__file__).parent
    archive = tmp_path / "site.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for file in [*package.rglob("*.py"), *package.rglob("*.json"), *package.rglob("*.sql")]:
            zipped.write(file, file.relative_to(package.parent))
        for folder in ("sql", "migrations"):
            for sql_file in sqlfiles.read(folder):
                zipped.writestr(f"ducto_pg/{folder}/{sql_file.name}", sql_file.text.replace("\n", "\r\n"))
    code = "import ducto_pg; assert '.zip' in ducto_pg.__file__; print(ducto_pg.script(), end='')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        cwd=tmp_path,
        encoding="utf-8",
        env={"PYTHONPATH": os.pathsep.join([str(archive), *sys.path[1:]]), "PYTHONUTF8": "1"},
    )
    assert run.stdout == ducto_pg.script(), run.stderr


def test_the_files_have_names_of_their_own() -> None:
    migrations = [file.name for file in sqlfiles.read("migrations")]
    assert len({name[:4] for name in migrations}) == len(migrations)
    assert all(name[:4].isdigit() and name[4] == "_" for name in migrations)
    for file in [*sqlfiles.read("migrations"), *sqlfiles.read("sql")]:
        assert "$ducto_" not in file.text, file.name

"""One server for each process of the run, on it a template database with ducto_pg, and a fresh clone for each test."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import psycopg
import pytest
from majors import open_major
from psycopg import sql

import ducto_pg
from ducto_pg import servers
from ducto_pg.embedded import Server

pytest_plugins = ["ledger_helpers", "sessions"]

Connection = psycopg.Connection[tuple[Any, ...]]
Connect = Callable[..., Connection]

# Without jit, which compiles for longer than a test's queries run.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "jit": "off", "max_connections": "200"}

_names = (f"ducto_test_{os.getpid()}_{number}" for number in count())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` starts, each with a server of its own (roles belong to a server): as many as there
    are cores, at least two. None for a few files or a keyword, nor for a server that they would have to share."""
    few = config.option.keyword or not any(os.path.isdir(argument) for argument in config.args)
    return 0 if few or os.environ.get("DUCTO_PG_TEST_DSN") else max(2, os.cpu_count() or 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    majors = os.environ.get("DUCTO_PG_TEST_VERSIONS", "")
    if majors and "server" in metafunc.fixturenames:
        chosen = [int(major) for major in majors.split(",")]
        metafunc.parametrize("server", chosen, ids=lambda major: f"pg{major}", indirect=True, scope="session")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The PostgreSQL server of this process."""
    major: int | None = getattr(request, "param", None)
    with open_major(major, FAST) if major else servers.open_server(FAST) as opened:
        yield opened


@pytest.fixture(scope="session")
def template_db(server: Server) -> Iterator[str]:
    """The name of a database in which `ducto_pg.setup()` has run and nothing else: do not connect to it."""
    with _database(server, "template0") as (name, dsn):
        ducto_pg.setup(dsn).or_raise()
        yield name


@pytest.fixture
def db(server: Server, template_db: str) -> Iterator[str]:
    """The DSN of a fresh database with ducto_pg set up and no prices published."""
    with _database(server, template_db) as (_, dsn):
        yield dsn


@pytest.fixture
def conn(db: str) -> Iterator[Connection]:
    """An autocommit connection to `db`."""
    with psycopg.connect(db, autocommit=True) as connection:
        yield connection


@pytest.fixture
def connect(db: str) -> Iterator[Connect]:
    """Opens further sessions to `db`, autocommit unless said otherwise, and closes them at the end."""
    with ExitStack() as stack:

        def open_session(**options: Any) -> Connection:
            return stack.enter_context(psycopg.connect(db, **{"autocommit": True, **options}))

        yield open_session


@pytest.fixture
def server_conn(server: Server) -> Iterator[Connection]:
    """An autocommit connection to a fresh database without ducto_pg."""
    with _database(server, "template0") as (_, dsn), psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


class Clock:
    """The time that ducto_pg sees in `db`, put in the place of clock_timestamp(): the true one until it is set."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.execute("create table ducto_private.fake_clock (now timestamptz not null)")
        connection.execute(
            "create function ducto_private.clock() returns timestamptz language sql volatile"
            " as 'select coalesce((select f.now from ducto_private.fake_clock as f), pg_catalog.clock_timestamp())'"
        )
        connection.execute(
            """
            do $$
            declare
              v_definition text;
            begin
              for v_definition in
                select replace(pg_get_functiondef(p.oid), 'clock_timestamp()', 'ducto_private.clock()')
                from pg_proc as p
                where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace)
                  and p.prosrc like '%clock_timestamp()%' and p.proname <> 'clock'
              loop
                execute v_definition;
              end loop;
            end
            $$
            """
        )
        connection.execute("select ducto_private.store_objects()")

    def now(self) -> datetime:
        """The present time in UTC."""
        row = self._connection.execute("select ducto_private.clock()").fetchone()
        assert row
        time: datetime = row[0]
        return time.astimezone(UTC)

    def set(self, time: str | datetime) -> None:
        """Stand still at this time (ISO 8601 text; without a zone it is UTC)."""
        moment = datetime.fromisoformat(time) if isinstance(time, str) else time
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        with self._connection.transaction():
            self._connection.execute("delete from ducto_private.fake_clock")
            self._connection.execute("insert into ducto_private.fake_clock values (%s)", [moment])

    def advance(self, step: timedelta) -> None:
        """Go on (or back) by an exact length of time and stand still there."""
        self.set(self.now() + step)


@pytest.fixture
def clock(connect: Connect) -> Clock:
    """Replaces the time in `db`."""
    return Clock(connect())


@contextmanager
def _database(server: Server, template: str) -> Iterator[tuple[str, str]]:
    name = next(_names)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        create = sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
        if admin.info.server_version >= 150000:
            create += sql.SQL(" strategy file_copy")
        admin.execute(create)
        try:
            yield name, server.dsn(name)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

"""Elsewhere and later: on a streaming standby, and in a session that is older than an upgrade."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from conftest import Connection
from psycopg import IsolationLevel
from psycopg.conninfo import make_conninfo
from psycopg.rows import tuple_row
from steps import CONFIG, READS, STEPS, TEAM_STEPS, scene, team_scene

import ducto_pg
from ducto_pg import CreditManager, embedded
from ducto_pg.client.calls import Query
from ducto_pg.client.manager import _Cursor
from ducto_pg.embedded import Server
from ducto_pg.install import sqlfiles
from ducto_pg.install.sqlfiles import SqlFile

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A primary with accounts, and a standby that follows it."""

    primary: str
    standby: str
    at: dict[str, str]

    def caught_up(self) -> None:
        """Wait until the standby shows what the primary has committed."""
        with psycopg.connect(self.primary, autocommit=True) as conn:
            row = conn.execute("select pg_current_wal_flush_lsn()").fetchone()
        assert row
        with psycopg.connect(self.standby, autocommit=True) as conn:
            for _ in range(600):
                if conn.execute("select pg_last_wal_replay_lsn() >= %s::pg_lsn", row).fetchone() == (True,):
                    return
                time.sleep(0.05)
        pytest.fail("the standby does not follow")


@pytest.fixture(scope="module")
def pair(server: Server) -> Iterator[Pair]:
    """A standby of a server of its own, over a socket of this machine."""
    if not server.bindir or not (server.bindir / "pg_basebackup").exists():
        pytest.skip("needs a server started here, with its pg_basebackup")
    with embedded.start(server.bindir, settings={"fsync": "off"}) as first:
        dsn = first.dsn()
        ducto_pg.setup(dsn).or_raise()
        with CreditManager(dsn) as credits:
            credits.publish_pricing(CONFIG)
            at = scene(credits, "alice") | team_scene(credits, "alice")
        folder = Path(tempfile.mkdtemp(prefix="ducto_pg-", dir="/tmp"))
        try:
            with _standby(server.bindir, dsn, folder) as second:
                yield Pair(dsn, second, at)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _standby(bindir: Path, primary: str, folder: Path) -> "_Standby":
    user = embedded._server_user()
    programs = embedded._reachable(bindir, folder, user)
    os.chown(folder, user.get("user", -1), user.get("group", -1))
    data = str(folder / "data")
    copy = [str(programs / "pg_basebackup"), "-D", data, "-d", primary, "-X", "stream", "-c", "fast", "--no-sync"]
    embedded._run(copy, user)
    (folder / "data" / "standby.signal").touch()
    command = [str(programs / "postgres"), "-D", data, f"--unix_socket_directories={folder}", "--listen_addresses="]
    # Not by -R, which writes more of it than an older libpq beside the server reads.
    command += [f"--primary_conninfo={primary}", "--hot_standby=on"]
    return _Standby(command, user, make_conninfo(primary, host=str(folder)), folder / "log")


class _Standby:
    def __init__(self, command: list[str], user: Mapping[str, Any], dsn: str, log: Path) -> None:
        self._command, self._user, self._dsn, self._log = command, user, dsn, log

    def __enter__(self) -> str:
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd="/", env=embedded._environment(), stdout=log, stderr=log, **self._user
            )
        for _ in range(600):
            try:
                psycopg.connect(self._dsn, connect_timeout=5).close()
                return self._dsn
            except psycopg.OperationalError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        self.__exit__()
        pytest.fail(f"the standby did not start: {self._log.read_text()[-2000:]}")

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


class TestStandby:
    @pytest.mark.parametrize("level", [IsolationLevel.READ_COMMITTED, IsolationLevel.REPEATABLE_READ])
    def test_every_reading_call_answers(self, pair: Pair, level: IsolationLevel) -> None:
        pair.caught_up()
        with psycopg.connect(pair.primary) as primary, psycopg.connect(pair.standby) as standby:
            assert standby.execute("select pg_is_in_recovery()").fetchone() == (True,)
            names = standby.execute(
                "select p.proname from pg_proc as p"
                " where p.pronamespace = 'ducto'::regnamespace and p.provolatile <> 'v' order by 1"
            ).fetchall()
            standby.rollback()
            standby.isolation_level, standby.read_only = level, True
            assert [name for (name,) in names] == sorted(READS)
            for name, read in READS.items():
                assert read(CreditManager(standby), pair.at) == read(CreditManager(primary), pair.at), name

    def test_writing_calls_are_refused(self, pair: Pair) -> None:
        with psycopg.connect(pair.standby) as standby:
            for step in (*STEPS.values(), *TEAM_STEPS.values()):
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    step(CreditManager(standby), pair.at)
                standby.rollback()

    def test_it_follows(self, pair: Pair) -> None:
        """New prices too; `revision` tells how far it is."""
        with CreditManager(pair.primary) as primary, CreditManager(pair.standby) as standby:
            primary.publish_pricing(CONFIG | {"fixed": {"report": 8}})
            charge = primary.deduct_fixed(pair.at["user"], "report").or_raise()
            pair.caught_up()
            assert standby.get_balance(pair.at["user"]).revision == charge.revision
            assert standby.calculate_cost({"fixed_job": "report"}).total == 8
            assert standby.verify_ledger() == []


class Preparing(CreditManager):
    """Prepares each call at its first use and keeps it."""

    def run(self, statement: Query[T]) -> T:
        assert isinstance(self._source, psycopg.Connection)
        with _Cursor(self._source, row_factory=tuple_row) as cursor:
            cursor.execute(statement.sql, statement.arguments, prepare=True, binary=statement.arguments is not None)
            return statement.read(cursor.fetchall())


# Answers that the database makes by a cast of a row.
GROWING = (
    "add_credits_result",
    "balance_result",
    "cost_breakdown",
    "deduction_result",
    "refund_result",
    "reserve_result",
    "transaction",
)


def test_a_prepared_session_survives_an_answer_that_grows(
    conn: Connection, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade appends an attribute to composites, and replaces the functions that make them."""
    owner, old = CreditManager(conn), Preparing(connect())
    owner.publish_pricing(CONFIG)

    def every_call(user: str) -> dict[str, Any]:
        at = scene(old, user) | team_scene(old, user)
        for name, step in STEPS.items():
            assert step(old, scene(old, f"{user} {name}")).error is None
        for name, step in TEAM_STEPS.items():
            assert step(old, at | team_scene(old, f"{user} {name}") | {"user": f"{user} {name}"}).error is None
        return {name: read(old, at) for name, read in READS.items()}

    before = every_call("before")
    careless = connect()
    careless.execute("select * from ducto.get_balance('before')", prepare=True)
    true_read = sqlfiles.read
    appended = "\n".join(f"alter type ducto.{name} add attribute more text;" for name in GROWING)

    def read(folder: str) -> list[SqlFile]:
        if folder == "migrations":
            return [*true_read(folder), SqlFile("9000_more.sql", appended)]
        files = []
        for file in true_read(folder):
            text = file.text
            for name in GROWING:
                text = text.replace(f")::ducto.{name};", f", 'more')::ducto.{name};")
                text = text.replace(f")::ducto.{name}\n", f", 'more')::ducto.{name}\n")
                text = text.replace(f")::ducto.{name} end", f", 'more')::ducto.{name} end")
            files.append(SqlFile(file.name, text))
        return files

    monkeypatch.setattr(sqlfiles, "read", read)
    ducto_pg.setup(conn).or_raise()
    assert conn.execute("select more from ducto.get_balance('before')").fetchone() == ("more",)
    assert every_call("after").keys() == before.keys()
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="cached plan"):
        careless.execute("select * from ducto.get_balance('before')", prepare=True)
    assert owner.verify_ledger() == []

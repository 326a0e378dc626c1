"""Errors of the server and the connection: what they are in Python, and what a manager does about them."""

import asyncio
import os
import pickle
import re
import socket
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from places import ROOT
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

import ducto_pg
from ducto_pg import AsyncCreditManager, ConcurrencyError, CreditManager, OutcomeUnknownError, UnavailableError, errors
from ducto_pg.client.calls import Query

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]

PAGE = (ROOT / "docs" / "errors.md").read_text("utf-8")
ROWS = [
    (code, name)
    for codes, name in re.findall(r"^\| ((?:`\w+…?`(?:, )?)+) \| `([\w.]+)` \|", PAGE, re.MULTILINE)
    for code in re.findall(r"`(\w+)…?`", codes)
]
OURS = [(code, name) for code, name in ROWS if not name.startswith("psycopg.")]


@pytest.fixture
def credits(conn: Connection) -> CreditManager:
    """A manager on an autocommit connection, and `alice` with 100 credits."""
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"_default": "input_tokens"}, "min_balance": 0})
    manager.add_credits("alice", 100).or_raise()
    return manager


def raising(sqlstate: str) -> Query[None]:
    """A statement that the database ends with this SQLSTATE."""
    text = f"do $$ begin raise exception 'so it is' using errcode = '{sqlstate}', detail = 'more', hint = 'do'; end $$"
    return Query(text, None, lambda rows: None)


def read_only(conn: Connection, whether: bool) -> None:
    """Make sessions of this database that begin from now on read-only, or no more."""
    name = sql.Identifier(conn.info.dbname)
    change = "set default_transaction_read_only = on" if whether else "reset default_transaction_read_only"
    conn.execute(sql.SQL("alter database {} ").format(name) + sql.SQL(change))


def wait_until_gone(conn: Connection, pid: int) -> None:
    while conn.execute("select from pg_stat_activity where pid = %s", [pid]).fetchone():
        conn.execute("select pg_sleep(0.01)")


class TestTheTable:
    """That of docs/errors.md."""

    def test_it_has_every_sqlstate_that_has_a_class(self) -> None:
        assert {code: getattr(errors, name) for code, name in OURS} == errors.SQLSTATES | {
            "22023": ducto_pg.InvalidArgumentError
        }

    def test_it_has_every_code_of_our_own(self) -> None:
        folders = (ROOT / "sql", ROOT / "migrations")
        texts = [path.read_text("utf-8") for folder in folders for path in folder.glob("*.sql")]
        codes = {code for text in texts for code in re.findall(r"'(DU\d\d\d)'", text)}
        assert {code for code, _ in ROWS if code.startswith("DU")} == codes

    @pytest.mark.parametrize(("code", "name"), ROWS)
    def test_a_call_raises_what_it_says(self, conn: Connection, code: str, name: str) -> None:
        code = {"08": "08006", "22": "22P02", "53": "53200"}.get(code, code)
        expected = getattr(psycopg.errors if name.startswith("psycopg.") else errors, name.split(".")[-1])
        with pytest.raises(expected) as caught:
            CreditManager(conn).run(raising(code))
        if isinstance(caught.value, ducto_pg.DuctoError):
            assert type(caught.value).__name__ == name
            assert (caught.value.code, caught.value.message, caught.value.detail) == (code, "so it is", "more")
            assert isinstance(
                caught.value.__cause__, psycopg.errors.lookup(code) if code[:2] != "DU" else psycopg.Error
            )

    @pytest.mark.parametrize(("code", "name"), OURS)
    def test_it_says_what_may_be_tried(self, code: str, name: str) -> None:
        [line] = [line for line in PAGE.splitlines() if re.match(rf"\| .*`{code}…?`.* \| `{name}` \|", line)]
        told = re.findall(r"\*\*(again|elsewhere)\*\*", line)
        assert told == ([retry] if (retry := getattr(errors, name).retry) else [])


class TestAgain:
    def test_a_lock_a_statement_and_a_deadlock(self, credits: CreditManager, connect: Connect) -> None:
        holder, waiting = connect(autocommit=False), connect()
        CreditManager(holder).deduct_credits("alice", 1).or_raise()
        for setting, code, theirs in (
            ("lock_timeout", "55P03", psycopg.errors.LockNotAvailable),
            ("statement_timeout", "57014", psycopg.errors.QueryCanceled),
        ):
            waiting.execute(f"set {setting} = '1ms'".encode())
            with pytest.raises(ConcurrencyError) as caught:
                CreditManager(waiting).deduct_credits("alice", 1)
            assert (caught.value.code, caught.value.retry) == (code, "again")
            assert isinstance(caught.value, theirs)
            waiting.execute(f"reset {setting}".encode())
        holder.rollback()
        assert CreditManager(waiting).deduct_credits("alice", 1).or_raise().balance_after == 99


class TestElsewhere:
    def test_a_manager_on_a_dsn_leaves_a_read_only_server(
        self, db: str, credits: CreditManager, conn: Connection
    ) -> None:
        with CreditManager(db) as manager:
            read_only(conn, True)
            assert manager.get_balance("alice").balance == 100
            with pytest.raises(UnavailableError) as caught:
                manager.deduct_credits("alice", 1)
            assert (caught.value.code, caught.value.retry) == ("25006", "elsewhere")
            assert isinstance(caught.value, psycopg.errors.ReadOnlySqlTransaction)
            assert not isinstance(caught.value, OutcomeUnknownError)
            read_only(conn, False)
            assert manager.deduct_credits("alice", 1).or_raise().balance_after == 99

    def test_so_does_an_asynchronous_one(self, db: str, credits: CreditManager, conn: Connection) -> None:
        async def main() -> int:
            async with AsyncCreditManager(db) as manager:
                read_only(conn, True)
                with pytest.raises(UnavailableError, match="read-only"):
                    await manager.deduct_credits("alice", 1)
                read_only(conn, False)
                return (await manager.deduct_credits("alice", 1)).or_raise().balance_after

        assert asyncio.run(main()) == 99

    def test_it_leaves_a_session_that_was_ended(self, db: str, credits: CreditManager, conn: Connection) -> None:
        query = "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        with CreditManager(db) as manager:
            manager.get_balance("alice")
            [(pid,)] = conn.execute(query).fetchall()
            conn.execute("select pg_terminate_backend(%s)", [pid])
            wait_until_gone(conn, pid)
            with pytest.raises(UnavailableError) as caught:
                manager.deduct_credits("alice", 1)
            assert isinstance(caught.value, psycopg.OperationalError)
            assert manager.deduct_credits("alice", 1).or_raise().balance_after == 99

    def test_a_forked_process_opens_its_own(self, db: str) -> None:
        """On the parent's, each would read the other's answers."""
        with CreditManager(db) as manager:
            manager.get_balance("alice")
            kept = manager._kept
            assert kept
            child = os.fork()
            if child == 0:  # an exception must not go on into pytest
                fine = False
                try:
                    with manager:
                        fine = manager.get_balance("bob").user_id == "bob" and manager._kept is not kept
                finally:
                    os._exit(0 if fine else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            child = os.fork()
            if child == 0:
                try:
                    manager.close()
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            assert manager.get_balance("alice").user_id == "alice"
            assert manager._kept is kept

    def test_it_stays_where_the_call_was_at_fault(self, db: str, credits: CreditManager) -> None:
        with CreditManager(db) as manager:
            manager.get_balance("alice")
            kept = manager._kept
            for sqlstate in ("DU004", "40001", "22023", "42501"):
                with pytest.raises((ducto_pg.DuctoError, psycopg.errors.InsufficientPrivilege)):
                    manager.run(raising(sqlstate))
            manager.get_balance("alice")
            assert manager._kept is kept is not None
            assert not kept.closed

    def test_a_transaction_that_was_idle_too_long(
        self, credits: CreditManager, connect: Connect, conn: Connection
    ) -> None:
        mine = connect(autocommit=False)
        mine.execute("set idle_in_transaction_session_timeout = '1ms'")
        wait_until_gone(conn, mine.info.backend_pid)
        with pytest.raises(UnavailableError) as caught:
            CreditManager(mine).deduct_credits("alice", 1)
        # Where the server's last words are lost with the connection, only its end is told.
        assert (caught.value.code, caught.value.retry) in [("25P03", "elsewhere"), ("08006", "elsewhere")]
        assert credits.get_balance("alice").balance == 100

    def test_a_connection_of_the_callers_is_left_alone(self, credits: CreditManager, connect: Connect) -> None:
        mine = connect(autocommit=False)
        mine.read_only = True
        with pytest.raises(UnavailableError):
            CreditManager(mine).deduct_credits("alice", 1)
        assert mine.info.transaction_status == TransactionStatus.INERROR
        mine.rollback()
        mine.read_only = False
        assert CreditManager(mine).deduct_credits("alice", 1).or_raise().balance_after == 99

    def test_no_server_and_no_connection_left(self, db: str) -> None:
        nowhere = make_conninfo(db, dbname="ducto_no_such_database")
        with CreditManager(nowhere) as manager, pytest.raises(UnavailableError, match="ducto_no_such_database") as lost:
            manager.get_balance("alice")
        with (
            ConnectionPool[Connection](db, min_size=1, max_size=1, timeout=0.01, open=True) as pool,
            pool.connection(timeout=30),
            pytest.raises(UnavailableError) as busy,
        ):
            CreditManager(pool).get_balance("alice")
        for caught in (lost, busy):
            assert isinstance(caught.value, psycopg.OperationalError)
            assert not isinstance(caught.value, OutcomeUnknownError)


class TestUnknown:
    def test_a_connection_lost_during_the_call(self, db: str, credits: CreditManager) -> None:
        with CreditManager(db) as manager:
            manager.get_balance("alice")
            assert manager._kept
            with socket.socket(fileno=socket.dup(manager._kept.fileno())) as wire:
                wire.shutdown(socket.SHUT_RDWR)
            with pytest.raises(OutcomeUnknownError, match="repeat the same call under the same idempotency key"):
                manager.deduct_credits("alice", 1, idempotency_key="k")
            assert manager.deduct_credits("alice", 1, idempotency_key="k").or_raise().balance_after == 99

    def test_one_lost_at_the_commit_of_a_pool(self, db: str, credits: CreditManager) -> None:
        class Losing(psycopg.Connection[Any]):
            def commit(self) -> None:
                with socket.socket(fileno=socket.dup(self.fileno())) as wire:
                    wire.shutdown(socket.SHUT_RDWR)
                super().commit()

        with (
            ConnectionPool(db, connection_class=Losing, min_size=1, max_size=1, open=True) as pool,
            pytest.raises(OutcomeUnknownError),
        ):
            CreditManager(pool).deduct_credits("alice", 1)

    def test_one_that_was_closed_before_is_known(self, connect: Connect) -> None:
        mine = connect()
        mine.close()
        with pytest.raises(UnavailableError) as caught:
            CreditManager(mine).get_balance("alice")
        assert not isinstance(caught.value, OutcomeUnknownError)


def test_errors_can_be_sent_to_another_process(conn: Connection) -> None:
    with pytest.raises(ConcurrencyError) as caught:
        CreditManager(conn).run(raising("40P01"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ConcurrencyError
    assert (str(copy), copy.code, copy.detail, copy.retry) == (str(caught.value), "40P01", "more", "again")


def test_a_call_in_a_pipeline_that_was_aborted_was_not_run(conn: Connection) -> None:
    manager = CreditManager(conn)
    with conn.pipeline():
        with pytest.raises(ducto_pg.InvalidArgumentError):
            manager.deduct_credits("alice", -1)
        with pytest.raises(psycopg.errors.PipelineAborted):
            manager.get_balance("alice")

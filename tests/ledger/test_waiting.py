"""Who waits for whom, and what is left when a session or the server goes away."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
from conftest import Connect, Connection
from ledger_helpers import contents
from sessions import blocked

import ducto_pg
from ducto_pg import CreditManager, servers
from ducto_pg.embedded import Server, ServerError
from ducto_pg.errors import ConcurrencyError

Scene = dict[str, str]

CONFIG: dict[str, Any] = {"models": {"m": "input_tokens * 0.25"}, "fixed": {"job": 30}, "min_balance": 0}


@pytest.fixture
def owner(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    return manager


def open_account(owner: CreditManager) -> Scene:
    """An account with 100 credits, of which 10 are held, and a charge of 20."""
    owner.add_credits("u", 120).or_raise()
    charge = owner.deduct_credits("u", 20).or_raise()
    return {"charge": charge.transaction_id, "hold": owner.reserve_credits("u", 10).or_raise().reservation_id}


WAITING: dict[str, Callable[[CreditManager, Scene], Any]] = {
    "charge": lambda m, at: m.deduct_credits("u", 60),
    "hold": lambda m, at: m.reserve_credits("u", 60),
    "extend": lambda m, at: m.extend_reservation(at["hold"], 60),
    "release": lambda m, at: m.release_reservation(at["hold"]),
    "settle": lambda m, at: m.deduct_credits("u", 60, at["hold"]),
    "refund": lambda m, at: m.refund_credits(at["charge"]),
    "add": lambda m, at: m.add_credits("u", 60),
    "remove": lambda m, at: m.remove_credits("u", 60),
    "limit": lambda m, at: m.set_credit_limit("u", 60),
}


class TestWaiting:
    @pytest.fixture
    def at(self, owner: CreditManager) -> Scene:
        return open_account(owner)

    @pytest.fixture
    def first(self, connect: Connect) -> Connection:
        return connect(autocommit=False)

    def test_calls_on_one_account_take_turns(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection, at: Scene
    ) -> None:
        for name, call in WAITING.items():
            if name in ("release", "settle"):
                at["hold"] = owner.reserve_credits("u", 0).or_raise().reservation_id
            CreditManager(first).deduct_credits("u", 0).or_raise()
            second = connect()
            with blocked(conn, second, first, call, at) as waiting:
                revision = CreditManager(first).get_balance("u").revision
                first.commit()
                answer = waiting.result(30)
            assert answer.revision >= revision, name
        assert owner.verify_ledger() == []

    @pytest.mark.parametrize("commits", [True, False])
    @pytest.mark.parametrize("name", ["charge", "hold", "extend"])
    def test_the_one_who_waited_decides_on_what_is_there_then(
        self,
        owner: CreditManager,
        connect: Connect,
        conn: Connection,
        first: Connection,
        at: Scene,
        name: str,
        commits: bool,
    ) -> None:
        CreditManager(first).deduct_credits("u", 50).or_raise()
        second = connect()
        with blocked(conn, second, first, WAITING[name], at) as waiting:
            if commits:
                first.commit()
            else:
                first.rollback()
            assert waiting.result(30).error == ("insufficient_credits" if commits else None)
        assert owner.verify_ledger() == []

    def test_nobody_else_waits(self, owner: CreditManager, connect: Connect, first: Connection, at: Scene) -> None:
        """Not other accounts, not readers, not publishing, and nobody for publishing."""
        owner.add_credits("other", 100).or_raise()
        CreditManager(first).deduct_credits("u", 50).or_raise()
        impatient = connect()
        impatient.execute("set lock_timeout = '1ms'")
        manager = CreditManager(impatient)
        with pytest.raises(psycopg.errors.LockNotAvailable):
            manager.deduct_credits("u", 1)
        manager.deduct_credits("other", 1).or_raise()
        manager.deduct_credits("other", 1, manager.reserve_credits("other", 1).reservation_id).or_raise()
        manager.add_credits("new", 1).or_raise()
        assert manager.get_balance("u").balance == 100
        assert len(manager.list_transactions("u")) == 2
        assert manager.verify_ledger() == []
        assert manager.publish_pricing({**CONFIG, "fixed": {"job": 1}}).version == 2
        with impatient.transaction():
            manager.publish_pricing({**CONFIG, "fixed": {"job": 2}})
            CreditManager(first).deduct("u", {"model": "m", "input_tokens": 4}).or_raise()
            priced = owner.deduct_fixed("other", "job").or_raise()
            assert owner.get_transaction(priced.transaction_id).pricing_version == 2
        first.commit()
        assert owner.verify_ledger() == []

    def test_a_charge_that_waited_while_prices_changed(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection, at: Scene
    ) -> None:
        CreditManager(first).deduct_credits("u", 1).or_raise()
        second = connect()
        with blocked(conn, second, first, lambda m: m.deduct("u", {"model": "m", "input_tokens": 4})) as waiting:
            owner.publish_pricing({**CONFIG, "models": {"m": "input_tokens * 2"}})
            first.commit()
            answer = waiting.result(30).or_raise()
        row = owner.get_transaction(answer.transaction_id)
        assert (row.pricing_version, str(row.cost)) in ((1, "1.00"), (2, "8"))
        assert owner.verify_ledger() == []

    def test_two_first_charges(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection
    ) -> None:
        owner.publish_pricing({**CONFIG, "signup_bonus": 50})
        CreditManager(first).deduct_credits("new", 30).or_raise()
        for commits, expected in ((False, None), (True, "insufficient_credits")):
            second = connect(autocommit=False)
            with blocked(conn, second, first, lambda m: m.deduct_credits("new", 30)) as waiting:
                if commits:
                    first.commit()
                else:
                    first.rollback()
                assert waiting.result(30).error == expected
            second.rollback()
            if not commits:
                CreditManager(first).deduct_credits("new", 30).or_raise()
        assert [row.amount for row in owner.list_transactions("new")] == [-30, 50]
        assert owner.verify_ledger() == []

    def test_a_first_charge_that_finds_the_account_opened_on_other_terms(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection
    ) -> None:
        CreditManager(first).add_credits("new", 100).or_raise()
        plan = {"id": "free", "name": "Free", "free_allowance": 40}
        owner.publish_pricing({**CONFIG, "plans": {"free": plan}, "default_plan": "free"})
        second = connect()
        with blocked(conn, second, first, lambda m: m.deduct_credits("new", 30)) as waiting:
            first.commit()
            answer = waiting.result(30).or_raise()
        assert (answer.amount, answer.allowance_used, answer.balance_after) == (-30, 0, 70)
        assert owner.verify_ledger() == []

    def test_a_deadlock_of_the_callers_making_ends_in_an_error_for_one(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection
    ) -> None:
        for user in ("a", "b"):
            owner.add_credits(user, 100).or_raise()
        second = connect(autocommit=False)
        one, two = CreditManager(first), CreditManager(second)
        one.deduct_credits("a", 1).or_raise()
        two.deduct_credits("b", 1).or_raise()
        with blocked(conn, first, second, lambda m: m.deduct_credits("b", 1)) as waiting:
            failures = 0
            try:
                two.deduct_credits("a", 1)
                second.commit()
            except ConcurrencyError:
                failures += 1
                second.rollback()
            try:
                waiting.result(30)
                first.commit()
            except ConcurrencyError:
                failures += 1
                first.rollback()
        assert failures == 1
        assert [owner.get_balance(user).balance for user in ("a", "b")] == [99, 99]
        assert owner.verify_ledger() == []


class TestGone:
    def test_a_session_that_is_ended_in_its_transaction_leaves_the_ledger_as_before(
        self, owner: CreditManager, connect: Connect, conn: Connection
    ) -> None:
        at = open_account(owner)
        before = contents(conn)
        publish: Callable[[CreditManager, Scene], Any] = lambda m, at: m.publish_pricing({**CONFIG, "fixed": {}})  # noqa: E731
        for name, call in {**WAITING, "publish": publish}.items():
            gone = connect(autocommit=False)
            manager = CreditManager(gone)
            call(manager, at)
            manager.deduct_credits("u", 1)
            conn.execute("select pg_terminate_backend(%s, 30000)", [gone.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                gone.commit()
            assert contents(conn) == before, name

    def test_a_session_that_is_ended_while_it_waits(
        self, owner: CreditManager, connect: Connect, conn: Connection
    ) -> None:
        owner.add_credits("u", 120).or_raise()
        before = contents(conn)
        first, second, third = connect(autocommit=False), connect(), connect()
        CreditManager(first).deduct_credits("u", 100).or_raise()
        with blocked(conn, second, first, lambda m: m.deduct_credits("u", 30)) as waiting:
            conn.execute("select pg_terminate_backend(%s, 30000)", [second.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                waiting.result(30)
        with blocked(conn, third, first, lambda m: m.deduct_credits("u", 30)) as waiting:
            assert contents(conn) == before
            conn.execute("select pg_terminate_backend(%s, 30000)", [first.info.backend_pid])
            assert waiting.result(30).or_raise().balance_after == 90
        with pytest.raises(psycopg.OperationalError):
            first.commit()
        assert owner.verify_ledger() == []

    def test_a_statement_that_runs_out_of_time(self, owner: CreditManager, connect: Connect, conn: Connection) -> None:
        owner.add_credits("u", 120).or_raise()
        first, second = connect(autocommit=False), connect(autocommit=False)
        CreditManager(first).deduct_credits("u", 100).or_raise()
        second.execute("set statement_timeout = 50")
        with pytest.raises(psycopg.errors.QueryCanceled), second.transaction():
            CreditManager(second).deduct_credits("u", 30)
        first.rollback()
        assert CreditManager(second).deduct_credits("u", 30).or_raise().balance_after == 90
        second.commit()
        assert owner.verify_ledger() == []

    def test_a_server_that_crashes(self, server: Server) -> None:
        """What was acknowledged is there, and a retry under the same key settles the rest."""
        if server.bindir is None or server.pid is None:
            pytest.skip("this server is not ours to crash")
        try:
            own = servers.open_server({"synchronous_commit": "on"})
        except ServerError as error:
            pytest.skip(str(error))
        with own, ExitStack() as stack:
            with psycopg.connect(own.dsn(), autocommit=True) as conn:
                ducto_pg.setup(conn).or_raise()
                CreditManager(conn).publish_pricing(CONFIG)
                CreditManager(conn).add_credits("u", 10_000).or_raise()
            answers: dict[str, str] = {}
            crashed = threading.Event()
            crash_at = threading.Barrier(5)

            def connected() -> Connection:
                while True:
                    time.sleep(0.05)
                    with suppress(psycopg.OperationalError):
                        return stack.enter_context(psycopg.connect(own.dsn(), autocommit=True))

            def charge_in_turn(session: int) -> None:
                conn = connected()
                for step in range(40):
                    if step == 15:
                        crash_at.wait(30)
                    key = f"{session}-{step}"
                    while key not in answers:
                        try:
                            answers[key] = (
                                CreditManager(conn).deduct_credits("u", 1, idempotency_key=key).transaction_id
                            )
                        except psycopg.OperationalError:
                            crashed.set()
                            conn = connected()

            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(charge_in_turn, session) for session in range(4)]
                with psycopg.connect(own.dsn()) as victim:
                    crash_at.wait(30)
                    os.kill(victim.info.backend_pid, signal.SIGKILL)
                    for one in running:
                        one.result(60)
                    with suppress(psycopg.OperationalError):
                        victim.execute("select")
            assert crashed.is_set()
            manager = CreditManager(connected())
            rows = manager.list_transactions("u", 1000, type="usage")
            assert {row.idempotency_key: row.transaction_id for row in rows} == answers
            assert len(rows) == len(answers) == 160
            assert manager.get_balance("u").balance == 9_840
            assert manager.verify_ledger() == []

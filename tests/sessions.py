"""Sessions that meet: they call at the same moment, or one waits for another, as the server's own list says.

Each session is a connection of its own.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import pytest
from conftest import Clock, Connect, Connection
from ledger_helpers import Call, Ledger, Row

from ducto_pg import CreditManager

Session = TypeVar("Session")
Answer = TypeVar("Answer")


def together(calls: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """What calls answer that begin at the same moment, each in a thread of its own."""
    start = threading.Barrier(len(calls))

    def begin(call: Callable[[], Answer]) -> Answer:
        start.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [running.result() for running in [pool.submit(begin, call) for call in calls]]


def race(sessions: Sequence[Session], call: Callable[[Session, int], Answer]) -> list[Answer]:
    """What each session is answered when all make one call at the same moment; each gets its number."""
    return together([partial(call, session, number) for number, session in enumerate(sessions)])


def outcomes(answers: Iterable[Any]) -> Counter[str]:
    """How often there was each refusal, a replay ("replayed") or an effect ("ok")."""
    told = [answer if isinstance(answer, dict) else vars(answer) for answer in answers]
    return Counter(row["error"] or ("replayed" if row.get("idempotent") else "ok") for row in told)


def waits(monitor: Connection, session: Connection, by: Connection | None = None) -> bool:
    """Whether a session waits for a lock: of that one, if any is named."""
    row = monitor.execute(
        "select pg_blocking_pids(a.pid) from pg_stat_activity as a where a.pid = %s and a.wait_event_type = 'Lock'",
        [session.info.backend_pid],
    ).fetchone()
    return row is not None and (by.info.backend_pid in row[0] if by else bool(row[0]))


@contextmanager
def blocked(
    monitor: Connection, session: Connection, by: Connection, call: Callable[..., Answer], *arguments: Any
) -> Iterator[Future[Answer]]:
    """A call in a thread of its own, which waits for the lock of another session; the block is to end that wait.

    It is called with a manager of that session, and the arguments.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, CreditManager(session), *arguments)
        try:
            for _ in range(3000):
                if waits(monitor, session, by):
                    break
                monitor.execute("select pg_sleep(0.01)")
            else:
                raise AssertionError(f"it never waited: {waiting}")
            yield waiting
        except BaseException:
            monitor.execute("select pg_cancel_backend(%s)", [session.info.backend_pid])
            raise


class Cast:
    """Sessions that call in threads of their own, some in transactions that stay open, and one that looks on.

    A deadlock is found at once (deadlock_timeout), so that none hides behind a holder that ends in time.
    """

    def __init__(self, connect: Connect, count: int) -> None:
        self.monitor = connect()
        self.sessions = [connect() for _ in range(count)]
        for session in self.sessions:
            session.execute("set deadlock_timeout = '20ms'")
            session.execute("set lock_timeout = '60s'")
        self.pool = ThreadPoolExecutor(count)
        self.running: list[tuple[int, Future[Any]]] = []

    def open(self, number: int, call: Callable[[CreditManager], Any]) -> Any:
        """Call in a transaction that stays open."""
        self.sessions[number].execute("begin")
        return call(CreditManager(self.sessions[number]))

    def start(
        self,
        number: int,
        call: Callable[[CreditManager], Any],
        end: str = "",
        until: threading.Event | None = None,
    ) -> None:
        """Call in a thread, in a transaction that ends so ('': its own) once `until` is set; return when the call is
        answered or waits for a lock."""
        session, answered = self.sessions[number], threading.Event()

        def run() -> Any:
            try:
                if end:
                    session.execute("begin")
                answer = call(CreditManager(session))
                answered.set()
                assert until is None or until.wait(60)
                return answer
            finally:
                answered.set()
                if end:
                    session.execute("rollback" if session.info.transaction_status.name == "INERROR" else end)

        self.running.append((number, self.pool.submit(run)))
        for _ in range(6000):
            if answered.is_set() or waits(self.monitor, session):
                return
        raise AssertionError("the call neither was answered nor waits")

    def waiters(self) -> int:
        return sum(waits(self.monitor, self.sessions[number]) for number, _ in self.running)

    def answers(self) -> list[Any]:
        """What all were answered; whatever was raised is raised here."""
        done, self.running = self.running, []
        return [future.result(90) for _, future in done]

    def close(self) -> None:
        self.pool.shutdown()


class Arena:
    """A database with the usual prices, no least balance, at the start of 2026, and as many sessions as are wanted."""

    START = datetime(2026, 1, 1, tzinfo=UTC)

    def __init__(self, connect: Connect, clock: Clock) -> None:
        self._connect = connect
        self.clock = clock
        self.ledger = Ledger(connect(), clock)
        self.ledger.publish(min_balance=0)
        clock.set(self.START)

    def sessions(self, count: int, **options: Any) -> list[Ledger]:
        return [Ledger(self._connect(**options), self.clock) for _ in range(count)]

    def given(self, *steps: Callable[[Ledger], None]) -> "Arena":
        for step in steps:
            step(self.ledger)
        return self

    def meet(self, count: int, call: Callable[[int], Call]) -> list[Row]:
        """What so many sessions are answered that call at the same moment; each gets its number."""
        return race(self.sessions(count), lambda session, number: session.one(call(number)))

    def race(self, count: int, call: Call) -> Counter[str]:
        """How often each outcome comes when so many sessions make one call."""
        return outcomes(self.meet(count, lambda _: call))

    def sound(self) -> None:
        assert self.ledger.violations() == []


@pytest.fixture
def arena(connect: Connect, clock: Clock) -> Arena:
    return Arena(connect, clock)

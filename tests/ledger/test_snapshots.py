"""The writing calls that `test_isolation.py` does not pair: at REPEATABLE READ and SERIALIZABLE right, or 40001.

Each is asked in a transaction whose snapshot is older than what another session has done since. With those of the
other file they are all: a new writing call must be added to one of the two.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
import pytest
from conftest import Clock
from test_isolation import CONFIG, STEPS, STRICT, TEAM_STEPS, USAGE, scene, take_snapshot, team_scene

from ducto_pg import CreditManager
from ducto_pg.client.calls import Statement
from ducto_pg.errors import ConcurrencyError
from ducto_pg.models import CreateTeamResult, ReserveResult

Connection = psycopg.Connection[Any]
T = TypeVar("T")


@pytest.fixture
def other(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    return manager


@pytest.fixture(params=STRICT, ids=lambda level: level.name)
def late_conn(request: pytest.FixtureRequest, connect: Callable[..., Connection]) -> Connection:
    session = connect(autocommit=False)
    session.isolation_level = request.param
    return session


def conflict(late: Connection, change: Callable[[], T], call: Callable[[CreditManager], object]) -> T:
    """What a change answers that comes after a snapshot; a call on that snapshot gets 40001."""
    take_snapshot(late)
    answer = change()
    with pytest.raises(ConcurrencyError):
        call(CreditManager(late))
    late.rollback()
    return answer


def test_a_team_is_created_once(other: CreditManager, late_conn: Connection) -> None:
    for told in ({"team_id": "new"}, {"idempotency_key": "key"}):

        def create(manager: CreditManager, told: dict[str, str] = told) -> CreateTeamResult:
            return manager.create_team("New", 7, **told)

        created = conflict(late_conn, lambda: create(other), create)
        again = create(CreditManager(late_conn))
        late_conn.commit()
        assert again.error == "team_exists" or again.idempotent
        assert other.get_balance(created.team_id).balance == 7
    assert other.verify_ledger() == []


def test_a_pool_is_held_once(other: CreditManager, late_conn: Connection) -> None:
    at = team_scene(other, "alice")

    def reserve(manager: CreditManager) -> ReserveResult:
        return manager.reserve_team(at["team"], "alice", USAGE)

    assert conflict(late_conn, lambda: reserve(other), reserve).error is None
    assert other.get_balance(at["team"]).reserved == 60


def test_what_is_due_expires_once(other: CreditManager, late_conn: Connection, clock: Clock) -> None:
    other.add_credits("alice", 50).or_raise()
    other.add_credits("alice", 5, expires_at=clock.now() + timedelta(hours=1)).or_raise()
    clock.advance(timedelta(hours=2))
    swept = conflict(late_conn, other.sweep_expired_credits, lambda late: late.sweep_expired_credits())
    assert swept.expired_amount == 5
    assert other.get_balance("alice").balance == 50
    assert other.verify_ledger() == []


def test_an_event_has_one_worker(other: CreditManager, late_conn: Connection) -> None:
    other.add_credits("alice", 50).or_raise()
    first = conflict(late_conn, other.fetch_events, lambda late: late.fetch_events())
    assert [event.type for event in first] == ["account_opened"]
    ids = [event.event_id for event in first]
    assert conflict(late_conn, lambda: other.ack_events(ids), lambda late: late.ack_events(ids)) == 1
    assert other.fetch_events() == []


def test_usage_is_counted_once(other: CreditManager, late_conn: Connection) -> None:
    """A charge since the snapshot is left for the next time."""
    scene(other, "alice")
    changes: list[tuple[int, Callable[[], object]]] = [
        (20, other.rollup_usage),
        (21, lambda: other.deduct_credits("alice", 1)),
    ]
    for spend, change in changes:
        take_snapshot(late_conn)
        change()
        with suppress(ConcurrencyError):
            CreditManager(late_conn).rollup_usage()
            late_conn.commit()
        late_conn.rollback()
        assert [(row.user_id, row.total_spend) for row in other.spend_by_user()] == [("alice", spend)]
    other.rollup_usage()
    assert [(row.user_id, row.total_spend) for row in other.spend_by_user()] == [("alice", 21)]


def test_what_is_erased_stays_erased(other: CreditManager, late_conn: Connection) -> None:
    """The text of a charge since is not passed over in silence."""
    scene(other, "alice")
    metadata = {"text": "private"}
    conflict(
        late_conn, lambda: other.deduct_credits("alice", 1, metadata=metadata), lambda late: late.erase_user("alice")
    )
    other.erase_user("alice")
    assert not any(row.metadata for row in other.list_transactions("alice"))


HERE = {
    "create_team",
    "sweep_expired_credits",
    "fetch_events",
    "ack_events",
    "rollup_usage",
    "erase_user",
    "reserve_team",
}
# A test of its own in test_isolation.py.
THERE = {"activate_pricing", "unschedule_pricing"}


class Recording(CreditManager):
    """Remembers the names of the calls."""

    def __init__(self, source: Connection) -> None:
        super().__init__(source)
        self.called: set[str] = set()

    def run(self, statement: Statement[T]) -> T:
        self.called |= set(re.findall(r"ducto\.(\w+)\(", statement.sql))
        return super().run(statement)


def test_every_writing_call_is_tried(other: CreditManager, conn: Connection) -> None:
    recording = Recording(conn)
    for number, step in enumerate((*STEPS.values(), *TEAM_STEPS.values())):
        step(recording, scene(other, f"user {number}") | team_scene(other, f"user {number}"))
    names = conn.execute(
        "select p.proname from pg_proc as p where p.pronamespace = 'ducto'::regnamespace and p.provolatile = 'v'"
    ).fetchall()
    assert recording.called | HERE | THERE == {name for (name,) in names}

"""Callers at REPEATABLE READ and SERIALIZABLE, in read-only transactions, and with savepoints of their own.

A caller whose snapshot is older than what another session has done since is right or gets 40001, never wrong.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
import pytest
from conftest import Clock, Connect, Connection
from ledger_helpers import FREE, Ledger, ask, contents, team
from psycopg import IsolationLevel
from sessions import Arena
from steps import CONFIG, READS, STEPS, TEAM_STEPS, USAGE, Scene, Step, connection, scene, team_scene

from ducto_pg import CreditManager
from ducto_pg.client.calls import Calls, Query
from ducto_pg.errors import ConcurrencyError, DuctoError
from ducto_pg.models import CreateTeamResult, ReserveResult

T = TypeVar("T")

DEARER: dict[str, Any] = {**CONFIG, "models": {"gpt-4": "input_tokens * 3"}, "fixed": {"report": 70}}


STRICT = [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE]

LEVELS = [IsolationLevel.READ_COMMITTED, *STRICT]


@pytest.fixture
def other(conn: Connection) -> CreditManager:
    """The session that is first, in autocommit; prices are published."""
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    return manager


@pytest.fixture(params=STRICT, ids=lambda level: level.name)
def late_conn(request: pytest.FixtureRequest, connect: Connect) -> Connection:
    """The session that took its snapshot too early."""
    session = connect(autocommit=False)
    session.isolation_level = request.param
    return session


@pytest.fixture
def late(late_conn: Connection) -> CreditManager:
    return CreditManager(late_conn)


def take_snapshot(conn: Connection) -> None:
    conn.rollback()
    conn.execute("select count(*) from ducto_private.accounts")


class TestOlderSnapshots:
    @pytest.mark.parametrize(("steps", "begin"), [(STEPS, scene), (TEAM_STEPS, team_scene)], ids=["user", "team"])
    def test_whatever_changed_the_account_stops_whatever_would(
        self,
        other: CreditManager,
        late: CreditManager,
        late_conn: Connection,
        steps: dict[str, Step],
        begin: Callable[[CreditManager, str], Scene],
    ) -> None:
        wrong = []
        for first, change in steps.items():
            for then, step in steps.items():
                user = f"{first}, {then}"
                at = {"user": user, **begin(other, user)}
                take_snapshot(late_conn)
                change(other, at).or_raise()
                try:
                    answer = step(late, at)
                    late_conn.commit()
                except ConcurrencyError:
                    pass
                else:
                    wrong.append((first, then, answer))
        late_conn.rollback()
        assert wrong == []
        assert other.verify_ledger() == []

    @pytest.mark.parametrize(
        ("first", "then", "answer"),
        [
            ("hold", "hold", "insufficient_credits"),
            ("charge", "hold", "insufficient_credits"),
            ("hold", "charge", "insufficient_credits"),
            ("hold", "extend", "insufficient_credits"),
            ("settle", "settle a part", "reservation_not_active"),
            ("refund", "refund", "already_refunded"),
            ("release", "settle", "reservation_not_active"),
            ("hold with a key", "hold with a key", None),
            ("charge with a key", "charge with a key", None),
            ("charge with a key", "add with a key", "idempotency_conflict"),
        ],
    )
    def test_tried_again_it_is_decided_on_what_is_there_now(
        self,
        other: CreditManager,
        late: CreditManager,
        late_conn: Connection,
        first: str,
        then: str,
        answer: str | None,
    ) -> None:
        at = scene(other, "alice")
        take_snapshot(late_conn)
        STEPS[first](other, at).or_raise()
        with pytest.raises(ConcurrencyError):
            STEPS[then](late, at)
        late_conn.rollback()
        again = STEPS[then](late, at)
        late_conn.commit()
        assert again.error == answer
        assert again.idempotent == (not answer)
        assert other.verify_ledger() == []

    def test_prices_published_in_between(
        self, other: CreditManager, late: CreditManager, late_conn: Connection
    ) -> None:
        """What an older snapshot prices, it prices by the version that it sees."""
        for number, (then, step) in enumerate(STEPS.items()):
            at = scene(other, then)
            take_snapshot(late_conn)
            visible = len(late.get_pricing_history())
            other.publish_pricing({**DEARER, "metrics": {f"m{number}": 0}})
            step(late, at)
            late_conn.commit()
            newest = other.list_transactions(at["user"], 1)[0]
            assert (newest.pricing_version or 0) <= visible, then
        take_snapshot(late_conn)
        before = late.calculate_cost(USAGE)
        other.publish_pricing(CONFIG, "again")
        assert late.calculate_cost(USAGE) == before
        late_conn.commit()
        check_costs(other)

    def test_an_older_version_activated_in_between(
        self, other: CreditManager, late: CreditManager, late_conn: Connection
    ) -> None:
        other.publish_pricing(DEARER)
        other.add_credits("alice", 1000)
        take_snapshot(late_conn)
        other.activate_pricing(1)
        try:
            late.deduct("alice", USAGE).or_raise()
            late.reserve("alice", USAGE).or_raise()
            late_conn.commit()
        except ConcurrencyError:
            late_conn.rollback()
        check_costs(other)

    def test_an_account_opened_in_between(
        self, other: CreditManager, late: CreditManager, late_conn: Connection
    ) -> None:
        other.publish_pricing({**CONFIG, "signup_bonus": 50})
        opening = ["hold", "hold an estimate", "charge", "charge usage", "charge a job", "add", "limit"]
        for first in opening:
            for then in opening:
                user = f"{first}, {then}"
                take_snapshot(late_conn)
                STEPS[first](other, {"user": user}).or_raise()
                with pytest.raises(ConcurrencyError):
                    STEPS[then](late, {"user": user})
                late_conn.rollback()
                STEPS[then](late, {"user": f"{user}, alone"}).or_raise()
                late_conn.commit()
                bonuses = [row.amount for row in rows(other, user) if row.type == "signup_bonus"]
                assert bonuses == [50], user
        assert other.verify_ledger() == []

    def test_a_bonus_published_in_between(
        self, other: CreditManager, late: CreditManager, late_conn: Connection
    ) -> None:
        for bonus, step in enumerate(STEPS.values(), 50):
            other.publish_pricing({**CONFIG, "signup_bonus": bonus})
            take_snapshot(late_conn)
            other.publish_pricing({**CONFIG, "signup_bonus": bonus + 1000})
            try:
                step(late, {"user": f"newcomer {bonus}", "hold": "", "charge": "", "grant": ""})
                late_conn.commit()
            except ConcurrencyError:
                late_conn.rollback()
        for row in (row for bonus in range(50, 50 + len(STEPS)) for row in rows(other, f"newcomer {bonus}")):
            if row.type == "signup_bonus":
                assert row.pricing_version
                config = other.get_pricing_config(row.pricing_version).config
                assert config
                assert config.signup_bonus == row.amount
        assert other.verify_ledger() == []

    def test_it_reads_what_its_snapshot_shows(
        self, other: CreditManager, late: CreditManager, late_conn: Connection
    ) -> None:
        at = scene(other, "alice") | team_scene(other, "alice")
        take_snapshot(late_conn)
        before = {name: read(late, at) for name, read in READS.items()}
        for change in (*STEPS.values(), *TEAM_STEPS.values()):
            change(other, at)
        assert {name: read(late, at) for name, read in READS.items()} == before
        balance = before["get_balance"]
        assert (balance.balance, balance.reserved) == (80, 30)

    @pytest.mark.parametrize("then", ["publish", "activate"])
    @pytest.mark.parametrize("first", ["publish", "activate"])
    def test_publishing_and_activating(
        self, other: CreditManager, late: CreditManager, late_conn: Connection, first: str, then: str
    ) -> None:
        def run(manager: CreditManager, what: str, config: dict[str, Any], version: int) -> None:
            if what == "publish":
                manager.publish_pricing(config)
            else:
                manager.activate_pricing(version)

        other.publish_pricing({**CONFIG, "fixed": {"a": 2}})
        other.publish_pricing({**CONFIG, "fixed": {"a": 3}})
        take_snapshot(late_conn)
        run(other, first, {**CONFIG, "fixed": {"a": 4}}, 1)
        try:
            run(late, then, {**CONFIG, "fixed": {"a": 5}}, 2)
            late_conn.commit()
        except ConcurrencyError:
            late_conn.rollback()
        run(late, then, {**CONFIG, "fixed": {"a": 6}}, 2)
        late_conn.commit()
        history = other.get_pricing_history()
        assert sorted(item.version for item in history) == list(range(1, len(history) + 1))
        steps = (
            connection(other)
            .execute("select a.from_version, a.version from ducto_private.activations as a order by a.activation_id")
            .fetchall()
        )
        assert [before for before, _ in steps] == [None, *[after for _, after in steps[:-1]]]
        active = other.get_active_pricing()
        assert active
        assert active.version == steps[-1][1] == other.calculate_cost(USAGE).pricing_version

    def test_sessions_that_share_no_account_do_not_disturb_each_other(
        self, other: CreditManager, late: CreditManager, late_conn: Connection
    ) -> None:
        mine, theirs = scene(other, "alice"), scene(other, "bob")
        take_snapshot(late_conn)
        for change in STEPS.values():
            change(other, theirs)
        late.deduct("alice", USAGE).or_raise()
        late.deduct_credits("alice", 30, mine["hold"]).or_raise()
        late_conn.commit()
        assert other.get_balance("alice").balance == 20
        assert other.verify_ledger() == []


def rows(manager: CreditManager, *users: str) -> list[Any]:
    return [row for user in users for row in manager.list_transactions(user)]


def check_costs(manager: CreditManager) -> None:
    """Each charge's recorded version prices its usage to its recorded cost; the ledger is sound."""
    found = (
        connection(manager)
        .execute(
            """
            select t.transaction_id, t.cost, (ducto.calculate_cost(t.usage, null, t.pricing_version)).total
            from ducto_private.ledger as t where t.usage is not null
            union all
            select r.hold_id, r.held, ceil((ducto.calculate_cost(r.metrics, null, r.pricing_version)).total)
            from ducto_private.holds as r where r.metrics is not null and r.charged = 0 and r.status = 'active'
            """
        )
        .fetchall()
    )
    assert [row for row in found if row[1] != row[2]] == []
    assert manager.verify_ledger() == []


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


def test_a_cap_a_plan_or_a_member_changed_in_between(arena: Arena, late_conn: Connection) -> None:
    arena.ledger.publish(min_balance=0, plans=FREE)
    arena.given(ask.add_credits("u", 100), ask.set_spend_cap("u", 50), team("crew", "ann"))
    late = Ledger(late_conn, arena.clock)
    for change, call in (
        (ask.deduct_credits("u", 40), ask.deduct_credits("u", 40)),
        (ask.set_spend_cap("u", 40), ask.reserve_credits("u", 1)),
        (ask.remove_spend_cap("u", "daily"), ask.set_spend_cap("u", 5)),
        (ask.set_user_plan("u", "free"), ask.deduct_credits("u", 1)),
        (ask.remove_team_member("crew", "ann"), ask.deduct_team_credits("crew", "ann", 1)),
        (ask.add_team_member("crew", "ann"), ask.reserve_team_credits("crew", "ann", 1)),
    ):
        take_snapshot(late_conn)
        change(arena.ledger)
        with pytest.raises(psycopg.errors.SerializationFailure):
            late.one(call)
        late_conn.rollback()
    arena.sound()


# What has a test of its own, here or in test_activation_races.py.
APART = {
    "activate_pricing",
    "unschedule_pricing",
    "create_team",
    "reserve_team",
    "sweep_expired_credits",
    "fetch_events",
    "ack_events",
    "rollup_usage",
    "erase_user",
}


class Recording(CreditManager):
    """Remembers the names of the calls."""

    def __init__(self, source: Connection) -> None:
        super().__init__(source)
        self.called: set[str] = set()

    def run(self, statement: Query[T]) -> T:
        self.called |= set(re.findall(r"ducto\.(\w+)\(", statement.sql))
        return super().run(statement)


def test_every_writing_call_is_tried(other: CreditManager, conn: Connection) -> None:
    recording = Recording(conn)
    for number, step in enumerate((*STEPS.values(), *TEAM_STEPS.values())):
        step(recording, scene(other, f"user {number}") | team_scene(other, f"user {number}"))
    names = conn.execute(
        "select p.proname from pg_proc as p where p.pronamespace = 'ducto'::regnamespace and p.provolatile = 'v'"
    ).fetchall()
    assert recording.called | APART == {name for (name,) in names}


class TestReadOnly:
    def test_every_reading_call_is_tried(self, conn: Connection) -> None:
        names = conn.execute(
            "select p.proname from pg_proc as p"
            " where p.pronamespace = 'ducto'::regnamespace and p.provolatile <> 'v' order by 1"
        ).fetchall()
        assert [name for (name,) in names] == sorted(READS)
        assert all(hasattr(Calls, name) for name in READS)

    @pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
    @pytest.mark.parametrize("deferrable", [False, True], ids=["", "deferrable"])
    def test_reads_answer_in_a_read_only_transaction(
        self, other: CreditManager, connect: Connect, level: IsolationLevel, deferrable: bool
    ) -> None:
        at = scene(other, "alice") | team_scene(other, "alice")
        session = connect(autocommit=False)
        session.isolation_level, session.read_only, session.deferrable = level, True, deferrable
        for name, read in READS.items():
            assert read(CreditManager(session), at) == read(other, at), name

    def test_writes_are_refused_there(self, other: CreditManager, connect: Connect, conn: Connection) -> None:
        at = scene(other, "alice") | team_scene(other, "alice")
        before = contents(conn)
        session = connect(autocommit=False)
        session.read_only = True
        for step in (*STEPS.values(), *TEAM_STEPS.values()):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                step(CreditManager(session), at)
            session.rollback()
        assert contents(conn) == before


REFUSED: dict[str, Step] = {
    "insufficient_credits": lambda m, at: m.deduct_credits(at["user"], 51),
    "account_not_found": lambda m, at: m.deduct_credits("nobody", 1),
    "reservation_not_found": lambda m, at: m.deduct_credits(at["user"], 1, at["charge"]),
    "reservation_not_active": lambda m, at: m.extend_reservation(at["released"], 1),
    "transaction_not_found": lambda m, at: m.refund_credits(at["charge"], user_id="bob"),
    "not_refundable": lambda m, at: m.refund_credits(at["grant"]),
    "refund_exceeds_original": lambda m, at: m.refund_credits(at["charge"], 21),
    "exceeds_grant": lambda m, at: m.remove_credits(at["user"], 101, transaction_id=at["grant"]),
    "idempotency_conflict": lambda m, at: m.deduct_credits(at["user"], 2, idempotency_key="key"),
    "spend_cap_exceeded": lambda m, at: m.deduct_credits(at["user"], 1, model="capped"),
    "cap_not_found": lambda m, at: m.remove_spend_cap(at["user"], "monthly"),
    "plan_not_found": lambda m, at: m.set_user_plan(at["user"], "gold"),
    "is_a_team": lambda m, at: m.deduct_credits(at["team"], 1),
    "team_exists": lambda m, at: m.create_team("Other", team_id=at["team"]),
    "team_not_found": lambda m, at: m.add_team_member(at["user"], "bob"),
    "not_a_member": lambda m, at: m.deduct_team_credits(at["team"], "bob", 1),
    "member_cap_exceeded": lambda m, at: m.deduct_team_credits(at["team"], at["user"], 71),
    "invalid_argument": lambda m, at: m.deduct_batch([{"user_id": at["user"], "amount": -1}])[0],
    "topup_not_found": lambda m, at: m.fail_topup(at["user"], "another"),
}


MISUSE: dict[str, Step] = {
    "22023": lambda m, at: m.deduct_credits(at["user"], -1),
    "DU002": lambda m, at: m.calculate_cost(USAGE, version=99),
    "DU003": lambda m, at: m.deduct(at["user"], {"model": "unheard-of", "input_tokens": 1}),
    "DU004": lambda m, at: m.deduct_fixed(at["user"], "reprot"),
    "DU005": lambda m, at: m.deduct(at["user"], {**USAGE, "inputTokens": 1}),
    "DU006": lambda m, at: m.deduct(at["user"], {"model": "inverse", "input_tokens": 0}),
}


class TestTheCallersTransaction:
    @pytest.fixture
    def at(self, other: CreditManager) -> Scene:
        at = scene(other, "alice") | team_scene(other, "alice")
        other.set_spend_cap("alice", 0, model="capped").or_raise()
        at["released"] = other.reserve_credits("alice", 1).or_raise().reservation_id
        other.release_reservation(at["released"]).or_raise()
        other.add_credits("alice", 1, idempotency_key="key").or_raise()
        other.remove_credits("alice", 1).or_raise()
        assert other.deduct_credits("alice", 51).error  # Only the first refusal for funds writes anything.
        return at

    @pytest.fixture(params=LEVELS, ids=lambda level: level.name)
    def session(self, request: pytest.FixtureRequest, connect: Connect) -> Connection:
        session = connect(autocommit=False)
        session.isolation_level = request.param
        return session

    def test_it_goes_on_after_every_refusal(
        self, other: CreditManager, at: Scene, session: Connection, conn: Connection
    ) -> None:
        before = contents(conn)
        manager = CreditManager(session)
        session.execute("create temp table mine (id text)")
        for code, refused in REFUSED.items():
            session.execute("insert into mine values (%s)", [code])
            assert refused(manager, at).error == code
        session.commit()
        assert contents(conn) == before
        assert session.execute("select count(*) from mine").fetchall() == [(len(REFUSED),)]

    def test_misuse_is_undone_by_a_savepoint(
        self, other: CreditManager, at: Scene, session: Connection, conn: Connection
    ) -> None:
        manager = CreditManager(session)
        with session.transaction():
            manager.deduct_credits("alice", 10).or_raise()
            for code, misuse in MISUSE.items():
                with pytest.raises(DuctoError) as raised, session.transaction():
                    [manager.deduct_credits("alice", 10).or_raise(), misuse(manager, at)]
                assert raised.value.code == code
        assert other.get_balance("alice").balance == 70
        assert other.verify_ledger() == []

    def test_what_is_rolled_back_never_was(self, other: CreditManager, session: Connection, conn: Connection) -> None:
        manager = CreditManager(session)
        everything = {**STEPS, **{f"{name} of a team": step for name, step in TEAM_STEPS.items()}}
        for name, step in everything.items():
            at = scene(other, name) | team_scene(other, name)
            before = contents(conn)
            with session.transaction(force_rollback=True):
                step(manager, at).or_raise()
            assert contents(conn) == before, name
            with session.transaction():
                with session.transaction(force_rollback=True):
                    step(manager, at).or_raise()
                assert not getattr(step(manager, at).or_raise(), "idempotent", False), name
        assert other.verify_ledger() == []

    def test_several_calls_are_one_unit(self, other: CreditManager, session: Connection, conn: Connection) -> None:
        manager = CreditManager(session)
        with session.transaction():
            at = scene(manager, "carol")
            for step in ("charge with a key", "hold with a key", "settle a part", "settle", "refund", "extend"):
                STEPS[step](manager, at)
            assert other.get_balance("carol").revision == 0
            inside = manager.get_balance("carol")
        assert other.get_balance("carol") == inside
        assert other.verify_ledger() == []


PRICED: dict[str, Step] = {
    "plain": lambda m, at: m.deduct(at["user"], USAGE),
    "keyed": lambda m, at: m.deduct(at["user"], USAGE, "ключ"),
    "with metadata": lambda m, at: m.deduct(at["user"], USAGE, metadata={"a": 1}),
    "in a batch": lambda m, at: m.deduct_batch([{"user_id": at["user"], "metrics": USAGE}])[0],
    "held": lambda m, at: m.reserve(at["user"], USAGE),
    "asked": lambda m, at: m.calculate_cost(USAGE, at["user"]),
}


@pytest.mark.parametrize("name", PRICED)
def test_a_transaction_that_has_priced_hears_of_newer_prices(other: CreditManager, connect: Connect, name: str) -> None:
    """At READ COMMITTED a call prices by what is active when it is made."""
    step, at = PRICED[name], {"user": "alice"}
    other.add_credits("alice", 1000)
    session = connect(autocommit=False)
    manager = CreditManager(session)
    totals = []
    for config in (DEARER, CONFIG, DEARER):
        for call in (step, PRICED["asked"]):
            answer = call(manager, at)
            totals.append(getattr(answer, "total", getattr(answer, "cost", getattr(answer, "amount", None))))
        other.publish_pricing(config, f"{config is DEARER} {len(totals)}")
    session.rollback()
    expected = [30, 30, 180, 180, 30, 30] if name != "keyed" else [30, 30, 30, 180, 30, 30]
    assert totals == expected


TERMS: dict[str, Step] = {
    "available": lambda m, at: m.get_balance("alice").available,
    "bonus": lambda m, at: m.add_credits(at["unseen"], 1).or_raise().new_balance,
    "opening": lambda m, at: m.reserve_credits(at["unseen"], 1).error,
    "plan": lambda m, at: m.get_user_plan(at["unseen"]).plan_id,
    "extension": lambda m, at: m.extend_reservation(at["hold"], 10).error,
}


@pytest.mark.parametrize("name", TERMS)
def test_a_transaction_that_has_asked_hears_of_newer_terms(other: CreditManager, connect: Connect, name: str) -> None:
    other.add_credits("alice", 1000)
    at = {"hold": other.reserve_credits("alice", 1).reservation_id}
    session = connect(autocommit=False)
    manager = CreditManager(session)
    answers = []
    for number, terms in enumerate(({}, {"min_balance": 995, "signup_bonus": 7, "default_plan": "pro"}, {})):
        other.publish_pricing({**CONFIG, **terms}, f"{number}")
        answers += [TERMS[name](manager, {**at, "unseen": f"user {number} {again}"}) for again in range(2)]
    session.rollback()
    expected = {
        "available": [999, 999, 4, 4, 999, 999],
        "bonus": [1, 1, 8, 8, 1, 1],
        "opening": [*["account_not_found"] * 2, *["insufficient_credits"] * 2, *["account_not_found"] * 2],
        "plan": [None, None, "pro", "pro", None, None],
        "extension": [None, None, "insufficient_credits", "insufficient_credits", None, None],
    }
    assert answers == expected[name]

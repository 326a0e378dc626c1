"""Sessions that meet: on a pool, under a cap, in a plan's allowance, over lots that expire while they are spent.

Each session is a connection of its own; what they were answered, the ledger and the rows agree afterwards.
"""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connect, Connection
from ledger_helpers import Call, Ledger, Row, ask, costs, reads, team

PLANS = {
    "free": {"id": "free", "name": "Free", "free_allowance": 100},
    "pro": {"id": "pro", "name": "Pro", "free_allowance": 1000, "rate_overrides": {"any": "points * 0.5"}},
}
START = datetime(2026, 1, 1, tzinfo=UTC)
MONTH = 2592000

Work = Callable[[Ledger, int], Row]


class Arena:
    """A database with the usual prices, no least balance, and as many sessions as are wanted."""

    def __init__(self, connect: Connect, clock: Clock) -> None:
        self._connect = connect
        self.clock = clock
        self.ledger = Ledger(connect(), clock)
        self.ledger.publish(min_balance=0, plans=PLANS)
        clock.set(START)

    def sessions(self, count: int) -> list[Ledger]:
        return [Ledger(self._connect(), self.clock) for _ in range(count)]

    def given(self, *calls: Callable[[Ledger], None]) -> "Arena":
        for call in calls:
            call(self.ledger)
        return self

    def meet(self, count: int, work: Work) -> list[Row]:
        """What so many sessions were answered that call at the same moment; each gets its number."""
        return _together(
            [
                lambda session=session, number=number: work(session, number)  # type: ignore[misc]
                for number, session in enumerate(self.sessions(count))
            ]
        )

    def race(self, count: int, call: Call) -> Counter[str]:
        """How often each outcome came when so many sessions make one call."""
        return outcomes(self.meet(count, lambda session, _: session.one(call)))

    def sound(self) -> None:
        assert self.ledger.violations() == []


def _together(works: list[Callable[[], Any]]) -> list[Any]:
    start = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        start.wait(30)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(begin, work) for work in works]]


def outcomes(answers: list[Row]) -> Counter[str]:
    return Counter(row["error"] or ("replayed" if row.get("idempotent") else "ok") for row in answers)


@pytest.fixture
def arena(connect: Connect, clock: Clock) -> Arena:
    return Arena(connect, clock)


# The races of the collection: eight sessions, or four.


def test_charges_with_one_key(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000))
    answers = arena.meet(8, lambda session, _: session.one(ask.deduct_credits("u", 10, key="k")))
    assert outcomes(answers) == {"ok": 1, "replayed": 7}
    assert len({repr(row | {"idempotent": True}) for row in answers}) == 1
    reads(balance=990)(arena.ledger, ask.get_balance("u"))
    arena.sound()


@pytest.mark.parametrize("kind", ["daily", "monthly"])
@pytest.mark.parametrize("model", [None, "any"])
def test_charges_under_a_cap(arena: Arena, kind: str, model: str | None) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 50, kind, model))
    assert arena.race(8, ask.deduct("u", costs(10))) == {"ok": 5, "spend_cap_exceeded": 3}
    reads(balance=950)(arena.ledger, ask.get_balance("u"))
    reads(capped=True, current_spend=50)(arena.ledger, ask.check_spend_cap("u", model, 1))
    assert [row["spent"] for _, row in arena.ledger.events("cap_reached")] == [50]
    arena.sound()


def test_charges_of_an_allowance(arena: Arena) -> None:
    arena.given(ask.set_user_plan("u", "free"))
    answers = arena.meet(8, lambda session, _: session.one(ask.deduct_credits("u", 30)))
    assert outcomes(answers) == {"ok": 3, "insufficient_credits": 5}
    assert sum(row["allowance_used"] for row in answers) == 90
    reads(balance=0)(arena.ledger, ask.get_balance("u"))
    reads(allowance_remaining=10)(arena.ledger, ask.check_allowance("u"))
    arena.sound()


def test_team_charges_under_a_members_cap(arena: Arena) -> None:
    arena.given(team("crew"), ask.add_credits("crew", 900), ask.add_team_member("crew", "ann", "member", 50))
    assert arena.race(8, ask.deduct_team_credits("crew", "ann", 20)) == {"ok": 2, "member_cap_exceeded": 6}
    (member,) = arena.ledger.run(ask.get_team_members("crew"))
    assert member["total_spent"] == 40
    reads(balance=960)(arena.ledger, ask.get_team_balance("crew"))
    arena.sound()


def test_charges_beyond_the_balance(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 100))
    assert arena.race(8, ask.deduct_credits("u", 30)) == {"ok": 3, "insufficient_credits": 5}
    reads(balance=10)(arena.ledger, ask.get_balance("u"))
    arena.sound()


def test_full_refunds_of_one_charge(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 100), ask.deduct_credits("u", 40))
    charge = arena.ledger.named("@charge")
    assert arena.race(8, ask.refund_credits(charge)) == {"ok": 1, "already_refunded": 7}
    reads(balance=100)(arena.ledger, ask.get_balance("u"))
    arena.sound()


def test_first_grants(arena: Arena) -> None:
    assert arena.race(8, ask.add_credits("new", 10)) == {"ok": 8}
    reads(balance=80)(arena.ledger, ask.get_balance("new"))
    assert len(arena.ledger.events("account_opened")) == 1
    arena.sound()


def test_publishes(arena: Arena) -> None:
    def publish(session: Ledger, number: int) -> Row:
        session.publish(min_balance=number + 1, plans=PLANS)
        return {"error": None}

    arena.meet(8, publish)
    history = arena.ledger.run(ask.get_pricing_history())
    assert len({row["version"] for row in history}) == len(history) == 1 + 8
    assert [row["active"] for row in history].count(True) == 1


def test_reservations_beyond_the_balance(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 100))
    assert arena.race(8, ask.reserve_credits("u", 30)) == {"ok": 3, "insufficient_credits": 5}
    reads(balance=100, reserved=90)(arena.ledger, ask.get_balance("u"))
    arena.sound()


@pytest.mark.parametrize("count", [4, 8])
def test_sweeps(arena: Arena, count: int) -> None:
    arena.given(ask.add_credits("u", 100, expires_at=str(START + timedelta(days=1))), ask.add_credits("u", 200))
    arena.clock.advance(timedelta(days=2))
    answers = arena.meet(count, lambda session, _: session.one(ask.sweep_expired_credits()))
    assert sum(row["expired_amount"] for row in answers) == 100
    assert sorted(row["expired_count"] for row in answers) == [0] * (count - 1) + [1]
    reads(balance=200)(arena.ledger, ask.get_balance("u"))
    assert len(arena.ledger.events("lot_expired")) == 1
    arena.sound()


def test_settles_of_one_hold(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 100), ask.reserve_credits("u", 50))
    hold = arena.ledger.named("@hold")
    assert arena.race(8, ask.deduct_credits("u", 40, hold)) == {"ok": 1, "replayed": 7}
    reads(balance=60, reserved=0)(arena.ledger, ask.get_balance("u"))
    arena.sound()


# Further ones


def test_holds_under_a_cap(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 50, model="any"))
    counted = outcomes(
        arena.meet(
            16,
            lambda session, number: session.one(
                ask.reserve("u", costs(7)) if number % 2 else ask.deduct("u", costs(7))
            ),
        )
    )
    assert counted == {"ok": 7, "spend_cap_exceeded": 9}
    arena.sound()


def test_a_cap_that_warns_is_told_once(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 9, action="warn"))
    answers = arena.meet(8, lambda session, _: session.one(ask.deduct_credits("u", 10)))
    assert [row["warnings"] for row in answers] == [["spend_cap_exceeded"]] * 8
    assert len(arena.ledger.events("cap_warned")) == 1


def test_setting_one_cap(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.deduct_credits("u", 30))
    answers = arena.meet(8, lambda session, number: session.one(ask.set_spend_cap("u", 40 + number)))
    assert outcomes(answers) == {"ok": 8}
    assert sorted(row["revision"] for row in answers) == list(range(3, 11))
    (cap,) = arena.ledger.run(ask.list_spend_caps("u"))
    assert cap["limit"] == max(answers, key=lambda row: row["revision"])["limit"]
    assert arena.race(8, ask.remove_spend_cap("u", "daily")) == {"ok": 1, "cap_not_found": 7}
    arena.sound()


def test_first_calls_that_open(arena: Arena) -> None:
    calls = [
        ask.set_user_plan("new", "pro"),
        ask.set_spend_cap("new", 5),
        ask.set_credit_limit("new", 5),
        ask.add_credits("new", 5),
    ]
    arena.ledger.publish(min_balance=0, plans=PLANS, signup_bonus=50)
    answers = arena.meet(8, lambda session, number: session.one(calls[number % 4]))
    assert outcomes(answers) == {"ok": 8}
    reads(balance=60)(arena.ledger, ask.get_balance("new"))
    assert len(arena.ledger.events("account_opened")) == 1
    arena.sound()


def test_creating_one_team(arena: Arena) -> None:
    assert arena.race(8, ask.create_team("The crew", 100, team_id="crew")) == {"ok": 1, "team_exists": 7}
    answers = arena.meet(8, lambda session, _: session.one(ask.create_team("Other", 100, "k")))
    assert outcomes(answers) == {"ok": 1, "replayed": 7}
    assert len({row["team_id"] for row in answers}) == 1
    assert arena.race(8, ask.create_team("Third", 0, "k3", "third")) == {"ok": 1, "replayed": 7}
    reads(balance=100)(arena.ledger, ask.get_team(answers[0]["team_id"]))
    arena.sound()


def test_a_member_comes_and_goes(arena: Arena) -> None:
    arena.given(team("crew", "ann"), ask.add_credits("crew", 900))
    calls = [ask.deduct_team_credits("crew", "ann", 10), ask.remove_team_member("crew", "ann")]
    counted = outcomes(arena.meet(8, lambda session, number: session.one(calls[number % 2])))
    assert counted["ok"] >= 1
    assert counted["ok"] + counted["not_a_member"] == 8
    rows = arena.ledger.run(ask.list_transactions("crew", type="usage"))
    assert len(rows) == counted["ok"] - 1
    arena.given(ask.add_team_member("crew", "ann"))
    (member,) = arena.ledger.run(ask.get_team_members("crew"))
    assert member["total_spent"] == 10 * len(rows)
    arena.sound()


def test_refunds_beside_charges_under_a_cap(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 100), *[ask.deduct_credits("u", 10)] * 10)
    charges = list(arena.ledger.ids["charge"])
    calls = [*(ask.refund_credits(charge) for charge in charges[:8]), *[ask.deduct_credits("u", 10)] * 8]
    answers = arena.meet(16, lambda session, number: session.one(calls[number]))
    made = sum(1 for row in answers[8:] if not row["error"])
    assert outcomes(answers[:8]) == {"ok": 8}
    reads(balance=1000 - 20 - 10 * made)(arena.ledger, ask.get_balance("u"))
    told = arena.ledger.one(ask.check_spend_cap("u", None, 1000))
    assert told["current_spend"] == 20 + 10 * made <= 100
    arena.sound()


def test_changing_plans_beside_charges(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 10000), ask.set_user_plan("u", "free"))
    calls = [ask.deduct("u", costs(20)), ask.set_user_plan("u", "pro"), ask.deduct("u", costs(20)),
             ask.set_user_plan("u", "free")]  # fmt: skip
    answers = arena.meet(16, lambda session, number: session.one(calls[number % 4]))
    assert outcomes(answers) == {"ok": 16}
    rows = arena.ledger.run(ask.list_transactions("u", type="usage"))
    assert all(row["cost"] == {"free": 20, "pro": 10}[row["plan_id"]] for row in rows)
    assert len(rows) == 8
    arena.sound()


def test_an_older_snapshot_of_a_cap_or_a_team(arena: Arena, connect: Connect) -> None:
    """A caller at REPEATABLE READ whose snapshot is older than another's change gets 40001."""
    arena.given(ask.add_credits("u", 100), ask.set_spend_cap("u", 50), team("crew", "ann"))
    late = connect(autocommit=False)
    late.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    session = Ledger(late, arena.clock)
    for before, call in (
        (ask.deduct_credits("u", 40), ask.deduct_credits("u", 40)),
        (ask.set_spend_cap("u", 40), ask.reserve_credits("u", 1)),
        (ask.remove_spend_cap("u", "daily"), ask.set_spend_cap("u", 5)),
        (ask.set_user_plan("u", "free"), ask.deduct_credits("u", 1)),
        (ask.remove_team_member("crew", "ann"), ask.deduct_team_credits("crew", "ann", 1)),
        (ask.add_team_member("crew", "ann"), ask.reserve_team_credits("crew", "ann", 1)),
    ):
        session.one(ask.get_balance("u"))
        before(arena.ledger)
        with pytest.raises(psycopg.errors.SerializationFailure):
            session.one(call)
        late.rollback()
    arena.sound()


# Locks, seen in the server's own list


def wait_for_a_waiter(conn: Connection) -> None:
    """Until another session waits for a lock."""
    for _ in range(1000):
        waits = conn.execute(
            "select count(*), pg_sleep(0.01) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        ).fetchone()
        if waits and waits[0]:
            return
    raise AssertionError("nobody waited")


def test_a_sweep_waits_for_nobody(arena: Arena, connect: Connect) -> None:
    for user in ("a", "b", "c"):
        arena.given(ask.add_credits(user, 10, expires_at=str(START + timedelta(days=1))), ask.add_credits(user, 5))
    arena.clock.advance(timedelta(days=2))
    busy = connect(autocommit=False)
    Ledger(busy, arena.clock).one(ask.deduct_credits("b", 1))
    arena.ledger.conn.execute("set lock_timeout = '1s'")
    swept = arena.ledger.one(ask.sweep_expired_credits())
    assert (swept["expired_count"], swept["expired_amount"]) == (2, 20)
    busy.rollback()
    swept = arena.ledger.one(ask.sweep_expired_credits())
    assert (swept["expired_count"], swept["expired_amount"]) == (1, 10)
    arena.sound()


def test_a_charge_waits_for_the_sweep_of_its_account(arena: Arena, connect: Connect) -> None:
    arena.given(ask.add_credits("u", 10, expires_at=str(START + timedelta(days=1))), ask.add_credits("u", 5))
    arena.clock.advance(timedelta(days=2))
    sweeper = connect(autocommit=False)
    Ledger(sweeper, arena.clock).one(ask.sweep_expired_credits())
    (session,) = arena.sessions(1)
    with ThreadPoolExecutor(1) as pool:
        charge = pool.submit(session.one, ask.deduct_credits("u", 6))
        wait_for_a_waiter(arena.ledger.conn)
        sweeper.commit()
        assert charge.result()["error"] == "insufficient_credits"
    reads(balance=5)(arena.ledger, ask.get_balance("u"))
    arena.sound()


def test_batches_of_the_same_accounts_in_any_order(arena: Arena) -> None:
    """None waits for one that waits for it, also where the accounts are opened by the batches themselves."""
    users = [f"u{number}" for number in range(12)]
    arena.ledger.publish(min_balance=0, signup_bonus=1000)
    for turn in ("there", "opened"):
        names = [f"{user} {turn}" for user in users]
        if turn == "there":
            arena.given(*(ask.set_credit_limit(name, 0) for name in names))

        def work(session: Ledger, number: int, names: list[str] = names) -> Row:
            order = names[::-1] if number % 2 else names
            for _ in range(3):
                for row in session.run(ask.deduct_batch([{"user_id": name, "amount": 1} for name in order])):
                    assert row["error"] is None
            return {"error": None}

        arena.meet(8, work)
        balances = {arena.ledger.one(ask.get_balance(name))["balance"] for name in names}
        assert balances == {1000 - 24}
    arena.sound()


# Everything at once


class Storm:
    """Sixteen sessions on one pool, one capped user and one account full of lots, two sweepers, and time goes on.

    Holds live for a month and are settled within what they hold, so that nothing may pass a cap or a balance.
    """

    def __init__(self, arena: Arena, steps: int) -> None:
        self.arena = arena
        self.steps = steps
        self.done: list[tuple[str, Row]] = []
        self.swept: list[Row] = []
        self.lock = threading.Lock()
        self.running = 16

    def run(self) -> None:
        sessions = self.arena.sessions(16 + 2 + 1)
        spend: list[Callable[[Ledger, int], None]] = [self.pool, self.capped, self.lots]
        works: list[Callable[[], None]] = [
            lambda n=n: self.repeat(spend[n % 3], sessions[n], n)  # type: ignore[misc]
            for n in range(16)
        ]
        works += [lambda n=n: self.sweep(sessions[n]) for n in (16, 17)]  # type: ignore[misc]
        _together([*works, lambda: self.go_on(sessions[18])])

    def repeat(self, spend: Callable[[Ledger, int], None], session: Ledger, number: int) -> None:
        try:
            for step in range(self.steps):
                spend(session, number // 3 + step * 6)
        finally:
            with self.lock:
                self.running -= 1

    def keep(self, account: str, row: Row) -> Row:
        with self.lock:
            self.done.append((account, row))
        return row

    def pool(self, session: Ledger, step: int) -> None:
        member = ("ann", "bob", "cid")[step % 3]
        if step % 4 == 0:
            hold = session.one(ask.reserve_team_credits("crew", member, 9, ttl=MONTH))
            if not hold["error"]:
                self.keep("crew", session.one(ask.deduct_team_credits("crew", member, 7, hold["reservation_id"])))
        else:
            self.keep("crew", session.one(ask.deduct_team_credits("crew", member, 5, key=f"k{step // 9} {member}")))

    def capped(self, session: Ledger, step: int) -> None:
        if step % 4 == 0:
            hold = session.one(ask.reserve("capped", costs(9), ttl=MONTH))
            if not hold["error"]:
                self.keep("capped", session.one(ask.deduct("capped", costs(9), hold=hold["reservation_id"])))
        else:
            self.keep("capped", session.one(ask.deduct("capped", costs(7), f"k{step // 2}")))

    def lots(self, session: Ledger, step: int) -> None:
        match step % 7:
            case 0 | 1:
                ((now,),) = session.sql("select ducto_private.clock()")
                expires_at = str(now + timedelta(hours=12 + step % 40))
                self.keep("lots", session.one(ask.add_credits("lots", 20, "promotion", expires_at=expires_at)))
            case 2:
                hold = session.one(ask.reserve_credits("lots", 15, ttl=MONTH))
                if not hold["error"]:
                    self.keep("lots", session.one(ask.deduct_credits("lots", 12, hold["reservation_id"])))
            case 3:
                charge = self.keep("lots", session.one(ask.deduct_credits("lots", 8)))
                if not charge["error"]:
                    self.keep("lots", session.one(ask.refund_credits(charge["transaction_id"], 3)))
            case _:
                self.keep("lots", session.one(ask.deduct_credits("lots", 11, key=f"k{step // 2}")))

    def sweep(self, session: Ledger) -> None:
        while self.running:
            row = session.one(ask.sweep_expired_credits(len(self.swept) % 5 == 4, 1))
            with self.lock:
                self.swept.append(row)
            session.sql("select pg_sleep(0.01)")

    def go_on(self, session: Ledger) -> None:
        while self.running:
            self.arena.clock.advance(timedelta(hours=1))
            session.sql("select pg_sleep(0.05)")


@pytest.mark.slow
def test_sixteen_sessions_and_the_sweep(arena: Arena) -> None:
    arena.ledger.publish(min_balance=0, plans=PLANS, overrun="reject")
    arena.given(
        team("crew"),
        ask.add_credits("crew", 700),
        ask.add_team_member("crew", "ann", "member", 100),
        ask.add_team_member("crew", "bob", "member", 60, "daily"),
        ask.add_team_member("crew", "cid"),
        ask.add_credits("capped", 10**6),
        ask.set_spend_cap("capped", 150),
        ask.set_spend_cap("capped", 450, "monthly", "any"),
        ask.set_credit_limit("lots", 0),
    )
    storm = Storm(arena, 45)
    storm.run()
    ledger = arena.ledger
    arena.sound()

    # What was answered is in the ledger, once.
    made = [row for _, row in storm.done if not row["error"] and not row["idempotent"]]
    ids = [row.get("transaction_id") or row["refund_transaction_id"] for row in made]
    assert len(set(ids)) == len(ids)
    found = ledger.sql(
        "select transaction_id::text from ducto_private.transactions"
        " where account_id in ('crew', 'capped', 'lots') and type in ('usage', 'promotion', 'refund')"
    )
    assert {name for (name,) in found} == set(ids)
    answers = Counter(row["error"] or "ok" for _, row in storm.done)
    assert answers["ok"] > 100
    assert set(answers) <= {"ok", "insufficient_credits", "spend_cap_exceeded", "member_cap_exceeded"}
    assert {"spend_cap_exceeded", "member_cap_exceeded", "insufficient_credits"} <= set(answers)

    # Nothing was oversold.
    assert ledger.sql("select count(*) from ducto_private.transactions where balance_after < 0") == [(0,)]
    spent = ledger.sql(
        "select account_id, member_id, created_at::date, -sum(amount) from ducto_private.transactions"
        " where type = 'usage' and account_id <> 'lots' group by 1, 2, 3"
    )
    days = {
        name: [total for account, actor, _, total in spent if name in (account, actor)]
        for name in ("capped", "ann", "bob")
    }
    assert max(days["capped"]) <= 150
    assert sum(days["capped"]) <= 450
    assert sum(days["ann"]) <= 100
    assert max(days["bob"]) <= 60
    members = {row["user_id"]: row["total_spent"] for row in ledger.run(ask.get_team_members("crew"))}
    assert (members["ann"], members["bob"]) == (sum(days["ann"]), sum(days["bob"]))
    assert 800 - sum(members.values()) == ledger.one(ask.get_balance("crew"))["balance"] >= 0

    # Nothing expired twice, and in the end all that was not burnt has.
    arena.clock.advance(timedelta(days=200))
    while (row := ledger.one(ask.sweep_expired_credits(False, 1)))["expired_count"]:
        storm.swept.append(row)
    reads(balance=0, reserved=0)(ledger, ask.get_balance("lots"))
    assert ledger.sql("select count(*) from ducto_private.credit_lots where remainder <> 0") == [(0,)]
    ((expired,),) = ledger.sql("select coalesce(-sum(amount), 0) from ducto_private.transactions where type = 'expiry'")
    assert expired == sum(row["amount"] for _, row in ledger.events("lot_expired")) > 0
    assert sum(row["expired_amount"] for row in storm.swept if not row["dry_run"]) <= expired
    arena.sound()

"""Sessions that call at the same moment: what was acknowledged stands, once, and nothing is spent twice.

Races for a cap, an allowance, a team or a sweep are beside the other tests of those.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from conftest import Connect, Connection
from ledger_helpers import FREE, Ledger, Row, ask, costs, reads, team
from sessions import Arena, outcomes, race, together

from ducto_pg import CreditManager

Scene = dict[str, str]
Prepare = Callable[[CreditManager, str], Scene]

CONFIG: dict[str, Any] = {"models": {"m": "input_tokens * 0.25"}, "fixed": {"job": 30}, "min_balance": 0}
USAGE = {"model": "m", "input_tokens": 20}
MONTH = 2592000


@pytest.fixture
def owner(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    return manager


@pytest.fixture
def eight(connect: Connect) -> list[CreditManager]:
    """Eight sessions."""
    return [CreditManager(connect()) for _ in range(8)]


@dataclass
class Race:
    """`prepare` an account with 100 credits, then `work` in eight sessions at once; then it has so many credits, of
    which so many are held. None says that it depends on who came first."""

    work: Callable[[CreditManager, Scene, int], Any]
    outcomes: dict[str, int]
    balance: int | None
    reserved: int | None = 0
    left: int | None = None
    prepare: Prepare = lambda m, u: {}
    config: dict[str, Any] = field(default_factory=dict)


def hold(amount: int) -> Prepare:
    return lambda m, u: {"hold": m.reserve_credits(u, amount).or_raise().reservation_id}


def charge(amount: int) -> Prepare:
    return lambda m, u: {"charge": m.deduct_credits(u, amount).or_raise().transaction_id}


def grant(m: CreditManager, u: str) -> Scene:
    return {"grant": m.list_transactions(u)[0].transaction_id}


def empty(m: CreditManager, u: str) -> Scene:
    m.remove_credits(u, 100).or_raise()
    return {}


def pool(m: CreditManager, u: str) -> Scene:
    team = m.create_team("Team", 100).or_raise().team_id
    m.add_team_member(team, u).or_raise()
    return {"team": team}


ONE_EFFECT = {"ok": 1, "replayed": 7}
RACES = {
    "charges beyond the balance": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 30), {"ok": 3, "insufficient_credits": 5}, balance=10
    ),
    "priced charges beyond the balance": Race(
        lambda m, at, n: m.deduct(at["u"], {"model": "m", "input_tokens": 120}),
        {"ok": 3, "insufficient_credits": 5},
        balance=10,
    ),
    "jobs beyond the balance": Race(
        lambda m, at, n: m.deduct_fixed(at["u"], "job"), {"ok": 3, "insufficient_credits": 5}, balance=10
    ),
    "charges with one key": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 10, idempotency_key="k"), ONE_EFFECT, balance=90
    ),
    "priced charges with one key": Race(lambda m, at, n: m.deduct(at["u"], USAGE, "k"), ONE_EFFECT, balance=95),
    "jobs with one key": Race(lambda m, at, n: m.deduct_fixed(at["u"], "job", "k"), ONE_EFFECT, balance=70),
    "different charges with one key": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 10 + n // 2, idempotency_key="k"),
        {"ok": 1, "replayed": 1, "idempotency_conflict": 6},
        balance=None,
    ),
    "grants with one key": Race(
        lambda m, at, n: m.add_credits(at["u"], 10, idempotency_key="k"), ONE_EFFECT, balance=110
    ),
    "grants to a new account with one key": Race(
        lambda m, at, n: m.add_credits(f"{at['u']}, new", 5, idempotency_key="k"), ONE_EFFECT, balance=100
    ),
    "removals with one key": Race(
        lambda m, at, n: m.remove_credits(at["u"], 10, idempotency_key="k"), ONE_EFFECT, balance=90
    ),
    "removals of one grant": Race(
        lambda m, at, n: m.remove_credits(at["u"], 30, transaction_id=at["grant"]),
        {"ok": 3, "exceeds_grant": 5},
        balance=10,
        prepare=grant,
    ),
    "holds beyond the balance": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 30), {"ok": 3, "insufficient_credits": 5}, balance=100, reserved=90
    ),
    "holds with one key": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 30, idempotency_key="k"), ONE_EFFECT, balance=100, reserved=30
    ),
    "estimates with one key": Race(
        lambda m, at, n: m.reserve(at["u"], USAGE, idempotency_key="k"), ONE_EFFECT, balance=100, reserved=5
    ),
    "holds and charges": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 30) if n % 2 else m.deduct_credits(at["u"], 30),
        {"ok": 3, "insufficient_credits": 5},
        balance=None,
        reserved=None,
        left=10,
    ),
    "holds of nothing on an empty account": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 0), {"ok": 8}, balance=0, prepare=empty
    ),
    "holds on an empty account": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 1), {"insufficient_credits": 8}, balance=0, prepare=empty
    ),
    "extensions beyond the balance": Race(
        lambda m, at, n: m.extend_reservation(at["hold"], 30),
        {"ok": 3, "insufficient_credits": 5},
        balance=100,
        reserved=100,
        prepare=hold(10),
    ),
    "extensions with one key": Race(
        lambda m, at, n: m.extend_reservation(at["hold"], 30, idempotency_key="k"),
        ONE_EFFECT,
        balance=100,
        reserved=40,
        prepare=hold(10),
    ),
    "releases of one hold": Race(
        lambda m, at, n: m.release_reservation(at["hold"]), ONE_EFFECT, balance=100, prepare=hold(50)
    ),
    "settlements of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"]), ONE_EFFECT, balance=60, prepare=hold(50)
    ),
    "settlements of one hold with one key": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"], "k"), ONE_EFFECT, balance=60, prepare=hold(50)
    ),
    "settlements of one hold with keys of their own": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"], f"k{n}"),
        {"ok": 1, "reservation_not_active": 7},
        balance=60,
        prepare=hold(50),
    ),
    "two settlements of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40 + n % 2, at["hold"]),
        {"ok": 1, "replayed": 3, "idempotency_conflict": 4},
        balance=None,
        prepare=hold(50),
    ),
    "different settlements of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40 + n, at["hold"]),
        {"ok": 1, "idempotency_conflict": 7},
        balance=None,
        prepare=hold(50),
    ),
    "parts of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 20, at["hold"], final=False),
        {"ok": 8},
        balance=-60,
        prepare=hold(50),
    ),
    "parts of one hold, overrun refused": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 20, at["hold"], final=False),
        {"ok": 5, "insufficient_credits": 3},
        balance=0,
        prepare=hold(50),
        config={"overrun": "reject"},
    ),
    "settling and releasing": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"], "k") if n % 2 else m.release_reservation(at["hold"]),
        {"ok": 1, "replayed": 3, "reservation_not_active": 4},
        balance=None,
        prepare=hold(50),
    ),
    "full refunds of one charge": Race(
        lambda m, at, n: m.refund_credits(at["charge"]),
        {"ok": 1, "already_refunded": 7},
        balance=100,
        prepare=charge(40),
    ),
    "parts of a refund": Race(
        lambda m, at, n: m.refund_credits(at["charge"], 15),
        {"ok": 2, "refund_exceeds_original": 6},
        balance=90,
        prepare=charge(40),
    ),
    "refunds with one key": Race(
        lambda m, at, n: m.refund_credits(at["charge"], 15, idempotency_key="k"),
        ONE_EFFECT,
        balance=75,
        prepare=charge(40),
    ),
    "batches with one key": Race(
        lambda m, at, n: m.deduct_batch([{"user_id": at["u"], "amount": 5, "idempotency_key": "k"}])[0],
        ONE_EFFECT,
        balance=95,
    ),
    "teams with one key": Race(
        lambda m, at, n: m.create_team("Team", 5, idempotency_key=f"k {at['u']}"), ONE_EFFECT, balance=100
    ),
    "holds on a pool with one key": Race(
        lambda m, at, n: m.reserve_team_credits(at["team"], at["u"], 5, idempotency_key="k"),
        ONE_EFFECT,
        balance=100,
        prepare=pool,
    ),
    "estimates on a pool with one key": Race(
        lambda m, at, n: m.reserve_team(at["team"], at["u"], USAGE, idempotency_key="k"),
        ONE_EFFECT,
        balance=100,
        prepare=pool,
    ),
    "charges to a pool with one key": Race(
        lambda m, at, n: m.deduct_team_credits(at["team"], at["u"], 5, idempotency_key="k"),
        ONE_EFFECT,
        balance=100,
        prepare=pool,
    ),
    "priced charges to a pool with one key": Race(
        lambda m, at, n: m.deduct_team(at["team"], at["u"], USAGE, idempotency_key="k"),
        ONE_EFFECT,
        balance=100,
        prepare=pool,
    ),
}


def test_of_one_account(owner: CreditManager, eight: list[CreditManager]) -> None:
    for name, one in RACES.items():
        owner.publish_pricing({**CONFIG, **one.config})
        owner.add_credits(name, 100).or_raise()
        at = {"u": name, **one.prepare(owner, name)}
        answers = race(eight, lambda m, n, one=one, at=at: one.work(m, at, n))  # type: ignore[misc]
        assert outcomes(answers) == one.outcomes, name
        effects = [answer for answer in answers if not answer.error and not answer.idempotent]
        replays = [answer for answer in answers if not answer.error and answer.idempotent]
        if "releas" not in name:
            assert all(answer.model_copy(update={"idempotent": False}) in effects for answer in replays), name
        told = owner.get_balance(name)
        assert one.balance in (None, told.balance), name
        assert one.reserved in (None, told.reserved), name
        left = told.balance - (told.reserved or 0)
        assert one.left in (None, left), name
        assert left >= 0 or name == "parts of one hold", name
    assert owner.verify_ledger() == []


def test_first_grants(owner: CreditManager, eight: list[CreditManager]) -> None:
    answers = race(eight, lambda m, n: m.add_credits("new", 10).or_raise())
    assert sorted(answer.new_balance for answer in answers) == list(range(10, 90, 10))
    assert [event.type for event in owner.fetch_events()] == ["account_opened"]
    assert owner.verify_ledger() == []


def test_first_calls_of_an_unknown_user(owner: CreditManager, eight: list[CreditManager]) -> None:
    plan = {"plans": {"free": {"id": "free", "name": "Free", "free_allowance": 50}}, "default_plan": "free"}
    calls: list[Callable[[CreditManager, str], Any]] = [
        lambda m, u: m.deduct_credits(u, 20),
        lambda m, u: m.reserve_credits(u, 20),
        lambda m, u: m.add_credits(u, 1),
    ]
    for terms, bonus, admitted in (
        ({"signup_bonus": 50}, [50], 2),
        (plan, [], 2),
        ({**plan, "signup_bonus": 50}, [50], 5),
    ):
        owner.publish_pricing({**CONFIG, **terms})
        for kinds in ([0], [1], [2], [0, 1, 2]):
            user = f"{admitted} {bonus} {kinds}"
            answers = race(eight, lambda m, n, u=user, k=kinds: calls[k[n % len(k)]](m, u))  # type: ignore[misc]
            if kinds in ([0], [1]):
                assert outcomes(answers) == {"ok": admitted, "insufficient_credits": 8 - admitted}, user
            rows = owner.list_transactions(user)
            assert [row.amount for row in rows if row.type == "signup_bonus"] == bonus, user
            assert not bonus or rows[-1].type == "signup_bonus", user
    assert owner.verify_ledger() == []


def test_first_calls_that_open(arena: Arena) -> None:
    calls = [
        ask.set_user_plan("new", "free"),
        ask.set_spend_cap("new", 5),
        ask.set_credit_limit("new", 5),
        ask.add_credits("new", 5),
    ]
    arena.ledger.publish(min_balance=0, plans=FREE, signup_bonus=50)
    answers = arena.meet(8, lambda number: calls[number % 4])
    assert outcomes(answers) == {"ok": 8}
    reads(balance=60)(arena.ledger, ask.get_balance("new"))
    assert len(arena.ledger.events("account_opened")) == 1
    arena.sound()


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
        *sixteen, sweeper, other, last = self.arena.sessions(16 + 2 + 1)
        spend = [self.pool, self.capped, self.lots]
        works = [partial(self.repeat, spend[number % 3], session, number) for number, session in enumerate(sixteen)]
        together([*works, partial(self.sweep, sweeper), partial(self.sweep, other), partial(self.go_on, last)])

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
    arena.ledger.publish(min_balance=0, overrun="reject")
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

"""Statements: what became of an account's credits in a window, and what of it is the end user's own to see."""

import json
import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    FREE,
    MOST,
    Call,
    Check,
    Ledger,
    Row,
    Step,
    ask,
    at,
    later,
    lists,
    prices,
    raises,
    reads,
    rich,
    table,
    team,
    tell,
)

from ducto_pg import CreditManager
from ducto_pg.models import Statement

FLOWS = ("granted", "purchased", "charged", "allowance_used", "refunded", "removed", "expired")
SIGNS = {"granted": 1, "purchased": 1, "charged": -1, "refunded": 1, "removed": -1, "expired": -1}
ALL = (None, None)
JANUARY = ("2026-01-01Z", "2026-02-01Z")
FEBRUARY = ("2026-02-01Z", "2026-03-01Z")
MARCH = ("2026-03-01Z", "2026-04-01Z")


def says(opening: int, closing: int, **flows: int) -> Check:
    """It answers these balances and these flows, 0 for others; they add up; nothing is written, and a sweep of what is
    due changes nothing of it."""
    assert opening + sum(SIGNS.get(name, 0) * amount for name, amount in flows.items()) == closing
    wanted = dict.fromkeys(FLOWS, 0) | {"opening_balance": opening, "closing_balance": closing} | flows

    def check(ledger: Ledger, call: Call) -> None:
        reads(**wanted)(ledger, call)
        ask.sweep_expired_credits()(ledger)
        reads(**wanted)(ledger, call)

    return check


def statement(window: tuple[str | None, str | None] = ALL, user: str = "u") -> Call:
    return ask.get_statement(user, *window)


free: list[Step] = [prices(plans=FREE, min_balance=0), rich, ask.set_user_plan("u", "free")]
crew: list[Step] = [team("t", "u"), ask.deduct_team_credits("t", "u", 7)]
january: list[Step] = [ask.add_credits("u", 30, expires_at="2026-01-20"), rich, ask.deduct_credits("u", 10)]


# fmt: off
@table(
    ("nobody", [], statement(user="ghost"), says(0, 0)),
    ("every kind of grant", [prices(signup_bonus=7), *(ask.add_credits("u", amount, kind) for amount, kind in (
        (1, "adjustment"), (2, "promotion"), (4, "subscription"), (8, "signup_bonus"), (16, "purchase")))],
     statement(), says(0, 38, granted=22, purchased=16)),
    ("charges, of the balance and of the allowance", [*free, ask.deduct_credits("u", 14)], statement(),
     says(0, 96, granted=100, charged=4, allowance_used=10)),
    ("gross of refunds", [*free, ask.deduct_credits("u", 14), ask.refund_credits("@charge", 6)], statement(),
     says(0, 100, granted=100, charged=4, allowance_used=10, refunded=4)),
    ("holds are not spend, their settlements are", [rich, ask.reserve_credits("u", 20), ask.reserve_credits("u", 20),
     ask.deduct_credits("u", 3, "@hold", final=False)], statement(), says(0, 97, granted=100, charged=3)),
    ("removals, into debt too", [rich, ask.remove_credits("u", 130)], statement(),
     says(0, -30, granted=100, removed=130)),
    ("a debt, and its payment", [prices(overrun="debt"), rich, at("2026-01-31"), ask.reserve_credits("u", 50),
     ask.deduct_credits("u", 130, "@hold"), at("2026-02-02"), ask.add_credits("u", 50, "purchase")],
     statement(FEBRUARY), says(-30, 20, purchased=50)),
    ("a team's pool", [*crew, ask.refund_credits("@charge", 2)], statement(user="t"),
     says(0, 95, granted=100, charged=7, refunded=2)),
    ("which is not its member's", crew, statement(), says(0, 0)),

    # Windows
    ("the start belongs to a window", [at("2026-02-01"), rich], statement(FEBRUARY), says(0, 100, granted=100)),
    ("the end does not", [at("2026-02-01"), rich], statement(JANUARY), says(0, 0)),
    ("the last microsecond before it does", [at("2026-01-31T23:59:59.999999"), rich], statement(JANUARY),
     says(0, 100, granted=100)),
    ("what came before", [rich, at("2026-02-10"), ask.deduct_credits("u", 3)], statement(MARCH), says(97, 97)),
    ("what came after", [at("2026-04-10"), rich], statement(MARCH), says(0, 0)),
    ("an open start", [rich, at("2026-02-10"), ask.deduct_credits("u", 3)], statement((None, "2026-02-01Z")),
     says(0, 100, granted=100)),
    ("an open end", [rich, at("2026-02-10"), ask.deduct_credits("u", 3)], statement(("2026-02-01Z", None)),
     says(100, 97, charged=3)),
    ("a window of no time", [rich], statement(("2026-01-01Z", "2026-01-01Z")), says(0, 0)),
    ("beyond all time", january, statement(("4713-01-01 BC", "294276-12-31 23:59Z")),
     says(0, 120, granted=130, charged=10)),
    ("infinite", january, statement(("-infinity", "infinity")), says(0, 120, granted=130, charged=10)),
    ("an end before its start", [rich], statement(FEBRUARY[::-1]), raises("22023", "p_end", "p_start", "open")),
    ("no account", [], ask.get_statement(None, *JANUARY), raises("22023", "p_user_id")),
    ("a blank account", [], ask.get_statement(" u", *JANUARY), raises("22023", "p_user_id")),

    # Expiry
    ("what is due, in the window in which it was", [*january, at("2026-02-20")], statement(JANUARY),
     says(0, 100, granted=130, charged=10, expired=20)),
    ("and not in the window after", [*january, at("2026-02-20")], statement(FEBRUARY), says(100, 100)),
    ("recorded days later by a charge", [*january, at("2026-02-20"), ask.deduct_credits("u", 5)], statement(JANUARY),
     says(0, 100, granted=130, charged=10, expired=20)),
    ("which counts when it was made", [*january, at("2026-02-20"), ask.deduct_credits("u", 5)], statement(FEBRUARY),
     says(100, 95, charged=5)),
    ("due at the end is after it", [ask.add_credits("u", 30, expires_at="2026-02-01"), at("2026-03-01")],
     statement(JANUARY), says(0, 30, granted=30)),
    ("and in the window that starts then", [ask.add_credits("u", 30, expires_at="2026-02-01"), at("2026-03-01")],
     statement(FEBRUARY), says(30, 0, expired=30)),
    ("what is not yet due has not expired", [*january, at("2026-01-19")], statement(JANUARY),
     says(0, 120, granted=130, charged=10)),
    ("nor will it in a window to come", [*january, at("2026-01-19")], statement(FEBRUARY), says(120, 120)),
    ("kept for a hold until that ends", [ask.add_credits("u", 30, expires_at="2026-01-20"), at("2026-01-19"),
     ask.reserve_credits("u", 20, ttl=20 * 86400), at("2026-03-05")], statement(JANUARY),
     says(0, 20, granted=30, expired=10)),
    ("and expired then", [ask.add_credits("u", 30, expires_at="2026-01-20"), at("2026-01-19"),
     ask.reserve_credits("u", 20, ttl=20 * 86400), at("2026-03-05")], statement(FEBRUARY), says(20, 0, expired=20)),
    ("or charged", [ask.add_credits("u", 30, expires_at="2026-01-20"), at("2026-01-19"),
     ask.reserve_credits("u", 20, ttl=20 * 86400), at("2026-02-05"), ask.deduct_credits("u", 15, "@hold"),
     later(days=9)], statement(FEBRUARY), says(20, 0, charged=15, expired=5)),
    ("expiry into debt", [prices(overrun="debt", min_balance=0), ask.add_credits("u", 30, expires_at="2026-01-20"),
     at("2026-01-19"), ask.reserve_credits("u", 30, ttl=3600), ask.deduct_credits("u", 50, "@hold", final=False),
     at("2026-02-05"), ask.add_credits("u", 30, "purchase")], statement(JANUARY), says(0, -20, granted=30, charged=50)),
)
def test_statements(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_before_and_after_all_time_nothing_happens(ledger: Ledger) -> None:
    for step in january:
        step(ledger)
    query = "select opening_balance, granted, charged, closing_balance from ducto.get_statement('u', %s, %s)"
    assert ledger.sql(query, None, "4713-01-01 BC") == [(0, 0, 0, 0)]
    assert ledger.sql(query, "294276-12-31 23:59Z", None) == [(120, 0, 0, 120)]


def test_a_statement_says_whose_and_of_what_window(ledger: Ledger) -> None:
    rich(ledger)
    revision = ledger.one(ask.get_balance("u"))["revision"]
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    reads(user_id="u", period_start=start, period_end=end, revision=revision)(ledger, statement(JANUARY))
    reads(user_id="ghost", period_start=None, period_end=None, revision=0)(ledger, statement(user="ghost"))


def test_flows_beyond_bigint_are_the_most_that_it_holds(ledger: Ledger) -> None:
    for _ in range(2):
        ask.add_credits("u", MOST)(ledger)
        ask.deduct_credits("u", MOST - 5)(ledger)
        ask.remove_credits("u", 5)(ledger)
    reads(opening_balance=0, granted=MOST, charged=MOST, removed=10, closing_balance=0)(ledger, statement())


# By zone, months whose midnights clocks move, and what is charged a minute before and at each.
MONTHS = {
    "Europe/Berlin": ["2026-03-01", "2026-04-01", "2026-10-01", "2026-11-01"],
    "America/Havana": ["2026-10-01", "2026-11-01", "2026-12-01"],
    "America/St_Johns": ["2009-10-01", "2009-11-01", "2009-12-01"],
    "Asia/Damascus": ["2005-03-01", "2005-04-01", "2005-05-01"],
    "Pacific/Apia": ["2011-12-01", "2012-01-01", "2012-02-01"],
}


@pytest.mark.parametrize("zone", MONTHS)
def test_months_are_the_callers_in_any_zone(conn: Connection, clock: Clock, zone: str) -> None:
    """Each month's midnight in a zone parts what was charged just before it from what was charged at it."""
    ledger = Ledger(conn, clock)
    ledger.publish(timezone=zone, min_balance=0)
    ledger.clock.set("2005-01-01")
    ask.add_credits("u", 1000)(ledger)
    months = MONTHS[zone]
    for number, month in enumerate(months):
        ((midnight,),) = ledger.sql("select %s::timestamp at time zone %s", month, zone)
        ledger.clock.set(midnight - timedelta(microseconds=1))
        ask.deduct_credits("u", 1)(ledger)
        ledger.clock.set(midnight)
        ask.deduct_credits("u", 10 + number)(ledger)
    closing = 999
    for number, (first, after) in enumerate(pairwise(months)):
        zoned = (f"{first} {zone}", f"{after} {zone}")
        found = ledger.one(statement(zoned))
        assert found["opening_balance"] == closing
        assert found["charged"] == 10 + number + 1
        closing = found["closing_balance"]
        days = ledger.run(ask.daily_spend(*zoned, "u"))
        assert sum(row["total_spend"] for row in days) == found["charged"]


@pytest.mark.parametrize("seed", range(4))
def test_statements_follow_each_other_and_end_at_the_balance(conn: Connection, clock: Clock, seed: int) -> None:
    """A random history of lots, holds, debts and sweeps: every window adds up, begins where the one before ended, ends
    at the balance of then, and says the same whenever it is asked, swept or not."""
    chance = random.Random(seed)
    manager = CreditManager(conn)
    config: dict[str, Any] = {"models": {"a": "input_tokens"}, "min_balance": 0, "plans": FREE, "signup_bonus": 9}
    manager.publish_pricing(config)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    clock.set(now)
    manager.set_user_plan("u", "free").or_raise()
    edges = [now + timedelta(days=6 * number) for number in range(20)]
    told: dict[tuple[datetime, datetime], Row] = {}
    holds, charges = [], []
    for _ in range(90):
        now += timedelta(hours=chance.choice([0, 5, 24, 70]))
        clock.set(now)
        amount = chance.randrange(1, 60)
        match chance.randrange(7):
            case 0:
                soon = now + timedelta(hours=chance.randrange(1, 300))
                manager.add_credits("u", amount, chance.choice(["promotion", "purchase"]), expires_at=soon).or_raise()
            case 1:
                manager.add_credits("u", amount, "purchase").or_raise()
            case 2:
                if not (hold := manager.reserve_credits("u", amount, ttl_seconds=chance.choice([60, 10**6]))).error:
                    holds.append(hold.reservation_id)
            case 3 if holds:
                final = chance.random() < 1 / 2
                charges.append(manager.deduct_credits("u", amount, chance.choice(holds), final=final).transaction_id)
            case 4:
                charges.append(manager.deduct_credits("u", amount).transaction_id)
            case 5 if charges:
                manager.refund_credits(chance.choice(charges) or "none", chance.randrange(1, 9))
            case 6:
                manager.remove_credits("u", min(amount, 9)).or_raise()
        if chance.random() < 1 / 8:
            manager.sweep_expired_credits()
        for window in pairwise(edges):
            if window[1] <= now:
                assert told.setdefault(window, flows(manager, *window)) == flows(manager, *window)
    assert len(told) > 5
    balance = 0
    for start, end in told:
        found = manager.get_statement("u", start, end)
        assert found.opening_balance == balance
        balance = found.closing_balance
        assert balance == manager.get_balance("u", end - timedelta(microseconds=1)).balance
    whole = flows(manager, None, None)
    rest = flows(manager, end, None)
    assert {name: sum(flow[name] for flow in told.values()) + rest[name] for name in FLOWS} == {
        name: whole[name] for name in FLOWS
    }
    assert whole["closing_balance"] == manager.get_balance("u").balance
    assert whole["expired"] > 0


def flows(manager: CreditManager, start: datetime | None, end: datetime | None) -> Row:
    """A statement that adds up, without its revision."""
    found: Statement = manager.get_statement("u", start, end)
    row = found.model_dump(exclude={"revision"})
    net = sum(sign * row[name] for name, sign in SIGNS.items())
    assert found.opening_balance + net == found.closing_balance
    return row


# One's own


def signed_in(ledger: Ledger, claims: Any) -> None:
    ledger.conn.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps(claims)])


def test_users_see_their_own_statement_and_days(ledger: Ledger) -> None:
    steps: list[Step] = [rich, ask.add_credits("v", 9), *crew, *(ask.deduct_credits(user, 2) for user in "uv")]
    for step in steps:
        step(ledger)
    signed_in(ledger, {"sub": "u", "role": "authenticated"})
    for window in (ALL, JANUARY, FEBRUARY):
        assert ledger.one(ask.my_statement(*window)) == ledger.one(statement(window))
    assert [row["total_spend"] for row in ledger.run(ask.my_daily_spend(*ALL))] == [9]
    lists()(ledger, ask.my_daily_spend(*FEBRUARY))
    for name in ("my_statement", "my_daily_spend"):
        raises("22023", "p_end", "p_start")(ledger, Call(name, FEBRUARY[::-1], {}))
    signed_in(ledger, {"sub": "ghost"})
    reads(user_id="ghost", granted=0, closing_balance=0)(ledger, ask.my_statement(*ALL))
    lists()(ledger, ask.my_daily_spend(*ALL))

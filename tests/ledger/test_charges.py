"""Charges and settlements: what they take from whom, how they round, and when they are refused."""

import random
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    FREE,
    LONG,
    MOST,
    UNKNOWN,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    costs,
    free,
    gives,
    hold,
    later,
    poor,
    prices,
    raises,
    reads,
    refuses,
    reject,
    replays,
    rich,
    settle,
    table,
    tell,
)

from ducto_pg import CreditManager


# fmt: off
@table(
    ("no such account", [], ask.deduct("new", costs(1)), refuses("account_not_found")),
    ("nor for 0", [], ask.deduct_credits("new", 0), refuses("account_not_found")),
    ("a usage is priced and charged", [rich], ask.deduct("u", costs("2.5")),
     gives(user_id="u", amount=-2, balance_after=98, cost=Decimal("2.5"), allowance_used=0, shortfall=0, warnings=[],
         idempotent=False, revision=2)),
    ("what was left over is charged later", [rich, ask.deduct("u", costs("2.5"))], ask.deduct("u", costs("2.5")),
     gives(amount=-3)),
    ("a known amount", [rich], ask.deduct_credits("u", 7, model="gpt"), gives(amount=-7, cost=7)),
    ("a job", [rich], ask.deduct_fixed("u", "report"), gives(amount=-7, cost=7)),
    ("a job for nothing", [rich], ask.deduct_fixed("u", "gift"), gives(amount=0, cost=0)),
    ("a charge of nothing is recorded", [rich], ask.deduct("u", {}),
     gives(amount=0, cost=0, balance_after=100, revision=2)),
    ("0 passes in debt", [poor, ask.remove_credits("u", 9)], ask.deduct_credits("u", 0), gives(balance_after=-8)),
    ("all but min_balance", [rich], ask.deduct("u", costs(95)), gives(balance_after=5)),
    ("no further", [rich], ask.deduct("u", costs(96)), refuses("insufficient_credits")),
    ("holds keep theirs", [rich, hold], ask.deduct("u", costs(66)), refuses("insufficient_credits")),
    ("and leave the rest", [rich, hold], ask.deduct("u", costs(65)), gives(balance_after=35)),
    ("a refusal records no expiry", [rich, hold, later(minutes=10)], ask.deduct("u", costs(96)),
     refuses("insufficient_credits")),
    ("nor does a replay", [rich, hold, ask.deduct("u", costs(2), "k"), later(minutes=10)],
     ask.deduct("u", costs(2), "k"), replays()),
    ("expired holds nothing", [rich, hold, later(minutes=10)], ask.deduct("u", costs(95)), gives(balance_after=5)),
    ("an amount needs funds too", [rich], ask.deduct_credits("u", 96), refuses("insufficient_credits")),
    ("a job needs funds too", [ask.add_credits("u", 11)], ask.deduct_fixed("u", "report"),
     refuses("insufficient_credits")),
    ("an unknown job", [rich], ask.deduct_fixed("u", "reports"), raises("DU004", "reports", "did you mean report?")),
    ("a job without a name", [rich], ask.deduct_fixed("u", None), raises("22023", "p_job_name")),
    ("a job with an empty name", [rich], ask.deduct_fixed("u", ""), raises("22023", "p_job_name")),
    ("a division by zero charges nothing", [rich], ask.deduct("u", {"model": "ratio", "input_tokens": 1}),
     raises("DU006", "models.ratio")),
    ("a cost beyond bigint charges nothing", [rich], ask.deduct("u", {"model": "square", "input_tokens": 10**12}),
     raises("22003", "models.square")),
    ("a model has at most 255", [rich], ask.deduct_credits("u", 1, model=LONG), raises("22023", "p_model", "255")),
    ("a repeated key charges nothing", [rich, ask.deduct("u", costs("2.5"), "k"), ask.deduct("u", costs(92))],
     ask.deduct("u", costs("2.5"), "k"), replays(amount=-2, balance_after=98, cost=Decimal("2.5"))),
    ("1 is 1.0, and metadata no part of the request", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct("u", costs("2.0"), "k", {"a": 1}), gives(idempotent=True, balance_after=98)),
    ("other usage of the same cost is another request", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct("u", costs(2) | {"search_queries": 1}, "k"), refuses("idempotency_conflict")),
    ("zeros and nulls in a usage say nothing", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct("u", costs(2) | {"input_tokens": 0, "images": None}, "k"), gives(amount=-2, idempotent=True)),
    ("an amount is another request than a usage of that cost", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct_credits("u", 2, key="k"), refuses("idempotency_conflict")),
    ("a job is another request than a usage with that job", [rich, ask.deduct("u", {"fixed_job": "report"}, "k")],
     ask.deduct_fixed("u", "report", "k"), refuses("idempotency_conflict")),
    ("another job is another request", [rich, ask.deduct_fixed("u", "report", "k")], ask.deduct_fixed("u", "gift", "k"),
     refuses("idempotency_conflict")),
    ("another model is another request", [rich, ask.deduct_credits("u", 2, key="k")],
     ask.deduct_credits("u", 2, key="k", model="gpt"), refuses("idempotency_conflict")),
    ("a key is another account's too", [rich, ask.add_credits("v", 20), ask.deduct("u", costs(2), "k")],
     ask.deduct("v", costs(3), "k"), gives(balance_after=17, idempotent=False)),
    ("a grant's key is a charge's too", [ask.add_credits("u", 20, key="k")], ask.deduct("u", costs(3), "k"),
     refuses("idempotency_conflict")),
    ("refusals are not remembered",
     [rich, lambda ledger: refuses("insufficient_credits")(ledger, ask.deduct("u", costs(99), "k")), rich],
     ask.deduct("u", costs(99), "k"), gives(idempotent=False)),
)
def test_deduct(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("less than was held", [rich, hold], settle(9), gives(amount=-9, balance_after=91, shortfall=0, warnings=[])),
    ("nothing of what was held", [rich, hold], ask.deduct_credits("u", 0, "@hold"), gives(amount=0, balance_after=100)),
    ("exactly what was held", [rich, hold], settle(30), gives(balance_after=70)),
    ("more than was held, from what is free", [rich, hold], settle(95), gives(balance_after=5, shortfall=0)),
    ("min_balance included", [rich, hold], settle(100), gives(balance_after=0, shortfall=0)),
    ("then debt", [rich, hold], settle(101), gives(balance_after=-1, shortfall=1)),
    ("a credit limit comes first", [rich, ask.set_credit_limit("u", 9), hold], settle(109), gives(shortfall=0)),
    ("then debt beyond it", [rich, ask.set_credit_limit("u", 9), hold], settle(110),
     gives(balance_after=-10, shortfall=1)),
    ("other holds keep theirs", [rich, hold, ask.reserve_credits("u", 60)], settle(41),
     gives(balance_after=59, shortfall=1)),
    ("or it is refused", [reject, rich, hold], settle(101), refuses("insufficient_credits", shortfall=1)),
    ("up to the last credit it is not", [reject, rich, hold], settle(100), gives(balance_after=0, shortfall=0)),
    ("other holds keep theirs from a refusal too", [reject, rich, hold, ask.reserve_credits("u", 60)], settle(41),
     refuses("insufficient_credits", shortfall=1)),
    ("within the held amount it is never refused", [reject, rich, hold, ask.remove_credits("u", 500)], settle(30),
     gives(balance_after=-430, shortfall=0)),
    ("above it all is missing in debt", [reject, rich, hold, ask.remove_credits("u", 500)], settle(37),
     refuses("insufficient_credits", shortfall=7)),
    ("a refused settlement keeps the hold",
     [reject, rich, hold, lambda ledger: refuses("insufficient_credits", shortfall=1)(ledger, settle(101))],
     ask.get_reservation("@hold"), reads(status="active", amount=30)),
    ("after debt nothing is admitted", [rich, hold, settle(101)], ask.deduct("u", costs(1)),
     refuses("insufficient_credits")),
    ("an expired hold owns nothing", [rich, hold, later(minutes=10)], settle(30),
     gives(balance_after=70, shortfall=0, warnings=["reservation_expired"])),
    ("all of its charge is above the held amount", [rich, hold, later(minutes=10), ask.reserve_credits("u", 90)],
     settle(30), gives(balance_after=70, shortfall=20, warnings=["reservation_expired"])),
    ("and may be refused", [reject, rich, hold, later(minutes=10), ask.reserve_credits("u", 90)], settle(30),
     refuses("insufficient_credits", shortfall=20)),
    ("an expired hold settles in parts too", [rich, hold, later(minutes=10), settle(10, final=False)], settle(20),
     gives(balance_after=70, warnings=["reservation_expired"])),
    ("an expired hold ends once too", [rich, hold, later(minutes=10), settle(10)], settle(10),
     replays(balance_after=90)),
    ("no such hold", [rich], ask.deduct("u", costs(1), hold=UNKNOWN), refuses("reservation_not_found")),
    ("a hold that is none", [rich], ask.deduct("u", costs(1), hold="x"), refuses("reservation_not_found")),
    ("an empty hold is none", [rich], ask.deduct("u", costs(1), hold=""), refuses("reservation_not_found")),
    ("another's hold", [rich, ask.add_credits("v", 99), hold], settle(1, "v"), refuses("reservation_not_found")),
    ("another's hold for a user never seen", [rich, hold], settle(1, "ghost"), refuses("account_not_found")),
    ("a released hold", [rich, hold, ask.release_reservation("@hold")], settle(1), refuses("reservation_not_active")),
    ("a hold released after it expired", [rich, hold, later(minutes=10), ask.release_reservation("@hold")], settle(1),
     refuses("reservation_not_active")),
    ("the same settlement again", [rich, hold, settle(9), ask.deduct("u", costs(80))], settle(9),
     replays(balance_after=91)),
    ("with other metadata", [rich, hold, settle(9)], settle(9, metadata={"a": 1}), gives(idempotent=True)),
    ("another amount", [rich, hold, settle(9)], settle(10), refuses("idempotency_conflict")),
    ("another call", [rich, hold, settle(9)], ask.deduct_credits("u", 9, "@hold"), refuses("idempotency_conflict")),
    ("with a key it is another settlement", [rich, hold, settle(9)], settle(9, key="k"),
     refuses("reservation_not_active")),
    ("a part of an ended one", [rich, hold, settle(9)], settle(9, final=False), refuses("reservation_not_active")),
    ("after a keyed end", [rich, hold, settle(9, key="k")], settle(9), refuses("reservation_not_active")),
    ("a keyed end replays", [rich, hold, settle(9, key="k")], settle(9, key="k"), replays(balance_after=91)),
    ("another hold under the key", [rich, hold, hold, settle(9, key="k")],
     ask.deduct("u", costs(9), "k", hold="@hold2"), refuses("idempotency_conflict")),
    ("no hold under the key", [rich, hold, settle(9, key="k")], ask.deduct("u", costs(9), "k"),
     refuses("idempotency_conflict")),
    ("a keyed charge that is called no end of anything", [rich, ask.deduct("u", costs(9), "k", final=False)],
     ask.deduct("u", costs(9), "k", final=False), replays(balance_after=91)),
    ("and with the same key the end", [rich, ask.deduct("u", costs(9), "k", final=False)],
     ask.deduct("u", costs(9), "k"), refuses("idempotency_conflict")),
    ("a part under the key", [rich, hold, settle(9, key="k", final=False)], settle(9, key="k"),
     refuses("idempotency_conflict")),
    ("null is final", [rich, hold, settle(9, final=None)], ask.get_reservation("@hold"), reads(status="settled")),
    ("without a hold the end has no meaning", [rich], ask.deduct("u", costs(9), final=False), gives(balance_after=91)),
    ("a part leaves the rest held", [rich, hold, settle(9, final=False)], ask.get_balance("u"),
     reads(balance=91, reserved=21)),
    ("parts without keys are told apart by nothing", [rich, hold, settle(9, final=False), settle(9, final=False)],
     ask.get_balance("u"), reads(balance=82, reserved=12)),
    ("a part under a key is not charged twice", [rich, hold, settle(9, final=False, key="k"), settle(8, final=False)],
     settle(9, final=False, key="k"), replays(balance_after=91)),
    ("parts beyond the hold use what is free", [rich, hold, settle(40, final=False), settle(40, final=False)],
     ask.get_balance("u"), reads(balance=20, reserved=0)),
    ("parts may be refused beyond it, the hold stays", [reject, rich, hold, settle(20, final=False)],
     settle(81, final=False), refuses("insufficient_credits", shortfall=1)),
    ("the end gives back what is left", [rich, hold, settle(9, final=False), settle(1)], ask.get_balance("u"),
     reads(balance=90, reserved=0)),
    ("the end of a hold ends no other", [rich, hold, hold, settle(9)], ask.get_balance("u"),
     reads(balance=91, reserved=30)),
    ("no price ends the hold all the same", [rich, hold],
     ask.deduct("u", {"model": "unknown", "input_tokens": 1}, hold="@hold"),
     gives(amount=-30, warnings=["priced_by_hold"])),
    ("misuse keeps the hold", [rich, hold], ask.deduct("u", {"model": "unknown", "input_tokens": -1}, hold="@hold"),
     raises("22023", "input_tokens")),
    ("a balance beyond bigint", [rich, hold, ask.remove_credits("u", MOST)], settle(1000),
     raises("22003", "balance of account u")),
)
def test_settlement(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_an_id_may_be_written_in_capitals(ledger: Ledger) -> None:
    for step in (rich, hold, settle(9, key="k")):
        step(ledger)
    loud = ask.deduct("u", costs(9), "k", hold=ledger.ids["hold"][0].upper())
    gives(idempotent=True, transaction_id="@charge")(ledger, loud)


@pytest.mark.parametrize(
    ("rounding", "cost", "charged"),
    [
        ("carry", "0.9 0.1 0.9999 0.0001 2.5 2.5", "0 1 0 1 2 3"),
        ("up", "0 0.000000000001 1 1.5 0.9 0.1", "0 1 1 2 1 1"),
        ("down", "0.999999999999 1 1.5 2 0.5 0.5", "0 1 1 2 0 0"),
        ("half_up", "0.499999999999 0.5 1.5 2.5 0.5 0", "0 1 2 3 1 0"),
    ],
)
def test_rounding(ledger: Ledger, rounding: str, cost: str, charged: str) -> None:
    ledger.publish(rounding=rounding)
    rich(ledger)
    carry, balance = Decimal(0), 100
    for points, credits in zip(cost.split(), map(int, charged.split()), strict=True):
        balance -= credits
        gives(amount=-credits, balance_after=balance, cost=Decimal(points))(ledger, ask.deduct("u", costs(points)))
        if rounding == "carry":
            carry += Decimal(points) - credits
        reads(rounding=rounding, carry_after=carry, cost=Decimal(points))(ledger, ask.get_transaction("@charge"))


def test_changing_the_rounding_keeps_the_carry(ledger: Ledger) -> None:
    for step in (
        rich,
        ask.deduct("u", costs("0.75")),
        prices(rounding="up"),
        ask.deduct("u", costs("0.5")),
        ask.deduct_credits("u", 2),
        prices(rounding="carry"),
    ):
        step(ledger)
    gives(amount=-1, balance_after=96)(ledger, ask.deduct("u", costs("0.25")))
    reads(carry_after=0)(ledger, ask.get_transaction("@charge"))


def test_thousands_of_small_charges_are_their_exact_sum(ledger: Ledger) -> None:
    ask.add_credits("u", 10**6)(ledger)
    seed = random.Random(5)
    spent = [Decimal(seed.randrange(10 ** seed.randrange(1, 13))).scaleb(-12) for _ in range(3000)]
    ledger.sql("create temporary table spent (place int primary key, points numeric not null) on commit drop")
    with ledger.conn.cursor() as cursor, cursor.copy("copy spent from stdin") as copy:
        for place, points in enumerate(spent):
            copy.write_row((place, points))
    ((charged,),) = ledger.sql(
        "select -sum((ducto.deduct('u', jsonb_build_object('model', 'any', 'points', s.points))).amount)"
        " from (select * from spent order by place) as s"
    )
    ((balance, carry),) = ledger.sql("select balance, carry from ducto_private.accounts")
    assert balance == 10**6 - charged
    total = sum(spent, Decimal(0))
    assert charged + carry == total
    assert charged == total.to_integral_value(ROUND_FLOOR)
    assert 0 <= carry < 1


def test_carry_has_no_end_of_digits(ledger: Ledger) -> None:
    ledger.publish(models={"third": "input_tokens / 3", "fine": "input_tokens * 0.000000000000000000000000000001"})
    rich(ledger)
    for _ in range(3):
        ask.deduct("u", {"model": "third", "input_tokens": 1})(ledger)
    ask.deduct("u", {"model": "fine", "input_tokens": 7})(ledger)
    reads(carry_after=Decimal("0.999999999999999999990000000007"))(ledger, ask.get_transaction("@charge"))


on_plan = ask.add_credits("u", 20)


# fmt: off
@table(
    ("pays first", [], ask.deduct("u", costs("4.5")),
     gives(allowance_used=4, amount=0, balance_after=20, cost=Decimal("4.5"))),
    ("then the balance", [], ask.deduct("u", costs(14)), gives(allowance_used=10, amount=-4, balance_after=16)),
    ("to the floor", [], ask.deduct("u", costs(25)), gives(allowance_used=10, amount=-15)),
    ("no further", [], ask.deduct("u", costs(26)), refuses("insufficient_credits")),
    ("an amount too", [], ask.deduct_credits("u", 3), gives(allowance_used=3, amount=0, balance_after=20)),
    ("a job too", [], ask.deduct_fixed("u", "report"), gives(allowance_used=7, amount=0)),
    ("a charge within it needs no funds", [ask.remove_credits("u", 99)], ask.deduct("u", costs(10)),
     gives(balance_after=-79)),
    ("a charge beyond it does", [ask.remove_credits("u", 99)], ask.deduct("u", costs(11)),
     refuses("insufficient_credits")),
    ("a replay uses nothing of it", [ask.deduct("u", costs(8), "k"), ask.deduct("u", costs(8))],
     ask.deduct("u", costs(8), "k"), replays(allowance_used=8, amount=0)),
    ("a refusal uses nothing of it",
     [lambda ledger: refuses("insufficient_credits")(ledger, ask.deduct("u", costs(99)))], ask.get_balance("u"),
     reads(available=25)),
    ("it ends with the month", [at("2026-02-28T23:59:59.999999"), ask.deduct("u", costs(10)), at("2026-03-01")],
     ask.deduct("u", costs(3)), gives(allowance_used=3)),
    ("and not before", [at("2026-02-28T00:00"), ask.deduct("u", costs(10)), at("2026-02-28T23:59:59.999999")],
     ask.deduct("u", costs(3)), gives(allowance_used=0)),
    ("what was used stays used when the plan changes",
     [ask.deduct("u", costs(8)), prices(plans={"free": FREE["free"] | {"free_allowance": 9}})],
     ask.deduct("u", costs(3)), gives(allowance_used=1, amount=-2)),
    ("a refund restores it", [ask.deduct("u", costs(8))], ask.refund_credits("@charge"),
     gives(amount=0, allowance_restored=8, allowance_lapsed=0, new_balance=20)),
    ("the balance first", [ask.deduct("u", costs(14))], ask.refund_credits("@charge", 6),
     gives(amount=4, allowance_restored=2, new_balance=20)),
    ("in parts", [ask.deduct("u", costs(14)), ask.refund_credits("@charge", 3)], ask.refund_credits("@charge", 3),
     gives(amount=1, allowance_restored=2)),
    ("what is restored pays again", [ask.deduct("u", costs(10)), ask.refund_credits("@charge")],
     ask.deduct("u", costs(9)), gives(allowance_used=9)),
    ("of a month that is over it lapses", [at("2026-01-31"), ask.deduct("u", costs(14)), at("2026-02-01")],
     ask.refund_credits("@charge"), gives(amount=4, allowance_restored=0, allowance_lapsed=10, new_balance=20)),
    ("also after the next has begun",
     [at("2026-01-31"), ask.deduct("u", costs(8)), at("2026-02-01"), ask.deduct("u", costs(9))],
     ask.refund_credits("@charge1", 5), gives(amount=0, allowance_restored=0, allowance_lapsed=5)),
    ("what lapsed is refunded",
     [at("2026-01-31"), ask.deduct("u", costs(8)), at("2026-02-01"), ask.refund_credits("@charge")],
     ask.refund_credits("@charge", user_id="u"), refuses("already_refunded")),
)
def test_the_allowance(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [at("2026-01-15"), free, on_plan, *given], call, check)
# fmt: on


@pytest.mark.parametrize(
    ("zone", "last", "first"),
    [
        ("America/New_York", "2026-03-01T04:59:59+00", "2026-03-01T05:00+00"),
        ("America/New_York", "2026-04-01T03:59:59+00", "2026-04-01T04:00+00"),
        ("Asia/Kolkata", "2024-02-29T18:29:59+00", "2024-02-29T18:30+00"),
        ("Pacific/Apia", "2011-12-30T09:59:59+00", "2012-01-01T00:00+14"),
    ],
)
def test_a_month_is_the_local_one(conn: Connection, clock: Clock, zone: str, last: str, first: str) -> None:
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"m": "input_tokens"}, "plans": FREE, "default_plan": "free", "timezone": zone})
    conn.execute("set timezone = 'Pacific/Kiritimati'")
    clock.set(last)
    assert manager.deduct_credits("u", 10).or_raise().allowance_used == 10
    if zone != "Pacific/Apia":
        assert manager.deduct_credits("u", 1).error == "insufficient_credits"
    clock.set(first)
    assert manager.deduct_credits("u", 10).or_raise().allowance_used == 10
    assert manager.verify_ledger() == []


def test_an_account_with_a_hold_of_nothing_is_charged_like_a_plain_one(ledger: Ledger) -> None:
    seed = random.Random(3)
    for user in ("plain", "held"):
        ask.add_credits(user, 300)(ledger)
    ask.reserve_credits("held", 0, ttl=2592000)(ledger)

    def answer(user: str, *arguments: Any) -> Any:
        try:
            with ledger.conn.transaction():
                row = ledger.one(ask.deduct(user, *arguments))
        except psycopg.Error as error:
            return error.sqlstate, error.diag.message_primary, error.diag.message_hint
        return {name: value for name, value in row.items() if name not in ("transaction_id", "user_id", "revision")}

    seen = []
    for _ in range(200):
        usage = seed.choice(
            [
                costs(f"{seed.randrange(10**4)}e-3"),
                costs(seed.choice([0, 1, 40, 1000])),
                {"model": "ratio", "input_tokens": 1},
                {"model": seed.choice(["gpt-4", "unknown", ""]), "input_tokens": seed.randrange(900)},
                {"model": "gpt", "tool_calls": ["browse"]},
                {"model": "any", "points": seed.choice([-1, 10**15, "1", None])},
                {"fixed_job": seed.choice(["report", "none"])},
                {"model": "gpt", "token": 1},
                seed.choice(["[]", '"gpt"', "5", "null", None]),
            ]
        )
        rest = (seed.choice([None, "a", "b", f"k{seed.random()}", " "]), seed.choice([None, None, {"a": 1}]))
        answers = [answer(user, usage, *rest) for user in ("plain", "held")]
        assert answers[0] == answers[1], (usage, rest)
        seen.append(answers[0])
    assert ledger.sql("select count(distinct (balance, carry, seq)) from ducto_private.accounts") == [(1,)]
    assert {row["error"] for row in seen if isinstance(row, dict)} == {
        None,
        "insufficient_credits",
        "idempotency_conflict",
    }
    assert {row["idempotent"] for row in seen if isinstance(row, dict)} == {True, False}


def test_admission_is_its_formula(ledger: Ledger) -> None:
    ledger.publish(plans=FREE, default_plan="free")
    seed = random.Random(7)
    answers = set()
    for number in range(40):
        user = f"u{number}"
        balance, limit, used = seed.randint(-10, 30), seed.choice([0, 0, 7]), seed.randint(0, 10)
        ask.add_credits(user, 100)(ledger)
        if used:
            ask.deduct_credits(user, used)(ledger)
        ask.set_credit_limit(user, 10**6)(ledger)
        holds = [
            ledger.one(ask.reserve_credits(user, seed.randint(0, 12)))["amount"] for _ in range(seed.randint(0, 2))
        ]
        ask.remove_credits(user, 100 - balance)(ledger) if balance < 100 else None
        ask.set_credit_limit(user, limit)(ledger)
        held, left = sum(holds), 10 - used
        least = seed.choice([None, 0, 3, 20])
        for amount in range(0, 40, seed.randint(1, 7)):
            for call, floor in (
                (ask.reserve_credits(user, amount, min_balance=least), (5 if least is None else least) - limit),
                (ask.reserve(user, costs(amount), min_balance=least), (5 if least is None else least) - limit),
                (ask.deduct_credits(user, amount), 5 - limit),
                (ask.deduct(user, costs(amount)), 5 - limit),
            ):
                net = max(0, held + amount - left)
                admitted = amount == 0 or net == 0 or balance - net >= floor
                with ledger.conn.transaction(force_rollback=True):
                    error = ledger.one(call)["error"]
                assert error == (None if admitted else "insufficient_credits"), (balance, held, left, floor, amount)
                answers.add((error, net == 0, balance < 0))
        largest = max(0, left - held + max(0, balance - (5 - limit)))
        assert ledger.one(ask.get_balance(user))["available"] == largest
        with ledger.conn.transaction(force_rollback=True):
            assert ledger.one(ask.reserve_credits(user, largest))["error"] is None
        assert ledger.one(ask.reserve_credits(user, largest + 1))["error"] == "insufficient_credits"
    assert len(answers) >= 6


def test_the_shortfall_is_its_formula(ledger: Ledger) -> None:
    seed = random.Random(11)
    ledger.publish(plans=FREE, default_plan="free", overrun="reject")
    short = 0
    for number in range(120):
        user = f"u{number}"
        balance, limit, used = seed.randint(-15, 30), seed.choice([0, 0, 8]), seed.randint(0, 10)
        held, others = seed.randint(0, 20), seed.choice([0, 0, 6])
        ask.add_credits(user, 100)(ledger)
        if used:
            ask.deduct_credits(user, used)(ledger)
        ask.set_credit_limit(user, 10**6)(ledger)
        mine = ledger.one(ask.reserve_credits(user, held))["reservation_id"]
        ask.reserve_credits(user, others)(ledger)
        ask.remove_credits(user, 100 - balance)(ledger)
        ask.set_credit_limit(user, limit)(ledger)
        left = 10 - used
        for charged in (0, held, held + 1, held + seed.randint(0, 40)):
            missing = max(0, charged - held - max(0, balance + left + limit - held - others)) if charged > held else 0
            short += missing > 0
            final = seed.random() < 0.5
            with ledger.conn.transaction(force_rollback=True):
                answer = ledger.one(ask.deduct_credits(user, charged, mine, final=final))
                assert answer["shortfall"] == missing, (balance, left, limit, held, others, charged)
                if missing:
                    assert answer["error"] == "insufficient_credits"
                else:
                    paid = min(left, charged)
                    assert (answer["error"], answer["allowance_used"], answer["amount"]) == (None, paid, paid - charged)
                    still = others + (0 if final else max(0, held - charged))
                    assert ledger.one(ask.get_balance(user))["reserved"] == still
    assert short > 50

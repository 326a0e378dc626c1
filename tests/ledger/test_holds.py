"""Holds: taking, extending, releasing and reading them; what they keep, and how they expire."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
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
    but,
    charge,
    costs,
    debt,
    gives,
    hold,
    later,
    lists,
    poor,
    prices,
    raises,
    reads,
    refuses,
    reject,
    replays,
    rich,
    rolled_back,
    settle,
    table,
    team,
    tell,
)
from sessions import Arena


# fmt: off
@table(
    ("no such account", [], ask.reserve("new", costs(1)), refuses("account_not_found")),
    ("nor for an amount, even of 0", [], ask.reserve_credits("new", 0), refuses("account_not_found")),
    ("an estimate holds the next whole credit", [rich], ask.reserve("u", costs("1.000000000001")),
     gives(user_id="u", amount=2, balance=100, reserved_total=2, idempotent=False, warnings=[], revision=2)),
    ("a whole estimate holds itself", [rich], ask.reserve("u", costs(2)), gives(amount=2)),
    ("an estimate of nothing holds nothing", [rich], ask.reserve("u", {}), gives(amount=0, reserved_total=0)),
    ("a job can be held", [rich], ask.reserve("u", {"fixed_job": "report"}), gives(amount=7)),
    ("a known amount is held", [rich], ask.reserve_credits("u", 95), gives(amount=95, reserved_total=95)),
    ("all but min_balance at most", [rich], ask.reserve_credits("u", 96), refuses("insufficient_credits")),
    ("the hold's own least balance", [rich], ask.reserve_credits("u", 100, min_balance=0), gives(amount=100)),
    ("which may be more", [rich], ask.reserve_credits("u", 51, min_balance=50), refuses("insufficient_credits")),
    ("null is the config's", [rich], ask.reserve_credits("u", 96, min_balance=None), refuses("insufficient_credits")),
    ("other holds claim theirs", [rich, hold], ask.reserve_credits("u", 66), refuses("insufficient_credits")),
    ("and leave the rest", [rich, hold], ask.reserve_credits("u", 65), gives(reserved_total=95)),
    ("expired ones do not", [rich, hold, later(minutes=10)], ask.reserve_credits("u", 95), gives(reserved_total=95)),
    ("released ones do not", [rich, hold, ask.release_reservation("@hold")], ask.reserve_credits("u", 95), gives()),
    ("settled ones claim what was charged", [rich, hold, ask.deduct("u", costs(1), hold="@hold")], hold,
     gives(balance=99)),
    ("0 passes in debt", [poor, ask.remove_credits("u", 9)], ask.reserve_credits("u", 0), gives(amount=0, balance=-8)),
    ("0 passes beside holds that claim all", [rich, ask.reserve_credits("u", 95)], ask.reserve_credits("u", 0),
     gives(reserved_total=95)),
    ("a credit limit is admitted", [rich, ask.set_credit_limit("u", 9)], ask.reserve_credits("u", 104), gives()),
    ("and no more", [rich, ask.set_credit_limit("u", 9)], ask.reserve_credits("u", 105),
     refuses("insufficient_credits")),
    ("the largest amount", [rich], ask.reserve_credits("u", MOST), refuses("insufficient_credits")),
    ("the largest hold", [ask.add_credits("u", MOST)], ask.reserve_credits("u", MOST, min_balance=0),
     gives(amount=MOST)),
    ("no hold lives 0 seconds", [rich], ask.reserve_credits("u", 1, ttl=0),
     raises("22023", "p_ttl_seconds", "between 1 and 2592000")),
    ("nor over 30 days", [rich], ask.reserve("u", costs(1), ttl=2592001), raises("22023", "p_ttl_seconds")),
    ("30 days it may", [rich], ask.reserve("u", costs(1), ttl=2592000), gives()),
    ("nulls are defaults", [at("2026-01-01"), rich], ask.reserve("u", costs(1), operation_type=None, ttl=None),
     gives(expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("an operation has a name", [rich], ask.reserve("u", costs(1), operation_type=" "),
     raises("22023", "p_operation_type")),
    ("a model has at most 255", [rich], ask.reserve_credits("u", 1, model=LONG), raises("22023", "p_model", "255")),
    ("a repeated key holds nothing", [rich, ask.reserve("u", costs(30), key="k"), ask.deduct_credits("u", 60)],
     ask.reserve("u", costs(30), key="k"), replays(amount=30, balance=100, reserved_total=30)),
    ("nor after its hold has ended",
     [rich, ask.reserve("u", costs(30), key="k"), ask.deduct("u", costs(9), hold="@hold")],
     ask.reserve("u", costs(30), key="k"), replays(amount=30)),
    ("1 is 1.0", [rich, ask.reserve("u", costs(30), key="k")], ask.reserve("u", costs("30.0"), key="k"),
     gives(idempotent=True, reserved_total=30)),
    ("metadata, least balance and time are no part of the request", [rich, ask.reserve("u", costs(30), key="k")],
     ask.reserve("u", costs(30), metadata={"a": 1}, min_balance=90, ttl=5, key="k"),
     gives(idempotent=True, reserved_total=30)),
    ("usage is", [rich, ask.reserve("u", costs(30), key="k")], ask.reserve("u", costs(31), key="k"),
     refuses("idempotency_conflict")),
    ("the operation is", [rich, ask.reserve("u", costs(30), key="k")], ask.reserve("u", costs(30), "chat", key="k"),
     refuses("idempotency_conflict")),
    ("the model is", [rich, ask.reserve_credits("u", 30, key="k")], ask.reserve_credits("u", 30, model="gpt", key="k"),
     refuses("idempotency_conflict")),
    ("a request id may name a hold and its settlement",
     [rich, ask.reserve("u", costs(30), key="k"), ask.deduct("u", costs(9), "k", hold="@hold")],
     ask.reserve("u", costs(30), key="k"), replays()),
    ("refusals are not remembered",
     [rich, lambda ledger: refuses("insufficient_credits")(ledger, ask.reserve_credits("u", 99, key="k")), rich],
     ask.reserve_credits("u", 99, key="k"), gives(idempotent=False)),
)
def test_reserve(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("credits are added", [rich, hold], ask.extend_reservation("@hold", 10),
     gives(reservation_id="@hold", user_id="u", amount=40, balance=100, reserved_total=40, idempotent=False)),
    ("up to the floor", [rich, hold], ask.extend_reservation("@hold", 65), gives(amount=95)),
    ("no further", [rich, hold], ask.extend_reservation("@hold", 66),
     refuses("insufficient_credits", balance=100, reserved_total=30)),
    ("the hold's own floor", [rich, ask.reserve_credits("u", 30, min_balance=0)], ask.extend_reservation("@hold", 70),
     gives(amount=100)),
    ("nothing is added in debt", [rich, hold, ask.remove_credits("u", 200)], ask.extend_reservation("@hold"),
     gives(amount=30)),
    ("time counts from now", [at("2026-01-01T00:00"), rich, hold, at("2026-01-01T00:09")],
     ask.extend_reservation("@hold", ttl=600), gives(amount=30, expires_at=datetime(2026, 1, 1, 0, 19, tzinfo=UTC))),
    ("and never shortens", [at("2026-01-01T00:00"), rich, hold, at("2026-01-01T00:01")],
     ask.extend_reservation("@hold", ttl=60), gives(expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("without a time it stays", [at("2026-01-01T00:00"), rich, hold, at("2026-01-01T00:01")],
     ask.extend_reservation("@hold", 1), gives(expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("its owner may be named", [rich, hold], ask.extend_reservation("@hold", 1, user_id="u"), gives(amount=31)),
    ("an id that is none", [rich], ask.extend_reservation("x", 1, user_id="u"), refuses("reservation_not_found")),
    ("an unknown id", [rich], ask.extend_reservation(UNKNOWN, 1, user_id="u"), refuses("reservation_not_found")),
    ("no id", [rich], ask.extend_reservation(None, 1, user_id="u"), refuses("reservation_not_found")),
    ("another's hold", [rich, ask.add_credits("v", 9), hold], ask.extend_reservation("@hold", 1, user_id="v"),
     refuses("reservation_not_found")),
    ("another's hold for a user never seen", [rich, hold], ask.extend_reservation("@hold", 1, user_id="ghost"),
     refuses("reservation_not_found")),
    ("a settled one", [rich, hold, ask.deduct("u", costs(1), hold="@hold")],
     ask.extend_reservation("@hold", user_id="u"), refuses("reservation_not_active")),
    ("a released one", [rich, hold, ask.release_reservation("@hold")], ask.extend_reservation("@hold", user_id="u"),
     refuses("reservation_not_active")),
    ("an expired one", [rich, hold, later(minutes=10)], ask.extend_reservation("@hold", ttl=600, user_id="u"),
     refuses("reservation_not_active")),
    ("an extended one is not expired",
     [rich, hold, later(minutes=9), ask.extend_reservation("@hold", ttl=600), later(minutes=9)],
     ask.extend_reservation("@hold", ttl=600), gives(amount=30)),
    ("0 seconds", [rich, hold], ask.extend_reservation("@hold", ttl=0), raises("22023", "p_ttl_seconds")),
    ("31 days", [rich, hold], ask.extend_reservation("@hold", ttl=2592001), raises("22023", "p_ttl_seconds")),
    ("a repeated key adds nothing, also when the hold has ended",
     [rich, hold, ask.extend_reservation("@hold1", 5, key="k"), ask.release_reservation("@hold")],
     ask.extend_reservation("@hold1", 5, key="k"), replays(amount=35, reserved_total=35)),
    ("another amount under the key", [rich, hold, ask.extend_reservation("@hold", 5, key="k")],
     ask.extend_reservation("@hold", 6, key="k", user_id="u"), refuses("idempotency_conflict")),
    ("another hold under the key", [rich, hold, hold, ask.extend_reservation("@hold1", 5, key="k")],
     ask.extend_reservation("@hold2", 5, key="k", user_id="u"), refuses("idempotency_conflict")),
    ("a hold's key", [rich, ask.reserve_credits("u", 5, key="k")],
     ask.extend_reservation("@hold", 5, key="k", user_id="u"), refuses("idempotency_conflict")),
)
def test_extend_reservation(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("a hold is given back", [rich, hold, hold], ask.release_reservation("@hold"),
     gives(reservation_id="@hold", user_id="u", amount=0, balance=100, reserved_total=30)),
    ("its owner may be named", [rich, hold], ask.release_reservation("@hold", user_id="u"), gives(reserved_total=0)),
    ("releasing twice is no error, and writes nothing", [rich, hold, ask.release_reservation("@hold")],
     ask.release_reservation("@hold"), reads(amount=0, reserved_total=0)),
    ("nor is releasing an expired one", [rich, hold, later(minutes=10)], ask.release_reservation("@hold"), gives()),
    ("a settled one", [rich, hold, ask.deduct("u", costs(1), hold="@hold")],
     ask.release_reservation("@hold", user_id="u"), refuses("reservation_not_active")),
    ("after parts the rest is given back", [rich, hold, ask.deduct("u", costs(10), hold="@hold", final=False)],
     ask.release_reservation("@hold"), gives(balance=90, reserved_total=0)),
    ("an id that is none", [rich], ask.release_reservation("x", user_id="u"), refuses("reservation_not_found")),
    ("an unknown id", [rich], ask.release_reservation(UNKNOWN, user_id="u"), refuses("reservation_not_found")),
    ("another's hold", [rich, ask.add_credits("v", 9), hold], ask.release_reservation("@hold", user_id="v"),
     refuses("reservation_not_found")),
    ("another's hold for a user never seen", [rich, hold], ask.release_reservation("@hold", user_id="ghost"),
     refuses("reservation_not_found")),
)
def test_release_reservation(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("as it was taken", [at("2026-01-01"), rich, ask.reserve("u", costs("1.5"), "chat", metadata={"a": 1}, key="k")],
     ask.get_reservation("@hold"),
     reads(reservation_id="@hold", account_id="u", actor_id=None, status="active", amount=2, charged=0,
         operation_type="chat", model="any", metrics=costs("1.5"), pricing_version=1, plan_id=None,
         idempotency_key="k", metadata={"a": 1}, created_at=datetime(2026, 1, 1, tzinfo=UTC),
         expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC), ended_at=None)),
    ("a known amount has no metrics, but a model", [rich, ask.reserve_credits("u", 5, model="gpt")],
     ask.get_reservation("@hold", "u"), reads(amount=5, metrics=None, model="gpt", operation_type="usage")),
    ("in parts", [rich, hold, ask.deduct("u", costs(9), hold="@hold", final=False)], ask.get_reservation("@hold"),
     reads(status="active", amount=21, charged=9, ended_at=None)),
    ("settled", [at("2026-01-01"), rich, hold, ask.deduct("u", costs(9), hold="@hold")], ask.get_reservation("@hold"),
     reads(status="settled", amount=0, charged=9, ended_at=datetime(2026, 1, 1, tzinfo=UTC))),
    ("released", [at("2026-01-01"), rich, hold, ask.release_reservation("@hold")], ask.get_reservation("@hold"),
     reads(status="released", amount=0, charged=0, ended_at=datetime(2026, 1, 1, tzinfo=UTC))),
    ("expired, though nothing has recorded it", [at("2026-01-01"), rich, hold, at("2026-01-02")],
     ask.get_reservation("@hold"), reads(status="expired", amount=0, ended_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("expired, recorded by the next change", [at("2026-01-01"), rich, hold, at("2026-01-02"), rich],
     ask.get_reservation("@hold"), reads(status="expired", amount=0, ended_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("an id that is none", [], ask.get_reservation("x"), lists({"error": "reservation_not_found", "amount": 0})),
    ("an unknown id", [], ask.get_reservation(UNKNOWN), lists({"error": "reservation_not_found"})),
    ("another's", [rich, hold], ask.get_reservation("@hold", "v"), lists({"error": "reservation_not_found"})),
    ("nobody has no holds", [], ask.list_reservations("new"), lists()),
    ("the active ones, newest first",
     [at("2026-01-01T00:00"), rich, hold, later(minutes=1), hold, ask.release_reservation("@hold1"),
         later(minutes=1), hold], ask.list_reservations("u"),
     lists({"reservation_id": "@hold3", "status": "active"}, {"reservation_id": "@hold2"})),
    ("all of them", [at("2026-01-01T00:00"), rich, hold, later(minutes=10), hold, later(minutes=1), hold],
     ask.list_reservations("u", False),
     lists({"status": "active"}, {"reservation_id": "@hold2"}, {"reservation_id": "@hold1", "status": "expired"})),
    ("none that has just expired", [rich, hold, later(minutes=10)], ask.list_reservations("u"), lists()),
    ("page by page", [at("2026-01-01T00:00"), rich, hold, later(minutes=1), hold, later(minutes=1), hold],
     ask.list_reservations("u", None, 1, "2026-01-01T00:02+00"), lists({"reservation_id": "@hold2"})),
    ("0 of them", [], ask.list_reservations("u", limit=0), raises("22023", "p_limit", "1 and 1000")),
    ("1001 of them", [], ask.list_reservations("u", limit=1001), raises("22023", "p_limit", "1 and 1000")),
)
def test_reading_holds(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("its price", [rich, hold, prices(models={"any": "points * 9"})], settle(3), gives(cost=3)),
    ("models that are gone", [rich, hold, prices(models={"other": "input_tokens"})], settle(3), gives(cost=3)),
    ("metrics that are gone", [rich, hold, prices(models={"o": "input_tokens"}, metrics={})], settle(3), gives(cost=3)),
    ("its rounding", [prices(rounding="up"), rich, hold, prices()], ask.deduct("u", costs("2.1"), hold="@hold"),
     gives(amount=-3)),
    ("its overrun", [reject, rich, hold, debt], settle(101), refuses("insufficient_credits", shortfall=1)),
    ("its overrun, the other way", [rich, hold, reject], settle(101), gives(balance_after=-1)),
    ("not the present one", [rich, hold, prices(models={"other": "input_tokens"})],
     ask.deduct("u", {"model": "other", "input_tokens": 1}, hold="@hold"),
     gives(amount=-30, warnings=["priced_by_hold"])),
    ("its plan's rates, also when the plan is gone",
     [prices(plans={"p": FREE["free"] | {"id": "p", "rate_overrides": {"any": "points * 2"}}}, default_plan="p"),
         ask.set_credit_limit("u", 100), hold, prices()], settle(8), gives(cost=16, allowance_used=10, amount=-6)),
    ("the allowance is that of today",
     [prices(plans=FREE, default_plan="free"), ask.set_credit_limit("u", 100), hold,
         prices(plans={"free": FREE["free"] | {"free_allowance": 4}})], settle(8), gives(allowance_used=4, amount=-4)),
)
def test_a_hold_keeps_the_terms_of_its_day(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


bounded = ask.reserve_credits("u", 10, overrun="bounded")


def part(amount: int | str, **more: Any) -> Call:
    return ask.deduct_credits("u", amount, "@hold", final=False, **more)


def end(amount: int | str, **more: Any) -> Call:
    return ask.deduct_credits("u", amount, "@hold", **more)


# fmt: off
@table(
    ("parts to its end", [bounded, part(4)], part(6), gives(amount=-6, warnings=[])),
    ("no part beyond", [bounded, part(4)], part(7), refuses("hold_exceeded", shortfall=1)),
    ("nor by a fraction", [bounded, part(4)], part("6.01"), refuses("hold_exceeded", shortfall=1)),
    ("however far", [bounded, part(4)], part(1000), refuses("hold_exceeded", shortfall=994)),
    ("a smaller part after that", [bounded, but(refuses("hold_exceeded", shortfall=1), part(11))], part(10), gives()),
    ("a part of nothing", [bounded, part(10)], part(0), gives(amount=0, warnings=[])),
    ("a usage", [bounded], ask.deduct("u", costs("10.1"), hold="@hold", final=False),
     refuses("hold_exceeded", shortfall=1)),
    ("the end takes the rest", [bounded, part(4)], end(1000),
     gives(amount=-6, cost=1000, balance_after=90, shortfall=0, warnings=["hold_exceeded"])),
    ("and keeps the full cost", [bounded, end("12.5")], ask.get_transaction("@charge"),
     reads(amount=-10, cost=Decimal("12.5"), carry_after=0, warnings=["hold_exceeded"])),
    ("which is explained", [bounded, ask.deduct("u", costs("12.5"), hold="@hold")],
     ask.explain_transaction("@charge"), lambda ledger, call: _explains(ledger, call, "12.5", "10")),
    ("replayed", [bounded, end(1000, key="k")], end(1000, key="k"), replays(cost=1000, amount=-10)),
    ("replayed without a key", [bounded, end(1000)], end(1000), replays(amount=-10)),
    ("nothing is left", [bounded, part(10)], end(5), gives(amount=0, cost=5, warnings=["hold_exceeded"])),
    ("within it all is as ever", [bounded, part(4)], end(3), gives(amount=-3, warnings=[])),
    ("extended", [bounded, part(4), ask.extend_reservation("@hold", 5)], part(11), gives(amount=-11)),
    ("no further", [bounded, part(4), ask.extend_reservation("@hold", 5)], part(12),
     refuses("hold_exceeded", shortfall=1)),
    ("its costs count, whatever was carried", [ask.deduct_credits("u", "0.9"), bounded, part("9.5")], part("0.5"),
     gives(amount=0, warnings=[])),
    ("not its credits", [ask.deduct_credits("u", "0.9"), bounded, part("9.5")], part("0.6"),
     refuses("hold_exceeded", shortfall=1)),
    ("the fraction that is left", [ask.deduct_credits("u", "0.9"), bounded, part("9.5")], end(7),
     gives(amount=0, cost=7, warnings=["hold_exceeded"])),
    ("expired, what it held last", [bounded, part(4), later(minutes=10)], part(7),
     refuses("hold_exceeded", shortfall=1)),
    ("that much it charges", [bounded, part(4), later(minutes=10)], part(6),
     gives(amount=-6, warnings=["reservation_expired"])),
    ("once", [bounded, later(minutes=10), part(6)], part(5), refuses("hold_exceeded", shortfall=1)),
    ("the end of an expired one", [bounded, part(4), later(minutes=10)], end(7),
     gives(amount=-6, cost=7, warnings=["hold_exceeded", "reservation_expired"])),
    ("what has no price is charged as it was held", [bounded, part("4.5")],
     ask.deduct("u", {"fixed_job": "none"}, hold="@hold"), gives(amount=-6, warnings=["priced_by_hold"])),
    ("into debt, if the credits are gone", [bounded, ask.remove_credits("u", 95)], end(11),
     gives(balance_after=-5, shortfall=0, warnings=["hold_exceeded"])),
    ("in a batch", [bounded, part(4)],
     ask.deduct_batch([{"user_id": "u", "amount": 7, "reservation_id": "@hold", "final": False},
                       {"user_id": "u", "amount": 6, "reservation_id": "@hold"}]),
     lambda ledger, call: _shows(ledger, call, ("hold_exceeded", 0), (None, -6))),
    ("as the config says", [prices(overrun="bounded"), hold], part(31), refuses("hold_exceeded", shortfall=1)),
    ("and said when it was taken", [prices(overrun="bounded"), hold, prices()], part(31),
     refuses("hold_exceeded", shortfall=1)),
    ("as the hold says", [prices(overrun="bounded"), ask.reserve_credits("u", 30, overrun="debt")], part(31),
     gives(amount=-31, warnings=["hold_exceeded"])),
    ("or refuses", [ask.reserve_credits("u", 30, overrun="reject")], part(101),
     refuses("insufficient_credits", shortfall=1)),
    ("which takes what is free", [ask.reserve_credits("u", 30, overrun="reject")], part(100),
     gives(amount=-100, warnings=[])),
    ("a debt is told", [ask.reserve_credits("u", 10), part(1000), part(1000), part(1000)], part(1000),
     gives(balance_after=-3900, warnings=["hold_exceeded"])),
    ("from its first credit", [ask.reserve_credits("u", 10), part(9)], part("1.01"), gives(warnings=["hold_exceeded"])),
    ("none within the hold", [ask.reserve_credits("u", 10), part(9)], part(1), gives(warnings=[])),
    ("an estimate", [ask.reserve("u", costs("9.5"), overrun="bounded")], end(11), gives(amount=-10)),
    ("nothing at all", [ask.reserve_credits("u", 0, overrun="bounded")], end(1), gives(amount=0, cost=1)),
    ("of a pool", [team("crew", "ann"), ask.reserve_team_credits("crew", "ann", 10, overrun="bounded")],
     ask.deduct_team_credits("crew", "ann", 11, "@hold", final=False), refuses("hold_exceeded", shortfall=1)),
    ("of a pool's estimate", [team("crew", "ann"), ask.reserve_team("crew", "ann", costs(10), overrun="bounded")],
     ask.deduct_team("crew", "ann", costs(11), hold="@hold"), gives(amount=-10, warnings=["hold_exceeded"])),
    ("of no kind", [], ask.reserve_credits("u", 1, overrun="forgive"),
     raises("22023", "p_overrun", "forgive", "debt", "reject", "bounded")),
)
def test_what_passes_a_hold(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)
# fmt: on


def _explains(ledger: Ledger, call: Call, cost: str, bounded_cost: str) -> None:
    row = ledger.one(call)
    assert (row["cost"], row["parts"]["bounded_cost"]) == (Decimal(cost), Decimal(bounded_cost))


def _shows(ledger: Ledger, call: Call, *rows: tuple[str | None, int]) -> None:
    assert [(row["error"], row["amount"]) for row in ledger.run(call)] == list(rows)


@pytest.mark.parametrize("rounding", ["up", "down", "half_up"])
def test_a_bounded_hold_counts_costs_before_they_are_rounded(ledger: Ledger, rounding: str) -> None:
    ledger.publish(rounding=rounding)
    for step in (rich, bounded, part("3.3"), part("3.3"), part("3.4")):
        step(ledger)
    refuses("hold_exceeded", shortfall=1)(ledger, part("0.1"))
    gives(amount=0, cost=1)(ledger, end(1))


def test_parallel_steps_of_one_run_share_its_budget(arena: Arena) -> None:
    arena.given(rich, ask.reserve_credits("u", 50, overrun="bounded"))
    (run,) = arena.ledger.ids["hold"]
    step = ask.deduct_credits("u", 10, run, final=False)
    assert arena.race(16, step) == {"ok": 5, "hold_exceeded": 11}
    reads(status="active", amount=0, charged=50)(arena.ledger, ask.get_reservation(run))
    assert arena.race(2, ask.deduct_credits("u", 9, run)) == {"ok": 1, "replayed": 1}
    reads(balance=50, reserved=0)(arena.ledger, ask.get_balance("u"))
    arena.sound()


def test_parallel_steps_of_a_team_share_its_budget(arena: Arena) -> None:
    arena.given(team("crew", "ann"), ask.reserve_team_credits("crew", "ann", 50, overrun="bounded"))
    (run,) = arena.ledger.ids["hold"]
    steps = [
        ask.deduct_team("crew", "ann", costs(7), hold=run, final=False),
        ask.extend_reservation(run, 1, user_id="crew"),
    ]
    told = [row["error"] for row in arena.meet(16, lambda number: steps[number % 2])]
    assert (told.count(None), told.count("hold_exceeded")) in {(15, 1), (16, 0)}
    arena.sound()


def test_a_charge_says_the_version_of_its_price(ledger: Ledger) -> None:
    for step in (rich, hold, prices(models={"any": "points * 2"})):
        step(ledger)
    settle(3)(ledger)
    reads(pricing_version=1, reservation_id="@hold", cost=3)(ledger, ask.get_transaction("@charge"))
    ask.deduct("u", costs(3))(ledger)
    reads(pricing_version=2, reservation_id=None, cost=6)(ledger, ask.get_transaction("@charge"))


def test_the_next_success_records_what_expired(ledger: Ledger) -> None:
    for number, call in enumerate(
        (
            rich,
            hold,
            ask.extend_reservation("@hold2", 1),
            ask.release_reservation("@hold2"),
            ask.set_credit_limit("u", 5),
            ask.deduct("u", costs("0.1")),
            ask.deduct_credits("u", 1, "@hold2"),
            ask.remove_credits("u", 1),
            ask.refund_credits("@charge", 1),
        )
    ):
        with rolled_back(ledger) as told:
            for step in (rich, charge, hold, ask.reserve_credits("u", 7, ttl=6000), later(minutes=10), call):
                step(told)
            statuses = dict(told.sql("select held, status from ducto_private.holds where status <> 'settled'"))
            assert statuses.get(30) == "expired" or number in (1, 3), call

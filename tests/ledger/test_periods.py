"""Periods as sentences: when they begin, what they hand on, and changes of plan to come."""

from datetime import UTC, datetime
from typing import Any

import pytest
from ledger_helpers import (
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    but,
    gives,
    raises,
    reads,
    refuses,
    table,
    team,
    tell,
)
from sessions import Arena


def plan(name: str, allowance: int = 100, **terms: Any) -> dict[str, Any]:
    return {"id": name, "name": name.title(), "free_allowance": allowance} | terms


def sold(*plans: dict[str, Any], timezone: str = "UTC", **config: Any) -> Step:
    """These plans are sold. The version that there was before fixed UTC, so another zone takes its place."""

    def step(ledger: Ledger) -> None:
        if timezone != "UTC":
            ledger.sql("delete from ducto_private.activations")
        ledger.publish(plans={p["id"]: p for p in plans}, min_balance=0, timezone=timezone, **config)

    return step


def day(text: str) -> datetime:
    """A time of UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def on(name: str, **named: Any) -> Call:
    return ask.set_user_plan("u", name, **named)


def period(start: str, end: str, left: int | None = None) -> Check:
    remaining = {} if left is None else {"allowance_remaining": left}
    return reads(period_start=day(start), period_end=day(end), **remaining)


free = plan("free", 10)
pro = plan("pro", 100, anchor="start")
max_ = plan("max", 300, anchor="start")
start = sold(free, pro, max_)
spend = ask.deduct_credits
left = ask.check_allowance("u")


# fmt: off
@table(
    ("a day", [sold(plan("p", period="day")), at("2026-03-05T10:00"), on("p")], left, period("2026-03-05",
     "2026-03-06")),
    ("a week begins on Monday", [sold(plan("p", period="week")), at("2026-03-05T10:00"), on("p")], left,
     period("2026-03-02", "2026-03-09")),
    ("also a Monday", [sold(plan("p", period="week")), at("2026-03-02"), on("p")], left,
     period("2026-03-02", "2026-03-09")),
    ("also a Sunday of another year", [sold(plan("p", period="week")), at("2027-01-03T23:59"), on("p")], left,
     period("2026-12-28", "2027-01-04")),
    ("a month", [sold(plan("p")), at("2026-02-28T23:59"), on("p")], left, period("2026-02-01", "2026-03-01")),
    ("a year", [sold(plan("p", period="year")), at("2028-02-29"), on("p")], left, period("2028-01-01", "2029-01-01")),
    ("of the config's zone", [sold(plan("p", period="year"), timezone="Europe/Berlin"), at("2026-12-31T23:30"),
     on("p")],
     left, period("2026-12-31T23:00", "2027-12-31T23:00")),
    ("a day of 25 hours", [sold(plan("p", period="day"), timezone="Europe/Berlin"), at("2026-10-25T12:00"), on("p")],
     left, period("2026-10-24T22:00", "2026-10-25T23:00")),
    ("a day whose midnight comes twice", [sold(plan("p", period="day"), timezone="America/Havana"),
     at("2026-11-01T05:30"), on("p")], left, period("2026-11-01T04:00", "2026-11-02T05:00")),
    ("one that has no midnight", [sold(plan("p", period="day"), timezone="America/Havana"), at("2026-03-08T05:00"),
     on("p")], left, period("2026-03-08T05:00", "2026-03-09T04:00")),
)
def test_the_calendar(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


def anchored(text: str, **terms: Any) -> list[Step]:
    return [sold(plan("p", anchor="start", **terms)), at(text), on("p")]


@table(
    ("it begins with the plan", anchored("2026-01-20T10:00"), left, period("2026-01-20T10:00", "2026-02-20T10:00")),
    ("and again a month later", [*anchored("2026-01-20T10:00"), at("2026-02-20T10:00")], left,
     period("2026-02-20T10:00", "2026-03-20T10:00")),
    ("not a moment earlier", [*anchored("2026-01-20T10:00"), at("2026-02-20T09:59:59.999999")], left,
     period("2026-01-20T10:00", "2026-02-20T10:00")),
    ("the 31st in February", [*anchored("2026-01-31"), at("2026-02-28")], left, period("2026-02-28", "2026-03-31")),
    ("in a leap year", [*anchored("2028-01-31"), at("2028-02-29T12:00")], left, period("2028-02-29", "2028-03-31")),
    ("in April", [*anchored("2026-01-31"), at("2026-05-30")], left, period("2026-04-30", "2026-05-31")),
    ("years later", [*anchored("2026-01-31"), at("2059-03-01")], left, period("2059-02-28", "2059-03-31")),
    ("29 February by years", [*anchored("2028-02-29", period="year"), at("2030-02-28")], left,
     period("2030-02-28", "2031-02-28")),
    ("in the next leap year", [*anchored("2028-02-29", period="year"), at("2032-03-01")], left,
     period("2032-02-29", "2033-02-28")),
    ("weeks of any weekday", [*anchored("2026-01-01T08:00", period="week"), at("2026-01-15T07:59")], left,
     period("2026-01-08T08:00", "2026-01-15T08:00")),
    ("400 days unseen", [*anchored("2026-01-01T08:00", period="day"), at("2027-02-05T08:00")], left,
     period("2027-02-05T08:00", "2027-02-06T08:00")),
    ("given by the caller", [start, at("2026-02-10"), on("pro", anchor=day("2026-01-31T10:00"))], left,
     period("2026-01-31T10:00", "2026-02-28T10:00")),
    ("who may give one to come", [start, at("2026-02-10"), on("pro", anchor=day("2026-02-15"))], left,
     period("2026-01-15", "2026-02-15")),
    ("at the same hour of another season", [sold(pro, timezone="Europe/Berlin"), at("2026-03-20T11:00"), on("pro"),
     at("2026-04-21")], left, period("2026-04-20T10:00", "2026-05-20T10:00")),
    ("at an hour that is missing that day", [sold(plan("p", anchor="start", period="day"), timezone="Europe/Berlin"),
     at("2026-03-28T01:30"), on("p"), at("2026-03-29T12:00")], left, period("2026-03-29T01:00", "2026-03-30T00:30")),
    ("at an hour that comes twice that day", [sold(plan("p", anchor="start", period="day"), timezone="Europe/Berlin"),
     at("2026-10-24T00:30"), on("p"), at("2026-10-25T12:00")], left, period("2026-10-25T00:30", "2026-10-26T01:30")),
    ("beginning at the second of the two", [sold(plan("p", anchor="start", period="day"), timezone="Europe/Berlin"),
     at("2026-10-25T01:30"), on("p")], left, period("2026-10-25T01:30", "2026-10-26T01:30")),
    ("a default plan begins with the account", [sold(pro, default_plan="pro"), at("2026-01-20T10:00"), spend("u", 40),
     at("2026-02-20T09:00"), spend("u", 1)], left, period("2026-01-20T10:00", "2026-02-20T10:00", 59)),
    ("a plan that a config lets begin so goes on from its month", [sold(plan("p")), at("2026-01-20"), on("p"),
     spend("u", 30), sold(plan("p", anchor="start")), at("2026-02-03"), spend("u", 5), at("2026-04-03")], left,
     period("2026-04-01", "2026-05-01", 100)),
    ("a period that began stays as it is", [sold(plan("p")), at("2026-01-20"), on("p"),
     sold(plan("p", period="day", anchor="start"))], left, period("2026-01-01", "2026-02-01")),
)
def test_anchors(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


def rolling(most: int, **terms: Any) -> list[Step]:
    return [sold(plan("p", 100, rollover=most, **terms)), on("p")]


@table(
    ("what is left is handed on", [*rolling(500), spend("u", 30), at("2026-02-01")], left,
     period("2026-02-01", "2026-03-01", 170)),
    ("no more than that", [*rolling(50), spend("u", 30), at("2026-02-01")], left, reads(allowance_remaining=150)),
    ("nothing where nothing is left", [*rolling(50), spend("u", 100), at("2026-02-01")], left,
     reads(allowance_remaining=100)),
    ("it is used first", [*rolling(50), at("2026-02-01"), spend("u", 50), at("2026-03-01")], left,
     reads(allowance_remaining=150)),
    ("unseen months hand on too", [*rolling(500), spend("u", 90), at("2026-04-01")], left,
     reads(allowance_remaining=310)),
    ("within the bound", [*rolling(250), spend("u", 90), at("2026-12-01")], left, reads(allowance_remaining=350)),
    ("400 days unseen", [*rolling(10**9, period="day"), spend("u", 90), at("2027-02-05")], left,
     reads(allowance_remaining=10 + 400 * 100)),
    ("10,000 days unseen", [*rolling(10**9, period="day"), at("2053-05-19")], left,
     reads(allowance_remaining=10_000 * 100 + 100)),
    ("nothing of it without one", [*rolling(0), at("2026-02-01")], left, reads(allowance_remaining=100)),
    ("by the config of the call", [*rolling(500), at("2026-03-10"), sold(plan("p", 10, rollover=1000))], left,
     reads(allowance_remaining=10 + 10 + 10)),
    ("charges take it", [*rolling(500), spend("u", 30), at("2026-02-01")], spend("u", 170),
     gives(allowance_used=170, amount=0)),
    ("and no more", [*rolling(500), spend("u", 30), at("2026-02-01")], spend("u", 171),
     refuses("insufficient_credits")),
    ("it is available", [*rolling(500), spend("u", 30), at("2026-02-01")], ask.get_balance("u"), reads(available=170)),
    ("a refund comes back to it", [*rolling(500), at("2026-02-01"), spend("u", 150), ask.refund_credits("@charge")],
     left, reads(allowance_remaining=200)),
    ("a change of plan hands on nothing", [sold(plan("p", rollover=500), free), on("p"), at("2026-02-01"), on("free")],
     left, reads(allowance_remaining=10)),
    ("nor does the way back", [sold(plan("p", rollover=500), free), on("p"), at("2026-02-01"), on("free"), on("p")],
     left, reads(allowance_remaining=100)),
    ("the same plan again is no change", [*rolling(500), at("2026-02-01"), on("p")], left,
     reads(allowance_remaining=200)),
)
def test_what_is_handed_on(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


jan20: list[Step] = [start, at("2026-01-20T10:00"), on("pro"), spend("u", 60)]
dropped = sold(free, max_)


@table(
    ("an upgrade at once keeps the period", [*jan20, at("2026-01-25"), on("max")], left,
     period("2026-01-20T10:00", "2026-02-20T10:00", 240)),
    ("and what was used", [*jan20, on("max"), spend("u", 200), on("pro")], left, reads(allowance_remaining=0)),
    ("to and fro grants nothing", [*jan20, on("max"), on("pro"), on("max"), on("pro")], left,
     period("2026-01-20T10:00", "2026-02-20T10:00", 40)),
    ("nor over a plan of the calendar", [*jan20, on("free"), at("2026-01-25"), on("pro")], left,
     period("2026-01-20T10:00", "2026-02-20T10:00", 40)),
    ("in another of its months", [*jan20, at("2026-01-25"), on("free"), at("2026-02-05"), on("pro")], left,
     period("2026-01-20T10:00", "2026-02-20T10:00", 40)),
    ("nor over none", [*jan20, ask.set_user_plan("u"), at("2026-02-19"), on("pro")], left,
     period("2026-01-20T10:00", "2026-02-20T10:00", 40)),
    ("a period that has ended is none", [*jan20, ask.set_user_plan("u"), at("2026-02-20T10:00"), on("pro")], left,
     period("2026-02-20T10:00", "2026-03-20T10:00", 100)),
    ("the calendar's month counts what it used of another plan", [*jan20, on("free")], left,
     period("2026-01-01", "2026-02-01", 0)),
    ("and what its rows gave back", [*jan20, ask.refund_credits("@charge", 55), on("free")], left,
     period("2026-01-01", "2026-02-01", 5)),
    ("but nothing of before its beginning",
     [start, at("2026-01-10"), on("free"), spend("u", 10), at("2026-01-20"), ask.refund_credits("@charge"),
      on("pro", anchor=day("2026-01-15"))], left, period("2026-01-15", "2026-02-15", 100)),
    ("an upgrade with an anchor", [*jan20, at("2026-01-25"), on("max", anchor=day("2026-01-25"))], left,
     period("2026-01-25", "2026-02-25", 300)),
    ("a new anchor of the same plan", [*jan20, at("2026-01-25"), on("pro", anchor=day("2026-01-24"))], left,
     period("2026-01-24", "2026-02-24", 100)),
    ("the present anchor again", [*jan20, on("pro", anchor=day("2026-01-20T10:00"))], left,
     period("2026-01-20T10:00", "2026-02-20T10:00", 40)),
    ("no anchor again", [*jan20, at("2026-03-01"), on("pro")], left, period("2026-02-20T10:00", "2026-03-20T10:00")),
    ("an anchor is none of the calendar's", [sold(free), on("free", anchor=day("2026-01-15"))], left,
     period("2026-01-01", "2026-02-01")),
    ("a team has periods too", [start, team("crew"), at("2026-01-20"), ask.set_user_plan("crew", "pro")],
     ask.check_allowance("crew"), period("2026-01-20", "2026-02-20")),
)
def test_changes_at_once(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


down = on("free", when="period_end")
in_max: list[Step] = [start, at("2026-01-31T10:00"), on("max"), spend("u", 60)]


@table(
    ("the present plan stays", jan20, down,
     gives(plan_id="pro", next_plan_id="free", next_plan_at=day("2026-02-20T10:00"), revision=3, warnings=[])),
    ("whoever reads sees it", [*jan20, down], ask.get_user_plan("u"),
     reads(plan_id="pro", next_plan_id="free", next_plan_at=day("2026-02-20T10:00"), allowance_remaining=40)),
    ("until it changes", [*jan20, down, at("2026-02-20T10:00")], ask.get_user_plan("u"),
     reads(plan_id="free", next_plan_id=None, next_plan_at=None, allowance_remaining=10,
         period_start=day("2026-02-20T10:00"), period_end=day("2026-03-01"))),
    ("by the plan's price", [*jan20, down, at("2026-02-21")], spend("u", 11), refuses("insufficient_credits")),
    ("and its allowance", [*jan20, down, at("2026-02-21")], spend("u", 10), gives(allowance_used=10)),
    ("which the next month has again", [*jan20, down, at("2026-02-21"), spend("u", 10), at("2026-03-01")], left,
     period("2026-03-01", "2026-04-01", 10)),
    ("months later too", [*jan20, down, at("2026-07-07")], left, period("2026-07-01", "2026-08-01", 10)),
    ("the anchor stays", [*in_max, on("pro", when="period_end"), at("2026-03-05")], left,
     period("2026-02-28T10:00", "2026-03-31T10:00", 100)),
    ("unless another is given", [*in_max, on("pro", when="period_end", anchor=day("2026-02-15")),
     at("2026-03-05")], left, period("2026-02-28T10:00", "2026-03-15", 100)),
    ("what was left is not handed on", [sold(plan("p", rollover=500), plan("q", 50, rollover=500)), on("p"),
     on("q", when="period_end"), at("2026-02-01")], left, reads(plan_id="q", allowance_remaining=50)),
    ("but after it by its own terms", [sold(plan("p", rollover=500), plan("q", 50, rollover=500)), on("p"),
     on("q", when="period_end"), at("2026-03-01")], left, reads(allowance_remaining=100)),
    ("each call replaces what was to come", [*jan20, down, on("pro")], ask.get_user_plan("u"),
     reads(plan_id="pro", next_plan_at=None, allowance_remaining=40)),
    ("also at the period's end", [*jan20, down, on("max", when="period_end"), at("2026-02-20T10:00")], left,
     reads(plan_id="max", allowance_remaining=300)),
    ("the present plan at the period's end takes it back", [*jan20, down, on("pro", when="period_end"),
     at("2026-02-20T10:00")], left, reads(plan_id="pro", allowance_remaining=100)),
    ("none from the period's end", [*jan20, ask.set_user_plan("u", None, "period_end"), at("2026-02-20T10:00")],
     ask.get_user_plan("u"), reads(plan_id=None, next_plan_at=None)),
    ("who is on none changes at once", [start, down], ask.get_user_plan("u"), reads(plan_id="free", next_plan_at=None)),
    ("a plan that is sold no more takes place", [*in_max, on("pro", when="period_end"), dropped, at("2026-03-05")],
     left, reads(plan_id="pro", allowance_remaining=100)),
    ("holds before it keep their plan",
     [*jan20, at("2026-01-25"), ask.reserve_credits("u", 5, ttl=2592000), down, at("2026-02-20T10:00")],
     ask.get_reservation("@hold"), reads(plan_id="pro", status="active")),
    ("their settlement has the allowance of then",
     [*jan20, at("2026-01-25"), ask.reserve_credits("u", 5, ttl=2592000), down, at("2026-02-20T10:00")],
     spend("u", 5, "@hold"), gives(allowance_used=5)),
)
def test_changes_at_the_end_of_a_period(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


trial = on("pro", until=day("2026-02-03"))
both: list[Step] = [sold(free, pro, max_, default_plan="free"), at("2026-01-20T10:00")]


@table(
    ("it is told", [*both], trial, gives(plan_id="pro", next_plan_id="free", next_plan_at=day("2026-02-03"))),
    ("then the default plan", [*both, trial, spend("u", 60), at("2026-02-03")], ask.get_user_plan("u"),
     reads(plan_id="free", allowance_remaining=10, period_start=day("2026-02-01"), next_plan_at=None)),
    ("which counts what was used in its month", [*both, trial, at("2026-02-02"), spend("u", 4), at("2026-02-03")], left,
     reads(plan_id="free", allowance_remaining=6)),
    ("or none", [start, at("2026-01-20"), trial, at("2026-02-03")], ask.get_user_plan("u"), reads(plan_id=None)),
    ("a team has no default plan", [both[0], team("crew"), at("2026-01-20"),
     ask.set_user_plan("crew", "pro", until=day("2026-02-03")), at("2026-02-03")], ask.get_user_plan("crew"),
     reads(plan_id=None)),
    ("unless a call has moved it on", [*both, trial, on("pro", until=day("2026-03-03")), at("2026-02-10")],
     ask.get_user_plan("u"), reads(plan_id="pro", next_plan_at=day("2026-03-03"))),
    ("for ever", [*both, trial, on("pro"), at("2026-02-10")], ask.get_user_plan("u"),
     reads(plan_id="pro", next_plan_at=None)),
    ("after a change at the period's end", [*both, on("max"),
     on("pro", when="period_end", until=day("2026-03-03"))], ask.get_user_plan("u"),
     reads(plan_id="max", next_plan_id="pro", next_plan_at=day("2026-02-20T10:00"))),
    ("then that", [*both, on("max"), on("pro", when="period_end", until=day("2026-03-03")), at("2026-02-21")],
     ask.get_user_plan("u"), reads(plan_id="pro", next_plan_id="free", next_plan_at=day("2026-03-03"))),
    ("then the default", [*both, on("max"), on("pro", when="period_end", until=day("2026-03-03")), at("2026-03-03")],
     ask.get_user_plan("u"), reads(plan_id="free", next_plan_at=None)),
    ("before the change it prevents it", [*both, on("max"), on("pro", when="period_end", until=day("2026-02-03"))],
     ask.get_user_plan("u"), reads(plan_id="max", next_plan_id="free", next_plan_at=day("2026-02-03"))),
    ("a time that has passed is now", [*both], on("pro", until=day("2026-01-20T09:00")),
     gives(plan_id="free", next_plan_at=None)),
)
def test_plans_that_end(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("an older event changes nothing", [start, on("pro", event_at=day("2026-01-05"))],
     on("max", event_at=day("2026-01-04")), gives(plan_id="pro", warnings=["superseded"], revision=1)),
    ("also after a cancellation", [start, on("pro", event_at=day("2026-01-03")),
     ask.set_user_plan("u", event_at=day("2026-01-05"))], on("pro", event_at=day("2026-01-04")),
     gives(plan_id=None, warnings=["superseded"])),
    ("one of the same time does", [start, on("pro", event_at=day("2026-01-05"))],
     on("max", event_at=day("2026-01-05")), gives(plan_id="max", warnings=[])),
    ("a call without one does, and the last stays", [start, on("pro", event_at=day("2026-01-05")), on("max")],
     on("pro", event_at=day("2026-01-04")), gives(plan_id="max", warnings=["superseded"])),
    ("the same key is the same answer", [start, on("pro", key="k"), on("max")], on("pro", key="k"),
     gives(plan_id="pro", idempotent=True, revision=1)),
    ("whenever its event was", [start, on("pro", event_at=day("2026-01-05"), key="k")],
     on("pro", event_at=day("2026-01-04"), key="k"), gives(plan_id="pro", idempotent=True)),
    ("with what was to come then", [*jan20, on("free", when="period_end", key="k"), on("pro")],
     on("free", when="period_end", key="k"),
     gives(plan_id="pro", next_plan_id="free", next_plan_at=day("2026-02-20T10:00"), idempotent=True)),
    ("also when the plan is sold no more", [start, on("pro", key="k"), dropped], on("pro", key="k"),
     gives(plan_id="pro", idempotent=True)),
    ("another plan is another request", [start, on("pro", key="k")], on("max", key="k"),
     refuses("idempotency_conflict")),
    ("another time too", [start, on("pro", key="k")], on("pro", when="period_end", key="k"),
     refuses("idempotency_conflict")),
    ("another anchor too", [start, on("pro", key="k")], on("pro", anchor=day("2026-01-01"), key="k"),
     refuses("idempotency_conflict")),
    ("another end too", [start, on("pro", key="k")], on("pro", until=day("2026-05-01"), key="k"),
     refuses("idempotency_conflict")),
    ("holds have these keys too", [start, on("pro"), ask.reserve_credits("u", 1, key="k")], on("pro", key="k"),
     refuses("idempotency_conflict")),
    ("and find them taken", [start, on("pro", key="k")], ask.reserve_credits("u", 1, key="k"),
     refuses("idempotency_conflict")),
    ("a refusal is not remembered", [start, but(refuses("plan_not_found"), on("gold", key="k"))], on("pro", key="k"),
     gives(plan_id="pro", idempotent=False)),
    ("no such moment", [start], on("pro", when="later"), raises("22023", "p_when", "now", "period_end")),
    ("no moment at all is now", [start], ask.set_user_plan("u", "pro", None), gives(plan_id="pro")),
    ("an anchor that is none", [start], on("pro", anchor="infinity"), raises("22023", "p_anchor")),
    ("an end that is none", [start], on("pro", until="-infinity"), raises("22023", "p_until")),
    ("an event that is none", [start], on("pro", event_at="0001-01-01"), raises("22023", "p_event_at")),
)
def test_events_of_a_payment_provider(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_change_to_come_is_an_event_when_it_was_due(ledger: Ledger) -> None:
    steps: list[Step] = [*jan20, down, at("2026-02-25"), spend("u", 1)]
    for step in steps:
        step(ledger)
    assert ledger.events("plan_changed")[-1] == (
        "plan_changed",
        {"from": "pro", "to": "free", "at": "2026-02-20T10:00:00+00:00"},
    )
    assert ledger.sql("select plan_id, plan_due_at from ducto_private.accounts") == [("free", None)]


@pytest.mark.parametrize("terms", [{"period": "fortnight"}, {"anchor": "sign-up"}, {"rollover": -1}], ids=str)
def test_terms_that_are_none(ledger: Ledger, terms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"plans\.p\.{next(iter(terms))}"):
        sold(plan("p", **terms))(ledger)


def test_calls_with_one_key_open_and_change_once(arena: Arena) -> None:
    arena.given(start)
    assert arena.race(8, ask.set_user_plan("new", "pro", key="k")) == {"ok": 1, "replayed": 7}
    assert arena.ledger.sql("select plan_id, revision from ducto_private.accounts") == [("pro", 1)]
    arena.sound()

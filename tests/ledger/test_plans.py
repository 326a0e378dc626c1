"""Plans as sentences: who is on which, what it gives, and its allowance from month to month."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    MOST,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    but,
    costs,
    gives,
    later,
    prices,
    raises,
    reads,
    refuses,
    replays,
    rich,
    table,
    team,
    tell,
)
from sessions import Arena, outcomes

PLANS: dict[str, Any] = {
    "free": {"id": "free", "name": "Free plan", "free_allowance": 10, "features": {"chat": True}},
    "pro": {
        "id": "pro",
        "name": "Pro",
        "free_allowance": 100,
        "rate_overrides": {"any": "points * 0.5", "gpt-4": "input_tokens * 2", "own": "input_tokens"},
        "features": {"chat": True, "seats": 5, "export": "csv"},
    },
    "bare": {"id": "bare", "name": "Bare"},
}
plans = prices(plans=PLANS, min_balance=0)
by_default = prices(plans=PLANS, min_balance=0, default_plan="free")
free = ask.set_user_plan("u", "free")
pro = ask.set_user_plan("u", "pro")


def without(*gone: str, **changes: Any) -> Step:
    """A version is published that has not these plans."""
    left = {name: plan for name, plan in PLANS.items() if name not in gone}
    return prices(plans=left, min_balance=0, **changes)


# fmt: off
@table(
    ("a plan opens an account", [plans], ask.set_user_plan("new", "pro"),
     gives(user_id="new", plan_id="pro", revision=1)),
    ("with its bonus", [prices(plans=PLANS, signup_bonus=50), ask.set_user_plan("new", "pro")], ask.get_balance("new"),
     reads(balance=50, revision=2)),
    ("an account there is gets none", [rich, prices(plans=PLANS, signup_bonus=50), pro], ask.get_balance("u"),
     reads(balance=100)),
    ("another plan", [plans, free], pro, gives(plan_id="pro", revision=2)),
    ("the same again", [plans, pro], pro, gives(plan_id="pro")),
    ("it is taken away", [plans, pro], ask.set_user_plan("u", None), gives(user_id="u", plan_id=None)),
    ("no plan named takes it away", [plans, pro], ask.set_user_plan("u"), gives(plan_id=None)),
    ("from one who is on none", [plans, rich], ask.set_user_plan("u", None), gives(plan_id=None)),
    ("from an unseen user, who is then on none", [by_default, ask.set_user_plan("new", None)],
     ask.get_user_plan("new"), reads(plan_id=None, allowance_remaining=0)),
    ("another than the default from the beginning", [by_default, ask.set_user_plan("new", "pro")],
     ask.get_user_plan("new"), reads(plan_id="pro", allowance_remaining=100)),
    ("no such plan", [plans], ask.set_user_plan("new", "gold"), refuses("plan_not_found")),
    ("for one who is there", [plans, free], ask.set_user_plan("u", "gold"), refuses("plan_not_found")),
    ("nor by its name", [plans, rich], ask.set_user_plan("u", "Free plan"), refuses("plan_not_found")),
    ("nor in capitals", [plans, rich], ask.set_user_plan("u", "PRO"), refuses("plan_not_found")),
    ("nor without a name", [plans, rich], ask.set_user_plan("u", ""), refuses("plan_not_found")),
    ("no plans at all", [rich], ask.set_user_plan("u", "pro"), refuses("plan_not_found")),
    ("a plan that is sold no more", [plans, rich, without("pro")], ask.set_user_plan("u", "pro"),
     refuses("plan_not_found")),
    ("nor to a new user", [plans, without("pro")], ask.set_user_plan("new", "pro"), refuses("plan_not_found")),
    ("until it is again", [plans, rich, without("pro"), ask.activate_pricing(2)], ask.set_user_plan("u", "pro"),
     gives(plan_id="pro")),
    ("a team may be on one", [plans, team("crew")], ask.set_user_plan("crew", "pro"), gives(plan_id="pro")),
)
def test_set_user_plan(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("nobody is on none", [plans], ask.get_user_plan("new"),
     reads(user_id="new", plan_id=None, plan_name=None, free_allowance=0, features={}, allowance_remaining=0,
         period_start=None, period_end=None, revision=0)),
    ("nor is who was put on none", [plans, rich], ask.get_user_plan("u"),
     reads(plan_id=None, plan_name=None, free_allowance=0, features={}, allowance_remaining=0, period_start=None,
         period_end=None, revision=1)),
    ("an unseen user is on the default plan", [by_default], ask.get_user_plan("new"),
     reads(user_id="new", plan_id="free", plan_name="Free plan", free_allowance=10, features={"chat": True},
         allowance_remaining=10, period_start=datetime(2026, 1, 1, tzinfo=UTC),
         period_end=datetime(2026, 2, 1, tzinfo=UTC), revision=0)),
    ("one seen before there was one is not", [rich, by_default], ask.get_user_plan("u"), reads(plan_id=None)),
    ("a plan with all its terms", [plans, at("2026-02-10"), pro], ask.get_user_plan("u"),
     reads(user_id="u", plan_id="pro", plan_name="Pro", free_allowance=100,
         features={"chat": True, "seats": 5, "export": "csv"}, allowance_remaining=100,
         period_start=datetime(2026, 2, 1, tzinfo=UTC), period_end=datetime(2026, 3, 1, tzinfo=UTC), revision=1)),
    ("one without allowance or features", [plans, ask.set_user_plan("u", "bare")], ask.get_user_plan("u"),
     reads(plan_id="bare", plan_name="Bare", free_allowance=0, features={}, allowance_remaining=0)),
    ("what is left of the allowance", [plans, free, ask.deduct_credits("u", 4)], ask.get_user_plan("u"),
     reads(free_allowance=10, allowance_remaining=6)),
    ("all of it again in a month in which nothing was written yet",
     [plans, free, ask.deduct_credits("u", 4), at("2026-02-01")], ask.get_user_plan("u"),
     reads(allowance_remaining=10, period_start=datetime(2026, 2, 1, tzinfo=UTC))),
    ("its present terms", [plans, free, ask.deduct_credits("u", 4),
     prices(plans={"free": PLANS["free"] | {"name": "Gratis", "free_allowance": 7, "features": {}}})],
     ask.get_user_plan("u"), reads(plan_name="Gratis", free_allowance=7, allowance_remaining=3, features={})),
    ("its last terms when it is sold no more", [plans, pro, without("pro")], ask.get_user_plan("u"),
     reads(plan_id="pro", plan_name="Pro", free_allowance=100, allowance_remaining=100,
         features={"chat": True, "seats": 5, "export": "csv"})),
    ("a team gets no default plan", [by_default, team("crew")], ask.get_user_plan("crew"), reads(plan_id=None)),
    ("but may be on one", [plans, team("crew"), ask.set_user_plan("crew", "pro")], ask.get_user_plan("crew"),
     reads(user_id="crew", plan_id="pro", allowance_remaining=100)),
)
def test_get_user_plan(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("nobody has one", [plans], ask.check_allowance("new"),
     reads(plan_id=None, allowance_remaining=0, period_start=None, period_end=None, revision=0)),
    ("an unseen user that of the default plan", [by_default], ask.check_allowance("new"),
     reads(plan_id="free", allowance_remaining=10, period_start=datetime(2026, 1, 1, tzinfo=UTC),
         period_end=datetime(2026, 2, 1, tzinfo=UTC))),
    ("all of it", [plans, pro], ask.check_allowance("u"), reads(plan_id="pro", allowance_remaining=100, revision=1)),
    ("what is left", [plans, pro, ask.deduct_credits("u", 30)], ask.check_allowance("u"),
     reads(allowance_remaining=70, revision=2)),
    ("a hold uses nothing of it", [plans, pro, ask.reserve_credits("u", 30)], ask.check_allowance("u"),
     reads(allowance_remaining=100)),
    ("nothing is left", [plans, free, ask.deduct_credits("u", 10)], ask.check_allowance("u"),
     reads(allowance_remaining=0)),
    ("never less than nothing", [plans, pro, ask.deduct_credits("u", 60), free], ask.check_allowance("u"),
     reads(plan_id="free", allowance_remaining=0)),
    ("what was used stays used by the way back", [plans, pro, ask.deduct_credits("u", 60), free, pro],
     ask.check_allowance("u"), reads(allowance_remaining=40)),
    ("and by the way over no plan", [plans, pro, ask.deduct_credits("u", 60), ask.set_user_plan("u"), pro],
     ask.check_allowance("u"), reads(allowance_remaining=40)),
    ("a better plan has more left", [plans, free, ask.deduct_credits("u", 10), pro], ask.check_allowance("u"),
     reads(allowance_remaining=90)),
    ("a better plan next month has all", [plans, free, ask.deduct_credits("u", 10), at("2026-02-01"), pro],
     ask.check_allowance("u"), reads(allowance_remaining=100)),
    ("what was charged before the plan is not used",
     [plans, rich, ask.deduct_credits("u", 30), free], ask.check_allowance("u"), reads(allowance_remaining=10)),
    ("a refund restores it", [plans, pro, ask.deduct_credits("u", 60), ask.refund_credits("@charge", 20)],
     ask.check_allowance("u"), reads(allowance_remaining=60)),
    ("a larger allowance counts at once", [plans, free, ask.deduct_credits("u", 10),
     prices(plans={"free": PLANS["free"] | {"free_allowance": 15}})], ask.check_allowance("u"),
     reads(allowance_remaining=5)),
    ("a smaller one too", [plans, free, ask.deduct_credits("u", 8),
     prices(plans={"free": PLANS["free"] | {"free_allowance": 5}})], ask.check_allowance("u"),
     reads(allowance_remaining=0)),
    ("a plan that is sold no more is lived in", [plans, pro, ask.deduct_credits("u", 60), without("pro"),
     ask.deduct_credits("u", 10), at("2026-02-01"), ask.deduct_credits("u", 1)], ask.check_allowance("u"),
     reads(plan_id="pro", allowance_remaining=99)),
)
def test_check_allowance(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


FEATURES: dict[str, Any] = {
    "true": True, "one": 1, "negative": -1, "small": Decimal("0.125"), "text": "no", "zero as text": "0",
    "list": [0], "object": {"a": None}, "blank": " ", "ü'": {"n": [1]},
}
NO_FEATURES: dict[str, Any] = {
    "false": False, "zero": 0, "exact zero": Decimal("0.0"), "empty": "", "no list": [], "no object": {},
}


@pytest.mark.parametrize(("feature", "has"), [*((name, True) for name in FEATURES), *((n, False) for n in NO_FEATURES)])
def test_check_feature(ledger: Ledger, feature: str, has: bool) -> None:
    ledger.publish(plans={"p": {"id": "p", "name": "P", "features": FEATURES | NO_FEATURES}})
    ask.set_user_plan("u", "p")(ledger)
    reads(user_id="u", feature=feature, value=(FEATURES | NO_FEATURES)[feature], has_feature=has, revision=1)(
        ledger, ask.check_feature("u", feature))


@table(
    ("one the plan has not", [plans, pro], ask.check_feature("u", "sso"),
     reads(user_id="u", feature="sso", value=None, has_feature=False, revision=1)),
    ("one that is null", [prices(plans={"p": {"id": "p", "name": "P", "features": {"sso": None}}}),
     ask.set_user_plan("u", "p")], ask.check_feature("u", "sso"), reads(value=None, has_feature=False)),
    ("one without a name", [plans, pro], ask.check_feature("u", ""), raises("22023", "p_feature")),
    ("none", [plans, pro], ask.check_feature("u", None), raises("22023", "p_feature")),
    ("names are exact", [plans, pro], ask.check_feature("u", "Seats"), reads(value=None, has_feature=False)),
    ("nor is it looked for inside", [prices(plans={"p": {"id": "p", "name": "P", "features": {"a": {"b": 1}}}}),
     ask.set_user_plan("u", "p")], ask.check_feature("u", "a.b"), reads(has_feature=False)),
    ("without a plan nobody has any", [plans, rich], ask.check_feature("u", "chat"),
     reads(value=None, has_feature=False)),
    ("nor an unseen user", [plans], ask.check_feature("new", "chat"),
     reads(user_id="new", value=None, has_feature=False, revision=0)),
    ("but what the default plan has", [by_default], ask.check_feature("new", "chat"),
     reads(value=True, has_feature=True, revision=0)),
    ("it is gone with the plan", [plans, pro, free], ask.check_feature("u", "seats"), reads(has_feature=False)),
    ("not with the plan's sale", [plans, pro, without("pro")], ask.check_feature("u", "seats"),
     reads(value=5, has_feature=True)),
    ("a team has its plan's", [plans, team("crew"), ask.set_user_plan("crew", "pro")],
     ask.check_feature("crew", "export"), reads(value="csv", has_feature=True)),
)
def test_whose_features(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


# What a charge on a plan costs


@table(
    ("a rate of the plan replaces the model's", [plans, pro], ask.calculate_cost(costs(9), "u"),
     reads(total=Decimal("4.5"), plan_id="pro", resolved_model="any")),
    ("the others are the model's own", [plans, pro], ask.calculate_cost({"model": "gpt", "input_tokens": 100}, "u"),
     reads(total=1, plan_id="pro", resolved_model="gpt")),
    ("the longest key of both wins", [plans, pro], ask.calculate_cost({"model": "gpt-4-0613", "input_tokens": 9}, "u"),
     reads(total=18, resolved_model="gpt-4")),
    ("a plan may add a model", [plans, pro], ask.calculate_cost({"model": "own", "input_tokens": 9}, "u"),
     reads(total=9, resolved_model="own")),
    ("which others have not", [plans, free], ask.calculate_cost({"model": "own", "input_tokens": 9}, "u"),
     raises("DU003", "own")),
    ("an unseen user pays the default plan's rates", [prices(plans=PLANS, default_plan="pro")],
     ask.calculate_cost(costs(9), "new"), reads(total=Decimal("4.5"), plan_id="pro")),
    ("without a user there is no plan", [prices(plans=PLANS, default_plan="pro")], ask.calculate_cost(costs(9)),
     reads(total=9, plan_id=None)),
    ("a charge", [plans, rich, pro], ask.deduct("u", costs(9)),
     gives(cost=Decimal("4.5"), allowance_used=4, amount=0, balance_after=100)),
    ("beyond the allowance", [plans, rich, pro], ask.deduct("u", costs(230)),
     gives(cost=115, allowance_used=100, amount=-15, balance_after=85)),
    ("an estimate", [plans, pro], ask.reserve("u", costs(9)), gives(amount=5, balance=0, reserved_total=5)),
    ("with nothing but the allowance", [plans, free], ask.reserve_credits("u", 10), gives(amount=10, balance=0)),
    ("and no more", [plans, free], ask.reserve_credits("u", 11), refuses("insufficient_credits")),
    ("a job has one price", [plans, rich, pro], ask.deduct_fixed("u", "report"), gives(cost=7, allowance_used=7)),
    ("an amount is one", [plans, rich, free], ask.deduct_credits("u", 12), gives(allowance_used=10, amount=-2)),
    ("the plan of a hold prices its settlement", [plans, rich, free, ask.reserve("u", costs(9)), pro],
     ask.deduct("u", costs(8), hold="@hold"), gives(cost=8, allowance_used=8, amount=0)),
    ("the present plan's allowance pays", [plans, rich, pro, ask.reserve("u", costs(60)), free],
     ask.deduct("u", costs(50), hold="@hold"), gives(cost=25, allowance_used=10, amount=-15)),
    ("none where the plan was taken away", [plans, rich, pro, ask.reserve("u", costs(60)), ask.set_user_plan("u")],
     ask.deduct("u", costs(50), hold="@hold"), gives(cost=25, allowance_used=0, amount=-25)),
    ("one taken away holds no longer what it paid",
     [plans, free, ask.reserve_credits("u", 10), ask.set_user_plan("u")], ask.get_balance("u"),
     reads(balance=0, reserved=10, available=0)),
    ("whose settlement is a debt",
     [plans, free, ask.reserve_credits("u", 10), ask.set_user_plan("u")], ask.deduct_credits("u", 10, "@hold"),
     gives(amount=-10, balance_after=-10, shortfall=0)),
    ("a plan sold no more keeps its rates", [plans, rich, pro, without("pro")], ask.deduct("u", costs(9)),
     gives(cost=Decimal("4.5"), allowance_used=4)),
    ("also where the model changed since", [plans, rich, pro, without("pro", models={"any": "points * 7"})],
     ask.deduct("u", costs(9)), gives(cost=Decimal("4.5"))),
    ("others pay the model's price then", [plans, rich, free, without("pro", models={"any": "points * 7"})],
     ask.deduct("u", costs(2)), gives(cost=14, allowance_used=10, amount=-4)),
    ("a replay is the first plan's", [plans, rich, pro, ask.deduct("u", costs(9), "k"), free],
     ask.deduct("u", costs(9), "k"), replays(allowance_used=4)),
    ("a refusal uses nothing", [plans, free, but(refuses("insufficient_credits"), ask.deduct_credits("u", 11))],
     ask.check_allowance("u"), reads(allowance_remaining=10)),
)
def test_charges_on_a_plan(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_charge_tells_its_plan(ledger: Ledger) -> None:
    for step in (plans, rich, pro, ask.deduct("u", costs(9)), free, ask.deduct_credits("u", 1), ask.set_user_plan("u")):
        step(ledger)
    ask.deduct_credits("u", 1)(ledger)
    rows = ledger.run(ask.list_transactions("u", type="usage"))
    assert [(row["plan_id"], row["allowance_used"], row["amount"]) for row in rows] == [
        (None, 0, -1),
        ("free", 1, 0),
        ("pro", 4, 0),
    ]
    reads(plan_id="pro", resolved_model="any", cost=Decimal("4.5"))(ledger, ask.explain_transaction("@charge1"))


def test_a_change_of_plan_records_what_expired(ledger: Ledger) -> None:
    for step in (plans, rich, ask.reserve_credits("u", 30), later(minutes=10), pro):
        step(ledger)
    assert ledger.sql("select status, held from ducto_private.holds") == [("expired", 30)]


def test_the_largest_allowance(ledger: Ledger) -> None:
    ledger.publish(plans={"p": PLANS["free"] | {"id": "p", "free_allowance": MOST}}, min_balance=0)
    ask.set_user_plan("u", "p")(ledger)
    reads(available=MOST)(ledger, ask.get_balance("u"))
    gives(allowance_used=MOST, amount=0)(ledger, ask.deduct_credits("u", MOST))
    reads(allowance_remaining=0)(ledger, ask.check_allowance("u"))
    refuses("insufficient_credits")(ledger, ask.deduct_credits("u", 1))
    gives(allowance_restored=MOST)(ledger, ask.refund_credits("@charge"))


def test_a_change_of_plan_is_an_event_once(ledger: Ledger) -> None:
    for step in (by_default, ask.set_user_plan("u", "pro"), later(days=1), pro, later(days=1), ask.set_user_plan("u")):
        step(ledger)
    refuses("plan_not_found")(ledger, ask.set_user_plan("u", "gold"))
    later(days=1)(ledger)
    ask.set_user_plan("u")(ledger)
    changes = ledger.events("plan_changed")
    assert changes[-1] == ("plan_changed", {"from": "pro", "to": None})
    assert len(changes) <= 2
    opened = ledger.events("account_opened")
    assert [payload["kind"] for _, payload in opened] == ["user"]


USER_CALLS: list[Callable[[str | None], Call]] = [
    lambda user: ask.set_user_plan(user, "pro"),
    lambda user: ask.set_user_plan(user, None),
    ask.get_user_plan,
    ask.check_allowance,
    lambda user: ask.check_feature(user, "chat"),
]


@pytest.mark.parametrize("user", [None, "", " ", " u", "u ", "u\n", "\u00a0u", "x" * 256], ids=repr)
def test_an_id_that_is_none(ledger: Ledger, user: str | None) -> None:
    plans(ledger)
    for call in USER_CALLS:
        raises("22023", "p_user_id", "1 to 255")(ledger, call(user))


def test_before_there_are_prices_there_are_no_plans(conn: Connection, clock: Clock) -> None:
    ledger = Ledger(conn, clock)
    with pytest.raises(psycopg.Error, match="pricing not loaded") as raised:
        ledger.one(ask.set_user_plan("u", "pro"))
    assert raised.value.sqlstate == "DU001"
    assert ledger.sql("select count(*) from ducto_private.accounts") == [(0,)]
    reads(plan_id=None, features={})(ledger, ask.get_user_plan("u"))
    reads(plan_id=None, allowance_remaining=0)(ledger, ask.check_allowance("u"))
    reads(has_feature=False)(ledger, ask.check_feature("u", "chat"))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# The calendar months of a zone: a moment in UTC, and the first instants of its local month and of the next one.
MONTHS: dict[str, list[tuple[str, str, str]]] = {
    "UTC": [
        ("2026-01-01T00:00", "2026-01-01T00:00", "2026-02-01T00:00"),
        ("2026-02-28T23:59:59.999999", "2026-02-01T00:00", "2026-03-01T00:00"),
        ("2028-02-29T23:59:59.999999", "2028-02-01T00:00", "2028-03-01T00:00"),
        ("2028-12-31T12:00", "2028-12-01T00:00", "2029-01-01T00:00"),
        ("2100-02-28T23:59:59", "2100-02-01T00:00", "2100-03-01T00:00"),
    ],
    "Europe/Berlin": [
        ("2026-03-29T00:59", "2026-02-28T23:00", "2026-03-31T22:00"),
        ("2026-03-31T21:59:59", "2026-02-28T23:00", "2026-03-31T22:00"),
        ("2026-03-31T22:00", "2026-03-31T22:00", "2026-04-30T22:00"),
        ("2026-10-25T01:30", "2026-09-30T22:00", "2026-10-31T23:00"),
        ("2026-10-31T22:59:59", "2026-09-30T22:00", "2026-10-31T23:00"),
        ("2026-12-31T23:00", "2026-12-31T23:00", "2027-01-31T23:00"),
    ],
    # The first hour of 1 November 2026 comes twice.
    "America/Havana": [
        ("2026-03-31T12:00", "2026-03-01T05:00", "2026-04-01T04:00"),
        ("2026-11-01T03:59:59", "2026-10-01T04:00", "2026-11-01T04:00"),
        ("2026-11-01T04:00", "2026-11-01T04:00", "2026-12-01T05:00"),
        ("2026-11-01T04:30", "2026-11-01T04:00", "2026-12-01T05:00"),
        ("2026-11-01T05:30", "2026-11-01T04:00", "2026-12-01T05:00"),
    ],
    # The first hour of 1 April 2005 never came.
    "Asia/Damascus": [
        ("2005-03-31T21:59:59", "2005-02-28T22:00", "2005-03-31T22:00"),
        ("2005-03-31T22:00", "2005-03-31T22:00", "2005-04-30T21:00"),
    ],
    # 30 December 2011 never came.
    "Pacific/Apia": [
        ("2011-12-30T09:59:59", "2011-12-01T10:00", "2011-12-31T10:00"),
        ("2011-12-30T10:00", "2011-12-01T10:00", "2011-12-31T10:00"),
        ("2011-12-31T10:00", "2011-12-31T10:00", "2012-01-31T10:00"),
    ],
    "Asia/Kathmandu": [("2026-06-30T18:15", "2026-06-30T18:15", "2026-07-31T18:15")],
}


@pytest.mark.parametrize("zone", MONTHS)
def test_a_period_is_the_local_month(conn: Connection, clock: Clock, zone: str) -> None:
    ledger = Ledger(conn, clock)
    ledger.publish(plans=PLANS, default_plan="free", min_balance=0, timezone=zone)
    conn.execute("set timezone = 'Pacific/Kiritimati'")
    for number, (moment, start, end) in enumerate(MONTHS[zone]):
        clock.set(moment)
        period = {"period_start": utc(start), "period_end": utc(end)}
        reads(allowance_remaining=10, **period)(ledger, ask.check_allowance("unseen"))
        user = f"u{number}"
        gives(allowance_used=10, amount=0)(ledger, ask.deduct_credits(user, 10))
        reads(allowance_remaining=0, **period)(ledger, ask.get_user_plan(user))
        reads(allowance_remaining=0, **period)(ledger, ask.check_allowance(user))
        clock.set(utc(end) - timedelta(microseconds=1))
        refuses("insufficient_credits")(ledger, ask.deduct_credits(user, 1))
        clock.set(utc(end))
        reads(allowance_remaining=10, period_start=utc(end))(ledger, ask.check_allowance(user))
        gives(allowance_used=10, amount=0)(ledger, ask.deduct_credits(user, 10))
    assert ledger.violations() == []


# Sessions that meet


@pytest.mark.parametrize("seen", [True, False])
def test_an_allowance_pays_once(arena: Arena, seen: bool) -> None:
    arena.ledger.publish(min_balance=0, plans=PLANS, default_plan="pro")
    if seen:
        arena.given(ask.set_user_plan("u", "pro"))
    answers = arena.meet(8, lambda _: ask.deduct_credits("u", 30))
    assert outcomes(answers) == {"ok": 3, "insufficient_credits": 5}
    assert sum(row["allowance_used"] for row in answers) == 90
    assert {row["amount"] for row in answers} == {0}
    reads(balance=0)(arena.ledger, ask.get_balance("u"))
    reads(allowance_remaining=10)(arena.ledger, ask.check_allowance("u"))
    arena.sound()


def test_changing_plans_beside_charges(arena: Arena) -> None:
    arena.ledger.publish(min_balance=0, plans=PLANS)
    arena.given(ask.add_credits("u", 10000), ask.set_user_plan("u", "free"))
    calls = [ask.deduct("u", costs(20)), ask.set_user_plan("u", "pro"), ask.deduct("u", costs(20)),
             ask.set_user_plan("u", "free")]  # fmt: skip
    answers = arena.meet(16, lambda number: calls[number % 4])
    assert outcomes(answers) == {"ok": 16}
    rows = arena.ledger.run(ask.list_transactions("u", type="usage"))
    assert all(row["cost"] == {"free": 20, "pro": 10}[row["plan_id"]] for row in rows)
    assert len(rows) == 8
    arena.sound()

"""Spend caps as sentences: what they bound, what they let pass, and when their windows begin."""

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import ANY

import psycopg
import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    LONG,
    MOST,
    WINDOWS,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    but,
    costs,
    gives,
    hold,
    later,
    lists,
    lists_in_any_order,
    prices,
    raises,
    reads,
    refuses,
    replays,
    table,
    team,
    tell,
)
from sessions import Arena, outcomes

PLANS = {"pro": {"id": "pro", "name": "Pro", "free_allowance": 100}}
OVER = ["spend_cap_exceeded"]
ABOVE = ["hold_exceeded", *OVER]

rich = ask.add_credits("u", 1000)
cap = ask.set_spend_cap("u", 50)
monthly = ask.set_spend_cap("u", 50, "monthly")
of_gpt = ask.set_spend_cap("u", 50, model="gpt")
warn = ask.set_spend_cap("u", 50, action="warn")
notify = ask.set_spend_cap("u", 50, action="notify")
denied = refuses("spend_cap_exceeded")


def charge(amount: int, model: str | None = None, **more: Any) -> Call:
    return ask.deduct_credits("u", amount, model=model, **more)


def settle(amount: int, **more: Any) -> Call:
    return ask.deduct_credits("u", amount, hold="@hold1", **more)


pro = ask.set_user_plan("u", "pro")


# fmt: off
@table(
    ("a cap opens an account", [], ask.set_spend_cap("new", 50),
     gives(user_id="new", cap_type="daily", model=None, limit=50, action="deny", revision=1)),
    ("with its bonus", [prices(signup_bonus=20), ask.set_spend_cap("new", 50)], ask.get_balance("new"),
     reads(balance=20, revision=2)),
    ("and on the default plan", [prices(plans=PLANS, default_plan="pro"), ask.set_spend_cap("new", 50)],
     ask.get_user_plan("new"), reads(plan_id="pro", revision=1)),
    ("every part of it may be told", [rich], ask.set_spend_cap("u", 7, "monthly", "gpt", "notify"),
     gives(user_id="u", cap_type="monthly", model="gpt", limit=7, action="notify", revision=2)),
    ("nulls are defaults", [rich], ask.set_spend_cap("u", 7, None, None, None),
     gives(cap_type="daily", model=None, action="deny")),
    ("a model without a price yet", [], ask.set_spend_cap("u", 7, model="next"), gives(model="next")),
    ("nothing at all", [rich], ask.set_spend_cap("u", 0), gives(limit=0)),
    ("the largest", [rich], ask.set_spend_cap("u", MOST), gives(limit=MOST)),
    ("of a team", [team("crew")], ask.set_spend_cap("crew", 7), gives(user_id="crew", limit=7)),
    ("another limit and action", [rich, cap, charge(7)], ask.set_spend_cap("u", 60, action="warn"),
     gives(limit=60, action="warn", spent=7)),
    ("in mid-window", [rich, charge(7)], cap, gives(spent=7)),
    ("after a grant was taken back", [rich, charge(7), ask.remove_credits("u", 5, transaction_id="@grant")], cap,
     gives(spent=7)),
    ("less than nothing", [rich], ask.set_spend_cap("u", -1), raises("22023", "p_limit", "at least 0")),
    ("no limit", [rich], ask.set_spend_cap("u", None), raises("22023", "p_limit", "at least 0")),
    ("a week", [rich], ask.set_spend_cap("u", 1, "weekly"), gives(cap_type="weekly")),
    ("for ever", [rich], ask.set_spend_cap("u", 1, "lifetime"), gives(cap_type="lifetime", resets_at=None)),
    ("a year", [rich], ask.set_spend_cap("u", 1, "yearly"),
     raises("22023", "p_cap_type", "yearly", "daily", "weekly", "monthly", "lifetime")),
    ("a day in capitals", [rich], ask.set_spend_cap("u", 1, "Daily"), raises("22023", "p_cap_type", "Daily")),
    ("a kind without a name", [rich], ask.set_spend_cap("u", 1, ""), raises("22023", "p_cap_type")),
    ("an action that is none", [rich], ask.set_spend_cap("u", 1, action="block"),
     raises("22023", "p_action", "block", "deny", "warn", "notify")),
    ("an action without a name", [rich], ask.set_spend_cap("u", 1, action=""), raises("22023", "p_action")),
    ("a model of 256 characters", [rich], ask.set_spend_cap("u", 1, model=LONG), raises("22023", "p_model", "255")),
    ("a model without a name is not all models", [rich], ask.set_spend_cap("u", 1, model=""),
     raises("22023", "p_model")),
)
def test_set_spend_cap(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("one that is there", [rich, cap], ask.remove_spend_cap("u", "daily"),
     gives(user_id="u", cap_type="daily", model=None, limit=50, action="deny", revision=3, spent=0)),
    ("one of a model", [rich, of_gpt, cap], ask.remove_spend_cap("u", "daily", "gpt"), gives(model="gpt", limit=50)),
    ("of a team", [team("crew"), ask.set_spend_cap("crew", 7)], ask.remove_spend_cap("crew", "daily"), gives(limit=7)),
    ("it is gone", [rich, cap, ask.remove_spend_cap("u", "daily")], ask.list_spend_caps("u"), lists()),
    ("and bounds nothing", [rich, cap, ask.remove_spend_cap("u", "daily")], charge(51), gives(warnings=[])),
    ("twice", [rich, cap, ask.remove_spend_cap("u", "daily")], ask.remove_spend_cap("u", "daily"),
     refuses("cap_not_found")),
    ("another kind", [rich, cap], ask.remove_spend_cap("u", "monthly"), refuses("cap_not_found")),
    ("another model", [rich, of_gpt], ask.remove_spend_cap("u", "daily", "any"), refuses("cap_not_found")),
    ("all models are not one", [rich, of_gpt], ask.remove_spend_cap("u", "daily"), refuses("cap_not_found")),
    ("one is not all models", [rich, cap], ask.remove_spend_cap("u", "daily", "gpt"), refuses("cap_not_found")),
    ("another's", [rich, cap, ask.add_credits("v", 1)], ask.remove_spend_cap("v", "daily"), refuses("cap_not_found")),
    ("a kind that is none", [rich, cap], ask.remove_spend_cap("u", "yearly"), raises("22023", "p_cap_type", "yearly")),
    ("no kind", [rich, cap], ask.remove_spend_cap("u", None), raises("22023", "p_cap_type")),
    ("set again it counts what was spent", [rich, cap, charge(40), ask.remove_spend_cap("u", "daily"), charge(9), cap],
     charge(2), denied),
    ("to the credit", [rich, cap, charge(40), ask.remove_spend_cap("u", "daily"), charge(9), cap], charge(1),
     gives(balance_after=950)),
)
def test_remove_spend_cap(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("nobody has any", [], ask.list_spend_caps("new"), lists()),
    ("nor has who was given none", [rich], ask.list_spend_caps("u"), lists()),
    ("each of them", [rich, cap, monthly, of_gpt, ask.set_spend_cap("u", 9, "monthly", "any", "warn")],
     ask.list_spend_caps("u"), lists_in_any_order(
         {"user_id": "u", "cap_type": "daily", "model": None, "limit": 50, "action": "deny", "error": None},
         {"user_id": "u", "cap_type": "monthly", "model": None, "limit": 50, "action": "deny", "error": None},
         {"user_id": "u", "cap_type": "daily", "model": "gpt", "limit": 50, "action": "deny", "error": None},
         {"user_id": "u", "cap_type": "monthly", "model": "any", "limit": 9, "action": "warn", "error": None})),
    ("set twice it is one", [rich, cap, charge(7), ask.set_spend_cap("u", 60)], ask.list_spend_caps("u"),
     lists({"limit": 60, "revision": 4, "spent": 7})),
    ("net of refunds", [rich, cap, charge(40), ask.refund_credits("@charge1", 15), charge(3, "gpt"), of_gpt],
     ask.list_spend_caps("u"), lists({"model": None, "spent": 28}, {"model": "gpt", "spent": 3})),
    ("of a team", [team("crew"), ask.set_spend_cap("crew", 7)], ask.list_spend_caps("crew"), lists({"limit": 7})),
)
def test_list_spend_caps(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


# What a cap bounds


@table(
    ("to the limit", [cap], charge(50), gives(amount=-50, warnings=[])),
    ("no further", [cap], charge(51), denied),
    ("in all", [cap, charge(30)], charge(21), denied),
    ("to the limit in all", [cap, charge(30)], charge(20), gives(balance_after=950)),
    ("nothing passes always", [cap, charge(50)], charge(0), gives(amount=0, warnings=[])),
    ("also under a limit of nothing", [ask.set_spend_cap("u", 0)], charge(0), gives(amount=0)),
    ("which refuses one credit", [ask.set_spend_cap("u", 0)], charge(1), denied),
    ("a usage", [cap], ask.deduct("u", costs(51)), denied),
    ("what is charged of it, not its cost", [cap], ask.deduct("u", costs("50.9")), gives(amount=-50)),
    ("with what was carried", [cap, ask.deduct("u", costs("0.5"))], ask.deduct("u", costs("50.5")), denied),
    ("a job", [ask.set_spend_cap("u", 6)], ask.deduct_fixed("u", "report"), denied),
    ("the months", [monthly, charge(30)], charge(21), denied),
    ("of two the tighter", [cap, ask.set_spend_cap("u", 20, "monthly")], charge(21), denied),
    ("either way", [ask.set_spend_cap("u", 20), monthly], charge(21), denied),
    ("within both", [cap, ask.set_spend_cap("u", 20, "monthly")], charge(20), gives()),
    ("a replay is none", [cap, charge(50, key="k")], charge(50, key="k"), replays()),
    ("another request under the key is that first", [cap, charge(50, key="k")], charge(51, key="k"),
     refuses("idempotency_conflict")),
    ("a refusal counts nothing", [cap, but(denied, charge(51))], charge(50), gives()),
    ("before funds", [ask.set_credit_limit("u", 0), cap], charge(1001), denied),
    ("funds still count", [ask.set_spend_cap("u", 5000)], charge(996), refuses("insufficient_credits")),
    ("of one model", [of_gpt], charge(51, "gpt"), denied),
    ("not of another", [of_gpt], charge(51, "any"), gives(warnings=[])),
    ("nor of none", [of_gpt], charge(51), gives()),
    ("others count nothing to it", [of_gpt, charge(500), charge(100, "any")], charge(50, "gpt"), gives()),
    ("its own do", [of_gpt, charge(30, "gpt"), charge(500)], charge(21, "gpt"), denied),
    ("a usage of it", [of_gpt], ask.deduct("u", {"model": "gpt", "input_tokens": 5100}), denied),
    ("a usage that is resolved to it", [of_gpt], ask.deduct("u", {"model": "gpt-0613", "input_tokens": 5100}), denied),
    ("to its limit", [of_gpt], ask.deduct("u", {"model": "gpt-0613", "input_tokens": 5000}), gives(amount=-50)),
    ("the name as given", [ask.set_spend_cap("u", 50, model="gpt-0613")],
     ask.deduct("u", {"model": "gpt-0613", "input_tokens": 5100}), denied),
    ("not another version", [ask.set_spend_cap("u", 50, model="gpt-0613")],
     ask.deduct("u", {"model": "gpt-0314", "input_tokens": 5100}), gives(amount=-51)),
    ("an amount for it", [of_gpt], charge(51, "gpt-0613"), denied),
    ("names are exact", [of_gpt], charge(51, "GPT"), gives()),
    ("a job has no model", [ask.set_spend_cap("u", 0, model="any")], ask.deduct_fixed("u", "report"), gives()),
    ("of a model and of all", [of_gpt, ask.set_spend_cap("u", 60), charge(30, "any")], charge(31, "gpt"), denied),
    ("the tighter one of the model", [of_gpt, ask.set_spend_cap("u", 600), charge(30, "any")], charge(51, "gpt"),
     denied),
    ("another's cap", [cap, ask.add_credits("v", 100)], ask.deduct_credits("v", 51), gives()),
    ("set when it is passed already", [charge(60), cap], charge(1), denied),
    ("set in the midst", [charge(30), cap], charge(21), denied),
    ("to the credit", [charge(30), cap], charge(20), gives()),
    ("set after a refund", [charge(30), ask.refund_credits("@charge", 20), cap], charge(41), denied),
    ("to the credit of it", [charge(30), ask.refund_credits("@charge", 20), cap], charge(40), gives()),
    ("for one model set in the midst", [charge(30, "gpt"), charge(9, "any"),
     ask.deduct("u", {"model": "gpt-0613", "input_tokens": 500}), of_gpt], charge(16, "gpt"), denied),
    ("to the credit of that", [charge(30, "gpt"), charge(9, "any"),
     ask.deduct("u", {"model": "gpt-0613", "input_tokens": 500}), of_gpt], charge(15, "gpt"), gives()),
    ("set again it keeps its spend", [cap, charge(30), ask.set_spend_cap("u", 40)], charge(11), denied),
    ("a removal is no spend", [cap, ask.remove_credits("u", 500)], charge(50), gives()),
    ("nor is a grant the opposite", [cap, charge(30), ask.add_credits("u", 500)], charge(21), denied),
    ("into the credit limit", [ask.remove_credits("u", 1000), ask.set_credit_limit("u", 100), cap], charge(51), denied),
)
def test_a_cap_on_charges(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


@table(
    ("a hold to the limit", [cap], ask.reserve_credits("u", 50), gives(amount=50, warnings=[])),
    ("no further", [cap], ask.reserve_credits("u", 51), denied),
    ("an estimate", [cap], ask.reserve("u", costs("50.1")), denied),
    ("beside what was spent", [cap, charge(30)], ask.reserve_credits("u", 21), denied),
    ("beside another", [cap, hold], ask.reserve_credits("u", 21), denied),
    ("to the limit beside another", [cap, hold], ask.reserve_credits("u", 20), gives(reserved_total=50)),
    ("a charge beside it", [cap, hold], charge(21), denied),
    ("to the limit with it", [cap, hold], charge(20), gives(balance_after=980)),
    ("nothing passes", [cap, ask.reserve_credits("u", 50)], ask.reserve_credits("u", 0), gives()),
    ("more is admitted like a hold", [cap, hold], ask.extend_reservation("@hold", 20), gives(amount=50)),
    ("and like a hold no more", [cap, hold], ask.extend_reservation("@hold", 21, user_id="u"), denied),
    ("time is not spent", [cap, ask.reserve_credits("u", 50)], ask.extend_reservation("@hold", ttl=900), gives()),
    ("released it frees it", [cap, hold, ask.release_reservation("@hold")], charge(50), gives()),
    ("expired too", [cap, hold, later(minutes=10)], charge(50), gives()),
    ("settled for less too", [cap, hold, settle(10)], charge(40), gives()),
    ("and not by more", [cap, hold, settle(10)], charge(41), denied),
    ("a part counts once", [cap, hold, settle(10, final=False)], charge(21), denied),
    ("to the credit once", [cap, hold, settle(10, final=False)], charge(20), gives()),
    ("one taken before the cap counts", [hold, cap], charge(21), denied),
    ("of one model", [of_gpt], ask.reserve_credits("u", 51, model="gpt"), denied),
    ("by its estimate", [of_gpt], ask.reserve("u", {"model": "gpt-0613", "input_tokens": 5001}), denied),
    ("of another", [of_gpt], ask.reserve_credits("u", 51, model="any"), gives()),
    ("a model's holds count to it", [of_gpt, ask.reserve("u", {"model": "gpt-0613", "input_tokens": 3000})],
     charge(21, "gpt"), denied),
    ("to its limit", [of_gpt, ask.reserve("u", {"model": "gpt-0613", "input_tokens": 3000})], charge(20, "gpt"),
     gives()),
    ("other holds do not", [of_gpt, ask.reserve_credits("u", 500)], charge(50, "gpt"), gives()),
    ("nor do those of its model that have expired, beside others",
     [of_gpt, ask.reserve_credits("u", 500, ttl=900), ask.reserve_credits("u", 30, model="gpt"), later(minutes=10)],
     ask.reserve_credits("u", 50, model="gpt"), gives(amount=50)),
    ("what extends it is of its model", [of_gpt, ask.reserve_credits("u", 30, model="gpt")],
     ask.extend_reservation("@hold", 21, user_id="u"), denied),
    ("a replayed hold is none", [cap, ask.reserve_credits("u", 50, key="k"), charge(0)],
     ask.reserve_credits("u", 50, key="k"), replays()),
)
def test_a_cap_on_holds(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


@table(
    ("what the allowance pays is not spent", [cap], charge(100), gives(allowance_used=100, amount=0)),
    ("the rest is", [cap], charge(150), gives(allowance_used=100, amount=-50)),
    ("no more of it", [cap], charge(151), denied),
    ("and later", [cap, charge(130)], charge(21), denied),
    ("to the credit", [cap, charge(130)], charge(20), gives(amount=-20)),
    ("under a limit of nothing the allowance remains", [ask.set_spend_cap("u", 0)], charge(100), gives(amount=0)),
    ("and nothing more", [ask.set_spend_cap("u", 0)], charge(101), denied),
    ("a hold may claim it and the limit", [cap], ask.reserve_credits("u", 150), gives()),
    ("no more", [cap], ask.reserve_credits("u", 151), denied),
    ("holds claim it first", [cap, ask.reserve_credits("u", 90)], charge(61), denied),
    ("and leave the rest of both", [cap, ask.reserve_credits("u", 90)], charge(60),
     gives(allowance_used=60, amount=0)),
    ("a model's cap counts on what is left of it",
     [of_gpt, ask.reserve_credits("u", 90)], charge(60, "gpt"), gives(allowance_used=60)),
    ("but not for more than the model asks", [of_gpt, ask.reserve_credits("u", 200)], charge(50, "gpt"), gives()),
    ("nor less", [of_gpt, ask.reserve_credits("u", 200)], charge(51, "gpt"), denied),
    ("where holds claim it all but ten", [ask.set_spend_cap("u", 20, model="gpt"), ask.reserve_credits("u", 90)],
     charge(31, "gpt"), denied),
    ("ten more than the limit", [ask.set_spend_cap("u", 20, model="gpt"), ask.reserve_credits("u", 90)],
     charge(30, "gpt"), gives()),
    ("next month it pays again", [monthly, charge(150), at("2026-02-01")], charge(150), gives(amount=-50)),
    ("the next day it does not", [cap, charge(150), later(days=1)], charge(51), denied),
    ("refunded allowance is no spend", [cap, charge(140), ask.refund_credits("@charge", 60)], charge(70),
     gives(allowance_used=20, amount=-50)),
)
def test_a_cap_beside_an_allowance(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [prices(plans=PLANS), rich, pro, *given], call, check)


@table(
    ("never refused, but told", [cap, hold], settle(51), gives(amount=-51, warnings=ABOVE)),
    ("to the limit it is nothing", [cap, hold], settle(50), gives(amount=-50, warnings=["hold_exceeded"])),
    ("less than held is nothing", [cap, hold], settle(10), gives(amount=-10, warnings=[])),
    ("of what was spent before", [cap, hold, charge(20)], settle(31), gives(warnings=ABOVE)),
    ("a part too", [cap, hold], settle(51, final=False), gives(warnings=ABOVE)),
    ("within its hold, when the cap came later", [hold, ask.set_spend_cap("u", 20)], settle(30), gives(warnings=OVER)),
    ("it counts", [cap, hold, settle(51)], charge(1), denied),
    ("of one model", [of_gpt, ask.reserve_credits("u", 30, model="gpt")], settle(51, model="gpt"),
     gives(warnings=ABOVE)),
    ("of another", [of_gpt, hold], settle(51, model="any"), gives(warnings=["hold_exceeded"])),
    ("counts for its own model", [of_gpt, ask.reserve_credits("u", 30, model="any"), settle(40, model="gpt")],
     charge(11, "gpt"), denied),
    ("the model of its usage, not of its hold", [of_gpt, ask.reserve_credits("u", 30, model="gpt")],
     ask.deduct("u", costs(60), hold="@hold"), gives(warnings=["hold_exceeded"])),
    ("an expired one", [cap, hold, later(minutes=10)], settle(51),
     lambda ledger, call: _warns(ledger, call, {"reservation_expired", *ABOVE})),
    ("into debt", [cap, hold], settle(1001), gives(balance_after=-1, shortfall=1, warnings=ABOVE)),
    ("paid by the allowance it is nothing", [prices(plans=PLANS), pro, cap, hold], settle(100),
     gives(amount=0, warnings=["hold_exceeded"])),
    ("replayed it tells the same", [cap, hold, settle(51)], settle(51), replays(warnings=ABOVE)),
)
def test_a_cap_on_settlements(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


def _warns(ledger: Ledger, call: Call, warnings: set[str]) -> None:
    row = ledger.one(call)
    assert row["error"] is None
    assert set(row["warnings"]) == warnings


@table(
    ("a charge passes with a warning", [warn], charge(51), gives(amount=-51, warnings=OVER)),
    ("to the limit without", [warn], charge(50), gives(warnings=[])),
    ("told to others", [notify], charge(51), gives(amount=-51, warnings=OVER)),
    ("each time", [warn, charge(51)], charge(1), gives(warnings=OVER)),
    ("not for nothing", [warn, charge(51)], charge(0), gives(warnings=[])),
    ("not for what the allowance pays", [prices(plans=PLANS), pro, warn], charge(100), gives(warnings=[])),
    ("a usage", [warn], ask.deduct("u", costs(51)), gives(warnings=OVER)),
    ("a job", [ask.set_spend_cap("u", 6, action="warn")], ask.deduct_fixed("u", "report"), gives(warnings=OVER)),
    ("a hold", [warn], ask.reserve_credits("u", 51), gives(amount=51, warnings=OVER)),
    ("a hold beside another", [warn, hold], ask.reserve_credits("u", 21), gives(warnings=OVER)),
    ("a hold that is extended", [warn, hold], ask.extend_reservation("@hold", 21), gives(warnings=OVER)),
    ("a settlement", [warn, hold], settle(51), gives(warnings=ABOVE)),
    ("replayed", [warn, charge(51, key="k")], charge(51, key="k"), replays(warnings=OVER)),
    ("a replayed hold", [warn, ask.reserve_credits("u", 51, key="k")], ask.reserve_credits("u", 51, key="k"),
     replays(warnings=OVER)),
    ("of one model", [ask.set_spend_cap("u", 50, model="gpt", action="warn")], charge(51, "gpt"), gives(warnings=OVER)),
    ("of another", [ask.set_spend_cap("u", 50, model="gpt", action="warn")], charge(51), gives(warnings=[])),
    ("one that denies comes first", [warn, ask.set_spend_cap("u", 60, "monthly")], charge(61), denied),
    ("where it does not it is told", [warn, ask.set_spend_cap("u", 60, "monthly")], charge(60), gives(warnings=OVER)),
    ("the next day it is not", [warn, charge(51), later(days=1)], charge(50), gives(warnings=[])),
)
def test_a_cap_that_lets_pass(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


@table(
    ("a refund gives room", [cap, charge(50), ask.refund_credits("@charge", 20)], charge(20), gives()),
    ("not more", [cap, charge(50), ask.refund_credits("@charge", 20)], charge(21), denied),
    ("for one model", [of_gpt, charge(50, "gpt"), ask.refund_credits("@charge", 20)], charge(21, "gpt"), denied),
    ("of its resolved model", [of_gpt, ask.deduct("u", {"model": "gpt-0613", "input_tokens": 5000}),
     ask.refund_credits("@charge")], charge(50, "gpt"), gives()),
    ("of another", [of_gpt, charge(50, "any"), charge(50, "gpt"), ask.refund_credits("@charge1")], charge(1, "gpt"),
     denied),
    ("of a day that is over", [cap, charge(50), later(days=1), charge(50), ask.refund_credits("@charge1")], charge(1),
     denied),
    ("in the same month", [monthly, charge(50), later(days=1), ask.refund_credits("@charge1", 20)], charge(20),
     gives()),
    ("in another", [monthly, charge(50), at("2026-02-01"), charge(50), ask.refund_credits("@charge1")], charge(1),
     denied),
    ("of a charge before there was a cap", [charge(50), cap, ask.refund_credits("@charge")], charge(50), gives()),
    ("of what was charged beyond it", [cap, hold, settle(90), ask.refund_credits("@charge", 41)], charge(1), gives()),
    ("of what the balance paid beside an allowance",
     [prices(plans=PLANS), pro, cap, charge(150), ask.refund_credits("@charge", 50)], charge(51), denied),
)
def test_a_cap_and_refunds(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


# Asking beforehand


NOTHING = {"capped": False, "current_spend": 0, "cap_limit": 0, "action": None, "model": None}


@table(
    ("nobody has a cap", [], ask.check_spend_cap("new", None, 10**6), reads(**NOTHING, revision=0)),
    ("nor who was given none", [rich], ask.check_spend_cap("u", None, 10**6), reads(**NOTHING, revision=1)),
    ("to the limit", [rich, cap], ask.check_spend_cap("u", None, 50), reads(**NOTHING)),
    ("beyond it", [rich, cap], ask.check_spend_cap("u", None, 51),
     reads(capped=True, current_spend=0, cap_limit=50, action="deny", model=None, revision=2)),
    ("with what was spent", [rich, cap, charge(30)], ask.check_spend_cap("u", None, 21),
     reads(capped=True, current_spend=30, cap_limit=50)),
    ("nothing is never too much", [rich, cap, hold, settle(70)], ask.check_spend_cap("u"), reads(**NOTHING)),
    ("null is nothing", [rich, cap, hold, settle(70)], ask.check_spend_cap("u", amount=None), reads(**NOTHING)),
    ("with what is held", [rich, cap, hold], ask.check_spend_cap("u", None, 21),
     reads(capped=True, current_spend=0, cap_limit=50)),
    ("without what was held", [rich, cap, hold, later(minutes=10)], ask.check_spend_cap("u", None, 50),
     reads(**NOTHING)),
    ("one that warns", [rich, warn], ask.check_spend_cap("u", None, 51),
     reads(capped=False, current_spend=0, cap_limit=50, action="warn")),
    ("one that denies comes first", [rich, warn, ask.set_spend_cap("u", 60, "monthly")],
     ask.check_spend_cap("u", None, 61), reads(capped=True, cap_limit=60, action="deny")),
    ("where it does not it is the other", [rich, warn, ask.set_spend_cap("u", 60, "monthly")],
     ask.check_spend_cap("u", None, 60), reads(capped=False, cap_limit=50, action="warn")),
    ("of several the one with least room", [rich, ask.set_spend_cap("u", 70), charge(40),
     ask.set_spend_cap("u", 60, "monthly"), ask.set_spend_cap("u", 65, model="gpt")],
     ask.check_spend_cap("u", "gpt", 100), reads(capped=True, current_spend=40, cap_limit=60, model=None)),
    ("which need not be the smallest", [rich, ask.set_spend_cap("u", 70, "monthly"), charge(40), later(days=1),
     ask.set_spend_cap("u", 40)], ask.check_spend_cap("u", None, 100),
     reads(capped=True, current_spend=40, cap_limit=70)),
    ("of one model", [rich, of_gpt, charge(30, "gpt")], ask.check_spend_cap("u", "gpt", 21),
     reads(capped=True, current_spend=30, cap_limit=50, model="gpt")),
    ("of another", [rich, of_gpt], ask.check_spend_cap("u", "any", 51), reads(**NOTHING)),
    ("of none", [rich, of_gpt], ask.check_spend_cap("u", None, 51), reads(**NOTHING)),
    ("in a day in which nothing was written yet", [rich, cap, charge(50), later(days=1)],
     ask.check_spend_cap("u", None, 50), reads(**NOTHING)),
    ("nor has been spent", [rich, cap, charge(50), later(days=1)], ask.check_spend_cap("u", None, 51),
     reads(capped=True, current_spend=0)),
    ("beside an allowance", [prices(plans=PLANS), rich, pro, cap], ask.check_spend_cap("u", None, 151),
     reads(capped=True, current_spend=0)),
    ("to its end and the limit", [prices(plans=PLANS), rich, pro, cap], ask.check_spend_cap("u", None, 150),
     reads(**NOTHING)),
    ("which is new next month", [prices(plans=PLANS), rich, pro, cap, charge(100), at("2026-02-01")],
     ask.check_spend_cap("u", None, 150), reads(**NOTHING)),
    ("the largest", [rich, cap], ask.check_spend_cap("u", None, MOST), reads(capped=True)),
    ("of a team", [team("crew", "ann"), ask.set_spend_cap("crew", 7)], ask.check_spend_cap("crew", None, 8),
     reads(capped=True, cap_limit=7)),
    ("less than nothing", [rich], ask.check_spend_cap("u", None, -1), raises("22023", "p_amount", "at least 0")),
    ("a model of 256 characters", [rich], ask.check_spend_cap("u", LONG, 1), raises("22023", "p_model", "255")),
)
def test_check_spend_cap(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


USER_CALLS: list[Callable[[str | None], Call]] = [
    lambda user: ask.set_spend_cap(user, 1),
    lambda user: ask.remove_spend_cap(user, "daily"),
    ask.list_spend_caps,
    ask.check_spend_cap,
]


@pytest.mark.parametrize("user", [None, "", " ", " u", "u ", "u\n", "\u00a0u", LONG], ids=repr)
def test_an_id_that_is_none(ledger: Ledger, user: str | None) -> None:
    for call in USER_CALLS:
        raises("22023", "p_user_id", "1 to 255")(ledger, call(user))


def test_before_there_are_prices_there_are_no_caps(conn: Connection, clock: Clock) -> None:
    ledger = Ledger(conn, clock)
    with pytest.raises(psycopg.Error, match="pricing not loaded") as raised:
        ledger.one(ask.set_spend_cap("u", 1))
    assert raised.value.sqlstate == "DU001"
    assert ledger.sql("select count(*) from ducto_private.accounts") == [(0,)]
    lists()(ledger, ask.list_spend_caps("u"))


def test_admission_under_caps_is_its_formula(ledger: Ledger) -> None:
    """Random caps, holds and allowances: every call that is admitted, and the one that asks beforehand, agree."""
    ledger.publish(plans=PLANS, min_balance=0)
    seed = random.Random(13)
    seen = set()
    for number in range(25):
        user = f"u{number}"
        ask.add_credits(user, 10**6)(ledger)
        left = 0
        if seed.random() < 0.7:
            ask.set_user_plan(user, "pro")(ledger)
            left = 100
        spent = dict.fromkeys(["gpt", "any"], 0)
        for model in seed.choices(["gpt", "any"], k=3):
            paid = ledger.one(ask.deduct_credits(user, seed.randint(0, 60), model=model))
            spent[model] -= paid["amount"]
            left -= paid["allowance_used"]
        held = dict.fromkeys(["gpt", "any"], 0)
        hold = ""
        for model in seed.choices(["gpt", "any"], k=seed.randint(0, 3)):
            taken = ledger.one(ask.reserve_credits(user, seed.randint(0, 50), model=model))
            held[model] += taken["amount"]
            hold = taken["reservation_id"] if model == "gpt" else hold
        caps = []
        for cap_type in ("daily", "monthly"):
            for bounded in (None, "gpt", "any"):
                if seed.random() < 0.6:
                    limit, action = seed.randint(0, 120), seed.choice(["deny", "deny", "warn", "notify"])
                    ask.set_spend_cap(user, limit, cap_type, bounded, action)(ledger)
                    caps.append((bounded, limit, action))
        everything = sum(held.values())
        for amount in (0, 1, *(seed.randint(0, 150) for _ in range(4))):
            over = []
            for bounded, limit, action in caps:
                if bounded in (None, "gpt"):
                    matching = held[bounded] if bounded else everything
                    used = spent[bounded] if bounded else sum(spent.values())
                    before = min(matching, max(0, everything - left))
                    after = min(matching + amount, max(0, everything + amount - left))
                    if after > before and used + after > limit:
                        over.append((action, limit - used, used, limit))
            rooms = sorted(room for action, room, _, _ in over if action == "deny")
            error = "spend_cap_exceeded" if rooms else None
            warnings = OVER if over and not rooms else []
            for call in (
                ask.deduct_credits(user, amount, model="gpt"),
                ask.deduct(user, {"model": "gpt-1", "input_tokens": amount * 100}),
                ask.reserve_credits(user, amount, model="gpt"),
                ask.reserve(user, {"model": "gpt", "input_tokens": amount * 100}),
                *([ask.extend_reservation(hold, amount)] if hold else []),
            ):
                with ledger.conn.transaction(force_rollback=True):
                    row = ledger.one(call)
                idle = ["no_usage"] if not amount and call.name in ("deduct", "reserve") and not error else []
                assert (row["error"], row["warnings"]) == (error, idle + warnings), (call, caps, spent, held, left)
            told = ledger.one(ask.check_spend_cap(user, "gpt", amount))
            assert told["capped"] is bool(rooms)
            if rooms:
                assert told["action"] == "deny"
                assert told["cap_limit"] - told["current_spend"] == rooms[0]
            elif over:
                assert (told["action"], told["current_spend"], told["cap_limit"]) in [
                    (action, used, limit) for action, _, used, limit in over
                ]
            else:
                assert (told["action"], told["current_spend"], told["cap_limit"]) == (None, 0, 0)
            seen.add((error, bool(warnings), left > everything, bool(hold)))
    assert len(seen) >= 7


# Events


def test_an_exceeded_warning_is_told_once_in_a_window(ledger: Ledger) -> None:
    for step in (
        rich,
        ask.set_spend_cap("u", 10, "daily", "gpt", "warn"),
        ask.set_spend_cap("u", 10, "monthly", "gpt", "notify"),
    ):
        step(ledger)
    day, month = ("daily", "gpt", 10, "warn"), ("monthly", "gpt", 10, "notify")
    told: list[Any] = []
    stages: list[tuple[Step, list[Any]]] = [
        (charge(10, "gpt"), []),
        (charge(500, "any"), []),
        (charge(1, "gpt"), [day, month]),
        (charge(1, "gpt"), []),
        (at("2026-01-02"), []),
        (charge(12, "gpt"), [day]),
        (charge(1, "gpt"), []),
        (at("2026-02-01"), []),
        (ask.reserve_credits("u", 11, model="gpt"), [day, month]),
        (ask.deduct_credits("u", 11, "@hold", model="gpt"), []),
    ]
    for stage, new in stages:
        stage(ledger)
        told += new
        events = [
            tuple(row[name] for name in ("cap_type", "model", "limit", "action"))
            for _, row in ledger.events("cap_warned")
        ]
        assert sorted(events) == sorted(told)
    assert ledger.events("cap_reached") == []


def test_a_window_that_reaches_its_limit_is_told_by_the_charge_that_brings_it_there(ledger: Ledger) -> None:
    for step in (
        rich,
        cap,
        charge(49),
        but(denied, charge(2)),
        but(denied, ask.reserve_credits("u", 2)),
    ):
        step(ledger)
    assert ledger.events("cap_reached") == []
    charge(1)(ledger)
    reached = {"cap_type": "daily", "model": None, "label": None, "limit": 50, "spent": 50, "action": "deny"}
    assert ledger.events("cap_reached") == [("cap_reached", reached)]
    for step in (charge(0), but(denied, charge(1)), later(hours=1), ask.refund_credits("@charge2")):
        step(ledger)
    assert len(ledger.events("cap_reached")) == 1
    for step in (charge(1), at("2026-01-02"), hold, settle(60), later(hours=1), ask.reserve_credits("u", 0)):
        step(ledger)
    ask.deduct_credits("u", 5, "@hold2")(ledger)
    spent = [row["spent"] for _, row in ledger.events("cap_reached")]
    assert spent == [50, 50, 60]
    assert ledger.events("cap_warned") == []


def test_setting_a_cap_below_what_was_spent_reaches_nothing(ledger: Ledger) -> None:
    for step in (rich, hold, charge(40), ask.set_spend_cap("u", 40), settle(9)):
        step(ledger)
    assert ledger.events("cap_reached") == []


# Windows


@pytest.mark.parametrize("zone", WINDOWS)
def test_a_window_is_the_local_day_or_month(conn: Connection, clock: Clock, zone: str) -> None:
    """Kept from charge to charge, and found in the ledger where a cap is set in its midst."""
    ledger = Ledger(conn, clock)
    ledger.publish(min_balance=0, timezone=zone)
    conn.execute("set timezone = 'Pacific/Kiritimati'")
    clock.set(WINDOWS[zone][0][0])
    for kind in ("daily", "monthly"):
        ask.add_credits(kind, 1000)(ledger)
        ask.add_credits(f"{kind}, set late", 1000)(ledger)
        ask.set_spend_cap(kind, 10, kind)(ledger)
    for moment, kind, room, uses in WINDOWS[zone]:
        clock.set(moment)
        with conn.transaction(force_rollback=True):
            ask.set_spend_cap(f"{kind}, set late", 10, kind)(ledger)
            for user in (kind, f"{kind}, set late"):
                reads(capped=True, current_spend=10 - room, cap_limit=10)(ledger, ask.check_spend_cap(user, None, MOST))
                denied(ledger, ask.deduct_credits(user, room + 1))
                gives(warnings=[])(ledger, ask.deduct_credits(user, room))
                caps = ask.list_spend_caps(user)
                resets_at = ledger.one(caps)["resets_at"]
                # In St John's the next day once began for a minute before clocks were put back.
                if resets_at < clock.now():
                    continue
                for time, spent in ((resets_at, 0), (resets_at - timedelta(microseconds=1), 10)):
                    clock.set(time)
                    lists({"spent": spent, "resets_at": resets_at if spent else ANY})(ledger, caps)
                clock.set(moment)
        for user in (kind, f"{kind}, set late"):
            ask.deduct_credits(user, uses)(ledger)
    assert ledger.violations() == []


# Sessions that meet


@pytest.mark.parametrize("kind", ["daily", "monthly"])
@pytest.mark.parametrize("model", [None, "any"])
def test_charges_under_a_cap(arena: Arena, kind: str, model: str | None) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 50, kind, model))
    assert arena.race(8, ask.deduct("u", costs(10))) == {"ok": 5, "spend_cap_exceeded": 3}
    reads(balance=950)(arena.ledger, ask.get_balance("u"))
    reads(capped=True, current_spend=50)(arena.ledger, ask.check_spend_cap("u", model, 1))
    assert [row["spent"] for _, row in arena.ledger.events("cap_reached")] == [50]
    arena.sound()


def test_holds_under_a_cap(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 50, model="any"))
    calls = [ask.deduct("u", costs(7)), ask.reserve("u", costs(7))]
    counted = outcomes(arena.meet(16, lambda number: calls[number % 2]))
    assert counted == {"ok": 7, "spend_cap_exceeded": 9}
    arena.sound()


def test_a_cap_that_warns_is_told_once(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 9, action="warn"))
    answers = arena.meet(8, lambda _: ask.deduct_credits("u", 10))
    assert [row["warnings"] for row in answers] == [["spend_cap_exceeded"]] * 8
    assert len(arena.ledger.events("cap_warned")) == 1


def test_setting_one_cap(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.deduct_credits("u", 30))
    answers = arena.meet(8, lambda number: ask.set_spend_cap("u", 40 + number))
    assert outcomes(answers) == {"ok": 8}
    assert sorted(row["revision"] for row in answers) == list(range(3, 11))
    (cap,) = arena.ledger.run(ask.list_spend_caps("u"))
    assert cap["limit"] == max(answers, key=lambda row: row["revision"])["limit"]
    assert arena.race(8, ask.remove_spend_cap("u", "daily")) == {"ok": 1, "cap_not_found": 7}
    arena.sound()


def test_refunds_beside_charges_under_a_cap(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 1000), ask.set_spend_cap("u", 100), *[ask.deduct_credits("u", 10)] * 10)
    charges = list(arena.ledger.ids["charge"])
    calls = [*(ask.refund_credits(charge) for charge in charges[:8]), *[ask.deduct_credits("u", 10)] * 8]
    answers = arena.meet(16, lambda number: calls[number])
    made = sum(1 for row in answers[8:] if not row["error"])
    assert outcomes(answers[:8]) == {"ok": 8}
    reads(balance=1000 - 20 - 10 * made)(arena.ledger, ask.get_balance("u"))
    told = arena.ledger.one(ask.check_spend_cap("u", None, 1000))
    assert told["current_spend"] == 20 + 10 * made <= 100
    arena.sound()

"""The life of accounts as it was seen elsewhere, where nobody disputes it: the same here, but for what is listed.

`LIVES` are the facts worth carrying. Where the larger collection from which they come is at hand, all of its
undisputed sequences are run too; `DIFFERENT` has those that go otherwise here on purpose, and why.
"""

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from ledger_helpers import UNKNOWN, Call, Ledger, Row, ask, at
from places import CONFORMANCE

from ducto_pg import CreditManager
from ducto_pg.errors import ConfigError

LIFECYCLES = CONFORMANCE / "lifecycle.json"

CONFIG: dict[str, Any] = {
    "models": {"_default": "input_tokens", "gpt-4": "input_tokens * 2"},
    "fixed": {"report": 10, "free": 0},
    "min_balance": 5,
    "plans": {
        "free": {"id": "free", "name": "Free"},
        "pro": {"id": "pro", "name": "Pro", "free_allowance": 100, "features": {"export": "csv"}},
    },
}
NO_CAP = {"capped": False, "current_spend": 0, "cap_limit": 0, "action": None}
soon = "2026-01-02T00:00+00"


def tokens(count: int, **more: Any) -> Call:
    return ask.deduct("u", {"input_tokens": count, **more})


# fmt: off
LIVES: dict[str, list[tuple[Any, Row]]] = {
    "only purchases count for life": [
        (ask.add_credits("u", 100, "purchase"), {"new_balance": 100, "lifetime_purchased": 100}),
        (ask.add_credits("u", 50, "adjustment"), {"new_balance": 150, "lifetime_purchased": 100}),
        (ask.add_credits("u", 30, "signup_bonus"), {"new_balance": 180, "lifetime_purchased": 100}),
        (ask.add_credits("u", 7, "purchase"), {"new_balance": 187, "lifetime_purchased": 107}),
    ],
    "a hold keeps the floor": [
        (ask.add_credits("u", 100), {}),
        (ask.reserve_credits("u", 95), {"amount": 95, "balance": 100, "reserved_total": 95}),
        (ask.reserve_credits("u", 1), {"error": "insufficient_credits"}),
    ],
    "but for its own": [
        (ask.add_credits("u", 10), {}),
        (ask.reserve_credits("u", 10, min_balance=0), {"amount": 10, "reserved_total": 10}),
    ],
    "what a hold held is free again": [
        (ask.add_credits("u", 100), {}),
        (ask.reserve_credits("u", 40), {"reserved_total": 40}),
        (ask.deduct_credits("u", 40, "@hold"), {"amount": -40, "balance_after": 60}),
        (ask.reserve_credits("u", 55, min_balance=5), {"amount": 55, "reserved_total": 55}),
    ],
    "a fixed job is added to a usage": [
        (ask.add_credits("u", 100), {}),
        (tokens(7, fixed_job="report"), {"amount": -17, "balance_after": 83}),
    ],
    "a part is refunded": [
        (ask.add_credits("u", 100), {}),
        (ask.deduct_credits("u", 40), {"balance_after": 60}),
        (ask.refund_credits("@charge", 10), {"amount": 10, "new_balance": 70}),
        (ask.refund_credits(UNKNOWN), {"error": "transaction_not_found", "new_balance": 0}),
    ],
    "what expires is swept, of each account its own": [
        (ask.add_credits("u", 100, "purchase", expires_at=soon), {"new_balance": 100}),
        (ask.add_credits("v", 40, expires_at=soon), {"new_balance": 40}),
        (ask.add_credits("w", 9), {}),
        (at("2026-01-03"), {}),
        (ask.sweep_expired_credits(True), {"expired_count": 2, "expired_amount": 140}),
        (ask.sweep_expired_credits(), {"expired_count": 2, "expired_amount": 140}),
        (ask.sweep_expired_credits(), {"expired_count": 0, "expired_amount": 0}),
        (ask.get_balance("u"), {"balance": 0, "lifetime_purchased": 100}),
        (ask.get_balance("w"), {"balance": 9}),
    ],
    "an allowance pays without a balance": [
        (ask.set_user_plan("u", "pro"), {"plan_id": "pro"}),
        (tokens(100), {"amount": 0, "balance_after": 0}),
        (tokens(1), {"error": "insufficient_credits"}),
        (ask.check_allowance("u"), {"allowance_remaining": 0}),
    ],
    "and for jobs": [
        (ask.add_credits("u", 50), {}),
        (ask.set_user_plan("u", "pro"), {}),
        (ask.deduct_fixed("u", "report"), {"amount": 0, "balance_after": 50}),
        (ask.check_allowance("u"), {"allowance_remaining": 90}),
    ],
    "what was used stays used": [
        (ask.set_user_plan("u", "pro"), {}),
        (tokens(60), {"amount": 0}),
        (ask.set_user_plan("u", "free"), {}),
        (ask.check_allowance("u"), {"allowance_remaining": 0}),
        (ask.set_user_plan("u", "pro"), {}),
        (ask.check_allowance("u"), {"allowance_remaining": 40}),
    ],
    "a cap denies what is beyond it": [
        (ask.add_credits("u", 1000), {}),
        (ask.set_spend_cap("u", 50), {}),
        (ask.check_spend_cap("u", None, 50), NO_CAP),
        (ask.check_spend_cap("u", None, 51), {"capped": True, "cap_limit": 50, "action": "deny"}),
        (tokens(50), {"amount": -50}),
        (tokens(1), {"error": "spend_cap_exceeded"}),
    ],
    "of one model": [
        (ask.add_credits("u", 1000), {}),
        (ask.set_spend_cap("u", 20, model="gpt-4"), {}),
        (tokens(500), {"amount": -500}),
        (tokens(10, model="gpt-4"), {"amount": -20}),
    ],
    "one that denies before one that warns": [
        (ask.set_spend_cap("u", 5, action="warn"), {}),
        (ask.set_spend_cap("u", 10, "monthly"), {}),
        (ask.check_spend_cap("u", None, 20), {"capped": True, "cap_limit": 10, "action": "deny"}),
        (ask.check_spend_cap("u", None, 7), {"capped": False, "cap_limit": 5, "action": "warn"}),
    ],
    "a cap does not count what an allowance pays": [
        (ask.add_credits("u", 1000), {}),
        (ask.set_user_plan("u", "pro"), {}),
        (ask.set_spend_cap("u", 50), {}),
        (tokens(130), {"amount": -30, "balance_after": 970}),
        (tokens(25), {"error": "spend_cap_exceeded"}),
    ],
    "a team's pool, its members and their caps": [
        (ask.create_team("T", 100, team_id="t"), {"name": "T"}),
        (ask.deduct_team_credits("t", "u", 10), {"error": "not_a_member"}),
        (ask.add_team_member("t", "u"), {"role": "member"}),
        (ask.deduct_team_credits("t", "u", 101), {"error": "insufficient_credits"}),
        (ask.add_team_member("t", "u", "member", 0), {}),
        (ask.deduct_team_credits("t", "u", 1), {"error": "member_cap_exceeded"}),
        (ask.get_team_balance("t"), {"balance": 100, "member_count": 1, "name": "T"}),
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def module_ledger(module_ledger: Ledger) -> Ledger:
    """With the collection's prices."""
    CreditManager(module_ledger.conn).publish_pricing(CONFIG)
    return module_ledger


@pytest.mark.parametrize("life", LIVES)
def test_a_life(ledger: Ledger, life: str) -> None:
    for step, fields in LIVES[life]:
        if isinstance(step, Call):
            row = ledger.one(step)
            assert {name: row[name] for name in ({"error": None} | fields)} == {"error": None} | fields, step
        else:
            step(ledger)


# The larger collection

# What goes otherwise, by case, step and field. A step that fails there and succeeds here has `error: None`.
DIFFERENT: dict[str, tuple[str, dict[int, Row]]] = {
    "life-033": (
        "min_balance bounds every charge without a hold",
        {1: {"error": "insufficient_credits", "amount": 0, "balance_after": 100}, 2: {"balance": 100}},
    ),
    "life-051": (
        "the half credit that is left over is carried to the next charge",
        {2: {"amount": -1, "balance_after": 98}, 3: {"balance": 98}},
    ),
    "life-059": (
        "an unknown user is told, also where the charge is nothing",
        {0: {"error": "account_not_found", "has_transaction": False}},
    ),
    "life-095": ("rate_overrides apply: the plan's _default costs nothing", {3: {"remaining": 100}}),
    "life-097": (
        "rate_overrides apply",
        {2: {"error": None, "amount": 0, "has_transaction": True}, 3: {"remaining": 100}},
    ),
    "life-103": ("rate_overrides apply", {6: {"remaining": 100}}),
    "life-119": (
        "rate_overrides apply",
        {
            3: {"amount": 0, "balance_after": 1000},
            4: {"error": None, "amount": 0, "has_transaction": True},
            5: {"balance": 1000},
            6: {"remaining": 100},
        },
    ),
}
# Told in other words: one list of refusals, the same for accounts and teams.
REFUSALS = {
    "insufficient_team_balance": "insufficient_credits",
    "user_not_in_team": "not_a_member",
    "spend_cap_exceeded": "member_cap_exceeded",
    "spend_cap_denied": "spend_cap_exceeded",
}


def _cases() -> list[Any]:
    """The undisputed cases, those with rate_overrides also without, where nothing is different."""
    if not LIFECYCLES.exists():
        return []
    cases = []
    for case in json.loads(LIFECYCLES.read_text())["cases"]:
        if not case["disputed"]:
            cases.append(pytest.param(case, DIFFERENT.get(case["id"], ("", {}))[1], id=f"{case['id']} {case['name']}"))
            plain = copy.deepcopy(case)
            overrides = [
                plan.pop("rate_overrides", None) for plan in ((plain["config"] or {}).get("plans") or {}).values()
            ]
            if any(overrides):
                cases.append(pytest.param(plain, {}, id=f"{case['id']} {case['name']}, at the same rates"))
    return cases


class _Life:
    """Runs the steps of a case on a ledger and tells each as the collection tells it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.saved: dict[str, str] = {"@random": UNKNOWN}

    def __call__(self, step: Row) -> Row:
        row: Row = getattr(self, f"_{step['op']}")(step)
        for name in ("reservation_id", "transaction_id", "team_id"):
            if row.get(name) and step.get("save"):
                self.saved[step["save"]] = row[name]
        told = {
            "has_transaction": bool(row.get("transaction_id")),
            "ok": row.get("error") is None,
            "remaining": row.get("allowance_remaining"),
            "plan": row.get("plan_id"),
            "has_plan": row.get("plan_id") is not None,
        }
        if "team_balance_after" in row:
            told["balance_after"] = row["team_balance_after"]
        return told | row

    def _add(self, step: Row) -> Row:
        arguments: Row = {}
        now = self.ledger.clock.now()
        if step.get("expires_in"):
            end = now + timedelta(seconds=step["expires_in"])
            arguments["expires_at"] = end.isoformat()
            self.ledger.clock.set(min(now, end - timedelta(seconds=1)))
        row = self.ledger.one(ask.add_credits(step["user"], step["amount"], step.get("type"), **arguments))
        self.ledger.clock.set(now)
        return row

    def _reserve(self, step: Row) -> Row:
        return self.ledger.one(ask.reserve_credits(step["user"], step["amount"], min_balance=step["min_balance"]))

    def _deduct_credits(self, step: Row) -> Row:
        hold = step["reservation"] and self.saved[step["reservation"]]
        return self.ledger.one(ask.deduct_credits(step["user"], step["amount"], hold, step["key"]))

    def _deduct(self, step: Row) -> Row:
        return self.ledger.one(ask.deduct(step["user"], step["metrics"], step["key"]))

    def _deduct_fixed(self, step: Row) -> Row:
        return self.ledger.one(ask.deduct_fixed(step["user"], step["job"], step["key"]))

    def _refund(self, step: Row) -> Row:
        return self.ledger.one(ask.refund_credits(self.saved[step["tx"]], step["amount"]))

    def _balance(self, step: Row) -> Row:
        return self.ledger.one(ask.get_balance(step["user"]))

    def _sweep(self, step: Row) -> Row:
        return self.ledger.one(ask.sweep_expired_credits(step["dry"]))

    def _set_plan(self, step: Row) -> Row:
        return self.ledger.one(ask.set_user_plan(step["user"], step["plan"]))

    def _get_plan(self, step: Row) -> Row:
        return self.ledger.one(ask.get_user_plan(step["user"]))

    def _allowance(self, step: Row) -> Row:
        return self.ledger.one(ask.check_allowance(step["user"]))

    def _cap(self, step: Row) -> Row:
        call = ask.set_spend_cap(step["user"], step["limit"], step["cap_type"], step["model"], step["action"])
        return self.ledger.one(call)

    def _check_cap(self, step: Row) -> Row:
        return self.ledger.one(ask.check_spend_cap(step["user"], step["model"], step["amount"]))

    def _team_create(self, step: Row) -> Row:
        return self.ledger.one(ask.create_team(step["name"], step["balance"]))

    def _team_add(self, step: Row) -> Row:
        call = ask.add_team_member(self.saved[step["team"]], step["user"], step["role"], step["spend_cap"])
        return self.ledger.one(call)

    def _team_deduct(self, step: Row) -> Row:
        return self.ledger.one(ask.deduct_team_credits(self.saved[step["team"]], step["user"], step["amount"]))

    def _team_balance(self, step: Row) -> Row:
        return self.ledger.one(ask.get_team_balance(self.saved[step["team"]]))

    def _active(self, step: Row) -> Row:
        return {"active": CreditManager(self.ledger.conn).get_active_pricing()}

    def _publish(self, step: Row) -> Row:
        CreditManager(self.ledger.conn).publish_pricing(step["config"])
        return {}

    def _load(self, step: Row) -> Row:
        return self.ledger.one(ask.calculate_cost({}))


RAISED: dict[str, tuple[type[Exception], Callable[[Any], bool]]] = {
    "no_active_pricing": (psycopg.Error, lambda error: error.sqlstate == "DU001"),
    "no_variables": (ConfigError, lambda error: error.path == "models.a"),
}


@pytest.mark.parametrize(("case", "different"), _cases() or [pytest.param({}, {}, id="not at hand")])
def test_a_life_elsewhere(request: pytest.FixtureRequest, case: Row, different: dict[int, Row]) -> None:
    if not case:
        pytest.skip("the collection is not at hand")
    ledger = Ledger(request.getfixturevalue("conn"), request.getfixturevalue("clock"))
    ledger.clock.set("2026-03-01")
    if case["config"]:
        CreditManager(ledger.conn).publish_pricing(case["config"])
    life = _Life(ledger)
    for number, step in enumerate(case["steps"]):
        there = step["postgres"]
        reason = there.get("reason")
        if reason in RAISED:
            kind, right = RAISED[reason]
            with pytest.raises(kind) as raised:
                life(step)
            assert right(raised.value), step
            continue
        row = life(step)
        if step["op"] == "active":
            assert (row["active"] is None) == (there["result"] is None), number
            continue
        expected = {"error": REFUSALS.get(reason, reason)} if "raises" in there else dict(there["result"] or {})
        if "error" in expected and step["op"] == "team_deduct":
            expected["error"] = REFUSALS.get(expected["error"], expected["error"])
        if "has_transaction" in expected:  # a charge of nothing is recorded here too
            expected["has_transaction"] = True
        expected |= different.get(number, {})
        assert {name: row[name] for name in expected} == expected, (number, step)
    assert ledger.violations() == []


def test_every_difference_has_its_case() -> None:
    if not LIFECYCLES.exists():
        pytest.skip("the collection is not at hand")
    undisputed = {case["id"] for case in json.loads(LIFECYCLES.read_text())["cases"] if not case["disputed"]}
    assert set(DIFFERENT) <= undisputed

"""A subscription as the customer drives it: trial, upgrade at once, downgrade and cancellation at the period's end.

The plans say the rest: `anchor: start` begins periods when the customer did, and `rollover` hands on what was left.
"""

from datetime import datetime, timedelta
from typing import Any

from ducto_pg import CreditManager, GetUserPlanResult

PRICES: dict[str, Any] = {
    "models": {"chat": "input_tokens * 0.01 + output_tokens * 0.03"},
    "min_balance": 0,
    "default_plan": "free",
    "plans": {
        "free": {"id": "free", "name": "Free", "free_allowance": 10},
        "pro": {"id": "pro", "name": "Pro", "free_allowance": 100, "anchor": "start", "rollover": 50},
        "max": {"id": "max", "name": "Max", "free_allowance": 500, "anchor": "start", "rollover": 250},
    },
}


def begin_trial(credits: CreditManager, user: str, now: datetime) -> None:
    """Two weeks of pro. Who does not subscribe is on the free plan then."""
    credits.set_user_plan(user, "pro", until=now + timedelta(days=14), idempotency_key="trial").or_raise()


def subscribe(credits: CreditManager, user: str, plan: str, now: datetime, paid_until: datetime) -> None:
    """From now on, and periods begin now."""
    credits.set_user_plan(user, plan, anchor=now, until=paid_until).or_raise()


def upgrade(credits: CreditManager, user: str, plan: str, paid_until: datetime) -> None:
    """At once, in the period that runs: what was used of it stays used, so going to and fro wins nothing."""
    credits.set_user_plan(user, plan, until=paid_until).or_raise()


def downgrade(credits: CreditManager, user: str, plan: str) -> None:
    """When the present period ends. What the customer paid for is the customer's until then."""
    credits.set_user_plan(user, plan, "period_end").or_raise()


def cancel(credits: CreditManager, user: str) -> None:
    """When the present period ends, on the free plan."""
    credits.set_user_plan(user, "free", "period_end").or_raise()


def account_page(credits: CreditManager, user: str) -> str:
    """What the customer is shown."""
    plan: GetUserPlanResult = credits.get_user_plan(user)
    text = f"{plan.plan_name}: {plan.allowance_remaining} credits until {(plan.period_end or '')[:10]}"
    return text + (f", then {plan.next_plan_id}" if plan.next_plan_at else "")

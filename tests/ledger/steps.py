"""Every call that changes an account or a team as a step that succeeds in a fresh scene, and every call that reads."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from conftest import Connection

from ducto_pg import CreditManager

Scene = dict[str, str]
Step = Callable[[CreditManager, Scene], Any]

CONFIG: dict[str, Any] = {
    "models": {"gpt-4": "input_tokens * 0.5", "inverse": "1 / input_tokens"},
    "fixed": {"report": 7},
    "min_balance": 0,
    "plans": {"pro": {"id": "pro", "name": "Pro", "features": {"export": "csv"}}},
}

USAGE = {"model": "gpt-4", "input_tokens": 60}

# What changes an account; each step succeeds in a fresh scene.
STEPS: dict[str, Step] = {
    "hold": lambda m, at: m.reserve_credits(at["user"], 30),
    "hold an estimate": lambda m, at: m.reserve(at["user"], USAGE),
    "hold with a key": lambda m, at: m.reserve_credits(at["user"], 30, idempotency_key="one"),
    "a bounded hold": lambda m, at: m.reserve_credits(at["user"], 30, labels=["key"], overrun="bounded"),
    "extend": lambda m, at: m.extend_reservation(at["hold"], 30),
    "release": lambda m, at: m.release_reservation(at["hold"]),
    "charge": lambda m, at: m.deduct_credits(at["user"], 30),
    "charge usage": lambda m, at: m.deduct(at["user"], USAGE),
    "charge with a key": lambda m, at: m.deduct_credits(at["user"], 30, idempotency_key="one"),
    "charge with labels": lambda m, at: m.deduct(at["user"], USAGE, labels=["key", "chat"]),
    "charge a job": lambda m, at: m.deduct_fixed(at["user"], "report"),
    "settle": lambda m, at: m.deduct_credits(at["user"], 30, at["hold"]),
    "settle a part": lambda m, at: m.deduct(at["user"], USAGE, reservation_id=at["hold"], final=False),
    "refund": lambda m, at: m.refund_credits(at["charge"]),
    "add": lambda m, at: m.add_credits(at["user"], 5),
    "add with a key": lambda m, at: m.add_credits(at["user"], 5, idempotency_key="one"),
    "remove": lambda m, at: m.remove_credits(at["user"], 30, transaction_id=at["grant"]),
    "limit": lambda m, at: m.set_credit_limit(at["user"], 3),
    "add what expires": lambda m, at: m.add_credits(at["user"], 5, expires_at=datetime.now(UTC) + timedelta(days=1)),
    "charge in a batch": lambda m, at: m.deduct_batch([{"user_id": at["user"], "amount": 30}])[0],
    "set a plan": lambda m, at: m.set_user_plan(at["user"], "pro"),
    "set a cap": lambda m, at: m.set_spend_cap(at["user"], 500),
    "set a cap on a label": lambda m, at: m.set_spend_cap(at["user"], 500, "lifetime", label="key"),
    "set a low balance": lambda m, at: m.set_low_balance(at["user"], 5),
    "set a top-up": lambda m, at: m.set_auto_topup(at["user"], 500, 100),
    "fail a top-up": lambda m, at: m.fail_topup(at["user"], m.set_auto_topup(at["user"], 500, 100).due_key or "", 60),
    "remove a top-up": lambda m, at: [m.set_auto_topup(at["user"], 5, 100), m.remove_auto_topup(at["user"])][1],
    "take over a guest": lambda m, at: [
        m.add_credits(f"{at['user']} as a guest", 5),
        m.merge_accounts(f"{at['user']} as a guest", at["user"]),
    ][1],
    "thaw": lambda m, at: m.freeze_account(at["user"], False),
}

# The same of a team.
TEAM_STEPS: dict[str, Step] = {
    "hold": lambda m, at: m.reserve_team_credits(at["team"], at["user"], 30),
    "charge": lambda m, at: m.deduct_team(at["team"], at["user"], USAGE),
    "charge with a key": lambda m, at: m.deduct_team_credits(at["team"], at["user"], 30, idempotency_key="one"),
    "settle": lambda m, at: m.deduct_team_credits(at["team"], at["user"], 30, at["team hold"]),
    "refund": lambda m, at: m.refund_credits(at["team charge"]),
    "add a member": lambda m, at: m.add_team_member(at["team"], "another"),
    "change a member": lambda m, at: m.add_team_member(at["team"], at["user"], "lead", 90, "daily"),
    "remove a member": lambda m, at: m.remove_team_member(at["team"], "bystander"),
    "remove a cap": lambda m, at: m.remove_spend_cap(at["team"], "monthly"),
    "add": lambda m, at: m.add_credits(at["team"], 5),
}


def connection(manager: CreditManager) -> Connection:
    """The session of a manager that was given one."""
    source = manager._source
    assert isinstance(source, psycopg.Connection)
    return source


def mine(name: str, *arguments: Any) -> Step:
    """A call of an end user's own, who is signed in."""

    def step(manager: CreditManager, at: Scene) -> Any:
        claims = f'{{"sub": "{at["user"]}"}}'
        connection(manager).execute("select set_config('request.jwt.claims', %s, false)", [claims])
        return getattr(manager, name)(*arguments)

    return step


# Every call that only reads.
READS: dict[str, Step] = {
    "spend_margin": lambda m, at: m.spend_margin(),
    "read_usage": lambda m, at: m.read_usage({"prompt_tokens": 3}),
    "aggregate_stats": lambda m, at: m.aggregate_stats(),
    "calculate_cost": lambda m, at: m.calculate_cost(USAGE, at["user"]),
    "check_allowance": lambda m, at: m.check_allowance(at["user"]),
    "check_feature": lambda m, at: m.check_feature(at["user"], "export"),
    "check_spend_cap": lambda m, at: m.check_spend_cap(at["user"], "capped", 1),
    "daily_spend": lambda m, at: m.daily_spend(),
    "explain_transaction": lambda m, at: m.explain_transaction(at["charge"]),
    "get_active_pricing": lambda m, at: m.get_active_pricing(),
    "get_auto_topup": lambda m, at: m.get_auto_topup(at["user"]),
    "get_balance": lambda m, at: m.get_balance(at["user"]),
    "get_pricing_config": lambda m, at: m.get_pricing_config(1),
    "get_pricing_history": lambda m, at: m.get_pricing_history(),
    "get_reservation": lambda m, at: m.get_reservation(at["hold"]),
    "get_statement": lambda m, at: m.get_statement(at["user"], None, None),
    "get_team": lambda m, at: m.get_team(at["team"]),
    "get_team_balance": lambda m, at: m.get_team_balance(at["team"]),
    "get_team_members": lambda m, at: m.get_team_members(at["team"]),
    "get_transaction": lambda m, at: m.get_transaction(at["charge"]),
    "get_user_plan": lambda m, at: m.get_user_plan(at["user"]),
    "list_reservations": lambda m, at: m.list_reservations(at["user"]),
    "list_spend_caps": lambda m, at: m.list_spend_caps(at["user"]),
    "list_transactions": lambda m, at: m.list_transactions(at["user"]),
    "my_balance": mine("my_balance"),
    "my_daily_spend": mine("my_daily_spend", None, None),
    "my_plan": mine("my_plan"),
    "my_statement": mine("my_statement", None, None),
    "my_transactions": mine("my_transactions"),
    "spend_by_label": lambda m, at: m.spend_by_label(),
    "spend_by_model": lambda m, at: m.spend_by_model(),
    "spend_by_user": lambda m, at: m.spend_by_user(),
    "top_users": lambda m, at: m.top_users(),
    "verify_ledger": lambda m, at: m.verify_ledger(at["user"]),
    "version": lambda m, at: m.version(),
}


def scene(manager: CreditManager, user: str) -> Scene:
    """An account with balance 80, of which 30 are held, and a charge of 20."""
    grant = manager.add_credits(user, 100).or_raise()
    charge = manager.deduct_credits(user, 20).or_raise()
    hold = manager.reserve_credits(user, 30).or_raise()
    return {
        "user": user,
        "grant": grant.transaction_id,
        "charge": charge.transaction_id,
        "hold": hold.reservation_id,
    }


def team_scene(manager: CreditManager, user: str) -> Scene:
    """A team with balance 80, of which 30 are held for the user, a charge of 20, a cap and one more member."""
    team = manager.create_team("Team", 100, team_id=f"the team of {user}").or_raise().team_id
    for member in (user, "bystander"):
        manager.add_team_member(team, member, "member", 90).or_raise()
    manager.set_spend_cap(team, 500, "monthly").or_raise()
    charge = manager.deduct_team_credits(team, user, 20).or_raise()
    hold = manager.reserve_team_credits(team, user, 30).or_raise()
    return {"team": team, "team charge": charge.transaction_id, "team hold": hold.reservation_id}

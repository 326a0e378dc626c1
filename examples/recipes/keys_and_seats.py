"""Budgets of API keys, of a session and of a team's seats: caps under the lock of the charge, no counters beside it."""

from ducto_pg import CreditManager, SpendCapExceededError, UsageMetrics


def issue_key(credits: CreditManager, user: str, key_id: str, monthly: int) -> None:
    """An API key that may spend so many credits in a month. Issuing it again changes the budget, not what it spent."""
    credits.set_spend_cap(user, monthly, "monthly", label=f"key:{key_id}").or_raise()


def begin_session(credits: CreditManager, user: str, session_id: str, budget: int) -> None:
    """A session that may spend so many credits in all."""
    credits.set_spend_cap(user, budget, "lifetime", label=f"session:{session_id}").or_raise()


def charge(credits: CreditManager, user: str, key_id: str, session_id: str, usage: UsageMetrics, request: str) -> bool:
    """Charge by what was used; False where the budget of the key or the session does not allow it."""
    labels = [f"key:{key_id}", f"session:{session_id}"]
    try:
        credits.deduct(user, usage, request, labels=labels).or_raise()
    except SpendCapExceededError:
        return False
    return True


def left(credits: CreditManager, user: str, key_id: str) -> int:
    """What is left of a key's budget this month."""
    label = f"key:{key_id}"
    return next(cap.limit - cap.spent for cap in credits.list_spend_caps(user) if cap.label == label)


def add_seat(credits: CreditManager, team: str, user: str, weekly: int) -> None:
    """A seat that may spend so many of the team's credits in a week."""
    credits.add_team_member(team, user, "seat", spend_cap=weekly, spend_cap_period="weekly").or_raise()


def charge_seat(credits: CreditManager, team: str, user: str, usage: UsageMetrics, request: str) -> int:
    """Charge the team's pool for a member; the credits charged."""
    answer = credits.deduct_team(team, user, usage, request).or_raise()
    return -answer.amount + answer.allowance_used

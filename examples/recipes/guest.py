"""A guest becomes a user: what the guest had moves over, with its expiry, and later refunds follow."""

from datetime import datetime, timedelta

from ducto_pg import BalanceResult, CreditManager


def welcome(credits: CreditManager, session_id: str, now: datetime) -> str:
    """A guest's account, with some credits for a week; the same session is welcomed once."""
    guest = f"guest:{session_id}"
    credits.add_credits(
        guest, 20, "promotion", expires_at=now + timedelta(days=7), idempotency_key="welcome"
    ).or_raise()
    return guest


def sign_up(credits: CreditManager, session_id: str, user: str) -> BalanceResult:
    """Move a guest's credits to the user. A hold that is still open is settled or released first; then try again."""
    return credits.merge_accounts(f"guest:{session_id}", user, idempotency_key=f"sign-up:{session_id}").or_raise()

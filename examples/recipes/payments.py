"""Webhooks of a payment provider: delivered twice, late and in any order, and applied once, in the right one.

A handler that raises answers the provider with an error, and the webhook comes again. `event_at` and the keys do the
rest: a plan follows the latest event, a payment is granted once, and a dispute that is won gives back what it took.
"""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from ducto_pg import CreditManager

GRACE = timedelta(days=3)


def when(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def handle(credits: CreditManager, event: dict[str, Any]) -> None:
    """Apply a webhook; raises where it must come again, as when what it refers to has not arrived yet."""
    user, data = event["user"], event["data"]
    told = {"event_at": when(event["created"]), "idempotency_key": event["id"]}
    match event["type"]:
        case "subscription.paid" | "subscription.cancelled":
            # Each renewal moves the end on. Who does not pay is on the default plan three days later, without a job.
            grace = GRACE if event["type"] == "subscription.paid" else timedelta(0)
            until = when(data["paid_until"]) + grace
            credits.set_user_plan(user, data["plan"], anchor=when(data["anchor"]), until=until, **told).or_raise()
        case "payment.succeeded":
            # With a lot of its own, so that a refund can ask what is left of it.
            credits.add_credits(
                user,
                data["credits"],
                "purchase",
                idempotency_key=data["payment"],
                paid_amount=Decimal(data["amount"]),
                paid_currency=data["currency"],
                reference=data["payment"],
                keep_lot=True,
            ).or_raise()
        case "payment.disputed":
            grant = credits.get_transaction(user_id=user, idempotency_key=data["payment"]).or_raise()
            credits.remove_credits(
                user, grant.amount, "disputed", grant.transaction_id, idempotency_key=data["dispute"]
            ).or_raise()
        case "dispute.won":
            removal = credits.get_transaction(user_id=user, idempotency_key=data["dispute"]).or_raise()
            credits.refund_credits(removal.transaction_id, idempotency_key=event["id"]).or_raise()
        case "payment.refunded":
            # Money back for what was not spent: no more than that is taken.
            grant = credits.get_transaction(user_id=user, idempotency_key=data["payment"]).or_raise()
            credits.remove_credits(
                user, None, "refunded", grant.transaction_id, idempotency_key=event["id"], unspent_only=True
            ).or_raise()

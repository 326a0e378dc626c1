"""Auto top-up: the ledger says once that credits are low, a worker takes the money, and the grant ends it.

The event's key is the payment's idempotency key and the grant's too, so a worker that dies at any point may begin
again: money is taken once, and credits are given once.
"""

from collections.abc import Callable
from decimal import Decimal

from ducto_pg import CreditManager


class Declined(Exception):
    """The card was declined."""


Pay = Callable[[str, int, str], Decimal]
"""Takes the money for so many credits from a user, once for each key, and returns it; raises Declined."""


def work(credits: CreditManager, pay: Pay) -> int:
    """Serve the top-ups that wait; returns how many were paid. Call it from a loop or from cron."""
    paid = 0
    events = credits.fetch_events(consumer="topup", lease_seconds=300)
    for event in events:
        if event.type == "topup_due":
            user, key, amount = event.account_id, event.payload["key"], event.payload["amount"]
            try:
                money = pay(user, amount, key)
            except Declined:
                # Not asked for again before tomorrow, and not counted in this month.
                credits.fail_topup(user, key, retry_seconds=86400)
            else:
                credits.add_credits(
                    user, amount, "purchase", idempotency_key=key, paid_amount=money, paid_currency="EUR"
                ).or_raise()
                paid += 1
        credits.ack_events([event.event_id], consumer="topup")
    return paid

"""The calls from Django: `python manage.py charge USER_ID`."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand
from django.db import connection, transaction

from ducto_pg import CreditManager, UsageMetrics


class Command(BaseCommand):
    help = "Give, hold, charge, be refused, look, refund."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("user_id")

    @transaction.atomic
    def handle(self, *args: Any, user_id: str, **options: Any) -> None:
        # Inside atomic(), a charge and the writes of your models stand or fall together.
        connection.ensure_connection()
        credits = CreditManager(connection.connection)
        added = credits.add_credits(user_id, 1000, "purchase", idempotency_key="invoice-1").or_raise()
        print(f"added {added.amount}, balance {added.new_balance}")

        longest = UsageMetrics(model="gpt-5", input_tokens=1200, output_tokens=4096)
        hold = credits.reserve(user_id, longest, idempotency_key="request-1").or_raise()
        print(f"held {hold.amount}")

        used = UsageMetrics(model="gpt-5-2025-08-07", input_tokens=1200, output_tokens=350)
        charge = credits.deduct(
            user_id, used, idempotency_key="request-1", reservation_id=hold.reservation_id
        ).or_raise()
        print(f"charged {-charge.amount} for {charge.cost}, balance {charge.balance_after}")

        # Or as SQL, on Django's own cursor.
        with connection.cursor() as cursor:
            cursor.execute(
                "select error from ducto.deduct_credits(%s, %s, p_idempotency_key => %s)",
                [user_id, 1_000_000, "request-2"],
            )
            print(f"refused: {cursor.fetchone()[0]}")

        balance = credits.get_balance(user_id)
        print(f"balance {balance.balance}, reserved {balance.reserved}")

        refund = credits.refund_credits(
            charge.transaction_id, reason="answer was empty", idempotency_key="refund-1"
        ).or_raise()
        print(f"refunded {refund.amount}, balance {refund.new_balance}")

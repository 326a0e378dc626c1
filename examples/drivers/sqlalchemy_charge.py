"""The calls from SQLAlchemy: `python sqlalchemy_charge.py USER_ID`, the database in the PG… variables."""

import sys
from typing import Any

from sqlalchemy import create_engine, text

from ducto_pg import CreditManager, UsageMetrics


def main(user: str) -> None:
    """Give, hold, charge, be refused, look, refund; in one transaction with whatever else the session writes."""
    engine = create_engine("postgresql+psycopg://")
    with engine.begin() as conn:
        # The calls as methods, on the psycopg connection beneath; a Session's is that of session.connection().
        psycopg_connection: Any = conn.connection.driver_connection
        credits = CreditManager(psycopg_connection)
        added = credits.add_credits(user, 1000, "purchase", idempotency_key="invoice-1").or_raise()
        print(f"added {added.amount}, balance {added.new_balance}")

        longest = UsageMetrics(model="gpt-5", input_tokens=1200, output_tokens=4096)
        hold = credits.reserve(user, longest, idempotency_key="request-1").or_raise()
        print(f"held {hold.amount}")

        used = UsageMetrics(model="gpt-5-2025-08-07", input_tokens=1200, output_tokens=350)
        charge = credits.deduct(user, used, idempotency_key="request-1", reservation_id=hold.reservation_id).or_raise()
        print(f"charged {-charge.amount} for {charge.cost}, balance {charge.balance_after}")

        # Or as text, over any driver.
        refuse = text("select error from ducto.deduct_credits(:user, :amount, p_idempotency_key => :key)")
        print(f"refused: {conn.scalar(refuse, {'user': user, 'amount': 1_000_000, 'key': 'request-2'})}")

        look = text("select balance, reserved from ducto.get_balance(:user)")
        balance = conn.execute(look, {"user": user}).one()
        print(f"balance {balance.balance}, reserved {balance.reserved}")

        refund = credits.refund_credits(
            charge.transaction_id, reason="answer was empty", idempotency_key="refund-1"
        ).or_raise()
        print(f"refunded {refund.amount}, balance {refund.new_balance}")
    engine.dispose()


if __name__ == "__main__":
    main(sys.argv[1])

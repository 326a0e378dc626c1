"""The calls from psycopg2: `python psycopg2_charge.py USER_ID`, the database in the PG… variables."""

import sys

import psycopg2
from psycopg2.extras import Json, NamedTupleCursor

HOLD = """
select reservation_id, amount, error
from ducto.reserve(%(user)s, %(usage)s, p_idempotency_key => %(key)s)
"""
CHARGE = """
select transaction_id, amount, cost, balance_after, error
from ducto.deduct(%(user)s, %(usage)s, p_idempotency_key => %(key)s, p_reservation_id => %(hold)s)
"""


def main(user: str) -> None:
    """Give, hold, charge, be refused, look, refund; in one transaction, as psycopg2 begins one."""
    with psycopg2.connect("", cursor_factory=NamedTupleCursor) as conn, conn.cursor() as cursor:
        cursor.execute(
            "select amount, new_balance from ducto.add_credits(%s, %s, 'purchase', p_idempotency_key => %s)",
            [user, 1000, "invoice-1"],
        )
        added = cursor.fetchone()
        print(f"added {added.amount}, balance {added.new_balance}")

        longest = {"model": "gpt-5", "input_tokens": 1200, "output_tokens": 4096}
        cursor.execute(HOLD, {"user": user, "usage": Json(longest), "key": "request-1"})
        hold = cursor.fetchone()
        if hold.error:
            sys.exit(f"refused: {hold.error}")
        print(f"held {hold.amount}")

        used = {"model": "gpt-5-2025-08-07", "input_tokens": 1200, "output_tokens": 350}
        arguments = {"user": user, "usage": Json(used), "key": "request-1", "hold": hold.reservation_id}
        cursor.execute(CHARGE, arguments)
        charge = cursor.fetchone()
        print(f"charged {-charge.amount} for {charge.cost}, balance {charge.balance_after}")

        cursor.execute(
            "select error from ducto.deduct_credits(%s, %s, p_idempotency_key => %s)", [user, 1_000_000, "request-2"]
        )
        print(f"refused: {cursor.fetchone().error}")

        cursor.execute("select balance, reserved from ducto.get_balance(%s)", [user])
        balance = cursor.fetchone()
        print(f"balance {balance.balance}, reserved {balance.reserved}")

        cursor.execute(
            "select amount, new_balance from ducto.refund_credits(%s, p_reason => %s, p_idempotency_key => %s)",
            [charge.transaction_id, "answer was empty", "refund-1"],
        )
        refund = cursor.fetchone()
        print(f"refunded {refund.amount}, balance {refund.new_balance}")


if __name__ == "__main__":
    main(sys.argv[1])

"""The calls from asyncpg: `python asyncpg_charge.py USER_ID`, the database in the PG… variables."""

import asyncio
import json
import sys

import asyncpg

HOLD = "select reservation_id, amount, error from ducto.reserve($1, $2, p_idempotency_key => $3)"
CHARGE = """
select transaction_id, amount, cost, balance_after, error
from ducto.deduct($1, $2, p_idempotency_key => $3, p_reservation_id => $4)
"""


async def main(user: str) -> None:
    """Give, hold, charge, be refused, look, refund; each call a transaction of its own."""
    # Behind pgbouncer in transaction mode asyncpg must not keep prepared statements: statement_cache_size=0.
    conn = await asyncpg.connect(statement_cache_size=0)
    try:
        await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        added = await conn.fetchrow(
            "select amount, new_balance from ducto.add_credits($1, $2, 'purchase', p_idempotency_key => $3)",
            user,
            1000,
            "invoice-1",
        )
        print(f"added {added['amount']}, balance {added['new_balance']}")

        longest = {"model": "gpt-5", "input_tokens": 1200, "output_tokens": 4096}
        hold = await conn.fetchrow(HOLD, user, longest, "request-1")
        if hold["error"]:
            sys.exit(f"refused: {hold['error']}")
        print(f"held {hold['amount']}")

        used = {"model": "gpt-5-2025-08-07", "input_tokens": 1200, "output_tokens": 350}
        charge = await conn.fetchrow(CHARGE, user, used, "request-1", hold["reservation_id"])
        print(f"charged {-charge['amount']} for {charge['cost']}, balance {charge['balance_after']}")

        refused = await conn.fetchval(
            "select error from ducto.deduct_credits($1, $2, p_idempotency_key => $3)", user, 1_000_000, "request-2"
        )
        print(f"refused: {refused}")

        balance = await conn.fetchrow("select balance, reserved from ducto.get_balance($1)", user)
        print(f"balance {balance['balance']}, reserved {balance['reserved']}")

        refund = await conn.fetchrow(
            "select amount, new_balance from ducto.refund_credits($1, p_reason => $2, p_idempotency_key => $3)",
            charge["transaction_id"],
            "answer was empty",
            "refund-1",
        )
        print(f"refunded {refund['amount']}, balance {refund['new_balance']}")
    finally:
        await conn.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

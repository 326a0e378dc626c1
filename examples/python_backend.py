"""A backend that charges together with its own writes: both stand, or neither.

    DATABASE_URL=postgresql:///scratch python examples/python_backend.py

Needs `pip install '.[pool]'`. Use a scratch database: this installs ducto_pg, publishes prices and makes a table
`summaries`. Run it again, or retry a request with its id: what was saved is answered without asking the model, and what
was not finds its hold again. Nothing is saved or charged twice.
"""

import os
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from ducto_pg import CreditManager, InsufficientCreditsError, UsageMetrics

PRICES = {
    "models": {"chat": "input_tokens * 0.01 + output_tokens * 0.03"},
    "min_balance": 0,
}


def call_model(text: str) -> tuple[str, UsageMetrics]:
    """Stands for a model: its answer, and what it says it used."""
    return text[:10], UsageMetrics(model="chat", input_tokens=len(text), output_tokens=10)


def summarize(pool: ConnectionPool[Any], user_id: str, request_id: str, text: str) -> str:
    """Hold, work, then save the result and charge for it in one transaction.

    A request that was saved before is answered again, for nothing. Raises InsufficientCreditsError before any work is
    done.
    """
    if saved := find(pool, request_id):
        return saved

    # On a pool each call is a transaction of its own: the hold is committed, and no connection is kept meanwhile.
    estimate = UsageMetrics(model="chat", input_tokens=len(text), output_tokens=100)
    hold = CreditManager(pool).reserve(user_id, estimate, idempotency_key=request_id).or_raise()

    summary, usage = call_model(text)

    with pool.connection() as conn, conn.transaction():
        inserted = conn.execute(
            "insert into summaries (request_id, summary) values (%s, %s) on conflict (request_id) do nothing",
            [request_id, summary],
        )
        # No row: the same request, sent twice at once, was saved and charged meanwhile.
        if inserted.rowcount:
            # Last: from here until the commit, the account's row is locked.
            CreditManager(conn).deduct(
                user_id, usage, idempotency_key=request_id, reservation_id=hold.reservation_id
            ).or_raise()
            return summary
    return find(pool, request_id) or summary


def find(pool: ConnectionPool[Any], request_id: str) -> str | None:
    """The summary that was saved for a request."""
    with pool.connection() as conn:
        row = conn.execute("select summary from summaries where request_id = %s", [request_id]).fetchone()
    return row[0] if row else None


def prepare(conn: psycopg.Connection[Any]) -> None:
    """What a deployment does once."""
    credits = CreditManager(conn)
    credits.setup().or_raise()
    credits.publish_pricing(PRICES)
    conn.execute(
        """
        create table if not exists summaries (
          request_id text primary key,
          summary text not null check (summary <> ''))
        """
    )


def main(dsn: str) -> None:
    """Each way of connecting once."""
    # 1. A connection of your own: nothing is begun, committed or rolled back by the manager.
    with psycopg.connect(dsn) as conn:
        prepare(conn)
        CreditManager(conn).add_credits("alice", 100, "purchase", idempotency_key="invoice-1").or_raise()

    # 2. A pool.
    with ConnectionPool[psycopg.Connection[Any]](dsn, min_size=1, open=True) as pool:
        print("summary:", summarize(pool, "alice", "request-1", "x" * 1000))
        print("a retry:", summarize(pool, "alice", "request-1", "x" * 1000))
        print("balance:", CreditManager(pool).get_balance("alice").balance)

        # An empty summary cannot be saved, so nothing is charged; the hold stays until it expires.
        try:
            summarize(pool, "alice", "request-2", "")
        except psycopg.errors.CheckViolation:
            balance = CreditManager(pool).get_balance("alice")
            print("not saved, not charged:", balance.balance, "reserved:", balance.reserved)

        try:
            summarize(pool, "alice", "request-3", "x" * 100_000)
        except InsufficientCreditsError as error:
            print("refused:", error.code)

    # 3. An autocommit connection: every call is committed when it returns.
    with psycopg.connect(dsn, autocommit=True) as conn:
        charge = CreditManager(conn).deduct_credits("alice", 5, idempotency_key="manual-1").or_raise()
        print("charged:", -charge.amount)

    # 4. A DSN: one connection, opened at the first call and kept until the end of the block.
    with CreditManager(dsn) as credits:
        again = credits.deduct_credits("alice", 5, idempotency_key="manual-1").or_raise()
        print("the same charge again:", again.idempotent, again.balance_after)
        print("ledger:", credits.verify_ledger() or "sound")


if __name__ == "__main__":
    main(os.environ["DATABASE_URL"])

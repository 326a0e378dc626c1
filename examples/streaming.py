"""Holds around a streaming call: settled by what the model says it used, or by an estimate where it says nothing.

    DATABASE_URL=postgresql:///scratch python examples/streaming.py

Needs `pip install '.[pool]'`. Use a scratch database: this installs ducto_pg and publishes prices.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from ducto_pg import AsyncCreditManager, ReserveResult, UsageMetrics

PRICES = {
    "models": {"chat": "input_tokens * 0.01 + output_tokens * 0.03"},
    "min_balance": 0,
}
MAX_TOKENS = 500


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one carries the usage instead."""

    text: str = ""
    usage: UsageMetrics | None = None


class ModelDownError(Exception):
    """The provider refused the request."""


class RequestOverError(Exception):
    """This request has ended before: only one with a new id can be answered."""


async def call_model(prompt: str) -> AsyncIterator[Chunk]:
    """Stands for a provider: 100 pieces of an answer, then the usage."""
    if prompt == "down":
        raise ModelDownError
    for _ in range(100):
        await asyncio.sleep(0)
        yield Chunk("word ")
    yield Chunk(usage=UsageMetrics(model="chat", input_tokens=len(prompt), output_tokens=120))


async def answer(credits: AsyncCreditManager, user_id: str, request_id: str, prompt: str) -> AsyncGenerator[str, None]:
    """The answer, piece by piece, charged when it ends, however it ends."""
    # The hold covers the prompt and the longest answer. It is committed before the model is asked.
    most = UsageMetrics(model="chat", input_tokens=len(prompt), output_tokens=MAX_TOKENS)
    hold = (await credits.reserve(user_id, most, ttl_seconds=900, idempotency_key=request_id)).or_raise()
    if hold.idempotent and (await credits.get_reservation(hold.reservation_id)).status != "active":
        # The key gave an old answer again, of a hold that pays for nothing any more.
        raise RequestOverError(request_id)
    pieces, usage = 0, None
    try:
        async for chunk in call_model(prompt):
            if chunk.usage:
                usage = chunk.usage
            else:
                pieces += 1
                yield chunk.text
    finally:
        # Shielded: a client that goes away cancels this task, and the charge must not go with it.
        await asyncio.shield(asyncio.create_task(settle(credits, hold, request_id, prompt, pieces, usage)))


async def settle(
    credits: AsyncCreditManager,
    hold: ReserveResult,
    request_id: str,
    prompt: str,
    pieces: int,
    usage: UsageMetrics | None,
) -> None:
    """End the hold: by the model's usage, else by an estimate, else (nothing was produced) without a charge."""
    if usage is None and not pieces:
        (await credits.release_reservation(hold.reservation_id)).or_raise()
        return
    # A piece is about a token. What the provider bills for the rest is yours to know: a provider that keeps
    # generating after you hang up is better settled with deduct_credits(hold.user_id, hold.amount, ...).
    estimate = UsageMetrics(model="chat", input_tokens=len(prompt), output_tokens=pieces)
    charge = await credits.deduct(
        hold.user_id,
        usage or estimate,
        idempotency_key=request_id,
        metadata={"estimated": usage is None},
        reservation_id=hold.reservation_id,
    )
    charge.or_raise()


async def play(credits: AsyncCreditManager, request_id: str, prompt: str, pieces: int | None = None) -> str:
    """What comes of a request whose client reads so many pieces of the answer, or all."""
    read = 0
    try:
        async with aclosing(answer(credits, "bob", request_id, prompt)) as stream:
            async for _ in stream:
                read += 1
                if read == pieces:
                    break
    except ModelDownError:
        return "hold released"
    except RequestOverError:
        return "over, nothing is done for nothing"
    return f"{read} pieces"


async def main(dsn: str) -> None:
    """A whole answer, one that is cut off, one that never begins, and one whose server died."""
    async with AsyncConnectionPool[AsyncConnection[Any]](dsn, min_size=1, open=False) as pool:
        credits = AsyncCreditManager(pool)
        (await credits.setup()).or_raise()
        await credits.publish_pricing(PRICES)
        (await credits.add_credits("bob", 1000, "purchase", idempotency_key="invoice-1")).or_raise()

        print("whole answer:", await play(credits, "whole", "x" * 1000))
        print("client gone:", await play(credits, "cut-off", "x" * 1000, pieces=10))
        print("model down:", await play(credits, "never-began", "down"))
        print("the first once more:", await play(credits, "whole", "x" * 1000))

        # The server died between hold and charge. Whoever finds the unfinished request later may still settle it: the
        # hold's key gives its id again, and an expired hold is charged with the warning reservation_expired.
        most = UsageMetrics(model="chat", input_tokens=1000, output_tokens=MAX_TOKENS)
        await credits.reserve("bob", most, ttl_seconds=1, idempotency_key="orphan")
        await asyncio.sleep(2)
        found = (await credits.reserve("bob", most, idempotency_key="orphan")).or_raise()
        late = await credits.deduct_credits(
            "bob", 12, reservation_id=found.reservation_id, idempotency_key="orphan", metadata={"estimated": True}
        )
        print("late:", late.warnings)

        for row in reversed(await credits.list_transactions("bob", type="usage")):
            print(row.idempotency_key, row.cost, row.amount, row.metadata)
        balance = await credits.get_balance("bob")
        print("balance:", balance.balance, "reserved:", balance.reserved)
        print("ledger:", await credits.verify_ledger() or "sound")


if __name__ == "__main__":
    asyncio.run(main(os.environ["DATABASE_URL"]))

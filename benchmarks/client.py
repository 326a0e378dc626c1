"""What the managers cost: `ducto.deduct` through them and through psycopg alone, by the same statement, in turns.

    make bench ARGS=client

The rivals take turns in short slices, each worker on a connection of its own. Psycopg prepares what it sends often, a
manager never does (it must work behind pgbouncer): psycopg told not to prepare is the third rival.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from decimal import Decimal
from itertools import count
from statistics import median
from typing import Any, NamedTuple

import psycopg
from common import USAGE
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from ducto_pg import AsyncCreditManager, CreditManager, exactjson
from ducto_pg.client.calls import Calls

SQL = Calls.deduct.bind("", {}, "").sql.encode()
METRICS: dict[str, Any] = exactjson.loads(USAGE)
SLICE = 150_000_000  # nanoseconds
RIVALS: dict[str, dict[str, Any]] = {"manager": {}, "psycopg": {}, "not preparing": {"prepare_threshold": None}}

Charge = Callable[[], Any]
Run = Callable[[list[Charge], int], Awaitable[int]]


class Slice(NamedTuple):
    """Charges per second, and the microseconds of this process's own processor time that each took."""

    rate: Decimal
    cost: Decimal


_keys = (f"client-{number}" for number in count())


def compare_clients(dsn: str, rounds: int) -> None:
    """Print the rates of the rivals and their ratios, for 1 and 8 workers, sync and async."""
    print(
        "\nClients: charges per second of one Python process, its own processor time for each; commits not waited for"
    )
    print("  the managers' share is the median over the turns, in which the rivals take slices one after the other")
    names = "".join(f"{name:>22}" for name in RIVALS)
    print(f"  {'workers':<9}{names}   managers' share of each")
    asyncio.run(_compare(make_conninfo(dsn, options="-c synchronous_commit=off"), rounds))


async def _compare(dsn: str, rounds: int) -> None:
    for workers in (1, 8):
        for kind, open_charge, run in (("sync", _open, _threads(workers)), ("async", _open_async, _tasks)):
            async with AsyncExitStack() as stack:
                rivals = {
                    name: [await open_charge(stack, dsn, name, f"plain-{number}") for number in range(1, workers + 1)]
                    for name in RIVALS
                }
                slices = await _turns(rivals, run, rounds)
            line = f"  {f'{workers}, {kind}':<9}"
            for found in slices.values():
                line += f"{median(s.rate for s in found):>12,.0f}/s {median(s.cost for s in found):>4.0f} us"
            ours, *others = slices.values()
            for other in others:
                line += f"{median(a.rate / b.rate for a, b in zip(ours, other, strict=True)):>8.2f}"
            print(line)


async def _open(stack: AsyncExitStack, dsn: str, name: str, user: str) -> Charge:
    if name == "manager":
        manager = stack.enter_context(CreditManager(dsn))
        return lambda: manager.deduct(user, METRICS, next(_keys))
    conn = stack.enter_context(psycopg.connect(dsn, autocommit=True, **RIVALS[name]))
    return lambda: conn.execute(SQL, _arguments(user)).fetchone()


async def _open_async(stack: AsyncExitStack, dsn: str, name: str, user: str) -> Charge:
    if name == "manager":
        manager = await stack.enter_async_context(AsyncCreditManager(dsn))
        return lambda: manager.deduct(user, METRICS, next(_keys))
    conn = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=True, **RIVALS[name]))

    async def charge() -> object:
        return await (await conn.execute(SQL, _arguments(user))).fetchone()

    return charge


def _arguments(user: str) -> dict[str, object]:
    return {"user_id": user, "metrics": Jsonb(METRICS), "idempotency_key": next(_keys)}


def _threads(workers: int) -> Run:
    def until(end: int, charge: Charge) -> int:
        done = 0
        while time.perf_counter_ns() < end:
            charge()
            done += 1
        return done

    async def run(charges: list[Charge], end: int) -> int:
        with ThreadPoolExecutor(workers) as threads:
            return sum(threads.map(until, [end] * workers, charges))

    return run


async def _tasks(charges: list[Charge], end: int) -> int:
    async def until(charge: Charge) -> int:
        done = 0
        while time.perf_counter_ns() < end:
            await charge()
            done += 1
        return done

    return sum(await asyncio.gather(*map(until, charges)))


async def _turns(rivals: dict[str, list[Charge]], run: Run, rounds: int) -> dict[str, list[Slice]]:
    slices: dict[str, list[Slice]] = {name: [] for name in rivals}
    for turn in range(1 + 8 * rounds):
        for name, charges in list(rivals.items())[:: 1 if turn % 2 else -1]:
            cpu, started = time.process_time_ns(), time.perf_counter_ns()
            done = await run(charges, started + SLICE)
            if turn:  # the first one warms up
                taken = Decimal(time.perf_counter_ns() - started)
                slices[name].append(Slice(done * 10**9 / taken, Decimal(time.process_time_ns() - cpu) / done / 1000))
    return slices

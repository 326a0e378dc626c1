"""`ducto-pg quickstart`: real traffic, charged at real prices, and every digit checked against the offline engine.

Each request of a trace of LLM traffic holds an estimate, then settles what it used. Some requests come twice, as after
a lost answer; some charges are refunded; some accounts run dry.
"""

import csv
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from functools import reduce
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from threading import Event, Lock
from typing import Any

import psycopg
from psycopg import sql

from ducto_pg import config, servers
from ducto_pg.arithmetic import add
from ducto_pg.client import CreditManager
from ducto_pg.embedded import Server
from ducto_pg.engine import PricingEngine
from ducto_pg.errors import DuctoError, InsufficientCreditsError
from ducto_pg.models import PricingConfigData, UsageMetrics

WORKERS = 4
REQUESTS_PER_ACCOUNT = 16
FEWEST_ACCOUNTS = 100
PURCHASED, PROMOTED = 1000, 25
ESTIMATED_OUTPUT = 512


@dataclass(frozen=True)
class Request:
    """A line of the trace, given to an account and a model."""

    number: int
    account: str
    usage: UsageMetrics


@dataclass
class Tally:
    """What came of some requests."""

    charged: list[Request] = field(default_factory=list)
    cost: Decimal = Decimal(0)
    refusals: int = 0
    replays: int = 0
    refunds: int = 0
    credits_out: int = 0
    credits_refunded: int = 0
    problems: list[str] = field(default_factory=list)


def run(*, dsn: str | None = None, trace: Path | None = None, keep: bool = False) -> bool:
    """The whole demonstration, told on standard output; whether everything was as it should be.

    `dsn` is a database without a ledger (default: a server of its own, which `keep` leaves up at the end), `trace` a
    CSV file with the columns ContextTokens and GeneratedTokens (default: the one that comes with the package). Raises
    ServerError, psycopg.Error, OSError and DuctoError.
    """
    prices = config.load(_example("prices.yaml").read_bytes())
    requests = _requests(trace or _example("trace.csv"), list(prices.models))
    with ExitStack() as stack:
        server = None
        if dsn is None:
            server = stack.enter_context(servers.open_server(keep=keep))
            name = f"ducto_quickstart_{os.getpid()}"
            _create_database(server, name)
            stack.callback(_drop_database, server, name)
            dsn = server.dsn(name)
            print(server.origin)
        sound = _demonstrate(dsn, prices, requests)
        if server and keep:
            stack.pop_all()
            _say_how_to_ask(server, dsn)
    return sound


def _demonstrate(dsn: str, prices: PricingConfigData, requests: Sequence[Request]) -> bool:
    with psycopg.connect(dsn, autocommit=True) as conn:
        if _value(conn, "select to_regnamespace('ducto_private') is not null"):
            raise DuctoError("this database holds a ledger already: name one without")
        manager = CreditManager(conn)
        setup = manager.setup().or_raise()
        version = manager.publish_pricing(prices, label="quickstart").version
        print(f"{len(setup.tables_created)} tables, {len(setup.rpcs_created)} functions", end="; ")
        print(f"prices of {len(prices.models)} models are version {version}")
        for number, account in enumerate(sorted({request.account for request in requests})):
            if number % 10:
                manager.add_credits(account, PURCHASED, "purchase", reference=f"invoice-{number}").or_raise()
            else:
                manager.add_credits(account, PROMOTED, "promotion").or_raise()
        started = time.monotonic_ns()
        tally = _replay_all(dsn, requests)
        milliseconds = (time.monotonic_ns() - started) // 1_000_000 or 1
        print(f"{len(requests):,} requests: {len(tally.charged) * 1000 // milliseconds:,} charges per second")
        return _check(conn, tally, PricingEngine(prices))


def _check(conn: psycopg.Connection[Any], tally: Tally, engine: PricingEngine) -> bool:
    offline = _sum(engine.calculate(request.usage).total for request in tally.charged)
    usage = "from ducto_read.transactions where type = 'usage'"
    charges = _value(conn, f"select count(*) {usage}")
    cost = _value(conn, f"select coalesce(sum(cost), 0) {usage}")
    granted = _value(conn, "select sum(amount) from ducto_read.transactions where type not in ('usage', 'refund')")
    left = _value(conn, "select sum(balance) from ducto_read.accounts")
    carried = _value(conn, "select sum(carry) from ducto_read.accounts")
    violations = CreditManager(conn).verify_ledger()
    table = {
        "accounts": f"{_value(conn, 'select count(*) from ducto_read.accounts'):,}",
        "charges": f"{charges:,}",
        "refusals (insufficient_credits)": f"{tally.refusals:,}",
        "replays": f"{tally.replays:,}",
        "refunds": f"{tally.refunds:,}",
        "credits in": f"{granted:,}",
        "credits out": f"{tally.credits_out:,}",
        "credits refunded": f"{tally.credits_refunded:,}",
        "credits left": f"{left:,}",
        "fractions of a credit carried": f"{carried:,f}",
        "exact cost in the ledger": f"{cost:,f}",
        "exact cost by the offline engine": f"{offline:,f}",
        "verify_ledger": f"{len(violations)} violations" if violations else "sound",
    }
    names, values = (max(map(len, column)) for column in (table, table.values()))
    print("\n".join(f"  {name:<{names}}  {value:>{values}}" for name, value in table.items()))

    problems = tally.problems + [f"{v.account_id}: {v.invariant}: {v.detail}" for v in violations]
    if charges != len(tally.charged):
        problems.append(f"{len(tally.charged)} charges were acknowledged, {charges} are in the ledger")
    if not str(cost) == str(tally.cost) == str(offline):
        problems.append(f"exact costs: {cost} in the ledger, {tally.cost} answered, {offline} by the offline engine")
    if granted - tally.credits_out + tally.credits_refunded != left:
        problems.append("credits in, less out, plus refunded are not what is left")
    if tally.credits_out + carried != cost:
        problems.append("credits out and the fractions carried are not the exact cost")
    for problem in problems:
        print(f"ducto-pg: {problem}", file=sys.stderr)
    return not problems


# ----------------------------------------------------------------------------------------------------------------------
# The requests


def _requests(trace: Path | Traversable, models: Sequence[str]) -> list[Request]:
    """The trace, spread over accounts (some use more than others) and models; the same each time."""
    lines = list(csv.DictReader(trace.read_text("utf-8-sig").splitlines()))
    accounts = max(FEWEST_ACCOUNTS, len(lines) // REQUESTS_PER_ACCOUNT)
    dice = random.Random(accounts)
    requests = []
    for number, line in enumerate(lines):
        try:
            usage = UsageMetrics(
                model=models[dice.randrange(len(models))],
                input_tokens=int(line["ContextTokens"]),
                output_tokens=int(line["GeneratedTokens"]),
            )
        except (KeyError, TypeError, ValueError):
            message = f"{trace}: line {number + 2} has no whole numbers under ContextTokens and GeneratedTokens"
            raise DuctoError(message) from None
        account = min(dice.randrange(accounts), dice.randrange(accounts))
        requests.append(Request(number, f"user-{account:04}", usage))
    if not requests:
        raise DuctoError(f"{trace}: no requests")
    return requests


def _replay_all(dsn: str, requests: Sequence[Request]) -> Tally:
    """All requests, by several sessions at once; those of one account in their order."""
    shares: list[list[Request]] = [[] for _ in range(WORKERS)]
    for request in requests:
        shares[int(request.account.removeprefix("user-")) % WORKERS].append(request)
    progress = _progress(len(requests))
    stop = Event()

    def work(share: list[Request]) -> Tally:
        tally = Tally()
        try:
            with CreditManager(dsn) as manager:
                for request in share:
                    if stop.is_set():
                        break
                    _replay(manager, request, tally)
                    progress()
        except BaseException:
            stop.set()
            raise
        return tally

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            tallies = list(pool.map(work, shares))
        finally:
            stop.set()
    return Tally(
        charged=[request for tally in tallies for request in tally.charged],
        cost=_sum(tally.cost for tally in tallies),
        refusals=sum(tally.refusals for tally in tallies),
        replays=sum(tally.replays for tally in tallies),
        refunds=sum(tally.refunds for tally in tallies),
        credits_out=sum(tally.credits_out for tally in tallies),
        credits_refunded=sum(tally.credits_refunded for tally in tallies),
        problems=[problem for tally in tallies for problem in tally.problems],
    )


def _replay(manager: CreditManager, request: Request, tally: Tally) -> None:
    key = f"request-{request.number}"
    estimate = request.usage.model_copy(update={"output_tokens": ESTIMATED_OUTPUT})
    try:
        hold = manager.reserve(request.account, estimate, idempotency_key=key).or_raise()
    except InsufficientCreditsError:
        tally.refusals += 1
        return
    charge = manager.deduct(request.account, request.usage, key, reservation_id=hold.reservation_id).or_raise()
    tally.charged.append(request)
    tally.cost = add(tally.cost, charge.cost)
    tally.credits_out -= charge.amount
    if request.number % 10 == 1:
        again = manager.reserve(request.account, estimate, idempotency_key=key)
        charge_again = manager.deduct(request.account, request.usage, key, reservation_id=hold.reservation_id)
        tally.replays += 2
        if (again.reservation_id, charge_again.transaction_id) != (hold.reservation_id, charge.transaction_id):
            tally.problems.append(f"{key} repeated is not answered alike")
    if request.number % 50 == 2 and charge.amount:
        refund = manager.refund_credits(charge.transaction_id, idempotency_key=f"{key}-refund").or_raise()
        tally.refunds += 1
        tally.credits_refunded += refund.amount


# ----------------------------------------------------------------------------------------------------------------------
# Around them


def _example(name: str) -> Traversable:
    inside = files("ducto_pg").joinpath("examples", name)
    return inside if inside.is_file() else Path(__file__).parent.parent / "examples" / name


def _create_database(server: Server, name: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))


def _drop_database(server: Server, name: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _say_how_to_ask(server: Server, dsn: str) -> None:
    print(f"\nexport DATABASE_URL={shlex.quote(dsn)}")
    if server.bindir:
        print(f"export PATH={shlex.quote(str(server.bindir))}:$PATH")
    for query in (
        "select * from ducto.get_balance('user-0001')",
        """select * from ducto.deduct('user-0001', '{"model": "gpt-5.5", "input_tokens": 800}', 'try-1')""",
        "select seq, type, amount, balance_after, cost from ducto.list_transactions('user-0001', 5)",
    ):
        escaped = query.replace('"', '\\"')
        print(f'psql "$DATABASE_URL" -c "{escaped}"')
    if server.pid:
        print(f"kill -INT {server.pid}   # ends the server, and removes its data")


def _value(conn: psycopg.Connection[Any], query: str) -> Any:
    row = conn.execute(query).fetchone()
    return row[0] if row else None


def _sum(costs: Iterable[Decimal]) -> Decimal:
    return reduce(add, costs, Decimal(0))


def _progress(total: int) -> Callable[[], None]:
    """Call it once for each part done: it draws a bar, if somebody looks."""
    done, drawn, lock = 0, -1, Lock()

    def advance() -> None:
        nonlocal done, drawn
        with lock:
            done += 1
            filled = done * 40 // total
            if filled > drawn and sys.stderr.isatty():
                drawn = filled
                end = "\n" if done == total else ""
                print(f"\r[{'#' * filled:<40}] {done:,} of {total:,} requests", end=end, file=sys.stderr, flush=True)

    return advance

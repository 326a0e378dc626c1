"""`ducto-pg quickstart`: real traffic, charged at real prices, and every digit checked against the offline engine.

Each request of a trace of LLM traffic holds an estimate, then settles what it used. Some requests come twice, as after
a lost answer; some charges are refunded. Accounts are on a free plan or a paid one with prices of its own, some with a
daily cap or with promotional credits that soon expire; some members charge their team. Whoever runs dry is refused.
"""

import csv
import os
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from threading import Event, Lock
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from ducto_pg import servers
from ducto_pg.client.manager import CreditManager
from ducto_pg.embedded import Server
from ducto_pg.errors import DuctoError
from ducto_pg.formula.arithmetic import add
from ducto_pg.models import (
    DeductionResult,
    PlanDefinition,
    PricingConfigData,
    ReserveResult,
    TeamDeductionResult,
    UsageMetrics,
)
from ducto_pg.pricing import config
from ducto_pg.pricing.engine import PricingEngine

WORKERS = 4
REQUESTS_PER_ACCOUNT = 16
FEWEST_ACCOUNTS = 100
PURCHASED, PROMOTED, FREE, PAID = 1000, 50, 10, 50
DAILY_CAP, MEMBER_CAP = 40, 30
TEAMS, POOL = 4, 250
ESTIMATED_OUTPUT = 512
EXPECTED = ("insufficient_credits", "spend_cap_exceeded", "member_cap_exceeded")


@dataclass(frozen=True)
class Request:
    """A line of the trace, given to an account or to a team for it, and to a model."""

    number: int
    account: str
    team: str | None
    usage: UsageMetrics

    @property
    def plan(self) -> str | None:
        """By which it is priced."""
        if self.team:
            return "pro" if int(self.team[-1]) % 2 else None
        return "pro" if _number(self.account) % 3 == 1 else "free"


@dataclass
class Tally:
    """What came of some requests: the charged ones, their exact costs by plan, counts and credits."""

    charged: list[Request] = field(default_factory=list)
    costs: defaultdict[str | None, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def run(*, dsn: str | None = None, trace: Path | None = None, keep: bool = False) -> bool:
    """The whole demonstration, told on standard output; whether everything was as it should be.

    `dsn` is a database without a ledger (default: a server of its own, which `keep` leaves up at the end), `trace` a
    CSV file with the columns ContextTokens and GeneratedTokens (default: the one that comes with the package). Raises
    ServerError, psycopg.Error, OSError and DuctoError.
    """
    prices = _prices()
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
        print(f"{len(setup.tables_created)} tables and views, {len(setup.rpcs_created)} RPCs", end="; ")
        print(f"prices of {len(prices.models)} models, {len(prices.plans or {})} plans are version {version}")
        _open_accounts(manager, conn, requests)
        started = time.monotonic_ns()
        tally = _replay_all(dsn, requests)
        milliseconds = (time.monotonic_ns() - started) // 1_000_000 or 1
        print(f"{len(requests):,} requests: {len(tally.charged) * 1000 // milliseconds:,} charges per second")
        conn.execute("select pg_sleep_until(max(l.expires_at)) from ducto_read.lots as l")
        while manager.sweep_expired_credits(limit=10).or_raise().account_count:
            pass
        return _check(conn, tally, PricingEngine(prices))


def _open_accounts(manager: CreditManager, conn: psycopg.Connection[Any], requests: Sequence[Request]) -> None:
    """All but those that open by themselves, on the default plan, at their first request."""
    for team, plan in sorted({(request.team, request.plan) for request in requests if request.team}):
        manager.create_team(team.title(), POOL, team_id=team).or_raise()
        if plan:
            manager.set_user_plan(team, plan).or_raise()
    for account in sorted({request.account for request in requests}):
        number = _number(account)
        if number % 10:
            manager.add_credits(account, PURCHASED, "purchase", reference=f"invoice-{number}").or_raise()
        if number % 4 == 1:
            soon = _value(conn, "select clock_timestamp() + interval '3 seconds'")
            manager.add_credits(account, PROMOTED, "promotion", expires_at=soon).or_raise()
        if number % 3 == 1:
            manager.set_user_plan(account, "pro").or_raise()
        if number % 5 == 2:
            manager.set_spend_cap(account, DAILY_CAP).or_raise()
    for team, member in sorted({(request.team, request.account) for request in requests if request.team}):
        manager.add_team_member(team, member, spend_cap=MEMBER_CAP).or_raise()


def _check(conn: psycopg.Connection[Any], tally: Tally, engine: PricingEngine) -> bool:
    offline: defaultdict[str | None, Decimal] = defaultdict(Decimal)
    for request in tally.charged:
        offline[request.plan] = add(offline[request.plan], engine.calculate(request.usage, request.plan).total)
    usage = "from ducto_read.transactions where type = 'usage'"
    costs = dict(conn.execute(f"select plan_id, sum(cost) {usage} group by plan_id").fetchall())
    accounts = defaultdict(int, conn.execute("select kind, count(*) from ducto_read.accounts group by kind"))
    credits = defaultdict(int, conn.execute("select type, sum(amount) from ducto_read.transactions group by type"))
    left = _value(conn, "select coalesce(sum(balance), 0) from ducto_read.accounts")
    carried = _value(conn, "select coalesce(sum(carry), 0) from ducto_read.accounts")
    charges = _value(conn, f"select count(*) {usage}")
    allowance = _value(conn, f"select coalesce(sum(allowance_used), 0) {usage}")
    taken = _value(conn, "select coalesce(sum(provider_cost), 0) from ducto.spend_margin() where uncosted = 0")
    violations = CreditManager(conn).verify_ledger()
    counts = tally.counts
    table = {
        "accounts": f"{accounts['user']:,}",
        "teams": f"{accounts['team']:,}",
        "charges": f"{charges:,}",
        "charges for a team": f"{sum(bool(request.team) for request in tally.charged):,}",
        **{f"refusals ({refusal})": f"{counts[refusal]:,}" for refusal in EXPECTED},
        **{name: f"{counts[name]:,}" for name in ("replays", "refunds")},
        **{f"credits: {kind}": f"{amount:+,}" for kind, amount in sorted(credits.items())},
        "credits left": f"{left:,}",
        "credits paid by allowances": f"{allowance:,}",
        "fractions of a credit carried": f"{carried:,f}",
    }
    for plan, cost in sorted(costs.items(), key=str):
        table[f"exact cost in the ledger, {plan or 'no'} plan"] = f"{cost:,f}"
        table[f"exact cost by the offline engine, {plan or 'no'} plan"] = f"{offline[plan]:,f}"
    table["what the providers took, USD"] = f"{taken:,f}"
    table["verify_ledger"] = f"{len(violations)} violations" if violations else "sound"
    names, values = (max(map(len, column)) for column in (table, table.values()))
    print("\n".join(f"  {name:<{names}}  {value:>{values}}" for name, value in table.items()))

    problems = tally.problems + [f"{v.account_id}: {v.invariant}: {v.detail}" for v in violations]
    if charges != len(tally.charged):
        problems.append(f"{len(tally.charged)} charges were acknowledged, {charges} are in the ledger")
    for plan in costs.keys() | offline.keys() | tally.costs.keys():
        three = [str(some.get(plan, 0)) for some in (costs, tally.costs, offline)]
        if len(set(three)) > 1:
            said = "{} in the ledger, {} answered, {} by the offline engine".format(*three)
            problems.append(f"exact costs, {plan or 'no'} plan: {said}")
    if sum(credits.values()) != left or -credits["usage"] != counts["out"] or credits["refund"] != counts["refunded"]:
        problems.append("the ledger's credits, those answered, and what is left do not agree")
    list_price = sum((engine.calculate(request.usage).total for request in tally.charged), Decimal())
    if taken * engine.pricing_schema().factor != list_price:
        problems.append(f"providers took {taken} by the margin, by the list {list_price} credits at its factor")
    if counts["out"] + allowance + carried != sum(costs.values()):
        problems.append("credits out, allowances and the fractions carried are not the exact cost")
    for problem in problems:
        print(f"ducto-pg: {problem}", file=sys.stderr)
    return not problems


# ----------------------------------------------------------------------------------------------------------------------
# The requests


def _prices() -> PricingConfigData:
    """The example's, with a plan for whoever comes and one to buy."""
    prices = config.load(_example("prices.yaml").read_bytes())
    rebates = {model: f"({formula}) * 0.9" for model, formula in prices.models.items() if model.startswith("claude-")}
    plans = {
        "free": PlanDefinition(id="free", name="Free", free_allowance=FREE),
        "pro": PlanDefinition(id="pro", name="Pro", free_allowance=PAID, rate_overrides=rebates),
    }
    return prices.model_copy(update={"plans": plans, "default_plan": "free"})


def _number(account: str) -> int:
    return int(account.removeprefix("user-"))


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
        team = f"team-{account // 6 % TEAMS}" if account % 6 == 3 and number % 2 else None
        requests.append(Request(number, f"user-{account:04}", team, usage))
    if not requests:
        raise DuctoError(f"{trace}: no requests")
    return requests


def _replay_all(dsn: str, requests: Sequence[Request]) -> Tally:
    """All requests, by several sessions at once; those of one account in their order."""
    shares: list[list[Request]] = [[] for _ in range(WORKERS)]
    for request in requests:
        shares[_number(request.account) % WORKERS].append(request)
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
    total = Tally()
    for tally in tallies:
        total.charged += tally.charged
        total.problems += tally.problems
        total.counts += tally.counts
        for plan, cost in tally.costs.items():
            total.costs[plan] = add(total.costs[plan], cost)
    return total


def _replay(manager: CreditManager, request: Request, tally: Tally) -> None:
    key = f"request-{request.number}"
    estimate = request.usage.model_copy(update={"output_tokens": ESTIMATED_OUTPUT})

    def reserve() -> ReserveResult:
        if request.team:
            return manager.reserve_team(request.team, request.account, estimate, idempotency_key=key)
        return manager.reserve(request.account, estimate, idempotency_key=key)

    def deduct(hold: str) -> DeductionResult | TeamDeductionResult:
        if request.team:
            return manager.deduct_team(request.team, request.account, request.usage, key, reservation_id=hold)
        return manager.deduct(request.account, request.usage, key, reservation_id=hold)

    hold = reserve()
    if hold.error in EXPECTED:
        tally.counts[hold.error] += 1
        return
    charge = deduct(hold.or_raise().reservation_id).or_raise()
    tally.charged.append(request)
    tally.costs[request.plan] = add(tally.costs[request.plan], charge.cost)
    tally.counts["out"] -= charge.amount
    if request.number % 10 == 1:
        tally.counts["replays"] += 2
        again = (reserve().reservation_id, deduct(hold.reservation_id).transaction_id)
        if again != (hold.reservation_id, charge.transaction_id):
            tally.problems.append(f"{key} repeated is not answered alike")
    if request.number % 50 == 2 and (charge.amount or charge.allowance_used):
        refund = manager.refund_credits(charge.transaction_id, idempotency_key=f"{key}-refund").or_raise()
        tally.counts["refunds"] += 1
        tally.counts["refunded"] += refund.amount


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
    for name, value in conninfo_to_dict(dsn).items():
        if name in ("host", "port", "user", "dbname"):
            print(f"export PG{name.replace('dbname', 'database').upper()}={shlex.quote(str(value))}")
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

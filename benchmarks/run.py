"""What a charge costs, as ratios: on one durable server, in one run, the rivals in turns.

    make bench                              everything, about five minutes
    make bench ARGS='charges --seconds 10'  charges only, longer rounds

Yardsticks: pgbench's own `simple-update` (three statements in a transaction: five round trips); one call of a bare
function that updates one row and inserts one, in small tables of its own; and the same in ducto_pg's tables, what a
charge would cost without price or rule.
"""

import argparse
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from rollups import compare

import ducto_pg
from ducto_pg import embedded, servers
from ducto_pg.embedded import Server

# Durable commits as PostgreSQL does them by default; no checkpoint falls into somebody's round.
SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "16GB", "checkpoint_timeout": "1h", "max_connections": "50"}
USAGE = '{"model": "gpt-4o-2024-08-06", "input_tokens": 1001, "output_tokens": 100, "cache_read_tokens": 512}'
FORMULA = "(input_tokens - cache_read_tokens) * 0.0025 + cache_read_tokens * 0.00125 + output_tokens * 0.01"

PLANS = {"free": {"id": "free", "name": "Free", "free_allowance": 5}}
CHARGE = r"""
\set account random(1, :accounts)
\set key random(1, 1000000000000000)
select * from ducto.deduct('account-' || :account, :usage, 'request-' || :key);
"""
PLANNED = CHARGE.replace("account-", "planned-")
HELD = r"""
\set account random(1, :accounts)
\set key random(1, 1000000000000000)
select reservation_id from ducto.reserve('account-' || :account, :usage, p_idempotency_key => 'request-' || :key) \gset
select * from ducto.deduct('account-' || :account, :usage, 'request-' || :key, null, :reservation_id);
"""
BARE = r"""
\set account random(1, :accounts)
select bench_charge('account-' || :account, :usage);
"""
BARE_TABLES = """
create table bench_account (account_id text primary key, balance bigint not null) with (fillfactor = 60);
create table bench_log (
  log_id bigint generated always as identity primary key,
  account_id text not null,
  amount bigint not null,
  usage jsonb,
  created_at timestamptz not null default clock_timestamp());
insert into bench_account select 'account-' || i, 1000000000 from generate_series(1, %(accounts)s) as i;
create function bench_charge(p_account_id text, p_usage jsonb) returns bigint language plpgsql as $$
declare
  v_balance bigint;
begin
  with updated as (
    update bench_account set balance = balance - 1 where account_id = p_account_id returning balance),
  logged as (
    insert into bench_log (account_id, amount, usage) values (p_account_id, -1, p_usage))
  select balance into v_balance from updated;
  return v_balance;
end
$$;
"""
ROWS = r"""
\set account random(1, :accounts)
\set key random(1, 1000000000000000)
select bench_rows('account-' || :account, :usage, 'request-' || :key);
"""
ROWS_FUNCTION = """
create function bench_rows(p_account_id text, p_usage jsonb, p_key text) returns bigint language plpgsql as $$
declare
  v_balance bigint;
  v_seq bigint;
  v_revision bigint;
begin
  update ducto_private.accounts as a
  set balance = a.balance - 1, seq = a.seq + 1, revision = a.revision + 1, changed_at = clock_timestamp()
  where a.account_id = p_account_id
  returning a.balance, a.seq, a.revision into v_balance, v_seq, v_revision;
  insert into ducto_private.transactions (transaction_id, seq, amount, balance_after, allowance_used, revision,
    created_at, pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model, idempotency_key)
  values (ducto_private.new_id(), v_seq, -1, v_balance, 0, v_revision,
    clock_timestamp(), 1, p_account_id, 'usage', 0, 1, p_usage, 'gpt-4o-2024-08-06', 'gpt-4o', p_key);
  return v_balance;
end
$$;
"""
LOOP = """
do $$
declare
  v_usages constant jsonb[] := array(
    select jsonb_build_object('model', m.name, 'input_tokens', 1001, 'output_tokens', 9)
    from ducto.get_active_pricing() as p, jsonb_object_keys(p.config -> 'models') as m (name));
  v_start timestamptz;
begin
  for i in 1 .. 2 * {models} loop
    perform ducto.calculate_cost(v_usages[1 + i % {models}]);
  end loop;
  v_start := clock_timestamp();
  for i in 1 .. {calls} loop
    perform ducto.calculate_cost(v_usages[1 + i % {models}]);
  end loop;
  perform set_config('bench.us', (extract(epoch from clock_timestamp() - v_start) * 1000000 / {calls})::text, false);
end
$$
"""
# An account in the middle of a day and month of so many charges, under caps on both.
CAPPED = """
insert into ducto_private.transactions (transaction_id, seq, amount, balance_after, allowance_used, revision,
  created_at, pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model)
select gen_random_uuid(), 1 + i, -1, 1000000000000 - i, 0, 1 + i, a.changed_at, 1, a.account_id,
  'usage', 0, 1, %(usage)s::jsonb, 'gpt-4o-2024-08-06', 'gpt-4o'
from ducto_private.accounts as a, generate_series(1, %(charges)s) as i
where a.account_id = %(account)s;
update ducto_private.accounts
set seq = seq + %(charges)s, revision = revision + %(charges)s, balance = balance - %(charges)s
where account_id = %(account)s;
select ducto.set_spend_cap(%(account)s, 1000000000000, t) from unnest('{daily,monthly}'::text[]) as t;
"""
CHARGE_CAPPED = r"""
\set key random(1, 1000000000000000)
select * from ducto.deduct('capped-{charges}', :usage, 'request-' || :key);
"""
OF_ONE = "select count(*) from ducto_private.transactions where account_id = 'account-1' and type = 'usage'"

Connection = psycopg.Connection[tuple[Any, ...]]


def main() -> None:
    parts: dict[str, Callable[[Bench], None]] = {
        "charges": charges,
        "hot": hot,
        "caps": caps,
        "prices": prices,
        "statistics": statistics,
    }
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--seconds", type=int, default=5, help="length of a round (5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each rival, in turns (3)")
    parser.add_argument("--clients", type=int, default=8, help="sessions (8)")
    parser.add_argument("--accounts", type=int, default=10_000, help="accounts charged at random (10000)")
    parser.add_argument("--scale", type=int, default=10, help="pgbench's scale: 100,000 rows each (10)")
    parser.add_argument("--rows", type=int, default=5_000_000, help="transactions of the statistics (5000000)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    with ExitStack() as stack:
        bench = Bench(stack, options)
        for name in options.parts or parts:
            parts[name](bench)


class Bench:
    """A server of its own with ducto_pg in it, prices, accounts and a bare rival; gone when the stack closes."""

    def __init__(self, stack: ExitStack, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(stack.enter_context(TemporaryDirectory()))
        self.server = stack.enter_context(_server())
        self.program = str((self.server.bindir or Path()) / "pgbench")
        self.conn: Connection = stack.enter_context(psycopg.connect(self.server.dsn(), autocommit=True))
        print(f"{self.server.origin}, fsync {self.setting('fsync')}, {options.clients} clients, -M prepared")
        ducto_pg.setup(self.conn).or_raise()
        publish(self.conn, 10)
        self.conn.execute(BARE_TABLES % {"accounts": options.accounts})
        self.conn.execute(ROWS_FUNCTION)
        self.conn.execute(
            "select ducto.add_credits('account-' || i, 1000000000000) from generate_series(1, %s) as i",
            [options.accounts],
        )

    def script(self, text: str) -> str:
        """The name of a file with this text."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.sql"
        path.write_text(text)
        return str(path)

    def setting(self, name: str) -> str:
        return str(self.value("select current_setting(%s)", name))

    def value(self, query: str, *parameters: Any) -> Any:
        row = self.conn.execute(query, parameters).fetchone()
        assert row
        return row[0]

    def pgbench(self, *arguments: str, seconds: int | None = None, accounts: int | None = None) -> Decimal:
        """Transactions per second of one round."""
        options = self.options
        command = [self.program, "-n", "-M", "prepared", f"-c{options.clients}", "-j2", *arguments]
        command += [f"-T{seconds or options.seconds}", "-D", f"accounts={accounts or options.accounts}"]
        command += ["-D", f"usage={USAGE}", self.server.dsn()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"tps = ([\d.]+)", done.stdout)
        if done.returncode or not found:
            raise SystemExit(f"pgbench failed: {done.stderr}")
        return Decimal(found[1])

    def turns(self, rivals: dict[str, list[str]], *, accounts: int | None = None) -> dict[str, Decimal]:
        """The median rate of each rival; each round runs all of them, after one that does not count."""
        rates: dict[str, list[Decimal]] = {name: [] for name in rivals}
        for arguments in rivals.values():
            self.pgbench(*arguments, seconds=2, accounts=accounts)
        for _ in range(self.options.rounds):
            for name, arguments in rivals.items():
                rates[name].append(self.pgbench(*arguments, accounts=accounts))
        for name, found in rates.items():
            rounds = "  ".join(f"{rate:>8,.0f}" for rate in found)
            print(f"  {name:<24}{median(found):>8,.0f}/s   rounds: {rounds}")
        return {name: median(found) for name, found in rates.items()}


def charges(bench: Bench) -> None:
    """Charges on many accounts, and what they take on disk."""
    bench.conn.execute(
        "select ducto.set_user_plan(a.user_id, 'free') from generate_series(1, %s) as i,"
        " ducto.add_credits('planned-' || i, 1000000000000) as a",
        [bench.options.accounts],
    )
    print(f"\nCharges: ducto.deduct by usage (jsonb) and key, {bench.options.accounts:,} accounts")
    command = [bench.program, "-i", "-q", f"-s{bench.options.scale}", bench.server.dsn()]
    subprocess.run(command, capture_output=True, check=True)
    size, rows = _ledger(bench)
    rates = bench.turns(
        {
            "simple-update": ["-b", "simple-update"],
            "ducto.deduct": ["-f", bench.script(CHARGE)],
            "its two rows alone": ["-f", bench.script(ROWS)],
            "bare function": ["-f", bench.script(BARE)],
            "deduct on a plan": ["-f", bench.script(PLANNED)],
            "reserve, then deduct": ["-f", bench.script(HELD)],
        }
    )
    for rival in ("simple-update", "its two rows alone", "bare function"):
        print(f"  {'deduct / ' + rival:<40}{rates['ducto.deduct'] / rates[rival]:>4.2f}")
    for other in ("deduct on a plan", "reserve, then deduct"):
        print(f"  {other + ' / ducto.deduct':<40}{rates[other] / rates['ducto.deduct']:>4.2f}")
    new_size, new_rows = _ledger(bench)
    print(f"  {'bytes per charge':<24}{(new_size - size) // (new_rows - rows):>8}   rows, indexes, usage and key")


def hot(bench: Bench) -> None:
    """All sessions charge one account."""
    print("\nOne hot account")
    rivals = {"ducto.deduct": ["-f", bench.script(CHARGE)], "bare function": ["-f", bench.script(BARE)]}
    rates = bench.turns(rivals, accounts=1)
    print(f"  {'deduct / bare function':<24}{rates['ducto.deduct'] / rates['bare function']:>8.2f}")
    print(f"  {'charges of the account':<24}{bench.value(OF_ONE):>8,}")


def caps(bench: Bench) -> None:
    """A charge under a daily and a monthly cap, early and late in their windows."""
    print("\nCaps: ducto.deduct on one account with a daily and a monthly cap, one client, asynchronous commits")
    rivals = {}
    for charges in (0, 1_000_000):
        account = f"capped-{charges}"
        bench.conn.execute("select ducto.add_credits(%s, 1000000000000)", [account])
        values = {"account": account, "charges": charges, "usage": USAGE}
        with psycopg.ClientCursor(bench.conn) as cursor:
            cursor.execute(CAPPED, values)
        script = "set synchronous_commit = off;" + CHARGE_CAPPED.format(charges=charges)
        rivals[f"{charges:,} charges"] = ["-c1", "-j1", "-f", bench.script(script)]
    bench.conn.execute("vacuum analyze")
    few, many = bench.turns(rivals).values()
    print(f"  {'1,000,000 / 0 charges':<24}{few / many:>8.2f}   time of a charge")


def prices(bench: Bench) -> None:
    """Prices with few and with many models."""
    print("\nPrices: ducto.calculate_cost")
    few, many = 10, 2500
    calls: dict[int, list[Decimal]] = {few: [], many: []}
    firsts: dict[int, list[Decimal]] = {few: [], many: []}
    for _ in range(max(3, bench.options.rounds)):
        for models in (few, many):
            publish(bench.conn, models)
            firsts[models].append(_first_call(bench))
            bench.conn.execute(LOOP.format(models=models, calls=20_000))
            calls[models].append(Decimal(bench.setting("bench.us")))
    for models in (few, many):
        print(f"  {f'{models:,} models':<24}{median(calls[models]):>8.2f} us in the server", end="")
        print(f", first call of a session {median(firsts[models]):.1f} ms (worst {max(firsts[models]):.1f})")
    print(f"  {f'{many:,} / {few} models':<24}{median(calls[many]) / median(calls[few]):>8.2f}")


def statistics(bench: Bench) -> None:
    """The five statistics with rollups and without."""
    compare(bench.server, bench.options.rows)


def _first_call(bench: Bench) -> Decimal:
    with psycopg.connect(bench.server.dsn(), autocommit=True) as session:
        session.execute("select 1")
        started = time.perf_counter_ns()
        session.execute("select * from ducto.calculate_cost(%s)", [USAGE])
        return Decimal(time.perf_counter_ns() - started) / 1_000_000


def publish(conn: Connection, models: int) -> None:
    """Publish and activate a config of so many models, `gpt-4o` among them."""
    formulas = {"gpt-4o": FORMULA}
    for number in range(1, models):
        formulas[f"vendor-{number % 50}/model-{number}"] = FORMULA.replace("0.01", f"0.01{number:04}")
    ducto_pg.CreditManager(conn).publish_pricing({"models": formulas, "plans": PLANS})


def _ledger(bench: Bench) -> tuple[int, int]:
    size = bench.value("select pg_total_relation_size('ducto_private.transactions')")
    return size, bench.value("select count(*) from ducto_private.transactions")


def _server() -> Server:
    local = [bindir for bindir in servers.local_binaries() if (bindir / "pgbench").exists()]
    return embedded.start(*local[:1], settings=SETTINGS)


if __name__ == "__main__":
    main()

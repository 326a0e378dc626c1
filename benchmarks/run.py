"""What a charge costs, as ratios: on one durable server, in one run, the rivals in turns.

    make bench                              everything, about five minutes
    make bench ARGS='charges --seconds 10'  charges only, longer rounds

Yardsticks: pgbench's own `simple-update` (three statements in a transaction: five round trips); one call of a bare
function that updates one row and inserts one, in small tables of its own; and the same in ducto_pg's tables, what a
charge would cost without price or rule. Where the machine is not quiet, `benchmarks/instructions.py` counts
instructions.
"""

import argparse
import os
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
from client import compare_clients
from common import ROWS_FUNCTION, USAGE, Connection, open_accounts, publish, start
from rollups import compare

import ducto_pg

# Durable commits as PostgreSQL does them by default; no checkpoint falls into somebody's round.
SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "16GB", "checkpoint_timeout": "1h", "max_connections": "50"}
CHARGE = r"""
\set account random(1, :accounts)
\set key random(1, 1000000000000000)
select * from ducto.deduct(:kind || '-' || :account, :usage, 'request-' || :key);
"""
HELD = r"""
\set account random(1, :accounts)
\set key random(1, 1000000000000000)
select reservation_id
from ducto.reserve(:kind || '-' || :account, :usage, p_idempotency_key => 'request-' || :key) \gset
select * from ducto.deduct(:kind || '-' || :account, :usage, 'request-' || :key, null, :reservation_id);
"""
BARE = r"""
\set account random(1, :accounts)
select bench_charge('plain-' || :account, :usage);
"""
BARE_TABLES = """
create table bench_account (account_id text primary key, balance bigint not null) with (fillfactor = 60);
create table bench_log (
  log_id bigint generated always as identity primary key,
  account_id text not null,
  amount bigint not null,
  usage jsonb,
  created_at timestamptz not null default clock_timestamp());
insert into bench_account select 'plain-' || i, 1000000000 from generate_series(1, %(accounts)s) as i;
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
select bench_rows('plain-' || :account, :usage, 'request-' || :key);
"""
BATCH = r"""
\set key random(1, 1000000000000000)
select count(*) from ducto.deduct_batch(bench_elements('planned-1', :usage, :key));
"""
ELEMENTS = """
create function bench_elements(p_account_id text, p_usage jsonb, p_key bigint) returns jsonb language sql stable as $$
  select jsonb_agg(jsonb_build_object('user_id', p_account_id, 'metrics', p_usage,
    'idempotency_key', 'batch-' || p_key || '-' || i)) from generate_series(1, 100) as i
$$;
"""
MANY = """
select count(*), count(error) from ducto.deduct_batch((
  select jsonb_agg(jsonb_build_object('user_id', 'planned-' || (1 + i %% 3), 'metrics', %(usage)s::jsonb,
    'idempotency_key', 'many-' || i)) from generate_series(1, 10000) as i))
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
OF_ONE = "select count(*) from ducto_private.transactions where account_id = 'plain-1' and type = 'usage'"


def main() -> None:
    parts: dict[str, Callable[[Bench], None]] = {
        "charges": charges,
        "cpu": cpu,
        "hot": hot,
        "caps": caps,
        "prices": prices,
        "statistics": statistics,
        "client": client,
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
        self.server = stack.enter_context(start(SETTINGS))
        self.program = str((self.server.bindir or Path()) / "pgbench")
        self.conn: Connection = stack.enter_context(psycopg.connect(self.server.dsn(), autocommit=True))
        print(f"{self.server.origin}, fsync {self.setting('fsync')}, {options.clients} clients, -M prepared")
        ducto_pg.setup(self.conn).or_raise()
        publish(self.conn, 10)
        self.conn.execute(BARE_TABLES % {"accounts": options.accounts})
        self.conn.execute(ROWS_FUNCTION + ELEMENTS)
        open_accounts(self.conn, options.accounts)

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

    def pgbench(
        self, *arguments: str, seconds: int | None = None, accounts: int | None = None, clients: int | None = None
    ) -> Decimal:
        """Transactions per second of one round; with `clients` given, commits do not wait for the disk."""
        options = self.options
        command = [self.program, "-n", "-M", "prepared", f"-c{clients or options.clients}", "-j2", *arguments]
        command += [f"-T{seconds or options.seconds}", "-D", f"accounts={accounts or options.accounts}"]
        command += ["-D", f"usage={USAGE}", self.server.dsn()]
        environment = os.environ | ({"PGOPTIONS": "-c synchronous_commit=off"} if clients else {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        found = re.search(r"tps = ([\d.]+)", done.stdout)
        if done.returncode or not found:
            raise SystemExit(f"pgbench failed: {done.stderr}")
        return Decimal(found[1])

    def turns(
        self, rivals: dict[str, list[str]], *, accounts: int | None = None, clients: int | None = None
    ) -> dict[str, Decimal]:
        """The median rate of each rival; each round runs all of them, after one that does not count."""
        rates: dict[str, list[Decimal]] = {name: [] for name in rivals}
        for arguments in rivals.values():
            self.pgbench(*arguments, seconds=2, accounts=accounts, clients=clients)
        for _ in range(self.options.rounds):
            for name, arguments in rivals.items():
                rates[name].append(self.pgbench(*arguments, accounts=accounts, clients=clients))
        for name, found in rates.items():
            rounds = "  ".join(f"{rate:>8,.0f}" for rate in found)
            print(f"  {name:<24}{median(found):>8,.0f}/s   rounds: {rounds}")
        return {name: median(found) for name, found in rates.items()}


def _of(bench: "Bench", script: str, kind: str) -> list[str]:
    return ["-D", f"kind={kind}", "-f", bench.script(script)]


def charges(bench: Bench) -> None:
    """Durable charges on many accounts, and what they take on disk."""
    print(f"\nCharges: ducto.deduct by usage (jsonb) and key, {bench.options.accounts:,} accounts, durable commits")
    command = [bench.program, "-i", "-q", f"-s{bench.options.scale}", bench.server.dsn()]
    subprocess.run(command, capture_output=True, check=True)
    size, rows = _ledger(bench)
    rates = bench.turns(
        {
            "simple-update": ["-b", "simple-update"],
            "ducto.deduct": _of(bench, CHARGE, "plain"),
            "its two rows alone": ["-f", bench.script(ROWS)],
            "bare function": ["-f", bench.script(BARE)],
            "deduct on a plan": _of(bench, CHARGE, "planned"),
            "reserve, then deduct": _of(bench, HELD, "plain"),
        }
    )
    for rival in ("simple-update", "its two rows alone", "bare function"):
        print(f"  {'deduct / ' + rival:<40}{rates['ducto.deduct'] / rates[rival]:>4.2f}")
    for other in ("deduct on a plan", "reserve, then deduct"):
        print(f"  {other + ' / ducto.deduct':<40}{rates[other] / rates['ducto.deduct']:>4.2f}")
    new_size, new_rows = _ledger(bench)
    print(f"  {'bytes per charge':<24}{(new_size - size) // (new_rows - rows):>8}   rows, indexes, usage and key")
    print(f"  {'with a UUID as key':<24}{_bytes_with_uuid(bench):>8}")


def cpu(bench: Bench) -> None:
    """What a charge costs the processor, as a share of its two rows alone: commits do not wait for the disk."""
    print("\nProcessor: synchronous_commit off, 2 clients; shares of its two rows alone in the same run")
    rates = bench.turns(
        {
            "its two rows alone": ["-f", bench.script(ROWS)],
            "plain account": _of(bench, CHARGE, "plain"),
            "on a plan": _of(bench, CHARGE, "planned"),
            "plan, two caps": _of(bench, CHARGE, "capped"),
            "of it hold + settlement": _of(bench, HELD, "capped"),
        },
        clients=2,
    )
    for name in list(rates)[1:]:
        print(f"  {name:<40}{rates[name] / rates['its two rows alone']:>4.2f}")
    rates = bench.turns(
        {"single, one account": _of(bench, CHARGE, "planned"), "batches of 100": ["-f", bench.script(BATCH)]},
        accounts=1,
        clients=1,
    )
    print(f"  {'charge in a batch / single':<40}{100 * rates['batches of 100'] / rates['single, one account']:>4.2f}")
    started = time.perf_counter_ns()
    found = bench.conn.execute(MANY, {"usage": USAGE}).fetchone()
    print(f"  10,000 elements over 3 accounts {Decimal(time.perf_counter_ns() - started) / 10**9:>8.2f} s   {found}")


def hot(bench: Bench) -> None:
    """All sessions charge one account."""
    print("\nOne hot account")
    rivals = {"ducto.deduct": _of(bench, CHARGE, "plain"), "bare function": ["-f", bench.script(BARE)]}
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
    """Prices with few and with many models, and what publishing them takes."""
    print("\nPrices: ducto.calculate_cost")
    few, many = 10, 2500
    calls: dict[int, list[Decimal]] = {few: [], many: []}
    for _ in range(max(3, bench.options.rounds)):
        for models in (few, many):
            publish(bench.conn, models)
            bench.conn.execute(LOOP.format(models=models, calls=20_000))
            calls[models].append(Decimal(bench.setting("bench.us")))
    for models in (few, many):
        print(f"  {f'{models:,} models':<24}{median(calls[models]):>8.2f} us in the server")
    print(f"  {f'{many:,} / {few} models':<24}{median(calls[many]) / median(calls[few]):>8.2f}")
    for models, shapes in ((2500, 1), (1466, 25), (400, 400)):
        started = time.perf_counter_ns()
        publish(bench.conn, models, shapes)
        taken = Decimal(time.perf_counter_ns() - started) / 10**9
        firsts = [_first_call(bench) for _ in range(9)]
        print(f"  {models:,} models, {shapes} formulas: published in {taken:.2f} s, first call of a session", end="")
        print(f" {median(firsts):.1f} ms (worst {max(firsts):.1f})")


def statistics(bench: Bench) -> None:
    """The five statistics with rollups and without."""
    compare(bench.server, bench.options.rows)


def client(bench: Bench) -> None:
    """The managers beside psycopg alone."""
    compare_clients(bench.server.dsn(), bench.options.rounds)


def _first_call(bench: Bench) -> Decimal:
    with psycopg.connect(bench.server.dsn(), autocommit=True) as session:
        session.execute("select 1")
        started = time.perf_counter_ns()
        session.execute("select * from ducto.deduct('plain-1', %s)", [USAGE])
        return Decimal(time.perf_counter_ns() - started) / 1_000_000


def _ledger(bench: Bench) -> tuple[int, int]:
    size = bench.value("select pg_total_relation_size('ducto_private.transactions')")
    return size, bench.value("select count(*) from ducto_private.transactions")


def _bytes_with_uuid(bench: Bench) -> int:
    """Bytes of a charge with a UUID as its key, in a ledger of its own."""
    before = _ledger(bench)
    bench.conn.execute(
        "select ducto.deduct('plain-' || (1 + i %% %s), %s, gen_random_uuid()::text)"
        " from generate_series(1, 50000) as i",
        [bench.options.accounts, USAGE],
    )
    after = _ledger(bench)
    return (after[0] - before[0]) // (after[1] - before[1])


if __name__ == "__main__":
    main()

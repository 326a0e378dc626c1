"""The five statistics with rollups and without: on one server, the same answers, and how much faster.

    .venv/bin/python benchmarks/rollups.py                  5,000,000 transactions, about three minutes
    .venv/bin/python benchmarks/rollups.py --rows 500000    fewer

One session without parallel workers. The window is thirty closed days; then the same with a hundredth as many charges
after it that no rollup has counted, and no end.
"""

import argparse
import time
from decimal import Decimal
from statistics import median
from typing import Any

import psycopg
from psycopg import sql

import ducto_pg
from ducto_pg import servers
from ducto_pg.embedded import Server

ACCOUNTS, MODELS, DAYS = 1_000, 10, 30
START, END = "2026-01-01 00:00+01", "2026-01-31 00:00+01"
PRICES = {"models": {"_default": "input_tokens * 0.01"}, "timezone": "Europe/Berlin"}
# Rows of an account follow each other in its sequence and in time; one in a hundred is a refund.
LEDGER = """
insert into ducto_private.transactions (transaction_id, seq, amount, balance_after, allowance_used, revision,
  created_at, pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model)
select lpad(to_hex(i), 32, '0')::uuid, n.seq, case k.type when 'usage' then -(i %% 13) else i %% 7 end, 0,
  case k.type when 'usage' then i %% 3 else 0 end, n.seq, %(start)s + i * (%(span)s / %(rows)s),
  1,
  'account-' || i %% %(accounts)s, k.type, 0, case k.type when 'usage' then i %% 13 + 0.12345 end,
  jsonb_build_object('model', m.name || '-0613', 'input_tokens', 1000 + i %% 1000, 'output_tokens', i %% 500),
  m.name || '-0613', m.name
from generate_series(%(first)s::bigint, %(last)s::bigint) as i
cross join lateral (select 1 + i / %(accounts)s) as n (seq)
cross join lateral (select case n.seq %% 100 when 0 then 'refund' else 'usage' end) as k (type)
cross join lateral (select 'model-' || i / 7 %% %(models)s) as m (name)
"""
ACCOUNT_ROWS = """
insert into ducto_private.accounts (balance, held, credit_limit, lifetime_purchased, seq, revision, allowance_used,
  opened_at, changed_at, holds, lots, caps, account_id, kind, carry, plain)
select 0, 0, 0, 0, count(*), count(*), 0, min(t.created_at), max(t.created_at), 0, 0, 0, t.account_id, 'user', 0, true
from ducto_private.transactions as t
group by t.account_id
on conflict (account_id) do update
set seq = excluded.seq, revision = excluded.revision, changed_at = excluded.changed_at
"""
STATISTICS = ("spend_by_user", "spend_by_model", "daily_spend", "aggregate_stats", "top_users")

Connection = psycopg.Connection[tuple[Any, ...]]
Answers = dict[str, list[tuple[Any, ...]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=5_000_000, help="transactions in the window (5000000)")
    options = parser.parse_args()
    settings = {"shared_buffers": "256MB", "max_wal_size": "16GB", "checkpoint_timeout": "1h", "fsync": "off"}
    with servers.open_server(settings) as server:
        print(server.origin)
        compare(server, options.rows)


def compare(server: Server, rows: int) -> None:
    """Prints the times of each statistic in a scratch database of so many rows; fails where answers differ."""
    name = sql.Identifier("ducto_rollups")
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(name))
        try:
            with psycopg.connect(server.dsn("ducto_rollups"), autocommit=True) as conn:
                _compare(conn, rows)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(name))


def _compare(conn: Connection, rows: int) -> None:
    print(f"\nStatistics: {rows:,} transactions, {ACCOUNTS:,} accounts, {MODELS} models, {DAYS} closed days")
    ducto_pg.setup(conn).or_raise()
    ducto_pg.CreditManager(conn).publish_pricing(PRICES)
    conn.execute("set max_parallel_workers_per_gather = 0")
    fill(conn, 0, rows, rows)
    slow, truth = ask(conn, END, rounds=1)
    started = time.perf_counter_ns()
    written = ducto_pg.CreditManager(conn).rollup_usage()
    print(f"  {'rollup_usage':<18}{_seconds(started):>11.3f} s for {written:,} sums")
    conn.execute("vacuum analyze")
    fast, answers = ask(conn, END, rounds=5)
    _same(truth, answers)
    fill(conn, rows, rows + rows // 100, rows)
    behind, answers = ask(conn, None, rounds=5)
    print(f"  {'':<18}{'ledger':>11}{'rollups':>11}{'ratio':>8}{'1 % to count':>15}")
    ratios = {name: slow[name] / fast[name] for name in STATISTICS}
    for name, ratio in ratios.items():
        print(f"  {name:<18}{slow[name]:>9.3f} s{fast[name]:>9.3f} s{ratio:>8.0f}{behind[name]:>13.3f} s")
    print(f"  {'least':<40}{min(ratios.values()):>8.0f}")
    conn.execute("truncate ducto_private.rollup_accounts, ducto_private.rollups")
    conn.execute("update ducto_private.rollup_state set counted = 0, changed_at = null")
    _same(ask(conn, None, rounds=1)[1], answers)


def fill(conn: Connection, first: int, end: int, rows: int) -> None:
    """Write the rows from `first` up to `end`, of which `rows` fill the window."""
    values = {"first": first, "last": end - 1, "rows": rows, "accounts": ACCOUNTS, "models": MODELS}
    literals = {"start": f"'{START}'::timestamptz", "span": f"interval '{DAYS} days'"}
    conn.execute((LEDGER % (values | literals)).encode())
    conn.execute(ACCOUNT_ROWS)
    conn.execute("vacuum analyze")


def ask(conn: Connection, end: str | None, *, rounds: int) -> tuple[dict[str, Decimal], Answers]:
    """The median time in seconds of each statistic, and its answer."""
    times: dict[str, list[Decimal]] = {name: [] for name in STATISTICS}
    answers: Answers = {}
    for _ in range(rounds):
        for name in STATISTICS:
            query = f"select * from ducto.{name}(p_start => %s, p_end => %s)".encode()
            started = time.perf_counter_ns()
            answers[name] = conn.execute(query, [START, end]).fetchall()
            times[name].append(_seconds(started))
    return {name: median(found) for name, found in times.items()}, answers


def _seconds(started: int) -> Decimal:
    return Decimal(time.perf_counter_ns() - started) / 1_000_000_000


def _same(expected: Answers, found: Answers) -> None:
    for name in STATISTICS:
        if expected[name] != found[name]:
            raise SystemExit(f"{name} answers otherwise with rollups")


if __name__ == "__main__":
    main()

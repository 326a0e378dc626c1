"""What the benchmarks share: prices, accounts of every kind, and the yardstick of a charge's two rows alone."""

from typing import Any

import psycopg

import ducto_pg
from ducto_pg import embedded, servers
from ducto_pg.embedded import Server

Connection = psycopg.Connection[tuple[Any, ...]]

USAGE = '{"model": "gpt-4o-2024-08-06", "input_tokens": 1001, "output_tokens": 100, "cache_read_tokens": 512}'
FORMULA = "(input_tokens - cache_read_tokens) * 0.0025 + cache_read_tokens * 0.00125 + output_tokens * 0.01"
PLANS = {"free": {"id": "free", "name": "Free", "free_allowance": 5}}

# The two rows that a charge writes, without price, rule, check, replay or answer.
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


def publish(conn: Connection, models: int, shapes: int = 1) -> None:
    """Publish and activate a config of so many models, `gpt-4o` among them, by formulas of so many shapes."""
    formulas = {"gpt-4o": FORMULA}
    for number in range(1, models):
        shape = "".join(f" + {name}_tokens * 0.5" for name in _terms(number % shapes))
        formulas[f"vendor-{number % 50}/model-{number}"] = FORMULA.replace("0.01", f"0.01{number:04}") + shape
    ducto_pg.CreditManager(conn).publish_pricing({"models": formulas, "plans": PLANS})


def _terms(shape: int) -> list[str]:
    """The terms of a shape, by the digits of its number in base two."""
    return ["input" if digit == "0" else "output" for digit in f"{shape:b}"] if shape else []


def open_accounts(conn: Connection, accounts: int) -> None:
    """Accounts with nothing but a balance, on a plan, and on a plan with a daily and a monthly cap, all used before."""
    for kind in ("plain", "planned", "capped"):
        for statement in (
            "select ducto.add_credits(%(kind)s || '-' || i, 1000000000000) from generate_series(1, %(accounts)s) as i",
            "select ducto.set_user_plan(%(kind)s || '-' || i, 'free') from generate_series(1, %(accounts)s) as i"
            " where %(kind)s <> 'plain'",
            "select ducto.set_spend_cap(%(kind)s || '-' || i, 1000000000000, t)"
            " from generate_series(1, %(accounts)s) as i, unnest('{daily,monthly}'::text[]) as t"
            " where %(kind)s = 'capped'",
            "select ducto.deduct(%(kind)s || '-' || i, %(usage)s, 'first', null, h.reservation_id)"
            " from generate_series(1, %(accounts)s) as i,"
            " ducto.reserve(%(kind)s || '-' || i, %(usage)s, p_idempotency_key => 'first') as h",
        ):
            conn.execute(statement, {"kind": kind, "accounts": accounts, "usage": USAGE})
    conn.execute("vacuum analyze")


def start(settings: dict[str, str]) -> Server:
    """A server of its own with ducto_pg in it, from programs that have pgbench where this machine has such."""
    local = [bindir for bindir in servers.local_binaries() if (bindir / "pgbench").exists()]
    return embedded.start(*local[:1], settings=settings)

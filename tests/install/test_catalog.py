"""The house rules, asked of the catalog of an installed and priced database."""

import ast
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

import ducto_pg
from ducto_pg import CreditManager

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]

# Every RPC: volatility, name, arguments with types and defaults, answer.
RPCS = """
volatile ack_events(p_ids text[], p_consumer text = 'default') -> bigint
volatile activate_pricing(p_version integer, p_at timestamptz = null) -> pricing_config_result
volatile add_credits(p_user_id text, p_amount bigint, p_type text = 'adjustment', p_metadata jsonb = null, \
p_expires_at timestamptz = null, p_idempotency_key text = null, p_paid_amount numeric = null, p_paid_currency text = \
null, p_reference text = null, p_keep_lot boolean = false) -> add_credits_result
volatile add_team_member(p_team_id text, p_user_id text, p_role text = 'member', p_spend_cap bigint = null, \
p_spend_cap_period text = 'lifetime') -> add_team_member_result
stable aggregate_stats(p_start timestamptz = null, p_end timestamptz = null, p_user_id text = null) -> \
aggregate_stats_row
stable calculate_cost(p_metrics jsonb, p_user_id text = null, p_version integer = null, p_plan_id text = null) -> \
cost_breakdown
stable check_allowance(p_user_id text) -> allowance_result
stable check_feature(p_user_id text, p_feature text) -> check_feature_result
stable check_spend_cap(p_user_id text, p_model text = null, p_amount bigint = 0) -> cap_check_result
volatile create_team(p_name text, p_initial_balance bigint = 0, p_idempotency_key text = null, p_team_id text = null) \
-> create_team_result
stable daily_spend(p_start timestamptz = null, p_end timestamptz = null, p_user_id text = null) -> setof \
daily_spend_row
volatile deduct(p_user_id text, p_metrics jsonb, p_idempotency_key text = null, p_metadata jsonb = null, \
p_reservation_id text = null, p_final boolean = true, p_labels text[] = null, p_occurred_at timestamptz = null) -> \
deduction_result
volatile deduct_batch(p_charges jsonb) -> setof deduction_result
volatile deduct_credits(p_user_id text, p_amount numeric, p_reservation_id text = null, p_idempotency_key text = null, \
p_metadata jsonb = null, p_model text = null, p_final boolean = true, p_labels text[] = null, p_occurred_at \
timestamptz = null) -> deduction_result
volatile deduct_fixed(p_user_id text, p_job_name text, p_idempotency_key text = null, p_metadata jsonb = null, \
p_labels text[] = null, p_occurred_at timestamptz = null) -> deduction_result
volatile deduct_team(p_team_id text, p_user_id text, p_metrics jsonb, p_idempotency_key text = null, p_metadata jsonb \
= null, p_reservation_id text = null, p_final boolean = true, p_labels text[] = null, p_occurred_at timestamptz = \
null) -> team_deduction_result
volatile deduct_team_credits(p_team_id text, p_user_id text, p_amount numeric, p_reservation_id text = null, \
p_idempotency_key text = null, p_metadata jsonb = null, p_model text = null, p_final boolean = true, p_labels text[] = \
null, p_occurred_at timestamptz = null) -> team_deduction_result
volatile erase_user(p_user_id text) -> bigint
stable explain_transaction(p_transaction_id text, p_user_id text = null) -> explanation
volatile extend_reservation(p_reservation_id text, p_add_amount bigint = 0, p_ttl_seconds integer = null, p_user_id \
text = null, p_idempotency_key text = null) -> reserve_result
volatile fail_topup(p_user_id text, p_key text, p_retry_seconds integer = 3600) -> auto_topup
volatile fetch_events(p_limit integer = 100, p_lease_seconds integer = 60, p_consumer text = 'default') -> setof event
volatile freeze_account(p_user_id text, p_frozen boolean = true) -> balance_result
stable get_active_pricing() -> pricing_config_result
stable get_auto_topup(p_user_id text) -> auto_topup
stable get_balance(p_user_id text, p_at timestamptz = null) -> balance_result
stable get_pricing_config(p_version integer) -> pricing_config_result
stable get_pricing_history() -> setof pricing_config_history_item
stable get_reservation(p_reservation_id text, p_user_id text = null) -> reservation
stable get_statement(p_user_id text, p_start timestamptz, p_end timestamptz) -> statement
stable get_team(p_team_id text) -> team
stable get_team_balance(p_team_id text) -> team_balance_result
stable get_team_members(p_team_id text) -> setof team_member
stable get_transaction(p_transaction_id text = null, p_user_id text = null, p_idempotency_key text = null) -> \
transaction
stable get_user_plan(p_user_id text) -> get_user_plan_result
stable list_reservations(p_user_id text, p_active boolean = true, p_limit integer = 50, p_before timestamptz = null) \
-> setof reservation
stable list_spend_caps(p_user_id text) -> setof spend_cap
stable list_transactions(p_user_id text, p_limit integer = 50, p_before bigint = null, p_type text = null, p_from \
timestamptz = null, p_to timestamptz = null) -> setof transaction
volatile merge_accounts(p_from text, p_into text, p_idempotency_key text = null) -> balance_result
stable my_balance() -> balance_result
stable my_daily_spend(p_start timestamptz, p_end timestamptz) -> setof daily_spend_row
stable my_plan() -> get_user_plan_result
stable my_statement(p_start timestamptz, p_end timestamptz) -> statement
stable my_transactions(p_limit integer = 50, p_before bigint = null) -> setof transaction
stable read_usage(p_body jsonb, p_api text = null, p_model text = null) -> jsonb
volatile refund_credits(p_transaction_id text, p_amount bigint = null, p_reason text = null, p_metadata jsonb = null, \
p_idempotency_key text = null, p_user_id text = null) -> refund_result
volatile release_reservation(p_reservation_id text, p_user_id text = null) -> reserve_result
volatile remove_auto_topup(p_user_id text) -> auto_topup
volatile remove_credits(p_user_id text, p_amount bigint, p_reason text = null, p_transaction_id text = null, \
p_metadata jsonb = null, p_idempotency_key text = null, p_unspent_only boolean = false, p_paid_amount numeric = null, \
p_paid_currency text = null) -> add_credits_result
volatile remove_spend_cap(p_user_id text, p_cap_type text, p_model text = null, p_label text = null) -> spend_cap
volatile remove_team_member(p_team_id text, p_user_id text) -> add_team_member_result
volatile reserve(p_user_id text, p_metrics jsonb, p_operation_type text = 'usage', p_metadata jsonb = null, \
p_min_balance bigint = null, p_ttl_seconds integer = 600, p_idempotency_key text = null, p_labels text[] = null, \
p_occurred_at timestamptz = null, p_overrun text = null) -> reserve_result
volatile reserve_credits(p_user_id text, p_amount bigint, p_operation_type text = 'usage', p_metadata jsonb = null, \
p_min_balance bigint = null, p_ttl_seconds integer = 600, p_idempotency_key text = null, p_model text = null, p_labels \
text[] = null, p_occurred_at timestamptz = null, p_overrun text = null) -> reserve_result
volatile reserve_team(p_team_id text, p_user_id text, p_metrics jsonb, p_operation_type text = 'usage', p_metadata \
jsonb = null, p_min_balance bigint = null, p_ttl_seconds integer = 600, p_idempotency_key text = null, p_labels text[] \
= null, p_occurred_at timestamptz = null, p_overrun text = null) -> reserve_result
volatile reserve_team_credits(p_team_id text, p_user_id text, p_amount bigint, p_operation_type text = 'usage', \
p_metadata jsonb = null, p_min_balance bigint = null, p_ttl_seconds integer = 600, p_idempotency_key text = null, \
p_model text = null, p_labels text[] = null, p_occurred_at timestamptz = null, p_overrun text = null) -> \
reserve_result
volatile rollup_usage() -> bigint
volatile set_auto_topup(p_user_id text, p_threshold bigint, p_amount bigint, p_max_per_month integer = 10) -> \
auto_topup
volatile set_credit_limit(p_user_id text, p_limit bigint) -> balance_result
volatile set_low_balance(p_user_id text, p_threshold bigint = null) -> balance_result
volatile set_spend_cap(p_user_id text, p_limit bigint, p_cap_type text = 'daily', p_model text = null, p_action text = \
'deny', p_label text = null) -> spend_cap
volatile set_user_plan(p_user_id text, p_plan_id text = null, p_when text = 'now', p_anchor timestamptz = null, \
p_until timestamptz = null, p_event_at timestamptz = null, p_idempotency_key text = null) -> set_user_plan_result
stable spend_by_label(p_start timestamptz = null, p_end timestamptz = null, p_user_id text = null) -> setof \
spend_by_label_row
stable spend_by_model(p_start timestamptz = null, p_end timestamptz = null, p_user_id text = null) -> setof \
spend_by_model_row
stable spend_by_user(p_start timestamptz = null, p_end timestamptz = null, p_user_id text = null) -> setof \
spend_by_user_row
stable spend_margin(p_start timestamptz = null, p_end timestamptz = null) -> setof spend_margin
volatile sweep_expired_credits(p_dry_run boolean = false, p_limit integer = 1000) -> sweep_result
stable top_users(p_limit integer = 10, p_start timestamptz = null, p_end timestamptz = null) -> setof top_user_row
volatile unschedule_pricing(p_version integer) -> pricing_config_result
stable verify_ledger(p_account_id text = null) -> setof violation
immutable version() -> text
"""

# Each query answers what breaks the rule. `ours` are our functions, `objects` all else that has an owner.
OURS = """
with schemas as (
  select n.oid, n.nspname as schema
  from pg_namespace as n
  where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
), ours as (
  select p.*, s.schema, format('%s.%s', s.schema, p.proname) as name, l.lanname,
    coalesce(p.proconfig, '{}') as settings
  from pg_proc as p
  join schemas as s on s.oid = p.pronamespace
  join pg_language as l on l.oid = p.prolang
), columns as (
  select s.schema, c.relname, c.relkind, a.attname, t.typname, a.attrelid, a.attnum, a.attcollation
  from pg_attribute as a
  join pg_class as c on c.oid = a.attrelid
  join schemas as s on s.oid = c.relnamespace
  join pg_type as t on t.oid = a.atttypid
  where a.attnum > 0 and not a.attisdropped and c.relkind <> 'i'
)
"""
RULES = {
    "no function is executable by PUBLIC": """
        select o.name from ours as o cross join aclexplode(coalesce(o.proacl, acldefault('f', o.proowner))) as a
        where a.grantee = 0""",
    "no schema, relation or type that holds data is reachable by PUBLIC": """
        select s.schema from pg_namespace as n join schemas as s on s.oid = n.oid cross join aclexplode(n.nspacl) as a
        where a.grantee = 0
        union all
        select c.relname from pg_class as c join schemas as s on s.oid = c.relnamespace
        cross join aclexplode(c.relacl) as a
        where a.grantee <> c.relowner""",
    "every RPC runs as the owner, with just the settings that make a caller's harmless": """
        select o.name from ours as o
        where o.schema = 'ducto' and (not o.prosecdef
          or array_remove(o.settings, 'jit=off')
            <> '{"search_path=pg_catalog, pg_temp",standard_conforming_strings=on}')""",
    "nothing but an RPC runs as the owner": "select o.name from ours as o where o.schema <> 'ducto' and o.prosecdef",
    "a helper sets the same path": """
        select o.name from ours as o
        where o.schema <> 'ducto'
          and array_remove(array_remove(o.settings, 'plan_cache_mode=force_generic_plan'), 'quote_all_identifiers=off')
            <> '{"search_path=pg_catalog, pg_temp"}'""",
    "a name has one function": "select o.name from ours as o group by o.name having count(*) > 1",
    "every argument is named p_…, none is for output": """
        select o.name from ours as o
        where o.proargmodes is not null or o.provariadic <> 0
          or cardinality(coalesce(o.proargnames, '{}')) <> o.pronargs
          or exists (select from unnest(o.proargnames) as a (name) where a.name !~ '^p_[a-z]')""",
    "functions are SQL or PL/pgSQL, without directives": """
        select o.name from ours as o
        where o.prokind <> 'f' or o.lanname not in ('sql', 'plpgsql') or o.prosrc ~ '#variable'""",
    "no rule hangs on assert, and nothing notifies": """
        select o.name from ours as o where o.prosrc ~* '\\y(assert|pg_notify|notify +[a-z"]+)\\y'""",
    "every public function has a comment": """
        select o.name from ours as o
        where o.schema = 'ducto' and coalesce(obj_description(o.oid, 'pg_proc'), '') = ''""",
    "every public type and view has a comment": """
        select s.schema || '.' || c.relname from pg_class as c join schemas as s on s.oid = c.relnamespace
        where s.schema <> 'ducto_private'
          and coalesce(obj_description(c.oid, 'pg_class'), obj_description(c.reltype, 'pg_type'), '') = ''""",
    "every schema has a comment": """
        select s.schema from schemas as s where coalesce(obj_description(s.oid, 'pg_namespace'), '') = ''""",
    "ducto has functions and the types of their answers, nothing else": """
        select c.relname from pg_class as c join schemas as s on s.oid = c.relnamespace
        where s.schema = 'ducto' and c.relkind <> 'c'""",
    "ducto_read has views only": """
        select c.relname from pg_class as c join schemas as s on s.oid = c.relnamespace
        where s.schema = 'ducto_read' and c.relkind <> 'v' union all
        select o.name from ours as o where o.schema = 'ducto_read'""",
    "every foreign key has an index that begins with its columns": """
        select k.conname from pg_constraint as k join schemas as s on s.oid = k.connamespace
        where k.contype = 'f' and not exists (
          select from pg_index as i
          where i.indrelid = k.conrelid and i.indpred is null and i.indisvalid
            and (i.indkey::int2[])[0:cardinality(k.conkey) - 1] @> k.conkey)""",
    "every unique key of what belongs to an account holds the account's id": """
        select i.indexrelid::regclass from pg_index as i join columns as c on c.attrelid = i.indrelid
        where c.attname = 'account_id' and i.indisunique and not c.attnum = any (i.indkey::int2[])""",
    "ids are compared byte by byte": """
        select c.relname || '.' || c.attname from columns as c join pg_collation as l on l.oid = c.attcollation
        where c.schema = 'ducto_private' and c.relkind = 'r' and l.collname <> 'C'
          and c.attname in ('account_id', 'user_id', 'member_id', 'idempotency_key') """,
    "nothing is a float": """
        select c.relname || '.' || c.attname from columns as c where c.typname in ('float4', 'float8', 'money')
        union all
        select o.name from ours as o
        where 'float4'::regtype = any (o.proargtypes::oid[] || o.prorettype)
          or 'float8'::regtype = any (o.proargtypes::oid[] || o.prorettype)
          or o.prosrc ~* '\\y(float[48]?|double precision|real)\\y'""",
    "every time knows its zone": "select c.relname from columns as c where c.typname in ('timestamp', 'time')",
    "everything belongs to one role": """
        select count(distinct x.owner) from (
          select o.proowner as owner from ours as o
          union all select c.relowner from pg_class as c join schemas as s on s.oid = c.relnamespace
          union all select t.typowner from pg_type as t join schemas as s on s.oid = t.typnamespace
          union all select n.nspowner from pg_namespace as n join schemas as s on s.oid = n.oid) as x
        having count(distinct x.owner) <> 1""",
}
CONFIG = {
    "models": {
        "gpt-4": "input_tokens * 0.01 + output_tokens / 30",
        "gpt-4o": "tier(input_tokens, 10, 1, 2)",
        "_default": "input_tokens // 7",
    },
    "tools": {"browse": "tool_calls * 2", "_default": "tool_calls % 3"},
    "search": {"costs": "search_queries * 2 if search_queries > 1 else percentile(50, 1, search_queries)"},
    "cache": {"discount": "cache_read_tokens * -0.001"},
    "fixed": {"report": 7},
    "metrics": {"images": 0},
    "plans": {
        "pro": {"id": "pro", "name": "Pro", "free_allowance": 10, "rate_overrides": {"gpt-4": "input_tokens * 0.005"}}
    },
}
USAGE = '{"model": "gpt-4", "input_tokens": 150}'


@pytest.fixture
def priced(conn: Connection) -> Connection:
    """A database with two versions of prices, plans and overrides included."""
    credits = CreditManager(conn)
    credits.publish_pricing(CONFIG)
    credits.publish_pricing({**CONFIG, "min_balance": 0, "plans": None})
    return conn


def test_the_rpcs_are_those_of_the_contract(conn: Connection) -> None:
    rows = conn.execute(
        """
        select format('%s %s(%s) -> %s',
          case p.provolatile when 'v' then 'volatile' when 's' then 'stable' else 'immutable' end, p.proname,
          pg_get_function_arguments(p.oid), pg_get_function_result(p.oid))
        from pg_proc as p where p.pronamespace = 'ducto'::regnamespace order by p.proname
        """
    ).fetchall()
    shorter = {
        "timestamp with time zone": "timestamptz",
        " DEFAULT ": " = ",
        "NULL": "null",
        "SETOF ": "setof ",
        "ducto.": "",
        **{f"::{name}": "" for name in ("text[]", "text", "bigint", "integer", "numeric", "jsonb", "timestamptz")},
    }
    found = []
    for (line,) in rows:
        for long, short in shorter.items():
            line = line.replace(long, short)
        found.append(line)
    assert found == RPCS.strip().splitlines()


def test_the_rules(priced: Connection) -> None:
    broken = {
        rule: [str(name) for (name,) in priced.execute(f"{OURS} {query}".encode())] for rule, query in RULES.items()
    }
    assert {rule: found for rule, found in broken.items() if found} == {}


def test_each_rule_sees_what_breaks_it(priced: Connection) -> None:
    """Otherwise a rule whose query finds nothing could be a query that never finds anything."""
    priced.execute(
        """
        create role ducto_rule_breaker;
        create function ducto.bad(id integer, out result float8) language plpgsql as $$ #variable_conflict error
        begin assert true; end $$;
        create function ducto.bad(p_id text) returns integer language internal as 'int4in';
        create function ducto_private.bad(p_id text) returns timestamp language sql security definer
        as 'select now()::timestamp';
        create or replace function ducto_private.lock_setup() returns void language sql volatile as 'select';
        create function ducto_read.bad() returns integer language sql as 'select 1';
        create view ducto_read.bad as select ducto_private.nearest('a', '{}');
        create table ducto.bad (
          account_id text references ducto_private.accounts, price real, at timestamp, id integer primary key);
        create table ducto_private.bad (account_id text);
        alter table ducto_private.bad owner to ducto_rule_breaker;
        grant select on ducto_private.accounts to ducto_rule_breaker;
        comment on schema ducto_read is null;
        """
    )
    try:
        silent = [rule for rule, query in RULES.items() if not priced.execute(f"{OURS} {query}".encode()).fetchall()]
    finally:
        priced.execute("drop owned by ducto_rule_breaker; drop role ducto_rule_breaker")
    assert silent == []


def test_no_float_in_the_package() -> None:
    """But for the seconds that embedded.py and servers.py wait for the operating system."""
    found = []
    for path in Path(ducto_pg.__file__).parent.rglob("*.py"):
        if path.name in ("embedded.py", "servers.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.Constant) and isinstance(node.value, float)) or (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float"
            ):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_plpgsql_check_finds_nothing(priced: Connection) -> None:
    if not priced.execute("select 1 from pg_available_extensions where name = 'plpgsql_check'").fetchone():
        pytest.skip("this server does not have the extension plpgsql_check (Debian: postgresql-15-plpgsql-check)")
    priced.execute("create extension plpgsql_check")
    found = priced.execute(
        """
        select p.oid::regproc::text, c.lineno, c.message, c.detail
        from pg_proc as p
        join pg_language as l on l.oid = p.prolang and l.lanname = 'plpgsql'
        cross join lateral plpgsql_check_function_tb(p.oid, case when p.prorettype = 'trigger'::regtype
          then 'ducto_private.transactions'::regclass else 0 end, extra_warnings => true) as c
        where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace)
        """
    ).fetchall()
    assert found == []


def round_trip(credits: CreditManager, user: str) -> None:
    """Every call of the charge path, each by each road."""
    usage = {"model": "gpt-4", "input_tokens": 500}
    credits.add_credits(user, 1000, idempotency_key="grant").or_raise()
    charge = credits.deduct(user, usage, "charge").or_raise()
    assert credits.deduct(user, usage, "charge").or_raise().idempotent
    credits.deduct_fixed(user, "report").or_raise()
    hold = credits.reserve(user, usage, idempotency_key="hold").or_raise()
    assert credits.reserve(user, usage, idempotency_key="hold").or_raise().idempotent
    credits.extend_reservation(hold.reservation_id, 5, idempotency_key="more").or_raise()
    credits.deduct_credits(user, 3, hold.reservation_id, final=False).or_raise()
    credits.deduct_credits(user, 3, hold.reservation_id).or_raise()
    credits.release_reservation(credits.reserve_credits(user, 3).or_raise().reservation_id).or_raise()
    credits.refund_credits(charge.transaction_id, 1, idempotency_key="refund").or_raise()
    credits.remove_credits(user, 1, idempotency_key="removal").or_raise()
    credits.get_balance(user)
    credits.get_transaction(charge.transaction_id)
    credits.list_transactions(user)
    credits.list_reservations(user)
    round_trip_with_everything(credits, f"rich {user}", f"team {user}", datetime.now(UTC) + timedelta(days=1))


def round_trip_with_everything(credits: CreditManager, user: str, team: str, tomorrow: datetime) -> None:
    """The same with a plan, caps and lots, on a pool and in a batch."""
    usage = {"model": "gpt-4", "input_tokens": 500}
    credits.set_user_plan(user, "pro").or_raise()
    credits.add_credits(user, 500, "promotion", expires_at=tomorrow).or_raise()
    credits.set_spend_cap(user, 1000).or_raise()
    credits.set_spend_cap(user, 1000, "monthly", "gpt-4", "warn").or_raise()
    hold = credits.reserve(user, usage).or_raise()
    credits.extend_reservation(hold.reservation_id, 5).or_raise()
    credits.deduct(user, usage, reservation_id=hold.reservation_id).or_raise()
    charge = credits.deduct(user, {**usage, "input_tokens": 5000}, "charge").or_raise()
    credits.refund_credits(charge.transaction_id, 1).or_raise()
    credits.create_team("Team", 1000, "team", team).or_raise()
    credits.add_team_member(team, user, "member", 100, "daily").or_raise()
    hold = credits.reserve_team(team, user, usage).or_raise()
    credits.deduct_team(team, user, usage, reservation_id=hold.reservation_id).or_raise()
    charged = credits.deduct_team_credits(team, user, 5, idempotency_key="charge").or_raise()
    credits.refund_credits(charged.transaction_id, 1).or_raise()
    credits.deduct_batch(
        [
            {"user_id": user, "amount": 1},
            {"team_id": team, "user_id": user, "metrics": usage, "idempotency_key": "batch"},
        ]
    )
    credits.check_spend_cap(user, "gpt-4", 5)
    credits.check_allowance(user)
    credits.check_feature(user, "sso")
    credits.list_spend_caps(user)
    credits.get_team_balance(team)
    credits.get_team_members(team)
    credits.remove_spend_cap(user, "daily").or_raise()
    credits.remove_team_member(team, user).or_raise()


@pytest.mark.parametrize("grown", [False, True], ids=["from the first call", "once grown and analyzed"])
def test_the_charge_path_reads_by_index(conn: Connection, connect: Connect, grown: bool) -> None:
    """A session keeps the plans of its first calls: made on empty tables, they must serve full ones.

    Tables that were vacuumed or analyzed while tiny are an exception, which ends when they are analyzed again.
    """
    credits = CreditManager(conn)
    credits.publish_pricing({**CONFIG, "default_plan": "pro"})
    if grown:
        conn.execute("vacuum analyze")
        round_trip(credits, "early")
        connect().execute(
            """
            select ducto.add_credits(u.id, 100), ducto.deduct_credits(u.id, 1, null, 'charge'),
              ducto.reserve_credits(u.id, 1, p_idempotency_key => 'hold'), ducto.set_spend_cap(u.id, 1000),
              ducto.add_credits(u.id, 5, p_expires_at => now() + interval '1 day'), ducto.deduct_credits(u.id, 20),
              ducto.create_team('Team', 100, null, u.id || ' team'),
              ducto.add_team_member(u.id || ' team', u.id, 'member', 9)
            from (select 'grown ' || g.n as id from generate_series(1, 500) as g (n)) as u
            """
        )
        conn.execute("analyze")
    scans = (
        "select s.relname, s.seq_scan from pg_stat_xact_user_tables as s"
        " where s.relname in ('accounts', 'transactions', 'transaction_details', 'holds', 'hold_keys',"
        " 'spend_caps', 'credit_lots', 'lot_entries', 'teams', 'team_members') order by 1"
    )
    with conn.transaction():
        before = conn.execute(scans).fetchall()
        for number in range(30):
            round_trip(credits, f"user {number}")
        assert conn.execute(scans).fetchall() == before

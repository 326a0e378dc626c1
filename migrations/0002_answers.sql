-- The answers of the RPCs. A type grows only by attributes appended in a later migration.

create type ducto.cost_breakdown as (
  model_credits numeric,
  tool_credits numeric,
  search_credits numeric,
  cache_savings numeric,
  fixed_credits numeric,
  total numeric,
  breakdown jsonb,
  resolved_model text,
  pricing_version integer,
  plan_id text,
  error text
);

create type ducto.pricing_config_result as (
  id text,
  config jsonb,
  version integer,
  label text,
  error text
);

create type ducto.pricing_config_history_item as (
  id text,
  version integer,
  label text,
  active boolean,
  created_at timestamptz,
  error text
);

create type ducto.balance_result as (
  user_id text,
  balance bigint,
  lifetime_purchased bigint,
  reserved bigint,
  available bigint,
  credit_limit bigint,
  revision bigint,
  error text
);

create type ducto.add_credits_result as (
  transaction_id text,
  user_id text,
  amount bigint,
  new_balance bigint,
  lifetime_purchased bigint,
  idempotent boolean,
  revision bigint,
  error text
);

create type ducto.reserve_result as (
  reservation_id text,
  user_id text,
  amount bigint,
  balance bigint,
  reserved_total bigint,
  error text,
  idempotent boolean,
  expires_at timestamptz,
  warnings text[],
  revision bigint
);

create type ducto.deduction_result as (
  transaction_id text,
  user_id text,
  amount bigint,
  balance_after bigint,
  idempotent boolean,
  error text,
  cost numeric,
  allowance_used bigint,
  shortfall bigint,
  warnings text[],
  revision bigint
);

create type ducto.refund_result as (
  refund_transaction_id text,
  original_transaction_id text,
  user_id text,
  amount bigint,
  new_balance bigint,
  error text,
  allowance_restored bigint,
  allowance_lapsed bigint,
  idempotent boolean,
  revision bigint
);

create type ducto.transaction as (
  transaction_id text,
  account_id text,
  seq bigint,
  type text,
  amount bigint,
  balance_after bigint,
  allowance_used bigint,
  allowance_lapsed bigint,
  cost numeric,
  carry_after numeric,
  rounding text,
  actor_id text,
  model text,
  resolved_model text,
  usage jsonb,
  pricing_version integer,
  plan_id text,
  reservation_id text,
  refers_to text,
  idempotency_key text,
  paid_amount numeric,
  paid_currency text,
  reference text,
  expires_at timestamptz,
  reason text,
  metadata jsonb,
  created_at timestamptz,
  error text
);

create type ducto.reservation as (
  reservation_id text,
  account_id text,
  actor_id text,
  status text,
  amount bigint,
  charged bigint,
  operation_type text,
  model text,
  metrics jsonb,
  pricing_version integer,
  plan_id text,
  idempotency_key text,
  metadata jsonb,
  created_at timestamptz,
  expires_at timestamptz,
  ended_at timestamptz,
  error text
);

create type ducto.explanation as (
  transaction_id text,
  account_id text,
  cost numeric,
  carry_before numeric,
  carry_after numeric,
  rounding text,
  usage jsonb,
  pricing_version integer,
  plan_id text,
  resolved_model text,
  formulas jsonb,
  parts jsonb,
  error text
);

create type ducto.violation as (
  account_id text,
  invariant text,
  expected text,
  actual text,
  detail text
);

comment on type ducto.cost_breakdown is 'The exact price of a usage, in credits, by part.';
comment on type ducto.pricing_config_result is 'A published pricing version; nulls where none is active.';
comment on type ducto.pricing_config_history_item is 'A published pricing version, in short.';
comment on type ducto.balance_result is 'An account''s credits: balance, what holds claim of it, and the largest hold admitted now.';
comment on type ducto.add_credits_result is 'Credits added or, with a negative amount, taken back.';
comment on type ducto.reserve_result is 'A hold: amount is what it holds after the call, reserved_total what all holds of the account do.';
comment on type ducto.deduction_result is 'A charge: amount is minus the credits debited from the balance; charged = -amount + allowance_used.';
comment on type ducto.refund_result is 'A refund: amount + allowance_restored + allowance_lapsed = credits refunded.';
comment on type ducto.transaction is 'A row of the ledger; amount is the signed change of the balance.';
comment on type ducto.reservation is 'A hold; amount is what it holds now.';
comment on type ducto.explanation is 'How a charge came to its cost: usage, formulas, parts, and the carried fraction before and after.';
comment on type ducto.violation is 'An invariant of the ledger that does not hold.';

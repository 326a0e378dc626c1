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
  error text,
  occurred_at timestamptz,
  price_error text,
  warnings text[]
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
  error text,
  amount bigint,
  allowance_used bigint
);

create type ducto.violation as (
  account_id text,
  invariant text,
  expected text,
  actual text,
  detail text,
  error text
);

create type ducto.set_user_plan_result as (
  user_id text,
  plan_id text,
  error text,
  revision bigint
);

create type ducto.get_user_plan_result as (
  user_id text,
  plan_id text,
  plan_name text,
  free_allowance bigint,
  features jsonb,
  allowance_remaining bigint,
  period_start timestamptz,
  period_end timestamptz,
  error text,
  revision bigint
);

create type ducto.check_feature_result as (
  user_id text,
  feature text,
  value jsonb,
  has_feature boolean,
  error text,
  revision bigint
);

create type ducto.allowance_result as (
  plan_id text,
  allowance_remaining bigint,
  period_start timestamptz,
  period_end timestamptz,
  error text,
  revision bigint
);

create type ducto.spend_cap as (
  user_id text,
  cap_type text,
  model text,
  "limit" bigint,
  action text,
  error text,
  revision bigint,
  spent bigint,
  resets_at timestamptz
);

create type ducto.cap_check_result as (
  capped boolean,
  current_spend bigint,
  cap_limit bigint,
  action text,
  model text,
  error text,
  revision bigint
);

create type ducto.create_team_result as (
  team_id text,
  name text,
  idempotent boolean,
  error text,
  revision bigint
);

create type ducto.team as (
  team_id text,
  name text,
  balance bigint,
  member_count bigint,
  created_at timestamptz,
  error text,
  revision bigint
);

create type ducto.team_balance_result as (
  team_id text,
  name text,
  balance bigint,
  member_count bigint,
  error text,
  revision bigint
);

create type ducto.add_team_member_result as (
  team_id text,
  user_id text,
  role text,
  error text,
  revision bigint
);

create type ducto.team_member as (
  user_id text,
  role text,
  spend_cap bigint,
  total_spent bigint,
  spend_cap_period text,
  error text,
  spent bigint
);

create type ducto.team_deduction_result as (
  transaction_id text,
  team_id text,
  user_id text,
  amount bigint,
  team_balance_after bigint,
  idempotent boolean,
  error text,
  cost numeric,
  allowance_used bigint,
  shortfall bigint,
  warnings text[],
  revision bigint
);

create type ducto.sweep_result as (
  expired_count bigint,
  expired_amount bigint,
  dry_run boolean,
  error text
);

create type ducto.event as (
  event_id text,
  type text,
  account_id text,
  payload jsonb,
  attempts integer,
  created_at timestamptz,
  error text
);

create type ducto.spend_by_user_row as (
  user_id text,
  total_spend bigint,
  transaction_count bigint,
  allowance_used bigint,
  refunded bigint,
  cost numeric,
  error text
);

create type ducto.spend_margin as (
  model text,
  transaction_count bigint,
  total_spend bigint,
  provider_cost numeric,
  uncosted bigint,
  error text
);

create type ducto.spend_by_model_row as (
  model text,
  total_spend bigint,
  transaction_count bigint,
  allowance_used bigint,
  refunded bigint,
  cost numeric,
  error text
);

create type ducto.daily_spend_row as (
  date date,
  total_spend bigint,
  transaction_count bigint,
  allowance_used bigint,
  refunded bigint,
  cost numeric,
  error text
);

create type ducto.top_user_row as (
  user_id text,
  total_spend bigint,
  allowance_used bigint,
  refunded bigint,
  cost numeric,
  error text
);

create type ducto.aggregate_stats_row as (
  total_credits_consumed bigint,
  active_users bigint,
  avg_daily_spend bigint,
  top_model text,
  top_user text,
  allowance_used bigint,
  refunded bigint,
  cost numeric,
  error text
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
comment on type ducto.set_user_plan_result is 'The plan that an account is on from now; null where it was taken away.';
comment on type ducto.get_user_plan_result is 'An account''s plan, at its present terms, and what is left of its allowance.';
comment on type ducto.check_feature_result is 'A feature of an account''s plan: its value, and whether that counts as having it.';
comment on type ducto.allowance_result is 'What is left of a plan''s allowance, and the period to which it belongs.';
comment on type ducto.spend_cap is
  'A bound on the credits debited from a balance in a local day or month, for all models or one; spent is net of refunds, resets_at the end of the window.';
comment on type ducto.cap_check_result is 'The cap that an amount would exceed; zeros where none.';
comment on type ducto.create_team_result is 'A team: an account with members.';
comment on type ducto.team is 'A team, its pool and the number of its present members.';
comment on type ducto.team_balance_result is 'A team''s pool.';
comment on type ducto.add_team_member_result is 'A member of a team as added, changed or removed.';
comment on type ducto.team_member is
  'A present member of a team; spent is that of spend_cap_period, total_spent that of the whole life, both net of refunds.';
comment on type ducto.team_deduction_result is 'A charge on a team''s pool: user_id is the member, balances are the pool''s.';
comment on type ducto.sweep_result is 'How many lots expired, or would expire, and how many credits.';
comment on type ducto.event is 'Something that happened to an account, until it is acknowledged.';
comment on type ducto.spend_by_user_row is 'What a user or member spent: credits debited, gross of refunds.';
comment on type ducto.spend_margin is 'What was charged for a model, and what the provider took for it.';
comment on type ducto.spend_by_model_row is 'What was spent on a model, gross of refunds.';
comment on type ducto.daily_spend_row is 'What was spent on a local day, gross of refunds.';
comment on type ducto.top_user_row is 'A user or member among those who spent most.';
comment on type ducto.aggregate_stats_row is 'What was spent in all, by whom and on what most.';

-- ---------------------------------------------------------------------------------------------------------------------
-- What spend() is asked and answers: holds, extensions, charges and settlements

create type ducto_private.request as (
  action text,
  call text,
  member_id text,
  usage jsonb,
  job text,
  amount numeric,
  model text,
  hold_id text,
  final boolean,
  key text,
  metadata jsonb,
  operation_type text,
  min_balance bigint,
  ttl_seconds integer,
  occurred_at timestamptz,
  batched boolean,
  error text
);
comment on type ducto_private.request is
  'action: hold, extend or charge (with hold_id: a settlement of it); call: the name of the RPC; batched: an element of deduct_batch; error: why that is malformed.';

create type ducto_private.answers as (
  charges ducto.deduction_result[],
  holds ducto.reserve_result[]
);

-- What check_caps() finds: the caps that an amount meets, those that it would exceed and the room that it would leave each
-- of them, whether one denies it, whether an event is to be written, and whether a cap's row is of an earlier window.
create type ducto_private.caps_check as (
  caps ducto_private.spend_caps[],
  exceeded ducto_private.spend_caps[],
  room numeric[],
  denied boolean,
  has_event boolean,
  moved boolean
);

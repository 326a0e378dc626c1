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
  error text,
  warnings text[]
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
  error text,
  idempotent boolean
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
  warnings text[],
  labels text[]
);

create type ducto.statement as (
  user_id text,
  period_start timestamptz,
  period_end timestamptz,
  opening_balance bigint,
  granted bigint,
  purchased bigint,
  charged bigint,
  allowance_used bigint,
  refunded bigint,
  removed bigint,
  expired bigint,
  closing_balance bigint,
  error text,
  revision bigint
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
  error text,
  labels text[]
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
  revision bigint,
  idempotent boolean,
  warnings text[],
  next_plan_id text,
  next_plan_at timestamptz
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
  revision bigint,
  next_plan_id text,
  next_plan_at timestamptz
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
  resets_at timestamptz,
  label text
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
  error text,
  account_count bigint
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

create type ducto.auto_topup as (
  user_id text,
  threshold bigint,
  amount bigint,
  max_per_month integer,
  status text,
  due_key text,
  this_month integer,
  error text,
  revision bigint
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

create type ducto.spend_by_label_row as (
  label text,
  total_spend bigint,
  transaction_count bigint,
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
comment on column ducto.cost_breakdown.model_credits is 'by the model''s formula, at least 0';
comment on column ducto.cost_breakdown.tool_credits is 'by the tools'' formulas, at least 0';
comment on column ducto.cost_breakdown.search_credits is 'by search.costs, at least 0';
comment on column ducto.cost_breakdown.cache_savings is 'by cache.discount, usually negative';
comment on column ducto.cost_breakdown.fixed_credits is 'of fixed_job';
comment on column ducto.cost_breakdown.total is 'the cost: the sum of these, at least 0, exact';
comment on column ducto.cost_breakdown.breakdown is 'of the usage: model, input_tokens, output_tokens, tool_count';
comment on type ducto.pricing_config_result is 'A published pricing version; nulls where none is active.';
comment on column ducto.pricing_config_result.config is 'as published, defaults left out';
comment on type ducto.pricing_config_history_item is 'A published pricing version, in short.';
comment on column ducto.pricing_config_history_item.active is 'whether it prices now';
comment on type ducto.balance_result is 'What an account has.';
comment on column ducto.balance_result.balance is 'holds not taken off; negative is a debt';
comment on column ducto.balance_result.reserved is 'what active holds claim';
comment on column ducto.balance_result.available is
  'the largest hold admitted now, as far as the balance goes: caps may admit less';
comment on column ducto.balance_result.credit_limit is 'how far below zero the account may go';
comment on column ducto.balance_result.idempotent is 'of a merge: whether this is the first answer again; else null';
comment on type ducto.add_credits_result is 'Credits added or, with a negative amount, taken back.';
comment on column ducto.add_credits_result.amount is 'added; negative: taken back';
comment on type ducto.reserve_result is 'A hold as the call leaves it.';
comment on column ducto.reserve_result.amount is 'held by this hold after the call';
comment on column ducto.reserve_result.balance is 'of the account';
comment on column ducto.reserve_result.reserved_total is 'held by all active holds of the account after the call';
comment on column ducto.reserve_result.idempotent is
  'whether this is the first answer again; the hold may have ended since';
comment on type ducto.deduction_result is 'A charge.';
comment on column ducto.deduction_result.amount is 'minus the credits debited; charged = -amount + allowance_used';
comment on type ducto.refund_result is 'A refund: refunded = amount + allowance_restored + allowance_lapsed.';
comment on column ducto.refund_result.refund_transaction_id is 'of the row that was written';
comment on column ducto.refund_result.original_transaction_id is 'the charge';
comment on column ducto.refund_result.amount is 'back in the balance';
comment on column ducto.refund_result.allowance_restored is 'back in this month''s allowance';
comment on column ducto.refund_result.allowance_lapsed is 'of a month that is over';
comment on type ducto.transaction is 'A row of the ledger.';
comment on column ducto.transaction.transaction_id is 'a time-ordered UUID';
comment on column ducto.transaction.seq is '1, 2, 3, … of the account, without gaps';
comment on column ducto.transaction.type is
  '''purchase'', ''subscription'', ''signup_bonus'', ''promotion'', ''adjustment'', ''usage'', ''refund'', ''removal'' or ''expiry''';
comment on column ducto.transaction.amount is
  'signed change of the balance; their sum is the balance, but for credits that are due and not yet written off';
comment on column ducto.transaction.allowance_used is 'of the plan; negative where a refund restored it';
comment on column ducto.transaction.allowance_lapsed is 'what a refund could not restore';
comment on column ducto.transaction.reservation_id is 'the hold that it settled';
comment on column ducto.transaction.refers_to is 'the charge refunded, or the grant removed or expired';
comment on column ducto.transaction.price_error is 'why a settlement''s usage, or a part of it, has no price';
comment on column ducto.transaction.warnings is 'as in the answer of the charge';
comment on column ducto.transaction.labels is 'of a charge as given, of a settlement its hold''s too, of a refund its charge''s';
comment on column ducto.transaction.paid_amount is 'as given';
comment on column ducto.transaction.paid_currency is 'as given';
comment on column ducto.transaction.reference is 'as given';
comment on column ducto.transaction.expires_at is 'of credits that expire';
comment on column ducto.transaction.reason is 'as given';
comment on column ducto.transaction.created_at is 'never earlier than the row before';
comment on column ducto.transaction.occurred_at is
  'of an expiry: when the credits were due, or the hold ended that had kept them';
comment on type ducto.statement is
  'What became of an account''s credits in a window: opening_balance + granted + purchased - charged + refunded - '
  'removed - expired = closing_balance.';
comment on column ducto.statement.period_start is 'as asked; null where that end is open';
comment on column ducto.statement.period_end is 'as asked; null where that end is open';
comment on column ducto.statement.opening_balance is 'just before period_start, without what was due by then';
comment on column ducto.statement.granted is 'all credits added but purchases: the signup bonus, a team''s first balance';
comment on column ducto.statement.purchased is 'credits added as ''purchase''';
comment on column ducto.statement.charged is 'by charges, of the balance, gross of refunds';
comment on column ducto.statement.allowance_used is 'by charges, of the plan, gross of refunds';
comment on column ducto.statement.refunded is 'back in the balance';
comment on column ducto.statement.removed is 'by remove_credits';
comment on column ducto.statement.expired is 'what was due in the window, whenever that was recorded, if it is yet';
comment on column ducto.statement.closing_balance is 'just before period_end, or now';
comment on type ducto.reservation is 'A hold.';
comment on column ducto.reservation.reservation_id is 'a time-ordered UUID';
comment on column ducto.reservation.status is '''active'', ''expired'', ''settled'' or ''released''';
comment on column ducto.reservation.amount is 'held now';
comment on column ducto.reservation.charged is 'charged against it so far';
comment on column ducto.reservation.labels is 'as given';
comment on column ducto.reservation.metrics is 'the estimate, as given';
comment on column ducto.reservation.pricing_version is 'at which it is settled';
comment on column ducto.reservation.plan_id is 'at which it is settled';
comment on column ducto.reservation.ended_at is 'when it ended';
comment on type ducto.explanation is
  'How a charge came to its cost: usage, formulas, parts, and the carried fraction before and after.';
comment on column ducto.explanation.carry_before is 'the fraction carried from the row before';
comment on column ducto.explanation.formulas is
  'those of the version that had a say, by ''model'', ''tools'', ''search'', ''cache'' and ''fixed''';
comment on column ducto.explanation.parts is
  'model_credits, tool_credits, search_credits, cache_savings, fixed_credits';
comment on column ducto.explanation.amount is 'minus the credits debited';
comment on type ducto.violation is 'An invariant of the ledger that does not hold.';
comment on column ducto.violation.invariant is 'the rule, in words';
comment on column ducto.violation.expected is 'what it should be';
comment on column ducto.violation.actual is 'what it is';
comment on column ducto.violation.detail is 'where, usually a transaction''s id';
comment on type ducto.set_user_plan_result is 'The plan that an account is on from now; null where it was taken away.';
comment on type ducto.get_user_plan_result is 'An account''s plan, at its present terms, and what is left of its allowance.';
comment on column ducto.get_user_plan_result.plan_name is 'as configured';
comment on column ducto.get_user_plan_result.free_allowance is 'credits in each period';
comment on column ducto.get_user_plan_result.features is 'as configured';
comment on type ducto.check_feature_result is
  'A feature of an account''s plan: its value, and whether that counts as having it.';
comment on column ducto.check_feature_result.feature is 'as asked';
comment on column ducto.check_feature_result.value is 'as configured; null where absent';
comment on column ducto.check_feature_result.has_feature is 'whether it counts';
comment on type ducto.allowance_result is 'What is left of a plan''s allowance, and the period to which it belongs.';
comment on type ducto.spend_cap is
  'A bound on the credits debited from a balance in a window of time, net of refunds: all of them, or those for a model or a label.';
comment on column ducto.spend_cap.cap_type is '''daily'', ''weekly'', ''monthly'' or ''lifetime''';
comment on column ducto.spend_cap.model is 'null for all models';
comment on column ducto.spend_cap.label is 'null whatever the labels';
comment on column ducto.spend_cap."limit" is 'credits';
comment on column ducto.spend_cap.action is '''deny'', ''warn'' or ''notify''';
comment on column ducto.spend_cap.spent is 'credits that count against it now';
comment on column ducto.spend_cap.resets_at is 'when the next window begins; null of a lifetime';
comment on type ducto.cap_check_result is 'The cap that an amount would exceed; zeros where none.';
comment on column ducto.cap_check_result.capped is 'whether it would be refused';
comment on column ducto.cap_check_result.current_spend is 'of the cap, in its window';
comment on column ducto.cap_check_result.cap_limit is 'of the cap';
comment on column ducto.cap_check_result.action is 'of the cap';
comment on column ducto.cap_check_result.model is 'of the cap';
comment on type ducto.create_team_result is 'A team: an account with members.';
comment on type ducto.team is 'A team, its pool and the number of its present members.';
comment on column ducto.team.balance is 'of the pool';
comment on type ducto.team_balance_result is 'A team''s pool.';
comment on column ducto.team_balance_result.balance is 'of the pool';
comment on type ducto.add_team_member_result is 'A member of a team as added, changed or removed.';
comment on column ducto.add_team_member_result.user_id is 'the member';
comment on type ducto.team_member is 'A present member of a team.';
comment on column ducto.team_member.user_id is 'the member';
comment on column ducto.team_member.spend_cap is 'credits; null for no bound';
comment on column ducto.team_member.total_spent is 'credits debited for the member in all, net of refunds';
comment on column ducto.team_member.spend_cap_period is '''lifetime'', ''daily'', ''weekly'' or ''monthly''';
comment on column ducto.team_member.spent is 'credits that count against spend_cap now';
comment on type ducto.team_deduction_result is 'A charge on a team''s pool.';
comment on column ducto.team_deduction_result.user_id is 'the member';
comment on column ducto.team_deduction_result.amount is 'minus the credits debited; charged = -amount + allowance_used';
comment on type ducto.sweep_result is 'How many lots expired, or would expire, and how many credits.';
comment on column ducto.sweep_result.expired_count is 'lots';
comment on column ducto.sweep_result.expired_amount is 'credits';
comment on column ducto.sweep_result.dry_run is 'whether nothing was written';
comment on column ducto.sweep_result.account_count is 'accounts of which anything was due';
comment on type ducto.auto_topup is 'When an account is to be topped up, and how that stands.';
comment on column ducto.auto_topup.threshold is 'credits: due when less is available';
comment on column ducto.auto_topup.amount is 'credits to add';
comment on column ducto.auto_topup.max_per_month is 'top-ups in a local month';
comment on column ducto.auto_topup.status is
  '''ready'', ''due'' (one is open), ''waiting'' (after one that failed) or ''exhausted'' (no more in this month)';
comment on column ducto.auto_topup.due_key is 'of the open one: the idempotency key of the add_credits that ends it';
comment on column ducto.auto_topup.this_month is 'top-ups that opened in this month, without those that failed';
comment on type ducto.event is 'Something that happened to an account, until it is acknowledged.';
comment on column ducto.event.event_id is 'by which it is acknowledged';
comment on column ducto.event.type is 'what happened';
comment on column ducto.event.payload is 'the particulars';
comment on column ducto.event.attempts is 'how often its consumer fetched it, this time included';
comment on column ducto.event.created_at is 'when it happened';
comment on type ducto.spend_by_user_row is 'What a user or member spent: credits debited, gross of refunds.';
comment on column ducto.spend_by_user_row.user_id is 'the user or member';
comment on type ducto.spend_margin is 'What was charged for a model, and what the provider took for it.';
comment on type ducto.spend_by_model_row is 'What was spent on a model, gross of refunds.';
comment on column ducto.spend_by_model_row.model is 'the resolved one, else as given, else ''''';
comment on type ducto.spend_by_label_row is 'What was spent by charges that carry a label, gross of refunds.';
comment on type ducto.daily_spend_row is 'What was spent on a local day, gross of refunds.';
comment on column ducto.daily_spend_row.date is 'local day';
comment on type ducto.top_user_row is 'A user or member among those who spent most.';
comment on column ducto.top_user_row.user_id is 'the user or member';
comment on type ducto.aggregate_stats_row is 'What was spent in all, by whom and on what most.';
comment on column ducto.aggregate_stats_row.total_credits_consumed is 'credits debited from balances, gross of refunds';
comment on column ducto.aggregate_stats_row.active_users is 'users and members with a charge';
comment on column ducto.aggregate_stats_row.avg_daily_spend is 'over the days with a charge, rounded down';
comment on column ducto.aggregate_stats_row.top_model is 'by credits debited';
comment on column ducto.aggregate_stats_row.top_user is 'by credits debited';

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
  error text,
  labels text[],
  overrun text
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

comment on column ducto.spend_margin.provider_cost is 'in the money of the price list';
comment on column ducto.spend_margin.uncosted is 'charges of which the provider''s cost is unknown';

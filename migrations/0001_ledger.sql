-- The memory of ducto_pg: every table, and the types that its functions exchange.
--
-- An account is one row, locked by whoever changes anything of it. What happened to it is the append-only
-- ledger `transactions`, ordered by the account's own sequence. A hold claims credits without moving them; the RPCs and
-- their answers call it a reservation, and a team's member who charges the pool the actor. Everything about one account
-- carries the account's id, in every key, so that the tables can be distributed by account. Foreign keys to accounts are
-- left out where a charge would pay for them: every writer holds the account's row lock, accounts are never deleted, and
-- verify_ledger() looks for orphans.

comment on schema ducto is 'Credit billing: the RPCs and the types of their answers. No tables.';
comment on schema ducto_private is 'Credit billing: tables, helpers and compiled prices. Never granted, never exposed.';
comment on schema ducto_read is 'Credit billing: read-only views for joins with one''s own tables.';

-- ---------------------------------------------------------------------------------------------------------------------
-- Pricing

create table ducto_private.pricing_versions (
  version integer primary key check (version > 0),
  id uuid not null unique default gen_random_uuid(),
  label text check (char_length(label) <= 255),
  config jsonb not null,
  config_hash bigint not null,
  created_at timestamptz not null,
  created_by text not null
);
create index pricing_versions_config_hash on ducto_private.pricing_versions (config_hash);
comment on table ducto_private.pricing_versions is 'Published configs. They never change.';

-- A formula is compiled once for ever: its numbers are arguments (rates), so that thousands of prices share a few of them.
create table ducto_private.formulas (
  formula_id bigint primary key,
  body text not null
);
comment on table ducto_private.formulas is
  'The bodies of the functions formula_<id in hexadecimal>(usage, rates); formula_id is the first 8 bytes of the sha256 of the body.';

create table ducto_private.prices (
  version integer not null references ducto_private.pricing_versions,
  section text collate "C" not null,
  key text collate "C" not null,
  formula_id bigint references ducto_private.formulas,
  composed_id bigint references ducto_private.formulas,
  rates numeric[] not null,
  composed_rates numeric[],
  prefixes text[] collate "C",
  covers text[],
  primary key (version, section, key)
);
create index prices_formula on ducto_private.prices (formula_id);
create index prices_composed on ducto_private.prices (composed_id);
comment on table ducto_private.prices is
  'One row for each formula (or fixed job) of a config: a formula and its rates. section and key are its path in the config.';
comment on column ducto_private.prices.composed_id is
  'Of a model: one formula for the model, search and cache together, for a usage without priced tools and jobs; null where it could divide by zero. It gives null where a part is below zero.';
comment on column ducto_private.prices.covers is 'The counts that the formula charges: those that it names, with their parts.';
comment on column ducto_private.prices.prefixes is
  'The shorter keys of the section with which this key begins, the longest first, without _default.';

create table ducto_private.terms (
  version integer not null references ducto_private.pricing_versions,
  min_balance bigint not null,
  low_balance bigint not null,
  signup_bonus bigint not null,
  free_allowance bigint not null,
  own_version integer not null references ducto_private.pricing_versions,
  plan_id text collate "C" not null,
  rounding text not null,
  overrun text not null,
  timezone text not null,
  factor numeric not null,
  plan_factor numeric not null,
  period text not null,
  anchored boolean not null,
  rollover bigint not null,
  metrics text[] not null,
  covers text[] not null,
  match text not null,
  aliases jsonb,
  unpriced text not null,
  cached text not null,
  misfits jsonpath not null,
  overrides text collate "C",
  default_plan text collate "C",
  plan_name text,
  features jsonb not null,
  signup_bonus_days integer,
  plan_low_balance bigint,
  primary key (plan_id, version)
);
create index terms_version on ducto_private.terms (version);
create index terms_own_version on ducto_private.terms (own_version);
comment on table ducto_private.terms is
  'What a charge needs of a version besides prices, for accounts on a plan ('''' for none). Where the version lacks the plan, own_version is the one that has it.';
comment on column ducto_private.terms.factor is 'Credits for one unit of what the formulas give: the config''s factor times plan_factor.';
comment on column ducto_private.terms.anchored is 'Whether periods begin at the account''s anchor; else they are the calendar''s.';
comment on column ducto_private.terms.low_balance is 'plan_low_balance, else the config''s.';
comment on column ducto_private.terms.metrics is 'The usage fields that the config adds to known_fields().';
comment on column ducto_private.terms.covers is 'The usage fields that a composed price charges beside the model''s own: of search and cache, and what is free.';
comment on column ducto_private.terms.signup_bonus_days is 'After how many days of 24 hours the bonus expires; null for never.';
comment on column ducto_private.terms.misfits is 'Finds a usage in which a part is above its whole.';
comment on column ducto_private.terms.overrides is 'The section of the plan''s own prices in own_version; null where it has none.';

-- Of the activations whose time has come the one recorded last is active. So each ends at the earliest start of those recorded
-- after it. An immediate activation starts at -infinity, and thereby ends all that were recorded before, scheduled ones too.
create table ducto_private.activations (
  activation_id integer primary key,
  version integer not null references ducto_private.pricing_versions,
  from_version integer references ducto_private.pricing_versions,
  starts_at timestamptz not null,
  ends_at timestamptz not null default 'infinity',
  recorded_at timestamptz not null,
  withdrawn_at timestamptz,
  recorded_by text not null,
  role_set text not null
);
create index activations_ends_at on ducto_private.activations (ends_at);
create index activations_version on ducto_private.activations (version);
create index activations_from_version on ducto_private.activations (from_version);
comment on table ducto_private.activations is 'Which version prices when, who said so, and when.';
comment on column ducto_private.activations.starts_at is '-infinity for an immediate activation, which is active from its commit on.';
comment on column ducto_private.activations.ends_at is
  'It is active from starts_at until before this, and never where this is no later; -infinity once it was taken back.';

-- A count that cannot be above another, of which it is a part.
create type ducto_private.part_limit as (
  part text,
  whole text
);

-- The exact price of a usage, by part.
create type ducto_private.quote as (
  version integer,
  plan_id text,
  resolved_model text,
  model_credits numeric,
  tool_credits numeric,
  search_credits numeric,
  cache_savings numeric,
  fixed_credits numeric,
  cost numeric,
  warnings text[],
  price_error text
);

-- ---------------------------------------------------------------------------------------------------------------------
-- Accounts and their ledger

-- Accounts, transactions, holds and caps carry no CHECK: PostgreSQL parses each one again in every statement that writes a row,
-- which cost a charge a fifth of its time. verify_ledger() looks in their place.
create table ducto_private.accounts (
  balance bigint not null,
  held bigint not null,
  credit_limit bigint not null,
  lifetime_purchased bigint not null,
  seq bigint not null,
  revision bigint not null,
  allowance_used bigint not null,
  opened_at timestamptz not null,
  changed_at timestamptz not null,
  allowance_start timestamptz,
  allowance_end timestamptz,
  holds_due_at timestamptz,
  lots_due_at timestamptz,
  holds integer not null,
  lots integer not null,
  caps integer not null,
  account_id text collate "C" primary key,
  kind text not null,
  carry numeric not null,
  plan_id text collate "C",
  rolled bigint not null,
  plan_due_at timestamptz,
  anchor timestamptz,
  anchor_until timestamptz,
  frozen boolean not null default false,
  auto_topup boolean not null default false,
  low_balance bigint,
  refused bigint,
  allowance_told integer,
  allowance_told_of timestamptz
) with (fillfactor = 60);

comment on column ducto_private.accounts.kind is 'user or team.';
comment on column ducto_private.accounts.auto_topup is 'Whether it has a row in auto_topups.';
comment on column ducto_private.accounts.low_balance is 'Its own in place of the terms''; null for none.';
comment on column ducto_private.accounts.refused is
  'How much must be available for what was refused for funds; null once that was, or any other call had enough.';
comment on column ducto_private.accounts.allowance_told is
  'The percent of the allowance of which an event told last that they are used, in the period that began at allowance_told_of.';
comment on column ducto_private.accounts.carry is 'The fraction of a credit not yet charged: 0 <= carry < 1.';
comment on column ducto_private.accounts.held is
  'What its active holds hold, of which holds is the number; counts those too that have expired unrecorded.';
comment on column ducto_private.accounts.holds_due_at is 'No open hold expires before this; not always the exact minimum.';
comment on column ducto_private.accounts.rolled is 'Credits of the allowance that ended periods handed on to the present one.';
comment on column ducto_private.accounts.plan_due_at is 'When the next of its plan_schedules takes place.';
comment on column ducto_private.accounts.anchor is 'Where the periods of a plan with anchor: start begin.';
comment on column ducto_private.accounts.anchor_until is 'The end of the last period that began by the anchor.';
comment on column ducto_private.accounts.lots_due_at is
  'No lot expires before this. A call that ends a hold sets it to its own time, because due lots may have kept credits for that hold.';

-- The columns that a charge fills. Each costs every charge some time, so what few rows have stands in
-- transaction_details; the view ducto_private.ledger shows both as one.
create table ducto_private.transactions (
  transaction_id uuid not null,
  seq bigint not null,
  amount bigint not null,
  balance_after bigint not null,
  allowance_used bigint not null,
  revision bigint not null,
  created_at timestamptz not null,
  fingerprint bigint,
  pricing_version integer,
  account_id text collate "C" not null,
  type text not null,
  carry_after numeric not null,
  cost numeric,
  usage jsonb,
  model text,
  resolved_model text,
  plan_id text,
  member_id text collate "C",
  hold_id uuid,
  idempotency_key text collate "C",
  metadata jsonb,
  labels text[] collate "C",
  primary key (transaction_id, account_id),
  unique (account_id, seq)
);
-- A hash of the key in place of the key keeps the index at half its size. Whoever looks a key up compares it too, under the
-- account's lock; so the index need not be unique, and two keys of one hash are no error.
create index transactions_key on ducto_private.transactions (account_id, hashtextextended(idempotency_key, 0))
  where idempotency_key is not null;
create index transactions_created_at on ducto_private.transactions using brin (created_at);

comment on column ducto_private.transactions.usage is 'As given, without nulls and without the model, which has its own column.';
comment on column ducto_private.transactions.labels is
  'Sorted, without duplicates; null for none. A settlement has those of its hold and its own, a refund those of its charge.';
comment on column ducto_private.transactions.fingerprint is
  'Hash of the request; null where it can be computed from the row, as for most charges.';

create table ducto_private.transaction_details (
  transaction_id uuid not null,
  account_id text collate "C" not null,
  seq bigint not null,
  refers_to uuid,
  allowance_lapsed bigint not null check (allowance_lapsed >= 0),
  shortfall bigint not null check (shortfall >= 0),
  lifetime_purchased bigint check (lifetime_purchased >= 0),
  warnings text[],
  expires_at timestamptz,
  occurred_at timestamptz,
  rounding text,
  price_error text,
  paid_amount numeric,
  paid_currency text,
  reference text,
  reason text,
  bounded_cost numeric,
  primary key (transaction_id, account_id),
  foreign key (transaction_id, account_id) references ducto_private.transactions
);
create index transaction_details_refers_to on ducto_private.transaction_details (account_id, refers_to) where refers_to is not null;
create index transaction_details_occurred_at on ducto_private.transaction_details (account_id, occurred_at) where occurred_at is not null;
create index transaction_details_price_error on ducto_private.transaction_details (account_id, seq) where price_error is not null;
create index transaction_details_lifetime on ducto_private.transaction_details (account_id, seq) where lifetime_purchased is not null;

comment on column ducto_private.transaction_details.paid_amount is 'Of a removal the money given back, negative.';
comment on column ducto_private.transaction_details.expires_at is
  'Of a grant, when its lot expires: infinity where it only keeps one. Of an expiry, that of the lot.';
comment on column ducto_private.transaction_details.occurred_at is
  'Of an expiry: when the credits were due, or when the hold ended for which they had been kept.';
comment on column ducto_private.transaction_details.bounded_cost is
  'What a bounded hold let its last settlement charge of the cost; null where that is the cost.';
comment on column ducto_private.transaction_details.lifetime_purchased is
  'The account''s lifetime_purchased after this row; null in expiries and in refunds of charges, which do not answer it.';

create view ducto_private.ledger as
select t.transaction_id, t.seq, t.amount, t.balance_after, t.allowance_used, t.revision, t.created_at, t.fingerprint,
  t.pricing_version, t.account_id, t.type, t.carry_after, t.cost,
  case when t.model is null then t.usage else t.usage || jsonb_build_object('model', t.model) end as usage, t.model, t.resolved_model, t.plan_id, t.member_id,
  t.hold_id, t.idempotency_key, t.metadata, d.refers_to, coalesce(d.allowance_lapsed, 0) as allowance_lapsed,
  coalesce(d.shortfall, 0) as shortfall, d.lifetime_purchased, d.warnings, d.expires_at, d.occurred_at, d.rounding, d.price_error, d.paid_amount, d.paid_currency,
  d.reference, d.reason, t.labels, d.bounded_cost
from ducto_private.transactions as t
left join ducto_private.transaction_details as d on d.transaction_id = t.transaction_id and d.account_id = t.account_id;

-- ---------------------------------------------------------------------------------------------------------------------
-- Holds

create table ducto_private.holds (
  hold_id uuid not null,
  account_id text collate "C" not null,
  member_id text collate "C",
  status text not null default 'active',
  held bigint not null,
  charged bigint not null default 0,
  created_at timestamptz not null,
  expires_at timestamptz not null,
  ended_at timestamptz,
  min_balance bigint,
  pricing_version integer not null,
  plan_id text,
  operation_type text not null,
  model text,
  resolved_model text,
  metrics jsonb,
  metadata jsonb,
  idempotency_key text collate "C",
  settled_by uuid,
  given numeric not null,
  cost numeric not null default 0,
  overrun text,
  labels text[] collate "C",
  primary key (hold_id, account_id)
) with (fillfactor = 80);
comment on column ducto_private.holds.held is 'What it holds; of one that has expired what it held last.';
comment on column ducto_private.holds.given is 'What it was given when it was taken, and by extensions.';
comment on column ducto_private.holds.cost is 'What was charged against it, before that was rounded to credits.';
comment on column ducto_private.holds.overrun is 'As given: debt, reject or bounded; null for that of its version.';
comment on column ducto_private.holds.labels is 'Sorted, without duplicates; null for none.';
create index holds_active on ducto_private.holds (account_id) where status = 'active';
create index holds_account on ducto_private.holds (account_id, created_at);

create table ducto_private.hold_keys (
  account_id text collate "C" not null,
  idempotency_key text collate "C" not null,
  fingerprint bigint not null,
  hold_id uuid,
  amount bigint,
  balance bigint,
  reserved_total bigint,
  revision bigint not null,
  expires_at timestamptz,
  warnings text[],
  plan_id text,
  next_plan_id text,
  next_plan_at timestamptz,
  primary key (account_id, idempotency_key)
);
comment on table ducto_private.hold_keys is 'The keys of holds, extensions and changes of plan, each with a hash of its request and the first answer.';

-- ---------------------------------------------------------------------------------------------------------------------
-- Expiring credits, caps, teams, events: an account has rows here only where it uses them

create table ducto_private.credit_lots (
  lot_id uuid not null,
  account_id text collate "C" not null,
  transaction_id uuid not null,
  amount bigint not null check (amount >= 0),
  remainder bigint not null check (remainder >= 0),
  expires_at timestamptz not null,
  created_at timestamptz not null,
  seq bigint not null,
  grant_id uuid not null,
  told boolean not null default false,
  primary key (lot_id, account_id),
  unique (account_id, grant_id)
) with (fillfactor = 80);
create index credit_lots_account on ducto_private.credit_lots (account_id, expires_at, seq, lot_id) where remainder > 0;
create index credit_lots_due on ducto_private.credit_lots (expires_at) where remainder > 0;
comment on column ducto_private.credit_lots.expires_at is 'infinity for a lot that is only kept, which no answer tells.';
comment on column ducto_private.credit_lots.transaction_id is 'The row of this account that gave amount, seq its number.';
comment on column ducto_private.credit_lots.grant_id is
  'The row that first gave its credits: transaction_id, or where a merge brought them here, a row of an account before.';

comment on column ducto_private.credit_lots.told is 'Whether an event told that it is about to expire.';

-- transaction_id is the grant's.
create type ducto_private.due_lot as (
  lot_id uuid,
  transaction_id uuid,
  expires_at timestamptz,
  seq bigint,
  remainder bigint,
  expired bigint,
  due_at timestamptz
);

-- What a row of the ledger took from a lot (negative) or gave back to it. A lot's remainder is its amount plus its entries.
create table ducto_private.lot_entries (
  transaction_id uuid not null,
  lot_id uuid not null,
  account_id text collate "C" not null,
  amount bigint not null,
  elsewhere bigint not null default 0,
  renewed bigint not null default 0 check (renewed between 0 and elsewhere),
  check (amount <> 0 or elsewhere > 0),
  primary key (transaction_id, lot_id, account_id),
  foreign key (lot_id, account_id) references ducto_private.credit_lots
);
comment on column ducto_private.lot_entries.elsewhere is
  'Of a refund: credits taken from this lot that could not return to it, because it was due or its grant had been taken back.';
comment on column ducto_private.lot_entries.renewed is
  'The part of elsewhere that went into the refund''s own new lot, because this one was due.';
create index lot_entries_lot on ducto_private.lot_entries (lot_id, account_id);

-- Each row of the ledger moves with the first merge of its account that comes after it: see ducto_private.homes().
create table ducto_private.merges (
  account_id text collate "C" not null,
  seq bigint not null,
  into_id text collate "C" not null,
  into_seq bigint not null,
  carry numeric not null,
  purchased bigint not null,
  reserved bigint not null,
  available bigint not null,
  credit_limit bigint not null,
  primary key (account_id, seq)
);
create index merges_into on ducto_private.merges (into_id, into_seq);
comment on table ducto_private.merges is
  'Merges: of account_id into into_id, by row seq of the one and row into_seq of the other. With what they moved beside the balance and the lots, and what the ledger does not keep of the answer.';

create table ducto_private.spend_caps (
  account_id text collate "C" not null,
  cap_type text not null,
  subject text collate "C" not null,
  cap_limit bigint not null,
  action text not null,
  spent numeric not null default 0,
  window_date date not null,
  warned_date date,
  primary key (account_id, subject, cap_type)
);
comment on column ducto_private.spend_caps.subject is
  'What it bounds: ''model '' and a name, ''label '' and a label, or '''' for everything. One column, so that a charge finds its caps by the index, however many there are.';
comment on column ducto_private.spend_caps.window_date is
  'First local date of the window in which spent was debited; -infinity of a lifetime.';
comment on column ducto_private.spend_caps.warned_date is 'The window_date of the last window for which a warning was sent as an event.';

-- Changes of plan to come, those of the account's last set_user_plan(). They take place by predicate, as expiry does.
create table ducto_private.plan_schedules (
  account_id text collate "C" primary key,
  next_plan_id text collate "C",
  next_at timestamptz,
  next_anchor timestamptz,
  until_at timestamptz,
  event_at timestamptz
);
comment on column ducto_private.plan_schedules.next_at is 'From then on the account is on next_plan_id (null: on none).';
comment on column ducto_private.plan_schedules.until_at is 'From then on it is on the config''s default_plan, or on none.';
comment on column ducto_private.plan_schedules.event_at is 'The latest p_event_at that was given; an older one changes nothing.';

create table ducto_private.teams (
  account_id text collate "C" primary key,
  name text not null check (char_length(name) between 1 and 255),
  idempotency_key text collate "C",
  fingerprint bigint
);

create table ducto_private.team_members (
  account_id text collate "C" not null,
  user_id text collate "C" not null check (char_length(user_id) between 1 and 255),
  role text not null default 'member',
  spend_cap bigint check (spend_cap >= 0),
  spend_cap_period text not null default 'lifetime' check (spend_cap_period in ('lifetime', 'daily', 'weekly', 'monthly')),
  spent numeric not null default 0 check (spent >= 0),
  window_date date,
  total_spent numeric not null default 0 check (total_spent >= 0),
  joined_at timestamptz not null,
  left_at timestamptz,
  primary key (account_id, user_id)
);
create index team_members_user on ducto_private.team_members (user_id);

create table ducto_private.events (
  event_id uuid not null,
  account_id text collate "C" not null,
  type text not null check (type in ('account_opened', 'plan_changed', 'low_balance', 'cap_warned', 'cap_reached',
    'lot_expired', 'debt_begun', 'settlement_unpriced', 'topup_due', 'refused', 'allowance_used', 'hold_expired',
    'member_cap_reached', 'credits_expiring')),
  payload jsonb not null,
  created_at timestamptz not null,
  primary key (event_id, account_id)
);
comment on table ducto_private.events is
  'The outbox: an event stays until all consumers have acknowledged it, 30 days at most.';

create table ducto_private.consumers (
  consumer text collate "C" primary key,
  fetched_at timestamptz not null
);
comment on table ducto_private.consumers is 'Who fetches events. One that did not for 30 days is forgotten.';
comment on column ducto_private.consumers.fetched_at is 'When it last fetched, to within a day.';

create table ducto_private.deliveries (
  consumer text collate "C" not null,
  event_id uuid not null,
  account_id text collate "C" not null,
  attempts integer not null,
  leased_until timestamptz not null,
  primary key (event_id, account_id, consumer)
) with (fillfactor = 80);
comment on table ducto_private.deliveries is 'Which events a consumer has fetched. Writing an event writes none of these.';
comment on column ducto_private.deliveries.leased_until is 'Until then it is not delivered to the consumer again: infinity once acknowledged.';

create table ducto_private.auto_topups (
  account_id text collate "C" primary key,
  threshold bigint not null check (threshold > 0),
  amount bigint not null check (amount > 0),
  max_per_month integer not null check (max_per_month > 0),
  active boolean not null default true,
  due_key text collate "C",
  retry_at timestamptz,
  month date,
  this_month integer not null default 0 check (this_month >= 0),
  look_at timestamptz,
  check (active or due_key is null)
);
create index auto_topups_look_at on ducto_private.auto_topups (look_at) where look_at is not null;
comment on table ducto_private.auto_topups is
  'When an account is to be topped up, and by how much. A removed one stays, not active, for what it counted.';
comment on column ducto_private.auto_topups.due_key is 'The key of the open top-up; null where none is open.';
comment on column ducto_private.auto_topups.retry_at is 'None opens before this, because one failed.';
comment on column ducto_private.auto_topups.this_month is 'How many opened in the month that begins on month, without those that failed.';
comment on column ducto_private.auto_topups.look_at is
  'When the sweep looks again: to announce an open one again, or to open one that had to wait. Null where only a call can change it.';

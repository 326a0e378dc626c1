-- Statistics that are already counted: sums by local day, and how far into each account's ledger they reach.

create table ducto_private.rollup_accounts (
  account_id text collate "C" primary key,
  seq bigint not null,
  changed_at timestamptz not null
);
comment on table ducto_private.rollup_accounts is 'What the rollups have counted of each account: its rows up to seq.';
comment on column ducto_private.rollup_accounts.changed_at is 'The account''s last change then: no later row is from before it.';

create table ducto_private.rollup_state (
  only_row boolean primary key default true check (only_row),
  counted bigint not null default 0,
  changed_at timestamptz
);
insert into ducto_private.rollup_state default values;
comment on table ducto_private.rollup_state is 'How far the rollups have come: one row, which whoever rolls up locks.';
comment on column ducto_private.rollup_state.counted is 'How many rows of the ledger the rollups have counted.';
comment on column ducto_private.rollup_state.changed_at is 'No row that was counted is later than this.';

-- Sums of one day may pass bigint where no account does.
create table ducto_private.rollups (
  kind text not null check (kind in ('user', 'model')),
  day date not null,
  name text collate "C" not null,
  spend numeric not null,
  charges bigint not null,
  allowance_used numeric not null,
  refunded numeric not null,
  cost numeric not null,
  primary key (kind, day, name)
) with (fillfactor = 80);
comment on table ducto_private.rollups is
  'Statistics by local day and user (or member), and by local day and model ('''' where none was named), of the rows that rollup_accounts names.';

create type ducto_private.usage_sums as (
  day date,
  name text collate "C",
  spend numeric,
  charges bigint,
  allowance_used numeric,
  refunded numeric,
  cost numeric
);

-- The instants that a statistic is about, and the whole local days among them that may be read from the rollups. With
-- user_id it is about one user or team, and no day is read from them.
create type ducto_private.usage_span as (
  starts timestamptz,
  ends timestamptz,
  zone text,
  first_day date,
  end_day date,
  days_start timestamptz,
  days_end timestamptz,
  user_id text collate "C"
);

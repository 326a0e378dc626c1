-- Accounts: opening, the one writer of balances, what has expired, and the rule of admission.
--
-- A call decides on row variables under the account's lock and writes last, so that a refusal needs no rollback.
-- post() writes the ledger and the account with it, for all but the plain charge of ducto.deduct().

-- Whether an account uses nothing but its balance, so that a charge need look at nothing else.
create or replace function ducto_private.is_plain(p_account ducto_private.accounts) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return p_account.kind = 'user' and p_account.plan_id is null and p_account.holds = 0 and p_account.lots = 0 and p_account.caps = 0;
end
$$;

-- Puts an event into the outbox. Only edges are events: a charge that crosses none writes none.
create or replace function ducto_private.emit(p_account_id text, p_type text, p_payload jsonb, p_now timestamptz) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into ducto_private.events (event_id, account_id, type, payload, created_at)
  values (ducto_private.new_id(), p_account_id, p_type, p_payload, p_now);
end
$$;

-- Saves what a call changed of an account where no ledger row tells it: holds, limits, caps, plans, members.
create or replace function ducto_private.save(p_account ducto_private.accounts, p_now timestamptz) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  update ducto_private.accounts as a
  set held = p_account.held,
    credit_limit = p_account.credit_limit,
    revision = p_account.revision + 1,
    allowance_used = p_account.allowance_used,
    changed_at = p_now,
    allowance_start = p_account.allowance_start,
    allowance_end = p_account.allowance_end,
    holds_due_at = p_account.holds_due_at,
    lots_due_at = p_account.lots_due_at,
    holds = p_account.holds,
    caps = p_account.caps,
    plan_id = p_account.plan_id,
    plain = ducto_private.is_plain(p_account)
  where a.account_id = p_account.account_id;
end
$$;

-- Writes a row into the ledger of p_account, and the account with it. It returns the row's id; its place in the order is
-- p_account.seq + 1, its revision p_account.revision + 1.
create or replace function ducto_private.post(
  p_account ducto_private.accounts,
  p_now timestamptz,
  p_type text,
  p_amount bigint,
  p_key text default null,
  p_fingerprint bigint default null,
  p_metadata jsonb default null,
  p_cost numeric default null,
  p_model text default null,
  p_resolved_model text default null,
  p_usage jsonb default null,
  p_pricing_version integer default null,
  p_plan_id text default null,
  p_reservation_id uuid default null,
  p_refers_to uuid default null,
  p_actor_id text default null,
  p_allowance_used bigint default 0,
  p_allowance_lapsed bigint default 0,
  p_shortfall bigint default 0,
  p_warnings text[] default null,
  p_lifetime_purchased bigint default null,
  p_expires_at timestamptz default null,
  p_paid_amount numeric default null,
  p_paid_currency text default null,
  p_reference text default null,
  p_reason text default null,
  p_id uuid default null,
  p_low_balance bigint default null)
returns uuid
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid := coalesce(p_id, ducto_private.new_id());
  v_balance bigint := p_account.balance + p_amount;
begin
  update ducto_private.accounts as a
  set balance = v_balance,
    held = p_account.held,
    lifetime_purchased = p_account.lifetime_purchased,
    seq = p_account.seq + 1,
    revision = p_account.revision + 1,
    allowance_used = p_account.allowance_used,
    changed_at = p_now,
    allowance_start = p_account.allowance_start,
    allowance_end = p_account.allowance_end,
    holds_due_at = p_account.holds_due_at,
    lots_due_at = p_account.lots_due_at,
    holds = p_account.holds,
    lots = p_account.lots,
    carry = p_account.carry,
    plain = ducto_private.is_plain(p_account)
  where a.account_id = p_account.account_id;
  insert into ducto_private.transactions (transaction_id, seq, amount, balance_after, allowance_used, revision, created_at,
    fingerprint, pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model, plan_id, actor_id,
    reservation_id, idempotency_key, metadata)
  values (v_id, p_account.seq + 1, p_amount, v_balance, p_allowance_used, p_account.revision + 1, p_now,
    p_fingerprint, p_pricing_version, p_account.account_id, p_type, p_account.carry, p_cost, p_usage,
    p_model, p_resolved_model, p_plan_id, p_actor_id, p_reservation_id, p_key, p_metadata);
  if p_type <> 'usage' or p_shortfall > 0 or p_warnings is not null then
    insert into ducto_private.transaction_details (transaction_id, account_id, seq, refers_to, allowance_lapsed, shortfall,
      lifetime_purchased, warnings, expires_at, paid_amount, paid_currency, reference, reason)
    values (v_id, p_account.account_id, p_account.seq + 1, p_refers_to, p_allowance_lapsed, p_shortfall, p_lifetime_purchased,
      p_warnings, p_expires_at, p_paid_amount, p_paid_currency, p_reference, p_reason);
  end if;
  if p_amount < 0 then
    if p_account.balance >= 0 and v_balance < 0 then
      perform ducto_private.emit(p_account.account_id, 'debt_begun', jsonb_build_object('balance', v_balance), p_now);
    end if;
    if p_low_balance is null and ducto_private.active_version() is not null then
      p_low_balance := (ducto_private.terms(null, false)).low_balance;
    end if;
    if p_account.balance > p_low_balance and v_balance <= p_low_balance and p_low_balance > 0 then
      perform ducto_private.emit(p_account.account_id, 'low_balance',
        jsonb_build_object('balance', v_balance, 'low_balance', p_low_balance), p_now);
    end if;
  end if;
  return v_id;
end
$$;

create or replace function ducto_private.check_range(p_value numeric, p_what text, p_account_id text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_value not between -9223372036854775807 and 9223372036854775807 then
    raise exception '% of account % would be out of range', p_what, p_account_id
      using errcode = '22003', hint = 'It lies within 9223372036854775807 credits either side of zero.';
  end if;
end
$$;

-- An account as it would open now, on the default plan and with its bonus; where no version is active, with neither.
create or replace function ducto_private.unopened(p_account_id text, p_terms ducto_private.quote) returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_account ducto_private.accounts;
begin
  v_account.account_id := p_account_id;
  v_account.kind := 'user';
  v_account.plan_id := p_terms.default_plan;
  v_account.balance := coalesce(p_terms.signup_bonus, 0);
  v_account.held := 0;
  v_account.credit_limit := 0;
  v_account.lifetime_purchased := 0;
  v_account.seq := 0;
  v_account.revision := 0;
  v_account.allowance_used := 0;
  v_account.holds := 0;
  v_account.lots := 0;
  v_account.caps := 0;
  v_account.carry := 0;
  v_account.opened_at := v_now;
  v_account.changed_at := v_now;
  return v_account;
end
$$;

-- The account that a hold or a charge of an unknown user would open; null where the config opens none.
create or replace function ducto_private.would_open(p_account_id text) returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_terms ducto_private.quote := ducto_private.terms(null, true);
begin
  if v_terms.default_plan is null and v_terms.signup_bonus = 0 then
    return null;
  end if;
  return ducto_private.unopened(p_account_id, v_terms);
end
$$;

-- Inserts an account and its signup bonus. Null if another session was first: then begin again.
create or replace function ducto_private.open_account(p_account ducto_private.accounts, p_terms ducto_private.quote)
returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into ducto_private.accounts (balance, held, credit_limit, lifetime_purchased, seq, revision, allowance_used, opened_at,
    changed_at, holds, lots, caps, account_id, kind, carry, plan_id, plain)
  values (0, 0, 0, 0, 0, 0, 0, p_account.opened_at, p_account.changed_at, 0, 0, 0, p_account.account_id, p_account.kind, 0,
    p_account.plan_id, ducto_private.is_plain(p_account))
  on conflict do nothing;
  if not found then
    return null;
  end if;
  perform ducto_private.emit(p_account.account_id, 'account_opened',
    jsonb_build_object('kind', p_account.kind, 'plan_id', p_account.plan_id, 'balance', p_account.balance),
    p_account.opened_at);
  p_account.balance := 0;
  if p_terms.signup_bonus > 0 then
    perform ducto_private.post(p_account, p_account.opened_at, 'signup_bonus', p_terms.signup_bonus,
      p_pricing_version => p_terms.version, p_lifetime_purchased => 0);
    p_account.balance := p_terms.signup_bonus;
    p_account.seq := 1;
    p_account.revision := 1;
  end if;
  return p_account;
end
$$;

-- Locks an account; a null row where it is unknown.
create or replace function ducto_private.lock_account(p_account_id text) returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account ducto_private.accounts;
begin
  select a.*
  into v_account
  from ducto_private.accounts as a
  where a.account_id = p_account_id
  for no key update;
  return v_account;
end
$$;

-- Locks an account, opening it first where it is unknown: for the calls that may open one.
create or replace function ducto_private.lock_or_open(p_account_id text) returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account ducto_private.accounts;
  v_terms ducto_private.quote;
begin
  loop
    v_account := ducto_private.lock_account(p_account_id);
    exit when v_account.account_id is not null;
    if ducto_private.active_version() is not null then
      v_terms := ducto_private.terms(null, true);
    end if;
    v_account := ducto_private.open_account(ducto_private.unopened(p_account_id, v_terms), v_terms);
    exit when v_account.account_id is not null;
  end loop;
  return v_account;
end
$$;

-- The first instant with this local time or a later one, also where midnight happens twice or never.
create or replace function ducto_private.first_instant(p_local timestamp, p_zone text) returns timestamptz
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select min(c.at)
    from (
      select (p_local at time zone p_zone) - o.shift as at
      from (values (interval '0'), (interval '30 minutes'), (interval '1 hour'), (interval '2 hours')) as o (shift)
    ) as c
    where c.at at time zone p_zone >= p_local);
end
$$;

-- An account with the allowance period of p_now begun.
create or replace function ducto_private.roll_allowance(p_account ducto_private.accounts, p_now timestamptz, p_zone text)
returns ducto_private.accounts
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_month timestamp;
begin
  if p_account.allowance_end is null or p_now >= p_account.allowance_end then
    v_month := date_trunc('month', p_now at time zone p_zone);
    p_account.allowance_start := ducto_private.first_instant(v_month, p_zone);
    p_account.allowance_end := ducto_private.first_instant(v_month + interval '1 month', p_zone);
    p_account.allowance_used := 0;
  end if;
  return p_account;
end
$$;

-- Whether something of an account expired by p_now that its row still counts.
create or replace function ducto_private.is_due(p_account ducto_private.accounts, p_now timestamptz) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (p_account.holds > 0 and p_account.holds_due_at <= p_now) or (p_account.lots > 0 and p_account.lots_due_at <= p_now);
end
$$;

-- An account as it stands at p_now, what has expired dropped. Whoever then saves it calls write_expiry() first.
create or replace function ducto_private.drop_expired(p_account ducto_private.accounts, p_now timestamptz)
returns ducto_private.accounts
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  select coalesce(sum(r.held), 0), count(*), min(r.expires_at)
  into p_account.held, p_account.holds, p_account.holds_due_at
  from ducto_private.reservations as r
  where r.account_id = p_account.account_id and r.status = 'active' and r.expires_at > p_now;
  if p_account.lots > 0 then
    select p_account.balance - coalesce(sum(d.expired), 0), p_account.lots - count(*) filter (where d.expired = d.remainder)
    into p_account.balance, p_account.lots
    from ducto_private.due_lots(p_account.account_id, p_now) as d;
    p_account.lots_due_at := ducto_private.next_lot(p_account.account_id, p_now);
  end if;
  return p_account;
end
$$;

-- Records what drop_expired() dropped. The account's balance is already net of it, its seq and revision are not.
create or replace function ducto_private.write_expiry(p_account ducto_private.accounts, p_now timestamptz)
returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_lots ducto_private.due_lot[];
  v_lot ducto_private.due_lot;
  v_id uuid;
begin
  update ducto_private.reservations as r
  set status = 'expired', held = 0, ended_at = r.expires_at
  where r.account_id = p_account.account_id and r.status = 'active' and r.expires_at <= p_now;
  v_lots := array(
    select d
    from ducto_private.due_lots(p_account.account_id, p_now) as d
    where d.expired > 0
    order by d.expires_at, d.seq);
  p_account.balance := p_account.balance + (
    select coalesce(sum(l.expired), 0)
    from unnest(v_lots) as l);
  foreach v_lot in array v_lots loop
    v_id := ducto_private.post(p_account, p_now, 'expiry', -v_lot.expired, p_refers_to => v_lot.transaction_id,
      p_expires_at => v_lot.expires_at);
    p_account.balance := p_account.balance - v_lot.expired;
    p_account.seq := p_account.seq + 1;
    p_account.revision := p_account.revision + 1;
    perform ducto_private.take_lots(p_account.account_id, v_id, v_lot.expired, '-infinity', p_now, v_lot.lot_id);
    perform ducto_private.emit(p_account.account_id, 'lot_expired', jsonb_build_object('lot_id', v_lot.lot_id,
      'transaction_id', v_lot.transaction_id, 'amount', v_lot.expired, 'expires_at', v_lot.expires_at), p_now);
  end loop;
  return p_account;
end
$$;

-- For calls that change an account whatever has expired: the account as it stands at p_now, and recorded as such.
create or replace function ducto_private.expire(p_account ducto_private.accounts, p_now timestamptz)
returns ducto_private.accounts
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  if ducto_private.is_due(p_account, p_now) then
    return ducto_private.write_expiry(ducto_private.drop_expired(p_account, p_now), p_now);
  end if;
  return p_account;
end
$$;

-- An account as a reader sees it, changed_at the time of reading; a null row where it is unknown.
create or replace function ducto_private.as_read(p_account_id text) returns ducto_private.accounts
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account ducto_private.accounts;
begin
  select a.*
  into v_account
  from ducto_private.accounts as a
  where a.account_id = p_account_id;
  v_account.changed_at := greatest(clock_timestamp(), v_account.changed_at);
  if ducto_private.is_due(v_account, v_account.changed_at) then
    return ducto_private.drop_expired(v_account, v_account.changed_at);
  end if;
  return v_account;
end
$$;

-- What a plan's allowance of the current period still pays.
create or replace function ducto_private.allowance_left(p_account ducto_private.accounts, p_terms ducto_private.quote)
returns bigint
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return case when p_account.plan_id is null or p_terms.free_allowance is null then 0
    else greatest(0, p_terms.free_allowance - p_account.allowance_used) end;
end
$$;

-- The least balance that a hold or a charge must leave: the hold's own minimum, else min_balance (of teams none), less the
-- credit limit.
create or replace function ducto_private.floor_of(p_account ducto_private.accounts, p_own bigint, p_min_balance bigint)
returns bigint
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(p_own, case p_account.kind when 'team' then 0 else p_min_balance end, 0) - p_account.credit_limit;
end
$$;

-- The rule of admission for holds, and for charges without one: why p_amount more is refused, or null. p_exceeded is of
-- caps_exceeded(); p_amount, together with the other holds and after the allowance, must leave the balance at its floor.
-- Numeric, because the sum may pass bigint where the answer is no.
create or replace function ducto_private.admission_error(
  p_account ducto_private.accounts, p_member ducto_private.team_members, p_now timestamptz, p_terms ducto_private.quote,
  p_exceeded ducto_private.spend_caps[], p_amount bigint, p_left bigint, p_own_floor bigint) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_demand constant numeric := p_account.held::numeric + p_amount - p_left;
begin
  return case
    when (p_exceeded[1]).action = 'deny' then 'spend_cap_exceeded'
    when p_member.spend_cap is not null
      and ducto_private.member_exceeds(p_member, p_account, p_now, p_terms.timezone, p_amount, p_left) then 'member_cap_exceeded'
    when p_amount > 0 and v_demand > 0
      and p_account.balance - v_demand < ducto_private.floor_of(p_account, p_own_floor, p_terms.min_balance)
      then 'insufficient_credits' end;
end
$$;

-- Accounts: opening, ledger rows other than charges, allowance periods, and expiry.
--
-- Whoever changes an account locks its row, decides, and writes last, so that a refusal needs no rollback. spend() writes
-- charges; every other row of the ledger is written by post().

-- Puts an event into the outbox. Events mark a change of state, so most charges write none.
create or replace function ducto_private.emit(p_account_id text, p_type text, p_payload jsonb, p_now timestamptz) returns void
language plpgsql volatile
as $$
begin
  insert into ducto_private.events (event_id, account_id, type, payload, created_at)
  values (ducto_private.new_id(), p_account_id, p_type, p_payload, p_now);
end
$$;

-- Writes the events of what took the balance below zero, or what is left of it and the allowance down to the low balance.
create or replace function ducto_private.emit_balance_events(
  p_account_id text, p_before bigint, p_after bigint, p_left_before numeric, p_left_after numeric, p_low_balance bigint,
  p_now timestamptz)
returns void
language plpgsql volatile
as $$
begin
  if p_before >= 0 and p_after < 0 then
    perform ducto_private.emit(p_account_id, 'debt_begun', jsonb_build_object('balance', p_after), p_now);
  end if;
  if p_left_before > p_low_balance and p_left_after <= p_low_balance and p_low_balance > 0 then
    perform ducto_private.emit(p_account_id, 'low_balance',
      jsonb_build_object('balance', p_after, 'low_balance', p_low_balance), p_now);
  end if;
end
$$;

-- The same of an account before and after a call that is not a charge.
create or replace function ducto_private.tell_balance(
  p_before ducto_private.accounts, p_after ducto_private.accounts, p_now timestamptz) returns void
language plpgsql volatile
as $$
declare
  v_before ducto.balance_result;
  v_after ducto.balance_result;
begin
  p_before.changed_at := p_now;
  p_after.changed_at := p_now;
  v_before := ducto_private.balance_answer(p_before);
  v_after := ducto_private.balance_answer(p_after);
  perform ducto_private.emit_balance_events(p_after.account_id, v_before.balance, v_after.balance,
    v_before.available::numeric + v_before.reserved, v_after.available::numeric + v_after.reserved,
    coalesce(p_after.low_balance, (
      select t.low_balance
      from ducto_private.terms as t
      where t.version = ducto_private.active_version(p_now) and t.plan_id = coalesce(p_after.plan_id, ''))), p_now);
end
$$;

-- Writes a row into the ledger, other than a charge's, and the account with it. Returns the row's id. p_purchased is added to
-- lifetime_purchased; it is null where the row shall not answer that. p_carry is the account's new carry, where that changes.
create or replace function ducto_private.post(
  p_account_id text,
  p_now timestamptz,
  p_type text,
  p_amount bigint,
  p_key text default null,
  p_fingerprint bigint default null,
  p_metadata jsonb default null,
  p_purchased bigint default 0,
  p_pricing_version integer default null,
  p_model text default null,
  p_resolved_model text default null,
  p_member_id text default null,
  p_refers_to uuid default null,
  p_allowance_restored bigint default 0,
  p_allowance_lapsed bigint default 0,
  p_expires_at timestamptz default null,
  p_occurred_at timestamptz default null,
  p_paid_amount numeric default null,
  p_paid_currency text default null,
  p_reference text default null,
  p_reason text default null,
  p_labels text[] default null,
  p_carry numeric default null)
returns uuid
language plpgsql volatile
as $$
declare
  v_id uuid;
  v_before ducto_private.accounts;
  v_account ducto_private.accounts;
begin
  update ducto_private.accounts as a
  set balance = a.balance + p_amount,
    lifetime_purchased = a.lifetime_purchased + coalesce(p_purchased, 0),
    allowance_used = a.allowance_used - p_allowance_restored,
    carry = coalesce(p_carry, a.carry),
    seq = a.seq + 1,
    revision = a.revision + 1,
    changed_at = p_now
  where a.account_id = p_account_id
  returning a.* into v_account;
  insert into ducto_private.transactions (seq, amount, balance_after, allowance_used, revision, created_at, fingerprint,
    pricing_version, account_id, type, carry_after, model, resolved_model, member_id, idempotency_key, metadata,
    labels)
  values (v_account.seq, p_amount, v_account.balance, -p_allowance_restored, v_account.revision, p_now, p_fingerprint,
    p_pricing_version, p_account_id, p_type, v_account.carry, p_model, p_resolved_model, p_member_id, p_key, p_metadata,
    p_labels)
  returning transaction_id into v_id;
  insert into ducto_private.transaction_details (transaction_id, account_id, seq, refers_to, allowance_lapsed, shortfall,
    lifetime_purchased, expires_at, occurred_at, paid_amount, paid_currency, reference, reason)
  values (v_id, p_account_id, v_account.seq, p_refers_to, p_allowance_lapsed, 0,
    case when p_purchased is not null then v_account.lifetime_purchased end, p_expires_at, p_occurred_at, p_paid_amount,
    p_paid_currency, p_reference, p_reason);
  -- An adjustment below zero is one of a merge, which takes nothing from anybody.
  if p_amount < 0 and p_type <> 'adjustment' then
    v_before := v_account;
    v_before.balance := v_account.balance - p_amount;
    perform ducto_private.tell_balance(v_before, v_account, p_now);
  end if;
  return v_id;
end
$$;

create or replace function ducto_private.check_range(p_value numeric, p_what text, p_account_id text) returns void
language plpgsql stable
as $$
begin
  if p_value not between -9223372036854775807 and 9223372036854775807 then
    raise exception '% of account % would be out of range', p_what, p_account_id
      using errcode = '22003', hint = 'It lies within 9223372036854775807 credits either side of zero.';
  end if;
end
$$;

-- An account as it would open at p_now by these terms, on their default plan and with their bonus.
create or replace function ducto_private.new_account(p_account_id text, p_kind text, p_now timestamptz, p_terms ducto_private.terms)
returns ducto_private.accounts
language plpgsql stable
as $$
declare
  v_expires_at constant timestamptz := case when p_terms.signup_bonus > 0
    then p_now + make_interval(hours => 24 * p_terms.signup_bonus_days) end;
begin
  return row(coalesce(p_terms.signup_bonus, 0), 0, 0, 0, 0, 0, 0, p_now, p_now, null, null, null, v_expires_at, 0,
    (v_expires_at is not null)::integer, 0, p_account_id, p_kind, 0, p_terms.default_plan, 0, null, null, null, false, false, null,
    null, null, null)::ducto_private.accounts;
end
$$;

-- Inserts an account and its bonus, if it has one. False if another session was first: then begin again.
create or replace function ducto_private.open_account(p_account ducto_private.accounts, p_version integer) returns boolean
language plpgsql volatile
as $$
declare
  v_id uuid;
begin
  insert into ducto_private.accounts (balance, held, credit_limit, lifetime_purchased, seq, revision, allowance_used, opened_at,
    changed_at, holds, lots, caps, account_id, kind, carry, plan_id, rolled)
  values (0, 0, 0, 0, 0, 0, 0, p_account.opened_at, p_account.changed_at, 0, 0, 0, p_account.account_id, p_account.kind, 0,
    p_account.plan_id, 0)
  on conflict do nothing;
  if not found then
    return false;
  end if;
  perform ducto_private.emit(p_account.account_id, 'account_opened',
    jsonb_build_object('kind', p_account.kind, 'plan_id', p_account.plan_id, 'balance', p_account.balance), p_account.opened_at);
  if p_account.balance > 0 and p_account.kind = 'user' then
    v_id := ducto_private.post(p_account.account_id, p_account.opened_at, 'signup_bonus', p_account.balance,
      p_pricing_version => p_version, p_expires_at => p_account.lots_due_at);
    if p_account.lots > 0 then
      perform ducto_private.open_lot(p_account.account_id, p_account.opened_at, v_id, p_account.balance, p_account.lots_due_at);
    end if;
  end if;
  return true;
end
$$;

-- Locks an account; a null row where it is unknown.
create or replace function ducto_private.lock_account(p_account_id text) returns ducto_private.accounts
language plpgsql volatile
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

-- Locks an account, opening it first where it is unknown. In the row that it returns, changed_at is the time of the call.
create or replace function ducto_private.lock_or_open(p_account_id text) returns ducto_private.accounts
language plpgsql volatile
as $$
declare
  v_now timestamptz;
  v_version integer;
  v_terms ducto_private.terms;
  v_account ducto_private.accounts;
  v_opened boolean := false;
begin
  loop
    v_account := ducto_private.lock_account(p_account_id);
    if v_account.account_id is not null then
      if not v_opened then
        v_account.changed_at := greatest(clock_timestamp(), v_account.changed_at);
      end if;
      return v_account;
    end if;
    v_now := clock_timestamp();
    v_version := ducto_private.active_version(v_now);
    if v_version is not null then
      v_terms := ducto_private.find_terms(v_version, null, v_now);
    end if;
    v_opened := ducto_private.open_account(ducto_private.new_account(p_account_id, 'user', v_now, v_terms), v_version);
  end loop;
end
$$;

-- The first instant whose local time is p_local or later, also where midnight happens twice or never.
create or replace function ducto_private.first_instant(p_local timestamp, p_zone text) returns timestamptz
language plpgsql stable
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

-- The start of a period by its number. Period 0 begins at the anchor, and the others at its local time, so many days, weeks,
-- months or years from it (of 31 January, 28 February, 31 March). Without an anchor they are the calendar's.
create or replace function ducto_private.period_start(p_period text, p_anchor timestamptz, p_zone text, p_number integer)
returns timestamptz
language plpgsql stable
as $$
begin
  if p_number = 0 and p_anchor is not null then
    return p_anchor;
  end if;
  -- 1 January 2001 is a Monday.
  return ducto_private.first_instant(
    coalesce(p_anchor at time zone p_zone, '2001-01-01') + p_number * ('1 ' || p_period)::interval, p_zone);
end
$$;

-- The number of the period in which p_at lies. By local dates it can be wrong by one.
create or replace function ducto_private.period_number(p_period text, p_anchor timestamptz, p_zone text, p_at timestamptz)
returns integer
language plpgsql stable
as $$
declare
  v_local constant timestamp := p_at at time zone p_zone;
  v_first constant timestamp := coalesce(p_anchor at time zone p_zone, '2001-01-01');
  v_years constant integer := extract(year from v_local) - extract(year from v_first);
  v_number constant integer := case p_period
    when 'day' then v_local::date - v_first::date
    when 'week' then floor((v_local::date - v_first::date) / 7.0)
    when 'month' then 12 * v_years + extract(month from v_local) - extract(month from v_first)
    else v_years end;
begin
  return v_number - (ducto_private.period_start(p_period, p_anchor, p_zone, v_number) > p_at)::integer
    + (ducto_private.period_start(p_period, p_anchor, p_zone, v_number + 1) <= p_at)::integer;
end
$$;

-- An account in the period of p_at, without regard to what it used.
create or replace function ducto_private.begin_period(
  p_account ducto_private.accounts, p_terms ducto_private.terms, p_at timestamptz) returns ducto_private.accounts
language plpgsql stable
as $$
declare
  v_anchor constant timestamptz := case when p_terms.anchored then p_account.anchor end;
  v_number constant integer := ducto_private.period_number(p_terms.period, v_anchor, p_terms.timezone, p_at);
begin
  p_account.allowance_start := ducto_private.period_start(p_terms.period, v_anchor, p_terms.timezone, v_number);
  p_account.allowance_end := ducto_private.period_start(p_terms.period, v_anchor, p_terms.timezone, v_number + 1);
  if p_terms.anchored then
    p_account.anchor_until := p_account.allowance_end;
  end if;
  return p_account;
end
$$;

-- An account in the allowance period of p_now, with what ended periods hand on, where its row is of an earlier one. A period
-- hands on least(rollover, what is left of it), so n unseen ones after it hand on least(rollover, that + n allowances).
create or replace function ducto_private.roll_allowance(
  p_account ducto_private.accounts, p_terms ducto_private.terms, p_now timestamptz) returns ducto_private.accounts
language plpgsql stable
as $$
declare
  v_ended constant timestamptz := p_account.allowance_end;
  v_left numeric;
  v_anchor timestamptz;
begin
  if p_now < v_ended then
    return p_account;
  end if;
  if p_terms.anchored and (p_account.anchor is null or p_account.anchor_until is distinct from v_ended) then
    -- The ended period was the calendar's, before a config that changed the plan.
    p_account.anchor := coalesce(v_ended, p_account.opened_at);
  end if;
  p_account := ducto_private.begin_period(p_account, p_terms, p_now);
  v_left := greatest(0, p_terms.free_allowance - p_account.allowance_used + p_account.rolled);
  p_account.rolled := 0;
  p_account.allowance_used := 0;
  if v_ended is not null then
    p_account.allowance_start := greatest(p_account.allowance_start, v_ended);
    if p_terms.rollover > 0 then
      v_anchor := case when p_terms.anchored then p_account.anchor end;
      p_account.rolled := least(p_terms.rollover, v_left + p_terms.free_allowance::numeric
        * (ducto_private.period_number(p_terms.period, v_anchor, p_terms.timezone, p_now)
          - ducto_private.period_number(p_terms.period, v_anchor, p_terms.timezone, v_ended)));
    end if;
  end if;
  return p_account;
end
$$;

-- The credits left of a plan's allowance in the period of p_now.
create or replace function ducto_private.allowance_left(
  p_account ducto_private.accounts, p_terms ducto_private.terms, p_now timestamptz) returns bigint
language plpgsql stable
as $$
begin
  if p_account.plan_id is null or p_terms.free_allowance is null then
    return 0;
  end if;
  p_account := ducto_private.roll_allowance(p_account, p_terms, p_now);
  return greatest(0, p_terms.free_allowance - p_account.allowance_used + p_account.rolled);
end
$$;

-- What an account's rows took of allowances since p_since, less what was given back of that.
create or replace function ducto_private.allowance_taken(p_account_id text, p_since timestamptz) returns bigint
language plpgsql stable
as $$
begin
  return (
    select coalesce(sum(t.allowance_used), 0)
    from ducto_private.transactions as t
    where t.account_id = p_account_id and t.seq > ducto_private.seq_at(p_account_id, p_since, true)
      and (t.allowance_used > 0 or t.allowance_used < 0 and exists (
        select
        from ducto_private.transaction_details as d
        join ducto_private.transactions as c on c.transaction_id = d.refers_to and c.account_id = d.account_id
        where d.transaction_id = t.transaction_id and d.account_id = t.account_id and c.created_at >= p_since)));
end
$$;

-- An account as it stands after a change to p_plan_id at p_at. A plan that begins where a period ended (p_at_end) begins with
-- its whole allowance; for a change within a period, what was used since the new period began stays used.
create or replace function ducto_private.change_plan(
  p_account ducto_private.accounts, p_plan_id text, p_anchor timestamptz, p_at timestamptz, p_at_end boolean, p_now timestamptz)
returns ducto_private.accounts
language plpgsql stable
as $$
declare
  v_terms ducto_private.terms;
  v_start timestamptz;
begin
  if p_account.plan_id is not null then
    v_terms := ducto_private.find_terms(null, p_account.plan_id, p_now);
    p_account := ducto_private.roll_allowance(p_account, v_terms, p_at);
  end if;
  v_start := case when p_account.plan_id = p_plan_id then p_account.allowance_start end;
  if v_start is not null and (p_anchor is null or not v_terms.anchored) then
    return p_account;
  end if;
  p_account.plan_id := p_plan_id;
  if p_plan_id is not null then
    v_terms := ducto_private.find_terms(null, p_plan_id, p_now);
    if v_terms.anchored then
      p_account.anchor := coalesce(p_anchor, case when p_account.anchor_until > p_at then p_account.anchor end, p_at);
    end if;
    p_account := ducto_private.begin_period(p_account, v_terms, p_at);
    if p_account.allowance_start = v_start then
      return p_account;
    elsif p_at_end then
      p_account.allowance_start := greatest(p_account.allowance_start, p_at);
      p_account.allowance_used := 0;
    else
      p_account.allowance_used := ducto_private.allowance_taken(p_account.account_id, p_account.allowance_start);
    end if;
  end if;
  p_account.rolled := 0;
  return p_account;
end
$$;

-- An account after the first change of its plan that is due.
create or replace function ducto_private.due_plan(p_account ducto_private.accounts, p_now timestamptz)
returns ducto_private.accounts
language plpgsql stable
as $$
declare
  v_at constant timestamptz := p_account.plan_due_at;
  v_schedule ducto_private.plan_schedules;
begin
  select s.*
  into v_schedule
  from ducto_private.plan_schedules as s
  where s.account_id = p_account.account_id;
  if v_schedule.next_at = v_at then
    p_account := ducto_private.change_plan(p_account, v_schedule.next_plan_id, v_schedule.next_anchor, v_at, true, p_now);
    p_account.plan_due_at := v_schedule.until_at;
  else
    p_account := ducto_private.change_plan(p_account, case p_account.kind when 'user'
      then (ducto_private.find_terms(null, null, p_now)).default_plan end, null, v_at, false, p_now);
    p_account.plan_due_at := null;
  end if;
  return p_account;
end
$$;

-- Whether the account's row still counts a hold, a lot or a plan that has ended by p_now. spend() has a copy of this rule in
-- place of a call.
create or replace function ducto_private.is_due(p_account ducto_private.accounts, p_now timestamptz) returns boolean
language plpgsql immutable
as $$
begin
  return (p_account.holds > 0 and p_account.holds_due_at <= p_now) or (p_account.lots > 0 and p_account.lots_due_at <= p_now)
    or p_account.plan_due_at <= p_now;
end
$$;

-- An account as it stands at p_now, without what has expired. Nothing is written: who goes on to write calls write_expiry().
create or replace function ducto_private.without_expired(p_account ducto_private.accounts, p_now timestamptz)
returns ducto_private.accounts
language plpgsql stable
as $$
begin
  if ducto_private.is_due(p_account, p_now) is not true then
    return p_account;
  end if;
  while p_account.plan_due_at <= p_now loop
    p_account := ducto_private.due_plan(p_account, p_now);
  end loop;
  select coalesce(sum(h.held), 0), count(*), min(h.expires_at)
  into p_account.held, p_account.holds, p_account.holds_due_at
  from ducto_private.holds as h
  where h.account_id = p_account.account_id and h.status = 'active' and h.expires_at > p_now;
  if p_account.lots > 0 then
    select p_account.balance - coalesce(sum(d.expired), 0), p_account.lots - count(*) filter (where d.expired = d.remainder)
    into p_account.balance, p_account.lots
    from ducto_private.due_lots(p_account.account_id, p_now) as d;
    p_account.lots_due_at := (
      select min(l.expires_at)
      from ducto_private.credit_lots as l
      where l.account_id = p_account.account_id and l.remainder > 0 and l.expires_at > p_now);
  end if;
  return p_account;
end
$$;

-- Writes an account's plan, its period and when the plan changes next, and the event of its change at p_at.
create or replace function ducto_private.write_plan(
  p_account ducto_private.accounts, p_from text, p_at timestamptz, p_now timestamptz) returns bigint
language plpgsql volatile
as $$
begin
  update ducto_private.accounts as a
  set plan_id = p_account.plan_id,
    allowance_used = p_account.allowance_used,
    allowance_start = p_account.allowance_start,
    allowance_end = p_account.allowance_end,
    rolled = p_account.rolled,
    anchor = p_account.anchor,
    anchor_until = p_account.anchor_until,
    plan_due_at = p_account.plan_due_at,
    revision = a.revision + 1,
    changed_at = p_now
  where a.account_id = p_account.account_id
  returning a.revision into p_account.revision;
  if p_from is distinct from p_account.plan_id then
    perform ducto_private.emit(p_account.account_id, 'plan_changed',
      jsonb_build_object('from', p_from, 'to', p_account.plan_id)
        || case when p_at < p_now then jsonb_build_object('at', p_at) else '{}' end, p_now);
  end if;
  return p_account.revision;
end
$$;

-- Records what has ended of an account by p_now: its plan, its holds, and a row of the ledger for each step of its lots' expiry.
-- Returns the number of these rows.
create or replace function ducto_private.write_expiry(p_account_id text, p_now timestamptz) returns integer
language plpgsql volatile
as $$
declare
  v_steps constant ducto_private.due_lot[] := array(
    select s
    from ducto_private.expiry_steps(p_account_id, p_now) as s
    order by s.due_at, s.expires_at, s.seq, s.lot_id);
  v_step ducto_private.due_lot;
  v_id uuid;
  v_account ducto_private.accounts;
  v_before ducto_private.accounts;
begin
  select a.*
  into v_account
  from ducto_private.accounts as a
  where a.account_id = p_account_id;
  while v_account.plan_due_at <= p_now loop
    v_before := v_account;
    v_account := ducto_private.due_plan(v_account, p_now);
    perform ducto_private.write_plan(v_account, v_before.plan_id, v_before.plan_due_at, p_now);
  end loop;
  with ended as (
    update ducto_private.holds as h
    set status = 'expired', ended_at = h.expires_at
    where h.account_id = p_account_id and h.status = 'active' and h.expires_at <= p_now
    returning h.*
  )
  insert into ducto_private.events (event_id, account_id, type, payload, created_at)
  select ducto_private.new_id(), p_account_id, 'hold_expired', jsonb_build_object('reservation_id', e.hold_id,
    'actor_id', coalesce(e.member_id, p_account_id), 'amount', e.held, 'charged', e.charged, 'expires_at', e.expires_at), p_now
  from ended as e
  order by e.expires_at, e.hold_id;
  update ducto_private.accounts as a
  set held = o.held, holds = o.holds, holds_due_at = o.due_at
  from (
    select coalesce(sum(h.held), 0) as held, count(*) as holds, min(h.expires_at) as due_at
    from ducto_private.holds as h
    where h.account_id = p_account_id and h.status = 'active'
  ) as o
  where a.account_id = p_account_id;
  foreach v_step in array v_steps loop
    v_id := ducto_private.post(p_account_id, p_now, 'expiry', -v_step.expired, p_purchased => null,
      p_refers_to => v_step.transaction_id, p_expires_at => v_step.expires_at, p_occurred_at => v_step.due_at);
    perform ducto_private.take_lots(p_account_id, v_id, v_step.expired, '-infinity', p_now, v_step.lot_id);
    perform ducto_private.emit(p_account_id, 'lot_expired', jsonb_build_object('lot_id', v_step.lot_id,
      'transaction_id', v_step.transaction_id, 'amount', v_step.expired, 'expires_at', v_step.expires_at), p_now);
  end loop;
  perform ducto_private.count_lots(p_account_id, p_now);
  return cardinality(v_steps);
end
$$;

-- Records what has expired, if anything has, and returns the account as it then stands.
create or replace function ducto_private.expire(p_account ducto_private.accounts, p_now timestamptz)
returns ducto_private.accounts
language plpgsql volatile
as $$
begin
  if ducto_private.is_due(p_account, p_now) then
    perform ducto_private.write_expiry(p_account.account_id, p_now);
    select a.*
    into p_account
    from ducto_private.accounts as a
    where a.account_id = p_account.account_id;
  end if;
  return p_account;
end
$$;

-- An account as a reader sees it, changed_at the time of reading; a null row where it is unknown.
create or replace function ducto_private.read_account(p_account_id text) returns ducto_private.accounts
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts;
begin
  select a.*
  into v_account
  from ducto_private.accounts as a
  where a.account_id = p_account_id;
  v_account.changed_at := greatest(clock_timestamp(), v_account.changed_at);
  return ducto_private.without_expired(v_account, v_account.changed_at);
end
$$;

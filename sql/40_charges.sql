-- Charges and refunds.
--
-- charge() is the one text of charging, priced or not, with a hold or without: lock, replay by key, price, drop what has
-- expired, cost to credits, admission or settlement, write.

create or replace function ducto_private.charge_refusal(
  p_error text, p_account ducto_private.accounts, p_shortfall bigint default 0) returns ducto.deduction_result
language sql immutable
as $$
  select row(null, null, 0, coalesce(p_account.balance, 0), false, p_error, 0, 0, p_shortfall, '{}'::text[],
    coalesce(p_account.revision, 0))::ducto.deduction_result
$$;

-- The first answer of a charge again, to the same request.
create or replace function ducto_private.charge_replay(p_id uuid, p_fingerprint bigint, p_account ducto_private.accounts)
returns ducto.deduction_result
language plpgsql stable
as $$
declare
  v_row ducto_private.ledger;
begin
  select t.*
  into v_row
  from ducto_private.ledger as t
  where t.transaction_id = p_id and t.account_id = p_account.account_id;
  if v_row.type = 'usage' and v_row.fingerprint is null then
    v_row.fingerprint := ducto_private.charge_fingerprint('deduct', v_row.usage, null, null, null, true);
  end if;
  if v_row.fingerprint is distinct from p_fingerprint then
    return ducto_private.charge_refusal('idempotency_conflict', p_account);
  end if;
  return row(v_row.transaction_id, v_row.account_id, v_row.amount, v_row.balance_after, true, null, v_row.cost,
    v_row.allowance_used, v_row.shortfall, coalesce(v_row.warnings, '{}'), v_row.revision)::ducto.deduction_result;
end
$$;

create or replace function ducto_private.to_credits(p_cost numeric, p_rounding text, p_carry numeric) returns numeric
language sql immutable
as $$
  select case p_rounding
    when 'carry' then floor(p_carry + p_cost)
    when 'up' then ceil(p_cost)
    when 'down' then floor(p_cost)
    else floor(p_cost + 0.5) end
$$;

-- What makes two charges the same request.
create or replace function ducto_private.charge_fingerprint(
  p_call text, p_usage jsonb, p_amount bigint, p_model text, p_reservation_id text, p_final boolean) returns bigint
language sql stable
as $$
  select jsonb_hash_extended(jsonb_build_array(p_call, p_usage, p_amount, p_model, lower(p_reservation_id), p_final), 0)
$$;

create or replace function ducto_private.check_charge(
  p_account_id text, p_usage jsonb, p_priced boolean, p_model text, p_key text, p_metadata jsonb) returns void
language plpgsql stable
as $$
begin
  perform ducto_private.check_text(p_account_id, 'p_user_id');
  if p_priced then
    perform ducto_private.check_usage(p_usage);
  end if;
  perform ducto_private.check_short(p_model, 'p_model');
  perform ducto_private.check_key(p_key);
  perform ducto_private.check_metadata(p_metadata);
end
$$;

-- PL/pgSQL prepares each expression once per transaction, and a charge is one: hence few statements, and helpers that the
-- planner inlines.
create or replace function ducto_private.charge(
  p_call text,
  p_account_id text,
  p_usage jsonb,
  p_job text,
  p_amount bigint,
  p_model text,
  p_reservation_id text,
  p_final boolean,
  p_key text,
  p_metadata jsonb)
returns ducto.deduction_result
language plpgsql volatile
as $$
declare
  v_fingerprint bigint;
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_id uuid;
  v_hold ducto_private.reservations;
  v_quote ducto_private.quote;
  v_terms ducto_private.quote;
  v_opens boolean := false;
  v_due boolean := false;
  v_charged bigint;
  v_left bigint;
  v_used bigint;
  v_held bigint := 0;
  v_shortfall bigint := 0;
  v_warnings text[];
begin
  perform ducto_private.check_charge(p_account_id, p_usage, p_amount is null and p_job is null, p_model, p_key, p_metadata);
  if p_key is not null or p_reservation_id is not null then
    v_fingerprint := ducto_private.charge_fingerprint(p_call, p_usage, p_amount, p_model, p_reservation_id, p_final);
  end if;

  loop
    v_left := 0;
    v_used := 0;
    select a.*
    into v_account
    from ducto_private.accounts as a
    where a.account_id = p_account_id
    for no key update;
    if found then
      if p_key is not null then
        select t.transaction_id
        into v_id
        from ducto_private.transactions as t
        where t.account_id = p_account_id and t.idempotency_key = p_key;
        if found then
          return ducto_private.charge_replay(v_id, v_fingerprint, v_account);
        end if;
      end if;
      if v_account.kind = 'team' then
        return ducto_private.charge_refusal('is_a_team', v_account);
      end if;
    else
      v_opens := true;
      v_account := ducto_private.would_open(p_account_id);
      if v_account.account_id is null then
        return ducto_private.charge_refusal('account_not_found', v_account);
      end if;
    end if;

    if p_reservation_id is null then
      v_quote := ducto_private.quote(null, p_usage, p_job, v_account.plan_id, v_opens);
      if current_setting('transaction_isolation') <> 'read committed' then
        perform ducto_private.check_snapshot(v_quote.version);
      end if;
      if v_opens then
        v_account := ducto_private.unopened(p_account_id, v_quote);
      end if;
    else
      v_hold := ducto_private.find_hold(p_reservation_id, p_account_id);
      if v_hold.reservation_id is null then
        return ducto_private.charge_refusal('reservation_not_found', v_account);
      elsif v_hold.settled_by is not null and p_key is null and p_final then
        -- The end of a hold is the key of the keyless call that ended it.
        return ducto_private.charge_replay(v_hold.settled_by, v_fingerprint, v_account);
      elsif v_hold.status in ('settled', 'released') then
        return ducto_private.charge_refusal('reservation_not_active', v_account);
      end if;
      v_quote := ducto_private.quote(v_hold.pricing_version, p_usage, p_job, v_hold.plan_id, false);
    end if;

    v_now := greatest(ducto_private.clock(), v_account.changed_at);
    if ducto_private.is_due(v_account, v_now) then
      v_due := true;
      v_account := ducto_private.drop_expired(v_account, v_now);
    end if;
    if p_amount is not null then
      v_quote.cost := p_amount;
    end if;
    v_charged := ducto_private.to_credits(v_quote.cost, v_quote.rounding, v_account.carry);
    if v_account.plan_id is not null then
      v_terms := v_quote;
      if p_reservation_id is not null then
        v_terms := ducto_private.quote(null, null, null, v_account.plan_id, false);
      end if;
      v_account := ducto_private.roll_allowance(v_account, v_now, v_terms.timezone);
      v_left := ducto_private.allowance_left(v_account, v_terms);
      v_used := least(v_charged, v_left);
    end if;

    if p_reservation_id is null then
      if not ducto_private.admits(v_account.balance, v_account.held, v_charged, v_left,
        ducto_private.floor_of(v_account, v_quote.min_balance))
      then
        return ducto_private.charge_refusal('insufficient_credits', v_account);
      end if;
    else
      if v_hold.status = 'active' and v_hold.expires_at > v_now then
        v_held := v_hold.held;
      else
        v_warnings := '{reservation_expired}'::text[];
      end if;
      -- Above the held amount: all of the account that other holds do not claim, then debt or a refusal.
      if v_charged > v_held then
        v_shortfall := least(9223372036854775807, greatest(0, v_charged - v_held::numeric
          - greatest(0, v_account.balance::numeric + v_left + v_account.credit_limit - v_account.held)));
        if v_shortfall > 0 and v_quote.overrun = 'reject' then
          return ducto_private.charge_refusal('insufficient_credits', v_account, v_shortfall);
        end if;
      end if;
      perform ducto_private.check_range(v_account.balance::numeric + v_used - v_charged, 'the balance', p_account_id);
      v_account.held := v_account.held - v_held;
      if v_hold.status = 'active' and v_hold.expires_at > v_now then
        v_held := case when p_final then 0 else greatest(0, v_held - v_charged) end;
        v_account.held := v_account.held + v_held;
        v_account.holds := v_account.holds - p_final::integer;
      end if;
    end if;

    exit when not v_opens;
    v_account := ducto_private.open_account(v_account, v_quote);
    exit when v_account.account_id is not null;
    v_opens := false;
  end loop;

  if v_due then
    v_account := ducto_private.write_expiry(v_account, v_now);
  end if;
  if v_quote.rounding = 'carry' then
    v_account.carry := trim_scale(v_account.carry + v_quote.cost - v_charged);
  end if;
  if v_used > 0 then
    v_account.allowance_used := v_account.allowance_used + v_used;
  end if;
  v_id := ducto_private.post(v_account, v_now, 'usage', v_used - v_charged, p_key, v_fingerprint, p_metadata, v_quote.cost,
    coalesce(p_model, p_usage ->> 'model'), v_quote.resolved_model, p_usage, v_quote.version, v_quote.plan_id,
    v_hold.reservation_id, p_allowance_used => v_used, p_shortfall => v_shortfall, p_warnings => v_warnings);
  if p_reservation_id is not null then
    update ducto_private.reservations as r
    set charged = r.charged + v_charged,
      held = v_held,
      status = case when p_final then 'settled' else r.status end,
      ended_at = case when p_final then coalesce(r.ended_at, v_now) else r.ended_at end,
      settled_by = case when p_final and p_key is null then v_id end
    where r.reservation_id = v_hold.reservation_id and r.account_id = p_account_id;
  end if;
  return row(v_id, p_account_id, v_used - v_charged, v_account.balance + v_used - v_charged, false, null, v_quote.cost, v_used,
    v_shortfall, coalesce(v_warnings, '{}'::text[]), v_account.revision + 1)::ducto.deduction_result;
end
$$;

create or replace function ducto.deduct(
  p_user_id text,
  p_metrics jsonb,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_reservation_id text default null,
  p_final boolean default true)
returns ducto.deduction_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_balance bigint;
  v_carry numeric;
  v_seq bigint;
  v_revision bigint;
  v_limit bigint;
  v_now timestamptz;
  v_quote ducto_private.quote;
  v_charged bigint;
  v_id uuid;
begin
  -- The plain charge: no hold, and an account that uses nothing but its balance. Lock, decide, write, by the rules of
  -- charge(); whatever is not plain, or not a success, is left to charge(), which begins with the key.
  if p_reservation_id is null and p_metadata is null and p_final is not false and ducto_private.is_plain_usage(p_metrics)
    and (p_idempotency_key is null or ducto_private.is_text(p_idempotency_key))
    and current_setting('transaction_isolation') = 'read committed'
  then
    select a.balance, a.carry, a.seq, a.revision, a.credit_limit, a.changed_at
    into v_balance, v_carry, v_seq, v_revision, v_limit, v_now
    from ducto_private.accounts as a
    where a.account_id = p_user_id and a.plain
    for no key update;
    if found then
      begin
        v_quote := ducto_private.quote(null, p_metrics, null, null, false);
        v_charged := ducto_private.to_credits(v_quote.cost, v_quote.rounding, v_carry);
      exception when others then
        v_charged := null;
      end;
      if ducto_private.admits(v_balance, 0, v_charged, 0, v_quote.min_balance - v_limit) then
        v_now := greatest(ducto_private.clock(), v_now);
        v_id := ducto_private.new_id(v_now);
        if v_quote.rounding = 'carry' then
          v_carry := trim_scale(v_carry + v_quote.cost - v_charged);
        end if;
        insert into ducto_private.transactions (transaction_id, seq, amount, balance_after, allowance_used, revision, created_at,
          writer, pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model, idempotency_key)
        values (v_id, v_seq + 1, -v_charged, v_balance - v_charged, 0, v_revision + 1, v_now, pg_current_xact_id(),
          v_quote.version, p_user_id, 'usage', v_carry, v_quote.cost, p_metrics, p_metrics ->> 'model', v_quote.resolved_model,
          p_idempotency_key)
        on conflict (account_id, idempotency_key) where idempotency_key is not null do nothing;
        if found then
          update ducto_private.accounts as a
          set balance = v_balance - v_charged, carry = v_carry, seq = v_seq + 1, revision = v_revision + 1, changed_at = v_now
          where a.account_id = p_user_id;
          return row(v_id, p_user_id, -v_charged, v_balance - v_charged, false, null, v_quote.cost, 0, 0, '{}'::text[],
            v_revision + 1)::ducto.deduction_result;
        end if;
      end if;
    end if;
  end if;
  return ducto_private.charge('deduct', p_user_id, p_metrics, null, null, null, p_reservation_id, coalesce(p_final, true),
    p_idempotency_key, p_metadata);
end
$$;
comment on function ducto.deduct is
  'Prices a usage and charges it, in one statement: directly, or settling a hold (p_final => false charges a part of it).';

create or replace function ducto.deduct_credits(
  p_user_id text,
  p_amount bigint,
  p_reservation_id text default null,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_model text default null,
  p_final boolean default true)
returns ducto.deduction_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
begin
  perform ducto_private.check_amount(p_amount, 0);
  return ducto_private.charge('deduct_credits', p_user_id, null, null, p_amount, p_model, p_reservation_id,
    coalesce(p_final, true), p_idempotency_key, p_metadata);
end
$$;
comment on function ducto.deduct_credits is 'Charges a known amount, directly or against a hold; 0 settles a hold for nothing.';

create or replace function ducto.deduct_fixed(
  p_user_id text, p_job_name text, p_idempotency_key text default null, p_metadata jsonb default null)
returns ducto.deduction_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
begin
  perform ducto_private.check_text(p_job_name, 'p_job_name');
  return ducto_private.charge('deduct_fixed', p_user_id, jsonb_build_object('fixed_job', p_job_name), p_job_name, null, null,
    null, true, p_idempotency_key, p_metadata);
end
$$;
comment on function ducto.deduct_fixed is 'Charges exactly the credits of a job in the config''s fixed section.';

create or replace function ducto_private.refund_refusal(p_error text, p_account ducto_private.accounts) returns ducto.refund_result
language sql immutable
as $$
  select row(null, null, null, 0, coalesce(p_account.balance, 0), p_error, 0, 0, false, coalesce(p_account.revision, 0))::ducto.refund_result
$$;

create or replace function ducto_private.refund_answer(p_row ducto_private.ledger, p_idempotent boolean)
returns ducto.refund_result
language sql immutable
as $$
  select row(p_row.transaction_id, p_row.refers_to, p_row.account_id, p_row.amount, p_row.balance_after, null,
    -p_row.allowance_used, p_row.allowance_lapsed, p_idempotent, p_row.revision)::ducto.refund_result
$$;

create or replace function ducto.refund_credits(
  p_transaction_id text,
  p_amount bigint default null,
  p_reason text default null,
  p_metadata jsonb default null,
  p_idempotency_key text default null,
  p_user_id text default null)
returns ducto.refund_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_id uuid := ducto_private.to_id(p_transaction_id);
  v_fingerprint bigint;
  v_charge ducto_private.ledger;
  v_account ducto_private.accounts;
  v_row ducto_private.ledger;
  v_now timestamptz;
  v_charged numeric;
  v_refunded numeric;
  v_to_balance bigint;
  v_to_allowance bigint;
  v_restored bigint := 0;
begin
  if p_amount is not null then
    perform ducto_private.check_amount(p_amount, 1);
  end if;
  perform ducto_private.check_short(p_reason, 'p_reason');
  perform ducto_private.check_metadata(p_metadata);
  perform ducto_private.check_key(p_idempotency_key);
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('refund_credits', lower(p_transaction_id), p_amount), 0);
  select t.*
  into v_charge
  from ducto_private.ledger as t
  where t.transaction_id = v_id and (p_user_id is null or t.account_id = p_user_id);
  select a.*
  into v_account
  from ducto_private.accounts as a
  where a.account_id = coalesce(v_charge.account_id, p_user_id)
  for no key update;
  select t.*
  into v_row
  from ducto_private.ledger as t
  where t.account_id = v_account.account_id and t.idempotency_key = p_idempotency_key;
  if found then
    if v_row.fingerprint is distinct from v_fingerprint then
      return ducto_private.refund_refusal('idempotency_conflict', v_account);
    end if;
    return ducto_private.refund_answer(v_row, true);
  end if;
  if v_charge.transaction_id is null then
    return ducto_private.refund_refusal('transaction_not_found', v_account);
  end if;
  v_charged := v_charge.allowance_used::numeric - v_charge.amount;
  if v_charge.type <> 'usage' or v_charged = 0 then
    return ducto_private.refund_refusal('not_refundable', v_account);
  end if;
  select coalesce(sum(t.amount - t.allowance_used::numeric + t.allowance_lapsed), 0), coalesce(sum(t.amount), 0)
  into v_refunded, v_to_balance
  from ducto_private.transaction_details as d
  join ducto_private.ledger as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
  where d.account_id = v_account.account_id and d.refers_to = v_charge.transaction_id and t.type = 'refund';
  if v_refunded >= v_charged then
    return ducto_private.refund_refusal('already_refunded', v_account);
  elsif p_amount > v_charged - v_refunded then
    return ducto_private.refund_refusal('refund_exceeds_original', v_account);
  end if;
  v_now := greatest(ducto_private.clock(), v_account.changed_at);
  v_account := ducto_private.expire(v_account, v_now);

  -- Undone in reverse: the balance's part first, then the allowance's, which lapses once its period is over.
  v_to_allowance := coalesce(p_amount, v_charged - v_refunded);
  v_to_balance := least(v_to_allowance, -v_charge.amount - v_to_balance);
  v_to_allowance := v_to_allowance - v_to_balance;
  if v_to_allowance > 0 and v_charge.created_at >= v_account.allowance_start and v_now < v_account.allowance_end then
    v_restored := least(v_to_allowance, v_account.allowance_used);
    v_account.allowance_used := v_account.allowance_used - v_restored;
  end if;
  perform ducto_private.check_range(v_account.balance::numeric + v_to_balance, 'the balance', v_account.account_id);
  v_id := ducto_private.post(v_account, v_now, 'refund', v_to_balance, p_idempotency_key, v_fingerprint, p_metadata,
    p_model => v_charge.model, p_resolved_model => v_charge.resolved_model, p_refers_to => v_charge.transaction_id,
    p_actor_id => v_charge.actor_id, p_allowance_used => -v_restored, p_allowance_lapsed => v_to_allowance - v_restored,
    p_reason => p_reason);
  v_row := ducto_private.find_transaction(v_id::text, v_account.account_id);
  return ducto_private.refund_answer(v_row, false);
end
$$;
comment on function ducto.refund_credits is
  'Gives back a charge, in full or a part of it; all refunds together never exceed what was charged. What the allowance paid returns to it within its period.';

-- Charges and refunds.
--
-- charge() is the one text of charging, priced or not, with a hold or without: lock, drop what has expired, replay by key,
-- price, cost to credits, admission or settlement, write.

create or replace function ducto_private.charge_refusal(
  p_error text, p_account ducto_private.accounts, p_shortfall bigint default 0) returns ducto.deduction_result
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return row(null, null, 0, coalesce(p_account.balance, 0), false, p_error, 0, 0, p_shortfall, '{}'::text[],
    coalesce(p_account.revision, 0))::ducto.deduction_result;
end
$$;

-- The first answer of a charge again, to the same request.
create or replace function ducto_private.charge_replay(p_id uuid, p_fingerprint bigint, p_account ducto_private.accounts)
returns ducto.deduction_result
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row ducto_private.ledger := ducto_private.find_transaction(p_id::text, p_account.account_id);
begin
  if v_row.type = 'usage' and v_row.fingerprint is null then
    v_row.fingerprint := ducto_private.charge_fingerprint('deduct', v_row.usage, null, null, null, true, null);
  end if;
  if v_row.fingerprint is distinct from p_fingerprint then
    return ducto_private.charge_refusal('idempotency_conflict', p_account);
  end if;
  return row(v_row.transaction_id, coalesce(v_row.actor_id, v_row.account_id), v_row.amount, v_row.balance_after, true, null, v_row.cost,
    v_row.allowance_used, v_row.shortfall, coalesce(v_row.warnings, '{}'), v_row.revision)::ducto.deduction_result;
end
$$;

create or replace function ducto_private.to_credits(p_cost numeric, p_rounding text, p_carry numeric) returns numeric
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return case p_rounding
    when 'carry' then floor(p_carry + p_cost)
    when 'up' then ceil(p_cost)
    when 'down' then floor(p_cost)
    else floor(p_cost + 0.5) end;
end
$$;

-- What makes two charges the same request.
create or replace function ducto_private.charge_fingerprint(
  p_call text, p_usage jsonb, p_amount bigint, p_model text, p_reservation_id text, p_final boolean, p_member text) returns bigint
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return jsonb_hash_extended(jsonb_build_array(p_call, p_usage, p_amount, p_model, lower(p_reservation_id), p_final, p_member), 0);
end
$$;

-- The refusal that misuse is in a batch; null for what fails the whole batch.
create or replace function ducto_private.batch_error(p_sqlstate text) returns text
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return case p_sqlstate
    when '22023' then 'invalid_argument'
    when '22003' then 'out_of_range'
    when 'DU003' then 'unknown_model'
    when 'DU004' then 'unknown_job'
    when 'DU005' then 'unknown_metric'
    when 'DU006' then 'formula_error' end;
end
$$;

-- PL/pgSQL prepares each expression once per transaction, and a charge is one: hence few statements. A team's pool is
-- charged for p_member. In a batch, misuse is a refusal.
create or replace function ducto_private.charge(
  p_call text,
  p_account_id text,
  p_member text,
  p_usage jsonb,
  p_job text,
  p_amount bigint,
  p_model text,
  p_reservation_id text,
  p_final boolean,
  p_key text,
  p_metadata jsonb,
  p_batch boolean default false)
returns ducto.deduction_result
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fingerprint bigint;
  v_account ducto_private.accounts;
  v_member ducto_private.team_members;
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
  v_debit bigint;
  v_held bigint := 0;
  v_shortfall bigint := 0;
  v_models text[];
  v_exceeded ducto_private.spend_caps[];
  v_warnings text[];
  v_error text;
begin
  perform ducto_private.check_request(p_usage, p_amount is null and p_job is null, p_model, p_key, p_metadata);
  if p_key is not null or p_reservation_id is not null then
    v_fingerprint := ducto_private.charge_fingerprint(p_call, p_usage, p_amount, p_model, p_reservation_id, p_final, p_member);
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
      v_now := greatest(clock_timestamp(), v_account.changed_at);
      if v_account.holds + v_account.lots > 0 and ducto_private.is_due(v_account, v_now) then
        v_due := true;
        v_account := ducto_private.drop_expired(v_account, v_now);
      end if;
      if p_key is not null then
        select t.transaction_id
        into v_id
        from ducto_private.transactions as t
        where t.account_id = p_account_id and t.idempotency_key = p_key;
        if found then
          return ducto_private.charge_replay(v_id, v_fingerprint, v_account);
        end if;
      end if;
      if v_account.kind = 'team' and p_member is null then
        return ducto_private.charge_refusal('is_a_team', v_account);
      end if;
    else
      perform ducto_private.check_text(p_account_id, 'p_user_id');
      v_opens := p_member is null;
      v_account := ducto_private.would_open(p_account_id);
      if v_opens and v_account.account_id is null then
        return ducto_private.charge_refusal('account_not_found', v_account);
      end if;
    end if;
    if p_member is not null and v_account.kind is distinct from 'team' then
      return ducto_private.charge_refusal('team_not_found', null);
    end if;

    if p_reservation_id is not null then
      v_hold := ducto_private.find_hold(p_reservation_id, p_account_id);
      if v_hold.reservation_id is null or v_hold.actor_id is distinct from p_member then
        return ducto_private.charge_refusal('reservation_not_found', v_account);
      elsif v_hold.settled_by is not null and p_key is null and p_final then
        -- The end of a hold is the key of the keyless call that ended it.
        return ducto_private.charge_replay(v_hold.settled_by, v_fingerprint, v_account);
      elsif v_hold.status in ('settled', 'released') then
        return ducto_private.charge_refusal('reservation_not_active', v_account);
      end if;
    end if;
    if p_member is not null then
      v_member := ducto_private.find_member(p_account_id, p_member);
      if p_reservation_id is null and (v_member.user_id is null or v_member.left_at is not null) then
        return ducto_private.charge_refusal('not_a_member', v_account);
      end if;
    end if;

    begin
      v_quote := ducto_private.fresh_quote(v_hold.pricing_version,
        case when p_model is null then p_usage else jsonb_build_object('model', p_model) end,
        case when p_model is null then p_job else '' end,
        case when p_reservation_id is null then v_account.plan_id else v_hold.plan_id end, v_opens);
      if v_opens then
        v_account := ducto_private.unopened(p_account_id, v_quote);
        v_now := v_account.changed_at;
      end if;
      if p_amount is not null then
        v_quote.cost := p_amount;
      end if;
      v_charged := ducto_private.to_credits(v_quote.cost, v_quote.rounding, v_account.carry);
      if v_account.plan_id is not null then
        v_terms := v_quote;
        if p_reservation_id is not null then
          v_terms := ducto_private.terms(v_account.plan_id, false);
        end if;
        v_account := ducto_private.roll_allowance(v_account, v_now, v_terms.timezone);
        v_left := ducto_private.allowance_left(v_account, v_terms);
        v_used := least(v_charged, v_left);
      end if;
      v_debit := v_charged - v_used;
      if p_reservation_id is not null then
        perform ducto_private.check_range(v_account.balance::numeric - v_debit, 'the balance', p_account_id);
      end if;
    exception when others then
      v_error := ducto_private.batch_error(sqlstate);
      if p_batch and v_error is not null then
        return ducto_private.charge_refusal(v_error, v_account);
      end if;
      raise;
    end;

    if v_account.caps > 0 then
      v_models := array['', coalesce(p_model, p_usage ->> 'model'), v_quote.resolved_model];
    end if;
    if p_reservation_id is null then
      if v_account.caps > 0 then
        v_exceeded := ducto_private.caps_exceeded(v_account, v_now, v_quote.timezone, v_models, v_charged, v_left);
      end if;
      v_error := ducto_private.admission_error(v_account, v_member, v_now, v_quote, v_exceeded, v_charged, v_left, null);
      if v_error is not null then
        return ducto_private.charge_refusal(v_error, v_account);
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
    end if;

    exit when not v_opens;
    v_account := ducto_private.open_account(v_account, v_quote);
    exit when v_account.account_id is not null;
    v_opens := false;
  end loop;

  if v_due then
    v_account := ducto_private.write_expiry(v_account, v_now);
  end if;
  v_id := ducto_private.new_id();
  if v_account.lots > 0 and v_debit > 0 then
    v_account := ducto_private.burn(v_account, v_now, v_id, v_debit, v_held, v_hold.created_at);
  end if;
  if p_reservation_id is not null and v_hold.status = 'active' and v_hold.expires_at > v_now then
    v_hold.held := case when p_final then 0 else greatest(0, v_held - v_charged) end;
    v_account := ducto_private.let_go(v_account, v_held - v_hold.held, p_final, v_now);
  else
    v_hold.held := 0;
  end if;
  if v_account.caps > 0 and ducto_private.count_caps(p_account_id, v_now, v_quote.timezone, v_models, v_debit,
    case when p_reservation_id is null then v_exceeded end)
  then
    v_warnings := v_warnings || '{spend_cap_exceeded}'::text[];
  end if;
  if p_member is not null and ducto_private.count_member(v_member, v_now, v_quote.timezone, v_debit, v_now) then
    v_warnings := v_warnings || '{member_cap_exceeded}'::text[];
  end if;
  if v_quote.rounding = 'carry' then
    v_account.carry := trim_scale(v_account.carry + v_quote.cost - v_charged);
  end if;
  v_account.allowance_used := v_account.allowance_used + v_used;
  v_id := ducto_private.post(v_account, v_now, 'usage', -v_debit, p_key, v_fingerprint, p_metadata, v_quote.cost,
    coalesce(p_model, p_usage ->> 'model'), v_quote.resolved_model, p_usage, v_quote.version, v_quote.plan_id,
    v_hold.reservation_id, p_actor_id => p_member, p_allowance_used => v_used, p_shortfall => v_shortfall,
    p_warnings => v_warnings, p_id => v_id,
    p_low_balance => case when p_reservation_id is null then v_quote.low_balance else v_terms.low_balance end);
  if p_reservation_id is not null then
    update ducto_private.reservations as r
    set charged = r.charged + v_charged,
      held = v_hold.held,
      status = case when p_final then 'settled' else r.status end,
      ended_at = case when p_final then coalesce(r.ended_at, v_now) else r.ended_at end,
      settled_by = case when p_final and p_key is null then v_id end
    where r.reservation_id = v_hold.reservation_id and r.account_id = p_account_id;
  end if;
  return row(v_id, coalesce(p_member, p_account_id), -v_debit, v_account.balance - v_debit, false, null, v_quote.cost, v_used,
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
  v_start constant timestamptz := clock_timestamp();
  v_price ducto_private.plain_price;
  v_balance bigint;
  v_carry numeric;
  v_seq bigint;
  v_revision bigint;
  v_now timestamptz;
  v_charged bigint;
  v_id uuid;
begin
  -- The plain charge: no hold, an account that uses nothing but its balance, and enough of that. Price, lock and decide,
  -- write, by the rules of charge(); whatever is not plain, or not a success, or tells an event, is left to charge().
  if p_reservation_id is null and p_metadata is null and p_final is not false
    and (p_idempotency_key is null
      or p_idempotency_key collate "C" >= '!' and p_idempotency_key collate "C" < '~' and octet_length(p_idempotency_key) < 256)
    and current_setting('transaction_isolation') = 'read committed'
    and pg_relation_size('ducto_private.plain_price'::regclass) is distinct from -1
  then
    v_price := ducto_private.plain_price(p_metrics);
    if v_price.cost > 0 then
      update ducto_private.accounts as a
      set balance = a.balance - floor(a.carry + v_price.credits)::bigint,
        carry = trim_scale(mod(a.carry + v_price.credits, 1)),
        seq = a.seq + 1,
        revision = a.revision + 1,
        changed_at = greatest(clock_timestamp(), a.changed_at)
      where a.account_id = p_user_id and a.plain and a.balance - v_price.credits >= v_price.least_left
      returning a.balance, a.carry, a.seq, a.revision, a.changed_at
      into v_balance, v_carry, v_seq, v_revision, v_now;
      if found then
        v_charged := ceil(v_price.credits - v_carry);
        -- The price may be from before a long wait for the account: then charge() reads it again.
        if clock_timestamp() < v_start + interval '1 second' then
          insert into ducto_private.transactions (seq, amount, balance_after, allowance_used, revision,
            created_at, pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model, idempotency_key)
          values (v_seq, -v_charged, v_balance, 0, v_revision, v_now, v_price.version, p_user_id, 'usage',
            v_carry, v_price.cost, p_metrics, p_metrics ->> 'model', v_price.resolved_model, p_idempotency_key)
          on conflict (account_id, idempotency_key) where idempotency_key is not null do nothing
          returning transaction_id into v_id;
          if found then
            return row(v_id, p_user_id, -v_charged, v_balance, false, null, v_price.cost, 0, 0, '{}'::text[],
              v_revision)::ducto.deduction_result;
          end if;
        end if;
        -- That, or the key is taken: undone, for charge() to answer. The clock of the account does not go back.
        update ducto_private.accounts as a
        set balance = v_balance + v_charged,
          carry = trim_scale(v_carry + v_charged - v_price.credits),
          seq = v_seq - 1,
          revision = v_revision - 1
        where a.account_id = p_user_id;
      end if;
    end if;
  end if;
  return ducto_private.charge('deduct', p_user_id, null, p_metrics, null, null, null, p_reservation_id, coalesce(p_final, true),
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
  return ducto_private.charge('deduct_credits', p_user_id, null, null, null, p_amount, p_model, p_reservation_id,
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
  return ducto_private.charge('deduct_fixed', p_user_id, null, jsonb_build_object('fixed_job', p_job_name), p_job_name, null, null,
    null, true, p_idempotency_key, p_metadata);
end
$$;
comment on function ducto.deduct_fixed is 'Charges exactly the credits of a job in the config''s fixed section.';

-- The shape of a batch's element; what its parts mean is checked as in a single call.
create or replace function ducto_private.check_element(p_charge jsonb) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key text;
  v_type text;
begin
  if jsonb_typeof(p_charge) <> 'object' then
    perform ducto_private.invalid('an element of p_charges must be a JSON object', 'Pass {"user_id": …, "metrics": {…}}.');
  end if;
  for v_key, v_type in
    select e.key, jsonb_typeof(e.value) from jsonb_each(p_charge) as e where jsonb_typeof(e.value) <> 'null'
  loop
    if v_type is distinct from (case
      when v_key in ('user_id', 'team_id', 'model', 'job', 'reservation_id', 'idempotency_key') then 'string'
      when v_key = 'amount' then 'number'
      when v_key = 'final' then 'boolean'
      when v_key in ('metrics', 'metadata') then 'object' end)
    then
      perform ducto_private.invalid(format('an element of p_charges cannot have %s of type %s', left(v_key, 100), v_type),
        'It has user_id, with team_id where a team pays, one of metrics, amount or job, and reservation_id, final, model (of an '
        'amount), idempotency_key, metadata.');
    end if;
  end loop;
  if num_nonnulls(nullif(p_charge -> 'metrics', 'null'), p_charge ->> 'amount', p_charge ->> 'job') <> 1
    or p_charge ->> 'model' is not null and p_charge ->> 'amount' is null
  then
    perform ducto_private.invalid('an element of p_charges has either metrics, an amount or a job',
      'A model goes with an amount; a usage names its own.');
  elsif (p_charge ->> 'amount')::numeric % 1 <> 0 then
    perform ducto_private.invalid('amount must be whole', 'Amounts are whole credits.');
  elsif (p_charge ->> 'amount')::numeric not between 0 and 9223372036854775807 then
    perform ducto_private.invalid('amount must be at least 0 and within bigint', 'Amounts are whole credits.');
  end if;
  perform ducto_private.check_text(p_charge ->> 'user_id', 'user_id');
  if p_charge ->> 'team_id' is not null then
    perform ducto_private.check_text(p_charge ->> 'team_id', 'team_id');
  end if;
  if p_charge ->> 'job' is not null then
    perform ducto_private.check_text(p_charge ->> 'job', 'job');
  end if;
end
$$;

create or replace function ducto.deduct_batch(p_charges jsonb) returns setof ducto.deduction_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_ids text[];
  v_charge jsonb;
  v_account_id text;
  v_member text;
  v_call text;
  v_usage jsonb;
  v_amount bigint;
  v_error text;
begin
  if jsonb_typeof(p_charges) is distinct from 'array' then
    perform ducto_private.invalid(format('p_charges must be a JSON list, not %s', coalesce(jsonb_typeof(p_charges), 'null')),
      'Pass [{"user_id": …, "metrics": {…}}, …].');
  elsif jsonb_array_length(p_charges) > 10000 then
    perform ducto_private.invalid(format('p_charges has %s elements; at most 10000 are charged at once', jsonb_array_length(p_charges)),
      'Charge them in several calls.');
  end if;
  perform ducto_private.quote(null, null, null, null, false);
  -- All accounts are locked before any is changed, always in the same order; those not yet open by their name.
  v_ids := array(
    select distinct coalesce(c.value ->> 'team_id', c.value ->> 'user_id') collate "C" as id
    from jsonb_array_elements(p_charges) as c (value)
    where jsonb_typeof(c.value) = 'object' and coalesce(c.value ->> 'team_id', c.value ->> 'user_id') is not null
    order by id);
  foreach v_account_id in array v_ids loop
    if (ducto_private.lock_account(v_account_id)).account_id is null then
      perform pg_advisory_xact_lock(hashtextextended(v_account_id, 7235512));
      perform ducto_private.lock_account(v_account_id);
    end if;
  end loop;
  for v_charge in
    select c.value from jsonb_array_elements(p_charges) with ordinality as c (value, place) order by c.place
  loop
    v_account_id := null;
    begin
      perform ducto_private.check_element(v_charge);
      v_member := case when v_charge ->> 'team_id' is not null then v_charge ->> 'user_id' end;
      v_account_id := coalesce(v_charge ->> 'team_id', v_charge ->> 'user_id');
      v_amount := (v_charge ->> 'amount')::bigint;
      v_call := case when v_charge ->> 'job' is not null then 'deduct_fixed' else 'deduct' end
        || case when v_member is not null then '_team' else '' end
        || case when v_amount is not null then '_credits' else '' end;
      v_usage := case when v_charge ->> 'job' is not null then jsonb_build_object('fixed_job', v_charge -> 'job')
        else nullif(v_charge -> 'metrics', 'null') end;
      perform ducto_private.check_request(v_usage, v_call in ('deduct', 'deduct_team'), v_charge ->> 'model',
        v_charge ->> 'idempotency_key', nullif(v_charge -> 'metadata', 'null'));
      v_error := null;
    exception when others then
      v_error := ducto_private.batch_error(sqlstate);
      if v_error is null then
        raise;
      end if;
    end;
    if v_error is not null then
      return next ducto_private.charge_refusal(v_error, ducto_private.as_read(v_account_id));
    else
      return next ducto_private.charge(v_call, v_account_id, v_member, v_usage, v_charge ->> 'job', v_amount,
        v_charge ->> 'model', v_charge ->> 'reservation_id', coalesce((v_charge ->> 'final')::boolean, true),
        v_charge ->> 'idempotency_key', nullif(v_charge -> 'metadata', 'null'), true);
    end if;
  end loop;
end
$$;
comment on function ducto.deduct_batch is
  'Many charges in one call and one transaction, in order: each stands or is refused by itself, as if called one by one.';

create or replace function ducto_private.refund_refusal(p_error text, p_account ducto_private.accounts) returns ducto.refund_result
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return row(null, null, null, 0, coalesce(p_account.balance, 0), p_error, 0, 0, false, coalesce(p_account.revision, 0))::ducto.refund_result;
end
$$;

create or replace function ducto_private.refund_answer(p_row ducto_private.ledger, p_idempotent boolean)
returns ducto.refund_result
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return row(p_row.transaction_id, p_row.refers_to, p_row.account_id, p_row.amount, p_row.balance_after, null,
    -p_row.allowance_used, p_row.allowance_lapsed, p_idempotent, p_row.revision)::ducto.refund_result;
end
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
  v_id uuid;
  v_fingerprint bigint;
  v_charge ducto_private.ledger;
  v_account ducto_private.accounts;
  v_row ducto_private.ledger;
  v_now timestamptz;
  v_due boolean;
  v_zone text;
  v_charged numeric;
  v_refunded numeric;
  v_to_balance bigint;
  v_to_allowance bigint;
  v_restored bigint := 0;
  v_from_lots bigint;
  v_given bigint;
  v_left numeric;
begin
  perform ducto_private.check_amount(coalesce(p_amount, 1), 1);
  perform ducto_private.check_short(p_reason, 'p_reason');
  perform ducto_private.check_metadata(p_metadata);
  perform ducto_private.check_key(p_idempotency_key);
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('refund_credits', lower(p_transaction_id), p_amount), 0);
  v_charge := ducto_private.find_transaction(p_transaction_id, p_user_id);
  v_account := ducto_private.lock_account(coalesce(v_charge.account_id, p_user_id));
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_due := ducto_private.is_due(v_account, v_now);
  if v_due then
    v_account := ducto_private.drop_expired(v_account, v_now);
  end if;
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
  select coalesce(sum(t.amount - t.allowance_used::numeric + d.allowance_lapsed), 0), coalesce(sum(t.amount), 0)
  into v_refunded, v_given
  from ducto_private.transaction_details as d
  join ducto_private.transactions as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
  where d.account_id = v_account.account_id and d.refers_to = v_charge.transaction_id and t.type = 'refund';
  if v_refunded >= v_charged then
    return ducto_private.refund_refusal('already_refunded', v_account);
  elsif p_amount > v_charged - v_refunded then
    return ducto_private.refund_refusal('refund_exceeds_original', v_account);
  end if;

  -- Undone in reverse: the balance's part first, then the allowance's, which lapses once its period is over.
  v_to_allowance := coalesce(p_amount, v_charged - v_refunded);
  v_to_balance := least(v_to_allowance, -v_charge.amount - v_given);
  v_to_allowance := v_to_allowance - v_to_balance;
  perform ducto_private.check_range(v_account.balance::numeric + v_to_balance, 'the balance', v_account.account_id);
  if v_due then
    v_account := ducto_private.write_expiry(v_account, v_now);
  end if;
  if v_to_allowance > 0 and v_charge.created_at >= v_account.allowance_start and v_now < v_account.allowance_end then
    v_restored := least(v_to_allowance, v_account.allowance_used);
    v_account.allowance_used := v_account.allowance_used - v_restored;
  end if;
  v_id := ducto_private.new_id();

  -- Of the balance's part, what came from no lot first; a debt takes its share before lots get any back.
  v_from_lots := (
    select coalesce(-sum(e.amount), 0)
    from ducto_private.lot_entries as e
    where e.transaction_id = v_charge.transaction_id and e.account_id = v_account.account_id);
  if v_from_lots > 0 then
    v_left := v_to_balance - greatest(0, ducto_private.kept(v_account, v_now) - v_account.balance::numeric);
    v_account := ducto_private.restore_lots(v_account, v_now, v_id, v_charge.transaction_id,
      v_given + v_to_balance + v_charge.amount + v_from_lots, v_left);
  end if;
  if (v_account.caps > 0 or v_charge.actor_id is not null) and v_to_balance > 0 then
    v_zone := ducto_private.first_zone();
    -- Out of the windows of which the charge was.
    update ducto_private.spend_caps as s
    set spent = n.spent - v_to_balance, window_date = n.window_date
    from ducto_private.caps_now(v_account.account_id, v_now, v_zone, array['', v_charge.model, v_charge.resolved_model]) as n
    where s.account_id = v_account.account_id and s.model = n.model and s.cap_type = n.cap_type
      and n.window_date = ducto_private.window_of(n.cap_type, v_charge.created_at, v_zone);
    if v_charge.actor_id is not null then
      perform ducto_private.count_member(ducto_private.find_member(v_account.account_id, v_charge.actor_id), v_now, v_zone,
        -v_to_balance, v_charge.created_at);
    end if;
  end if;
  perform ducto_private.post(v_account, v_now, 'refund', v_to_balance, p_idempotency_key, v_fingerprint, p_metadata,
    p_model => v_charge.model, p_resolved_model => v_charge.resolved_model, p_refers_to => v_charge.transaction_id,
    p_actor_id => v_charge.actor_id, p_allowance_used => -v_restored, p_allowance_lapsed => v_to_allowance - v_restored,
    p_reason => p_reason, p_id => v_id);
  v_row := ducto_private.find_transaction(v_id::text, v_account.account_id);
  return ducto_private.refund_answer(v_row, false);
end
$$;
comment on function ducto.refund_credits is
  'Gives back a charge, in full or a part of it; all refunds together never exceed what was charged. What the allowance paid returns to it within its period.';

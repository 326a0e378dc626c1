-- Holds: credits claimed before the work is done. They expire by predicate: past its time a hold counts nowhere,
-- whether or not anything has recorded that.

create or replace function ducto_private.hold_refusal(p_error text, p_account ducto_private.accounts) returns ducto.reserve_result
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return row(null, null, 0, coalesce(p_account.balance, 0), coalesce(p_account.held, 0), p_error, false, null, '{}'::text[],
    coalesce(p_account.revision, 0))::ducto.reserve_result;
end
$$;

-- A hold's or an extension's answer as its key remembers it.
create or replace function ducto_private.hold_replay(
  p_key ducto_private.hold_keys, p_fingerprint bigint, p_account ducto_private.accounts) returns ducto.reserve_result
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_hold ducto_private.reservations;
begin
  if p_key.fingerprint <> p_fingerprint then
    return ducto_private.hold_refusal('idempotency_conflict', p_account);
  end if;
  v_hold := ducto_private.find_hold(p_key.reservation_id::text, p_key.account_id);
  return row(p_key.reservation_id, coalesce(v_hold.actor_id, p_key.account_id), p_key.amount, p_key.balance, p_key.reserved_total, null, true,
    p_key.expires_at, coalesce(p_key.warnings, '{}'), p_key.revision)::ducto.reserve_result;
end
$$;

-- Saves an account with a hold taken or extended, remembers the key, and answers.
create or replace function ducto_private.save_hold(
  p_account ducto_private.accounts,
  p_now timestamptz,
  p_hold ducto_private.reservations,
  p_key text,
  p_fingerprint bigint,
  p_warnings text[])
returns ducto.reserve_result
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform ducto_private.save(p_account, p_now);
  p_account.revision := p_account.revision + 1;
  if p_key is not null then
    insert into ducto_private.hold_keys (account_id, idempotency_key, fingerprint, reservation_id, amount, balance, reserved_total,
      revision, expires_at, warnings)
    values (p_account.account_id, p_key, p_fingerprint, p_hold.reservation_id, p_hold.held, p_account.balance, p_account.held,
      p_account.revision, p_hold.expires_at, p_warnings);
  end if;
  return row(p_hold.reservation_id, coalesce(p_hold.actor_id, p_account.account_id), p_hold.held, p_account.balance, p_account.held, null, false,
    p_hold.expires_at, coalesce(p_warnings, '{}'::text[]), p_account.revision)::ducto.reserve_result;
end
$$;

create or replace function ducto_private.check_ttl(p_ttl_seconds integer) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_ttl_seconds not between 1 and 2592000 then
    perform ducto_private.invalid(format('p_ttl_seconds must be between 1 and 2592000 (30 days), not %s', p_ttl_seconds),
      'Take a hold for as long as the work may last, and extend it if it lasts longer.');
  end if;
end
$$;

-- The one text of holding: an estimate (p_usage) or a known amount, of a user's account or, for p_member, of a team's.
create or replace function ducto_private.hold(
  p_call text,
  p_account_id text,
  p_member text,
  p_usage jsonb,
  p_amount bigint,
  p_model text,
  p_operation_type text,
  p_metadata jsonb,
  p_min_balance bigint,
  p_ttl_seconds integer,
  p_key text)
returns ducto.reserve_result
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_fingerprint bigint;
  v_account ducto_private.accounts;
  v_member ducto_private.team_members;
  v_opens boolean := false;
  v_key ducto_private.hold_keys;
  v_quote ducto_private.quote;
  v_now timestamptz;
  v_due boolean := false;
  v_left bigint;
  v_hold ducto_private.reservations;
  v_models text[];
  v_exceeded ducto_private.spend_caps[];
  v_warnings text[];
  v_error text;
begin
  perform ducto_private.check_request(p_usage, p_amount is null, p_model, p_key, p_metadata);
  perform ducto_private.check_text(p_operation_type, 'p_operation_type');
  perform ducto_private.check_ttl(p_ttl_seconds);
  if p_min_balance is not null then
    perform ducto_private.check_amount(p_min_balance, 0, 'p_min_balance');
  end if;
  if p_key is not null then
    v_fingerprint := jsonb_hash_extended(jsonb_build_array(p_call, p_usage, p_amount, p_model, p_operation_type, p_member), 0);
  end if;
  loop
    select a.*
    into v_account
    from ducto_private.accounts as a
    where a.account_id = p_account_id
    for no key update;
    if found then
      v_now := greatest(clock_timestamp(), v_account.changed_at);
      v_due := v_account.holds + v_account.lots > 0 and ducto_private.is_due(v_account, v_now);
      if v_due then
        v_account := ducto_private.drop_expired(v_account, v_now);
      end if;
      if p_key is not null then
        select k.*
        into v_key
        from ducto_private.hold_keys as k
        where k.account_id = p_account_id and k.idempotency_key = p_key;
        if found then
          return ducto_private.hold_replay(v_key, v_fingerprint, v_account);
        end if;
      end if;
      if v_account.kind = 'team' and p_member is null then
        return ducto_private.hold_refusal('is_a_team', v_account);
      end if;
    else
      perform ducto_private.check_text(p_account_id, 'p_user_id');
      v_opens := p_member is null;
      v_account := ducto_private.would_open(p_account_id);
      if v_opens and v_account.account_id is null then
        return ducto_private.hold_refusal('account_not_found', v_account);
      end if;
    end if;
    if p_member is not null then
      if v_account.kind is distinct from 'team' then
        return ducto_private.hold_refusal('team_not_found', null);
      end if;
      v_member := ducto_private.find_member(p_account_id, p_member);
      if v_member.user_id is null or v_member.left_at is not null then
        return ducto_private.hold_refusal('not_a_member', v_account);
      end if;
    end if;

    v_quote := ducto_private.fresh_quote(null,
      case when p_model is null then p_usage else jsonb_build_object('model', p_model) end,
      case when p_model is not null then '' end, v_account.plan_id, v_opens);
    if v_opens then
      v_account := ducto_private.unopened(p_account_id, v_quote);
      v_now := v_account.changed_at;
    end if;
    if v_account.plan_id is not null then
      v_account := ducto_private.roll_allowance(v_account, v_now, v_quote.timezone);
    end if;
    v_left := ducto_private.allowance_left(v_account, v_quote);
    v_hold.actor_id := p_member;
    v_hold.held := coalesce(p_amount, ceil(v_quote.cost));
    v_hold.model := coalesce(p_model, p_usage ->> 'model');
    if v_account.caps > 0 then
      v_models := array['', v_hold.model, v_quote.resolved_model];
      v_exceeded := ducto_private.caps_exceeded(v_account, v_now, v_quote.timezone, v_models, v_hold.held, v_left);
    end if;
    v_error := ducto_private.admission_error(v_account, v_member, v_now, v_quote, v_exceeded, v_hold.held, v_left, p_min_balance);
    if v_error is not null then
      return ducto_private.hold_refusal(v_error, v_account);
    end if;

    exit when not v_opens;
    v_account := ducto_private.open_account(v_account, v_quote);
    exit when v_account.account_id is not null;
    v_opens := false;
  end loop;

  if v_due then
    v_account := ducto_private.write_expiry(v_account, v_now);
  end if;
  if cardinality(v_exceeded) > 0 then
    v_warnings := '{spend_cap_exceeded}'::text[];
    perform ducto_private.count_caps(p_account_id, v_now, v_quote.timezone, v_models, 0, v_exceeded);
  end if;
  v_hold.reservation_id := ducto_private.new_id();
  v_hold.expires_at := v_now + make_interval(secs => p_ttl_seconds);
  insert into ducto_private.reservations (reservation_id, account_id, actor_id, held, created_at, expires_at, min_balance,
    pricing_version, plan_id, operation_type, model, resolved_model, metrics, metadata, idempotency_key)
  values (v_hold.reservation_id, p_account_id, v_hold.actor_id, v_hold.held, v_now, v_hold.expires_at, p_min_balance, v_quote.version,
    v_account.plan_id, p_operation_type, v_hold.model, v_quote.resolved_model, p_usage, p_metadata, p_key);
  perform ducto_private.check_range(v_account.held::numeric + v_hold.held, 'the holds', p_account_id);
  v_account.held := v_account.held + v_hold.held;
  v_account.holds := v_account.holds + 1;
  v_account.holds_due_at := least(v_account.holds_due_at, v_hold.expires_at);
  return ducto_private.save_hold(v_account, v_now, v_hold, p_key, v_fingerprint, v_warnings);
end
$$;

create or replace function ducto.reserve(
  p_user_id text,
  p_metrics jsonb,
  p_operation_type text default 'usage',
  p_metadata jsonb default null,
  p_min_balance bigint default null,
  p_ttl_seconds integer default 600,
  p_idempotency_key text default null)
returns ducto.reserve_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
begin
  return ducto_private.hold('reserve', p_user_id, null, p_metrics, null, null, coalesce(p_operation_type, 'usage'), p_metadata,
    p_min_balance, coalesce(p_ttl_seconds, 600), p_idempotency_key);
end
$$;
comment on function ducto.reserve is
  'Prices an estimated usage and holds ceil(cost) credits for p_ttl_seconds, before the work is done. Settle with deduct(p_reservation_id => …).';

create or replace function ducto.reserve_credits(
  p_user_id text,
  p_amount bigint,
  p_operation_type text default 'usage',
  p_metadata jsonb default null,
  p_min_balance bigint default null,
  p_ttl_seconds integer default 600,
  p_idempotency_key text default null,
  p_model text default null)
returns ducto.reserve_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
begin
  perform ducto_private.check_amount(p_amount, 0);
  return ducto_private.hold('reserve_credits', p_user_id, null, null, p_amount, p_model, coalesce(p_operation_type, 'usage'),
    p_metadata, p_min_balance, coalesce(p_ttl_seconds, 600), p_idempotency_key);
end
$$;
comment on function ducto.reserve_credits is 'Holds a known amount of credits for p_ttl_seconds; 0 is a valid hold.';

-- Finds a hold by its id, of p_user_id only where that is given.
create or replace function ducto_private.find_hold(p_reservation_id text, p_user_id text) returns ducto_private.reservations
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id uuid := ducto_private.to_id(p_reservation_id);
  v_hold ducto_private.reservations;
begin
  select r.*
  into v_hold
  from ducto_private.reservations as r
  where r.reservation_id = v_id and (p_user_id is null or r.account_id = p_user_id);
  return v_hold;
end
$$;

-- An account that a hold claims p_amount less of. Lots that were due and kept for it may expire now.
create or replace function ducto_private.let_go(
  p_account ducto_private.accounts, p_amount bigint, p_ends boolean, p_now timestamptz)
returns ducto_private.accounts
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  p_account.held := p_account.held - p_amount;
  p_account.holds := p_account.holds - p_ends::integer;
  if p_account.lots > 0 then
    p_account.lots_due_at := p_now;
  end if;
  return p_account;
end
$$;

create or replace function ducto.extend_reservation(
  p_reservation_id text,
  p_add_amount bigint default 0,
  p_ttl_seconds integer default null,
  p_user_id text default null,
  p_idempotency_key text default null)
returns ducto.reserve_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_add bigint := coalesce(p_add_amount, 0);
  v_fingerprint bigint;
  v_account ducto_private.accounts;
  v_key ducto_private.hold_keys;
  v_hold ducto_private.reservations;
  v_member ducto_private.team_members;
  v_terms ducto_private.quote;
  v_now timestamptz;
  v_due boolean;
  v_left bigint;
  v_models text[];
  v_exceeded ducto_private.spend_caps[];
  v_warnings text[];
  v_error text;
begin
  perform ducto_private.check_amount(v_add, 0, 'p_add_amount');
  perform ducto_private.check_ttl(p_ttl_seconds);
  perform ducto_private.check_key(p_idempotency_key);
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('extend_reservation', v_add, lower(p_reservation_id)), 0);
  v_account := ducto_private.lock_account(
    coalesce((ducto_private.find_hold(p_reservation_id, p_user_id)).account_id, p_user_id));
  if v_account.account_id is null then
    return ducto_private.hold_refusal('reservation_not_found', v_account);
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_due := ducto_private.is_due(v_account, v_now);
  if v_due then
    v_account := ducto_private.drop_expired(v_account, v_now);
  end if;
  if p_idempotency_key is not null then
    select k.*
    into v_key
    from ducto_private.hold_keys as k
    where k.account_id = v_account.account_id and k.idempotency_key = p_idempotency_key;
    if found then
      return ducto_private.hold_replay(v_key, v_fingerprint, v_account);
    end if;
  end if;
  v_hold := ducto_private.find_hold(p_reservation_id, v_account.account_id);
  if v_hold.reservation_id is null then
    return ducto_private.hold_refusal('reservation_not_found', v_account);
  elsif v_hold.status <> 'active' or v_hold.expires_at <= v_now then
    return ducto_private.hold_refusal('reservation_not_active', v_account);
  end if;
  if v_hold.actor_id is not null and v_add > 0 then
    v_member := ducto_private.find_member(v_account.account_id, v_hold.actor_id);
    if v_member.left_at is not null then
      return ducto_private.hold_refusal('not_a_member', v_account);
    end if;
  end if;
  v_terms := ducto_private.terms(v_account.plan_id, false);
  if v_account.plan_id is not null then
    v_account := ducto_private.roll_allowance(v_account, v_now, v_terms.timezone);
  end if;
  v_left := ducto_private.allowance_left(v_account, v_terms);
  if v_account.caps > 0 then
    v_models := array['', v_hold.model, v_hold.resolved_model];
    v_exceeded := ducto_private.caps_exceeded(v_account, v_now, v_terms.timezone, v_models, v_add, v_left);
  end if;
  v_error := ducto_private.admission_error(v_account, v_member, v_now, v_terms, v_exceeded, v_add, v_left, v_hold.min_balance);
  if v_error is not null then
    return ducto_private.hold_refusal(v_error, v_account);
  end if;
  if v_due then
    v_account := ducto_private.write_expiry(v_account, v_now);
  end if;
  if cardinality(v_exceeded) > 0 then
    v_warnings := '{spend_cap_exceeded}'::text[];
    perform ducto_private.count_caps(v_account.account_id, v_now, v_terms.timezone, v_models, 0, v_exceeded);
  end if;
  perform ducto_private.check_range(v_account.held::numeric + v_add, 'the holds', v_account.account_id);
  v_hold.held := v_hold.held + v_add;
  v_hold.expires_at := greatest(v_hold.expires_at, v_now + make_interval(secs => p_ttl_seconds));
  update ducto_private.reservations as r
  set held = v_hold.held, expires_at = v_hold.expires_at
  where r.reservation_id = v_hold.reservation_id and r.account_id = v_hold.account_id;
  v_account.held := v_account.held + v_add;
  return ducto_private.save_hold(v_account, v_now, v_hold, p_idempotency_key, v_fingerprint, v_warnings);
end
$$;
comment on function ducto.extend_reservation is
  'Adds credits or time to an active hold. Added credits are admitted like a hold; the time counts from now and never shortens.';

create or replace function ducto.release_reservation(p_reservation_id text, p_user_id text default null)
returns ducto.reserve_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_account ducto_private.accounts;
  v_hold ducto_private.reservations;
  v_now timestamptz;
  v_due boolean;
  v_answer ducto.reserve_result;
begin
  v_account := ducto_private.lock_account(
    coalesce((ducto_private.find_hold(p_reservation_id, p_user_id)).account_id, p_user_id));
  if v_account.account_id is null then
    return ducto_private.hold_refusal('reservation_not_found', v_account);
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_due := ducto_private.is_due(v_account, v_now);
  if v_due then
    v_account := ducto_private.drop_expired(v_account, v_now);
  end if;
  v_hold := ducto_private.find_hold(p_reservation_id, v_account.account_id);
  if v_hold.reservation_id is null then
    return ducto_private.hold_refusal('reservation_not_found', v_account);
  elsif v_hold.status = 'settled' then
    return ducto_private.hold_refusal('reservation_not_active', v_account);
  elsif v_hold.status = 'released' then
    return row(v_hold.reservation_id, coalesce(v_hold.actor_id, v_hold.account_id), 0, v_account.balance, v_account.held, null, true, v_hold.expires_at,
      '{}'::text[], v_account.revision)::ducto.reserve_result;
  end if;
  if v_due then
    v_account := ducto_private.write_expiry(v_account, v_now);
  end if;
  if v_hold.status = 'active' and v_hold.expires_at > v_now then
    v_account := ducto_private.let_go(v_account, v_hold.held, true, v_now);
  end if;
  v_hold.held := 0;
  update ducto_private.reservations as r
  set status = 'released', held = 0, ended_at = coalesce(r.ended_at, least(v_now, r.expires_at))
  where r.reservation_id = v_hold.reservation_id and r.account_id = v_hold.account_id;
  v_answer := ducto_private.save_hold(v_account, v_now, v_hold, null, null, null);
  v_answer.balance := (ducto_private.as_read(v_account.account_id)).balance;
  return v_answer;
end
$$;
comment on function ducto.release_reservation is 'Gives a hold back without charging. Releasing it again is not an error.';

-- A hold as its reader sees it at p_now.
create or replace function ducto_private.hold_answer(p_hold ducto_private.reservations, p_now timestamptz) returns ducto.reservation
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_hold.status = 'active' and p_hold.expires_at <= p_now then
    p_hold.status := 'expired';
    p_hold.held := 0;
    p_hold.ended_at := p_hold.expires_at;
  end if;
  return row(p_hold.reservation_id, p_hold.account_id, p_hold.actor_id, p_hold.status, p_hold.held, p_hold.charged,
    p_hold.operation_type, p_hold.model, p_hold.metrics, p_hold.pricing_version, p_hold.plan_id, p_hold.idempotency_key,
    p_hold.metadata, p_hold.created_at, p_hold.expires_at, p_hold.ended_at, null)::ducto.reservation;
end
$$;

create or replace function ducto.get_reservation(p_reservation_id text, p_user_id text default null) returns ducto.reservation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_hold ducto_private.reservations;
  v_refusal ducto.reservation;
begin
  v_hold := ducto_private.find_hold(p_reservation_id, p_user_id);
  if v_hold.reservation_id is null then
    v_refusal.error := 'reservation_not_found';
    v_refusal.amount := 0;
    v_refusal.charged := 0;
    return v_refusal;
  end if;
  return ducto_private.hold_answer(v_hold, (ducto_private.as_read(v_hold.account_id)).changed_at);
end
$$;
comment on function ducto.get_reservation is 'A hold by its id; with p_user_id only if it is of that account.';

create or replace function ducto.list_reservations(
  p_user_id text, p_active boolean default true, p_limit integer default 50, p_before timestamptz default null)
returns setof ducto.reservation
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_now timestamptz;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_limit(coalesce(p_limit, 50));
  v_now := (ducto_private.as_read(p_user_id)).changed_at;
  return query
  select h.*
  from ducto_private.reservations as r
  cross join lateral ducto_private.hold_answer(r, v_now) as h
  where r.account_id = p_user_id
    and r.created_at < coalesce(p_before, 'infinity')
    and (not coalesce(p_active, true) or r.status = 'active' and r.expires_at > v_now)
  order by r.created_at desc
  fetch first coalesce(p_limit, 50) rows with ties;
end
$$;
comment on function ducto.list_reservations is
  'An account''s holds, newest first: the active ones, or with p_active => false all. p_before is the created_at last seen.';

-- Holds (reservations, as the RPCs call them): credits claimed before the work is done. Past its time a hold counts nowhere, whether or not that was recorded.

create or replace function ducto_private.check_ttl(p_ttl_seconds integer) returns void
language plpgsql stable
as $$
begin
  if p_ttl_seconds not between 1 and 2592000 then
    perform ducto_private.invalid(format('p_ttl_seconds must be between 1 and 2592000 (30 days), not %s', p_ttl_seconds),
      'Take a hold for as long as the work may last, and extend it if it lasts longer.');
  end if;
end
$$;

-- The RPCs call it only where an argument is not its default: the call costs more than their condition.
create or replace function ducto_private.check_hold(
  p_operation_type text, p_ttl_seconds integer, p_min_balance bigint, p_overrun text) returns void
language plpgsql stable
as $$
begin
  perform ducto_private.check_text(coalesce(p_operation_type, 'usage'), 'p_operation_type');
  perform ducto_private.check_ttl(p_ttl_seconds);
  perform ducto_private.check_amount(coalesce(p_min_balance, 0), 0, 'p_min_balance');
  perform ducto_private.check_choice(coalesce(p_overrun, 'debt'), '{debt,reject,bounded}', 'p_overrun');
end
$$;

-- Finds a hold by its id, of p_user_id only where that is given.
create or replace function ducto_private.find_hold(p_reservation_id text, p_user_id text) returns ducto_private.holds
language plpgsql stable
as $$
declare
  v_id uuid := ducto_private.to_id(p_reservation_id);
  v_hold ducto_private.holds;
begin
  select h.*
  into v_hold
  from ducto_private.holds as h
  where h.hold_id = v_id and (p_user_id is null or h.account_id = p_user_id);
  return v_hold;
end
$$;

create or replace function ducto.reserve(
  p_user_id text,
  p_metrics jsonb,
  p_operation_type text default 'usage',
  p_metadata jsonb default null,
  p_min_balance bigint default null,
  p_ttl_seconds integer default 600,
  p_idempotency_key text default null,
  p_labels text[] default null,
  p_occurred_at timestamptz default null,
  p_overrun text default null)
returns ducto.reserve_result
language plpgsql volatile
as $$
begin
  if p_operation_type <> 'usage' or p_ttl_seconds <> 600 or p_min_balance is not null or p_overrun is not null then
    perform ducto_private.check_hold(p_operation_type, p_ttl_seconds, p_min_balance, p_overrun);
  end if;
  return (ducto_private.spend(p_user_id, array[row('hold', 'reserve', null, p_metrics, null, null, null, null, null,
    p_idempotency_key, p_metadata, coalesce(p_operation_type, 'usage'), p_min_balance, coalesce(p_ttl_seconds, 600), p_occurred_at,
    false, null, ducto_private.check_labels(p_labels), p_overrun)::ducto_private.request])).holds[1];
end
$$;
comment on function ducto.reserve is
  'Prices an estimated usage and holds ceil(cost) credits for p_ttl_seconds, before the work is done. Settle with '
  'deduct(p_reservation_id => …), which carries p_labels too. p_overrun says what becomes of costs above the hold, in '
  'place of the config''s overrun: ''debt'', ''reject'', or ''bounded'', by which the hold is a budget that its '
  'settlements never pass.';

create or replace function ducto.reserve_credits(
  p_user_id text,
  p_amount bigint,
  p_operation_type text default 'usage',
  p_metadata jsonb default null,
  p_min_balance bigint default null,
  p_ttl_seconds integer default 600,
  p_idempotency_key text default null,
  p_model text default null,
  p_labels text[] default null,
  p_occurred_at timestamptz default null,
  p_overrun text default null)
returns ducto.reserve_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_amount(p_amount, 0);
  if p_operation_type <> 'usage' or p_ttl_seconds <> 600 or p_min_balance is not null or p_overrun is not null then
    perform ducto_private.check_hold(p_operation_type, p_ttl_seconds, p_min_balance, p_overrun);
  end if;
  return (ducto_private.spend(p_user_id, array[row('hold', 'reserve_credits', null, null, null, p_amount, p_model, null, null,
    p_idempotency_key, p_metadata, coalesce(p_operation_type, 'usage'), p_min_balance, coalesce(p_ttl_seconds, 600), p_occurred_at,
    false, null, ducto_private.check_labels(p_labels), p_overrun)::ducto_private.request])).holds[1];
end
$$;
comment on function ducto.reserve_credits is
  'Holds a known amount of credits for p_ttl_seconds; 0 is a valid hold.';

create or replace function ducto.reserve_team(
  p_team_id text,
  p_user_id text,
  p_metrics jsonb,
  p_operation_type text default 'usage',
  p_metadata jsonb default null,
  p_min_balance bigint default null,
  p_ttl_seconds integer default 600,
  p_idempotency_key text default null,
  p_labels text[] default null,
  p_occurred_at timestamptz default null,
  p_overrun text default null)
returns ducto.reserve_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  if p_operation_type <> 'usage' or p_ttl_seconds <> 600 or p_min_balance is not null or p_overrun is not null then
    perform ducto_private.check_hold(p_operation_type, p_ttl_seconds, p_min_balance, p_overrun);
  end if;
  return (ducto_private.spend(p_team_id, array[row('hold', 'reserve_team', p_user_id, p_metrics, null, null, null, null, null,
    p_idempotency_key, p_metadata, coalesce(p_operation_type, 'usage'), p_min_balance, coalesce(p_ttl_seconds, 600), p_occurred_at,
    false, null, ducto_private.check_labels(p_labels), p_overrun)::ducto_private.request])).holds[1];
end
$$;
comment on function ducto.reserve_team is
  'Prices an estimated usage by the team''s plan and holds ceil(cost) credits of its pool, for a member.';

create or replace function ducto.reserve_team_credits(
  p_team_id text,
  p_user_id text,
  p_amount bigint,
  p_operation_type text default 'usage',
  p_metadata jsonb default null,
  p_min_balance bigint default null,
  p_ttl_seconds integer default 600,
  p_idempotency_key text default null,
  p_model text default null,
  p_labels text[] default null,
  p_occurred_at timestamptz default null,
  p_overrun text default null)
returns ducto.reserve_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_amount(p_amount, 0);
  if p_operation_type <> 'usage' or p_ttl_seconds <> 600 or p_min_balance is not null or p_overrun is not null then
    perform ducto_private.check_hold(p_operation_type, p_ttl_seconds, p_min_balance, p_overrun);
  end if;
  return (ducto_private.spend(p_team_id, array[row('hold', 'reserve_team_credits', p_user_id, null, null, p_amount, p_model, null, null,
    p_idempotency_key, p_metadata, coalesce(p_operation_type, 'usage'), p_min_balance, coalesce(p_ttl_seconds, 600), p_occurred_at,
    false, null, ducto_private.check_labels(p_labels), p_overrun)::ducto_private.request])).holds[1];
end
$$;
comment on function ducto.reserve_team_credits is
  'Holds a known amount of a team''s pool, for a member.';

create or replace function ducto.extend_reservation(
  p_reservation_id text,
  p_add_amount bigint default 0,
  p_ttl_seconds integer default null,
  p_user_id text default null,
  p_idempotency_key text default null)
returns ducto.reserve_result
language plpgsql volatile
as $$
declare
  v_add bigint := coalesce(p_add_amount, 0);
  v_account_id text := coalesce((ducto_private.find_hold(p_reservation_id, p_user_id)).account_id, p_user_id);
begin
  perform ducto_private.check_amount(v_add, 0, 'p_add_amount');
  perform ducto_private.check_ttl(p_ttl_seconds);
  perform ducto_private.check_key(p_idempotency_key);
  if not exists (select from ducto_private.accounts as a where a.account_id = v_account_id) then
    return ducto_private.hold_refusal('reservation_not_found', null);
  end if;
  return (ducto_private.spend(v_account_id, array[row('extend', 'extend_reservation', null, null, null, v_add,
    null, coalesce(p_reservation_id, ''), null, p_idempotency_key, null, null, null, p_ttl_seconds, null, false, null, null,
    null)::ducto_private.request])).holds[1];
end
$$;
comment on function ducto.extend_reservation is
  'Adds credits or time to an active hold. Added credits are admitted like a hold; the time counts from now and never shortens.';

create or replace function ducto.release_reservation(p_reservation_id text, p_user_id text default null)
returns ducto.reserve_result
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts;
  v_hold ducto_private.holds;
  v_now timestamptz;
begin
  v_account := ducto_private.lock_account(
    coalesce((ducto_private.find_hold(p_reservation_id, p_user_id)).account_id, p_user_id));
  if v_account.account_id is null then
    return ducto_private.hold_refusal('reservation_not_found', v_account);
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_hold := ducto_private.find_hold(p_reservation_id, v_account.account_id);
  if v_hold.hold_id is null then
    return ducto_private.hold_refusal('reservation_not_found', ducto_private.without_expired(v_account, v_now));
  elsif v_hold.status = 'settled' then
    return ducto_private.hold_refusal('reservation_not_active', ducto_private.without_expired(v_account, v_now));
  elsif v_hold.status <> 'released' then
    perform ducto_private.expire(v_account, v_now);
    update ducto_private.accounts as a
    set held = a.held - case h.status when 'active' then h.held else 0 end,
      holds = a.holds - (h.status = 'active')::integer,
      lots_due_at = case when a.lots > 0 and h.status = 'active' then v_now else a.lots_due_at end,
      revision = a.revision + 1,
      changed_at = v_now
    from ducto_private.holds as h
    where a.account_id = v_account.account_id and h.hold_id = v_hold.hold_id and h.account_id = a.account_id
    returning a.* into v_account;
    update ducto_private.holds as h
    set status = 'released', held = 0, ended_at = coalesce(h.ended_at, v_now)
    where h.hold_id = v_hold.hold_id and h.account_id = v_account.account_id;
    perform ducto_private.after_call(v_account, v_now);
  end if;
  v_account := ducto_private.without_expired(v_account, v_now);
  return row(v_hold.hold_id, coalesce(v_hold.member_id, v_hold.account_id), 0, v_account.balance, v_account.held, null,
    v_hold.status = 'released', v_hold.expires_at, '{}'::text[], v_account.revision)::ducto.reserve_result;
end
$$;
comment on function ducto.release_reservation is
  'Gives a hold back without charging. Releasing it again is not an error, nor is releasing one that has expired.';

-- A hold as its reader sees it at p_now.
create or replace function ducto_private.hold_answer(p_hold ducto_private.holds, p_now timestamptz) returns ducto.reservation
language plpgsql immutable
as $$
begin
  if p_hold.status = 'active' and p_hold.expires_at <= p_now then
    p_hold.status := 'expired';
    p_hold.ended_at := p_hold.expires_at;
  end if;
  if p_hold.status = 'expired' then
    p_hold.held := 0;
  end if;
  return row(p_hold.hold_id, p_hold.account_id, p_hold.member_id, p_hold.status, p_hold.held, p_hold.charged,
    p_hold.operation_type, p_hold.model, p_hold.metrics, p_hold.pricing_version, p_hold.plan_id, p_hold.idempotency_key,
    p_hold.metadata, p_hold.created_at, p_hold.expires_at, p_hold.ended_at, null, p_hold.labels)::ducto.reservation;
end
$$;

create or replace function ducto.get_reservation(p_reservation_id text, p_user_id text default null) returns ducto.reservation
language plpgsql stable
as $$
declare
  v_hold ducto_private.holds;
begin
  v_hold := ducto_private.find_hold(p_reservation_id, p_user_id);
  if v_hold.hold_id is null then
    return jsonb_populate_record(null::ducto.reservation, '{"error": "reservation_not_found", "amount": 0, "charged": 0}');
  end if;
  return ducto_private.hold_answer(v_hold, (ducto_private.read_account(v_hold.account_id)).changed_at);
end
$$;
comment on function ducto.get_reservation is 'A hold by its id; with p_user_id only if it is of that account.';

create or replace function ducto.list_reservations(
  p_user_id text, p_active boolean default true, p_limit integer default 50, p_before timestamptz default null)
returns setof ducto.reservation
language plpgsql stable
as $$
declare
  v_now timestamptz;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_limit(coalesce(p_limit, 50));
  v_now := (ducto_private.read_account(p_user_id)).changed_at;
  return query
  select x.*
  from ducto_private.holds as h
  cross join lateral ducto_private.hold_answer(h, v_now) as x
  where h.account_id = p_user_id
    and h.created_at < coalesce(p_before, 'infinity')
    and (not coalesce(p_active, true) or h.status = 'active' and h.expires_at > v_now)
  order by h.created_at desc
  fetch first coalesce(p_limit, 50) rows with ties;
end
$$;
comment on function ducto.list_reservations is
  'An account''s holds, newest first: the active ones, or with p_active => false all. p_limit is 1 to 1000, and '
  'p_before is the created_at last seen. Holds of one instant come together, also beyond p_limit.';

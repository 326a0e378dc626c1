-- Teams: accounts with members. A pool is charged for a member, and each member may have a cap.

create or replace function ducto.create_team(
  p_name text, p_initial_balance bigint default 0, p_idempotency_key text default null, p_team_id text default null)
returns ducto.create_team_result
language plpgsql volatile
as $$
declare
  v_initial bigint := coalesce(p_initial_balance, 0);
  v_fingerprint bigint;
  v_id text;
  v_account ducto_private.accounts;
  v_team ducto_private.teams;
begin
  perform ducto_private.check_text(p_name, 'p_name');
  perform ducto_private.check_amount(v_initial, 0, 'p_initial_balance');
  perform ducto_private.check_key(p_idempotency_key);
  if p_team_id is not null then
    perform ducto_private.check_text(p_team_id, 'p_team_id');
  end if;
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('create_team', p_name, v_initial, p_team_id), 0);
  -- Without an id the key makes it, so that the key belongs to one account.
  v_id := coalesce(p_team_id,
    'team_' || left(encode(sha256(convert_to('create_team:' || p_idempotency_key, 'UTF8')), 'hex'), 32),
    'team_' || replace(gen_random_uuid()::text, '-', ''));
  v_account := ducto_private.new_account(v_id, 'team', clock_timestamp(), null);
  v_account.balance := v_initial;
  if not ducto_private.open_account(v_account, null) then
    v_account := ducto_private.lock_account(v_id);
    select t.*
    into v_team
    from ducto_private.teams as t
    where t.account_id = v_id;
    if v_team.idempotency_key = p_idempotency_key and v_team.fingerprint = v_fingerprint then
      return row(v_id, v_team.name, true, null, (v_initial > 0)::integer)::ducto.create_team_result;
    end if;
    return row(null, null, false,
      case when v_team.idempotency_key = p_idempotency_key then 'idempotency_conflict' else 'team_exists' end,
      v_account.revision)::ducto.create_team_result;
  end if;
  insert into ducto_private.teams (account_id, name, idempotency_key, fingerprint)
  values (v_id, p_name, p_idempotency_key, v_fingerprint);
  if v_initial > 0 then
    perform ducto_private.post(v_id, v_account.changed_at, 'adjustment', v_initial, p_idempotency_key, v_fingerprint);
  end if;
  return row(v_id, p_name, false, null, (v_initial > 0)::integer)::ducto.create_team_result;
end
$$;
comment on function ducto.create_team is
  'Makes a team: an account with members, and with p_initial_balance credits as an adjustment. Without p_team_id its '
  'id comes from the key, or is random.';

create or replace function ducto.get_team(p_team_id text) returns ducto.team
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts;
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  v_account := ducto_private.read_account(p_team_id);
  if v_account.kind is distinct from 'team' then
    return row(null, null, 0, 0, null, 'team_not_found', 0)::ducto.team;
  end if;
  return row(p_team_id, (select t.name from ducto_private.teams as t where t.account_id = p_team_id), v_account.balance,
    (select count(*) from ducto_private.team_members as m where m.account_id = p_team_id and m.left_at is null),
    v_account.opened_at, null, v_account.revision)::ducto.team;
end
$$;
comment on function ducto.get_team is 'A team, its pool''s balance and the number of its present members.';

create or replace function ducto.get_team_balance(p_team_id text) returns ducto.team_balance_result
language sql stable
as $$
  select t.team_id, t.name, t.balance, t.member_count, t.error, t.revision
  from ducto.get_team(p_team_id) as t
$$;
comment on function ducto.get_team_balance is 'A team''s pool: its balance, net of what has expired.';

create or replace function ducto.add_team_member(
  p_team_id text,
  p_user_id text,
  p_role text default 'member',
  p_spend_cap bigint default null,
  p_spend_cap_period text default 'lifetime')
returns ducto.add_team_member_result
language plpgsql volatile
as $$
declare
  v_role text := coalesce(p_role, 'member');
  v_period text := coalesce(p_spend_cap_period, 'lifetime');
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_zone text;
  v_first date;
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_text(v_role, 'p_role');
  perform ducto_private.check_choice(v_period, '{lifetime,daily,weekly,monthly}', 'p_spend_cap_period');
  perform ducto_private.check_amount(coalesce(p_spend_cap, 0), 0, 'p_spend_cap');
  v_account := ducto_private.lock_account(p_team_id);
  if v_account.kind is distinct from 'team' then
    return row(null, null, null, 'team_not_found', 0)::ducto.add_team_member_result;
  elsif exists (select from ducto_private.accounts as a where a.account_id = p_user_id and a.kind = 'team') then
    return row(null, null, null, 'is_a_team', v_account.revision)::ducto.add_team_member_result;
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_account := ducto_private.expire(v_account, v_now);
  insert into ducto_private.team_members as m (account_id, user_id, role, spend_cap, spend_cap_period, joined_at)
  values (p_team_id, p_user_id, v_role, p_spend_cap, v_period, v_now)
  on conflict (account_id, user_id) do update
  set role = excluded.role,
    spend_cap = excluded.spend_cap,
    spend_cap_period = excluded.spend_cap_period,
    window_date = case when m.spend_cap_period = excluded.spend_cap_period then m.window_date end,
    joined_at = case when m.left_at is null then m.joined_at else excluded.joined_at end,
    left_at = null;
  v_zone := ducto_private.ledger_zone();
  if v_period <> 'lifetime' and v_zone is not null then
    -- Counted now, so that no charge need count it.
    v_first := ducto_private.window_date(v_period, v_now, v_zone);
    update ducto_private.team_members as m
    set spent = ducto_private.window_spent(p_team_id, v_period, v_first, v_zone, '', p_user_id), window_date = v_first
    where m.account_id = p_team_id and m.user_id = p_user_id and m.window_date is null;
  end if;
  update ducto_private.accounts as a
  set revision = a.revision + 1, changed_at = v_now
  where a.account_id = p_team_id;
  perform ducto_private.after_call(v_account, v_now);
  return row(p_team_id, p_user_id, v_role, null, v_account.revision + 1)::ducto.add_team_member_result;
end
$$;
comment on function ducto.add_team_member is
  'Makes a user a member, or sets a member''s role and cap anew; the user needs no account. p_role is a label of '
  'yours. p_spend_cap bounds what the pool is debited for the member in each p_spend_cap_period (''lifetime'', '
  '''daily'', ''weekly'' or ''monthly''), net of refunds; null is no bound. A member who rejoins keeps total_spent.';

create or replace function ducto.remove_team_member(p_team_id text, p_user_id text) returns ducto.add_team_member_result
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_role text;
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  v_account := ducto_private.lock_account(p_team_id);
  if v_account.kind is distinct from 'team' then
    return row(null, null, null, 'team_not_found', 0)::ducto.add_team_member_result;
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  update ducto_private.team_members as m
  set left_at = v_now
  where m.account_id = p_team_id and m.user_id = p_user_id and m.left_at is null
  returning m.role into v_role;
  if not found then
    return row(null, null, null, 'not_a_member', v_account.revision)::ducto.add_team_member_result;
  end if;
  v_account := ducto_private.expire(v_account, v_now);
  update ducto_private.accounts as a
  set revision = a.revision + 1, changed_at = v_now
  where a.account_id = p_team_id;
  perform ducto_private.after_call(v_account, v_now);
  return row(p_team_id, p_user_id, v_role, null, v_account.revision + 1)::ducto.add_team_member_result;
end
$$;
comment on function ducto.remove_team_member is
  'Ends a membership; its history stays, and its open holds can still be settled.';

create or replace function ducto.get_team_members(p_team_id text) returns setof ducto.team_member
language plpgsql stable
as $$
declare
  v_zone text := ducto_private.ledger_zone();
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  return query
  select m.user_id, m.role, m.spend_cap, ducto_private.at_most_bigint(m.total_spent), m.spend_cap_period, null::text,
    ducto_private.at_most_bigint(ducto_private.member_spent(m, greatest(clock_timestamp(), a.changed_at), v_zone))
  from ducto_private.accounts as a
  join ducto_private.team_members as m on m.account_id = a.account_id
  where a.account_id = p_team_id and m.left_at is null
  order by m.user_id;
end
$$;
comment on function ducto.get_team_members is 'A team''s present members, by user_id.';

-- What an account is told and asked for: the line of its low balance, a first refusal, automatic top-ups; and freezing it.
--
-- A top-up opens when a call, or the sweep, leaves less available than the account's threshold, and ends by the add_credits
-- under its key. All of it stands behind the account's lock, so that never two are open; flags on the account's row spare
-- everybody else the look at it.

create or replace function ducto_private.topup_answer(
  p_account ducto_private.accounts, p_topup ducto_private.auto_topups, p_now timestamptz) returns ducto.auto_topup
language plpgsql stable
as $$
declare
  v_this_month integer := case
    when p_topup.month = ducto_private.window_date('monthly', p_now, coalesce(ducto_private.ledger_zone(), 'UTC'))
    then p_topup.this_month else 0 end;
begin
  if p_topup.active is not true then
    return row(null, 0, 0, 0, null, null, 0, 'topup_not_found', coalesce(p_account.revision, 0))::ducto.auto_topup;
  end if;
  return row(p_topup.account_id, p_topup.threshold, p_topup.amount, p_topup.max_per_month, case
      when p_topup.due_key is not null then 'due'
      when p_now < p_topup.retry_at then 'waiting'
      when v_this_month >= p_topup.max_per_month then 'exhausted'
      else 'ready' end,
    p_topup.due_key, v_this_month, null, p_account.revision)::ducto.auto_topup;
end
$$;

create or replace function ducto_private.find_topup(p_account_id text) returns ducto_private.auto_topups
language plpgsql stable
as $$
declare
  v_topup ducto_private.auto_topups;
begin
  select t.*
  into v_topup
  from ducto_private.auto_topups as t
  where t.account_id = p_account_id and t.active;
  return v_topup;
end
$$;

-- Opens a top-up where one is due, or announces the open one again after 24 hours. p_account is the account as the call
-- leaves it, without what has expired.
create or replace function ducto_private.check_topup(p_account ducto_private.accounts, p_now timestamptz) returns void
language plpgsql volatile
as $$
declare
  v_topup ducto_private.auto_topups := ducto_private.find_topup(p_account.account_id);
  v_zone text := coalesce(ducto_private.ledger_zone(), 'UTC');
  v_month date := ducto_private.window_date('monthly', p_now, v_zone);
  v_available bigint;
  v_look_at timestamptz;
  v_announces boolean;
begin
  p_account.changed_at := p_now;
  v_available := (ducto_private.balance_answer(p_account)).available;
  if v_topup.due_key is not null then
    v_announces := p_now >= v_topup.look_at;
    v_look_at := v_topup.look_at;
  elsif v_available >= v_topup.threshold then
    v_announces := false;
  else
    if v_topup.month is distinct from v_month then
      v_topup.month := v_month;
      v_topup.this_month := 0;
    end if;
    v_look_at := case
      when p_now < v_topup.retry_at then v_topup.retry_at
      when v_topup.this_month >= v_topup.max_per_month then ducto_private.window_end('monthly', v_month, v_zone) end;
    v_announces := v_look_at is null;
    if v_announces then
      v_topup.due_key := 'topup_' || replace(gen_random_uuid()::text, '-', '');
      v_topup.this_month := v_topup.this_month + 1;
      v_topup.retry_at := null;
    end if;
  end if;
  if v_announces then
    v_look_at := p_now + interval '24 hours';
    perform ducto_private.emit(p_account.account_id, 'topup_due', jsonb_build_object('key', v_topup.due_key,
      'amount', v_topup.amount, 'threshold', v_topup.threshold, 'available', v_available), p_now);
  end if;
  if v_announces or v_look_at is distinct from v_topup.look_at then
    update ducto_private.auto_topups as t
    set due_key = v_topup.due_key,
      month = v_topup.month,
      this_month = v_topup.this_month,
      retry_at = v_topup.retry_at,
      look_at = v_look_at
    where t.account_id = p_account.account_id;
  end if;
end
$$;

-- Ends the open top-up if this is its key.
create or replace function ducto_private.end_topup(p_account_id text, p_key text) returns void
language plpgsql volatile
as $$
begin
  update ducto_private.auto_topups as t
  set due_key = null, look_at = null
  where t.account_id = p_account_id and t.due_key = p_key;
end
$$;

-- Ends an account's automatic top-ups; what the month has counted stays.
create or replace function ducto_private.stop_topup(p_account_id text) returns void
language plpgsql volatile
as $$
begin
  update ducto_private.auto_topups as t
  set active = false, due_key = null, retry_at = null, look_at = null
  where t.account_id = p_account_id;
  update ducto_private.accounts as a
  set auto_topup = false
  where a.account_id = p_account_id and a.auto_topup;
end
$$;

-- What a call that wrote does last: a top-up may be due, and what was refused may be there now. p_account is its row as the
-- call locked it, or later; only its flags are read.
create or replace function ducto_private.after_call(p_account ducto_private.accounts, p_now timestamptz) returns void
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts;
begin
  if p_account.auto_topup is not true and p_account.refused is null then
    return;
  end if;
  select a.*
  into v_account
  from ducto_private.accounts as a
  where a.account_id = p_account.account_id;
  v_account := ducto_private.without_expired(v_account, p_now);
  v_account.changed_at := p_now;
  if (ducto_private.balance_answer(v_account)).available >= v_account.refused then
    update ducto_private.accounts as a
    set refused = null
    where a.account_id = v_account.account_id;
  end if;
  if v_account.auto_topup then
    perform ducto_private.check_topup(v_account, p_now);
  end if;
end
$$;

-- Tells of a refusal for funds, if it is the first since the account last had enough. Returns the account.
create or replace function ducto_private.tell_refusal(
  p_account ducto_private.accounts, p_amount bigint, p_actor_id text, p_now timestamptz) returns ducto_private.accounts
language plpgsql volatile
as $$
declare
  v_available bigint;
begin
  p_account.changed_at := p_now;
  v_available := (ducto_private.balance_answer(p_account)).available;
  if p_account.refused is null or v_available >= p_account.refused then
    -- A hold with a least balance of its own may be refused where more is available than it asks for.
    p_account.refused := greatest(p_amount, least(v_available, 9223372036854775806) + 1);
    update ducto_private.accounts as a
    set refused = p_account.refused
    where a.account_id = p_account.account_id;
    perform ducto_private.emit(p_account.account_id, 'refused', jsonb_build_object('actor_id', p_actor_id, 'amount', p_amount,
      'available', v_available), p_now);
  end if;
  return p_account;
end
$$;

-- Tells, once a period each, that 80 and 100 percent of the allowance are used; p_left is what is left of it.
create or replace function ducto_private.tell_allowance(p_account ducto_private.accounts, p_left bigint, p_now timestamptz)
returns ducto_private.accounts
language plpgsql volatile
as $$
declare
  v_told constant integer := case
    when p_account.allowance_told_of = p_account.allowance_start then p_account.allowance_told else 0 end;
  v_percent integer;
begin
  foreach v_percent in array '{80,100}'::integer[] loop
    if v_told < v_percent and (p_left = 0 or v_percent < 100) then
      p_account.allowance_told := v_percent;
      p_account.allowance_told_of := p_account.allowance_start;
      perform ducto_private.emit(p_account.account_id, 'allowance_used', jsonb_build_object('percent', v_percent,
        'plan_id', p_account.plan_id, 'allowance_used', p_account.allowance_used, 'allowance_remaining', p_left), p_now);
    end if;
  end loop;
  update ducto_private.accounts as a
  set allowance_told = p_account.allowance_told, allowance_told_of = p_account.allowance_told_of
  where a.account_id = p_account.account_id;
  return p_account;
end
$$;

-- An account locked by an RPC that changes its terms, with what has expired written down; changed_at is the time of the call.
-- A null row where it is unknown.
create or replace function ducto_private.lock_expired(p_account_id text) returns ducto_private.accounts
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts;
  v_now timestamptz;
begin
  perform ducto_private.check_text(p_account_id, 'p_user_id');
  v_account := ducto_private.lock_account(p_account_id);
  if v_account.account_id is not null then
    v_now := greatest(clock_timestamp(), v_account.changed_at);
    v_account := ducto_private.expire(v_account, v_now);
    v_account.changed_at := v_now;
  end if;
  return v_account;
end
$$;

-- Writes that an account changed at p_account.changed_at, and returns it as it then stands.
create or replace function ducto_private.count_change(p_account ducto_private.accounts) returns ducto_private.accounts
language plpgsql volatile
as $$
begin
  update ducto_private.accounts as a
  set revision = a.revision + 1, changed_at = p_account.changed_at
  where a.account_id = p_account.account_id
  returning a.* into p_account;
  perform ducto_private.after_call(p_account, p_account.changed_at);
  return p_account;
end
$$;

create or replace function ducto_private.balance_not_found() returns ducto.balance_result
language plpgsql immutable
as $$
begin
  return row(null, 0, 0, 0, 0, 0, 0, 'account_not_found', false)::ducto.balance_result;
end
$$;

create or replace function ducto.set_low_balance(p_user_id text, p_threshold bigint default null) returns ducto.balance_result
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts;
begin
  perform ducto_private.check_amount(coalesce(p_threshold, 0), 0, 'p_threshold');
  v_account := ducto_private.lock_expired(p_user_id);
  if v_account.account_id is null then
    return ducto_private.balance_not_found();
  end if;
  update ducto_private.accounts as a
  set low_balance = p_threshold
  where a.account_id = p_user_id;
  return ducto_private.balance_answer(ducto_private.count_change(v_account));
end
$$;
comment on function ducto.set_low_balance is
  'When the event low_balance tells that an account has little left: when available and reserved credits together fall to '
  'p_threshold or below it. Null is the plan''s low_balance, else the config''s, and 0 is never.';

create or replace function ducto.freeze_account(p_user_id text, p_frozen boolean default true) returns ducto.balance_result
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts := ducto_private.lock_expired(p_user_id);
begin
  if v_account.account_id is null then
    return ducto_private.balance_not_found();
  end if;
  update ducto_private.accounts as a
  set frozen = coalesce(p_frozen, true)
  where a.account_id = p_user_id;
  return ducto_private.balance_answer(ducto_private.count_change(v_account));
end
$$;
comment on function ducto.freeze_account is
  'Stops an account, a user''s or a team''s, or with p_frozen => false lets it go on: holds, extensions and charges '
  'without a hold answer account_frozen. Open holds can be settled; refunds, grants and removals go on.';

create or replace function ducto.set_auto_topup(
  p_user_id text, p_threshold bigint, p_amount bigint, p_max_per_month integer default 10) returns ducto.auto_topup
language plpgsql volatile
as $$
declare
  v_most integer := coalesce(p_max_per_month, 10);
  v_account ducto_private.accounts;
begin
  perform ducto_private.check_amount(p_threshold, 1, 'p_threshold');
  perform ducto_private.check_amount(p_amount, 1);
  perform ducto_private.check_amount(v_most, 1, 'p_max_per_month');
  v_account := ducto_private.lock_expired(p_user_id);
  if v_account.account_id is null then
    return row(null, 0, 0, 0, null, null, 0, 'account_not_found', 0)::ducto.auto_topup;
  end if;
  insert into ducto_private.auto_topups as t (account_id, threshold, amount, max_per_month)
  values (p_user_id, p_threshold, p_amount, v_most)
  on conflict (account_id) do update
  set threshold = p_threshold, amount = p_amount, max_per_month = v_most, active = true;
  update ducto_private.accounts as a
  set auto_topup = true
  where a.account_id = p_user_id;
  v_account := ducto_private.count_change(v_account);
  return ducto_private.topup_answer(v_account, ducto_private.find_topup(p_user_id), v_account.changed_at);
end
$$;
comment on function ducto.set_auto_topup is
  'From now on, whenever a call or the sweep leaves less than p_threshold credits available, an event topup_due asks for '
  'p_amount more, at most p_max_per_month times in a local month. Whoever has taken the payment calls add_credits under the '
  'event''s key, which ends it, or fail_topup. No second one opens meanwhile; one that is open for 24 hours is told again.';

create or replace function ducto.remove_auto_topup(p_user_id text) returns ducto.auto_topup
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts := ducto_private.lock_expired(p_user_id);
  v_topup ducto_private.auto_topups := ducto_private.find_topup(p_user_id);
begin
  if v_topup.account_id is not null then
    perform ducto_private.stop_topup(p_user_id);
    v_account := ducto_private.count_change(v_account);
  end if;
  return ducto_private.topup_answer(v_account, v_topup, coalesce(v_account.changed_at, clock_timestamp()));
end
$$;
comment on function ducto.remove_auto_topup is
  'Ends automatic top-ups of an account and answers what they were; an add_credits under an open key only adds credits.';

create or replace function ducto.get_auto_topup(p_user_id text) returns ducto.auto_topup
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts := ducto_private.read_account(p_user_id);
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  return ducto_private.topup_answer(v_account, ducto_private.find_topup(p_user_id), v_account.changed_at);
end
$$;
comment on function ducto.get_auto_topup is 'An account''s automatic top-up, whether one is open, and how many this month had.';

create or replace function ducto.fail_topup(p_user_id text, p_key text, p_retry_seconds integer default 3600)
returns ducto.auto_topup
language plpgsql volatile
as $$
declare
  v_retry integer := coalesce(p_retry_seconds, 3600);
  v_account ducto_private.accounts;
  v_topup ducto_private.auto_topups;
begin
  if v_retry not between 0 and 2592000 then
    perform ducto_private.invalid(format('p_retry_seconds must be between 0 and 2592000 (30 days), not %s', v_retry),
      'It is the least time until the next top-up may open; remove_auto_topup ends them all.');
  end if;
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  v_account := ducto_private.lock_account(p_user_id);
  v_account.changed_at := greatest(clock_timestamp(), v_account.changed_at);
  v_topup := ducto_private.find_topup(p_user_id);
  if v_topup.due_key is distinct from p_key or p_key is null then
    return ducto_private.topup_answer(v_account, null, v_account.changed_at);
  end if;
  perform ducto_private.expire(v_account, v_account.changed_at);
  update ducto_private.auto_topups as t
  set due_key = null,
    this_month = t.this_month - 1,
    retry_at = v_account.changed_at + make_interval(secs => v_retry),
    look_at = null
  where t.account_id = p_user_id;
  v_account := ducto_private.count_change(v_account);
  return ducto_private.topup_answer(v_account, ducto_private.find_topup(p_user_id), v_account.changed_at);
end
$$;
comment on function ducto.fail_topup is
  'Ends the open top-up of this key because its payment failed: it does not count in its month, and none opens for '
  'p_retry_seconds (0 to 2592000). topup_not_found where the key is not that of the open one.';

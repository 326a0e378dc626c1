-- Plans. An account is put on a plan of the active config, and keeps it at its last terms if a later config drops it.

-- The next change of an account's plan as next_plan_id and next_at; nulls where none is to come.
create or replace function ducto_private.next_plan(p_account ducto_private.accounts) returns ducto_private.plan_schedules
language plpgsql stable
as $$
declare
  v_schedule ducto_private.plan_schedules;
begin
  if p_account.plan_due_at is null then
    return null;
  end if;
  select s.*
  into v_schedule
  from ducto_private.plan_schedules as s
  where s.account_id = p_account.account_id;
  if v_schedule.next_at is distinct from p_account.plan_due_at then
    v_schedule.next_at := p_account.plan_due_at;
    v_schedule.next_plan_id := case when p_account.kind = 'user'
      then (ducto_private.find_terms(null, null, p_account.changed_at)).default_plan end;
  end if;
  return v_schedule;
end
$$;

create or replace function ducto_private.plan_answer(
  p_account ducto_private.accounts, p_warnings text[] default '{}', p_error text default null) returns ducto.set_user_plan_result
language plpgsql stable
as $$
declare
  v_next ducto_private.plan_schedules := ducto_private.next_plan(p_account);
begin
  return row(case when p_error is null then p_account.account_id end, case when p_error is null then p_account.plan_id end, p_error,
    coalesce(p_account.revision, 0), false, p_warnings, v_next.next_plan_id, v_next.next_at)::ducto.set_user_plan_result;
end
$$;

create or replace function ducto.set_user_plan(
  p_user_id text,
  p_plan_id text default null,
  p_when text default 'now',
  p_anchor timestamptz default null,
  p_until timestamptz default null,
  p_event_at timestamptz default null,
  p_idempotency_key text default null)
returns ducto.set_user_plan_result
language plpgsql volatile
as $$
declare
  v_fingerprint constant bigint := jsonb_hash_extended(jsonb_build_array('set_user_plan', p_plan_id, coalesce(p_when, 'now'),
    p_anchor at time zone 'UTC', p_until at time zone 'UTC'), 0);
  v_terms ducto_private.terms;
  v_is_sold boolean;
  v_account ducto_private.accounts;
  v_from text;
  v_now timestamptz;
  v_key ducto_private.hold_keys;
  v_schedule ducto_private.plan_schedules;
  v_answer ducto.set_user_plan_result;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_choice(coalesce(p_when, 'now'), '{now,period_end}', 'p_when');
  perform ducto_private.check_moment(p_anchor, 'p_anchor');
  perform ducto_private.check_moment(p_until, 'p_until');
  perform ducto_private.check_moment(p_event_at, 'p_event_at');
  perform ducto_private.check_key(p_idempotency_key);
  v_account := ducto_private.read_account(p_user_id);
  v_terms := ducto_private.find_terms(null, null, coalesce(v_account.changed_at, clock_timestamp()));
  v_is_sold := p_plan_id is null or exists (
    select
    from ducto_private.terms as t
    where t.plan_id = p_plan_id and t.plan_id <> '' and t.version = v_terms.version and t.own_version = v_terms.version);
  v_account := case when v_is_sold then ducto_private.lock_or_open(p_user_id) else ducto_private.lock_account(p_user_id) end;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  if p_idempotency_key is not null then
    select k.*
    into v_key
    from ducto_private.hold_keys as k
    where k.account_id = p_user_id and k.idempotency_key = p_idempotency_key;
    if v_key.fingerprint <> v_fingerprint then
      return ducto_private.plan_answer(ducto_private.without_expired(v_account, v_now), p_error => 'idempotency_conflict');
    elsif found then
      return row(p_user_id, v_key.plan_id, null, v_key.revision, true, coalesce(v_key.warnings, '{}'), v_key.next_plan_id,
        v_key.next_plan_at)::ducto.set_user_plan_result;
    end if;
  end if;
  if not v_is_sold then
    return ducto_private.plan_answer(ducto_private.without_expired(v_account, v_now), p_error => 'plan_not_found');
  end if;
  select s.*
  into v_schedule
  from ducto_private.plan_schedules as s
  where s.account_id = p_user_id;
  if p_event_at < v_schedule.event_at then
    return ducto_private.plan_answer(ducto_private.without_expired(v_account, v_now), '{superseded}');
  end if;

  v_account := ducto_private.expire(v_account, v_now);
  v_from := v_account.plan_id;
  if v_from is not null then
    v_account := ducto_private.roll_allowance(v_account, ducto_private.find_terms(null, v_from, v_now), v_now);
  end if;
  v_schedule := row(p_user_id, null, null, null, p_until, greatest(p_event_at, v_schedule.event_at));
  if p_when = 'period_end' and v_from is not null then
    if p_plan_id is distinct from v_from and (p_until <= v_account.allowance_end) is not true then
      v_schedule.next_plan_id := p_plan_id;
      v_schedule.next_at := v_account.allowance_end;
      v_schedule.next_anchor := p_anchor;
    end if;
  else
    v_account := ducto_private.change_plan(v_account, p_plan_id, p_anchor, v_now, false, v_now);
  end if;
  v_account.plan_due_at := least(v_schedule.next_at, v_schedule.until_at);
  if v_schedule.until_at is not null or v_schedule.next_at is not null or v_schedule.event_at is not null then
    insert into ducto_private.plan_schedules
    select v_schedule.*
    on conflict (account_id) do update
    set next_plan_id = excluded.next_plan_id,
      next_at = excluded.next_at,
      next_anchor = excluded.next_anchor,
      until_at = excluded.until_at,
      event_at = excluded.event_at;
  end if;
  v_account.revision := ducto_private.write_plan(v_account, v_from, v_now, v_now);
  if ducto_private.is_due(v_account, v_now) then
    -- p_until has passed already.
    v_account := ducto_private.expire(v_account, v_now);
  end if;
  v_answer := ducto_private.plan_answer(v_account);
  if p_idempotency_key is not null then
    insert into ducto_private.hold_keys (account_id, idempotency_key, fingerprint, revision, plan_id, next_plan_id, next_plan_at)
    values (p_user_id, p_idempotency_key, v_fingerprint, v_answer.revision, v_answer.plan_id, v_answer.next_plan_id,
      v_answer.next_plan_at);
  end if;
  perform ducto_private.after_call(v_account, v_now);
  return v_answer;
end
$$;
comment on function ducto.set_user_plan is
  'Puts an account on a plan of the active config, or with null on none, opening it if it is new: at once, or with p_when '
  '''period_end'' when its present period ends. Each call replaces what was to come. p_anchor is where the periods of a plan with '
  'anchor: start begin; from p_until on the account is on default_plan, else on none. A call whose p_event_at is older than the '
  'last one given changes nothing and warns ''superseded''. What was used of allowances in the new period stays used, and open '
  'holds are settled at the plan at which they were taken.';

create or replace function ducto.get_user_plan(p_user_id text) returns ducto.get_user_plan_result
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts := ducto_private.read_account(p_user_id);
  v_now timestamptz := coalesce(v_account.changed_at, clock_timestamp());
  v_terms ducto_private.terms;
  v_answer ducto.get_user_plan_result;
  v_next ducto_private.plan_schedules;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  v_answer.user_id := p_user_id;
  v_answer.revision := coalesce(v_account.revision, 0);
  v_answer.features := '{}'::jsonb;
  v_answer.free_allowance := 0;
  v_answer.allowance_remaining := 0;
  if ducto_private.active_version(v_now) is null then
    return v_answer;
  end if;
  v_terms := ducto_private.find_terms(null, v_account.plan_id, v_now);
  if v_account.account_id is null then
    v_account := ducto_private.new_account(p_user_id, 'user', v_now, v_terms);
    v_terms := ducto_private.find_terms(v_terms.version, v_account.plan_id, v_now);
  end if;
  v_next := ducto_private.next_plan(v_account);
  v_answer.next_plan_id := v_next.next_plan_id;
  v_answer.next_plan_at := v_next.next_at;
  if v_account.plan_id is null then
    return v_answer;
  end if;
  v_account := ducto_private.roll_allowance(v_account, v_terms, v_now);
  v_answer.plan_id := v_terms.plan_id;
  v_answer.plan_name := v_terms.plan_name;
  v_answer.free_allowance := v_terms.free_allowance;
  v_answer.features := v_terms.features;
  v_answer.allowance_remaining := ducto_private.allowance_left(v_account, v_terms, v_now);
  v_answer.period_start := v_account.allowance_start;
  v_answer.period_end := v_account.allowance_end;
  return v_answer;
end
$$;
comment on function ducto.get_user_plan is
  'An account''s plan at its present terms, what is left of its allowance, and the next change of plan if one is to come; of an '
  'unseen user the config''s default_plan.';

create or replace function ducto.check_feature(p_user_id text, p_feature text) returns ducto.check_feature_result
language plpgsql stable
as $$
declare
  v_plan ducto.get_user_plan_result := ducto.get_user_plan(p_user_id);
  v_value jsonb;
begin
  perform ducto_private.check_text(p_feature, 'p_feature');
  v_value := v_plan.features -> p_feature;
  return row(p_user_id, p_feature, v_value, coalesce(v_value not in ('null', 'false', '0', '""', '[]', '{}'), false), null,
    v_plan.revision)::ducto.check_feature_result;
end
$$;
comment on function ducto.check_feature is
  'A feature of an account''s plan. has_feature is false where it is absent, null, false, 0 or empty; value is returned either way.';

create or replace function ducto.check_allowance(p_user_id text) returns ducto.allowance_result
language sql stable
as $$
  select p.plan_id, p.allowance_remaining, p.period_start, p.period_end, null::text, p.revision
  from ducto.get_user_plan(p_user_id) as p
$$;
comment on function ducto.check_allowance is 'What is left of an account''s allowance in the present period, in whole credits; zero without a plan.';

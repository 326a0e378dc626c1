-- Plans. An account is put on a plan of the active config, and keeps it at its last terms if a later config drops it.

create or replace function ducto.set_user_plan(p_user_id text, p_plan_id text default null) returns ducto.set_user_plan_result
language plpgsql volatile
as $$
declare
  v_terms ducto_private.terms;
  v_account ducto_private.accounts;
  v_from text;
  v_now timestamptz;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  v_account := ducto_private.read_account(p_user_id);
  v_terms := ducto_private.find_terms(null, null, v_account.changed_at);
  if p_plan_id is not null and not exists (
    select
    from ducto_private.terms as t
    where t.plan_id = p_plan_id and t.plan_id <> '' and t.version = v_terms.version and t.own_version = v_terms.version)
  then
    return row(null, null, 'plan_not_found', coalesce(v_account.revision, 0))::ducto.set_user_plan_result;
  end if;
  v_account := ducto_private.lock_or_open(p_user_id);
  v_now := v_account.changed_at;
  v_account := ducto_private.expire(v_account, v_now);
  v_from := v_account.plan_id;
  if p_plan_id is not null then
    v_account := ducto_private.roll_allowance(v_account, v_now, v_terms.timezone);
  end if;
  update ducto_private.accounts as a
  set plan_id = p_plan_id,
    allowance_used = v_account.allowance_used,
    allowance_start = v_account.allowance_start,
    allowance_end = v_account.allowance_end,
    revision = a.revision + 1,
    changed_at = v_now
  where a.account_id = p_user_id;
  if v_from is distinct from p_plan_id then
    perform ducto_private.emit(p_user_id, 'plan_changed', jsonb_build_object('from', v_from, 'to', p_plan_id), v_now);
  end if;
  perform ducto_private.after_call(v_account, v_now);
  return row(p_user_id, p_plan_id, null, v_account.revision + 1)::ducto.set_user_plan_result;
end
$$;
comment on function ducto.set_user_plan is
  'Puts an account on a plan of the active config, or with null on none, opening it if it is new. What was used of '
  'the allowance stays used, and open holds are settled at the plan at which they were taken.';

create or replace function ducto.get_user_plan(p_user_id text) returns ducto.get_user_plan_result
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts := ducto_private.read_account(p_user_id);
  v_now timestamptz := coalesce(v_account.changed_at, clock_timestamp());
  v_terms ducto_private.terms;
  v_answer ducto.get_user_plan_result;
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
  if v_account.plan_id is null then
    return v_answer;
  end if;
  v_account := ducto_private.roll_allowance(v_account, v_now, v_terms.timezone);
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
  'An account''s plan at its present terms, and what is left of its allowance; of an unseen user the config''s default_plan.';

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

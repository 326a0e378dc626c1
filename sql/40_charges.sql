-- Charges: by usage, by a known amount, by a job, of teams, and many at once.

create or replace function ducto_private.as_team_charge(p_team_id text, p_answer ducto.deduction_result)
returns ducto.team_deduction_result
language plpgsql immutable
as $$
begin
  return row(p_answer.transaction_id, case when p_answer.error is null then p_team_id end, p_answer.user_id, p_answer.amount,
    p_answer.balance_after, p_answer.idempotent, p_answer.error, p_answer.cost, p_answer.allowance_used, p_answer.shortfall,
    p_answer.warnings, p_answer.revision)::ducto.team_deduction_result;
end
$$;

create or replace function ducto.deduct(
  p_user_id text,
  p_metrics jsonb,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_reservation_id text default null,
  p_final boolean default true,
  p_labels text[] default null,
  p_occurred_at timestamptz default null)
returns ducto.deduction_result
language plpgsql volatile
as $$
begin
  return (ducto_private.spend(p_user_id, array[row('charge', 'deduct', null, p_metrics, null, null, null,
    p_reservation_id, coalesce(p_final, true), p_idempotency_key, p_metadata, null, null, null, p_occurred_at, false, null,
    ducto_private.check_labels(p_labels), null)::ducto_private.request])).charges[1];
end
$$;
comment on function ducto.deduct is
  'Prices a usage and charges it, in one statement: directly, or settling a hold (p_final => false charges a part of it). '
  'p_labels are up to 8 names of yours, for caps and statistics: an API key, a session, a feature.';

create or replace function ducto.deduct_credits(
  p_user_id text,
  p_amount numeric,
  p_reservation_id text default null,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_model text default null,
  p_final boolean default true,
  p_labels text[] default null,
  p_occurred_at timestamptz default null)
returns ducto.deduction_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_cost(p_amount);
  return (ducto_private.spend(p_user_id, array[row('charge', 'deduct_credits', null, null, null, p_amount, p_model,
    p_reservation_id, coalesce(p_final, true), p_idempotency_key, p_metadata, null, null, null, p_occurred_at, false, null,
    ducto_private.check_labels(p_labels), null)::ducto_private.request])).charges[1];
end
$$;
comment on function ducto.deduct_credits is
  'Charges a known amount, directly or against a hold; 0 settles a hold for nothing.';

create or replace function ducto.deduct_fixed(
  p_user_id text,
  p_job_name text,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_labels text[] default null,
  p_occurred_at timestamptz default null)
returns ducto.deduction_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_text(p_job_name, 'p_job_name');
  return (ducto_private.spend(p_user_id, array[row('charge', 'deduct_fixed', null, jsonb_build_object('fixed_job', p_job_name),
    p_job_name, null, null, null, true, p_idempotency_key, p_metadata, null, null, null, p_occurred_at, false, null,
    ducto_private.check_labels(p_labels), null)::ducto_private.request])).charges[1];
end
$$;
comment on function ducto.deduct_fixed is
  'Charges exactly the credits of a job in the config''s fixed section.';

create or replace function ducto.deduct_team(
  p_team_id text,
  p_user_id text,
  p_metrics jsonb,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_reservation_id text default null,
  p_final boolean default true,
  p_labels text[] default null,
  p_occurred_at timestamptz default null)
returns ducto.team_deduction_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  return ducto_private.as_team_charge(p_team_id, (ducto_private.spend(p_team_id, array[row('charge', 'deduct_team', p_user_id,
    p_metrics, null, null, null, p_reservation_id, coalesce(p_final, true), p_idempotency_key, p_metadata, null, null, null, p_occurred_at, false, null,
    ducto_private.check_labels(p_labels), null)::ducto_private.request])).charges[1]);
end
$$;
comment on function ducto.deduct_team is
  'Prices a usage by the team''s plan and charges its pool, for a member: directly, or settling a hold.';

create or replace function ducto.deduct_team_credits(
  p_team_id text,
  p_user_id text,
  p_amount numeric,
  p_reservation_id text default null,
  p_idempotency_key text default null,
  p_metadata jsonb default null,
  p_model text default null,
  p_final boolean default true,
  p_labels text[] default null,
  p_occurred_at timestamptz default null)
returns ducto.team_deduction_result
language plpgsql volatile
as $$
begin
  perform ducto_private.check_text(p_team_id, 'p_team_id');
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_cost(p_amount);
  return ducto_private.as_team_charge(p_team_id, (ducto_private.spend(p_team_id, array[row('charge', 'deduct_team_credits',
    p_user_id, null, null, p_amount, p_model, p_reservation_id, coalesce(p_final, true), p_idempotency_key, p_metadata, null, null,
    null, p_occurred_at, false, null,
    ducto_private.check_labels(p_labels), null)::ducto_private.request])).charges[1]);
end
$$;
comment on function ducto.deduct_team_credits is
  'Charges a known amount to a team''s pool, for a member: directly, or against a hold.';

-- The elements of a batch, with the bodies of their usages read. One that is no usage is left as a text, which is refused.
create or replace function ducto_private.read_bodies(p_charges jsonb) returns jsonb
language plpgsql stable
as $$
declare
  v_charges jsonb[] := array(select c.value from jsonb_array_elements(p_charges) with ordinality as c (value, place) order by c.place);
begin
  for v_place in 1 .. cardinality(v_charges) loop
    if jsonb_typeof(v_charges[v_place]) = 'object' and v_charges[v_place] -> 'metrics' ? 'body' then
      begin
        v_charges[v_place] := v_charges[v_place]
          || jsonb_build_object('metrics', ducto_private.read_given(v_charges[v_place] -> 'metrics'));
      exception when invalid_parameter_value then
        v_charges[v_place] := v_charges[v_place] || '{"metrics": "no usage"}';
      end;
    end if;
  end loop;
  return to_jsonb(v_charges);
end
$$;

create or replace function ducto.deduct_batch(p_charges jsonb) returns setof ducto.deduction_result
language plpgsql volatile
as $$
declare
  v_account_id text;
  v_requests ducto_private.request[];
  v_places bigint[];
  v_charges ducto.deduction_result[];
  v_answers ducto.deduction_result[];
begin
  if jsonb_typeof(p_charges) is distinct from 'array' then
    perform ducto_private.invalid(format('p_charges must be a JSON list, not %s', coalesce(jsonb_typeof(p_charges), 'null')),
      'Pass [{"user_id": …, "metrics": {…}}, …].');
  elsif jsonb_array_length(p_charges) > 10000 then
    perform ducto_private.invalid(format('p_charges has %s elements; at most 10000 are charged at once', jsonb_array_length(p_charges)),
      'Charge them in several calls.');
  end if;
  if not exists (select from ducto_private.activations as a where a.withdrawn_at is null) then
    perform ducto_private.find_terms(null, null, clock_timestamp());
  end if;
  -- Before the first account is locked.
  if p_charges @? '$[*].metrics.body' then
    p_charges := ducto_private.read_bodies(p_charges);
  end if;
  -- Account by account, always in the same order: whoever waits for one holds none that comes later.
  for v_account_id, v_requests, v_places in
    with elements as (
      select c.place, c.value ->> 'team_id' as team_id, c.value ->> 'user_id' as user_id, c.value ->> 'job' as job,
        nullif(c.value -> 'metrics', 'null') as metrics, c.value ->> 'model' as model, c.value ->> 'reservation_id' as hold_id,
        c.value ->> 'idempotency_key' as key, nullif(c.value -> 'metadata', 'null') as metadata,
        case jsonb_typeof(c.value -> 'amount') when 'number' then (c.value -> 'amount')::numeric end as amount,
        case jsonb_typeof(c.value -> 'final') when 'boolean' then (c.value -> 'final')::boolean else true end as final,
        -- It has user_id, with team_id where a team pays, one of metrics, amount or job, and what goes with them.
        jsonb_typeof(c.value) = 'object'
          and c.value - '{user_id,team_id,metrics,amount,job,model,reservation_id,final,idempotency_key,metadata,labels,occurred_at}'::text[] = '{}'
          and coalesce(jsonb_typeof(c.value -> 'user_id'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'team_id'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'metrics'), 'null') in ('object', 'null')
          and coalesce(jsonb_typeof(c.value -> 'amount'), 'null') in ('number', 'null')
          and coalesce(jsonb_typeof(c.value -> 'job'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'model'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'reservation_id'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'final'), 'null') in ('boolean', 'null')
          and coalesce(jsonb_typeof(c.value -> 'idempotency_key'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'occurred_at'), 'null') in ('string', 'null')
          and coalesce(jsonb_typeof(c.value -> 'metadata'), 'null') in ('object', 'null')
          and coalesce(jsonb_typeof(c.value -> 'labels'), 'null') in ('array', 'null')
          and (c.value @? 'strict $.labels[*] ? (@.type() <> "string")') is not true as shaped,
        case jsonb_typeof(c.value -> 'labels') when 'array' then array(
          select distinct l.label collate "C"
          from jsonb_array_elements_text(c.value -> 'labels') as l (label)
          order by 1) end as labels,
        c.value ->> 'occurred_at' as given_at, ducto_private.to_time(c.value ->> 'occurred_at') as occurred_at
      from jsonb_array_elements(p_charges) with ordinality as c (value, place)
    ), judged as (
      select e.*, coalesce(e.team_id, e.user_id) collate "C" as account_id, e.shaped and num_nonnulls(e.metrics, e.amount, e.job) = 1
        and (e.model is null or e.amount is not null) and ducto_private.is_cost(e.amount) is not false
        and (e.given_at is null or e.occurred_at is not null)
        and (e.labels is null or cardinality(e.labels) <= 8 and (
          select bool_and(ducto_private.is_label(l.label)) from unnest(e.labels) as l (label)) is not false)
        and e.user_id is not null and (e.team_id is null or ducto_private.is_text(e.user_id))
        and (e.job is null or ducto_private.is_text(e.job)) as sound
      from elements as e
    )
    select case when ducto_private.is_text(j.account_id) then j.account_id end,
      array_agg(row('charge', case when j.job is null then 'deduct' else 'deduct_fixed' end
          || case when j.team_id is null then '' else '_team' end || case when j.amount is null then '' else '_credits' end,
        case when j.team_id is not null then j.user_id end,
        case when j.job is null then j.metrics else jsonb_build_object('fixed_job', j.job) end, j.job, j.amount, j.model,
        j.hold_id, j.final, j.key, j.metadata, null, null, null, j.occurred_at, true,
        case when j.sound is not true then 'invalid_argument' end, nullif(j.labels, '{}'),
        null)::ducto_private.request order by j.place),
      array_agg(j.place order by j.place)
    from judged as j
    group by j.account_id
    order by j.account_id
  loop
    if v_account_id is null then
      v_charges := array_fill(ducto_private.charge_refusal('invalid_argument', null), array[cardinality(v_places)]);
    else
      v_charges := (ducto_private.spend(v_account_id, v_requests)).charges;
    end if;
    for v_place in 1 .. cardinality(v_places) loop
      v_answers[v_places[v_place]] := v_charges[v_place];
    end loop;
  end loop;
  return query
  select a.*
  from unnest(v_answers) as a;
end
$$;
comment on function ducto.deduct_batch is
  'Many charges in one call and one transaction, answered in their order: each stands or is refused by itself, as if '
  'called alone. p_charges is a list of at most 10,000 objects: ''user_id'', and beside it ''team_id'' where a member '
  'charges a team; one of ''metrics'', ''amount'' (and ''model'') and ''job''; and where wanted ''reservation_id'', '
  '''final'', ''idempotency_key'', ''metadata'', ''labels'' and ''occurred_at''. What the call alone would raise is here a refusal of the element; '
  'only without active prices the whole batch raises. All accounts are locked at the start, in order.';

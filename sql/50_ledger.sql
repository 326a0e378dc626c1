-- Reading the ledger.

-- How the config of a version turns cost into credits.
create or replace function ducto_private.rounding_of(p_version integer, p_type text) returns text
language plpgsql stable
as $$
begin
  return (
    select t.rounding
    from ducto_private.terms as t
    where t.version = p_version and t.plan_id = '' and p_type = 'usage');
end
$$;

create or replace function ducto_private.transaction_answer(p_row ducto_private.ledger) returns ducto.transaction
language plpgsql stable
as $$
begin
  return row(p_row.transaction_id, p_row.account_id, p_row.seq, p_row.type, p_row.amount, p_row.balance_after,
    p_row.allowance_used, p_row.allowance_lapsed, p_row.cost, p_row.carry_after,
    coalesce(p_row.rounding, ducto_private.rounding_of(p_row.pricing_version, p_row.type)), p_row.member_id, p_row.model,
    p_row.resolved_model, p_row.usage, p_row.pricing_version, p_row.plan_id, p_row.hold_id, p_row.refers_to,
    p_row.idempotency_key, p_row.paid_amount, p_row.paid_currency, p_row.reference, nullif(p_row.expires_at, 'infinity'), p_row.reason,
    p_row.metadata, p_row.created_at, null, p_row.occurred_at, p_row.price_error,
    p_row.warnings, p_row.labels)::ducto.transaction;
end
$$;

create or replace function ducto_private.find_transaction(p_transaction_id text, p_user_id text)
returns ducto_private.ledger
language plpgsql stable
as $$
declare
  v_id uuid := ducto_private.to_id(p_transaction_id);
  v_row ducto_private.ledger;
begin
  select t.*
  into v_row
  from ducto_private.ledger as t
  where t.transaction_id = v_id and (p_user_id is null or t.account_id = p_user_id);
  return v_row;
end
$$;

-- The row that a key wrote; null where none did.
create or replace function ducto_private.find_by_key(p_account_id text, p_key text) returns ducto_private.ledger
language plpgsql stable
as $$
declare
  v_row ducto_private.ledger;
begin
  select t.*
  into v_row
  from ducto_private.ledger as t
  where t.account_id = p_account_id and hashtextextended(t.idempotency_key, 0) = hashtextextended(p_key, 0)
    and t.idempotency_key = p_key;
  return v_row;
end
$$;

create or replace function ducto.get_transaction(
  p_transaction_id text default null, p_user_id text default null, p_idempotency_key text default null)
returns ducto.transaction
language plpgsql stable
as $$
declare
  v_row ducto_private.ledger;
begin
  if (p_transaction_id is null) = (p_idempotency_key is null) or p_idempotency_key is not null and p_user_id is null then
    perform ducto_private.invalid('a row is found by p_transaction_id, or by p_user_id and p_idempotency_key',
      'Give the row''s id, or the account''s id and the key of the call that wrote the row.');
  elsif p_transaction_id is not null then
    v_row := ducto_private.find_transaction(p_transaction_id, p_user_id);
  else
    perform ducto_private.check_text(p_user_id, 'p_user_id');
    perform ducto_private.check_key(p_idempotency_key);
    v_row := ducto_private.find_by_key(p_user_id, p_idempotency_key);
  end if;
  if v_row.transaction_id is null then
    return jsonb_populate_record(null::ducto.transaction, '{"error": "transaction_not_found", "amount": 0, "balance_after": 0,
      "allowance_used": 0, "allowance_lapsed": 0, "cost": 0, "carry_after": 0}');
  end if;
  return ducto_private.transaction_answer(v_row);
end
$$;
comment on function ducto.get_transaction is
  'A row of the ledger: by its id, with p_user_id only if it is of that account; or by p_user_id and the key of the '
  'call that wrote it, such as a charge or a grant.';

create or replace function ducto.list_transactions(
  p_user_id text,
  p_limit integer default 50,
  p_before bigint default null,
  p_type text default null,
  p_from timestamptz default null,
  p_to timestamptz default null)
returns setof ducto.transaction
language plpgsql stable
as $$
declare
  v_from bigint := 0;
  v_to bigint := 9223372036854775807;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_limit(coalesce(p_limit, 50));
  perform ducto_private.check_choice(coalesce(p_type, 'usage'),
    '{purchase,subscription,signup_bonus,promotion,adjustment,usage,refund,expiry,removal}', 'p_type');
  if p_to < p_from then
    perform ducto_private.invalid('p_to lies before p_from', 'A window is [p_from, p_to).');
  end if;
  if p_from is not null then
    v_from := ducto_private.seq_at(p_user_id, p_from, true);
  end if;
  if p_to is not null then
    v_to := ducto_private.seq_at(p_user_id, p_to, true);
  end if;
  -- Each row's details are looked up by its id: planned as one join on a young database, they would be scanned for each.
  return query
  select a.*
  from (
    select r.transaction_id
    from ducto_private.transactions as r
    where r.account_id = p_user_id
      and r.seq > v_from
      and r.seq <= v_to
      and (p_before is null or r.seq < p_before)
      and (p_type is null or r.type = p_type)
    order by r.seq desc
    limit coalesce(p_limit, 50)
  ) as r
  cross join lateral ducto_private.find_transaction(r.transaction_id::text, p_user_id) as t
  cross join lateral ducto_private.transaction_answer(t) as a
  order by t.seq desc;
end
$$;
comment on function ducto.list_transactions is
  'An account''s ledger, newest first. p_limit is 1 to 1000, p_before is the last seq seen, p_type is one of the '
  'ledger''s types, and p_from and p_to bound created_at: [p_from, p_to).';

create or replace function ducto.get_statement(p_user_id text, p_start timestamptz, p_end timestamptz) returns ducto.statement
language plpgsql stable
as $$
declare
  v_span constant ducto_private.usage_span := ducto_private.usage_span(p_start, p_end, p_user_id);
  v_account ducto_private.accounts;
  v_after bigint;
  v_upto bigint;
  v_opening numeric;
  v_granted numeric;
  v_purchased numeric;
  v_charged numeric;
  v_allowance_used numeric;
  v_refunded numeric;
  v_removed numeric;
  v_expired numeric;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  v_account := ducto_private.read_account(p_user_id);
  v_after := ducto_private.seq_at(p_user_id, v_span.starts, true);
  v_upto := ducto_private.seq_at(p_user_id, v_span.ends, true);
  v_opening := ducto_private.balance_at(p_user_id, v_after,
    least(v_span.starts - interval '1 microsecond', v_account.changed_at));
  select coalesce(sum(t.amount) filter (where t.type not in ('purchase', 'usage', 'refund', 'removal')), 0),
    coalesce(sum(t.amount) filter (where t.type = 'purchase'), 0),
    coalesce(-sum(t.amount) filter (where t.type = 'usage'), 0),
    coalesce(sum(t.allowance_used) filter (where t.type = 'usage'), 0),
    coalesce(sum(t.amount) filter (where t.type = 'refund'), 0),
    coalesce(-sum(t.amount) filter (where t.type = 'removal'), 0)
  into v_granted, v_purchased, v_charged, v_allowance_used, v_refunded, v_removed
  from ducto_private.transactions as t
  where t.account_id = p_user_id and t.seq > v_after and t.seq <= v_upto and t.type <> 'expiry';
  -- Expiry counts when the credits were due, and what is not due yet has not expired, wherever the window ends.
  select coalesce(sum(x.expired), 0)
  into v_expired
  from (
    select -t.amount as expired
    from ducto_private.transaction_details as d
    join ducto_private.transactions as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
    where d.account_id = p_user_id and d.occurred_at >= v_span.starts and d.occurred_at < v_span.ends and t.type = 'expiry'
    union all
    select e.expired
    from ducto_private.expiry_steps(p_user_id, v_account.changed_at) as e
    where e.due_at >= v_span.starts and e.due_at < v_span.ends
  ) as x;
  return row(p_user_id, nullif(v_span.starts, '-infinity'), nullif(v_span.ends, 'infinity'), v_opening,
    ducto_private.at_most_bigint(v_granted), ducto_private.at_most_bigint(v_purchased), ducto_private.at_most_bigint(v_charged),
    ducto_private.at_most_bigint(v_allowance_used), ducto_private.at_most_bigint(v_refunded),
    ducto_private.at_most_bigint(v_removed), ducto_private.at_most_bigint(v_expired),
    v_opening + v_granted + v_purchased - v_charged + v_refunded - v_removed - v_expired, null,
    coalesce(v_account.revision, 0))::ducto.statement;
end
$$;
comment on function ducto.get_statement is
  'What became of an account''s credits in [p_start, p_end); null leaves an end open. Expiry counts when the credits were '
  'due, whenever that is recorded, so that the statement of a past window never changes. Zeros for an unknown account.';

-- The formulas by which a usage was priced, as the config of that version has them.
create or replace function ducto_private.formulas_of(p_terms ducto_private.terms, p_usage jsonb, p_key text, p_job_only boolean)
returns jsonb
language plpgsql stable
as $$
declare
  v_config constant jsonb := (ducto_private.find_version(p_terms.version)).config;
  v_job constant jsonb := v_config -> 'fixed' -> (p_usage ->> 'fixed_job');
begin
  if p_job_only then
    return jsonb_build_object('fixed', v_job);
  end if;
  return jsonb_strip_nulls(jsonb_build_object(
    'model', coalesce((
        select v.config #> array['plans', p_terms.plan_id, 'rate_overrides', coalesce(p_key, '_default')]
        from ducto_private.pricing_versions as v
        where v.version = p_terms.own_version),
      v_config -> 'models' -> coalesce(p_key, '_default')),
    'tools', case when p_usage ? 'tool_calls' then v_config -> 'tools' end,
    'search', v_config -> 'search' -> 'costs',
    'cache', v_config -> 'cache' -> 'discount',
    'fixed', v_job));
end
$$;

create or replace function ducto.explain_transaction(p_transaction_id text, p_user_id text default null) returns ducto.explanation
language plpgsql stable
as $$
declare
  v_row ducto_private.ledger;
  v_terms ducto_private.terms;
  v_quote ducto_private.quote;
  v_job_only boolean;
  v_formulas jsonb := '{}'::jsonb;
  v_parts jsonb := '{}'::jsonb;
begin
  v_row := ducto_private.find_transaction(p_transaction_id, p_user_id);
  if v_row.transaction_id is null then
    return jsonb_populate_record(null::ducto.explanation, '{"error": "transaction_not_found", "cost": 0, "carry_before": 0,
      "carry_after": 0, "amount": 0, "allowance_used": 0}');
  end if;
  if 'priced_by_hold' = any (v_row.warnings) then
    v_parts := jsonb_build_object('held', v_row.cost);
    v_formulas := jsonb_build_object('price_error', v_row.price_error);
  elsif v_row.usage is not null then
    v_terms := ducto_private.find_terms(v_row.pricing_version, v_row.plan_id, v_row.created_at);
    -- deduct_fixed() and deduct() of a job alone leave the same usage; the cost tells which it was.
    v_job_only := v_row.usage ? 'fixed_job' and v_row.usage - 'fixed_job' = '{}'::jsonb;
    if v_job_only then
      v_quote := jsonb_populate_record(v_quote, jsonb_build_object('model_credits', 0, 'tool_credits', 0, 'search_credits', 0,
        'cache_savings', 0, 'fixed_credits', ducto_private.job_price(v_terms.version, v_row.usage ->> 'fixed_job')));
      v_job_only := v_quote.fixed_credits = v_row.cost;
    end if;
    if not v_job_only then
      v_quote := ducto_private.price(v_terms, v_row.usage, case when v_row.hold_id is not null then coalesce((
        select h.model
        from ducto_private.holds as h
        where h.hold_id = v_row.hold_id and h.account_id = v_row.account_id), '') end);
    end if;
    v_formulas := ducto_private.formulas_of(v_terms, v_row.usage, v_row.resolved_model, v_job_only);
    v_parts := jsonb_build_object(
      'model_credits', v_quote.model_credits,
      'tool_credits', v_quote.tool_credits,
      'search_credits', v_quote.search_credits,
      'cache_savings', v_quote.cache_savings,
      'fixed_credits', v_quote.fixed_credits);
  end if;
  if v_row.bounded_cost is not null then
    v_parts := v_parts || jsonb_build_object('bounded_cost', v_row.bounded_cost);
  end if;
  return row(v_row.transaction_id, v_row.account_id, v_row.cost, coalesce((
      select t.carry_after
      from ducto_private.transactions as t
      where t.account_id = v_row.account_id and t.seq = v_row.seq - 1), 0),
    v_row.carry_after, coalesce(v_row.rounding, ducto_private.rounding_of(v_row.pricing_version, v_row.type)), v_row.usage, v_row.pricing_version,
    v_row.plan_id, v_row.resolved_model, v_formulas, v_parts, null, v_row.amount,
    v_row.allowance_used)::ducto.explanation;
end
$$;
comment on function ducto.explain_transaction is
  'How a charge came to its cost: usage, version, plan, formulas, parts, and the carried fraction before and after. A '
  'charge of a known amount, and a row that is no charge, has no formulas and parts.';

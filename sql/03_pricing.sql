-- Published prices: immutable versions of rows, one of them active at a time.
--
-- Python compiles a config to formulas, prices and terms; publish() numbers and stores them. A formula is a function that is
-- made once for ever, a price its rates. Which version is active is a question of rows and time, asked in the same statement
-- that reads the price: no session can price by an old version, and no two versions can mix.

create or replace function ducto_private.lock_setup() returns void
language plpgsql volatile
as $$
begin
  perform pg_advisory_xact_lock(7235512, 1);
end
$$;

-- The version that is active at p_now, or null.
create or replace function ducto_private.active_version(p_now timestamptz) returns integer
language plpgsql stable
as $$
begin
  return (
    select a.version
    from ducto_private.activations as a
    where a.starts_at <= p_now and a.ends_at > p_now);
end
$$;

-- The version that was active at a time gone by. What was recorded later did not price then.
create or replace function ducto_private.version_at(p_time timestamptz) returns integer
language plpgsql stable
as $$
declare
  v_version constant integer := (
    select a.version
    from ducto_private.activations as a
    where greatest(a.starts_at, a.recorded_at) <= p_time and a.withdrawn_at is null
    order by a.activation_id desc
    limit 1);
begin
  if v_version is null then
    perform ducto_private.invalid(format('p_occurred_at: no pricing version was active at %s', p_time),
      'Leave it out for what happened before the first activation.');
  end if;
  return v_version;
end
$$;

-- The terms of a version (null: of the one active at p_now) for accounts on a plan, null for none.
create or replace function ducto_private.find_terms(p_version integer, p_plan text, p_now timestamptz) returns ducto_private.terms
language plpgsql stable
as $$
declare
  v_terms ducto_private.terms;
begin
  select t.*
  into v_terms
  from ducto_private.terms as t
  where t.version = coalesce(p_version, ducto_private.active_version(p_now)) and t.plan_id = coalesce(p_plan, '');
  if not found then
    perform ducto_private.find_version(p_version) where p_version is not null;
    raise exception 'pricing not loaded'
      using errcode = 'DU001',
        hint = 'Publish a config with `ducto-pg pricing publish`, or activate a version with ducto.activate_pricing().';
  end if;
  return v_terms;
end
$$;

create or replace function ducto_private.find_version(p_version integer) returns ducto_private.pricing_versions
language plpgsql stable
as $$
declare
  v_row ducto_private.pricing_versions;
begin
  select v.*
  into v_row
  from ducto_private.pricing_versions as v
  where v.version = p_version;
  if not found then
    raise exception 'there is no pricing version %', coalesce(p_version::text, 'null')
      using errcode = 'DU002', hint = 'See ducto.get_pricing_history().';
  end if;
  return v_row;
end
$$;

-- The zone that the first recorded activation fixed, by whose days all statistics count; null before.
create or replace function ducto_private.ledger_zone() returns text
language plpgsql stable
as $$
begin
  return (
    select t.timezone
    from ducto_private.activations as a
    join ducto_private.terms as t on t.version = a.version and t.plan_id = ''
    where a.withdrawn_at is null
    order by a.activation_id
    limit 1);
end
$$;

-- ---------------------------------------------------------------------------------------------------------------------
-- Formulas

create or replace function ducto_private.formula_name(p_formula_id bigint) returns text
language plpgsql immutable
as $$
begin
  return 'formula_' || lpad(to_hex(p_formula_id), 16, '0');
end
$$;

-- Calls a formula for which the session's evaluate() has no branch yet, because another session has just published it.
create or replace function ducto_private.evaluate_by_name(p_formula_id bigint, p_usage jsonb, p_rates numeric[]) returns numeric
language plpgsql stable
as $$
declare
  v_value numeric;
begin
  execute format('select ducto_private.%I($1, $2)', ducto_private.formula_name(p_formula_id))
  into v_value
  using p_usage, p_rates;
  return v_value;
end
$$;

-- A binary search for one of these formulas, which stand in order, as PL/pgSQL.
create or replace function ducto_private.branches(p_ids bigint[]) returns text
language plpgsql stable
as $$
declare
  v_half constant integer := cardinality(p_ids) / 2;
begin
  return case cardinality(p_ids)
    when 0 then ''
    when 1 then format(E'if p_formula_id = %s then\n  return ducto_private.%I(p_usage, p_rates);\nend if;\n',
      p_ids[1], ducto_private.formula_name(p_ids[1]))
    else format(E'if p_formula_id <= %s then\n%selse\n%send if;\n',
      p_ids[v_half], ducto_private.branches(p_ids[:v_half]), ducto_private.branches(p_ids[v_half + 1:])) end;
end
$$;

-- What follows from the rows of formulas and is not there, or is something else: their functions, and evaluate(), which calls
-- them by id. A name and the statement that makes it.
create or replace function ducto_private.formula_drift() returns setof ducto_private.objects
language sql stable
as $$
  with wanted as (
    select format('ducto_private.%I(p_usage jsonb, p_rates numeric[])', n.name) as name, f.body, 'immutable' as volatility,
      'safe' as parallel, format('ducto_private.%I(jsonb,numeric[])', n.name) as signature
    from ducto_private.formulas as f
    cross join lateral ducto_private.formula_name(f.formula_id) as n (name)
    union all
    select 'ducto_private.evaluate(p_formula_id bigint, p_usage jsonb, p_rates numeric[])',
      format(E'begin\n%sreturn ducto_private.evaluate_by_name(p_formula_id, p_usage, p_rates);\nend',
        ducto_private.branches(array(select f.formula_id from ducto_private.formulas as f order by f.formula_id))),
      'stable', 'unsafe', 'ducto_private.evaluate(bigint,jsonb,numeric[])'
  )
  select 'function', w.signature,
    format('create or replace function %s returns numeric language plpgsql %s parallel %s '
      'set search_path = pg_catalog, pg_temp as %L; revoke all on function %s from public',
      w.name, w.volatility, w.parallel, w.body, w.signature)
  from wanted as w
  left join pg_proc as p on p.oid = to_regprocedure(w.signature)
  where p.oid is null or p.prosrc <> w.body or p.provolatile <> left(w.volatility, 1)::"char"
    or p.proparallel <> left(w.parallel, 1)::"char" or p.prosecdef or p.proisstrict or p.prorettype <> 'numeric'::regtype
    or p.proconfig is distinct from '{"search_path=pg_catalog, pg_temp"}'
    or p.prolang <> (select l.oid from pg_language as l where l.lanname = 'plpgsql')
$$;

-- Makes it, and answers what it made.
create or replace function ducto_private.make_formulas() returns text[]
language plpgsql volatile
as $$
declare
  v_made ducto_private.objects;
  v_names text[] := '{}';
begin
  for v_made in
    select d.* from ducto_private.formula_drift() as d
  loop
    begin
      execute v_made.definition;
    exception when invalid_function_definition then
      execute format('drop function %s; %s', v_made.name, v_made.definition);
    end;
    v_names := v_names || ('function ' || v_made.name);
  end loop;
  return v_names;
end
$$;

select ducto_private.make_formulas();

-- ---------------------------------------------------------------------------------------------------------------------
-- Prices

-- Whether a config's match allows the rest of a name after a key: dates and revisions as providers append them, anything after
-- a separator, or nothing.
create or replace function ducto_private.allows_rest(p_match text, p_rest text) returns boolean
language plpgsql immutable parallel safe
as $$
begin
  return case p_match
    when 'dated' then p_rest ~ '^([-@:/_]([0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8}|[0-9]{6}|[0-9]{3,4}|[0-9]{2}-[0-9]{2}([0-9]{2})?|v[0-9]+(:[0-9]+)?|latest))+$'
    when 'prefix' then p_rest <> '' and strpos('-@:/_', left(p_rest, 1)) > 0
    else false end;
end
$$;

-- The rest of a name after an alias that fits it; null where it does not. Of an alias for a key the rest is as of a key, one
-- that stands for the rest has any rest. Letter case is ignored, a * at its start is any text.
create or replace function ducto_private.rest_after(p_name text, p_alias text, p_target text, p_match text) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_name constant text := lower(p_name collate "C");
  v_alias constant text := lower(ltrim(p_alias, '*') collate "C");
  v_start integer := strpos(v_name, v_alias);
  v_next integer;
  v_rest text;
begin
  while v_start = 1 or v_start > 1 and starts_with(p_alias, '*') loop
    v_rest := substr(p_name, v_start + length(v_alias));
    if p_target = '*' and v_rest <> '' or p_target <> '*' and (v_rest = '' or ducto_private.allows_rest(p_match, v_rest)) then
      return v_rest;
    end if;
    v_next := strpos(substr(v_name, v_start + 1), v_alias);
    exit when v_next = 0;
    v_start := v_start + v_next;
  end loop;
  return null;
end
$$;

-- The price in a section by the key that serves a name: the name itself, else what the longest alias that fits says, else the
-- longest key whose rest the config's match allows; null where none does. Keys that serve a name are prefixes of it, and so of
-- the greatest key that is not above it.
create or replace function ducto_private.find_price(
  p_terms ducto_private.terms, p_version integer, p_section text, p_name text, p_aliases jsonb) returns ducto_private.prices
language plpgsql stable
as $$
declare
  v_price ducto_private.prices;
  v_other ducto_private.prices;
  v_target text;
  v_rest text;
begin
  select p.*
  into v_price
  from ducto_private.prices as p
  where p.version = p_version and p.section = p_section and p.key <= p_name
  order by p.key desc
  limit 1;
  if v_price.key = p_name then
    return v_price;
  end if;
  if p_aliases is not null then
    select a.target, r.rest
    into v_target, v_rest
    from jsonb_each_text(p_aliases) as a (alias, target)
    cross join lateral ducto_private.rest_after(p_name, a.alias, a.target, p_terms.match) as r (rest)
    where r.rest is not null
    order by length(ltrim(a.alias, '*')) desc, a.alias collate "C"
    limit 1;
    if found then
      v_other := ducto_private.find_price(p_terms, p_version, p_section, case v_target when '*' then v_rest else v_target end,
        case v_target when '*' then p_aliases end);
      if v_other.key <> '_default' then
        return v_other;
      end if;
    end if;
  end if;
  if v_price.key <> '_default' and starts_with(p_name, v_price.key)
    and ducto_private.allows_rest(p_terms.match, substr(p_name, length(v_price.key) + 1))
  then
    return v_price;
  end if;
  select p.*
  into v_other
  from ducto_private.prices as p
  where p.version = p_version and p.section = p_section and p.key = any (v_price.prefixes) and starts_with(p_name, p.key)
    and ducto_private.allows_rest(p_terms.match, substr(p_name, length(p.key) + 1))
  order by length(p.key) desc
  limit 1;
  return v_other;
end
$$;

-- The price of a model: by a key that serves its name, the plan's own before the list's, else by _default. Null where there is
-- none.
create or replace function ducto_private.find_model(p_terms ducto_private.terms, p_name text) returns ducto_private.prices
language plpgsql stable
as $$
declare
  v_price ducto_private.prices;
begin
  if p_name not in ('', 'none') then
    if p_terms.overrides is not null then
      v_price := ducto_private.find_price(p_terms, p_terms.own_version, p_terms.overrides, p_name, p_terms.aliases);
    end if;
    if v_price.key is null then
      v_price := ducto_private.find_price(p_terms, p_terms.version, 'models', p_name, p_terms.aliases);
    end if;
  end if;
  if v_price.key is null then
    select p.*
    into v_price
    from ducto_private.prices as p
    where p.key = '_default' and (p.version, p.section) in ((p_terms.own_version, p_terms.overrides), (p_terms.version, 'models'))
    order by p.section = 'models'
    limit 1;
  end if;
  return v_price;
end
$$;

-- Each count that is a part of another, and that one: it cannot be above it. Cached input that is counted beside the input is no
-- part of it.
create or replace function ducto_private.part_limits(p_cached text) returns setof ducto_private.part_limit
language sql immutable parallel safe
as $$
  select l.value ->> 0, l.value ->> 1
  from jsonb_array_elements(jsonb '{{part_limits}}' -> p_cached) as l
$$;

-- The JSON path that finds a usage in which a part is above its whole.
create or replace function ducto_private.misfits(p_cached text) returns jsonpath
language sql immutable parallel safe
as $$
  select ('$ ? (' || string_agg(case when strpos(l.part, ' + ') > 0
      then format('@.%s > @.%s', replace(l.part, ' + ', ' + @.'), l.whole)
      else format('@.%1$s > @.%2$s || @.%1$s > 0 && !exists(@.%2$s)', l.part, l.whole) end, ' || ') || ')')::jsonpath
  from ducto_private.part_limits(p_cached) as l
$$;

-- The first part of a usage that is above its whole, in words, and both counts.
create or replace function ducto_private.misfit(p_cached text, p_usage jsonb) returns text[]
language plpgsql stable parallel safe
as $$
begin
  return (
    select array[format('%s is more than the %s that it is a part of', l.part, l.whole), format('%s of %s', c.count, w.count)]
    from ducto_private.part_limits(p_cached) as l
    cross join lateral (
      select sum(coalesce((p_usage -> p.name)::numeric, 0)) as count
      from unnest(string_to_array(l.part, ' + ')) as p (name)
    ) as c
    cross join lateral (select coalesce((p_usage -> l.whole)::numeric, 0) as count) as w
    where c.count > w.count
    limit 1);
end
$$;

-- What one price gives for a usage, in credits.
create or replace function ducto_private.price_part(p_price ducto_private.prices, p_usage jsonb, p_factor numeric) returns numeric
language plpgsql stable
as $$
begin
  return ducto_private.evaluate(p_price.formula_id, p_usage, p_price.rates) * p_factor;
exception when division_by_zero then
  raise exception 'division by zero in %.%', p_price.section, p_price.key
    using errcode = 'DU006', hint = 'Guard the divisor, as in: x / y if y else 0';
end
$$;

-- A part of a price that is below zero: told, or refused.
create or replace function ducto_private.negative_price(p_quote ducto_private.quote, p_path text, p_warns boolean)
returns ducto_private.quote
language plpgsql stable
as $$
begin
  if not p_warns then
    raise exception '%: the price of this usage is below 0', p_path
      using errcode = 'DU009', hint = 'Mend the formula, or bound it: max(0, ...).';
  end if;
  if not coalesce(p_quote.warnings, '{}') @> '{negative_price}' then
    p_quote.warnings := p_quote.warnings || '{negative_price}'::text[];
  end if;
  return p_quote;
end
$$;

-- The credits of a fixed job.
create or replace function ducto_private.job_price(p_version integer, p_job text) returns numeric
language plpgsql stable
as $$
declare
  v_credits constant numeric := (
    select p.rates[1]
    from ducto_private.prices as p
    where p.version = p_version and p.section = 'fixed' and p.key = p_job);
begin
  if v_credits is null then
    raise exception 'unknown job ''%''', left(p_job, 255)
      using errcode = 'DU004',
        hint = ducto_private.did_you_mean(
          p_job,
          array(select p.key from ducto_private.prices as p where p.version = p_version and p.section = 'fixed'),
          'Add it to the config''s fixed.');
  end if;
  return v_credits;
end
$$;

-- The whole price of a usage, part by part, by the terms of a version and a plan. At a settlement (p_hold_model is not null, ''
-- where the hold names none) an unknown model, or none, is priced as the hold's, and a count that no formula charges only warns.
create or replace function ducto_private.price(p_terms ducto_private.terms, p_usage jsonb, p_hold_model text default null)
returns ducto_private.quote
language plpgsql stable
as $$
declare
  v_warns constant boolean := p_terms.unpriced = 'warn' or p_hold_model is not null;
  v_model text := coalesce(p_usage ->> 'model', '');
  v_job constant text := p_usage ->> 'fixed_job';
  v_covers text[] := p_terms.covers || '{fixed_job,tool_calls}';
  v_price ducto_private.prices;
  v_quote ducto_private.quote;
  v_tool record;
  v_part numeric;
  v_most numeric := 0;
  v_path text;
  v_missing text;
begin
  if p_usage - ducto_private.known_fields() - p_terms.metrics <> '{}' and p_hold_model is null then
    perform ducto_private.unknown_metric(p_usage, ducto_private.known_fields() || p_terms.metrics);
  end if;
  if p_usage @? p_terms.misfits then
    perform ducto_private.invalid(m.words[1],
      'input_tokens and output_tokens count all, their parts included: see ducto.read_usage(), or say cached: beside in the config.',
      m.words[2])
    from ducto_private.misfit(p_terms.cached, p_usage) as m (words);
  end if;
  v_quote.version := p_terms.version;
  v_quote.plan_id := nullif(p_terms.plan_id, '');

  v_price := ducto_private.find_model(p_terms, v_model);
  -- A job by itself needs no model.
  if v_price.key is null and p_hold_model <> '' and (v_job is null or v_model not in ('', 'none')
    or p_usage - '{model,fixed_job,tool_calls,provider_cost}'::text[] <> '{}')
  then
    v_price := ducto_private.find_model(p_terms, p_hold_model);
    if v_price.key is not null then
      v_quote.warnings := '{priced_by_hold_model}';
      v_model := p_hold_model;
      p_usage := p_usage || jsonb_build_object('model', v_model);
    end if;
  end if;
  if v_price.key <> '_default' or v_model = '_default' then
    v_quote.resolved_model := v_price.key;
  end if;
  v_quote.model_credits := 0;
  if v_price.key is not null then
    v_path := v_price.section || '.' || v_price.key;
    v_quote.model_credits := ducto_private.price_part(v_price, p_usage, p_terms.factor);
    v_most := v_quote.model_credits;
    -- A flat price charges all counts of a request, which needs a model: without one it charges none.
    if v_quote.model_credits <> 0 or v_model not in ('', 'none') or p_usage ? 'requests' or 'unread' <> all (v_price.covers) then
      v_covers := v_covers || v_price.covers;
    end if;
    if v_quote.model_credits < 0 then
      v_quote := ducto_private.negative_price(v_quote, v_path, p_terms.unpriced = 'warn');
      v_quote.model_credits := 0;
    end if;
  elsif v_model not in ('', 'none')
    or p_usage @? '$.keyvalue() ? (@.key like_regex "^(input|output|cache_read|cache_write)_tokens$" && @.value <> 0)'
  then
    perform ducto_private.unknown_model(p_terms, v_model);
  end if;

  v_quote.tool_credits := 0;
  if p_usage ? 'tool_calls' then
    for v_tool in
      with calls as (
        select coalesce(c.call ->> 'name', c.call #>> '{}') as name
        from jsonb_path_query(p_usage, 'strict $.tool_calls ? (@.type() == "array")[*]') as c (call)
      ), tools as (
        select p as price, count(*) as calls
        from calls as c
        join ducto_private.prices as p on p.version = p_terms.version and p.section = 'tools' and p.key = c.name
        where p.key <> '_default'
        group by p
      )
      select t.price, t.calls, (t.price).key as key, false as others
      from tools as t
      union all
      select p, n.calls - (select coalesce(sum(t.calls), 0) from tools as t), p.key, true
      from ducto_private.prices as p
      cross join lateral (
        select case jsonb_typeof(p_usage -> 'tool_calls') when 'array' then jsonb_array_length(p_usage -> 'tool_calls')
          else (p_usage -> 'tool_calls')::numeric end as calls
      ) as n
      where p.version = p_terms.version and p.section = 'tools' and p.key = '_default'
      order by others, key
    loop
      continue when v_tool.calls = 0;
      v_price := v_tool.price;
      v_part := ducto_private.price_part(v_price, p_usage || jsonb_build_object('tool_calls', v_tool.calls), p_terms.factor);
      v_quote.tool_credits := v_quote.tool_credits + v_part;
      v_covers := v_covers || v_price.covers;
      if v_part > v_most then
        v_most := v_part;
        v_path := 'tools.' || v_price.key;
      end if;
    end loop;
    if v_quote.tool_credits < 0 then
      v_quote := ducto_private.negative_price(v_quote, 'tools', p_terms.unpriced = 'warn');
      v_quote.tool_credits := 0;
    end if;
  end if;

  v_quote.search_credits := 0;
  v_quote.cache_savings := 0;
  for v_price in
    select p.*
    from ducto_private.prices as p
    where p.version = p_terms.version and (p.section, p.key) in (('search', 'costs'), ('cache', 'discount'))
    order by p.section desc
  loop
    v_part := ducto_private.price_part(v_price, p_usage, p_terms.factor);
    if v_part > v_most then
      v_most := v_part;
      v_path := v_price.section || '.' || v_price.key;
    end if;
    if v_price.section = 'cache' then
      v_quote.cache_savings := v_part;
    elsif v_part >= 0 then
      v_quote.search_credits := v_part;
    else
      v_quote := ducto_private.negative_price(v_quote, 'search.costs', p_terms.unpriced = 'warn');
    end if;
  end loop;

  -- What no formula charged
  v_missing := (
    select string_agg(c.name, ', ' order by c.name collate "C")
    from (
      select e.key as name
      from jsonb_each(p_usage - v_covers - 'unread'::text) as e
      where jsonb_typeof(e.value) = 'number' and e.value <> '0'
      union all
      select 'unread.' || u.key
      from jsonb_each(p_usage -> 'unread') as u
      where 'unread' <> all (v_covers) and u.value <> '0'
    ) as c);
  if v_missing is not null then
    if not v_warns then
      raise exception 'no formula of this price names %', v_missing
        using errcode = 'DU008', hint = case
          when v_missing not like 'unread.%' and v_missing not like '%, unread.%' then 'Name it in a formula of the config, or list it under free.'
          else 'No formula can name what is unread: say free: [unread], or read the body by the API that returned it.' end;
    end if;
    v_quote.warnings := v_quote.warnings || '{unpriced_usage}'::text[];
    if p_hold_model is not null then
      v_quote.price_error := format('no formula of this price names %s', v_missing);
    end if;
  end if;
  v_quote.fixed_credits := 0;
  if v_job is not null then
    v_quote.fixed_credits := ducto_private.job_price(p_terms.version, v_job);
    if v_quote.fixed_credits > v_most then
      v_path := 'fixed.' || v_job;
    end if;
  end if;
  v_quote.cost := greatest(0,
    v_quote.model_credits + v_quote.tool_credits + v_quote.search_credits + v_quote.fixed_credits + v_quote.cache_savings);
  if v_quote.cost > 9223372036854775807 then
    raise exception '%: the cost is beyond bigint', v_path
      using errcode = '22003', hint = 'Check the formula and the usage.';
  end if;
  if v_model not in ('', 'none') and 'requests' <> all (v_covers) and (v_quote.cost = 0 or p_usage - 'model' = '{}')
    and not (p_usage - 'model' - 'provider_cost') @? 'strict $.* ? (@ > 0 || @.type() == "string"
      || @.type() == "array" && @.size() > 0 || @.type() == "object" && exists (@.keyvalue() ? (@.value > 0)))'
  then
    v_quote.warnings := v_quote.warnings || '{no_usage}'::text[];
  end if;
  return v_quote;
end
$$;

create or replace function ducto.calculate_cost(
  p_metrics jsonb, p_user_id text default null, p_version integer default null, p_plan_id text default null)
returns ducto.cost_breakdown
language plpgsql stable
as $$
declare
  v_usage constant jsonb := ducto_private.checked_usage(ducto_private.counted_usage(ducto_private.read_given(p_metrics), p_version));
  v_now timestamptz := clock_timestamp();
  v_plan text;
  v_terms ducto_private.terms;
  v_quote ducto_private.quote;
begin
  if p_user_id is not null then
    perform ducto_private.check_text(p_user_id, 'p_user_id');
    select a.plan_id, greatest(v_now, a.changed_at)
    into v_plan, v_now
    from ducto_private.accounts as a
    where a.account_id = p_user_id;
    if not found then
      v_now := clock_timestamp();
      v_terms := ducto_private.find_terms(p_version, null, v_now);
      v_plan := v_terms.default_plan;
    end if;
  end if;
  if p_plan_id is not null then
    v_terms := ducto_private.find_terms(p_version, null, v_now);
    if not exists (
      select from ducto_private.terms as t
      where t.version = v_terms.version and t.own_version = t.version and t.plan_id = p_plan_id and p_plan_id <> '')
    then
      perform ducto_private.invalid(format('version %s has no plan %s', v_terms.version, left(p_plan_id, 100)),
        'p_plan_id is a key of the config''s plans; leave it out for the account''s own, or none.');
    end if;
    v_plan := p_plan_id;
  end if;
  if v_terms.version is null or v_plan is not null then
    v_terms := ducto_private.find_terms(coalesce(p_version, v_terms.version), v_plan, v_now);
  end if;
  v_quote := ducto_private.price(v_terms, v_usage);
  return row(v_quote.model_credits, v_quote.tool_credits, v_quote.search_credits, v_quote.cache_savings, v_quote.fixed_credits,
    v_quote.cost,
    jsonb_build_object(
      'model', coalesce(v_usage ->> 'model', ''),
      'input_tokens', coalesce(v_usage -> 'input_tokens', '0'),
      'output_tokens', coalesce(v_usage -> 'output_tokens', '0'),
      'tool_count', case jsonb_typeof(v_usage -> 'tool_calls')
        when 'array' then jsonb_array_length(v_usage -> 'tool_calls')
        else coalesce((v_usage ->> 'tool_calls')::numeric::bigint, 0) end),
    v_quote.resolved_model, v_quote.version, v_quote.plan_id, null,
    v_quote.warnings)::ducto.cost_breakdown;
end
$$;
comment on function ducto.calculate_cost is
  'The exact price of a usage in credits, for nobody in particular or on the plan of an account, at the active or a given version. Writes nothing.';

-- ---------------------------------------------------------------------------------------------------------------------
-- Publishing and activating

-- Sets when each activation ends, after one was added or taken back.
create or replace function ducto_private.end_activations() returns void
language plpgsql volatile
as $$
begin
  update ducto_private.activations as a
  set ends_at = d.ends_at
  from (
    select e.activation_id, case when e.withdrawn_at is null
      then coalesce(min(e.starts_at) filter (where e.withdrawn_at is null) over (
        order by e.activation_id desc rows between unbounded preceding and 1 preceding), 'infinity')
      else '-infinity' end as ends_at
    from ducto_private.activations as e
  ) as d
  where a.activation_id = d.activation_id and a.ends_at <> d.ends_at;
end
$$;

create or replace function ducto_private.activate(p_version integer, p_at timestamptz) returns void
language plpgsql volatile
as $$
declare
  v_from integer;
  v_first_zone text;
  v_zone text;
  v_now timestamptz;
  v_plan text;
begin
  perform ducto_private.lock_setup();
  v_now := clock_timestamp();
  v_first_zone := ducto_private.ledger_zone();
  v_zone := coalesce((ducto_private.find_version(p_version)).config ->> 'timezone', 'UTC');
  if v_zone <> v_first_zone then
    perform ducto_private.invalid(
      format('timezone: this config has %s, but the first activated version fixed %s', v_zone, v_first_zone),
      'Days and months already counted cannot be cut anew: keep the time zone.');
  elsif v_zone <> 'UTC' and (v_zone not like '%/%' or not exists (select from pg_timezone_names as n where n.name = v_zone)) then
    perform ducto_private.invalid(format('timezone: this server knows no place %s', v_zone),
      'Use UTC or a name with a place, like Europe/Berlin, of pg_timezone_names.');
  elsif p_at <= v_now or p_at = 'infinity' then
    perform ducto_private.invalid(format('p_at must be a time to come, not %s', p_at),
      'Leave it out to activate at once.');
  end if;
  v_from := ducto_private.active_version(v_now);
  if p_at is null and v_from = p_version or (
    select (a.version, a.starts_at) = (p_version, p_at)
    from ducto_private.activations as a
    where a.withdrawn_at is null
    order by a.activation_id desc
    limit 1)
  then
    return;
  end if;
  insert into ducto_private.activations (activation_id, version, from_version, starts_at, recorded_at, recorded_by, role_set)
  select coalesce(max(a.activation_id), 0) + 1, p_version, v_from, coalesce(p_at, '-infinity'), v_now, session_user,
    current_setting('role')
  from ducto_private.activations as a
  on conflict do nothing;
  perform ducto_private.end_activations();
  for v_plan in
    select t.plan_id from ducto_private.terms as t where t.version = v_from and t.own_version = v_from and t.plan_id <> ''
    except
    select t.plan_id from ducto_private.terms as t where t.version = p_version and t.own_version = p_version
    order by 1
  loop
    raise notice 'plan % is not in version %: nobody can be put on it any more, and accounts on it keep its terms of '
      'version % until set_user_plan moves them', v_plan, p_version, v_from;
  end loop;
  if v_first_zone is null then
    raise notice 'days and months are those of % for ever: the first activation fixes the time zone', v_zone
      using hint = case when p_at is null
        then 'To have another, install ducto_pg anew in an empty database: no later version can change it.'
        else 'unschedule_pricing takes it back before its time.' end;
  end if;
  select t.default_plan
  into v_plan
  from ducto_private.terms as t
  where t.version = p_version and t.plan_id = '';
  if v_plan is distinct from (select t.default_plan from ducto_private.terms as t where t.version = v_from and t.plan_id = '')
    and v_plan is not null
    and exists (select from ducto_private.accounts as a where a.kind = 'user' and a.plan_id is null)
  then
    raise notice 'default_plan % is for accounts that open from now on: open accounts without a plan stay without one', v_plan
      using hint = 'Put them on a plan with set_user_plan.';
  end if;
end
$$;

-- The terms of version p_version: its own plans', and those of plans that it lacks, from the version before. A plan that is
-- new has terms in the earlier versions too, for accounts on it once one of those is activated again. What all plans of a
-- version share stands in its row without a plan.
create or replace function ducto_private.write_terms(p_version integer, p_terms jsonb) returns void
language plpgsql volatile
as $$
begin
  with given as (
    select g.*
    from jsonb_populate_recordset(null::ducto_private.terms, p_terms) as g
  ), shared as (
    select t.version, t.min_balance, t.low_balance, t.signup_bonus, t.rounding, t.overrun, t.timezone, t.factor, t.metrics,
      t.covers, t.match, t.aliases, t.unpriced, t.cached,
      t.default_plan, t.signup_bonus_days
    from ducto_private.terms as t
    where t.plan_id = '' and t.version < p_version
    union all
    select p_version, g.min_balance, g.low_balance, g.signup_bonus, g.rounding, g.overrun, g.timezone, g.factor, g.metrics,
      g.covers, g.match, g.aliases, g.unpriced, g.cached,
      g.default_plan, g.signup_bonus_days
    from given as g
    where g.plan_id = ''
  ), plans as (
    select p_version as version, p_version as own_version, g.plan_id, g.plan_name, g.free_allowance, g.period, g.anchored,
      g.rollover, g.features, g.plan_factor, g.overrides, g.plan_low_balance
    from given as g
    union all
    select p_version, t.own_version, t.plan_id, t.plan_name, t.free_allowance, t.period, t.anchored, t.rollover, t.features,
      t.plan_factor, t.overrides, t.plan_low_balance
    from ducto_private.terms as t
    where t.version = p_version - 1 and not exists (select from given as g where g.plan_id = t.plan_id)
    union all
    select l.version, p_version, g.plan_id, g.plan_name, g.free_allowance, g.period, g.anchored, g.rollover, g.features,
      g.plan_factor, g.overrides, g.plan_low_balance
    from given as g
    join shared as l on l.version < p_version
    where not exists (select from ducto_private.terms as t where t.version = l.version and t.plan_id = g.plan_id)
  )
  insert into ducto_private.terms (version, own_version, plan_id, plan_name, free_allowance, period, anchored, rollover,
    features, plan_factor, overrides,
    min_balance, low_balance, signup_bonus, rounding, overrun, timezone, factor, metrics, covers, match, aliases,
    unpriced, cached, misfits, default_plan, signup_bonus_days, plan_low_balance)
  select p.version, p.own_version, p.plan_id, p.plan_name, p.free_allowance, p.period, p.anchored, p.rollover, p.features,
    p.plan_factor, p.overrides,
    l.min_balance, coalesce(p.plan_low_balance, l.low_balance), l.signup_bonus, l.rounding, l.overrun, l.timezone,
    trim_scale(l.factor * p.plan_factor), l.metrics, l.covers, l.match, l.aliases, l.unpriced, l.cached,
    ducto_private.misfits(l.cached), l.default_plan, l.signup_bonus_days, p.plan_low_balance
  from plans as p
  join shared as l on l.version = p.version;
end
$$;

-- Publishing what a version already is, label included, is that version: an application may publish at each start.
create or replace function ducto_private.publish(
  p_config jsonb, p_label text, p_formulas jsonb, p_prices jsonb, p_terms jsonb, p_activate boolean,
  p_at timestamptz default null) returns integer
language plpgsql volatile
as $$
declare
  v_hash constant bigint := jsonb_hash_extended(p_config, 0);
  v_version integer;
begin
  perform ducto_private.lock_setup();
  perform ducto_private.check_short(p_label, 'p_label');
  select v.version
  into v_version
  from ducto_private.pricing_versions as v
  where v.config_hash = v_hash and v.config = p_config and v.label is not distinct from p_label
  order by v.version desc
  limit 1;
  if not found then
    insert into ducto_private.pricing_versions (version, label, config, config_hash, created_at, created_by)
    select coalesce(max(v.version), 0) + 1, p_label, p_config, v_hash, clock_timestamp(), session_user
    from ducto_private.pricing_versions as v
    on conflict do nothing
    returning version into v_version;
    insert into ducto_private.formulas (formula_id, body)
    select ('x' || left(encode(sha256(convert_to(f.body, 'UTF8')), 'hex'), 16))::bit(64)::bigint, f.body
    from jsonb_array_elements_text(p_formulas) as f (body)
    on conflict do nothing;
    insert into ducto_private.prices (version, section, key, formula_id, composed_id, rates, composed_rates, prefixes, covers)
    select v_version, p.section, p.key, p.formula_id, p.composed_id, p.rates, p.composed_rates, p.prefixes, p.covers
    from jsonb_populate_recordset(null::ducto_private.prices, p_prices) as p;
    perform ducto_private.write_terms(v_version, p_terms);
    -- Plans that a session made when these tables were nearly empty would read them from end to end.
    analyze ducto_private.prices, ducto_private.terms, ducto_private.activations;
  end if;
  perform ducto_private.make_formulas();
  if p_activate then
    perform ducto_private.activate(v_version, p_at);
  end if;
  return v_version;
end
$$;

create or replace function ducto.get_pricing_config(p_version integer) returns ducto.pricing_config_result
language plpgsql stable
as $$
declare
  v_row ducto_private.pricing_versions := ducto_private.find_version(p_version);
begin
  return row(v_row.id, v_row.config, v_row.version, v_row.label, null)::ducto.pricing_config_result;
end
$$;
comment on function ducto.get_pricing_config is 'The config of a published pricing version.';

create or replace function ducto.get_active_pricing() returns ducto.pricing_config_result
language sql stable
as $$
  select v.id::text, v.config, v.version, v.label, null::text
  from (values (ducto_private.active_version(clock_timestamp()))) as a (version)
  left join ducto_private.pricing_versions as v on v.version = a.version
$$;
comment on function ducto.get_active_pricing is 'The active pricing version; nulls where none is.';

create or replace function ducto.get_pricing_history() returns setof ducto.pricing_config_history_item
language sql stable
as $$
  select v.id::text, v.version, v.label, v.version is not distinct from a.version, v.created_at, null::text
  from ducto_private.pricing_versions as v
  cross join (values (ducto_private.active_version(clock_timestamp()))) as a (version)
  order by v.version desc
$$;
comment on function ducto.get_pricing_history is 'All published pricing versions, newest first.';

create or replace function ducto.activate_pricing(p_version integer, p_at timestamptz default null)
returns ducto.pricing_config_result
language plpgsql volatile
as $$
begin
  perform ducto_private.activate(p_version, p_at);
  return ducto.get_pricing_config(p_version);
end
$$;
comment on function ducto.activate_pricing is
  'Makes a published version the one that prices: from the commit on, or with p_at, a time to come, from then on '
  'without any job. Charges keep their version, and holds settle at theirs. Without p_at it also ends every schedule '
  'that was recorded before. Activating what is active already records nothing. It waits for a setup or publish that '
  'runs.';

create or replace function ducto.unschedule_pricing(p_version integer) returns ducto.pricing_config_result
language plpgsql volatile
as $$
declare
  v_now timestamptz;
begin
  perform ducto_private.lock_setup();
  perform ducto_private.find_version(p_version);
  v_now := clock_timestamp();
  update ducto_private.activations as a
  set withdrawn_at = v_now
  where a.version = p_version and a.starts_at > v_now and a.withdrawn_at is null and not exists (
    select
    from ducto_private.activations as l
    where l.activation_id > a.activation_id and l.withdrawn_at is null and l.starts_at <= v_now);
  if not found then
    perform ducto_private.invalid(format('version %s is not scheduled', p_version),
      'Only an activation with a time to come can be taken back; activate another version to end the present one.');
  end if;
  perform ducto_private.end_activations();
  return ducto.get_pricing_config(p_version);
end
$$;
comment on function ducto.unschedule_pricing is
  'Takes back the activations of a version whose time has not come; what they would have ended goes on.';

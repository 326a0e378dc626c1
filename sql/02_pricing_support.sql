-- What compiled formulas call. Those that divide are stable, not immutable: the planner folds immutable calls over
-- constants, and would meet a division by zero in a branch that is never taken.

create or replace function ducto_private.divisor(p_value numeric, p_where text) returns numeric
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_value = 0 then
    raise exception 'division by zero in %', p_where
      using errcode = 'DU006', hint = 'Guard the divisor, as in: x / y if y else 0';
  end if;
  return p_value;
end
$$;

-- The whole number at or below the exact quotient; floor(a / b) would round the quotient first.
create or replace function ducto_private.floor_divide(p_left numeric, p_right numeric, p_where text) returns numeric
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_right constant numeric := ducto_private.divisor(p_right, p_where);
  v_quotient constant numeric := pg_catalog.div(p_left, v_right);
begin
  if (p_left < 0) <> (v_right < 0) and pg_catalog.mod(p_left, v_right) <> 0 then
    return v_quotient - 1;
  end if;
  return v_quotient;
end
$$;

-- What floor_divide leaves, with the sign of the divisor.
create or replace function ducto_private.modulo(p_left numeric, p_right numeric, p_where text) returns numeric
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rest constant numeric := pg_catalog.mod(p_left, ducto_private.divisor(p_right, p_where));
begin
  if v_rest <> 0 and (v_rest < 0) <> (p_right < 0) then
    return v_rest + p_right;
  end if;
  return v_rest;
end
$$;

-- The value at p_position (0 = the smallest) of the sorted values, the first of equal ones; between two, interpolated.
create or replace function ducto_private.percentile(p_position numeric, p_values numeric[]) returns numeric
language plpgsql immutable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_index constant integer := pg_catalog.trunc(p_position);
  v_fraction constant numeric := pg_catalog.trim_scale(p_position - v_index);
  v_sorted constant numeric[] := array(
    select u.value
    from pg_catalog.unnest(p_values) with ordinality as u (value, place)
    order by u.value, u.place);
begin
  if v_fraction = 0 then
    return v_sorted[v_index + 1];
  end if;
  return v_sorted[v_index + 1] + (v_sorted[v_index + 2] - v_sorted[v_index + 1]) * v_fraction;
end
$$;

-- The price of a model by a plan's own rates that another version has compiled: the rare road of plans that a version
-- has dropped or does not know yet.
create or replace function ducto_private.foreign_rates(
  p_function text, p_name text, p_model text, p_usage jsonb, p_longer_than integer) returns ducto_private.model_price
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_prices ducto_private.model_price[];
begin
  execute pg_catalog.format('select array[ducto_private.%I($1, $2, $3, $4)]', p_function)
  into v_prices
  using p_name, p_model, p_usage, p_longer_than;
  return v_prices[1];
end
$$;

-- The known name most like a misspelt one: at least half of their letters and pairs of letters are the same, once what
-- providers call a kind of token has our word for it. Or null.
create or replace function ducto_private.nearest(p_name text, p_known text[]) returns text
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
  with plain as (
    select k.name, r.letters
    from pg_catalog.unnest(p_name || p_known) as k (name)
    cross join lateral (
      select pg_catalog.regexp_replace(pg_catalog.regexp_replace(pg_catalog.regexp_replace(pg_catalog.regexp_replace(
        pg_catalog.translate(pg_catalog.lower(k.name), '_-', ''), 'prompt', 'input', 'g'),
        'completion|candidates|reasoning|thoughts', 'output', 'g'), 'cached', 'cacheread', 'g'), 'creation', 'write', 'g')
    ) as r (letters)
  ), parts as (
    select distinct p.name, pg_catalog.substr(p.letters, s.start, z.size) as part
    from plain as p
    cross join pg_catalog.generate_series(1, pg_catalog.length(p.letters)) as s (start)
    cross join (values (1), (2)) as z (size)
  ), counted as (
    select k.name, pg_catalog.count(*) as total, pg_catalog.count(m.part) as shared,
      (select pg_catalog.count(*) from parts as o where o.name = p_name) as wanted
    from parts as k
    left join parts as m on m.name = p_name and m.part = k.part
    where k.name = any (p_known)
    group by k.name
  )
  select c.name
  from counted as c
  where 4 * c.shared >= c.total + c.wanted
  order by 1000000 * c.shared / (c.total + c.wanted) desc, c.name collate "C"
  limit 1
$$;

create or replace function ducto_private.did_you_mean(p_name text, p_known text[], p_else text) returns text
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce('did you mean ' || ducto_private.nearest(p_name, p_known) || '?', p_else);
end
$$;

create or replace function ducto_private.unknown_metric(p_usage jsonb, p_known text[]) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name constant text := (
    select k.name from pg_catalog.jsonb_object_keys(p_usage - p_known) as k (name) order by k.name collate "C" limit 1);
begin
  raise exception 'unknown metric ''%''', pg_catalog.left(v_name, 100)
    using errcode = 'DU005',
      hint = ducto_private.did_you_mean(v_name, p_known, 'The config''s metrics name what formulas may use besides the usual.');
end
$$;

create or replace function ducto_private.unknown_model(p_version integer, p_plan text, p_model text) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  if p_model in ('', 'none') then
    raise exception 'tokens were used, but no model is named'
      using errcode = 'DU003', hint = 'name the model or price _default';
  end if;
  raise exception 'unknown model ''%''', p_model
    using errcode = 'DU003',
      hint = ducto_private.did_you_mean(
        p_model,
        array(
          select pg_catalog.jsonb_object_keys(v.config -> 'models')
          from ducto_private.pricing_versions as v
          where v.version = p_version
          union
          select pg_catalog.jsonb_object_keys(v.config #> array['plans', p_plan, 'rate_overrides'])
          from ducto_private.pricing_versions as v
          where v.version = p_version),
        'Add it to the config''s models, or price _default.');
end
$$;

create or replace function ducto_private.unknown_job(p_job text, p_fixed jsonb) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'unknown job ''%''', pg_catalog.left(p_job, 255)
    using errcode = 'DU004',
      hint = ducto_private.did_you_mean(
        p_job, array(select pg_catalog.jsonb_object_keys(p_fixed)), 'Add it to the config''s fixed.');
end
$$;

create or replace function ducto_private.cost_beyond_bigint(p_where text) returns void
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception '%: the cost is beyond bigint', p_where
    using errcode = '22003', hint = 'Check the formula and the usage.';
end
$$;

-- Compiled functions are named by a hash of their text: an existing one is the same one, and is left alone.
create or replace function ducto_private.add_price_function(p_name text, p_arguments text, p_returns text, p_body text)
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform ducto_private.lock_setup();
  if not exists (
    select from pg_proc as p
    where p.proname = p_name and p.pronamespace = 'ducto_private'::regnamespace)
  then
    begin
      execute format(
        'create function ducto_private.%I(%s) returns ducto_private.%I language plpgsql stable parallel safe '
        'set search_path = pg_catalog, pg_temp as %L', p_name, p_arguments, p_returns, p_body);
    exception when duplicate_function then
      raise exception 'prices were published after this transaction took its snapshot'
        using errcode = '40001', hint = 'Retry the transaction.';
    end;
    execute format('revoke all on function ducto_private.%I(%s) from public', p_name, p_arguments);
  end if;
end
$$;

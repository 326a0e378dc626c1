-- What formulas call, and the errors of a usage that has no price.

-- The whole number at or below the exact quotient; floor(a / b) would round the quotient first.
create or replace function ducto_private.floor_divide(p_left numeric, p_right numeric) returns numeric
language plpgsql immutable parallel safe
as $$
begin
  return div(p_left, p_right)
    - case when (p_left < 0) <> (p_right < 0) and mod(p_left, p_right) <> 0 then 1 else 0 end;
end
$$;

-- What floor_divide leaves, with the sign of the divisor.
create or replace function ducto_private.modulo(p_left numeric, p_right numeric) returns numeric
language plpgsql immutable parallel safe
as $$
declare
  v_rest constant numeric := mod(p_left, p_right);
begin
  return case when v_rest <> 0 and (v_rest < 0) <> (p_right < 0) then v_rest + p_right else v_rest end;
end
$$;

-- The value at p_position (0 = the smallest) of the sorted values, the first of equal ones; between two, interpolated.
create or replace function ducto_private.percentile(p_position numeric, p_values numeric[]) returns numeric
language plpgsql immutable parallel safe
as $$
declare
  v_index constant integer := trunc(p_position);
  v_fraction constant numeric := trim_scale(p_position - v_index);
  v_sorted constant numeric[] := array(
    select u.value
    from unnest(p_values) with ordinality as u (value, place)
    order by u.value, u.place);
begin
  if v_fraction = 0 then
    return v_sorted[v_index + 1];
  end if;
  return v_sorted[v_index + 1] + (v_sorted[v_index + 2] - v_sorted[v_index + 1]) * v_fraction;
end
$$;

-- The known name most like a misspelt one, or null: at least half of the letters and pairs of letters of both are the same,
-- after the providers' words for kinds of tokens are replaced by ours.
create or replace function ducto_private.nearest(p_name text, p_known text[]) returns text
language sql stable parallel safe
as $$
  with plain as (
    select k.name, r.letters
    from unnest(p_name || p_known) as k (name)
    cross join lateral (
      select regexp_replace(regexp_replace(regexp_replace(regexp_replace(
        translate(lower(k.name), '_-', ''), 'prompt', 'input', 'g'),
        'completion|candidates|reasoning|thoughts', 'output', 'g'), 'cached', 'cacheread', 'g'), 'creation', 'write', 'g')
    ) as r (letters)
  ), parts as (
    select distinct p.name, substr(p.letters, s.start, z.size) as part
    from plain as p
    cross join generate_series(1, length(p.letters)) as s (start)
    cross join (values (1), (2)) as z (size)
  ), counted as (
    select k.name, count(*) as total, count(m.part) as shared,
      (select count(*) from parts as o where o.name = p_name) as wanted
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
as $$
begin
  return coalesce('did you mean ' || ducto_private.nearest(p_name, p_known) || '?', p_else);
end
$$;

create or replace function ducto_private.unknown_metric(p_usage jsonb, p_known text[]) returns void
language plpgsql stable parallel safe
as $$
declare
  v_name constant text := (
    select k.name from jsonb_object_keys(p_usage - p_known) as k (name) order by k.name collate "C" limit 1);
begin
  raise exception 'unknown metric ''%''', left(v_name, 100)
    using errcode = 'DU005',
      hint = ducto_private.did_you_mean(v_name, p_known, 'The config''s metrics name what formulas may use besides the usual.');
end
$$;

create or replace function ducto_private.unknown_model(p_terms ducto_private.terms, p_model text) returns void
language plpgsql stable parallel safe
as $$
declare
  v_prefix constant text := substring(p_model from '^.*/');
  v_key constant text := (ducto_private.find_model(p_terms, substr(p_model, length(v_prefix) + 1))).key;
begin
  if p_model in ('', 'none') then
    raise exception 'tokens were used, but no model is named'
      using errcode = 'DU003', hint = 'name the model or price _default';
  end if;
  raise exception 'unknown model ''%''', p_model
    using errcode = 'DU003',
      hint = case when v_key is not null
        then format('did you mean %s? aliases: {"%s": "*"} serves all such names.', v_key, v_prefix)
        else ducto_private.did_you_mean(
          p_model,
          array(
            select p.key
            from ducto_private.prices as p
            where p.version = p_terms.version and p.section = 'models'
              or p.version = p_terms.own_version and p.section = p_terms.overrides),
          'Add it to the config''s models, or price _default.') end;
end
$$;

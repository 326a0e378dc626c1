-- From what a provider returned to the counts that are charged, by the table of fields that Python reads too
-- (ducto_pg/usage: table.py says what its entries mean). The functions do what those of reading.py do, step for step,
-- and refuse in the same words.

create or replace function ducto_private.usage_fields() returns jsonb
language plpgsql immutable parallel safe
as $$
begin
  return '{{usage_fields}}'::jsonb;
end
$$;

-- Whether a usage has all fields of a line by which the API is known.
create or replace function ducto_private.usage_is_known(p_usage jsonb, p_fields jsonb) returns boolean
language plpgsql immutable parallel safe
as $$
begin
  return exists (
    select from jsonb_array_elements(p_fields -> 'needs') as n (paths)
    where not exists (
      select from jsonb_array_elements_text(n.paths) as p (path)
      where coalesce(p_usage #> string_to_array(p.path, '.'), 'null') = 'null'));
end
$$;

-- Every field below some objects, and each list and object too: path -> its values. An element of a list stands in
-- brackets by its modality, ttl or type. Level by level: a recursive query would be compiled (jit) at each call.
create or replace function ducto_private.usage_nodes(p_usages jsonb) returns jsonb
language plpgsql immutable parallel safe
as $$
declare
  v_paths text[];
  v_values jsonb[];
  v_all_paths text[] := '{}';
  v_all_values jsonb[] := '{}';
begin
  select array_agg(e.key), array_agg(e.value)
  into v_paths, v_values
  from jsonb_array_elements(p_usages) as u (usage)
  cross join jsonb_each(u.usage) as e
  where e.value <> 'null';
  while v_paths is not null loop
    v_all_paths := v_all_paths || v_paths;
    v_all_values := v_all_values || v_values;
    select array_agg(w.path || c.step), array_agg(c.value)
    into v_paths, v_values
    from unnest(v_paths, v_values) as w (path, value)
    cross join lateral (
      select '.' || e.key as step, e.value
      from jsonb_each(case jsonb_typeof(w.value) when 'object' then w.value else '{}' end) as e
      union all
      select '[' || coalesce(
        case when jsonb_typeof(a.value -> 'modality') = 'string' then a.value ->> 'modality' end,
        case when jsonb_typeof(a.value -> 'ttl') = 'string' then a.value ->> 'ttl' end,
        case when jsonb_typeof(a.value -> 'type') = 'string' then a.value ->> 'type' end, '') || ']', a.value
      from jsonb_array_elements(case jsonb_typeof(w.value) when 'array' then w.value else '[]' end) as a (value)
    ) as c
    where c.value <> 'null' and jsonb_typeof(w.value) in ('object', 'array');
  end loop;
  return (
    select coalesce(jsonb_object_agg(n.path, n.found), '{}')
    from (
      select w.path, jsonb_agg(w.value) as found
      from unnest(v_all_paths, v_all_values) as w (path, value)
      group by w.path) as n);
end
$$;

-- Whether an event is a whole answer, and no part of a stream.
create or replace function ducto_private.is_whole_answer(p_event jsonb) returns boolean
language plpgsql immutable parallel safe
as $$
begin
  return not p_event ?| '{type,event,delta,candidates}' and (not p_event ? 'choices' or p_event @? '$.choices[*].message');
end
$$;

-- What the events say of the usage, in the words of one API; null where that does not know it.
create or replace function ducto_private.find_usage(p_events jsonb, p_fields jsonb) returns jsonb
language plpgsql immutable parallel safe
as $$
declare
  v_event jsonb;
  v_place text[];
  v_holder jsonb;
  v_told jsonb;
  v_usage jsonb := '{}';
  v_model jsonb;
  v_models jsonb := '[]';
  v_answer text;
  v_answers text[] := '{}';
  v_nameless integer := 0;
  v_whole integer := 0;
  v_parts jsonb := '[]';
  v_parts_at constant text[] := string_to_array(p_fields #>> '{parts,at}', '.');
  v_nodes jsonb;
  v_keys constant text[] := array(select k.key from jsonb_array_elements_text(p_fields -> 'keys') as k (key));
begin
  for v_event in
    select e.value
    from jsonb_array_elements(p_events) with ordinality as e (value, place)
    where jsonb_typeof(e.value) = 'object' and jsonb_strip_nulls(e.value) ?| v_keys
    order by e.place
  loop
    v_place := (
      select string_to_array(p.path, '.')
      from jsonb_array_elements_text(p_fields -> 'usage') with ordinality as p (path, place)
      where jsonb_typeof(v_event #> string_to_array(p.path, '.')) = 'object'
      order by p.place
      limit 1);
    if v_place is not null then
      v_holder := v_event #> v_place[:cardinality(v_place) - 1];
      v_told := v_event #> v_place;
    elsif ducto_private.usage_is_known(v_event, p_fields) then
      v_holder := v_event;
      v_told := v_event;
    else
      continue;
    end if;
    v_usage := v_usage || coalesce((
      select jsonb_object_agg(t.key, t.value)
      from jsonb_each(v_told || coalesce((
        select jsonb_object_agg(b.key, v_holder -> b.key)
        from jsonb_array_elements_text(p_fields -> 'beside') as b (key)
        where v_holder -> b.key <> 'null'), '{}')) as t
      where t.value <> 'null'), '{}');
    v_model := (
      select w.holder #> string_to_array(m.path, '.')
      from (values (1, v_holder), (2, v_event)) as w (place, holder)
      cross join jsonb_array_elements_text(p_fields -> 'model') with ordinality as m (path, place)
      where w.holder #> string_to_array(m.path, '.') not in ('null', '""')
      order by w.place, m.place
      limit 1);
    if v_model is not null and not v_models @> jsonb_build_array(v_model) then
      v_models := v_models || jsonb_build_array(v_model);
    end if;
    v_answer := (
      select w.holder ->> i.key
      from (values (1, v_holder), (2, v_event)) as w (place, holder)
      cross join (values (1, 'id'), (2, 'responseId'), (3, 'response_id'), (4, 'item_id')) as i (place, key)
      where jsonb_typeof(w.holder -> i.key) = 'string' and w.holder ->> i.key <> ''
      order by w.place, i.place
      limit 1);
    if v_answer is not null and v_answer <> all (v_answers) then
      v_answers := v_answers || v_answer;
    end if;
    if jsonb_array_length(p_events) > 1 and v_place is not null and ducto_private.is_whole_answer(v_event) then
      v_whole := v_whole + 1;
      v_nameless := v_nameless + (v_answer is null)::integer;
    end if;
  end loop;

  if not ducto_private.usage_is_known(v_usage, p_fields) then
    return null;
  end if;
  if cardinality(v_parts_at) > 0 and jsonb_typeof(v_usage #> v_parts_at) = 'array' then
    v_parts := (
      select coalesce(jsonb_agg(p.value), '[]')
      from jsonb_array_elements(v_usage #> v_parts_at) as p (value)
      where jsonb_typeof(p.value) = 'object');
    v_usage := v_usage #- v_parts_at;
  end if;
  v_nodes := ducto_private.usage_nodes(jsonb_build_array(v_usage) || (
    select coalesce(jsonb_agg(p.value), '[]')
    from jsonb_array_elements(v_parts) as p (value)
    where p_fields #> '{parts,added}' @> (p.value -> 'type')));
  return jsonb_build_object(
    'models', v_models,
    'answers', cardinality(v_answers) + case when v_whole = jsonb_array_length(p_events) then v_nameless else 0 end,
    'cut', coalesce(
      p_events @> jsonb_build_array(jsonb_build_object('type', p_fields #> '{stream,begins}'))
      and not p_events @> jsonb_build_array(jsonb_build_object('type', p_fields #> '{stream,ends}')), false),
    'parts', v_parts,
    'nodes', v_nodes,
    'unknown', (
      select count(*)
      from jsonb_each(v_nodes) as n
      cross join jsonb_array_elements(n.value) as a (value)
      where jsonb_typeof(a.value) = 'number'
        and not (p_fields -> 'counted' ? n.key or p_fields -> 'no_count' ? n.key or p_fields -> 'unread' ? n.key)));
end
$$;

create or replace function ducto_private.check_model(p_model jsonb) returns void
language plpgsql stable parallel safe
as $$
begin
  if jsonb_typeof(p_model) not in ('string', 'null') then
    perform ducto_private.invalid(format('model must be a text, not %s', jsonb_typeof(p_model)),
      'Name the model that the price list knows.');
  elsif char_length(p_model #>> '{}') > 255 then
    perform ducto_private.invalid('model has more than 255 characters', 'Name the model that the price list knows.');
  end if;
end
$$;

-- A number rounded up to so many decimals.
create or replace function ducto_private.rounded_up(p_number numeric, p_decimals integer) returns numeric
language plpgsql immutable parallel safe
as $$
declare
  v_rounded constant numeric := trunc(p_number, p_decimals);
begin
  return trim_scale(case when v_rounded < p_number then v_rounded + ('1e-' || p_decimals)::numeric else v_rounded end);
end
$$;

-- The usage that find_usage found: the model, the counts above 0 and what is unread.
create or replace function ducto_private.add_usage(p_found jsonb, p_fields jsonb, p_model text) returns jsonb
language plpgsql stable parallel safe
as $$
declare
  v_models text[] := array(select m.name from jsonb_array_elements_text(p_found -> 'models') as m (name));
  v_own text[];
  v_path text;
  v_value jsonb;
  v_digits text;
  v_numbers jsonb;
  v_name text;
  v_number numeric;
  v_usage jsonb := '{}';
  v_as_it_is constant text := 'Pass what the provider returned as it is';
begin
  if (p_found ->> 'cut')::boolean then
    perform ducto_private.invalid(
      format('the stream was cut: it has %s, but no %s', p_fields #>> '{stream,begins}', p_fields #>> '{stream,ends}'),
      'The first event tells the input only. Pass all events; where there are no more, charge what you know yourself.');
  elsif (p_found ->> 'answers')::integer > 1 then
    perform ducto_private.invalid(format('%s answers in one body', p_found ->> 'answers'),
      'Charge each answer as a body of its own.');
  end if;
  perform ducto_private.check_model(m.model)
  from (
    select m.model from jsonb_array_elements(p_found -> 'models') as m (model)
    union all
    select p.part -> 'model' from jsonb_array_elements(p_found -> 'parts') as p (part)) as m;
  v_own := array(
    select distinct coalesce(nullif(p.part ->> 'model', ''), v_models[1])
    from jsonb_array_elements(p_found -> 'parts') as p (part));
  if cardinality(v_models) > 1 or cardinality(v_own) > 1 then
    if cardinality(v_models) > 1 then
      v_own := v_models;
      v_name := 'answer';
    else
      v_name := format('entry of %s', p_fields #>> '{parts,at}');
    end if;
    perform ducto_private.invalid(
      format('%s models in one body: %s', cardinality(v_own), (
        select string_agg(m.name, ', ' order by m.name collate "C")
        from (select coalesce(o.name, '(not named)') as name from unnest(v_own) as o (name)) as m)),
      format('Charge each %s as a body of its own, with its model, and the calls of the provider''s tools once.', v_name));
  end if;
  p_model := coalesce(nullif(p_model, ''), v_models[1]);
  if p_model is not null then
    perform ducto_private.check_model(to_jsonb(p_model));
    v_usage := jsonb_build_object('model', p_model);
  end if;

  for v_path, v_value in
    select n.key, a.value
    from jsonb_each(p_found -> 'nodes') as n
    cross join jsonb_array_elements(n.value) as a (value)
    where p_fields -> 'counted' ? n.key
    order by n.key collate "C", jsonb_typeof(a.value) collate "C",
      case jsonb_typeof(a.value) when 'number' then left(a.value #>> '{}', 100) end collate "C"
  loop
    if jsonb_typeof(v_value) <> 'number' then
      perform ducto_private.invalid(format('%s must be a number, not %s', v_path, jsonb_typeof(v_value)), v_as_it_is || '; quote no numbers.');
    end if;
    v_number := v_value::numeric;
    v_digits := left(v_number::text, 100);
    if v_number < 0 then
      perform ducto_private.invalid(format('%s must not be negative: %s', v_path, v_digits), v_as_it_is || '.');
    elsif v_number >= 1000000000000000 and not p_fields -> 'times' ? v_path then
      perform ducto_private.invalid(format('%s must be below 10^15: %s', v_path, v_digits), v_as_it_is || '.');
    elsif v_number <> trunc(v_number) and not p_fields -> 'fractions' ? v_path then
      perform ducto_private.invalid(format('%s must be whole, not %s', v_path, v_digits), v_as_it_is || '.');
    end if;
  end loop;

  v_numbers := (
    select coalesce(jsonb_object_agg(n.key, coalesce((p_fields -> 'times' ->> n.key)::numeric, 1)
      * (select sum(a.value::numeric) from jsonb_array_elements(n.value) as a (value))), '{}')
    from jsonb_each(p_found -> 'nodes') as n
    where p_fields -> 'counted' ? n.key);
  for v_name, v_number in
    select t.name, sum(s.total)
    from jsonb_array_elements(p_fields -> 'counts') as c (count)
    cross join lateral (
      select max(a.total) as total
      from jsonb_array_elements(c.count -> 'of') as o (alternative)
      cross join lateral (
        select coalesce(sum((v_numbers ->> p.path)::numeric), 0) as total
        from jsonb_array_elements_text(o.alternative) as p (path)) as a) as s
    cross join jsonb_array_elements_text(c.count -> 'to') as t (name)
    group by t.name
    order by t.name collate "C"
  loop
    if v_number >= 1000000000000000 then
      perform ducto_private.invalid(format('%s must be below 10^15: %s', v_name, left(v_number::text, 100)), v_as_it_is || '.');
    elsif v_number > 0 then
      v_usage := v_usage || jsonb_build_object(v_name, ducto_private.rounded_up(
        v_number, coalesce((p_fields #>> array['decimals', v_name])::integer, 0)));
    end if;
  end loop;

  v_value := (
    select jsonb_object_agg(u.path, ducto_private.rounded_up(least(u.number, 999999999999999), 12))
    from (
      select n.key as path, sum(a.value::numeric) as number
      from jsonb_each(p_found -> 'nodes') as n
      cross join jsonb_array_elements(n.value) as a (value)
      where not (p_fields -> 'counted' ? n.key or p_fields -> 'no_count' ? n.key)
        and a.value > '0' and jsonb_typeof(a.value) = 'number'
      group by n.key) as u);
  return case when v_value is null then v_usage else v_usage || jsonb_build_object('unread', v_value) end;
end
$$;

-- The API that knows most of what the events say of a usage; null where none knows any.
create or replace function ducto_private.likeliest_api(p_events jsonb) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_fields constant jsonb := ducto_private.usage_fields();
begin
  return (
    select a.name
    from jsonb_array_elements_text(v_fields -> 'every') with ordinality as a (name, place)
    cross join lateral ducto_private.find_usage(p_events, v_fields #> array['apis', a.name]) as f (found)
    where f.found is not null
    order by (f.found ->> 'unknown')::integer, a.place
    limit 1);
end
$$;

create or replace function ducto_private.no_usage(p_body jsonb, p_events jsonb, p_api text) returns void
language plpgsql stable parallel safe
as $$
declare
  v_of constant text := coalesce(' of ' || p_api, '');
  v_stream constant text := 'The stream was cut before its usage, or was not asked for it: OpenAI''s needs stream_options '
    '{"include_usage": true}. Pass all of its events; where there is no more, charge what you know yourself.';
  v_other constant text := case when p_api is not null then ducto_private.likeliest_api(p_events) end;
begin
  if v_other is not null then
    perform ducto_private.invalid(format('the body is no usage of %s', p_api),
      format('It looks like that of %s: name that API, or none.', v_other));
  elsif jsonb_typeof(p_body) = 'array' then
    perform ducto_private.invalid(format('no usage%s among the %s events of the body', v_of, jsonb_array_length(p_body)), v_stream);
  elsif p_body -> 'usage' = 'null' then
    perform ducto_private.invalid(format('the body''s usage%s is null', v_of), v_stream);
  elsif p_body ? 'choices' and not p_body ? 'usage' then
    perform ducto_private.invalid(format('the body has no usage%s', v_of), v_stream);
  end if;
  perform ducto_private.invalid(
    format('the body is no usage%s: it has %s', coalesce(nullif(v_of, ''), ' of a known API'),
      coalesce(nullif(left((select string_agg(k.key, ', ' order by k.key collate "C") from jsonb_object_keys(p_body) as k (key)), 200), ''), 'nothing')),
    'Pass what the provider returned, or its usage part; docs/usage.md lists the fields of each API.');
end
$$;

create or replace function ducto_private.read_body(p_body jsonb, p_api text, p_model text) returns jsonb
language plpgsql stable parallel safe
as $$
declare
  v_fields constant jsonb := ducto_private.usage_fields();
  v_events constant jsonb := case jsonb_typeof(p_body) when 'array' then p_body else jsonb_build_array(p_body) end;
  v_names text[];
  v_found jsonb := '{}';
  v_name text;
  v_one jsonb;
  v_least integer;
  v_usage jsonb;
  v_first text;
  v_readings jsonb := '{}';
  v_agreeing text[] := '{}';
begin
  if coalesce(jsonb_typeof(p_body), 'null') not in ('object', 'array') then
    perform ducto_private.invalid(
      format('the body must be an object or a list of events, not %s', coalesce(jsonb_typeof(p_body), 'null')),
      'Pass what the provider returned, or its usage part; docs/usage.md lists the fields of each API.');
  elsif not v_fields -> 'names' ? p_api then
    v_names := array(select k.name from jsonb_object_keys(v_fields -> 'names') as k (name) order by k.name collate "C");
    perform ducto_private.invalid(format('unknown API ''%s''', left(p_api, 100)),
      ducto_private.did_you_mean(left(p_api, 100), v_names, format('Use one of: %s.', array_to_string(v_names, ', '))));
  end if;

  v_names := array(
    select a.name
    from jsonb_array_elements_text(coalesce(v_fields #> array['names', p_api], v_fields -> 'every')) with ordinality as a (name, place)
    order by a.place);
  foreach v_name in array v_names loop
    v_one := ducto_private.find_usage(v_events, v_fields #> array['apis', v_name]);
    if v_one is not null then
      v_found := v_found || jsonb_build_object(v_name, v_one);
      v_least := least(v_least, (v_one ->> 'unknown')::integer);
    end if;
  end loop;
  if v_least is null then
    perform ducto_private.no_usage(p_body, v_events, p_api);
  end if;

  foreach v_name in array v_names loop
    v_one := v_found -> v_name;
    if (v_one ->> 'unknown')::integer = v_least then
      v_usage := ducto_private.add_usage(v_one, v_fields #> array['apis', v_name], p_model);
      v_readings := v_readings || jsonb_build_object(v_name, v_usage);
      if exists (
        select from jsonb_array_elements_text(v_fields #> array['apis', v_name, 'total']) as t (path)
        where v_one #> array['nodes', t.path, '0'] = to_jsonb(
          coalesce((v_usage ->> 'input_tokens')::numeric, 0) + coalesce((v_usage ->> 'output_tokens')::numeric, 0)))
      then
        v_agreeing := v_agreeing || v_name;
      end if;
    end if;
  end loop;
  foreach v_name in array v_names loop
    if v_readings ? v_name and (v_agreeing = '{}' or v_name = any (v_agreeing)) then
      v_usage := v_readings -> coalesce(v_first, v_name);
      v_first := coalesce(v_first, v_name);
      if v_readings -> v_name <> v_usage then
        perform ducto_private.invalid(format('%s and %s read this body differently', v_first, v_name),
          format('Say which API returned it: api ''%s'' or ''%s''.', v_first, v_name));
      end if;
    end if;
  end loop;
  -- Another API may know more of it, and count otherwise.
  if p_api is not null and v_least > 0 then
    v_name := ducto_private.likeliest_api(v_events);
    v_one := ducto_private.find_usage(v_events, v_fields #> array['apis', v_name]);
    if (v_one ->> 'unknown')::integer < v_least and v_usage - '{model,unread,provider_cost}'::text[]
      <> ducto_private.add_usage(v_one, v_fields #> array['apis', v_name], p_model) - '{model,unread,provider_cost}'::text[]
    then
      perform ducto_private.no_usage(p_body, v_events, p_api);
    end if;
  end if;
  return v_usage;
end
$$;

-- A usage as a call gives it: itself, or of {"body": …, "api": …, "model": …} a {"body": …} of what was read.
create or replace function ducto_private.read_given(p_usage jsonb) returns jsonb
language plpgsql stable parallel safe
as $$
begin
  if jsonb_typeof(p_usage) is distinct from 'object' or not p_usage ? 'body' then
    return p_usage;
  end if;
  if p_usage - '{body,api,model}'::text[] <> '{}' or coalesce(jsonb_typeof(p_usage -> 'api'), 'null') not in ('string', 'null')
    or coalesce(jsonb_typeof(p_usage -> 'model'), 'null') not in ('string', 'null')
  then
    perform ducto_private.invalid('p_metrics: beside body stand only api and model, both texts',
      'What the provider''s answer does not say is added to what ducto.read_usage() answers.', left(p_usage::text, 200));
  end if;
  return jsonb_build_object('body', ducto_private.read_body(p_usage -> 'body', p_usage ->> 'api', p_usage ->> 'model'));
end
$$;

-- A usage that was read, where cached input is counted beside input_tokens.
create or replace function ducto_private.without_cached(p_usage jsonb) returns jsonb
language plpgsql immutable parallel safe
as $$
declare
  v_input constant numeric := coalesce((p_usage ->> 'input_tokens')::numeric, 0)
    - coalesce((p_usage ->> 'cache_read_tokens')::numeric, 0) - coalesce((p_usage ->> 'cache_write_tokens')::numeric, 0);
begin
  return (p_usage - 'input_tokens') || case when v_input > 0 then jsonb_build_object('input_tokens', v_input) else '{}' end;
end
$$;

create or replace function ducto.read_usage(p_body jsonb, p_api text default null, p_model text default null) returns jsonb
language plpgsql stable parallel safe
as $$
begin
  return ducto_private.read_body(p_body, p_api, p_model);
end
$$;
comment on function ducto.read_usage is
  'The usage that a provider''s answer tells (whole, its usage part, or the list of a stream''s events), as calls take it.';

-- Ids and the checks that stop bad input at the door.

-- Time-ordered ids (UUID version 7), so that index inserts stay at the right-hand edge: new_id(), and the defaults of the
-- ledger's and the holds' own ids, which spare them the call. PostgreSQL 18's uuidv7() takes 2 us where this takes 4, but a
-- database dumped with it could not be restored into an older server.
do $do$
declare
  v_id constant text := $e$(overlay('0' || to_hex((date_part('epoch', clock_timestamp()) * 4096000)::bigint)
    placing '7' from 13 for 0) || right(gen_random_uuid()::text, 17))::uuid$e$;
begin
  execute format('create or replace function ducto_private.new_id() returns uuid language plpgsql volatile as %L',
    'begin return ' || v_id || '; end');
  if not exists (
    select from pg_attribute as a
    where a.attrelid = 'ducto_private.holds'::regclass and a.attname = 'hold_id' and a.atthasdef)
  then
    execute 'alter table ducto_private.transactions alter transaction_id set default ' || v_id;
    execute 'alter table ducto_private.holds alter hold_id set default ' || v_id;
  end if;
end
$do$;

-- The least id that new_id() makes at a time or later.
create or replace function ducto_private.first_id(p_time timestamptz) returns uuid
language plpgsql immutable parallel safe
as $$
begin
  return (overlay(lpad(to_hex((date_part('epoch', p_time) * 4096000)::bigint), 15, '0') placing '7' from 13 for 0)
    || '0000000000000000')::uuid;
end
$$;

-- An id as a caller gives it; null, which finds nothing, where it is none.
create or replace function ducto_private.to_id(p_id text) returns uuid
language plpgsql immutable parallel safe
as $$
begin
  return case when p_id ~* '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' then p_id::uuid end;
end
$$;

-- A sum as an answer can hold it: beyond bigint its greatest number.
create or replace function ducto_private.at_most_bigint(p_sum numeric) returns bigint
language plpgsql immutable parallel safe
as $$
begin
  return least(p_sum, 9223372036854775807);
end
$$;

create or replace function ducto_private.invalid(p_message text, p_hint text, p_detail text default null) returns void
language plpgsql stable
as $$
begin
  raise exception using errcode = '22023', message = p_message, hint = p_hint, detail = coalesce(p_detail, 'Nothing was changed.');
end
$$;

-- A text without the blanks at its ends, those of Unicode included.
create or replace function ducto_private.trimmed(p_value text) returns text
language plpgsql immutable parallel safe
as $$
begin
  return btrim(p_value, E' \t\n\r\f\u000b\u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000');
end
$$;

create or replace function ducto_private.is_text(p_value text) returns boolean
language plpgsql immutable parallel safe
as $$
begin
  return p_value is not null and char_length(p_value) between 1 and 255 and p_value = ducto_private.trimmed(p_value);
end
$$;

create or replace function ducto_private.check_text(p_value text, p_argument text) returns void
language plpgsql stable parallel safe
as $$
begin
  if not ducto_private.is_text(p_value) then
    perform ducto_private.invalid(
      format('%s must be a text of 1 to 255 characters without blanks at its ends', p_argument),
      case when p_value is null then 'It is null: pass the id that your application uses.'
        else 'Ids are opaque and compared byte by byte: trim or shorten it in the caller.' end,
      left(p_value, 100));
  end if;
end
$$;

create or replace function ducto_private.check_key(p_key text) returns void
language plpgsql stable parallel safe
as $$
begin
  if char_length(p_key) not between 1 and 255 or ducto_private.trimmed(p_key) = '' then
    perform ducto_private.invalid('p_idempotency_key must have 1 to 255 characters, not all blank',
      'Use a request id of your own, or null for a call that is never repeated.', left(p_key, 100));
  end if;
end
$$;

create or replace function ducto_private.check_metadata(p_metadata jsonb) returns void
language plpgsql stable parallel safe
as $$
begin
  if jsonb_typeof(p_metadata) <> 'object' then
    perform ducto_private.invalid(format('p_metadata must be a JSON object, not %s', jsonb_typeof(p_metadata)),
      'Wrap it: {"value": …}.');
  elsif pg_column_size(p_metadata) > 16384 then
    perform ducto_private.invalid(format('p_metadata has %s bytes; at most 16384 are kept with a row', pg_column_size(p_metadata)),
      'Keep large values in a table of your own and their id here.');
  end if;
end
$$;

create or replace function ducto_private.check_short(p_value text, p_argument text) returns void
language plpgsql stable parallel safe
as $$
begin
  if char_length(p_value) > 255 then
    perform ducto_private.invalid(format('%s has %s characters; at most 255 are kept', p_argument, char_length(p_value)),
      'Shorten it in the caller.', left(p_value, 100));
  end if;
end
$$;

create or replace function ducto_private.check_amount(p_amount bigint, p_least bigint, p_argument text default 'p_amount') returns void
language plpgsql stable parallel safe
as $$
begin
  if p_amount is null or p_amount < p_least then
    perform ducto_private.invalid(format('%s must be at least %s, not %s', p_argument, p_least, coalesce(p_amount::text, 'null')),
      'Amounts are whole credits; the call says which way they go.');
  end if;
end
$$;

-- Whether an amount is a cost: at least 0, within bigint, with at most 30 decimals. Null where there is none.
create or replace function ducto_private.is_cost(p_amount numeric) returns boolean
language plpgsql immutable parallel safe
as $$
begin
  return p_amount between 0 and 9223372036854775807 and p_amount = round(p_amount, 30);
end
$$;

create or replace function ducto_private.check_cost(p_amount numeric) returns void
language plpgsql stable parallel safe
as $$
begin
  if ducto_private.is_cost(p_amount) is not true then
    perform ducto_private.invalid(
      format('p_amount must be at least 0, within bigint, with at most 30 decimals, not %s', coalesce(left(p_amount::text, 100), 'null')),
      'It is a cost in credits; the config''s rounding makes it whole.');
  end if;
end
$$;

-- A time as JSON tells it, by ISO 8601 with an offset or Z; null where it is none.
create or replace function ducto_private.to_time(p_time text) returns timestamptz
language plpgsql immutable parallel safe
as $$
begin
  if p_time ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)$' then
    return p_time::timestamptz;
  end if;
  return null;
exception when datetime_field_overflow or invalid_datetime_format or invalid_time_zone_displacement_value then
  return null;
end
$$;

create or replace function ducto_private.is_label(p_label text) returns boolean
language plpgsql immutable parallel safe
as $$
begin
  return p_label is not null and char_length(p_label) between 1 and 100
    and (p_label ~ '[!-~]' or ducto_private.trimmed(p_label) <> '');
end
$$;

-- The labels of a hold or charge as a set, sorted byte by byte as the lexemes of a tsvector are; null for none.
create or replace function ducto_private.check_labels(p_labels text[], p_argument text default 'p_labels') returns text[]
language plpgsql stable strict parallel safe
as $$
declare
  v_label text;
  v_labels text[];
begin
  foreach v_label in array p_labels loop
    if not ducto_private.is_label(v_label) then
      perform ducto_private.invalid(format('%s: a label has 1 to 100 characters, not all blank', p_argument),
        'A label is a name of yours: of an API key, a session, a feature.', coalesce(left(v_label, 110), 'It is null.'));
    end if;
  end loop;
  v_labels := tsvector_to_array(array_to_tsvector(p_labels));
  if cardinality(v_labels) > 8 then
    perform ducto_private.invalid(format('%s has %s labels; at most 8 go with a hold or charge', p_argument, cardinality(v_labels)),
      'Keep what is not for caps and statistics in p_metadata.');
  end if;
  return nullif(v_labels, '{}');
end
$$;

create or replace function ducto_private.check_choice(p_value text, p_choices text[], p_argument text) returns void
language plpgsql stable parallel safe
as $$
begin
  if p_value is null or p_value <> all (p_choices) then
    perform ducto_private.invalid(format('%s cannot be %s', p_argument, coalesce(left(p_value, 100), 'null')),
      format('Use one of: %s.', array_to_string(p_choices, ', ')));
  end if;
end
$$;

create or replace function ducto_private.check_limit(p_limit integer, p_hint text default 'Read page by page with p_before.') returns void
language plpgsql stable parallel safe
as $$
begin
  if p_limit not between 1 and 1000 then
    perform ducto_private.invalid(format('p_limit must be between 1 and 1000, not %s', p_limit), p_hint);
  end if;
end
$$;

-- The usage fields that every config knows; all that are counts are whole, but for audio_seconds.
create or replace function ducto_private.known_fields() returns text[]
language plpgsql immutable parallel safe
as $$
begin
  return '{model,fixed_job,provider_cost,unread,{{known_counts}}}'::text[];
end
$$;

-- A usage without its nulls, as far as it can be judged without a config: shapes and ranges. Names are checked by the price.
create or replace function ducto_private.checked_usage(p_usage jsonb) returns jsonb
language plpgsql stable parallel safe
as $$
declare
  v_key text;
  v_value jsonb;
  v_number numeric;
begin
  if jsonb_typeof(p_usage) is distinct from 'object' then
    perform ducto_private.invalid(format('p_metrics must be a JSON object, not %s', coalesce(jsonb_typeof(p_usage), 'null')),
      'Pass the usage, e.g. {"model": "gpt-4o", "input_tokens": 1200, "output_tokens": 300}.');
  elsif pg_column_size(p_usage) > 16384 then
    perform ducto_private.invalid(format('p_metrics has %s bytes; at most 16384 are kept with a charge', pg_column_size(p_usage)),
      'Count tools instead of listing very many.');
  end if;
  p_usage := jsonb_strip_nulls(p_usage);
  if p_usage ? 'tool_calls' and jsonb_typeof(p_usage -> 'tool_calls') <> 'number' then
    if jsonb_typeof(p_usage -> 'tool_calls') <> 'array' or exists (
      select from jsonb_array_elements(p_usage -> 'tool_calls') as c (value)
      where case jsonb_typeof(c.value)
        when 'string' then char_length(c.value #>> '{}') not between 1 and 255
        when 'object' then jsonb_typeof(c.value -> 'name') is distinct from 'string'
          or char_length(c.value ->> 'name') not between 1 and 255
        else true end)
    then
      perform ducto_private.invalid('p_metrics: tool_calls must be a count, or a list of names or of {"name": …}',
        'A name has 1 to 255 characters.', left((p_usage -> 'tool_calls')::text, 200));
    end if;
    v_value := p_usage - '{model,fixed_job,tool_calls,provider_cost,unread}'::text[];
  else
    v_value := p_usage - '{model,fixed_job,provider_cost,unread}'::text[];
  end if;
  if p_usage ? 'provider_cost' and (
    jsonb_typeof(p_usage -> 'provider_cost') <> 'number' or (p_usage -> 'provider_cost')::numeric < 0 or (p_usage -> 'provider_cost')::numeric >= 1e15
    or (p_usage -> 'provider_cost')::numeric <> round((p_usage -> 'provider_cost')::numeric, 30))
  then
    perform ducto_private.invalid('p_metrics: provider_cost must be a number of at least 0 and below 10^15, with at most 30 decimals',
      'It is what the provider says that the call took, in its own money.', left((p_usage -> 'provider_cost')::text, 100));
  end if;
  if p_usage ? 'unread' then
    if jsonb_typeof(p_usage -> 'unread') <> 'object' then
      perform ducto_private.invalid('p_metrics: unread must be an object of counts by their paths',
        'Pass what ducto.read_usage() answers.', left((p_usage -> 'unread')::text, 100));
    end if;
    v_value := v_value || coalesce((
      select jsonb_object_agg('unread.' || u.key, u.value)
      from jsonb_each(p_usage -> 'unread') as u), '{}');
  end if;
  if v_value @? 'strict $.* ? (@.type() <> "number" || @ < 0 || @ >= 1000000000000000 || @.floor() <> @)' then
    for v_key, v_value in
      select e.key, e.value from jsonb_each(v_value) as e
    loop
      if jsonb_typeof(v_value) <> 'number' then
        perform ducto_private.invalid(format('p_metrics: %s must be a number, not %s', v_key, jsonb_typeof(v_value)),
          'Leave out what was not used; quote no numbers.', left(v_value::text, 100));
      end if;
      v_number := v_value::numeric;
      if v_number < 0 or v_number >= 1000000000000000 then
        perform ducto_private.invalid(format('p_metrics: %s must be at least 0 and below 10^15', v_key),
          'Counts are never negative; a refund is a call of its own.', left(v_value::text, 100));
      elsif v_number <> floor(v_number) and v_key = any (ducto_private.known_fields()) and v_key <> 'audio_seconds'
      then
        perform ducto_private.invalid(format('p_metrics: %s must be whole', v_key),
          'Fractions belong into a metric of the config''s own.', left(v_value::text, 100));
      elsif v_number <> round(v_number, 12) then
        perform ducto_private.invalid(format('p_metrics: %s has more than 12 decimals', v_key),
          'Round it in the caller.', left(v_value::text, 100));
      end if;
    end loop;
  end if;
  if p_usage ? 'model' and jsonb_typeof(p_usage -> 'model') <> 'string' then
    perform ducto_private.invalid(format('p_metrics: model must be a text, not %s', jsonb_typeof(p_usage -> 'model')),
      'Give the model''s name, or leave it out.');
  elsif char_length(p_usage ->> 'model') > 255 then
    perform ducto_private.invalid('p_metrics: model has more than 255 characters', 'Give the model''s name.', left(p_usage ->> 'model', 100));
  elsif p_usage ? 'fixed_job' and (jsonb_typeof(p_usage -> 'fixed_job') <> 'string'
    or char_length(p_usage ->> 'fixed_job') not between 1 and 255)
  then
    perform ducto_private.invalid('p_metrics: fixed_job must be the name of a job', 'Leave it out where no job was done.',
      left((p_usage -> 'fixed_job')::text, 100));
  end if;
  return p_usage;
end
$$;

-- A time with which periods can be counted.
create or replace function ducto_private.check_moment(p_at timestamptz, p_name text) returns void
language plpgsql stable
as $$
begin
  if p_at not between '1900-01-01' and '2200-01-01' then
    perform ducto_private.invalid(format('%s must be a time between 1900 and 2200, not %s', p_name, p_at),
      'Give the time that your payment provider states, or leave it out.');
  end if;
end
$$;

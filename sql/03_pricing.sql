-- Published prices: immutable versions, one active.
--
-- Python compiles a config to functions named by the hash of their text; publish() numbers it. What is active is the body
-- of ducto_private.quote, the dispatcher: a charge reads no table to learn its price, and what it needs of the config
-- comes with the price in one answer, so that a publish in between can never mix two versions.

create or replace function ducto_private.lock_setup() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pg_advisory_xact_lock(7235512, 1);
end
$$;

-- The terms of a plan that version p_version does not have itself: those of the last version before it that has, else
-- of the first one after it. Versions never change and only follow each other, so the answer never changes either.
create or replace function ducto_private.plan_terms(p_version integer, p_plan text) returns ducto_private.plans
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
  select p
  from ducto_private.plans as p
  where p.plan_id = p_plan
  order by p.version > p_version, case when p.version > p_version then p.version else -p.version end
  limit 1
$$;

create or replace function ducto_private.find_version(p_version integer) returns ducto_private.pricing_versions
language plpgsql stable
set search_path = pg_catalog, pg_temp
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

create or replace function ducto_private.quote_at(p_version integer, p_usage jsonb, p_job text, p_plan text, p_unseen boolean)
returns ducto_private.quote
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_quotes ducto_private.quote[];
begin
  execute format('select array[ducto_private.%I($1, $2, $3, $4, $5)]', (ducto_private.find_version(p_version)).price_function)
  into v_quotes
  using p_version, p_usage, p_job, p_plan, p_unseen;
  return v_quotes[1];
end
$$;

create or replace function ducto_private.check_snapshot(p_version integer) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from ducto_private.pricing_versions as v where v.version = p_version) then
    raise exception 'pricing version % was published after this transaction took its snapshot', p_version
      using errcode = '40001', hint = 'Retry the transaction.';
  end if;
end
$$;

-- Writes the dispatchers anew, for the version that was activated last: quote() for every price, plain_price() for what a
-- plain charge asks. They are that version's functions themselves, to save a call. Whoever prices asks for the size of a
-- relation first: that is to hear of what others have committed, a new dispatcher among it.
create or replace function ducto_private.write_dispatcher() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version integer;
  v_price text;
  v_plain text;
begin
  select v.version, q.prosrc, p.prosrc
  into v_version, v_price, v_plain
  from ducto_private.pricing_state as s
  join ducto_private.pricing_versions as v on v.version = s.active_version
  join pg_proc as q on q.pronamespace = 'ducto_private'::regnamespace and q.proname = v.price_function
  left join pg_proc as p on p.pronamespace = 'ducto_private'::regnamespace and p.proname = replace(v.price_function, 'price_', 'plain_');
  execute format(
    $f$
    create or replace function ducto_private.quote(
      p_version integer, p_usage jsonb, p_job text, p_plan text, p_unseen boolean)
    returns ducto_private.quote
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    as %L
    $f$,
    format(
      $b$begin
  if p_version <> %s then
    return ducto_private.quote_at(p_version, p_usage, p_job, p_plan, p_unseen);
  end if;
  p_version := %1$s;
  %s;
end$b$,
      coalesce(v_version, 0), coalesce(v_price, $r$raise exception 'pricing not loaded' using errcode = 'DU001',
    hint = 'Publish a config with `ducto-pg pricing publish`, or activate a version with ducto.activate_pricing().'$r$)));
  execute format(
    $f$
    create or replace function ducto_private.plain_price(p_usage jsonb) returns ducto_private.plain_price
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    as %L
    $f$,
    format(
      $b$declare
  p_version constant integer := %s;
begin
  %s;
end$b$,
      coalesce(v_version, 0), coalesce(v_plain, 'return null')));
  revoke all on function ducto_private.quote(integer, jsonb, text, text, boolean), ducto_private.plain_price(jsonb) from public;
end
$$;

-- A price by the version given, else by the one activated last, or 40001 where the caller's snapshot does not see that one.
create or replace function ducto_private.fresh_quote(
  p_version integer, p_usage jsonb, p_job text, p_plan text, p_unseen boolean) returns ducto_private.quote
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_strict boolean := current_setting('transaction_isolation') <> 'read committed'
    or pg_relation_size('ducto_private.plain_price'::regclass) is null;
  v_quote ducto_private.quote;
begin
  v_quote := ducto_private.quote(p_version, p_usage, p_job, p_plan, p_unseen);
  if v_strict then
    perform ducto_private.check_snapshot(v_quote.version);
  end if;
  return v_quote;
end
$$;

-- What the active version says of accounts on a plan, or not yet seen. It hears of a publish first, unless that is not to
-- be seen.
create or replace function ducto_private.terms(p_plan text, p_unseen boolean) returns ducto_private.quote
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') = 'read committed'
    and pg_relation_size('ducto_private.plain_price'::regclass) is null
  then
    return null;
  end if;
  return ducto_private.quote(null, null, null, p_plan, p_unseen);
end
$$;

-- The zone that the first activated version fixed, by whose days all statistics count; null before.
create or replace function ducto_private.first_zone() returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select coalesce(v.config ->> 'timezone', 'UTC')
    from ducto_private.activations as a
    join ducto_private.pricing_versions as v on v.version = a.version
    order by a.activation_id
    limit 1);
end
$$;

create or replace function ducto_private.activate(p_version integer) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_from integer;
  v_first_zone text;
  v_zone text;
  v_plan text;
begin
  perform ducto_private.lock_setup();
  v_first_zone := ducto_private.first_zone();
  v_zone := coalesce((ducto_private.find_version(p_version)).config ->> 'timezone', 'UTC');
  if v_zone <> v_first_zone then
    perform ducto_private.invalid(
      format('timezone: version %s says %s, but the first activated version fixed %s', p_version, v_zone, v_first_zone),
      'Days and months already counted cannot be cut anew: keep the time zone.');
  elsif v_zone <> 'UTC' and (v_zone not like '%/%' or not exists (select from pg_timezone_names as n where n.name = v_zone)) then
    perform ducto_private.invalid(format('timezone: this server knows no place %s', v_zone),
      'Use UTC or a name with a place, like Europe/Berlin, of pg_timezone_names.');
  end if;
  v_from := ducto_private.active_version();
  update ducto_private.pricing_state as s
  set active_version = p_version;
  if v_from is distinct from p_version then
    insert into ducto_private.activations (version, from_version, activated_at, activated_by, role_set)
    values (p_version, v_from, clock_timestamp(), session_user, current_setting('role'));
    perform ducto_private.write_dispatcher();
    for v_plan in
      select p.plan_id from ducto_private.plans as p where p.version = v_from
      except
      select p.plan_id from ducto_private.plans as p where p.version = p_version
      order by 1
    loop
      raise notice 'plan % is not in version %: nobody can be put on it any more, and accounts on it keep its terms of '
        'version % until set_user_plan moves them', v_plan, p_version, v_from;
    end loop;
  end if;
end
$$;

-- Publishing what the newest version already is, label included, is that version: an application may publish at each start.
create or replace function ducto_private.publish(
  p_config jsonb, p_label text, p_price_function text, p_plans jsonb, p_activate boolean) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
  v_version integer;
begin
  perform ducto_private.lock_setup();
  perform ducto_private.check_short(p_label, 'p_label');
  select v.version
  into v_version
  from ducto_private.pricing_versions as v
  where v.version = (select s.last_version from ducto_private.pricing_state as s)
    and v.config = p_config and v.price_function = p_price_function and v.label is not distinct from p_label;
  if not found then
    update ducto_private.pricing_state as s
    set last_version = s.last_version + 1
    returning s.last_version into v_version;
    insert into ducto_private.pricing_versions (version, label, config, price_function, created_at, created_by)
    values (v_version, p_label, p_config, p_price_function, clock_timestamp(), session_user);
    insert into ducto_private.plans (version, plan_id, name, free_allowance, features, override_function)
    select v_version, p.plan_id, p.name, p.free_allowance, coalesce(p.features, '{}'), p.override_function
    from jsonb_to_recordset(p_plans)
      as p (plan_id text, name text, free_allowance bigint, features jsonb, override_function text);
  end if;
  if p_activate then
    perform ducto_private.activate(v_version);
  end if;
  return v_version;
end
$$;

-- The active version's number, or null.
create or replace function ducto_private.active_version() returns integer
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select s.active_version
    from ducto_private.pricing_state as s);
end
$$;

create or replace function ducto.get_pricing_config(p_version integer) returns ducto.pricing_config_result
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_row ducto_private.pricing_versions := ducto_private.find_version(p_version);
begin
  return row(v_row.id, v_row.config, v_row.version, v_row.label, null)::ducto.pricing_config_result;
end
$$;
comment on function ducto.get_pricing_config is 'The config of a published pricing version.';

create or replace function ducto.get_active_pricing() returns ducto.pricing_config_result
language sql stable security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
  select v.id::text, v.config, v.version, v.label, null::text
  from (values (ducto_private.active_version())) as a (version)
  left join ducto_private.pricing_versions as v on v.version = a.version
$$;
comment on function ducto.get_active_pricing is 'The active pricing version; nulls where none is.';

create or replace function ducto.get_pricing_history() returns setof ducto.pricing_config_history_item
language sql stable security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
  select v.id::text, v.version, v.label, v.version is not distinct from ducto_private.active_version(), v.created_at, null::text
  from ducto_private.pricing_versions as v
  order by v.version desc
$$;
comment on function ducto.get_pricing_history is 'All published pricing versions, newest first.';

create or replace function ducto.activate_pricing(p_version integer) returns ducto.pricing_config_result
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
begin
  perform ducto_private.activate(p_version);
  return ducto.get_pricing_config(p_version);
end
$$;
comment on function ducto.activate_pricing is 'Makes a published version the one that prices from now on; earlier charges keep theirs. Recorded and reversible.';

create or replace function ducto.calculate_cost(p_metrics jsonb, p_user_id text default null, p_version integer default null)
returns ducto.cost_breakdown
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_plan text;
  v_seen boolean := true;
  v_quote ducto_private.quote;
begin
  perform ducto_private.check_usage(p_metrics);
  if p_user_id is not null then
    perform ducto_private.check_text(p_user_id, 'p_user_id');
    select a.plan_id
    into v_plan
    from ducto_private.accounts as a
    where a.account_id = p_user_id;
    v_seen := found;
  end if;
  v_quote := ducto_private.fresh_quote(p_version, p_metrics, null, v_plan, not v_seen);
  return row(v_quote.model_credits, v_quote.tool_credits, v_quote.search_credits, v_quote.cache_savings, v_quote.fixed_credits,
    v_quote.cost,
    jsonb_build_object(
      'model', coalesce(p_metrics ->> 'model', ''),
      'input_tokens', coalesce(p_metrics -> 'input_tokens', '0'),
      'output_tokens', coalesce(p_metrics -> 'output_tokens', '0'),
      'tool_count', case jsonb_typeof(p_metrics -> 'tool_calls')
        when 'array' then jsonb_array_length(p_metrics -> 'tool_calls')
        else coalesce((p_metrics ->> 'tool_calls')::numeric::bigint, 0) end),
    v_quote.resolved_model, v_quote.version, v_quote.plan_id, null)::ducto.cost_breakdown;
end
$$;
comment on function ducto.calculate_cost is
  'The exact price of a usage in credits, for nobody in particular or on the plan of an account, at the active or a given version. Writes nothing.';

select ducto_private.write_dispatcher();

-- Installs or upgrades ducto_pg {{release}} in this database: one statement, all or nothing, safe to run again.
-- Needs PostgreSQL 14 or newer, UTF8, and a role that may create schemas, best the database's owner.
do $ducto_pg$
declare
  v_version constant pg_catalog.text := {{version}};
  v_contents constant pg_catalog.text := {{contents}};
  v_checksums constant pg_catalog.jsonb := {{checksums}};
  v_path pg_catalog.text := pg_catalog.current_setting('search_path');
  v_settings pg_catalog.jsonb;
  v_owner pg_catalog.oid;
  v_object pg_catalog.text;
  v_holder pg_catalog.name;
  v_name pg_catalog.text;
  v_checksum pg_catalog.text;
  v_file pg_catalog.text[];
  v_state pg_catalog.text;
  v_message pg_catalog.text;
  v_detail pg_catalog.text;
  v_hint pg_catalog.text;
  v_applied pg_catalog.text[] := '{}';
  v_installed pg_catalog.text;
  v_lost pg_catalog.bool;
  v_missing pg_catalog.text;
  v_marks pg_catalog.text[];
  v_before pg_catalog.jsonb := '{}';
  v_drift pg_catalog.jsonb;
  v_foreign pg_catalog.text[] := '{}';
  v_difference pg_catalog.jsonb;
  v_left pg_catalog.text[];
  v_statement pg_catalog.text;
  v_apply pg_catalog.bool := true;
  v_made pg_catalog.text[] := '{}';
  v_repaired pg_catalog.text[] := '{}';
  v_report pg_catalog.jsonb;
begin
  perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  select jsonb_object_agg(s.name, current_setting(s.name))
  into v_settings
  from unnest(array['standard_conforming_strings', 'check_function_bodies', 'client_min_messages', 'lock_timeout', 'role',
    'quote_all_identifiers']) as s (name);
  perform set_config(s.name, s.value, true)
  from (values ('standard_conforming_strings', 'on'), ('check_function_bodies', 'on'), ('client_min_messages', 'warning'),
    ('lock_timeout', '60s'), ('quote_all_identifiers', 'off')) as s (name, value);

  if current_setting('server_version_num')::integer < 140000 then
    raise exception 'ducto_pg needs PostgreSQL 14 or newer; this server is %', current_setting('server_version')
      using errcode = '0A000';
  elsif current_setting('server_encoding') <> 'UTF8' then
    raise exception 'ducto_pg needs a database with encoding UTF8; this one has %', current_setting('server_encoding')
      using errcode = '0A000', hint = 'Create one with: encoding ''UTF8'' template template0';
  elsif current_setting('transaction_read_only') = 'on' then
    raise exception 'this %: nothing was changed', case when pg_is_in_recovery() then 'server is a standby' else 'transaction is read-only' end
      using errcode = '25006', hint = 'Run setup in a transaction that may write, on the primary server.';
  end if;

  begin
    perform pg_advisory_xact_lock(7235512, 1);
  exception when lock_not_available then
    raise exception 'another setup, publish or activation has kept the setup lock of this database for 60 s'
      using errcode = '55P03', hint = 'Its transaction is still open: see pg_locks where locktype is advisory.';
  end;
  perform set_config('lock_timeout', {{lock_timeout}}, true);

  -- Whatever stands under our names must be the installer's own: a planted function would run with its rights. A
  -- superuser works for the owner of an installation, but only one that owns the database (or is a superuser) too:
  -- anybody else with the right to create schemas could have planted it, and SET ROLE is no wall against its code.
  select r.oid
  into v_owner
  from pg_roles as r
  where r.rolname = current_user;
  if (select r.rolsuper from pg_roles as r where r.oid = v_owner) then
    v_owner := coalesce((
      select c.relowner
      from pg_class as c
      join pg_roles as r on r.oid = c.relowner
      join pg_database as b on b.datname = current_database()
      where c.oid = to_regclass('ducto_private.schema_migrations') and (b.datdba = c.relowner or r.rolsuper)), v_owner);
  end if;
  with schemas as (
    select n.oid, n.nspowner as owner
    from pg_namespace as n
    where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
  )
  select f.object, pg_get_userbyid(f.owner)
  into v_object, v_holder
  from (
    select pg_describe_object('pg_namespace'::regclass, s.oid, 0) as object, s.owner
    from schemas as s
    union all
    -- What belongs to the bootstrap superuser (10) has no entry in pg_shdepend.
    select pg_describe_object(d.classid, d.objid, 0), coalesce(o.refobjid, 10)
    from schemas as s
    join pg_depend as d on d.refclassid = 'pg_namespace'::regclass and d.refobjid = s.oid and d.deptype = 'n'
    left join pg_shdepend as o on o.classid = d.classid and o.objid = d.objid and o.deptype = 'o'
      and o.dbid = (select b.oid from pg_database as b where b.datname = current_database())
  ) as f
  where f.owner <> v_owner
  limit 1;
  if found then
    raise exception '% belongs to role %, not to %: nothing was changed', v_object, v_holder, pg_get_userbyid(v_owner)
      using errcode = '42501',
        hint = 'If ducto_pg was installed by that role, run setup as that role (set role); if not, drop what it planted.';
  end if;
  perform set_config('role', pg_get_userbyid(v_owner)::text, true)
  where pg_get_userbyid(v_owner) <> current_user;

  select max(t.name) filter (where to_regclass(t.name) is null), max(t.name) filter (where to_regclass(t.name) is not null)
  into v_missing, v_object
  from unnest(array['ducto_private.schema_migrations', 'ducto_private.installation', 'ducto_private.objects', 'ducto_private.grants'])
    as t (name);
  if v_missing is not null and v_object is not null then
    raise exception 'table % is missing: nothing was changed', v_missing
      using errcode = '55000', hint = 'Restore the database from a backup: setup cannot give back what a table held.';
  elsif v_missing is null then
    select array_agg(m.name), min(m.name) filter (where not v_checksums ? m.name),
      min(m.name) filter (where v_checksums ->> m.name <> m.checksum)
    into v_applied, v_name, v_checksum
    from ducto_private.schema_migrations as m;
    select i.version, i.contents is distinct from v_contents or i.major <> current_setting('server_version_num')::integer / 10000
    into v_installed, v_apply
    from ducto_private.installation as i;
    v_lost := v_installed is null or not exists (select from ducto_private.objects as o where o.name = 'ducto_private.drift()');
    if v_name is not null
      or string_to_array(substring(v_installed from '^[0-9]+(?:[.][0-9]+)*'), '.')::integer[]
        > string_to_array(substring(v_version from '^[0-9]+(?:[.][0-9]+)*'), '.')::integer[]
    then
      raise exception 'this database was installed by a newer ducto_pg (%) than this one (%): nothing was changed', v_installed, v_version
        using errcode = '55000', hint = 'Upgrade the package that runs setup.', detail = coalesce('unknown migration ' || v_name, '');
    elsif v_lost and current_setting('transaction_isolation') = 'read committed' then
      raise exception 'the tables of ducto_private have lost their contents: nothing was changed'
        using errcode = '55000',
          hint = 'Restore them with their data, or drop the schemas ducto, ducto_private and ducto_read and begin anew.';
    elsif v_lost then
      raise exception 'another setup has installed since this transaction began: nothing was changed'
        using errcode = '40001', hint = 'Try again in a new transaction.';
    elsif v_checksum is not null then
      raise exception 'migration % was edited after it had run in this database: nothing was changed', v_checksum
        using errcode = '55000', hint = 'Restore the file that shipped; a change is a migration of its own.';
    end if;
  end if;

  -- What was dropped, replaced or disabled since the last setup is made again as it was. The functions that look for it come
  -- first, or a planted one could hide the rest. An object may need another that is missing too: hence rounds. Comments come
  -- last, since an object that is dropped and made again loses its own.
  if v_installed is not null then
    select coalesce(jsonb_agg(o.found), '[]')
    into v_drift
    from (
      select jsonb_build_object('kind', o.kind, 'name', o.name, 'expected', o.definition,
        'actual', case o.kind when 'function' then pg_get_functiondef(to_regprocedure(o.name)) end) as found
      from ducto_private.objects as o
      where case concat(o.kind, ' ', o.name)
        when 'type ducto_private.difference' then to_regtype(o.name) is null
        when 'function ducto_private.catalog()' then pg_get_functiondef(to_regprocedure(o.name)) is distinct from o.definition
        when 'function ducto_private.drift()' then pg_get_functiondef(to_regprocedure(o.name)) is distinct from o.definition
        else false end
    ) as o;
    perform set_config('check_function_bodies', 'off', true);
    loop
      v_left := '{}';
      for v_difference in select d.value from jsonb_array_elements(v_drift) as d loop
        v_name := concat(v_difference ->> 'kind', ' ', v_difference ->> 'name');
        if v_name = any (v_made) and v_difference ->> 'kind' <> 'comment' then
          raise exception '% was made again and still is not what it was: nothing was changed', v_name
            using errcode = '55000', hint = 'Restore the database from a backup.';
        elsif v_difference ->> 'kind' in ('table', 'column') then
          raise exception '% %: nothing was changed', v_name,
            coalesce('is ' || (v_difference ->> 'actual') || ', not ' || (v_difference ->> 'expected'), 'is missing')
            using errcode = '55000', hint = 'Take the change back, or restore the database from a backup: setup cannot give back what '
              'a table held.';
        elsif v_difference ->> 'kind' = 'type' and v_difference ->> 'actual' is not null then
          raise exception '% has other attributes than setup made: nothing was changed', v_name
            using errcode = '55000', detail = format('It was made by: %s', v_difference ->> 'expected'),
              hint = format('Run setup again after: drop %s cascade. It holds no data of ours; your own functions and columns that use it go too.', v_name);
        end if;
        v_object := v_difference ->> 'name';
        v_statement := case
          when v_difference ->> 'expected' is null then 'drop routine ' || v_object
          when v_difference ->> 'kind' = 'function'
            then format('%s; revoke all on function %s from public', v_difference ->> 'expected', v_object)
          when v_difference ->> 'actual' is not null and v_difference ->> 'kind' in ('trigger', 'index')
            then format('drop %s; %s', v_name, v_difference ->> 'expected')
          when v_difference ->> 'actual' is not null and v_difference ->> 'kind' = 'constraint'
            then format('alter table %s drop constraint %s; %s', split_part(v_object, ' on ', 2), split_part(v_object, ' on ', 1),
              v_difference ->> 'expected')
          else v_difference ->> 'expected' end;
        begin
          begin
            execute v_statement;
          exception when invalid_function_definition or invalid_table_definition or wrong_object_type then
            execute format('drop %s; %s', regexp_replace(v_name, '^function', 'routine'), v_statement);
          end;
          if v_difference ->> 'expected' is null then
            v_repaired := v_repaired || (v_name || ' dropped');
          else
            v_made := v_made || v_name;
            v_repaired := v_repaired || v_name;
          end if;
        exception
          when undefined_object or undefined_function or undefined_table or undefined_column or invalid_schema_name or invalid_foreign_key
          then
            v_left := v_left || (v_name || ': ' || sqlerrm);
          when others then
            get stacked diagnostics v_state = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
              v_hint = pg_exception_hint;
            raise exception using errcode = v_state, message = v_name || ': ' || v_message, detail = v_detail, hint = v_hint;
        end;
      end loop;
      if cardinality(v_left) > 0 and cardinality(v_left) = jsonb_array_length(v_drift) then
        raise exception using errcode = '55000', message = v_left[1], detail = array_to_string(v_left[2:], E'\n');
      end if;
      select coalesce(jsonb_agg(d order by d.kind = 'table' desc, d.kind = 'comment', d.kind, d.name) filter (where d.expected <> '' or d.ghost), '[]'),
        coalesce(array_agg(d.kind || ' ' || d.name) filter (where d.expected is null), '{}')
      into v_drift, v_foreign
      from ducto_private.drift() as d;
      exit when v_drift = '[]';
    end loop;
    perform set_config('check_function_bodies', 'on', true);
    v_repaired := v_repaired || ducto_private.make_formulas() || ducto_private.apply_grants();
  end if;

  if v_apply then
    if v_installed is not null then
      select jsonb_object_agg(c.kind || ' ' || c.name, c.definition)
      into v_before
      from ducto_private.catalog() as c;
    end if;
    -- A function or view that sql/ makes again has a new row version: what has the old one is not of this release.
    v_marks := array(
      select concat(p.oid, ' ', p.xmin)
      from pg_proc as p
      join pg_namespace as n on n.oid = p.pronamespace
      where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
      union all
      select concat(w.oid, ' ', w.xmin)
      from pg_rewrite as w
      join pg_class as c on c.oid = w.ev_class
      join pg_namespace as n on n.oid = c.relnamespace
      where n.nspname = 'ducto_read');
    begin
      foreach v_file slice 1 in array {{migrations}} loop
        v_name := v_file[1];
        continue when v_name = any (v_applied);
        execute v_file[2];
        insert into ducto_private.schema_migrations (name, checksum)
        values (v_name, v_checksums ->> v_name);
      end loop;
      foreach v_file slice 1 in array {{sql}} loop
        v_name := v_file[1];
        execute v_file[2];
      end loop;

      -- What an older release made and this one does not, and overloads of its functions, would still be found by calls.
      for v_name in
        with functions as (
          select p.oid::regprocedure::text as signature, p.pronamespace, p.proname, concat(p.oid, ' ', p.xmin) <> all (v_marks) as made
          from pg_proc as p
          where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace, 'ducto_read'::regnamespace)
            and p.oid <> 'ducto_private.evaluate(bigint, jsonb, numeric[])'::regprocedure
        )
        select 'function ' || f.signature
        from functions as f
        where not f.made and (
          exists (select from functions as m where m.made and m.pronamespace = f.pronamespace and m.proname = f.proname)
          or exists (select from ducto_private.objects as o where o.kind = 'function' and o.name = f.signature))
        union all
        select 'view ' || c.oid::regclass
        from pg_class as c
        join pg_rewrite as w on w.ev_class = c.oid and w.rulename = '_RETURN'
        join ducto_private.objects as o on o.kind = 'view' and o.name = c.oid::regclass::text
        where c.relnamespace = 'ducto_read'::regnamespace and concat(w.oid, ' ', w.xmin) = any (v_marks)
      loop
        execute 'drop ' || v_name;
        v_repaired := v_repaired || (v_name || ' dropped');
      end loop;

      -- What all our functions have in common, said once. RPCs run as the owner, and no caller's search path, temporary
      -- objects or settings reach into any function.
      for v_name in
        select p.oid::regprocedure
        from pg_proc as p
        where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace) and p.prokind = 'f'
          and concat(p.oid, ' ', p.xmin) <> all (v_marks)
      loop
        execute format('alter function %s set search_path = pg_catalog, pg_temp', v_name);
        if starts_with(v_name, 'ducto.') then
          execute format('alter function %s security definer set standard_conforming_strings = on', v_name);
        end if;
        v_foreign := array_remove(v_foreign, 'function ' || v_name);
      end loop;
    exception when others then
      get stacked diagnostics v_state = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
        v_hint = pg_exception_hint;
      raise exception using errcode = v_state, message = v_name || ': ' || v_message, detail = v_detail, hint = v_hint;
    end;
    insert into ducto_private.installation (version, contents, major)
    values (v_version, v_contents, current_setting('server_version_num')::integer / 10000)
    on conflict (only_row) do update
    set version = excluded.version, contents = excluded.contents, major = excluded.major, installed_at = excluded.installed_at,
      installed_by = excluded.installed_by;
    perform ducto_private.store_objects(v_foreign);
    select v_made || coalesce(array_agg(o.kind || ' ' || o.name), '{}')
    into v_made
    from ducto_private.objects as o
    where v_before ->> (o.kind || ' ' || o.name) is distinct from o.definition;
  end if;
  perform ducto_private.apply_grants({{grant_to}}, {{grant_admin_to}}, {{grant_read_to}}, {{revoke_from}});

  select jsonb_build_object(
    'tables_created', coalesce(jsonb_agg(distinct m.relation order by m.relation) filter (where m.relation is not null), '[]'),
    'rpcs_created', coalesce(jsonb_agg(distinct m.rpc order by m.rpc) filter (where m.rpc is not null), '[]'),
    'repaired', (select coalesce(jsonb_agg(distinct r.name collate "C"), '[]') from unnest(v_repaired) as r (name)))
  into v_report
  from (
    select substring(u.name from '^function (ducto[.][^(]*)') as rpc,
      coalesce(substring(u.name from '^(?:table|view) (.*)$'), substring(u.name from '^(?:column|default|not null) (.*)[.][^.]*$'))
        as relation
    from unnest(v_made) as u (name)
  ) as m;
  if cardinality(v_made || v_repaired) > 0 then
    notify pgrst, 'reload schema';
  end if;

  perform set_config('ducto_pg.report', v_report::text, true);
  perform set_config(s.key, s.value, true)
  from jsonb_each_text(v_settings) as s;
  perform set_config('search_path', v_path, true);
end
$ducto_pg$;

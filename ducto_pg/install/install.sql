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
  v_installed_contents pg_catalog.text;
  v_snapshot constant pg_catalog.text := $snapshot$
    select coalesce(jsonb_object_agg(s.name, s.definition), '{}')
    from (
      select format('%I.%I', n.nspname, p.proname) as name, string_agg(pg_get_functiondef(p.oid), '' order by p.oid) as definition
      from pg_proc as p
      join pg_namespace as n on n.oid = p.pronamespace
      where n.nspname = 'ducto' and p.prokind in ('f', 'p')
      group by n.nspname, p.proname
      union all
      select format('%I.%I', n.nspname, c.relname), coalesce(case when c.relkind = 'v' then pg_get_viewdef(c.oid) end,
        (select string_agg(concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull), ',' order by a.attnum)
          from pg_attribute as a
          where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped), '')
      from pg_class as c
      join pg_namespace as n on n.oid = c.relnamespace
      where n.nspname in ('ducto_private', 'ducto_read') and c.relkind in ('r', 'p', 'v')
    ) as s
  $snapshot$;
  v_before pg_catalog.jsonb;
  v_after pg_catalog.jsonb;
  v_report pg_catalog.jsonb := '{}';
begin
  perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  select jsonb_object_agg(s.name, current_setting(s.name))
  into v_settings
  from unnest(array['standard_conforming_strings', 'check_function_bodies', 'client_min_messages', 'lock_timeout', 'role']) as s (name);
  perform set_config(s.name, s.value, true)
  from (values ('standard_conforming_strings', 'on'), ('check_function_bodies', 'on'), ('client_min_messages', 'warning'),
    ('lock_timeout', '60s')) as s (name, value);

  if current_setting('server_version_num')::integer < 140000 then
    raise exception 'ducto_pg needs PostgreSQL 14 or newer; this server is %', current_setting('server_version')
      using errcode = '0A000';
  elsif current_setting('server_encoding') <> 'UTF8' then
    raise exception 'ducto_pg needs a database with encoding UTF8; this one has %', current_setting('server_encoding')
      using errcode = '0A000', hint = 'Create one with: encoding ''UTF8'' template template0';
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

  if to_regclass('ducto_private.schema_migrations') is not null then
    select array_agg(m.name), min(m.name) filter (where not v_checksums ? m.name),
      min(m.name) filter (where v_checksums ->> m.name <> m.checksum)
    into v_applied, v_name, v_checksum
    from ducto_private.schema_migrations as m;
    select i.version, i.contents
    into v_installed, v_installed_contents
    from ducto_private.installation as i;
    if v_name is not null
      or string_to_array(substring(v_installed from '^[0-9]+(?:[.][0-9]+)*'), '.')::integer[]
        > string_to_array(substring(v_version from '^[0-9]+(?:[.][0-9]+)*'), '.')::integer[]
    then
      raise exception 'this database was installed by a newer ducto_pg (%) than this one (%): nothing was changed', v_installed, v_version
        using errcode = '55000', hint = 'Upgrade the package that runs setup.', detail = coalesce('unknown migration ' || v_name, '');
    elsif v_installed is null and current_setting('transaction_isolation') = 'read committed' then
      raise exception 'the tables of ducto_private have lost their contents: nothing was changed'
        using errcode = '55000',
          hint = 'Restore them with their data, or drop the schemas ducto, ducto_private and ducto_read and begin anew.';
    elsif v_installed is null then
      raise exception 'another setup has installed since this transaction began: nothing was changed'
        using errcode = '40001', hint = 'Try again in a new transaction.';
    elsif v_checksum is not null then
      raise exception 'migration % was edited after it had run in this database: nothing was changed', v_checksum
        using errcode = '55000', hint = 'Restore the file that shipped; a change is a migration of its own.';
    end if;
  end if;

  if v_installed_contents is distinct from v_contents then
    execute v_snapshot into v_before;
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
    exception when others then
      get stacked diagnostics v_state = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
        v_hint = pg_exception_hint;
      raise exception using errcode = v_state, message = v_name || ': ' || v_message, detail = v_detail, hint = v_hint;
    end;
    insert into ducto_private.installation (version, contents)
    values (v_version, v_contents)
    on conflict (only_row) do update
    set version = excluded.version, contents = excluded.contents, installed_at = excluded.installed_at,
      installed_by = excluded.installed_by;
    execute v_snapshot into v_after;
    select jsonb_build_object(
      'tables_created', coalesce(jsonb_agg(a.key order by a.key) filter (where not starts_with(a.key, 'ducto.')), '[]'),
      'rpcs_created', coalesce(jsonb_agg(a.key order by a.key) filter (where starts_with(a.key, 'ducto.')), '[]'))
    into v_report
    from jsonb_each(v_after) as a
    where v_before -> a.key is distinct from a.value;
    notify pgrst, 'reload schema';
  end if;
  perform ducto_private.apply_grants({{grant_to}}, {{grant_admin_to}}, {{grant_read_to}}, {{revoke_from}});

  perform set_config('ducto_pg.report', v_report::text, true);
  perform set_config(s.key, s.value, true)
  from jsonb_each_text(v_settings) as s;
  perform set_config('search_path', v_path, true);
end
$ducto_pg$;

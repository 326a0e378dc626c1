-- The roles around ducto_pg, under the names that PostgREST's users and Supabase know. Run by the superuser at each
-- start, with the two passwords in the settings docker.ducto_owner and docker.authenticator.
do $$
declare
  v_role text;
begin
  -- Whose token it is: nobody's, an end user's, the server side's.
  foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
    if not exists (select from pg_roles as r where r.rolname = v_role) then
      execute format('create role %I nologin', v_role);
    end if;
  end loop;

  -- The owner installs; PostgREST connects as authenticator, which may nothing but become one of the three.
  foreach v_role in array array['ducto_owner', 'authenticator'] loop
    if not exists (select from pg_roles as r where r.rolname = v_role) then
      execute format('create role %I login noinherit', v_role);
    end if;
    execute format('alter role %I password %L', v_role, current_setting('docker.' || v_role));
  end loop;

  execute format('alter database %I owner to ducto_owner', current_database());
end
$$;

grant anon, authenticated, service_role to authenticator;

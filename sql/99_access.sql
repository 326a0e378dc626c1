-- Who may call what. The rules go by names, so that a new function falls under them without being listed.

-- The audiences of an RPC: `call` uses credits, `admin` gives them and sets terms, `own` is the end user's own.
create or replace function ducto_private.audiences(p_function name) returns text[]
language plpgsql immutable parallel safe
as $$
begin
  return case
    when p_function = 'erase_user' then '{}'::text[]
    when starts_with(p_function::text, 'my_') then '{own}'
    when p_function::text ~ '^((get|list|check|explain)_.*|reserve.*|deduct.*|calculate_cost|read_usage|version|extend_reservation|release_reservation|refund_credits|spend_by_user|spend_by_model|spend_by_label|spend_margin|daily_spend|aggregate_stats|top_users)$'
      then '{call,admin}'
    else '{admin}'
  end;
end
$$;

-- Brings the privileges on our three schemas to what they shall be and changes nothing that already is so: rights of
-- PUBLIC, anon and authenticated that no rule gives go, on ducto_private those of everybody but the owner. Roles given
-- here are remembered and get what is new or was lost at each later run, until p_revoke_from. A role that was dropped is
-- forgotten, also where another has its name by now; in a copy of this database in another cluster, names decide.
-- Answers what it changed.
create or replace function ducto_private.apply_grants(
  p_grant_to text[] default '{}', p_grant_admin_to text[] default '{}', p_grant_read_to text[] default '{}',
  p_revoke_from text[] default '{}') returns text[]
language plpgsql volatile
as $$
declare
  v_system constant bigint := (select s.system_identifier from pg_control_system() as s);
  v_role text;
  v_statement text;
  v_changes text[];
begin
  foreach v_role in array p_grant_to || p_grant_admin_to || p_grant_read_to loop
    if v_role in ('anon', 'authenticated') then
      raise exception 'role % stands for end users: it is never granted more than ducto.my_*', v_role
        using errcode = '22023', hint = 'Grant to the role of your server side.';
    elsif not exists (select from pg_roles as r where r.rolname = v_role) then
      raise exception 'role "%" does not exist', v_role
        using errcode = '42704', hint = 'Create it first: setup creates no role.';
    end if;
  end loop;
  foreach v_role in array p_revoke_from loop
    if not exists (select from pg_roles as r where r.rolname = v_role)
      and not exists (select from ducto_private.grants as g where g.role_name = v_role)
    then
      raise exception 'role "%" does not exist: it has no rights to lose', v_role
        using errcode = '42704', hint = 'Check its spelling; a role that was dropped needs no revoking.';
    end if;
  end loop;

  delete from ducto_private.grants as g
  where g.role_name = any (p_revoke_from) or (g.kind = 'none' and g.role_name = any (p_grant_to || p_grant_admin_to));
  with gone as (
    delete from ducto_private.grants as g
    where not exists (
      select from pg_roles as r
      where r.rolname = g.role_name and (r.oid = g.role_id or g.system_id <> v_system))
    returning g.role_name
  )
  select coalesce(array_agg(distinct format('role %I, which was dropped: forgotten', g.role_name)), '{}')
  into v_changes
  from gone as g;
  update ducto_private.grants as g
  set role_id = r.oid, system_id = v_system
  from pg_roles as r
  where r.rolname = g.role_name and g.system_id <> v_system;
  insert into ducto_private.grants (role_name, kind, role_id, system_id)
  select w.role_name, w.kind, r.oid, v_system
  from (
    select unnest(p_grant_to) as role_name, 'call' as kind
    union select unnest(p_grant_admin_to), 'admin'
    union select unnest(p_grant_read_to), 'read'
    union select unnest(p_revoke_from), 'none'
  ) as w
  join pg_roles as r on r.rolname = w.role_name
  where w.kind <> 'none' or w.role_name in ('service_role', 'authenticated') and w.role_name <> all (p_grant_to || p_grant_admin_to)
  on conflict do nothing;

  for v_statement in
    with roles as (
      select r.oid, g.kind
      from ducto_private.grants as g
      join pg_roles as r on r.rolname = g.role_name
      union
      select r.oid, w.kind
      from (values ('service_role', 'admin'), ('authenticated', 'own')) as w (role_name, kind)
      join pg_roles as r on r.rolname = w.role_name
      where not exists (select from ducto_private.grants as g where g.role_name = w.role_name and g.kind = 'none')
    ),
    objects as (
      select n.nspname as schema, 'schema' as type, quote_ident(n.nspname) as name, n.nspowner as owner,
        coalesce(n.nspacl, acldefault('n', n.nspowner)) as acl, 'USAGE' as privilege,
        case n.nspname when 'ducto' then '{call,admin,own}' when 'ducto_read' then '{read}' else '{}' end::text[] as audiences
      from pg_namespace as n
      where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
      union all
      select n.nspname, 'routine', p.oid::regprocedure::text, p.proowner,
        coalesce(p.proacl, acldefault('f', p.proowner)), 'EXECUTE',
        case n.nspname when 'ducto' then ducto_private.audiences(p.proname) else '{}' end
      from pg_proc as p
      join pg_namespace as n on n.oid = p.pronamespace
      where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
      union all
      select n.nspname, case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass::text, c.relowner,
        coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner)), 'SELECT',
        case when n.nspname = 'ducto_read' and c.relkind = 'v' then '{read}' else '{}' end::text[]
      from pg_class as c
      join pg_namespace as n on n.oid = c.relnamespace
      where n.nspname in ('ducto', 'ducto_private', 'ducto_read') and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
    ),
    wanted as (
      select distinct o.type, o.name, o.privilege, r.oid as role
      from objects as o
      join roles as r on r.kind = any (o.audiences)
      where r.oid <> o.owner
    ),
    held as (
      select o.schema, o.type, o.name, a.privilege_type as privilege, a.grantee as role
      from objects as o
      cross join aclexplode(o.acl) as a
      where a.grantee <> o.owner
    ),
    changes as (
      select 1 as step, h.type, h.name, h.privilege, h.role
      from held as h
      left join pg_roles as r on r.oid = h.role
      where (h.role = 0 or h.schema = 'ducto_private' or r.rolname in ('anon', 'authenticated') or r.rolname = any (p_revoke_from))
        and not exists (
          select from wanted as w
          where w.type = h.type and w.name = h.name and w.privilege = h.privilege and w.role = h.role)
      union all
      select 2, w.type, w.name, w.privilege, w.role
      from wanted as w
      where not exists (
        select from held as h
        where h.type = w.type and h.name = w.name and h.privilege = w.privilege and h.role = w.role)
    )
    select format(case c.step when 1 then 'revoke %s on %s %s from %s' else 'grant %s on %s %s to %s' end,
      c.privilege, c.type, string_agg(c.name, ', ' order by c.name),
      case c.role when 0 then 'public' else quote_ident(pg_get_userbyid(c.role)) end)
    from changes as c
    group by c.step, c.privilege, c.type, c.role
    order by c.step, c.type, c.privilege, c.role
  loop
    execute v_statement || case when starts_with(v_statement, 'revoke') then ' cascade' else '' end;
    v_changes := v_changes || v_statement;
  end loop;
  return v_changes;
end
$$;
comment on function ducto_private.apply_grants is
  'Grants and revokes the rights on ducto and ducto_read by role; setup() calls it last. Without arguments it applies what is remembered.';

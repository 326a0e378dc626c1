-- What the catalog says about the objects that are ours, against what setup() remembers to have made.

-- Every object in our three schemas. Not in it: rights, which apply_grants() brings to what they shall be, and the functions of
-- formulas, which formula_drift() compares with their rows (of evaluate() there is the name, so that an overload of it is seen).
create or replace function ducto_private.catalog() returns setof ducto_private.objects
language sql stable
set quote_all_identifiers = off
as $$
  with schemas as (
    select n.oid, n.nspname
    from pg_namespace as n
    where n.nspname in ('ducto', 'ducto_private', 'ducto_read')
  ), relations as (
    select c.oid, c.oid::regclass::text as name, c.relkind, c.relpersistence, c.reloptions
    from schemas as s
    join pg_class as c on c.relnamespace = s.oid
  ), columns as (
    select a.attrelid, a.attnum, a.attnotnull, a.attidentity, a.attgenerated, r.name as relation, r.relkind,
      quote_ident(a.attname) as name,
      format_type(a.atttypid, a.atttypmod)
        || case when a.attcollation <> t.typcollation then ' collate ' || a.attcollation::regcollation else '' end as type
    from relations as r
    join pg_attribute as a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
    join pg_type as t on t.oid = a.atttypid
    where r.relkind in ('r', 'p', 'c')
  )
  select 'schema', quote_ident(s.nspname), format('create schema %I', s.nspname)
  from schemas as s
  union all
  select 'type', r.name, format('create type %s as (%s)', r.name, (
    select string_agg(c.name || ' ' || c.type, ', ' order by c.attnum) from columns as c where c.attrelid = r.oid))
  from relations as r
  where r.relkind = 'c'
  union all
  select 'table', r.name, concat(r.relkind, r.relpersistence)
  from relations as r
  where r.relkind in ('r', 'p', 'f', 'm', 'S')
  union all
  -- Both change what our own statements see of a table.
  select 'row security', r.name, 'forced'
  from relations as r
  join pg_class as c on c.oid = r.oid
  where c.relrowsecurity and c.relforcerowsecurity
  union all
  select 'child table', format('%s of %s', i.inhrelid::regclass, r.name), 'inherits'
  from relations as r
  join pg_inherits as i on i.inhparent = r.oid
  where r.relkind = 'r'
  union all
  select 'column', c.relation || '.' || c.name, concat(c.type, c.attidentity, c.attgenerated)
  from columns as c
  where c.relkind <> 'c'
  union all
  select 'not null', c.relation || '.' || c.name, format('alter table %s alter column %s set not null', c.relation, c.name)
  from columns as c
  where c.relkind <> 'c' and c.attnotnull
  union all
  select 'default', c.relation || '.' || c.name,
    format('alter table %s alter column %s set default %s', c.relation, c.name, pg_get_expr(d.adbin, d.adrelid))
  from columns as c
  join pg_attrdef as d on d.adrelid = c.attrelid and d.adnum = c.attnum
  union all
  select 'constraint', format('%I on %s', k.conname, r.name),
    format('alter table %s add constraint %I %s', r.name, k.conname, pg_get_constraintdef(k.oid))
      || case when exists (select from pg_trigger as t where t.tgconstraint = k.oid and t.tgenabled <> 'O')
        then ' -- not enforced' else '' end
  from relations as r
  join pg_constraint as k on k.conrelid = r.oid
  where k.contype in ('p', 'u', 'f', 'c', 'x')
  union all
  select 'index', r.name, pg_get_indexdef(r.oid) || case when i.indisvalid then '' else ' -- invalid' end
  from relations as r
  join pg_index as i on i.indexrelid = r.oid
  where not exists (select from pg_constraint as k where k.conindid = r.oid and k.contype in ('p', 'u', 'x'))
  union all
  select 'view', r.name, format('create or replace view %s %s as %s', r.name,
    'with (' || array_to_string(r.reloptions, ', ') || ')', pg_get_viewdef(r.oid))
  from relations as r
  where r.relkind = 'v'
  union all
  select 'rule', format('%I on %s', w.rulename, r.name), pg_get_ruledef(w.oid)
  from relations as r
  join pg_rewrite as w on w.ev_class = r.oid and w.rulename <> '_RETURN'
  union all
  select 'trigger', format('%I on %s', t.tgname, r.name), pg_get_triggerdef(t.oid)
    || case t.tgenabled when 'O' then '' else ' -- disabled, or enabled otherwise' end
  from relations as r
  join pg_trigger as t on t.tgrelid = r.oid and not t.tgisinternal
  union all
  select 'function', p.oid::regprocedure::text, case
    when p.oid = to_regprocedure('ducto_private.evaluate(bigint, jsonb, numeric[])') then ''
    when p.prokind = 'a' then 'aggregate'
    else pg_get_functiondef(p.oid) end
  from schemas as s
  join pg_proc as p on p.pronamespace = s.oid
  where not (s.nspname = 'ducto_private' and p.proname ~ '^formula_[0-9a-f]{16}$'
    and oidvectortypes(p.proargtypes) = 'jsonb, numeric[]')
  union all
  select 'comment', o.name, format('comment on %s is %L', o.name, d.description)
  from pg_description as d
  join (
    select 'pg_namespace'::regclass as class, s.oid, 0 as part, format('schema %I', s.nspname) as name
    from schemas as s
    union all
    select 'pg_proc'::regclass, p.oid, 0, 'function ' || p.oid::regprocedure
    from schemas as s
    join pg_proc as p on p.pronamespace = s.oid and p.prokind = 'f'
    union all
    select 'pg_type'::regclass, t.oid, 0, 'type ' || r.name
    from relations as r
    join pg_type as t on t.typrelid = r.oid
    where r.relkind = 'c'
    union all
    select 'pg_class'::regclass, r.oid, 0, case r.relkind when 'v' then 'view ' else 'table ' end || r.name
    from relations as r
    where r.relkind in ('r', 'v')
    union all
    select 'pg_class'::regclass, c.attrelid, c.attnum, format('column %s.%s', c.relation, c.name)
    from columns as c
    where c.relkind = 'r'
  ) as o on o.class = d.classoid and o.oid = d.objoid and o.part = d.objsubid
$$;

-- How the catalog differs from what setup() remembers. Other major versions may write the same definition otherwise, so that
-- there only presence is compared. An operator's own comments, and indexes that forbid nothing, are no difference. A ghost
-- is a function with the name of one of ours and other arguments: calls may find it, or be ambiguous.
create or replace function ducto_private.drift() returns setof ducto_private.difference
language sql stable
as $$
  select coalesce(o.kind, c.kind), coalesce(o.name, c.name), o.definition, c.definition,
    o.name is null and c.kind = 'function' and exists (
      select from ducto_private.objects as k
      where k.kind = 'function' and split_part(k.name, '(', 1) = split_part(c.name, '(', 1))
  from ducto_private.objects as o
  full join ducto_private.catalog() as c on c.kind = o.kind and c.name = o.name
  where c.name is null
    or o.name is null and c.kind <> 'comment' and (c.kind <> 'index' or starts_with(c.definition, 'CREATE UNIQUE'))
    or o.definition <> c.definition and (
      select i.major from ducto_private.installation as i) = current_setting('server_version_num')::integer / 10000
$$;

-- Remembers what there is, but for p_foreign (kind and name), which somebody else made.
create or replace function ducto_private.store_objects(p_foreign text[] default '{}') returns void
language plpgsql volatile
as $$
begin
  delete from ducto_private.objects;
  insert into ducto_private.objects (kind, name, definition)
  select c.kind, c.name, c.definition
  from ducto_private.catalog() as c
  where c.kind || ' ' || c.name <> all (p_foreign);
end
$$;

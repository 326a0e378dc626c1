-- What setup() remembers: which files made this database what it is, and who may call.

do $$
declare
  v_schema text;
begin
  foreach v_schema in array array['ducto', 'ducto_private', 'ducto_read'] loop
    -- `if not exists` asks for the right to create even where there is nothing to create.
    if to_regnamespace(v_schema) is null then
      execute format('create schema %I', v_schema);
    end if;
  end loop;
end
$$;

create table ducto_private.schema_migrations (
  name text collate "C" primary key,
  checksum text not null,
  applied_at timestamptz not null default clock_timestamp(),
  applied_by text not null default session_user
);
comment on table ducto_private.schema_migrations is 'The files of migrations/ that have run here, each once, with the sha256 of its text.';

create table ducto_private.installation (
  only_row boolean primary key default true check (only_row),
  version text not null,
  contents text not null,
  major integer not null,
  installed_at timestamptz not null default clock_timestamp(),
  installed_by text not null default session_user
);
comment on table ducto_private.installation is 'The version that wrote this database last, the sha256 of all it wrote, and the server''s major version then.';

create table ducto_private.objects (
  kind text collate "C" not null,
  name text collate "C" not null,
  definition text not null,
  primary key (kind, name)
);
comment on table ducto_private.objects is
  'Every object that setup() made, as it was then. A definition is the statement that makes it again, but for tables and columns.';

-- Where the catalog and ducto_private.objects differ: expected is null for what is not ours, actual for what is missing.
create type ducto_private.difference as (
  kind text,
  name text,
  expected text,
  actual text,
  ghost boolean
);

create table ducto_private.grants (
  role_name text collate "C" not null,
  kind text not null check (kind in ('call', 'admin', 'read', 'none')),
  role_id oid not null,
  system_id bigint not null,
  primary key (role_name, kind)
);
comment on table ducto_private.grants is
  'The roles that setup() was told to grant to; `none` keeps service_role or authenticated from its automatic rights.';
comment on column ducto_private.grants.role_id is
  'The role that had this name in the cluster system_id: another one that was given its name later inherits no rights.';

-- What end users may ask about themselves: PostgREST says who they are.

create or replace function ducto_private.own_id() returns text
language plpgsql stable
as $$
declare
  v_claims jsonb;
begin
  begin
    v_claims := current_setting('request.jwt.claims', true)::jsonb;
  exception when others then
    null;
  end;
  if jsonb_typeof(v_claims -> 'sub') = 'string' and ducto_private.is_text(v_claims ->> 'sub') then
    return v_claims ->> 'sub';
  end if;
  raise exception 'nobody is signed in: request.jwt.claims names no account as sub'
    using errcode = '42501', hint = 'Call it through PostgREST with a token whose sub is the account''s id.';
end
$$;

create or replace function ducto.my_balance() returns ducto.balance_result
language sql stable
as $$
  select b.*
  from ducto.get_balance(ducto_private.own_id()) as b
$$;
comment on function ducto.my_balance is 'The balance of the end user that is signed in.';

create or replace function ducto.my_transactions(p_limit integer default 50, p_before bigint default null)
returns setof ducto.transaction
language sql stable
as $$
  select t.*
  from ducto.list_transactions(ducto_private.own_id(), p_limit, p_before) as t
$$;
comment on function ducto.my_transactions is 'The ledger of the end user that is signed in, newest first; p_before is the last seq seen.';

create or replace function ducto.my_plan() returns ducto.get_user_plan_result
language sql stable
as $$
  select p.*
  from ducto.get_user_plan(ducto_private.own_id()) as p
$$;
comment on function ducto.my_plan is 'The plan of the end user that is signed in, and what is left of its allowance.';

create or replace function ducto.my_statement(p_start timestamptz, p_end timestamptz) returns ducto.statement
language sql stable
as $$
  select s.*
  from ducto.get_statement(ducto_private.own_id(), p_start, p_end) as s
$$;
comment on function ducto.my_statement is 'What became of the credits of the end user that is signed in, in [p_start, p_end).';

create or replace function ducto.my_daily_spend(p_start timestamptz, p_end timestamptz) returns setof ducto.daily_spend_row
language sql stable
as $$
  select d.*
  from ducto.daily_spend(p_start, p_end, ducto_private.own_id()) as d
$$;
comment on function ducto.my_daily_spend is
  'What the end user that is signed in spent on each local day in [p_start, p_end), in teams too.';

-- Statistics over all accounts or of one: exact at any moment, with rollups or without.
--
-- An account's rows are numbered without gaps and committed in that order, because whoever writes one holds the account
-- until then. So a rollup need only remember the last number that it has counted of each account: nothing that a running
-- transaction may still commit comes before it, however long it takes and whatever its clock says. What was not yet
-- counted, and days that a window cuts, are read from the ledger; and so is all of one user, whose rows are few.

-- What each row of the ledger adds to statistics. A refund counts when it is made, for the user and model of its charge. One
-- of a removal, which answers lifetime_purchased, counts nothing.
create or replace view ducto_private.usage as
select t.account_id, t.type = 'usage' or t.type = 'refund' and (
    select d.lifetime_purchased
    from ducto_private.transaction_details as d
    where d.transaction_id = t.transaction_id and d.account_id = t.account_id) is null as counts, t.seq, t.created_at, coalesce(t.member_id, t.account_id) as user_id,
  coalesce(t.resolved_model, t.model, '') collate "C" as model,
  case t.type when 'usage' then -t.amount else 0 end as spend,
  case t.type when 'usage' then 1 else 0 end as charges,
  case t.type when 'usage' then t.allowance_used else 0 end as allowance_used,
  case t.type when 'refund' then t.amount else 0 end as refunded,
  case t.type when 'usage' then t.cost else 0 end as cost, t.labels
from ducto_private.transactions as t;

-- The nearest local day that begins at p_at or after it (p_step 1), or at p_at or before it (-1). Days are passed over after
-- whose first instant the date before comes once more, because a clock is put back across midnight.
create or replace function ducto_private.nearest_day(p_at timestamptz, p_step integer, p_zone text) returns date
language plpgsql stable
as $$
begin
  return (
    select d.day
    from generate_series(0, 3) as g (steps)
    cross join lateral (select (p_at at time zone p_zone)::date + p_step * g.steps) as d (day)
    cross join lateral (select ducto_private.first_instant(d.day, p_zone)) as f (at)
    where case p_step when 1 then f.at >= p_at else f.at <= p_at end
      and not exists (
        select
        from (values (interval '30 minutes'), (interval '1 hour'), (interval '2 hours')) as o (shift)
        where ((f.at + o.shift) at time zone p_zone)::date < d.day)
    order by g.steps
    limit 1);
end
$$;

-- The time of the last row that the rollups have counted. Null where so many are not counted that reading the whole ledger
-- beats looking them up account by account; an estimate of its length is enough for that.
create or replace function ducto_private.counted_until() returns timestamptz
language plpgsql stable
as $$
begin
  return (
    select s.changed_at
    from ducto_private.rollup_state as s
    join pg_class as c on c.oid = 'ducto_private.transactions'::regclass
    where c.reltuples::bigint * 9 <= s.counted * 10);
end
$$;

create or replace function ducto_private.usage_span(p_start timestamptz, p_end timestamptz, p_user_id text default null)
returns ducto_private.usage_span
language plpgsql stable
as $$
declare
  v_counted timestamptz := ducto_private.counted_until();
  v_span ducto_private.usage_span;
begin
  if p_end < p_start then
    perform ducto_private.invalid('p_end lies before p_start', 'A window is [p_start, p_end); null leaves an end open.',
      format('p_start is %s, p_end is %s.', p_start, p_end));
  end if;
  -- What lies beyond all calendars is open.
  v_span.starts := case when p_start >= '9999-01-01 00:00Z' then 'infinity'
    when p_start >= '0001-01-01 00:00Z' then p_start else '-infinity' end;
  v_span.ends := case when p_end < '0001-01-01 00:00Z' then '-infinity'
    when p_end < '9999-01-01 00:00Z' then p_end else 'infinity' end;
  v_span.zone := coalesce(ducto_private.ledger_zone(), 'UTC');
  if p_user_id is not null then
    perform ducto_private.check_text(p_user_id, 'p_user_id');
    v_span.user_id := p_user_id;
    -- Without days nothing is read but usage_of_one().
    return v_span;
  end if;
  v_span.first_day := ducto_private.nearest_day(v_span.starts, 1, v_span.zone);
  v_span.days_start := ducto_private.first_instant(v_span.first_day, v_span.zone);
  if v_span.ends > v_counted then
    v_span.end_day := 'infinity';
    v_span.days_end := v_span.ends;
  else
    v_span.end_day := ducto_private.nearest_day(v_span.ends, -1, v_span.zone);
    v_span.days_end := ducto_private.first_instant(v_span.end_day, v_span.zone);
  end if;
  if (v_counted is not null and v_span.days_start < v_span.days_end) is not true then
    v_span.end_day := v_span.first_day;
    v_span.days_start := v_span.ends;
    v_span.days_end := v_span.ends;
  end if;
  return v_span;
end
$$;

-- The charges and refunds not yet counted, of all accounts that may have such from before p_before. A loop, lest the
-- planner join the whole ledger to find a few rows of each account.
create or replace function ducto_private.uncounted(p_before timestamptz) returns setof ducto_private.usage
language plpgsql stable rows 100
as $$
declare
  v_account record;
begin
  for v_account in
    select a.account_id, a.seq, coalesce(r.seq, 0) as counted
    from ducto_private.accounts as a
    left join ducto_private.rollup_accounts as r on r.account_id = a.account_id
    where a.seq > coalesce(r.seq, 0) and coalesce(r.changed_at < p_before, true)
  loop
    return query
    select u.*
    from ducto_private.usage as u
    where u.account_id = v_account.account_id and u.seq > v_account.counted and u.seq <= v_account.seq and u.counts;
  end loop;
end
$$;

-- The charges and refunds in a span of one account, and of one user as a member of teams.
create or replace function ducto_private.usage_of_one(p_span ducto_private.usage_span) returns setof ducto_private.usage
language plpgsql stable
as $$
declare
  v_account_id text;
  v_after bigint;
  v_upto bigint;
begin
  for v_account_id in
    select p_span.user_id
    union
    select m.account_id
    from ducto_private.team_members as m
    where m.user_id = p_span.user_id
  loop
    v_after := ducto_private.seq_at(v_account_id, p_span.starts, true);
    v_upto := ducto_private.seq_at(v_account_id, p_span.ends, true);
    return query
    select u.*
    from ducto_private.usage as u
    where u.account_id = v_account_id and u.seq > v_after and u.seq <= v_upto and u.counts
      and p_span.user_id in (u.account_id, u.user_id);
  end loop;
end
$$;

-- What was used in a span, in partial sums by user or by model (p_by) and, if p_daily, by local day.
create or replace function ducto_private.usage_of(p_by text, p_daily boolean, p_span ducto_private.usage_span)
returns setof ducto_private.usage_sums
language plpgsql stable
as $$
begin
  return query
  select r.day, r.name, r.spend, r.charges, r.allowance_used, r.refunded, r.cost
  from ducto_private.rollups as r
  where r.kind = p_by and r.day >= (p_span).first_day and r.day < (p_span).end_day
  union all
  select case when p_daily then (u.created_at at time zone (p_span).zone)::date end,
    case p_by when 'user' then u.user_id else u.model end,
    sum(u.spend), sum(u.charges), sum(u.allowance_used), sum(u.refunded), sum(u.cost)
  from (
    select u.*
    from ducto_private.usage as u
    where (p_span).starts < (p_span).days_start and u.counts
      and u.created_at >= (p_span).starts and u.created_at < (p_span).days_start
    union all
    select u.*
    from ducto_private.usage as u
    where (p_span).days_end < (p_span).ends and u.counts
      and u.created_at >= (p_span).days_end and u.created_at < (p_span).ends
    union all
    select u.*
    from ducto_private.uncounted((p_span).days_end) as u
    where (p_span).days_start < (p_span).days_end
      and u.created_at >= (p_span).days_start and u.created_at < (p_span).days_end
    union all
    select u.*
    from ducto_private.usage_of_one(p_span) as u
    where (p_span).user_id is not null
  ) as u
  group by 1, 2;
end
$$;

create or replace function ducto.spend_by_user(
  p_start timestamptz default null, p_end timestamptz default null, p_user_id text default null)
returns setof ducto.spend_by_user_row
language sql stable
as $$
  select u.name, ducto_private.at_most_bigint(sum(u.spend)), sum(u.charges)::bigint,
    ducto_private.at_most_bigint(sum(u.allowance_used)), ducto_private.at_most_bigint(sum(u.refunded)), sum(u.cost), null::text
  from ducto_private.usage_of('user', false, ducto_private.usage_span(p_start, p_end, p_user_id)) as u
  group by u.name
  order by sum(u.spend) desc, u.name
$$;
comment on function ducto.spend_by_user is
  'What each user and team member spent in [p_start, p_end), most first: credits debited from balances, gross of refunds. '
  'With p_user_id only what that user spent, in teams too; a team''s id selects the charges of its pool.';

create or replace function ducto.spend_by_model(
  p_start timestamptz default null, p_end timestamptz default null, p_user_id text default null)
returns setof ducto.spend_by_model_row
language sql stable
as $$
  select u.name, ducto_private.at_most_bigint(sum(u.spend)), sum(u.charges)::bigint,
    ducto_private.at_most_bigint(sum(u.allowance_used)), ducto_private.at_most_bigint(sum(u.refunded)), sum(u.cost), null::text
  from ducto_private.usage_of('model', false, ducto_private.usage_span(p_start, p_end, p_user_id)) as u
  group by u.name
  order by sum(u.spend) desc, u.name
$$;
comment on function ducto.spend_by_model is
  'What was spent on each model in [p_start, p_end), most first: the model that the price resolved, else as given, else ''''. '
  'p_user_id as in spend_by_user.';

create or replace function ducto.spend_by_label(
  p_start timestamptz default null, p_end timestamptz default null, p_user_id text default null)
returns setof ducto.spend_by_label_row
language sql stable
as $$
  select l.label, ducto_private.at_most_bigint(sum(u.spend)), sum(u.charges)::bigint, null::text
  from ducto_private.usage_span(p_start, p_end, p_user_id) as s
  cross join lateral (
    select o.*
    from ducto_private.usage_of_one(s) as o
    where s.user_id is not null
    union all
    select a.*
    from ducto_private.usage as a
    where s.user_id is null and a.labels is not null and a.created_at >= s.starts and a.created_at < s.ends
  ) as u
  cross join lateral unnest(u.labels) as l (label)
  where u.charges = 1
  group by l.label
  order by sum(u.spend) desc, l.label collate "C"
$$;
comment on function ducto.spend_by_label is
  'What charges that carry each label spent in [p_start, p_end), most first, of all users or as in spend_by_user; a charge with '
  'two labels counts for both.';

create or replace function ducto.daily_spend(
  p_start timestamptz default null, p_end timestamptz default null, p_user_id text default null)
returns setof ducto.daily_spend_row
language sql stable
as $$
  select u.day, ducto_private.at_most_bigint(sum(u.spend)), sum(u.charges)::bigint,
    ducto_private.at_most_bigint(sum(u.allowance_used)), ducto_private.at_most_bigint(sum(u.refunded)), sum(u.cost), null::text
  from ducto_private.usage_of('model', true, ducto_private.usage_span(p_start, p_end, p_user_id)) as u
  group by u.day
  order by u.day
$$;
comment on function ducto.daily_spend is
  'What was spent on each local day that has a charge or a refund in [p_start, p_end), in order. p_user_id as in '
  'spend_by_user.';

create or replace function ducto.top_users(
  p_limit integer default 10, p_start timestamptz default null, p_end timestamptz default null)
returns setof ducto.top_user_row
language plpgsql stable
as $$
begin
  perform ducto_private.check_limit(p_limit, 'spend_by_user answers all.');
  return query
  select u.user_id, u.total_spend, u.allowance_used, u.refunded, u.cost, null::text
  from ducto.spend_by_user(p_start, p_end) as u
  where u.transaction_count > 0
  order by u.total_spend desc, u.user_id collate "C"
  limit coalesce(p_limit, 10);
end
$$;
comment on function ducto.top_users is
  'The users and team members who spent most in [p_start, p_end), of those with a charge; by name where they spent '
  'the same. p_limit is 1 to 1000.';

create or replace function ducto.aggregate_stats(
  p_start timestamptz default null, p_end timestamptz default null, p_user_id text default null)
returns ducto.aggregate_stats_row
language plpgsql stable
as $$
declare
  v_answer ducto.aggregate_stats_row;
begin
  with users as (
    select u.*
    from ducto.spend_by_user(p_start, p_end, p_user_id) as u
  ), models as (
    select m.*
    from ducto_private.usage_of('model', true, ducto_private.usage_span(p_start, p_end, p_user_id)) as m
  )
  select ducto_private.at_most_bigint(coalesce(sum(u.total_spend), 0)),
    count(*) filter (where u.transaction_count > 0),
    ducto_private.at_most_bigint(coalesce(div(sum(u.total_spend), (
      select nullif(count(distinct m.day), 0) from models as m where m.charges > 0)), 0)),
    (select m.name
      from models as m
      where m.name <> ''
      group by m.name
      having sum(m.charges) > 0
      order by sum(m.spend) desc, m.name
      limit 1),
    (select t.user_id
      from users as t
      where t.transaction_count > 0
      order by t.total_spend desc, t.user_id collate "C"
      limit 1),
    ducto_private.at_most_bigint(coalesce(sum(u.allowance_used), 0)), ducto_private.at_most_bigint(coalesce(sum(u.refunded), 0)),
    coalesce(sum(u.cost), 0)
  into v_answer.total_credits_consumed, v_answer.active_users, v_answer.avg_daily_spend, v_answer.top_model, v_answer.top_user,
    v_answer.allowance_used, v_answer.refunded, v_answer.cost
  from users as u;
  return v_answer;
end
$$;
comment on function ducto.aggregate_stats is
  'What was spent in [p_start, p_end) in all and on average on days with a charge, by how many, and on what and by whom most. '
  'p_user_id as in spend_by_user.';

create or replace function ducto.rollup_usage() returns bigint
language plpgsql volatile
as $$
declare
  v_zone text := coalesce(ducto_private.ledger_zone(), 'UTC');
  v_few boolean;
  v_rows bigint;
begin
  perform
  from ducto_private.rollup_state as s
  for update;
  v_few := ducto_private.counted_until() is not null;
  with sums as (
    select case grouping(u.user_id) when 0 then 'user' else 'model' end as kind,
      (u.created_at at time zone v_zone)::date as day,
      case grouping(u.user_id) when 0 then u.user_id else u.model end as name,
      sum(u.spend) as spend, sum(u.charges) as charges, sum(u.allowance_used) as allowance_used, sum(u.refunded) as refunded,
      sum(u.cost) as cost
    from (
      select u.*
      from ducto_private.uncounted('infinity') as u
      where v_few
      union all
      select u.*
      from ducto_private.usage as u
      left join ducto_private.rollup_accounts as r on r.account_id = u.account_id
      where not v_few and u.seq > coalesce(r.seq, 0) and u.counts
    ) as u
    group by grouping sets ((2, u.user_id), (2, u.model))
  ), added as (
    insert into ducto_private.rollups as r (kind, day, name, spend, charges, allowance_used, refunded, cost)
    select s.*
    from sums as s
    on conflict (kind, day, name) do update
    set spend = r.spend + excluded.spend,
      charges = r.charges + excluded.charges,
      allowance_used = r.allowance_used + excluded.allowance_used,
      refunded = r.refunded + excluded.refunded,
      cost = r.cost + excluded.cost
  ), behind as (
    select a.account_id, a.seq, a.changed_at, a.seq - coalesce(r.seq, 0) as rows
    from ducto_private.accounts as a
    left join ducto_private.rollup_accounts as r on r.account_id = a.account_id
    where a.seq > coalesce(r.seq, 0)
  ), counted as (
    insert into ducto_private.rollup_accounts as r (account_id, seq, changed_at)
    select b.account_id, b.seq, b.changed_at
    from behind as b
    on conflict (account_id) do update
    set seq = excluded.seq, changed_at = excluded.changed_at
  ), state as (
    update ducto_private.rollup_state as s
    set counted = s.counted + b.rows, changed_at = greatest(s.changed_at, b.changed_at)
    from (
      select sum(b.rows) as rows, max(b.changed_at) as changed_at
      from behind as b
      having count(*) > 0
    ) as b
  )
  select count(*)
  into v_rows
  from sums;
  return v_rows;
end
$$;
comment on function ducto.rollup_usage is
  'Adds what is new in the ledger to the sums that make statistics fast, and answers how many sums it wrote. Run it at any time or never.';

-- Where the rollups are not the sums of what they have counted.
create or replace function ducto_private.rollup_violations() returns setof ducto.violation
language plpgsql stable
as $$
declare
  v_zone text := coalesce(ducto_private.ledger_zone(), 'UTC');
begin
  return query
  with sums as (
    select (u.created_at at time zone v_zone)::date as day,
      case grouping(u.user_id) when 0 then 'user' else 'model' end as kind,
      case grouping(u.user_id) when 0 then u.user_id else u.model end as name,
      row(sum(u.spend), sum(u.charges), sum(u.allowance_used), sum(u.refunded), sum(u.cost)) as sums
    from ducto_private.usage as u
    join ducto_private.rollup_accounts as r on r.account_id = u.account_id and u.seq <= r.seq
    where u.counts
    group by grouping sets ((1, u.user_id), (1, u.model))
  ), rollups as (
    select r.kind, r.day, r.name, row(r.spend, r.charges, r.allowance_used, r.refunded, r.cost) as sums
    from ducto_private.rollups as r
  )
  select case p.kind when 'user' then p.name end, 'a rollup is the sum of what it has counted', s.sums::text, r.sums::text,
    format('%s of %s %s', p.day, p.kind, p.name), null::text
  from sums as s
  full join rollups as r using (day, kind, name) as p
  where s.sums is distinct from r.sums
  union all
  select r.account_id, 'a rollup counts rows that exist', format('at most %s', coalesce(a.seq, 0)), r.seq::text, null, null
  from ducto_private.rollup_accounts as r
  left join ducto_private.accounts as a on a.account_id = r.account_id
  where r.seq > coalesce(a.seq, 0)
  union all
  select null, 'the rollups know how far they have counted', format('%s, until %s', coalesce(sum(r.seq), 0), max(r.changed_at)),
    format('%s, until %s', s.counted, s.changed_at), null, null
  from ducto_private.rollup_state as s
  left join ducto_private.rollup_accounts as r on true
  group by s.counted, s.changed_at
  having s.counted <> coalesce(sum(r.seq), 0) or s.changed_at is distinct from max(r.changed_at);
end
$$;

-- Views for the owner's own joins; granted by setup(grant_read_to=…) only. security_invoker stays off: a reader has no
-- right on the tables beneath. Time is that of each account: the clock's, but never before the account's last change.

-- What of each lot has expired by now and is not yet recorded: due_lots() as a view, because a view's functions are called by
-- the rights of its reader.
create or replace view ducto_private.expired_lots as
select x.account_id, x.lot_id,
  (x.expired - lag(x.expired, 1, 0::numeric) over (partition by x.account_id order by x.expires_at, x.seq, x.lot_id))::bigint as expired
from (
  select d.*, greatest(0, max(d.unheld) over (partition by d.account_id order by d.expires_at, d.seq, d.lot_id)) as expired
  from (
    select l.*, sum(l.remainder) over (partition by l.account_id order by l.expires_at, l.seq, l.lot_id) - coalesce((
      select sum(h.held)
      from ducto_private.holds as h
      where h.account_id = l.account_id and h.status = 'active' and h.expires_at > n.now and h.created_at < l.expires_at), 0)
      as unheld
    from ducto_private.accounts as a
    cross join lateral (select greatest(clock_timestamp(), a.changed_at)) as n (now)
    join ducto_private.credit_lots as l on l.account_id = a.account_id and l.remainder > 0 and l.expires_at <= n.now
  ) as d
) as x;

create or replace view ducto_read.accounts as
select a.account_id, a.kind,
  a.balance - case when a.lots > 0 and least(a.lots_due_at, case when a.holds > 0 then a.holds_due_at end) <= n.now then (
    select coalesce(sum(e.expired), 0)
    from ducto_private.expired_lots as e
    where e.account_id = a.account_id)::bigint else 0 end as balance,
  case when a.holds > 0 and a.holds_due_at <= n.now then (
    select coalesce(sum(h.held), 0)
    from ducto_private.holds as h
    where h.account_id = a.account_id and h.status = 'active' and h.expires_at > n.now)::bigint else a.held end as held,
  a.carry, a.credit_limit, a.lifetime_purchased, a.plan_id, a.allowance_used, a.allowance_start, a.allowance_end, t.name, a.seq,
  a.revision, a.opened_at, a.changed_at
from ducto_private.accounts as a
cross join lateral (select greatest(clock_timestamp(), a.changed_at)) as n (now)
left join ducto_private.teams as t on t.account_id = a.account_id;
comment on view ducto_read.accounts is 'One row per account, without what has expired of its holds and lots, recorded or not.';

create or replace view ducto_read.transactions as
select t.transaction_id, t.account_id, t.seq, t.type, t.amount, t.balance_after, t.allowance_used, t.allowance_lapsed, t.cost,
  t.carry_after, coalesce(t.rounding, v.rounding) as rounding,
  t.member_id as actor_id, t.model, t.resolved_model, t.usage, t.pricing_version, t.plan_id, t.hold_id as reservation_id, t.refers_to,
  t.idempotency_key, t.paid_amount, t.paid_currency, t.reference, nullif(t.expires_at, 'infinity') as expires_at, t.reason,
  t.metadata, t.created_at, t.occurred_at, t.price_error, t.warnings, t.labels
from ducto_private.ledger as t
left join ducto_private.terms as v on t.type = 'usage' and v.version = t.pricing_version and v.plan_id = '';
comment on view ducto_read.transactions is 'The ledger, one row per change of an account''s credits.';

create or replace view ducto_read.reservations as
select h.hold_id as reservation_id, h.account_id, h.member_id as actor_id,
  case when n.expired then 'expired' else h.status end as status,
  case when n.expired or h.status = 'expired' then 0 else h.held end as amount,
  h.charged, h.operation_type, h.model, h.metrics, h.pricing_version, h.plan_id, h.idempotency_key, h.metadata, h.created_at,
  h.expires_at, case when n.expired then h.expires_at else h.ended_at end as ended_at, h.labels
from ducto_private.holds as h
join ducto_private.accounts as a on a.account_id = h.account_id
cross join lateral (select h.status = 'active' and h.expires_at <= greatest(clock_timestamp(), a.changed_at)) as n (expired);
comment on view ducto_read.reservations is 'One row per hold.';

create or replace view ducto_read.lots as
select l.lot_id, l.account_id, l.transaction_id, l.amount,
  l.remainder - case when l.remainder > 0 and l.expires_at <= greatest(clock_timestamp(), a.changed_at) then (
    select coalesce(sum(e.expired), 0)
    from ducto_private.expired_lots as e
    where e.account_id = l.account_id and e.lot_id = l.lot_id)::bigint else 0 end as remainder,
  nullif(l.expires_at, 'infinity') as expires_at, l.created_at
from ducto_private.credit_lots as l
join ducto_private.accounts as a on a.account_id = l.account_id;
comment on view ducto_read.lots is 'Credits that expire, or whose grant kept a lot (expires_at null): what was left of a grant once a debt was paid, and what is left of it now.';

create or replace function ducto.version() returns text
language sql immutable
as $$ select '{{version}}'::text $$;
comment on function ducto.version is 'The version of ducto_pg that installed this database.';

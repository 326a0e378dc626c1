-- Views for the owner's own joins; granted by setup(grant_read_to=…) only. security_invoker stays off: a reader has no
-- right on the tables beneath.

-- What of each lot has expired by now and is not yet recorded: due_lots() as a view, because a view's functions are called by
-- the rights of its reader.
create or replace view ducto_private.expired_lots as
select x.account_id, x.lot_id,
  (x.expired - lag(x.expired, 1, 0::numeric) over (partition by x.account_id order by x.expires_at, x.seq))::bigint as expired
from (
  select d.*, greatest(0, max(d.unheld) over (partition by d.account_id order by d.expires_at, d.seq)) as expired
  from (
    select l.*, sum(l.remainder) over (partition by l.account_id order by l.expires_at, l.seq) - coalesce((
      select sum(r.held)
      from ducto_private.holds as r
      where r.account_id = l.account_id and r.status = 'active' and r.expires_at > clock_timestamp() and r.created_at < l.expires_at), 0)
      as unheld
    from ducto_private.credit_lots as l
    where l.remainder > 0 and l.expires_at <= clock_timestamp()
  ) as d
) as x;

create or replace view ducto_read.accounts as
select a.account_id, a.kind,
  a.balance - case when a.lots > 0 and least(a.lots_due_at, case when a.holds > 0 then a.holds_due_at end) <= clock_timestamp()
    then (
    select coalesce(sum(e.expired), 0) from ducto_private.expired_lots as e where e.account_id = a.account_id)::bigint else 0 end
    as balance,
  case when a.holds > 0 and a.holds_due_at <= clock_timestamp() then (
    select coalesce(sum(r.held), 0)
    from ducto_private.holds as r
    where r.account_id = a.account_id and r.status = 'active' and r.expires_at > clock_timestamp())::bigint else a.held end as held,
  a.carry, a.credit_limit, a.lifetime_purchased, a.plan_id, a.allowance_used, a.allowance_start, a.allowance_end, t.name, a.seq,
  a.revision, a.opened_at, a.changed_at
from ducto_private.accounts as a
left join ducto_private.teams as t on t.account_id = a.account_id;
comment on view ducto_read.accounts is 'One row per account, without what has expired of its holds and lots, recorded or not.';

create or replace view ducto_read.transactions as
select t.transaction_id, t.account_id, t.seq, t.type, t.amount, t.balance_after, t.allowance_used, t.allowance_lapsed, t.cost,
  t.carry_after, v.rounding,
  t.member_id as actor_id, t.model, t.resolved_model, t.usage, t.pricing_version, t.plan_id, t.hold_id as reservation_id, t.refers_to,
  t.idempotency_key, t.paid_amount, t.paid_currency, t.reference, t.expires_at, t.reason, t.metadata, t.created_at, t.occurred_at
from ducto_private.ledger as t
left join ducto_private.terms as v on t.type = 'usage' and v.version = t.pricing_version and v.plan_id = '';
comment on view ducto_read.transactions is 'The ledger, one row per change of an account''s credits.';

create or replace view ducto_read.reservations as
select r.hold_id as reservation_id, r.account_id, r.member_id as actor_id,
  case when r.status = 'active' and r.expires_at <= clock_timestamp() then 'expired' else r.status end as status,
  case when r.status = 'active' and r.expires_at > clock_timestamp() then r.held else 0 end as amount,
  r.charged, r.operation_type, r.model, r.metrics, r.pricing_version, r.plan_id, r.idempotency_key, r.metadata, r.created_at,
  r.expires_at, case when r.status = 'active' and r.expires_at <= clock_timestamp() then r.expires_at else r.ended_at end as ended_at
from ducto_private.holds as r;
comment on view ducto_read.reservations is 'One row per hold.';

create or replace view ducto_read.lots as
select l.lot_id, l.account_id, l.transaction_id, l.amount,
  l.remainder - case when l.remainder > 0 and l.expires_at <= clock_timestamp() then (
    select coalesce(sum(e.expired), 0)
    from ducto_private.expired_lots as e
    where e.account_id = l.account_id and e.lot_id = l.lot_id)::bigint else 0 end as remainder,
  l.expires_at, l.created_at
from ducto_private.credit_lots as l;
comment on view ducto_read.lots is 'Credits that expire: what was left of a grant once a debt was paid, and what is left of it now.';

create or replace function ducto.version() returns text
language sql immutable
as $$ select '{{version}}'::text $$;
comment on function ducto.version is 'The version of ducto_pg that installed this database.';

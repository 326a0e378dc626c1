-- The invariants of the ledger, asked of the data itself, and whether the objects are there that keep them.

-- Without the JIT compiler, which would work for seconds on so large a query.
create or replace function ducto.verify_ledger(p_account_id text default null) returns setof ducto.violation
language plpgsql stable
set jit = off
as $$
declare
  v_now constant timestamptz := clock_timestamp();
  v_zone text;
begin
  if p_account_id is null then
    return query
    select null::text, 'catalog', case when d.expected is null then 'none' when d.actual is null then 'there' else 'as setup made it' end,
      case when d.ghost then 'an overload of ours' when d.expected is null then 'not of ours' when d.actual is null then 'missing'
        else 'something else' end,
      d.kind || ' ' || d.name, null::text
    from ducto_private.drift() as d
    order by 5;
    -- What is missing may be needed to look at the rest.
    if exists (select from ducto_private.drift() as d where d.actual is null) then
      return;
    end if;
    return query
    select null::text, 'catalog', 'as its row says', case when to_regprocedure(d.name) is null then 'missing' else 'something else' end,
      'function ' || d.name, null::text
    from ducto_private.formula_drift() as d
    order by 5;
  end if;
  v_zone := ducto_private.ledger_zone();
  return query
  with rows as (
    select t.*,
      coalesce(t.rounding, v.rounding) as rounded,
      coalesce(t.bounded_cost, t.cost) as charged_cost,
      lag(t.seq, 1, 0::bigint) over w as seq_before,
      lag(t.balance_after, 1, 0::bigint) over w as balance_before,
      lag(t.carry_after, 1, 0::numeric) over w as carry_before,
      lag(t.created_at, 1, '-infinity'::timestamptz) over w as time_before,
      lag(t.revision, 1, 0::bigint) over w as revision_before
    from ducto_private.ledger as t
    left join ducto_private.terms as v on v.version = t.pricing_version and v.plan_id = ''
    where p_account_id is null or t.account_id = p_account_id
    window w as (partition by t.account_id order by t.seq)
  ), moved as (
    -- What each side of a merge added to its account beside the balance.
    select m.account_id, m.seq, -m.carry as carry, -m.purchased as purchased
    from ducto_private.merges as m
    union all
    select m.into_id, m.into_seq, m.carry, m.purchased
    from ducto_private.merges as m
  ), purchases as (
    -- A row with what it added to lifetime_purchased: a purchase, the removal of one, or the refund of such a removal.
    select r.*, m.carry as moved_carry, coalesce(m.purchased, case
        when r.type = 'purchase' or (case r.type when 'removal' then g.type when 'refund' then (
          select o.type
          from ducto_private.transaction_details as d
          join ducto_private.transactions as o on o.transaction_id = d.refers_to
          where d.transaction_id = g.transaction_id and d.account_id = g.account_id and g.type = 'removal') end) = 'purchase'
        then r.amount end, 0) as purchased
    from rows as r
    left join moved as m on m.account_id = r.account_id and m.seq = r.seq
    left join ducto_private.transactions as g on r.type in ('removal', 'refund') and g.transaction_id = r.refers_to
  ), totals as (
    select r.account_id,
      sum(r.amount) as amount,
      count(*) as rows,
      max(r.seq) as seq,
      max(r.created_at) as last_at,
      max(r.revision) as revision,
      (array_agg(r.carry_after order by r.seq desc))[1] as carry,
      sum(r.purchased) as purchased
    from purchases as r
    group by r.account_id
  ), holds as (
    select h.account_id, sum(h.held) as held, count(*) as holds, min(h.expires_at) as due_at
    from ducto_private.holds as h
    where h.status = 'active' and (p_account_id is null or h.account_id = p_account_id)
    group by h.account_id
  ), lots as (
    select l.*, a.changed_at,
      coalesce((select sum(e.amount) from ducto_private.lot_entries as e where e.lot_id = l.lot_id and e.account_id = l.account_id), 0)
        as entered
    from ducto_private.credit_lots as l
    left join ducto_private.accounts as a on a.account_id = l.account_id
    where p_account_id is null or l.account_id = p_account_id
  ), open_lots as (
    select l.account_id, count(*) as lots, min(l.expires_at) filter (where l.expires_at > l.changed_at) as due_at,
      coalesce(sum(l.remainder) filter (where l.expires_at > l.changed_at), 0) as ahead,
      coalesce(sum(l.remainder) filter (where l.expires_at <= l.changed_at), 0) as kept
    from lots as l
    where l.remainder > 0
    group by l.account_id
  ), accounts as (
    select a.*, t.amount, t.rows, t.seq as last_seq, t.last_at, t.revision as last_revision, t.carry as last_carry, t.purchased,
      coalesce(h.held, 0) as open_held, coalesce(h.holds, 0) as open_holds, h.due_at
    from ducto_private.accounts as a
    left join totals as t on t.account_id = a.account_id
    left join holds as h on h.account_id = a.account_id
    where p_account_id is null or a.account_id = p_account_id
  ), found (account_id, invariant, expected, actual, detail) as (
    select a.account_id, 'balance is the sum of the ledger', coalesce(a.amount, 0)::text, a.balance::text, null
    from accounts as a
    where a.balance <> coalesce(a.amount, 0)
    union all
    select a.account_id, 'the account''s seq is its number of rows', format('%s rows, the last %s', coalesce(a.rows, 0), coalesce(a.rows, 0)),
      format('%s, the last %s', a.seq, coalesce(a.last_seq, 0)), null
    from accounts as a
    where a.seq <> coalesce(a.rows, 0) or a.seq <> coalesce(a.last_seq, 0)
    union all
    select a.account_id, 'carry is that of the last row', coalesce(a.last_carry, 0)::text, a.carry::text, null
    from accounts as a
    where a.carry <> coalesce(a.last_carry, 0)
    union all
    select a.account_id, 'the account was changed no earlier than its last row', a.last_at::text, a.changed_at::text, null
    from accounts as a
    where a.changed_at < a.last_at or a.revision < a.last_revision
    union all
    select a.account_id, 'lifetime_purchased is purchases less their removals', coalesce(a.purchased, 0)::text,
      a.lifetime_purchased::text, null
    from accounts as a
    where a.lifetime_purchased <> coalesce(a.purchased, 0)
    union all
    select a.account_id, 'held is the sum of the open holds', format('%s in %s', a.open_held, a.open_holds),
      format('%s in %s', a.held, a.holds), null
    from accounts as a
    where a.held <> a.open_held or a.holds <> a.open_holds
    union all
    select a.account_id, 'no open hold expires before holds_due_at', a.holds_due_at::text, a.due_at::text, null
    from accounts as a
    where a.open_holds > 0 and (a.holds_due_at is null or a.holds_due_at > a.due_at)
    union all
    select x.account_id, 'every row belongs to an account', 'an account', 'none', format('%s rows of %s', x.rows, x.name)
    from (
      select t.account_id, 'transactions' as name, t.rows from totals as t
      union all select r.account_id, 'holds', count(*) from ducto_private.holds as r group by r.account_id
      union all select k.account_id, 'hold_keys', count(*) from ducto_private.hold_keys as k group by k.account_id
      union all select l.account_id, 'credit_lots', count(*) from lots as l group by l.account_id
      union all select m.account_id, 'merges', count(*) from ducto_private.merges as m group by m.account_id
      union all select c.account_id, 'spend_caps', count(*) from ducto_private.spend_caps as c group by c.account_id
      union all select m.account_id, 'team_members', count(*) from ducto_private.team_members as m group by m.account_id
      union all select t.account_id, 'teams', 1 from ducto_private.teams as t
      union all select s.account_id, 'plan_schedules', 1 from ducto_private.plan_schedules as s
      union all select e.account_id, 'events', count(*) from ducto_private.events as e group by e.account_id
      union all select p.account_id, 'auto_topups', 1 from ducto_private.auto_topups as p
    ) as x
    where (p_account_id is null or x.account_id = p_account_id)
      and not exists (select from ducto_private.accounts as a where a.account_id = x.account_id)
    union all
    select t.account_id, 'every row but a charge''s has details', 'details', 'none', t.transaction_id::text
    from rows as t
    where t.type <> 'usage' and not exists (
      select from ducto_private.transaction_details as d
      where d.transaction_id = t.transaction_id and d.account_id = t.account_id)
    union all
    select t.account_id, 'lifetime_purchased follows the rows', case when t.answers then t.so_far end::text, t.lifetime_purchased::text,
      t.transaction_id::text
    from (
      select r.*, sum(r.purchased) over (partition by r.account_id order by r.seq) as so_far,
        r.type in ('purchase', 'subscription', 'signup_bonus', 'promotion', 'adjustment', 'removal') or r.type = 'refund' and exists (
          select from ducto_private.transactions as o
          where o.transaction_id = r.refers_to and o.type = 'removal') as answers
      from purchases as r
    ) as t
    where t.lifetime_purchased is distinct from case when t.answers then t.so_far end
    union all
    select t.account_id, 'a charge has a published version', 'a version', coalesce(t.pricing_version::text, 'none'),
      t.transaction_id::text
    from rows as t
    where t.type = 'usage' and not exists (
      select from ducto_private.pricing_versions as v
      where v.version = t.pricing_version)
    union all
    select r.account_id, 'a key names one row', '1', count(*)::text, r.idempotency_key
    from rows as r
    where r.idempotency_key is not null
    group by r.account_id, r.idempotency_key
    having count(*) > 1
    union all
    select r.account_id, 'seq has no gap', (r.seq_before + 1)::text, r.seq::text, r.transaction_id::text
    from rows as r
    where r.seq <> r.seq_before + 1
    union all
    select r.account_id, 'balance_after follows from the row before', (r.balance_before + r.amount)::text, r.balance_after::text,
      r.transaction_id::text
    from rows as r
    where r.balance_after <> r.balance_before + r.amount
    union all
    select r.account_id, 'time and revision never run backwards', format('%s, %s', r.time_before, r.revision_before),
      format('%s, %s', r.created_at, r.revision), r.transaction_id::text
    from rows as r
    where r.created_at < r.time_before or r.revision <= r.revision_before
    union all
    select r.account_id, 'labels are a set', 'up to 16 labels, sorted', r.labels::text, r.transaction_id::text
    from (
      select t.account_id, t.labels, t.transaction_id from rows as t
      union all
      select h.account_id, h.labels, h.hold_id
      from ducto_private.holds as h
      where p_account_id is null or h.account_id = p_account_id
    ) as r
    where r.labels is not null and (cardinality(r.labels) not between 1 and 16
      or r.labels <> array(select distinct l.label collate "C" from unnest(r.labels) as l (label) order by 1))
    union all
    select r.account_id, 'a settlement carries its hold''s labels, a refund its charge''s', h.labels::text, coalesce(r.labels::text, 'none'),
      r.transaction_id::text
    from rows as r
    join ducto_private.holds as h on h.hold_id = r.hold_id and h.account_id = r.account_id
    where h.labels is not null and (r.labels @> h.labels) is not true
    union all
    select r.account_id, 'a settlement carries its hold''s labels, a refund its charge''s', c.labels::text, r.labels::text,
      r.transaction_id::text
    from rows as r
    join ducto_private.transactions as c on c.transaction_id = r.refers_to and c.account_id = r.account_id
    where r.type = 'refund' and r.labels is distinct from c.labels
    union all
    select r.account_id, 'charged is the rounded cost', c.charged::text, (r.allowance_used - r.amount)::text, r.transaction_id::text
    from rows as r
    cross join lateral (
      select case r.rounded when 'carry' then floor(r.carry_before + r.charged_cost) when 'up' then ceil(r.charged_cost)
        when 'down' then floor(r.charged_cost) else floor(r.charged_cost + 0.5) end as charged
    ) as c
    where r.type = 'usage' and r.allowance_used - r.amount is distinct from c.charged
    union all
    select r.account_id, 'carry_after is what the charge left over', (case when r.type = 'usage' and r.rounded = 'carry'
        then r.carry_before + r.charged_cost - (r.allowance_used - r.amount)
        else mod(r.carry_before + coalesce(r.moved_carry, 0), 1) end)::text,
      r.carry_after::text, r.transaction_id::text
    from purchases as r
    where r.carry_after <> case when r.type = 'usage' and r.rounded = 'carry'
      then r.carry_before + r.charged_cost - (r.allowance_used - r.amount)
      else mod(r.carry_before + coalesce(r.moved_carry, 0), 1) end
    union all
    select m.account_id, 'a merge moves all that there was',
      format('0 left of %s, %s of it arrived', -f.amount, -f.amount - floor(m.carry + coalesce(b.carry_after, 0))),
      format('%s left of %s, %s of it arrived', f.balance_after, -f.amount, i.amount), f.transaction_id::text
    from ducto_private.merges as m
    left join ducto_private.transactions as f on f.account_id = m.account_id and f.seq = m.seq
    left join ducto_private.transactions as i on i.account_id = m.into_id and i.seq = m.into_seq
    left join ducto_private.transactions as b on b.account_id = m.into_id and b.seq = m.into_seq - 1
    where (p_account_id is null or p_account_id in (m.account_id, m.into_id))
      and (f.balance_after, f.carry_after, i.amount, f.created_at, m.account_id <> m.into_id)
        is distinct from (0, 0, -f.amount - floor(m.carry + coalesce(b.carry_after, 0)), i.created_at, true)
    union all
    select c.account_id, 'refunds stay within the charge', format('at most %s to the balance, %s in all', -c.amount,
        c.allowance_used - c.amount), format('%s to the balance, %s in all', x.amount, x.refunded), c.transaction_id::text
    from (
      select t.refers_to, sum(t.amount) as amount, sum(t.amount - t.allowance_used + t.allowance_lapsed) as refunded
      from rows as t
      where t.type = 'refund'
      group by t.refers_to
    ) as x
    join ducto_private.transactions as c on c.transaction_id = x.refers_to
    where x.amount > -c.amount or x.refunded > c.allowance_used - c.amount or c.type not in ('usage', 'removal')
    union all
    select r.account_id, 'a row refers to a row of its account', 'an earlier row', coalesce(c.seq::text, 'none'),
      r.transaction_id::text
    from rows as r
    left join ducto_private.transactions as c on c.transaction_id = r.refers_to
    where (r.refers_to is not null or r.type = 'refund') and (c.account_id = r.account_id and c.seq < r.seq
      or c.account_id <> r.account_id and r.account_id = any (ducto_private.homes(c.account_id, c.seq))) is not true
    union all
    select r.account_id, 'a settlement belongs to a hold', r.hold_id::text, 'none', r.transaction_id::text
    from rows as r
    where r.hold_id is not null and not exists (
      select from ducto_private.holds as h
      where h.hold_id = r.hold_id and h.account_id = r.account_id)
    union all
    select g.account_id, 'removals and expiry stay within the grant', g.amount::text, x.gone::text, g.transaction_id::text
    from (
      select o.refers_to, -sum(t.amount) as gone
      from rows as t
      join ducto_private.transaction_details as o on o.transaction_id = case t.type when 'refund' then t.refers_to else t.transaction_id end
      join ducto_private.transactions as r on r.transaction_id = o.transaction_id and r.account_id = o.account_id
      where r.type in ('removal', 'expiry') and o.refers_to is not null
      group by o.refers_to
    ) as x
    join ducto_private.transactions as g on g.transaction_id = x.refers_to
    where x.gone > g.amount and g.type <> 'refund'
    union all
    select t.account_id, 'money is paid for grants, and given back with removals', 'at least 0; of a removal at most 0',
      t.paid_amount::text, t.transaction_id::text
    from rows as t
    where t.paid_amount is not null and (t.type in ('usage', 'refund', 'expiry')
      or t.paid_amount <> 0 and (t.paid_amount < 0) <> (t.type = 'removal') or t.paid_amount in ('NaN', 'Infinity', '-Infinity'))
    union all
    select h.account_id, 'a hold is active, expired with what it held last, or ended and holds nothing', 'active or expired, or ended and 0',
      format('%s, %s, ended %s', h.status, h.held, h.ended_at), h.hold_id::text
    from ducto_private.holds as h
    where (p_account_id is null or h.account_id = p_account_id) and (h.status not in ('active', 'expired', 'settled', 'released')
      or (h.status = 'active') <> (h.ended_at is null) or h.status in ('settled', 'released') and h.held <> 0 or h.held < 0 or h.charged < 0
      or h.min_balance < 0)
    union all
    select k.account_id, 'a hold''s key belongs to a hold', k.hold_id::text, 'none', k.idempotency_key
    from ducto_private.hold_keys as k
    where (p_account_id is null or k.account_id = p_account_id) and k.hold_id is not null and not exists (
      select from ducto_private.holds as h
      where h.hold_id = k.hold_id and h.account_id = k.account_id)
    union all
    select h.account_id, 'a hold''s charged and cost are the sums of its settlements',
      format('%s, %s', coalesce(x.charged, 0), coalesce(x.cost, 0)), format('%s, %s', h.charged, h.cost), h.hold_id::text
    from ducto_private.holds as h
    left join (
      select t.account_id, t.hold_id, sum(t.allowance_used - t.amount) as charged, sum(t.charged_cost) as cost
      from rows as t
      where t.hold_id is not null
      group by t.account_id, t.hold_id
    ) as x on x.hold_id = h.hold_id and x.account_id = h.account_id
    where (p_account_id is null or h.account_id = p_account_id)
      and (h.charged <> coalesce(x.charged, 0) or h.cost <> coalesce(x.cost, 0))
    union all
    -- What an expired hold held last bounds credits; a settlement without a price is charged as it was held.
    select h.account_id, 'a bounded hold charges no more than it was given', h.given::text, format('%s for %s', h.charged, h.cost),
      h.hold_id::text
    from ducto_private.holds as h
    join ducto_private.terms as t on t.version = h.pricing_version and t.plan_id = ''
    where (p_account_id is null or h.account_id = p_account_id) and coalesce(h.overrun, t.overrun) = 'bounded'
      and h.cost > h.given and (h.ended_at is distinct from h.expires_at or h.charged > h.given) and not exists (
        select
        from rows as r
        where r.account_id = h.account_id and r.hold_id = h.hold_id and 'priced_by_hold' = any (r.warnings))
    union all
    select r.account_id, 'only a bounded hold''s last settlement charges less than its cost',
      format('less than %s, of a bounded hold', r.cost), r.bounded_cost::text, r.transaction_id::text
    from rows as r
    where r.bounded_cost is not null and (r.bounded_cost >= r.cost or r.bounded_cost < 0 or not exists (
      select
      from ducto_private.holds as h
      join ducto_private.terms as t on t.version = h.pricing_version and t.plan_id = ''
      where h.hold_id = r.hold_id and h.account_id = r.account_id and h.status = 'settled'
        and coalesce(h.overrun, t.overrun) = 'bounded'))
    union all
    select h.account_id, 'a hold holds no more than it was given', format('at most %s', h.given), h.held::text, h.hold_id::text
    from ducto_private.holds as h
    where (p_account_id is null or h.account_id = p_account_id) and (h.held > h.given
      or h.overrun not in ('debt', 'reject', 'bounded'))
    union all
    select a.account_id, 'allowance_used is that of the charges and refunds of its period',
      coalesce(x.used, 0)::text, a.allowance_used::text, null
    from accounts as a
    left join (
      select t.account_id, sum(t.allowance_used) as used
      from rows as t
      join ducto_private.accounts as b on b.account_id = t.account_id
      left join ducto_private.transactions as c on c.transaction_id = t.refers_to and c.account_id = t.account_id
      where t.created_at >= b.allowance_start and t.created_at < b.allowance_end
        and (t.allowance_used > 0 or c.created_at >= b.allowance_start)
      group by t.account_id
    ) as x on x.account_id = a.account_id
    where a.allowance_used <> coalesce(x.used, 0)
    union all
    select a.account_id, 'rolled is what ended periods handed on', 'at least 0', a.rolled::text, null
    from accounts as a
    where a.rolled < 0
    union all
    select a.account_id, 'plan_due_at is the time of a scheduled change', coalesce(s.next_at, s.until_at)::text, a.plan_due_at::text, null
    from accounts as a
    left join ducto_private.plan_schedules as s on s.account_id = a.account_id
    where a.plan_due_at is not null and (a.plan_due_at in (s.next_at, s.until_at)) is not true
    union all
    select a.account_id, 'lots counts the open lots', format('%s, the first due %s', coalesce(l.lots, 0), l.due_at),
      format('%s, the first due %s', a.lots, a.lots_due_at), null
    from accounts as a
    left join open_lots as l on l.account_id = a.account_id
    where a.lots <> coalesce(l.lots, 0) or l.due_at is not null and (a.lots_due_at is null or a.lots_due_at > l.due_at)
    union all
    select a.account_id, 'lots never exceed the balance', format('at most %s', greatest(0, a.balance - l.kept)), l.ahead::text, null
    from accounts as a
    join open_lots as l on l.account_id = a.account_id
    where l.ahead > greatest(0, a.balance - l.kept)
    union all
    select l.account_id, 'a lot''s remainder is its amount and its entries', (l.amount + l.entered)::text, l.remainder::text,
      l.lot_id::text
    from lots as l
    where l.remainder <> l.amount + l.entered
    union all
    select l.account_id, 'a lot belongs to a row that gave its credits', format('at least %s', l.amount), coalesce(t.amount::text, 'none'),
      l.lot_id::text
    from lots as l
    left join ducto_private.transactions as t on t.transaction_id = l.transaction_id and t.account_id = l.account_id
    where greatest(t.amount, 0) < l.amount or l.seq <> t.seq
    union all
    select l.account_id, 'a lot''s grant lives in its account', 'a grant', coalesce(g.account_id, 'none'), l.lot_id::text
    from lots as l
    left join ducto_private.transactions as g on g.transaction_id = l.grant_id
    where l.grant_id <> l.transaction_id and (l.account_id = any (ducto_private.homes(g.account_id, g.seq))) is not true
    union all
    select x.account_id, 'lot entries stay within their row', t.amount::text, x.amount::text, x.transaction_id::text
    from (
      select e.account_id, e.transaction_id, sum(e.amount + e.elsewhere) as amount, sum(e.elsewhere) as elsewhere
      from ducto_private.lot_entries as e
      where p_account_id is null or e.account_id = p_account_id
      group by e.account_id, e.transaction_id
    ) as x
    left join ducto_private.transactions as t on t.transaction_id = x.transaction_id and t.account_id = x.account_id
    where t.amount is null or sign(t.amount) <> sign(x.amount) or abs(x.amount) > abs(t.amount::numeric)
      or t.type = 'expiry' and x.amount <> t.amount
      or t.type <> 'refund' and x.elsewhere > 0
    union all
    select coalesce(x.account_id, l.account_id), 'a refund''s lot is what its entries renewed', coalesce(x.renewed, 0)::text,
      coalesce(l.amount, 0)::text, coalesce(x.transaction_id, l.transaction_id)::text
    from (
      select e.account_id, e.transaction_id, sum(e.renewed) as renewed
      from ducto_private.lot_entries as e
      where e.renewed > 0 and (p_account_id is null or e.account_id = p_account_id)
      group by e.account_id, e.transaction_id
    ) as x
    full join (
      select l.account_id, l.transaction_id, sum(l.amount) as amount
      from lots as l
      join rows as t on t.transaction_id = l.transaction_id and t.account_id = l.account_id and t.type = 'refund'
      group by l.account_id, l.transaction_id
    ) as l on l.transaction_id = x.transaction_id and l.account_id = x.account_id
    where coalesce(x.renewed, 0) <> coalesce(l.amount, 0)
    union all
    select x.account_id, 'lots get back no more than a charge took, last one first', format('at most %s', x.taken),
      x.given::text, x.refers_to::text
    from (
      select c.account_id, c.transaction_id as refers_to, -c.amount as taken, coalesce(r.given, 0) as given,
        coalesce(sum(coalesce(r.given, 0)) over (partition by c.account_id, c.transaction_id
          order by t.type = 'removal' and l.grant_id = t.refers_to desc, l.expires_at, l.seq, l.lot_id
          rows between unbounded preceding and 1 preceding), 0) as earlier
      from ducto_private.lot_entries as c
      join rows as t on t.transaction_id = c.transaction_id and t.account_id = c.account_id and t.type in ('usage', 'removal')
      join ducto_private.credit_lots as l on l.lot_id = c.lot_id and l.account_id = c.account_id
      left join (
        select d.refers_to, l.grant_id, sum(e.amount + e.elsewhere) as given
        from rows as d
        join ducto_private.lot_entries as e on e.transaction_id = d.transaction_id and e.account_id = d.account_id
        join ducto_private.credit_lots as l on l.lot_id = e.lot_id and l.account_id = e.account_id
        where d.type = 'refund'
        group by d.refers_to, l.grant_id
      ) as r on r.refers_to = c.transaction_id and r.grant_id = l.grant_id
    ) as x
    where x.given > x.taken or x.given < x.taken and x.earlier > 0
    union all
    select a.account_id, 'alerts are of amounts of at least 0, and told of 80 or 100 percent', 'at least 0; null, 80 or 100',
      format('low balance %s, refused %s, told %s of %s', a.low_balance, a.refused, a.allowance_told, a.allowance_told_of), null
    from accounts as a
    where a.low_balance < 0 or a.refused < 0 or a.allowance_told not in (80, 100)
      or (a.allowance_told is null) <> (a.allowance_told_of is null)
    union all
    select a.account_id, 'auto_topup says whether there is one', coalesce(p.active, false)::text, a.auto_topup::text, null
    from accounts as a
    left join ducto_private.auto_topups as p on p.account_id = a.account_id
    where a.auto_topup <> coalesce(p.active, false)
    union all
    select p.account_id, 'an open top-up counts in a month, waits for none and is told again',
      'at least 1 in a month, no retry, a time to look', format('%s in %s, retry %s, look %s', p.this_month, p.month, p.retry_at, p.look_at),
      p.due_key
    from ducto_private.auto_topups as p
    where (p_account_id is null or p.account_id = p_account_id)
      and p.due_key is not null and (p.this_month < 1 or p.month is null or p.retry_at is not null or p.look_at is null)
    union all
    select d.account_id, 'a delivery is of an event', d.event_id::text, 'none', d.consumer
    from ducto_private.deliveries as d
    where (p_account_id is null or d.account_id = p_account_id) and not exists (
      select from ducto_private.events as e
      where e.event_id = d.event_id and e.account_id = d.account_id)
    union all
    select a.account_id, 'caps counts the caps', count(c.*)::text, a.caps::text, null
    from accounts as a
    left join ducto_private.spend_caps as c on c.account_id = a.account_id
    group by a.account_id, a.caps
    having a.caps <> count(c.*)
    union all
    select c.account_id, 'a cap has a limit and an action', 'limit and spent of at least 0', format('%s, %s: %s of %s', c.cap_type, c.action,
      c.spent, c.cap_limit), c.subject
    from ducto_private.spend_caps as c
    where (p_account_id is null or c.account_id = p_account_id) and (c.cap_type not in ('daily', 'weekly', 'monthly', 'lifetime')
      or c.action not in ('deny', 'warn', 'notify') or c.cap_limit < 0 or c.spent < 0)
    union all
    select c.account_id, 'a cap''s spent is that of its window', x.spent::text, c.spent::text,
      format('%s cap on %s', c.cap_type, coalesce(nullif(c.subject, ''), 'everything'))
    from accounts as a
    join ducto_private.spend_caps as c on c.account_id = a.account_id
      and c.window_date = ducto_private.window_date(c.cap_type, greatest(v_now, a.changed_at), v_zone)
    cross join lateral ducto_private.window_spent(c.account_id, c.cap_type, c.window_date, v_zone, c.subject, null) as x (spent)
    where c.spent <> x.spent
    union all
    select m.account_id, 'a member''s spent is that of the period', x.spent::text, m.spent::text, m.user_id
    from accounts as a
    join ducto_private.team_members as m on m.account_id = a.account_id
      and m.window_date = ducto_private.window_date(m.spend_cap_period, greatest(v_now, a.changed_at), v_zone)
    cross join lateral ducto_private.window_spent(m.account_id, m.spend_cap_period, m.window_date, v_zone, '', m.user_id) as x (spent)
    where m.spent <> x.spent
    union all
    select coalesce(m.account_id, x.account_id), 'a member''s total_spent is that of the ledger', coalesce(x.spent, 0)::text,
      coalesce(m.total_spent::text, 'no member'), coalesce(m.user_id, x.member_id)
    from (
      select m.*
      from ducto_private.team_members as m
      where p_account_id is null or m.account_id = p_account_id
    ) as m
    full join (
      select r.account_id, r.member_id, -sum(r.amount) as spent
      from rows as r
      where r.member_id is not null
      group by r.account_id, r.member_id
    ) as x on x.account_id = m.account_id and x.member_id = m.user_id
    where m.total_spent is distinct from coalesce(x.spent, 0)
    union all
    select a.account_id, 'a team has a name, and only a team members', a.kind,
      format('%s, %s members', coalesce(t.name, 'no name'), (
        select count(*) from ducto_private.team_members as m where m.account_id = a.account_id)), null
    from accounts as a
    left join ducto_private.teams as t on t.account_id = a.account_id
    where (a.kind = 'team') <> (t.account_id is not null)
      or a.kind <> 'team' and exists (select from ducto_private.team_members as m where m.account_id = a.account_id)
    union all
    select r.account_id, r.invariant, r.expected, r.actual, r.detail
    from ducto_private.rollup_violations() as r
    where p_account_id is null
  )
  select f.account_id, f.invariant, f.expected, f.actual, f.detail, null::text
  from found as f
  order by f.account_id, f.invariant;
end
$$;
comment on function ducto.verify_ledger is
  'One row per violated invariant of an account, or of all, then also for each object that is missing, replaced or not ours; none when all is sound. One snapshot, no locks.';

-- Lots: credits that expire, and those of grants that keep a lot (expires_at infinity), so that it is known what is left of
-- them. All other credits are the balance less what is in lots.
--
-- A lot is due from its expires_at on. What active holds taken before then hold is kept for them; the rest has expired, and
-- no read counts it, whether or not it was recorded. The next call that changes the account records it, and so does the sweep.

-- An account's due lots and what of each has expired by p_now. Let R be the sum of the remainders of the due lots up to and
-- including a lot, in order of expiry, and H what active holds taken before its expiry hold. These lots together keep no more
-- than H, so at least R - H of them has expired; since an earlier lot's loss counts too, it is the greatest R - H so far.
create or replace function ducto_private.due_lots(p_account_id text, p_now timestamptz) returns setof ducto_private.due_lot
language plpgsql stable
as $$
begin
  return query
  select x.lot_id, x.grant_id, x.expires_at, x.seq, x.remainder,
    (x.expired - lag(x.expired, 1, 0::numeric) over (order by x.expires_at, x.seq, x.lot_id))::bigint, p_now
  from (
    select d.*, greatest(0, max(d.unheld) over (order by d.expires_at, d.seq, d.lot_id)) as expired
    from (
      select l.*, sum(l.remainder) over (order by l.expires_at, l.seq, l.lot_id) - coalesce((
        select sum(h.held)
        from ducto_private.holds as h
        where h.account_id = p_account_id and h.status = 'active' and h.expires_at > p_now and h.created_at < l.expires_at), 0)
        as unheld
      from ducto_private.credit_lots as l
      where l.account_id = p_account_id and l.remainder > 0 and l.expires_at <= p_now
    ) as d
  ) as x;
end
$$;

-- The steps of expiry up to p_now that are not yet recorded: how much of which lot expired when. A step is when a lot was due,
-- or when a hold ended for which it was kept. Each change of an account records what was due before it, so the first step is
-- the account's last change, which may itself have ended a hold.
create or replace function ducto_private.expiry_steps(p_account_id text, p_now timestamptz) returns setof ducto_private.due_lot
language plpgsql stable
as $$
begin
  return query
  select s.lot_id, s.transaction_id, s.expires_at, s.seq, s.remainder, s.step, s.due_at
  from (
    select d.*, d.expired - lag(d.expired, 1, 0::bigint) over (partition by d.lot_id order by m.at) as step
    from (
      select a.changed_at as at
      from ducto_private.accounts as a
      where a.account_id = p_account_id and a.changed_at <= p_now
      union
      select greatest(e.at, a.changed_at)
      from ducto_private.accounts as a
      cross join lateral (
        select l.expires_at as at
        from ducto_private.credit_lots as l
        where l.account_id = a.account_id and l.remainder > 0
        union
        select h.expires_at
        from ducto_private.holds as h
        where h.account_id = a.account_id and h.status = 'active'
      ) as e
      where a.account_id = p_account_id and a.changed_at <= p_now and e.at <= p_now
    ) as m
    cross join lateral ducto_private.due_lots(p_account_id, m.at) as d
  ) as s
  where s.step > 0;
end
$$;

-- What an account's due lots keep for holds: all that remains in them once write_expiry() has run.
create or replace function ducto_private.kept_for_holds(p_account_id text, p_now timestamptz) returns bigint
language plpgsql stable
as $$
begin
  return (
    select coalesce(sum(l.remainder), 0)
    from ducto_private.credit_lots as l
    where l.account_id = p_account_id and l.remainder > 0 and l.expires_at <= p_now);
end
$$;

-- Takes up to p_amount from the lots that expire after p_after and no later than p_until: from the lot p_first first, then in
-- order of expiry. Returns what it took. p_id is the row of the ledger for which it is taken, here and below.
create or replace function ducto_private.take_lots(
  p_account_id text, p_id uuid, p_amount bigint, p_after timestamptz, p_until timestamptz, p_first uuid)
returns bigint
language plpgsql volatile
as $$
declare
  v_taken bigint;
begin
  with taken as (
    select o.lot_id, least(o.remainder, p_amount - o.before)::bigint as amount
    from (
      select l.lot_id, l.remainder,
        sum(l.remainder) over (order by l.lot_id is distinct from p_first, l.expires_at, l.seq, l.lot_id) - l.remainder as before
      from ducto_private.credit_lots as l
      where l.account_id = p_account_id and l.remainder > 0 and l.expires_at > p_after and l.expires_at <= p_until
    ) as o
    where o.before < p_amount
  ), changed as (
    update ducto_private.credit_lots as l
    set remainder = l.remainder - t.amount
    from taken as t
    where l.lot_id = t.lot_id and l.account_id = p_account_id
  ), entered as (
    insert into ducto_private.lot_entries (transaction_id, lot_id, account_id, amount)
    select p_id, t.lot_id, p_account_id, -t.amount
    from taken as t
  )
  select coalesce(sum(t.amount), 0)
  into v_taken
  from taken as t;
  return v_taken;
end
$$;

-- Brings the account's row up to date with its lots.
create or replace function ducto_private.count_lots(p_account_id text, p_now timestamptz) returns void
language plpgsql volatile
as $$
begin
  update ducto_private.accounts as a
  set lots = l.lots, lots_due_at = l.due_at
  from (
    select count(*) as lots, min(l.expires_at) filter (where l.expires_at > p_now) as due_at
    from ducto_private.credit_lots as l
    where l.account_id = p_account_id and l.remainder > 0
  ) as l
  where a.account_id = p_account_id;
end
$$;

-- Takes a debit from an account's lots as far as they go. The settlement of a hold of p_held credits, taken at p_held_since,
-- first takes what due lots kept for it; then come the lots that are not yet due, p_first before the others.
create or replace function ducto_private.debit_lots(
  p_account_id text,
  p_now timestamptz,
  p_id uuid,
  p_debit bigint,
  p_held bigint default 0,
  p_held_since timestamptz default null,
  p_first uuid default null)
returns void
language plpgsql volatile
as $$
begin
  if p_held > 0 then
    p_debit := p_debit - ducto_private.take_lots(p_account_id, p_id, least(p_debit, p_held), p_held_since, p_now, null);
  end if;
  perform ducto_private.take_lots(p_account_id, p_id, p_debit, p_now, 'infinity', p_first);
  perform ducto_private.count_lots(p_account_id, p_now);
end
$$;

-- Opens a lot of p_amount of the credits that a row of the ledger gave.
create or replace function ducto_private.open_lot(
  p_account_id text, p_now timestamptz, p_id uuid, p_amount bigint, p_expires_at timestamptz)
returns void
language plpgsql volatile
as $$
begin
  if p_amount > 0 then
    insert into ducto_private.credit_lots (lot_id, account_id, transaction_id, amount, remainder, expires_at, created_at, seq,
      grant_id)
    select ducto_private.new_id(), p_account_id, p_id, p_amount, p_amount, p_expires_at, p_now, t.seq, p_id
    from ducto_private.transactions as t
    where t.transaction_id = p_id and t.account_id = p_account_id;
    perform ducto_private.count_lots(p_account_id, p_now);
  end if;
end
$$;

-- What was taken back of a grant, or has expired of it, in the accounts in which it has lived: a negative number. Removals
-- that were refunded are none.
create or replace function ducto_private.gone_of_grant(p_accounts text[], p_grant_id uuid) returns numeric
language plpgsql stable
as $$
begin
  return (
    select coalesce(sum(t.amount), 0) + coalesce(sum((
      select sum(r.amount)
      from ducto_private.transaction_details as e
      join ducto_private.transactions as r on r.transaction_id = e.transaction_id and r.account_id = e.account_id
      where e.account_id = any (p_accounts) and e.refers_to = t.transaction_id and r.type = 'refund')), 0)
    from ducto_private.transaction_details as d
    join ducto_private.transactions as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
    where d.account_id = any (p_accounts) and d.refers_to = p_grant_id and t.type in ('removal', 'expiry'));
end
$$;

-- Gives a refund's credits back to the lots from which its charge (or removal) p_origin took them, the last one first.
-- p_accounts are those in which the origin has lived, the last one is the refund's. p_upto is what all refunds of the origin
-- together give back to lots, p_left the most that this one may. Credits of lots that are due by now become a new lot of 720
-- hours, but those of a removal return to their lot, which has expired.
create or replace function ducto_private.restore_lots(
  p_accounts text[], p_now timestamptz, p_id uuid, p_origin ducto_private.ledger, p_upto bigint, p_left numeric)
returns void
language plpgsql volatile
as $$
declare
  v_account_id constant text := p_accounts[cardinality(p_accounts)];
  v_before numeric := (
    select coalesce(sum(e.amount + e.elsewhere), 0)
    from ducto_private.transaction_details as d
    join ducto_private.lot_entries as e on e.transaction_id = d.transaction_id and e.account_id = d.account_id
    where d.account_id = any (p_accounts) and d.refers_to = p_origin.transaction_id);
  v_upto numeric := least(p_upto, v_before + p_left);
  v_due bigint;
begin
  -- A merge does not bring lots of which nothing was left.
  if cardinality(p_accounts) > 1 then
    insert into ducto_private.credit_lots (lot_id, account_id, transaction_id, amount, remainder, expires_at, created_at, seq,
      grant_id)
    select ducto_private.new_id(), v_account_id, p_id, 0, 0, l.expires_at, p_now, t.seq, l.grant_id
    from ducto_private.lot_entries as e
    join ducto_private.credit_lots as l on l.lot_id = e.lot_id and l.account_id = e.account_id
    join ducto_private.transactions as t on t.transaction_id = p_id and t.account_id = v_account_id
    where e.transaction_id = p_origin.transaction_id and e.account_id = p_origin.account_id
    on conflict (account_id, grant_id) do nothing;
  end if;
  with taken as (
    select l.lot_id, l.expires_at, l.remainder, l.grant_id, -e.amount as amount,
      l.expires_at > p_now or p_origin.type = 'removal' as open,
      sum(-e.amount) over (order by p_origin.type = 'removal' and l.grant_id = p_origin.refers_to, o.expires_at desc, o.seq desc,
        o.lot_id desc) as upto
    from ducto_private.lot_entries as e
    join ducto_private.credit_lots as o on o.lot_id = e.lot_id and o.account_id = e.account_id
    join ducto_private.credit_lots as l on l.grant_id = o.grant_id and l.account_id = v_account_id
    where e.transaction_id = p_origin.transaction_id and e.account_id = p_origin.account_id
  ), given as (
    -- A removal of the lot's grant took other credits, where this lot had none left. So much of the refund replaces those, as
    -- credits that do not expire.
    select t.lot_id, t.open, p.part, greatest(0, least(p.part, a.room))::bigint as amount
    from taken as t
    cross join lateral (
      select (least(t.upto, v_upto) - greatest(t.upto - t.amount, v_before))::bigint as part
    ) as p
    cross join lateral (
      select g.amount - t.remainder + ducto_private.gone_of_grant(h.homes, t.grant_id) - (
        select coalesce(sum(e.renewed), 0)
        from ducto_private.credit_lots as o
        join ducto_private.lot_entries as e on e.lot_id = o.lot_id and e.account_id = o.account_id
        where o.account_id = any (h.homes) and o.grant_id = t.grant_id) as room
      from ducto_private.transactions as g
      cross join lateral (select ducto_private.homes(g.account_id, g.seq)) as h (homes)
      where g.transaction_id = t.grant_id
    ) as a
    where p.part > 0
  ), changed as (
    update ducto_private.credit_lots as l
    set remainder = l.remainder + g.amount
    from given as g
    where g.open and l.lot_id = g.lot_id and l.account_id = v_account_id
  ), entered as (
    insert into ducto_private.lot_entries (transaction_id, lot_id, account_id, amount, elsewhere, renewed)
    select p_id, g.lot_id, v_account_id, case when g.open then g.amount else 0 end,
      case when g.open then g.part - g.amount else g.part end, case when g.open then 0 else g.amount end
    from given as g
  )
  select coalesce(sum(g.amount), 0)
  into v_due
  from given as g
  where not g.open;
  perform ducto_private.count_lots(v_account_id, p_now);
  perform ducto_private.open_lot(v_account_id, p_now, p_id, v_due, p_now + interval '720 hours');
end
$$;

-- Tells of the lots that expire within 7 days, each once. Returns how many.
create or replace function ducto_private.tell_expiring(p_account_id text, p_now timestamptz) returns integer
language plpgsql volatile
as $$
declare
  v_rows integer;
begin
  with told as (
    update ducto_private.credit_lots as l
    set told = true
    where l.account_id = p_account_id and l.remainder > 0 and not l.told
      and l.expires_at > p_now and l.expires_at <= p_now + interval '7 days'
    returning l.*
  )
  insert into ducto_private.events (event_id, account_id, type, payload, created_at)
  select ducto_private.new_id(), p_account_id, 'credits_expiring', jsonb_build_object('lot_id', t.lot_id,
    'transaction_id', t.transaction_id, 'amount', t.remainder, 'expires_at', t.expires_at), p_now
  from told as t
  order by t.expires_at, t.seq;
  get diagnostics v_rows = row_count;
  return v_rows;
end
$$;

-- The accounts with anything for the sweep, those whose lots are due first; one may come again.
create or replace function ducto_private.sweepable(p_now timestamptz) returns setof text
language sql stable
as $$
  (select l.account_id
  from ducto_private.credit_lots as l
  where l.remainder > 0 and l.expires_at <= p_now
  order by l.expires_at)
  union all
  select h.account_id
  from ducto_private.holds as h
  where h.status = 'active' and h.expires_at <= p_now
  union all
  select l.account_id
  from ducto_private.credit_lots as l
  where l.remainder > 0 and not l.told and l.expires_at > p_now and l.expires_at <= p_now + interval '7 days'
  union all
  select t.account_id
  from ducto_private.auto_topups as t
  where t.look_at <= p_now
$$;

-- Whether the sweep has anything to do for an account.
create or replace function ducto_private.is_sweepable(p_account_id text, p_now timestamptz) returns boolean
language plpgsql stable
as $$
begin
  return exists (select from ducto_private.due_lots(p_account_id, p_now) as d where d.expired > 0)
    or exists (
      select from ducto_private.holds as h
      where h.account_id = p_account_id and h.status = 'active' and h.expires_at <= p_now)
    or exists (
      select from ducto_private.credit_lots as l
      where l.account_id = p_account_id and l.remainder > 0 and not l.told
        and l.expires_at > p_now and l.expires_at <= p_now + interval '7 days')
    or exists (select from ducto_private.auto_topups as t where t.account_id = p_account_id and t.look_at <= p_now);
end
$$;

create or replace function ducto.sweep_expired_credits(p_dry_run boolean default false, p_limit integer default 1000)
returns ducto.sweep_result
language plpgsql volatile
as $$
declare
  v_limit integer := coalesce(p_limit, 1000);
  v_start timestamptz := clock_timestamp();
  v_now timestamptz;
  v_account_id text;
  v_account ducto_private.accounts;
  v_lots bigint;
  v_due numeric;
  v_count bigint := 0;
  v_amount numeric := 0;
  v_accounts bigint := 0;
begin
  perform ducto_private.check_amount(v_limit, 1, 'p_limit');
  if p_dry_run then
    select count(d.*), coalesce(sum(d.expired), 0), count(distinct a.account_id)
    into v_count, v_amount, v_accounts
    from (select distinct s.account_id from ducto_private.sweepable(v_start) as s (account_id)) as a
    left join lateral ducto_private.due_lots(a.account_id, v_start) as d on d.expired > 0
    where ducto_private.is_sweepable(a.account_id, v_start);
    return row(v_count, ducto_private.at_most_bigint(v_amount), true, null, v_accounts)::ducto.sweep_result;
  end if;
  for v_account_id in
    select s.account_id
    from ducto_private.sweepable(v_start) as s (account_id)
  loop
    -- Nothing is to be done where all is kept for holds, or where the same account came here already.
    continue when not ducto_private.is_sweepable(v_account_id, v_start);
    select a.*
    into v_account
    from ducto_private.accounts as a
    where a.account_id = v_account_id
    for no key update skip locked;
    continue when not found;
    v_now := greatest(clock_timestamp(), v_account.changed_at);
    continue when not ducto_private.is_sweepable(v_account_id, v_now);
    select count(*), coalesce(sum(d.expired), 0)
    into v_lots, v_due
    from ducto_private.due_lots(v_account_id, v_now) as d
    where d.expired > 0;
    if ducto_private.is_due(v_account, v_now) then
      perform ducto_private.write_expiry(v_account_id, v_now);
      update ducto_private.accounts as a
      set changed_at = v_now
      where a.account_id = v_account_id;
    end if;
    perform ducto_private.tell_expiring(v_account_id, v_now);
    perform ducto_private.after_call(v_account, v_now);
    v_count := v_count + v_lots;
    v_amount := v_amount + v_due;
    v_accounts := v_accounts + 1;
    exit when v_accounts = v_limit;
  end loop;
  perform ducto_private.forget_events(v_start);
  return row(v_count, ducto_private.at_most_bigint(v_amount), false, null, v_accounts)::ducto.sweep_result;
end
$$;
comment on function ducto.sweep_expired_credits is
  'Writes down the expiry of lots that are due, a ledger row of type ''expiry'' for each, and of holds, and tells of what '
  'only time has brought: lots about to expire, top-ups. It serves at most p_limit accounts, passing over those that another '
  'session has locked. Repeat it, each time in a transaction of its own, until account_count is 0. Only bookkeeping: no '
  'admission spends an expired lot, swept or not. With p_dry_run => true it counts all and writes nothing.';

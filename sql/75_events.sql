-- The outbox: what happened at an edge, kept until all consumers have acknowledged it. And forgetting a user's free texts.
--
-- An event is written without a look at who consumes it, and becomes visible when its transaction commits, later perhaps than
-- younger ones. So no consumer remembers how far it has come: what it has fetched stands in its deliveries, and it is offered
-- all others that are kept.

-- Deletes events older than 30 days, and forgets consumers that fetched none for as long. Passes over what is locked.
create or replace function ducto_private.forget_events(p_now timestamptz) returns void
language plpgsql volatile
as $$
declare
  v_before constant timestamptz := p_now - interval '30 days';
begin
  with old as (
    select e.event_id, e.account_id
    from ducto_private.events as e
    where e.event_id < ducto_private.first_id(v_before)
    order by e.event_id
    limit 10000
    for update skip locked
  ), gone as (
    delete from ducto_private.events as e
    using old as o
    where e.event_id = o.event_id and e.account_id = o.account_id
    returning e.event_id, e.account_id
  )
  delete from ducto_private.deliveries as d
  using gone as g
  where d.event_id = g.event_id and d.account_id = g.account_id;
  delete from ducto_private.consumers as c
  where c.consumer in (
    select o.consumer from ducto_private.consumers as o where o.fetched_at <= v_before for update skip locked);
end
$$;

create or replace function ducto.fetch_events(
  p_limit integer default 100, p_lease_seconds integer default 60, p_consumer text default 'default')
returns setof ducto.event
language plpgsql volatile
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_consumer text := coalesce(p_consumer, 'default');
begin
  perform ducto_private.check_limit(p_limit, 'Fetch again for more.');
  if p_lease_seconds not between 1 and 86400 then
    perform ducto_private.invalid(format('p_lease_seconds must be between 1 and 86400, not %s', p_lease_seconds),
      'An event that is not acknowledged by then is delivered again.');
  end if;
  perform ducto_private.check_text(v_consumer, 'p_consumer');
  perform ducto_private.forget_events(v_now);
  -- From here on events are kept for it. Whoever comes second does not wait for who is doing the same.
  if not exists (select from ducto_private.consumers as c where c.consumer = v_consumer) then
    if pg_try_advisory_xact_lock(hashtextextended('ducto consumer ' || v_consumer, 0)) then
      insert into ducto_private.consumers (consumer, fetched_at)
      values (v_consumer, v_now)
      on conflict do nothing;
    end if;
  else
    update ducto_private.consumers as c
    set fetched_at = v_now
    where c.consumer in (
      select o.consumer
      from ducto_private.consumers as o
      where o.consumer = v_consumer and o.fetched_at <= v_now - interval '1 day'
      for update skip locked);
  end if;
  -- The lock on the event keeps its workers from waiting for each other. A lease given since this statement began is found by
  -- the conflict, and stands.
  return query
  with due as (
    select e.event_id, e.account_id
    from ducto_private.events as e
    where e.event_id >= ducto_private.first_id(v_now - interval '30 days') and not exists (
      select
      from ducto_private.deliveries as d
      where d.event_id = e.event_id and d.account_id = e.account_id and d.consumer = v_consumer and d.leased_until > v_now)
    order by e.event_id
    limit coalesce(p_limit, 100)
    for update of e skip locked
  ), leased as (
    insert into ducto_private.deliveries as d (consumer, event_id, account_id, attempts, leased_until)
    select v_consumer, u.event_id, u.account_id, 1, v_now + make_interval(secs => coalesce(p_lease_seconds, 60))
    from due as u
    on conflict (event_id, account_id, consumer) do update
    set attempts = d.attempts + 1, leased_until = excluded.leased_until
    where d.leased_until <= v_now
    returning d.event_id, d.account_id, d.attempts
  )
  select e.event_id::text, e.type, e.account_id, e.payload, l.attempts, e.created_at, null::text
  from leased as l
  join ducto_private.events as e on e.event_id = l.event_id and e.account_id = l.account_id
  order by e.event_id;
end
$$;
comment on function ducto.fetch_events is
  'Leases the oldest events that no other worker of this consumer holds: at most p_limit (1 to 1000), for p_lease_seconds (1 '
  'to 86400). One that is not acknowledged within the lease is delivered again, so deal with each so that twice does no '
  'harm. Each consumer, named as you like, is given every event that is kept at its first fetch or written later; an event is '
  'kept until all have acknowledged it, 30 days at most.';

create or replace function ducto.ack_events(p_ids text[], p_consumer text default 'default') returns bigint
language plpgsql volatile
as $$
declare
  v_consumer text := coalesce(p_consumer, 'default');
  v_ids uuid[];
begin
  perform ducto_private.check_text(v_consumer, 'p_consumer');
  -- Locked in order, so that two workers that acknowledge the same events do not wait for each other.
  with fetched as (
    select e.event_id, e.account_id
    from ducto_private.events as e
    join ducto_private.deliveries as d on d.event_id = e.event_id and d.account_id = e.account_id
    where e.event_id = any (array(select ducto_private.to_id(i.id) from unnest(p_ids) as i (id)))
      and d.consumer = v_consumer and d.leased_until < 'infinity'
    order by e.event_id
    for update of e
  ), done as (
    update ducto_private.deliveries as d
    set leased_until = 'infinity'
    from fetched as f
    where d.event_id = f.event_id and d.account_id = f.account_id and d.consumer = v_consumer and d.leased_until < 'infinity'
    returning d.event_id
  )
  select array_agg(d.event_id)
  into v_ids
  from done as d;
  with gone as (
    delete from ducto_private.events as e
    where e.event_id = any (v_ids) and not exists (
      select
      from ducto_private.consumers as c
      where not exists (
        select
        from ducto_private.deliveries as d
        where d.event_id = e.event_id and d.account_id = e.account_id and d.consumer = c.consumer
          and d.leased_until = 'infinity'))
    returning e.event_id, e.account_id
  )
  delete from ducto_private.deliveries as d
  using gone as g
  where d.event_id = g.event_id and d.account_id = g.account_id;
  return coalesce(cardinality(v_ids), 0);
end
$$;
comment on function ducto.ack_events is
  'Says that a consumer has dealt with events, and answers how many; the last consumer''s removes them. An id that is unknown, '
  'or that this consumer was not given or has acknowledged before, is not an error and does not count.';

create or replace function ducto.erase_user(p_user_id text) returns bigint
language plpgsql volatile
as $$
declare
  v_account_id text;
  v_accounts ducto_private.accounts[];
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_changed bigint;
  v_total bigint := 0;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  -- Accounts are locked first, in the order of batches, and events last, in that of ack_events().
  for v_account_id in
    select m.account_id
    from ducto_private.team_members as m
    where m.user_id = p_user_id
    union
    select p_user_id collate "C"
    order by 1
  loop
    v_accounts := v_accounts || ducto_private.lock_account(v_account_id);
  end loop;
  perform
  from ducto_private.events as e
  where e.account_id = p_user_id
  order by e.event_id
  for update;
  foreach v_account in array v_accounts loop
    with rows as (
      update ducto_private.transactions as t
      set metadata = null
      where t.account_id = v_account.account_id and p_user_id in (t.account_id, t.member_id) and t.metadata is not null
      returning 1
    ), details as (
      update ducto_private.transaction_details as d
      set reason = null, reference = null
      from ducto_private.transactions as t
      where d.account_id = v_account.account_id and num_nonnulls(d.reason, d.reference) > 0
        and t.transaction_id = d.transaction_id and t.account_id = d.account_id and p_user_id in (t.account_id, t.member_id)
      returning 1
    ), holds as (
      update ducto_private.holds as h
      set metadata = null
      where h.account_id = v_account.account_id and p_user_id in (h.account_id, h.member_id) and h.metadata is not null
      returning 1
    ), events as (
      update ducto_private.events as e
      set payload = '{}'
      where e.account_id = v_account.account_id and v_account.account_id = p_user_id and e.payload <> '{}'
      returning 1
    )
    select count(*)
    into v_changed
    from (select from rows union all select from details union all select from holds union all select from events) as c;
    if v_changed > 0 then
      v_now := greatest(clock_timestamp(), v_account.changed_at);
      perform ducto_private.expire(v_account, v_now);
      update ducto_private.accounts as a
      set revision = a.revision + 1, changed_at = v_now
      where a.account_id = v_account.account_id;
      perform ducto_private.after_call(v_account, v_now);
    end if;
    v_total := v_total + v_changed;
  end loop;
  return v_total;
end
$$;
comment on function ducto.erase_user is
  'Forgets the free texts about a user: metadata, reasons and references of the ledger, of holds and events, in teams '
  'too. Amounts, keys and usage stay. Answers how many rows it changed.';

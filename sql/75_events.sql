-- The outbox: what happened at an edge, kept until a worker has acknowledged it. And forgetting a user's free texts.

create or replace function ducto.fetch_events(p_limit integer default 100, p_lease_seconds integer default 60)
returns setof ducto.event
language plpgsql volatile
as $$
declare
  v_now timestamptz := clock_timestamp();
begin
  perform ducto_private.check_limit(p_limit, 'Fetch again for more.');
  if p_lease_seconds not between 1 and 86400 then
    perform ducto_private.invalid(format('p_lease_seconds must be between 1 and 86400, not %s', p_lease_seconds),
      'An event that is not acknowledged by then is delivered again.');
  end if;
  return query
  with due as (
    select e.event_id, e.account_id
    from ducto_private.events as e
    where coalesce(e.leased_until <= v_now, true)
    order by e.event_id
    limit coalesce(p_limit, 100)
    for update skip locked
  ), leased as (
    update ducto_private.events as e
    set attempts = e.attempts + 1, leased_until = v_now + make_interval(secs => coalesce(p_lease_seconds, 60))
    from due as d
    where e.event_id = d.event_id and e.account_id = d.account_id
    returning e.*
  )
  select l.event_id::text, l.type, l.account_id, l.payload, l.attempts, l.created_at, null::text
  from leased as l
  order by l.event_id;
end
$$;
comment on function ducto.fetch_events is
  'Leases the oldest events that no other worker holds: at most p_limit (1 to 1000), for p_lease_seconds (1 to '
  '86400). One that is not acknowledged within the lease is delivered again, so deal with each so that twice does no '
  'harm.';

create or replace function ducto.ack_events(p_ids text[]) returns bigint
language plpgsql volatile
as $$
declare
  v_rows bigint;
begin
  -- Locked in order, so that two workers that acknowledge the same events do not wait for each other.
  with done as (
    select e.event_id, e.account_id
    from ducto_private.events as e
    where e.event_id = any (array(select ducto_private.to_id(i.id) from unnest(p_ids) as i (id)))
    order by e.event_id
    for update
  )
  delete from ducto_private.events as e
  using done as d
  where e.event_id = d.event_id and e.account_id = d.account_id;
  get diagnostics v_rows = row_count;
  return v_rows;
end
$$;
comment on function ducto.ack_events is 'Removes events that were dealt with, and answers how many; an unknown id is not an error.';

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
    end if;
    v_total := v_total + v_changed;
  end loop;
  return v_total;
end
$$;
comment on function ducto.erase_user is
  'Forgets the free texts about a user: metadata, reasons and references of the ledger, of holds and events, in teams '
  'too. Amounts, keys and usage stay. Answers how many rows it changed.';

-- Merges: a guest's account becomes part of the user's. The ledgers stay as they are, and what they gave moves on: the refund
-- of a charge, or the removal of a grant, is written to the account in which the charge or grant lives now.

-- The accounts in which a row of the ledger has lived: first its own, last the one in which it lives now. A merge moves the
-- rows that came before it; the account goes on, empty, and what it does later is its own until it is merged again.
create or replace function ducto_private.homes(p_account_id text, p_seq bigint) returns text[]
language plpgsql stable
as $$
declare
  v_homes text[];
begin
  while p_account_id is not null loop
    v_homes := v_homes || p_account_id;
    p_account_id := null;
    select m.into_id, m.into_seq
    into p_account_id, p_seq
    from ducto_private.merges as m
    where m.account_id = v_homes[cardinality(v_homes)] and m.seq > p_seq
    order by m.seq
    limit 1;
  end loop;
  return v_homes;
end
$$;

-- Locks the account in which a row lives now. Where a merge has moved the row while this waited, the lock is given back
-- before the next is asked for: a rollback to the block's start does that, and no order of sessions is a deadlock.
create or replace function ducto_private.lock_home(p_account_id text, p_seq bigint) returns ducto_private.accounts
language plpgsql volatile
as $$
declare
  v_homes text[];
  v_account ducto_private.accounts;
begin
  loop
    v_homes := ducto_private.homes(p_account_id, p_seq);
    begin
      v_account := ducto_private.lock_account(v_homes[cardinality(v_homes)]);
      if ducto_private.homes(p_account_id, p_seq) = v_homes then
        return v_account;
      end if;
      raise no_data_found;
    exception when no_data_found then
      null;
    end;
  end loop;
end
$$;

-- A row by its id; with p_user_id only if it has lived in that account.
create or replace function ducto_private.find_moved(p_transaction_id text, p_user_id text) returns ducto_private.ledger
language plpgsql stable
as $$
declare
  v_row ducto_private.ledger := ducto_private.find_transaction(p_transaction_id, p_user_id);
begin
  if v_row.transaction_id is null and p_user_id is not null then
    v_row := ducto_private.find_transaction(p_transaction_id, null);
    if not p_user_id = any (ducto_private.homes(v_row.account_id, v_row.seq)) then
      return null;
    end if;
  end if;
  return v_row;
end
$$;

-- The row that a key wrote in the first of these accounts that knows it.
create or replace function ducto_private.find_key_in(p_accounts text[], p_key text) returns ducto_private.ledger
language plpgsql stable
as $$
declare
  v_account_id text;
  v_row ducto_private.ledger;
begin
  if p_key is not null then
    foreach v_account_id in array p_accounts loop
      v_row := ducto_private.find_by_key(v_account_id, p_key);
      exit when v_row.transaction_id is not null;
    end loop;
  end if;
  return v_row;
end
$$;

-- Whether a row was written by a merge, on either side.
create or replace function ducto_private.is_merge(p_row ducto_private.ledger) returns boolean
language plpgsql stable
as $$
begin
  return p_row.type = 'adjustment' and exists (
    select
    from ducto_private.merges as m
    where (m.account_id, m.seq) = (p_row.account_id, p_row.seq) or (m.into_id, m.into_seq) = (p_row.account_id, p_row.seq));
end
$$;

create or replace function ducto_private.merge_refusal(p_error text, p_into text) returns ducto.balance_result
language plpgsql stable
as $$
declare
  v_answer ducto.balance_result := ducto.get_balance(p_into);
begin
  v_answer.user_id := null;
  v_answer.error := p_error;
  v_answer.idempotent := false;
  return v_answer;
end
$$;

-- Moves an account's lots that have not expired into another one, all at once by row p_from_id of the one and row p_into_id of
-- the other. p_short of their credits, those that would be spent first, do not arrive: they pay what the other account owes.
create or replace function ducto_private.move_lots(
  p_from text, p_into text, p_now timestamptz, p_from_id uuid, p_into_id uuid, p_short numeric) returns void
language plpgsql volatile
as $$
begin
  with moved as (
    select l.lot_id, l.grant_id, l.expires_at, l.remainder,
      greatest(0, least(l.remainder, sum(l.remainder) over (order by l.expires_at, l.seq, l.lot_id) - p_short))::bigint as amount
    from ducto_private.credit_lots as l
    where l.account_id = p_from and l.remainder > 0
    order by l.expires_at, l.seq, l.lot_id
  ), emptied as (
    update ducto_private.credit_lots as l
    set remainder = 0
    from moved as m
    where l.lot_id = m.lot_id and l.account_id = p_from
  ), left_over as (
    insert into ducto_private.lot_entries (transaction_id, lot_id, account_id, amount)
    select p_from_id, m.lot_id, p_from, -m.remainder
    from moved as m
  ), returned as (
    -- A lot that once came from there goes on where it left off.
    update ducto_private.credit_lots as l
    set remainder = l.remainder + m.amount
    from moved as m
    where l.account_id = p_into and l.grant_id = m.grant_id and m.amount > 0
    returning l.lot_id, l.grant_id, m.amount
  ), arrived as (
    insert into ducto_private.lot_entries (transaction_id, lot_id, account_id, amount)
    select p_into_id, r.lot_id, p_into, r.amount
    from returned as r
  )
  insert into ducto_private.credit_lots (lot_id, account_id, transaction_id, amount, remainder, expires_at, created_at, seq,
    grant_id)
  select ducto_private.new_id(), p_into, p_into_id, m.amount, m.amount, m.expires_at, p_now, t.seq, m.grant_id
  from moved as m
  join ducto_private.transactions as t on t.transaction_id = p_into_id and t.account_id = p_into
  where m.amount > 0 and not exists (
    select
    from ducto_private.credit_lots as l
    where l.account_id = p_into and l.grant_id = m.grant_id);
  perform ducto_private.count_lots(p_from, p_now);
  perform ducto_private.count_lots(p_into, p_now);
end
$$;

create or replace function ducto.merge_accounts(p_from text, p_into text, p_idempotency_key text default null)
returns ducto.balance_result
language plpgsql volatile
as $$
declare
  v_fingerprint bigint;
  v_account_id text;
  v_from ducto_private.accounts;
  v_into ducto_private.accounts;
  v_before ducto_private.accounts;
  v_row ducto_private.ledger;
  v_merge ducto_private.merges;
  v_now timestamptz;
  v_from_id uuid;
  v_into_id uuid;
  v_carry numeric;
  v_debt numeric;
  v_amount numeric;
  v_answer ducto.balance_result;
begin
  perform ducto_private.check_text(p_from, 'p_from');
  perform ducto_private.check_text(p_into, 'p_into');
  perform ducto_private.check_key(p_idempotency_key);
  if p_from = p_into collate "C" then
    perform ducto_private.invalid('p_from and p_into are the same account', 'Name the account that ends, and the one that goes on.');
  end if;
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('merge_accounts', p_from, p_into), 0);
  begin
    -- Accounts neither go nor change their kind. So this is known before p_into is opened, which may have to come first.
    if exists (select from ducto_private.accounts as a where a.account_id = p_from) then
      foreach v_account_id in array array(select u.id from unnest(array[p_from, p_into]) as u (id) order by u.id collate "C") loop
        if v_account_id = p_from collate "C" then
          v_from := ducto_private.lock_account(p_from);
        else
          v_into := ducto_private.lock_or_open(p_into);
        end if;
      end loop;
    end if;
    v_row := ducto_private.find_key_in(array[p_from, p_into], p_idempotency_key);
    if v_row.transaction_id is not null then
      if v_row.fingerprint is distinct from v_fingerprint then
        v_answer.error := 'idempotency_conflict';
      end if;
    elsif v_from.account_id is null then
      v_answer.error := 'account_not_found';
    elsif v_from.kind = 'team' or v_into.kind = 'team' then
      v_answer.error := 'is_a_team';
    else
      v_now := greatest(clock_timestamp(), v_from.changed_at, v_into.changed_at);
      if (ducto_private.without_expired(v_from, v_now)).holds > 0 then
        v_answer.error := 'has_open_holds';
      end if;
    end if;
    if v_answer.error is not null then
      raise no_data_found;
    end if;
  exception when no_data_found then
    -- Whoever is refused has opened nothing.
    return ducto_private.merge_refusal(v_answer.error, p_into);
  end;
  if v_row.transaction_id is not null then
    select m.*
    into v_merge
    from ducto_private.merges as m
    where m.account_id = p_from and v_row.seq = case v_row.account_id when p_from then m.seq else m.into_seq end;
    v_row := ducto_private.find_transaction((
      select t.transaction_id::text
      from ducto_private.transactions as t
      where t.account_id = p_into and t.seq = v_merge.into_seq), p_into);
    return row(p_into, v_row.balance_after, v_row.lifetime_purchased, v_merge.reserved, v_merge.available, v_merge.credit_limit,
      v_row.revision, null, true)::ducto.balance_result;
  end if;

  v_from := ducto_private.expire(v_from, v_now);
  v_into := ducto_private.expire(v_into, v_now);
  -- Fractions not yet charged add up; a whole credit of them is charged now.
  v_carry := v_from.carry + v_into.carry;
  v_amount := v_from.balance - floor(v_carry);
  v_debt := greatest(0, ducto_private.kept_for_holds(p_into, v_now) - v_into.balance::numeric);
  perform ducto_private.check_range(v_amount, 'what is moved', p_from);
  perform ducto_private.check_range(v_into.balance + v_amount, 'the balance', p_into);
  perform ducto_private.check_range(v_into.lifetime_purchased::numeric + v_from.lifetime_purchased, 'lifetime_purchased', p_into);
  v_from_id := ducto_private.post(p_from, v_now, 'adjustment', -v_from.balance, p_idempotency_key, v_fingerprint,
    jsonb_build_object('merged_into', p_into), p_purchased => -v_from.lifetime_purchased, p_carry => 0);
  v_into_id := ducto_private.post(p_into, v_now, 'adjustment', v_amount::bigint, p_idempotency_key, v_fingerprint,
    jsonb_build_object('merged_from', p_from), p_purchased => v_from.lifetime_purchased,
    p_carry => trim_scale(v_carry - floor(v_carry)));
  if v_amount < 0 and v_into.lots > 0 then
    perform ducto_private.debit_lots(p_into, v_now, v_into_id, (-v_amount)::bigint);
  end if;
  if v_from.lots > 0 then
    -- What is in no lot does not expire: credits in lots pay what the other account owes, and the fractions, before it.
    perform ducto_private.move_lots(p_from, p_into, v_now, v_from_id, v_into_id, v_debt + floor(v_carry));
  end if;
  perform ducto_private.stop_topup(p_from);
  v_before := v_into;
  select a.*
  into v_into
  from ducto_private.accounts as a
  where a.account_id = p_into;
  if v_amount < 0 then
    perform ducto_private.tell_balance(v_before, v_into, v_now);
  end if;
  perform ducto_private.after_call(v_into, v_now);
  v_answer := ducto_private.balance_answer(v_into);
  insert into ducto_private.merges (account_id, seq, into_id, into_seq, carry, purchased, reserved, available, credit_limit)
  values (p_from, v_from.seq + 1, p_into, v_into.seq, v_from.carry, v_from.lifetime_purchased, v_answer.reserved,
    v_answer.available, v_answer.credit_limit);
  v_answer.idempotent := false;
  return v_answer;
end
$$;
comment on function ducto.merge_accounts is
  'Moves all that p_from has into p_into, opening that one if it is new: its balance (a debt too), the fraction not yet '
  'charged, its lots with their expiry and lifetime_purchased. Later refunds of its charges go to p_into, as do removals '
  'of its grants. Its plan, caps, limit and memberships stay behind, and its automatic top-up ends; it goes on, empty. Refused while p_from has open '
  'holds, and for teams.';

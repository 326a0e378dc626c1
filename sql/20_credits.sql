-- Credits in and out, apart from charges: grants, removals, limits, and what an account has.

create or replace function ducto_private.credits_answer(p_row ducto_private.ledger, p_idempotent boolean)
returns ducto.add_credits_result
language plpgsql immutable
as $$
begin
  return row(p_row.transaction_id, p_row.account_id, p_row.amount, p_row.balance_after, p_row.lifetime_purchased, p_idempotent,
    p_row.revision, null)::ducto.add_credits_result;
end
$$;

create or replace function ducto_private.credits_refusal(p_error text, p_account ducto_private.accounts)
returns ducto.add_credits_result
language plpgsql immutable
as $$
begin
  return row(null, null, 0, coalesce(p_account.balance, 0), coalesce(p_account.lifetime_purchased, 0), false,
    coalesce(p_account.revision, 0), p_error)::ducto.add_credits_result;
end
$$;

create or replace function ducto_private.check_payment(p_paid_amount numeric, p_paid_currency text, p_hint text) returns void
language plpgsql stable
as $$
begin
  perform ducto_private.check_short(p_paid_currency, 'p_paid_currency');
  if p_paid_amount < 0 or p_paid_amount = 'NaN' or p_paid_amount >= 1e30 then
    perform ducto_private.invalid('p_paid_amount must be at least 0 and below 10^30', p_hint);
  end if;
end
$$;

create or replace function ducto.add_credits(
  p_user_id text,
  p_amount bigint,
  p_type text default 'adjustment',
  p_metadata jsonb default null,
  p_expires_at timestamptz default null,
  p_idempotency_key text default null,
  p_paid_amount numeric default null,
  p_paid_currency text default null,
  p_reference text default null,
  p_keep_lot boolean default false)
returns ducto.add_credits_result
language plpgsql volatile
as $$
declare
  v_type text := coalesce(p_type, 'adjustment');
  v_fingerprint bigint;
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_purchased bigint := 0;
  v_lot numeric;
  v_expires_at constant timestamptz := coalesce(p_expires_at, case when p_keep_lot then 'infinity'::timestamptz end);
  v_id uuid;
  v_row ducto_private.ledger;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_amount(p_amount, 1);
  perform ducto_private.check_metadata(p_metadata);
  perform ducto_private.check_key(p_idempotency_key);
  perform ducto_private.check_payment(p_paid_amount, p_paid_currency,
    'Give the money paid for the credits; take credits back with remove_credits.');
  perform ducto_private.check_short(p_reference, 'p_reference');
  perform ducto_private.check_choice(v_type, '{purchase,subscription,signup_bonus,promotion,adjustment}', 'p_type');
  if p_expires_at in ('infinity', '-infinity') then
    perform ducto_private.invalid('p_expires_at must be finite', 'Leave it out for credits that do not expire.');
  end if;
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('add_credits', p_amount, v_type), 0);
  v_account := ducto_private.lock_or_open(p_user_id);
  v_row := ducto_private.find_by_key(p_user_id, p_idempotency_key);
  if v_row.transaction_id is not null then
    if v_row.fingerprint is distinct from v_fingerprint then
      return ducto_private.credits_refusal('idempotency_conflict', ducto_private.read_account(p_user_id));
    end if;
    return ducto_private.credits_answer(v_row, true);
  end if;
  v_now := v_account.changed_at;
  if p_expires_at <= v_now then
    perform ducto_private.invalid(
      format('p_expires_at must lie in the future: %s is not after %s, the time of account %s', p_expires_at, v_now, p_user_id),
      case when v_now > clock_timestamp()
        then 'The account was changed at that time, which is ahead of the clock: its time stands still until the clock reaches it.'
        else 'Credits that have expired are worth nothing.' end);
  end if;
  v_account := ducto_private.expire(v_account, v_now);
  if v_type = 'purchase' then
    v_purchased := p_amount;
    perform ducto_private.check_range(v_account.lifetime_purchased::numeric + p_amount, 'lifetime_purchased', p_user_id);
  end if;
  perform ducto_private.check_range(v_account.balance::numeric + p_amount, 'the balance', p_user_id);
  v_lot := p_amount - greatest(0, ducto_private.kept_for_holds(p_user_id, v_now) - v_account.balance::numeric);
  v_id := ducto_private.post(p_user_id, v_now, v_type, p_amount, p_idempotency_key, v_fingerprint, p_metadata,
    p_purchased => v_purchased, p_expires_at => v_expires_at, p_paid_amount => p_paid_amount,
    p_paid_currency => p_paid_currency, p_reference => p_reference);
  if v_expires_at is not null then
    perform ducto_private.open_lot(p_user_id, v_now, v_id, greatest(0, v_lot)::bigint, v_expires_at);
  end if;
  if v_account.auto_topup and p_idempotency_key is not null then
    perform ducto_private.end_topup(p_user_id, p_idempotency_key);
  end if;
  perform ducto_private.after_call(v_account, v_now);
  v_row := ducto_private.find_transaction(v_id::text, p_user_id);
  return ducto_private.credits_answer(v_row, false);
end
$$;
comment on function ducto.add_credits is
  'Adds credits (at least 1) to an account, opening it if it is new. p_type is ''purchase'', ''subscription'', '
  '''signup_bonus'', ''promotion'' or ''adjustment''; only a purchase adds to lifetime_purchased. With p_expires_at, '
  'a time to come, the credits are a lot: it is spent before credits that do not expire, the soonest to expire first. '
  'A debt is paid first, and the lot is what is left. With p_keep_lot credits that do not expire are a lot too, so that '
  'it is known what is left of them: it is spent after those that expire. p_paid_amount, p_paid_currency and '
  'p_reference are notes of yours.';

-- What may be taken of a lot, unspent: its remainder, but not what the account's active holds claim of it. Like a charge they
-- claim the lots that are spent first, first. Null where the grant was given none; 0 where nothing of it is left.
create or replace function ducto_private.unspent(p_account ducto_private.accounts, p_grant ducto_private.ledger, p_now timestamptz)
returns bigint
language plpgsql stable
as $$
begin
  if p_grant.expires_at is null then
    return null;
  end if;
  return coalesce((
    select o.upto - greatest(o.upto - o.remainder, least(o.upto, p_account.held))
    from (
      select l.grant_id, l.expires_at, l.remainder,
        sum(l.remainder - coalesce(d.expired, 0)) over (order by l.expires_at, l.seq, l.lot_id) as upto
      from ducto_private.credit_lots as l
      left join ducto_private.due_lots(p_account.account_id, p_now) as d on d.lot_id = l.lot_id
      where l.account_id = p_account.account_id and l.remainder > 0
    ) as o
    where o.grant_id = p_grant.transaction_id and o.expires_at > p_now), 0);
end
$$;

create or replace function ducto.remove_credits(
  p_user_id text,
  p_amount bigint,
  p_reason text default null,
  p_transaction_id text default null,
  p_metadata jsonb default null,
  p_idempotency_key text default null,
  p_unspent_only boolean default false,
  p_paid_amount numeric default null,
  p_paid_currency text default null)
returns ducto.add_credits_result
language plpgsql volatile
as $$
declare
  v_unspent_only constant boolean := coalesce(p_unspent_only, false);
  v_amount bigint := p_amount;
  v_fingerprint bigint;
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_due boolean;
  v_grant ducto_private.ledger;
  v_homes text[] := array[p_user_id];
  v_left numeric;
  v_unspent bigint;
  v_id uuid;
  v_row ducto_private.ledger;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  if p_amount is not null or not v_unspent_only then
    perform ducto_private.check_amount(p_amount, 1);
  end if;
  perform ducto_private.check_short(p_reason, 'p_reason');
  perform ducto_private.check_metadata(p_metadata);
  perform ducto_private.check_key(p_idempotency_key);
  perform ducto_private.check_payment(p_paid_amount, p_paid_currency,
    'Give the money paid back as it was paid, above 0: the removal keeps it as a negative amount.');
  if v_unspent_only and p_transaction_id is null then
    perform ducto_private.invalid('p_unspent_only needs p_transaction_id', 'Name the grant whose unspent credits are taken.');
  end if;
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('remove_credits', p_amount, lower(p_transaction_id)), 0);
  -- A merge takes the account's grants along.
  v_grant := ducto_private.find_moved(p_transaction_id, p_user_id);
  if v_grant.transaction_id is null then
    v_account := ducto_private.lock_account(p_user_id);
  else
    v_account := ducto_private.lock_home(v_grant.account_id, v_grant.seq);
    v_homes := ducto_private.homes(v_grant.account_id, v_grant.seq);
  end if;
  if v_account.account_id is null then
    return ducto_private.credits_refusal('account_not_found', v_account);
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_due := ducto_private.is_due(v_account, v_now);
  v_account := ducto_private.without_expired(v_account, v_now);
  v_row := ducto_private.find_key_in(v_homes, p_idempotency_key);
  if v_row.transaction_id is not null then
    if v_row.fingerprint is distinct from v_fingerprint then
      return ducto_private.credits_refusal('idempotency_conflict', v_account);
    end if;
    return ducto_private.credits_answer(v_row, true);
  end if;
  if p_transaction_id is not null then
    if coalesce(v_grant.type, '') not in ('purchase', 'subscription', 'signup_bonus', 'promotion', 'adjustment')
      or ducto_private.is_merge(v_grant)
    then
      return ducto_private.credits_refusal('transaction_not_found', v_account);
    end if;
    -- A removal cannot take what is due, whether it has expired or is kept for a hold.
    select v_grant.amount + ducto_private.gone_of_grant(v_homes, v_grant.transaction_id) - coalesce(sum(l.remainder), 0)
    into v_left
    from ducto_private.due_lots(v_account.account_id, v_now) as l
    where l.transaction_id = v_grant.transaction_id;
    if v_unspent_only then
      v_unspent := ducto_private.unspent(v_account, v_grant, v_now);
      if v_unspent is null then
        perform ducto_private.invalid(format('transaction %s has no lot: what is left of it is not known', p_transaction_id),
          'Grant with p_expires_at or p_keep_lot => true, or leave p_unspent_only out.');
      end if;
      v_left := least(v_left, v_unspent);
      v_amount := coalesce(p_amount, v_left);
    end if;
    if v_amount > v_left or v_amount <= 0 then
      return ducto_private.credits_refusal('exceeds_grant', v_account);
    end if;
  end if;
  perform ducto_private.check_range(v_account.balance::numeric - v_amount, 'the balance', v_account.account_id);
  if v_due then
    perform ducto_private.write_expiry(v_account.account_id, v_now);
  end if;
  v_id := ducto_private.post(v_account.account_id, v_now, 'removal', -v_amount, p_idempotency_key, v_fingerprint, p_metadata,
    p_purchased => case v_grant.type when 'purchase' then -v_amount else 0 end, p_refers_to => v_grant.transaction_id,
    p_paid_amount => -p_paid_amount, p_paid_currency => p_paid_currency, p_reason => p_reason);
  if v_account.lots > 0 then
    perform ducto_private.debit_lots(v_account.account_id, v_now, v_id, v_amount, p_first => (
      select l.lot_id
      from ducto_private.credit_lots as l
      where l.grant_id = v_grant.transaction_id and l.account_id = v_account.account_id));
  end if;
  perform ducto_private.after_call(v_account, v_now);
  v_row := ducto_private.find_transaction(v_id::text, v_account.account_id);
  return ducto_private.credits_answer(v_row, false);
end
$$;
comment on function ducto.remove_credits is
  'Takes credits (at least 1) back: a mistyped grant, a payment refunded or disputed. May leave a debt; is not spend. '
  'With p_transaction_id, a grant''s, it takes from the lot of that grant first, in total never more than the grant '
  'less what of it expired, and lowers lifetime_purchased where the grant was a purchase. With p_unspent_only it takes '
  'only what is left of that lot and no active hold claims, all of it where p_amount is null. p_paid_amount is the money '
  'given back (kept negative), a note of yours as p_paid_currency is. refund_credits undoes a removal.';

-- An account's balance as a reader sees it, and the largest hold admitted now (caps apart).
create or replace function ducto_private.balance_answer(p_account ducto_private.accounts) returns ducto.balance_result
language plpgsql stable
as $$
declare
  v_terms ducto_private.terms;
  v_left bigint;
  v_floor bigint;
begin
  if ducto_private.active_version(p_account.changed_at) is not null then
    v_terms := ducto_private.find_terms(null, p_account.plan_id, p_account.changed_at);
  end if;
  v_left := ducto_private.allowance_left(p_account, v_terms, p_account.changed_at);
  v_floor := case p_account.kind when 'user' then coalesce(v_terms.min_balance, 0) else 0 end - p_account.credit_limit;
  return row(p_account.account_id, p_account.balance, p_account.lifetime_purchased, p_account.held,
    least(9223372036854775807,
      greatest(0, v_left::numeric - p_account.held + greatest(0, p_account.balance::numeric - v_floor)))::bigint,
    p_account.credit_limit, p_account.revision, null, null)::ducto.balance_result;
end
$$;

-- An account's balance at p_at, when p_seq was its last row. Credits are gone from the moment they were due, even where that
-- was recorded later or is not yet.
create or replace function ducto_private.balance_at(p_account_id text, p_seq bigint, p_at timestamptz) returns bigint
language plpgsql stable
as $$
begin
  return coalesce((
      select t.balance_after
      from ducto_private.transactions as t
      where t.account_id = p_account_id and t.seq = p_seq), 0) + coalesce((
      select sum(t.amount)
      from ducto_private.transaction_details as d
      join ducto_private.transactions as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
      where d.account_id = p_account_id and d.occurred_at <= p_at and d.seq > p_seq and t.type = 'expiry'), 0) - coalesce((
      select sum(e.expired)
      from ducto_private.expiry_steps(p_account_id, p_at) as e), 0);
end
$$;

create or replace function ducto.get_balance(p_user_id text, p_at timestamptz default null) returns ducto.balance_result
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts := ducto_private.read_account(p_user_id);
  v_seq bigint;
  v_answer ducto.balance_result;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  if v_account.account_id is null then
    return row(p_user_id, 0, 0, case when p_at is null then 0 end, case when p_at is null then 0 end, 0, 0, null, null)
      ::ducto.balance_result;
  end if;
  v_answer := ducto_private.balance_answer(v_account);
  if p_at is not null then
    v_seq := ducto_private.seq_at(p_user_id, p_at);
    v_answer.reserved := null;
    v_answer.available := null;
    v_answer.balance := ducto_private.balance_at(p_user_id, v_seq, p_at);
    v_answer.lifetime_purchased := coalesce((
      select l.lifetime_purchased
      from ducto_private.transaction_details as l
      where l.account_id = p_user_id and l.lifetime_purchased is not null and l.seq <= v_seq
      order by l.seq desc
      limit 1), 0);
  end if;
  return v_answer;
end
$$;
comment on function ducto.get_balance is
  'An account''s balance, what its holds claim of it, and the largest hold admitted now (caps apart); zeros for an '
  'unknown account. With p_at, the balance and the purchases after the last row up to that time; what holds claim and '
  'the largest hold are null then, the credit limit and the revision those of now.';

create or replace function ducto.set_credit_limit(p_user_id text, p_limit bigint) returns ducto.balance_result
language plpgsql volatile
as $$
declare
  v_before ducto_private.accounts;
  v_account ducto_private.accounts;
  v_now timestamptz;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_amount(p_limit, 0, 'p_limit');
  v_account := ducto_private.lock_or_open(p_user_id);
  v_now := v_account.changed_at;
  v_before := ducto_private.expire(v_account, v_now);
  update ducto_private.accounts as a
  set credit_limit = p_limit, revision = a.revision + 1, changed_at = v_now
  where a.account_id = p_user_id
  returning a.* into v_account;
  perform ducto_private.tell_balance(v_before, v_account, v_now);
  perform ducto_private.after_call(v_account, v_now);
  return ducto_private.balance_answer(v_account);
end
$$;
comment on function ducto.set_credit_limit is 'How far below zero an account may go; 0 is the default. Opens the account if it is new.';

-- The sequence number of an account's last row not after p_at (or, p_before, earlier than it), else 0: times never run
-- backwards along the sequence.
create or replace function ducto_private.seq_at(p_account_id text, p_at timestamptz, p_before boolean default false) returns bigint
language plpgsql stable
as $$
declare
  v_low bigint := 0;
  v_high bigint;
  v_middle bigint;
begin
  select a.seq
  into v_high
  from ducto_private.accounts as a
  where a.account_id = p_account_id;
  v_high := coalesce(v_high, 0);
  while v_low < v_high loop
    v_middle := (v_low + v_high + 1) / 2;
    if (
      select t.created_at < p_at or not p_before and t.created_at = p_at
      from ducto_private.transactions as t
      where t.account_id = p_account_id and t.seq = v_middle)
    then
      v_low := v_middle;
    else
      v_high := v_middle - 1;
    end if;
  end loop;
  return v_low;
end
$$;

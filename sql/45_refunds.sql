-- Refunds: a charge or a removal undone, in full or in part.

create or replace function ducto_private.refund_refusal(p_error text, p_account ducto_private.accounts) returns ducto.refund_result
language plpgsql immutable
as $$
begin
  return row(null, null, null, 0, coalesce(p_account.balance, 0), p_error, 0, 0, false, coalesce(p_account.revision, 0))::ducto.refund_result;
end
$$;

create or replace function ducto_private.refund_answer(p_row ducto_private.ledger, p_idempotent boolean)
returns ducto.refund_result
language plpgsql immutable
as $$
begin
  return row(p_row.transaction_id, p_row.refers_to, p_row.account_id, p_row.amount, p_row.balance_after, null,
    -p_row.allowance_used, p_row.allowance_lapsed, p_idempotent, p_row.revision)::ducto.refund_result;
end
$$;

create or replace function ducto.refund_credits(
  p_transaction_id text,
  p_amount bigint default null,
  p_reason text default null,
  p_metadata jsonb default null,
  p_idempotency_key text default null,
  p_user_id text default null)
returns ducto.refund_result
language plpgsql volatile
as $$
declare
  v_id uuid;
  v_fingerprint bigint;
  v_charge ducto_private.ledger;
  v_account ducto_private.accounts;
  v_member ducto_private.team_members;
  v_row ducto_private.ledger;
  v_now timestamptz;
  v_due boolean;
  v_zone text;
  v_charged numeric;
  v_refunded numeric;
  v_to_balance bigint;
  v_to_allowance bigint;
  v_homes text[];
  v_is_removal boolean;
  v_purchased bigint;
  v_restored bigint := 0;
  v_from_lots bigint;
  v_given bigint;
begin
  perform ducto_private.check_amount(coalesce(p_amount, 1), 1);
  perform ducto_private.check_short(p_reason, 'p_reason');
  perform ducto_private.check_metadata(p_metadata);
  perform ducto_private.check_key(p_idempotency_key);
  v_fingerprint := jsonb_hash_extended(jsonb_build_array('refund_credits', lower(p_transaction_id), p_amount), 0);
  v_charge := ducto_private.find_moved(p_transaction_id, p_user_id);
  if v_charge.transaction_id is null then
    v_account := ducto_private.lock_account(p_user_id);
    v_homes := array[p_user_id];
  else
    v_account := ducto_private.lock_home(v_charge.account_id, v_charge.seq);
    v_homes := ducto_private.homes(v_charge.account_id, v_charge.seq);
  end if;
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  v_due := ducto_private.is_due(v_account, v_now);
  v_account := ducto_private.without_expired(v_account, v_now);
  v_row := ducto_private.find_key_in(v_homes, p_idempotency_key);
  if v_row.transaction_id is not null then
    if v_row.fingerprint is distinct from v_fingerprint then
      return ducto_private.refund_refusal('idempotency_conflict', v_account);
    end if;
    return ducto_private.refund_answer(v_row, true);
  end if;
  if v_charge.transaction_id is null then
    return ducto_private.refund_refusal('transaction_not_found', v_account);
  end if;
  v_charged := v_charge.allowance_used::numeric - v_charge.amount;
  v_is_removal := v_charge.type = 'removal';
  if v_charge.type not in ('usage', 'removal') or v_charged = 0 then
    return ducto_private.refund_refusal('not_refundable', v_account);
  end if;
  select coalesce(sum(t.amount - t.allowance_used::numeric + d.allowance_lapsed), 0), coalesce(sum(t.amount), 0)
  into v_refunded, v_given
  from ducto_private.transaction_details as d
  join ducto_private.transactions as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
  where d.account_id = any (v_homes) and d.refers_to = v_charge.transaction_id and t.type = 'refund';
  if v_refunded >= v_charged then
    return ducto_private.refund_refusal('already_refunded', v_account);
  elsif p_amount > v_charged - v_refunded then
    return ducto_private.refund_refusal('refund_exceeds_original', v_account);
  end if;

  -- A charge took allowance first, so the balance gets its part back first. Allowance of a period that is over lapses, as that
  -- of another account does.
  v_to_allowance := coalesce(p_amount, v_charged - v_refunded);
  v_to_balance := least(v_to_allowance, -v_charge.amount - v_given);
  v_to_allowance := v_to_allowance - v_to_balance;
  perform ducto_private.check_range(v_account.balance::numeric + v_to_balance, 'the balance', v_account.account_id);
  if v_due then
    perform ducto_private.write_expiry(v_account.account_id, v_now);
  end if;
  if v_to_allowance > 0 and v_charge.account_id = v_account.account_id and v_charge.created_at >= v_account.allowance_start and v_now < v_account.allowance_end then
    v_restored := least(v_to_allowance, v_account.allowance_used);
  end if;
  if (v_account.caps > 0 or v_charge.member_id is not null) and v_to_balance > 0 and not v_is_removal
    and v_charge.account_id = v_account.account_id
  then
    v_zone := ducto_private.ledger_zone();
    -- Caps give back what was charged in their present window.
    update ducto_private.spend_caps as s
    set spent = n.spent - v_to_balance, window_date = n.window_date
    from ducto_private.current_caps(v_account.account_id, v_now, v_zone, array['', 'model ' || v_charge.model,
      'model ' || v_charge.resolved_model] || ducto_private.label_subjects(v_charge.labels)) as n
    where s.account_id = v_account.account_id and s.subject = n.subject and s.cap_type = n.cap_type
      and n.window_date = ducto_private.window_date(n.cap_type, v_charge.created_at, v_zone);
    if v_charge.member_id is not null then
      select m.*
      into v_member
      from ducto_private.team_members as m
      where m.account_id = v_account.account_id and m.user_id = v_charge.member_id;
      perform ducto_private.debit_member(v_member, v_now, v_zone, -v_to_balance, v_charge.created_at);
    end if;
  end if;
  if v_is_removal then
    v_purchased := case (ducto_private.find_transaction(v_charge.refers_to::text, null)).type when 'purchase' then v_to_balance else 0 end;
    perform ducto_private.check_range(v_account.lifetime_purchased::numeric + v_purchased, 'lifetime_purchased', v_account.account_id);
  end if;
  v_id := ducto_private.post(v_account.account_id, v_now, 'refund', v_to_balance, p_idempotency_key, v_fingerprint, p_metadata,
    p_purchased => v_purchased, p_model => v_charge.model, p_resolved_model => v_charge.resolved_model, p_refers_to => v_charge.transaction_id,
    p_member_id => v_charge.member_id, p_allowance_restored => v_restored, p_allowance_lapsed => v_to_allowance - v_restored,
    p_reason => p_reason, p_labels => v_charge.labels);

  -- Credits that came from no lot return first, and a debt is paid before lots get any back.
  v_from_lots := (
    select coalesce(-sum(e.amount), 0)
    from ducto_private.lot_entries as e
    where e.transaction_id = v_charge.transaction_id and e.account_id = v_charge.account_id);
  if v_from_lots > 0 then
    perform ducto_private.restore_lots(v_homes, v_now, v_id, v_charge,
      v_given + v_to_balance + v_charge.amount + v_from_lots,
      v_to_balance - greatest(0, ducto_private.kept_for_holds(v_account.account_id, v_now) - v_account.balance::numeric));
    if v_is_removal then
      perform ducto_private.write_expiry(v_account.account_id, v_now);
    end if;
  end if;
  perform ducto_private.after_call(v_account, v_now);
  v_row := ducto_private.find_transaction(v_id::text, v_account.account_id);
  return ducto_private.refund_answer(v_row, false);
end
$$;
comment on function ducto.refund_credits is
  'Gives back a charge, in full (without p_amount) or in part; all refunds of a charge together never exceed it. What '
  'the balance paid comes back first, then what the allowance paid, which lapses if its month is over. A removal is '
  'given back alike, to the lots from which it was taken, as if the grant had never been touched.';

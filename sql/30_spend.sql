-- The one road of all that claims or takes credits: holds, extensions, charges and settlements.
--
-- spend() loads an account under its lock, decides on variables, and writes last, so that a refusal leaves no trace. PL/pgSQL
-- prepares each expression anew in each transaction, and a charge is usually one. So there are few expressions here, none
-- that the account does not use, and two small rules stand in place of a call. For the same reason the RPCs build their
-- requests by position: see the type ducto_private.request.

-- A hash of what makes two holds, extensions or charges the same request. Counts of zero are left out, as nulls were before.
-- The labels are sorted already, and null where there are none.
create or replace function ducto_private.fingerprint(p_request ducto_private.request) returns bigint
language plpgsql immutable
as $$
begin
  return jsonb_hash_extended(jsonb_build_array(p_request.call,
    jsonb_path_query_array(p_request.usage, '$.keyvalue() ? (@.value.type() <> "number" || @.value <> 0)'), p_request.amount, p_request.model,
    lower(p_request.hold_id), p_request.final, p_request.member_id, p_request.operation_type)
    || coalesce(to_jsonb(p_request.occurred_at at time zone 'UTC'), '[]')
    || case when num_nonnulls(p_request.labels, p_request.overrun) > 0
      then jsonb_build_array(jsonb_build_object('labels', p_request.labels, 'overrun', p_request.overrun)) else '[]' end, 0);
end
$$;

-- The answer of a refusal: nothing but why, and the account as it stands.
create or replace function ducto_private.charge_refusal(
  p_error text, p_account ducto_private.accounts, p_shortfall bigint default 0) returns ducto.deduction_result
language plpgsql immutable
as $$
begin
  return row(null, null, 0, coalesce(p_account.balance, 0), false, p_error, 0, 0, p_shortfall, '{}'::text[],
    coalesce(p_account.revision, 0))::ducto.deduction_result;
end
$$;

create or replace function ducto_private.hold_refusal(p_error text, p_account ducto_private.accounts) returns ducto.reserve_result
language plpgsql immutable
as $$
begin
  return row(null, null, 0, coalesce(p_account.balance, 0), coalesce(p_account.held, 0), p_error, false, null, '{}'::text[],
    coalesce(p_account.revision, 0))::ducto.reserve_result;
end
$$;

-- The first answer of a charge again, to the same request.
create or replace function ducto_private.charge_replay(p_id uuid, p_request ducto_private.request, p_account ducto_private.accounts)
returns ducto.deduction_result
language plpgsql stable
as $$
declare
  v_row constant ducto_private.ledger := ducto_private.find_transaction(p_id::text, p_account.account_id);
  v_first ducto_private.request;
  v_fingerprint bigint := v_row.fingerprint;
begin
  if v_row.type = 'usage' and v_fingerprint is null then
    v_first.call := 'deduct';
    v_first.usage := v_row.usage;
    v_first.final := true;
    v_first.occurred_at := v_row.occurred_at;
    v_first.labels := v_row.labels;
    v_fingerprint := ducto_private.fingerprint(v_first);
  end if;
  if v_fingerprint is distinct from ducto_private.fingerprint(p_request) then
    return ducto_private.charge_refusal('idempotency_conflict', p_account);
  end if;
  return row(v_row.transaction_id, coalesce(v_row.member_id, v_row.account_id), v_row.amount, v_row.balance_after, true, null,
    v_row.cost, v_row.allowance_used, v_row.shortfall, coalesce(v_row.warnings, '{}'), v_row.revision)::ducto.deduction_result;
end
$$;

-- A hold's or an extension's answer as its key remembers it.
create or replace function ducto_private.hold_replay(
  p_key ducto_private.hold_keys, p_request ducto_private.request, p_account ducto_private.accounts) returns ducto.reserve_result
language plpgsql stable
as $$
begin
  if p_key.fingerprint <> ducto_private.fingerprint(p_request) then
    return ducto_private.hold_refusal('idempotency_conflict', p_account);
  end if;
  return row(p_key.hold_id, coalesce((ducto_private.find_hold(p_key.hold_id::text, p_key.account_id)).member_id,
    p_key.account_id), p_key.amount, p_key.balance, p_key.reserved_total, null, true, p_key.expires_at,
    coalesce(p_key.warnings, '{}'), p_key.revision)::ducto.reserve_result;
end
$$;

-- The version whose prices count a body of a request: that of the first answer under its key, of its hold, or of its time; null
-- for the active one.
create or replace function ducto_private.counting_version(p_request ducto_private.request, p_account_id text) returns integer
language plpgsql stable
as $$
begin
  return coalesce(
    (select t.pricing_version
    from ducto_private.transactions as t
    where p_request.action = 'charge' and t.account_id = p_account_id
      and hashtextextended(t.idempotency_key, 0) = hashtextextended(p_request.key, 0) and t.idempotency_key = p_request.key),
    (select h.pricing_version
    from ducto_private.holds as h
    where h.hold_id = ducto_private.to_id(p_request.hold_id) and h.account_id = p_account_id),
    case when p_request.occurred_at < clock_timestamp() then ducto_private.version_at(p_request.occurred_at) end,
    (select h.pricing_version
    from ducto_private.hold_keys as k
    join ducto_private.holds as h on h.hold_id = k.hold_id and h.account_id = k.account_id
    where p_request.action = 'hold' and k.account_id = p_account_id and k.idempotency_key = p_request.key));
end
$$;

-- A usage that read_given() has read, as the config of a version (null: of the active one) counts cached input.
create or replace function ducto_private.counted_usage(p_usage jsonb, p_version integer) returns jsonb
language plpgsql stable
as $$
begin
  if jsonb_typeof(p_usage) is distinct from 'object' or not p_usage ? 'body' then
    return p_usage;
  elsif p_usage -> 'body' ?| '{cache_read_tokens,cache_write_tokens}'
    and (ducto_private.find_terms(p_version, null, clock_timestamp())).cached = 'beside'
  then
    return ducto_private.without_cached(p_usage -> 'body');
  end if;
  return p_usage -> 'body';
end
$$;

-- What is asked, checked as far as that needs no price, its usage without nulls.
create or replace function ducto_private.checked_request(p_request ducto_private.request, p_account_id text)
returns ducto_private.request
language plpgsql stable
as $$
begin
  if p_request.amount is null and p_request.job is null then
    p_request.usage := ducto_private.checked_usage(ducto_private.counted_usage(p_request.usage,
      case when p_request.usage ? 'body' then ducto_private.counting_version(p_request, p_account_id) end));
  end if;
  perform ducto_private.check_short(p_request.model, 'p_model');
  perform ducto_private.check_key(p_request.key);
  perform ducto_private.check_metadata(p_request.metadata);
  return p_request;
end
$$;

-- The price of what no composed price covers: a known amount, of which only the model's key is asked, a job, or any usage. At a
-- settlement p_hold_model is the hold's model, '' for none. Usage of an earlier time has the price of that time.
create or replace function ducto_private.price_request(
  p_request ducto_private.request, p_terms ducto_private.terms, p_hold_model text, p_now timestamptz) returns ducto_private.quote
language plpgsql stable
as $$
declare
  v_quote ducto_private.quote;
begin
  if p_hold_model is null and p_request.occurred_at < p_now then
    p_terms := ducto_private.find_terms(ducto_private.version_at(p_request.occurred_at), p_terms.plan_id, p_now);
  end if;
  if p_request.amount is not null then
    v_quote.cost := p_request.amount;
    if p_request.model is not null then
      v_quote.resolved_model := nullif((ducto_private.find_model(p_terms, p_request.model)).key, '_default');
    end if;
  elsif p_request.job is not null then
    v_quote.cost := ducto_private.job_price(p_terms.version, p_request.job);
    v_quote.version := p_terms.version;
  else
    v_quote := ducto_private.price(p_terms, p_request.usage, p_hold_model);
  end if;
  return v_quote;
end
$$;

-- The event of a settlement whose usage has no price: once an account, version, reason and local day.
create or replace function ducto_private.tell_unpriced(
  p_account_id text, p_transaction_id uuid, p_terms ducto_private.terms, p_reason text, p_now timestamptz) returns void
language plpgsql volatile
as $$
begin
  if not exists (
    select
    from ducto_private.transaction_details as d
    join ducto_private.transactions as t on t.transaction_id = d.transaction_id and t.account_id = d.account_id
    where d.account_id = p_account_id and d.price_error = p_reason and t.pricing_version = p_terms.version
      and (t.created_at at time zone p_terms.timezone)::date = (p_now at time zone p_terms.timezone)::date)
  then
    perform ducto_private.emit(p_account_id, 'settlement_unpriced',
      jsonb_build_object('transaction_id', p_transaction_id, 'pricing_version', p_terms.version, 'reason', p_reason), p_now);
  end if;
end
$$;

-- The error that a batch answers where the single call would raise; null for what fails the whole batch.
create or replace function ducto_private.batch_error(p_sqlstate text) returns text
language plpgsql immutable
as $$
begin
  return case p_sqlstate
    when '22023' then 'invalid_argument'
    when '22003' then 'out_of_range'
    when 'DU003' then 'unknown_model'
    when 'DU004' then 'unknown_job'
    when 'DU005' then 'unknown_metric'
    when 'DU006' then 'formula_error'
    when 'DU008' then 'unpriced_usage'
    when 'DU009' then 'negative_price' end;
end
$$;

-- Serves requests on one account, in order, each as if it were the only one. Charges and holds are answered in that order.
create or replace function ducto_private.spend(p_account_id text, p_requests ducto_private.request[]) returns ducto_private.answers
language plpgsql volatile
as $$
declare
  v_account ducto_private.accounts;
  v_new_terms ducto_private.terms;
  v_now timestamptz;
  v_due boolean;
  v_is_new boolean;
  v_written boolean;
  v_rolled boolean;
  v_looks boolean := false;
  v_new_keys boolean;
  v_again boolean;
  v_next integer := 1;
  v_request ducto_private.request;
  v_priced text;
  v_reusable boolean;
  v_terms ducto_private.terms;
  v_price ducto_private.prices;
  v_charges ducto.deduction_result[];
  v_holds ducto.reserve_result[];
begin
  -- A body is read before the account's row is locked, which nobody else can use while that takes. Those of a batch have been.
  if (p_requests[1]).usage ? 'body' and (p_requests[1]).batched is not true then
    v_request := p_requests[1];
    v_request.usage := ducto_private.read_given(v_request.usage);
    p_requests[1] := v_request;
  end if;
  <<calls>>
  loop
    -- Load
    select a.*
    into v_account
    from ducto_private.accounts as a
    where a.account_id = p_account_id
    for no key update;
    if found then
      v_now := greatest(clock_timestamp(), v_account.changed_at);
      if v_account.holds > 0 and v_account.holds_due_at <= v_now or v_account.lots > 0 and v_account.lots_due_at <= v_now
        or v_account.plan_due_at <= v_now
      then
        v_due := true;
        v_account := ducto_private.without_expired(v_account, v_now);
      end if;
    else
      perform ducto_private.check_text(p_account_id, 'p_user_id');
      v_now := clock_timestamp();
      v_is_new := true;
      v_new_terms.version := ducto_private.active_version(v_now);
      if v_new_terms.version is not null then
        v_new_terms := ducto_private.find_terms(v_new_terms.version, null, v_now);
      end if;
      v_account := ducto_private.new_account(p_account_id, 'user', v_now, v_new_terms);
    end if;

    if v_next = 1 and cardinality(p_requests) > 1 then
      -- Of many charges the keys are looked up at once; where one is known or named twice, each by itself.
      select count(distinct k.key) = count(k.key) and not bool_or(exists (
        select
        from ducto_private.transactions as t
        where t.account_id = p_account_id and hashtextextended(t.idempotency_key, 0) = hashtextextended(k.key, 0)
          and t.idempotency_key = k.key))
      into v_new_keys
      from unnest(p_requests) as k
      where k.key is not null;
    end if;

    <<requests>>
    for v_place in v_next .. cardinality(p_requests) loop
      v_request := p_requests[v_place];
      declare
        v_error text;
        v_admits boolean := true;
        v_member_id text;
        v_id uuid;
        v_fingerprint bigint;
        v_key ducto_private.hold_keys;
        v_hold ducto_private.holds;
        v_held bigint;
        v_member ducto_private.team_members;
        v_plan text := coalesce(v_account.plan_id, '');
        v_model text := coalesce(v_request.model, v_request.usage ->> 'model');
        v_version integer;
        v_cost numeric;
        v_full_cost numeric;
        v_budget numeric;
        v_amount bigint;
        v_left bigint := 0;
        v_left_after bigint := 0;
        v_debit bigint;
        v_floor numeric;
        v_shortfall bigint := 0;
        v_check ducto_private.caps_check;
        v_warnings text[];
        v_quote ducto_private.quote;
        v_refused ducto_private.accounts;
      begin
        <<decide>>
        begin
          if v_request.error is not null then
            v_error := v_request.error;
            exit decide;
          end if;
          -- Misuse. A usage of a model in whole counts, with a plain key and no metadata, is known to be sound without a call.
          if (v_request.metadata is null and v_request.model is null
            and (v_request.key is null or v_request.key collate "C" >= '!' and v_request.key collate "C" < '~'
              and octet_length(v_request.key) < 256)
            and coalesce(jsonb_typeof(v_request.usage -> 'model'), '') = 'string' and octet_length(v_model) < 256
            and pg_column_size(v_request.usage) < 16384 and not v_request.usage ?| '{unread,fixed_job}'
            and not (v_request.usage - 'model')
              @? 'strict $.* ? (@.type() <> "number" || @ < 0 || @ >= 1000000000000000 || @.floor() <> @)')
            is not true
          then
            begin
              v_request := ducto_private.checked_request(v_request, p_account_id);
              v_model := coalesce(v_request.model, v_request.usage ->> 'model');
            exception when others then
              v_error := ducto_private.batch_error(sqlstate);
              if not v_request.batched or v_error is null then
                raise;
              end if;
            end;
            exit decide when v_error is not null;
          end if;

          -- The key, and the account's kind
          if v_request.key is not null and v_new_keys is not true then
            if v_request.action = 'charge' then
              select t.transaction_id
              into v_id
              from ducto_private.transactions as t
              where t.account_id = p_account_id and hashtextextended(t.idempotency_key, 0) = hashtextextended(v_request.key, 0)
                and t.idempotency_key = v_request.key;
              if found then
                v_charges := v_charges || ducto_private.charge_replay(v_id, v_request, v_account);
                continue requests;
              end if;
            else
              select k.*
              into v_key
              from ducto_private.hold_keys as k
              where k.account_id = p_account_id and k.idempotency_key = v_request.key;
              if found then
                v_holds := v_holds || ducto_private.hold_replay(v_key, v_request, v_account);
                continue requests;
              end if;
            end if;
          end if;
          if v_request.occurred_at not between v_now - interval '90 days' and v_now + interval '5 minutes' then
            v_error := 'invalid_argument';
            exit decide when v_request.batched;
            perform ducto_private.invalid(
              format('p_occurred_at must be within the last 90 days, or up to 5 minutes ahead, not %s', v_request.occurred_at),
              format('It is %s now; leave it out for what happened just now.', v_now));
          end if;
          if v_is_new or v_account.kind = 'team' or v_request.member_id is not null or v_account.frozen then
            if v_is_new and v_new_terms.version is null then
              perform ducto_private.find_terms(null, null, v_now);
            end if;
            v_error := case
              when v_request.member_id is not null and v_account.kind <> 'team' then 'team_not_found'
              when v_request.member_id is null and v_account.kind = 'team' and v_request.action <> 'extend' then 'is_a_team'
              when v_is_new and v_new_terms.default_plan is null and v_new_terms.signup_bonus = 0 then 'account_not_found'
              when v_account.frozen and (v_request.hold_id is null or v_request.action = 'extend') then 'account_frozen' end;
            exit decide when v_error is not null;
            v_member_id := v_request.member_id;
          end if;

          -- The hold that is settled or extended, and the member
          if v_request.hold_id is not null then
            v_admits := v_request.action = 'extend';
            v_id := ducto_private.to_id(v_request.hold_id);
            select h.*
            into v_hold
            from ducto_private.holds as h
            where h.hold_id = v_id and h.account_id = p_account_id;
            if not found or not v_admits and v_hold.member_id is distinct from v_request.member_id then
              v_error := 'reservation_not_found';
            elsif v_admits then
              v_error := case when v_hold.status <> 'active' or v_hold.expires_at <= v_now then 'reservation_not_active' end;
              v_member_id := v_hold.member_id;
              v_request.min_balance := v_hold.min_balance;
              v_model := v_hold.model;
            elsif v_hold.settled_by is not null and v_request.key is null and v_request.final then
              -- A call without a key that ends a hold is repeated by the hold's id.
              v_charges := v_charges || ducto_private.charge_replay(v_hold.settled_by, v_request, v_account);
              continue requests;
            elsif v_hold.status in ('settled', 'released') then
              v_error := 'reservation_not_active';
            else
              if v_hold.labels is not null then
                v_fingerprint := ducto_private.fingerprint(v_request);
                v_request.labels := tsvector_to_array(array_to_tsvector(v_hold.labels || v_request.labels));
              end if;
              v_version := v_hold.pricing_version;
              v_plan := coalesce(v_hold.plan_id, '');
              v_held := case when v_hold.status = 'active' and v_hold.expires_at > v_now then v_hold.held end;
            end if;
            exit decide when v_error is not null;
          end if;
          if v_member_id is not null then
            select m.*
            into v_member
            from ducto_private.team_members as m
            where m.account_id = p_account_id and m.user_id = v_member_id;
            if v_admits and (v_member.user_id is null or v_member.left_at is not null)
              and (v_request.action <> 'extend' or v_request.amount > 0)
            then
              v_error := 'not_a_member';
              exit decide;
            end if;
          end if;

          -- The price: the version, its terms and its price of the model. These are rows that never change, so in a batch an
          -- element of the same model takes those of the element before. What no composed price covers is priced part by part.
          if (v_reusable and v_priced = v_model and v_version is null) is not true then
            if v_is_new then
              v_version := v_new_terms.version;
            elsif v_version is null then
              select a.version
              into v_version
              from ducto_private.activations as a
              where a.starts_at <= v_now and a.ends_at > v_now;
            end if;
            select t.*
            into v_terms
            from ducto_private.terms as t
            where t.plan_id = v_plan and t.version = v_version;
            select p.*
            into v_price
            from ducto_private.prices as p
            where p.version = v_version and p.section = 'models' and p.key <= v_model
            order by p.key desc
            limit 1;
            if v_request.usage is not null and (v_terms.overrides is null and (v_price.key = v_model or v_terms.aliases is null
              and v_price.key <> '_default' and starts_with(v_model, v_price.key)
              and ducto_private.allows_rest(v_terms.match, substr(v_model, length(v_price.key) + 1)))) is not true
            then
              v_price := ducto_private.find_model(v_terms, v_model);
              if v_price.key = '_default' and v_model is distinct from '_default' then
                v_price.key := null;
              end if;
            end if;
            if v_request.batched then
              v_priced := v_model;
              v_reusable := v_admits;
            end if;
          end if;
          if v_price.composed_id is not null and v_request.usage - v_price.covers - v_terms.covers = '{}'
            and v_request.occurred_at is null and (v_request.usage - 'model' <> '{}' or 'requests' = any (v_price.covers))
            and not v_request.usage @? v_terms.misfits
          then
            v_cost := ducto_private.evaluate(v_price.composed_id, v_request.usage, v_price.composed_rates) * v_terms.factor;
            if v_cost <= 0 then
              v_cost := case when v_model not in ('', 'none') and v_request.usage - 'provider_cost' @? 'strict $.* ? (@ > 0)' then 0 end;
            end if;
          end if;
          if v_cost is null or v_cost > 9223372036854775807 then
            v_reusable := false;
            if v_terms.version is null then
              v_terms := ducto_private.find_terms(null, v_plan, v_now);
            end if;
            begin
              v_quote := ducto_private.price_request(v_request, v_terms, case when not v_admits then coalesce(v_hold.model, '') end,
                v_now);
              v_cost := v_quote.cost;
              v_price.key := case v_request.action when 'extend' then v_hold.resolved_model else v_quote.resolved_model end;
              v_warnings := v_quote.warnings;
            exception when others then
              v_error := ducto_private.batch_error(sqlstate);
              if v_error is not null and not v_admits then
                -- The work is done: what has no price is charged as it was held, and a part of it at the end.
                v_error := null;
                v_quote.price_error := sqlerrm;
                v_cost := case when v_request.final then v_hold.held else 0 end;
                v_price.key := null;
                v_warnings := '{priced_by_hold}';
              elsif not v_request.batched or v_error is null then
                raise;
              end if;
            end;
            exit decide when v_error is not null;
          end if;

          -- A settlement has the account's present allowance, and a bounded hold is a budget of costs: a part may not pass what
          -- is left of it, the end charges no more. What no formula prices is charged as it was held, within any bound.
          if not v_admits then
            select t.free_allowance, t.low_balance, t.min_balance, t.period, t.anchored, t.rollover
            into v_terms.free_allowance, v_terms.low_balance, v_terms.min_balance, v_terms.period, v_terms.anchored,
              v_terms.rollover
            from ducto_private.terms as t
            where t.plan_id = coalesce(v_account.plan_id, '') and t.version = (
              select a.version
              from ducto_private.activations as a
              where a.starts_at <= v_now and a.ends_at > v_now);
            v_budget := greatest(0, case when v_held is null then v_hold.held else v_hold.given - v_hold.cost end);
            if v_cost > v_budget and v_warnings is distinct from '{priced_by_hold}' then
              v_terms.overrun := coalesce(v_hold.overrun, v_terms.overrun);
              if v_terms.overrun = 'bounded' then
                if not v_request.final then
                  v_shortfall := least(9223372036854775807, ceil(v_cost - v_budget));
                  v_error := 'hold_exceeded';
                  exit decide;
                end if;
                v_full_cost := v_cost;
                v_cost := v_budget;
              end if;
              if v_terms.overrun <> 'reject' then
                v_warnings := v_warnings || '{hold_exceeded}'::text[];
              end if;
            end if;
          end if;

          -- Cost to credits, and what the allowance pays of them
          v_amount := case
            when v_request.action <> 'charge' or v_terms.rounding = 'up' then ceil(v_cost)
            when v_terms.rounding = 'carry' then floor(v_account.carry + v_cost)
            when v_terms.rounding = 'down' then floor(v_cost)
            else floor(v_cost + 0.5) end;
          if v_account.plan_id is not null then
            if v_account.allowance_end is null or v_now >= v_account.allowance_end then
              v_account := ducto_private.roll_allowance(v_account, v_terms, v_now);
              v_rolled := true;
            end if;
            v_left := greatest(0, v_terms.free_allowance - v_account.allowance_used + v_account.rolled);
          end if;
          v_debit := case v_request.action when 'charge' then v_amount - least(v_amount, v_left) else 0 end;

          -- Caps, the member's cap, and funds
          if v_account.caps > 0 or v_member_id is not null then
            if v_account.caps > 0 then
              v_check := ducto_private.check_caps(p_account_id, v_now, v_terms.timezone, array['', 'model ' || v_model,
                'model ' || v_price.key] || ducto_private.label_subjects(coalesce(v_request.labels, v_hold.labels)), v_account.held, v_amount, v_left, v_debit, v_admits);
            end if;
            v_error := case
              when v_check.denied then 'spend_cap_exceeded'
              when v_admits and v_member.spend_cap is not null
                and ducto_private.member_exceeds(v_member, v_now, v_terms.timezone, v_account.held, v_amount, v_left)
                then 'member_cap_exceeded' end;
            exit decide when v_error is not null;
          end if;
          if v_admits then
            -- What is asked, with all holds and after the allowance, may take the balance no lower than its floor. Sums may
            -- pass bigint where the answer is no; they need not be made where the balance alone is enough.
            if v_account.held > 0 or v_account.balance < v_amount
              or v_account.balance - v_amount < coalesce(v_request.min_balance, v_terms.min_balance)
            then
              if v_amount > 0 and v_account.held::numeric + v_amount - v_left > greatest(0, v_account.balance::numeric
                + v_account.credit_limit
                - coalesce(v_request.min_balance, case v_account.kind when 'team' then 0 else v_terms.min_balance end))
              then
                v_error := 'insufficient_credits';
                exit decide;
              elsif v_request.action <> 'charge' then
                perform ducto_private.check_range(v_account.held::numeric + v_amount, 'the holds', p_account_id);
              end if;
            end if;
          else
            if v_held is null then
              v_warnings := v_warnings || '{reservation_expired}'::text[];
            end if;
            -- Above the held amount: all of the account that other holds do not claim, then debt or a refusal.
            if v_amount > coalesce(v_held, 0) then
              v_shortfall := least(9223372036854775807, greatest(0, v_amount - coalesce(v_held, 0)::numeric
                - greatest(0, v_account.balance::numeric + v_left + v_account.credit_limit - v_account.held)));
              if v_shortfall > 0 and coalesce(v_hold.overrun, v_terms.overrun) = 'reject' then
                v_error := 'insufficient_credits';
                exit decide;
              end if;
            end if;
            if v_account.balance::numeric - v_debit < -9223372036854775807
              or v_hold.charged::numeric + v_amount > 9223372036854775807
            then
              if not v_request.batched then
                perform ducto_private.check_range(v_account.balance::numeric - v_debit, 'the balance', p_account_id);
                perform ducto_private.check_range(v_hold.charged::numeric + v_amount, 'what the hold charged', p_account_id);
              end if;
              v_error := 'out_of_range';
              exit decide;
            end if;
          end if;

          -- Write
          if v_is_new or v_due then
            if v_due then
              v_account.seq := v_account.seq + ducto_private.write_expiry(p_account_id, v_now);
              select a.revision
              into v_account.revision
              from ducto_private.accounts as a
              where a.account_id = p_account_id;
            else
              if not ducto_private.open_account(v_account, v_terms.version) then
                -- Another session opened it first: begin again.
                v_is_new := false;
                v_new_terms := null;
                v_charges := null;
                v_holds := null;
                continue calls;
              end if;
              v_account.seq := (v_account.balance > 0)::integer;
              v_account.revision := v_account.seq;
              v_new_terms := null;
            end if;
            v_is_new := false;
            v_due := false;
          end if;
          v_written := true;
          if v_account.refused is not null and v_admits and v_amount > 0 then
            v_account.refused := null;
            update ducto_private.accounts as a
            set refused = null
            where a.account_id = p_account_id;
          end if;
          if v_account.caps > 0 or v_member_id is not null then
            if (v_debit > 0 or v_check.has_event) and ducto_private.debit_caps(v_check, v_debit, v_now) then
              v_warnings := v_warnings || '{spend_cap_exceeded}'::text[];
            end if;
            if v_request.action = 'charge' and v_member_id is not null
              and ducto_private.debit_member(v_member, v_now, v_terms.timezone, v_debit, v_now)
            then
              v_warnings := v_warnings || '{member_cap_exceeded}'::text[];
            end if;
          end if;

          if v_request.action <> 'charge' then
            if v_request.action = 'hold' then
              insert into ducto_private.holds (account_id, member_id, held, created_at, expires_at, min_balance, pricing_version,
                plan_id, operation_type, model, resolved_model, metrics, metadata, idempotency_key, given, overrun, labels)
              values (p_account_id, v_member_id, v_amount, v_now, v_now + make_interval(secs => v_request.ttl_seconds), v_request.min_balance,
                v_terms.version, v_account.plan_id, v_request.operation_type, v_model, v_price.key, v_request.usage,
                v_request.metadata, v_request.key, v_amount, v_request.overrun, v_request.labels)
              returning hold_id, held, expires_at into v_id, v_hold.held, v_hold.expires_at;
              v_account.holds_due_at := case when v_account.holds > 0 then least(v_account.holds_due_at, v_hold.expires_at)
                else v_hold.expires_at end;
              v_account.holds := v_account.holds + 1;
            else
              update ducto_private.holds as h
              set held = h.held + v_amount,
                given = h.given + v_amount,
                expires_at = greatest(h.expires_at, v_now + make_interval(secs => v_request.ttl_seconds))
              where h.hold_id = v_hold.hold_id and h.account_id = p_account_id
              returning h.hold_id, h.held, h.expires_at into v_id, v_hold.held, v_hold.expires_at;
            end if;
            v_account.held := v_account.held + v_amount;
            v_account.revision := v_account.revision + 1;
            if v_request.key is not null then
              insert into ducto_private.hold_keys (account_id, idempotency_key, fingerprint, hold_id, amount, balance,
                reserved_total, revision, expires_at, warnings)
              values (p_account_id, v_request.key, ducto_private.fingerprint(v_request), v_id, v_hold.held, v_account.balance, v_account.held,
                v_account.revision, v_hold.expires_at, v_warnings);
            end if;
            v_holds := v_holds || row(v_id, coalesce(v_member_id, p_account_id), v_hold.held, v_account.balance, v_account.held, null, false,
              v_hold.expires_at, coalesce(v_warnings, '{}'), v_account.revision)::ducto.reserve_result;
            continue requests;
          end if;

          if v_left > 0 then
            v_account.allowance_used := v_account.allowance_used + (v_amount - v_debit);
            v_left_after := v_left - (v_amount - v_debit);
            if v_left_after <= (v_left_after + v_account.allowance_used) / 5 then
              v_account := ducto_private.tell_allowance(v_account, v_left_after, v_now);
            end if;
          end if;
          if v_fingerprint is null and (v_request.call <> 'deduct' or not v_admits or not v_request.final) then
            v_fingerprint := ducto_private.fingerprint(v_request);
          end if;
          insert into ducto_private.transactions (seq, amount, balance_after, allowance_used, revision, created_at, fingerprint,
            pricing_version, account_id, type, carry_after, cost, usage, model, resolved_model, plan_id, member_id, hold_id,
            idempotency_key, metadata, labels)
          values (v_account.seq + 1, -v_debit, v_account.balance - v_debit, v_amount - v_debit, v_account.revision + 1, v_now,
            v_fingerprint, coalesce(v_quote.version, v_terms.version), p_account_id, 'usage',
            case v_terms.rounding when 'carry' then trim_scale(v_account.carry + v_cost - v_amount) else v_account.carry end,
            coalesce(v_full_cost, v_cost), v_request.usage - 'model', v_model, v_price.key, nullif(v_plan, ''), v_member_id, v_hold.hold_id,
            v_request.key, v_request.metadata, v_request.labels)
          returning transaction_id, seq, balance_after, revision, carry_after
          into v_id, v_account.seq, v_account.balance, v_account.revision, v_account.carry;
          if (v_account.balance <= 0 or v_account.balance - v_terms.min_balance <= coalesce(v_account.low_balance, v_terms.low_balance))
            and v_left_after <= coalesce(v_account.low_balance, v_terms.low_balance) and v_amount > 0
          then
            v_floor := case v_account.kind when 'team' then 0 else v_terms.min_balance end - v_account.credit_limit::numeric;
            perform ducto_private.emit_balance_events(p_account_id, v_account.balance + v_debit, v_account.balance,
              greatest(v_account.held, v_left + greatest(0, v_account.balance + v_debit - v_floor)),
              greatest(v_account.held - case when v_request.final then coalesce(v_held, 0) else least(coalesce(v_held, 0), v_amount) end,
                v_left_after + greatest(0, v_account.balance - v_floor)),
              coalesce(v_account.low_balance, v_terms.low_balance), v_now);
          end if;
          v_charges := v_charges || row(v_id, coalesce(v_member_id, p_account_id), -v_debit, v_account.balance, false, null,
            coalesce(v_full_cost, v_cost), v_amount - v_debit, v_shortfall, coalesce(v_warnings, '{}'), v_account.revision)::ducto.deduction_result;
          if not v_admits or v_warnings is not null or v_account.lots > 0 or v_request.occurred_at is not null then
            if v_quote.price_error is not null then
              perform ducto_private.tell_unpriced(p_account_id, v_id, v_terms, v_quote.price_error, v_now);
            end if;
            if v_shortfall > 0 or v_warnings is not null or v_request.occurred_at is not null then
              insert into ducto_private.transaction_details (transaction_id, account_id, seq, allowance_lapsed, shortfall, warnings,
                occurred_at, rounding, price_error, bounded_cost)
              values (v_id, p_account_id, v_account.seq, 0, v_shortfall, v_warnings, v_request.occurred_at,
                case when v_quote.version <> v_terms.version then v_terms.rounding end, v_quote.price_error,
                case when v_full_cost is not null then v_cost end);
            end if;
            if v_account.lots > 0 and v_debit > 0 then
              perform ducto_private.debit_lots(p_account_id, v_now, v_id, v_debit, coalesce(v_held, 0), v_hold.created_at);
              select a.lots, a.lots_due_at
              into v_account.lots, v_account.lots_due_at
              from ducto_private.accounts as a
              where a.account_id = p_account_id;
            end if;
            if not v_admits then
              update ducto_private.holds as h
              set charged = h.charged + v_amount,
                cost = h.cost + v_cost,
                held = case when v_request.final then 0 else greatest(0, h.held - v_amount) end,
                status = case when v_request.final then 'settled' else h.status end,
                ended_at = case when v_request.final then coalesce(h.ended_at, v_now) else h.ended_at end,
                settled_by = case when v_request.final and v_request.key is null then v_id end
              where h.hold_id = v_hold.hold_id and h.account_id = p_account_id
              returning h.held into v_hold.held;
              if v_held is not null then
                v_account.held := v_account.held - (v_held - v_hold.held);
                v_account.holds := v_account.holds - v_request.final::integer;
                if v_account.lots > 0 then
                  -- What due lots had kept for this hold may expire now: the rest of a batch loads the account again.
                  v_account.lots_due_at := v_now;
                  if v_request.batched and ducto_private.kept_for_holds(p_account_id, v_now) > 0 then
                    v_next := v_place + 1;
                    v_again := true;
                    exit requests;
                  end if;
                end if;
              end if;
            end if;
          end if;
          continue requests;
        end;

        -- A refusal
        if not coalesce(v_is_new, false) and v_error <> 'team_not_found' then
          if v_error = 'insufficient_credits' then
            v_account := ducto_private.tell_refusal(v_account, v_amount, coalesce(v_member_id, p_account_id), v_now);
            v_looks := true;
          end if;
          v_refused := v_account;
        end if;
        if v_request.action = 'charge' then
          v_charges := v_charges || ducto_private.charge_refusal(v_error, v_refused,
            case when v_error in ('insufficient_credits', 'hold_exceeded') then v_shortfall else 0 end);
        else
          v_holds := v_holds || ducto_private.hold_refusal(v_error, v_refused);
        end if;
      end;
    end loop;

    if v_written then
      update ducto_private.accounts as a
      set balance = v_account.balance,
        held = v_account.held,
        seq = v_account.seq,
        revision = v_account.revision,
        allowance_used = v_account.allowance_used,
        changed_at = v_now,
        holds_due_at = v_account.holds_due_at,
        lots_due_at = v_account.lots_due_at,
        holds = v_account.holds,
        lots = v_account.lots,
        carry = v_account.carry
      where a.account_id = p_account_id;
      if v_rolled then
        update ducto_private.accounts as a
        set allowance_start = v_account.allowance_start,
          allowance_end = v_account.allowance_end,
          rolled = v_account.rolled,
          anchor = v_account.anchor,
          anchor_until = v_account.anchor_until
        where a.account_id = p_account_id;
      end if;
      if v_account.auto_topup or v_account.refused is not null then
        v_looks := true;
      end if;
    end if;
    exit calls when v_again is not true;
    v_again := false;
    v_due := false;
    v_written := false;
    v_rolled := false;
    v_reusable := false;
  end loop;
  if v_looks then
    perform ducto_private.after_call(v_account, v_now);
  end if;
  return row(v_charges, v_holds)::ducto_private.answers;
end
$$;

-- Caps: bounds on the credits debited from a balance in a local day, week or month or in all, of an account or of a member of
-- a team.
--
-- What was spent stands in the cap's own row, for the window that the row names. Whoever sets a cap counts its window from the
-- ledger; from then on every charge that the cap matches keeps the row, so that no charge sums its history.

-- Each of p_labels as the subject of a cap; null for none.
create or replace function ducto_private.label_subjects(p_labels text[]) returns text[]
language plpgsql immutable strict
as $$
declare
  v_label text;
  v_subjects text[];
begin
  foreach v_label in array p_labels loop
    v_subjects := v_subjects || ('label ' || v_label);
  end loop;
  return v_subjects;
end
$$;

-- The first local date of the day, week or month in which p_now lies; -infinity for a lifetime.
create or replace function ducto_private.window_date(p_period text, p_now timestamptz, p_zone text) returns date
language plpgsql immutable
as $$
begin
  return case p_period
    when 'daily' then (p_now at time zone p_zone)::date
    when 'weekly' then date_trunc('week', p_now at time zone p_zone)::date
    when 'monthly' then date_trunc('month', p_now at time zone p_zone)::date
    else '-infinity' end;
end
$$;

create or replace function ducto_private.window_end(p_period text, p_first date, p_zone text) returns timestamptz
language plpgsql stable
as $$
begin
  return case p_period
    when 'daily' then ducto_private.first_instant(p_first + interval '1 day', p_zone)
    when 'weekly' then ducto_private.first_instant(p_first + interval '1 week', p_zone)
    when 'monthly' then ducto_private.first_instant(p_first + interval '1 month', p_zone)
    else 'infinity' end;
end
$$;

-- What was debited in the window that begins on p_first, net of refunds of its charges (not of removals). Only within three hours of the window's
-- ends can a clock that is put back make the local date ambiguous, so only there each row's date is asked.
create or replace function ducto_private.window_spent(
  p_account_id text, p_period text, p_first date, p_zone text, p_subject text, p_member_id text) returns numeric
language plpgsql stable
as $$
declare
  v_start timestamptz := ducto_private.first_instant(p_first, p_zone);
  v_end timestamptz := ducto_private.window_end(p_period, p_first, p_zone);
  v_seq bigint := ducto_private.seq_at(p_account_id, v_start, true);
  v_model constant text := case when starts_with(p_subject, 'model ') then substr(p_subject, 7) end;
  v_label constant text := case when starts_with(p_subject, 'label ') then substr(p_subject, 7) end;
begin
  return (
    select coalesce(-sum(t.amount), 0)
    from ducto_private.transactions as t
    where t.account_id = p_account_id and t.seq > v_seq and t.type in ('usage', 'refund')
      and (p_subject = '' or v_model in (t.model, t.resolved_model) or v_label = any (t.labels))
      and (p_member_id is null or t.member_id = p_member_id)
      and (t.type = 'usage' and t.created_at between v_start + interval '3 hours' and v_end - interval '3 hours'
        or ducto_private.window_date(p_period, case t.type when 'usage' then t.created_at else (
          select c.created_at
          from ducto_private.transaction_details as d
          join ducto_private.transactions as c on c.transaction_id = d.refers_to and c.account_id = d.account_id
          where d.transaction_id = t.transaction_id and d.account_id = t.account_id and c.type = 'usage') end, p_zone) = p_first));
end
$$;

-- What the window that begins on p_first has spent, when the last debit that counted was in the window of p_last. That is
-- nothing, but where a clock is put back across the window's begin: then some of it may have been spent before.
create or replace function ducto_private.spent_since(
  p_last date, p_account_id text, p_period text, p_first date, p_zone text, p_subject text, p_member_id text) returns numeric
language plpgsql stable
as $$
declare
  v_start constant timestamptz := ducto_private.first_instant(p_first, p_zone);
begin
  if p_last < p_first and not exists (
    select
    from (values (interval '30 minutes'), (interval '1 hour'), (interval '2 hours'), (interval '3 hours')) as o (shift)
    where ((v_start + o.shift) at time zone p_zone)::date < p_first)
  then
    return 0;
  end if;
  return ducto_private.window_spent(p_account_id, p_period, p_first, p_zone, p_subject, p_member_id);
end
$$;

-- An account's caps on p_subjects (null gives every cap), with what the window of p_now spent.
create or replace function ducto_private.current_caps(p_account_id text, p_now timestamptz, p_zone text, p_subjects text[])
returns setof ducto_private.spend_caps
language plpgsql stable
as $$
begin
  return query
  select c.account_id, c.cap_type, c.subject, c.cap_limit, c.action,
    case when c.window_date = w.first then c.spent
      else ducto_private.spent_since(c.window_date, p_account_id, c.cap_type, w.first, p_zone, c.subject, null) end,
    w.first, c.warned_date
  from ducto_private.spend_caps as c
  cross join lateral ducto_private.window_date(c.cap_type, p_now, p_zone) as w (first)
  where c.account_id = p_account_id and (p_subjects is null or c.subject = any (p_subjects));
end
$$;

-- What an amount would do to the caps on p_subjects. Of the answer, caps are all of them as they stand at p_now, exceeded those
-- that it would exceed, and room what each of these has left (negative) after it. All the account's holds hold p_held, its
-- allowance has p_left left, and a charge would debit p_debit (a hold 0). A settlement is never refused (p_admits false): it
-- exceeds the caps that its debit goes beyond. The plan is generic, because PostgreSQL would plan anew for each list of subjects.
create or replace function ducto_private.check_caps(
  p_account_id text, p_now timestamptz, p_zone text, p_subjects text[], p_held bigint, p_amount bigint, p_left bigint,
  p_debit bigint, p_admits boolean)
returns ducto_private.caps_check
language plpgsql stable
set plan_cache_mode = force_generic_plan
as $$
declare
  v_today constant date := (p_now at time zone p_zone)::date;
  v_first date;
  v_held numeric;
  v_after numeric;
  v_exceeds boolean;
  v_cap ducto_private.spend_caps;
  v_caps ducto_private.spend_caps[];
  v_check ducto_private.caps_check;
begin
  select array_agg(c)
  into v_caps
  from ducto_private.spend_caps as c
  where c.account_id = p_account_id and c.subject = any (p_subjects);
  v_check.denied := false;
  v_check.has_event := false;
  v_check.moved := false;
  if v_caps is null then
    return v_check;
  end if;
  foreach v_cap in array v_caps loop
    v_first := case v_cap.cap_type when 'daily' then v_today when 'lifetime' then v_cap.window_date
      when 'monthly' then date_trunc('month', v_today)::date else date_trunc('week', v_today)::date end;
    if v_cap.window_date <> v_first then
      v_cap.spent := ducto_private.spent_since(v_cap.window_date, p_account_id, v_cap.cap_type, v_first, p_zone, v_cap.subject, null);
      v_cap.window_date := v_first;
      v_check.moved := true;
    end if;
    if p_admits then
      v_held := p_held;
      if p_held > 0 and v_cap.subject <> '' then
        v_held := (
          select coalesce(sum(h.held), 0)
          from ducto_private.holds as h
          where h.account_id = p_account_id and h.status = 'active' and h.expires_at > p_now
            and (v_cap.subject in ('model ' || h.model, 'model ' || h.resolved_model)
              or starts_with(v_cap.subject, 'label ') and substr(v_cap.subject, 7) = any (h.labels)));
      end if;
      v_after := least(v_held + p_amount, greatest(0, p_held::numeric + p_amount - p_left));
      v_exceeds := v_cap.spent + v_after > v_cap.cap_limit and v_after > least(v_held, greatest(0, p_held::numeric - p_left));
    else
      v_after := p_debit;
      v_exceeds := p_debit > 0 and v_cap.spent + p_debit > v_cap.cap_limit;
    end if;
    if v_exceeds then
      v_check.exceeded := v_check.exceeded || v_cap;
      v_check.room := v_check.room || v_cap.cap_limit - v_cap.spent - v_after;
      v_check.denied := v_check.denied or p_admits and v_cap.action = 'deny';
      v_check.has_event := true;
    elsif v_cap.action = 'deny' and v_cap.spent + p_debit >= v_cap.cap_limit then
      v_check.has_event := true;
    end if;
    v_check.caps := v_check.caps || v_cap;
  end loop;
  return v_check;
end
$$;

-- Counts a debit (of a hold 0) in the caps that check_caps() found, and writes the events of those that it reaches or exceeds.
-- Returns whether it exceeds any.
create or replace function ducto_private.debit_caps(p_check ducto_private.caps_check, p_debit bigint, p_now timestamptz)
returns boolean
language plpgsql volatile
set plan_cache_mode = force_generic_plan
as $$
declare
  v_account_id constant text := p_check.caps[1].account_id;
begin
  if v_account_id is null then
    return false;
  end if;
  if p_check.moved then
    update ducto_private.spend_caps as s
    set spent = c.spent, window_date = c.window_date
    from unnest(p_check.caps) as c
    where s.account_id = v_account_id and s.subject = c.subject and s.cap_type = c.cap_type;
  end if;
  if p_debit > 0 then
    update ducto_private.spend_caps as s
    set spent = s.spent + p_debit
    where s.account_id = v_account_id and s.subject = any (array(select c.subject from unnest(p_check.caps) as c));
  end if;
  if not p_check.has_event then
    return false;
  end if;
  with told as (
    update ducto_private.spend_caps as s
    set warned_date = s.window_date
    from unnest(p_check.exceeded) as e
    where s.account_id = v_account_id and s.subject = e.subject and s.cap_type = e.cap_type
      and s.action <> 'deny' and s.warned_date is distinct from s.window_date
    returning s.subject, s.cap_type
  )
  insert into ducto_private.events (event_id, account_id, type, payload, created_at)
  select ducto_private.new_id(), c.account_id, case c.action when 'deny' then 'cap_reached' else 'cap_warned' end,
    jsonb_build_object('cap_type', c.cap_type, 'model', substring(c.subject from '^model (.*)'),
      'label', substring(c.subject from '^label (.*)'), 'limit', c.cap_limit, 'spent', c.spent + p_debit, 'action', c.action), p_now
  from unnest(p_check.caps) as c
  left join told as t on t.subject = c.subject and t.cap_type = c.cap_type
  where case c.action when 'deny' then p_debit > 0 and c.spent < c.cap_limit and c.spent + p_debit >= c.cap_limit
    else t.subject is not null end
  order by c.subject, c.cap_type;
  return coalesce(cardinality(p_check.exceeded) > 0, false);
end
$$;

-- What a member has spent in the period of the member's cap.
create or replace function ducto_private.member_spent(p_member ducto_private.team_members, p_now timestamptz, p_zone text)
returns numeric
language plpgsql stable
as $$
declare
  v_first date := ducto_private.window_date(p_member.spend_cap_period, p_now, p_zone);
begin
  return case
    when v_first = '-infinity' then p_member.total_spent
    when v_first = p_member.window_date then p_member.spent
    else ducto_private.spent_since(p_member.window_date, p_member.account_id, p_member.spend_cap_period, v_first, p_zone, '',
      p_member.user_id) end;
end
$$;

-- Whether an amount would exceed a member's cap; the arguments are those of check_caps().
create or replace function ducto_private.member_exceeds(
  p_member ducto_private.team_members, p_now timestamptz, p_zone text, p_held bigint, p_amount bigint, p_left bigint)
returns boolean
language plpgsql stable
as $$
declare
  v_held numeric;
  v_demand numeric;
begin
  v_held := (
    select coalesce(sum(h.held), 0)
    from ducto_private.holds as h
    where h.account_id = p_member.account_id and h.status = 'active' and h.expires_at > p_now and h.member_id = p_member.user_id);
  v_demand := least(v_held + p_amount, greatest(0, p_held::numeric + p_amount - p_left));
  return v_demand > least(v_held, greatest(0, p_held::numeric - p_left))
    and ducto_private.member_spent(p_member, p_now, p_zone) + v_demand > p_member.spend_cap;
end
$$;

-- Counts a member's debit of the time p_at, or (negative) a refund of it. Returns whether it went beyond the member's cap.
create or replace function ducto_private.debit_member(
  p_member ducto_private.team_members, p_now timestamptz, p_zone text, p_debit bigint, p_at timestamptz)
returns boolean
language plpgsql volatile
as $$
declare
  v_first date := ducto_private.window_date(p_member.spend_cap_period, p_now, p_zone);
  v_spent numeric := ducto_private.member_spent(p_member, p_now, p_zone);
begin
  if v_first = ducto_private.window_date(p_member.spend_cap_period, p_at, p_zone) then
    v_spent := v_spent + p_debit;
  end if;
  update ducto_private.team_members as m
  set spent = v_spent, window_date = v_first, total_spent = m.total_spent + p_debit
  where m.account_id = p_member.account_id and m.user_id = p_member.user_id;
  if p_debit > 0 and v_spent >= p_member.spend_cap and v_spent - p_debit < p_member.spend_cap then
    perform ducto_private.emit(p_member.account_id, 'member_cap_reached', jsonb_build_object('user_id', p_member.user_id,
      'spend_cap', p_member.spend_cap, 'spend_cap_period', p_member.spend_cap_period, 'spent', v_spent), p_now);
  end if;
  return coalesce(p_debit > 0 and v_spent > p_member.spend_cap, false);
end
$$;

-- The answer for a cap of current_caps().
create or replace function ducto_private.cap_answer(p_cap ducto_private.spend_caps, p_revision bigint, p_zone text)
returns ducto.spend_cap
language plpgsql stable
as $$
begin
  return row(p_cap.account_id, p_cap.cap_type, substring(p_cap.subject from '^model (.*)'), p_cap.cap_limit, p_cap.action, null,
    p_revision, ducto_private.at_most_bigint(p_cap.spent),
    nullif(ducto_private.window_end(p_cap.cap_type, p_cap.window_date, p_zone), 'infinity'),
    substring(p_cap.subject from '^label (.*)'))::ducto.spend_cap;
end
$$;

-- What a cap bounds, as its row names it.
create or replace function ducto_private.cap_subject(p_model text, p_label text) returns text
language plpgsql stable
as $$
begin
  if p_model is not null and p_label is not null then
    perform ducto_private.invalid('a cap is for a model or for a label, not for both', 'Set two caps: each bounds for itself.',
      format('p_model is %s, p_label is %s.', p_model, p_label));
  elsif p_label is not null then
    perform ducto_private.check_labels(array[p_label], 'p_label');
  end if;
  return coalesce('model ' || p_model, 'label ' || p_label, '');
end
$$;

create or replace function ducto.set_spend_cap(
  p_user_id text,
  p_limit bigint,
  p_cap_type text default 'daily',
  p_model text default null,
  p_action text default 'deny',
  p_label text default null)
returns ducto.spend_cap
language plpgsql volatile
as $$
declare
  v_zone text;
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_added integer;
  v_cap ducto_private.spend_caps;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_amount(p_limit, 0, 'p_limit');
  v_cap.cap_type := coalesce(p_cap_type, 'daily');
  perform ducto_private.check_choice(v_cap.cap_type, '{daily,weekly,monthly,lifetime}', 'p_cap_type');
  v_cap.action := coalesce(p_action, 'deny');
  perform ducto_private.check_choice(v_cap.action, '{deny,warn,notify}', 'p_action');
  if p_model is not null then
    perform ducto_private.check_text(p_model, 'p_model');
  end if;
  v_cap.subject := ducto_private.cap_subject(p_model, p_label);
  v_zone := (ducto_private.find_terms(null, null, clock_timestamp())).timezone;
  v_account := ducto_private.lock_or_open(p_user_id);
  v_now := v_account.changed_at;
  v_account := ducto_private.expire(v_account, v_now);
  v_cap.account_id := p_user_id;
  v_cap.cap_limit := p_limit;
  update ducto_private.spend_caps as c
  set cap_limit = v_cap.cap_limit, action = v_cap.action
  where c.account_id = p_user_id and c.subject = v_cap.subject and c.cap_type = v_cap.cap_type;
  v_added := (not found)::integer;
  if v_added = 1 then
    v_cap.window_date := ducto_private.window_date(v_cap.cap_type, v_now, v_zone);
    insert into ducto_private.spend_caps (account_id, cap_type, subject, cap_limit, action, spent, window_date)
    values (p_user_id, v_cap.cap_type, v_cap.subject, p_limit, v_cap.action,
      ducto_private.window_spent(p_user_id, v_cap.cap_type, v_cap.window_date, v_zone, v_cap.subject, null),
      v_cap.window_date);
  end if;
  update ducto_private.accounts as a
  set caps = a.caps + v_added, revision = a.revision + 1, changed_at = v_now
  where a.account_id = p_user_id;
  perform ducto_private.after_call(v_account, v_now);
  return (
    select ducto_private.cap_answer(c, v_account.revision + 1, v_zone)
    from ducto_private.current_caps(p_user_id, v_now, v_zone, array[v_cap.subject]) as c
    where c.cap_type = v_cap.cap_type);
end
$$;
comment on function ducto.set_spend_cap is
  'Bounds what is debited from an account''s balance in a local day, week (from Monday) or month, or in all (p_cap_type '
  '''daily'', ''weekly'', ''monthly'' or ''lifetime''): for everything, for one model, or by charges and holds that carry a '
  'label. Opens the account if it is new. What the window has spent already counts, and a cap that is changed keeps '
  'what it has counted. p_action ''deny'' refuses; ''warn'' and ''notify'' let pass, with a warning in each answer and '
  'one event in each window.';

create or replace function ducto.remove_spend_cap(
  p_user_id text, p_cap_type text, p_model text default null, p_label text default null)
returns ducto.spend_cap
language plpgsql volatile
as $$
declare
  v_zone text := ducto_private.ledger_zone();
  v_account ducto_private.accounts;
  v_now timestamptz;
  v_subject text;
  v_cap ducto_private.spend_caps;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_choice(p_cap_type, '{daily,weekly,monthly,lifetime}', 'p_cap_type');
  v_subject := ducto_private.cap_subject(p_model, p_label);
  v_account := ducto_private.lock_account(p_user_id);
  v_now := greatest(clock_timestamp(), v_account.changed_at);
  select c.*
  into v_cap
  from ducto_private.current_caps(p_user_id, v_now, v_zone, array[v_subject]) as c
  where c.cap_type = p_cap_type;
  if not found then
    return row(null, null, null, 0, null, 'cap_not_found', coalesce(v_account.revision, 0), 0, null, null)::ducto.spend_cap;
  end if;
  delete from ducto_private.spend_caps as c
  where c.account_id = p_user_id and c.subject = v_subject and c.cap_type = p_cap_type;
  v_account := ducto_private.expire(v_account, v_now);
  update ducto_private.accounts as a
  set caps = a.caps - 1, revision = a.revision + 1, changed_at = v_now
  where a.account_id = p_user_id;
  perform ducto_private.after_call(v_account, v_now);
  return ducto_private.cap_answer(v_cap, v_account.revision + 1, v_zone);
end
$$;
comment on function ducto.remove_spend_cap is 'Takes a cap away and answers what it was.';

create or replace function ducto.list_spend_caps(p_user_id text) returns setof ducto.spend_cap
language plpgsql stable
as $$
declare
  v_zone text := ducto_private.ledger_zone();
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  return query
  select x.*
  from ducto_private.accounts as a
  cross join lateral ducto_private.current_caps(p_user_id, greatest(clock_timestamp(), a.changed_at), v_zone, null) as c
  cross join lateral ducto_private.cap_answer(c, a.revision, v_zone) as x
  where a.account_id = p_user_id
  order by c.cap_type, c.subject;
end
$$;
comment on function ducto.list_spend_caps is 'An account''s caps, and what their windows have spent.';

create or replace function ducto.check_spend_cap(p_user_id text, p_model text default null, p_amount bigint default 0)
returns ducto.cap_check_result
language plpgsql stable
as $$
declare
  v_account ducto_private.accounts := ducto_private.read_account(p_user_id);
  v_now timestamptz := v_account.changed_at;
  v_terms ducto_private.terms;
  v_check ducto_private.caps_check;
  v_answer ducto.cap_check_result;
begin
  perform ducto_private.check_text(p_user_id, 'p_user_id');
  perform ducto_private.check_short(p_model, 'p_model');
  perform ducto_private.check_amount(coalesce(p_amount, 0), 0);
  if v_account.caps > 0 then
    v_terms := ducto_private.find_terms(null, v_account.plan_id, v_now);
    v_check := ducto_private.check_caps(p_user_id, v_now, v_terms.timezone,
      array['', 'model ' || p_model, 'model ' || (ducto_private.find_model(v_terms, p_model)).key], v_account.held, coalesce(p_amount, 0),
      ducto_private.allowance_left(v_account, v_terms, v_now), 0, true);
    select c.action = 'deny', ducto_private.at_most_bigint(c.spent), c.cap_limit, c.action, substring(c.subject from '^model (.*)')
    into v_answer.capped, v_answer.current_spend, v_answer.cap_limit, v_answer.action, v_answer.model
    from unnest(v_check.exceeded, v_check.room)
      as c (account_id, cap_type, subject, cap_limit, action, spent, window_date, warned_date, room)
    order by c.action = 'deny' desc, case c.action when 'deny' then c.room end, c.cap_type, c.subject
    limit 1;
  end if;
  v_answer.capped := coalesce(v_answer.capped, false);
  v_answer.current_spend := coalesce(v_answer.current_spend, 0);
  v_answer.cap_limit := coalesce(v_answer.cap_limit, 0);
  v_answer.revision := coalesce(v_account.revision, 0);
  return v_answer;
end
$$;
comment on function ducto.check_spend_cap is
  'Which cap an amount would exceed now: the one that denies with the least room, else one that warns or notifies; zeros where none.';

-- The ledger is append-only: its own triggers refuse to change or remove a row.

-- erase_user() may empty the free texts; nothing else of a row ever changes.
create or replace function ducto_private.refuse_change() returns trigger
language plpgsql
as $$
begin
  if tg_op = 'UPDATE' then
    if new *= jsonb_populate_record(old, '{"metadata": null, "reason": null, "reference": null}'::jsonb) then
      return new;
    end if;
  end if;
  raise exception 'the ledger is append-only: % of ducto_private.% is refused', lower(tg_op), tg_table_name
    using errcode = 'DU007', hint = 'Correct a mistake by a row of its own: refund_credits, remove_credits or add_credits.';
end
$$;

-- A trigger that is there is left alone: making it again would lock the ledger at each upgrade.
do $$
declare
  v_table text;
begin
  foreach v_table in array array['transactions', 'transaction_details'] loop
    continue when exists (
      select from pg_trigger as t
      where t.tgrelid = to_regclass('ducto_private.' || v_table) and t.tgname = 'append_only');
    execute format('create trigger append_only before update or delete on ducto_private.%I
      for each row execute function ducto_private.refuse_change()', v_table);
    execute format('create trigger append_only_truncate before truncate on ducto_private.%I
      for each statement execute function ducto_private.refuse_change()', v_table);
  end loop;
end
$$;

-- What charges cost the company itself.

-- What the provider took for a usage, in the money of the price list: what the usage says, else by the version's costs line of
-- the model, else what the formulas give before factors: those of the list, or of the row's plan (p_own) where it alone has the
-- model. Null where the version cannot price it.
create or replace function ducto_private.provider_cost(
  p_terms ducto_private.terms, p_own ducto_private.terms, p_usage jsonb, p_resolved_model text) returns numeric
language plpgsql stable
as $$
declare
  v_quote ducto_private.quote;
  v_line ducto_private.prices;
  v_model constant text := coalesce(p_resolved_model, p_usage ->> 'model', '');
begin
  if p_usage ? 'provider_cost' then
    return (p_usage -> 'provider_cost')::numeric;
  elsif p_usage is null or p_usage ? 'fixed_job' then
    return null;
  end if;
  v_line := ducto_private.find_price(p_terms, p_terms.version, 'costs', v_model, p_terms.aliases);
  if p_own.overrides is not null and (v_line.key is not null or (ducto_private.find_model(p_terms, v_model)).key is null) then
    p_terms := p_own;
  end if;
  p_terms.factor := 1;
  v_quote := ducto_private.price(p_terms, p_usage, '');
  if v_quote.price_error is not null then
    return null;
  elsif v_line.key is null then
    return v_quote.cost;
  end if;
  return greatest(0, v_quote.cost - v_quote.model_credits + ducto_private.price_part(v_line, p_usage, 1));
exception when others then
  return null;
end
$$;

create or replace function ducto.spend_margin(p_start timestamptz default null, p_end timestamptz default null)
returns setof ducto.spend_margin
language sql stable
as $$
  select c.model, count(*), ducto_private.at_most_bigint(sum(c.spend)), coalesce(sum(c.provider_cost), 0),
    count(*) filter (where c.provider_cost is null), null::text
  from (
    select coalesce(l.resolved_model, l.model, '') collate "C" as model, -l.amount as spend,
      ducto_private.provider_cost(t, o, l.usage, l.resolved_model) as provider_cost
    from ducto_private.ledger as l
    left join ducto_private.terms as t on t.version = l.pricing_version and t.plan_id = ''
    left join ducto_private.terms as o on o.version = l.pricing_version and o.plan_id = l.plan_id
    where l.type = 'usage' and (p_start is null or l.created_at >= p_start) and (p_end is null or l.created_at < p_end)
  ) as c
  group by c.model
  order by sum(c.spend) desc, c.model
$$;
comment on function ducto.spend_margin is
  'What was charged for each model in [p_start, p_end) beside what the provider took for it, in the money of the price list: as its answer said (provider_cost), else by the costs of the charge''s version, else what its formulas give before factors. uncosted counts the charges of which that is unknown.';

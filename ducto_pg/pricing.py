"""Config -> compiled prices: PL/pgSQL functions named by a hash of their text, and the script that publishes them.

The functions of a version, all in `ducto_private`:

- `rates_<hash>(name, model, usage, longer_than)`: the formula that serves a name, among the config's models or a plan's
  overrides. A decision tree finds the greatest key that is not above the name; every key that is a prefix of the name
  is one of that key's own prefixes. Large sets are split into leaves, which a session compiles when it uses them.
- `price_<hash>(version, usage, job, plan, unseen)`: the whole price, and all that a charge needs of the config.
- `plain_<hash>(version, usage)`, of the same hash: the price of a charge that asks for nothing but sums, products and
  quotients of whole counts. It answers null, and never raises, where that is not all there is to say.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ducto_pg import exactjson
from ducto_pg.arithmetic import evaluate, trim_scale
from ducto_pg.config import DEFAULT, SEPARATORS, TOKENS, Formulas, check
from ducto_pg.errors import FormulaError
from ducto_pg.formula import Formula, Variable
from ducto_pg.models import MAX_BIGINT, PricingConfigData, UsageMetrics
from ducto_pg.plpgsql import expression, json_path, text, variable

KEYS_PER_LEAF = 32
INLINED_KEYS = 128
KEY_ONLY = 1_000
PLAIN_COUNTS = 6
PLAIN_RANGES = 384

_RATES = "p_name text, p_model text, p_usage jsonb, p_longer_than integer"
_PLAIN = "p_version integer, p_usage jsonb"
_PRICE = "p_version integer, p_usage jsonb, p_job text, p_plan text, p_unseen boolean"
_LONG_WAY = """
    v_plan text; v_plan_name text; v_allowance bigint; v_terms ducto_private.plans;
    v_overrides text; v_own ducto_private.model_price; v_resolved text; v_path text;
    v_most numeric; v_most_path text;
    v_search numeric; v_job text; v_fixed numeric; v_cache numeric; v_cost numeric;"""
_PLAIN_BODY = """declare
  v_place constant integer := ({places}::integer[])[
    pg_catalog.width_bucket(p_usage ->> 'model' collate "C", array[{bounds}]::text[])];
  v_cost constant numeric := case
    when coalesce(pg_catalog.octet_length(p_usage ->> 'model'), 256) > 255 then null
    when p_usage - {fields}::text[] = '{{}}'::jsonb then pg_catalog.jsonb_path_query_first(
      case when p_usage ?& {counts} then p_usage else {defaults}::jsonb || p_usage end,
      (array[{paths}]::jsonpath[])[v_place], '{{}}', true)::numeric end;
begin
  return row({price})::ducto_private.plain_price;
end"""
_NEVER_PLAIN = """begin
  return case when p_usage is null then row(p_version, null, null, null, null)::ducto_private.plain_price end;
end"""
_CALL_COUNT = (
    "case pg_catalog.jsonb_typeof(p_usage -> 'tool_calls') when 'array'"
    " then pg_catalog.jsonb_array_length(p_usage -> 'tool_calls')::numeric"
    " else coalesce(pg_catalog.trim_scale((p_usage -> 'tool_calls')::numeric), 0) end"
)


@dataclass(frozen=True)
class Compiled:
    """A config, ready to be published.

    `functions` are statements that are safe to repeat, `price_function` the name of the entry, `plans` the rows of
    `ducto_private.plans` without the version, `config_json` the config in full.
    """

    functions: tuple[str, ...]
    price_function: str
    plans: tuple[dict[str, Any], ...]
    config_json: str


def compile_prices(config: PricingConfigData) -> Compiled:
    """Compile a config. Raises ConfigError where it is not sound."""
    compiler = _Compiler(config, check(config))
    price_function = compiler.price()
    return Compiled(
        functions=tuple(compiler.functions.values()),
        price_function=price_function,
        plans=tuple(
            {
                "plan_id": plan.id,
                "name": plan.name,
                "free_allowance": plan.free_allowance,
                "features": plan.features or {},
                "override_function": compiler.overrides.get(plan.id),
            }
            for plan in (config.plans or {}).values()
        ),
        config_json=config.to_json(),
    )


def compile_config(config: PricingConfigData, *, label: str | None = None, activate: bool = True) -> str:
    """The SQL script that publishes a config where ducto_pg is set up: for migrations, psql, Supabase.

    Running it again changes nothing. Raises ConfigError where the config is not sound.
    """
    compiled = compile_prices(config)
    plans = exactjson.dumps(compiled.plans)
    publish = (
        f"select ducto_private.publish({text(compiled.config_json)}::jsonb, {text(label) if label else 'null'},"
        f" {text(compiled.price_function)}, {text(plans)}::jsonb, {'true' if activate else 'false'})"
    )
    header = (
        "-- Prices for ducto_pg, compiled from a pricing config. Do not edit: change the config and compile it again.\n"
        "-- Run it where ducto_pg is set up (ducto-pg setup, or ducto-pg sql).\n"
    )
    return header + "".join(f"\n{statement};\n" for statement in (*compiled.functions, publish))


def diff(old: PricingConfigData, new: PricingConfigData) -> list[str]:
    """What a new config changes, one line per path: `+` added, `-` removed, `~` changed."""
    before, after = (_flat(config.model_dump(exclude_none=True)) for config in (old, new))
    lines = []
    for path in sorted(before.keys() | after.keys()):
        if path not in before:
            lines.append(f"+ {path}: {after[path]}")
        elif path not in after:
            lines.append(f"- {path}: {before[path]}")
        elif before[path] != after[path]:
            lines.append(f"~ {path}: {before[path]} -> {after[path]}")
    return lines


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        return {path: exactjson.dumps(value)}
    flat: dict[str, str] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{path}.{key}" if path else key)
    return flat


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _search(subject: str, branches: Sequence[tuple[str, list[str]]]) -> list[str]:
    """Binary search: the lines of the last branch whose bound is not above the subject (of the first one, if none)."""
    if len(branches) == 1:
        return branches[0][1]
    middle = len(branches) // 2
    return [
        f"if {subject} < {branches[middle][0]} then",
        *_indent(_search(subject, branches[:middle])),
        "else",
        *_indent(_search(subject, branches[middle:])),
        "end if;",
    ]


class _Compiler:
    def __init__(self, config: PricingConfigData, formulas: Formulas) -> None:
        self.config = config
        self.formulas = formulas
        self.functions: dict[str, str] = {}
        self.overrides: dict[str, str] = {}

    def add(self, kind: str, arguments: str, returns: str, body: Iterable[str]) -> str:
        """Keep a function under a name that holds the hash of the rest, and answer the name."""
        parts = (arguments, returns, "\n".join(body))
        name = f"{kind}_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        self.functions[name] = _statement(name, *parts)
        return name

    # Variables

    def valued(self, formula: Formula, where: str, calls: str = _CALL_COUNT) -> tuple[list[str], str]:
        """The statements that read what a formula names more than once, and the formula, which reads the rest."""
        uses = _uses(formula)
        reads = {name: calls if name == "tool_calls" else self.read(name) for name in sorted(uses)}
        statements = [f"{variable(name)} := {read};" for name, read in reads.items() if uses[name] > 1]
        return statements, expression(formula, where, {name: reads[name] for name in uses if uses[name] == 1})

    def read(self, name: str) -> str:
        default = trim_scale(self.config.metrics.get(name, Decimal(0)))
        return f"coalesce(pg_catalog.trim_scale((p_usage -> '{name}')::numeric), {default:f})"

    def declarations(self, formulas: Iterable[Formula]) -> list[str]:
        """The variables of what these formulas name more than once."""
        names = sorted({name for formula in formulas for name, uses in _uses(formula).items() if uses > 1})
        return [f"  {variable(name)} numeric;" for name in names]

    # The rate of a model

    def leaves(self, formulas: Mapping[str, Formula], path: str) -> list[tuple[str, str]]:
        """The functions that find the formula of a name, each with the first of the keys that it looks after."""
        keys = sorted(formulas)
        return [
            (keys[start], self.leaf(keys[start : start + KEYS_PER_LEAF], keys[:start], formulas, path))
            for start in range(0, len(keys), KEYS_PER_LEAF)
        ]

    def rates(self, leaves: Sequence[tuple[str, str]]) -> str:
        """One function over all leaves."""
        if len(leaves) == 1:
            return leaves[0][1]
        calls = [
            (_bound(first), [f"return ducto_private.{leaf}(p_name, p_model, p_usage, p_longer_than);"])
            for first, leaf in leaves
        ]
        body = ["begin", *_indent(_search("p_name", calls)), "end"]
        return self.add("rates", _RATES, "model_price", body)

    def leaf(self, keys: list[str], before: list[str], formulas: Mapping[str, Formula], path: str) -> str:
        """A leaf. Of the keys before it, only prefixes of its first key can serve a name that comes here."""
        chains = _chains(keys, before)
        shared = {prefix: str(number) for number, prefix in enumerate(sorted({p for c in chains.values() for p in c}))}
        steps = _steps(
            "p_name",
            chains,
            lambda key: self.rate(key, formulas[key], path),
            lambda prefix: [f"v_prefix := {shared[prefix]};"],
        )
        prefixes = [(number, self.rate(prefix, formulas[prefix], path)) for prefix, number in shared.items()]
        taken = [formulas[key] for key in (*keys, *shared)]
        body = [
            "declare",
            "  v_prefix integer;",
            *(["  v_model alias for p_model;"] if any(formula.uses_model for formula in taken) else []),
            *self.declarations(taken),
            "begin",
            *_indent(_search("p_name", steps)),
            "  if v_prefix is not null and p_model is not null then",
            *(_indent(_indent(_search("v_prefix", prefixes))) if prefixes else ["    null;"]),
            "  end if;",
            "  return null;",
            "end",
        ]
        return self.add("rates", _RATES, "model_price", body)

    def rate(self, key: str, formula: Formula, path: str) -> list[str]:
        """The answer for one key."""
        reads, credits = self.valued(formula, f"{path}.{key}")
        return [
            f"if p_longer_than >= {len(key)} then",
            f"  return row({text(key)}, null)::ducto_private.model_price;",
            "end if;",
            *reads,
            f"return row({text(key)}, greatest(0::numeric, {credits}))::ducto_private.model_price;",
        ]

    # The price

    def price(self) -> str:
        """The entry function of the config."""
        formulas = self.formulas
        leaves = self.leaves(formulas.models, "models")
        models = self.rates(leaves)
        for plan_id, overrides in sorted(formulas.overrides.items()):
            if overrides:
                path = f"plans.{plan_id}.rate_overrides"
                self.overrides[plan_id] = self.rates(self.leaves(overrides, path))
        tools = sorted((name, formula) for name, formula in formulas.tools.items() if name != DEFAULT)
        parts = [part for part in (formulas.search, formulas.cache) if part]
        used = [*formulas.models.values(), *formulas.tools.values(), *parts]
        others = ["others"] if DEFAULT in formulas.tools else []
        counters = ["tools", "calls", "tool", *others, *_counters(tools)] if formulas.tools else []
        sums = {"v_tools": formulas.tools, "v_search": formulas.search, "v_fixed": True, "v_cache": formulas.cache}
        summands = [name if configured else "0::numeric" for name, configured in sums.items()]
        tool_sum, search, fixed, cache = summands
        plain = self.plain()
        body = [
            f"-- plain: {hashlib.sha256(plain.encode()).hexdigest()}",
            "declare",
            "  v_model text;",
            "  v_price ducto_private.model_price;",
            "  v_quote ducto_private.quote;",
            *self.declarations(used),
            "begin",
            *_indent(self.common(leaves)),
            f"  declare{_LONG_WAY}",
            *(f"    v_{counter} numeric;" for counter in counters),
            "  begin",
            *_indent(_indent(self.plan())),
            "    v_fixed := 0;",
            "    if p_job = '' then",
            *_indent(_indent(_indent(self.resolve(models)))),
            f"      return {self.quote('v_plan', 'v_resolved', 'null', '0', '0', '0', '0', 'null')};",
            "    elsif p_job is not null then",
            "      v_job := p_job;",
            *_indent(_indent(_indent(self.fixed()))),
            f"      return {self.quote('v_plan', 'null', '0', '0', '0', '0', 'v_fixed', 'v_fixed')};",
            "    elsif p_usage is null then",
            f"      return {self.quote('v_plan', 'null', 'null', '0', '0', '0', '0', 'null')};",
            "    end if;",
            *_indent(_indent(self.check_keys())),
            *_indent(_indent(self.model(models))),
            *_indent(_indent(self.tools(tools))),
            *_indent(_indent(self.part("v_search", formulas.search, "search.costs", "0::numeric"))),
            "    v_job := p_usage ->> 'fixed_job';",
            "    if v_job is not null then",
            *_indent(_indent(_indent(self.fixed()))),
            "    end if;",
            *_indent(_indent(self.part("v_cache", formulas.cache, "cache.discount"))),
            f"    v_cost := greatest(0::numeric, v_price.credits + {' + '.join(summands)});",
            f"    if v_cost > {MAX_BIGINT} then",
            "      perform ducto_private.cost_beyond_bigint(",
            "        case greatest(v_price.credits, v_most, v_search, v_fixed, v_cache)",
            "          when v_price.credits then coalesce(v_path, 'models.') || coalesce(v_price.resolved, '')",
            "          when v_most then v_most_path",
            "          when v_search then 'search.costs'",
            "          when v_fixed then 'fixed.' || v_job",
            "          else 'cache.discount' end);",
            "    end if;",
            "    return "
            + self.quote("v_plan", "v_resolved", "v_price.credits", tool_sum, search, cache, fixed, "v_cost")
            + ";",
            "  end;",
            "end",
        ]
        price = self.add("price", _PRICE, "quote", body)
        name = price.replace("price_", "plain_")
        self.functions[name] = _statement(name, _PLAIN, "plain_price", plain)
        return price

    def plain(self) -> str:
        """The price of a plain charge.

        A charge is one transaction, and PL/pgSQL prepares each expression once per transaction, node by node: hence few
        and small ones. The model's place in a sorted array gives its formula, a path that also sees to the counts.
        """
        config = self.config
        counts, paths = self.paths(self.formulas.models)
        if not paths:
            return _NEVER_PLAIN
        rounded = {
            "carry": "v_cost",
            "up": "pg_catalog.ceil(v_cost)",
            "down": "pg_catalog.floor(v_cost)",
            "half_up": "pg_catalog.floor(v_cost + 0.5)",
        }
        least = max(config.min_balance, config.low_balance_credits) + 1
        fields = ",".join(counts)

        def leaf(ranges: Sequence[tuple[str, str | None]]) -> str:
            keys = sorted({key for _, key in ranges if key in paths})
            places = (str(keys.index(key) + 1) if key in paths else "0" for _, key in ranges)
            names = ", ".join("null" if key == DEFAULT else text(key) for key in keys)
            return _PLAIN_BODY.format(
                bounds=", ".join(text(bound) for bound, _ in ranges),
                places=text(f"{{{','.join(places)}}}"),
                fields=text(f"{{model,{fields}}}"),
                counts=text(f"{{{fields}}}"),
                defaults=text(exactjson.dumps(counts)),
                paths=", ".join(text(paths[key]) for key in keys),
                price=f"p_version, (array[{names}]::text[])[v_place], v_cost, {rounded[config.rounding]}, {least}",
            )

        ranges = _ranges(self.formulas.models)
        leaves = [ranges[start : start + PLAIN_RANGES] for start in range(0, len(ranges), PLAIN_RANGES)]
        if len(leaves) == 1:
            return leaf(ranges)
        calls = []
        for part in leaves:
            function = self.add("plain", _PLAIN, "plain_price", [leaf(part)])
            calls.append((_bound(part[0][0]), [f"return ducto_private.{function}(p_version, p_usage);"]))
        search = _search("v_model", calls)
        return "\n".join(
            ["declare", "  v_model constant text := p_usage ->> 'model';", "begin", *_indent(search), "end"]
        )

    def paths(self, models: Mapping[str, Formula]) -> tuple[dict[str, Decimal], dict[str, str]]:
        """The counts that a plain usage may have, with their defaults, and the path of each model that has one.

        A usage with a count that the search or the cache part reads is not plain: without, those must add nothing.
        """
        metrics = self.config.metrics
        parts = [part for part in (self.formulas.search, self.formulas.cache) if part]
        idle = {name: metrics.get(name, Decimal(0)) for part in parts for name in part.variables}
        barred = idle.keys() | ({"tool_calls"} if self.formulas.tools else set())
        try:
            values = [evaluate(part, idle, "", "") for part in parts]
        except FormulaError:
            return {}, {}
        if any(values) or any(part.uses_model for part in parts):
            return {}, {}
        # A discount of nothing adds no credits, but its decimals.
        scale = f" + {abs(values[-1]):f}" if self.formulas.cache else ""
        paths = {
            key: path
            for key, formula in models.items()
            if (path := json_path(formula)) and formula.variables and not formula.variables & barred
        }
        names = {name for key in paths for name in models[key].variables}
        if len(names) > PLAIN_COUNTS:
            names &= set(TOKENS)
            paths = {key: path for key, path in paths.items() if models[key].variables <= names}
        counts = {name: metrics.get(name, Decimal(0)) for name in sorted(names)}
        whole = " && ".join(f'@."{name}".abs().floor() == @."{name}"' for name in counts)
        total = " + ".join(f'@."{name}"' for name in counts)
        sound = f'$ ? (@."model".type() == "string" && {whole} && {total} < 1000000000000000)."'
        return counts, {key: "strict " + path.replace('$."', sound, 1) + scale for key, path in paths.items()}

    def common_fields(self) -> str:
        """The usage fields that the short ways of a price know."""
        barred = {"fixed_job", "tool_calls"} if self.formulas.tools else {"fixed_job"}
        known = (name for name in (*UsageMetrics.model_fields, *self.config.metrics) if name not in barred)
        return f"{text('{' + ','.join(known) + '}')}::text[]"

    def quote(self, plan: str, *price: str) -> str:
        """The answer, from resolved_model to cost; without a plan of constants only, which the planner makes one."""
        config = self.config
        name, allowance = ("null", "0") if plan == "null" else ("v_plan_name", "v_allowance")
        return (
            f"row({'null' if plan == 'null' else 'p_version'}, {plan}, {', '.join(price)},"
            f" {config.min_balance}::bigint, {text(config.rounding)}, {text(config.overrun)},"
            f" {config.low_balance_credits}::bigint, {config.signup_bonus}::bigint,"
            f" {text(config.default_plan) if config.default_plan else 'null'}, {text(config.timezone)},"
            f" {name}, {allowance})::ducto_private.quote"
        )

    def common(self, leaves: Sequence[tuple[str, str]]) -> list[str]:
        """The short way of what nearly all charges ask: the price of a model, without plan, job and priced tools.

        A charge is one transaction, and PL/pgSQL prepares each expression once per transaction: hence few of them. What
        has no price here, or one out of range, goes the long way, which says why.
        """
        formulas = self.formulas
        model = "coalesce(p_usage ->> 'model', '')" if DEFAULT in formulas.models else "p_usage ->> 'model'"
        unseen = " and not p_unseen" if self.config.default_plan else ""

        def found(key: str, resolved: str = "null") -> list[str]:
            reads, credits = self.valued(formulas.models[key], f"models.{key}")
            return [
                f"v_quote := {self.quote('null', resolved, 'null', '0', '0', '0', '0', 'null')};",
                *reads,
                f"v_quote.model_credits := greatest(0::numeric, {credits});",
            ]

        def named(key: str) -> list[str]:
            return found(key, text(key))

        chains = _chains(sorted(formulas.models), [])
        if sum(1 + len(prefixes) for prefixes in chains.values()) <= INLINED_KEYS:
            lines = _search("v_model", _steps("v_model", chains, named, named))
        else:
            calls = [
                (_bound(first), [f"v_price := ducto_private.{leaf}(v_model, v_model, p_usage, -1);"])
                for first, leaf in leaves
            ]
            lines = [
                *_search("v_model", calls),
                f"v_quote := {self.quote('null', 'null', 'null', '0', '0', '0', '0', 'null')};",
                "v_quote.resolved_model := v_price.resolved;",
                "v_quote.model_credits := v_price.credits;",
            ]
        if DEFAULT in formulas.models:
            lines += ["if v_quote.model_credits is null then", *_indent(found(DEFAULT)), "end if;"]
        cost = ["v_quote.cost := v_quote.model_credits;"]
        if formulas.search or formulas.cache:
            cost = [
                "if v_quote.model_credits is not null then",
                *_indent(self.part("v_quote.search_credits", formulas.search, "search.costs", "0::numeric")),
                *_indent(self.part("v_quote.cache_savings", formulas.cache, "cache.discount")),
                "  v_quote.cost := greatest(0::numeric,",
                "    v_quote.model_credits + v_quote.search_credits + v_quote.cache_savings);",
                "end if;",
            ]
        return [
            f"if p_usage - {self.common_fields()} = '{{}}'::jsonb",
            f"  and coalesce(p_job, p_plan) is null{unseen}",
            "then",
            f"  v_model := {model};",
            *_indent([*lines, *cost]),
            f"  if v_quote.cost <= {MAX_BIGINT} then",
            "    v_quote.version := p_version;",
            "    return v_quote;",
            "  end if;",
            "end if;",
        ]

    def plan(self) -> list[str]:
        """The terms of the account's plan; those of a plan that this version does not have come from another."""
        default = text(self.config.default_plan) if self.config.default_plan else "null"
        lines = [
            f"v_plan := case when p_unseen then {default} else p_plan end;",
            "v_allowance := 0;",
            "if v_plan is not null then",
            "  case v_plan",
        ]
        for plan in (self.config.plans or {}).values():
            lines += [
                f"    when {text(plan.id)} then",
                f"      v_plan_name := {text(plan.name)};",
                f"      v_allowance := {plan.free_allowance};",
            ]
            if plan.id in self.overrides:
                lines.append(f"      v_overrides := {text(self.overrides[plan.id])};")
        return [
            *(lines if self.config.plans else lines[:-1]),
            *(["    else"] if self.config.plans else []),
            "      v_terms := ducto_private.plan_terms(p_version, v_plan);",
            "      v_plan := v_terms.plan_id;",
            "      v_plan_name := v_terms.name;",
            "      v_allowance := coalesce(v_terms.free_allowance, 0);",
            "      v_overrides := v_terms.override_function;",
            *(["  end case;"] if self.config.plans else []),
            "end if;",
        ]

    def fixed(self) -> list[str]:
        """The credits of a job."""
        jobs = text(exactjson.dumps(self.config.fixed))
        return [
            f"v_fixed := ({jobs}::jsonb ->> v_job)::numeric;",
            "if v_fixed is null then",
            f"  perform ducto_private.unknown_job(v_job, {jobs}::jsonb);",
            "end if;",
        ]

    def check_keys(self) -> list[str]:
        """That the usage holds nothing but what is known."""
        known = text("{" + ",".join((*UsageMetrics.model_fields, *self.config.metrics)) + "}")
        return [
            f"if p_usage - {known}::text[] <> '{{}}'::jsonb then",
            f"  perform ducto_private.unknown_metric(p_usage, {known});",
            "end if;",
        ]

    def own_rates(self, target: str, name: str, longer_than: str) -> str:
        """The rates of the plan's overrides into `target`."""
        arguments = f"{name}, v_model, p_usage, {longer_than}"
        cases = "".join(
            f" when {text(function)} then ducto_private.{function}({arguments})" for function in self.overrides.values()
        )
        foreign = f"ducto_private.foreign_rates(v_overrides, {arguments})"
        return f"{target} := case v_overrides{cases} else {foreign} end;" if cases else f"{target} := {foreign};"

    def resolve(self, models: str) -> list[str]:
        """Of a known amount's model only the key: no formula is evaluated."""
        return [
            "v_model := p_usage ->> 'model';",
            "if v_overrides is not null then",
            f"  {self.own_rates('v_own', 'v_model', str(KEY_ONLY))}",
            "end if;",
            f"v_price := ducto_private.{models}(v_model, v_model, p_usage, {KEY_ONLY});",
            "v_resolved := case when pg_catalog.length(v_own.resolved) >= pg_catalog.length(v_price.resolved)"
            " then v_own.resolved else coalesce(v_price.resolved, v_own.resolved) end;",
        ]

    def model(self, models: str) -> list[str]:
        """The model's part: the longest key of models and overrides (of equal ones the override), else `_default`."""
        own = self.own_rates

        def rates(name: str, longer_than: str) -> str:
            return f"v_price := ducto_private.{models}({name}, v_model, p_usage, {longer_than});"

        default = [rates(f"'{DEFAULT}'", "-1")] if DEFAULT in self.formulas.models else []
        used = " or ".join(f"coalesce((p_usage ->> '{name}')::numeric, 0) <> 0" for name in TOKENS)
        return [
            "v_model := coalesce(p_usage ->> 'model', '');",
            "if v_model not in ('', 'none') then",
            "  if v_overrides is null then",
            f"    {rates('v_model', '-1')}",
            "  else",
            f"    {own('v_own', 'v_model', str(KEY_ONLY))}",
            f"    {rates('v_model', 'coalesce(pg_catalog.length(v_own.resolved), -1)')}",
            "    if v_price.credits is null and v_own.resolved is not null then",
            "      v_path := 'plans.' || v_plan || '.rate_overrides.';",
            f"      {own('v_price', 'v_model', '-1')}",
            "    end if;",
            "  end if;",
            "  v_resolved := v_price.resolved;",
            "end if;",
            "if v_price.credits is null then",
            "  if v_overrides is not null then",
            f"    {own('v_price', repr(DEFAULT), '-1')}",
            "    if v_price.credits is not null then",
            "      v_path := 'plans.' || v_plan || '.rate_overrides.';",
            "    end if;",
            "  end if;",
            "  if v_price.credits is null then",
            *(f"    {line}" for line in default),
            *_indent(
                [
                    "  if v_price.credits is null then",
                    f"    if v_model not in ('', 'none') or {used} then",
                    "      perform ducto_private.unknown_model(p_version, v_plan, v_model);",
                    "    end if;",
                    "    v_price.credits := 0;",
                    "  end if;",
                ]
            ),
            "  end if;",
            "end if;",
        ]

    def tools(self, tools: Sequence[tuple[str, Formula]]) -> list[str]:
        """The tools' part: each named tool by its own count, all other calls together by `_default`."""
        default = self.formulas.tools.get(DEFAULT)
        if not self.formulas.tools:
            return []
        lines = ["v_tools := 0;", f"v_calls := {_CALL_COUNT};", "if v_calls > 0 then", "  v_most := -1;"]
        if tools:
            counters = _counters(tools)
            lines += [f"  v_{counter} := 0;" for counter in counters]
            lines += [
                "  if pg_catalog.jsonb_typeof(p_usage -> 'tool_calls') = 'array' then",
                "    for v_call in 0 .. v_calls::integer - 1 loop",
                "      case coalesce(p_usage -> 'tool_calls' -> v_call ->> 'name', p_usage -> 'tool_calls' ->> v_call)",
                *(
                    f"        when {text(name)} then v_{counter} := v_{counter} + 1;"
                    for counter, (name, _) in zip(counters, tools, strict=True)
                ),
                "        else null;",
                "      end case;",
                "    end loop;",
                "  end if;",
            ]
            for counter, (name, formula) in zip(counters, tools, strict=True):
                lines += _indent(self.tool(f"v_{counter}", formula, f"tools.{name}"))
        if default:
            lines.append(f"  v_others := v_calls{''.join(f' - v_{counter}' for counter in _counters(tools))};")
            lines += _indent(self.tool("v_others", default, f"tools.{DEFAULT}"))
        return [*lines, "  v_tools := greatest(0::numeric, v_tools);", "end if;"]

    def tool(self, calls: str, formula: Formula, where: str) -> list[str]:
        """One tool; without calls it is not evaluated."""
        reads, credits = self.valued(formula, where, calls)
        return [
            f"if {calls} > 0 then",
            *_indent(reads),
            f"  v_tool := {credits};",
            "  v_tools := v_tools + v_tool;",
            "  if v_tool > v_most then",
            "    v_most := v_tool;",
            f"    v_most_path := {text(where)};",
            "  end if;",
            "end if;",
        ]

    def part(self, target: str, formula: Formula | None, where: str, least: str = "") -> list[str]:
        """The search or the cache part."""
        if formula is None:
            return []
        reads, credits = self.valued(formula, where)
        return [*reads, f"{target} := {f'greatest({least}, {credits})' if least else credits};"]


def _statement(*function: str) -> str:
    """The SQL that makes a function (name, arguments, answer, body), unless it is there already."""
    return f"select ducto_private.add_price_function({', '.join(map(text, function))})"


def _uses(formula: Formula) -> Counter[str]:
    """How often a formula names each usage field."""
    return Counter(leaf.name for leaf in formula.tree.leaves() if isinstance(leaf, Variable))


def _chains(keys: Sequence[str], before: Sequence[str]) -> dict[str, list[str]]:
    """The known prefixes of each key, longest first; of the keys before, those of the first key."""
    known = {*keys, *(key for key in before if keys[0].startswith(key))} - {DEFAULT}
    return {key: [key[:end] for end in range(len(key) - 1, 0, -1) if key[:end] in known] for key in keys}


def _steps(
    subject: str,
    chains: Mapping[str, list[str]],
    serve: Callable[[str], list[str]],
    serve_prefix: Callable[[str], list[str]],
) -> list[tuple[str, list[str]]]:
    """For each key what is done where it is the greatest that is not above the subject, for `_search`."""
    steps = []
    for key, prefixes in chains.items():
        lines = [f"if {_serves(key, subject)} then", *_indent(serve(key))]
        for prefix in prefixes:
            lines += [f"elsif {_serves(prefix, subject)} then", *_indent(serve_prefix(prefix))]
        steps.append((_bound(key), [*lines, "end if;"]))
    return steps


def _ranges(models: Iterable[str]) -> list[tuple[str, str | None]]:
    """All names in order, as ranges: the first of each, and the key that serves it (`_default` where no other does)."""
    keys = {*models}
    others = DEFAULT if DEFAULT in keys else None
    bounds = {"", DEFAULT, DEFAULT + "\1"}
    for key in keys - {DEFAULT}:
        bounds |= {key, key + "\1"}
        bounds |= {key + letter for separator in SEPARATORS for letter in (separator, chr(ord(separator) + 1))}
    ranges: list[tuple[str, str | None]] = []
    for bound in sorted(bounds):
        ends = (end for end in range(len(bound), 0, -1) if bound[end : end + 1] in ("", *SEPARATORS))
        served = next((bound[:end] for end in ends if bound[:end] in keys - {DEFAULT}), others)
        if bound == DEFAULT:
            served = None
        if not ranges or ranges[-1][1] != served:
            ranges.append((bound, served))
    return ranges


def _counters(tools: Sequence[object]) -> list[str]:
    return [f"tool_{number}" for number, _ in enumerate(tools)]


def _bound(key: str) -> str:
    return f'{text(key)} collate "C"'


def _serves(key: str, subject: str) -> str:
    """Whether a key serves a name: the name itself, or a prefix that a separator follows; `_default` itself only."""
    if key == DEFAULT:
        return f"{subject} = {text(key)}"
    served = ", ".join(text(key + separator) for separator in ("", *SEPARATORS))
    return f"pg_catalog.left({subject}, {len(key) + 1}) = any (array[{served}])"

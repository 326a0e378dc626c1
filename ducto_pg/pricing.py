"""Config -> compiled prices: PL/pgSQL functions named by a hash of their text, and the script that publishes them.

The functions of a version, all in `ducto_private`:

- `rates_<hash>(name, model, usage, longer_than)`: the formula that serves a name, among the config's models or a plan's
  overrides. A decision tree finds the greatest key that is not above the name; every key that is a prefix of the name
  is one of that key's own prefixes. Large sets are split into leaves, which a session compiles when it uses them.
- `price_<hash>(version, usage, job, plan, unseen)`: the whole price, and all that a charge needs of the config.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ducto_pg import exactjson
from ducto_pg.arithmetic import trim_scale
from ducto_pg.config import Formulas, check
from ducto_pg.formula import Formula
from ducto_pg.models import MAX_BIGINT, PricingConfigData, UsageMetrics
from ducto_pg.plpgsql import expression, text, variable

DEFAULT = "_default"
SEPARATORS = "-@:/_"
TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
KEYS_PER_LEAF = 32
KEY_ONLY = 1_000

_RATES = "p_name text, p_model text, p_usage jsonb, p_longer_than integer"
_PRICE = "p_version integer, p_usage jsonb, p_job text, p_plan text, p_unseen boolean"
_CALL_COUNT = (
    "case pg_catalog.jsonb_typeof(p_usage -> 'tool_calls') when 'array'"
    " then pg_catalog.jsonb_array_length(p_usage -> 'tool_calls')::numeric"
    " else coalesce(pg_catalog.trim_scale((p_usage ->> 'tool_calls')::numeric), 0) end"
)


@dataclass(frozen=True)
class Function:
    """One compiled function; `name` holds the hash of the rest."""

    name: str
    arguments: str
    returns: str
    body: str

    @property
    def statement(self) -> str:
        """The SQL that makes it, unless it is there already."""
        parts = ", ".join(map(text, (self.name, self.arguments, self.returns, self.body)))
        return f"select ducto_private.add_price_function({parts})"


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
        functions=tuple(function.statement for function in compiler.functions.values()),
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
        self.functions: dict[str, Function] = {}
        self.overrides: dict[str, str] = {}

    def add(self, kind: str, arguments: str, returns: str, body: Iterable[str]) -> str:
        """Keep a function, and answer its name."""
        written = "\n".join(body)
        digest = hashlib.sha256("\0".join((arguments, returns, written)).encode()).hexdigest()[:24]
        name = f"{kind}_{digest}"
        self.functions[name] = Function(name, arguments, returns, written)
        return name

    # Variables

    def reads(self, formulas: Iterable[Formula], calls: str = _CALL_COUNT) -> list[str]:
        """The statements that read from the usage what these formulas name."""
        names = sorted({name for formula in formulas for name in formula.variables})
        return [f"{variable(name)} := {calls if name == 'tool_calls' else self.read(name)};" for name in names]

    def read(self, name: str) -> str:
        default = trim_scale(self.config.metrics.get(name, Decimal(0)))
        return f"coalesce(pg_catalog.trim_scale((p_usage ->> '{name}')::numeric), {default:f})"

    def declarations(self, formulas: Iterable[Formula]) -> list[str]:
        """The variables that these formulas name."""
        formulas = list(formulas)
        names = sorted({name for formula in formulas for name in formula.variables})
        model = ["  v_model alias for p_model;"] if any(formula.uses_model for formula in formulas) else []
        return [*model, *(f"  {variable(name)} numeric;" for name in names)]

    # The rate of a model

    def rates(self, formulas: Mapping[str, Formula], path: str) -> str:
        """The function that finds the formula of a name, split into leaves where there are many."""
        keys = sorted(formulas)
        leaves = [
            (keys[start], self.leaf(keys[start : start + KEYS_PER_LEAF], keys[:start], formulas, path))
            for start in range(0, len(keys), KEYS_PER_LEAF)
        ]
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
        known = {*keys, *(key for key in before if keys[0].startswith(key))} - {DEFAULT}
        chains = {key: [key[:end] for end in range(len(key) - 1, 0, -1) if key[:end] in known] for key in keys}
        shared = {
            prefix: number for number, prefix in enumerate(sorted({p for chain in chains.values() for p in chain}))
        }
        steps = []
        for key in keys:
            lines = [f"if {_serves(key)} then", *_indent(self.rate(key, formulas[key], path))]
            for prefix in chains[key]:
                lines += [f"elsif {_serves(prefix)} then", f"  v_prefix := {shared[prefix]};"]
            steps.append((_bound(key), [*lines, "end if;"]))
        prefixes = [(str(number), self.rate(prefix, formulas[prefix], path)) for prefix, number in shared.items()]
        body = [
            "declare",
            "  v_prefix integer;",
            *self.declarations(formulas[key] for key in (*keys, *shared)),
            "begin",
            *_indent(_search("p_name", steps)),
            "  if v_prefix is null then",
            "    return null;",
            "  end if;",
            *(_indent(_search("v_prefix", prefixes)) if prefixes else []),
            "end",
        ]
        return self.add("rates", _RATES, "model_price", body)

    def rate(self, key: str, formula: Formula, path: str) -> list[str]:
        """The answer for one key."""
        return [
            f"if p_longer_than >= {len(key)} then",
            f"  return row({text(key)}, null)::ducto_private.model_price;",
            "end if;",
            *self.reads([formula]),
            f"return row({text(key)}, {expression(formula, f'{path}.{key}')})::ducto_private.model_price;",
        ]

    # The price

    def price(self) -> str:
        """The entry function of the config."""
        config, formulas = self.config, self.formulas
        models = self.rates(formulas.models, "models")
        for plan_id, overrides in sorted(formulas.overrides.items()):
            if overrides:
                self.overrides[plan_id] = self.rates(overrides, f"plans.{plan_id}.rate_overrides")
        tools = sorted((name, formula) for name, formula in formulas.tools.items() if name != DEFAULT)
        used = [*formulas.tools.values(), *(part for part in (formulas.search, formulas.cache) if part)]
        body = [
            "declare",
            "  v_plan text := p_plan;",
            "  v_plan_name text;",
            "  v_allowance bigint := 0;",
            "  v_overrides text;",
            "  v_terms ducto_private.plans;",
            "  v_model constant text := coalesce(p_usage ->> 'model', '');",
            "  v_own ducto_private.model_price;",
            "  v_price ducto_private.model_price;",
            "  v_resolved text;",
            "  v_path text := 'models.';",
            "  v_job text := p_job;",
            "  v_tools numeric := 0;",
            "  v_tool numeric;",
            "  v_most numeric := -1;",
            "  v_most_path text;",
            "  v_search numeric := 0;",
            "  v_fixed numeric := 0;",
            "  v_cache numeric := 0;",
            "  v_cost numeric;",
            *(f"  v_{counter} numeric := 0;" for counter in ("calls", "others", *_counters(tools))),
            *(line for line in self.declarations(used) if "alias for" not in line),
            "begin",
            *_indent(self.plan()),
            "  if p_job is not null then",
            *_indent(_indent(self.fixed())),
            "    v_price.credits := 0;",
            "    v_cost := v_fixed;",
            "  elsif p_usage is not null then",
            *_indent(_indent(self.check_keys())),
            *_indent(_indent(self.model(models))),
            *_indent(_indent(self.tools(tools))),
            *_indent(_indent(self.part("v_search", formulas.search, "search.costs"))),
            "    v_job := p_usage ->> 'fixed_job';",
            "    if v_job is not null then",
            *_indent(_indent(_indent(self.fixed()))),
            "    end if;",
            *_indent(_indent(self.part("v_cache", formulas.cache, "cache.discount"))),
            "    v_search := greatest(0::numeric, v_search);" if formulas.search else "",
            "    v_cost := greatest(0::numeric, v_price.credits + v_tools + v_search + v_fixed + v_cache);",
            f"    if v_cost > {MAX_BIGINT} then",
            "      perform ducto_private.cost_beyond_bigint(",
            "        case greatest(v_price.credits, v_most, v_search, v_fixed, v_cache)",
            "          when v_price.credits then v_path || coalesce(v_price.resolved, '')",
            "          when v_most then v_most_path",
            "          when v_search then 'search.costs'",
            "          when v_fixed then 'fixed.' || v_job",
            "          else 'cache.discount' end);",
            "    end if;",
            "  end if;",
            "  return row(p_version, v_plan, v_resolved, v_price.credits, v_tools, v_search, v_cache, v_fixed, v_cost,",
            f"    {config.min_balance}::bigint, {text(config.rounding)}, {text(config.overrun)},",
            f"    {config.low_balance_credits}::bigint, {config.signup_bonus}::bigint,",
            f"    {text(config.default_plan) if config.default_plan else 'null::text'}, {text(config.timezone)},",
            "    v_plan_name, v_allowance)::ducto_private.quote;",
            "end",
        ]
        return self.add("price", _PRICE, "quote", filter(None, body))

    def plan(self) -> list[str]:
        """The terms of the account's plan; those of a plan that this version does not have come from another."""
        default = text(self.config.default_plan) if self.config.default_plan else "null"
        lines = [
            "if p_unseen then",
            f"  v_plan := {default};",
            "end if;",
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

    def model(self, models: str) -> list[str]:
        """The model's part: the longest key of models and overrides (of equal ones the override), else `_default`."""

        def rates(name: str, longer_than: str) -> str:
            return f"v_price := ducto_private.{models}({name}, v_model, p_usage, {longer_than});"

        def own(target: str, name: str, longer_than: str) -> str:
            arguments = f"{name}, v_model, p_usage, {longer_than}"
            cases = "".join(
                f" when {text(function)} then ducto_private.{function}({arguments})"
                for function in self.overrides.values()
            )
            foreign = f"ducto_private.foreign_rates(v_overrides, {arguments})"
            return f"{target} := case v_overrides{cases} else {foreign} end;" if cases else f"{target} := {foreign};"

        default = [rates(f"'{DEFAULT}'", "-1")] if DEFAULT in self.formulas.models else []
        used = " or ".join(f"coalesce((p_usage ->> '{name}')::numeric, 0) <> 0" for name in TOKENS)
        return [
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
            "v_price.credits := greatest(0::numeric, v_price.credits);",
        ]

    def tools(self, tools: Sequence[tuple[str, Formula]]) -> list[str]:
        """The tools' part: each named tool by its own count, all other calls together by `_default`."""
        default = self.formulas.tools.get(DEFAULT)
        if not self.formulas.tools:
            return []
        lines = [f"v_calls := {_CALL_COUNT};", "if v_calls > 0 then"]
        if tools:
            counters = _counters(tools)
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
        return [
            f"if {calls} > 0 then",
            *_indent(self.reads([formula], calls)),
            f"  v_tool := {expression(formula, where)};",
            "  v_tools := v_tools + v_tool;",
            "  if v_tool > v_most then",
            "    v_most := v_tool;",
            f"    v_most_path := {text(where)};",
            "  end if;",
            "end if;",
        ]

    def part(self, target: str, formula: Formula | None, where: str) -> list[str]:
        """The search or the cache part."""
        return [*self.reads([formula]), f"{target} := {expression(formula, where)};"] if formula else []


def _counters(tools: Sequence[object]) -> list[str]:
    return [f"tool_{number}" for number, _ in enumerate(tools)]


def _bound(key: str) -> str:
    return f'{text(key)} collate "C"'


def _serves(key: str) -> str:
    """Whether a key serves `p_name`: the name itself, or a prefix that a separator follows; `_default` itself only."""
    if key == DEFAULT:
        return f"p_name = {text(key)}"
    following = f"pg_catalog.substr(p_name, {len(key) + 1}, 1)"
    return f"pg_catalog.starts_with(p_name, {text(key)}) and pg_catalog.strpos('{SEPARATORS}', {following}) > 0"

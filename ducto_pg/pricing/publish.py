"""Config -> rows and formulas: what `ducto_private.publish` takes, and the script that calls it.

A formula is compiled once for ever, to a function named by a hash of its body; a price is a row that names a formula
and holds its rates. What a charge asks most, a model's price with those of search and cache, is composed into one
formula where that is safe.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlglot import exp

from ducto_pg import exactjson
from ducto_pg.formula.arithmetic import trim_scale
from ducto_pg.formula.fields import KNOWN_COUNTS
from ducto_pg.formula.generator import Function, compile_function, compile_sum, text
from ducto_pg.formula.language import Formula
from ducto_pg.models import PricingConfigData
from ducto_pg.pricing import coverage
from ducto_pg.pricing.config import SECTION_KEYS, check, credit_factor
from ducto_pg.pricing.lookup import DEFAULT

_HEADER = """\
-- Prices for ducto_pg, compiled from a pricing config. Do not edit: change the config and compile it again.
-- Run it where ducto_pg is set up (ducto-pg setup, or ducto-pg sql).

"""

_ROW: dict[str, Any] = dict.fromkeys(
    ("section", "key", "formula_id", "rates", "composed_id", "composed_rates", "prefixes", "covers")
)


@dataclass(frozen=True)
class Compiled:
    """A config, ready to be published: the bodies of its formulas, the rows of `ducto_private.prices` and `terms` as
    JSON has them, and the config in full."""

    formulas: list[str]
    prices: list[dict[str, Any]]
    terms: list[dict[str, Any]]
    config_json: str


def compile_prices(config: PricingConfigData) -> Compiled:
    """Compile a config. Raises ConfigError where it is not sound."""
    compiler = _Compiler(config)
    return Compiled(
        formulas=list(compiler.bodies.values()),
        prices=compiler.prices,
        terms=compiler.terms(),
        config_json=config.to_json(),
    )


def compile_config(
    config: PricingConfigData, *, label: str | None = None, activate: bool = True, at: datetime | None = None
) -> str:
    """The SQL script that publishes a config where ducto_pg is set up: for migrations, psql, Supabase.

    `at` is the time from which it is active, if that is not now. Running the script again changes nothing. Raises
    ConfigError where the config is not sound.
    """
    return f"{_HEADER}select {publish_call(config, label=label, activate=activate, at=at)};\n"


def publish_call(config: PricingConfigData, *, label: str | None, activate: bool, at: datetime | None) -> str:
    """The SQL expression that publishes a config; its value is the version's number."""
    compiled = compile_prices(config)
    arguments = {
        "p_config": f"{text(compiled.config_json)}::jsonb",
        "p_label": text(label) if label else "null",
        "p_formulas": _array(compiled.formulas),
        "p_prices": _array(compiled.prices),
        "p_terms": _array(compiled.terms),
        "p_activate": "true" if activate else "false",
        "p_at": f"{text(at.astimezone(UTC).isoformat())}::timestamptz" if at else "null",
    }
    named = ",\n  ".join(f"{name} => {value}" for name, value in arguments.items())
    return f"ducto_private.publish(\n  {named})"


def _array(rows: Iterable[dict[str, Any] | str]) -> str:
    """Rows as a jsonb constant, each on a line of its own."""
    lines = ",\n    ".join(text(exactjson.dumps(row)).removeprefix("E'").removesuffix("'") for row in rows)
    return f"E'[\n    {lines}]'::jsonb"


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
    if not isinstance(value, Mapping):
        return {path: exactjson.dumps(value)}
    flat: dict[str, str] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{path}.{key}" if path else key)
    return flat


class _Compiler:
    def __init__(self, config: PricingConfigData) -> None:
        self.config = config
        self.formulas = formulas = check(config)
        self.bodies: dict[int, str] = {}
        self.prices: list[dict[str, Any]] = []
        self.add_models("models", formulas.models)
        for plan_id, overrides in formulas.overrides.items():
            self.add_models(_overrides(plan_id), overrides)
        for section, further in (("tools", formulas.tools), ("costs", formulas.costs)):
            for key, formula in further.items():
                self.add(section, key, formula, coverage.of_part(formula, config))
        for section, part in (("search", formulas.search), ("cache", formulas.cache)):
            if part:
                self.add(section, SECTION_KEYS[section], part, coverage.of_part(part, config))
        for job, credits in config.fixed.items():
            self.prices.append(_ROW | {"section": "fixed", "key": job, "rates": [credits]})

    def kept(self, function: Function) -> tuple[int, list[Decimal]]:
        """The id of a formula, whose body is kept, and its rates."""
        self.bodies[function.id] = function.body
        return function.id, list(function.rates)

    def add(self, section: str, key: str, formula: Formula, covers: Iterable[str]) -> dict[str, Any]:
        """The row of a price."""
        formula_id, rates = self.kept(compile_function(formula.tree, self.config.metrics))
        own = {"section": section, "key": key, "formula_id": formula_id, "rates": rates, "covers": sorted(covers)}
        self.prices.append(row := _ROW | own)
        return row

    def add_models(self, section: str, formulas: Mapping[str, Formula]) -> None:
        """The prices of models: with what a charge pays in all, and the keys that may serve where this one does not."""
        for key, formula in formulas.items():
            row = self.add(section, key, formula, coverage.of_model(formula, self.config))
            prefixes = [key[:end] for end in range(len(key) - 1, 0, -1) if key[:end] in formulas]
            row["prefixes"] = [prefix for prefix in prefixes if prefix != DEFAULT] or None
            # A plan's own prices are asked part by part: another version may have given them.
            if section == "models":
                priced = [part.tree for part in (formula, self.formulas.search) if part]
                saved = [self.formulas.cache.tree] if self.formulas.cache else []
                if all(map(_divides_by_numbers_only, (*priced, *saved))):
                    total = compile_sum(priced, saved, self.config.metrics)
                    row["composed_id"], row["composed_rates"] = self.kept(total)

    def terms(self) -> list[dict[str, Any]]:
        """What a charge needs of the config: a row without a plan (''), with what all share, and one a plan."""
        config = self.config
        covers = {"model", "provider_cost"} | coverage.of_free(config) | ({"tool_calls"} if not config.tools else set())
        for part in (self.formulas.search, self.formulas.cache):
            covers |= coverage.of_part(part, config)
        shared = {
            "metrics": sorted(config.metrics.keys() - {*KNOWN_COUNTS}),
            "covers": sorted(covers),
            "match": config.match,
            "aliases": config.aliases or None,
            "unpriced": config.unpriced,
            "cached": config.cached,
            "min_balance": config.min_balance,
            "rounding": config.rounding,
            "overrun": config.overrun,
            "low_balance": config.low_balance_credits,
            "signup_bonus": config.signup_bonus,
            "signup_bonus_days": config.signup_bonus_days,
            "default_plan": config.default_plan,
            "timezone": config.timezone,
        }
        none: dict[str, Any] = {
            "plan_id": "",
            "plan_name": None,
            "free_allowance": 0,
            "period": "month",
            "anchored": False,
            "rollover": 0,
            "features": {},
            "factor": credit_factor(config),
            "plan_factor": 1,
            "overrides": None,
        }
        plans = [
            {
                "plan_id": plan.id,
                "plan_name": plan.name,
                "free_allowance": plan.free_allowance,
                "period": plan.period,
                "anchored": plan.anchor == "start",
                "rollover": plan.rollover,
                "features": plan.features or {},
                "plan_factor": trim_scale(plan.factor),
                "plan_low_balance": plan.low_balance,
                "overrides": _overrides(plan.id) if plan.rate_overrides else None,
            }
            for plan in (config.plans or {}).values()
        ]
        return [none | shared, *plans]


def _overrides(plan_id: str) -> str:
    return f"plans.{plan_id}.rate_overrides"


def _divides_by_numbers_only(tree: exp.Expr) -> bool:
    """Whether no division can fail: the divisors are numbers of the text other than 0."""
    return all(
        isinstance(node.expression, exp.Parameter) and Decimal(node.expression.name) != 0
        for node in tree.find_all(exp.Div, exp.IntDiv, exp.Mod)
    )

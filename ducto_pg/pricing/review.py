"""What a sound price list may still say by mistake: remarks, never errors."""

from collections.abc import Iterable, Mapping

from sqlglot import exp

from ducto_pg.formula.fields import KNOWN_COUNTS, wholes
from ducto_pg.formula.language import Formula
from ducto_pg.formula.signs import signs
from ducto_pg.models import PricingConfigData
from ducto_pg.pricing import coverage
from ducto_pg.pricing.catalog import REGIONAL
from ducto_pg.pricing.config import Formulas, check
from ducto_pg.pricing.lookup import DEFAULT, LOWER, Lookup

SHOWN = 3


def remarks(config: PricingConfigData) -> list[str]:
    """What the owner of a price list should know before publishing it, a line each; none where all is usual.

    Raises ConfigError where the config is not sound.
    """
    formulas = check(config)
    return [
        *_unpriced(config, formulas),
        *_never_above_zero(formulas),
        *_unreached(config, formulas),
        *_free_tools(config),
        *_default(config),
    ]


def _unpriced(config: PricingConfigData, formulas: Formulas) -> Iterable[str]:
    """Counts that no model's formula charges, and those that some do and others do not; not parts of such counts."""
    elsewhere = set(coverage.of_free(config))
    for part in (formulas.search, formulas.cache):
        elsewhere |= coverage.of_part(part, config)
    without: dict[str, list[str]] = {}
    for name in dict.fromkeys((*KNOWN_COUNTS, *config.metrics)):
        keys = [key for key, formula in formulas.models.items() if name not in coverage.of_model(formula, config)]
        if name not in elsewhere | {"tool_calls", "requests"} and keys:
            without[name] = keys
    without = {
        name: keys
        for name, keys in without.items()
        if all(without.get(whole) != keys for whole in wholes(name, config.cached))
    }
    happens = "is refused" if config.unpriced == "refuse" else "is charged without it, with a warning"
    if nowhere := [name for name, keys in without.items() if len(keys) == len(config.models)]:
        yield f"no model's formula names {', '.join(nowhere)}: a usage with one of them {happens}, unless free lists it"
    if some := [f"{name} (not {_few(keys)})" for name, keys in without.items() if name not in nowhere]:
        yield f"only some models' formulas name {', '.join(some)}"
    named = set().union(*(formula.variables for formula in _all(formulas).values()))
    for name in config.metrics:
        if name not in named and name not in KNOWN_COUNTS:
            yield f"metrics.{name}: no formula names it"


def _never_above_zero(formulas: Formulas) -> Iterable[str]:
    for path, formula in _all(formulas).items():
        found = signs(formula.tree.transform(_constant))
        if path == "cache.discount":
            if found <= {0, 1} and 1 in found:
                yield f"{path}: is never below 0, so it adds to the price"
        elif found <= {-1, 0} and -1 in found:
            yield f"{path}: is never above 0, so it prices nothing"


def _constant(node: exp.Expr) -> exp.Expr:
    """A number of the config as one of the language, which has the sign that it has."""
    return exp.Literal.number(node.this) if isinstance(node, exp.Parameter) else node


def _unreached(config: PricingConfigData, formulas: Formulas) -> Iterable[str]:
    """Aliases, lines of plans and keys that no name reaches, and aliases that take a name from a key."""
    keys = {key.translate(LOWER): key for key in config.models}
    for alias, target in config.aliases.items():
        if (key := keys.get(alias.translate(LOWER))) is not None and key == alias and key != target:
            yield f"aliases.{alias}: {key} is a key of models too, which serves this name first"
    others = Lookup(config.match, {})
    for alias, target in config.aliases.items():
        key = others.find(alias, config.models) if alias not in config.models else None
        if key is not None and key != target and config.models.get(target) not in (None, config.models[key]):
            yield f"aliases.{alias}: {key} would serve this name at another price than {target}: see that it is meant"
    for key in config.models:
        if key.startswith(REGIONAL) and key not in config.aliases.values():
            yield f"models.{key}: Bedrock's names have a region there, as us.…: without an alias none reaches this key"
    lookup = Lookup(config.match, config.aliases)
    for plan_id, overrides in formulas.overrides.items():
        for key in overrides:
            if key != DEFAULT and lookup.find(key, config.models) is None:
                yield f"plans.{plan_id}.rate_overrides.{key}: models has no such model, so only this plan can use it"
    for key in config.costs:
        if key != DEFAULT and lookup.find(key, config.models) is None:
            yield f"costs.{key}: models has no such model"


def _free_tools(config: PricingConfigData) -> Iterable[str]:
    if not config.tools:
        yield "there is no section tools: tool calls are free"
    elif DEFAULT not in config.tools:
        yield f"tools has no {DEFAULT}: calls of other tools than {_few(list(config.tools))} are free"


def _default(config: PricingConfigData) -> Iterable[str]:
    if DEFAULT in config.models:
        yield f"models.{DEFAULT} prices every model that has no line of its own, whatever it costs you"


def _all(formulas: Formulas) -> Mapping[str, Formula]:
    """Every formula by its path."""
    found = {f"models.{key}": formula for key, formula in formulas.models.items()}
    found |= {f"tools.{key}": formula for key, formula in formulas.tools.items()}
    found |= {f"costs.{key}": formula for key, formula in formulas.costs.items()}
    for plan_id, overrides in formulas.overrides.items():
        found |= {f"plans.{plan_id}.rate_overrides.{key}": formula for key, formula in overrides.items()}
    parts = (("search.costs", formulas.search), ("cache.discount", formulas.cache))
    return found | {path: formula for path, formula in parts if formula}


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

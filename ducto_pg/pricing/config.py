"""Reading and checking pricing configs: everything that can be wrong is found here, before a price is published."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from pydantic import ValidationError

from ducto_pg.errors import ConfigError, ExpressionError
from ducto_pg.formula.arithmetic import multiply, trim_scale
from ducto_pg.formula.fields import KNOWN_COUNTS
from ducto_pg.formula.language import MAX_DIGITS, Formula, is_metric_name, parse
from ducto_pg.models import PlanDefinition, PricingConfigData
from ducto_pg.pricing.coverage import UNREAD
from ducto_pg.pricing.lookup import DEFAULT, LOWER, NO_MODEL, SEPARATORS
from ducto_pg.spelling import nearest

if TYPE_CHECKING:
    import yaml

MAX_KEY = 255
MAX_DEPTH = 50
MAX_VALUES = 200_000
TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
SECTION_KEYS = {"search": "costs", "cache": "discount"}
_FORMULAS = ("models", "tools", "costs", *SECTION_KEYS)

_YAML_NUMBER = re.compile(r"[-+]?(\d+|(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?)", re.ASCII)
_YAML_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True)
class Formulas:
    """All formulas of a config, parsed; `overrides` by plan and model."""

    models: dict[str, Formula]
    tools: dict[str, Formula]
    search: Formula | None
    cache: Formula | None
    costs: dict[str, Formula]
    overrides: dict[str, dict[str, Formula]]


def load(source: "Mapping[str, Any] | str | bytes | Path | PricingConfigData") -> PricingConfigData:
    """A checked config from a dict, JSON or YAML text, or the path of such a file (a `Path`; a str is always text).

    Raises ConfigError, a ValueError, for the first fault: it names the path, the position in the text there and, for a
    misspelt name, the nearest known one. Numbers stay exact, and a key that appears twice is a fault.
    """
    if not isinstance(source, PricingConfigData):
        data = source if isinstance(source, Mapping) else _read(source)
        _check_json(data, ())
        source = _shape(data)
    check(source)
    return source


def check(config: PricingConfigData) -> Formulas:
    """Everything that a config's shape does not say: names, plans, time zone, and its formulas, which are returned.

    Raises ConfigError as `load` does.
    """
    plans = config.plans or {}
    if not config.models:
        raise ConfigError("must name at least one model, or _default", path="models")
    keyed: dict[str, Iterable[str]] = {
        "models": config.models,
        "tools": config.tools,
        "fixed": config.fixed,
        "plans": plans,
        "costs": config.costs,
        **{f"plans.{plan_id}.rate_overrides": plan.rate_overrides or {} for plan_id, plan in plans.items()},
    }
    for path, keys in keyed.items():
        for key in keys:
            _check_text(key, f"{path}.{key}", "a key")
            if path in ("models", "costs") or path.endswith(".rate_overrides"):
                _check_model(key, f"{path}.{key}")
    for section, key in SECTION_KEYS.items():
        for other in getattr(config, section):
            if other != key:
                raise ConfigError(f"{section} has one key, {key}", path=f"{section}.{other}")
    for name in config.metrics:
        if not is_metric_name(name):
            message = "a metric is named by 1 to 48 of a-z, 0-9 and _, a letter first; no word of formulas or usage"
            raise ConfigError(message, path=f"metrics.{name}")
    _check_plans(plans)
    if config.default_plan is not None and config.default_plan not in plans:
        raise _unknown("unknown plan", "default_plan", config.default_plan, plans)
    if config.signup_bonus_days is not None and not config.signup_bonus:
        raise ConfigError("says when the bonus expires, but there is no signup_bonus", path="signup_bonus_days")
    _check_timezone(config.timezone)
    _check_aliases(config)
    for index, name in enumerate(config.free):
        if name not in (known := (*KNOWN_COUNTS, *config.metrics, UNREAD)):
            raise _unknown("unknown name", f"free.{index}", name, known)

    metrics = frozenset(config.metrics)
    return Formulas(
        models=_compile(config.models, "models", metrics),
        tools=_compile(config.tools, "tools", metrics),
        search=_compile(config.search, "search", metrics).get("costs"),
        cache=_compile(config.cache, "cache", metrics).get("discount"),
        costs=_compile(config.costs, "costs", metrics),
        overrides={
            plan_id: _compile(plan.rate_overrides or {}, f"plans.{plan_id}.rate_overrides", metrics)
            for plan_id, plan in plans.items()
        },
    )


def _check_model(key: str, path: str) -> None:
    if key in NO_MODEL:
        raise ConfigError("means no model and is never looked up; use _default", path=path)
    if "*" in key:
        stem = key.partition("*")[0].rstrip(SEPARATORS)
        cure = (
            f"name {stem!r} and say match: prefix, or list the other names of a model under aliases"
            if stem
            else "list a model's other names under aliases, which may begin with *; _default prices all other models"
        )
        raise ConfigError(f"a key is the name of a model, no pattern: {cure}", path=path)


def _check_aliases(config: PricingConfigData) -> None:
    overrides = [plan.rate_overrides or {} for plan in (config.plans or {}).values()]
    targets = {"*", *config.models, *(key for keys in overrides for key in keys)} - {DEFAULT}
    seen: dict[str, str] = {}
    for alias, target in config.aliases.items():
        path = f"aliases.{alias}"
        _check_text(alias, path, "an alias")
        if "*" in alias[1:] or not alias.strip("*"):
            raise ConfigError("an alias is a text, with at most one * before it", path=path)
        if alias in (*NO_MODEL, DEFAULT):
            raise ConfigError("means no model and is never looked up; use _default", path=path)
        if target not in targets:
            suggestion = nearest(target, targets - {"*"})
            message = f"no model has the key {target!r}; an alias names a key of models, or * for the rest of the name"
            raise ConfigError(message, path=path, suggestion=suggestion)
        if (other := seen.setdefault(alias.translate(LOWER), alias)) != alias:
            raise ConfigError(f"the same as {other!r}: letter case is ignored", path=path)


def credit_factor(config: PricingConfigData, plan_id: str | None = None) -> Decimal:
    """The credits for one unit of what the formulas give, on a plan if one is named."""
    plans = config.plans or {}
    return trim_scale(multiply(config.factor, plans[plan_id].factor) if plan_id is not None else config.factor)


def _compile(texts: Mapping[str, str], path: str, metrics: frozenset[str]) -> dict[str, Formula]:
    formulas = {}
    for key, text in texts.items():
        try:
            formulas[key] = _parse(text, metrics)
        except ExpressionError as error:
            error.path = f"{path}.{key}"
            if error.message.startswith("unknown name") and not error.suggestion:
                error.message += " (a number of your own: declare it under metrics)"
            raise
    return formulas


@lru_cache(maxsize=8192)
def _parse(text: str, metrics: frozenset[str]) -> Formula:
    return parse(text, metrics)


def _unknown(message: str, path: str, name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"{message} {name!r}", path=path, suggestion=nearest(name, known))


def _check_text(text: str, path: str, what: str) -> None:
    if not 1 <= len(text) <= MAX_KEY:
        raise ConfigError(f"{what} has 1 to {MAX_KEY} characters, not {len(text)}", path=path[:MAX_KEY])
    _check_characters(text, path)


def _check_characters(text: str, path: str) -> None:
    for position, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise ConfigError("a character that PostgreSQL cannot store", path=path, position=position)


def _check_plans(plans: Mapping[str, PlanDefinition]) -> None:
    names: dict[str, str] = {}
    for plan_id, plan in plans.items():
        path = f"plans.{plan_id}"
        if plan.id != plan_id:
            raise ConfigError(f"the id {plan.id!r} differs from the key {plan_id!r}", path=f"{path}.id")
        _check_text(plan.name, f"{path}.name", "a name")
        if plan.name in names:
            raise ConfigError(f"plan {names[plan.name]!r} already has the name {plan.name!r}", path=f"{path}.name")
        names[plan.name] = plan_id
        _check_json(plan.features or {}, ("plans", plan_id, "features"))


def _check_timezone(name: str) -> None:
    if name == "UTC":
        return
    if "/" not in name and name in available_timezones():
        # The server would read many of them as abbreviations, which a session's settings define.
        raise ConfigError(f"name the time zone by a place, like Europe/Berlin, not {name!r}", path="timezone")
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise _unknown("unknown time zone", "timezone", name, available_timezones()) from None


def _shape(data: Any) -> PricingConfigData:
    if not isinstance(data, Mapping):
        hint = "; for a file pass a Path" if isinstance(data, str) else ""
        raise ConfigError(f"a pricing config is a mapping, not {type(data).__name__}{hint}")
    try:
        return PricingConfigData.model_validate(dict(data))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
        where = [str(step) for step in first["loc"] if step != "[key]"]
        path = ".".join(where)
        if first["type"] == "extra_forbidden":
            kind: Any = PricingConfigData if len(where) == 1 else PlanDefinition
            raise _unknown("unknown key", path, where[-1], kind.model_fields) from None
        if first["type"] == "missing":
            raise ConfigError("is required", path=path) from None
        if first["type"] == "dict_type" and path in SECTION_KEYS:
            raise ConfigError(f"is a mapping with one key, {SECTION_KEYS[path]}", path=path) from None
        if first["type"] == "string_type" and where[0] == "aliases":
            message = f"an alias names a key of models, or * for the rest of the name, not {first['input']}"
            raise ConfigError(message, path=path) from None
        if first["type"] == "string_type" and (where[0] in _FORMULAS or "rate_overrides" in where):
            message = f"a formula is text, such as 'input_tokens * 0.001', not {first['input']}"
            raise ConfigError(message, path=path) from None
        raise ConfigError(first["msg"].removeprefix("Value error, "), path=path) from None


# ----------------------------------------------------------------------------------------------------------------------
# JSON and YAML


class _Duplicate(NamedTuple):
    """Stands for a JSON object in which a key appears twice, until its path is known."""

    key: str


def _check_json(value: Any, path: tuple[str, ...]) -> None:
    """That jsonb can hold it, exactly."""
    where = ".".join(path)
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"nested more than {MAX_DEPTH} levels deep", path=where[:MAX_KEY])
    match value:
        case _Duplicate():
            raise ConfigError("the key appears twice", path=".".join((*path, value.key)))
        case Mapping():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ConfigError(f"a key must be text, not {key!r}", path=where)
                _check_characters(key, ".".join((*path, key)))
                _check_json(item, (*path, key))
        case list() | tuple():
            for index, item in enumerate(value):
                _check_json(item, (*path, str(index)))
        case str():
            _check_characters(value, where)
        case Decimal():
            if not value.is_finite() or value.adjusted() >= MAX_DIGITS or int(value.as_tuple().exponent) < -MAX_DIGITS:
                raise ConfigError(f"a number has at most {MAX_DIGITS} digits before and after the point", path=where)
        case float():
            if not isfinite(value):
                raise ConfigError(f"{value!r} is not a number", path=where)
        case None | bool() | int() | PlanDefinition():
            pass
        case _:
            raise ConfigError(f"{type(value).__name__} is not JSON", path=where)


def _read(source: Any) -> Any:
    text = source.read_bytes() if isinstance(source, Path) else source
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError("not UTF-8", position=error.start) from None
    if not isinstance(text, str):
        return text
    return _read_json(text) if text.lstrip().startswith("{") else _read_yaml(text)


def _read_json(text: str) -> Any:
    def collect(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        return _Duplicate(next(key for key in found if sum(key == other for other, _ in pairs) > 1))

    try:
        return json.loads(text, parse_float=Decimal, parse_constant=Decimal, object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} (line {error.lineno} column {error.colno})"
        raise ConfigError(message, position=error.pos) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None


def _read_yaml(text: str) -> Any:
    """YAML by its core schema: only `true`, `false`, `null`, `~` and decimal numbers are not text; a key always is."""
    import yaml

    try:
        # Not the C loader: a deeply nested text overflows its stack and ends the process.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is None:
            raise ConfigError("the file is empty")
        return _yaml_value(node, (), [0])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1} column {mark.column + 1})" if mark else ""
        raise ConfigError(f"not YAML: {error.problem}{where}", position=mark.index if mark else None) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"not YAML: {str(error).splitlines()[0]}") from None


def _yaml_value(node: "yaml.Node", path: tuple[str, ...], count: list[int]) -> Any:
    import yaml

    where = ".".join(path)
    count[0] += 1
    if count[0] > MAX_VALUES:
        raise ConfigError(f"more than {MAX_VALUES} values, aliases counted each time", path=where[:MAX_KEY])
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"nested more than {MAX_DEPTH} levels deep", path=where[:MAX_KEY])
    if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise ConfigError(f"the tag {node.tag} is not JSON", path=where, position=node.start_mark.index)
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(item, (*path, str(index)), count) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("a key must be text", path=where, position=key.start_mark.index)
            if key.value in mapping:
                line = f"the key appears twice (line {key.start_mark.line + 1})"
                raise ConfigError(line, path=".".join((*path, key.value)), position=key.start_mark.index)
            mapping[key.value] = _yaml_value(item, (*path, key.value), count)
        return mapping
    text: str = node.value
    if getattr(node, "style", None):
        return text
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    if _YAML_NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() and len(text) <= MAX_DIGITS else Decimal(text)
    return text

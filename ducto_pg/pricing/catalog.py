"""Price lists from genai-prices' catalogue (the extra `[catalog]`): formulas in the catalogue's own money, USD.

The catalogue prices units that lie inside each other, as our counts do: the price of a unit is for what none of the
priced units inside it counts. So a formula has a term for each priced unit, in which its parts are taken off it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ducto_pg.errors import DuctoError
from ducto_pg.formula.fields import KNOWN_COUNTS
from ducto_pg.pricing.lookup import LOWER, SEPARATORS, Lookup
from ducto_pg.spelling import nearest
from ducto_pg.usage import table

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

# The catalogue's counts that have another name with us; one that has none is a metric of the list.
OUR_NAMES = {
    "output_reasoning_tokens": "reasoning_tokens",
    "web_searches": "web_search_calls",
    "code_executions": "code_exec_calls",
    "rerank_searches": "search_queries",
    "input_characters": "characters",
    "input_audio_seconds": "audio_seconds",
}
# What the catalogue writes before a model's name where the price is the region's, and what Bedrock writes there.
REGIONAL = "regional."
REGIONS = ("us", "eu", "apac", "au", "jp", "ca")
# Groq bills ten seconds at least; the catalogue says so in its program, not in its data.
AT_LEAST_TEN_SECONDS = {("groq", "whisper-large-v3"), ("groq", "whisper-large-v3-turbo")}
_DIRECTIONS = {"input": 0, "output": 1}


@dataclass(frozen=True)
class Selection:
    """What to take of the catalogue: all models of the providers, or those that the patterns name.

    `tariff` is the catalogue's context of a request (`{"processing": "batch"}`), `key` a template for the keys, in
    which `{}` is the model's name; prices are those of `on`.
    """

    providers: Sequence[str]
    models: Sequence[str] = ("*",)
    tariff: Mapping[str, str] = field(default_factory=dict)
    key: str = "{}"
    on: date = field(default_factory=lambda: datetime.now(UTC).date())


@dataclass(frozen=True)
class PriceList:
    """Formulas in USD by key, other names of these models, metrics that the formulas name, and what to know of it."""

    models: dict[str, str]
    aliases: dict[str, str]
    metrics: dict[str, Decimal]
    remarks: list[str]
    disputes: list[str]
    """Names that the chosen providers price differently, and which price stands, if any."""


def providers() -> "dict[str, Provider]":
    """The catalogue's providers by id. Raises DuctoError where the catalogue is not installed."""
    try:
        from genai_prices.data import providers as listed
    except ImportError:
        raise DuctoError("the catalogue is not installed: pip install 'ducto-pg[catalog]'") from None
    return {provider.id: provider for provider in listed}


def price_list(selection: Selection, lookup: Lookup | None = None) -> PriceList:
    """The price list of a selection, for a config that looks models up as `lookup` says.

    A model that was not selected is taken along where a selected one's line would serve its name at another price:
    `gpt-4o-2024-05-13` comes with `gpt-4o`. Raises DuctoError, with the nearest known name, for an unknown provider,
    model or tariff, and where two providers price one name differently.
    """
    lookup = lookup or Lookup("dated", {})
    known = providers()
    chosen: dict[str, _Line] = {}
    others: list[_Line] = []
    found: Counter[str] = Counter()
    unpriced: list[str] = []
    for name in selection.providers:
        if name not in known:
            aliases = table.source()["aliases"]
            api = aliases.get(name, name)
            theirs = next((alias for alias in known if aliases.get(alias) == api), None)
            suggestion = f"; did you mean {json.dumps(theirs)}?" if theirs else _suggest(name, known)
            raise DuctoError(f"the catalogue has no provider {name!r}{suggestion}")
        for line in _lines(known[name], selection, known):
            patterns = [pattern for pattern in selection.models if line.fits(pattern)]
            found.update(patterns)
            if not line.formula:
                unpriced += [line.model.id] if patterns and line.model.id in selection.models else []
            elif patterns:
                _add(chosen, line)
            else:
                others.append(line)
    for pattern in selection.models:
        if not found[pattern]:
            names = [model.id for name in selection.providers for model in _models(known[name], known)]
            raise DuctoError(f"{', '.join(selection.providers)}: no model {pattern!r}{_suggest(pattern, names)}")
    if selection.tariff and not chosen:
        raise _no_tariff(selection, known)
    if unpriced or not chosen:
        at = f" at {_tariff(selection)}" if selection.tariff else ""
        raise DuctoError(f"the catalogue has no price{at} for {', '.join(unpriced) or 'these models'}")

    remarks: list[str] = []
    aliases, disputes = _aliases(chosen, others, lookup)
    while along := _served_at_another_price(chosen, others, Lookup(lookup.match, {**aliases, **lookup.aliases})):
        remarks += [f"{line.key}: taken along, its price is not that of {key}" for line, key in along]
        for line, _ in along:
            chosen[line.key] = line
        others = [line for line in others if chosen.get(line.key) is not line]
        aliases, disputes = _aliases(chosen, others, lookup)
    disputes += _priced_by_another_provider(chosen, others, Lookup(lookup.match, {**aliases, **lookup.aliases}))
    metrics = sorted({name for line in chosen.values() for name in line.counts if name not in KNOWN_COUNTS})
    for line in chosen.values():
        remarks += line.remarks
    return PriceList(
        models={key: line.formula for key, line in sorted(chosen.items())},
        aliases=aliases,
        metrics=dict.fromkeys(metrics, Decimal(0)),
        remarks=remarks,
        disputes=disputes,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Prices


@dataclass(frozen=True)
class _Line:
    """A model of the catalogue as a line of a price list; its formula is empty where the catalogue has no price."""

    provider: "Provider"
    model: "ModelInfo"
    key: str
    formula: str
    counts: frozenset[str]
    remarks: list[str]

    @property
    def template(self) -> str:
        """What the key makes of a name, which stands for `{}`."""
        return self.key.replace(self.model.id, "{}", 1)

    def fits(self, pattern: str) -> bool:
        names = (self.model.id, f"{self.provider.id}/{self.model.id}")
        return any(fnmatchcase(name, pattern) for name in names) or pattern in texts(self.model.match, "equals")


def _lines(provider: "Provider", selection: Selection, known: "Mapping[str, Provider]") -> Iterator[_Line]:
    for model in _models(provider, known):
        context = dict(selection.tariff)
        price, hours = _price_on(model, selection.on, context)
        offered = not context or any(_applies(variant, selection.on, context) for variant in model.price_variants or ())
        terms = _terms(price) if offered else []
        formula = " + ".join(f"{_linear(counts)} * {rate}" for counts, rate in terms)
        if terms and (provider.id, model.id) in AT_LEAST_TEN_SECONDS:
            formula = f"({formula.replace('audio_seconds', 'max(audio_seconds, 10)')} if audio_seconds else 0)"
        key = selection.key.replace("{}", model.id)
        remarks = []
        if hours:
            remarks.append(f"{key}: the price of the provider's dearest hours; it takes less at others")
        starts = [getattr(constraint, "start_date", None) for constraint in _conditional(model)]
        if starts := [start for start in starts if start and start > selection.on]:
            remarks.append(f"{key}: the catalogue has another price from {min(starts)} on")
        names = frozenset(name for counts, _ in terms for name in counts)
        if "cache_write_tokens" in names and "cache_write_1h_tokens" not in names and "claude" in model.id:
            remarks.append(f"{key}: no price of 1 h cache writes, which cost what 5 min writes do")
        yield _Line(provider, model, key, formula, names, remarks)


def _models(provider: "Provider", known: "Mapping[str, Provider]") -> "Iterator[ModelInfo]":
    """A provider's models, then those that the catalogue takes from others: of OpenAI for Azure."""
    yield from provider.models
    everyone = list(known.values())
    for other in provider.fallback_model_providers or []:
        if other in known:
            yield from (
                model for model in known[other].models if provider.find_model(model.id, all_providers=everyone) is model
            )


def _price_on(model: "ModelInfo", day: date, context: dict[str, str]) -> "tuple[ModelPrice, bool]":
    """The price of a day; where it depends on the hour the dearest, and whether it does."""
    names = ("start_time", "end_time")
    hours = [getattr(constraint, name, None) for constraint in _conditional(model) for name in names]
    moments = [datetime.combine(day, hour.replace(tzinfo=UTC)) for hour in [time(12), *filter(None, hours)]]
    prices = [model.get_prices(moment, context or None) for moment in moments]
    differ = any(_terms(price) != _terms(prices[0]) for price in prices)
    return max(prices, key=lambda price: sum(_base(value) for value in _given(price).values())), differ


def _conditional(model: "ModelInfo") -> list[Any]:
    return [price.constraint for price in model.prices] if isinstance(model.prices, list) else []


def _applies(variant: Any, day: date, context: Mapping[str, str]) -> bool:
    if variant.constraint is not None and not variant.constraint.active(datetime.combine(day, time(12), UTC)):
        return False
    return all(context.get(name) == value for name, value in variant.when.items())


def _given(price: "ModelPrice") -> "dict[str, Decimal | TieredPrices]":
    return {name: value for name, value in vars(price).items() if value is not None}


def _base(value: "Decimal | TieredPrices") -> Decimal:
    return value if isinstance(value, Decimal) else value.base


def _terms(price: "ModelPrice") -> list[tuple[dict[str, int], str]]:
    """Each priced unit: the counts that make what its price is for, each with its sign, and the rate of one."""
    from genai_prices.data_units import unit_data

    given = _given(price)
    priced = {name: unit for name, unit in unit_data.items() if unit["price_key"] in given}
    if missing := given.keys() - {unit["price_key"] for unit in priced.values()}:
        raise DuctoError(f"the catalogue prices {', '.join(sorted(missing))}, which this release does not know")
    leaves: dict[str, Counter[str]] = {}
    for name in sorted(priced, key=lambda name: -len(priced[name]["dimensions"])):
        counts = Counter({OUR_NAMES.get(name, name): 1})
        for inner in leaves:
            if priced[name]["dimensions"].items() <= priced[inner]["dimensions"].items():
                counts.subtract(leaves[inner])
        leaves[name] = counts
    terms: list[tuple[dict[str, int], str]] = []
    for name, unit in sorted(
        priced.items(), key=lambda item: _DIRECTIONS.get(item[1]["dimensions"].get("direction"), 2)
    ):
        if leaf := {count: sign for count, sign in leaves[name].items() if sign}:
            terms.append((leaf, _rate(given[unit["price_key"]], unit["per"])))
    return terms


def _rate(price: "Decimal | TieredPrices", per: int) -> str:
    """A price of `per` as the rate of one. A tier is of the whole request, and begins above its start."""
    if isinstance(price, Decimal):
        return _number(price, per)
    rates = [price.base, *(tier.price for tier in price.tiers)]
    steps = [f"{tier.start + 1}, {_number(rate, per)}" for tier, rate in zip(price.tiers, rates, strict=False)]
    return f"tier(input_tokens, {', '.join(steps)}, {_number(rates[-1], per)})"


def _number(price: Decimal, per: int) -> str:
    if not price:
        return "0"
    exponent = len(str(per)) - 1
    plain = f"{price.normalize():f}"
    return f"{plain}e-{exponent}" if per == 10**exponent else f"{plain} / {per}"


def _linear(counts: Mapping[str, int]) -> str:
    text = ""
    for name, sign in sorted(counts.items(), key=lambda item: item[1] < 0):
        text += (" + " if sign > 0 else " - ") + (name if abs(sign) == 1 else f"{abs(sign)} * {name}")
    text = text.removeprefix(" + ")
    return f"({text})" if len(counts) > 1 else text


# ----------------------------------------------------------------------------------------------------------------------
# Names


def texts(match: Any, *kinds: str) -> list[str]:
    """What a model's names are, begin with, end with or contain, as the catalogue writes it; regexes are left alone."""
    clauses = getattr(match, "or_", [match])
    return [text for clause in clauses for kind in kinds if (text := getattr(clause, kind, None))]


def names_of(model: "ModelInfo") -> list[str]:
    """The names of a model that the catalogue writes out."""
    return list(dict.fromkeys([model.id, *texts(model.match, "equals", "starts_with")]))


def _aliases(chosen: Mapping[str, _Line], others: Iterable[_Line], lookup: Lookup) -> tuple[dict[str, str], list[str]]:
    """The names of the chosen models beyond their keys, as far as an alias can say them and the catalogue agrees, and
    those that other providers price differently.

    A name that is a model's id, dated or not, is its own: no alias of another provider takes it. An alias with a `*` is
    left out where it would fit a name of another model.
    """
    everyone = [*chosen.values(), *others]
    names = {
        (line.provider.id, name.translate(LOWER)): line for line in reversed(everyone) for name in names_of(line.model)
    }
    claims: dict[str, list[_Line]] = {}
    ids: dict[str, list[_Line]] = {}
    for line in everyone:
        ids.setdefault(line.model.id, []).append(line)
        for name in _plain(line) if chosen.get(line.key) is line else []:
            claims.setdefault(name, []).append(line)
    found = {key.translate(LOWER): key for key in chosen if key != key.translate(LOWER)}
    taken = {key.translate(LOWER) for key in chosen} | {name.translate(LOWER) for name in lookup.aliases}
    disputes: list[str] = []
    for key, line in sorted(chosen.items()):
        mine = dict(lookup.aliases)
        stars = texts(line.model.match, "ends_with", "contains") if line.template == "{}" else []
        for name, star in [(name, "*") for name in sorted(stars, key=len)] + [(name, "") for name in _plain(line)]:
            alias = star + line.template.replace("{}", name)
            if (
                alias.translate(LOWER) in taken
                or name.endswith((*SEPARATORS, "."))
                or Lookup(lookup.match, mine).find(alias.removeprefix("*"), {key, *lookup.aliases.values()})
                or not _says(line, name)
            ):
                continue
            rules = Lookup(lookup.match, {alias: key})
            fitting = [] if not star else [other for (_, text), other in names.items() if rules.find(text, {key})]
            owners = ids.get(Lookup("dated", {}).find(name, ids) or "", [])
            if rivals := [other for other in [*owners, *claims.get(name, []), *fitting] if _differ(line, other)]:
                disputes.append(
                    f"no alias {alias} for {line.provider.id}'s {key}: it fits a name of {rivals[0].provider.id}'s "
                    f"{rivals[0].key}, at another price"
                )
                continue
            if any(other.model is not line.model for other in fitting):
                continue
            mine[alias] = found[alias] = key
            taken.add(alias.translate(LOWER))
    return found, disputes


def _plain(line: _Line) -> list[str]:
    """The names of a model without a `*`. Where a key goes on after the name, its dated names are aliases too: those
    that the catalogue knows of any provider."""
    names = [*texts(line.model.match, "equals", "starts_with"), *_regional(line.model.id)]
    if line.template != "{}":
        everywhere = {
            name for provider in providers().values() for model in provider.models for name in names_of(model)
        }
        names += [name for name in everywhere if Lookup("dated", {}).find(name, {line.model.id})]
    return sorted(dict.fromkeys(names), key=lambda name: (len(name), name))


def _differ(line: _Line, other: _Line) -> bool:
    """Whether two providers have another price."""
    return line.provider.id != other.provider.id and line.formula != other.formula


def _regional(name: str) -> list[str]:
    """What Bedrock calls a model that the catalogue calls `regional.…`."""
    base = re.sub(r"-v\d+(:\d+)?$", "", name.removeprefix(REGIONAL))
    return [base, *(f"{region}.{base}" for region in REGIONS)] if name.startswith(REGIONAL) else []


def _says(line: _Line, text: str) -> bool:
    """Whether a line's provider knows its model by this name."""
    return line.provider.find_model(text, all_providers=list(providers().values())) is line.model


def _served_at_another_price(
    chosen: Mapping[str, _Line], others: Iterable[_Line], lookup: Lookup
) -> list[tuple[_Line, str]]:
    """What a chosen line of the same provider would serve at another price."""
    along = []
    for line in others:
        for name in names_of(line.model) if line.key not in chosen else []:
            served = lookup.find(line.template.replace("{}", name), chosen)
            by = chosen[served] if served else line
            if served and by.formula != line.formula and by.provider is line.provider and _says(line, name):
                along.append((line, served))
                break
    return along


def _priced_by_another_provider(chosen: Mapping[str, _Line], others: Iterable[_Line], lookup: Lookup) -> Iterator[str]:
    """Names of models that were not selected, which a selected line of another provider serves at its own price."""
    for line in others:
        for name in names_of(line.model) if line.key not in chosen else []:
            served = lookup.find(line.template.replace("{}", name), chosen)
            if served and _differ(line, by := chosen[served]) and _says(line, name):
                yield f"{name} costs what {by.provider.id}'s {served} does; {line.provider.id} has another price"
                break


def _add(chosen: dict[str, _Line], line: _Line) -> None:
    before = chosen.setdefault(line.key, line)
    if before.formula != line.formula:
        raise DuctoError(
            f"{line.key} costs one thing at {before.provider.id} and another at {line.provider.id}: "
            f"say which with --model {before.provider.id}/…, or import the other with --key '{line.provider.id}/{{}}'"
        )


def _no_tariff(selection: Selection, known: "Mapping[str, Provider]") -> DuctoError:
    tariffs = {
        f"{name}={value}"
        for provider in selection.providers
        for model in _models(known[provider], known)
        for variant in model.price_variants or ()
        for name, value in variant.when.items()
    }
    listed = f"; it has {', '.join(sorted(tariffs))}" if tariffs else ""
    return DuctoError(f"the catalogue has no tariff {_tariff(selection)} for these models on {selection.on}{listed}")


def _tariff(selection: Selection) -> str:
    return ", ".join(f"{name}={value}" for name, value in selection.tariff.items())


def _suggest(name: str, known: Iterable[str]) -> str:
    suggestion = nearest(name, known)
    return f"; did you mean {json.dumps(suggestion)}?" if suggestion else ""

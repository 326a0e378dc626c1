"""Prices without a database: the same digits and the same errors as the SQL that a config compiles to."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from ducto_pg.errors import (
    InvalidArgumentError,
    NegativePriceError,
    OutOfRangeError,
    UnknownJobError,
    UnknownMetricError,
    UnknownModelError,
    UnpricedUsageError,
)
from ducto_pg.formula.arithmetic import ZERO, add, multiply
from ducto_pg.formula.fields import FURTHER_COUNTS, KNOWN_COUNTS, SEED_COUNTS, limits
from ducto_pg.formula.language import Formula
from ducto_pg.models import MAX_BIGINT, CostBreakdown, PricingConfigData, UsageMetrics
from ducto_pg.pricing import coverage
from ducto_pg.pricing.config import TOKENS, check, credit_factor, load
from ducto_pg.pricing.lookup import DEFAULT, NO_MODEL, Lookup
from ducto_pg.spelling import did_you_mean
from ducto_pg.usage.reading import read_body


class _Price(NamedTuple):
    """A formula, where in the config it stands, and the counts that it charges."""

    formula: Formula
    path: str
    covers: frozenset[str]


class _Terms(NamedTuple):
    """What the config says of accounts on a plan, or on none."""

    overrides: Mapping[str, _Price]
    factor: Decimal


class PricingEngine:
    """Calculates exact costs in credits from a pricing config.

        engine = PricingEngine({"models": {"_default": "input_tokens * 0.001 + output_tokens * 0.003"}})
        engine.calculate(UsageMetrics(model="claude-opus-4", input_tokens=1000, output_tokens=2000)).total  # 7.000

    Formulas are parsed once, here. Raises ConfigError where the config is not sound.
    """

    def __init__(self, config: PricingConfigData | Mapping[str, Any]) -> None:
        config = config if isinstance(config, PricingConfigData) else load(config)
        formulas = check(config)
        self._config = config.model_copy(deep=True)
        self._lookup = Lookup(config.match, config.aliases)
        self._models = self._model_prices(formulas.models, "models")
        self._terms: dict[str | None, _Terms] = {None: _Terms({}, credit_factor(config))}
        for plan_id, overrides in formulas.overrides.items():
            prices = self._model_prices(overrides, f"plans.{plan_id}.rate_overrides")
            self._terms[plan_id] = _Terms(prices, credit_factor(config, plan_id))
        self._tools = {name: self._price(formula, f"tools.{name}") for name, formula in formulas.tools.items()}
        self._search = self._price(formulas.search, "search.costs") if formulas.search else None
        self._cache = self._price(formulas.cache, "cache.discount") if formulas.cache else None
        self._free = coverage.of_free(config)

    def _price(self, formula: Formula, path: str) -> _Price:
        return _Price(formula, path, coverage.of_part(formula, self._config))

    def _model_prices(self, formulas: Mapping[str, Formula], section: str) -> dict[str, _Price]:
        return {
            key: _Price(formula, f"{section}.{key}", coverage.of_model(formula, self._config))
            for key, formula in formulas.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """An engine for a config given as a dict. Raises ConfigError where the config is not sound."""
        return cls(data)

    @property
    def min_balance(self) -> int:
        """The credits that an account must keep when it admits holds and charges."""
        return self._config.min_balance

    def pricing_schema(self) -> PricingConfigData:
        """The config, as a copy."""
        return self._config.model_copy(deep=True)

    def get_fixed_cost(self, job_name: str) -> int | None:
        """The credits of a fixed job, or None where there is no such job."""
        return self._config.fixed.get(job_name)

    def has_model(self, model_name: str) -> bool:
        """Whether the config names exactly this model."""
        return model_name in self._models

    def resolve_model(self, model_version: str) -> str | None:
        """The config's key that serves a model: the name itself, else an alias of it, else the longest key that the
        config's `match` allows.

        None where there is none; `_default` is the answer only for itself.
        """
        return self._lookup.find(model_version, self._models)

    def calculate(self, metrics: UsageMetrics | Mapping[str, Any], plan_id: str | None = None) -> CostBreakdown:
        """The exact cost of one usage, for an account on a plan if one is given.

        Raises UnknownModelError, UnknownJobError and UnknownMetricError (all ValueErrors) with the nearest known name,
        UnpricedUsageError for a count that no formula names, NegativePriceError for a formula below zero, FormulaError
        for a division by zero, OutOfRangeError for a cost beyond bigint, InvalidArgumentError for an unknown plan, a
        dict that is no usage, or a count above the one that it is a part of.
        """
        if not isinstance(metrics, UsageMetrics):
            metrics = _usage(metrics, cached_beside=self._config.cached == "beside")
        terms = self._terms.get(plan_id)
        if terms is None:
            plans = self._config.plans or {}
            hint = did_you_mean(str(plan_id), plans, "Add it to the config's plans.")
            raise InvalidArgumentError(f"unknown plan {plan_id!r}", hint=hint)
        factor = terms.factor
        variables = self._variables(metrics)
        self._check_wholes(metrics)
        parts: dict[str, Decimal] = {}
        charged = set(self._free)
        warnings: list[str] = []

        def credits(price: _Price, calls: int | None = None) -> Decimal:
            values = variables if calls is None else variables | {"tool_calls": Decimal(calls)}
            value = price.formula.evaluate(values, metrics.model or "", price.path)
            parts[price.path] = multiply(value, factor)
            # A flat price charges all counts of a request, which needs a model: without one it charges none.
            flat = coverage.UNREAD in price.covers and "requests" not in metrics.model_fields_set
            if parts[price.path] or not flat or (metrics.model or "") not in NO_MODEL:
                charged.update(price.covers)
            return parts[price.path]

        resolved, price = self._model_price(metrics, terms.overrides)
        model_credits = self._part(credits(price), price.path, warnings) if price else ZERO
        tools = _sum(credits(self._tools[name], calls) for name, calls in self._calls(metrics))
        tool_credits = self._part(tools, "tools", warnings)
        search = self._search
        search_credits = self._part(credits(search), search.path, warnings) if search else ZERO
        cache_savings = credits(self._cache) if self._cache else ZERO
        self._check_charged(metrics, charged, warnings)
        fixed_credits = ZERO
        if metrics.fixed_job is not None:
            fixed_credits = parts[f"fixed.{metrics.fixed_job}"] = self._fixed_credits(metrics.fixed_job)
        total = max(ZERO, _sum((model_credits, tool_credits, search_credits, fixed_credits, cache_savings)))
        if total > MAX_BIGINT:
            largest = max(parts, key=parts.__getitem__)
            raise OutOfRangeError(f"{largest}: the cost is beyond bigint", hint="Check the formula and the usage.")
        named, said = (metrics.model or "") not in NO_MODEL, metrics.model_fields_set - {"model"} or metrics.model_extra
        if named and "requests" not in charged and not (total and said) and _counts_nothing(metrics):
            warnings.append("no_usage")
        return CostBreakdown(
            model_credits=model_credits,
            tool_credits=tool_credits,
            search_credits=search_credits,
            cache_savings=cache_savings,
            fixed_credits=fixed_credits,
            total=total,
            resolved_model=resolved,
            plan_id=plan_id,
            breakdown={
                "model": metrics.model or "",
                "input_tokens": metrics.input_tokens,
                "output_tokens": metrics.output_tokens,
                "tool_count": metrics.tool_count,
            },
            warnings=list(dict.fromkeys(warnings)),
        )

    def calculate_batch(self, metrics_list: Iterable[UsageMetrics | Mapping[str, Any]]) -> list[CostBreakdown]:
        """The exact cost of each usage, in order; the first that has no price raises as `calculate` does."""
        return [self.calculate(metrics) for metrics in metrics_list]

    def _variables(self, metrics: UsageMetrics) -> dict[str, Decimal]:
        further = metrics.model_extra or {}
        for name in sorted(further):
            if name not in self._config.metrics:
                known = (*UsageMetrics.model_fields, *self._config.metrics)
                hint = did_you_mean(name, known, "The config's metrics name what formulas may use besides the usual.")
                raise UnknownMetricError(f"unknown metric '{name[:100]}'", hint=hint)
        values: dict[str, Decimal] = dict.fromkeys(FURTHER_COUNTS, ZERO)
        if (metrics.model or "") not in NO_MODEL:
            values["requests"] = Decimal(1)
        given = {
            name: Decimal(getattr(metrics, name))
            for name in (*SEED_COUNTS, *metrics.model_fields_set.intersection(FURTHER_COUNTS))
            if name != "tool_calls"
        }
        return values | self._config.metrics | given | further | {"tool_calls": Decimal(metrics.tool_count)}

    def _part(self, value: Decimal, path: str, warnings: list[str]) -> Decimal:
        """What is charged for a part of the price, which is not below 0."""
        if value >= 0:
            return value
        if self._config.unpriced == "refuse":
            hint = "Mend the formula, or bound it: max(0, ...)."
            raise NegativePriceError(f"{path}: the price of this usage is below 0", hint=hint)
        warnings.append("negative_price")
        return ZERO

    def _check_wholes(self, metrics: UsageMetrics) -> None:
        """That no part is larger than what it is a part of."""
        hint = (
            "input_tokens and output_tokens count all, their parts included: see ducto.read_usage(), "
            "or say cached: beside in the config."
        )
        for parts, whole in limits(self._config.cached):
            count, most = sum(getattr(metrics, part) for part in parts.split(" + ")), getattr(metrics, whole)
            if count > most:
                message = f"{parts} is more than the {whole} that it is a part of"
                raise InvalidArgumentError(message, detail=f"{count} of {most}", hint=hint)

    def _check_charged(self, metrics: UsageMetrics, charged: Collection[str], warnings: list[str]) -> None:
        """That each count is charged by a formula, or free."""
        given = {name: getattr(metrics, name) for name in KNOWN_COUNTS if name != "tool_calls"} | (
            metrics.model_extra or {}
        )
        missing = [name for name, count in given.items() if count and name not in charged]
        if coverage.UNREAD not in charged:
            missing += [f"{coverage.UNREAD}.{path}" for path, count in metrics.unread.items() if count]
        if missing and self._config.unpriced == "warn":
            warnings.append("unpriced_usage")
        elif missing:
            hint = "Name it in a formula of the config, or list it under free."
            if any(name.startswith(f"{coverage.UNREAD}.") for name in missing):
                hint = (
                    "No formula can name what is unread: say free: [unread], or read the body by the API that "
                    "returned it."
                )
            raise UnpricedUsageError(f"no formula of this price names {', '.join(sorted(missing))}", hint=hint)

    def _calls(self, metrics: UsageMetrics) -> Iterable[tuple[str, int]]:
        """Tools with a formula of their own and their calls, then `_default` with all others; none without calls."""
        if not metrics.tool_calls:
            return
        others = metrics.tool_count
        for name, calls in sorted(Counter(metrics.tool_names).items()):
            if name in self._tools and name != DEFAULT:
                others -= calls
                yield name, calls
        if others and DEFAULT in self._tools:
            yield DEFAULT, others

    def _model_price(self, metrics: UsageMetrics, overrides: Mapping[str, _Price]) -> tuple[str | None, _Price | None]:
        """The key that serves the model, and the price by it or by `_default`; overrides are asked before the list."""
        name = metrics.model or ""
        if name not in NO_MODEL:
            for prices in (overrides, self._models):
                if resolved := self._lookup.find(name, prices):
                    return resolved, prices[resolved]
        price = overrides.get(DEFAULT) or self._models.get(DEFAULT)
        if price is None and name not in NO_MODEL:
            hint = did_you_mean(name, {*self._models, *overrides}, "Add it to the config's models, or price _default.")
            prefix, slash, rest = name.rpartition("/")
            keys = (self._lookup.find(rest, prices) for prices in (overrides, self._models)) if slash else ()
            if key := next(filter(None, keys), None):
                hint = f'did you mean {key}? aliases: {{"{prefix}/": "*"}} serves all such names.'
            raise UnknownModelError(f"unknown model '{name}'", hint=hint)
        if price is None and any(getattr(metrics, token) for token in TOKENS):
            raise UnknownModelError("tokens were used, but no model is named", hint="name the model or price _default")
        return None, price

    def _fixed_credits(self, job: str) -> Decimal:
        if job not in self._config.fixed:
            hint = did_you_mean(job, self._config.fixed, "Add it to the config's fixed.")
            raise UnknownJobError(f"unknown job '{job}'", hint=hint)
        return Decimal(self._config.fixed[job])


def _sum(values: Iterable[Decimal]) -> Decimal:
    total = ZERO
    for value in values:
        total = add(total, value)
    return total


def _counts_nothing(metrics: UsageMetrics) -> bool:
    """Whether a usage has no job and no count above 0."""
    counts = metrics.to_usage()
    unread = counts.pop("unread", {})
    return not any(unread.values()) and not any(counts[name] for name in counts.keys() - {"model", "provider_cost"})


def _usage(data: Mapping[str, Any], *, cached_beside: bool) -> UsageMetrics:
    """A usage given as a dict, in which None is absent, or as what a provider returned (`body`)."""
    if not isinstance(data, Mapping):
        raise InvalidArgumentError(f"a usage is a UsageMetrics or a dict, not {type(data).__name__}")
    if "body" in data:
        texts = all(isinstance(data.get(name), str | None) for name in ("api", "model"))
        if not texts or not data.keys() <= {"body", "api", "model"}:
            hint = "What the provider's answer does not say is added to what ducto_pg.usage.read answers."
            raise InvalidArgumentError("beside body stand only api and model, both texts", hint=hint)
        data = read_body(data["body"], data.get("api"), data.get("model"), cached_beside)
    try:
        return UsageMetrics.model_validate({name: value for name, value in data.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise InvalidArgumentError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from None

"""Prices offline: parts, model look-up, plans, tools, and what is refused."""

import inspect
from decimal import Decimal
from typing import Any

import pytest
from places import CONFORMANCE

from ducto_pg import exactjson
from ducto_pg.errors import (
    ConfigError,
    DuctoError,
    FormulaError,
    InvalidArgumentError,
    OutOfRangeError,
    UnknownJobError,
    UnknownMetricError,
    UnknownModelError,
    UnpricedUsageError,
)
from ducto_pg.models import PricingConfig, PricingConfigData, UsageMetrics
from ducto_pg.pricing.engine import PricingEngine

PARTS = ("model_credits", "tool_credits", "search_credits", "cache_savings", "fixed_credits", "total")

SHOP: dict[str, Any] = {
    "match": "prefix",
    "models": {
        "gpt-4": "input_tokens * 0.01 + output_tokens * 0.03",
        "gpt-4-mini": "input_tokens * 0.001",
        "_default": "input_tokens * 0.002",
    },
    "tools": {"_default": "tool_calls * 2", "web": "tool_calls * 5", "odd": "10 / (tool_calls - 3)"},
    "search": {"costs": "search_queries * 0.5"},
    "cache": {"discount": "-cache_read_tokens * 0.0045"},
    "fixed": {"report": 10, "nothing": 0},
    "metrics": {"images": 0, "seconds": Decimal("1.5")},
    "plans": {
        "pro": {
            "id": "pro",
            "name": "Pro",
            "rate_overrides": {
                "gpt-4": "input_tokens * 0.005",
                "gpt-4-mini-x": "input_tokens",
                "_default": "images * 3",
            },
        },
        "short": {"id": "short", "name": "Short", "rate_overrides": {"gpt": "input_tokens * 7"}},
        "free": {"id": "free", "name": "Free"},
    },
}
NO_DEFAULT: dict[str, Any] = {"models": {"gpt-4": "input_tokens"}, "fixed": {"report": 7}}


def test_the_api_of_the_engine() -> None:
    methods = {
        "calculate": ["self", "metrics", "plan_id"],
        "calculate_batch": ["self", "metrics_list"],
        "from_dict": ["data"],
        "get_fixed_cost": ["self", "job_name"],
        "has_model": ["self", "model_name"],
        "pricing_schema": ["self"],
        "resolve_model": ["self", "model_version"],
    }
    for name, parameters in methods.items():
        assert list(inspect.signature(getattr(PricingEngine, name)).parameters) == parameters
    assert isinstance(PricingEngine.min_balance, property)
    assert PricingConfig is PricingConfigData


def test_the_example_of_the_documentation() -> None:
    engine = PricingEngine.from_dict({"models": {"_default": "input_tokens * 0.001 + output_tokens * 0.003"}})
    result = engine.calculate(UsageMetrics(model="claude-opus-4", input_tokens=1000, output_tokens=2000))
    assert str(result.total) == "7.000"
    assert result.breakdown == {"model": "claude-opus-4", "input_tokens": 1000, "output_tokens": 2000, "tool_count": 0}
    assert (result.resolved_model, result.pricing_version, result.plan_id) == (None, None, None)


# usage -> resolved model; model, tools, search, cache, fixed; total
PRICES: list[tuple[dict[str, Any], str | None, str, str]] = [
    ({}, None, "0 0 0 0 0", "0"),
    ({"model": "gpt-4", "input_tokens": 1000, "output_tokens": 500}, "gpt-4", "25 0 0 0 0", "25"),
    ({"model": "gpt-4-0613", "input_tokens": 1000}, "gpt-4", "10 0 0 0 0", "10"),
    ({"model": "gpt-4-mini-2025", "input_tokens": 1000}, "gpt-4-mini", "1 0 0 0 0", "1"),
    ({"model": "gpt-4o", "input_tokens": 1000}, None, "2 0 0 0 0", "2"),
    ({"model": "GPT-4", "input_tokens": 1000}, None, "2 0 0 0 0", "2"),
    ({"model": "none", "input_tokens": 1000}, None, "2 0 0 0 0", "2"),
    ({"model": "", "input_tokens": 1000}, None, "2 0 0 0 0", "2"),
    ({"model": "_default", "input_tokens": 1000}, "_default", "2 0 0 0 0", "2"),
    ({"model": "_default-x", "input_tokens": 1000}, None, "2 0 0 0 0", "2"),
    ({"tool_calls": 3}, None, "0 6 0 0 0", "6"),
    ({"tool_calls": ["a", {"name": "b"}, "web", "web"]}, None, "0 14 0 0 0", "14"),
    ({"tool_calls": ["web", "_default"]}, None, "0 7 0 0 0", "7"),
    ({"tool_calls": ["odd", "web", "web"]}, None, "0 5 0 0 0", "5"),
    ({"tool_calls": []}, None, "0 0 0 0 0", "0"),
    ({"search_queries": 3}, None, "0 0 1.5 0 0", "1.5"),
    ({"model": "gpt-4", "input_tokens": 1000, "cache_read_tokens": 1000}, "gpt-4", "10 0 0 -4.5 0", "5.5"),
    ({"model": "gpt-4-mini", "input_tokens": 1000, "cache_read_tokens": 1000}, "gpt-4-mini", "1 0 0 -4.5 0", "0"),
    ({"fixed_job": "report", "input_tokens": 1000}, None, "2 0 0 0 10", "12"),
    ({"fixed_job": "nothing"}, None, "0 0 0 0 0", "0"),
    ({"model": "gpt-4", "input_tokens": 10**15 - 1}, "gpt-4", "9999999999999.99 0 0 0 0", "9999999999999.99"),
]


@pytest.mark.parametrize(("usage", "resolved", "parts", "total"), PRICES, ids=[str(usage) for usage, *_ in PRICES])
def test_price(usage: dict[str, Any], resolved: str | None, parts: str, total: str) -> None:
    engine = PricingEngine.from_dict(SHOP)
    result = engine.calculate(UsageMetrics.model_validate(usage))
    assert result.resolved_model == resolved
    assert [getattr(result, part) for part in PARTS] == [Decimal(part) for part in f"{parts} {total}".split()]
    assert engine.calculate_batch([usage, usage]) == [result, result]


PLANS = [
    ("pro", {"model": "gpt-4-0613", "input_tokens": 1000}, "gpt-4", "5"),
    ("pro", {"model": "gpt-4-mini", "input_tokens": 1000}, "gpt-4", "5"),
    ("pro", {"model": "gpt-4-mini-x-1", "input_tokens": 1000}, "gpt-4-mini-x", "1000"),
    ("pro", {"model": "other", "images": 2}, None, "6"),
    ("short", {"model": "gpt-4", "input_tokens": 1000}, "gpt", "7000"),
    ("short", {"model": "gpt-4-mini", "input_tokens": 1000}, "gpt", "7000"),
    ("short", {"model": "other", "input_tokens": 1000}, None, "2"),
    ("free", {"model": "gpt-4-0613", "input_tokens": 1000}, "gpt-4", "10"),
]


@pytest.mark.parametrize(("plan", "usage", "resolved", "total"), PLANS)
def test_price_on_a_plan(plan: str, usage: dict[str, Any], resolved: str | None, total: str) -> None:
    result = PricingEngine.from_dict(SHOP).calculate(usage, plan)
    assert (result.plan_id, result.resolved_model, result.total) == (plan, resolved, Decimal(total))


def test_an_override_is_asked_before_the_list_and_its_default_last() -> None:
    overrides = {"a-b": "input_tokens * 3", "_default": "input_tokens * 4"}
    engine = PricingEngine.from_dict(
        {
            "match": "prefix",
            "models": {"a": "input_tokens", "a-b-c": "input_tokens * 2", "_default": "input_tokens * 9"},
            "plans": {"p": {"id": "p", "name": "P", "rate_overrides": overrides}},
        }
    )
    names = ["a-b", "a-b-1", "a-b-c", "a-b-c-1", "a", "a-x", "b", "_default", None]
    results = [engine.calculate({"model": name, "input_tokens": 1}, "p") for name in names]
    assert [(result.resolved_model, int(result.total)) for result in results] == [
        ("a-b", 3), ("a-b", 3), ("a-b", 3), ("a-b", 3), ("a", 1), ("a", 1), (None, 4), ("_default", 4), (None, 4),
    ]  # fmt: skip
    assert engine.calculate({"model": "a-b-c-1", "input_tokens": 1}).resolved_model == "a-b-c"


def test_null_is_absent() -> None:
    engine = PricingEngine.from_dict(SHOP)
    nulls = dict.fromkeys(("input_tokens", "tool_calls", "images", "seconds", "fixed_job", "not_known"))
    assert engine.calculate({"model": "gpt-4"} | nulls) == engine.calculate({"model": "gpt-4"})


def test_a_factor_turns_what_formulas_give_into_credits() -> None:
    config = SHOP | {"factor": Decimal("0.50"), "plans": {"p": {"id": "p", "name": "P", "factor": 3}}}
    usage = {
        "model": "gpt-4", "input_tokens": 1000, "cache_read_tokens": 1000,
        "tool_calls": ["a"], "search_queries": 3, "fixed_job": "report",
    }  # fmt: skip
    engine = PricingEngine.from_dict(config)
    results = [engine.calculate(usage), engine.calculate(usage, "p")]
    assert [[str(getattr(result, part)) for part in PARTS] for result in results] == [
        ["5.000", "1.0", "0.75", "-2.25000", "10", "14.50000"],
        ["15.000", "3.0", "2.25", "-6.75000", "10", "23.50000"],
    ]
    nothing = engine.calculate({})
    assert [str(getattr(nothing, part)) for part in PARTS] == ["0.0000", "0", "0.00", "0.00000", "0", "0"]


def test_a_metric_not_told_has_its_default() -> None:
    engine = PricingEngine.from_dict(SHOP | {"models": {"_default": "seconds * 2 + images"}})
    assert engine.calculate({}).total == Decimal(3)
    assert engine.calculate({"seconds": Decimal("0.000000000001"), "images": 1}).total == Decimal("1.000000000002")
    assert engine.calculate({"seconds": 0}).total == 0


def test_each_part_is_at_least_zero_but_the_discount() -> None:
    engine = PricingEngine.from_dict(
        {
            "unpriced": "warn",
            "models": {"_default": "input_tokens - 100"},
            "tools": {"a": "tool_calls - 10", "b": "tool_calls * 4"},
            "search": {"costs": "search_queries - 5"},
        }
    )
    result = engine.calculate({"input_tokens": 40, "search_queries": 1, "tool_calls": ["a", "b"]})
    assert [getattr(result, part) for part in PARTS] == [0] * 6
    assert engine.calculate({"input_tokens": 40, "search_queries": 7}).total == 2


def test_a_model_text_is_as_given() -> None:
    models = {
        "_default": "input_tokens if 'x' in model else 2 * input_tokens",
        "m": "input_tokens if model == 'm-1' else 0",
    }
    engine = PricingEngine.from_dict({"models": models, "match": "prefix"})
    totals = [engine.calculate({"model": name, "input_tokens": 1}).total for name in ("xy", "none", None, "m-1", "m")]
    assert totals == [1, 2, 2, 1, 0]


# config, usage, plan -> exception, a part of its text
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None, type[DuctoError], str]] = {
    "unknown model": (
        NO_DEFAULT, {"model": "gpt4", "input_tokens": 1}, None, UnknownModelError, "'gpt4' (did you mean gpt-4?)"),
    "a provider before a model": (
        NO_DEFAULT, {"model": "x/y/gpt-4", "input_tokens": 1}, None, UnknownModelError,
        "'x/y/gpt-4' (did you mean gpt-4? aliases: {\"x/y/\": \"*\"} serves all such names.)"),
    "a count that is unread": (
        NO_DEFAULT, {"model": "gpt-4", "unread": {"new.kind": 3}}, None, UnpricedUsageError, "say free: [unread]"),
    "unknown model, not used": (NO_DEFAULT, {"model": "x"}, None, UnknownModelError, "unknown model 'x'"),
    "no model, but tokens": (NO_DEFAULT, {"input_tokens": 1}, None, UnknownModelError, "no model is named"),
    "no model, tokens and a job": (
        NO_DEFAULT, {"model": "none", "input_tokens": 1, "fixed_job": "report"}, None, UnknownModelError, "no model"),
    "unknown job": (SHOP, {"fixed_job": "Reports"}, None, UnknownJobError, "'Reports' (did you mean report?)"),
    "unknown metric": (SHOP, {"inputTokens": 5}, None, UnknownMetricError, "(did you mean input_tokens?)"),
    "misspelt metric": (SHOP, {"image": 5}, None, UnknownMetricError, "'image' (did you mean images?)"),
    "unknown plan": (SHOP, {}, "Pro", InvalidArgumentError, "'Pro' (did you mean pro?)"),
    "a negative count": (SHOP, {"input_tokens": -5}, None, InvalidArgumentError, "input_tokens: must not be negative"),
    "text": (SHOP, {"images": "5"}, None, InvalidArgumentError, "images: must be a number, not '5'"),
    "a zero divisor in a tool": (SHOP, {"tool_calls": ["odd"] * 3}, None, FormulaError, "tools.odd"),
    "a zero divisor in an override": (
        SHOP | {"plans": {"p": {"id": "p", "name": "P", "rate_overrides": {"gpt-4": "1 / output_tokens"}}}},
        {"model": "gpt-4"}, "p", FormulaError, "plans.p.rate_overrides.gpt-4"),
    "a cost beyond bigint": (
        {"models": {"a": "input_tokens ** 2", "b": "input_tokens"}, "tools": {"t": "tool_calls"}},
        {"model": "a", "input_tokens": 10**10, "tool_calls": ["t"]}, None, OutOfRangeError, "models.a"),
    "a factor beyond bigint": (
        {"models": {"a": "input_tokens"}, "factor": 10**29, "fixed": {"j": 2**62}},
        {"model": "a", "input_tokens": 10, "fixed_job": "j"}, None, OutOfRangeError, "models.a"),
    "a tool beyond bigint": (
        {"models": {"a": "input_tokens"}, "tools": {"t": "tool_calls * 1e20"}},
        {"model": "a", "input_tokens": 10, "tool_calls": ["t"]}, None, OutOfRangeError, "tools.t"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    config, usage, plan, kind, message = FAULTS[name]
    with pytest.raises(kind) as caught:
        PricingEngine.from_dict(config).calculate(usage, plan)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError) == (kind not in (FormulaError, OutOfRangeError))


def test_without_a_default_what_used_no_tokens_needs_no_model() -> None:
    engine = PricingEngine.from_dict(NO_DEFAULT)
    assert engine.calculate({"fixed_job": "report"}).total == 7
    assert engine.calculate({"model": "none"}).total == 0
    assert engine.calculate({"model": None, "fixed_job": None}).total == 0


def test_the_largest_cost_is_bigint() -> None:
    engine = PricingEngine.from_dict({"models": {"_default": "input_tokens"}, "fixed": {"j": 2**63 - 1}})
    assert engine.calculate({"fixed_job": "j"}).total == 2**63 - 1
    with pytest.raises(OutOfRangeError, match=r"^fixed\.j:"):
        engine.calculate({"fixed_job": "j", "input_tokens": 1})


RESOLVE = {
    "gpt-4": "gpt-4",
    "gpt-4-0613": "gpt-4",
    "gpt-4@x": "gpt-4",
    "gpt-4:free": "gpt-4",
    "gpt-4/x": "gpt-4",
    "gpt-4_x": "gpt-4",
    "gpt-4o": None,
    "gpt-4.1": None,
    "gpt-4-": "gpt-4",
    "gpt-4-turbo-2024": "gpt-4-turbo",
    "gpt-4-turbo": "gpt-4-turbo",
    "gpt-4-turb": "gpt-4",
    "gpt": None,
    "xgpt-4": None,
    "": None,
    "none": None,
    "_default": "_default",
    "_default-x": None,
    "a--b": "a-",
    "a-": "a-",
    "a": None,
}


def test_resolve_model() -> None:
    keys = ["gpt-4-turbo", "gpt-4", "_default", "a-"]
    for order in (keys, keys[::-1]):
        engine = PricingEngine.from_dict({"models": dict.fromkeys(order, "input_tokens"), "match": "prefix"})
        assert {name: engine.resolve_model(name) for name in RESOLVE} == RESOLVE
        assert [engine.has_model(name) for name in ("gpt-4", "gpt-4-x", "_default")] == [True, False, True]


def test_other_questions() -> None:
    engine = PricingEngine.from_dict(SHOP)
    assert (engine.get_fixed_cost("report"), engine.get_fixed_cost("nothing"), engine.get_fixed_cost("x")) == (
        10,
        0,
        None,
    )
    assert engine.min_balance == 5
    engine.pricing_schema().min_balance = 0
    assert engine.pricing_schema().min_balance == engine.min_balance == 5
    config = PricingConfigData(models={"_default": "input_tokens"}, fixed={"j": 1})
    engine = PricingEngine(config)
    config.fixed["j"] = 2
    assert engine.get_fixed_cost("j") == 1
    with pytest.raises(ConfigError, match=r"^models\.a: "):
        PricingEngine(PricingConfigData(models={"a": "tokens"}))


# Undisputed cases that are answered otherwise on purpose.
OTHERWISE = {
    "cfg-037": "a key of `cache` other than `discount` is refused",
    "cfg-041": "a part is at least zero",
    "res-007": "`none` is no model, and `_default` no answer for it",
    "res-009": "`_default` is never the answer for another name",
    "res-011": "`_default` is never the answer for another name",
}

# More is read from a cache than is put in, which only a config that counts it beside the input has a price for.
BESIDE = ("cfg-015",)


def undisputed(file: str) -> list[dict[str, Any]]:
    cases = exactjson.loads((CONFORMANCE / file).read_text())["cases"]
    return [case for case in cases if not case["disputed"]]


@pytest.mark.skipif(not CONFORMANCE.exists(), reason="not part of a clone")
def test_costs_that_others_calculate_exactly() -> None:
    for case in undisputed("config_cost.json"):
        if case["id"] in OTHERWISE:
            continue
        expected = case["v2_0_1"]
        if "error" in expected:
            with pytest.raises(ValueError, match="unknown model"):
                PricingEngine.from_dict(case["config"]).calculate(case["metrics"])
        else:
            config = case["config"] | ({"cached": "beside"} if case["id"] in BESIDE else {})
            result = PricingEngine.from_dict(config).calculate(case["metrics"])
            assert {part: getattr(result, part) for part in PARTS} == {part: Decimal(expected[part]) for part in PARTS}


@pytest.mark.skipif(not CONFORMANCE.exists(), reason="not part of a clone")
def test_models_that_others_resolve() -> None:
    for case in undisputed("model_resolution.json"):
        engine = PricingEngine({"models": dict.fromkeys(case["models"], "input_tokens"), "match": "prefix"})
        answer = {"resolved": engine.resolve_model(case["query"]), "has_model": engine.has_model(case["query"])}
        assert (answer == case["seed"]) == (case["id"] not in OTHERWISE), case["id"]

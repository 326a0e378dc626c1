"""Pricing configs: what is read, what is refused, and how a fault is told."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from places import CONFORMANCE

from ducto_pg import exactjson
from ducto_pg.errors import ConfigError, ExpressionError
from ducto_pg.models import PricingConfigData
from ducto_pg.pricing.config import check, credit_factor, load

PRICE = "input_tokens * 0.001"
CONFIGS = CONFORMANCE / "config_validation.json"

FULL: dict[str, Any] = {
    "version": 1,
    "models": {"_default": PRICE, "gpt-4": "input_tokens * 0.01 + images"},
    "tools": {"_default": "tool_calls", "web": "tool_calls * 2"},
    "search": {"costs": "search_queries * 0.5"},
    "cache": {"discount": "-cache_read_tokens * 0.0005"},
    "fixed": {"report": 10},
    "min_balance": 0,
    "plans": {
        "free": {"id": "free", "name": "Free", "free_allowance": 100},
        "pro": {
            "id": "pro",
            "name": "Pro",
            "rate_overrides": {"gpt-4": PRICE},
            "features": {"seats": 5, "sla": None},
            "factor": Decimal("0.8"),
        },
    },
    "factor": Decimal("1000000"),
    "rounding": "half_up",
    "metrics": {"images": 0, "audio_seconds": Decimal("0.5")},
    "default_plan": "free",
    "signup_bonus": 50,
    "low_balance": 0,
    "timezone": "Europe/Berlin",
    "overrun": "reject",
}


def with_changes(**changes: Any) -> dict[str, Any]:
    return {"models": {"_default": PRICE}, **changes}


def plan(plan_id: str = "p", **changes: Any) -> dict[str, Any]:
    return with_changes(plans={plan_id: {"id": plan_id, "name": "P", **changes}})


def test_everything_at_once_in_every_form(tmp_path: Path) -> None:
    config = load(FULL)
    assert config.metrics == {"images": Decimal(0), "audio_seconds": Decimal("0.5")}
    assert config.plans is not None
    assert config.plans["pro"].features == {"seats": 5, "sla": None}
    text = exactjson.dumps(FULL)
    file = tmp_path / "pricing.json"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(text) == load(text.encode()) == load(file) == load(config) == load(config.to_json()) == config
    assert load(with_changes()).to_json() == '{"version": 1, "models": {"_default": "input_tokens * 0.001"}}'


def test_defaults() -> None:
    config = load(with_changes())
    assert (config.rounding, config.overrun, config.timezone, config.min_balance) == ("carry", "debt", "UTC", 5)
    assert config.low_balance_credits == 10
    assert load(with_changes(low_balance=0)).low_balance_credits == 0
    assert load(with_changes(min_balance=2**63 - 1)).low_balance_credits == 2**63 - 1


def test_factors_multiply() -> None:
    config = load(plan(factor=Decimal("0.50")) | {"factor": Decimal("20.0")})
    assert [str(credit_factor(config)), str(credit_factor(config, "p"))] == ["20", "10"]
    assert str(credit_factor(load(with_changes()))) == "1"


def test_formulas_come_back_parsed() -> None:
    formulas = check(load(FULL))
    assert formulas.models["gpt-4"].variables == {"input_tokens", "images"}
    assert formulas.overrides["pro"]["gpt-4"].text == PRICE
    assert formulas.overrides["free"] == {}
    assert formulas.search is not None
    assert load(with_changes(search={}, cache={}, tools={})).search == {}


YAML = """
# keys and formulas are text without quotes; anchors may be used
models:
  5: &cheap input_tokens * 0.10
  on: *cheap
  gpt-4:
    input_tokens * 2
    + output_tokens
fixed: {report: 10, yes: 2}
metrics: {audio: 0.50, images: 1}
plans:
  p: {id: p, name: 2026, features: {seats: 1_000, trial: true, ends: 2026-01-01, ratio: 1.10, note: "7", none: ~}}
"""


def test_yaml_is_read_by_its_core_schema() -> None:
    with pytest.raises(ConfigError, match=r"^plans\.p\.name: Input should be a valid string"):
        load(YAML)
    config = load(YAML.replace("2026,", '"2026",'))
    assert config.models == {
        "5": "input_tokens * 0.10",
        "on": "input_tokens * 0.10",
        "gpt-4": "input_tokens * 2 + output_tokens",
    }
    assert config.fixed == {"report": 10, "yes": 2}
    assert str(config.metrics["audio"]) == "0.50"
    assert config.plans is not None
    assert config.plans["p"].features == {
        "seats": "1_000",
        "trial": True,
        "ends": "2026-01-01",
        "ratio": Decimal("1.10"),
        "note": "7",
        "none": None,
    }


# config -> path, position, suggestion, a part of the message
def bonus_for(days: Any) -> dict[str, Any]:
    return with_changes(signup_bonus=5, signup_bonus_days=days)


FAULTS: dict[str, tuple[Any, str, int | None, str | None, str]] = {
    "nothing": (None, "", None, None, "a pricing config is a mapping, not NoneType"),
    "a list": ([], "", None, None, "a pricing config is a mapping, not list"),
    "the name of a file": ("pricing.yaml", "", None, None, "for a file pass a Path"),
    "empty text": ("", "", None, None, "the file is empty"),
    "no models": ({"version": 1}, "models", None, None, "is required"),
    "a misspelt section and no models": ({"modles": {}}, "modles", None, "models", "unknown key"),
    "empty models": ({"models": {}}, "models", None, None, "at least one model"),
    "models as a list": ({"models": ["a"]}, "models", None, None, "valid dictionary"),
    "a factor of nothing": (with_changes(factor=0), "factor", None, None, "must be above 0, not 0"),
    "a negative factor": (plan(factor=Decimal(-1)), "plans.p.factor", None, None, "must be above 0, not -1"),
    "a factor that is text": (with_changes(factor="2"), "factor", None, None, "must be a number, not '2'"),
    "a factor that is a float": (with_changes(factor=float("0.5")), "factor", None, None, "0.5 is a float"),
    "a factor of 31 digits": (with_changes(factor=10**30), "factor", None, None, "30 digits before and after"),
    "a factor of 31 decimals": (plan(factor=Decimal("1e-31")), "plans.p.factor", None, None, "30 digits"),
    "a formula that is a number": (
        {"models": {"a": 5}}, "models.a", None, None, "a formula is text, such as 'input_tokens * 0.001', not 5"),
    "an alias that is null": (
        with_changes(aliases={"b": None}), "aliases.b", None, None, "an alias names a key of models"),
    "a number among the free": (with_changes(free=[5]), "free.0", None, None, "should be a valid string"),
    "a key for all models": ({"models": {"*": PRICE}}, "models.*", None, None, "_default prices all other models"),
    "a key with a wildcard before it": (
        {"models": {"*-mini": PRICE}}, "models.*-mini", None, None, "under aliases, which may begin"),
    "version 2": (with_changes(version=2), "version", None, None, "should be 1"),
    "a misspelt section": (with_changes(fixd={}), "fixd", None, "fixed", "unknown key"),
    "a camel-case section": (with_changes(minBalance=1), "minBalance", None, "min_balance", "unknown key"),
    "a misspelt plan field": (plan(freeAllowance=1), "plans.p.freeAllowance", None, "free_allowance", "unknown key"),
    "another key of search": (
        with_changes(search={"cost": PRICE}), "search.cost", None, None, "search has one key, costs"),
    "another key of cache": (
        with_changes(cache={"other": PRICE}), "cache.other", None, None, "cache has one key, discount"),
    "a formula for search": (with_changes(search=PRICE), "search", None, None, "is a mapping with one key, costs"),
    "a plan whose id differs": (
        with_changes(plans={"a": {"id": "b", "name": "A"}}), "plans.a.id", None, None, "'b' differs from the key 'a'"),
    "a plan without name": (with_changes(plans={"a": {"id": "a"}}), "plans.a.name", None, None, "is required"),
    "an empty name": (plan(name=""), "plans.p.name", None, None, "1 to 255 characters"),
    "two plans of one name": (
        with_changes(plans={"a": {"id": "a", "name": "A"}, "b": {"id": "b", "name": "A"}}),
        "plans.b.name", None, None, "plan 'a' already has the name 'A'"),
    "an unknown default plan": (
        plan("free") | {"default_plan": "Free"}, "default_plan", None, "free", "unknown plan 'Free'"),
    "a default plan without plans": (with_changes(default_plan="p"), "default_plan", None, None, "unknown plan 'p'"),
    "an unknown time zone": (
        with_changes(timezone="Europe/Berln"), "timezone", None, "Europe/Berlin", "unknown time zone"),
    "a time zone that is a path": (with_changes(timezone="../UTC"), "timezone", None, "Etc/UTC", "unknown time zone"),
    "an empty time zone": (with_changes(timezone=""), "timezone", None, None, "unknown time zone"),
    "an unknown rounding": (with_changes(rounding="floor"), "rounding", None, None, "'carry'"),
    "an unknown overrun": (with_changes(overrun="forgive"), "overrun", None, None, "'debt'"),
    "a negative floor": (with_changes(min_balance=-1), "min_balance", None, None, "greater than or equal to 0"),
    "a floor beyond bigint": (with_changes(min_balance=2**63), "min_balance", None, None, "less than or equal to"),
    "half a credit": (with_changes(fixed={"a": Decimal("2.5")}), "fixed.a", None, None, "whole credits, not 2.5"),
    "a job beyond bigint": (with_changes(fixed={"a": 2**63}), "fixed.a", None, None, "less than or equal to"),
    "an endless number": (with_changes(min_balance=Decimal("1E+99999999")), "min_balance", None, None, "30 digits"),
    "a bonus below zero": (with_changes(signup_bonus=-1), "signup_bonus", None, None, "greater than or equal to 0"),
    "a bonus that expires at once": (
        bonus_for(0), "signup_bonus_days", None, None, "greater than or equal to 1"),
    "half a day": (
        bonus_for(Decimal("0.5")), "signup_bonus_days", None, None, "whole number"),
    "a bonus for a thousand years": (
        bonus_for(365000), "signup_bonus_days", None, None, "less than or equal to"),
    "days of no bonus": (with_changes(signup_bonus_days=7), "signup_bonus_days", None, None, "no signup_bonus"),
    "an empty key": (with_changes(tools={"": PRICE}), "tools.", None, None, "1 to 255 characters, not 0"),
    "a long key": (with_changes(fixed={"j" * 256: 1}), f"fixed.{'j' * 249}", None, None, "not 256"),
    "a NUL in a key": (with_changes(fixed={"a\0": 1}), "fixed.a\0", 1, None, "cannot store"),
    "half a surrogate pair": (plan(features={"x": "\ud800"}), "plans.p.features.x", 0, None, "cannot store"),
    "the model none": ({"models": {"none": PRICE}}, "models.none", None, None, "means no model"),
    "a metric that exists": (with_changes(metrics={"model": 0}), "metrics.model", None, None, "a metric is named"),
    "a metric in camel case": (with_changes(metrics={"imageCount": 0}), "metrics.imageCount", None, None, "a-z"),
    "a metric called max": (with_changes(metrics={"max": 0}), "metrics.max", None, None, "no word of formulas"),
    "a metric below zero": (with_changes(metrics={"images": -1}), "metrics.images", None, None, "must not be negative"),
    "a metric of 13 decimals": (
        with_changes(metrics={"images": Decimal("0.0000000000001")}), "metrics.images", None, None, "12 decimals"),
    "a metric that is text": (with_changes(metrics={"images": "0"}), "metrics.images", None, None, "must be a number"),
    "features that are no JSON": (plan(features={"x": {1}}), "plans.p.features.x", None, None, "set is not JSON"),
    "a feature that is NaN": (plan(features={"x": [Decimal("NaN")]}), "plans.p.features.x.0", None, None, "30 digits"),
    "a key that is a number": ({"models": {5: PRICE}}, "models", None, None, "a key must be text, not 5"),
    "a name like no other": ({"models": {"a": "2 * zzz"}}, "models.a", 4, None, "declare it under metrics"),
    "a formula that ends": ({"models": {"a": "input_tokens +"}}, "models.a", 14, None, ""),
    "a misspelt variable": ({"models": {"a": "2 * inptu_tokens"}}, "models.a", 4, "input_tokens", "inptu_tokens"),
    "a formula without a variable": (with_changes(tools={"x": "5"}), "tools.x", 0, None, "at least one"),
    "a formula of a plan": (
        plan(rate_overrides={"gpt-4o": "input_tokens * prize"}), "plans.p.rate_overrides.gpt-4o", 15, None, "prize"),
    "a metric not declared": (with_changes(cache={"discount": "-zzz"}), "cache.discount", 1, None, "zzz"),
    "JSON that ends": ('{"models": {"a": ', "", 17, None, "not JSON: Expecting value (line 1 column 18)"),
    "JSON with NaN": ('{"models": {"a": "input_tokens"}, "min_balance": NaN}', "min_balance", None, None, "30 digits"),
    "a key twice in JSON": (
        '{"models": {"a": "input_tokens"}, "plans": {"p": {"id": "p", "id": "p"}}}',
        "plans.p.id", None, None, "appears twice"),
    "a key twice in YAML": (
        f"models:\n  a: {PRICE}\n  'a': {PRICE}\n", "models.a", 36, None, "the key appears twice (line 3)"),
    "YAML that is none": ("models: [a: b", "", 13, None, "not YAML"),
    "two YAML documents": ("a: b\n---\nc: d", "", 5, None, "not YAML"),
    "a YAML tag": ("models: !!python/object:os.system {}", "models", 8, None, "is not JSON"),
    "a YAML tree that contains itself": ("models: &a\n  b: *a", f"models{'.b' * 50}", None, None, "50 levels"),
    "YAML without end": ("[" * 5000, "", None, None, "not YAML"),
    "JSON without end": ('{"a":' * 100_000, "", None, None, "not JSON"),
    "a NUL in YAML": ("models: \0", "", None, None, "not YAML: unacceptable character"),
    "bytes that are not UTF-8": (b"models: \xff", "", 8, None, "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    source, path, position, suggestion, message = FAULTS[name]
    with pytest.raises(ConfigError) as caught:
        load(source)
    error = caught.value
    assert (error.path, error.position, error.suggestion) == (path, position, suggestion)
    assert message in str(error)
    assert str(error).startswith(path)
    assert suggestion is None or suggestion in str(error)
    assert isinstance(error, ValueError)


def test_a_formula_at_fault_is_an_expression_error() -> None:
    with pytest.raises(ExpressionError):
        load({"models": {"a": "input_tokens * __import__('os')"}})


@pytest.mark.parametrize("value", ["5.0", "1_0", float("5.5"), Decimal("5.5"), Decimal("1E+29")], ids=repr)
@pytest.mark.parametrize("field", ["min_balance", "signup_bonus", "low_balance", "fixed.j", "plans.p.free_allowance"])
def test_credits_are_written_as_whole_numbers(field: str, value: Any) -> None:
    given = {"fixed": {"j": value}} if field == "fixed.j" else {field: value}
    with pytest.raises(ConfigError) as caught:
        load(plan(free_allowance=value) if field.startswith("plans") else with_changes(**given))
    assert (caught.value.path, "must be whole credits, not " in str(caught.value)) == (field, True)


def test_whole_decimals_are_whole() -> None:
    config = load(with_changes(version=Decimal("1"), min_balance=Decimal("5.0"), fixed={"j": Decimal("1E+1")}))
    assert (repr(config.version), repr(config.min_balance), repr(config.fixed)) == ("1", "5", "{'j': 10}")
    for version in ("1", Decimal("1.5")):
        with pytest.raises(ConfigError, match=r"^version: .*should be 1"):
            load(with_changes(version=version))


def test_a_float_is_no_metric() -> None:
    with pytest.raises(ConfigError, match=r"^metrics\.images: .* is a float"):
        load(with_changes(metrics={"images": float("0.5")}))


def test_a_config_built_by_hand_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^default_plan: unknown plan 'gone'"):
        load(PricingConfigData(models={"a": PRICE}, default_plan="gone"))


@pytest.mark.skipif(not CONFIGS.exists(), reason="not part of a clone")
def test_configs_that_others_accept_and_refuse() -> None:
    cases = exactjson.loads(CONFIGS.read_text())["cases"]
    undisputed = [case for case in cases if not case["disputed"]]
    assert len(undisputed) > 20
    for case in undisputed:
        if case["seed"]["ok"]:
            config = load(case["config"])
            assert (config.min_balance, config.fixed) == (case["seed"]["min_balance"], case["seed"]["fixed"])
        else:
            with pytest.raises(ConfigError) as caught:
                load(case["config"])
            assert case["seed"].get("where", caught.value.path) == caught.value.path

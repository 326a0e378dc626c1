"""What a config compiles to: rows of prices and terms, formulas that they share, and the script that publishes them."""

import time
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from hashlib import sha256
from typing import Any

import pytest
from conftest import Connection
from formulas import DEFAULTS, Formulas, fitting, function_answers

from ducto_pg import exactjson
from ducto_pg.client.calls import Calls
from ducto_pg.errors import InvalidArgumentError, NegativePriceError, OutOfRangeError
from ducto_pg.formula.fields import KNOWN_COUNTS
from ducto_pg.formula.generator import Function
from ducto_pg.models import MAX_BIGINT
from ducto_pg.pricing import publish as pricing
from ducto_pg.pricing.config import load
from ducto_pg.pricing.engine import PricingEngine

SHOP: dict[str, Any] = {
    "models": {
        "gpt-4": "input_tokens * 0.010",
        "gpt": "output_tokens * 2",
        "gpt-4-mini": "input_tokens / output_tokens",
        "_default": "input_tokens * 0.5",
        "_d": "images ** 2",
    },
    "tools": {"_default": "tool_calls * 2"},
    "search": {"costs": "search_queries * 3"},
    "cache": {"discount": "-cache_read_tokens * 0.25"},
    "fixed": {"report": 10},
    "metrics": {"images": 0, "seconds": Decimal("1.50")},
    "factor": Decimal("20.0"),
    "low_balance": 7,
    "plans": {
        "pro": {
            "id": "pro",
            "name": "Pro",
            "free_allowance": 5,
            "period": "week",
            "anchor": "start",
            "rollover": 2,
            "rate_overrides": {"gpt-4": "seconds * 4", "gpt-4-mini": "input_tokens"},
            "features": {"seats": 3},
            "factor": Decimal("0.50"),
        },
        "free": {"id": "free", "name": "Free"},
    },
    "default_plan": "free",
}


def price(section: str, key: str) -> dict[str, Any]:
    [row] = [row for row in COMPILED.prices if (row["section"], row["key"]) == (section, key)]
    return row


def body_id(body: str) -> int:
    return int.from_bytes(sha256(body.encode()).digest()[:8], signed=True)


COMPILED = pricing.compile_prices(load(SHOP))
BODIES = {body_id(body): body for body in COMPILED.formulas}


def test_each_price_is_a_row() -> None:
    assert [f"{row['section']}.{row['key']}" for row in COMPILED.prices] == [
        "models.gpt-4",
        "models.gpt",
        "models.gpt-4-mini",
        "models._default",
        "models._d",
        "plans.pro.rate_overrides.gpt-4",
        "plans.pro.rate_overrides.gpt-4-mini",
        "tools._default",
        "search.costs",
        "cache.discount",
        "fixed.report",
    ]
    assert load(COMPILED.config_json) == load(SHOP)


def test_rates_are_the_numbers_of_the_text() -> None:
    assert [str(rate) for rate in price("models", "gpt-4")["rates"]] == ["0.010"]
    assert price("models", "_d")["rates"] == []
    assert [str(rate) for rate in price("plans.pro.rate_overrides", "gpt-4")["rates"]] == ["1.5", "4"]
    assert price("fixed", "report") == {
        "section": "fixed", "key": "report", "formula_id": None, "rates": [10],
        "composed_id": None, "composed_rates": None, "prefixes": None, "covers": None,
    }  # fmt: skip


def test_a_price_covers_what_it_names_with_its_parts() -> None:
    inputs = [
        "cache_audio_read_tokens", "cache_read_tokens", "cache_write_1h_tokens", "cache_write_tokens",
        "input_audio_tokens", "input_image_tokens", "input_tokens", "input_video_tokens",
    ]  # fmt: skip
    outputs = ["output_audio_tokens", "output_image_tokens", "output_tokens", "reasoning_tokens"]
    assert price("models", "gpt-4")["covers"] == inputs
    assert price("models", "gpt")["covers"] == outputs
    assert price("models", "gpt-4-mini")["covers"] == sorted(inputs + outputs)
    assert price("plans.pro.rate_overrides", "gpt-4")["covers"] == ["seconds"]
    assert price("cache", "discount")["covers"] == ["cache_audio_read_tokens", "cache_read_tokens"]
    flat, beside = (
        {row["key"]: row["covers"] for row in pricing.compile_prices(load({"models": models} | more)).prices}
        for models, more in [
            ({"m": "requests * 3", "n": "requests * 3 + images"}, {}),
            ({"m": "input_tokens", "n": "cache_read_tokens"}, {"cached": "beside"}),
        ]
    )
    assert flat == {"m": sorted({*KNOWN_COUNTS, "unread"} - {"tool_calls"}), "n": ["images", "requests"]}
    assert beside == {
        "m": ["input_audio_tokens", "input_image_tokens", "input_tokens", "input_video_tokens"],
        "n": ["cache_audio_read_tokens", "cache_read_tokens"],
    }


def test_prices_of_one_shape_share_a_formula() -> None:
    assert price("models", "gpt-4")["formula_id"] == price("models", "_default")["formula_id"]
    assert len(BODIES) == len(COMPILED.formulas)
    used = {row[column] for row in COMPILED.prices for column in ("formula_id", "composed_id")} - {None}
    assert used == BODIES.keys()


def test_a_composed_price_has_all_parts_and_their_rates() -> None:
    row = price("models", "gpt-4")
    assert BODIES[row["composed_id"]] == (
        "begin\n  return ("
        "coalesce(trim_scale((p_usage -> 'input_tokens')::numeric), 0) * p_rates[1])"
        " + (coalesce(trim_scale((p_usage -> 'search_queries')::numeric), 0) * p_rates[2])"
        " + ((- coalesce(trim_scale((p_usage -> 'cache_read_tokens')::numeric), 0)) * p_rates[3]);\nend"
    )
    assert [str(rate) for rate in row["composed_rates"]] == ["0.010", "3", "0.25"]
    assert [price(section, key)["composed_id"] for section, key in (("tools", "_default"), ("search", "costs"))] == [
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("model", "cache", "composed"),
    [
        ("input_tokens / 3", None, True),
        ("input_tokens // 3 + 5 % 2", "-input_tokens / 1e6", True),
        ("input_tokens / 0", None, False),
        ("input_tokens / (1 + 1)", None, False),
        ("input_tokens % output_tokens", None, False),
        ("input_tokens", "1 / input_tokens", False),
    ],
)
def test_what_may_divide_by_zero_is_not_composed(model: str, cache: str | None, composed: bool) -> None:
    config = {"models": {"m": model}, "cache": {"discount": cache} if cache else {}}
    [row, *_] = pricing.compile_prices(load(config)).prices
    assert (row["composed_id"] is not None, row["composed_rates"] is not None) == (composed, composed)


def test_the_keys_that_may_serve_instead() -> None:
    prefixes = {row["key"]: row["prefixes"] for row in COMPILED.prices if row["section"] == "models"}
    assert prefixes == {"gpt-4": ["gpt"], "gpt": None, "gpt-4-mini": ["gpt-4", "gpt"], "_default": ["_d"], "_d": None}
    assert price("plans.pro.rate_overrides", "gpt-4-mini")["prefixes"] == ["gpt-4"]
    models = dict.fromkeys(["_default", "_default-x", "_default-x-y"], "input_tokens")
    rows = pricing.compile_prices(load({"models": models})).prices
    assert [row["prefixes"] for row in rows] == [None, None, ["_default-x"]]


def test_terms() -> None:
    none, pro, free = COMPILED.terms
    covers = ["cache_audio_read_tokens", "cache_read_tokens", "model", "provider_cost", "search_queries"]
    assert none.pop("metrics") == ["seconds"]
    assert none == {
        "plan_id": "", "plan_name": None, "free_allowance": 0, "period": "month", "anchored": False, "rollover": 0,
        "features": {}, "factor": Decimal(20), "plan_factor": 1,
        "overrides": None, "covers": covers, "match": "dated", "aliases": None,
        "unpriced": "refuse", "cached": "inside",
        "min_balance": 5, "rounding": "carry", "overrun": "debt", "low_balance": 7,
        "signup_bonus": 0, "signup_bonus_days": None, "default_plan": "free", "timezone": "UTC",
    }  # fmt: skip
    assert pro == {
        "plan_id": "pro", "plan_name": "Pro", "free_allowance": 5, "period": "week", "anchored": True,
        "rollover": 2, "plan_low_balance": None, "features": {"seats": 3},
        "plan_factor": Decimal("0.5"), "overrides": "plans.pro.rate_overrides",
    }  # fmt: skip
    assert free == {
        "plan_id": "free", "plan_name": "Free", "free_allowance": 0, "period": "month", "anchored": False,
        "rollover": 0, "plan_low_balance": None, "features": {}, "plan_factor": 1, "overrides": None,
    }  # fmt: skip
    assert str(none["factor"]) == "20"
    more = {"match": "exact", "aliases": {"x": "gpt"}, "unpriced": "warn", "cached": "beside", "free": ["input_tokens"]}
    [without_tools] = pricing.compile_prices(load({"models": SHOP["models"], "metrics": {"images": 0}} | more)).terms
    freed = ["input_audio_tokens", "input_image_tokens", "input_tokens", "input_video_tokens"]
    assert without_tools["covers"] == [*freed, "model", "provider_cost", "tool_calls"]
    assert {name: without_tools[name] for name in more if name != "free"} | {"free": ["input_tokens"]} == more


def test_a_composed_price_is_that_of_its_parts_to_the_digit(conn: Connection) -> None:
    source = Formulas(4)
    engines: list[PricingEngine] = []
    composed: list[Function] = []
    while len(composed) < 150:
        search = {"costs": source.formula()} if source.random.random() < 0.5 else {}
        cache = {"discount": f"-({source.formula()})"} if source.random.random() < 0.5 else {}
        parts = {"models": {"_default": source.formula()}, "search": search, "cache": cache}
        config = load(parts | {"metrics": DEFAULTS, "free": [*KNOWN_COUNTS, "pages"]})
        compiled = pricing.compile_prices(config)
        if (number := compiled.prices[0]["composed_id"]) is not None:
            [body] = [body for body in compiled.formulas if body_id(body) == number]
            composed.append(Function(number, body, tuple(compiled.prices[0]["composed_rates"])))
            engines.append(PricingEngine(config))
    usages = [[fitting(source.usage()) for _ in range(10)] for _ in composed]
    seen = Counter[str]()
    for engine, cases, answers in zip(engines, usages, function_answers(conn, composed, usages), strict=True):
        for usage, answer in zip(cases, answers, strict=True):
            try:
                expected = format(engine.calculate(usage).total, "f")
            except NegativePriceError:
                seen["a part below 0"] += 1
                assert answer is None, usage
            except OutOfRangeError:
                seen["too large"] += 1
                assert Decimal(answer) > MAX_BIGINT, usage
            else:
                seen["priced"] += 1
                assert answer == expected if Decimal(answer) > 0 else Decimal(expected) == 0, usage
    assert seen["priced"] > 400, seen
    assert seen["a part below 0"] > 100, seen


def test_long_formulas_compose() -> None:
    parts = ["input_tokens" + f" + {number} - 2" * 99 for number in range(3)]
    config = {"models": {"m": parts[0]}, "search": {"costs": parts[1]}, "cache": {"discount": parts[2]}}
    [row, *_] = pricing.compile_prices(load(config)).prices
    assert row["composed_rates"] == [Decimal(rate) for number in range(3) for rate in [number, 2] * 99]


def test_a_large_list_compiles_in_no_time() -> None:
    models = {
        f"m{number}": f"(input_tokens - cache_read_tokens) * 0.{number:06d} + {'output_tokens * ' * (number % 25)}1e-6"
        for number in range(1, 1467)
    }
    started = time.perf_counter()
    compiled = pricing.compile_prices(load({"models": models}))
    pricing.compile_config(load({"models": models}))
    # Each shape, and the same that gives null below 0.
    assert len(compiled.formulas) == 25 * 2
    assert time.perf_counter() - started < 10


def test_the_script_is_the_same_each_time_and_names_every_argument() -> None:
    at = datetime(2027, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    script = pricing.compile_config(load(SHOP), label="it's", activate=False, at=at)
    assert script == pricing.compile_config(load(SHOP), label="it's", activate=False, at=at.astimezone(UTC))
    assert script.startswith("-- Prices for ducto_pg, compiled from a pricing config.")
    assert "select ducto_private.publish(\n  p_config => E'{" in script
    assert "\n  p_label => E'it''s',\n" in script
    assert script.endswith("'::jsonb,\n  p_activate => false,\n  p_at => E'2026-12-31T22:00:00+00:00'::timestamptz);\n")
    assert "p_label => null," in pricing.compile_config(load(SHOP))
    assert all(f"\n    {exactjson.dumps(row)}".replace("'", "''") in script for row in COMPILED.prices)


def test_a_time_to_come_has_a_zone() -> None:
    with pytest.raises(InvalidArgumentError, match="at must be a datetime with a time zone"):
        Calls.publish_pricing.bind(SHOP, at=datetime(2027, 1, 1))
    with pytest.raises(InvalidArgumentError, match="activate is False"):
        Calls.publish_pricing.bind(SHOP, activate=False, at=datetime(2027, 1, 1, tzinfo=UTC))
    statement = Calls.publish_pricing.bind(SHOP, at=datetime(2027, 1, 1, tzinfo=UTC))
    assert "p_at => E'2027-01-01T00:00:00+00:00'::timestamptz)::text, true);\nselect " in statement.sql

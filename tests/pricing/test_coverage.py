"""No price that is silently wrong: what serves a name, what is free and what is refused, in the engine and in SQL."""

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from math import ceil
from random import Random
from typing import Any

import psycopg
import pytest
from conftest import Connection

from ducto_pg import CreditManager, exactjson
from ducto_pg.errors import DuctoError
from ducto_pg.formula.fields import KNOWN_COUNTS, WHOLES, covered
from ducto_pg.pricing.config import load
from ducto_pg.pricing.engine import PricingEngine

RICH = 2**62
USERS = {"ann": None, "paul": "pro"}

Answer = tuple[str | None, str, tuple[str, ...]] | tuple[str, str]
"""The resolved model, the cost and the warnings; or the SQLSTATE and the message."""


def plain(message: str) -> str:
    """Python and SQL name the argument and quote names each in their way."""
    return message.removeprefix("p_metrics: ").replace("'", "").replace('"', "")


class Shop:
    """A published config, with an account on each of its plans."""

    def __init__(self, conn: Connection, data: Mapping[str, Any]) -> None:
        self.conn, self.manager = conn, CreditManager(conn)
        config = load({"min_balance": 0, "rounding": "up"} | dict(data))
        self.engine = PricingEngine(config)
        self.manager.publish_pricing(config)
        for user, plan in USERS.items():
            self.manager.add_credits(user, RICH)
            if plan in (config.plans or {}):
                self.manager.set_user_plan(user, plan)

    def asked(self, usage: Mapping[str, Any], user: str = "ann") -> Answer:
        """What a usage costs: the engine, calculate_cost, a hold and a charge give one answer."""
        asked = (exactjson.dumps(usage), user)
        mine = self.offline(usage, user)
        query = "select c.resolved_model, c.total::text, c.warnings from ducto.calculate_cost(%s::jsonb, %s) as c"
        assert self.row(query, *asked) == mine
        with self.conn.transaction(force_rollback=True):
            row = self.row(
                "select d.error, d.transaction_id, d.warnings from ducto.deduct(%s, %s::jsonb) as d", *asked[::-1]
            )
            if len(row) == 3:
                assert row[0] is None
                query = "select t.resolved_model, t.cost::text from ducto.get_transaction(%s) as t"
                row = (*self.row(query, row[1]), row[2])
            assert row == mine
        with self.conn.transaction(force_rollback=True):
            row = self.row(
                "select h.error, h.reservation_id, h.warnings from ducto.reserve(%s, %s::jsonb) as h", *asked[::-1]
            )
            if len(row) == 3:
                query = "select r.resolved_model, r.held from ducto_private.holds as r where r.hold_id = %s"
                assert (*self.row(query, row[1]), row[2]) == (mine[0], ceil(Decimal(mine[1])), mine[-1])
            else:
                assert row == mine
        return mine

    def offline(self, usage: Mapping[str, Any], user: str) -> Answer:
        plan = USERS[user] if USERS[user] in (self.engine.pricing_schema().plans or {}) else None
        try:
            found = self.engine.calculate(usage, plan)
        except DuctoError as error:
            return error.code, plain(error.message)
        return found.resolved_model, format(found.total, "f"), tuple(found.warnings)

    def row(self, query: str, *values: str) -> tuple[Any, ...]:
        try:
            *row, last = self.conn.execute(query.encode(), values).fetchone() or ()
            return (*row, tuple(last or ()) if "warnings" in query else last)
        except psycopg.Error as error:
            return error.sqlstate, plain(error.diag.message_primary or "")


# --- Which key serves a name ------------------------------------------------------------------------------------------

KEYS = ["gpt-5", "gpt-5-mini", "claude-sonnet-4", "gemini-2.5-pro", "o1", "_default-x"]
NAMES: dict[str, dict[str, str | None]] = {
    "dated": {
        "gpt-5": "gpt-5",
        "gpt-5-2025-08-07": "gpt-5",
        "gpt-5-0613": "gpt-5",
        "gpt-5-latest": "gpt-5",
        "gpt-5-mini-2025-08-07": "gpt-5-mini",
        "gpt-5-pro": None,
        "gpt-5-nano": None,
        "gpt-5-1": None,
        "gpt-5.1": None,
        "gpt-5-": None,
        "gpt-5-2025-08-07x": None,
        "gpt-5-2025-08-07\n": None,
        "gpt-5-٠٦١٣": None,
        "claude-sonnet-4-20250514": "claude-sonnet-4",
        "claude-sonnet-4@20250514": "claude-sonnet-4",
        "claude-sonnet-4-20250514-v1:0": "claude-sonnet-4",
        "claude-sonnet-4-5": None,
        "claude-sonnet-4-5-20250929": None,
        "gemini-2.5-pro-001": "gemini-2.5-pro",
        "gemini-2.5-pro-05-06": "gemini-2.5-pro",
        "gemini-2.5-pro-preview-05-06": None,
        "o1-2024-12-17": "o1",
        "o1-mini": None,
        "o1/v2": "o1",
        "o1:latest_001": "o1",
        "_default-x": "_default-x",
        "_default-001": None,
        "GPT-5": None,
    },
    "prefix": {
        "gpt-5-pro": "gpt-5",
        "gpt-5-": "gpt-5",
        "gpt-5-mini-x": "gpt-5-mini",
        "gpt-5.1": None,
        "claude-sonnet-4-5": "claude-sonnet-4",
        "o1:free\n": "o1",
        "_default-001": None,
    },
    "exact": {"gpt-5": "gpt-5", "gpt-5-0613": None, "gpt-5-": None, "_default": "_default"},
}


@pytest.mark.parametrize("match", NAMES)
def test_a_name_is_served_by_the_key_that_match_allows(conn: Connection, match: str) -> None:
    models = {key: f"input_tokens * {place}" for place, key in enumerate([*KEYS, "_default"], 1)}
    shop = Shop(conn, {"models": models, "match": match})
    for name, key in NAMES[match].items():
        cost = ([*KEYS, "_default"].index(key or "_default") + 1) * 100
        assert shop.asked({"model": name, "input_tokens": 100}) == (key, str(cost), ()), name


def test_a_name_that_no_key_serves_has_no_price(conn: Connection) -> None:
    shop = Shop(conn, {"models": {"gpt-5": "input_tokens"}, "aliases": {"our-deployment": "gpt-5", "azure/": "*"}})
    for name in ("gpt-5-pro", "gpt-5-nano", "azure/gpt-5-pro", "azure/", "our-deployment-x", "_default"):
        assert shop.asked({"model": name, "input_tokens": 1}) == ("DU003", f"unknown model {name}")


ALIASES = {
    "our-deployment": "gpt-5",
    "chat": "gpt-5",
    "chat-fast": "gpt-5-mini",
    "openai/": "*",
    "*.anthropic.": "*",
    "*sonnet": "claude-sonnet-4",
    "gpt-5-pro": "o1",
}
ALIASED: dict[str, str | None] = {
    "our-deployment": "gpt-5",
    "OUR-Deployment": "gpt-5",
    "our-deployment-2025-01-01": "gpt-5",
    "our-deployment-eu": None,
    "chat": "gpt-5",
    "chat-fast": "gpt-5-mini",
    "chat-fast-001": "gpt-5-mini",
    "openai/gpt-5": "gpt-5",
    "OpenAI/gpt-5-0613": "gpt-5",
    "openai/GPT-5": None,
    "openai/chat": "gpt-5",
    "openai/_default": None,
    "openai/": None,
    "us.anthropic.claude-sonnet-4-20250514-v1:0": "claude-sonnet-4",
    "eu.anthropic.x": None,
    "my-sonnet": "claude-sonnet-4",
    "my-sonnet-sonnet@001": "claude-sonnet-4",
    "my-sonnets": None,
    "gpt-5-pro": "o1",
    "gpt-5": "gpt-5",
}


def test_aliases_serve_what_no_key_does_by_name(conn: Connection) -> None:
    models = {key: f"input_tokens * {place}" for place, key in enumerate([*KEYS, "_default"], 1)}
    shop = Shop(conn, {"models": models, "aliases": ALIASES})
    for name, key in ALIASED.items():
        cost = ([*KEYS, "_default"].index(key or "_default") + 1) * 100
        assert shop.asked({"model": name, "input_tokens": 100}) == (key, str(cost), ()), name
        assert shop.engine.resolve_model(name) == key


def test_an_override_that_serves_a_name_wins_over_the_list(conn: Connection) -> None:
    models = {"gpt-5": "input_tokens", "gpt-5-2025-08-07": "input_tokens * 2", "o1": "input_tokens * 3"}
    rates = {"gpt-5": "input_tokens * 7", "o1-pro": "input_tokens * 8"}
    plans = {"pro": {"id": "pro", "name": "Pro", "rate_overrides": rates}}
    shop = Shop(conn, {"models": models, "plans": plans, "aliases": {"x/": "*", "fast": "gpt-5-2025-08-07"}})
    for name, listed, own in [
        ("gpt-5", ("gpt-5", "10"), ("gpt-5", "70")),
        ("gpt-5-2025-08-07", ("gpt-5-2025-08-07", "20"), ("gpt-5", "70")),
        ("x/gpt-5-2025-08-07", ("gpt-5-2025-08-07", "20"), ("gpt-5", "70")),
        ("fast", ("gpt-5-2025-08-07", "20"), ("gpt-5", "70")),
        ("o1", ("o1", "30"), ("o1", "30")),
        ("o1-pro", None, ("o1-pro", "80")),
    ]:
        usage = {"model": name, "input_tokens": 10}
        assert shop.asked(usage) == ((*listed, ()) if listed else ("DU003", f"unknown model {name}"))
        assert shop.asked(usage, "paul") == (*own, ())


# --- What a price leaves out ------------------------------------------------------------------------------------------

M = {"model": "m"}
USED = {"model": "m", "input_tokens": 100, "output_tokens": 10}
BOTH = "input_tokens * 2 + output_tokens * 3"


def models(formula: str = BOTH, **more: Any) -> dict[str, Any]:
    return {"models": {"m": formula}} | more


def unpriced(names: str) -> tuple[str, str]:
    return "DU008", f"no formula of this price names {names}"


def beyond(parts: str, whole: str) -> tuple[str, str]:
    return "22023", f"{parts} is more than the {whole} that it is a part of"


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Answer]] = {
    # unpriced usage
    "all named": (models(), USED, ("m", "230", ())),
    "one not named": (models("input_tokens"), USED, unpriced("output_tokens")),
    "several, in order": (models(), USED | {"images": 1, "characters": 2}, unpriced("characters, images")),
    "a zero": (models(), USED | {"images": 0}, ("m", "230", ())),
    "null": (models(), USED | {"images": None}, ("m", "230", ())),
    "parts of a named whole": (models(), USED | {"cache_read_tokens": 9, "reasoning_tokens": 3}, ("m", "230", ())),
    "a part of a part": (models(), USED | {"cache_write_tokens": 9, "cache_write_1h_tokens": 3}, ("m", "230", ())),
    "only a part named": (
        models("cache_read_tokens + output_tokens"), USED | {"cache_read_tokens": 9}, unpriced("input_tokens")),
    "a metric": (models(metrics={"pages": 0}), USED | {"pages": Decimal("0.5")}, unpriced("pages")),
    "a metric of another model": (
        {"models": {"m": BOTH, "n": "pages"}, "metrics": {"pages": 0}}, USED | {"pages": 1}, unpriced("pages")),
    "search names it": (models(search={"costs": "search_queries * 5"}), USED | {"search_queries": 2}, ("m", "240", ())),
    "no search": (models(), USED | {"search_queries": 2}, unpriced("search_queries")),
    "no model": ({"models": {"m": BOTH}}, {"images": 2}, unpriced("images")),
    "a job": (models(fixed={"j": 7}), {"fixed_job": "j", "images": 2}, unpriced("images")),
    "unread": (models(), USED | {"unread": {"usage.new": 3, "usage.none": 0}}, unpriced("unread.usage.new")),
    "unread is free": (models(free=["unread"]), USED | {"unread": {"usage.new": 3}}, ("m", "230", ())),
    "provider_cost": (models(), USED | {"provider_cost": Decimal("0.1")}, ("m", "230", ())),
    "a requests count": (models(), USED | {"requests": 2}, unpriced("requests")),
    # warn
    "one not named, told": (models("input_tokens", unpriced="warn"), USED, ("m", "100", ("unpriced_usage",))),
    "below zero, told": (
        models("output_tokens - input_tokens", unpriced="warn"), USED, ("m", "0", ("negative_price",))),
    "both, told": (
        models("output_tokens - input_tokens", unpriced="warn"), USED | {"images": 1},
        ("m", "0", ("negative_price", "unpriced_usage"))),
    "two below zero, told once": (
        models("output_tokens - input_tokens", unpriced="warn", search={"costs": "-output_tokens"}), USED,
        ("m", "0", ("negative_price",))),
    # no usage
    "no count": (models(), M, ("m", "0", ("no_usage",))),
    "no count above zero": (models(), M | {"input_tokens": 0}, ("m", "0", ("no_usage",))),
    "no model and no count": (models(), {}, (None, "0", ())),
    "no count, at a price of its own": (models("input_tokens + 7"), M, ("m", "7", ("no_usage",))),
    "a provider's cost is no count": (models(), M | {"provider_cost": 3}, ("m", "0", ("no_usage",))),
    "an unread zero is no count": (models(), M | {"unread": {"x": 0}}, ("m", "0", ("no_usage",))),
    "a job is a use": (models(fixed={"j": 7}), M | {"fixed_job": "j"}, ("m", "7", ())),
    "a tool that is free is a use": (models(), M | {"tool_calls": ["a"]}, ("m", "0", ())),
    # free
    "free": (models("input_tokens", free=["output_tokens"]), USED, ("m", "100", ())),
    "a free whole frees its parts": (
        models("output_tokens", free=["input_tokens"]),
        USED | {"cache_read_tokens": 3, "input_audio_tokens": 4}, ("m", "10", ())),
    "a free part frees no whole": (models("output_tokens", free=["cache_read_tokens"]), USED, unpriced("input_tokens")),
    "times zero": (models("input_tokens + output_tokens * 0"), USED, ("m", "100", ())),
    "tool calls without tools": (models(), USED | {"tool_calls": ["a", "b"]}, ("m", "230", ())),
    "tools": (models(tools={"a": "tool_calls * 5"}), USED | {"tool_calls": ["a", "b"]}, ("m", "235", ())),
    "tools, named free": (
        models(tools={"a": "tool_calls * 5"}, free=["tool_calls"]),
        USED | {"tool_calls": ["a", "b"]}, ("m", "235", ())),
    "tools and a formula that names them": (
        models(f"{BOTH} + tool_calls", tools={"a": "tool_calls * 5"}),
        USED | {"tool_calls": ["a", "b"]}, ("m", "237", ())),
    "what a tool without calls names": (
        models(tools={"a": "tool_calls + images"}), USED | {"images": 1}, unpriced("images")),
    "what a called tool names": (
        models(tools={"a": "tool_calls + images"}), USED | {"images": 1, "tool_calls": ["a"]}, ("m", "232", ())),
    # a flat price
    "flat": (models("requests * 4"), USED | {"images": 3, "unread": {"x": 1}}, ("m", "4", ())),
    "flat, many": (models("requests * 4"), USED | {"requests": 3}, ("m", "12", ())),
    "flat, none used": (models("requests * 4"), M, ("m", "4", ())),
    "flat, told to be none": (models("requests * 4"), M | {"requests": 0}, ("m", "0", ())),
    "flat, with a tool": (
        models("requests * 4", tools={"a": "tool_calls * 5"}), USED | {"tool_calls": ["a", "b"]}, ("m", "9", ())),
    "flat and more is not flat": (models("requests * 4 + input_tokens"), USED, unpriced("output_tokens")),
    # below zero
    "a model below zero": (
        models("output_tokens - input_tokens"), USED, ("DU009", "models.m: the price of this usage is below 0")),
    "a tool below zero": (
        models(tools={"_default": "tool_calls - 5"}), USED | {"tool_calls": 2},
        ("DU009", "tools: the price of this usage is below 0")),
    "a search below zero": (
        models(search={"costs": "search_queries - 5"}),
        USED, ("DU009", "search.costs: the price of this usage is below 0")),
    "a discount below zero": (
        models(cache={"discount": "-cache_read_tokens"}), USED | {"cache_read_tokens": 30}, ("m", "200", ())),
    "a discount above the price": (
        models(cache={"discount": "-cache_read_tokens * 9"}), USED | {"cache_read_tokens": 30}, ("m", "0", ())),
    # parts and wholes
    "a part as large as its whole": (models(), USED | {"cache_read_tokens": 100}, ("m", "230", ())),
    "a part above": (
        models(), USED | {"cache_read_tokens": 101}, beyond("cache_read_tokens", "input_tokens")),
    "a part alone": (models(), M | {"reasoning_tokens": 1}, beyond("reasoning_tokens", "output_tokens")),
    "reads and writes together": (
        models(), USED | {"cache_read_tokens": 60, "cache_write_tokens": 41},
        beyond("cache_read_tokens + cache_write_tokens", "input_tokens")),
    "cached audio above audio": (
        models(), USED | {"cache_read_tokens": 60, "cache_audio_read_tokens": 5},
        beyond("cache_audio_read_tokens", "input_audio_tokens")),
    "beside": (
        models("input_tokens + output_tokens + cache_read_tokens * 0.5", cached="beside"),
        USED | {"cache_read_tokens": 500}, ("m", "360.0", ())),
    "beside, not named": (models(cached="beside"), USED | {"cache_read_tokens": 500}, unpriced("cache_read_tokens")),
    "beside, output": (
        models(cached="beside"), USED | {"reasoning_tokens": 11}, beyond("reasoning_tokens", "output_tokens")),
    "beside, 1 h": (
        models(f"{BOTH} + cache_write_tokens", cached="beside"),
        USED | {"cache_write_tokens": 5, "cache_write_1h_tokens": 6},
        beyond("cache_write_1h_tokens", "cache_write_tokens")),
    # bodies
    "a body": (
        models("(input_tokens - cache_read_tokens) * 2 + cache_read_tokens + output_tokens * 3"),
        {"body": {"model": "m-2025-08-07", "usage": {
            "prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110,
            "prompt_tokens_details": {"cached_tokens": 40}}}, "api": "openai_chat"},
        ("m", "190", ())),
    "a body whose cached input stands beside": (
        models("input_tokens * 2 + cache_read_tokens + output_tokens * 3", cached="beside"),
        {"body": {"model": "m", "usage": {
            "prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110,
            "prompt_tokens_details": {"cached_tokens": 40}}}, "api": "openai_chat"},
        ("m", "190", ())),
    "a body, its model given": (
        models(),
        {
            "body": {"input_tokens": 100, "output_tokens": 10, "cache_read_input_tokens": 5},
            "api": "anthropic", "model": "m"},
        ("m", "240", ())),
    "a body of no API": (
        models(), {"body": {"input_tokens": 100, "output_tokens": 10}, "api": 5, "model": "m"},
        ("22023", "beside body stand only api and model, both texts")),
    "a body with a count that nobody knows": (
        models(),
        {"body": {"input_tokens": 100, "output_tokens": 10, "new_tokens": 5}, "api": "anthropic", "model": "m"},
        unpriced("unread.new_tokens")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_count_is_charged_or_free_or_refused(conn: Connection, name: str) -> None:
    config, usage, expected = CASES[name]
    assert Shop(conn, config).asked(usage) == expected


# --- One count at a time ----------------------------------------------------------------------------------------------


def with_wholes(pick: Random, name: str) -> dict[str, Any]:
    """A usage of one count, and of what it is a part of."""
    usage: dict[str, Any] = {name: Decimal("0.5") if name == "audio_seconds" else pick.choice([1, 2, 1000, 10**9])}
    for part in [name, *WHOLES.get(name, ())]:
        usage |= dict.fromkeys(WHOLES.get(part, ()), usage[name])
    return usage


@pytest.mark.parametrize("unpriced", ["refuse", "warn"])
@pytest.mark.parametrize("seed", range(4))
def test_a_usage_costs_nothing_only_where_the_config_says_so(conn: Connection, seed: int, unpriced: str) -> None:
    pick = Random(seed)
    counts = [name for name in KNOWN_COUNTS if name != "tool_calls"]
    named = {key: pick.sample(counts, pick.randint(1, 6)) for key in ("a", "b", "c")}
    formulas = {key: " + ".join(f"{name} * 0.001" for name in names) for key, names in named.items()}
    named["flat"] = counts
    free = pick.sample(counts, 3)
    config = {
        "models": formulas | {"flat": "requests * 3"},
        "tools": {"_default": "tool_calls * 2"},
        "free": free,
        "unpriced": unpriced,
    }
    shop = Shop(conn, config)
    seen = Counter[str]()
    for key, names in named.items():
        for name in [*counts, "tool_calls"]:
            usage = {"tool_calls": 1} if name == "tool_calls" else with_wholes(pick, name)
            missing = usage.keys() - covered([*names, *free], "inside") - {"tool_calls"}
            answer = shop.asked(usage | {"model": key})
            if missing and unpriced == "refuse":
                seen["refused"] += 1
                assert answer == ("DU008", f"no formula of this price names {', '.join(sorted(missing))}"), usage
                continue
            assert len(answer) == 3, (usage, answer)
            assert ("unpriced_usage" in answer[2]) == bool(missing), (usage, answer)
            if Decimal(answer[1]) == 0:
                seen["told" if missing else "free"] += 1
                assert missing or usage.keys() <= covered(free, "inside"), usage
            else:
                seen["charged"] += 1
    assert seen["refused" if unpriced == "refuse" else "told"] > 20, seen
    assert seen["charged"] > len(counts), seen
    assert seen["free"] > 0, seen

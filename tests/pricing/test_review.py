"""What `pricing validate` and `pricing publish` remark on a sound list, and what the database does."""

from pathlib import Path
from typing import Any

import psycopg
import pytest
from places import ROOT

from ducto_pg import CreditManager
from ducto_pg.cli import main
from ducto_pg.pricing.config import load
from ducto_pg.pricing.review import remarks

Connection = psycopg.Connection[Any]

ALL = (
    "input_tokens * 1 + output_tokens * 1 + search_queries + search_results + web_search_calls + code_exec_calls"
    " + audio_seconds + characters + images"
)
FULL: dict[str, Any] = {"models": {"a": ALL}, "tools": {"_default": "tool_calls * 1"}}


def plan(overrides: dict[str, str]) -> dict[str, Any]:
    return {"plans": {"p": {"id": "p", "name": "P", "rate_overrides": overrides}}}


# What it shows, what is in the config beside FULL, the remarks.
REMARKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "a flat price charges all": ({"models": {"a": "requests * 2"}}, []),
    "no model names a count": (
        {"models": {"a": "input_tokens", "b": "input_tokens"}, "free": ["search_queries", "search_results", "images"]},
        ["no model's formula names output_tokens, web_search_calls, code_exec_calls, audio_seconds, characters: "
         "a usage with one of them is refused, unless free lists it"],
    ),
    "they are let pass": (
        {"models": {"a": ALL.replace(" + images", "")}, "unpriced": "warn"},
        ["no model's formula names images: a usage with one of them is charged without it, with a warning, "
         "unless free lists it"],
    ),
    "search may name them": (
        {"models": {"a": ALL.replace(" + search_queries + search_results", "")},
         "search": {"costs": "search_queries + search_results"}},
        [],
    ),
    "some models name a count": (
        {"models": {"a": ALL, **{key: ALL.replace(" + images", "") for key in "bcdef"}}},
        ["only some models' formulas name images (not b, c, d and 2 more)"],
    ),
    "parts are told where their whole is not": (
        {"models": {"a": ALL, "b": ALL.replace("input_tokens", "input_audio_tokens", 1)}},
        ["only some models' formulas name input_tokens (not b)"],
    ),
    "a metric that nobody prices": (
        {"metrics": {"pages": 0}},
        ["no model's formula names pages: a usage with one of them is refused, unless free lists it",
         "metrics.pages: no formula names it"],
    ),
    "prices that are never above 0": (
        {"models": {"a": ALL, "b": f"-1 * ({ALL})", "c": f"0 - ({ALL})",
                    "d": f"min(0, {ALL} - 5)", "e": f"max(0.1, {ALL} - 5)"},
         "search": {"costs": "search_queries * -1"},
         "cache": {"discount": "cache_read_tokens * 0.1"}},
        ["models.b: is never above 0, so it prices nothing",
         "models.c: is never above 0, so it prices nothing",
         "models.d: is never above 0, so it prices nothing",
         "search.costs: is never above 0, so it prices nothing",
         "cache.discount: is never below 0, so it adds to the price"],
    ),
    "free by its name times 0 is meant": ({"models": {"a": ALL, "b": ALL.replace("images", "images * 0")}}, []),
    "a usual discount": ({"cache": {"discount": "cache_read_tokens * -0.1"}}, []),
    "an alias that a key hides": (
        {"models": {"a": ALL, "b": ALL}, "aliases": {"a": "b"}},
        ["aliases.a: a is a key of models too, which serves this name first"],
    ),
    "a line of a plan for no model": (
        plan({"a-2024-01-01": ALL, "z": ALL}),
        ["plans.p.rate_overrides.z: models has no such model, so only this plan can use it"],
    ),
    "a cost of no model": ({"costs": {"z": "input_tokens"}}, ["costs.z: models has no such model"]),
    "no tools": ({"tools": {}}, ["there is no section tools: tool calls are free"]),
    "some tools": (
        {"tools": {"x": "tool_calls"}}, ["tools has no _default: calls of other tools than x are free"]),
    "an alias that takes a name from a key": (
        {"models": {"claude-x": ALL, "aws.x": ALL + " * 2", "same": ALL},
         "aliases": {"claude-x-20250929": "aws.x", "claude-x-latest": "same", "*x-latest": "aws.x", "y": "aws.x"}},
        ["aliases.claude-x-20250929: claude-x would serve this name at another price than aws.x: see that it is meant"],
    ),
    "a key that no name of Bedrock reaches": (
        {"models": {"regional.a": ALL, "regional.b": ALL}, "aliases": {"*us.a": "regional.a"}},
        ["models.regional.b: Bedrock's names have a region there, as us.…: without an alias none reaches this key"],
    ),
    "a default": (
        {"models": {"_default": ALL}},
        ["models._default prices every model that has no line of its own, whatever it costs you"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REMARKS)
def test_remarks(name: str) -> None:
    changes, said = REMARKS[name]
    assert remarks(load({**FULL, **changes})) == said


def test_they_are_told_and_change_nothing(
    db: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text(f"models:\n  a: {ALL}\n")
    note = "ducto-pg: note: there is no section tools: tool calls are free\n"
    assert main(["pricing", "validate", "list.yaml"]) == 0
    assert capsys.readouterr() == ("list.yaml: sound (models: 1, plans: 0)\n", note)
    assert main(["pricing", "publish", "list.yaml", "--dsn", db]) == 0
    out, err = capsys.readouterr()
    assert (out, err.endswith(note)) == ("version 1 published and active\n", True)


def test_the_example_is_remarked_on_in_few_lines() -> None:
    assert 0 < len(remarks(load(ROOT / "examples" / "prices.yaml"))) <= 4


@pytest.fixture
def told(conn: Connection) -> list[str]:
    """What the database remarks, from now on."""
    said: list[str] = []
    conn.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    return said


def test_the_first_activation_tells_the_time_zone_that_it_fixes(conn: Connection, told: list[str]) -> None:
    hints: list[str | None] = []
    conn.add_notice_handler(lambda notice: hints.append(notice.message_hint))
    manager = CreditManager(conn)
    manager.publish_pricing({**FULL, "timezone": "Europe/Berlin"}, activate=False)
    assert told == []
    manager.activate_pricing(1)
    assert told == ["days and months are those of Europe/Berlin for ever: the first activation fixes the time zone"]
    assert hints == ["To have another, install ducto_pg anew in an empty database: no later version can change it."]
    manager.publish_pricing({**FULL, "timezone": "Europe/Berlin", "min_balance": 1})
    assert len(told) == 1


def test_a_new_default_plan_leaves_open_accounts_without_one_and_says_so(conn: Connection, told: list[str]) -> None:
    manager = CreditManager(conn)
    plans = {name: {"id": name, "name": name} for name in ("free", "basic")}
    manager.publish_pricing({**FULL, "plans": plans})
    manager.publish_pricing({**FULL, "plans": plans, "default_plan": "free"})
    assert len(told) == 1  # No account is open.
    manager.publish_pricing({**FULL, "plans": plans})
    manager.add_credits("ann", 100)
    manager.publish_pricing({**FULL, "plans": plans, "default_plan": "free"})
    said = "default_plan {} is for accounts that open from now on: open accounts without a plan stay without one"
    assert told[1:] == [said.format("free")]
    manager.publish_pricing({**FULL, "plans": plans, "default_plan": "free", "min_balance": 1})
    assert told[1:] == [said.format("free")]
    manager.publish_pricing({**FULL, "plans": plans, "default_plan": "basic"})
    assert told[1:] == [said.format("free"), said.format("basic")]
    manager.set_user_plan("ann", "free")
    manager.publish_pricing({**FULL, "plans": plans, "default_plan": "free", "min_balance": 2})
    assert len(told) == 3

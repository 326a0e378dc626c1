"""What a usage costs, which version says so, and usage that no price takes."""

from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Connection
from ledger_helpers import (
    FREE,
    LONG,
    MOST,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    costs,
    gives,
    lists,
    prices,
    raises,
    reads,
    rich,
    table,
    tell,
)

from ducto_pg import CreditManager


# fmt: off
@table(
    ("the price of a usage, by part", [],
     ask.calculate_cost({"model": "gpt", "input_tokens": 100, "output_tokens": 30, "tool_calls": ["browse", "x"]}),
     reads(model_credits=Decimal("1.9"), tool_credits=2, search_credits=0, cache_savings=0, fixed_credits=0,
         total=Decimal("3.9"), resolved_model="gpt", pricing_version=1, plan_id=None, breakdown={"model": "gpt",
         "input_tokens": 100, "output_tokens": 30, "tool_count": 2})),
    ("a longer name is served by the key before its separator", [],
     ask.calculate_cost({"model": "gpt-0613", "input_tokens": 100}), reads(total=1, resolved_model="gpt")),
    ("no usage costs nothing", [], ask.calculate_cost({}), reads(total=0, resolved_model=None)),
    ("a job needs no model", [], ask.calculate_cost({"fixed_job": "report"}), reads(total=7, fixed_credits=7)),
    ("an earlier version can be asked", [prices(models={"any": "points * 2"})], ask.calculate_cost(costs(3), version=1),
     reads(total=3, pricing_version=1)),
    ("by itself the active version answers", [prices(models={"any": "points * 2"})], ask.calculate_cost(costs(3)),
     reads(total=6, pricing_version=2)),
    ("an unseen user is priced as the default plan would be, and not opened",
     [prices(plans={"p": {"id": "p", "name": "P", "rate_overrides": {"any": "points * 5"}}}, default_plan="p")],
     ask.calculate_cost(costs(3), "new"), reads(total=15, plan_id="p", resolved_model="any")),
    ("a user seen before there was a default plan is on none", [rich, prices(plans=FREE, default_plan="free")],
     ask.calculate_cost(costs(3), "u"), reads(plan_id=None)),
    ("an unknown version", [], ask.calculate_cost(costs(3), version=9), raises("DU002", "version 9", "history")),
    ("a user who is none", [], ask.calculate_cost(costs(3), " "), raises("22023", "p_user_id")),
    ("a division by zero names its formula", [], ask.calculate_cost({"model": "ratio", "input_tokens": 1}),
     raises("DU006", "division by zero", "models.ratio", "Guard")),
    ("a cost beyond bigint names its formula", [], ask.calculate_cost({"model": "square", "input_tokens": 10**12}),
     raises("22003", "models.square", "bigint")),
)
def test_calculate_cost(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("the active version", [], ask.get_active_pricing(), reads(version=1, label=None)),
    ("a version by its number", [prices(min_balance=0)], ask.get_pricing_config(1), reads(version=1)),
    ("history, newest first", [prices(min_balance=0), ask.activate_pricing(1)], ask.get_pricing_history(),
     lists({"version": 2, "active": False}, {"version": 1, "active": True})),
    ("no such version", [], ask.get_pricing_config(7), raises("DU002", "version 7", "history")),
    ("no version", [], ask.get_pricing_config(None), raises("DU002", "null")),
    ("an earlier version comes back", [prices(min_balance=0)], ask.activate_pricing(1), gives(version=1)),
    ("what is not there cannot be activated", [], ask.activate_pricing(7), raises("DU002", "version 7", "history")),
    ("nor nothing", [], ask.activate_pricing(None), raises("DU002", "null", "history")),
)
def test_versions(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_activations_are_recorded_and_change_only_what_comes_after(ledger: Ledger) -> None:
    rich(ledger)
    ask.deduct("u", costs(3))(ledger)
    ledger.publish(models={"any": "points * 2"})
    ask.deduct("u", costs(3))(ledger)
    ask.activate_pricing(1)(ledger)
    ask.activate_pricing(1)(ledger)
    ask.deduct("u", costs(3))(ledger)
    query = (
        "select version, from_version, recorded_by = session_user, role_set"
        " from ducto_private.activations order by activation_id"
    )
    assert ledger.sql(query) == [(1, None, True, "none"), (2, 1, True, "none"), (1, 2, True, "none")]
    charges = ledger.run(ask.list_transactions("u", type="usage"))
    assert [(row["pricing_version"], row["amount"]) for row in charges] == [(1, -3), (2, -6), (1, -3)]


def test_the_time_zone_is_fixed_by_the_first_activated_version(ledger: Ledger) -> None:
    CreditManager(ledger.conn).publish_pricing(
        {"models": {"m": "input_tokens"}, "timezone": "Asia/Tokyo"}, activate=False
    )
    raises("22023", "timezone", "Asia/Tokyo", "UTC", "keep")(ledger, ask.activate_pricing(2))


def test_without_prices_money_still_moves(conn: Connection) -> None:
    manager = CreditManager(conn)
    assert manager.get_active_pricing() is None
    assert conn.execute("select (ducto.get_active_pricing()).*").fetchall() == [(None,) * 5]
    grant = manager.add_credits("u", 10).or_raise()
    manager.remove_credits("u", 1, transaction_id=grant.transaction_id).or_raise()
    manager.set_credit_limit("u", 5).or_raise()
    balance = manager.get_balance("u")
    assert (balance.balance, balance.reserved, balance.available, balance.credit_limit) == (9, 0, 14, 5)
    for call in (
        "calculate_cost('{}')",
        "reserve('u', '{}')",
        "reserve_credits('u', 1)",
        "deduct('u', '{}')",
        "deduct_credits('u', 1)",
        "deduct_fixed('u', 'report')",
    ):
        with pytest.raises(psycopg.Error, match="pricing not loaded") as raised:
            conn.execute(f"select ducto.{call}".encode())
        assert raised.value.sqlstate == "DU001"
        assert "publish" in (raised.value.diag.message_hint or "")
    manager.publish_pricing({"models": {"m": "input_tokens"}}, activate=False)
    assert manager.get_active_pricing() is None
    assert manager.verify_ledger() == []


BAD_USAGE: list[tuple[str, Any, str, tuple[str, ...]]] = [
    ("nothing", None, "22023", ("p_metrics", "null")),
    ("a list", [], "22023", ("p_metrics", "object", "array")),
    ("a text", '"gpt"', "22023", ("object", "string")),
    ("a number", 5, "22023", ("object", "number")),
    ("a negative count", {"model": "gpt", "input_tokens": -1}, "22023", ("input_tokens", "at least 0", "-1")),
    ("half a token", {"model": "gpt", "input_tokens": Decimal("0.5")}, "22023", ("input_tokens", "whole", "0.5")),
    ("half a call", {"tool_calls": Decimal("1.5")}, "22023", ("tool_calls", "whole")),
    ("10^15 tokens", {"model": "gpt", "input_tokens": 10**15}, "22023", ("input_tokens", "10^15")),
    ("1e400 tokens", '{"model": "gpt", "input_tokens": 1e400}', "22023", ("input_tokens", "10^15")),
    ("a count in quotes", {"model": "gpt", "input_tokens": "5"}, "22023", ("input_tokens", "number", "string")),
    ("NaN", {"model": "gpt", "input_tokens": "NaN"}, "22023", ("input_tokens", "number", "NaN")),
    ("a true count", {"model": "gpt", "input_tokens": True}, "22023", ("input_tokens", "number", "boolean")),
    ("a nested count", {"model": "gpt", "input_tokens": {"n": 1}}, "22023", ("input_tokens", "number", "object")),
    ("13 decimals", {"points": Decimal("1e-13")}, "22023", ("points", "12 decimals")),
    ("a negative metric", {"points": Decimal("-0.1")}, "22023", ("points", "at least 0")),
    ("a misspelt metric", {"inputTokens": 1}, "DU005", ("inputTokens", "did you mean input_tokens?")),
    ("an unknown metric", {"zebras": 1}, "DU005", ("zebras", "metrics")),
    (
        "counts that no formula names",
        {"search_queries": 4, "code_exec_calls": 1, "search_results": 0},
        "DU008",
        ("code_exec_calls, search_queries", "free"),
    ),
    ("a model that is a number", {"model": 4}, "22023", ("model", "text", "number")),
    ("a model of 256 characters", {"model": LONG}, "22023", ("model", "255")),
    ("an unknown model", {"model": "gpx", "input_tokens": 1}, "DU003", ("gpx", "did you mean gpt?")),
    ("a longer name of another model", {"model": "gpto", "input_tokens": 1}, "DU003", ("gpto",)),
    ("tokens without a model", {"input_tokens": 1}, "DU003", ("no model", "_default")),
    ("tokens of the model none", {"model": "none", "output_tokens": 1}, "DU003", ("no model",)),
    ("tokens of the model ''", {"model": "", "output_tokens": 1}, "DU003", ("no model",)),
    ("tools in a text", {"tool_calls": "browse"}, "22023", ("tool_calls", "count", "list")),
    ("tools in an object", {"tool_calls": {"browse": 1}}, "22023", ("tool_calls", "list")),
    ("a tool that is a number", {"tool_calls": [1]}, "22023", ("tool_calls", "name")),
    ("a tool without a name", {"tool_calls": [{"nome": "browse"}]}, "22023", ("tool_calls", "name")),
    ("a tool with a number for a name", {"tool_calls": [{"name": 1}]}, "22023", ("tool_calls", "name")),
    ("a tool with an empty name", {"tool_calls": [""]}, "22023", ("tool_calls", "255")),
    ("a tool with a long name", {"tool_calls": [{"name": LONG}]}, "22023", ("tool_calls", "255")),
    ("negative tools", {"tool_calls": -1}, "22023", ("tool_calls", "at least 0")),
    ("an unknown job", {"fixed_job": "reports"}, "DU004", ("reports", "did you mean report?")),
    ("a job that is a number", {"fixed_job": 1}, "22023", ("fixed_job", "name")),
    ("a job without a name", {"fixed_job": ""}, "22023", ("fixed_job", "name")),
    ("more than is kept", {"tool_calls": [f"tool {n}" for n in range(3000)]}, "22023", ("p_metrics", "16384")),
]


@pytest.mark.parametrize(
    ("usage", "sqlstate", "words"), [row[1:] for row in BAD_USAGE], ids=[row[0] for row in BAD_USAGE]
)
def test_bad_usage_is_never_a_silent_zero(ledger: Ledger, usage: Any, sqlstate: str, words: tuple[str, ...]) -> None:
    rich(ledger)
    ask.reserve_credits("u", 5)(ledger)
    for call in (ask.calculate_cost(usage), ask.reserve("u", usage), ask.deduct("u", usage, "key")):
        raises(sqlstate, *words)(ledger, call)
    settled = ask.deduct("u", usage, hold="@hold")
    if sqlstate == "22023":
        raises(sqlstate, *words)(ledger, settled)
    else:
        # A settlement is never refused for its price, and says so.
        (warning,) = ledger.one(settled)["warnings"]
        assert warning in ("priced_by_hold", "unpriced_usage")
        told = ledger.one(ask.get_transaction("@charge"))["price_error"]
        assert words[0] in told


@pytest.mark.parametrize(
    ("usage", "total"),
    [
        ({"model": "gpt", "input_tokens": Decimal("100.0")}, 1),
        ('{"model": "gpt", "input_tokens": 1e2}', 1),
        ({"model": "gpt", "input_tokens": 10**15 - 1}, Decimal("9999999999999.99")),
        ({"points": Decimal("0.000000000001"), "model": "any"}, Decimal("0.000000000001")),
        ({"tool_calls": [{"name": "browse", "id": 1}, "browse", "other"]}, 4),
        ({"tool_calls": 3}, 0),
        ({"model": None, "fixed_job": None}, 0),
        ({"model": "none"}, 0),
    ],
)
def test_good_usage(ledger: Ledger, usage: Any, total: Decimal) -> None:
    reads(total=total)(ledger, ask.calculate_cost(usage))
    ask.add_credits("u", MOST)(ledger)
    assert ledger.one(ask.deduct("u", usage))["cost"] == total

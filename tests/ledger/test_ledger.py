"""The ledger's calls as sentences: given, call, answer; each refusal, each error, and that these write nothing."""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import psycopg
import pytest
from conftest import Connection
from ledger_helpers import (
    MOST,
    UNKNOWN,
    Call,
    Check,
    Ledger,
    Sentence,
    Step,
    ask,
    at,
    costs,
    gives,
    later,
    lists,
    open_ledger,
    prices,
    raises,
    reads,
    refuses,
    replays,
    rolled_back,
    team,
    tell,
)

from ducto_pg import CreditManager
from ducto_pg.embedded import Server

LONG = "x" * 256
FREE = {"free": {"id": "free", "name": "Free", "free_allowance": 10}}
BAD_IDS = [None, "", " ", " u", "u ", "u\n", "\u00a0u", LONG]

rich = ask.add_credits("u", 100)
poor = ask.add_credits("u", 1)


@pytest.fixture(scope="module")
def module_ledger(server: Server, template_db: str) -> Iterator[Ledger]:
    with open_ledger(server, template_db) as ledger:
        yield ledger


@pytest.fixture
def ledger(module_ledger: Ledger) -> Iterator[Ledger]:
    with rolled_back(module_ledger) as ledger:
        yield ledger


def table(*sentences: Sentence) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("given", "call", "check"), [row[1:] for row in sentences], ids=[row[0] for row in sentences]
    )


# Prices


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


# Usage

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
    ("a model that is a number", {"model": 4}, "22023", ("model", "text", "number")),
    ("a model of 256 characters", {"model": LONG}, "22023", ("model", "255")),
    ("an unknown model", {"model": "gpx", "input_tokens": 1}, "DU003", ("gpx", "did you mean gpt?")),
    ("a longer name of another model", {"model": "gpto", "input_tokens": 1}, "DU003", ("gpto",)),
    ("tokens without a model", {"input_tokens": 1}, "DU003", ("no model", "_default")),
    ("tokens of the model none", {"model": "none", "output_tokens": 1}, "DU003", ("no model",)),
    ("tokens of the model ''", {"model": "", "cache_read_tokens": 1}, "DU003", ("no model",)),
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
    for call in (
        ask.calculate_cost(usage),
        ask.reserve("u", usage),
        ask.deduct("u", usage, "key"),
        ask.deduct("u", usage, hold="@hold"),
    ):
        raises(sqlstate, *words)(ledger, call)


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
        ({"search_queries": 4, "web_search_calls": 1, "code_exec_calls": 1, "search_results": 3}, 0),
    ],
)
def test_good_usage(ledger: Ledger, usage: Any, total: Decimal) -> None:
    reads(total=total)(ledger, ask.calculate_cost(usage))
    ask.add_credits("u", MOST)(ledger)
    assert ledger.one(ask.deduct("u", usage))["cost"] == total


# Ids, keys, amounts, metadata: what every call refuses alike

USER_CALLS: list[Callable[..., Call]] = [
    ask.get_balance,
    lambda u: ask.add_credits(u, 1),
    lambda u: ask.remove_credits(u, 1),
    lambda u: ask.set_credit_limit(u, 1),
    lambda u: ask.reserve(u, costs(1)),
    lambda u: ask.reserve_credits(u, 1),
    lambda u: ask.deduct(u, costs(1)),
    lambda u: ask.deduct_credits(u, 1),
    lambda u: ask.deduct_fixed(u, "report"),
    ask.list_reservations,
    ask.list_transactions,
]


@pytest.mark.parametrize("user", BAD_IDS, ids=repr)
def test_an_id_has_1_to_255_characters_without_blanks_at_its_ends(ledger: Ledger, user: str | None) -> None:
    for call in USER_CALLS:
        raises("22023", "p_user_id", "1 to 255")(ledger, call(user))


@pytest.mark.parametrize("user", ["u", "a b", "x" * 255, "émile", "U", "🦆", "'; --", "{}", "null", "%s", "\\", "a\tb"])
def test_any_other_text_is_an_id_compared_byte_by_byte(ledger: Ledger, user: str) -> None:
    ask.add_credits(user, 20)(ledger)
    ask.deduct(user, costs(1))(ledger)
    reads(balance=19, user_id=user)(ledger, ask.get_balance(user))
    reads(balance=0)(ledger, ask.get_balance("x" + user.swapcase()[:254]))


KEYED_CALLS: list[Callable[..., Call]] = [
    lambda key: ask.add_credits("u", 1, key=key),
    lambda key: ask.remove_credits("u", 1, key=key),
    lambda key: ask.reserve("u", costs(1), key=key),
    lambda key: ask.reserve_credits("u", 1, key=key),
    lambda key: ask.extend_reservation("@hold1", 1, key=key),
    lambda key: ask.deduct("u", costs(1), key),
    lambda key: ask.deduct_credits("u", 1, key=key),
    lambda key: ask.deduct_fixed("u", "report", key),
    lambda key: ask.refund_credits("@charge1", 1, key=key),
]


@pytest.mark.parametrize("key", ["", " ", "\t\n", "\u00a0", LONG], ids=repr)
def test_a_key_has_1_to_255_characters_and_is_not_blank(ledger: Ledger, key: str) -> None:
    for step in (rich, ask.reserve_credits("u", 1), ask.deduct("u", costs(3))):
        step(ledger)
    for call in KEYED_CALLS:
        raises("22023", "p_idempotency_key", "1 to 255")(ledger, call(key))


@pytest.mark.parametrize("key", ["k", " k", "x" * 255, "🦆", "K", "'"])
def test_every_keyed_call_answers_the_same_again(ledger: Ledger, key: str) -> None:
    for keyed in KEYED_CALLS:
        with rolled_back(ledger) as told:
            for step in (rich, ask.reserve_credits("u", 1), ask.deduct("u", costs(3))):
                step(told)
            call = keyed(key)
            gives(idempotent=False)(told, call)
            later(hours=2)(told)
            ask.set_credit_limit("u", 1000)(told)
            ask.deduct_credits("u", 1000)(told)
            told.publish(models={"other": "input_tokens"}, fixed={}, min_balance=0)
            replays()(told, call)
            replays()(told, call)


@pytest.mark.parametrize("first", range(len(KEYED_CALLS)))
def test_a_key_used_for_another_call_is_a_conflict(ledger: Ledger, first: int) -> None:
    for step in (rich, ask.reserve_credits("u", 1), ask.deduct("u", costs(3))):
        step(ledger)
    KEYED_CALLS[first]("k")(ledger)
    holds = (2, 3, 4)
    for second, keyed in enumerate(KEYED_CALLS):
        if first == second:
            replays()(ledger, keyed("k"))
        elif (first in holds) == (second in holds):
            refuses("idempotency_conflict")(ledger, keyed("k"))


METADATA_CALLS: list[Callable[..., Call]] = [
    lambda data: ask.add_credits("u", 1, metadata=data),
    lambda data: ask.remove_credits("u", 1, metadata=data),
    lambda data: ask.reserve("u", costs(1), metadata=data),
    lambda data: ask.reserve_credits("u", 1, metadata=data),
    lambda data: ask.deduct("u", costs(1), metadata=data),
    lambda data: ask.deduct_credits("u", 1, metadata=data),
    lambda data: ask.deduct_fixed("u", "report", metadata=data),
    lambda data: ask.refund_credits("@charge", metadata=data),
]


@pytest.mark.parametrize("data", ["5", "[]", '"text"', "null", "true"])
def test_metadata_is_an_object(ledger: Ledger, data: str) -> None:
    rich(ledger)
    ask.deduct("u", costs(3))(ledger)
    for call in METADATA_CALLS:
        raises("22023", "p_metadata", "object")(ledger, call(data))


def test_metadata_is_bounded_and_kept_as_it_is(ledger: Ledger) -> None:
    rich(ledger)
    ask.deduct("u", costs(3))(ledger)
    for call in METADATA_CALLS:
        raises("22023", "p_metadata", "16384")(ledger, call({"note": [random.random().hex() for _ in range(1000)]}))
    given = {"model": "spoofed", "idempotency_key": "spoofed", "amount": -5, "nested": {"ü": [None, 1, "1"]}}
    for call in METADATA_CALLS:
        answer = ledger.one(call(given))
        if "reservation_id" in answer:
            found = ledger.one(ask.get_reservation(answer["reservation_id"]))
        else:
            found = ledger.one(ask.get_transaction(answer.get("refund_transaction_id") or answer["transaction_id"]))
        assert found["metadata"] == given
        assert found["model"] in (None, "any")
        assert found["idempotency_key"] is None


@pytest.mark.parametrize(("amount", "least"), [(None, 0), (-1, 0), (-MOST - 1, 0), (0, 1)])
def test_amounts_have_a_least_value(ledger: Ledger, amount: int | None, least: int) -> None:
    rich(ledger)
    ask.reserve_credits("u", 5)(ledger)
    ask.deduct("u", costs(3))(ledger)
    positive = [ask.add_credits("u", amount), ask.remove_credits("u", amount)]
    if amount is not None:
        positive.append(ask.refund_credits("@charge", amount))
    for call in positive:
        raises("22023", "p_amount", "at least 1", "whole credits")(ledger, call)
    if least == 0:
        for call in (
            ask.reserve_credits("u", amount),
            ask.deduct_credits("u", amount),
            ask.deduct_credits("u", amount, "@hold"),
        ):
            raises("22023", "p_amount", "at least 0")(ledger, call)
        raises("22023", "p_limit", "at least 0")(ledger, ask.set_credit_limit("u", amount))
    if amount is not None and amount < 0:
        raises("22023", "p_add_amount", "at least 0")(ledger, ask.extend_reservation("@hold", amount))
        raises("22023", "p_min_balance", "at least 0")(ledger, ask.reserve_credits("u", 1, min_balance=amount))


@pytest.mark.parametrize("user", ["crew"])
def test_a_team_is_charged_and_holds_through_its_own_calls_only(ledger: Ledger, user: str) -> None:
    team(user)(ledger)
    for call in (
        ask.reserve(user, costs(1)),
        ask.reserve(user, {"model": "unknown", "input_tokens": 1}, key="k"),
        ask.reserve_credits(user, 1),
        ask.deduct(user, costs(1)),
        ask.deduct(user, costs(1), hold=UNKNOWN),
        ask.deduct_credits(user, 1),
        ask.deduct_fixed(user, "no such job"),
    ):
        refuses("is_a_team")(ledger, call)
    reads(balance=100, available=100)(ledger, ask.get_balance(user))
    gives(new_balance=101)(ledger, ask.add_credits(user, 1))
    gives(new_balance=99)(ledger, ask.remove_credits(user, 2))
    gives(credit_limit=3, available=102)(ledger, ask.set_credit_limit(user, 3))


# Balances and limits


# fmt: off
@table(
    ("an unknown account has nothing", [], ask.get_balance("new"),
     reads(user_id="new", balance=0, lifetime_purchased=0, reserved=0, available=0, credit_limit=0, revision=0)),
    ("also where it would open with a bonus", [prices(signup_bonus=50)], ask.get_balance("new"),
     reads(balance=0, available=0, revision=0)),
    ("what holds claim is not available, nor is min_balance", [rich, ask.reserve_credits("u", 30)],
     ask.get_balance("u"), reads(balance=100, reserved=30, available=65, revision=2)),
    ("a credit limit is available", [rich, ask.set_credit_limit("u", 50)], ask.get_balance("u"), reads(available=145)),
    ("below the floor nothing is", [ask.add_credits("u", 4)], ask.get_balance("u"), reads(balance=4, available=0)),
    ("an expired hold claims nothing", [rich, ask.reserve_credits("u", 30), later(seconds=600)], ask.get_balance("u"),
     reads(reserved=0, available=95)),
    ("one that has a moment left does", [at("2026-01-01"), rich, ask.reserve_credits("u", 30), later(seconds=599)],
     ask.get_balance("u"), reads(reserved=30, available=65)),
    ("what is left of the allowance is available",
     [prices(plans=FREE, default_plan="free"), ask.set_credit_limit("u", 0), ask.deduct("u", costs(4))],
     ask.get_balance("u"), reads(balance=0, available=6)),
    ("and the next month all of it again",
     [prices(plans=FREE, default_plan="free"), at("2026-01-31T23:59:59"), ask.set_credit_limit("u", 0),
         ask.deduct("u", costs(4)), later(seconds=1)], ask.get_balance("u"), reads(available=10)),
    ("debt takes nothing from the allowance",
     [prices(plans=FREE, default_plan="free"), poor, ask.remove_credits("u", 50)], ask.get_balance("u"),
     reads(balance=-49, available=10)),
)
def test_get_balance(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_the_balance_at_a_time(ledger: Ledger) -> None:
    for step in (
        at("2026-01-01T10:00"),
        ask.add_credits("u", 100, "purchase"),
        at("2026-01-02T10:00"),
        ask.deduct("u", costs(30)),
        ask.deduct("u", costs(1)),
        at("2026-01-03T10:00"),
        ask.add_credits("u", 5, "promotion"),
        at("2026-01-04T10:00"),
        ask.remove_credits("u", 40, transaction_id="@grant1"),
        ask.reserve_credits("u", 10),
    ):
        step(ledger)
    for time, balance, purchased in (
        ("2026-01-01T09:59:59.999999+00", 0, 0),
        ("2026-01-01T10:00+00", 100, 100),
        ("2026-01-01T12:00+02", 100, 100),
        ("2026-01-02T09:59+00", 100, 100),
        ("2026-01-02T10:00+00", 69, 100),
        ("2026-01-03T10:00+00", 74, 100),
        ("2026-01-04T10:00+00", 34, 60),
        ("2030-01-01", 34, 60),
        ("infinity", 34, 60),
        ("-infinity", 0, 0),
    ):
        reads(balance=balance, lifetime_purchased=purchased, reserved=None, available=None)(
            ledger, ask.get_balance("u", time)
        )
    reads(balance=0, lifetime_purchased=0, reserved=None, available=None)(ledger, ask.get_balance("new", "2026-01-01"))


# fmt: off
@table(
    ("a limit opens an account", [], ask.set_credit_limit("new", 7), gives(credit_limit=7, balance=0, available=2)),
    ("with its bonus", [prices(signup_bonus=50)], ask.set_credit_limit("new", 7),
     gives(balance=50, available=52, revision=2)),
    ("a charge may use the limit to the last credit", [ask.set_credit_limit("u", 30)], ask.deduct_credits("u", 25),
     gives(balance_after=-25)),
    ("and no further: min_balance stays", [ask.set_credit_limit("u", 30)], ask.deduct_credits("u", 26),
     refuses("insufficient_credits")),
    ("a limit may be taken away from an account in debt", [ask.set_credit_limit("u", 30), ask.deduct_credits("u", 25)],
     ask.set_credit_limit("u", 0), gives(balance=-25, credit_limit=0, available=0)),
    ("the largest limit", [rich], ask.set_credit_limit("u", MOST), gives(available=MOST)),
)
def test_set_credit_limit(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# Credits in and out

grant = ask.add_credits("u", 50, "purchase")


# fmt: off
@table(
    ("credits open an account", [], ask.add_credits("u", 50),
     gives(user_id="u", amount=50, new_balance=50, lifetime_purchased=0, idempotent=False, revision=1)),
    ("a purchase is counted for life", [grant], ask.add_credits("u", 7, "purchase"), gives(lifetime_purchased=57)),
    ("a subscription is not", [grant], ask.add_credits("u", 7, "subscription"), gives(lifetime_purchased=50)),
    ("a promotion is not", [grant], ask.add_credits("u", 7, "promotion"), gives(lifetime_purchased=50)),
    ("a bonus given by hand is not", [grant], ask.add_credits("u", 7, "signup_bonus"), gives(lifetime_purchased=50)),
    ("null is an adjustment", [grant], ask.add_credits("u", 7, None), gives(lifetime_purchased=50)),
    ("debt is paid", [poor, ask.remove_credits("u", 5)], ask.add_credits("u", 7), gives(new_balance=3)),
    ("the bonus is a row of its own", [prices(signup_bonus=50)], ask.add_credits("u", 7),
     gives(amount=7, new_balance=57, revision=2)),
    ("no such type", [], ask.add_credits("u", 7, "usage"), raises("22023", "p_type", "usage", "promotion")),
    ("nor in capitals", [], ask.add_credits("u", 7, "Purchase"), raises("22023", "p_type", "Purchase")),
    ("a negative payment", [], ask.add_credits("u", 7, paid_amount=-1), raises("22023", "p_paid_amount")),
    ("a payment that is none", [], ask.add_credits("u", 7, paid_amount="NaN"), raises("22023", "p_paid_amount")),
    ("an endless payment", [], ask.add_credits("u", 7, paid_amount="1e40"), raises("22023", "p_paid_amount")),
    ("a long currency", [], ask.add_credits("u", 7, paid_currency=LONG), raises("22023", "p_paid_currency", "255")),
    ("a long reference", [], ask.add_credits("u", 7, reference=LONG), raises("22023", "p_reference", "255")),
    ("the most there can be", [], ask.add_credits("u", MOST), gives(new_balance=MOST)),
    ("one more than there can be", [ask.add_credits("u", MOST)], ask.add_credits("u", 1),
     raises("22003", "balance of account u", "9223372036854775807")),
    ("more than a number holds", [], ask.add_credits("u", MOST + 1), raises("22003", "out of range", hint=False)),
    ("a repeated key adds nothing, whatever was told beside",
     [ask.add_credits("u", 7, "purchase", key="k"), ask.deduct_credits("u", 2)],
     ask.add_credits("u", 7, "purchase", key="k"), replays(new_balance=7, amount=7)),
    ("another amount under the key", [ask.add_credits("u", 7, key="k")], ask.add_credits("u", 8, key="k"),
     refuses("idempotency_conflict")),
    ("another type under the key", [ask.add_credits("u", 7, key="k")], ask.add_credits("u", 7, "purchase", key="k"),
     refuses("idempotency_conflict")),
    ("a key is another account's too", [ask.add_credits("u", 7, key="k")], ask.add_credits("v", 9, key="k"),
     gives(new_balance=9, idempotent=False)),
    ("misuse comes before the key", [ask.add_credits("u", 7, key="k")], ask.add_credits("u", 0, key="k"),
     raises("22023", "p_amount")),
)
def test_add_credits(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_grant_is_recorded_with_all_that_was_told(ledger: Ledger) -> None:
    told = {"paid_amount": Decimal("9.90"), "paid_currency": "EUR", "reference": "invoice 7", "metadata": {"a": 1}}
    ledger.one(ask.add_credits("u", 990, "purchase", key="k", **told))
    reads(type="purchase", amount=990, balance_after=990, seq=1, idempotency_key="k", usage=None, cost=None, **told)(
        ledger, ask.get_transaction("@grant")
    )
    gives(idempotent=True)(ledger, ask.add_credits("u", 990, "purchase", key="k", reference="told otherwise"))


# fmt: off
@table(
    ("no such account", [], ask.remove_credits("new", 1), refuses("account_not_found")),
    ("credits are taken back", [rich], ask.remove_credits("u", 30, "typing error"),
     gives(amount=-30, new_balance=70, lifetime_purchased=0, idempotent=False)),
    ("down into debt", [poor], ask.remove_credits("u", 30), gives(new_balance=-29)),
    ("a purchase no longer counts for life", [grant], ask.remove_credits("u", 20, transaction_id="@grant"),
     gives(new_balance=30, lifetime_purchased=30)),
    ("another grant never did", [grant, ask.add_credits("u", 20)], ask.remove_credits("u", 20, transaction_id="@grant"),
     gives(new_balance=50, lifetime_purchased=50)),
    ("without its grant neither", [grant], ask.remove_credits("u", 20), gives(lifetime_purchased=50)),
    ("more than was granted", [grant, grant], ask.remove_credits("u", 51, transaction_id="@grant"),
     refuses("exceeds_grant")),
    ("more than was granted, bit by bit", [grant, rich, ask.remove_credits("u", 30, transaction_id="@grant1")],
     ask.remove_credits("u", 21, transaction_id="@grant1"), refuses("exceeds_grant")),
    ("all that was granted, bit by bit", [grant, rich, ask.remove_credits("u", 30, transaction_id="@grant1")],
     ask.remove_credits("u", 20, transaction_id="@grant1"), gives(new_balance=100, lifetime_purchased=0)),
    ("a grant that is none", [grant], ask.remove_credits("u", 1, transaction_id="x"), refuses("transaction_not_found")),
    ("an unknown grant", [grant], ask.remove_credits("u", 1, transaction_id=UNKNOWN), refuses("transaction_not_found")),
    ("a grant of another", [grant, ask.add_credits("v", 5)], ask.remove_credits("u", 1, transaction_id="@grant"),
     refuses("transaction_not_found")),
    ("a charge is no grant", [grant, ask.deduct_credits("u", 5)], ask.remove_credits("u", 1, transaction_id="@charge"),
     refuses("transaction_not_found")),
    ("a removal is no grant", [grant, ask.remove_credits("u", 5)], ask.remove_credits("u", 1, transaction_id="@grant"),
     refuses("transaction_not_found")),
    ("a repeated key takes nothing",
     [grant, ask.remove_credits("u", 5, transaction_id="@grant1", key="k"), ask.deduct_credits("u", 40)],
     ask.remove_credits("u", 5, transaction_id="@grant1", key="k"),
     replays(new_balance=45, amount=-5, lifetime_purchased=45)),
    ("nor with another reason", [grant, ask.remove_credits("u", 5, key="k")],
     ask.remove_credits("u", 5, "other", metadata={"other": True}, key="k"), gives(new_balance=45, idempotent=True)),
    ("another amount under the key", [grant, ask.remove_credits("u", 5, key="k")], ask.remove_credits("u", 6, key="k"),
     refuses("idempotency_conflict")),
    ("another grant under the key", [grant, grant, ask.remove_credits("u", 5, transaction_id="@grant1", key="k")],
     ask.remove_credits("u", 5, transaction_id="@grant2", key="k"), refuses("idempotency_conflict")),
    ("less than there can be", [ask.add_credits("u", 1), ask.remove_credits("u", MOST), ask.remove_credits("u", 1)],
     ask.remove_credits("u", 1), raises("22003", "balance of account u")),
    ("a long reason", [grant], ask.remove_credits("u", 1, LONG), raises("22023", "p_reason", "255")),
)
def test_remove_credits(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# Holds

hold = ask.reserve_credits("u", 30)


# fmt: off
@table(
    ("no such account", [], ask.reserve("new", costs(1)), refuses("account_not_found")),
    ("nor for an amount, even of 0", [], ask.reserve_credits("new", 0), refuses("account_not_found")),
    ("an estimate holds the next whole credit", [rich], ask.reserve("u", costs("1.000000000001")),
     gives(user_id="u", amount=2, balance=100, reserved_total=2, idempotent=False, warnings=[], revision=2)),
    ("a whole estimate holds itself", [rich], ask.reserve("u", costs(2)), gives(amount=2)),
    ("an estimate of nothing holds nothing", [rich], ask.reserve("u", {}), gives(amount=0, reserved_total=0)),
    ("a job can be held", [rich], ask.reserve("u", {"fixed_job": "report"}), gives(amount=7)),
    ("a known amount is held", [rich], ask.reserve_credits("u", 95), gives(amount=95, reserved_total=95)),
    ("all but min_balance at most", [rich], ask.reserve_credits("u", 96), refuses("insufficient_credits")),
    ("the hold's own least balance", [rich], ask.reserve_credits("u", 100, min_balance=0), gives(amount=100)),
    ("which may be more", [rich], ask.reserve_credits("u", 51, min_balance=50), refuses("insufficient_credits")),
    ("null is the config's", [rich], ask.reserve_credits("u", 96, min_balance=None), refuses("insufficient_credits")),
    ("other holds claim theirs", [rich, hold], ask.reserve_credits("u", 66), refuses("insufficient_credits")),
    ("and leave the rest", [rich, hold], ask.reserve_credits("u", 65), gives(reserved_total=95)),
    ("expired ones do not", [rich, hold, later(minutes=10)], ask.reserve_credits("u", 95), gives(reserved_total=95)),
    ("released ones do not", [rich, hold, ask.release_reservation("@hold")], ask.reserve_credits("u", 95), gives()),
    ("settled ones claim what was charged", [rich, hold, ask.deduct("u", costs(1), hold="@hold")], hold,
     gives(balance=99)),
    ("0 passes in debt", [poor, ask.remove_credits("u", 9)], ask.reserve_credits("u", 0), gives(amount=0, balance=-8)),
    ("0 passes beside holds that claim all", [rich, ask.reserve_credits("u", 95)], ask.reserve_credits("u", 0),
     gives(reserved_total=95)),
    ("a credit limit is admitted", [rich, ask.set_credit_limit("u", 9)], ask.reserve_credits("u", 104), gives()),
    ("and no more", [rich, ask.set_credit_limit("u", 9)], ask.reserve_credits("u", 105),
     refuses("insufficient_credits")),
    ("the largest amount", [rich], ask.reserve_credits("u", MOST), refuses("insufficient_credits")),
    ("the largest hold", [ask.add_credits("u", MOST)], ask.reserve_credits("u", MOST, min_balance=0),
     gives(amount=MOST)),
    ("no hold lives 0 seconds", [rich], ask.reserve_credits("u", 1, ttl=0),
     raises("22023", "p_ttl_seconds", "between 1 and 2592000")),
    ("nor over 30 days", [rich], ask.reserve("u", costs(1), ttl=2592001), raises("22023", "p_ttl_seconds")),
    ("30 days it may", [rich], ask.reserve("u", costs(1), ttl=2592000), gives()),
    ("nulls are defaults", [at("2026-01-01"), rich], ask.reserve("u", costs(1), operation_type=None, ttl=None),
     gives(expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("an operation has a name", [rich], ask.reserve("u", costs(1), operation_type=" "),
     raises("22023", "p_operation_type")),
    ("a model has at most 255", [rich], ask.reserve_credits("u", 1, model=LONG), raises("22023", "p_model", "255")),
    ("a repeated key holds nothing", [rich, ask.reserve("u", costs(30), key="k"), ask.deduct_credits("u", 60)],
     ask.reserve("u", costs(30), key="k"), replays(amount=30, balance=100, reserved_total=30)),
    ("nor after its hold has ended",
     [rich, ask.reserve("u", costs(30), key="k"), ask.deduct("u", costs(9), hold="@hold")],
     ask.reserve("u", costs(30), key="k"), replays(amount=30)),
    ("1 is 1.0", [rich, ask.reserve("u", costs(30), key="k")], ask.reserve("u", costs("30.0"), key="k"),
     gives(idempotent=True, reserved_total=30)),
    ("metadata, least balance and time are no part of the request", [rich, ask.reserve("u", costs(30), key="k")],
     ask.reserve("u", costs(30), metadata={"a": 1}, min_balance=90, ttl=5, key="k"),
     gives(idempotent=True, reserved_total=30)),
    ("usage is", [rich, ask.reserve("u", costs(30), key="k")], ask.reserve("u", costs(31), key="k"),
     refuses("idempotency_conflict")),
    ("the operation is", [rich, ask.reserve("u", costs(30), key="k")], ask.reserve("u", costs(30), "chat", key="k"),
     refuses("idempotency_conflict")),
    ("the model is", [rich, ask.reserve_credits("u", 30, key="k")], ask.reserve_credits("u", 30, model="gpt", key="k"),
     refuses("idempotency_conflict")),
    ("a request id may name a hold and its settlement",
     [rich, ask.reserve("u", costs(30), key="k"), ask.deduct("u", costs(9), "k", hold="@hold")],
     ask.reserve("u", costs(30), key="k"), replays()),
    ("refusals are not remembered",
     [rich, lambda ledger: refuses("insufficient_credits")(ledger, ask.reserve_credits("u", 99, key="k")), rich],
     ask.reserve_credits("u", 99, key="k"), gives(idempotent=False)),
)
def test_reserve(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("credits are added", [rich, hold], ask.extend_reservation("@hold", 10),
     gives(reservation_id="@hold", user_id="u", amount=40, balance=100, reserved_total=40, idempotent=False)),
    ("up to the floor", [rich, hold], ask.extend_reservation("@hold", 65), gives(amount=95)),
    ("no further", [rich, hold], ask.extend_reservation("@hold", 66),
     refuses("insufficient_credits", balance=100, reserved_total=30)),
    ("the hold's own floor", [rich, ask.reserve_credits("u", 30, min_balance=0)], ask.extend_reservation("@hold", 70),
     gives(amount=100)),
    ("nothing is added in debt", [rich, hold, ask.remove_credits("u", 200)], ask.extend_reservation("@hold"),
     gives(amount=30)),
    ("time counts from now", [at("2026-01-01T00:00"), rich, hold, at("2026-01-01T00:09")],
     ask.extend_reservation("@hold", ttl=600), gives(amount=30, expires_at=datetime(2026, 1, 1, 0, 19, tzinfo=UTC))),
    ("and never shortens", [at("2026-01-01T00:00"), rich, hold, at("2026-01-01T00:01")],
     ask.extend_reservation("@hold", ttl=60), gives(expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("without a time it stays", [at("2026-01-01T00:00"), rich, hold, at("2026-01-01T00:01")],
     ask.extend_reservation("@hold", 1), gives(expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("its owner may be named", [rich, hold], ask.extend_reservation("@hold", 1, user_id="u"), gives(amount=31)),
    ("an id that is none", [rich], ask.extend_reservation("x", 1, user_id="u"), refuses("reservation_not_found")),
    ("an unknown id", [rich], ask.extend_reservation(UNKNOWN, 1, user_id="u"), refuses("reservation_not_found")),
    ("no id", [rich], ask.extend_reservation(None, 1, user_id="u"), refuses("reservation_not_found")),
    ("another's hold", [rich, ask.add_credits("v", 9), hold], ask.extend_reservation("@hold", 1, user_id="v"),
     refuses("reservation_not_found")),
    ("another's hold for a user never seen", [rich, hold], ask.extend_reservation("@hold", 1, user_id="ghost"),
     refuses("reservation_not_found")),
    ("a settled one", [rich, hold, ask.deduct("u", costs(1), hold="@hold")],
     ask.extend_reservation("@hold", user_id="u"), refuses("reservation_not_active")),
    ("a released one", [rich, hold, ask.release_reservation("@hold")], ask.extend_reservation("@hold", user_id="u"),
     refuses("reservation_not_active")),
    ("an expired one", [rich, hold, later(minutes=10)], ask.extend_reservation("@hold", ttl=600, user_id="u"),
     refuses("reservation_not_active")),
    ("an extended one is not expired",
     [rich, hold, later(minutes=9), ask.extend_reservation("@hold", ttl=600), later(minutes=9)],
     ask.extend_reservation("@hold", ttl=600), gives(amount=30)),
    ("0 seconds", [rich, hold], ask.extend_reservation("@hold", ttl=0), raises("22023", "p_ttl_seconds")),
    ("31 days", [rich, hold], ask.extend_reservation("@hold", ttl=2592001), raises("22023", "p_ttl_seconds")),
    ("a repeated key adds nothing, also when the hold has ended",
     [rich, hold, ask.extend_reservation("@hold1", 5, key="k"), ask.release_reservation("@hold")],
     ask.extend_reservation("@hold1", 5, key="k"), replays(amount=35, reserved_total=35)),
    ("another amount under the key", [rich, hold, ask.extend_reservation("@hold", 5, key="k")],
     ask.extend_reservation("@hold", 6, key="k", user_id="u"), refuses("idempotency_conflict")),
    ("another hold under the key", [rich, hold, hold, ask.extend_reservation("@hold1", 5, key="k")],
     ask.extend_reservation("@hold2", 5, key="k", user_id="u"), refuses("idempotency_conflict")),
    ("a hold's key", [rich, ask.reserve_credits("u", 5, key="k")],
     ask.extend_reservation("@hold", 5, key="k", user_id="u"), refuses("idempotency_conflict")),
)
def test_extend_reservation(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("a hold is given back", [rich, hold, hold], ask.release_reservation("@hold"),
     gives(reservation_id="@hold", user_id="u", amount=0, balance=100, reserved_total=30)),
    ("its owner may be named", [rich, hold], ask.release_reservation("@hold", user_id="u"), gives(reserved_total=0)),
    ("releasing twice is no error, and writes nothing", [rich, hold, ask.release_reservation("@hold")],
     ask.release_reservation("@hold"), reads(amount=0, reserved_total=0)),
    ("nor is releasing an expired one", [rich, hold, later(minutes=10)], ask.release_reservation("@hold"), gives()),
    ("a settled one", [rich, hold, ask.deduct("u", costs(1), hold="@hold")],
     ask.release_reservation("@hold", user_id="u"), refuses("reservation_not_active")),
    ("after parts the rest is given back", [rich, hold, ask.deduct("u", costs(10), hold="@hold", final=False)],
     ask.release_reservation("@hold"), gives(balance=90, reserved_total=0)),
    ("an id that is none", [rich], ask.release_reservation("x", user_id="u"), refuses("reservation_not_found")),
    ("an unknown id", [rich], ask.release_reservation(UNKNOWN, user_id="u"), refuses("reservation_not_found")),
    ("another's hold", [rich, ask.add_credits("v", 9), hold], ask.release_reservation("@hold", user_id="v"),
     refuses("reservation_not_found")),
    ("another's hold for a user never seen", [rich, hold], ask.release_reservation("@hold", user_id="ghost"),
     refuses("reservation_not_found")),
)
def test_release_reservation(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# fmt: off
@table(
    ("as it was taken", [at("2026-01-01"), rich, ask.reserve("u", costs("1.5"), "chat", metadata={"a": 1}, key="k")],
     ask.get_reservation("@hold"),
     reads(reservation_id="@hold", account_id="u", actor_id=None, status="active", amount=2, charged=0,
         operation_type="chat", model="any", metrics=costs("1.5"), pricing_version=1, plan_id=None,
         idempotency_key="k", metadata={"a": 1}, created_at=datetime(2026, 1, 1, tzinfo=UTC),
         expires_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC), ended_at=None)),
    ("a known amount has no metrics, but a model", [rich, ask.reserve_credits("u", 5, model="gpt")],
     ask.get_reservation("@hold", "u"), reads(amount=5, metrics=None, model="gpt", operation_type="usage")),
    ("in parts", [rich, hold, ask.deduct("u", costs(9), hold="@hold", final=False)], ask.get_reservation("@hold"),
     reads(status="active", amount=21, charged=9, ended_at=None)),
    ("settled", [at("2026-01-01"), rich, hold, ask.deduct("u", costs(9), hold="@hold")], ask.get_reservation("@hold"),
     reads(status="settled", amount=0, charged=9, ended_at=datetime(2026, 1, 1, tzinfo=UTC))),
    ("released", [at("2026-01-01"), rich, hold, ask.release_reservation("@hold")], ask.get_reservation("@hold"),
     reads(status="released", amount=0, charged=0, ended_at=datetime(2026, 1, 1, tzinfo=UTC))),
    ("expired, though nothing has recorded it", [at("2026-01-01"), rich, hold, at("2026-01-02")],
     ask.get_reservation("@hold"), reads(status="expired", amount=0, ended_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("expired, recorded by the next change", [at("2026-01-01"), rich, hold, at("2026-01-02"), rich],
     ask.get_reservation("@hold"), reads(status="expired", amount=0, ended_at=datetime(2026, 1, 1, 0, 10, tzinfo=UTC))),
    ("an id that is none", [], ask.get_reservation("x"), lists({"error": "reservation_not_found", "amount": 0})),
    ("an unknown id", [], ask.get_reservation(UNKNOWN), lists({"error": "reservation_not_found"})),
    ("another's", [rich, hold], ask.get_reservation("@hold", "v"), lists({"error": "reservation_not_found"})),
    ("nobody has no holds", [], ask.list_reservations("new"), lists()),
    ("the active ones, newest first",
     [at("2026-01-01T00:00"), rich, hold, later(minutes=1), hold, ask.release_reservation("@hold1"),
         later(minutes=1), hold], ask.list_reservations("u"),
     lists({"reservation_id": "@hold3", "status": "active"}, {"reservation_id": "@hold2"})),
    ("all of them", [at("2026-01-01T00:00"), rich, hold, later(minutes=10), hold, later(minutes=1), hold],
     ask.list_reservations("u", False),
     lists({"status": "active"}, {"reservation_id": "@hold2"}, {"reservation_id": "@hold1", "status": "expired"})),
    ("none that has just expired", [rich, hold, later(minutes=10)], ask.list_reservations("u"), lists()),
    ("page by page", [at("2026-01-01T00:00"), rich, hold, later(minutes=1), hold, later(minutes=1), hold],
     ask.list_reservations("u", None, 1, "2026-01-01T00:02+00"), lists({"reservation_id": "@hold2"})),
    ("0 of them", [], ask.list_reservations("u", limit=0), raises("22023", "p_limit", "1 and 1000")),
    ("1001 of them", [], ask.list_reservations("u", limit=1001), raises("22023", "p_limit", "1 and 1000")),
)
def test_reading_holds(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


# Charges


# fmt: off
@table(
    ("no such account", [], ask.deduct("new", costs(1)), refuses("account_not_found")),
    ("nor for 0", [], ask.deduct_credits("new", 0), refuses("account_not_found")),
    ("a usage is priced and charged", [rich], ask.deduct("u", costs("2.5")),
     gives(user_id="u", amount=-2, balance_after=98, cost=Decimal("2.5"), allowance_used=0, shortfall=0, warnings=[],
         idempotent=False, revision=2)),
    ("what was left over is charged later", [rich, ask.deduct("u", costs("2.5"))], ask.deduct("u", costs("2.5")),
     gives(amount=-3)),
    ("a known amount", [rich], ask.deduct_credits("u", 7, model="gpt"), gives(amount=-7, cost=7)),
    ("a job", [rich], ask.deduct_fixed("u", "report"), gives(amount=-7, cost=7)),
    ("a job for nothing", [rich], ask.deduct_fixed("u", "gift"), gives(amount=0, cost=0)),
    ("a charge of nothing is recorded", [rich], ask.deduct("u", {}),
     gives(amount=0, cost=0, balance_after=100, revision=2)),
    ("0 passes in debt", [poor, ask.remove_credits("u", 9)], ask.deduct_credits("u", 0), gives(balance_after=-8)),
    ("all but min_balance", [rich], ask.deduct("u", costs(95)), gives(balance_after=5)),
    ("no further", [rich], ask.deduct("u", costs(96)), refuses("insufficient_credits")),
    ("holds keep theirs", [rich, hold], ask.deduct("u", costs(66)), refuses("insufficient_credits")),
    ("and leave the rest", [rich, hold], ask.deduct("u", costs(65)), gives(balance_after=35)),
    ("a refusal records no expiry", [rich, hold, later(minutes=10)], ask.deduct("u", costs(96)),
     refuses("insufficient_credits")),
    ("nor does a replay", [rich, hold, ask.deduct("u", costs(2), "k"), later(minutes=10)],
     ask.deduct("u", costs(2), "k"), replays()),
    ("expired holds nothing", [rich, hold, later(minutes=10)], ask.deduct("u", costs(95)), gives(balance_after=5)),
    ("an amount needs funds too", [rich], ask.deduct_credits("u", 96), refuses("insufficient_credits")),
    ("a job needs funds too", [ask.add_credits("u", 11)], ask.deduct_fixed("u", "report"),
     refuses("insufficient_credits")),
    ("an unknown job", [rich], ask.deduct_fixed("u", "reports"), raises("DU004", "reports", "did you mean report?")),
    ("a job without a name", [rich], ask.deduct_fixed("u", None), raises("22023", "p_job_name")),
    ("a job with an empty name", [rich], ask.deduct_fixed("u", ""), raises("22023", "p_job_name")),
    ("a division by zero charges nothing", [rich], ask.deduct("u", {"model": "ratio", "input_tokens": 1}),
     raises("DU006", "models.ratio")),
    ("a cost beyond bigint charges nothing", [rich], ask.deduct("u", {"model": "square", "input_tokens": 10**12}),
     raises("22003", "models.square")),
    ("a model has at most 255", [rich], ask.deduct_credits("u", 1, model=LONG), raises("22023", "p_model", "255")),
    ("a repeated key charges nothing", [rich, ask.deduct("u", costs("2.5"), "k"), ask.deduct("u", costs(92))],
     ask.deduct("u", costs("2.5"), "k"), replays(amount=-2, balance_after=98, cost=Decimal("2.5"))),
    ("1 is 1.0, and metadata no part of the request", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct("u", costs("2.0"), "k", {"a": 1}), gives(idempotent=True, balance_after=98)),
    ("other usage of the same cost is another request", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct("u", costs(2) | {"search_queries": 1}, "k"), refuses("idempotency_conflict")),
    ("zeros and nulls in a usage say nothing", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct("u", costs(2) | {"input_tokens": 0, "images": None}, "k"), gives(amount=-2, idempotent=True)),
    ("an amount is another request than a usage of that cost", [rich, ask.deduct("u", costs(2), "k")],
     ask.deduct_credits("u", 2, key="k"), refuses("idempotency_conflict")),
    ("a job is another request than a usage with that job", [rich, ask.deduct("u", {"fixed_job": "report"}, "k")],
     ask.deduct_fixed("u", "report", "k"), refuses("idempotency_conflict")),
    ("another job is another request", [rich, ask.deduct_fixed("u", "report", "k")], ask.deduct_fixed("u", "gift", "k"),
     refuses("idempotency_conflict")),
    ("another model is another request", [rich, ask.deduct_credits("u", 2, key="k")],
     ask.deduct_credits("u", 2, key="k", model="gpt"), refuses("idempotency_conflict")),
    ("a key is another account's too", [rich, ask.add_credits("v", 20), ask.deduct("u", costs(2), "k")],
     ask.deduct("v", costs(3), "k"), gives(balance_after=17, idempotent=False)),
    ("a grant's key is a charge's too", [ask.add_credits("u", 20, key="k")], ask.deduct("u", costs(3), "k"),
     refuses("idempotency_conflict")),
    ("refusals are not remembered",
     [rich, lambda ledger: refuses("insufficient_credits")(ledger, ask.deduct("u", costs(99), "k")), rich],
     ask.deduct("u", costs(99), "k"), gives(idempotent=False)),
)
def test_deduct(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def settle(points: int, user: str = "u", **more: Any) -> Call:
    return ask.deduct(user, costs(points), hold="@hold1", **more)


debt = prices(overrun="debt")
reject = prices(overrun="reject")


# fmt: off
@table(
    ("less than was held", [rich, hold], settle(9), gives(amount=-9, balance_after=91, shortfall=0, warnings=[])),
    ("nothing of what was held", [rich, hold], ask.deduct_credits("u", 0, "@hold"), gives(amount=0, balance_after=100)),
    ("exactly what was held", [rich, hold], settle(30), gives(balance_after=70)),
    ("more than was held, from what is free", [rich, hold], settle(95), gives(balance_after=5, shortfall=0)),
    ("min_balance included", [rich, hold], settle(100), gives(balance_after=0, shortfall=0)),
    ("then debt", [rich, hold], settle(101), gives(balance_after=-1, shortfall=1)),
    ("a credit limit comes first", [rich, ask.set_credit_limit("u", 9), hold], settle(109), gives(shortfall=0)),
    ("then debt beyond it", [rich, ask.set_credit_limit("u", 9), hold], settle(110),
     gives(balance_after=-10, shortfall=1)),
    ("other holds keep theirs", [rich, hold, ask.reserve_credits("u", 60)], settle(41),
     gives(balance_after=59, shortfall=1)),
    ("or it is refused", [reject, rich, hold], settle(101), refuses("insufficient_credits", shortfall=1)),
    ("up to the last credit it is not", [reject, rich, hold], settle(100), gives(balance_after=0, shortfall=0)),
    ("other holds keep theirs from a refusal too", [reject, rich, hold, ask.reserve_credits("u", 60)], settle(41),
     refuses("insufficient_credits", shortfall=1)),
    ("within the held amount it is never refused", [reject, rich, hold, ask.remove_credits("u", 500)], settle(30),
     gives(balance_after=-430, shortfall=0)),
    ("above it all is missing in debt", [reject, rich, hold, ask.remove_credits("u", 500)], settle(37),
     refuses("insufficient_credits", shortfall=7)),
    ("a refused settlement keeps the hold",
     [reject, rich, hold, lambda ledger: refuses("insufficient_credits", shortfall=1)(ledger, settle(101))],
     ask.get_reservation("@hold"), reads(status="active", amount=30)),
    ("after debt nothing is admitted", [rich, hold, settle(101)], ask.deduct("u", costs(1)),
     refuses("insufficient_credits")),
    ("an expired hold owns nothing", [rich, hold, later(minutes=10)], settle(30),
     gives(balance_after=70, shortfall=0, warnings=["reservation_expired"])),
    ("all of its charge is above the held amount", [rich, hold, later(minutes=10), ask.reserve_credits("u", 90)],
     settle(30), gives(balance_after=70, shortfall=20, warnings=["reservation_expired"])),
    ("and may be refused", [reject, rich, hold, later(minutes=10), ask.reserve_credits("u", 90)], settle(30),
     refuses("insufficient_credits", shortfall=20)),
    ("an expired hold settles in parts too", [rich, hold, later(minutes=10), settle(10, final=False)], settle(20),
     gives(balance_after=70, warnings=["reservation_expired"])),
    ("an expired hold ends once too", [rich, hold, later(minutes=10), settle(10)], settle(10),
     replays(balance_after=90)),
    ("no such hold", [rich], ask.deduct("u", costs(1), hold=UNKNOWN), refuses("reservation_not_found")),
    ("a hold that is none", [rich], ask.deduct("u", costs(1), hold="x"), refuses("reservation_not_found")),
    ("an empty hold is none", [rich], ask.deduct("u", costs(1), hold=""), refuses("reservation_not_found")),
    ("another's hold", [rich, ask.add_credits("v", 99), hold], settle(1, "v"), refuses("reservation_not_found")),
    ("another's hold for a user never seen", [rich, hold], settle(1, "ghost"), refuses("account_not_found")),
    ("a released hold", [rich, hold, ask.release_reservation("@hold")], settle(1), refuses("reservation_not_active")),
    ("a hold released after it expired", [rich, hold, later(minutes=10), ask.release_reservation("@hold")], settle(1),
     refuses("reservation_not_active")),
    ("the same settlement again", [rich, hold, settle(9), ask.deduct("u", costs(80))], settle(9),
     replays(balance_after=91)),
    ("with other metadata", [rich, hold, settle(9)], settle(9, metadata={"a": 1}), gives(idempotent=True)),
    ("another amount", [rich, hold, settle(9)], settle(10), refuses("idempotency_conflict")),
    ("another call", [rich, hold, settle(9)], ask.deduct_credits("u", 9, "@hold"), refuses("idempotency_conflict")),
    ("with a key it is another settlement", [rich, hold, settle(9)], settle(9, key="k"),
     refuses("reservation_not_active")),
    ("a part of an ended one", [rich, hold, settle(9)], settle(9, final=False), refuses("reservation_not_active")),
    ("after a keyed end", [rich, hold, settle(9, key="k")], settle(9), refuses("reservation_not_active")),
    ("a keyed end replays", [rich, hold, settle(9, key="k")], settle(9, key="k"), replays(balance_after=91)),
    ("another hold under the key", [rich, hold, hold, settle(9, key="k")],
     ask.deduct("u", costs(9), "k", hold="@hold2"), refuses("idempotency_conflict")),
    ("no hold under the key", [rich, hold, settle(9, key="k")], ask.deduct("u", costs(9), "k"),
     refuses("idempotency_conflict")),
    ("a keyed charge that is called no end of anything", [rich, ask.deduct("u", costs(9), "k", final=False)],
     ask.deduct("u", costs(9), "k", final=False), replays(balance_after=91)),
    ("and with the same key the end", [rich, ask.deduct("u", costs(9), "k", final=False)],
     ask.deduct("u", costs(9), "k"), refuses("idempotency_conflict")),
    ("a part under the key", [rich, hold, settle(9, key="k", final=False)], settle(9, key="k"),
     refuses("idempotency_conflict")),
    ("null is final", [rich, hold, settle(9, final=None)], ask.get_reservation("@hold"), reads(status="settled")),
    ("without a hold the end has no meaning", [rich], ask.deduct("u", costs(9), final=False), gives(balance_after=91)),
    ("a part leaves the rest held", [rich, hold, settle(9, final=False)], ask.get_balance("u"),
     reads(balance=91, reserved=21)),
    ("parts without keys are told apart by nothing", [rich, hold, settle(9, final=False), settle(9, final=False)],
     ask.get_balance("u"), reads(balance=82, reserved=12)),
    ("a part under a key is not charged twice", [rich, hold, settle(9, final=False, key="k"), settle(8, final=False)],
     settle(9, final=False, key="k"), replays(balance_after=91)),
    ("parts beyond the hold use what is free", [rich, hold, settle(40, final=False), settle(40, final=False)],
     ask.get_balance("u"), reads(balance=20, reserved=0)),
    ("parts may be refused beyond it, the hold stays", [reject, rich, hold, settle(20, final=False)],
     settle(81, final=False), refuses("insufficient_credits", shortfall=1)),
    ("the end gives back what is left", [rich, hold, settle(9, final=False), settle(1)], ask.get_balance("u"),
     reads(balance=90, reserved=0)),
    ("the end of a hold ends no other", [rich, hold, hold, settle(9)], ask.get_balance("u"),
     reads(balance=91, reserved=30)),
    ("an error keeps the hold", [rich, hold], ask.deduct("u", {"model": "unknown", "input_tokens": 1}, hold="@hold"),
     raises("DU003", "unknown")),
    ("a balance beyond bigint", [rich, hold, ask.remove_credits("u", MOST)], settle(1000),
     raises("22003", "balance of account u")),
)
def test_settlement(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_an_id_may_be_written_in_capitals(ledger: Ledger) -> None:
    for step in (rich, hold, settle(9, key="k")):
        step(ledger)
    loud = ask.deduct("u", costs(9), "k", hold=ledger.ids["hold"][0].upper())
    gives(idempotent=True, transaction_id="@charge")(ledger, loud)


def test_of_several_faults_the_first_counts(ledger: Ledger) -> None:
    for step in (poor, ask.deduct_credits("u", 0, key="k"), ask.reserve_credits("u", 0, key="k"), team("crew")):
        step(ledger)
    unknown, dear = {"model": "unknown", "input_tokens": 1}, costs(100)
    for call, check in (
        (ask.deduct("u", {"model": 5}, "k", hold="x"), raises("22023", "model")),
        (ask.deduct("u", unknown, " ", hold="x"), raises("22023", "p_idempotency_key")),
        (ask.deduct("u", unknown, "k", {"a": 1}, hold="x"), refuses("idempotency_conflict")),
        (ask.deduct("u", unknown, "k2", hold="x"), refuses("reservation_not_found")),
        (ask.deduct("crew", unknown, "k2", hold="x"), refuses("is_a_team")),
        (ask.deduct("new", unknown, "k2", hold="x"), refuses("account_not_found")),
        (ask.deduct("new", unknown, metadata="[]"), raises("22023", "p_metadata")),
        (ask.deduct("u", unknown | {"tokens": 1}, "k2"), raises("DU005", "tokens")),
        (ask.deduct("u", unknown, "k2"), raises("DU003", "unknown")),
        (ask.deduct("u", dear, "k2"), refuses("insufficient_credits")),
        (ask.deduct_fixed("u", "unknown", "k"), refuses("idempotency_conflict")),
        (ask.deduct_fixed("new", "unknown"), refuses("account_not_found")),
        (ask.deduct_credits("u", 100, "x", "k"), refuses("idempotency_conflict")),
        (ask.deduct_credits("u", 100, "x"), refuses("reservation_not_found")),
        (ask.reserve("u", unknown, ttl=0, key="k"), raises("22023", "p_ttl_seconds")),
        (ask.reserve("u", unknown, key="k"), refuses("idempotency_conflict")),
        (ask.reserve("u", unknown), raises("DU003", "unknown")),
        (ask.reserve("new", unknown), refuses("account_not_found")),
        (ask.reserve("u", dear), refuses("insufficient_credits")),
        (ask.reserve_credits("u", 100, min_balance=-1), raises("22023", "p_min_balance")),
        (ask.extend_reservation("x", 100, key="k", user_id="u"), refuses("idempotency_conflict")),
        (ask.remove_credits("u", 100, transaction_id="x", key="k"), refuses("idempotency_conflict")),
        (ask.refund_credits("x", 100, key="k", user_id="u"), refuses("idempotency_conflict")),
        (ask.refund_credits("x", 0, user_id="u"), raises("22023", "p_amount")),
    ):
        check(ledger, call)


@pytest.mark.parametrize(
    ("rounding", "cost", "charged"),
    [
        ("carry", "0.9 0.1 0.9999 0.0001 2.5 2.5", "0 1 0 1 2 3"),
        ("up", "0 0.000000000001 1 1.5 0.9 0.1", "0 1 1 2 1 1"),
        ("down", "0.999999999999 1 1.5 2 0.5 0.5", "0 1 1 2 0 0"),
        ("half_up", "0.499999999999 0.5 1.5 2.5 0.5 0", "0 1 2 3 1 0"),
    ],
)
def test_rounding(ledger: Ledger, rounding: str, cost: str, charged: str) -> None:
    ledger.publish(rounding=rounding)
    rich(ledger)
    carry, balance = Decimal(0), 100
    for points, credits in zip(cost.split(), map(int, charged.split()), strict=True):
        balance -= credits
        gives(amount=-credits, balance_after=balance, cost=Decimal(points))(ledger, ask.deduct("u", costs(points)))
        if rounding == "carry":
            carry += Decimal(points) - credits
        reads(rounding=rounding, carry_after=carry, cost=Decimal(points))(ledger, ask.get_transaction("@charge"))


def test_changing_the_rounding_keeps_the_carry(ledger: Ledger) -> None:
    for step in (
        rich,
        ask.deduct("u", costs("0.75")),
        prices(rounding="up"),
        ask.deduct("u", costs("0.5")),
        ask.deduct_credits("u", 2),
        prices(rounding="carry"),
    ):
        step(ledger)
    gives(amount=-1, balance_after=96)(ledger, ask.deduct("u", costs("0.25")))
    reads(carry_after=0)(ledger, ask.get_transaction("@charge"))


def test_thousands_of_small_charges_are_their_exact_sum(ledger: Ledger) -> None:
    ask.add_credits("u", 10**6)(ledger)
    seed = random.Random(5)
    spent = [Decimal(seed.randrange(10 ** seed.randrange(1, 13))).scaleb(-12) for _ in range(3000)]
    ledger.sql("create temporary table spent (place int primary key, points numeric not null) on commit drop")
    with ledger.conn.cursor() as cursor, cursor.copy("copy spent from stdin") as copy:
        for place, points in enumerate(spent):
            copy.write_row((place, points))
    ((charged,),) = ledger.sql(
        "select -sum((ducto.deduct('u', jsonb_build_object('model', 'any', 'points', s.points))).amount)"
        " from (select * from spent order by place) as s"
    )
    ((balance, carry),) = ledger.sql("select balance, carry from ducto_private.accounts")
    assert balance == 10**6 - charged
    total = sum(spent, Decimal(0))
    assert charged + carry == total
    assert charged == total.to_integral_value(ROUND_FLOOR)
    assert 0 <= carry < 1


def test_carry_has_no_end_of_digits(ledger: Ledger) -> None:
    ledger.publish(models={"third": "input_tokens / 3", "fine": "input_tokens * 0.000000000000000000000000000001"})
    rich(ledger)
    for _ in range(3):
        ask.deduct("u", {"model": "third", "input_tokens": 1})(ledger)
    ask.deduct("u", {"model": "fine", "input_tokens": 7})(ledger)
    reads(carry_after=Decimal("0.999999999999999999990000000007"))(ledger, ask.get_transaction("@charge"))


# What holds keep, and what accounts open with


# fmt: off
@table(
    ("its price", [rich, hold, prices(models={"any": "points * 9"})], settle(3), gives(cost=3)),
    ("models that are gone", [rich, hold, prices(models={"other": "input_tokens"})], settle(3), gives(cost=3)),
    ("metrics that are gone", [rich, hold, prices(models={"o": "input_tokens"}, metrics={})], settle(3), gives(cost=3)),
    ("its rounding", [prices(rounding="up"), rich, hold, prices()], ask.deduct("u", costs("2.1"), hold="@hold"),
     gives(amount=-3)),
    ("its overrun", [reject, rich, hold, debt], settle(101), refuses("insufficient_credits", shortfall=1)),
    ("its overrun, the other way", [rich, hold, reject], settle(101), gives(balance_after=-1)),
    ("not the present one", [rich, hold, prices(models={"other": "input_tokens"})],
     ask.deduct("u", {"model": "other", "input_tokens": 1}, hold="@hold"), raises("DU003", "other")),
    ("its plan's rates, also when the plan is gone",
     [prices(plans={"p": FREE["free"] | {"id": "p", "rate_overrides": {"any": "points * 2"}}}, default_plan="p"),
         ask.set_credit_limit("u", 100), hold, prices()], settle(8), gives(cost=16, allowance_used=10, amount=-6)),
    ("the allowance is that of today",
     [prices(plans=FREE, default_plan="free"), ask.set_credit_limit("u", 100), hold,
         prices(plans={"free": FREE["free"] | {"free_allowance": 4}})], settle(8), gives(allowance_used=4, amount=-4)),
)
def test_a_hold_keeps_the_terms_of_its_day(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_charge_says_the_version_of_its_price(ledger: Ledger) -> None:
    for step in (rich, hold, prices(models={"any": "points * 2"})):
        step(ledger)
    settle(3)(ledger)
    reads(pricing_version=1, reservation_id="@hold", cost=3)(ledger, ask.get_transaction("@charge"))
    ask.deduct("u", costs(3))(ledger)
    reads(pricing_version=2, reservation_id=None, cost=6)(ledger, ask.get_transaction("@charge"))


bonus = prices(signup_bonus=50)
free = prices(plans=FREE, default_plan="free")


# fmt: off
@table(
    ("a charge opens", [bonus], ask.deduct("new", costs(3)), gives(amount=-3, balance_after=47, revision=2)),
    ("an amount opens", [bonus], ask.deduct_credits("new", 3), gives(balance_after=47)),
    ("a charge of nothing opens", [bonus], ask.deduct_credits("new", 0), gives(balance_after=50)),
    ("a job opens", [bonus], ask.deduct_fixed("new", "report"), gives(balance_after=43)),
    ("a hold opens", [bonus], ask.reserve("new", costs(3)), gives(amount=3, balance=50, reserved_total=3)),
    ("a hold of an amount opens", [bonus], ask.reserve_credits("new", 45), gives(balance=50)),
    ("a hold of nothing opens", [bonus], ask.reserve_credits("new", 0), gives(balance=50)),
    ("a refused charge opens nothing", [bonus], ask.deduct("new", costs(46)),
     refuses("insufficient_credits", balance_after=0)),
    ("a refused hold opens nothing", [bonus], ask.reserve_credits("new", 46),
     refuses("insufficient_credits", balance=0)),
    ("an error opens nothing", [bonus], ask.deduct("new", {"model": "unknown", "input_tokens": 1}),
     raises("DU003", "unknown")),
    ("a settlement opens nothing", [bonus], ask.deduct("new", costs(1), hold=UNKNOWN),
     refuses("reservation_not_found", balance_after=0)),
    ("a bonus comes once", [bonus, ask.deduct("new", costs(3))], ask.deduct("new", costs(3)), gives(balance_after=44)),
    ("an account there is gets none", [rich, bonus], ask.deduct("u", costs(3)), gives(balance_after=97)),
    ("a repeated first charge", [bonus, ask.deduct("new", costs(3), "k")], ask.deduct("new", costs(3), "k"),
     replays(balance_after=47)),
    ("a free plan opens", [free], ask.deduct("new", costs(3)), gives(amount=0, allowance_used=3, balance_after=0)),
    ("it can hold, stream and settle", [free, ask.reserve_credits("new", 9)], settle(8, "new"),
     gives(amount=0, allowance_used=8)),
    ("up to its allowance", [free], ask.reserve_credits("new", 11), refuses("insufficient_credits")),
    ("holds claim the allowance", [free, ask.reserve_credits("new", 6)], ask.reserve_credits("new", 5),
     refuses("insufficient_credits")),
    ("a plan opened by a limit", [free, ask.set_credit_limit("new", 0)], ask.deduct("new", costs(10)),
     gives(allowance_used=10)),
    ("a plan and a bonus", [prices(plans=FREE, default_plan="free", signup_bonus=50)], ask.deduct("new", costs(15)),
     gives(allowance_used=10, amount=-5, balance_after=45)),
)
def test_opening(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_the_bonus_is_a_row_of_its_own(ledger: Ledger) -> None:
    bonus(ledger)
    ask.deduct("u", costs(3))(ledger)
    lists(
        {"seq": 2, "type": "usage", "amount": -3, "balance_after": 47},
        {"seq": 1, "type": "signup_bonus", "amount": 50, "balance_after": 50, "cost": None},
    )(ledger, ask.list_transactions("u"))


def test_without_default_plan_and_bonus_only_credits_and_limits_open(ledger: Ledger) -> None:
    ledger.publish(signup_bonus=0)
    for call in (ask.reserve("new", costs(0)), ask.deduct("new", costs(0)), ask.deduct_fixed("new", "gift")):
        refuses("account_not_found")(ledger, call)


# The allowance

on_plan = ask.add_credits("u", 20)


# fmt: off
@table(
    ("pays first", [], ask.deduct("u", costs("4.5")),
     gives(allowance_used=4, amount=0, balance_after=20, cost=Decimal("4.5"))),
    ("then the balance", [], ask.deduct("u", costs(14)), gives(allowance_used=10, amount=-4, balance_after=16)),
    ("to the floor", [], ask.deduct("u", costs(25)), gives(allowance_used=10, amount=-15)),
    ("no further", [], ask.deduct("u", costs(26)), refuses("insufficient_credits")),
    ("an amount too", [], ask.deduct_credits("u", 3), gives(allowance_used=3, amount=0, balance_after=20)),
    ("a job too", [], ask.deduct_fixed("u", "report"), gives(allowance_used=7, amount=0)),
    ("a charge within it needs no funds", [ask.remove_credits("u", 99)], ask.deduct("u", costs(10)),
     gives(balance_after=-79)),
    ("a charge beyond it does", [ask.remove_credits("u", 99)], ask.deduct("u", costs(11)),
     refuses("insufficient_credits")),
    ("a replay uses nothing of it", [ask.deduct("u", costs(8), "k"), ask.deduct("u", costs(8))],
     ask.deduct("u", costs(8), "k"), replays(allowance_used=8, amount=0)),
    ("a refusal uses nothing of it",
     [lambda ledger: refuses("insufficient_credits")(ledger, ask.deduct("u", costs(99)))], ask.get_balance("u"),
     reads(available=25)),
    ("it ends with the month", [at("2026-02-28T23:59:59.999999"), ask.deduct("u", costs(10)), at("2026-03-01")],
     ask.deduct("u", costs(3)), gives(allowance_used=3)),
    ("and not before", [at("2026-02-28T00:00"), ask.deduct("u", costs(10)), at("2026-02-28T23:59:59.999999")],
     ask.deduct("u", costs(3)), gives(allowance_used=0)),
    ("what was used stays used when the plan changes",
     [ask.deduct("u", costs(8)), prices(plans={"free": FREE["free"] | {"free_allowance": 9}})],
     ask.deduct("u", costs(3)), gives(allowance_used=1, amount=-2)),
    ("a refund restores it", [ask.deduct("u", costs(8))], ask.refund_credits("@charge"),
     gives(amount=0, allowance_restored=8, allowance_lapsed=0, new_balance=20)),
    ("the balance first", [ask.deduct("u", costs(14))], ask.refund_credits("@charge", 6),
     gives(amount=4, allowance_restored=2, new_balance=20)),
    ("in parts", [ask.deduct("u", costs(14)), ask.refund_credits("@charge", 3)], ask.refund_credits("@charge", 3),
     gives(amount=1, allowance_restored=2)),
    ("what is restored pays again", [ask.deduct("u", costs(10)), ask.refund_credits("@charge")],
     ask.deduct("u", costs(9)), gives(allowance_used=9)),
    ("of a month that is over it lapses", [at("2026-01-31"), ask.deduct("u", costs(14)), at("2026-02-01")],
     ask.refund_credits("@charge"), gives(amount=4, allowance_restored=0, allowance_lapsed=10, new_balance=20)),
    ("also after the next has begun",
     [at("2026-01-31"), ask.deduct("u", costs(8)), at("2026-02-01"), ask.deduct("u", costs(9))],
     ask.refund_credits("@charge1", 5), gives(amount=0, allowance_restored=0, allowance_lapsed=5)),
    ("what lapsed is refunded",
     [at("2026-01-31"), ask.deduct("u", costs(8)), at("2026-02-01"), ask.refund_credits("@charge")],
     ask.refund_credits("@charge", user_id="u"), refuses("already_refunded")),
)
def test_the_allowance(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [at("2026-01-15"), free, on_plan, *given], call, check)
# fmt: on


@pytest.mark.parametrize(
    ("zone", "last", "first"),
    [
        ("America/New_York", "2026-03-01T04:59:59+00", "2026-03-01T05:00+00"),
        ("America/New_York", "2026-04-01T03:59:59+00", "2026-04-01T04:00+00"),
        ("Asia/Kolkata", "2024-02-29T18:29:59+00", "2024-02-29T18:30+00"),
        ("Pacific/Apia", "2011-12-30T09:59:59+00", "2012-01-01T00:00+14"),
    ],
)
def test_a_month_is_the_local_one(conn: Connection, clock: Any, zone: str, last: str, first: str) -> None:
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"m": "input_tokens"}, "plans": FREE, "default_plan": "free", "timezone": zone})
    conn.execute("set timezone = 'Pacific/Kiritimati'")
    clock.set(last)
    assert manager.deduct_credits("u", 10).or_raise().allowance_used == 10
    if zone != "Pacific/Apia":
        assert manager.deduct_credits("u", 1).error == "insufficient_credits"
    clock.set(first)
    assert manager.deduct_credits("u", 10).or_raise().allowance_used == 10
    assert manager.verify_ledger() == []


# Refunds

charge = ask.deduct("u", costs(30))


# fmt: off
@table(
    ("a charge is given back", [rich, charge], ask.refund_credits("@charge"),
     gives(original_transaction_id="@charge", user_id="u", amount=30, new_balance=100, allowance_restored=0,
         idempotent=False)),
    ("a part of it", [rich, charge], ask.refund_credits("@charge", 10, "sorry"), gives(amount=10, new_balance=80)),
    ("then the rest", [rich, charge, ask.refund_credits("@charge", 10)], ask.refund_credits("@charge"),
     gives(amount=20, new_balance=100)),
    ("then no more", [rich, charge, ask.refund_credits("@charge")], ask.refund_credits("@charge", user_id="u"),
     refuses("already_refunded")),
    ("nor a part", [rich, charge, ask.refund_credits("@charge")], ask.refund_credits("@charge", 1, user_id="u"),
     refuses("already_refunded")),
    ("never more than was charged", [rich, charge], ask.refund_credits("@charge", 31, user_id="u"),
     refuses("refund_exceeds_original")),
    ("in all", [rich, charge, ask.refund_credits("@charge", 10)], ask.refund_credits("@charge", 21, user_id="u"),
     refuses("refund_exceeds_original")),
    ("credits charged, not cost", [rich, ask.deduct("u", costs("2.9"))], ask.refund_credits("@charge"),
     gives(amount=2)),
    ("a charge of nothing", [rich, ask.deduct("u", costs("0.9"))], ask.refund_credits("@charge", user_id="u"),
     refuses("not_refundable")),
    ("a grant", [rich], ask.refund_credits("@grant", user_id="u"), refuses("not_refundable")),
    ("a removal", [rich, ask.remove_credits("u", 5)], ask.refund_credits("@grant", user_id="u"),
     refuses("not_refundable")),
    ("a refund", [rich, charge, ask.refund_credits("@charge")], ask.refund_credits("@refund", user_id="u"),
     refuses("not_refundable")),
    ("an id that is none", [rich], ask.refund_credits("x", user_id="u"), refuses("transaction_not_found")),
    ("no id", [rich], ask.refund_credits(None, user_id="u"), refuses("transaction_not_found")),
    ("an unknown id", [rich], ask.refund_credits(UNKNOWN, user_id="u"), refuses("transaction_not_found")),
    ("another's charge", [rich, charge, ask.add_credits("v", 9)], ask.refund_credits("@charge", user_id="v"),
     refuses("transaction_not_found")),
    ("for a user never seen", [rich, charge], ask.refund_credits("@charge", user_id="ghost"),
     refuses("transaction_not_found")),
    ("for whom it is", [rich, charge], ask.refund_credits("@charge", user_id="u"), gives(amount=30)),
    ("a long reason", [rich, charge], ask.refund_credits("@charge", reason=LONG), raises("22023", "p_reason", "255")),
    ("debt is paid", [rich, charge, ask.remove_credits("u", 90)], ask.refund_credits("@charge", 5),
     gives(new_balance=-15)),
    ("a settlement is a charge", [rich, hold, settle(40)], ask.refund_credits("@charge"),
     gives(amount=40, new_balance=100)),
    ("a repeated key gives nothing back",
     [rich, charge, ask.refund_credits("@charge1", 5, key="k"), ask.refund_credits("@charge")],
     ask.refund_credits("@charge1", 5, key="k"), replays(amount=5, new_balance=75)),
    ("nor with another reason", [rich, charge, ask.refund_credits("@charge", 5, key="k")],
     ask.refund_credits("@charge", 5, "other", {"a": 1}, "k"), gives(idempotent=True)),
    ("another amount under the key", [rich, charge, ask.refund_credits("@charge", 5, key="k")],
     ask.refund_credits("@charge", 6, key="k", user_id="u"), refuses("idempotency_conflict")),
    ("all is another amount", [rich, charge, ask.refund_credits("@charge", 30, key="k")],
     ask.refund_credits("@charge", key="k", user_id="u"), refuses("idempotency_conflict")),
    ("another charge under the key", [rich, charge, charge, ask.refund_credits("@charge1", 5, key="k")],
     ask.refund_credits("@charge2", 5, key="k", user_id="u"), refuses("idempotency_conflict")),
    ("the key of the charge", [rich, ask.deduct("u", costs(9), "k")],
     ask.refund_credits("@charge", key="k", user_id="u"), refuses("idempotency_conflict")),
    ("a balance beyond bigint", [ask.add_credits("u", MOST), charge, ask.add_credits("u", 30)],
     ask.refund_credits("@charge"), raises("22003", "balance of account u")),
)
def test_refund_credits(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_refund_keeps_the_carry_and_tells_of_its_charge(ledger: Ledger) -> None:
    for step in (rich, ask.deduct("u", costs("2.9")), ask.refund_credits("@charge", reason="sorry", metadata={"a": 1})):
        step(ledger)
    reads(
        type="refund",
        amount=2,
        carry_after=Decimal("0.9"),
        refers_to="@charge",
        model="any",
        resolved_model="any",
        cost=None,
        reason="sorry",
        metadata={"a": 1},
    )(ledger, ask.get_transaction("@refund"))
    gives(amount=-1)(ledger, ask.deduct("u", costs("0.1")))


# Reading the ledger


def test_reading_the_ledger(ledger: Ledger) -> None:
    for step in (
        at("2026-01-01"),
        ask.add_credits("u", 100, "purchase"),
        at("2026-01-02"),
        ask.deduct("u", costs("2.5"), "k", {"a": 1}),
        at("2026-01-03"),
        ask.deduct_credits("u", 5, model="gpt-x"),
        at("2026-01-04"),
        ask.refund_credits("@charge", 1),
        ask.add_credits("other", 1),
    ):
        step(ledger)

    def seqs(**window: Any) -> list[int]:
        return [row["seq"] for row in ledger.run(ask.list_transactions("u", **window))]

    assert seqs() == [4, 3, 2, 1]
    assert seqs(limit=2) == [4, 3]
    assert seqs(limit=2, before=3) == [2, 1]
    assert seqs(before=1) == []
    assert seqs(type="usage") == [3, 2]
    assert seqs(type="usage", limit=1, before=3) == [2]
    assert seqs(**{"from": "2026-01-02T00:00+00"}) == [4, 3, 2]
    assert seqs(**{"from": "2026-01-02T00:00:00.000001+00"}) == [4, 3]
    assert seqs(to="2026-01-03T00:00+00") == [2, 1]
    assert seqs(**{"from": "2026-01-02T00:00+00", "to": "2026-01-03T00:00+00"}) == [2]
    assert seqs(**{"from": "2027-01-01"}) == []
    assert seqs(**{"from": "-infinity", "to": "infinity"}) == [4, 3, 2, 1]
    assert seqs(limit=None, type=None) == [4, 3, 2, 1]
    assert ledger.run(ask.list_transactions("new")) == []
    reads(
        transaction_id="@charge1",
        account_id="u",
        seq=2,
        type="usage",
        amount=-2,
        balance_after=98,
        allowance_used=0,
        allowance_lapsed=0,
        cost=Decimal("2.5"),
        carry_after=Decimal("0.5"),
        rounding="carry",
        actor_id=None,
        model="any",
        resolved_model="any",
        usage=costs("2.5"),
        pricing_version=1,
        plan_id=None,
        reservation_id=None,
        refers_to=None,
        idempotency_key="k",
        metadata={"a": 1},
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )(ledger, ask.get_transaction("@charge1", "u"))
    reads(usage=None, model="gpt-x", resolved_model="gpt", cost=5)(ledger, ask.get_transaction("@charge2"))
    for unknown in (ask.get_transaction, ask.explain_transaction):
        for arguments in (("x",), (UNKNOWN,), (None,), ("@charge1", "other"), ("@charge1", "ghost")):
            lists({"error": "transaction_not_found"})(ledger, unknown(*arguments))
    for wrong, words in (
        ({"limit": 0}, ("p_limit", "1 and 1000")),
        ({"limit": 1001}, ("p_limit",)),
        ({"type": "gift"}, ("p_type", "gift", "usage")),
        ({"from": "2026-01-02", "to": "2026-01-01"}, ("p_to", "p_from")),
    ):
        raises("22023", *words)(ledger, ask.list_transactions("u", **wrong))


def test_a_charge_is_explained_by_the_prices_of_its_day(ledger: Ledger) -> None:
    plan = {"p": {"id": "p", "name": "P", "rate_overrides": {"any-special": "points * 3"}}}
    ledger.publish(plans=plan, default_plan="p", signup_bonus=100)
    for step in (
        ask.deduct("u", costs("0.5")),
        ask.deduct(
            "u", {"model": "any-special-2", "points": Decimal("0.5"), "tool_calls": ["browse"], "fixed_job": "report"}
        ),
        prices(models={"other": "input_tokens"}, tools={}, fixed={}),
    ):
        step(ledger)
    reads(
        transaction_id="@charge",
        account_id="u",
        cost=Decimal("10.5"),
        carry_before=Decimal("0.5"),
        carry_after=0,
        rounding="carry",
        pricing_version=2,
        plan_id="p",
        resolved_model="any-special",
        amount=-11,
        allowance_used=0,
    )(ledger, ask.explain_transaction("@charge", "u"))
    told = ledger.one(ask.explain_transaction("@charge"))
    assert told["formulas"]["model"] == "points * 3"
    assert told["formulas"]["fixed"] == 7
    assert told["formulas"]["tools"] == {"browse": "tool_calls * 2"}
    parts = {name: Decimal(str(value)) for name, value in told["parts"].items() if value}
    assert parts == {"model_credits": Decimal("1.5"), "tool_credits": 2, "fixed_credits": 7}
    for call in (ask.deduct_credits("u", 4), ask.deduct_fixed("u", "report")):
        if call.name == "deduct_fixed":
            ledger.publish()
        call(ledger)
        told = ledger.one(ask.explain_transaction("@charge"))
        assert told["cost"] == (4 if call.name == "deduct_credits" else 7)
        assert sum(Decimal(str(value)) for value in told["parts"].values()) == (0 if told["usage"] is None else 7)
    bonus_id = ledger.run(ask.list_transactions("u", type="signup_bonus"))[0]["transaction_id"]
    reads(cost=None, formulas={}, parts={})(ledger, ask.explain_transaction(bonus_id))


def test_time_never_runs_backwards_for_an_account(ledger: Ledger) -> None:
    for step in (
        at("2026-01-02"),
        rich,
        at("2026-01-01"),
        ask.deduct("u", costs(1)),
        at("2026-01-03"),
        ask.reserve_credits("u", 5, ttl=60),
        at("2026-01-02T12:00"),
        ask.deduct("u", costs(1)),
    ):
        step(ledger)
    times = [row["created_at"].day for row in ledger.run(ask.list_transactions("u"))]
    assert times == [3, 2, 2]
    reads(reserved=5)(ledger, ask.get_balance("u"))
    reads(status="active")(ledger, ask.get_reservation("@hold"))


def test_the_next_success_records_what_expired(ledger: Ledger) -> None:
    for number, call in enumerate(
        (
            rich,
            hold,
            ask.extend_reservation("@hold2", 1),
            ask.release_reservation("@hold2"),
            ask.set_credit_limit("u", 5),
            ask.deduct("u", costs("0.1")),
            ask.deduct_credits("u", 1, "@hold2"),
            ask.remove_credits("u", 1),
            ask.refund_credits("@charge", 1),
        )
    ):
        with rolled_back(ledger) as told:
            for step in (rich, charge, hold, ask.reserve_credits("u", 7, ttl=6000), later(minutes=10), call):
                step(told)
            statuses = dict(told.sql("select held, status from ducto_private.holds where status <> 'settled'"))
            assert statuses.get(0) == "expired" or number == 3, call
            assert 30 not in statuses or number == 1


def test_each_change_counts_one_revision(ledger: Ledger) -> None:
    for number, call in enumerate(
        (
            rich,
            ask.reserve_credits("u", 5),
            ask.extend_reservation("@hold", 5),
            ask.deduct_credits("u", 1, "@hold", final=False),
            ask.release_reservation("@hold"),
            ask.set_credit_limit("u", 5),
            ask.deduct("u", costs("0.1")),
            ask.remove_credits("u", 1),
            ask.deduct("u", costs(2)),
            ask.refund_credits("@charge"),
        ),
        1,
    ):
        assert ledger.one(call)["revision"] == number
        reads(revision=number)(ledger, ask.get_balance("u"))


# What must hold whatever comes


def test_an_account_with_a_hold_of_nothing_is_charged_like_a_plain_one(ledger: Ledger) -> None:
    seed = random.Random(3)
    for user in ("plain", "held"):
        ask.add_credits(user, 300)(ledger)
    ask.reserve_credits("held", 0, ttl=2592000)(ledger)

    def answer(user: str, *arguments: Any) -> Any:
        try:
            with ledger.conn.transaction():
                row = ledger.one(ask.deduct(user, *arguments))
        except psycopg.Error as error:
            return error.sqlstate, error.diag.message_primary, error.diag.message_hint
        return {name: value for name, value in row.items() if name not in ("transaction_id", "user_id", "revision")}

    seen = []
    for _ in range(200):
        usage = seed.choice(
            [
                costs(f"{seed.randrange(10**4)}e-3"),
                costs(seed.choice([0, 1, 40, 1000])),
                {"model": "ratio", "input_tokens": 1},
                {"model": seed.choice(["gpt-4", "unknown", ""]), "input_tokens": seed.randrange(900)},
                {"model": "gpt", "tool_calls": ["browse"]},
                {"model": "any", "points": seed.choice([-1, 10**15, "1", None])},
                {"fixed_job": seed.choice(["report", "none"])},
                {"model": "gpt", "token": 1},
                seed.choice(["[]", '"gpt"', "5", "null", None]),
            ]
        )
        rest = (seed.choice([None, "a", "b", f"k{seed.random()}", " "]), seed.choice([None, None, {"a": 1}]))
        answers = [answer(user, usage, *rest) for user in ("plain", "held")]
        assert answers[0] == answers[1], (usage, rest)
        seen.append(answers[0])
    assert ledger.sql("select count(distinct (balance, carry, seq)) from ducto_private.accounts") == [(1,)]
    assert {row["error"] for row in seen if isinstance(row, dict)} == {
        None,
        "insufficient_credits",
        "idempotency_conflict",
    }
    assert {row["idempotent"] for row in seen if isinstance(row, dict)} == {True, False}


def test_admission_is_its_formula(ledger: Ledger) -> None:
    ledger.publish(plans=FREE, default_plan="free")
    seed = random.Random(7)
    answers = set()
    for number in range(40):
        user = f"u{number}"
        balance, limit, used = seed.randint(-10, 30), seed.choice([0, 0, 7]), seed.randint(0, 10)
        ask.add_credits(user, 100)(ledger)
        if used:
            ask.deduct_credits(user, used)(ledger)
        ask.set_credit_limit(user, 10**6)(ledger)
        holds = [
            ledger.one(ask.reserve_credits(user, seed.randint(0, 12)))["amount"] for _ in range(seed.randint(0, 2))
        ]
        ask.remove_credits(user, 100 - balance)(ledger) if balance < 100 else None
        ask.set_credit_limit(user, limit)(ledger)
        held, left = sum(holds), 10 - used
        least = seed.choice([None, 0, 3, 20])
        for amount in range(0, 40, seed.randint(1, 7)):
            for call, floor in (
                (ask.reserve_credits(user, amount, min_balance=least), (5 if least is None else least) - limit),
                (ask.reserve(user, costs(amount), min_balance=least), (5 if least is None else least) - limit),
                (ask.deduct_credits(user, amount), 5 - limit),
                (ask.deduct(user, costs(amount)), 5 - limit),
            ):
                net = max(0, held + amount - left)
                admitted = amount == 0 or net == 0 or balance - net >= floor
                with ledger.conn.transaction(force_rollback=True):
                    error = ledger.one(call)["error"]
                assert error == (None if admitted else "insufficient_credits"), (balance, held, left, floor, amount)
                answers.add((error, net == 0, balance < 0))
        largest = max(0, left - held + max(0, balance - (5 - limit)))
        assert ledger.one(ask.get_balance(user))["available"] == largest
        with ledger.conn.transaction(force_rollback=True):
            assert ledger.one(ask.reserve_credits(user, largest))["error"] is None
        assert ledger.one(ask.reserve_credits(user, largest + 1))["error"] == "insufficient_credits"
    assert len(answers) >= 6


def test_the_shortfall_is_its_formula(ledger: Ledger) -> None:
    seed = random.Random(11)
    ledger.publish(plans=FREE, default_plan="free", overrun="reject")
    short = 0
    for number in range(120):
        user = f"u{number}"
        balance, limit, used = seed.randint(-15, 30), seed.choice([0, 0, 8]), seed.randint(0, 10)
        held, others = seed.randint(0, 20), seed.choice([0, 0, 6])
        ask.add_credits(user, 100)(ledger)
        if used:
            ask.deduct_credits(user, used)(ledger)
        ask.set_credit_limit(user, 10**6)(ledger)
        mine = ledger.one(ask.reserve_credits(user, held))["reservation_id"]
        ask.reserve_credits(user, others)(ledger)
        ask.remove_credits(user, 100 - balance)(ledger)
        ask.set_credit_limit(user, limit)(ledger)
        left = 10 - used
        for charged in (0, held, held + 1, held + seed.randint(0, 40)):
            missing = max(0, charged - held - max(0, balance + left + limit - held - others)) if charged > held else 0
            short += missing > 0
            final = seed.random() < 0.5
            with ledger.conn.transaction(force_rollback=True):
                answer = ledger.one(ask.deduct_credits(user, charged, mine, final=final))
                assert answer["shortfall"] == missing, (balance, left, limit, held, others, charged)
                if missing:
                    assert answer["error"] == "insufficient_credits"
                else:
                    paid = min(left, charged)
                    assert (answer["error"], answer["allowance_used"], answer["amount"]) == (None, paid, paid - charged)
                    still = others + (0 if final else max(0, held - charged))
                    assert ledger.one(ask.get_balance(user))["reserved"] == still
    assert short > 50


def test_the_ledger_is_append_only(ledger: Ledger) -> None:
    for step in (
        ask.add_credits("u", 100, reference="invoice", metadata={"a": 1}),
        charge,
        ask.refund_credits("@charge", reason="sorry", metadata={"a": 1}),
    ):
        step(ledger)
    for statement in (
        "update transactions set amount = amount + 1",
        "update transactions set metadata = '{}'",
        "update transactions set metadata = null, amount = 0",
        "update transactions set idempotency_key = 'k'",
        "update transactions set created_at = now()",
        "update transactions set usage = null",
        "update transaction_details set reason = 'other'",
        "update transaction_details set reason = null, reference = 'other'",
        "update transaction_details set refers_to = null",
        "delete from transactions",
        "delete from transactions where type = 'refund'",
        "delete from transaction_details",
        "truncate transactions cascade",
        "truncate transaction_details",
        "with gone as (delete from transaction_details returning 1) select * from gone",
    ):
        before = ledger.tables()
        ledger.sql("set local search_path = ducto_private")
        with pytest.raises(psycopg.Error, match="append-only") as raised, ledger.conn.transaction():
            ledger.sql(statement)
        assert raised.value.sqlstate == "DU007"
        assert "refund_credits" in (raised.value.diag.message_hint or "")
        assert ledger.tables() == before
    ledger.sql("update ducto_private.transactions set metadata = null")
    ledger.sql("update ducto_private.transaction_details set reason = null, reference = null")
    erased = {"metadata": None, "reason": None, "reference": None}
    lists(erased, erased, erased)(ledger, ask.list_transactions("u"))


CORRUPTIONS = [
    ("accounts set balance = balance + 1", "balance is the sum of the ledger"),
    ("accounts set seq = seq + 1", "the account's seq is its number of rows"),
    ("accounts set carry = 0.25", "carry is that of the last row"),
    (
        "accounts set changed_at = changed_at - interval '9 days'",
        "the account was changed no earlier than its last row",
    ),
    ("accounts set revision = 0", "the account was changed no earlier than its last row"),
    ("accounts set lifetime_purchased = 7", "lifetime_purchased is purchases less their removals"),
    ("accounts set held = held - 1", "held is the sum of the open holds"),
    ("accounts set holds = holds + 1", "held is the sum of the open holds"),
    ("accounts set holds_due_at = 'infinity'", "no open hold expires before holds_due_at"),
    ("accounts set holds_due_at = null", "no open hold expires before holds_due_at"),
    ("accounts set allowance_used = 3", "allowance_used is that of the charges and refunds of its period"),
    ("transactions set account_id = 'ghost'", "every row belongs to an account"),
    ("transactions set seq = seq + 9 where seq > 2", "seq has no gap"),
    ("transactions set balance_after = 5 where seq = 1", "balance_after follows from the row before"),
    ("transactions set amount = amount - 1 where type = 'usage'", "balance is the sum of the ledger"),
    ("transactions set amount = amount - 1 where type = 'usage'", "charged is the rounded cost"),
    ("transactions set created_at = 'infinity' where seq = 2", "time and revision never run backwards"),
    ("transactions set revision = 0 where seq = 2", "time and revision never run backwards"),
    ("transactions set cost = cost + 1 where cost is not null", "charged is the rounded cost"),
    ("transactions set cost = null where cost is not null", "charged is the rounded cost"),
    ("transactions set carry_after = 0.5 where seq = 2", "carry_after is what the charge left over"),
    ("transactions set allowance_used = 1 where type = 'usage'", "charged is the rounded cost"),
    (
        "transaction_details set refers_to = null where refers_to is not null and seq = 3",
        "a row refers to a row of its account",
    ),
    ("transactions set amount = 31 where type = 'refund'", "refunds stay within the charge"),
    ("transactions set pricing_version = 99 where type = 'usage'", "a charge has a published version"),
    (
        "transaction_details set lifetime_purchased = 5 where lifetime_purchased is not null",
        "lifetime_purchased follows the rows",
    ),
    (
        "transaction_details set transaction_id = gen_random_uuid() where lifetime_purchased is not null",
        "every row but a charge's has details",
    ),
    (
        "transaction_details set allowance_lapsed = 31 where refers_to is not null and seq = 3",
        "refunds stay within the charge",
    ),
    (
        "transaction_details set refers_to = transaction_id where refers_to is not null and seq = 3",
        "a row refers to a row of its account",
    ),
    (
        "transaction_details set refers_to = gen_random_uuid() where refers_to is not null and seq = 3",
        "a row refers to a row of its account",
    ),
    ("transactions set amount = -101 where type = 'removal'", "removals and expiry stay within the grant"),
    (
        "holds set charged = charged + 1 where status = 'settled'",
        "a hold's charged is the sum of its settlements",
    ),
    ("holds set held = 99 where status = 'active'", "held is the sum of the open holds"),
    (
        "holds set status = 'released', held = 0, ended_at = now() where status = 'active'",
        "held is the sum of the open holds",
    ),
    ("holds set expires_at = 'epoch' where status = 'active'", "no open hold expires before holds_due_at"),
]


@pytest.mark.parametrize(("corruption", "invariant"), CORRUPTIONS, ids=[row[0] for row in CORRUPTIONS])
def test_verify_ledger_finds(module_ledger: Ledger, corruption: str, invariant: str) -> None:
    with module_ledger.conn.transaction(force_rollback=True):
        ledger = Ledger(module_ledger.conn, module_ledger.clock)
        for step in (
            free,
            ask.add_credits("sound", 9),
            ask.reserve_credits("sound", 1),
            prices(),
            ask.add_credits("u", 100),
            hold,
            ask.deduct("u", costs(30), hold="@hold"),
            ask.refund_credits("@charge", 9),
            ask.remove_credits("u", 5, transaction_id="@grant2"),
            ask.reserve_credits("u", 7),
        ):
            step(ledger)
        assert ledger.violations() == []
        ledger.sql("set local session_replication_role = replica")
        where = " and" if " where " in corruption else " where"
        ledger.sql(f"update ducto_private.{corruption}{where} account_id = 'u'")
        found = ledger.violations()
        assert invariant in {row["invariant"] for row in found}, found
        assert {row["account_id"] for row in found} <= {"u", "ghost"}
        assert all(row["expected"] != row["actual"] for row in found if row["invariant"] == invariant), found
        assert ledger.run(ask.verify_ledger("sound")) == []
        assert ledger.run(ask.verify_ledger("u")) or ledger.run(ask.verify_ledger("ghost"))


@pytest.mark.parametrize(
    "gone",
    [
        "transactions where seq = 1",
        "transactions where seq = 2",
        "transactions where seq = 3",
        "transactions",
        "transaction_details where refers_to is not null",
        "holds where status = 'active'",
        "holds where status = 'settled'",
        "accounts",
    ],
)
def test_verify_ledger_misses(module_ledger: Ledger, gone: str) -> None:
    with module_ledger.conn.transaction(force_rollback=True):
        ledger = Ledger(module_ledger.conn, module_ledger.clock)
        for step in (rich, hold, settle(9), ask.refund_credits("@charge"), ask.reserve_credits("u", 1)):
            step(ledger)
        ledger.sql("set local session_replication_role = replica")
        ledger.sql(f"delete from ducto_private.{gone}")
        assert {row["account_id"] for row in ledger.violations()} == {"u"}


@pytest.mark.parametrize(
    "table",
    ["transactions", "holds", "hold_keys", "credit_lots", "spend_caps", "teams", "team_members", "events"],
)
def test_verify_ledger_finds_rows_of_no_account(module_ledger: Ledger, table: str) -> None:
    with module_ledger.conn.transaction(force_rollback=True):
        ledger = Ledger(module_ledger.conn, module_ledger.clock)
        for step in (
            prices(),
            ask.create_team("Crew", 50, team_id="u"),
            ask.add_credits("u", 50, expires_at="2999-01-01"),
            ask.add_team_member("u", "ann"),
            ask.set_spend_cap("u", 100),
            ask.reserve_team_credits("u", "ann", 5, key="k"),
        ):
            step(ledger)
        assert ledger.violations() == []
        ledger.sql("set local session_replication_role = replica")
        ledger.sql(f"update ducto_private.{table} set account_id = 'ghost'")
        for found in (ledger.violations(), ledger.run(ask.verify_ledger("ghost"))):
            (orphans,) = [row for row in found if row["invariant"] == "every row belongs to an account"]
            assert orphans["account_id"] == "ghost"
            assert orphans["detail"].endswith(f"rows of {table}")


# The largest numbers


def test_the_largest_numbers(ledger: Ledger) -> None:
    ask.add_credits("u", MOST, "purchase")(ledger)
    ask.set_credit_limit("u", MOST)(ledger)
    reads(balance=MOST, available=MOST, lifetime_purchased=MOST)(ledger, ask.get_balance("u"))
    gives(reserved_total=MOST)(ledger, ask.reserve_credits("u", MOST))
    gives(balance_after=0, shortfall=0)(ledger, ask.deduct_credits("u", MOST, "@hold"))
    gives(balance_after=5 - MOST)(ledger, ask.deduct_credits("u", MOST - 5))
    refuses("insufficient_credits")(ledger, ask.deduct_credits("u", MOST))
    gives(new_balance=5)(ledger, ask.add_credits("u", MOST))
    gives(amount=MOST - 5, new_balance=MOST)(ledger, ask.refund_credits("@charge"))
    raises("22003", "u")(ledger, ask.refund_credits("@charge1"))
    gives(cost=MOST)(ledger, ask.deduct_credits("u", MOST))


def test_holds_beyond_bigint_are_a_clear_error(ledger: Ledger) -> None:
    for step in (ask.add_credits("u", MOST), ask.set_credit_limit("u", MOST), ask.reserve_credits("u", MOST)):
        step(ledger)
    for call in (ask.reserve_credits("u", 100), ask.extend_reservation("@hold", 100)):
        raises("22003", "u")(ledger, call)


def test_lifetime_purchases_beyond_bigint_are_a_clear_error(ledger: Ledger) -> None:
    for step in (ask.add_credits("u", MOST, "purchase"), ask.remove_credits("u", MOST)):
        step(ledger)
    raises("22003", "u")(ledger, ask.add_credits("u", 1, "purchase"))

"""Ids, keys, metadata and amounts: what every call refuses alike, and which of several faults counts."""

import random
from collections.abc import Callable

import pytest
from ledger_helpers import (
    LONG,
    MOST,
    Call,
    Ledger,
    ask,
    costs,
    gives,
    later,
    poor,
    raises,
    reads,
    refuses,
    replays,
    rich,
    rolled_back,
    team,
)

BAD_IDS = [None, "", " ", " u", "u ", "u\n", "\u00a0u", LONG]


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

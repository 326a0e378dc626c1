"""Reading the ledger: lists, single rows, and what explains a charge."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from ledger_helpers import (
    UNKNOWN,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    but,
    costs,
    lists,
    prices,
    raises,
    reads,
    refuses,
    rich,
    table,
    team,
    tell,
)


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
        for arguments in (("x",), (UNKNOWN,), ("@charge1", "other"), ("@charge1", "ghost")):
            lists({"error": "transaction_not_found"})(ledger, unknown(*arguments))
    lists({"error": "transaction_not_found"})(ledger, ask.explain_transaction(None))
    for wrong, words in (
        ({"limit": 0}, ("p_limit", "1 and 1000")),
        ({"limit": 1001}, ("p_limit",)),
        ({"type": "gift"}, ("p_type", "gift", "usage")),
        ({"from": "2026-01-02", "to": "2026-01-01"}, ("p_to", "p_from")),
    ):
        raises("22023", *words)(ledger, ask.list_transactions("u", **wrong))


def by_key(user: str | None, key: str | None, **more: Any) -> Call:
    return ask.get_transaction(user_id=user, idempotency_key=key, **more)


absent = lists({"error": "transaction_not_found", "transaction_id": None, "amount": 0})


# fmt: off
@table(
    ("a charge", [rich, ask.deduct("u", costs(3), "k")], by_key("u", "k"), reads(transaction_id="@charge", amount=-3)),
    ("a grant", [ask.add_credits("u", 9, key="k")], by_key("u", "k"),
     reads(transaction_id="@grant", type="adjustment")),
    ("a removal", [rich, ask.remove_credits("u", 9, key="k")], by_key("u", "k"), reads(type="removal", amount=-9)),
    ("a refund", [rich, ask.deduct_credits("u", 9), ask.refund_credits("@charge", key="k")], by_key("u", "k"),
     reads(transaction_id="@refund", type="refund", refers_to="@charge")),
    ("a charge of a batch", [rich, ask.deduct_batch([{"user_id": "u", "amount": 2, "idempotency_key": "k"}])],
     by_key("u", "k"), reads(transaction_id="@charge", amount=-2)),
    ("a pool's, by the team", [team("t", "u"), ask.deduct_team_credits("t", "u", 7, key="k")], by_key("t", "k"),
     reads(transaction_id="@charge", actor_id="u")),
    ("but not by the member", [team("t", "u"), ask.deduct_team_credits("t", "u", 7, key="k")], by_key("u", "k"),
     absent),
    ("one request id names a hold and its settlement, and this is the settlement",
     [rich, ask.reserve_credits("u", 5, key="k"), ask.deduct_credits("u", 4, "@hold", key="k")], by_key("u", "k"),
     reads(transaction_id="@charge", reservation_id="@hold")),
    ("a hold alone has no row", [rich, ask.reserve_credits("u", 5, key="k")], by_key("u", "k"), absent),
    ("each account has keys of its own",
     [rich, ask.add_credits("v", 100), ask.deduct_credits("u", 1, key="k"), ask.deduct_credits("v", 2, key="k")],
     by_key("u", "k"), reads(transaction_id="@charge1", account_id="u")),
    ("a refused request is not remembered", [rich, but(refuses("insufficient_credits"),
     ask.deduct_credits("u", 900, key="k"))], by_key("u", "k"), absent),
    ("no such key", [rich], by_key("u", "K"), absent),
    ("no such account", [rich], by_key("ghost", "k"), absent),
    ("a key as it is, not trimmed", [rich, ask.deduct_credits("u", 1, key=" k")], by_key("u", "k"), absent),
    ("nothing", [rich], ask.get_transaction(), raises("22023", "p_transaction_id", "p_user_id", "p_idempotency_key")),
    ("a user alone", [rich], by_key("u", None), raises("22023", "p_idempotency_key", "key of the call")),
    ("a key without its account", [rich], by_key(None, "k"), raises("22023", "p_user_id", "account's id")),
    ("an id and a key", [rich, ask.deduct_credits("u", 1, key="k")], by_key("u", "k", transaction_id="@charge"),
     raises("22023", "p_transaction_id", "or by")),
    ("a blank key", [rich], by_key("u", " "), raises("22023", "p_idempotency_key", "blank")),
    ("a blank account", [rich], by_key(" ", "k"), raises("22023", "p_user_id")),
)
def test_a_row_is_found_by_the_key_that_wrote_it(
    ledger: Ledger, given: list[Step], call: Call, check: Check
) -> None:
    tell(ledger, given, call, check)
# fmt: on


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

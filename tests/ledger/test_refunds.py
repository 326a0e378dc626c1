"""Refunds: how much of a charge comes back, and once."""

from decimal import Decimal

from ledger_helpers import (
    LONG,
    MOST,
    UNKNOWN,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    charge,
    costs,
    gives,
    hold,
    later,
    lists,
    raises,
    reads,
    refuses,
    replays,
    rich,
    settle,
    table,
    tell,
)


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


# fmt: off
bought = ask.add_credits("u", 50, "purchase")
mistake = ask.remove_credits("u", 40, transaction_id="@grant1")
january_10 = "2026-01-10T00:00+00"
bought_lot = ask.add_credits("u", 50, "purchase", expires_at=january_10)


@table(
    ("a removal is given back", [bought, mistake], ask.refund_credits("@grant2"),
     gives(original_transaction_id="@grant2", user_id="u", amount=40, new_balance=50, allowance_restored=0)),
    ("a purchase counts for life again", [bought, mistake, ask.refund_credits("@grant2")], ask.get_balance("u"),
     reads(balance=50, lifetime_purchased=50)),
    ("in part", [bought, mistake, ask.refund_credits("@grant2", 10)], ask.get_balance("u"),
     reads(balance=20, lifetime_purchased=20)),
    ("at that time too", [bought, mistake, later(days=1), ask.refund_credits("@grant2"), later(days=1)],
     ask.get_balance("u", "2026-01-02T00:00+00"), reads(balance=50, lifetime_purchased=50)),
    ("never more than was removed", [bought, mistake], ask.refund_credits("@grant2", 41, user_id="u"),
     refuses("refund_exceeds_original")),
    ("once", [bought, mistake, ask.refund_credits("@grant2")], ask.refund_credits("@grant2", user_id="u"),
     refuses("already_refunded")),
    ("one without its grant", [bought, ask.remove_credits("u", 5), ask.refund_credits("@grant2")],
     ask.get_balance("u"), reads(balance=50, lifetime_purchased=50)),
    ("then all may be removed", [bought, mistake, ask.refund_credits("@grant2")],
     ask.remove_credits("u", 50, transaction_id="@grant1"), gives(new_balance=0, lifetime_purchased=0)),
    ("but no more", [bought, mistake, ask.refund_credits("@grant2", 10)],
     ask.remove_credits("u", 21, transaction_id="@grant1"), refuses("exceeds_grant")),
    ("a dispute lost and won after all was spent", [bought, ask.deduct_credits("u", 45),
     ask.remove_credits("u", 50, transaction_id="@grant1")], ask.refund_credits("@grant2"), gives(new_balance=5)),
    ("it is not refunded spend", [bought, ask.deduct_credits("u", 1), mistake, ask.refund_credits("@grant2")],
     ask.aggregate_stats(), reads(total_credits_consumed=1, refunded=0)),
    ("nor by a rollup", [bought, ask.deduct_credits("u", 1), mistake, ask.refund_credits("@grant2"),
     ask.rollup_usage()], ask.spend_by_user(), lists({"user_id": "u", "total_spend": 1, "refunded": 0})),
    ("it makes no room in a cap",
     [rich, ask.set_spend_cap("u", 30), charge, ask.remove_credits("u", 5), ask.refund_credits("@grant2")],
     ask.deduct_credits("u", 1), refuses("spend_cap_exceeded")),
    ("nor in a new one", [rich, charge, ask.remove_credits("u", 5), ask.refund_credits("@grant2"),
     ask.set_spend_cap("u", 30)], ask.deduct_credits("u", 1), refuses("spend_cap_exceeded")),
    ("its lot keeps its expiry", [bought_lot, mistake, ask.refund_credits("@grant2"), at("2026-01-10")],
     ask.get_balance("u"), reads(balance=0, lifetime_purchased=50)),
    ("back in its lot it is spent first", [rich, bought_lot, ask.remove_credits("u", 40, transaction_id="@grant2"),
     ask.refund_credits("@grant3"), ask.deduct_credits("u", 30), at("2026-01-10")], ask.get_balance("u"),
     reads(balance=100)),
    ("a lot that is due has expired", [bought_lot, mistake, at("2026-01-11"), ask.refund_credits("@grant2")],
     ask.get_balance("u"), reads(balance=0, lifetime_purchased=50)),
    ("as the ledger says", [bought_lot, mistake, at("2026-01-11"), ask.refund_credits("@grant2", 15)],
     ask.list_transactions("u", 2), lists({"type": "expiry", "amount": -15, "refers_to": "@grant1"},
      {"type": "refund", "amount": 15, "refers_to": "@grant2", "balance_after": 15})),
    ("the grant's own lot last", [bought_lot, ask.deduct_credits("u", 30),
     ask.add_credits("u", 50, expires_at="2026-01-05T00:00+00"), ask.remove_credits("u", 50, transaction_id="@grant1"),
     ask.refund_credits("@grant3", 30), at("2026-01-05")], ask.get_balance("u"), reads(balance=0)),
    ("a debt first", [bought_lot, ask.deduct_credits("u", 45), ask.remove_credits("u", 50, transaction_id="@grant1"),
     ask.refund_credits("@grant2"), at("2026-01-10")], ask.get_balance("u"), reads(balance=0)),
    ("a charge refunded before it",
     [bought_lot, ask.deduct_credits("u", 20), ask.remove_credits("u", 50, transaction_id="@grant1"),
      ask.refund_credits("@charge"), ask.refund_credits("@grant2")], ask.get_balance("u"), reads(balance=50)),
    ("and after it",
     [bought_lot, ask.deduct_credits("u", 20), ask.remove_credits("u", 50, transaction_id="@grant1"),
      ask.refund_credits("@grant2"), ask.refund_credits("@charge"), at("2026-01-10")], ask.get_balance("u"),
     reads(balance=0)),
    ("a repeated key gives nothing back", [bought, mistake, ask.refund_credits("@grant2", 5, key="k")],
     ask.refund_credits("@grant2", 5, key="k"), replays(amount=5, new_balance=15)),
)
def test_refund_of_a_removal(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
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

"""Credits in and out: adding and removing."""

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
    gives,
    poor,
    prices,
    raises,
    reads,
    refuses,
    replays,
    rich,
    table,
    tell,
)

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

"""Credits in and out: adding and removing."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

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
    gives,
    hold,
    later,
    lists,
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


def test_a_payment_delivered_twice_is_one_request_whatever_the_clock_says(ledger: Ledger) -> None:
    """The example of docs/plans.md: the time of the second delivery is part of neither request."""

    def pay(day: int) -> Call:
        expires = datetime(2026, 1, day, tzinfo=UTC) + timedelta(days=30)
        return ask.add_credits("u", 500, "subscription", expires_at=expires, key="invoice 7")

    first = ledger.one(pay(1))
    ledger.clock.set("2026-01-03")
    assert ledger.one(pay(3)) == first | {"idempotent": True}
    ledger.clock.set("2026-01-31")
    reads(balance=0)(ledger, ask.get_balance("u"))


# fmt: off
@table(
    ("it is as if there were none", [], ask.add_credits("u", 50, keep_lot=True), gives(new_balance=50)),
    ("no date is told", [ask.add_credits("u", 50, keep_lot=True)], ask.get_transaction("@grant"),
     reads(expires_at=None, amount=50)),
    ("it never expires", [ask.add_credits("u", 50, keep_lot=True), at("2126-01-01")], ask.get_balance("u"),
     reads(balance=50)),
    ("nor does a sweep find it", [ask.add_credits("u", 50, keep_lot=True), at("2126-01-01")],
     ask.sweep_expired_credits(), gives(expired_count=0)),
    ("with a date it expires", [ask.add_credits("u", 50, expires_at="2026-01-02T00:00+00", keep_lot=True),
     at("2026-01-02")], ask.get_balance("u"), reads(balance=0)),
    ("whether it is kept is not part of the request", [ask.add_credits("u", 50, key="k")],
     ask.add_credits("u", 50, key="k", keep_lot=True), gives(new_balance=50, idempotent=True)),
    ("what expires is spent before it", [ask.add_credits("u", 50, keep_lot=True),
     ask.add_credits("u", 50, expires_at="2026-01-02T00:00+00"), ask.deduct_credits("u", 40)],
     ask.remove_credits("u", None, transaction_id="@grant1", unspent_only=True), gives(amount=-50, new_balance=10)),
    ("it is spent before other credits", [rich, ask.add_credits("u", 50, keep_lot=True), ask.deduct_credits("u", 40)],
     ask.remove_credits("u", None, transaction_id="@grant2", unspent_only=True), gives(amount=-10)),
    ("of two the older first", [ask.add_credits("u", 50, keep_lot=True), ask.add_credits("u", 50, keep_lot=True),
     ask.deduct_credits("u", 60)],
     ask.remove_credits("u", None, transaction_id="@grant2", unspent_only=True), gives(amount=-40)),
    ("a refund goes back into it", [ask.add_credits("u", 50, keep_lot=True), ask.deduct_credits("u", 40),
     at("2027-01-01"), ask.refund_credits("@charge", 15)],
     ask.remove_credits("u", None, transaction_id="@grant1", unspent_only=True), gives(amount=-25, new_balance=0)),
)
def test_kept_lots(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


kept = ask.add_credits("u", 100, "promotion", keep_lot=True)
bought = ask.add_credits("u", 50, "purchase")


def take(amount: int | None = None, grant: str = "@grant1", **more: Any) -> Call:
    return ask.remove_credits("u", amount, transaction_id=grant, unspent_only=True, **more)


@table(
    ("a promotion of which some was spent", [kept, bought, ask.deduct_credits("u", 30)], take(),
     gives(amount=-70, new_balance=50, lifetime_purchased=50)),
    ("a part of what is left", [kept, bought, ask.deduct_credits("u", 30)], take(20), gives(amount=-20)),
    ("not more than is left", [kept, bought, ask.deduct_credits("u", 30)], take(71), refuses("exceeds_grant")),
    ("twice", [kept, bought, take(20)], take(), gives(amount=-80, new_balance=50)),
    ("nothing is left", [kept, bought, ask.deduct_credits("u", 100)], take(), refuses("exceeds_grant")),
    ("it has expired", [ask.add_credits("u", 9, expires_at="2026-01-02T00:00+00"), rich, at("2026-01-02")], take(),
     refuses("exceeds_grant")),
    ("it all paid a debt", [rich, ask.remove_credits("u", 200), ask.add_credits("u", 80, keep_lot=True)],
     take(grant="@grant3"), refuses("exceeds_grant", new_balance=-20)),
    ("some of it paid a debt", [rich, ask.remove_credits("u", 150), ask.add_credits("u", 80, keep_lot=True)],
     take(grant="@grant3"), gives(amount=-30, new_balance=0)),
    ("not what a hold claims", [kept, bought, hold], take(), gives(amount=-70, new_balance=80)),
    ("not more than that", [kept, hold], take(71), refuses("exceeds_grant")),
    ("a hold claims what is spent first", [ask.add_credits("u", 20, expires_at="2026-01-02T00:00+00"), kept, hold],
     take(grant="@grant2"), gives(amount=-90)),
    ("a hold that has ended claims nothing", [kept, hold, ask.release_reservation("@hold")], take(),
     gives(amount=-100)),
    ("nor one that has expired", [kept, hold, later(hours=1)], take(), gives(amount=-100)),
    ("all is claimed", [ask.add_credits("u", 30, keep_lot=True), bought, hold], take(), refuses("exceeds_grant")),
    ("what is kept for a hold beyond its expiry is claimed, too",
     [ask.add_credits("u", 20, expires_at="2026-01-02T00:00+00"), kept, ask.reserve_credits("u", 30, ttl=900000),
      at("2026-01-03")], take(grant="@grant2"), gives(amount=-90)),
    ("what has expired serves no hold",
     [ask.add_credits("u", 20, expires_at="2026-01-02T00:00+00"), kept, at("2026-01-03"), hold],
     take(grant="@grant2"), gives(amount=-70)),
    ("a grant without a lot", [rich], take(), raises("22023", "has no lot", "p_keep_lot")),
    ("no grant", [rich], ask.remove_credits("u", 5, unspent_only=True), raises("22023", "p_unspent_only", "grant")),
    ("an unknown one", [rich], take(grant=UNKNOWN), refuses("transaction_not_found")),
    ("no amount without it", [kept], ask.remove_credits("u", None, transaction_id="@grant1"),
     raises("22023", "p_amount")),
    ("null is no", [kept], ask.remove_credits("u", 5, transaction_id="@grant1", unspent_only=None), gives(amount=-5)),
    ("a repeated key takes nothing", [kept, take(key="k"), ask.add_credits("u", 7)], take(key="k"),
     replays(amount=-100)),
    ("all is another amount", [kept, take(100, key="k")], take(key="k"), refuses("idempotency_conflict")),
    ("it can be refunded", [kept, bought, take(), ask.refund_credits("@grant3")], take(), gives(amount=-100)),
)
def test_removing_only_what_is_unspent(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


bonus = prices(signup_bonus=20, signup_bonus_days=7)


@table(
    ("it is spent first", [bonus, rich, ask.deduct_credits("u", 5), at("2026-01-08")], ask.get_balance("u"),
     reads(balance=100)),
    ("its row says when", [bonus, ask.set_credit_limit("u", 1)], ask.list_transactions("u"),
     lists({"type": "signup_bonus", "amount": 20, "expires_at": datetime(2026, 1, 8, tzinfo=UTC)})),
    ("to the moment", [bonus, rich, at("2026-01-07T23:59:59.999999")], ask.get_balance("u"), reads(balance=120)),
    ("a hold opens with it", [bonus, ask.reserve_credits("u", 9), at("2026-01-08")], ask.get_balance("u"),
     reads(balance=0)),
    ("a charge too", [bonus, ask.deduct_credits("u", 9), at("2026-01-08")], ask.get_balance("u"), reads(balance=0)),
    ("and a batch", [bonus, ask.deduct_batch('[{"user_id": "u", "amount": 4}, {"user_id": "u", "amount": 5}]'),
     at("2026-01-08")], ask.get_balance("u"), reads(balance=0)),
    ("what was spent of it does not expire", [bonus, ask.deduct_credits("u", 9), rich, at("2026-01-08")],
     ask.get_balance("u"), reads(balance=100)),
    ("without days it stays", [prices(signup_bonus=20), rich, at("2126-01-08")], ask.get_balance("u"),
     reads(balance=120)),
    ("a team has none", [bonus, ask.create_team("T", 5, team_id="t"), at("2026-01-08")], ask.get_balance("t"),
     reads(balance=5)),
)
def test_a_bonus_that_expires(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
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
    ("money given below zero", [grant], ask.remove_credits("u", 1, paid_amount=-1), raises("22023", "p_paid_amount")),
    ("a long currency", [grant], ask.remove_credits("u", 1, paid_currency=LONG), raises("22023", "p_paid_currency")),
)
def test_remove_credits(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_money_given_back_is_kept_negative(ledger: Ledger) -> None:
    ledger.one(grant)
    ledger.one(ask.remove_credits("u", 5, paid_amount=Decimal("4.50"), paid_currency="EUR"))
    reads(type="removal", amount=-5, paid_amount=Decimal("-4.50"), paid_currency="EUR")(
        ledger, ask.get_transaction("@grant2")
    )

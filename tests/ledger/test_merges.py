"""Merges: a guest's account becomes part of the user's, and what its ledger gave follows."""

import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from conftest import Connect
from ledger_helpers import (
    FREE,
    LONG,
    MOST,
    Call,
    Check,
    Ledger,
    Row,
    Step,
    ask,
    at,
    costs,
    gives,
    later,
    lists,
    prices,
    raises,
    reads,
    refuses,
    replays,
    table,
    team,
    tell,
)
from sessions import Arena, Cast, outcomes

from ducto_pg import ConcurrencyError, CreditManager

guest = ask.add_credits("guest", 100)
user = ask.add_credits("user", 50)
merge = ask.merge_accounts("guest", "user")
spent = ask.deduct_credits("guest", 30)


def lot(account: str, amount: int, day: str, **more: Any) -> Call:
    """Credits that expire as that day of January 2026 begins."""
    return ask.add_credits(account, amount, expires_at=f"2026-01-{day}T00:00+00", **more)


@pytest.fixture(scope="module")
def module_ledger(module_ledger: Ledger) -> Ledger:
    """Nothing is kept back."""
    module_ledger.publish(min_balance=0)
    return module_ledger


def holds(*balances: int) -> Check:
    """It succeeds; so much have the guest and the user then."""

    def check(ledger: Ledger, call: Call) -> None:
        gives()(ledger, call)
        assert [ledger.one(ask.get_balance(name))["balance"] for name in ("guest", "user")] == list(balances)

    return check


# fmt: off
@table(
    ("all moves", [guest, user], merge,
     gives(user_id="user", balance=150, lifetime_purchased=0, reserved=0, available=150, idempotent=False, revision=2)),
    ("nothing stays", [guest, user], merge, holds(0, 150)),
    ("purchases count there for life", [ask.add_credits("guest", 9, "purchase"), ask.add_credits("user", 5, "purchase"),
     merge], ask.get_balance("user"), reads(balance=14, lifetime_purchased=14)),
    ("and here no more", [ask.add_credits("guest", 9, "purchase"), merge], ask.get_balance("guest"),
     reads(balance=0, lifetime_purchased=0)),
    ("a user never seen is opened", [guest], merge, gives(balance=100)),
    ("with a bonus", [guest, prices(signup_bonus=7)], merge, gives(balance=107)),
    ("a debt moves too", [user, ask.add_credits("guest", 1), ask.remove_credits("guest", 61)], merge, holds(0, -10)),
    ("a debt is paid", [guest, ask.add_credits("user", 1), ask.remove_credits("user", 31)], merge, holds(0, 70)),
    ("nothing is a merge too", [user, ask.set_credit_limit("guest", 3)], merge, gives(balance=50)),
    ("limits, plans and caps stay", [prices(plans=FREE), guest, user, ask.set_credit_limit("guest", 9),
     ask.set_user_plan("guest", "free"), ask.set_spend_cap("guest", 1)], merge, gives(credit_limit=0, balance=150)),
    ("the user's holds stand", [guest, user, ask.reserve_credits("user", 20)], merge, gives(reserved=20, balance=150)),
    ("what has expired does not move", [lot("guest", 9, "05"), guest, at("2026-01-05")], merge, holds(0, 100)),
    ("nor has it on the other side", [guest, lot("user", 9, "05"), at("2026-01-05")], merge, holds(0, 100)),
    ("a lot keeps its expiry", [lot("guest", 9, "05"), user, merge, at("2026-01-05")], ask.get_balance("user"),
     reads(balance=50)),
    ("to the moment", [lot("guest", 9, "05"), user, merge, at("2026-01-04T23:59:59")], ask.get_balance("user"),
     reads(balance=59)),
    ("and is spent in its turn", [lot("guest", 9, "05"), lot("user", 9, "07"), merge, ask.deduct_credits("user", 5),
     at("2026-01-07")], ask.list_transactions("user", 2, type="expiry"),
     lists()),
    ("lots of one expiry", [lot("guest", 9, "05"), lot("guest", 9, "05"), lot("user", 9, "05"), merge,
     ask.deduct_credits("user", 12), at("2026-01-05")], ask.get_balance("user"), reads(balance=0)),
    ("what paid the user's debt does not expire", [lot("guest", 9, "05"), lot("guest", 9, "07"),
     ask.add_credits("user", 1), ask.remove_credits("user", 11), merge, at("2026-01-07")], ask.get_balance("user"),
     reads(balance=0)),
    ("nor does a lot pay twice", [lot("user", 9, "05"), ask.add_credits("guest", 1), ask.remove_credits("guest", 6),
     merge, at("2026-01-05")], ask.get_balance("user"), reads(balance=0)),
    ("fractions add up", [guest, user, ask.deduct("guest", costs("0.3")), ask.deduct("user", costs("0.4")), merge],
     ask.deduct("user", costs("0.3")), gives(amount=-1, balance_after=149)),
    ("a whole credit of them is charged", [guest, user, ask.deduct("guest", costs("0.7")),
     ask.deduct("user", costs("0.8"))], merge, holds(0, 149)),
    ("and what is left of it later", [guest, user, ask.deduct("guest", costs("0.7")), ask.deduct("user", costs("0.8")),
     merge], ask.deduct("user", costs("0.5")), gives(amount=-1, balance_after=148)),
    ("from a lot first", [lot("guest", 9, "05"), ask.deduct("guest", costs("0.7")), user,
     ask.deduct("user", costs("0.8")), merge, at("2026-01-05")], ask.get_balance("user"), reads(balance=50)),
    ("also where nothing else moves", [lot("user", 9, "05"), ask.add_credits("guest", 1),
     ask.deduct_credits("user", Decimal("0.8")), ask.deduct_credits("guest", Decimal("0.7")),
     ask.remove_credits("guest", 1)], merge, holds(0, 8)),
    ("holds are refused", [guest, user, ask.reserve_credits("guest", 20)], merge,
     refuses("has_open_holds", balance=50, reserved=0)),
    ("and open nothing", [guest, ask.reserve_credits("guest", 20)], ask.merge_accounts("guest", "a user"),
     refuses("has_open_holds", balance=0)),
    ("one that has expired is none", [guest, user, ask.reserve_credits("guest", 20), later(hours=1)], merge,
     gives(balance=150)),
    ("an account never seen", [user], merge, refuses("account_not_found", balance=50)),
    ("two never seen", [], merge, refuses("account_not_found", balance=0)),
    ("a team", [team("crew", "guest"), user], ask.merge_accounts("crew", "user"),
     refuses("is_a_team", balance=50)),
    ("into a team", [team("crew", "guest"), user], ask.merge_accounts("user", "crew"),
     refuses("is_a_team", balance=100)),
    ("into itself", [user], ask.merge_accounts("user", "user"), raises("22023", "same account")),
    ("from nobody", [user], ask.merge_accounts("", "user"), raises("22023", "p_from")),
    ("into nobody", [user], ask.merge_accounts("user", LONG), raises("22023", "p_into")),
    ("more than a balance holds", [ask.add_credits("guest", MOST), user], merge, raises("22003", "balance of account")),
    ("a repeated key moves nothing", [guest, user, ask.merge_accounts("guest", "user", "k"), guest],
     ask.merge_accounts("guest", "user", "k"), replays(balance=150)),
    ("also after the balance has gone", [guest, user, ask.merge_accounts("guest", "user", "k"),
     ask.deduct_credits("user", 140), ask.set_credit_limit("user", 5)], ask.merge_accounts("guest", "user", "k"),
     replays(balance=150, credit_limit=0)),
    ("another user under the key", [guest, user, ask.merge_accounts("guest", "user", "k")],
     ask.merge_accounts("guest", "third", "k"), refuses("idempotency_conflict", balance=0)),
    ("another guest under it", [guest, user, ask.merge_accounts("guest", "user", "k"), ask.add_credits("third", 1)],
     ask.merge_accounts("third", "user", "k"), refuses("idempotency_conflict", balance=150)),
    ("the key of a grant", [ask.add_credits("guest", 9, key="k"), user], ask.merge_accounts("guest", "user", "k"),
     refuses("idempotency_conflict", balance=50)),
    ("again without a key moves what came since", [guest, user, merge, ask.add_credits("guest", 7)], merge,
     holds(0, 157)),
    ("the account goes on", [guest, user, merge, ask.add_credits("guest", 7)], ask.deduct_credits("guest", 1),
     gives(balance_after=6)),
    ("empty", [guest, user, merge], ask.deduct_credits("guest", 1), refuses("insufficient_credits")),
    ("its grants under a key are known", [ask.add_credits("guest", 9, key="k"), user, merge],
     ask.add_credits("guest", 9, key="k"), replays(new_balance=9)),
)
def test_merge_accounts(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


chain: list[Step] = [guest, spent, user, merge, ask.merge_accounts("user", "third")]
kept = ask.add_credits("guest", 60, "purchase", keep_lot=True)


@table(
    ("a refund goes to the user", [guest, spent, user, merge], ask.refund_credits("@charge"),
     gives(user_id="user", amount=30, new_balance=150)),
    ("asked for by the guest", [guest, spent, user, merge], ask.refund_credits("@charge", user_id="guest"),
     gives(user_id="user", new_balance=150)),
    ("or by the user", [guest, spent, user, merge], ask.refund_credits("@charge", user_id="user"),
     gives(user_id="user", new_balance=150)),
    ("not by another", [guest, spent, user, merge, ask.add_credits("third", 9)],
     ask.refund_credits("@charge", user_id="third"), refuses("transaction_not_found")),
    ("along a chain", chain, ask.refund_credits("@charge"), gives(user_id="third", new_balance=150)),
    ("asked for in the middle", chain, ask.refund_credits("@charge", user_id="user"), gives(user_id="third")),
    ("of the last in it to the last", [*chain, ask.deduct_credits("third", 5)], ask.refund_credits("@charge"),
     gives(user_id="third")),
    ("never more than was charged, on both sides together", [guest, spent, ask.refund_credits("@charge", 20), user,
     merge], ask.refund_credits("@charge", 11, user_id="user"), refuses("refund_exceeds_original")),
    ("the rest", [guest, spent, ask.refund_credits("@charge", 20), user, merge, ask.refund_credits("@charge", 4)],
     ask.refund_credits("@charge"), gives(user_id="user", amount=6, new_balance=150)),
    ("then no more", [guest, spent, user, merge, ask.refund_credits("@charge")],
     ask.refund_credits("@charge", user_id="user"), refuses("already_refunded")),
    ("a key is known across the merge", [guest, spent, ask.refund_credits("@charge", 20, key="k"), user, merge],
     ask.refund_credits("@charge", 20, key="k"), replays(user_id="guest", new_balance=90)),
    ("and on the other side", [guest, spent, user, merge, ask.refund_credits("@charge", 20, key="k"),
     ask.merge_accounts("user", "third")], ask.refund_credits("@charge", 20, key="k"), replays(user_id="user")),
    ("what the guest spends later is its own", [guest, user, merge, ask.add_credits("guest", 50), spent],
     ask.refund_credits("@charge"), gives(user_id="guest", new_balance=50)),
    ("there and back", [guest, spent, user, merge, ask.merge_accounts("user", "guest")],
     ask.refund_credits("@charge"), gives(user_id="guest", new_balance=150)),
    ("there, back and there", [guest, spent, user, merge, ask.merge_accounts("user", "guest"), merge],
     ask.refund_credits("@charge"), gives(user_id="user", new_balance=150)),
    ("allowance lapses", [prices(plans=FREE, default_plan="free"), guest, spent, user, merge],
     ask.refund_credits("@charge"), gives(amount=20, allowance_restored=0, allowance_lapsed=10)),
    ("it makes no room in the user's cap",
     [guest, spent, user, ask.set_spend_cap("user", 10), ask.deduct_credits("user", 10), merge,
      ask.refund_credits("@charge1")], ask.deduct_credits("user", 1), refuses("spend_cap_exceeded")),
    ("nor in the guest's", [guest, ask.set_spend_cap("guest", 30), spent, user, merge, ask.refund_credits("@charge"),
     guest], ask.deduct_credits("guest", 1), refuses("spend_cap_exceeded")),
    ("a lot gets it back", [lot("guest", 40, "05"), spent, user, merge, ask.refund_credits("@charge"),
     at("2026-01-05")], ask.get_balance("user"), reads(balance=50)),
    ("also one of which nothing was left", [lot("guest", 30, "05"), spent, user, merge, ask.refund_credits("@charge"),
     at("2026-01-04")], ask.get_balance("user"), reads(balance=80)),
    ("until it expires", [lot("guest", 30, "05"), spent, user, merge, ask.refund_credits("@charge", 5),
     ask.refund_credits("@charge"), at("2026-01-05")], ask.get_balance("user"), reads(balance=50)),
    ("the last lot first", [lot("guest", 20, "05"), lot("guest", 20, "07"), spent, user, merge,
     ask.refund_credits("@charge", 10), at("2026-01-05")], ask.get_balance("user"), reads(balance=70)),
    ("a lot that is due comes back for 30 days", [lot("guest", 30, "05"), spent, user, at("2026-01-06"), merge,
     ask.refund_credits("@charge"), at("2026-02-04")], ask.get_balance("user"), reads(balance=80)),
    ("a lot that came back home", [lot("guest", 40, "05"), spent, user, merge, ask.merge_accounts("user", "guest"),
     ask.refund_credits("@charge"), at("2026-01-05")], ask.get_balance("guest"), reads(balance=50)),
    ("a settlement", [guest, ask.reserve_credits("guest", 20), ask.deduct_credits("guest", 9, "@hold"), user, merge],
     ask.refund_credits("@charge"), gives(user_id="user", amount=9)),
)
def test_refunds_follow(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


def take(amount: int | None, account: str = "user", grant: str = "@grant1", **more: Any) -> Call:
    return ask.remove_credits(account, amount, transaction_id=grant, **more)


@table(
    ("a dispute of the guest's purchase", [kept, user, merge], take(60),
     gives(user_id="user", amount=-60, new_balance=50, lifetime_purchased=0)),
    ("told for the guest", [kept, user, merge], take(60, "guest"), gives(user_id="user", new_balance=50)),
    ("not for another", [kept, user, merge, ask.add_credits("third", 9)], take(60, "third"),
     refuses("transaction_not_found")),
    ("never more than the grant", [kept, user, ask.remove_credits("guest", 20, transaction_id="@grant1"), merge],
     take(41), refuses("exceeds_grant")),
    ("only what is unspent", [kept, spent, user, merge, ask.deduct_credits("user", 10)], take(None, unspent_only=True),
     gives(amount=-20, new_balance=50)),
    ("with what was refunded", [kept, spent, user, merge, ask.refund_credits("@charge")], take(None, unspent_only=True),
     gives(amount=-60)),
    ("also of a lot that was empty", [kept, ask.deduct_credits("guest", 60), user, merge,
     ask.refund_credits("@charge")], take(None, unspent_only=True), gives(amount=-60)),
    ("what expired cannot be removed", [lot("guest", 60, "05"), spent, user, merge, at("2026-01-05")], take(31),
     refuses("exceeds_grant", new_balance=50)),
    ("what did not can", [lot("guest", 60, "05"), spent, user, merge, at("2026-01-05")], take(30),
     gives(new_balance=20)),
    ("also after its row", [lot("guest", 60, "05"), spent, user, merge, at("2026-01-05"),
     ask.deduct_credits("user", 1)], take(31), refuses("exceeds_grant")),
    ("a lot that came back home", [kept, user, merge, ask.merge_accounts("user", "guest")],
     take(None, "guest", unspent_only=True), gives(amount=-60, new_balance=50)),
    ("a removal won back", [kept, user, take(60, "guest"), merge, ask.refund_credits("@grant3")],
     ask.get_balance("user"), reads(balance=110, lifetime_purchased=60)),
    ("one of the user's", [kept, user, merge, take(60), ask.refund_credits("@grant3")], take(None, unspent_only=True),
     gives(amount=-60)),
    ("in its lot", [lot("guest", 60, "05"), user, take(60, "guest"), merge, ask.refund_credits("@grant3"),
     at("2026-01-05")], ask.get_balance("user"), reads(balance=50)),
    ("a key is known across the merge", [kept, user, take(9, "guest", key="k"), merge], take(9, "guest", key="k"),
     replays(user_id="guest")),
    ("a merge is no grant", [guest, user, merge], ask.list_transactions("user", 1),
     lists({"type": "adjustment", "amount": 100, "metadata": {"merged_from": "guest"}})),
)
def test_removals_follow(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_merge_is_no_grant(ledger: Ledger) -> None:
    for step in (guest, user, merge):
        step(ledger)
    for account in ("guest", "user"):
        [row] = ledger.run(ask.list_transactions(account, 1))
        call = ask.remove_credits(account, 1, transaction_id=row["transaction_id"])
        refuses("transaction_not_found")(ledger, call)


def test_no_event_tells_of_the_emptied_account(ledger: Ledger) -> None:
    ledger.publish(low_balance=20)
    for step in (guest, user, merge):
        step(ledger)
    assert ledger.events("low_balance", "debt_begun") == []
    ledger.one(ask.add_credits("third", 1))
    ledger.one(ask.remove_credits("third", 200))
    told = len(ledger.events("low_balance", "debt_begun"))
    ledger.one(ask.merge_accounts("third", "user"))
    assert sorted(ledger.events("low_balance", "debt_begun"), key=repr) == [
        ("debt_begun", {"balance": -199}),
        ("debt_begun", {"balance": -49}),
        ("low_balance", {"balance": -49, "low_balance": 20}),
    ]
    assert told == 1


@pytest.mark.parametrize(
    ("corruption", "invariant"),
    [
        ("merges set carry = carry + 0.5", "carry_after is what the charge left over"),
        ("merges set purchased = purchased + 1", "lifetime_purchased is purchases less their removals"),
        ("merges set into_seq = into_seq - 1", "a merge moves all that there was"),
        ("merges set seq = seq - 1", "a merge moves all that there was"),
        ("merges set account_id = 'ghost'", "every row belongs to an account"),
        ("merges set into_id = 'third'", "a row refers to a row of its account"),
        ("merges set into_id = 'third'", "a lot's grant lives in its account"),
        ("credit_lots set grant_id = gen_random_uuid()", "a lot's grant lives in its account"),
        ("transactions set amount = amount - 1 where type = 'adjustment'", "balance is the sum of the ledger"),
        ("transaction_details set paid_amount = 5 where paid_amount < 0", "money is paid for grants, and given back"),
        ("transaction_details set paid_amount = -5 where paid_amount > 0", "money is paid for grants, and given back"),
        ("transactions set amount = 21 where type = 'refund'", "refunds stay within the charge"),
    ],
)
def test_verify_ledger_finds(ledger: Ledger, corruption: str, invariant: str) -> None:
    with ledger.conn.transaction(force_rollback=True):
        for step in (
            ask.add_credits("third", 1),
            ask.add_credits("guest", 100, "purchase", keep_lot=True, paid_amount=9),
            ask.deduct("guest", costs("20.5")),
            user,
            merge,
            ask.refund_credits("@charge", 20),
            ask.remove_credits("user", 90, transaction_id="@grant2", paid_amount=8),
        ):
            step(ledger)
        assert ledger.violations() == []
        ledger.sql("set local session_replication_role = replica")
        ledger.sql(f"update ducto_private.{corruption}")
        found = {row["invariant"] for row in ledger.violations()}
        assert any(name.startswith(invariant) for name in found), found


# --- Sessions ---------------------------------------------------------------------------------------------------------


class TestRaces:
    def test_a_charge_waits_for_a_merge(self, connect: Connect, arena: Arena) -> None:
        arena.given(guest, user)
        cast = Cast(connect, 2)
        cast.open(0, lambda m: m.merge_accounts("guest", "user").or_raise())
        cast.start(1, lambda m: m.deduct_credits("guest", 60))
        assert cast.waiters() == 1
        cast.sessions[0].commit()
        [charge] = cast.answers()
        cast.close()
        assert charge.error == "insufficient_credits"
        assert [arena.ledger.one(ask.get_balance(name))["balance"] for name in ("guest", "user")] == [0, 150]
        arena.sound()

    def test_a_merge_waits_for_a_charge(self, connect: Connect, arena: Arena) -> None:
        arena.given(guest, user)
        cast = Cast(connect, 2)
        cast.open(0, lambda m: m.deduct_credits("guest", 60).or_raise())
        cast.start(1, lambda m: m.merge_accounts("guest", "user"))
        assert cast.waiters() == 1
        cast.sessions[0].commit()
        [merged] = cast.answers()
        cast.close()
        assert merged.balance == 90
        arena.sound()

    @pytest.mark.parametrize("names", [("aa", "zz"), ("zz", "aa")])
    def test_a_refund_follows_the_merge_for_which_it_waited(
        self, connect: Connect, arena: Arena, names: tuple[str, str]
    ) -> None:
        """It lets the old account go before it asks for the new one, and may wait for somebody who wants both."""
        old, new = names
        arena.given(ask.add_credits(old, 100), ask.deduct_credits(old, 30), ask.add_credits(new, 50))
        charge = arena.ledger.ids["charge"][-1]
        cast = Cast(connect, 4)
        cast.open(0, lambda m: m.merge_accounts(old, new).or_raise())
        cast.start(1, lambda m: m.refund_credits(charge))
        cast.start(2, lambda m: m.deduct_batch([{"user_id": name, "amount": 1} for name in names]), "commit")
        cast.start(3, lambda m: m.merge_accounts(new, old), "commit")
        assert cast.waiters() == 3
        cast.sessions[0].commit()
        refund, batch, back = cast.answers()
        cast.close()
        assert refund.error is None
        assert back.error is None
        assert refund.user_id in names
        assert [charged.error for charged in batch].count(None) >= 1
        arena.sound()
        balances = [arena.ledger.one(ask.get_balance(name))["balance"] for name in names]
        assert sum(balances) == 150 - [charged.error for charged in batch].count(None)

    def test_opposite_merges_are_no_deadlock(self, connect: Connect, arena: Arena) -> None:
        for number in range(8):
            one, other = f"one {number}", f"other {number}"
            arena.given(ask.add_credits(one, 10), ask.add_credits(other, 5))
            pair = [ask.merge_accounts(one, other), ask.merge_accounts(other, one)] * 3
            answers = arena.meet(6, pair.__getitem__)
            assert outcomes(answers) == Counter(ok=6)
            balances = [arena.ledger.one(ask.get_balance(name))["balance"] for name in (one, other)]
            assert sorted(balances) == [0, 15]
        arena.sound()

    def test_one_key_is_one_merge(self, connect: Connect, arena: Arena) -> None:
        arena.given(guest)
        assert arena.race(6, ask.merge_accounts("guest", "a new user", "k")) == Counter(ok=1, replayed=5)
        assert arena.ledger.one(ask.get_balance("a new user"))["balance"] == 100
        arena.sound()

    @pytest.mark.parametrize("names", [("aa", "zz"), ("zz", "aa")])
    def test_a_user_never_seen_is_opened_once(self, connect: Connect, arena: Arena, names: tuple[str, str]) -> None:
        """In the order of names, so that a batch of both waits for the merge, or the merge for it."""
        old, new = names
        arena.ledger.publish(min_balance=0, signup_bonus=10)
        arena.given(ask.add_credits(old, 100))
        cast = Cast(connect, 3)
        cast.open(0, lambda m: m.add_credits(new, 1).or_raise())
        cast.start(1, lambda m: m.merge_accounts(old, new), "commit")
        cast.start(2, lambda m: m.deduct_batch([{"user_id": name, "amount": 1} for name in names]), "commit")
        assert cast.waiters() >= 1
        cast.sessions[0].rollback()
        merged, batch = cast.answers()
        cast.close()
        assert merged.error is None
        assert {charged.error for charged in batch} <= {None, "insufficient_credits"}
        arena.sound()

    def test_at_repeatable_read_it_is_right_or_fails(self, connect: Connect, arena: Arena) -> None:
        arena.given(guest, spent, user)
        charge = arena.ledger.ids["charge"][-1]
        late = connect()
        late.execute("set default_transaction_isolation = 'repeatable read'")
        late.execute("begin")
        CreditManager(late).get_balance("guest")
        arena.given(merge)
        with pytest.raises(ConcurrencyError):
            CreditManager(late).refund_credits(charge)
        late.execute("rollback")
        arena.sound()


# --- At random --------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]


class Life:
    """Random calls on four accounts, and the sum of what all of them must have."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger, self.rng = ledger, random.Random(seed)
        self.granted = Fraction(0)
        self.rows: dict[str, list[str]] = {"grant": [], "charge": [], "removal": []}
        self.outcomes: Counter[str] = Counter()

    def step(self) -> None:
        rng = self.rng
        name, other = rng.sample(NAMES, 2)
        amount = rng.randint(1, 60)
        calls: list[Callable[[], Row | None]] = [
            lambda: self.grant(name, amount),
            lambda: self.grant(name, amount),
            lambda: self.charge(name, amount),
            lambda: self.charge(name, amount),
            lambda: self.charge(name, amount),
            lambda: self.remove(name, amount),
            lambda: self.refund("charge", amount),
            lambda: self.refund("charge", amount),
            lambda: self.refund("removal", amount),
            lambda: self.ledger.one(ask.merge_accounts(name, other)),
            lambda: self.settle(name, amount),
            lambda: self.ledger.clock.advance(timedelta(hours=rng.randint(1, 60))),
        ]
        row = rng.choice(calls)()
        if row is not None:
            self.outcomes[row["error"] or "ok"] += 1

    def grant(self, name: str, amount: int) -> Row:
        rng = self.rng
        more: dict[str, Any] = rng.choice(
            [{}, {"keep_lot": True}, {"expires_at": self.now() + timedelta(days=rng.randint(1, 12))}]
        )
        row = self.ledger.one(ask.add_credits(name, amount, rng.choice(["purchase", "promotion"]), **more))
        self.rows["grant"].append(row["transaction_id"])
        self.granted += amount
        return row

    def charge(self, name: str, amount: int) -> Row:
        cost = Decimal(amount) / 8
        row = self.ledger.one(ask.deduct(name, costs(str(cost))))
        if row["error"] is None:
            self.rows["charge"].append(row["transaction_id"])
            self.granted -= Fraction(cost)
        return row

    def settle(self, name: str, amount: int) -> Row:
        hold = self.ledger.one(ask.reserve_credits(name, amount, ttl=3600))
        if hold["error"] is None:
            if self.rng.random() < 0.3:
                merged = self.ledger.one(ask.merge_accounts(name, "d" if name != "d" else "a"))
                assert merged["error"] == "has_open_holds"
            row = self.ledger.one(ask.deduct_credits(name, amount // 2, hold["reservation_id"]))
            self.rows["charge"].append(row["transaction_id"])
            self.granted -= amount // 2
            return row
        return hold

    def remove(self, name: str, amount: int) -> Row:
        if not self.rows["grant"]:
            return {"error": "none"}
        grant = self.rng.choice(self.rows["grant"])
        with self.ledger.conn.transaction():
            where = self.home(grant)
            unspent = self.rng.random() < 0.5 and self.has_lot(grant)
            given = None if unspent and self.rng.random() < 0.5 else amount
            call = ask.remove_credits(where, given, transaction_id=grant, unspent_only=unspent)
            row = self.ledger.one(call)
        if row["error"] is None:
            assert row["user_id"] == where
            self.rows["removal"].append(row["transaction_id"])
            self.granted += row["amount"]
        return row

    def refund(self, kind: str, amount: int) -> Row:
        if not self.rows[kind]:
            return {"error": "none"}
        origin = self.rng.choice(self.rows[kind])
        row = self.ledger.one(ask.refund_credits(origin, self.rng.choice([None, amount])))
        if row["error"] is None:
            assert row["user_id"] == self.home(origin)
            self.granted += row["amount"]
        return row

    def now(self) -> Any:
        return self.ledger.sql("select ducto_private.clock()")[0][0]

    def home(self, transaction: str) -> str:
        [(homes,)] = self.ledger.sql(
            "select ducto_private.homes(t.account_id, t.seq) from ducto_private.transactions as t"
            f" where t.transaction_id = '{transaction}'"
        )
        return str(homes[-1])

    def has_lot(self, grant: str) -> bool:
        [(found,)] = self.ledger.sql(
            f"select expires_at is not null from ducto_private.transaction_details where transaction_id = '{grant}'"
        )
        return bool(found)

    def is_conserved(self) -> None:
        """What all accounts have, and the fractions that they owe, is what was granted less what was spent, removed and
        has expired."""
        [(balances, carries, expired)] = self.ledger.sql(
            "select (select sum(balance) from ducto_private.accounts), (select sum(carry) from ducto_private.accounts),"
            " (select coalesce(sum(amount), 0) from ducto_private.transactions where type = 'expiry')"
        )
        assert Fraction(balances) - Fraction(carries) == self.granted + Fraction(expired)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_or_made(ledger: Ledger, seed: int) -> None:
    life = Life(ledger, seed)
    for name in NAMES:
        life.grant(name, 50)
    for number in range(150):
        life.step()
        if number % 5 == 4:
            life.is_conserved()
            found = ledger.violations()
            assert found == [], (seed, number, found)
    assert life.outcomes["ok"] > 60, life.outcomes

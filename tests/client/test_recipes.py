"""The recipes of `examples/recipes/`: what a shop builds on the calls, with no counter and no job of its own."""

import random
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, Connection

from ducto_pg import CreditManager, InsufficientCreditsError, RefusedError, UsageMetrics

sys.path.append(str(Path(__file__).parents[2] / "examples" / "recipes"))

import guest
import keys_and_seats
import payments
import subscription
import topup_worker


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.fixture
def credits(conn: Connection, clock: Clock) -> CreditManager:
    """A manager with the plans of the subscription's recipe, on 20 January."""
    clock.set(day("2026-01-20T10:00"))
    manager = CreditManager(conn)
    manager.publish_pricing(subscription.PRICES)
    return manager


def chat(points: int) -> UsageMetrics:
    """A usage of so many credits."""
    return UsageMetrics(model="chat", input_tokens=points * 100)


def webhook(name: str, kind: str, at: str, **data: Any) -> dict[str, Any]:
    times = {key: int(day(value).timestamp()) for key, value in data.items() if key in ("paid_until", "anchor")}
    return {
        "id": name,
        "type": kind,
        "created": int(day(at).timestamp()),
        "user": "ann",
        "data": {"plan": "pro"} | data | times,
    }


def money(payment: str, amount: int) -> dict[str, Any]:
    return {"payment": payment, "credits": amount, "amount": "9.99", "currency": "EUR"}


ANCHOR = "2026-01-20T10:00"
PAID = webhook("paid-1", "subscription.paid", ANCHOR, anchor=ANCHOR, paid_until="2026-02-20T10:00")
RENEWED = webhook("paid-2", "subscription.paid", "2026-02-20T12:00", anchor=ANCHOR, paid_until="2026-03-20T10:00")
STORY = [
    PAID,
    webhook("p-1", "payment.succeeded", "2026-01-21", **money("one", 100)),
    RENEWED,
    webhook("d-1", "payment.disputed", "2026-02-21", payment="one", dispute="first"),
    webhook("w-1", "dispute.won", "2026-02-25", dispute="first"),
    webhook("p-2", "payment.succeeded", "2026-02-26", **money("two", 50)),
    webhook("d-2", "payment.disputed", "2026-02-27", payment="two", dispute="second"),
    webhook("p-3", "payment.succeeded", "2026-02-27", **money("three", 30)),
    webhook("r-3", "payment.refunded", "2026-02-28", payment="three"),
    webhook("c-1", "subscription.cancelled", "2026-03-01", anchor=ANCHOR, paid_until="2026-03-20T10:00"),
]


class TestPayments:
    @pytest.mark.parametrize("seed", range(12))
    def test_any_order_and_any_number_of_deliveries_is_one_story(
        self, credits: CreditManager, clock: Clock, seed: int
    ) -> None:
        clock.set(day("2026-03-02"))
        waiting = STORY * random.Random(seed).randint(1, 3)
        random.Random(seed).shuffle(waiting)
        refused = 0
        while waiting:
            event = waiting.pop(0)
            try:
                payments.handle(credits, event)
            except RefusedError:
                refused += 1
                assert refused < 1000
                waiting.append(event)
        plan = credits.get_user_plan("ann")
        assert (plan.plan_id, plan.next_plan_id, plan.next_plan_at) == ("pro", "free", "2026-03-20T10:00:00+00:00")
        assert plan.period_start == "2026-02-20T10:00:00+00:00"
        balance = credits.get_balance("ann")
        assert (balance.balance, balance.lifetime_purchased) == (100, 100)
        clock.set(day("2026-03-20T10:00"))
        assert credits.get_user_plan("ann").plan_id == "free"
        assert credits.verify_ledger() == []

    def test_a_renewal_that_is_paid_two_hours_late_interrupts_nothing(
        self, credits: CreditManager, clock: Clock
    ) -> None:
        payments.handle(credits, PAID)
        credits.deduct("ann", chat(80)).or_raise()
        clock.set(day("2026-02-20T11:00"))
        assert credits.deduct("ann", chat(30)).or_raise().allowance_used == 30
        clock.set(day("2026-02-20T12:00"))
        payments.handle(credits, RENEWED)
        assert credits.check_allowance("ann").allowance_remaining == 100 + 20 - 30
        clock.set(day("2026-03-19"))
        assert credits.get_user_plan("ann").plan_id == "pro"

    def test_one_that_is_never_paid_ends_the_plan_after_the_grace(self, credits: CreditManager, clock: Clock) -> None:
        payments.handle(credits, PAID)
        clock.set(day("2026-02-23T09:59"))
        assert credits.get_user_plan("ann").plan_id == "pro"
        clock.set(day("2026-02-23T10:00"))
        assert credits.get_user_plan("ann").plan_id == "free"

    def test_money_back_takes_only_what_was_not_spent(self, credits: CreditManager, clock: Clock) -> None:
        payments.handle(credits, STORY[1])
        credits.deduct("ann", chat(40)).or_raise()
        payments.handle(credits, webhook("r-1", "payment.refunded", "2026-01-22", payment="one"))
        assert credits.get_balance("ann").balance == 0
        assert credits.list_transactions("ann", type="removal")[0].amount == -70  # 10 of the 40 were the free plan's


class TestSubscription:
    def test_a_trial_ends_by_itself(self, credits: CreditManager, clock: Clock) -> None:
        subscription.begin_trial(credits, "ann", clock.now())
        assert subscription.account_page(credits, "ann") == "Pro: 100 credits until 2026-02-20, then free"
        clock.set(day("2026-02-03T10:00"))
        assert subscription.account_page(credits, "ann") == "Free: 10 credits until 2026-03-01"

    def test_rolls_over_upgrades_and_downgrades(self, credits: CreditManager, clock: Clock) -> None:
        until = day("2027-01-20T10:00")
        subscription.subscribe(credits, "ann", "pro", clock.now(), until)
        credits.deduct("ann", chat(70)).or_raise()
        clock.set(day("2026-02-21"))
        assert credits.check_allowance("ann").allowance_remaining == 130
        subscription.upgrade(credits, "ann", "max", until)
        credits.deduct("ann", chat(100)).or_raise()
        assert credits.check_allowance("ann").allowance_remaining == 400
        subscription.upgrade(credits, "ann", "pro", until)
        assert credits.check_allowance("ann").allowance_remaining == 0
        subscription.upgrade(credits, "ann", "max", until)
        subscription.downgrade(credits, "ann", "pro")
        assert subscription.account_page(credits, "ann") == "Max: 400 credits until 2026-03-20, then pro"
        clock.set(day("2026-03-20T10:00"))
        assert subscription.account_page(credits, "ann") == "Pro: 100 credits until 2026-04-20"
        subscription.cancel(credits, "ann")
        clock.set(day("2026-04-20T10:00"))
        assert credits.get_user_plan("ann").plan_id == "free"
        assert credits.verify_ledger() == []


class TestKeysAndSeats:
    def test_budgets_of_a_key_and_of_a_session(self, credits: CreditManager, clock: Clock) -> None:
        credits.add_credits("ann", 1000).or_raise()
        keys_and_seats.issue_key(credits, "ann", "k1", 100)
        keys_and_seats.begin_session(credits, "ann", "s1", 60)
        keys_and_seats.begin_session(credits, "ann", "s2", 60)
        credits.set_user_plan("ann").or_raise()
        charge = [
            keys_and_seats.charge(credits, "ann", "k1", session, chat(points), f"request-{number}")
            for number, (session, points) in enumerate([("s1", 50), ("s1", 20), ("s2", 50), ("s2", 1), ("s3", 1)])
        ]
        assert charge == [True, False, True, False, False]
        assert keys_and_seats.left(credits, "ann", "k1") == 0
        clock.set(day("2026-02-01"))
        assert keys_and_seats.charge(credits, "ann", "k1", "s1", chat(10), "next month")
        assert not keys_and_seats.charge(credits, "ann", "k1", "s1", chat(1), "the session is spent")
        assert keys_and_seats.left(credits, "ann", "k1") == 90
        spent = {row.label: row.total_spend for row in credits.spend_by_label()}
        assert spent == {"key:k1": 110, "session:s1": 60, "session:s2": 50}

    def test_seats_of_a_team(self, credits: CreditManager, clock: Clock) -> None:
        team = credits.create_team("Research", 500, team_id="research").or_raise().team_id
        keys_and_seats.add_seat(credits, team, "ann", 40)
        assert keys_and_seats.charge_seat(credits, team, "ann", chat(40), "first") == 40
        with pytest.raises(RefusedError):
            keys_and_seats.charge_seat(credits, team, "ann", chat(1), "second")
        clock.set(day("2026-01-26"))
        assert keys_and_seats.charge_seat(credits, team, "ann", chat(1), "next week") == 1


class TestTopUps:
    class Bank:
        """Takes money once for each key, and declines or breaks when it is told to."""

        def __init__(self) -> None:
            self.taken: dict[str, int] = {}
            self.declines = self.breaks = False

        def pay(self, user: str, amount: int, key: str) -> Decimal:
            if self.declines:
                raise topup_worker.Declined
            self.taken[key] = amount
            if self.breaks:
                raise ConnectionError("after the money was taken")
            return Decimal("9.99")

    @pytest.fixture
    def bank(self, credits: CreditManager) -> Bank:
        credits.add_credits("ann", 100).or_raise()
        credits.set_user_plan("ann").or_raise()
        credits.set_auto_topup("ann", 50, 200).or_raise()
        assert topup_worker.work(credits, lambda *_: Decimal(0)) == 0
        return self.Bank()

    def test_is_paid_once(self, credits: CreditManager, bank: Bank) -> None:
        for number in range(3):
            credits.deduct("ann", chat(20), f"charge {number}").or_raise()
        assert [topup_worker.work(credits, bank.pay) for _ in range(2)] == [1, 0]
        assert credits.get_balance("ann").balance == 240
        assert list(bank.taken.values()) == [200]

    def test_also_by_a_worker_that_dies_in_its_midst(self, credits: CreditManager, bank: Bank, clock: Clock) -> None:
        credits.deduct("ann", chat(60)).or_raise()
        bank.breaks = True
        with pytest.raises(ConnectionError):
            topup_worker.work(credits, bank.pay)
        bank.breaks = False
        clock.advance(timedelta(minutes=6))
        assert topup_worker.work(credits, bank.pay) == 1
        assert (credits.get_balance("ann").balance, list(bank.taken.values())) == (240, [200])

    def test_a_card_that_is_declined_is_asked_again_the_next_day(
        self, credits: CreditManager, bank: Bank, clock: Clock
    ) -> None:
        credits.deduct("ann", chat(60)).or_raise()
        bank.declines = True
        assert topup_worker.work(credits, bank.pay) == 0
        credits.deduct("ann", chat(1)).or_raise()
        bank.declines = False
        assert topup_worker.work(credits, bank.pay) == 0
        clock.advance(timedelta(days=1))
        credits.deduct("ann", chat(1)).or_raise()
        assert topup_worker.work(credits, bank.pay) == 1
        assert credits.verify_ledger() == []


class TestGuests:
    def test_what_a_guest_had_is_the_users_with_its_expiry(self, credits: CreditManager, clock: Clock) -> None:
        account = guest.welcome(credits, "s1", clock.now())
        clock.advance(timedelta(hours=1))
        assert guest.welcome(credits, "s1", clock.now()) == account
        charge = credits.deduct(account, chat(15)).or_raise()
        assert charge.allowance_used == 10
        for _ in range(2):
            assert guest.sign_up(credits, "s1", "ann").balance == 15
        credits.refund_credits(charge.transaction_id).or_raise()
        assert (credits.get_balance("ann").balance, credits.get_balance(account).balance) == (20, 0)
        clock.advance(timedelta(days=7))
        assert credits.get_balance("ann").balance == 0
        with pytest.raises(InsufficientCreditsError):
            credits.deduct("ann", chat(11)).or_raise()
        assert credits.verify_ledger() == []

"""Credits that expire, as sentences: what burns first, what holds keep, what a refund gives back, and the sweep."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    MOST,
    Call,
    Check,
    Ledger,
    Row,
    Step,
    ask,
    at,
    but,
    costs,
    gives,
    later,
    lists,
    prices,
    raises,
    reads,
    refuses,
    replays,
    rolled_back,
    table,
    team,
    tell,
)
from sessions import Arena, blocked

MONTH = 2592000


def lot(amount: int, until: str, user: str = "u", **more: Any) -> Call:
    """Credits that expire as that day of January 2026 begins."""
    return ask.add_credits(user, amount, expires_at=f"2026-01-{until}T00:00+00", **more)


def charge(amount: int, **more: Any) -> Call:
    return ask.deduct_credits("u", amount, **more)


def settle(amount: int, hold: str = "@hold1", **more: Any) -> Call:
    return ask.deduct_credits("u", amount, hold, **more)


def hold(amount: int) -> Call:
    return ask.reserve_credits("u", amount, ttl=MONTH)


def remain(*amounts: int, **fields: Any) -> Check:
    """It succeeds with these fields; so much is left then in each lot of u, soonest expiry first, then oldest."""

    def check(ledger: Ledger, call: Call) -> None:
        gives(**fields)(ledger, call)
        query = "select remainder from ducto_private.credit_lots where account_id = 'u' order by expires_at, seq"
        assert [left for (left,) in ledger.sql(query)] == list(amounts)

    return check


free = ask.add_credits("u", 50)
until_10, until_20 = lot(100, "10"), lot(100, "20")
debt: list[Step] = [ask.add_credits("u", 1), ask.remove_credits("u", 31)]
balance = ask.get_balance("u")
poor = refuses("insufficient_credits")


@pytest.fixture(scope="module")
def module_ledger(module_ledger: Ledger) -> Ledger:
    """Nothing is kept back."""
    module_ledger.publish(min_balance=0)
    return module_ledger


# fmt: off
@table(
    ("credits that expire", [], until_10, remain(100, amount=100, new_balance=100, lifetime_purchased=0)),
    ("bought ones", [], lot(100, "10", type="purchase"), remain(100, lifetime_purchased=100)),
    ("subscribed ones", [], lot(100, "10", type="subscription"), remain(100)),
    ("a bonus", [], lot(100, "10", type="signup_bonus"), remain(100)),
    ("a promotion beside others", [free, until_20], lot(7, "10", type="promotion"), remain(7, 100, new_balance=157)),
    ("a moment is enough", [], ask.add_credits("u", 1, expires_at="2026-01-01T00:00:00.000001+00"), remain(1)),
    ("now is none", [], ask.add_credits("u", 1, expires_at="2026-01-01T00:00+00"),
     raises("22023", "p_expires_at", "future")),
    ("nor is yesterday", [free], ask.add_credits("u", 1, expires_at="2025-12-31T00:00+00"),
     raises("22023", "p_expires_at", "future")),
    ("nor the future of the clock alone", [at("2026-02-10T12:00"), free, at("2026-01-01")],
     ask.add_credits("u", 1, expires_at="2026-01-31T00:00+00"),
     raises("22023", "p_expires_at", "future", "2026-02-10")),
    ("nor another zone's tomorrow", [], ask.add_credits("u", 1, expires_at="2026-01-01T01:00+02"),
     raises("22023", "p_expires_at", "future")),
    ("nor what is past for the account", [at("2026-01-05"), free, at("2026-01-01")], lot(1, "04"),
     raises("22023", "p_expires_at", "future")),
    ("never is told by leaving it out", [], ask.add_credits("u", 1, expires_at="infinity"),
     raises("22023", "p_expires_at")),
    ("nor has it ever been", [], ask.add_credits("u", 1, expires_at="-infinity"), raises("22023", "p_expires_at")),
    ("a debt is paid first", debt, until_10, remain(70, amount=100, new_balance=70)),
    ("a larger debt takes all", debt, lot(20, "10"), remain(new_balance=-10)),
    ("an equal one too", debt, lot(30, "10"), remain(new_balance=0)),
    ("what paid a debt does not expire", [*debt, until_10, at("2026-01-10")], balance, reads(balance=0)),
    ("a credit limit is no debt", [ask.set_credit_limit("u", 50)], until_10, remain(100)),
    ("a repeated key adds no lot, also when it has expired", [lot(9, "10", key="k"), at("2026-01-11")],
     lot(9, "10", key="k"), replays(new_balance=9)),
    ("the same moment in another zone", [lot(9, "10", key="k")],
     ask.add_credits("u", 9, expires_at="2026-01-10T02:00+02", key="k"), remain(9, idempotent=True)),
    ("another expiry under the key is the same request", [lot(9, "10", key="k")], lot(9, "11", key="k"),
     remain(9, idempotent=True)),
    ("none under the key too", [lot(9, "10", key="k")], ask.add_credits("u", 9, key="k"), remain(9, idempotent=True)),
    ("and one where there was none", [ask.add_credits("u", 9, key="k")], lot(9, "10", key="k"),
     remain(idempotent=True)),
    ("another amount is not", [lot(9, "10", key="k")], lot(8, "10", key="k"), refuses("idempotency_conflict")),
    ("the largest", [], lot(MOST, "10"), remain(MOST)),
    ("it is recorded", [lot(9, "10", type="promotion")], ask.get_transaction("@grant"),
     reads(type="promotion", amount=9, expires_at=datetime(2026, 1, 10, tzinfo=UTC))),
)
def test_credits_that_expire(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("the soonest first", [], charge(30), remain(10, 30, balance_after=90)),
    ("then the next", [], charge(50), remain(0, 20)),
    ("then those that never expire", [], charge(100), remain(0, 0, balance_after=20)),
    ("to the last", [], charge(120), remain(0, 0, balance_after=0)),
    ("by expiry, not by age", [lot(5, "05")], charge(10), remain(0, 35, 30)),
    ("of equal expiry the oldest", [lot(5, "10"), lot(6, "10")], charge(42), remain(0, 3, 6, 30)),
    ("a usage", [], ask.deduct("u", costs("30.9")), remain(10, 30, amount=-30)),
    ("a job", [], ask.deduct_fixed("u", "report"), remain(33, 30)),
    ("nothing burns nothing", [], charge(0), remain(40, 30)),
    ("a hold burns nothing", [], hold(60), remain(40, 30)),
    ("its settlement does", [hold(60)], settle(50), remain(0, 20)),
    ("a part of it too", [hold(60)], settle(50, final=False), remain(0, 20)),
    ("a settlement beyond it too", [hold(20)], settle(80), remain(0, 0)),
    ("an allowance burns before all", [prices(min_balance=0, plans={"p": {"id": "p", "name": "P",
     "free_allowance": 25}}), ask.set_user_plan("u", "p")], charge(30), remain(35, 30, allowance_used=25)),
    ("a removal burns too", [], ask.remove_credits("u", 50), remain(0, 20, new_balance=70)),
    ("into the credit limit", [ask.set_credit_limit("u", 30)], charge(150), remain(0, 0, balance_after=-30)),
    ("into a debt", [], ask.remove_credits("u", 150), remain(0, 0, new_balance=-30)),
    ("a replay burns nothing", [charge(30, key="k")], charge(30, key="k"), remain(10, 30, idempotent=True)),
)
def test_what_burns_first(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [free, lot(40, "10"), lot(30, "20"), *given], call, check)


@table(
    ("there to the last moment", [at("2026-01-09T23:59:59.999999")], balance, reads(balance=250, available=250)),
    ("then gone, though nothing has recorded it", [at("2026-01-10")], balance,
     reads(balance=150, available=150, reserved=0, revision=3)),
    ("then the next", [at("2026-01-20")], balance, reads(balance=50, available=50)),
    ("what was burnt cannot expire", [charge(60), at("2026-01-10")], balance, reads(balance=150)),
    ("nor what was all burnt", [charge(130), at("2026-01-20")], balance, reads(balance=50)),
    ("a charge does not spend it", [at("2026-01-20")], charge(51), refuses("insufficient_credits", balance_after=50)),
    ("but what is left", [at("2026-01-20")], charge(50), remain(0, 0, balance_after=0)),
    ("nor does a usage", [at("2026-01-20")], ask.deduct("u", costs(51)), poor),
    ("nor a hold", [at("2026-01-20")], ask.reserve_credits("u", 51), refuses("insufficient_credits", balance=50)),
    ("nor an extension", [hold(40), at("2026-01-20")], ask.extend_reservation("@hold", 51, user_id="u"), poor),
    ("a lifetime is not shortened", [lot(9, "05", type="purchase"), at("2026-01-30")], balance,
     reads(balance=50, lifetime_purchased=9)),
    ("the past knew it", [at("2026-01-12")], ask.get_balance("u", "2026-01-09T00:00+00"), reads(balance=250)),
    ("to the last moment", [at("2026-01-12")], ask.get_balance("u", "2026-01-09T23:59:59.999999+00"),
     reads(balance=250)),
    ("and the moment it was gone", [at("2026-01-12")], ask.get_balance("u", "2026-01-10T00:00+00"), reads(balance=150)),
    ("though it was recorded later", [at("2026-01-13"), charge(1)], ask.get_balance("u", "2026-01-12T00:00+00"),
     reads(balance=150)),
    ("so that the record changes nothing", [at("2026-01-13"), charge(1)], ask.get_balance("u", "2026-01-09T00:00+00"),
     reads(balance=250)),
    ("the future knows what will be gone", [], ask.get_balance("u", "2026-01-10T00:00+00"), reads(balance=150)),
    ("and later", [at("2026-01-15")], ask.get_balance("u", "2026-01-20T00:00+00"), reads(balance=50)),
    ("and what a charge leaves to go", [charge(130)], ask.get_balance("u", "2026-02-01T00:00+00"), reads(balance=50)),
    ("a replay records nothing", [charge(1, key="k"), at("2026-01-10")], charge(1, key="k"), replays()),
    ("nor does a refusal", [at("2026-01-10")], charge(151), poor),
    ("added credits come after it", [at("2026-01-20")], ask.add_credits("u", 5), remain(0, 0, new_balance=55)),
    ("as long as it is there it pays", [at("2026-01-09T23:59:59"), charge(250)], balance, reads(balance=0)),
)
def test_when_they_expire(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [free, until_10, until_20, *given], call, check)


# What holds keep: 100 credits until the 10th, 60 of them held on the 9th, and on the 10th …


@table(
    ("the rest expires", [], balance, reads(balance=60, reserved=60, available=0)),
    ("what is kept can be charged", [], settle(60), remain(0, balance_after=0, shortfall=0, warnings=[])),
    ("in parts", [settle(20, final=False)], balance, reads(balance=40, reserved=40, available=0)),
    ("to the last", [settle(20, final=False)], settle(40), remain(0, balance_after=0, shortfall=0)),
    ("what the settlement leaves expires", [settle(50)], balance, reads(balance=0, reserved=0, available=0)),
    ("what the release leaves too", [ask.release_reservation("@hold")], balance, reads(balance=0, reserved=0)),
    ("and what its expiry leaves", [at("2026-02-08")], balance, reads(balance=0, reserved=0)),
    ("not a moment before", [at("2026-02-07T23:59:59")], balance, reads(balance=60, reserved=60)),
    ("an expired hold has nothing kept", [at("2026-02-08")], settle(60),
     gives(balance_after=-60, shortfall=60, warnings=["reservation_expired"])),
    ("extended it keeps on", [at("2026-02-07"), ask.extend_reservation("@hold", ttl=MONTH), at("2026-02-08")],
     balance, reads(balance=60)),
    ("others may not spend it", [], charge(1), poor),
    ("others may not hold it", [], ask.reserve_credits("u", 1), poor),
    ("it may not hold more", [], ask.extend_reservation("@hold", 1, user_id="u"), poor),
    ("beyond the hold there is nothing", [], settle(80), remain(0, balance_after=-20, shortfall=20)),
    ("beyond the hold there are others", [free], settle(80), remain(0, balance_after=30, shortfall=0)),
    ("others are spent and it is kept", [free], charge(50), remain(60, balance_after=60)),
    ("to the last", [free, charge(50)], charge(1), poor),
    ("and it expires after all", [free, charge(50), ask.release_reservation("@hold")], balance, reads(balance=0)),
    ("a later hold does not burn it", [free, hold(50)], settle(50, "@hold2"), remain(60, balance_after=60)),
    ("not even where it ends in debt", [free, hold(50)], settle(70, "@hold2"),
     remain(60, balance_after=40, shortfall=20)),
    ("a debt is what the balance is without it", [free, hold(50), settle(70, "@hold2")], lot(50, "20"),
     remain(60, 30, new_balance=90)),
    ("which stays when it expires", [free, hold(50), settle(70, "@hold2"), ask.release_reservation("@hold1")], balance,
     reads(balance=-20)),
    ("a removal leaves it alone", [], ask.remove_credits("u", 60), remain(60, new_balance=0)),
    ("so that its expiry takes the balance below zero", [ask.remove_credits("u", 60),
     ask.release_reservation("@hold")], balance, reads(balance=-60)),
    ("what is held more is not kept more", [free, ask.extend_reservation("@hold", 30)], settle(90),
     remain(0, balance_after=20)),
    ("a refund of it lives for 720 hours more", [settle(60), ask.refund_credits("@charge")], balance,
     reads(balance=60, available=60)),
    ("to the hour", [settle(60), ask.refund_credits("@charge"), at("2026-02-08T23:59:59")], balance,
     reads(balance=60)),
    ("not longer", [settle(60), ask.refund_credits("@charge"), at("2026-02-09")], balance, reads(balance=0)),
    ("a dry run tells what is not kept", [], ask.sweep_expired_credits(True),
     reads(expired_count=1, expired_amount=40, dry_run=True)),
    ("the sweep takes it", [ask.sweep_expired_credits()], balance, reads(balance=60, reserved=60)),
    ("and no more", [ask.sweep_expired_credits()], ask.sweep_expired_credits(),
     gives(expired_count=0, expired_amount=0)),
    ("the rest once the hold has ended", [ask.sweep_expired_credits(), ask.release_reservation("@hold")],
     ask.sweep_expired_credits(), gives(expired_count=1, expired_amount=60)),
    ("also where it has expired", [ask.sweep_expired_credits(), at("2026-02-08")],
     ask.sweep_expired_credits(), gives(expired_count=1, expired_amount=60)),
)
def test_what_a_hold_keeps(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [until_10, at("2026-01-09"), hold(60), at("2026-01-10"), *given], call, check)


# 50 credits until the 10th, 50 until the 12th.


@table(
    ("what burns before the expiry needs no keeping",
     [at("2026-01-09"), hold(60), charge(40), at("2026-01-10")], balance, reads(balance=60, reserved=60)),
    ("a due lot keeps all it can", [at("2026-01-09"), hold(60), at("2026-01-11")], balance,
     reads(balance=100, reserved=60, available=40)),
    ("the next one the rest", [at("2026-01-09"), hold(60), at("2026-01-12")], balance, reads(balance=60, available=0)),
    ("which it is what expires of", [at("2026-01-09"), hold(60), at("2026-01-12")], ask.sweep_expired_credits(),
     remain(50, 10, expired_count=1, expired_amount=40)),
    ("in between others burn the next", [at("2026-01-09"), hold(60), at("2026-01-11")], charge(40),
     remain(50, 10, balance_after=60)),
    ("and no more", [at("2026-01-09"), hold(60), at("2026-01-11")], charge(41), poor),
    ("what is kept is settled soonest first", [at("2026-01-09"), hold(60), at("2026-01-12")], settle(55),
     remain(0, 5, balance_after=5)),
    ("a later hold keeps of the next", [at("2026-01-09"), hold(60), at("2026-01-11"), hold(30), at("2026-01-12")],
     balance, reads(balance=90, reserved=90)),
    ("holds taken after an expiry keep nothing of it",
     [at("2026-01-09"), hold(30), at("2026-01-11"), hold(30), at("2026-01-12")], balance,
     reads(balance=60, reserved=60)),
    ("nor burn it", [at("2026-01-09"), hold(30), at("2026-01-11"), hold(30), at("2026-01-12")],
     settle(30, "@hold2"), remain(30, 0, balance_after=30)),
    ("not even beyond what they held",
     [at("2026-01-09"), hold(30), at("2026-01-11"), hold(30), at("2026-01-12")], settle(40, "@hold2"),
     remain(30, 0, balance_after=20, shortfall=10)),
    ("the first burns the soonest", [at("2026-01-09"), hold(40), at("2026-01-11"), hold(30), at("2026-01-12")],
     settle(40), remain(0, 30, balance_after=30)),
    ("two holds keep together what they held",
     [at("2026-01-09"), hold(20), hold(20), at("2026-01-12")], balance, reads(balance=40, reserved=40)),
    ("the one burns at most what it held of it",
     [at("2026-01-09"), hold(20), hold(20), at("2026-01-12")], settle(25),
     remain(20, 0, balance_after=15, shortfall=5)),
    ("so that the other's is there",
     [at("2026-01-09"), hold(20), hold(20), at("2026-01-12"), settle(25)], settle(20, "@hold2"),
     remain(0, 0, balance_after=-5, shortfall=0)),
    ("where one ends its part expires",
     [at("2026-01-09"), hold(20), hold(20), at("2026-01-12"), ask.release_reservation("@hold1")], balance,
     reads(balance=20, reserved=20)),
    ("a hold of nothing keeps nothing", [at("2026-01-09"), hold(0), at("2026-01-12")], balance, reads(balance=0)),
    ("a hold keeps all that it holds, whatever an allowance will pay",
     [prices(min_balance=0, plans={"p": {"id": "p", "name": "P", "free_allowance": 10}}), ask.set_user_plan("u", "p"),
     at("2026-01-09"), hold(30), at("2026-01-12")], balance, reads(balance=30, reserved=30, available=10)),
    ("which leaves what it paid to expire",
     [prices(min_balance=0, plans={"p": {"id": "p", "name": "P", "free_allowance": 10}}), ask.set_user_plan("u", "p"),
     at("2026-01-09"), hold(30), at("2026-01-12"), settle(30)], balance, reads(balance=0, reserved=0)),
)
def test_what_several_keep(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [lot(50, "10"), lot(50, "12"), *given], call, check)


# Refunds: 120 credits, 30 of them until the 10th, 40 until the 20th; 100 are charged.


@table(
    ("what never expires comes back first", [], ask.refund_credits("@charge", 30),
     remain(0, 0, amount=30, new_balance=50)),
    ("then the last lot", [], ask.refund_credits("@charge", 50), remain(0, 20)),
    ("then the one before", [], ask.refund_credits("@charge", 80), remain(10, 40)),
    ("then all is as it was", [], ask.refund_credits("@charge"), remain(30, 40, new_balance=120)),
    ("in parts", [ask.refund_credits("@charge", 50)], ask.refund_credits("@charge", 30), remain(10, 40)),
    ("in smaller parts", [ask.refund_credits("@charge", 29), ask.refund_credits("@charge", 2),
     ask.refund_credits("@charge", 40)], ask.refund_credits("@charge", 28), remain(29, 40)),
    ("what came back burns again", [ask.refund_credits("@charge")], charge(80), remain(0, 0)),
    ("what came back expires", [ask.refund_credits("@charge"), at("2026-01-10")], balance, reads(balance=90)),
    ("of a lot that is due it comes as a new one", [at("2026-01-15")], ask.refund_credits("@charge"),
     remain(0, 40, 30, amount=100, new_balance=120)),
    ("not of what was in no lot", [at("2026-01-15")], ask.refund_credits("@charge", 30), remain(0, 0)),
    ("nor of one that is not due", [at("2026-01-15")], ask.refund_credits("@charge", 70), remain(0, 40)),
    ("of two that are due it is one", [at("2026-01-20")], ask.refund_credits("@charge"), remain(0, 0, 70)),
    ("of 720 hours", [at("2026-01-15T12:00"), ask.refund_credits("@charge"), at("2026-02-14T11:59:59.999999")],
     balance, reads(balance=80)),
    ("and no more", [at("2026-01-15T12:00"), ask.refund_credits("@charge"), at("2026-02-14T12:00")], balance,
     reads(balance=50)),
    ("a lot that is due as it comes back", [at("2026-01-10")], ask.refund_credits("@charge"), remain(0, 40, 30)),
    ("a debt is paid first", [ask.remove_credits("u", 60)], ask.refund_credits("@charge", 30),
     remain(0, 0, new_balance=-10)),
    ("the last lot has what is left", [ask.remove_credits("u", 60)], ask.refund_credits("@charge", 50),
     remain(0, 10, new_balance=10)),
    ("never more than that", [ask.remove_credits("u", 60)], ask.refund_credits("@charge"),
     remain(20, 40, new_balance=60)),
    ("nor what was in it", [ask.remove_credits("u", 25)], ask.refund_credits("@charge"),
     remain(30, 40, new_balance=95)),
    ("in parts the same", [ask.remove_credits("u", 60), ask.refund_credits("@charge", 30)],
     ask.refund_credits("@charge", 20), remain(0, 10, new_balance=10)),
    ("in other parts too", [ask.remove_credits("u", 100), ask.refund_credits("@charge", 80)],
     ask.refund_credits("@charge"), remain(0, 20, new_balance=20)),
    ("which is what it gives as a whole", [ask.remove_credits("u", 100)], ask.refund_credits("@charge"),
     remain(0, 20, new_balance=20)),
    ("a second charge has its own", [ask.refund_credits("@charge1"), charge(35)],
     ask.refund_credits("@charge2"), remain(30, 40)),
    ("a repeated key gives nothing to a lot", [ask.refund_credits("@charge1", 50, key="k")],
     ask.refund_credits("@charge1", 50, key="k"), remain(0, 20, idempotent=True)),
    ("more than was charged", [], ask.refund_credits("@charge", 101, user_id="u"),
     refuses("refund_exceeds_original")),
)
def test_refunds_into_lots(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [lot(30, "10"), free, lot(40, "20"), charge(100), *given], call, check)


@pytest.mark.parametrize("parts", [[60], [30, 30], [1] * 60, [45, 1, 14]])
def test_a_due_lot_of_a_grant_partly_taken_back_is_renewed_once(ledger: Ledger, parts: list[int]) -> None:
    remove = ask.remove_credits("u", 80, transaction_id="@grant3")
    for step in (free, free, until_10, charge(60), remove, at("2026-01-12")):
        step(ledger)
    for part in parts:
        ask.refund_credits("@charge", part)(ledger)
    query = "select sum(remainder), max(expires_at) > min(created_at) from ducto_private.credit_lots"
    assert ledger.sql(query) == [(20, True)]


@pytest.mark.parametrize(
    ("corruption", "invariant"),
    [
        ("elsewhere = 9, renewed = 9 where renewed = 10", "a refund's lot is what its entries renewed"),
        ("elsewhere = 1 where amount = -30", "lot entries stay within their row"),
        ("elsewhere = 1 where amount = 40", "lots get back no more than a charge took, last one first"),
        ("amount = 39 where amount = 40", "lots get back no more than a charge took, last one first"),
        ("amount = 39 where amount = 40", "a lot's remainder is its amount and its entries"),
    ],
)
def test_verify_ledger_reads_what_lots_gave_and_got(ledger: Ledger, corruption: str, invariant: str) -> None:
    for step in (lot(30, "10"), free, lot(40, "20"), charge(100), at("2026-01-12"), ask.refund_credits("@charge", 80)):
        step(ledger)
    assert ledger.violations() == []
    with ledger.conn.transaction(force_rollback=True):
        ledger.sql("set local session_replication_role = replica")
        ledger.sql(f"update ducto_private.lot_entries set {corruption}")
        assert invariant in {row["invariant"] for row in ledger.violations()}


@table(
    ("from its own lot", [until_10, free], ask.remove_credits("u", 30, transaction_id="@grant1"),
     remain(70, new_balance=120)),
    ("though another expires sooner", [until_20, lot(50, "10")],
     ask.remove_credits("u", 30, transaction_id="@grant1"), remain(50, 70, new_balance=120)),
    ("without its grant it does not", [until_20, lot(50, "10")], ask.remove_credits("u", 30),
     remain(20, 100, new_balance=120)),
    ("the rest from others", [until_20, charge(60), lot(50, "10")],
     ask.remove_credits("u", 70, transaction_id="@grant1"), remain(20, 0, new_balance=20)),
    ("then from those that never expire", [until_10, charge(60), free],
     ask.remove_credits("u", 70, transaction_id="@grant1"), remain(0, new_balance=20)),
    ("then into debt", [until_10, charge(60)], ask.remove_credits("u", 70, transaction_id="@grant1"),
     remain(0, new_balance=-30)),
    ("never more than the grant", [until_10, free], ask.remove_credits("u", 101, transaction_id="@grant1"),
     refuses("exceeds_grant")),
    ("less what expired of it", [until_10, charge(60), at("2026-01-10"), free],
     ask.remove_credits("u", 61, transaction_id="@grant1"), refuses("exceeds_grant")),
    ("to the credit", [until_10, charge(60), at("2026-01-10"), free],
     ask.remove_credits("u", 60, transaction_id="@grant1"), remain(0, new_balance=-10)),
    ("recorded or not", [until_10, charge(60), free, at("2026-01-10")],
     ask.remove_credits("u", 61, transaction_id="@grant1"), refuses("exceeds_grant")),
    ("to the credit not recorded", [until_10, charge(60), free, at("2026-01-10")],
     ask.remove_credits("u", 60, transaction_id="@grant1"), remain(0, new_balance=-10)),
    ("nothing of what is gone", [until_10, at("2026-01-10")], ask.remove_credits("u", 1, transaction_id="@grant1"),
     refuses("exceeds_grant")),
    ("not even with what was removed", [until_10, charge(60), ask.remove_credits("u", 30, transaction_id="@grant1"),
     at("2026-01-10"), free], ask.remove_credits("u", 61, transaction_id="@grant1"), refuses("exceeds_grant")),
    ("10 expired and 30 are removed", [until_10, charge(60), ask.remove_credits("u", 30, transaction_id="@grant1"),
     at("2026-01-10"), free], ask.remove_credits("u", 60, transaction_id="@grant1"), remain(0, new_balance=-10)),
    ("what paid a debt is removed too", [*debt, until_10], ask.remove_credits("u", 100, transaction_id="@grant3"),
     remain(0, new_balance=-30)),
    ("an expiry is no grant", [until_10, at("2026-01-10"), ask.sweep_expired_credits()],
     ask.remove_credits("u", 1, transaction_id="@expiry"), refuses("transaction_not_found")),
)
def test_taking_a_lot_back(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    def note_expiry(ledger: Ledger) -> None:
        found = ledger.sql("select transaction_id::text from ducto_private.transactions where type = 'expiry'")
        ledger.ids["expiry"] = [name for (name,) in found]

    tell(ledger, [*given, note_expiry], call, check)


# The sweep

several: list[Step] = [lot(10, "10", "a"), lot(20, "10", "b"), lot(30, "10", "c"), lot(40, "20", "a")]
NOTHING = {"expired_count": 0, "expired_amount": 0}


@table(
    ("nothing is due", [until_10], ask.sweep_expired_credits(), reads(**NOTHING, dry_run=False)),
    ("nobody is there", [], ask.sweep_expired_credits(), reads(**NOTHING)),
    ("one lot", [until_10, at("2026-01-10")], ask.sweep_expired_credits(),
     remain(0, expired_count=1, expired_amount=100, dry_run=False)),
    ("it is recorded once", [until_10, at("2026-01-10"), ask.sweep_expired_credits()], ask.sweep_expired_credits(),
     reads(**NOTHING)),
    ("what is left of it", [until_10, charge(60), at("2026-01-10")], ask.sweep_expired_credits(),
     gives(expired_count=1, expired_amount=40)),
    ("nothing of what was burnt", [until_10, charge(100), ask.add_credits("u", 70), at("2026-01-10")],
     ask.sweep_expired_credits(), reads(**NOTHING)),
    ("nothing of what paid a debt", [*debt, lot(30, "10"), at("2026-01-10")], ask.sweep_expired_credits(),
     reads(**NOTHING)),
    ("nothing that a change has recorded", [until_10, at("2026-01-10"), free], ask.sweep_expired_credits(),
     reads(**NOTHING)),
    ("two lots of one account", [until_10, lot(5, "05"), at("2026-01-10")], ask.sweep_expired_credits(),
     remain(0, 0, expired_count=2, expired_amount=105)),
    ("of all accounts", [*several, at("2026-01-10")], ask.sweep_expired_credits(),
     gives(expired_count=3, expired_amount=60)),
    ("later the others", [*several, at("2026-01-10"), ask.sweep_expired_credits(), at("2026-01-20")],
     ask.sweep_expired_credits(), gives(expired_count=1, expired_amount=40)),
    ("a dry run records nothing", [*several, at("2026-01-20")], ask.sweep_expired_credits(True),
     reads(expired_count=4, expired_amount=100, dry_run=True)),
    ("and has no limit", [*several, at("2026-01-20")], ask.sweep_expired_credits(True, 1),
     reads(expired_count=4, expired_amount=100)),
    ("nulls are defaults", [*several, at("2026-01-20")], ask.sweep_expired_credits(None, None),
     gives(expired_count=4, expired_amount=100, dry_run=False)),
    ("a team's", [team("crew", "ann"), lot(10, "10", "crew"), at("2026-01-10")], ask.sweep_expired_credits(),
     gives(expired_count=1, expired_amount=10)),
    ("accounts that keep all do not use up the limit",
     [lot(10, "10", "a"), ask.reserve_credits("a", 10, ttl=MONTH), lot(20, "10", "b"), at("2026-01-10")],
     ask.sweep_expired_credits(False, 1), gives(expired_count=1, expired_amount=20)),
    ("no accounts", [], ask.sweep_expired_credits(False, 0), raises("22023", "p_limit")),
    ("fewer than none", [], ask.sweep_expired_credits(True, -1), raises("22023", "p_limit")),
)
def test_sweep_expired_credits(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_sweep_takes_so_many_accounts_and_ends(ledger: Ledger) -> None:
    for step in (*several, at("2026-01-20")):
        step(ledger)
    swept = []
    while answer := ledger.one(ask.sweep_expired_credits(False, 1))["expired_count"]:
        swept.append(answer)
    assert sorted(swept) == [1, 1, 2]
    lists({"type": "expiry", "amount": -40}, {"type": "expiry", "amount": -10}, {"type": "adjustment"}, {"amount": 10})(
        ledger, ask.list_transactions("a")
    )


def test_a_sweep_needs_no_prices(conn: Connection, clock: Clock) -> None:
    ledger = Ledger(conn, clock)
    clock.set("2026-01-01")
    for step in (until_10, free, at("2026-01-10")):
        step(ledger)
    reads(balance=50)(ledger, balance)
    gives(expired_count=1, expired_amount=100)(ledger, ask.sweep_expired_credits())
    reads(balance=50)(ledger, balance)
    assert ledger.violations() == []


def test_an_expiry_is_recorded_before_what_recorded_it(ledger: Ledger) -> None:
    plans = {"p": {"id": "p", "name": "P"}}
    ledger.publish(min_balance=0, plans=plans)
    calls: list[Call] = [
        charge(1),
        ask.deduct("u", costs(1)),
        ask.deduct_fixed("u", "report"),
        settle(1),
        settle(1, final=False),
        ask.add_credits("u", 1),
        lot(1, "30"),
        ask.remove_credits("u", 1),
        ask.refund_credits("@charge1", 1),
        ask.reserve_credits("u", 1),
        ask.extend_reservation("@hold1", 1),
        ask.release_reservation("@hold1"),
        ask.set_credit_limit("u", 1),
        ask.set_spend_cap("u", 1),
        ask.remove_spend_cap("u", "monthly"),
        ask.set_user_plan("u", "p"),
        ask.deduct_batch([{"user_id": "u", "amount": 1}]),
    ]
    for call in calls:
        with rolled_back(ledger) as told:
            for step in (
                free,
                until_10,
                ask.set_spend_cap("u", 500, "monthly"),
                charge(7),
                hold(0),
                at("2026-01-10"),
                but(poor, charge(51)),
            ):
                step(told)
            assert told.sql("select max(seq), max(revision) from ducto_private.transactions") == [(3, 4)]
            gives()(told, call)
            expiry, *more = told.run(ask.list_transactions("u"))[-4::-1]
            assert (expiry["type"], expiry["amount"], expiry["balance_after"]) == ("expiry", -93, 50), call
            assert [row["balance_after"] - row["amount"] for row in more] == [50] * len(more), call
            reads(balance=50 + sum(row["amount"] for row in more))(told, balance)


def test_an_expiry_tells_its_grant(ledger: Ledger) -> None:
    for step in (free, lot(9, "10", type="promotion", metadata={"a": 1}), at("2026-01-12"), charge(1)):
        step(ledger)
    expiry = ledger.run(ask.list_transactions("u", type="expiry"))
    assert len(expiry) == 1
    expected: Row = {
        "amount": -9,
        "balance_after": 50,
        "seq": 3,
        "refers_to": "@grant2",
        "expires_at": datetime(2026, 1, 10, tzinfo=UTC),
        "occurred_at": datetime(2026, 1, 10, tzinfo=UTC),
        "created_at": datetime(2026, 1, 12, tzinfo=UTC),
        "cost": None,
        "usage": None,
        "metadata": None,
        "idempotency_key": None,
        "allowance_used": 0,
    }
    reads(**expected)(ledger, ask.get_transaction(expiry[0]["transaction_id"]))
    refuses("not_refundable")(ledger, ask.refund_credits(expiry[0]["transaction_id"], user_id="u"))


# 100 credits until the 10th, 20 until the 12th; 30 are held until the 11th, 40 until the 15th, and 10 for longer.
in_steps: list[Step] = [
    until_10,
    lot(20, "12"),
    ask.reserve_credits("u", 30, ttl=10 * 86400),
    ask.reserve_credits("u", 40, ttl=14 * 86400),
    ask.reserve_credits("u", 10, ttl=MONTH),
]
TEN, ELEVEN, TWELVE, FIFTEEN = (datetime(2026, 1, day, tzinfo=UTC) for day in (10, 11, 12, 15))
STEPS: list[tuple[list[Step], list[tuple[int, datetime]]]] = [
    ([at("2026-01-20")], [(-20, TEN), (-30, ELEVEN), (-20, TWELVE), (-40, FIFTEEN)]),
    ([at("2026-01-11"), free, at("2026-01-20")], [(-20, TEN), (-30, ELEVEN), (-20, TWELVE), (-40, FIFTEEN)]),
    ([at("2026-01-11"), ask.release_reservation("@hold2"), at("2026-01-20")],
     [(-20, TEN), (-30, ELEVEN), (-40, ELEVEN), (-20, TWELVE)]),
    ([at("2026-01-15"), settle(5, "@hold3"), at("2026-01-20")],
     [(-20, TEN), (-30, ELEVEN), (-20, TWELVE), (-40, FIFTEEN), (-5, FIFTEEN)]),
    ([at("2026-01-15"), settle(4, "@hold3", final=False), at("2026-01-20")],
     [(-20, TEN), (-30, ELEVEN), (-20, TWELVE), (-40, FIFTEEN)]),
    ([at("2026-01-11"), ask.extend_reservation("@hold2", ttl=MONTH), at("2026-01-20")],
     [(-20, TEN), (-30, ELEVEN), (-20, TWELVE)]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), STEPS)
def test_an_expiry_is_dated_when_it_was_due(
    ledger: Ledger, given: list[Step], expected: list[tuple[int, datetime]]
) -> None:
    """Each lot once for the moment at which it, or what a hold had kept of it, was due, whenever that is recorded."""
    for step in (*in_steps, *given):
        step(ledger)
    times = [time for _, due in expected for time in (due - timedelta(microseconds=1), due)]

    def read() -> list[int]:
        return [ledger.one(ask.get_balance("u", time))["balance"] for time in times]

    before = read()
    ask.sweep_expired_credits()(ledger)
    rows = ledger.run(ask.list_transactions("u", type="expiry"))[::-1]
    assert [(row["amount"], row["occurred_at"]) for row in rows] == expected
    assert read() == before
    events = [-row["amount"] for _, row in ledger.events("lot_expired")]
    assert sorted(events) == sorted(amount for amount, _ in expected)


def test_a_batch_spends_nothing_that_a_settlement_in_it_let_go(ledger: Ledger) -> None:
    for step in (until_10, at("2026-01-09"), hold(60), at("2026-01-10")):
        step(ledger)
    settled, charged = ledger.run(
        ask.deduct_batch([{"user_id": "u", "amount": 0, "reservation_id": "@hold"}, {"user_id": "u", "amount": 60}])
    )
    assert settled["error"] is None
    assert (charged["error"], charged["balance_after"]) == ("insufficient_credits", 0)
    reads(balance=0)(ledger, balance)


def test_a_batch_of_many_settlements_beside_kept_credits(ledger: Ledger) -> None:
    """Each lets go what had been kept for it, and the rest of the batch is asked after that."""
    for step in (until_10, at("2026-01-09")):
        step(ledger)
    holds = [ledger.one(ask.reserve_credits("u", 1, ttl=2592000))["reservation_id"] for _ in range(100)]
    at("2026-01-10")(ledger)
    elements = [{"user_id": "u", "amount": number % 2, "reservation_id": hold} for number, hold in enumerate(holds)]
    found = ledger.run(ask.deduct_batch(elements * 12))
    assert [row["error"] for row in found] == [None] * 1200
    assert [row["idempotent"] for row in found] == [False] * 100 + [True] * 1100
    reads(balance=0, reserved=0)(ledger, balance)
    assert ledger.violations() == []


def test_an_expired_lot_is_an_event_of_its_own(ledger: Ledger) -> None:
    for step in (
        until_10,
        lot(7, "12"),
        at("2026-01-09"),
        hold(60),
        at("2026-01-10"),
        ask.sweep_expired_credits(),
        ask.sweep_expired_credits(),
        but(poor, charge(100)),
        at("2026-01-12"),
        free,
        later(hours=1),
        ask.release_reservation("@hold"),
        later(hours=1),
        ask.sweep_expired_credits(),
    ):
        step(ledger)
    events = [row for _, row in ledger.events("lot_expired")]
    assert [row["amount"] for row in events] == [40, 7, 60]
    assert [row["transaction_id"] for row in events] == ledger.named(["@grant1", "@grant2", "@grant1"])
    assert len({row["lot_id"] for row in events}) == 2
    assert [datetime.fromisoformat(row["expires_at"]).astimezone(UTC).day for row in events] == [10, 12, 10]


def test_thousands_of_lots(arena: Arena) -> None:
    """Each of another hour; a charge burns the soonest, and a day later what is left of the day before has expired."""
    ledger = arena.ledger
    # Each in a transaction of its own: 3000 versions of one row in a single one take many times as long.
    ledger.sql(
        """
        do $$
        begin
          for h in 1..3000 loop
            perform ducto.add_credits(
              'u', 1, p_expires_at => timestamptz '2026-01-01T00:00+00' + h * interval '1 hour');
            commit;
          end loop;
        end
        $$
        """
    )
    gives(balance_after=2990)(ledger, charge(10))
    at("2026-01-02")(ledger)
    reads(balance=3000 - 24)(ledger, balance)
    gives(expired_count=14, expired_amount=14)(ledger, ask.sweep_expired_credits())
    gives(balance_after=0)(ledger, charge(2976))
    refuses("insufficient_credits")(ledger, charge(1))
    gives(new_balance=2976)(ledger, ask.refund_credits("@charge"))
    at("2026-01-03")(ledger)
    reads(balance=3000 - 48)(ledger, balance)
    ledger.sql("analyze")
    arena.sound()


def test_what_is_kept_for_a_hold_is_not_taken_back_elsewhere(ledger: Ledger) -> None:
    for step in (
        ask.add_credits("u", 50, "promotion", expires_at="2026-01-02T00:00+00"),
        ask.add_credits("u", 100),
        ask.reserve_credits("u", 50, ttl=1000000),
        at("2026-01-03"),
        but(refuses("exceeds_grant"), ask.remove_credits("u", 50, transaction_id="@grant1")),
        ask.release_reservation("@hold"),
    ):
        step(ledger)
    reads(balance=100)(ledger, balance)
    refuses("exceeds_grant")(ledger, ask.remove_credits("u", 1, transaction_id="@grant1"))
    assert ledger.violations() == []


def test_a_refund_does_not_refill_a_lot_whose_grant_was_taken_back(ledger: Ledger) -> None:
    for step in (
        ask.add_credits("u", 50, "promotion", expires_at="2026-02-02T00:00+00"),
        ask.add_credits("u", 100),
        charge(30),
        ask.remove_credits("u", 50, transaction_id="@grant1"),
        ask.refund_credits("@charge"),
    ):
        step(ledger)
    reads(balance=100)(ledger, balance)
    at("2026-02-03")(ledger)
    reads(balance=100)(ledger, balance)
    ask.add_credits("u", 1)(ledger)
    assert ledger.violations() == []


def test_views_read_an_account_at_its_own_time(ledger: Ledger) -> None:
    # The views' clock is the true one; the account is ahead of it.
    for step in (
        at("2099-01-01"),
        ask.add_credits("u", 50, expires_at="2099-01-02T00:00+00"),
        ask.reserve_credits("u", 50, ttl=1000000),
        at("2099-01-03"),
        ask.release_reservation("@hold"),
    ):
        step(ledger)
    reads(balance=0)(ledger, balance)
    assert ledger.sql("select balance from ducto_read.accounts where account_id = 'u'") == [(0,)]
    assert ledger.sql("select remainder from ducto_read.lots where account_id = 'u'") == [(0,)]


# Sessions that meet


@pytest.mark.parametrize("count", [4, 8])
def test_sweeps(arena: Arena, count: int) -> None:
    arena.given(ask.add_credits("u", 100, expires_at=str(arena.START + timedelta(days=1))), ask.add_credits("u", 200))
    arena.clock.advance(timedelta(days=2))
    answers = arena.meet(count, lambda _: ask.sweep_expired_credits())
    assert sum(row["expired_amount"] for row in answers) == 100
    assert sorted(row["expired_count"] for row in answers) == [0] * (count - 1) + [1]
    reads(balance=200)(arena.ledger, ask.get_balance("u"))
    assert len(arena.ledger.events("lot_expired")) == 1
    arena.sound()


def test_a_sweep_waits_for_nobody(arena: Arena) -> None:
    for user in ("a", "b", "c"):
        arena.given(
            ask.add_credits(user, 10, expires_at=str(arena.START + timedelta(days=1))), ask.add_credits(user, 5)
        )
    arena.clock.advance(timedelta(days=2))
    (busy,) = arena.sessions(1, autocommit=False)
    busy.one(ask.deduct_credits("b", 1))
    arena.ledger.conn.execute("set lock_timeout = '1s'")
    swept = arena.ledger.one(ask.sweep_expired_credits())
    assert (swept["expired_count"], swept["expired_amount"]) == (2, 20)
    busy.conn.rollback()
    swept = arena.ledger.one(ask.sweep_expired_credits())
    assert (swept["expired_count"], swept["expired_amount"]) == (1, 10)
    arena.sound()


def test_a_charge_waits_for_the_sweep_of_its_account(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 10, expires_at=str(arena.START + timedelta(days=1))), ask.add_credits("u", 5))
    arena.clock.advance(timedelta(days=2))
    (sweeper,), (other,) = arena.sessions(1, autocommit=False), arena.sessions(1)
    sweeper.one(ask.sweep_expired_credits())
    with blocked(arena.ledger.conn, other.conn, sweeper.conn, lambda m: m.deduct_credits("u", 6)) as waiting:
        sweeper.conn.commit()
        assert waiting.result(30).error == "insufficient_credits"
    reads(balance=5)(arena.ledger, ask.get_balance("u"))
    arena.sound()

"""The largest numbers: what would pass bigint is refused by name, and for one element of a batch alone."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    MOST,
    Ledger,
    Row,
    ask,
    gives,
    raises,
    reads,
    refuses,
)

from ducto_pg import CreditManager
from ducto_pg.errors import OutOfRangeError


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


# One element of a batch

PRICES: dict[str, Any] = {
    "models": {"m": "input_tokens * 0.25", "square": "input_tokens ** 2"},
    "min_balance": 0,
    "plans": {"free": {"id": "free", "name": "Free", "free_allowance": 40}},
}


@pytest.fixture
def owner(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(PRICES)
    return manager


def of(user: str, amount: int = 1, **more: Any) -> Row:
    return {"user_id": user, "amount": amount, **more}


class TestOutOfRange:
    """What would pass bigint is that element's error, and a sum over many is clamped: never 22003 for all."""

    @pytest.fixture
    def rich(self, owner: CreditManager) -> CreditManager:
        for user in ("a", "u", "z"):
            owner.add_credits(user, MOST).or_raise()
        owner.create_team("Team", MOST, team_id="t").or_raise()
        owner.add_team_member("t", "u").or_raise()
        return owner

    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("final", [True, False])
    @pytest.mark.parametrize("team", [None, "t"])
    def test_what_a_hold_charged(self, rich: CreditManager, place: int, final: bool, team: str | None) -> None:
        of_team = {"team_id": team} if team else {}
        taken = rich.reserve_team_credits(team, "u", 10) if team else rich.reserve_credits("u", 10)
        hold = {"reservation_id": taken.or_raise().reservation_id, **of_team}
        rich.deduct_batch([of("u", MOST - 3, final=False, **hold)])[0].or_raise()
        charges = [of("a"), of("z"), of("u", 2, **of_team)]
        charges.insert(place, of("u", 5, final=final, idempotency_key="k", **hold))
        answers = rich.deduct_batch(charges)
        assert [row.error for row in answers] == [
            "out_of_range" if number == place else None for number in range(len(charges))
        ]
        assert rich.get_reservation(taken.reservation_id).charged == MOST - 3
        settle = partial(rich.deduct_team_credits, team) if team else rich.deduct_credits
        with pytest.raises(OutOfRangeError, match="what the hold charged"):
            settle("u", 5, taken.reservation_id, final=final)
        # Not remembered: a smaller amount under its key is a first request.
        (end,) = rich.deduct_batch([of("u", 3, idempotency_key="k", **hold)])
        assert (end.error, end.idempotent) == (None, False)
        assert rich.verify_ledger() == []

    def test_a_balance_below(self, rich: CreditManager) -> None:
        holds = [rich.reserve_credits("u", 1).or_raise().reservation_id for _ in range(3)]
        answers = rich.deduct_batch(
            [
                of("u", MOST, reservation_id=holds[0]),
                of("a"),
                of("u", MOST, reservation_id=holds[1]),
                of("u", 1, reservation_id=holds[2]),
                of("z"),
            ]
        )
        assert [(row.error, row.balance_after) for row in answers] == [
            (None, 0),
            (None, MOST - 1),
            (None, -MOST),
            ("out_of_range", -MOST),
            (None, MOST - 1),
        ]
        assert rich.verify_ledger() == []

    def test_a_cost(self, rich: CreditManager) -> None:
        usage = {"model": "square", "input_tokens": 10**10}
        answers = rich.deduct_batch([of("a"), {"user_id": "u", "metrics": usage}, of("u"), of("z")])
        assert [row.error for row in answers] == [None, "out_of_range", None, None]

    @pytest.mark.parametrize("settles", [True, False])
    def test_a_great_amount_of_which_the_allowance_pays_some(self, rich: CreditManager, settles: bool) -> None:
        rich.set_user_plan("u", "free").or_raise()
        rich.deduct_credits("u", 5).or_raise()
        hold = {"reservation_id": rich.reserve_credits("u", 1).or_raise().reservation_id} if settles else {}
        answers = rich.deduct_batch([of("a"), of("u", MOST, **hold), of("z")])
        assert [row.error for row in answers] == [None, None, None]
        assert (answers[1].allowance_used, answers[1].balance_after) == (35, 35)
        assert rich.verify_ledger() == []

    def test_what_a_cap_counts(self, rich: CreditManager) -> None:
        rich.set_spend_cap("u", 100, action="warn").or_raise()
        rich.set_spend_cap("u", 100, "monthly", "m", action="warn").or_raise()
        for _ in range(2):
            answers = rich.deduct_batch([of("a"), of("u", MOST, model="m"), of("z")])
            assert [row.error for row in answers] == [None, None, None]
            rich.add_credits("u", MOST).or_raise()
        assert [cap.spent for cap in rich.list_spend_caps("u")] == [MOST, MOST]
        assert rich.check_spend_cap("u", "m", 1).current_spend == MOST
        assert rich.verify_ledger() == []

    @pytest.mark.parametrize("limit", [1, 2, 1000])
    def test_a_sweep(self, owner: CreditManager, clock: Clock, limit: int) -> None:
        clock.set("2026-06-01")
        for user in ("a", "b", "c"):
            for day, amount in ((2, MOST - 10), (3, 10)):
                owner.add_credits(user, amount, expires_at=datetime(2026, 6, day, tzinfo=UTC)).or_raise()
        clock.set("2026-06-04")
        dry = owner.sweep_expired_credits(dry_run=True)
        assert (dry.expired_count, dry.expired_amount) == (6, MOST)
        swept = []
        while (row := owner.sweep_expired_credits(limit=limit)).expired_count:
            swept.append((row.expired_count, row.expired_amount))
        assert swept == [(2 * min(limit, left), MOST) for left in range(3, 0, -limit)]
        assert owner.verify_ledger() == []

    @pytest.mark.parametrize("rolled_up", [False, True])
    def test_statistics(self, rich: CreditManager, rolled_up: bool) -> None:
        for user in ("a", "u", "z", "u"):
            charge = rich.deduct_credits(user, MOST, model="m").or_raise()
            rich.refund_credits(charge.transaction_id).or_raise()
        for _ in range(2):
            rich.deduct_team_credits("t", "u", MOST, model="m").or_raise()
            rich.add_credits("t", MOST).or_raise()
        assert [member.total_spent for member in rich.get_team_members("t")] == [MOST]
        if rolled_up:
            rich.rollup_usage()
        users = {row.user_id: (row.total_spend, row.refunded) for row in rich.spend_by_user()}
        assert users == dict.fromkeys("auz", (MOST, MOST))
        for sums in (rich.spend_by_model()[0], rich.daily_spend()[0]):
            assert (sums.total_spend, sums.refunded) == (MOST, MOST)
        assert {row.total_spend for row in rich.top_users()} == {MOST}
        stats = rich.aggregate_stats()
        assert (stats.total_credits_consumed, stats.refunded, stats.avg_daily_spend) == (MOST, MOST, MOST)
        assert rich.verify_ledger() == []

    @pytest.mark.parametrize("rolled_up", [False, True])
    def test_statistics_of_allowances(self, owner: CreditManager, rolled_up: bool) -> None:
        most = {"most": {"id": "most", "name": "Most", "free_allowance": MOST}}
        owner.publish_pricing(PRICES | {"plans": most, "default_plan": "most"})
        answers = owner.deduct_batch([of(user, MOST) for user in ("a", "b", "c")])
        assert [(row.error, row.allowance_used) for row in answers] == [(None, MOST)] * 3
        if rolled_up:
            owner.rollup_usage()
        assert owner.aggregate_stats().allowance_used == MOST
        assert owner.spend_by_model()[0].allowance_used == MOST
        assert owner.daily_spend()[0].allowance_used == MOST
        assert owner.verify_ledger() == []

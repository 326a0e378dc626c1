"""Which version prices when: activations at once and to come, one recorded after the other."""

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connect

from ducto_pg import CreditManager
from ducto_pg.errors import InvalidArgumentError, PricingNotLoadedError, UnknownVersionError

Connection = psycopg.Connection[tuple[Any, ...]]

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
USAGE = {"model": "a", "input_tokens": 1}


@pytest.fixture
def manager(conn: Connection, clock: Clock) -> CreditManager:
    """Its clock stands at noon."""
    clock.set(NOON)
    return CreditManager(conn)


def prices(cost: int, **more: Any) -> dict[str, Any]:
    """A config by which one token of any model costs so many credits."""
    return {"models": {"_default": f"input_tokens * {cost}"}, "min_balance": 0} | more


def publish(manager: CreditManager, *costs: int, active: int | None = None) -> list[int]:
    """Publishes a version for each cost and activates that of the cost `active`."""
    versions = [manager.publish_pricing(prices(cost), activate=False).version for cost in costs]
    if active is not None:
        manager.activate_pricing(versions[costs.index(active)])
    return versions


def cost(manager: CreditManager) -> int:
    return int(manager.calculate_cost(USAGE).total)


def costs_at(manager: CreditManager, clock: Clock, *hours: float) -> list[int]:
    """What one token costs so many hours after noon."""
    found = []
    for passed in hours:
        clock.set(NOON + passed * HOUR)
        found.append(cost(manager))
    return found


def recorded(conn: Connection) -> int:
    row = conn.execute("select count(*) from ducto_private.activations").fetchone()
    assert row
    count: int = row[0]
    return count


class TestSchedules:
    def test_a_version_takes_effect_when_its_time_comes_without_a_job(
        self, manager: CreditManager, clock: Clock, conn: Connection
    ) -> None:
        one, two = publish(manager, 1, 2, active=1)
        manager.add_credits("ann", 100)
        scheduled = manager.activate_pricing(two, at=NOON + HOUR)
        assert (scheduled.version, scheduled.config.models) == (two, {"_default": "input_tokens * 2"})
        written = recorded(conn)
        for time, version, charged in [
            (NOON, one, 1),
            (NOON + HOUR - timedelta(microseconds=1), one, 1),
            (NOON + HOUR, two, 2),
            (NOON + 1000 * HOUR, two, 2),
        ]:
            clock.set(time)
            active = manager.get_active_pricing()
            assert active
            assert active.version == version
            assert [item.version for item in manager.get_pricing_history() if item.active] == [version]
            assert cost(manager) == charged
            answer = manager.deduct("ann", USAGE).or_raise()
            assert answer.cost == charged
            assert manager.get_transaction(answer.transaction_id).pricing_version == version
        assert recorded(conn) == written

    def test_publishing_may_name_the_time(self, manager: CreditManager, clock: Clock) -> None:
        publish(manager, 1, active=1)
        published = manager.publish_pricing(prices(2), at=NOON + HOUR)
        assert published.version == 2
        assert costs_at(manager, clock, 0, 1) == [1, 2]

    def test_the_first_version_of_all_may_be_scheduled(self, manager: CreditManager, clock: Clock) -> None:
        manager.publish_pricing(prices(1), at=NOON + HOUR)
        assert manager.get_active_pricing() is None
        with pytest.raises(PricingNotLoadedError):
            cost(manager)
        assert costs_at(manager, clock, 1) == [1]

    def test_one_after_the_other(self, manager: CreditManager, clock: Clock) -> None:
        one, two, three = publish(manager, 1, 2, 3, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.activate_pricing(three, at=NOON + 2 * HOUR)
        manager.activate_pricing(one, at=NOON + 3 * HOUR)
        assert costs_at(manager, clock, 0, 1, 2, 3) == [1, 2, 3, 1]

    def test_of_those_due_the_one_recorded_last_is_active(self, manager: CreditManager, clock: Clock) -> None:
        _, two, three = publish(manager, 1, 2, 3, active=1)
        manager.activate_pricing(two, at=NOON + 2 * HOUR)
        manager.activate_pricing(three, at=NOON + HOUR)
        assert costs_at(manager, clock, 0, 1, 2, 3) == [1, 3, 3, 3]

    def test_at_once_ends_what_was_scheduled_before(self, manager: CreditManager, clock: Clock) -> None:
        _, two, three = publish(manager, 1, 2, 3, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.activate_pricing(three)
        assert costs_at(manager, clock, 0, 1, 2) == [3, 3, 3]
        clock.set(NOON)
        with pytest.raises(InvalidArgumentError, match="is not scheduled"):
            manager.unschedule_pricing(two)

    def test_what_is_scheduled_after_that_comes(self, manager: CreditManager, clock: Clock) -> None:
        one, two, three = publish(manager, 1, 2, 3, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.activate_pricing(three)
        manager.activate_pricing(one, at=NOON + 2 * HOUR)
        assert costs_at(manager, clock, 0, 1, 2) == [3, 3, 1]

    def test_at_once_holds_whatever_the_clock_says_then(self, manager: CreditManager, clock: Clock) -> None:
        _, two = publish(manager, 1, 2, active=1)
        clock.set(NOON + HOUR)
        manager.activate_pricing(two)
        assert costs_at(manager, clock, 0, 1) == [2, 2]

    def test_going_back(self, manager: CreditManager, clock: Clock) -> None:
        one, two = publish(manager, 1, 2, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        assert costs_at(manager, clock, 2) == [2]
        manager.activate_pricing(one)
        assert costs_at(manager, clock, 2, 3) == [1, 1]

    def test_a_schedule_can_be_taken_back(self, manager: CreditManager, clock: Clock) -> None:
        _, two, three = publish(manager, 1, 2, 3, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.activate_pricing(three, at=NOON + 2 * HOUR)
        assert manager.unschedule_pricing(two).version == two
        assert costs_at(manager, clock, 0, 1, 2) == [1, 1, 3]
        clock.set(NOON)
        manager.unschedule_pricing(three)
        assert costs_at(manager, clock, 0, 1, 2) == [1, 1, 1]

    def test_what_it_had_put_aside_comes_back(self, manager: CreditManager, clock: Clock) -> None:
        _, two, three = publish(manager, 1, 2, 3, active=1)
        manager.activate_pricing(two, at=NOON + 2 * HOUR)
        manager.activate_pricing(three, at=NOON + HOUR)
        manager.unschedule_pricing(three)
        assert costs_at(manager, clock, 0, 1, 2) == [1, 1, 2]

    def test_a_date_that_was_moved_is_taken_back_with_the_one_before(
        self, manager: CreditManager, clock: Clock
    ) -> None:
        _, two = publish(manager, 1, 2, active=1)
        manager.activate_pricing(two, at=NOON + 2 * HOUR)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.unschedule_pricing(two)
        assert costs_at(manager, clock, 0, 1, 2, 3) == [1, 1, 1, 1]

    def test_what_is_not_scheduled_cannot(self, manager: CreditManager, clock: Clock, conn: Connection) -> None:
        one, two = publish(manager, 1, 2, active=1)
        for version in (one, two):
            with pytest.raises(InvalidArgumentError, match=f"version {version} is not scheduled") as raised:
                manager.unschedule_pricing(version)
            assert raised.value.hint
        with pytest.raises(UnknownVersionError):
            manager.unschedule_pricing(9)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.unschedule_pricing(two)
        with pytest.raises(InvalidArgumentError, match="is not scheduled"):
            manager.unschedule_pricing(two)
        manager.activate_pricing(two, at=NOON + HOUR)
        clock.set(NOON + HOUR)
        with pytest.raises(InvalidArgumentError, match="is not scheduled"):
            manager.unschedule_pricing(two)
        assert costs_at(manager, clock, 1) == [2]

    @pytest.mark.parametrize("time", ["2026-06-01 12:00+00", "2026-06-01 11:59+00", "-infinity", "infinity"])
    def test_a_time_is_one_to_come(self, manager: CreditManager, conn: Connection, time: str) -> None:
        publish(manager, 1, 2, active=1)
        written = recorded(conn)
        with pytest.raises(psycopg.Error) as raised:
            conn.execute("select ducto.activate_pricing(2, %s)", [time])
        diag = raised.value.diag
        assert (diag.sqlstate, diag.message_hint) == ("22023", "Leave it out to activate at once.")
        assert "p_at must be a time to come" in (diag.message_primary or "")
        assert recorded(conn) == written

    def test_a_time_to_come_that_fails_publishes_nothing(self, manager: CreditManager, conn: Connection) -> None:
        with pytest.raises(InvalidArgumentError, match="p_at must be a time to come"):
            manager.publish_pricing(prices(1), at=NOON)
        assert manager.get_pricing_history() == []


class TestRepeats:
    def test_activating_what_is_active_records_nothing_and_ends_nothing(
        self, manager: CreditManager, clock: Clock, conn: Connection
    ) -> None:
        one, two = publish(manager, 1, 2, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        written = recorded(conn)
        manager.activate_pricing(one)
        manager.publish_pricing(prices(1))
        assert recorded(conn) == written
        assert costs_at(manager, clock, 0, 1) == [1, 2]

    def test_so_does_scheduling_the_same_again(self, manager: CreditManager, clock: Clock, conn: Connection) -> None:
        _, two = publish(manager, 1, 2, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        written = recorded(conn)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.publish_pricing(prices(2), at=NOON + HOUR)
        assert recorded(conn) == written
        assert costs_at(manager, clock, 0, 1) == [1, 2]

    def test_the_active_version_may_be_scheduled_to_come_back(self, manager: CreditManager, clock: Clock) -> None:
        one, two = publish(manager, 1, 2, active=1)
        manager.activate_pricing(two, at=NOON + HOUR)
        manager.activate_pricing(one, at=NOON + 2 * HOUR)
        assert costs_at(manager, clock, 0, 1, 2) == [1, 2, 1]

    def test_a_config_equal_to_any_version_is_that_version(self, manager: CreditManager, conn: Connection) -> None:
        """Two lists published in turn at each start make two versions in all."""
        for start in range(3):
            for number in (1, 2):
                published = manager.publish_pricing(prices(number), label=f"list {number}")
                assert (published.version, published.label) == (number, f"list {number}")
                assert cost(manager) == number
            assert recorded(conn) == 2 * (start + 1)
        assert [item.version for item in manager.get_pricing_history()] == [2, 1]

    def test_its_label_is_part_of_it(self, manager: CreditManager) -> None:
        assert [manager.publish_pricing(prices(1), label=label).version for label in (None, "a", "b", "a", None)] == [
            1, 2, 3, 2, 1,
        ]  # fmt: skip

    def test_how_a_number_is_written_is_not(self, manager: CreditManager) -> None:
        assert manager.publish_pricing(prices(1, metrics={"images": 1}, factor=2)).version == 1
        assert manager.publish_pricing({"factor": 2} | prices(1, version=1, metrics={"images": 1})).version == 1

    def test_one_that_is_scheduled_stays_that(self, manager: CreditManager, clock: Clock) -> None:
        publish(manager, 1, active=1)
        manager.publish_pricing(prices(2), at=NOON + HOUR)
        manager.publish_pricing(prices(2), activate=False)
        assert costs_at(manager, clock, 0, 1) == [1, 2]

    def test_publishing_it_without_a_time_is_now(self, manager: CreditManager, clock: Clock) -> None:
        publish(manager, 1, active=1)
        manager.publish_pricing(prices(2), at=NOON + HOUR)
        assert manager.publish_pricing(prices(2)).version == 2
        assert costs_at(manager, clock, 0, 1) == [2, 2]


class TestZones:
    BERLIN = prices(2, timezone="Europe/Berlin")

    def test_the_first_recorded_activation_fixes_it(self, manager: CreditManager, clock: Clock) -> None:
        manager.publish_pricing(self.BERLIN, at=NOON + HOUR)
        with pytest.raises(InvalidArgumentError, match=r"timezone: this config has UTC, but .* fixed Europe/Berlin"):
            manager.activate_pricing(manager.publish_pricing(prices(1), activate=False).version)
        with pytest.raises(InvalidArgumentError, match="Europe/Berlin"):
            manager.publish_pricing(prices(3))
        clock.set(NOON + HOUR)
        assert cost(manager) == 2
        with pytest.raises(InvalidArgumentError, match="timezone"):
            manager.activate_pricing(2)

    def test_unless_that_is_taken_back_before_its_time(self, manager: CreditManager, clock: Clock) -> None:
        manager.publish_pricing(self.BERLIN, at=NOON + HOUR)
        manager.unschedule_pricing(1)
        manager.publish_pricing(prices(1))
        assert costs_at(manager, clock, 0, 1) == [1, 1]
        with pytest.raises(InvalidArgumentError, match=r"timezone: this config has Europe/Berlin, but .* fixed UTC"):
            manager.activate_pricing(1)

    def test_it_is_checked_when_a_schedule_is_recorded(self, manager: CreditManager) -> None:
        publish(manager, 1, active=1)
        with pytest.raises(InvalidArgumentError, match="timezone"):
            manager.publish_pricing(self.BERLIN, at=NOON + HOUR)
        assert [item.version for item in manager.get_pricing_history()] == [1]


class TestAccounts:
    def test_one_ahead_of_the_clock_is_priced_by_its_own_time(self, manager: CreditManager, clock: Clock) -> None:
        _, two = publish(manager, 1, 2, active=1)
        clock.set(NOON + 2 * HOUR)
        manager.add_credits("ahead", 100)
        clock.set(NOON)
        manager.add_credits("ann", 100)
        manager.activate_pricing(two, at=NOON + HOUR)
        for user, charged in [("ann", 1), ("ahead", 2)]:
            assert manager.calculate_cost(USAGE, user).total == charged
            assert manager.reserve(user, USAGE).amount == charged
            answer = manager.deduct(user, USAGE)
            assert answer.cost == charged
            assert manager.get_transaction(answer.transaction_id).pricing_version == charged
            assert [row.cost for row in manager.deduct_batch([{"user_id": user, "metrics": USAGE}])] == [charged]

    def test_a_hold_keeps_the_version_at_which_it_was_taken(self, manager: CreditManager, clock: Clock) -> None:
        _, two = publish(manager, 1, 2, active=1)
        manager.add_credits("ann", 100)
        manager.activate_pricing(two, at=NOON + HOUR)
        hold = manager.reserve("ann", USAGE, ttl_seconds=7200)
        clock.set(NOON + HOUR)
        assert manager.deduct("ann", USAGE).cost == 2
        part = manager.deduct("ann", USAGE, reservation_id=hold.reservation_id, final=False)
        end = manager.deduct("ann", USAGE, reservation_id=hold.reservation_id)
        assert [part.cost, end.cost] == [1, 1]
        assert manager.get_reservation(hold.reservation_id).pricing_version == 1
        assert manager.get_transaction(end.transaction_id).pricing_version == 1
        explained = manager.explain_transaction(end.transaction_id)
        assert explained.formulas["model"] == "input_tokens * 1"
        assert manager.verify_ledger() == []

    def test_the_terms_change_with_the_prices(self, manager: CreditManager, clock: Clock) -> None:
        """Allowance, plans on sale and the least balance are those of the version that is active then."""

        def plan(allowance: int) -> dict[str, Any]:
            return {"pro": {"id": "pro", "name": "Pro", "free_allowance": allowance}}

        manager.publish_pricing(prices(1, plans=plan(5)))
        manager.set_user_plan("ann", "pro")
        gold = {"gold": {"id": "gold", "name": "Gold"}}
        manager.publish_pricing(prices(1, plans=plan(8) | gold, min_balance=40), at=NOON + HOUR)
        manager.add_credits("bob", 50)
        assert manager.check_allowance("ann").allowance_remaining == 5
        assert manager.set_user_plan("bob", "gold").error == "plan_not_found"
        assert manager.get_balance("bob").available == 50
        clock.set(NOON + HOUR)
        assert manager.check_allowance("ann").allowance_remaining == 8
        assert manager.get_balance("bob").available == 10
        assert manager.deduct("bob", USAGE | {"input_tokens": 11}).error == "insufficient_credits"
        assert manager.set_user_plan("bob", "gold").error is None

    def test_a_session_that_priced_before_sees_the_change(
        self, manager: CreditManager, clock: Clock, connect: Connect
    ) -> None:
        other = CreditManager(connect())
        manager.publish_pricing(prices(1))
        assert cost(other) == 1
        manager.publish_pricing(prices(2) | {"models": {"_default": "input_tokens + 6"}}, at=NOON + HOUR)
        assert cost(other) == 1
        clock.set(NOON + HOUR)
        assert cost(other) == 7


def test_who_and_when_is_recorded(manager: CreditManager, conn: Connection, clock: Clock) -> None:
    one, two = publish(manager, 1, 2, active=1)
    clock.set(NOON + HOUR)
    manager.activate_pricing(two, at=NOON + 2 * HOUR)
    rows = conn.execute(
        "select version, from_version, starts_at = '-infinity', recorded_at, recorded_by = session_user, role_set"
        " from ducto_private.activations order by activation_id"
    ).fetchall()
    assert rows == [(one, None, True, NOON, True, "none"), (two, one, False, NOON + HOUR, True, "none")]

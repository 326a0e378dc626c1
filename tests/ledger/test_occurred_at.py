"""Usage of an earlier time: the price of that time, all else of the call."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connection

from ducto_pg import CreditManager
from ducto_pg.errors import InvalidArgumentError

NOW = datetime(2026, 3, 31, 12, tzinfo=UTC)
USAGE = {"model": "m", "input_tokens": 10}


@pytest.fixture
def credits(conn: Connection, clock: Clock) -> Iterator[CreditManager]:
    """A shop whose price rose on 1 March, when it also began to round up; an account with 1,000 credits."""
    manager = CreditManager(conn)
    clock.set(datetime(2026, 1, 10, tzinfo=UTC))
    manager.publish_pricing({"models": {"m": "input_tokens * 0.25"}, "min_balance": 0})
    clock.set(datetime(2026, 3, 1, tzinfo=UTC))
    manager.publish_pricing({"models": {"m": "input_tokens * 0.55"}, "min_balance": 0, "rounding": "up"})
    clock.set(NOW)
    manager.add_credits("u", 1000)
    yield manager
    assert manager.verify_ledger() == []


@pytest.mark.parametrize(
    ("when", "version", "cost", "amount"),
    [
        (datetime(2026, 1, 10, tzinfo=UTC), 1, "2.50", -3),
        (datetime(2026, 2, 28, 23, 59, tzinfo=UTC), 1, "2.50", -3),
        (datetime(2026, 3, 1, tzinfo=UTC), 2, "5.50", -6),
        (NOW + timedelta(minutes=5), 2, "5.50", -6),
        (None, 2, "5.50", -6),
    ],
)
def test_the_price_is_that_of_then_and_the_rounding_that_of_now(
    credits: CreditManager, when: datetime | None, version: int, cost: str, amount: int
) -> None:
    charge = credits.deduct("u", USAGE, occurred_at=when)
    assert (charge.cost, charge.amount) == (Decimal(cost), amount)
    row = credits.get_transaction(charge.transaction_id)
    assert (row.pricing_version, row.rounding, row.occurred_at) == (version, "up", when)
    assert row.created_at == NOW
    explained = credits.explain_transaction(charge.transaction_id)
    assert (explained.cost, explained.rounding, explained.parts["model_credits"]) == (
        Decimal(cost),
        "up",
        Decimal(cost),
    )
    hold = credits.reserve("u", USAGE, occurred_at=when)
    assert hold.amount == -amount


@pytest.mark.parametrize(
    ("when", "words"),
    [
        (NOW - timedelta(days=90, seconds=1), "within the last 90 days"),
        (NOW + timedelta(minutes=5, seconds=1), "up to 5 minutes ahead"),
        (datetime(2026, 1, 9, 23, tzinfo=UTC), "no pricing version was active"),
    ],
)
def test_other_times_are_misuse(credits: CreditManager, when: datetime, words: str) -> None:
    for ask in (
        lambda: credits.deduct("u", USAGE, occurred_at=when),
        lambda: credits.reserve("u", USAGE, occurred_at=when),
        lambda: credits.deduct_credits("u", 1, occurred_at=when),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            ask()
    (answer,) = credits.deduct_batch([{"user_id": "u", "metrics": USAGE, "occurred_at": when.isoformat()}])
    assert (answer.error, answer.balance_after) == ("invalid_argument", 1000)


def test_an_element_of_a_batch_says_it_alike(credits: CreditManager) -> None:
    elements: list[dict[str, Any]] = [
        {"user_id": "u", "metrics": USAGE, "occurred_at": "2026-02-01T00:00:00Z"},
        {"user_id": "u", "metrics": USAGE},
        {"user_id": "u", "metrics": USAGE, "occurred_at": "yesterday"},
        {"user_id": "u", "metrics": USAGE, "occurred_at": 5},
    ]
    answers = credits.deduct_batch(elements)
    assert [(answer.cost, answer.error) for answer in answers] == [
        (Decimal("2.50"), None),
        (Decimal("5.50"), None),
        (Decimal(0), "invalid_argument"),
        (Decimal(0), "invalid_argument"),
    ]


def test_with_a_hold_its_version_stands(credits: CreditManager) -> None:
    hold = credits.reserve("u", USAGE)
    settled = credits.deduct(
        "u", USAGE, reservation_id=hold.reservation_id, occurred_at=datetime(2026, 2, 1, tzinfo=UTC)
    )
    assert (settled.cost, settled.warnings) == (Decimal("5.50"), [])
    held = credits.reserve("u", USAGE)
    with pytest.raises(InvalidArgumentError, match="within the last 90 days"):
        credits.deduct("u", USAGE, reservation_id=held.reservation_id, occurred_at=NOW - timedelta(days=91))
    assert credits.get_reservation(held.reservation_id).status == "active"


def test_it_is_part_of_the_request(credits: CreditManager) -> None:
    when = datetime(2026, 2, 1, tzinfo=UTC)
    first = credits.deduct("u", USAGE, "k", occurred_at=when)
    again = credits.deduct("u", USAGE, "k", occurred_at=when)
    assert again.model_copy(update={"idempotent": False}) == first
    assert again.idempotent
    assert credits.deduct("u", USAGE, "k").error == "idempotency_conflict"


def test_a_body_is_counted_as_its_price_counts(credits: CreditManager, clock: Clock) -> None:
    inside = "(input_tokens - cache_read_tokens) * 0.25 + cache_read_tokens * 0.025"
    credits.publish_pricing({"models": {"m": inside}, "min_balance": 0})
    usage = {"prompt_tokens": 1000, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 300}}
    body = {"body": {"model": "m", "usage": usage}, "api": "openai"}
    then = clock.now()
    hold = credits.reserve("u", body, idempotency_key="h")
    first = credits.deduct("u", body, "k")
    clock.advance(timedelta(minutes=1))
    beside = "input_tokens * 0.5 + cache_read_tokens * 0.05"
    credits.publish_pricing({"models": {"m": beside}, "min_balance": 0, "cached": "beside"})
    credits.add_credits("u", 1000)
    assert (hold.amount, first.cost) == (183, Decimal("182.500"))
    settled = credits.deduct("u", body, reservation_id=hold.reservation_id)
    assert (settled.cost, settled.warnings) == (Decimal("182.500"), [])
    assert credits.deduct("u", body, reservation_id=hold.reservation_id).idempotent
    assert credits.deduct("u", body, "k").idempotent
    assert credits.reserve("u", body, idempotency_key="h").idempotent
    assert credits.deduct("u", body, occurred_at=then).cost == Decimal("182.500")
    assert credits.deduct("u", body).cost == Decimal("365.00")


def test_a_body_is_read_before_the_accounts_row_is_locked(credits: CreditManager, conn: Connection) -> None:
    """By every call, and by a batch before its first account. A body that is no usage is refused by itself there."""
    credits.add_credits("v", 1000)
    credits.create_team("Crew", 1000, team_id="crew")
    credits.add_team_member("crew", "u")
    conn.execute(
        """
        alter function ducto_private.read_body(jsonb, text, text) rename to reads_body;
        create function ducto_private.read_body(p_body jsonb, p_api text, p_model text) returns jsonb
        language plpgsql as $$
        begin
          if exists (
            select
            from pg_locks as l
            where l.pid = pg_backend_pid() and l.mode = 'RowShareLock'
              and l.relation = 'ducto_private.accounts'::regclass)
          then
            raise exception 'read under the lock';
          end if;
          return ducto_private.reads_body(p_body, p_api, p_model);
        end
        $$
        """
    )
    body = {"body": {"model": "m", "usage": {"prompt_tokens": 10, "completion_tokens": 0}}, "api": "openai"}
    none = {"body": {"model": "m"}}
    held = credits.reserve("u", body).or_raise().reservation_id
    amounts = [credits.deduct("u", body).amount, credits.deduct("u", body, reservation_id=held).amount]
    held = credits.reserve_team("crew", "u", body).or_raise().reservation_id
    amounts += [credits.deduct_team("crew", "u", body, reservation_id=held).amount]
    batch = [{"user_id": "v", "metrics": body}, {"user_id": "u", "metrics": none}, {"user_id": "u", "metrics": body}]
    answers = credits.deduct_batch(batch)
    assert [answer.error for answer in answers] == [None, "invalid_argument", None]
    assert [*amounts, answers[0].amount, answers[2].amount] == [-6, -6, -6, -6, -6]
    with pytest.raises(InvalidArgumentError, match="the body is no usage"):
        credits.deduct("u", none)
    with conn.transaction(force_rollback=True):
        credits.deduct("u", USAGE)
        with pytest.raises(psycopg.errors.RaiseException, match="read under the lock"):
            credits.deduct("u", body)
    conn.execute("drop function ducto_private.read_body(jsonb, text, text)")
    conn.execute("alter function ducto_private.reads_body(jsonb, text, text) rename to read_body")


def test_a_usage_without_a_body_costs_no_reading(credits: CreditManager, conn: Connection) -> None:
    with conn.transaction(force_rollback=True):
        for name in ("read_given(jsonb)", "read_bodies(jsonb)", "counted_usage(jsonb, integer)"):
            conn.execute(f"drop function ducto_private.{name}")
        assert credits.deduct("u", USAGE).amount == -6
        assert credits.deduct_batch([{"user_id": "u", "metrics": USAGE}])[0].amount == -6
        held = credits.reserve("u", USAGE).reservation_id
        assert credits.deduct("u", USAGE, reservation_id=held).amount == -6

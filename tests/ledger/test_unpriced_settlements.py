"""A settlement comes after the work: it is never refused for its price, and says what it did instead."""

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from conftest import Clock, Connection

from ducto_pg import CreditManager
from ducto_pg.errors import DuctoError, InvalidArgumentError

CONFIG: dict[str, Any] = {
    "models": {
        "m": "input_tokens + output_tokens * 2.5",
        "half": "input_tokens / output_tokens",
        "falls": "input_tokens - 1000",
    },
    "fixed": {"job": 3},
    "min_balance": 0,
}


@pytest.fixture
def credits(conn: Connection, clock: Clock) -> Iterator[CreditManager]:
    """An account with 1,000 credits and a carried fraction of a half; a team with 1,000."""
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    clock.set("2026-03-10T12:00")
    manager.add_credits("u", 1000)
    manager.deduct_credits("u", Decimal("0.5"))
    manager.create_team("Crew", 1000, team_id="crew")
    manager.add_team_member("crew", "ann")
    yield manager
    assert manager.verify_ledger() == []


# What is settled, with a hold of 100 for the model m -> cost, warnings, what the row says.
TABLE: dict[str, tuple[dict[str, Any], str, list[str], str | None]] = {
    "a price": ({"model": "m", "input_tokens": 7}, "7", [], None),
    "another model": ({"model": "n", "input_tokens": 7}, "7", ["priced_by_hold_model"], None),
    "no model": ({"input_tokens": 7}, "7", ["priced_by_hold_model"], None),
    "a count that no formula names": (
        {"model": "m", "input_tokens": 7, "images": 2}, "7", ["unpriced_usage"],
        "no formula of this price names images"),
    "a count that nobody knows": (
        {"model": "m", "input_tokens": 7, "pages": 2}, "7", ["unpriced_usage"], "no formula of this price names pages"),
    "both": (
        {"model": "n", "input_tokens": 7, "images": 2}, "7", ["priced_by_hold_model", "unpriced_usage"],
        "no formula of this price names images"),
    "a part above its whole": (
        {"model": "m", "output_tokens": 7, "reasoning_tokens": 8}, "100", ["priced_by_hold"],
        "reasoning_tokens is more than the output_tokens that it is a part of"),
    "a division by zero": (
        {"model": "half", "input_tokens": 1}, "100", ["priced_by_hold"], "division by zero in models.half"),
    "a price below zero": (
        {"model": "falls", "input_tokens": 1}, "100", ["priced_by_hold"],
        "models.falls: the price of this usage is below 0"),
    "an unknown job": ({"fixed_job": "jab", "model": "m"}, "100", ["priced_by_hold"], "unknown job 'jab'"),
}  # fmt: skip


def told(manager: CreditManager) -> list[Any]:
    """The reasons of the events since the last time."""
    events = [event for event in manager.fetch_events() if event.type == "settlement_unpriced"]
    manager.ack_events([event.event_id for event in events])
    return [event.payload["reason"] for event in events]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("way", ["alone", "in a batch", "a team"])
def test_the_end_of_a_hold(credits: CreditManager, name: str, way: str) -> None:
    usage, cost, warnings, reason = TABLE[name]
    if way == "a team":
        hold = credits.reserve_team("crew", "ann", {"model": "m", "input_tokens": 100}).reservation_id
        answer: Any = credits.deduct_team("crew", "ann", usage, reservation_id=hold)
    else:
        hold = credits.reserve("u", {"model": "m", "input_tokens": 100}).reservation_id
        answer = (
            credits.deduct("u", usage, reservation_id=hold)
            if way == "alone"
            else credits.deduct_batch([{"user_id": "u", "metrics": usage, "reservation_id": hold}])[0]
        )
    assert (answer.error, answer.cost, answer.amount, answer.warnings) == (None, Decimal(cost), -int(cost), warnings)
    row = credits.get_transaction(answer.transaction_id)
    assert (row.price_error, row.warnings) == (reason, warnings)
    assert row.carry_after == (Decimal("0.5") if way != "a team" else 0)
    explained = credits.explain_transaction(answer.transaction_id)
    if warnings == ["priced_by_hold"]:
        assert (explained.parts, explained.formulas) == ({"held": int(cost)}, {"price_error": reason})
    else:
        assert explained.parts["model_credits"] == Decimal(cost)
    assert credits.get_reservation(hold).status == "settled"
    assert told(credits) == ([reason] if reason else [])


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[2] == ["priced_by_hold"]])
def test_a_part_charges_nothing_and_keeps_the_hold(credits: CreditManager, name: str) -> None:
    usage, _, _, reason = TABLE[name]
    hold = credits.reserve("u", {"model": "m", "input_tokens": 100}).reservation_id
    part = credits.deduct("u", usage, reservation_id=hold, final=False)
    assert (part.cost, part.amount, part.warnings) == (Decimal(0), 0, ["priced_by_hold"])
    kept = credits.get_reservation(hold)
    assert (kept.status, kept.amount) == ("active", 100)
    assert told(credits) == [reason]


@pytest.mark.parametrize("swept", [False, True])
def test_an_expired_hold_charges_what_it_held_last(credits: CreditManager, clock: Clock, swept: bool) -> None:
    hold = credits.reserve("u", {"model": "m", "input_tokens": 100}).reservation_id
    credits.deduct("u", {"model": "m", "input_tokens": 30}, reservation_id=hold, final=False)
    clock.advance(timedelta(hours=1))
    if swept:
        credits.sweep_expired_credits()
    kept = credits.get_reservation(hold)
    assert (kept.status, kept.amount) == ("expired", 0)
    answer = credits.deduct("u", {"model": "half", "input_tokens": 1}, reservation_id=hold)
    assert (answer.amount, answer.warnings) == (-70, ["priced_by_hold", "reservation_expired"])


def test_a_hold_without_a_model_is_no_help(credits: CreditManager) -> None:
    hold = credits.reserve_credits("u", 40).reservation_id
    answer = credits.deduct("u", {"model": "n", "input_tokens": 7}, reservation_id=hold)
    assert (answer.amount, answer.warnings) == (-40, ["priced_by_hold"])
    assert told(credits) == ["unknown model 'n'"]


def test_a_job_by_itself_needs_no_model(credits: CreditManager) -> None:
    credits.publish_pricing({**CONFIG, "models": {**CONFIG["models"], "flat": "requests * 2"}})
    for model, estimate in (("flat", {}), ("half", {"input_tokens": 8, "output_tokens": 2})):
        hold = credits.reserve("u", {"model": model, **estimate}).reservation_id
        answer = credits.deduct("u", {"fixed_job": "job"}, reservation_id=hold)
        assert (answer.cost, answer.amount) == (Decimal(3), -3)
        assert "priced_by_hold" not in answer.warnings


def test_one_event_a_reason_and_local_day(credits: CreditManager, clock: Clock) -> None:
    seen = []
    for usage in (
        {"model": "half", "input_tokens": 1},
        {"model": "half", "input_tokens": 2},
        {"model": "m", "images": 1},
    ):
        hold = credits.reserve("u", {"model": "m", "input_tokens": 5}).reservation_id
        credits.deduct("u", usage, reservation_id=hold)
        seen.append(told(credits))
    assert seen == [["division by zero in models.half"], [], ["no formula of this price names images"]]
    clock.advance(timedelta(days=1))
    hold = credits.reserve("u", {"model": "m", "input_tokens": 5}).reservation_id
    credits.deduct("u", {"model": "half", "input_tokens": 1}, reservation_id=hold)
    assert told(credits) == ["division by zero in models.half"]


def test_a_key_gives_the_first_answer_again(credits: CreditManager) -> None:
    hold = credits.reserve("u", {"model": "m", "input_tokens": 5}).reservation_id
    usage = {"model": "half", "input_tokens": 1}
    first = credits.deduct("u", usage, "k", reservation_id=hold)
    again = credits.deduct("u", usage, "k", reservation_id=hold)
    assert again == first.model_copy(update={"idempotent": True})
    assert told(credits) == ["division by zero in models.half"]


def test_without_a_hold_and_for_misuse_it_raises(credits: CreditManager) -> None:
    for usage, _, warnings, _ in TABLE.values():
        if warnings:
            with pytest.raises(DuctoError):
                credits.deduct("u", usage)
            with pytest.raises(DuctoError):
                credits.reserve("u", usage)
    hold = credits.reserve("u", {"model": "m", "input_tokens": 5}).reservation_id
    shapes = {
        "input_tokens": "must be at least 0",
        "unread": "must be an object",
        "fixed_job": "must be the name of a job",
    }
    for name, words in shapes.items():
        usage = {"model": "m", name: Decimal(-1) if name == "input_tokens" else 5}
        with pytest.raises(InvalidArgumentError, match=f"{name} {words}"):
            credits.deduct("u", usage, reservation_id=hold)
    assert credits.get_reservation(hold).status == "active"

"""What events tell, each at an edge, and who is given them: consumers, each with leases of its own."""

from typing import Any

import pytest
from conftest import Clock, Connect, Connection
from ledger_helpers import (
    UNKNOWN,
    Call,
    Ledger,
    Row,
    Step,
    ask,
    at,
    but,
    costs,
    free,
    gives,
    later,
    poor,
    prices,
    refuses,
    reject,
    rich,
    team,
)
from sessions import Arena, Cast, race

from ducto_pg import CreditManager

plain = prices(min_balance=0, low_balance=0)
Told = list[dict[str, Any]]


def refused(call: Call) -> Step:
    return but(refuses("insufficient_credits"), call)


def lot(points: int, until: str, user: str = "u") -> Call:
    return ask.add_credits(user, points, expires_at=until)


STORIES: list[tuple[str, str, list[Step], Told]] = [
    ("refused, once", "refused", [plain, poor, refused(ask.deduct("u", costs(9))), refused(ask.reserve_credits("u",
     8))],
     [{"actor_id": "u", "amount": 9, "available": 1}]),
    ("a grant that is not enough", "refused", [plain, poor, refused(ask.deduct("u", costs(9))), poor,
     refused(ask.deduct("u", costs(9)))], [{"available": 1}]),
    ("one that is enough", "refused", [poor, refused(ask.deduct("u", costs(9))), rich, ask.remove_credits("u", 100),
     refused(ask.deduct("u", costs(9)))], [{"amount": 9}, {"amount": 9}]),
    ("a charge in between", "refused", [rich, refused(ask.deduct("u", costs(999))), ask.deduct("u", costs(95)),
     refused(ask.deduct("u", costs(9)))], [{"amount": 999}, {"amount": 9, "available": 0}]),
    ("a charge of nothing in between", "refused", [rich, refused(ask.deduct("u", costs(999))), ask.deduct("u",
     costs(0)),
     refused(ask.deduct("u", costs(999)))], [{"amount": 999}]),
    ("enough by time alone", "refused", [free, ask.set_user_plan("u", "free"), ask.deduct("u", costs(10)),
     refused(ask.deduct("u", costs(9))), at("2026-01-31"), refused(ask.deduct("u", costs(8))), at("2026-02-01"),
     refused(ask.deduct("u", costs(11)))], [{"amount": 9}, {"amount": 11, "available": 10}]),
    ("all is held", "refused", [plain, rich, ask.reserve_credits("u", 100), refused(ask.reserve_credits("u", 1))],
     [{"amount": 1, "available": 0}]),
    ("a hold with its own least", "refused", [plain, rich, refused(ask.reserve_credits("u", 10, min_balance=95)),
     refused(ask.reserve_credits("u", 10, min_balance=95))], [{"amount": 10, "available": 100}]),
    ("a settlement", "refused", [reject, rich, ask.reserve_credits("u", 5), refused(ask.deduct("u", costs(200),
     hold="@hold"))],
     [{"amount": 200}]),
    ("a pool", "refused", [team("t", "ann"), refused(ask.deduct_team_credits("t", "ann", 101))],
     [{"actor_id": "ann", "amount": 101}]),
    ("nobody", "refused", [prices(signup_bonus=9), but(refuses("insufficient_credits"), ask.deduct("u", costs(99)))],
     []),
    ("a cap refuses", "refused", [rich, ask.set_spend_cap("u", 1), but(refuses("spend_cap_exceeded"), ask.deduct("u",
     costs(9)))],
     []),
    ("allowance, at 80 percent", "allowance_used", [free, ask.set_user_plan("u", "free"), ask.deduct("u", costs(7)),
     ask.deduct("u", costs(1)), ask.deduct("u", costs(1))],
     [{"percent": 80, "plan_id": "free", "allowance_used": 8, "allowance_remaining": 2}]),
    ("and at 100", "allowance_used", [free, rich, ask.set_user_plan("u", "free"), ask.deduct("u", costs(8)),
     ask.deduct("u", costs(5)), ask.deduct("u", costs(5))],
     [{"percent": 80}, {"percent": 100, "allowance_used": 10, "allowance_remaining": 0}]),
    ("both at once", "allowance_used", [free, ask.set_user_plan("u", "free"), ask.deduct("u", costs(10))],
     [{"percent": 80}, {"percent": 100}]),
    ("once a period", "allowance_used", [free, ask.set_user_plan("u", "free"), ask.deduct("u", costs(10)),
     ask.refund_credits("@charge"), ask.deduct("u", costs(10))], [{"percent": 80}, {"percent": 100}]),
    ("in the next again", "allowance_used", [free, ask.set_user_plan("u", "free"), at("2026-01-31"),
     ask.deduct("u", costs(8)), at("2026-02-01"), ask.deduct("u", costs(8))], [{"percent": 80}, {"percent": 80}]),
    ("a hold expired, by the next call", "hold_expired", [rich, ask.reserve_credits("u", 30, ttl=60), later(seconds=60),
     ask.deduct("u", costs(1))], [{"reservation_id": "@hold", "actor_id": "u", "amount": 30, "charged": 0}]),
    ("by the sweep", "hold_expired", [rich, ask.reserve_credits("u", 30, ttl=60), later(seconds=60),
     ask.sweep_expired_credits(), ask.sweep_expired_credits()], [{"amount": 30}]),
    ("a pool's", "hold_expired", [team("t", "ann"), ask.reserve_team_credits("t", "ann", 5), later(seconds=600),
     ask.sweep_expired_credits()], [{"actor_id": "ann", "amount": 5}]),
    ("not yet", "hold_expired", [rich, ask.reserve_credits("u", 30, ttl=60), later(seconds=59),
     ask.sweep_expired_credits()],
     []),
    ("nor by a refusal", "hold_expired", [poor, ask.reserve_credits("u", 0, ttl=60), later(seconds=60),
     refused(ask.deduct("u", costs(9)))], []),
    ("credits about to expire", "credits_expiring", [lot(9, "2026-01-09"), at("2026-01-02"),
     ask.sweep_expired_credits(),
     ask.sweep_expired_credits()], [{"transaction_id": "@grant", "amount": 9,
     "expires_at": "2026-01-09T00:00:00+00:00"}]),
    ("what is left of them", "credits_expiring", [plain, lot(9, "2026-01-09"), ask.deduct("u", costs(4)),
     at("2026-01-05"),
     ask.sweep_expired_credits()], [{"amount": 5}]),
    ("more than a week before", "credits_expiring", [lot(9, "2026-01-09"), at("2026-01-01T23:59"),
     ask.sweep_expired_credits()], []),
    ("none left", "credits_expiring", [plain, lot(9, "2026-01-09"), ask.deduct("u", costs(9)), at("2026-01-05"),
     ask.sweep_expired_credits()], []),
    ("a member's cap", "member_cap_reached", [team("t"), ask.add_team_member("t", "ann", "member", 20, "daily"),
     ask.deduct_team_credits("t", "ann", 19), ask.deduct_team_credits("t", "ann", 1),
     but(refuses("member_cap_exceeded"), ask.deduct_team_credits("t", "ann", 1))],
     [{"user_id": "ann", "spend_cap": 20, "spend_cap_period": "daily", "spent": 20}]),
    ("beyond it", "member_cap_reached", [team("t"), ask.add_team_member("t", "ann", "member", 20),
     ask.reserve_team_credits("t", "ann", 5), ask.deduct_team_credits("t", "ann", 30, "@hold")], [{"spent": 30}]),
    ("low, by what is left above min_balance", "low_balance", [prices(min_balance=5, low_balance=20), rich,
     ask.deduct("u", costs(74)), ask.deduct("u", costs(1)), ask.deduct("u", costs(1))], [{"balance": 25,
     "low_balance": 20}]),
    ("holds do not count", "low_balance", [prices(min_balance=0, low_balance=20), rich, ask.reserve_credits("u", 90),
     ask.deduct("u", costs(70), hold="@hold")], []),
    ("the allowance counts", "low_balance", [prices(min_balance=0, low_balance=5, plans={"p": {"id": "p", "name": "P",
     "free_allowance": 10}}), ask.set_user_plan("u", "p"), ask.deduct("u", costs(4)), ask.deduct("u", costs(1))],
     [{"balance": 0, "low_balance": 5}]),
    ("the plan's line", "low_balance", [prices(min_balance=0, low_balance=5, plans={"p": {"id": "p", "name": "P",
     "low_balance": 50}}), rich, ask.set_user_plan("u", "p"), ask.deduct("u", costs(50))], [{"balance": 50,
     "low_balance": 50}]),
    ("one's own before it", "low_balance", [prices(min_balance=0, low_balance=5), rich, ask.set_low_balance("u", 60),
     ask.deduct("u", costs(39)), ask.deduct("u", costs(1)), ask.deduct("u", costs(40))], [{"balance": 60,
     "low_balance": 60}]),
    ("setting it is no edge", "low_balance", [prices(min_balance=0, low_balance=5), rich, ask.set_low_balance("u",
     600)], []),
    ("turned off", "low_balance", [prices(min_balance=0, low_balance=5), rich, ask.set_low_balance("u", 0),
     ask.deduct("u", costs(99))], []),
    ("and on again", "low_balance", [prices(min_balance=0, low_balance=5), rich, ask.set_low_balance("u", 0),
     ask.set_low_balance("u"), ask.deduct("u", costs(99))], [{"balance": 1, "low_balance": 5}]),
    ("a limit lowered", "low_balance", [prices(min_balance=0, low_balance=5), poor, ask.set_credit_limit("u", 9),
     ask.set_credit_limit("u", 0)], [{"balance": 1, "low_balance": 5}]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "told"), [row[1:] for row in STORIES], ids=[row[0] for row in STORIES])
def test_what_is_told(ledger: Ledger, kind: str, given: list[Step], told: Told) -> None:
    for step in given:
        step(ledger)
    rows = ledger.sql("select payload from ducto_private.events where type = %s order by event_id", kind)
    found = [row[0] for row in rows]
    assert len(found) == len(told), found
    for expected in told:  # At one instant of the clock they come in any order.
        matching = [payload for payload in found if ledger.named(expected).items() <= payload.items()]
        assert matching, (expected, found)
        found.remove(matching[0])


def test_a_refusal_leaves_the_revision(ledger: Ledger) -> None:
    rich(ledger)
    before = ledger.one(ask.get_balance("u"))
    assert ledger.one(ask.deduct("u", costs(999)))["revision"] == before["revision"]
    assert ledger.one(ask.get_balance("u")) == before


def test_the_sweep_counts_accounts(ledger: Ledger) -> None:
    for step in (lot(9, "2026-01-09"), lot(9, "2026-01-09", "v"), rich, ask.reserve_credits("u", 5), at("2026-01-02")):
        step(ledger)
    counted = {"expired_count": 0, "expired_amount": 0}
    assert ledger.one(ask.sweep_expired_credits(True)).items() >= (counted | {"account_count": 2}).items()
    assert [ledger.one(ask.sweep_expired_credits(False, 1))["account_count"] for _ in range(3)] == [1, 1, 0]
    assert len(ledger.events("credits_expiring", "hold_expired")) == 3
    gives(reserved=0)(ledger, ask.get_balance("u"))


# Consumers


def fetched(ledger: Ledger, consumer: str, **more: Any) -> list[str]:
    return [row["event_id"] for row in ledger.run(ask.fetch_events(consumer=consumer, **more))]


def acked(ledger: Ledger, consumer: str, *ids: str) -> int:
    """How many it says it had not before."""
    ((count,),) = ledger.sql("select ducto.ack_events(%s::text[], %s)", "{" + ",".join(ids) + "}", consumer)
    return int(count)


def left(ledger: Ledger) -> int:
    ((count,),) = ledger.sql("select count(*) from ducto_private.events")
    return int(count)


def test_each_consumer_sees_each_event(ledger: Ledger) -> None:
    rich(ledger)
    ids = fetched(ledger, "mail")
    assert len(ids) == 1
    assert fetched(ledger, "crm") == ids
    assert fetched(ledger, "mail") == []
    later(seconds=60)(ledger)
    assert [row["attempts"] for row in ledger.run(ask.fetch_events(consumer="mail"))] == [2]
    assert [row["attempts"] for row in ledger.run(ask.fetch_events(consumer="crm"))] == [2]
    assert acked(ledger, "mail", *ids) == 1
    assert acked(ledger, "mail", *ids) == 0
    later(seconds=60)(ledger)
    assert fetched(ledger, "mail") == []
    assert fetched(ledger, "crm") == ids
    assert left(ledger) == 1
    assert acked(ledger, "crm", *ids) == 1
    assert left(ledger) == 0


def test_another_consumers_event_is_not_acknowledged(ledger: Ledger) -> None:
    rich(ledger)
    ids = fetched(ledger, "mail")
    before = ledger.tables()
    assert acked(ledger, "crm", *ids) == 0
    assert acked(ledger, "mail", UNKNOWN) == 0
    assert ledger.tables() == before
    assert fetched(ledger, "crm") == ids


@pytest.mark.parametrize("name", ["", " ", " mail"])
def test_a_consumer_has_a_name(ledger: Ledger, name: str) -> None:
    for call in (ask.fetch_events(consumer=name), Call("ack_events", ("{}", name), {})):
        with pytest.raises(Exception, match="p_consumer"), ledger.conn.transaction():
            ledger.run(call)


def test_events_are_kept_for_thirty_days(ledger: Ledger) -> None:
    rich(ledger)
    assert len(fetched(ledger, "mail")) == 1
    later(days=29, hours=23)(ledger)
    assert len(fetched(ledger, "crm")) == 1
    later(hours=2)(ledger)
    assert fetched(ledger, "mail") == fetched(ledger, "crm") == []
    assert left(ledger) == 0


def test_the_sweep_drops_old_events_and_a_consumer_that_went(ledger: Ledger) -> None:
    rich(ledger)
    fetched(ledger, "gone")
    later(days=31)(ledger)
    ask.sweep_expired_credits()(ledger)
    assert left(ledger) == 0
    ask.add_credits("v", 1)(ledger)
    assert acked(ledger, "mail", *fetched(ledger, "mail")) == 1
    assert left(ledger) == 0


def test_a_later_commit_of_an_earlier_event_is_seen(arena: Arena) -> None:
    late, early = arena.sessions(2, autocommit=False)
    ask.add_credits("late", 1)(late)
    arena.clock.set("2026-01-01T00:00:01")
    ask.add_credits("early", 1)(early)
    early.conn.commit()
    first = arena.ledger.run(ask.fetch_events(consumer="mail"))
    assert [row["account_id"] for row in first] == ["early"]
    assert acked(arena.ledger, "mail", first[0]["event_id"]) == 1
    late.conn.commit()
    assert [row["account_id"] for row in arena.ledger.run(ask.fetch_events(consumer="mail"))] == ["late"]


@pytest.mark.parametrize("consumer", ["default", "mail"])
def test_two_workers_of_a_consumer_share(arena: Arena, consumer: str) -> None:
    arena.given(*(ask.add_credits(f"u{number}", 1) for number in range(5)))
    one, two = arena.sessions(2, autocommit=False, options="-c lock_timeout=5s")
    ours, theirs = fetched(one, consumer, limit=3), fetched(two, consumer, limit=3)
    assert (len(ours), len(theirs)) == (3, 2)
    assert not set(ours) & set(theirs)
    one.conn.commit()
    two.conn.rollback()
    assert fetched(arena.ledger, consumer) == theirs


def test_eight_workers_get_each_event_once(arena: Arena) -> None:
    arena.given(*(ask.add_credits(f"u{number}", 1) for number in range(30)))
    workers = arena.sessions(8)
    given = race(workers, lambda worker, _: [fetched(worker, "mail", limit=2) for _ in range(6)])
    ids = [event for worker in given for batch in worker for event in batch]
    assert len(ids) == len(set(ids)) == 30
    arena.sound()


def test_an_ack_beside_a_fetch(arena: Arena) -> None:
    arena.given(*(ask.add_credits(f"u{number}", 1) for number in range(4)))
    ids = fetched(arena.ledger, "mail")
    fetched(arena.ledger, "crm")
    acking, other = arena.sessions(2, autocommit=False, options="-c lock_timeout=5s")
    assert acked(acking, "mail", *ids[:2]) == 2
    arena.clock.set("2026-01-01T00:01")
    assert fetched(other, "mail") == ids[2:]
    acking.conn.commit()
    other.conn.commit()
    assert acked(arena.ledger, "crm", *ids) == 4
    assert left(arena.ledger) == 2
    assert acked(arena.ledger, "mail", *ids) == 2
    assert left(arena.ledger) == 0
    arena.sound()


def test_the_last_two_consumers_acknowledge_at_once(connect: Connect, arena: Arena) -> None:
    arena.given(rich)
    ids = fetched(arena.ledger, "mail")
    fetched(arena.ledger, "crm")
    cast = Cast(connect, 2)
    try:
        cast.open(0, lambda m: m.ack_events(ids, "mail"))
        cast.start(1, lambda m: m.ack_events(ids, "crm"))
        assert cast.waiters() == 1
        cast.sessions[0].execute("commit")
        assert cast.answers() == [1]
    finally:
        cast.close()
    assert left(arena.ledger) == 0


def test_writing_an_event_writes_no_more_for_consumers(ledger: Ledger) -> None:
    fetched(ledger, "mail")
    fetched(ledger, "crm")
    rich(ledger)
    assert ledger.sql("select count(*) from ducto_private.deliveries") == [(0,)]


def test_the_managers_name_consumers(conn: Connection, clock: Clock) -> None:
    clock.set("2026-01-01")
    credits = CreditManager(conn)
    credits.add_credits("u", 1)
    events = credits.fetch_events(consumer="mail")
    rows: list[Row] = [event.model_dump() for event in events]
    assert [row["type"] for row in rows] == ["account_opened"]
    assert credits.ack_events([event.event_id for event in events], "crm") == 0
    assert credits.ack_events([event.event_id for event in events], consumer="mail") == 1

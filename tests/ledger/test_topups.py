"""Automatic top-ups: one opens when less than the threshold is available, whatever call leaves so, never a second."""

from typing import Any

import pytest
from conftest import Clock, Connect, Connection
from ledger_helpers import (
    FREE,
    Call,
    Check,
    Ledger,
    Row,
    Sentence,
    Step,
    ask,
    at,
    costs,
    gives,
    later,
    prices,
    raises,
    reads,
    refuses,
    rich,
    table,
    team,
    tell,
)
from sessions import Arena, Cast

plain = prices(min_balance=0, low_balance=0)
topup = ask.set_auto_topup("u", 20, 500)
get = ask.get_auto_topup("u")


def lot(points: int, until: str) -> Call:
    return ask.add_credits("u", points, expires_at=until)


def keys(ledger: Ledger) -> list[str]:
    """The keys announced so far, each as often as it was."""
    rows = ledger.sql("select payload ->> 'key' from ducto_private.events where type = 'topup_due' order by event_id")
    return [row[0] for row in rows]


def due(count: int = 1, **payload: Any) -> Check:
    """After this call so many top-ups were announced, the last with this payload."""

    def check(ledger: Ledger, call: Call) -> None:
        ledger.one(call)
        told = [payload for _, payload in ledger.events("topup_due")]
        assert len(told) == count, told
        for name, value in payload.items():
            assert told[-1][name] == value, told

    return check


def none_due(ledger: Ledger, call: Call) -> None:
    due(0)(ledger, call)


def fail(retry: int = 3600) -> Step:
    """The open one was not paid."""

    def step(ledger: Ledger) -> None:
        ask.fail_topup("u", ledger.one(get)["due_key"], retry)(ledger)

    return step


def pay(points: int = 500, user: str = "u") -> Step:
    """The open one is paid."""

    def step(ledger: Ledger) -> None:
        ask.add_credits(user, points, key=ledger.one(ask.get_auto_topup(user))["due_key"])(ledger)

    return step


def refused(call: Call) -> Step:
    return lambda ledger: refuses("insufficient_credits")(ledger, call)


# What leaves less than 20 of 100 available, and what does not.
CAUSES: list[Sentence] = [
    ("a charge", [rich, topup], ask.deduct("u", costs(81)), due(1, threshold=20, amount=500, available=19)),
    ("a charge down to the threshold", [rich, topup], ask.deduct("u", costs(80)), none_due),
    ("a hold", [rich, topup], ask.reserve_credits("u", 81), due(1, available=19)),
    ("an extension", [rich, topup, ask.reserve_credits("u", 50)], ask.extend_reservation("@hold", 31), due()),
    ("a settlement", [rich, topup, ask.reserve_credits("u", 10)], ask.deduct("u", costs(90), hold="@hold"), due()),
    ("a job", [rich, topup, ask.deduct("u", costs(80))], ask.deduct_fixed("u", "report"), due(1, available=13)),
    ("one of a batch", [rich, topup],
     ask.deduct_batch([{"user_id": "u", "amount": 81}]), due(1, available=19)),
    ("a removal", [rich, topup], ask.remove_credits("u", 90), due(1, available=10)),
    ("a limit lowered", [ask.add_credits("u", 10), ask.set_credit_limit("u", 50), topup], ask.set_credit_limit("u", 5),
     due(1, available=15)),
    ("setting it below", [ask.add_credits("u", 19)], topup, due(1, available=19)),
    ("setting it at the threshold", [ask.add_credits("u", 20)], topup, none_due),
    ("raising the threshold", [rich, topup], ask.set_auto_topup("u", 101, 7), due(1, threshold=101, amount=7)),
    ("an expiry, with the sweep", [ask.add_credits("u", 5), lot(50, "2026-01-02"), topup, at("2026-01-02")],
     ask.sweep_expired_credits(), due(1, available=5)),
    ("an expiry, with the next call", [ask.add_credits("u", 5), lot(50, "2026-01-02"), topup, at("2026-01-02")],
     ask.set_spend_cap("u", 9), due(1, available=5)),
    ("a refusal", [ask.add_credits("u", 5), lot(50, "2026-01-02"), topup, at("2026-01-02")],
     ask.deduct("u", costs(9)), due(1, available=5)),
    ("a refusal with enough for others", [rich, topup], ask.deduct("u", costs(101)), none_due),
    ("a refusal for a cap", [rich, ask.set_spend_cap("u", 5), topup], ask.deduct("u", costs(99)), none_due),
    ("the allowance, used up", [prices(min_balance=0, plans={"free": FREE["free"] | {"free_allowance": 25}}),
     ask.set_user_plan("u", "free"), topup], ask.deduct("u", costs(6)), due(1, available=19)),
    ("a plan taken away", [prices(min_balance=0, plans={"free": FREE["free"] | {"free_allowance": 25}}),
     ask.set_user_plan("u", "free"), topup], ask.set_user_plan("u"), due(1, available=0)),
    ("a grant that is not enough, at a debt", [rich, ask.remove_credits("u", 150), topup, pay(10)],
     ask.check_allowance("u"), due(2, available=0)),
]  # fmt: skip


@table(*CAUSES)
def test_one_is_due_whatever_left_too_little(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [plain, *given], call, check)


def test_a_pool_is_topped_up(ledger: Ledger) -> None:
    team("t", "ann")(ledger)
    ask.set_auto_topup("t", 50, 200)(ledger)
    due(1, available=40, amount=200)(ledger, ask.deduct_team_credits("t", "ann", 60))
    pay(200, "t")(ledger)
    gives(status="ready", this_month=1, due_key=None)(ledger, ask.get_auto_topup("t"))


# fmt: off
@table(
    ("it is ready", [rich, topup], get, reads(user_id="u", threshold=20, amount=500, max_per_month=10, status="ready",
     due_key=None, this_month=0)),
    ("one is due", [rich, topup, ask.deduct("u", costs(90))], get, reads(status="due", this_month=1)),
    ("while it is open, no other", [rich, topup, ask.deduct("u", costs(90))], ask.deduct("u", costs(5)), due(1)),
    ("paid, it is over", [rich, topup, ask.deduct("u", costs(90)), pay()], get, reads(status="ready", this_month=1)),
    ("other credits do not end it", [rich, topup, ask.deduct("u", costs(90)), rich], get, reads(status="due")),
    ("then the next", [rich, topup, ask.deduct("u", costs(90)), pay()], ask.deduct("u", costs(500)), due(2)),
    ("one that failed waits", [rich, topup, ask.deduct("u", costs(90)), fail()], get,
     reads(status="waiting", this_month=0, due_key=None)),
    ("meanwhile none opens", [rich, topup, ask.deduct("u", costs(90)), fail(), later(seconds=3599)],
     ask.deduct("u", costs(1)), due(1)),
    ("until a call after the wait", [rich, topup, ask.deduct("u", costs(90)), fail(), later(seconds=3600)],
     ask.deduct("u", costs(1)), due(2)),
    ("or the sweep", [rich, topup, ask.deduct("u", costs(90)), fail(), later(seconds=3600)],
     ask.sweep_expired_credits(), due(2)),
    ("or a refusal, not the first", [rich, topup, refused(ask.deduct("u", costs(101))), ask.deduct("u", costs(90)),
     fail(), refused(ask.deduct("u", costs(101))), refused(ask.deduct("u", costs(101))), later(seconds=3600)],
     ask.deduct("u", costs(101)), due(2)),
    ("no wait at all", [rich, topup, ask.deduct("u", costs(90)), fail(0)], get, reads(status="due", this_month=1)),
    ("a month has an end", [rich, ask.set_auto_topup("u", 20, 5, 1), ask.deduct("u", costs(90)), pay(5)], get,
     reads(status="exhausted", this_month=1)),
    ("after which none opens", [rich, ask.set_auto_topup("u", 20, 5, 1), ask.deduct("u", costs(90)), pay(5)],
     ask.deduct("u", costs(1)), due(1)),
    ("until the next", [at("2026-01-20"), rich, ask.set_auto_topup("u", 20, 5, 1), ask.deduct("u", costs(90)),
     pay(5), at("2026-02-01")],
     ask.sweep_expired_credits(), due(2)),
    ("one that failed leaves room", [rich, ask.set_auto_topup("u", 20, 5, 1), ask.deduct("u", costs(90)), fail(0)], get,
     reads(status="due", this_month=1)),
    ("it counts where it opened", [at("2026-01-31T23:59"), rich, topup, ask.deduct("u", costs(90)), at("2026-02-01")],
     get, reads(status="due", this_month=0)),
    ("also where it fails", [at("2026-01-31T23:59"), rich, topup, ask.deduct("u", costs(90)), at("2026-02-01"),
     fail(0)],
     get, reads(status="due", this_month=1)),
    ("open for a day it is told again", [rich, topup, ask.deduct("u", costs(90)), later(hours=24)],
     ask.sweep_expired_credits(), due(2)),
    ("not sooner", [rich, topup, ask.deduct("u", costs(90)), later(hours=23)], ask.sweep_expired_credits(), due(1)),
    ("by a call too", [rich, topup, ask.deduct("u", costs(90)), later(hours=24)], ask.deduct("u", costs(1)), due(2)),
    ("and a day later again", [rich, topup, ask.deduct("u", costs(90)), later(hours=24), ask.sweep_expired_credits(),
     later(hours=24), ask.sweep_expired_credits()], ask.sweep_expired_credits(), due(3)),
    ("removed it was", [rich, topup, ask.deduct("u", costs(90))], ask.remove_auto_topup("u"),
     gives(status="due", threshold=20, amount=500)),
    ("and is gone", [rich, topup, ask.remove_auto_topup("u")], get, refuses("topup_not_found")),
    ("so that none is due", [rich, topup, ask.remove_auto_topup("u")], ask.deduct("u", costs(99)), none_due),
    ("set anew the month goes on", [rich, topup, ask.deduct("u", costs(90)), ask.remove_auto_topup("u")],
     ask.set_auto_topup("u", 5, 5), gives(status="ready", this_month=1)),
    ("there is none to remove", [rich], ask.remove_auto_topup("u"), refuses("topup_not_found")),
    ("nor of nobody", [], get, refuses("topup_not_found")),
    ("nobody has one", [], topup, refuses("account_not_found")),
    ("another key fails nothing", [rich, topup, ask.deduct("u", costs(90))], ask.fail_topup("u", "k"),
     refuses("topup_not_found")),
    ("nor no key", [rich, topup], ask.fail_topup("u", None), refuses("topup_not_found")),
    ("no threshold", [rich], ask.set_auto_topup("u", 0, 5), raises("22023", "p_threshold")),
    ("no amount", [rich], ask.set_auto_topup("u", 5, 0), raises("22023", "p_amount")),
    ("no times", [rich], ask.set_auto_topup("u", 5, 5, 0), raises("22023", "p_max_per_month")),
    ("a wait below 0", [rich], ask.fail_topup("u", "k", -1), raises("22023", "p_retry_seconds")),
)
def test_a_top_up(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [plain, *given], call, check)
# fmt: on


def test_one_is_told_again_under_its_key(ledger: Ledger) -> None:
    for step in (plain, rich, topup, ask.deduct("u", costs(90)), later(hours=24), ask.sweep_expired_credits()):
        step(ledger)
    first, again = keys(ledger)
    assert first == again == ledger.one(get)["due_key"]
    pay()(ledger)
    ask.deduct("u", costs(500))(ledger)
    assert len(set(keys(ledger))) == 2


def test_eight_sessions_cross_the_threshold_and_one_is_due(arena: Arena) -> None:
    arena.given(rich, topup)
    answers = arena.meet(8, lambda number: ask.deduct_credits("u", 11, key=f"k{number}"))
    assert [row["error"] for row in answers] == [None] * 8
    assert len(keys(arena.ledger)) == 1
    pay(100)(arena.ledger)
    arena.given(ask.reserve_credits("u", 95))
    key = arena.ledger.one(get)["due_key"]
    failed = arena.meet(8, lambda _: ask.fail_topup("u", key, 0))
    assert sorted(row["error"] or "" for row in failed) == [""] + ["topup_not_found"] * 7
    assert len(keys(arena.ledger)) == len(set(keys(arena.ledger))) == 3
    arena.sound()


def test_eight_refusals_and_sweeps_announce_one(arena: Arena) -> None:
    arena.given(ask.add_credits("u", 5), lot(50, "2026-01-02"), topup)
    arena.clock.set("2026-01-02")
    calls = [ask.deduct_credits("u", 9), ask.sweep_expired_credits(), ask.reserve_credits("u", 9), ask.get_balance("u")]
    arena.meet(8, lambda number: calls[number % 4])
    assert len(keys(arena.ledger)) == 1
    assert len(arena.ledger.events("refused")) == 1
    arena.sound()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_top_up_deadlocks_with_nothing(connect: Connect, clock: Clock, conn: Connection, end: str) -> None:
    """One session holds two accounts; all else that touches them waits, in every order, and ends."""
    ledger = Ledger(conn, clock)
    ledger.publish(min_balance=0)
    clock.set("2026-01-01")
    for user in ("a", "b"):
        for step in (
            ask.add_credits(user, 10),
            ask.add_credits(user, 50, expires_at="2026-01-02"),
            ask.set_auto_topup(user, 20, 5),
        ):
            step(ledger)
    clock.set("2026-01-02")
    batch = [{"user_id": user, "amount": 1} for user in ("b", "a")]
    cast = Cast(connect, 7)
    try:
        cast.open(0, lambda m: m.deduct_batch(batch))
        cast.start(1, lambda m: m.deduct_batch(batch))
        cast.start(2, lambda m: m.erase_user("a"))
        cast.start(3, lambda m: m.deduct_credits("b", 1000))
        cast.start(4, lambda m: m.sweep_expired_credits())
        cast.start(5, lambda m: m.fail_topup("a", "another"))
        cast.start(6, lambda m: m.ack_events([event.event_id for event in m.fetch_events()][::-1]))
        cast.sessions[0].execute(end)
        cast.answers()
    finally:
        cast.close()
    told: list[Row] = [{"account": row[0]} for row in ledger.sql("select account_id from ducto_private.auto_topups")]
    assert len(told) == 2
    assert ledger.violations() == []


# fmt: off
@table(
    ("a hold", [], ask.reserve_credits("u", 1), refuses("account_frozen")),
    ("a charge", [], ask.deduct("u", costs(1)), refuses("account_frozen")),
    ("an extension", [], ask.extend_reservation("@hold", 1), refuses("account_frozen", reserved_total=30)),
    ("a settlement goes on", [], ask.deduct("u", costs(9), hold="@hold"), gives(amount=-9)),
    ("a grant", [], ask.add_credits("u", 5), gives(new_balance=95)),
    ("a refund", [], ask.refund_credits("@charge"), gives(amount=10)),
    ("a removal", [], ask.remove_credits("u", 5), gives(amount=-5)),
    ("a replay", [], ask.deduct_credits("u", 10, key="k"), gives(idempotent=True)),
    ("an element", [], ask.deduct_batch([{"user_id": "u", "amount": 1}]), refuses("account_frozen", balance_after=90)),
    ("thawed", [ask.freeze_account("u", False)], ask.deduct("u", costs(1)), gives(amount=-1)),
    ("null is true", [ask.freeze_account("u", False), ask.freeze_account("u", None)], ask.deduct("u", costs(1)),
     refuses("account_frozen")),
    ("another account", [ask.add_credits("v", 9)], ask.deduct("v", costs(1)), gives(amount=-1)),
    ("its answer", [], ask.freeze_account("u"), gives(user_id="u", balance=90, reserved=30)),
    ("nobody", [], ask.freeze_account("nobody"), refuses("account_not_found")),
    ("a team", [team("t", "ann"), ask.freeze_account("t")], ask.deduct_team_credits("t", "ann", 1),
     refuses("account_frozen")),
    ("a team's hold", [team("t", "ann"), ask.freeze_account("t")], ask.reserve_team_credits("t", "ann", 1),
     refuses("account_frozen")),
    ("no funds come after it", [], ask.deduct("u", costs(999)), refuses("account_frozen")),
)
def test_a_frozen_account(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    frozen = [rich, ask.deduct_credits("u", 10, key="k"), ask.reserve_credits("u", 30), ask.freeze_account("u")]
    tell(ledger, [plain, *frozen, *given], call, check)
# fmt: on

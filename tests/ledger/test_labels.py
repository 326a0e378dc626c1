"""Labels as sentences: what of them is kept, what their caps bound, and what they spent."""

from typing import Any

import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    but,
    costs,
    gives,
    hold,
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
from sessions import Arena

PLANS = {"pro": {"id": "pro", "name": "Pro", "free_allowance": 100}}
EIGHT = [f"label {number}" for number in range(8)]
OVER = ["spend_cap_exceeded"]

rich = ask.add_credits("u", 1000)
denied = refuses("spend_cap_exceeded")
unsound = lists({"error": "invalid_argument"})
of_key = ask.set_spend_cap("u", 50, label="key")


def charge(amount: int, *labels: str, **more: Any) -> Call:
    return ask.deduct_credits("u", amount, labels=labels, **more)


def reserve(amount: int, *labels: str, **more: Any) -> Call:
    return ask.reserve_credits("u", amount, labels=labels, **more)


def settle(amount: int, *labels: str, **more: Any) -> Call:
    return charge(amount, *labels, hold="@hold", **more)


def batch(*charges: dict[str, Any]) -> Call:
    return ask.deduct_batch([{"user_id": "u", "amount": 1, **charge} for charge in charges])


# fmt: off
@table(
    ("of a charge", [charge(1, "key", "chat")], ask.get_transaction("@charge"), reads(labels=["chat", "key"])),
    ("of a usage", [ask.deduct("u", costs(1), labels=("key",))], ask.get_transaction("@charge"), reads(labels=["key"])),
    ("of a job", [ask.deduct_fixed("u", "report", labels=("key",))], ask.get_transaction("@charge"),
     reads(labels=["key"])),
    ("each once", [charge(1, "b", "a", "b")], ask.get_transaction("@charge"), reads(labels=["a", "b"])),
    ("byte by byte", [charge(1, "b", "B", "ä", " a")], ask.get_transaction("@charge"),
     reads(labels=[" a", "B", "b", "ä"])),
    ("eight, whatever is named twice", [charge(1, *EIGHT, *EIGHT)], ask.get_transaction("@charge"),
     reads(labels=EIGHT)),
    ("of a hundred characters", [charge(1, "ä" * 100)], ask.get_transaction("@charge"), reads(labels=["ä" * 100])),
    ("none", [charge(1)], ask.get_transaction("@charge"), reads(labels=None)),
    ("of a hold", [reserve(9, "key", "chat")], ask.get_reservation("@hold"), reads(labels=["chat", "key"])),
    ("of an estimate", [ask.reserve("u", costs(1), labels=("key",))], ask.list_reservations("u"),
     lists({"labels": ["key"]})),
    ("of a hold without any", [hold], ask.get_reservation("@hold"), reads(labels=None)),
    ("a settlement has its hold's", [reserve(9, "key"), settle(1)], ask.get_transaction("@charge"),
     reads(labels=["key"])),
    ("and its own", [reserve(9, "key", "z"), settle(1, "a", "z")], ask.get_transaction("@charge"),
     reads(labels=["a", "key", "z"])),
    ("its own alone", [hold, settle(1, "a")], ask.get_transaction("@charge"), reads(labels=["a"])),
    ("all of both", [reserve(9, *EIGHT), settle(1, "a", "b", "c")], ask.get_transaction("@charge"),
     reads(labels=["a", "b", "c", *EIGHT])),
    ("a part too", [reserve(9, "key"), settle(1, "a", final=False)], ask.get_transaction("@charge"),
     reads(labels=["a", "key"])),
    ("a refund has its charge's", [charge(5, "key"), ask.refund_credits("@charge", 2)], ask.get_transaction("@refund"),
     reads(labels=["key"])),
    ("in a batch", [batch({"labels": ["key", "chat"]}, {"labels": []}, {"labels": None}, {})],
     ask.list_transactions("u", 4), lists({"labels": None}, {"labels": None}, {"labels": None},
     {"labels": ["chat", "key"]})),
    ("of a pool", [team("crew", "ann"), ask.deduct_team_credits("crew", "ann", 1, labels=("key",))],
     ask.get_transaction("@charge"), reads(labels=["key"])),
    ("of its holds", [team("crew", "ann"), ask.reserve_team_credits("crew", "ann", 1, labels=("key",)),
     ask.deduct_team("crew", "ann", costs(1), hold="@hold")], ask.get_transaction("@charge"), reads(labels=["key"])),
    ("nine", [], charge(1, *EIGHT, "one more"), raises("22023", "p_labels", "9", "at most 8")),
    ("of 101 characters", [], charge(1, "a" * 101), raises("22023", "p_labels", "1 to 100")),
    ("nothing", [], charge(1, ""), raises("22023", "p_labels", "1 to 100")),
    ("blank", [], charge(1, "\u00a0 "), raises("22023", "p_labels", "not all blank")),
    ("a null", [], ask.deduct_credits("u", 1, labels=("a", None)), raises("22023", "p_labels", "null")),
    ("blank at a hold", [], reserve(1, "\t"), raises("22023", "p_labels")),
    ("blank at a settlement", [hold], settle(1, " "), raises("22023", "p_labels")),
    ("wrong in a batch", [], batch({"labels": [""]}), unsound),
    ("no list", [], batch({"labels": "key"}), unsound),
    ("numbers", [], batch({"labels": ["key", 1]}), unsound),
    ("lists", [], batch({"labels": [["key"]]}), unsound),
    ("nine in a batch", [], batch({"labels": [*EIGHT, "one more"]}), unsound),
    ("a batch holds nothing that could overrun", [], batch({"overrun": "debt"}), unsound),
)
def test_labels_are_kept_with_a_row(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


@table(
    ("the same set", [charge(1, "a", "b", key="k")], ask.deduct_credits("u", 1, labels=("b", "a", "b"), key="k"),
     gives(idempotent=True)),
    ("another", [charge(1, "a", "b", key="k")], charge(1, "a", key="k"), refuses("idempotency_conflict")),
    ("none", [charge(1, "a", key="k")], ask.deduct_credits("u", 1, key="k"), refuses("idempotency_conflict")),
    ("none is an empty list", [ask.deduct_credits("u", 1, key="k")], charge(1, key="k"), gives(idempotent=True)),
    ("of a usage", [ask.deduct("u", costs(1), "k", labels=("b", "a"))],
     ask.deduct("u", costs(1), "k", labels=("a", "b")), gives(idempotent=True)),
    ("another of a usage", [ask.deduct("u", costs(1), "k", labels=("b",))], ask.deduct("u", costs(1), "k"),
     refuses("idempotency_conflict")),
    ("in a batch", [charge(1, "a", "b", key="k")], batch({"idempotency_key": "k", "labels": ["b", "a"]}),
     gives(idempotent=True)),
    ("of a hold", [reserve(1, "a", "b", key="k")], reserve(1, "b", "a", "a", key="k"), gives(idempotent=True)),
    ("another of a hold", [reserve(1, "a", key="k")], reserve(1, "b", key="k"), refuses("idempotency_conflict")),
    ("of a settlement its own", [reserve(9, "key"), settle(1, "a", key="k")], settle(1, "a", key="k"), replays()),
    ("not its hold's", [reserve(9, "key"), settle(1, "a", key="k")], settle(1, "a", "key", key="k"),
     refuses("idempotency_conflict")),
    ("nor without a key", [reserve(9, "key"), settle(1, "a")], settle(1, "a", "key"), refuses("idempotency_conflict")),
    ("what the hold does beyond it too", [reserve(9, key="k", overrun="bounded")], reserve(9, key="k"),
     refuses("idempotency_conflict")),
    ("also where it says what the config says", [reserve(9, key="k")], reserve(9, key="k", overrun="debt"),
     refuses("idempotency_conflict")),
)
def test_labels_are_part_of_a_request(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


@table(
    ("to its limit", [of_key], charge(50, "key", "chat"), gives(amount=-50, warnings=[])),
    ("no further", [of_key], charge(51, "a", "key", "z"), denied),
    ("in all", [of_key, charge(30, "key")], charge(21, "key"), denied),
    ("not what lacks it", [of_key, charge(50, "key")], charge(500), gives()),
    ("nor what has another", [of_key, charge(50, "key")], charge(500, "Key", "chat"), gives()),
    ("others count nothing to it", [of_key, charge(500), charge(100, "chat")], charge(50, "key"), gives()),
    ("a usage", [of_key], ask.deduct("u", costs(51), labels=("key",)), denied),
    ("a job", [ask.set_spend_cap("u", 6, label="key")], ask.deduct_fixed("u", "report", labels=("key",)), denied),
    ("a batch", [of_key, batch({"amount": 30, "labels": ["key"]})], batch({"amount": 21, "labels": ["key"]}),
     lists({"error": "spend_cap_exceeded"})),
    ("a label of a model's name", [ask.set_spend_cap("u", 50, label="gpt"), charge(50, "gpt")],
     charge(9, model="gpt"), gives()),
    ("a model of a label's name", [ask.set_spend_cap("u", 50, model="key"), ask.deduct_credits("u", 50, model="key")],
     charge(9, "key"), gives()),
    ("each of two", [of_key, ask.set_spend_cap("u", 20, "monthly", label="chat")], charge(21, "chat", "key"), denied),
    ("within both", [of_key, ask.set_spend_cap("u", 20, "monthly", label="chat"), charge(20, "chat", "key")],
     ask.list_spend_caps("u"), lists({"label": "key", "spent": 20}, {"label": "chat", "spent": 20, "model": None})),
    ("beside one of everything", [of_key, ask.set_spend_cap("u", 20)], charge(21, "key"), denied),
    ("a hold", [of_key], reserve(51, "key"), denied),
    ("a hold and a charge", [of_key, reserve(30, "key")], charge(21, "key"), denied),
    ("to the credit", [of_key, reserve(30, "key"), reserve(500, "chat")], charge(20, "key"), gives()),
    ("what extends it has its labels", [of_key, reserve(30, "key")], ask.extend_reservation("@hold", 21, user_id="u"),
     denied),
    ("an expired hold does not", [of_key, reserve(50, "key"), later(minutes=10)], charge(50, "key"), gives()),
    ("a settlement is told", [of_key, reserve(30, "key")], settle(51),
     gives(amount=-51, warnings=["hold_exceeded", *OVER])),
    ("and counts", [of_key, reserve(30, "key"), settle(30)], charge(21, "key"), denied),
    ("by its own labels too", [of_key, hold, settle(30, "key")], charge(21, "key"), denied),
    ("a refund gives room", [of_key, charge(50, "key"), ask.refund_credits("@charge", 20)], charge(20, "key"), gives()),
    ("and no more", [of_key, charge(50, "key"), ask.refund_credits("@charge", 20)], charge(21, "key"), denied),
    ("a refund of another's does not", [of_key, charge(9), charge(50, "key"), ask.refund_credits("@charge1")],
     charge(1, "key"), denied),
    ("set in the midst", [charge(30, "key"), charge(9), of_key], charge(21, "key"), denied),
    ("net of refunds", [charge(30, "key"), charge(9, "key"), ask.refund_credits("@charge2"), of_key], charge(20, "key"),
     gives()),
    ("with what its holds hold", [reserve(30, "key"), of_key], charge(21, "key"), denied),
    ("removed", [of_key, ask.remove_spend_cap("u", "daily", label="key")], charge(51, "key"), gives()),
    ("one of all is not removed by a label", [of_key, ask.set_spend_cap("u", 9)],
     ask.remove_spend_cap("u", "daily", label="other"), refuses("cap_not_found")),
    ("that warns", [ask.set_spend_cap("u", 9, action="warn", label="key")], charge(10, "key"), gives(warnings=OVER)),
    ("the next day", [of_key, charge(50, "key"), later(days=1)], charge(50, "key"), gives()),
    ("a session's whole life", [ask.set_spend_cap("u", 50, "lifetime", label="s"), charge(30, "s"), later(days=800)],
     charge(21, "s"), denied),
    ("what the allowance pays is no spend", [prices(plans=PLANS), ask.set_user_plan("u", "pro"), of_key],
     charge(150, "key"), gives(amount=-50)),
    ("and no more than that", [prices(plans=PLANS), ask.set_user_plan("u", "pro"), of_key], charge(151, "key"), denied),
    ("a pool", [team("crew", "ann", "bob"), ask.set_spend_cap("crew", 50, label="key"),
     ask.deduct_team_credits("crew", "ann", 30, labels=("key",))],
     ask.deduct_team_credits("crew", "bob", 21, labels=("key",)), denied),
    ("a pool's holds", [team("crew", "ann", "bob"), ask.set_spend_cap("crew", 50, label="key"),
     ask.reserve_team_credits("crew", "ann", 30, labels=("key",))],
     ask.deduct_team("crew", "bob", costs(21), labels=("key",)), denied),
    ("not a member's own account", [team("crew", "u"), of_key],
     ask.deduct_team_credits("crew", "u", 51, labels=("key",)), gives()),
    ("of a model and a label", [], ask.set_spend_cap("u", 1, model="gpt", label="key"),
     raises("22023", "a model", "a label", "both")),
    ("removing one of both", [of_key], ask.remove_spend_cap("u", "daily", "gpt", "key"), raises("22023", "both")),
    ("blank", [], ask.set_spend_cap("u", 1, label=" "), raises("22023", "p_label", "not all blank")),
    ("of 101 characters", [], ask.set_spend_cap("u", 1, label="a" * 101), raises("22023", "p_label", "1 to 100")),
    ("told by its answer", [], of_key, gives(label="key", model=None, cap_type="daily", limit=50)),
)
def test_a_cap_on_a_label(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)


spent: list[Step] = [charge(5, "key", "chat"), charge(7, "key"), charge(9), ask.refund_credits("@charge1")]


@table(
    ("a charge with two counts for each, gross of refunds", spent, ask.spend_by_label(),
     lists({"label": "key", "total_spend": 12, "transaction_count": 2},
           {"label": "chat", "total_spend": 5, "transaction_count": 1})),
    ("by name where they spent the same", [charge(5, "b", "a")], ask.spend_by_label(),
     lists({"label": "a"}, {"label": "b"})),
    ("what was debited", [prices(plans=PLANS), ask.set_user_plan("u", "pro"), charge(130, "key")], ask.spend_by_label(),
     lists({"total_spend": 30})),
    ("a charge of nothing too", [charge(0, "key")], ask.spend_by_label(),
     lists({"total_spend": 0, "transaction_count": 1})),
    ("no labels", [charge(5)], ask.spend_by_label(), lists()),
    ("in a window", [at("2026-01-01"), charge(1, "a"), at("2026-01-02"), charge(2, "b"), at("2026-01-03"),
     charge(4, "c")], ask.spend_by_label("2026-01-02Z", "2026-01-03Z"), lists({"label": "b", "total_spend": 2})),
    ("of one user", [*spent, ask.add_credits("v", 50), ask.deduct_credits("v", 9, labels=("key",))],
     ask.spend_by_label(user_id="v"), lists({"label": "key", "total_spend": 9, "transaction_count": 1})),
    ("who is a member of a team too", [charge(5, "key"), team("crew", "u", "ann"),
     ask.deduct_team_credits("crew", "u", 7, labels=("key",)),
     ask.deduct_team_credits("crew", "ann", 9, labels=("key",))],
     ask.spend_by_label(None, None, "u"), lists({"label": "key", "total_spend": 12, "transaction_count": 2})),
    ("of one user in a window", [at("2026-01-01"), charge(1, "a"), at("2026-01-02"), charge(2, "b"), at("2026-01-03"),
     charge(4, "c")], ask.spend_by_label("2026-01-02Z", "2026-01-03Z", "u"), lists({"label": "b"})),
    ("nobody", spent, ask.spend_by_label(user_id="new"), lists()),
    ("a window that ends before it begins", [], ask.spend_by_label("2026-01-02", "2026-01-01"),
     raises("22023", "p_end", "p_start")),
)
def test_spend_by_label(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [rich, *given], call, check)
# fmt: on


def test_a_charge_sums_no_history(ledger: Ledger) -> None:
    """A label first used at the end of a month finds its cap counted, however much others spent."""
    ledger.clock.set("2026-01-05T00:00+00")
    for step in (
        rich,
        charge(8, "key"),
        team("crew", "ann"),
        ask.add_team_member("crew", "ann", "lead", 50, "monthly"),
    ):
        step(ledger)
    for kind in ("daily", "weekly", "monthly", "lifetime"):
        ask.set_spend_cap("u", 50, kind, label="key")(ledger)
    ledger.clock.set("2026-02-28T12:00+00")
    with ledger.conn.transaction(force_rollback=True):
        ledger.sql(
            "create or replace function ducto_private.window_spent(p_account_id text, p_period text, p_first date,"
            " p_zone text, p_subject text, p_member_id text) returns numeric language plpgsql"
            " as $$ begin raise exception 'summed'; end $$"
        )
        charge(5, "key")(ledger)
        ask.deduct_team_credits("crew", "ann", 5)(ledger)
        lists(
            {"cap_type": "daily", "spent": 5},
            {"cap_type": "lifetime", "spent": 13, "resets_at": None},
            {"cap_type": "monthly", "spent": 5},
            {"cap_type": "weekly", "spent": 5},
        )(ledger, ask.list_spend_caps("u"))


def test_the_event_of_a_cap_names_its_label(ledger: Ledger) -> None:
    for step in (rich, of_key, charge(49, "key"), charge(1, "key"), but(denied, charge(1, "key"))):
        step(ledger)
    told = {"cap_type": "daily", "model": None, "label": "key", "limit": 50, "spent": 50, "action": "deny"}
    assert ledger.events("cap_reached") == [("cap_reached", told)]


# A week of Europe/Berlin that begins in the year before, and one that ends with a day of 25 hours.
WEEKS = [
    ("2025-12-28T22:59:59.999999Z", "2025-12-28T23:00Z", "2026-01-04T23:00Z"),
    ("2026-10-18T21:59:59Z", "2026-10-18T22:00Z", "2026-10-25T23:00Z"),
]


@pytest.mark.parametrize(("eve", "begins", "ends"), WEEKS)
def test_a_week_begins_on_monday(conn: Connection, clock: Clock, eve: str, begins: str, ends: str) -> None:
    ledger = Ledger(conn, clock)
    ledger.publish(min_balance=0, timezone="Europe/Berlin")
    clock.set(eve)
    for step in (rich, ask.set_spend_cap("u", 10, "weekly"), charge(10), but(denied, charge(1))):
        step(ledger)
    clock.set(begins)
    for step in (charge(6), charge(4), but(denied, charge(1))):
        step(ledger)
    (cap,) = ledger.run(ask.list_spend_caps("u"))
    (ends_at,) = ledger.sql("select %s::timestamptz", ends)[0]
    assert (cap["spent"], cap["resets_at"]) == (10, ends_at)
    late = ask.set_spend_cap("u", 10, "weekly", action="warn")
    ask.remove_spend_cap("u", "weekly")(ledger)
    gives(spent=10)(ledger, late)
    clock.set(ends)
    gives(warnings=[])(ledger, charge(10))
    assert ledger.violations() == []


# Sessions that meet


@pytest.mark.parametrize("kind", ["daily", "weekly", "monthly", "lifetime"])
def test_charges_of_one_key(arena: Arena, kind: str) -> None:
    arena.given(rich, ask.set_spend_cap("u", 50, kind, label="key"))
    assert arena.race(16, charge(10, "key", "chat")) == {"ok": 5, "spend_cap_exceeded": 11}
    reads(balance=950)(arena.ledger, ask.get_balance("u"))
    arena.sound()


def test_holds_and_charges_of_one_key_on_a_pool(arena: Arena) -> None:
    arena.given(team("crew", "ann", "bob"), ask.set_spend_cap("crew", 50, "monthly", label="key"))
    calls = [
        ask.deduct_team_credits("crew", "ann", 7, labels=("key", "chat")),
        ask.reserve_team_credits("crew", "bob", 7, labels=("key",)),
    ]
    told = [row["error"] for row in arena.meet(16, lambda number: calls[number % 2])]
    assert (told.count(None), told.count("spend_cap_exceeded")) == (7, 9)
    arena.sound()

"""Many charges in one call: each stands or is refused by itself, as if they had been called one by one."""

import random
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    FREE,
    LONG,
    MOST,
    UNKNOWN,
    Call,
    Check,
    Ledger,
    Row,
    Step,
    ask,
    at,
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
    rich,
    rolled_back,
    table,
    team,
    tell,
)

crew = team("crew", "ann", "bob")


def batch(*elements: Any) -> Call:
    return ask.deduct_batch(list(elements))


def amount(credits: Any, user: str = "u", **more: Any) -> Row:
    return {"user_id": user, "amount": credits, **more}


def usage(points: int | str, user: str = "u", **more: Any) -> Row:
    return {"user_id": user, "metrics": costs(points), **more}


def job(name: Any, user: str = "u", **more: Any) -> Row:
    return {"user_id": user, "job": name, **more}


def row(spent: int, balance: int, **more: Any) -> Row:
    """A charge that was made: so much from the balance, and what is left."""
    return {"error": None, "amount": -spent, "balance_after": balance, "idempotent": False, **more}


def refused(error: str, balance: int = 0, **more: Any) -> Row:
    """A charge that was not."""
    nothing: Row = {
        "amount": 0,
        "cost": 0,
        "allowance_used": 0,
        "transaction_id": None,
        "user_id": None,
        "warnings": [],
    }
    return {"error": error, "balance_after": balance, "idempotent": False, "shortfall": 0, **nothing, **more}


def answers(*rows: Row) -> Check:
    """It answers a row for each element, in order, with these fields."""

    def check(ledger: Ledger, call: Call) -> None:
        found = ledger.run(call)
        assert len(found) == len(rows), found
        for answer, fields in zip(found, rows, strict=True):
            assert {name: answer[name] for name in fields} == ledger.named(fields), answer

    return check


def refuses_one(error: str, **fields: Any) -> Check:
    """The one element is refused, and nothing is written; with a good one beside it, that one stands."""

    def check(ledger: Ledger, call: Call) -> None:
        before = ledger.tables()
        answers(refused(error, **fields))(ledger, call)
        after = ledger.tables()
        if error == "insufficient_credits":  # The first tells, and flags the account's row.
            before |= {name: after[name] for name in ("accounts", "events")}
        assert after == before
        (element,) = call.positional[0]
        ask.add_credits("good", 10)(ledger)
        answers(row(1, 9), refused(error, **fields), row(2, 7))(
            ledger, batch(amount(1, "good"), element, amount(2, "good"))
        )

    return check


# fmt: off
@table(
    ("nothing", [], batch(), lists()),
    ("one of each kind", [rich], batch(usage("2.5"), amount(7, model="gpt"), job("report")),
     answers(row(2, 98, user_id="u", cost=Decimal("2.5"), allowance_used=0, shortfall=0, warnings=[], revision=2),
         row(7, 91, cost=7), row(7, 84, cost=7, revision=4))),
    ("in order, with what was carried", [rich], batch(usage("0.5"), usage("0.5"), usage("0.5"), usage("0.5")),
     answers(row(0, 100), row(1, 99), row(0, 99), row(1, 98))),
    ("of several accounts", [rich, ask.add_credits("v", 50)], batch(amount(1), amount(2, "v"), amount(3)),
     answers(row(1, 99, user_id="u"), row(2, 48, user_id="v"), row(3, 96))),
    ("what is refused leaves the rest", [rich], batch(amount(90), amount(90), amount(5)),
     answers(row(90, 10), refused("insufficient_credits", 10), row(5, 5))),
    ("nothing passes", [rich], batch(amount(0)), answers(row(0, 100))),
    ("charges of nothing are recorded", [rich, batch(amount(0), amount(0))], ask.list_transactions("u"),
     lists({"amount": 0}, {"amount": 0}, {"amount": 100})),
    ("nulls are as if left out", [rich],
     batch(amount(5, metrics=None, job=None, model=None, reservation_id=None, final=None, idempotency_key=None,
         metadata=None, team_id=None)), answers(row(5, 95))),
    ("metadata is kept", [rich, batch(amount(5, metadata={"a": 1}))], ask.get_transaction("@charge"),
     reads(metadata={"a": 1})),
    ("as is the model", [rich, batch(amount(5, model="gpt"))], ask.get_transaction("@charge"), reads(model="gpt")),
    ("a hold is settled", [rich, hold], batch(amount(20, reservation_id="@hold")), answers(row(20, 80))),
    ("in parts and to its end", [rich, hold],
     batch(amount(20, reservation_id="@hold", final=False), usage(5, reservation_id="@hold")),
     answers(row(20, 80), row(5, 75))),
    ("the end of a hold replays", [rich, hold],
     batch(amount(20, reservation_id="@hold"), amount(20, reservation_id="@hold"), amount(21, reservation_id="@hold")),
     answers(row(20, 80), row(20, 80) | {"idempotent": True}, refused("idempotency_conflict", 80))),
    ("one held before is kept", [rich, hold], batch(amount(66), amount(65)),
     answers(refused("insufficient_credits", 100), row(65, 35))),
    ("into debt", [rich, hold], batch(amount(101, reservation_id="@hold"), amount(1)),
     answers(row(101, -1, shortfall=1), refused("insufficient_credits", -1))),
    ("an expired hold", [rich, hold, later(minutes=10)], batch(amount(20, reservation_id="@hold")),
     answers(row(20, 80, warnings=["reservation_expired"]))),
    ("a key twice", [rich], batch(amount(5, idempotency_key="k"), amount(5, idempotency_key="k"), amount(1)),
     answers(row(5, 95), row(5, 95) | {"idempotent": True}, row(1, 94))),
    ("a key for something else", [rich], batch(amount(5, idempotency_key="k"), amount(6, idempotency_key="k")),
     answers(row(5, 95), refused("idempotency_conflict", 95))),
    ("a key of two accounts", [rich, ask.add_credits("v", 50)],
     batch(amount(5, idempotency_key="k"), amount(5, "v", idempotency_key="k")), answers(row(5, 95), row(5, 45))),
    ("a key that a call has used", [rich, ask.deduct_credits("u", 5, key="k")], batch(amount(5, idempotency_key="k")),
     answers(row(5, 95) | {"idempotent": True, "transaction_id": "@charge"})),
    ("for a usage", [rich, ask.deduct("u", costs("2.5"), "k", {"a": 1})], batch(usage("2.50", idempotency_key="k")),
     answers(row(2, 98) | {"idempotent": True, "transaction_id": "@charge"})),
    ("for a job", [rich, ask.deduct_fixed("u", "report", "k")], batch(job("report", idempotency_key="k")),
     answers(row(7, 93) | {"idempotent": True})),
    ("for a part of a hold", [rich, hold, ask.deduct_credits("u", 5, "@hold", "k", final=False)],
     batch(amount(5, reservation_id="@hold", idempotency_key="k", final=False)), answers({"idempotent": True})),
    ("not for its end", [rich, hold, ask.deduct_credits("u", 5, "@hold", "k", final=False)],
     batch(amount(5, reservation_id="@hold", idempotency_key="k")), answers(refused("idempotency_conflict", 95))),
    ("a call with a key that a batch has used", [rich, batch(amount(5, idempotency_key="k"))],
     ask.deduct_credits("u", 5, key="k"), gives(idempotent=True, balance_after=95)),
    ("a usage with one", [rich, batch(usage(5, idempotency_key="k"))], ask.deduct("u", costs(5), "k"),
     gives(idempotent=True)),
    ("a job with one", [rich, batch(job("report", idempotency_key="k"))], ask.deduct_fixed("u", "report", "k"),
     gives(idempotent=True)),
    ("of a team", [crew, batch({"team_id": "crew", **amount(5, "ann", idempotency_key="k")})],
     ask.deduct_team_credits("crew", "ann", 5, key="k"), gives(idempotent=True, team_balance_after=95)),
    ("of a team's usage", [crew, batch({"team_id": "crew", **usage(5, "ann", idempotency_key="k")})],
     ask.deduct_team("crew", "ann", costs(5), "k"), gives(idempotent=True)),
    ("a team's pool", [crew, ask.add_credits("ann", 50)],
     batch({"team_id": "crew", **amount(5, "ann")}, amount(6, "ann"), {"team_id": "crew", **usage("2.5", "bob")}),
     answers(row(5, 95), row(6, 44), row(2, 93))),
    ("is told its member", [crew, batch({"team_id": "crew", **amount(5, "ann")})], ask.get_transaction("@charge"),
     reads(account_id="crew", actor_id="ann", amount=-5)),
    ("a job of a team", [crew], batch({"team_id": "crew", **job("report", "ann")}), answers(row(7, 93))),
    ("a team's hold", [crew, ask.reserve_team_credits("crew", "ann", 30)],
     batch({"team_id": "crew", **amount(20, "ann", reservation_id="@hold")}), answers(row(20, 80))),
    ("a member's cap", [crew, ask.add_team_member("crew", "ann", None, 5)],
     batch({"team_id": "crew", **amount(5, "ann")}, {"team_id": "crew", **amount(1, "ann")},
         {"team_id": "crew", **amount(1, "bob")}),
     answers(row(5, 95), refused("member_cap_exceeded", 95), row(1, 94))),
    ("an account's cap", [rich, ask.set_spend_cap("u", 9)], batch(amount(5), amount(5), amount(4)),
     answers(row(5, 95), refused("spend_cap_exceeded", 95), row(4, 91))),
    ("that warns", [rich, ask.set_spend_cap("u", 9, action="warn")], batch(amount(9), amount(1)),
     answers(row(9, 91, warnings=[]), row(1, 90, warnings=["spend_cap_exceeded"]))),
    ("an allowance", [prices(plans=FREE), rich, ask.set_user_plan("u", "free")], batch(amount(7), amount(7)),
     answers(row(0, 100, allowance_used=7), row(4, 96, allowance_used=3))),
    ("lots", [prices(min_balance=0), ask.add_credits("u", 50),
     ask.add_credits("u", 20, expires_at="2026-01-10T00:00+00"), at("2026-01-10")], batch(amount(51), amount(50)),
     answers(refused("insufficient_credits", 50), row(50, 0))),
    ("accounts open", [prices(signup_bonus=50, min_balance=0)], batch(amount(5, "a"), amount(50, "b"), amount(5, "a")),
     answers(row(5, 45), row(50, 0), row(5, 40))),
    ("or do not", [prices(signup_bonus=50, min_balance=0)], batch(amount(51, "a"), amount(1, "b")),
     answers(refused("insufficient_credits", 0), row(1, 49))),
)
def test_deduct_batch(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


BAD_ELEMENTS: list[tuple[str, Any]] = [
    ("a number", 5), ("a text", "u"), ("a list", []), ("null", None), ("true", True), ("nothing", {}),
    ("no user", {"amount": 5}), ("a user that is null", {"user_id": None, "amount": 5}),
    ("a user that is a number", {"user_id": 7, "amount": 5}), ("an empty user", amount(5, "")),
    ("a user with a blank", amount(5, "u ")), ("a user of 256 characters", amount(5, LONG)),
    ("a team that is none", {"team_id": "", **amount(5, "ann")}),
    ("a team that is a number", {"team_id": 5, **amount(5, "ann")}),
    ("a team without a member", {"team_id": "crew", "amount": 5}),
    ("nothing to charge", {"user_id": "u"}), ("an amount and a job", amount(5, job="report")),
    ("an amount and a usage", usage(5, amount=5)), ("a usage and a job", usage(5, job="report")),
    ("a model of a usage", usage(5, model="gpt")), ("a model of a job", job("report", model="gpt")),
    ("an amount in quotes", amount("5")), ("an amount of 31 decimals", amount(Decimal("1e-31"))),
    ("less than nothing", amount(-1)),
    ("a true amount", amount(True)), ("an amount that is a list", amount([5])),
    ("more than there can be", amount(2**63)), ("very much more", '[{"user_id": "u", "amount": 1e400}]'),
    ("a key it does not know", amount(5, userId="u")), ("a misspelt one", amount(5, idempotencykey="k")),
    ("another call's", amount(5, min_balance=5)),
    ("a blank key", amount(5, idempotency_key=" ")), ("a key of 256 characters", amount(5, idempotency_key=LONG)),
    ("a key that is a number", amount(5, idempotency_key=5)),
    ("a hold that is a number", amount(5, reservation_id=5)),
    ("metadata that is a list", amount(5, metadata=[])), ("metadata that is a text", amount(5, metadata="a")),
    ("too much metadata", amount(5, metadata={"a": "".join(chr(200 + n % 5000) for n in range(20000))})),
    ("an end that is a text", amount(5, final="false")), ("a job that is a number", job(5)), ("an empty job", job("")),
    ("a blank job", job(" ")), ("a job of 256 characters", job(LONG)),
    ("a model that is a number", amount(5, model=5)), ("a model of 256 characters", amount(5, model=LONG)),
    ("a usage that is a list", {"user_id": "u", "metrics": []}),
    ("a negative count", {"user_id": "u", "metrics": {"model": "gpt", "input_tokens": -1}}),
    ("half a token", {"user_id": "u", "metrics": {"model": "gpt", "input_tokens": Decimal("0.5")}}),
    ("a count in quotes", {"user_id": "u", "metrics": {"model": "gpt", "input_tokens": "5"}}),
]


@pytest.mark.parametrize("element", [row[1] for row in BAD_ELEMENTS], ids=[row[0] for row in BAD_ELEMENTS])
def test_an_element_that_is_none_is_refused_by_itself(ledger: Ledger, element: Any) -> None:
    for step in (rich, crew, ask.add_credits("v", 33)):
        step(ledger)
    before = ledger.tables()
    call = ask.deduct_batch(element if isinstance(element, str) and element.startswith("[") else [element])
    (answer,) = ledger.run(call)
    assert (answer["error"], answer["amount"], answer["transaction_id"]) == ("invalid_argument", 0, None)
    assert ledger.tables() == before
    if call.positional[0] is element:
        return
    first, bad, last = ledger.run(batch(amount(1, "v"), element, amount(2, "v")))
    assert bad == answer
    assert (first["balance_after"], last["balance_after"]) == (32, 30)


@table(
    ("an unknown user", [], batch(amount(5, "new")), refuses_one("account_not_found")),
    ("an unknown model", [rich], batch({"user_id": "u", "metrics": {"model": "gpx", "input_tokens": 1}}),
     refuses_one("unknown_model", balance=100)),
    ("no model", [rich], batch({"user_id": "u", "metrics": {"input_tokens": 1}}),
     refuses_one("unknown_model", balance=100)),
    ("an unknown job", [rich], batch(job("reports")), refuses_one("unknown_job", balance=100)),
    ("an unknown job of a usage", [rich], batch({"user_id": "u", "metrics": {"fixed_job": "reports"}}),
     refuses_one("unknown_job", balance=100)),
    ("an unknown metric", [rich], batch({"user_id": "u", "metrics": {"inputTokens": 1}}),
     refuses_one("unknown_metric", balance=100)),
    ("a division by zero", [rich], batch({"user_id": "u", "metrics": {"model": "ratio", "input_tokens": 1}}),
     refuses_one("formula_error", balance=100)),
    ("a cost beyond bigint", [rich], batch({"user_id": "u", "metrics": {"model": "square", "input_tokens": 10**12}}),
     refuses_one("out_of_range", balance=100)),
    ("a balance beyond bigint", [rich, hold, ask.remove_credits("u", MOST)],
     batch(amount(1000, reservation_id="@hold")), refuses_one("out_of_range", balance=100 - MOST)),
    ("too much", [rich], batch(amount(96)), refuses_one("insufficient_credits", balance=100)),
    ("more than is left of it all", [rich, prices(overrun="reject"), hold], batch(amount(101, reservation_id="@hold")),
     refuses_one("insufficient_credits", balance=100, shortfall=1)),
    ("no such hold", [rich], batch(amount(5, reservation_id=UNKNOWN)),
     refuses_one("reservation_not_found", balance=100)),
    ("a hold that is none", [rich], batch(amount(5, reservation_id="x")),
     refuses_one("reservation_not_found", balance=100)),
    ("an ended hold", [rich, hold, ask.release_reservation("@hold")], batch(amount(5, reservation_id="@hold")),
     refuses_one("reservation_not_active", balance=100)),
    ("a team as a user", [crew], batch(amount(5, "crew")), refuses_one("is_a_team", balance=100)),
    ("no such team", [crew], batch({"team_id": "other", **amount(5, "ann")}), refuses_one("team_not_found")),
    ("a user as a team", [rich], batch({"team_id": "u", **amount(5, "ann")}), refuses_one("team_not_found")),
    ("no member", [crew], batch({"team_id": "crew", **amount(5, "cid")}), refuses_one("not_a_member", balance=100)),
    ("too much for a team", [crew], batch({"team_id": "crew", **amount(101, "ann")}),
     refuses_one("insufficient_credits", balance=100)),
    ("a key that is taken", [rich, ask.deduct_credits("u", 5, key="k")], batch(amount(6, idempotency_key="k")),
     refuses_one("idempotency_conflict", balance=95)),
)
def test_what_an_element_is_refused_for(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("nothing", [], ask.deduct_batch(None), raises("22023", "p_charges", "list")),
    ("an object", [], ask.deduct_batch({"user_id": "u", "amount": 5}), raises("22023", "p_charges", "object")),
    ("a number", [], ask.deduct_batch(5), raises("22023", "p_charges", "number")),
    ("a text", [], ask.deduct_batch('"u"'), raises("22023", "p_charges", "string")),
)
def test_a_batch_is_a_list(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_a_refused_element_tells_nothing_of_another_account(ledger: Ledger) -> None:
    for step in (rich, ask.add_credits("v", 33)):
        step(ledger)
    found = ledger.run(batch(amount(1, "v"), 5, amount(-1), {"amount": 1}, amount(1, "u", userId="u")))
    assert [answer["balance_after"] for answer in found] in ([32, 0, 100, 0, 100], [32, 0, 0, 0, 0])
    assert found[1]["revision"] == 0


def test_before_there_are_prices_nothing_is_charged(conn: Connection, clock: Clock) -> None:
    ledger = Ledger(conn, clock)
    rich(ledger)
    for elements in ([], [amount(5)], [amount(-1)], [5]):
        with pytest.raises(psycopg.Error, match="pricing not loaded") as raised:
            ledger.run(ask.deduct_batch(elements))
        assert raised.value.sqlstate == "DU001"
    reads(balance=100, revision=1)(ledger, ask.get_balance("u"))


ERRORS = {
    "22023": "invalid_argument",
    "22003": "out_of_range",
    "DU003": "unknown_model",
    "DU004": "unknown_job",
    "DU005": "unknown_metric",
    "DU006": "formula_error",
}


def alone(element: Row) -> Call:
    """The single call that an element stands for."""
    rest: Row = {
        name: element[name]
        for name in ("reservation_id", "final", "idempotency_key", "metadata", "model")
        if name in element
    }
    if "job" in element:
        return ask.deduct_fixed(element["user_id"], element["job"], **rest)
    who = (element["team_id"], element["user_id"]) if "team_id" in element else (element["user_id"],)
    of_team = "_team" if "team_id" in element else ""
    if "amount" in element:
        return Call(f"deduct{of_team}_credits", (*who, element["amount"]), rest)
    return Call(f"deduct{of_team}", (*who, element["metrics"]), rest)


def test_a_batch_is_its_calls_one_by_one(ledger: Ledger) -> None:
    """Random elements, as a batch and one by one from the same beginning: the same answers, the same accounts."""
    seed = random.Random(23)
    seen = set()
    for _ in range(25):
        with rolled_back(ledger) as told:
            told.publish(plans=FREE, signup_bonus=20, min_balance=0, overrun=seed.choice(["debt", "reject"]))
            for step in (
                rich,
                crew,
                ask.set_user_plan("v", "free"),
                ask.add_credits("v", 20, expires_at="2026-01-10T00:00+00"),
                ask.set_spend_cap("v", 15),
                ask.add_team_member("crew", "ann", None, 20),
                hold,
                ask.reserve_credits("v", 5),
                ask.reserve_team_credits("crew", "ann", 10),
                at(seed.choice(["2026-01-01", "2026-01-01T00:10", "2026-01-10"])),
            ):
                step(told)
            elements = []
            for _ in range(seed.randint(1, 12)):
                element: Row = {"user_id": seed.choice(["u", "u", "v", "v", "new", "ann", "bob", "crew", "cid"])}
                if seed.random() < 0.3:
                    element["team_id"] = seed.choice(["crew", "crew", "crew", "u", "nobody"])
                what = seed.choice(["amount", "amount", "usage", "usage", "job", "bad"])
                if what == "amount":
                    element["amount"] = seed.choice([0, 1, 5, 30, 120, -1])
                elif what == "job" and "team_id" not in element:
                    element["job"] = seed.choice(["report", "gift", "none"])
                else:
                    element["metrics"] = seed.choice(
                        [
                            costs(seed.choice(["0.5", "2.25", "14", "31"])),
                            {"model": "gpt-4", "input_tokens": seed.randint(0, 900), "output_tokens": 7},
                            {"model": "ratio", "input_tokens": 1} if what == "bad" else {},
                            {"model": "gpx", "input_tokens": 1} if what == "bad" else {},
                            {"model": "gpt", "tokens": 1} if what == "bad" else costs(1),
                        ]
                    )
                if seed.random() < 0.3 and "job" not in element:
                    element["reservation_id"] = seed.choice(["@hold1", "@hold2", "@hold3", "x"])
                    element["final"] = seed.random() < 0.5
                if seed.random() < 0.4:
                    element["idempotency_key"] = seed.choice(["a", "b", "c"])
                elements.append(element)
            outcomes = []
            for in_one in (True, False):
                with told.conn.transaction(force_rollback=True):
                    ids = {name: list(found) for name, found in told.ids.items()}
                    run = Ledger(told.conn, told.clock, ids)
                    found = run.run(ask.deduct_batch(elements)) if in_one else [single(run, one) for one in elements]
                    accounts = run.sql("select a from ducto_private.accounts as a order by account_id")
                    caps = run.sql("select c from ducto_private.spend_caps as c")
                    assert run.violations() == []
                shown = [
                    {
                        name: row[name]
                        for name in ("error", "amount", "cost", "allowance_used", "idempotent", "warnings")
                    }
                    for row in found
                ]
                outcomes.append((shown, accounts, caps))
                seen |= {row["error"] for row in found}
            assert outcomes[0] == outcomes[1], elements
    assert len(seen) >= 10


def single(ledger: Ledger, element: Row) -> Row:
    """What an element's single call answers, an error as the refusal that a batch makes of it."""
    try:
        with ledger.conn.transaction():
            return ledger.one(alone(element))
    except psycopg.Error as error:
        return refused(ERRORS[error.sqlstate or ""])


def test_thousands_of_charges(ledger: Ledger) -> None:
    for step in (ask.add_credits("u", 10**6), ask.add_credits("v", 10**6)):
        step(ledger)
    elements = [usage("0.1", "uv"[n % 2], idempotency_key=f"k{n}") for n in range(2000)]
    assert {answer["error"] for answer in ledger.run(ask.deduct_batch(elements))} == {None}
    reads(balance=10**6 - 100)(ledger, ask.get_balance("u"))
    assert {answer["idempotent"] for answer in ledger.run(ask.deduct_batch(elements[::-1]))} == {True}
    reads(balance=10**6 - 100)(ledger, ask.get_balance("v"))


def test_a_batch_of_one_is_its_call(ledger: Ledger) -> None:
    for step in (rich, batch(amount(5, idempotency_key="k"))):
        step(ledger)
    refuses("idempotency_conflict")(ledger, ask.deduct_credits("u", 6, key="k"))
    replays()(ledger, batch(amount(5, idempotency_key="k")))

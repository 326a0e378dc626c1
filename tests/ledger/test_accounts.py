"""Accounts: how they open, their balance, credit limit, time and revision."""

from ledger_helpers import (
    FREE,
    MOST,
    UNKNOWN,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    costs,
    free,
    gives,
    later,
    lists,
    poor,
    prices,
    raises,
    reads,
    refuses,
    replays,
    rich,
    settle,
    table,
    tell,
)

bonus = prices(signup_bonus=50)


# fmt: off
@table(
    ("a charge opens", [bonus], ask.deduct("new", costs(3)), gives(amount=-3, balance_after=47, revision=2)),
    ("an amount opens", [bonus], ask.deduct_credits("new", 3), gives(balance_after=47)),
    ("a charge of nothing opens", [bonus], ask.deduct_credits("new", 0), gives(balance_after=50)),
    ("a job opens", [bonus], ask.deduct_fixed("new", "report"), gives(balance_after=43)),
    ("a hold opens", [bonus], ask.reserve("new", costs(3)), gives(amount=3, balance=50, reserved_total=3)),
    ("a hold of an amount opens", [bonus], ask.reserve_credits("new", 45), gives(balance=50)),
    ("a hold of nothing opens", [bonus], ask.reserve_credits("new", 0), gives(balance=50)),
    ("a refused charge opens nothing", [bonus], ask.deduct("new", costs(46)),
     refuses("insufficient_credits", balance_after=0)),
    ("a refused hold opens nothing", [bonus], ask.reserve_credits("new", 46),
     refuses("insufficient_credits", balance=0)),
    ("an error opens nothing", [bonus], ask.deduct("new", {"model": "unknown", "input_tokens": 1}),
     raises("DU003", "unknown")),
    ("a settlement opens nothing", [bonus], ask.deduct("new", costs(1), hold=UNKNOWN),
     refuses("reservation_not_found", balance_after=0)),
    ("a bonus comes once", [bonus, ask.deduct("new", costs(3))], ask.deduct("new", costs(3)), gives(balance_after=44)),
    ("an account there is gets none", [rich, bonus], ask.deduct("u", costs(3)), gives(balance_after=97)),
    ("a repeated first charge", [bonus, ask.deduct("new", costs(3), "k")], ask.deduct("new", costs(3), "k"),
     replays(balance_after=47)),
    ("a free plan opens", [free], ask.deduct("new", costs(3)), gives(amount=0, allowance_used=3, balance_after=0)),
    ("it can hold, stream and settle", [free, ask.reserve_credits("new", 9)], settle(8, "new"),
     gives(amount=0, allowance_used=8)),
    ("up to its allowance", [free], ask.reserve_credits("new", 11), refuses("insufficient_credits")),
    ("holds claim the allowance", [free, ask.reserve_credits("new", 6)], ask.reserve_credits("new", 5),
     refuses("insufficient_credits")),
    ("a plan opened by a limit", [free, ask.set_credit_limit("new", 0)], ask.deduct("new", costs(10)),
     gives(allowance_used=10)),
    ("a plan and a bonus", [prices(plans=FREE, default_plan="free", signup_bonus=50)], ask.deduct("new", costs(15)),
     gives(allowance_used=10, amount=-5, balance_after=45)),
)
def test_opening(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_the_bonus_is_a_row_of_its_own(ledger: Ledger) -> None:
    bonus(ledger)
    ask.deduct("u", costs(3))(ledger)
    lists(
        {"seq": 2, "type": "usage", "amount": -3, "balance_after": 47},
        {"seq": 1, "type": "signup_bonus", "amount": 50, "balance_after": 50, "cost": None},
    )(ledger, ask.list_transactions("u"))


def test_without_default_plan_and_bonus_only_credits_and_limits_open(ledger: Ledger) -> None:
    ledger.publish(signup_bonus=0)
    for call in (ask.reserve("new", costs(0)), ask.deduct("new", costs(0)), ask.deduct_fixed("new", "gift")):
        refuses("account_not_found")(ledger, call)


# fmt: off
@table(
    ("an unknown account has nothing", [], ask.get_balance("new"),
     reads(user_id="new", balance=0, lifetime_purchased=0, reserved=0, available=0, credit_limit=0, revision=0)),
    ("also where it would open with a bonus", [prices(signup_bonus=50)], ask.get_balance("new"),
     reads(balance=0, available=0, revision=0)),
    ("what holds claim is not available, nor is min_balance", [rich, ask.reserve_credits("u", 30)],
     ask.get_balance("u"), reads(balance=100, reserved=30, available=65, revision=2)),
    ("a credit limit is available", [rich, ask.set_credit_limit("u", 50)], ask.get_balance("u"), reads(available=145)),
    ("below the floor nothing is", [ask.add_credits("u", 4)], ask.get_balance("u"), reads(balance=4, available=0)),
    ("an expired hold claims nothing", [rich, ask.reserve_credits("u", 30), later(seconds=600)], ask.get_balance("u"),
     reads(reserved=0, available=95)),
    ("one that has a moment left does", [at("2026-01-01"), rich, ask.reserve_credits("u", 30), later(seconds=599)],
     ask.get_balance("u"), reads(reserved=30, available=65)),
    ("what is left of the allowance is available",
     [prices(plans=FREE, default_plan="free"), ask.set_credit_limit("u", 0), ask.deduct("u", costs(4))],
     ask.get_balance("u"), reads(balance=0, available=6)),
    ("and the next month all of it again",
     [prices(plans=FREE, default_plan="free"), at("2026-01-31T23:59:59"), ask.set_credit_limit("u", 0),
         ask.deduct("u", costs(4)), later(seconds=1)], ask.get_balance("u"), reads(available=10)),
    ("debt takes nothing from the allowance",
     [prices(plans=FREE, default_plan="free"), poor, ask.remove_credits("u", 50)], ask.get_balance("u"),
     reads(balance=-49, available=10)),
)
def test_get_balance(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_the_balance_at_a_time(ledger: Ledger) -> None:
    for step in (
        at("2026-01-01T10:00"),
        ask.add_credits("u", 100, "purchase"),
        at("2026-01-02T10:00"),
        ask.deduct("u", costs(30)),
        ask.deduct("u", costs(1)),
        at("2026-01-03T10:00"),
        ask.add_credits("u", 5, "promotion"),
        at("2026-01-04T10:00"),
        ask.remove_credits("u", 40, transaction_id="@grant1"),
        ask.reserve_credits("u", 10),
    ):
        step(ledger)
    for time, balance, purchased in (
        ("2026-01-01T09:59:59.999999+00", 0, 0),
        ("2026-01-01T10:00+00", 100, 100),
        ("2026-01-01T12:00+02", 100, 100),
        ("2026-01-02T09:59+00", 100, 100),
        ("2026-01-02T10:00+00", 69, 100),
        ("2026-01-03T10:00+00", 74, 100),
        ("2026-01-04T10:00+00", 34, 60),
        ("2030-01-01", 34, 60),
        ("infinity", 34, 60),
        ("-infinity", 0, 0),
    ):
        reads(balance=balance, lifetime_purchased=purchased, reserved=None, available=None)(
            ledger, ask.get_balance("u", time)
        )
    reads(balance=0, lifetime_purchased=0, reserved=None, available=None)(ledger, ask.get_balance("new", "2026-01-01"))


# fmt: off
@table(
    ("a limit opens an account", [], ask.set_credit_limit("new", 7), gives(credit_limit=7, balance=0, available=2)),
    ("with its bonus", [prices(signup_bonus=50)], ask.set_credit_limit("new", 7),
     gives(balance=50, available=52, revision=2)),
    ("a charge may use the limit to the last credit", [ask.set_credit_limit("u", 30)], ask.deduct_credits("u", 25),
     gives(balance_after=-25)),
    ("and no further: min_balance stays", [ask.set_credit_limit("u", 30)], ask.deduct_credits("u", 26),
     refuses("insufficient_credits")),
    ("a limit may be taken away from an account in debt", [ask.set_credit_limit("u", 30), ask.deduct_credits("u", 25)],
     ask.set_credit_limit("u", 0), gives(balance=-25, credit_limit=0, available=0)),
    ("the largest limit", [rich], ask.set_credit_limit("u", MOST), gives(available=MOST)),
)
def test_set_credit_limit(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_time_never_runs_backwards_for_an_account(ledger: Ledger) -> None:
    for step in (
        at("2026-01-02"),
        rich,
        at("2026-01-01"),
        ask.deduct("u", costs(1)),
        at("2026-01-03"),
        ask.reserve_credits("u", 5, ttl=60),
        at("2026-01-02T12:00"),
        ask.deduct("u", costs(1)),
    ):
        step(ledger)
    times = [row["created_at"].day for row in ledger.run(ask.list_transactions("u"))]
    assert times == [3, 2, 2]
    reads(reserved=5)(ledger, ask.get_balance("u"))
    reads(status="active")(ledger, ask.get_reservation("@hold"))


def test_each_change_counts_one_revision(ledger: Ledger) -> None:
    for number, call in enumerate(
        (
            rich,
            ask.reserve_credits("u", 5),
            ask.extend_reservation("@hold", 5),
            ask.deduct_credits("u", 1, "@hold", final=False),
            ask.release_reservation("@hold"),
            ask.set_credit_limit("u", 5),
            ask.deduct("u", costs("0.1")),
            ask.remove_credits("u", 1),
            ask.deduct("u", costs(2)),
            ask.refund_credits("@charge"),
        ),
        1,
    ):
        assert ledger.one(call)["revision"] == number
        reads(revision=number)(ledger, ask.get_balance("u"))

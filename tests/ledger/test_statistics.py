"""Statistics, with rollups and without; the outbox; forgetting a user; what end users may ask about themselves."""

import json
import random
import re
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connect, Connection
from ledger_helpers import (
    FREE,
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
    later,
    lists,
    prices,
    raises,
    reads,
    rich,
    table,
    team,
    tell,
)
from sessions import blocked

from ducto_pg import CreditManager

rich_v = ask.add_credits("v", 100)
free: list[Step] = [prices(plans=FREE), rich, ask.set_user_plan("u", "free")]


def counted(*rows: Row) -> Check:
    """It answers these rows, from the ledger and then from rollups, and writes nothing."""

    def check(ledger: Ledger, call: Call) -> None:
        lists(*rows)(ledger, call)
        ask.rollup_usage()(ledger)
        assert ledger.sql(
            "select count(*) = 0 or ducto_private.counted_until() is not null from ducto_private.accounts"
        ) == [(True,)]
        lists(*rows)(ledger, call)

    return check


def spent(name: str, total: int, charges: int = 1, **more: Any) -> Row:
    """A row by user, of charges that cost what they took."""
    usual = {"allowance_used": 0, "refunded": 0, "cost": total, "error": None}
    return {"user_id": name, "total_spend": total, "transaction_count": charges} | usual | more


def on(model: str, total: int, charges: int = 1, **more: Any) -> Row:
    """A row by model."""
    row = spent("", total, charges, **more)
    del row["user_id"]
    return {"model": model, **row}


def day(text: str, total: int, charges: int = 1, **more: Any) -> Row:
    """A row by day."""
    row = on("", total, charges, **more)
    del row["model"]
    return {"date": date.fromisoformat(text), **row}


# Statistics

four_users: list[Step] = [
    *(ask.add_credits(name, 100) for name in "abZ\u00e9"),
    *(ask.deduct_credits(name, points) for name, points in (("a", 5), ("b", 6), ("Z", 5), ("\u00e9", 5))),
]


# fmt: off
@table(
    ("nothing", [], ask.spend_by_user(), counted()),
    ("credits in and out are not spend",
     [rich, ask.remove_credits("u", 10), ask.reserve_credits("u", 5), ask.add_credits("u", 5, expires_at="2026-01-02"),
      later(days=3), ask.sweep_expired_credits()], ask.spend_by_user(), counted()),
    ("what was debited, and the exact cost", [rich, ask.deduct("u", costs("2.75"))], ask.spend_by_user(),
     counted(spent("u", 2, cost=Decimal("2.75")))),
    ("all charges", [rich, ask.deduct("u", costs("2.75")), ask.deduct_credits("u", 3), ask.deduct_fixed("u", "report")],
     ask.spend_by_user(), counted(spent("u", 12, 3, cost=Decimal("12.75")))),
    ("a charge of nothing is one", [rich, ask.deduct_credits("u", 0)], ask.spend_by_user(), counted(spent("u", 0))),
    ("most first, then by name", four_users,
     ask.spend_by_user(), counted(spent("b", 6), spent("Z", 5), spent("a", 5), spent("\u00e9", 5))),
    ("an allowance pays first", [*free, ask.deduct("u", costs("14.5"))], ask.spend_by_user(),
     counted(spent("u", 4, allowance_used=10, cost=Decimal("14.5")))),
    ("gross of refunds", [rich, ask.deduct_credits("u", 9), ask.refund_credits("@charge", 4)], ask.spend_by_user(),
     counted(spent("u", 9, refunded=4))),
    ("what an allowance gets back is not refunded to the balance",
     [*free, ask.deduct_credits("u", 14), ask.refund_credits("@charge", 6)], ask.spend_by_user(),
     counted(spent("u", 4, allowance_used=10, refunded=4, cost=14))),
    ("a settlement is a charge", [rich, ask.reserve_credits("u", 20), ask.deduct_credits("u", 3, "@hold", final=False),
     ask.deduct_credits("u", 4, "@hold")], ask.spend_by_user(), counted(spent("u", 7, 2))),
    ("a team's charge counts for the member", [team("t", "u", "v"), ask.deduct_team_credits("t", "u", 7)],
     ask.spend_by_user(), counted(spent("u", 7))),
    ("beside the member's own", [rich, ask.deduct_credits("u", 5), team("t", "u", "v"),
     ask.deduct_team_credits("t", "u", 7), ask.deduct_team_credits("t", "v", 1)],
     ask.spend_by_user(), counted(spent("u", 12, 2), spent("v", 1))),
    ("and so does its refund", [team("t", "u"), ask.deduct_team_credits("t", "u", 7),
     ask.refund_credits("@charge", 2), ask.remove_team_member("t", "u"), ask.refund_credits("@charge", 2)],
     ask.spend_by_user(), counted(spent("u", 7, refunded=4))),
    ("a refund counts when it is made",
     [rich, ask.deduct_credits("u", 9), at("2026-02-01"), ask.refund_credits("@charge")],
     ask.spend_by_user("2026-02-01Z"), counted(spent("u", 0, 0, refunded=9))),
    ("and not before", [rich, ask.deduct_credits("u", 9), at("2026-02-01"), ask.refund_credits("@charge")],
     ask.spend_by_user(None, "2026-02-01Z"), counted(spent("u", 9))),
    ("the start belongs to a window", [rich, at("2026-01-05T12:00"), ask.deduct_credits("u", 9)],
     ask.spend_by_user("2026-01-05T12:00Z"), counted(spent("u", 9))),
    ("the end does not", [rich, at("2026-01-05T12:00"), ask.deduct_credits("u", 9)],
     ask.spend_by_user(None, "2026-01-05T12:00Z"), counted()),
    ("the last microsecond before it does", [rich, at("2026-01-05T12:00"), ask.deduct_credits("u", 9)],
     ask.spend_by_user(None, "2026-01-05T12:00:00.000001Z"), counted(spent("u", 9))),
    ("a window of no time", [rich, ask.deduct_credits("u", 9)], ask.spend_by_user("2026-01-01Z", "2026-01-01Z"),
     counted()),
    ("windows beyond all time", [rich, ask.deduct_credits("u", 9)],
     ask.spend_by_user("4713-01-01 BC", "294276-12-31 23:59Z"), counted(spent("u", 9))),
    ("and infinite ones", [rich, ask.deduct_credits("u", 9)], ask.spend_by_user("-infinity", "infinity"),
     counted(spent("u", 9))),
    ("after all time", [rich, ask.deduct_credits("u", 9)], ask.spend_by_user("294276-12-31 23:59Z"), counted()),
    ("before all time", [rich, ask.deduct_credits("u", 9)], ask.spend_by_user(None, "4713-01-01 BC"), counted()),
)
def test_spend_by_user(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("nothing", [], ask.spend_by_model(), counted()),
    ("the model that the price resolved", [rich, ask.deduct("u", {"model": "gpt-0613", "input_tokens": 200})],
     ask.spend_by_model(), counted(on("gpt", 2))),
    ("else as given", [rich, ask.deduct_credits("u", 3, model="my-gpt")], ask.spend_by_model(),
     counted(on("my-gpt", 3))),
    ("as given where _default prices it",
     [prices(models={"_default": "input_tokens"}), rich, ask.deduct("u", {"model": "x", "input_tokens": 2})],
     ask.spend_by_model(), counted(on("x", 2))),
    ("else none", [rich, ask.deduct_credits("u", 3), ask.deduct_fixed("u", "report"), ask.deduct("u", {"model": ""})],
     ask.spend_by_model(), counted(on("", 10, 3))),
    ("most first, then by name", [rich, *(ask.deduct_credits("u", points, model=model) for model, points in (
        ("b", 2), ("a", 2), ("c", 1), ("Z", 2), ("c", 4)))],
     ask.spend_by_model(), counted(on("c", 5, 2), on("Z", 2), on("a", 2), on("b", 2))),
    ("a refund under the model of its charge",
     [rich, ask.deduct("u", costs(4)), at("2026-03-01"), ask.refund_credits("@charge", 3)],
     ask.spend_by_model("2026-02-01Z"), counted(on("any", 0, 0, refunded=3))),
    ("over all accounts", [rich, rich_v, team("t", "u"), ask.deduct("u", costs(1)), ask.deduct("v", costs(2)),
     ask.deduct_team("t", "u", costs(3))], ask.spend_by_model(), counted(on("any", 6, 3))),
)
def test_spend_by_model(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("nothing", [rich], ask.daily_spend(), counted()),
    ("days in order, none for days without", [rich, at("2026-01-30"), ask.deduct_credits("u", 1),
     at("2026-02-01T23:59:59.999999"), ask.deduct_credits("u", 2), at("2026-02-02"), ask.deduct_credits("u", 4)],
     ask.daily_spend(), counted(day("2026-01-30", 1), day("2026-02-01", 2), day("2026-02-02", 4))),
    ("a leap day", [rich, at("2028-02-29T23:59:59"), ask.deduct_credits("u", 1), at("2028-03-01"),
     ask.deduct_credits("u", 2)], ask.daily_spend("2028-02-29Z", "2028-03-01Z"), counted(day("2028-02-29", 1))),
    ("a part of a day", [rich, at("2026-01-30T08:00"), ask.deduct_credits("u", 1), at("2026-01-30T18:00"),
     ask.deduct_credits("u", 2), at("2026-02-01"), ask.deduct_credits("u", 4)],
     ask.daily_spend("2026-01-30T12:00Z", "2026-02-01Z"), counted(day("2026-01-30", 2))),
    ("a refund on its own day", [rich, ask.deduct_credits("u", 9), at("2026-02-01"), ask.refund_credits("@charge")],
     ask.daily_spend(), counted(day("2026-01-01", 9), day("2026-02-01", 0, 0, refunded=9))),
)
def test_daily_spend(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


twelve: list[Step] = [step for number in range(12) for step in (
    ask.add_credits(f"u{number:02}", 100), ask.deduct_credits(f"u{number:02}", 20 - number // 2))]


@table(
    ("nothing", [rich], ask.top_users(), counted()),
    ("ten of them", twelve, ask.top_users(),
     counted(*({"user_id": f"u{n:02}", "total_spend": 20 - n // 2, "cost": 20 - n // 2, "error": None}
               for n in range(10)))),
    ("null is ten", twelve, ask.top_users(None), counted(*({"user_id": f"u{n:02}"} for n in range(10)))),
    ("as many as asked for", twelve, ask.top_users(1), counted({"user_id": "u00"})),
    ("all there are", twelve, ask.top_users(1000), counted(*({"user_id": f"u{n:02}"} for n in range(12)))),
    ("of a window", [*twelve, later(days=1), ask.deduct_credits("u11", 1)], ask.top_users(10, "2026-01-02Z"),
     counted({"user_id": "u11", "total_spend": 1, "allowance_used": 0, "refunded": 0})),
    ("not one who only got a refund", [rich, ask.deduct_credits("u", 9), at("2026-02-01"),
     ask.refund_credits("@charge")], ask.top_users(10, "2026-02-01Z"), counted()),
    ("but one whose allowance paid", [*free, ask.deduct_credits("u", 9)], ask.top_users(),
     counted({"user_id": "u", "total_spend": 0, "allowance_used": 9, "cost": 9})),
    ("none", [], ask.top_users(0), raises("22023", "p_limit", "1000")),
    ("too many", [], ask.top_users(1001), raises("22023", "p_limit", "1001")),
)
def test_top_users(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


NOBODY = {"total_credits_consumed": 0, "active_users": 0, "avg_daily_spend": 0, "top_model": None, "top_user": None,
          "allowance_used": 0, "refunded": 0, "cost": 0, "error": None}


@table(
    ("nothing", [rich], ask.aggregate_stats(), counted(NOBODY)),
    ("only a refund", [rich, ask.deduct_credits("u", 9), at("2026-02-01"), ask.refund_credits("@charge")],
     ask.aggregate_stats("2026-02-01Z"), counted(NOBODY | {"refunded": 9})),
    ("in all, of two users and a member, on two days", [rich, rich_v, team("t", "w"), ask.deduct("u", costs(5)),
     ask.deduct_credits("v", 6, model="a"), later(days=9), ask.deduct_team("t", "w", costs(2)),
     ask.deduct_credits("v", 0, model="a"), ask.refund_credits("@charge1", 1)],
     ask.aggregate_stats(), counted(NOBODY | {"total_credits_consumed": 13, "active_users": 3, "avg_daily_spend": 6,
         "top_model": "any", "top_user": "v", "refunded": 1, "cost": 13})),
    ("ties by name", [rich, rich_v, ask.deduct_credits("v", 5, model="b"), ask.deduct_credits("u", 5, model="a")],
     ask.aggregate_stats(), counted(NOBODY | {"total_credits_consumed": 10, "active_users": 2, "avg_daily_spend": 10,
         "top_model": "a", "top_user": "u", "cost": 10})),
    ("a charge without a model has none that is on top", [rich, ask.deduct_credits("u", 9),
     ask.deduct_credits("u", 1, model="a")], ask.aggregate_stats(), counted(NOBODY | {"total_credits_consumed": 10,
         "active_users": 1, "avg_daily_spend": 10, "top_model": "a", "top_user": "u", "cost": 10})),
    ("an allowance makes active", [*free, ask.deduct("u", costs(4))], ask.aggregate_stats(),
     counted(NOBODY | {"active_users": 1, "top_model": "any", "top_user": "u", "allowance_used": 4, "cost": 4})),
)
def test_aggregate_stats(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


both: list[Step] = [
    rich, rich_v, team("t", "u", "v"), ask.deduct("u", costs(5)), ask.deduct_credits("v", 6, model="a"),
    ask.deduct_team_credits("t", "u", 7), later(days=1), ask.deduct_team_credits("t", "v", 9, model="a"),
    ask.refund_credits("@charge3", 2),
]  # fmt: skip


# fmt: off
@table(
    ("nobody", both, ask.spend_by_user(user_id="ghost"), counted()),
    ("a user's own and as a member", both, ask.spend_by_user(user_id="u"), counted(spent("u", 12, 2, refunded=2))),
    ("by model", both, ask.spend_by_model(user_id="u"), counted(on("", 7, refunded=2), on("any", 5))),
    ("by day", both, ask.daily_spend(user_id="u"),
     counted(day("2026-01-01", 12, 2), day("2026-01-02", 0, 0, refunded=2))),
    ("in all", both, ask.aggregate_stats(user_id="u"), counted(NOBODY | {"total_credits_consumed": 12,
        "active_users": 1, "avg_daily_spend": 12, "top_model": "any", "top_user": "u", "refunded": 2, "cost": 12})),
    ("a team's pool, by member", both, ask.spend_by_user(user_id="t"),
     counted(spent("v", 9), spent("u", 7, refunded=2))),
    ("a team's pool, by model", both, ask.spend_by_model(user_id="t"),
     counted(on("a", 9), on("", 7, refunded=2))),
    ("a team's pool, by day", both, ask.daily_spend(user_id="t"),
     counted(day("2026-01-01", 7), day("2026-01-02", 9, refunded=2))),
    ("a team's pool, in all", both, ask.aggregate_stats(user_id="t"), counted(NOBODY | {"total_credits_consumed": 16,
        "active_users": 2, "avg_daily_spend": 8, "top_model": "a", "top_user": "v", "refunded": 2, "cost": 16})),
    ("of a window", both, ask.spend_by_user("2026-01-02Z", "2026-01-03Z", "u"),
     counted(spent("u", 0, 0, refunded=2))),
    ("also of one who left the team", [*both, ask.remove_team_member("t", "u")], ask.spend_by_user(user_id="u"),
     counted(spent("u", 12, 2, refunded=2))),
    ("who has no account", [team("t", "w"), ask.deduct_team_credits("t", "w", 3)], ask.daily_spend(user_id="w"),
     counted(day("2026-01-01", 3))),
    ("null is all", both, ask.spend_by_user(user_id=None), counted(spent("v", 15, 2), spent("u", 12, 2, refunded=2))),
)
def test_statistics_of_one_user(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


@pytest.mark.parametrize("name", ["spend_by_user", "spend_by_model", "daily_spend", "aggregate_stats"])
def test_a_window_ends_after_it_begins(ledger: Ledger, name: str) -> None:
    early, late = "2026-01-01Z", "2026-01-01 00:00:01Z"
    raises("22023", "p_end", "p_start", "open")(ledger, Call(name, (late, early), {}))
    raises("22023", "p_end", "p_start", "open")(ledger, Call(name, (late, early, "u"), {}))
    raises("22023", "p_user_id", "blanks")(ledger, Call(name, (early, late, " u"), {}))
    raises("22023", "p_end", "p_start", "open")(ledger, ask.top_users(3, late, early))


def test_sums_beyond_bigint_are_the_most_that_it_holds_and_rolled_up(ledger: Ledger) -> None:
    for user in ("u", "v"):
        ask.add_credits(user, MOST)(ledger)
        ask.deduct_credits(user, MOST - 5, model="m")(ledger)
    ask.rollup_usage()(ledger)
    (model,) = ledger.run(ask.spend_by_model())
    assert (model["total_spend"], model["cost"]) == (MOST, 2 * (MOST - 5))
    lists(spent("u", MOST - 5), spent("v", MOST - 5))(ledger, ask.spend_by_user())


def test_before_there_are_prices_there_is_nothing(conn: Connection) -> None:
    CreditManager(conn).add_credits("u", 10).or_raise()
    for _ in range(2):
        assert conn.execute("select * from ducto.spend_by_user()").fetchall() == []
        assert conn.execute("select * from ducto.daily_spend('2026-01-01', '2026-02-01')").fetchall() == []
        assert conn.execute("select ducto.rollup_usage()").fetchone() == (0,)


# Against the ledger itself

COLUMNS = ("total_spend", "transaction_count", "allowance_used", "refunded", "cost")
ROWS = """
select t.created_at, (t.created_at at time zone %s)::date, coalesce(t.member_id, t.account_id),
  coalesce(t.resolved_model, t.model, ''), t.type, t.amount, t.allowance_used, t.cost
from ducto_private.transactions as t
where t.type in ('usage', 'refund') and (%s::text is null or %s in (t.account_id, t.member_id))
"""
USE_ROLLUPS = """
create or replace function ducto_private.counted_until() returns timestamptz language sql stable
as 'select max(r.changed_at) from ducto_private.rollup_accounts as r'
"""
USE_LEDGER = """
create or replace function ducto_private.counted_until() returns timestamptz language sql stable
as 'select null::timestamptz'
"""


def expected(
    conn: Connection, zone: str, start: datetime | None, end: datetime | None, one: str | None = None
) -> dict[str, Any]:
    """The five statistics of a window, of all accounts or of one, summed here, row by row."""
    by: dict[str, dict[Any, list[Any]]] = {
        name: defaultdict(lambda: [0, 0, 0, 0, 0]) for name in ("user", "model", "day")
    }
    for created_at, local_day, user, model, kind, amount, allowance, cost in conn.execute(ROWS, [zone, one, one]):
        if (start and created_at < start) or (end and created_at >= end):
            continue
        adds = (-amount, 1, allowance, 0, cost) if kind == "usage" else (0, 0, 0, amount, 0)
        for name, key in (("user", user), ("model", model), ("day", local_day)):
            by[name][key] = [a + b for a, b in zip(by[name][key], adds, strict=True)]

    def ranked(sums: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
        return sorted(((name, *row) for name, row in sums.items()), key=lambda row: (-row[1], row[0].encode()))

    users, models = ranked(by["user"]), ranked(by["model"])
    charged = [row for row in users if row[2]]
    days = [row for row in by["day"].values() if row[1]]
    total = [sum(row[i] for row in users) for i in range(1, 6)]
    return {
        "spend_by_user": users,
        "spend_by_model": models,
        "daily_spend": sorted((key, *row) for key, row in by["day"].items()),
        "top_users": [(row[0], row[1], *row[3:]) for row in charged[:3]],
        "aggregate_stats": [
            (
                total[0],
                len(charged),
                total[0] // len(days) if days else 0,
                next((row[0] for row in models if row[2] and row[0]), None),
                charged[0][0] if charged else None,
                *total[2:],
            )
        ],
    }


def answers(conn: Connection, start: datetime | None, end: datetime | None, one: str | None = None) -> dict[str, Any]:
    """The five statistics of a window, or the four of one account, as the database answers them."""
    found = {}
    for name in ("spend_by_user", "spend_by_model", "daily_spend", "aggregate_stats"):
        rows = conn.execute(f"select * from ducto.{name}(%s, %s, %s)".encode(), [start, end, one]).fetchall()
        assert all(row[-1] is None for row in rows)
        found[name] = [row[:-1] for row in rows]
    if one is None:
        top = conn.execute("select * from ducto.top_users(3, %s, %s)", [start, end]).fetchall()
        found["top_users"] = [row[:-1] for row in top]
    return found


def added_up(parts: list[dict[str, Any]], name: str) -> dict[Any, list[Any]]:
    """The sums of several answers of one statistic, by its first column."""
    sums: dict[Any, list[Any]] = {}
    for part in parts:
        for key, *row in part[name]:
            sums[key] = [a + b for a, b in zip(sums.get(key, [0] * len(row)), row, strict=True)]
    return sums


def rollup_violations(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute("select * from ducto_private.rollup_violations()").fetchall()


# By zone, a moment (UTC) at which its clocks or dates do something out of the ordinary.
ZONES = {
    "UTC": "2028-02-29T00:00",
    "Asia/Kathmandu": "2026-12-31T18:15",
    "America/Havana": "2026-11-01T05:00",
    "Africa/Cairo": "2026-04-23T22:00",
    "Asia/Beirut": "2026-03-28T22:00",
    "America/Sao_Paulo": "2018-11-04T03:00",
    "America/Santiago": "2026-04-05T03:00",
    "America/St_Johns": "2009-11-01T02:31",
    "Pacific/Apia": "2011-12-30T10:00",
    "Australia/Lord_Howe": "2026-04-04T15:00",
}


@pytest.mark.parametrize("zone", ZONES)
def test_statistics_are_sums_of_the_ledger_rolled_up_or_not(conn: Connection, clock: Clock, zone: str) -> None:
    """A random history about days that clocks cut short, repeat or leave out, with rollups at random moments."""
    chance = random.Random(zone)
    manager = CreditManager(conn)
    plans = {"free": {"id": "free", "name": "Free", "free_allowance": 40}}
    manager.publish_pricing(
        {
            "match": "prefix",
            "models": {"a": "input_tokens * 0.7", "b": "input_tokens"},
            "plans": plans,
            "timezone": zone,
        }
    )
    conn.execute("set timezone = 'Pacific/Kiritimati'")
    moment = datetime.fromisoformat(ZONES[zone]).replace(tzinfo=UTC)
    begin = moment - timedelta(days=2)
    clock.set(begin)
    users = ["u", "v", "w", "x"]
    for user in users:
        manager.add_credits(user, 10**6).or_raise()
    manager.set_user_plan("w", "free").or_raise()
    manager.create_team("T", 10**6, team_id="t").or_raise()
    for user in users[:2]:
        manager.add_team_member("t", user).or_raise()

    charges: list[str] = []
    edges = [moment + timedelta(minutes=minutes) for minutes in range(-1440, 2881, 15)]
    edges += 20 * [moment + timedelta(minutes=minutes) for minutes in range(-150, 151, 15)]
    times = sorted(chance.choice(edges) + timedelta(seconds=chance.choice([0, -1, 1, 400])) for _ in range(60))
    for number, now in enumerate(times):
        clock.set(now - timedelta(hours=chance.choice([0, 0, 0, 6])))
        user = chance.choice(users)
        usage = {"model": chance.choice(["a", "b", "a-x"]), "input_tokens": chance.randrange(50)}
        if charges and chance.random() < 1 / 4:
            manager.refund_credits(chance.choice(charges), chance.randrange(1, 9))
        elif user in users[:2] and chance.random() < 1 / 3:
            charges.append(manager.deduct_team("t", user, usage).or_raise().transaction_id)
        elif chance.random() < 1 / 4:
            charges.append(manager.deduct_credits(user, 3).or_raise().transaction_id)
        else:
            charges.append(manager.deduct(user, usage).or_raise().transaction_id)
        if number > 15 and chance.random() < 1 / 6:
            manager.rollup_usage()
            assert rollup_violations(conn) == []
    usual = conn.execute("select pg_get_functiondef('ducto_private.counted_until'::regproc)").fetchone()
    assert usual

    midnights = [
        row[0]
        for row in conn.execute(
            "select ducto_private.first_instant(d::date, %s) from generate_series(%s::date, %s::date, '1 day') as d",
            [zone, begin.date(), (moment + timedelta(days=3)).date()],
        )
    ]
    ends = [None, *midnights, *(chance.choice(edges) for _ in range(6)), moment + timedelta(days=9)]
    windows = {(None, None), (midnights[0], None), (None, midnights[-1])}
    while len(windows) < 40:
        start, end = chance.choice(ends), chance.choice(ends)
        if not (start and end) or start <= end:
            windows.add((start, end))
    for start, end in windows:
        want = expected(conn, zone, start, end)
        for way in (USE_LEDGER, USE_ROLLUPS, str(usual[0])):
            conn.execute(way.encode())
            assert answers(conn, start, end) == want, (start, end, way)
            parts = [answers(conn, start, end, user) for user in users]
            for name in ("spend_by_user", "spend_by_model", "daily_spend"):
                assert added_up(parts, name) == added_up([want], name), (name, start, end, way)
        for one, part in zip(users, parts, strict=True):
            own = expected(conn, zone, start, end, one)
            assert part == {name: own[name] for name in part}, (one, start, end)
        pool = answers(conn, start, end, "t")
        own = expected(conn, zone, start, end, "t")
        assert pool == {name: own[name] for name in pool}, (start, end)
    manager.rollup_usage()
    assert rollup_violations(conn) == []
    assert manager.verify_ledger() == []


def test_closed_days_are_not_read_from_the_ledger(conn: Connection, clock: Clock) -> None:
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"a": "input_tokens"}, "timezone": "Asia/Tokyo"})
    for number in range(20):
        clock.set(f"2026-01-{number + 1:02}T03:00")
        for user in ("u", "v"):
            manager.add_credits(user, 100).or_raise()
            manager.deduct(user, {"model": "a", "input_tokens": number}).or_raise()
    scanned = (
        "select coalesce(s.seq_scan, 0) + coalesce(s.idx_scan, 0) from pg_stat_xact_user_tables as s"
        " where s.relname = 'transactions'"
    )

    def scans(start: str | None, end: str | None) -> int:
        with conn.transaction():
            before = conn.execute(scanned).fetchone()
            for name in ("spend_by_user", "spend_by_model", "daily_spend", "aggregate_stats"):
                conn.execute(f"select * from ducto.{name}(%s, %s)".encode(), [start, end])
            conn.execute("select * from ducto.top_users(5, %s, %s)", [start, end])
            after = conn.execute(scanned).fetchone()
        assert before
        assert after
        return int(after[0] - before[0])

    whole = [(None, None), ("2026-01-03 00:00+09", "2026-01-05 00:00+09"), ("2026-01-03 00:00+09", "2026-02-01 09:00Z")]
    assert all(scans(*window) > 0 for window in whole)
    assert manager.rollup_usage() == 60
    assert manager.rollup_usage() == 0
    assert [scans(*window) for window in whole] == [0, 0, 0]
    assert scans("2026-01-03 00:00Z", "2026-01-05 00:00+09") > 0
    manager.deduct("u", {"model": "a", "input_tokens": 1}).or_raise()
    assert scans(None, None) > 0
    assert scans("2026-01-03 00:00+09", "2026-01-05 00:00+09") == 0
    assert manager.rollup_usage() == 2
    assert scans(None, None) == 0


def test_what_one_user_did_is_found_by_index(conn: Connection) -> None:
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"m": "input_tokens"}, "min_balance": 0})
    manager.create_team("T", 100, team_id="t").or_raise()
    manager.add_team_member("t", "u").or_raise()
    for user in "uv":
        manager.add_credits(user, 10**6).or_raise()
    manager.deduct_batch(10_000 * [{"user_id": "v", "amount": 1}])
    manager.deduct_credits("u", 3).or_raise()
    manager.deduct_team_credits("t", "u", 4).or_raise()
    conn.execute("analyze")
    for name in ("spend_by_user", "spend_by_model", "daily_spend", "aggregate_stats", "get_statement"):
        arguments = "'u', null, null" if name == "get_statement" else "null, null, 'u'"
        with conn.transaction():
            conn.execute(f"select * from ducto.{name}({arguments})".encode())
            row = conn.execute(
                "select s.seq_scan, s.idx_tup_fetch from pg_stat_xact_user_tables as s where s.relname = 'transactions'"
            ).fetchone()
        assert row
        assert row[0] == 0, name
        assert 0 < row[1] < 100, name


# Rollups beside other sessions


@pytest.fixture
def shop(conn: Connection) -> CreditManager:
    """Users a to d with credits, and prices in Berlin."""
    manager = CreditManager(conn)
    manager.publish_pricing({"models": {"m": "input_tokens"}, "min_balance": 0, "timezone": "Europe/Berlin"})
    for user in "abcd":
        manager.add_credits(user, 10**6).or_raise()
    return manager


def exact(conn: Connection) -> bool:
    """Whether all statistics of all time and of this day are those of the ledger, read from rollups."""
    conn.execute(USE_ROLLUPS.encode())
    conn.execute("select ducto_private.store_objects()")
    for start in (None, datetime(2030, 1, 1, 23, tzinfo=UTC), datetime(2030, 1, 2, 12, tzinfo=UTC)):
        with conn.transaction() as transaction:
            if not transaction.savepoint_name:
                conn.execute("set transaction isolation level repeatable read")
            assert answers(conn, start, None) == expected(conn, "Europe/Berlin", start, None)
    return rollup_violations(conn) == []


def test_a_transaction_of_an_earlier_day_may_commit_after_the_rollup(
    shop: CreditManager, conn: Connection, connect: Connect, clock: Clock
) -> None:
    clock.set("2030-01-01T22:59")
    shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
    slow = connect(autocommit=False)
    CreditManager(slow).deduct("a", {"model": "m", "input_tokens": 2}).or_raise()
    CreditManager(slow).add_credits("new", 10).or_raise()
    CreditManager(slow).deduct("new", {"model": "m", "input_tokens": 4}).or_raise()
    clock.set("2030-01-03T10:00")
    shop.deduct("b", {"model": "m", "input_tokens": 8}).or_raise()
    assert shop.rollup_usage() > 0
    assert exact(conn)
    before = shop.daily_spend()
    slow.commit()
    assert [row.total_spend for row in before] == [1, 8]
    assert [row.total_spend for row in shop.daily_spend()] == [7, 8]
    assert exact(conn)
    assert shop.rollup_usage() == 3
    assert exact(conn)
    slow.close()


def test_a_transaction_that_comes_to_nothing_is_not_counted(
    shop: CreditManager, conn: Connection, connect: Connect, clock: Clock
) -> None:
    clock.set("2030-01-01T22:59")
    slow = connect(autocommit=False)
    CreditManager(slow).deduct("a", {"model": "m", "input_tokens": 2}).or_raise()
    shop.deduct("b", {"model": "m", "input_tokens": 8}).or_raise()
    assert shop.rollup_usage() == 2
    slow.rollback()
    shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
    assert exact(conn)
    assert shop.rollup_usage() == 2
    assert exact(conn)
    with conn.transaction(force_rollback=True):
        shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
        assert shop.rollup_usage() == 2
        assert exact(conn)
    assert exact(conn)
    assert shop.rollup_usage() == 0


def test_a_clock_put_back_changes_nothing(shop: CreditManager, conn: Connection, clock: Clock) -> None:
    clock.set("2030-01-03T10:00")
    shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
    shop.rollup_usage()
    clock.set("2030-01-01T10:00")
    for user in "ab":
        shop.deduct(user, {"model": "m", "input_tokens": 2}).or_raise()
    assert [row.date for row in shop.daily_spend()] == ["2030-01-01", "2030-01-03"]
    assert exact(conn)
    shop.rollup_usage()
    assert exact(conn)


def test_two_rollups_take_turns(shop: CreditManager, conn: Connection, connect: Connect) -> None:
    shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
    first, second = connect(autocommit=False), connect()
    assert CreditManager(first).rollup_usage() == 2
    with blocked(conn, second, first, lambda m: m.rollup_usage()) as later_one:
        shop.deduct("b", {"model": "m", "input_tokens": 8}).or_raise()
        first.commit()
        assert later_one.result(30) == 2
    assert exact(conn)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_rollup_on_an_old_snapshot_fails(shop: CreditManager, conn: Connection, connect: Connect, level: str) -> None:
    old = connect(autocommit=False)
    old.execute(f"set transaction isolation level {level}".encode())
    old.execute("select 1")
    shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
    shop.rollup_usage()
    with pytest.raises(psycopg.errors.SerializationFailure):
        old.execute("select ducto.rollup_usage()")
    old.rollback()
    assert exact(conn)


def test_rollups_and_readers_amid_charges(shop: CreditManager, conn: Connection, connect: Connect) -> None:
    """Whoever reads in the middle of it all finds the sums of the very ledger that it sees."""
    stop = threading.Event()

    def charge(number: int) -> int:
        session, chance, made = connect(autocommit=False), random.Random(number), 0
        manager = CreditManager(session)
        while not stop.is_set():
            for user in sorted(chance.sample("abcd", 2)):
                charge = manager.deduct(user, {"model": "m", "input_tokens": chance.randrange(9)}).or_raise()
                if chance.random() < 1 / 5:
                    manager.refund_credits(charge.transaction_id)
            session.rollback() if chance.random() < 1 / 5 else session.commit()
            made += 1
        return made

    def roll(_: int) -> int:
        manager, wrote = CreditManager(connect()), 0
        while not stop.is_set():
            wrote += manager.rollup_usage()
        return wrote

    with ThreadPoolExecutor(5) as pool:
        work = [pool.submit(job, number) for number, job in enumerate((charge, charge, charge, roll, roll))]
        try:
            for _ in range(8):
                assert exact(conn)
        finally:
            stop.set()
        assert all(job.result(30) > 0 for job in work)
    assert exact(conn)
    shop.rollup_usage()
    assert exact(conn)
    assert shop.verify_ledger() == []


@pytest.mark.parametrize(
    ("corruption", "invariant"),
    [
        ("update ducto_private.rollups set cost = cost + 1", "sum"),
        ("delete from ducto_private.rollups where kind = 'model'", "sum"),
        ("insert into ducto_private.rollups values ('user', '2030-01-01', 'ghost', 1, 1, 0, 0, 1)", "sum"),
        ("update ducto_private.rollup_accounts set seq = seq - 1", "sum|how far"),
        ("update ducto_private.rollup_accounts set seq = seq + 1", "exist|how far"),
        ("insert into ducto_private.rollup_accounts values ('ghost', 1, now())", "exist|how far"),
        ("update ducto_private.rollup_state set counted = 1", "how far"),
        ("update ducto_private.rollup_state set changed_at = '2020-01-01'", "how far"),
    ],
)
def test_what_the_rollups_got_wrong_is_found(
    shop: CreditManager, conn: Connection, corruption: str, invariant: str
) -> None:
    shop.deduct("a", {"model": "m", "input_tokens": 1}).or_raise()
    shop.rollup_usage()
    assert rollup_violations(conn) == []
    conn.execute(corruption.encode())
    found = rollup_violations(conn)
    assert found
    assert all(re.search(invariant, row[1]) for row in found)
    conn.execute("truncate ducto_private.rollup_accounts, ducto_private.rollups")
    conn.execute("update ducto_private.rollup_state set counted = 0, changed_at = null")
    assert shop.rollup_usage() == 2
    assert rollup_violations(conn) == []


# Events


def test_events_are_delivered_until_acknowledged(ledger: Ledger) -> None:
    ledger.publish(plans=FREE)
    rich(ledger)
    later(seconds=1)(ledger)
    ask.set_user_plan("u", "free")(ledger)
    first = ledger.run(ask.fetch_events())
    assert [(row["type"], row["account_id"], row["attempts"], row["error"]) for row in first] == [
        ("account_opened", "u", 1, None),
        ("plan_changed", "u", 1, None),
    ]
    assert first[1]["payload"] == {"from": None, "to": "free"}
    assert [row["event_id"] for row in first] == sorted(row["event_id"] for row in first)
    assert first[0]["created_at"] == datetime(2026, 1, 1, tzinfo=UTC)

    later(seconds=59)(ledger)
    assert ledger.run(ask.fetch_events()) == []
    later(seconds=1)(ledger)
    assert ledger.run(ask.fetch_events(1)) == [first[0] | {"attempts": 2}]
    assert ledger.run(ask.fetch_events(lease_seconds=5)) == [first[1] | {"attempts": 2}]
    ids = [row["event_id"] for row in first]
    assert ledger.run(ask.fetch_events()) == []
    assert acked(ledger, [ids[1], ids[1].upper(), None, "no id", UNKNOWN]) == 1
    assert acked(ledger, [ids[1]]) == 0
    assert acked(ledger, []) == 0
    later(days=1)(ledger)
    assert [row["event_id"] for row in ledger.run(ask.fetch_events(None, None))] == [ids[0]]
    assert acked(ledger, ids) == 1
    later(days=1)(ledger)
    assert ledger.run(ask.fetch_events()) == []


def acked(ledger: Ledger, ids: list[Any] | None) -> int:
    row = ledger.conn.execute("select ducto.ack_events(%s::text[])", [ids]).fetchone()
    assert row
    return int(row[0])


def test_acknowledging_nothing(ledger: Ledger) -> None:
    rich(ledger)
    assert acked(ledger, None) == 0


# fmt: off
@table(
    ("no events", [rich], ask.fetch_events(0), raises("22023", "p_limit")),
    ("too many", [rich], ask.fetch_events(1001), raises("22023", "p_limit", "1000")),
    ("for no time", [rich], ask.fetch_events(10, 0), raises("22023", "p_lease_seconds", "acknowledged")),
    ("for longer than a day", [rich], ask.fetch_events(10, 86401), raises("22023", "p_lease_seconds", "86400")),
)
def test_fetching_has_bounds(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)
# fmt: on


def test_workers_share_events(shop: CreditManager, conn: Connection, connect: Connect) -> None:
    fetch = b"select event_id from ducto.fetch_events(3)"
    one, two = connect(autocommit=False), connect(autocommit=False, options="-c lock_timeout=5s")
    ours, theirs = one.execute(fetch).fetchall(), two.execute(fetch).fetchall()
    assert (len(ours), len(theirs)) == (3, 1)
    assert not set(ours) & set(theirs)
    one.rollback()
    two.commit()
    assert conn.execute(fetch).fetchall() == ours
    ids = [row[0] for row in ours + theirs]
    first, second = connect(autocommit=False), connect()
    assert first.execute("select ducto.ack_events(%s)", [ids[:3]]).fetchone() == (3,)
    with blocked(conn, second, first, lambda m: m.ack_events([str(event) for event in ids[::-1]])) as waiting:
        first.commit()
        assert waiting.result(30) == 1
    assert conn.execute("select count(*) from ducto_private.events").fetchone() == (0,)


# Forgetting a user

NOTE = {"ip": "192.0.2.1"}


def test_a_user_is_forgotten(ledger: Ledger) -> None:
    for step in (
        ask.add_credits("u", 100, "purchase", NOTE, paid_amount=5, paid_currency="EUR", reference="in_1"),
        ask.add_credits("v", 100, "purchase", NOTE, reference="in_2"),
        team("t", "u", "v"),
        ask.add_credits("t", 50, metadata=NOTE, reference="in_3"),
        ask.deduct("u", costs(5), "key", NOTE),
        ask.refund_credits("@charge", 1, "because", NOTE),
        ask.remove_credits("u", 1, "mistyped"),
        ask.deduct_credits("u", 1),
        ask.reserve_credits("u", 5, metadata=NOTE),
        ask.deduct_team_credits("t", "u", 5, metadata=NOTE),
        ask.refund_credits("@charge", 1, "because", NOTE),
        ask.deduct_team_credits("t", "v", 5, metadata=NOTE),
        ask.reserve_team_credits("t", "u", 5, metadata=NOTE),
        ask.reserve_team_credits("t", "v", 5, metadata=NOTE),
        ask.remove_team_member("t", "u"),
        later(seconds=1),
    ):
        step(ledger)
    before = {user: ledger.one(ask.get_balance(user)) for user in "uvt"}
    rows = {user: ledger.run(ask.list_transactions(user, 1000)) for user in "uvt"}
    # In u's account three rows and three details, a hold and an event; in the team's two rows, a detail and a hold.
    assert ledger.sql("select ducto.erase_user('u')") == [(12,)]

    def forgotten(row: Row) -> bool:
        return "u" in (row["account_id"], row["actor_id"])

    emptied = {"metadata": None, "reason": None, "reference": None}
    for user in "uvt":
        now = ledger.run(ask.list_transactions(user, 1000))
        assert now == [row | (emptied if forgotten(row) else {}) for row in rows[user]]
        for hold in ledger.run(ask.list_reservations(user)):
            assert (hold["metadata"] is None) == forgotten(hold)
    assert [row["payload"] == {} for row in ledger.run(ask.fetch_events()) if row["account_id"] == "u"] == [True]
    assert all(row["payload"] for row in ledger.run(ask.fetch_events()) if row["account_id"] != "u")
    after = {user: ledger.one(ask.get_balance(user)) for user in "uvt"}
    for user, changes in (("u", 1), ("v", 0), ("t", 1)):
        assert after[user] == before[user] | {"revision": before[user]["revision"] + changes}
    tables = ledger.tables()
    assert ledger.sql("select ducto.erase_user('u')") == [(0,)]
    assert ledger.sql("select ducto.erase_user('nobody')") == [(0,)]
    assert ledger.tables() == tables
    # Keys still replay.
    assert ledger.one(ask.deduct("u", costs(5), "key", NOTE))["idempotent"] is True


def test_a_team_is_forgotten(ledger: Ledger) -> None:
    team("t", "u")(ledger)
    ask.add_credits("t", 50, metadata=NOTE)(ledger)
    ask.deduct_team_credits("t", "u", 5, metadata=NOTE)(ledger)
    assert ledger.sql("select ducto.erase_user('t')") == [(3,)]


@pytest.mark.parametrize("user", [None, "", " u"])
def test_nobody_is_forgotten(ledger: Ledger, user: str | None) -> None:
    raises("22023", "p_user_id")(ledger, ask.erase_user(user))


def test_forgetting_waits_for_charges(shop: CreditManager, conn: Connection, connect: Connect) -> None:
    shop.add_team_member(shop.create_team("T", 10).or_raise().team_id, "a").or_raise()
    slow, other = connect(autocommit=False), connect()
    CreditManager(slow).deduct("a", {"model": "m", "input_tokens": 1}, metadata=NOTE).or_raise()
    with blocked(conn, other, slow, lambda m: m.erase_user("a")) as waiting:
        slow.commit()
        assert waiting.result(30) == 2


# One's own


def signed_in(ledger: Ledger, claims: Any) -> None:
    text = claims if isinstance(claims, str) else json.dumps(claims)
    ledger.conn.execute("select set_config('request.jwt.claims', %s, true)", [text])


def test_the_margin_of_a_model_that_only_a_plan_has(conn: Connection) -> None:
    """What its costs say, else its own formula; a model of the list costs what the list says."""
    manager = CreditManager(conn)
    plan = {"id": "pro", "name": "Pro", "rate_overrides": {"own": "input_tokens * 9", "new": "input_tokens * 4",
        "shared": "input_tokens * 8"}}  # fmt: skip
    manager.publish_pricing({
        "models": {"shared": "input_tokens * 3"}, "plans": {"pro": plan}, "costs": {"own": "input_tokens * 2"},
        "factor": 10, "min_balance": 0,
    })  # fmt: skip
    manager.add_credits("u", 100_000)
    manager.set_user_plan("u", "pro")
    for model in ("own", "new", "shared"):
        manager.deduct("u", {"model": model, "input_tokens": 5}).or_raise()
    rows = {row.model: (row.total_spend, row.provider_cost, row.uncosted) for row in manager.spend_margin()}
    assert rows == {"own": (450, Decimal(10), 0), "new": (200, Decimal(20), 0), "shared": (400, Decimal(15), 0)}


def test_users_see_their_own(ledger: Ledger) -> None:
    steps: list[Step] = [*free, rich_v, *(ask.deduct_credits(user, points) for user, points in (("u", 14), ("v", 1)))]
    for step in steps:
        step(ledger)
    signed_in(ledger, {"sub": "u", "role": "authenticated"})
    assert ledger.one(ask.my_balance()) == ledger.one(ask.get_balance("u"))
    assert ledger.run(ask.my_transactions()) == ledger.run(ask.list_transactions("u"))
    assert [row["seq"] for row in ledger.run(ask.my_transactions(1, 3))] == [2]
    assert ledger.one(ask.my_plan()) == ledger.one(ask.get_user_plan("u"))
    reads(plan_id="free", allowance_remaining=0)(ledger, ask.my_plan())
    raises("22023", "p_limit")(ledger, ask.my_transactions(0))
    signed_in(ledger, {"sub": "ghost"})
    reads(user_id="ghost", balance=0)(ledger, ask.my_balance())
    lists()(ledger, ask.my_transactions())


@pytest.mark.parametrize(
    "call",
    [
        ask.my_balance(),
        ask.my_transactions(),
        ask.my_plan(),
        ask.my_statement(None, None),
        ask.my_daily_spend(None, None),
    ],
    ids=lambda call: str(call.name),
)
def test_whoever_is_nobody_sees_nothing(ledger: Ledger, call: Call) -> None:
    rich(ledger)
    refused = raises("42501", "signed in", "sub", "PostgREST")
    refused(ledger, call)
    for claims in (
        "", "{", "u", "null", "5", '"u"', "[]", '["sub"]', {}, {"role": "u"}, {"sub": None}, {"sub": ""}, {"sub": " u"},
        {"sub": 5}, {"sub": ["u"]}, {"sub": {"sub": "u"}}, {"sub": "x" * 256}, "[" * 100_000, '{"sub": "\\u0000"}',
    ):  # fmt: skip
        signed_in(ledger, claims)
        refused(ledger, call)

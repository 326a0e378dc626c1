"""Teams as sentences: pools and members, what a member may spend of a pool, and what leaving leaves behind."""

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connection
from ledger_helpers import (
    LONG,
    MOST,
    UNKNOWN,
    WINDOWS,
    Call,
    Check,
    Ledger,
    Step,
    ask,
    at,
    but,
    costs,
    gives,
    later,
    lists,
    prices,
    raises,
    reads,
    refuses,
    replays,
    rolled_back,
    table,
    team,
    tell,
)
from sessions import Arena, outcomes

BAD_IDS = [None, "", " ", " t", "t ", "t\n", "\u00a0t", LONG]
PLANS: dict[str, Any] = {
    "pro": {"id": "pro", "name": "Pro", "free_allowance": 40, "rate_overrides": {"any": "points * 0.5"}}
}

crew = team("crew", "ann", "bob")
hold = ask.reserve_team_credits("crew", "ann", 30)
capped = ask.add_team_member("crew", "ann", "member", 50)
capped_daily = ask.add_team_member("crew", "ann", "member", 50, "daily")
capped_monthly = ask.add_team_member("crew", "ann", "member", 50, "monthly")
rich = ask.add_credits("crew", 900)
denied = refuses("member_cap_exceeded")
unknown_team = refuses("team_not_found")
# A user's balance is not told to who takes it for a team's.
user_team = refuses("team_not_found", team_balance_after=0)
unknown_member = refuses("not_a_member")
no_hold = refuses("reservation_not_found")


def charge(amount: int, member: str = "ann", **more: Any) -> Call:
    return ask.deduct_team_credits("crew", member, amount, **more)


def usage(points: int | str, member: str = "ann", **more: Any) -> Call:
    return ask.deduct_team("crew", member, costs(points), **more)


def settle(amount: int, member: str = "ann", **more: Any) -> Call:
    return ask.deduct_team_credits("crew", member, amount, "@hold1", **more)


def member(name: str, **fields: Any) -> Check:
    """Among the team's members is one with these fields."""

    def check(ledger: Ledger, call: Call) -> None:
        found = {row["user_id"]: row for row in ledger.run(call)}
        assert {field: found[name][field] for field in fields} == fields

    return check


# fmt: off
@table(
    ("a team with a name and nothing else", [], ask.create_team("The crew"),
     gives(name="The crew", idempotent=False)),
    ("with an id", [], ask.create_team("The crew", team_id="crew"), gives(team_id="crew", name="The crew")),
    ("without one it has its own", [ask.create_team("The crew"), ask.create_team("The crew")],
     ask.get_team("@team1"), reads(team_id="@team1", name="The crew", balance=0, member_count=0)),
    ("with credits", [ask.create_team("The crew", 100, team_id="crew")], ask.list_transactions("crew"),
     lists({"type": "adjustment", "amount": 100, "balance_after": 100, "seq": 1, "actor_id": None})),
    ("without any there is no row", [ask.create_team("The crew", 0, team_id="crew")], ask.list_transactions("crew"),
     lists()),
    ("null is none", [], ask.create_team("The crew", None), gives()),
    ("the most there can be", [], ask.create_team("The crew", MOST), gives()),
    ("no bonus for it", [prices(signup_bonus=50), ask.create_team("The crew", team_id="crew")],
     ask.get_balance("crew"), reads(balance=0)),
    ("two of one name", [ask.create_team("The crew", team_id="a")], ask.create_team("The crew", team_id="b"), gives()),
    ("an id that a team has", [crew], ask.create_team("Other", team_id="crew"), refuses("team_exists")),
    ("an id that a user has", [ask.add_credits("u", 1)], ask.create_team("Other", team_id="u"), refuses("team_exists")),
    ("a repeated key makes none", [ask.create_team("The crew", 100, "k")], ask.create_team("The crew", 100, "k"),
     replays(team_id="@team", name="The crew")),
    ("also for none of credits", [ask.create_team("The crew", 0, "k")], ask.create_team("The crew", 0, "k"),
     replays(team_id="@team")),
    ("also with an id", [ask.create_team("The crew", 100, "k", "crew")], ask.create_team("The crew", 100, "k", "crew"),
     replays(team_id="crew")),
    ("other credits under the key", [ask.create_team("The crew", 100, "k")], ask.create_team("The crew", 99, "k"),
     refuses("idempotency_conflict")),
    ("another key for the id", [ask.create_team("The crew", 100, "k", "crew")],
     ask.create_team("The crew", 100, "other", "crew"), refuses("team_exists")),
    ("a key is of one team", [ask.create_team("The crew", 100, "k", "crew")],
     ask.create_team("The crew", 100, "k", "other"), gives(team_id="other", idempotent=False)),
    ("another key makes another", [ask.create_team("The crew", 100, "k")], ask.create_team("The crew", 100, "l"),
     gives(idempotent=False)),
    ("the key of the team's first credits is taken", [ask.create_team("The crew", 100, "k", "crew")],
     ask.add_credits("crew", 100, key="k"), refuses("idempotency_conflict")),
    ("no name", [], ask.create_team(None), raises("22023", "p_name")),
    ("an empty name", [], ask.create_team(""), raises("22023", "p_name")),
    ("a blank one", [], ask.create_team(" "), raises("22023", "p_name")),
    ("one of 256 characters", [], ask.create_team(LONG), raises("22023", "p_name", "255")),
    ("less than nothing", [], ask.create_team("The crew", -1), raises("22023", "p_initial_balance", "at least 0")),
    ("a blank key", [], ask.create_team("The crew", key=" "), raises("22023", "p_idempotency_key")),
    ("an empty id", [], ask.create_team("The crew", team_id=""), raises("22023", "p_team_id")),
    ("an id with a blank", [], ask.create_team("The crew", team_id="crew "), raises("22023", "p_team_id")),
)
def test_create_team(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


NO_TEAM = {"error": "team_not_found", "team_id": None, "name": None, "balance": 0, "member_count": 0}


@table(
    ("a team", [at("2026-01-02"), crew], ask.get_team("crew"),
     reads(team_id="crew", name="The crew", balance=100, member_count=2, created_at=datetime(2026, 1, 2, tzinfo=UTC),
         revision=3)),
    ("its pool", [crew, charge(30)], ask.get_team_balance("crew"),
     reads(team_id="crew", name="The crew", balance=70, member_count=2, revision=4)),
    ("only members are counted", [crew, ask.remove_team_member("crew", "bob")], ask.get_team("crew"),
     reads(member_count=1)),
    ("net of what has expired", [crew, ask.add_credits("crew", 50, expires_at="2026-01-10T00:00+00"),
     at("2026-01-10")], ask.get_team_balance("crew"), reads(balance=100)),
    ("and its team", [crew, ask.add_credits("crew", 50, expires_at="2026-01-10T00:00+00"), at("2026-01-10")],
     ask.get_team("crew"), reads(balance=100)),
    ("no such team", [], ask.get_team("crew"), lists(NO_TEAM | {"created_at": None})),
    ("nor its pool", [], ask.get_team_balance("crew"), lists(NO_TEAM)),
    ("a user is no team", [ask.add_credits("u", 9)], ask.get_team("u"), lists(NO_TEAM)),
    ("nor has a pool", [ask.add_credits("u", 9)], ask.get_team_balance("u"), lists(NO_TEAM)),
    ("a team is an account", [crew, hold], ask.get_balance("crew"),
     reads(user_id="crew", balance=100, reserved=30, available=70)),
)
def test_get_team(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("a member", [crew], ask.add_team_member("crew", "cid"),
     gives(team_id="crew", user_id="cid", role="member", revision=4)),
    ("with a role", [crew], ask.add_team_member("crew", "cid", "owner"), gives(role="owner")),
    ("nulls are defaults", [crew, ask.add_team_member("crew", "cid", None, None, None)], ask.get_team_members("crew"),
     member("cid", role="member", spend_cap=None, spend_cap_period="lifetime", total_spent=0, error=None)),
    ("with a cap", [crew, ask.add_team_member("crew", "cid", "member", 50, "daily")], ask.get_team_members("crew"),
     member("cid", spend_cap=50, spend_cap_period="daily")),
    ("with a cap of nothing", [crew, ask.add_team_member("crew", "cid", "member", 0)], ask.get_team_members("crew"),
     member("cid", spend_cap=0, spend_cap_period="lifetime")),
    ("it needs no account, and gets none", [crew, ask.add_team_member("crew", "cid")], ask.get_balance("cid"),
     reads(balance=0, revision=0)),
    ("twice it is one", [crew, ask.add_team_member("crew", "ann")], ask.get_team("crew"), reads(member_count=2)),
    ("twice it changes", [crew, charge(30), ask.add_team_member("crew", "ann", "lead", 9, "monthly")],
     ask.get_team_members("crew"),
     member("ann", role="lead", spend_cap=9, spend_cap_period="monthly", total_spent=30, spent=30)),
    ("a cap may be taken away", [crew, capped, ask.add_team_member("crew", "ann")], ask.get_team_members("crew"),
     member("ann", spend_cap=None)),
    ("of two teams", [crew, team("other")], ask.add_team_member("other", "ann"), gives(team_id="other")),
    ("no such team", [], ask.add_team_member("crew", "ann"), unknown_team),
    ("a user is no team", [ask.add_credits("u", 9)], ask.add_team_member("u", "ann"), unknown_team),
    ("a team is no member", [crew, team("other")], ask.add_team_member("crew", "other"), refuses("is_a_team")),
    ("not even of itself", [crew], ask.add_team_member("crew", "crew"), refuses("is_a_team")),
    ("a cap below nothing", [crew], ask.add_team_member("crew", "ann", "member", -1),
     raises("22023", "p_spend_cap", "at least 0")),
    ("a cap of a year", [crew], ask.add_team_member("crew", "ann", "member", 1, "yearly"),
     raises("22023", "p_spend_cap_period", "yearly", "lifetime", "daily", "weekly", "monthly")),
    ("a period without a name", [crew], ask.add_team_member("crew", "ann", "member", 1, ""),
     raises("22023", "p_spend_cap_period")),
    ("a role of 256 characters", [crew], ask.add_team_member("crew", "ann", LONG), raises("22023", "p_role", "255")),
)
def test_add_team_member(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("a member leaves", [crew], ask.remove_team_member("crew", "ann"),
     gives(team_id="crew", user_id="ann", role="member", revision=4)),
    ("and is none", [crew, ask.remove_team_member("crew", "ann")], ask.get_team_members("crew"),
     lists({"user_id": "bob"})),
    ("twice", [crew, ask.remove_team_member("crew", "ann")], ask.remove_team_member("crew", "ann"), unknown_member),
    ("one who never was", [crew], ask.remove_team_member("crew", "cid"), unknown_member),
    ("one of another team", [crew, team("other", "cid")], ask.remove_team_member("crew", "cid"), unknown_member),
    ("no such team", [], ask.remove_team_member("crew", "ann"), unknown_team),
    ("a user is no team", [ask.add_credits("u", 9)], ask.remove_team_member("u", "ann"), unknown_team),
    ("who rejoins goes on", [crew, charge(30), ask.remove_team_member("crew", "ann"),
     ask.add_team_member("crew", "ann", "guest")], ask.get_team_members("crew"),
     member("ann", role="guest", total_spent=30)),
    ("also under a cap", [crew, charge(30), ask.remove_team_member("crew", "ann"), capped], charge(21), denied),
    ("to the credit", [crew, charge(30), ask.remove_team_member("crew", "ann"), capped], charge(20), gives()),
    ("charges stay", [crew, charge(30), ask.remove_team_member("crew", "ann")], ask.get_transaction("@charge"),
     reads(account_id="crew", actor_id="ann", amount=-30)),
    ("and can be refunded", [crew, charge(30), ask.remove_team_member("crew", "ann")], ask.refund_credits("@charge"),
     gives(amount=30, new_balance=100)),
    ("who left charges nothing", [crew, ask.remove_team_member("crew", "ann")], charge(1), unknown_member),
    ("nor nothing at all", [crew, ask.remove_team_member("crew", "ann")], charge(0), unknown_member),
    ("nor holds", [crew, ask.remove_team_member("crew", "ann")], ask.reserve_team_credits("crew", "ann", 1),
     unknown_member),
    ("but settles what is held", [crew, hold, ask.remove_team_member("crew", "ann")], settle(20),
     gives(amount=-20, team_balance_after=80)),
    ("in parts", [crew, hold, ask.remove_team_member("crew", "ann"), settle(20, final=False)], settle(10),
     gives(team_balance_after=70)),
    ("beyond it too", [crew, hold, ask.remove_team_member("crew", "ann")], settle(40), gives(amount=-40)),
    ("which counts",
     [crew, hold, ask.remove_team_member("crew", "ann"), settle(40), ask.add_team_member("crew", "ann")],
     ask.get_team_members("crew"), member("ann", total_spent=40)),
    ("what is held can be released", [crew, hold, ask.remove_team_member("crew", "ann")],
     ask.release_reservation("@hold", "crew"), gives(reserved_total=0)),
)
def test_remove_team_member(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


@table(
    ("an unknown team has none", [], ask.get_team_members("crew"), lists()),
    ("a user has none", [ask.add_credits("u", 9)], ask.get_team_members("u"), lists()),
    ("a team without any", [team("crew")], ask.get_team_members("crew"), lists()),
    ("what each has spent, net of refunds", [crew, charge(30), charge(5, "bob"), ask.refund_credits("@charge1", 10)],
     ask.get_team_members("crew"), lists(
         {"user_id": "ann", "role": "member", "spend_cap": None, "total_spent": 20, "spend_cap_period": "lifetime"},
         {"user_id": "bob", "total_spent": 5})),
    ("of the whole life", [crew, capped_daily, charge(30), later(days=1), charge(20)], ask.get_team_members("crew"),
     member("ann", total_spent=50)),
    ("a hold is not spent", [crew, hold], ask.get_team_members("crew"), member("ann", total_spent=0)),
    ("nor what the pool's allowance pays", [prices(plans=PLANS), crew, ask.set_user_plan("crew", "pro"), charge(45)],
     ask.get_team_members("crew"), member("ann", total_spent=5)),
    ("nor a refund of that", [prices(plans=PLANS), crew, ask.set_user_plan("crew", "pro"), charge(45),
     ask.refund_credits("@charge")], ask.get_team_members("crew"), member("ann", total_spent=0)),
    ("nor what the member spends alone", [crew, ask.add_credits("ann", 50), ask.deduct_credits("ann", 9)],
     ask.get_team_members("crew"), member("ann", total_spent=0)),
)
def test_get_team_members(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, given, call, check)


# Charging a pool


@table(
    ("an amount", [], charge(30),
     gives(team_id="crew", user_id="ann", amount=-30, team_balance_after=70, cost=30, allowance_used=0, shortfall=0,
         warnings=[], idempotent=False, revision=4)),
    ("a usage", [], usage("2.5"), gives(team_id="crew", user_id="ann", amount=-2, cost=Decimal("2.5"))),
    ("what is left over is the pool's", [usage("2.5")], usage("2.5", "bob"), gives(amount=-3, team_balance_after=95)),
    ("a job", [], ask.deduct_team("crew", "ann", {"fixed_job": "report"}), gives(amount=-7)),
    ("nothing", [], charge(0), gives(amount=0, team_balance_after=100)),
    ("to the last credit: a pool has no min_balance", [], charge(100), gives(team_balance_after=0)),
    ("no further", [], charge(101), refuses("insufficient_credits")),
    ("a usage no further", [], usage(101), refuses("insufficient_credits")),
    ("into the pool's credit limit", [ask.set_credit_limit("crew", 20)], charge(120), gives(team_balance_after=-20)),
    ("and no further", [ask.set_credit_limit("crew", 20)], charge(121), refuses("insufficient_credits")),
    ("holds keep theirs", [hold], charge(71, "bob"), refuses("insufficient_credits")),
    ("and leave the rest", [hold], charge(70, "bob"), gives(team_balance_after=30)),
    ("the member's own credits play no part", [ask.add_credits("ann", 500)], charge(101),
     refuses("insufficient_credits")),
    ("nor are they touched", [ask.add_credits("ann", 500), charge(30)], ask.get_balance("ann"), reads(balance=500)),
    ("nor do the member's own caps", [ask.set_spend_cap("ann", 0)], charge(30), gives()),
    ("which it does not count to", [ask.add_credits("ann", 100), ask.set_spend_cap("ann", 50), charge(30)],
     ask.deduct_credits("ann", 50), gives()),
    ("nor the member's own plan", [prices(plans=PLANS), ask.set_user_plan("ann", "pro")], usage(30),
     gives(cost=30, allowance_used=0)),
    ("it is priced by the pool's", [prices(plans=PLANS), ask.set_user_plan("crew", "pro")], usage(30),
     gives(cost=15, allowance_used=15, amount=0)),
    ("whose allowance pays for all", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), usage(60)],
     usage(30, "bob"), gives(cost=15, allowance_used=10, amount=-5)),
    ("a default plan is for users", [prices(plans=PLANS, default_plan="pro"), team("new", "ann")],
     ask.deduct_team("new", "ann", costs(30)), gives(cost=30, allowance_used=0)),
    ("the pool's caps count", [ask.set_spend_cap("crew", 50)], charge(51), refuses("spend_cap_exceeded")),
    ("for all members", [ask.set_spend_cap("crew", 50), charge(30)], charge(21, "bob"), refuses("spend_cap_exceeded")),
    ("its warnings too", [ask.set_spend_cap("crew", 50, action="warn")], charge(51),
     gives(warnings=["spend_cap_exceeded"])),
    ("its lots burn", [ask.add_credits("crew", 50, expires_at="2026-01-10T00:00+00"), charge(40), at("2026-01-10")],
     ask.get_balance("crew"), reads(balance=100)),
    ("expired ones are not spent", [ask.add_credits("crew", 50, expires_at="2026-01-10T00:00+00"), at("2026-01-10")],
     charge(101), refuses("insufficient_credits", team_balance_after=100)),
    ("no such team", [], ask.deduct_team_credits("other", "ann", 1), unknown_team),
    ("nor for a usage", [], ask.deduct_team("other", "ann", costs(1)), unknown_team),
    ("where a user would open", [prices(signup_bonus=50)], ask.deduct_team_credits("other", "ann", 1), unknown_team),
    ("a user is no team", [ask.add_credits("u", 9)], ask.deduct_team_credits("u", "ann", 1), user_team),
    ("no member", [], charge(1, "cid"), unknown_member),
    ("a member of another team", [team("other", "cid")], charge(1, "cid"), unknown_member),
    ("the team is no member", [], charge(1, "crew"), unknown_member),
    ("an unknown model", [], ask.deduct_team("crew", "ann", {"model": "gpx", "input_tokens": 1}),
     raises("DU003", "gpx")),
    ("less than nothing", [], charge(-1), raises("22023", "p_amount", "at least 0")),
    ("a repeated key charges nothing", [charge(30, key="k"), charge(70, "bob")], charge(30, key="k"),
     replays(team_balance_after=70, user_id="ann", team_id="crew")),
    ("nor for one who has left", [charge(30, key="k"), ask.remove_team_member("crew", "ann")], charge(30, key="k"),
     replays()),
    ("another member under the key", [charge(30, key="k")], charge(30, "bob", key="k"),
     refuses("idempotency_conflict")),
    ("another amount under the key", [charge(30, key="k")], charge(31, key="k"), refuses("idempotency_conflict")),
    ("another model under the key", [charge(30, key="k")], charge(30, model="gpt", key="k"),
     refuses("idempotency_conflict")),
    ("a usage under the key", [charge(30, key="k")], usage(30, key="k"), refuses("idempotency_conflict")),
    ("1 is 1.0", [usage(2, key="k")], usage("2.0", key="k", metadata={"a": 1}), gives(idempotent=True)),
    ("a key is another team's too", [team("other", "ann"), charge(30, key="k")],
     ask.deduct_team_credits("other", "ann", 9, key="k"), gives(team_balance_after=91, idempotent=False)),
    ("and the member's own", [ask.add_credits("ann", 50), charge(30, key="k")],
     ask.deduct_credits("ann", 30, key="k"), gives(balance_after=20, idempotent=False)),
)
def test_charges_to_a_pool(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [crew, *given], call, check)


@table(
    ("a hold", [], hold, gives(amount=30, balance=100, reserved_total=30, warnings=[], idempotent=False, revision=4)),
    ("an estimate", [], ask.reserve_team("crew", "ann", costs("2.1")), gives(amount=3)),
    ("of everything", [], ask.reserve_team_credits("crew", "ann", 100), gives(amount=100)),
    ("no more", [], ask.reserve_team_credits("crew", "ann", 101), refuses("insufficient_credits")),
    ("nor together", [hold], ask.reserve_team_credits("crew", "bob", 71), refuses("insufficient_credits")),
    ("its own least balance", [], ask.reserve_team_credits("crew", "ann", 81, min_balance=20),
     refuses("insufficient_credits")),
    ("to that balance", [], ask.reserve_team_credits("crew", "ann", 80, min_balance=20), gives()),
    ("priced by the pool's plan", [prices(plans=PLANS), ask.set_user_plan("crew", "pro")],
     ask.reserve_team("crew", "ann", costs(30)), gives(amount=15)),
    ("the pool's allowance counts", [prices(plans=PLANS), ask.set_user_plan("crew", "pro")],
     ask.reserve_team_credits("crew", "ann", 140), gives()),
    ("as far as it goes", [prices(plans=PLANS), ask.set_user_plan("crew", "pro")],
     ask.reserve_team_credits("crew", "ann", 141), refuses("insufficient_credits")),
    ("under the pool's cap", [ask.set_spend_cap("crew", 50), hold], ask.reserve_team_credits("crew", "bob", 21),
     refuses("spend_cap_exceeded")),
    ("no such team", [], ask.reserve_team_credits("other", "ann", 1), unknown_team),
    ("nor for an estimate", [], ask.reserve_team("other", "ann", costs(1)), unknown_team),
    ("a user is no team", [ask.add_credits("u", 9)], ask.reserve_team_credits("u", "ann", 1),
     refuses("team_not_found", balance=0, reserved_total=0)),
    ("no member", [], ask.reserve_team("crew", "cid", costs(1)), unknown_member),
    ("no time", [], ask.reserve_team("crew", "ann", costs(1), ttl=0), raises("22023", "p_ttl_seconds")),
    ("a month and a second", [], ask.reserve_team_credits("crew", "ann", 1, ttl=2592001),
     raises("22023", "p_ttl_seconds")),
    ("less than nothing", [], ask.reserve_team_credits("crew", "ann", -1), raises("22023", "p_amount")),
    ("a repeated key holds nothing", [ask.reserve_team_credits("crew", "ann", 30, key="k")],
     ask.reserve_team_credits("crew", "ann", 30, key="k"), replays(reserved_total=30)),
    ("another member under the key", [ask.reserve_team_credits("crew", "ann", 30, key="k")],
     ask.reserve_team_credits("crew", "bob", 30, key="k"), refuses("idempotency_conflict")),
    ("an estimate under the key", [ask.reserve_team_credits("crew", "ann", 30, key="k")],
     ask.reserve_team("crew", "ann", costs(30), key="k"), refuses("idempotency_conflict")),
    ("another operation under the key", [ask.reserve_team("crew", "ann", costs(30), key="k")],
     ask.reserve_team("crew", "ann", costs(30), "chat", key="k"), refuses("idempotency_conflict")),
    ("it tells its member", [ask.reserve_team("crew", "ann", costs(3), "chat", {"a": 1})], ask.get_reservation("@hold"),
     reads(account_id="crew", actor_id="ann", status="active", amount=3, operation_type="chat", model="any",
         metadata={"a": 1})),
    ("to the team", [hold], ask.get_reservation("@hold", "crew"), reads(actor_id="ann")),
    ("not to the member", [hold], ask.get_reservation("@hold", "ann"), lists({"error": "reservation_not_found"})),
    ("it is the team's", [hold], ask.list_reservations("crew"), lists({"actor_id": "ann", "amount": 30})),
    ("and not the member's", [hold], ask.list_reservations("ann"), lists()),
    ("more of it", [hold], ask.extend_reservation("@hold", 70, user_id="crew"), gives(amount=100, balance=100)),
    ("too much of it", [hold], ask.extend_reservation("@hold", 71, user_id="crew"), refuses("insufficient_credits")),
    ("with its own least balance", [ask.reserve_team_credits("crew", "ann", 30, min_balance=20)],
     ask.extend_reservation("@hold", 51, user_id="crew"), refuses("insufficient_credits")),
    ("not for the member", [hold], ask.extend_reservation("@hold", 1, user_id="ann"), no_hold),
    ("released", [hold], ask.release_reservation("@hold", "crew"), gives(reserved_total=0)),
    ("not for the member either", [hold], ask.release_reservation("@hold", "ann"), no_hold),
)
def test_holds_on_a_pool(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [crew, *given], call, check)


@table(
    ("a hold is settled", [hold], settle(20), gives(amount=-20, team_balance_after=80, user_id="ann", team_id="crew")),
    ("by a usage", [hold], usage("20.5", hold="@hold"), gives(amount=-20, cost=Decimal("20.5"))),
    ("at the price of its day", [hold, prices(models={"any": "points * 9"})], usage(20, hold="@hold"), gives(cost=20)),
    ("in parts", [hold, settle(20, final=False)], ask.get_balance("crew"), reads(balance=80, reserved=10)),
    ("beyond it", [hold], settle(100), gives(team_balance_after=0, shortfall=0)),
    ("into debt", [hold], settle(101), gives(team_balance_after=-1, shortfall=1)),
    ("or not", [prices(overrun="reject"), hold], settle(101), refuses("insufficient_credits", shortfall=1)),
    ("other holds keep theirs", [hold, ask.reserve_team_credits("crew", "bob", 60)], settle(41), gives(shortfall=1)),
    ("late", [hold, later(minutes=10)], settle(20), gives(warnings=["reservation_expired"])),
    ("again", [hold, settle(20)], settle(20), replays(team_balance_after=80)),
    ("again with another amount", [hold, settle(20)], settle(21), refuses("idempotency_conflict")),
    ("again with a key", [hold, settle(20)], settle(20, key="k"), refuses("reservation_not_active")),
    ("a released one", [hold, ask.release_reservation("@hold")], settle(20), refuses("reservation_not_active")),
    ("of another member", [hold], settle(20, "bob"), no_hold),
    ("ended, of another member", [hold, settle(20)], settle(20, "bob"), no_hold),
    ("of another team", [team("other", "ann"), hold], ask.deduct_team_credits("other", "ann", 1, "@hold"), no_hold),
    ("of the member alone", [ask.add_credits("ann", 50), ask.reserve_credits("ann", 5)], settle(1), no_hold),
    ("by the member alone", [ask.add_credits("ann", 50), hold], ask.deduct_credits("ann", 1, "@hold"), no_hold),
    ("by the team as if it were a user", [hold], ask.deduct_credits("crew", 1, "@hold"), refuses("is_a_team")),
    ("for one who is no member", [hold], settle(1, "cid"), no_hold),
    ("no such hold", [], ask.deduct_team_credits("crew", "ann", 1, UNKNOWN), no_hold),
    ("a hold that is none", [], usage(1, hold="x"), no_hold),
    ("for one who left, the hold comes first", [ask.remove_team_member("crew", "ann")],
     ask.deduct_team_credits("crew", "ann", 1, "x"), no_hold),
)
def test_settling_a_pools_holds(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [crew, *given], call, check)


@table(
    ("to the team", [charge(30)], ask.refund_credits("@charge"),
     gives(user_id="crew", amount=30, new_balance=100, original_transaction_id="@charge")),
    ("whose it is", [charge(30)], ask.refund_credits("@charge", 10, user_id="crew"), gives(new_balance=80)),
    ("not the member's", [charge(30)], ask.refund_credits("@charge", user_id="ann"), refuses("transaction_not_found")),
    ("nor to the member", [ask.add_credits("ann", 5), charge(30), ask.refund_credits("@charge")],
     ask.get_balance("ann"), reads(balance=5)),
    ("it is told whose it was", [charge(30, model="gpt"), ask.refund_credits("@charge")],
     ask.get_transaction("@refund"), reads(account_id="crew", actor_id="ann", model="gpt", refers_to="@charge")),
    ("once", [charge(30), ask.refund_credits("@charge")], ask.refund_credits("@charge", user_id="crew"),
     refuses("already_refunded")),
    ("a member may be charged again", [rich, capped, charge(50), ask.refund_credits("@charge", 20)], charge(20),
     gives()),
    ("not more", [rich, capped, charge(50), ask.refund_credits("@charge", 20)], charge(21), denied),
    ("of today", [rich, capped_daily, charge(50), ask.refund_credits("@charge")], charge(50), gives()),
    ("of yesterday it frees nothing", [rich, capped_daily, charge(50), later(days=1), charge(50),
     ask.refund_credits("@charge1")], charge(1), denied),
    ("of a lifetime it does", [rich, capped, charge(50), later(days=400), ask.refund_credits("@charge1")], charge(50),
     gives()),
    ("of another member it does not", [rich, capped, charge(50), charge(50, "bob"), ask.refund_credits("@charge2")],
     charge(1), denied),
    ("the pool's caps are lowered",
     [rich, ask.set_spend_cap("crew", 50), charge(50), ask.refund_credits("@charge", 20)], charge(20, "bob"), gives()),
    ("the allowance is the pool's", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), charge(50)],
     ask.refund_credits("@charge", 20), gives(amount=10, allowance_restored=10)),
)
def test_refunds_of_a_pools_charges(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [crew, *given], call, check)


# Members' caps


@table(
    ("to the cap", [capped], charge(50), gives(amount=-50, warnings=[])),
    ("no further", [capped], charge(51), denied),
    ("a usage", [capped], usage(51), denied),
    ("in all", [capped, charge(30)], charge(21), denied),
    ("for a lifetime", [capped, charge(30), later(days=4000)], charge(21), denied),
    ("nothing passes", [capped, charge(50)], charge(0), gives()),
    ("under a cap of nothing", [ask.add_team_member("crew", "ann", "member", 0)], charge(1), denied),
    ("but nothing", [ask.add_team_member("crew", "ann", "member", 0)], charge(0), gives()),
    ("other members are not bound", [capped], charge(51, "bob"), gives()),
    ("nor do they count", [capped, charge(500, "bob")], charge(50), gives()),
    ("nor another team", [capped, team("other", "ann"), ask.deduct_team_credits("other", "ann", 90)], charge(50),
     gives()),
    ("nor what the member spends alone", [ask.add_credits("ann", 100), capped, ask.deduct_credits("ann", 60)],
     charge(50), gives()),
    ("what was spent before the cap does", [charge(30), capped], charge(21), denied),
    ("to the credit", [charge(30), capped], charge(20), gives()),
    ("a higher one goes on", [capped, charge(50), ask.add_team_member("crew", "ann", "member", 60)], charge(11),
     denied),
    ("and has room", [capped, charge(50), ask.add_team_member("crew", "ann", "member", 60)], charge(10), gives()),
    ("a hold to the cap", [capped], ask.reserve_team_credits("crew", "ann", 50), gives(warnings=[])),
    ("a hold no further", [capped], ask.reserve_team_credits("crew", "ann", 51), denied),
    ("an estimate", [capped], ask.reserve_team("crew", "ann", costs("50.1")), denied),
    ("beside a hold", [capped, hold], charge(21), denied),
    ("beside a hold of another", [capped, ask.reserve_team_credits("crew", "bob", 500)], charge(50), gives()),
    ("beside one that has expired", [capped, hold, later(minutes=10)], charge(50), gives()),
    ("and one of another member",
     [capped, ask.reserve_team_credits("crew", "bob", 60, ttl=900), hold, later(minutes=10)], charge(50), gives()),
    ("extended to it", [capped, hold], ask.extend_reservation("@hold", 20), gives(amount=50)),
    ("extended beyond it", [capped, hold], ask.extend_reservation("@hold", 21, user_id="crew"), denied),
    ("extended for another", [capped, ask.reserve_team_credits("crew", "bob", 30)], ask.extend_reservation("@hold", 90),
     gives()),
    ("a settlement passes and is told", [capped, hold], settle(51),
     gives(warnings=["hold_exceeded", "member_cap_exceeded"])),
    ("to the cap it is not", [capped, hold], settle(50), gives(warnings=["hold_exceeded"])),
    ("and counts", [capped, hold, settle(51)], charge(1), denied),
    ("replayed it tells the same", [capped, hold, settle(51)], settle(51),
     replays(warnings=["hold_exceeded", "member_cap_exceeded"])),
    ("of both caps both are told", [capped, ask.set_spend_cap("crew", 50), hold], settle(51),
     lambda ledger, call: _warns(ledger, call, {"hold_exceeded", "member_cap_exceeded", "spend_cap_exceeded"})),
    ("what the pool's allowance pays is not spent",
     [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), capped], charge(90),
     gives(allowance_used=40, amount=-50)),
    ("the rest is", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), capped], charge(91), denied),
    ("under a cap of nothing the allowance remains", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"),
     ask.add_team_member("crew", "ann", "member", 0)], charge(40), gives(amount=0)),
    ("which others' holds may claim", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), capped,
     ask.reserve_team_credits("crew", "bob", 30)], charge(61), denied),
    ("but for the rest", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), capped,
     ask.reserve_team_credits("crew", "bob", 30)], charge(60), gives(allowance_used=40, amount=-20)),
    ("or all of, and no more than is asked", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), capped,
     ask.reserve_team_credits("crew", "bob", 200)], charge(51), denied),
    ("which is the cap", [prices(plans=PLANS), ask.set_user_plan("crew", "pro"), capped,
     ask.reserve_team_credits("crew", "bob", 200)], charge(50), gives()),
    ("the pool's cap comes first", [capped, ask.set_spend_cap("crew", 40)], charge(51), refuses("spend_cap_exceeded")),
    ("before funds", [capped], charge(5000), denied),
    ("within it funds count", [ask.add_team_member("crew", "ann", "member", 5000)], charge(1001),
     refuses("insufficient_credits")),
    ("a day", [capped_daily, charge(50)], charge(1), denied),
    ("the next day", [capped_daily, charge(50), later(days=1)], charge(50), gives()),
    ("a month", [capped_monthly, charge(50), later(days=1)], charge(1), denied),
    ("the next month", [capped_monthly, charge(50), at("2026-02-01")], charge(50), gives()),
    ("a week", [ask.add_team_member("crew", "ann", "member", 50, "weekly"), charge(50), later(days=1)], charge(1),
     denied),
    ("the next week", [ask.add_team_member("crew", "ann", "member", 50, "weekly"), charge(50), at("2026-01-05")],
     charge(50), gives()),
    ("a daily cap in the midst of a day", [charge(30), capped_daily], charge(21), denied),
    ("on the day after", [charge(30), later(days=1), capped_daily], charge(50), gives()),
    ("a monthly cap in the midst", [charge(30), later(days=1), capped_daily, charge(5), capped_monthly], charge(16),
     denied),
    ("to the credit in the midst", [charge(30), later(days=1), capped_daily, charge(5), capped_monthly], charge(15),
     gives()),
    ("from a day to a lifetime", [charge(30), later(days=1), capped_daily, charge(10), capped], charge(11), denied),
    ("and back", [charge(30), later(days=1), capped, charge(10), capped_daily], charge(40), gives()),
    ("but no more", [charge(30), later(days=1), capped, charge(10), capped_daily], charge(41), denied),
    ("rejoining in the window", [capped_daily, charge(30), ask.remove_team_member("crew", "ann"), capped_daily],
     charge(21), denied),
)
def test_what_a_member_may_spend(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    tell(ledger, [crew, rich, *given], call, check)
# fmt: on


def _warns(ledger: Ledger, call: Call, warnings: set[str]) -> None:
    row = ledger.one(call)
    assert row["error"] is None
    assert set(row["warnings"]) == warnings


@pytest.mark.parametrize("zone", WINDOWS)
def test_a_members_window_is_the_local_day_or_month(conn: Connection, clock: Clock, zone: str) -> None:
    ledger = Ledger(conn, clock)
    ledger.publish(min_balance=0, timezone=zone)
    conn.execute("set timezone = 'Pacific/Kiritimati'")
    clock.set(WINDOWS[zone][0][0])
    team("crew", "daily, set late", "monthly, set late")(ledger)
    rich(ledger)
    for kind in ("daily", "monthly"):
        ask.add_team_member("crew", kind, "member", 10, kind)(ledger)
    for moment, kind, room, uses in WINDOWS[zone]:
        clock.set(moment)
        with conn.transaction(force_rollback=True):
            ask.add_team_member("crew", f"{kind}, set late", "member", 10, kind)(ledger)
            for name in (kind, f"{kind}, set late"):
                denied(ledger, charge(room + 1, name))
                gives(warnings=[])(ledger, charge(room, name))
        for name in (kind, f"{kind}, set late"):
            charge(uses, name)(ledger)
    assert ledger.violations() == []


def test_a_charge_tells_its_member(ledger: Ledger) -> None:
    for step in (crew, usage("2.5", "bob", key="k", metadata={"a": 1})):
        step(ledger)
    reads(
        account_id="crew",
        actor_id="bob",
        type="usage",
        amount=-2,
        cost=Decimal("2.5"),
        model="any",
        idempotency_key="k",
        metadata={"a": 1},
    )(ledger, ask.get_transaction("@charge", "crew"))
    lists({"error": "transaction_not_found"})(ledger, ask.get_transaction("@charge", "bob"))
    assert ledger.run(ask.list_transactions("bob")) == []
    assert [row["actor_id"] for row in ledger.run(ask.list_transactions("crew"))] == ["bob", None]
    reads(account_id="crew", cost=Decimal("2.5"), carry_after=Decimal("0.5"))(
        ledger, ask.explain_transaction("@charge", "crew")
    )


def test_of_several_faults_the_first_counts(ledger: Ledger) -> None:
    for step in (
        crew,
        ask.add_team_member("crew", "ann", "member", 5),
        ask.set_spend_cap("crew", 20),
        ask.add_credits("u", 9),
        charge(0, key="k"),
        ask.reserve_team_credits("crew", "ann", 0, key="k"),
    ):
        step(ledger)
    unknown = {"model": "unknown", "input_tokens": 1}
    for call, check in (
        (ask.deduct_team("crew", " ", unknown, "k", hold="x"), raises("22023", "p_user_id")),
        (ask.deduct_team("crew", "cid", {"model": 5}, "k", hold="x"), raises("22023", "model")),
        (ask.deduct_team("crew", "cid", unknown, "k", hold="x"), refuses("idempotency_conflict")),
        (ask.deduct_team("none", "cid", unknown, "k", hold="x"), unknown_team),
        (ask.deduct_team("u", "cid", unknown, "k", hold="x"), user_team),
        (ask.deduct_team("crew", "cid", unknown, hold="x"), no_hold),
        (ask.deduct_team("crew", "cid", unknown), unknown_member),
        (ask.deduct_team("crew", "ann", unknown), raises("DU003", "unknown")),
        (ask.deduct_team("crew", "ann", costs(1000)), refuses("spend_cap_exceeded")),
        (ask.deduct_team("crew", "ann", costs(20)), denied),
        (ask.reserve_team("crew", "ann", costs(1000)), refuses("spend_cap_exceeded")),
        (ask.reserve_team("crew", "ann", costs(20)), denied),
        (ask.reserve_team("crew", "cid", unknown, key="k"), refuses("idempotency_conflict")),
        (ask.reserve_team("crew", "cid", unknown), unknown_member),
        (ask.reserve_team("crew", "ann", unknown), raises("DU003", "unknown")),
    ):
        check(ledger, call)


TEAM_CALLS: list[Callable[[str | None], Call]] = [
    ask.get_team,
    ask.get_team_balance,
    ask.get_team_members,
    lambda name: ask.add_team_member(name, "ann"),
    lambda name: ask.remove_team_member(name, "ann"),
    lambda name: ask.reserve_team(name, "ann", costs(1)),
    lambda name: ask.reserve_team_credits(name, "ann", 1),
    lambda name: ask.deduct_team(name, "ann", costs(1)),
    lambda name: ask.deduct_team_credits(name, "ann", 1),
]
MEMBER_CALLS: list[Callable[[str | None], Call]] = [
    lambda user: ask.add_team_member("crew", user),
    lambda user: ask.remove_team_member("crew", user),
    lambda user: ask.reserve_team("crew", user, costs(1)),
    lambda user: ask.reserve_team_credits("crew", user, 1),
    lambda user: ask.deduct_team("crew", user, costs(1)),
    lambda user: ask.deduct_team_credits("crew", user, 1),
]


@pytest.mark.parametrize("name", BAD_IDS, ids=repr)
def test_an_id_that_is_none(ledger: Ledger, name: str | None) -> None:
    crew(ledger)
    for call in TEAM_CALLS:
        raises("22023", "p_team_id", "1 to 255")(ledger, call(name))
    for call in MEMBER_CALLS:
        raises("22023", "p_user_id", "1 to 255")(ledger, call(name))


KEYED_CALLS: list[Callable[[str], Call]] = [
    lambda key: ask.create_team("Other", 5, key),
    lambda key: ask.reserve_team("crew", "ann", costs(1), key=key),
    lambda key: ask.reserve_team_credits("crew", "ann", 1, key=key),
    lambda key: ask.deduct_team("crew", "ann", costs(1), key),
    lambda key: ask.deduct_team_credits("crew", "ann", 1, key=key),
]


@pytest.mark.parametrize("key", ["", " ", "\t\n", "\u00a0", LONG], ids=repr)
def test_a_key_that_is_none(ledger: Ledger, key: str) -> None:
    crew(ledger)
    for call in KEYED_CALLS:
        raises("22023", "p_idempotency_key", "1 to 255")(ledger, call(key))


@pytest.mark.parametrize("key", ["k", " k", "x" * 255, "🦆", "'"])
def test_every_keyed_call_answers_the_same_again(ledger: Ledger, key: str) -> None:
    for keyed in KEYED_CALLS:
        with rolled_back(ledger) as told:
            crew(told)
            call = keyed(key)
            gives(idempotent=False)(told, call)
            later(hours=2)(told)
            if call.name != "create_team":
                for step in (ask.remove_team_member("crew", "ann"), ask.remove_credits("crew", 500)):
                    step(told)
            told.publish(models={"other": "input_tokens"}, fixed={})
            replays()(told, call)
            replays()(told, call)


def test_metadata_is_an_object(ledger: Ledger) -> None:
    crew(ledger)
    for call in (
        ask.reserve_team("crew", "ann", costs(1), metadata="[]"),
        ask.reserve_team_credits("crew", "ann", 1, metadata="5"),
        ask.deduct_team("crew", "ann", costs(1), metadata="[]"),
        ask.deduct_team_credits("crew", "ann", 1, metadata='"text"'),
    ):
        raises("22023", "p_metadata", "object")(ledger, call)


def test_before_there_are_prices_there_are_teams(conn: Connection, clock: Clock) -> None:
    ledger = Ledger(conn, clock)
    for step in (crew, ask.add_credits("crew", 5), ask.remove_team_member("crew", "bob")):
        step(ledger)
    reads(balance=105, member_count=1)(ledger, ask.get_team("crew"))
    for call in (charge(1), usage(1), hold, ask.reserve_team("crew", "ann", costs(1))):
        with pytest.raises(psycopg.Error, match="pricing not loaded") as raised:
            ledger.one(call)
        assert raised.value.sqlstate == "DU001"
    assert ledger.violations() == []


def test_a_team_opens_with_an_event(ledger: Ledger) -> None:
    crew(ledger)
    (event,) = ledger.events("account_opened")
    assert event[1]["kind"] == "team"
    assert event[1]["plan_id"] is None
    but(refuses("team_exists"), ask.create_team("Other", team_id="crew"))(ledger)
    assert len(ledger.events("account_opened")) == 1


def test_the_largest_pool(ledger: Ledger) -> None:
    for step in (ask.create_team("The crew", MOST, team_id="crew"), ask.add_team_member("crew", "ann", None, MOST)):
        step(ledger)
    gives(reserved_total=MOST)(ledger, ask.reserve_team_credits("crew", "ann", MOST))
    gives(team_balance_after=0)(ledger, ask.deduct_team_credits("crew", "ann", MOST, "@hold"))
    member("ann", total_spent=MOST)(ledger, ask.get_team_members("crew"))
    denied(ledger, charge(1))
    gives(new_balance=MOST)(ledger, ask.refund_credits("@charge"))
    gives(team_balance_after=0)(ledger, charge(MOST))
    ask.add_credits("crew", MOST)(ledger)
    ask.add_team_member("crew", "ann")(ledger)
    gives(team_balance_after=0)(ledger, charge(MOST))
    member("ann", total_spent=MOST)(ledger, ask.get_team_members("crew"))
    assert ledger.violations() == []


def test_a_team_is_charged_and_holds_through_its_own_calls_only(ledger: Ledger) -> None:
    team("crew")(ledger)
    for call in (
        ask.reserve("crew", costs(1)),
        ask.reserve("crew", {"model": "unknown", "input_tokens": 1}, key="k"),
        ask.reserve_credits("crew", 1),
        ask.deduct("crew", costs(1)),
        ask.deduct("crew", costs(1), hold=UNKNOWN),
        ask.deduct_credits("crew", 1),
        ask.deduct_fixed("crew", "no such job"),
    ):
        refuses("is_a_team")(ledger, call)
    reads(balance=100, available=100)(ledger, ask.get_balance("crew"))
    gives(new_balance=101)(ledger, ask.add_credits("crew", 1))
    gives(new_balance=99)(ledger, ask.remove_credits("crew", 2))
    gives(credit_limit=3, available=102)(ledger, ask.set_credit_limit("crew", 3))


# Sessions that meet


def test_team_charges_under_a_members_cap(arena: Arena) -> None:
    arena.given(team("crew"), ask.add_credits("crew", 900), ask.add_team_member("crew", "ann", "member", 50))
    assert arena.race(8, ask.deduct_team_credits("crew", "ann", 20)) == {"ok": 2, "member_cap_exceeded": 6}
    (member,) = arena.ledger.run(ask.get_team_members("crew"))
    assert member["total_spent"] == 40
    reads(balance=960)(arena.ledger, ask.get_team_balance("crew"))
    arena.sound()


def test_creating_one_team(arena: Arena) -> None:
    assert arena.race(8, ask.create_team("The crew", 100, team_id="crew")) == {"ok": 1, "team_exists": 7}
    answers = arena.meet(8, lambda _: ask.create_team("Other", 100, "k"))
    assert outcomes(answers) == {"ok": 1, "replayed": 7}
    assert len({row["team_id"] for row in answers}) == 1
    assert arena.race(8, ask.create_team("Third", 0, "k3", "third")) == {"ok": 1, "replayed": 7}
    reads(balance=100)(arena.ledger, ask.get_team(answers[0]["team_id"]))
    arena.sound()


def test_a_member_comes_and_goes(arena: Arena) -> None:
    arena.given(team("crew", "ann"), ask.add_credits("crew", 900))
    calls = [ask.deduct_team_credits("crew", "ann", 10), ask.remove_team_member("crew", "ann")]
    counted = outcomes(arena.meet(8, lambda number: calls[number % 2]))
    assert counted["ok"] >= 1
    assert counted["ok"] + counted["not_a_member"] == 8
    rows = arena.ledger.run(ask.list_transactions("crew", type="usage"))
    assert len(rows) == counted["ok"] - 1
    arena.given(ask.add_team_member("crew", "ann"))
    (member,) = arena.ledger.run(ask.get_team_members("crew"))
    assert member["total_spent"] == 10 * len(rows)
    arena.sound()

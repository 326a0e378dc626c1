"""What went wrong in systems of this kind, tried here: one short test for each lesson that no other test tells."""

from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connect, Connection
from psycopg import sql

import ducto_pg
from ducto_pg import CreditManager

CONFIG: dict[str, Any] = {
    "models": {"any": "points"},
    "fixed": {"report": 7},
    "metrics": {"points": 0},
    "min_balance": 0,
}
REFUSALS = """
    insufficient_credits account_not_found is_a_team spend_cap_exceeded reservation_not_found reservation_not_active
    transaction_not_found not_refundable already_refunded refund_exceeds_original exceeds_grant plan_not_found
    cap_not_found team_exists team_not_found not_a_member member_cap_exceeded idempotency_conflict
    topup_not_found account_frozen hold_exceeded has_open_holds
"""


@pytest.fixture
def credits(conn: Connection) -> CreditManager:
    """Prices, and `u` with 100 credits."""
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG, "first")
    manager.add_credits("u", 100).or_raise()
    return manager


def test_a_session_that_has_charged_before_charges_the_price_published_since(
    credits: CreditManager, connect: Connect
) -> None:
    session = connect(autocommit=False)
    charges = CreditManager(session)
    usage = {"model": "any", "points": 2}
    for _ in range(7):
        assert charges.deduct("u", usage).or_raise().amount == -2
    session.rollback()
    charges.get_balance("u")
    credits.publish_pricing(CONFIG | {"models": {"any": "points * 3"}})
    assert charges.deduct("u", usage).or_raise().amount == -6
    assert charges.calculate_cost(usage).total == 6


def test_answer_ledger_and_balance_tell_the_same_amount(conn: Connection) -> None:
    for rounding in ("carry", "up", "down", "half_up"):
        manager = CreditManager(conn)
        manager.publish_pricing(CONFIG | {"rounding": rounding})
        before = manager.add_credits(rounding, 50).or_raise().new_balance
        for points in ("0.000000000001", "0.5", "1.5", "2.999999999999"):
            usage = {"model": "any", "points": Decimal(points)}
            answer = manager.deduct(rounding, usage).or_raise()
            row = manager.get_transaction(answer.transaction_id).or_raise()
            assert (row.amount, row.cost) == (answer.amount, answer.cost) == (answer.amount, Decimal(points))
            assert row.balance_after == answer.balance_after == before + answer.amount
            assert manager.get_balance(rounding).balance == answer.balance_after
            before = answer.balance_after


def test_a_job_costs_its_credits_and_nothing_of_a_model(conn: Connection) -> None:
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG | {"models": {"_default": "3 + points"}})
    manager.add_credits("u", 20).or_raise()
    assert manager.deduct_fixed("u", "report").or_raise().amount == -7


def test_activating_an_earlier_version_brings_its_plans_back(conn: Connection) -> None:
    manager = CreditManager(conn)
    for allowance in (10, 40):
        plans = {"free": {"id": "free", "name": "Free", "free_allowance": allowance}}
        manager.publish_pricing(CONFIG | {"plans": plans, "default_plan": "free"})
    manager.set_credit_limit("u", 0)
    assert manager.get_balance("u").available == 40
    manager.activate_pricing(1)
    assert manager.get_balance("u").available == 10


def test_publishing_a_plan_away_takes_it_from_nobody_and_back_again_gives_its_new_terms(conn: Connection) -> None:
    manager = CreditManager(conn)
    free = {"id": "free", "name": "Free", "free_allowance": 10, "rate_overrides": {"any": "points * 2"}}
    manager.publish_pricing(CONFIG | {"plans": {"free": free}})
    manager.set_user_plan("u", "free").or_raise()
    usage = {"model": "any", "points": 2}
    for plans, cost, left in (
        ({}, 4, 6),
        ({"other": {"id": "other", "name": "Other"}}, 4, 2),
        ({"free": free | {"free_allowance": 30, "rate_overrides": {}}}, 2, 20),
    ):
        manager.publish_pricing(CONFIG | {"plans": plans})
        assert manager.deduct("u", usage).or_raise().cost == cost
        assert manager.check_allowance("u").allowance_remaining == left
    assert manager.verify_ledger() == []


def test_metadata_names_no_model_member_or_expiry(credits: CreditManager) -> None:
    spoofed = {"model": "cheap", "actor_id": "eve", "expires_at": "2000-01-01", "plan_id": "pro", "user_id": "eve"}
    credits.create_team("The crew", 100, team_id="crew").or_raise()
    credits.add_team_member("crew", "u").or_raise()
    credits.set_spend_cap("u", 5, model="any").or_raise()
    credits.add_credits("u", 10, metadata=spoofed).or_raise()
    assert credits.deduct("u", {"model": "any", "points": 6}, metadata=spoofed).error == "spend_cap_exceeded"
    charge = credits.deduct_team_credits("crew", "u", 5, metadata=spoofed).or_raise().transaction_id
    row = credits.get_transaction(charge)
    assert (row.actor_id, row.model, row.plan_id, row.metadata) == ("u", None, None, spoofed)
    assert credits.sweep_expired_credits(True).expired_count == 0
    assert {row.user_id for row in credits.spend_by_user()} == {"u"}


def test_balances_are_told_once_on_the_way_down(credits: CreditManager, conn: Connection) -> None:
    credits.publish_pricing(CONFIG | {"low_balance": 20})
    for amount in (70, 9, 1, 5, 5):
        credits.deduct_credits("u", amount).or_raise()
    types = conn.execute("select type from ducto_private.events where type = 'low_balance'").fetchall()
    assert len(types) == 1
    credits.add_credits("u", 50).or_raise()
    credits.deduct_credits("u", 45).or_raise()
    types = conn.execute("select type from ducto_private.events where type = 'low_balance'").fetchall()
    assert len(types) == 2


def test_a_label_and_a_plan_come_back_as_they_were_given(conn: Connection) -> None:
    manager = CreditManager(conn)
    plans = {"Pro plan": {"id": "Pro plan", "name": "Pro", "free_allowance": 5}}
    manager.publish_pricing(CONFIG | {"plans": plans, "default_plan": "Pro plan"}, "spring")
    active = manager.get_active_pricing()
    assert active is not None
    assert (active.label, manager.get_pricing_history()[0].label) == ("spring", "spring")
    charge = manager.deduct_credits("u", 1).or_raise().transaction_id
    assert manager.get_transaction(charge).or_raise().plan_id == "Pro plan"


def test_pages_of_holds_taken_at_the_same_moment_lose_none(credits: CreditManager, clock: Clock) -> None:
    clock.set("2030-01-01")
    first = [credits.reserve_credits("u", 1).or_raise().reservation_id for _ in range(4)]
    clock.set("2030-01-01T00:00:01")
    second = [credits.reserve_credits("u", 1).or_raise().reservation_id for _ in range(4)]
    page = credits.list_reservations("u", limit=3)
    assert {hold.reservation_id for hold in page} == set(second)
    rest = credits.list_reservations("u", limit=3, before=page[-1].created_at)
    assert {hold.reservation_id for hold in rest} == set(first)
    assert credits.list_reservations("u", limit=3, before=rest[-1].created_at) == []


def test_every_refusal_is_one_of_the_list(conn: Connection) -> None:
    found = conn.execute(
        "select distinct m[1] from pg_proc as p"
        " cross join regexp_matches(p.prosrc, $$(?:refusal\\(|error := )'(\\w+)'$$, 'g') as m"
        " where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace)"
    ).fetchall()
    of_elements = {"invalid_argument", "out_of_range"}
    assert {"insufficient_credits"} <= {name for (name,) in found} <= set(REFUSALS.split()) | of_elements


def test_no_index_is_the_beginning_of_another(conn: Connection) -> None:
    doubled = conn.execute(
        """
        select a.indexrelid::regclass, b.indexrelid::regclass
        from pg_index as a
        join pg_index as b on b.indrelid = a.indrelid and b.indexrelid <> a.indexrelid
        join pg_class as c on c.oid = a.indrelid and c.relnamespace = 'ducto_private'::regnamespace
        where a.indpred is null and b.indpred is null and not a.indisunique
          and starts_with(b.indkey::text || ' ', a.indkey::text || ' ')
        """
    ).fetchall()
    assert doubled == []


def test_a_role_that_may_only_call_does_a_whole_day(credits: CreditManager, conn: Connection, db: str) -> None:
    role = sql.Identifier(f"caller_{conn.info.dbname}")
    conn.execute(sql.SQL("create role {}").format(role))
    try:
        ducto_pg.setup(db, grant_to=[f"caller_{conn.info.dbname}"]).or_raise()
        conn.execute(sql.SQL("set role {}").format(role))
        hold = credits.reserve("u", {"model": "any", "points": 9}).or_raise().reservation_id
        credits.extend_reservation(hold, 1).or_raise()
        charge = credits.deduct("u", {"model": "any", "points": 8}, reservation_id=hold).or_raise().transaction_id
        credits.refund_credits(charge).or_raise()
        credits.release_reservation(credits.reserve_credits("u", 1).or_raise().reservation_id).or_raise()
        credits.deduct_fixed("u", "report").or_raise()
        assert credits.explain_transaction(charge).or_raise().cost == 8
        assert credits.get_balance("u").balance == 93
        assert len(credits.list_transactions("u")) == 4
        for statement in (
            "select ducto.add_credits('u', 1)",
            "select ducto.activate_pricing(1)",
            "select * from ducto_private.accounts",
            "select ducto_private.new_id()",
            "select * from ducto_read.accounts",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())
    finally:
        conn.execute("reset role")
        conn.execute(sql.SQL("drop owned by {}").format(role))
        conn.execute(sql.SQL("drop role {}").format(role))


def test_keys_are_matched_without_a_search_through_history(credits: CreditManager, conn: Connection) -> None:
    conn.execute("set enable_seqscan = off")
    for query in (
        "select from ducto_private.transactions where account_id = 'u' and idempotency_key = 'k'",
        "select from ducto_private.transactions where account_id = 'u' and seq = 5",
        "select from ducto_private.hold_keys where account_id = 'u' and idempotency_key = 'k'",
        "select from ducto_private.holds where hold_id = gen_random_uuid()",
        "select from ducto_private.transactions where transaction_id = gen_random_uuid()",
    ):
        plan = "\n".join(row[0] for row in conn.execute(("explain " + query).encode()))
        assert "Seq Scan" not in plan, plan


def test_the_events_of_one_call_come_in_their_order(credits: CreditManager) -> None:
    credits.publish_pricing({**CONFIG, "signup_bonus": 10, "low_balance": 5, "min_balance": 0}, "with a bonus")
    credits.ack_events([event.event_id for event in credits.fetch_events()])
    for number in range(40):
        credits.deduct_credits(f"user-{number}", 7).or_raise()
    told: dict[str, list[str]] = {}
    for event in credits.fetch_events(1000):
        told.setdefault(event.account_id, []).append(event.type)
    assert len(told) == 40
    assert all(types == ["account_opened", "low_balance"] for types in told.values()), told

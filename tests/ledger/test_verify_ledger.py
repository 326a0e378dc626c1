"""The ledger is append-only, and `verify_ledger` finds whatever went round that."""

import psycopg
import pytest
from ledger_helpers import (
    Ledger,
    ask,
    charge,
    costs,
    free,
    hold,
    lists,
    prices,
    rich,
    settle,
)


def test_the_ledger_is_append_only(ledger: Ledger) -> None:
    for step in (
        ask.add_credits("u", 100, reference="invoice", metadata={"a": 1}),
        charge,
        ask.refund_credits("@charge", reason="sorry", metadata={"a": 1}),
    ):
        step(ledger)
    for statement in (
        "update transactions set amount = amount + 1",
        "update transactions set metadata = '{}'",
        "update transactions set metadata = null, amount = 0",
        "update transactions set idempotency_key = 'k'",
        "update transactions set created_at = now()",
        "update transactions set usage = null",
        "update transaction_details set reason = 'other'",
        "update transaction_details set reason = null, reference = 'other'",
        "update transaction_details set refers_to = null",
        "delete from transactions",
        "delete from transactions where type = 'refund'",
        "delete from transaction_details",
        "truncate transactions cascade",
        "truncate transaction_details",
        "with gone as (delete from transaction_details returning 1) select * from gone",
    ):
        before = ledger.tables()
        ledger.sql("set local search_path = ducto_private")
        with pytest.raises(psycopg.Error, match="append-only") as raised, ledger.conn.transaction():
            ledger.sql(statement)
        assert raised.value.sqlstate == "DU007"
        assert "refund_credits" in (raised.value.diag.message_hint or "")
        assert ledger.tables() == before
    ledger.sql("update ducto_private.transactions set metadata = null")
    ledger.sql("update ducto_private.transaction_details set reason = null, reference = null")
    erased = {"metadata": None, "reason": None, "reference": None}
    lists(erased, erased, erased)(ledger, ask.list_transactions("u"))


CORRUPTIONS = [
    ("accounts set balance = balance + 1", "balance is the sum of the ledger"),
    ("accounts set seq = seq + 1", "the account's seq is its number of rows"),
    ("accounts set carry = 0.25", "carry is that of the last row"),
    (
        "accounts set changed_at = changed_at - interval '9 days'",
        "the account was changed no earlier than its last row",
    ),
    ("accounts set revision = 0", "the account was changed no earlier than its last row"),
    ("accounts set lifetime_purchased = 7", "lifetime_purchased is purchases less their removals"),
    ("accounts set held = held - 1", "held is the sum of the open holds"),
    ("accounts set holds = holds + 1", "held is the sum of the open holds"),
    ("accounts set holds_due_at = 'infinity'", "no open hold expires before holds_due_at"),
    ("accounts set holds_due_at = null", "no open hold expires before holds_due_at"),
    ("accounts set allowance_used = 3", "allowance_used is that of the charges and refunds of its period"),
    ("accounts set rolled = -1", "rolled is what ended periods handed on"),
    ("accounts set plan_due_at = now()", "plan_due_at is the time of a scheduled change"),
    ("transactions set account_id = 'ghost'", "every row belongs to an account"),
    ("transactions set seq = seq + 9 where seq > 2", "seq has no gap"),
    ("transactions set balance_after = 5 where seq = 1", "balance_after follows from the row before"),
    ("transactions set amount = amount - 1 where type = 'usage'", "balance is the sum of the ledger"),
    ("transactions set amount = amount - 1 where type = 'usage'", "charged is the rounded cost"),
    ("transactions set created_at = 'infinity' where seq = 2", "time and revision never run backwards"),
    ("transactions set revision = 0 where seq = 2", "time and revision never run backwards"),
    ("transactions set cost = cost + 1 where cost is not null", "charged is the rounded cost"),
    ("transactions set cost = null where cost is not null", "charged is the rounded cost"),
    ("transactions set carry_after = 0.5 where seq = 2", "carry_after is what the charge left over"),
    ("transactions set allowance_used = 1 where type = 'usage'", "charged is the rounded cost"),
    (
        "transaction_details set refers_to = null where refers_to is not null and seq = 3",
        "a row refers to a row of its account",
    ),
    ("transactions set amount = 31 where type = 'refund'", "refunds stay within the charge"),
    ("transactions set pricing_version = 99 where type = 'usage'", "a charge has a published version"),
    (
        "transaction_details set lifetime_purchased = 5 where lifetime_purchased is not null",
        "lifetime_purchased follows the rows",
    ),
    (
        "transaction_details set transaction_id = gen_random_uuid() where lifetime_purchased is not null",
        "every row but a charge's has details",
    ),
    (
        "transaction_details set allowance_lapsed = 31 where refers_to is not null and seq = 3",
        "refunds stay within the charge",
    ),
    (
        "transaction_details set refers_to = transaction_id where refers_to is not null and seq = 3",
        "a row refers to a row of its account",
    ),
    (
        "transaction_details set refers_to = gen_random_uuid() where refers_to is not null and seq = 3",
        "a row refers to a row of its account",
    ),
    ("transactions set amount = -101 where type = 'removal'", "removals and expiry stay within the grant"),
    (
        "holds set charged = charged + 1 where status = 'settled'",
        "a hold's charged and cost are the sums of its settlements",
    ),
    ("holds set cost = 0 where charged > 0", "a hold's charged and cost are the sums of its settlements"),
    ("holds set given = 6 where status = 'active'", "a hold holds no more than it was given"),
    ("holds set given = 9 where overrun = 'bounded'", "a bounded hold charges no more than it was given"),
    ("holds set labels = '{b,a}' where status = 'active'", "labels are a set"),
    ("holds set labels = '{z}' where charged > 0", "a settlement carries its hold's labels, a refund its charge's"),
    ("transactions set labels = '{a,a}' where type = 'usage'", "labels are a set"),
    (
        "transactions set labels = null where type = 'refund'",
        "a settlement carries its hold's labels, a refund its charge's",
    ),
    (
        "transaction_details set bounded_cost = 40 where bounded_cost is not null",
        "only a bounded hold's last settlement charges less than its cost",
    ),
    ("transaction_details set bounded_cost = null", "charged is the rounded cost"),
    (
        "transaction_details set bounded_cost = 1 where warnings is null",
        "only a bounded hold's last settlement charges less than its cost",
    ),
    ("spend_caps set spent = 1 where subject = 'label key'", "a cap's spent is that of its window"),
    ("spend_caps set cap_type = 'yearly'", "a cap has a limit and an action"),
    ("holds set held = 99 where status = 'active'", "held is the sum of the open holds"),
    (
        "holds set status = 'released', held = 0, ended_at = now() where status = 'active'",
        "held is the sum of the open holds",
    ),
    ("holds set expires_at = 'epoch' where status = 'active'", "no open hold expires before holds_due_at"),
    ("accounts set refused = -1", "alerts are of amounts of at least 0, and told of 80 or 100 percent"),
    ("accounts set low_balance = -1", "alerts are of amounts of at least 0, and told of 80 or 100 percent"),
    ("accounts set allowance_told = 80", "alerts are of amounts of at least 0, and told of 80 or 100 percent"),
    ("accounts set auto_topup = false", "auto_topup says whether there is one"),
    ("auto_topups set active = false, due_key = null", "auto_topup says whether there is one"),
    ("auto_topups set this_month = 0", "an open top-up counts in a month, waits for none and is told again"),
    ("auto_topups set look_at = null", "an open top-up counts in a month, waits for none and is told again"),
    ("auto_topups set retry_at = now()", "an open top-up counts in a month, waits for none and is told again"),
    ("deliveries set event_id = gen_random_uuid()", "a delivery is of an event"),
]


@pytest.mark.parametrize(("corruption", "invariant"), CORRUPTIONS, ids=[row[0] for row in CORRUPTIONS])
def test_verify_ledger_finds(module_ledger: Ledger, corruption: str, invariant: str) -> None:
    with module_ledger.conn.transaction(force_rollback=True):
        ledger = Ledger(module_ledger.conn, module_ledger.clock)
        for step in (
            free,
            ask.add_credits("sound", 9),
            ask.reserve_credits("sound", 1),
            prices(),
            ask.add_credits("u", 100),
            hold,
            ask.deduct("u", costs(30), hold="@hold"),
            ask.refund_credits("@charge", 9),
            ask.set_spend_cap("u", 90, "lifetime", label="key"),
            ask.reserve_credits("u", 10, overrun="bounded", labels=("key",)),
            ask.deduct_credits("u", 30, "@hold"),
            ask.refund_credits("@charge", 2),
            ask.remove_credits("u", 5, transaction_id="@grant2"),
            ask.reserve_credits("u", 7),
            ask.set_auto_topup("u", 90, 5),
            ask.fetch_events(),
        ):
            step(ledger)
        assert ledger.violations() == []
        ledger.sql("set local session_replication_role = replica")
        where = " and" if " where " in corruption else " where"
        ledger.sql(f"update ducto_private.{corruption}{where} account_id = 'u'")
        found = ledger.violations()
        assert invariant in {row["invariant"] for row in found}, found
        assert {row["account_id"] for row in found} <= {"u", "ghost"}
        assert all(row["expected"] != row["actual"] for row in found if row["invariant"] == invariant), found
        assert ledger.run(ask.verify_ledger("sound")) == []
        assert ledger.run(ask.verify_ledger("u")) or ledger.run(ask.verify_ledger("ghost"))


@pytest.mark.parametrize(
    "gone",
    [
        "transactions where seq = 1",
        "transactions where seq = 2",
        "transactions where seq = 3",
        "transactions",
        "transaction_details where refers_to is not null",
        "holds where status = 'active'",
        "holds where status = 'settled'",
        "accounts",
    ],
)
def test_verify_ledger_misses(module_ledger: Ledger, gone: str) -> None:
    with module_ledger.conn.transaction(force_rollback=True):
        ledger = Ledger(module_ledger.conn, module_ledger.clock)
        for step in (rich, hold, settle(9), ask.refund_credits("@charge"), ask.reserve_credits("u", 1)):
            step(ledger)
        ledger.sql("set local session_replication_role = replica")
        ledger.sql(f"delete from ducto_private.{gone}")
        assert {row["account_id"] for row in ledger.violations()} == {"u"}


@pytest.mark.parametrize(
    "table",
    [
        "transactions",
        "holds",
        "hold_keys",
        "credit_lots",
        "spend_caps",
        "teams",
        "team_members",
        "events",
        "auto_topups",
    ],
)
def test_verify_ledger_finds_rows_of_no_account(module_ledger: Ledger, table: str) -> None:
    with module_ledger.conn.transaction(force_rollback=True):
        ledger = Ledger(module_ledger.conn, module_ledger.clock)
        for step in (
            prices(),
            ask.create_team("Crew", 50, team_id="u"),
            ask.add_credits("u", 50, expires_at="2999-01-01"),
            ask.add_team_member("u", "ann"),
            ask.set_spend_cap("u", 100),
            ask.set_auto_topup("u", 5, 5),
            ask.reserve_team_credits("u", "ann", 5, key="k"),
        ):
            step(ledger)
        assert ledger.violations() == []
        ledger.sql("set local session_replication_role = replica")
        ledger.sql(f"update ducto_private.{table} set account_id = 'ghost'")
        for found in (ledger.violations(), ledger.run(ask.verify_ledger("ghost"))):
            (orphans,) = [row for row in found if row["invariant"] == "every row belongs to an account"]
            assert orphans["account_id"] == "ghost"
            assert orphans["detail"].endswith(f"rows of {table}")

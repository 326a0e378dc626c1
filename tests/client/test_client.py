"""The managers: each call as the database has it, in whose transaction, exact, and with errors that say what."""

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from tempfile import TemporaryFile
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.adapt import Buffer, Loader
from psycopg.pq import Format
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from psycopg.types.numeric import FloatLoader
from psycopg.types.string import StrDumper, TextLoader
from psycopg_pool import AsyncConnectionPool, ConnectionPool

import ducto_pg
from ducto_pg import AsyncCreditManager, CreditManager, UsageMetrics
from ducto_pg.client.calls import Calls, Rpc
from ducto_pg.errors import NotInstalledError

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]

CONFIG = {
    "models": {"gpt-4": "input_tokens * 0.01 + output_tokens * 0.03", "_default": "input_tokens * 0.001"},
    "fixed": {"report": 7},
    "metrics": {"images": 0, "pages": 0},
    "free": ["images", "pages"],
    "min_balance": 0,
    "plans": {"pro": {"id": "pro", "name": "Pro", "free_allowance": 10, "features": {"seats": 3, "beta": False}}},
}
USAGE = UsageMetrics(model="gpt-4", input_tokens=100, output_tokens=30)
READ = ("text", "int4", "int8", "bool", "timestamptz", "date", "text[]")
RPCS = [call for call in vars(Calls).values() if isinstance(call, Rpc)]


def charges(name: str, value: object) -> list[dict[str, object]]:
    """A batch of a sound charge and one with this field."""
    return [{"user_id": "alice", "amount": 1}, {"user_id": "alice", name: value}]


class Nothing(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> None:
        return None


class Shouting(StrDumper):
    def dump(self, text: str) -> bytes:
        return text.upper().encode()


@pytest.fixture
def credits(conn: Connection) -> CreditManager:
    """A manager on an autocommit connection, prices published, and `alice` with 100 credits."""
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG, "first")
    manager.add_credits("alice", 100, "purchase").or_raise()
    return manager


class TestDeclarations:
    @pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
    def test_a_call_is_what_the_database_has(self, rpc: Rpc[..., Any], conn: Connection) -> None:
        found = conn.execute(
            """
            select p.proretset, p.pronargs, p.pronargdefaults, t.typrelid, p.prorettype::regtype::text,
              (select array_agg(format('%%s %%s', a.name, a.type::regtype) order by a.position)
                from unnest(p.proargnames, p.proargtypes) with ordinality as a (name, type, position)),
              pg_get_function_arguments(p.oid)
            from pg_proc as p join pg_type as t on t.oid = p.prorettype
            where p.pronamespace = 'ducto'::regnamespace and p.proname = %s
            """,
            [rpc.name],
        ).fetchall()
        assert len(found) == 1
        many, count, optional, relation, returns, arguments, declared = found[0]
        types = {"timestamptz": "timestamp with time zone"}
        assert (arguments or []) == [
            f"p_{p.name.rstrip('_')} {types.get(p.sql_type, p.sql_type)}" for p in rpc.parameters
        ]
        required = [p for p in rpc.parameters if p.default is inspect.Parameter.empty]
        assert rpc.parameters[: count - optional] == required
        for parameter in rpc.parameters[count - optional :]:
            default = declared.split(f"p_{parameter.name.rstrip('_')} ")[1].split(" DEFAULT ")[1].split(",")[0]
            row = conn.execute("select " + default).fetchone()
            assert row == (parameter.default,), parameter.name
        assert many is rpc.many
        if relation:
            attributes = conn.execute(
                "select array_agg(a.attname::text) from pg_attribute as a where a.attrelid = %s and a.attnum > 0",
                [relation],
            ).fetchone()
            assert attributes
            assert set(rpc.answer.model_fields) == set(attributes[0])
        else:
            assert {str: "text", int: "bigint", dict[str, Any]: "jsonb"}[rpc.answer] == returns

    def test_none_is_missing(self, conn: Connection) -> None:
        names = conn.execute(
            "select array_agg(p.proname::text) from pg_proc as p where p.pronamespace = 'ducto'::regnamespace"
        ).fetchone()
        assert names
        assert {rpc.name for rpc in RPCS} == set(names[0])

    def test_methods_have_signatures_and_docs(self, credits: CreditManager) -> None:
        assert list(inspect.signature(credits.deduct_fixed).parameters) == [
            "user_id",
            "job_name",
            "idempotency_key",
            "metadata",
            "labels",
            "occurred_at",
        ]
        assert all(inspect.getdoc(getattr(credits, rpc.name)) for rpc in RPCS)
        with pytest.raises(TypeError, match="usr"):
            credits.get_balance("alice", usr="alice")  # type: ignore[call-arg]


class TestRoundTrip:
    def test_a_day_in_the_life(self, credits: CreditManager) -> None:
        hold = credits.reserve("alice", USAGE, idempotency_key="r1").or_raise()
        assert (hold.amount, hold.reserved_total) == (2, 2)
        charge = credits.deduct("alice", USAGE, "r1", {"run": Decimal("1.10")}, hold.reservation_id).or_raise()
        assert (charge.amount, charge.cost, charge.idempotent) == (-1, Decimal("1.90"), False)
        assert credits.deduct("alice", USAGE, "r1", None, hold.reservation_id).idempotent
        entry = credits.get_transaction(charge.transaction_id)
        assert entry.usage == {"model": "gpt-4", "input_tokens": 100, "output_tokens": 30}
        assert str(entry.metadata) == "{'run': Decimal('1.10')}"
        assert entry.carry_after == Decimal("0.90")
        assert credits.deduct_fixed("alice", "report").or_raise().amount == -7
        assert credits.refund_credits(charge.transaction_id).or_raise().amount == 1
        assert [t.type for t in credits.list_transactions("alice")] == ["refund", "usage", "usage", "purchase"]
        assert [t.seq for t in credits.list_transactions("alice", limit=2, before=3)] == [2, 1]
        later = datetime.now(UTC) + timedelta(hours=1)
        assert credits.list_transactions("alice", from_=later) == []
        assert credits.explain_transaction(charge.transaction_id).cost == Decimal("1.90")
        assert credits.get_balance("alice").balance == 93
        assert credits.verify_ledger() == []
        assert credits.version() == ducto_pg.__version__

    def test_plans_caps_and_expiry(self, credits: CreditManager) -> None:
        assert credits.set_user_plan("alice", "pro").or_raise().plan_id == "pro"
        plan = credits.get_user_plan("alice")
        assert (plan.plan_name, plan.free_allowance, plan.features["seats"]) == ("Pro", 10, 3)
        seats, beta, absent = (credits.check_feature("alice", name) for name in ("seats", "beta", "sso"))
        assert [(found.value, found.has_feature) for found in (seats, beta, absent)] == [
            (3, True),
            (False, False),
            (None, False),
        ]
        assert credits.deduct_fixed("alice", "report").or_raise().allowance_used == 7
        allowance = credits.check_allowance("alice")
        assert (allowance.allowance_remaining, allowance.period_start[-15:]) == (3, "T00:00:00+00:00")
        assert credits.set_user_plan("alice").or_raise().plan_id == ""
        with pytest.raises(ducto_pg.PlanNotFoundError):
            credits.set_user_plan("alice", "gold").or_raise()

        cap = credits.set_spend_cap("alice", 5, "monthly", "gpt-4", "deny").or_raise()
        assert (cap.cap_type, cap.model, cap.limit, cap.action) == ("monthly", "gpt-4", 5, "deny")
        assert [(c.cap_type, c.model, c.limit) for c in credits.list_spend_caps("alice")] == [("monthly", "gpt-4", 5)]
        check = credits.check_spend_cap("alice", "gpt-4", 6)
        assert (check.capped, check.cap_limit, check.action) == (True, 5, "deny")
        with pytest.raises(ducto_pg.SpendCapExceededError):
            credits.deduct_credits("alice", 6, model="gpt-4").or_raise()
        assert credits.remove_spend_cap("alice", "monthly", "gpt-4").or_raise().limit == 5
        with pytest.raises(ducto_pg.CapNotFoundError):
            credits.remove_spend_cap("alice", "monthly", "gpt-4").or_raise()

        soon = datetime.now(UTC) + timedelta(hours=1)
        lot = credits.add_credits("alice", 4, "promotion", expires_at=soon).or_raise()
        assert credits.get_transaction(lot.transaction_id).expires_at == soon
        assert credits.sweep_expired_credits(dry_run=True).or_raise().model_dump() == {
            "error": None,
            "expired_count": 0,
            "expired_amount": 0,
            "dry_run": True,
            "account_count": 1,
        }
        assert credits.verify_ledger() == []

    def test_a_team(self, credits: CreditManager) -> None:
        team = credits.create_team("Reds", 50, "order-1").or_raise()
        assert credits.create_team("Reds", 50, "order-1").model_dump() == team.model_dump() | {"idempotent": True}
        credits.add_team_member(team.team_id, "alice", "captain", 30).or_raise()
        hold = credits.reserve_team(team.team_id, "alice", USAGE).or_raise()
        charge = credits.deduct_team(team.team_id, "alice", USAGE, reservation_id=hold.reservation_id).or_raise()
        assert (charge.team_id, charge.user_id, charge.amount, charge.team_balance_after) == (
            team.team_id,
            "alice",
            -1,
            49,
        )
        held = credits.reserve_team_credits(team.team_id, "alice", 4, model="gpt-4").or_raise()
        assert credits.deduct_team_credits(team.team_id, "alice", 4, held.reservation_id).or_raise().amount == -4
        with pytest.raises(ducto_pg.MemberCapExceededError):
            credits.reserve_team_credits(team.team_id, "alice", 26).or_raise()
        with pytest.raises(ducto_pg.NotAMemberError):
            credits.deduct_team(team.team_id, "bob", USAGE).or_raise()
        with pytest.raises(ducto_pg.IsATeamError):
            credits.deduct(team.team_id, USAGE).or_raise()
        found = credits.get_team(team.team_id).or_raise()
        assert (found.name, found.balance, found.member_count, found.created_at[10:11]) == ("Reds", 45, 1, "T")
        assert credits.get_team_balance(team.team_id).or_raise().balance == 45
        (member,) = credits.get_team_members(team.team_id)
        assert (member.user_id, member.role, member.spend_cap, member.total_spent) == ("alice", "captain", 30, 5)
        assert credits.remove_team_member(team.team_id, "alice").or_raise().user_id == "alice"
        assert credits.get_team_members(team.team_id) == []
        assert credits.verify_ledger() == []

    def test_a_batch(self, credits: CreditManager) -> None:
        credits.create_team("Reds", 50, team_id="reds").or_raise()
        credits.add_team_member("reds", "alice").or_raise()
        answers = credits.deduct_batch(
            [
                {"user_id": "alice", "metrics": USAGE, "idempotency_key": "k", "metadata": {"n": Decimal("0.10")}},
                {"user_id": "alice", "metrics": {"model": "none-such", "pages": Decimal("0.10")}},
                {"user_id": "alice", "amount": 1000, "model": "gpt-4"},
                {"user_id": "alice", "job": "reprot"},
                {"user_id": "alice", "team_id": "reds", "amount": 3},
            ]
        )
        assert [(answer.amount, answer.error) for answer in answers] == [
            (-1, None),
            (0, None),
            (0, "insufficient_credits"),
            (0, "unknown_job"),
            (-3, None),
        ]
        with pytest.raises(ducto_pg.UnknownJobError):
            answers[3].or_raise()
        entries = [credits.get_transaction(answer.transaction_id) for answer in answers[:2]]
        assert [str(entry.metadata or entry.usage) for entry in entries] == [
            "{'n': Decimal('0.10')}",
            "{'model': 'none-such', 'pages': Decimal('0.10')}",
        ]
        assert credits.deduct("alice", USAGE, "k").idempotent
        assert credits.deduct_batch([]) == []

    def test_statistics_and_events(self, credits: CreditManager) -> None:
        credits.deduct_credits("alice", 30, model="gpt-4").or_raise()
        credits.add_credits("bob", 20).or_raise()
        charge = credits.deduct_credits("bob", 20).or_raise()
        credits.refund_credits(charge.transaction_id, 5).or_raise()
        users = credits.spend_by_user()
        assert [(row.user_id, row.total_spend, row.transaction_count, row.refunded) for row in users] == [
            ("alice", 30, 1, 0),
            ("bob", 20, 1, 5),
        ]
        assert [(row.user_id, row.total_spend) for row in credits.top_users(1)] == [("alice", 30)]
        assert credits.spend_by_model()[0].model == "gpt-4"
        (day,) = credits.daily_spend(datetime.now(UTC) - timedelta(days=1))
        assert (len(day.date), day.total_spend, str(day.cost)) == (10, 50, "50")
        total = credits.aggregate_stats()
        assert (total.total_credits_consumed, total.active_users, total.avg_daily_spend) == (50, 2, 50)
        assert (total.top_model, total.top_user) == ("gpt-4", "alice")
        assert credits.aggregate_stats(end=datetime(2020, 1, 1, tzinfo=UTC)).total_credits_consumed == 0
        assert credits.rollup_usage() >= 0

        events = credits.fetch_events(1000)
        assert ("account_opened", "bob") in {(event.type, event.account_id) for event in events}
        assert credits.fetch_events() == []
        assert credits.ack_events([event.event_id for event in events] + ["none"]) == len(events)
        credits.add_credits("bob", 1, metadata={"name": "Bob"})
        assert credits.erase_user("bob") > 0
        assert credits.verify_ledger() == []

    def test_what_is_mine(self, credits: CreditManager, conn: Connection) -> None:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            credits.my_balance()
        with conn.transaction():
            conn.execute("""set local request.jwt.claims = '{"sub": "alice"}'""")
            assert credits.my_balance().balance == 100
            assert [entry.amount for entry in credits.my_transactions()] == [100]
            assert credits.my_plan().plan_id is None

    def test_refusals_are_answers_and_the_transaction_goes_on(self, connect: Connect, credits: CreditManager) -> None:
        with connect(autocommit=False) as mine:
            manager = CreditManager(mine)
            refused = manager.deduct_credits("alice", 1000)
            assert (refused.error, refused.transaction_id, refused.amount) == ("insufficient_credits", "", 0)
            with pytest.raises(ducto_pg.InsufficientCreditsError) as caught:
                refused.or_raise()
            assert caught.value.result is refused
            assert (str(caught.value), caught.value.code) == (
                "insufficient_credits: Balance, allowance and credit limit do not admit the amount."
                " The balance is 100.",
                "insufficient_credits",
            )
            assert manager.deduct_credits("alice", 1).or_raise().balance_after == 99

    def test_no_active_pricing_is_none(self, conn: Connection) -> None:
        assert CreditManager(conn).get_active_pricing() is None


class TestIds:
    def test_a_uuid_is_taken_wherever_an_id_is(self, credits: CreditManager, conn: Connection) -> None:
        user, team, key = uuid4(), uuid4(), uuid4()
        assert credits.add_credits(user, 100, idempotency_key=key).or_raise().user_id == str(user)
        assert credits.add_credits(str(user), 100, idempotency_key=str(key)).idempotent
        hold = credits.reserve_credits(user, 5).or_raise()
        assert credits.release_reservation(UUID(hold.reservation_id), user).or_raise().reserved_total == 0
        credits.deduct_credits(user, 5).or_raise()
        row = conn.execute("select transaction_id from ducto_read.transactions where type = 'usage'").fetchone()
        assert row
        assert isinstance(row[0], UUID)
        assert credits.get_transaction(row[0], user).amount == -5
        assert credits.refund_credits(row[0]).or_raise().new_balance == 100
        assert credits.create_team("Reds", 10, team_id=team).or_raise().team_id == str(team)
        credits.add_team_member(team, user).or_raise()
        batch = [
            {"user_id": user, "team_id": team, "amount": 1, "idempotency_key": key},
            {"user_id": user, "amount": 2},
        ]
        assert [answer.error for answer in credits.deduct_batch(batch)] == [None, None]
        assert credits.get_team_balance(team).balance == 9
        credits.set_spend_cap(user, 0, action="notify").or_raise()
        credits.deduct_credits(user, 1).or_raise()
        assert credits.ack_events([UUID(event.event_id) for event in credits.fetch_events()]) > 0
        assert credits.verify_ledger(user) == []


class TestPublishing:
    def test_none_for_what_is_needed(self, credits: CreditManager) -> None:
        """As from a lookup that found nobody: the fault is the argument's, not the installation's."""
        nobody: Any = None
        with pytest.raises(ducto_pg.InvalidArgumentError, match="p_user_id must be a text"):
            credits.get_balance(nobody)
        with pytest.raises(ducto_pg.InvalidArgumentError, match=r"p_amount must be at least 0, .*, not null"):
            credits.deduct_credits("alice", nobody)

    def test_a_time_zone_that_says_nothing(self, credits: CreditManager) -> None:
        silent = type("Silent", (tzinfo,), {"utcoffset": lambda zone, moment: None})()
        with pytest.raises(ducto_pg.InvalidArgumentError, match="start must be a datetime with a time zone"):
            credits.top_users(start=datetime(2026, 1, 1, tzinfo=silent))

    def test_versions(self, credits: CreditManager) -> None:
        first = credits.get_active_pricing()
        assert first
        assert (first.version, first.label, first.config.models) == (1, "first", CONFIG["models"])
        assert credits.publish_pricing(CONFIG, "first") == first
        second = credits.publish_pricing({"models": {"m": "input_tokens * 0.1"}}, activate=False)
        assert second.version == 2
        assert credits.get_active_pricing() == first
        assert credits.activate_pricing(2) == second
        assert [(item.version, item.active) for item in credits.get_pricing_history()] == [(2, True), (1, False)]

    def test_fractions_come_back_exact(self, db: str, connect: Connect) -> None:
        plans = {"p": {"id": "p", "name": "P", "features": {"ratio": Decimal("0.10")}}}
        prices = {"models": {"_default": "seconds"}, "metrics": {"seconds": Decimal("0.50")}, "plans": plans}
        with ConnectionPool(db, min_size=1, max_size=1, open=True) as pool, CreditManager(db) as kept:
            for number, manager in enumerate((CreditManager(pool), kept, CreditManager(connect()))):
                config = manager.publish_pricing(prices, f"label {number}").config
                assert str(config.metrics) == "{'seconds': Decimal('0.50')}"
                assert config.plans
                assert str(config.plans["p"].features) == "{'ratio': Decimal('0.10')}"

    def test_all_or_nothing_on_an_autocommit_connection(self, credits: CreditManager, conn: Connection) -> None:
        def functions() -> Any:
            return conn.execute("select count(*) from pg_proc where proname ~ '^(price|models)_'").fetchone()

        before = functions()
        with pytest.raises(ducto_pg.InvalidArgumentError, match="timezone"):
            credits.publish_pricing({"models": {"m": "input_tokens * 7"}, "timezone": "Europe/Berlin"})
        assert functions() == before
        assert len(credits.get_pricing_history()) == 1

    def test_a_bad_config_touches_nothing(self, connect: Connect) -> None:
        with connect(autocommit=False) as mine:
            with pytest.raises(ducto_pg.ConfigError, match=r"models\.m"):
                CreditManager(mine).publish_pricing({"models": {"m": "input_tokns"}})
            assert mine.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


class TestTransactions:
    def test_a_connection_is_never_begun_committed_or_rolled_back(
        self, connect: Connect, credits: CreditManager, conn: Connection
    ) -> None:
        conn.execute("create table orders (id integer)")
        with connect(autocommit=False) as mine:
            manager = CreditManager(mine)
            mine.execute("insert into orders values (1)")
            manager.deduct("alice", USAGE).or_raise()
            assert mine.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
            mine.rollback()
            assert credits.get_balance("alice").balance == 100
            mine.execute("insert into orders values (2)")
            manager.deduct_credits("alice", 5).or_raise()
            mine.commit()
        assert credits.get_balance("alice").balance == 95
        assert conn.execute("select id from orders").fetchall() == [(2,)]
        with conn.transaction(force_rollback=True):
            credits.deduct_credits("alice", 5).or_raise()
        assert credits.get_balance("alice").balance == 95

    def test_misuse_aborts_only_what_it_was_in(self, connect: Connect, credits: CreditManager) -> None:
        with connect(autocommit=False) as mine:
            with pytest.raises(ducto_pg.UnknownJobError), mine.transaction():
                CreditManager(mine).deduct_fixed("alice", "reprot")
            assert CreditManager(mine).deduct_fixed("alice", "report").or_raise().balance_after == 93

    def test_on_a_pool_each_call_is_committed(self, db: str, credits: CreditManager) -> None:
        with ConnectionPool(db, min_size=1, max_size=3, open=True) as pool:
            manager = CreditManager(pool)
            with pytest.raises(ducto_pg.UnknownJobError):
                manager.deduct_fixed("alice", "none")
            with ThreadPoolExecutor(8) as threads:
                charges = list(threads.map(lambda n: manager.deduct_credits("alice", 1, None, f"k{n % 20}"), range(40)))
            assert sum(charge.idempotent for charge in charges) == 20
            assert credits.get_balance("alice").balance == 80
            assert manager.setup() == ducto_pg.SetupResult()

    def test_on_a_dsn_each_call_is_committed(self, db: str, credits: CreditManager, conn: Connection) -> None:
        with CreditManager(db) as manager, ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: manager.deduct_credits("alice", 1).or_raise(), range(20)))
            assert credits.get_balance("alice").balance == 80
            others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
            killed = conn.execute(others + " and datname = current_database()").fetchall()
            assert len(killed) == 1
            with pytest.raises(psycopg.OperationalError):
                manager.get_balance("alice")
            assert manager.get_balance("alice").balance == 80

    def test_on_a_pool_a_call_takes_three_round_trips_and_one_where_it_is_autocommit(
        self, db: str, credits: CreditManager
    ) -> None:
        found: list[int] = []
        for options in ({}, {"autocommit": True}):
            with (
                ConnectionPool[Connection](db, min_size=1, max_size=1, kwargs=options, open=True) as pool,
                TemporaryFile("w+") as trace,
            ):
                with pool.connection() as lent:
                    lent.pgconn.trace(trace.fileno())
                CreditManager(pool).deduct_credits("alice", 1).or_raise()
                with pool.connection() as lent:
                    lent.pgconn.untrace()
                trace.seek(0)
                found.append(trace.read().count("ReadyForQuery"))
        assert found == [3, 1]
        assert credits.get_balance("alice").balance == 98

    def test_no_statement_stays_prepared(self, credits: CreditManager, conn: Connection) -> None:
        for _ in range(10):
            credits.get_balance("alice")
        assert conn.execute("select count(*) from pg_prepared_statements").fetchone() == (0,)


class TestExactness:
    def test_whatever_the_connection_was_told(self, credits: CreditManager, conn: Connection) -> None:
        before = credits.list_transactions("alice"), credits.reserve_credits("alice", 0)
        conn.row_factory = dict_row
        conn.adapters.register_loader("numeric", FloatLoader)
        conn.adapters.register_loader("jsonb", TextLoader)
        for kind in READ:
            conn.adapters.register_loader(kind, Nothing)
        conn.adapters.register_dumper(str, Shouting)
        set_json_loads(lambda data: None, conn)
        conn.execute("set datestyle = 'SQL, DMY'")
        assert credits.list_transactions("alice") == before[0]
        assert credits.reserve_credits("alice", 0).warnings == before[1].warnings == []
        price = credits.calculate_cost({"model": "gpt-4", "input_tokens": 1, "pages": Decimal("0.10")})
        assert str(price.total) == "0.01"
        assert price.breakdown == {"model": "gpt-4", "input_tokens": 1, "output_tokens": 0, "tool_count": 0}
        noted = credits.add_credits("bob", 10**18, paid_amount=Decimal("0.10"), metadata={"n": Decimal("1e-20")})
        entry = credits.get_transaction(noted.transaction_id)
        assert (str(entry.paid_amount), str(entry.metadata)) == ("0.10", "{'n': Decimal('1E-20')}")

    @pytest.mark.parametrize(
        ("ask", "message"),
        [
            (lambda c: c.add_credits("alice", 5.0), "amount must be a whole number, not 5.0"),
            (lambda c: c.add_credits("alice", True), "amount must be a whole number, not True"),
            (lambda c: c.add_credits("alice", "5"), "amount must be a whole number"),
            (
                lambda c: c.add_credits("alice", 5, paid_amount=0.1),
                "paid_amount must be a Decimal or a whole number, not 0.1",
            ),
            (lambda c: c.add_credits("alice", 0), "p_amount must be at least 1"),
            (lambda c: c.add_credits(7, 5), "user_id must be text, not 7"),
            (lambda c: c.add_credits(" alice", 5), "p_user_id"),
            (lambda c: c.add_credits("al\0ice", 5), "NUL"),
            (lambda c: c.add_credits("alice", 5, metadata={"a": "\0"}), "Unicode"),
            (lambda c: c.add_credits("alice", 5, metadata={"a": object()}), "metadata cannot be written as JSON"),
            (lambda c: c.add_credits("alice", 5, metadata=[1]), "metadata must be a dict"),
            (lambda c: c.get_balance("alice", datetime(2030, 1, 1)), "time zone"),
            (lambda c: c.deduct("alice", {"model": "gpt-4", "input_tokens": 1.5}), "float"),
            (lambda c: c.deduct("alice", {"model": "gpt-4", "input_tokens": Decimal("1.5")}), "input_tokens"),
            (lambda c: c.deduct("alice", "gpt-4"), "metrics must be a dict"),
            (lambda c: c.deduct_batch(charges("metrics", {"input_tokens": 1.5})), "metrics: a float"),
            (lambda c: c.deduct_batch(charges("amount", 1.5)), "charges: a float"),
            (lambda c: c.deduct_batch(charges("metadata", object())), "charges cannot be written as JSON"),
            (lambda c: c.deduct_batch(charges("amount", 1)[0]), "charges must be a list of dicts"),
            (lambda c: c.ack_events("an-id"), "ids must be a list of texts"),
            (lambda c: c.ack_events(["an-id", 5]), "each of ids must be text, not 5"),
            (lambda c: c.deduct("alice", USAGE, final=1), "final must be True or False, not 1"),
            (lambda c: c.deduct("alice", USAGE, idempotency_key=" "), "p_idempotency_key"),
        ],
    )
    def test_misuse(self, credits: CreditManager, ask: Callable[[CreditManager], object], message: str) -> None:
        with pytest.raises(ducto_pg.InvalidArgumentError, match=message):
            ask(credits)
        assert len(credits.list_transactions("alice")) == 1

    def test_out_of_range(self, credits: CreditManager) -> None:
        with pytest.raises(ducto_pg.OutOfRangeError):
            credits.add_credits("alice", 2**63)
        with pytest.raises(ducto_pg.OutOfRangeError):
            credits.list_transactions("alice", limit=2**31)

    def test_misspelt_names(self, credits: CreditManager) -> None:
        with pytest.raises(ducto_pg.UnknownMetricError, match="input_tokens") as caught:
            credits.deduct("alice", {"model": "gpt-4", "inputTokens": 5})
        assert caught.value.code == "DU005"
        with pytest.raises(ducto_pg.UnknownVersionError):
            credits.get_pricing_config(7)

    def test_a_database_without_ducto_pg(self, server_conn: Connection) -> None:
        with pytest.raises(NotInstalledError, match=r"ducto_pg\.setup\(\)"):
            CreditManager(server_conn).get_balance("alice")
        ducto_pg.setup(server_conn).or_raise()
        server_conn.execute("alter type ducto.reserve_result drop attribute warnings")
        with pytest.raises(NotInstalledError, match="warnings"):
            CreditManager(server_conn).reserve_credits("alice", 1)
        server_conn.execute("drop function ducto.version()")
        with pytest.raises(NotInstalledError, match="version"):
            CreditManager(server_conn).version()

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            (("alice",), {}, "deduct: missing a required argument: 'metrics'"),
            ((), {"user_id": "alice"}, "deduct: missing a required argument: 'metrics'"),
            (("alice", {}), {"user_id": "bob"}, "deduct: multiple values for argument 'user_id'"),
            (("alice", {}), {"metrcs": {}}, "deduct: got an unexpected keyword argument 'metrcs'"),
            (("alice",), {"metrcs": {}}, "deduct: missing a required argument: 'metrics'"),
            (("alice", {}, "k", None, None, True, None, None, 7), {}, "deduct: too many positional arguments"),
        ],
    )
    def test_a_call_with_wrong_arguments_is_named(
        self, credits: CreditManager, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(TypeError, match=f"^{message}$"):
            credits.deduct(*args, **kwargs)

    def test_what_is_not_ours_stays_psycopgs(self, connect: Connect, credits: CreditManager, conn: Connection) -> None:
        with conn.transaction(force_rollback=True):
            conn.execute("create role ducto_stranger")
            conn.execute("set local role ducto_stranger")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                credits.get_balance("alice")

    def test_what_the_client_encoding_does_not_have(self, credits: CreditManager, conn: Connection) -> None:
        conn.execute("set client_encoding = latin1")
        with pytest.raises(ducto_pg.InvalidArgumentError, match="'😀' is not in the connection's client_encoding"):
            credits.get_balance("ann😀")

    def test_a_source_of_another_kind(self, db: str, conn: Connection) -> None:
        for source in (None, 5, object()):
            with pytest.raises(TypeError, match=r"^CreditManager takes a psycopg connection, a pool or a DSN"):
                CreditManager(source)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^AsyncCreditManager takes an async psycopg connection"):
            AsyncCreditManager(conn)  # type: ignore[arg-type]
        with (
            ConnectionPool(db, min_size=0, max_size=1, open=False) as pool,
            pytest.raises(TypeError, match="an async pool"),
        ):
            AsyncCreditManager(pool)  # type: ignore[arg-type]
        with pytest.raises(ducto_pg.InvalidArgumentError, match="SQLAlchemy's form"):
            CreditManager("postgresql+psycopg://u:secret@h/db")


class TestAsync:
    def test_the_same_calls(self, db: str, credits: CreditManager) -> None:
        async def main() -> None:
            async with AsyncCreditManager(db) as manager:
                assert (await manager.publish_pricing(CONFIG, "first")).version == 1
                answers = await asyncio.gather(*(manager.deduct_credits("alice", 1) for _ in range(5)))
                assert sorted(answer.balance_after for answer in answers) == [95, 96, 97, 98, 99]
                with pytest.raises(ducto_pg.UnknownJobError):
                    await manager.deduct_fixed("alice", "none")
                batch = await manager.deduct_batch([{"user_id": "alice", "amount": 0}, {"user_id": "bob", "amount": 1}])
                assert [answer.error for answer in batch] == [None, "account_not_found"]
                assert (await manager.create_team("Reds")).or_raise().name == "Reds"
                assert await manager.setup() == ducto_pg.SetupResult()
            async with await psycopg.AsyncConnection.connect(db) as mine:
                await AsyncCreditManager(mine).deduct("alice", USAGE)
                await mine.rollback()
            async with AsyncConnectionPool(db, min_size=1, max_size=2, open=False) as pool:
                await pool.open()
                assert (await AsyncCreditManager(pool).deduct_credits("alice", 5)).or_raise().balance_after == 90

        asyncio.run(main())
        assert credits.get_balance("alice").balance == 90

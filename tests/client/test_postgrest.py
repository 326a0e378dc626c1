"""Every RPC through a real PostgREST, by the clients that people use: the answers and errors are those of SQL."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import _database
from supabase_helpers import SERVER_SIDE, Api, Node, postgrest, signed_in, supabase_roles

import ducto_pg
from ducto_pg import CreditManager, exactjson
from ducto_pg.embedded import Server

Connection = psycopg.Connection[Any]
Arguments = dict[str, Any]
Ask = Callable[..., tuple[Any, Any]]

CLIENTS = ["postgrest-js", "supabase-js", "python postgrest", "python supabase"]
FAR = "2099-01-01T00:00:00+00:00"
SOON = (datetime.now(UTC) + timedelta(minutes=3)).isoformat()  # counts as now
LONG_AGO = "2001-01-01T00:00:00+00:00"
PRICES: dict[str, Any] = {
    "aliases": {"gpt-4o": "gpt"},
    "models": {
        "any": "points",
        "gpt": "input_tokens * 0.25",
        "long": "input_tokens * 0.333333333333333",
        "ratio": "input_tokens / output_tokens",
    },
    "tools": {"browse": "tool_calls * 2"},
    "fixed": {"report": 7},
    "metrics": {"points": 0},
    "plans": {"pro": {"id": "pro", "name": "Pro", "free_allowance": 5, "features": {"seats": 3}}},
}
USAGE = {"model": "gpt-4o", "input_tokens": 10, "tool_calls": ["browse"]}
NOTE = {"it's": 'a "note"', "nested": [1, None, "ü 🦆"]}


def call(name: str, label: str = "", /, **arguments: Any) -> tuple[str, str, Arguments]:
    """A call and its arguments without `p_`; a name that ends in `!` fails.

    Of an argument `@hold.reservation_id` is that attribute of the answer with the label `hold`.
    """
    return name, label, {key.rstrip("_"): value for key, value in arguments.items()}


STATISTICS = (
    "spend_by_user",
    "spend_by_model",
    "spend_by_label",
    "spend_margin",
    "daily_spend",
    "aggregate_stats",
    "top_users",
)
STEPS = [
    call("version"),
    call("get_active_pricing"),
    call("get_pricing_config", version=1),
    call("get_pricing_history"),
    call("activate_pricing", version=1),
    call("activate_pricing", version=1, at=FAR),
    call("unschedule_pricing", version=1),
    call("get_balance", user_id="alice"),
    call("deduct_credits", user_id="alice", amount=1),
    call("add_credits", user_id="alice", amount=2**53 - 1),
    call("remove_credits", user_id="alice", amount=2**53 - 1001),
    call(
        "add_credits",
        "grant",
        user_id="alice",
        amount=100,
        type="purchase",
        metadata=NOTE,
        expires_at=FAR,
        idempotency_key="grant",
        paid_amount=10,
        paid_currency="EUR",
        reference="invoice 1",
    ),
    call("add_credits", "kept", user_id="alice", amount=20, keep_lot=True),
    call("add_credits", user_id="bob", amount=50),
    call("get_balance", user_id="alice", at=FAR),
    call(
        "remove_credits",
        user_id="alice",
        amount=10,
        reason="mistyped",
        transaction_id="@grant.transaction_id",
        metadata=NOTE,
        idempotency_key="removal",
    ),
    call(
        "remove_credits",
        "removal",
        user_id="alice",
        amount=5,
        transaction_id="@kept.transaction_id",
        unspent_only=True,
        paid_amount=1,
        paid_currency="EUR",
    ),
    call("refund_credits", transaction_id="@removal.transaction_id"),
    call("add_credits", user_id="guest", amount=5),
    call("merge_accounts", from_="guest", into="bob", idempotency_key="merge"),
    call("merge_accounts", from_="guest", into="bob", idempotency_key="merge"),
    call("merge_accounts", from_="nobody", into="bob"),
    call("set_credit_limit", user_id="bob", limit=20),
    call("set_low_balance", user_id="bob"),
    call("set_low_balance", user_id="bob", threshold=3),
    call("set_auto_topup", user_id="bob", threshold=1000000, amount=7),
    call("set_auto_topup", "topup", user_id="bob", threshold=1000000, amount=8, max_per_month=2),
    call("get_auto_topup", user_id="bob"),
    call("fail_topup", user_id="bob", key="@topup.due_key", retry_seconds=60),
    call("fail_topup", user_id="bob", key="another"),
    call("remove_auto_topup", user_id="bob"),
    call("freeze_account", user_id="bob"),
    call("freeze_account", user_id="bob", frozen=False),
    call("set_user_plan", user_id="alice", plan_id="pro"),
    call("set_user_plan", user_id="bob"),
    call("get_user_plan", user_id="alice"),
    call("check_allowance", user_id="alice"),
    call("check_feature", user_id="alice", feature="seats"),
    call(
        "set_user_plan",
        user_id="bob",
        plan_id="pro",
        when="now",
        anchor="2026-01-31T10:00:00+00:00",
        until=FAR,
        event_at="2026-01-31T10:00:00+00:00",
        idempotency_key="plan",
    ),
    call("calculate_cost", metrics=USAGE),
    call("calculate_cost", metrics=USAGE, user_id="alice", version=1),
    call("calculate_cost", metrics=USAGE, plan_id="pro"),
    call(
        "read_usage",
        body={"model": "any", "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
        api="openai",
        model="m",
    ),
    call("read_usage", body={"prompt_tokens": 3}),
    call("set_spend_cap", user_id="alice", limit=500),
    call("set_spend_cap", user_id="alice", limit=2, cap_type="monthly", model="any", action="warn"),
    call("list_spend_caps", user_id="alice"),
    call("set_spend_cap", user_id="alice", limit=90, cap_type="lifetime", label="key"),
    call("check_spend_cap", user_id="alice"),
    call("check_spend_cap", user_id="alice", model="any", amount=30),
    call("reserve", "plain hold", user_id="alice", metrics=USAGE),
    call(
        "reserve",
        "hold",
        user_id="alice",
        metrics=USAGE,
        operation_type="chat",
        metadata=NOTE,
        min_balance=3,
        ttl_seconds=900,
        idempotency_key="request 1",
    ),
    call("reserve", user_id="alice", metrics=USAGE, operation_type="chat", idempotency_key="request 1"),
    call("extend_reservation", reservation_id="@hold.reservation_id"),
    call(
        "extend_reservation",
        reservation_id="@hold.reservation_id",
        add_amount=5,
        ttl_seconds=1000,
        user_id="alice",
        idempotency_key="more",
    ),
    call("get_reservation", reservation_id="@hold.reservation_id"),
    call("get_reservation", reservation_id="@hold.reservation_id", user_id="bob"),
    call("list_reservations", user_id="alice"),
    call("list_reservations", user_id="alice", active=False, limit=1, before=FAR),
    call(
        "deduct",
        user_id="alice",
        metrics=USAGE,
        idempotency_key="part 1",
        metadata=NOTE,
        reservation_id="@hold.reservation_id",
        final=False,
    ),
    call(
        "deduct_credits",
        "charge",
        user_id="alice",
        amount=4,
        reservation_id="@hold.reservation_id",
        idempotency_key="part 2",
        metadata=NOTE,
        model="any",
        final=True,
    ),
    call("release_reservation", reservation_id="@plain hold.reservation_id"),
    call("release_reservation", reservation_id="@plain hold.reservation_id", user_id="alice"),
    call("reserve_credits", user_id="bob", amount=2),
    call(
        "reserve_credits",
        user_id="bob",
        amount=2,
        operation_type="chat",
        metadata={},
        min_balance=0,
        ttl_seconds=60,
        idempotency_key="request 2",
        model="gpt",
    ),
    call("deduct", user_id="alice", metrics={"model": "any", "points": 2.5}),
    call("deduct_fixed", user_id="alice", job_name="report"),
    call("deduct_fixed", user_id="alice", job_name="report", idempotency_key="report", metadata=NOTE),
    call("deduct_credits", user_id="bob", amount=1000),
    call(
        "deduct_batch",
        charges=[{"user_id": "alice", "amount": 1}, {"user_id": "carol", "job": "report"}, {"user_id": "bob"}],
    ),
    call("refund_credits", transaction_id="@charge.transaction_id", amount=1),
    call(
        "refund_credits",
        transaction_id="@charge.transaction_id",
        amount=1,
        reason="empty",
        metadata=NOTE,
        idempotency_key="refund",
        user_id="alice",
    ),
    call("refund_credits", transaction_id="@charge.transaction_id"),
    call("get_transaction", transaction_id="@charge.transaction_id"),
    call("get_transaction", transaction_id="@charge.transaction_id", user_id="alice"),
    call("get_transaction", user_id="alice", idempotency_key="grant"),
    call("get_transaction!", idempotency_key="grant"),
    call("get_statement", user_id="bob", start=LONG_AGO, end=FAR),
    call("explain_transaction", transaction_id="@charge.transaction_id"),
    call("explain_transaction", transaction_id="@charge.transaction_id", user_id="alice"),
    call("list_transactions", user_id="alice"),
    call("list_transactions", user_id="alice", limit=2, before=9, type="usage", from_=LONG_AGO, to=FAR),
    call("list_transactions", user_id="nobody"),
    call("create_team", name="Empty"),
    call("create_team", name="Crew", initial_balance=100, idempotency_key="team", team_id="crew"),
    call("add_team_member", team_id="crew", user_id="alice"),
    call("add_team_member", team_id="crew", user_id="bob", role="lead", spend_cap=30, spend_cap_period="monthly"),
    call("get_team", team_id="crew"),
    call("get_team_balance", team_id="crew"),
    call("get_team_members", team_id="crew"),
    call("reserve_team", team_id="crew", user_id="alice", metrics=USAGE),
    call(
        "reserve_team",
        "team hold",
        team_id="crew",
        user_id="bob",
        metrics=USAGE,
        operation_type="chat",
        metadata=NOTE,
        min_balance=1,
        ttl_seconds=60,
        idempotency_key="request 1",
    ),
    call("reserve_team_credits", team_id="crew", user_id="alice", amount=3),
    call(
        "reserve_team_credits",
        "other team hold",
        team_id="crew",
        user_id="bob",
        amount=3,
        operation_type="chat",
        metadata=NOTE,
        min_balance=1,
        ttl_seconds=60,
        idempotency_key="request 2",
        model="any",
    ),
    call(
        "deduct_team",
        team_id="crew",
        user_id="bob",
        metrics=USAGE,
        idempotency_key="part 1",
        metadata=NOTE,
        reservation_id="@team hold.reservation_id",
        final=False,
    ),
    call("deduct_team", team_id="crew", user_id="alice", metrics=USAGE),
    call(
        "deduct_team_credits",
        team_id="crew",
        user_id="bob",
        amount=2,
        reservation_id="@other team hold.reservation_id",
        idempotency_key="part 2",
        metadata=NOTE,
        model="any",
        final=False,
    ),
    call("deduct_team_credits", team_id="crew", user_id="alice", amount=1),
    call("deduct_team_credits", team_id="crew", user_id="carol", amount=1),
    call("reserve", user_id="alice", metrics=USAGE, labels=["key"], occurred_at=SOON, overrun="bounded"),
    call("reserve_credits", user_id="alice", amount=0, labels=["key"], occurred_at=SOON, overrun="debt"),
    call(
        "reserve_team", team_id="crew", user_id="alice", metrics=USAGE, labels=[], occurred_at=SOON, overrun="bounded"
    ),
    call(
        "reserve_team_credits",
        team_id="crew",
        user_id="alice",
        amount=0,
        labels=["key", "chat"],
        occurred_at=SOON,
        overrun="reject",
    ),
    call("deduct", user_id="alice", metrics=USAGE, labels=["key", "chat"], occurred_at=SOON),
    call("deduct_credits", user_id="alice", amount=0, labels=["key"], occurred_at=SOON),
    call("deduct_fixed", user_id="alice", job_name="report", labels=["key"], occurred_at=SOON),
    call("deduct_team", team_id="crew", user_id="alice", metrics=USAGE, labels=["key"], occurred_at=SOON),
    call("deduct_team_credits", team_id="crew", user_id="alice", amount=0, labels=["key"], occurred_at=SOON),
    call("remove_team_member", team_id="crew", user_id="bob"),
    call("remove_spend_cap", user_id="alice", cap_type="daily"),
    call("remove_spend_cap", user_id="alice", cap_type="monthly", model="any"),
    call("remove_spend_cap", user_id="alice", cap_type="lifetime", label="key"),
    call("spend_by_label", user_id="alice"),
    call("sweep_expired_credits"),
    call("sweep_expired_credits", dry_run=True, limit=5),
    *(call(name) for name in STATISTICS),
    *(call(name, start=LONG_AGO, end=FAR) for name in STATISTICS),
    *(call(name, user_id="alice") for name in ("spend_by_user", "spend_by_model", "daily_spend", "aggregate_stats")),
    call("top_users", limit=1),
    call("rollup_usage"),
    call("spend_by_user"),
    call("fetch_events", "event", limit=1, lease_seconds=30),
    call("fetch_events", limit=1, consumer="mailer"),
    call("ack_events", ids=["@event.0.event_id"]),
    call("ack_events", ids=["@event.0.event_id"], consumer="mailer"),
    call("fetch_events"),
    call("verify_ledger"),
    call("verify_ledger", account_id="alice"),
    call("my_balance"),
    call("my_daily_spend", start=LONG_AGO, end=FAR),
    call("my_plan"),
    call("my_statement", start=FAR, end=FAR),
    call("my_transactions"),
    call("my_transactions", limit=1, before=5),
    call("deduct!", user_id="alice", metrics={"model": "unheard-of", "input_tokens": 1}),
    call("deduct!", user_id="alice", metrics={"model": "gpt", "inputTokens": 1}),
    call("deduct!", user_id="alice", metrics={"model": "ratio", "input_tokens": 1}),
    call("deduct!", user_id="alice", metrics=[1]),
    call("deduct_fixed!", user_id="alice", job_name="repport"),
    call("activate_pricing!", version=99),
    call("activate_pricing!", version=1, at="infinity"),
    call("unschedule_pricing!", version=1),
    call("add_credits!", user_id=" alice", amount=1),
    call("add_credits!", user_id="alice", amount=-1),
    call("add_credits!", user_id="alice", amount=1, type="gift"),
    call("add_credits!", user_id="alice", amount="1.5"),
    call("add_credits!", user_id=None, amount=1),
    call("reserve_credits!", user_id="alice", amount=1, ttl_seconds=0),
    call("list_transactions!", user_id="alice", limit=1001),
]


class Scenario:
    """The steps as one client takes them; of what it was answered, ids and times are made comparable."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.answers: dict[str, Any] = {}
        self.ids: dict[str, str] = {}

    def run(self) -> list[Any]:
        return [self.step(*step) for step in STEPS]

    def step(self, name: str, label: str, arguments: Arguments) -> Any:
        given = {f"p_{key}": self.named(value) for key, value in arguments.items()}
        data, error = self.ask(name.removesuffix("!"), given)
        assert bool(error) == name.endswith("!"), (name, arguments, error)
        self.answers[label] = data
        return name, arguments, self.comparable(error or data)

    def named(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.named(item) for item in value]
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        found: Any = self.answers
        for part in value[1:].split("."):
            found = found[int(part) if part.isdigit() else part]
        return found

    def comparable(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.comparable(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.comparable(item) for item in value]
        if isinstance(value, str) and re.fullmatch(
            r"((team|topup)_)?[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", value
        ):
            return self.ids.setdefault(value, f"id {len(self.ids)}")
        if isinstance(value, str) and re.match(r"20\d\d-\d\d-\d\d", value):
            return value if value == FAR else "a time"
        return value


def in_sql(conn: Connection) -> Ask:
    """What SQL answers, as JSON."""
    many = dict(conn.execute("select proname, proretset from pg_proc where pronamespace = 'ducto'::regnamespace"))

    def ask(name: str, arguments: Arguments) -> tuple[Any, Any]:
        values = [
            exactjson.dumps(value) if isinstance(value, dict | list) and key not in ("p_ids", "p_labels") else value
            for key, value in arguments.items()
        ]
        named = ", ".join(f"{key} => %s" for key in arguments)
        rows = f"select to_jsonb(a) as answer from ducto.{name}({named}) as a"
        with psycopg.ClientCursor(conn) as cursor:
            try:
                cursor.execute(f"select json_agg(r.answer)::text from ({rows}) as r".encode(), values)
            except psycopg.Error as error:
                diag = error.diag
                return None, {
                    "code": diag.sqlstate,
                    "message": diag.message_primary,
                    "details": diag.message_detail,
                    "hint": diag.message_hint,
                }
            (text,) = cursor.fetchone() or (None,)
        found = exactjson.loads(text or "[]")
        return (found if many[name] else found[0]), None

    return ask


@pytest.fixture(scope="module")
def roles(server: Server) -> Iterator[None]:
    with supabase_roles(server):
        yield


@pytest.fixture
def priced(roles: None, conn: Connection) -> Connection:
    """A database as at Supabase, with prices."""
    ducto_pg.setup(conn).or_raise()
    CreditManager(conn).publish_pricing(PRICES)
    return conn


@pytest.fixture
def api(priced: Connection, db: str) -> Iterator[Api]:
    with postgrest(db) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server, template_db: str) -> list[Any]:
    """What SQL answers to the steps, on a database of its own."""
    with _database(server, template_db) as (_, dsn), psycopg.connect(dsn, autocommit=True) as conn:
        CreditManager(conn).publish_pricing(PRICES)
        conn.execute("set timezone = 'UTC'")
        conn.execute("select set_config('request.jwt.claims', '{\"sub\": \"alice\"}', false)")
        return Scenario(in_sql(conn)).run()


@pytest.fixture
def ask(request: pytest.FixtureRequest, api: Api, tmp_path: Path) -> Iterator[Ask]:
    """A client, as the server side, and as alice for what is an end user's own."""
    client: str = request.param
    with ExitStack() as stack:
        if client in _PYTHON:
            yield _python(client, api, stack)
            return
        node = Node(api, tmp_path)
        stack.callback(node.close)

        def ask(name: str, arguments: Arguments, **how: Any) -> tuple[Any, Any]:
            token = signed_in("alice") if name.startswith("my_") else SERVER_SIDE
            answer = node.ask(client=client[:-3], token=token, name=name, args=arguments, **how)
            return answer["data"], answer["error"] and {key: answer["error"][key] for key in _ERROR}

        yield ask


_ERROR = ("code", "message", "details", "hint")


def _by_postgrest(url: str, token: str, stack: ExitStack) -> Any:
    module = pytest.importorskip("postgrest")
    headers = {"apikey": token, "Authorization": f"Bearer {token}"}
    return stack.enter_context(module.SyncPostgrestClient(f"{url}/rest/v1", schema="ducto", headers=headers))


def _by_supabase(url: str, token: str, stack: ExitStack) -> Any:
    module = pytest.importorskip("supabase")
    # Without an HTTP client of ours it makes one in a way that postgrest warns of.
    options = module.ClientOptions(httpx_client=stack.enter_context(pytest.importorskip("httpx").Client()))
    return module.create_client(url, token, options).schema("ducto")


_PYTHON = {"python postgrest": _by_postgrest, "python supabase": _by_supabase}


def _python(client: str, api: Api, stack: ExitStack) -> Ask:
    error_type = pytest.importorskip("postgrest").APIError
    server_side, mine = (_PYTHON[client](api.url, token, stack) for token in (SERVER_SIDE, signed_in("alice")))

    def ask(name: str, arguments: Arguments, select: str = "", get: bool = False) -> tuple[Any, Any]:
        call = (mine if name.startswith("my_") else server_side).rpc(name, arguments, get=get)
        try:
            return (call.select(select) if select else call).execute().data, None
        except error_type as error:
            return None, {key: getattr(error, key) for key in _ERROR}

    return ask


@pytest.mark.parametrize("ask", CLIENTS, indirect=True)
class TestEveryRpc:
    def test_each_answers_as_in_sql(self, ask: Ask, expected: list[Any], priced: Connection) -> None:
        found = Scenario(ask).run()
        for answer, by_sql in zip(found, expected, strict=True):
            assert answer == by_sql
        assert CreditManager(priced).verify_ledger() == []

    def test_costs_are_exact_as_text(self, ask: Ask, priced: Connection) -> None:
        """A double has 15 digits; `cost::text` has all of them. Credits are whole and below 2^53."""
        CreditManager(priced).add_credits("alice", 2**53 - 1)
        usage = {"model": "long", "input_tokens": 100000000000001}
        data, error = ask("deduct", {"p_user_id": "alice", "p_metrics": usage}, select="*,cost::text")
        assert error is None
        assert data["cost"] == "33333333333333.633333333333333"
        assert data["balance_after"] == 2**53 - 1 - 33333333333333
        rows, error = ask("list_transactions", {"p_user_id": "alice"}, select="seq,cost::text,carry_after::text")
        assert rows[0] == {"seq": 2, "cost": "33333333333333.633333333333333", "carry_after": "0.633333333333333"}
        assert error is None

    def test_what_reads_can_be_had_by_get(self, ask: Ask, priced: Connection) -> None:
        CreditManager(priced).add_credits("alice", 10)
        data, error = ask("get_balance", {"p_user_id": "alice"}, get=True)
        assert (data["balance"], error) == (10, None)
        # What a GET carries is text, and a text that stands for a usage is no usage.
        data, error = ask("calculate_cost", {"p_metrics": exactjson.dumps(USAGE)}, get=True)
        assert (data, error["code"]) == (None, "22023")
        data, error = ask("deduct_credits", {"p_user_id": "alice", "p_amount": 1}, get=True)
        assert (data, error["code"]) == (None, "25006")
        assert CreditManager(priced).get_balance("alice").balance == 10


def test_every_rpc_and_argument_is_among_the_steps(conn: Connection) -> None:
    given: dict[str, set[str]] = {}
    omitted: dict[str, set[str]] = {}
    wanted = {}
    for name, names, defaults in conn.execute(
        "select proname, coalesce(proargnames, '{}'), pronargdefaults from pg_proc"
        " where pronamespace = 'ducto'::regnamespace and proname <> 'erase_user'"
    ):
        calls = [{f"p_{key}" for key in arguments} for called, _, arguments in STEPS if called == name]
        wanted[name] = (set(names), set(names[len(names) - defaults :]))
        given[name] = set[str]().union(*calls)
        omitted[name] = set[str]().union(*(set(names) - call for call in calls))
        assert calls, name
    assert {name: (given[name], omitted[name]) for name in wanted} == wanted


class TestServer:
    def test_erasing_is_the_owners_alone(self, api: Api) -> None:
        reply = api.ask("rpc/erase_user", {"p_user_id": "alice"})
        assert (reply.status, reply.body["code"]) == (403, "42501")

    def test_a_refusal_is_an_answer_and_an_error_a_status(self, api: Api) -> None:
        refused = api.ask("rpc/deduct_credits", {"p_user_id": "nobody", "p_amount": 1})
        assert (refused.status, refused.body["error"]) == (200, "account_not_found")
        wrong = api.ask("rpc/calculate_cost", {"p_metrics": {"model": "gtp", "input_tokens": 1}})
        assert (wrong.status, wrong.body["code"]) == (400, "DU003")
        misnamed = api.ask("rpc/get_balance", {"p_user": "alice"})
        assert (misnamed.status, misnamed.body["code"]) == (404, "PGRST202")

    def test_a_name_is_never_ambiguous(self, api: Api, priced: Connection) -> None:
        """PGRST203 is what PostgREST answers where it cannot choose."""
        for name, names, defaults in priced.execute(
            "select proname, coalesce(proargnames, '{}'), pronargdefaults from pg_proc"
            " where pronamespace = 'ducto'::regnamespace and proname <> 'erase_user'"
        ).fetchall():
            for last in {len(names) - defaults, len(names)}:
                reply = api.ask(f"rpc/{name}", dict.fromkeys(names[:last]))
                assert reply.status in (200, 400) or name.startswith("my_"), (name, reply)
                assert reply.status == 200 or not reply.body["code"].startswith("PGRST"), (name, reply)

    def test_setup_makes_it_read_the_schema_anew(self, roles: None, server: Server, server_conn: Connection) -> None:
        server_conn.execute("create schema ducto")
        with postgrest(server.dsn(server_conn.info.dbname)) as api:
            assert api.ask("rpc/version", {}).status in (403, 404)
            ducto_pg.setup(server_conn).or_raise()
            deadline = time.monotonic() + 20
            while (reply := api.ask("rpc/version", {})).status != 200 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert reply.body == ducto_pg.__version__
            unpriced = api.ask("rpc/calculate_cost", {"p_metrics": USAGE})
            assert (unpriced.status, unpriced.body["code"]) == (400, "DU001")

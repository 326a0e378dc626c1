"""Published prices: the same answers as the engine, whatever the config, and scripts that carry any text unharmed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import ceil
from random import Random
from typing import Any

import psycopg
import pytest
from conftest import Connect
from formulas import METRICS, VARIABLES, Formulas, fitting

from ducto_pg import CreditManager, exactjson
from ducto_pg.errors import DuctoError
from ducto_pg.formula.fields import limits
from ducto_pg.models import PricingConfigData, UsageMetrics
from ducto_pg.pricing import publish as pricing
from ducto_pg.pricing.config import load
from ducto_pg.pricing.engine import PricingEngine

Connection = psycopg.Connection[tuple[Any, ...]]

PARTS = ("model_credits", "tool_credits", "search_credits", "cache_savings", "fixed_credits", "cost")
MOST = 2**63 - 1
MISUSED = "22023"


def publish(conn: Connection, config: PricingConfigData) -> int:
    return CreditManager(conn).publish_pricing(config).version


def database_price(
    conn: Connection, usage: Mapping[str, Any], plan: str | None = None, version: int | None = None
) -> list[str | None]:
    """Key, parts and cost as text, or the SQLSTATE, the message and the hint."""
    parts = ", ".join(f"q.{part}::text" for part in PARTS)
    query = (
        f"select q.resolved_model, {parts}"
        " from ducto_private.price(ducto_private.find_terms(%s, %s, clock_timestamp()), %s::jsonb) as q"
    )
    return answer(conn, query, [version, plan, exactjson.dumps(usage)])


def answer(conn: Connection, query: str, values: Sequence[Any]) -> list[Any]:
    """The row that a query answers, or the SQLSTATE, the message and the hint."""
    try:
        row = conn.execute(query.encode(), values).fetchone()
    except psycopg.Error as error:
        return [error.sqlstate, unquoted(error.diag.message_primary or ""), error.diag.message_hint]
    return list(row or ())


def unquoted(message: str) -> str:
    """Python and SQL quote names each in their way."""
    return message.translate(dict.fromkeys(map(ord, "'\"\\")))


def engine_price(engine: PricingEngine, usage: Mapping[str, Any], plan: str | None = None) -> list[str | None]:
    try:
        cost = engine.calculate(usage, plan)
    except DuctoError as error:
        return [error.code, unquoted(error.message), error.hint]
    parts = (getattr(cost, part) for part in (*PARTS[:-1], "total"))
    return [cost.resolved_model, *(format(part, "f") for part in parts)]


def random_config(source: Formulas) -> dict[str, Any]:
    """Keys that are prefixes of each other, with and without separators between; every part sometimes missing."""
    pick = source.random
    keys = {
        "".join(pick.choice(["gpt", "4", "-", "o", "@", "mini", ":", "_", "/", "'", "\\", "é"]) for _ in range(size))
        for size in (pick.randint(1, 6) for _ in range(pick.choice([1, 5, 60, 200])))
    }
    config: dict[str, Any] = {
        "models": {key: source.formula() for key in keys},
        "metrics": dict.fromkeys(METRICS, 0) | {"pages": Decimal("1.50")},
        "factor": factor(pick),
        **rules(pick, sorted(keys), [*VARIABLES, "unread"]),
    }
    if pick.random() < 0.7:
        config["models"]["_default"] = source.formula()
    if pick.random() < 0.7:
        config["tools"] = {name: source.formula() for name in pick.sample(["_default", "db", "a'b", "c\\d"], 3)}
    if pick.random() < 0.7:
        config["search"] = {"costs": source.formula()}
    if pick.random() < 0.7:
        config["cache"] = {"discount": source.formula()}
    if pick.random() < 0.7:
        config["fixed"] = {"nightly": 7, "it's": MOST}
    overrides = {key: source.formula() for key in pick.sample(sorted(keys), len(keys) // 3)}
    overrides |= {f"{pick.choice(sorted(keys))}-x": source.formula()}
    if pick.random() < 0.5:
        overrides["_default"] = source.formula()
    config["plans"] = {
        "pro": {
            "id": "pro",
            "name": "It's \\ Pro",
            "free_allowance": 5,
            "rate_overrides": overrides,
            "factor": factor(pick),
        },
        "free": {"id": "free", "name": "Free"},
    }
    return config


def rules(pick: Random, keys: Sequence[str], counts: Sequence[str]) -> dict[str, Any]:
    """How models are found, what is free, and what becomes of the rest; mostly all is free."""
    names = [key for key in keys if key != "_default"]
    aliases = {f"{pick.choice(['A', '*b', '*-', 'gpt/', 'zz'])}{number}": pick.choice(names) for number in range(3)}
    return {
        "match": pick.choice(["dated", "prefix", "exact"]),
        "aliases": pick.choice([{}, {"V/": "*"}, aliases, aliases | {"v/": "*", "*.x.": "*"}]),
        "free": pick.choice([pick.sample(counts, pick.randint(len(counts) // 2, len(counts) - 1)), counts, counts]),
        "unpriced": pick.choice(["refuse", "refuse", "warn"]),
        "cached": pick.choice(["inside", "inside", "beside"]),
    }


def odd_name(pick: Random, name: str, aliases: Mapping[str, str]) -> str:
    """A name that a key or an alias serves, or nearly does."""
    alias = pick.choice([*aliases, "V/"]).replace("*", pick.choice(["", "x", "é/"]))
    rest = pick.choice(["", "-0613", "@2024-08-06-v1:0", "-latest", "-pro", "x", ":", "-06133", "/1a"])
    return pick.choice([name, alias, alias.lower() + name, alias + name[:-1], name[:-1]]) + rest


def factor(pick: Random) -> Decimal:
    """Mostly none, else more or less than one."""
    return Decimal(pick.choice(["1", "1", "1.00", "0.0250", "1e3", "17"]))


def random_usage(source: Formulas, config: dict[str, Any]) -> dict[str, Any]:
    pick = source.random
    usage: dict[str, Any] = {name: source.quantity(name) for name in VARIABLES if pick.random() < 0.6}
    usage = {name: value if name in METRICS else int(value) for name, value in usage.items()}
    keys = [*config["models"], *config["plans"]["pro"]["rate_overrides"]]
    name = pick.choice(keys)
    usage["model"] = pick.choice([odd_name(pick, name, config["aliases"])] * 5 + [name, "none", "", "zzz"])
    if pick.random() < 0.8:
        usage = fitting(usage)
    if pick.random() < 0.1:
        usage["unread"] = {"usage.details.new_tokens": pick.randint(0, 1), "x": 0}
    if pick.random() < 0.5:
        names = ["db", "a'b", "c\\d", "other", "_default"]
        calls = [pick.choice(names) for _ in range(pick.randint(0, 5))]
        usage["tool_calls"] = [call if pick.random() < 0.5 else {"name": call, "id": 1} for call in calls]
    if pick.random() < 0.2:
        usage["fixed_job"] = pick.choice(["nightly", "it's", "nighly"])
    if pick.random() < 0.05:
        usage["inputTokens"] = 1
    return usage


def compare(conn: Connection, seed: int, configs: int, usages: int) -> None:
    source, seen = Formulas(seed), Counter[str]()
    for _ in range(configs):
        data = random_config(source)
        config = load(data)
        publish(conn, config)
        engine = PricingEngine(config)
        for _ in range(usages):
            usage, plan = random_usage(source, data), source.random.choice([None, "free", "pro"])
            expected = engine_price(engine, usage, plan)
            assert database_price(conn, usage, plan) == expected, (data, usage, plan)
            seen[str(expected[0]) if len(expected) == 3 else "priced"] += 1
    # Prices, and each kind of error.
    assert seen.keys() >= {"priced", "DU003", "DU004", "DU005", "DU006", "DU008", "DU009", "22023", "22003"}, seen
    assert seen["priced"] > configs, seen


def config_of(**parts: Any) -> PricingConfigData:
    return load({"models": {"gpt-4": "input_tokens * 2", "_default": "input_tokens"}} | parts)


def formula_functions(conn: Connection) -> list[tuple[Any, ...]]:
    """Names, object ids and row versions of all that was generated."""
    return conn.execute(
        "select p.proname, p.oid, p.xmin::text from pg_proc as p where p.pronamespace = 'ducto_private'::regnamespace"
        " and (p.proname ~ '^formula_[0-9a-f]{16}$' or p.proname = 'evaluate') order by p.proname"
    ).fetchall()


class TestModels:
    def test_the_longest_key_before_a_separator_serves_a_model(self, conn: Connection) -> None:
        keys = ["gpt-4", "gpt-4-turbo", "gpt", "o1:", "a/b", "it's", "back\\slash", "é", "$$", "%s", "_default"]
        models = {key: f"input_tokens * 0 + {number}" for number, key in enumerate(keys)}
        fillers = {f"gpt-4-{number:03}": "input_tokens" for number in range(100)}
        publish(conn, config_of(models=models | fillers, match="prefix"))
        for name, key in [
            ("gpt-4", "gpt-4"),
            ("gpt-4-0613", "gpt-4"),
            ("gpt-4-turbo-2024", "gpt-4-turbo"),
            ("gpt-4-turbox", "gpt-4"),
            ("gpt-4-050x", "gpt-4"),
            ("gpt-4o", "gpt"),
            ("gpt-4.1", "gpt"),
            ("gptx", None),
            ("GPT-4", None),
            ("o1:-x", "o1:"),
            ("o1:x", None),
            ("a/b@c", "a/b"),
            ("it's:1", "it's"),
            ("back\\slash/1", "back\\slash"),
            ("é_1", "é"),
            ("$$", "$$"),
            ("%s", "%s"),
            ("_default", "_default"),
            ("_default-x", None),
            ("none", None),
            ("", None),
        ]:
            found = database_price(conn, {"model": name})
            assert found[:2] == [key, str(keys.index(key or "_default"))], name

    def test_a_chain_of_prefixes_is_no_trap(self, conn: Connection) -> None:
        models = {"-" * length: f"input_tokens + {length}" for length in range(1, 101)}
        publish(conn, config_of(models=models, match="prefix"))
        for name, cost in [("-" * 255, "100"), ("-" * 7, "7"), ("-" * 100 + "x", "99")]:
            assert database_price(conn, {"model": name})[1] == cost

    def test_an_override_wins_over_a_longer_key_of_the_list(self, conn: Connection) -> None:
        models = {"gpt-4o": "input_tokens", "gpt-4o-2024-08-06": "input_tokens * 2", "b": "input_tokens * 3"}
        plans = {"pro": {"id": "pro", "name": "Pro", "rate_overrides": {"gpt-4o": "input_tokens * 7"}}}
        publish(conn, config_of(models=models, plans=plans))
        for name, key, cost in [
            ("gpt-4o-2024-08-06", "gpt-4o", "7"),
            ("gpt-4o", "gpt-4o", "7"),
            ("b-0613", "b", "3"),
        ]:
            assert database_price(conn, {"model": name, "input_tokens": 1}, "pro")[:2] == [key, cost]
        assert database_price(conn, {"model": "gpt-4o-2024-08-06", "input_tokens": 1})[1] == "2"


class TestPlans:
    def test_terms_of_a_plan(self, conn: Connection) -> None:
        rates = {"gpt-4": "input_tokens * 7"}
        plan = {"id": "pro", "name": "Pro", "free_allowance": 9, "rate_overrides": rates, "features": {"seats": 3}}
        publish(conn, config_of(plans={"pro": plan}, default_plan="pro"))
        query = (
            "select t.plan_id, t.plan_name, t.free_allowance, t.features, t.overrides"
            " from ducto_private.find_terms(null, %s, clock_timestamp()) as t"
        )
        assert answer(conn, query, ["pro"]) == ["pro", "Pro", 9, {"seats": 3}, "plans.pro.rate_overrides"]
        assert answer(conn, query, [None]) == ["", None, 0, {}, None]
        unseen = CreditManager(conn).get_user_plan("unseen")
        assert (unseen.plan_id, unseen.free_allowance) == ("pro", 9)

    def test_a_plan_that_a_version_drops_keeps_its_last_terms(self, conn: Connection) -> None:
        rates = {"gpt-4": "input_tokens * 7", "_default": "input_tokens * 5"}
        plan = {"id": "pro", "name": "Pro", "free_allowance": 9, "rate_overrides": rates, "factor": 3}
        publish(conn, config_of(plans={"pro": plan}))
        manager = CreditManager(conn)
        manager.set_user_plan("ann", "pro")
        models = {"gpt-4": "input_tokens * 3", "gpt-4-x": "input_tokens * 4", "b": "input_tokens * 2"}
        publish(conn, config_of(models=models, factor=2, match="prefix"))
        kept = manager.get_user_plan("ann")
        assert (kept.plan_id, kept.plan_name, kept.free_allowance) == ("pro", "Pro", 9)
        assert manager.set_user_plan("bob", "pro").error == "plan_not_found"
        prices = {
            name: database_price(conn, {"model": name, "input_tokens": 1}, "pro")[:2]
            for name in ("gpt-4", "gpt-4-x", "b", "z")
        }
        assert prices == {"gpt-4": ["gpt-4", "42"], "gpt-4-x": ["gpt-4", "42"], "b": ["b", "12"], "z": [None, "30"]}
        # What drops it once more still has the terms of the version that had it.
        publish(conn, config_of(min_balance=6))
        assert database_price(conn, {"model": "gpt-4", "input_tokens": 1}, "pro")[:2] == ["gpt-4", "21"]
        # A version that has it again has its own.
        publish(conn, config_of(plans={"pro": {"id": "pro", "name": "Pro again"}}))
        assert database_price(conn, {"model": "gpt-4", "input_tokens": 1}, "pro")[:2] == ["gpt-4", "2"]
        assert manager.get_user_plan("ann").plan_name == "Pro again"

    def test_a_plan_that_a_version_does_not_know_yet_has_the_terms_of_the_first_after(self, conn: Connection) -> None:
        first = publish(conn, config_of(factor=2))
        plan = {"id": "pro", "name": "Pro", "free_allowance": 9, "rate_overrides": {"gpt-4": "input_tokens * 7"}}
        second = publish(conn, config_of(plans={"pro": plan}))
        third = publish(conn, config_of(plans={"pro": plan | {"free_allowance": 10, "rate_overrides": None}}))
        manager = CreditManager(conn)
        manager.set_user_plan("ann", "pro")
        for version, allowance, cost in [(third, 10, "2"), (second, 9, "7"), (first, 9, "14")]:
            manager.activate_pricing(version)
            assert manager.get_user_plan("ann").free_allowance == allowance
            assert database_price(conn, {"model": "gpt-4", "input_tokens": 1}, "pro")[:2] == ["gpt-4", cost]
        assert manager.set_user_plan("bob", "pro").error == "plan_not_found"

    def test_a_factor_is_that_of_the_list_times_that_of_the_plan_and_leaves_jobs_alone(self, conn: Connection) -> None:
        plans = {
            "pro": {"id": "pro", "name": "Pro", "factor": Decimal("0.5"), "rate_overrides": {"o1": "input_tokens"}},
            "free": {"id": "free", "name": "Free"},
        }
        config = config_of(
            plans=plans,
            factor=Decimal("20.0"),
            fixed={"report": 7},
            tools={"_default": "tool_calls * 0.25"},
            search={"costs": "search_queries * 3"},
            cache={"discount": "-cache_read_tokens"},
        )
        publish(conn, config)
        engine = PricingEngine(config)
        usage: dict[str, Any] = {"model": "gpt-4", "input_tokens": 3, "cache_read_tokens": 1, "search_queries": 2}
        usage |= {"tool_calls": 3, "fixed_job": "report"}
        for plan, model, parts in [
            (None, "gpt-4", ["120", "15.00", "120", "-20", "7", "242.00"]),
            ("free", "gpt-4", ["120", "15.00", "120", "-20", "7", "242.00"]),
            ("pro", "gpt-4", ["60", "7.50", "60", "-10", "7", "124.50"]),
            ("pro", "o1", ["30", "7.50", "60", "-10", "7", "94.50"]),
        ]:
            found = database_price(conn, usage | {"model": model}, plan)
            assert found == [model, *parts] == engine_price(engine, usage | {"model": model}, plan)
        manager = CreditManager(conn)
        manager.set_user_plan("ann", "pro")
        manager.add_credits("ann", 100)
        assert manager.deduct("ann", {"model": "gpt-4", "input_tokens": 1}).cost == 20
        assert manager.deduct_fixed("ann", "report").cost == 7


class TestJobs:
    def test_a_job_alone_costs_its_credits(self, conn: Connection) -> None:
        publish(conn, config_of(fixed={"nightly": 7}, models={"_default": "input_tokens + 100"}))
        assert answer(conn, "select ducto_private.job_price(1, 'nightly')", []) == [7]
        assert answer(conn, "select ducto_private.job_price(1, 'nighlty')", []) == [
            "DU004",
            "unknown job nighlty",
            "did you mean nightly?",
        ]
        manager = CreditManager(conn)
        manager.add_credits("ann", 500)
        assert manager.deduct_fixed("ann", "nightly").cost == 7

    def test_within_a_usage_it_is_a_part(self, conn: Connection) -> None:
        publish(conn, config_of(fixed={"nightly": 7}, models={"_default": "input_tokens + 100"}))
        assert database_price(conn, {"fixed_job": "nightly"}) == [None, "100", "0", "0", "0", "7", "107"]


@pytest.mark.parametrize(
    ("usage", "code", "message", "hint"),
    [
        ({"model": "gpt-5", "input_tokens": 1}, "DU003", "unknown model 'gpt-5'", "did you mean gpt-4?"),
        (
            {"model": "a/gpt-4-0613"},
            "DU003",
            "unknown model 'a/gpt-4-0613'",
            'did you mean gpt-4? aliases: {"a/": "*"} serves all such names.',
        ),
        (
            {"model": "gpt-4", "unread": {"new.kind": 3}},
            "DU008",
            "no formula of this price names unread.new.kind",
            "No formula can name what is unread: say free: [unread], or read the body by the API that returned it.",
        ),
        ({"model": "xyz"}, "DU003", "unknown model 'xyz'", "Add it to the config's models, or price _default."),
        ({"input_tokens": 1}, "DU003", "tokens were used, but no model is named", "name the model or price _default"),
        ({"model": "gpt-4", "inputTokens": 1}, "DU005", "unknown metric 'inputTokens'", "did you mean input_tokens?"),
        ({"model": "gpt-4", "fixed_job": "x"}, "DU004", "unknown job 'x'", "Add it to the config's fixed."),
        (
            {"model": "half"},
            "DU006",
            "division by zero in models.half",
            "Guard the divisor, as in: x / y if y else 0",
        ),
        (
            {"model": "gpt-4", "input_tokens": 10**14},
            "22003",
            "models.gpt-4: the cost is beyond bigint",
            "Check the formula and the usage.",
        ),
        (
            {"tool_calls": ["db"] * 3 + ["x"]},
            "22003",
            "tools.db: the cost is beyond bigint",
            "Check the formula and the usage.",
        ),
        (
            {"tool_calls": ["bad"]},
            "DU006",
            "division by zero in tools.bad",
            "Guard the divisor, as in: x / y if y else 0",
        ),
    ],
)
def test_misuse_is_named(conn: Connection, usage: dict[str, Any], code: str, message: str, hint: str) -> None:
    config = {
        "models": {"gpt-4": "input_tokens * 1e6", "half": "input_tokens / output_tokens"},
        "tools": {"db": "tool_calls * 4e18", "bad": "1 / output_tokens", "_default": "tool_calls"},
    }
    publish(conn, load(config))
    CreditManager(conn).add_credits("ann", MOST)
    usages = exactjson.dumps(usage)
    for query in (
        "select ducto_private.price(ducto_private.find_terms(null, null, clock_timestamp()), %s::jsonb)",
        "select ducto.calculate_cost(%s::jsonb)",
        "select ducto.reserve('ann', %s::jsonb)",
        "select ducto.deduct('ann', %s::jsonb)",
    ):
        with pytest.raises(psycopg.Error) as raised:
            conn.execute(query.encode(), [usages])
        diag = raised.value.diag
        assert (diag.sqlstate, diag.message_primary, diag.message_hint) == (code, message, hint)


def test_of_several_faults_both_back_ends_tell_the_same(conn: Connection) -> None:
    tools = dict.fromkeys("fbcdea", "1 / input_tokens")
    config = load({"models": {"_default": "input_tokens"}, "cache": {"discount": "-1 / input_tokens"}, "tools": tools})
    publish(conn, config)
    engine = PricingEngine(config)
    usages: list[dict[str, Any]] = [{"fixed_job": "x"}, {"tool_calls": list("fbcdea")}]
    assert [database_price(conn, usage) for usage in usages] == [engine_price(engine, usage) for usage in usages]


class TestScripts:
    def test_a_script_publishes_once_and_carries_any_text_unharmed(self, conn: Connection) -> None:
        key = "it's \\ $$ $body$ %s \n -- é"
        plans = {
            "p'": {
                "id": "p'",
                "name": "\\'",
                "features": {"a'\\": ["\\u0027"]},
                "rate_overrides": {key: "input_tokens * 3 + ('\\' in model)"},
            }
        }
        config = config_of(
            models={key: "input_tokens / output_tokens"},
            plans=plans,
            fixed={key: 1},
            tools={key: "tool_calls"},
            free=["output_tokens"],
        )
        script = pricing.compile_config(config, label="it's \\")
        conn.execute("set standard_conforming_strings = off")
        for _ in range(2):
            conn.execute(script.encode())
        conn.execute("set standard_conforming_strings = on")
        rows = conn.execute("select version, label, config::text from ducto_private.pricing_versions").fetchall()
        assert [(version, label) for version, label, _ in rows] == [(1, "it's \\")]
        assert load(rows[0][2]) == config
        conn.execute("set standard_conforming_strings = off")
        usage = {"model": key, "input_tokens": 6, "output_tokens": 2, "tool_calls": [key], "fixed_job": key}
        assert database_price(conn, usage) == [key, "3.0000000000000000", "1", "0", "0", "1", "5.0000000000000000"]
        assert database_price(conn, usage, "p'")[:2] == [key, "19"]
        assert database_price(conn, {"model": key})[1] == unquoted(f"division by zero in models.{key}")

    def test_it_publishes_what_python_does(self, conn: Connection) -> None:
        config = config_of(plans={"pro": {"id": "pro", "name": "Pro", "rate_overrides": {"a": "input_tokens / 3"}}})
        version = publish(conn, config)
        generated = formula_functions(conn)
        conn.execute(pricing.compile_config(config).encode())
        assert conn.execute("select max(version) from ducto_private.pricing_versions").fetchone() == (version,)
        assert formula_functions(conn) == generated


class TestFormulas:
    def test_thousands_of_prices_and_later_lists_share_a_few(self, conn: Connection) -> None:
        def models(step: int) -> dict[str, str]:
            return {
                f"m{number}": f"(input_tokens - cache_read_tokens) * 0.{number:06d}"
                + " + output_tokens * 1e-6" * (number % 25)
                + f" + cache_read_tokens * {step}"
                for number in range(1, 1467)
            }

        publish(conn, load({"models": models(1)}))
        generated = formula_functions(conn)
        # Each shape, the same that gives null below 0, and evaluate().
        assert len(generated) == 2 * 25 + 1
        publish(conn, load({"models": models(2)}))
        assert formula_functions(conn) == generated
        assert conn.execute("select count(*) from ducto_private.prices").fetchone() == (2 * 1466,)
        usage = {"model": "m1466", "input_tokens": 2, "cache_read_tokens": 1, "output_tokens": 2}
        for version, cost in [(1, "1.001498"), (2, "2.001498")]:
            assert database_price(conn, usage, version=version)[:2] == ["m1466", cost]

    def test_publishing_twice_makes_no_function(self, conn: Connection) -> None:
        publish(conn, config_of(search={"costs": "search_queries"}))
        generated = formula_functions(conn)
        assert len(generated) > 2
        publish(conn, config_of(search={"costs": "search_queries"}))
        publish(conn, config_of(search={"costs": "search_queries"}, models={"new": "output_tokens * 5"}))
        names = {name for name, *_ in generated}
        added = {name for name, *_ in formula_functions(conn)} - names
        assert [row for row in formula_functions(conn) if row[0] in names - {"evaluate"}] == [
            row for row in generated if row[0] != "evaluate"
        ]
        assert len(added) == 2

    def test_what_was_dropped_by_hand_is_made_again(self, conn: Connection, connect: Connect) -> None:
        config = config_of(search={"costs": "search_queries"}, models={"m": "input_tokens // 3"})
        publish(conn, config)
        generated = [name for name, *_ in formula_functions(conn)]
        for name in generated:
            kinds = "bigint, jsonb, numeric[]" if name == "evaluate" else "jsonb, numeric[]"
            conn.execute(f"drop function ducto_private.{name}({kinds})".encode())
        assert formula_functions(conn) == []
        conn.execute("select ducto_private.make_formulas()")
        assert [name for name, *_ in formula_functions(conn)] == generated
        usage = {"model": "m", "input_tokens": 7, "search_queries": 2}
        for session in (conn, connect()):
            assert database_price(session, usage) == ["m", "2", "0", "2", "0", "0", "4"]
        before = formula_functions(conn)
        conn.execute("select ducto_private.make_formulas()")
        assert formula_functions(conn) == before

    def test_a_session_without_a_branch_for_a_formula_calls_its_function(self, conn: Connection) -> None:
        publish(conn, config_of())
        row = conn.execute(
            "select pg_get_functiondef('ducto_private.evaluate(bigint, jsonb, numeric[])'::regprocedure)"
        ).fetchone()
        assert row
        publish(conn, config_of(models={"m": "input_tokens * 2 + output_tokens / 4"}))
        conn.execute(row[0])
        usage = {"model": "m", "input_tokens": 3, "output_tokens": 2}
        assert database_price(conn, usage)[:2] == ["m", "6.50000000000000000000"]
        manager = CreditManager(conn)
        manager.add_credits("ann", 100)
        assert manager.deduct("ann", usage).cost == Decimal("6.5")

    def test_nobody_else_may_call_them(self, conn: Connection) -> None:
        publish(conn, config_of())
        conn.execute("select ducto_private.make_formulas()")
        rows = conn.execute(
            "select p.proname, has_function_privilege('public', p.oid, 'execute') from pg_proc as p"
            " where p.proname ~ '^(formula_[0-9a-f]+|evaluate.*)$'"
        ).fetchall()
        assert len(rows) == 2 + 2
        assert not any(may for _, may in rows)

    @pytest.mark.parametrize("kind", ["quote", "request", "terms", "prices"])
    def test_published_prices_do_not_hang_on_the_shape_of_a_type(
        self, conn: Connection, connect: Connect, kind: str
    ) -> None:
        """An attribute that a later release appends to an internal type or table breaks no price that is there."""
        rates = {"gpt-4": "input_tokens * 7"}
        plans = {"pro": {"id": "pro", "name": "Pro", "rate_overrides": rates}}
        config = config_of(plans=plans, tools={"_default": "tool_calls"}, fixed={"report": 3})
        publish(conn, config)
        manager = CreditManager(conn)
        for user, plan in [("ann", None), ("bob", "pro")]:
            manager.add_credits(user, 100)
            manager.set_user_plan(user, plan)
        generated = formula_functions(conn)
        conn.execute(
            f"alter table ducto_private.{kind} add column later text".encode()
            if kind in ("terms", "prices")
            else f"alter type ducto_private.{kind} add attribute later text cascade".encode()
        )
        usage: dict[str, Any] = {"model": "gpt-4", "input_tokens": 1, "tool_calls": 1, "fixed_job": "report"}
        for session in (connect(), conn):
            priced = CreditManager(session)
            assert priced.calculate_cost(usage, "ann").total == 6
            assert priced.calculate_cost(usage, "bob").total == 11
            # RPCs name the attributes of a question, and a release that appends to it brings them anew.
            if kind != "request":
                assert priced.deduct("ann", {"model": "gpt-4", "input_tokens": 1}).cost == 2
                assert priced.deduct("bob", usage).cost == 11
        assert formula_functions(conn) == generated


def test_diff() -> None:
    old = config_of(fixed={"a": 1, "b": 2}, metrics={"images": 0})
    new = config_of(fixed={"a": 3, "c": 2}, metrics={"images": 0}, rounding="up", factor=2)
    assert pricing.diff(old, new) == [
        "~ factor: 1 -> 2",
        "~ fixed.a: 1 -> 3",
        "- fixed.b: 2",
        "+ fixed.c: 2",
        '~ rounding: "carry" -> "up"',
    ]
    assert pricing.diff(old, old) == []


def test_random_configs_cost_the_same_in_the_engine_and_the_database(conn: Connection) -> None:
    compare(conn, seed=1, configs=12, usages=40)


@pytest.mark.slow
def test_many_random_configs_cost_the_same_in_the_engine_and_the_database(conn: Connection) -> None:
    compare(conn, seed=2, configs=60, usages=150)


# ----------------------------------------------------------------------------------------------------------------------
# What a charge costs: by the composed price where that covers it, by the parts where it does not


def arithmetic(pick: Random, names: Sequence[str]) -> str:
    """A formula of sums, products and quotients."""
    terms = [
        f"{pick.choice(names)} {pick.choice('*+-/')} {pick.choice(['3', '0.0025', '1.50', '7e-7'])}" for _ in "123"
    ]
    return pick.choice(
        [
            " + ".join(terms),
            f"({terms[0]}) * ({terms[1]}) / {terms[2]}",
            f"2.50 + 0 * {names[0]}",
            f"{names[0]} ** 0",
            f"{names[0]} // 7 - {names[1]} % 3",
            f"{names[0]} * 3 - 40",
        ]
    )


def odd_config(pick: Random, models: Sequence[str], counts: Sequence[str]) -> dict[str, Any]:
    """A list with a plan of nothing of its own, and one with everything of its own."""
    parts: dict[str, Any] = {
        "search": {"costs": arithmetic(pick, ["search_queries", "input_tokens"])},
        "cache": {"discount": f"-({arithmetic(pick, ['cache_read_tokens', 'output_tokens'])})"},
        "tools": {"_default": "tool_calls * 3", "db": "tool_calls * 0.3 - 1"},
        "fixed": {"report": 7},
    }
    config = {name: part for name, part in parts.items() if pick.random() < 0.3}
    config["models"] = {name: arithmetic(pick, counts) for name in models}
    if pick.random() < 0.5:
        config["models"]["_default"] = arithmetic(pick, counts)
    overrides = {name: arithmetic(pick, counts) for name in models if pick.random() < 0.3} | {"v": "input_tokens"}
    if pick.random() < 0.3:
        overrides["_default"] = arithmetic(pick, counts)
    pro = {"id": "pro", "name": "Pro", "rate_overrides": overrides, "factor": factor(pick), "free_allowance": 7}
    config["plans"] = {"free": {"id": "free", "name": "Free", "factor": factor(pick)}, "pro": pro}
    found = rules(pick, models, [*counts, "search_queries", "tool_calls"])
    return config | found | {"metrics": {"images": pick.choice([0, 2])}, "factor": factor(pick), "min_balance": 0}


def odd_usage(pick: Random, models: Sequence[str], counts: Sequence[str], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Usages as they should be, and a few with something wrong or rare in them."""
    name = pick.choice(models)
    usage: dict[str, Any] = {
        count: pick.choice([0, 1, 17, 10**6, Decimal("4.00"), 10**15 - 1]) for count in counts if pick.random() < 0.7
    }
    if pick.random() < 0.2:
        wrong = [-1, Decimal("0.5"), 10**15, "5", [5], {"a": 5}, True, None, Decimal("1e-13")]
        usage[pick.choice(["input_tokens", "images", "cache_read_tokens", "tool_calls", "search_queries", "typo"])] = (
            pick.choice(wrong)
        )
    else:
        usage = fitting(usage)
    usage["model"] = pick.choice(
        [
            *[name, name, name + pick.choice("-@:/_.x0A`;\1") + pick.choice(["", "2024"]), name[:-1]],
            *["none", "", "zzz", 7, None, odd_name(pick, name, aliases)],
        ]
    )
    if pick.random() < 0.1:
        usage["model"] = name + "-" * 255
    if pick.random() < 0.2:
        usage["tool_calls"] = pick.choice([2, [], ["db"], ["db", "x", {"name": "db"}], [{"no": 1}]])
    if pick.random() < 0.1:
        usage["fixed_job"] = pick.choice(["report", "repport"])
    return {key: value for key, value in usage.items() if pick.random() > 0.02}


def charge(conn: Connection, user: str, usage: str) -> list[Any]:
    """Model and cost as text of a charge that is then undone, or the SQLSTATE, the message and the hint."""
    with conn.transaction(force_rollback=True):
        charged = answer(conn, "select d.error, d.transaction_id from ducto.deduct(%s, %s::jsonb) as d", [user, usage])
        if charged[0] is not None:
            return charged
        query = "select t.resolved_model, t.cost::text from ducto.get_transaction(%s) as t"
        return answer(conn, query, charged[1:])


def hold(conn: Connection, user: str, usage: str) -> list[Any]:
    """What is held of a usage, and by which model, or the SQLSTATE, the message and the hint."""
    with conn.transaction(force_rollback=True):
        held = answer(conn, "select h.error, h.reservation_id from ducto.reserve(%s, %s::jsonb) as h", [user, usage])
        if held[0] is not None:
            return held
        query = "select r.resolved_model, r.held from ducto_private.holds as r where r.hold_id = %s"
        return answer(conn, query, held[1:])


@pytest.mark.parametrize("seed", range(12))
def test_a_charge_costs_what_the_parts_do(conn: Connection, seed: int) -> None:
    pick = Random(seed)
    further = [
        "cache_read_tokens",
        "images",
        "reasoning_tokens",
        "cache_write_1h_tokens",
        "cache_write_tokens",
        "requests",
    ]
    counts = ["input_tokens", "output_tokens", *further[: pick.randint(0, 6)]]
    models = [pick.choice(["a", "gpt-4", "gpt-4-mini", "gpt-4.1", "7", "é", "a/b", "_default"]) for _ in range(5)]
    models += [f"v/m{number}" for number in range(pick.choice([0, 40]))]
    config = load(odd_config(pick, models, counts))
    publish(conn, config)
    engine, manager = PricingEngine(config), CreditManager(conn)
    plans = {"ann": None, "fred": "free", "paul": "pro"}
    for user, plan in plans.items():
        manager.add_credits(user, MOST)
        manager.set_user_plan(user, plan)
    costs, seen = set[str | None](), Counter[str]()
    # As many more as it takes to see some prices of a config that refuses much.
    for tried in range(3000):
        if tried >= 250 and len(costs) > 10:
            break
        data = odd_usage(pick, models, [*counts, "search_queries"], config.aliases)
        usage, user = exactjson.dumps(data), pick.choice(list(plans))
        expected = engine_price(engine, data, plans[user])
        query = "select c.resolved_model, c.total::text from ducto.calculate_cost(%s::jsonb, %s) as c"
        quoted = answer(conn, query, [usage, user])
        assert charge(conn, user, usage) == quoted, (data, user)
        held = [quoted[0], ceil(Decimal(quoted[1]))] if len(quoted) == 2 else quoted
        assert hold(conn, user, usage) == held, (data, user)
        if len(expected) == len(PARTS) + 1:
            assert quoted == [expected[0], expected[-1]], (data, user)
            costs.add(expected[-1])
        else:
            assert quoted[0] == expected[0], (data, user)
            assert quoted == expected or quoted[0] == MISUSED, (data, user)
        seen[quoted[0] if len(quoted) == 3 else "priced"] += 1
    assert len(costs) > 10, seen


def test_a_charge_asks_for_the_parts_only_where_it_must(conn: Connection) -> None:
    """With price() out of the way, what a composed price covers is charged all the same."""
    plans: dict[str, Any] = {
        "free": {"id": "free", "name": "Free", "factor": 2},
        "pro": {"id": "pro", "name": "Pro", "rate_overrides": {"a": "input_tokens"}},
    }
    config = {
        "models": {"a": "input_tokens * 2", "half": "input_tokens / output_tokens", "_default": "input_tokens"},
        "search": {"costs": "search_queries * 5"},
        "tools": {"db": "tool_calls"},
        "plans": plans,
    }
    publish(conn, load(config))
    manager = CreditManager(conn)
    for user, plan in [("ann", None), ("fred", "free"), ("paul", "pro")]:
        manager.add_credits(user, 1000)
        manager.set_user_plan(user, plan)
    conn.execute("alter function ducto_private.price(ducto_private.terms, jsonb, text) rename to price_out_of_the_way")
    for user, usage, cost in [
        ("ann", '{"model": "a-0613", "input_tokens": 3, "search_queries": 2}', "16"),
        ("ann", '{"model": "elsewhere", "input_tokens": 3}', "3"),
        ("fred", '{"model": "a", "input_tokens": 3}', "12"),
        ("paul", '{"model": "a", "input_tokens": 3}', None),
        ("ann", '{"model": "a", "tool_calls": ["db"]}', None),
        ("ann", '{"model": "half", "input_tokens": 3, "output_tokens": 1}', None),
    ]:
        assert charge(conn, user, usage)[-1 if cost else 0] == (cost or "42883"), usage


@pytest.mark.parametrize("cached", ["inside", "beside"])
def test_sql_and_python_know_the_same_fields_and_parts(conn: Connection, cached: str) -> None:
    (known,) = conn.execute("select ducto_private.known_fields()").fetchone() or ()
    assert sorted(known) == sorted(UsageMetrics.model_fields)
    found = conn.execute("select l.part, l.whole from ducto_private.part_limits(%s) as l", [cached]).fetchall()
    assert found == limits(cached)

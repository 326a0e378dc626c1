"""Compiled prices: the same answers as the engine, whatever the config, and scripts that carry any text unharmed."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from random import Random
from typing import Any

import psycopg
import pytest
from formulas import METRICS, VARIABLES, Formulas

from ducto_pg import exactjson, pricing
from ducto_pg.config import load
from ducto_pg.engine import PricingEngine
from ducto_pg.errors import DuctoError
from ducto_pg.models import PricingConfigData

Connection = psycopg.Connection[tuple[Any, ...]]

PARTS = ("model_credits", "tool_credits", "search_credits", "cache_savings", "fixed_credits", "cost")


def publish(conn: Connection, config: PricingConfigData) -> int:
    compiled = pricing.compile_prices(config)
    with conn.transaction():
        for statement in compiled.functions:
            conn.execute(statement.encode())
        row = conn.execute(
            "select ducto_private.publish(%s::jsonb, null, %s, %s::jsonb, true)",
            [compiled.config_json, compiled.price_function, exactjson.dumps(compiled.plans)],
        ).fetchone()
    assert row
    version: int = row[0]
    return version


def database_price(conn: Connection, usage: Mapping[str, Any], plan: str | None = None) -> list[str | None]:
    """Key, parts and cost as text, or the SQLSTATE, the message and the hint."""
    parts = ", ".join(f"q.{part}::text" for part in PARTS)
    query = f"select q.resolved_model, {parts} from ducto_private.quote(null, %s::jsonb, null, %s, false) as q"
    try:
        row = conn.execute(query.encode(), [exactjson.dumps(usage), plan]).fetchone()
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
        "metrics": dict.fromkeys(METRICS, 0) | {"images": Decimal("1.50")},
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
        config["fixed"] = {"nightly": 7, "it's": 2**63 - 1}
    overrides = {key: source.formula() for key in pick.sample(sorted(keys), len(keys) // 3)}
    overrides |= {f"{pick.choice(sorted(keys))}-x": source.formula()}
    if pick.random() < 0.5:
        overrides["_default"] = source.formula()
    config["plans"] = {
        "pro": {"id": "pro", "name": "It's \\ Pro", "free_allowance": 5, "rate_overrides": overrides},
        "free": {"id": "free", "name": "Free"},
    }
    return config


def random_usage(source: Formulas, config: dict[str, Any]) -> dict[str, Any]:
    pick = source.random
    usage: dict[str, Any] = {name: source.quantity(name) for name in VARIABLES if pick.random() < 0.6}
    usage = {name: value if name in METRICS else int(value) for name, value in usage.items()}
    keys = [*config["models"], *config["plans"]["pro"]["rate_overrides"]]
    name = pick.choice(keys)
    usage["model"] = pick.choice([name, name + "-0613", name + "x", name[:-1], name + ":", "none", "", "zzz"])
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
    source = Formulas(seed)
    for _ in range(configs):
        data = random_config(source)
        config = load(data)
        publish(conn, config)
        engine = PricingEngine(config)
        for _ in range(usages):
            usage, plan = random_usage(source, data), source.random.choice([None, "free", "pro"])
            expected = engine_price(engine, usage, plan)
            assert database_price(conn, usage, plan) == expected, (data, usage, plan)


def config_of(**parts: Any) -> PricingConfigData:
    return load({"models": {"gpt-4": "input_tokens * 2", "_default": "input_tokens"}} | parts)


def terms(conn: Connection, plan: str | None, unseen: bool = False) -> tuple[Any, ...]:
    row = conn.execute(
        "select q.plan_id, q.plan_name, q.free_allowance, q.cost"
        " from ducto_private.quote(null, null, null, %s, %s) as q",
        [plan, unseen],
    ).fetchone()
    assert row
    return row


def test_the_longest_key_before_a_separator_serves_a_model(conn: Connection) -> None:
    keys = ["gpt-4", "gpt-4-turbo", "gpt", "o1:", "a/b", "it's", "back\\slash", "é", "$$", "%s", "_default"]
    models = {key: f"input_tokens * 0 + {number}" for number, key in enumerate(keys)}
    fillers = {f"gpt-4-{number:03}": "input_tokens" for number in range(100)}
    publish(conn, config_of(models=models | fillers))
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


def test_terms_of_a_plan(conn: Connection) -> None:
    plans = {"pro": {"id": "pro", "name": "Pro", "free_allowance": 9, "rate_overrides": {"gpt-4": "input_tokens * 7"}}}
    publish(conn, config_of(plans=plans, default_plan="pro"))
    assert terms(conn, "pro") == ("pro", "Pro", 9, None)
    assert terms(conn, None) == (None, None, 0, None)
    assert terms(conn, None, unseen=True) == ("pro", "Pro", 9, None)
    assert terms(conn, "never") == (None, None, 0, None)


def test_a_plan_that_a_version_drops_keeps_its_last_terms(conn: Connection) -> None:
    rates = {"gpt-4": "input_tokens * 7", "_default": "input_tokens * 5"}
    publish(conn, config_of(plans={"pro": {"id": "pro", "name": "Pro", "free_allowance": 9, "rate_overrides": rates}}))
    publish(conn, config_of(models={"gpt-4": "input_tokens * 3", "gpt-4-x": "input_tokens * 4", "b": "input_tokens"}))
    assert terms(conn, "pro") == ("pro", "Pro", 9, None)
    prices = {
        name: database_price(conn, {"model": name, "input_tokens": 1}, "pro")[1] for name in ("gpt-4", "gpt-4-x", "z")
    }
    assert prices == {"gpt-4": "7", "gpt-4-x": "4", "z": "5"}


def test_a_job_alone(conn: Connection) -> None:
    publish(conn, config_of(fixed={"nightly": 7}, models={"_default": "input_tokens + 100"}))
    row = conn.execute("select q.fixed_credits, q.cost from ducto_private.quote(1, null, 'nightly', null, false) as q")
    assert row.fetchone() == (7, 7)
    with pytest.raises(psycopg.Error) as raised:
        conn.execute("select ducto_private.quote(1, null, 'nighlty', null, false)")
    assert (raised.value.sqlstate, raised.value.diag.message_hint) == ("DU004", "did you mean nightly?")


@pytest.mark.parametrize(
    ("usage", "code", "message", "hint"),
    [
        ({"model": "gpt-5", "input_tokens": 1}, "DU003", "unknown model 'gpt-5'", "did you mean gpt-4?"),
        ({"input_tokens": 1}, "DU003", "tokens were used, but no model is named", "name the model or price _default"),
        ({"model": "gpt-4", "inputTokens": 1}, "DU005", "unknown metric 'inputTokens'", "did you mean input_tokens?"),
        ({"model": "gpt-4", "fixed_job": "x"}, "DU004", "unknown job 'x'", "Add it to the config's fixed."),
        ({"model": "gpt-4", "input_tokens": 10**14}, "22003", "models.gpt-4: the cost is beyond bigint", None),
        ({"tool_calls": ["db"] * 3 + ["x"]}, "22003", "tools.db: the cost is beyond bigint", None),
    ],
)
def test_misuse_is_named(conn: Connection, usage: dict[str, Any], code: str, message: str, hint: str | None) -> None:
    config = {"models": {"gpt-4": "input_tokens * 1e6"}, "tools": {"db": "tool_calls * 4e18", "_default": "tool_calls"}}
    publish(conn, load(config))
    with pytest.raises(psycopg.Error) as raised:
        conn.execute("select ducto_private.quote(null, %s::jsonb, null, null, false)", [exactjson.dumps(usage)])
    assert (raised.value.sqlstate, raised.value.diag.message_primary) == (code, message)
    assert hint is None or raised.value.diag.message_hint == hint


def test_a_script_publishes_once_and_carries_any_text_unharmed(conn: Connection) -> None:
    key = "it's \\ $$ $body$ %s \n -- é"
    plans = {
        "p'": {
            "id": "p'",
            "name": "\\'",
            "features": {"a'\\": ["\\u0027"]},
            "rate_overrides": {key: "input_tokens * 3"},
        }
    }
    config = config_of(
        models={key: "input_tokens / output_tokens"}, plans=plans, fixed={key: 1}, tools={key: "tool_calls"}
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
    assert database_price(conn, usage, "p'")[:2] == [key, "18"]
    assert database_price(conn, {"model": key})[1] == f"division by zero in models.{key}".translate(
        {39: None, 92: None}
    )


def test_functions_are_named_by_their_text() -> None:
    models = {f"m{number}": "input_tokens" for number in range(200)}
    before = pricing.compile_prices(config_of(models=models))
    again = pricing.compile_prices(config_of(models=dict(reversed(models.items()))))
    after = pricing.compile_prices(config_of(models=models | {"m7": "input_tokens * 2"}))
    assert (again.functions, again.price_function) == (before.functions, before.price_function)
    # A leaf of each kind, the root of the rates and the two entries change.
    assert len(set(after.functions) - set(before.functions)) == 5


def test_nobody_else_may_call_a_compiled_function(conn: Connection) -> None:
    publish(conn, config_of())
    row = conn.execute(
        "select count(*), bool_or(has_function_privilege('public', p.oid, 'execute')) from pg_proc as p"
        " where p.proname ~ '^(price|rates)_'"
    )
    assert row.fetchone() == (2, False)


def test_a_chain_of_prefixes_is_no_trap(conn: Connection) -> None:
    models = {"-" * length: f"input_tokens + {length}" for length in range(1, 101)}
    publish(conn, config_of(models=models))
    for name, cost in [("-" * 255, "100"), ("-" * 7, "7"), ("-" * 100 + "x", "99")]:
        assert database_price(conn, {"model": name})[1] == cost


def test_diff() -> None:
    old = config_of(fixed={"a": 1, "b": 2}, metrics={"images": 0})
    new = config_of(fixed={"a": 3, "c": 2}, metrics={"images": 0}, rounding="up")
    assert pricing.diff(old, new) == [
        "~ fixed.a: 1 -> 3",
        "- fixed.b: 2",
        "+ fixed.c: 2",
        '~ rounding: "carry" -> "up"',
    ]
    assert pricing.diff(old, old) == []


def test_random_configs_cost_the_same_in_the_engine_and_the_database(conn: Connection) -> None:
    compare(conn, seed=1, configs=6, usages=40)


@pytest.mark.slow
def test_many_random_configs_cost_the_same_in_the_engine_and_the_database(conn: Connection) -> None:
    compare(conn, seed=2, configs=60, usages=150)


def arithmetic(pick: Random, names: Sequence[str]) -> str:
    """A formula of sums, products and quotients."""
    terms = [
        f"{pick.choice(names)} {pick.choice('*+-/')} {pick.choice(['3', '0.0025', '1.50', '7e-7'])}" for _ in "123"
    ]
    return pick.choice(
        [" + ".join(terms), f"({terms[0]}) * ({terms[1]}) / {terms[2]}", f"2.50 + 0 * {names[0]}", f"{names[0]} ** 0"]
    )


def odd_usage(pick: Random, models: Sequence[str], counts: Sequence[str]) -> dict[str, Any]:
    """Usages as they should be, and a few with something wrong or rare in them."""
    name = pick.choice(models)
    usage: dict[str, Any] = {
        count: pick.choice([0, 1, 17, 10**6, Decimal("4.00"), 10**15 - 1]) for count in counts if pick.random() < 0.7
    }
    if pick.random() < 0.3:
        wrong = [-1, Decimal("0.5"), 10**15, "5", [5], {"a": 5}, True, None, Decimal("1e-13")]
        usage[pick.choice(["input_tokens", "images", "cache_read_tokens", "tool_calls", "search_queries", "typo"])] = (
            pick.choice(wrong)
        )
    usage["model"] = pick.choice(
        [name, name + pick.choice("-@:/_.x0A`;\1") + pick.choice(["", "2024"]), name[:-1], "none", "", "zzz", 7, None]
    )
    if pick.random() < 0.1:
        usage["model"] = name + "-" * 255
    return {key: value for key, value in usage.items() if pick.random() > 0.02}


@pytest.mark.parametrize("seed", range(12))
def test_a_plain_price_is_the_price(conn: Connection, seed: int) -> None:
    pick = Random(seed)
    counts = ["input_tokens", "output_tokens", "cache_read_tokens", "images"][: pick.randint(2, 4)]
    models = [pick.choice(["a", "gpt-4", "gpt-4-mini", "gpt-4.1", "7", "é", "a/b"]) for _ in range(5)]
    models += [f"v/m{number}" for number in range(pick.choice([0, 40]))]
    parts: dict[str, Any] = {
        "search": {"costs": "search_queries * 2"},
        "cache": {"discount": "-cache_read_tokens * 0.5"},
        "tools": {"_default": "tool_calls * 3"},
    }
    data = {name: part for name, part in parts.items() if pick.random() < 0.3}
    formulas = {name: arithmetic(pick, counts) for name in models}
    if pick.random() < 0.5:
        formulas["_default"] = arithmetic(pick, counts)
    metrics = {"images": pick.choice([0, 2])}
    publish(conn, load({"models": formulas, "metrics": metrics} | data))
    plain = 0
    for _ in range(300):
        usage = exactjson.dumps(odd_usage(pick, models, counts[: 2 if data else 4]))
        row = conn.execute(
            "select p.resolved_model, p.cost::text, p.cost > 0 and p.cost < 2::numeric ^ 63"
            " from ducto_private.plain_price(%s) as p",
            [usage],
        ).fetchone()
        assert row
        if row[2]:
            plain += 1
            found = conn.execute("select c.resolved_model, c.total::text from ducto.calculate_cost(%s) as c", [usage])
            assert found.fetchone() == row[:2], usage
    assert plain > 0

"""`ducto-pg pricing import`: each line priced as the catalogue prices it, names served by no other model's line, files.

The bodies are those of `provider_bodies`, with what an older catalogue took for them.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import pytest
from genai_prices.data_units import unit_data
from genai_prices.types import ModelInfo, ModelPrice, Provider, Usage
from places import ROOT
from provider_bodies import ALL, SAMPLE, bodies, own_api, their_name, they_read_it_so

from ducto_pg import CreditManager, PricingEngine, exactjson
from ducto_pg.cli import main
from ducto_pg.errors import DuctoError, InvalidArgumentError, UnknownModelError
from ducto_pg.models import PricingConfigData
from ducto_pg.pricing import listfile
from ducto_pg.pricing.catalog import (
    OUR_NAMES,
    PriceList,
    Selection,
    names_of,
    price_list,
    providers,
    texts,
)
from ducto_pg.pricing.config import load
from ducto_pg.pricing.lookup import Lookup
from ducto_pg.usage import read_body

Connection = psycopg.Connection[Any]
Run = Callable[..., tuple[int, str, str]]

TODAY = date(2026, 11, 28)
EXAMPLE = ROOT / "examples" / "prices.yaml"
# The day that an older catalogue priced the bodies of the collection.
PRICED_ON = date(2026, 8, 1)
EVERY = sorted(providers())

# Counts in which no part is above its whole, by the catalogue's names.
_PARTS = {
    "input_tokens": 1000, "output_tokens": 700,
    "cache_read_tokens": 300, "cache_write_tokens": 200, "cache_write_1h_tokens": 50,
    "input_audio_tokens": 120, "cache_audio_read_tokens": 20, "input_image_tokens": 90, "cache_image_read_tokens": 10,
    "input_video_tokens": 40, "output_audio_tokens": 110, "output_image_tokens": 70, "output_video_tokens": 30,
    "output_reasoning_tokens": 100, "output_citation_tokens": 60,
    "web_searches": 3, "storage_searches": 2, "input_characters": 5000, "input_text_messages": 4,
    "input_document_pages": 9, "input_annotated_document_pages": 4, "audio_seconds": 61, "input_audio_seconds": 61,
}  # fmt: skip
USAGES = {
    "plain": {**_PARTS, **{name: 0 for name in _PARTS if name not in ("input_tokens", "output_tokens")}},
    "cached": {**_PARTS, "cache_read_tokens": 700, "cache_write_tokens": 0, "cache_write_1h_tokens": 0},
    "written": _PARTS,
    "long context": {name: 300 * count for name, count in _PARTS.items()},
    "beyond all tiers": {name: 3000 * count for name, count in _PARTS.items()},
}


@cache
def listed(provider: str, on: date = TODAY) -> tuple[PriceList, PricingEngine]:
    prices = price_list(Selection([provider], on=on))
    return prices, PricingEngine(config_of(prices))


def config_of(prices: PriceList) -> PricingConfigData:
    return load({"models": prices.models, "aliases": prices.aliases, "metrics": prices.metrics, "min_balance": 0})


def counts_for(model: ModelInfo, counts: dict[str, int], moment: datetime) -> dict[str, int]:
    """Those counts of a usage that the model's price knows."""
    price = model.get_prices(moment)
    priced = {name for name, value in vars(price).items() if value is not None}
    return {name: count for name, count in counts.items() if unit_data[name]["price_key"] in priced}


def ours(counts: dict[str, int]) -> dict[str, int]:
    return {OUR_NAMES.get(name, name): count for name, count in counts.items()}


def dearest_hour(model: ModelInfo, on: date) -> datetime:
    moments = [datetime.combine(on, time(hour, 45), UTC) for hour in range(24)]
    used = Usage(input_tokens=10, output_tokens=10)
    return max(moments, key=lambda at: model.get_prices(at).calc_price(used)["total_price"])


def same_digits(ours: Decimal, theirs: Decimal, seconds: bool) -> bool:
    """Exactly; a quotient, of hours by seconds, has 16 digits or more with us and 28 with them."""
    return abs(ours - theirs) <= abs(theirs) * Decimal("1e-14") if seconds else ours == theirs


@pytest.mark.parametrize("provider", EVERY)
def test_every_line_is_priced_as_the_catalogue_prices_it(provider: str) -> None:
    prices, engine = listed(provider)
    models = {model.id: model for model in providers()[provider].models}
    for key in prices.models.keys() & models.keys():
        model = models[key]
        at = dearest_hour(model, TODAY)
        for kind, all_counts in USAGES.items():
            counts = counts_for(model, all_counts, at)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = model.calc_price(
                    Usage(**counts), providers()[provider], genai_request_timestamp=at
                ).total_price
            got = engine.calculate({"model": key, **ours(counts)}).total
            assert same_digits(got, theirs, seconds="audio_seconds" in counts), (kind, key, got, theirs)


def test_groq_bills_ten_seconds_of_speech_at_least() -> None:
    _, engine = listed("groq")
    ten, two, none = (
        engine.calculate({"model": "whisper-large-v3", "audio_seconds": count}).total for count in (10, 2, 0)
    )
    assert ten == two > 0
    assert none == 0


# ----------------------------------------------------------------------------------------------------------------------
# Names


def names_by_key(provider: str, key: str) -> list[str]:
    return next((names_of(model) for model in providers()[provider].models if model.id == key), [key])


def served_by_others() -> Iterator[tuple[str, str, str, str]]:
    """With each model's line left out in turn: provider, key left out, one of its names, and the key that serves it."""
    for provider in EVERY:
        prices, _ = listed(provider)
        models = {model.id: model for model in providers()[provider].models}
        for key in prices.models:
            keys = prices.models.keys() - {key}
            lookup = Lookup("dated", {alias: target for alias, target in prices.aliases.items() if target != key})
            for name in names_by_key(provider, key):
                served = lookup.find(name, keys)
                if served and providers()[provider].find_model(name) is models.get(key):
                    yield provider, key, name, served


def test_no_model_is_priced_by_anothers_line_but_that_of_its_undated_name() -> None:
    found = list(served_by_others())
    assert len(found) > 40
    for provider, key, name, served in found:
        prices, _ = listed(provider)
        aliases = {alias: target for alias, target in prices.aliases.items() if target != key}
        ends = [end for end in range(1, len(name)) if name[end] in "-@:/_"]
        undated = [name[:end] for end in ends if Lookup("dated", {}).find(name, {name[:end]})]
        exact = Lookup("exact", aliases)
        assert served in [exact.find(short, prices.models.keys() - {key}) for short in undated], (provider, key, name)


def test_a_dated_model_of_another_price_is_always_taken_along() -> None:
    """Of each served name above: whoever imports the serving model alone gets the other line too, if prices differ."""
    along = 0
    for provider, key, _, served in served_by_others():
        prices, _ = listed(provider)
        alone = price_list(Selection([provider], [served], on=TODAY))
        same = prices.models[key] == prices.models[served]
        engine = PricingEngine(config_of(alone))
        for name in names_by_key(provider, key):
            resolved = engine.resolve_model(name)
            assert resolved is None or alone.models[resolved] == prices.models[key], (provider, name, resolved)
        along += not same and key in alone.models
    assert along > 30


def test_names_that_the_catalogue_writes_out_reach_their_line(conn: Connection) -> None:
    """Or one of the same price, or none; the engine and the database find the same."""
    manager = CreditManager(conn)
    reached, unreached = 0, set()
    for provider in EVERY:
        prices, engine = listed(provider)
        version = manager.publish_pricing(config_of(prices), label=provider, activate=False).version
        names = {
            name: model.id
            for model in providers()[provider].models
            for name in [model.id, *texts(model.match, "equals", "starts_with", "ends_with", "contains")]
            if model.id in prices.models and providers()[provider].find_model(name) is model
        }
        query = """
            select n.name, (ducto_private.find_price(t, t.version, 'models', n.name, t.aliases)).key
            from ducto_private.find_terms(%s, null, now()) as t, unnest(%s::text[]) as n (name)
        """
        for name, served in conn.execute(query, [version, list(names)]).fetchall():
            assert served == engine.resolve_model(name), (provider, name)
            if served is None:
                unreached.add((provider, name))
            else:
                assert prices.models[served] == prices.models[names[name]], (provider, name, served)
                reached += 1
    print(reached, sorted(unreached))
    assert reached > 3600
    assert len(unreached) <= 20


# Provider, name as it comes in answers, the key that serves it.
NAMES = [
    ("openai", "gpt-5-2025-08-07", "gpt-5"),
    ("openai", "gpt-5-chat-latest", "gpt-5"),
    ("openai", "gpt-4o-2024-08-06", "gpt-4o"),
    ("openai", "gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
    ("openai", "gpt-5-pro-2025-10-06", "gpt-5-pro"),
    ("openai", "gpt-4o-transcribe-diarize", "gpt-4o-transcribe"),
    ("anthropic", "claude-sonnet-4-20250514", "claude-sonnet-4-0"),
    ("anthropic", "claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
    ("anthropic", "claude-3-5-haiku-20241022", "claude-3-5-haiku-latest"),
    ("anthropic", "claude-opus-4-1-20250805", "claude-opus-4-1"),
    ("google", "gemini-2.5-flash-lite", "gemini-2.5-flash-lite"),
    ("google", "claude-sonnet-4-5@20250929", "claude-sonnet-4-5"),
    ("azure", "gpt-4o-2024-11-20", "gpt-4o"),
    ("azure", "grok-4", "grok-4-0709"),
    ("aws", "us.anthropic.claude-sonnet-4-5-20250929-v1:0", "regional.anthropic.claude-sonnet-4-5-20250929-v1:0"),
    ("aws", "anthropic.claude-sonnet-4-5-20250929-v1:0", "regional.anthropic.claude-sonnet-4-5-20250929-v1:0"),
    ("aws", "global.anthropic.claude-sonnet-4-5-20250929-v1:0", "global.anthropic.claude-sonnet-4-5-20250929-v1:0"),
    ("aws", "eu.amazon.nova-lite-v1:0", "amazon.nova-lite-v1:0"),
    ("aws", "us.meta.llama3-1-70b-instruct-v1:0", "meta.llama3-1-70b-instruct-v1:0"),
    ("openrouter", "anthropic/claude-4.5-sonnet-20250929", "anthropic/claude-sonnet-4.5"),
    ("zai", "glm-5.2", "GLM-5.2"),
    ("mistral", "mistral-small-latest", "mistral-small-latest"),
]


@pytest.mark.parametrize(("provider", "name", "key"), NAMES)
def test_names_of_answers_are_served(provider: str, name: str, key: str) -> None:
    assert listed(provider)[1].resolve_model(name) == key


def test_prefixes_and_deployments_are_aliases_of_ones_own() -> None:
    prices, _ = listed("openai")
    own = {"openai/": "*", "models/": "*", "prod-chat": "gpt-5-mini"}
    engine = PricingEngine(config_of(prices).model_copy(update={"aliases": {**prices.aliases, **own}}))
    served = [engine.resolve_model(name) for name in ("openai/gpt-5-2025-08-07", "models/o3", "prod-chat")]
    assert served == ["gpt-5", "o3", "gpt-5-mini"]


# ----------------------------------------------------------------------------------------------------------------------
# What providers returned


@pytest.mark.parametrize(
    ("collection", "prices", "priced"),
    [
        pytest.param(SAMPLE, 40, 30, id="sample"),
        pytest.param(ALL, 1409, 600, id="all", marks=pytest.mark.skipif(not ALL.exists(), reason="not here")),
    ],
)
def test_bodies_cost_what_the_third_party_says(conn: Connection, collection: Path, prices: int, priced: int) -> None:
    """For each body, read by its own API, and each provider whose price the third party gives for that reading."""
    versions: dict[str, int] = {}
    same, unresolved, moved, two = Counter[str](), set[tuple[str, str]](), Counter[str](), 0
    seen = set()
    with CreditManager(conn) as manager:
        for number, entry in enumerate(bodies(collection)):
            body, api, model = entry["body"], own_api(entry["body"]), entry.get("model")
            try:
                usage = read_body(body, api, model, False)
            except InvalidArgumentError:
                two += 1
                continue
            usage.pop("web_search_calls", None)  # They tell input and output only.
            for reading in entry["extracted"]:
                if not they_read_it_so(reading, their_name(body)):
                    continue
                for one in reading["extractors"]:
                    provider = one["provider_id"]
                    todays = now(providers()[provider], usage)
                    theirs = told(one) if collection == ALL else todays
                    if theirs is None:
                        continue
                    listing, engine = listed(provider, PRICED_ON)
                    try:
                        cost = engine.calculate(usage).total
                    except UnknownModelError:
                        unresolved.add((provider, usage["model"]))
                        continue
                    if provider not in versions:
                        published = manager.publish_pricing(config_of(listing), label=provider, activate=False)
                        versions[provider] = published.version
                    query = "select c.total from ducto.calculate_cost(%s::jsonb, p_version => %s) as c"
                    row = conn.execute(query, [exactjson.dumps(usage), versions[provider]]).fetchone()
                    assert row
                    assert f"{row[0]:f}" == f"{cost:f}", (provider, usage)
                    if cost == theirs:
                        same[provider] += 1
                        seen.add(number)
                    else:
                        assert cost == todays, (provider, usage, cost, theirs)
                        moved[f"{provider} {usage['model']}"] += 1
    assert sum(same.values()) >= prices
    assert len(seen) >= priced
    assert two <= 2
    # The catalogue names other models, or other prices without a date, than when it priced the collection.
    print(collection.name, sum(same.values()), len(seen), two, moved)
    assert moved.keys() <= {
        "mistral mistral-medium-latest", "mistral mistral-small-latest", "aws openai.gpt-5.6-luna",
        "deepseek deepseek-v4-flash",
    }, moved  # fmt: skip
    # Names that the catalogue serves by what they begin with or contain.
    assert unresolved <= {
        ("groq", "meta-llama/Llama-4-Scout-17B-16E-Instruct"), ("openrouter", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("google", "gemini-2.5-pro-preview-05-06"), ("cerebras", "qwen-3-coder-480b"),
        ("deepseek", "deepseek-r1-distill-llama-70b"),
    }, unresolved  # fmt: skip


def told(price: dict[str, Any]) -> Decimal | None:
    return Decimal(price["input_price"]) + Decimal(price.get("output_price", 0)) if "input_price" in price else None


def now(provider: Provider, usage: dict[str, Any]) -> Decimal | None:
    """What today's catalogue takes for it; None where it does not know the model."""
    model = provider.find_model(usage.get("model", ""), all_providers=list(providers().values()))
    if model is None or not vars(model.get_prices(datetime.combine(PRICED_ON, time(12), UTC))):
        return None
    at = dearest_hour(model, PRICED_ON)
    counts = {name: usage.get(OUR_NAMES.get(name, name), 0) for name in _PARTS if "searches" not in name}
    return model.calc_price(Usage(**counts_for(model, counts, at)), provider, genai_request_timestamp=at).total_price


# ----------------------------------------------------------------------------------------------------------------------
# The example


def test_the_example_is_made_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the header says from what and of which day; nothing that the command names was written by hand."""
    text = EXAMPLE.read_text("utf-8")
    head = re.search(r"from the catalogue of genai-prices (\S+), prices of (\S+):", text)
    assert head
    arguments = listfile.command_of(text)
    assert arguments
    made = tmp_path / "made.yaml"
    assert main(["pricing", "import", *arguments, "--on", head[2], "-o", str(made)]) == 0
    capsys.readouterr()
    example, again = load(EXAMPLE), load(made)
    if version("genai-prices") == head[1]:
        assert (example.models, example.aliases, example.metrics) == (again.models, again.aliases, again.metrics)
    assert example.factor == 1250


def test_each_line_of_the_example_is_the_catalogues(conn: Connection) -> None:
    example = load(EXAMPLE)
    engine = PricingEngine(example)
    with CreditManager(conn) as manager:
        version = manager.publish_pricing(example).version
    owners = {"gpt": "openai", "claude": "anthropic", "gemini": "google"}
    checked = 0
    for key in example.models:
        provider = providers()[owners[key.partition("-")[0]]]
        model = provider.find_model(key)
        assert model
        assert model.id == key
        at = datetime.combine(TODAY, time(12), UTC)
        for kind in ("plain", "cached", "written", "long context"):
            counts = counts_for(model, USAGES[kind], at)
            theirs = model.calc_price(Usage(**counts), provider, genai_request_timestamp=at).total_price
            usage = {"model": key, **ours(counts)}
            assert engine.calculate(usage).total == theirs * 1250, (kind, key)
            query = "select c.total from ducto.calculate_cost(%s::jsonb, p_version => %s) as c"
            assert conn.execute(query, [exactjson.dumps(usage), version]).fetchone() == (theirs * 1250,)
            checked += 1
    assert checked == 4 * len(example.models)


def test_cached_input_is_not_billed_in_full() -> None:
    usage = {"model": "gpt-5.5", "input_tokens": 100_000, "cache_read_tokens": 95_000}
    assert PricingEngine(load(EXAMPLE)).calculate(usage).total == Decimal("0.0725") * 1250


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `pricing import` in a folder of its own; answers exit code, output and remarks or complaint."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, *further: str) -> tuple[int, str, str]:
        code = main(["pricing", "import", *line.split(), *further])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_list_in_money_with_a_factor(run: Run) -> None:
    code, out, err = run("--provider openai --model gpt-5 --credits-per-usd 100 --markup 1.3")
    assert (code, err) == (0, "")
    config = load(out)
    assert config.factor == 130
    assert list(config.models) == ["gpt-5"]
    assert PricingEngine(config).calculate({"model": "gpt-5", "input_tokens": 1_000_000}).total == Decimal("162.5")


def test_a_list_without_a_factor_says_so(run: Run) -> None:
    assert "\nfactor: 1\n" in run("--provider openai --model gpt-5")[1]


def test_models_are_chosen_by_pattern_and_by_other_names(run: Run) -> None:
    assert load(run("--provider openai --model gpt-5-n* --model o4-mini-high")[1]).models.keys() == {
        "gpt-5-nano",
        "o4-mini",
    }


def test_a_tariff(run: Run) -> None:
    standard = load(run("--provider anthropic --model claude-opus-5")[1])
    batch = load(run("--provider anthropic --model claude-opus-5 --tariff processing=batch --key {}:batch")[1])
    usage = {"input_tokens": 1000, "cache_read_tokens": 100, "output_tokens": 50}
    full = PricingEngine(standard).calculate({"model": "claude-opus-5", **usage}).total
    assert PricingEngine(batch).calculate({"model": "claude-opus-5:batch", **usage}).total * 2 == full
    assert batch.models.keys() == {"claude-opus-5:batch"}


def both_orders(run: Run, *parts: str) -> tuple[str, str]:
    """The list and the remarks, which are the same in whatever order the providers stand."""
    (_, out, err), other = (run(" ".join(("--provider", one, "--provider", two, *parts[2:]))) for one, two in
        (parts[:2], parts[1::-1]))  # fmt: skip
    assert load(out) == load(other[1])
    assert (other[0], sorted(err.splitlines())) == (0, sorted(other[2].splitlines()))
    return out, err


def test_a_providers_own_name_is_no_alias_of_anothers(run: Run) -> None:
    """Anthropic's API answers claude-sonnet-4-5-20250929; Bedrock asks 10 percent more for what it calls so too."""
    models = ("--model", "aws/*claude-haiku-4-5*", "--model", "anthropic/claude-sonnet-4-5")
    out, err = both_orders(run, "aws", "anthropic", *models)
    engine = PricingEngine(load(out))
    bedrock = "us.anthropic.claude-haiku-4-5-20251001-v1:0"
    names = ["claude-sonnet-4-5-20250929", "claude-haiku-4-5-20251001", bedrock]
    assert [engine.resolve_model(name) for name in names] == [
        "claude-sonnet-4-5", None, "regional.anthropic.claude-haiku-4-5-20251001-v1:0",
    ]  # fmt: skip
    usage = {"model": "claude-sonnet-4-5-20250929", "input_tokens": 300_000, "output_tokens": 1000}
    assert engine.calculate(usage).total == Decimal("1.8225")
    head = " ".join(out.partition("\nversion: 1")[0].replace("\n#", "").split())
    for said in (
        "no alias claude-haiku-4-5-20251001 for aws's regional.anthropic.claude-haiku-4-5-20251001-v1:0",
        "claude-sonnet-4-5-20250929 costs what anthropic's claude-sonnet-4-5 does; aws has another price",
    ):
        assert said in err
        assert said in head
    Path("two.yaml").write_text(out)
    assert run("--update two.yaml --dry-run")[1] == "no difference\n"


def test_a_provider_that_knows_anothers_names_takes_no_alias_of_them(run: Run) -> None:
    models = ("--model", "google/gemini-2.5-pro", "--model", "aws/*claude-haiku-4-5*")
    out, err = both_orders(run, "google", "aws", *models)
    config = load(out)
    for name in ("us.anthropic.claude-haiku-4-5-20251001-v1:0", "eu.anthropic.claude-haiku-4-5-20251001-v1:0"):
        served = PricingEngine(config).resolve_model(name)
        assert served == "regional.anthropic.claude-haiku-4-5-20251001-v1:0"
    assert err.count("\n") == 1
    assert "no alias claude-haiku-4-5-20251001 for" in err


def test_a_key_that_goes_on_after_the_name_has_the_dated_names_as_aliases(run: Run) -> None:
    engines = [
        PricingEngine(load(run(f"--provider {provider} --tariff processing=batch --key {{}}:batch")[1]))
        for provider in ("anthropic", "openai")
    ]
    names = ("claude-sonnet-4-5-20250929:batch", "claude-haiku-4-5-20251001:batch")
    assert [engines[0].resolve_model(name) for name in names] == ["claude-sonnet-4-5:batch", "claude-haiku-4-5:batch"]
    assert engines[1].resolve_model("gpt-5-2025-08-07:batch") == "gpt-5:batch"


def test_the_price_of_a_day_and_what_comes_after(run: Run) -> None:
    _, _, err = run("--provider deepseek --model deepseek-v4-pro --on 2026-08-01")
    assert "deepseek-v4-pro: the catalogue has another price from 2026-08-17 on" in err
    assert "dearest hours" in err


HAND = """\
# Mine.
version: 1
factor: 100
models:
  # of our own
  in-house: input_tokens * 0.5e-6   # cheap
  gpt-5: >-
    input_tokens * 1e-6
    + output_tokens * 1e-6

  # the rest
  other: input_tokens * 2e-6
fixed:
  report: 25   # whole
aliases:
  gpt-5-chat: in-house   # on purpose
plans:
  pro: {id: pro, name: Pro, free_allowance: 100}
"""


def test_an_update_keeps_the_part_of_the_factor_that_it_does_not_name(run: Run) -> None:
    wanted = "--provider openai --model gpt-5"
    run(f"{wanted} --credits-per-usd 1000 --markup 1.3 -o mine.yaml")
    for more, factor in (("--markup 1.5", 1500), ("", 1500), ("--credits-per-usd 100", 150), ("--markup 1", 100)):
        code, _, err = run(f"{wanted} {more} --update mine.yaml")
        assert (code, err, load(Path("mine.yaml")).factor) == (0, "", Decimal(factor))
    assert "factor: 100\n" in run(f"{wanted} --credits-per-usd 100")[1]


def test_an_update_keeps_what_was_written_by_hand(run: Run) -> None:
    Path("mine.yaml").write_text(HAND)
    dry = run("--provider openai --model gpt-5 --model gpt-5-pro --update mine.yaml --dry-run")
    assert Path("mine.yaml").read_text() == HAND
    done = run("--provider openai --model gpt-5 --model gpt-5-pro --update mine.yaml")
    assert (done, done[0]) == (dry, 0)
    changed = [line.partition(": ")[0] for line in done[1].splitlines()]
    assert changed == [
        "+ aliases.gpt-5-codex", "+ metrics.storage_searches", "~ models.gpt-5", "+ models.gpt-5-pro",
    ]  # fmt: skip
    new = Path("mine.yaml").read_text()
    kept = [line for line in HAND.splitlines() if line not in ("    input_tokens * 1e-6", "    + output_tokens * 1e-6")]
    lines = iter(new.splitlines())
    assert all(line in lines for line in kept)
    config = load(new)
    assert (config.fixed, config.aliases["gpt-5-chat"]) == ({"report": 25}, "in-house")
    assert config.factor == 100
    assert (config.plans or {}).keys() == {"pro"}

    Path("mine.yaml").write_text(new.replace("120e-6", "121e-6"))
    code, out, _ = run("--update mine.yaml")
    assert (code, out.count("\n"), out.startswith("~ models.gpt-5-pro: ")) == (0, 1, True)
    assert Path("mine.yaml").read_text() == new
    assert run("--update mine.yaml") == (0, "no difference\n", "")


@pytest.mark.parametrize("line", ["gpt-5: requests * 7   # why", "gpt-5: >-   # why\n    requests * 7"])
def test_a_comment_behind_a_price_stays(run: Run, line: str) -> None:
    Path("mine.yaml").write_text(f"models:\n  {line}\n\n  mine: requests * 1   # mine")
    assert run("--provider openai --model gpt-5 --update mine.yaml")[0] == 0
    text = Path("mine.yaml").read_text()
    assert "  gpt-5: >-   # why\n    (input_tokens" in text
    assert "2.5e-3\n\n  mine: requests * 1   # mine\n" in text


def test_costs_beside_prices_of_ones_own(run: Run) -> None:
    Path("mine.yaml").write_text("models:\n  gpt-5: requests * 7\n")
    assert run("--provider openai --model gpt-5 --costs --update mine.yaml")[0] == 0
    config = load(Path("mine.yaml"))
    assert (config.models, str(config.factor), config.aliases) == ({"gpt-5": "requests * 7"}, "1", {})
    assert config.costs.keys() == {"gpt-5"}


BAD = [
    ("", "name a provider with --provider: anthropic, "),
    ("--provider opnai", "the catalogue has no provider 'opnai'; did you mean \"openai\"?"),
    ("--provider bedrock", "the catalogue has no provider 'bedrock'; did you mean \"aws\"?"),
    ("--provider vertex", "the catalogue has no provider 'vertex'; did you mean \"google\"?"),
    ("--provider openai --model gpt-5-mni", "openai: no model 'gpt-5-mni'; did you mean \"gpt-5-mini\"?"),
    ("--provider openai --model gpt-5 --tariff processing=bach", "no tariff processing=bach"),
    ("--provider anthropic --provider google --model claude-sonnet-4-5", "--model anthropic/…"),
    ("--provider openai --key batch", "{} stands for the model's name"),
    ("--provider openai --costs", "name it with --update"),
    ("--provider openai -o there.yaml", "there.yaml is there already: bring it up to date with --update"),
    ("--update missing.yaml", "missing.yaml: No such file or directory"),
    ("--update there.yaml", "its header names no import: say which with --provider"),
    ("--update made.yaml --markup 2", "--markup needs the whole command"),
    ("--provider openai --model gpt-5 --credits-per-usd 100 --update there.yaml", "a new factor would change"),
    ("--provider openai --model gpt-5 --markup 2 --update factor.yaml", "its factor is 1300: say how much of it is"),
    ("--provider openai --model gpt-5 --update flow.yaml", "only a section with a line for each key"),
    ("--provider openai --model gpt-5 --update list.json", "only a YAML file with a line for each key"),
    ("--provider openai --model gpt-5 --update beside.yaml", "says cached: beside"),
    ("--provider openai --model gpt-5 --update anchors.yaml", "does not let it be updated"),
    ("--provider openai --model gpt-5 --update merged.yaml", "does not let it be updated"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_input_is_a_clear_error(run: Run, line: str, said: str) -> None:
    Path("there.yaml").write_text("models:\n  mine: input_tokens\n")
    Path("made.yaml").write_text(
        "# Made by `ducto-pg pricing import` x:\n#   ducto-pg pricing import\n# written by hand.\n"
    )
    Path("factor.yaml").write_text("factor: 1300\nmodels:\n  gpt-5: input_tokens\n")
    Path("flow.yaml").write_text("models: {mine: input_tokens}\n")
    Path("list.json").write_text('{"models": {"mine": "input_tokens"}}')
    Path("beside.yaml").write_text("cached: beside\nmodels:\n  mine: input_tokens\n")
    Path("anchors.yaml").write_text("models:\n  mine: &a input_tokens\n  gpt-5: *a\n")
    Path("merged.yaml").write_text("models:\n  gpt-5: &a input_tokens\n  mine: *a\n")
    before = {path: path.read_text() for path in Path().iterdir()}
    code, out, err = run(line)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err
    assert {path: path.read_text() for path in Path().iterdir()} == before


@pytest.mark.parametrize("option", ["--markup 0", "--credits-per-usd x", "--tariff batch", "--on yesterday"])
def test_bad_options_are_misuse(run: Run, option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(f"--provider openai {option}")
    assert ended.value.code == 2


def test_without_the_catalogue_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)
    code, _, err = run("--provider openai")
    assert (code, err) == (1, "ducto-pg: the catalogue is not installed: pip install 'ducto-pg[catalog]'\n")


def test_a_price_of_no_unit_that_we_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = next(model for model in providers()["openai"].models if model.id == "gpt-5")
    monkeypatch.setattr(model, "prices", ModelPrice(input_smells=Decimal(1)))
    with pytest.raises(DuctoError, match="prices input_smells, which this release does not know"):
        price_list(Selection(["openai"], ["gpt-5"]))

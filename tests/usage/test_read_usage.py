"""What providers returned, read by `ducto_pg.usage.read` and by `ducto.read_usage`: alike, errors included.

The bodies are those of `provider_bodies`.
"""

# ruff: noqa: E501 (tables)

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from places import ROOT
from provider_bodies import ALL, SAMPLE, THEIRS, bodies, own_api, their_name, they_read_it_so

from ducto_pg import CreditManager, exactjson
from ducto_pg.errors import InvalidArgumentError
from ducto_pg.formula.fields import KNOWN_COUNTS
from ducto_pg.usage import read, read_body, table

Connection = psycopg.Connection[Any]

# The counts of the third party in our words.
COUNTS = {
    **{
        name: name
        for name in (
            *("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"),
            *("input_audio_tokens", "output_audio_tokens", "cache_audio_read_tokens", "input_image_tokens"),
            *("output_image_tokens", "input_video_tokens"),
        )
    },
    "output_reasoning_tokens": "reasoning_tokens",
    "web_searches": "web_search_calls",
}


def they_are_wrong(body: dict[str, Any], name: str) -> str | None:
    """Why a count of theirs is not ours, or None."""
    usage = body.get("usage", {})
    if name == "cache_read_tokens" and usage.get("num_cached_tokens"):
        return "Mistral's num_cached_tokens are cached input at a tenth of the price; they read no cache"
    if any("model" in part for part in usage.get("iterations", [])):
        return "the advisor's tokens are in no sum of the body; they drop them"
    return None


COLLECTIONS = [
    pytest.param(SAMPLE, id="sample"),
    pytest.param(
        ALL, id="all", marks=pytest.mark.skipif(not ALL.exists(), reason="no collection of bodies beside the clone")
    ),
]

Said = dict[str, Any] | tuple[str, str | None]


def in_python(body: Any, api: str | None = None, model: str | None = None, beside: bool = False) -> Said:
    try:
        return read_body(body, api, model, beside)
    except InvalidArgumentError as error:
        return error.message, error.hint


@pytest.fixture
def in_sql(conn: Connection) -> Callable[..., Said]:
    def ask(body: Any, api: str | None = None, model: str | None = None, beside: bool = False) -> Said:
        query = """
            select case when %s then ducto_private.without_cached(r.usage) else r.usage end::text
            from ducto_private.read_body(%s::jsonb, %s, %s) as r (usage)
        """
        try:
            row = conn.execute(query, [beside, exactjson.dumps(body), api, model]).fetchone()
        except psycopg.errors.InvalidParameterValue as error:
            return error.diag.message_primary or "", error.diag.message_hint
        assert row
        return exactjson.loads(row[0])  # type: ignore[no-any-return]

    return ask


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_bodies_are_read_as_the_third_party_reads_them(collection: Path, in_sql: Callable[..., Said]) -> None:
    wrong, apis = Counter[str](), Counter[str]()
    for entry in bodies(collection):
        body, api = entry["body"], own_api(entry["body"])
        theirs = next(one["usage"] for one in entry["extracted"] if they_read_it_so(one, their_name(body)))
        usage = in_python(body, api)
        assert in_sql(body, api) == usage, body
        apis[api] += 1
        if isinstance(usage, tuple):
            assert "models in one body" in usage[0], (usage, body)
            reason = they_are_wrong(body, "")
            assert reason, (usage, body)
            wrong[reason] += 1
            continue
        assert "unread" not in usage, body
        for name, count in COUNTS.items():
            if usage.get(count, 0) != theirs.get(name, 0):
                reason = they_are_wrong(body, name)
                assert reason, (name, usage, theirs, body)
                wrong[reason] += 1
        told = {COUNTS[name]: theirs[name] for name in theirs if name in COUNTS}
        assert told.keys() <= usage.keys(), body
        if usage.get("model"):
            assert usage["model"] == body.get("model", body.get("modelVersion"))
    assert apis.keys() >= THEIRS.keys() - {"cohere_tokens"}
    assert sum(wrong.values()) <= 14, wrong


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_without_an_api_it_is_the_same_or_an_error(collection: Path, in_sql: Callable[..., Said]) -> None:
    same = 0
    for entry in bodies(collection):
        usage = in_python(entry["body"])
        assert in_sql(entry["body"]) == usage
        if isinstance(usage, dict):
            assert usage == in_python(entry["body"], own_api(entry["body"])), entry["body"]
            same += 1
    assert same > 0.9 * len(bodies(collection))


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_cohere_tells_two_counts(collection: Path) -> None:
    entries = [entry for entry in bodies(collection) if entry["body"].get("usage", {}).get("tokens")]
    assert entries
    for entry in entries:
        usage = entry["body"]["usage"]
        assert read(entry["body"], "cohere").input_tokens == usage["billed_units"]["input_tokens"]
        told = read(entry["body"], "cohere_tokens")
        assert (told.input_tokens, told.cache_read_tokens) == (
            usage["tokens"]["input_tokens"],
            usage.get("cached_tokens", 0),
        )


CHAT = {"prompt_tokens": 100, "completion_tokens": 20}
CLAUDE = {"input_tokens": 5, "output_tokens": 7}
START = {"type": "message_start", "message": {"id": "m", "model": "claude", "usage": {**CLAUDE, "output_tokens": 1}}}
DELTA = {"type": "message_delta", "usage": {"output_tokens": 9, "input_tokens": None}}
THOUGHT = {**CHAT, "completion_tokens_details": {"reasoning_tokens": 12}}
TWO = {
    "model": "big",
    "usage": {
        **CLAUDE,
        "iterations": [{"type": "message", **CLAUDE}, {"type": "advisor_message", "model": "small", **CLAUDE}],
    },
}
COMPACTED = {"type": "compaction", "input_tokens": 100, "output_tokens": 30, "cache_read_input_tokens": 1}

# What it shows, body, api, model, usage.
READ: list[tuple[str, Any, str | None, str | None, dict[str, Any]]] = [
    ("a part", CHAT, None, None, {"input_tokens": 100, "output_tokens": 20}),
    ("a model of one's own wins", {"model": "x", "usage": CHAT}, None, "y", {"model": "y", "input_tokens": 100, "output_tokens": 20}),
    ("an empty model is none", {"model": "", "usage": CHAT}, None, "", {"input_tokens": 100, "output_tokens": 20}),
    ("nulls are absent", {**CHAT, "prompt_tokens_details": None}, None, None, {"input_tokens": 100, "output_tokens": 20}),
    ("nothing was used", {"prompt_tokens": 0}, "openai", None, {}),
    ("embeddings", {"model": "e", "usage": {"prompt_tokens": 8, "total_tokens": 8}}, None, None, {"model": "e", "input_tokens": 8}),
    ("cache writes of OpenAI", {**CHAT, "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30}}, None, None,
     {"input_tokens": 100, "output_tokens": 20, "cache_read_tokens": 60, "cache_write_tokens": 30}),
    ("reasoning inside", {**THOUGHT, "total_tokens": 120}, None, None,
     {"input_tokens": 100, "output_tokens": 20, "reasoning_tokens": 12}),
    ("reasoning beside, told by the total", {**THOUGHT, "total_tokens": 132}, None, None,
     {"input_tokens": 100, "output_tokens": 32, "reasoning_tokens": 12}),
    ("reasoning beside, told by the caller", THOUGHT, "xai", None,
     {"input_tokens": 100, "output_tokens": 32, "reasoning_tokens": 12}),
    ("ticks of xAI", {**CHAT, "cost_in_usd_ticks": 37756000, "num_sources_used": 3}, None, None,
     {"input_tokens": 100, "output_tokens": 20, "search_results": 3, "provider_cost": Decimal("0.0037756")}),
    ("cost of OpenRouter", {**CHAT, "cost": Decimal("0.00019199999999999998")}, "openrouter", None,
     {"input_tokens": 100, "output_tokens": 20, "provider_cost": Decimal("0.00019199999999999998")}),
    ("searches of Responses lie beside its usage",
     {"usage": {"input_tokens": 3, "output_tokens": 4}, "tool_usage": {"web_search": {"num_requests": 2}}}, None, None,
     {"input_tokens": 3, "output_tokens": 4, "web_search_calls": 2}),
    ("a Responses stream", [{"type": "response.created", "response": {"id": "r", "usage": None}},
     {"type": "response.completed", "response": {"id": "r", "model": "g", "usage": {"input_tokens": 3, "output_tokens": 4}}}],
     "openai", None, {"model": "g", "input_tokens": 3, "output_tokens": 4}),
    ("seconds are rounded up", {"usage": {"type": "duration", "seconds": Decimal("1.0000000000001")}}, None, None,
     {"audio_seconds": Decimal("1.000000000001")}),
    ("transcription by tokens", {"usage": {"input_tokens": 30, "output_tokens": 5, "input_token_details": {"audio_tokens": 28}}},
     None, None, {"input_tokens": 30, "output_tokens": 5, "input_audio_tokens": 28}),
    ("Anthropic counts cached input beside", {**CLAUDE, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 50,
     "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30}}, None, None,
     {"input_tokens": 155, "output_tokens": 7, "cache_read_tokens": 100, "cache_write_tokens": 50, "cache_write_1h_tokens": 30}),
    ("writes told by their parts only", {**CLAUDE, "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30}},
     "anthropic", None, {"input_tokens": 55, "output_tokens": 7, "cache_write_tokens": 50, "cache_write_1h_tokens": 30}),
    ("searches", {**CLAUDE, "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1}}, "anthropic", None,
     {"input_tokens": 5, "output_tokens": 7, "web_search_calls": 2}),
    ("an Anthropic stream", [START, {"type": "ping"}, DELTA], None, None, {"model": "claude", "input_tokens": 5, "output_tokens": 9}),
    ("compaction is in no sum", {**CLAUDE, "iterations": [{"type": "message", **CLAUDE}, COMPACTED]}, None, None,
     {"input_tokens": 106, "output_tokens": 37, "cache_read_tokens": 1}),
    ("one of two models", TWO["usage"]["iterations"][1], "anthropic", None,  # type: ignore[index]
     {"model": "small", "input_tokens": 5, "output_tokens": 7}),
    ("the SDK's names of Gemini", {"model_version": "g", "usage_metadata": {"prompt_token_count": 9, "tool_use_prompt_token_count": 4,
     "thoughts_token_count": 3, "candidates_token_count": 2, "prompt_tokens_details": [{"modality": "AUDIO", "token_count": 6}]}},
     None, None, {"model": "g", "input_tokens": 13, "output_tokens": 5, "reasoning_tokens": 3, "input_audio_tokens": 6}),
    ("a Gemini stream", [{"usageMetadata": {"promptTokenCount": 9}, "responseId": "r"},
     {"usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 5}, "responseId": "r"}], None, None,
     {"input_tokens": 9, "output_tokens": 5}),
    ("a Bedrock stream", [{"messageStop": {}}, {"metadata": {"usage": {"inputTokens": 3, "outputTokens": 4,
     "cacheWriteInputTokens": 10, "cacheDetails": [{"ttl": "1h", "inputTokens": 6}, {"ttl": "5m", "inputTokens": 4}]}}}], None, None,
     {"input_tokens": 13, "output_tokens": 4, "cache_write_tokens": 10, "cache_write_1h_tokens": 6}),
    ("chunks that all tell the usage so far", [{"choices": [{"delta": {}}], "usage": CHAT}, {"choices": [{"text": "a"}], "usage": CHAT}],
     "openai_chat", None, {"input_tokens": 100, "output_tokens": 20}),
    ("a Gemini stream without ids", [{"candidates": [], "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": n}}
     for n in (2, 5)], None, None, {"input_tokens": 9, "output_tokens": 5}),
    ("counts that another API knows, which change nothing", {**CHAT, "total_time": 3, "queue_time": 1}, "openai_chat", None,
     {"input_tokens": 100, "output_tokens": 20, "unread": {"queue_time": 1, "total_time": 3}}),
    ("metrics of InvokeModel", {"amazon-bedrock-invocationMetrics": {"inputTokenCount": 3, "outputTokenCount": 4, "invocationLatency": 9}},
     "bedrock_invoke", None, {"input_tokens": 3, "output_tokens": 4}),
    ("DeepSeek says its cache twice", {**CHAT, "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36,
     "prompt_tokens_details": {"cached_tokens": 64}}, None, None, {"input_tokens": 100, "output_tokens": 20, "cache_read_tokens": 64}),
    ("Groq's stream", [{"id": "g", "usage": None}, {"id": "g", "x_groq": {"usage": CHAT}}], "groq", None,
     {"input_tokens": 100, "output_tokens": 20}),
    ("audio of Mistral", {**CHAT, "prompt_audio_seconds": 12}, "mistral", None,
     {"input_tokens": 100, "output_tokens": 20, "audio_seconds": 12}),
    ("rerank", {"meta": {"billed_units": {"search_units": 1}}}, "cohere", None, {"search_queries": 1}),
    ("what nobody knows is unread", {**CHAT, "deep": {"er": [{"a": 2}, {"a": 3}], "text": "9", "no": 0, "less": -1}}, "openai", None,
     {"input_tokens": 100, "output_tokens": 20, "unread": {"deep.er[].a": 5}}),
    ("a modality that nobody knows", {"promptTokenCount": 9, "promptTokensDetails": [{"modality": "SMELL", "tokenCount": 4}]}, None, None,
     {"input_tokens": 9, "unread": {"promptTokensDetails[SMELL].tokenCount": 4}}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "api", "model", "usage"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_reads(
    body: Any, api: str | None, model: str | None, usage: dict[str, Any], in_sql: Callable[..., Said]
) -> None:
    assert in_python(body, api, model) == usage
    assert in_sql(body, api, model) == usage
    assert read(body, api, model).to_usage() == usage


# What it shows, body, api, what the message says, what the hint says.
REFUSED: list[tuple[str, Any, str | None, str, str]] = [
    ("no object", 3, None, "not number", "what the provider returned"),
    ("null", None, None, "not null", "what the provider returned"),
    ("no usage", {"data": [], "id": "x"}, None, "it has data, id", "docs/usage.md"),
    ("an answer without its usage", {"choices": [], "id": "x"}, "openai", "the body has no usage of openai", "include_usage"),
    ("nothing", {}, None, "it has nothing", "docs/usage.md"),
    ("a text", "{}", None, "no usage of a known API", ""),
    ("a text for a number", {**CHAT, "prompt_tokens": "100"}, None, "prompt_tokens must be a number, not string", "quote no numbers"),
    ("an object for a number", {**CHAT, "prompt_tokens": {"a": 1}}, "openai", "prompt_tokens must be a number, not object", "as it is"),
    ("a truth for a number", {**CHAT, "prompt_tokens": True}, None, "prompt_tokens must be a number, not boolean", "as it is"),
    ("a fraction", {**CHAT, "prompt_tokens": Decimal("1.5")}, None, "prompt_tokens must be whole, not 1.5", "as it is"),
    ("below zero", {**CHAT, "completion_tokens": -1}, None, "completion_tokens must not be negative: -1", "as it is"),
    ("too many", {**CHAT, "completion_tokens": 10**15}, None, "completion_tokens must be below 10^15: 1000000000000000", "as it is"),
    ("too many together", {**CLAUDE, "input_tokens": 10**15 - 1, "cache_read_input_tokens": 9}, "anthropic",
     "input_tokens must be below 10^15", "as it is"),
    ("two ways", THOUGHT, None, "openai_chat and xai_chat read this body differently", "api 'openai_chat' or 'xai_chat'"),
    ("an unknown API", CHAT, "opena", "unknown API 'opena'", "did you mean openai?"),
    ("an API like no other", CHAT, "§", "unknown API '§'", "Use one of: anthropic, anthropic_messages, aws,"),
    ("another API", CHAT, "anthropic", "no usage of anthropic", "that of openai_chat"),
    ("Claude at Bedrock", {"usage": {**CLAUDE, "cache_creation": {"ephemeral_5m_input_tokens": 3}}}, "bedrock", "no usage of bedrock",
     "that of anthropic_messages"),
    ("a stream without usage", [{"id": "a", "choices": []}, {"id": "a", "usage": None}], "openai", "among the 2 events", "include_usage"),
    ("no events", [], None, "among the 0 events", "include_usage"),
    ("a chunk", {"choices": [], "usage": None}, None, "usage is null", "include_usage"),
    ("a stream cut", [START, {"type": "ping"}], None, "it has message_start, but no message_delta", "charge what you know"),
    ("the beginning alone", START, "anthropic", "it has message_start, but no message_delta", "charge what you know"),
    ("two models", TWO, None, "2 models in one body: big, small", "Charge each entry of iterations as a body of its own"),
    ("two models, one not named", TWO["usage"], None, "(not named), small", "with its model"),
    ("two models of Groq", {"usage": CHAT, "usage_breakdown": {"models": [{"model": "a"}, {"model": "b"}]}}, "groq",
     "2 models in one body: a, b", "usage_breakdown.models"),
    ("two answers", [{"id": "a", "usage": CHAT}, {"id": "b", "usage": CHAT}], None, "2 answers in one body", "Charge each answer"),
    ("what was heard, and the answer", [
      {"type": "conversation.item.input_audio_transcription.completed", "item_id": "a", "usage": {"input_tokens": 13, "output_tokens": 9}},
      {"type": "response.done", "response": {"id": "b", "usage": {"input_tokens": 132, "output_tokens": 121}}}], "openai_realtime",
     "2 answers in one body", "Charge each answer"),
    ("answers of two models", [{"model": "a", "type": "x", "usage": CHAT}, {"model": "b", "usage": CHAT}], None,
     "2 models in one body: a, b", "Charge each answer"),
    ("two embeddings without ids", [{"object": "list", "model": "e", "usage": {"prompt_tokens": n, "total_tokens": n}} for n in (8, 5)],
     None, "2 answers in one body", "Charge each answer"),
    ("two answers of Converse", [{"output": {"message": {}}, "stopReason": "end_turn", "usage": {"inputTokens": n, "outputTokens": n}}
     for n in (8, 5)], "bedrock", "2 answers in one body", "Charge each answer"),
    ("two chats, one without its id", [{"id": "a", "choices": [{"message": {}}], "usage": CHAT}, {"choices": [{"message": {}}], "usage": CHAT}],
     None, "2 answers in one body", "Charge each answer"),
    ("Anthropic's by the name of OpenAI", {"usage": {**CLAUDE, "cache_read_input_tokens": 100}}, "openai", "no usage of openai",
     "It looks like that of anthropic_messages"),
    ("a model that is none", {"model": 5, "usage": CHAT}, None, "model must be a text, not number", "Name the model"),
    ("a model too long", {"model": "m" * 256, "usage": CHAT}, None, "more than 255", "Name the model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "api", "message", "hint"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refuses(body: Any, api: str | None, message: str, hint: str, in_sql: Callable[..., Said]) -> None:
    said = in_python(body, api)
    assert isinstance(said, tuple)
    assert message in said[0]
    assert hint in (said[1] or "")
    if not isinstance(body, str):
        assert in_sql(body, api) == said


def test_python_refuses_what_json_cannot_say() -> None:
    for bad, said in ((10.0, "float"), (1.5, "float"), (float("nan"), "NaN"), (Decimal("NaN"), "NaN"), (b"1", "bytes")):
        with pytest.raises(InvalidArgumentError, match=rf"prompt_tokens .*{said}"):
            read({**CHAT, "prompt_tokens": bad})
    for text in ("{", '{"prompt_tokens": NaN}', b"\xff", "[" * 10_000):
        with pytest.raises(InvalidArgumentError, match="text that is no JSON"):
            read(text)


def test_floats_that_are_no_counts_are_what_they_were_written_as() -> None:
    assert read({**CHAT, "cost": 0.00019199999999999998}).provider_cost == Decimal("0.00019199999999999998")
    assert read({"seconds": 8.5}).audio_seconds == Decimal("8.5")
    assert read({**CHAT, "queue_time": 0.25}) == read(CHAT)
    assert read({"usage": {"billed_units": {"input_tokens": 7.0}}}).input_tokens == 7


def test_objects_are_opened() -> None:
    @dataclasses.dataclass
    class Part:
        prompt_tokens: int = 100
        completion_tokens: int = 20

    class Answer:
        def to_dict(self) -> dict[str, Any]:
            return {"model": "m", "usage": Part()}

    assert read(Answer()) == read(json.dumps({"model": "m", "usage": CHAT})) == read({"model": "m", "usage": CHAT})


def test_cached_input_beside(in_sql: Callable[..., Said]) -> None:
    body = {**CLAUDE, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 50}
    counts = {"output_tokens": 7, "cache_read_tokens": 100, "cache_write_tokens": 50}
    assert (
        in_python(body, "anthropic", None, True)
        == in_sql(body, "anthropic", None, True)
        == {**counts, "input_tokens": 5}
    )
    broken = {**CHAT, "prompt_tokens_details": {"cached_tokens": 101}}
    assert in_python(broken, "openai", None, True) == in_sql(broken, "openai", None, True)


def test_the_client_asks(conn: Connection) -> None:
    manager = CreditManager(conn)
    assert manager.read_usage({"model": "m", "usage": {**CHAT, "cost": 0.1}}, "openrouter", "n") == {
        "model": "n",
        "input_tokens": 100,
        "output_tokens": 20,
        "provider_cost": Decimal("0.1"),
    }
    assert manager.read_usage([START, DELTA])["output_tokens"] == 9
    with pytest.raises(InvalidArgumentError, match="did you mean openai"):
        manager.read_usage(CHAT, api="opena")


def test_names_of_the_table() -> None:
    for name, api in table.expanded()["apis"].items():
        targets = {target for count in api["counts"] for target in count["to"]}
        assert targets <= {*KNOWN_COUNTS, "provider_cost"} - {"requests", "tool_calls"}, name
        assert not {*api["counted"]} & {*api["unread"]}, name
    assert table.expanded()["names"]["azure"] == [
        "openai_chat",
        "openai_responses",
        "openai_embeddings",
        "openai_audio",
    ]


def mutated(body: Any, chance: random.Random, words: list[str]) -> Any:
    """The body with some of it changed, moved, doubled or gone."""
    if chance.random() < 0.02:
        odd: tuple[Any, ...] = (
            None,
            True,
            "7",
            -1,
            10**15,
            Decimal("0.5"),
            [],
            {},
            [3],
            {"type": "compaction", **CLAUDE},
            10**20,
            "",
            12,
        )
        return chance.choice(odd)
    if isinstance(body, dict):
        items = [(key, mutated(value, chance, words)) for key, value in body.items() if chance.random() > 0.04]
        changed = {chance.choice(words) if chance.random() < 0.04 else key: value for key, value in items}
        if chance.random() < 0.1:
            changed[chance.choice(words)] = chance.choice((chance.randrange(2000), changed.copy(), [changed.copy()]))
        return changed
    if isinstance(body, list):
        changed_list = [mutated(value, chance, words) for value in body if chance.random() > 0.04]
        return changed_list + changed_list[: chance.random() < 0.1]
    return chance.randrange(5000) if isinstance(body, int) and chance.random() < 0.5 else body


def test_random_bodies_are_read_or_refused_alike(conn: Connection) -> None:
    chance = random.Random(5)
    words = sorted(
        {word for api in table.expanded()["apis"].values() for path in api["counted"] for word in path.split(".")}
        | {"usage", "model", "id", "type", "message", "iterations", "usageMetadata", "meta", "billed_units", "§", "a.b"}
    )
    seeds: list[Any] = [entry["body"] for entry in bodies(SAMPLE)]
    seeds += [case[1] for case in READ] + [case[1] for case in REFUSED if not isinstance(case[1], str)]
    names: list[str | None] = [*[None] * 40, *table.expanded()["names"], "mistrall"]
    asked: list[tuple[Any, ...]] = []
    for _ in range(2000):
        body = mutated(chance.choice(seeds), chance, words)
        if isinstance(body, str):
            continue
        asked.append((body, chance.choice(names), chance.choice((None, None, "m", "")), chance.random() < 0.2))
    conn.execute(
        """
        create function pg_temp.said(p_body jsonb, p_api text, p_model text, p_beside boolean) returns text
        language plpgsql as $$
        declare
          v_message text;
          v_hint text;
        begin
          return case when p_beside then ducto_private.without_cached(r.usage) else r.usage end::text
            from ducto_private.read_body(p_body, p_api, p_model) as r (usage);
        exception when invalid_parameter_value then
          get stacked diagnostics v_message = message_text, v_hint = pg_exception_hint;
          return jsonb_build_array(v_message, v_hint)::text;
        end
        $$
        """
    )
    told = Counter[str]()
    with conn.cursor() as cursor:
        cursor.executemany(
            "select pg_temp.said(%s::jsonb, %s, %s, %s)",
            [(exactjson.dumps(body), *rest) for body, *rest in asked],
            returning=True,
        )
        for body, *rest in asked:
            row = cursor.fetchone()
            cursor.nextset()
            assert row
            answer = exactjson.loads(row[0])
            said = in_python(body, *rest)
            assert (tuple(answer) if isinstance(answer, list) else answer) == said, (body, rest)
            told["read" if isinstance(said, dict) else said[0][:12]] += 1
    assert told["read"] > 500
    assert len(told) > 12, told


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "usage.md").read_text("utf-8")
    for name in table.source()["apis"]:
        section = page.partition(f"### `{name}`\n")[2].partition("\n### ")[0]
        api = table._written(name)
        rows = [
            f"| {' or '.join(f'`{one}`' for one in fields.split('|'))} | {', '.join(f'`{to}`' for to in names.split())} |"
            for fields, names in api["counts"].items()
        ]
        assert [line for line in section.splitlines() if line.startswith("| `")] == rows, name
        assert all(f"`{path}`" in section for path in api.get("unread", [])), name

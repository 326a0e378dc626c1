"""What providers returned, with what a third party reads in it and takes for it.

The bodies are test data of pydantic/genai-prices (MIT licence): a sample in `usage/data/`, and all of them where the
machine has the collection.
"""

from pathlib import Path
from typing import Any

from places import ROOT, SHARED

from ducto_pg import exactjson

SAMPLE = ROOT / "tests" / "usage" / "data" / "provider_usage.json"
ALL = SHARED / "data" / "provider_usage_priced.json"

# Our APIs in the words of the third party.
THEIRS = {
    "anthropic_messages": "anthropic:default",
    "bedrock_converse": "aws:default",
    "cohere_billed": "cohere:default",
    "cohere_tokens": "cohere:tokens",
    "deepseek_chat": "deepseek:chat",
    "gemini_content": "google:default",
    "groq_chat": "groq:default",
    "mistral_chat": "mistral:default",
    "openai_chat": "openai:chat",
    "openai_embeddings": "openai:embeddings",
    "openai_responses": "openai:responses",
    "openrouter_chat": "openrouter:chat",
    "openrouter_responses": "openai:responses",
}


def bodies(collection: Path) -> list[dict[str, Any]]:
    listed = exactjson.loads(collection.read_text("utf-8"))
    return listed["bodies"] if isinstance(listed, dict) else listed  # type: ignore[no-any-return]


def own_api(body: dict[str, Any]) -> str:
    """Which API a body of the collection came from, by what only that one says."""
    if "usageMetadata" in body:
        return "gemini_content"
    if "meta" in body:
        return "cohere_billed"
    usage = body["usage"]
    if {"cost", "input_tokens"} <= usage.keys():
        return "openrouter_responses"
    marks = {
        "billed_units": "cohere_billed",
        "cost": "openrouter_chat",
        "inputTokens": "bedrock_converse",
        "input_tokens_details": "openai_responses",
        "input_tokens": "anthropic_messages",
        "num_cached_tokens": "mistral_chat",
        "prompt_cache_hit_tokens": "deepseek_chat",
        "queue_time": "groq_chat",
        "completion_tokens": "openai_chat",
        "prompt_tokens": "openai_embeddings",
    }
    return next(api for mark, api in marks.items() if mark in usage)


def their_name(body: dict[str, Any]) -> str:
    """What the third party calls that API."""
    return "cohere:embeddings" if "meta" in body else THEIRS[own_api(body)]


def they_read_it_so(reading: dict[str, Any], name: str) -> bool:
    """Whether a reading of the collection is by that API."""
    return name in [f"{one['provider_id']}:{one['api_flavor']}" for one in reading["extractors"]]

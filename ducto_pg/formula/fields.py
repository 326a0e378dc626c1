"""The usage fields that every config knows, and which of them are parts of others."""

from collections.abc import Iterable, Mapping

SEED_COUNTS = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "tool_calls",
    "search_queries",
    "search_results",
    "web_search_calls",
    "code_exec_calls",
)
FURTHER_COUNTS = (
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "input_audio_tokens",
    "output_audio_tokens",
    "cache_audio_read_tokens",
    "input_image_tokens",
    "output_image_tokens",
    "input_video_tokens",
    "audio_seconds",
    "characters",
    "images",
    "requests",
)
"""Known without being declared; a config may declare one among its metrics to give it a default other than 0."""

KNOWN_COUNTS = SEED_COUNTS + FURTHER_COUNTS

WHOLES: Mapping[str, tuple[str, ...]] = {
    "cache_read_tokens": ("input_tokens",),
    "cache_write_tokens": ("input_tokens",),
    "cache_write_1h_tokens": ("cache_write_tokens",),
    "input_audio_tokens": ("input_tokens",),
    "input_image_tokens": ("input_tokens",),
    "input_video_tokens": ("input_tokens",),
    "cache_audio_read_tokens": ("cache_read_tokens", "input_audio_tokens"),
    "reasoning_tokens": ("output_tokens",),
    "output_audio_tokens": ("output_tokens",),
    "output_image_tokens": ("output_tokens",),
}
"""Each part with the counts that it is contained in."""

_BESIDE: Mapping[str, tuple[str, ...]] = {
    "cache_read_tokens": (),
    "cache_write_tokens": (),
    "cache_audio_read_tokens": ("cache_read_tokens",),
}


def wholes(name: str, cached: str) -> tuple[str, ...]:
    """What a count is a part of. Where cached input is counted `beside` the input it is no part of any input."""
    found = WHOLES.get(name, ())
    return _BESIDE.get(name, found) if cached == "beside" else found


def limits(cached: str) -> list[tuple[str, str]]:
    """Each part and the whole that it cannot be above; what two parts make together is written `a + b`."""
    pairs = [(part, whole) for part in WHOLES for whole in wholes(part, cached)]
    together = [("cache_read_tokens + cache_write_tokens", "input_tokens")]
    return pairs + (together if cached == "inside" else [])


def covered(names: Iterable[str], cached: str) -> frozenset[str]:
    """These counts with all their parts, and parts of parts: what a price that names the whole charges."""
    found = set(names)
    while more := {part for part in WHOLES if part not in found and found.intersection(wholes(part, cached))}:
        found |= more
    return frozenset(found)

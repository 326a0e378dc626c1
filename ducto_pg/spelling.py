"""The nearest known name to a misspelt one. The database answers alike (`ducto_private.nearest`, `did_you_mean`)."""

from collections.abc import Iterable

_PROVIDERS_WORDS = {
    "prompt": "input",
    "completion": "output",
    "candidates": "output",
    "reasoning": "output",
    "thoughts": "output",
    "cached": "cacheread",
    "creation": "write",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like a misspelt one (`inputTokens` -> `input_tokens`), or None.

    At least half of their letters and pairs of letters are the same, once what providers call a kind of token has our
    word for it (`promptTokenCount` -> `input_tokens`).
    """
    wanted = _letters(name)
    best, score = None, 0
    for candidate in sorted(known):
        letters = _letters(candidate)
        shared, total = len(wanted & letters), len(wanted) + len(letters)
        if 4 * shared >= max(total, 1) and 1_000_000 * shared // total > score:
            best, score = candidate, 1_000_000 * shared // total
    return best


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint that names the nearest known name, or another where none is near."""
    suggestion = nearest(name, known)
    return f"did you mean {suggestion}?" if suggestion else otherwise


def _letters(name: str) -> set[str]:
    plain = name.lower().replace("_", "").replace("-", "")
    for word, ours in _PROVIDERS_WORDS.items():
        plain = plain.replace(word, ours)
    return {plain[start : start + size] for start in range(len(plain)) for size in (1, 2)}

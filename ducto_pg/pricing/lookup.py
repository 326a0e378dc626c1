"""Which key of a config serves the name of a model. The database answers alike (`ducto_private.find_price`)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

DEFAULT = "_default"
NO_MODEL = ("", "none")

SEPARATORS = "-@:/_"
# Dates and revisions, as providers append them to the name of a model. One may begin another, so each is tried by
# itself: as one pattern they would take a time exponential in the length of an unlucky name.
_DATED = [
    re.compile(pattern)
    for pattern in (
        "[0-9]{4}-[0-9]{2}-[0-9]{2}",
        "[0-9]{8}",
        "[0-9]{6}",
        "[0-9]{4}",
        "[0-9]{3}",
        "[0-9]{2}-[0-9]{4}",
        "[0-9]{2}-[0-9]{2}",
        "v[0-9]+:[0-9]+",
        "v[0-9]+",
        "latest",
    )
]
LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def allows_rest(match: str, name: str, start: int) -> bool:
    """Whether a config's match allows the rest of a name, after a key: dates and revisions, anything after a
    separator, or nothing."""
    if match == "prefix":
        return name[start : start + 1] in tuple(SEPARATORS)
    ends = {start}
    for place in range(start, len(name) if match == "dated" else start):
        if place in ends and name[place] in SEPARATORS:
            ends.update(found.end() for item in _DATED if (found := item.match(name, place + 1)))
    return start < len(name) in ends


@dataclass(frozen=True)
class Lookup:
    """The rule of a config: its `match` and its `aliases`."""

    match: str
    aliases: Mapping[str, str]

    def find(self, name: str, keys: Collection[str]) -> str | None:
        """The key that serves a name: itself, else what an alias says, else the longest whose rest `match` allows.

        `_default` serves no other name.
        """
        if name in keys:
            return name
        if self.aliases and (other := self._by_alias(name, keys)) and other != DEFAULT:
            return other
        for end in range(len(name) - 1, 0, -1):
            if (key := name[:end]) in keys and key != DEFAULT and allows_rest(self.match, name, end):
                return key
        return None

    def _by_alias(self, name: str, keys: Collection[str]) -> str | None:
        """What the longest alias that fits says; the rest of the name, where it says `*`, is looked up once more."""
        plain = name.translate(LOWER)
        for alias in sorted(self.aliases, key=lambda alias: (-len(alias.lstrip("*")), alias)):
            target = self.aliases[alias]
            rest = self._rest(plain, alias.translate(LOWER), whole=target != "*")
            if rest is not None and target == "*":
                return self.find(name[rest:], keys)
            if rest is not None:
                return Lookup(self.match, {}).find(target, keys)
        return None

    def _rest(self, name: str, alias: str, *, whole: bool) -> int | None:
        """Where the rest of the name begins, after the alias; None where the alias does not fit."""
        text = alias.removeprefix("*")
        start = name.find(text)
        while start >= 0 and (start == 0 or alias.startswith("*")):
            end = start + len(text)
            if (end == len(name) or allows_rest(self.match, name, end)) if whole else end < len(name):
                return end
            start = name.find(text, start + 1)
        return None

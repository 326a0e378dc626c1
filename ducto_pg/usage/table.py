"""The table of fields that SQL and Python share: what each API calls a count, and which counts of ours that is.

For all APIs `fields.json` holds what lies next to the usage part and counts too (`beside`), which of our counts are
not whole (`decimals`: how many are kept) and what is no count (`no_count`); and for each API, named after its provider
and what it does:

- `usage`: where the usage part lies in a whole answer or event; `model`: where the model's name lies besides `model`.
- `needs`: the fields, all of a line, by which such a usage is known.
- `counts`: a field and the counts of ours that it is added to. `a|b` is one count under several names, of which the
  greatest is taken, `a+b` a sum, `list[AUDIO].n` the `n` of the elements of a list whose modality, ttl or type is
  AUDIO. `times`: what a field's number is multiplied by.
- `no_count`: known numbers that are no counts or are held in others. `unread`: known counts that we have no name for.
- `total`: the field that is the sum of all input and output. `stream`: the type of the event that a stream begins
  with, and of the one without which it was cut. `parts`: a list of usages of several models, or of one, of which some
  types are not in the whole.
- `like`: the API whose entries these change and add to; null takes one away. `spelling`: written in camel case, and
  understood in snake case too. `only_by_name`: not meant unless asked for. `float_counts`: its SDK has floats for
  whole counts.

`expanded()` is the same with all this worked out, as both interpreters take it.
"""

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def source() -> dict[str, Any]:
    """`fields.json` as it is written."""
    table: dict[str, Any] = json.loads(files("ducto_pg.usage").joinpath("fields.json").read_text("utf-8"))
    return table


@cache
def expanded() -> dict[str, Any]:
    """`names`: each API, provider and alias with the APIs that it means. `apis`: each API as it is read. `every`: those
    that are tried where none is named, in this order."""
    apis = {name: _expand(name) for name in source()["apis"]}
    names: dict[str, list[str]] = {name: [name] for name in apis}
    every = [name for name in apis if not source()["apis"][name].get("only_by_name")]
    for name in every:
        names.setdefault(name.partition("_")[0], []).append(name)
    names |= {alias: names[name] for alias, name in source()["aliases"].items()}
    return {"names": names, "every": every, "apis": apis}


def as_json() -> str:
    """`expanded()` as text, a line for each API."""
    return json.dumps(expanded()).replace('}, "', '},\n"')


def _written(name: str) -> dict[str, Any]:
    """An API with what it takes over from the one that it is like."""
    own: dict[str, Any] = source()["apis"][name]
    if "like" not in own:
        return own
    base = _written(own["like"])
    counts = {field: names for field, names in (base["counts"] | own.get("counts", {})).items() if names}
    lists = {key: [*base.get(key, []), *own.get(key, [])] for key in ("no_count", "unread")}
    return base | own | lists | {"counts": counts}


def _expand(name: str) -> dict[str, Any]:
    api = _written(name)
    spelled = _both if "spelling" in api else lambda names: names
    counts = [
        {"of": [alternative.split("+") for alternative in spelled(fields.split("|"))], "to": names.split()}
        for fields, names in api["counts"].items()
    ]
    decimals = source()["decimals"]
    targets = {path: {*count["to"]} for count in counts for alternative in count["of"] for path in alternative}
    total = spelled([api["total"]] if "total" in api else [])
    held = {*source()["no_count"], *spelled(api.get("no_count", [])), *total}
    places = [*spelled(api["usage"]), *(path for line in spelled(api["needs"]) for path in line.split())]
    return {
        "keys": sorted({path.partition(".")[0] for path in places}),
        "usage": spelled(api["usage"]),
        "beside": source()["beside"],
        "model": ["model", *spelled(api.get("model", []))],
        "needs": [line.split() for line in spelled(api["needs"])],
        "total": total,
        "counts": counts,
        "times": api.get("times", {}),
        "counted": sorted(targets),
        "fractions": sorted(path for path, names in targets.items() if names & {*decimals}),
        "decimals": decimals,
        "no_count": sorted(held - {*targets}),
        "unread": sorted(api.get("unread", [])),
        "stream": api.get("stream"),
        "parts": api.get("parts"),
        "float_counts": api.get("float_counts", False),
    }


def _both(names: list[str]) -> list[str]:
    """Names in camel case, and the same in snake case."""
    snake = [re.sub(r"(?<=[a-z0-9])[A-Z]", lambda letter: f"_{letter[0].lower()}", name) for name in names]
    return list(dict.fromkeys([*names, *snake]))

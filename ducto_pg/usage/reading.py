"""Reads a provider's usage by the table of fields. `sql/25_read_usage.sql` does the same, step for step: what one of
them answers or refuses, the other does in the same words.

A body is taken as the list of its events (one, where it is no stream). For each API, `_find` merges what they say of
the usage; of the APIs that know such a usage those stand that leave the fewest numbers unknown, and whose sum is the
body's own total where that of any is. `_read` adds the counts up.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_CEILING, Context, Decimal
from enum import Enum
from typing import Any, NoReturn

from ducto_pg import exactjson
from ducto_pg.errors import InvalidArgumentError
from ducto_pg.models import MAX_USAGE, UsageMetrics
from ducto_pg.spelling import did_you_mean
from ducto_pg.usage import table

_EXACT = Context(prec=200_000)
_IDS = ("id", "responseId", "response_id", "item_id")
_STREAM = (
    "The stream was cut before its usage, or was not asked for it: OpenAI's needs stream_options "
    '{"include_usage": true}. Pass all of its events; where there is no more, charge what you know yourself.'
)
_BODY = "Pass what the provider returned, or its usage part; docs/usage.md lists the fields of each API."
_AS_IT_IS = "Pass what the provider returned as it is"


def read(body: Any, api: str | None = None, model: str | None = None) -> UsageMetrics:
    """The usage that a provider's answer tells, for `deduct`, `reserve` and `calculate_cost`.

    `body` is a whole answer or its usage part, as a dict, JSON text or an object of the provider's SDK, or the list of
    a stream's events. `api` is the provider (`openai`) or one of its APIs (`openai_chat`); without it, a body that two
    APIs read differently is an error that names both. `model` wins over the body's. A count that the table of fields
    does not know is in `unread`. Raises InvalidArgumentError for what is no usage.
    """
    return UsageMetrics.model_validate(read_body(body, api, model))


def read_body(
    body: Any, api: str | None = None, model: str | None = None, cached_beside: bool = False
) -> dict[str, Any]:
    """`read` as a plain dict; `cached_beside` leaves cached input out of `input_tokens`."""
    body = plain(body)
    events = body if isinstance(body, list) else [body]
    if not isinstance(body, dict | list):
        _refuse(f"the body must be an object or a list of events, not {_kind(body)}", _BODY)
    fields = table.expanded()
    if api is not None and api not in fields["names"]:
        one_of = f"Use one of: {', '.join(sorted(fields['names']))}."
        _refuse(f"unknown API '{api[:100]}'", did_you_mean(api[:100], fields["names"], one_of))
    wanted = fields["every"] if api is None else fields["names"][api]
    found = {name: one for name in wanted if (one := _find(events, fields["apis"][name]))}
    if not found:
        _no_usage(body, events, api)
    least = min(one.unknown for one in found.values())
    readings = {name: _read(one, model) for name, one in found.items() if one.unknown == least}
    agreeing = {name: usage for name, usage in readings.items() if _adds_up(usage, found[name])}
    readings = agreeing or readings
    first, usage = next(iter(readings.items()))
    for other, reading in readings.items():
        if reading != usage:
            _refuse(
                f"{first} and {other} read this body differently",
                f"Say which API returned it: api '{first}' or '{other}'.",
            )
    # Another API may know more of it, and count otherwise.
    if api is not None and least and (likeliest := _likeliest(events)):
        _, other = likeliest
        if other.unknown < least and _counts(_read(other, model)) != _counts(usage):
            _no_usage(body, events, api)
    if cached_beside:
        cached = usage.get("cache_read_tokens", 0) + usage.get("cache_write_tokens", 0)
        usage["input_tokens"] = max(0, usage.get("input_tokens", 0) - cached)
    return {name: value for name, value in usage.items() if value}


def plain(value: Any) -> Any:
    """A body as dicts, lists and scalars: SDK objects, dataclasses and JSON text are opened."""
    if isinstance(value, str | bytes | bytearray):
        try:
            value = exactjson.loads(bytes(value) if isinstance(value, bytearray) else value)
        except (ValueError, RecursionError) as error:
            _refuse("the body is a text that is no JSON", f"Pass the answer's JSON, or the parsed object: {error}.")
    try:
        return _open(value)
    except RecursionError:
        _refuse("the body is nested too deeply", _BODY)


def _open(value: Any) -> Any:
    if isinstance(value, Enum):
        return _open(value.value)
    if value is None or isinstance(value, str | int | float | Decimal):
        return value
    if isinstance(value, Mapping):
        return {key: _open(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_open(item) for item in value]
    for method, options in (("model_dump", {"warnings": False}), ("to_dict", {}), ("dict", {})):
        if callable(convert := getattr(value, method, None)) and not isinstance(value, type):
            try:
                return _open(convert(**options))
            except TypeError:
                return _open(convert())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _open(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the events say of the usage, in the words of one API."""

    api: dict[str, Any]
    models: list[Any]
    answers: int
    cut: bool
    parts: list[dict[str, Any]]
    nodes: dict[str, list[Any]]
    unknown: int
    """How many numbers the API does not know."""


def _likeliest(events: list[Any]) -> tuple[str, _Found] | None:
    """The API that knows most of what the events say of a usage; None where none knows any."""
    fields = table.expanded()
    found = [(name, one) for name in fields["every"] if (one := _find(events, fields["apis"][name]))]
    return min(found, key=lambda item: item[1].unknown, default=None)


def _counts(usage: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in usage.items() if name not in ("model", "unread", "provider_cost")}


def _find(events: list[Any], api: dict[str, Any]) -> _Found | None:
    """None where the API does not know it."""
    usage: dict[str, Any] = {}
    models: list[Any] = []
    answers, types = set(), set()
    nameless = whole = 0
    for event in events:
        if not isinstance(event, dict):
            continue
        if isinstance(event.get("type"), str):
            types.add(event["type"])
        place = next((place for place in api["usage"] if isinstance(_at(event, place), dict)), None)
        if place is not None:
            holder, told = _at(event, place.rpartition(".")[0]), _at(event, place)
        elif _is_known(event, api):
            holder, told = event, event
        else:
            continue
        beside = {name: holder[name] for name in api["beside"] if holder.get(name) is not None}
        usage |= {name: value for name, value in (told | beside).items() if value is not None}
        named = [_at(where, path) for where in (holder, event) for path in api["model"]]
        model = next((model for model in named if model not in (None, "")), None)
        if model is not None and model not in models:
            models.append(model)
        ids = [where.get(key) for where in (holder, event) for key in _IDS]
        answer = next((own for own in ids if isinstance(own, str) and own), None)
        answers.add(answer)
        if len(events) > 1 and place is not None and _is_whole_answer(event):
            whole += 1
            nameless += answer is None
    if not _is_known(usage, api):
        return None
    parts: list[dict[str, Any]] = []
    if api["parts"] and isinstance(listed := _at(usage, api["parts"]["at"]), list):
        parts = [part for part in listed if isinstance(part, dict)]
        usage = _without(usage, api["parts"]["at"])
    stream = api["stream"]
    added = [part for part in parts if part.get("type") in api["parts"]["added"]] if parts else []
    nodes: dict[str, list[Any]] = {}
    for path, value in (node for told in (usage, *added) for node in _walk(told)):
        nodes.setdefault(path, []).append(value)
    known = {*api["counted"], *api["no_count"], *api["unread"]}
    return _Found(
        api=api,
        models=models,
        answers=len(answers - {None}) + (nameless if whole == len(events) else 0),
        cut=bool(stream) and stream["begins"] in types and stream["ends"] not in types,
        parts=parts,
        nodes=nodes,
        unknown=sum(_is_number(value) for path, values in nodes.items() if path not in known for value in values),
    )


def _read(found: _Found, model: str | None) -> dict[str, Any]:
    api = found.api
    if found.cut:
        _refuse(
            f"the stream was cut: it has {api['stream']['begins']}, but no {api['stream']['ends']}",
            "The first event tells the input only. Pass all events; where there are no more, "
            "charge what you know yourself.",
        )
    if found.answers > 1:
        _refuse(f"{found.answers} answers in one body", "Charge each answer as a body of its own.")
    for named in (*found.models, *(part.get("model") for part in found.parts)):
        if named is not None:
            _model(named)
    main = found.models[0] if found.models else None
    own = {part.get("model") if part.get("model") not in (None, "") else main for part in found.parts}
    if len(found.models) > 1 or len(own) > 1:
        names = found.models if len(found.models) > 1 else own
        listed = ", ".join(sorted(name or "(not named)" for name in names))
        where = "answer" if len(found.models) > 1 else f"entry of {api['parts']['at']}"
        _refuse(
            f"{len(names)} models in one body: {listed}",
            f"Charge each {where} as a body of its own, with its model, and the calls of the provider's tools once.",
        )
    usage: dict[str, Any] = {"model": _model(model or main)} if model or main is not None else {}
    numbers = {
        path: _number(path, values, api) for path, values in sorted(found.nodes.items()) if path in api["counted"]
    }
    for count in api["counts"]:
        sums = [_sum(numbers.get(path, Decimal(0)) for path in alternative) for alternative in count["of"]]
        for name in count["to"]:
            usage[name] = _EXACT.add(usage.get(name, Decimal(0)), max(sums))
    for name in sorted(usage.keys() - {"model"}):
        if usage[name] >= MAX_USAGE:
            _refuse(f"{name} must be below 10^15: {_digits(usage[name])}", f"{_AS_IT_IS}.")
        usage[name] = _rounded(usage[name], api["decimals"].get(name, 0))
    known = {*api["counted"], *api["no_count"]}
    strange = {
        path: _sum(_decimal(value) for value in values if _is_number(value) and value > 0)
        for path, values in found.nodes.items()
        if path not in known
    }
    usage["unread"] = {
        path: _rounded(min(number, Decimal(MAX_USAGE - 1)), 12) for path, number in strange.items() if number
    }
    return {name: value for name, value in usage.items() if value}


def _adds_up(usage: dict[str, Any], found: _Found) -> bool:
    totals = [found.nodes[path][0] for path in found.api["total"] if path in found.nodes]
    spent = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    return any(_is_number(total) and _decimal(total) == spent for total in totals)


def _number(path: str, values: list[Any], api: dict[str, Any]) -> Decimal:
    fraction = path in api["fractions"]
    for value in sorted(values, key=lambda value: (_kind(value), _digits(value) if _is_number(value) else "")):
        if not _is_number(value):
            _refuse(f"{path} must be a number, not {_kind(value)}", f"{_AS_IT_IS}; quote no numbers.")
        if isinstance(value, float) and not fraction and not (api["float_counts"] and value.is_integer()):
            _refuse(f"{path} is a float, which is not exact: {value!r}", f"{_AS_IT_IS}; counts are whole.")
        number = _decimal(value)
        if number < 0:
            _refuse(f"{path} must not be negative: {_digits(number)}", f"{_AS_IT_IS}.")
        if number >= MAX_USAGE and path not in api["times"]:
            _refuse(f"{path} must be below 10^15: {_digits(number)}", f"{_AS_IT_IS}.")
        if not fraction and number != int(number):
            _refuse(f"{path} must be whole, not {_digits(number)}", f"{_AS_IT_IS}.")
    return _EXACT.multiply(_sum(map(_decimal, values)), Decimal(api["times"].get(path, 1)))


def _model(model: Any) -> str:
    if not isinstance(model, str):
        _refuse(f"model must be a text, not {_kind(model)}", "Name the model that the price list knows.")
    if len(model) > 255:
        _refuse("model has more than 255 characters", "Name the model that the price list knows.")
    return model


def _no_usage(body: Any, events: list[Any], api: str | None) -> NoReturn:
    of = f" of {api}" if api else ""
    if api is not None and (found := _likeliest(events)):
        _refuse(f"the body is no usage of {api}", f"It looks like that of {found[0]}: name that API, or none.")
    if isinstance(body, list):
        _refuse(f"no usage{of} among the {len(events)} events of the body", _STREAM)
    if "usage" in body and body["usage"] is None:
        _refuse(f"the body's usage{of} is null", _STREAM)
    if "choices" in body and "usage" not in body:
        _refuse(f"the body has no usage{of}", _STREAM)
    keys = ", ".join(sorted(body))[:200] or "nothing"
    _refuse(f"the body is no usage{of or ' of a known API'}: it has {keys}", _BODY)


def _walk(told: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every field below an object, and each list and object too, by its path."""
    waiting: list[tuple[str, Any]] = list(told.items())
    while waiting:
        path, value = waiting.pop()
        if value is None:
            continue
        yield path, value
        if isinstance(value, dict):
            waiting += [(f"{path}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{_tag(item)}]", item) for item in value]


def _tag(item: Any) -> str:
    tags = [item.get(key) for key in ("modality", "ttl", "type")] if isinstance(item, dict) else []
    return next((tag for tag in tags if isinstance(tag, str)), "")


def _is_whole_answer(event: dict[str, Any]) -> bool:
    """Whether an event is a whole answer, and no part of a stream."""
    if not event.keys().isdisjoint(("type", "event", "delta", "candidates")):
        return False
    choices = event["choices"] if isinstance(event.get("choices"), list) else [event.get("choices")]
    return "choices" not in event or any(isinstance(choice, dict) and "message" in choice for choice in choices)


def _is_known(usage: Any, api: dict[str, Any]) -> bool:
    return any(all(_at(usage, path) is not None for path in needs) for needs in api["needs"])


def _at(value: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _without(usage: dict[str, Any], path: str) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    inner = {key: _without(usage[key], rest)} if rest else {}
    return {name: value for name, value in usage.items() if name != key} | inner


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return False
    return isinstance(value, int) or Decimal(value).is_finite()


def _decimal(value: Any) -> Decimal:
    """A float is the number that it was written as: its shortest digits."""
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def _digits(value: Any) -> str:
    return format(_decimal(value), "f")[:100]


def _sum(numbers: Iterable[Decimal]) -> Decimal:
    total = Decimal(0)
    for number in numbers:
        total = _EXACT.add(total, number)
    return total


def _rounded(number: Decimal, decimals: int) -> int | Decimal:
    """Up to so many decimals; whole numbers are ints."""
    rounded = number.quantize(Decimal((0, (1,), -decimals)), ROUND_CEILING, _EXACT)
    return int(rounded) if rounded == int(rounded) else Decimal(f"{rounded:f}".rstrip("0"))


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float | Decimal):
        return "number" if _is_number(value) else "NaN or Infinity"
    if isinstance(value, list):
        return "array"
    return "object" if isinstance(value, dict) else type(value).__name__


def _refuse(message: str, hint: str) -> NoReturn:
    raise InvalidArgumentError(message, hint=hint)

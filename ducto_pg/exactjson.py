"""JSON without binary floats: a number with a point or an exponent is a `Decimal`, read and written digit by digit."""

import json
from decimal import Decimal
from typing import Any


def storable(value: str) -> bool:
    """Whether PostgreSQL can hold a text: it has no NUL and no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def loads(text: str | bytes) -> Any:
    """Read JSON; NaN and Infinity, which are not JSON, raise ValueError."""
    return json.loads(text, parse_float=Decimal, parse_constant=_refuse)


def dumps(value: Any) -> str:
    """Write JSON. Decimals keep their digits and their scale; what is not JSON raises ValueError or TypeError."""
    if isinstance(value, Decimal):
        if not value.is_finite():
            _refuse(str(value))
        return format(value, "f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a JSON key must be text, not {key!r}")
    return json.dumps(key, ensure_ascii=False)


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is not a JSON number")

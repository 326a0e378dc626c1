"""JSON without binary floats: a number with a point or an exponent is a `Decimal`, read and written digit by digit."""

import json
import re
from decimal import Decimal
from json.encoder import encode_basestring
from sys import int_info
from typing import Any

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def storable(value: str) -> bool:
    """Whether PostgreSQL can hold a text: it has no NUL and no half of a surrogate pair."""
    return not _UNSTORABLE.search(value)


def loads(text: str | bytes) -> Any:
    """Read JSON; NaN and Infinity, which are not JSON, raise ValueError. A number too long for int() is a Decimal."""
    return json.loads(text, parse_int=_whole, parse_float=Decimal, parse_constant=_refuse)


def dumps(value: Any) -> str:
    """Write JSON. Decimals keep their digits and their scale; what is not JSON raises ValueError or TypeError."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{_key(key)}: {dumps(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join([dumps(item) for item in value]) + "]"
    if isinstance(value, Decimal):
        if not value.is_finite():
            _refuse(str(value))
        return format(value, "f")
    return json.dumps(value, allow_nan=False)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a JSON key must be text, not {key!r}")
    return encode_basestring(key)


def _whole(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < int_info.str_digits_check_threshold else Decimal(digits)


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is not a JSON number")

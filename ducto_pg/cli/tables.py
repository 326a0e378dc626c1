"""Answers on standard output: tables for people, JSON for programs. Times are in UTC."""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from pydantic import BaseModel

from ducto_pg import exactjson
from ducto_pg.models import Answer

Told = Answer | int | Sequence[Answer]

_UNTOLD = ("error", "revision")
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def print_answer(answer: Told, columns: Sequence[str] = ()) -> None:
    """For people: one answer as a line for each attribute, several as a table with a line for each.

    `columns` are those of the table, in order (default: all). What is empty throughout is left out.
    """
    if isinstance(answer, int):
        print(answer)
    elif isinstance(answer, Answer):
        shown = {name: value for name, value in _shown(answer).items() if value not in _EMPTY}
        _print_columns([[name, _text(value)] for name, value in shown.items()])
    elif not answer:
        print("none")
    else:
        rows = [_shown(row) for row in answer]
        names = [name for name in columns or rows[0] if any(row[name] not in _EMPTY for row in rows)]
        _print_columns([names, *([row[name] for name in names] for row in rows)])


def print_json(answer: BaseModel | int | Sequence[BaseModel]) -> None:
    """For programs: an object, an array of objects, or a number; numbers keep every digit."""
    if isinstance(answer, int):
        print(answer)
    else:
        print(exactjson.dumps(_plain(answer) if isinstance(answer, BaseModel) else [_plain(row) for row in answer]))


def _plain(answer: BaseModel) -> dict[str, Any]:
    return {
        name: value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value
        for name, value in answer.model_dump().items()
    }


def _shown(answer: Answer) -> dict[str, Any]:
    """What makes it the kind of answer that it is comes before what it has from its base."""
    told, own = _plain(answer), type(answer).__annotations__
    return {name: told[name] for name in sorted(told, key=lambda name: name not in own) if name not in _UNTOLD}


def _print_columns(table: Sequence[Sequence[Any]]) -> None:
    """Numbers to the right, all else to the left."""
    texts = [[_text(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row, told in zip(table, texts, strict=True):
        cells = (
            text.rjust(width) if isinstance(cell, int | Decimal) else text.ljust(width)
            for cell, text, width in zip(row, told, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


def _text(cell: Any) -> str:
    """What is no text in JSON; what would disturb the terminal as Python writes it."""
    if isinstance(cell, str):
        return cell if cell.isprintable() else repr(cell)
    return "" if cell is None else exactjson.dumps(cell)

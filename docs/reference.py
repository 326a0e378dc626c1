"""Writes docs/reference.md: docs/reference.txt, with what a fresh install says about itself in the place of each `{…}`.

`{20_credits}` becomes the RPCs of that file of sql/, `{answers}` the types of their answers. Signatures, callers, types
and texts are the catalog's; an attribute without a comment of its own is explained by the table above `{answers}`.
"""

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

import ducto_pg
from ducto_pg import servers
from ducto_pg.errors import REFUSALS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference.md"

# Refusals that stand in the text of what a call calls, and that it cannot give.
_TEAM = {"team_not_found", "not_a_member", "member_cap_exceeded"}
_USER = {"account_not_found", "is_a_team"}
_BATCH = {"invalid_argument", "unknown_model", "unknown_job", "unknown_metric", "formula_error", "out_of_range"}
_HOLD = {"reservation_not_found", "reservation_not_active"}
_UNREACHABLE = {
    "reserve": _TEAM | _BATCH | _HOLD,
    "reserve_credits": _TEAM | _BATCH | _HOLD,
    "reserve_team": _USER | _BATCH | _HOLD,
    "reserve_team_credits": _USER | _BATCH | _HOLD,
    "extend_reservation": _USER | _BATCH | {"team_not_found"},
    "deduct": _TEAM | _BATCH,
    "deduct_credits": _TEAM | _BATCH,
    "deduct_fixed": _TEAM | _BATCH | _HOLD,
    "deduct_team": _USER | _BATCH,
    "deduct_team_credits": _USER | _BATCH,
}
_CALLERS = {"call": "`grant_to`", "admin": "`grant_admin_to`", "own": "`authenticated`"}
# In a comment: an interval, a call, an argument, a sum, a name, a 'value'.
_CODE = re.compile(r"\[\w+, \w+\)|\w+\([^()]*\)|\w+ => \w+|\w+(?: [-+=] -?\w+)+|\w+\.\w+|\w*_\w+|'(\w*)'")


def page(conn: psycopg.Connection[Any]) -> str:
    """The page of the database of `conn`, in which setup() has run."""
    text = (ROOT / "docs" / "reference.txt").read_text("utf-8")
    calls = _calls(conn)
    for file in re.findall(r"^\{(\d\w+)\}$", text, re.M):
        source = (ROOT / "sql" / f"{file}.sql").read_text("utf-8")
        names = re.findall(r"^create or replace function ducto\.(\w+)", source, re.M)
        text = text.replace(f"{{{file}}}", "\n\n".join(calls.pop(name) for name in names))
    if calls:
        raise ValueError(f"docs/reference.txt has no place for the file of sql/ that makes {', '.join(calls)}")
    return text.replace("{answers}", _answers(conn, text.split("\n## Answers\n")[1]))


def _calls(conn: psycopg.Connection[Any]) -> dict[str, str]:
    """What is said of each RPC, by its name."""
    rows = conn.execute(
        """
        select p.pronamespace::regnamespace || '.' || p.proname, p.prosrc, pg_get_function_arguments(p.oid),
          pg_get_function_result(p.oid), obj_description(p.oid, 'pg_proc'), ducto_private.audiences(p.proname)
        from pg_proc as p
        where p.pronamespace in ('ducto'::regnamespace, 'ducto_private'::regnamespace)
        """
    ).fetchall()
    bodies = {name: body for name, body, *_ in rows}
    calls = {}
    for full, _, arguments, returns, comment, audiences in rows:
        if not full.startswith("ducto."):
            continue
        name = full.removeprefix("ducto.")
        facts = ["Callers: " + (", ".join(_CALLERS[audience] for audience in audiences) or "the owner") + "."]
        if answer := re.search(r"ducto\.(\w+)", returns):
            facts += [f"Answer: [`{answer[0]}`](reference.md#ducto{answer[1]})."]
        if refusals := _refusals(full, bodies) - _UNREACHABLE.get(name, set()):
            facts += ["Refusals: " + ", ".join(f"`{refusal}`" for refusal in REFUSALS if refusal in refusals) + "."]
        inside = [f"\n  {_short(argument)}" for argument in re.split(r", (?=p_)", arguments) if argument]
        signature = f"{full}({','.join(inside)}{chr(10) if inside else ''}) returns {_short(returns)}"
        said = _wrap(_marked(comment))
        calls[name] = f"### `{name}`\n\n```text\n{signature}\n```\n\n{said}\n\n{_wrap(' '.join(facts))}"
    return calls


def _refusals(name: str, bodies: dict[str, str]) -> set[str]:
    """The refusals that the text of a function names, or of one that it calls."""
    called, waiting = set[str](), [name]
    while waiting:
        called.add(name := waiting.pop())
        waiting += {found for found in re.findall(r"ducto\w*\.\w+(?=\()", bodies[name]) if found in bodies} - called
    quoted = set(re.findall(r"""["'](\w+)["']""", "\n".join(bodies[name] for name in called)))
    return quoted & REFUSALS.keys()


def _answers(conn: psycopg.Connection[Any], table: str) -> str:
    """What is said of each type; `table` explains the attributes that many have."""
    shared = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    types: dict[str, list[tuple[str, str, str | None]]] = {}
    said: dict[str, str] = {}
    for name, comment, *attribute in conn.execute(
        """
        select t.typname, obj_description(t.oid, 'pg_type'), a.attname, format_type(a.atttypid, null),
          col_description(a.attrelid, a.attnum)
        from pg_type as t
        join pg_attribute as a on a.attrelid = t.typrelid
        where t.typnamespace = 'ducto'::regnamespace and t.typtype = 'c' and a.attnum > 0 and not a.attisdropped
        order by t.oid, a.attnum
        """
    ):
        said[name] = _wrap(_marked(comment))
        types.setdefault(name, []).append((attribute[0], _short(attribute[1]), attribute[2]))
    sections = []
    for name, attributes in types.items():
        section = f"### `ducto.{name}`\n\n{said[name]}\n\n"
        if own := [f"| `{it}` | {kind} | {_marked(comment)} |\n" for it, kind, comment in attributes if comment]:
            section += f"| attribute | type | meaning |\n|---|---|---|\n{''.join(own)}\n"
        others = {it: kind for it, kind, comment in attributes if not comment}
        if unknown := others.keys() - shared:
            raise ValueError(f"ducto.{name}: no comment on, and no line of docs/reference.txt for {', '.join(unknown)}")
        listed = ", ".join(f"`{it}` {kind}" for it, kind in others.items())
        sections += [section + _wrap(f"[Also](reference.md#answers): {listed}.")]
    return "\n\n".join(sections)


def _marked(comment: str) -> str:
    """A comment with its names, calls and values as code."""
    return _CODE.sub(lambda found: f"`{found[1] or found[0]}`", comment)


def _short(declaration: str) -> str:
    plain = re.sub(r"::[a-z ]+", "", declaration).replace(" DEFAULT ", " = ").replace("SETOF", "setof")
    return plain.replace("timestamp with time zone", "timestamptz").replace("NULL", "null")


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    name = f"ducto_reference_{os.getpid()}"
    with servers.open_server({"fsync": "off"}) as server, psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        try:
            ducto_pg.setup(server.dsn(name)).or_raise()
            with psycopg.connect(server.dsn(name)) as conn:
                PAGE.write_text(page(conn), "utf-8")
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


if __name__ == "__main__":
    main()

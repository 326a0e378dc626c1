"""A price list's YAML file: what an import writes there, beside what its owner wrote, comments included."""

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from ducto_pg import exactjson
from ducto_pg.errors import ConfigError, DuctoError
from ducto_pg.formula.arithmetic import trim_scale
from ducto_pg.models import PricingConfigData
from ducto_pg.pricing.catalog import PriceList
from ducto_pg.pricing.config import load
from ducto_pg.pricing.lookup import LOWER

if TYPE_CHECKING:
    import yaml

WIDTH = 120
COMMAND = "ducto-pg pricing import"

_FORM = "this file's form (YAML anchors, perhaps) does not let it be updated"
_HEADER = re.compile(rf"^# Made by `{COMMAND}`.*?written by hand\.\n", re.MULTILINE | re.DOTALL)

_PLAIN = re.compile(r"(?!(?:true|false|null)$)[A-Za-z(][^#:{}\[\],&*!|>'\"%@`\n]*(?::[^\s#{}\[\],]+)*", re.IGNORECASE)


def command_of(text: str) -> list[str] | None:
    """The arguments of the import that made a file, as its header names them; None where it has no header."""
    if not (header := _HEADER.search(text)):
        return None
    lines = re.findall(r"^#  +(.*?) ?\\?$", header[0], re.MULTILINE)
    return shlex.split(" ".join(lines))[len(COMMAND.split()) :]


def updated(
    text: str, prices: PriceList, *, section: str, factor: Decimal | None, arguments: Sequence[str], source: str
) -> str:
    """The text of a price list with these prices under `models`, or `costs`, and a header that says what made them.

    An empty text is a new list. Plans, tools, fixed prices, other models, aliases and comments stay as they are.
    Raises DuctoError where the factor would change what others wrote, or the file's form does not let it be updated.
    """
    old = _load(text) if text else None
    new = _HEADER.sub("", text).lstrip("\n") if text else "version: 1\n"
    if old and old.cached == "beside":
        raise DuctoError("this list says cached: beside, and the catalogue counts cached input inside")
    if old is None:
        new = replace(new, "factor", f"{trim_scale(factor or Decimal(1)):f}")
    elif factor is not None and factor != old.factor:
        if command_of(text) is None:
            _check_factor(old, prices)
        new = replace(new, "factor", f"{trim_scale(factor):f}")
    before: Mapping[str, str] = getattr(old, section) if old else {}
    lines = {key: formula(key, line) for key, line in prices.models.items() if before.get(key) != line}
    new = write(new, section, lines)
    metrics = [name for name in prices.metrics if old is None or name not in old.metrics]
    new = write(new, "metrics", dict.fromkeys(metrics, "0"))
    if section == "models":
        known = {alias.translate(LOWER) for alias in (old.aliases if old else {})}
        fresh = {alias: key for alias, key in prices.aliases.items() if alias.translate(LOWER) not in known}
        new = write(new, "aliases", {alias: scalar(key) for alias, key in fresh.items()})
    now = _load(new)
    changes = {name: getattr(now, name) for name in ("factor", "metrics", "aliases")}
    if now != (old or now).model_copy(update={**changes, section: {**before, **prices.models}}):
        raise DuctoError(_FORM)
    return _header(arguments, source, section, prices.disputes if section == "models" else []) + "\n" + new


def _header(arguments: Sequence[str], source: str, section: str, disputes: Sequence[str]) -> str:
    words = " ".join([COMMAND, shlex.join(arguments)])
    command = " \\\n".join(_packed(re.split(r" (?=--)", words), "#   ", "#     "))
    money = "`factor` makes them credits" if section == "models" else "only `spend_margin` reads them"
    said = [f"# {line}\n" for dispute in disputes for line in textwrap.wrap(f"- {dispute}.", WIDTH - 2)]
    differ = "".join(["# Names that these providers price differently:\n", *said] if said else [])
    return (
        f"# Made by `{COMMAND}` from {source}:\n#\n{command}\n#\n"
        f"# The `{section}` that it names, their aliases and metrics are the catalogue's, in USD; {money}.\n{differ}"
        "# All else is written by hand.\n"
    )


def _check_factor(old: PricingConfigData, prices: PriceList) -> None:
    overrides = [plan.rate_overrides for plan in (old.plans or {}).values()]
    if any([old.models.keys() - prices.models.keys(), old.tools, old.search, old.cache, *overrides]):
        raise DuctoError(
            "a new factor would change what the formulas written by hand cost: write them in USD and say the factor in "
            "the file first, or import under costs (--costs)"
        )


def _load(text: str) -> PricingConfigData:
    try:
        return load(text)
    except ConfigError as error:
        raise DuctoError(str(error)) from error


def write(text: str, section: str, entries: Mapping[str, str]) -> str:
    """The file's text with these entries of a section: those that are there get their new value, others come last.

    Values are YAML, as `scalar` and `formula` make them. Raises DuctoError where the section is not written in lines.
    """
    import yaml

    if not entries:
        return text
    root = _compose(text)
    if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
        raise DuctoError("only a YAML file with a line for each key can be updated")
    here = _value(root, section)
    if here is None or (isinstance(here, yaml.ScalarNode) and not here.value):
        head = re.sub(rf"^{section}:[^\n]*\n?", "", text, flags=re.MULTILINE).rstrip("\n")
        lines = (f"  {scalar(key)}: {value}" for key, value in entries.items())
        return "\n".join([*([head, ""] if head else []), f"{section}:", *lines]) + "\n"
    if not isinstance(here, yaml.MappingNode) or here.flow_style or not here.value:
        raise DuctoError(f"{section}: only a section with a line for each key can be updated")
    fresh = [f"{scalar(key)}: {value}" for key, value in entries.items() if _value(here, key) is None]
    if fresh:
        first = here.value[0][0].start_mark
        end = _end(text, here.value[-1][1])
        end = len(text) if (line := text.find("\n", end)) < 0 else line
        text = text[:end] + "".join(f"\n{' ' * first.column}{entry}" for entry in fresh) + text[end:]
    for key, node in reversed(here.value):
        if key.value in entries:
            text = _put(text, node, entries[key.value])
    return text


def replace(text: str, key: str, value: str) -> str:
    """The file's text with a new value of a key that has no section."""
    node = _value(_compose(text), key)
    if node is None:
        place = re.search(r"^version:.*\n", text, re.MULTILINE)
        at = place.end() if place else 0
        return f"{text[:at]}{key}: {value}\n{text[at:]}"
    return _put(text, node, value)


def scalar(text: str) -> str:
    """A text as YAML."""
    return text if _PLAIN.fullmatch(text) and not text.endswith((" ", ":")) else exactjson.dumps(text)


def formula(key: str, text: str) -> str:
    """A formula as YAML, folded where it is long."""
    if len(f"  {scalar(key)}: {text}") <= WIDTH:
        return text if text[0] not in "*&!|>'\"%@`-" else exactjson.dumps(text)
    return "\n".join([">-", *_packed(re.split(r" (?=\+ )", text), "    ", "    ")])


def _packed(pieces: Sequence[str], first: str, others: str) -> list[str]:
    """Pieces in lines, as many in each as fit; a line may be followed by a backslash."""
    lines = [first + pieces[0]]
    for piece in pieces[1:]:
        if len(joined := f"{lines[-1]} {piece}") <= WIDTH - 2:
            lines[-1] = joined
        else:
            lines.append(others + piece)
    return lines


def _compose(text: str) -> "yaml.Node | None":
    import yaml

    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        raise DuctoError(_FORM) from None


def _put(text: str, node: "yaml.Node", value: str) -> str:
    """The text with another value; a comment behind the old one comes to stand behind its first line."""
    start, end = node.start_mark.index, _end(text, node)
    line = text.find("\n", end) if "\n" in text[end:] else len(text)
    old, comment = text[start:end], text[end:line]
    if folded := re.match(r"[>|][-+0-9]*([ \t]+#[^\n]*)\n", old):
        comment = folded[1]
    first, *others = value.split("\n")
    return text[:start] + "\n".join([first + comment, *others]) + text[line:]


def _value(node: "yaml.Node | None", key: str) -> "yaml.Node | None":
    return next((value for name, value in node.value if name.value == key), None) if node else None


def _end(text: str, node: "yaml.Node") -> int:
    """Where a value ends, without the line breaks that follow a folded one."""
    return node.start_mark.index + len(text[node.start_mark.index : node.end_mark.index].rstrip())

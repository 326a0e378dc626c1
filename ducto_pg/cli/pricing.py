"""Commands about prices: check, publish and look at them."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ducto_pg import exactjson
from ducto_pg.cli.common import TIME, add_command, load_config, manager_of, read_time
from ducto_pg.cli.tables import print_json
from ducto_pg.errors import DuctoError
from ducto_pg.models import PricingConfigData, PricingConfigResult


def add(commands: Any) -> None:
    """The group `pricing`, less what is one call."""
    _add_config(add_command(commands, "validate", _validate, json=True))
    publish_parser = add_command(commands, "publish", publish, dsn=True, json=True)
    _add_publish_options(publish_parser)
    _add_at(publish_parser)
    activate_parser = add_command(commands, "activate", activate, dsn=True, json=True)
    activate_parser.add_argument("version", type=int, help="the number of a published version")
    _add_at(activate_parser)
    unschedule_parser = add_command(commands, "unschedule", unschedule, dsn=True, json=True)
    unschedule_parser.add_argument("version", type=int, help="the number of a version that is to be active later")
    diff = add_command(commands, "diff", _diff, dsn=True, json=True)
    either = "a config, or the number of a published version, or `active`"
    diff.add_argument("old", nargs="?", default="active", help=f"{either} (which is the default)")
    diff.add_argument("new", help=either)
    export = add_command(commands, "export", _export, dsn=True)
    export.add_argument("version", nargs="?", default="active", help="its number (default: the active one)")
    _add_publish_options(add_command(commands, "compile", _compile))
    _add_import_options(add_command(commands, "import", _import))


def _add_at(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", type=read_time, metavar="TIME", help=f"active from then on, not from now: {TIME}")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config's file, JSON or YAML; - for standard input")


def _add_publish_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--label", help="a name for the version")
    parser.add_argument("--no-activate", dest="activate", action="store_false", help="only publish; activate it later")


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--provider", action="append", help="openai, anthropic, google, aws …; once for each")
    add(
        "--model",
        action="append",
        metavar="PATTERN",
        help="a name or a pattern, of any of the providers (gpt-5*) or of one (google/gemini-*); once for each",
    )
    add("--credits-per-usd", type=_above_zero, metavar="N", help="the list's factor, before the markup (default 1)")
    add("--markup", type=_above_zero, metavar="N", help="a factor on top: 1.3 asks 30 percent more (default 1)")
    add("--tariff", action="append", type=_pair, metavar="NAME=VALUE", help="processing=batch, service_tier=flex …")
    add("--key", default="{}", help="what the keys are, {} for the model's name: '{}:batch' (default {})")
    add("--on", type=_day, metavar="DATE", help="the prices of that day (default: today, in UTC)")
    add("--costs", action="store_true", help="write them under costs, for spend_margin, not under models")
    add("-o", "--output", type=Path, metavar="FILE", help="a new file (default: standard output)")
    add("--update", type=Path, metavar="FILE", help="a list to bring up to date, by the command in its header if no "
        "provider is named; says what changes and keeps all else")  # fmt: skip
    add("--dry-run", action="store_true", help="with --update: say what would change, and write nothing")


def _above_zero(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal(0)
    if not value.is_finite() or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as processing=batch")
    return name, value


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day, such as 2026-01-31") from None


def _import(arguments: argparse.Namespace) -> None:
    """make a price list from the catalogue of genai-prices, or bring one up to date

    Its formulas are in USD, and its factor makes them credits. Needs pip install 'ducto-pg[catalog]'.
    """
    from ducto_pg.formula.arithmetic import multiply
    from ducto_pg.pricing import catalog, listfile
    from ducto_pg.pricing.config import load
    from ducto_pg.pricing.lookup import Lookup
    from ducto_pg.pricing.publish import diff

    file: Path | None = arguments.update
    text = file.read_text("utf-8") if file else ""
    given = arguments
    made_by = listfile.command_of(text)
    parser = argparse.ArgumentParser(prog=f"{file}: {listfile.COMMAND}")
    _add_import_options(parser)
    before = parser.parse_args(made_by or [])
    if file and not given.provider:
        if made_by is None:
            raise DuctoError(f"{file}: its header names no import: say which with --provider")
        if words := _words(given):
            raise DuctoError(
                f"{file}: {words[0]} needs the whole command, providers too: without, the header's is repeated"
            )
        given = before
    if not given.provider:
        raise DuctoError(f"name a provider with --provider: {', '.join(catalog.providers())}")
    if "{}" not in given.key:
        raise DuctoError(f"--key {given.key}: {{}} stands for the model's name")
    if file is None and given.costs:
        raise DuctoError("costs stand in a list that has models: name it with --update")
    if arguments.output and arguments.output.exists():
        raise DuctoError(f"{arguments.output} is there already: bring it up to date with --update")
    old = load_config(str(file)) if file else None
    if not given.costs and not before.costs:
        given.credits_per_usd = given.credits_per_usd or before.credits_per_usd
        given.markup = given.markup or before.markup
    if given.markup and not (given.credits_per_usd or given.costs) and old and old.factor != (before.markup or 1):
        raise DuctoError(f"{file}: its factor is {old.factor}: say how much of it is --credits-per-usd beside --markup")
    selection = catalog.Selection(
        providers=given.provider,
        models=given.model or ["*"],
        tariff=dict(given.tariff or []),
        key=given.key,
        on=given.on or datetime.now(UTC).date(),
    )
    prices = catalog.price_list(selection, Lookup(old.match, old.aliases) if old else None)
    factor = None
    if (given.credits_per_usd or given.markup) and not given.costs:
        factor = multiply(given.credits_per_usd or Decimal(1), given.markup or Decimal(1))
    source = f"the catalogue of genai-prices {version('genai-prices')}, prices of {selection.on}"
    try:
        new = listfile.updated(
            text,
            prices,
            section="costs" if given.costs else "models",
            factor=factor,
            arguments=_words(given),
            source=source,
        )
    except DuctoError as error:
        raise DuctoError(f"{file}: {error}" if file else str(error)) from error
    for remark in [*prices.remarks, *(() if given.costs else prices.disputes)]:
        print(f"ducto-pg: {remark}", file=sys.stderr)
    if old:
        print("\n".join(diff(old, load(new))) or "no difference")
    if (target := file or arguments.output) is None:
        print(new, end="")
    elif not arguments.dry_run:
        target.write_text(new, "utf-8")


def _words(given: argparse.Namespace) -> Sequence[str]:
    """The arguments that choose what is imported, as they are written."""
    words: list[str] = []
    for name in ("provider", "model", "credits_per_usd", "markup", "tariff", "key", "on"):
        value = getattr(given, name)
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item != "{}":
                words += [f"--{name.replace('_', '-')}", "=".join(item) if isinstance(item, tuple) else str(item)]
    return [*words, *(["--costs"] if given.costs else [])]


def _validate(arguments: argparse.Namespace) -> None:
    """check a pricing config without a database"""
    config = load_config(arguments.config)
    if arguments.json:
        print_json(config)
    else:
        print(f"{arguments.config}: sound (models: {len(config.models)}, plans: {len(config.plans or {})})")
    _print_remarks(config)


def publish(arguments: argparse.Namespace) -> None:
    """compile a pricing config into the database as its next version, and activate it"""
    config = load_config(arguments.config)
    with manager_of(arguments) as manager:
        result = manager.publish_pricing(config, label=arguments.label, activate=arguments.activate, at=arguments.at)
    active = f"published, {_active(arguments)}" if arguments.at else "published and active"
    _print_version(arguments, result, active if arguments.activate else "published, not activated")
    _print_remarks(config)


def activate(arguments: argparse.Namespace) -> None:
    """make a published version the one that prices from now on"""
    with manager_of(arguments) as manager:
        result = manager.activate_pricing(_number(arguments.version), at=arguments.at)
    _print_version(arguments, result, _active(arguments))


def unschedule(arguments: argparse.Namespace) -> None:
    """take back an activation whose time has not come yet"""
    with manager_of(arguments) as manager:
        result = manager.unschedule_pricing(_number(arguments.version))
    _print_version(arguments, result, "not scheduled any more")


OWNERS_ONLY = (publish, activate, unschedule)


def _diff(arguments: argparse.Namespace) -> None:
    """say what changes from one config to another"""
    from ducto_pg.pricing.publish import diff

    lines = diff(_config_of(arguments, arguments.old), _config_of(arguments, arguments.new))
    if arguments.json:
        print(exactjson.dumps(lines))
    else:
        print("\n".join(lines) or "no difference")


def _export(arguments: argparse.Namespace) -> None:
    """print the config of a published version, as JSON"""
    print(_indented(_published(arguments, arguments.version).model_dump(exclude_none=True)))


def _compile(arguments: argparse.Namespace) -> None:
    """print a pricing config as SQL that publishes it without Python"""
    from ducto_pg.pricing.publish import compile_config

    print(compile_config(load_config(arguments.config), label=arguments.label, activate=arguments.activate), end="")


def _config_of(arguments: argparse.Namespace, name: str) -> PricingConfigData:
    return _published(arguments, name) if name == "active" or name.isdecimal() else load_config(name)


def _published(arguments: argparse.Namespace, name: str) -> PricingConfigData:
    if name != "active" and not name.isdecimal():
        raise DuctoError(f"a version is a number or `active`, not {name!r}")
    with manager_of(arguments) as manager:
        result = manager.get_active_pricing() if name == "active" else manager.get_pricing_config(_number(int(name)))
    if result is None:
        raise DuctoError("no pricing version is active yet")
    return result.config


def _number(version: int) -> int:
    if version >= 2**31:
        raise DuctoError(f"there is no pricing version {version}")
    return version


def _active(arguments: argparse.Namespace) -> str:
    return f"active from {arguments.at.isoformat()}" if arguments.at else "active"


def _print_version(arguments: argparse.Namespace, result: PricingConfigResult, what: str) -> None:
    if arguments.json:
        print_json(result)
    else:
        print(f"version {result.version} {what}")


def _print_remarks(config: PricingConfigData) -> None:
    """What the owner of the list should know: no errors."""
    from ducto_pg.pricing.review import remarks

    for remark in remarks(config):
        print(f"ducto-pg: note: {remark}", file=sys.stderr)


def _indented(value: object, indent: str = "\n") -> str:
    """JSON with a line per key, for people."""
    if not isinstance(value, dict) or not value:
        return exactjson.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{exactjson.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
    return "{" + ",".join(lines) + indent + "}"

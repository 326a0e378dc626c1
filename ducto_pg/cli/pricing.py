"""Commands about prices: check, publish and look at them."""

import argparse
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


def _add_at(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", type=read_time, metavar="TIME", help=f"active from then on, not from now: {TIME}")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config's file, JSON or YAML; - for standard input")


def _add_publish_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--label", help="a name for the version")
    parser.add_argument("--no-activate", dest="activate", action="store_false", help="only publish; activate it later")


def _validate(arguments: argparse.Namespace) -> None:
    """check a pricing config without a database"""
    config = load_config(arguments.config)
    if arguments.json:
        print_json(config)
    else:
        print(f"{arguments.config}: sound (models: {len(config.models)}, plans: {len(config.plans or {})})")


def publish(arguments: argparse.Namespace) -> None:
    """compile a pricing config into the database as its next version, and activate it"""
    config = load_config(arguments.config)
    with manager_of(arguments) as manager:
        result = manager.publish_pricing(config, label=arguments.label, activate=arguments.activate, at=arguments.at)
    active = f"published, {_active(arguments)}" if arguments.at else "published and active"
    _print_version(arguments, result, active if arguments.activate else "published, not activated")


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


def _indented(value: object, indent: str = "\n") -> str:
    """JSON with a line per key, for people."""
    if not isinstance(value, dict) or not value:
        return exactjson.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{exactjson.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
    return "{" + ",".join(lines) + indent + "}"

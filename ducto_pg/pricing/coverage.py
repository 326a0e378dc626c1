"""Which counts of a usage a price charges; what none charges is never silently free.

Tool calls are not among them: the formulas of the config's tools charge them, and a call without one is free.
"""

from ducto_pg.formula.fields import KNOWN_COUNTS, covered
from ducto_pg.formula.language import Formula
from ducto_pg.models import PricingConfigData

UNREAD = "unread"
_CALLS = {"tool_calls"}


def of_model(formula: Formula, config: PricingConfigData) -> frozenset[str]:
    """The counts that a model's formula charges: those that it names, with their parts; a flat price charges all."""
    if formula.variables == {"requests"}:
        return frozenset((*KNOWN_COUNTS, *config.metrics, UNREAD)) - _CALLS
    return of_part(formula, config)


def of_part(formula: Formula | None, config: PricingConfigData) -> frozenset[str]:
    """The counts that the formula of a tool, of search or cache charges."""
    return covered(formula.variables, config.cached) - _CALLS if formula else frozenset()


def of_free(config: PricingConfigData) -> frozenset[str]:
    """The counts that a config gives away."""
    return covered(config.free, config.cached) - _CALLS

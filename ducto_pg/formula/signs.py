"""Which signs a formula's value can have, as far as its tree shows it: usage and written numbers are never below 0."""

from decimal import Decimal
from functools import reduce
from itertools import product

from sqlglot import exp

from ducto_pg.formula.arithmetic import CHAINED, OPERATORS, spine

Signs = frozenset[int]

_ANY: Signs = frozenset((-1, 0, 1))
_NOT_NEGATIVE: Signs = frozenset((0, 1))


def signs(node: exp.Expr) -> Signs:
    """Those of -1, 0 and 1 that the value of a checked tree may have; some of them perhaps never."""
    if isinstance(node, exp.Literal):
        return frozenset((int(Decimal(node.this) > 0),))
    if isinstance(node, exp.Parameter | exp.Var):
        return _NOT_NEGATIVE
    if isinstance(node, exp.Neg):
        return _opposite(signs(node.this))
    if isinstance(node, exp.Case):
        branches = [*(branch.args["true"] for branch in node.args["ifs"]), node.args["default"]]
        return frozenset().union(*map(signs, branches))
    if isinstance(node, exp.Anonymous):
        return _of_call(node.name, [signs(operand) for operand in node.expressions])
    assert type(node) in OPERATORS
    first, links = spine(node, CHAINED)
    return reduce(lambda left, link: _operation(type(link), left, signs(link.expression)), links, signs(first))


def _opposite(of: Signs) -> Signs:
    return frozenset(-sign for sign in of)


def _of_call(name: str, operands: list[Signs]) -> Signs:
    if name in ("max", "min"):
        choose = max if name == "max" else min
        return reduce(lambda left, right: frozenset(choose(pair) for pair in product(left, right)), operands)
    if name == "percentile":
        return frozenset().union(*operands[1:])
    return frozenset(map(abs, operands[0])) if name == "abs" else operands[0] | {0}


def _operation(kind: type[exp.Expr], left: Signs, right: Signs) -> Signs:
    if kind is exp.Sub:
        kind, right = exp.Add, _opposite(right)
    if kind is exp.Add:
        return frozenset().union(*(_ANY if one * other < 0 else {one or other} for one, other in product(left, right)))
    if kind is exp.Mod:
        return right | {0}
    found = frozenset(one * other for one, other in product(left, right))
    return found if kind is exp.Mul else found | {0}

"""Decimal with the semantics of PostgreSQL's numeric, display scale included, and the formulas' back end in Python.

Every result equals the server's digit by digit: `format(result, "f")` is the text of the numeric. Sums and products are
exact (products to 16,383 decimals), quotients have PostgreSQL's scale, rounding is half away from zero, and there is no
negative zero.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Context, Decimal, Inexact, InvalidOperation
from typing import Any

from sqlglot import exp

Usage = Mapping[str, Any]
Evaluation = Callable[[Usage], Any]

MAX_SCALE = 16_383
MAX_QUOTIENT_SCALE = 1_000
QUOTIENT_DIGITS = 16
ZERO = Decimal(0)
ONE = Decimal(1)

# Wide enough for every formula within the limits of the language; a digit lost anyway would raise.
_EXACT = Context(prec=400_000, Emin=-999_999, Emax=999_999, traps=[Inexact, InvalidOperation])
_ROUNDED = Context(prec=400_000, Emin=-999_999, Emax=999_999, rounding=ROUND_HALF_UP, traps=[InvalidOperation])


def scale(value: Decimal) -> int:
    """Decimals behind the point, as displayed."""
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


def trim_scale(value: Decimal) -> Decimal:
    """The same number without zeros at the end of its decimals."""
    trimmed = value.normalize(_EXACT)
    return trimmed.quantize(ONE, context=_EXACT) if trimmed == trimmed.to_integral_value() else trimmed


def add(left: Decimal, right: Decimal) -> Decimal:
    """Exact sum."""
    return _EXACT.add(left, right)


def subtract(left: Decimal, right: Decimal) -> Decimal:
    """Exact difference."""
    return _EXACT.subtract(left, right)


def negate(value: Decimal) -> Decimal:
    """Minus."""
    return _EXACT.minus(value)


def multiply(left: Decimal, right: Decimal) -> Decimal:
    """Exact product; beyond 16,383 decimals rounded half away from zero."""
    product = _EXACT.multiply(left, right)
    if scale(product) > MAX_SCALE:
        product = product.quantize(Decimal((0, (1,), -MAX_SCALE)), context=_ROUNDED)
    return product or product.copy_abs()


def divide(left: Decimal, right: Decimal) -> Decimal:
    """Quotient with the scale that PostgreSQL selects. Raises ZeroDivisionError.

    That is 16 significant digits counted in base 10,000, no less than either side's scale, at most 1,000.
    """
    _check_divisor(right)
    weight_left, first_left = _leading(left)
    weight_right, first_right = _leading(right)
    weight = weight_left - weight_right - (first_left <= first_right)
    digits = min(max(QUOTIENT_DIGITS - 4 * weight, scale(left), scale(right)), MAX_QUOTIENT_SCALE)
    dividend, divisor = left.copy_abs().scaleb(digits, _EXACT), right.copy_abs()
    quotient, rest = _EXACT.divide_int(dividend, divisor), _EXACT.remainder(dividend, divisor)
    if _EXACT.add(rest, rest) >= divisor:
        quotient = _EXACT.add(quotient, ONE)
    result = quotient.scaleb(-digits, _EXACT)
    return result.copy_negate() if result and left.is_signed() != right.is_signed() else result


def floor_divide(left: Decimal, right: Decimal) -> Decimal:
    """The whole number at or below the exact quotient. Raises ZeroDivisionError."""
    _check_divisor(right)
    quotient = _EXACT.divide_int(left, right)
    rest = _EXACT.remainder(left, right)
    if rest and rest.is_signed() != right.is_signed():
        quotient = _EXACT.subtract(quotient, ONE)
    return quotient or ZERO


def modulo(left: Decimal, right: Decimal) -> Decimal:
    """What `floor_divide` leaves, with the sign of the divisor. Raises ZeroDivisionError."""
    _check_divisor(right)
    rest = _EXACT.remainder(left, right)
    if rest and rest.is_signed() != right.is_signed():
        rest = _EXACT.add(rest, right)
    return rest or rest.copy_abs()


def round_half_up(value: Decimal, digits: int = 0) -> Decimal:
    """To so many decimals (tens, hundreds … where negative), half away from zero."""
    rounded = value.quantize(Decimal((0, (1,), -digits)), context=_ROUNDED)
    return _whole(rounded) if digits < 0 else rounded or rounded.copy_abs()


def floor(value: Decimal) -> Decimal:
    """The whole number at or below."""
    return _whole(value.to_integral_value(ROUND_FLOOR, _ROUNDED))


def ceil(value: Decimal) -> Decimal:
    """The whole number at or above."""
    return _whole(value.to_integral_value(ROUND_CEILING, _ROUNDED))


def percentile(position: Decimal, values: Sequence[Decimal]) -> Decimal:
    """The value at `position` (0 = the smallest) of the sorted values; between two, interpolated linearly."""
    ordered = sorted(values)
    index = int(position)
    fraction = trim_scale(subtract(position, Decimal(index)))
    if not fraction:
        return ordered[index]
    return add(ordered[index], multiply(subtract(ordered[index + 1], ordered[index]), fraction))


def evaluation(node: exp.Expr) -> Evaluation:
    """The node as a function of the usage: a Decimal for each field that it names, and the name of the `model`.

    It answers a Decimal, or a bool where the node is a condition, and raises ZeroDivisionError.
    """
    return NODES[type(node)](node)


def spine(node: exp.Expr, kinds: tuple[type[exp.Expr], ...]) -> tuple[exp.Expr, list[exp.Expr]]:
    """The first operand of a chain of these operators, and the operators from left to right.

    A chain leans to the left and may be longer than the interpreter's stack: who walks one does it in a loop.
    """
    links = []
    while isinstance(node, kinds):
        links.append(node)
        node = node.this
    return node, links[::-1]


def _chain(node: exp.Expr) -> Evaluation:
    first, links = spine(node, CHAINED)
    start = evaluation(first)
    steps = [(OPERATORS[type(link)], evaluation(link.expression)) for link in links]

    def evaluate(usage: Usage) -> Decimal:
        value: Decimal = start(usage)
        for operate, operand in steps:
            value = operate(value, operand(usage))
        return value

    return evaluate


def _connective(node: exp.Expr) -> Evaluation:
    """`and` ends at the first operand that is false, `or` at the first that is true."""
    first, links = spine(node, (type(node),))
    operands = [evaluation(operand) for operand in (first, *(link.expression for link in links))]
    decide = any if isinstance(node, exp.Or) else all
    return lambda usage: decide(operand(usage) for operand in operands)


def _case(node: exp.Expr) -> Evaluation:
    branches = [(evaluation(branch.this), evaluation(branch.args["true"])) for branch in node.args["ifs"]]
    default = evaluation(node.args["default"])

    def evaluate(usage: Usage) -> Decimal:
        for holds, value in branches:
            if holds(usage):
                return value(usage)  # type: ignore[no-any-return]
        return default(usage)  # type: ignore[no-any-return]

    return evaluate


def _comparison(node: exp.Expr) -> Evaluation:
    compare = COMPARISONS[type(node)]
    left, right = evaluation(node.this), evaluation(node.expression)

    def evaluate(usage: Usage) -> bool:
        return bool(compare(left(usage), right(usage)))

    return evaluate


def _call(node: exp.Expr) -> Evaluation:
    function = FUNCTIONS[node.name]
    arguments = [evaluation(argument) for argument in node.expressions]
    return lambda usage: function([argument(usage) for argument in arguments])


def _constant(value: Decimal | str) -> Evaluation:
    return lambda usage: value


def _literal(node: exp.Expr) -> Evaluation:
    return _constant(node.name if node.is_string else Decimal(node.name))


def _negative(node: exp.Expr) -> Evaluation:
    operand = evaluation(node.this)
    return lambda usage: negate(operand(usage))


def _not(node: exp.Expr) -> Evaluation:
    operand = evaluation(node.this)
    return lambda usage: not operand(usage)


OPERATORS: Mapping[type[exp.Expr], Callable[[Decimal, Decimal], Decimal]] = {
    exp.Add: add,
    exp.Sub: subtract,
    exp.Mul: multiply,
    exp.Div: divide,
    exp.IntDiv: floor_divide,
    exp.Mod: modulo,
}
CHAINED = tuple(OPERATORS)
COMPARISONS: Mapping[type[exp.Expr], Callable[[Any, Any], bool]] = {
    exp.LT: operator.lt,
    exp.LTE: operator.le,
    exp.GT: operator.gt,
    exp.GTE: operator.ge,
    exp.EQ: operator.eq,
    exp.NEQ: operator.ne,
    exp.Contains: operator.contains,
}
FUNCTIONS: Mapping[str, Callable[[Sequence[Decimal]], Decimal]] = {
    "min": min,
    "max": max,
    "abs": lambda values: values[0].copy_abs(),
    "floor": lambda values: floor(values[0]),
    "ceil": lambda values: ceil(values[0]),
    "round": lambda values: round_half_up(values[0], int(values[1])),
    "percentile": lambda values: percentile(values[0], values[1:]),
}
NODES: Mapping[type[exp.Expr], Callable[[exp.Expr], Evaluation]] = {
    exp.Literal: _literal,
    exp.Parameter: lambda node: _literal(node.this),
    exp.Var: lambda node: operator.itemgetter(node.name),
    exp.Neg: _negative,
    **dict.fromkeys(OPERATORS, _chain),
    exp.Anonymous: _call,
    exp.Case: _case,
    **dict.fromkeys(COMPARISONS, _comparison),
    exp.And: _connective,
    exp.Or: _connective,
    exp.Not: _not,
}


def _check_divisor(value: Decimal) -> None:
    if not value:
        raise ZeroDivisionError


def _whole(value: Decimal) -> Decimal:
    whole = value.quantize(ONE, context=_EXACT)
    return whole or ZERO


def _leading(value: Decimal) -> tuple[int, int]:
    """Weight and value of the first base-10,000 digit."""
    if not value:
        return 0, 0
    weight = value.adjusted() // 4
    return weight, int(value.copy_abs().scaleb(-4 * weight, _EXACT))

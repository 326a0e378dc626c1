"""Decimal with the semantics of PostgreSQL's numeric, display scale included, and the core's back end in Python.

Every result equals the server's digit by digit: `format(result, "f")` is the text of the numeric. Sums and products are
exact (products to 16,383 decimals), quotients have PostgreSQL's scale, rounding is half away from zero, and there is no
negative zero.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Context, Decimal, Inexact, InvalidOperation
from typing import assert_never

from ducto_pg.errors import FormulaError
from ducto_pg.formula import (
    And,
    Arithmetic,
    Call,
    Choice,
    Comparison,
    Condition,
    Formula,
    ModelHas,
    ModelIs,
    Negative,
    NonZero,
    Not,
    Number,
    Or,
    Percentile,
    Round,
    Truth,
    Value,
    Variable,
)

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


def evaluate(formula: Formula, variables: Mapping[str, Decimal], model: str, where: str) -> Decimal:
    """The value of a formula.

    `variables` holds the exact usage, absent ones are 0; `model` is the name as given, '' when absent. Raises
    FormulaError, naming `where` (the formula's path in the config), on a division by zero in a branch that is taken.
    """
    known = {name: trim_scale(variables.get(name, ZERO)) for name in formula.variables}
    try:
        return value_of(formula.tree, known, model)
    except ZeroDivisionError:
        hint = "Guard the divisor, as in: x / y if y else 0"
        raise FormulaError(f"division by zero in {where}", hint=hint) from None


def value_of(node: Value, variables: Mapping[str, Decimal], model: str) -> Decimal:
    """The value of one node of the core. Raises ZeroDivisionError."""
    match node:
        case Number():
            return node.value
        case Variable():
            return variables[node.name]
        case Arithmetic():
            left, right = value_of(node.left, variables, model), value_of(node.right, variables, model)
            return _OPERATORS[node.operator](left, right)
        case Choice():
            taken = node.then if holds(node.condition, variables, model) else node.otherwise
            return value_of(taken, variables, model)
        case Truth():
            return ONE if holds(node.condition, variables, model) else ZERO
        case Negative():
            return negate(value_of(node.operand, variables, model))
        case Call():
            return _CALLS[node.function]([value_of(argument, variables, model) for argument in node.arguments])
        case Round():
            return round_half_up(value_of(node.operand, variables, model), node.digits)
        case Percentile():
            return percentile(node.position, [value_of(value, variables, model) for value in node.values])
    assert_never(node)


def holds(node: Condition, variables: Mapping[str, Decimal], model: str) -> bool:
    """Whether a condition of the core is true. Raises ZeroDivisionError."""
    match node:
        case Comparison():
            left, right = value_of(node.left, variables, model), value_of(node.right, variables, model)
            return _COMPARISONS[node.operator](left, right)
        case And():
            return holds(node.left, variables, model) and holds(node.right, variables, model)
        case Or():
            return holds(node.left, variables, model) or holds(node.right, variables, model)
        case Not():
            return not holds(node.operand, variables, model)
        case NonZero():
            return bool(value_of(node.operand, variables, model))
        case ModelIs():
            return model == node.text
        case ModelHas():
            return node.text in model
    assert_never(node)


_OPERATORS = {"+": add, "-": subtract, "*": multiply, "/": divide, "//": floor_divide, "%": modulo}
_CALLS: Mapping[str, Callable[[Sequence[Decimal]], Decimal]] = {
    "min": min,
    "max": max,
    "abs": lambda values: values[0].copy_abs(),
    "floor": lambda values: floor(values[0]),
    "ceil": lambda values: ceil(values[0]),
}
_COMPARISONS = {
    "<": Decimal.__lt__,
    "<=": Decimal.__le__,
    ">": Decimal.__gt__,
    ">=": Decimal.__ge__,
    "=": Decimal.__eq__,
    "<>": Decimal.__ne__,
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

"""The formula language: text -> checked `Formula`.

The text becomes a sqlglot tree (`dialect`); `_Reader` is the wall behind it: it knows a closed set of node types,
checks names, arity and kinds, and writes a new tree without sugar, the core, of which both back ends (`arithmetic`,
`generator`) know every node. What it does not know is an ExpressionError.

The core is made of sqlglot's own nodes. A *value* is a number: Literal (a constant of the language), Parameter (a
number that the text names, which a price may change without changing the formula), Var, Neg, the operators, Case, and
Anonymous for functions, whose own nodes in sqlglot carry flags. A *condition* is true or false: comparisons, And, Or,
Not, and Contains and EQ of the model and a text. Nodes are never changed and may be shared.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import NoReturn

from sqlglot import exp

from ducto_pg.errors import ExpressionError, FormulaError
from ducto_pg.formula.arithmetic import (
    CHAINED,
    COMPARISONS,
    OPERATORS,
    ZERO,
    Evaluation,
    evaluation,
    multiply,
    scale,
    spine,
    trim_scale,
)
from ducto_pg.formula.dialect import Comparisons, parse_text
from ducto_pg.formula.fields import KNOWN_COUNTS, SEED_COUNTS
from ducto_pg.spelling import nearest

MAX_LENGTH = 2_000
MAX_NODES = 400
MAX_DIGITS = 30
MAX_POWER = 8
MAX_ROUND = 15

_NUMBER = re.compile(r"(0|[1-9](?:_?[0-9])*)?(?:\.([0-9](?:_?[0-9])*)?)?(?:[eE][+-]?[0-9]{1,4})?")
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,47}")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_WORDS = "and or not in if else case when then end true false none null model fixed_job provider_cost unread body api"
_CONDITIONS = (*COMPARISONS, exp.And, exp.Or, exp.Not)
_COMPARISON = {"<": exp.LT, "<=": exp.LTE, ">": exp.GT, ">=": exp.GTE, "=": exp.EQ, "<>": exp.NEQ}


@dataclass(frozen=True, eq=False)
class Formula:
    """A checked formula.

    `text` is as written, `tree` its core, `variables` the numeric usage fields that evaluating may read, `uses_model`
    whether it may read the name of the model.
    """

    text: str
    tree: exp.Expr
    variables: frozenset[str]
    uses_model: bool

    @cached_property
    def _evaluation(self) -> Evaluation:
        return evaluation(self.tree)

    def evaluate(self, variables: Mapping[str, Decimal], model: str, where: str) -> Decimal:
        """The value of the formula.

        `variables` holds the exact usage, absent ones are 0; `model` is the name as given, '' when absent. Raises
        FormulaError, naming `where` (the formula's path in the config), on a division by zero in a branch taken.
        """
        known: dict[str, Decimal | str] = {name: trim_scale(variables.get(name, ZERO)) for name in self.variables}
        try:
            return self._evaluation(known | {"model": model})  # type: ignore[no-any-return]
        except ZeroDivisionError:
            hint = "Guard the divisor, as in: x / y if y else 0"
            raise FormulaError(f"division by zero in {where}", hint=hint) from None


def parse(text: str, metrics: Collection[str] = ()) -> Formula:
    """Check a formula and reduce it to its core.

    `metrics` are the config's numeric usage fields beyond `KNOWN_COUNTS`. Raises ExpressionError, with the position
    of the fault in the text (counted from 0) and the nearest known name for a misspelt one.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"a formula is a text, not {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"a formula has at most {MAX_LENGTH} characters, not {len(text)}")
    if control := _CONTROL.search(text):
        raise ExpressionError(f"unexpected {control[0]!a}", position=control.start())
    reader = _Reader(metrics)
    try:
        tree = reader.value(parse_text(text))
    except RecursionError:
        raise ExpressionError("nested too deeply") from None
    if not reader.named:
        raise ExpressionError("a formula names at least one usage variable, such as input_tokens", position=0)
    names = {node.name for node in tree.find_all(exp.Var)}
    return Formula(text, tree, variables=frozenset(names - {"model"}), uses_model="model" in names)


def is_metric_name(name: str) -> bool:
    """Whether a config may give one of its own metrics this name: lower case, digits and `_`, at most 48, not taken."""
    taken = (*SEED_COUNTS, *_FUNCTIONS, *_WORDS.split())
    return _METRIC.fullmatch(name) is not None and name not in taken


def _constant(node: exp.Expr) -> Decimal | None:
    """The value of what names no variable; None for the rest, and for a division by zero."""
    if node.find(exp.Var):
        return None
    try:
        return evaluation(node)({})  # type: ignore[no-any-return]
    except ZeroDivisionError:
        return None


def _fault(message: str, node: exp.Expr | None = None, suggestion: str | None = None) -> NoReturn:
    """Raise at the first place below `node` that knows its position."""
    positions = (part.meta.get("start") for part in node.walk()) if node else iter(())
    position = min((position for position in positions if position is not None), default=None)
    raise ExpressionError(message, position=position, suggestion=suggestion)


def _is_model(node: exp.Expr) -> bool:
    return isinstance(node, exp.Var) and node.name == "model"


def _is_string(node: exp.Expr) -> bool:
    return isinstance(node, exp.Literal) and node.is_string


def _number(value: Decimal | int) -> exp.Expr:
    return exp.Literal(this=format(Decimal(value), "f"), is_string=False)


class _Reader:
    """The dialect's tree -> core, by the node's type (`_NODES`) and the function's name (`_FUNCTIONS`)."""

    def __init__(self, metrics: Collection[str]) -> None:
        self.variables = tuple(dict.fromkeys((*KNOWN_COUNTS, *metrics)))
        self.named = False
        self.power = 1

    def value(self, node: exp.Expr) -> exp.Expr:
        """The node as a number."""
        read = self.read(node)
        if isinstance(read, _CONDITIONS):
            truth = exp.Case(ifs=[exp.If(this=read, true=_number(1))], default=_number(0))
            return self.made(truth, read)
        return read

    def condition(self, node: exp.Expr) -> exp.Expr:
        """The node as a condition."""
        read = self.read(node)
        return read if isinstance(read, _CONDITIONS) else self.made(exp.NEQ(this=read, expression=_number(0)), read)

    def read(self, node: exp.Expr) -> exp.Expr:
        """The node as what it is."""
        read = _NODES.get(type(node))
        return read(self, node) if read else _fault("not part of the formula language", node)

    def made(self, node: exp.Expr, *operands: exp.Expr, operations: int = 1) -> exp.Expr:
        """Every node of the core passes here with its operands, shared ones counted each time, so that shorthands that
        copy are stopped before they explode."""
        size = operations + sum(operand.meta["size"] for operand in operands)
        if size > MAX_NODES:
            raise ExpressionError(f"too long: more than {MAX_NODES} operands and operations, shorthands written out")
        node.meta["size"] = size
        return node

    def operation(self, kind: type[exp.Expr], left: exp.Expr, right: exp.Expr) -> exp.Expr:
        """Two operands and what stands between them."""
        return self.made(kind(this=left, expression=right), left, right)

    def call_of(self, name: str, *arguments: exp.Expr) -> exp.Expr:
        """A function that the core has."""
        return self.made(exp.Anonymous(this=name, expressions=list(arguments)), *arguments)

    def choice(self, branches: list[tuple[exp.Expr, exp.Expr]], default: exp.Expr) -> exp.Expr:
        """The value of the first condition that is true; only that one is evaluated."""
        ifs = [exp.If(this=condition, true=value) for condition, value in branches]
        operands = [operand for branch in branches for operand in branch]
        return self.made(exp.Case(ifs=ifs, default=default), *operands, default, operations=len(branches))

    def constant(self, value: int) -> exp.Expr:
        """A constant of the language's own."""
        return self.made(_number(value))

    def parameter(self, value: Decimal) -> exp.Expr:
        """A number that the text names."""
        return self.made(exp.Parameter(this=_number(value)))

    def literal(self, node: exp.Expr) -> exp.Expr:
        """A number."""
        if node.is_string:
            _fault("a text stands only beside model", node)
        match = _NUMBER.fullmatch(node.name)
        if match is None or not (match[1] or match[2]):
            _fault(f"{node.name[:40]!a} is not a number", node)
        value = Decimal(node.name.replace("_", ""))
        if scale(value) > MAX_DIGITS or (value and value.adjusted() >= MAX_DIGITS):
            _fault(f"a number has at most {MAX_DIGITS} digits either side of the point", node)
        return self.parameter(value if scale(value) else Decimal(int(value)))

    def boolean(self, node: exp.Expr) -> exp.Expr:
        """True and False are 1 and 0."""
        return self.parameter(Decimal(1 if node.this else 0))

    def variable(self, node: exp.Expr) -> exp.Expr:
        """The name of a usage field."""
        if _is_model(node):
            _fault("model stands only in: 'text' in model, not in, ==, !=", node)
        if node.name not in self.variables:
            _fault(f"unknown name {node.name!r}", node, nearest(node.name, (*self.variables, "model", "True", "False")))
        self.named = True
        return self.made(exp.Var(this=node.name))

    def negative(self, node: exp.Expr) -> exp.Expr:
        """Minus."""
        operand = self.value(node.this)
        return self.made(exp.Neg(this=operand), operand)

    def binary(self, node: exp.Expr) -> exp.Expr:
        """A chain of operators."""
        first, links = spine(node, CHAINED)
        value = self.value(first)
        for link in links:
            value = self.operation(type(link), value, self.value(link.expression))
        return value

    def power_of(self, node: exp.Expr) -> exp.Expr:
        """Repeated multiplication."""
        enclosing, self.power = self.power, 1
        exponent = _constant(self.value(node.expression))
        if exponent is None or not 0 <= exponent <= MAX_POWER or exponent != int(exponent):
            _fault(f"an exponent is a constant whole number, 0..{MAX_POWER}", node.expression)
        times = int(exponent)
        self.power = enclosing * max(1, times)
        if self.power > MAX_POWER:
            _fault(f"the exponents of nested powers have a product of at most {MAX_POWER}", node.expression)
        base = self.value(node.this)
        self.power = enclosing
        power = base if times else self.parameter(Decimal(1))
        for _ in range(times - 1):
            power = self.operation(exp.Mul, power, base)
        return power

    def opposite(self, node: exp.Expr) -> exp.Expr:
        """`not`."""
        operand = self.condition(node.this)
        return self.made(exp.Not(this=operand), operand)

    def connective(self, node: exp.Expr) -> exp.Expr:
        """A chain of `and`, `or`."""
        first, links = spine(node, (exp.And, exp.Or))
        condition = self.condition(first)
        for link in links:
            condition = self.operation(type(link), condition, self.condition(link.expression))
        return condition

    def comparisons(self, node: exp.Expr) -> exp.Expr:
        """`a < b < c` is `a < b and b < c`."""
        operands = node.expressions
        values = [None if _is_model(operand) or _is_string(operand) else self.value(operand) for operand in operands]
        condition: exp.Expr | None = None
        for index, operator in enumerate(node.args["operators"]):
            left, right = values[index], values[index + 1]
            if left is None or right is None or operator in ("in", "not in"):
                link = self._text_comparison(operands[index], operator, operands[index + 1])
            else:
                link = self.operation(_COMPARISON[operator], left, right)
            condition = self.operation(exp.And, condition, link) if condition else link
        assert condition
        return condition

    def _text_comparison(self, left: exp.Expr, operator: str, right: exp.Expr) -> exp.Expr:
        kind: type[exp.Expr]
        if operator in ("in", "not in") and _is_string(left) and _is_model(right):
            kind, text = exp.Contains, left.name
        elif operator in ("=", "<>") and _is_string(left) and _is_model(right):
            kind, text = exp.EQ, left.name
        elif operator in ("=", "<>") and _is_model(left) and _is_string(right):
            kind, text = exp.EQ, right.name
        else:
            _fault("texts are compared only so: 'text' in model, not in, ==, !=", left)
        found = self.made(kind(this=exp.Var(this="model"), expression=exp.Literal(this=text, is_string=True)))
        return self.made(exp.Not(this=found), found) if operator in ("not in", "<>") else found

    def conditional(self, node: exp.Expr) -> exp.Expr:
        """`a if c else b`."""
        return self._choice(node.this, node.args["true"], node.args["false"])

    def case(self, node: exp.Expr) -> exp.Expr:
        """`case when c then a … else b end`."""
        branches = [(self.condition(branch.this), self.value(branch.args["true"])) for branch in node.args["ifs"]]
        return self.choice(branches, self.value(node.args["default"]))

    def _choice(self, condition: exp.Expr, then: exp.Expr, otherwise: exp.Expr) -> exp.Expr:
        return self.choice([(self.condition(condition), self.value(then))], self.value(otherwise))

    def call(self, node: exp.Expr) -> exp.Expr:
        """A function."""
        known = _FUNCTIONS.get(node.name)
        if known is None:
            _fault(f"unknown function {node.name!r}", node, nearest(node.name, _FUNCTIONS))
        least, most, build = known
        count = len(node.expressions)
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            _fault(f"{node.name} takes {wanted} argument{'s' * (wanted != '1')}, not {count}", node)
        return build(self, node)

    def named_function(self, node: exp.Expr) -> exp.Expr:
        """A function that the core has under the same name."""
        return self.call_of(node.name, *map(self.value, node.expressions))

    def if_function(self, node: exp.Expr) -> exp.Expr:
        """`if(c, a, b)`."""
        return self._choice(*node.expressions)

    def round(self, node: exp.Expr) -> exp.Expr:
        """`round(x[, digits])`."""
        operand, *rest = node.expressions
        digits = _constant(self.value(rest[0])) if rest else ZERO
        if digits is None or not -MAX_ROUND <= digits <= MAX_ROUND or digits != int(digits):
            _fault(f"the digits of round are a constant whole number, -{MAX_ROUND}..{MAX_ROUND}", rest[0])
        value = self.value(operand)
        return self.made(exp.Anonymous(this="round", expressions=[value, _number(int(digits))]), value)

    def clamp(self, node: exp.Expr) -> exp.Expr:
        """`clamp(x, lo, hi)` is `max(lo, min(x, hi))`."""
        value, low, high = map(self.value, node.expressions)
        return self.call_of("max", low, self.call_of("min", value, high))

    def percentile(self, node: exp.Expr) -> exp.Expr:
        """`percentile(p, v1, …)`: of the position (0 = the smallest) and the values."""
        percent, *arguments = node.expressions
        share = _constant(self.value(percent))
        if share is None or not 0 <= share <= 100:
            _fault("the first argument of percentile is a constant, 0..100", percent)
        position = trim_scale(multiply(multiply(Decimal(len(arguments) - 1), share), Decimal("0.01")))
        values = [self.value(argument) for argument in arguments]
        return self.made(exp.Anonymous(this="percentile", expressions=[_number(position), *values]), *values)

    def tier(self, node: exp.Expr) -> exp.Expr:
        """`tier(x, t1, r1, …, rest)`: a conditional."""
        value, bounds, rates, rest = self._steps(node)
        below = [self.operation(exp.LT, value, bound) for bound in bounds]
        return self.choice(list(zip(below, rates, strict=True)), rest)

    def graduated(self, node: exp.Expr) -> exp.Expr:
        """`graduated(x, upto1, rate1, …, rest)`: the sum of `max(0, min(x, upto) - lower) * rate`.

        `lower` is the highest bound so far, not the last one: bounds that vary may fall.
        """
        value, bounds, rates, rest = self._steps(node)
        lowers = [zero := self.constant(0)]
        total: exp.Expr | None = None
        for bound, rate in zip([*bounds, None], [*rates, rest], strict=True):
            top = self.call_of("min", value, bound) if bound else value
            height = self.operation(exp.Sub, top, self._highest(lowers))
            part = self.operation(exp.Mul, self.call_of("max", zero, height), rate)
            total = self.operation(exp.Add, total, part) if total else part
            lowers.append(bound or zero)
        assert total
        return total

    def _highest(self, bounds: list[exp.Expr]) -> exp.Expr:
        """The highest of them; numbers are known to rise."""
        numbers = [bound for bound in bounds if isinstance(bound, exp.Literal | exp.Parameter)]
        others = [bound for bound in bounds if not isinstance(bound, exp.Literal | exp.Parameter)]
        return self.call_of("max", numbers[-1], *others) if others else numbers[-1]

    def _steps(self, node: exp.Expr) -> tuple[exp.Expr, list[exp.Expr], list[exp.Expr], exp.Expr]:
        """The arguments of `tier` and `graduated`: x, bounds, rates, rest."""
        if len(node.expressions) % 2:
            _fault(f"{node.name} takes a value, pairs of bound and rate, and a last rate", node)
        value, *pairs, rest = map(self.value, node.expressions)
        last: Decimal | None = None
        for bound, written in zip(pairs[::2], node.expressions[1::2], strict=False):
            constant = _constant(bound)
            if constant is not None and last is not None and constant <= last:
                _fault(f"the bounds of {node.name} must rise", written)
            last = last if constant is None else constant
        return value, pairs[::2], pairs[1::2], rest


_NODES: Mapping[type[exp.Expr], Callable[[_Reader, exp.Expr], exp.Expr]] = {
    exp.Literal: _Reader.literal,
    exp.Boolean: _Reader.boolean,
    exp.Var: _Reader.variable,
    exp.Neg: _Reader.negative,
    **dict.fromkeys(OPERATORS, _Reader.binary),
    exp.Pow: _Reader.power_of,
    exp.Not: _Reader.opposite,
    exp.And: _Reader.connective,
    exp.Or: _Reader.connective,
    Comparisons: _Reader.comparisons,
    exp.If: _Reader.conditional,
    exp.Case: _Reader.case,
    exp.Anonymous: _Reader.call,
}

_FUNCTIONS: Mapping[str, tuple[int, int | None, Callable[[_Reader, exp.Expr], exp.Expr]]] = {
    "min": (1, None, _Reader.named_function),
    "max": (1, None, _Reader.named_function),
    "abs": (1, 1, _Reader.named_function),
    "ceil": (1, 1, _Reader.named_function),
    "floor": (1, 1, _Reader.named_function),
    "round": (1, 2, _Reader.round),
    "if": (3, 3, _Reader.if_function),
    "clamp": (3, 3, _Reader.clamp),
    "percentile": (2, None, _Reader.percentile),
    "tier": (4, None, _Reader.tier),
    "graduated": (4, None, _Reader.graduated),
}

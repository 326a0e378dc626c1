"""The formula language: text -> checked `Formula`.

The text becomes a sqlglot tree (`dialect`); `_Reader` is the wall behind it: it knows a closed set of node types,
checks names, arity and kinds, and rewrites sugar into the core (`formula`). What it does not know is an
ExpressionError.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar, cast

from ducto_pg.arithmetic import multiply, scale, trim_scale, value_of
from ducto_pg.errors import ExpressionError
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
    Node,
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

if TYPE_CHECKING:
    from sqlglot import exp

KNOWN_VARIABLES: tuple[str, ...] = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "tool_calls",
    "search_queries",
    "search_results",
    "web_search_calls",
    "code_exec_calls",
)
MAX_LENGTH = 2_000
MAX_NODES = 400
MAX_DIGITS = 30
MAX_POWER = 8
MAX_ROUND = 15

_N = TypeVar("_N", bound=Node)
_NUMBER = re.compile(r"(0|[1-9](?:_?[0-9])*)?(?:\.([0-9](?:_?[0-9])*)?)?(?:[eE][+-]?[0-9]{1,4})?")
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,47}")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_WORDS = "and or not in if else case when then end true false none null model fixed_job"
_ZERO, _ONE = Number(Decimal(0)), Number(Decimal(1))
_Operator = Literal["+", "-", "*", "/", "//", "%"]
_OPERATORS: Mapping[str, _Operator] = {"add": "+", "sub": "-", "mul": "*", "div": "/", "intdiv": "//", "mod": "%"}
_CONNECTIVES: Mapping[str, type[And] | type[Or]] = {"and": And, "or": Or}


def parse(text: str, metrics: Collection[str] = ()) -> Formula:
    """Check a formula and reduce it to its core.

    `metrics` are the config's numeric usage fields beyond `KNOWN_VARIABLES`. Raises ExpressionError, with the position
    of the fault in the text (counted from 0) and the nearest known name for a misspelt one.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"a formula is a text, not {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"a formula has at most {MAX_LENGTH} characters, not {len(text)}")
    if control := _CONTROL.search(text):
        raise ExpressionError(f"unexpected {control[0]!a}", position=control.start())
    from ducto_pg.dialect import parse_text

    reader = _Reader(metrics)
    try:
        tree = reader.value(parse_text(text))
    except RecursionError:
        raise ExpressionError("nested too deeply") from None
    if not reader.named:
        raise ExpressionError("a formula names at least one usage variable, such as input_tokens", position=0)
    leaves = set(tree.leaves())
    return Formula(
        text=text,
        tree=tree,
        variables=frozenset(leaf.name for leaf in leaves if isinstance(leaf, Variable)),
        uses_model=any(isinstance(leaf, ModelIs | ModelHas) for leaf in leaves),
    )


def is_metric_name(name: str) -> bool:
    """Whether a config may give one of its own metrics this name: lower case, digits and `_`, at most 48, not taken."""
    taken = (*KNOWN_VARIABLES, *_FUNCTIONS, *_WORDS.split())
    return _METRIC.fullmatch(name) is not None and name not in taken


_PROVIDERS_WORDS = {
    "prompt": "input",
    "completion": "output",
    "candidates": "output",
    "reasoning": "output",
    "thoughts": "output",
    "cached": "cacheread",
    "creation": "write",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like a misspelt one (`inputTokens` -> `input_tokens`), or None.

    At least half of their letters and pairs of letters are the same, once what providers call a kind of token has our
    word for it (`promptTokenCount` -> `input_tokens`). The database answers alike (`ducto_private.nearest`).
    """
    wanted = _letters(name)
    best, score = None, 0
    for candidate in sorted(known):
        letters = _letters(candidate)
        shared, total = len(wanted & letters), len(wanted) + len(letters)
        if 4 * shared >= max(total, 1) and 1_000_000 * shared // total > score:
            best, score = candidate, 1_000_000 * shared // total
    return best


def _letters(name: str) -> set[str]:
    plain = name.lower().replace("_", "").replace("-", "")
    for word, ours in _PROVIDERS_WORDS.items():
        plain = plain.replace(word, ours)
    return {plain[start : start + size] for start in range(len(plain)) for size in (1, 2)}


def _constant(node: Value) -> Decimal | None:
    """The value of what names no variable; None for the rest, and for a division by zero."""
    if any(isinstance(leaf, Variable | ModelIs | ModelHas) for leaf in node.leaves()):
        return None
    try:
        return value_of(node, {}, "")
    except ZeroDivisionError:
        return None


def _fault(message: str, node: "exp.Expr | None" = None, suggestion: str | None = None) -> NoReturn:
    """Raise at the first place below `node` that knows its position."""
    positions = (part.meta.get("start") for part in node.walk()) if node else iter(())
    position = min((position for position in positions if position is not None), default=None)
    raise ExpressionError(message, position=position, suggestion=suggestion)


def _is_model(node: "exp.Expr") -> bool:
    return node.key == "var" and node.name == "model"


def _is_string(node: "exp.Expr") -> bool:
    return node.key == "literal" and node.is_string


class _Reader:
    """sqlglot tree -> core, by the node's type (`_NODES`) and the function's name (`_FUNCTIONS`)."""

    def __init__(self, metrics: Collection[str]) -> None:
        self.variables = (*KNOWN_VARIABLES, *metrics)
        self.named = False
        self.power = 1

    def value(self, node: "exp.Expr") -> Value:
        """The node as a number."""
        read = self.read(node)
        return self.made(Truth(read)) if isinstance(read, Condition) else read

    def condition(self, node: "exp.Expr") -> Condition:
        """The node as a condition."""
        read = self.read(node)
        return read if isinstance(read, Condition) else self.made(NonZero(read))

    def read(self, node: "exp.Expr") -> Value | Condition:
        """The node as what it is."""
        read = _NODES.get(node.key)
        return read(self, node) if read else _fault("not part of the formula language", node)

    def made(self, node: _N) -> _N:
        """Every node of the core passes here, so that shorthands that copy are stopped before they explode."""
        if node.size > MAX_NODES:
            raise ExpressionError(f"too long: more than {MAX_NODES} operands and operations, shorthands written out")
        return node

    def literal(self, node: "exp.Expr") -> Number:
        """A number."""
        if node.is_string:
            _fault("a text stands only beside model", node)
        match = _NUMBER.fullmatch(node.name)
        if match is None or not (match[1] or match[2]):
            _fault(f"{node.name[:40]!a} is not a number", node)
        value = Decimal(node.name.replace("_", ""))
        if scale(value) > MAX_DIGITS or (value and value.adjusted() >= MAX_DIGITS):
            _fault(f"a number has at most {MAX_DIGITS} digits either side of the point", node)
        return Number(value if scale(value) else Decimal(int(value)))

    def boolean(self, node: "exp.Expr") -> Number:
        """True and False are 1 and 0."""
        return _ONE if node.this else _ZERO

    def variable(self, node: "exp.Expr") -> Variable:
        """The name of a usage field."""
        if _is_model(node):
            _fault("model stands only in: 'text' in model, not in, ==, !=", node)
        if node.name not in self.variables:
            _fault(f"unknown name {node.name!r}", node, nearest(node.name, (*self.variables, "model", "True", "False")))
        self.named = True
        return Variable(node.name)

    def negative(self, node: "exp.Expr") -> Value:
        """Minus."""
        return self.made(Negative(self.value(node.this)))

    def binary(self, node: "exp.Expr") -> Value:
        """A chain of operators, walked in a loop: it may be long."""
        chain = []
        while node.key in _OPERATORS:
            chain.append(node)
            node = node.this
        value = self.value(node)
        for link in reversed(chain):
            value = self.made(Arithmetic(_OPERATORS[link.key], value, self.value(link.expression)))
        return value

    def power_of(self, node: "exp.Expr") -> Value:
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
        power: Value = base if times else _ONE
        for _ in range(times - 1):
            power = self.made(Arithmetic("*", power, base))
        return power

    def opposite(self, node: "exp.Expr") -> Condition:
        """`not`."""
        return self.made(Not(self.condition(node.this)))

    def connective(self, node: "exp.Expr") -> Condition:
        """A chain of `and`, `or`."""
        chain = []
        while node.key in _CONNECTIVES:
            chain.append(node)
            node = node.this
        condition = self.condition(node)
        for link in reversed(chain):
            condition = self.made(_CONNECTIVES[link.key](condition, self.condition(link.expression)))
        return condition

    def comparisons(self, node: "exp.Expr") -> Condition:
        """`a < b < c` is `a < b and b < c`."""
        operands = node.expressions
        values = [None if _is_model(operand) or _is_string(operand) else self.value(operand) for operand in operands]
        links: list[Condition] = []
        for index, operator in enumerate(node.args["operators"]):
            left, right = values[index], values[index + 1]
            if left is None or right is None or operator in ("in", "not in"):
                links.append(self._text_comparison(operands[index], operator, operands[index + 1]))
            else:
                links.append(self.made(Comparison(operator, left, right)))
        condition = links[0]
        for link in links[1:]:
            condition = self.made(And(condition, link))
        return condition

    def _text_comparison(self, left: "exp.Expr", operator: str, right: "exp.Expr") -> Condition:
        found: Condition
        if operator in ("in", "not in") and _is_string(left) and _is_model(right):
            found = ModelHas(left.name)
        elif operator in ("=", "<>") and _is_string(left) and _is_model(right):
            found = ModelIs(left.name)
        elif operator in ("=", "<>") and _is_model(left) and _is_string(right):
            found = ModelIs(right.name)
        else:
            _fault("texts are compared only so: 'text' in model, not in, ==, !=", left)
        return self.made(Not(found)) if operator in ("not in", "<>") else found

    def conditional(self, node: "exp.Expr") -> Value:
        """`a if c else b`."""
        return self._choice(node.this, node.args["true"], node.args["false"])

    def case(self, node: "exp.Expr") -> Value:
        """`case when c then a … else b end`."""
        value = self.value(node.args["default"])
        for branch in reversed(node.args["ifs"]):
            value = self.made(Choice(self.condition(branch.this), self.value(branch.args["true"]), value))
        return value

    def _choice(self, condition: "exp.Expr", then: "exp.Expr", otherwise: "exp.Expr") -> Value:
        return self.made(Choice(self.condition(condition), self.value(then), self.value(otherwise)))

    def call(self, node: "exp.Expr") -> Value:
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

    def named_function(self, node: "exp.Expr") -> Value:
        """A function that the core has under the same name."""
        arguments = tuple(self.value(argument) for argument in node.expressions)
        return self.made(Call(cast(Literal["min", "max", "abs", "ceil", "floor"], node.name), arguments))

    def if_function(self, node: "exp.Expr") -> Value:
        """`if(c, a, b)`."""
        condition, then, otherwise = node.expressions
        return self._choice(condition, then, otherwise)

    def round(self, node: "exp.Expr") -> Value:
        """`round(x[, digits])`."""
        operand, *rest = node.expressions
        digits = _constant(self.value(rest[0])) if rest else Decimal(0)
        if digits is None or not -MAX_ROUND <= digits <= MAX_ROUND or digits != int(digits):
            _fault(f"the digits of round are a constant whole number, -{MAX_ROUND}..{MAX_ROUND}", rest[0])
        return self.made(Round(self.value(operand), int(digits)))

    def clamp(self, node: "exp.Expr") -> Value:
        """`clamp(x, lo, hi)` is `max(lo, min(x, hi))`."""
        value, low, high = (self.value(argument) for argument in node.expressions)
        return self.made(Call("max", (low, self.made(Call("min", (value, high))))))

    def percentile(self, node: "exp.Expr") -> Value:
        """`percentile(p, v1, …)`."""
        percent, *arguments = node.expressions
        share = _constant(self.value(percent))
        if share is None or not 0 <= share <= 100:
            _fault("the first argument of percentile is a constant, 0..100", percent)
        position = trim_scale(multiply(multiply(Decimal(len(arguments) - 1), share), Decimal("0.01")))
        return self.made(Percentile(position, tuple(self.value(argument) for argument in arguments)))

    def tier(self, node: "exp.Expr") -> Value:
        """`tier(x, t1, r1, …, rest)`: conditionals."""
        value, bounds, rates, result = self._steps(node)
        for bound, rate in zip(reversed(bounds), reversed(rates), strict=True):
            result = self.made(Choice(self.made(Comparison("<", value, bound)), rate, result))
        return result

    def graduated(self, node: "exp.Expr") -> Value:
        """`graduated(x, upto1, rate1, …, rest)`: the sum of `max(0, min(x, upto) - lower) * rate`.

        `lower` is the highest bound so far, not the last one: bounds that vary may fall.
        """
        value, bounds, rates, rest = self._steps(node)
        lowers: list[Value] = [_ZERO]
        total: Value | None = None
        for bound, rate in zip([*bounds, None], [*rates, rest], strict=True):
            top = value if bound is None else self.made(Call("min", (value, bound)))
            lower = self._highest(lowers)
            slice_ = self.made(Call("max", (_ZERO, self.made(Arithmetic("-", top, lower)))))
            part = self.made(Arithmetic("*", slice_, rate))
            total = part if total is None else self.made(Arithmetic("+", total, part))
            lowers.append(bound or _ZERO)
        assert total is not None
        return total

    def _highest(self, bounds: list[Value]) -> Value:
        """The highest of them; constant ones are known to rise."""
        constants = [bound for bound in bounds if isinstance(bound, Number)]
        others = [bound for bound in bounds if not isinstance(bound, Number)]
        return self.made(Call("max", (constants[-1], *others))) if others else constants[-1]

    def _steps(self, node: "exp.Expr") -> tuple[Value, list[Value], list[Value], Value]:
        """The arguments of `tier` and `graduated`: x, bounds, rates, rest."""
        if len(node.expressions) % 2:
            _fault(f"{node.name} takes a value, pairs of bound and rate, and a last rate", node)
        value, *pairs, rest = [self.value(argument) for argument in node.expressions]
        last: Decimal | None = None
        for bound, written in zip(pairs[::2], node.expressions[1::2], strict=False):
            constant = _constant(bound)
            if constant is not None and last is not None and constant <= last:
                _fault(f"the bounds of {node.name} must rise", written)
            last = last if constant is None else constant
        return value, pairs[::2], pairs[1::2], rest


_NODES: Mapping[str, Callable[[_Reader, "exp.Expr"], Value | Condition]] = {
    "literal": _Reader.literal,
    "boolean": _Reader.boolean,
    "var": _Reader.variable,
    "neg": _Reader.negative,
    **dict.fromkeys(_OPERATORS, _Reader.binary),
    "pow": _Reader.power_of,
    "not": _Reader.opposite,
    **dict.fromkeys(_CONNECTIVES, _Reader.connective),
    "comparisons": _Reader.comparisons,
    "if": _Reader.conditional,
    "case": _Reader.case,
    "anonymous": _Reader.call,
}

_FUNCTIONS: Mapping[str, tuple[int, int | None, Callable[[_Reader, "exp.Expr"], Value]]] = {
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

"""The formulas' back end in SQL: a checked tree becomes the body of a PL/pgSQL function of a usage and rates.

Everything is numeric and in parentheses of its own; texts are `E'…'` constants. Order of evaluation is kept by `case`
alone: `and` and `or` promise none in SQL. The numbers that a formula's text names are not in the body but in `p_rates`,
so that formulas of one shape share a function, and so that the planner has no constants to divide before their time.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import reduce
from typing import Any, ClassVar, NamedTuple

from sqlglot import exp
from sqlglot.generator import Generator

from ducto_pg.formula.arithmetic import CHAINED, COMPARISONS, OPERATORS, spine, trim_scale

_CALL_COUNT = (
    "case jsonb_typeof(p_usage -> 'tool_calls') when 'array'"
    " then jsonb_array_length(p_usage -> 'tool_calls')::numeric"
    " else coalesce(trim_scale((p_usage -> 'tool_calls')::numeric), 0) end"
)
_FUNCTIONS = {"min": "least", "max": "greatest"}
_SIGNS: Mapping[type[exp.Expr], str] = {
    exp.Add: "+",
    exp.Sub: "-",
    exp.Mul: "*",
    exp.Div: "/",
    exp.LT: "<",
    exp.LTE: "<=",
    exp.GT: ">",
    exp.GTE: ">=",
    exp.EQ: "=",
    exp.NEQ: "<>",
}
_WHOLE: Mapping[type[exp.Expr], tuple[str, str]] = {
    exp.IntDiv: ("div", "ducto_private.floor_divide"),
    exp.Mod: ("mod", "ducto_private.modulo"),
}
_QUOTED = str.maketrans({"\\": "\\\\", "'": "''", "\n": "\\n", "\r": "\\r", "\1": "\\001"})


class Function(NamedTuple):
    """`ducto_private.formula_<id>(p_usage jsonb, p_rates numeric[]) returns numeric`, and the rates of one price.

    The id is the first 8 bytes of the body's SHA-256 as a bigint; in the function's name it has 16 hex digits.
    """

    id: int
    body: str
    rates: tuple[Decimal, ...]

    @property
    def name(self) -> str:
        """The function's name in the schema `ducto_private`."""
        return f"formula_{self.id & (2**64 - 1):016x}"


def compile_function(tree: exp.Expr, defaults: Mapping[str, Decimal] | None = None) -> Function:
    """A checked tree as SQL. `defaults` are those of the config's metrics; a field without one is 0 when absent."""
    writer = _Writer(tree, defaults or {})
    result = writer.generate(tree, copy=False)
    declare = ["declare", *writer.declared] if writer.declared else []
    body = "\n".join([*declare, "begin", f"  return {result};", "end"])
    digest = hashlib.sha256(body.encode()).digest()
    return Function(int.from_bytes(digest[:8], "big", signed=True), body, tuple(writer.rates))


def text(value: str) -> str:
    """A text constant that means the same under every setting of `standard_conforming_strings`."""
    return f"E'{value.translate(_QUOTED)}'"


class _Writer(Generator):
    """Writes one tree. What it names more than once is `declared`, the numbers of its text become `rates`."""

    def __init__(self, tree: exp.Expr, defaults: Mapping[str, Decimal]) -> None:
        super().__init__(comments=False)
        self.rates: list[Decimal] = []
        self.defaults = defaults
        self.lifted: dict[int, str] = {}
        uses = Counter(node.name for node in tree.dfs() if isinstance(node, exp.Var))
        repeated = sorted(name for name, count in uses.items() if count > 1)
        self.declared = [
            f"  v_{name} constant {'text' if name == 'model' else 'numeric'} := {self.read(name)};" for name in repeated
        ]
        self.variables = {name: f"v_{name}" if name in repeated else "" for name in uses}

    def rate(self, value: Decimal) -> str:
        self.rates.append(value)
        return f"p_rates[{len(self.rates)}]"

    def read(self, name: str) -> str:
        """A usage field; absent, its default."""
        if name == "model":
            return "coalesce(p_usage ->> 'model', '')"
        if name == "tool_calls":
            return _CALL_COUNT
        default = trim_scale(self.defaults.get(name, Decimal(0)))
        return f"coalesce(trim_scale((p_usage -> '{name}')::numeric), {self.rate(default) if default else '0'})"

    def _variable(self, node: exp.Expr) -> str:
        return self.variables[node.name] or self.read(node.name)

    def _literal(self, node: exp.Expr) -> str:
        return text(node.name) if node.is_string else f"{node.name}::numeric"

    def _parameter(self, node: exp.Expr) -> str:
        """Sugar that copies an operand shares its nodes: they stay one rate."""
        if id(node) not in self.lifted:
            self.lifted[id(node)] = self.rate(Decimal(node.this.name))
        return self.lifted[id(node)]

    def _chain(self, node: exp.Expr) -> str:
        first, links = spine(node, CHAINED)
        return reduce(self._operation, links, self.sql(first))

    def _operation(self, left: str, node: exp.Expr) -> str:
        right = self.sql(node.expression)
        if type(node) in _SIGNS:
            return f"({left} {_SIGNS[type(node)]} {right})"
        plain, floored = _WHOLE[type(node)]
        function = plain if _never_negative(node.this) and _never_negative(node.expression) else floored
        return f"{function}({left}, {right})"

    def _connective(self, node: exp.Expr) -> str:
        pattern = (
            "case when {} then true else {} end" if isinstance(node, exp.Or) else "case when {} then {} else false end"
        )
        first, links = spine(node, (type(node),))
        return reduce(lambda left, link: pattern.format(left, self.sql(link.expression)), links, self.sql(first))

    def _comparison(self, node: exp.Expr) -> str:
        return f"({self.sql(node.this)} {_SIGNS[type(node)]} {self.sql(node.expression)})"

    def _call(self, node: exp.Expr) -> str:
        if node.name == "round":
            operand, digits = node.expressions
            return f"round({self.sql(operand)}, {digits.name})"
        if node.name == "percentile":
            position, *values = node.expressions
            return f"ducto_private.percentile({position.name}, array[{', '.join(map(self.sql, values))}])"
        return f"{_FUNCTIONS.get(node.name, node.name)}({', '.join(map(self.sql, node.expressions))})"

    def _case(self, node: exp.Expr) -> str:
        branches = " ".join(
            f"when {self.sql(branch.this)} then {self.sql(branch.args['true'])}" for branch in node.args["ifs"]
        )
        return f"case {branches} else {self.sql(node.args['default'])} end"

    TRANSFORMS: ClassVar[dict[type[exp.Expr], Callable[[Any, Any], str]]] = {
        exp.Literal: _literal,
        exp.Parameter: _parameter,
        exp.Var: _variable,
        exp.Neg: lambda self, node: f"(- {self.sql(node.this)})",
        **dict.fromkeys(OPERATORS, _chain),
        exp.Anonymous: _call,
        exp.Case: _case,
        **dict.fromkeys(COMPARISONS, _comparison),
        exp.Contains: lambda self, node: f"(strpos({self.sql(node.this)}, {self.sql(node.expression)}) > 0)",
        exp.And: _connective,
        exp.Or: _connective,
        exp.Not: lambda self, node: f"(not {self.sql(node.this)})",
    }


_LEAVES = (exp.Literal, exp.Parameter, exp.Var)


def _never_negative(node: exp.Expr) -> bool:
    """Whether it shows in the tree that the value cannot be below 0: usage and literals are not."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, exp.Sub | exp.Neg):
            return False
        if isinstance(node, exp.Case):
            waiting += [*(branch.args["true"] for branch in node.args["ifs"]), node.args["default"]]
        elif isinstance(node, exp.Anonymous):
            above = node.name == "max" and any(isinstance(argument, _LEAVES) for argument in node.expressions)
            if node.name != "abs" and not above:
                waiting += node.expressions
        elif type(node) in OPERATORS:
            waiting += [node.this, node.expression]
    return True

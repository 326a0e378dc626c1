"""The core of the formula language: what is left of a formula once its sugar is gone.

A closed set of nodes of two kinds. A *value* is a number; a *condition* is true or false. `NonZero` and `Truth` turn
one into the other. Both back ends (`arithmetic`, `plpgsql`) cover exactly these nodes, which mypy checks. Nodes are
immutable and may be shared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Node:
    """Any node of the core."""

    @cached_property
    def children(self) -> tuple["Node", ...]:
        """The nodes directly below this one, in the order in which they are written."""
        fields = (vars(self)[name] for name in self.__dataclass_fields__)
        flat = (item for field in fields for item in (field if isinstance(field, tuple) else (field,)))
        return tuple(item for item in flat if isinstance(item, Node))

    def leaves(self) -> Iterator["Node"]:
        """The nodes without children, shared ones each time."""
        waiting: list[Node] = [self]
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children)
            if not node.children:
                yield node

    @cached_property
    def size(self) -> int:
        """How many nodes the tree below and including this one has, shared ones counted each time."""
        return 1 + sum(child.size for child in self.children)


@dataclass(frozen=True)
class Number(Node):
    """A literal, never negative; its scale is that of the text."""

    value: Decimal


@dataclass(frozen=True)
class Variable(Node):
    """A numeric usage field."""

    name: str


@dataclass(frozen=True)
class Negative(Node):
    """Minus."""

    operand: "Value"


@dataclass(frozen=True)
class Arithmetic(Node):
    """A binary operator; `//` floors and `%` has the sign of the divisor, both exactly."""

    operator: Literal["+", "-", "*", "/", "//", "%"]
    left: "Value"
    right: "Value"


@dataclass(frozen=True)
class Call(Node):
    """A function of PostgreSQL's own; of equal values `min` and `max` answer the first."""

    function: Literal["min", "max", "abs", "ceil", "floor"]
    arguments: tuple["Value", ...]


@dataclass(frozen=True)
class Round(Node):
    """Rounding to so many digits after the point, half away from zero."""

    operand: "Value"
    digits: int


@dataclass(frozen=True)
class Percentile(Node):
    """The value at `position` (0 = the smallest) of the sorted values, interpolated linearly between neighbours."""

    position: Decimal
    values: tuple["Value", ...]


@dataclass(frozen=True)
class Choice(Node):
    """Only the branch taken is evaluated."""

    condition: "Condition"
    then: "Value"
    otherwise: "Value"


@dataclass(frozen=True)
class Truth(Node):
    """1 or 0."""

    condition: "Condition"


@dataclass(frozen=True)
class Comparison(Node):
    """Of two numbers."""

    operator: Literal["<", "<=", ">", ">=", "=", "<>"]
    left: "Value"
    right: "Value"


@dataclass(frozen=True)
class And(Node):
    """The right side is evaluated only if the left is true."""

    left: "Condition"
    right: "Condition"


@dataclass(frozen=True)
class Or(Node):
    """The right side is evaluated only if the left is false."""

    left: "Condition"
    right: "Condition"


@dataclass(frozen=True)
class Not(Node):
    """The opposite."""

    operand: "Condition"


@dataclass(frozen=True)
class NonZero(Node):
    """A number used as a condition."""

    operand: "Value"


@dataclass(frozen=True)
class ModelIs(Node):
    """The name of the model, as given ('' when absent), is this text."""

    text: str


@dataclass(frozen=True)
class ModelHas(Node):
    """The name of the model contains this text."""

    text: str


Value = Number | Variable | Negative | Arithmetic | Call | Round | Percentile | Choice | Truth
Condition = Comparison | And | Or | Not | NonZero | ModelIs | ModelHas


@dataclass(frozen=True)
class Formula:
    """A checked formula.

    `text` is as written, `tree` its core, `variables` the numeric usage fields that evaluating may read, `uses_model`
    whether it may read the name of the model.
    """

    text: str
    tree: Value
    variables: frozenset[str]
    uses_model: bool

"""A choice of subjects by their covariates: `age > 60 and sex == 'F'`. Comparisons, and/or/not, names and literals; no more.

The text is parsed and never executed: whatever is none of these is refused, with its place. Needs nothing but Python.
A name that Python would not take as one is written in backticks: `` `class` == 'A' ``. It may have several lines.
"""

from __future__ import annotations

import ast
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from brainsynth.errors import UserError

MAX_LENGTH, MAX_DEPTH = 2000, 50
Value = float | str
Row = Mapping[str, Value]
_COMPARISONS: dict[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}

_PIECES = re.compile(
    r"(?P<text>'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")|(?P<name>`(?:``|[^`])+`)"
    r"|(?P<blank>#[^\r\n]*|\\?(?:\r\n|\r|\n))|(?P<other>.)",
    re.DOTALL,
)


class Query:
    """A condition on one row: a mapping from names to numbers (NaN: missing) or text ("": missing).

    A comparison with a missing value does not hold, whichever it is; `not` turns that over.
    """

    def __init__(self, text: str, kinds: Mapping[str, bool]) -> None:
        """`kinds` says of each name whether it is a number. Raises UserError, with what may be written."""
        self.text, self.kinds = text, kinds
        if len(text) > MAX_LENGTH:
            raise self._refusal(f"it is longer than {MAX_LENGTH} characters")
        self._quoted: dict[str, str] = {}
        """Name that Python takes → the name in backticks."""
        try:
            tree = ast.parse(self._one_line(text).strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refusal(getattr(error, "msg", None) or type(error).__name__) from None
        self._holds = self._condition(tree.body, 0)

    def __call__(self, row: Row) -> bool:
        return self._holds(row)

    def _one_line(self, text: str) -> str:
        """The text without line ends and comments, and with plain names for those in backticks."""
        parts = []
        for match in _PIECES.finditer(text):
            kind, piece = match.lastgroup, match[0]
            if kind == "name":
                plain = f"_{len(self._quoted)}_"
                while plain in self.kinds:
                    plain += "_"
                self._quoted[plain] = piece[1:-1].replace("``", "`")
                piece = plain
            elif kind == "blank":
                piece = " "
            else:  # a line end in a text is part of it
                piece = re.sub(r"(?<!\\)\n", r"\\n", re.sub(r"(?<!\\)\r", r"\\r", piece))
            parts.append(piece)
        return "".join(parts)

    def _written(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        for plain, name in self._quoted.items():
            text = text.replace(plain, _as_written(name))
        return ascii(text)[:80]

    def _refusal(self, why: str) -> UserError:
        names = ", ".join(
            f"{_as_written(name)} ({'number' if number else 'text'})" for name, number in self.kinds.items()
        )
        return UserError(
            f"the condition {ascii(self.text)[:200]} is refused: {why}; write comparisons of names with numbers or 'text', "
            f"joined by and, or, not, such as \"age > 60 and sex == 'F'\"; names here: {names or 'none'}"
        )

    def _condition(self, node: ast.expr, depth: int) -> Callable[[Row], bool]:
        if depth > MAX_DEPTH:
            raise self._refusal("it is nested too deeply")
        if isinstance(node, ast.BoolOp):
            parts = [self._condition(value, depth + 1) for value in node.values]
            every = all if isinstance(node.op, ast.And) else any
            return lambda row: every(part(row) for part in parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._condition(node.operand, depth + 1)
            return lambda row: not inner(row)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = [self._pair(*pair) for pair in zip(sides, node.ops, sides[1:], strict=False)]
            return lambda row: all(pair(row) for pair in pairs)
        raise self._refusal(f"{self._written(node)} is not a comparison")

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Callable[[Row], bool]:
        first, number = self._operand(left)
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple):
                raise self._refusal("`in` wants a list, such as ['F', 'M']")
            items = [self._operand(item) for item in right.elts]
            self._same([number, *(kind for _, kind in items)])
            wanted = isinstance(op, ast.In)
            return lambda row: not missing(first(row)) and (first(row) in [item(row) for item, _ in items]) == wanted
        compare = _COMPARISONS.get(type(op))
        if compare is None:
            raise self._refusal("it compares by something else than < <= > >= == != in")
        second, other = self._operand(right)
        self._same([number, other])

        def holds(row: Row) -> bool:
            a, b = first(row), second(row)
            return not missing(a) and not missing(b) and compare(a, b)

        return holds

    def _same(self, numbers: Sequence[bool]) -> None:
        if len(set(numbers)) > 1:
            raise self._refusal("it compares a number with text")

    def _operand(self, node: ast.expr) -> tuple[Callable[[Row], Value], bool]:
        """The value of a name or a literal, and whether it is a number."""
        if isinstance(node, ast.Name):
            name = self._quoted.get(node.id, node.id)
            if name not in self.kinds and node.id not in self._quoted:
                # Python knows a name by its normal form (NFKC) alone.
                name = next((known for known in self.kinds if unicodedata.normalize("NFKC", known) == name), name)
            if name not in self.kinds:
                raise self._refusal(f"there is no {ascii(name)[:80]}")
            return lambda row: row[name], self.kinds[name]
        sign, literal = 1, node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, literal = -1, node.operand
        if isinstance(literal, ast.Constant):
            value = literal.value
            # A bool is an int, too, but not a number to compare with.
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
                number = sign * value
                return lambda row: number, True
            if isinstance(value, str) and sign == 1:
                return lambda row: value, False
        raise self._refusal(f"{self._written(node)} is neither a name nor a number nor 'text'")


def _as_written(name: str) -> str:
    """A name as a condition has to have it."""
    plain = name.isidentifier() and not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    return name if plain else f"`{name.replace('`', '``')}`"


def missing(value: Value) -> bool:
    """True for the values that stand for none."""
    return value == "" or (isinstance(value, float) and math.isnan(value))

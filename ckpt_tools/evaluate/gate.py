"""The language of ``--gate``, in which a user says what must hold after the correction.

For example: ``error <= before + 0.1 and ece <= 5``.

    GATE      := CONDITION {"and" CONDITION}
    CONDITION := METRIC ("<=" | "<" | ">=" | ">") SUM
    SUM       := PRODUCT {("+" | "-") PRODUCT}
    PRODUCT   := FACTOR {"*" FACTOR}
    FACTOR    := NUMBER | "before" | "before." METRIC | "-" FACTOR | "(" SUM ")"
    METRIC    := "error" | "error5" | "nll" | "ece"

``before`` alone is the condition's own metric before.

A SUM is arithmetic as Python writes it, so Python's own parser reads it. A gate cannot run
anything: every word and sign must stand in a closed list, and of what the parser makes of them only
the nodes of this grammar are computed.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_tools.errors import UsageError
from ckpt_tools.evaluate.metrics import METRICS

_Values = Mapping[str, float]

# The last alternative is the end of the text, which becomes an empty token.
_TOKEN = re.compile(
    r"[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?|[A-Za-z_][\w.]*|<=|>=|\S|\Z"
)
_NUMBER = re.compile(r"\.?[0-9]")
_COMPARISONS: Mapping[str, Callable[[float, float, float], bool]] = {  # NaN satisfies none of them
    "<=": lambda value, bound, slack: value <= bound + slack,
    "<": lambda value, bound, slack: value < bound - slack,
    ">=": lambda value, bound, slack: value >= bound - slack,
    ">": lambda value, bound, slack: value > bound + slack,
}
_OPERATIONS: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_BEFORE = ("before", *(f"before.{metric}" for metric in METRICS))
_VOCABULARY = (*METRICS, *_BEFORE, "and", *_COMPARISONS, *"+-*()")
_SUM = f"a sum of numbers, {', '.join(_BEFORE)}, with + - * and brackets"
_ROUNDING = 1e-9  # so that 5.1 <= 5.0 + 0.1 whatever the rounding of floats

# Python's parser and the evaluation below are recursive. These limits keep both far from the end of
# the stack.
_DEEPEST, _LONGEST = 50, 500


@dataclass(frozen=True)
class Condition:
    """One comparison of a metric with a bound.

    ``metrics`` are those that the bound needs from before.
    """

    text: str
    metric: str
    comparison: str
    bound: ast.expr
    metrics: frozenset[str]

    def failure(self, before: _Values, after: _Values) -> str | None:
        """Return a message with the numbers that break the condition; None if it holds.

        ``before`` and ``after`` map names of metrics to values; an infinite bound is compared, too.
        """
        terms = {f"before.{metric}": value for metric, value in before.items()}
        value, bound = (
            after[self.metric],
            _evaluate(self.bound, {**terms, "before": before.get(self.metric, math.nan)}),
        )
        slack = _ROUNDING * max(abs(value), abs(bound), 1.0)
        if _COMPARISONS[self.comparison](value, bound, slack if math.isfinite(slack) else 0.0):
            return None
        old = "".join(f", {name} before {before[name]:.6g}" for name in sorted(self.metrics))
        return f"{self.text}: {self.metric} is {value:.6g}, the bound {bound:.6g}{old}"


@dataclass(frozen=True)
class Gate:
    """A conjunction: all conditions must hold. ``text`` is the gate as the user wrote it."""

    text: str
    conditions: tuple[Condition, ...]

    @property
    def needs_before(self) -> bool:
        """Whether some condition looks at the metrics before."""
        return any(condition.metrics for condition in self.conditions)

    @property
    def metrics(self) -> frozenset[str]:
        """All metrics that the gate looks at, before or after."""
        return frozenset().union(*({condition.metric} | condition.metrics for condition in self.conditions))

    def failures(self, before: _Values, after: _Values) -> tuple[str, ...]:
        """Return a message for each condition that does not hold; none if the gate is passed."""
        messages = (condition.failure(before, after) for condition in self.conditions)
        return tuple(message for message in messages if message is not None)


def parse_gate(text: str) -> Gate:
    """Read a gate.

    Raises UsageError that names what was expected and what was found instead.
    """
    tokens = list(_TOKEN.finditer(text))
    _require_vocabulary(tokens)
    conditions, first = [], 0
    for last, token in enumerate(tokens):
        if token[0] in ("and", ""):
            conditions.append(_parse_condition(tokens[first : last + 1]))
            first = last + 1
    return Gate(text.strip(), tuple(conditions))


def _require_vocabulary(tokens: Sequence[re.Match[str]]) -> None:
    if len(tokens) > _LONGEST + 1:
        raise UsageError(f"--gate: expected at most {_LONGEST} words and signs, found {len(tokens) - 1}.")
    brackets = signs = 0
    for token in tokens[:-1]:
        brackets += (token[0] == "(") - (token[0] == ")")
        signs = signs + 1 if token[0] == "-" else 0
        if brackets + signs > _DEEPEST:
            raise _refusal(f"at most {_DEEPEST} brackets and signs inside each other", token)
        if token[0] not in _VOCABULARY and not _NUMBER.match(token[0]):
            raise _refusal(f"numbers and {' '.join(_VOCABULARY)}", token)
        if _NUMBER.match(token[0]) and not math.isfinite(float(token[0])):
            raise _refusal("a number that a float can hold", token)


def _parse_condition(tokens: Sequence[re.Match[str]]) -> Condition:
    """Read one condition. The last token is the ``and`` behind it, or the end of the text."""
    for token, choices in zip(tokens, (METRICS, _COMPARISONS), strict=False):
        if token[0] not in choices:
            raise _refusal(f"one of {' '.join(choices)}", token)
    metric, comparison, *terms, _ = tokens
    bound = _parse_sum(tokens[2:])
    names = {term[0].removeprefix("before.") for term in terms if term[0] in _BEFORE}
    needed = frozenset(metric[0] if name == "before" else name for name in names)
    text = metric.string[metric.start() : terms[-1].end()]
    return Condition(text, metric[0], comparison[0], bound, needed)


def _parse_sum(tokens: Sequence[re.Match[str]]) -> ast.expr:
    """Read all tokens but the last, which stands behind the sum."""
    words = [token[0] for token in tokens[:-1]]
    if words.count("(") > words.count(")"):
        raise _refusal("a closing bracket", tokens[-1])
    # Python takes no integers with leading zeros. One blank between two words, so that counting the
    # blanks before a column leads back to the token there.
    source = " ".join(re.sub(r"^0+(?=[0-9])", "", word) for word in words)
    try:
        bound = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        # The offset of a fault begins at 1; 0 is the end.
        raise _refusal(_SUM, tokens[source.count(" ", 0, error.offset) if error.offset else -1]) from None
    _evaluate(bound, dict.fromkeys(_BEFORE, 1.0))  # refuses nodes that are not in the grammar
    return bound


def _evaluate(node: ast.expr, values: _Values) -> float:
    """Compute a sum with the values of its names.

    Raises UsageError for a node that is not in the grammar.
    """
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name() | ast.Attribute() if (name := ast.unparse(node)) in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, values)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_evaluate(left, values), _evaluate(right, values))
    raise UsageError(f"--gate: expected {_SUM}, found {ast.unparse(node)!r}.")


def _refusal(expected: str, token: re.Match[str]) -> UsageError:
    actual = f"{token[0]!r} at character {token.start() + 1}" if token[0] else "the end"
    example = "'error <= before + 0.1 and ece <= 5'"
    return UsageError(
        f"--gate {token.string!r}: expected {expected}, found {actual}. For example: {example}."
    )

"""Tasks that have names: who answers the policy. Each is called like a user's own:

    f(prompt, turns, **arguments) -> Answer, a text, or None to end the conversation

`turns` are all that was said behind the prompt, the policy's last text at the end. A task keeps nothing between two
calls: what it needs to know stands in `turns` and in the prompt's fields. So any process can answer any turn, and one
that hangs can be stopped without another conversation losing anything.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import regex

from data.prompt import Prompt
from trainer.rollout.types import Answer, Turn

_CALL = regex.compile(r"<calculator>(.*?)</calculator>", regex.DOTALL)
_LONGEST, _LARGEST = 200, 10**30
"""Characters of an expression; size of any number on the way."""
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(prompt: Prompt, turns: Sequence[Turn], digits: int = 10) -> Answer:
    """Answers <calculator>12 * (3 + 4)</calculator> with the value; a text without such a call ends the conversation.

    The last call counts. It knows + - * / // % and brackets; what it cannot work out it answers with "error: ...".

    Args:
        digits: of numbers that are not whole.
    """
    calls = _CALL.findall(turns[-1].text)
    return Answer(calculated(calls[-1], digits)) if calls else Answer(None)


def calculated(expression: str, digits: int) -> str:
    """The value of an arithmetic expression as text, or what is wrong with it."""
    if len(expression) > _LONGEST:
        return f"error: longer than {_LONGEST} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: this is no arithmetic expression"
    return str(value) if value.denominator == 1 else f"{float(value):.{digits}g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = Fraction(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    else:
        raise ValueError("only numbers and operators")
    if abs(value) > _LARGEST:
        raise ValueError("too large")
    return value


TASKS: dict[str, Callable[..., Any]] = {"calculator": calculator}
"""Tasks by name."""

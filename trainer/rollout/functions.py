"""Functions by their spelling in a config: a name that is known here, or `path/to/file.py:function` of the user's own.

They are checked without being run, on every rank, and loaded where they run (`worker.py`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import regex

from data.config import nearest, nearest_path

Value = bool | int | float | str
"""What a config may give to a function as an argument."""
_OWN = "loom_functions_of_"


@dataclass(frozen=True)
class Parameters:
    """What a function can be given by name."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    any: bool
    """It takes every name (**arguments)."""


def split(spelled: str) -> tuple[str | None, str]:
    """(file, name); the file is None for a name that is known here."""
    file, colon, name = spelled.rpartition(":")
    return (file, name) if colon else (None, spelled)


def problem(
    spelled: str, known: Mapping[str, Callable[..., Any]], arguments: Mapping[str, Value], first: int
) -> tuple[str, str] | None:
    """Why a function cannot be used, as (reason, way out). Nothing of the user's is run.

    Args:
        known: the functions that have names.
        first: how many arguments it is given in any case, before those of the config.
    """
    file, name = split(spelled)
    if file is None:
        if name not in known:
            way = f"{nearest(name, tuple(known))} (one of {', '.join(known)}), or path/to/file.py:function"
            return "there is no function of this name", way
        wrong = _arguments_problem(name, _parameters_of(known[name], first), arguments)
        return wrong or _values_problem(known[name], arguments)
    path = Path(file).expanduser()
    if not path.is_file():
        return f"there is no file {file}", nearest_path(file)
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        return f"{file}{line} is not valid Python: {error}", "correct the file"
    names = _top_level(tree)
    if name not in names:
        functions = [each for each, node in names.items() if isinstance(node, _FUNCTION)]
        listed = f"it has {', '.join(functions)}" if functions else "it defines no function"
        return (
            f"{file} defines no {name or 'function without a name'}; {listed}",
            f"{file}:{(functions or ['score'])[0]}",
        )
    node = names[name]
    if isinstance(node, _FUNCTION):
        return _arguments_problem(name, _parameters_in(node, first), arguments)
    return None


def load(spelled: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function itself. A file is run as a module, with its folder on the path of imports.

    Raises:
        Whatever the user's file raises; AttributeError or TypeError where it holds no such function.
    """
    file, name = split(spelled)
    if file is None:
        return known[name]
    function = getattr(_module(Path(file).expanduser().resolve()), name)
    if not callable(function):
        raise TypeError(f"{name} in {file} is {type(function).__name__}, not a function")
    return function


def _module(path: Path) -> ModuleType:
    """A file as a module, run once in a process."""
    name = f"{_OWN}{'_'.join(path.with_suffix('').parts[1:])}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _top_level(tree: ast.Module) -> dict[str, ast.stmt]:
    """Names that a module defines, by what defines them."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (*_FUNCTION, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def _parameters_of(function: Callable[..., Any], first: int) -> Parameters:
    each = list(inspect.signature(function).parameters.values())
    named = [one for one in each if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)][first:]
    required = tuple(one.name for one in named if one.default is one.empty)
    return Parameters(tuple(one.name for one in named), required, any(one.kind is one.VAR_KEYWORD for one in each))


def _parameters_in(node: ast.FunctionDef | ast.AsyncFunctionDef, first: int) -> Parameters:
    args = node.args
    placed = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    needed = placed[: len(placed) - len(args.defaults)][first:]
    named = [arg.arg for arg in args.kwonlyargs]
    needed += [name for name, default in zip(named, args.kw_defaults, strict=True) if default is None]
    return Parameters((*placed[first:], *named), tuple(needed), args.kwarg is not None)


def _arguments_problem(name: str, parameters: Parameters, arguments: Mapping[str, Value]) -> tuple[str, str] | None:
    unknown = [each for each in arguments if each not in parameters.names]
    takes = f"it takes {', '.join(parameters.names)}" if parameters.names else "it takes no arguments"
    if unknown and not parameters.any:
        return f"{name} has no argument {unknown[0]}", takes
    missing = [each for each in parameters.required if each not in arguments]
    if missing:
        return f"{name} needs the argument {missing[0]}", f"arguments: {{{missing[0]}: VALUE}} ({takes})"
    return None


def _values_problem(function: Callable[..., Any], arguments: Mapping[str, Value]) -> tuple[str, str] | None:
    """Values of a type that the function does not take, and patterns that are none."""
    hints = get_type_hints(function)
    for name, value in arguments.items():
        hint = hints[name]
        choices = get_args(hint)
        if choices and value not in choices:
            return f"{name}={value} must be one of: {', '.join(map(str, choices))}", f"{name}: {choices[0]}"
        if not choices and type(value) is not hint and (hint, type(value)) != (float, int):
            return f"{name}={value} is not of the type {hint.__name__}", f"{name}: a value of the type {hint.__name__}"
        try:
            regex.compile({"pattern": "{}", "script": r"\p{{Script={}}}"}.get(name, "").format(value))
        except (regex.error, OverflowError, RecursionError) as error:
            return f"{name}={value!r} is not valid: {error}", f"correct {name}"
    return None

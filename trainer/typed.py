"""Plain mappings to frozen dataclasses, type by type, telling every mismatch instead of the first.

Understood field types: ``bool``, ``int``, ``float``, ``str``, unions of these, ``Literal``, ``X | None``,
``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]``, dataclasses of these, and a union of dataclasses that are told
apart by their ``name: Literal[...]`` (the stages).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trainer.problems import Problem, nearest

T = TypeVar("T")
MISSING = "???"
"""OmegaConf's mark of a value that must be given."""
SCALARS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class _Refused(Exception):
    """Ends the reading of one value whose problem has been written down."""


def build(cls: type[T], tree: object, key: str, problems: list[Problem], examples: Mapping[str, str]) -> T | None:
    """``tree`` as a ``cls``, or None when anything in it was refused; each refusal is appended to ``problems``.

    ``key`` is the dotted path of ``tree`` ("" at the root) and ``examples`` maps keys to a way that works.
    """
    try:
        return _Reader(problems, examples).section(cls, tree, key)
    except _Refused:
        return None


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass; a list of sections ends in ``[]``, as in ``data.sources[].path``.

    A section that may be null (``model.moe``) is a key itself, besides those in it.
    """
    found: dict[str, None] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        inner, many = inner_sections(hints[field.name])
        if not inner or not is_section(hints[field.name]):
            found[path] = None
        for section in inner:
            found |= dict.fromkeys(keys(section, f"{path}[]." if many else f"{path}."))
    return list(found)


def inner_sections(hint: Any) -> tuple[tuple[type, ...], bool]:
    """The dataclasses behind a field type (several for a union of them) and whether the field holds a list of it."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return (hint,), False
    parts = [inner_sections(arg) for arg in get_args(hint)]
    found = tuple(section for inner, _ in parts for section in inner)
    return found, bool(found) and (get_origin(hint) is tuple or any(many for _, many in parts))


def is_section(hint: Any) -> bool:
    """Whether a field is a section that is always there: a dataclass, or one of several."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return all(dataclasses.is_dataclass(member) for member in members)


def names_of(section: type) -> tuple[str, ...]:
    """What ``name`` may be in one dataclass of a union."""
    return get_args(get_type_hints(section)["name"])


class _Reader:
    """Reads one tree; collects what it refuses."""

    def __init__(self, problems: list[Problem], examples: Mapping[str, str]) -> None:
        self.problems = problems
        self.examples = dict(examples)

    def refuse(self, key: str, value: object, reason: str, way_out: str) -> _Refused:
        self.problems.append(Problem(key, value, reason, way_out))
        return _Refused()

    def section(self, cls: Any, tree: object, key: str) -> Any:
        """One dataclass from a mapping: unknown, missing and mistyped keys are all told before giving up."""
        if not isinstance(tree, Mapping):
            names = ", ".join(f.name for f in dataclasses.fields(cls))
            way = self._example(key.partition("[")[0], f"{key}.KEY=VALUE")
            raise self.refuse(key, tree, f"expected a section with the keys {names}", way)
        hints = get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        prefix = f"{key}." if key else ""
        before = len(self.problems)
        for name in tree:
            if name not in fields:
                close = nearest(str(name), fields)
                way = f"did you mean {prefix}{close[0]}?" if close else f"{prefix}X with X one of: {', '.join(fields)}"
                self.problems.append(Problem(f"{prefix}{name}", tree[name], "there is no such setting", way))
        values: dict[str, Any] = {}
        for name, field in fields.items():
            path = f"{prefix}{name}"
            if type(field.default) in SCALARS:
                self.examples.setdefault(path, f"{path}={_bare(field.default)}")
            if name in tree and tree[name] != MISSING:
                try:
                    values[name] = self.value(hints[name], tree[name], path)
                except _Refused:
                    continue
            elif name in tree or (
                field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            ):
                self.problems.append(Problem(path, MISSING, "must be given", self._example(path, f"{path}=VALUE")))
        if len(self.problems) > before:
            raise _Refused
        try:
            return cls(**values)
        except ValueError as err:
            raise self.refuse(key, "the section", str(err), f"change {key}") from err

    def value(self, hint: Any, given: object, key: str) -> Any:
        """One value of the type ``hint``."""
        origin = get_origin(hint)
        if origin in (Union, types.UnionType):
            return self._union(hint, given, key)
        if origin is Literal:
            return self._literal(get_args(hint), given, key)
        if origin is tuple:
            return self._tuple(get_args(hint), given, key)
        if origin is dict:
            if not isinstance(given, Mapping):
                raise self.refuse(key, given, "expected a mapping", self._example(key, f"'{key}={{NAME: VALUE}}'"))
            return {str(k): self.value(get_args(hint)[1], v, f"{key}.{k}") for k, v in given.items()}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.section(hint, given, key)
        assert hint in SCALARS, f"{key}: the door does not know the field type {hint}"
        return self._scalar(hint, given, key)

    def _union(self, hint: Any, given: object, key: str) -> Any:
        members = [arg for arg in get_args(hint) if arg is not type(None)]
        if given is None and len(members) < len(get_args(hint)):
            return None
        if len(members) == 1:
            return self.value(members[0], given, key)
        if all(member in SCALARS for member in members):
            return self._any_scalar(members, given, key)
        assert all(dataclasses.is_dataclass(member) for member in members), f"{key}: the door cannot read {hint}"
        by_name = {name: member for member in members for name in names_of(member)}
        name = given.get("name") if isinstance(given, Mapping) else None
        if name not in by_name:
            return self._literal(tuple(by_name), name, f"{key}.name")
        return self.section(by_name[name], given, key)

    def _any_scalar(self, members: list[Any], given: object, key: str) -> Any:
        if type(given) in members:
            return given
        wanted = " or ".join(SCALARS[member] for member in members)
        raise self.refuse(key, given, f"expected {wanted}, got {_kind(given)}", self._example(key, f"{key}=VALUE"))

    def _literal(self, choices: tuple[Any, ...], given: object, key: str) -> Any:
        for choice in choices:
            if given == choice and type(given) is type(choice):
                return choice
        listed = ", ".join(str(choice) for choice in choices)
        if isinstance(given, (int, float)) and not isinstance(given, bool) and isinstance(choices[0], int):
            best = min(choices, key=lambda choice: abs(choice - given))
        else:
            best = next(iter(nearest(str(given), [str(c) for c in choices])), choices[0])
        raise self.refuse(key, given, f"must be one of: {listed}", f"{key}={best}")

    def _tuple(self, args: tuple[Any, ...], given: object, key: str) -> tuple[Any, ...]:
        if not isinstance(given, (list, tuple)):
            raise self.refuse(key, given, "expected a list", self._example(key, f"'{key}=[{_bare(given)}]'"))
        repeated = len(args) == 2 and args[1] is Ellipsis
        if not repeated and len(given) != len(args):
            raise self.refuse(
                key, given, f"expected {len(args)} values, got {len(given)}", self._example(key, "give all")
            )
        hints = [args[0]] * len(given) if repeated else list(args)
        items, refused = [], False
        for i, (hint, item) in enumerate(zip(hints, given, strict=True)):
            try:
                items.append(self.value(hint, item, f"{key}[{i}]"))
            except _Refused:
                refused = True
        if refused:
            raise _Refused
        return tuple(items)

    def _scalar(self, hint: type, given: object, key: str) -> Any:
        if type(given) is hint:
            return given
        if hint is float and type(given) is int:
            return float(given)
        way = self._example(key, f"{key}={SCALARS[hint].upper()}" if hint is not bool else f"{key}=true or {key}=false")
        if hint is int and isinstance(given, float) and given.is_integer():
            way = f"{key}={int(given)}"
        elif hint is str and given is not None:
            way = f"""quote it: '{key}="{_bare(given)}"'"""
        elif hint is bool and given in (0, 1):
            way = f"{key}={'true' if given else 'false'}"
        raise self.refuse(key, given, f"expected {SCALARS[hint]}, got {_kind(given)}", way)

    def _example(self, key: str, otherwise: str) -> str:
        return self.examples.get(key, otherwise)


def _bare(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "a section"
    return SCALARS.get(type(value), type(value).__name__)

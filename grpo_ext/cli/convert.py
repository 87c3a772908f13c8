"""Convert values from YAML or the command line to the type of a field."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable
from typing import Any

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


class SettingsError(ValueError):
    """A setting is wrong. The command prints the message without a traceback."""


def suggest(name: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'?`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else ""


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field that the constructor of a dataclass takes."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def convert(name: str, hint: Any, value: Any) -> Any:
    """Convert `value` to the type `hint`.

    The field's type decides, because YAML reads ``2e-4`` as text and ``no`` as False, and the command line has only
    text.

    Args:
        name: name of the field, for the message.
        hint: an annotation: a plain type, Optional, a Union, a Literal, an Enum, a list or a dict.
        value: a YAML value, or text from the command line.

    Raises:
        SettingsError: the value does not fit; the message names the field, the value and the type.
    """
    members = _members(hint)
    for attempt in _ATTEMPTS:
        for member in members:
            done, result = attempt(member, value, len(members) > 1)
            if done:
                return result
    raise SettingsError(f"{name}: {value!r} is not {_describe(members)}")


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(hint) for part in _members(member)]
    return [hint]


_NO = (False, None)


def _literal(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    if typing.get_origin(hint) is not typing.Literal:
        return _NO
    for choice in typing.get_args(hint):
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return True, choice
        if isinstance(value, str) and not isinstance(choice, str) and value.lower() == str(choice).lower():
            return True, choice
        if (value is None and choice == "none") or (value is False and choice == "no"):
            return True, choice
    return _NO


def _none(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    if hint not in (None, type(None)):
        return _NO
    return (value is None or (isinstance(value, str) and value.lower() in ("null", "~"))), None


def _boolean(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    if hint is not bool:
        return _NO
    if isinstance(value, bool):
        return True, value
    if isinstance(value, str) and not (union and value.lower() not in ("true", "false")):
        if value.lower() in _TRUE:
            return True, True
        if value.lower() in _FALSE:
            return True, False
    return _NO


def _integer(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    if hint is not int or isinstance(value, bool):
        return _NO
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _NO
    return (True, int(number)) if number.is_integer() else _NO


def _number(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    if hint is not float or isinstance(value, bool):
        return _NO
    try:
        return True, float(value)
    except (TypeError, ValueError):
        return _NO


def _container(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    kind = typing.get_origin(hint) or hint
    if kind not in (list, dict, tuple):
        return _NO
    if isinstance(value, str):
        if kind is not dict and not union and not value.lstrip().startswith("["):
            value = [part.strip() for part in value.split(",")]
        else:
            if not value.lstrip().startswith("{" if kind is dict else "["):
                return _NO
            import yaml

            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                return _NO
    if kind is dict:
        return isinstance(value, dict), value
    if not isinstance(value, (list, tuple)):
        return _NO
    inner = typing.get_args(hint)
    try:
        items = [convert("", inner[0], item) for item in value] if inner else list(value)
    except SettingsError:
        return _NO
    return True, kind(items)


def _text(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        text = "no" if value is False else str(value)
        found = [member.value for member in hint if member.value == text]
        return (True, found[0]) if found else _NO
    if hint is not str:
        return hint is Any, value
    if isinstance(value, bool):
        return (True, "no") if value is False and union else _NO
    return isinstance(value, (str, int, float)), str(value)


def _loose_none(hint: Any, value: Any, union: bool) -> tuple[bool, Any]:
    return hint in (None, type(None)) and isinstance(value, str) and value.lower() == "none", None


# The order matters: strict types come before text, which accepts anything.
_ATTEMPTS = (_literal, _none, _boolean, _integer, _number, _container, _text, _loose_none)


def _describe(members: list[Any]) -> str:
    names: list[str] = []
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            names.extend(repr(choice) for choice in typing.get_args(member))
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            names.extend(repr(choice.value) for choice in member)
        elif member in (None, type(None)):
            names.append("null")
        else:
            plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            names.append(plain.get(member) or str(member))
    return " or ".join(dict.fromkeys(names))

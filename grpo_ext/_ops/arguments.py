"""An operator's arguments as a NamedTuple: its schema comes from the annotations, its implementations take the tuple.

A field that is itself a NamedTuple stands for its fields, in their order: torch's schemas are flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

Arguments = TypeVar("Arguments")
Result = TypeVar("Result")

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    list[bool]: "bool[]",
    list[float]: "float[]",
}


def _leaves(arguments: type) -> Iterator[tuple[str, str]]:
    for name, hint in get_type_hints(arguments).items():
        if hint in _SCHEMA_TYPES:
            yield name, _SCHEMA_TYPES[hint]
        else:
            yield from _leaves(hint)


def schema_of(arguments: type, mutates: Sequence[str] = ()) -> str:
    """The arguments of a ``torch.library`` schema, e.g. ``"Tensor(a!) grad, Tensor? mask, float[] spec"``.

    Args:
        arguments: a NamedTuple class; see `_SCHEMA_TYPES` for the annotations that it may have.
        mutates: names of the tensors that the operator changes.
    """
    alias = {name: f"({'abcdef'[k]}!)" for k, name in enumerate(mutates)}
    return ", ".join(
        f"{kind.replace('Tensor', f'Tensor{alias.get(name, str())}', 1)} {name}" for name, kind in _leaves(arguments)
    )


def _grouping(arguments: type) -> Callable[[list[Any]], Any]:
    """Build ``arguments`` from a list of its flat values, which is overwritten."""
    nested = []
    for place, hint in enumerate(get_type_hints(arguments).values()):
        if hint not in _SCHEMA_TYPES:
            nested.append((place, place + len(list(_leaves(hint))), _grouping(hint)))

    def group(values: list[Any]) -> Any:
        for start, stop, inner in nested:  # each takes one place from then on
            values[start:stop] = [inner(values[start:stop])]
        return tuple.__new__(arguments, values)

    return group


def with_arguments(arguments: type[Arguments], function: Callable[[Arguments], Result]) -> Callable[..., Result]:
    """``function`` of one ``arguments`` tuple, as a function of the flat values that torch's dispatcher passes.

    Raises:
        TypeError: there are more or fewer values than the schema has arguments.
    """
    group, names = _grouping(arguments), [name for name, _ in _leaves(arguments)]
    count = len(names)

    def flat(*values: Any) -> Result:
        if len(values) != count:
            raise TypeError(f"{len(values)} arguments for an operator of {count}: {', '.join(names)}")
        return function(group(list(values)))

    return flat

"""How arguments reach the kernels: schemas from NamedTuples, and C++ structs from dicts by name."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_ext import _C
from grpo_ext._ops import logit_transform
from grpo_ext._ops.arguments import schema_of, with_arguments
from grpo_ext._ops.packing import rows_of
from grpo_ext._ops.schemas import OPERATORS


class Inner(NamedTuple):
    mask: Tensor | None
    scale: float


class Outer(NamedTuple):
    grad: Tensor
    inner: Inner
    spec: list[float]
    wanted: bool


def test_a_schema_comes_from_annotations() -> None:
    assert schema_of(Outer) == "Tensor grad, Tensor? mask, float scale, float[] spec, bool wanted"
    assert schema_of(Outer, ["grad", "mask"]).startswith("Tensor(a!) grad, Tensor(b!)? mask, ")


def test_flat_values_become_nested_tuples() -> None:
    grad = torch.zeros(1)
    same = with_arguments(Outer, lambda outer: outer)
    assert same(grad, None, 0.5, [1.0], True) == Outer(grad, Inner(None, 0.5), [1.0], True)
    with pytest.raises(TypeError, match="4 arguments for an operator of 5: grad, mask, scale, spec, wanted"):
        same(grad, None, 0.5, [1.0])


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_the_names_of_their_tuple(name: str) -> None:
    schema = getattr(torch.ops.grpo_ext, name).default._schema
    text = re.sub(r"\([a-z]!\)", "", str(schema).partition("(")[2].partition(") ->")[0])
    assert text == schema_of(OPERATORS[name])


def rows(**changes: Any) -> dict[str, Any]:
    logits, ids, out = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    return rows_of(logits, logit_transform(1.0, None, 1.0), ids=ids, logps=out, lse=out) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "19 values for 18 fields .the fields are dtype, batch, length, vocab, "),
        ({"vocab": None}, "None for vocab"),
        ({"vocab": 2.5}, "2.5 for vocab"),
        ({"vocab": 1 << 70}, "1180591620717411303424 for vocab"),
        ({"logits": "x"}, "'x' for logits"),
        ({"transform": (1.0, 0.0)}, "2 values for 3 fields .the fields are scale, softcap, inv_temperature"),
        ({"transform": 1.0}, "1.0 for a struct"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.cpu_row_stats(rows(**changes), 1)


def test_a_missing_field_is_named() -> None:
    wrong = rows(colour=1)
    del wrong["length"]
    with pytest.raises(ValueError, match="no value for length"):
        _C.cpu_row_stats(wrong, 1)

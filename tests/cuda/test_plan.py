"""Which kernel serves a call, and how a row is divided: decided on the host, so no GPU is needed."""

from __future__ import annotations

import pytest

from grpo_ext import _C
from grpo_ext._ops import DTYPE_CODES

H100_SHARED_BYTES = 232_448
CODES = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()}


def plan(
    vocab: int,
    dtype: str = "bfloat16",
    architecture: int = 90,
    shared: int = H100_SHARED_BYTES,
    statistics_only: bool = False,
) -> dict:
    return _C.cuda_plan(architecture, shared, CODES[dtype], vocab, statistics_only)


@pytest.mark.parametrize("architecture", [80, 86, 89, 100, 103, 120])
def test_clusters_are_for_hopper(architecture: int) -> None:
    assert plan(151_936, architecture=architecture, shared=101_376)["route"] == "streaming"
    assert plan(151_936)["route"] == "ring"


# Measured choices on an H100 (bench/NOTES.md): CTAs per row, stages in shared memory.
@pytest.mark.parametrize(
    ("vocab", "dtype", "shares", "stages"),
    [
        (7, "bfloat16", 1, 8),
        (32_000, "bfloat16", 2, 6),
        (49_152, "bfloat16", 2, 4),
        (50_257, "float16", 2, 4),
        (128_256, "bfloat16", 8, 6),
        (151_936, "bfloat16", 8, 5),
        (262_144, "bfloat16", 8, 3),
        (151_936, "float32", 8, 2),
    ],
)
def test_measured_choices(vocab: int, dtype: str, shares: int, stages: int) -> None:
    got = plan(vocab, dtype)
    assert (got["route"], got["shares"], got["stages"], got["groups"]) == ("ring", shares, stages, 2)


def test_statistics_of_short_rows_are_for_many_small_blocks() -> None:
    for vocab, route in ((7, "streaming"), (8191, "streaming"), (8192, "ring"), (151_936, "ring")):
        assert plan(vocab, statistics_only=True)["route"] == route
        assert plan(vocab)["route"] == "ring"
    assert plan(151_936, architecture=80, statistics_only=True)["route"] == "streaming"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("vocab", [1, 7, 63, 64, 65, 1000, 32_000, 50_257, 151_669, 262_144, 1_000_003])
def test_shares_cover_the_row_and_fit(vocab: int, dtype: str) -> None:
    got = plan(vocab, dtype)
    assert got["shares"] in (1, 2, 4, 8)  # portable cluster sizes
    assert got["share"] % 64 == 0  # whole 128-byte lines, also of 16-bit elements
    assert got["shares"] * got["share"] >= vocab
    if got["route"] == "ring":
        assert got["stage_bytes"] % 128 == 0
        assert got["stage_bytes"] >= got["share"] * (4 if dtype == "float32" else 2) + 288
        assert 2 <= got["stages"] <= 8
        assert got["stages"] * got["stage_bytes"] <= H100_SHARED_BYTES - 28 * 1024


def test_the_order_of_sums_depends_on_vocabulary_and_dtype_only() -> None:
    """So that a log probability has the same bits from every kernel on every device."""
    for vocab in (1000, 50_257, 151_936, 1_000_003):
        divisions = {
            (p["shares"], p["share"])
            for architecture, shared in ((80, 166_912), (86, 101_376), (90, H100_SHARED_BYTES), (120, 101_376))
            for p in [plan(vocab, architecture=architecture, shared=shared)]
        }
        assert len(divisions) == 1


def test_rows_too_large_for_shared_memory_are_streamed() -> None:
    assert plan(1_000_003, "float32")["route"] == "streaming"

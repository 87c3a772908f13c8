"""Choice of the kernel for a call, and of the division of a row; decided on the host, so no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from grpo_ext import _C
from grpo_ext._ops import DTYPE_CODES, loss_spec
from grpo_ext._ops.packing import policy_of
from grpo_ext._ops.schemas import PolicyTensors
from grpo_ext.config import LossConfig

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
        (201_088, "bfloat16", 8, 4),
        (65_536, "bfloat16", 4, 4),
        (151_669, "bfloat16", 8, 5),  # rows start between 16-byte blocks
        (128_256, "bfloat16", 8, 5),
        (151_936, "bfloat16", 8, 4),
        (262_144, "bfloat16", 16, 5),
        (151_936, "float32", 16, 4),
    ],
)
def test_measured_choices(vocab: int, dtype: str, shares: int, stages: int) -> None:
    got = plan(vocab, dtype)
    assert (got["route"], got["shares"], got["stages"], got["groups"]) == ("ring", shares, stages, 2)


def test_statistics_take_all_stages_that_fit() -> None:
    """Only where gradients are written as well do stages displace each other in L2."""
    assert (plan(151_936)["stages"], plan(151_936, statistics_only=True)["stages"]) == (4, 5)


def test_statistics_of_short_rows_are_for_many_small_blocks() -> None:
    for vocab, route in ((7, "streaming"), (8191, "streaming"), (8192, "ring"), (151_936, "ring")):
        assert plan(vocab, statistics_only=True)["route"] == route
        assert plan(vocab)["route"] == "ring"
    assert plan(151_936, architecture=80, statistics_only=True)["route"] == "streaming"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("vocab", [1, 7, 63, 64, 65, 1000, 32_000, 50_257, 151_669, 262_144, 1_000_003])
def test_shares_cover_the_row_and_fit(vocab: int, dtype: str) -> None:
    got = plan(vocab, dtype)
    assert got["shares"] in (1, 2, 4, 8, 16)  # 16 are not portable, but Hopper's limit
    assert got["share"] % 64 == 0  # whole 128-byte lines, also of 16-bit elements
    assert got["shares"] * got["share"] >= vocab
    if got["route"] == "ring":
        assert got["stage_bytes"] % 128 == 0
        assert got["stage_bytes"] >= got["share"] * (4 if dtype == "float32" else 2) + 288
        assert 2 <= got["stages"] <= 8
        records = 2 * 4 * 8 * 16 * got["shares"]  # groups, rows on their way, warps, bytes
        assert got["stages"] * got["stage_bytes"] + records <= H100_SHARED_BYTES - 17_152


def test_the_order_of_sums_depends_on_vocabulary_and_dtype_only() -> None:
    """So that a log probability has the same bits from every kernel on every device."""
    for vocab in (1000, 50_257, 151_936, 1_000_003):
        divisions = {
            (p["shares"], p["share"])
            for architecture, shared in ((80, 166_912), (86, 101_376), (90, H100_SHARED_BYTES), (120, 101_376))
            for p in [plan(vocab, architecture=architecture, shared=shared)]
        }
        assert len(divisions) == 1


def local_constants(config: LossConfig, batch: int, length: int, sampling: bool = False) -> bool:
    """What the row kernel decides for a call of that shape; tensors are only there or not."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    some, logps = torch.ones(batch), torch.zeros(batch, length)
    tensors = PolicyTensors(mask, some, logps, None, logps if sampling else None, None, None, None)
    policy = policy_of(
        tensors, loss_spec(config, 1.0), logps=logps, entropy=logps, loss=some, kl=logps, metrics=some
    )  # fmt: skip
    return _C.cuda_computes_constants_in_kernel(policy)


@pytest.mark.parametrize(
    ("batch", "length", "expected"),
    [
        (1, 1, True),
        (8, 1024, True),
        (64, 1, True),
        (64, 1009, True),
        (64, 2033, True),  # two pieces, wherever the sequences begin
        (64, 2034, False),
        (65, 1, False),  # shared memory holds the constants of 64
        (1, 131_057, True),
        (1, 131_058, False),  # counting takes longer than the kernel that it saves
        (3, 65_536, False),
    ],
)
def test_one_launch_as_long_as_counting_is_short(batch: int, length: int, expected: bool) -> None:
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"):
        config = LossConfig(loss_type=loss_type, epsilon_high=5.0, max_completion_length=100)
        assert local_constants(config, batch, length) is expected


def test_constants_that_need_log_probabilities_come_from_a_kernel() -> None:
    sequence = LossConfig(importance_sampling_level="sequence")
    weights = LossConfig(vllm_importance_sampling_mode="sequence_truncate")
    assert not local_constants(sequence, 2, 10)
    assert not local_constants(LossConfig(loss_type="vespo"), 2, 10)
    assert not local_constants(LossConfig(off_policy_mask_threshold=0.5), 2, 10)
    assert not local_constants(weights, 2, 10, sampling=True)
    assert local_constants(weights, 2, 10)  # no sampling log probabilities, no weights
    assert local_constants(LossConfig(vllm_importance_sampling_mode="token_truncate"), 2, 10, sampling=True)


def test_rows_too_large_for_shared_memory_are_streamed() -> None:
    assert plan(1_000_003, "float32")["route"] == "streaming"

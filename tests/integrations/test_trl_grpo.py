"""TRL's GRPO trainer unpatched and patched: equal numbers at every step from one seed, computed by our kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl_runs import Case, compared, grid, largest_difference, pairwise, patched, run_grpo

import grpo_ext.integrations.trl as ours
from grpo_ext.tasks.models import load_model

patching = contextlib.contextmanager(patched)

# Relative to the larger of the value and 1e-2. A loss is a sum of larger terms that cancel, and AdamW hands rounding
# from step to step: over the whole grid the largest difference is 1.6e-5, and 6e-5 for luspo and vespo, whose terms
# are whole sequences.
TOLERANCE = {"luspo": 2e-4, "vespo": 2e-4}


def assert_same(case: Case, stock: list[dict[str, float]], mine: list[dict[str, float]]) -> float:
    worst, where = largest_difference(stock, mine)
    assert worst <= TOLERANCE.get(case.loss_type, 5e-5), where
    return worst


def check(case: Case, folder: Path) -> dict[str, float]:
    """Largest difference of the patched and of the fused run."""
    found: dict[str, float] = {}
    stock = run_grpo(case, str(folder / "stock"))
    names = set(compared(stock[-1]))
    assert {"loss", "grad_norm", "entropy"} <= names
    assert ("kl" in names) == (case.beta != 0)
    # One reference call per generation batch with beta; one for the old log probabilities where a batch is used twice.
    forwards = 2 * case.num_iterations * case.accumulation
    for fuse_loss in (False, True):
        with patching(fuse_loss):
            mine = run_grpo(case, str(folder / f"ours_{fuse_loss}"))
            status = ours.status()
        found["fused" if fuse_loss else "patched"] = assert_same(case, stock, mine)
        assert not status.handed_back
        assert not status.losses_handed_back
        assert status.losses_served == (forwards if fuse_loss else 0)
        assert status.served.get("with gradient", 0) == (0 if fuse_loss else forwards)
        wanted = (case.beta != 0) + (case.num_iterations > 1)
        skipped = 0 if fuse_loss else status.parts["skip_zero_gradient_sequences"].served
        assert (status.served.get("without gradient", 0) > 0) == (wanted > 0 or skipped > 0)
    return found


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_pairs_of_settings(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.grid
@pytest.mark.parametrize("case", grid(), ids=str)
def test_whole_grid(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for run, difference in check(case, tmp_path).items():
        record_property(run, difference)  # for --junitxml: make test-all keeps build/grid.xml


def test_settings_matter(tmp_path: Path) -> None:
    """The comparison would see a change of a setting in the fifth digit."""
    first = run_grpo(Case(), str(tmp_path / "a"))
    second = run_grpo(Case(), str(tmp_path / "b"), temperature=1.0001)
    assert largest_difference(first, second)[0] > 1e-5
    assert largest_difference(first, run_grpo(Case(), str(tmp_path / "c")))[0] == 0


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load_model("smollm2-135m-instruct", dtype="float32")


@pytest.mark.parametrize(
    ("case", "length"),
    [
        (Case("dapo", "token", lora=True, beta=0.05), 4),
        pytest.param(Case("grpo", "sequence", lora=True, num_iterations=2), 8, marks=pytest.mark.grid),
        pytest.param(Case("cispo", "token", lora=False, accumulation=2), 8, marks=pytest.mark.grid),
    ],
    ids=str,
)
def test_small_real_model(case: Case, length: int, smollm: Any, tmp_path: Path) -> None:
    """SmolLM2-135M: 49,152 tokens of vocabulary, a head tied to the embedding. The first case, which is run each time,
    takes one step: what a step does to the next one is the same for every model."""
    model, tokenizer = smollm

    def run(name: str) -> list[dict[str, float]]:
        mine = copy.deepcopy(model)
        options = {"max_steps": 1} if length == 4 else {}
        return run_grpo(
            case, str(tmp_path / name), model=mine, tokenizer=tokenizer, max_completion_length=length, **options
        )

    stock = run("stock")
    for fuse_loss in (False, True):
        with patching(fuse_loss):
            mine = run(f"ours_{fuse_loss}")
            status = ours.status()
        worst, where = largest_difference(stock, mine)
        assert worst <= 1e-4, where
        assert not status.handed_back
        assert status.losses_served if fuse_loss else status.served["with gradient"]


def test_entropy_bonus_has_its_gradient(tmp_path: Path) -> None:
    """The loss is handed back to TRL, the vocabulary is not; the entropy then brings a gradient."""
    changes: dict[str, Any] = {"entropy_coef": 0.1}
    stock = run_grpo(Case(), str(tmp_path / "stock"), **changes)
    with patching(True):
        mine = run_grpo(Case(), str(tmp_path / "ours"), **changes)
        status = ours.status()
    assert_same(Case(), stock, mine)
    assert status.losses_served == 0
    assert sum(status.losses_handed_back.values()) == 2
    assert status.served == {"with gradient": 2}
    assert "entropy bonus" in str(status)


def test_entropy_quantile_is_handed_back(tmp_path: Path) -> None:
    stock = run_grpo(Case(), str(tmp_path / "stock"), top_entropy_quantile=0.5)
    with patching(True):
        mine = run_grpo(Case(), str(tmp_path / "ours"), top_entropy_quantile=0.5)
        status = ours.status()
    assert_same(Case(), stock, mine)
    assert status.losses_served == 0
    assert next(iter(status.losses_handed_back)).startswith("top_entropy_quantile")

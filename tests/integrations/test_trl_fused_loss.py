"""`patch(fuse_loss=True)` on hand-written batches: every input of TRL's loss, gradients, bf16, tool masks."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import LOSS_TYPES, patched, prompts, reward, settings, tiny_model, tiny_tokenizer

import grpo_ext.integrations.trl as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

patching = contextlib.contextmanager(patched)
BATCH, PROMPT, LENGTH = 4, 3, 7


def build(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    beta = changes.pop("beta", 0.0)  # without the reference model that TRL would load: its numbers come with the batch
    config = trl.GRPOConfig(
        **settings(
            str(folder), per_device_train_batch_size=BATCH, num_generations=2, max_completion_length=LENGTH,
            epsilon=0.1, temperature=0.9, **changes,
        )
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(tiny_model(dtype=dtype), reward, config, prompts(), processing_class=tiny_tokenizer())
    trainer.beta = beta
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def batch(*, old: bool = True, ref: bool = False, weights: str | None = None, tools: bool = False) -> dict[str, Any]:
    """Right-padded completions, one of them empty, and log probabilities that differ enough to be clipped."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.tensor([LENGTH, 4, 0, 6])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    inputs: dict[str, Any] = {
        "prompt_ids": torch.randint(3, 97, (BATCH, PROMPT), generator=generator),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.randint(3, 97, (BATCH, LENGTH), generator=generator),
        "completion_mask": mask,
        "advantages": torch.tensor([0.7, -1.1, 0.4, 0.0]),
        "num_items_in_batch": mask.sum() * 2,
    }

    def logps() -> Tensor:
        return -4 + torch.randn(BATCH, LENGTH, generator=generator)

    if old:
        inputs["old_per_token_logps"] = logps()
    if ref:
        inputs["ref_per_token_logps"] = logps()
    if weights:
        shape = (BATCH, LENGTH if weights == "token" else 1)
        ratio = torch.rand(shape, generator=generator) + 0.5
        inputs["importance_sampling_ratio"] = torch.where(mask != 0, ratio, 1.0) if weights == "token" else ratio
    if tools:
        inputs["tool_mask"] = (torch.rand(BATCH, LENGTH, generator=generator) < 0.7).long()
    return inputs


def outcome(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, all gradients in one vector, metrics."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model_wrapped, dict(inputs))
    loss.backward()
    gradient = torch.cat([p.grad.flatten().double() for p in trainer.model.parameters() if p.grad is not None])
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    return loss.detach(), gradient, metrics


def assert_fused_equals_stock(trainer: Any, inputs: dict[str, Any]) -> None:
    stock = outcome(trainer, inputs)
    with patching(True):
        mine = outcome(trainer, inputs)
        assert ours.status().losses_served == 1
        assert ours.status().served == {}
    torch.testing.assert_close(mine[0], stock[0], rtol=2e-5, atol=2e-6)
    assert (mine[1] - stock[1]).norm() <= 2e-5 * stock[1].norm() + 1e-9
    assert mine[2].keys() == stock[2].keys()
    for name, value in stock[2].items():
        assert mine[2][name] == pytest.approx(value, rel=2e-5, abs=2e-6, nan_ok=True), name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_policy_with_weights_and_kl(loss_type: str, level: str, tmp_path: Path) -> None:
    trainer = build(
        tmp_path, loss_type=loss_type, importance_sampling_level=level, beta=0.05, use_bias_correction_kl=True,
        delta=1.5 if loss_type in ("grpo", "dapo") else None,
    )  # fmt: skip
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert_fused_equals_stock(trainer, batch(ref=True, weights="token" if level == "token" else "sequence"))


def test_other_inputs(tmp_path: Path) -> None:
    trainer = build(tmp_path, off_policy_mask_threshold=0.1)
    assert_fused_equals_stock(trainer, batch(tools=True))
    assert_fused_equals_stock(trainer, batch(old=False))
    advantages = torch.randn(BATCH, LENGTH, generator=torch.Generator().manual_seed(0))
    assert_fused_equals_stock(trainer, {**batch(), "advantages": advantages})


def test_nothing_to_score(tmp_path: Path) -> None:
    """All completions masked: loss 0, connected to the model, gradient 0."""
    trainer = build(tmp_path)
    inputs = batch(old=False)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    with patching(True):
        loss, gradient, _ = outcome(trainer, inputs)
    assert loss == 0
    assert gradient.abs().max() == 0


def test_off_policy_mask_with_sampling_is_handed_back(tmp_path: Path) -> None:
    trainer = build(tmp_path, off_policy_mask_threshold=0.1)
    inputs = {**batch(), "sampling_per_token_logps": torch.full((BATCH, LENGTH), float("nan"))}
    stock = outcome(trainer, inputs)
    with patching(True):
        mine = outcome(trainer, inputs)
        assert sum(ours.status().losses_handed_back.values()) == 1
        assert ours.status().served == {"with gradient": 1}
    torch.testing.assert_close(mine[0], stock[0], rtol=2e-5, atol=2e-6)


def test_evaluation_divides_by_no_accumulation(tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type="grpo")
    trainer.model.eval()
    inputs = batch()
    with torch.no_grad():
        stock = trainer.compute_loss(trainer.model_wrapped, inputs)
        with patching(True):
            mine = trainer.compute_loss(trainer.model_wrapped, inputs)
    torch.testing.assert_close(mine, stock, rtol=2e-5, atol=2e-6)
    assert "entropy" in trainer._metrics["eval"]


def test_head_in_fp32(tmp_path: Path) -> None:
    """`cast_lm_head_to_fp32` with a tied head: hidden states of fp32, weights of bf16, no autocast."""
    trainer = build(tmp_path, dtype=torch.bfloat16, cast_lm_head_to_fp32=True)
    stock = outcome(trainer, batch())
    with patching(True, trim=False):  # equal hidden states: shifted positions round differently in bf16
        mine = outcome(trainer, batch())
    torch.testing.assert_close(mine[0], stock[0], rtol=1e-4, atol=1e-5)
    assert (mine[1] - stock[1]).norm() <= 0.01 * stock[1].norm()  # gradients of bf16 parameters


def test_a_trainer_that_never_reaches_the_head(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (torch.zeros(BATCH, LENGTH), None, None)
    with patching(True), pytest.raises(RuntimeError, match="never reached TRL's fused head"):
        trainer.compute_loss(trainer.model_wrapped, batch())


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_is_no_worse_than_stock(autocast: bool, tmp_path: Path) -> None:
    """Against fp64 from the same weights: at most twice the error that TRL's own bf16 run has.

    With the hidden states of stock (``trim=False``); test_trl_step.py compares those.
    """
    names = ("loss", "kl", "entropy")
    errors: dict[str, dict[str, list[float]]] = {way: {} for way in ("stock", "seam", "fused")}
    for number, loss_type in enumerate(LOSS_TYPES):
        options = {"loss_type": loss_type, "beta": 0.05, "bf16": autocast}
        dtype = torch.float32 if autocast else torch.bfloat16
        trainer = build(tmp_path / str(number), dtype=dtype, **options)
        exact = build(tmp_path / f"{number}_exact", dtype=torch.float64, **{**options, "bf16": False})
        exact.model.load_state_dict(trainer.model.state_dict())
        inputs = batch(ref=True)
        inputs["old_per_token_logps"] = _close_to(exact, inputs)
        inputs["ref_per_token_logps"] = _close_to(exact, inputs)
        truth = outcome(exact, inputs)
        for way, fuse in (("stock", None), ("seam", False), ("fused", True)):
            with contextlib.nullcontext() if fuse is None else patching(fuse, trim=False):
                loss, gradient, metrics = outcome(trainer, inputs)
            values = {"loss": float(loss), **metrics}
            true = {"loss": float(truth[0]), **truth[2]}
            found = {name: abs(values[name] - true[name]) for name in names}
            found["gradient"] = float((gradient - truth[1]).norm() / truth[1].norm())
            for name, error in found.items():
                errors[way].setdefault(name, []).append(error)
    for way in ("seam", "fused"):
        for name, stock in errors["stock"].items():
            assert _size(errors[way][name]) <= 2 * _size(stock) + 1e-6, (way, name)


def _close_to(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Log probabilities of a policy a little away from the trainer's."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, LENGTH)
    return logps.float() + 0.05 * torch.randn(BATCH, LENGTH, generator=torch.Generator().manual_seed(2))


def _size(values: list[float]) -> float:
    return sum(v * v for v in values) ** 0.5

"""What reaches the optimizer is SPEC section 3, divided by the accumulation steps exactly once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from toys import EOS, PAD, FixedEngine, GradientCatcher, build_model

from grpo_ext import group_advantages
from grpo_ext.config import LOSS_TYPES
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.trainer import GRPOTrainer

Make = Callable[..., GRPOTrainer]
LONGEST = 5


class KeepRollouts:
    """Remembers every generation batch of a trainer."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.rollouts: list[Rollout] = []
        assemble = trainer.rollouts.assemble

        def remember(*args: Any) -> Rollout:
            self.rollouts.append(assemble(*args))
            return self.rollouts[-1]

        trainer.rollouts.assemble = remember  # type: ignore[method-assign]


def token_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log probabilities of one completion, alone and unpadded."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)


def expected_gradient(model: nn.Module, rollout: Rollout, loss_type: str, ga: int) -> dict[str, torch.Tensor]:
    """Gradient of SPEC sections 2 and 3 on-policy, where every ratio is 1: a weighted sum of -A * logp.

    At ratio 1 the slope of a token's loss is -A for all types but cispo, whose ratio is capped at epsilon_high
    (0.2 here): grpo & co. are unclipped, sapo's gate has slope 1, vespo's weight is exp(lambda - lambda) = 1.
    """
    model = copy.deepcopy(model)
    model.zero_grad()
    rows = len(rollout.completion_ids)
    lengths = [len(ids) for ids in rollout.completion_ids]
    total = torch.zeros(())
    for i, (prompt, completion) in enumerate(zip(rollout.prompt_ids, rollout.completion_ids, strict=True)):
        micro_batch = range(i // (rows // ga) * (rows // ga), (i // (rows // ga) + 1) * (rows // ga))
        weight = {
            "grpo": 1 / lengths[i] / rows,
            "sapo": 1 / lengths[i] / rows,
            "bnpo": 1 / sum(lengths[j] for j in micro_batch) / ga,
            "dr_grpo": 1 / (rows * LONGEST),
            "luspo": 1 / rows,
            "dapo": 1 / sum(lengths),
            "cispo": 0.2 / sum(lengths),
            "vespo": 1 / sum(lengths),
        }[loss_type]
        total = total - weight * rollout.advantages[i] * token_logps(model, prompt, completion).sum()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_step(make_trainer: Make, **changes: Any) -> tuple[GRPOTrainer, list[dict[str, torch.Tensor]], Rollout]:
    catcher = GradientCatcher()
    trainer = make_trainer(engine=FixedEngine(), callbacks=[catcher], max_grad_norm=0.0, **{"max_steps": 1, **changes})
    kept = KeepRollouts(trainer)
    trainer.train()
    return trainer, catcher.steps, kept.rollouts[0]


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ga", [1, 2, 4])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulated_gradient_is_the_specification(make_trainer: Make, loss_type: str, ga: int) -> None:
    _, steps, rollout = one_step(
        make_trainer, loss_type=loss_type, per_device_train_batch_size=8 // ga, gradient_accumulation_steps=ga
    )
    assert len(steps) == 1
    assert_close(steps[0], expected_gradient(build_model(), rollout, loss_type, ga))


@pytest.mark.parametrize("share", [True, False])
def test_shared_prompts_change_nothing(make_trainer: Make, share: bool) -> None:
    _, steps, rollout = one_step(make_trainer, per_device_train_batch_size=8, share_prompts=share)
    assert_close(steps[0], expected_gradient(build_model(), rollout, "dapo", 1))


def test_gradient_checkpointing_changes_nothing(make_trainer: Make) -> None:
    _, steps, rollout = one_step(make_trainer, per_device_train_batch_size=8, gradient_checkpointing=True)
    assert_close(steps[0], expected_gradient(build_model(), rollout, "dapo", 1))


def test_two_steps_from_one_generation_share_its_tokens(make_trainer: Make) -> None:
    """dapo, spg = 2, GA = 1: each step divides by N * GA / spg, so at a learning rate of 0 the steps average to
    the gradient of the whole generation batch."""
    _, steps, rollout = one_step(
        make_trainer, per_device_train_batch_size=4, steps_per_generation=2, max_steps=2, learning_rate=0.0
    )
    mean = {name: (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    assert_close(mean, expected_gradient(build_model(), rollout, "dapo", 1))


def test_one_step_over_two_generations(make_trainer: Make) -> None:
    """dapo, spg = 1, GA = 2: the divisor of each micro-batch is its own generation's N times GA / spg = 2."""
    catcher = GradientCatcher()
    trainer = make_trainer(
        engine=FixedEngine(),
        callbacks=[catcher],
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        max_steps=1,
    )
    kept = KeepRollouts(trainer)
    trainer.train()
    assert len(kept.rollouts) == 2
    parts = [expected_gradient(build_model(), rollout, "dapo", 1) for rollout in kept.rollouts]
    assert_close(catcher.steps[0], {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})


def test_shuffled_rows_keep_their_advantages(make_trainer: Make) -> None:
    """Rows travel through shuffling, slicing and scoring; each must come back with its own group's advantage."""
    trainer, steps, rollout = one_step(
        make_trainer, per_device_train_batch_size=4, gradient_accumulation_steps=2, shuffle_completions=True
    )
    rewards = trainer.rewards(
        [""] * 8, trainer.rollouts.encoder.decode(rollout.completion_ids), rollout.completion_ids, {}
    )
    for prompt in {tuple(p) for p in rollout.prompt_ids}:
        rows = [i for i, p in enumerate(rollout.prompt_ids) if tuple(p) == prompt]
        assert len(rows) == 2
        torch.testing.assert_close(rollout.advantages[rows], group_advantages(rewards[rows], 2))
    assert_close(steps[0], expected_gradient(build_model(), rollout, "dapo", 2))


def test_old_logps_are_those_of_the_generating_policy(make_trainer: Make) -> None:
    """spg = 2, GA = 1: the second slice is updated by a policy one step away from the one that generated it."""
    trainer, _, rollout = one_step(make_trainer, per_device_train_batch_size=4, steps_per_generation=2, max_steps=2)
    assert rollout.old_logps[0] is None
    old = rollout.old_logps[1]
    assert old is not None
    start, trained = build_model(), trainer.model
    for row in range(4, 8):
        completion = rollout.completion_ids[row]
        want = token_logps(start, rollout.prompt_ids[row], completion)
        torch.testing.assert_close(old[row - 4, : len(completion)], want, rtol=1e-4, atol=1e-5)
        moved = token_logps(trained, rollout.prompt_ids[row], completion)
        assert (moved - want).abs().max() > 1e-3
    assert trainer.state.log_history[0]["ratio/max"] == 1.0
    assert trainer.state.log_history[1]["ratio/max"] != 1.0


def test_replays_reuse_the_first_forward(make_trainer: Make) -> None:
    """num_iterations = 2: no forward beside the updates' own, and the ratio moves away from 1 in the replay."""
    trainer = make_trainer(
        engine=FixedEngine(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        share_prompts=False,
    )
    kept, forwards = KeepRollouts(trainer), []
    trainer.model.register_forward_hook(lambda *_: forwards.append(1))
    trainer.train()
    assert len(forwards) == 8 + 2  # the two are of the attempt whether rows need a mask, once in a run
    assert len(kept.rollouts) == 2
    logs = trainer.state.log_history
    assert [logs[i]["ratio/max"] == 1.0 for i in range(4)] == [True, False, True, False]
    old = kept.rollouts[0].old_logps[0]
    want = token_logps(build_model(), kept.rollouts[0].prompt_ids[0], kept.rollouts[0].completion_ids[0])
    torch.testing.assert_close(old[0, : len(want)], want, rtol=1e-4, atol=1e-5)


def test_completions_end_where_the_engine_says(make_trainer: Make) -> None:
    _, _, rollout = one_step(make_trainer, per_device_train_batch_size=8, mask_truncated_completions=True)
    batch = rollout.micro_batch(0, PAD, "cpu")
    ended = [ids[-1] == EOS for ids in rollout.completion_ids]
    assert 0 < sum(ended) < 8
    assert batch.loss_mask.any(1).tolist() == ended
    assert rollout.normaliser == sum(len(ids) for ids, done in zip(rollout.completion_ids, ended, strict=True) if done)


@pytest.mark.parametrize("fused", [None, False])
def test_trains_in_train_mode(make_trainer: Make, fused: bool | None) -> None:
    """Also within a wrapper for several processes, whose own mode says nothing of a model from a checkpoint."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    trainer = make_trainer(model=build_model().eval(), engine=FixedEngine(), use_fused_head=fused)
    modes: list[bool] = []
    for module in trainer.model.modules():
        module.register_forward_hook(lambda m, *_: modes.append(m.training) if torch.is_grad_enabled() else None)
    wrapped = Wrapper(trainer.model)
    wrapped.config = trainer.model.config
    for _ in range(2):
        trainer.training_step(wrapped, {"micro_step": 0})
        trainer.model.eval()  # as a callback may leave it
    assert modes
    assert all(modes)

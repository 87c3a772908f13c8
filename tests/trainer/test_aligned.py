"""Rows that begin in the first column need no mask and give the same loss, log probabilities and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import EOS, PAD, build_model

from grpo_ext import LossConfig
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.layouts.left_aligned import LeftAlignedLayout
from grpo_ext.update.loss import ModelPass
from grpo_ext.update.micro_batch import MicroBatch

UNEQUAL = [[5, 8, 6], [5, 8, 6], [5, 9, 9, 6], [7]]
COMPLETIONS = [[9, 8, EOS], [9], [10, 11, 12, 13, 14], [3, EOS]]


def batch_of(prompts: list[list[int]]) -> MicroBatch:
    rollout = Rollout(
        key=(0, 0), start=0, rows_per_slice=4, prompt_ids=prompts, completion_ids=COMPLETIONS,
        in_loss=[True, True, False, True], advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), normaliser=7.0,
        tokens_seen=0, old_logps=[None], ref_logps=[None],
    )  # fmt: skip
    return rollout.micro_batch(0, PAD, "cpu")


def results(model: Any, batch: MicroBatch, masked: bool) -> tuple[LayoutChooser, list[torch.Tensor]]:
    forward = LayoutChooser(model, share_prompts=False)
    if masked:
        forward.masked_because = "the test"
    policy = ModelPass(forward, FusedHead(model), LossConfig())
    model.zero_grad()
    output = policy.loss(model, batch)
    output.loss.backward()
    assert policy.head.in_use
    grads = [p.grad.clone() for p in model.parameters()]
    return forward, [output.loss.detach(), output.entropy, policy.logps(model, batch), *grads]


@pytest.mark.parametrize("prompts", [UNEQUAL, [[5, 8, 6]] * 4], ids=["unequal prompts", "equal prompts"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_aligned_equals_masked(prompts: list[list[int]], attention: str) -> None:
    model, batch = build_model(attn_implementation=attention), batch_of(prompts)
    _, want = results(model, batch, masked=True)
    masks: list[Any] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True)
    forward, got = results(model, batch, masked=False)
    assert forward.masked_because is None
    assert masks[0] is not None  # what the attempt is compared with
    assert masks[1:] == [None] * 3  # the attempt, the loss, the log probabilities
    # The longest row has 4 + 5 (or 3 + 5) tokens, of which the last is not fed.
    assert forward.positions == 2 * 4 * (8 if prompts is UNEQUAL else 7)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-6)


def test_a_model_that_looks_ahead_keeps_its_mask() -> None:
    class Ahead(type(build_model())):  # type: ignore[misc]
        """Adds the mean of a row's embeddings to each of them."""

        def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None,
                    logits_to_keep: Any = 0) -> Any:  # fmt: skip
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            embedded = self.get_input_embeddings()(input_ids)
            mean = (embedded * mask.unsqueeze(-1)).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            return super().forward(
                inputs_embeds=embedded + mean, attention_mask=attention_mask, position_ids=position_ids,
                use_cache=use_cache, logits_to_keep=logits_to_keep,
            )  # fmt: skip

    model, batch = build_model(), batch_of(UNEQUAL)
    model.__class__ = Ahead
    forward, got = results(model, batch, masked=False)
    assert forward.masked_because == "the model attends to tokens behind the one it predicts from"
    _, want = results(model, batch, masked=True)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference)


def test_layout() -> None:
    batch = batch_of(UNEQUAL)
    aligned = LeftAlignedLayout(batch)
    ids = aligned.inputs()["input_ids"]
    for row, (prompt, completion) in enumerate(zip(UNEQUAL, COMPLETIONS, strict=True)):
        fed = (prompt + completion)[: ids.shape[1]]
        assert ids[row, : len(fed)].tolist() == fed
    # Each position's number through `completion_rows`: token t of a row is predicted from position len(prompt)-1+t.
    numbers = torch.arange(ids.shape[1]).float().expand(4, -1)[:, -aligned.logits_to_keep :].unsqueeze(-1)
    found = aligned.completion_rows(numbers).squeeze(-1)
    for row, (prompt, completion) in enumerate(zip(UNEQUAL, COMPLETIONS, strict=True)):
        assert found[row, : len(completion)].tolist() == [len(prompt) - 1 + t for t in range(len(completion))]


def test_lengths_are_found_where_nobody_knows_them() -> None:
    batch = batch_of(UNEQUAL)
    known = batch.known_lengths
    batch.known_lengths = None
    assert batch.lengths() == known == ([3, 3, 4, 1], [3, 1, 5, 2])

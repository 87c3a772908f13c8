"""The trimmed, prompt-sharing forward equals the plain one over whole padded rows, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from toys import EOS, PAD, build_model

from grpo_ext import LossConfig, grpo_loss
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.trainer.models import keep_half_precision_logits
from grpo_ext.update.layouts.chooser import LayoutChooser
from grpo_ext.update.layouts.shared_prompt import least_saving_on_gpu
from grpo_ext.update.micro_batch import MicroBatch


def rollout(**changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "key": (0, 0),
        "start": 0,
        "rows_per_slice": 4,
        "prompt_ids": [[5, 8, 6], [5, 8, 6], [5, 9, 9, 6], [5, 9, 9, 6]] * 2,
        "completion_ids": [[9, 8, EOS], [9], [10, 11], [3, EOS], [9, 9, 9, 9], [4], [5, 5], [6, EOS]],
        "in_loss": [True, True, False, True] * 2,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5] * 2),
        "normaliser": 7.0,
        "tokens_seen": 0,
        "old_logps": [None, None],
        "ref_logps": [None, None],
        **changes,
    }
    return Rollout(**fields)


def test_micro_batch_is_trimmed_to_its_own_rows() -> None:
    first, second = (rollout().micro_batch(i, PAD, "cpu") for i in range(2))
    assert first.completion_ids.shape == (4, 3)
    assert second.completion_ids.shape == (4, 4)
    assert first.prompt_ids.tolist()[0] == [PAD, 5, 8, 6]
    assert first.completion_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert first.loss_mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert first.first_row_of_prompt.tolist() == [0, 2]
    assert first.prompt_index.tolist() == [0, 0, 1, 1]


def test_sampling_logps_are_padded_like_the_completions() -> None:
    values = [[-1.0] * len(ids) for ids in rollout().completion_ids]
    batch = rollout(sampling_logps=values).micro_batch(0, PAD, "cpu")
    assert torch.equal(batch.sampling_logps, -batch.completion_mask.float())


def test_state_survives_saving(tmp_path: Any) -> None:
    source = rollout(old_logps=[torch.randn(4, 3), None])
    torch.save(source.state_dict(), tmp_path / "state.pt")
    back = Rollout.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert back.key == (0, 0)
    assert torch.equal(back.old_logps[0], source.old_logps[0])
    assert back.completion_ids == source.completion_ids


def plain_logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Whole rows, all logits, then the slice: what the forward is measured against."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[:, batch.prompt_ids.shape[1] - 1 : -1]


def logits_of(chooser: LayoutChooser, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    layout = chooser.choose(model, batch, for_logits=True)
    return layout.completion_rows(model(**layout.inputs()).logits)


def gradients(model: nn.Module, logits: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    config = LossConfig(loss_type="dapo")
    output = grpo_loss(
        logits, batch.completion_ids, batch.advantages, batch.loss_mask, config, num_items_in_batch=7.0, inplace=True
    )
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "lora"])
def test_equals_whole_rows(kind: str, share: bool) -> None:
    model = build_model("llama" if kind == "llama" else "qwen2")
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    batch = rollout().micro_batch(0, PAD, "cpu")
    forward = LayoutChooser(model, share)
    logits = logits_of(forward, model, batch)
    expected = plain_logits(model, batch)
    assert logits.shape == (4, 3, expected.shape[-1])
    mask = batch.completion_mask.bool()
    torch.testing.assert_close(logits[mask], expected[mask], rtol=1e-5, atol=1e-5)
    got, want = gradients(model, logits, batch), gradients(model, expected, batch)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert forward.share_prompts is share


def test_each_distinct_prompt_is_computed_once() -> None:
    model = build_model()
    batch = rollout().micro_batch(0, PAD, "cpu")
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    logits_of(LayoutChooser(model, True), model, batch)
    assert sum(seen) == 2 * 3 + 4 * 3  # two prompts without their last token, then three tokens per row
    seen.clear()
    logits_of(LayoutChooser(model, False), model, batch)
    assert sum(seen) == 4 * (4 + 2)


def test_on_a_gpu_few_positions_do_not_pay_for_a_pass_of_their_own() -> None:
    model = build_model()
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert least_saving_on_gpu(model) == int(3e10 * 2 / body)
    batch = rollout().micro_batch(0, PAD, "cpu")
    forward = LayoutChooser(model, True)
    spared = 2 * 3  # two repeated prompts of three positions
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    for pays, passes in ((0, 2), (spared, 2), (spared + 1, 1)):
        forward._least_saving["cpu"] = pays
        logits_of(forward, model, batch)
        assert len(seen) == passes
        seen.clear()
    assert forward.share_prompts is True


def test_sliding_window_falls_back_to_whole_rows() -> None:
    model = build_model(use_sliding_window=True, sliding_window=3, max_window_layers=0)
    batch = rollout().micro_batch(0, PAD, "cpu")
    forward = LayoutChooser(model, True)
    mask = batch.completion_mask.bool()
    expected = plain_logits(model, batch)
    torch.testing.assert_close(logits_of(forward, model, batch)[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert forward.share_prompts is False


def test_plain_module_without_cache_or_positions() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    model, batch = Bare(), rollout().micro_batch(0, PAD, "cpu")
    assert logits_of(LayoutChooser(model), model, batch).shape == (4, 3, model.inner.config.vocab_size)


def test_mixed_precision_logits_stay_bf16() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare_model(build_model())
        batch = rollout().micro_batch(0, PAD, "cpu")
        assert logits_of(LayoutChooser(model), model, batch).dtype == torch.float32
        keep_half_precision_logits(accelerator.unwrap_model(model), accelerator.autocast)
        assert logits_of(LayoutChooser(model), model, batch).dtype == torch.bfloat16
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()

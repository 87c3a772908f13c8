"""Compare a step of Unsloth's loss function with the patched step: ``python tests/integrations/unsloth_step_check.py``.

Runs ``unsloth_zoo.rl_replacements.grpo_accumulated_loss`` on the CPU in fp32, with a tiny model and a trainer that has
the methods and names of Unsloth's generated one. Prints the differences of loss, gradient and metrics for each setting
and each part of `grpo_ext.integrations.unsloth.patch`; exits with 1 if one is above fp32 rounding, or if a part was not
served. Needs unsloth and unsloth_zoo on the path.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())  # else a folder where it is started
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "UNSLOTH_GRPO_PREFIX_GROUPER": "0"}  # the latter imports all of Unsloth

import torch
import unsloth_zoo.rl_replacements as zoo
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import grpo_ext.integrations.unsloth as ours

PAD, VOCABULARY, PROMPTS, COMPLETIONS = 0, 61, (5, 2, 3, 4), (3, 6, 1, 4)
TEMPERATURE = 0.9
WIDTHS = (8, 9)  # of the generation batch, in which this micro-batch is padded: P and T
SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.1},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"mode": "sequence_mask", "clip_max": 3.0},
    {"loss_type": "cispo", "tool_mask": True},
    {"loss_type": "bnpo", "use_vllm": False},
]
PARTS: list[dict[str, Any]] = [{"one_forward": True}, {"trim": True}, {"dense": True}, {"head": True}, {}]
NOTHING = {"head": False, "one_forward": False, "trim": False, "dense": False}


class HiddenStates(Qwen3ForCausalLM):
    """Returns hidden states as logits while the environment asks for it, as Unsloth's models do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        asked = os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES") == "1"
        return types.SimpleNamespace(logits=hidden if asked else self.lm_head(hidden))


def build_model() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return HiddenStates(config).train()


def micro_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows, (width, longest) = len(PROMPTS), WIDTHS
    prompt_ids = torch.full((rows, width), PAD)
    completion_ids = torch.full((rows, longest), PAD)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        prompt_ids[row, width - prompt :] = torch.randint(1, VOCABULARY, (prompt,), generator=generator)
        completion_ids[row, :completion] = torch.randint(1, VOCABULARY, (completion,), generator=generator)
    completion_mask = (completion_ids != PAD).long()
    tool_mask = completion_mask.clone()
    tool_mask[1, 2:4] = 0
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids != PAD).long(),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2]),
    }


class Trainer:
    """The methods of Unsloth's generated trainer that the step passes through."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {"loss_type": "dapo", "importance_sampling_level": "token"} | settings
        self.model = build_model()
        self.use_vllm = self.vllm_importance_sampling_correction = settings.get("use_vllm", True)
        self.beta, self.num_iterations, self.num_generations = settings.get("beta", 0.0), 1, 2
        self.processing_class = types.SimpleNamespace(pad_token_id=PAD)
        self.accelerator = types.SimpleNamespace(scaler=None, unwrap_model=lambda model, **_: model)
        self._autocast_dtype = None
        self.forwards, self.temperature = 0, TEMPERATURE
        self.args = types.SimpleNamespace(
            gradient_accumulation_steps=2, steps_per_generation=2, unsloth_grpo_mini_batch=2,
            unsloth_logit_chunk_multiplier=None, off_policy_mask_threshold=None,
            vllm_importance_sampling_mode=settings.get("mode", "token_truncate"),
            vllm_importance_sampling_clip_min=None, vllm_importance_sampling_clip_max=settings.get("clip_max", 2.0),
        )  # fmt: skip

    def _get_per_token_logps_and_entropies(self, ids: Tensor, keep: int) -> tuple[Tensor, None, None]:
        """In Unsloth's layout: rows moved to the left, then the window of the completion and the widest padding."""
        self.forwards += 1
        padding = int((ids[:, :-keep] == PAD).sum(dim=1).max())
        packed = zoo.left_pack_padding(ids, PAD)
        logits = self.model(packed, attention_mask=(packed != PAD).long()).logits[:, :-1] / TEMPERATURE
        logps = logits.log_softmax(-1).gather(-1, packed[:, 1:, None]).squeeze(-1)
        return logps[:, -(keep + padding) :].detach(), None, None

    def _generate_and_score_completions(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        ids, keep = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1), batch["completion_ids"].shape[1]
        old_per_token_logps = ref_per_token_logps = None
        if self.vllm_importance_sampling_correction:
            old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(ids, keep)
        if self.beta:
            ref_per_token_logps = self._get_per_token_logps_and_entropies(ids, keep)[0] - 0.1
        found = {"old": old_per_token_logps, "ref": ref_per_token_logps}
        noise = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(4))
        return batch | found | {"sampling": noise - 5.0}


def compute_loss(self: Any, inputs: dict[str, Any]) -> Any:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    more = {"tool_mask": inputs["tool_mask"]} if self.settings.get("tool_mask") else {}
    return grpo_accumulated_loss(  # type: ignore[name-defined]  # noqa: F821  (of the module it is moved to)
        trainer=self, input_ids=ids, logits_to_keep=inputs["completion_ids"].shape[1],
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        completion_mask=inputs["completion_mask"], advantages=inputs["advantages"], old_logps=inputs["old"],
        ref_logps=inputs["ref"], n_chunks=-1, loss_type=self.settings["loss_type"],
        importance_sampling_level=self.settings["importance_sampling_level"], epsilon_low=0.2, epsilon_high=0.28,
        max_completion_length=9, delta=None, temperature=self.temperature, max_left_pad=0,
        num_items_in_batch=torch.tensor(20.0), current_gradient_accumulation_steps=2, num_processes=1,
        logit_softcapping=0.0, logit_scale_multiply=0.0, logit_scale_divide=0.0,
        sampling_per_token_logps=inputs["sampling"] if self.use_vllm else None, **more,
    )  # fmt: skip


Trainer.compute_loss = types.FunctionType(compute_loss.__code__, vars(zoo), "compute_loss")  # type: ignore[attr-defined]
# The generated module defines the function again; here its local import is the only way to the head.
sys.modules["trl"] = types.SimpleNamespace(GRPOTrainer=Trainer)  # type: ignore[assignment]


@contextlib.contextmanager
def patched(part: dict[str, Any]) -> Iterator[None]:
    ours.patch(**({**NOTHING, **part} if part else {"dense": True}))
    try:
        yield
    finally:
        ours.unpatch()


def step(settings: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Loss, gradient and the metrics' sums of one step, and the number of forwards for scoring."""
    trainer: Any = Trainer(**settings)
    inputs = trainer._generate_and_score_completions(micro_batch())
    loss, length, kl, difference, ratio, coefficient, mask = trainer.compute_loss(inputs)
    loss.backward()
    found = {"loss": loss.detach(), "length": length, "kl": kl.detach()}
    found["coefficient"] = (coefficient * mask).sum(dim=1) if coefficient.shape == mask.shape else coefficient
    if difference is not None:
        found |= {"difference": (difference * mask).sum(dim=1), "ratio": ratio.sum(dim=1)}
    found["gradient"] = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return found, trainer.forwards


def served(part: dict[str, Any], settings: dict[str, Any], forwards: int, stock_forwards: int) -> bool:
    """Whether `status` counts the parts, and the second forward is gone exactly if there was one."""
    status = ours.status()
    names = list(part) or ["head", "one_forward", "trim", "dense"]
    keys = {"head": "served", "one_forward": "one_forward served", "trim": "trim served", "dense": "dense served"}
    expected = [keys[n] for n in names if n != "one_forward" or settings.get("use_vllm", True)]
    skipped = "one_forward served" in expected
    return all(status.get(key, 0) > 0 for key in expected) and forwards == stock_forwards - skipped


def main() -> int:
    failures = 0
    for settings in SETTINGS:
        wanted, stock_forwards = step(settings)
        for part in PARTS:
            with patched(part):
                found, forwards = step(settings)
                ran = served(part, settings, forwards, stock_forwards)
            differences = {
                name: float((found[name] - value.detach()).norm() / value.norm().clamp(min=1e-3))
                for name, value in wanted.items()
            }
            good = ran and wanted.keys() == found.keys() and max(differences.values()) < 2e-5
            failures += not good
            listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
            print(f"{settings} {part or 'all'}: {listed}{'' if good else f'  DIFFERENT (ran: {ran}, {ours.status()})'}")
    print(f"{failures} cases differ" if failures else "all equal")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())

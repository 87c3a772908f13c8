"""TRL's step with and without `patch()`: equal numbers with completions of uneven length, and what is skipped."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from trl_runs import WORDS, Recorder, fill_adapters, lora, prompts, settings, tiny_model, tiny_tokenizer, trl

import grpo_ext.integrations.trl as ours

#: Completion tokens of the rows of a generation batch, in order; a completion of 6 tokens is cut off.
LENGTHS = (6, 1, 3, 2, 5, 5, 1, 4)


def served(prompt_ids: list[list[int]], first: int) -> tuple[list[list[int]], list[list[float]]]:
    """Completions and their log probabilities as an engine reports them; one is unknown (NaN)."""
    generator = torch.Generator().manual_seed(first)
    ids, logps = [], []
    for row in range(len(prompt_ids)):
        length = LENGTHS[(first + row) % len(LENGTHS)]
        tokens = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        ids.append(tokens if length == 6 else [*tokens[:-1], 0])
        logps.append((-4.5 + torch.randn(length, generator=generator) * 0.7).tolist())
    logps[2][0] = float("nan")
    return ids, logps


def rewards_with_ties(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    """Equal for the completions of every prompt that starts with an even word: their advantages are 0."""
    return [
        0.5 if int(prompt.split()[0][1:]) % 2 == 0 else sum(map(ord, text)) % 17 / 17
        for text, prompt in zip(completions, prompts, strict=True)
    ]


def run(
    folder: Path,
    *,
    kind: str = "grpo",
    with_lora: bool = True,
    model: Any = None,
    vllm: bool = True,
    base: Any = None,
    **changes: Any,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logs of a run and the trained weights after it."""
    own, config = (trl.GRPOTrainer, trl.GRPOConfig) if kind == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig)
    calls = []

    class Trainer(base or own):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            ids, logps = served(prompt_ids, len(calls))
            calls.append(len(prompt_ids))
            return (ids, logps) if kind == "grpo" else ids

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        **changes,
    }
    recorder = Recorder()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            tiny_model() if model is None else model,
            rewards_with_ties,
            config(**settings(str(folder), **arguments)),
            prompts(),
            processing_class=tiny_tokenizer(),
            peft_config=lora() if with_lora else None,
            callbacks=[recorder],
        )
        if vllm and kind == "grpo":
            trainer.use_vllm = True  # set after construction, because the constructor would start an engine
        if with_lora:
            fill_adapters(trainer.model)
        trainer.train()
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return recorder.steps, trained


#: Logged values that depend on the machine or the process, not on the training.
CLOCKS = ("step_time", "train_runtime", "epoch")


def compare(one: Any, two: Any, *, names: tuple[str, ...] | None = None, tolerance: float = 5e-5) -> None:
    """Compare every logged number of every step, and the weights."""
    for step, (a, b) in enumerate(zip(one[0], two[0], strict=True)):
        assert set(a) == set(b)
        for name in a if names is None else names:
            if name in CLOCKS or "Time taken" in name:
                continue
            both_nan = a[name] != a[name] and b[name] != b[name]
            difference = abs(a[name] - b[name]) / max(abs(a[name]), 1e-2)
            assert both_nan or difference <= tolerance, f"{name} at step {step}: {a[name]} and {b[name]}"
    assert one[1].keys() == two[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, two[1][name], rtol=1e-3, atol=2e-6)


@contextlib.contextmanager
def patching(**options: bool) -> Any:
    ours.patch(**options)
    try:
        yield
    finally:
        ours.unpatch()


def both(folder: Path, *, patch: dict[str, bool] | None = None, **arguments: Any) -> tuple[Any, Any, ours.Status]:
    stock = run(folder / "stock", **arguments)
    with patching(**(patch or {})):
        mine = run(folder / "ours", **arguments)
        status = ours.status()
    return stock, mine, status


CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "dapo-token_mask": {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.5},
    "grpo-full": {"loss_type": "grpo", "with_lora": False, "vllm_importance_sampling_mode": "token_truncate"},
    "bnpo-sequence": {"loss_type": "bnpo", "importance_sampling_level": "sequence"},
    "cispo-truncated": {"loss_type": "cispo", "epsilon_high": 1.01, "mask_truncated_completions": True},
    "sapo-sequence_truncate": {"loss_type": "sapo", "vllm_importance_sampling_mode": "sequence_truncate"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "dr_grpo-two-generations-a-step": {"loss_type": "dr_grpo", "steps_per_generation": 1},
    "off-policy-mask": {"off_policy_mask_threshold": 0.1},
    "entropy-quantile": {"top_entropy_quantile": 0.5},
    "without-vllm": {"vllm": False},
    "checkpointing": {"gradient_checkpointing": True},
}


def test_bf16_is_no_worse_than_stock(tmp_path: Path) -> None:
    """Log probabilities and entropies of every token against fp64: at most twice the error of stock's bf16 pass."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (32, 20), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(32):
        mask[row, : row % 8] = 0
        mask[row, 20 - row % 11 :] = 0
    trainers = {}
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_model(dtype=torch.bfloat16, hidden_size=64, num_hidden_layers=2).to(dtype)
        config = trl.GRPOConfig(**settings(str(tmp_path), per_device_train_batch_size=4, num_generations=4))
        trainers[dtype] = trl.GRPOTrainer(
            model, rewards_with_ties, config, prompts(), processing_class=tiny_tokenizer()
        )

    def passed(dtype: torch.dtype) -> torch.Tensor:
        trainer = trainers[dtype]
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 10, compute_entropy=True)
        return torch.stack([values.double() * mask[:, 10:] for values in found[:2]])

    truth, stock = passed(torch.float64), passed(torch.bfloat16)
    with patching():
        mine = passed(torch.bfloat16)
        assert ours.status().parts["trim"].served == 1
    assert (mine != stock).any()
    assert (mine - truth).norm() <= 2 * (stock - truth).norm()


#: Runs of stock TRL by case, for both values of ``fuse_loss``.
_stock: dict[str, Any] = {}


@pytest.mark.parametrize("fuse_loss", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock(name: str, fuse_loss: bool, tmp_path: Path) -> None:
    if name not in _stock:
        _stock[name] = run(tmp_path / "stock", **CASES[name])
    stock = _stock[name]
    with patching(fuse_loss=fuse_loss):
        mine = run(tmp_path / "ours", **CASES[name])
        status = ours.status()
    loose = CASES[name].get("loss_type") in ("vespo", "luspo")
    compare(stock, mine, tolerance=2e-4 if loose else 5e-5)
    assert ("sampling/importance_sampling_ratio/mean" in stock[0][0]) == (name != "without-vllm")
    assert not status.handed_back
    assert not any(part.handed_back for part in status.parts.values()), str(status)
    assert status.parts["trim"].served == 3 * 2
    assert status.parts["one_forward"].served == (0 if name == "without-vllm" else 6 if "two-gen" in name else 3)
    assert status.parts["layers"].served == 1
    # Half of the prompts have tied rewards: of the 24 sequences of 3 steps, 12 have advantage 0.
    # A fused loss takes all rows in one call to the head.
    skipped = status.parts["skip_zero_gradient_sequences"].served
    assert skipped == 0 if status.losses_served else skipped >= 8


@pytest.mark.parametrize("changes", [{}, {"beta": 0.05}, {"num_iterations": 2}, {"with_lora": False}], ids=str)
def test_rloo_equals_stock(changes: dict[str, Any], tmp_path: Path) -> None:
    stock, mine, status = both(tmp_path, kind="rloo", **{"beta": 0.0, **changes})
    compare(stock, mine)
    assert not status.handed_back
    one_forward = status.parts["one_forward"]
    if changes.get("beta") or changes.get("num_iterations"):
        assert one_forward.served == 0
        assert list(one_forward.handed_back) == [
            "beta: RLOO's KL term is part of the reward" if "beta" in changes else "num_iterations > 1"
        ]
    else:
        assert one_forward.served == 3


@pytest.mark.parametrize(
    ("changes", "part", "reason"),
    [
        ({"num_iterations": 2}, "one_forward", "num_iterations > 1"),
        ({"steps_per_generation": 4}, "one_forward", "several optimizer steps"),
        ({"pad_to_multiple_of": 8}, "trim", "pad_to_multiple_of"),
        ({"beta": 0.05}, "skip_zero_gradient_sequences", "beta"),
        ({"entropy_coef": 0.1}, "skip_zero_gradient_sequences", "entropy bonus"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            "checkpointing",
            "gradient_checkpointing_kwargs is set",
        ),
    ],
    ids=str,
)
def test_handed_back_by_itself(changes: dict[str, Any], part: str, reason: str, tmp_path: Path) -> None:
    stock, mine, status = both(tmp_path, **changes)
    compare(stock, mine)
    assert status.parts[part].served == 0
    (found,) = status.parts[part].handed_back
    assert found.startswith(reason)
    assert f"handed back to TRL: {status.parts[part].handed_back[found]} {reason}" in str(status)


def test_dropout_is_handed_back(tmp_path: Path) -> None:
    with patching():
        run(tmp_path, model=tiny_model(attention_dropout=0.2))
        status = ours.status()
    assert list(status.parts["one_forward"].handed_back) == ["dropout: two forwards differ"]


class OwnLoss(trl.GRPOTrainer):
    """A subclass with a loss of its own."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        inputs["advantages"] = inputs["advantages"] + 0.5
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss


def test_a_subclass_with_its_own_loss(tmp_path: Path) -> None:
    """It may read what TRL's second forward computes, and change the batch: no row is skipped by old advantages."""
    stock, mine, status = both(tmp_path, base=OwnLoss)
    compare(stock, mine)
    assert list(status.parts["one_forward"].handed_back) == ["Trainer has its own _compute_loss"]
    assert status.parts["skip_zero_gradient_sequences"].served == 0


def test_frequencies_that_depend_on_the_width_keep_their_padding(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with patching():
        run(tmp_path, model=tiny_model(rope_parameters=rope, max_position_embeddings=8))
        status = ours.status()
    assert list(status.parts["trim"].handed_back) == ["the encoding of positions depends on the padded width"]


def test_learned_positions_keep_their_padding(tmp_path: Path) -> None:
    """Stock TRL counts the padding in front of a prompt as positions: GPT-2's logits change with it."""

    def model() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3,
                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=0, bos_token_id=0, pad_token_id=1)
        )  # fmt: skip

    stock = run(tmp_path / "stock", model=model(), with_lora=False)
    with patching():
        mine = run(tmp_path / "ours", model=model(), with_lora=False)
        status = ours.status()
    compare((stock[0], {}), (mine[0], {}))  # not the weights: Adam enlarges the rounding of a bias without gradient
    assert status.parts["trim"].served == 0
    assert list(status.parts["trim"].handed_back) == ["the model's logits depend on the padding before a prompt"]


def test_positions_of_a_step(tmp_path: Path) -> None:
    """Count token positions with a graph: rows without gradient and padding do not run through backward."""
    seen: list[tuple[int, bool]] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append((ids.numel(), torch.is_grad_enabled()))

    def positions(**options: bool) -> tuple[int, int]:
        seen.clear()
        model = tiny_model()
        model.model.register_forward_pre_hook(count, with_kwargs=True)
        with patching(**options) if options.pop("patched", True) else contextlib.nullcontext():
            run(tmp_path, model=model, max_steps=1)
        probes = [numel for numel, _ in seen if numel <= 16]
        assert len(probes) <= 8
        return sum(n for n, grad in seen if grad), sum(n for n, grad in seen if not grad and n > 16)

    with_graph, without = positions(patched=False)
    assert with_graph == without >= 8 * (2 + 6)
    trimmed, idle = positions()
    assert trimmed < with_graph / 1.8
    assert idle < without / 1.8


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
@pytest.mark.parametrize("fuse_loss", [False, True], ids=["", "fused"])
def test_filled_micro_batches(loss_type: str, fuse_loss: bool, tmp_path: Path) -> None:
    """Loss and gradient stay; metrics are averages over other micro-batches."""
    changes = {"loss_type": loss_type, "gradient_accumulation_steps": 4, "num_generations": 4}
    if loss_type == "cispo":
        changes["epsilon_high"] = 1.01
    stock, mine, status = both(tmp_path, patch={"fill_micro_batches": True, "fuse_loss": fuse_loss}, **changes)
    compare(stock, mine, names=("loss", "grad_norm", "sampling/importance_sampling_ratio/mean"), tolerance=2e-4)
    assert status.parts["fill_micro_batches"].served == 3
    assert sum(status.served.values()) < 3 * 4 * (1 if fuse_loss else 2)


def test_sorted_micro_batches(tmp_path: Path) -> None:
    stock, mine, status = both(tmp_path, patch={"length_sorted_batches": True}, loss_type="grpo")
    compare(stock, mine, names=("loss", "grad_norm", "reward"))
    assert status.parts["length_sorted_batches"].served == 3


@pytest.mark.parametrize(
    ("patch", "changes", "reason"),
    [
        ("fill_micro_batches", {"loss_type": "grpo"}, "the loss divides by each micro-batch"),
        ("length_sorted_batches", {"loss_type": "bnpo"}, "loss_type 'bnpo'"),
        ("length_sorted_batches", {"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ("length_sorted_batches", {"entropy_coef": 0.1}, "entropy bonus"),
        ("fill_micro_batches", {"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ("fill_micro_batches", {"entropy_coef": 0.1}, "entropy bonus"),
    ],
)
def test_choices_that_would_change_the_loss(patch: str, changes: Any, reason: str, tmp_path: Path) -> None:
    stock, mine, status = both(tmp_path, patch={patch: True}, **changes)
    compare(stock, mine)
    assert next(iter(status.parts[patch].handed_back)).startswith(reason)


def test_evaluation(tmp_path: Path) -> None:
    """Evaluation runs through the patched methods, too, without an update."""

    def evaluated() -> dict[str, float]:
        calls = []

        class Trainer(trl.GRPOTrainer):  # type: ignore[misc]
            def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
                calls.append(1)
                return served(prompt_ids, len(calls))

        torch.manual_seed(3)
        arguments = {"per_device_eval_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                tiny_model(), rewards_with_ties, trl.GRPOConfig(**settings(str(tmp_path), **arguments)), prompts(),
                eval_dataset=prompts(4), processing_class=tiny_tokenizer(),
            )  # fmt: skip
            trainer.use_vllm = True
            found: dict[str, float] = trainer.evaluate()
        return found

    stock = evaluated()
    with patching():
        mine = evaluated()
        assert ours.status().parts["one_forward"].served > 0
    assert stock.keys() == mine.keys()
    for name, value in stock.items():
        if not name.endswith(("_time", "runtime", "per_second")):
            assert value == pytest.approx(mine[name], rel=5e-5, abs=5e-7), name


def test_switches_and_restoration(tmp_path: Path) -> None:
    before = {name: vars(trl.GRPOTrainer)[name] for name in ("_prepare_inputs", "_compute_loss")}
    everything = dict.fromkeys(
        ("trim", "one_forward", "skip_zero_gradient_sequences", "layers", "checkpointing", "weights"), False
    )
    with patching(**everything):
        run(tmp_path)
        status = ours.status()
        assert not status.parts
        assert status.served == {"with gradient": 6, "without gradient": 6}
        with pytest.raises(TypeError, match=r"has no switches \['trimm'\]: it has fuse_loss, trim"):
            ours.patch(trimm=True)
    assert {name: vars(trl.GRPOTrainer)[name] for name in before} == before
    assert "train" not in vars(trl.GRPOTrainer.__mro__[1])

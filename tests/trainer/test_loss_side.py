"""No wasted work: skipped sequences, one forward, sorted and packed micro-batches; and steps that are not finite."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toys import EOS, PAD, FixedEngine, GradientCatcher, build_model

from grpo_ext import LossConfig, reference
from grpo_ext.config import LOSS_TYPES
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.rollouts.batching import plan_batches
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.trainer import GRPOTrainer
from grpo_ext.update.filling import sorted_order
from grpo_ext.update.guard import NonfiniteError, NonfiniteGuard
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.loss import ModelPass, optional_arguments
from grpo_ext.update.metrics import MetricBuffer
from grpo_ext.update.micro_batch import MicroBatch
from grpo_ext.update.reference_model import ReferenceModel
from grpo_ext.update.skipping import rows_with_gradient

Make = Callable[..., GRPOTrainer]


def every_other_group(completions: list[str], **_: Any) -> list[float]:
    """Groups of two: the first has equal rewards, so advantage 0; the second has not, and so on."""
    return [float(i % 4 == 3) for i in range(len(completions))]


def nobody(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


class Engine(FixedEngine):
    """Reports log probabilities of its own, as an engine with other kernels would."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        completions = super().generate(*args, **kwargs)
        completions.sampling_logps = [[-3.0 - 0.1 * t for t in range(len(row))] for row in completions.ids]
        return completions


def gradients(make_trainer: Make, **changes: Any) -> tuple[GRPOTrainer, torch.Tensor]:
    """A run of one optimizer step (or more) of plain descent, and its gradients, one row per step."""
    catcher = GradientCatcher()
    fields = {"engine": FixedEngine(), "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", **changes}
    trainer = make_trainer(callbacks=[catcher], **fields)
    trainer.train()
    return trainer, torch.stack([torch.cat([g.flatten() for g in step.values()]) for step in catcher.steps])


# ---- sequences without a gradient


@pytest.mark.parametrize("ga", [1, 2])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_skipping_keeps_the_gradient(make_trainer: Make, loss_type: str, ga: int) -> None:
    """Zero advantages and masked truncated completions, off-policy in the second step."""
    fields: dict[str, Any] = {
        "loss_type": loss_type,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": ga,
        "steps_per_generation": 2 * ga,
        "max_steps": 2,
        "reward_funcs": every_other_group,
        "mask_truncated_completions": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cispo's cap
        trainer, skipped = gradients(make_trainer, **fields)
        _, whole = gradients(make_trainer, skip_zero_gradient_sequences=False, **fields)
    # Against the norm: what elements near 0 are rounded to depends on the processor and the rows beside them.
    assert bool(((skipped - whole).norm(dim=1) <= 5e-6 * whole.norm(dim=1)).all())
    logs = trainer.state.log_history
    assert 0.5 <= logs[0]["skipped_sequences"] < 1
    assert logs[0]["tokens/computed"] < logs[0]["tokens/padded"]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0]),
        ({"beta": 0.1}, [0, 1]),
        ({"entropy_coef": 0.1}, [0, 1]),
        ({"top_entropy_quantile": 0.5}, [0, 1]),
    ],
)
def test_which_rows_have_a_gradient(changes: dict[str, float], kept: list[int]) -> None:
    config = LossConfig(**changes)  # type: ignore[arg-type]
    assert rows_with_gradient(config, [0.5, 0.0, 0.5], [True, True, False]) == kept


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_step_without_any_gradient_is_still_a_step(make_trainer: Make, optim: str) -> None:
    """Adam goes on by its momentum where the gradient is 0; so it does where the model was not run."""
    results = []
    for skip in (True, False):
        calls = [0]

        def reward(completions: list[str], calls: list[int] = calls, **_: Any) -> list[float]:
            calls[0] += 1
            return every_other_group(completions) if calls[0] == 1 else nobody(completions)

        trainer = make_trainer(
            engine=FixedEngine(), reward_funcs=reward, max_steps=3, optim=optim, skip_zero_gradient_sequences=skip
        )
        trainer.train()
        results.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        log = trainer.state.log_history[1]
        assert log["loss"] == 0.0
        assert log["grad_norm"] == 0.0
        assert log["skipped_sequences"] == (1.0 if skip else 0.0)
        assert log["forwards_per_micro_batch"] == (0.0 if skip else 1.0)
        assert log["nonfinite_tokens"] == 0.0
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_all_truncated_with_a_reference(make_trainer: Make) -> None:
    """Nothing is in the loss: 0, a finite KL, no forward at all."""
    trainer = make_trainer(engine=FixedEngine(end_share=-1.0), mask_truncated_completions=True, beta=0.1, max_steps=1)
    with pytest.warns(UserWarning, match="every completion of a generation batch was truncated"):
        trainer.train()
    log = trainer.state.log_history[0]
    assert (log["loss"], log["kl"], log["forwards_per_micro_batch"]) == (0.0, 0.0, 0.0)


# ---- one forward


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
@pytest.mark.parametrize("fused", [True, False])
def test_one_forward_equals_two(loss_type: str, mode: str, fused: bool) -> None:
    """On-policy the importance weight is formed inside the loss; with old log probabilities it needs a second pass."""
    config = LossConfig(
        loss_type=loss_type,  # type: ignore[arg-type]
        vllm_importance_sampling_mode=mode,  # type: ignore[arg-type]
        vllm_importance_sampling_cap=1.5,
        vllm_importance_sampling_clip_min=0.5,
    )
    model, batch = build_model(), example()
    batch.sampling_logps = 0.9 * ModelPass(LayoutChooser(model), FusedHead(model), config).logps(model, batch) - 0.1
    results = []
    for passes in (1, 2):
        policy = ModelPass(LayoutChooser(model), FusedHead(model, fused), config)
        batch.old_logps = policy.logps(model, batch) if passes == 2 else None
        model.zero_grad()
        output = policy.loss(model, batch)
        output.loss.backward()
        assert policy.passes == passes
        assert 0 < output.metrics["importance_weight/mean"] != 1
        results.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=1e-6)


def test_forwards_are_counted(make_trainer: Make) -> None:
    """One pass per micro-batch on-policy, with an engine's log probabilities too; two where the slice comes late."""
    trainer = make_trainer(engine=Engine(), per_device_train_batch_size=4, steps_per_generation=2, max_steps=4)
    trainer.train()
    logs = trainer.state.log_history
    # The late slice's log probabilities are made with the generation, in the first of two steps.
    assert [log["forwards_per_micro_batch"] for log in logs[:4]] == [2.0, 1.0, 2.0, 1.0]
    trainer = make_trainer(engine=Engine(), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert [log["forwards_per_micro_batch"] for log in trainer.state.log_history[:2]] == [1.0, 1.0]


def test_differences_from_the_engine_are_logged(make_trainer: Make) -> None:
    def logged(engine: FixedEngine, **changes: Any) -> dict[str, float]:
        trainer = make_trainer(engine=engine, max_steps=1, **changes)
        trainer.train()
        log = trainer.state.log_history[0]
        return {name.removeprefix("sampling/"): value for name, value in log.items() if name.startswith("sampling/")}

    log = logged(Engine(), vllm_importance_sampling_cap=1.5)
    ratio = [log[f"importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
    assert 0 < ratio[0] < ratio[1] < ratio[2] <= 1.5
    assert 0 < log["sampling_logp_difference/mean"] < log["sampling_logp_difference/max"]
    skipped = logged(Engine(), reward_funcs=nobody)  # the model was not run: no weight is the least one
    assert skipped.keys() == log.keys()
    assert math.isnan(skipped["importance_sampling_ratio/min"])
    assert logged(FixedEngine()) == {}


# ---- padding


def example() -> MicroBatch:
    rollout = Rollout(
        key=(0, 0), start=0, rows_per_slice=4, prompt_ids=[[5, 8, 6], [5, 8, 6], [5, 9, 9, 6], [7]],
        completion_ids=[[9, 8, EOS], [9], [10, 11, 12, 13, 14], [3, EOS]], in_loss=[True, True, False, True],
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), normaliser=7.0, tokens_seen=0, old_logps=[None],
        ref_logps=[None],
    )  # fmt: skip
    return rollout.micro_batch(0, PAD, "cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(attention: str) -> None:
    model, batch = build_model(attn_implementation=attention), example()
    results = []
    for padding_free in (True, False):
        forward = LayoutChooser(model, False, padding_free)
        policy = ModelPass(forward, FusedHead(model), LossConfig())
        model.zero_grad()
        output = policy.loss(model, batch)
        output.loss.backward()
        logps = policy.logps(model, batch)
        results.append([output.loss.detach(), logps, output.entropy, *(p.grad.clone() for p in model.parameters())])
        assert forward.padded_because is None
        # Prompts of 3, 3, 4, 1 and completions of 3, 1, 5, 2 tokens, whose last ones are not fed.
        assert forward.positions == 2 * (18 if padding_free else 4 * 8)
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=2e-5, atol=1e-6)


def test_packing_where_the_attention_does_not_allow_it() -> None:
    """A model that ignores position ids mixes packed sequences: the test detects and reports it."""

    class Mixing(type(build_model())):  # type: ignore[misc]
        def forward(self, *args: Any, position_ids: Any = None, logits_to_keep: Any = 0, use_cache: Any = None,
                    **kwargs: Any) -> Any:  # fmt: skip
            return super().forward(*args, logits_to_keep=logits_to_keep, use_cache=use_cache, **kwargs)

    model, batch = build_model(), example()
    model.__class__ = Mixing
    forward = LayoutChooser(model, False, True)
    policy = ModelPass(forward, FusedHead(model), LossConfig())
    policy.loss(model, batch)
    assert forward.padded_because == "the model does not separate packed sequences (sdpa)"
    assert policy.head.in_use


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, "padding_free: in use"), ({"use_fused_head": False}, "padding_free: rows are padded, use_fused_head=False")],
)
def test_trainer_says_whether_it_packs(
    make_trainer: Make, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    _, packed = gradients(make_trainer, padding_free=True, share_prompts=False, **changes)
    assert said in capsys.readouterr().out
    _, padded = gradients(make_trainer, share_prompts=False)
    torch.testing.assert_close(packed, padded, rtol=2e-5, atol=1e-6)


def test_sorted_micro_batches(make_trainer: Make) -> None:
    """The same optimizer step from micro-batches of like lengths: same gradient, fewer positions."""
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "loss_type": "grpo",
        "share_prompts": False,
        "skip_zero_gradient_sequences": False,
        "engine": FixedEngine(longest=5, end_share=2.0),
        "train_dataset": [{"prompt": f"add {i} ="} for i in range(20)],
    }
    results = {}
    for by_length in (False, True):
        trainer, grads = gradients(make_trainer, length_sorted_batches=by_length, **copy.deepcopy(fields))
        results[by_length] = grads, trainer.state.log_history[0]
    torch.testing.assert_close(results[True][0], results[False][0], rtol=2e-5, atol=1e-6)
    assert results[True][1]["tokens/computed"] < results[False][1]["tokens/computed"]
    assert results[True][1]["tokens/padded"] == results[False][1]["tokens/padded"]
    # Records stay in the order of generation, each with its own advantage.
    assert results[True][1]["reward"] == results[False][1]["reward"]


def test_tokens_of_a_step_with_and_without_each_measure(make_trainer: Make) -> None:
    """Runs on 32 completions of 1 to 40 tokens (the manual's table) have equal loss and gradient."""

    def right(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Every second prompt is too hard for all of its completions."""
        hard = [int(prompt.split()[1]) % 2 for prompt in prompts]
        return [float(len(text) % 3 == 0 and not h) for h, text in zip(hard, completions, strict=True)]

    fields: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_completion_length": 40,
        "reward_funcs": right,
        "skip_zero_gradient_sequences": False,
        "share_prompts": False,
    }
    measures: dict[str, dict[str, Any]] = {
        "trimmed": {},
        "sorted": {"length_sorted_batches": True},
        "shared": {"share_prompts": True},
        "packed": {"padding_free": True},
        "skipped": {"skip_zero_gradient_sequences": True},
        "all": {"padding_free": True, "length_sorted_batches": True, "skip_zero_gradient_sequences": True},
    }
    tokens, grads = {}, {}
    for name, changes in measures.items():
        model = build_model(max_position_embeddings=128)
        trainer, grads[name] = gradients(
            make_trainer, model=model, engine=FixedEngine(longest=40), **{**fields, **changes}
        )
        log = trainer.state.log_history[0]
        tokens[name], tokens["padded"] = log["tokens/computed"], log["tokens/padded"]
        torch.testing.assert_close(grads[name], grads["trimmed"], rtol=2e-5, atol=1e-6)
    print(tokens)
    assert tokens["padded"] > tokens["trimmed"] > max(tokens["sorted"], tokens["shared"], tokens["skipped"])
    assert tokens["all"] < min(tokens["packed"], tokens["skipped"], tokens["sorted"]) < tokens["padded"] / 1.5


def test_sorted_order_stays_within_optimizer_steps() -> None:
    plan = plan_batches(2, 1, 2, 2, steps_per_generation=4)
    rows = plan.slices_per_step * plan.per_device_batch_size
    assert sorted_order([5, 1, 4, 2, 9, 3, 8, 3], rows) == [1, 3, 2, 0, 5, 7, 6, 4]


# ---- dropout, precision, references


def test_late_log_probabilities_know_no_dropout(make_trainer: Make) -> None:
    model = build_model(attention_dropout=0.5)
    trainer = make_trainer(
        model=model, engine=FixedEngine(), per_device_train_batch_size=4, steps_per_generation=2, max_steps=1
    )
    kept: list[Rollout] = []
    make = trainer._make_rollout
    trainer._make_rollout = lambda *a: kept.append(make(*a)) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    start = copy.deepcopy(model).eval()
    trainer.train()
    assert trainer.model.training
    batch = kept[0].micro_batch(1, PAD, "cpu")
    want = ModelPass(LayoutChooser(start), FusedHead(start), LossConfig()).logps(start, batch)
    torch.testing.assert_close(batch.old_logps, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_replays_and_dropout(make_trainer: Make, dropout: float) -> None:
    """Replays compare with the first forward, unless that one was noisy: then with one without noise."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout)
    trainer = make_trainer(engine=FixedEngine(), num_iterations=2, max_steps=2, peft_config=lora)
    trainer.train()
    passes = [log["forwards_per_micro_batch"] for log in trainer.state.log_history[:2]]
    assert passes == ([1.0, 1.0] if dropout == 0 else [2.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype, fused: bool) -> None:
    """fp32 weights, 16-bit products: a parameter's gradient is off that of fp32 by at most twice what the same loss in
    plain torch is, and finite under fp16's scale."""
    model, batch = build_model(), example()
    batch.normaliser = 4000.0  # as many tokens: coefficients that fp16 cannot hold without the scale
    policy = ModelPass(LayoutChooser(model), FusedHead(model, fused), LossConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def plain() -> torch.Tensor:
        given = batch.completion_ids, batch.advantages, batch.loss_mask, policy.config
        return reference.grpo_loss(policy.logits(model, batch).float(), *given, **optional_arguments(batch)).loss

    def gradients(loss: Callable[[], torch.Tensor], autocast: bool) -> list[torch.Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=autocast and dtype == torch.float16)
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want, theirs = gradients(plain, False), gradients(plain, True)
    ours = gradients(lambda: policy.loss(model, batch).loss, True)
    assert len(ours) == len(want)
    for mine, other, exact in zip(ours, theirs, want, strict=True):
        assert (mine - exact).norm() <= 2 * (other - exact).norm() + 1e-3 * exact.norm() + 1e-9


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_of_any_type_train(make_trainer: Make, dtype: str) -> None:
    trainer = make_trainer(engine=FixedEngine(), dtype=dtype, max_steps=1, bf16=dtype == "float32")
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    assert trainer.loss_path == "fused head"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 training needs a CUDA device, torch sees none")
def test_fp16_with_the_trainers_own_scaler(make_trainer: Make) -> None:
    trainer = make_trainer(engine=FixedEngine(), fp16=True, use_cpu=False, max_steps=3)
    trainer.train()
    assert trainer.accelerator.scaler is not None
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history[:3])


def test_a_reference_without_an_adapter_that_is_trained_already_warns(make_trainer: Make) -> None:
    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReferenceModel(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(parameter)
    with pytest.warns(UserWarning, match="reference of the KL term .* is the model without the adapter"):
        ReferenceModel(model)


def test_a_generation_batch_made_inside_itself_has_old_logps(make_trainer: Make) -> None:
    """After a resume that found none: slice 0 comes last then, behind optimizer steps."""
    changes: dict[str, Any] = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2}
    trainer = make_trainer(engine=FixedEngine(), **changes)
    for regenerated in (False, True):
        rollout = trainer._make_rollout(trainer.model, (0, 0), 0, regenerated)
        known = [rollout.old_logps[index] is not None for index in range(2)]
        assert known == [regenerated, True]


def test_reference_moves_towards_the_policy(make_trainer: Make) -> None:
    """Every second step, by 0.75: three quarters of the policy of that moment and a quarter of what was there."""
    trainer = make_trainer(
        engine=FixedEngine(), beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=0.75, ref_model_sync_steps=2,
        max_steps=3, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    start = [p.clone() for p in trainer.model.parameters()]
    at_two: list[torch.Tensor] = []
    make = trainer._make_rollout

    def remember(*arguments: Any) -> Rollout:
        if trainer.state.global_step == 2:
            at_two.extend(p.detach().clone() for p in trainer.model.parameters())
        return make(*arguments)

    trainer._make_rollout = remember  # type: ignore[method-assign]
    trainer.train()
    frozen = trainer.reference._frozen
    for was, policy, now in zip(start, at_two, frozen.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), 0.25 * was + 0.75 * policy)
    resumed = make_trainer(
        engine=FixedEngine(), beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=0.75, ref_model_sync_steps=2,
        max_steps=3, save_strategy="no",
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    for mine, theirs in zip(resumed.reference._frozen.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_reference_that_cannot_move(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="with an adapter the reference is the model without it"):
        make_trainer(sync_ref_model=True, beta=0.1, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


# ---- steps that are not finite


def test_an_infinite_loss_under_a_scaler_takes_no_step(tmp_path: Path) -> None:
    """The scaler sees gradients, and these are finite."""
    weight = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = NonfiniteGuard(9, MetricBuffer(), lambda value: value, tmp_path, 0)
    for number, extra in enumerate((0.0, math.inf, 0.0)):
        before = weight.detach().clone()
        loss = weight.square().sum() + extra
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        guard.watch(loss.detach(), cast(Rollout, None), 0)
        guard.before_step(model, weight.grad.norm(), number + 1, scaled=True, taken=None)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, weight) == (extra > 0)


def test_nonfinite_steps_are_skipped_and_then_an_error(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    before = [p.clone() for p in model.parameters()]
    trainer = make_trainer(model=model, engine=FixedEngine(), max_steps=5, max_nonfinite_steps=2)
    rollouts: list[Rollout] = []
    assemble = trainer.rollouts.assemble
    monkeypatch.setattr(trainer.rollouts, "assemble", lambda *args: rollouts.append(assemble(*args)) or rollouts[-1])
    with pytest.raises(NonfiniteError, match=r"step 2: the loss is not finite, for 2 step\(s\) in a row") as error:
        trainer.train()
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, model.parameters(), strict=True))
    assert trainer.state.log_history[0]["nonfinite_steps"] == 1.0
    path = Path(str(trainer.args.output_dir)) / "nonfinite" / "step-000002-rank0.pt"
    assert str(path) in str(error.value)
    saved = torch.load(path, weights_only=True)
    assert saved["micro_batches"] == [
        {"generation": (0, 1), "slice": 0, "rows": [0, 1, 2, 3, 4, 5], "loss_finite": False}
    ]
    assert Rollout.from_state_dict(saved["rollouts"][(0, 1)]).completion_ids == rollouts[1].completion_ids


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_skipped_step_leaves_the_loss(make_trainer: Make, every: int) -> None:
    """The second of four steps has a NaN in its second micro-batch: `loss` and `train_loss` are means of the others."""
    trainer = make_trainer(engine=FixedEngine(), max_steps=4, gradient_accumulation_steps=2, logging_steps=every)
    losses: list[float] = []
    compute_loss = trainer.compute_loss

    def spoilt(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        loss, output = compute_loss(*args, **kwargs)
        loss = loss + (math.nan if len(losses) == 3 else 1.0)
        losses.append(float(loss.detach()))
        return loss, output

    trainer.compute_loss = spoilt  # type: ignore[method-assign]
    output = trainer.train()
    steps = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    taken = [loss for loss in steps if not math.isnan(loss)]
    assert len(taken) == 3
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    known = [[x for x in steps[i : i + every] if not math.isnan(x)] for i in range(0, 4, every)]
    expected = [sum(part) / len(part) if part else math.nan for part in known]
    assert logged == pytest.approx(expected, nan_ok=True)
    assert output.training_loss == pytest.approx(sum(taken) / 3)
    assert output.metrics["train_loss"] == trainer.state.log_history[-1]["train_loss"] == output.training_loss
    assert sum(log["nonfinite_steps"] for log in trainer.state.log_history if "loss" in log) == 1


def test_one_bad_step_among_good_ones(make_trainer: Make) -> None:
    """The gradient of the second step is spoiled: it is not taken, the third is."""
    trainer = make_trainer(engine=FixedEngine(), max_steps=3, max_nonfinite_steps=2)
    weights: list[torch.Tensor] = []
    backward = trainer.accelerator.backward

    def spoiled(loss: torch.Tensor, **kwargs: Any) -> None:
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        backward(loss, **kwargs)
        if len(weights) == 2:
            trainer.model.lm_head.weight.grad[0, 0] = math.inf

    trainer.accelerator.backward = spoiled
    trainer.train()
    assert [log["nonfinite_steps"] for log in trainer.state.log_history[:3]] == [0.0, 1.0, 0.0]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert trainer.guard.in_a_row == 0

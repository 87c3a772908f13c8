"""Whole runs of tiny models: records, evaluation, reference, resume, bad input."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from toys import EOS, FixedEngine, build_model, build_tokenizer, reward_number

import grpo_ext
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.trainer import GRPOConfig, GRPOTrainer, RewardError
from grpo_ext.update.loss import ModelPass

Make = Callable[..., GRPOTrainer]
LORA = LoraConfig(r=2, target_modules="all-linear")

METRICS = {
    "loss",
    "grad_norm",
    "learning_rate",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/reward_number/mean",
    "rewards/reward_number/std",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "step_time",
    "num_tokens",
    "nonfinite_tokens",
    "kernel_calls",
}


def metric_lines(trainer: GRPOTrainer) -> list[dict[str, Any]]:
    path = Path(str(trainer.args.output_dir)) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_learns_to_please_the_reward(make_trainer: Make) -> None:
    """End to end with real generation: the share of completions that hold the word 7 rises."""

    def holds_seven(completions: list[str], **_: Any) -> list[float]:
        return [float("7" in text.split()) for text in completions]

    trainer = make_trainer(
        reward_funcs=holds_seven, per_device_train_batch_size=16, num_generations=4, max_steps=25, peft_config=None
    )
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.7


def test_records(make_trainer: Make) -> None:
    trainer = make_trainer(engine=FixedEngine(), max_steps=4, logging_steps=2, report_to="tensorboard")
    trainer.train()
    lines = metric_lines(trainer)
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert lines[0].keys() >= METRICS
    assert "kl" not in lines[0]
    assert "train_runtime" in lines[2]
    assert 2 <= lines[0]["kernel_calls"] <= lines[1]["kernel_calls"] - 2
    assert lines[0]["fused_head"] == 1.0
    folder = Path(str(trainer.args.output_dir))
    files = sorted((folder / "completions").iterdir())
    assert [file.name for file in files] == [f"step-{i:06d}.jsonl" for i in range(1, 5)]
    record = json.loads(files[0].read_text().splitlines()[0])
    assert record.keys() >= {"step", "prompt", "completion", "rewards", "advantage"}
    assert list(folder.glob("**/events.out.tfevents.*"))
    # a window holds two steps: the logged reward is their mean
    per_file = [[json.loads(line)["rewards"]["reward_number"] for line in f.read_text().splitlines()] for f in files]
    assert lines[0]["reward"] == pytest.approx(sum(map(sum, per_file[:2])) / 12, rel=1e-5)
    tokens = sum(len(p) for batch in trainer.rollouts.engine.prompts for p in batch)
    completion_tokens = sum(json.loads(line)["tokens"] for f in files for line in f.read_text().splitlines())
    assert lines[1]["num_tokens"] == tokens + completion_tokens


def test_table_and_progress_bar(make_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(engine=FixedEngine(), max_steps=2, log_completions=True, disable_tqdm=False).train()
    captured = capsys.readouterr()
    assert "completions at step 2" in captured.out
    assert "reward_number" in captured.out
    assert "reward=0." in captured.err


def test_columns_reach_the_reward_in_order(make_trainer: Make) -> None:
    calls: list[tuple[list[str], list[str]]] = []

    def check(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        calls.append((prompts, answer))
        return [0.0] * len(completions)

    make_trainer(reward_funcs=check, max_steps=2).train()
    assert len(calls) == 2
    for prompts, answers in calls:
        assert [p.split()[1] for p in prompts] == answers
        assert prompts[0::2] == prompts[1::2]


def test_an_epoch_is_each_prompt_once(make_trainer: Make) -> None:
    """20 prompts in generation batches of 3: six batches per epoch, two prompts wait for the next order."""
    engine = FixedEngine()
    trainer = make_trainer(engine=engine, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 12
    assert trainer.state.epoch == 2.0
    for epoch in (engine.prompts[:6], engine.prompts[6:]):
        prompts = [tuple(p) for batch in epoch for p in batch]
        assert len(prompts) == 36
        assert len(set(prompts)) == 18
    assert engine.prompts[:6] != engine.prompts[6:]


def test_chat_prompts_and_datasets(make_trainer: Make) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"add {i}"}], "answer": i} for i in range(8)]

    def check(prompts: list[Any], completions: list[Any], answer: list[int], **_: Any) -> list[float]:
        assert prompts[0][0]["content"] == f"add {answer[0]}"
        assert completions[0][0].keys() == {"role", "content"}
        return reward_number(completions)

    make_trainer(reward_funcs=check, train_dataset=Dataset.from_list(rows), max_steps=1).train()


def test_several_weighted_rewards(make_trainer: Make) -> None:
    async def half(completions: list[str], **_: Any) -> list[float | None]:
        return [0.5 if i % 2 else None for i in range(len(completions))]

    trainer = make_trainer(reward_funcs=[reward_number, half], reward_weights=[2.0, 1.0], engine=FixedEngine())
    trainer.train()
    line = metric_lines(trainer)[0]
    assert line["rewards/half/mean"] == 0.5
    assert line["reward"] == pytest.approx(2 * line["rewards/reward_number/mean"] + 0.25, rel=1e-5)


def test_missing_rewards_train_on_the_rest(make_trainer: Make) -> None:
    def nan(completions: list[str], **_: Any) -> list[float]:
        return [math.nan] * len(completions)

    trainer = make_trainer(reward_funcs=nan, engine=FixedEngine(), max_steps=1)
    before = weights(trainer).clone()
    with pytest.warns(UserWarning, match="6 of 6 completions got no reward"):
        trainer.train()
    line = metric_lines(trainer)[0]
    assert line["reward"] is None
    assert line["loss"] == 0.0
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_reference_only_with_beta(make_trainer: Make, adapter: LoraConfig | None) -> None:
    trainer = make_trainer(engine=FixedEngine(), peft_config=adapter)
    assert trainer.reference is None
    trainer = make_trainer(engine=FixedEngine(), peft_config=adapter, beta=0.1, max_steps=3, learning_rate=0.1)
    trainer.train()
    kl = [line["kl"] for line in metric_lines(trainer)[:3]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[2] > 1e-5
    assert trainer.model.training


def test_adapter_trains_alone(make_trainer: Make) -> None:
    trainer = make_trainer(peft_config=LORA, max_steps=2, dtype="bfloat16")
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = weights(trainer).clone()
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    assert next(iter(frozen.values())).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="already has an adapter"):
        make_trainer(model=trainer.model, peft_config=LORA)


def test_all_truncated_and_masked(make_trainer: Make) -> None:
    engine = FixedEngine(end_share=-1.0)
    trainer = make_trainer(engine=engine, mask_truncated_completions=True, beta=0.1, max_steps=2)
    before = weights(trainer).clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("every completion of a generation batch was truncated" in str(w.message) for w in caught) == 1
    lines = metric_lines(trainer)
    assert [line["loss"] for line in lines[:2]] == [0.0, 0.0]
    assert [line["kl"] for line in lines[:2]] == [0.0, 0.0]
    assert lines[0]["completions/clipped_ratio"] == 1.0
    assert torch.equal(weights(trainer), before)


def test_nan_weights_are_reported(make_trainer: Make) -> None:
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    trainer = make_trainer(model=model, engine=FixedEngine(), max_steps=1)
    trainer.train()
    assert metric_lines(trainer)[0]["nonfinite_tokens"] > 0


def test_stops_without_the_kernels(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_ext, "grpo_loss", grpo_ext.reference.grpo_loss)

    def in_torch(*args: Any, valid_rows: int, memory_budget: int | None, **kwargs: Any) -> Any:
        return grpo_ext.reference.linear_grpo_loss(*args, **kwargs)

    monkeypatch.setattr(grpo_ext, "linear_grpo_loss", in_torch)
    for fused in (None, False):
        with pytest.raises(RuntimeError, match="step 1: the compiled kernels of grpo_ext did not compute the loss"):
            make_trainer(engine=FixedEngine(), use_fused_head=fused).train()


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_head_memory_budget_reaches_the_head(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    """In the loss, and where log probabilities are taken beforehand; None is the losses' own on the CPU."""
    asked: dict[str, set[int | None]] = {}
    for name in ("linear_grpo_loss", "linear_selective_log_softmax"):
        own = getattr(grpo_ext, name)

        def watched(*args: Any, name: str = name, own: Any = own, **kwargs: Any) -> Any:
            asked.setdefault(name, set()).add(kwargs["memory_budget"])
            return own(*args, **kwargs)

        monkeypatch.setattr(grpo_ext, name, watched)
    make_trainer(engine=FixedEngine(), head_memory_budget=budget, beta=0.1, max_steps=1).train()
    assert asked == {"linear_grpo_loss": {budget}, "linear_selective_log_softmax": {budget}}


class TwoRanks:
    """Stands in for an accelerator whose second rank holds the same values plus one."""

    num_processes = 2

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, value + 1])

    def pad_across_processes(self, value: torch.Tensor, pad_index: float) -> torch.Tensor:
        return torch.cat([value, torch.tensor([pad_index])])


def test_entropy_threshold_is_the_quantile_over_all_ranks(make_trainer: Make) -> None:
    trainer = make_trainer(engine=FixedEngine(), top_entropy_quantile=0.3)
    rollout, _, _ = trainer._sample_rollout(trainer.model, (0, 0), 0)
    batch = rollout.micro_batch(0, trainer.pad_id, "cpu")
    assert trainer.model_pass.threshold is None  # one rank: the loss's own quantile
    logits = trainer.model_pass.logits(trainer.model, batch).detach()
    trainer.accelerator = TwoRanks()
    x = logits.log_softmax(-1)
    entropies = -(x.exp() * x).sum(-1)
    known = entropies[batch.loss_mask == 1]
    expected = torch.quantile(torch.cat([known, known + 1]), 0.7)
    threshold = trainer._entropy_threshold(entropies, batch.loss_mask)
    torch.testing.assert_close(threshold, expected, rtol=1e-5, atol=1e-5)
    # What a run of several ranks asks for, by both paths.
    for head in (None, False):
        asked: list[torch.Tensor] = []
        policy = ModelPass(
            trainer.layouts,
            FusedHead(trainer.model, head),
            trainer.loss_config,
            lambda entropy, mask, asked=asked: asked.append(entropy) or trainer._entropy_threshold(entropy, mask),
        )
        output = policy.loss(trainer.model, batch)
        kept = asked[0][batch.loss_mask == 1]
        torch.testing.assert_close(kept, known, rtol=1e-5, atol=1e-5)
        assert output.loss.isfinite()


# ---- evaluation


def test_evaluation(make_trainer: Make, dataset: list[dict[str, Any]]) -> None:
    trainer = make_trainer(eval_dataset=dataset[:5], per_device_eval_batch_size=2)
    state = torch.random.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first["eval_reward"] == second["eval_reward"]
    assert 0 < first["eval_reward"] < 1
    assert first["eval_rewards/reward_number/mean"] == pytest.approx(first["eval_reward"])
    assert first["eval_completions/mean_length"] >= 1
    assert [line["eval_reward"] for line in metric_lines(trainer)] == [first["eval_reward"]] * 2
    texts = trainer.rollouts.generate(
        trainer.model, dataset, list(range(5)), trainer.rollouts.sampling.__class__(5, 0.0)
    ).texts
    assert first["eval_reward"] == pytest.approx(sum(reward_number(texts)) / 5)


def test_sampled_evaluation_and_several_sets(make_trainer: Make, dataset: list[dict[str, Any]]) -> None:
    parts = {"easy": dataset[:3], "hard": dataset[3:5]}
    trainer = make_trainer(eval_dataset=parts, eval_temperature=1.0, num_generations_eval=4)
    metrics = trainer.evaluate()
    assert {"eval_easy_reward", "eval_hard_reward"} <= metrics.keys()
    assert metrics["eval_easy_reward_std"] > 0


def test_evaluation_during_training_changes_nothing(make_trainer: Make, dataset: list[dict[str, Any]]) -> None:
    results = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            eval_dataset=dataset[:3], eval_strategy=strategy, eval_steps=1, eval_temperature=1.0, max_steps=3
        )
        trainer.train()
        results.append(weights(trainer))
    assert torch.equal(*results)
    assert sum("eval_reward" in line for line in metric_lines(trainer)) == 3


def test_evaluation_needs_a_dataset(make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        make_trainer().evaluate()
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        make_trainer(eval_dataset=[])


# ---- resume


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1"}, r"train_dataset\[4\] has no 'prompt' column, only: question; give every row a prompt"),
        ({"prompt": None}, r"train_dataset\[4\] has prompt=None; give every row a prompt"),
        ("text", r"train_dataset holds str rows \(train_dataset\[4\]\)"),
    ],
)
def test_a_later_row_without_prompt(make_trainer: Make, row: Any, message: str) -> None:
    """Found when the row is read, before its batch is generated; the steps before it are kept."""
    rows = [{"prompt": f"add {i}"} for i in range(4)] + [row] + [{"prompt": "add"}]
    engine = FixedEngine()
    trainer = make_trainer(engine=engine, train_dataset=rows, eval_dataset=rows, shuffle_dataset=False, max_steps=2)
    with pytest.raises(ValueError, match=message + r"(.|\n)*after step 1 is saved"):
        trainer.train()
    assert len(engine.prompts) == 1
    with pytest.raises(ValueError, match=message.replace("train", "eval")):
        trainer.evaluate()


def test_a_prompt_too_long_leaves_a_checkpoint(make_trainer: Make) -> None:
    rows = [{"prompt": "add 1"}] * 3 + [{"prompt": "add " * 70}] * 3
    trainer = make_trainer(engine=FixedEngine(), train_dataset=rows, shuffle_dataset=False, max_steps=2)
    with pytest.raises(
        ValueError, match=r"prompt 0 has 70 tokens; with(.|\n)*set max_prompt_length=59(.|\n)*after step 1 is saved"
    ):
        trainer.train()
    assert Path(f"{trainer.args.output_dir}/checkpoint-1/grpo_state_0.pt").exists()


def test_training_twice_starts_anew(make_trainer: Make) -> None:
    engine = FixedEngine()
    trainer = make_trainer(engine=engine, max_steps=1)
    trainer.train()
    once = trainer.kernel_calls
    trainer.train()
    assert len(engine.prompts) == 2
    assert 0 < trainer.kernel_calls <= once + 1  # counted anew; how many calls a loss takes depends on its rows


@pytest.mark.parametrize(("slices", "iterations"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_every_completion_is_kept(make_trainer: Make, slices: int, iterations: int) -> None:
    """Steps of four micro-batches that span several generation batches, resumed after the first step too."""
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": slices,
        "num_iterations": iterations, "max_steps": 3, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    trainer, seen = recorded_run(make_trainer, None, **changes)
    folder = Path(str(trainer.args.output_dir)) / "completions"
    files = sorted(folder.iterdir())
    kept = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [[line["prompt"] + "->" + line["completion"] for line in lines] for lines in kept] == seen
    assert [lines[0]["generation"] for lines in kept] == list(range(1, len(seen) + 1))
    assert len(files) == -(-12 // (slices * iterations))
    assert all(file.name.startswith(f"step-{lines[0]['step']:06d}") for file, lines in zip(files, kept, strict=True))
    resumed, _ = recorded_run(make_trainer, f"{trainer.args.output_dir}/checkpoint-1", **changes)
    again = sorted((Path(str(resumed.args.output_dir)) / "completions").iterdir())
    assert [file.name for file in again] == [file.name for file in files]
    assert [[json.loads(line) for line in file.read_text().splitlines()] for file in again] == kept


def recorded_run(make_trainer: Make, resume: str | None, **changes: Any) -> tuple[GRPOTrainer, list[list[str]]]:
    """A run with real sampling, and the prompts and completions of every generation batch."""
    seen: list[list[str]] = []

    def remember(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.append([p + "->" + c for p, c in zip(prompts, completions, strict=True)])
        return reward_number(completions)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(reward_funcs=remember, **changes)
        trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"num_iterations": 2, "save_steps": 3},  # the checkpoint lies inside a generation batch
        {"steps_per_generation": 2, "save_steps": 3, "peft_config": LORA, "shuffle_completions": True},
        {"per_device_train_batch_size": 20},  # two steps are one epoch: the checkpoint lies on its boundary
    ],
    ids=["plain", "accumulation", "replays", "two-steps-lora-shuffled", "epoch-boundary"],
)
def test_resume_continues_the_same_run(make_trainer: Make, changes: dict[str, Any]) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    whole, seen = recorded_run(make_trainer, None, **changes)
    checkpoint = f"{whole.args.output_dir}/checkpoint-{changes['save_steps']}"
    lines = metric_lines(whole)
    resumed, seen_after = recorded_run(make_trainer, checkpoint, **changes)
    assert seen_after == seen[len(seen) - len(seen_after) :]
    assert 0 <= len(seen_after) < len(seen)
    assert torch.equal(weights(resumed), weights(whole))
    resumed_lines = metric_lines(resumed)
    assert [line["step"] for line in resumed_lines] == [1, 2, 3, 4, 4]
    for name in ("loss", "reward", "entropy", "grad_norm", "num_tokens", "kernel_calls"):
        before = [line.get(name) for line in lines[:4]]
        after = [line.get(name) for line in resumed_lines[:4]]
        assert after == before, name


def test_resume_on_other_processes_is_an_error(make_trainer: Make) -> None:
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole, _ = recorded_run(make_trainer, None, **changes)
    path = Path(f"{whole.args.output_dir}/checkpoint-1/grpo_state_0.pt")
    state = torch.load(path, weights_only=True)
    state["plan"]["world_size"] = 4
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"written by 4 process\(es\), this run has 1"):
        recorded_run(make_trainer, str(path.parent), **changes)


def test_resume_with_other_numbers_warns(make_trainer: Make) -> None:
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole, _ = recorded_run(make_trainer, None, **changes)
    trainer = make_trainer(**{**changes, "num_generations": 3})
    with pytest.warns(UserWarning, match=r"batch numbers differ .*num_generations 2 -> 3"):
        trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")


def test_best_checkpoint_by_reward(make_trainer: Make, dataset: list[dict[str, Any]]) -> None:
    trainer = make_trainer(
        eval_dataset=dataset[:3],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    rewards = [line["eval_reward"] for line in metric_lines(trainer) if "eval_reward" in line]
    assert trainer.state.best_metric == pytest.approx(max(rewards))


# ---- models and tokenizers


def test_model_from_a_folder(make_config: Callable[..., GRPOConfig], tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"add {i}"} for i in range(6)]
    trainer = GRPOTrainer(folder, reward_number, make_config(dtype="bfloat16", max_steps=1), rows)
    assert trainer.model.dtype == torch.bfloat16
    trainer.train()


def test_pad_falls_back_to_eos(make_config: Callable[..., GRPOConfig], dataset: list[dict[str, Any]]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    trainer = GRPOTrainer(build_model(), reward_number, make_config(), dataset, processing_class=tokenizer)
    assert trainer.pad_id == EOS
    trainer.train()


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"kind": "llama"}, {"gradient_checkpointing": True, "peft_config": LORA}, {"top_p": 0.9}],
    ids=["bf16", "llama", "checkpointed-lora", "top-p"],
)
def test_other_set_ups_train(make_trainer: Make, changes: dict[str, Any]) -> None:
    model = build_model(changes.get("kind", "qwen2"))
    trainer = make_trainer(model=model, max_steps=1, **{k: v for k, v in changes.items() if k != "kind"})
    trainer.train()
    assert metric_lines(trainer)[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_dataset": []}, ValueError, "train_dataset is empty"),
        ({"train_dataset": [{"question": "1"}]}, ValueError, "no 'prompt' column, only: question"),
        ({"reward_funcs": "a/model"}, TypeError, "reward_funcs holds str"),
        ({"reward_weights": [1.0, 1.0]}, ValueError, r"reward_weights has 2 value\(s\) for 1"),
        ({"model": 3}, TypeError, "model is int: pass a hub name, a folder or a torch module"),
        ({"model_init_kwargs": {"a": 1}}, ValueError, "model_init_kwargs needs a model given by name"),
    ],
)
def test_bad_input(make_trainer: Make, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_trainer(**changes)


def test_args_of_another_kind(dataset: list[dict[str, Any]], tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args is TrainingArguments: pass a GRPOConfig"):
        GRPOTrainer(build_model(), reward_number, args, dataset)


def test_errors_in_the_first_step(make_trainer: Make) -> None:
    def broken(**_: Any) -> list[float]:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(RewardError, match="reward function 'broken' raised ZeroDivisionError"):
        make_trainer(reward_funcs=broken, engine=FixedEngine()).train()
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens; with max_completion_length=62 that exceeds"):
        make_trainer(max_completion_length=62, shuffle_dataset=False).train()

"""Short runs of a tiny model on however many processes it is started on; see test_two_processes.py.

    torchrun --nproc_per_node 2 two_process_worker.py FOLDER KIND...

KIND says how the weights are spread: ``ddp`` (not at all), ``fsdp2``, ``zero2`` or ``zero3``. On the CPU, or with
two GPUs visible on those.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from toys import EOS, WORDS, GradientCatcher, build_model, build_tokenizer, reward_number
from transformers import TrainerCallback

from grpo_ext.generation.engine import Completions, SamplingParams
from grpo_ext.generation.errors import PromptError
from grpo_ext.generation.vllm.weights import checkpoint_weights
from grpo_ext.modules.sharding import full_tensor, is_sharded
from grpo_ext.trainer import GRPOConfig, GRPOTrainer
from grpo_ext.update.guard import NonfiniteError

#: Words that end a greedy completion here, so that some are short and some are long.
ENDS = [EOS, 2, 3, 4]
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
#: What runs with each kind.
CASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("zero2", "zero3"), (*LOSSES, "skipped", "filled", "lora")),
    "ddp": (*LOSSES, "skipped", "filled", "packed", "lora", "lora and head"),
    "fsdp2": (*LOSSES, "skipped", "filled", "lora", "lora and head"),
}
#: Cases in which many rows have no gradient.
SKIPPED = ("skipped", "filled")
#: What is trained, where that is not all of the model.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "lora and head": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]},
}
ROWS = [{"prompt": f"add {i} " + "= " * (i % 3 + 1)} for i in range(20)]


class HashEngine:
    """Completions that depend on the prompt and on how often a call has seen it, not on rank or order of calls."""

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> Completions:
        seen: dict[tuple[int, ...], int] = {}
        ids, finished = [], []
        for prompt in prompt_ids:
            key = tuple(prompt)
            seen[key] = seen.get(key, 0) + 1
            generator = torch.Generator().manual_seed(sum(key) * 100 + seen[key])
            n = int(torch.randint(1, 6, (), generator=generator))
            row = torch.randint(2, len(WORDS), (n,), generator=generator).tolist()
            ids.append([*row[:-1], EOS] if n < 5 else row)
            finished.append(n < 5)
        return Completions(ids, finished)


def second_half(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Advantage 0 for the prompts below 10: of some micro-batches nothing is left."""
    numbers = reward_number(completions)
    return [n if int(p.split()[1]) >= 10 else 0.5 for p, n in zip(prompts, numbers, strict=True)]


def sharding(kind: str) -> dict[str, Any]:
    """Fields of the config that spread the weights as ``kind`` says."""
    if kind == "fsdp2":
        layers = {"transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
        return {"fsdp": True, "fsdp_config": {"version": 2, **layers}, "use_cpu": not torch.cuda.is_available()}
    if kind.startswith("zero"):
        sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
        automatic = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
        # Plain descent is not among the optimizers that DeepSpeed knows, and its own would have to be compiled.
        other_optimizer = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        config = {**automatic, **other_optimizer, "zero_optimization": {"stage": int(kind[-1])}}
        return {"deepspeed": config, "accelerator_config": {"use_configured_state": not torch.cuda.is_available()}}
    # What one process does alone is the same on all machines: it stays on the CPU.
    return {"use_cpu": not (torch.cuda.is_available() and "WORLD_SIZE" in os.environ)}


def without_gpus(folder: Path) -> str:
    """What is said of FSDP where accelerate would take DDP instead."""
    args = GRPOConfig(output_dir=str(folder), per_device_train_batch_size=8, report_to="none", **sharding("fsdp2"))
    try:
        GRPOTrainer(build_model(), reward_number, args, ROWS, processing_class=build_tokenizer())
    except ValueError as error:
        return str(error)
    return ""


def make_config(kind: str, **fields: Any) -> GRPOConfig:
    """A config on this machine, with or without GPUs."""
    if kind.startswith("zero") and not torch.cuda.is_available():
        import deepspeed

        # accelerate asks a GPU for the name of the backend; without one it has to be told. And no compiling of
        # DeepSpeed's own messages through shared memory: gloo's are tested here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
    args = GRPOConfig(**fields, **sharding(kind))
    if kind == "fsdp2" and not torch.cuda.is_available():
        # accelerate turns to FSDP where it sees GPUs. Everything behind that question works on gloo as well.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def make_trainer(
    folder: Path, case: str, world_size: int, kind: str, callbacks: Any = None, model: Any = None, **changes: Any
) -> GRPOTrainer:
    """Three steps of plain descent, two per generation, with a KL term (not for ``skipped`` and ``filled``).

    Args:
        case: a loss type, ``skipped`` (many rows without a gradient), ``filled`` (the same in micro-batches that are
            filled), ``packed`` (sequences end to end) or one of `ADAPTERS` (all of them with dapo).
    """
    skipped = case in SKIPPED
    # bnpo averages over a rank's own micro-batch: one process equals two where it takes theirs one after the other.
    in_turn = 2 if case == "filled" or (case == "bnpo" and world_size == 1) else 1
    fields: dict[str, Any] = {
        "output_dir": str(folder / f"run-{case}-{world_size}-{kind}"),
        "per_device_train_batch_size": 8 // world_size // in_turn,
        "gradient_accumulation_steps": 2 * in_turn,
        "steps_per_generation": 4 * in_turn,
        "num_generations": 2,
        "max_completion_length": 5,
        "max_steps": 3,
        "loss_type": case if case in LOSSES else "dapo",
        "beta": 0.0 if skipped else 0.05,
        "fill_micro_batches": case == "filled",
        "padding_free": case == "packed" and world_size > 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = make_config(kind, **{**fields, **changes})  # before the model: DeepSpeed takes part in loading it
    trainer = GRPOTrainer(
        build_model() if model is None else model,
        second_half if skipped else reward_number,
        args,
        ROWS,
        eval_dataset=ROWS[:5],
        processing_class=build_tokenizer(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=2, lora_alpha=16, **ADAPTERS[case]) if case in ADAPTERS else None,
    )
    real: Any = trainer.rollouts.engine
    real.end_ids = ENDS
    trainer.real_engine = real  # type: ignore[attr-defined]
    trainer.rollouts.engine = HashEngine()
    return trainer


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """All weights, put together; every rank must ask."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return {name: full_tensor(p).cpu().clone() for name, p in model.named_parameters()}


class Served(TrainerCallback):
    """What served the LoRA layers in the last step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.latest = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.latest = self.trainer.faster_layers.lora.describe()


@contextlib.contextmanager
def counted_drops() -> Iterator[list[int]]:
    """How many all-gathers of FSDP2 a backward has begun and nobody has taken. On GPUs they spoil what comes next."""
    finalize, dropped = FSDPParamGroup.finalize_backward, [0]

    def counting(group: FSDPParamGroup) -> None:
        dropped[0] += group._all_gather_result is not None
        finalize(group)

    FSDPParamGroup.finalize_backward = counting  # type: ignore[method-assign]
    try:
        yield dropped
    finally:
        FSDPParamGroup.finalize_backward = finalize  # type: ignore[method-assign]


def run(
    folder: Path, case: str, world_size: int, kind: str = "ddp", resume: Any = None, **changes: Any
) -> dict[str, Any]:
    """Gradients of each step (flat; none under DeepSpeed), the logs, the weights in the end, and what it generates."""
    catcher, served = GradientCatcher(), Served()
    trainer = make_trainer(folder, case, world_size, kind, [catcher, served], **changes)
    served.trainer = trainer
    with counted_drops() as dropped:
        trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    result = {
        "gradients": [
            torch.cat([full_tensor(g).cpu().flatten() for g in step.values()]) for step in catcher.steps if step
        ],
        "logs": [line for line in trainer.state.log_history if "loss" in line],
        "eval_reward": trainer.evaluate()["eval_reward"],
        "weights": weights_of(trainer),
        "handed over": {name: tensor.cpu().clone() for name, tensor in checkpoint_weights(model)},
        "kind": kind,
        "dropped all-gathers": dropped[0],
        "lora layers": served.latest,
        "packed": trainer.args.padding_free and trainer.layouts.padded_because is None,
        "sharded": any(is_sharded(p) for p in model.parameters()),
    }
    # Greedy completions of the model itself, which end at different steps: a rank that is done has to go on.
    trainer.rollouts.engine = trainer.real_engine  # type: ignore[attr-defined]
    trainer.args.max_completion_length = 24
    result["generated"] = {n: v for n, v in trainer.evaluate().items() if "length" in n or n == "eval_reward"}
    return result


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(weights_of(self.trainer))


def nonfinite(folder: Path, kind: str) -> dict[str, Any]:
    """The second step's first loss is infinite on the last rank, its gradient is not; then an error at the first."""
    seen = Weights()
    trainer = make_trainer(folder / "skips", "dapo", 2, kind, [seen])
    seen.trainer = trainer
    calls, last, compute_loss = [0], trainer.accelerator.process_index == 1, trainer.compute_loss

    def spoilt(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        calls[0] += 1
        loss, output = compute_loss(*args, **kwargs)
        return loss + (math.inf if last and calls[0] == 3 else 0.0), output

    trainer.compute_loss = spoilt  # type: ignore[method-assign]
    trainer.train()
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(seen.steps, seen.steps[1:], strict=False)]
    result: dict[str, Any] = {"steps that moved nothing": same}
    result["counted"] = [line["nonfinite_steps"] for line in trainer.state.log_history if "loss" in line]
    result["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result["train_loss"] = trainer.state.log_history[-1]["train_loss"]
    trainer = make_trainer(folder / "ends", "dapo", 2, kind, max_nonfinite_steps=1)
    calls[0], compute_loss = 2, trainer.compute_loss
    trainer.compute_loss = spoilt  # type: ignore[method-assign]
    try:
        trainer.train()
    except NonfiniteError as error:
        result["error"] = str(error)
    return result


def resumed(folder: Path, kind: str, of_one: Path) -> dict[str, Any]:
    """A run, the same run gone on with from its first step, inside a generation batch, and from one process's."""
    optim = {"optim": "adamw_torch"}  # FSDP2 of torch cannot load the state of an optimizer that has none
    whole_run = make_trainer(folder / "first", "dapo", 2, kind, save_strategy="steps", save_steps=1, **optim)
    whole_run.train()
    result: dict[str, Any] = {"whole": weights_of(whole_run)}
    trainer = make_trainer(folder / "second", "dapo", 2, kind, **optim)
    trainer.train(resume_from_checkpoint=str(folder / "first" / f"run-dapo-2-{kind}" / "checkpoint-1"))
    result["resumed"] = weights_of(trainer)
    result["losses"] = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (whole_run, trainer)]
    trainer = make_trainer(folder / "third", "dapo", 2, kind)
    try:
        trainer.train(resume_from_checkpoint=str(of_one / "run-dapo-1-ddp" / "checkpoint-1"))
    except ValueError as error:
        result["error"] = str(error)
    return result


def too_long(folder: Path) -> list[str]:
    """Return each rank's error for a prompt that is too long; only the second rank has one."""
    trainer = make_trainer(folder, "dapo", 2, "ddp", shuffle_dataset=False)
    trainer.rollouts.dataset = [*ROWS[:2], {"prompt": "add " * 70}, *ROWS[3:]]
    try:
        trainer.train()
    except PromptError as error:
        return gather_object([str(error)])
    return []


def no_prompt(folder: Path) -> list[str]:
    """Return each rank's error for a row without a prompt; only the first rank has one."""
    trainer = make_trainer(folder, "dapo", 2, "ddp", shuffle_dataset=False)
    trainer.rollouts.dataset = [{"question": "add"}, *ROWS[1:]]
    try:
        trainer.train()
    except PromptError as error:
        return gather_object([str(error)])
    return []


def from_folder(folder: Path, kind: str, saved: Path) -> list[list[float]]:
    """Losses with a reference model that moves: of a model that is loaded in pieces, and of one that is handed in."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    trainers = [make_trainer(folder, "dapo", 2, kind, model=model, **moving) for model in (str(saved), None)]
    for trainer in trainers:
        trainer.train()
    return [[line["loss"] for line in t.state.log_history if "loss" in line] for t in trainers]


def sampled(folder: Path) -> list[list[int]]:
    """Completions of one prompt whose group lies on both ranks, from the model itself, rank after rank."""
    args = GRPOConfig(
        output_dir=str(folder / "sampled"),
        per_device_train_batch_size=4,
        num_generations=8,
        max_completion_length=5,
        report_to="none",
        **sharding("ddp"),
    )
    trainer = GRPOTrainer(build_model(), reward_number, args, [{"prompt": "add 1"}], processing_class=build_tokenizer())
    rollout, _, _ = trainer._sample_rollout(trainer.model, (0, 0), 0)
    return gather_object(rollout.completion_ids)


def main(folder: Path, kinds: Sequence[str]) -> None:
    results: dict[str, Any] = {}
    for kind in kinds:
        results[kind] = {case: run(folder, case, 2, kind) for case in CASES[kind]}
        if kind == "fsdp2":
            results[kind]["bf16"] = run(folder / "bf16", "lora", 2, kind, bf16=True)["logs"]
        if kind == "fsdp2" and torch.cuda.is_available():  # what two streams spoil they do not spoil each time
            results[kind]["again"] = [run(folder / f"again-{i}", "lora", 2, kind)["logs"] for i in range(8)]
        results[kind]["nonfinite"] = nonfinite(folder / f"nonfinite-{kind}", kind)
        results[kind]["resumed"] = resumed(folder / f"resumed-{kind}", kind, folder / "of-one")
    if "zero3" in kinds:
        results["from a folder"] = from_folder(folder / "from-folder", "zero3", folder / "model")
    if "ddp" in kinds:
        results["sampled"] = sampled(folder)
        results["too long"] = too_long(folder / "too-long")
        results["no prompt"] = no_prompt(folder / "no-prompt")
    if "ddp" in kinds and not torch.cuda.is_available():
        results["fsdp without GPUs"] = without_gpus(folder / "without-gpus")
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "two.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({"kinds": sys.argv[2:]}))
    main(Path(sys.argv[1]), sys.argv[2:])

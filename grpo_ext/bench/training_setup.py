"""Run a case with this package's trainer, TRL's or Unsloth's on prepared completions, and time its steps.

All trainers get the same token ids, log probabilities and rewards instead of generating, so that generation does not
affect the measurement. The rest of a step is the trainer's own code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from grpo_ext.bench import common
from grpo_ext.bench.training_case import Case, lora_config
from grpo_ext.bench.training_workload import Workload
from grpo_ext.generation.engine import Completions
from grpo_ext.trainer import GRPOConfig, GRPOTrainer

#: Trainer and settings of each candidate; ``patch`` has the arguments of `patch` of `grpo_ext.integrations.trl` or
#: `grpo_ext.integrations.unsloth`. Unsloth's trainer runs in a process of its own, see `run_unsloth`.
CANDIDATES: dict[str, dict[str, Any]] = {
    "ours": {"trainer": "ours", "fill_micro_batches": True},
    "ours_unfused": {"trainer": "ours", "fill_micro_batches": True, "use_fused_lora": False, "use_fused_norm": False},
    "ours_sorted": {"trainer": "ours", "length_sorted_batches": True},
    "ours_defaults": {"trainer": "ours"},
    "ours_packed": {"trainer": "ours", "length_sorted_batches": True, "padding_free": True},
    "trl": {"trainer": "trl"},
    "trl_patch": {"trainer": "trl", "patch": {}},
    "trl_filled": {"trainer": "trl", "patch": {"fill_micro_batches": True}},
    "trl_fused": {"trainer": "trl", "patch": {"fuse_loss": True}},
    "trl_fused_filled": {"trainer": "trl", "patch": {"fuse_loss": True, "fill_micro_batches": True}},
    "unsloth": {"trainer": "unsloth"},
    "unsloth_head": {"trainer": "unsloth", "patch": {"one_forward": False, "trim": False, "dense": False}},
    "unsloth_dense": {"trainer": "unsloth", "patch": {"head": False, "one_forward": False, "trim": False}},
    "unsloth_patch": {"trainer": "unsloth", "patch": {}},
    # Settings with which TRL saves the same host work that this package's trainer saves by default.
    "trl_reentrant": {
        "trainer": "trl",
        "gradient_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": False},
    },
}


@dataclasses.dataclass
class Measured:
    """Result of one candidate's run; lists have one value per step.

    ``forwards`` counts passes through the layers, without the recomputation of gradient checkpointing.
    """

    step_seconds: list[float]
    rollout_seconds: list[float]
    losses: list[float]
    grad_norms: list[float]
    forwards: list[int]
    micro_batches: int
    peak_bytes: float
    before_bytes: float
    note: str = ""

    def training_seconds(self, warmup: int) -> list[float]:
        """Seconds of each step after warm-up, without handing out, decoding and tokenizing completions."""
        pairs = zip(self.step_seconds, self.rollout_seconds, strict=True)
        return [step - rollout for step, rollout in pairs][warmup:]


class StepWatch(TrainerCallback):
    """Record seconds and logged values of every step; a step ends after its logging."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.rollout: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.forwards: list[int] = []
        self._start = self._rollout = 0.0
        self._forwards = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        common.synchronize(self.device)
        self._rollout, self._forwards = 0.0, 0
        self._start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        common.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._start)
        self.rollout.append(self._rollout)
        self.losses.append(float(logs["loss"]))
        self.grad_norms.append(float(logs["grad_norm"]))
        self.forwards.append(self._forwards)

    def count_forward(self, *_: Any) -> None:
        """Forward hook of the model's layers."""
        self._forwards += 1

    def as_rollout(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``function`` and count its time as rollout; the device is idle then, so host time is enough."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._rollout += time.perf_counter() - start

        return run


class Prepared:
    """Generation engine for this package's trainer that returns the completions of a workload."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def generate(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling: Any) -> Completions:
        ids, logps = self.workload.serve(prompt_ids)
        return Completions(ids, [True] * len(ids), logps)


def build_ours(
    case: Case, workload: Workload, arguments: dict[str, Any], model: Any, tokenizer: Any, watch: StepWatch
) -> Any:
    config = GRPOConfig(**arguments, save_completions=False)
    trainer = GRPOTrainer(
        model, workload.reward, config, workload.dataset(), processing_class=tokenizer, peft_config=lora_config(case),
        callbacks=[watch],
    )  # fmt: skip
    rollouts: Any = trainer.rollouts
    rollouts.engine = Prepared(workload)
    rollouts.generate = watch.as_rollout(trainer.rollouts.generate)
    return trainer


def build_trl(
    case: Case, workload: Workload, arguments: dict[str, Any], model: Any, tokenizer: Any, watch: StepWatch
) -> Any:
    """Build TRL's trainer so that it treats the prepared log probabilities as reported by vLLM."""
    import trl
    from datasets import Dataset

    class Trainer(trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            return workload.serve(prompt_ids)

    config = trl.GRPOConfig(**arguments)
    trainer = Trainer(
        model, workload.reward, config, Dataset.from_list(workload.dataset()), processing_class=tokenizer,
        peft_config=lora_config(case), callbacks=[watch],
    )  # fmt: skip
    trainer.use_vllm = True  # set after construction, because the constructor would start an engine
    trainer._generate = watch.as_rollout(trainer._generate)
    return trainer


def backbone(model: Any) -> nn.Module:
    """Return the layers below the head, without PEFT's wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model


@torch.no_grad()
def start_adapter(model: nn.Module) -> None:
    """Set the same adapter weights for every candidate; constructors draw different amounts of random numbers."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values)


@contextlib.contextmanager
def patched(arguments: dict[str, bool] | None) -> Iterator[None]:
    """Patch TRL inside this context, and raise an error if our kernels served no call; None does not patch."""
    if arguments is None:
        yield
        return
    import grpo_ext.integrations.trl as integration

    integration.patch(**arguments)
    try:
        yield
        status = integration.status()
        print(status)
        if not status.served and not status.losses_served:
            raise RuntimeError(f"the patched TRL never called this package's kernels: {status}")
    finally:
        integration.unpatch()


def release_memory(device: torch.device) -> None:
    """Release memory of the previous candidate and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


Instrument = Callable[[Any, str], None]


def run_candidate(
    name: str,
    case: Case,
    workload: Workload,
    tokenizer: Any,
    instrument: Instrument | None = None,
    *,
    world: int = 1,
    extra: dict[str, Any] | None = None,
) -> Measured:
    """Train ``case.steps`` steps.

    Args:
        instrument: function called with the trainer and its kind before training.
        world: number of processes.
        extra: further arguments for either trainer.
    """
    device = torch.device(case.device)
    settings = dict(CANDIDATES[name])
    kind, patch = settings.pop("trainer"), settings.pop("patch", None)
    release_memory(device)
    if kind == "unsloth":
        return run_unsloth(case, workload, patch)
    watch = StepWatch(device)
    with patched(patch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.build()
        build = build_ours if kind == "ours" else build_trl
        arguments = case.arguments(workload, world) | (extra or {}) | settings
        trainer = build(case, workload, arguments, model, tokenizer, watch)
        start_adapter(trainer.model)
        trainer.remove_callback(PrinterCallback)  # a line of metrics for every step
        backbone(trainer.model).register_forward_pre_hook(watch.count_forward)
        if instrument is not None:
            instrument(trainer, kind)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else math.nan
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else math.nan
        note = trainer.loss_path if kind == "ours" else ""
        if kind == "ours" and settings.get("padding_free"):
            note += f", {trainer.layouts.padded_because or 'packed'}"
        micro_batches = trainer.args.gradient_accumulation_steps
    trainer.accelerator.free_memory()
    del trainer, model
    release_memory(device)
    return Measured(
        watch.seconds, watch.rollout, watch.losses, watch.grad_norms, watch.forwards, micro_batches, peak, before, note
    )


#: Environment variable with folders that only the process of `run_unsloth` searches for packages, before the others.
UNSLOTH_SITE = "GRPO_EXT_UNSLOTH_SITE"


def run_unsloth(case: Case, workload: Workload, patch: dict[str, Any] | None) -> Measured:
    """Run `training_unsloth.measure` in a process of its own: importing Unsloth changes torch, transformers and TRL.

    Raises:
        ValueError: the case is not LoRA on a GPU. subprocess.CalledProcessError: the process failed.
    """
    if case.trained != "lora" or case.device != "cuda":
        raise ValueError(f"Unsloth is measured with lora on cuda, not with {case.trained} on {case.device}")
    environment = dict(os.environ)
    folders = [environment.get(name, "") for name in (UNSLOTH_SITE, "PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "given.pickle").write_bytes(pickle.dumps((case, workload, patch)))
        command = [sys.executable, "-m", "grpo_ext.bench.training_unsloth", folder]
        subprocess.run(command, env=environment, check=True)
        found: Measured = pickle.loads(Path(folder, "found.pickle").read_bytes())
    return found


def versions(device: torch.device) -> dict[str, Any]:
    """Columns of a CSV with the machine and the versions."""
    import transformers

    found = common.machine(device) | {"transformers": transformers.__version__}
    for package in ("trl", "peft", "vllm"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    if device.type == "cuda":
        found["driver"] = common.driver_version()
        found["cuda"] = torch.version.cuda
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan

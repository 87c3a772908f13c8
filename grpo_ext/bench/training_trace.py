"""Measure the seconds of a step's parts, and the kernels that the device runs.

The first step warms up. In the second step each part synchronizes at its start and end: the parts add up to the step,
which takes slightly longer than without synchronization. The third step runs under torch.profiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

import grpo_ext
from grpo_ext.bench import common
from grpo_ext.bench import training_setup as setup
from grpo_ext.bench.training_phase import case_of
from grpo_ext.bench.training_workload import Workload, build_tokenizer

#: Parts of a step in the order in which the plot stacks them.
PARTS = (
    "generation", "rewards", "old and reference logps", "layers, forward", "head and loss, forward",
    "head and loss, backward", "layers, backward", "clip and optimizer", "other",
)  # fmt: skip

#: Further parts in a run with generation by vLLM.
ENGINE_PARTS = ("weights to the engine", "check of its weights")

#: Kinds of kernels, and a pattern of kernel names for each; the first match wins.
KERNELS = (
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matrix products", r"gemm|nvjet|xmma|wgmma|splitK|probability_product|tensor_product"),
    ("head and loss", r"grpo|row_|logprob|logp|ring|probab"),
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm"),
    ("copies and casts", r"copy|cat|Memcpy|Memset|fill|cast"),
    ("elementwise and norms", r"elementwise|reduce|norm|softmax|index|gather|scatter|triton"),
)


class Parts:
    """Seconds of the named parts of a step; the time of a nested part counts only for the nested part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = False
        self._stack: list[str] = []
        self._since = 0.0

    def _record(self) -> None:
        common.synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def start(self) -> None:
        self.running = True
        self._stack = ["other"]
        common.synchronize(self.device)
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self.running:
            self._record()
        self.running = False
        self._stack = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.running:
            yield
            return
        self._record()
        self._stack.append(name)
        try:
            yield
        finally:
            self._record()
            self._stack.pop()

    def switch_to(self, name: str) -> None:
        """End the running part and start ``name`` in its place."""
        if self.running:
            self._record()
            self._stack[-1] = name

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def around_head(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Time a function of hidden states: its forward, and its backward until the gradient of the hidden states."""

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(hidden, *args, **kwargs)
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.switch_to("layers, backward"))
            with self.part("head and loss, forward"):
                return function(hidden, *args, **kwargs)

        return run


class StepTimer(TrainerCallback):
    """Time every step from the third on, with the optimizer as a part."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= 2:
            self.steps += 1
            self.parts.start()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.parts.switch_to("clip and optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.parts.switch_to("other")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.parts.stop()


class TraceTimer(StepTimer):
    """Time the second step and profile the third."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.profiler: Any = None
        self.profiled_seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.parts.start()
        if state.global_step == 2:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.parts.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
            self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        super().on_step_end()
        if state.global_step == 3:
            common.synchronize(self.parts.device)
            self.profiled_seconds = time.perf_counter() - self._start
            self.profiler.stop()


@contextlib.contextmanager
def head_replaced(kind: str, parts: Parts) -> Iterator[None]:
    """Time the function with which a trainer multiplies by the head."""
    if kind == "ours":
        own = grpo_ext.linear_grpo_loss
        grpo_ext.linear_grpo_loss = parts.around_head(own)
        try:
            yield
        finally:
            grpo_ext.linear_grpo_loss = own
        return
    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction

    class Timed:
        apply = staticmethod(parts.around_head(original.apply))

    utils._ChunkedLogProbFunction = Timed
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = original


def instrument(trainer: Any, kind: str, parts: Parts) -> None:
    """Time the parts of either trainer."""
    trainer.compute_loss = parts.around("layers, forward", trainer.compute_loss)
    trainer.accelerator.backward = parts.around("head and loss, backward", trainer.accelerator.backward)
    trainer.accelerator.clip_grad_norm_ = parts.around("clip and optimizer", trainer.accelerator.clip_grad_norm_)
    if kind == "ours":
        trainer.rollouts.generate = parts.around("generation", trainer.rollouts.generate)
        trainer.rollouts.score = parts.around("rewards", trainer.rollouts.score)
        trainer.slices.add_logps = parts.around("old and reference logps", trainer.slices.add_logps)
        return
    trainer._generate = parts.around("generation", trainer._generate)
    trainer._calculate_rewards = parts.around("rewards", trainer._calculate_rewards)
    logps = trainer._get_per_token_logps_and_entropies

    def without_gradient_apart(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return logps(*args, **kwargs)
        with parts.part("old and reference logps"):
            return logps(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = without_gradient_apart


def instrument_engine(trainer: Any, kind: str, parts: Parts) -> None:
    """Time the weight transfer to vLLM, and our check that vLLM has the weights."""
    if not trainer.args.use_vllm:
        return
    if kind == "ours":
        engine = trainer.rollouts.engine
        engine._load = parts.around(ENGINE_PARTS[0], engine._load)
        engine.check = parts.around(ENGINE_PARTS[1], engine.check)
    else:
        trainer.vllm_generation.sync_weights = parts.around(ENGINE_PARTS[0], trainer.vllm_generation.sync_weights)


def trace(args: Any) -> bool:
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    for model, trained, micro_batch, lengths in args.cases:
        case = dataclasses.replace(case_of(args, model, trained, micro_batch), steps=3)
        workload = Workload(
            case.shape.vocabulary, args.prompts, args.group, args.tokens, spread=lengths != "equal", seed=0
        )
        tokenizer = build_tokenizer(case.shape.vocabulary)
        plain = case.build()
        workload.attach_logps(plain, device)
        del plain
        for name in args.candidates:
            parts = Parts(device)
            timer = TraceTimer(parts)
            with contextlib.ExitStack() as stack:

                def prepare(trainer: Any, kind: str, parts: Parts = parts, timer: TraceTimer = timer,
                            stack: contextlib.ExitStack = stack) -> None:  # fmt: skip
                    instrument(trainer, kind, parts)
                    trainer.add_callback(timer)
                    stack.enter_context(head_replaced(kind, parts))

                found = setup.run_candidate(name, case, workload, tokenizer, prepare)
            where = {"candidate": name, "model": model, "trained": trained, "lengths": lengths or "spread"}
            seconds = {part: parts.seconds[part] for part in PARTS}
            rows.append(
                where | seconds | {"sum": sum(seconds.values()), "step_s": found.step_seconds[1],
                "completions": workload.rows, "micro_batch": micro_batch, "all_tokens": workload.all_tokens}
                | setup.versions(device)
            )  # fmt: skip
            kernels += [where | row for row in kernel_rows(timer)]
            print(name, {part: round(value, 4) for part, value in seconds.items()}, flush=True)
            for row in kernels[-len(KERNELS) - 3 :]:
                print("   ", {k: common._short(v) for k, v in row.items() if k not in where}, flush=True)
            common.write_csv(Path(args.output) / f"training_trace_{args.device}.csv", rows)
            common.write_csv(Path(args.output) / f"training_kernels_{args.device}.csv", kernels)
    return True


def kernel_rows(timer: TraceTimer, top: int = 20) -> list[dict[str, Any]]:
    """Milliseconds and launches in the profiled step: of the longest kernels, of each kind, and of all kernels.

    Without a GPU the rows are CPU operators.
    """
    on_gpu = timer.parts.device.type == "cuda"
    events = []
    for event in timer.profiler.key_averages():
        if on_gpu:
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue
            events.append((event.key, event.self_device_time_total / 1e3, event.count))
        else:
            events.append((event.key, event.self_cpu_time_total / 1e3, event.count))
    events.sort(key=lambda event: -event[1])
    kinds: dict[str, list[float]] = {name: [0.0, 0] for name, _ in KERNELS} | {"rest": [0.0, 0]}
    for name, milliseconds, count in events:
        kind = next((kind for kind, pattern in KERNELS if re.search(pattern, name, re.IGNORECASE)), "rest")
        kinds[kind][0] += milliseconds
        kinds[kind][1] += count
    rows = [{"what": "kernel", "name": name[:160], "ms": ms, "launches": count} for name, ms, count in events[:top]]
    rows += [{"what": "kind", "name": name, "ms": ms, "launches": int(n)} for name, (ms, n) in kinds.items()]
    total = sum(ms for _, ms, _ in events)
    rows.append({"what": "all", "name": "busy", "ms": total, "launches": sum(n for _, _, n in events)})
    rows.append({"what": "all", "name": "wall clock", "ms": timer.profiled_seconds * 1e3, "launches": 0})
    return rows

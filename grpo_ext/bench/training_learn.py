"""Measure held-out reward against wall clock and samples: SmolLM2-135M learns one-digit products in both trainers.

``--parts`` measures the seconds of a step's parts instead, including generation and the weight transfer to the engine.
From the third step on, each part synchronizes at its start and end. The held-out reward is not measured.

Each run is a process. ``--together`` sets how many runs of one trainer are concurrent, so that both trainers run under
the same load. The clock is paused while the held-out questions are answered.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import socket
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from grpo_ext.bench import common
from grpo_ext.bench import training_setup as setup
from grpo_ext.bench.training_case import CORRECTION
from grpo_ext.bench.training_trace import (
    ENGINE_PARTS,
    PARTS,
    Parts,
    StepTimer,
    head_replaced,
    instrument,
    instrument_engine,
)
from grpo_ext.generation.engine import SamplingParams
from grpo_ext.tasks.arithmetic import INSTRUCTION, arithmetic_questions, number_reward
from grpo_ext.tasks.heldout import heldout_reward
from grpo_ext.tasks.models import load_model

HELDOUT = 24


def questions(path: Path | None) -> list[tuple[str, str]]:
    """Load (question, answer) pairs from a JSON file, or generate them with reasoning-gym."""
    if path is None:
        return arithmetic_questions("products")
    return [(question, answer) for question, answer in json.loads(path.read_text())]


def datasets(pairs: list[tuple[str, str]], seed: int) -> tuple[Dataset, Dataset]:
    """Split into disjoint (train, held out) datasets, as `grpo_ext.tasks.arithmetic` does."""
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    rows = [
        {"prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}], "answer": answer}
        for question, answer in pairs
    ]
    return Dataset.from_list(rows[HELDOUT:]), Dataset.from_list(rows[:HELDOUT])


class HeldOut(TrainerCallback):
    """Measure the held-out reward before the first step and after every ``args.every`` steps."""

    def __init__(self, data: Any, tokenizer: Any, args: Any, device: torch.device) -> None:
        self.data, self.tokenizer, self.args, self.device = data, tokenizer, args, device
        self.points: list[dict[str, float]] = []
        self.elapsed = 0.0
        self._resumed_at = 0.0
        self._sampling = SamplingParams(args.tokens, 1.0)

    def _pause(self) -> None:
        common.synchronize(self.device)
        self.elapsed += time.perf_counter() - self._resumed_at

    def _resume(self) -> None:
        common.synchronize(self.device)
        self._resumed_at = time.perf_counter()

    def _measure(self, model: Any, step: int) -> None:
        found = heldout_reward(
            model, self.tokenizer, self.data, number_reward, self._sampling, samples=self.args.samples, batch_size=256
        )
        samples = step * self.args.batch
        self.points.append({"step": step, "samples": samples, "seconds": self.elapsed, "reward": found.reward})
        print(f"step {step}: {self.elapsed:.1f} s, held-out reward {found.reward:.3f}", flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._measure(model, 0)
        self._resume()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.args.every == 0 or state.global_step == self.args.steps:
            self._pause()
            self._measure(model, state.global_step)
            self._resume()


def model_folder(args: Any) -> Path:
    """Return a folder with the model in transformers' format; write it if it is missing."""
    folder = Path(args.model)
    if folder.is_dir() and (folder / "config.json").is_file():
        return folder
    folder = Path(tempfile.gettempdir()) / "bench_training_model"
    if not (folder / "config.json").is_file():
        model, tokenizer = load_model(args.model, dtype="bfloat16")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Coordination:
    """Synchronization of the concurrent runs of one trainer.

    Engines start one at a time: an engine that frees memory makes another engine's memory measurement fail. Training
    starts in all runs at once.
    """

    engine_lock: Any
    start_barrier: Any


def run(args: Any, kind: str, seed: int, coordination: Coordination) -> list[dict[str, Any]]:
    """Train with one trainer and one seed in this process; return rows of the CSV."""
    from peft import LoraConfig

    device = torch.device(args.device)
    folder = str(model_folder(args))
    model, tokenizer = load_model(folder, dtype="bfloat16")
    train, heldout = datasets(questions(args.questions), seed)
    watch = HeldOut(heldout, tokenizer, args, device)
    timer = StepTimer(Parts(device))
    callbacks = [timer if args.parts else watch]
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="bench_learn_"),
        "per_device_train_batch_size": args.batch,
        "num_generations": 8,
        "max_completion_length": args.tokens,
        "temperature": 1.0,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "max_steps": args.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "gradient_checkpointing": False,
        "bf16": device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "use_vllm": args.engine == "vllm",
        "vllm_gpu_memory_utilization": args.vllm_memory,
        "vllm_max_model_length": 512,
        **CORRECTION,
    }
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    kwargs: dict[str, Any] = {"train_dataset": train, "processing_class": tokenizer, "peft_config": lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with coordination.engine_lock:
            # TRL's engine opens a process group at this port; our engine chooses its port itself.
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
            if kind == "ours":
                from grpo_ext.trainer import GRPOConfig, GRPOTrainer

                config = GRPOConfig(**shared, save_completions=False, length_sorted_batches=True)
                trainer: Any = GRPOTrainer(model, number_reward, config, callbacks=callbacks, **kwargs)
            else:
                import trl

                config = trl.GRPOConfig(**shared)
                trainer = trl.GRPOTrainer(model, number_reward, config, callbacks=callbacks, **kwargs)
        trainer.remove_callback(PrinterCallback)
        if args.parts:
            instrument(trainer, kind, timer.parts)
            instrument_engine(trainer, kind, timer.parts)
        coordination.start_barrier.wait()
        with head_replaced(kind, timer.parts) if args.parts else contextlib.nullcontext():
            trainer.train()
    if args.parts:
        return [parts_row(args, kind, seed, timer)]
    where = {"candidate": kind, "seed": seed, "engine": args.engine, "together": args.together}
    return [where | point | setup.versions(device) for point in watch.points]


def parts_row(args: Any, kind: str, seed: int, timer: StepTimer) -> dict[str, Any]:
    """Row of the CSV with the mean seconds of a step's parts."""
    names = (PARTS[0], *ENGINE_PARTS, *PARTS[1:])
    seconds = {name: timer.parts.seconds[name] / timer.steps for name in names}
    where = {"candidate": kind, "seed": seed, "engine": args.engine, "together": args.together, "model": "smollm2-135m"}
    rest = {"sum": sum(seconds.values()), "completions": args.batch, "steps": timer.steps}
    return where | {"trained": "lora", "lengths": "as generated"} | seconds | rest | setup.versions(timer.parts.device)


def learn(args: Any) -> bool:
    """Run all trainers and seeds, and write one CSV; False if a run failed."""
    if args.engine == "auto":
        args.engine = "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"
    args.model = str(model_folder(args))  # before several processes would write it at once
    context = get_context("spawn")
    good = True
    for kind in args.candidates:
        for first in range(0, args.seeds, args.together):
            seeds = seeds_of(args)[first : first + args.together]
            coordination = Coordination(context.Lock(), context.Barrier(len(seeds)))
            processes = [context.Process(target=work, args=(args, kind, seed, coordination)) for seed in seeds]
            for process in processes:
                process.start()
            good &= all_succeeded(processes)
    merge(Path(args.output), args)
    return good


def seeds_of(args: Any) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def all_succeeded(processes: list[Any]) -> bool:
    """Wait for all runs; if one fails, terminate the others: their times would be measured under less load."""
    running = list(processes)
    while running:
        wait([process.sentinel for process in running])
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode != 0:
                for other in running:
                    other.terminate()
    return all(process.exitcode == 0 for process in processes)


def work(args: Any, kind: str, seed: int, coordination: Coordination) -> None:
    """Entry point of a run's process."""
    torch.set_num_threads(args.threads)
    common.write_csv(Path(args.output) / f"{table(args)}_{kind}_{seed}.csv", run(args, kind, seed, coordination))


def table(args: Any) -> str:
    """Name of the CSV, without the device."""
    return "training_engine" if args.parts else "training_learn"


def free_port() -> int:
    """Find an unused port below the range of ephemeral ports."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def merge(output: Path, args: Any) -> None:
    """Merge the CSVs of all runs into one, and print a summary."""
    import csv

    rows: list[dict[str, Any]] = []
    for trainer in args.candidates:
        for seed in seeds_of(args):
            path = output / f"{table(args)}_{trainer}_{seed}.csv"
            if path.is_file():
                with path.open(newline="") as file:
                    rows += list(csv.DictReader(file))
                path.unlink()
    if not rows:
        return
    common.write_csv(output / f"{table(args)}_{args.device}.csv", rows)
    if args.parts:
        common.print_table(rows, ("candidate", "seed", PARTS[0], *ENGINE_PARTS, *PARTS[1:], "sum"))
        return
    for trainer in args.candidates:
        last = [max((r for r in rows if r["candidate"] == trainer and int(r["seed"]) == seed),
                    key=lambda r: float(r["step"]), default=None) for seed in seeds_of(args)]  # fmt: skip
        done = [r for r in last if r is not None]
        rewards = ", ".join(r["reward"] for r in done)
        seconds = ", ".join(r["seconds"] for r in done)
        print(f"{trainer}: final held-out reward {rewards}; seconds {seconds}")

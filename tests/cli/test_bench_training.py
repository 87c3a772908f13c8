"""grpo_ext/bench/training.py: both trainers compute the same from the same completions, and its figures are right."""

from __future__ import annotations

import csv
import json
import os
import pickle
import time
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

SMALL = "--device cpu --threads 1 --prompts 2 --group 4 --tokens 16 --dtype fp32"


@pytest.fixture
def bench() -> ModuleType:
    from grpo_ext.bench import training as bench_training

    return bench_training


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_step_in_both_trainers(bench: ModuleType, tmp_path: Path) -> None:
    """fp32, so that a loss or gradient norm that differs is a difference and no rounding."""
    pytest.importorskip("trl", reason="the benchmark beside TRL needs TRL")
    command = f"phase {SMALL} --cases tiny:lora:4:spread --steps 1 --warmup 1 --candidates ours,trl,trl_fused"
    assert bench.main([*command.split(), "--output", str(tmp_path)]) == 0
    ours, trl, fused = rows_of(tmp_path / "training_phase_cpu.csv")
    assert [row["agrees"] for row in (ours, trl, fused)] == ["True"] * 3
    assert float(ours["grad_norm"]) > 0
    assert ours["all_tokens"] == trl["all_tokens"]
    # One per micro-batch after the first step, whose probes choose the layout; TRL's correction takes a second.
    assert (ours["forwards"], trl["forwards"], fused["forwards"]) == ("1", "2", "1")
    assert float(ours["training_s"]) <= float(ours["step_s"])


@pytest.mark.timeout(180)
def test_two_processes_take_the_same_step(bench: ModuleType, tmp_path: Path) -> None:
    """DDP with an adapter and gradient checkpointing: the gradient of one process."""
    from grpo_ext.bench import training_two

    command = f"two {SMALL} --cases tiny:lora:4:spread --kinds ddp --steps 1 --warmup 0 --output {tmp_path}"
    assert training_two.launch(bench.parse(command.split()), "ddp", 2, tmp_path)
    (two,) = rows_of(tmp_path / "training_two_steps_cpu.csv")
    command = f"phase {SMALL} --cases tiny:lora:4:spread --steps 1 --warmup 0 --candidates ours --output {tmp_path}"
    assert bench.main(command.split()) == 0
    (one,) = rows_of(tmp_path / "training_phase_cpu.csv")
    assert two["processes"] == "2"
    assert float(two["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-3)
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), abs=1e-5)


def test_a_difference_fails(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_ext.bench import training_phase, training_setup

    def run(name: str, *_: Any, **__: Any) -> training_setup.Measured:
        loss = 0.5 if name == "ours" else 0.6
        return training_setup.Measured([2.0], [0.5], [loss], [1.0], [2], 2, 1e9, 1e8)

    monkeypatch.setattr(training_phase.setup, "run_candidate", run)
    command = f"phase {SMALL} --cases tiny:full:4:equal --steps 1 --warmup 0 --candidates ours,trl"
    assert bench.main([*command.split(), "--output", str(tmp_path)]) == 1
    ours, trl = rows_of(tmp_path / "training_phase_cpu.csv")
    assert (ours["agrees"], trl["agrees"]) == ("True", "False")
    assert float(ours["training_s"]) == 1.5
    assert float(ours["tokens_per_s"]) == pytest.approx(int(ours["all_tokens"]) / 1.5, rel=1e-3)


def test_the_longest_is_found_and_proved(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes 2 GiB and 1 GiB for each 256 tokens, on a device that gives out 20 of its 21 GiB."""
    from grpo_ext.bench import training_phase, training_setup

    def run(name: str, case: Any, workload: Any, *_: Any, **__: Any) -> training_setup.Measured:
        peak = 2 + workload.tokens / 256
        if peak > 20:
            raise torch.OutOfMemoryError("full")
        return training_setup.Measured([1.0], [0.0], [0.0], [1.0], [1], 1, peak * 2**30, 1e8)

    monkeypatch.setattr(training_phase.setup, "run_candidate", run)
    command = "longest --device cpu --cases tiny:lora:4 --candidates ours --tokens 256 --probes 4 --capacity 21"
    assert bench.main([*command.split(), "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "training_longest_cpu.csv")
    fits = max(int(row["tokens"]) for row in rows if row["fits"] == "True")
    fails = min(int(row["tokens"]) for row in rows if row["fits"] == "False")
    assert fits <= 18 * 256 < fails
    assert fails - fits <= 256
    assert len(rows) <= 6


def test_parts_add_up(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_ext.bench import training_trace

    clock = [5.0]
    monkeypatch.setattr(training_trace.time, "perf_counter", lambda: clock[0])
    parts = training_trace.Parts(torch.device("cpu"))
    parts.start()
    clock[0] += 1
    with parts.part("outer"):
        clock[0] += 2
        with parts.part("inner"):
            clock[0] += 4
            parts.switch_to("rest of inner")
            clock[0] += 8
        clock[0] += 16
    parts.stop()
    assert parts.seconds == {"other": 1, "outer": 18, "inner": 4, "rest of inner": 8}


def test_trace_books_every_part(bench: ModuleType, tmp_path: Path) -> None:
    command = f"trace {SMALL} --cases tiny:lora:4:spread --candidates ours"
    assert bench.main([*command.split(), "--output", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "training_trace_cpu.csv")
    for part in ("layers, forward", "head and loss, forward", "head and loss, backward", "layers, backward"):
        assert float(row[part]) > 0, part
    assert float(row["sum"]) <= 1.5 * float(row["step_s"])
    kernels = rows_of(tmp_path / "training_kernels_cpu.csv")
    assert any("linear_loss" in line["name"] for line in kernels)


def test_a_workload_serves_every_completion_once(bench: ModuleType) -> None:
    from grpo_ext.bench import training_workload

    work = training_workload.Workload(512, prompts=3, group=4, tokens=32, spread=True)
    work.logps = [[[-1.0] * len(ids) for ids in row] for row in work.completions]
    ids, logps = work.serve([prompt for prompt in work.prompt_ids for _ in range(4)])
    assert ids == [completion for row in work.completions for completion in row]
    assert [len(row) for row in logps] == [len(row) for row in ids]
    assert work.reward(completion_ids=ids) == [0.0, 1.0, 0.0, 1.0] * 3
    assert work.all_tokens == sum(map(len, ids)) + 4 * sum(map(len, work.prompt_ids))
    assert max(map(len, ids)) <= 32 < sum(map(len, ids))


def test_learning_runs_become_one_table_and_a_picture(bench: ModuleType, tmp_path: Path) -> None:
    from grpo_ext.bench import plot_training, training_learn

    for trainer, speed in (("ours", 1.0), ("trl", 2.0)):
        for seed in range(3, 5):
            crowded = trainer == "trl" and seed == 4
            points = [
                {"candidate": trainer, "seed": seed, "engine": "transformers", "together": 6 if crowded else 3,
                 "step": s, "samples": 32 * s, "seconds": speed * s * (9 if crowded else 1), "reward": 0.1 * s,
                 "device": "cpu"} for s in range(3)
            ]  # fmt: skip
            training_learn.common.write_csv(tmp_path / f"training_learn_{trainer}_{seed}.csv", points)
    training_learn.merge(
        tmp_path, SimpleNamespace(candidates=["ours", "trl"], seeds=2, first_seed=3, parts=False, device="cpu")
    )
    rows = rows_of(tmp_path / "training_learn_cpu.csv")
    assert len(rows) == 12
    (path,) = plot_training.draw(tmp_path, tmp_path / "plots")
    assert path.read_bytes().startswith(b"\x89PNG")
    # Only seeds that all trainers ran in company of as many say how long it takes.
    assert {(row["candidate"], row["seed"]) for row in plot_training.comparable(rows)} == {("ours", "3"), ("trl", "3")}


def test_another_gradient_on_two_is_told(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grpo_ext.bench import training_two

    case = {"candidate": "ours", "model": "m", "trained": "lora", "lengths": "equal", "micro_batch": 8, "dtype": "bf16"}
    case |= {"completions": 64, "max_tokens": 1024}
    found = [("ddp", 1, 0.5, 2.219), ("ddp", 2, 0.5, 2.219), ("fsdp2", 2, 0.5, 2.212)]
    path = tmp_path / "training_two_steps_cpu.csv"
    for more, good in (([], True), ([("fsdp2", 2, 0.5, 2.5)], False)):
        rows = [dict(zip(("kind", "processes", "loss", "grad_norm"), row, strict=True)) | case for row in found + more]
        training_two.common.write_csv(path, rows)
        assert training_two.same_as_one(path) == good
    assert "fsdp2 on 2: another loss or gradient norm than one process" in capsys.readouterr().out


def test_every_table_is_drawn(bench: ModuleType, tmp_path: Path) -> None:
    from grpo_ext.bench import plot_training, training_trace

    case = {"candidate": "ours", "model": "m", "trained": "lora", "lengths": "spread"}
    rest = {"micro_batch": 8, "completions": 64, "max_tokens": 1024, "tokens_per_s": 5.0, "device": "cpu"}
    write = training_trace.common.write_csv
    write(tmp_path / "training_phase_cpu.csv", [case | rest, case | rest | {"candidate": "trl", "tokens_per_s": 2.0}])
    write(tmp_path / "training_trace_cpu.csv", [case | dict.fromkeys(training_trace.PARTS, 0.1) | {"sum": 1.0} | rest])
    write(tmp_path / "training_two_steps_cpu.csv", [{"kind": "ddp", "processes": 2} | case | rest])
    step = {"step_time": 9.0, "time/generation": 5.0, "time/vllm_weights": 1.0, "time/forward": 2.0}
    lines = [{"step_time": 60.0}, step, {"eval_reward": 0.5}, step]
    run = tmp_path / "with_vllm"
    run.mkdir()
    (run / "metrics_seed1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    parts = plot_training.engine_parts(run / "metrics_seed1.jsonl")
    assert (parts["generation"], parts["weights to vLLM"], parts["optimizer and other"]) == (4.0, 1.0, 2.0)
    drawn = plot_training.draw(tmp_path, tmp_path)
    assert [path.name for path in drawn] == [
        "training_phase_cpu.png", "training_trace_cpu.png", "training_two_steps_cpu.png", "training_runs.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_learning_in_both_trainers(bench: ModuleType, tmp_path: Path) -> None:
    """A random model, two seeds at once: points before the first step and after each, on a clock that goes forward."""
    pytest.importorskip("trl", reason="the benchmark beside TRL needs TRL")
    from grpo_ext.bench import training_case, training_workload

    case = training_case.Case(model="tiny", dtype="fp32")
    case.build().save_pretrained(tmp_path / "model")
    tokenizer = training_workload.build_tokenizer(512)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [[f"t{i} t{i + 1} ?", str(i)] for i in range(2, 60)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    command = (
        "learn --steps 2 --every 1 --samples 1 --batch 16 --tokens 4 --engine transformers --seeds 2 --together 2 "
        f"--model {tmp_path / 'model'} --questions {tmp_path / 'pairs.json'} --threads 1 --output {tmp_path}"
    )
    assert bench.main(command.split()) == 0
    rows = rows_of(tmp_path / "training_learn_cpu.csv")
    for trainer in ("ours", "trl"):
        for seed in ("0", "1"):
            mine = [row for row in rows if (row["candidate"], row["seed"]) == (trainer, seed)]
            assert [(row["step"], row["samples"]) for row in mine] == [("0", "0"), ("1", "16"), ("2", "32")]
            seconds = [float(row["seconds"]) for row in mine]
            assert 0 == seconds[0] < seconds[1] < seconds[2]
    command = command.replace("--steps 2", "--steps 4").replace("--seeds 2 --together 2", "--seeds 1 --parts")
    assert bench.main(command.split()) == 0
    ours, trl = rows_of(tmp_path / "training_engine_cpu.csv")
    for row in (ours, trl):
        assert row["steps"] == "2"
        assert 0 < float(row["generation"]) < float(row["sum"])
        assert float(row["weights to the engine"]) == 0  # transformers generates from the trainer's own
    # A random model earns nothing, and ours leaves out what has no gradient.
    assert min(float(trl[f"layers, {way}"]) for way in ("forward", "backward")) > 0
    assert (tmp_path / "training_engine_cpu.png").exists()


@pytest.mark.timeout(60)
def test_one_learning_run_that_dies_ends_the_others(bench: ModuleType) -> None:
    """Even where it cannot say so: killed, with the others waiting for it."""
    from grpo_ext.bench import training_learn

    context = get_context("spawn")
    processes = [context.Process(target=time.sleep, args=(1000,)), context.Process(target=os.abort)]
    for process in processes:
        process.start()
    assert not training_learn.all_succeeded(processes)
    assert all(process.exitcode for process in processes)


def test_unsloth_runs_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets case, completions and patch, and its packages come first; the CPU is refused."""
    from grpo_ext.bench import training_setup as setup
    from grpo_ext.bench.training_case import Case
    from grpo_ext.bench.training_workload import Workload

    workload = Workload(512, 2, 2, 16, True)
    found = setup.Measured([2.0], [0.5], [0.1], [1.0], [2], 2, 1e9, 1e8, "note")
    runs: list[tuple[Any, str]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> None:
        folder = Path(command[-1])
        runs.append((pickle.loads((folder / "given.pickle").read_bytes()), env["PYTHONPATH"]))
        (folder / "found.pickle").write_bytes(pickle.dumps(found))

    monkeypatch.setattr(setup.subprocess, "run", run)
    monkeypatch.setattr(setup, "release_memory", lambda _: None)
    monkeypatch.setenv(setup.UNSLOTH_SITE, "/unsloth")
    monkeypatch.setenv("PYTHONPATH", "/others")
    case = Case(model="tiny", device="cuda")
    assert setup.run_candidate("unsloth_head", case, workload, None) == found
    (((given, completions, patch), path),) = runs
    assert (given, path) == (case, "/unsloth:/others")
    assert completions.completions == workload.completions
    assert patch == {"one_forward": False, "trim": False, "dense": False}
    with pytest.raises(ValueError, match="not with lora on cpu"):
        setup.run_candidate("unsloth", Case(model="tiny"), workload, None)

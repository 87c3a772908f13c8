"""A run that stops early leaves its last whole step, and resuming it gives the results of a whole run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import reward_number
from transformers import TrainerCallback

from grpo_ext.trainer import GRPOTrainer
from grpo_ext.trainer.checkpoint import STATE_FILE, checkpoint_fault, newest_complete
from grpo_ext.trainer.last_step import first_sigterm_ignored
from grpo_ext.trainer.run_lock import FolderInUseError, sole_run

Make = Callable[..., GRPOTrainer]


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise ZeroDivisionError("stop here")


class At(TrainerCallback):
    """Acts once, at an event of transformers after so many steps."""

    def __init__(self, event: str, step: int, act: Callable[[], None]) -> None:
        def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step and not self.done:
                self.done = True
                act()

        self.done = False
        setattr(self, event, handle)


def reward_that(act: Callable[[], None] | None, call: int) -> Any:
    """`reward_number`, which acts in one of its calls: after the completions were sampled."""
    calls = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        calls.append(1)
        if act is not None and len(calls) == call:
            act()
        return reward_number(completions)

    return reward


def finished(trainer: GRPOTrainer) -> tuple[torch.Tensor, list[Any]]:
    """Weights and logs of a run that has come to its end."""
    names = ("step", "loss", "reward", "entropy", "grad_norm", "num_tokens", "kernel_calls")
    return weights(trainer), [[log.get(name) for name in names] for log in trainer.state.log_history if "loss" in log]


PLAIN: dict[str, Any] = {"max_steps": 4}
SPLIT = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
REPLAYED = {**SPLIT, "num_iterations": 2, "steps_per_generation": 4}
SCALED = {**PLAIN, "num_iterations": 2, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}


@pytest.mark.parametrize(
    ("changes", "stop", "kind", "step"),
    [
        (PLAIN, reward_that(fail, 3), Exception, 2),
        (PLAIN, reward_that(ctrl_c, 3), KeyboardInterrupt, 2),
        (PLAIN, reward_that(terminate, 2), SystemExit, 1),
        (SPLIT, At("on_substep_end", 1, ctrl_c), KeyboardInterrupt, 1),
        (REPLAYED, At("on_substep_end", 1, fail), ZeroDivisionError, 1),
        (SCALED, At("on_step_end", 2, fail), ZeroDivisionError, 2),
        (PLAIN, At("on_log", 3, fail), ZeroDivisionError, 3),
        (PLAIN, At("on_pre_optimizer_step", 1, ctrl_c), KeyboardInterrupt, 2),
        (SCALED, At("on_optimizer_step", 1, terminate), SystemExit, 2),
        ({**PLAIN, "per_device_train_batch_size": 20}, reward_that(fail, 3), Exception, 2),
    ],
    ids=[
        "reward",
        "ctrl-c",
        "sigterm",
        "accumulating",
        "replayed",
        "step-end",
        "log",
        "before-update",
        "after-update",
        "epoch",
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    make_trainer: Make, tmp_path: Path, changes: dict[str, Any], stop: Any, kind: type[BaseException], step: int
) -> None:
    whole = make_trainer(**changes)
    whole.train()
    given = {"callbacks": [stop]} if isinstance(stop, At) else {"reward_funcs": stop}
    stopped = make_trainer(**changes, **given, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(kind) as error:
        stopped.train()
    folder = tmp_path / "stopped" / f"checkpoint-{step}"
    go_on = f"The state after step {step} is saved in {folder}: resume with"
    assert error.value.__notes__ == [f"{go_on} trainer.train(resume_from_checkpoint='{folder}')"]
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == [folder.name]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = make_trainer(**changes, output_dir=str(tmp_path / "stopped"))
    resumed.train(resume_from_checkpoint=True)
    (mine, logs), (theirs, whole_logs) = finished(resumed), finished(whole)
    assert torch.equal(mine, theirs)
    assert logs[-(4 - step) :] == whole_logs[-(4 - step) :]


def test_a_torn_update_is_not_saved(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)

    def tear(*_: Any) -> None:
        if trainer.state.global_step == 1:
            fail()

    class AfterTheHook(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            optimizer.optimizer.register_step_post_hook(tear)

    trainer.add_callback(AfterTheHook())
    with pytest.raises(ZeroDivisionError) as error:
        trainer.train()
    (note,) = error.value.__notes__
    assert note.startswith(
        "The update of step 2 was interrupted, so it cannot be saved. The state after step 1 is saved in"
    )
    assert not Path(f"{trainer.args.output_dir}/checkpoint-2").exists()


def test_a_second_ctrl_c_ends_the_saving(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(reward_funcs=reward_that(fail, 2))
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda _: ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "trainer_state.json is missing" in str(checkpoint_fault(Path(f"{trainer.args.output_dir}/checkpoint-1")))


def test_what_is_saved_already_is_not_saved_again(make_trainer: Make) -> None:
    trainer = make_trainer(reward_funcs=reward_that(fail, 3), max_steps=3, save_strategy="steps", save_steps=2)
    saves: list[int] = []
    trainer.add_callback(At("on_save", 2, lambda: saves.append(os.stat(state).st_mtime_ns)))
    state = Path(f"{trainer.args.output_dir}/checkpoint-2/trainer_state.json")
    with pytest.raises(Exception, match="checkpoint-2"):
        trainer.train()
    assert saves == [os.stat(state).st_mtime_ns]


def test_a_disk_that_is_full_leaves_the_error_and_the_checkpoint_before(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(reward_funcs=reward_that(fail, 3), max_steps=3, save_strategy="steps", save_steps=1)
    save = torch.save

    def full(value: Any, path: Any, *rest: Any) -> None:
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *rest)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left(.|\n)*Step 2 cannot be saved \(OSError.*checkpoint-1: resume"):
        trainer.train()
    assert not Path(f"{trainer.args.output_dir}/checkpoint-2").exists()


@pytest.fixture
def two_checkpoints(make_trainer: Make) -> Path:
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    return Path(str(trainer.args.output_dir))


NEEDED = ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, "missing") for name in NEEDED]
    + [(name, "truncated") for name in (*NEEDED, "rng_state.pth", "grpo_state_0.pt")],
)
def test_a_damaged_checkpoint_is_named_or_passed_over(
    make_trainer: Make, two_checkpoints: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = two_checkpoints / "checkpoint-2" / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 20)
    no_weights = (name, damage) == ("model.safetensors", "missing")
    expected = f"{path.parent} holds no weights" if no_weights else f"{path} is {damage}"
    with pytest.raises(ValueError, match=f"cannot resume from {path.parent}: {expected}"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(path.parent))
    make_trainer(max_steps=3).train(resume_from_checkpoint=True)
    assert f"resuming from {two_checkpoints}/checkpoint-1: {expected}" in capsys.readouterr().out


def test_an_empty_newest_checkpoint(make_trainer: Make, two_checkpoints: Path) -> None:
    (two_checkpoints / "checkpoint-3").mkdir()
    assert newest_complete(two_checkpoints)[0].name == "checkpoint-2"
    for number in (1, 2):
        (two_checkpoints / f"checkpoint-{number}" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"no checkpoint to continue from; .*checkpoint-3/trainer_state.json is missing; "
    ):
        make_trainer(max_steps=3).train(resume_from_checkpoint=True)


HOLD = """
import sys, time
from grpo_ext.trainer.run_lock import sole_run
with sole_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=1)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(trainer.args.output_dir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=rf"run is in use by another run \(process {other.pid} on "):
            trainer.train()
    finally:
        other.kill()  # as a crash would: nothing is left in the way
        other.wait()
    with sole_run(str(trainer.args.output_dir)):
        trainer.train()


def test_a_failed_push_keeps_the_checkpoint(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=4, save_strategy="steps", save_steps=2)

    def push(folder: str) -> None:
        raise ConnectionError("the hub does not answer")

    monkeypatch.setattr(trainer, "_push_from_checkpoint", push)
    trainer.args.push_to_hub = True
    with pytest.raises(ConnectionError) as error:
        trainer.train()
    assert checkpoint_fault(tmp_path / "checkpoint-2") is None
    assert str(tmp_path / "checkpoint-2") in error.value.__notes__[-1]


def test_the_weights_of_the_best_checkpoint_are_not_saved_as_the_last_step(
    make_trainer: Make, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        output_dir=str(tmp_path), max_steps=3, save_strategy="best", eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True, eval_dataset=dataset,
        callbacks=[At("on_train_end", 3, fail)],
    )  # fmt: skip
    evaluate, scores = trainer.evaluate, iter((3.0, 2.0, 1.0))
    monkeypatch.setattr(trainer, "evaluate", lambda *a, **k: {**evaluate(*a, **k), "eval_reward": next(scores)})
    with pytest.raises(ZeroDivisionError) as error:
        trainer.train()
    assert "cannot be saved" in error.value.__notes__[-1]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_an_adapter_of_another_name_is_resumed(make_trainer: Make, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from toys import build_model

    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules="all-linear"), adapter_name="policy")
    trainer = make_trainer(model=model, output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = tmp_path / "checkpoint-1" / "policy" / "adapter_model.safetensors"
    assert checkpoint_fault(tmp_path / "checkpoint-1") is None
    saved.write_bytes(saved.read_bytes()[:-4])
    assert checkpoint_fault(tmp_path / "checkpoint-1") == f"{saved} is truncated"


def test_the_first_sigterm_does_not_stop_a_save() -> None:
    with first_sigterm_ignored():
        terminate()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one would end the process
    with pytest.raises(KeyboardInterrupt), first_sigterm_ignored():
        ctrl_c()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_handler_of_the_program_stays(make_trainer: Make, when: str) -> None:
    received: list[int] = []

    def own(number: int, _: Any) -> None:
        received.append(number)

    def install() -> None:
        signal.signal(signal.SIGTERM, own)

    callbacks = [At("on_step_end", 1, terminate)]
    try:
        if when == "before":
            install()
        else:
            callbacks.insert(0, At("on_train_begin", 0, install))
        trainer = make_trainer(max_steps=2, callbacks=callbacks)
        trainer.train()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert received == [signal.SIGTERM]
    assert trainer.state.global_step == 2  # only the program decides what the signal means


def test_a_checkpoint_written_again_has_no_file_of_the_older_run(make_trainer: Make, two_checkpoints: Path) -> None:
    """As after a run of two processes with weights in two files and a reference model that moves."""
    folder = two_checkpoints / "checkpoint-2"
    new = sorted(path.name for path in folder.iterdir())
    for name in (STATE_FILE.format(rank=1), "rng_state_0.pth", "rng_state_1.pth", "grpo_reference.pt"):
        torch.save({}, folder / name)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train(
        resume_from_checkpoint=str(two_checkpoints / "checkpoint-1")
    )
    assert sorted(path.name for path in folder.iterdir()) == new
    assert checkpoint_fault(folder) is None

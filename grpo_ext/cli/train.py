"""`grpo-ext train`: one run, from a YAML file to a folder that holds everything it produced."""

from __future__ import annotations

import contextlib
import os
import shlex
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.data import load_datasets, load_reward
from grpo_ext.cli.info import versions
from grpo_ext.cli.plot import plot_run
from grpo_ext.cli.prepare import check_same_run, choose_dtype, lora_config, make_config, resume_from, run_folder
from grpo_ext.cli.processes import (
    WhenTrainingStarts,
    agreed,
    disband_at_exit,
    leave_together,
    measured_when_training_starts,
    unscored,
)
from grpo_ext.cli.run_files import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    SUMMARY_FILE,
    TENSORBOARD_FOLDER,
    read_metrics,
    read_summary,
    write_json,
    write_samples,
)
from grpo_ext.cli.settings import RunSettings, read_settings
from grpo_ext.modules.sharding import acts_jointly
from grpo_ext.tasks import load_model
from grpo_ext.tasks.heldout import HeldoutResult, best_constant_reward, heldout_reward
from grpo_ext.trainer.checkpoint import checkpoint_to_resume
from grpo_ext.trainer.run_lock import FolderInUseError, sole_run


def train_command(config: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Train what `config` describes, with ``--field value`` arguments over it, and return the run's summary.

    The run folder then holds: config.yaml (the settings in full), adapter/ (or model/ without LoRA),
    metrics.jsonl, completions/, the TensorBoard log, heldout_before.jsonl and heldout_after.jsonl (sampled
    answers), reward.png and summary.json.

    On several processes every one of them calls this. The main process alone writes and prints, and measures the
    held-out questions while the others wait; a model in pieces answers them on all processes together.

    A run that is resumed keeps what `check_same_run` lists. One that stops early ends with the command that resumes it.

    Returns:
        The summary; empty on the other processes.

    Raises:
        SettingsError: the run is described wrongly.
    """
    settings = read_settings(config, arguments)
    resume = resume_from(settings)
    folder = run_folder(settings, config, resume is not None)
    dtype_line = choose_dtype(settings, folder if resume is not None else None)
    args = make_config(settings, folder)
    if resume is not None:
        check_same_run(settings, folder)
        in_pieces = bool(args.fsdp or args.deepspeed)
        try:
            checkpoint_to_resume(
                resume, Path(folder), whole_weights=not in_pieces, with_optimizer=not args.save_only_model
            )
        except ValueError as error:
            hint = "a run writes checkpoints with save_strategy: steps and save_steps, and when it stops early"
            raise SettingsError(f"{error}: {hint}" if resume is True else str(error)) from error
    # Other machines may have other folders. And nothing is written before all have looked.
    folder, summary = agreed((folder, read_summary(folder) if resume is not None else {}))
    args.output_dir = os.path.expanduser(folder)
    with contextlib.ExitStack() as held:
        return _train_in(folder, settings, args, summary, resume, dtype_line, held)


def _lock_folder(args: Any, held: contextlib.ExitStack) -> None:
    """Lock the run's folder until `held` closes; an error on all processes where another run has it."""
    in_use = None
    if args.process_index == 0:
        try:
            held.enter_context(sole_run(args.output_dir))
        except FolderInUseError as error:
            in_use = str(error)
    in_use = agreed(in_use)
    if in_use is not None:
        raise SettingsError(in_use)


def _train_in(
    folder: str,
    settings: RunSettings,
    args: Any,
    summary: dict[str, Any],
    resume: str | bool | None,
    line: str | None,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    """See `train_command`. `line` is printed once the model is loaded, `held` keeps the folder's lock."""
    is_main = args.process_index == 0
    rewards = [load_reward(name) for name in settings.reward_funcs]
    train_set, heldout = load_datasets(settings.dataset, settings.seed)
    try:
        model, tokenizer = load_model(settings.model, settings.dtype)
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SettingsError(str(error)) from error
    # The folder's own copy says all that was in force: it alone is enough for `eval` and to train again.
    settings.trainer["output_dir"] = folder
    questions = 0 if heldout is None else len(heldout)
    _lock_folder(args, held)
    if is_main:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
            yaml.safe_dump(settings.to_dict(), file, sort_keys=False)
        _say(f"{settings.model}: {len(train_set)} rows to train on, {questions} held out; run folder {folder}")
        if line is not None:
            _say(line)

    def measure(policy: Any, name: str) -> HeldoutResult | None:
        if heldout is None or not (is_main or acts_jointly(policy)):
            return None
        scored = rewards if is_main else [unscored] * len(rewards)
        result = measure_heldout(policy, tokenizer, settings, args, heldout, scored)
        if not is_main:
            return None
        write_samples(os.path.join(folder, f"heldout_{name}.jsonl"), result.samples)
        _say(f"held-out reward {name} training: {result.reward:.3f} ± {result.stderr:.3f}")
        return result

    def measure_before(policy: Any) -> None:
        before = measure(policy, "before")
        if is_main:
            constant = None
            if heldout is not None:
                constant = best_constant_reward(heldout, rewards, reward_weights=args.reward_weights)
            summary.update(
                model=settings.model,
                dtype=settings.dtype,
                seed=args.seed,
                processes=args.world_size,
                heldout_questions=questions,
                heldout_samples=settings.heldout_samples,
                heldout_reward_before=before and round(before.reward, 4),
                best_constant_reward=constant and round(constant, 4),
            )
            write_json(os.path.join(folder, SUMMARY_FILE), summary)
        agreed(None)

    at_start = None
    if "heldout_reward_before" not in summary:
        if measured_when_training_starts(args):
            at_start = measure_before
        else:
            # Without the adapter, whose effect is zero before the first step: the same answers in less time.
            measure_before(model.to(args.device))

    trainer, train_seconds = run_trainer(
        settings, args, model, tokenizer, train_set, heldout, rewards, resume, at_start
    )
    after = measure(trainer.model, "after")
    disband_at_exit()
    if not is_main:
        leave_together()
        return {}
    summary |= {
        "heldout_reward_after": after and round(after.reward, 4),
        "heldout_stderr_after": after and round(after.stderr, 4),
        "steps": trainer.state.global_step,
        "seconds": round(process_seconds(), 1),
        "train_seconds": round(train_seconds, 1),
        "step_seconds": step_seconds(folder),
        "kernel_calls": trainer.kernel_calls,
        "loss_path": trainer.loss_path,
        "backend": backend(args.device.type),
        "versions": versions(),
    }
    write_json(os.path.join(folder, SUMMARY_FILE), summary)
    plot_run(folder)
    leave_together()
    return summary | {"folder": folder}


def run_trainer(
    settings: RunSettings,
    args: Any,
    model: Any,
    tokenizer: Any,
    train_set: Any,
    heldout: Any,
    rewards: Sequence[Callable[..., Any]],
    resume: str | bool | None,
    at_start: Callable[[Any], None] | None = None,
) -> tuple[Any, float]:
    """Train, and save the adapter (or the model) into the run folder.

    Args:
        at_start: called with the model as training has laid it out, before the first step.

    Returns:
        The trainer, and the seconds it took, `at_start` left out.
    """
    from transformers import set_seed

    from grpo_ext.trainer import GRPOTrainer

    started = time.monotonic()
    set_seed(args.seed)  # the adapter's first values come from it
    with _tensorboard_folder(os.path.join(args.output_dir, TENSORBOARD_FOLDER)):
        trainer = GRPOTrainer(
            model,
            list(rewards),
            args,
            train_set,
            eval_dataset=None if args.eval_strategy == "no" else heldout,
            processing_class=tokenizer,
            peft_config=lora_config(settings.lora),
        )
    trainer.how_to_resume = f"grpo-ext train {shlex.quote(os.path.join(args.output_dir, CONFIG_FILE))} " + (
        "--resume_from_checkpoint true"
    )
    waited = 0.0
    if at_start is not None:

        def start() -> None:
            nonlocal waited
            began = time.monotonic()
            at_start(trainer.model)
            waited = time.monotonic() - began

        trainer.add_callback(WhenTrainingStarts(start))
    with warnings.catch_warnings():
        # peft looks for the base model's config.json at every save; a packaged model has none.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        trainer.train(resume_from_checkpoint=resume)
        folder = MODEL_FOLDER if settings.lora is None else ADAPTER_FOLDER
        trainer.save_model(os.path.join(args.output_dir, folder))
    return trainer, time.monotonic() - started - waited


def measure_heldout(
    model: Any,
    tokenizer: Any,
    settings: RunSettings,
    args: Any,
    dataset: Any,
    rewards: Sequence[Callable[..., Any]],
    samples: int | None = None,
    seed: int | None = None,
) -> HeldoutResult:
    """The held-out reward of `model`: sampled as in training, with the same seed before and after."""
    sampling = args.sampling()
    return heldout_reward(
        model,
        tokenizer,
        dataset,
        rewards,
        sampling,
        reward_weights=args.reward_weights,
        samples=samples or settings.heldout_samples,
        seed=args.seed if seed is None else seed,
        max_prompt_length=args.max_prompt_length,
        progress=args.process_index == 0 and not args.disable_tqdm,
    )


def final_line(summary: dict[str, Any]) -> str:
    """What a run prints last."""
    minutes = f"{summary['steps']} steps, {summary['seconds'] / 60:.1f} minutes, {summary['folder']}"
    if summary["heldout_reward_before"] is None:
        return f"trained without held-out questions: {minutes}"
    constant = summary["best_constant_reward"]
    return (
        f"held-out reward {summary['heldout_reward_before']:.2f} before, "
        f"{summary['heldout_reward_after']:.2f} after"
        + ("" if constant is None else f" (best constant answer {constant:.2f})")
        + f": {minutes}"
    )


def step_seconds(folder: str) -> float | None:
    """The median time of an optimizer step, from the run's metrics."""
    times = [record["step_time"] for record in read_metrics(folder) if record.get("step_time") is not None]
    return round(statistics.median(times), 2) if times else None


def process_seconds() -> float:
    """Wall time since this process started, interpreter and imports included."""
    import psutil  # type: ignore[import-untyped]

    return time.time() - psutil.Process().create_time()


def backend(device: str) -> str:
    """What the kernels ran on: ``cuda``, or ``cpu-`` and the instruction set."""
    import grpo_ext

    return device if device != "cpu" else f"cpu-{grpo_ext.build_info()['cpu_isa']}"


@contextlib.contextmanager
def _tensorboard_folder(folder: str) -> Iterator[None]:
    """Where transformers' callback, which reads this variable when it is made, puts its log."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:  # the user's choice
        yield
        return
    os.environ[name] = folder
    try:
        yield
    finally:
        del os.environ[name]


def _say(line: str) -> None:
    print(line, flush=True)

"""`grpo-ext train`: run the training that a YAML file describes, and write all results to one folder."""

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
    OnTrainBegin,
    broadcast,
    destroy_process_group_at_exit,
    exit_barrier,
    measures_after_sharding,
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
from grpo_ext.modules.sharding import forward_is_collective
from grpo_ext.tasks import load_model
from grpo_ext.tasks.heldout import HeldoutResult, best_constant_reward, heldout_reward
from grpo_ext.trainer.checkpoint import checkpoint_to_resume
from grpo_ext.trainer.run_lock import FolderInUseError, sole_run_of_all


def train_command(config: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Train the run of a YAML file, and return its summary.

    The run folder receives config.yaml (all settings), adapter/ (or model/ without LoRA), metrics.jsonl, completions/,
    the TensorBoard log, heldout_before.jsonl and heldout_after.jsonl (sampled answers), reward.png and summary.json.

    Every process of a run calls this function. Only the main process writes, prints, and measures the held-out
    questions; a sharded model generates the answers on all processes.

    A resumed run must keep the settings that `check_same_run` lists. A run that stops early prints the command that
    resumes it.

    Args:
        config: path of the YAML file.
        arguments: ``--field value`` arguments, which override the file.

    Returns:
        The summary; empty on processes other than the main one.

    Raises:
        SettingsError: a setting is wrong.
    """
    settings = read_settings(config, arguments)
    resume = resume_from(settings)
    folder = run_folder(settings, config, resume is not None)
    dtype_line = choose_dtype(settings, folder if resume is not None else None)
    args = make_config(settings, folder)
    if resume is not None:
        check_same_run(settings, folder)
        # `accelerate launch --use_fsdp` sets the environment only.
        launched = any(
            os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") for name in ("FSDP", "DEEPSPEED")
        )
        in_pieces = bool(args.fsdp or args.deepspeed or launched)
        try:
            checkpoint_to_resume(
                resume, Path(folder), whole_weights=not in_pieces, with_optimizer=not args.save_only_model
            )
        except ValueError as error:
            hint = "a run writes checkpoints with save_strategy: steps and save_steps, and when it stops early"
            raise SettingsError(f"{error}: {hint}" if resume is True else str(error)) from error
    # Machines may see different folders. The collective also delays all writes until every process has read.
    folder, summary = broadcast((folder, read_summary(folder) if resume is not None else {}))
    args.output_dir = os.path.expanduser(folder)
    with contextlib.ExitStack() as held:
        return _train_in(folder, settings, args, summary, resume, dtype_line, held)


def _train_in(
    folder: str,
    settings: RunSettings,
    args: Any,
    summary: dict[str, Any],
    resume: str | bool | None,
    line: str | None,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    """See `train_command`. `line` is printed after the model is loaded; `held` keeps the folder's lock."""
    is_main = args.process_index == 0
    rewards = [load_reward(name) for name in settings.reward_funcs]
    train_set, heldout = load_datasets(settings.dataset, settings.seed)
    try:
        model, tokenizer = load_model(settings.model, settings.dtype)
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SettingsError(str(error)) from error
    # The folder's config.yaml contains all settings, so `eval` and a new run need nothing else.
    settings.trainer["output_dir"] = folder
    questions = 0 if heldout is None else len(heldout)
    try:
        held.enter_context(sole_run_of_all(args.output_dir, is_main))
    except FolderInUseError as error:
        raise SettingsError(str(error)) from error
    if is_main:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
            yaml.safe_dump(settings.to_dict(), file, sort_keys=False)
        _say(f"{settings.model}: {len(train_set)} rows to train on, {questions} held out; run folder {folder}")
        if line is not None:
            _say(line)

    def measure(policy: Any, name: str) -> HeldoutResult | None:
        if heldout is None or not (is_main or forward_is_collective(policy)):
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
        broadcast(None)

    at_start = None
    if "heldout_reward_before" not in summary:
        if measures_after_sharding(args):
            at_start = measure_before
        else:
            # Skip the adapter: before the first step its effect is zero, and the model generates faster without it.
            measure_before(model.to(args.device))

    trainer, train_seconds = run_trainer(
        settings, args, model, tokenizer, train_set, heldout, rewards, resume, at_start
    )
    after = measure(trainer.model, "after")
    destroy_process_group_at_exit()
    if not is_main:
        exit_barrier()
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
    exit_barrier()
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
        at_start: called before the first step, with the prepared (sharded) model.

    Returns:
        The trainer, and the seconds of training without `at_start`.
    """
    from transformers import set_seed

    from grpo_ext.trainer import GRPOTrainer

    started = time.monotonic()
    set_seed(args.seed)  # determines the adapter's initial values
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

        trainer.add_callback(OnTrainBegin(start))
    with warnings.catch_warnings():
        # PEFT reads the base model's config.json at every save; a packaged model has none.
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
    """Measure the held-out reward of `model`, sampled as in training, with the same seed before and after."""
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
    """The last line that a run prints."""
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
    """Median seconds of an optimizer step, from the run's metrics; None without any."""
    times = [record["step_time"] for record in read_metrics(folder) if record.get("step_time") is not None]
    return round(statistics.median(times), 2) if times else None


def process_seconds() -> float:
    """Seconds since this process started, including interpreter start and imports."""
    import psutil  # type: ignore[import-untyped]

    return time.time() - psutil.Process().create_time()


def backend(device: str) -> str:
    """The backend of the kernels: ``cuda``, or ``cpu-`` and the instruction set."""
    import grpo_ext

    return device if device != "cpu" else f"cpu-{grpo_ext.build_info()['cpu_isa']}"


@contextlib.contextmanager
def _tensorboard_folder(folder: str) -> Iterator[None]:
    """Set the log folder in the environment, where transformers' TensorBoard callback reads it at construction."""
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

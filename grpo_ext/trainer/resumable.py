"""Save and resume a run: exact resumption, and a checkpoint of the last complete step if a run stops early."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from grpo_ext.generation.errors import EngineError
from grpo_ext.rollouts.batching import BatchPlan, PromptSchedule
from grpo_ext.rollouts.rollout import Rollout
from grpo_ext.trainer.checkpoint import (
    LAST_FILE,
    check_processes,
    checkpoint_fault,
    checkpoint_step,
    checkpoint_to_resume,
    load_reference,
    load_state,
    remove_older_files,
    save_reference,
    save_state,
)
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.trainer.last_step import Boundary, LastStep, append_line, first_sigterm_ignored
from grpo_ext.trainer.run_lock import sole_run_of_all
from grpo_ext.update.reference_model import ReferenceModel


class ResumableTrainer(Trainer):
    """Base of `GRPOTrainer` that saves and resumes.

    Attributes:
        how_to_resume: command that resumes from the checkpoint ``{folder}``; ends the message of a run that stops
            early.
        last_step: the state after the last complete step.
    """

    args: GRPOConfig
    plan: BatchPlan
    schedule: PromptSchedule
    reference: ReferenceModel | None
    kernel_calls: int
    _rollout: Rollout | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.how_to_resume = "trainer.train(resume_from_checkpoint='{folder}')"
        self.last_step = LastStep(lambda: Boundary.now(self.state, self.kernel_calls, self._rollout_in_use()))
        # In front of the user's callbacks: if one of them raises, the step is already recorded as complete.
        self.callback_handler.callbacks.insert(0, self.last_step)
        self._run = ""
        self._saved: tuple[int, Path] | None = None
        self._best_weights_loaded = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; a run that stops early first saves the state after its last complete step.

        The message of an exception, Ctrl-C or SIGTERM then ends with one line that names the checkpoint to resume from.
        A resumed run has the same results as an uninterrupted one. A second Ctrl-C stops the run at once.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest complete one in ``output_dir``.

        Raises:
            ValueError: a file of the checkpoint is missing or truncated; the message names it.
            FolderInUseError: another run is writing into ``output_dir``.
        """
        run = Path(str(self.args.output_dir))
        with sole_run_of_all(run, self.accelerator.is_main_process):
            checkpoint, line = checkpoint_to_resume(
                resume_from_checkpoint,
                run,
                whole_weights=not self._state_is_sharded,
                with_optimizer=not self.args.save_only_model,
            )
            if line is not None:
                self.accelerator.print(line)
            self._saved = None if checkpoint is None else (checkpoint_step(Path(checkpoint)), Path(checkpoint))
            self._best_weights_loaded = False
            self._run = gather_object([secrets.token_hex(8)])[0]
            try:
                with self.last_step.watched():
                    return super().train(checkpoint, *args, **kwargs)
            except BaseException as error:
                with first_sigterm_ignored():  # torchrun sends SIGTERM as soon as one process has failed
                    append_line(error, self._save_last_step(error))
                raise

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights; from here on the weights are not those of the last step."""
        self._best_weights_loaded = True
        super()._load_best_model()

    @property
    def _state_is_sharded(self) -> bool:
        """Whether no process holds all the weights, or all of the optimizer's state."""
        sharded_at_load = getattr(self, "is_distributed_loading_by_transformers", False)
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or sharded_at_load

    def _save_last_step(self, error: BaseException) -> str:
        """Save a checkpoint of the last complete optimizer step; return the line that names it, or says why not.

        Runs collectives only after an `EngineError`, which all processes raise; otherwise the others may still be
        training.
        """
        last = self.last_step.boundary
        if self._saved is None:
            before = "This run has saved no checkpoint: save_strategy='steps' and save_steps write them"
        else:
            before = self._resume_hint(*self._saved)
        if self.last_step.update_interrupted:
            return f"The update of step {self.state.global_step + 1} was interrupted, so it cannot be saved. {before}"
        if last is None:
            return "No step was taken before, so there is nothing to save." if self._saved is None else before
        if self._best_weights_loaded:
            return f"The weights are those of the best checkpoint, so step {last.step} cannot be saved. {before}"
        if self._state_is_sharded and not isinstance(error, EngineError):
            return f"Step {last.step} cannot be saved: the weights are sharded over the processes. {before}"
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{last.step}"
        if self._saved is None or self._saved[0] != last.step:
            last.restore(self.state)
            self.kernel_calls, self._rollout = last.kernel_calls, last.rollout
            names = ("save_strategy", "save_only_model", "push_to_hub")
            given = {name: getattr(self.args, name) for name in names}
            # With a save strategy and a best checkpoint, transformers synchronizes all processes.
            self.args.save_strategy, self.args.save_only_model, self.args.push_to_hub = SaveStrategy.NO, False, False
            try:
                self._save_checkpoint(self.model, trial=None)
            except Exception as failed:
                if self.args.should_save and checkpoint_fault(folder) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                return f"Step {last.step} cannot be saved ({type(failed).__name__}: {failed}). {before}"
            finally:
                for name, value in given.items():
                    setattr(self.args, name, value)
        if not self.args.should_save:
            return f"The main process saves step {last.step}; its message names the checkpoint to resume from."
        return self._resume_hint(last.step, folder)

    def _resume_hint(self, step: int, folder: Path) -> str:
        how = self.how_to_resume.replace("{folder}", str(folder))
        return f"The state after step {step} is saved in {folder}: resume with {how}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint without files of an older one; ``trainer_state.json`` is last, and marks it complete."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            remove_older_files(folder, self.accelerator.num_processes)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            # The checkpoint is complete even if pushing it to the hub failed. Weights alone cannot be resumed.
            if (folder / LAST_FILE).is_file() and not self.args.save_only_model:
                self._saved = self.state.global_step, folder

    def store_flos(self) -> None:
        """Skip transformers' collective: `floating_point_ops` returns 0."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Release deferred signals and record the step; transformers calls this after each step's callbacks."""
        self.last_step.release_signals()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.last_step.finish_step()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Check the checkpoint and watch the optimizer; transformers calls this before the first step.

        Raises:
            ValueError: the checkpoint was written by another number of processes.
        """
        if resume_from_checkpoint is not None:
            check_processes(Path(resume_from_checkpoint), self.accelerator.process_index, self.plan)
        result = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not self._state_is_sharded:
            self.last_step.watch(self.optimizer)
        return result

    def _rollout_in_use(self) -> Rollout | None:
        """Return the generation batch in which the next step begins; None if that step generates one."""
        place = self.schedule.locate(self.state.global_step * self.plan.gradient_accumulation_steps)
        return self._rollout if self._rollout is not None and self._rollout.key == place.epoch_and_generation else None

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states and the generation batch in use, so that a resumed run continues inside the batch."""
        super()._save_rng_state(output_dir)
        rank = self.accelerator.process_index
        save_state(Path(output_dir), rank, self._run, self.plan, self.kernel_calls, self._rollout_in_use())
        if self.args.sync_ref_model and self.reference is not None and self.accelerator.is_main_process:
            save_reference(Path(output_dir), self.reference.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the state that `_save_rng_state` wrote; transformers calls this when a run resumes."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        loaded = load_state(Path(checkpoint), self.accelerator.process_index, self.plan)
        # Generation is collective. A run that stopped early may have saved the file of one process only, and an older
        # run the others; then all processes generate the batch again.
        run = None if loaded is None else loaded[0]
        if loaded is not None and all(other == run for other in gather_object([run])):
            _, self.kernel_calls, self._rollout = loaded
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.load_state_dict(load_reference(Path(checkpoint)))

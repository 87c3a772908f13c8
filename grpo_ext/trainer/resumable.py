"""A trainer that loses no work: whole checkpoints, one at the last whole step when a run stops early, exact resume."""

from __future__ import annotations

import contextlib
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
    checkpoint_to_resume,
    load_reference,
    load_state,
    save_reference,
    save_state,
)
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.trainer.last_step import Boundary, LastStep, end_with
from grpo_ext.trainer.run_lock import sole_run
from grpo_ext.update.reference_model import ReferenceModel


class ResumableTrainer(Trainer):
    """The part of `GRPOTrainer` that saves and resumes.

    Attributes:
        how_to_resume: what to do with a checkpoint, ``{folder}`` its path; ends the message of a run that stops early.
        last_step: the state after the last whole step.
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
        # In front of the user's callbacks, which may raise: the step is whole then.
        self.callback_handler.callbacks.insert(0, self.last_step)
        self._saved: tuple[int, Path] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a run that stops early saves the state after its last whole step first.

        Any exception, Ctrl-C and SIGTERM then end with one line that names the checkpoint to go on from. The resumed
        run has the same results as one that was not stopped. A second Ctrl-C ends at once.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest whole one in ``output_dir``.

        Raises:
            ValueError: the checkpoint lacks a file or holds one that was cut short, named in the message.
            FolderInUseError: another run is writing into ``output_dir``.
        """
        run = Path(str(self.args.output_dir))
        with sole_run(run) if self.accelerator.is_main_process else contextlib.nullcontext():
            checkpoint, line = checkpoint_to_resume(
                resume_from_checkpoint,
                run,
                whole_weights=not self._in_pieces,
                with_optimizer=not self.args.save_only_model,
            )
            if line is not None:
                self.accelerator.print(line)
            self._saved = None
            try:
                with self.last_step.watched():
                    return super().train(checkpoint, *args, **kwargs)
            except BaseException as error:
                end_with(error, self._keep_checkpoint(error))
                raise

    @property
    def _in_pieces(self) -> bool:
        """Whether no process holds all the weights, or all of the optimizer's state."""
        sharded_at_load = getattr(self, "is_distributed_loading_by_transformers", False)
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or sharded_at_load

    def _keep_checkpoint(self, error: BaseException) -> str:
        """Save a checkpoint of the last whole optimizer step; where it is, in words.

        Without a collective, since other processes may not have stopped; `EngineError` comes on all of them.
        """
        last = self.last_step.boundary
        if self._saved is None:
            before = "This run has saved no checkpoint: save_strategy='steps' and save_steps write them"
        else:
            before = self._go_on(*self._saved)
        if self.last_step.torn:
            return f"The update of step {self.state.global_step + 1} was cut off, so it cannot be saved. {before}"
        if last is None:
            return "No step was taken before, so there is nothing to save."
        if self._in_pieces and not isinstance(error, EngineError):
            return f"Step {last.step} cannot be saved: every process holds a part of the weights. {before}"
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{last.step}"
        if self._saved is None or self._saved[0] != last.step:
            last.restore(self.state)
            self.kernel_calls, self._rollout = last.kernel_calls, last.rollout
            strategy, alone = self.args.save_strategy, self.args.save_only_model
            # transformers waits for all processes where a strategy is set and a best checkpoint is known.
            self.args.save_strategy, self.args.save_only_model = SaveStrategy.NO, False
            try:
                self._save_checkpoint(self.model, trial=None)
            except Exception as failed:
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                return f"Step {last.step} cannot be saved ({type(failed).__name__}: {failed}). {before}"
            finally:
                self.args.save_strategy, self.args.save_only_model = strategy, alone
        return self._go_on(last.step, folder)

    def _go_on(self, step: int, folder: Path) -> str:
        how = self.how_to_resume.replace("{folder}", str(folder))
        return f"The state after step {step} is saved in {folder}: go on with {how}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Called by transformers; a checkpoint that was not written to its end has no ``trainer_state.json``."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / LAST_FILE).unlink(missing_ok=True)  # of an older run: files from before and after would mix
        super()._save_checkpoint(model, trial)
        self._saved = self.state.global_step, folder

    def store_flos(self) -> None:
        """Nothing to add up over the processes: see `floating_point_ops`."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called by transformers after each step's callbacks."""
        self.last_step.callbacks_are_done()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.last_step.step_is_recorded()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Called by transformers before the first step.

        Raises:
            ValueError: when the checkpoint was written by another number of processes.
        """
        if resume_from_checkpoint is not None:
            check_processes(Path(resume_from_checkpoint), self.accelerator.process_index, self.plan)
        result = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if not self._in_pieces:
            self.last_step.watch(self.optimizer)
        return result

    def _rollout_in_use(self) -> Rollout | None:
        """The generation batch that the next step begins in; None where it makes one."""
        place = self.schedule.locate(self.state.global_step * self.plan.gradient_accumulation_steps)
        return self._rollout if self._rollout is not None and self._rollout.key == place.epoch_and_generation else None

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, beside the random states, the generation batch in use: a resumed run goes on inside it."""
        super()._save_rng_state(output_dir)
        rank = self.accelerator.process_index
        save_state(Path(output_dir), rank, self.plan, self.kernel_calls, self._rollout_in_use())
        if self.args.sync_ref_model and self.reference is not None and self.accelerator.is_main_process:
            save_reference(Path(output_dir), self.reference.state_dict())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The inverse; called by transformers when a run resumes."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        loaded = load_state(Path(checkpoint), self.accelerator.process_index, self.plan)
        # All processes generate, or none: one that stopped early may have left the file of its own alone.
        if all(gather_object([loaded is not None])) and loaded is not None:
            self.kernel_calls, self._rollout = loaded
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.load_state_dict(load_reference(Path(checkpoint)))

"""`GRPOTrainer`: generate, score, and update through the compiled loss, on top of `transformers.Trainer`."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import speed_metrics

import grpo_ext
from grpo_ext.losses import kernel_calls
from grpo_ext.trainer.batching import MicroStep, PromptSchedule
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.trainer.data import (
    MicroStepNumbers,
    check_dataset,
    collate_micro_step,
    named_datasets,
)
from grpo_ext.trainer.evaluation import evaluate_rows, evaluation_metrics, evaluation_rows
from grpo_ext.trainer.forward import CompletionForward
from grpo_ext.trainer.generation import (
    Completions,
    PromptEncoder,
    SamplingParams,
    TransformersEngine,
    end_token_ids,
)
from grpo_ext.trainer.metrics import MetricWindow
from grpo_ext.trainer.models import (
    Reference,
    add_adapter,
    context_length,
    keep_logits_dtype,
    load_model,
    load_tokenizer,
)
from grpo_ext.trainer.records import (
    MetricsFileCallback,
    RewardProgressCallback,
    StepTimer,
    completion_records,
    print_completions,
    write_completions,
)
from grpo_ext.trainer.rewards import RewardFunction, RewardFunctions
from grpo_ext.trainer.rollout import MicroBatch, Rollout, Sample
from grpo_ext.trainer.rollout_maker import RolloutMaker, gather, timed

if TYPE_CHECKING:
    from peft import PeftConfig

#: Losses whose divisor already covers the whole accumulation window; the others are divided by GA.
TOKEN_NORMALISED = frozenset({"dapo", "cispo", "vespo"})

#: File of a checkpoint with what transformers does not keep: one per rank.
STATE_FILE = "grpo_state_{rank}.pt"


class GRPOTrainer(Trainer):
    """Trains a causal language model by Group Relative Policy Optimization and its relatives.

    Args:
        model: hub name, folder or module.
        reward_funcs: one function or several, ``f(prompts, completions, completion_ids, **columns)``
            returning one number or None per completion, sync or async.
        args: `GRPOConfig`.
        train_dataset: anything with a length and rows that are dicts with ``prompt`` (text or chat messages);
            the other columns reach the reward functions.
        eval_dataset: the same, or a dict of such.
        processing_class: the tokenizer; None loads the model's own.
        peft_config: trains a PEFT adapter instead of the weights.
        callbacks: further transformers callbacks.

    Raises:
        ValueError, TypeError: for datasets, rewards or arguments that do not fit, naming them.
    """

    args: GRPOConfig
    control: TrainerControl

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: GRPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(args, GRPOConfig):
            raise TypeError(f"args is {type(args).__name__}: pass a GRPOConfig")
        check_dataset(train_dataset, "train_dataset")
        for name, dataset in named_datasets(eval_dataset, "eval_dataset"):
            check_dataset(dataset, name)
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        self.loss_config = args.loss_config()
        self.plan = args.batch_plan
        module = load_model(model, args)
        tokenizer = load_tokenizer(processing_class, module)
        module = add_adapter(module, peft_config, args.gradient_checkpointing)

        super().__init__(
            model=module,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if self.accelerator.num_processes > 1:
            # Ranks may hold completions of the same prompt: on one stream they would draw the same tokens.
            set_seed(args.seed, device_specific=True)
        self.reference = Reference(module) if args.beta != 0 else None
        self.schedule = PromptSchedule(
            len(train_dataset),
            self.plan,
            args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.shuffle_dataset,
            shuffle_completions=args.shuffle_completions,
        )
        assert isinstance(tokenizer.pad_token_id, int)  # load_tokenizer saw to it
        self.pad_id: int = tokenizer.pad_token_id
        self.window = MetricWindow()
        self.rollouts = RolloutMaker(
            args,
            self.accelerator,
            train_dataset,
            self.schedule,
            PromptEncoder(tokenizer, args.max_prompt_length, context_length(module), args.max_completion_length),
            TransformersEngine(end_token_ids(module, tokenizer), self.pad_id, args.share_prompts),
            self.rewards,
            self.window,
        )
        one_process = self.accelerator.num_processes == 1
        self.completion_forward = CompletionForward(
            module, args.share_prompts and one_process and not args.gradient_checkpointing
        )
        self.kernel_calls = 0
        self._rollout: Rollout | None = None
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        self.add_callback(StepTimer(self.window))
        self.add_callback(MetricsFileCallback())
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgressCallback())

    # ---- data ----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-step: its number within the epoch, which `PromptSchedule` gives its meaning."""
        return DataLoader(MicroStepNumbers(len(self.schedule)), batch_size=1, collate_fn=collate_micro_step)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Completions of one epoch over all ranks."""
        return len(dataloader) * self.plan.slice_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the inputs are made in the step itself."""
        return 0

    # ---- one micro-step ------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Generate when it is time, then forward and backward of one micro-batch; the detached loss.

        The division by the accumulation steps happens in `compute_loss`, so nothing is divided here.
        """
        model.train()
        optimizer_train = getattr(self.optimizer, "train", None)
        if callable(optimizer_train):
            optimizer_train()  # schedule-free optimizers keep two sets of weights
        now, place = self._place(inputs["micro_step"])
        if self._rollout is None or self._rollout.key != place.generation_key:
            self._rollout = self._make_rollout(model, place.generation_key, now)
        batch = self._rollout.micro_batch(place.slice_index, self.pad_id, self.args.device)
        with timed(self.window, "time/forward"):
            loss = self.compute_loss(model, batch)
        if place.iteration + 1 < self.plan.num_iterations and batch.old_logps is None:
            self._rollout.old_logps[place.slice_index] = batch.new_logps
        with timed(self.window, "time/backward"):
            kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
            self.accelerator.backward(loss, **kwargs)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one micro-batch, scaled so that an accumulation window sums to SPEC section 3.

        Raises:
            RuntimeError: when the compiled loss did not serve the call.
        """
        logits = self.completion_forward(model, inputs)
        threshold = self._entropy_threshold(logits, inputs)
        calls = kernel_calls()
        output = grpo_ext.grpo_loss(
            logits,
            inputs.completion_ids,
            inputs.advantages,
            inputs.loss_mask,
            self.loss_config,
            old_logps=inputs.old_logps,
            ref_logps=inputs.ref_logps,
            sampling_logps=inputs.sampling_logps,
            num_items_in_batch=inputs.normaliser,
            entropy_threshold=threshold,
            inplace=True,
        )
        served = kernel_calls() - calls
        if served < 1:
            raise RuntimeError(
                f"step {self.state.global_step + 1}: grpo_loss was not served by the compiled kernels of "
                "grpo_ext; training stops rather than going on without them (see `grpo-ext info`)"
            )
        self.kernel_calls += served
        inputs.new_logps = output.logps
        self._record_loss(output.metrics)
        if self.args.loss_type in TOKEN_NORMALISED:
            return output.loss
        return output.loss / self.plan.gradient_accumulation_steps

    def _record_loss(self, metrics: dict[str, Tensor]) -> None:
        tokens = metrics["tokens"]
        names = [
            "entropy",
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
            "clip_ratio/region_mean",
            "ratio/mean",
        ]
        for name in names + (["kl"] if self.args.beta != 0 else []):
            self.window.add(name, metrics[name], weight=tokens)
        self.window.add("clip_ratio/low_min", metrics["clip_ratio/low_mean"], reduce="min")
        self.window.add("clip_ratio/high_max", metrics["clip_ratio/high_mean"], reduce="max")
        self.window.add("ratio/max", metrics["ratio/max"], reduce="max")
        self.window.add("nonfinite_tokens", metrics["nonfinite_tokens"], reduce="sum")

    def _entropy_threshold(self, logits: Tensor, batch: MicroBatch) -> Tensor | None:
        """The entropy quantile over all ranks; None leaves it to the loss, which knows this rank's tokens."""
        quantile = self.args.top_entropy_quantile
        if quantile == 1.0 or self.accelerator.num_processes == 1:
            return None
        with torch.no_grad():
            _, entropy = grpo_ext.selective_log_softmax(
                logits, batch.completion_ids, temperature=self.args.temperature, return_entropy=True
            )
        known = entropy.masked_fill(batch.loss_mask == 0, float("nan")).flatten()
        padded = self.accelerator.pad_across_processes(known, pad_index=float("nan"))
        known = self._gather(padded)
        known = known[~known.isnan()]
        return torch.quantile(known, 1 - quantile) if len(known) else None

    # ---- generation ----------------------------------------------------------------------------------------

    def _place(self, micro_step: int) -> tuple[int, MicroStep]:
        """Micro-steps of the run before this one, and where it belongs."""
        steps_per_epoch = len(self.schedule) // self.plan.gradient_accumulation_steps
        now = self.state.global_step // steps_per_epoch * len(self.schedule) + micro_step
        return now, self.schedule.locate(now)

    def _make_rollout(self, model: nn.Module, key: tuple[int, int], start: int) -> Rollout:
        """Generate, score and prepare one generation batch: this rank's rows of it."""
        unwrapped = self.accelerator.unwrap_model(model)
        rollout, sample, rewards = self.rollouts.make(unwrapped, key, start)
        with timed(self.window, "time/logps"):
            self._add_logps(model, unwrapped, rollout)
        self.state.num_input_tokens_seen += rollout.tokens_seen
        self.window.add("num_tokens", float(self.state.num_input_tokens_seen), reduce="last")
        self._record_completions(sample, rewards, rollout.advantages)
        return rollout

    def _add_logps(self, model: nn.Module, unwrapped: nn.Module, rollout: Rollout) -> None:
        """Log probabilities that must be fixed before the first update.

        Old ones only for slices first used after an optimizer step: for the others the update's own forward
        is the sampling policy, and replays reuse what that forward computed. Reference ones only when beta is
        not 0.
        """
        for index in range(self.plan.steps_per_generation):
            late = not self.plan.is_on_policy(rollout.start, index)
            if not late and self.reference is None:
                continue
            batch = rollout.micro_batch(index, self.pad_id, self.args.device)
            if late:
                rollout.old_logps[index] = self._logps(model, batch)
            if self.reference is not None:
                with self.reference.using(unwrapped) as reference:
                    rollout.ref_logps[index] = self._logps(reference, batch)

    @torch.no_grad()
    def _logps(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        logits = self.completion_forward(model, batch)
        logps: Any = grpo_ext.selective_log_softmax(logits, batch.completion_ids, temperature=self.args.temperature)
        return logps.masked_fill(batch.completion_mask == 0, 0.0)

    # ---- records -------------------------------------------------------------------------------------------

    def _record_completions(self, sample: Sample, rewards: Tensor, advantages: Tensor) -> None:
        args = self.args
        step = self.state.global_step + 1
        show = args.log_completions and self.state.global_step % max(int(args.logging_steps), 1) == 0
        if not (args.save_completions or show):
            return
        records = gather_object(completion_records(sample, self.rewards.names, rewards, advantages))
        if not self.accelerator.is_main_process:
            return
        if args.save_completions:
            write_completions(Path(str(args.output_dir)) / "completions", step, records)
        if show:
            print_completions(records, step, args.num_completions_to_print)

    def _gather(self, value: Tensor) -> Tensor:
        return gather(self.accelerator, value, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics collected since the last log to a training log line."""
        if "loss" in logs:
            self.window.add("kernel_calls", float(self.kernel_calls), reduce="last")
            logs = {**logs, **self.window.flush(self._gather)}
        super().log(logs, start_time)

    # ---- evaluation ----------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Generate over a dataset and report ``eval_reward`` and its companions; training's randomness is
        untouched.

        Raises:
            ValueError: without a dataset, or for one that is empty or has no prompts.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            merged: dict[str, float] = {}
            for name, part in dataset.items():
                merged |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        if dataset is None:
            raise ValueError("evaluation requires an eval_dataset")
        check_dataset(dataset, "eval_dataset")
        args = self.args
        start = time.time()
        sampling = SamplingParams(
            args.max_completion_length,
            args.eval_temperature,
            args.top_p,
            args.top_k,
            args.min_p,
            args.repetition_penalty,
            dict(args.generation_kwargs or {}),  # type: ignore[arg-type]
        )
        model = self.accelerator.unwrap_model(self.model)
        rows = evaluation_rows(
            len(dataset),
            args.num_generations_eval,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )

        def generate(batch: list[int]) -> tuple[Completions, Tensor]:
            sample = self.rollouts.generate(model, dataset, batch, sampling)
            return sample.completions, self.rollouts.score(sample)

        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(args.seed + self.accelerator.process_index)
            local = evaluate_rows(rows, args.per_device_eval_batch_size, generate)
        result = {name: gather_object(values) for name, values in local.items()}
        metrics = evaluation_metrics(result, self.rewards.names, self.rewards.weights, metric_key_prefix)
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(result["lengths"]))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args,
            self.state,
            self.control,
            metrics,
        )
        return metrics

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._rollout = None  # left by an earlier call of train()
        self.kernel_calls = 0
        result = super()._prepare_for_training(*args, **kwargs)
        keep_logits_dtype(self.accelerator.unwrap_model(self.model_wrapped), self.accelerator.autocast)
        return result

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, beside the random states, the generation batch in use: a resumed run goes on inside it."""
        super()._save_rng_state(output_dir)
        place = self.schedule.locate(self.state.global_step * self.plan.gradient_accumulation_steps)
        in_use = self._rollout is not None and self._rollout.key == place.generation_key
        state = {
            "plan": dataclasses.asdict(self.plan),
            "kernel_calls": self.kernel_calls,
            "rollout": self._rollout.state_dict() if in_use and self._rollout is not None else None,
        }
        torch.save(state, Path(output_dir) / STATE_FILE.format(rank=self.accelerator.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The inverse; called by transformers when a run resumes.

        Raises:
            ValueError: when the checkpoint was written by another number of processes.
        """
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE.format(rank=self.accelerator.process_index)
        if not path.exists():
            warnings.warn(f"{checkpoint} has no {path.name}: a generation batch in use is made anew", stacklevel=2)
            return
        state = torch.load(path, weights_only=True)
        plan = dataclasses.asdict(self.plan)
        changed = {name: (old, plan[name]) for name, old in state["plan"].items() if plan.get(name) != old}
        if "world_size" in changed:
            before, now = changed["world_size"]
            raise ValueError(f"the checkpoint was written by {before} process(es), this run has {now}: use {before}")
        self.kernel_calls = state["kernel_calls"]
        if changed:
            listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            warnings.warn(f"batch numbers differ from the checkpoint's ({listed}): other prompts follow", stacklevel=2)
        elif state["rollout"] is not None:
            self._rollout = Rollout.from_state_dict(state["rollout"])

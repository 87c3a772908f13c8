"""`GRPOTrainer`: generate completions, score them and update the policy with the compiled loss.

Built on `transformers.Trainer`, which runs the loop, clips the gradient and takes the optimizer step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_callback import ProgressCallback

from grpo_ext._ops import kernel_calls
from grpo_ext.config import LOSS_TYPES
from grpo_ext.generation.engine import GenerationEngine, PromptEncoder, TransformersEngine, end_token_ids
from grpo_ext.modules.attach import FasterLayers
from grpo_ext.modules.checkpointing import checkpointing_arguments
from grpo_ext.modules.fused_head import FusedHead
from grpo_ext.modules.inspection import context_length, has_dropout
from grpo_ext.modules.sharding import set_backward_prefetch
from grpo_ext.rollouts.batching import MicroStep, PromptSchedule
from grpo_ext.rollouts.data import (
    MicroStepNumbers,
    check_dataset,
    collate_micro_step,
    named_datasets,
)
from grpo_ext.rollouts.evaluation import measure
from grpo_ext.rollouts.maker import RolloutMaker, gather
from grpo_ext.rollouts.rewards import RewardFunction, RewardFunctions
from grpo_ext.rollouts.rollout import Rollout, Sample
from grpo_ext.trainer.config import GRPOConfig
from grpo_ext.trainer.engine import build_engine
from grpo_ext.trainer.models import ReferenceSync, add_adapter, keep_half_precision_logits, load_model, load_tokenizer
from grpo_ext.trainer.records import (
    MetricsFileCallback,
    RewardProgressCallback,
    StepTimer,
    completion_records,
    print_completions,
    write_completions,
)
from grpo_ext.trainer.resumable import ResumableTrainer
from grpo_ext.trainer.slices import Slices
from grpo_ext.update.backward import run_backward
from grpo_ext.update.guard import FOLDER, NonfiniteGuard
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.loss import ModelPass
from grpo_ext.update.metrics import MetricBuffer
from grpo_ext.update.micro_batch import MicroBatch
from grpo_ext.update.reference_model import ReferenceModel
from grpo_ext.update.step_losses import StepLosses

if TYPE_CHECKING:
    from peft import PeftConfig

#: Autocast's dtype for each of accelerate's names of mixed precision.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: Losses whose divisor already covers the accumulation window; the others are divided by gradient_accumulation_steps.
WINDOW_NORMALISED = frozenset(LOSS_TYPES) - {"grpo", "bnpo", "dr_grpo", "luspo", "sapo"}


class GRPOTrainer(ResumableTrainer):
    """Train a causal language model by Group Relative Policy Optimization (GRPO) or one of its variants.

    Args:
        model: name on the hub, folder or module.
        reward_funcs: one function or several, sync or async. Each is called as
            ``f(prompts, completions, completion_ids, **columns)`` and returns one number or None per completion.
        args: `GRPOConfig`.
        train_dataset: has a length, and rows that are dicts with ``prompt`` (text or chat messages). The other columns
            are passed to the reward functions.
        eval_dataset: a dataset of that form, or a dict of several.
        processing_class: the tokenizer; None loads the model's own.
        peft_config: adds a PEFT adapter to the model and trains only the adapter.
        callbacks: additional transformers callbacks.

    Raises:
        ValueError, TypeError: a dataset, reward function or argument is invalid; the message names it.

    Attributes:
        checkpointing: ``gradient_checkpointing_kwargs`` for runs whose arguments set none; None keeps transformers'
            default.
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
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp={args.fsdp!r}, but accelerate shards weights on GPUs only and the device is "
                f"{args.device.type}: each process would hold all the weights; remove fsdp, or train on GPUs"
            )
        if self.accelerator.num_processes > 1:
            # Ranks may hold completions of one prompt, and with equal random states they would sample equal tokens.
            set_seed(args.seed, device_specific=True)
        self._choose_checkpointing(module)
        assert isinstance(tokenizer.pad_token_id, int)  # load_tokenizer sets it
        self.pad_id: int = tokenizer.pad_token_id
        self.metrics = MetricBuffer()
        self.reference = ReferenceModel(module) if args.beta != 0 else None
        if args.sync_ref_model and self.reference is not None:
            self.reference.check_can_move()
        one_process = self.accelerator.num_processes == 1
        self.may_skip_backward = one_process and not self.is_deepspeed_enabled and self.accelerator.scaler is None
        self.schedule = PromptSchedule(
            len(train_dataset),
            self.plan,
            args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.shuffle_dataset,
            shuffle_completions=args.shuffle_completions,
        )
        self.rollouts = self._build_rollouts(module, tokenizer, train_dataset)
        compiled = bool(args.torch_compile)
        self.faster_layers = FasterLayers(module, lora=args.use_fused_lora, norm=args.use_fused_norm, compiled=compiled)
        self.fused_head = FusedHead(module, args.use_fused_head, compiled=compiled)
        self.layouts = LayoutChooser(
            module, args.share_prompts and one_process and not args.gradient_checkpointing, args.padding_free
        )
        self.model_pass = ModelPass(
            self.layouts,
            self.fused_head,
            self.loss_config,
            None if one_process or args.top_entropy_quantile == 1.0 else self._entropy_threshold,
            args.head_memory_budget,
        )
        self.slices = Slices(
            args,
            self.plan,
            self.model_pass,
            self.reference,
            self.metrics,
            self.pad_id,
            self.accelerator.autocast,
            self.may_skip_backward,
            has_dropout(module),
        )
        self.guard = NonfiniteGuard(
            args.max_nonfinite_steps,
            self.metrics,
            self._gather,
            Path(str(args.output_dir)) / FOLDER,
            self.accelerator.process_index,
        )
        self.step_losses = StepLosses(lambda: self._tr_loss)
        self.kernel_calls = 0
        self._rollout: Rollout | None = None
        self._path_reported = False
        self._leaf = list(module.modules())[-1]
        self._add_callbacks()

    # ---- one micro-step: prompts, completions, rewards, advantages, micro-batch, loss, backward --------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-step and return its detached loss; transformers takes the optimizer step.

        A micro-step trains on one slice of a generation batch. The first micro-step of a batch generates the whole
        batch.
        """
        self._set_train_mode(model)
        start, micro_step = self._locate(inputs["micro_step"])
        with self.faster_layers.lora.precast_weights(AUTOCAST.get(self.accelerator.mixed_precision)):
            if self._rollout is None or self._rollout.key != micro_step.epoch_and_generation:
                regenerated = micro_step.slice_index > 0 or micro_step.iteration > 0
                self._rollout = self._make_rollout(model, micro_step.epoch_and_generation, start, regenerated)
            rollout, index = self._rollout, micro_step.slice_index
            kept = self.slices.kept(rollout, index)
            if kept:
                replayed = micro_step.iteration + 1 < self.plan.num_iterations
                loss = self._train_on(model, rollout, index, kept, replayed=replayed)
            else:
                loss = self.slices.zero_loss(model, rollout)
        self.slices.add_metrics(rollout, len(rollout.rows_of(index)), len(kept))
        self.guard.watch(loss, rollout, index)
        return loss

    def _make_rollout(self, model: nn.Module, key: tuple[int, int], start: int, regenerated: bool = False) -> Rollout:
        """Generate and score this rank's rows of a generation batch, and compute its old and reference log probs.

        Args:
            key: ``(epoch, generation)``.
            start: number of micro-steps of the run before this batch.
            regenerated: a resumed run generates the batch again, and may continue at any of its slices.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        rollout, sample, rewards = self._sample_rollout(unwrapped, key, start)
        with self.metrics.timed("time/logps"):
            self.slices.add_logps(model, unwrapped, rollout, regenerated)
        self.state.num_input_tokens_seen += rollout.tokens_seen
        self.metrics.add("num_tokens", float(self.state.num_input_tokens_seen), reduce="last")
        self._record_completions(rollout, sample, rewards)
        return rollout

    def _sample_rollout(self, model: nn.Module, key: tuple[int, int], start: int) -> tuple[Rollout, Sample, Tensor]:
        """Go from prompts to completions, rewards and advantages.

        Returns:
            The rollout, the prompts and completions it was assembled from, and their ``(n, functions)`` rewards.
        """
        prompts = self.rollouts.prompts(key)
        sample, rewards = self.rollouts.generate_and_score(model, prompts)  # may score during generation
        advantages = self.rollouts.advantages(rewards, key)
        return self.rollouts.assemble(key, start, sample, advantages), sample, rewards

    def _train_on(self, model: nn.Module, rollout: Rollout, index: int, kept: list[int], *, replayed: bool) -> Tensor:
        """Run forward and backward on one slice; return the detached loss of the whole slice.

        Args:
            kept: positions in the slice of the rows that go through the model.
            replayed: a later iteration uses this slice again, so its old log probabilities are stored.
        """
        batch = self.slices.micro_batch(rollout, index, kept)
        with self.metrics.timed("time/forward"):
            loss, output = self.compute_loss(model, batch, return_outputs=True)
        if replayed and batch.old_logps is None:
            rollout.old_logps[index] = rollout.expand_to_slice(index, kept, output.logps)
        with self.metrics.timed("time/backward"):
            run_backward(self.accelerator, model, loss, self.guard, deepspeed=self.is_deepspeed_enabled)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a micro-batch; over an accumulation window these losses add up to that of SPEC section 3.

        Returns:
            The 0-d loss, or with ``return_outputs`` the loss and its `GRPOLossOutput`.

        Raises:
            RuntimeError: the compiled kernels of grpo_ext did not compute the loss.
        """
        calls = kernel_calls()
        output = self.model_pass.loss(model, inputs)
        new_calls = kernel_calls() - calls
        if new_calls < 1:
            raise RuntimeError(
                f"step {self.state.global_step + 1}: the compiled kernels of grpo_ext did not compute the loss, "
                "so training stops; run `grpo-ext info` to see whether they are installed"
            )
        self.kernel_calls += new_calls
        self._report_path()
        self.metrics.add_loss(output.metrics, self.args.beta != 0, inputs.sampling_logps is not None)
        loss = output.loss if inputs.weight == 1 else output.loss * inputs.weight
        if self.args.loss_type not in WINDOW_NORMALISED:
            loss = loss / self.plan.gradient_accumulation_steps
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Skip the step if its loss or gradient is not finite. transformers calls this between backward and step."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled, taken = self.accelerator.scaler is not None, None
        if scaled and not self.args.max_grad_norm:
            # Clipping would have unscaled the gradients. The scaler's step raises if none was unscaled, and the guard
            # may drop them all, so unscale first.
            self.accelerator.unscale_gradients()
        if self.is_deepspeed_enabled:
            engine: Any = model
            scaled, taken = engine.fp16_enabled(), engine.was_step_applied()
        skipped = self.guard.before_step(model, norm, self.state.global_step + 1, scaled, taken)
        self.step_losses.end_step(skipped)
        return norm

    def _set_train_mode(self, model: nn.Module) -> None:
        # model.train() visits thousands of modules, 0.1 s on a slow host, so it runs only if needed. Check a leaf as
        # well: a wrapper such as DDP starts in train mode even if the wrapped model is in eval mode.
        if not (model.training and self._leaf.training):
            model.train()
        optimizer_train = getattr(self.optimizer, "train", None)
        if callable(optimizer_train):
            optimizer_train()  # schedule-free optimizers keep separate weights for training

    def _locate(self, number: int) -> tuple[int, MicroStep]:
        """Return how many micro-steps of the run precede micro-step ``number`` of the epoch, and its `MicroStep`."""
        steps_per_epoch = len(self.schedule) // self.plan.gradient_accumulation_steps
        before = self.state.global_step // steps_per_epoch * len(self.schedule) + number
        return before, self.schedule.locate(before)

    def _entropy_threshold(self, entropy: Tensor, loss_mask: Tensor) -> Tensor | None:
        """Compute the entropy quantile over the tokens of all ranks; None without tokens."""
        known = entropy.masked_fill(loss_mask == 0, float("nan")).flatten()
        padded = self.accelerator.pad_across_processes(known, pad_index=float("nan"))
        known = self._gather(padded)
        known = known[~known.isnan()]
        return torch.quantile(known, 1 - self.args.top_entropy_quantile) if len(known) else None

    @property
    def loss_path(self) -> str:
        """How the loss is computed: ``fused head``, or ``logits: <reason>``."""
        return self.fused_head.describe()

    def _report_path(self) -> None:
        """Print once per run how the loss and the faster layers are computed."""
        if not self._path_reported:
            self._path_reported = True
            for line in (f"loss from {self.loss_path}", *self.faster_layers.report()):
                self.accelerator.print(line)
            if self.args.padding_free:
                reason = self.layouts.padded_because or self.fused_head.reason
                self.accelerator.print(f"padding_free: rows are padded, {reason}" if reason else "padding_free: in use")

    # ---- data ----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return one item per micro-step: its number within the epoch. `PromptSchedule` maps it to prompts."""
        return DataLoader(MicroStepNumbers(len(self.schedule)), batch_size=1, collate_fn=collate_micro_step)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Count the completions of one epoch over all ranks."""
        return len(dataloader) * self.plan.global_slice_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the completions are generated inside the step, so their length is unknown here."""
        return 0

    # ---- records -------------------------------------------------------------------------------------------

    def _record_completions(self, rollout: Rollout, sample: Sample, rewards: Tensor) -> None:
        args = self.args
        step = self.state.global_step + 1
        show = args.log_completions and self.state.global_step % max(int(args.logging_steps), 1) == 0
        if not (args.save_completions or show):
            return
        records = gather_object(completion_records(sample, self.rewards.names, rewards, rollout.advantages))
        if not self.accelerator.is_main_process:
            return
        if args.save_completions:
            micro_steps = self.plan.micro_steps_per_generation
            several_generations = micro_steps % self.plan.gradient_accumulation_steps != 0
            folder = Path(str(args.output_dir)) / "completions"
            write_completions(folder, step, rollout.start // micro_steps + 1, records, several_generations)
        if show:
            print_completions(records, step, args.num_completions_to_print)

    def _gather(self, value: Tensor) -> Tensor:
        return gather(self.accelerator, value, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics collected since the last log to a training log line."""
        if "loss" in logs:
            self.metrics.add("kernel_calls", float(self.kernel_calls), reduce="last")
            self.metrics.add("fused_head", float(self.fused_head.in_use), reduce="last")
            logs = {**logs, **self.metrics.flush(self._gather), "loss": self.step_losses.logged(logs["loss"])}
        super().log(logs, start_time)

    # ---- evaluation ----------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Generate over a dataset and report ``eval_reward`` and the other evaluation metrics.

        The random states of training do not change.

        Raises:
            ValueError: there is no dataset, or it is empty or has no prompts.
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
        model = self.accelerator.unwrap_model(self.model)
        metrics = measure(self.rollouts, model, dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- wiring --------------------------------------------------------------------------------------------

    def _build_rollouts(self, module: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: Any) -> RolloutMaker:
        args, ends = self.args, end_token_ids(module, tokenizer)
        engine: GenerationEngine
        if args.use_vllm:
            engine = build_engine(args, module, tokenizer, self.accelerator, ends, lambda: self.state.global_step)
        else:
            engine = TransformersEngine(ends, self.pad_id, args.share_prompts)
        encoder = PromptEncoder(tokenizer, args.max_prompt_length, context_length(module), args.max_completion_length)
        return RolloutMaker(
            args,
            self.accelerator,
            dataset,
            self.schedule,
            encoder,
            engine,
            self.rewards,
            self.metrics,
            self.may_skip_backward,
        )

    def _choose_checkpointing(self, module: nn.Module) -> None:
        args = self.args
        self.checkpointing: dict[str, Any] | None = None
        if not args.gradient_checkpointing or args.gradient_checkpointing_kwargs is not None:
            return
        unsupported = self.is_fsdp_enabled or self.is_deepspeed_enabled or args.torch_compile
        # Reentrant checkpointing builds no graph in the forward; DDP's search for unused parameters needs one.
        if not unsupported and not (self.accelerator.num_processes > 1 and args.ddp_find_unused_parameters):
            self.checkpointing = checkpointing_arguments(module)
        if self.checkpointing is not None and self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = False

    @contextlib.contextmanager
    def _checkpointing_in_args(self) -> Iterator[None]:
        """Put `checkpointing` into the args for one run; another trainer may use the same args later."""
        given = self.args.gradient_checkpointing_kwargs
        if given is None:
            self.args.gradient_checkpointing_kwargs = self.checkpointing
        try:
            yield
        finally:
            self.args.gradient_checkpointing_kwargs = given

    def _add_callbacks(self) -> None:
        self.add_callback(self.step_losses)
        self.add_callback(StepTimer(self.metrics))
        self.add_callback(MetricsFileCallback())
        if self.args.sync_ref_model and self.reference is not None:
            # In front of LastStep, which marks the step as complete: the sync is part of the step.
            self.callback_handler.callbacks.insert(0, ReferenceSync(self.reference, self._unwrapped))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgressCallback())

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    # ---- the run -------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with the faster layers attached; see `ResumableTrainer.train`."""
        with self._checkpointing_in_args(), self.faster_layers.attached():
            return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Reset the state of an earlier run; transformers calls this before the first step."""
        self._rollout = None
        self.kernel_calls = 0
        result = super()._prepare_for_training(*args, **kwargs)
        keep_half_precision_logits(self.accelerator.unwrap_model(self.model_wrapped), self.accelerator.autocast)
        set_backward_prefetch(self.model_wrapped)
        return result

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Correct transformers' mean loss, which counts skipped steps. transformers calls this after the last step."""
        total: float = self._total_loss_scalar + self._tr_loss.item()  # type: ignore[has-type]
        self._total_loss_scalar = self.step_losses.corrected_total(total)
        self._tr_loss.zero_()
        return super()._finalize_training(*args, **kwargs)

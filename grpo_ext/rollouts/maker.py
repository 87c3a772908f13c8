"""Produce a generation batch: choose prompts, generate completions, compute rewards and advantages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from grpo_ext.advantages import group_advantages
from grpo_ext.config import LossConfig
from grpo_ext.generation.engine import GenerationEngine, PromptEncoder, SamplingParams
from grpo_ext.generation.errors import PromptError
from grpo_ext.rollouts.batching import PromptSchedule
from grpo_ext.rollouts.data import columns_of, read_row
from grpo_ext.rollouts.rewards import RewardFunctions, reward_metrics
from grpo_ext.rollouts.rollout import Rollout, Sample, replies
from grpo_ext.rollouts.scoring import Scoring
from grpo_ext.update.filling import filled_slices, sorted_order
from grpo_ext.update.metrics import MetricBuffer
from grpo_ext.update.skipping import rows_with_gradient


class RolloutSettings(Protocol):
    """The fields of `grpo_ext.trainer.GRPOConfig` that rollouts and evaluation read."""

    device: torch.device
    seed: int
    max_completion_length: int
    mask_truncated_completions: bool
    scale_rewards: Any
    score_while_generating: bool
    skip_zero_gradient_sequences: bool
    fill_micro_batches: bool
    length_sorted_batches: bool
    per_device_eval_batch_size: int
    num_generations_eval: int
    eval_temperature: float

    def sampling(self, temperature: float | None = None) -> SamplingParams:
        """Sampling parameters; ``temperature`` overrides the one of training."""
        ...

    def loss_config(self) -> LossConfig:
        """The constants of the loss."""
        ...


class RolloutMaker:
    """Generate and score one generation batch at a time, over all ranks.

    Args:
        args: the run's parameters.
        accelerator: joins the ranks.
        dataset: the training prompts.
        schedule: the order of the prompts.
        encoder: turns prompts into token ids.
        engine: generates completions.
        rewards: the reward functions.
        metrics: collects the metrics.
        may_skip_backward: whether a micro-batch with no gradient may skip backward.
    """

    def __init__(
        self,
        args: RolloutSettings,
        accelerator: Any,
        dataset: Any,
        schedule: PromptSchedule,
        encoder: PromptEncoder,
        engine: GenerationEngine,
        rewards: RewardFunctions,
        metrics: MetricBuffer,
        may_skip_backward: bool,
    ) -> None:
        self.args = args
        self.may_skip_backward = may_skip_backward
        self.accelerator = accelerator
        self.dataset = dataset
        self.schedule = schedule
        self.plan = schedule.plan
        self.encoder = encoder
        self.engine = engine
        self.rewards = rewards
        self.metrics = metrics
        self.sampling = args.sampling()
        self._warned_truncated = False

    def prompts(self, key: tuple[int, int]) -> list[int]:
        """Dataset row of each of this rank's completions in the generation batch ``key``."""
        rows = self.schedule.rows(*key)
        return [rows[position] for position in self._positions]

    @property
    def _positions(self) -> list[int]:
        return self.plan.local_rows(self.accelerator.process_index)

    def advantages(self, rewards: Tensor, key: tuple[int, int]) -> Tensor:
        """``(n,)`` fp32 advantages from the ``(n, functions)`` rewards of this rank's completions; a collective."""
        advantages, by_group = self._over_ranks(gather(self.accelerator, rewards, self.args.device), key)
        metrics = reward_metrics(by_group, self.plan.num_generations, self.rewards.names, self.rewards.weights)
        self.metrics.update(metrics)
        return advantages[self._positions]

    def assemble(self, key: tuple[int, int], start: int, sample: Sample, advantages: Tensor) -> Rollout:
        """Build the rollout: this rank's completions in slices, one per micro-batch; a collective.

        Args:
            key: ``(epoch, generation)``.
            start: micro-steps of the run so far.
            sample: prompts and completions.
            advantages: ``(n,)``.
        """
        plan, completions = self.plan, sample.completions
        trained = [done or not self.args.mask_truncated_completions for done in completions.finished]
        active, seen = self._totals(sample, trained)
        if active == 0 and not self._warned_truncated:
            self._warned_truncated = True
            warnings.warn(
                "every completion of a generation batch was truncated and mask_truncated_completions is on, so "
                f"its loss is 0: raise max_completion_length ({self.args.max_completion_length})",
                stacklevel=2,
            )
        self.metrics.add_lengths([len(ids) for ids in completions.ids], completions.finished)
        slices = plan.steps_per_generation
        order, sizes = self._slices(sample, trained, advantages)
        return Rollout(
            key=key,
            start=start,
            rows_per_slice=plan.per_device_batch_size,
            prompt_ids=sample.prompt_ids,
            completion_ids=completions.ids,
            in_loss=trained,
            advantages=advantages,
            normaliser=max(active, 1.0) / plan.world_size * plan.gradient_accumulation_steps / slices,
            tokens_seen=seen,
            old_logps=[None] * slices,
            ref_logps=[None] * slices,
            sampling_logps=completions.sampling_logps,
            order=order,
            slice_sizes=sizes,
        )

    def _slices(
        self, sample: Sample, trained: list[bool], advantages: Tensor
    ) -> tuple[list[int] | None, list[int] | None]:
        """``order`` and ``slice_sizes`` of the rollout."""
        args = self.args
        completions = [len(ids) for ids in sample.completions.ids]
        if args.fill_micro_batches:
            kept = set(range(len(trained)))
            if args.skip_zero_gradient_sequences:
                kept = set(rows_with_gradient(args.loss_config(), advantages.tolist(), trained))
            through = [row in kept for row in range(len(trained))]
            lengths = [len(p) + c for p, c in zip(sample.prompt_ids, completions, strict=True)]
            agree = None if self.may_skip_backward else self._most
            return filled_slices(lengths, through, self.plan.per_device_batch_size, self.plan.slices_per_step, agree)
        if args.length_sorted_batches:
            return sorted_order(completions, self.plan.slices_per_step * self.plan.per_device_batch_size), None
        return None, None

    def _most(self, slices: list[int]) -> list[int]:
        """For each optimizer step, the largest number of slices that any process needs."""
        most: list[int] = gather(self.accelerator, torch.tensor([slices]), self.args.device).amax(dim=0).tolist()
        return most

    def generate_and_score(self, model: nn.Module, rows: list[int]) -> tuple[Sample, Tensor]:
        """Generate completions for rows of the training dataset, and their ``(n, functions)`` rewards."""
        if not self.args.score_while_generating:
            with self.metrics.timed("time/generation"):
                sample = self.generate(model, self.dataset, rows, self.sampling)
            self.metrics.update(engine_metrics(self.engine))
            with self.metrics.timed("time/rewards"):
                rewards = self.score(sample)
            return sample, rewards
        with Scoring(self.rewards, len(rows), self.args.device) as scoring:
            with self.metrics.timed("time/generation"):
                sample = self.generate(model, self.dataset, rows, self.sampling, scoring)
            self.metrics.update(engine_metrics(self.engine))
            with self.metrics.timed("time/rewards"):
                rewards, hidden = scoring.finish()
            self.metrics.add("time/rewards_hidden", hidden, reduce="sum")
        return sample, rewards

    def generate(
        self,
        model: nn.Module,
        dataset: Any,
        rows: list[int],
        sampling: SamplingParams,
        scoring: Scoring | None = None,
        name: str = "train_dataset",
    ) -> Sample:
        """Generate completions for rows of a dataset.

        Args:
            model: unwrapped.
            dataset: rows with a ``prompt``.
            rows: dataset indices, one per completion.
            sampling: sampling parameters.
            scoring: receives the completions of a dataset row as soon as all of them are finished.
            name: the dataset's name in error messages.

        Raises:
            PromptError: a prompt is missing or too long. Raised on every rank, before generation starts.
        """
        examples, prompt_ids = self._read(dataset, rows, name)
        prompts = [example["prompt"] for example in examples]
        columns = columns_of(examples)
        if scoring is None:
            completions = self.engine.generate(model, prompt_ids, sampling)
        else:
            groups = _Groups(self.encoder, scoring, rows, prompts, columns)
            completions = self.engine.generate(model, prompt_ids, sampling, groups.done)
        texts = self.encoder.decode(completions.ids)
        return Sample(prompts, columns, prompt_ids, completions, texts)

    def _read(self, dataset: Any, rows: list[int], name: str) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """Read rows and encode their prompts. All ranks raise if one fails, so that all can save a checkpoint."""
        error: PromptError | None = None
        examples: list[dict[str, Any]] = []
        encoded: list[list[int]] = []
        try:
            examples = [read_row(dataset, row, name) for row in rows]
            encoded = self.encoder.encode([example["prompt"] for example in examples])
        except PromptError as raised:
            error = raised
        except (TypeError, ValueError) as raised:
            error = PromptError(str(raised))
            error.__cause__ = raised
        if self.accelerator.num_processes > 1:
            failures = [message for message in gather_object([None if error is None else str(error)]) if message]
            if failures and error is None:
                raise PromptError(f"on another process: {failures[0]}")
        if error is not None:
            raise error
        return examples, encoded

    def score(self, sample: Sample) -> Tensor:
        """``(n, functions)`` rewards of a sample."""
        return self.rewards(
            sample.prompts, replies(sample.prompts, sample.texts), sample.completions.ids, sample.columns
        )

    def _totals(self, sample: Sample, trained: list[bool]) -> tuple[float, int]:
        """Sum over all ranks: completion tokens in the loss, and tokens of prompts and completions."""
        lengths = [len(ids) for ids in sample.completions.ids]
        active = sum(n for n, keep in zip(lengths, trained, strict=True) if keep)
        seen = sum(lengths) + sum(len(ids) for ids in sample.prompt_ids)
        counts = torch.tensor([[active, seen]])
        total = gather(self.accelerator, counts, self.args.device).sum(dim=0).tolist()
        return float(total[0]), int(total[1])

    def _over_ranks(self, gathered: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Advantages for each position of the generation batch, and the rewards ordered by group.

        Args:
            gathered: ``(n, functions)`` rewards of all ranks, rank after rank.
            key: ``(epoch, generation)``.
        """
        by_position = torch.empty_like(gathered)
        by_position[self.plan.gathered_rows()] = gathered
        order = torch.tensor(self.schedule.group_order(*key))
        by_group = torch.empty_like(gathered)
        by_group[order] = by_position
        missing = int(by_group.isnan().all(dim=1).sum())
        if missing:
            warnings.warn(
                f"{missing} of {len(by_group)} completions got no reward from any function: their group's baseline "
                "ignores them, and their advantage is 0",
                stacklevel=2,
            )
        advantages = group_advantages(
            by_group,
            self.plan.num_generations,
            reward_weights=self.rewards.weights,
            scale_rewards=self.args.scale_rewards,
        )
        return advantages[order].float(), by_group


class _Groups:
    """Collect completions and submit each group for scoring when it is complete.

    Args:
        encoder: turns ids into text.
        scoring: receives the groups.
        rows: dataset index of each completion; completions with equal indices form a group.
        prompts, columns: dataset values, one per completion.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        scoring: Scoring,
        rows: Sequence[int],
        prompts: list[Any],
        columns: dict[str, list[Any]],
    ) -> None:
        self.encoder, self.scoring, self.rows, self.prompts, self.columns = encoder, scoring, rows, prompts, columns
        self._ids: dict[int, list[int]] = {}
        self._positions: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            self._positions.setdefault(row, []).append(position)
        self._missing = {row: len(positions) for row, positions in self._positions.items()}

    def done(self, position: int, ids: list[int]) -> None:
        """Store a finished completion, and submit its group if it is the last."""
        self._ids[position] = ids
        row = self.rows[position]
        self._missing[row] -= 1
        if self._missing[row]:
            return
        positions = self._positions[row]
        group = [self._ids.pop(p) for p in positions]
        prompts = [self.prompts[p] for p in positions]
        columns = {name: [values[p] for p in positions] for name, values in self.columns.items()}
        self.scoring.add(positions, prompts, replies(prompts, self.encoder.decode(group)), group, columns)


def engine_metrics(engine: object) -> dict[str, float]:
    """Metrics of the engine since the last call; empty if the engine has no ``pop_metrics``."""
    pop = getattr(engine, "pop_metrics", None)
    return {} if pop is None else pop()


def gather(accelerator: Any, value: Tensor, device: torch.device) -> Tensor:
    """Gather the rows of all ranks, in rank order, on the CPU."""
    return accelerator.gather(value.to(device)).cpu() if accelerator.num_processes > 1 else value.cpu()

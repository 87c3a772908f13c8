"""Assign prompts to the rows of micro-batches: pure functions of the batch numbers, without tensors or a model.

Words: a *generation batch* holds the completions of one generation round over all ranks. It is cut into
``steps_per_generation`` *slices*. One rank's part of a slice is a *micro-batch* of ``per_device_train_batch_size``
rows. An optimizer step accumulates ``gradient_accumulation_steps`` micro-batches. Each generation batch is used
``num_iterations`` times.
"""

from __future__ import annotations

import dataclasses
import math
import random
import warnings

from grpo_ext.config import plain_value


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The resolved batch numbers of a run (SPEC section 7). `plan_batches` checks and returns them.

    Attributes:
        per_device_batch_size: rows of a micro-batch on one rank.
        world_size: number of ranks.
        gradient_accumulation_steps: micro-batches per optimizer step.
        steps_per_generation: slices of a generation batch.
        num_generations: completions per prompt (the group size).
        num_iterations: how often each slice of a generation batch is used.
    """

    per_device_batch_size: int
    world_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_generations: int
    num_iterations: int = 1

    @property
    def global_slice_size(self) -> int:
        """Rows of one slice over all ranks."""
        return self.per_device_batch_size * self.world_size

    @property
    def generation_batch_size(self) -> int:
        """Rows of one generation batch over all ranks."""
        return self.global_slice_size * self.steps_per_generation

    @property
    def unique_prompts(self) -> int:
        """Prompts of one generation batch."""
        return self.generation_batch_size // self.num_generations

    @property
    def micro_steps_per_generation(self) -> int:
        """Micro-batches that a rank runs between two generations."""
        return self.steps_per_generation * self.num_iterations

    @property
    def slices_per_step(self) -> int:
        """Slices of one generation batch in an optimizer step."""
        return min(self.gradient_accumulation_steps, self.steps_per_generation)

    @property
    def optimizer_steps_per_generation(self) -> float:
        """Optimizer steps between two generations, without replays; below 1 if a step spans several generations."""
        return self.steps_per_generation / self.gradient_accumulation_steps

    def rank_rows(self, rank: int, slice_index: int) -> range:
        """Positions in the generation batch of one rank's micro-batch.

        The ranks split every slice: a micro-step of ``world_size`` ranks with P rows each covers the same rows as one
        process with ``world_size * P`` rows.
        """
        start = slice_index * self.global_slice_size + rank * self.per_device_batch_size
        return range(start, start + self.per_device_batch_size)

    def local_rows(self, rank: int) -> list[int]:
        """Positions in the generation batch of all rows of one rank, slice after slice."""
        return [row for index in range(self.steps_per_generation) for row in self.rank_rows(rank, index)]

    def gathered_rows(self) -> list[int]:
        """Positions in the generation batch, in the order of a gather over ranks."""
        return [row for rank in range(self.world_size) for row in self.local_rows(rank)]

    def is_on_policy(self, start: int, micro_step: int) -> bool:
        """Whether no optimizer step separates the generation from one of its micro-steps.

        Args:
            start: micro-steps of the run before this generation.
            micro_step: 0-based micro-step within the generation batch.
        """
        accumulated = self.gradient_accumulation_steps
        return (start + micro_step) // accumulated == start // accumulated


def plan_batches(
    per_device_batch_size: int,
    world_size: int,
    gradient_accumulation_steps: int,
    num_generations: int,
    num_iterations: int = 1,
    steps_per_generation: int | None = None,
    generation_batch_size: int | None = None,
) -> BatchPlan:
    """Resolve and check the batch numbers of a run.

    If the generation batch would not hold whole groups, ``per_device_batch_size`` is raised to the next multiple of
    ``num_generations``, with a warning.

    Raises:
        ValueError: two numbers do not fit; the message names both and the remedy.
    """
    for name, value in (
        ("per_device_train_batch_size", per_device_batch_size),
        ("gradient_accumulation_steps", gradient_accumulation_steps),
        ("num_iterations", num_iterations),
        ("steps_per_generation", steps_per_generation),
        ("generation_batch_size", generation_batch_size),
    ):
        plain_value(name, value, "int | None")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_generations < 2:
        raise ValueError(
            f"num_generations must be at least 2, got {num_generations}: an advantage compares "
            "the completions of one prompt with each other"
        )
    if steps_per_generation is not None and generation_batch_size is not None:
        raise ValueError(
            f"steps_per_generation ({steps_per_generation}) and generation_batch_size "
            f"({generation_batch_size}) "
            "determine each other: set only one of them"
        )
    if generation_batch_size is not None and generation_batch_size % num_generations:
        raise ValueError(
            f"generation_batch_size ({generation_batch_size}) must be divisible by num_generations ({num_generations})"
        )
    rows = per_device_batch_size * world_size * (steps_per_generation or gradient_accumulation_steps)
    if generation_batch_size is None and rows % num_generations:
        raised = math.ceil(per_device_batch_size / num_generations) * num_generations
        warnings.warn(
            f"a generation batch of {rows} rows does not hold whole groups of "
            f"num_generations={num_generations}: "
            f"per_device_train_batch_size is raised from {per_device_batch_size} to {raised}",
            stacklevel=2,
        )
        per_device_batch_size = raised
    slice_size = per_device_batch_size * world_size
    if generation_batch_size is not None:
        if generation_batch_size % slice_size:
            raise ValueError(
                f"generation_batch_size ({generation_batch_size}) must be divisible by "
                f"per_device_train_batch_size * number of processes "
                f"({per_device_batch_size} * {world_size} = {slice_size})"
            )
        steps_per_generation = generation_batch_size // slice_size
    spg = gradient_accumulation_steps if steps_per_generation is None else steps_per_generation
    if spg % gradient_accumulation_steps and gradient_accumulation_steps % spg:
        raise ValueError(
            f"steps_per_generation ({spg}) and gradient_accumulation_steps "
            f"({gradient_accumulation_steps}) must "
            "divide one another: an optimizer step would straddle two generation batches"
        )
    plan = BatchPlan(
        per_device_batch_size, world_size, gradient_accumulation_steps, spg, num_generations, num_iterations
    )
    if plan.unique_prompts <= 2:
        warnings.warn(
            f"a generation batch holds only {plan.unique_prompts} different prompt(s), which makes the gradient "
            "noisy: raise per_device_train_batch_size, gradient_accumulation_steps or "
            "generation_batch_size",
            stacklevel=2,
        )
    return plan


@dataclasses.dataclass(frozen=True)
class MicroStep:
    """Position of a micro-step within the run.

    Attributes:
        epoch: 0-based pass over the dataset.
        generation: 0-based generation batch of the epoch.
        slice_index: slice of that batch.
        iteration: 0 for the first use of the slice, from 1 for its replays.
    """

    epoch: int
    generation: int
    slice_index: int
    iteration: int

    @property
    def epoch_and_generation(self) -> tuple[int, int]:
        """Identifier of the generation batch within the run."""
        return self.epoch, self.generation


class PromptSchedule:
    """The order of prompts of a whole run, with random access: a resumed run gets the same order again.

    An epoch is one pass over the dataset. Prompts that do not fill the last generation batch (or the last optimizer
    step) of an epoch are skipped; the next epoch draws a new order. A dataset too small for one optimizer step is
    repeated, with a warning.

    Args:
        num_prompts: rows of the dataset.
        plan: the batch numbers.
        seed: determines both shuffles.
        shuffle: draw a new order of the prompts each epoch; else keep the dataset's.
        shuffle_completions: mix the rows of a generation batch before it is sliced.
    """

    def __init__(
        self,
        num_prompts: int,
        plan: BatchPlan,
        seed: int = 0,
        *,
        shuffle: bool = True,
        shuffle_completions: bool = False,
    ) -> None:
        if num_prompts < 1:
            raise ValueError("train_dataset is empty: there is no prompt to generate from")
        self.num_prompts = num_prompts
        self.plan = plan
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_completions = shuffle_completions
        # Generation batches per indivisible unit: an epoch must end with a complete optimizer step.
        accumulated = plan.gradient_accumulation_steps
        unit = accumulated // math.gcd(accumulated, plan.micro_steps_per_generation)
        available = num_prompts // plan.unique_prompts // unit * unit
        if available == 0:
            warnings.warn(
                f"train_dataset has {num_prompts} prompt(s), an optimizer step needs "
                f"{plan.unique_prompts * unit}: prompts are repeated",
                stacklevel=2,
            )
        self.generations_per_epoch = max(available, unit)

    def __len__(self) -> int:
        """Micro-steps per epoch of one rank."""
        return self.generations_per_epoch * self.plan.micro_steps_per_generation

    def locate(self, global_micro_step: int) -> MicroStep:
        """Locate a micro-step, counted from the start of the run."""
        epoch, step = divmod(global_micro_step, len(self))
        generation, rest = divmod(step, self.plan.micro_steps_per_generation)
        iteration, slice_index = divmod(rest, self.plan.steps_per_generation)
        return MicroStep(epoch, generation, slice_index, iteration)

    def prompts(self, epoch: int, generation: int) -> list[int]:
        """The ``unique_prompts`` dataset indices of a generation batch."""
        order = list(range(self.num_prompts))
        if self.shuffle:
            random.Random(f"prompts-{self.seed}-{epoch}").shuffle(order)
        first = generation * self.plan.unique_prompts
        return [order[i % self.num_prompts] for i in range(first, first + self.plan.unique_prompts)]

    def group_order(self, epoch: int, generation: int) -> list[int]:
        """The row at each position of the generation batch; row r belongs to prompt ``r // G``."""
        order = list(range(self.plan.generation_batch_size))
        if self.shuffle_completions:
            random.Random(f"rows-{self.seed}-{epoch}-{generation}").shuffle(order)
        return order

    def rows(self, epoch: int, generation: int) -> list[int]:
        """Dataset index for every position of a generation batch."""
        prompts = self.prompts(epoch, generation)
        return [prompts[row // self.plan.num_generations] for row in self.group_order(epoch, generation)]

"""Split a generation batch of TRL into micro-batches: facts about the rows, sorting, filling."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grpo_ext.integrations.trl.counting import counts
from grpo_ext.integrations.trl.one_forward import is_rloo, loss_mask
from grpo_ext.integrations.trl.passes import Rows, is_sharded, remember_rows
from grpo_ext.update.filling import filled_slices, sorted_order
from grpo_ext.update.micro_batch import to_device

#: Loss types of GRPO whose divisor spans the generation batch, so that micro-batches may differ in size.
GLOBAL_DIVISOR = ("dapo", "cispo", "vespo")

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Switches of `grpo_ext.integrations.trl.patch` that concern a training step."""

    trim: bool = True
    one_forward: bool = True
    skip_zero_gradient_sequences: bool = True
    layers: bool = True
    checkpointing: bool = True
    weights: bool = True
    length_sorted_batches: bool = False
    fill_micro_batches: bool = False


#: The trainer whose generation batch is about to be split, with the options.
_splitting: ContextVar[tuple[Any, Options] | None] = ContextVar("grpo_ext_trl_splitting", default=None)


@contextlib.contextmanager
def splitting(trainer: Any, options: Options) -> Iterator[None]:
    """Pass the trainer and the options to `split`."""
    token = _splitting.set((trainer, options))
    try:
        yield
    finally:
        _splitting.reset(token)


def split(batch: Batch, number: int, original: Callable[[Batch, int], list[Batch]]) -> list[Batch]:
    """Replace TRL's ``split_tensor_dict``: equal batches with known `Rows`, sorted or filled if the options say so."""
    context = _splitting.get()
    if context is None or any(isinstance(value, (list, tuple)) for value in batch.values()):
        return original(batch, number)
    trainer, options = context
    rows = _rows(trainer, batch, options)
    total = len(rows.prompts)
    order, sizes = list(range(total)), [total // number] * number
    lengths = [p + c for p, c in zip(rows.prompts, rows.completions, strict=True)]
    per_step = min(trainer.args.gradient_accumulation_steps, number)
    if options.fill_micro_batches:
        if counts.part("fill_micro_batches", _reason_against_filling(trainer, per_step, number)):
            order, sizes = filled_slices(lengths, rows.has_gradient, total // number, per_step)
    elif options.length_sorted_batches and counts.part("length_sorted_batches", _reason_against_sorting(trainer)):
        order = sorted_order(lengths, per_step * (total // number))
    batches, start = [], 0
    for size in sizes:
        batches.append(_selected(batch, rows, order[start : start + size]))
        start += size
    return batches


def _rows(trainer: Any, batch: Batch, options: Options) -> Rows:
    """Collect the facts in one host sync."""
    advantages = batch["advantages"]
    nonzero = (advantages != 0).flatten(1).any(dim=1) if advantages.dim() > 1 else advantages != 0
    matters = nonzero & (loss_mask(batch) != 0).any(dim=1)
    table = torch.stack([batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=1), matters.long()])
    prompts, completions, has_gradient = table.tolist()
    reason = _reason_for_backward(trainer)
    if options.skip_zero_gradient_sequences and reason is not None:
        counts.part("skip_zero_gradient_sequences", reason)
    if reason is not None or not options.skip_zero_gradient_sequences:
        has_gradient = [1] * len(prompts)
    return Rows(prompts, completions, [bool(has) for has in has_gradient])


def _reason_for_backward(trainer: Any) -> str | None:
    """Return why rows of advantage 0 have a gradient or must run backward; None if neither."""
    if not is_rloo(trainer) and trainer.beta != 0.0:
        return "beta: the KL term has a gradient"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "entropy bonus"
    if getattr(trainer, "aux_loss_enabled", False):
        return "load-balancing loss of a mixture of experts"
    if is_sharded(trainer):
        return "sharded model: every rank must run the same passes"
    return None


def _reason_against_sorting(trainer: Any) -> str | None:
    """Return which term of the loss depends on the other rows of a micro-batch; None if none does."""
    if not is_rloo(trainer) and trainer.loss_type == "bnpo":
        return "loss_type 'bnpo' divides by the tokens of each micro-batch"
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        return "top_entropy_quantile: the quantile is over each micro-batch"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        return "entropy bonus: the mean is over each micro-batch"
    if getattr(trainer, "aux_loss_enabled", False):
        return "load-balancing loss of a mixture of experts: it is over each micro-batch"
    return None


def _reason_against_filling(trainer: Any, per_step: int, number: int) -> str | None:
    if is_rloo(trainer) or trainer.loss_type not in GLOBAL_DIVISOR:
        return f"the loss divides by each micro-batch; {', '.join(GLOBAL_DIVISOR)} do not"
    if number % per_step != 0:
        return "steps_per_generation is no multiple of gradient_accumulation_steps"
    if trainer.accelerator.num_processes > 1:
        return "several processes: TRL gathers one value per sequence, so micro-batches must have equal sizes"
    return _reason_against_sorting(trainer)


def _selected(batch: Batch, rows: Rows, order: list[int]) -> Batch:
    index = to_device(torch.tensor(order, dtype=torch.int64), batch["prompt_ids"].device)

    def part(value: Any) -> Any:
        return value.index_select(0, index) if isinstance(value, Tensor) and value.dim() else value

    found = {name: part(value) for name, value in batch.items()}
    remember_rows(found, rows.of(order))
    return found

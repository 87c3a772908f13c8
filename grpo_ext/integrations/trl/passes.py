"""Replacement of ``_get_per_token_logps_and_entropies`` of TRL's GRPO and RLOO trainers.

TRL pads every micro-batch to the longest prompt and completion of its generation batch, and runs the rows without a
gradient through backward, too. Here each pass gets one of the layouts of `grpo_ext.update.layouts`. Rows whose gradient
is zero run without a graph: TRL logs their entropies.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_ext.integrations.trl.counting import counts
from grpo_ext.modules.inspection import causal_lm, eval_mode
from grpo_ext.update.layouts import LayoutChooser
from grpo_ext.update.layouts.layout import TOLERANCE
from grpo_ext.update.micro_batch import MicroBatch, to_device

#: ``(logps, entropies, aux_loss)`` as TRL's method returns them.
Passed = tuple[Tensor, Tensor | None, Tensor | None]

#: Tensors of a batch of TRL from which `Rows` follows, besides the advantages.
FACTS = ("prompt_mask", "completion_mask", "tool_mask")


@dataclasses.dataclass
class Rows:
    """Facts about the B rows of a batch, on the host.

    Attributes:
        prompts, completions: tokens of each prompt and completion.
        has_gradient: whether the gradient of each row may be nonzero.
    """

    prompts: list[int]
    completions: list[int]
    has_gradient: list[bool]

    def of(self, rows: Sequence[int]) -> Rows:
        """Select rows."""
        prompts, completions = ([values[row] for row in rows] for values in (self.prompts, self.completions))
        return Rows(prompts, completions, [self.has_gradient[row] for row in rows])


def remember_rows(batch: dict[str, Any], rows: Rows) -> None:
    """Keep the facts about a batch for `rows_of`, at the tensor of its advantages."""
    batch["advantages"].grpo_ext_rows = rows, [batch.get(name) for name in FACTS]


def rows_of(batch: dict[str, Any]) -> Rows | None:
    """Return the facts about a batch; None if they are unknown or a subclass has replaced a tensor since."""
    rows, tensors = getattr(batch["advantages"], "grpo_ext_rows", (None, []))
    unchanged = all(batch.get(name) is tensor for name, tensor in zip(FACTS, tensors, strict=False))
    return rows if unchanged else None


@dataclasses.dataclass
class Update:
    """A call of TRL's ``_compute_loss``.

    Attributes:
        rows: facts about the rows, if they are known.
        one_pass: all rows must reach the head in one call.
        on_logps: receives the log probabilities (B,T), detached, before the loss uses them.
    """

    rows: Rows | None
    one_pass: bool
    on_logps: Callable[[Tensor], None]


#: The call of ``_compute_loss`` that runs; None in passes for old and reference log probabilities.
current_update: ContextVar[Update | None] = ContextVar("grpo_ext_trl_update", default=None)


@contextlib.contextmanager
def updating(update: Update) -> Iterator[None]:
    """Mark the passes in this context as those of ``update``."""
    token = current_update.set(update)
    try:
        yield
    finally:
        current_update.reset(token)


class Layouts:
    """Layout chooser of one model, once the model has shown that its logits do not depend on padding.

    Attributes:
        reason: why TRL's padding must stay; None if it need not.
    """

    def __init__(self, model: nn.Module, batch: MicroBatch) -> None:
        self.chooser = LayoutChooser(causal_lm(model), share_prompts=False)
        with torch.no_grad(), eval_mode(model):
            self.reason = _reason_to_pad(model, batch)


_layouts: WeakKeyDictionary[nn.Module, Layouts] = WeakKeyDictionary()


def _reason_to_pad(model: nn.Module, batch: MicroBatch) -> str | None:
    """Run one row alone and behind padding, without position ids as TRL does.

    Rotary embeddings of shifted positions round differently, and 16-bit logits differ by much more than in the tests of
    the layouts. Learned positions change the embeddings, so the embeddings must be equal bit for bit.
    """
    if _encoding_depends_on_width(causal_lm(model)):
        return "the encoding of positions depends on the padded width"
    row = max(range(len(batch.lengths()[0])), key=lambda r: batch.lengths()[0][r])
    ids = batch.prompt_ids[row : row + 1, -batch.lengths()[0][row] :][:, -16:]
    ones, count = torch.ones_like(ids), ids.shape[1]

    def outputs(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return found.hidden_states[0][:, -count:], found.logits[0, -1].float()

    try:
        embedded, alone = outputs(ids, ones)
        embedded_behind, behind = outputs(torch.cat([ids, ids], dim=1), torch.cat([0 * ones, ones], dim=1))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"the model does not run on a single row ({type(error).__name__})"
    bound = 10 * TOLERANCE.get(next(model.parameters()).dtype, 1e-4) * alone.norm()
    if torch.equal(embedded, embedded_behind) and bool((behind - alone).norm() <= bound):
        return None
    return "the model's logits depend on the padding before a prompt"


def _encoding_depends_on_width(model: nn.Module) -> bool:
    """Whether rotary frequencies follow the longest position (dynamic, longrope), or attention has chunks."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    kinds = {str(part.get(key)) for part in parts for key in ("rope_type", "type")}
    return bool(kinds & {"dynamic", "longrope"}) or bool(getattr(config, "attention_chunk_size", None))


def reason_to_keep_padding(trainer: Any, aux_loss: bool, modal: dict[str, Any]) -> str | None:
    """Return why TRL's own pass must run, as far as the arguments tell; None if they allow another layout."""
    given = sorted(name for name, value in modal.items() if value is not None)
    if given:
        return f"inputs of a multimodal model ({', '.join(given)})"
    if aux_loss:
        return "load-balancing loss of a mixture of experts"
    if getattr(trainer, "pad_to_multiple_of", None) is not None:
        return "pad_to_multiple_of"
    if getattr(trainer.args, "torch_compile", False):
        return "torch_compile, which would compile every length"
    if getattr(trainer.args, "parallelism_config", None) is not None:
        return "parallelism_config"
    if is_sharded(trainer):
        return "sharded model: every rank must run the same passes"
    return None


def is_sharded(trainer: Any) -> bool:
    """Whether passes through the model are collectives, which all ranks must run alike."""
    return bool(getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False))


def logps_and_entropies(
    trainer: Any,
    original: Callable[..., Passed],
    trim: bool,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **modal: Any,
) -> Passed:
    """Take the arguments of TRL's method and return its results; count the fallbacks to it.

    Args:
        trim: run the pass in another layout than TRL's, if the model allows it.
    """
    update = current_update.get()
    reason = reason_to_keep_padding(trainer, compute_aux_loss, modal) if trim else "trim=False"
    if reason is None:
        batch = _as_batch(input_ids, attention_mask, logits_to_keep, update.rows if update else None)
        prompts, completions = batch.lengths()
        if min(prompts, default=0) == 0 or max(completions) == 0:
            reason = "a prompt or all completions without a token"
        else:
            with trainer.accelerator.autocast():
                layouts = _layouts_of(model, batch)
            reason = layouts.reason
    if not counts.part("trim", reason):
        found = original(
            trainer, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
            **modal,
        )  # fmt: skip
    else:
        chosen = _Pass(trainer, layouts.chooser, batch, logits_to_keep, compute_entropy)
        everything = list(range(len(prompts)))
        if update is None:
            size = batch_size or len(everything)
            everything.sort(key=lambda row: -prompts[row] - completions[row])
            groups = [everything[start : start + size] for start in range(0, len(everything), size)]
            parts = [chosen.run(model, rows) for rows in groups]
        elif update.one_pass:
            groups = [everything]
            parts = [chosen.run(model, everything)]
        else:
            idle = _rows_without_gradient(update.rows, completions)
            counts.part("skip_zero_gradient_sequences", None, len(idle))
            groups = [[row for row in everything if row not in idle], idle] if idle else [everything]
            parts = [chosen.run(model, groups[0])]  # first: autocast keeps casts, and these need a graph
            if idle:
                parts.append(chosen.run_without_graph(model, idle))
        found = _joined(parts, groups, input_ids.device)
    if update is not None:
        update.on_logps(found[0].detach())
    return found


def _as_batch(input_ids: Tensor, attention_mask: Tensor, width: int, rows: Rows | None) -> MicroBatch:
    order = torch.arange(len(input_ids))  # no prompt is shared: TRL's forward drops the cache
    known = None if rows is None else (rows.prompts, rows.completions)
    if known is None:
        sums = torch.stack([attention_mask[:, :-width].sum(dim=1), attention_mask[:, -width:].sum(dim=1)]).tolist()
        known = (sums[0], sums[1])
    return MicroBatch(
        prompt_ids=input_ids[:, :-width],
        prompt_mask=attention_mask[:, :-width],
        first_row_of_prompt=order,
        prompt_index=order,
        completion_ids=input_ids[:, -width:],
        completion_mask=attention_mask[:, -width:],
        loss_mask=attention_mask[:, -width:],
        advantages=order,
        known_lengths=known,
    )


def _layouts_of(model: nn.Module, batch: MicroBatch) -> Layouts:
    inner = causal_lm(model)
    found = _layouts.get(inner)
    if found is None:
        found = _layouts[inner] = Layouts(model, batch)
    return found


def _rows_without_gradient(rows: Rows | None, completions: list[int]) -> list[int]:
    if rows is None:
        return []
    idle = [row for row, has in enumerate(rows.has_gradient) if not has]
    if len(idle) == len(completions):  # backward needs a graph: the shortest row keeps it
        idle.remove(min(idle, key=lambda row: rows.prompts[row] + completions[row]))
    return idle


class _Pass:
    """Run rows of one batch through a model, each group in the layout that the chooser finds for it."""

    def __init__(self, trainer: Any, chooser: LayoutChooser, batch: MicroBatch, width: int, entropy: bool) -> None:
        self._trainer, self._chooser, self._batch, self._width, self._entropy = trainer, chooser, batch, width, entropy

    def run(self, model: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return log probabilities and entropies, ``(len(rows), T)`` each, 0 at padding."""
        batch = _selected(self._batch, rows)
        with self._trainer.accelerator.autocast():
            layout = self._chooser.choose(model, batch)
            inputs = layout.inputs()
            inputs.pop("logits_to_keep", None)
            mask, ids = batch.completion_mask.bool(), batch.completion_ids
            shape = inputs["input_ids"].shape
            index = layout.first_positions().unsqueeze(1) + torch.arange(ids.shape[1], device=ids.device)
            labels = torch.full((shape.numel() + 1,), -100, dtype=ids.dtype, device=ids.device)
            labels.scatter_(0, index.masked_fill(~mask, shape.numel()).flatten(), ids.flatten())
            outputs = model(**inputs, shift_labels=labels[:-1].view(shape), fused_lm_head=True)
        index = index.clamp(max=shape.numel() - 1).flatten()

        def completions(values: Tensor) -> Tensor:
            found = values.flatten().index_select(0, index).view(ids.shape).masked_fill(~mask, 0.0)
            return pad(found, (0, self._width - ids.shape[1]))

        return completions(outputs.log_probs), completions(outputs.entropy) if self._entropy else None

    def run_without_graph(self, model: nn.Module, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """`run` for rows without gradient, past the wrapper, which would expect a backward."""
        inner = self._trainer.accelerator.unwrap_model(model)
        with torch.no_grad(), _without_checkpointing(inner):
            return self.run(inner, rows)


def _selected(batch: MicroBatch, rows: Sequence[int]) -> MicroBatch:
    """Select rows and cut the columns that hold padding only."""
    prompts = [batch.lengths()[0][row] for row in rows]
    completions = [batch.lengths()[1][row] for row in rows]
    first, width = batch.prompt_ids.shape[1] - max(prompts), max(1, *completions)
    index = None if len(rows) == len(batch.prompt_ids) and list(rows) == sorted(rows) else to_device(
        list(rows), batch.prompt_ids.device
    )  # fmt: skip

    def part(values: Tensor) -> Tensor:
        return values if index is None else values.index_select(0, index)

    order = torch.arange(len(rows))
    mask = part(batch.completion_mask[:, :width])
    return MicroBatch(
        prompt_ids=part(batch.prompt_ids[:, first:]),
        prompt_mask=part(batch.prompt_mask[:, first:]),
        first_row_of_prompt=order,
        prompt_index=order,
        completion_ids=part(batch.completion_ids[:, :width]),
        completion_mask=mask,
        loss_mask=mask,
        advantages=order,
        known_lengths=(prompts, completions),
    )


def _joined(parts: Sequence[tuple[Tensor, Tensor | None]], groups: Sequence[list[int]], device: torch.device) -> Passed:
    """Concatenate the groups and restore the order of the rows."""
    order = [row for rows in groups for row in rows]

    def joined(values: list[Tensor]) -> Tensor:
        whole = values[0] if len(values) == 1 else torch.cat(values)
        if order == sorted(order):
            return whole
        inverse = sorted(range(len(order)), key=lambda place: order[place])
        return whole.index_select(0, to_device(inverse, device))

    entropies = [entropy for _, entropy in parts if entropy is not None]
    return joined([logps for logps, _ in parts]), joined(entropies) if entropies else None, None


def zero_loss(model: nn.Module) -> Tensor:
    """Return the loss of a micro-batch without rows: 0, with a gradient of zeros."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    return parameter.flatten()[0].float() * 0.0


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off: without a graph it has nothing to save, and torch warns."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True

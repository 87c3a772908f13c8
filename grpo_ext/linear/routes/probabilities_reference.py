"""The kernels of the probability route in plain torch, step by step.

The functions have the names, arguments and in-place results of `grpo_ext._ops.probability`. They run on any device and
in any dtype, with sums in fp32 (fp64 for fp64). Tests run the whole route on them without a Hopper GPU, see
`select_route`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops import statistics_dtype
from grpo_ext._ops.probability import TILE_COLUMNS, ChunkRows

# The constants of csrc/cuda/probability/probability.h; exponents are to base 2.
GREATEST_SUM = 2.0**64
LOWEST_EXPONENT = -1e30
NO_EXPONENT = -1e29

#: Rows of one product. The shape is fixed, so a row's bits do not depend on the number of rows.
_BLOCK = 128


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(statistics_dtype(tensor.dtype))


def _tokens(rows: ChunkRows, device: torch.device) -> Tensor:
    return torch.arange(rows.first, rows.first + rows.count, device=device) if rows.index is None else rows.index


@dataclasses.dataclass(frozen=True)
class RowCoefficients:
    tensors: PolicyTensors
    spec: list[float]

    def of(self, logps: Tensor, entropy: Tensor) -> Tensor:
        """Return (tokens,) dLoss/dlogp, valid for tokens whose `logps` and `entropy` are filled in.

        The kernel sees one row at a time. To hide a token's neighbours here too, one call computes the even tokens with
        zeros for the odd ones, and another the odd tokens with zeros for the even ones.
        """

        def coefficients(visible: Tensor) -> Tensor:
            masked = (torch.where(visible, t, 0.0).view(self.tensors.mask.shape) for t in (logps, entropy))
            _, coef, *_ = torch.ops.grpo_ext.policy_loss(*masked, *self.tensors, self.spec)
            return coef.view(-1)

        even = torch.arange(logps.numel(), device=logps.device) % 2 == 0
        return torch.where(even, coefficients(even), coefficients(~even))


def row_coefficients(tensors: PolicyTensors, spec: list[float]) -> RowCoefficients:
    """Prepare the coefficients of a loss in which a token's dLoss/dlogp depends on no other row's logits."""
    return RowCoefficients(tensors, spec)


def target_reference(
    rows: ChunkRows, hidden: Tensor, gathered: Tensor | None, weight: Tensor, bias: Tensor | None, ids: Tensor,
    slope: float, shard: Tensor | None, reference: Tensor, target: Tensor, exponent: Tensor,
) -> None:  # fmt: skip
    """Write each row's softmax reference: the processed logit of its target, to base 2, in fp32.

    Args:
        rows: the rows of the chunk.
        hidden: (rows, H), or (tokens, H) if ``gathered`` is given.
        gathered: (rows, H), receives the chunk's rows of ``hidden``, masked ones as 0.
        slope: d(processed logit) / d(raw logit), which is scale / temperature.
        shard: (2,) int64, this rank's first token id and the size of the whole vocabulary; None: it is not split.
        reference: (rows,) output; `NO_EXPONENT` for a target with bias -inf, NaN for an invalid id, 0 on other ranks.
        target: (rows,) output, the target's column; -1 if another rank has it, or at a masked row.
        exponent: (rows,) zeroed for the rows of which ``target`` is -1.
    """
    tokens = _tokens(rows, hidden.device)
    unmasked = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask[tokens]
    if gathered is not None:
        hidden = gathered.copy_(torch.where(unmasked.unsqueeze(1), hidden[tokens], 0))
    token_ids = torch.where(unmasked, ids[tokens], 0)
    offset, total = (0, weight.shape[0]) if shard is None else shard.unbind()
    column = token_ids - offset
    here = unmasked & (column >= 0) & (column < weight.shape[0])
    column = torch.where(here, column, 0)
    z = (_wide(hidden) * _wide(weight[column])).sum(dim=1)
    if bias is not None:
        z = z + bias[column]
    z = (z * (slope / math.log(2))).clamp(min=NO_EXPONENT)
    wrong = unmasked & ((token_ids < 0) | (token_ids >= total))
    reference.copy_(torch.where(wrong, math.nan, torch.where(here, z, 0.0)))
    target.copy_(torch.where(here, column, -1))
    exponent.masked_fill_(~here, 0.0)


def product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reference: Tensor, target: Tensor, slope: float,
    probabilities: Tensor | None, partials: Tensor, recentred: Tensor, exponent: Tensor,
) -> None:  # fmt: skip
    """Write ``E = 2^t`` with ``t = processed logit / ln 2 - reference``; at the target E is 0 and `exponent` gets t.

    A tile of 256 columns whose sum would reach `GREATEST_SUM` is recentred: its reference is its greatest exponent,
    rounded to a whole number, and its sum is stored negative.

    Args:
        probabilities: (rows, V) output E; None: only the sums are written.
        partials: (tiles, rows, 2) output, sums of E and of t E in a tile, before E is rounded.
        recentred: (tiles, rows) output, the reference of a tile if it is recentred.
    """
    scale, tiles = slope / math.log(2), partials.shape[0]
    pad = (0, tiles * TILE_COLUMNS - weight.shape[0])
    count = hidden.shape[0]
    for start in range(0, count, _BLOCK):
        rows = slice(start, min(start + _BLOCK, count))
        block = hidden.new_zeros((_BLOCK, hidden.shape[1]))
        block[: rows.stop - start] = hidden[rows]
        z = (_wide(block) @ _wide(weight).t())[: rows.stop - start]
        if bias is not None:
            z = z + torch.where(bias * scale < LOWEST_EXPONENT, LOWEST_EXPONENT / scale, bias)
        column = target[rows].long()
        here = column >= 0
        at = torch.arange(column.numel(), device=column.device)[here], column[here]
        exponent[rows][here] = _exponents(z, scale, reference[rows, None])[at]
        z[at] = LOWEST_EXPONENT / scale
        z = torch.nn.functional.pad(z, pad, value=LOWEST_EXPONENT / scale).view(len(column), tiles, TILE_COLUMNS)
        centre = reference[rows, None].expand(-1, tiles)
        t = _exponents(z, scale, centre[..., None])
        over = t.exp2().sum(dim=2) >= GREATEST_SUM
        recentred[:, rows] = (z * scale).amax(dim=2).round().t()
        t = _exponents(z, scale, torch.where(over, recentred[:, rows].t(), centre)[..., None])
        e = t.exp2()
        total = e.sum(dim=2)
        partials[:, rows, 0] = torch.where(over, -total, total).t()
        partials[:, rows, 1] = (e * t).sum(dim=2).t()
        if probabilities is not None:
            probabilities[rows] = e.flatten(1)[:, : weight.shape[0]].to(probabilities.dtype)


def _exponents(z: Tensor, scale: float, reference: Tensor) -> Tensor:
    """Return ``z * scale - reference``, rounded once like a fused multiply-add."""
    return (z.double() * scale - reference).to(z.dtype)


def fold(
    rows: ChunkRows, partials: Tensor, recentred: Tensor, reference: Tensor, exponent: Tensor, target: Tensor,
    slope: float, sums: tuple[Tensor, Tensor] | None, logps: Tensor, entropy: Tensor, factor: Tensor, residual: Tensor,
    probabilities: Tensor | None, dtype: torch.dtype, coefficients: RowCoefficients | None, rank: int = -1,
) -> None:  # fmt: skip
    """Add the sums of all tiles: write log probability, entropy, row factor, and the target's element of E.

    Let ``others`` be the sum of E without the target, t the target's exponent and ``S = others + 2^t``. Then
    ``logp = -log(S / 2^t)``. With ``-others`` as the target's element of E, ``dlogp/dlogits = -(slope / S) E``. So
    1 - p of a confident token is a sum of small terms, without cancellation.

    A row with recentred tiles, its E included, is rescaled to the greatest of their references.

    With the vocabulary split over ranks there are two calls. The first one has ``sums``: it rescales, writes the row's
    sums and reference, and returns. The second one gets those of all ranks, as one tile per rank.

    Args:
        sums: (rows, 2) and (rows,) outputs of the first of two calls; else None.
        residual: output, the rounding error of the target's element of E.
        dtype: of E.
        coefficients: dLoss/dlogp, multiplied into the factor; None: 1.
        rank: in the second call, the tile of this rank; -1: one call does all.
    """
    is_recentred = partials[..., 0] < 0
    any_recentred = is_recentred.any(dim=0)
    references = torch.where(is_recentred, recentred, reference)
    greatest = torch.where(is_recentred, recentred, -math.inf).amax(dim=0)
    centre = torch.where(any_recentred, greatest, reference)
    shift = references - centre  # exactly 0 in a row without recentred tiles
    total, weighted = partials[..., 0].abs(), partials[..., 1]
    others = (shift.exp2() * total).sum(dim=0)
    weighted = (shift.exp2() * (weighted + shift * total)).sum(dim=0)
    if probabilities is not None:
        stored = probabilities.shape[0]
        of_tiles = shift[:, :stored] if rank < 0 else shift[rank : rank + 1, :stored]
        width = TILE_COLUMNS if rank < 0 else probabilities.shape[1]
        scales = of_tiles.exp2().t().repeat_interleave(width, dim=1)[:, : probabilities.shape[1]]
        probabilities.copy_(torch.where(any_recentred[:stored, None], probabilities * scales, probabilities))
    if sums is not None:
        sums[0].copy_(torch.stack([torch.where(any_recentred, -others, others), weighted], dim=1))
        sums[1].copy_(centre)
        return
    tokens = _tokens(rows, logps.device)
    unmasked = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask[tokens]
    t = exponent + (reference - centre)
    target_exp = torch.exp2(t)
    target_weighted = target_exp * t
    t = torch.where(reference <= NO_EXPONENT, -math.inf, t)
    S = others + target_exp
    logp = torch.where(others < target_exp, 0.0 - torch.log1p(others / target_exp), t * math.log(2) - S.log())
    row_entropy = S.log() - math.log(2) * ((weighted + target_weighted) / S)
    logps[tokens] = torch.where(unmasked, logp, 0.0)
    entropy[tokens] = torch.where(unmasked, row_entropy, 0.0)
    factor.copy_(torch.where(unmasked, -slope / S, 0.0))
    if coefficients is not None:
        factor.mul_(torch.where(unmasked, coefficients.of(logps, entropy)[tokens], 0.0))
    residual.zero_()
    if probabilities is not None:
        stored = probabilities.shape[0]
        column = target[:stored].long()
        here = (column >= 0) & unmasked[:stored]
        at = torch.arange(stored, device=column.device)[here], column[here]
        probabilities[at] = -others[:stored][here].to(probabilities.dtype)
        residual[:stored][here] = -others[:stored][here] - probabilities[at].to(residual.dtype)


def scale(
    rows: ChunkRows, product: Tensor, factor: Tensor, residual: Tensor | None, target: Tensor | None, weight: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """``out[token] = factor * (product + residual * weight[target])``, rounded once."""
    if residual is not None and target is not None:
        target_weight = torch.where((target >= 0).unsqueeze(1), weight[target.long().clamp(min=0)], 0.0)
        product = product + residual.unsqueeze(1) * target_weight.to(product.dtype)
    out[_tokens(rows, out.device)] = (product * factor.unsqueeze(1)).to(out.dtype)


def scaled_hidden(hidden: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out = factor * hidden``, rounded once; the product with E is the head's gradient."""
    torch.mul(hidden, factor.unsqueeze(1), out=out)

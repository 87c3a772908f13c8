"""The kernels of the probability route in plain torch: what they compute, step by step.

Same functions, arguments and results in place as `grpo_ext._ops.probability`, on any device and in any dtype (sums in
fp64 for fp64, else fp32). Tests run the whole route on them without a Hopper GPU: see `select_route`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.probability import TILE_COLUMNS, ChunkRows

# The constants of csrc/cuda/probability/probability.h; exponents are to base 2.
GREATEST_SUM = 2.0**64
LOWEST_EXPONENT = -1e30
NO_EXPONENT = -1e29

#: Rows of one product here: a row's bits then do not depend on how many rows there are.
_BLOCK = 128


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _tokens(rows: ChunkRows, device: torch.device) -> Tensor:
    return torch.arange(rows.first, rows.first + rows.count, device=device) if rows.index is None else rows.index


@dataclasses.dataclass(frozen=True)
class RowCoefficients:
    tensors: PolicyTensors
    spec: list[float]

    def of(self, logps: Tensor, entropy: Tensor) -> Tensor:
        """(tokens,) dLoss/dlogp; right where `logps` and `entropy` are known.

        Half of the tokens at a time, the others hidden: the kernel does not look at a row's neighbours either.
        """

        def coefficients(own: Tensor) -> Tensor:
            now = (torch.where(own, t, 0.0).view(self.tensors.mask.shape) for t in (logps, entropy))
            _, coef, *_ = torch.ops.grpo_ext.policy_loss(*now, *self.tensors, self.spec)
            return coef.view(-1)

        even = torch.arange(logps.numel(), device=logps.device) % 2 == 0
        return torch.where(even, coefficients(even), coefficients(~even))


def row_coefficients(tensors: PolicyTensors, spec: list[float]) -> RowCoefficients:
    """For a loss in which dLoss/dlogp of a token depends on no other row's logits."""
    return RowCoefficients(tensors, spec)


def target_reference(
    rows: ChunkRows,
    hidden: Tensor,
    gathered: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    slope: float,
    shard: Tensor | None,
    reference: Tensor,
    target: Tensor,
    exponent: Tensor,
) -> None:
    """Each row's softmax reference, base 2: the processed logit of its own token, in fp32.

    A token switched off by a bias of -inf leaves `NO_EXPONENT`. `gathered`: (rows, H) for the chunk's rows, masked ones
    0; `hidden` then has those of all tokens. `shard`: (2,) int64, the id of the first token here and the number of all
    of them, where other ranks hold the rest.
    """
    tokens = _tokens(rows, hidden.device)
    unmasked = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask[tokens]
    if gathered is not None:
        hidden = gathered.copy_(torch.where(unmasked.unsqueeze(1), hidden[tokens], 0))
    own = torch.where(unmasked, ids[tokens], 0)
    offset, total = (0, weight.shape[0]) if shard is None else shard.unbind()
    column = own - offset
    here = unmasked & (column >= 0) & (column < weight.shape[0])
    column = torch.where(here, column, 0)
    z = (_wide(hidden) * _wide(weight[column])).sum(dim=1)
    if bias is not None:
        z = z + bias[column]
    z = (z * (slope / math.log(2))).clamp(min=NO_EXPONENT)
    wrong = unmasked & ((own < 0) | (own >= total))
    reference.copy_(torch.where(wrong, math.nan, torch.where(here, z, 0.0)))
    target.copy_(torch.where(here, column, -1))
    exponent.masked_fill_(~here, 0.0)


def product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: Tensor,
    target: Tensor,
    slope: float,
    probabilities: Tensor | None,
    partials: Tensor,
    recentred: Tensor,
    exponent: Tensor,
) -> None:
    """``E = 2^t`` with ``t = processed logit / ln 2 - reference``, 0 at the target, whose t goes to `exponent`.

    Per tile of 256 columns the sums of E and of t E, before E is rounded. A tile whose sum would reach `GREATEST_SUM`
    is recentred: its t are relative to its greatest exponent, a whole number that goes to `recentred` (tiles, rows),
    and the sign of its sum says so.
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
        own = target[rows].long()
        here = own >= 0
        at = torch.arange(own.numel(), device=own.device)[here], own[here]
        exponent[rows][here] = _exponents(z, scale, reference[rows, None])[at]
        z[at] = LOWEST_EXPONENT / scale
        z = torch.nn.functional.pad(z, pad, value=LOWEST_EXPONENT / scale).view(len(own), tiles, TILE_COLUMNS)
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
    """Rounded once, as a fused operation."""
    return (z.double() * scale - reference).to(z.dtype)


def fold(
    rows: ChunkRows,
    partials: Tensor,
    recentred: Tensor,
    reference: Tensor,
    exponent: Tensor,
    target: Tensor,
    slope: float,
    sums: tuple[Tensor, Tensor] | None,
    logps: Tensor,
    entropy: Tensor,
    factor: Tensor,
    residual: Tensor,
    probabilities: Tensor | None,
    dtype: torch.dtype,
    coefficients: RowCoefficients | None,
    rank: int = -1,
) -> None:
    """Partial sums over the tiles -> log probability, entropy, row factor; the target's own element of E.

    With ``S = others + 2^t``: logp = -log(S / 2^t), d logp / d logits = -(slope / S) E where E at the target is
    ``-others``: 1 - p of a confident token is a sum of what is small, not the difference of what is close. `residual`
    is what rounding that element leaves over. `coefficients` are multiplied into the factor.

    A row with recentred tiles is rescaled to the greatest of their references, E too. `sums`: stop there and write the
    row's sums and reference to it. A second call gets them as `partials` and `recentred`, one tile a rank; `rank`
    is the one that holds E.
    """
    moved = partials[..., 0] < 0
    references = torch.where(moved, recentred, reference)
    centre = torch.where(moved.any(dim=0), torch.where(moved, recentred, -math.inf).amax(dim=0), reference)
    shift = references - centre  # exactly 0 in a row without recentred tiles
    total, weighted = partials[..., 0].abs(), partials[..., 1]
    others = (shift.exp2() * total).sum(dim=0)
    weighted = (shift.exp2() * (weighted + shift * total)).sum(dim=0)
    if probabilities is not None:
        stored = probabilities.shape[0]
        of_tiles = shift[:, :stored] if rank < 0 else shift[rank : rank + 1, :stored]
        width = TILE_COLUMNS if rank < 0 else probabilities.shape[1]
        scales = of_tiles.exp2().t().repeat_interleave(width, dim=1)[:, : probabilities.shape[1]]
        probabilities.copy_(torch.where(moved.any(dim=0)[:stored, None], probabilities * scales, probabilities))
    if sums is not None:
        sums[0].copy_(torch.stack([torch.where(moved.any(dim=0), -others, others), weighted], dim=1))
        sums[1].copy_(centre)
        return
    tokens = _tokens(rows, logps.device)
    unmasked = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask[tokens]
    t = exponent + (reference - centre)
    own = torch.exp2(t)
    own_weighted = own * t
    t = torch.where(reference <= NO_EXPONENT, -math.inf, t)
    S = others + own
    logp = torch.where(others < own, 0.0 - torch.log1p(others / own), t * math.log(2) - S.log())
    of_entropy = S.log() - math.log(2) * ((weighted + own_weighted) / S)
    logps[tokens] = torch.where(unmasked, logp, 0.0)
    entropy[tokens] = torch.where(unmasked, of_entropy, 0.0)
    factor.copy_(torch.where(unmasked, -slope / S, 0.0))
    if coefficients is not None:
        factor.mul_(torch.where(unmasked, coefficients.of(logps, entropy)[tokens], 0.0))
    residual.zero_()
    if probabilities is not None:
        stored = probabilities.shape[0]
        own_column = target[:stored].long()
        put = (own_column >= 0) & unmasked[:stored]
        at = torch.arange(stored, device=own_column.device)[put], own_column[put]
        probabilities[at] = -others[:stored][put].to(probabilities.dtype)
        residual[:stored][put] = -others[:stored][put] - probabilities[at].to(residual.dtype)


def scale(
    rows: ChunkRows,
    product: Tensor,
    factor: Tensor,
    residual: Tensor | None,
    target: Tensor | None,
    weight: Tensor,
    out: Tensor,
) -> None:
    """``out[token] = factor * (product + residual * weight[target])``, rounded once."""
    if residual is not None and target is not None:
        own = torch.where((target >= 0).unsqueeze(1), weight[target.long().clamp(min=0)], 0.0)
        product = product + residual.unsqueeze(1) * own.to(product.dtype)
    out[_tokens(rows, out.device)] = (product * factor.unsqueeze(1)).to(out.dtype)


def scaled_hidden(hidden: Tensor, factor: Tensor, out: Tensor) -> None:
    """``out = factor * hidden``, rounded once: the right factor of the head's gradient."""
    torch.mul(hidden, factor.unsqueeze(1), out=out)

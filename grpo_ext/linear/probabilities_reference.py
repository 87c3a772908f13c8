"""The kernels of the probability route in plain torch: what they compute, step by step.

Same functions, arguments and results in place as `grpo_ext._ops.probability`, on any device and in any dtype (sums in
fp64 for fp64, else fp32). Tests run the whole route on them where there is no Hopper GPU; `probabilities.select_route`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from grpo_ext._checks import PolicyTensors
from grpo_ext._ops.probability import TILE_COLUMNS, ChunkRows

# The constants of csrc/cuda/probability/probability.h and probability_glue.cu; exponents are to base 2.
GREATEST_EXPONENT = 100.0
LOWEST_EXPONENT = -1e30
UNCENTRED = 32.0
GREATEST_SHIFT = 60.0

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
    guess: Tensor | None,
    slope: float,
    shard: Tensor | None,
    reference: Tensor,
    target: Tensor,
    exponent: Tensor,
) -> None:
    """Each row's softmax reference, base 2: the processed logit of its own token, in fp32.

    A token switched off by a bias of -inf leaves 0; a guess of the log probability below -32 moves the reference up by
    what is beyond, so that the probable tokens' exponents stay near 0. `gathered`: (rows, H) for the chunk's rows,
    masked ones 0; `hidden` then has those of all tokens. `shard`: (2,) int64, the id of the first token here and the
    number of all of them, where other ranks hold the rest.
    """
    tokens = _tokens(rows, hidden.device)
    live = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask[tokens]
    if gathered is not None:
        hidden = gathered.copy_(torch.where(live.unsqueeze(1), hidden[tokens], 0))
    own = torch.where(live, ids[tokens], 0)
    offset, total = (0, weight.shape[0]) if shard is None else shard.unbind()
    column = own - offset
    here = live & (column >= 0) & (column < weight.shape[0])
    column = torch.where(here, column, 0)
    z = (_wide(hidden) * _wide(weight[column])).sum(dim=1)
    if bias is not None:
        z = z + bias[column]
    z = z * (slope / math.log(2))
    z = torch.where(z == -math.inf, 0.0, z)
    if guess is not None:
        beyond = -UNCENTRED - guess[tokens]
        z = z + torch.where(beyond > 0, beyond.clamp(max=GREATEST_SHIFT), 0.0) / math.log(2)
    wrong = live & ((own < 0) | (own >= total))
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
    exponent: Tensor,
) -> None:
    """``E = 2^t`` with ``t = processed logit / ln 2 - reference``, 0 at the target, whose t goes to `exponent`.

    Per tile of 256 columns the sums of E and of t E, before E is rounded.
    """
    count = hidden.shape[0]
    for start in range(0, count, _BLOCK):
        rows = slice(start, min(start + _BLOCK, count))
        block = hidden.new_zeros((_BLOCK, hidden.shape[1]))
        block[: rows.stop - start] = hidden[rows]
        z = (_wide(block) @ _wide(weight).t())[: rows.stop - start]
        t = (z.double() * (slope / math.log(2)) - reference[rows, None]).to(z.dtype)  # rounded once, a fused operation
        if bias is not None:
            t = t + (bias * (slope / math.log(2))).clamp(min=LOWEST_EXPONENT)
        own = target[rows].long()
        here = own >= 0
        at = torch.arange(own.numel(), device=own.device)[here], own[here]
        exponent[rows][here] = t[at]
        t[at] = LOWEST_EXPONENT
        t = torch.where(t > GREATEST_EXPONENT, GREATEST_EXPONENT, t)  # a NaN stays one
        e = torch.exp2(t)
        pad = (0, partials.shape[0] * TILE_COLUMNS - e.shape[1])
        for k, values in enumerate((e, e * t)):
            tiles = torch.nn.functional.pad(values, pad).view(len(own), -1, TILE_COLUMNS)
            partials[:, rows, k] = tiles.sum(dim=2).t()
        if probabilities is not None:
            probabilities[rows] = e.to(probabilities.dtype)


def fold(
    rows: ChunkRows,
    partials: Tensor,
    exponent: Tensor,
    target: Tensor,
    slope: float,
    sums: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    factor: Tensor,
    residual: Tensor,
    probabilities: Tensor | None,
    dtype: torch.dtype,
    coefficients: RowCoefficients | None,
) -> None:
    """Partial sums over the tiles -> log probability, entropy, row factor; the target's own element of E.

    With ``S = others + 2^t``: logp = -log(S / 2^t), d logp / d logits = -(slope / S) E where E at the target is
    ``-others``: 1 - p of a confident token is a sum of what is small, not the difference of what is close. `residual`
    is what rounding that element leaves over. `coefficients` are multiplied into the factor.
    """
    total = partials.sum(dim=0)
    if sums is not None:
        sums.copy_(total)
        return
    tokens = _tokens(rows, logps.device)
    live = torch.ones_like(tokens, dtype=torch.bool) if rows.mask is None else rows.mask[tokens]
    others, weighted = total.unbind(1)
    off = exponent < LOWEST_EXPONENT / 10
    t = torch.where(off, -math.inf, exponent)
    own = torch.exp2(t.clamp(max=GREATEST_EXPONENT))
    own_weighted = torch.where(off, 0.0, own * t)
    S = others + own
    logp = torch.where(others < own, 0.0 - torch.log1p(others / own), t * math.log(2) - S.log())
    of_entropy = S.log() - math.log(2) * ((weighted + own_weighted) / S)
    logps[tokens] = torch.where(live, logp, 0.0)
    entropy[tokens] = torch.where(live, of_entropy, 0.0)
    factor.copy_(torch.where(live, -slope / S, 0.0))
    if coefficients is not None:
        factor.mul_(torch.where(live, coefficients.of(logps, entropy)[tokens], 0.0))
    residual.zero_()
    if probabilities is not None:
        stored = probabilities.shape[0]
        own_column = target[:stored].long()
        put = (own_column >= 0) & live[:stored]
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

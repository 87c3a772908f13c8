"""The probability route: the product with the head hands over ``E = exp(z - z_target)`` instead of logits.

No pass over ``[tokens, V]`` is left: sums and target come out of the product's epilogue, the gradient's products take E
as it is, and what a row still needs is one factor, applied to tensors of ``[tokens, H]``. The method and its errors
are in docs/inside/probabilities.md. `refusal` decides who is served; `Probabilities` are the buffers and kernels of one
call, and the loops over its chunks are in `probabilities_loops`.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_ext import _C
from grpo_ext._checks import PolicyTensors
from grpo_ext._ops import probability as kernels
from grpo_ext._ops.probability import TILE_COLUMNS, ChunkRows
from grpo_ext.linear import probabilities_reference
from grpo_ext.linear.chunks import Numerics, Tokens
from grpo_ext.linear.head import Rows, padded_rows
from grpo_ext.linear.plan import ChunkPlan, chunk_plan, row_stride
from grpo_ext.linear.rows import Selection
from grpo_ext.vocabulary.shards import from_all_ranks, shard_sizes

#: Default memory budget in bytes: 4096 rows of 151,936 bf16 probabilities at H = 4096 and all that lies beside them.
DEFAULT_BUDGET = 1280 << 20

#: Rows of a chunk are a multiple of this many, the height of a tile.
ROW_STEP = 128

#: Bytes of a chunk's hidden states where no E is stored: they are read again for every few tiles of the head, from L2.
HIDDEN_BYTES = 32 << 20

#: Bytes of the fp32 product that is scaled into the gradient of the hidden states, a few thousand rows at a time.
PRODUCT_BYTES = 32 << 20

#: Of a processed logit in the raw one: 1e30 divided by it has to be a finite logit that rounding leaves alone.
SLOPES = (1e-8, 1e8)

_ROUTES = ("auto", "logits", "probabilities")
_route = "auto"


def select_route(name: str) -> None:
    """For tests and benchmarks. ``"auto"``: probabilities wherever `refusal` has no objection; ``"logits"``: never;
    ``"probabilities"``: also where there is no Hopper GPU, in plain torch."""
    global _route
    if name not in _ROUTES:
        raise ValueError(f"route must be one of {_ROUTES}, got {name!r}")
    _route = name


def refusal(
    *,
    compute_dtype: torch.dtype,
    hidden_size: int,
    transform: list[float],
    entropy_gradient: bool,
    aligned: bool,
    built: bool,
    capability: tuple[int, int] | None,
) -> str | None:
    """Why a call goes by way of logits; None: it is served here.

    Args:
        entropy_gradient: one of the entropy is sure to be asked for.
        aligned: the head's rows start at multiples of 16 bytes. built: the extension holds the kernel.
        capability: compute capability of the device, None for a CPU.
    """
    scale, softcap, temperature = transform
    if not SLOPES[0] < abs(scale / temperature) < SLOPES[1]:
        return f"a column switched off needs a finite logit: scale / temperature within {SLOPES}"
    if softcap:
        return "a softcap needs an element-wise factor in the gradient"
    if entropy_gradient:
        return "the gradient of an entropy needs an element-wise factor"
    if compute_dtype == torch.float16:
        # Nor without a gradient: a log probability has the same bits with and without one.
        return "fp16 has no room for exponentials that are not probabilities yet (above e^11)"
    if _route == "probabilities" and capability is None:
        return None
    if capability != (9, 0):
        return "the kernel is for compute capability 9.0"
    if not built:
        return "the extension was built without it (architecture 90)"
    if compute_dtype != torch.bfloat16:
        return "the product is for bf16"
    if hidden_size % 8 or not aligned:
        return "hidden size and the head's rows must be multiples of 8 elements"
    return None


def serves(weight: Tensor, numerics: Numerics, *, entropy_gradient: bool = False) -> bool:
    """Whether a call with this head takes the probability route."""
    if _route == "logits":
        return False
    on_gpu = weight.is_cuda
    if not on_gpu and _route != "probabilities":
        return False
    copied = weight.dtype != numerics.compute_dtype
    aligned = copied or (weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.data_ptr() % 16 == 0)
    reason = refusal(
        compute_dtype=numerics.compute_dtype,
        hidden_size=weight.shape[1],
        transform=numerics.transform,
        entropy_gradient=entropy_gradient,
        aligned=aligned,
        built=_C.CUDA_HOPPER_PRODUCTS,
        capability=torch.cuda.get_device_capability(weight.device) if on_gpu else None,
    )
    return reason is None


def probability_plan(
    vocab: int, hidden_size: int, numerics: Numerics, device_type: str, stores: bool = True
) -> ChunkPlan:
    """Rows per chunk within the budget, counting E, the rows of hidden states, partial sums and the fp32 product.

    At least as many as the logits route has for the same budget: completions that fit there fit here. Where no E is
    stored there are as many as keep their hidden states in L2.
    """
    itemsize = numerics.compute_dtype.itemsize
    stride = row_stride(vocab)
    sums = 12 * -(-vocab // TILE_COLUMNS)
    per_row = (stride + hidden_size) * itemsize + sums
    beside = PRODUCT_BYTES if device_type == "cuda" else 0
    budget = numerics.memory_budget or DEFAULT_BUDGET
    fitting = max(0, budget - beside) // per_row
    if device_type != "cuda" and not numerics.memory_budget:
        fitting = 0
    others = chunk_plan(
        vocab, hidden_size, numerics.compute_dtype, numerics.logits_dtype, device_type, numerics.memory_budget
    )
    step = ROW_STEP if fitting < 2 * ROW_STEP else 2 * ROW_STEP  # CTAs take tiles in pairs
    rows = max(fitting // step * step, others.rows)
    if not stores and device_type == "cuda":
        most = min(HIDDEN_BYTES, budget * hidden_size * itemsize // (hidden_size * itemsize + sums))
        rows = max(rows, most // (hidden_size * itemsize) // ROW_STEP * ROW_STEP)
    return ChunkPlan(min(rows, ROW_STEP), rows, stride)


class Chunk(NamedTuple):
    """What the first product of a chunk leaves."""

    where: Rows
    hidden: Tensor  # (rows, H) in the products' dtype
    probabilities: Tensor  # (stored, V): E, the target's element corrected
    factor: Tensor  # (stored,) d logp / d logits = factor * E; with `Probabilities.coefficients` d loss / d logits
    target: Tensor  # (stored,) int32 column of the target here, -1: none
    residual: Tensor  # (stored,) what rounding the target's element of E has left over

    def first(self, count: int) -> Chunk:
        where = self.where
        own = slice(where.start, where.start + count) if isinstance(where, slice) else where[:count]
        return Chunk(own, *(t[:count] for t in self[1:]))


class Probabilities(Tokens):
    """Buffers and kernels of one call; log probabilities and entropies per token are filled chunk by chunk.

    Args:
        stores: whether E of any row will be asked for.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        selection: Selection,
        numerics: Numerics,
        stores: bool = True,
    ) -> None:
        super().__init__(hidden, ids, mask, selection, numerics)
        wide = numerics.statistics_dtype
        self.weight = weight
        if weight.dtype != numerics.compute_dtype:  # `serves` counts on dense rows; a transposed head would stay one
            self.weight = weight.to(numerics.compute_dtype, memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.to(wide).contiguous()
        self.vocab, self.hidden_size = weight.shape
        scale, _, temperature = numerics.transform
        self.slope = scale / temperature
        plan = probability_plan(self.vocab, self.hidden_size, numerics, weight.device.type, stores)
        self.capacity = min(plan.rows, -(-selection.count // plan.block) * plan.block)
        self.logps, self.entropy = self.per_token(), self.per_token()
        self.shard: Tensor | None = None
        if self.group is not None:
            sizes = shard_sizes(self.vocab, self.group, weight.device)
            self.shard = torch.stack([sizes[: dist.get_rank(self.group)].sum(), sizes.sum()])
        self._kernels: ModuleType = kernels if weight.is_cuda else probabilities_reference
        self._stride = plan.stride
        new = self.weight.new_empty
        tiles = -(-self.vocab // TILE_COLUMNS)
        self._partials = new((tiles, self.capacity, 2), dtype=wide)
        self._recentred = new((tiles, self.capacity), dtype=wide)
        self._reference, self._factor, self._residual = (new(self.capacity, dtype=wide) for _ in range(3))
        self._target = new(self.capacity, dtype=torch.int32)
        self._record = new(4 * self.capacity, dtype=wide)  # exponents; with ranks, sums and references before them
        #: Of a loss in which a token's coefficient depends on no other row's logits: `chunk` multiplies it in.
        self.coefficients: kernels.RowCoefficients | probabilities_reference.RowCoefficients | None = None
        self._stored: Tensor | None = None
        self._rows: Tensor | None = None
        self._product: Tensor | None = None

    def hidden_gradient(self) -> Tensor:
        """(tokens, H) of zeros, in a dtype that the scaling kernel writes."""
        direct = self.group is None and self.hidden.dtype == self.weight.dtype
        dtype = self.hidden.dtype if direct else self.numerics.statistics_dtype
        return torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)

    def take_coefficients(self, tensors: PolicyTensors, spec: list[float]) -> None:
        """For losses in which dLoss/dlogp of a token depends on no other row's logits."""
        self.coefficients = self._kernels.row_coefficients(tensors, spec)

    def _ready(self) -> bool:
        """Whether the hidden states lie as the products read them."""
        hidden = self.hidden
        return hidden.dtype == self.weight.dtype and hidden.is_contiguous() and hidden.data_ptr() % 16 == 0

    def gather(self, where: Rows, count: int) -> Tensor:
        """Rows of hidden states in the products' dtype, masked ones 0; a view where they lie so already."""
        if isinstance(where, slice) and self.mask is None and self._ready():
            return self.hidden[where]
        rows = self._buffer(count)
        if isinstance(where, Tensor) and self.hidden.dtype == rows.dtype:
            torch.index_select(self.hidden, 0, where, out=rows)
        else:
            rows.copy_(self.hidden[where])
        live = self.live(where)
        if live is not None:  # 0 times whatever a masked row holds must be 0
            rows.masked_fill_(~live.unsqueeze(1), 0)
        return rows

    def chunk(self, start: int, end: int, stored: int) -> Chunk:
        """Rows [start, end) of the selection: log probabilities, entropies; E and factors of the first `stored`."""
        count = end - start
        where = self.selection.positions(start, end)
        rows = self._chunk_rows(where, slice(0, count))
        gathers = self._ready() and (self.mask is not None or isinstance(where, Tensor))  # the kernel, as it reads them
        X = self._buffer(count) if gathers else self.gather(where, count)
        reference, target = self._reference[:count], self._target[:count]
        exponent = self._record[3 * count : 4 * count]
        self._kernels.target_reference(
            rows, self.hidden if gathers else X, X if gathers else None, self.weight, self.bias, self.ids,
            self.slope, self.shard, reference, target, exponent,
        )  # fmt: skip
        if self.group is not None:
            dist.all_reduce(reference, group=self.group)  # the others hold 0
        E = self._probabilities(stored)
        for part in (slice(0, stored), slice(stored, count)):
            if part.start < part.stop:
                self._kernels.product(
                    X[part], self.weight, self.bias, reference[part], target[part], self.slope,
                    E if part.start < stored else None, self._partials[:, part], self._recentred[:, part],
                    exponent[part],
                )  # fmt: skip
        partials, recentred = self._partials[:, :count], self._recentred[:, :count]
        factor, residual = self._factor[:count], self._residual[:count]
        outputs = self.logps, self.entropy, factor, residual, E if stored else None, self.weight.dtype
        rank = -1
        if self.group is not None:
            sums = self._record[: 2 * count].view(count, 2), self._record[2 * count : 3 * count]
            self._kernels.fold(
                rows, partials, recentred, reference, exponent, target, self.slope, sums, *outputs, None
            )  # fmt: skip
            rank, all_ranks = dist.get_rank(self.group), from_all_ranks(self._record[: 4 * count], self.group)
            partials, recentred = all_ranks[:, : 2 * count].view(-1, count, 2), all_ranks[:, 2 * count : 3 * count]
            exponent = all_ranks[:, 3 * count :].sum(dim=0)  # the others hold 0
        self._kernels.fold(
            rows, partials, recentred, reference, exponent, target, self.slope, None, *outputs, self.coefficients, rank
        )
        return Chunk(where, X, E, factor[:stored], target[:stored], residual[:stored])

    def back_to_hidden(self, chunk: Chunk, factor: Tensor, out: Tensor) -> None:
        """``out[where] = factor * (E @ weight)``, the target's element of E as if it had not been rounded."""
        count = factor.numel()
        step = max(1, PRODUCT_BYTES // (4 * self.hidden_size)) if out.is_cuda else max(count, 1)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            product = self._back(chunk.probabilities[part])
            rows = self._chunk_rows(chunk.where, part)
            own = chunk.residual[part], chunk.target[part]
            self._kernels.scale(rows, product, factor[part], *own, self.weight, out)

    def own_columns(self, where: Rows) -> Tensor:
        """(rows,) int32: the column of each row's token on this rank, -1: another rank has it."""
        column = self.ids[where] if self.shard is None else self.ids[where] - self.shard[0]
        return torch.where((column >= 0) & (column < self.vocab), column, -1).int()

    def _chunk_rows(self, where: Rows, part: slice) -> ChunkRows:
        count = part.stop - part.start
        if isinstance(where, slice):
            return ChunkRows(count, where.start + part.start, None, self.mask)
        return ChunkRows(count, 0, where[part], self.mask)

    def scaled_hidden(self, chunk: Chunk, factor: Tensor) -> Tensor:
        """``factor * hidden`` in the products' dtype: the right factor of the head's gradient."""
        out = self._buffer(factor.numel())
        self._kernels.scaled_hidden(chunk.hidden, factor, out)
        return out

    def _back(self, E: Tensor) -> Tensor:
        wide = self.numerics.statistics_dtype
        if not E.is_cuda:
            return torch.mm(E.to(wide), self.weight.to(wide))
        if self._product is None:
            rows = min(self.capacity, max(1, PRODUCT_BYTES // (4 * self.hidden_size)))
            self._product = self.weight.new_empty((rows, self.hidden_size), dtype=wide)
        return torch.mm(E, self.weight, out_dtype=wide, out=self._product[: E.shape[0]])

    def _buffer(self, count: int) -> Tensor:
        if self._rows is None:
            self._rows = self.weight.new_empty((self.capacity, self.hidden_size))
        return self._rows[:count]

    def _probabilities(self, stored: int) -> Tensor:
        if stored and self._stored is None:
            self._stored = padded_rows(self.weight, self.capacity, self.vocab, self._stride)
        if self._stored is None:
            return self.weight.new_empty((0, self.vocab))
        return self._stored[:stored]

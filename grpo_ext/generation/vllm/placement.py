"""Where vLLM keeps each tensor of a checkpoint: found once, so that later hand-overs are plain copies.

vLLM's own way of taking over weights rebuilds the model layer by layer, with a pass over each tensor that only counts:
for a small model that takes longer than a training step. It stays the way of the first hand-over, which leaves every
number in its place. A tensor's place is then looked up by its name and vLLM's table of packed layers, and believed only
where the numbers are there. One tensor without a place, a parameter that none of them fills, or a layer that computes
something else from its weights after loading, and vLLM's own way stays the only one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_ext.generation.vllm.client import Weights

#: What vLLM's layers do with weights behind a loader, by the class of ``quant_method``: nothing, on a GPU.
AS_LOADED = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}

#: Attention whose matrices are made from others.
DERIVING = {"MLAAttention", "MultiHeadLatentAttentionWrapper"}

#: Layers whose parameters have rows beyond the checkpoint's.
PADDED = {"VocabParallelEmbedding", "ParallelLMHead"}

#: Elements of a tensor that are compared; bytes that are copied at a time.
COMPARED, BATCH = 4096, 2**28


class Sample(NamedTuple):
    """A few elements of a tensor that was handed over, its shape, and where it lay."""

    shape: torch.Size
    elements: Tensor
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        # An odd stride walks through columns as well as rows.
        picked = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // COMPARED) | 1].clone()
        return cls(tensor.shape, picked, tensor.data_ptr())


def sampled(weights: Weights, samples: dict[str, Sample]) -> Iterator[tuple[str, Tensor]]:
    """The same pairs; ``samples`` remembers a little of each."""
    for name, tensor in weights:
        samples[name] = Sample.of(tensor)
        yield name, tensor


class Placement:
    """Copies tensors of a checkpoint to their places in vLLM's model.

    Args:
        places: for each name, rows of one of vLLM's parameters, of the tensor's shape.
    """

    def __init__(self, places: dict[str, Tensor]) -> None:
        self.places = places

    @classmethod
    def found(cls, model: nn.Module, samples: dict[str, Sample]) -> Placement | None:
        """The places of all tensors, or None where one has none.

        Args:
            model: vLLM's, which holds the tensors that ``samples`` are of.
        """
        if not samples or any(map(_derives, model.modules())):
            return None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        packing = getattr(model, "packed_modules_mapping", {})
        places: dict[str, Tensor] = {}
        tensors: dict[int, int] = {}  # by the address of a place: that of the tensor that belongs there
        filled: set[int] = set()
        for name, sample in samples.items():
            found = _place(name, samples, parameters, packing, model)
            if found is None or tensors.setdefault(found[0].data_ptr(), sample.address) != sample.address:
                return None  # also where tied weights differ in the trainer: vLLM's loader knows which it takes
            places[name], parameter = found
            filled.add(parameter.data_ptr())
        if any(parameter.data_ptr() not in filled for parameter in parameters.values()):
            return None
        same = [_holds(places[name], sample) for name, sample in samples.items()]
        return cls(places) if bool(torch.stack(same).all()) else None

    @torch.no_grad()
    def copy(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every tensor to its place, rounded to the parameter's type.

        Raises:
            KeyError: for a name that was not among the samples.
            ValueError: for a tensor of another shape than the sample's, or a name that did not come.
        """
        missing = set(self.places)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        size = 0
        for name, tensor in weights:
            place = self.places[name]
            if place.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} and had {tuple(place.shape)}")
            missing.discard(name)
            targets.append(place)
            sources.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= BATCH:
                torch._foreach_copy_(targets, sources)
                targets, sources, size = [], [], 0
        if targets:
            torch._foreach_copy_(targets, sources)
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.places)} tensors did not come, {min(missing)} for one")


def _derives(module: nn.Module) -> bool:
    """Whether a layer of vLLM's keeps something that it computes from its weights once they are loaded."""
    if type(module).__name__ in DERIVING or getattr(getattr(module, "impl", None), "sinks", None) is not None:
        return True  # of sinks some kinds of attention keep a copy in fp32
    method = getattr(module, "quant_method", None)
    return method is not None and type(method).__name__ not in AS_LOADED


def _place(
    name: str,
    samples: dict[str, Sample],
    parameters: dict[str, nn.Parameter],
    packing: dict[str, list[str]],
    model: nn.Module,
) -> tuple[Tensor, nn.Parameter] | None:
    """Rows of a parameter, and the parameter."""
    shape = samples[name].shape
    own = parameters.get(name)
    if own is not None:
        rows_fit = own.shape[:1] == shape[:1] or type(model.get_submodule(name.rpartition(".")[0])).__name__ in PADDED
        fits = rows_fit and own.dim() == len(shape) > 0 and own.shape[1:] == shape[1:] and own.shape[0] >= shape[0]
        return (own.detach()[: shape[0]], own) if fits else None
    owner, _, leaf = name.rpartition(".")
    owner, _, part = owner.rpartition(".")
    for packed, parts in packing.items():
        parameter = parameters.get(f"{owner}.{packed}.{leaf}")
        if part not in parts or parameter is None:
            continue
        siblings = [samples.get(f"{owner}.{other}.{leaf}") for other in parts]
        if any(s is None or s.shape[1:] != parameter.shape[1:] for s in siblings):
            return None
        rows = [s.shape[0] for s in siblings if s is not None]
        if sum(rows) != parameter.shape[0]:
            return None
        start = sum(rows[: parts.index(part)])
        return parameter.detach()[start : start + shape[0]], parameter
    return None


def _holds(place: Tensor, sample: Sample) -> Tensor:
    """A bool on the parameter's device."""
    return (Sample.of(place).elements == sample.elements.to(place.device, place.dtype)).all()

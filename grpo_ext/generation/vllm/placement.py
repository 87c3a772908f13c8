"""Locate each checkpoint tensor in vLLM's model once, so that later weight updates are plain copies.

vLLM's own loader rebuilds the model layer by layer, with an extra counting pass over each tensor: for a small model
this takes longer than a training step. The first update uses that loader. Each tensor's place is then derived from its
name and vLLM's table of packed layers, and accepted only if the loaded values are there.

Later updates also use vLLM's loader if a tensor has no place, if no tensor fills some parameter, or if a layer derives
other values from its weights after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo_ext.generation.vllm.client import Weights

#: Classes of ``quant_method`` that keep weights as loaded, on a GPU.
AS_LOADED = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}

#: Attention layers that compute matrices from their weights.
DERIVING = {"MLAAttention", "MultiHeadLatentAttentionWrapper"}

#: Layers whose parameters have more rows than the checkpoint's tensors.
PADDED = {"VocabParallelEmbedding", "ParallelLMHead"}

#: Elements compared per tensor; bytes per batch of copies.
COMPARED, BATCH = 4096, 2**28


class Sample(NamedTuple):
    """The shape, some elements, and the address of a tensor that vLLM loaded."""

    shape: torch.Size
    elements: Tensor
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Sample:
        # An odd stride samples different columns as well as rows.
        picked = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // COMPARED) | 1].clone()
        return cls(tensor.shape, picked, tensor.data_ptr())


def sampled(weights: Weights, samples: dict[str, Sample]) -> Iterator[tuple[str, Tensor]]:
    """Yield the pairs unchanged, and store a sample of each tensor in ``samples``."""
    for name, tensor in weights:
        samples[name] = Sample.of(tensor)
        yield name, tensor


class Placement:
    """Copy checkpoint tensors to their places in vLLM's model.

    Args:
        places: for each checkpoint name, the rows of vLLM's parameter that hold the tensor.
    """

    def __init__(self, places: dict[str, Tensor]) -> None:
        self.places = places

    @classmethod
    def found(cls, model: nn.Module, samples: dict[str, Sample]) -> Placement | None:
        """Locate all tensors; None if vLLM's own loader is required.

        Args:
            model: vLLM's model, with the sampled tensors loaded.
            samples: a sample of each tensor, by checkpoint name.
        """
        if not samples or any(map(_derives, model.modules())):
            return None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        packing = getattr(model, "packed_modules_mapping", {})
        places: dict[str, Tensor] = {}
        tensors: dict[int, int] = {}  # address of a place → address of its tensor
        filled: set[int] = set()
        for name, sample in samples.items():
            found = _place(name, samples, parameters, packing, model)
            if found is None or tensors.setdefault(found[0].data_ptr(), sample.address) != sample.address:
                return None  # also if weights tied in vLLM differ in the trainer: vLLM's loader chooses one
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
            KeyError: an unknown name.
            ValueError: a tensor has another shape than its sample, or a tensor is missing.
        """
        missing = set(self.places)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        size = 0
        for name, tensor in weights:
            place = self.places[name]
            if place.shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(place.shape)}")
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
            raise ValueError(f"{len(missing)} of {len(self.places)} tensors are missing, such as {min(missing)}")


class Loader:
    """Load weights with vLLM's loader, and with plain copies as soon as every tensor's place is known.

    Args:
        places: whether places may be looked for. False if vLLM stores the weights differently from how it loads them.
    """

    def __init__(self, places: bool) -> None:
        self.placement: Placement | None = None
        self._places = places

    def __call__(
        self, weights: Weights, load: Callable[[Weights], object], find_model: Callable[[], nn.Module | None]
    ) -> None:
        """Load the weights.

        Args:
            load: vLLM's loader.
            find_model: returns vLLM's model, or None if it lives in another process.
        """
        if self.placement is not None:
            self.placement.copy(weights)
            return
        samples: dict[str, Sample] = {}
        load(sampled(weights, samples) if self._places else weights)
        model = find_model() if self._places else None
        if model is not None:
            self.placement = Placement.found(model, samples)
        self._places = self.placement is not None

    def forget(self) -> None:
        """Load with vLLM's loader from now on."""
        self.placement, self._places = None, False


def _derives(module: nn.Module) -> bool:
    """Whether a layer of vLLM stores values that it computes from its weights after loading."""
    if type(module).__name__ in DERIVING or getattr(getattr(module, "impl", None), "sinks", None) is not None:
        return True  # some attention backends keep an fp32 copy of the sinks
    method = getattr(module, "quant_method", None)
    return method is not None and type(method).__name__ not in AS_LOADED


def _place(
    name: str,
    samples: dict[str, Sample],
    parameters: dict[str, nn.Parameter],
    packing: dict[str, list[str]],
    model: nn.Module,
) -> tuple[Tensor, nn.Parameter] | None:
    """The rows of a parameter that hold the tensor, and the parameter; None if there are none."""
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
    """Whether a place holds the sampled values, as a tensor on the parameter's device (no host sync)."""
    return (Sample.of(place).elements == sample.elements.to(place.device, place.dtype)).all()

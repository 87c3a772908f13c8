"""Metrics collected between two logs; reading them is the only host sync."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["mean", "sum", "min", "max", "last"]
Gather = Callable[[Tensor], Tensor]

#: Metrics of a loss that are means over tokens and are logged under the same names.
TOKEN_MEANS = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean")

#: Metrics of a loss that compare trainer and engine, and the names under which they are logged (TRL's).
SAMPLING_METRICS = (
    ("sampling_logp_difference", "sampling/sampling_logp_difference"),
    ("importance_weight", "sampling/importance_sampling_ratio"),
)


class MetricBuffer:
    """Collect named values, and reduce each to a weighted mean, sum, extreme or last value in `flush`."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Reduce, list[Tensor | float], list[Tensor | float]]] = {}

    def add(self, name: str, value: Tensor | float, *, reduce: Reduce = "mean", weight: Tensor | float = 1.0) -> None:
        """Add one value, a number or a 0-d tensor; `flush` ignores NaN values."""
        _, values, weights = self._values.setdefault(name, (reduce, [], []))
        values.append(value.detach() if isinstance(value, Tensor) else value)
        weights.append(weight.detach() if isinstance(weight, Tensor) else weight)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes; `flush` sums them."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start, reduce="sum")

    def update(self, values: dict[str, float]) -> None:
        """Add several means."""
        for name, value in values.items():
            self.add(name, value)

    def add_loss(self, metrics: Mapping[str, Tensor | float], with_kl: bool, with_sampling: bool = False) -> None:
        """Add the metrics of one loss (`grpo_ext.output.METRIC_NAMES`); means are weighted by its active tokens.

        Args:
            with_kl: the loss has a KL term.
            with_sampling: the engine reported log probabilities; adds their metrics, ``sampling/...``.
        """
        tokens = metrics["tokens"]
        for name in TOKEN_MEANS + (("kl",) if with_kl else ()):
            self.add(name, metrics[name], weight=tokens)
        self.add("clip_ratio/low_min", metrics["clip_ratio/low_mean"], reduce="min")
        self.add("clip_ratio/high_max", metrics["clip_ratio/high_mean"], reduce="max")
        self.add("ratio/max", metrics["ratio/max"], reduce="max")
        self.add("nonfinite_tokens", metrics["nonfinite_tokens"], reduce="sum")
        if not with_sampling:
            return
        for ours, name in SAMPLING_METRICS:
            self.add(f"{name}/mean", metrics[f"{ours}/mean"], weight=tokens)
            self.add(f"{name}/max", metrics[f"{ours}/max"], reduce="max")
        least = torch.as_tensor(metrics["importance_weight/min"])  # 0 without tokens, which must not count as a minimum
        least = torch.where(torch.as_tensor(tokens) > 0, least, math.nan)
        self.add("sampling/importance_sampling_ratio/min", least, reduce="min")

    def add_lengths(self, lengths: list[int], finished: list[bool]) -> None:
        """Add the completion lengths of one generation batch, under the names ``completions/...``."""
        ended = [n for n, done in zip(lengths, finished, strict=True) if done]
        rows = len(lengths)
        self.add("completions/mean_length", sum(lengths) / rows, weight=rows)
        self.add("completions/min_length", float(min(lengths)), reduce="min")
        self.add("completions/max_length", float(max(lengths)), reduce="max")
        self.add("completions/clipped_ratio", 1 - len(ended) / rows, weight=rows)
        self.add("completions/mean_terminated_length", sum(ended) / max(len(ended), 1), weight=len(ended))

    def flush(self, gather: Gather | None = None) -> dict[str, float]:
        """Return the reduced values and clear the buffer. A mean of no values is NaN; a mean of weight 0 is 0.

        Args:
            gather: concatenates a ``(k, 3)`` tensor over all ranks to ``(W * k, 3)``; None for one process. All
                ranks must have added equal names.
        """
        names = list(self._values)
        if not names:
            return {}
        table = torch.stack([_summary(*self._values[name]) for name in names])
        table = gather(table).view(-1, len(names), 3) if gather is not None else table.unsqueeze(0)
        result = {}
        for index, name in enumerate(names):
            rows = table[:, index]
            result[name] = _join(self._values[name][0], rows)
        self._values.clear()
        return result


def _summary(reduce: Reduce, values: list[Tensor | float], weights: list[Tensor | float]) -> Tensor:
    """Reduce the values of one rank to ``(value, weight, count)`` in fp64, on the CPU."""
    v, w = _numbers(values), _numbers(weights)
    known = ~v.isnan()
    count = float(known.sum())
    v, w = v[known], w[known]
    if count == 0:
        return torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    if reduce == "mean":
        value = (v * w).sum()
    elif reduce == "sum":
        value = v.sum()
    elif reduce == "last":
        value = v[-1]
    else:
        value = v.min() if reduce == "min" else v.max()
    return torch.stack([value, w.sum(), torch.tensor(count, dtype=torch.float64)])


def _numbers(values: list[Tensor | float]) -> Tensor:
    """Copy all values to one fp64 CPU tensor, with one transfer per device."""
    result = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)
    places: dict[torch.device, list[int]] = {}
    for i, v in enumerate(values):
        if isinstance(v, Tensor):
            places.setdefault(v.device, []).append(i)
    for where in places.values():
        tensors = [v for v in (values[i] for i in where) if isinstance(v, Tensor)]
        result[torch.tensor(where)] = torch.stack([v.double().reshape(()) for v in tensors]).cpu()
    return result


def _join(reduce: Reduce, rows: Tensor) -> float:
    """Reduce the ``(W, 3)`` summaries of all ranks to one number."""
    rows = rows[rows[:, 2] > 0]
    if len(rows) == 0:
        return math.nan
    if reduce == "mean":
        weight = float(rows[:, 1].sum())
        return float(rows[:, 0].sum()) / weight if weight else 0.0
    if reduce == "sum":
        return float(rows[:, 0].sum())
    if reduce == "last":
        return float(rows[0, 0])
    return float(rows[:, 0].min() if reduce == "min" else rows[:, 0].max())

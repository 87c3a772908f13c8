"""Count the calls computed by this package, and the fallbacks to TRL's own code by reason."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Status:
    """Result of `status()`; counts start at a `patch()` call that finds TRL unpatched.

    Attributes:
        patched: whether TRL's log-probability class is replaced.
        fuse_loss: whether the loss of TRL's GRPO trainer is replaced too.
        served: log-probability calls by our kernels, ``{"with gradient": n, "without gradient": n}``.
        handed_back: log-probability calls by TRL's own class, by reason.
        losses_served: whole losses by our kernels.
        losses_handed_back: losses by TRL's own code, by reason; their log-probability calls count in ``served`` or
            ``handed_back``.
    """

    patched: bool
    fuse_loss: bool
    served: dict[str, int]
    handed_back: dict[str, int]
    losses_served: int
    losses_handed_back: dict[str, int]

    def __str__(self) -> str:
        where = "patched, whole loss" if self.fuse_loss else "patched" if self.patched else "not patched"
        parts = [f"grpo_ext.integrations.trl: {where}"]
        for title, counts in (
            ("served", self.served),
            ("handed back to TRL", self.handed_back),
            ("losses served", {"": self.losses_served} if self.losses_served else {}),
            ("losses handed back to TRL", self.losses_handed_back),
        ):
            listed = ", ".join(f"{n} {name}".strip() for name, n in counts.items())
            if listed:
                parts.append(f"{title}: {listed}")
        return "; ".join(parts)


class Counts:
    """Running counts, from which `status()` builds a `Status`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.served: Counter[str] = Counter()
        self.handed_back: Counter[str] = Counter()
        self.losses_served = 0
        self.losses_handed_back: Counter[str] = Counter()


counts = Counts()

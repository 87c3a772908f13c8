"""Who served which call: this package, or TRL's own code and why."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Status:
    """What `status()` returns; counts since the last `patch()` that found nothing patched.

    Attributes:
        patched: whether TRL's symbol is ours now.
        fuse_loss: whether the loss of TRL's GRPO trainer is ours too.
        served: calls to the vocabulary that ran here, ``{"with gradient": n, "without gradient": n}``.
        handed_back: calls that TRL's own class ran, by reason.
        losses_served: whole losses that ran here.
        losses_handed_back: losses that TRL's own code ran, by reason. Its calls to the vocabulary are counted above.
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
    """The running counts behind `Status`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.served: Counter[str] = Counter()
        self.handed_back: Counter[str] = Counter()
        self.losses_served = 0
        self.losses_handed_back: Counter[str] = Counter()


counts = Counts()

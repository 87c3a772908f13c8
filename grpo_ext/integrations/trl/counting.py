"""Count what this package computed in TRL's trainers, and the fallbacks to TRL's own code by reason."""

from __future__ import annotations

import dataclasses
from collections import Counter

#: Parts of a training step besides head and loss, with what is counted.
PARTS = {
    "trim": "passes without padding",
    "one_forward": "generation batches without a second forward",
    "skip_zero_gradient_sequences": "sequences without backward",
    "layers": "runs with faster layers",
    "checkpointing": "runs with cheaper checkpointing",
    "weights": "hand-overs of weights to vLLM",
    "length_sorted_batches": "sorted generation batches",
    "fill_micro_batches": "filled generation batches",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Counts of one part of a step.

    Attributes:
        served: times that this package ran it; the unit is in `PARTS`.
        handed_back: times that TRL's own code ran instead, by reason.
        note: of ``layers``, what the layers of the latest run computed.
    """

    served: int
    handed_back: dict[str, int]
    note: str = ""


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
        parts: the other parts of a step, by the name of their switch in `patch`; a part that is switched off is absent.
    """

    patched: bool
    fuse_loss: bool
    served: dict[str, int]
    handed_back: dict[str, int]
    losses_served: int
    losses_handed_back: dict[str, int]
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        where = "patched, whole loss" if self.fuse_loss else "patched" if self.patched else "not patched"
        lines = [f"grpo_ext.integrations.trl: {where}"]
        for title, counts in (
            ("served", self.served),
            ("handed back to TRL", self.handed_back),
            ("losses served", {"": self.losses_served} if self.losses_served else {}),
            ("losses handed back to TRL", self.losses_handed_back),
        ):
            if counts:
                lines.append(f"{title}: {_listed(counts)}")
        for name, part in self.parts.items():
            back = f"; handed back to TRL: {_listed(part.handed_back)}" if part.handed_back else ""
            note = f" ({part.note})" if part.note else ""
            lines.append(f"{name}: {part.served} {PARTS[name]}{note}{back}")
        return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}".strip() for name, n in counts.items())


class Counts:
    """Running counts, from which `status()` builds a `Status`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.served: Counter[str] = Counter()
        self.handed_back: Counter[str] = Counter()
        self.losses_served = 0
        self.losses_handed_back: Counter[str] = Counter()
        self.part_served: Counter[str] = Counter()
        self.part_handed_back: dict[str, Counter[str]] = {name: Counter() for name in PARTS}
        self.notes: dict[str, str] = {}

    def part(self, name: str, reason: str | None, count: int = 1) -> bool:
        """Count one use of a part: served if ``reason`` is None, else handed back; return whether it is served."""
        if reason is None:
            self.part_served[name] += count
        else:
            self.part_handed_back[name][reason] += count
        return reason is None

    def parts(self, names: list[str]) -> dict[str, Part]:
        """Return the counts of some parts."""
        return {
            name: Part(self.part_served[name], dict(self.part_handed_back[name]), self.notes.get(name, ""))
            for name in names
        }


counts = Counts()

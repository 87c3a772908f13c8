"""Count what our code computed in Unsloth's trainer, and what it left to Unsloth and why."""

from __future__ import annotations

from collections import Counter

counts: Counter[str] = Counter()

"""The `grpo-ext` command."""

from __future__ import annotations

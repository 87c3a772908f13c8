"""The subcommands of `grpo-ext`."""

from __future__ import annotations

"""Generation with vLLM: in the trainer's process (`colocate`) or behind HTTP (`server`).

vLLM is imported only when an engine starts in this process.
"""

from __future__ import annotations

from grpo_ext.generation.errors import EngineError, WeightMismatchError
from grpo_ext.generation.vllm.engine import VllmEngine

__all__ = ["EngineError", "VllmEngine", "WeightMismatchError"]

"""Generation with vLLM: in the trainer's process (`colocate`) or behind HTTP (`server`).

`build_engine` makes the engine that a `GRPOConfig` asks for. vLLM itself is imported when an engine is started in this
process, and never for a server.
"""

from __future__ import annotations

from grpo_ext.generation.errors import EngineError, WeightMismatchError
from grpo_ext.generation.vllm.build import build_engine
from grpo_ext.generation.vllm.engine import VllmEngine

__all__ = ["EngineError", "VllmEngine", "WeightMismatchError", "build_engine"]

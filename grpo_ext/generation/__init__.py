"""Generation engines: transformers, and vLLM in `grpo_ext.generation.vllm`."""

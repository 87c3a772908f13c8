"""Build the vLLM engine of a `GRPOConfig`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from grpo_ext.generation.vllm.check import LENGTH, WeightCheck, ordinary_ids
from grpo_ext.generation.vllm.colocate import ColocatedClient, EngineSettings, cached_folder, scratch_folder
from grpo_ext.generation.vllm.engine import VllmEngine
from grpo_ext.generation.vllm.parallel import Ranks
from grpo_ext.generation.vllm.sampling import sampling_fields, warn_of_bias
from grpo_ext.generation.vllm.server import ServerClient
from grpo_ext.generation.vllm.weights import base_of, base_weights, check_adapter, write_config, write_weights
from grpo_ext.modules.inspection import context_length, is_peft_model
from grpo_ext.trainer.config import GRPOConfig


def build_engine(
    args: GRPOConfig,
    model: nn.Module,
    tokenizer: Any,
    accelerator: Any,
    end_ids: Sequence[int],
    step: Callable[[], int],
) -> VllmEngine:
    """Start vLLM in this process, or connect to the server.

    Args:
        args: the run's parameters.
        model: the policy, unwrapped, on its device.
        tokenizer: the trainer's tokenizer.
        accelerator: the trainer's `accelerate.Accelerator`.
        end_ids: token ids that end a completion.
        step: returns the trainer's global step.

    Raises:
        ImportError: vLLM is missing.
        ValueError: a parameter is incompatible with the model, the adapter or the device.
        EngineError: vLLM does not start, or the server does not answer.
    """
    sampling = args.sampling()
    sampling_fields(sampling, end_ids)
    if args.vllm_importance_sampling_correction:
        warn_of_bias(sampling)
    update = adapter_update(args, model)
    lora_rank = check_adapter(model) if update == "adapter" else 0
    dtype = engine_dtype(args, model, accelerator)
    ranks = Ranks(accelerator, args.vllm_tensor_parallel_size, args.seed)
    sleep_level = args.vllm_sleep_level if args.vllm_enable_sleep_mode else 0
    client: ColocatedClient | ServerClient
    if args.vllm_mode == "server":
        run = ranks.shared(uuid.uuid4().hex[:8])
        folder = Path(args.vllm_sync_dir or Path(str(args.output_dir)) / "vllm") / run
        client = ServerClient(
            args.vllm_server_address,
            folder,
            args.vllm_server_timeout,
            args.vllm_request_timeout,
            run=run,
            pushes=accelerator.is_main_process,
            allow_remote=args.vllm_server_allow_remote,
        )
        writes = bool(accelerator.is_main_process)
    else:
        if sleep_level and args.device.type == "cpu":
            raise ValueError("vllm_enable_sleep_mode=True needs a GPU: set it to False, vLLM on the CPU cannot sleep")
        settings = EngineSettings(
            dtype=dtype,
            max_model_len=longest_sequence(args, model),
            max_num_seqs=args.per_device_train_batch_size
            * args.batch_plan.steps_per_generation
            * args.vllm_tensor_parallel_size,
            seed=args.seed + accelerator.process_index // args.vllm_tensor_parallel_size,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            sleep=sleep_level > 0,
            enforce_eager=args.device.type == "cpu" if args.vllm_enforce_eager is None else args.vllm_enforce_eager,
            lora_rank=lora_rank,
            external_launcher=ranks.count > 1,
            extra=dict(args.vllm_engine_kwargs or {}),  # type: ignore[arg-type]
        )
        folder = scratch_folder()
        write_config(model, folder)
        if lora_rank:
            write_weights(base_weights(model), folder)
        client = ranks.jointly(
            lambda: ColocatedClient(folder if lora_rank else cached_folder(folder), settings, args.device, folder)
        )
        writes = True
    check = WeightCheck(ordinary_ids(model, tokenizer), client.max_model_len, dtype, args.vllm_weight_check_bound)
    return VllmEngine(client, end_ids, update, check, folder, step, ranks, sleep_level, writes)


def adapter_update(args: GRPOConfig, model: nn.Module) -> Literal["weights", "adapter"]:
    """Return what vLLM loads after an update: all weights, or only the adapter.

    Raises:
        ValueError: ``vllm_lora_mode="adapter"`` and the model has no adapter or vLLM's sleep drops the base weights;
            or the adapter has biases.
    """
    if not is_peft_model(model):
        if args.vllm_lora_mode == "adapter":
            raise ValueError("vllm_lora_mode='adapter' needs an adapter: pass peft_config, or set vllm_lora_mode=None")
        return "weights"
    configs: dict[str, Any] = getattr(model, "peft_config")  # noqa: B009
    if any(getattr(config, "lora_bias", False) for config in configs.values()):
        raise ValueError(
            "the adapter has lora_bias=True, which does not reach vLLM: set lora_bias=False or use_vllm=False"
        )
    mode = args.vllm_lora_mode or ("adapter" if args.vllm_mode == "server" else "merged")
    if mode == "adapter" and args.vllm_enable_sleep_mode and args.vllm_sleep_level == 2:
        raise ValueError(
            "vllm_sleep_level=2 makes vLLM drop the base weights, and a hot-loaded adapter does not bring them back: "
            "set vllm_sleep_level=1 or vllm_lora_mode='merged'"
        )
    return "adapter" if mode == "adapter" else "weights"


def engine_dtype(args: GRPOConfig, model: nn.Module, accelerator: Any) -> torch.dtype:
    """Return the dtype of the engine's weights: that of mixed precision if it is on, else the model's."""
    chosen = dict(args.vllm_engine_kwargs or {}).get("dtype")  # type: ignore[arg-type]
    if isinstance(chosen, str) and chosen != "auto":
        return getattr(torch, {"half": "float16", "float": "float32"}.get(chosen, chosen))
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return mixed or base_of(model).get_input_embeddings().weight.dtype


def longest_sequence(args: GRPOConfig, model: nn.Module) -> int:
    """Return the longest sequence, prompt plus completion, that the engine must support, in tokens.

    Raises:
        ValueError: neither the arguments nor the model's config limit the length, or the length exceeds the model's
            context.
    """
    context = context_length(model)
    asked = args.vllm_max_model_length
    if asked is None and args.max_prompt_length is not None:
        asked = max(args.max_prompt_length + args.max_completion_length, LENGTH + 1)
        asked = asked if context is None else min(asked, context)
    asked = context if asked is None else asked
    if asked is None:
        raise ValueError("the model's config has no max_position_embeddings: set vllm_max_model_length")
    if context is not None and asked > context:
        raise ValueError(f"vllm_max_model_length={asked} exceeds the model's context of {context}: lower it")
    if args.max_completion_length >= asked:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the {asked} tokens of "
            "vLLM: raise vllm_max_model_length or lower max_completion_length"
        )
    return asked

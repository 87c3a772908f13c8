"""The trainer's weights under their checkpoint names: the model, with an adapter merged, or only the adapter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ext.modules.inspection import is_peft_model
from grpo_ext.modules.sharding import full_tensor, gathered_parameters

#: Pairs of name and module.
Modules = Sequence[tuple[str, nn.Module]]

#: Elements of the sum of weight and adapter that are held unrounded at a time; they fit into the processor's cache.
MERGED_AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]


def trainable_version(model: nn.Module) -> int:
    """A number that changes with every in-place write to a parameter, such as an optimizer step."""
    return sum(parameter._version for parameter in model.parameters())


def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the policy under its checkpoint name, detached, with the active adapter merged.

    Merging uses copies, because merging and unmerging in bf16 would change the model's bits. Sharded weights (FSDP2,
    ZeRO-3) are gathered one at a time; all ranks must iterate to the end.

    Raises:
        ValueError: weights cannot be merged or gathered; the message contains the remedy.
    """
    base = base_of(model)
    if _converted(base):
        # A checkpoint splits fused tensors such as experts: the conversion needs all weights at once.
        from transformers.core_model_loading import revert_weight_conversion

        yield from revert_weight_conversion(base, dict(_named_weights(model))).items()
    else:
        yield from _named_weights(model)


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as `checkpoint_weights` does, but without the adapter."""
    if not is_peft_model(model):
        yield from checkpoint_weights(model)
        return
    with model.disable_adapter():  # type: ignore[operator]
        yield from checkpoint_weights(model)


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the policy once, detached, under its name in memory, with the active adapter merged.

    Differs from `checkpoint_weights` in names: tied weights have one, buffers none, and no conversion is reverted.
    """
    yield from _named_weights(model, once=True)


def _converted(base: Any) -> bool:
    """Whether names or shapes in the checkpoint differ from those in memory."""
    conversions = getattr(base, "_weight_conversions", None)
    if conversions is None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:
            return False
        conversions = get_model_conversion_mapping(base, add_legacy=False)
    return bool(conversions)


def _named_weights(model: nn.Module, once: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, detached; ``once`` leaves out buffers and the second names of tied weights."""
    base = base_of(model)
    # Yield tied weights under both names: vLLM on the CPU repacks a separate output head from the second.
    modules = walk(base, once)
    adapted = is_peft_model(model)
    tuned = _tuner_layers(model, modules) if adapted else {}
    parts_of = {(name, part) for name, layer in tuned.items() for part in layer.adapter_layer_names}
    adapters = tuple(f"{name}.{part}." for name, part in parts_of if not part.startswith("lora_"))
    unused = (*adapters, *_unused_copies(modules)) if adapted else ()
    for name, tensor in _tensors(base, modules, once):
        if ".lora_" in name or name.startswith(unused):
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in tuned and leaf == "weight":
            yield f"{owner}.weight", _merged(tuned[owner])
            continue
        parts = name.replace(".base_layer.", ".").replace(".original_module.", ".").split(".")
        if "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            del parts[at : at + 2]  # and the adapter's name
        if not tensor.is_floating_point():
            _refuse_quantised(name, tensor)
        yield ".".join(parts), full_tensor(tensor)


def walk(model: nn.Module, once: bool = True) -> list[tuple[str, nn.Module]]:
    """Names and modules as `torch.nn.Module.named_modules` yields them, but not recursively: a tenth of the time.

    Args:
        once: leave out the second names of modules that are shared.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if once and module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        prefix = f"{name}." if name else ""
        stack += [(prefix + part, child) for part, child in reversed(module._modules.items()) if child is not None]
    return found


def _tensors(base: nn.Module, modules: Modules, once: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters as `torch.nn.Module.named_parameters` yields them, then the buffers of a checkpoint."""
    seen: set[Tensor] = set()
    for name, module in modules:
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not (once and parameter in seen):
                seen.add(parameter)
                yield f"{name}.{leaf}" if name else leaf, parameter
    if not once:
        persistent = set(base.state_dict())
        yield from ((name, buffer) for name, buffer in base.named_buffers() if name in persistent)


def _refuse_quantised(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        raise ValueError(
            f"{name} is {tensor.dtype}: quantised weights cannot be loaded into vLLM; train in bfloat16, float16 or "
            "float32, or set use_vllm=False"
        )


def _tuner_layers(model: nn.Module, modules: Modules) -> dict[str, Any]:
    """Layers with an adapter, by their name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    if not found and _prompt_learning(model):
        raise ValueError("this PEFT method changes the prompt, not the weights: use LoRA or another mergeable method")
    return found


def _unused_copies(modules: Modules) -> tuple[str, ...]:
    """Prefixes of the modules that the forward leaves out, of a module and its trained copies (``modules_to_save``)."""
    from peft.utils.other import ModulesToSaveWrapper

    prefixes = []
    for name, module in modules:
        if isinstance(module, ModulesToSaveWrapper):
            active = [] if module.disable_adapters else module.active_adapters
            copies = {adapter: f"{name}.modules_to_save.{adapter}." for adapter in module.modules_to_save}
            original = f"{name}.original_module."
            used = next((copies[adapter] for adapter in active if adapter in copies), original)
            prefixes += [prefix for prefix in (original, *copies.values()) if prefix != used]
    return tuple(prefixes)


def _prompt_learning(model: Any) -> bool:
    return any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values())


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """The weight of a layer with its active adapters merged, rounded once."""
    if layer.merged_adapters:
        raise ValueError(
            f"adapters {layer.merged_adapters} are merged into the base weights: call model.unmerge_adapter() first"
        )
    if layer.disable_adapters or not layer.active_adapters:
        return full_tensor(layer.get_base_layer().weight)
    if _is_plain(layer):
        weight = full_tensor(layer.base_layer.weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        terms = [
            (*(full_tensor(part[name].weight).to(dtype) for part in (layer.lora_B, layer.lora_A)), layer.scaling[name])
            for name in layer.active_adapters
            if name in layer.lora_A
        ]
        return _sum(weight, terms, dtype)
    with gathered_parameters(layer):
        weight = layer.get_base_layer().weight
        before = weight.detach().clone()
        layer.merge()
        merged = weight.detach().clone()
        layer.unmerge()
        weight.copy_(before)
        return full_tensor(merged)


def _sum(weight: Tensor, terms: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Tensor:
    """``weight + Σ s B A`` over terms ``(B, A, s)`` of type ``dtype``, summed in that type and rounded once."""
    if weight.dtype == dtype:
        merged = weight.clone()
        for b, a, scale in terms:
            merged.addmm_(b, a, alpha=scale)
        return merged
    merged = torch.empty_like(weight)
    rows = max(1, MERGED_AT_ONCE.get(weight.device.type, 2**23) // weight.shape[1])
    sums = torch.empty(min(rows, len(weight)), weight.shape[1], dtype=dtype, device=weight.device)
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        part = sums[: len(weight[some])].copy_(weight[some])
        for b, a, scale in terms:
            part.addmm_(b[some], a, alpha=scale)
        merged[some].copy_(part)
    return merged


def _is_plain(layer: Any) -> bool:
    """Whether the layer computes exactly ``W + s B A``."""
    from peft.tuners.lora import Linear

    return (
        type(layer) is Linear
        and not layer.fan_in_fan_out
        and not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in layer.active_adapters)
        and type(layer.base_layer) is nn.Linear
    )


def write_config(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write config.json with the architecture's name, and the tokenizer if given, for vLLM."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base_of(model)
    config = base.config
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["architectures"] = [type(base).__name__]
    path.write_text(json.dumps(values, indent=2))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path, write: bool = True) -> None:
    """Write ``model.safetensors``. Without ``write``, only iterate: the iterator may contain collectives."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, tensor in weights:
        if write:
            tensors[name] = tensor.to("cpu", copy=True).contiguous()
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_adapter(model: Any, folder: Path, write: bool = True) -> None:
    """Write the active LoRA adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = model.active_adapter
    values = {key: full_tensor(p) for key, p in model.named_parameters() if ".lora_" in key}
    state = get_peft_model_state_dict(model, state_dict=values, adapter_name=name, save_embedding_layers=False)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.to("cpu", copy=True).contiguous() for k, v in state.items()}, str(folder / "adapter_model.safetensors")
    )
    config = model.peft_config[name]
    inference_mode = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference_mode


def check_adapter(model: Any) -> int:
    """Check that vLLM can hot-load the adapter, and return its largest rank.

    Raises:
        ValueError: vLLM does not support the adapter.
    """
    config = model.peft_config[model.active_adapter]
    reason = None
    if str(getattr(config, "peft_type", "")).split(".")[-1] != "LORA":
        reason = f"is {config.peft_type}"
    elif getattr(config, "use_dora", False):
        reason = "uses DoRA"
    elif config.modules_to_save:
        reason = f"trains whole modules (modules_to_save={config.modules_to_save})"
    elif config.bias != "none":
        reason = f"trains biases (bias={config.bias!r})"
    elif getattr(config, "target_parameters", None):
        reason = "has target_parameters"
    if reason is not None:
        raise ValueError(f"the adapter {reason}, which vLLM does not load: set vllm_lora_mode='merged'")
    return max([config.r, *(config.rank_pattern or {}).values()])


@contextlib.contextmanager
def exhausted(weights: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Read the iterator to its end even on errors, because the other ranks wait in its collectives."""
    try:
        yield weights
    finally:
        for _ in weights:
            pass

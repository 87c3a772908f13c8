"""Weights on their way to TRL's colocated vLLM, with an engine that records what it gets, and with vLLM on the CPU."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from trl_runs import tiny_model, trl

import grpo_ext.integrations.trl as ours
from grpo_ext.generation.vllm import weights as weights_module
from grpo_ext.integrations.trl import handover

VLLMGeneration = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm` installs its CPU build"
)
BF16 = torch.bfloat16
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    ours.patch()
    yield
    ours.unpatch()


class Recorder(nn.Module):
    """An engine that keeps what each call of its loader brings."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.held: dict[str, Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.calls.append([])
        for name, tensor in weights:
            self.calls[-1].append(name)
            self.held[name] = tensor.clone()


class Generation(VLLMGeneration):  # type: ignore[misc, valid-type]
    """TRL's class around an engine that is not vLLM."""

    def __init__(self, model: nn.Module, engine: Any = None, sleep: bool = False, mode: str = "colocate") -> None:
        self.model, self.mode, self.enable_sleep_mode, self._llm_weights_sleeping = model, mode, sleep, sleep
        self.accelerator = SimpleNamespace(is_main_process=False, device=torch.device("cpu"))
        self._dist = SimpleNamespace(
            is_fsdp=False, is_zero3=False, fsdp_version=None, gather_params=lambda _: contextlib.nullcontext()
        )
        self._weight_metadata = None
        self.processing_class = None
        self.engine = Recorder() if engine is None else engine
        self.events: list[str] = []
        runner = SimpleNamespace(model=self.engine)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm = SimpleNamespace(
            llm_engine=SimpleNamespace(model_executor=executor),
            wake_up=lambda tags: self.events.append(f"wake {tags}"),
            reset_prefix_cache=lambda: self.events.append(f"reset after {len(self.engine.calls)}"),
        )


def with_lora(model: nn.Module, seed: int = 5, **changes: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(**(LORA | changes)))
    fill(adapted, seed)
    return adapted


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """New adapters, as large as a few hundredths of the weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def own_method(generation: Any) -> None:
    """TRL's own hand-over."""
    ours.patch(weights=False)
    try:
        generation.sync_weights()
    finally:
        ours.patch(weights=True)


def model_of(dtype: torch.dtype = BF16, **changes: Any) -> Any:
    return tiny_model(dtype=dtype, num_hidden_layers=2, **changes)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("method", ["ours", "trl"])
def test_hundred_hand_overs_leave_every_bit_of_the_base_weights(method: str) -> None:
    """With adapters that change from one to the next. TRL's method drifts, or this test could not fail."""
    model = with_lora(model_of(initializer_range=0.02))
    generation, before = Generation(model), base_tensors(model)
    if method == "trl":
        ours.patch(weights=False)
    for cycle in range(100):
        fill(model, cycle)
        generation.sync_weights()
    drift = [
        float((p.detach().float() - before[n].float()).abs().mean() / before[n].float().abs().mean())
        for n, p in model.named_parameters()
        if n.endswith(".base_layer.weight")
    ]
    assert len(drift) == 14
    if method == "trl":
        assert min(drift) > 0.01
    else:
        assert all(torch.equal(tensor, before[n]) for n, tensor in base_tensors(model).items())
        assert ours.status().parts["weights"].served == 100


def tied() -> Any:
    return model_of(tie_word_embeddings=True)


def wrapped() -> Any:
    """Layers in the wrapper of activation checkpointing."""
    model = model_of()
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "plain": model_of,
    "plain fp32": lambda: model_of(torch.float32),
    "tied": tied,
    "wrapped": wrapped,
    "lora": lambda: with_lora(model_of()),
    "lora fp32": lambda: with_lora(model_of(torch.float32)),
    "lora, tied": lambda: with_lora(tied()),
    "lora, wrapped": lambda: with_lora(wrapped()),
    "lora with bias": lambda: with_lora(model_of(attention_bias=True), bias="all"),
    "modules_to_save": lambda: with_lora(model_of(), modules_to_save=["lm_head"]),
    "modules_to_save, tied": lambda: with_lora(tied(), modules_to_save=["embed_tokens"]),
    "dora": lambda: with_lora(model_of(), use_dora=True),
    "embedding": lambda: with_lora(model_of(), target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_gets_what_trl_sends(name: str) -> None:
    """Names, shapes and dtypes equal TRL's; weights without adapter are bit-equal, merged ones within two roundings."""
    model = MODELS[name]()
    before = base_tensors(model)
    generation, stock = Generation(model), Generation(copy.deepcopy(model))
    generation.sync_weights()
    own_method(stock)
    got, theirs = generation.engine.held, stock.engine.held
    assert list(got) == list(theirs)
    assert generation.engine.calls == [list(got)]
    assert len(stock.engine.calls) == len(theirs)
    adapted = adapted_names(model)
    assert adapted <= got.keys()
    for key, tensor in got.items():
        assert tensor.dtype == theirs[key].dtype
        if key in adapted:
            scale = float(theirs[key].abs().max())
            bound = 2 * torch.finfo(tensor.dtype).eps * scale
            torch.testing.assert_close(tensor, theirs[key], atol=bound, rtol=0)
        else:
            assert torch.equal(tensor, theirs[key])
    assert all(torch.equal(tensor, before[n]) for n, tensor in base_tensors(model).items())


def adapted_names(model: Any) -> set[str]:
    names = {n.removeprefix("base_model.model.") for n, _ in model.named_parameters()} - {""}
    layers = {n.split(".base_layer.")[0] for n in names if n.endswith(".base_layer.weight")}
    return {f"{layer}.weight".replace("_checkpoint_wrapped_module.", "") for layer in layers}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("rows", [3, 10**6])
def test_merged_weights_are_sums_in_fp32_rounded_once(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp64: half a unit in the last place, and what fp32 adds."""
    monkeypatch.setattr(weights_module, "MERGED_AT_ONCE", {"cpu": 16 * rows})
    model = with_lora(model_of(dtype))
    generation = Generation(model)
    generation.sync_weights()
    checked = 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        sent = generation.engine.held[f"{name}.weight"].double()
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        exact = layer.base_layer.weight.double() + 1.5 * (b @ a)
        unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
        assert bool(((sent - exact).abs() <= 0.5 * unit + 1e-6).all())
        assert not torch.equal(sent, layer.base_layer.weight.double())
        checked += 1
    assert checked == 14


def test_batches_hold_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "BATCH", 4096)
    model = with_lora(model_of())
    generation = Generation(model)
    generation.sync_weights()
    held = generation.engine.held
    sizes = [[held[n].numel() * 2 for n in call] for call in generation.engine.calls]
    assert 3 < len(sizes) < len(held)
    assert all(sum(size[:-1]) < 4096 for size in sizes)
    assert all(sum(size) >= 4096 for size in sizes[:-1])


class Holding(nn.Module):
    """An engine with parameters of its own under the names of the checkpoint, as vLLM has on a GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        whole = copy.deepcopy(model)
        self.model, self.lm_head = whole.model, whole.lm_head
        self.calls: list[int] = []

    @torch.no_grad()
    def load_weights(self, weights: Any) -> None:
        pairs = list(weights)
        self.calls.append(len(pairs))
        for name, tensor in pairs:
            self.get_parameter(name).copy_(tensor)


@pytest.mark.parametrize("sleep", [False, True])
def test_later_hand_overs_are_plain_copies(sleep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies equal the loader's values. With sleep mode the loader runs each time, as vLLM drops what it fills in."""
    monkeypatch.setattr(trl.generation.vllm_generation, "empty_cache", lambda: None)
    base = model_of()
    engine = Holding(base)
    model = with_lora(base)
    generation = Generation(model, engine, sleep)
    for cycle in range(3):
        fill(model, cycle)
        generation.sync_weights()
        reference = Generation(model)
        reference.sync_weights()
        held = dict(engine.named_parameters())
        assert all(torch.equal(held[name], tensor) for name, tensor in reference.engine.held.items())
    assert engine.calls == [len(held)] * (3 if sleep else 1)


def test_vllm_is_woken_before_and_its_cache_emptied_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.generation.vllm_generation, "empty_cache", lambda: None)
    generation = Generation(with_lora(model_of()), sleep=True)
    generation.sync_weights()
    assert generation.events == ["wake ['weights']", "reset after 1"]
    assert not generation._llm_weights_sleeping
    assert "_iter_named_params" not in generation.__dict__


def test_an_error_of_the_engine_leaves_trls_method(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = Generation(with_lora(model_of()))
    monkeypatch.setattr(generation.engine, "load_weights", lambda _: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        generation.sync_weights()
    assert "_iter_named_params" not in generation.__dict__
    assert ours.status().parts["weights"].served == 0


def merged_already() -> Any:
    model = with_lora(model_of(torch.float32))
    model.merge_adapter()
    return model


def quantised() -> Any:
    model = model_of()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    return model


def offloaded() -> Any:
    model = model_of()
    model.lm_head.to("meta")
    return model


ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["up_proj"], feedforward_modules=["up_proj"])
HANDED_BACK: dict[str, tuple[Callable[[], Any], str]] = {
    "quantised": (quantised, "quantised weights, uint8"),
    "offloaded": (offloaded, "offloaded weights"),
    "ia3": (lambda: get_peft_model(model_of(), ia3), "adapters of ia3.layer.Linear"),
    "merged": (merged_already, "adapters that are merged already"),
    "lora_bias": (
        lambda: with_lora(model_of(attention_bias=True), target_modules=["q_proj"], lora_bias=True),
        "lora_bias",
    ),
    "tied": (lambda: with_lora(tied(), target_modules=["embed_tokens"]), "an adapter on tied weights"),
    "prompt": (
        lambda: get_peft_model(model_of(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "a PEFT method that changes the prompt",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HANDED_BACK)
def test_what_is_not_exact_is_handed_back(name: str) -> None:
    build, reason = HANDED_BACK[name]
    generation = Generation(build())
    called: list[Any] = []
    handover.sync_weights(generation, called.append)
    assert called == [generation]
    assert ours.status().parts["weights"].handed_back == {reason: 1}
    assert ours.status().parts["weights"].served == 0
    assert not generation.engine.calls


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "server"}, "vllm_mode='server': TRL packs the parameters"),
        ({"_dist": SimpleNamespace(is_fsdp=True, is_zero3=False)}, "FSDP"),
        ({"_dist": SimpleNamespace(is_fsdp=False, is_zero3=True)}, "DeepSpeed ZeRO-3"),
    ],
)
def test_servers_and_shards_are_handed_back(change: dict[str, Any], reason: str) -> None:
    generation = Generation(with_lora(model_of()))
    generation.__dict__.update(change)
    called: list[Any] = []
    handover.sync_weights(generation, called.append)
    assert called == [generation]
    assert ours.status().parts["weights"].handed_back == {reason: 1}
    assert reason in str(ours.status())


def test_a_switch_of_its_own() -> None:
    ours.patch(weights=False)
    generation = Generation(with_lora(model_of()))
    generation.sync_weights()
    assert len(generation.engine.calls) == len(generation.engine.held) > 1
    assert "weights" not in ours.status().parts
    ours.patch()
    generation.sync_weights()
    assert len(generation.engine.calls) == len(generation.engine.held) + 1
    assert ours.status().parts["weights"].served == 1


def test_trl_has_its_methods_back() -> None:
    owners = [(VLLMGeneration, "sync_weights"), (VLLMGeneration, "generate")]
    owners += [(trainer, "log") for trainer in (trl.GRPOTrainer, trl.RLOOTrainer)]
    replaced = [getattr(*owner) for owner in owners]
    ours.unpatch()
    assert not {getattr(*owner) for owner in owners} & set(replaced)
    assert all(getattr(*owner).__module__.startswith("trl.") for owner in owners)
    assert not any(hasattr(getattr(*owner), "__wrapped__") for owner in owners)


def test_only_the_active_copy_of_a_saved_module_is_sent() -> None:
    """Two adapters, each with a trained copy of the head; without adapters, the head itself."""
    model = with_lora(model_of(), modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(**LORA, modules_to_save=["lm_head"]))
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.fill_(1.0)
        head.modules_to_save["other"].weight.fill_(2.0)
    for adapter, value in (("default", 1.0), ("other", 2.0)):
        model.set_adapter(adapter)
        pairs = list(weights_module.policy_weights(model))
        heads = [tensor for name, tensor in pairs if name.startswith("lm_head")]
        assert len(heads) == 1
        assert bool((heads[0] == value).all())
        assert len(dict(pairs)) == len(pairs)
    without = dict(weights_module.base_weights(model))
    assert torch.equal(without["lm_head.weight"], head.original_module.weight)


def test_the_trainer_logs_the_check_once() -> None:
    generation = Generation(model_of())
    handover.handover_of(generation).figures = [0.25, 0.75]
    logged: list[Any] = []
    trainer = SimpleNamespace(
        vllm_generation=generation, model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    log = handover._logging(lambda self, logs: logged.append(dict(self._metrics["train"])))
    log(trainer, {})
    assert logged == [{"vllm/weight_check": [0.25, 0.75]}]
    trainer._metrics["train"].clear()
    log(trainer, {})
    assert logged[1] == {}


@needs_vllm
def test_a_run_with_vllm_on_the_cpu(tmp_path: Path) -> None:
    """LoRA, in a process of its own, because TRL's engine sets up torch.distributed and the environment.

    vLLM runs fp32 weights in bf16, so the check does not fall to zero; weights that vLLM lacks raise it.
    """
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "vllm_engine")]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(here / "trl_vllm_run.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["served"] == 3
    assert result["handed_back"] == {}
    assert result["bits_equal"]
    assert result["frozen"] == 26
    assert max(result["checks"]) < 0.05
    assert max(result["differences"]) < 0.05
    assert result["stale"] > 4 * max(result["checks"])

"""Plain copies into a model laid out as vLLM lays out its own. No vLLM needed; the real one is in tests/cuda."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from grpo_ext.generation.vllm.colocate import ColocatedClient
from grpo_ext.generation.vllm.placement import Loader, Placement, Sample, sampled

ROWS = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 6, "up_proj": 6}


class Unquantized:
    """By its class's name what vLLM calls the method of an ordinary layer."""


Unquantized.__name__ = "UnquantizedLinearMethod"


class Layer(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, columns), -1.0, dtype=torch.bfloat16))
        self.quant_method: Any = Unquantized()


class VocabParallelEmbedding(Layer):
    """Named as vLLM's."""


class Engine(nn.Module):
    """Embeddings of 10 rows padded to 16, the head tied to them, packed projections, a norm."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(16, 8)
        self.lm_head = VocabParallelEmbedding(16, 8)
        self.lm_head.weight = self.embed.weight
        self.attn = nn.ModuleDict({"qkv_proj": Layer(16, 8), "o_proj": Layer(8, 8)})
        self.mlp = nn.ModuleDict({"gate_up_proj": Layer(12, 8)})
        self.norm = nn.LayerNorm(8, bias=False, dtype=torch.bfloat16)

    @torch.no_grad()
    def reload(self, weights: Any) -> None:
        """What vLLM's loaders do."""
        values = dict(weights)
        self.embed.weight[:10] = values["embed.weight"]
        self.norm.weight.copy_(values["norm.weight"])
        self.attn["o_proj"].weight.copy_(values["attn.o_proj.weight"])
        for owner, packed in (("attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            parts = [values[f"{owner}.{part}.weight"] for part in self.packed_modules_mapping[packed]]
            getattr(self, owner)[packed].weight.copy_(torch.cat(parts))


def checkpoint(seed: int) -> dict[str, Tensor]:
    """fp32; the trainer names the tied head as well. The norm is all ones, as in a new model."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        f"{'attn' if part[0] in 'qkv' else 'mlp'}.{part}.weight": torch.randn(n, 8, generator=generator)
        for part, n in ROWS.items()
    }
    embed = torch.randn(10, 8, generator=generator)
    values |= {"embed.weight": embed, "attn.o_proj.weight": torch.randn(8, 8, generator=generator)}
    return values | {"norm.weight": torch.full((8,), float(seed)), "lm_head.weight": embed}


def reloaded(engine: Engine, seed: int = 1) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    engine.reload(sampled(checkpoint(seed).items(), samples))
    return samples


def test_copies_leave_what_a_reload_leaves() -> None:
    engine, expected = Engine(), Engine()
    samples = reloaded(engine)
    placement = Placement.found(engine, samples)
    assert placement is not None
    assert placement.places.keys() == samples.keys() == checkpoint(2).keys()
    placement.copy(iter(checkpoint(2).items()))
    expected.reload(checkpoint(2).items())
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
    assert not torch.equal(engine.attn["qkv_proj"].weight[:8], checkpoint(1)["attn.q_proj.weight"].bfloat16())


@pytest.mark.parametrize("batch", [1, 300])
def test_few_tensors_at_a_time(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr("grpo_ext.generation.vllm.placement.BATCH", batch)
    test_copies_leave_what_a_reload_leaves()


def spoil(engine: Engine, how: str) -> None:
    if how == "another order of rows":
        engine.packed_modules_mapping = {**Engine.packed_modules_mapping, "gate_up_proj": ["up_proj", "gate_proj"]}
    elif how == "quantised":
        engine.mlp["gate_up_proj"].quant_method = object()
    elif how == "derived":
        engine.attn.add_module("inner", type("MLAAttention", (nn.Module,), {})())
    elif how == "another name":
        engine.other, engine.norm = engine.norm, nn.Identity()
    elif how == "half of a layer":
        engine.mlp["gate_up_proj"].weight = nn.Parameter(engine.mlp["gate_up_proj"].weight[:6].detach().clone())
    elif how == "sinks":
        engine.attn.impl = type("Impl", (), {"sinks": torch.ones(2)})()
    elif how == "a parameter from elsewhere":
        engine.attn["qkv_proj"].scale = nn.Parameter(torch.ones(1))
    elif how == "padding of another layer":
        engine.attn["o_proj"].weight = nn.Parameter(torch.cat([engine.attn["o_proj"].weight.detach()] * 2))
    elif how == "one number":
        with torch.no_grad():
            engine.attn["o_proj"].weight[3, 3] += 1


@pytest.mark.parametrize(
    "how",
    [
        "another order of rows",
        "quantised",
        "derived",
        "sinks",
        "another name",
        "a parameter from elsewhere",
        "half of a layer",
        "padding of another layer",
        "one number",
    ],
)
def test_no_place_is_believed_without_the_numbers(how: str) -> None:
    engine = Engine()
    samples = reloaded(engine)
    assert Placement.found(engine, samples) is not None
    spoil(engine, how)
    assert Placement.found(engine, samples) is None


def test_tied_weights_that_differ_in_the_trainer_are_left_to_vllm() -> None:
    """As of an adapter on the embeddings alone; at its first step both are still equal."""
    engine, values = Engine(), checkpoint(1)
    values["lm_head.weight"] = values["embed.weight"].clone()
    samples: dict[str, Sample] = {}
    engine.reload(sampled(values.items(), samples))
    assert Placement.found(engine, samples) is None


def test_nothing_handed_over_has_no_place() -> None:
    assert Placement.found(Engine(), {}) is None


def test_samples_of_large_tensors_walk_through_rows_and_columns() -> None:
    tensor = torch.arange(2048 * 256).view(2048, 256)
    picked = Sample.of(tensor).elements
    assert 4000 < picked.numel() <= 4096
    assert len(set((picked // 256).tolist())) == 2048
    assert len(set((picked % 256).tolist())) == 256


def test_a_tensor_that_does_not_come_or_changes_its_shape_is_an_error() -> None:
    engine = Engine()
    placement = Placement.found(engine, reloaded(engine))
    assert placement is not None
    values = checkpoint(2)
    with pytest.raises(ValueError, match=r"norm.weight has shape \(1,\), expected \(8,\)"):
        placement.copy({**values, "norm.weight": torch.ones(1)}.items())
    del values["norm.weight"]
    with pytest.raises(ValueError, match=r"1 of 9 tensors are missing, such as norm.weight"):
        placement.copy(values.items())
    with pytest.raises(KeyError, match="extra"):
        placement.copy([("extra", torch.ones(1))])


def client_of(engine: Engine, calls: list[str], may_place: bool = True) -> ColocatedClient:
    """A client as it is on a GPU, around something that answers as vLLM does."""

    def collective_rpc(method: str, kwargs: dict[str, Any]) -> None:
        calls.append(method)
        engine.reload(kwargs["weights_iterator"])

    worker = SimpleNamespace(get_model=lambda: engine)
    inner = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    client = object.__new__(ColocatedClient)
    llm = SimpleNamespace(collective_rpc=collective_rpc, llm_engine=inner, sleep=lambda level: calls.append("sleep"))
    client.__dict__.update(llm=llm, _loader=Loader(places=may_place))
    return client


def hand_over(client: ColocatedClient, engine: Engine, seed: int) -> None:
    expected = Engine()
    expected.reload(checkpoint(seed).items())
    client.load_weights(checkpoint(seed).items())
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())


def test_the_client_reloads_once_and_copies_from_then_on() -> None:
    engine, calls = Engine(), list[str]()
    client = client_of(engine, calls)
    for seed in (1, 2, 3):
        hand_over(client, engine, seed)
    assert calls == ["reload_weights"]
    client.sleep(1)
    hand_over(client, engine, 4)
    assert calls == ["reload_weights", "sleep"]
    client.sleep(2)  # drops what vLLM has made itself
    hand_over(client, engine, 5)
    hand_over(client, engine, 6)
    assert calls == ["reload_weights", "sleep", "sleep", "reload_weights", "reload_weights"]


@pytest.mark.parametrize("may_place", [True, False])
def test_the_client_goes_on_reloading_where_there_are_no_places(may_place: bool) -> None:
    engine, calls = Engine(), list[str]()
    client = client_of(engine, calls, may_place)
    if may_place:
        spoil(engine, "quantised")
    for seed in (1, 2, 3):
        hand_over(client, engine, seed)
    assert calls == ["reload_weights"] * 3

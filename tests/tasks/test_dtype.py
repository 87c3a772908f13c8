"""The choice of ``dtype: auto`` on processors and GPUs that the tests imitate; grpo_ext/bench/dtype.py times it."""

from __future__ import annotations

import pytest
import torch

from grpo_ext.tasks import fast_dtype
from grpo_ext.tasks.models import _torch_dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype", "words"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32", "in software"),
        ({"avx2": True, "avx512_f": True, "avx512_vnni": True}, "float32", "in software"),
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16", "in hardware"),
        ({"avx512_f": True, "amx_bf16": True}, "bfloat16", "in hardware"),
        ({"neon": True, "bf16": True}, "bfloat16", "in hardware"),
        ({"neon": True, "bf16": False}, "float32", "in software"),
    ],
)
def test_processors(capabilities: dict[str, bool], dtype: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    chosen, reason = fast_dtype("cpu")
    assert chosen == dtype
    assert reason.startswith("this processor (")
    assert reason.endswith(f"multiplies bfloat16 {words}")


@pytest.mark.parametrize(("avx512", "amx", "dtype"), [(0, 0, "float32"), (1, 0, "bfloat16"), (0, 1, "bfloat16")])
def test_processors_without_the_list(avx512: int, amx: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert fast_dtype("cpu")[0] == dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_gpus(supported: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    where = "hardware" if supported else "software"
    assert fast_dtype() == (dtype, f"a GPU multiplies bfloat16 in {where}")
    assert asked == [False]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert fast_dtype("cpu")[0] == "float32"


def test_loading_takes_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert _torch_dtype("auto") == dtype

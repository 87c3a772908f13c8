"""bench/bench_integrations.py: each peer and our replacement agree; differences and fallbacks are errors."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch

from grpo_ext.bench.common import SOURCE_TREE

#: fp32, so that what differs is a difference and no rounding.
SMALL = (
    "--dtype fp32 --vocab 131 --hidden 64 --layers 1 --batch 4 --prompt 4 --completion 8 --tokens 9 --policy 3x8 "
    "--runs 1 --warmup 0"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SOURCE_TREE))
    import bench_integrations

    return bench_integrations


@pytest.fixture
def cases(bench: ModuleType) -> ModuleType:
    import integration_cases

    return integration_cases


def rows_of(bench: ModuleType, candidates: str, folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    path = folder / "integrations.csv"
    command = f"{SMALL} --threads {torch.get_num_threads()} --candidates {candidates} --csv {path}"
    assert bench.main(command.split()) == 0
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = {(row["subject"], row["candidate"]): row for row in csv.DictReader(file)}
    for row in rows.values():
        assert float(row["difference"]) <= 1e-5
        assert float(row["ms_median"]) > 0
        assert float(row["peak_mb"]) >= 0
        assert row["of_peer"] == "1" or row["candidate"] == "grpo_ext"
    return rows


def test_steps_of_trl(bench: ModuleType, cases: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the benchmark beside TRL needs TRL")
    rows = rows_of(bench, "kto,dpo,sft", tmp_path)
    subjects = ("sft, lora", "sft, full", "kto, lora", "kto, full", "dpo, lora", "dpo, full")
    assert list(rows) == [(subject, name) for subject in subjects for name in ("trl", "grpo_ext")]
    valid = sum(cases.lengths(7, 4)) + 4  # and the end of each
    for row in rows.values():
        assert row["peer"].startswith("trl 1.")
        assert (row["rows"], row["tokens"], row["valid_tokens"]) == ("4", "12", str(valid))


def test_a_step_that_ran_elsewhere_is_an_error(
    bench: ModuleType, cases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="the benchmark beside TRL needs TRL")
    from grpo_ext.integrations import trl as ours

    monkeypatch.setitem(cases.SERVED, "kto", ({"with gradient": 2}, {}))
    with pytest.raises(RuntimeError, match=r"did not make the expected calls: .*patched\nserved: 3 without gradient"):
        rows_of(bench, "kto", tmp_path)
    assert not ours.status().patched


def test_another_value_is_an_error(cases: ModuleType) -> None:
    values = {"peer 1": torch.ones(3), "same": torch.ones(3) * (1 + 1e-6), "other": torch.ones(3) * 1.01}

    def compare(*names: str) -> dict[str, float]:
        chosen = {name: values[name] for name in names}
        return cases.Comparison("peer 1", chosen, lambda x: [x], {}, "fp32").prove()

    assert compare("peer 1", "same")["same"] == pytest.approx(1e-6, rel=0.2)
    with pytest.raises(AssertionError, match="other differs from peer 1"):
        compare("peer 1", "same", "other")


def test_what_needs_a_gpu_is_left_out(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows_of(bench, "liger_logits,liger_logps", tmp_path) == {}
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{name}: skipped, Liger's Triton kernels need a GPU" for name in ("liger_logits", "liger_logps")
    ]


def test_heads_of_liger(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel.chunked_loss", reason="make test-all installs it")
    rows = rows_of(bench, "liger_linear", tmp_path)
    heads = ("liger_linear, frozen", "liger_linear, trained")
    assert list(rows) == [(head, name) for head in heads for name in ("liger", "grpo_ext")]


def test_head_and_policy_loss_of_verl(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="make test-all installs it")
    pytest.importorskip("verl.trainer.ppo.core_algos", reason="make test-all installs it")
    rows = rows_of(bench, "verl_head,verl_policy", tmp_path)
    subjects = ("verl_head, frozen", "verl_head, trained", "verl_policy")
    assert list(rows) == [(subject, name) for subject in subjects for name in ("verl", "grpo_ext")]

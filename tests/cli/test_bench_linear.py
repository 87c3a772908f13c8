"""grpo_ext/bench/linear.py: peers that are absent say why, and its errors against fp64 are right."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_ext
from grpo_ext.bench import linear, linear_peers

SMALL = "--threads 1 --rows 16 --shapes 8x64 --heads frozen --runs 1"


def row_loss(hidden: Tensor, weight: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logps = grpo_ext.reference.linear_selective_log_softmax(hidden, weight, inputs["ids"])
    assert isinstance(logps, Tensor)
    return linear_peers.torch_loss(logps, inputs), logps


def measured(monkeypatch: pytest.MonkeyPatch, path: Path, candidates: str) -> dict[str, dict[str, str]]:
    monkeypatch.setattr(sys, "argv", ["linear", *SMALL.split(), "--candidates", candidates, "--csv", str(path)])
    linear.main()
    with path.open(newline="") as file:
        return {row["candidate"]: row for row in csv.DictReader(file)}


def test_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that runs, one without its package, and one that fails when it runs."""

    def failing(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    def missing(_: torch.device) -> Any:
        raise ImportError("No module named 'quack'")

    monkeypatch.setitem(linear_peers.PEERS, "trl", (lambda _: row_loss, "torch"))
    monkeypatch.setitem(linear_peers.PEERS, "liger", (lambda _: failing, "torch"))
    monkeypatch.setitem(linear_peers.PEERS, "quack", (missing, "torch"))
    rows = measured(monkeypatch, tmp_path / "linear.csv", "loss,trl,liger,quack")
    printed = capsys.readouterr().out
    assert "liger: absent, RuntimeError: no kernel image\n" in printed
    assert "quack: absent, No module named 'quack'\n" in printed
    assert list(rows) == ["bare", "loss", "trl"]
    assert float(rows["loss"]["x_trl"]) > 0
    assert rows["loss"]["x_liger"] == "nan"
    assert (rows["trl"]["version"] != "", rows["loss"]["version"]) == (True, "")
    for name in ("loss", "trl"):
        assert 0 < float(rows[name]["gradient_error"]) < 1e-5
        assert float(rows[name]["logp_error"]) < 1e-5


def test_gradient_error() -> None:
    """A row's factor in the loss does not count, an error of its direction does; clipped rows are left out."""
    inputs = linear.make_inputs(16, 8, 64, torch.float32, 0.0, 0, torch.device("cpu"))
    exact = linear.Exact(inputs)
    scaled = (exact.gradient * torch.linspace(-2, 3, 16).unsqueeze(1)).view(8, 2, 8)
    scaled[0, 0] = 0.0
    assert exact.gradient_error(scaled) < 1e-12
    direction = torch.zeros(8, dtype=torch.float64)
    row = scaled[3, 1]
    direction[0], direction[1] = row[1], -row[0]  # at a right angle to the row
    scaled[3, 1] = row + 0.01 * row.norm() * direction / direction.norm()
    assert exact.gradient_error(scaled) == pytest.approx(0.01, rel=1e-6)

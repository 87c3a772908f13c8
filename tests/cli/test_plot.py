"""The reward curve of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.main import main
from grpo_ext.cli.plot import moving_average, plot_run, reward_curve


def _metrics(folder: Path, records: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_curve_reads_steps_in_order_and_the_last_of_each(tmp_path: Path) -> None:
    _metrics(
        tmp_path,
        [
            {"step": 2, "reward": 0.5},
            {"step": 1, "reward": 0.25},
            {"step": 2, "reward": 0.75},
            {"step": 2, "eval_reward": 1.0},
            {"train_runtime": 3.0},
        ],
    )
    assert reward_curve(str(tmp_path)) == ([1, 2], [0.25, 0.75])


def test_moving_average() -> None:
    assert moving_average([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


@pytest.mark.parametrize("with_summary", [False, True])
def test_plot_writes_a_png(tmp_path: Path, with_summary: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _metrics(tmp_path, [{"step": step, "reward": step / 10} for step in range(1, 8)])
    if with_summary:
        summary = {"heldout_reward_before": 0.1, "heldout_reward_after": 0.7, "best_constant_reward": 0.2}
        (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    output = tmp_path / "other.png"
    assert plot_run(str(tmp_path), str(output)) == str(output)
    assert main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "reward.png")
    for path in (output, tmp_path / "reward.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_plot_without_a_reward(tmp_path: Path) -> None:
    _metrics(tmp_path, [{"step": 1, "loss": 0.0}])
    with pytest.raises(SettingsError, match="contains no reward"):
        plot_run(str(tmp_path))

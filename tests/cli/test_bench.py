"""`grpo-ext bench`: the scripts behind it, its tables and its plots."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from grpo_ext.cli.bench import Job, jobs_of, run_job
from grpo_ext.cli.bench_report import draw
from grpo_ext.cli.convert import SettingsError
from grpo_ext.cli.main import main


def test_every_job_has_its_script() -> None:
    for subject in ("row", "linear", "training"):
        for device in ("cpu", "cuda"):
            jobs = jobs_of(subject, device, 1, False, ())
            assert jobs
            assert len({job.csv for job in jobs}) == len(jobs)
            for job in jobs:
                assert importlib.util.find_spec(f"grpo_ext.bench.{job.module}") is not None


@pytest.mark.parametrize(("subject", "picture"), [("row", "row_roofline_fp32.png"), ("linear", "linear_ratio.png")])
def test_quick_measurement(subject: str, picture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extra = {"row": ["--candidates", "inplace,eager"], "linear": ["--candidates", "loss", "--heads", "frozen"]}[subject]
    options = ["--device", "cpu", "--threads", "1", "--quick", "--output", str(tmp_path)]
    assert main(["bench", subject, *options, "--", *extra]) == 0
    printed = capfd.readouterr().out
    assert f"{subject}: cpu" in printed
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / f"{subject}_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    column = "mode" if subject == "row" else "candidate"
    assert {row[column] for row in rows} == ({"inplace", "eager"} if subject == "row" else {"bare", "loss"})
    assert all(float(row["ms"]) > 0 for row in rows)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_training_module_takes_its_arguments(device: str, quick: bool) -> None:
    from grpo_ext.bench import training as bench_training

    job = jobs_of("training", device, 1, quick, ())[0]
    assert job.command(Path("there"))[1:3] == ["-m", "grpo_ext.bench.training"]
    arguments = bench_training.parse(job.command(Path("there"))[3:])
    assert (arguments.part, arguments.device, arguments.output) == ("phase", device, Path("there"))
    assert "ours" in arguments.candidates


def test_training_phase_is_drawn(tmp_path: Path) -> None:
    case = {"model": "m", "trained": "lora", "completions": "8", "max_tokens": "16", "device": "cpu"}
    rows = [
        case | {"candidate": name, "lengths": lengths, "training_s": "0.5"}
        for name in ("ours", "trl")
        for lengths in ("spread", "equal")
    ]
    (path,) = draw("training", rows, tmp_path)
    assert path.name == "training_phase.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_memory_against_tokens_is_drawn(tmp_path: Path) -> None:
    where = {"rows": "4", "model": "m", "layers": "1", "device": "cpu"}
    rows = [
        where | {"path": path, "tokens": tokens, "peak_mib": str(10 * int(tokens))}
        for path in ("fused head", "logits")
        for tokens in ("16", "32")
    ]
    (path,) = draw("training", rows, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_script_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"(?s)ended with status 2.*invalid choice: 'nonsense'"):
        run_job(Job("row_loss", ("--device", "nonsense"), "x.csv", "x"), tmp_path)


def test_wrong_requests(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "all", "--device", "cpu", "--output", str(tmp_path), "--", "--rows", "3"]) == 2
    assert "with one subject, not with all" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "row", "--device", "cuda", "--output", str(tmp_path)]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_lines_are_not_added_to_a_file_of_other_columns(tmp_path: Path) -> None:
    from grpo_ext.bench import common

    path = tmp_path / "new" / "lines.csv"
    for number in (1, 2):
        common.write_csv(path, [{"a": number, "b": 0.5}], append=True)
    assert path.read_text().split() == ["a,b", "1,0.5", "2,0.5"]
    with pytest.raises(ValueError, match="has other columns than these lines"):
        common.write_csv(path, [{"a": 3, "c": 0.5}], append=True)
    assert path.read_text().split() == ["a,b", "1,0.5", "2,0.5"]

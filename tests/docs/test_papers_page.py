"""Every block of settings on the papers page is a valid configuration and agrees with the text of its section."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ext.cli.settings import from_mapping
from grpo_ext.trainer import GRPOConfig

PAGE = (Path(__file__).parents[2] / "docs/papers.md").read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
BLOCKS = {
    title: block
    for title, section in SECTIONS.items()
    for block in re.findall(r"^```yaml\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
}
#: Settings that make the algorithm what it is, and updates for each generation.
EXPECTED: dict[str, tuple[dict[str, Any], float | None]] = {
    "GRPO": ({"loss_type": "grpo", "beta": 0.04, "importance_sampling_level": "token"}, 1),
    "Dr. GRPO": ({"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": 3000}, 1),
    "DAPO": ({"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0}, 16),
    "GSPO": ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}, 4),
    "LUSPO": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, 4),
    "CISPO": ({"loss_type": "cispo", "epsilon_high": 5.0}, 4),
    "SAPO": ({"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}, 4),
    "VESPO": ({"loss_type": "vespo", "vespo_k_pos": 2, "vespo_lambda_neg": 2}, 8),
    "TIS": ({"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_cap": 2.0}, None),
    "IcePop": ({"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.5}, None),
    "DeepSeek-V3.2": ({"use_bias_correction_kl": True, "off_policy_mask_threshold": 0.5, "scale_rewards": "none"}, 4),
}


def test_every_paper_has_one_block() -> None:
    assert list(BLOCKS) == list(EXPECTED)
    assert PAGE.count("```yaml") == len(BLOCKS)


@pytest.mark.parametrize("title", EXPECTED)
def test_a_block_is_the_configuration_of_its_paper(title: str, tmp_path: Path) -> None:
    run = from_mapping({"model": "m", "dataset": "products", **yaml.safe_load(BLOCKS[title])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a batch size that is raised
        warnings.filterwarnings("ignore", message="a generation batch holds only")  # on TIS and IcePop, which set none
        args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **run.trainer)
    fields, updates = EXPECTED[title]
    assert {name: getattr(args, name) for name in fields} == fields
    if updates is not None:
        assert args.batch_plan.optimizer_steps_per_generation == updates

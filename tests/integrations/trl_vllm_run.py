"""Train with patched TRL and its vLLM on the CPU; print a line of JSON. Started by test_trl_handover.py."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from vllm_toys import build_model, build_tokenizer

warnings.simplefilter("ignore")


def run(folder: Path) -> dict[str, Any]:
    from trl_runs import Recorder, lora, prompts, reward, settings, trl

    import grpo_ext.integrations.trl as ours
    from grpo_ext.integrations.trl.handover import handover_of

    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    ours.patch()
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 3e-2,
        "max_steps": 3,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 256,
    }
    recorder = Recorder()
    trainer = trl.GRPOTrainer(
        str(folder), reward, trl.GRPOConfig(**settings(str(folder / "out"), **changes)), prompts(),
        processing_class=build_tokenizer(), peft_config=lora(), callbacks=[recorder],
    )  # fmt: skip
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    stale = trainer.vllm_generation
    handover = handover_of(stale)
    with torch.no_grad():  # weights that vLLM does not get
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    handover.unchecked = True
    handover.check(stale)
    part = ours.status().parts["weights"]
    return {
        "checks": [step["vllm/weight_check"] for step in recorder.steps],
        "stale": handover.figures[-1],
        "served": part.served,
        "handed_back": part.handed_back,
        "frozen": len(frozen),
        "bits_equal": all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen),
        "differences": [step["sampling/sampling_logp_difference/mean"] for step in recorder.steps],
    }


if __name__ == "__main__":
    torch.compiler.set_stance("force_eager")
    print(json.dumps(run(Path(sys.argv[1]))))

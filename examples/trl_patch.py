"""Run TRL's GRPO trainer with this package's kernels; pip install 'grpo-ext[trl]'."""

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import grpo_ext.integrations.trl as t
from grpo_ext.tasks import load_model

t.patch(fuse_loss=True)
model, tokenizer = load_model("smollm2-135m-instruct")
dataset = Dataset.from_list([{"prompt": "Name a colour."}, {"prompt": "Name a city."}])
args = GRPOConfig("runs/trl", max_steps=2, num_generations=4, max_completion_length=8, report_to="none", bf16=False)
GRPOTrainer(model, lambda completions, **_: [-len(c) / 99 for c in completions], args, dataset, None, tokenizer).train()
print(t.status())

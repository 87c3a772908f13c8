"""Train LoRA on a hub model with a hub dataset, on one GPU; pip install 'grpo-ext[train]'."""

from datasets import load_dataset
from peft import LoraConfig

from grpo_ext.trainer import GRPOConfig, GRPOTrainer


def correct(completions, answer, **columns):
    return [float(a.split("#### ")[1] in c[0]["content"][-40:]) for c, a in zip(completions, answer, strict=True)]


dataset = load_dataset("openai/gsm8k", "main", split="train")
dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
args = GRPOConfig("runs/gsm8k", bf16=True, learning_rate=1e-4, per_device_train_batch_size=16, max_steps=200)
lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
GRPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", correct, args, dataset, peft_config=lora).train()

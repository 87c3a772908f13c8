"""Train the small packaged model to give short answers."""

from datasets import Dataset
from peft import LoraConfig

from grpo_ext.tasks import load_model
from grpo_ext.trainer import GRPOConfig, GRPOTrainer


def short(completions, **columns):
    return [-len(completion[0]["content"]) / 100 for completion in completions]


questions = ["Name a colour.", "Name an animal.", "Name a city.", "Name a fruit."]
dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])
model, tokenizer = load_model("smollm2-135m-instruct", dtype="auto")
args = GRPOConfig("runs/minimal", max_steps=5, per_device_train_batch_size=24, max_completion_length=16)
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
GRPOTrainer(model, short, args, dataset, processing_class=tokenizer, peft_config=lora).train()

"""Comparisons of `bench_integrations.py`: a peer's own code and our replacement, checked for equal results."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_ext.bench.common import DTYPES

#: Largest difference of a value or gradient from the peer's, relative to its norm. In bf16 both have rounding errors.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}

#: Calls of one patched step by our kernels; TRL's own class has none.
SERVED: dict[str, dict[str, int]] = {
    "sft": {"with gradient": 1},
    # The policy with gradient; without gradient the reference model, and both models again for the KL estimate.
    "kto": {"with gradient": 1, "without gradient": 3},
    "dpo": {"with gradient": 1, "without gradient": 1},
}


def columns(
    options: argparse.Namespace, trained: str, rows: int, tokens: int, valid: int, layers: int = 0
) -> dict[str, Any]:
    """Columns with the sizes: ``rows`` of ``tokens`` each, ``valid`` unmasked tokens in total."""
    sizes = {"vocab": options.vocab, "hidden": options.hidden, "layers": layers}
    return {"trained": trained, **sizes, "rows": rows, "tokens": tokens, "valid_tokens": valid}


class Unavailable(Exception):
    """Raised if a comparison cannot run here; the message is the reason."""


@dataclasses.dataclass
class Comparison:
    """One computation by several candidates, the peer first.

    Attributes:
        peer: name and version of the peer.
        candidates: argument of `call` by candidate name, for example a function.
        call: measured function; returns the tensors to compare, in the same order for every candidate.
        columns: columns of the table with the sizes.
        dtype: dtype of the inputs, selects the tolerance.
        before: unmeasured preparation of each call, with the same argument.
        more: returns further tensors to compare after a call.
        after: cleans up after all calls.
    """

    peer: str
    candidates: dict[str, Any]
    call: Callable[[Any], Sequence[Tensor]]
    columns: dict[str, Any]
    dtype: str
    before: Callable[[Any], None] = lambda _: None
    more: Callable[[], Sequence[Tensor]] = lambda: ()
    after: Callable[[], None] = lambda: None

    def prepare(self, name: str) -> Callable[[], Any]:
        self.before(self.candidates[name])
        return functools.partial(self.call, self.candidates[name])

    def prove(self) -> dict[str, float]:
        """Check every candidate against the peer; return its largest difference relative to a tensor's norm."""
        wanted: list[Tensor] = []
        found = {}
        for name in self.candidates:
            tensors = [*self.prepare(name)(), *self.more()]
            wanted = wanted or [x.detach().clone() for x in tensors]
            pairs = [(a.detach().float(), b.float()) for a, b in zip(tensors, wanted, strict=True)]
            distances = [float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs]
            found[name] = max(distances)
            if not found[name] <= TOLERANCE[self.dtype]:
                raise AssertionError(f"{name} differs from {self.peer} by these shares of the norm: {distances}")
        return found


def peer_module(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise Unavailable(f"{name} cannot be imported ({error}): make peers, and PYTHONPATH=.venv/peers") from error


def without_progress_bars() -> None:
    import datasets

    datasets.disable_progress_bars()


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


# ---- TRL


def build_model(options: argparse.Namespace, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=8 * options.hidden // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=next(n for n in range(max(1, heads // 3), 0, -1) if heads % n == 0),
        max_position_embeddings=options.prompt + options.completion + 1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(options.device):
        return LlamaForCausalLM._from_config(config, dtype=DTYPES[options.dtype])


def lengths(longest: int, count: int, equal: bool = False) -> list[int]:
    """Draw lengths from a quarter of the longest upwards; the first is the longest, with ``equal`` all are."""
    if equal:
        return [longest] * count
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(max(1, longest // 4), longest + 1, (count,), generator=generator).tolist()
    return [longest, *drawn[1:]]


def dataset(kind: str, options: argparse.Namespace) -> Any:
    """Build ``options.batch`` texts: that many completions for sft and kto, or half as many pairs for dpo."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return "".join(f" t{i}" for i in torch.randint(2, options.vocab, (count,), generator=generator).tolist())

    prompts, completions = [], []
    for count in lengths(options.completion - 1, options.batch, options.equal):  # TRL appends the end token
        prompts.append(words(options.prompt))
        completions.append(words(count))
    if kind == "kto":
        labels = [number % 2 == 0 for number in range(options.batch)]
        return Dataset.from_dict({"prompt": prompts, "completion": completions, "label": labels})
    if kind == "sft":
        return Dataset.from_dict({"prompt": prompts, "completion": completions})
    pairs = {"prompt": prompts[::2], "chosen": completions[::2], "rejected": completions[1::2]}
    return Dataset.from_dict(pairs)


def build_trainer(kind: str, trained: str, options: argparse.Namespace) -> Any:
    trl = peer_module("trl")
    from peft import LoraConfig

    from grpo_ext.bench.training_workload import build_tokenizer

    config = getattr(trl, f"{kind.upper()}Config")(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch // (2 if kind == "dpo" else 1),
        max_length=options.prompt + options.completion,
        gradient_checkpointing=options.checkpointing,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        bf16=False,  # the weights already have the dtype
    )
    full = trained == "full"
    lora = None if full else LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        build_model(options, 0),
        args=config,
        train_dataset=dataset(kind, options),
        processing_class=build_tokenizer(options.vocab),
        peft_config=lora,
        **({"ref_model": build_model(options, 1)} if full and kind != "sft" else {}),
    )
    trainer.model.train()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would make policy and reference equal
            torch.nn.init.normal_(parameter, std=0.02)
    return trainer


def trl_step(kind: str, trained: str, options: argparse.Namespace) -> Comparison:
    trainer = build_trainer(kind, trained, options)
    import grpo_ext.integrations.trl as ours

    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def before(patching: Callable[[], Any]) -> None:
        ours.unpatch()
        patching()
        trainer.model.zero_grad(set_to_none=True)
        trainer._metrics["train"].clear()

    def step(patching: Callable[[], Any]) -> list[Tensor]:
        loss = trainer.compute_loss(trainer.model_wrapped, inputs)
        loss.backward()
        status = ours.status()
        if status.patched and (status.served, status.handed_back) != (SERVED[kind], {}):
            raise RuntimeError(f"the patched step did not make the expected calls: {status}")
        return [loss]

    rows, tokens = inputs["input_ids"].shape
    scored = inputs["labels"] != -100 if kind == "sft" else inputs["completion_mask"]
    return Comparison(
        version("trl"),
        {"trl": ours.unpatch, "grpo_ext": ours.patch},
        step,
        columns(options, trained, rows, tokens, int(scored.sum()), options.layers),
        options.dtype,
        before,
        lambda: [torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])],
        ours.unpatch,
    )


# ---- Liger-Kernel


def head_inputs(options: argparse.Namespace, head: str) -> dict[str, Tensor]:
    """Random hidden states (B,T,H), head (V,H) and loss inputs; logits spread like a language model's.

    Log ratios are far from the clip limits, where rounding would switch a token's gradient on or off.
    """
    generator = torch.Generator().manual_seed(2)
    B, T, H, V = options.batch, options.tokens, options.hidden, options.vocab
    dtype, device = DTYPES[options.dtype], options.device
    hidden = torch.randn(B, T, H, generator=generator).to(device, dtype)
    weight = torch.randn(V, H, generator=generator).mul_(2 / H**0.5).to(device, dtype)
    ids = torch.randint(0, V, (B, T), generator=generator).to(device)
    logps = torch.empty(B, T, device=device)
    for row in range(B):
        logits = torch.log_softmax((hidden[row] @ weight.T).float(), -1)
        logps[row] = logits.gather(-1, ids[row, :, None]).squeeze(-1)
    drift = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.5])
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(head == "trained"),
        "ids": ids,
        "mask": (torch.arange(T) < torch.tensor(lengths(T, B, options.equal))[:, None]).long().to(device),
        "advantages": torch.randn(B, generator=generator).to(device),
        "old": logps + drift[torch.randint(0, 5, (B, T), generator=generator)].to(device),
        "ref": logps + 0.1 * torch.randn(B, T, generator=generator).to(device),
    }


def head_columns(options: argparse.Namespace, head: str, t: dict[str, Tensor]) -> dict[str, Any]:
    return columns(options, head, options.batch, options.tokens, int(t["mask"].sum()))


def liger_linear(head: str, options: argparse.Namespace) -> Comparison:
    theirs = peer_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    from grpo_ext.integrations.liger import LigerFusedLinearGRPOLoss

    t = head_inputs(options, head)
    leaves = [x for x in (t["hidden"], t["weight"]) if x.requires_grad]
    modules = {"liger": theirs(compiled=False), "grpo_ext": LigerFusedLinearGRPOLoss()}
    if options.compiled:
        modules["liger, compiled"] = theirs(compiled=True)

    def call(module: Any) -> list[Tensor]:
        loss, metrics = module(
            t["hidden"], t["weight"], t["ids"], t["mask"], t["advantages"], ref_per_token_logps=t["ref"],
            old_per_token_logps=t["old"],
        )  # fmt: skip
        return [loss, *metrics, *torch.autograd.grad(loss, leaves)]

    return Comparison(version("liger-kernel"), modules, call, head_columns(options, head, t), options.dtype)


def liger_from_logits(options: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Return Liger's module of Triton functions, and inputs with logits (B,T+1,V)."""
    if options.device != "cuda":
        raise Unavailable("Liger's Triton kernels need a GPU")
    theirs = peer_module("liger_kernel.transformers.grpo_loss")
    t = head_inputs(options, "frozen")
    with torch.no_grad():
        last = torch.zeros_like(t["hidden"][:, :1])
        t["logits"] = torch.cat([t["hidden"], last], 1) @ t["weight"].T
    return theirs, t


def liger_logits(options: argparse.Namespace) -> Comparison:
    theirs, t = liger_from_logits(options)
    import grpo_ext.integrations.liger as ours

    # Each call overwrites its logits; `before` refills the same memory. A view, because leaves cannot be overwritten.
    leaf = torch.empty_like(t["logits"]).requires_grad_()
    work: list[Tensor] = []

    def before(_: Any) -> None:
        work.clear()
        leaf.data.copy_(t["logits"])
        work.append(leaf.view_as(leaf))

    def call(function: Any) -> list[Tensor]:
        loss, metrics = function(
            work[0], t["old"], t["ref"], t["ids"], t["advantages"], t["mask"], temperature=1.0, reduce=True
        )
        return [loss, *metrics, *torch.autograd.grad(loss, work)]

    functions = {"liger": theirs.triton_grpo_loss, "grpo_ext": ours.triton_grpo_loss}
    size = head_columns(options, "logits", t)
    return Comparison(version("liger-kernel"), functions, call, size, options.dtype, before)


def liger_logps(options: argparse.Namespace) -> Comparison:
    theirs, t = liger_from_logits(options)
    import grpo_ext.integrations.liger as ours

    def call(function: Any) -> list[Tensor]:
        return [function(t["logits"], t["ids"], 1.0, t["mask"])]

    functions = {"liger": theirs.fused_selective_log_softmax, "grpo_ext": ours.fused_selective_log_softmax}
    return Comparison(version("liger-kernel"), functions, call, head_columns(options, "logits", t), options.dtype)


# ---- verl


def verl_head(head: str, options: argparse.Namespace) -> Comparison:
    in_torch = peer_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    from grpo_ext.integrations.verl_functions import linear_cross_entropy

    t = head_inputs(options, head)
    leaves = [x for x in (t["hidden"], t["weight"]) if x.requires_grad]
    upstream = torch.randn(t["ids"].shape, generator=torch.Generator().manual_seed(3)).to(options.device).flatten()
    functions: dict[str, Any] = {"verl": in_torch, "grpo_ext": linear_cross_entropy}
    if options.device == "cuda":
        functions["verl, Triton"] = peer_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def call(function: Any) -> list[Tensor]:
        logps, entropy = function(t["hidden"], t["weight"], t["ids"], 1.0)
        logps, entropy = logps.flatten(), entropy.flatten()
        return [logps, entropy, *torch.autograd.grad(logps, leaves, upstream)]

    size = columns(options, head, options.batch, options.tokens, t["ids"].numel())  # verl packs its tokens
    return Comparison(version("verl"), functions, call, size, options.dtype)


def verl_policy(options: argparse.Namespace) -> Comparison:
    algorithms = peer_module("verl.trainer.ppo.core_algos")
    peer_module("grpo_ext.integrations.verl")  # registers ours
    config = peer_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28
    )
    B, T = options.policy
    generator = torch.Generator().manual_seed(4)

    def some() -> Tensor:
        return torch.randn(B, T, generator=generator).to(options.device)

    old = some() - 3
    new = (old + 0.3 * some()).requires_grad_()
    advantages = some()
    mask = (torch.arange(T) < torch.tensor(lengths(T, B, options.equal))[:, None]).long().to(options.device)

    def call(name: str) -> list[Tensor]:
        loss, metrics = algorithms.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask, config=config,
            loss_agg_mode=options.aggregation,
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss, new), torch.tensor([metrics[key] for key in sorted(metrics)])]

    size = columns(options, options.aggregation, B, T, int(mask.sum())) | {"vocab": 0, "hidden": 0}
    return Comparison(version("verl"), {"verl": "vanilla", "grpo_ext": "grpo_ext"}, call, size, "fp32")


def comparisons(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Comparison]]]:
    """Yield each candidate's name, its subject in the table, and a function that builds the comparison."""
    for kind in SERVED:
        for trained in options.trained:
            yield kind, f"{kind}, {trained}", functools.partial(trl_step, kind, trained, options)
    for head in options.heads:
        yield "liger_linear", f"liger_linear, {head}", functools.partial(liger_linear, head, options)
    yield "liger_logits", "liger_logits", functools.partial(liger_logits, options)
    yield "liger_logps", "liger_logps", functools.partial(liger_logps, options)
    for head in options.heads:
        yield "verl_head", f"verl_head, {head}", functools.partial(verl_head, head, options)
    yield "verl_policy", "verl_policy", functools.partial(verl_policy, options)


CANDIDATES = (*SERVED, "liger_linear", "liger_logits", "liger_logps", "verl_head", "verl_policy")

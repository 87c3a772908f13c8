"""Hand the weights to TRL's colocated vLLM in one pass, with adapters merged out of place.

TRL merges the adapters into the base weights, loads one parameter a call, and subtracts the adapters again. In bf16 the
subtraction leaves rounding errors in the base weights, which grow with every hand-over. Here ``W + s B A`` is summed in
fp32 beside ``W`` and rounded once. vLLM gets batches of parameters; as soon as the place of every parameter is known,
plain copies take the place of vLLM's loader (`Loader`).

`methods` lists what `patch` replaces. After each hand-over, the next generation first compares vLLM's log
probabilities with the trainer's (`WeightCheck`); the trainer logs the difference as ``vllm/weight_check``.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from grpo_ext.generation.vllm.check import TOP, WeightCheck, ordinary_ids
from grpo_ext.generation.vllm.client import Answer, Weights
from grpo_ext.generation.vllm.colocate import answer_of
from grpo_ext.generation.vllm.engine import PROBE_FIELDS
from grpo_ext.generation.vllm.placement import Loader
from grpo_ext.generation.vllm.weights import base_of, checkpoint_weights, policy_weights, walk
from grpo_ext.integrations.trl.counting import counts
from grpo_ext.modules.inspection import is_peft_model
from grpo_ext.modules.sharding import is_sharded

#: Bytes of the parameters in one call of vLLM's loader.
BATCH = 2**29


def reason_to_keep_trl(generation: Any) -> str | None:
    """Reason to leave the hand-over of a ``VLLMGeneration`` to TRL's own method, or None."""
    if generation.mode != "colocate":
        return f"vllm_mode={generation.mode!r}: TRL packs the parameters"
    if generation._dist.is_fsdp:
        return "FSDP"
    if generation._dist.is_zero3:
        return "DeepSpeed ZeRO-3"
    return _reason_of_model(generation.model)


def _reason_of_model(model: nn.Module) -> str | None:
    uses: Counter[nn.Parameter] = Counter()
    modules = [module for _, module in walk(base_of(model))]
    for module in modules:
        uses.update(p for p in module._parameters.values() if p is not None)
    for parameter in uses:
        if not parameter.is_floating_point():
            return f"quantised weights, {str(parameter.dtype).removeprefix('torch.')}"
        if is_sharded(parameter):
            return "sharded weights"
        if parameter.is_meta:
            return "offloaded weights"
    return _reason_of_adapter(model, modules, uses) if is_peft_model(model) else None


def _reason_of_adapter(model: Any, modules: Iterable[Any], uses: Counter[nn.Parameter]) -> str | None:
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    mergeable = (lora.Linear, lora.Embedding, lora.Conv2d, lora.Conv3d)
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return "a PEFT method that changes the prompt"
    for layer in modules:
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) not in mergeable:
            return f"adapters of {type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
        if layer.merged_adapters:
            return "adapters that are merged already"
        if any(layer.lora_bias.get(name) for name in layer.active_adapters):
            return "lora_bias"
        if uses[layer.get_base_layer().weight] > 1:
            return "an adapter on tied weights"
    return None


class Handover:
    """Load the weights into one vLLM engine, and check them there.

    Attributes:
        unchecked: whether weights were loaded since the last check.
        figures: differences in nats that the trainer has not logged yet.
    """

    def __init__(self, generation: Any) -> None:
        self.unchecked = False
        self.figures: list[float] = []
        # vLLM's sleep discards the padding of its weights, which plain copies would not restore.
        self._loader = Loader(places=not generation.enable_sleep_mode)
        self._check: WeightCheck | None = None

    def load(self, generation: Any) -> Iterator[tuple[str, Tensor]]:
        """Load the weights into vLLM. Yields nothing: TRL's loop over the weights then has nothing to load."""
        llm = generation.llm
        engine = llm.llm_engine.model_executor.driver_worker.model_runner.model
        if any("cpu_linear" in layer.__dict__ for layer in engine.modules()):
            # On the CPU vLLM may have repacked its weights: only its own reload, of a whole checkpoint, takes new ones.
            weights = checkpoint_weights(generation.model)
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        else:
            self._loader(_named(generation.model), functools.partial(_load_in_batches, engine), lambda: engine)
        self.unchecked = True
        yield from ()

    def check(self, generation: Any) -> None:
        """Record the mean difference of vLLM's log probabilities from the trainer's, in nats.

        A no-op if no weights were loaded since the last check, and for models that take a processor instead of a
        tokenizer: images may be required.
        """
        if not self.unchecked or isinstance(generation.processing_class, ProcessorMixin):
            return
        self.unchecked = False
        if self._check is None:
            config = generation.llm.llm_engine.model_config
            ids = ordinary_ids(generation.model, generation.processing_class)
            self._check = WeightCheck(ids, config.max_model_len, config.dtype, bound=math.inf)
        self.figures.append(self._check(generation.model, functools.partial(_ask, generation.llm)))


_handovers: WeakKeyDictionary[Any, Handover] = WeakKeyDictionary()


def handover_of(generation: Any) -> Handover:
    """Return the `Handover` of a ``VLLMGeneration``; create it at the first call."""
    if generation not in _handovers:
        _handovers[generation] = Handover(generation)
    return _handovers[generation]


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters under TRL's names."""
    for name, tensor in policy_weights(model):
        yield name.replace("_checkpoint_wrapped_module.", ""), tensor


def _load_in_batches(engine: Any, weights: Weights) -> None:
    batch: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        batch.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= BATCH:
            engine.load_weights(batch)
            batch, size = [], 0
    if batch:
        engine.load_weights(batch)


def _ask(llm: Any, prompts: Iterable[Any]) -> list[Answer]:
    from vllm import SamplingParams

    params = SamplingParams(**PROBE_FIELDS, n=1, logprobs=TOP, detokenize=False)
    # vLLM in this process uses torch's generators: the check must not advance those of training.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    return [answer_of(output.outputs[0], TOP) for output in outputs]


def sync_weights(generation: Any, original: Callable[[Any], None]) -> None:
    """Replacement of ``VLLMGeneration.sync_weights``; counts fallbacks to TRL's method.

    TRL's method still wakes vLLM before, and empties its prefix cache after; it loads what `Handover.load` yields.
    """
    reason = reason_to_keep_trl(generation)
    if reason is None:
        handover = handover_of(generation)
        generation._iter_named_params = functools.partial(handover.load, generation)
    try:
        original(generation)
    finally:
        generation.__dict__.pop("_iter_named_params", None)
    counts.part("weights", reason)


@contextlib.contextmanager
def checked(generation: Any, profiler: Any) -> Iterator[None]:
    """Check the weights, then enter ``profiler``, which TRL does when vLLM is awake and all its ranks are there."""
    if generation in _handovers:
        _handovers[generation].check(generation)
    with contextlib.nullcontext() if profiler is None else profiler:
        yield


def methods(enabled: Callable[[], bool]) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """The methods of TRL to replace: class, name, and a function from TRL's method to the one in its place.

    Args:
        enabled: whether the next hand-over is ours.
    """
    from trl import GRPOTrainer, RLOOTrainer
    from trl.generation.vllm_generation import VLLMGeneration

    def sync(own: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(own)
        def method(self: Any) -> None:
            if enabled():
                sync_weights(self, own)
            else:
                own(self)

        return method

    return [
        (VLLMGeneration, "sync_weights", sync),
        (VLLMGeneration, "generate", _generating),
        (GRPOTrainer, "log", _logging),
        (RLOOTrainer, "log", _logging),
    ]


def _generating(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Any, prompts: Any, images: Any, num_generations: int, profiler: Any = None) -> Any:
        return own(self, prompts, images, num_generations, checked(self, profiler))

    return method


def _logging(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def method(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        generation = getattr(self, "vllm_generation", None)
        handover = None if generation is None else _handovers.get(generation)
        if handover is not None and handover.figures:
            self._metrics["train" if self.model.training else "eval"]["vllm/weight_check"] += handover.figures
            handover.figures = []
        own(self, logs, *args, **kwargs)

    return method

"""vLLM in the trainer's process: weights are passed as tensors, without network traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo_ext.generation.errors import EngineError
from grpo_ext.generation.vllm.client import Answer, Answered, Weights
from grpo_ext.generation.vllm.placement import Loader
from grpo_ext.generation.vllm.weights import exhausted

#: Maximum adapter ranks that vLLM accepts; an adapter uses the next one that is large enough.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: KV cache on the CPU, in bytes; VLLM_CPU_KVCACHE_SPACE (GiB) and vllm_engine_kwargs override it.
CPU_CACHE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine in this process.

    Attributes:
        dtype: of its weights.
        max_model_len: maximum tokens of a prompt and its completion together.
        max_num_seqs: completions generated concurrently.
        seed: seed of the engine's random numbers.
        tensor_parallel_size: processes that share one copy of the weights.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and cache.
        sleep: enable releasing the engine's memory between generations.
        enforce_eager: disable CUDA graphs and compilation.
        lora_rank: rank of hot-loaded adapters; 0 = no adapters.
        external_launcher: use the trainer's processes as the engine's ranks (several processes).
        extra: further arguments of ``vllm.LLM``, which override the others.
    """

    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    seed: int
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.3
    sleep: bool = False
    enforce_eager: bool = False
    lora_rank: int = 0
    external_launcher: bool = False
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def import_vllm() -> Any:
    """Import vLLM.

    Raises:
        ImportError: vLLM is missing; the message contains the install command.
    """
    # vLLM reads these at import: run the engine in this process, send no usage report, and do not pin CPU threads,
    # which would pin the trainer's threads too.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"use_vllm=True needs vLLM, which cannot be imported ({error}): pip install vllm on a machine with a GPU, "
            "`make vllm` in a clone of grpo_ext for the CPU, or set use_vllm=False"
        ) from error
    return vllm


class ColocatedClient:
    """See `Client`.

    Args:
        folder: contains config.json, and the base weights if adapters are hot-loaded.
        settings: settings of the engine.
        device: the trainer's device.
        scratch: folder that `close` removes; None = ``folder``.

    Raises:
        EngineError: vLLM does not start.
    """

    def __init__(
        self, folder: Path, settings: EngineSettings, device: torch.device, scratch: Path | None = None
    ) -> None:
        vllm = import_vllm()
        self.folder = folder
        self.scratch = folder if scratch is None else scratch
        self.settings = settings
        self.on_cpu = device.type == "cpu"
        self.max_model_len = settings.max_model_len
        self._sampling_params = vllm.SamplingParams
        self._adapter: Any = None
        self._adapter_id = 0
        self._loader = Loader(places=not self.on_cpu)  # on the CPU vLLM repacks its weights
        self._owns_group = not torch.distributed.is_initialized()
        with _undisturbed(device):
            try:
                self.llm = vllm.LLM(**self._arguments())
            except Exception as error:
                raise EngineError(
                    f"vLLM did not start: {_described(error)}\nToo little memory: change vllm_gpu_memory_utilization "
                    f"(now {settings.gpu_memory_utilization}) or lower vllm_max_model_length (now "
                    f"{settings.max_model_len}). Unknown model: set use_vllm=False. Second engine with "
                    "vllm_enable_sleep_mode: start a new process, because vLLM allows one per process. "
                    "vllm_engine_kwargs passes further arguments to vllm.LLM."
                ) from error

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        arguments: dict[str, Any] = {
            "model": str(self.folder),
            # vLLM reads the base weights from the folder only for adapters; else `load_weights` passes all weights.
            "load_format": "auto" if settings.lora_rank else "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # ignore the model's sampling defaults
            "dtype": str(settings.dtype).removeprefix("torch."),
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "seed": settings.seed,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        if settings.sleep:
            arguments["enable_sleep_mode"] = True
        if settings.external_launcher:
            arguments["distributed_executor_backend"] = "external_launcher"
        if settings.lora_rank:
            room = next((rank for rank in LORA_RANKS if rank >= settings.lora_rank), None)
            if room is None:
                raise ValueError(
                    f"the adapter's rank {settings.lora_rank} is above vLLM's largest, {LORA_RANKS[-1]}: "
                    "set vllm_lora_mode='merged'"
                )
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
        if self.on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        return arguments | settings.extra

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        fields: dict[str, Any],
        top: int = 0,
        answered: Answered | None = None,
    ) -> list[Answer]:
        """See `Client.complete`."""
        params = self._sampling_params(**fields, n=1, logprobs=top, detokenize=False)
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        with self._failing("generating"), self._eager():
            if answered is None:
                outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)
                answers = [answer_of(output.outputs[0], top) for output in outputs]
            else:
                answers = self._one_by_one(prompts, params, top, answered)
        if len(answers) != len(prompts):
            raise EngineError(f"vLLM answered {len(answers)} of {len(prompts)} prompts. {RESUME}")
        return answers

    def _one_by_one(self, prompts: list[Any], params: Any, top: int, answered: Answered) -> list[Answer]:
        """Generate the same samples as `LLM.generate`, and report each answer at the step that completes it."""
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params.output_kind = RequestOutputKind.FINAL_ONLY
        answers: dict[int, Answer] = {}
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, params, lora_request=self._adapter)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index = int(output.request_id)
                    answers[index] = answer_of(output.outputs[0], top)
                    answered(index, answers[index])
        return [answers[index] for index in sorted(answers)]

    def load_weights(self, weights: Weights) -> None:
        """See `Client.load_weights`. If every tensor's place is known, later calls only copy tensors (`Loader`)."""

        def reload(pairs: Weights) -> None:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})

        with self._failing("loading the weights"), exhausted(iter(weights)) as iterator:
            self._loader(iterator, reload, self._model)

    def _model(self) -> torch.nn.Module | None:
        """vLLM's model if it lives in this process, else None."""
        worker = getattr(getattr(self.llm.llm_engine, "model_executor", None), "driver_worker", None)
        get_model = getattr(worker, "get_model", None)
        return get_model() if callable(get_model) else None

    def load_adapter(self, folder: Path) -> None:
        """See `Client.load_adapter`."""
        from vllm.lora.request import LoRARequest

        previous = self._adapter
        self._adapter_id += 1
        self._adapter = LoRARequest(f"step-{self._adapter_id}", self._adapter_id, str(folder))
        with self._failing("loading the adapter"):
            if previous is not None:
                self.llm.llm_engine.remove_lora(previous.lora_int_id)
            self.llm.llm_engine.add_lora(self._adapter)

    def reset_cache(self) -> None:
        """See `Client.reset_cache`."""
        with self._failing("emptying its prefix cache"):
            if self.llm.reset_prefix_cache() is False:
                raise EngineError(f"vLLM did not empty its prefix cache: requests are still running. {RESUME}")

    def sleep(self, level: int) -> None:
        """See `Client.sleep`."""
        with self._failing("going to sleep"):
            self.llm.sleep(level=level)
        if level == 2:  # also discards what vLLM adds to the weights, such as padding
            self._loader.forget()

    def wake(self, tags: list[str]) -> None:
        """See `Client.wake`."""
        with self._failing("waking up"):
            self.llm.wake_up(tags=tags)

    def close(self) -> None:
        """See `Client.close`."""
        llm = self.__dict__.pop("llm", None)
        if llm is not None:
            with contextlib.suppress(Exception):
                llm.llm_engine.engine_core.shutdown()
            del llm
            if self._owns_group:
                from vllm.distributed import cleanup_dist_env_and_memory

                with contextlib.suppress(Exception):
                    cleanup_dist_env_and_memory()
        shutil.rmtree(self.scratch, ignore_errors=True)

    @contextlib.contextmanager
    def _failing(self, doing: str) -> Iterator[None]:
        if "llm" not in self.__dict__:
            raise EngineError("the vLLM of this trainer was closed: create a new trainer")
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM failed while {doing}: {_described(error)}\n{RESUME}") from error

    def _eager(self) -> Any:
        # On the CPU vLLM's first call would compile small C++ helpers for half a minute.
        return torch.compiler.set_stance("force_eager") if self.on_cpu else contextlib.nullcontext()


RESUME = (
    "Start the run again. If memory ran out, lower vllm_gpu_memory_utilization, vllm_max_model_length or "
    "per_device_train_batch_size. use_vllm=False continues without vLLM."
)


def scratch_folder() -> Path:
    """Create a temporary folder for the files that the engine reads."""
    return Path(tempfile.mkdtemp(prefix="grpo_ext_vllm_"))


def cached_folder(written: Path) -> Path:
    """Copy a folder into vLLM's cache directory, under a hash of its files.

    vLLM's compilation cache depends on the model's path: with a new path, each run would compile the model again.

    Args:
        written: contains config.json, and the model's code if the architecture is custom.

    Returns:
        The copy, or ``written`` itself if the cache cannot be written.
    """
    import_vllm()
    from vllm import envs

    digest = hashlib.sha256()
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(written)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    cached = Path(envs.VLLM_CACHE_ROOT) / "grpo_ext" / digest.hexdigest()[:32]
    config = cached / "config.json"
    staged: Path | None = None
    if not os.access(config, os.R_OK):
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(dir=cached.parent))
            shutil.copytree(written, staged, dirs_exist_ok=True)
            staged.chmod(0o755)  # the cache may be shared
            staged.rename(cached)
        except OSError:  # lost a race with another process, a full disk, or no permission
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)
    return cached if os.access(config, os.R_OK) else written


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(":")


def answer_of(output: Any, top: int) -> Answer:
    """Convert vLLM's ``CompletionOutput``; with ``top``, the first token's log probabilities too."""
    ids = list(output.token_ids)
    logps = [float(at[token].logprob) for token, at in zip(ids, output.logprobs, strict=True)]
    first = {token: float(value.logprob) for token, value in output.logprobs[0].items()} if top else {}
    return Answer(ids, logps, first)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Restore what starting vLLM changes: random states, and on the CPU `torch.set_num_threads`."""
    devices = [device] if device.type == "cuda" else []
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    import random

    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)

"""vLLM in the trainer's process: weights are handed over as tensors, nothing is sent anywhere."""

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
from grpo_ext.generation.vllm.placement import Placement, Sample, sampled
from grpo_ext.generation.vllm.weights import all_read

#: Ranks of LoRA adapters that vLLM has room for; one in between takes the next.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: Keys and values on the CPU, in bytes, unless VLLM_CPU_KVCACHE_SPACE (GiB) or vllm_engine_kwargs say otherwise.
CPU_CACHE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an engine in this process is built from.

    Attributes:
        dtype: of its weights.
        max_model_len: longest prompt and completion together, in tokens.
        max_num_seqs: completions at a time.
        seed: of its own random numbers.
        tensor_parallel_size: processes that share one copy of the weights.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and cache.
        sleep: whether it can give its memory back between generations.
        enforce_eager: no CUDA graphs, no compilation.
        lora_rank: of the adapters it will be given; 0 = none.
        external_launcher: whether its ranks are the trainer's processes (more than one process).
        extra: further arguments of ``vllm.LLM``; they win.
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
    """The package.

    Raises:
        ImportError: with the command that installs it.
    """
    # All are read when vllm is imported: the engine in this very process, no usage report over the network, and on
    # the CPU no threads tied to cores, which would tie the trainer's too.
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
        folder: of config.json, and of the weights when an adapter will be hot-loaded.
        settings: how the engine is built.
        device: the trainer's.
        scratch: what `close` removes, None = ``folder``.

    Raises:
        EngineError: when vLLM does not start.
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
        self._placement: Placement | None = None
        self._may_place = not self.on_cpu  # where vLLM packs its weights anew
        self._owns_group = not torch.distributed.is_initialized()
        with _undisturbed(device):
            try:
                self.llm = vllm.LLM(**self._arguments())
            except Exception as error:
                raise EngineError(
                    f"vLLM did not start: {_said(error)}\nWhat helps: too little memory, vllm_gpu_memory_utilization "
                    f"(now {settings.gpu_memory_utilization}) or a smaller vllm_max_model_length (now "
                    f"{settings.max_model_len}); a model that vLLM does not know, use_vllm=False; a second engine with "
                    "vllm_enable_sleep_mode, of which vLLM takes one per process, a new process; "
                    "vllm_engine_kwargs passes further arguments to vllm.LLM"
                ) from error

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        arguments: dict[str, Any] = {
            "model": str(self.folder),
            # An adapter is added to weights read from the folder; otherwise all of them are handed over.
            "load_format": "auto" if settings.lora_rank else "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # not the model's own sampling defaults
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
                answers = [_answer(output.outputs[0], top) for output in outputs]
            else:
                answers = self._one_by_one(prompts, params, top, answered)
        if len(answers) != len(prompts):
            raise EngineError(f"vLLM answered {len(answers)} of {len(prompts)} prompts. {RESUME}")
        return answers

    def _one_by_one(self, prompts: list[Any], params: Any, top: int, answered: Answered) -> list[Answer]:
        """What `LLM.generate` does, telling of each answer at the step that completes it: the same draws."""
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
                    answers[index] = _answer(output.outputs[0], top)
                    answered(index, answers[index])
        return [answers[index] for index in sorted(answers)]

    def load_weights(self, weights: Weights) -> None:
        """See `Client.load_weights`; the tensors are read where they are, from the second time on by plain copies."""
        with self._failing("taking over the weights"), all_read(iter(weights)) as iterator:
            if self._placement is not None:
                self._placement.copy(iterator)
                return
            samples: dict[str, Sample] = {}
            pairs = sampled(iterator, samples) if self._may_place else iterator
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            model = self._model() if self._may_place else None
            if model is not None:
                self._placement = Placement.found(model, samples)
            self._may_place = self._placement is not None

    def _model(self) -> torch.nn.Module | None:
        """vLLM's model, where it lives in this process."""
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
        if level == 2:  # what vLLM itself adds to the weights, padding for one, is dropped with them
            self._placement, self._may_place = None, False

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
            raise EngineError("the vLLM of this trainer was closed: make a new trainer")
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM failed while {doing}: {_said(error)}\n{RESUME}") from error

    def _eager(self) -> Any:
        # On the CPU vLLM would compile small helpers in C++ for half a minute at the first call.
        return torch.compiler.set_stance("force_eager") if self.on_cpu else contextlib.nullcontext()


RESUME = (
    "Start the run again. If it was memory, lower vllm_gpu_memory_utilization, vllm_max_model_length or "
    "per_device_train_batch_size; use_vllm=False goes on without vLLM."
)


def scratch_folder() -> Path:
    """A folder of this process for what the engine reads."""
    return Path(tempfile.mkdtemp(prefix="grpo_ext_vllm_"))


def kept_folder(written: Path) -> Path:
    """The files of a folder in one beside vLLM's cache, whose name follows from what is in them.

    That cache goes by the model's path: under a path of its own each run would compile the model again.

    Args:
        written: holds config.json, and the code of an architecture that comes with its own.

    Returns:
        ``written`` itself where nothing can be kept there.
    """
    import_vllm()
    from vllm import envs

    digest = hashlib.sha256()
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(written)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    kept = Path(envs.VLLM_CACHE_ROOT) / "grpo_ext" / digest.hexdigest()[:32]
    config = kept / "config.json"
    staged: Path | None = None
    if not os.access(config, os.R_OK):
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(dir=kept.parent))
            shutil.copytree(written, staged, dirs_exist_ok=True)
            staged.chmod(0o755)  # the cache may be shared
            staged.rename(kept)
        except OSError:  # another process was first, the disk is full, or the folder is not ours
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)
    return kept if os.access(config, os.R_OK) else written


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(":")


def _answer(output: Any, top: int) -> Answer:
    ids = list(output.token_ids)
    logps = [float(at[token].logprob) for token, at in zip(ids, output.logprobs, strict=True)]
    first = {token: float(value.logprob) for token, value in output.logprobs[0].items()} if top else {}
    return Answer(ids, logps, first)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Starting vLLM seeds torch anew and, on the CPU, takes `torch.set_num_threads` away: put both back."""
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

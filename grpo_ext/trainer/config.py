"""`GRPOConfig`: every parameter of a GRPO run, checked on construction."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from grpo_ext.config import FLOAT32_LARGEST, FLOAT32_SMALLEST, LossConfig, plain_value
from grpo_ext.generation.engine import SamplingParams
from grpo_ext.rollouts.batching import BatchPlan, plan_batches

DTYPES = ("float16", "bfloat16", "float32")
SCALE_REWARDS = ("group", "batch", "none")
VLLM_MODES = ("colocate", "server")
VLLM_LORA_MODES = ("adapter", "merged")


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


#: Keys that ``generation_kwargs`` rejects, with the remedy.
NOT_IN_GENERATION_KWARGS = {
    "temperature": "set temperature, by which the loss divides too, and eval_temperature",
    "seed": "set the field seed; a seed in each request makes all completions of a prompt equal",
    "num_return_sequences": "set num_generations",
    "n": "set num_generations",
    "num_beams": "remove it, since completions must be sampled from the policy",
}


@dataclasses.dataclass
class GRPOConfig(TrainingArguments):
    """Arguments of `GRPOTrainer`: all of `transformers.TrainingArguments`, and the fields below.

    ``per_device_train_batch_size`` counts completions, not prompts. After construction ``batch_plan`` holds
    the resolved batch numbers, and ``loss_config()`` returns the constants of the loss.

    Boolean and numeric fields reject strings. `HfArgumentParser` and the command line convert strings before.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the allowed values.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "vllm_engine_kwargs",
    ]

    # Defaults of TrainingArguments that do not suit this trainer.
    learning_rate: float = _field(
        1e-6, "Initial learning rate of the optimizer; a LoRA adapter needs about 100 times more."
    )
    logging_steps: float = _field(1, "Optimizer steps between two lines of metrics.")
    logging_nan_inf_filter: bool = _field(False, "True leaves non-finite losses out of the logged loss.")
    remove_unused_columns: bool | None = _field(
        False, "Has no effect: all columns of the dataset reach the reward functions."
    )

    # Model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained when the model is given as a name or a folder."},
    )
    dtype: str | None = _field(None, "Type of the weights: float16, bfloat16 or float32; None keeps the model's own.")

    # Loss
    loss_type: str = _field("dapo", "Objective and reduction: grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo or vespo.")
    importance_sampling_level: str = _field("token", "One ratio per token, or per sequence (GSPO).")
    num_iterations: int = _field(1, "Times that each generation batch is used for updates.")
    epsilon: float = _field(0.2, "Lower clip distance of the ratio.")
    epsilon_high: float | None = _field(
        None, "Upper clip distance of the ratio; for cispo the cap itself, such as 5.0; None = epsilon."
    )
    delta: float | None = _field(None, "Upper bound of the unclipped ratio (two-sided clipping); None = no bound.")
    beta: float = _field(0.0, "Weight of the KL term; a reference model is loaded only if it is not 0.")
    use_bias_correction_kl: bool = _field(False, "Multiply the KL term by the importance ratio.")
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus.")
    top_entropy_quantile: float = _field(
        1.0, "Share of tokens that keep their policy loss: those with the highest entropy."
    )
    off_policy_mask_threshold: float | None = _field(
        None,
        "Drop a sequence of negative advantage if its mean log probability fell by more than this; None = keep all.",
    )
    sapo_temperature_pos: float = _field(1.0, "sapo: slope of the gate for positive advantages.")
    sapo_temperature_neg: float = _field(1.05, "sapo: slope of the gate for the other advantages.")
    vespo_k_pos: float = _field(2.0, "vespo: power of the weight for advantages of at least 0.")
    vespo_lambda_pos: float = _field(3.0, "vespo: decay of the weight for advantages of at least 0.")
    vespo_k_neg: float = _field(3.0, "vespo: power of the weight for negative advantages.")
    vespo_lambda_neg: float = _field(2.0, "vespo: decay of the weight for negative advantages.")
    mask_truncated_completions: bool = _field(False, "Leave completions without an end token out of the loss.")

    use_fused_head: bool | None = _field(
        None,
        "Compute the loss from hidden states and head, without all the logits; None = if the model allows it, True = "
        "or fail, False = never.",
    )
    head_memory_budget: int | None = _field(
        None,
        "Bytes for the piece of the logits that the fused head holds at a time; more is faster; None = 512 MiB on a "
        "GPU, 128 MiB on the CPU.",
    )
    use_fused_lora: bool | None = _field(
        None,
        "Run PEFT's LoRA layers in three matrix products with their own backward; None = layers that allow it, True = "
        "all or fail, False = none.",
    )
    use_fused_norm: bool | None = _field(
        None,
        "Run RMSNorm layers in one kernel, in fp32 with a single rounding; None = layers that allow it, True = all or "
        "fail, False = none.",
    )

    skip_zero_gradient_sequences: bool = _field(
        True,
        "Leave completions with a known zero gradient out of forward and backward; logged entropy and ratios then "
        "cover the others.",
    )
    max_nonfinite_steps: int = _field(
        3, "Steps with a non-finite loss or gradient are skipped; this many in a row raise an error."
    )
    sync_ref_model: bool = _field(False, "Move the reference model towards the policy during the run.")
    ref_model_mixup_alpha: float = _field(0.6, "Share of the policy in the reference model after a sync.")
    ref_model_sync_steps: int = _field(512, "Optimizer steps between two syncs.")

    # Rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function; None = 1.0 each."}
    )
    # HfArgumentParser reads only booleans for `str | bool`. "true" and "false" are texts of its command line.
    scale_rewards: Literal["group", "batch", "none", "true", "false", True, False] = _field(
        "group",
        "Divide advantages by the standard deviation of the group, of the batch, or not at all (none).",
    )

    score_while_generating: bool = _field(
        False,
        "Score each prompt's completions in a separate thread as soon as they are complete; False = all together after "
        "generation.",
    )

    # Generation
    num_generations: int = _field(
        8, "Completions per prompt; the advantage compares each with the others of its prompt."
    )
    max_prompt_length: int | None = _field(
        None, "Cut longer prompts to their last max_prompt_length tokens; None = no limit."
    )
    max_completion_length: int = _field(512, "Longest completion in tokens.")
    temperature: float = _field(1.0, "Sampling temperature; the loss divides the logits by it too.")
    top_p: float = _field(1.0, "Sample from the smallest set of tokens with this total probability; 1 = all.")
    top_k: int | None = _field(None, "Sample from the k most probable tokens; None or 0 = all.")
    min_p: float | None = _field(
        None, "Sample from tokens with at least this share of the top token's probability; None = all."
    )
    repetition_penalty: float = _field(1.0, "Penalty of tokens that already occurred; 1 = none.")
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More fields of transformers.GenerationConfig; they override the fields above; temperature, seed "
            "and beams are errors."
        },
    )
    steps_per_generation: int | None = _field(
        None, "Micro-batches that a generation batch is cut into; None = gradient_accumulation_steps."
    )
    generation_batch_size: int | None = _field(
        None, "Rows of a generation batch over all processes; instead of steps_per_generation."
    )
    shuffle_dataset: bool = _field(True, "Shuffle the prompts in each epoch.")
    shuffle_completions: bool = _field(
        False, "Shuffle the rows of a generation batch before it is cut into micro-batches."
    )
    length_sorted_batches: bool = _field(
        False,
        "Sort completions by length within an optimizer step: less padding; changes gradients of bnpo and of "
        "top_entropy_quantile.",
    )
    fill_micro_batches: bool = _field(
        False,
        "Pack short completions into fewer micro-batches, none larger than one of the longest; changes gradients of "
        "bnpo and of top_entropy_quantile.",
    )
    padding_free: bool = _field(
        False,
        "Concatenate the sequences of a micro-batch instead of padding them; needs the fused head and a model that "
        "separates them.",
    )
    share_prompts: bool = _field(
        True,
        "Compute a prompt's keys and values once for all its completions in a micro-batch; on a GPU only if that saves "
        "time.",
    )

    # vLLM (the importance sampling fields act whenever an engine reports log probabilities)
    use_vllm: bool = _field(False, "Generate with vLLM.")
    vllm_mode: str = _field("colocate", "Run vLLM in this process (colocate) or use a running server (server).")
    vllm_lora_mode: str | None = _field(
        None,
        "How vLLM gets an adapter: adapter (hot-loaded) or merged (into the weights); None = merged in this process, "
        "adapter on a server.",
    )
    vllm_tensor_parallel_size: int = _field(1, "Processes that share one engine (colocate).")
    vllm_gpu_memory_utilization: float = _field(0.3, "Share of the GPU's memory for vLLM (colocate).")
    vllm_max_model_length: int | None = _field(
        None,
        "Longest prompt plus completion, in tokens (colocate); None = max_prompt_length + max_completion_length, or "
        "the model's context.",
    )
    vllm_enable_sleep_mode: bool = _field(False, "Release vLLM's GPU memory between generations.")
    vllm_sleep_level: int = _field(
        1,
        "Sleep mode: 1 keeps vLLM's weights in host memory, 2 drops them and loads all again; 2 needs "
        "vllm_lora_mode='merged'.",
    )
    vllm_enforce_eager: bool | None = _field(
        None, "Run vLLM without CUDA graphs and compilation (colocate); None = on the CPU only."
    )
    vllm_engine_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More arguments of vllm.LLM (colocate); they override the fields above."}
    )
    vllm_weight_check_bound: float | None = _field(
        None,
        "Largest allowed vllm/weight_check, in nats; None = 1e-3 in float32, 0.1 in float16, 0.5 in bfloat16; inf = "
        "report only.",
    )
    vllm_server_base_url: str | None = _field(
        None, "The server's address, such as http://127.0.0.1:8000; overrides host and port."
    )
    vllm_server_host: str = _field("127.0.0.1", "The server's host.")
    vllm_server_port: int = _field(8000, "The server's port.")
    vllm_server_allow_remote: bool = _field(
        False,
        "Allow a server on another host. It receives paths of weights; its API key comes from the environment variable "
        "VLLM_API_KEY.",
    )
    vllm_server_timeout: float = _field(240.0, "Seconds to wait for the server to start.")
    vllm_request_timeout: float = _field(600.0, "Seconds to wait for one response of the server.")
    vllm_sync_dir: str | None = _field(
        None,
        "Folder for weights and adapters on their way to the server, at the same path there; None = output_dir/vllm.",
    )
    vllm_importance_sampling_correction: bool = _field(
        True, "Weight tokens by the ratio of the trainer's to the engine's probability."
    )
    vllm_importance_sampling_mode: str = _field(
        "token_truncate", "One of token_truncate, token_mask, sequence_truncate and sequence_mask."
    )
    vllm_importance_sampling_cap: float = _field(2.0, "Upper bound of the importance weight.")
    vllm_importance_sampling_clip_max: float | None = _field(None, "Another name of the cap; overrides it if set.")
    vllm_importance_sampling_clip_min: float | None = _field(None, "Lower bound of the importance weight; None = 0.")

    # Evaluation
    num_generations_eval: int = _field(1, "Completions per prompt in evaluation.")
    eval_temperature: float = _field(0.0, "Sampling temperature of evaluation; 0 = greedy.")

    # Records
    log_completions: bool = _field(False, "Print a table of sample completions at every log.")
    num_completions_to_print: int | None = _field(
        8, "Rows of the table of sample completions; None = the whole generation batch."
    )
    save_completions: bool = _field(
        True, "Write every generation batch to output_dir/completions/ as JSON lines, one file each."
    )

    def __post_init__(self) -> None:
        for name, hint in _HINTS:
            value = plain_value(name, getattr(self, name), hint)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} must be a number, got nan")
            setattr(self, name, value)
        self._check_vllm()
        self._check_rewards()
        self._check_reference()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if (self.load_best_model_at_end or self.save_strategy == "best") and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "reward"
            self.greater_is_better = True
        fsdp: Any = self.fsdp
        if str(fsdp).lower() in ("true", "false"):  # from a command line
            self.fsdp: Any = str(fsdp).lower() == "true"
        super().__post_init__()
        self._read_generation_kwargs()
        self._check_generation()
        self.loss_config()
        if self.use_vllm and self.world_size % self.vllm_tensor_parallel_size:
            raise ValueError(
                f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size} must divide the number of processes "
                f"({self.world_size}): each group of that many shares one engine"
            )
        # One process uses one device; transformers would split a batch over all visible devices.
        self._n_gpu = min(self.n_gpu, 1)
        self.batch_plan: BatchPlan = plan_batches(
            self.per_device_train_batch_size,  # type: ignore[has-type]
            self.world_size,
            self.gradient_accumulation_steps,
            self.num_generations,
            self.num_iterations,
            self.steps_per_generation,
            self.generation_batch_size,
        )
        self.per_device_train_batch_size = self.batch_plan.per_device_batch_size

    def sampling(self, temperature: float | None = None) -> SamplingParams:
        """Return the sampling parameters; ``temperature`` replaces that of training."""
        return SamplingParams(
            self.max_completion_length,
            self.temperature if temperature is None else temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            dict(self.generation_kwargs or {}),  # type: ignore[arg-type]
        )

    def loss_config(self) -> LossConfig:
        """Return the constants of the loss, taken from the fields of the same names."""
        names = {f.name for f in dataclasses.fields(self)}
        return LossConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LossConfig) if f.name in names})

    def _check_generation(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: greedy completions of a prompt are all equal"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 or None = off), got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty <= FLOAT32_LARGEST:
            raise ValueError(f"repetition_penalty must be positive and finite, got {self.repetition_penalty}")
        if self.eval_temperature != 0 and not FLOAT32_SMALLEST <= self.eval_temperature <= FLOAT32_LARGEST:
            raise ValueError(
                f"eval_temperature must be 0 (greedy) or between 1.2e-38 and 3.4e38, got {self.eval_temperature}"
            )
        for name in (
            "max_completion_length",
            "max_prompt_length",
            "num_generations_eval",
            "num_completions_to_print",
            "max_nonfinite_steps",
            "head_memory_budget",
            "ref_model_sync_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_generations_eval > 1 and self.eval_temperature == 0:
            warnings.warn(
                f"num_generations_eval={self.num_generations_eval} with eval_temperature=0 repeats the same "
                "greedy completion: raise eval_temperature or leave num_generations_eval at 1",
                stacklevel=4,
            )

    def _read_generation_kwargs(self) -> None:
        """Move keys that have a field to that field, and reject keys that bypass the trainer."""
        given: dict[str, Any] = dict(self.generation_kwargs or {})  # type: ignore[arg-type]
        for name, remedy in NOT_IN_GENERATION_KWARGS.items():
            if given.get(name) is not None:
                raise ValueError(f"generation_kwargs has {name}={given[name]!r}: {remedy}")
        if given.pop("do_sample", True) is False:
            raise ValueError(
                "generation_kwargs has do_sample=False, and greedy completions of a prompt are all equal: remove it"
            )
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            value = given.pop(name, None)
            if value is not None:
                setattr(self, name, plain_value(f"generation_kwargs[{name!r}]", value, dict(_HINTS)[name]))
        self.generation_kwargs = given or None

    def _check_vllm(self) -> None:
        for name, allowed in (
            ("vllm_mode", VLLM_MODES),
            ("vllm_lora_mode", (None, *VLLM_LORA_MODES)),
            ("vllm_sleep_level", (1, 2)),
        ):
            if getattr(self, name) not in allowed:
                listed = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {listed}; got {getattr(self, name)!r}")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(f"vllm_gpu_memory_utilization must be in (0, 1], got {self.vllm_gpu_memory_utilization}")
        for name in ("vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_server_port"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("vllm_server_timeout", "vllm_request_timeout", "vllm_weight_check_bound"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        size = self.vllm_tensor_parallel_size
        if size > 1 and self.vllm_mode == "server":
            raise ValueError(
                f"vllm_tensor_parallel_size={size} needs vllm_mode='colocate': start a server with "
                "--tensor-parallel-size instead"
            )

        if self.use_vllm and self.vllm_mode == "server":
            from grpo_ext.generation.vllm.address import server_address, server_key

            server_address(self.vllm_server_address, self.vllm_server_allow_remote)
            server_key()

    @property
    def vllm_server_address(self) -> str:
        """Base URL of the vLLM server."""
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    def _check_reference(self) -> None:
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError(
                "sync_ref_model=True needs a reference model, and beta=0 loads none: set beta, or sync_ref_model=False"
            )

    def _check_rewards(self) -> None:
        for weight in self.reward_weights or ():
            if not math.isfinite(plain_value("reward_weights", weight, "float")):
                raise ValueError(f"reward_weights must be finite, got {self.reward_weights}")
        if str(self.scale_rewards).lower() in ("true", "false"):
            self.scale_rewards = "group" if str(self.scale_rewards).lower() == "true" else "none"
        if self.scale_rewards not in SCALE_REWARDS:
            raise ValueError(
                f"scale_rewards must be one of {', '.join(SCALE_REWARDS)}, True or False; got {self.scale_rewards!r}"
            )


#: Names and type annotations of the fields declared above.
_HINTS = [
    (field.name, str(field.type))
    for field in dataclasses.fields(GRPOConfig)
    if field.name in vars(GRPOConfig)["__annotations__"]
]

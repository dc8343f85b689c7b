"""What is asked of the model: batch, length, precision, optimizer, adapters, quantization."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, field_validator, model_validator

from memplan.errors import SpecError, UnsupportedError, did_you_mean
from memplan.specs._base import Names, NonNegativeInt, PositiveInt, Probability, Spec
from memplan.specs.software import SoftwareSpec

__all__ = [
    "KNOWN_OPTIMIZERS",
    "OPTIMIZERS",
    "PEFT_TYPES",
    "STEPS_ONLY",
    "UNMODELLED_OPTIMIZERS",
    "AllocatorSpec",
    "LoraSpec",
    "QuantizationSpec",
    "TrainingSpec",
]

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
MixedPrecision: TypeAlias = Literal["no", "bf16", "fp16"]
Attention: TypeAlias = Literal["eager", "sdpa", "flash_attention_2"]
Head: TypeAlias = Literal[
    "causal-lm", "base", "sequence-classification", "seq2seq-lm", "masked-lm", "image-classification"
]
DeviceMap: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential"]

OPTIMIZERS: dict[str, str] = {
    "adamw_torch": "torch.optim.AdamW with its default implementation: foreach on CUDA, a loop on CPU",
    "adamw_torch_fused": "torch.optim.AdamW(fused=True)",
    "adamw_torch_foreach": "torch.optim.AdamW(foreach=True), whatever the device; memplan's own name",
    "adamw_torch_loop": "torch.optim.AdamW(foreach=False), one parameter at a time; memplan's own name",
    "adamw_bnb_8bit": "bitsandbytes AdamW, 8-bit states",
    "adamw_8bit": "the same as adamw_bnb_8bit",
    "paged_adamw_32bit": "bitsandbytes AdamW, 32-bit states in unified memory",
    "paged_adamw_8bit": "bitsandbytes AdamW, 8-bit states in unified memory",
    "adafactor": "transformers Adafactor, factored second moment",
    "sgd": "torch.optim.SGD",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "lion_32bit": "bitsandbytes Lion, 32-bit momentum",
    "lion_8bit": "bitsandbytes Lion, 8-bit momentum",
    "paged_lion_32bit": "bitsandbytes Lion, 32-bit momentum in unified memory",
    "paged_lion_8bit": "bitsandbytes Lion, 8-bit momentum in unified memory",
    "muon": "torch.optim.Muon for matrices and AdamW for the rest; the Trainer has no name for it",
}
"""The optimizers memplan models, with what each is. Names as in transformers 5.23 ``OptimizerNames``."""

UNMODELLED_OPTIMIZERS: frozenset[str] = frozenset(
    {
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
        "adamw_apex_fused",
        "adamw_hf",
        "adamw_anyprecision",
        "adamw_torch_4bit",
        "adamw_torch_8bit",
        "ademamix",
        "ademamix_8bit",
        "paged_ademamix_32bit",
        "paged_ademamix_8bit",
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
        "galore_adamw",
        "galore_adamw_8bit",
        "galore_adafactor",
        "galore_adamw_layerwise",
        "galore_adamw_8bit_layerwise",
        "galore_adafactor_layerwise",
        "lomo",
        "adalomo",
        "grokadamw",
        "schedule_free_radam",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "apollo_adamw",
        "apollo_adamw_layerwise",
        "stable_adamw",
    }
)
"""Names that transformers (5.23, or 4.x for adamw_hf and adamw_apex_fused) accepts and memplan refuses by name."""

KNOWN_OPTIMIZERS: frozenset[str] = UNMODELLED_OPTIMIZERS.union(OPTIMIZERS)


def _optimizer(value: object) -> str:
    if isinstance(value, str) and value in OPTIMIZERS:
        return value
    if isinstance(value, str) and value in UNMODELLED_OPTIMIZERS:
        # Not a ValueError, so it leaves the validation as it is.
        raise UnsupportedError(
            f"optim: {value!r} is known to transformers, but memplan has no rule for its states and "
            f"temporaries. Use one of {', '.join(OPTIMIZERS)}."
        )
    raise SpecError.at("", value, "is not an optimizer of TrainingArguments", did_you_mean(str(value), OPTIMIZERS))


class LoraSpec(Spec):
    """LoRA adapters as ``peft.LoraConfig`` makes them: A is [rank, in], B is [out, rank]."""

    rank: PositiveInt
    """``r``: rows of A, columns of B."""
    targets: Names = ()
    """``target_modules``: names matched as PEFT does; empty means PEFT's mapping for the model type."""
    dropout: Probability = 0.0
    """``lora_dropout``: above 0 each adapter saves a mask and a dropped copy of its input."""
    alpha: PositiveInt | None = None
    """``lora_alpha``: a scale; it needs no memory. None is PEFT's default."""
    modules_to_save: Names = ()
    """Modules that are copied and trained in full, next to their frozen originals."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    autocast_adapter_dtype: bool = True
    """Adapters of 16-bit models are kept in float32, as PEFT does by default."""


class QuantizationSpec(Spec):
    """Quantized weights as bitsandbytes holds them; the output head and embeddings are not quantized."""

    kind: Literal["none", "int8", "nf4", "nf4-dq"]
    """LLM.int8(), NF4 in blocks of 64, or NF4 with its scales quantized again (double quantization)."""
    prepare_for_kbit_training: bool = True
    """Call ``peft.prepare_model_for_kbit_training``: what is not quantized goes to float32."""
    compute_dtype: Dtype | None = None
    """``bnb_4bit_compute_dtype``; None is the mixed-precision type of the run, or else its dtype."""
    quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = "uint8"
    """``bnb_4bit_quant_storage``: what 4-bit weights are packed into. FSDP shards floating types only."""
    peft_module_casting_to_bf16: bool = False
    """Call TRL's function of that name after LoRA: embeddings and heads in float32 go to bfloat16 again."""
    bf16_adapters: bool = False
    """What is trained is cast to bfloat16 after LoRA, as TRL does since 0.26, and before 0.9 under bf16."""


class AllocatorSpec(Spec):
    """What ``PYTORCH_ALLOC_CONF`` sets, by torch's names; text such as ``expandable_segments:True`` will do."""

    expandable_segments: bool = False
    """Segments grow, so that hardly anything is lost between blocks."""
    max_split_size_mb: PositiveInt | None = None
    """Blocks above this many MiB are not split."""
    max_non_split_rounding_mb: PositiveInt = 20
    """MiB by which an unsplit block may exceed its request."""
    roundup_power2_divisions: NonNegativeInt = 0
    """Round requests up to steps of a power of two; 0 does not. One number for all sizes."""
    large_segment_size_mb: PositiveInt = 20
    """MiB of the segments that requests of 1 to 10 MiB share."""

    @model_validator(mode="after")
    def _torch_takes_it(self) -> AllocatorSpec:
        least = 21  # CUDAAllocatorConfig: max_split_size_mb must be larger than a large segment of 20 MiB
        if self.max_split_size_mb is not None and self.max_split_size_mb < least:
            raise SpecError.at(
                "max_split_size_mb", self.max_split_size_mb, "is refused by torch", f"Use {least} or more."
            )
        divisions = self.roundup_power2_divisions
        if divisions & (divisions - 1):
            raise SpecError.at("roundup_power2_divisions", divisions, "is not a power of 2", "Use 0, 1, 2, 4, 8 or 16.")
        if self.large_segment_size_mb < 10:
            remedy = "Use 10 or more."
            raise SpecError.at("large_segment_size_mb", self.large_segment_size_mb, "is too small to be shared", remedy)
        return self


_NO_GPU_MEMORY = frozenset(
    {
        "release_lock_on_cudamalloc",
        "pinned_use_cuda_host_register",
        "pinned_num_register_threads",
        "pinned_use_background_threads",
    }
)
"""Settings of the allocator that change no byte on a GPU."""
_UNMODELLED_SETTINGS = frozenset(
    {"garbage_collection_threshold", "per_process_memory_fraction", "graph_capture_record_stream_reuse", "backend"}
)

_SETTINGS = frozenset(AllocatorSpec.model_fields).union(_NO_GPU_MEMORY, _UNMODELLED_SETTINGS)


def _alloc_conf(value: object) -> object:
    """The text of the environment variable as a mapping."""
    if not isinstance(value, str):
        return value
    settings: dict[str, object] = {}
    for pair in filter(None, (part.strip() for part in value.split(","))):
        name, colon, setting = (part.strip() for part in pair.partition(":"))
        if not colon or not setting:
            raise SpecError.at("", value, "is not what PYTORCH_ALLOC_CONF takes", "Write NAME:VALUE,NAME:VALUE.")
        if name not in _SETTINGS:
            raise SpecError.at("", name, "is not a setting of PYTORCH_ALLOC_CONF", did_you_mean(name, _SETTINGS))
        if name in _UNMODELLED_SETTINGS and pair.replace(" ", "") != "backend:native":
            raise UnsupportedError(f"alloc_conf: {pair!r} is not modelled. Leave it out.")
        if name not in _NO_GPU_MEMORY and name != "backend":
            settings[name] = _setting(name, setting)
    return settings


def _setting(name: str, setting: str) -> object:
    if setting.lower() in ("true", "false"):
        return setting.lower() == "true"
    if setting.isascii() and setting.isdigit():
        return int(setting)
    raise SpecError.at(name, setting, "is not a number, True or False", "Write it as torch does.")


PEFT_TYPES: frozenset[str] = frozenset(
    {
        *("adalora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "cpt", "deft", "delora"),
        *("fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha", "lokr", "miss"),
        *("multitask_prompt_tuning", "oft", "osf", "p_tuning", "peanut", "poly", "prefix_tuning", "prompt_tuning"),
        *("psoft", "pvera", "randlora", "road", "shadow", "shira", "supertuning", "tinylora", "trainable_tokens"),
        *("unilora", "vblora", "vera", "waveft", "xlora"),
    }
)
"""PEFT's methods (``PeftType``, 0.21) besides LoRA."""


def _peft_type(value: object) -> object:
    name = value.lower().replace("-", "_") if isinstance(value, str) else value
    if name in PEFT_TYPES:
        # Not a ValueError, so it leaves the validation as it is.
        raise UnsupportedError(
            f"peft_type: {value!r} is not modelled. Use lora, or trace the adapted module in Python: "
            "memplan.estimate(peft_model)."
        )
    if name is not None and name != "lora":
        raise SpecError.at("", value, "is not a method of PEFT", did_you_mean(str(value), ["lora", *PEFT_TYPES]))
    return name


def _quantization(value: object) -> object:
    """``"nf4"`` is short for its kind, and kind none is no quantization."""
    kind = (
        value.kind if isinstance(value, QuantizationSpec) else value.get("kind") if isinstance(value, dict) else value
    )
    if kind == "none":
        return None
    return {"kind": value} if isinstance(value, str) else value


class TrainingSpec(Spec):
    """A training run (or a loading, or a generation), per GPU. Names follow HF ``TrainingArguments``.

    Raises SpecError for a wrong field or combination, UnsupportedError for an optimizer that
    transformers knows and memplan does not model.
    """

    micro_batch_size: PositiveInt = 1
    """Sequences per GPU in one forward: ``per_device_train_batch_size``."""
    seq_len: PositiveInt = 2048
    """Tokens per sequence."""
    grad_accum_steps: PositiveInt = 1
    """Micro-batches per optimizer step: ``gradient_accumulation_steps``."""
    optim: Annotated[str, BeforeValidator(_optimizer)] = "adamw_torch_fused"
    """One of :data:`OPTIMIZERS`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """What ``from_pretrained(dtype=...)`` loads; auto is the checkpoint's. None depends on the strategy:
    float32 for single, DDP and FSDP, the 16-bit type for DeepSpeed (:mod:`memplan.specs.precision`)."""
    mixed_precision: MixedPrecision | None = None
    """``TrainingArguments(bf16=..., fp16=...)``. None is bf16, or fp16 on a GPU without bf16."""
    attn: Attention = "sdpa"
    """``attn_implementation``."""
    gradient_checkpointing: bool = False
    """Keep each block's input only and run the block again in the backward."""
    use_reentrant: bool | None = None
    """Of ``gradient_checkpointing_kwargs``; None is transformers' default: false, and true before 5.0."""
    liger: bool = False
    """``use_liger_kernel``: the loss is computed from the hidden states in chunks."""
    keeps_outputs: bool = False
    """A loop of one's own holds what the model returned, logits above all, while its loss goes backward, as in
    ``outputs = model(**batch); outputs.loss.backward()``. The Trainer keeps the loss alone."""
    packed: bool = True
    """Sequences are full, so there is no attention mask; False is a padded batch with a mask."""
    head: Head | None = None
    """What stands on the model; None is what the config's architecture says."""
    vocab_size: PositiveInt | None = None
    """Resize the token embeddings to this; None keeps the config's."""
    eval_batch_size: PositiveInt | None = None
    """``per_device_eval_batch_size``; None is a run without evaluation."""
    eval_accumulation_steps: PositiveInt | None = None
    """Batches whose logits stay on the GPU in evaluation, with ``compute_metrics``; None is the Trainer's evaluation
    without it, which keeps the losses only."""
    peft_type: Annotated[Literal["lora"] | None, BeforeValidator(_peft_type)] = None
    """PEFT's method: lora, which ``lora`` describes. The others are refused by name."""
    lora: LoraSpec | None = None
    """Train adapters, with the model frozen."""
    quantization: Annotated[QuantizationSpec | None, BeforeValidator(_quantization)] = None
    """Quantize the frozen weights; a kind alone, as text, will do."""
    alloc_conf: Annotated[AllocatorSpec | None, BeforeValidator(_alloc_conf)] = None
    """``PYTORCH_ALLOC_CONF``; None is torch's default."""
    task: Literal["train", "load", "generate"] = "train"
    """What the run does."""
    device_map: DeviceMap | None = None
    """How loading spreads layers over devices; None puts the model on one."""
    max_new_tokens: PositiveInt | None = None
    """Tokens to generate after ``seq_len`` tokens of prompt; for task generate."""

    @field_validator("lora", mode="before")
    @classmethod
    def _lora_of_rank(cls, value: object) -> object:
        return {"rank": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _combinations(self) -> TrainingSpec:
        if self.max_new_tokens is not None and self.task != "generate":
            raise SpecError.at("max_new_tokens", self.max_new_tokens, f"has no use in task {self.task}", _TASK)
        if self.task != "train":
            self._without_training()
        if self.eval_accumulation_steps is not None and self.eval_batch_size is None:
            problem, remedy = "has no evaluation to accumulate over", "Give --eval-batch-size too."
            raise SpecError.at("eval_accumulation_steps", self.eval_accumulation_steps, problem, remedy)
        if (self.eval_accumulation_steps or 0) > MOST_ACCUMULATED:
            problem, remedy = "is more batches than any memory holds", f"Use at most {MOST_ACCUMULATED}."
            raise SpecError.at("eval_accumulation_steps", self.eval_accumulation_steps, problem, remedy)
        if self.peft_type == "lora" and self.lora is None:
            raise SpecError.at("peft_type", self.peft_type, "needs a rank", "Give --lora-rank.")
        if self.device_map is not None and self.task == "train":
            remedy = "Use --task load or --task generate; to train on several GPUs choose a --strategy."
            raise SpecError.at(
                "device_map", self.device_map, "spreads one copy of the model, which task train does not", remedy
            )
        if self.quantization is not None and self.lora is None and self.task == "train":
            # transformers Trainer: "You cannot perform fine-tuning on purely quantized models."
            remedy = "Give --lora-rank, or leave --quantization out."
            raise SpecError.at("quantization", self.quantization.kind, "has no trainable weights", remedy)
        return self

    def reentrant(self, software: SoftwareSpec) -> bool:
        """Whether checkpointed blocks are torch's CheckpointFunction (gradient_checkpointing_enable())."""
        return not software.at_least("transformers", "5") if self.use_reentrant is None else self.use_reentrant

    def _without_training(self) -> None:
        """Adapters may be loaded and run with; what only a training step has may not be given."""
        for name in STEPS_ONLY:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default or (name == "optim" and name in self.model_fields_set):
                remedy = "Leave it out, or use --task train."
                raise SpecError.at(name, value, f"has no use in task {self.task}", remedy)


MOST_ACCUMULATED = 2**16
"""Batches of logits that are looked at one by one: each makes what is kept of all before it anew."""
STEPS_ONLY = (
    "grad_accum_steps", "optim", "gradient_checkpointing", "use_reentrant", "liger", "eval_batch_size", "keeps_outputs",
    "eval_accumulation_steps",
)  # fmt: skip
"""Fields of a training step, which loading and generation do not have."""
_TASK = "Use --task generate, or leave it out."

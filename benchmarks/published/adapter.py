"""A row of published measurements becomes a setup, or says why not. The columns are those of memory.csv.

What a column says is read by ``reading.py``; here are what one column means beside another, the models and GPUs by
name, the versions of the time, and what is known of the programs that measured. A setup carries ``notes``: what the row
leaves open, and what was taken for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import reading
from compare import AUTO
from reading import Notes, RefusedError, not_stated, plain
from releases import RELEASES, month_in, month_of, newest, of_trl

from memplan.adapters.lora import ALL_LINEAR, LINEAR
from memplan.architectures.nn import Build
from memplan.architectures.registry import FAMILIES, attention_implementations, build_model
from memplan.case import model_spec
from memplan.catalog.gpus import all_gpus, find_gpu
from memplan.catalog.models import all_models, lookup
from memplan.errors import MemplanError, SpecError
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import OLDEST, SoftwareSpec
from memplan.specs.strategy import FsdpSpec, Strategy, ZeroSpec
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32
from memplan.units import GiB

HERE = Path(__file__).parent
COLUMNS = (
    "id", "source", "model", "task", "gpu", "n_gpus", "framework", "framework_version_if_known", "weight_dtype",
    "mixed_precision", "optimizer", "method", "zero_stage_or_fsdp", "offload", "gradient_checkpointing", "attention",
    "compile", "fused_loss", "micro_batch", "seq_len", "packed_or_padded", "grad_accum", "measured_GiB", "metric",
    "confidence", "note",
)  # fmt: skip
"""Of memory.csv, and of any file that score.py takes."""
PER_NODE = 8
"""GPUs of a node, where a row has more of them."""


@dataclass(frozen=True)
class Setup:
    """What the estimator is asked."""

    model: ModelSpec
    training: TrainingSpec
    cluster: ClusterSpec
    strategy: Strategy
    software: SoftwareSpec
    notes: tuple[str, ...]
    capacity_known: bool = True
    """Whether the row says which of several boards the GPU is; without that it says nothing of fitting."""

    def to_dict(self) -> dict[str, Any]:
        """What was asked, without what is a default."""
        return {
            "model": self.model.id,
            "training": self.training.model_dump(mode="json", exclude_defaults=True),
            "strategy": self.strategy.model_dump(mode="json", exclude_defaults=True),
            "gpu": self.cluster.gpu.name if isinstance(self.cluster.gpu, GPUSpec) else None,
            "gpus": self.cluster.gpus,
            "nodes": self.cluster.nodes,
            "gpu_memory": self.cluster.gpu_memory,
            "software": self.software.model_dump(mode="json", exclude_unset=True),
        }


@dataclass(frozen=True)
class Framework:
    """What is known of a program that measured, and not said in the columns."""

    pattern: str
    refused: str = ""
    double_quant: bool = False
    prepares: bool = True
    """Whether ``prepare_model_for_kbit_training`` is called on quantized models."""
    cpu_ram_efficient_loading: bool = False
    """Of its accelerate config, under FSDP."""
    trl: bool = False
    """Whether TRL's SFTTrainer puts the adapters on."""


FRAMEWORKS = (
    Framework(r"torchtitan|torchtrain", "has implementations of its own of the models"),
    Framework(r"torchtune", "has implementations of its own of the models"),
    Framework(r"unsloth", "replaces transformers' kernels"),
    Framework(r"foak|fast[-_ ]?kernels", "replaces transformers' kernels"),
    Framework(r"gptq", "has GPTQ weights"),
    Framework(r"torch\.?[-_ ]?compile\b|inductor", "compiles the model"),
    Framework(r"own loss", "does not take the loss from the model"),
    Framework(

        r"megatron|nemo\b|litgpt|lit-gpt|lit-llama|nanogpt|fairseq|gpt-neox\b|mosaic|composer|llm-foundry|maxtext|\bjax\b"
        r"|tensorflow|colossal|paddle|mindspore|nanotron|picotron|levanter|easylm|\bmlx\b|\bxla\b|oslo|olmo[-_ ]core"
        r"|mistral-(finetune|inference)|gpt-fast|metaseq|internevo|veomni|axlearn|fairscale|exllama|llama\.cpp|vllm"
        r"|sglang|\btgi\b|text-generation-inference|tensorrt|deepspeed[-_ ]?(mii|inference|chat)|ctranslate|llamafile"
        r"|ollama",
        "is not transformers' implementation",
    ),
    Framework(r"pycuda|torch\.distributed$", "measures no model"),
    Framework(r"baseline-peft-bnb", double_quant=True, cpu_ram_efficient_loading=True, trl=True),
    Framework(r"accelerated-peft-bnb", double_quant=True, prepares=False, cpu_ram_efficient_loading=True),
    Framework(r"llama[-_ ]?factory", double_quant=True, prepares=False),
    Framework(r"axolotl", double_quant=True),
    Framework(r"\btrl\b|sft_?trainer", trl=True),
    Framework(
        r"\bhf\b|hugging ?face|transformers|trl|trainer|sft|accelerate|peft|deepspeed|llama-(recipes|cookbook)|finetune"
        r"|fastchat|alpaca|swift|xtuner|h2o|autotrain|open-instruct|lmflow|fsdp_qlora|pytorch|firefly"
    ),
)  # fmt: skip
"""In this order the first that matches counts. Sources: fms-acceleration 876e2ed (defaults.yaml and accelerate.yaml in
scripts/benchmarks, plugins/accelerated-peft), LLaMA-Factory 0.9 (hparams/model_args.py,
model/model_utils/quantization.py), axolotl 0.8 (src/axolotl/loaders/model.py)."""

STAND_INS = {
    "qwen-1_8b": "qwen1-1_8b", "qwen-7b": "qwen1-7b", "qwen-14b": "qwen1-14b", "qwen-72b": "qwen1-72b",
    "qwen-1_8b-chat": "qwen1-1_8b", "qwen-7b-chat": "qwen1-7b", "qwen-14b-chat": "qwen1-14b",
    "qwen-72b-chat": "qwen1-72b",
}  # fmt: skip
"""Models that are remote code, and the shapes of models.json that stand for them."""
_OF_STAND_IN = {
    "c_attn": ("q_proj", "k_proj", "v_proj"), "c_proj": ("o_proj", "down_proj"), "w1": ("up_proj",),
    "w2": ("gate_proj",), "wte": ("embed_tokens",),
}  # fmt: skip


def setup(row: Mapping[str, str]) -> Setup:
    """The setup of a row. Raises RefusedError with the reason, or a MemplanError where memplan itself refuses it."""
    notes: Notes = []
    task = _task(row["task"])
    framework = _framework(row["framework"], notes)
    reading.compiled(row["compile"])
    method = reading.method(row["method"], task, row["framework"], notes)
    gpus = reading.count("n_gpus", row["n_gpus"], notes)
    liger = task == "train" and reading.fused_loss(row["fused_loss"], row["framework"], row["method"])
    model, head, stand_in = _model_named(row["model"], notes)
    cluster, capacity_known = _cluster(row["gpu"], gpus, reading.nodes(row["n_gpus"]), notes)
    software = _software(row, notes)
    precision = reading.precision(
        row["weight_dtype"], row["mixed_precision"], row["method"], task == "infer", framework.double_quant, notes
    )
    has_sdpa = software.at_least("transformers", "4.36") and "sdpa" in attention_implementations(model.model_type)
    attn = reading.attention(row["attention"], has_sdpa, notes)
    fields: dict[str, Any] = {
        "dtype": precision.dtype,
        "mixed_precision": precision.mixed,
        "attn": attn,
        "micro_batch_size": reading.count("micro_batch", row["micro_batch"], notes),
    }
    if task == "infer":
        if gpus > 1:
            raise RefusedError("n_gpus", row["n_gpus"], "a generation over several GPUs is not scored")
        if precision.quantization:
            fields["quantization"] = QuantizationSpec(kind=precision.quantization, prepare_for_kbit_training=False)
        prompt, new = reading.prompt_and_new(row["seq_len"], notes)
        training = TrainingSpec(task="generate", seq_len=prompt, max_new_tokens=new, **fields)
        return Setup(model, training, cluster, Strategy(), software, tuple(notes), capacity_known)
    engine = reading.engine(row["zero_stage_or_fsdp"], gpus, row["framework"], notes)
    strategy = _strategy(engine, row["offload"], software, framework, notes)
    _agree(row, strategy, precision.dtype)
    fields |= {
        "optim": reading.optimizer(row["optimizer"], notes),
        "gradient_checkpointing": reading.checkpointing(row["gradient_checkpointing"], notes),
        "use_reentrant": reading.reentrant(row["gradient_checkpointing"]),
        "liger": liger,
        "packed": _packed(row["packed_or_padded"], attn, notes),
        "grad_accum_steps": reading.count("grad_accum", row["grad_accum"], notes, default=1),
        "seq_len": _within_positions(model, reading.length(row["seq_len"], notes), notes),
        "head": head,
        "keeps_outputs": re.search(r"\bkeeps (?:the )?outputs\b", row["framework"].lower()) is not None,
    }
    if fields["liger"] and not software.at_least("transformers", "5.0"):
        notes.append("software: Liger before 0.8 is not modelled, the first transformers of 0.8 taken, 5.0")
        software = software.replace(transformers="5.0")
    if method.kind == "lora":
        fields["lora"] = _lora(method, model, head, stand_in, precision, software, notes)
    if precision.quantization:
        trl = of_trl(_version_of_trl(row), _month(row)) if framework.trl else None
        fields["quantization"] = _quantization(precision, framework, trl, strategy, notes)
    return Setup(model, TrainingSpec(**fields), cluster, strategy, software, tuple(notes), capacity_known)


_TASKS = ("train", "fine", "sft", "pre", "lora", "infer", "generat", "decod")
_TASK_FORMS = (
    r"train(?:ing)?", r"fine-? ?tun(?:e|ing|ed)", r"sft", r"pre-?train(?:ing)?", r"q?lora", r"full", r"supervised",
    r"infer(?:ence)?", r"generat(?:e|ion|ing)", r"decod(?:e|ing)", r"causal", r"language", r"model(?:l?ing)?", r"lm",
    r"step",
)  # fmt: skip


def _task(text: str) -> str:
    low = plain(text)
    if low not in reading.BLANK and low.startswith(_TASKS):
        reading.complete("task", text, *_TASK_FORMS)
    if re.match(r"train|fine-?tun|sft|pre-?train|lora", low):
        return "train"
    if re.match(r"infer|generat|decod", low):
        return "infer"
    if low in reading.BLANK:
        not_stated("task", text)
    raise RefusedError("task", text, "is neither training nor generation")


def _framework(text: str, notes: Notes) -> Framework:
    low = text.lower()
    if plain(text) in reading.BLANK:
        notes.append("framework: is not stated, transformers taken")
        return Framework("")
    for known in FRAMEWORKS:
        if re.search(known.pattern, low):
            if known.refused:
                raise RefusedError("framework", text, known.refused)
            return known
    raise RefusedError("framework", text, "is not known to run transformers' models", "not stated")


# -- models -----------------------------------------------------------------------------------------------------------

_OTHER_WEIGHTS = re.compile(
    r"gptq|awq|gguf|exl2|fp8|aqlm|[-_ ]int[48]\b|[-_ ][48]bit\b|mlx|onnx|vision|vlm|internvl|[-_]vl\b|-vl-",
    re.IGNORECASE,
)
_TUNED = re.compile(r"(-(instruct|chat|it|base|sft|dpo|hf|instruct-sft|hf-instruct))+$")
_HEADS = (("sequence-?_?classification", "sequence-classification"), ("causal-?_?lm", "causal-lm"))


_MODEL_NOTES = (
    r"(?:for)?sequence-?_?classification", r"(?:for)?causal-?_?lm", r"\d+(?:\.\d+)?[bm](?: parameters)?", r"base",
    r"chat", r"instruct", r"hf", r"hugging ?face", r"dense",
)  # fmt: skip
"""What may stand in parentheses behind a name."""


def _model_named(text: str, notes: Notes) -> tuple[ModelSpec, str | None, bool]:
    """The model, the head that the text names, and whether it is a stand-in."""
    low = plain(text)
    if low in reading.BLANK or low in ("(none)", "none") or not plain(text):
        not_stated("model", text)
    if found := _OTHER_WEIGHTS.search(text):
        raise RefusedError("model", text, f"has weights or parts that memplan does not model ({found[0].strip('-_ ')})")
    head = next((head for pattern, head in _HEADS if re.search(pattern, text.lower())), None)
    reading.complete("model", reading.in_parentheses(text), *_MODEL_NOTES, whole=text)
    name = re.sub(r"\([^()]*\)", " ", text).strip().rstrip(",;").strip()
    name = re.sub(r"\s+(architecture|model|arch)$", "", name, flags=re.IGNORECASE)
    if plain(name).rpartition("/")[2] in STAND_INS:
        shapes = json.loads((HERE / "models.json").read_text(encoding="utf-8"))
        notes.append(f"model: {name} is remote code, its shapes stand in a qwen2")
        return model_spec(shapes[STAND_INS[plain(name).rpartition("/")[2]]]).replace(id=name), head, True
    known = lookup(name)
    if known is not None:
        return model_spec(known.config).replace(id=name), head, False
    if "/" in name:
        try:
            return model_spec(name), head, False
        except SpecError:
            pass
    candidates = _by_key(name)
    if len(candidates) == 1:
        notes.append(f"model: {name!r} taken for {candidates[0]}")
        found_model = lookup(candidates[0])
        assert found_model is not None
        return model_spec(found_model.config).replace(id=candidates[0]), head, False
    if candidates:
        not_stated("model", text, f"may be {', '.join(candidates[:4])}")
    raise RefusedError("model", text, "is not in the catalog or the local cache", "not known")


def _key(name: str) -> str:
    tail = _TUNED.sub("", name.lower().rpartition("/")[2].replace("_", "-").replace(" ", "-"))
    return re.sub(r"^metallama", "llama", re.sub(r"[^a-z0-9]", "", tail))


@cache
def _keys() -> dict[str, tuple[str, ...]]:
    keys: dict[str, list[str]] = {}
    for model in all_models():
        for name in (model.id, *model.aliases):
            ids = keys.setdefault(_key(name), [])
            if model.id not in ids:
                ids.append(model.id)
    return {key: tuple(ids) for key, ids in keys.items()}


def _by_key(name: str) -> list[str]:
    """The catalog's models of a name, whatever its case, punctuation, organisation and tuning; of one config one."""
    different: dict[str, str] = {}
    for id in _keys().get(_key(name), ()):
        model = lookup(id)
        assert model is not None
        sizes = {key: value for key, value in model.config.items() if not key.endswith("_token_id")}
        different.setdefault(json.dumps(sizes, sort_keys=True), id)
    return list(different.values())


def _within_positions(model: ModelSpec, length: int, notes: Notes) -> int:
    """A tokenizer cuts sequences to the model's learned positions, beyond which a run would die."""
    config = model.config
    kind = config.get("model_type")
    last = (
        config.get("n_positions")
        if kind in ("gpt2", "gpt_bigcode", "openai-gpt")
        else config.get("max_position_embeddings")
    )
    learned = ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "bert", "roberta", "distilbert", "vit")
    if kind in learned and isinstance(last, int) and length > last:
        notes.append(f"seq_len: {length}: the model's positions end at {last}")
        return last
    return length


# -- hardware ---------------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*-?\s*(gib|gb|g)\b", re.IGNORECASE)


_GPU_NOTES = (
    r"\d+(?:\.\d+)? ?-?gi?b", r"hbm\d?e?", r"gddr\dx?", r"sxm\d?", r"pcie", r"nvlink", r"each", r"per gpu", r"nvidia",
    r"memory", r"vram", r"ampere", r"hopper", r"ada", r"volta", r"turing",
)  # fmt: skip
"""What may stand in parentheses behind a GPU."""


_BOARDS = r"(\d+)\s*[x×*]\s*|.*\s[x×*]\s*(\d{1,4})$"
"""How many there are, before or behind a name."""


def _cluster(text: str, gpus: int, nodes: int | None, notes: Notes) -> tuple[ClusterSpec, bool]:
    gpu, memory, sure = gpu_named(text, notes)
    if (boards := re.match(_BOARDS, plain(text))) and int(boards[1] or boards[2]) != gpus:
        not_stated("gpu", text, f"says another number than {gpus}")
    if nodes is None and gpus > PER_NODE and gpus % PER_NODE:
        not_stated("n_gpus", str(gpus), "does not state how many nodes they are in")
    nodes = nodes or max(gpus // PER_NODE, 1)
    if gpus % nodes:
        not_stated("n_gpus", str(gpus), f"cannot be spread evenly over {nodes} nodes")
    return ClusterSpec(gpu=gpu, gpu_memory=memory, gpus=gpus, nodes=nodes, nvme_path="/nvme"), sure


def gpu_named(text: str, notes: Notes) -> tuple[GPUSpec, int | None, bool]:
    """The catalog's GPU of a name, bytes where the text states others than its, and whether the board is certain."""
    low = plain(text)
    if low in reading.BLANK or re.search(r"\bclass\b|unknown|\bany\b|\bor\b|/|not stated$", low):
        not_stated("gpu", text, "names no one GPU")
    if "emulated" in text.lower():
        raise RefusedError("gpu", text, "is another GPU with less of its memory", "not stated")
    reading.complete("gpu", reading.in_parentheses(text), *_GPU_NOTES, whole=text)
    bare = re.sub(r"^\d+\s*[x×*]\s*|\s[x×*]\s*\d{1,4}$", "", low).strip()
    sizes = [(float(value), unit.lower()) for value, unit in _SIZE.findall(text)]
    exact = next((value for value, unit in sizes if unit == "gib" and value != int(value)), None)
    memory = int(exact * GiB) if exact and exact < 10000 else None
    try:
        found = find_gpu(bare)
        return found, _stated(found, memory), True
    except MemplanError:
        pass
    nameless = _SIZE.sub(" ", bare).strip(" -_,")
    candidates = _starting(nameless)
    if not candidates:
        raise RefusedError("gpu", text, "is not in the catalog", "not stated")
    if sizes:
        wanted = memory or int(sizes[0][0] * GiB)
        near = [gpu for gpu in candidates if abs(gpu.memory_bytes - wanted) < 0.09 * wanted]
        if near:
            return near[0], _stated(near[0], memory), True
        notes.append(f"gpu: {text!r}: {candidates[0].name} with that much memory taken")
        return candidates[0], wanted, True
    if len({gpu.memory_bytes // GiB for gpu in candidates}) > 1:
        if len({(gpu.compute_capability, gpu.sm_count) for gpu in candidates}) > 1:
            not_stated("gpu", text, f"may be {', '.join(gpu.name for gpu in candidates[:4])}")
        largest = max(candidates, key=lambda gpu: gpu.memory_bytes)
        notes.append(f"gpu: {text!r} does not state its memory, {largest.name} taken: nothing is said of fitting")
        return largest, None, False
    return candidates[0], None, True


def _stated(gpu: GPUSpec, memory: int | None) -> int | None:
    return memory if memory and abs(memory - gpu.memory_bytes) > 0.005 * memory else None


def _starting(name: str) -> list[GPUSpec]:
    """GPUs whose name begins with a name, in the catalog's order."""
    key = re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla|quadro|amd|instinct", "", name))
    if len(key) < 2:
        return []
    keys = {gpu.name: re.sub(r"[^a-z0-9]", "", gpu.name.lower()) for gpu in all_gpus()}
    bare = key.replace("sxm5", "").replace("sxm4", "").replace("sxm2", "").replace("sxm", "").removeprefix("rtx")
    found = [gpu for gpu in all_gpus() if re.fullmatch(rf"(rtx)?{bare}(pcie)?(sxm)?(\d+gb)?", keys[gpu.name])]
    wants_pcie = "pcie" in key
    same = [gpu for gpu in found if ("pcie" in keys[gpu.name]) == wants_pcie]
    return same or found


# -- software ---------------------------------------------------------------------------------------------------------

_VERSION = re.compile(
    r"(?<![\w.])(torch|pytorch|transformers|deepspeed|accelerate|peft|bitsandbytes|bnb|liger[-_ ]kernel|cuda|cudnn)"
    r"[ ]*(?:==|>=|~=|[=~:@])?[ ]*v?(\d+\.\d+(?:\.\d+)*|\d+(?=[ ,;)]|$))",
    re.IGNORECASE,
)
_NAMES = {"pytorch": "torch", "bnb": "bitsandbytes"}


def _version_text(row: Mapping[str, str]) -> str:
    return f"{row['framework_version_if_known']} ; {row['framework']}"


def _stated_versions(row: Mapping[str, str]) -> dict[str, str]:
    text = _version_text(row)
    stated: dict[str, str] = {}
    for library, version in _VERSION.findall(text):
        name = library.lower().replace("-", "_").replace(" ", "_")
        stated.setdefault(_NAMES.get(name, name), version)
    if found := re.search(r"\+cu(\d{2})(\d)\b", text):
        stated.setdefault("cuda", f"{found[1]}.{found[2]}")
    return stated


def _month(row: Mapping[str, str]) -> str | None:
    """When it was measured, as far as the row tells."""
    stated = {name: version for name, version in _stated_versions(row).items() if name != "cuda"}
    return month_in(_version_text(row)) or month_of(stated)


def _version_of_trl(row: Mapping[str, str]) -> str | None:
    found = re.search(r"(?<![\w.])trl[ ]*(?:==|[=@])?[ ]*v?(\d+\.\d+(?:\.\d+)*)", _version_text(row), re.IGNORECASE)
    return found[1] if found else None


def _software(row: Mapping[str, str], notes: Notes) -> SoftwareSpec:
    stated, month = _stated_versions(row), _month(row)
    versions = dict(stated)
    if month:
        versions |= {
            library: version
            for library in RELEASES
            if library not in stated and (version := newest(library, month)) is not None
        }
        inferred = sorted(set(versions) - set(stated))
        if inferred:
            notes.append(f"software: of {month}: " + ", ".join(f"{name} {versions[name]}" for name in inferred))
    elif not stated:
        notes.append("software: is not stated, today's taken")
    else:
        left = ", ".join(library for library in RELEASES if library not in stated)
        notes.append(f"software: neither a date nor versions of {left} are stated, today's taken")
    for library, oldest in OLDEST.items():
        if library in versions and not SoftwareSpec().replace(**{library: "99"}).at_least(library, oldest):
            continue
        if library in versions and _numbers(versions[library]) < _numbers(oldest):
            notes.append(f"software: {library} {versions[library]} is older than memplan's rules, {oldest} taken")
            versions[library] = oldest
    return SoftwareSpec(**versions)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# -- engines and adapters ---------------------------------------------------------------------------------------------


def _strategy(
    engine: reading.Engine, offload: str, software: SoftwareSpec, framework: Framework, notes: Notes
) -> Strategy:
    states, weights = reading.offload(offload, engine.kind, notes)
    if engine.kind.startswith("zero"):
        # The templates of transformers' documentation leave these to the Trainer.
        zero = ZeroSpec(**{**dict.fromkeys(AUTO.get(engine.kind, ()), "auto"), **dict(engine.zero)})
        return Strategy(kind=engine.kind, offload_optimizer=states, offload_param=weights, zero=zero)
    if engine.kind != "fsdp":
        return Strategy(kind=engine.kind)
    version = engine.version
    if not version:
        version = 2 if software.at_least("transformers", "5.0") else 1
        notes.append(
            f"zero_stage_or_fsdp: FSDP's version is not stated, {version} taken, accelerate's default of the time"
        )
    loading = framework.cpu_ram_efficient_loading or engine.cpu_ram_efficient_loading
    if version == 1:
        sharding = engine.sharding or ("FULL_SHARD" if engine.reshard else "SHARD_GRAD_OP")
        fsdp = FsdpSpec(
            version=1,
            sharding_strategy=sharding,
            backward_prefetch=engine.prefetch,
            cpu_ram_efficient_loading=loading,
        )
    else:
        fsdp = FsdpSpec(version=2, reshard_after_forward=engine.reshard, cpu_ram_efficient_loading=loading)
    return Strategy(kind="fsdp", offload_param=weights, fsdp=fsdp)


def _agree(row: Mapping[str, str], strategy: Strategy, dtype: str | None) -> None:
    """Refuse what one column says of another, where that says something else."""
    engine, states = row["zero_stage_or_fsdp"], row["optimizer"]
    if strategy.offload_optimizer == strategy.offload_param == "none":
        if re.search(r"offload|infinity", engine.lower()):
            not_stated("offload", row["offload"], f"contradicts {engine!r}")
        if re.search(r"cpu", states.lower()):
            not_stated("offload", row["offload"], f"contradicts the optimizer {states!r}")
    masters = re.search(r"\bmaster", f"{row['weight_dtype']} {row['mixed_precision']}".lower())
    if masters and dtype != "float32" and not strategy.kind.startswith("zero"):
        not_stated(
            "weight_dtype", row["weight_dtype"], f"has masters, which {strategy.kind} keeps of no 16-bit weights"
        )


def _quantization(
    precision: reading.Precision, framework: Framework, trl: str | None, strategy: Strategy, notes: Notes
) -> QuantizationSpec:
    """FSDP shards weights that are packed into a float type, and of one type only; TRL leaves them alone then.

    ``trl`` is the version of TRL that decides, None where it does not run.
    """
    shards = strategy.kind in ("fsdp", "zero3")
    storage = {}
    if strategy.kind == "fsdp" and precision.quantization != "int8":
        notes.append(f"weight_dtype: packed into {precision.dtype}, as FSDP needs it")
        storage["quant_storage"] = precision.dtype
    prepares = framework.prepares and not shards
    heads, adapters = precision.bf16_heads, precision.bf16_adapters
    if trl == "0.26":
        prepares, adapters = False, True
    elif trl is not None and not shards and precision.quantization != "int8" and precision.mixed == "bf16":
        heads = heads or trl != "0.4"
        adapters = adapters or trl == "0.7.5"
    return QuantizationSpec(
        kind=precision.quantization,
        prepare_for_kbit_training=prepares,
        peft_module_casting_to_bf16=heads,
        bf16_adapters=adapters,
        **storage,
    )


def _packed(text: str, attn: str, notes: Notes) -> bool:
    full = reading.packed(text, notes)
    if not full and attn == "flash_attention_2":
        notes.append("packed_or_padded: the copies without padding, which flash attention makes, are left out")
        return True
    return full


def _lora(
    method: reading.Method,
    model: ModelSpec,
    head: str | None,
    stand_in: bool,
    precision: reading.Precision,
    software: SoftwareSpec,
    notes: Notes,
) -> LoraSpec:
    def named(words: tuple[str, ...]) -> tuple[str, ...]:
        if not stand_in:
            return words
        return tuple(dict.fromkeys(name for word in words for name in _OF_STAND_IN.get(word, (word,))))

    # tuners/lora/layer.py: from 0.6 on adapters went to the type of the weights beside them, from 0.12 on to float32
    # again (cast_adapter_dtype).
    beside = software.at_least("peft", "0.6") and not software.at_least("peft", "0.12")
    casts = not beside and not precision.bf16_adapters
    return LoraSpec(
        rank=method.rank,
        targets=_there(named(method.targets), model, head, notes),
        dropout=method.dropout,
        modules_to_save=named(method.saved),
        autocast_adapter_dtype=casts,
    )


def _there(targets: tuple[str, ...], model: ModelSpec, head: str | None, notes: Notes) -> tuple[str, ...]:
    """Targets without those that the model does not have: PEFT wants one of a list to match, memplan all."""
    if not targets or ALL_LINEAR in targets or model.model_type not in FAMILIES:
        return targets
    build = Build(Tape(CPU), float32, attn=attention_implementations(model.model_type)[0], full_depth=False)
    paths = [path for _, _, path, module in build_model(build, model, head).places() if isinstance(module, LINEAR)]
    found = tuple(name for name in targets if any(path == name or path.endswith(f".{name}") for path in paths))
    if found and found != targets:
        notes.append(f"method: of the targets the model has only {', '.join(found)}")
    return found or targets

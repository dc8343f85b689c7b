"""LoRA as PEFT does it: frozen base weights, adapters beside the target modules.

Sources: peft/tuners/lora/layer.py (Linear.forward), peft/tuners/lora/bnb.py, peft/tuners/tuners_utils.py
(check_target_module_exists, _maybe_include_all_linear_layers, cast_adapter_dtype), peft/utils/other.py
(ModulesToSaveWrapper, _set_trainable), peft/utils/constants.py, peft 0.21.2. The config's task_type is taken as unset:
TaskType.SEQ_CLS also trains the modules named classifier and score, which ``modules_to_save`` can name here.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

from memplan.adapters.quantization import Linear4bit, Linear8bitLt
from memplan.architectures.moe import experts_are_modules
from memplan.architectures.nn import Build, Conv1D, Dropout, Layers, Linear, Model, Module, ModuleList, looked_at
from memplan.errors import SpecError, UnsupportedError, did_you_mean
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import LoraSpec
from memplan.tape import ops
from memplan.tape.tensor import Buffer, DType, Parameter, Tensor, bfloat16, float32

AnyLinear = Linear | Conv1D | Linear4bit | Linear8bitLt
LINEAR = (Linear, Conv1D, Linear4bit, Linear8bitLt)
ALL_LINEAR = "all-linear"
"""Names every linear layer but the output embeddings (INCLUDE_LINEAR_LAYERS_SHORTHAND)."""

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "opt": ("q_proj", "v_proj"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "llama": ("q_proj", "v_proj"),
    "gpt_bigcode": ("c_attn",),
    "falcon": ("query_key_value",),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "stablelm": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}
"""TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING of peft 0.21.2, for the families memplan has."""


_ATTENTION: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), ("q_proj", "v_proj")),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
}
"""Of the model types with experts that PEFT has no default for: adapters beside every expert are more than meant."""


FUSED_EXPERTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    **dict.fromkeys(
        ("qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"), ("gate", "gate_proj", "up_proj", "down_proj")
    ),
}
"""Names that stand for the routers' weights and the experts' fused ones, whatever else has them, in the model types
that lost these layers with transformers 5: _MOE_TARGET_MODULE_MAPPING in peft/utils/transformers_weight_conversion.py.
"""


class LoraLinear(Module):
    """peft.tuners.lora.Linear: the frozen layer plus B(A(dropout(x)))."""

    def __init__(self, b: Build, base: AnyLinear, lora: LoraSpec, dtype: DType) -> None:
        self.base_layer = base
        self.lora_dropout = Dropout(lora.dropout)
        """Identity where it is 0, a module all the same."""
        self.input_dtype = dtype
        self.lora_A = _Adapter(b, lora.rank, base.in_features, dtype)
        self.lora_B = _Adapter(b, base.out_features, lora.rank, dtype)

    @property
    def weight(self) -> Parameter:
        """The base layer's: some models look at the dtype of a layer's weight (BaseTunerLayer.weight)."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        result_dtype = result.dtype
        looked_at(self.lora_A.weight)
        x = x.to(self.input_dtype)
        result = result + self.lora_B(self.lora_A(self.lora_dropout(x))) * 2.0
        return result.to(result_dtype)


def cast_trained_to_bf16(root: Module) -> None:
    """What TRL makes of the trained weights of a quantized model (SFTTrainer since 0.26)."""
    for _, module in root.named_modules():
        if isinstance(module, LoraLinear):
            module.input_dtype = bfloat16
        for _, p in module.parameters():
            if p.requires_grad:
                p.dtype = bfloat16


class LoraQuantizedLinear(LoraLinear):
    """peft.tuners.lora.Linear4bit and Linear8bitLt: no casts under autocast, and in 4 bit a copy of the result."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        if isinstance(self.base_layer, Linear4bit):
            result = ops.clone(result)
        tape = x.tape
        expected_dtype = result.dtype
        # torch.is_autocast_enabled() tells of CUDA's autocast; CPU's is another.
        requires_conversion = tape.autocast is None or tape.rules.kind == "cpu"
        if requires_conversion:
            looked_at(self.lora_A.weight)
            x = x.to(self.input_dtype)
        output = self.lora_B(self.lora_A(self.lora_dropout(x))) * 2.0
        if requires_conversion:
            output = output.to(expected_dtype)
        return result + output


class _Adapter(Module):
    """A bias-free linear layer in the adapter's own dtype."""

    def __init__(self, b: Build, n_out: int, n_in: int, dtype: DType) -> None:
        self.weight = b.parameter(n_out, n_in, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class ModulesToSave(Module):
    """peft.utils.ModulesToSaveWrapper: a trainable copy, which runs, beside the frozen original, which stays."""

    def __init__(self, b: Build, module: Module) -> None:
        self.original_module = module
        self.modules_to_save: Any = _trainable_copy(b, module)

    @property
    def weight(self) -> Parameter:
        """The copy's (AuxiliaryTrainingWrapper.__getattr__)."""
        weight: Parameter = self.modules_to_save.weight
        return weight

    def forward(self, *args: Tensor) -> Tensor:
        result: Tensor = self.modules_to_save(*args)
        return result


_NAME = re.compile(r"[\w.-]+")
"""What a path of a module is made of."""
_LONGEST_PATTERN = 300
_MOST_REPEATS = 4
"""In a regular expression: the time for a path of some sixty letters grows with their number as its exponent."""


def is_adapter(p: Parameter) -> bool:
    """Whether PEFT has made the weight, and not copied it as one of ``modules_to_save``."""
    return ".lora_A." in p.name or ".lora_B." in p.name


def targets_to_tell(lora: LoraSpec, model_type: str, software: SoftwareSpec) -> tuple[str, ...]:
    """The names that PEFT has to be told; none where it looks them up itself.

    Of the model types with fused experts it makes a set of no names before it comes to look them up, and then finds no
    module (_convert_peft_config_moe, LoraModel._prepare_adapter_config).
    """
    if lora.targets or model_type not in FUSED_EXPERTS or experts_are_modules(software):
        return lora.targets
    return DEFAULT_TARGETS.get(model_type, ())


def targets_to_choose(model_type: str) -> tuple[str, ...]:
    """What to adapt if nobody says: nothing to name where PEFT has a default, else what it would take."""
    return () if model_type in DEFAULT_TARGETS else _ATTENTION.get(model_type, (ALL_LINEAR,))


def is_pattern(targets: Sequence[str]) -> bool:
    """Whether targets are one text that PEFT matches with whole paths, by ``re.fullmatch``."""
    return len(targets) == 1 and _NAME.fullmatch(targets[0]) is None


def tells_layers_apart(lora: LoraSpec) -> bool:
    """Whether a name holds a layer's index, as in ``layers.3.mlp``: then no layer can stand for another.

    A regular expression may, whatever it looks like.
    """
    return is_pattern(lora.targets) or any(
        part.isdigit() for name in (*lora.targets, *lora.modules_to_save) for part in name.split(".")
    )


def sees_sharded_adapters(root: Module, dtype: DType) -> None:
    """FSDP1 gathers an adapter in its own forward only; where PEFT casts the input to its dtype, its shard's shows."""
    for _, module in root.named_modules():
        if isinstance(module, LoraLinear):
            module.input_dtype = dtype


def freeze(root: Module) -> None:
    """No gradients for anything that is there now."""
    for _, module in root.named_modules():
        for _, p in module.parameters():
            p.node = None


def apply_lora(b: Build, root: Module, lora: LoraSpec, model_type: str) -> None:
    """Freeze the model, put adapters beside the target modules and trainable copies in place of modules_to_save.

    Raises SpecError where a name matches no module, and UnsupportedError for a target that is not a linear layer
    and for an option that is not modelled.
    """
    if lora.bias != "none":
        raise UnsupportedError.at("lora.bias", lora.bias, "is not modelled", "Use none.")
    targets = _targets(root, lora, model_type, b.software)
    pattern = _pattern(targets) if lora.targets else None
    freeze(root)
    places = list(root.places())
    _refuse_unknown(lora.modules_to_save, places)
    matched: set[str] = set()
    for parent, name, path, module in places:
        if pattern is None:
            target = _matching(path, targets)
        else:
            target = targets[0] if pattern.fullmatch(path) else None
        if target is None or _is_saved(path, lora.modules_to_save):
            continue
        matched.add(target)
        if not isinstance(module, LINEAR):
            raise UnsupportedError(
                f"lora_targets: {target!r} matches {path}, a {type(module).__name__}; only linear layers are modelled."
            )
        parent.replace_child(name, _adapted(b, module, path, lora))
    missing = [t for t in targets if t not in matched] if lora.targets else []
    if not matched or missing:
        names = {name for _, name, _, module in places if isinstance(module, LINEAR)}
        wrong = missing[0] if missing else ",".join(targets)
        raise SpecError.at("lora_targets", wrong, "matches no module", did_you_mean(wrong, sorted(names)))
    _save_modules(b, root, lora.modules_to_save)


def _targets(root: Module, lora: LoraSpec, model_type: str, software: SoftwareSpec) -> Sequence[str]:
    fused = () if experts_are_modules(software) else FUSED_EXPERTS.get(model_type, ())
    if [target.lower() for target in lora.targets] == [ALL_LINEAR]:
        if fused:
            raise UnsupportedError(
                f"lora_targets: {ALL_LINEAR!r} also adapts the experts' fused 3-D weights in PEFT, which is not "
                "modelled. Name linear layers, as in q_proj,v_proj."
            )
        head = root.output_embeddings() if isinstance(root, Model) else None
        linear = [path for _, _, path, module in root.places() if isinstance(module, LINEAR) and module is not head]
        return [path for path in linear if not _is_saved(path, lora.modules_to_save)]
    if ALL_LINEAR in lora.targets:
        remedy = f"Use {ALL_LINEAR} alone, or names alone."
        raise SpecError.at("lora_targets", ",".join(lora.targets), f"has {ALL_LINEAR} beside other names", remedy)
    targets = lora.targets or DEFAULT_TARGETS.get(model_type, ())
    if not targets:
        raise SpecError(
            f"lora_targets: PEFT has no default for model_type {model_type!r}. Name the modules, as in q_proj,v_proj, "
            f"or use {ALL_LINEAR}."
        )
    for target in targets:
        if target.rpartition(".")[2] in fused or (fused and is_pattern(targets)):
            problem = f"stands in PEFT for the experts' fused 3-D weights of {model_type}, which is not modelled"
            raise UnsupportedError.at("lora_targets", target, problem, "Name other layers, as in q_proj,v_proj.")
    return targets


def _pattern(targets: Sequence[str]) -> re.Pattern[str] | None:
    """The regular expression that targets are; None for names. Raises SpecError, and UnsupportedError."""
    if not is_pattern(targets):
        odd = next((target for target in targets if _NAME.fullmatch(target) is None), None)
        if odd is not None:  # among names PEFT takes it literally; text with a comma has been taken apart
            problem = "is a regular expression beside other names, or has a comma, which is not modelled"
            raise UnsupportedError.at("lora_targets", odd, problem, "Name modules, as in q_proj,v_proj.")
        return None
    (text,) = targets
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "a", text, flags=re.DOTALL)  # without what is quoted and sets
    repeats = len(re.findall(r"[*+{]", plain))
    if len(text) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)\??[*+{]", plain):
        problem = f"is a regular expression that may take long: longer than {_LONGEST_PATTERN} letters, with more than"
        problem += f" {_MOST_REPEATS} repeats, or with a group that is repeated"
        raise UnsupportedError.at("lora_targets", text, problem, "Name modules, as in q_proj,v_proj.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        problem = f"is no regular expression ({error}), and no module's name"
        raise SpecError.at("lora_targets", text, problem, "Name modules, as in q_proj,v_proj.") from None


def _matching(path: str, targets: Sequence[str]) -> str | None:
    """PEFT: the full name, or its end after a dot."""
    for target in targets:
        if path == target or path.endswith("." + target):
            return target
    return None


def _is_saved(path: str, modules_to_save: Sequence[str]) -> bool:
    """Adapters never go into a module that is to be saved."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in modules_to_save)


def _adapted(b: Build, module: AnyLinear, path: str, lora: LoraSpec) -> LoraLinear:
    dtype = module.weight.dtype
    if not dtype.is_floating or (dtype.itemsize == 2 and lora.autocast_adapter_dtype):
        dtype = float32
    kind = LoraQuantizedLinear if isinstance(module, (Linear4bit, Linear8bitLt)) else LoraLinear
    adapter = kind(b, module, lora, dtype)
    adapter.lora_A.weight.name = f"{path}.lora_A.default.weight"
    adapter.lora_B.weight.name = f"{path}.lora_B.default.weight"
    return adapter


def _save_modules(b: Build, root: Module, names: Sequence[str]) -> None:
    """peft's _set_trainable: every module whose path ends in one of the names, once."""
    places = list(root.places())
    _refuse_unknown(names, places)
    saved: list[str] = []
    for parent, child, path, module in places:
        if not path.endswith(tuple(names)):
            continue
        if isinstance(module, (Layers, ModuleList, *LINEAR[2:])):
            raise UnsupportedError(
                f"modules_to_save: {path} is matched, a {type(module).__name__}, which is not copied and trained."
            )
        around = next((each for each in saved if path.startswith(f"{each}.")), None)
        if around is not None:
            raise UnsupportedError(
                f"modules_to_save: {path} is matched, inside {around}, which is saved too. PEFT freezes what runs "
                "there and trains a copy that never runs. Leave the inner name out."
            )
        saved.append(path)
        parent.replace_child(child, ModulesToSave(b, module))


def _refuse_unknown(names: Sequence[str], places: Sequence[tuple[Module, str, str, Module]]) -> None:
    """A name that ends no path, as PEFT's ``_set_trainable`` compares them; what is left is no regular expression."""
    for name in names:
        if not any(path.endswith(name) for _, _, path, _ in places):
            known = sorted({child for _, child, _, _ in places})
            raise SpecError.at("modules_to_save", name, "matches no module", did_you_mean(name, known))


def _trainable_copy(b: Build, module: Module, copied: dict[int, Parameter] | None = None) -> Module:
    """copy.deepcopy(module).requires_grad_(True): new parameters of the same dtypes, untied from what they shared.

    What two places inside of the module share, as a head for masked tokens does its bias, its copy shares too.
    """
    made, copied = copy.copy(module), {} if copied is None else copied
    for name, value in module.__dict__.items():
        if isinstance(value, Parameter):
            if id(value) not in copied:
                copied[id(value)] = b.tape.parameter("", value.shape, value.dtype)
            setattr(made, name, copied[id(value)])
        elif isinstance(value, Buffer):
            setattr(made, name, b.tape.buffer(value.shape, value.dtype, value.registered))
        elif isinstance(value, Module):
            setattr(made, name, _trainable_copy(b, value, copied))
    return made

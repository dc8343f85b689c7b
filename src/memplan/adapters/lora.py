"""LoRA as PEFT does it: frozen base weights, adapters beside the target modules.

Sources: peft/tuners/lora/layer.py (Linear.forward), peft/tuners/lora/bnb.py, peft/tuners/tuners_utils.py
(check_target_module_exists, cast_adapter_dtype), peft/utils/constants.py, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.architectures.nn import Build, Conv1D, Linear, Module
from memplan.errors import SpecError, UnsupportedError, did_you_mean
from memplan.specs.training import LoraSpec
from memplan.tape import ops
from memplan.tape.tensor import DType, Tensor, float32

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


class LoraLinear(Module):
    """peft.tuners.lora.Linear: the frozen layer plus B(A(dropout(x)))."""

    def __init__(self, b: Build, base: Module, n_in: int, n_out: int, lora: LoraSpec, dtype: DType) -> None:
        self.base_layer = base
        self.dropout = lora.dropout
        self.lora_A = _Adapter(b, lora.rank, n_in, dtype)
        self.lora_B = _Adapter(b, n_out, lora.rank, dtype)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        result_dtype = result.dtype
        x = x.to(self.lora_A.weight.dtype)
        result = result + self.lora_B(self.lora_A(ops.dropout(x, self.dropout))) * 2.0
        return result.to(result_dtype)


class _Adapter(Module):
    """A bias-free linear layer in the adapter's own dtype."""

    def __init__(self, b: Build, n_out: int, n_in: int, dtype: DType) -> None:
        self.weight = b.parameter(n_out, n_in, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


def freeze(root: Module) -> None:
    """No gradients for anything that is there now."""
    for _, module in root.named_modules():
        for _, p in module.parameters():
            p.node = None


def apply_lora(b: Build, root: Module, lora: LoraSpec, model_type: str) -> None:
    """Freeze the model and put adapters beside the target modules.

    Raises SpecError where the targets match no module, and UnsupportedError for a target that is not a linear layer
    and for an option that is not modelled.
    """
    if lora.bias != "none":
        raise UnsupportedError(f"lora bias: {lora.bias!r} is not modelled. Use none.")
    targets = lora.targets or DEFAULT_TARGETS.get(model_type, ())
    if not targets:
        raise SpecError(
            f"lora_targets: PEFT has no default for model_type {model_type!r}. Name the modules, as in q_proj,v_proj."
        )
    freeze(root)
    adapter_dtype = float32 if lora.autocast_adapter_dtype and b.dtype.itemsize == 2 else b.dtype
    places = list(_places(root))
    matched: set[str] = set()
    for parent, name, path, module in places:
        target = _matching(path, targets)
        if target is None:
            continue
        matched.add(target)
        if not isinstance(module, (Linear, Conv1D)):
            raise UnsupportedError(
                f"lora_targets: {target!r} matches {path}, a {type(module).__name__}; only linear layers are modelled."
            )
        adapter = LoraLinear(b, module, module.in_features, module.out_features, lora, adapter_dtype)
        setattr(parent, name, adapter)
        for part in ("lora_A", "lora_B"):
            getattr(adapter, part).weight.name = f"{path}.{part}.default.weight"
    missing = [t for t in targets if t not in matched] if lora.targets else []
    if not matched or missing:
        names = {name for _, name, _, module in places if isinstance(module, (Linear, Conv1D))}
        wrong = missing[0] if missing else ",".join(targets)
        raise SpecError.at("lora_targets", wrong, "matches no module", did_you_mean(wrong, sorted(names)))
    for name in lora.modules_to_save:
        _save_module(root, name)


def _matching(path: str, targets: tuple[str, ...]) -> str | None:
    """PEFT: the full name, or its end after a dot."""
    for target in targets:
        if path == target or path.endswith("." + target):
            return target
    return None


def _save_module(root: Module, name: str) -> None:
    """ModulesToSaveWrapper: a trainable copy beside the frozen original, which stays in memory."""
    raise UnsupportedError(f"modules_to_save: {name!r} is not modelled yet. Leave it out.")


def _places(root: Module, prefix: str = "") -> Iterator[tuple[Module, str, str, Module]]:
    """Every module with its parent, its name there and its path."""
    for name, child in root.children():
        path = f"{prefix}.{name}" if prefix else name
        yield root, name, path, child
        yield from _places(child, path)




"""Liger kernels as the Trainer puts them into a model that exists (``use_liger_kernel``), with their defaults.

transformers hands the model to Liger, which knows families by ``model_type``, takes a family's kernels for all its
classes, and of a family that it does not know says so in the log alone and trains without them: here both the unknown
families and the classes that die in a forward pass which is not theirs are refused.

Sources: transformers/integrations/liger.py, 5.23; liger_kernel/transformers/{monkey_patch,swiglu,geglu,rms_norm}.py
and liger_kernel/transformers/model/, liger-kernel 0.8.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from memplan.adapters.lora import LoraLinear, ModulesToSave
from memplan.architectures.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from memplan.architectures.moe import Experts
from memplan.architectures.nn import Build, Module, causal_lm_output, looked_at
from memplan.architectures.phi3 import FusedMLP
from memplan.errors import SpecError, UnsupportedError
from memplan.specs.software import SoftwareSpec
from memplan.tape import liger, ops
from memplan.tape.tensor import Parameter, Tensor, int32, int64


class Kernels(NamedTuple):
    """What ``apply_liger_kernel_to_<family>`` patches by default; every family's MLPs and experts are."""

    norms: Mapping[str, bool]
    """The norms by name, and whether each writes its gradient over the one it is given."""
    rope: bool = True
    fused_loss: bool = True
    """The loss is fused with the projection to the vocabulary; without, the cross-entropy alone is Liger's."""
    redirects: bool = False
    """Under FSDP's version 1 the fused loss runs as the head's forward (lce_maybe_trainable_lm_head)."""


_LLAMA = {"norm": True, "input_layernorm": True, "post_attention_layernorm": True}
_QWEN3 = {**_LLAMA, "q_norm": True, "k_norm": True}
_DEEPSEEK = {**_LLAMA, "q_a_layernorm": True, "kv_a_layernorm": True}
_GEMMA2 = {**dict.fromkeys(_LLAMA, False), "pre_feedforward_layernorm": False, "post_feedforward_layernorm": False}
_GEMMA3 = {**_GEMMA2, "q_norm": False, "k_norm": False}
_GLM4 = {**dict.fromkeys(_LLAMA, False), "post_self_attn_layernorm": False, "post_mlp_layernorm": False}
_OLMO2 = {"norm": True, "post_attention_layernorm": False, "post_feedforward_layernorm": False}

FAMILIES: dict[str, Kernels] = {
    "deepseek_v2": Kernels(_DEEPSEEK, rope=False),
    "deepseek_v3": Kernels(_DEEPSEEK, rope=False),
    "gemma": Kernels(_LLAMA),
    "gemma2": Kernels(_GEMMA2),
    "gemma3_text": Kernels(_GEMMA3),
    "glm4": Kernels(_GLM4, rope=False),
    "granite": Kernels(_LLAMA, fused_loss=False),
    "llama": Kernels(_LLAMA, redirects=True),
    "mistral": Kernels(_LLAMA),
    "mixtral": Kernels(_LLAMA),
    "olmo2": Kernels(_OLMO2),
    "phi3": Kernels(_LLAMA),
    "qwen2": Kernels(_LLAMA),
    "qwen3": Kernels(_QWEN3),
    "qwen3_moe": Kernels(_QWEN3),
    "smollm3": Kernels(_LLAMA, redirects=True),
}
"""Those of MODEL_TYPE_TO_APPLY_LIGER_FN that memplan has."""


class LigerRMSNorm(Module):
    """A norm whose forward is LigerRMSNorm's, whatever it was before."""

    def __init__(self, norm: Module, in_place: bool) -> None:
        self.weight: Tensor = norm.weight  # type: ignore[attr-defined]
        self._in_place = in_place

    def forward(self, hidden_states: Tensor) -> Tensor:
        return liger.rms_norm(hidden_states, self.weight, self._in_place)


class LigerMLP(Module):
    """LigerSwiGLUMLP, LigerGEGLUMLP, LigerQwen3MoeSwiGLUMLP."""

    def __init__(self, mlp: LlamaMLP) -> None:
        self.gate_proj: Module = mlp.gate_proj
        self.up_proj: Module = mlp.up_proj
        self.down_proj: Module = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(liger.gated(self.gate_proj(x), self.up_proj(x)))


class LigerFusedMLP(Module):
    """LigerPhi3SwiGLUMLP: both halves of the projection are copied, and it stays while they are projected down."""

    def __init__(self, mlp: FusedMLP) -> None:
        self.gate_up_proj: Module = mlp.gate_up_proj
        self.down_proj: Module = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        up_states = self.gate_up_proj(x)
        gate, up_states = up_states.chunk(2)
        return self.down_proj(liger.gated(gate, up_states))


class LigerExperts(Module):
    """LigerExperts of liger_kernel/transformers/swiglu.py."""

    def __init__(self, experts: Experts) -> None:
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k_index = top_k_index.to(int32)
        return liger.fused_experts(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights)


def apply_liger_kernel(b: Build, root: Module, model_type: str, *, fsdp1: bool = False) -> None:
    """Put Liger's kernels into a model, before adapters go around its layers. ``fsdp1``: it will be wrapped by FSDP's
    version 1.

    Raises SpecError for a family that Liger has no kernels for, for a head that its forward pass does not fit, and
    for versions that do not go together; UnsupportedError for a version of Liger that is not modelled.
    """
    _check_versions(b.software)
    kernels = FAMILIES.get(model_type)
    if kernels is None:
        remedy = f"Leave it out, or use one of {', '.join(FAMILIES)}."
        raise SpecError.at("liger", True, f"has no kernels for {model_type}: the Trainer would go on without", remedy)
    if not isinstance(root, LlamaForCausalLM):
        raise SpecError.at(
            "liger", True, "gives every head a language model's forward pass, in which this one dies", "Leave it out."
        )
    for parent, name, path, module in list(root.places()):
        if name in kernels.norms:
            parent.replace_child(name, LigerRMSNorm(module, kernels.norms[name]))
        elif isinstance(module, LlamaMLP):
            if model_type == "qwen3_moe":
                raise SpecError.at("liger", True, f"dies on {path}: qwen3_moe must have experts", "Leave it out.")
            parent.replace_child(name, LigerMLP(module))
        elif isinstance(module, FusedMLP):
            parent.replace_child(name, LigerFusedMLP(module))
        elif isinstance(module, Experts):
            parent.replace_child(name, LigerExperts(module))
        elif isinstance(module, LlamaAttention) and kernels.rope and "rotate" not in vars(module):
            module.rotate = liger.rotary_pos_emb  # a layer of SmolLM3 without positions has its own already
    if kernels.fused_loss:
        root.output = partial(fused_output, redirects=fsdp1 and kernels.redirects)
    else:
        root.output = partial(causal_lm_output, cross_entropy=liger.cross_entropy)


def _check_versions(software: SoftwareSpec) -> None:
    if not software.at_least("liger_kernel", "0.8"):
        raise UnsupportedError.at("software: liger_kernel", software.liger_kernel, "is not modelled", "Use 0.8.5.")
    if not software.at_least("transformers", "5.0"):
        raise SpecError.at(
            "software: transformers", software.transformers, "is not imported by liger-kernel 0.8", "Use 5.0 or later."
        )


def fused_output(
    b: Build,
    lm_head: Module,
    hidden_states: Tensor,
    labels: Tensor,
    softcap: bool = False,
    scale: bool = False,
    *,
    redirects: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Liger's lce_forward after the decoder: (loss, None), and as ever (loss, logits) where nothing is trained.

    It ``redirects`` the loss to be the head's forward (_FSDPForwardRedirection).
    """
    if not b.tape.training:
        return causal_lm_output(b, lm_head, hidden_states, labels, softcap, scale)
    lm_head = _unwrapped(lm_head)
    loss = partial(_causal_lm_loss, b, lm_head)
    if redirects:
        return b.tape.watch(lm_head, loss, (hidden_states, labels)), None
    return loss(hidden_states, labels), None


def fused_head(root: Module) -> Module | None:
    """The head whose weight the loss reads without calling it, if it does."""
    output = getattr(root, "output", None)
    if not isinstance(root, LlamaForCausalLM) or not isinstance(output, partial) or output.func is not fused_output:
        return None
    return None if output.keywords["redirects"] else _unwrapped(root.lm_head)


def _causal_lm_loss(b: Build, lm_head: Module, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """LigerForCausalLMLoss."""
    weight: Parameter = looked_at(lm_head.weight)  # type: ignore[attr-defined]
    t = b.tape
    t.mark("loss")
    labels = ops.pad_last(labels, 1)
    shift_labels = t.new((labels.shape[0], labels.shape[1] - 1), int64, "shift_labels").view(-1)
    hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
    addmm_out_dtype = b.software.at_least("torch", "2.8")
    return liger.fused_linear_cross_entropy(hidden_states, weight, shift_labels, addmm_out_dtype) / 2.0


def _unwrapped(lm_head: Module) -> Module:
    """The module whose weight is read, which knows nothing of what an adapter adds to its product."""
    if isinstance(lm_head, LoraLinear):
        problem = "trains nothing under Liger, whose loss reads the weight beneath it"
        raise SpecError.at("lora_targets", "lm_head", problem, "Leave out lm_head or liger.")
    return lm_head.modules_to_save if isinstance(lm_head, ModulesToSave) else lm_head

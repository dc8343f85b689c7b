"""bitsandbytes quantization as transformers and PEFT apply it: int8, NF4, NF4 with double quantization.

Read from transformers/quantizers/{base,quantizer_bnb_4bit,quantizer_bnb_8bit}.py and integrations/bitsandbytes.py
(5.23), bitsandbytes/nn/modules.py (0.50.2) and peft/utils/other.py (0.21.2). What stays in 16 or 32 bit: embeddings,
norms and every other module that is not a linear layer, the output head, tied weights, and the module that holds the
model's last parameter if that is its weight.
"""

from __future__ import annotations

import re

from memplan.architectures.nn import Build, Conv1D, LayerNorm, Linear, Model, Module
from memplan.errors import SpecError
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import QuantizationSpec
from memplan.tape.quantized import NESTED_BLOCK, Weight4bit, matmul_4bit, matmul_8bit
from memplan.tape.tensor import DType, Parameter, Tensor, bfloat16, dtype_named, float32, int8, uint8


class Linear4bit(Module):
    """bitsandbytes.nn.Linear4bit: the packed weight, with its scales and tables as tensors of their own."""

    def __init__(
        self, b: Build, base: Linear | Conv1D, compute_dtype: DType, nested: bool, quant_storage: str = "uint8"
    ) -> None:
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.compute_dtype = compute_dtype
        self.shape = Weight4bit(base.out_features, base.in_features, base.weight.dtype, nested)
        storage = dtype_named(quant_storage)
        self.weight = _packed(b, base.weight, ((self.shape.numel + 1) // (2 * storage.itemsize), 1), storage)
        self.bias = base.bias
        blocks = self.shape.blocks
        loaded = (base.weight.nbytes,) * (2 if isinstance(base, Conv1D) else 1)  # transposed by a copy
        self.quantizing = (*loaded, *((4 * blocks, 4 * blocks) if nested else ()))
        """Bytes on the GPU beside the result while the weight is quantized: as loaded, and its scales in float32."""
        tape = b.tape
        self.absmax = tape.buffer((blocks,), uint8 if nested else float32, registered=False)
        self.code = tape.buffer((16,), float32, registered=False)
        if nested:
            self.offset = tape.buffer((), float32, registered=False)
            self.nested_absmax = tape.buffer((-(-blocks // NESTED_BLOCK),), float32, registered=False)
            self.nested_code = tape.buffer((256,), float32, registered=False)

    def forward(self, x: Tensor) -> Tensor:
        inp_dtype = x.dtype
        x = x.to(self.compute_dtype)
        if self.bias is not None:
            self.bias.dtype = self.compute_dtype  # bias.data = bias.data.to(x.dtype), which changes it for good
        return matmul_4bit(x, self.shape, self.bias, self.weight).to(inp_dtype)


class Linear8bitLt(Module):
    """bitsandbytes.nn.Linear8bitLt without 16-bit weights: CB, int8 [out, in], and SCB, a float32 scale per row."""

    def __init__(self, b: Build, base: Linear | Conv1D) -> None:
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = _packed(b, base.weight, (base.out_features, base.in_features), int8)
        self.bias = base.bias
        self.SCB = b.tape.buffer((base.out_features,), float32, registered=False)
        self.quantizing = (base.weight.nbytes, 2 * base.weight.numel)
        """Bytes on the GPU beside the result while the weight is quantized: as loaded, and in float16."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            self.bias.dtype = x.dtype
        out = matmul_8bit(x, self.out_features, self.bias)
        x.tape.replace(self.weight)  # by state.CB, the whole weight as it was quantized
        return out


def _packed(b: Build, weight: Parameter, shape: tuple[int, int], dtype: DType) -> Parameter:
    p = b.tape.parameter(weight.name, shape, dtype, requires_grad=False)
    p.elements = weight.numel
    return p


def quantize(b: Build, root: Module, spec: QuantizationSpec, compute_dtype: DType) -> None:
    """Replace the linear layers that transformers replaces. ``compute_dtype`` is ``bnb_4bit_compute_dtype``."""
    kept = keys_to_not_convert(root)
    for parent, name, path, module in list(root.places()):
        # Not a subclass: Falcon's own linear layers stay, and so do T5's ``wo``, which transformers lists by name.
        if type(module) not in (Linear, Conv1D) or not _converted(path, kept):
            continue
        assert isinstance(module, (Linear, Conv1D))
        if spec.kind == "int8":
            parent.replace_child(name, Linear8bitLt(b, module))
        else:
            nested = spec.kind == "nf4-dq"
            parent.replace_child(name, Linear4bit(b, module, compute_dtype, nested, spec.quant_storage))


def keys_to_not_convert(root: Module) -> list[str]:
    """transformers' get_keys_to_not_convert: patterns of module names."""
    names: dict[int, list[str]] = {}
    for prefix, module in root.named_modules():
        for name, parameter in module.parameters():
            names.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    tied = [name for group in names.values() if len(group) > 1 for name in group]
    last = list(names.values())[-1][0]
    head = root.output_embeddings() if isinstance(root, Model) else None
    heads = [path for path, module in root.named_modules() if module is head]
    return sorted({name.removesuffix(".weight") for name in (*tied, last, *heads)})


def _converted(path: str, kept: list[str]) -> bool:
    """transformers' should_convert_module: a key is a prefix (as a regex) or a suffix of the module's name."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return not any(re.match(rf"(?:{key}){boundary}", path) or path.endswith(key) for key in kept)


def prepare_for_kbit_training(root: Module) -> None:
    """peft.prepare_model_for_kbit_training: freeze all, and raise to float32 what is in 16 bit and not quantized."""
    for _, module in root.named_modules():
        for _, p in module.parameters():
            p.node = None
            if p.dtype.is_floating and p.dtype.itemsize == 2 and not is_packed(p):
                p.dtype = float32


def peft_module_casting_to_bf16(root: Module) -> None:
    """trl.models.utils.peft_module_casting_to_bf16: norms to float32, embeddings and heads from there to bfloat16.

    SFTTrainer calls it under bf16 on 4-bit models that are not sharded, from TRL 0.7.5 (in trainer/utils.py) to 0.25.
    """
    for path, module in root.named_modules():
        if isinstance(module, LayerNorm) or "norm" in path:
            for _, p in module.parameters():
                p.dtype = float32
        elif any(word in path for word in ("lm_head", "embed_tokens", "wte", "wpe")):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Parameter) and weight.dtype is float32:
                for _, p in module.parameters():
                    p.dtype = bfloat16


def is_packed(p: Parameter) -> bool:
    """Whether it is a 4-bit weight, which several numbers share an element of."""
    return p.elements != p.numel


def check_quant_storage(spec: QuantizationSpec, dtype: DType) -> None:
    """An engine that makes weights ``dtype`` takes packed ones of another floating type for numbers, and casts them.

    In float32 bitsandbytes stops at the first forward, in another 16-bit type it reads noise. Raises SpecError.
    """
    storage = dtype_named(spec.quant_storage)
    if spec.kind != "int8" and storage.is_floating and storage is not dtype:
        problem = f"is not what the engine computes in: it would cast packed weights to {dtype.name}"
        raise SpecError.at("quantization.quant_storage", storage.name, problem, f"Use {dtype.name}, or uint8.")


def cast(root: Module, dtype: DType | None) -> None:
    """What an engine makes of a prepared model's weights: DeepSpeed casts them, FSDP gathers them as ``dtype``.

    With None they stay as they are.
    """
    for _, module in root.named_modules():
        for _, p in module.parameters():
            if p.loaded is not None:
                continue  # tied
            p.loaded = p.dtype
            if dtype is not None and p.dtype.is_floating and not is_packed(p):
                p.dtype = dtype


def default_dtype(software: SoftwareSpec, checkpoint_dtype: str | None) -> str | None:
    """What from_pretrained loads in without ``dtype``: float16 under quantization before transformers 5, then auto.

    None where the checkpoint names no dtype. Source: update_torch_dtype in quantizer_bnb_*.py of 4.x;
    update_dtype in quantizers/base.py of 5.23.
    """
    return checkpoint_dtype if software.at_least("transformers", "5.0") else "float16"

"""The vocabulary of the architecture files: modules, as in torch.nn, on the tape.

An architecture file declares its parameters in ``__init__`` under the names of the transformers source and writes
its forward pass in the same order with the same local variables, because lifetimes follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import ref

from memplan.architectures.cache import DynamicCache
from memplan.errors import PositionsError, SpecError, UnsupportedError, did_you_mean
from memplan.specs.fields import Fields
from memplan.specs.software import SoftwareSpec
from memplan.tape import ops
from memplan.tape.attention import flash_attention_2, repeat_kv, scaled_dot_product_attention
from memplan.tape.tape import LOGITS, Tape
from memplan.tape.tensor import Buffer, DType, Parameter, Tensor, bool_, float32, int32, int64


class Inventory:
    """One walk over a model: its parameters and buffers with their multiplicity, its stacks of layers."""

    def __init__(self, root: Module) -> None:
        self.parameters: list[tuple[Parameter, int]] = []
        """Every made parameter once, with how many of the model it stands for."""
        self.buffers: list[tuple[Buffer, int]] = []
        """Likewise the buffers, and what a library keeps beside a quantized weight."""
        self.stacks: dict[int, list[int]] = {}
        """Stack -> for every layer of the model, the made layer that stands for it."""
        self.linear_bias = False
        """Whether a Linear has a bias, which sends it through cuBLASLt."""
        self._seen: set[int] = set()
        self._visit(root, 1)

    @property
    def buffer_blocks(self) -> list[int]:
        """Bytes of the block that each buffer of the model takes."""
        return [(x.nbytes + 511) & -512 for x, count in self.buffers for _ in range(count)]

    def _visit(self, module: Module, count: int) -> None:
        if isinstance(module, Layers):
            self.stacks[module.stack] = module.sequence()
            multiplicities = module.multiplicities()
            for i, layer in module._layers:
                self._visit(layer, count * multiplicities[i])
            return
        if isinstance(module, Linear) and module.bias is not None:
            self.linear_bias = True
        for value in module.__dict__.values():
            if isinstance(value, Parameter):
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self.parameters.append((value, count))
            elif isinstance(value, Buffer):
                self.buffers.append((value, count))
        for _, child in module.children():
            self._visit(child, count)


@dataclass(slots=True)
class Build:
    """What every module of one model is made with."""

    tape: Tape
    dtype: DType
    """The dtype the weights are loaded in."""
    attn: str = "sdpa"
    """attn_implementation: eager, sdpa or flash_attention_2."""
    gradient_checkpointing: bool = False
    padded: bool = False
    """The batch has an attention mask with padding in it."""
    software: SoftwareSpec = SoftwareSpec()
    full_depth: bool = True
    """Make every layer; otherwise the first and one of each kind, which stand for the rest."""
    last_layer_apart: bool = False
    """The last layer stands for no other: what is done to the modules later may spare one of its own."""
    busiest_experts: bool = False
    """A router sends all tokens to the same experts, rather than to all alike."""
    cache: DynamicCache | None = None
    """``past_key_values``, in generation: then the model gives the logits of the last position, and no loss."""

    @property
    def past_length(self) -> int:
        """Positions in the cache."""
        return 0 if self.cache is None else self.cache.past_length

    def kv_length(self, length: int, window: int | None = None) -> int:
        """How many positions attention looks at from ``length`` new ones."""
        return length if self.cache is None else self.cache.kv_length(length, window)

    def parameter(self, *shape: int, dtype: DType | None = None) -> Parameter:
        """A trainable weight. Its name is given when the model is complete."""
        return self.tape.parameter("", shape, dtype or self.dtype)


class Module:
    """Holds parameters, buffers and modules as attributes; the attribute names are the state dict's."""

    no_split = False
    """Listed in transformers' ``_no_split_modules``: a device map keeps it in one piece."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)

    def children(self) -> Iterator[tuple[str, Module]]:
        """Direct submodules with their names."""
        for name, value in self.__dict__.items():
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with dotted names as in torch."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """This module's own parameters."""
        for name, value in self.__dict__.items():
            if isinstance(value, Parameter):
                yield name, value

    def places(self, prefix: str = "") -> Iterator[tuple[Module, str, str, Module]]:
        """Every module below this one with its parent, its name there and its dotted path."""
        for name, child in self.children():
            path = f"{prefix}.{name}" if prefix else name
            yield self, name, path, child
            yield from child.places(path)

    def replace_child(self, name: str, module: Module) -> None:
        """Put ``module`` in the place of the child ``name``."""
        setattr(self, name, module)


def watch(root: Module, tape: Tape) -> None:
    """Note on the tape where every module begins and ends, those without weights too: an engine that shards weights
    hooks in there.
    """
    tape.watches = True
    for _, module in root.named_modules():
        if not hasattr(module, "forward"):  # a list of modules, which is never called
            continue
        module.forward = partial(_watched, tape, ref(module))  # no cycle: reference counting frees it


def _watched(tape: Tape, module: ref[Module], *args: Any) -> Any:
    watched = module()
    assert watched is not None
    return tape.watch(watched, partial(type(watched).forward, watched), args)


def looked_at(p: Parameter) -> Parameter:
    """A weight of another module, as a forward reads it: an engine that shards weights may have to gather it then."""
    p.tape.look(p)
    return p


class ModuleList(Module):
    """torch.nn.ModuleList: children named by their place."""

    def __init__(self, modules: Iterable[Module]) -> None:
        self._list = list(modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._list)

    def children(self) -> Iterator[tuple[str, Module]]:
        for i, module in enumerate(self._list):
            yield str(i), module

    def replace_child(self, name: str, module: Module) -> None:
        self._list[int(name)] = module


class Linear(Module):
    """torch.nn.Linear: weight [out, in]."""

    def __init__(self, b: Build, n_in: int, n_out: int, bias: bool = True) -> None:
        self.in_features = n_in
        self.out_features = n_out
        self.weight = b.parameter(n_out, n_in)
        self.bias = b.parameter(n_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Conv1D(Module):
    """transformers.pytorch_utils.Conv1D: weight [in, out]."""

    def __init__(self, b: Build, n_out: int, n_in: int) -> None:
        self.in_features = n_in
        self.out_features = n_out
        self.weight = b.parameter(n_in, n_out)
        self.bias = b.parameter(n_out)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv1d(x, self.weight, self.bias)


class InputEmbeddings(Module):
    """What transformers' get_input_embeddings() returns: the first of them in a model."""

    require_output_grad = False
    """enable_input_require_grads(): a hook makes the output a leaf that needs a gradient."""

    def __call__(self, *args: Any) -> Any:
        out = self.forward(*args)
        if self.require_output_grad:
            out.tape.require_grad(out)
            out = out.tape.watch_leaf(self, out)
        return out


class Embedding(InputEmbeddings):
    """torch.nn.Embedding: weight [rows, dim]."""

    def __init__(self, b: Build, rows: int, dim: int) -> None:
        self.weight = b.parameter(rows, dim)

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class LayerNorm(Module):
    """torch.nn.LayerNorm over the last dimension."""

    def __init__(self, b: Build, dim: int, bias: bool = True, elementwise_affine: bool = True) -> None:
        self.weight = b.parameter(dim) if elementwise_affine else None
        self.bias = b.parameter(dim) if elementwise_affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)


class RMSNorm(Module):
    """LlamaRMSNorm: the square, the mean and the scaling in float32, the weight in its own dtype."""

    def __init__(self, b: Build, dim: int) -> None:
        self.weight = b.parameter(dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * ops.rsqrt(variance + 1e-6)
        return self.weight * hidden_states.to(input_dtype)


def checkpoints_wrappers(software: SoftwareSpec) -> bool:
    """Whether models checkpoint whatever stands in a block's place, by ``_gradient_checkpointing_func``. Since
    transformers 4.53, some since 4.52, the block does it itself, as a GradientCheckpointingLayer.
    """
    return not software.at_least("transformers", "4.53")


def checkpoints_calls(software: SoftwareSpec) -> bool:
    """Whether a checkpointed block runs again with the hooks of its module: before transformers 5.23, from which on
    GradientCheckpointingLayer checkpoints its forward, and not its __call__.
    """
    return not software.at_least("transformers", "5.23")


class CheckpointLayer(Module):
    """transformers' GradientCheckpointingLayer: the block that is recomputed, and the unit of repetition."""

    no_split = True
    held = False
    """Whether the model holds every layer's output until the last has run (output_hidden_states)."""
    presents: list[Tensor] | None = None
    """Where a layer that gives its keys and values beside its output leaves them, for the model to give out."""
    _build: Build

    def __call__(self, *args: Any) -> Any:
        b = self._build
        made_before = len(b.tape.sizes)
        out = self._checkpointed(*args) if b.gradient_checkpointing else self.forward(*args)
        if self.presents is not None:
            out, present = out
            self.presents.append(present)
        for x in out if isinstance(out, tuple) else (out,):
            if x is not None:
                b.tape.flow(x, made_before, self.held)
        return out

    def _checkpointed(self, *args: Any) -> Any:
        """What hooks in before and after the block runs again with it, or stands around it."""
        tape, software = self._build.tape, self._build.software
        # FSDP1 has a module of its own around the block.
        runs_again = checkpoints_wrappers(software) if tape.flat_parameters else checkpoints_calls(software)
        if runs_again or not tape.watches:
            return tape.checkpoint(self.forward, *args)
        return tape.watch(self, partial(tape.checkpoint, partial(type(self).forward, self)), args)


class Layers(Module):
    """nn.ModuleList of a model's blocks. Iterating marks where each block begins.

    ``kinds`` has one entry per layer; layers of equal kind have equal parameters and equal forward passes.
    Unless the full depth is asked for, only the first layer and the first later one of each kind are made.
    ``stack`` tells several lists of one model apart.
    """

    def __init__(
        self, b: Build, kinds: Sequence[Hashable], make: Callable[[int], CheckpointLayer], stack: int = 0
    ) -> None:
        self._build = b
        self.stack = stack
        self._kinds = list(kinds)
        if b.last_layer_apart:
            self._kinds[-1] = (self._kinds[-1], "last")
        indices = range(len(kinds)) if b.full_depth else representatives(self._kinds)
        self._layers = [(i, make(i)) for i in indices]
        for _, layer in self._layers:
            layer._build = b

    def __iter__(self) -> Iterator[Any]:
        tape = self._build.tape
        for i, layer in self._layers:
            tape.layer_boundary((self.stack, i))
            yield layer
        tape.layer_boundary(None)

    def children(self) -> Iterator[tuple[str, Module]]:
        for i, layer in self._layers:
            yield str(i), layer

    def multiplicities(self) -> dict[int, int]:
        """How many layers each made layer stands for."""
        if self._build.full_depth:
            return {i: 1 for i, _ in self._layers}
        counts = {i: 0 for i, _ in self._layers}
        by_kind = {self._kinds[i]: i for i, _ in self._layers if i > 0}
        counts[0] = 1
        for kind in self._kinds[1:]:
            counts[by_kind[kind]] += 1
        return counts

    def sequence(self) -> list[int]:
        """For every layer of the model, the made layer that stands for it."""
        if self._build.full_depth:
            return [i for i, _ in self._layers]
        by_kind = {self._kinds[i]: i for i, _ in self._layers if i > 0}
        return [0] + [by_kind[kind] for kind in self._kinds[1:]]


def representatives(kinds: Sequence[Hashable]) -> list[int]:
    """The first layer, and the first layer after it of each kind."""
    seen: set[Hashable] = set()
    chosen = [0]
    for i, kind in enumerate(kinds[1:], start=1):
        if kind not in seen:
            seen.add(kind)
            chosen.append(i)
    return chosen


class Dropout(Module):
    """torch.nn.Dropout."""

    def __init__(self, p: float) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p)


class Activation(Module):
    """A module that is a function: nothing but its place among the modules tells it from one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gelu_new(x: Tensor) -> Tensor:
    """NewGELUActivation: every step is a tensor of its own."""
    return x * 0.5 * (ops.tanh((x + x.pow(3.0) * 0.044715) * 0.8) + 1.0)


def gelu_fast(x: Tensor) -> Tensor:
    """FastGELUActivation."""
    return x * 0.5 * (ops.tanh(x * 0.8 * (x * 0.044715 * x + 1.0)) + 1.0)


def gelu_python(x: Tensor) -> Tensor:
    """GELUActivation(use_gelu_python=True)."""
    return x * 0.5 * (ops.erf(x / 1.4) + 1.0)


def quick_gelu(x: Tensor) -> Tensor:
    """QuickGELUActivation."""
    return x * ops.sigmoid(x * 1.702)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu,
    "swish": ops.silu,
    "gelu": ops.gelu,
    "gelu_pytorch_tanh": ops.gelu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "gelu_python": gelu_python,
    "quick_gelu": quick_gelu,
    "relu": ops.relu,
    "tanh": ops.tanh,
}


def activation(name: str) -> Activation:
    """transformers.activations.ACT2FN; raises UnsupportedError for a name that memplan does not model."""
    try:
        return Activation(ACTIVATIONS[name])
    except KeyError:
        raise UnsupportedError(
            f"hidden_act: {name!r} is not modelled. Known: {', '.join(sorted(ACTIVATIONS))}."
        ) from None


def rotary_dim(fields: Fields, head_dim: int, partial_rotary_factor: float = 1.0, *, rounded_up: bool = False) -> int:
    """How many of a head's dimensions are rotated; ``partial_rotary_factor`` is the family's default.

    An odd number becomes even where the family rotates as many as there are cosines (``rounded_up``), and is refused
    where it does not.
    """
    factor = fields.float("partial_rotary_factor", partial_rotary_factor, maximum=1.0)
    rope = fields.section("rope_scaling" if fields.raw("rope_scaling") else "rope_parameters")
    dim = int(head_dim * rope.float("partial_rotary_factor", factor, maximum=1.0))
    if rounded_up and dim < head_dim:
        return dim + dim % 2
    return in_pairs(fields, "partial_rotary_factor", dim, f"of a head's {head_dim} dimensions")


def in_pairs(fields: Fields, name: str, dim: int, what: str = "dimensions") -> int:
    """``dim`` rotated dimensions, which must be even: they turn in pairs (rotate_half). ``name`` is what decides it."""
    if dim % 2:
        raise SpecError(
            f"{fields.source}: {name}: {dim} {what} are rotated, and an odd number cannot be. Correct it, or the size "
            "of a head that it follows from."
        )
    return dim


ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"})
"""Keys of ROPE_INIT_FUNCTIONS (transformers/modeling_rope_utils.py, 5.23), and none."""


def check_rope_type(fields: Fields, also: Iterable[str] = ()) -> None:
    """The rope_type of rope_scaling or rope_parameters."""
    rope = fields.section("rope_scaling" if fields.raw("rope_scaling") else "rope_parameters")
    rope_type = rope.str("rope_type", "default", alias="type")
    known = ROPE_TYPES.union(also)
    if rope_type not in known:
        raise rope.wrong("rope_type", rope_type, "does not exist in transformers", did_you_mean(rope_type, known))


class RotaryEmbedding(Module):
    """LlamaRotaryEmbedding: cos and sin of every position, from frequencies that are float32 whatever the model is."""

    def __init__(self, b: Build, dim: int, dtype: DType | None = None) -> None:
        self.dim = dim
        self.dtype = dtype
        self.inv_freq = b.tape.buffer((dim // 2,), float32)
        self.original_inv_freq = b.tape.buffer((dim // 2,), float32)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_embedding(x, position_ids, self.dim, self.dtype)


def rotary_embedding(x: Tensor, position_ids: Tensor, dim: int, dtype: DType | None = None) -> tuple[Tensor, Tensor]:
    """LlamaRotaryEmbedding.forward: cos and sin [B, S, dim] in x's dtype (or ``dtype``), computed in float32 without
    gradient.
    """
    t = x.tape
    with t.no_grad():
        freqs = t.new((*position_ids.shape, 1), float32, "position_ids.float")
        freqs = t.new((*position_ids.shape, dim // 2), float32, "freqs")
        emb = ops.cat((freqs, freqs))
        cos = ops.cos(emb) * 1.0
        sin = ops.sin(emb) * 1.0
        return cos.to(dtype or x.dtype), sin.to(dtype or x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """transformers' rotate_half: two slices, one negated, concatenated."""
    half = x.shape[-1] // 2
    x1 = x.narrow(-1, 0, half)
    x2 = x.narrow(-1, half, x.shape[-1] - half)
    return ops.cat((-x2, x1))


def rotate_every_two(x: Tensor) -> Tensor:
    """The interleaved rotate_half of GPT-J, Cohere and GLM: even and odd elements, stacked and flattened."""
    x1 = ops.every(x, 0, 2)
    x2 = ops.every(x, 1, 2)
    return ops.stack((-x2, x1)).view(*x.shape)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """q, k [B, H, S, D], cos, sin [B, S, D]."""
    cos = cos.unsqueeze(dim)
    sin = sin.unsqueeze(dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def position_ids(b: Build, inputs_embeds: Tensor) -> Tensor:
    """arange(S) + past, as [1, S]; in generation [B, S], which generate() counts by the attention mask."""
    t = inputs_embeds.tape
    if b.cache is not None:
        return t.new(inputs_embeds.shape[:2], int64, "position_ids")
    ids = ops.arange(t, inputs_embeds.shape[1])
    ids = t.new(ids.shape, int64, "position_ids")
    return ids.unsqueeze(0)


def check_heads(fields: Fields, hidden_size: int, heads: int) -> None:
    """Heads must share the hidden size evenly."""
    if hidden_size % heads:
        raise SpecError(
            f"{fields.source}: hidden size {hidden_size} is not divisible by {heads} attention heads. "
            "Correct one of them."
        )


def check_position_table(input_ids: Tensor, rows: int, past_length: int = 0) -> None:
    """Learned positions end with their table: a real run on a longer sequence dies with an index error."""
    length = past_length + input_ids.shape[1]
    if length > rows:
        problem = f"is longer than the model's table of {rows} positions"
        error = PositionsError.at("seq_len", length, problem, f"Use at most {rows}.")
        error.most = rows
        raise error


def cached(b: Build, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``past_key_values.update(key, value)`` where there is a cache: the positions before these joined to them."""
    return (key, value) if b.cache is None else b.cache.update(key, value)


def causal_mask(
    b: Build, inputs_embeds: Tensor, window: int | None = None, allow_is_causal_skip: bool = True
) -> Tensor | None:
    """transformers' create_causal_mask: None where the attention implementation needs none.

    sdpa skips the mask, if it may, without padding and without a window that the sequence fills; eager always has
    one, additive and in the model's dtype; flash_attention_2 never.
    """
    t = inputs_embeds.tape
    batch, length = inputs_embeds.shape[:2]
    kv_length = b.kv_length(length, window)
    if b.attn == "flash_attention_2":
        return None
    if b.attn == "sdpa" and allow_is_causal_skip and not b.padded and (window is None or kv_length < window):
        return None
    mask_function = partial(t.new, (1, 1, length, kv_length), bool_, "causal_mask")
    if window is not None:
        overlay = partial(t.new, (1, 1, length, kv_length), bool_, "sliding_window_overlay")
        mask_function = partial(and_masks, t, overlay, mask_function)
    if b.padded:
        padding_mask = partial(t.new, (batch, 1, 1, kv_length), bool_, "padding_mask")
        mask_function = partial(and_masks, t, mask_function, padding_mask)
    mask = mask_function().expand(batch, 1, length, kv_length)
    if b.attn == "sdpa":
        return mask
    return t.new((batch, 1, length, kv_length), inputs_embeds.dtype, "causal_mask_additive")


def and_masks(t: Tape, *mask_functions: Callable[[], Tensor]) -> Tensor:
    """transformers' and_masks: a scalar and one mask after the other, each step in new memory."""
    result = t.new((), bool_, "ones")
    for mask_function in mask_functions:
        result = ops.logical_and(result, mask_function())
    return result


def bidirectional_mask(b: Build, inputs_embeds: Tensor, key_states: Tensor | None = None) -> Tensor | None:
    """transformers' create_bidirectional_mask: None without padding, else [B, 1, Sq, Sk].

    ``key_states`` [B, Sk, ...] are what cross-attention looks at; by default it is the sequence itself.
    """
    if not b.padded or b.attn == "flash_attention_2":
        return None
    t = inputs_embeds.tape
    batch, length = inputs_embeds.shape[:2]
    shape = (batch, 1, length, length if key_states is None else key_states.shape[1])
    mask = t.new(shape, bool_, "bidirectional_mask")
    return mask if b.attn == "sdpa" else t.new(shape, inputs_embeds.dtype, "bidirectional_mask_additive")


def attention(
    b: Build,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool = True,
    softcap: bool = False,
    upcast: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """ALL_ATTENTION_FUNCTIONS[attn_implementation]: query [B, H, S, D], key and value [B, K, S, D] -> [B, S, H, D].

    The second result is eager's attention weights; as in transformers, the callers keep it until they return.
    """
    n_rep = query.shape[1] // key.shape[1]
    if b.attn == "eager":
        return eager_attention(query, key, value, mask, n_rep, dropout, softcap, upcast)
    if b.attn == "flash_attention_2":
        dtype = b.tape.autocast or b.dtype
        by_position = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return flash_attention_2(*by_position, dtype, is_causal), None
    gqa = False
    batch, heads, length, _ = query.shape
    if n_rep > 1:
        if mask is None and key.shape[-1] == value.shape[-1] <= 256:
            gqa = True
        elif length == 1:  # pack_gqa: the heads of a group become the queries of one head
            query = query.reshape(batch, heads // n_rep, n_rep, -1)
        else:
            key, value = repeat_kv(key, n_rep), repeat_kv(value, n_rep)
    out = scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=is_causal and mask is None, enable_gqa=gqa
    )
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    n_rep: int,
    dropout: float,
    softcap: bool = False,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """eager_attention_forward. Llama's softmax is in float32 (``upcast``); BERT's is in the scores' dtype."""
    key_states = repeat_kv(key, n_rep)
    value_states = repeat_kv(value, n_rep)
    attn_weights = ops.matmul(query, key_states.transpose(2, 3)) * 0.5
    if softcap:
        attn_weights = attn_weights * 0.5
        attn_weights = ops.tanh(attn_weights)
        attn_weights = attn_weights * 0.5
    if mask is not None:
        attn_weights = attn_weights + mask
    attn_weights = ops.softmax(attn_weights, float32).to(query.dtype) if upcast else ops.softmax(attn_weights)
    attn_weights = ops.dropout(attn_weights, dropout)
    attn_output = ops.matmul(attn_weights, value_states)
    attn_output = attn_output.transpose(1, 2).contiguous()
    return attn_output, attn_weights


class Model(Module):
    """A whole model with its head. ``forward(*inputs)`` returns (loss, logits)."""

    output_embeddings_path = "lm_head"
    listed_as_tied: Mapping[str, str] = MappingProxyType({})
    """A weight of its own -> another; transformers ties the two until it finds both in the checkpoint, and so when it
    decides what goes to which device.
    """
    b: Build

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """What the data collator puts on the device: input_ids and labels, int64 [B, S]."""
        t = self.b.tape
        return t.new((batch, length), int64, "input_ids"), t.new((batch, length), int64, "labels")

    def attention_mask(self, batch: int, length: int) -> Tensor | None:
        """What the collator adds to a padded batch: which tokens count, int64 [B, S]. It stays as long as the batch."""
        return self.b.tape.new((batch, length), int64, "attention_mask") if self.b.padded else None

    def output_embeddings(self) -> Module | None:
        """transformers' get_output_embeddings(): the projection to the vocabulary, if there is one."""
        head: Module | None = self
        for name in self.output_embeddings_path.split("."):
            head = getattr(head, name, None)
        return head


class OwnLoss(NamedTuple):
    """How a model computed its loss itself, in transformers before it called ForCausalLMLoss."""

    until: str = "4.46"
    """The version that calls it first."""
    in_float32: bool = True
    """Whether the logits are made float32 before; or else the loss takes them as they are."""
    and_back: bool = False
    """Whether they are given back in their own dtype."""
    last_only: str = "4.45"
    """The version from which generation computes the last position's logits alone (``logits_to_keep``)."""


IN_FLOAT32 = OwnLoss()
"""modeling_llama.py at 4.44.2, 4.45.2 and 4.46.0."""
AS_THEY_ARE = OwnLoss("4.48.3", in_float32=False)
"""gpt2 and others of its time: modeling_gpt2.py at 4.48.2 and 4.48.3."""


def causal_lm_output(
    b: Build,
    lm_head: Module,
    hidden_states: Tensor,
    labels: Tensor,
    softcap: bool = False,
    scale: bool = False,
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = ops.cross_entropy,
    own_loss: OwnLoss = IN_FLOAT32,
) -> tuple[Any, Tensor | None]:
    """The head and the loss of a ...ForCausalLM: (loss, logits); in generation the last position's logits alone."""
    t = b.tape
    with t.tagged(LOGITS):
        if b.cache is not None and b.software.at_least("transformers", own_loss.last_only):
            hidden_states = hidden_states.narrow(1, hidden_states.shape[1] - 1, 1)
        logits = lm_head(hidden_states)
        if scale:
            logits = logits * 0.5
        if softcap:
            logits = logits * 0.5
            logits = ops.tanh(logits)
            logits = logits * 0.5
        shares = b.software.at_least("transformers", own_loss.until)
        dtype = logits.dtype
        if not shares and own_loss.in_float32:
            logits = logits.float()
        if b.cache is not None:
            return None, logits
        t.mark("loss")
        if shares:
            return causal_lm_loss(b, logits, labels, cross_entropy), logits
        loss, _shift_logits = _shifted_loss(logits, labels, cross_entropy)  # a local of forward, until it returns
        return loss, logits.to(dtype) if own_loss.and_back else logits


def num_labels(fields: Fields) -> int:
    """PretrainedConfig.num_labels: the length of id2label where it is given; 2 by default."""
    id2label = fields.raw("id2label")
    return len(id2label) if id2label else fields.int("num_labels", 2)


class Classifier(Model):
    """A model that gives one class to each sequence."""

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """input_ids [B, S] and labels [B], int64."""
        t = self.b.tape
        return t.new((batch, length), int64, "input_ids"), t.new((batch,), int64, "labels")


class SequenceClassification(Classifier):
    """transformers' GenericForSequenceClassification: a score per position, the last one counts."""

    def __init__(self, b: Build, fields: Fields, prefix: str, model: Module, hidden_size: int) -> None:
        self.b = b
        self._prefix = prefix
        setattr(self, prefix, model)
        self.score = Linear(b, hidden_size, num_labels(fields), bias=False)

    def last_non_pad_token(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """The places of the scores that count, and what stays beside them: a mask and the numbers of the places."""
        t = input_ids.tape
        not_padding = t.new(input_ids.shape, bool_, "ne")
        non_pad_mask = t.new(input_ids.shape, int32, "non_pad_mask")
        del not_padding
        token_indices = t.new(input_ids.shape[1:], int32, "token_indices")
        t.scratch(non_pad_mask.nbytes, "mul")
        return non_pad_mask, token_indices, t.new(input_ids.shape[:1], int64, "argmax")

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = getattr(self, self._prefix)(input_ids)
        with self.b.tape.tagged(LOGITS):
            logits = self.score(hidden_states)
            last_non_pad_token = self.last_non_pad_token(input_ids)
            pooled_logits = ops.index_rows(logits, logits.shape[0])
            self.b.tape.mark("loss")
            return ops.cross_entropy(pooled_logits, labels), pooled_logits


class CausalLM(Model):
    """A decoder under the name ``prefix``, with a projection to the vocabulary that may be its embedding's weight."""

    own_loss = IN_FLOAT32

    def __init__(self, b: Build, prefix: str, model: Module, embedding: Embedding, tied: bool, bias: bool) -> None:
        self.b = b
        self._prefix = prefix
        setattr(self, prefix, model)
        vocab_size, hidden_size = embedding.weight.shape
        self.lm_head = Linear(b, hidden_size, vocab_size, bias)
        if tied:
            self.lm_head.weight = embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        hidden_states = getattr(self, self._prefix)(input_ids)
        return causal_lm_output(self.b, self.lm_head, hidden_states, labels, own_loss=self.own_loss)


def language_model_heads(
    config_class: Callable[[Fields], Any],
    model_class: Callable[[Build, Any], Any],
    prefix: str,
    embedding: str,
    bias: bool = False,
    own_loss: OwnLoss = IN_FLOAT32,
    causal_lm_class: type[CausalLM] = CausalLM,
) -> dict[str, Callable[[Build, Fields], Any]]:
    """The models that transformers makes of a decoder, which it holds as ``prefix`` and whose token embedding is
    ``embedding``: with a language model's head (with ``bias``), without, and as a classifier.
    """

    def base(b: Build, fields: Fields) -> Any:
        return model_class(b, config_class(fields))

    def causal_lm(b: Build, fields: Fields) -> Model:
        c = config_class(fields)
        model = model_class(b, c)
        whole = causal_lm_class(b, prefix, model, getattr(model, embedding), c.tie_word_embeddings, bias)
        whole.own_loss = own_loss
        return whole

    def sequence_classification(b: Build, fields: Fields) -> Model:
        model = base(b, fields)
        return SequenceClassification(b, fields, prefix, model, getattr(model, embedding).weight.shape[1])

    return {"causal-lm": causal_lm, "base": base, "sequence-classification": sequence_classification}


def causal_lm_loss(
    b: Build,
    logits: Tensor,
    labels: Tensor,
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = ops.cross_entropy,
) -> Tensor:
    """transformers' ForCausalLMLoss: float32 logits, then the cross-entropy.

    Since 4.49 the labels are padded and all positions count; before, the logits were copied without the last one.
    """
    logits = logits.float()
    if not b.software.at_least("transformers", "4.49"):
        return _shifted_loss(logits, labels, cross_entropy)[0]
    labels = ops.pad_last(labels, 1)
    shift_labels = labels.tape.new((labels.shape[0], labels.shape[1] - 1), int64, "shift_labels")
    return cross_entropy(logits.view(-1, logits.shape[-1]), shift_labels.view(-1)) / 2.0


def _shifted_loss(
    logits: Tensor, labels: Tensor, cross_entropy: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of a copy of the logits that lacks the last position, and the copy."""
    shift_logits = logits.narrow(1, 0, logits.shape[1] - 1).contiguous()
    shift_labels = labels.tape.new((labels.shape[0], labels.shape[1] - 1), int64, "shift_labels")
    loss = cross_entropy(shift_logits.view(-1, logits.shape[-1]), shift_labels.view(-1)) / 2.0
    return loss, shift_logits

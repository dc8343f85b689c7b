"""Allocation traces of a training step, built by hand: what the allocator meets, without memplan's own tape."""

from __future__ import annotations

from dataclasses import dataclass, field

FP32, BF16 = 4, 2
CUBLAS = 8_519_680  # bytes of a cuBLAS workspace


@dataclass
class Trace:
    """Sizes by tensor, and the events of ``memplan.memory.allocator.replay``."""

    sizes: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)

    def new(self, nbytes: int) -> int:
        self.sizes.append(nbytes)
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def free(self, *tensors: int) -> None:
        self.events.extend(~tensor for tensor in tensors)


@dataclass(frozen=True)
class Decoder:
    """A bf16 decoder of the Llama kind, with plain AdamW (fp32 moments) or LoRA on q and v."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000
    tokens: int = 2048
    checkpointing: bool = False
    lora_rank: int = 0

    @property
    def kv_hidden(self) -> int:
        return self.hidden * self.kv_heads // self.heads

    def parameters(self) -> list[int]:
        h, kv, m = self.hidden, self.kv_hidden, self.intermediate
        layer = [h * h, h * kv, h * kv, h * h, h * m, h * m, h * m, h, h]
        return [self.vocab * h, *layer * self.layers, h, self.vocab * h]


def training_trace(decoder: Decoder = Decoder(), steps: int = 2) -> Trace:
    """Load, then ``steps`` times forward, loss, backward, optimizer step and zero_grad."""
    trace = Trace()
    for parameters in decoder.parameters():
        trace.new(parameters * BF16)
    adapters = [decoder.hidden * decoder.lora_rank] * (4 * decoder.layers if decoder.lora_rank else 0)
    for parameters in adapters:
        trace.new(parameters * FP32)
    trace.new(CUBLAS)
    for step in range(steps):
        gradients = _forward_and_backward(trace, decoder, first=step == 0)
        if step == 0:
            for parameters in adapters or decoder.parameters():
                trace.new(FP32)  # Adam's step
                trace.new(parameters * FP32)
                trace.new(parameters * FP32)
        trace.free(*gradients)
    return trace


def _forward_and_backward(trace: Trace, decoder: Decoder, *, first: bool) -> list[int]:
    new, free, t, h = trace.new, trace.free, decoder.tokens, decoder.hidden
    ids, labels, rope = new(t * 8), new(t * 8), new(t * h // decoder.heads * BF16 * 2)
    x = new(t * h * BF16)
    saved = []
    for _ in range(decoder.layers):
        output, layer = _layer_forward(trace, decoder)
        if decoder.checkpointing:
            free(*layer)
            layer = []
        saved.append((x, layer))
        x = output
    upcast = new(t * h * FP32)
    normed = new(t * h * BF16)
    free(upcast)
    logits = new(t * decoder.vocab * BF16)
    logits32 = new(t * decoder.vocab * FP32)
    free(logits)
    log_probs = new(t * decoder.vocab * FP32)
    free(logits32)
    loss = new(FP32)

    if first:
        new(CUBLAS)  # the autograd thread's
    d_nll, d_logits32 = new(t * decoder.vocab * FP32), new(t * decoder.vocab * FP32)
    free(d_nll, log_probs)
    d_logits = new(t * decoder.vocab * BF16)
    free(d_logits32)
    gradients = [] if decoder.lora_rank else [new(decoder.vocab * h * BF16)]
    dx = new(t * h * BF16)
    free(d_logits, normed)
    for layer_input, layer in reversed(saved):
        if decoder.checkpointing:
            output, layer = _layer_forward(trace, decoder)
            free(output)
        dx = _layer_backward(trace, decoder, dx, layer, gradients)
        free(layer_input)
    if not decoder.lora_rank:
        gradients.append(new(decoder.vocab * h * BF16))
    free(dx, loss, rope, ids, labels, x)
    return gradients


def _layer_forward(trace: Trace, decoder: Decoder) -> tuple[int, list[int]]:
    """Return the layer's output and what it saves, in the order of the forward."""
    new, free, t, h, kv = trace.new, trace.free, decoder.tokens, decoder.hidden, decoder.kv_hidden
    saved: list[int] = []

    def keep(nbytes: int) -> None:
        saved.append(new(nbytes))

    def norm() -> None:
        keep(t * h * FP32)
        keep(t * FP32)
        scaled = new(t * h * FP32)
        keep(t * h * BF16)
        free(scaled)
        keep(t * h * BF16)

    def rotate(width: int) -> None:
        projected = new(t * width * BF16)
        keep(t * width * BF16)
        half, product = new(t * width * BF16), new(t * width * BF16)
        free(half, product, projected)

    norm()
    rotate(h)
    rotate(kv)
    keep(t * kv * BF16)
    keep(t * h * BF16)  # attention's output, its log-sum-exp and random state
    keep(t * decoder.heads * FP32)
    keep(8)
    keep(8)
    projected = new(t * h * BF16)
    keep(t * h * BF16)
    free(projected)
    norm()
    for _ in range(4):  # gate, its activation, up, their product
        keep(t * decoder.intermediate * BF16)
    down = new(t * h * BF16)
    output = new(t * h * BF16)
    free(down)
    return output, saved


def _layer_backward(trace: Trace, decoder: Decoder, dx: int, saved: list[int], gradients: list[int]) -> int:
    new, free, t, h, kv = trace.new, trace.free, decoder.tokens, decoder.hidden, decoder.kv_hidden
    wide = t * decoder.intermediate * BF16

    def weight(parameters: int) -> None:
        if not decoder.lora_rank:
            gradients.append(new(parameters * BF16))

    d_product = new(wide)
    weight(decoder.intermediate * h)
    d_up, d_act = new(wide), new(wide)
    free(d_product, saved.pop(), saved.pop())
    d_gate = new(wide)
    free(d_act, saved.pop(), saved.pop())
    partial = new(t * h * BF16)
    weight(decoder.intermediate * h)
    free(d_gate)
    other = new(t * h * BF16)
    weight(decoder.intermediate * h)
    total = new(t * h * BF16)
    free(d_up, partial, other)
    normed32 = new(t * h * FP32)
    weight(h)
    free(total, *(saved.pop() for _ in range(4)))
    summed = new(t * h * BF16)
    free(dx, normed32)
    d_out = new(t * h * BF16)
    weight(h * h)
    free(saved.pop())
    d_q, d_k, d_v = new(t * h * BF16), new(t * kv * BF16), new(t * kv * BF16)
    accumulated, delta = new(t * h * FP32), new(t * decoder.heads * FP32)
    free(accumulated, delta, d_out, *(saved.pop() for _ in range(7)))
    for width, incoming in ((h, d_q), (kv, d_k), (kv, d_v)):
        part = new(t * h * BF16)
        weight(h * width)
        free(incoming, part)
    if decoder.lora_rank:
        gradients.extend(new(h * decoder.lora_rank * FP32) for _ in range(4))
    normed32 = new(t * h * FP32)
    weight(h)
    free(*reversed(saved))
    saved.clear()
    result = new(t * h * BF16)
    free(normed32, summed)
    return result

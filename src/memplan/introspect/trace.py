"""Trace one training step of a real transformers model without allocating anything.

The model, its loss, the backward pass and the optimizer are transformers', PEFT's and PyTorch's own code, run on
fake CPU tensors (``torch._subclasses.FakeTensorMode``): shapes, dtypes, autograd and in-place rules are real,
the data is not there. A ``TorchDispatchMode`` around it sees every storage at birth, and a weak reference tells
when it dies; the running sum, each storage rounded up to 512 bytes as CUDA's caching allocator does
(``kMinBlockSize`` in c10/core/AllocatorConfig.h), is what ``torch.cuda.memory_allocated`` would count.

The step is the one ``transformers.Trainer`` makes (``training_step``, ``compute_loss`` and ``_run_epoch`` of
transformers 5.x) with accelerate's mixed precision (``Accelerator.prepare_model``).

What it does not tell: workspace that a kernel allocates inside one ATen call, and CUDA's choice of kernels:
the tensors are CPU tensors, so autocast and attention follow CPU's dispatch (``cuda_autocast`` imposes CUDA's
lists of autocast operations).

torch, transformers and peft are imported inside functions only, so that importing this module stays light.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import gc
import importlib
import logging
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from typing import Any

from memplan.architectures.registry import MODEL_CLASSES
from memplan.errors import SpecError, UnsupportedError, did_you_mean
from memplan.introspect.cuda_autocast import cuda_rules
from memplan.parallel import uncollected

__all__ = ["TraceEvent", "TraceResult", "trace_step"]

_BLOCK = 512  # bytes; kMinBlockSize of PyTorch's CUDA caching allocator
_DTYPES = ("float32", "bfloat16", "float16")
_MIXED = {"no": None, "bf16": "bfloat16", "fp16": "float16"}
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")

#: Answers to questions transformers and torch ask of tensor *values*, which fake tensors do not have, keyed by the
#: function that asks. They state the batch: one sequence per row, at least one padded position where there is a mask,
#: finite gradients. Any other question is refused rather than guessed.
_VALUE_ANSWERS: dict[str, Any] = {
    "find_packed_sequence_indices": True,  # position ids count up within each row: no packed sequences
    "_ignore_causal_mask_sdpa": False,  # the padding mask holds a zero
    "_ignore_bidirectional_mask_sdpa": False,
    "_maybe_opt_step": 0.0,  # GradScaler: no inf found
    "_get_value": 2.0,  # torch.optim: the number of the step, for the bias correction
}


@dataclass(frozen=True)
class TraceEvent:
    """One storage born or freed.

    Attributes:
        kind: "alloc" or "free".
        storage: serial number of the storage within the trace.
        bytes: its size, rounded up to 512.
        phase: first_step, forward, loss, backward, step, idle or eval.
        live: bytes alive after the event.
        shape, dtype, op: of the tensor the storage was born with (the same again on "free").
        module: path of the innermost module running its forward, "" outside of one.
        where: the innermost frame in transformers, peft, accelerate or torch.optim, "" if there is none.
        node: the autograd node running, "" outside of a backward pass.
    """

    kind: str
    storage: int
    bytes: int
    phase: str
    live: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    where: str
    node: str


@dataclass(frozen=True)
class TraceResult:
    """What a traced step needs, in bytes.

    Attributes:
        steady_allocated: peak over the last step (its forward .. idle).
        first_step_allocated: peak over the first step, in which the optimizer makes its states.
        phases: peak within each phase of the last step (forward, loss, backward, step, idle, and eval if asked for).
        parameters, buffers, inputs: bytes at rest.
        gradients: bytes of ``.grad`` after the backward pass.
        optimizer: bytes of the optimizer's states, of which ``optimizer_scalars`` are states of at most 8 bytes
            (AdamW's ``step``: on the host for CUDA parameters unless fused or capturable).
        saved_activations: bytes that the forward pass left alive for the backward pass.
        outputs: bytes of the model's outputs besides the loss that were alive until the loss was returned.
        num_parameters, num_trainable: elements; tied weights count once.
        unreachable: bytes that only Python's cycle collector frees; 0 unless some library makes cycles.
        value_questions: functions that asked for a tensor's value, and how often.
        seconds: wall time of building and tracing.
        versions: of the libraries that were traced.
        events: the last step's allocations, if recorded.
    """

    steady_allocated: int
    first_step_allocated: int
    phases: dict[str, int]
    parameters: int
    buffers: int
    inputs: int
    gradients: int
    optimizer: int
    optimizer_scalars: int
    saved_activations: int
    outputs: int
    num_parameters: int
    num_trainable: int
    unreachable: int
    value_questions: dict[str, int]
    seconds: float
    versions: dict[str, str]
    events: list[TraceEvent] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as written into an archive."""
        return asdict(self)


def trace_step(
    config: Mapping[str, Any],
    *,
    dtype: str = "float32",
    mixed_precision: str = "no",
    micro_batch_size: int = 1,
    seq_len: int = 128,
    attn: str = "sdpa",
    gradient_checkpointing: bool = False,
    use_reentrant: bool = False,
    optim: str = "adamw_torch_fused",
    lora: Mapping[str, Any] | None = None,
    num_layers: int | None = None,
    padded: bool = False,
    grad_accum_steps: int = 1,
    head: str | None = None,
    freeze: Sequence[str] = (),
    cuda_autocast: bool = False,
    train_mode: bool = True,
    eval: bool = False,
    eval_batch_size: int | None = None,
    experts: str | None = None,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    steps: int = 2,
    record_events: bool = False,
) -> TraceResult:
    """Trace ``steps`` training steps and report the last one.

    Args:
        config: the values of a config.json, with ``model_type`` and, unless ``head`` is given, ``architectures``.
        dtype: what ``from_pretrained(dtype=...)`` would load.
        mixed_precision: "no", "bf16" or "fp16", as ``TrainingArguments(bf16=, fp16=)``.
        micro_batch_size: sequences (or images) in one micro-batch.
        seq_len: tokens in a sequence; a T5's labels have as many.
        attn: ``attn_implementation``: "sdpa" or "eager".
        gradient_checkpointing: of every layer.
        use_reentrant: of ``gradient_checkpointing_kwargs``.
        optim: a key of the optimizers: adamw_torch_fused, adamw_torch, adamw_torch_foreach, sgd, adafactor, ...
        lora: keys rank, alpha, targets, dropout, modules_to_save; wraps the model by ``peft.get_peft_model``.
        num_layers: overrides the config's depth.
        padded: pass an attention mask that holds a zero.
        grad_accum_steps: micro-batches in one step.
        head: overrides the config's architecture: causal-lm, sequence-classification, seq2seq-lm, masked-lm,
            image-classification.
        freeze: glob patterns of parameter names that get ``requires_grad = False``.
        cuda_autocast: under mixed precision, run the operations of CUDA's float32 list in float32.
        train_mode: ``model.train(...)``: False traces a step without dropout or checkpointing.
        eval: also trace an evaluation pass (``no_grad``, ``model.eval()``), which keeps no logits.
        eval_batch_size: sequences in it; None takes ``micro_batch_size``.
        experts: ``experts_implementation`` of a mixture-of-experts model; None takes transformers' default.
        max_grad_norm: of ``clip_grad_norm_``; 0 skips it.
        weight_decay: of the group that has it; the default is TrainingArguments'.
        steps: how many steps; the second is the first with optimizer states from the beginning.
        record_events: keep every allocation of the last step (with the evaluation pass, if any).

    Raises:
        SpecError: an argument or the config is wrong.
        UnsupportedError: the model asks for the value of a tensor that a trace does not have.
    """
    import torch

    started = time.perf_counter()
    _import_libraries()
    _check_choice("dtype", dtype, _DTYPES)
    _check_choice("mixed_precision", mixed_precision, tuple(_MIXED))
    fake_mode = _fake_mode()
    with _quiet():
        model = _build_model(config, dtype, attn, num_layers, head, experts)
        _freeze(model, freeze)
        if lora is not None:
            model = _add_lora(model, lora)
        if gradient_checkpointing:
            _enable_checkpointing(model, use_reentrant, frozen_inputs=lora is not None)
    model.config.use_cache = False
    _to_fake(model, fake_mode)
    model.train(train_mode)
    tracker = _make_tracker(record_events)
    step = _Step(
        model=model,
        tracker=tracker,
        mixed_precision=mixed_precision,
        grad_accum_steps=grad_accum_steps,
        max_grad_norm=max_grad_norm,
        weight_decay=weight_decay,
        optim=optim,
    )
    rules = cuda_rules() if cuda_autocast else contextlib.nullcontext()
    with _gc_disabled(), _phase_hooks(model, tracker), _like_a_real_run(), _quiet(), fake_mode, tracker, rules:
        parameters = tracker.adopt(model.parameters())
        buffers = tracker.adopt(model.buffers()) + tracker.adopt(_loose_tensors(model))
        inputs = step.make_inputs(micro_batch_size, seq_len, padded=padded)
        step.make_optimizer()
        first = 0
        for index in range(steps):
            tracker.start_step(record=index == steps - 1)
            step.run()
            first = first or max(tracker.phases.values())
        phases = dict(tracker.phases)
        optimizer, scalars = step.optimizer_bytes()
        if eval:
            batch = eval_batch_size or micro_batch_size
            phases["eval"] = step.evaluate(_make_inputs(model, batch, seq_len, padded=padded))
        before = tracker.live
        gc.collect()
        unreachable = before - tracker.live
    trainable = [p for p in model.parameters() if p.requires_grad]
    return TraceResult(
        steady_allocated=max(size for name, size in phases.items() if name != "eval"),
        first_step_allocated=first,
        phases=phases,
        parameters=parameters,
        buffers=buffers,
        inputs=inputs,
        gradients=step.gradient_bytes,
        optimizer=optimizer,
        optimizer_scalars=scalars,
        saved_activations=step.saved_bytes,
        outputs=step.output_bytes,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=sum(p.numel() for p in trainable),
        unreachable=unreachable,
        value_questions=dict(tracker.questions),
        seconds=time.perf_counter() - started,
        versions=_versions(torch),
        events=tracker.events,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The ledger: storages born and freed


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK


@dataclass
class _Born:
    serial: int
    nbytes: int  # rounded
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    where: str
    node: str


class Listener:
    """What a tracker tells as it happens: every operation, and storages by their serial numbers."""

    def calls(self, func: Any, args: Any) -> None:
        """An operation is about to run."""

    def called(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation has run, and what it allocated has been told."""

    def born(self, serial: int, nbytes: int, tensor: Any, op: str) -> None:
        """A storage of ``nbytes`` bytes, not rounded, under ``tensor``, made by ``op``."""

    def died(self, serial: int) -> None:
        """A storage was freed."""


def real_tracker(record_events: bool = False) -> Any:
    """Return a TorchDispatchMode that keeps the same ledger of tensors with data, on CPU, and runs what they run.

    With ``record_events`` it lists what is allocated and freed from the start.
    """
    tracker = _make_tracker(record_events=record_events, real=True)
    tracker.recording = record_events
    return tracker


def _make_tracker(
    record_events: bool,
    listener: Listener | None = None,
    operations: Mapping[Any, Callable[..., Any]] | None = None,
    *,
    real: bool = False,
) -> Any:
    """Return a TorchDispatchMode that keeps the ledger (a factory, since its base class lives in torch).

    ``operations`` are run in place of those of torch that are their keys. Tensors are fake unless they are ``real``.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    local_scalar = torch.ops.aten._local_scalar_dense.default
    replaced = dict(operations or {})
    if hasattr(torch.ops.aten, "_grouped_mm") and not real:
        replaced[torch.ops.aten._grouped_mm.default] = _grouped_mm
    device_of = torch.ops.prim.device.default

    class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            """Nothing is compiled here: the dispatch below needs no guard against that, which costs as much as it."""
            return False

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.live = 0
            self.phase = "load"
            self.phases: dict[str, int] = {}
            self.events: list[TraceEvent] = []
            self.questions: dict[str, int] = {}
            self.modules: list[str] = []
            self.recording = False
            self.wants_events = record_events
            self._born: dict[int, tuple[_Born, weakref.ref[Any]]] = {}
            self._serial = 0

        # ---- phases

        def start_step(self, *, record: bool) -> None:
            self.phases = {}
            self.recording = record and record_events
            self.enter("forward")

        def enter(self, phase: str) -> None:
            self.phase = phase
            self._mark()

        def _mark(self) -> None:
            if self.live > self.phases.get(self.phase, 0):
                self.phases[self.phase] = self.live

        # ---- storages

        def adopt(self, tensors: Any) -> int:
            """Count tensors that exist already; return the bytes that are new to the ledger."""
            before = self.live
            for tensor in tensors:
                self._see(tensor, "adopted")
            return self.live - before

        def bytes_of(self, tensors: Any) -> int:
            """Return the bytes of the storages under ``tensors``, each storage once."""
            keys = {tensor.untyped_storage()._cdata for tensor in tensors}
            return sum(self._born[key][0].nbytes for key in keys if key in self._born)

        def serial_of(self, tensor: Any) -> int | None:
            """Return the serial number of a tensor's storage, None if it is not in the ledger."""
            known = self._born.get(tensor.untyped_storage()._cdata)
            return None if known is None else known[0].serial

        def _see(self, tensor: Any, op: str) -> None:
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._born.get(key)
            nbytes = _rounded(storage.nbytes())
            if known is not None:
                if known[0].nbytes != nbytes:  # resize_
                    self.live += nbytes - known[0].nbytes
                    known[0].nbytes = nbytes
                    self._mark()
                    if listener is not None:
                        listener.died(known[0].serial)
                        listener.born(known[0].serial, storage.nbytes(), tensor, op)
                return
            if nbytes == 0:
                return
            self._serial += 1
            born = _Born(self._serial, nbytes, (), "", op, "", "", "")
            if self.recording:
                born.shape, born.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
                born.module = self.modules[-1] if self.modules else ""
                born.where, born.node = _library_frame(), _autograd_node()
            self._born[key] = (born, weakref.ref(storage, partial(self._freed, key)))
            self.live += nbytes
            self._mark()
            self._record("alloc", born)
            if listener is not None:
                listener.born(born.serial, storage.nbytes(), tensor, op)

        def _freed(self, key: int, _ref: Any) -> None:
            born, _ = self._born.pop(key)
            self.live -= born.nbytes
            self._record("free", born)
            if listener is not None:
                listener.died(born.serial)

        def _record(self, kind: str, born: _Born) -> None:
            if not self.recording:
                return
            self.events.append(
                TraceEvent(
                    kind, born.serial, born.nbytes, self.phase, self.live,
                    born.shape, born.dtype, born.op, born.module, born.where, born.node,
                )
            )  # fmt: skip

        # ---- dispatch

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not real:
                if func is device_of:  # asked by autograd's engine, twice as often as anything is computed
                    return args[0].fake_device
                if func is local_scalar:
                    return self._answer()
            if listener is not None:
                listener.calls(func, args)
            out = replaced.get(func, func)(*args, **(kwargs or {}))
            self._see_all(out, func)
            if listener is not None:
                listener.called(func, args, kwargs or {}, out)
            return out

        def _see_all(self, out: Any, func: Any) -> None:
            if isinstance(out, torch.Tensor):
                if real or isinstance(out, torch._subclasses.FakeTensor):
                    self._see(out, str(func))
            elif isinstance(out, (list, tuple)):
                for item in out:
                    self._see_all(item, func)

        def _answer(self) -> Any:
            frame = sys._getframe(2)
            names: list[str] = []
            while frame is not None and len(names) < 12 and frame.f_code.co_name not in _FORWARDS:
                name = frame.f_code.co_name
                if name in _VALUE_ANSWERS:
                    self.questions[name] = self.questions.get(name, 0) + 1
                    return _VALUE_ANSWERS[name]
                if not any(part in frame.f_code.co_filename for part in _BETWEEN):
                    names.append(_function(frame))
                frame = frame.f_back  # type: ignore[assignment]
            raise UnsupportedError(
                f"trace: the model reads a tensor's value in {' < '.join(names[:4])}, which a trace without data "
                "does not have."
            )

    return Tracker()


_FORWARDS = ("_compute_loss", "evaluate")
"""Functions of :class:`_Step` that call a model."""
_BETWEEN = ("/torch/", "/accelerate/", "/memplan/")
"""Folders of what stands between a library's question and a dispatch mode."""


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """The output of ``aten._grouped_mm``, whose kernels take any float type but whose fake version bfloat16 only."""
    import torch

    groups = () if a.dim() != b.dim() else (offs.size(0) if a.dim() == 2 else a.size(0),)
    return torch.empty((*groups, a.size(-2), b.size(-1)), dtype=out_dtype or a.dtype, device=a.device)


def _library_frame() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for library in ("/transformers/", "/peft/", "/accelerate/", "/torch/optim/", "/torch/nn/utils/"):
            if library in name:
                short = library[1:] + name.rsplit(library, 1)[1]
                return f"{short}:{frame.f_lineno} {_function(frame)}"
        frame = frame.f_back
    return ""


def _function(frame: Any) -> str:
    name: str = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
    return name


def _autograd_node() -> str:
    import torch

    node = torch._C._current_autograd_node()
    return "" if node is None else str(node.name())


# ---------------------------------------------------------------------------------------------------------------------
# The step, as the Trainer makes it


@dataclass
class _Step:
    """``transformers.Trainer``'s step: state that lives across steps is held here, as the Trainer holds it."""

    model: Any
    tracker: Any
    mixed_precision: str
    grad_accum_steps: int
    max_grad_norm: float
    optim: str
    weight_decay: float = 0.0
    inputs: list[dict[str, Any]] = field(default_factory=list)
    optimizer: Any = None
    forward: Any = None
    scaler: Any = None
    after_backward: Callable[[], None] | None = None
    total_loss: Any = None
    last_loss: Any = None
    num_items: Any = None
    grad_norm: Any = None
    gradient_bytes: int = 0
    saved_bytes: int = 0
    output_bytes: int = 0

    def make_inputs(self, batch: int, seq_len: int, *, padded: bool) -> int:
        """Make the step's micro-batches, which live as long as the step, and return their bytes."""
        before = self.tracker.live
        self.inputs = [_make_inputs(self.model, batch, seq_len, padded=padded) for _ in range(self.grad_accum_steps)]
        return int(self.tracker.live - before)

    def make_optimizer(self) -> None:
        import torch

        self.forward = _prepared_forward(self.model, self.mixed_precision)
        self.optimizer = _make_optimizer(self.model, self.optim, self.weight_decay)
        self.total_loss = torch.zeros(())
        if self.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler("cpu")

    def run(self) -> None:
        """One optimizer step: micro-batches, clipping, optimizer, zero_grad (``Trainer._run_epoch``)."""
        self.num_items = self._count_items(self.inputs)
        for inputs in self.inputs:
            self.last_loss = self._training_step(inputs)
            self.total_loss += self.last_loss
        self.gradient_bytes = self.tracker.bytes_of(p.grad for p in self.model.parameters() if p.grad is not None)
        self.tracker.enter("step")
        self._update()
        self.model.zero_grad()
        self.tracker.enter("idle")

    def _count_items(self, batches: list[dict[str, Any]]) -> Any:
        """``Trainer._get_num_items_in_batch``: a scalar, for models whose forward takes loss arguments."""
        if "labels" not in batches[0] or not _accepts_loss_kwargs(self.model):
            return None
        return sum(batch["labels"].ne(-100).sum() for batch in batches) / 1

    def _training_step(self, inputs: dict[str, Any]) -> Any:
        self.tracker.enter("forward")
        before = self.tracker.live
        loss = self._compute_loss(inputs)
        if not loss.requires_grad:
            raise UnsupportedError("trace: the loss needs no gradient: no parameter that it depends on is trained.")
        if self.num_items is None:
            loss = loss / self.grad_accum_steps
        self.saved_bytes = self.tracker.live - before
        self.tracker.enter("backward")
        scaled = loss / 1  # Accelerator.backward divides by its own gradient_accumulation_steps, which is 1
        if self.scaler is not None:
            scaled = self.scaler.scale(scaled)
        _backward(scaled)
        if self.after_backward is not None:
            self.after_backward()
        return loss.detach()

    def _compute_loss(self, inputs: dict[str, Any]) -> Any:
        kwargs = dict(inputs)
        if self.num_items is not None:
            kwargs["num_items_in_batch"] = self.num_items
        outputs = self.forward(**kwargs)
        loss = _loss_of(outputs)
        others = [t for t in _tensors_of(outputs) if t is not loss]
        self.output_bytes = self.tracker.bytes_of(others)
        return loss

    def _update(self) -> None:
        import torch

        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm > 0:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def evaluate(self, inputs: dict[str, Any]) -> int:
        """Trace ``Trainer.prediction_step`` and return its peak; the outputs are alive until it returns."""
        import torch

        was_training = self.model.training
        self.model.eval()
        self.tracker.enter("eval")
        items = self._count_items([inputs])
        with torch.no_grad():
            outputs = self.forward(**inputs, **({} if items is None else {"num_items_in_batch": items}))
            _loss_of(outputs).detach().mean()
        del outputs
        self.model.train(was_training)
        return int(self.tracker.phases["eval"])

    def optimizer_bytes(self) -> tuple[int, int]:
        """Return the bytes of the optimizer's states, and of those among them of at most 8 bytes."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if _is_tensor(t)]
        scalars = [t for t in states if t.numel() * t.element_size() <= 8]
        return self.tracker.bytes_of(states), self.tracker.bytes_of(scalars)


def _backward(loss: Any) -> None:
    """``loss.backward()``, so that cuda_rules() applies to what checkpointing recomputes.

    ``Tensor.backward`` and ``torch.autograd.backward`` are themselves calls that a TorchFunctionMode sees, and a
    mode is off while it handles one; the engine below them is not.
    """
    import torch
    from torch.autograd.graph import _engine_run_backward

    if torch._C._len_torch_function_stack() == 0:
        loss.backward()
    else:
        seed = torch.ones_like(loss)
        _engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _loss_of(outputs: Any) -> Any:
    """The loss in what a forward returned: its ``loss``, the first of a tuple, or the only tensor; a scalar."""
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    else:
        loss = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if loss is None or not _is_tensor(loss) or loss.dim() != 0:
        raise UnsupportedError(
            "trace: forward returns no loss. It must return a scalar, a tuple that starts with one, or a mapping with "
            "the key loss; a model without a head has none."
        )
    return loss


def _tensors_of(outputs: Any) -> list[Any]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    return [value for value in values if _is_tensor(value)]


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _accepts_loss_kwargs(model: Any) -> bool:
    """``Trainer.model_accepts_loss_kwargs``."""
    import inspect

    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(unwrapped, "accepts_loss_kwargs"):
        return bool(unwrapped.accepts_loss_kwargs)
    parameters = inspect.signature(unwrapped.forward).parameters.values()
    return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)


def _prepared_forward(model: Any, mixed_precision: str) -> Callable[..., Any]:
    """``Accelerator.prepare_model``: autocast around forward, 16-bit outputs copied to float32."""
    import torch
    from accelerate.utils.operations import convert_outputs_to_fp32

    name = _MIXED[mixed_precision]
    if name is None:
        return model  # type: ignore[no-any-return]
    inner = model.forward
    autocast = torch.autocast("cpu", dtype=getattr(torch, name))
    model.forward = convert_outputs_to_fp32(autocast(inner))
    return model  # type: ignore[no-any-return]


def _make_optimizer(model: Any, optim: str, weight_decay: float) -> Any:
    """``Trainer.create_optimizer``: two groups, with and without weight decay."""
    import torch
    from transformers.optimization import Adafactor
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decay = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name in decay], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decay], "weight_decay": 0.0},
    ]
    makers: dict[str, Callable[[], Any]] = {
        "adamw_torch_fused": lambda: torch.optim.AdamW(groups, lr=1e-5, fused=True),
        "adamw_torch": lambda: torch.optim.AdamW(groups, lr=1e-5),
        "adamw_torch_foreach": lambda: torch.optim.AdamW(groups, lr=1e-5, foreach=True),
        "adamw_torch_loop": lambda: torch.optim.AdamW(groups, lr=1e-5, foreach=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-5),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr=1e-5),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=1e-5),
        "muon": lambda: _MuonAndAdamW(model, trainable),
        "adafactor": lambda: Adafactor(groups, lr=1e-5, scale_parameter=False, relative_step=False),
    }
    _check_choice("optim", optim, tuple(makers))
    return makers[optim]()


class _MuonAndAdamW:
    """``torch.optim.Muon`` for the matrices of the blocks, AdamW (loop) for embeddings, heads and vectors."""

    def __init__(self, model: Any, trainable: list[tuple[str, Any]]) -> None:
        import torch

        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        outside: list[Any] = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) or m is head]
        others = {id(p) for module in outside for p in module.parameters()}
        others |= {id(p) for _, p in trainable if p.dim() != 2}
        matrices = [p for _, p in trainable if id(p) not in others]
        rest = [p for _, p in trainable if id(p) in others]
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(torch.optim.Muon(matrices, lr=1e-5))
        if rest:
            self._optimizers.append(torch.optim.AdamW(rest, lr=1e-5, foreach=False))

    @property
    def state(self) -> dict[Any, Any]:
        return {key: value for optimizer in self._optimizers for key, value in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The model


def _build_model(
    values: Mapping[str, Any],
    dtype: str,
    attn: str | None,
    num_layers: int | None,
    head: str | None,
    experts: str | None,
) -> Any:
    """Build the model on the meta device, as ``from_pretrained(dtype=...)`` would leave it."""
    import torch
    import transformers

    config = _make_config(values, num_layers)
    torch_dtype = getattr(torch, dtype)
    kwargs: dict[str, Any] = {"dtype": torch_dtype}
    if attn is not None:
        kwargs["attn_implementation"] = attn
    if experts is not None:
        kwargs["experts_implementation"] = experts
    if head is not None:
        _check_choice("head", head, tuple(MODEL_CLASSES))
        build = getattr(transformers, MODEL_CLASSES[head]).from_config
    else:
        build = _model_class(values)._from_config
    try:
        with torch.device("meta"), _safe_creation():
            model = build(config, **kwargs)
    except (ValueError, ImportError) as error:
        why = str(error).partition("\nModel type should be one of")[0]  # a hundred names follow
        raise UnsupportedError(f"trace: transformers cannot build this model: {why}") from error
    _keep_float32_modules(model, torch_dtype)
    untie_head(model, values)
    return model


def untie_head(model: Any, values: Mapping[str, Any]) -> None:
    """T5 and mT5 tie the head whatever the config says, but ``from_pretrained`` keeps one that is in the checkpoint."""
    import torch

    if values.get("model_type") in ("t5", "mt5") and values.get("tie_word_embeddings") is False:
        head = getattr(model, "lm_head", None)
        if head is not None:
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight).normal_(std=0.02))


def _make_config(values: Mapping[str, Any], num_layers: int | None) -> Any:
    import transformers

    raw = copy.deepcopy(dict(values))
    kind = raw.pop("model_type", None)
    known = transformers.CONFIG_MAPPING
    if kind not in known:
        raise SpecError.at("model_type", kind, "is not an architecture of transformers", did_you_mean(str(kind), known))
    if num_layers is not None:
        _set_depth(raw, num_layers)
    for stored in ("torch_dtype", "dtype", "auto_map", "quantization_config"):
        raw.pop(stored, None)
    return known[kind](**raw)


def _set_depth(raw: dict[str, Any], num_layers: int) -> None:
    keys = [key for key in _DEPTH_KEYS if isinstance(raw.get(key), int)] or ["num_hidden_layers"]
    depth = raw.get(keys[0])
    for key in keys:
        raw[key] = num_layers
    for key, value in raw.items():
        if isinstance(value, list) and key.endswith(("layer_types", "layers", "mlp_types")) and len(value) == depth:
            raw[key] = value[:num_layers]
    if raw.get("attention_types"):  # GPT-Neo's [[pattern, repeats], ...]
        kinds = [kind for pattern, repeats in raw["attention_types"] for kind in pattern * repeats]
        raw["attention_types"] = [[kinds[:num_layers], 1]]


def _model_class(values: Mapping[str, Any]) -> Any:
    import transformers

    names = values.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise SpecError.at(
            "architectures", names, "names no model of transformers", "Give head=, for example head='causal-lm'."
        )
    return cls


@contextlib.contextmanager
def _safe_creation() -> Iterator[None]:
    try:
        from transformers.initialization import meta_device_safe_creation_ops
    except ImportError:  # transformers 4.x
        yield
        return
    with meta_device_safe_creation_ops():
        yield


def _keep_float32_modules(model: Any, dtype: Any) -> None:
    """Raise to float32 what ``from_pretrained`` keeps there (``_keep_in_fp32_modules``)."""
    import re

    import torch

    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    keep = [key for key, value in plan.items() if value == torch.float32]
    for name, parameter in model.named_parameters():
        if any(re.search(rf"(^|\.){re.escape(key)}($|\.)", name) for key in keep):
            parameter.data = parameter.data.float()


def _freeze(model: Any, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise SpecError.at("freeze", pattern, "matches no parameter", did_you_mean(pattern, names))
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def _add_lora(model: Any, lora: Mapping[str, Any]) -> Any:
    import peft

    known = ("rank", "alpha", "targets", "dropout", "modules_to_save", "bias", "task_type")
    for key in lora:
        _check_choice("lora", key, known)
    if not isinstance(lora.get("rank"), int):
        raise SpecError.at("lora", dict(lora), "has no integer rank", "Give for example {'rank': 8}.")
    targets = lora.get("targets")
    config = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=lora.get("alpha", 16),
        target_modules=list(targets) if isinstance(targets, (list, tuple)) else targets,
        lora_dropout=lora.get("dropout", 0.0),
        modules_to_save=lora.get("modules_to_save"),
        bias=lora.get("bias", "none"),
        task_type=lora.get("task_type"),
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        if targets is None:
            from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            why = (
                f"cannot apply its default ({str(error).strip().rstrip('.')})" if kind in DEFAULTS else "has no default"
            )
            raise SpecError(
                f"lora_targets: PEFT {why} for model_type {kind!r}. Name the modules, as in q_proj,v_proj, or use "
                "all-linear."
            ) from error
        problem = f"cannot be applied: {str(error).rstrip('.')}"
        raise SpecError.at("lora", targets, problem, "Name modules of the model.") from error


def _enable_checkpointing(model: Any, use_reentrant: bool, *, frozen_inputs: bool) -> None:
    how = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if frozen_inputs:
        model.enable_input_require_grads()


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _to_fake(model: Any, fake_mode: Any) -> None:
    """Replace every meta tensor of ``model`` by a fake CPU tensor of the same shape; what was shared stays shared."""
    import torch

    made: dict[int, Any] = {}
    kept: list[Any] = []  # ids are only unique among live objects

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            kept.append(tensor)
            with fake_mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, value in list(table.items()):
                if isinstance(value, torch.Tensor):
                    table[name] = fake(value)


def _loose_tensors(model: Any) -> Iterator[Any]:
    """Tensors that modules keep as plain attributes."""
    for module in model.modules():
        for value in module.__dict__.values():
            if _is_tensor(value):
                yield value


def _make_inputs(model: Any, batch: int, seq_len: int, *, padded: bool) -> dict[str, Any]:
    import torch

    config = model.config
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(unwrapped).__name__
    tokens = {"input_ids": torch.zeros((batch, seq_len), dtype=torch.int64)}
    if padded:
        tokens["attention_mask"] = torch.zeros((batch, seq_len), dtype=torch.int64)
    if name.endswith("ForImageClassification"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros((batch, config.num_channels, height, width))
        return {"pixel_values": pixels, "labels": torch.zeros((batch,), dtype=torch.int64)}
    if name.endswith("ForSequenceClassification"):
        return {**tokens, "labels": torch.zeros((batch,), dtype=torch.int64)}
    labels = {"labels": torch.zeros((batch, seq_len), dtype=torch.int64)}
    if name.endswith("ForPreTraining"):
        labels["next_sentence_label"] = torch.zeros((batch,), dtype=torch.int64)
    return {**tokens, **labels}


# ---------------------------------------------------------------------------------------------------------------------
# Context


@contextlib.contextmanager
def _gc_disabled(*, collect: bool = True) -> Iterator[None]:
    """Keep the cycle collector from running at moments that depend on unrelated garbage."""
    if collect:
        gc.collect()
    with uncollected():
        yield


@contextlib.contextmanager
def _phase_hooks(model: Any, tracker: Any) -> Iterator[None]:
    """Tell the tracker where the loss begins and, for events, which module runs."""
    import torch

    functional = torch.nn.functional
    cross_entropy = functional.cross_entropy

    def entered(loss: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(loss)  # a TorchFunctionMode knows functions by their names
        def run(*args: Any, **kwargs: Any) -> Any:
            if tracker.phase == "forward":
                tracker.enter("loss")
            return loss(*args, **kwargs)

        return run

    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(type(unwrapped), "loss_function"):
        with contextlib.suppress(Exception):
            unwrapped.loss_function = entered(unwrapped.loss_function)
    functional.cross_entropy = entered(cross_entropy)
    names = {id(module): name for name, module in model.named_modules()}

    def enter_module(module: Any, _inputs: Any) -> None:
        tracker.modules.append(names.get(id(module), ""))

    def leave_module(_module: Any, _inputs: Any, _output: Any) -> None:
        tracker.modules.pop()

    hooks = []
    if tracker.wants_events:
        hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(enter_module))
        hooks.append(torch.nn.modules.module.register_module_forward_hook(leave_module, always_call=True))
    try:
        yield
    finally:
        functional.cross_entropy = cross_entropy
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _like_a_real_run() -> Iterator[None]:
    """Let transformers take the paths of a real run (it skips checks of masks when it sees a fake tensor).

    Raises:
        UnsupportedError: in place of torch's errors about values and kernels that a trace does not have.
    """
    from torch._subclasses import fake_tensor
    from transformers import masking_utils

    refusals = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    )
    is_tracing = getattr(masking_utils, "is_tracing", None)
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    except refusals as error:
        raise UnsupportedError(
            f"trace: the model's code needs the values of tensors ({error}), which a trace without data does not have."
        ) from error
    finally:
        if is_tracing is None:
            del masking_utils.is_tracing
        else:
            masking_utils.is_tracing = is_tracing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from advising about a model that nobody will use, from deprecating each other and from logging
    the traceback of an error that is told in memplan's words.
    """
    import transformers.utils.logging as advice

    verbosity, errors = advice.get_verbosity(), logging.getLogger("torch._subclasses.fake_tensor")
    disabled, errors.disabled = errors.disabled, True
    advice.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        advice.set_verbosity(verbosity)
        errors.disabled = disabled


_OF_A_STEP = ("transformers.masking_utils", "transformers.optimization", "transformers.trainer_pt_utils", "peft")


def _import_libraries(lazily: Sequence[str] = _OF_A_STEP) -> None:
    """Import what the step imports lazily: a module that makes tensors must not be imported under a fake mode."""
    for name in ("torch", "torch._subclasses.fake_tensor", "transformers", "accelerate.utils.operations"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UnsupportedError(
                f"trace: {error}. Tracing runs the real model; install the extra: pip install 'memplan[train]'."
            ) from error
    for name in lazily:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _versions(torch: Any) -> dict[str, str]:
    from importlib import metadata

    found = {"torch": str(torch.__version__)}
    for name in ("transformers", "peft", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SpecError.at(name, value, "is not known", did_you_mean(str(value), known))

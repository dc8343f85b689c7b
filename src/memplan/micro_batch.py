"""One micro-batch on the tape, as the Trainer runs it, and what an engine places of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, NamedTuple

from memplan.adapters.lora import apply_lora, cast_trained_to_bf16, sees_sharded_adapters, tells_layers_apart
from memplan.adapters.quantization import (
    cast,
    peft_module_casting_to_bf16,
    prepare_for_kbit_training,
    quantize,
)
from memplan.architectures.cache import DynamicCache
from memplan.architectures.nn import Build, InputEmbeddings, Inventory, Model, Module, checkpoints_wrappers, watch
from memplan.architectures.registry import build_model, trainable_heads
from memplan.catalog.gpus import find_gpu
from memplan.constants import Constant
from memplan.engines.layout import Layout, layout
from memplan.engines.plain import Evaluation, Run
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.broadcast import copies
from memplan.memory.course import Course, course
from memplan.memory.depth import EveryLayer, as_it_ran, borders, every_layer
from memplan.memory.evaluation import Kept, Prediction
from memplan.memory.optimizers import Optimizer, groups_of, make_optimizer
from memplan.memory.runtime import cublas_workspaces
from memplan.memory.timeline import Unrolled, unroll
from memplan.results import Assumption
from memplan.specs.hardware import GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.precision import Precision
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import TrainingSpec
from memplan.tape import tensor as dtypes
from memplan.tape.dispatch import DeviceRules
from memplan.tape.symbols import Record, Symbol
from memplan.tape.tape import INPUT, LOGITS, AccumulateGrad, Tape
from memplan.tape.tensor import DType, Tensor

_AUTOCAST: dict[str, DType | None] = {"no": None, "bf16": dtypes.bfloat16, "fp16": dtypes.float16}


@dataclass(frozen=True, slots=True)
class Traced:
    """A model of which memplan has no architecture file, traced: its modules, and tapes that say what they ran."""

    root: Module
    first: Tape
    """A micro-batch."""
    later: Tape | None
    """A micro-batch with the gradients of an earlier one there, if gradients are accumulated."""
    evaluation: Tape | None
    """A batch of evaluation, if there is any."""
    assumptions: tuple[Assumption, ...]
    """What the trace does not know."""

    def micro_batch(self, *, accumulated: bool, evaluation: bool) -> MicroBatch:
        """One of the tapes."""
        tape = self.evaluation if evaluation else self.later if accumulated else self.first
        assert tape is not None
        return MicroBatch(tape, self.root, Inventory(self.root))


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that decides the tape, resolved."""

    model: ModelSpec
    training: TrainingSpec
    precision: Precision
    rules: DeviceRules
    software: SoftwareSpec
    engine: Literal["torch", "zero12", "zero3", "fsdp", "fsdp1"] = "torch"
    """Who makes the precision 16 bit: autocast, or DeepSpeed, which casts the model. DeepSpeed also takes each gradient
    as it comes."""
    copies_gradients: bool = False
    """DDP copies each gradient into its bucket as it comes, and frees it."""
    traced: Traced | None = None
    busiest_experts: bool = False
    """All tokens take the same experts, rather than all experts alike."""

    @property
    def dtype(self) -> DType:
        """The model's, when it is trained."""
        if self.mixed is not None and self.engine != "torch":
            return self.mixed
        return dtypes.dtype_named(self.precision.dtype)

    @property
    def mixed(self) -> DType | None:
        """The lower type of mixed precision, if it is on."""
        return _AUTOCAST[self.precision.mixed_precision]

    @property
    def autocast(self) -> DType | None:
        """autocast's lower precision, if it is on. accelerate's _prepare_fsdp2 puts none around the model."""
        return self.mixed if self.engine in ("torch", "fsdp1") else None

    @property
    def output_dtype(self) -> DType | None:
        """To what FSDP2 casts the model's outputs (MixedPrecisionPolicy.output_dtype, as accelerate sets it)."""
        return self.mixed if self.engine == "fsdp" else None


class Likeness:
    """Stands for values, and is told from others by what it is: it is quickly looked up."""

    __slots__ = ()


@lru_cache(maxsize=96)
def likeness(*values: object) -> Likeness:
    """One for all that are equal."""
    return Likeness()


@dataclass(eq=False)
class MicroBatch:
    """One micro-batch on the tape."""

    tape: Tape
    root: Module
    inventory: Inventory
    assumptions: tuple[Constant, ...] = ()
    predictions: Sequence[Prediction] = ()
    """The batch's logits and labels, which evaluation may keep; none where no logits are made."""
    like: MicroBatch | None = None
    """The same on a batch of another size, of which this one is made."""

    @cached_property
    def unrolled(self) -> Unrolled:
        """The log of all layers."""
        if self.like is not None:
            return self.like.unrolled.resized(self.tape)
        return unroll(self.tape, self.inventory.stacks)

    @property
    def first(self) -> MicroBatch:
        """That of which it is made, or itself: it keeps what is the same on a batch of any size."""
        return self if self.like is None else self.like

    @cached_property
    def _known(self) -> dict[Any, Any]:
        return {}

    @property
    def every_layer(self) -> EveryLayer | None:
        """What all layers allocate and free, in order; None where no tape but one of all layers tells."""
        known = self.first._known
        if "every_layer" not in known:
            known["every_layer"] = every_layer(self.first.unrolled, self.first.layout().numbers)
        found: EveryLayer | None = known["every_layer"]
        return found

    @cached_property
    def course(self) -> Course:
        """As an engine is played over it; its legs are not measured."""
        return course(self.unrolled, self.layout().numbers, measured=False)

    @property
    def likeness(self) -> Likeness:
        """All that an engine finds of the weights: the same of runs that differ in kernels alone."""
        known = self.first._known
        if "likeness" not in known:
            model = self.layout()
            known["likeness"] = likeness(
                tuple([(key, p.shape, p.dtype, p.node is None, p.loaded) for key, p in model.parameters.items()]),
                tuple([tuple(own) for own in model.modules.values() if own]),
                tuple(model.names),
                tuple(model.merged),
                tuple(map(tuple, model.groups)),
                tuple([(b.nbytes, b.registered, count) for b, count in self.inventory.buffers]),
            )
        found: Likeness = known["likeness"]
        return found

    @cached_property
    def moments(self) -> Likeness:
        """All that an engine finds of a batch as it is played over it, but for hooks of modules their weights."""
        return likeness(self.course.moments)

    @property
    def hooked(self) -> Likeness:
        """Modules, and their weights."""
        known = self.first._known
        if "hooked" not in known:
            known["hooked"] = likeness(tuple([(module, *own) for module, own in self.layout().modules.items()]))
        found: Likeness = known["hooked"]
        return found

    def layout(self, one_group: bool = False) -> Layout:
        """The model as an engine that shards sees it (:func:`memplan.engines.layout.layout`)."""
        known = self.first._known
        if ("layout", one_group) not in known:
            known["layout", one_group] = layout(self.root, one_group)
        found: Layout = known["layout", one_group]
        return found

    def sent(self, with_buffers: bool) -> Sequence[int]:
        """Bytes of the copies in which DDP sends the model from rank 0 to the others (_sync_module_states)."""
        known = self.first._known
        if ("sent", with_buffers) not in known:
            tensors: list[Tensor] = list(self.layout().parameters.values())
            if with_buffers:
                tensors += [b for b, count in self.inventory.buffers if b.registered for _ in range(count)]
            known["sent", with_buffers] = copies((each.dtype, each.nbytes) for each in tensors)
        found: Sequence[int] = known["sent", with_buffers]
        return found

    def optimizer(self, optim: str, rules: DeviceRules) -> Optimizer:
        """The Trainer's, over the model's weights."""
        known = self.first._known
        if (optim, rules) not in known:
            known[optim, rules] = make_optimizer(optim, rules, partial(groups_of, self.root))
        found: Optimizer = known[optim, rules]
        return found

    def handing(self, symbolic: Tape) -> MicroBatch:
        """The same, to be resized: where the states that layers are handed are equal on this batch, but their formulas
        on ``symbolic`` are not, it goes by these, apart from what is known of this batch.
        """
        tape = copy(self.tape)
        tape.handed_on, tape.handed_back = (
            {layer: [each._replace(state=_formulas(each.state)) for each in states] for layer, states in handed.items()}
            for handed in (symbolic.handed_on, symbolic.handed_back)
        )
        if borders(tape, self.inventory.stacks) == borders(self.first.tape, self.inventory.stacks):
            return self
        return MicroBatch(tape, self.root, self.inventory, self.assumptions, self.predictions)

    def went_as(self, other: MicroBatch) -> bool:
        """Whether another run of the setup has gone the same way, so that only the :attr:`numbers` differ."""
        return all(one == two for one, two in zip(_way(self), _way(other), strict=True))

    @property
    def numbers(self) -> tuple[list[Any], ...]:
        """Those that the size of the batch decides: bytes of each storage; FLOPs at each mark and at the end; bytes of
        predictions; value, low and high of assumptions.
        """
        tape = self.tape
        return (
            tape.sizes,
            [*(mark.flops for mark in tape.marks), tape.flops],
            [each.nbytes for each in self.predictions],
            [number for each in self.assumptions for number in (each.value, each.low, each.high)],
        )

    def resized(self, sizes: list[Any], flops: list[Any], predictions: list[Any], assumptions: list[Any]) -> MicroBatch:
        """The same on a batch of another size, which decides these :attr:`numbers`."""
        tape = self.tape.resized(sizes, flops)
        kept = [each._replace(nbytes=nbytes) for each, nbytes in zip(self.predictions, predictions, strict=True)]
        assumed = zip(self.assumptions, assumptions[::3], assumptions[1::3], assumptions[2::3])
        constants = (replace(each, value=value, low=low, high=high) for each, value, low, high in assumed)
        return MicroBatch(tape, self.root, self.inventory, tuple(constants), kept, like=self.first)


def micro_batch(setup: Setup, *, full_depth: bool, accumulated: bool, evaluation: bool = False) -> MicroBatch:
    """Run one micro-batch (or one evaluation batch) on a fresh tape, or take the one that was traced or recorded."""
    if setup.traced is not None:
        return setup.traced.micro_batch(accumulated=accumulated, evaluation=evaluation)
    batch, length = _sizes(setup.training, evaluation)
    if full_depth:
        return _run(setup, batch, length, True, accumulated, evaluation)
    return recordings(alike(setup), accumulated, evaluation).micro_batch(batch, length)


def finds_gradients(setup: Setup) -> bool:
    """Whether a micro-batch, other than the very first, finds gradients to add to."""
    return setup.training.grad_accum_steps > 1 or keeps_gradients(setup.software)


def keeps_gradients(software: SoftwareSpec) -> bool:
    """Whether zero_grad, as the Trainer calls it, fills gradients with zeros rather than freeing them.

    Source: torch/nn/modules/module.py, whose set_to_none is True since 2.0 (pytorch#92731).
    """
    return not software.at_least("torch", "2.0")


def alike(setup: Setup) -> Setup:
    """The same for all setups of which one recording tells: those that differ in what is not on the tape."""
    training = setup.training.replace(
        micro_batch_size=1,
        seq_len=1,
        grad_accum_steps=min(setup.training.grad_accum_steps, 2) if setup.training.keeps_outputs else 1,
        eval_batch_size=None,
        eval_accumulation_steps=None,
        alloc_conf=None,
        optim="adamw_torch_fused",
    )
    return replace(setup, training=training)


def as_on_tape(setup: Setup) -> Setup:
    """The same for all setups of which a step's micro-batches, after the first, are the same on the tape."""
    training, others = setup.training, alike(setup)
    accumulated = {"grad_accum_steps": min(training.grad_accum_steps, 2)}
    sizes = {"micro_batch_size": training.micro_batch_size, "seq_len": training.seq_len}
    return replace(others, training=others.training.replace(**sizes, **accumulated))


def _sizes(training: TrainingSpec, evaluation: bool) -> tuple[int, int]:
    """Sequences of a batch, and their length."""
    batch = training.eval_batch_size if evaluation else None
    return batch or training.micro_batch_size, training.seq_len


def run_in_full(setup: Setup) -> MicroBatch:
    """The micro-batch of a step, run on a tape that tells what its storages are; a recorded one tells their sizes."""
    training = setup.training
    if setup.traced is not None:
        return micro_batch(setup, full_depth=False, accumulated=finds_gradients(setup))
    sizes = training.micro_batch_size, training.seq_len
    return _run(setup, *sizes, full_depth=False, accumulated=finds_gradients(setup), evaluation=False)


def _run(
    setup: Setup,
    batch: Any,
    length: Any,
    full_depth: bool,
    accumulated: bool,
    evaluation: bool,
    *,
    last_layer_apart: bool = False,
) -> MicroBatch:
    """Run one micro-batch on a fresh tape; ``batch`` and ``length`` may be symbols."""
    tape = Tape(setup.rules)
    tape.engine_takes_gradients = setup.engine != "torch" or setup.copies_gradients
    tape.reentrant = setup.training.reentrant(setup.software)
    tape.steps_in_backward = setup.engine in ("zero12", "zero3")
    root = build(setup, tape, full_depth=full_depth, last_layer_apart=last_layer_apart)
    if setup.engine in ("zero3", "fsdp", "fsdp1"):
        watch(root, tape)
        tape.zero3_linear = setup.engine == "zero3"
        tape.flat_parameters = setup.engine == "fsdp1"
        if _holds_leaves(setup):
            from memplan.engines.wrapping import is_frozen_unit  # here, because most runs have none of it

            tape.holders = {id(module) for _, module in root.named_modules() if is_frozen_unit(module)}
    if not isinstance(root, Model):
        heads = " or ".join(trainable_heads(setup.model.model_type))
        raise SpecError.at("head", "base", "has no loss to train", f"Use --head {heads}, or --task load.")
    inventory = Inventory(root)
    if accumulated:
        for p, _ in inventory.parameters:
            if isinstance(p.node, AccumulateGrad):
                p.node.accumulated = True
    if evaluation:
        tape.training = tape.grad_enabled = False
    with tape.tagged(INPUT):
        inputs = root.inputs(batch, length)
        attention_mask = root.attention_mask(batch, length)
    tape.input_count = len(tape.sizes)
    keeps = setup.training.keeps_outputs and not evaluation
    with tape.tagged(LOGITS):
        previous = tape.new((0,), dtypes.float32, "outputs before") if keeps else None
    loss, outputs = _forward(tape, root, inputs, setup)
    if previous is not None and isinstance(outputs, Tensor):  # the name held those of the micro-batch before until now
        tape.sizes[previous.storage.id] = tape.sizes[outputs.storage.id]
    del previous
    found = (outputs, *inputs[1:]) if isinstance(outputs, Tensor) else ()
    predictions = [Prediction(x.nbytes, is_widened=x.dtype is dtypes.bfloat16) for x in found]
    del found
    if not keeps:
        del outputs  # compute_loss returns the loss alone
    if not evaluation:
        tape.mark("backward")
        tape.backward(loss)
        for p, _ in inventory.parameters:
            p.unused = isinstance(p.node, AccumulateGrad) and not p.node.reached
    if keeps and setup.training.grad_accum_steps > 1:
        del outputs  # ``previous`` of the micro-batch that follows; else they wait here too, through the step
    tape.close()
    del attention_mask  # it has waited here, as the batch does
    return MicroBatch(tape, root, inventory, tuple(tape.assumptions.values()), predictions)


class Recordings:
    """Micro-batches of one setup but for batch and length, in which those that follow differ.

    One of which no recording tells is run; where that has gone as a run before, it is that one, resized, with all that
    is known of it. The fourth run is recorded too, and one each time that they have doubled: with symbols for batch and
    length (:mod:`memplan.tape.symbols`), which takes as long as eight runs.
    """

    MOST = 4
    """Recordings of one setup, and runs. Which way the code goes differs between short and long, one and several
    sequences.
    """
    KEPT = 8
    """Micro-batches of one setup: a search comes back to those of the same batch and length under other engines."""

    def __init__(self, run: Callable[[Any, Any], MicroBatch]) -> None:
        self._run = run
        self._runs = 0
        self._recordings: deque[Recording] = deque(maxlen=self.MOST)
        self._firsts: deque[MicroBatch] = deque(maxlen=self.MOST)
        """Runs that went different ways."""
        self._last: dict[tuple[int, int], MicroBatch] = {}
        """Those that were asked for last."""

    def micro_batch(self, batch: int, length: int) -> MicroBatch:
        """The one of this batch and length."""
        found = self._last.pop((batch, length), None) or self._told(batch, length) or self._ran(batch, length)
        self._last[batch, length] = found
        if len(self._last) > self.KEPT:
            del self._last[next(iter(self._last))]
        return found

    def _told(self, batch: int, length: int) -> MicroBatch | None:
        found = (recording.micro_batch(batch, length) for recording in tuple(self._recordings))
        return next((each for each in found if each is not None), None)

    def _ran(self, batch: int, length: int) -> MicroBatch:
        result = self._run(batch, length)
        self._runs += 1
        same = next((each for each in self._firsts if each.went_as(result)), None)
        if same is None:
            self._firsts.append(result)
        else:
            result = same.resized(*result.numbers)
        if self._runs >= 4 and self._runs.bit_count() == 1:
            made = Recording.of(self._run, batch, length, result)
            if made is not None:
                self._recordings.append(made)
        return result


class Recording(NamedTuple):
    """What a micro-batch does on a batch of any size, as long as the code goes the same way."""

    record: Record
    one: MicroBatch
    """Of the size for which it was recorded."""
    places: tuple[list[int], ...]
    """Where the record gives its numbers (:attr:`MicroBatch.numbers`)."""

    @classmethod
    def of(cls, run: Callable[[Any, Any], MicroBatch], batch: int, length: int, one: MicroBatch) -> Recording | None:
        """Record what made ``one``; None where the code does more with the sizes than compare and calculate."""
        record = Record()
        try:
            found = run(record.input(batch), record.input(length))
        except (TypeError, AttributeError):
            return None
        one = one.handing(found.tape)
        recording = cls(record, one, tuple([record.place(each) for each in numbers] for numbers in found.numbers))
        again = recording.micro_batch(batch, length)
        # A number that got past the record, into a text or a dict, would show.
        if again is None or again.numbers != one.numbers:
            return None
        same = (found.tape.log, found.tape.components) == (one.tape.log, one.tape.components)
        told = [each.source for each in found.assumptions] == [each.source for each in one.assumptions]
        return recording if same and told else None

    def micro_batch(self, batch: int, length: int) -> MicroBatch | None:
        """The micro-batch of this size; None if the code would go another way."""
        values = self.record.replay(batch, length)
        if values is None:
            return None
        return self.one.resized(*([values[place] for place in places] for places in self.places))


def _way(micro: MicroBatch) -> Iterator[object]:
    """All of a run but its :attr:`MicroBatch.numbers`; what is costly comes last."""
    tape = micro.tape
    yield tape.log
    yield tape.components
    yield [(mark.name, mark.layer, mark.position, mark.events) for mark in tape.marks]
    yield [(event.position, event.kind, event.storage) for event in tape.events]
    subjects: dict[int, int] = {}
    yield [subjects.setdefault(event.subject, len(subjects)) for event in tape.events]
    yield tape.input_count, tape.flowing, tape.held, tape.kept, tape.passed, tape.passed_gradients
    for handed in (tape.handed_on, tape.handed_back):
        yield {layer: [each.storage for each in every] for layer, every in handed.items()}
    yield borders(tape, micro.inventory.stacks)
    yield [each.is_widened for each in micro.predictions]
    yield [(each.name, each.unit, each.source) for each in micro.assumptions]


def _formulas(state: Any) -> Any:
    """A state with the places of symbols for symbols, which are not to be compared."""
    if isinstance(state, tuple):
        return tuple(map(_formulas, state))
    return ("symbol", state.place) if isinstance(state, Symbol) else state


@lru_cache(maxsize=64)
def recordings(setup: Setup, accumulated: bool, evaluation: bool) -> Recordings:
    """Those of all setups that differ in batch and length only, which ``setup`` stands for."""
    return Recordings(partial(_run, setup, full_depth=False, accumulated=accumulated, evaluation=evaluation))


def build(
    setup: Setup,
    tape: Tape,
    cache: DynamicCache | None = None,
    *,
    full_depth: bool,
    as_loaded: bool = False,
    last_layer_apart: bool = False,
) -> Module:
    """The model's modules as they are trained: quantized, patched and adapted, in the order in which scripts do it.

    With ``as_loaded`` they are left as from_pretrained leaves them.
    """
    training, model = setup.training, setup.model
    quantization = training.quantization
    b = Build(
        tape,
        setup.dtype if quantization is None else dtypes.dtype_named(setup.precision.dtype),
        attn=training.attn,
        gradient_checkpointing=training.gradient_checkpointing,
        padded=not training.packed,
        software=setup.software,
        full_depth=full_depth or (training.lora is not None and tells_layers_apart(training.lora)),
        # Of a quantized model the last parameter stays as it is, wherever it is. And nobody holds the head's gradient.
        last_layer_apart=last_layer_apart or quantization is not None or _holds_leaves(setup),
        busiest_experts=setup.busiest_experts,
        cache=cache,
    )
    root = build_model(b, resized(model, training), training.head)
    if quantization is not None:
        quantize(b, root, quantization, compute_dtype(setup))
    if as_loaded:
        return root
    if prepares_for_kbit_training(training):
        prepare_for_kbit_training(root)
    if training.liger:
        from memplan.adapters.liger import apply_liger_kernel  # here, because most runs have none of it

        apply_liger_kernel(b, root, model.model_type, fsdp1=setup.engine == "fsdp1")
    if training.lora is not None:
        apply_lora(b, root, training.lora, model.model_type)
        if training.gradient_checkpointing:
            require_input_grads(root)
        if quantization is not None and training.task == "train":
            if quantization.peft_module_casting_to_bf16:
                peft_module_casting_to_bf16(root)
            if quantization.bf16_adapters:
                cast_trained_to_bf16(root)
    if quantization is not None and setup.engine != "torch":
        casts = setup.mixed is not None or setup.engine not in ("fsdp", "fsdp1")
        cast(root, setup.dtype if casts else None)
        if casts:
            sees_sharded_adapters(root, setup.dtype)
    if setup.engine == "fsdp1" and setup.mixed is not None:
        sees_sharded_adapters(root, dtypes.float32)
        for buffer, _ in Inventory(root).buffers:  # MixedPrecision.buffer_dtype, as accelerate sets it
            if buffer.registered and buffer.dtype.is_floating:
                buffer.dtype = setup.mixed
    return root


def _holds_leaves(setup: Setup) -> bool:
    """Whether a block's input and its gradient outlive the block's backward.

    _register_post_backward_reshard_only_hook of torch/distributed/fsdp/_runtime_utils.py, for units that are frozen:
    register_multi_grad_hook has the AccumulateGrad of each leaf that the unit is given, which has the leaf, until
    _finalize_params removes it. Such leaves are the inputs of a region that runs again, if the unit is in the region.
    """
    training = setup.training
    inside = setup.engine == "fsdp1" and training.gradient_checkpointing and checkpoints_wrappers(setup.software)
    return inside and training.lora is not None and training.reentrant(setup.software)


def require_input_grads(root: Module) -> None:
    """enable_input_require_grads(): the first embedding, and in an encoder-decoder its two stacks' own."""
    embeddings = [module for _, module in root.named_modules() if isinstance(module, InputEmbeddings)]
    weight = getattr(embeddings[0], "weight", None)
    for module in embeddings:
        module.require_output_grad = module is embeddings[0] or getattr(module, "weight", module) is weight


def resized(model: ModelSpec, training: TrainingSpec) -> ModelSpec:
    """The model with its embeddings resized, if they are."""
    if training.vocab_size is None:
        return model
    return model.replace(config={**model.config, "vocab_size": training.vocab_size})


def compute_dtype(setup: Setup) -> DType:
    """What 4-bit layers compute in: bnb_4bit_compute_dtype."""
    quantization = setup.training.quantization
    if quantization is not None and quantization.compute_dtype is not None:
        return dtypes.dtype_named(quantization.compute_dtype)
    return _AUTOCAST[setup.precision.mixed_precision] or setup.dtype


def prepares_for_kbit_training(training: TrainingSpec) -> bool:
    """Whether peft.prepare_model_for_kbit_training is called."""
    quantization = training.quantization
    return quantization is not None and quantization.prepare_for_kbit_training and training.task == "train"


def _forward(tape: Tape, root: Module, inputs: tuple[Tensor, ...], setup: Setup) -> tuple[Tensor, Any]:
    """accelerate's prepared forward: the loss, and what else the Trainer gets."""
    with tape.autocasting(setup.autocast):
        loss, outputs = root(*inputs)
    if setup.autocast is not None and outputs is not None:
        outputs = outputs.float()  # ConvertOutputsToFp32
    if setup.output_dtype is not None and outputs is not None:
        outputs = outputs.to(setup.output_dtype)
    return loss, outputs


# A search, a ladder and a notebook ask for the same step again and again, under other strategies and on other
# clusters. What the tape says of a setup is remembered.
@lru_cache(maxsize=512)
def run_of(setup: Setup, gpu: GPUSpec | None) -> tuple[Run, MicroBatch]:
    """What the engines need to know of the setup, and the micro-batch that says it."""
    training = setup.training
    micro = micro_batch(setup, full_depth=False, accumulated=finds_gradients(setup))
    keeps = keeps_gradients(setup.software)
    first = micro
    if keeps and training.grad_accum_steps == 1:
        first = micro_batch(setup, full_depth=False, accumulated=False)
    evaluation = None
    if training.eval_batch_size is not None:
        pass_ = evaluation_batch(setup, full_depth=False)
        fullest = max(pass_.unrolled.profile().peaks.values(), key=lambda moment: moment.total)
        kept = Kept(_kept_predictions(training, pass_), training.eval_accumulation_steps or 1)
        evaluation = Evaluation(fullest, kept)
    run = Run(
        parameters=micro.inventory.parameters,
        buffer_bytes=sum(micro.inventory.buffer_blocks),
        unrolled=micro.unrolled,
        first=first.unrolled,
        evaluation=evaluation,
        optimizer=micro.optimizer(training.optim, setup.rules),
        grad_accum_steps=training.grad_accum_steps,
        keeps_gradients=keeps,
        rules=setup.rules,
        workspaces=cublas_workspaces(
            gpu or reference_gpu(),
            setup.software,
            training=True,
            bias=micro.inventory.linear_bias,
            gradient_checkpointing=training.gradient_checkpointing,
        ),
    )
    return run, micro


def _kept_predictions(training: TrainingSpec, micro: MicroBatch) -> Sequence[Prediction]:
    """What evaluation keeps of each batch. Raises UnsupportedError where it is more than logits and labels."""
    if training.eval_accumulation_steps is None:
        return ()
    if len(micro.predictions) != 2:
        raise UnsupportedError(
            "eval_accumulation_steps: predictions other than logits are not modelled. Leave it out: losses only."
        )
    return micro.predictions


Replayable = list[tuple[MicroBatch, EveryLayer]]


def replayable(setup: Setup, batches: Sequence[tuple[bool, bool]]) -> Replayable:
    """What all layers do in batches of a setup, each told (that gradients are accumulated, that it is evaluation).

    A tape of one layer of each kind tells it, or one on which the last layer stands for itself, since what comes after
    all layers may hand a gradient to it that cannot be added to in place; else every layer runs. All are of one depth.
    """
    for find in (_recorded, _with_last_layer_apart):
        found: Replayable = []
        for accumulated, evaluation in () if setup.traced is not None else batches:
            micro = find(setup, accumulated, evaluation)
            if (every := micro.every_layer) is None:
                break
            found.append((micro, every))
        else:
            if found:
                return found
    micros = [
        evaluation_batch(setup, full_depth=True) if evaluation else all_layers(setup, accumulated)
        for accumulated, evaluation in batches
    ]
    return [(micro, as_it_ran(micro.unrolled)) for micro in micros]


def _recorded(setup: Setup, accumulated: bool, evaluation: bool) -> MicroBatch:
    return micro_batch(setup, full_depth=False, accumulated=accumulated, evaluation=evaluation)


def _with_last_layer_apart(setup: Setup, accumulated: bool, evaluation: bool) -> MicroBatch:
    return _run(setup, *_sizes(setup.training, evaluation), False, accumulated, evaluation, last_layer_apart=True)


@lru_cache(maxsize=8)
def all_layers(setup: Setup, accumulated: bool) -> MicroBatch:
    """A micro-batch with every layer on the tape, which several engines are replayed over."""
    return micro_batch(setup, full_depth=True, accumulated=accumulated)


@lru_cache(maxsize=8)
def evaluation_batch(setup: Setup, *, full_depth: bool) -> MicroBatch:
    """A batch of evaluation."""
    return micro_batch(setup, full_depth=full_depth, accumulated=False, evaluation=True)


def reference_gpu() -> GPUSpec:
    """Stands in where no GPU is named."""
    return find_gpu("A100-80GB")

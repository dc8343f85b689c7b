"""Trace any model, on a few of its layers, and extrapolate to all of them.

The model is built in full on the meta device, where it costs nothing, so its parameters are exact. Each list of layers
that repeat is then shortened to its first few, enough for every layer of the whole list to find one there of its own
kind with neighbours of the same kinds; kinds are told apart by the layers' modules, parameters and settings, and by
the lists of the config that have one entry per layer. Two depths are traced: the longer one must be what
:func:`~memplan.introspect.recording.expand` makes of the shorter one, allocation by allocation. What passes is expanded
to the full depth; what does not is traced in full.

The result is what the architecture files give: modules with their parameters, and tapes. The estimator treats both
alike.

torch and transformers are imported inside functions only, so that importing this module stays light.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, TypeAlias

from memplan.architectures.nn import Build, Embedding, LayerNorm, Layers, Linear, Module
from memplan.architectures.registry import MODEL_CLASSES, trainable_heads
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.introspect import trace
from memplan.introspect.cuda_autocast import cuda_rules
from memplan.introspect.cuda_kernels import cuda_kernels, cuda_operations
from memplan.introspect.recording import (
    NotRepeating,
    Recorder,
    Recording,
    Subject,
    Templates,
    expand,
    same_log,
    to_tape,
)
from memplan.micro_batch import Setup, Traced
from memplan.results import Assumption
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.training import TrainingSpec
from memplan.tape import tensor as dtypes
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter

__all__ = ["Inputs", "decided_by", "installed", "known_model_types", "module_spec", "trace_model"]

Inputs: TypeAlias = Callable[[int, int], Mapping[str, Any]]
"""(micro-batch size, sequence length) -> the keyword arguments of forward: tensors, made on the CPU."""

_MOST_LAYERS = 256
"""Layers beyond which a model that does not repeat is refused rather than traced in full: about half a minute."""


def known_model_types() -> list[str]:
    """Return every ``model_type`` of the installed transformers. Raises UnsupportedError without the train extra."""
    trace._import_libraries(())
    import transformers

    return list(transformers.CONFIG_MAPPING)


def installed(software: SoftwareSpec) -> SoftwareSpec:
    """Return the versions with those of the libraries that a trace runs. Raises SpecError if others were asked for."""
    found: dict[str, str] = {}
    for library in ("torch", "transformers", "accelerate", "peft", "deepspeed"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library).partition("+")[0]
    for library, version in found.items():
        asked = getattr(software, library)
        if library in software.model_fields_set and version.split(".")[:2] != asked.split(".")[:2]:
            problem = f"is not what runs here: {library} {version} is installed"
            raise SpecError.at("software", f"{library}={asked}", problem, "Install it, or leave it out.")
    return software.replace(**found)


def module_spec(module: Any) -> ModelSpec:
    """Return what an ``nn.Module`` is. Its dtype is that of its first floating parameter."""
    config = getattr(module, "config", None)
    values = _json(config.to_dict()) if config is not None and hasattr(config, "to_dict") else {}
    dtype = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), "float32")
    name = type(module).__name__
    return ModelSpec(
        id=str(values.get("_name_or_path") or name),
        model_type=str(values.get("model_type") or ""),
        architecture=name,
        config=values | {"dtype": str(dtype).removeprefix("torch.")},
        source="module",
    )


def decided_by(module: Any, training: TrainingSpec) -> TrainingSpec:
    """Return the training with the module's own dtype and attention, where no others were asked for."""
    changes: dict[str, Any] = {}
    if "dtype" not in training.model_fields_set:
        changes["dtype"] = "auto"
    attn = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if attn is not None and "attn" not in training.model_fields_set:
        changes["attn"] = attn
    return training.replace(**changes)


def trace_model(setup: Setup, module: Any = None, inputs: Inputs | None = None) -> Traced:
    """Trace the micro-batches that ``setup`` needs.

    Args:
        setup: what decides them, resolved.
        module: the ``nn.Module`` to trace, which is left as it is; None builds the one of ``setup.model``'s config.
        inputs: what its forward takes; None is what transformers' models take (input_ids and labels, or pixel_values).

    Raises:
        UnsupportedError: the train extra is missing, or the model cannot be traced; the message has the reason.
        SpecError: the config is wrong.
    """
    tracing = _tracing(setup, module, inputs)
    stacks = _find_stacks(tracing.model)
    recordings = _extrapolated(tracing, stacks)
    depths = _depths(stacks, recordings is not None)
    if recordings is None:
        recordings, stacks = _in_full(tracing, stacks), []
    root, subjects = _mirror(tracing, stacks)
    tapes = {name: to_tape(recording, setup.rules, subjects) for name, recording in recordings.items()}
    return Traced(
        root=root,
        first=tapes["first"],
        later=tapes.get("later"),
        evaluation=tapes.get("evaluation"),
        assumptions=_assumptions(setup, depths),
    )


def _tracing(setup: Setup, module: Any = None, inputs: Inputs | None = None) -> _Tracing:
    """The model of a setup, ready to be traced."""
    trace._import_libraries(("transformers.masking_utils", *(["peft"] if setup.training.lora is not None else [])))
    _refuse(setup)
    with trace._quiet(), _offline():
        model = _copied(module, setup) if module is not None else _built(setup)
        return _Tracing(_prepared(model, setup), setup, inputs)


def _refuse(setup: Setup) -> None:
    """What a trace on CPU tensors cannot run."""
    training = setup.training
    reasons = {
        "attn": training.attn.startswith("flash") and "the kernels of flash_attention_2 run on a GPU only. Use sdpa.",
        "quantization": training.quantization is not None and "the kernels of bitsandbytes run on a GPU only.",
        "liger": training.liger and "Liger's kernels run on a GPU only.",
        "task": training.task != "train" and "a trace is one of a training step.",
    }
    for field, reason in reasons.items():
        if reason:
            raise UnsupportedError(f"trace: {field} {getattr(training, field)!r} cannot be traced: {reason}")


def _depths(stacks: Sequence[_Stack], extrapolated: bool) -> str:
    if not stacks:
        return "traced in full"
    if not extrapolated:
        return "traced in full, since its layers do not repeat"
    parts = [f"{stack.lengths[0]} and {stack.lengths[1]} of {stack.depth}" for stack in stacks]
    return f"traced at {', '.join(parts)} layers"


def _assumptions(setup: Setup, depths: str) -> tuple[Assumption, ...]:
    note = f"the real model under FakeTensor, {depths}"
    if setup.rules.kind == "cuda":
        note += (
            "; CUDA's autocast list, attention backend, norms, dropout masks and sums of gradients are imposed. "
            "What a CUDA kernel allocates within one call is not known but for attention. Kernels that are no part "
            "of torch (mamba-ssm, flash-linear-attention) are not run"
        )
    return (Assumption(name="trace", value=0, low=0, high=0, source=note),)


# -- the model -------------------------------------------------------------------------------------------------------


def _built(setup: Setup) -> Any:
    """transformers' own model of the config, on the meta device. No code and no weights are loaded from anywhere."""
    values = _harmless(setup.model.config)
    if setup.training.vocab_size is not None:
        values["vocab_size"] = setup.training.vocab_size
    head = setup.training.head
    if head == "base":
        heads = " or ".join(trainable_heads(setup.model.model_type) or MODEL_CLASSES)
        raise UnsupportedError(f"trace: head 'base' has no loss to train. Use --head {heads}.")
    values.setdefault("model_type", setup.model.model_type)
    try:
        return trace._build_model(values, setup.precision.dtype, _attention(setup), None, head, None)
    except MemplanError:
        raise
    except Exception as error:  # a config may be wrong in any way
        raise UnsupportedError(f"trace: transformers cannot build this model: {_said(error)}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep a config from making transformers ask the hub for another one."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _attention(setup: Setup) -> str | None:
    """What was asked for; otherwise from_pretrained takes sdpa where the model has it."""
    return setup.training.attn if "attn" in setup.training.model_fields_set else None


def _harmless(value: Any) -> Any:
    """A config as plain data, without what would make transformers load code or weights."""
    if isinstance(value, Mapping):
        kept = {key: _harmless(item) for key, item in value.items() if key not in ("auto_map", "custom_pipelines")}
        if kept.get("use_pretrained_backbone"):
            kept["use_pretrained_backbone"] = False
        return kept
    return [_harmless(item) for item in value] if isinstance(value, (list, tuple)) else value


def _copied(module: Any, setup: Setup) -> Any:
    """The module on the meta device; its own parameters are neither copied nor touched."""
    import torch

    if setup.training.vocab_size is not None or setup.training.head is not None:
        raise UnsupportedError("trace: head and vocab_size are those of the module. Change the module itself.")
    memo: dict[int, Any] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers, part.__dict__):
            for value in table.values():
                if isinstance(value, torch.Tensor) and id(value) not in memo:
                    memo[id(value)] = _on_meta(value)
    try:
        model = copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedError(f"trace: the module cannot be copied: {_said(error)}") from error
    if setup.training.dtype not in (None, "auto"):
        model.to(getattr(torch, setup.precision.dtype))
    attn = getattr(getattr(model, "config", None), "_attn_implementation", setup.training.attn)
    if attn != setup.training.attn:
        model.set_attn_implementation(setup.training.attn)
    return model


def _on_meta(tensor: Any) -> Any:
    import torch

    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, torch.nn.Parameter):
        return empty
    return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)


def _prepared(model: Any, setup: Setup) -> Any:
    """As the Trainer has it: with adapters, checkpointing and without a cache."""
    training = setup.training
    if setup.engine == "zero3":  # zero.Init has done it before there are adapters
        _cast(model, setup)
    if training.lora is not None:
        model = trace._add_lora(model, _lora(setup))
    if setup.engine not in ("torch", "zero3"):
        _cast(model, setup)
    if training.gradient_checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise UnsupportedError(
                f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable(). "
                "Use --no-gradient-checkpointing, or checkpoint within its forward."
            )
        try:
            use_reentrant = training.reentrant(setup.software)
            trace._enable_checkpointing(model, use_reentrant, frozen_inputs=training.lora is not None)
        except ValueError as error:
            raise UnsupportedError(
                f"gradient_checkpointing: {_said(error)} Use --no-gradient-checkpointing."
            ) from error
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
    return model.train()


def _cast(model: Any, setup: Setup) -> None:
    """To what the engine computes in: DeepSpeed casts the module, and FSDP gathers its weights so."""
    import torch

    dtype = getattr(torch, setup.dtype.name)
    if setup.engine in ("zero12", "fsdp1"):
        model.to(dtype)  # buffers too
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _lora(setup: Setup) -> dict[str, Any]:
    lora = setup.training.lora
    assert lora is not None
    options: dict[str, Any] = {"rank": lora.rank, "dropout": lora.dropout, "bias": lora.bias}
    if lora.alpha is not None:
        options["alpha"] = lora.alpha
    if lora.targets:
        options["targets"] = lora.targets[0] if len(lora.targets) == 1 else list(lora.targets)
        if options["targets"] != "all-linear":
            options["targets"] = list(lora.targets)
    if lora.modules_to_save:
        options["modules_to_save"] = list(lora.modules_to_save)
    return options


def _said(error: Exception) -> str:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return (said if len(said) <= 300 else f"{said[:300]} ...").rstrip(".") + "."


def _json(value: Any) -> Any:
    """Plain data of a config's values; what is none, as text."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_json(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# -- layers that repeat ----------------------------------------------------------------------------------------------


class _Stack:
    """A list of layers within a model, which can be shortened to its first ones."""

    def __init__(self, container: Any, kinds: list[Hashable], lengths: tuple[int, int]) -> None:
        self.container = container
        self.kinds = kinds
        self.lengths = lengths
        """Two depths that stand for the whole."""
        self._layers = dict(container._modules)

    @property
    def depth(self) -> int:
        return len(self.kinds)

    @property
    def layers(self) -> list[Any]:
        """Those that it has at present."""
        return list(self.container._modules.values())

    def shorten(self, length: int) -> None:
        """Keep the first ``length`` layers of all."""
        self.container._modules.clear()
        self.container._modules.update(list(self._layers.items())[:length])

    def templates(self, short: int, depth: int) -> list[int]:
        """For each of the first ``depth`` layers, the one among the first ``short`` that stands for it."""
        found = templates(self.kinds[:depth], short)
        assert found is not None
        return found


def templates(kinds: Sequence[Hashable], short: int) -> list[int] | None:
    """For every layer, one of the first ``short`` layers with the same neighbours; None if one has none.

    The ends are like no other layer: what is handed on there comes from, or goes to, something else.

    >>> templates("aaaaaaa", 5)
    [0, 1, 2, 2, 2, 3, 4]
    >>> templates("dddaaaaa", 7)
    [0, 1, 2, 3, 4, 4, 5, 6]
    >>> templates("ababababab", 5) is None
    True
    """
    few, all_ = _windows(kinds[:short]), _windows(kinds)
    places = {window: i for i, window in reversed(list(enumerate(few)))}
    found = [places.get(window) for window in all_]
    return None if None in found else found  # type: ignore[return-value]


def _windows(kinds: Sequence[Hashable]) -> list[Hashable]:
    """Each layer with its neighbours, the first and the last one marked."""
    marked: list[Hashable] = [None, ("first", kinds[0]), *kinds[1:-1], ("last", kinds[-1]), None]
    return [tuple(marked[i : i + 3]) for i in range(len(kinds))]


def _lengths(kinds: Sequence[Hashable]) -> tuple[int, int] | None:
    """The two smallest depths that stand for the whole, if it is clearly less work to trace both."""
    fitting = (short for short in range(2, len(kinds)) if templates(kinds, short) is not None)
    one, two = next(fitting, None), next(fitting, None)
    if one is None or two is None or 4 * (one + two) > 3 * len(kinds):
        return None
    return one, two


def _find_stacks(model: Any) -> list[_Stack]:
    """The lists of layers worth shortening, outermost first; none lies within another."""
    import torch

    lists = _config_lists(getattr(model, "config", None))
    stacks: list[_Stack] = []

    def visit(module: Any) -> None:
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 2:
            kinds = _kinds(list(module), lists)
            lengths = _lengths(kinds)
            if lengths is not None:
                stacks.append(_Stack(module, kinds, lengths))
                return
        for child in module.children():
            visit(child)

    visit(model)
    return stacks


def _kinds(layers: Sequence[Any], lists: Sequence[Sequence[Any]]) -> list[Hashable]:
    """What each layer is: equal for layers that run alike."""
    described: list[dict[tuple[Any, ...], Hashable]] = [dict(_described(layer)) for layer in layers]
    described = [
        {**one, **{("config", n): values[i] for n, values in enumerate(lists) if len(values) == len(layers)}}
        for i, one in enumerate(described)
    ]
    names = {name for one in described for name in one}
    numbering = {name for name in names if _numbers_layers([one.get(name) for one in described])}
    return [frozenset((name, value) for name, value in one.items() if name not in numbering) for one in described]


def _numbers_layers(values: Sequence[Any]) -> bool:
    """Whether a setting is only the layer's number, in those layers that have it."""
    offsets = {value - i if type(value) is int else None for i, value in enumerate(values) if value is not None}
    return len(offsets) == 1 and None not in offsets


def _described(layer: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """A layer's modules, tensors and settings, by name. Of a float only whether it is 0: a rate or a scale."""
    for path, module in layer.named_modules():
        yield (path,), type(module)
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield (path, name), (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, value in module.__dict__.items():
            if isinstance(value, float):
                yield (path, name), value != 0.0
            elif isinstance(value, (bool, int, str, type(None), tuple)) and _hashable(value):
                yield (path, name), (type(value), value) if isinstance(value, bool) else value
            elif inspect.isroutine(value) and not hasattr(value, "__self__"):
                yield (path, name), getattr(value, "__qualname__", "")


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _config_lists(config: Any) -> list[Sequence[Any]]:
    """Every list of plain values in a config."""
    found: list[Sequence[Any]] = []

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value):
            found.append(value)

    if hasattr(config, "to_dict"):
        visit(config.to_dict())
    return found


# -- tracing ---------------------------------------------------------------------------------------------------------


class _Tracing:
    """Traces the micro-batches of one setup, at whatever depth the model has at the time."""

    def __init__(self, model: Any, setup: Setup, inputs: Inputs | None) -> None:
        self.model = model
        self.setup = setup
        self.inputs = inputs
        self.fake_mode = trace._fake_mode()
        trace._to_fake(model, self.fake_mode)
        self.loose = list(trace._loose_tensors(model))
        """Tensors that modules hold as plain attributes before anything has run; a forward may leave more there."""
        self.reached: set[str] = set()
        """Kinds of parameters that have had a gradient; none where an engine takes them."""
        self.mixed_precision = "no" if setup.autocast is None else setup.precision.mixed_precision
        self.forward = trace._prepared_forward(model, self.mixed_precision)

    def record(self, stacks: Sequence[_Stack]) -> dict[str, Recording]:
        """Return the first micro-batch, a later one with gradients there already, and an evaluation, as needed."""
        cuda = self.setup.rules.kind == "cuda"
        recorder = Recorder(adds_in_place=cuda)
        tracker = trace._make_tracker(False, recorder, cuda_operations() if cuda else None)
        recorder.tracker = tracker
        with contextlib.ExitStack() as stack:
            for context in (
                trace._quiet(),
                trace._gc_disabled(collect=False),
                trace._phase_hooks(self.model, tracker),
                _layer_hooks(self.model, stacks, recorder),
                _gradient_hooks(self.model, stacks, recorder) if self.gives_gradients else contextlib.nullcontext(),
                trace._like_a_real_run(),
                self.fake_mode,
                tracker,
                cuda_rules() if cuda else contextlib.nullcontext(),
                cuda_kernels(self.setup.rules, recorder.kernel) if cuda else contextlib.nullcontext(),
            ):
                stack.enter_context(context)
            tracker.adopt(self.model.parameters())
            tracker.adopt(self.model.buffers())
            tracker.adopt(trace._loose_tensors(self.model))
            try:
                return self._micro_batches(recorder, {n: len(each.layers) for n, each in enumerate(stacks)})
            finally:
                for parameter in self.model.parameters():
                    parameter.grad = None
        raise AssertionError  # no context swallows an error

    @property
    def gives_gradients(self) -> bool:
        """An engine takes each gradient as it comes."""
        return self.setup.engine != "torch" or self.setup.copies_gradients

    def _micro_batches(self, recorder: Recorder, depths: Mapping[int, int]) -> dict[str, Recording]:
        training = self.setup.training
        recordings = {"first": self._train(recorder, depths)}
        if training.grad_accum_steps > 1:
            if self.gives_gradients:
                self._leave_gradients()
            recordings["later"] = self._train(recorder, depths)
        if training.eval_batch_size is not None:
            recordings["evaluation"] = self._evaluate(recorder, depths, training.eval_batch_size)
        return recordings

    def _leave_gradients(self) -> None:
        """As a micro-batch does whose gradients stay where autograd has put them."""
        import torch

        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _train(self, recorder: Recorder, depths: Mapping[int, int]) -> Recording:
        step = self._step(recorder)
        recorder.begin("forward")
        step.inputs = [self._batch(self.setup.training.micro_batch_size)]
        recorder.has_inputs()
        step.num_items = step._count_items(step.inputs)
        step.after_backward = recorder.step if self.setup.engine in ("zero12", "zero3") else None
        loss = step._training_step(step.inputs[0])
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        found = self.model.named_parameters(remove_duplicate=False)
        self.reached.update(_kind(name) for name, p in found if p.grad is not None)
        recording = recorder.finish(gradients, depths)
        del loss  # it outlives the micro-batch, in the Trainer's running loss
        return recording

    def _evaluate(self, recorder: Recorder, depths: Mapping[int, int], batch_size: int) -> Recording:
        step = self._step(recorder)
        recorder.begin("eval")
        inputs = self._batch(batch_size)
        recorder.has_inputs()
        step.evaluate(inputs)
        return recorder.finish([], depths)

    def _step(self, recorder: Recorder) -> Any:
        import torch

        training = self.setup.training
        step = trace._Step(
            model=self.model,
            tracker=recorder.tracker,
            mixed_precision=self.mixed_precision,
            grad_accum_steps=training.grad_accum_steps,
            max_grad_norm=0.0,
            weight_decay=0.0,
            optim=training.optim,
        )
        step.forward = self.forward
        if self.mixed_precision == "fp16":
            step.scaler = torch.amp.GradScaler("cpu")
        return step

    def _batch(self, batch_size: int) -> dict[str, Any]:
        training = self.setup.training
        if self.inputs is not None:
            return _made_inputs(self.inputs, batch_size, training.seq_len)
        _check_inputs(self.model)
        return trace._make_inputs(self.model, batch_size, training.seq_len, padded=not training.packed)


def _made_inputs(inputs: Inputs, batch_size: int, seq_len: int) -> dict[str, Any]:
    try:
        return dict(inputs(batch_size, seq_len))
    except Exception as error:  # whatever a caller's function may do
        remedy = "Give a function of (batch_size, seq_len) that returns {name: tensor}, forward's arguments."
        raise SpecError.at("inputs", inputs, f"makes no batch: {_said(error).rstrip('.')}", remedy) from error


def _check_inputs(model: Any) -> None:
    """Whether forward takes what transformers' text models and image classifiers take."""
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, name = getattr(unwrapped, "config", None), type(unwrapped).__name__
    main = getattr(unwrapped, "main_input_name", "input_ids")
    needs = f"the forward of {name} takes other inputs than input_ids and labels"
    if config is not None and any(getattr(config, part, None) is not None for part in _OTHER_MODALITIES):
        needs = f"{name} takes more than text"
    elif config is not None and main == "pixel_values" and name.endswith("ForImageClassification"):
        if hasattr(config, "image_size"):
            return
        needs = f"the config of {name} has no image_size"
    elif config is not None and main == "input_ids":
        return
    raise UnsupportedError(
        f"trace: {needs}. Say what a batch is: memplan.estimate(..., trace=True, "
        "inputs=lambda batch_size, seq_len: {name: tensor}), in Python."
    )


_OTHER_MODALITIES = ("vision_config", "audio_config", "speech_config", "video_config")


@contextlib.contextmanager
def _layer_hooks(model: Any, stacks: Sequence[_Stack], recorder: Recorder) -> Iterator[None]:
    """Tell the recorder where the forward comes to a layer, leaves a stack, or comes to the output embeddings."""
    hooks = []
    for number, stack in enumerate(stacks):
        layers = stack.layers
        for i, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(lambda *_, key=(number, i): recorder.enter_layer(key)))
        hooks.append(layers[-1].register_forward_hook(lambda *_: recorder.leave_stack()))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        hooks.append(head.register_forward_pre_hook(lambda *_: recorder.enter_head()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _gradient_hooks(model: Any, stacks: Sequence[_Stack], recorder: Recorder) -> Iterator[None]:
    """Tell the recorder of each gradient that is ready, and let go of it, unless it was added to one that was there."""
    subjects = _Subjects(model, stacks)
    hooks = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(_take, recorder, subjects.of(name))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _take(recorder: Recorder, subject: Subject, weight: Any) -> None:
    if recorder.gradient(subject, weight.grad):
        weight.grad = None


class _Subjects:
    """What engines hook into, by its path in the model as it is at present."""

    def __init__(self, model: Any, stacks: Sequence[_Stack]) -> None:
        containers = {id(stack.container): n for n, stack in enumerate(stacks)}
        self._stacks = {f"{path}.": containers[id(m)] for path, m in model.named_modules() if id(m) in containers}

    def of(self, path: str) -> Subject:
        """A weight's or a module's."""
        for prefix, stack in self._stacks.items():
            number, _, rest = path.removeprefix(prefix).partition(".")
            if path.startswith(prefix):
                return Subject((stack, int(number)), f"{prefix}{{}}{'.' if rest else ''}{rest}")
        return Subject(None, path)


def _extrapolated(tracing: _Tracing, stacks: Sequence[_Stack]) -> dict[str, Recording] | None:
    """The recordings of the full depth from two short ones; None if they do not foretell it."""
    if not stacks:
        return None
    try:
        short, long = (_at_depth(tracing, stacks, which) for which in (0, 1))
        between = {n: stack.templates(*stack.lengths) for n, stack in enumerate(stacks)}
        if not all(same_log(expand(short[name], between), long[name]) for name in short):
            return None
        full: Templates = {n: stack.templates(stack.lengths[0], stack.depth) for n, stack in enumerate(stacks)}
        return {name: expand(recording, full) for name, recording in short.items()}
    except NotRepeating:
        return None
    except UnsupportedError:
        raise
    except Exception:  # a model may count on all its layers; the full trace tells what is wrong, if anything
        return None
    finally:
        for stack in stacks:
            stack.shorten(stack.depth)


def _at_depth(tracing: _Tracing, stacks: Sequence[_Stack], which: int) -> dict[str, Recording]:
    for stack in stacks:
        stack.shorten(stack.lengths[which])
    return tracing.record(stacks)


def _in_full(tracing: _Tracing, stacks: Sequence[_Stack]) -> dict[str, Recording]:
    """The recordings of the whole model, which has no layers then: it is one piece."""
    layers = sum(stack.depth for stack in stacks)
    if layers > _MOST_LAYERS:
        raise UnsupportedError(
            f"trace: its {layers} layers do not repeat in a way that a few of them could show, and are too many to "
            f"trace them all (at most {_MOST_LAYERS})."
        )
    try:
        return tracing.record([])
    except MemplanError:
        raise
    except Exception as error:
        raise UnsupportedError(f"trace: the model does not run on tensors without data: {_said(error)}") from error


# -- as the estimator's modules --------------------------------------------------------------------------------------


def _mirror(tracing: _Tracing, stacks: Sequence[_Stack]) -> tuple[Module, dict[str, int]]:
    """The model's modules and parameters in the estimator's vocabulary, under the same names; their id() by path."""
    import torch

    kinds: dict[type, type[Module]] = {
        torch.nn.Embedding: Embedding,
        torch.nn.LayerNorm: LayerNorm,
        torch.nn.Linear: Linear,
    }
    numbers = {id(stack.container): n for n, stack in enumerate(stacks)}
    loose = {id(tensor) for tensor in tracing.loose}
    parameters: dict[int, Parameter] = {}
    subjects: dict[str, int] = {}
    tape = Tape(tracing.setup.rules)

    def parameter(tensor: Any, name: str) -> Parameter:
        if id(tensor) not in parameters:
            made = tape.parameter(name, tuple(tensor.shape), _dtype(tensor), tensor.requires_grad)
            made.unused = bool(tracing.reached) and tensor.requires_grad and _kind(name) not in tracing.reached
            parameters[id(tensor)] = made
        subjects[name] = id(parameters[id(tensor)])
        return parameters[id(tensor)]

    def visit(module: Any, path: str) -> Module:
        if id(module) in numbers:
            return layers(module, path)
        cls = next((ours for theirs, ours in kinds.items() if isinstance(module, theirs)), Module)
        made = cls.__new__(cls)
        for name, tensor in module._parameters.items():
            made.__dict__[name] = None if tensor is None else parameter(tensor, f"{path}{name}")
        for name, tensor in (*module._buffers.items(), *module.__dict__.items()):
            if isinstance(tensor, torch.Tensor) and (name in module._buffers or id(tensor) in loose):
                made.__dict__[name] = tape.buffer(tuple(tensor.shape), _dtype(tensor), name in module._buffers)
        for name, child in module._modules.items():
            if child is not None:
                made.__dict__[name] = visit(child, f"{path}{name}.")
        return made

    def layers(module: Any, path: str) -> Layers:
        made = Layers.__new__(Layers)
        made._build = Build(tape, dtypes.float32)
        made.stack = numbers[id(module)]
        traced: list[Any] = [visit(layer, f"{path}{i}.") for i, layer in enumerate(module)]
        made._layers = list(enumerate(traced))
        made._kinds = list(range(len(module)))
        return made

    return visit(tracing.model, ""), subjects


def _kind(name: str) -> str:
    """A parameter's name but for the number of its layer: of deeper layers than were traced only these tell."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _dtype(tensor: Any) -> DType:
    name = str(tensor.dtype).removeprefix("torch.")
    known = dtypes.DTYPES.get(name)
    return known or DType(name, tensor.element_size(), tensor.dtype.is_floating_point)

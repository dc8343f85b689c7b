"""FSDP2 (``fully_shard``) as accelerate sets it up: units of weights, sharded by rows, gathered where they are used.

Sources: torch/distributed/fsdp/_fully_shard/{_fsdp_param_group,_fsdp_collectives,_fsdp_param,_fsdp_state}.py, torch
2.13; fsdp2_prepare_model in accelerate/utils/fsdp_utils.py, 1.15. The engine is played over a micro-batch whose modules
are watched (:mod:`memplan.memory.course`). Of the streams of FSDPCommContext three have pools; none of their blocks is
marked by ``record_stream``, since Python keeps what another stream still uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod

from memplan.adapters.liger import fused_head
from memplan.architectures.nn import Module
from memplan.engines import checkpoint
from memplan.engines.fsdp1 import FlatParam, Fsdp1Setup
from memplan.engines.layout import Layout, StateDict, temporaries_of_step
from memplan.engines.wrapping import Row, Unit, Units
from memplan.errors import SpecError, UnsupportedError
from memplan.memory.course import Block, Key, Ledger
from memplan.memory.optimizers import Groups, Optimizer, clip_grad_norm, make_optimizer
from memplan.specs.strategy import FsdpSpec, Strategy
from memplan.specs.training import QuantizationSpec, TrainingSpec
from memplan.tape.dispatch import CPU, DeviceRules
from memplan.tape.tape import Tape
from memplan.tape.tensor import DType, Parameter, Shape, dtype_named, float32

COPY_IN, REDUCE_SCATTER, ALL_REDUCE = 1, 2, 3
"""Streams. On the all-gather's own nothing is allocated."""

CAST = "shards in the dtype in which they are gathered (mixed precision)"
GATHERED = "gathered weights of units (auto_wrap_policy, reshard_after_forward)"
ALL_REDUCED = "shards of gradients as nodes reduce them (dp_replicate_size)"
STAGED = "shards on their way from the host (offload_params)"
SAVED = "a tensor gathered to be saved (state_dict_type)"
WHOLE = "weights on their way, whole"
TOGETHER = "what a unit's weights are gathered into together (auto_wrap_policy)"
"""Blocks as an explanation names them; in parentheses the keys that size them."""


@dataclass(frozen=True, slots=True)
class FsdpSetup:
    """What FSDP2 places."""

    units: Sequence[Unit]
    """In the order of their forward."""
    as_sharded: Sequence[Unit]
    """In the order in which ``fully_shard`` is called."""
    referenced: Set[Key]
    """Weights that fsdp2_prepare_model has variables of: their whole tensors live until it returns."""
    distributed: Sequence[Row]
    """With cpu_ram_efficient_loading: the state_dict that rank 0 sends to all, after sharding without memory."""
    ignored: Sequence[int]
    """Bytes of each weight that is not sharded (ignored_params)."""
    on_gpu: bool
    """The model comes on the GPU, and not from the host."""
    root: Key
    ranks: int
    """Over which weights are sharded."""
    is_hybrid: bool
    """Several groups of such ranks have all shards, and reduce gradients among each other (HSDPMeshInfo)."""
    offload: bool
    """CPUOffloadPolicy: shards, their gradients and the optimizer on the host, all but the states pinned."""
    optimizer: Optimizer
    stepped: Sequence[Parameter]
    """The shards that are trained."""
    whole: Sequence[tuple[Key, Parameter]]
    """The weights that they are shards of."""
    state_dict_type: str


class Fsdp:
    """One rank."""

    keeps_loaded = True  # fsdp2_prepare_model has a state_dict of the model before it was sharded

    def __init__(self, setup: FsdpSetup, ledger: Ledger) -> None:
        self.setup = setup
        self.ledger = ledger
        self._begins: Mapping[Key, Unit] = {unit.first: unit for unit in setup.units}
        self._ends: Mapping[Key, Unit] = {unit.last: unit for unit in setup.units}
        self._unit = {row.key: unit for unit in setup.units for row in unit.weights}
        self._unsharded: dict[Key, list[Block]] = {}
        self._gathered: dict[Key, Block | None] = {}
        """Unit -> all_gather_output, before its copy-out."""
        self._last_gathered: Block | None = None
        """The forward's last all_gather_output, which is kept until the next copy-out (comm_ctx.all_gather_state)."""
        self._grads: dict[Key, Block] = {}
        self._sharded_grads: list[Block] = []
        self._reduce_input: Block | None = None
        self._all_reduced: list[Block] = []
        """Each unit's, until its next backward (_all_reduce_state)."""
        self._order: list[Unit] = []
        """Units in the order of their forward's end."""
        self._runs: dict[Key, Unit] = {}
        """Units whose forward has begun, by their first module."""
        self._of_root: list[Unit] = []
        """Units whose forward ended with the root's, some module of theirs having none."""
        self._reduced: set[Key] = set()
        self._has_states = False
        self._boundary = True
        self._backward = False

    def initialize(self) -> None:
        """fully_shard: unit by unit the weights come to the GPU whole, and only their shards stay."""
        for nbytes in self.setup.ignored:
            self.ledger.allocate("weights", nbytes, name="not sharded")
        if self.setup.distributed:
            self._distribute(self.setup.distributed)
            return
        kept: list[Block] = []
        for unit in self.setup.as_sharded:
            moved = [] if self.setup.on_gpu else unit.weights
            sizes = {row.key: row.elements * row.itemsize for row in moved}
            whole = {key: self.ledger.allocate("temporaries", n, name=WHOLE) for key, n in sizes.items()}
            for row in unit.weights:
                self._shard(row)
            kept += [whole.pop(key) for key in self.setup.referenced & whole.keys()]
            self.ledger.free(*whole.values())
        self.ledger.free(*kept)

    def _distribute(self, rows: Sequence[Row]) -> None:
        """fsdp2_load_full_state_dict: weights come to the GPU one by one, tied ones twice until they are tied again."""
        twice: list[Block] = []
        seen: set[Key] = set()
        for row in rows:
            whole = self.ledger.allocate("temporaries", row.elements * row.itemsize, name=WHOLE)
            nbytes = row.shard * row.itemsize
            pads = [self.ledger.allocate("temporaries", nbytes, name="padded shards") for _ in range(row.short)]
            shard = self._shard(row)
            self.ledger.free(whole, *pads)  # distribute_tensor copies the shards that it pads
            twice += [shard] if row.key in seen else []
            seen.add(row.key)
        self.ledger.free(*twice)

    def _shard(self, row: Row) -> Block:
        """_init_sharded_param: cut on the GPU; under offloading copied to the host, and there into pinned memory."""
        shard = self.ledger.allocate("weights", row.shard * row.itemsize, name="shards")
        if self.setup.offload:
            copy = self.ledger.allocate("weights", row.shard * row.itemsize, "host")
            self.ledger.free(shard)
            shard = self._on_host_or_gpu("weights", row.shard * row.itemsize)
            self.ledger.free(copy)
        return shard

    def _on_host_or_gpu(self, component: str, nbytes: int) -> Block:
        """A shard, or its gradient."""
        return self.ledger.allocate(component, nbytes, "pinned" if self.setup.offload else "gpu", "shards")

    # -- hooks -----------------------------------------------------------------------------------------------------

    def begin_micro_batch(self, boundary: bool) -> None:
        self._boundary = boundary
        self._backward = False
        self._order.clear()
        self._reduced.clear()

    def begin_evaluation(self) -> None:
        """Units are gathered and freed as in training."""

    def module_event(self, kind: str, module: Key) -> None:
        """A hook of a module; only those of units matter, and in the backward no forward's."""
        if kind == "pre_forward" and module in self._begins and not self._backward:
            self._runs[module] = self._begins[module]
            self._unshard(self._begins[module])
            self._wait(self._begins[module], forward=True)
        elif kind == "post_forward" and module in self._ends and not self._backward:
            self._post_forward(self._ends[module])
        if kind == "post_forward" and module == self.setup.root and not self._backward:
            self.ledger.free(self._last_gathered)
            self._last_gathered = None
            self._of_root = list(self._runs.values())  # _force_complete_incomplete_states
            for unit in self._of_root:
                self._post_forward(unit)
        elif kind == "pre_backward" and module in self._ends:
            self._pre_backward(self._ends[module])
        elif kind == "pre_backward" and module == self.setup.root:
            for unit in self._of_root:
                self._pre_backward(unit)
        elif kind == "post_backward" and module in self._begins:
            self._post_backward(self._begins[module])

    def _post_forward(self, unit: Unit) -> None:
        self._runs.pop(unit.first, None)
        if unit.reshard_after_forward:
            self._reshard(unit)
        self._order.append(unit)

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        if gradient is not None:
            self._grads[key] = gradient

    def finish_micro_batch(self) -> None:
        """_root_post_backward_final_callback: units whose inputs need no gradient, the root's before the embedding's,
        and what was kept for overlap.
        """
        for unit in self.setup.units:  # in the order of all_states: the modules'
            if unit.first not in self._reduced:
                self._post_backward(unit)
        self.ledger.free(self._reduce_input, *self._all_reduced, *self._gathered.values())  # finalize_backward
        self._reduce_input = None
        self._all_reduced.clear()
        self._gathered.clear()
        self._backward = False

    # -- gathering -------------------------------------------------------------------------------------------------

    def _unshard(self, unit: Unit) -> None:
        if unit.first in self._gathered or unit.first in self._unsharded:
            return
        if self.setup.ranks == 1:
            self._gathered[unit.first] = None
            return
        nbytes = sum(row.padded * row.gathered for row in unit.weights)
        self.ledger.move("all_gather", nbytes)
        with self.ledger.on(COPY_IN):
            if self.setup.offload:
                self.ledger.move("to_gpu", sum(row.shard * row.itemsize for row in unit.weights))
                inputs = [self._copied(row, row.shard) for row in unit.weights]
            else:
                casts = sum(row.shard * row.gathered for row in unit.weights if row.itemsize != row.gathered)
                inputs = [self.ledger.allocate("temporaries", casts, name=CAST)] if casts else []
            self._gathered[unit.first] = self.ledger.allocate("communication", nbytes, name=TOGETHER)
        self.ledger.free(*inputs)

    def _copied(self, row: Row, elements: int) -> Block:
        """all_gather_inputs of a shard on the host: copied to the GPU, then cast."""
        copy = self.ledger.allocate("temporaries", elements * row.itemsize, name=STAGED)
        if row.itemsize == row.gathered:
            return copy
        cast = self.ledger.allocate("temporaries", elements * row.gathered, name=CAST)
        self.ledger.free(copy)
        return cast

    def _wait(self, unit: Unit, *, forward: bool) -> None:
        """wait_for_unshard: the copy-out."""
        if unit.first not in self._gathered:
            return
        gathered = self._gathered.pop(unit.first)
        blocks: list[Block] = []
        cast: Block | None = None
        for row in unit.weights:
            before, cast = cast, None
            if self.setup.ranks == 1 and self.setup.offload:
                cast = self._copied(row, row.elements)
            elif self.setup.ranks == 1 and row.itemsize != row.gathered:
                cast = self.ledger.allocate("temporaries", row.elements * row.gathered, name=CAST)
            self.ledger.free(before)  # by the loop's variable, once it has the next one
            blocks.append(self.ledger.allocate("communication", row.padded * row.gathered, name=GATHERED))
        self.ledger.free(cast)
        self._unsharded[unit.first] = blocks
        if forward:  # the one before is held until this copy-out is done
            self.ledger.free(self._last_gathered)
            self._last_gathered = gathered
        else:
            self.ledger.free(gathered)

    def _reshard(self, unit: Unit) -> None:
        self.ledger.free(*self._unsharded.pop(unit.first, ()))

    # -- backward ----------------------------------------------------------------------------------------------------

    def _pre_backward(self, unit: Unit) -> None:
        self._backward = True
        self._unshard(unit)
        self._wait(unit, forward=False)
        before = self._order.index(unit) - 1
        if before >= 0:
            self._unshard(self._order[before])

    def _post_backward(self, unit: Unit) -> None:
        self._reduced.add(unit.first)
        grads = {row.key: self._grads[row.key] for row in unit.weights if row.key in self._grads}
        self._reshard(unit)
        if not self._boundary:
            return  # no_sync: gradients stay whole
        self.ledger.free(self._reduce_input)
        self._reduce_input = None
        if not grads:
            return
        rows = [row for row in unit.weights if row.key in grads]
        size = rows[0].gathered  # of all that are trained
        padded = sum(row.padded for row in rows)
        self.ledger.move("reduce_scatter", padded * size)
        self._reduce_input = self.ledger.allocate("communication", padded * size, name="reduce-scatter's input")
        whole = [self._grads.pop(key) for key in grads]
        held = whole.pop() if self.setup.ranks > 1 else None  # by the variable of foreach_reduce's loop
        self.ledger.free(*whole)
        is_cast = rows[0].itemsize != size
        name = ALL_REDUCED if self.setup.is_hybrid and (is_cast or self.setup.offload) else "shards"
        with self.ledger.on(REDUCE_SCATTER):
            reduced = output = self.ledger.allocate("gradients", sum(row.shard for row in rows) * size, name=name)
        if is_cast:
            nbytes = sum(row.shard for row in rows) * rows[0].itemsize
            with self.ledger.on(ALL_REDUCE if self.setup.is_hybrid else REDUCE_SCATTER):
                output = self.ledger.allocate("gradients", nbytes, name="shards")
            self._reduced_copied(reduced)
        if self.setup.offload:
            self.ledger.move("to_host", sum(row.shard * row.itemsize for row in rows))
            on_host = [self._on_host_or_gpu("gradients", row.shard * row.itemsize) for row in rows]
            self._sharded_grads += on_host
            self._reduced_copied(output) if output is reduced else self.ledger.free(output)
        else:
            self._sharded_grads.append(output)
        self.ledger.free(held)

    def _reduced_copied(self, block: Block) -> None:
        """What was reduced is in another tensor now."""
        if self.setup.is_hybrid:
            self._all_reduced.append(block)
        else:
            self.ledger.free(block)

    # -- step ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        optimizer, place = self.setup.optimizer, "host" if self.setup.offload else "gpu"
        if not self.setup.offload:  # on the host scalars take what they are
            clipping = clip_grad_norm([(p, 1) for p in self.setup.stepped], optimizer.rules)
            sizes = (nbytes for nbytes, count in clipping for _ in range(count))
            norms = [self.ledger.allocate("temporaries", nbytes, name="norms of gradients") for nbytes in sizes]
            self.ledger.free(*norms)
        self.ledger.move("host_step", sum(p.numel for p in self.setup.stepped) if self.setup.offload else 0)
        if not self._has_states:
            self._has_states = True
            for p in self.setup.stepped:
                for nbytes in optimizer.states(p):
                    self.ledger.allocate("optimizer", nbytes, place, "states")
        temporaries_of_step(self.ledger, optimizer, place)
        self.ledger.free(*self._sharded_grads)
        self._sharded_grads.clear()

    def end_graph(self) -> None:
        """Unsharded weights have given their memory back by then, whoever holds them (resize_)."""

    # -- save ----------------------------------------------------------------------------------------------------------

    def save(self, state_dict: StateDict) -> None:
        """The model, then the optimizer's states: whole on rank 0's host, or every rank's shards on its own."""
        optimizer = self.setup.optimizer
        rows = {row.key: row for unit in self.setup.units for row in unit.weights}
        sharded = [rows[key] for key, _ in state_dict.weights if key in rows]
        model = [(row, row.elements * row.itemsize) for row in sharded]
        states = [(rows[key], nbytes) for key, p in self.setup.whole for nbytes in optimizer.state_bytes(p)]
        for component, entries in (("weights", model), ("optimizer", states)):
            made = [self._saved(component, row, nbytes) for row, nbytes in entries]
            if entries is model and self.setup.state_dict_type == "FULL_STATE_DICT":
                # Of a weight that is sharded the layer no longer finds its scales.
                whole = (*self.setup.ignored, *(state_dict.scales if self.setup.ignored else ()))
                made += [self.ledger.allocate(component, nbytes, "main") for nbytes in whole]
                self.ledger.briefly("temporaries", state_dict.split * model[0][0].itemsize, "main")
            self.ledger.free(*made)

    def _saved(self, component: str, row: Row, nbytes: int) -> Block | None:
        """A tensor of a state_dict, whose weight has ``nbytes``, on the host."""
        shard, padded = (nbytes * part // row.elements for part in (row.shard, row.padded))
        if self.setup.state_dict_type == "SHARDED_STATE_DICT":
            return None if self.setup.offload else self.ledger.allocate(component, shard, "host")
        staged = self.ledger.allocate("communication", shard, name=STAGED) if self.setup.offload else None
        gathered = self.ledger.allocate("communication", padded, name=SAVED) if self.setup.ranks > 1 else None
        block = self.ledger.allocate(component, nbytes, "main")
        self.ledger.free(staged, gathered)
        return block


ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that have been seen to step on shards (tests/oracles/o2.py)."""


def fsdp_setup(
    strategy: Strategy,
    root: Module,
    model: Layout,
    ranks: int,
    asked: DType,
    mixed: DType | None,
    training: TrainingSpec,
    reentrant: bool,
    model_type: str,
    rules: DeviceRules,
) -> FsdpSetup | Fsdp1Setup:
    """The units that accelerate makes, cut over ``ranks``, of weights that are ``asked`` for in one dtype and gathered
    in the ``mixed`` one; ``reentrant`` is how blocks are recomputed. Raises MemplanError.
    """
    keys, offload = strategy.fsdp, strategy.offload_param != "none"
    _check_optimizer(training.optim, keys.version)
    trained = {key for group in model.groups for key in group}
    loaded = {key: loaded_dtype(p, asked, mixed) for key, p in model.parameters.items()}
    # accelerate upcasts what is trained, but version 2 not in models with 4-bit weights.
    upcasts = mixed is not None and (keys.version == 1 or training.quantization is None)
    stored = {key: float32 if upcasts and key in trained else dtype for key, dtype in loaded.items()}
    ignored = [] if training.quantization is None else _ignored(model, keys.version, training.quantization, mixed)
    rows = {
        key: Row(
            key,
            p.shape[0],
            prod(p.shape[1:]),
            loaded[key].itemsize,
            stored[key].itemsize,
            (mixed or loaded[key]).itemsize,
            key in trained,
            ranks,
        )
        for key, p in model.parameters.items()
        if key not in ignored
    }
    units = Units(root, model, rows, keys, model_type)
    tape = Tape(rules)
    places = CPU if offload else rules
    whole = [
        (key, tape.parameter("whole", model.parameters[key].shape, stored[key]))
        for group in model.groups
        for key in group
    ]
    if keys.version == 1:
        wrapped = units.version_1()
        _check_head(root, model, wrapped, keys)
        _check_types(wrapped, keys.version, asked)
        if reentrant and units.reach_into_blocks:
            problem = "fails in FSDP's version 1: the backward of one block frees the weights of all in its unit"
            raise SpecError.at("use_reentrant", True, problem, "Use false, or TRANSFORMER_BASED_WRAP.")
        flats = _flat_params(wrapped, keys, ranks, offload)
        sizes = {row.key: elements for flat in flats for row, elements in flat.pieces()}
        pieces: list[list[tuple[Shape, DType]]] = [
            [((sizes[key],), stored[key]) for key in group if key in sizes] for group in model.groups
        ]
        if not keys.use_orig_params:
            pieces = [[((flat.shard,), stored[flat.unit.weights[0].key]) for flat in flats if flat.trained]]
        stepped = _stepped(tape, pieces)
        return Fsdp1Setup(
            flats=flats,
            root=model.numbers[id(root)],
            is_hybrid=keys.is_hybrid,
            offload=offload,
            backward_prefetch=keys.backward_prefetch,
            forward_prefetch=keys.forward_prefetch,
            sync_module_states=keys.sync_module_states,
            optimizer=make_optimizer(training.optim, places, lambda: stepped),
            stepped=stepped.parameters,
            whole=dict(whole),
            state_dict_type=keys.state_dict_type,
        )
    found = units.version_2()
    _check_head(root, model, found, keys)
    _check_types(found, keys.version, asked)
    if units.below_blocks and training.gradient_checkpointing:
        raise UnsupportedError(
            "transformer_layer_cls_to_wrap: units inside of blocks are gathered once more where a block is recomputed, "
            "which is not modelled. Leave it out, or use --no-gradient-checkpointing."
        )
    shards = [
        [((-(-rows[key].rows // ranks), *model.parameters[key].shape[1:]), stored[key]) for key in group]
        for group in model.groups
    ]
    stepped = _stepped(tape, shards)
    return FsdpSetup(
        units=found,
        as_sharded=units.as_sharded,
        referenced=units.referenced,
        distributed=[rows[key] for key in model.names]
        if keys.cpu_ram_efficient_loading and training.quantization is None
        else [],
        ignored=[model.parameters[key].nbytes for key in ignored],
        on_gpu=training.quantization is not None,
        root=model.numbers[id(root)],
        ranks=ranks,
        is_hybrid=keys.is_hybrid,
        offload=offload,
        optimizer=make_optimizer(training.optim, places, lambda: stepped),
        stepped=stepped.parameters,
        whole=whole,
        state_dict_type=keys.state_dict_type,
    )


def _check_head(root: Module, model: Layout, units: Sequence[Unit], keys: FsdpSpec) -> None:
    """Liger's loss dies of a weight that is not gathered."""
    head = fused_head(root)
    if head is not None and any(unit.first == model.numbers[id(head)] for unit in units):
        problem = "puts the head into a unit of its own, whose weight Liger's loss reads without having it gathered"
        raise SpecError.at(
            "auto_wrap_policy", keys.auto_wrap_policy, problem, "Use TRANSFORMER_BASED_WRAP, or no Liger."
        )


def _check_types(units: Sequence[Unit], version: int, asked: DType) -> None:
    """Version 1 flattens weights of one type ("Must flatten tensors with uniform dtype"), version 2 trains those of one
    ("FSDP expects uniform original parameter dtype").
    """
    for unit in units:
        sizes = [row.loaded if version == 1 else row.itemsize for row in unit.weights if version == 1 or row.trained]
        if len(set(sizes)) > 1:
            which = "weights" if version == 1 else "trained weights"
            problem = f"leaves {which} of several types in one unit, which FSDP's version {version} refuses"
            remedy = "Use float32, or with LoRA no modules_to_save within blocks."
            raise SpecError.at("dtype", asked.name, problem, remedy)


def shard_group(keys: FsdpSpec, gpus: int, per_node: int) -> int:
    """Ranks over which weights are sharded. Raises SpecError for groups that accelerate refuses.

    Version 1's hybrids take a node for a group (_init_intra_and_inter_node_groups): with one GPU each nothing is
    sharded, and nothing reduced.
    """
    if keys.version == 1:
        return per_node if keys.is_hybrid else gpus
    replicas = keys.dp_replicate_size
    shards = gpus // replicas if keys.dp_shard_size is None else keys.dp_shard_size
    if replicas * shards != gpus:  # ParallelismConfig._validate_accelerator: "total_size ... does not match"
        remedy = "Change one of them, or --gpus."
        name, value = ("dp_replicate_size", replicas) if keys.dp_shard_size is None else ("dp_shard_size", shards)
        problem = f"cannot be: {replicas} groups of {shards} ranks are not {gpus} GPUs"
        raise SpecError.at(name, value, problem, remedy)
    if shards == 1 and gpus > 1:  # ibid.: "no dimension for FSDP to shard across"
        remedy = "Use a smaller one, or --strategy ddp."
        raise SpecError.at("dp_replicate_size", replicas, f"leaves nothing to shard over with {gpus} GPUs", remedy)
    return shards


def _ignored(model: Layout, version: int, quantization: QuantizationSpec, mixed: DType | None) -> list[Key]:
    """Weights that accelerate keeps out of FSDP. Raises SpecError for those that FSDP cannot have either way."""
    field = "quantization"
    if quantization.kind == "int8":
        problem = "cannot be sharded: FSDP puts tensors of its own in the place of bitsandbytes' Int8Params"
        remedy = "Use --quantization nf4, or --strategy zero2."
        raise SpecError.at(field, quantization.kind, problem, remedy)
    ignored = [key for key, p in model.parameters.items() if not p.dtype.is_floating]
    if version == 2:
        return ignored
    if ignored:
        problem = "packed into uint8 cannot be flattened: FSDP's version 1 takes no integers"
        remedy = "Use FSDP's version 2, or --strategy zero2."
        raise SpecError.at(field, quantization.kind, problem, remedy)
    if len({p.loaded for p in model.parameters.values() if p.node is None}) > 1:
        problem = "leaves weights of several types, and FSDP's version 1 flattens those of one"
        remedy = "Use FSDP's version 2."
        name = f"{field}.prepare_for_kbit_training"
        raise SpecError.at(name, quantization.prepare_for_kbit_training, problem, remedy)
    if mixed is None and any(
        p.loaded is not dtype_named(quantization.quant_storage) for p in model.parameters.values()
    ):
        # update_fsdp_plugin_peft of transformers/distributed/fsdp.py: what PEFT has cast to float32 meets weights that
        # are not, "expected m1 and m2 to have the same dtype".
        problem = "stops at the first adapter: the Trainer has version 1 gather float32 adapters in quant_storage"
        raise SpecError.at("mixed_precision", "no", problem, "Use bf16, or FSDP's version 2.")
    return []


def _check_optimizer(optim: str, version: int) -> None:
    if optim == "adafactor" and version == 2:  # transformers/optimization.py adds a plain tensor to a DTensor
        remedy = "Use adamw_torch_fused, or FSDP's version 1."
        raise SpecError.at("optim", optim, "cannot step on the DTensors of fsdp's version 2", remedy)
    if optim == "adagrad" and version == 2:
        raise UnsupportedError(
            "optim: 'adagrad' makes its states of the whole weights before fsdp's version 2 shards them, which is not "
            "modelled. Use adamw_torch_fused, or version 1."
        )
    if optim not in ELEMENTWISE and optim != "adafactor":
        raise UnsupportedError(f"optim: {optim!r} is not modelled under fsdp. Use one of {', '.join(ELEMENTWISE)}.")


def loaded_dtype(p: Parameter, asked: DType, mixed: DType | None) -> DType:
    """The same under FSDP: without ``mixed`` precision it is the tape's, which with it has what is gathered."""
    if p.loaded is not None:
        return p.loaded
    return p.dtype if mixed is None else checkpoint.loaded_dtype(p, asked)


def _stepped(tape: Tape, shards: Sequence[Sequence[tuple[Shape, DType]]]) -> Groups:
    """What the optimizer is given on the first rank, in the Trainer's groups, of which the last has no decay."""
    groups = [[tape.parameter("shard", shape, dtype) for shape, dtype in group] for group in shards]
    undecayed = {id(p) for p in groups[-1]} if len(groups) > 1 else set()
    return Groups([p for group in groups for p in group], undecayed=undecayed)


def _flat_params(units: Sequence[Unit], keys: FsdpSpec, ranks: int, offload: bool) -> list[FlatParam]:
    """Raises MemplanError for what FSDP1 refuses and for what is not modelled."""
    strategy = keys.sharding_strategy or "FULL_SHARD"
    if not keys.limit_all_gathers:
        raise UnsupportedError(
            "limit_all_gathers: false lets the CPU run ahead, and how many units are gathered at a time depends on how "
            "far. That is not modelled. Leave it out."
        )
    is_sharded = strategy != "NO_SHARD" and ranks > 1
    flats = [FlatParam(unit, ranks, is_sharded, keys.use_orig_params) for unit in units]
    if offload and not is_sharded and not all(flat.is_cast for flat in flats):
        raise UnsupportedError(
            "offload_param: 'cpu' without sharding leaves copies of weights on the GPU where nothing is cast, for as "
            "long as the backward needs them, which is not modelled. Use more GPUs, mixed precision, or none."
        )
    if not keys.use_orig_params and any(len({row.trained for row in flat.unit.weights}) > 1 for flat in flats):
        remedy = "Leave it out."
        raise SpecError.at("use_orig_params", False, "cannot have frozen weights beside trained ones in a unit", remedy)
    return flats

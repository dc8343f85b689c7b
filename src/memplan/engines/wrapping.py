"""What becomes a unit of FSDP: the modules that accelerate has ``fully_shard`` or ``FullyShardedDataParallel`` wrap.

Sources: fsdp2_prepare_model and fsdp2_prepare_auto_wrap_policy in accelerate/utils/fsdp_utils.py, 1.15;
_recursive_wrap and size_based_auto_wrap_policy in torch/distributed/fsdp/wrap.py, torch 2.13; fsdp_auto_wrap_policy in
peft/utils/other.py, which the Trainer sets for version 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from memplan.adapters.lora import LoraLinear
from memplan.architectures.nn import InputEmbeddings, Layers, Model, Module, ModuleList
from memplan.engines.layout import Layout
from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.memory.course import Key
from memplan.memory.optimizers import OUTSIDE
from memplan.specs.strategy import FsdpSpec


@dataclass(frozen=True, slots=True)
class Row:
    """A weight, of which every rank keeps a part."""

    key: Key
    rows: int
    width: int
    """Elements of a row."""
    loaded: int
    """Bytes of an element as it is handed over."""
    itemsize: int
    """Bytes of an element of the shard: trained weights are in float32 under mixed precision."""
    gathered: int
    """Bytes of an element where it is used: in mixed precision's type, or in its own."""
    trained: bool
    ranks: int

    @property
    def shard(self) -> int:
        """Elements of one rank's shard, padding included; version 2, which cuts every weight by rows."""
        return -(-self.rows // self.ranks) * self.width

    @property
    def padded(self) -> int:
        """Elements of all shards together."""
        return self.shard * self.ranks

    @property
    def elements(self) -> int:
        return self.rows * self.width

    @property
    def short(self) -> int:
        """How many ranks' shards have fewer rows than the first's."""
        return self.ranks - self.rows // -(-self.rows // self.ranks)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is sharded, gathered and freed together."""

    weights: Sequence[Row]
    first: Key
    last: Key
    """The modules whose forward begins and ends the unit's."""
    reshard_after_forward: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A module of the whole model."""

    key: Key
    module: Module
    is_block: bool
    below: tuple[Place, ...]

    def walk(self) -> Iterator[Place]:
        """This one and all below."""
        yield self
        for place in self.below:
            yield from place.walk()

    @property
    def is_list(self) -> bool:
        return isinstance(self.module, Layers | ModuleList)


def place(root: Module, model: Layout) -> Place:
    """The tree of the whole model's modules."""

    def visit(module: Module, layer: int, is_block: bool) -> Place:
        if isinstance(module, Layers):
            made = dict(module.children())
            below = tuple(visit(made[str(stands)], index, True) for index, stands in enumerate(module.sequence()))
        else:
            below = tuple(visit(child, layer, False) for _, child in module.children())
        return Place((model.numbers[id(module)][0], layer), module, is_block, below)

    return visit(root, OUTSIDE, False)


Policy = Callable[[Place], bool]
"""Whether a module becomes a unit of its own."""


class Units:
    """The units of a model, in the order of its modules, the root's with what is left first."""

    def __init__(self, root: Module, model: Layout, rows: Mapping[Key, Row], keys: FsdpSpec, model_type: str) -> None:
        self.tree = place(root, model)
        self._root = root
        self._model = model
        self._left = dict(rows)
        self._rows = rows
        self._keys = keys
        self._model_type = model_type
        self._unit_of: dict[Key, Key] = {}
        """Module -> the first module of its unit."""
        self._owner: dict[Key, Key] = {}
        """The same for weights."""
        self.below_blocks = False
        """Whether a unit lies inside a block."""
        self.as_sharded: list[Unit] = []
        """Version 2's units in the order in which ``fully_shard`` is called."""
        self.referenced: frozenset[Key] = frozenset()
        """Weights that accelerate has by name (``input_weight``, ``output_weight``) while it calls ``fully_shard``."""

    def version_1(self) -> list[Unit]:
        """Of FullyShardedDataParallel."""
        keys = self._keys
        reshard = keys.sharding_strategy in (None, "FULL_SHARD", "HYBRID_SHARD")
        if any(isinstance(each.module, LoraLinear) for each in self.tree.walk()):
            if keys.transformer_layer_cls_to_wrap:
                raise UnsupportedError(
                    "transformer_layer_cls_to_wrap: with LoRA the Trainer has PEFT choose what version 1 wraps, and "
                    "PEFT looks for classes of your own in accelerate's environment only. Leave it out."
                )
            found = self._wrapped(lambda each: each.module.no_split or _is_adapter(each.module), reshard)
        elif keys.auto_wrap_policy == "SIZE_BASED_WRAP" and keys.min_num_params:
            found, _ = self._of_size(self.tree, keys.min_num_params, reshard)
        else:
            found = self._wrapped(self._policy(), reshard)
        rest = self._taken([self.tree], reshard)
        return [unit for unit in (rest, *found) if unit.weights]

    def version_2(self) -> list[Unit]:
        """Of fully_shard: blocks, the input embedding, the tail (final norm and head), and the root with the rest."""
        root, reshard = self._root, self._keys.reshard_after_forward
        policy = self._policy()
        places = {id(each.module): each for each in self.tree.walk()}
        chosen = {id(each.module) for each in self.tree.walk() if each is not self.tree and policy(each)}
        found = self._wrapped(policy, reshard)
        embedding = next((m for _, m in root.named_modules() if isinstance(m, InputEmbeddings)), None)
        head = root.output_embeddings() if isinstance(root, Model) else None
        tied = embedding is not None and getattr(embedding, "weight", None) is getattr(head, "weight", None)
        first, tail = (
            [places[id(module)] for module in modules if module is not None and id(module) not in chosen]
            for modules in ([None if tied else embedding], [embedding if tied else None, _final_norm(root, head), head])
        )
        for each in (*first, *tail):
            if each.key in self._unit_of:  # fully_shard sees a DTensor and takes it for tensor parallelism's
                remedy = "Give the blocks' class alone as transformer_layer_cls_to_wrap, or use version 1."
                problem = f"puts {type(each.module).__name__} into another's unit, where accelerate shards it once more"
                raise SpecError.at("auto_wrap_policy", self._keys.auto_wrap_policy, problem, remedy)
        ends = [each for each in (*first, *tail) if each.module is embedding or each.module is head]
        self.referenced = frozenset(own for each in ends for own in self._own(each))
        first_units = [self._taken([each], reshard) for each in first]
        last_units = [self._taken(tail, reshard_after_forward=False)] if tail else []
        rest = self._taken([self.tree], reshard_after_forward=False)
        self.as_sharded = [unit for unit in (*found, *first_units, *last_units, rest) if unit.weights]
        return [unit for unit in (rest, *first_units, *found, *last_units) if unit.weights]

    @property
    def reach_into_blocks(self) -> bool:
        """Whether weights of a block are in a unit that is not within the block."""
        return any(
            below.key in self._model.modules and self._unit_of[below.key] not in {each.key for each in block.walk()}
            for block in self.tree.walk()
            if block.is_block
            for below in block.walk()
        )

    # -- policies --------------------------------------------------------------------------------------------------

    def _policy(self) -> Policy:
        keys = self._keys
        if keys.auto_wrap_policy == "TRANSFORMER_BASED_WRAP":
            if not keys.transformer_layer_cls_to_wrap:
                return lambda each: each.module.no_split
            return self._of_classes(keys.transformer_layer_cls_to_wrap)
        if (
            keys.auto_wrap_policy == "SIZE_BASED_WRAP" and keys.min_num_params
        ):  # none is NO_WRAP, in set_auto_wrap_policy
            return self._larger
        return lambda _: False

    def _larger(self, each: Place) -> bool:
        """Version 2's rule, which looks at all weights below a module, those of units too."""
        large = self._elements(each) > self._keys.min_num_params
        if large and each.is_list:
            remedy = "Use TRANSFORMER_BASED_WRAP, or a larger min_num_params."
            problem = "would wrap the list of blocks, which fully_shard refuses"
            raise SpecError.at("min_num_params", self._keys.min_num_params, problem, remedy)
        return large

    def _of_size(self, each: Place, minimum: int, reshard: bool) -> tuple[list[Unit], int]:
        """_recursive_wrap: the units, and the elements in them."""
        whole = self._elements(each)
        if whole < minimum:
            return [], 0
        found: list[Unit] = []
        wrapped = 0
        for child in each.below:
            units, elements = self._of_size(child, minimum, reshard)
            found += units
            wrapped += elements
        if each is self.tree or each.is_list or whole - wrapped < minimum:
            return found, wrapped
        return [self._taken([each], reshard), *found], whole

    def _of_classes(self, names: Sequence[str]) -> Policy:
        """Modules by the names of their classes in transformers."""
        classes = {type(each.module) for each in self.tree.walk() if not each.is_list and each is not self.tree}
        wanted: set[type[Module]] = set()
        for name in names:
            tail = _without(name, self._model_type)
            found = {one for one in classes if name == one.__name__ or tail == _tail(one)}
            if not found:
                known = ", ".join(sorted(one.__name__ for one in classes))
                remedy = f"Known are {known}, under the model's own prefix."
                raise SpecError.at("transformer_layer_cls_to_wrap", name, "is not a class of this model", remedy)
            wanted |= found
        return lambda each: type(each.module) in wanted

    # -- taking weights --------------------------------------------------------------------------------------------

    def _elements(self, each: Place) -> int:
        keys = {own for below in each.walk() for own in self._model.modules.get(below.key, ())}
        return sum(self._model.parameters[key].numel for key in keys)

    def _own(self, each: Place) -> list[Key]:
        """The weight called ``weight``."""
        weight = getattr(each.module, "weight", None)
        return [key for key in self._model.modules.get(each.key, ()) if self._model.parameters[key] is weight]

    def _wrapped(self, policy: Policy, reshard: bool) -> list[Unit]:
        """Bottom up: what is below a unit and has one of its own is not its."""

        def visit(each: Place, in_block: bool) -> list[Unit]:
            found = [unit for child in each.below for unit in visit(child, in_block or each.is_block)]
            if each is self.tree or not policy(each):
                return found
            self.below_blocks |= in_block
            return [self._taken([each], reshard), *found]

        return visit(self.tree, False)

    def _taken(self, places: Sequence[Place], reshard_after_forward: bool) -> Unit:
        """What is left below some modules."""
        weights: list[Row] = []
        for each in (below for one in places for below in one.walk() if below.key not in self._unit_of):
            self._unit_of[each.key] = places[0].key
            for own in self._model.modules.get(each.key, ()):
                if own not in self._rows:
                    continue  # ignored
                if own in self._left:
                    weights.append(self._left.pop(own))
                    self._owner[own] = places[0].key
                elif self._owner[own] != places[0].key:
                    raise self._shared()
        return Unit(weights, places[0].key, places[-1].key, reshard_after_forward)

    def _shared(self) -> MemplanError:
        """A weight that modules share, as a tied embedding is, would be in the unit of one and used in another's."""
        if (
            self._keys.version == 2
        ):  # FSDPParamGroup: "is shared with a parameter already managed by another FSDP group"
            problem = "puts modules that share a weight, as T5's embeddings do, into two units, which torch refuses"
            remedy = "Use --strategy zero2 or zero3."
            return SpecError.at("auto_wrap_policy", self._keys.auto_wrap_policy, problem, remedy)
        return UnsupportedError(
            "auto_wrap_policy: a weight that modules share would be in the unit of one and used in that of another. "
            "Wrap blocks only, with transformer_layer_cls_to_wrap."
        )


def _is_adapter(module: Module) -> bool:
    """PEFT's lambda_policy_fn: a leaf whose weight is trained."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.node is not None and next(iter(module.children()), None) is None


def is_frozen_unit(module: Module) -> bool:
    """Whether PEFT's policy makes a unit of it that has no trained weight."""
    below = (each for _, each in module.named_modules() if not _is_adapter(each))
    return module.no_split and all(p.node is None for each in below for _, p in each.parameters())


def _without(name: str, model_type: str) -> str:
    """A class's name in transformers less the model's own prefix, as in ``Qwen2DecoderLayer``."""
    prefix = model_type.removesuffix("_text").replace("_", "").replace("-", "")
    return name[len(prefix) :] if name.lower().startswith(prefix) else name


def _tail(one: type[Module]) -> str:
    """A class's name here less the prefix of its family, which other families' models use too."""
    return _without(one.__name__, one.__module__.rsplit(".", 1)[-1])


def _final_norm(root: Module, head: Module | None) -> Module | None:
    """_find_final_norm: the last norm among the children of the base model."""
    base = getattr(root, "_prefix", None)
    model = getattr(root, base) if base else next((child for _, child in root.children() if child is not head), root)
    norms = [child for _, child in model.children() if "Norm" in type(child).__name__]
    return norms[-1] if norms else None

"""Reading and writing a checkpoint: what it takes of the host.

Sources: transformers/modeling_utils.py (``_load_pretrained_model``, ``save_pretrained``), core_model_loading.py
(``_materialize_copy``), 5.23; safetensors/torch.py (``_to_ndarray``), 0.8; torch/serialization.py (``_save``), 2.13;
huggingface_hub/serialization/_base.py (``split_state_dict_into_shards_factory``).

Host memory is what a process has of its own. ``from_pretrained`` maps the checkpoint's files, and a weight that needs
no cast stays a view of the map: pages of the file, which all processes of a node share and the kernel takes back when
memory is short. They are in a container's page cache, and not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from memplan.adapters.lora import is_adapter
from memplan.memory.course import Block, Ledger
from memplan.tape import tensor as dtypes
from memplan.tape.tensor import DType, Parameter

STACKED = 3
"""Dimensions of the weights of all experts, of which a checkpoint has one at a time: stacking them is a copy."""
MAX_SHARD_SIZE = 50 * 10**9
"""Bytes: save_pretrained starts another file before it gets larger (``max_shard_size="50GB"``)."""


class Loaded(NamedTuple):
    """A weight of the model that a script hands to the Trainer."""

    nbytes: int
    """Of the process's own: none where it is a view of the mapped file."""
    cast: int | None = None
    """What it has once the engine has cast it; None leaves it as it is."""
    merged: bool = False
    """Two weights of every expert are stacked, and the stacks put together."""


def stored_dtype(config: Mapping[str, Any]) -> DType | None:
    """The checkpoint's dtype, as its config tells it; None is unknown."""
    name = config.get("dtype") or config.get("torch_dtype")
    return dtypes.dtype_named(name) if name in ("float32", "bfloat16", "float16") else None


def from_pretrained(weight: Parameter, dtype: DType, stored: DType | None) -> int:
    """Bytes of the process's own that a weight loaded as ``dtype`` has; of an unknown checkpoint it is a copy."""
    view = dtype is stored and len(weight.shape) != STACKED
    return 0 if view else weight.numel * dtype.itemsize


def loaded_dtype(weight: Parameter, asked: DType) -> DType:
    """In which a script hands a weight over, of a model that was ``asked`` for in one dtype: PEFT makes adapters
    float32, and copies modules_to_save as they are.
    """
    return dtypes.float32 if is_adapter(weight) else asked


def load(ledger: Ledger, weights: Sequence[Loaded], place: str = "host") -> list[Block]:
    """The whole model is read; then the engine casts it, weight by weight."""
    blocks = []
    for weight in weights:
        stacks = ledger.allocate("temporaries", weight.nbytes, place) if weight.merged else None
        blocks.append(ledger.allocate("weights", weight.nbytes, place))
        ledger.free(stacks)
    for i, weight in enumerate(weights):
        if weight.cast is not None:
            cast = ledger.allocate("weights", weight.cast, place)
            ledger.free(blocks[i])
            blocks[i] = cast
    return blocks


def write(ledger: Ledger, storages: Iterable[int], place: str = "host") -> None:
    """``torch.save`` copies storages that are on the GPU to pageable memory, one at a time."""
    for nbytes in storages:
        ledger.briefly("temporaries", nbytes, place)


def largest_file(sizes: Iterable[int], limit: int = MAX_SHARD_SIZE) -> int:
    """Bytes of the fullest file of ``save_pretrained``: its tensors are all on the host before it is written.

    >>> largest_file([40, 30, 30, 120], limit=100)
    120
    """
    largest = current = 0
    for nbytes in sizes:
        if nbytes > limit:  # a file of its own
            largest = max(largest, nbytes)
            continue
        current = nbytes if current + nbytes > limit else current + nbytes
        largest = max(largest, current)
    return largest

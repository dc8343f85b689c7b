"""DeepSpeed's ZeRO stage 1 in bfloat16 with gradients accumulated in float32: an optimizer of its own.

Sources: deepspeed/runtime/bf16_optimizer.py (``BF16_Optimizer``), runtime/engine.py (``_do_optimizer_sanity_check``,
``buffered_allreduce_fallback``), 0.19.8. Masters and optimizer states are in partitions; float32 gradients are whole,
beside those that autograd makes.
"""

from __future__ import annotations

from memplan.engines import checkpoint
from memplan.engines.layout import StateDict, WholeWeights, temporaries_of_step
from memplan.engines.zero import ZeroSetup, flattened, optimizer_storages
from memplan.engines.zero0 import REDUCED, buckets
from memplan.memory.course import Block, Key, Ledger
from memplan.tape.tensor import float32


class Bf16(WholeWeights):
    """One rank of ``BF16_Optimizer``; all hold the same."""

    def __init__(self, setup: ZeroSetup, ledger: Ledger) -> None:
        self.setup = setup
        self.ledger = ledger
        self._weights = {weight.key: weight for group in setup.groups for weight in group.weights}
        self._grads: dict[Key, Block] = {}
        self._has_states = False

    def initialize(self) -> None:
        """_setup_for_real_optimizer: group by group flatten, clone a partition as master, and make the gradients."""
        setup, ledger = self.setup, self.ledger
        for group, clone in flattened(setup, ledger, empties_cache=False):
            ledger.allocate("optimizer", group.partition * float32.itemsize, name="masters")
            ledger.free(clone)
            nbytes = group.elements * setup.accumulation_dtype.itemsize
            ledger.allocate("gradients", nbytes, name="accumulated (grad_accum_dtype)")

    def process_gradients(self, key: Key, gradient: Block | None) -> None:
        """Autograd's gradients stay until the step; further micro-batches find them zeroed."""
        if gradient is not None:
            self._grads[key] = gradient

    def finish_micro_batch(self) -> None:
        """update_hp_grads: each is cast and added; then the float32 ones are reduced in the dtype of the model."""
        setup, ledger = self.setup, self.ledger
        for key in self._grads:
            nbytes = self._weights[key].elements * setup.accumulation_dtype.itemsize
            ledger.briefly("temporaries", nbytes, name="gradients, cast")
        if not self._boundary:
            return
        for bucket in buckets(group.elements for group in setup.groups):
            elements = sum(bucket)
            ledger.move("all_reduce", elements * setup.communication_dtype.itemsize)
            flat = None
            if len(bucket) > 1:  # one alone is a view
                nbytes = elements * setup.accumulation_dtype.itemsize
                flat = ledger.allocate("communication", nbytes, name=REDUCED)
            if setup.communication_dtype is not setup.accumulation_dtype:
                nbytes = elements * setup.communication_dtype.itemsize
                ledger.briefly("communication", nbytes, name=REDUCED)
            ledger.free(flat)

    def step(self) -> None:
        """The partitions are stepped; then the model's gradients go."""
        for optimizer, partition in zip(self.setup.optimizers, self.setup.partitions, strict=True):
            if not self._has_states:
                for nbytes in optimizer.state_bytes(partition):
                    self.ledger.allocate("optimizer", nbytes, name="states")
            temporaries_of_step(self.ledger, optimizer)
        for group in self.setup.groups:
            self.ledger.move("all_gather", group.elements * self.setup.dtype.itemsize)
        self._has_states = True
        self.ledger.free(*self._grads.values())
        self._grads.clear()

    def save(self, state_dict: StateDict) -> None:
        """As stages 1 and 2 do."""
        setup = self.setup
        size = setup.dtype.itemsize
        self._save_model(state_dict, size)
        flat = [group.elements * size for group in setup.groups]
        checkpoint.write(self.ledger, [*setup.frozen, *flat], "main")
        checkpoint.write(self.ledger, optimizer_storages(setup.optimizers, setup.partitions))

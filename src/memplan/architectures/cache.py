"""The key-value cache of generation: transformers' DynamicCache, which grows by concatenation."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.tape import ops
from memplan.tape.tape import ACTIVATION
from memplan.tape.tensor import Tensor


class DynamicCache:
    """Keys and values of every layer [B, K, past, D]; a model with latent attention caches its two latents instead.

    ``windows`` are the layers' sliding windows, None where a layer sees everything. A sliding layer keeps its last
    window - 1 positions, as a view of all that the last call saw.
    """

    def __init__(self, windows: Sequence[int | None] = (), tuples: bool = False) -> None:
        self.windows = windows
        self.tuples = tuples
        """Before transformers 4.42 generate handed a tuple on (no ``_supports_default_dynamic_cache``), which holds all
        that was there until the call is over."""
        self._handed: list[tuple[Tensor, Tensor]] = []
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.past_length = 0
        """Positions that the calls before the present one have seen."""
        self._next = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next layer's new positions; returns what its attention looks at."""
        index = self._next
        self._next += 1
        window = self._window(index)
        keys, values = self.layers[index] if index < len(self.layers) else (None, None)
        if self.tuples and keys is not None and values is not None:
            self._handed.append((keys, values))
        if keys is None:
            self.layers.append((key, value))  # until both are copied
        full_keys = _extended(keys, key)
        if window is None:  # self.keys = torch.cat(...): the old keys go before the values are copied
            self.layers[index] = (full_keys, self.layers[index][1])
            del keys
        full_values = _extended(values, value)
        self.layers[index] = (_last(full_keys, window), _last(full_values, window))
        return full_keys, full_values

    def step(self, length: int) -> None:
        """A call with ``length`` new positions is over."""
        self.past_length += length
        self._next = 0
        self._handed.clear()

    def kv_length(self, length: int, window: int | None) -> int:
        """How many positions a layer's attention looks at in a call with ``length`` new ones (get_mask_sizes)."""
        if window is None or self.past_length < window:
            return self.past_length + length
        return window - 1 + length

    def seed(self, past_length: int) -> None:
        """Make the cache as if ``past_length`` positions had been seen one by one, from the shapes it has."""
        self.past_length = past_length
        for index, pair in enumerate(self.layers):
            window = self._window(index)
            kept = past_length if window is None else min(past_length, window)
            keys, values = (x.tape.new((*x.shape[:2], kept, x.shape[3]), x.dtype, "cache") for x in pair)
            self.layers[index] = (_last(keys, window), _last(values, window))

    def blocks(self, length: int) -> list[tuple[int, int]]:
        """Bytes of every layer's keys and values of ``length`` positions; a sliding layer's of at most its window."""
        found: list[tuple[int, int]] = []
        for index, (keys, values) in enumerate(self.layers):
            window = self._window(index)
            positions = length if window is None else min(length, window)
            found.append((keys.nbytes // keys.shape[2] * positions, values.nbytes // values.shape[2] * positions))
        return found

    def nbytes(self, length: int) -> int:
        """Bytes of the keys and values that are held once ``length`` positions have been seen.

        A sliding layer holds its last window - 1 positions, though the storage of that view has one more.
        """
        total = 0
        for index, pair in enumerate(self.layers):
            window = self._window(index)
            positions = length if window is None else min(length, window - 1)
            total += sum(x.nbytes // x.shape[2] * positions for x in pair)
        return total

    def _window(self, index: int) -> int | None:
        return self.windows[index] if index < len(self.windows) else None


def _extended(old: Tensor | None, new: Tensor) -> Tensor:
    """torch.cat along the positions: contiguous, and a copy even where there is nothing before."""
    with new.tape.tagged(ACTIVATION):
        return ops.cat((new,) if old is None else (old, new), 2)


def _last(full: Tensor, window: int | None) -> Tensor:
    if window is None or full.shape[2] < window:
        return full
    return full.narrow(2, full.shape[2] - window + 1, window - 1)

"""What is trained: a model's identity and its raw ``config.json``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from memplan.specs._base import Spec, freeze
from memplan.specs.fields import Fields

__all__ = ["ModelSpec"]


_HIDDEN_SIZE = ("n_embed", "hidden_size", "n_embd", "d_model", "dim")
"""Its names in config.json, the first that is there counts (BloomConfig; attribute_map of GPT2, T5, DistilBert)."""


class ModelSpec(Spec):
    """A model as its ``config.json`` describes it. Raises SpecError for a wrong field."""

    id: str
    """What the user called it: a hub id, a folder or a file."""
    model_type: str
    """The config's ``model_type``, as in ``llama``."""
    architecture: str
    """The model class, as in ``LlamaForCausalLM``."""
    config: Annotated[dict[str, Any], AfterValidator(freeze)]
    """The raw values of ``config.json``: a frozen copy, lists as tuples."""
    source: str
    """Where the config was found: a path, ``catalog``, the hub with its revision."""

    @property
    def fields(self) -> Fields:
        """Typed, checked reading of :attr:`config`; its errors name :attr:`id`."""
        return Fields(self.config, self.id)

    @property
    def hidden_size(self) -> int | None:
        """``config.hidden_size`` of transformers, from which the Trainer makes DeepSpeed's ``auto`` sizes."""
        found = [self.config[name] for name in _HIDDEN_SIZE if name in self.config]
        return found[0] if found and isinstance(found[0], int) else None

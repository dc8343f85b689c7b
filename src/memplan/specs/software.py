"""The versions of the libraries that a run uses: they decide rules, so they are an input."""

from __future__ import annotations

import re
from functools import lru_cache

from pydantic import ValidationInfo, field_validator

from memplan.errors import SpecError, did_you_mean
from memplan.specs._base import Spec

__all__ = ["SoftwareSpec"]

OLDEST = {"transformers": "4.30", "torch": "1.10", "deepspeed": "0.10", "cuda": "10.2"}
"""Before these too much was different: such a version is refused."""

_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})*")


class SoftwareSpec(Spec):
    """Library versions as text (``"2.13.0"``); the defaults are the ones memplan's rules were read from.

    Raises SpecError for an unknown library or a version that does not start with numbers.
    """

    transformers: str = "5.23.0"
    """Hugging Face transformers: the forward pass, the loss chain and the Trainer."""
    torch: str = "2.13.0"
    """PyTorch: autograd, the optimizers, the caching allocator, DDP and FSDP."""
    deepspeed: str = "0.19.8"
    """DeepSpeed: ZeRO and its offload."""
    accelerate: str = "1.15.0"
    """Hugging Face accelerate: autocast and the fp32 copy of the outputs, device maps."""
    peft: str = "0.21.2"
    """Hugging Face PEFT: adapters."""
    bitsandbytes: str = "0.50.2"
    """bitsandbytes: 8-bit optimizers and quantized weights."""
    liger_kernel: str = "0.8.5"
    """Liger kernels: the fused linear cross-entropy."""
    cuda: str = "13.0"
    """The CUDA that torch was built with."""
    cudnn: str = "9.19.0"
    """The cuDNN that torch loads; it decides which attention backend is preferred."""

    @field_validator("*")
    @classmethod
    def _version(cls, version: str, info: ValidationInfo) -> str:
        if _NUMBER.match(version) is None:
            raise SpecError.at("", version, "is not a version", "Write numbers with dots, as in 5.23.0.")
        oldest = OLDEST.get(info.field_name or "", "0")
        if _numbers(version) < _numbers(oldest):
            raise SpecError.at("", version, "is older than memplan's rules reach", f"Use {oldest} or later.")
        return version

    @classmethod
    def parse(cls, text: str) -> SoftwareSpec:
        """Read ``library=version`` pairs separated by commas; the others keep their defaults.

        >>> SoftwareSpec.parse("transformers=4.46, liger-kernel=0.5").transformers
        '4.46'
        """
        versions: dict[str, str] = {}
        for pair in filter(None, (part.strip() for part in text.split(","))):
            name, equals, version = (part.strip() for part in pair.partition("="))
            if not equals or not version.strip("="):
                raise SpecError.at("software", pair, "is not a pair", "Write library=version, as in torch=2.13.")
            field = name.replace("-", "_").lower()
            if field not in cls.model_fields:
                remedy = did_you_mean(field, cls.model_fields)
                raise SpecError.at("software", name, "is not a library memplan knows", remedy)
            versions[field] = version.strip("= ")
        return cls(**versions)

    def others(self) -> dict[str, tuple[str, str]]:
        """Libraries whose major or minor version is another one than memplan's rules were read from: (this, that)."""
        read_from = {name: field.default for name, field in type(self).model_fields.items()}
        versions = {name: (getattr(self, name), read_from[name]) for name in self.model_fields_set}
        return {
            name: (given, known)
            for name, (given, known) in versions.items()
            if (*_numbers(given), 0, 0)[:2] != (*_numbers(known), 0, 0)[:2]
        }

    def at_least(self, library: str, version: str) -> bool:
        """Tell whether ``library`` is at ``version`` or later, comparing the numbers in front.

        >>> SoftwareSpec(transformers="4.46.1").at_least("transformers", "4.46")
        True
        """
        if library not in type(self).model_fields:
            raise SpecError.at("library", library, "is not known", did_you_mean(library, type(self).model_fields))
        return _numbers(getattr(self, library)) >= _numbers(version)


@lru_cache(maxsize=64)
def _numbers(version: str) -> tuple[int, ...]:
    """``5.23.0.dev0`` -> (5, 23): trailing zeros say nothing, so that 5.23 equals 5.23.0."""
    match = _NUMBER.match(version)
    if match is None:
        raise SpecError.at("version", version, "is not a version", "Write numbers with dots, as in 5.23.0.")
    numbers = [int(part) for part in match.group().split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

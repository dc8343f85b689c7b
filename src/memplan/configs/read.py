"""A config of either library, from a file or as values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memplan.configs.accelerate import is_accelerate, parse_accelerate
from memplan.configs.deepspeed import parse_deepspeed
from memplan.configs.files import read_mapping
from memplan.configs.run import is_arguments
from memplan.configs.setup import EngineConfig
from memplan.errors import SpecError

__all__ = ["read_engine_config"]


def read_engine_config(config: object) -> EngineConfig:
    """Read a DeepSpeed JSON or an accelerate YAML (or JSON), given as a path or as its values.

    Raises SpecError for what cannot be read or what the library refuses, UnsupportedError for what is not modelled.
    """
    if isinstance(config, Mapping):
        if is_accelerate(config):
            return parse_accelerate(config, "engine_config")
        _refuse_arguments(config, "engine_config")
        return parse_deepspeed(config, "engine_config")
    if isinstance(config, (str, os.PathLike)):
        data, is_yaml = read_mapping(config)
        if not is_accelerate(data):
            _refuse_arguments(data, str(config))
        if is_yaml or is_accelerate(data):
            return parse_accelerate(data, str(config), Path(config).parent)
        return parse_deepspeed(data, str(config))
    remedy = "Give the path of a DeepSpeed JSON or accelerate YAML, or its values as a mapping."
    raise SpecError.at("engine_config", config, "is not a config", remedy)


def _refuse_arguments(data: Mapping[str, Any], source: str) -> None:
    """TrainingArguments say more than an engine's config: ``memplan check`` reads them."""
    if is_arguments(data):
        remedy = (
            f"Use memplan check {source if source != 'engine_config' else 'FILE'}, or give the config that they name."
        )
        raise SpecError(f"{source}: holds TrainingArguments, which are no engine's config. {remedy}")

"""The how-to page is executed: its family, registered by one line, gives an estimate."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from memplan.architectures import registry
from memplan.estimator import estimate
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-family.md"
CONFIG = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def test_the_page_adds_a_working_family(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    module = ModuleType("memplan.architectures.tiny")
    exec(compile("from __future__ import annotations\n" + code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.FAMILIES, "tiny", "tiny")
    model = ModelSpec(id="tiny", model_type="tiny", architecture="TinyForCausalLM", config=CONFIG, source="page")

    result = estimate(model, TrainingSpec(lora=None), ClusterSpec(), Strategy(), SoftwareSpec())

    width, vocab = 64, 500
    layer = width + 4 * width * width + (4 * width * width + 4 * width) + (4 * width * width + width)
    assert result.model.parameters == 2 * vocab * width + 4 * layer
    assert result.gpu.steady_allocated > 16 * result.model.parameters

import subprocess
import sys

import pytest

import memplan

HEAVY = {
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "peft",
    "numpy",
    "yaml",
    "huggingface_hub",
    "pandas",
    "matplotlib",
    "ipywidgets",
}


@pytest.mark.parametrize("name", memplan.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(memplan, name).__name__ == name
    assert name in dir(memplan)


def test_public_names_are_sorted_and_unique() -> None:
    assert list(memplan.__all__) == sorted(set(memplan.__all__))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'memplan' has no attribute 'nonsense'"):
        memplan.nonsense  # noqa: B018


def _modules_after(code: str) -> set[str]:
    code = f"import sys; {code}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light() -> None:
    assert not _modules_after("import memplan") & (HEAVY | {"pydantic"})


def test_specs_and_results_import_no_heavy_library() -> None:
    loaded = _modules_after("import memplan.results; memplan.TrainingSpec()")
    assert "pydantic" in loaded
    assert not loaded & HEAVY

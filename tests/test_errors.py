import pickle

import pytest

from memplan.errors import (
    MemplanError,
    PreflightError,
    ResolutionError,
    SpecError,
    UnsupportedError,
    did_you_mean,
    suggest_names,
)


def test_the_tree() -> None:
    assert issubclass(SpecError, MemplanError)
    assert issubclass(SpecError, ValueError)
    assert issubclass(ResolutionError, SpecError)
    assert not issubclass(UnsupportedError, SpecError)
    assert issubclass(PreflightError, MemplanError)


def test_a_message_has_field_value_problem_and_remedy() -> None:
    error = ResolutionError.at("gpu", "H1000", "is not in the catalog", "Did you mean H100?")
    assert type(error) is ResolutionError
    assert str(error) == "gpu: 'H1000' is not in the catalog. Did you mean H100?"


@pytest.mark.parametrize(
    "huge", ["x" * 10**6, list(range(10**6)), 10**10_000, {"key": "v" * 10**5}], ids=["text", "list", "int", "dict"]
)
def test_a_huge_value_is_cut(huge: object) -> None:
    assert len(str(SpecError.at("f", huge, "is refused", "Use less."))) < 130


def test_preflight_error_carries_what_it_found() -> None:
    error = PreflightError("no", report={"peak": 1}, findings=["a", "b"])
    assert error.report == {"peak": 1}
    assert error.findings == ("a", "b")
    assert str(pickle.loads(pickle.dumps(error))) == "no"


def test_suggestions_are_nearest_first_and_ignore_case() -> None:
    names = ["adamw_torch", "adamw_torch_fused", "sgd"]
    assert suggest_names("ADAMW_TORCH_FUSE", names)[0] == "adamw_torch_fused"
    assert suggest_names("llama", ["LLaMA"]) == ["LLaMA"]
    assert suggest_names("qqqq", names) == []


def test_without_a_near_name_all_are_listed_up_to_a_limit() -> None:
    assert did_you_mean("qqqq", ["b", "a"]) == "Known: a, b."
    many = [f"name{index:03d}" for index in range(100)]
    assert did_you_mean("qqqq", many).endswith("name011 and 88 more.")

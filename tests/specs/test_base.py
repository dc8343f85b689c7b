import copy
import json
import pickle

import numpy as np
import pytest

from memplan.errors import SpecError
from memplan.specs import ClusterSpec, LoraSpec, ModelSpec, SoftwareSpec, Strategy, TrainingSpec
from memplan.specs._base import FrozenDict, freeze

SPECS = [
    TrainingSpec(lora={"rank": 8, "targets": ["q_proj"]}, quantization="nf4", eval_batch_size=4),
    ClusterSpec(gpu="T4", gpus=4, nodes=2, gpu_memory="15GiB"),
    Strategy(kind="zero3", offload_optimizer="nvme", zero={"reduce_bucket_size": "auto"}),
    SoftwareSpec(transformers="4.46"),
    ModelSpec(id="a/b", model_type="llama", architecture="L", config={"x": [1, {"y": None}]}, source="catalog"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_round_trip(spec) -> None:
    assert type(spec).from_json(spec.to_json()) == spec
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert hash(spec.replace()) == hash(spec)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_specs_are_frozen(spec) -> None:
    field = next(iter(type(spec).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(spec, field, None)


def test_all_wrong_fields_are_named_at_once_with_their_paths() -> None:
    with pytest.raises(SpecError) as error:
        TrainingSpec(micro_batch_size=0, attn="flash", optin="sgd", lora={"rank": True, "targets": "a,,b"})
    assert str(error.value).splitlines() == [
        "micro_batch_size: 0 is not a positive integer. Use an integer from 1 to 1099511627776.",
        "attn: 'flash' is not a choice. Use 'eager', 'sdpa' or 'flash_attention_2'.",
        "lora.rank: true is not a positive integer. Use an integer from 1 to 1099511627776.",
        "lora.targets: 'a,,b' has an empty name. Write names separated by commas.",
        "optin: 'sgd' is given to a field that TrainingSpec does not have. Did you mean optim?",
    ]


def test_a_missing_field_is_named() -> None:
    with pytest.raises(SpecError, match=r"^rank: missing\. LoraSpec needs a value for it\.$"):
        LoraSpec()


@pytest.mark.parametrize(
    "bad", [0, -1, True, 1.0, float("nan"), 1e30, 2**40 + 1, pytest.param(10**5000, id="huge"), "8", None, [1]]
)
def test_a_positive_integer_is_an_integer_in_range(bad) -> None:
    with pytest.raises(SpecError, match=r"^seq_len: .* is not a positive integer\. Use an integer from 1"):
        TrainingSpec(seq_len=bad)


def test_an_integer_of_numpy_will_do() -> None:
    assert TrainingSpec(seq_len=np.int64(128)).seq_len == 128


def test_from_json_names_what_is_not_an_object() -> None:
    with pytest.raises(SpecError, match=r"^TrainingSpec: '\{' is not JSON"):
        TrainingSpec.from_json("{")
    with pytest.raises(SpecError, match=r"^TrainingSpec: \[1\] is not a JSON object"):
        TrainingSpec.from_json("[1]")


def test_replace_validates() -> None:
    assert TrainingSpec(seq_len=8).replace(optim="sgd") == TrainingSpec(seq_len=8, optim="sgd")
    with pytest.raises(SpecError, match="seq_len"):
        TrainingSpec().replace(seq_len=0)


def test_freeze_copies_and_refuses_changes() -> None:
    data = {"a": [1, {"b": 2}]}
    frozen = freeze(data)
    data["a"].append(3)  # type: ignore[attr-defined]
    assert frozen == {"a": (1, {"b": 2})}
    for change in (
        lambda: frozen.update(c=1),
        lambda: frozen.pop("a"),
        lambda: frozen.__setitem__("a", 1),
        lambda: frozen["a"][1].clear(),
    ):
        with pytest.raises(TypeError, match="frozen"):
            change()
    assert hash(frozen) == hash(freeze({"a": [1, {"b": 2}]}))
    assert isinstance(frozen["a"][1], FrozenDict)

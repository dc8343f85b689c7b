import pytest

from memplan.errors import MemplanError, SpecError, UnsupportedError
from memplan.specs import LoraSpec, QuantizationSpec, TrainingSpec
from memplan.specs.training import KNOWN_OPTIMIZERS, OPTIMIZERS, PEFT_TYPES, UNMODELLED_OPTIMIZERS, AllocatorSpec


def test_every_optimizer_of_transformers_is_modelled_or_refused_by_name() -> None:
    from transformers.training_args import OptimizerNames

    assert {name.value for name in OptimizerNames} <= KNOWN_OPTIMIZERS
    assert not UNMODELLED_OPTIMIZERS & set(OPTIMIZERS)


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_modelled_optimizers_are_taken(optim: str) -> None:
    assert TrainingSpec(optim=optim).optim == optim


@pytest.mark.parametrize("optim", sorted(UNMODELLED_OPTIMIZERS))
def test_other_optimizers_of_transformers_are_unsupported(optim: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^optim: '{optim}' is known to transformers"):
        TrainingSpec(optim=optim)


def test_an_unknown_optimizer_gets_the_nearest_names() -> None:
    with pytest.raises(SpecError, match=r"^optim: 'adamw_tocrh' is not an optimizer .* Did you mean adamw_torch"):
        TrainingSpec(optim="adamw_tocrh")
    with pytest.raises(SpecError, match=r"^optim: 3 is not an optimizer"):
        TrainingSpec(optim=3)


def test_short_forms() -> None:
    assert TrainingSpec(lora=16).lora == LoraSpec(rank=16)
    assert TrainingSpec(lora={"rank": 4, "targets": "q_proj, v_proj"}).lora.targets == ("q_proj", "v_proj")
    assert TrainingSpec(lora=16, quantization="nf4").quantization == QuantizationSpec(kind="nf4")
    assert TrainingSpec(quantization="none").quantization is None
    assert TrainingSpec(quantization=QuantizationSpec(kind="none")).quantization is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": "int8"}, r"^quantization: 'int8' has no trainable weights\. Give --lora-rank"),
        ({"max_new_tokens": 8}, r"^max_new_tokens: 8 has no use in task train\. Use --task generate"),
        ({"device_map": "auto"}, r"^device_map: 'auto' spreads one copy"),
        ({"lora": 0}, r"^lora\.rank: 0 is not a positive integer"),
        ({"lora": {"rank": 8, "dropout": 1.0}}, r"^lora\.dropout: 1\.0 is not a probability"),
        ({"lora": {"rank": 8, "dropout": float("nan")}}, r"^lora\.dropout: nan is not a probability"),
        ({"lora": "8"}, r"^lora: '8' is refused"),
        ({"quantization": "nf5", "lora": 8}, r"^quantization\.kind: 'nf5' is not a choice\. Use 'none', 'int8'"),
        ({"dtype": "int8"}, r"^dtype: 'int8' is not a choice"),
        ({"mixed_precision": "fp8"}, r"^mixed_precision: 'fp8' is not a choice"),
    ],
)
def test_wrong_fields_and_combinations(fields, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TrainingSpec(**fields)


def test_loading_takes_quantized_models_and_device_maps() -> None:
    training = TrainingSpec(task="load", quantization="int8", device_map="auto")
    assert training.quantization == QuantizationSpec(kind="int8")
    assert TrainingSpec(task="generate", max_new_tokens=8).max_new_tokens == 8


def test_the_allocators_settings_are_read_as_torch_reads_them() -> None:
    conf = TrainingSpec(alloc_conf="expandable_segments:True, roundup_power2_divisions:8,backend:native").alloc_conf
    assert conf == AllocatorSpec(expandable_segments=True, roundup_power2_divisions=8)
    assert TrainingSpec(alloc_conf="pinned_use_background_threads:True").alloc_conf == AllocatorSpec()
    assert TrainingSpec().alloc_conf is None


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ("expandable_segments", "is not what PYTORCH_ALLOC_CONF takes"),
        ("expandable_segments:perhaps", "is not a number, True or False"),
        ("expandable_segment:True", "Did you mean expandable_segments"),
        ("foo:1", "^alloc_conf: 'foo' is not a setting of PYTORCH_ALLOC_CONF. Known: "),
        ("max_split_size_mb:20", "is refused by torch. Use 21 or more"),
        ("roundup_power2_divisions:3", "is not a power of 2"),
        ("large_segment_size_mb:4", "is too small"),
        ("garbage_collection_threshold:0.8", "is not modelled"),
        ("backend:cudaMallocAsync", "is not modelled"),
    ],
)
def test_wrong_settings_of_the_allocator(conf: str, message: str) -> None:
    with pytest.raises(MemplanError, match=message):
        TrainingSpec(alloc_conf=conf)


def test_every_method_of_peft_is_modelled_or_refused_by_name() -> None:
    from peft import PeftType

    assert {kind.value.lower() for kind in PeftType} == PEFT_TYPES | {"lora"}
    for kind in PEFT_TYPES:
        with pytest.raises(UnsupportedError, match=f"peft_type: '{kind}' is not modelled"):
            TrainingSpec(peft_type=kind)
    with pytest.raises(SpecError, match="Did you mean prompt_tuning"):
        TrainingSpec(peft_type="prompt_tunning")
    with pytest.raises(SpecError, match="needs a rank"):
        TrainingSpec(peft_type="lora")


def test_predictions_are_kept_in_evaluation_only() -> None:
    with pytest.raises(SpecError, match="eval_accumulation_steps: 4 has no evaluation"):
        TrainingSpec(eval_accumulation_steps=4)
    with pytest.raises(SpecError, match="eval_accumulation_steps: 65537 is more batches than any memory holds"):
        TrainingSpec(eval_batch_size=1, eval_accumulation_steps=65537)

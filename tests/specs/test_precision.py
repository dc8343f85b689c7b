import pytest

from memplan.constants import exact
from memplan.errors import SpecError
from memplan.specs import GPUSpec, Strategy, TrainingSpec
from memplan.specs.precision import Precision, resolve_precision


def gpu(bf16: bool) -> GPUSpec:
    return GPUSpec(
        name="g", vendor="nvidia", memory=exact("m", 2**34, "B", "s"), compute_capability=(8, 0) if bf16 else (7, 5),
        sm_count=40, max_threads_per_sm=1024, bandwidth_gb_per_s=320, bf16_tflops=None, fp16_tflops=65,
        fp32_tflops=8, supports_bf16=bf16, link="pcie", link_gb_per_s=16, pcie_generation=3, source="s",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "bf16", "dtype", "mixed", "expected"),
    [
        ("single", True, None, None, ("float32", "bf16")),
        ("ddp", False, None, None, ("float32", "fp16")),
        ("fsdp", True, None, None, ("float32", "bf16")),
        ("zero2", True, None, None, ("bfloat16", "bf16")),
        ("zero3", False, None, None, ("float16", "fp16")),
        ("zero3", True, None, "no", ("float32", "no")),
        ("zero3", True, "float16", "fp16", ("float16", "fp16")),
        ("single", True, "bfloat16", "no", ("bfloat16", "no")),
        ("single", True, "auto", None, ("float16", "bf16")),
    ],
)
def test_defaults(kind, bf16, dtype, mixed, expected) -> None:
    training = TrainingSpec(dtype=dtype, mixed_precision=mixed)
    assert resolve_precision(training, Strategy(kind=kind), gpu(bf16), "float16") == Precision(*expected)


def test_without_a_gpu_bf16_is_the_default() -> None:
    assert resolve_precision(TrainingSpec(), Strategy(), None, None) == Precision("float32", "bf16")


def test_auto_needs_a_checkpoint_dtype() -> None:
    with pytest.raises(SpecError, match=r"^dtype: 'auto' is unknown"):
        resolve_precision(TrainingSpec(dtype="auto"), Strategy(), None, None)


def test_fsdp_makes_float32_of_float16_weights_that_are_trained() -> None:
    """accelerate's ``prepare_model`` and ``fsdp2_prepare_model``, wherever mixed precision is on."""
    training = TrainingSpec(dtype="float16", mixed_precision="fp16")
    assert resolve_precision(training, Strategy(kind="fsdp"), None, None) == Precision("float16", "fp16")


@pytest.mark.parametrize("kind", ["single", "ddp"])
def test_float16_weights_under_fp16_are_refused(kind) -> None:
    with pytest.raises(SpecError, match=r"^dtype: 'float16' cannot be trained under mixed precision fp16"):
        resolve_precision(TrainingSpec(dtype="float16", mixed_precision="fp16"), Strategy(kind=kind), None, None)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"lora": 8}, False),
        ({"lora": {"rank": 8, "autocast_adapter_dtype": False}}, True),
        ({"lora": {"rank": 8, "modules_to_save": ["lm_head"]}}, True),
        ({"lora": {"rank": 8, "modules_to_save": ["lm_head"]}, "quantization": "nf4"}, False),
        ({"task": "load"}, False),
    ],
)
def test_float16_weights_that_are_not_trained_are_not_refused(options, refused) -> None:
    training = TrainingSpec(dtype="float16", mixed_precision="fp16", **options)
    if refused:
        with pytest.raises(SpecError, match=r"^dtype: 'float16' cannot be trained"):
            resolve_precision(training, Strategy(), None, None)
    else:
        assert resolve_precision(training, Strategy(), None, None) == Precision("float16", "fp16")

"""FLOPs of the tape beside torch.utils.flop_counter over the real transformers models: forward, backward, recomputed.

The models run on fake CPU tensors, but for ViT's, which looks at values. CPU's attention kernel is not in torch's
registry, so the formulas of its CUDA kernels are registered for it: they are the same kernel's arithmetic.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import transformers
from tests.oracles.families import CONFIGS, EAGER_ONLY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from memplan import micro_batch
from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.estimator import resolve
from memplan.specs.hardware import ClusterSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

FAMILIES = (
    "llama", "mistral", "qwen3", "gpt2", "gpt_neox", "gptj", "opt", "phi3", "bloom", "falcon", "gemma2", "cohere",
    "bert", "deberta-v2", "t5", "vit", "gpt_bigcode", "mixtral", "olmoe",
)  # fmt: skip
CHECKPOINTED = ("llama", "gpt2", "gemma2", "bert", "t5", "mixtral")
CASES = [
    (family, attn, checkpointed)
    for family in FAMILIES
    for attn in ("eager", "sdpa")
    for checkpointed in (False, True)
    if (attn == "eager" or family not in EAGER_ONLY) and (not checkpointed or family in CHECKPOINTED)
]
BATCH, LENGTH = 2, 48
ATEN = torch.ops.aten
MISSING = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
    ATEN._grouped_mm: lambda a, b, *_, **__: grouped_mm_flop_count(a, b),
}
"""Kernels that torch's registry lacks."""


def grouped_mm_flop_count(a: torch.Size, b: torch.Size) -> int:
    """Of rows that are sorted by group [S, K] with [E, K, N], or of [M, S] with [S, N], whose groups part S."""
    return 2 * a[0] * a[1] * b[-1]


def config_of(family: str) -> dict[str, Any]:
    return {**next(iter(CONFIGS[family].values()))}


def dtype_of(values: dict[str, Any]) -> str:
    """Fake tensors of _grouped_mm are to be in bfloat16."""
    return "bfloat16" if values["model_type"] in ("mixtral", "olmoe") else "float32"


def counted(values: dict[str, Any], attn: str, checkpointed: bool) -> tuple[int, int]:
    """Forward's FLOPs, and backward's with what is recomputed."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), contextlib.nullcontext() if values["model_type"] == "vit" else fake:
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(**values)
        config.problem_type = "single_label_classification"
        kind, dtype = getattr(transformers, values["architectures"][0]), getattr(torch, dtype_of(values))
        model = kind._from_config(config, attn_implementation=attn, dtype=dtype)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if values["model_type"] == "vit":
            shape = (BATCH, config.num_channels, config.image_size, config.image_size)
            inputs = {"pixel_values": torch.zeros(shape, dtype=dtype), "labels": torch.zeros(BATCH, dtype=torch.long)}
        else:
            tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
            one_each = "SequenceClassification" in values["architectures"][0]
            inputs = {"input_ids": tokens, "labels": tokens[:, 0] if one_each else tokens}
        with FlopCounterMode(display=False, custom_mapping=MISSING) as forward:
            loss = model(**inputs).loss
        with FlopCounterMode(display=False, custom_mapping=MISSING) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def of_the_tape(values: dict[str, Any], attn: str, checkpointed: bool) -> tuple[int, int]:
    training = TrainingSpec(
        micro_batch_size=BATCH,
        seq_len=LENGTH,
        attn=attn,
        gradient_checkpointing=checkpointed,
        dtype=dtype_of(values),
        mixed_precision="no",
    )
    cluster = ClusterSpec(gpu=find_gpu("cpu"))
    setup = resolve(model_spec(values), training, cluster, Strategy(), SoftwareSpec())
    profile = micro_batch.micro_batch(setup, full_depth=False, accumulated=False).unrolled.profile()
    return profile.forward_flops, profile.backward_flops


@pytest.mark.parametrize(("family", "attn", "checkpointed"), CASES)
def test_the_tape_counts_what_torch_counts(family: str, attn: str, checkpointed: bool) -> None:
    values = config_of(family)
    assert of_the_tape(values, attn, checkpointed) == counted(values, attn, checkpointed)

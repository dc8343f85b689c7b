"""What rows of memory.csv have taught memplan: those that a rule was found on, or that share a constant's source.

Of these rows the error says whether the rule is met, not whether memplan would have known it without them. Where only
some of a setup's rows were looked at, all that the rule decides are named. A figure of torch's and one of nvidia-smi
of one run are two rows.
"""

from __future__ import annotations


def _run(*numbers: int) -> tuple[str, ...]:
    """Both rows of runs of fms-acceleration."""
    return tuple(f"fms-a-{number:03}{metric}" for number in numbers for metric in ("", "-nv"))


def _device(*numbers: int) -> tuple[str, ...]:
    return tuple(f"fms-a-{number:03}-nv" for number in numbers)


def _both(source: str, *runs: str) -> tuple[str, ...]:
    """What torch had allocated and reserved in runs of can-i-finetune-this and optimum-benchmark."""
    return tuple(f"{source}-{run}{metric}" for run in runs for metric in ("a", "r"))


TAUGHT: dict[str, tuple[str, ...]] = {
    "gpt_bigcode's key-value cache under checkpointing, before transformers 4.53 "
    "(`architectures/gpt_bigcode.py`)": _run(
        1, 2, 3, 4, 69, 70, 71, 72
    ),
    "what frozen blocks hold under FSDP 1 and reentrant checkpointing (`engines/fsdp1.py`)": _run(
        58, 60, 62, 64, 66, 70, 72, 78, 80, 86, 88, 94
    ),
    "FSDP's streams, each with a cache of its own, and foreach's temporaries one by one "
    "(`engines/streams.py`)": _device(
        2, 4, 10, 12, 58, 60, 62, 64, 66, 70, 72, 78, 80, 86, 88, 94
    ),
    "the upper end, no more, of what runs with the flash-attn package take beside the context "
    "(`memory/runtime.py`)": _device(
        1, 3, 9, 33, 35, 57, 59, 69, 71, 77, 79, 93
    ),
    "the two caches of a step of generation, before transformers 4.42 (`architectures/cache.py`)": (
        "qwen1-inf-00", "qwen1-inf-03", "qwen1-inf-06",
    ),
    "logits that a loop of one's own keeps (`keeps_outputs`, `micro_batch.py`)": _both(
        "cif", "05l-1024-", "05q-1024-", "05q-2048-", "15q-512-", "15q-1024-", "15q-1024n-", "15q-1024b2-", "15q-2048-",
        "15q-4096-", "3q-1024-", "7q-1024-",
    ),
    "embeddings and heads that TRL casts back after prepare_model_for_kbit_training (`adapters/quantization.py`)": (
        *_run(57, 59), "psc-03", "psc-04", "psc-05",
    ),
    "no BLAS workspace of torch's on ROCm before 2.6 (`memory/runtime.py`)": _both("opb", "01"),
    "16-bit adapters beside 16-bit weights under FSDP, which was refused (`estimator.py`)": (
        *(f"fsq-{number:02}" for number in range(1, 26)), "fsq-03a", "fsq-04a",
    ),
    "gradients that zero_grad keeps before torch 2.0, softmax's input before 1.11, a mask of ones before transformers "
    "4.57; and the context of 1343 MiB is stated on the page that these rows are of (`memory/runtime.py`)": tuple(
        f"hf-bert-{number:02}" for number in range(9)
    ),
}  # fmt: skip
"""Rule or constant -> ids."""

IDS = frozenset(id for ids in TAUGHT.values() for id in ids)

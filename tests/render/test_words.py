import pytest
from tests.render.samples import estimate, several

from memplan import planning
from memplan.render import words
from memplan.results import HostMemory, NvmeMemory, StepTime
from memplan.units import GiB


def test_numbers() -> None:
    assert words.gib(1536 * GiB) == "1,536.00"
    assert words.interval(GiB, GiB + 1) == "1.00"
    assert [words.count(number) for number in (0, 999, 1000, 15_517_456_384, 405_853_388_800, 1_500_000_000_000)] == [
        "0", "999", "1.00 K", "15.5 B", "406 B", "1.50 T",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (80, "fits: 15.50 GiB to spare at the upper end"),
        (63, "tight: the upper end is 1.50 GiB more than there is"),
        (40, "does not fit: even the lower end is 22.50 GiB more than there is"),
        (None, "unknown: the capacity is not known"),
    ],
)
def test_the_verdict_has_its_numbers(capacity: int | None, expected: str) -> None:
    # 63.50 GiB + 1 MiB on the device, give or take 1 GiB
    assert words.verdict(estimate(capacity=capacity and capacity * GiB)) == expected


def test_the_verdict_names_the_place_that_decides() -> None:
    host = HostMemory(capacity=10 * GiB, peak=12 * GiB, pinned=0, ranks=2, components={"optimizer": 12 * GiB})
    nvme = NvmeMemory(capacity=GiB, bytes=3 * GiB, components={"optimizer": 3 * GiB})
    assert words.verdict(estimate(host=host)) == "does not fit: host memory, 2.00 GiB more than there is"
    assert words.verdict(estimate(nvme=nvme)).startswith("does not fit: NVMe, 2.00 GiB more")


def test_next_steps() -> None:
    too_large, unknown = estimate(capacity=GiB), estimate(capacity=None, gpu=None)
    assert words.next_steps(estimate(), ["H200"], ["--liger"]) == ""
    assert words.next_steps(too_large, ["H200", "B200"], ["--liger", "--lora-rank 16"]) == (
        "add --liger, or add --lora-rank 16, or use H200 or B200"
    )
    assert words.next_steps(too_large) == "it needs a GPU of 64.50 GiB"
    assert words.next_steps(unknown, ["A", "B", "C"]) == "name yours with --gpu; it fits on A, B or C"
    assert words.next_steps(unknown) == "name a GPU with --gpu"
    assert words.next_steps(estimate(capacity=None, gpu="cpu")) == "give its size with --gpu-memory"


def test_what_is_trained() -> None:
    whole = estimate()
    adapters = estimate(model=whole.model.model_copy(update={"trainable_parameters": 4_194_304}))
    loaded = estimate(setup={"task": "load"})
    assert words.model_facts(whole) == "LlamaForCausalLM, 6.74 B parameters, all trained"
    assert words.model_facts(adapters) == "LlamaForCausalLM, 6.74 B parameters, 4.19 M trained"
    assert words.model_facts(loaded) == "LlamaForCausalLM, 6.74 B parameters"


def test_the_place_that_decides_is_named_with_what_it_needs() -> None:
    def host(capacity: int | None) -> HostMemory:
        return HostMemory(capacity=capacity, peak=8 * GiB, pinned=0, ranks=2, components={"optimizer": 8 * GiB})

    full, unknown = estimate(host=host(GiB)), estimate(host=host(None))
    assert words.verdict(full) == "does not fit: host memory, 7.00 GiB more than there is"
    assert words.next_steps(full) == "give each node 8.00 GiB of host memory"
    assert words.next_steps(full, ["H200"], ["--lora-rank 8"], of="ddp") == (
        "add --lora-rank 8, or give each node 8.00 GiB of host memory, or use H200 for ddp"
    )
    assert words.next_steps(full, ["H200"]) == words.next_steps(full)  # a GPU does not help it
    assert words.verdict(unknown) == "unknown: host memory, the capacity is not known"
    assert words.next_steps(unknown) == "give its size with --host-memory"
    nvme = NvmeMemory(capacity=GiB, bytes=2 * GiB, components={"weights": 2 * GiB})
    assert words.next_steps(estimate(nvme=nvme)) == "give each node 2.00 GiB of NVMe"


@pytest.mark.parametrize(
    ("setup", "facts", "precision"),
    [
        ({}, "ddp, 4 x 2048 tokens", "float32 + bf16 autocast, sdpa, adamw_torch_fused"),
        (
            {"grad_accum_steps": 8, "gradient_checkpointing": True, "lora": {"rank": 16}, "quantization": "nf4"},
            "ddp, 4 x 2048 tokens x 8 micro-batches, checkpointing, LoRA rank 16",
            "float32 + bf16 autocast, nf4, sdpa, adamw_torch_fused",
        ),
        (
            {"strategy": "zero3", "offload_param": "nvme", "offload_optimizer": "cpu", "mixed_precision": "no"},
            "zero3, optim on cpu, param on nvme, 4 x 2048 tokens",
            "float32, sdpa, adamw_torch_fused",
        ),
        (
            {"task": "load", "device_map": "auto", "dtype": "float16", "quantization": {"kind": "int8"}},
            "load, device_map auto",
            "float16, int8, sdpa",
        ),
        ({"task": "generate", "max_new_tokens": 64}, "generate, 4 x 2048 tokens, 64 new tokens", "float32, sdpa"),
        ({"liger": True}, "ddp, 4 x 2048 tokens", "float32 + bf16 autocast, sdpa, adamw_torch_fused, Liger"),
    ],
)
def test_the_setup_in_words(setup: dict, facts: str, precision: str) -> None:
    result = estimate(setup=setup)
    assert words.setup_facts(result) == facts
    assert words.precision_facts(result) == precision


def test_an_option_is_found_under_its_own_name_or_in_its_spec() -> None:
    assert words.option(estimate(setup={"lora_rank": 8}), "lora_rank") == 8
    assert words.option(estimate(setup={"lora": {"rank": 4}}), "lora_rank") == 4
    assert words.option(estimate(), "lora_rank") is None


def test_hardware() -> None:
    assert words.hardware(estimate()) == "2 x A100-80GB, 80.00 GiB each"
    one = estimate(cluster={"gpu": None, "gpus": 1, "nodes": 1}, capacity=None)
    assert words.hardware(one) == "1 x GPU of unknown size"
    assert words.hardware(estimate(cluster={"gpu": "T4", "gpus": 16, "nodes": 2})).startswith("16 x T4 on 2 nodes")


def test_the_rungs_differ_and_the_best_is_the_first_of_its_verdict() -> None:
    assert words.rungs(several().estimates) == [
        "ddp, batch 4",
        "ddp, batch 1 x 4",
        "ddp, batch 4, checkpointing",
    ]
    assert several().best == several().estimates[1]


def test_extras_of_other_tasks() -> None:
    result = estimate(
        step=StepTime(seconds=1.25, tokens_per_second=6553.6, flops=1e15, bound_by="compute"),
        footprint=GiB,
        kv_cache=2 * GiB,
        device_map={"embed": 0, "layers.0": 0, "layers.1": "cpu"},
    )
    assert words.extras(result) == [
        ("step", "1.25 s, 6,554 tokens/s, bound by compute"),
        ("footprint", "1.00 GiB, as get_memory_footprint() counts"),
        ("kv cache", "2.00 GiB at the end"),
        ("device map", "GPU 0: 2 modules, cpu: 1 module"),
    ]
    assert words.extras(estimate()) == []


def test_assumptions_show_bytes_as_gib_and_other_units_as_they_are() -> None:
    context, tokens = estimate().assumptions
    assert words.assumed(context)[0] == "0.50 GiB (0.25 .. 1.00)"
    assert words.assumed(tokens) == ("12 (8 .. 20)", "a paper")


def test_images_have_a_speed_of_their_own() -> None:
    training = {"micro_batch_size": 8, "grad_accum_steps": 2, "seq_len": 2048}
    best = planning.plan("google/vit-base-patch16-224", training, "2xA100-80GB").best
    assert best is not None
    assert best.estimate.step is not None
    shown = dict(words.extras(best.estimate))["step"]
    assert f"{32 / best.estimate.step.seconds:,.3g} images/s" in shown
    assert "tokens" not in shown

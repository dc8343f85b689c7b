"""Questions with one value for an answer: it fits, and the next does not, whatever rung and sizes one takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_api import LLAMA, TINY
from tests.test_planner import MEDIUM, Answers, asked, by_batch, by_engine

from memplan import api, planning, space
from memplan.answers import Plan
from memplan.catalog.gpus import all_gpus, find_gpu
from memplan.configs import launch
from memplan.errors import SpecError
from memplan.planner import Setup
from memplan.solving import Scale, solve
from memplan.space import changed, levels
from memplan.specs import ClusterSpec, Strategy, TrainingSpec


def fits(model: Any, setup: Setup, cluster: ClusterSpec) -> bool:
    """For certain; what the libraries refuse, as an offloaded Adafactor, does not."""
    try:
        found = api.estimate(model, setup.training, cluster, launch.as_written(setup.strategy))
    except SpecError:
        return False
    return found.verdict == "fits"


def fits_on_a_rung(
    model: Any, training: dict[str, Any], cluster: ClusterSpec, target: Any = "deepspeed", **value: int
) -> bool:
    strategy = Strategy(kind="ddp" if cluster.gpus > 1 else "single")
    rungs = space.families(Setup(TrainingSpec(**training), strategy, cluster.gpus), target)
    setups = [changed(rung.setup, **value) for rung in rungs if rung.told == "always"]
    return any(fits(model, sized, cluster) for setup in setups for sized in levels(setup))


GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 320,
    "n_layer": 3,
    "n_head": 5,
    "n_positions": 900,
    "vocab_size": 9001,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 700,
    "vocab_size": 5000,
    "max_position_embeddings": 512,
}
UNSEEN: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (MEDIUM, {}, {"gpu": "T4", "gpu_memory": "1900MiB", "host_memory": "4GiB"}, "deepspeed"),
    (MEDIUM, {}, {"gpu": "RTX3090", "gpus": 3, "gpu_memory": "2600MiB", "host_memory": "8GiB"}, "fsdp"),
    (GPT2, {"optim": "adafactor"}, {"gpu": "V100-16GB", "gpus": 2, "gpu_memory": "2500MiB"}, "deepspeed"),
    (BERT, {"packed": False}, {"gpu": "A10G", "gpu_memory": "1200MiB", "host_memory": "2GiB"}, "deepspeed"),
    (MEDIUM | {"tie_word_embeddings": True}, {"lora": 4}, {"gpu": "L4", "gpu_memory": "1100MiB"}, "deepspeed"),
]


@pytest.mark.parametrize(("model", "training", "hardware", "target"), UNSEEN)
@pytest.mark.parametrize("question", ["seq-len", "micro-batch"])
def test_the_value_fits_and_the_next_does_not(
    model: Any, training: dict[str, Any], hardware: dict[str, Any], target: Any, question: Any
) -> None:
    cluster = ClusterSpec(**hardware)
    name = {"seq-len": "seq_len", "micro-batch": "micro_batch_size"}[question]
    if question == "micro-batch":
        training = training | {"seq_len": 384}
    found = planning.plan(model, training, cluster, target=target, solve=question)
    assert found.best is not None
    assert found.solved is not None
    setup, value = found.best.estimate.setup, found.solved.value
    assert (found.best.estimate.verdict, setup[name]) == ("fits", value)
    assert max(rung.estimate.setup[name] for rung in found.rungs if rung.estimate.verdict == "fits") == value
    assert fits_on_a_rung(model, training, cluster, target, **{name: value})
    if found.solved.next is not None:
        assert found.solved.limit == ""
        assert found.solved.next == (value + 1 if question == "micro-batch" else min(value // 64 * 64 + 64, 10**6))
        assert not fits_on_a_rung(model, training, cluster, target, **{name: found.solved.next})
    assert Plan.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["solved"]["value"] == value


def test_a_question_has_both_ends_of_its_answers() -> None:
    """Of the setups above some end at a limit and some before it."""
    bert = planning.plan(BERT, {}, ClusterSpec(gpu="A10G", host_memory="16GiB"), solve="seq-len")
    assert bert.solved is not None
    assert (bert.solved.value, bert.solved.next) == (512, None)
    assert bert.solved.limit == "the model's max_position_embeddings"
    none = planning.plan(MEDIUM, {}, ClusterSpec(gpu="T4", gpu_memory="300MiB", host_memory="4GiB"), solve="seq-len")
    assert none.solved is not None
    assert (none.solved.value, none.solved.next, none.best) == (None, 64, None)


@given(st.integers(0, 150), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_a_boundary_is_one(capacity: int, count: int, seed: int) -> None:
    """Memory that grows by steps of any size, and by engine."""
    steps = [((seed >> (place % 19)) * 7919 + place * seed) % 13 for place in range(count)]
    values = range(1, count + 1)

    def needs(setup: Setup) -> int:
        return by_batch(changed(setup, micro_batch_size=1)) // 2 + sum(steps[: setup.training.seq_len])

    scale = Scale(values, lambda setup, value: changed(setup, seq_len=value), "the end")
    start = scale.apply(asked(), 1)
    answers = Answers(capacity, needs, by_engine)
    found, value = solve(start, scale, answers, answers.seconds)

    def any_fits(value: int) -> bool:
        rungs = [each.setup for each in space.families(start, "deepspeed") if each.told == "always"]
        return any(needs(scale.apply(setup, value)) <= capacity for setup in rungs)

    if value is None:
        assert found.best is None
        assert not any_fits(1)
    else:
        assert found.best is not None
        assert any_fits(value)
        assert value == count or not any_fits(value + 1)


def test_a_micro_batch_of_a_global_batch_divides_it() -> None:
    cluster = ClusterSpec(gpu="T4", gpu_memory="2GiB", host_memory="4GiB")
    found = planning.plan(MEDIUM, {"seq_len": 256}, cluster, global_batch_size=60, solve="micro-batch")
    assert found.solved is not None
    assert found.best is not None
    assert 60 % int(found.solved.value or 0) == 0
    setup = found.best.estimate.setup
    assert setup["micro_batch_size"] * setup["grad_accum_steps"] == 60
    assert found.solved.next in (12, 15, 20, 30)


def test_the_fewest_gpus_are_enough_and_one_less_is_not() -> None:
    training = {"seq_len": 512}
    cluster = ClusterSpec(gpu="T4", gpu_memory="1700MiB")
    model = MEDIUM | {"num_hidden_layers": 3, "hidden_size": 1536, "num_attention_heads": 12}
    found = planning.plan(model, training, cluster, solve="gpus")
    assert found.solved is not None
    assert found.best is not None
    gpus = found.solved.value
    assert isinstance(gpus, int)
    assert (found.best.estimate.setup["gpus"], found.solved.next) == (gpus, gpus - 1)
    assert gpus > 2
    assert planning.plan(model, training, cluster.replace(gpus=gpus)).verdict == "fits"
    assert planning.plan(model, training, cluster.replace(gpus=gpus - 1), advise=False).verdict != "fits"
    # As an objective of GPUs that are there the batch of all stays, in as many shares as there are ranks.
    of_eight = planning.plan(model, training, cluster.replace(gpus=8), global_batch_size=16, objective="gpus")
    assert of_eight.best is not None
    assert of_eight.solved is not None
    setup, fewest = of_eight.best.estimate.setup, of_eight.solved.value
    assert fewest in (4, 8)
    assert (setup["gpus"], of_eight.solved.next) == (fewest, int(fewest) // 2)
    assert setup["micro_batch_size"] * setup["grad_accum_steps"] * setup["gpus"] == 16
    fewer = cluster.replace(gpus=int(fewest) // 2)
    assert planning.plan(model, training, fewer, global_batch_size=16, advise=False).verdict != "fits"


def test_where_a_nodes_host_is_too_small_more_nodes_are_tried() -> None:
    """Two GPUs offload to two hosts what one host does not hold."""
    cluster = ClusterSpec(gpu="RTX4090", host_memory="100GiB")
    found = planning.plan(LLAMA, {"seq_len": 2048}, cluster, solve="gpus")
    assert found.best is not None
    assert found.solved is not None
    assert (found.solved.value, found.solved.next, found.best.estimate.setup["nodes"]) == (2, 1, 2)
    assert found.best.estimate.host.peak < 100 << 30
    assert planning.plan(LLAMA, {"seq_len": 2048}, cluster.replace(gpus=2), advise=False).verdict == "does-not-fit"


def test_one_gpu_is_the_fewest_there_are() -> None:
    found = planning.plan(TINY, {"seq_len": 64}, "4xT4", objective="gpus")
    assert found.solved is not None
    assert (found.solved.value, found.solved.next, found.solved.limit) == (1, None, "there are no fewer")


def test_nodes_that_are_given_are_whole() -> None:
    found = planning.plan(TINY, {"seq_len": 64}, "2x3xT4", solve="gpus")
    assert found.solved is not None
    assert (found.solved.value, found.solved.next, found.solved.limit) == (3, None, "there are no fewer")
    found = planning.plan(
        TINY, {"seq_len": 64}, ClusterSpec(gpu="T4", gpus=32, nodes=2, gpu_memory="20MiB"), solve="gpus"
    )
    assert found.solved is not None
    assert (found.solved.value, found.solved.next, found.best) == (None, 64, None)
    with pytest.raises(SpecError, match="global_batch_size: 7 cannot be shared evenly"):
        planning.plan(TINY, {"seq_len": 64}, "2x3xT4", global_batch_size=7, solve="gpus")


def test_the_smallest_gpu_is_enough_and_no_smaller_one_is() -> None:
    model = MEDIUM | {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "intermediate_size": 6000,
        "num_hidden_layers": 12,
    }
    training, hardware = {"seq_len": 1024, "optim": "adamw_torch"}, {"host_memory": "4GiB"}
    found = planning.plan(model, training, hardware, solve="gpu")
    assert found.solved is not None
    assert found.best is not None
    chosen = find_gpu(str(found.solved.value))
    assert found.best.estimate.setup["gpu"] == chosen.name
    smaller = [gpu for gpu in all_gpus() if gpu.memory_bytes < chosen.memory_bytes]
    assert len(smaller) > 2
    assert found.solved.next in [gpu.name for gpu in smaller]
    for gpu in smaller[-3:]:
        assert not fits_on_a_rung(model, training, ClusterSpec(gpu=gpu, **hardware)), gpu.name


@pytest.mark.parametrize(
    ("training", "cluster", "options", "message"),
    [
        ({}, "T4", {"solve": "tokens"}, "solve: 'tokens' is not known. Use micro-batch or seq-len or gpus or gpu."),
        ({"seq_len": 64}, "T4", {"solve": "seq-len"}, "seq_len: 64 is given, and --solve seq-len asks for it."),
        ({"micro_batch_size": 1}, "T4", {"solve": "micro-batch"}, "micro_batch_size: 1 is given"),
        ({}, "2xT4", {"solve": "gpus"}, "gpus: 2 is given, and --solve gpus asks for it. Leave one of them out."),
        ({}, "T4", {"solve": "gpu"}, "gpu: 'T4' is given"),
        ({}, {"gpu_memory": "4GiB"}, {"solve": "gpu"}, "gpu_memory: 4294967296 is given"),
        ({}, "T4", {"solve": "seq-len", "objective": "memory"}, "objective: 'memory' is for a plan"),
        ({"task": "load"}, "T4", {"solve": "seq-len"}, "task: 'load' is not a training run"),
    ],
)
def test_questions_that_contradict_themselves(
    training: Any, cluster: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as error:
        planning.plan(TINY, training, cluster, **options)
    assert str(error.value).startswith(message)


def test_images_have_no_length() -> None:
    vit = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    with pytest.raises(SpecError, match="solve: 'seq-len' has no answer: images have no length"):
        planning.plan(vit, {}, "T4", solve="seq-len")

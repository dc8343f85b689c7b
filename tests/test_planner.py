"""The ladder's search, on answers that are made up, and on a model."""

from __future__ import annotations

import doctest
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_api import LLAMA, TINY

from memplan import api, cli, planner, planning
from memplan.answers import Plan, Point
from memplan.case import Case, case_of
from memplan.configs import launch
from memplan.errors import SpecError, UnsupportedError
from memplan.estimator import Least
from memplan.planner import Setup
from memplan.results import (
    Estimate,
    StepTime,
    verdict_by_place,
    verdict_for,
    worst_verdict,
)
from memplan.space import SIDES, families, with_micro_batch
from memplan.specs import ClusterSpec, Strategy, TrainingSpec
from memplan.specs.strategy import ZeroSpec
from memplan.units import GiB, MiB

MEDIUM = TINY | {"vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
ZERO3 = Strategy(kind="zero3")
KNOWN = api.estimate(TINY, {"seq_len": 64}, ClusterSpec(gpu="T4", host_memory="64GiB"), replay=False)


class Answers:
    """Answers as a setup's memory and time say; counts what was asked."""

    def __init__(self, capacity: int, memory: Any, seconds: Any, lost: Any = lambda _: 0) -> None:
        self.capacity, self.memory, self.seconds, self.lost = capacity, memory, seconds, lost
        self.exact: list[Setup] = []

    def __call__(self, setup: Setup, exact: bool) -> Estimate:
        if exact:
            self.exact.append(setup)
        needed = self.memory(setup)
        if needed is None:
            raise UnsupportedError("not modelled")
        most = needed + self.lost(setup)
        verdict = verdict_for(needed, most, self.capacity)
        gpu = KNOWN.gpu.model_copy(update={"low": needed, "high": most, "capacity": self.capacity})
        seconds = self.seconds(setup)
        step = StepTime(seconds=seconds, tokens_per_second=1 / seconds, flops=1, bound_by="compute") if exact else None
        return KNOWN.model_copy(update={"gpu": gpu, "verdict": verdict, "step": step})


def plan(setup: Setup, answers: Answers, **options: Any) -> planner.Planned:
    return planner.plan(setup, answers, answers.seconds, **options)


def seconds_of(found: planner.Planned) -> float:
    assert found.best is not None
    step = found.tried[found.best][1].estimate.step
    assert step is not None
    return step.seconds


def asked(sequences: int = 8, gpus: int = 2, **training: Any) -> Setup:
    return Setup(TrainingSpec(grad_accum_steps=sequences, **training), Strategy(kind="ddp"), gpus)


def by_batch(setup: Setup) -> int:
    """One for weights, unless they are shared out, and one for each sequence, half with checkpointing."""
    kept = 1 if setup.training.gradient_checkpointing else 2
    return {"ddp": 100, "zero1": 50, "zero2": 40, "zero3": 20}[
        setup.strategy.kind
    ] + kept * setup.training.micro_batch_size


def with_buckets(setup: Setup) -> int:
    """The same, and ten for DeepSpeed's own buckets, which smaller ones are in proportion to."""
    return by_batch(setup) + (setup.strategy.zero.reduce_bucket_size // 50_000_000 if setup.strategy.shards else 0)


def by_engine(setup: Setup) -> float:
    slow = {"ddp": 1.0, "zero1": 1.0, "zero2": 1.1, "zero3": 1.5}[setup.strategy.kind]
    slow += 0.4 * (setup.strategy.offload_optimizer != "none") + 0.5 * (setup.strategy.offload_param != "none")
    return slow * (1.3 if setup.training.gradient_checkpointing else 1) * (1 + 1 / setup.training.micro_batch_size)


def test_every_rung_has_the_largest_micro_batch_that_fits() -> None:
    answers = Answers(46, by_batch, by_engine)
    found = plan(asked(sequences=24), answers)
    sizes = {rung.name: setup.training.micro_batch_size for setup, rung in found.tried}
    assert sizes["ZeRO-2"] == 6  # of 1, 2, 3, 4, 6, 8, 12, 24
    assert sizes["ZeRO-3"] == 24
    assert sizes["ZeRO-2, without checkpointing"] == 3
    assert all(setup.training.micro_batch_size * setup.training.grad_accum_steps == 24 for setup, _ in found.tried)
    assert len(answers.exact) < 90


def test_the_fastest_of_what_fits_is_chosen_and_the_others_say_why_not() -> None:
    found = plan(asked(), Answers(60, by_batch, by_engine))
    assert found.best is not None
    setup, best = found.tried[found.best]
    assert (best.name, best.reason_passed_over) == ("ZeRO-2, without checkpointing", None)
    assert setup.training.micro_batch_size == 8
    reasons = {rung.name: rung.reason_passed_over for _, rung in found.tried}
    assert reasons["as asked"] == "needs at least 0.00 GiB of GPU memory, and there are 0.00 GiB"
    assert reasons["ZeRO-3"] == "slower: 2.19 s a step, the chosen one 1.24 s"
    assert all(reason for name, reason in reasons.items() if name != best.name)


def test_memory_as_the_objective() -> None:
    found = plan(asked(sequences=1), Answers(60, by_batch, by_engine), objective="memory")
    assert found.best is not None
    assert found.tried[found.best][0].strategy.kind == "zero3"


def test_nothing_fits() -> None:
    found = plan(asked(), Answers(10, by_batch, by_engine))
    assert found.best is None
    assert not any(rung.name.endswith("without checkpointing") for _, rung in found.tried)


def test_equally_fast_setups_are_told_apart_by_what_they_give_up() -> None:
    """ZeRO-3's all offloaded is half a percent faster than its rungs before, which is less than the model can tell."""

    def seconds(setup: Setup) -> float:
        return by_engine(setup) if setup.strategy.kind != "zero3" else 1.010 - 0.005 * (setup.strategy != ZERO3)

    for objective in ("throughput", "memory"):
        found = plan(asked(), Answers(40, by_batch, seconds), objective=objective)
        assert found.best is not None
        setup, _ = found.tried[found.best]
        assert (setup.strategy, setup.training.micro_batch_size) == (ZERO3, 1), objective
    reasons = {rung.name: rung.reason_passed_over for _, rung in found.tried if rung.name == "ZeRO-3, all offloaded"}
    assert reasons == {"ZeRO-3, all offloaded": "needs 0.00 GiB of each GPU, the chosen one 0.00 GiB"}
    found = plan(asked(), Answers(40, by_batch, seconds))
    reasons = {rung.name: rung.reason_passed_over for _, rung in found.tried}
    assert reasons["ZeRO-3, all offloaded"] == ("as fast, and gives up more: 1.01 s a step, the chosen one 1.01 s")


def test_the_way_back_up_looks_beside_the_ladder() -> None:
    """Parameters need not go to the host where the optimizer's states alone do not fit."""

    def memory(setup: Setup) -> int:
        strategy = setup.strategy
        states = {"ddp": 100, "zero1": 90, "zero2": 80, "zero3": 60}[strategy.kind]
        return states - 40 * (strategy.offload_optimizer != "none") - 10 * (strategy.offload_param != "none")

    found = plan(asked(sequences=1), Answers(25, memory, by_engine))
    assert found.best is not None
    setup, rung = found.tried[found.best]
    assert rung.name == "ZeRO-3, optimizer offloaded, without checkpointing"
    assert setup.strategy == Strategy(kind="zero3", offload_optimizer="cpu")
    assert len([rung for _, rung in found.tried if rung.name.startswith("ZeRO-1, opt")]) == 0


def test_where_the_smallest_buffers_lose_more_between_blocks_larger_ones_are_taken() -> None:
    def lost(setup: Setup) -> int:
        """Of the step before the last one nothing, and of the others more than is there."""
        return 0 if setup.strategy.zero.reduce_bucket_size == 25_000_000 else 40

    start = asked(sequences=1)
    answers = Answers(60, by_batch, by_engine, lost)
    found = plan(start, answers)
    assert found.best is not None
    setup, best = found.tried[found.best]
    assert best.estimate.verdict == "fits"
    assert setup.strategy.zero.reduce_bucket_size == 25_000_000
    assert planner.feasible(start, planner.Answers(answers, answers.seconds))
    assert not planner.feasible(start, planner.Answers(Answers(60, by_batch, by_engine, lambda _: 40), by_engine))


def test_of_equals_what_gives_least_up_is_taken_whatever_its_buffers() -> None:
    def seconds(setup: Setup) -> float:
        """ZeRO-2 is faster than ZeRO-1 with DeepSpeed's own buffers, and as fast with the smallest, which fit."""
        if setup.strategy.kind == "zero2" and setup.strategy.zero.reduce_bucket_size == 500_000_000:
            return 0.9
        return 1.0 if setup.strategy.kind in ("zero1", "zero2") else 2.0

    def memory(setup: Setup) -> int:
        own = setup.strategy.kind == "zero2" and setup.strategy.zero.reduce_bucket_size == 500_000_000
        return 100 if own or setup.strategy.kind == "ddp" else 10

    found = plan(asked(sequences=1), Answers(50, memory, seconds))
    assert found.best is not None
    assert found.tried[found.best][0].strategy.kind == "zero1"


def test_buffers_are_as_large_as_fits() -> None:
    sizes = {}
    for capacity in (32, 22, 21, 20):
        found = plan(asked(sequences=1), Answers(capacity, with_buckets, by_engine))
        if found.best is not None:
            setup, _ = found.tried[found.best]
            sizes[capacity] = setup.strategy.zero.reduce_bucket_size
    assert sizes == {32: 500_000_000, 22: 25_000_000, 21: 25_000_000}


@given(st.integers(0, 200), st.integers(0, 60), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_more_memory_never_makes_the_plan_slower(capacity: int, more: int, seed: int) -> None:
    """Whatever setups need, and however long they take, as long as larger buffers do not cost time."""
    random = Random(seed)
    memory: dict[Setup, int] = {}
    times: dict[Setup, float] = {}

    def needs(setup: Setup) -> int:
        return memory.setdefault(setup, with_buckets(setup) + random.randint(0, 40))

    def takes(setup: Setup) -> float:
        level0 = replace(setup, strategy=setup.strategy.replace(zero=ZeroSpec()))
        slower = 1 + 0.01 * (500_000_000 / setup.strategy.zero.reduce_bucket_size - 1)
        return slower * times.setdefault(level0, by_engine(setup) * random.uniform(0.8, 1.2))

    start = replace(asked(sequences=24), nvme_buffer_size=1)  # with the rungs on NVMe
    before = plan(start, Answers(capacity, needs, takes))
    after = plan(start, Answers(capacity + more, needs, takes))
    if before.best is not None:
        assert planner.pace(seconds_of(after)) <= planner.pace(seconds_of(before))


def test_more_memory_never_makes_a_models_plan_slower() -> None:
    """On estimates, judged again for every size of the GPU and the host."""
    training = TrainingSpec(seq_len=256, grad_accum_steps=8)
    case = case_of(MEDIUM, ClusterSpec(gpu="T4", gpus=2, gpu_memory="64GiB", host_memory="1TiB"), None)
    start = Setup(training, Strategy(kind="ddp"), 2)
    kept: dict[tuple[Setup, bool], Estimate] = {}

    def estimate(setup: Setup, exact: bool, gpu: int, host: int) -> Estimate:
        if (setup, exact) not in kept:
            kept[setup, exact] = case.timed(setup, exact)
        found = kept[setup, exact]
        places = found.gpu.model_copy(update={"capacity": gpu}), found.host.model_copy(update={"capacity": host})
        verdict = worst_verdict(verdict_by_place(*places, found.nvme).values())
        return found.model_copy(update={"gpu": places[0], "host": places[1], "verdict": verdict})

    @cache
    def seconds(setup: Setup) -> float:
        return case.seconds(setup)

    @cache
    def least(setup: Setup, played: bool) -> Least:
        assert case.bound is not None
        return case.bound(setup, played)

    def bound(setup: Setup, played: bool, gpu: int, host: int) -> Least:
        found = least(setup, played)
        verdicts = [verdict_for(used, used, size) for used, size in ((found.gpu, gpu), (found.host, host))]
        return found._replace(verdict=worst_verdict(verdicts))

    def paces(sizes: list[tuple[int, int]]) -> list[int]:
        found = []
        for gpu, host in sizes:

            def judged(setup: Setup, exact: bool, gpu: int = gpu, host: int = host) -> Estimate:
                return estimate(setup, exact, gpu, host)

            bounds = {"bound": partial(bound, gpu=gpu, host=host), "least_seconds": case.least_seconds}
            planned = planner.plan(start, judged, seconds, **bounds)
            # Bounds spare estimates, and change nothing.
            slow = planner.plan(start, judged, seconds)
            assert planned._replace(searched=slow.searched) == slow
            fits = planned.best is not None and planned.tried[planned.best][1].estimate.verdict == "fits"
            found.append(planner.pace(seconds_of(planned)) if fits else 1 << 62)
        return found

    by_gpu = paces([(size * MiB, 1 << 40) for size in range(500, 3000, 110)])
    assert by_gpu == sorted(by_gpu, reverse=True)
    assert len(set(by_gpu)) > 4
    by_host = paces([(2000 * MiB, size * MiB) for size in range(100, 3000, 190)])
    assert by_host == sorted(by_host, reverse=True)
    assert len(set(by_host)) > 1


def test_the_front_has_what_none_beats_in_time_and_in_memory() -> None:
    found = plan(asked(sequences=24), Answers(130, with_buckets, by_engine))
    assert found.best is not None
    front = found.pareto
    assert front[0].seconds == seconds_of(found)
    assert [point.seconds for point in front] == sorted(point.seconds for point in front)
    assert [point.headroom for point in front] == sorted(point.headroom for point in front)
    assert len(front) > 3
    assert all(point.high + point.headroom == 130 for point in front)
    assert all(is_beaten(rung.estimate, front) for _, rung in found.tried if rung.estimate.verdict == "fits")
    assert found.searched.setups > 300
    assert found.searched.replayed <= found.searched.estimated < found.searched.setups


def is_beaten(estimate: Estimate, front: Sequence[Point]) -> bool:
    """Whether a point of the front is as fast and leaves as much, but for the 2 % by which points differ."""
    assert estimate.step is not None
    room = 0.02 * (estimate.gpu.capacity or 0)
    return any(point.seconds <= estimate.step.seconds and point.high <= estimate.gpu.high + room for point in front)


@pytest.mark.parametrize("size", [1160, 1500, 2300])
def test_the_chosen_setup_is_on_the_front_whatever_its_buffers(size: int) -> None:
    cluster = ClusterSpec(gpu="T4", gpus=2, gpu_memory=f"{size}MiB", host_memory="1TiB")
    found = planning.plan(MEDIUM, {"seq_len": 256}, cluster, global_batch_size=16, advise=False)
    assert found.best is not None
    assert found.best.estimate.verdict == "fits"
    fitting = [rung.estimate for rung in found.rungs if rung.estimate.verdict == "fits"]
    assert all(is_beaten(estimate, found.pareto) for estimate in fitting)
    chosen = [point for point in found.pareto if point.setup == found.best.estimate.setup]
    faster = [point for point in found.pareto if point.high < found.best.estimate.gpu.high]
    assert chosen or any(point.seconds < found.best.estimate.step.seconds for point in faster)


def test_bounds_of_times_change_nothing_of_a_choice_among_sides() -> None:
    """Of sides no rung is told: they are looked at only where a bound does not rule them out."""
    training = TrainingSpec(seq_len=256, grad_accum_steps=4)
    sides = ("liger",)
    bounded = unbounded = 0
    for gpu in ("900MiB", "6GiB"):
        cluster = ClusterSpec(gpu="A100-80GB", gpus=2, gpu_memory=gpu, host_memory="1TiB")
        case = case_of(MEDIUM, cluster, None)
        start = Setup(training, Strategy(kind="ddp"), 2)
        asked_for: list[Setup] = []

        def seconds(setup: Setup, case: Case = case, asked_for: list[Setup] = asked_for) -> float:
            asked_for.append(setup)
            return case.seconds(setup)

        found = planner.plan(
            start, case.timed, seconds, allow=sides, bound=case.bound, least_seconds=case.least_seconds
        )
        bounded += len(asked_for)
        asked_for.clear()
        every = planner.plan(start, case.timed, seconds, allow=sides)
        assert found._replace(searched=every.searched) == every
        unbounded += len(asked_for)
    assert bounded < 0.8 * unbounded


def test_sides_are_taken_on_request() -> None:
    def memory(setup: Setup) -> int:
        return by_batch(setup) // (2 if setup.training.liger else 1)

    def seconds(setup: Setup) -> float:
        return by_engine(setup) * (0.8 if setup.training.liger else 1) * (0.7 if setup.training.lora else 1)

    names = {}
    for allow in ((), ("liger",), ("liger", "lora")):
        found = plan(asked(sequences=1), Answers(55, memory, seconds), allow=allow)
        assert found.best is not None
        names[allow] = found.tried[found.best][1].name
        assert [setup.training.liger for setup, _ in found.tried].count(True) == bool(allow)
    assert names == {
        (): "ZeRO-1, without checkpointing",
        ("liger",): "as asked, liger",
        ("liger", "lora"): "as asked, liger, lora",
    }


def test_no_setup_is_there_twice() -> None:
    for micro_batch in (1, 2, 8):
        sequences = 8 // micro_batch
        found = plan(asked(sequences, micro_batch_size=micro_batch), Answers(200, by_batch, by_engine))
        names = [rung.name for _, rung in found.tried]
        assert len({setup for setup, _ in found.tried}) == len(names)
        assert "micro-batch 1" not in names
        assert "gradient checkpointing, without checkpointing" not in names


def test_for_memory_the_micro_batch_stays_small() -> None:
    found = plan(asked(sequences=4, micro_batch_size=2), Answers(200, by_batch, by_engine), objective="memory")
    assert found.best is not None
    assert found.tried[found.best][0].training.micro_batch_size == 1


def test_a_rung_that_is_not_modelled_is_left_out_but_not_what_was_asked_for() -> None:
    found = plan(asked(), Answers(60, lambda s: None if s.strategy.kind == "zero2" else by_batch(s), by_engine))
    assert {setup.strategy.kind for setup, _ in found.tried} == {"ddp", "zero1", "zero3"}
    with pytest.raises(UnsupportedError):
        plan(asked(), Answers(60, lambda _: None, by_engine))


def test_a_plan_that_fits_fits_by_an_estimate_of_its_own() -> None:
    cluster = ClusterSpec(gpu="RTX4090", gpus=2, host_memory="256GiB")
    found = planning.plan(LLAMA, {"seq_len": 1024}, cluster, global_batch_size=4)
    assert found.best is not None
    setup = found.best.estimate.setup
    training = {
        name: setup[name] for name in ("seq_len", "micro_batch_size", "grad_accum_steps", "gradient_checkpointing")
    }
    strategy = {"kind": setup["strategy"], **{name: setup[name] for name in ("offload_optimizer", "offload_param")}}
    strategy["fsdp" if setup["strategy"] == "fsdp" else "zero"] = setup["engine_config"]
    again = api.estimate(LLAMA, training, cluster, launch.as_written(Strategy(**strategy)))
    assert again.verdict == "fits"
    assert again.gpu == found.best.estimate.gpu
    assert Plan.from_json(found.to_json()) == found
    assert {"best", "rungs", "files"} <= json.loads(found.to_json()).keys()


def test_the_page_holds() -> None:
    page = str(Path(__file__).parents[1] / "docs" / "planning.md")
    found = doctest.testfile(page, module_relative=False)
    assert (found.failed, found.attempted > 4) == (0, True)


def test_a_small_gpu_gets_small_buffers_and_its_files_have_them(tmp_path: Path) -> None:
    sizes = []
    for memory in ("1350MiB", "8GiB"):
        cluster = ClusterSpec(gpu="T4", gpus=2, gpu_memory=memory, host_memory="600MiB")
        found = planning.plan(MEDIUM, {"seq_len": 256}, cluster, global_batch_size=4)
        assert found.best is not None
        sharded = next(rung for rung in found.rungs if rung.name == "ZeRO-3").estimate
        keys = sharded.setup["engine_config"]
        sizes.append((sharded.verdict, keys["reduce_bucket_size"], keys["sub_group_size"]))
        if memory == "1350MiB":
            found.write(tmp_path / "run")
            chosen = found.best.estimate.setup["engine_config"]
    assert sizes[1] == ("fits", 500_000_000, 1_000_000_000)
    assert sizes[0] < ("fits", 100_000_001, 200_000_001)
    written = json.loads((tmp_path / "run" / "ds_config.json").read_text())["zero_optimization"]
    assert written["reduce_bucket_size"] == chosen["reduce_bucket_size"] < 500_000_000
    again = launch.read(tmp_path / "run")
    cluster = ClusterSpec(gpu="T4", gpus=2, gpu_memory="1350MiB", host_memory="600MiB")
    assert api.estimate(MEDIUM, again.training, cluster, again.strategy).verdict == "fits"


LARGE = MEDIUM | {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "intermediate_size": 6000,
    "num_hidden_layers": 16,
}


def test_buffers_between_own_and_smallest_can_need_the_least_of_the_host() -> None:
    """What is pinned is rounded up to powers of two: 688.6, 682.6, 742.6 and 758.9 GiB, the largest buffers first."""

    def planned(gib: int) -> Plan:
        cluster = ClusterSpec(gpu="RTX4090", gpus=2, host_memory=f"{gib}GiB")
        return planning.plan("zai-org/GLM-4-32B-0414", {}, cluster, advise=gib < 100)

    (more,) = [each for each in planned(64).remedies if each.options.startswith("--host-memory")]
    enough = int(more.options.split()[1])
    found = planned(enough)
    assert found.verdict == "fits"
    assert found.best is not None
    assert found.best.estimate.host.peak == more.host <= enough * GiB
    assert planned(enough - 1).verdict == "does-not-fit"


def test_what_would_fit_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    command = ["plan", str(tmp_path), "--gpu", "T4", "--micro-batch-size", "2", "--host-memory"]
    given = [*command, "4", "--seq-len", "3072"]
    plan = planning.plan(
        LARGE, {"seq_len": 3072, "micro_batch_size": 2}, ClusterSpec(gpu="T4", host_memory="4GiB"), advise=True
    )
    assert plan.best is None
    found = [each.options for each in plan.remedies]
    hosts = [int(option.split()[1]) for option in found if option.startswith("--host-memory")]
    assert len(hosts) == 1
    assert {option.split()[0] for option in found} >= {"--host-memory", "--gpu", "--lora-rank"}
    for option in found:
        assert cli.main([*given, *option.split(), "--json"]) == 0, option
    assert cli.main([*command, str(hosts[0] - 1), "--seq-len", "3072", "--json"]) == 1
    capsys.readouterr()
    cli.main(given)
    shown = " ".join(capsys.readouterr().out.split())
    assert "What would fit" in shown
    assert all(option in shown for option in found)
    assert (
        planning.plan(LARGE, {"seq_len": 3072}, ClusterSpec(gpu="T4", host_memory="4GiB"), advise=False).remedies == ()
    )


def test_adapters_go_beside_every_layer_where_peft_has_no_default(tmp_path: Path) -> None:
    """Phi-3, OLMo-2 and a dozen more: nothing with adapters was found for them."""
    model = {**LARGE, "model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    small = ClusterSpec(gpu="T4", host_memory="4GiB")
    plan = planning.plan(model, {"seq_len": 3072}, small, advise=True)
    assert plan.best is None
    (adapted,) = [each.options for each in plan.remedies if each.options.startswith("--lora-rank")]
    assert adapted == "--lora-rank 16 --lora-targets all-linear"
    plan = planning.plan(model, {"seq_len": 3072}, small, allow=["lora"])
    assert plan.best is not None
    plan.write(tmp_path / "run")
    again = launch.read(tmp_path / "run")
    assert again.training.lora is not None
    assert again.training.lora.targets == ("all-linear",)
    assert api.estimate(model, again.training, small, again.strategy).verdict == "fits"


@pytest.mark.parametrize(
    ("gpus", "memory", "more"), [(2, "8GiB", "--gpus 4 --nodes 4"), (6, "6GiB", "--gpus 12 --nodes 4")]
)
def test_more_gpus_come_on_nodes_like_those_there_are(gpus: int, memory: str, more: str) -> None:
    cluster = ClusterSpec(gpu="T4", gpus=gpus, nodes=2, gpu_memory=memory, host_memory="2GiB")
    plan = planning.plan(LARGE, {"seq_len": 3072}, cluster, advise=True)
    assert plan.verdict != "fits"
    assert [each.options for each in plan.remedies if each.options.startswith("--gpus")] == [more]


def test_a_larger_gpu_fits_beside_the_memory_that_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MEDIUM))
    given = ["plan", str(tmp_path), "--gpu", "T4", "--gpu-memory", "0.5", "--host-memory", "1", "--json"]
    assert cli.main(given) == 1
    found = [remedy["options"] for remedy in json.loads(capsys.readouterr().out)["remedies"]]
    larger = next(options for options in found if options.startswith("--gpu "))
    assert cli.main([*given, *larger.split()]) == 0


def test_processes_share_a_search_and_change_nothing() -> None:
    cluster = ClusterSpec(gpu="T4", gpus=2, gpu_memory="1350MiB", host_memory="1GiB")
    told: list[tuple[int, int]] = []
    for solve, batch in ((None, 4), ("micro-batch", None)):
        alone, shared = (
            planning.plan(
                MEDIUM | {"num_hidden_layers": 2},
                {"seq_len": 512},
                cluster,
                global_batch_size=batch,
                solve=solve,  # type: ignore[arg-type]
                processes=processes,
                done=lambda number, of: told.append((number, of)),
            )
            for processes in (1, 2)
        )
        assert shared == alone
        assert alone.best is not None
    assert len([number for number, of in told if number == of]) == 4


def test_targets() -> None:
    cluster = ClusterSpec(gpu="T4", gpus=2, host_memory="64GiB")
    kinds = {
        target: {
            rung.estimate.setup["strategy"]
            for rung in planning.plan(TINY, {"seq_len": 64}, cluster, target=target).rungs
        }
        for target in ("deepspeed", "fsdp", "auto")
    }
    assert kinds["deepspeed"] == {"ddp", "zero1", "zero2", "zero3"}
    assert kinds["fsdp"] == {"ddp", "fsdp"}
    assert kinds["auto"] == kinds["deepspeed"] | kinds["fsdp"]


@pytest.mark.parametrize(
    ("training", "cluster", "options", "message"),
    [
        ({}, "cpu", {}, "gpu: 'cpu' is none, and a plan is for a GPU"),
        ({}, None, {}, "gpu: null is not known"),
        ({"task": "load"}, "T4", {}, "task: 'load' is not a training run"),
        (
            {},
            "2xT4",
            {"global_batch_size": 3},
            "global_batch_size: 3 cannot be shared evenly by 2 GPUs. Use a multiple of 2",
        ),
        ({}, "T4", {"global_batch_size": 0}, "global_batch_size: 0 is no number"),
        (
            {"micro_batch_size": 3},
            "2xT4",
            {"global_batch_size": 8},
            "micro_batch_size: 3 does not divide the 4 sequences",
        ),
        (
            {"micro_batch_size": 2, "grad_accum_steps": 4},
            "T4",
            {"global_batch_size": 4},
            "global_batch_size: 4 is not 2 x 4 x 1",
        ),
        ({}, "T4", {"target": "megatron"}, "target: 'megatron' is not known. Use deepspeed or fsdp or auto."),
        ({}, "T4", {"objective": "speed"}, "objective: 'speed' is not known"),
        ({}, "T4", {"allow": ["ligr"]}, "allow: 'ligr' is nothing that a plan may change. Use liger or flash_at"),
        ({"seq_len": 9}, "T4", {"allow": ["liger"], "solve": "micro-batch"}, "allow: 'liger' is for a plan, and"),
    ],
)
def test_bad_input(training: Any, cluster: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        planning.plan(TINY, training, cluster, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("target", ["deepspeed", "fsdp"])
def test_what_is_written_is_what_was_planned(tmp_path: Path, target: Any) -> None:
    cluster = ClusterSpec(gpu="A100-80GB", gpus=2, host_memory="1TiB")
    plan = planning.plan(LLAMA, {"seq_len": 512}, cluster, global_batch_size=4, target=target)
    assert plan.best is not None
    assert plan.best.estimate.setup["strategy"] == {"deepspeed": "zero3", "fsdp": "fsdp"}[target]
    folder = tmp_path / "run"
    written = plan.write(folder)
    assert set(written.files) == {path.name for path in folder.iterdir()} >= {"train.py", "launch.sh", "plan.json"}
    assert Plan.from_json((folder / "plan.json").read_text()) == written
    found = launch.read(folder)
    again = api.estimate(LLAMA, found.training, cluster.replace(gpus=found.gpus), found.strategy)
    assert again.gpu == plan.best.estimate.gpu
    with pytest.raises(SpecError, match="force"):
        plan.write(folder)
    with pytest.raises(SpecError, match="out: '' is no folder"):
        plan.write("")
    assert plan.write(folder, force=True) == written
    with pytest.raises(SpecError, match="it has no model"):
        Plan.from_json(plan.to_json()).write(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_nothing_that_fits_is_nothing_to_write(tmp_path: Path) -> None:
    plan = planning.plan(TINY, {"seq_len": 64}, ClusterSpec(gpu="T4", gpu_memory="20MiB", host_memory="64GiB"))
    with pytest.raises(SpecError, match="nothing fits"):
        plan.write(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_replaced_is_read_as_what_runs_now(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    planning.plan(TINY, {"seq_len": 64}, "2xA100-80GB", target="fsdp").write(folder)
    assert (folder / "accelerate.yaml").exists()
    planning.plan(TINY, {"seq_len": 64}, "A100-80GB").write(folder, force=True)
    found = launch.read(folder)
    assert (found.gpus, found.strategy.kind) == (1, "single")


def test_what_is_shared_out_comes_home_as_it_was() -> None:
    """Setups are keys: one that is read from JSON is the one that was written."""
    asked = Setup(
        TrainingSpec(seq_len=64, lora={"rank": 4}, grad_accum_steps=8), Strategy(kind="ddp"), 4, nvme_buffer_size=1000
    )
    for family in families(asked, "auto", SIDES):
        for setup in (with_micro_batch(family.setup, size) for size in family.micro_batches()):
            again = Setup.from_dict(json.loads(json.dumps(setup.to_dict())))
            assert again == setup
            assert hash(again) == hash(setup)
            assert again.training.model_fields_set == setup.training.model_fields_set

"""The ladder's search, on answers that are made up, and on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.test_api import LLAMA, TINY

from memplan import api, planner
from memplan.configs import launch
from memplan.errors import SpecError, UnsupportedError
from memplan.planner import Setup
from memplan.results import Estimate, Plan, StepTime
from memplan.specs import ClusterSpec, Strategy, TrainingSpec

KNOWN = api.estimate(TINY, {"seq_len": 64}, ClusterSpec(gpu="T4", host_memory="64GiB"), replay=False)


class Answers:
    """Answers as a setup's memory and time say; counts what was asked."""

    def __init__(self, capacity: int, memory: Any, seconds: Any) -> None:
        self.capacity, self.memory, self.seconds = capacity, memory, seconds
        self.exact: list[Setup] = []

    def __call__(self, setup: Setup, exact: bool) -> Estimate:
        if exact:
            self.exact.append(setup)
        needed = self.memory(setup)
        if needed is None:
            raise UnsupportedError("not modelled")
        verdict = "fits" if needed <= self.capacity else "does-not-fit"
        gpu = KNOWN.gpu.model_copy(update={"low": needed, "high": needed, "capacity": self.capacity})
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


def by_engine(setup: Setup) -> float:
    slow = {"ddp": 1.0, "zero1": 1.0, "zero2": 1.1, "zero3": 1.5}[setup.strategy.kind]
    return slow * (1.3 if setup.training.gradient_checkpointing else 1) * (1 + 1 / setup.training.micro_batch_size)


def test_every_rung_has_the_largest_micro_batch_that_fits() -> None:
    answers = Answers(46, by_batch, by_engine)
    found = plan(asked(sequences=24), answers)
    sizes = {rung.name: setup.training.micro_batch_size for setup, rung in found.tried}
    assert sizes["ZeRO-2"] == 6  # of 1, 2, 3, 4, 6, 8, 12, 24
    assert sizes["ZeRO-3"] == 24
    assert sizes["ZeRO-2, without checkpointing"] == 3
    assert all(setup.training.micro_batch_size * setup.training.grad_accum_steps == 24 for setup, _ in found.tried)
    assert len(answers.exact) < 60


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


def test_more_memory_never_makes_the_plan_slower() -> None:
    seconds = []
    for capacity in range(21, 140):
        found = plan(asked(), Answers(capacity, by_batch, by_engine))
        if found.best is not None:
            seconds.append(seconds_of(found))
    assert len(seconds) > 100
    assert seconds == sorted(seconds, reverse=True)


def test_more_memory_never_makes_the_plan_slower_where_a_larger_batch_is() -> None:
    def seconds(setup: Setup) -> float:
        return by_engine(setup) * {4: 0.8, 3: 0.9}.get(setup.training.micro_batch_size, 1.0)

    times = []
    for capacity in range(21, 140):
        found = plan(asked(sequences=24), Answers(capacity, by_batch, seconds))
        if found.best is not None:
            times.append(seconds_of(found))
    assert len(times) > 100
    assert times == sorted(times, reverse=True)


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
    found = api.plan(LLAMA, {"seq_len": 1024}, cluster, global_batch_size=4)
    assert found.best is not None
    setup = found.best.estimate.setup
    training = {
        name: setup[name] for name in ("seq_len", "micro_batch_size", "grad_accum_steps", "gradient_checkpointing")
    }
    strategy = {"kind": setup["strategy"], **{name: setup[name] for name in ("offload_optimizer", "offload_param")}}
    again = api.estimate(LLAMA, training, cluster, launch.as_written(Strategy(**strategy)))
    assert again.verdict == "fits"
    assert again.gpu == found.best.estimate.gpu
    assert Plan.from_json(found.to_json()) == found
    assert {"best", "rungs", "files"} <= json.loads(found.to_json()).keys()


def test_targets() -> None:
    cluster = ClusterSpec(gpu="T4", gpus=2, host_memory="64GiB")
    kinds = {
        target: {
            rung.estimate.setup["strategy"] for rung in api.plan(TINY, {"seq_len": 64}, cluster, target=target).rungs
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
        ({}, None, {}, "gpu: None is not known"),
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
    ],
)
def test_bad_input(training: Any, cluster: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        api.plan(TINY, training, cluster, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("target", ["deepspeed", "fsdp"])
def test_what_is_written_is_what_was_planned(tmp_path: Path, target: Any) -> None:
    cluster = ClusterSpec(gpu="A100-80GB", gpus=2, host_memory="1TiB")
    plan = api.plan(LLAMA, {"seq_len": 512}, cluster, global_batch_size=4, target=target)
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
    plan = api.plan(TINY, {"seq_len": 64}, ClusterSpec(gpu="T4", gpu_memory="20MiB", host_memory="64GiB"))
    with pytest.raises(SpecError, match="nothing fits"):
        plan.write(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_replaced_is_read_as_what_runs_now(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    api.plan(TINY, {"seq_len": 64}, "2xA100-80GB", target="fsdp").write(folder)
    assert (folder / "accelerate.yaml").exists()
    api.plan(TINY, {"seq_len": 64}, "A100-80GB").write(folder, force=True)
    found = launch.read(folder)
    assert (found.gpus, found.strategy.kind) == (1, "single")

"""MemoryCallback under a real Trainer on CPU, and watch with torch.cuda stood in for."""

import json
import os
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers

import memplan
from memplan.errors import SpecError
from memplan.integrations import watch as watching
from memplan.integrations.callback import MemoryCallback
from memplan.integrations.watch import RECORD, RISES, WINDOW
from memplan.introspect.measurement import Measured, Measurement

GiB, MiB = 2**30, 2**20
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def predicted() -> memplan.Estimate:
    training = {"seq_len": 512, "gradient_checkpointing": True, "micro_batch_size": 1}
    return memplan.estimate("openai-community/gpt2", training, "1xRTX 3090")


class Counters:
    """torch.cuda, as far as it is read; numbers are set by the test."""

    def __init__(self) -> None:
        self.allocated, self.peak, self.reserved, self.total = 1 * GiB, 2 * GiB, 9 * GiB // 4, 24 * GiB
        self.others = 0
        self.context = 300 * MiB
        self.calls = 0

    def is_available(self) -> bool:
        return True

    def memory_stats_as_nested_dict(self) -> dict[str, Any]:
        self.calls += 1
        return {
            "allocated_bytes": {"all": {"current": self.allocated, "peak": self.peak}},
            "reserved_bytes": {"all": {"current": self.reserved, "peak": self.reserved}},
        }

    def memory_reserved(self) -> int:
        return self.reserved

    def mem_get_info(self) -> tuple[int, int]:
        return self.total - self.others - self.context - self.reserved, self.total

    def get_device_name(self) -> str:
        return "NVIDIA GeForce RTX 3090"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Counters:
    counters = Counters()
    monkeypatch.setattr(watching, "_cuda", lambda: counters)
    return counters


# -- a loop of one's own -----------------------------------------------------------------------------------------------


def test_measured_stands_beside_predicted_after_step_2(cuda: Counters, tmp_path: Path) -> None:
    estimate, said = predicted(), list[str]()
    with memplan.watch(estimate, tmp_path, said.append) as watch:
        watch.step()
        assert not said
        assert not (tmp_path / RECORD).exists()
        watch.step()
        assert (tmp_path / RECORD).exists()
        watch.step()
    (report,) = said
    assert report.startswith("memplan, after step 2:")
    assert [line.split()[:2] for line in report.split("\n")[2:]] == [
        ["idle", "1.00"],
        ["peak", "allocated"],
        ["peak", "reserved"],
        ["peak", "device"],
    ]
    measured = Measured.from_json((tmp_path / RECORD).read_text())
    run = measured.measurement.phases["run"]
    assert (run["allocated"], run["reserved"]) == (2 * GiB, 9 * GiB // 4)
    assert measured.measurement.phases["idle"]["allocated"] == 1 * GiB
    assert measured.measurement.ran["steps"] == 3
    assert measured.measurement.status == "ok"
    by_name = {row.name: row for row in measured.differences}
    idle = next(phase.allocated for phase in estimate.gpu.phases if phase.name == "idle")
    assert (by_name["idle"].estimated, by_name["idle"].measured) == (idle, 1 * GiB)


def test_what_others_have_of_the_gpu_is_not_the_runs(cuda: Counters, tmp_path: Path) -> None:
    estimate = predicted()
    cuda.context, cuda.reserved, cuda.others = estimate.gpu.components.context, 0, 10 * GiB
    with memplan.watch(estimate, tmp_path, lambda _: None) as watch:
        cuda.reserved = 2 * GiB
        watch.step()
        watch.step()
    measured = Measured.from_json((tmp_path / RECORD).read_text()).measurement
    assert measured.phases["run"]["device"] == 2 * GiB + estimate.gpu.components.context
    assert measured.device["before"] == 10 * GiB


def test_calibrate_reads_the_record(cuda: Counters, tmp_path: Path) -> None:
    """What the process had beside torch's allocator, by the real record: here a context of 300 MiB."""
    from memplan.introspect import calibrate

    cuda.reserved = 0
    with memplan.watch(predicted(), tmp_path, lambda _: None) as watch:
        cuda.reserved = 2 * GiB
        steps(watch)
    assert calibrate._outside(calibrate.read_record(tmp_path / RECORD)) == cuda.context


def steps(watch: watching.Watch, number: int = 2) -> None:
    for _ in range(number):
        watch.step()


def test_within_the_interval_nothing_is_said(cuda: Counters) -> None:
    estimate = predicted()
    cuda.reserved, cuda.context = 0, estimate.gpu.components.context
    with warnings.catch_warnings(), memplan.watch(estimate, say=lambda _: None) as watch:
        warnings.simplefilter("error")
        cuda.reserved = estimate.gpu.high - cuda.context
        steps(watch)


def test_drift_above_the_interval_is_a_warning_once(cuda: Counters) -> None:
    estimate = predicted()
    cuda.reserved, cuda.context = 0, estimate.gpu.components.context
    watch = watching.Watch(estimate, say=lambda _: None)
    cuda.reserved = estimate.gpu.high - cuda.context + MiB
    with pytest.warns(UserWarning, match=r"memplan: after step 2 the process has .* at most .* were predicted"):
        steps(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.finish()


def test_a_level_that_creeps_is_a_warning(cuda: Counters) -> None:
    watch = watching.Watch(say=lambda _: None)
    steps(watch)

    def creep() -> None:
        for _ in range((RISES + 2) * WINDOW):
            cuda.allocated += 64 * 1024
            watch.step()

    with pytest.warns(UserWarning, match=r"grown by .* GiB over 80 steps, 6\d{4} bytes a step"):
        creep()


@pytest.mark.parametrize("kind", ["constant", "noisy", "steps once"])
def test_a_level_that_does_not_creep_is_none(kind: str, cuda: Counters) -> None:
    watch = watching.Watch(say=lambda _: None)
    steps(watch)
    random = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40 * WINDOW):
            noise = int(torch.randint(0, 100, (), generator=random)) * MiB
            cuda.allocated = GiB + {"constant": 0, "noisy": noise, "steps once": GiB * (step > 200)}[kind]
            watch.step()


class OutOfMemoryError(RuntimeError):
    """torch's name."""


def test_a_run_that_dies_is_recorded(cuda: Counters, tmp_path: Path) -> None:

    def die() -> None:
        with memplan.watch(predicted(), tmp_path, lambda _: None) as watch:
            watch.step()
            raise OutOfMemoryError("CUDA out of memory.\nTried")

    with pytest.raises(OutOfMemoryError):
        die()
    measured = Measured.from_json((tmp_path / RECORD).read_text()).measurement
    assert (measured.status, measured.message) == ("out-of-memory", "OutOfMemoryError: CUDA out of memory.")


def test_without_a_prediction_it_reports(cuda: Counters, tmp_path: Path) -> None:
    said: list[str] = []
    with memplan.watch(folder=tmp_path, say=said.append) as watch:
        steps(watch)
    assert "allocated 2.00, reserved 2.25" in said[0]
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["estimate"] is None
    assert Measurement.from_dict(record["measurement"]).phases["run"]["reserved"] == 9 * GiB // 4


def test_other_ranks_are_silent(cuda: Counters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    cuda.reserved = 23 * GiB
    said: list[str] = []
    with warnings.catch_warnings(), memplan.watch(predicted(), tmp_path, said.append) as watch:
        warnings.simplefilter("error")
        steps(watch)
    assert not said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_warning(cuda: Counters, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watch = watching.Watch(folder=tmp_path / "file", say=lambda _: None)
    with pytest.warns(UserWarning, match="cannot be written"):
        steps(watch)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_step_costs_less_than_a_millisecond(cuda: Counters, tmp_path: Path) -> None:
    """The callback's own part, 2 microseconds, and one read of the allocator's counters."""
    callback = MemoryCallback(predicted())
    args = types.SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, None, None)
    for _ in range(2):
        callback.on_step_end(args, None, None)
    calls, start = cuda.calls, time.process_time()
    for _ in range(1000):
        callback.on_step_end(args, None, None)
    assert time.process_time() - start < 1
    assert cuda.calls == calls + 1000


# -- the Trainer -------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.arange(24) + index
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder: Path, callback: Any) -> transformers.Trainer:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
    )
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        disable_tqdm=True,
        save_strategy="no",
    )
    model = transformers.LlamaForCausalLM(config)
    return transformers.Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])


def test_a_trainer_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = memplan.MemoryCallback()
    running = trainer(tmp_path, callback)
    running.train()
    assert "no GPU is in use, so that" in capsys.readouterr().out
    assert not running.model._forward_pre_hooks
    measured = Measured.from_json((tmp_path / RECORD).read_text())
    assert set(measured.measurement.phases) == {"run"}
    assert set(measured.measurement.phases["run"]) == {"host"}
    assert measured.measurement.phases["run"]["host"] > 100 * MiB
    assert measured.measurement.ran["steps"] == 3
    setup = measured.estimate.setup
    assert (setup["seq_len"], setup["packed"], setup["micro_batch_size"], setup["gpu"]) == (24, True, 2, "cpu")
    assert measured.estimate.model.parameters == sum(p.numel() for p in running.model.parameters())
    assert measured.differences == ()


@pytest.mark.filterwarnings("ignore:memplan")
def test_a_record_is_estimated_again(tmp_path: Path, cuda: Counters) -> None:
    from memplan.measuring import estimate_again

    callback = MemoryCallback(cluster="1xRTX 3090")
    trainer(tmp_path, callback).train()
    measured = Measured.from_json((tmp_path / RECORD).read_text())
    again = estimate_again(measured.measurement)
    assert again.estimate.gpu == measured.estimate.gpu
    assert {row.name for row in measured.differences} == {"idle", "peak_allocated", "peak_reserved", "peak_device"}


@pytest.mark.filterwarnings("ignore:memplan")
def test_what_is_given_is_not_predicted(tmp_path: Path, cuda: Counters) -> None:
    given = predicted()
    trainer(tmp_path, MemoryCallback(given)).train()
    assert Measured.from_json((tmp_path / RECORD).read_text()).estimate == given


def test_a_mistake_of_memplan_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(watching.Watch, "step", broken)
    running = trainer(tmp_path, MemoryCallback())
    with pytest.warns(UserWarning, match="memory is not watched: ZeroDivisionError: by zero"):
        running.train()
    assert running.state.global_step == 3


def test_a_model_that_cannot_be_estimated_is_measured(tmp_path: Path, cuda: Counters) -> None:
    running = trainer(tmp_path, MemoryCallback())
    running.model.hf_device_map = {"a": 0, "b": 1}
    callback = next(each for each in running.callback_handler.callbacks if isinstance(each, MemoryCallback))
    state = types.SimpleNamespace(is_world_process_zero=True)
    callback.on_train_begin(running.args, state, None, model=running.model)
    for _ in range(2):
        callback.on_step_end(running.args, state, None, model=running.model)
    assert json.loads((tmp_path / RECORD).read_text())["estimate"] is None


def test_fields_that_nobody_has_set_are_not_asked_for() -> None:
    callback = MemoryCallback(training=memplan.TrainingSpec(seq_len=32))
    assert callback.training == {"seq_len": 32}
    assert MemoryCallback(training={"seq_len": 32}).training == {"seq_len": 32}
    asked = memplan.MemplanArguments(preflight_dtype="bfloat16")._asked({"training": memplan.TrainingSpec(seq_len=32)})
    assert asked["training"] == {"seq_len": 32, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MemoryCallback(training=5), "training"),
        (lambda: MemoryCallback(training={"seq_len": 0}), "seq_len"),
        (lambda: MemoryCallback(cluster=5), "cluster"),
        (lambda: MemoryCallback(5), "estimate"),
        (lambda: memplan.MemplanArguments()._asked({"training": 5}), "training"),
        (lambda: watching.Watch(5), "estimate"),
        (lambda: watching.Watch(folder=5), "folder"),
        (lambda: watching.Watch(folder="a\0b"), "folder"),
        (lambda: watching.Watch(folder="\ud800"), "folder"),
        (lambda: watching.Watch(say="x"), "say"),
    ],
)
def test_what_cannot_be_watched_is_refused(make: Any, field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field}: "):
        make()


@pytest.mark.parametrize("dies", [False, True])
def test_a_report_that_cannot_be_said_ends_no_loop(cuda: Counters, tmp_path: Path, dies: bool) -> None:
    def say(text: str) -> None:
        raise BrokenPipeError("nobody listens")

    def loop() -> int:
        steps = 0
        try:
            with memplan.watch(predicted(), tmp_path, say=say) as watched:
                for _ in range(4):
                    watched.step()
                    steps = watched.steps
                if dies:
                    raise KeyError("the script's own")
        except KeyError:
            assert dies
        return steps

    with pytest.warns(UserWarning, match="memory is not watched: BrokenPipeError"):
        assert loop() == 4


def test_counters_that_cannot_be_read_end_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA driver error")

    monkeypatch.setattr(watching, "_cuda", broken)
    with pytest.warns(UserWarning, match="memory is not watched: RuntimeError"):
        watched = watching.Watch()
    watched.step()
    watched.step()
    watched.finish()
    assert watched.report == ""

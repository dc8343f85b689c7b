"""The instrument, tried on CPU, where the same ledger counts tensors that a trace keeps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.introspect import fake_cuda

from memplan import api, case, measuring
from memplan.catalog import detect
from memplan.catalog.gpus import parse_cluster
from memplan.cli import main
from memplan.configs import launch
from memplan.errors import SpecError
from memplan.introspect import measure
from memplan.introspect.measure import Job, boundary
from memplan.introspect.measurement import Measured, Measurement, beside
from memplan.introspect.worker import Recorder, _failure, blocks_at_peak, losses, resident
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 352,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 64, "d_kv": 16, "d_ff": 128,
    "num_layers": 2, "num_heads": 4, "vocab_size": 1000, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "training", "options"),
    [
        (TINY, {"seq_len": 96, "micro_batch_size": 2, "grad_accum_steps": 2}, {}),
        (
            TINY,
            {"seq_len": 64, "lora": {"rank": 4}, "gradient_checkpointing": True},
            {"pretrained": True, "save": True},
        ),
        (T5, {"seq_len": 40, "mixed_precision": "no", "eval_batch_size": 3}, {}),
        (T5, {"seq_len": 40, "micro_batch_size": 4, "packed": False, "attn": "eager"}, {}),
    ],
    ids=["autocast", "lora, loaded and saved", "t5, evaluated", "padded"],
)
def test_a_real_run_is_what_was_estimated(config: Any, training: Any, options: Any) -> None:
    found = measuring.measure(config, training, {"gpu": "cpu"}, **options)
    assert found.measurement.status == "ok", found.measurement.message
    rows = {row.name: row for row in found.differences}
    phases = {"first_step", "forward", "backward", "step", "idle", "steady_allocated", "peak_allocated"}
    phases |= {"eval"} if "eval_batch_size" in training else set()
    phases |= {"save"} if options.get("save") else set()
    assert phases <= rows.keys()
    worst = max(rows.values(), key=lambda row: abs(row.relative or 0))
    assert abs(worst.relative or 0) < 0.01, worst
    assert len(found.measurement.step_seconds) == 3
    assert all(loss > 0 for loss in found.measurement.losses)
    assert Measured.from_json(found.to_json()) == found
    again = measuring.estimate_again(found.measurement)
    assert [row.estimated for row in again.differences] == [row.estimated for row in found.differences]


@pytest.mark.parametrize(
    ("strategy", "ranks", "engine"),
    [
        (Strategy(kind="ddp"), 4, "DistributedDataParallel"),
        (Strategy(kind="zero3", offload_optimizer="cpu"), 8, "DeepSpeedEngine"),
        (Strategy(kind="fsdp"), 4, "FSDPLlamaForCausalLM"),
    ],
    ids=lambda value: value.kind if isinstance(value, Strategy) else "",
)
def test_engines_run_as_the_first_of_many(strategy: Strategy, ranks: int, engine: str, tmp_path: Path) -> None:
    """Their buffers are not counted on a CPU; but all else is as on a GPU."""
    model = case.model_spec(TINY).replace(source="random")
    strategy = launch.as_written(strategy)
    files = launch.files(
        model, TrainingSpec(seq_len=32, grad_accum_steps=2), parse_cluster(f"{ranks}xA100-80GB"), strategy,
        SoftwareSpec(),
    )  # fmt: skip
    job = Job(device="cpu", engine=strategy.kind, ranks=ranks, nodes=1, dtype="float32", config=model.config, steps=2)
    for name, text in (files | {"job.json": json.dumps(measure._plain(asdict(job)))}).items():
        (tmp_path / name).write_text(text)
    seen = measure._seen(tmp_path, 600)
    assert seen["status"] == "ok", seen
    assert seen["ran"]["engine"] == engine
    assert {"load", "first_step", "forward", "loss", "backward", "step", "idle"} <= seen["phases"].keys()


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "read_nvml", lambda: ())
    assert main(["measure", "openai-community/gpt2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no NVIDIA GPU" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--strategy", "zero2"], "--strategy"),
        (["--steps", "1"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--cap", "0"], "--cap"),
        (["--boundary", "rank"], "--boundary"),
        (["--boundary", "seq-len", "--diff"], "--diff"),
        (["--task", "load"], "--task"),
        (["--cap", "1"], "--cap"),
        (["--boundary", "seq-len"], "--boundary"),
        (["--boundary", "micro-batch", "--cap", "1"], "--boundary"),
        (["--mixed-precision", "fp16"], "--mixed-precision"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", "openai-community/gpt2", "--gpu", "cpu", *arguments]) == 2
    assert capsys.readouterr().err.startswith(named)


GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4,
    "vocab_size": 777, "n_positions": 200,
}  # fmt: skip


class Ended:
    """A run that has ended well before it began."""

    pid = 0

    def __init__(self, folder: Path, log: Path) -> None:
        record = {"status": "ok", "message": "", "versions": {}, "phases": {}}
        (folder / "record.json").write_text(json.dumps(record))

    def wait(self, timeout: float | None = None) -> int:
        return 0

    poll = wait


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (measure, detect):
        monkeypatch.setattr(module, "read_nvml", lambda: (fake_cuda.DEVICE,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("positions", "last"), [(200, 192), (40, 40)])
def test_a_search_ends_with_the_models_positions(positions: int, last: int) -> None:
    found = measuring.measure_boundary(GPT2 | {"n_positions": positions}, boundary="seq-len", start=Ended)
    assert (found.predicted, found.measured) == (last, last)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("training", "library"),
    [
        ({"lora": {"rank": 4}}, "peft"),
        ({"lora": {"rank": 4}, "quantization": {"kind": "nf4"}}, "bitsandbytes"),
        ({"optim": "paged_adamw_8bit"}, "bitsandbytes"),
        ({"attn": "flash_attention_2", "mixed_precision": "bf16"}, "flash_attn"),
        ({"liger": True}, "liger_kernel"),
    ],
)
def test_what_a_run_imports_has_to_be_there(
    training: dict[str, Any], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure.find_spec
    monkeypatch.setattr(measure, "find_spec", lambda name: None if name == library else real("json"))
    config = GPT2 if library != "liger_kernel" else TINY
    with pytest.raises(measure.LibraryError, match=f"^measure: {library} is not installed. Install it"):
        measuring.measure(config, {"seq_len": 64} | training, start=Ended)


def test_a_vocabulary_that_is_resized_is_not_compared_where_the_host_counts() -> None:
    """Both embeddings, their mean and covariance pass through the host; the estimate is of the GPU."""
    seen = {"load": {"allocated": 10}, "forward": {"allocated": 10}}
    estimate = api.estimate(GPT2, {"seq_len": 64, "vocab_size": 900}, {"gpu": "cpu"})
    for asked, names in (({"vocab_size": 900}, {"forward"}), ({}, {"load", "forward"})):
        measurement = Measurement(
            status="out-of-memory", message="", memplan="0", taken="", model={}, asked={"training": asked}, setup={},
            cluster={}, device={"name": "cpu"}, versions={}, group="none", weights="random", phases=seen,
        )  # fmt: skip
        assert {row.name for row in beside(estimate, measurement).differences} == names


@given(st.integers(1, 200), st.integers(-3, 203), st.integers(-1, 199))
def test_a_boundary_is_found_from_any_guess(number: int, guess: int, last: int) -> None:
    asked: list[int] = []

    def lives(value: int) -> bool:
        asked.append(value)
        return value <= 10 * last

    values = range(0, 10 * number, 10)
    assert boundary(values, guess, lives) == min(last, number - 1)
    assert len(asked) == len(set(asked))
    distance = abs(min(max(guess, 0), number - 1) - last)
    assert len(asked) <= 3 + 2 * max(distance, 1).bit_length()


def test_blocks_are_those_of_the_highest_moment() -> None:
    def event(action: str, address: int, size: int, file: str = "/x/transformers/models/a.py") -> dict[str, Any]:
        frames = [{"filename": file, "line": 7, "name": "forward"}]
        return {"action": action, "addr": address, "size": size, "frames": frames}

    trace = [
        event("alloc", 1, 512), event("alloc", 2, 1024), event("alloc", 3, 1024), event("free_completed", 2, 1024),
        event("free_requested", 3, 1024), event("alloc", 4, 512),
    ]  # fmt: skip
    site = "transformers/models/a.py:7 forward"
    assert blocks_at_peak({"device_traces": [trace]}) == [[1024, 2, site], [512, 1, site]]


def test_a_run_that_dies_is_a_result() -> None:
    assert _failure(MemoryError())["status"] == "out-of-memory"
    assert _failure(RuntimeError("CUDA error: out of memory"))["status"] == "out-of-memory"
    assert _failure(ValueError("no"))["status"] == "failed"


def test_a_loss_that_is_no_number_is_none() -> None:
    """Collectives of a group that is not there bring nothing, and JSON has no NaN."""
    history = [{"loss": 1.5}, {"loss": float("nan")}, {"eval_loss": 2.0}, {"loss": float("inf")}]
    assert losses(history) == [1.5, None, None]


def test_a_process_that_hangs_or_dies_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    seen = measure._seen(tmp_path, 60)
    assert seen["status"] == "failed"
    assert "JSONDecodeError" in seen["message"]


class Levels:
    """A meter with given readings."""

    def __init__(self, peaks: list[int]) -> None:
        self.peaks = peaks

    def start(self) -> None: ...

    def adopt(self, tensors: Any) -> None: ...

    def read(self) -> dict[str, int]:
        return {"allocated": self.peaks.pop(0)}

    def level(self) -> dict[str, int]:
        return {"allocated": 1}

    def synchronize(self) -> None: ...


def test_a_run_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    """It has a session of its own, which neither a terminal nor a scheduler ends with the command."""
    (tmp_path / "job.json").write_text(json.dumps({"device": "cpu", "ranks": 1, "engine": "single", "snapshot": False}))
    (tmp_path / "train.py").write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    code = "import sys; from pathlib import Path; from memplan.introspect import measure; "
    code += "measure._seen(Path(sys.argv[1]), 600)"
    asking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    until = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    asking.kill()
    asking.wait()
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_phases_hold_their_own_peaks() -> None:
    recorder = Recorder(Levels([5, 6, 7, 8, 9, 10, 3, 4, 11]))
    recorder.begin_step()  # load: 5
    recorder.within_step("backward")  # first step: 6
    recorder.end_step()  # first step: 7
    recorder.begin_step()  # fetching: 8
    recorder.within_step("loss")  # forward: 9
    recorder.within_step("backward")  # loss: 10
    recorder.end_step()  # backward: 3
    recorder.enter("save")  # fetching: 4
    recorder.close()  # save: 11
    found = {name: counters["allocated"] for name, counters in recorder.peaks.items()}
    assert found == {"load": 5, "first_step": 7, "idle": 1, "forward": 9, "loss": 10, "backward": 3, "save": 11}
    assert len(recorder.seconds) == 2


def test_a_loss_within_forward_is_compared_with_both() -> None:
    estimate = api.estimate(T5, {"seq_len": 40}, {"gpu": "cpu"})
    named = {phase.name: phase.allocated for phase in estimate.gpu.phases}
    seen = Measurement(
        status="ok", message="", memplan="0", taken="", model={}, asked={}, setup={}, cluster={}, device={},
        versions={}, group="none", weights="random", phases={"forward": {"allocated": 10}},
    )  # fmt: skip
    rows = {row.name: row.estimated for row in beside(estimate, seen).differences}
    assert rows["forward"] == max(named["forward"], named["loss"])
    dead = beside(estimate, seen.model_copy(update={"status": "out-of-memory"}))
    assert [row.name for row in dead.differences] == ["forward"]


def test_a_job_needs_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(device="cpu", engine="single", ranks=1, nodes=1, dtype="float32", config={})
    measure.needs(job)
    with pytest.raises(SpecError, match="counted on a CPU"):
        measure.needs(replace(job, engine="fsdp"))
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    with pytest.raises(Exception, match="torch, transformers, accelerate are not installed"):
        measure.needs(job)


def test_resident_memory_has_a_peak_of_its_own_between_two_questions() -> None:
    resident("peak")
    large = b"x" * (64 << 20)
    filled = resident()
    del large
    peak = resident("peak")
    assert peak >= filled - (1 << 20)  # the kernel counts per processor
    assert resident("peak") <= peak - (32 << 20)

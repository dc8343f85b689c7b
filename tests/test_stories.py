"""The runs of docs/stories.md: what fits, and which bytes decide it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import memplan
from memplan.errors import UnsupportedError
from memplan.units import GiB

ROOT = Path(__file__).parents[1]


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stories = script("docs/generate_stories.py")
HEADS, LAYERS = 32, 24


@pytest.mark.parametrize("lora", [True, False])
def test_eager_attention_ends_at_1024_tokens_and_sdpa_does_not(lora: bool) -> None:
    verdicts = {
        attn: [stories.phi(length, lora, attn, False, stories.OFFLOADED).verdict for length in stories.LENGTHS]
        for attn in ("eager", "sdpa")
    }
    assert verdicts["eager"] == ["fits", "does-not-fit", "does-not-fit", "does-not-fit"]
    assert verdicts["sdpa"] == ["fits"] * 4


def test_eager_attention_keeps_scores_in_float32_and_float16() -> None:
    """4 bytes of the softmax and 2 of its cast in every layer; sdpa keeps only the log-sum-exp of each row."""
    for length in (1024, 2048):
        eager, sdpa = (
            stories.phi(length, True, attn, False, stories.OFFLOADED).gpu.components for attn in ("eager", "sdpa")
        )
        scores = 6 * HEADS * length**2 * LAYERS
        assert eager.activations - sdpa.activations == pytest.approx(scores, rel=0.06)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("lora", [True, False])
def test_checkpointing_fits_every_length(lora: bool, attn: str) -> None:
    assert stories.phi(2048, lora, attn, True, stories.OFFLOADED).verdict == "fits"


def test_one_process_cannot_hold_the_states_of_full_fine_tuning() -> None:
    found = stories.phi(1024, False, "sdpa", True)
    assert found.verdict == "does-not-fit"
    parts = found.gpu.components
    assert parts.weights + parts.optimizer == pytest.approx(12 * found.model.parameters, rel=0.001)
    assert found.gpu.low > 16 * found.model.parameters
    assert stories.phi(2048, True, "sdpa", True).verdict == "fits"  # adapters have hardly any


def test_the_report_of_2023_ended_where_its_code_does() -> None:
    """Its attention stays in float16, so a score is 2 bytes: archived traces of that code."""
    rows = json.loads(stories.ARCHIVE.read_text(encoding="utf-8"))["rows"]
    by_setup = {(row["lora_rank"], row["seq_len"]): row for row in rows}
    assert [by_setup[8, length]["verdict"] for length in stories.LENGTHS] == ["fits", "fits", "fits", "tight"]
    assert by_setup[None, 1024]["verdict"] == "fits"
    now = [stories.phi(length, True, "eager", False, stories.OFFLOADED).gpu.components for length in (1024, 2048)]
    then = [by_setup[8, length]["components"]["activations"] for length in (1024, 2048)]
    grown = (now[1].activations - now[0].activations) - (then[1] - then[0])
    assert grown == pytest.approx(4 * HEADS * (2048**2 - 1024**2) * LAYERS, rel=0.03)


def test_deepspeed_counts_less_host_memory_than_is_allocated() -> None:
    found = stories.phi(1024, False, "eager", False, stories.OFFLOADED)
    with_head = 16 * 1.5 * found.model.parameters  # estimate_zero2_model_states_mem_needs, 0.19.8
    assert with_head / GiB == pytest.approx(31.7, abs=0.1)
    assert found.host.peak > with_head
    assert found.host.peak > 32e9


def test_two_gpus_do_not_share_what_a_sequence_leaves_behind() -> None:
    one, two = (stories.phi(1792, True, "eager", False, *how) for how in ((stories.OFFLOADED,), ({"kind": "zero3"}, 2)))
    assert {one.verdict, two.verdict} == {"does-not-fit"}
    assert two.gpu.low > one.gpu.low
    assert stories.phi(1792, True, "sdpa", False, stories.OFFLOADED).verdict == "fits"


@pytest.mark.parametrize("gpus", [1, 2])
def test_llama_in_full_needs_parameters_on_the_host_and_enough_of_it(gpus: int) -> None:
    fitting = {
        host: [each for each in stories.llama(gpus, host) if each.verdict == "fits"] for host in (64, 128, 160, 256)
    }
    assert not fitting[64]
    assert not fitting[128]
    for host in (160, 256):
        (found,) = fitting[host]
        assert found.setup["offload_optimizer"] == found.setup["offload_param"] == "cpu"
        assert 128 * GiB < found.host.peak < 160 * GiB
    last = stories.llama(gpus, 64)[-1]
    assert last.gpu.high < 24e9  # the host alone says no
    assert last.verdict == "does-not-fit"


def test_nvme_takes_what_the_host_cannot() -> None:
    fitting = [each for each in stories.llama(2, 64, 500) if each.verdict == "fits"]
    assert [each.setup["offload_param"] for each in fitting] == ["nvme"]
    assert fitting[0].nvme.bytes > 12 * 6.7e9


def test_chatglm3_is_refused_with_a_remedy() -> None:
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    }
    with pytest.raises(UnsupportedError, match=r"remote code is never run\. Give the config of a model") as refusal:
        memplan.estimate(config, {"lora": {"rank": 8}}, "1xT4")
    assert "chatglm" in str(refusal.value)


def test_chatglm3s_shapes_on_a_t4() -> None:
    found = stories.chatglm(1024, "zero2")
    assert found.model.parameters - found.model.trainable_parameters == 6_243_584_000  # as THUDM states it
    assert found.gpu.components.communication == pytest.approx(954 * 2**20, rel=0.001)  # the allocation that failed
    forward = next(phase.allocated for phase in found.gpu.phases if phase.name == "forward")
    assert forward / GiB == pytest.approx(12.31, abs=0.01)  # allocated when it did
    assert found.verdict == "fits"
    assert stories.chatglm(1024, "zero2", "torch=1.12,cuda=11.3").verdict == "tight"
    assert stories.chatglm(1024).verdict == "does-not-fit"  # float32 weights
    assert stories.chatglm(2048, quantization="nf4").verdict == "fits"


def test_the_docs_show_these_tables() -> None:
    page = stories.PAGE.read_text(encoding="utf-8")
    for name, table in stories.tables():
        assert stories.block(page, name) == table, "python docs/generate_stories.py writes it anew"

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import memplan
from memplan import advice, api, case, space
from memplan.catalog import detect
from memplan.catalog.detect import Device
from memplan.catalog.gpus import all_gpus, find_gpu
from memplan.errors import ResolutionError, SpecError, UnsupportedError
from memplan.results import Estimate
from memplan.specs import ClusterSpec, LoraSpec, ModelSpec, SoftwareSpec, Strategy, TrainingSpec
from memplan.units import GiB, MiB

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
"""95 k parameters: any GPU holds it, and a gpu_memory of 1 GiB."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and a machine without a GPU."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        Device(name="NVIDIA A100-SXM4-80GB", uuid=f"GPU-{i}", memory=81920 * MiB, reserved=871 * MiB) for i in (0, 1)
    ]
    monkeypatch.setattr(detect, "read_nvml", lambda: cards)


# -- models


def test_a_model_may_be_an_id_a_path_a_mapping_or_a_spec(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    spec = ModelSpec(id="mine", model_type="llama", architecture="LlamaForCausalLM", config=TINY, source="test")
    results = [api.estimate(model, cluster="T4") for model in (tmp_path, str(tmp_path / "config.json"), TINY, spec)]
    assert len({result.gpu for result in results}) == 1
    sources = [f"path:{tmp_path}", f"path:{tmp_path}/config.json", "mapping", "test"]
    assert [result.model.source for result in results] == sources
    assert [result.model.id for result in results][2:] == ["config", "mine"]
    assert api.estimate("meta-llama/llama-2-7b", cluster="H200").model.parameters == 6_738_415_616


@pytest.mark.parametrize("changes", [{"auto_map": {"AutoModel": "x.Y"}, "model_type": "new"}, {"vision_config": {}}])
def test_a_mapping_is_checked_like_a_file(changes: dict) -> None:
    with pytest.raises(UnsupportedError):
        api.estimate(TINY | changes, cluster="T4")


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(SpecError, match=r"model: 7 is not a model\. Give a hub id"):
        api.estimate(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [api.estimate, api.ladder])
@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_trace_names_its_extra(call, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    with pytest.raises(UnsupportedError, match=rf"{missing}.*pip install 'memplan\[train\]'"):
        call(TINY, trace=True)


def test_a_module_is_traced_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = ModuleType("torch")
    torch.nn = SimpleNamespace(Module=type("Module", (), {}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"memplan\[train\]"):
        api.estimate(torch.nn.Module())


# -- clusters


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"grad_accum_steps": 3}])
def test_a_loop_that_keeps_outputs_holds_them_through_forward_and_backward(changes: dict) -> None:
    """Those of the micro-batch before until the next ones have the name, which its backward then finds alive."""
    training = TrainingSpec(micro_batch_size=2, seq_len=512, dtype="bfloat16", mixed_precision="no", **changes)
    plain, keeps = (
        {phase.name: phase.allocated for phase in api.estimate(TINY, each, "A100-80GB").gpu.phases}
        for each in (training, training.replace(keeps_outputs=True))
    )
    logits = 2 * 512 * 512 * 2
    assert [keeps[name] - plain[name] for name in ("forward", "loss", "backward")] == [logits] * 3
    assert keeps["step"] - plain["step"] == (0 if "grad_accum_steps" in changes else logits)
    fused = training.replace(liger=True)
    assert api.estimate(TINY, fused.replace(keeps_outputs=True)).gpu == api.estimate(TINY, fused).gpu


def test_a_cluster_may_be_text_or_a_spec() -> None:
    text = api.estimate(TINY, cluster="2x2xa100-80gb")
    spec = api.estimate(TINY, cluster=ClusterSpec(gpu="A100 80GB", gpus=4, nodes=2))
    assert text == spec
    assert (text.cluster["gpus"], text.cluster["nodes"], text.cluster["gpu"]) == (4, 2, "A100-80GB")
    assert text.gpu.capacity == find_gpu("A100-80GB").memory_bytes


def test_an_unknown_gpu_or_cluster_is_refused() -> None:
    with pytest.raises(ResolutionError, match="gpu: 'B20'"):
        api.estimate(TINY, cluster="2xB20")
    with pytest.raises(SpecError, match=r"cluster: 4 is not a spec\. Write it as 2xA100-80GB"):
        api.estimate(TINY, cluster=4)  # type: ignore[arg-type]


def test_without_a_gpu_the_verdict_is_unknown() -> None:
    result = api.estimate(TINY)
    assert (result.verdict, result.gpu.capacity, result.cluster["gpu"]) == ("unknown", None, None)
    assert api.estimate(TINY, cluster=ClusterSpec(gpu_memory="24GiB")).verdict == "fits"


@pytest.mark.usefixtures("two_gpus")
def test_this_machine_is_used_where_no_gpu_is_named() -> None:
    here = api.estimate(TINY)
    assert (here.cluster["gpu"], here.cluster["gpus"], here.setup["strategy"]) == ("A100-80GB", 2, "ddp")
    assert here.gpu.capacity == (81920 - 871) * MiB
    assert here.host.capacity == detect.host_memory()
    assert api.estimate(TINY, cluster=ClusterSpec(gpus=1)).cluster["gpus"] == 1
    assert api.estimate(TINY, cluster=ClusterSpec(gpu_memory="8GiB")).gpu.capacity == 8 * GiB


@pytest.mark.usefixtures("two_gpus")
def test_more_gpus_than_there_are_is_another_machine() -> None:
    more = api.estimate(TINY, cluster=ClusterSpec(gpus=8))
    assert (more.cluster["gpu"], more.cluster["gpus"], more.host.capacity) == ("A100-80GB", 8, None)


@pytest.mark.usefixtures("two_gpus")
def test_the_disk_of_this_machine_is_measured(tmp_path: Path) -> None:
    assert api.estimate(TINY, cluster=ClusterSpec(nvme_path=str(tmp_path))).nvme.capacity
    with pytest.raises(SpecError, match="nvme_path: '/no/such/folder'"):
        api.estimate(TINY, cluster=ClusterSpec(nvme_path="/no/such/folder"))
    elsewhere = ClusterSpec(gpu="H200", nvme_path="/no/such/folder")
    assert api.estimate(TINY, cluster=elsewhere).nvme.capacity is None


# -- strategy, software


def test_the_strategy_defaults_to_the_number_of_gpus() -> None:
    assert api.estimate(TINY, cluster="T4").setup["strategy"] == "single"
    assert api.estimate(TINY, cluster="2xT4").setup["strategy"] == "ddp"


def test_software_may_be_text() -> None:
    result = api.estimate(TINY, cluster="T4", software="transformers=4.46")
    assert result.software["transformers"] == "4.46"
    assert result == api.estimate(TINY, cluster="T4", software=SoftwareSpec(transformers="4.46"))


def test_without_the_replay_reserved_is_an_upper_bound() -> None:
    replayed, bound = (api.estimate(TINY, cluster="T4", replay=replay) for replay in (True, False))
    assert replayed.gpu.peak_allocated <= replayed.gpu.peak_reserved <= bound.gpu.peak_reserved


def test_specs_may_be_mappings_or_short_for_one() -> None:
    spelled = api.estimate(
        TINY, TrainingSpec(seq_len=64, lora=LoraSpec(rank=4)), ClusterSpec(gpu="T4", gpus=2), Strategy(kind="ddp"),
        software=SoftwareSpec(torch="2.5"),
    )  # fmt: skip
    training = {"seq_len": 64, "lora": {"rank": 4}}
    short = api.estimate(TINY, training, {"gpu": "T4", "gpus": 2}, "ddp", software={"torch": "2.5"})
    assert short == spelled
    assert api.estimate(TINY, training, "2xT4", {"kind": "ddp"}, software="torch=2.5") == spelled
    assert api.ladder(TINY, training, "2xT4", software={"torch": "2.5"}).estimates[0] == spelled
    assert advice.advise(short, TINY, training, "2xT4", "ddp") == advice.Advice()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": {"seq_length": 64}}, "^seq_length: 64 is given to a field that TrainingSpec does not have. Did"),
        ({"training": "fast"}, "^training: 'fast' is not a spec. Give a TrainingSpec, or its fields as a mapping.$"),
        ({"strategy": "zero9"}, "^kind: 'zero9' is not a choice. Use 'single', 'ddp'"),
        ({"strategy": 3}, "^strategy: 3 is not a spec. Give a kind, as in ddp"),
        ({"software": {"torhc": "2"}}, "^torhc: '2' is given to a field that SoftwareSpec does not have. Did you mean"),
        ({"software": {"torch": 2.5}}, "^torch: 2.5 is refused"),
        ({"software": 5}, "^software: 5 is not a spec. Write it as torch=2.13"),
        ({"cluster": {"gpu": "T4", "gpus": 0}}, "^gpus: 0 is not a positive integer"),
    ],
)
def test_what_is_no_spec_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        api.estimate(TINY, **arguments)


# -- the setup


def test_the_setup_has_every_option_that_decides_the_estimate() -> None:
    from memplan import cli

    aside = {"software", "explain", "json"}  # its own field; two that change the page only
    for task in ("train", "load", "generate"):
        result = api.estimate(TINY, TrainingSpec(task=task), "T4")
        assert set(result.setup) == {option.name for option in cli.OPTIONS} - aside


def test_the_setup_is_resolved() -> None:
    lora = LoraSpec(rank=4, bias="none", modules_to_save=("lm_head",))
    asked = TrainingSpec(lora=lora, quantization="nf4", gradient_checkpointing=True, seq_len=64)
    setup = api.estimate(TINY | {"torch_dtype": "float16"}, asked, "2xA100-80GB", replay=False).setup
    expected = {
        "dtype": "float16", "mixed_precision": "bf16", "head": "causal-lm", "vocab_size": 512,
        "lora_targets": ("q_proj", "v_proj"), "lora_bias": "none", "lora_modules_to_save": ("lm_head",),
        "lora_autocast_adapter_dtype": True, "prepare_for_kbit_training": True, "bnb_4bit_compute_dtype": "bfloat16",
        "peft_module_casting_to_bf16": False, "bf16_adapters": False,
        "trace": False, "no_replay": True, "strategy": "ddp",
    }  # fmt: skip
    assert {name: setup[name] for name in expected} == expected
    assert setup["engine_config"]["bucket_cap_mb"] == 25
    resized = api.estimate(TINY, TrainingSpec(vocab_size=600), "T4").setup
    assert (resized["vocab_size"], resized["engine_config"], resized["no_replay"]) == (600, None, False)
    generated = api.estimate(TINY, TrainingSpec(task="generate"), "T4").setup
    assert (generated["max_new_tokens"], generated["optim"], generated["liger"]) == (20, None, None)


# -- the ladder


def setups(*estimates: Estimate) -> list[tuple]:
    names = ("strategy", "micro_batch_size", "grad_accum_steps", "gradient_checkpointing")
    return [tuple(estimate.setup[name] for name in names) for estimate in estimates]


def test_the_ladder_goes_from_the_setup_as_asked_to_the_smallest() -> None:
    training = TrainingSpec(micro_batch_size=4, grad_accum_steps=2, seq_len=128)
    ladder = api.ladder(TINY, training, "2xT4")
    plain = [("ddp", 4, 2, False), ("ddp", 1, 8, False), ("ddp", 1, 8, True)]
    sharded = [(kind, 1, 8, True) for kind in ("zero1", "zero2", "zero2", "zero3", "zero3", "zero3")]
    assert setups(*ladder.estimates) == plain + sharded
    activations = [estimate.gpu.components.activations for estimate in ladder.estimates[:3]]
    assert activations == sorted(activations, reverse=True)
    places = [(each.setup["offload_optimizer"], each.setup["offload_param"]) for each in ladder.estimates[3:]]
    assert places == [("none", "none")] * 2 + [("cpu", "none"), ("none", "none"), ("none", "cpu"), ("cpu", "cpu")]
    assert ladder.estimates[0] == api.estimate(TINY, training, "2xT4")


def test_rungs_that_change_nothing_are_left_out() -> None:
    assert len(api.ladder(TINY, cluster="T4").estimates) == 4
    for checkpointing in (True, False):
        asked = TrainingSpec(gradient_checkpointing=checkpointing)
        ladder = api.ladder(TINY, asked, "T4")
        assert [estimate.setup["gradient_checkpointing"] for estimate in ladder.estimates] == [checkpointing] * 3


def test_rungs_that_are_refused_or_not_modelled_are_left_out() -> None:
    def kinds(**training: Any) -> list[str]:
        ladder = api.ladder(TINY, TrainingSpec(gradient_checkpointing=True, **training), "2xT4", replay=False)
        return [f"{each.setup['strategy']} {each.setup['offload_optimizer']}" for each in ladder.estimates]

    everything = ["ddp none", "zero1 none", "zero2 none", "zero2 cpu", "zero3 none", "zero3 none", "zero3 cpu"]
    assert kinds() == kinds(eval_batch_size=1) == kinds(liger=True) == kinds(lora=8, quantization="nf4") == everything
    assert kinds(optim="muon") == ["ddp none"]


def test_one_gpu_may_offload() -> None:
    cluster = ClusterSpec(gpu="T4", nvme="1TiB")
    ladder = api.ladder(TINY, TrainingSpec(gradient_checkpointing=True), cluster, replay=False)
    places = [
        [each.setup[name] for name in ("strategy", "offload_optimizer", "offload_param")] for each in ladder.estimates
    ]
    assert places == [
        ["single", "none", "none"],
        ["zero2", "cpu", "none"],
        ["zero3", "cpu", "cpu"],
        ["zero3", "nvme", "cpu"],
        ["zero3", "nvme", "nvme"],
    ]


def test_the_best_of_a_ladder_that_does_not_fit_lacks_least() -> None:
    cluster = ClusterSpec(gpu="T4", gpus=2, host_memory="64GiB")
    ladder = api.ladder(LLAMA, TrainingSpec(), cluster, replay=False)
    assert ladder.verdict == "does-not-fit"
    assert ladder.best == ladder.estimates[-1]
    assert ladder.best.setup["offload_param"] == "cpu"


def test_a_strategy_that_does_not_fit_is_given_the_first_rung_that_does() -> None:
    result = api.estimate(LLAMA, cluster="2xA100-80GB", strategy="ddp", replay=False)
    assert (
        "--strategy zero3 --gradient-checkpointing"
        in advice.advise(result, LLAMA, cluster="2xA100-80GB", strategy="ddp").options
    )
    fits = api.estimate(LLAMA, TrainingSpec(gradient_checkpointing=True), "2xA100-80GB", "zero3")
    assert fits.verdict == "fits"


def test_loading_and_generation_have_one_rung() -> None:
    for task in ("load", "generate"):
        training = TrainingSpec(task=task, micro_batch_size=4)
        assert space.rungs(space.Setup(training, Strategy())) == (space.Setup(training, Strategy()),)


# -- advice

LLAMA = "meta-llama/Llama-2-7b"
LONG = TrainingSpec(seq_len=256)


def advised(result, training: TrainingSpec, cluster: str | None, strategy: Strategy | None = None) -> advice.Advice:
    return advice.advise(result, LLAMA, training, cluster, strategy)


def test_what_is_advised_fits() -> None:
    cluster = ClusterSpec(gpu="A100-80GB", gpu_memory="48GiB", host_memory="64GiB")
    result = api.ladder(LLAMA, LONG, cluster)
    assert result.verdict == "does-not-fit"
    found = advice.advise(result, LLAMA, LONG, cluster)
    assert "--lora-rank 16" in found.options
    assert api.estimate(LLAMA, LONG.replace(lora=LoraSpec(rank=16)), cluster).verdict == "fits"
    sizes = [find_gpu(name).memory_bytes for name in found.gpus[0]]
    assert sizes == sorted(sizes)
    assert {api.estimate(LLAMA, LONG, name, replay=False).verdict for name in found.gpus[0]} <= {"fits", "tight"}
    assert api.estimate(LLAMA, LONG, found.gpus[0][0]).verdict == "fits"


def test_no_smaller_gpu_than_the_smallest_advised_fits() -> None:
    unknown = api.ladder(LLAMA, LONG)
    found = advised(unknown, LONG, None)
    assert len(found.gpus) == len(unknown.estimates)
    smallest = find_gpu(found.gpus[0][0])
    smaller = [gpu for gpu in all_gpus() if gpu.memory_bytes < smallest.memory_bytes]
    assert smaller
    assert not any(api.estimate(LLAMA, LONG, ClusterSpec(gpu=gpu)).verdict == "fits" for gpu in smaller[-6:])


def test_gpus_of_a_kind_that_cannot_fit_are_not_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Strategy(kind="zero3", offload_optimizer="cpu", offload_param="cpu")  # between steps it holds little
    cluster = ClusterSpec(gpu="T4", gpus=8, host_memory="512GiB")
    training = TrainingSpec(seq_len=2048, attn="eager")
    result = api.estimate(LLAMA, training, cluster, strategy)
    assert result.verdict == "does-not-fit"
    tried: list[str] = []
    fits = case.Case.fits
    monkeypatch.setattr(case.Case, "fits", lambda case, setup: tried.append(case.cluster.gpu.name) or fits(case, setup))
    found = advice.advise(result, LLAMA, training, cluster, strategy)
    monkeypatch.undo()
    gpus = sorted(all_gpus(), key=lambda gpu: gpu.memory_bytes)
    names = [gpu.name for gpu in gpus if gpu.memory_bytes < find_gpu(found.gpus[0][0]).memory_bytes]
    assert len(set(tried) & set(names)) < 0.5 * len(names)
    for name in names[-4:]:
        assert api.estimate(LLAMA, training, cluster.replace(gpu=name), strategy).verdict != "fits"


def test_no_advice_where_it_fits_or_the_device_has_no_size() -> None:
    assert advice.advise(api.estimate(TINY, cluster="T4"), TINY, cluster="T4") == advice.Advice()
    cpu = api.estimate(TINY, cluster="cpu")
    if cpu.verdict == "unknown":
        assert advice.advise(cpu, TINY, cluster="cpu") == advice.Advice()


def test_a_remedy_contains_no_other() -> None:
    cluster = ClusterSpec(gpu="A100-80GB", gpu_memory="79GiB")
    training = TrainingSpec(micro_batch_size=4)
    strategy = Strategy()
    result = api.estimate(LLAMA, training, cluster, strategy, replay=False)
    options = [set(each.split("--")[1:]) for each in advice.advise(result, LLAMA, training, cluster, strategy).options]
    assert options
    assert not any(a < b for a in options for b in options)


def test_bfloat16_is_not_advised_to_a_gpu_without_it() -> None:
    training = TrainingSpec(seq_len=128)
    result = api.estimate(LLAMA, training, "T4", replay=False)
    assert result.verdict == "does-not-fit"
    assert not any("bfloat16" in options for options in advice.advise(result, LLAMA, training, "T4").options)


@pytest.mark.parametrize(
    ("field", "strategy"),
    [("micro_batch_size", "single"), ("grad_accum_steps", "single"), ("micro_batch_size", "zero2")],
)
def test_what_no_gpu_will_ever_hold_does_not_fit(field: str, strategy: str) -> None:
    gpus = 1 if strategy == "single" else 2
    found = api.estimate(TINY, {"seq_len": 64, field: 10**12}, ClusterSpec(gpu="T4", gpus=gpus), strategy)
    assert found.verdict == "does-not-fit"
    assert found.gpu.low <= found.gpu.high


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_predictions_of_very_many_batches_do_not_fit(strategy: str) -> None:
    """What is kept of all batches is made anew with each: in sum more than the addresses of a replay."""
    run = {"seq_len": 1024, "eval_batch_size": 64, "eval_accumulation_steps": 2**16}
    found = api.estimate(TINY, run, "2xT4", strategy)
    assert found.verdict == "does-not-fit"
    assert found.gpu.low <= found.gpu.high


@pytest.mark.parametrize(("model", "tokens"), [("gpt2", 1024), ("FacebookAI/roberta-base", 512), ("t5-small", 2048)])
def test_a_length_that_nobody_gives_has_positions(model: str, tokens: int) -> None:
    found = memplan.estimate(model, cluster="1xT4", replay=False)
    assert found.setup["seq_len"] == tokens
    notes = [each.value for each in found.assumptions if each.name == "seq_len (tokens)"]
    assert notes == ([] if tokens == 2048 else [tokens])
    assert memplan.plan(model, cluster="1xT4").rungs[0].estimate.setup["seq_len"] == tokens


def test_a_prompt_that_nobody_gives_leaves_positions_for_what_is_generated() -> None:
    found = memplan.estimate("gpt2", {"task": "generate", "max_new_tokens": 100}, "1xT4", replay=False)
    assert found.setup["seq_len"] == 925
    with pytest.raises(SpecError, match="1123 is longer than the model's table of 1024 positions"):
        memplan.estimate("gpt2", {"task": "generate", "seq_len": 1024, "max_new_tokens": 100}, "1xT4", replay=False)

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

import memplan
from memplan import api, cli, planning
from memplan.catalog import detect
from memplan.catalog.gpus import all_gpus
from memplan.catalog.models import all_models
from memplan.results import Estimate, EstimateList
from memplan.specs import LoraSpec, Strategy, TrainingSpec

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {
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
LLAMA = "meta-llama/Llama-2-7b"


class Result:
    """What a command wrote, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.err == ""
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in a folder with a tiny model, without hub and without GPU."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(detect, "read_nvml", lambda: ())
    monkeypatch.chdir(tmp_path)
    write("tiny")

    def call(*arguments: str) -> Result:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write(folder: str, config: object = TINY, **changes: Any) -> str:
    """Write a config.json and return its folder; a field set to None is left out."""
    Path(folder).mkdir(exist_ok=True)
    if isinstance(config, dict):
        config = {name: value for name, value in (config | changes).items() if value is not None}
    text = config if isinstance(config, str) else json.dumps(config)
    Path(folder, "config.json").write_text(text)
    return folder


def refused(result: Result) -> str:
    """The one message of a command that was given bad input."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err
    assert "Usage" not in result.err
    return result.err.removesuffix("\n")


# -- answers


def test_the_ladder_is_the_answer_without_a_strategy(run) -> None:
    result = run("estimate", "tiny", "--gpu", "T4", "--json")
    assert result.code == 0
    assert list(result.json) == ["schema_version", "estimates"]
    assert EstimateList.from_json(result.out) == api.ladder("tiny", cluster="T4")


def test_a_strategy_has_one_answer(run) -> None:
    result = run("estimate", "tiny", "--gpu", "T4", "--gpus", "2", "--strategy", "ddp", "--json")
    assert Estimate.from_json(result.out) == api.estimate("tiny", cluster="2xT4", strategy=Strategy(kind="ddp"))


def test_every_option_reaches_its_field(run) -> None:
    result = run(
        "estimate", "tiny", "--gpu", "H100-80GB", "--gpus", "4", "--nodes", "2", "--gpu-memory", "60",
        "--host-memory", "512GiB", "--nvme", "1e3", "--nvme-path", "/nvme", "--strategy", "ddp",
        "--offload-optimizer", "none", "--offload-param", "none", "--dtype", "bfloat16", "--mixed-precision", "no",
        "--micro-batch-size", "3", "--seq-len", "64", "--grad-accum-steps", "5", "--optim", "sgd", "--padded",
        "--attn", "eager", "--gradient-checkpointing", "--liger", "--head", "causal-lm", "--vocab-size", "600",
        "--eval-batch-size", "2", "--lora-rank", "7", "--lora-targets", "q_proj, v_proj",
        "--lora-dropout", "0.1", "--quantization", "none", "--task", "train",
        "--software", "transformers=5.1,torch=2.5", "--no-replay", "--json",
    )  # fmt: skip
    training = TrainingSpec(
        dtype="bfloat16", mixed_precision="no", micro_batch_size=3, seq_len=64, grad_accum_steps=5, optim="sgd",
        packed=False, attn="eager", gradient_checkpointing=True, liger=True, head="causal-lm", vocab_size=600,
        eval_batch_size=2, lora=LoraSpec(rank=7, targets=("q_proj", "v_proj"), dropout=0.1),
    )  # fmt: skip
    cluster = memplan.ClusterSpec(
        gpu="H100-80GB", gpus=4, nodes=2, gpu_memory="60GiB", host_memory="512GiB", nvme="1000GiB", nvme_path="/nvme"
    )
    expected = api.estimate(
        "tiny", training, cluster, Strategy(kind="ddp"), software="transformers=5.1,torch=2.5", replay=False
    )
    assert Estimate.from_json(result.out) == expected


def test_options_that_every_field_of_the_specs_needs() -> None:
    options = {option.name for option in cli.OPTIONS}
    training = set(TrainingSpec.model_fields) - {"lora"} | {"lora_rank", "lora_targets", "lora_dropout"}
    cluster = set(memplan.ClusterSpec.model_fields)
    strategy = {"strategy", "offload_optimizer", "offload_param", "engine_config"}
    assert options == training | cluster | strategy | {"software", "trace", "no_replay", "explain", "json"}


def choices(annotation: Any) -> set[str]:
    """The texts of all literals in a type."""
    return {annotation} if isinstance(annotation, str) else {c for each in get_args(annotation) for c in choices(each)}


@pytest.mark.parametrize("option", [option for option in cli.OPTIONS if "|" in option.metavar], ids=lambda o: o.name)
def test_the_choices_in_the_help_are_those_of_the_specs(option: cli.Option) -> None:
    fields = {**TrainingSpec.model_fields, **Strategy.model_fields, "strategy": Strategy.model_fields["kind"]}
    known = choices(fields[option.name].annotation)
    if option.name == "quantization":
        known = choices(memplan.QuantizationSpec.model_fields["kind"].annotation)
    assert set(option.metavar.split("|")) == known


def test_the_defaults_in_the_help_are_those_of_the_specs() -> None:
    defaults = {name: field.default for name, field in {**TrainingSpec.model_fields, **Strategy.model_fields}.items()}
    stated = {option.name: re.search(r"\(default: ([\w.]+)\)", option.help) for option in cli.OPTIONS}
    shown = {name: match[1] for name, match in stated.items() if match and name in defaults}
    assert {"micro_batch_size", "seq_len", "grad_accum_steps", "optim", "attn", "task"} <= set(shown)
    said = {"off": "False", "packed": "True"}
    for name, text in shown.items():
        default = "none" if name == "quantization" else str(defaults[name])
        assert said.get(text, text) == default, name


@pytest.mark.parametrize(
    ("arguments", "verdict", "code"),
    [
        (["tiny", "--gpu", "T4", "--host-memory", "64"], "fits", 0),
        (["tiny"], "unknown", 0),
        (["tiny", "--gpu", "T4", "--gpu-memory", "100MiB", "--host-memory", "64"], "does-not-fit", 1),
    ],
)
def test_exit_codes(run, arguments: list[str], verdict: str, code: int) -> None:
    for strategy in ([], ["--strategy", "single"]):
        result = run("estimate", *arguments, *strategy, "--json")
        assert result.code == code
        assert {each["verdict"] for each in result.json.get("estimates", [result.json])} == {verdict}


def test_tight_exits_with_3_and_a_list_with_its_best(run) -> None:
    gpu = run("estimate", "tiny", "--gpu", "T4", "--strategy", "single", "--json").json["gpu"]
    assert gpu["low"] < gpu["high"]
    tight = run("estimate", "tiny", "--gpu", "T4", "--strategy", "single", "--gpu-memory", f"{gpu['low']}B", "--json")
    assert (tight.code, tight.json["verdict"]) == (3, "tight")
    asked, smaller, *_ = (
        each["gpu"] for each in run("estimate", "tiny", "--gpu", "T4", "--seq-len", "4096", "--json").json["estimates"]
    )
    assert smaller["high"] < asked["high"]
    between = f"{smaller['high']}B"
    result = run("estimate", "tiny", "--gpu", "T4", "--seq-len", "4096", "--gpu-memory", between, "--json")
    assert result.code == 0
    first, second, *_ = (each["verdict"] for each in result.json["estimates"])
    assert (first != "fits", second) == (True, "fits")


def test_explain_is_in_json_only_when_asked_for(run) -> None:
    assert "explanation" not in run("estimate", "tiny", "--strategy", "single", "--json").json
    assert "explanation" in run("estimate", "tiny", "--strategy", "single", "--json", "--explain").json


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("arguments", [[], ["--gpu", "RTX3090"], ["--gpu", "H200", "--lora-rank", "16"]])
def test_the_table_fits_its_width(run, monkeypatch: pytest.MonkeyPatch, width: str, arguments: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", width)
    page = run("estimate", LLAMA, "--gpus", "2", "--no-replay", *arguments).out
    assert max(map(len, page.split("\n"))) <= int(width)
    assert "\x1b" not in page
    assert "verdict" in page
    assert re.search(r"6\.7\d B parameters", page)


def test_the_table_says_what_to_do_next(run) -> None:
    too_large = run("estimate", LLAMA, "--gpu", "RTX3090", "--strategy", "single")
    assert too_large.code == 1
    assert re.search(r"next +(add --|use |it needs a GPU of)", too_large.out)
    unknown = run("estimate", LLAMA)
    assert unknown.code == 0
    named = re.search(r"next +name yours with --gpu; it fits on ([\w-]+)", unknown.out)
    assert named
    assert named[1] in {gpu.name for gpu in all_gpus()}


def test_loading_has_one_answer(run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    one = api.estimate("tiny", cluster="T4")

    def estimate(model, training, cluster, strategy, **options) -> Estimate:
        asked.append((training.task, training.device_map, training.max_new_tokens, strategy, options["replay"]))
        return one

    monkeypatch.setattr(api, "estimate", estimate)
    run("estimate", "tiny", "--task", "load", "--device-map", "auto", "--gpus", "2", "--json")
    run("estimate", "tiny", "--task", "generate", "--max-new-tokens", "9", "--no-replay", "--json")
    assert asked == [("load", "auto", None, None, True), ("generate", None, 9, None, False)]


# -- compare


def test_compare(run) -> None:
    result = run("compare", "tiny", "--gpus", "4", "--nodes", "2", "--seq-len", "256", "--json")
    assert result.code == 0
    assert list(result.json) == ["schema_version", "model", "gpus", "nodes", "rows"]
    assert result.json == memplan.compare(TINY, {"seq_len": 256}, {"gpus": 4, "nodes": 2}).to_dict() | {
        "model": result.json["model"]
    }
    assert result.json["model"]["id"] == "tiny"
    tools = [row["tool"] for row in result.json["rows"]]
    assert {tool: tools.count(tool) for tool in tools} == {
        "accelerate": 12, "rule of thumb": 1, "memplan": 6, "DeepSpeed": 8,
    }  # fmt: skip


@pytest.mark.parametrize("width", ["80", "120"])
def test_compare_as_a_table(run, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    page = run("compare", "tiny", "--gpus", "2", "--no-replay").out
    assert max(map(len, page.split("\n"))) <= int(width)
    rows = memplan.compare(TINY, None, {"gpus": 2}, replay=False).rows
    for row in rows:
        assert all(part in page for part in row.option.split(", "))  # a row is broken between them
        assert all(word in page for word in row.leaves_out.split())
    assert all(f" {row.option} " in page for row in rows) == (width == "120")
    for tool in ("DeepSpeed", "memplan"):
        assert (
            len(re.findall(rf"^{tool} .* [\d.]+ +[\d.]+ +\d+$", page, re.MULTILINE))
            == {"DeepSpeed": 8, "memplan": 6}[tool]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace"], "--trace: true is for one estimate. Leave it out, or use memplan estimate --trace."),
        (["--explain"], "--explain: true is for one estimate. Leave it out, or use memplan estimate --explain."),
        (["--task", "generate"], "--task: 'generate' is not a training run, which compare is for. Leave it out"),
        (["--engine-config", "x.json"], "--engine-config: 'x.json' does not exist. Give the path of a file."),
        (["--gpus", "3", "--nodes", "2"], "--gpus: 3 cannot be shared evenly by 2 nodes."),
        (["--gpus", "0"], "--gpus: 0 is not a positive integer."),
        (["--head", "image-classification"], "--head: 'image-classification' does not exist for llama."),
        (["--lora-rank", "4", "--lora-targets", "q_prj"], "--lora-targets: 'q_prj' matches no module. Did you mean"),
        (["--strategy", "single", "--gpus", "2"], "--gpus: 2 is more than strategy single uses."),
        (["--strategy", "zero2", "--offload-param", "cpu"], "--offload-param: 'cpu' cannot go with zero2."),
        (["--strategy", "zero3", "--offload-optimizer", "disk"], "--offload-optimizer: 'disk' is not a choice."),
        (["--attn", "flash_attention_2", "--gpu", "T4"], "--attn: 'flash_attention_2' needs an NVIDIA GPU"),
        (["more"], "(more). See memplan compare --help."),
    ],
)
def test_bad_options_of_compare(run, arguments: list[str], message: str) -> None:
    result = run("compare", "tiny", *arguments)
    assert (result.code, result.out) == (cli.BAD_INPUT, "")
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_model_that_is_not_there_cannot_be_compared(run) -> None:
    result = run("compare", "nonesuch/model")
    assert (result.code, result.out) == (cli.BAD_INPUT, "")
    assert "nonesuch/model" in result.err


# -- the catalogs, the schema, the help


def test_gpus(run) -> None:
    listed = run("gpus", "--json").json
    assert [memplan.GPUSpec.from_dict(row) for row in listed["gpus"]] == list(all_gpus())
    page = run("gpus").out
    assert all(gpu.name in page for gpu in all_gpus())


def test_models(run) -> None:
    listed = run("models", "--json").json
    assert [row["id"] for row in listed["models"]] == [row.id for row in all_models()]
    assert listed["models"][0]["config"] == all_models()[0].config
    page = run("models").out
    assert all(row.id in page for row in all_models())


def test_schema_has_every_input_and_every_answer(run) -> None:
    schema = run("schema").json
    assert {"TrainingSpec", "Strategy", "ClusterSpec", "SoftwareSpec", "ModelSpec", "GPUSpec"} <= set(schema["$defs"])
    estimate = schema["$defs"]["Estimate"]
    data = run("estimate", "tiny", "--strategy", "single", "--json").json
    assert set(data) <= set(estimate["properties"])
    assert set(estimate["required"]) <= set(data)
    comparison = schema["$defs"]["Comparison"]
    data_of_comparison = run("compare", "tiny", "--json").json
    assert set(comparison["properties"]) == set(data_of_comparison)
    assert set(schema["$defs"]["ComparisonRow"]["properties"]) == set(data_of_comparison["rows"][0])
    gpu = schema["$defs"]["GpuMemory"]
    assert set(gpu["properties"]) == set(gpu["required"]) == set(data["gpu"])


def test_help(run) -> None:
    for arguments in ([], ["--help"]):
        result = run(*arguments)
        assert result.code == 0
        assert all(command in result.out for command in ("estimate", "compare", "models", "gpus", "schema"))
    page = run("estimate", "--help").out
    assert all(option.flag in page for option in cli.OPTIONS)
    assert max(map(len, page.split("\n"))) <= 80
    assert run("--version").out == f"memplan {memplan.__version__}\n"


def docs_script(name: str) -> Any:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_what_memplan_answers(run) -> None:
    module = docs_script("generate_demo")
    readme = module.README.read_text(encoding="utf-8")
    for arguments in module.SHOWN:
        shown = module.shown(arguments, run(*arguments).out)
        assert module.block(readme, arguments) == shown, "run python docs/generate_demo.py"
    command = " ".join(("memplan", *module.ESTIMATE))
    assert f"`{command}`" in readme
    assert f"/{command} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"$ {' '.join(('memplan', *module.PLAN))}\n" in readme


def test_the_page_of_the_command_line_is_current() -> None:
    module = docs_script("generate_cli")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/generate_cli.py"


# -- bad options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "0"], "--seq-len: 0 is not a positive integer. Use an integer from 1 to 1099511627776."),
        (["--seq-len", "-8"], "--seq-len: -8 is not a positive integer. Use an integer from 1 to"),
        (["--seq-len", "nan"], "--seq-len: nan is not a positive integer. Use"),
        (["--seq-len", "inf"], "--seq-len: inf is not a positive integer. Use"),
        (["--seq-len", "1e30"], "--seq-len: 1e+30 is not a positive integer. Use"),
        (["--seq-len", "10" * 20], "is not a positive integer. Use"),
        (["--seq-len", "9" * 5000], "is not a positive integer. Use"),
        (["--seq-len", "1.5"], "--seq-len: 1.5 is not a positive integer. Use"),
        (["--seq-len", "many"], "--seq-len: 'many' is not a positive integer. Use"),
        (["--seq-len", ""], "--seq-len: '' is not a positive integer. Use"),
        (["--micro-batch-size", "0"], "--micro-batch-size: 0 is not a positive integer. Use"),
        (["--grad-accum-steps", "-1"], "--grad-accum-steps: -1 is not a positive integer. Use"),
        (["--vocab-size", "nan"], "--vocab-size: nan is not a positive integer. Use"),
        (["--eval-batch-size", "0"], "--eval-batch-size: 0 is not a positive integer. Use"),
        (["--max-new-tokens", "0", "--task", "generate"], "--max-new-tokens: 0 is not a positive integer. Use"),
        (["--gpus", "0"], "--gpus: 0 is not a positive integer. Use"),
        (["--gpus", "3", "--nodes", "2"], "--gpus: 3 cannot be shared evenly by 2 nodes. Use a multiple of 2"),
        (["--lora-rank", "0"], "--lora-rank: 0 is not a positive integer. Use"),
        (["--lora-rank", "4", "--lora-dropout", "nan"], "--lora-dropout: nan is not a probability. Use a number"),
        (["--lora-rank", "4", "--lora-dropout", "-0.5"], "--lora-dropout: -0.5 is not a probability. Use a number"),
        (["--lora-targets", "q_proj"], "--lora-targets: 'q_proj' has no adapters to apply to. Give --lora-rank too."),
        (["--lora-rank", "4", "--lora-targets", "q_prj"], "--lora-targets: 'q_prj' matches no module. Did you mean"),
        (["--gpu-memory", "-1"], "--gpu-memory: '-1' is not a size. Use a finite number"),
        (["--gpu-memory", "nan"], "--gpu-memory: 'nan' is not a size. Write a number with a unit, as in 24GiB."),
        (["--gpu-memory", "1e30"], "--gpu-memory: '1e30' is not a size. Use a finite number"),
        (["--gpu-memory", "0"], "--gpu-memory: 0 is a size in bytes, and below 1 MiB. Write a unit"),
        (["--host-memory", "12 apples"], "--host-memory: '12 apples' has an unknown unit apples. Use B, KiB"),
        (["--nvme", "lots"], "--nvme: 'lots' is not a size. Write"),
        (["--gpu", "RTX3091"], "--gpu: 'RTX3091' is not in the catalog. Did you mean RTX3090"),
        (["--gpu", ""], "--gpu: '' is not a GPU. Name one"),
        (["--optim", "adamw_tocrh"], "--optim: 'adamw_tocrh' is not an optimizer of TrainingArguments. Did you mean"),
        (["--optim", "lomo"], "--optim: 'lomo' is known to transformers, but memplan has no rule"),
        (["--dtype", "fp8"], "--dtype: 'fp8' is not a choice. Use 'auto', 'float32', 'bfloat16' or 'float16'."),
        (["--mixed-precision", "yes"], "--mixed-precision: 'yes' is not a choice. Use 'no', 'bf16' or 'fp16'."),
        (["--strategy", "zero4"], "--strategy: 'zero4' is not a choice. Use 'single', 'ddp'"),
        (["--quantization", "int4"], "--quantization: 'int4' is not a choice. Use"),
        (["--quantization", "nf4"], "--quantization: 'nf4' has no trainable weights. Give --lora-rank"),
        (["--peft-type", "lora"], "--peft-type: 'lora' needs a rank. Give --lora-rank."),
        (["--eval-accumulation-steps", "4"], "has no evaluation to accumulate over. Give --eval-batch-size too."),
        (["--alloc-conf", "foo:1"], "--alloc-conf: 'foo' is not a setting of PYTORCH_ALLOC_CONF. Known: "),
        (["--alloc-conf", "max_split_size_mb:4"], "--alloc-conf max_split_size_mb: 4 is refused by torch. Use 21"),
        (["--lora-rank", "4", "--lora-targets", "all-linear,q_proj"], "--lora-targets: 'all-linear,q_proj' has all"),
        (["--strategy", "ddp", "--offload-optimizer", "cpu"], "cannot go with ddp. Use --strategy zero1, zero2 or"),
        (["--task", "load", "--strategy", "zero2"], "--strategy: 'zero2' has no use in task load. Leave it out, or"),
        (["--task", "load", "--optim", "sgd"], "--optim: 'sgd' has no use in task load. Leave it out, or use --task t"),
        (["--task", "load", "--trace"], "--trace: a training step can be traced, task load cannot. Leave --trace out"),
        (["--task", "load", "--nodes", "2", "--gpus", "2", "--device-map", "auto"], "--nodes: 2 is more than task"),
        (["--engine-config", "x.json"], "--engine-config: 'x.json' does not exist. Give the path of a file."),
        (["--head", "base"], "--head: 'base' has no loss to train. Use --head causal-lm or sequence-classification"),
        (["--task", "serve"], "--task: 'serve' is not a choice. Use 'train', 'load' or 'generate'."),
        (["--device-map", "auto"], "--device-map: 'auto' spreads one copy of the model, which task train does not."),
        (["--software", "torhc=2"], "--software: 'torhc' is not a library memplan knows. Did you mean torch?"),
        (["--offload-optimizer", "cpu"], "--offload-optimizer: 'cpu' needs an engine that offloads it. Use"),
        (["--strategy", "single", "--gpus", "2"], "--gpus: 2 is more than strategy single uses. Use --strategy ddp"),
        (["--micro-batch", "2"], "--micro-batch: is not an option of memplan estimate. Did you mean --micro-b"),
        (["--seq-len"], "--seq-len: has no value, or one where it takes none. See memplan"),
        (["--json=yes"], "--json: has no value, or one where it takes none. See memplan"),
        (["more"], "(more). See memplan estimate --help."),
    ],
)  # fmt: skip
def test_bad_options(run, arguments: list[str], message: str) -> None:
    assert message in refused(run("estimate", "tiny", *arguments))
    assert message in refused(run("estimate", "tiny", "--json", *arguments))


def test_bad_values_are_told_all_at_once_in_one_message(run) -> None:
    told = refused(run("estimate", "tiny", "--seq-len", "0", "--micro-batch-size", "x", "--attn", "fast"))
    assert "\n" not in told.strip()
    assert re.findall(r"(--\S+): ", told) == ["--micro-batch-size", "--seq-len", "--attn"]


def test_where_a_plan_is_written_is_looked_at_before_it_is_searched(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("memplan.planning.plan", lambda *_, **__: pytest.fail("searched"))
    for folder in ("file/run", "file"):
        told = refused(run("plan", "gpt2", "--gpu", "T4", "--out", str(tmp_path / folder)))
        assert told.startswith("--out: "), folder
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--engine-config", "ds_config.json"], "--engine-config: 'ds_config.json'"),
    ],
)
def test_what_is_not_modelled_is_refused_with_the_reason(run, arguments: list[str], reason: str) -> None:
    assert refused(run("estimate", "tiny", "--gpus", "2", *arguments)).startswith(reason)


def test_a_trace_answers_as_the_architecture_file_does(run) -> None:
    written, traced = (
        json.loads(run("estimate", "tiny", "--gpu", "T4", "--json", *more).out)["estimates"]
        for more in ([], ["--trace"])
    )
    assert len(traced) >= 3
    under = {mine["setup"]["strategy"] for mine in traced}  # rungs that a trace does not have are left out
    written = [other for other in written if other["setup"]["strategy"] in under]
    for mine, other in zip(traced, written, strict=True):
        assert mine["gpu"]["steady_allocated"] == pytest.approx(other["gpu"]["steady_allocated"], rel=2e-3)
        assert any(assumption["name"] == "trace" for assumption in mine["assumptions"])
    table = run("estimate", "tiny", "--gpu", "T4", "--trace")
    assert (table.code, table.err) == (0, "")


def test_a_trace_without_its_extra_names_the_extra(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    message = refused(run("estimate", "tiny", "--trace"))
    assert message.startswith("--trace: ")
    assert message.endswith("install the extra: pip install 'memplan[train]'.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimat"], "No such command 'estimat'. Did you mean 'estimate'?"),
        (["--versoin"], "--versoin: is not an option of memplan. Did you mean --version?"),
        (["estimate"], "MODEL: missing. A hub id, a folder or a config.json. See memplan estimate --help."),
        (["gpus", "--jsno"], "--jsno: is not an option of memplan gpus. Did you mean --json?"),
    ],
)
def test_bad_commands(run, arguments: list[str], message: str) -> None:
    assert refused(run(*arguments)) == message


# -- bad models


def test_half_a_model_is_not_taken_for_the_whole(run) -> None:
    t5 = {"model_type": "t5", "architectures": ["T5EncoderModel"], "d_model": 64, "num_layers": 2, "num_heads": 2}
    for task in ("train", "load"):
        message = refused(run("estimate", write("half", t5), "--gpu", "T4", "--task", task))
        assert message == (
            "architectures: 'T5EncoderModel' is half of a model, which is not modelled. "
            "Give --head seq2seq-lm, or --head base, for the whole model."
        )
    assert run("estimate", "half", "--gpu", "T4", "--head", "seq2seq-lm", "--json").code == 0
    encoder_only = refused(run("estimate", write("bare", {**t5, "architectures": ["T5Model"]}), "--gpu", "T4"))
    assert encoder_only == "--head: 'base' has no loss to train. Use --head seq2seq-lm, or --task load."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta-lama/Llama-2-7b", "model: 'meta-lama/Llama-2-7b' is not in the catalog or the local cache, and"),
        ("/no/such/folder", "model: '/no/such/folder' is neither an existing path nor a hub id."),
        ("", "model: '' is not a model. Give a hub id, a folder or a config.json."),
        ("https://huggingface.co/org/name", "Write org/name."),
        ("empty", "empty: is a folder without config.json. Give the folder that from_pretrained loads"),
    ],
)
def test_models_that_are_not_found(run, name: str, message: str) -> None:
    Path("empty").mkdir()
    assert message in refused(run("estimate", name, "--gpu", "T4"))


def test_an_unknown_model_has_its_nearest_names(run) -> None:
    assert "Did you mean meta-llama/Llama-2-7b" in refused(run("estimate", "meta-llama/Llama-2-7", "--gpu", "T4"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": None}, ["architectures: missing", "Add the field"]),
        ({"model_type": None}, ["model_type: missing", "Add the field"]),
        ({"architectures": []}, ["architectures", "names no class"]),
        ({"hidden_size": "64"}, ["hidden_size: '64' is not an integer", "Use an integer from"]),
        ({"hidden_size": 64.5}, ["hidden_size: 64.5 is not an integer"]),
        ({"hidden_size": [64]}, ["hidden_size: (64,) is not an integer"]),
        ({"hidden_size": 0}, ["hidden_size: 0 is out of range"]),
        ({"num_hidden_layers": -2}, ["num_hidden_layers: -2 is out of range"]),
        ({"vocab_size": float("nan")}, ["vocab_size: nan is not an integer"]),
        ({"vocab_size": 1e30}, ["vocab_size: 1e+30 is not an integer"]),
        ({"vocab_size": 10**30}, ["vocab_size: 1" + 30 * "0" + " is out of range"]),
        ({"hidden_size": 65}, ["hidden_size 65 is not divisible by num_attention_heads 4", "Correct"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4 is not divisible by num_key_value_heads 3", "Correct"]),
        ({"model_type": "lama"}, ["model_type: 'lama'"]),
        ({"vision_config": {"hidden_size": 8}}, ["is multimodal (llama with vision_config)"]),
        ({"model_type": "mine", "auto_map": {"AutoModel": "modeling_mine.Mine"}}, ["brings its own code (auto_map)"]),
    ],
    ids=str,
)
def test_configs_with_wrong_fields(run, changes: dict[str, Any], parts: list[str]) -> None:
    message = refused(run("estimate", write("wrong", **changes), "--gpu", "T4"))
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"hidden_size": 64',
            "is not JSON: Expecting ',' delimiter at line 1, column 19. It ends too early: fetch it",
        ),
        ('{"hidden_size": }', "is not JSON: Expecting value at line 1, column 17. Correct it there."),
        ("", "is not JSON"),
        ("[]", "holds an array, not an object."),
        ("\x00", "is not JSON"),
    ],
)
def test_configs_that_are_not_json_objects(run, text: str, message: str) -> None:
    assert message in refused(run("estimate", write("broken", text), "--gpu", "T4"))


def test_a_file_of_a_gigabyte_is_refused_unread(run) -> None:
    with Path("model.json").open("wb") as file:
        file.truncate(10**9)
    assert refused(run("estimate", "model.json")) == (
        "model.json: has 1000000000 bytes, too many for a config.json. Give the config, not the weights."
    )


def test_a_path_that_cannot_be_read(run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loop").symlink_to("loop")
    assert refused(run("estimate", "loop")).startswith("loop: ")
    opened = Path.open

    def denied(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", denied)  # a test may run as root, whom no mode stops
    message = refused(run("estimate", "tiny"))
    assert message == "tiny/config.json: cannot be read (permission denied). Check the path and its permissions."


def test_a_gated_model(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*args: Any, **options: Any) -> Any:
        raise GatedRepoError.__new__(GatedRepoError)  # its constructor wants a response, of another library by version

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, gated)
    message = refused(run("estimate", "org/gated", "--gpu", "T4"))
    assert "model: 'org/gated' is gated: the hub refused its config.json. Accept its licence at" in message
    assert "HF_TOKEN" in message


# -- the process


def memplan_process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(memplan.__file__).parents[1])}
    environment |= options.pop("env", {})
    command = [sys.executable, "-m", "memplan.cli", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write_end = os.pipe()
    os.close(read)
    process = memplan_process("models", "--json", stdout=write_end)
    os.close(write_end)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (cli.READER_GONE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        process = memplan_process("schema", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "stdout: cannot be written (No space left on device). Write the answer elsewhere.\n"


def test_an_output_without_unicode() -> None:
    process = memplan_process(
        "estimate", LLAMA, "--no-replay", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"}
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "#####" in out


def test_an_interrupt_ends_quietly(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "ladder", interrupted)
    result = run("estimate", "tiny")
    assert (result.code, result.out, result.err) == (cli.INTERRUPTED, "", "")


def test_a_bug_is_one_message_too(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(api, "ladder", broken)
    result = run("estimate", "tiny")
    assert (result.code, result.out) == (cli.INTERNAL, "")
    assert result.err.startswith("memplan: ZeroDivisionError: division by zero. This is a bug in memplan.")
    monkeypatch.setenv("MEMPLAN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("estimate", "tiny")


HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "peft", "numpy", "yaml", "huggingface_hub", "rich"}


@pytest.mark.parametrize(("command", "rows"), [("estimate", "estimates"), ("compare", "rows")])
def test_an_answer_in_json_imports_nothing_heavy(command: str, rows: str) -> None:
    code = (
        "import sys; from memplan.cli import main; "
        f"code = main([{command!r}, {LLAMA!r}, '--gpus', '2', '--json']); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)[rows]
    assert not set(process.stderr.split()) & HEAVY


def test_a_plan_is_a_table_and_json_with_exit_codes(run) -> None:
    arguments = ["plan", "tiny", "--gpus", "2", "--seq-len", "64", "--global-batch-size", "8", "--host-memory", "64"]
    shown = run(*arguments, "--gpu", "T4")
    assert (shown.code, shown.err) == (0, "")
    assert "ZeRO-3, all offloaded" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    fits = run(*arguments, "--gpu", "T4", "--json")
    assert (fits.code, fits.json["best"]["reason_passed_over"]) == (0, None)
    assert fits.json["best"] in fits.json["rungs"]
    assert fits.json["best"]["estimate"]["step"]["seconds"] > 0
    nothing = run(*arguments, "--gpu", "T4", "--gpu-memory", "0.02", "--json")
    assert (nothing.code, nothing.json["best"]) == (1, None)
    assert "Nothing fits." in run(*arguments, "--gpu", "T4", "--gpu-memory", "0.02").out


def test_a_plan_that_may_fit_says_what_it_lacks_to_know(run, tmp_path: Path) -> None:
    arguments = ["plan", LLAMA, "--gpu", "T4", "--seq-len", "64", "--out", str(tmp_path / "run")]
    found = run(*arguments)
    shown = " ".join(found.out.split())
    assert (found.code, found.err) == (1, "")
    assert "Whether anything fits is not known. ZeRO-3, all offloaded: needs" in shown
    assert "Give its size with --host-memory. No files are written. What would fit" in shown
    assert not (tmp_path / "run").exists()
    assert found.out.count("  --host-memory ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "T4", "--strategy", "zero2"], "--strategy: 'zero2' is for one estimate."),
        (["--gpu", "T4", "--explain"], "--explain: true is for one estimate."),
        (["--gpu", "T4", "--global-batch-size", "some"], "--global-batch-size: 'some' is no number of sequences."),
        (["--gpu", "T4", "--target", "ddp"], "--target: 'ddp' is not known. Use deepspeed or fsdp or auto."),
        (["--gpu", "cpu"], "--gpu: "),
        (["--gpu", "T4", "--solve", "all"], "--solve: 'all' is not known. Use micro-batch or seq-len or gpus or gpu."),
        (["--gpu", "T4", "--solve", "gpu"], "--gpu: 'T4' is given, and --solve gpu asks for it."),
        (["--gpu", "T4", "--seq-len", "64", "--solve", "seq-len"], "--seq-len: 64 is given"),
        (["--gpu", "T4", "--objective", "gpus", "--solve", "gpus"], "--objective: 'gpus' is for a plan"),
    ],
)
def test_a_plan_that_cannot_be_made(run, arguments: list[str], message: str) -> None:
    assert refused(run("plan", "tiny", *arguments)).startswith(message)


def test_a_plan_answers_a_question_in_a_line(run) -> None:
    arguments = ["plan", "tiny", "--gpu", "T4", "--gpu-memory", "0.6", "--host-memory", "4", "--solve"]
    shown = run(*arguments, "seq-len")
    found = run(*arguments, "seq-len", "--json").json
    value, name = found["solved"]["value"], found["best"]["name"]
    assert shown.code == 0
    assert f"The longest sequence that fits: {value:,} tokens ({name})" in " ".join(shown.out.split())
    assert "  tokens " in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    none = run("plan", "tiny", "--gpu", "T4", "--gpu-memory", "0.02", "--host-memory", "4", "--solve", "micro-batch")
    assert (none.code, "No micro-batch fits." in none.out) == (1, True)


def test_check_reads_files(run, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    plan = ["plan", "gpt2", "--gpu", "T4", "--gpus", "2", "--seq-len", "64", "--host-memory", "64", "--out", folder]
    assert "launch.sh --smoke" in run(*plan).out
    assert refused(run(*plan)).startswith("--out: ")
    fits = run("check", folder, "--gpu", "T4", "--host-memory", "64", "--json")
    assert (fits.code, fits.json["verdict"], fits.json["findings"]) == (0, "fits", [])
    assert fits.json["estimate"]["setup"]["seq_len"] == 64
    assert run("check", folder, "--gpu", "T4", "--gpu-memory", "0.02", "--host-memory", "64").code == 1
    assert refused(run("check", folder, "--strategy", "zero2")).startswith("--strategy: 'zero2' is for one estimate.")


def test_a_plan_is_not_computed_for_a_folder_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch.sh").write_text("mine")

    def computed(*args: object, **options: object) -> None:
        raise AssertionError("it was computed")

    monkeypatch.setattr(planning, "plan", computed)
    assert cli.main(["plan", "gpt2", "--gpu", "T4", "--out", str(tmp_path)]) == 2
    assert "exists. Use another folder, or --force to replace it." in capsys.readouterr().err  # a long path is cut
    monkeypatch.setenv("MEMPLAN_DEBUG", "1")
    with pytest.raises(AssertionError, match="it was computed"):
        cli.main(["plan", "gpt2", "--gpu", "T4", "--out", str(tmp_path), "--force"])

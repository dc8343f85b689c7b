"""Inputs for the targets: what somebody has meant, with some values changed to what nobody should write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from hypothesis import strategies as st
from tests.oracles.families import CONFIGS

from memplan.cli import OPTIONS
from memplan.configs import llama_factory
from memplan.configs.argument_keys import REMOVED_ARGUMENTS, SCRIPT_ARGUMENTS, TRAINING_ARGUMENTS
from memplan.configs.keys import ACCELERATE, DEEPSPEED, OPTIMIZERS, RENAMED, Key
from memplan.specs.training import OPTIMIZERS as OPTIMS

__all__ = ["STRATEGIES"]

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 4, 7, 8, 64, -1, 2**31, 2**40, 2**63, 10**30, 10**5000),
    *(0.5, -0.0, 1e-9, 5e8, 1e308, -1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "auto",
        "cpu",
        "nvme",
        "none",
        "no",
        "true",
        "bf16",
        "fp16",
        "adamw_torch",
        "gelu",
        "silu",
        "NaN",
        "1e308",
    ),
    *("\0", "\ud800", "\ufeff", "é", "../x", "/dev/zero", "$HOME", "${X}", "%s{}", "a" * 3000, "q_proj", "*", "&a"),
    *([], [1], ["a"], [None], [[[]]], [1] * 50, {}, {"a": 1}, {"enabled": True}, {"enabled": "auto"}, {"stage": 3}),
    *(
        {"device": "cpu"},
        {"type": "AdamW"},
        {"type": "AdamW", "params": {"lr": 1}},
        {"rope_type": "yarn", "factor": 2.0},
    ),
)
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=20)
value = odd | st.lists(odd, max_size=3) | st.dictionaries(st.text(max_size=10), odd, max_size=3)


def _mostly(*usual: Any) -> st.SearchStrategy[Any]:
    """One of these; every tenth time anything."""
    return st.integers(0, 9).flatmap(lambda number: st.sampled_from(usual) if number else odd)


def _plain(data: Any) -> Any:
    """As JSON can have it: a lone surrogate or a NaN may be in a file, an integer of 5000 digits is text there."""
    if isinstance(data, dict):
        return {_plain(key): _plain(each) for key, each in data.items()}
    if isinstance(data, list):
        return [_plain(each) for each in data]
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode()
    if isinstance(data, int) and data.bit_length() > 14_000:
        return 10**4000
    return data


def _changed(base: st.SearchStrategy[dict[str, Any]], names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """A dictionary with up to four values put in, and up to one taken out."""

    @st.composite
    def change(draw: Any) -> dict[str, Any]:
        data = dict(draw(base))
        for name in draw(st.lists(names, max_size=4)):
            data[name] = draw(value)
        if data and draw(st.booleans()):
            data.pop(draw(st.sampled_from(sorted(data))), None)
        return _plain(data)

    return change()


@st.composite
def _models(draw: Any) -> dict[str, Any]:
    config = dict(draw(st.sampled_from([each for family in CONFIGS.values() for each in family.values()])))
    names = st.sampled_from(
        [*config, "rope_scaling", "tie_word_embeddings", "layer_types", "sliding_window", "head_dim"]
    )
    return draw(_changed(st.just(config), names))


def _of_key(key: Key) -> st.SearchStrategy[Any]:
    """A value of the kind that a key takes."""
    name = str(key.takes)
    if key.only:
        return st.sampled_from(key.only)
    if "bool" in name:
        return st.booleans()
    if "float" in name:
        return st.sampled_from([0.0, 0.5, 1.0, 1e-3])
    if "int" in name:
        return st.sampled_from([1, 2, 64, 10**6, 5 * 10**8])
    return _mostly("auto", "cpu", "none", "no", "bf16", 1)


@st.composite
def _of_keys(draw: Any, keys: Mapping[str, Key], others: tuple[str, ...] = ("bogus",)) -> dict[str, Any]:
    """Some keys, most of them with values that they take."""
    found: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from([*keys, *keys, *others]), max_size=4, unique=True)):
        found[name] = draw(value if name not in keys or draw(st.integers(0, 7)) == 0 else _of_key(keys[name]))
    return found


def _section(path: str) -> st.SearchStrategy[dict[str, Any]]:
    return _of_keys(DEEPSPEED[path], (*RENAMED, "bogus"))


@st.composite
def _deepspeed(draw: Any) -> dict[str, Any]:
    offload = st.fixed_dictionaries({"device": _mostly("cpu", "nvme", "none")}, optional={"nvme_path": _mostly("/x")})
    config: dict[str, Any] = {
        "zero_optimization": {"stage": draw(_mostly(0, 1, 2, 3)), **draw(_section("zero_optimization"))},
        "train_micro_batch_size_per_gpu": draw(_mostly(1, 2, "auto")),
    }
    if draw(st.booleans()):
        config["zero_optimization"]["offload_optimizer"] = draw(offload)
    if draw(st.booleans()):
        config["zero_optimization"]["offload_param"] = draw(offload)
    if draw(st.booleans()):
        named = _mostly("Adam", "AdamW", "AdamW", *OPTIMIZERS)
        names = ["lr", "betas", "torch_adam", "eps", "weight_decay", "learning_rate", "x"]
        params = st.dictionaries(st.sampled_from(names), _mostly("auto", 1e-4, 10**400), max_size=2)
        config["optimizer"] = {"type": draw(named), "params": draw(params)}
    if draw(st.integers(0, 3)) == 0:
        kind = _mostly("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "WarmupLr")
        names = ["warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_steps", "x"]
        params = st.dictionaries(st.sampled_from(names), _mostly("auto", 0, 100, 10**400), max_size=3)
        config["scheduler"] = {"type": draw(kind), "params": draw(params | odd)}
    config |= {
        name: {"enabled": draw(_mostly(True, "auto", False))}
        for name in draw(st.lists(st.sampled_from(["bf16", "fp16"]), max_size=2))
    }
    config |= draw(_of_keys({name: key for name, key in DEEPSPEED[""].items() if name not in config}))
    return draw(st.just(_plain(config)) | _changed(st.just(config), st.sampled_from([*DEEPSPEED[""], "bogus"])))


@st.composite
def _accelerate(draw: Any) -> dict[str, Any]:
    kind = draw(_mostly("NO", "MULTI_GPU", "FSDP", "DEEPSPEED"))
    config: dict[str, Any] = {"distributed_type": kind, "num_processes": draw(_mostly(1, 2, 8))}
    for name, keys in ACCELERATE.items():
        if name and draw(st.booleans()):
            config[name] = draw(_of_keys(keys))
    config |= draw(_of_keys({name: key for name, key in ACCELERATE[""].items() if name not in config}))
    return draw(st.just(_plain(config)) | _changed(st.just(config), st.sampled_from([*ACCELERATE[""], "bogus"])))


_NAMES = [*TRAINING_ARGUMENTS, *SCRIPT_ARGUMENTS, *REMOVED_ARGUMENTS, *llama_factory.known_names(), "bogus"]
_RUNS: tuple[dict[str, Any], ...] = (
    {"per_device_train_batch_size": 1, "seq_len": 16, "output_dir": "out", "bf16": True},
    {"per_device_train_batch_size": 1, "max_length": 16, "output_dir": "out", "use_peft": True, "load_in_4bit": True},
    {"max_length": 16, "output_dir": "out", "use_peft": True, "lora_target_modules": ".*(q|v)_proj", "packing": True},
    {"max_length": 16, "output_dir": "out", "use_peft": True, "lora_target_modules": "(.*)*x", "bf16": True},
    {"stage": "sft", "do_train": True, "finetuning_type": "lora", "cutoff_len": 16, "model_name_or_path": "gpt2"},
    {
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "full",
        "cutoff_len": 16,
        "deepspeed": {"zero_optimization": {"stage": 3}},
    },
    {"per_device_train_batch_size": 1, "output_dir": "out", "fsdp": "full_shard", "fsdp_config": {"version": 2}},
)


@st.composite
def _arguments(draw: Any) -> dict[str, Any]:
    known = {**SCRIPT_ARGUMENTS, **TRAINING_ARGUMENTS}
    base = {**draw(st.sampled_from(_RUNS)), **draw(_of_keys(known, tuple(_NAMES)))}
    return draw(st.just(_plain(base)) | _changed(st.just(base), st.sampled_from(_NAMES)))


@st.composite
def _raw(draw: Any) -> bytes:
    """Bytes of a file: any, or what means something with pieces put in and cut off."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    text = draw(_texts() | _scripts())
    content = text.encode("utf-8", "surrogatepass")
    place = draw(st.integers(0, len(content)))
    piece = draw(st.sampled_from(_PIECES) | st.binary(max_size=8))
    rest = content[place:] if draw(st.booleans()) else b""
    return content[:place] + piece + rest


@st.composite
def _texts(draw: Any) -> str:
    data = draw(_deepspeed() | _accelerate() | _arguments() | _models())
    return json.dumps(data) if draw(st.booleans()) else yaml.safe_dump(json.loads(json.dumps(data)))


@st.composite
def _scripts(draw: Any) -> str:
    """A launching script: variables, a launcher, a Trainer's arguments over several lines."""
    launcher = draw(
        _mostly(
            *("torchrun --nproc_per_node $N", "accelerate launch", "deepspeed --num_gpus=2", "python"),
            *(
                "srun torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES",
                "srun -N 2 -n 4 python",
                "mpirun -np 2 python",
            ),
            *("torchrun --nproc_per_node gpu", "deepspeed --hostfile run.sh", "deepspeed --include a:0,1@b:1,2"),
        )
    )
    lines = [
        f"#SBATCH --nodes={_text(draw(_mostly(1, 2)))} --ntasks-per-node {_text(draw(_mostly(1, 2)))}",
        f"export N={_text(draw(_mostly(1, 2)))}",
        draw(_mostly("set -e", "B=${N:-4}", "# run", "cd /tmp", "if true; then")),
    ]
    options = draw(_arguments()).items()
    pairs = [f"--{name} {_text(value)}" for name, value in options if not isinstance(value, (dict, list))]
    return "\n".join([*map(_text, lines), " \\\n  ".join([f"{_text(launcher)} train.py", *pairs])])


_PIECES = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"[" * 3000,
        b"{" * 3000,
        b"\xff\xfe",
        b"9" * 5000,
        b"1e999",
        b"NaN",
        b"-Infinity",
    ),
    *(b"&a [*a,*a]", b"*a", b"!!python/object/apply:os.system ['true']", b"<<: *a", b"- " * 2000, b"\n---\n", b"\x85"),
    *(
        b"2001-99-99",
        b"0x_",
        b"1:" * 50,
        b"1:" * 3000 + b"1.5",
        b"!!binary x",
        b"!!set {a}",
        b"? [a]\n: b",
        b"\\\n",
        b"'",
        b'"',
        b"$(x)",
        b"${N",
        b" | tee x",
        b" && ",
        b"<<EOF\n",
        b"`",
    ),
)


@st.composite
def _commands(draw: Any) -> list[str]:
    names = ("estimate", "estimate", "estimate", "plan", "check", "compare", "gpus", "models", "schema")
    known = ("gpt2", "EleutherAI/pythia-70m", "google/mt5-small")
    words = [draw(_mostly(*names).map(_text))]
    if words[0] not in ("gpus", "models", "schema") or not draw(st.integers(0, 3)):
        words.append(draw(_mostly(*known, *known, *known, "no/such", ".", "/dev/null", "--json").map(_text)))
    if words[0] in ("estimate", "plan", "compare"):
        words += ["--seq-len", "64"]  # more than the default has, GPT-2 has no positions for
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=4)):
        words.append(option.flag)
        if option.metavar and draw(st.integers(0, 9)):
            words.append(draw(_mostly(*_WORDS.get(option.name, ["1"])).map(_text)))
    return [word for word in words if word not in ("--trace", "measure")]


def _text(word: Any) -> str:
    return str(_plain(word))


_WORDS: dict[str, list[str]] = {
    **{option.name: option.metavar.split("|") for option in OPTIONS if "|" in option.metavar},
    "gpus": ["1", "2", "8"],
    "gpu": ["T4", "A100-80GB", "cpu", "h100"],
    "gpu_memory": ["1", "16", "1e-3"],
    "host_memory": ["1", "64", "4TiB"],
    "nvme": ["100"],
    "seq_len": ["8", "128"],
    "optim": sorted(OPTIMS),
    "alloc_conf": ["expandable_segments:True", "max_split_size_mb:64"],
    "software": ["torch=2.13", "transformers=4.57,deepspeed=0.15"],
    "lora_targets": ["q_proj", "all-linear", "c_attn,c_proj"],
    "lora_dropout": ["0.1", "1"],
}


@st.composite
def _npy(draw: Any) -> bytes:
    """An array as a file: its header says what is there, or something else."""
    descr = draw(_mostly("'<i8'", "'|i1'", "'<u2'", "'<f8'", "'|V0'", "'|O'", "'<U3'", "[('a', '<i8')]").map(_text))
    shape = draw(_mostly("(4,)", "(0,)", "(2, 2)", "()", "(-1,)", "(1000000000,)", f"({10**30},)").map(_text))
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode("utf-8", "surrogatepass")
    version = draw(st.sampled_from([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
    size = len(text).to_bytes(2 if version[0] == 1 else 4, "little", signed=False) if len(text) < 2**16 else b"\xff\xff"
    return b"\x93NUMPY" + version + size + text + draw(st.sampled_from([b"\3" * 32, b"", b"\xff" * 8]))


@st.composite
def _lengths(draw: Any) -> dict[str, Any]:
    """A file of lengths, and what they are asked for."""
    numbers = draw(st.lists(st.integers(0, 4096), min_size=1, max_size=20))
    lines = "\n".join(map(str, numbers))
    suffix, usual = draw(
        st.sampled_from(
            [
                (".txt", lines.encode()),
                (".csv", b"length,x\n" + lines.replace("\n", ",1\n").encode() + b",1"),
                (".json", json.dumps(draw(st.sampled_from([numbers, {"length": numbers}]))).encode()),
                (".npy", draw(_npy())),
                (".parquet", b"PAR1PAR1"),
            ]
        )
    )
    content = draw(st.just(usual) | st.just(usual) | _raw())
    given = draw(st.just(numbers) | value)
    return {
        "suffix": suffix,
        "content": content,
        "given": given,
        "limit": draw(_mostly(512)),
        "micro_batch_size": draw(_mostly(1, 4)),
        "ranks": draw(_mostly(1, 2)),
        "order": draw(_mostly("random", "sequential", "group_by_length")),
    }


STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "lengths": _lengths(),
    "model_config": _models(),
    "deepspeed_json": _deepspeed(),
    "accelerate_yaml": _accelerate(),
    "arguments": _arguments(),
    "raw_file": _raw(),
    "command": _commands(),
}

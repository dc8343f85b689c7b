"""The folder that runs a setup: written, and read back.

``train.py`` and ``smoke.py`` are the same for every setup (``templates/``); what differs is in ``training_args.json``,
``ds_config.json`` or ``accelerate.yaml``, and ``launch.sh``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memplan.configs.accelerate import parse_accelerate, to_accelerate
from memplan.configs.deepspeed import parse_deepspeed, to_deepspeed
from memplan.configs.run import Run, of_texts, read_folder, setup_of
from memplan.configs.tiny import SWAPPED_VOCABULARY, VOCABULARY, tiny_config
from memplan.configs.trainer import to_training_args
from memplan.engines.zero import uses_cpu_adam
from memplan.errors import SpecError
from memplan.estimator import resolve
from memplan.micro_batch import Setup
from memplan.results import Assumption
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import AllocatorSpec, TrainingSpec

__all__ = ["Written", "as_written", "check_folder", "files", "parse", "read", "write"]

OLDEST_TRANSFORMERS = "4.56"
"""The first with ``from_pretrained(dtype=...)``, which train.py uses."""
_TEMPLATES = Path(__file__).with_name("templates")
_GEFORCE = re.compile(r"(?:GeForce )?RTX ?[345]0[5-9]0")
"""Consumer boards since the RTX 30 series. NVIDIA's driver has no peer-to-peer over PCIe for them, where NCCL may hang
(accelerate 1.15 ``utils/environment.py``, ``check_cuda_p2p_ib_support``)."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a folder runs."""

    model: str
    """``model_name_or_path``."""
    training: TrainingSpec
    strategy: Strategy
    gpus: int
    nodes: int
    nvme_path: str | None
    notes: tuple[Assumption, ...] = field(default=())


def as_written(strategy: Strategy) -> Strategy:
    """Return the strategy as files hold it: ZeRO-3 gathers its weights to save them, as a Trainer's user expects."""
    changes: dict[str, Any] = {}
    if strategy.kind == "zero3":
        changes["zero"] = strategy.zero.replace(stage3_gather_16bit_weights_on_model_save=True)
    if strategy.kind == "fsdp" and strategy.fsdp.version == 1 and strategy.fsdp.sharding_strategy is None:
        changes["fsdp"] = strategy.fsdp.replace(sharding_strategy="FULL_SHARD")
    return strategy.replace(**changes) if changes else strategy


def files(
    model: ModelSpec, training: TrainingSpec, cluster: ClusterSpec, strategy: Strategy, software: SoftwareSpec
) -> dict[str, str]:
    """Return the files that run a setup, as text by name.

    What is written is :func:`as_written` of ``strategy``. Raises SpecError for a setup that cannot be run or that files
    cannot ask for, UnsupportedError for one that memplan does not model.
    """
    _check(training, cluster, strategy, software)
    strategy = as_written(strategy)
    setup = resolve(model, training, cluster, strategy, software)
    arguments = to_training_args(setup, training, strategy)
    found: dict[str, str] = {"train.py": _template("train.py"), "smoke.py": _template("smoke.py")}
    if strategy.is_deepspeed:
        config = _deepspeed(strategy, setup.training, cluster.nvme_path)
        found["ds_config.json"] = _json(config)
        arguments["deepspeed"] = "ds_config.json"
        parse_deepspeed(config, "ds_config.json")  # what it refuses is not written
    elif strategy.kind != "single":
        config = to_accelerate(strategy, cluster, setup.precision.mixed_precision)
        found["accelerate.yaml"] = _yaml(config)
        parse_accelerate(config, "accelerate.yaml")
    found["training_args.json"] = _json(arguments)
    swaps = "nvme" in (strategy.offload_optimizer, strategy.offload_param)
    found["smoke_config.json"] = _json(tiny_config(model, SWAPPED_VOCABULARY if swaps else VOCABULARY))
    found["launch.sh"] = _launch(setup, cluster, strategy)
    if cluster.nodes > 1:
        found["launch.slurm"] = _slurm(cluster, strategy)
        if strategy.is_deepspeed:
            found["hostfile"] = "".join(f"node-{n} slots={cluster.gpus_per_node}\n" for n in range(cluster.nodes))
            environment = _environment(setup, cluster)
            if environment:  # the launcher passes no others on to other nodes
                found[".deepspeed_env"] = "".join(f"{name}={value}\n" for name, value in environment.items())
    return found


def _check(training: TrainingSpec, cluster: ClusterSpec, strategy: Strategy, software: SoftwareSpec) -> None:
    if training.task != "train":
        raise SpecError.at("task", training.task, "has no training to write files for", "Use --task train.")
    if not software.at_least("transformers", OLDEST_TRANSFORMERS):
        remedy = f"Use {OLDEST_TRANSFORMERS} or later."
        raise SpecError.at("transformers", software.transformers, "is older than what train.py is written for", remedy)
    if strategy.kind == "single" and cluster.gpus != 1:
        remedy = "Use --strategy ddp, or --gpus 1."
        raise SpecError.at("gpus", cluster.gpus, "is more than strategy single uses", remedy)
    if isinstance(cluster.gpu, GPUSpec) and cluster.gpu.is_cpu:
        remedy = "Use --gpu with a GPU's name; the files rehearse on CPU by launch.sh --smoke."
        raise SpecError.at("gpu", cluster.gpu.name, "has no run to write files for", remedy)
    if "nvme" in (strategy.offload_optimizer, strategy.offload_param) and cluster.nvme_path is None:
        remedy = "Use --nvme-path DIR, a folder on each node's NVMe."
        raise SpecError.at("nvme_path", None, "is no folder, and offloading to nvme needs one", remedy)
    if strategy.kind == "zero3" and not strategy.zero.zero3_init_flag:
        remedy = "Leave it out: train.py makes TrainingArguments first, after which transformers shards as it loads."
        raise SpecError.at("zero3_init_flag", False, "cannot be asked of the Trainer", remedy)


# -- what each file holds ----------------------------------------------------------------------------------------------


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _yaml(values: Mapping[str, Any]) -> str:
    """Two levels of scalars, as accelerate configs are; scalars of JSON are scalars of YAML."""
    lines: list[str] = []
    for key, value in values.items():
        inner = [f"  {name}: {json.dumps(each)}" for name, each in value.items()] if isinstance(value, dict) else []
        lines += [f"{key}:", *inner] if inner else [f"{key}: {json.dumps(value)}"]
    return "\n".join(lines) + "\n"


def _deepspeed(strategy: Strategy, training: TrainingSpec, nvme_path: str | None) -> dict[str, Any]:
    """ds_config.json: what TrainingArguments say too is ``"auto"``, so that it is said once."""
    config = to_deepspeed(strategy, training, nvme_path)
    for precision in ("bf16", "fp16"):
        config[precision]["enabled"] = "auto"
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config |= dict.fromkeys(sizes, "auto")
    if "optimizer" in config:
        section = config["optimizer"]
        adam = section["type"] in ("AdamW", "Adam")
        names = ("lr", "weight_decay", *(("betas", "eps") if adam else ()))
        section["params"] = {**dict.fromkeys(names, "auto"), **section["params"]}
        if section["type"] in ("SGD", "RMSprop"):
            config["zero_allow_untested_optimizer"] = True
    return config


def _environment(setup: Setup, cluster: ClusterSpec) -> dict[str, str]:
    found: dict[str, str] = {}
    name = cluster.gpu.name if isinstance(cluster.gpu, GPUSpec) else cluster.gpu
    if cluster.gpus > 1 and name is not None and _GEFORCE.match(name):
        found |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    allocator = setup.training.alloc_conf
    if allocator is not None:
        # torch 2.9 named the variable anew; the old name still works there.
        new = setup.software.at_least("torch", "2.9")
        found["PYTORCH_ALLOC_CONF" if new else "PYTORCH_CUDA_ALLOC_CONF"] = _allocator(allocator)
    return {key: value for key, value in found.items() if value}


def _allocator(spec: AllocatorSpec) -> str:
    """As torch parses it: NAME:VALUE,NAME:VALUE."""
    return ",".join(f"{name}:{value}" for name, value in spec.model_dump(exclude_defaults=True).items())


_MARK = "#!/usr/bin/env bash\n# Written by memplan: "
_HEAD = """\
#!/usr/bin/env bash
# Written by memplan: {what}.
#
#   bash launch.sh              the run, as training_args.json says
#   bash launch.sh --smoke      3 steps of a tiny model first, on CPU where there is no GPU; see smoke.py
#   {choose}
{notes}set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

GPUS_PER_NODE={per_node}
NODES={nodes}
{exports}
SCRIPT=train.py
OPTIONS=()
for option in "$@"; do
    if [[ "$option" == --smoke ]]; then SCRIPT=smoke.py; else OPTIONS+=("$option"); fi
done
set -- ${{OPTIONS[@]+"${{OPTIONS[@]}}"}}
if [[ "$SCRIPT" == smoke.py ]]; then
    NODES=1
    FOUND=$(python -c 'import torch; print(torch.cuda.device_count())')
    if (( FOUND == 0 )); then
        GPUS_PER_NODE={on_cpu}
        unset CUDA_VISIBLE_DEVICES
        set --
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
        echo "launch.sh: there is no GPU: $GPUS_PER_NODE rank(s) on CPU" >&2{fsdp1}
    elif (( FOUND < GPUS_PER_NODE )); then
        GPUS_PER_NODE=$FOUND
        echo "launch.sh: $FOUND GPU(s) here: as many ranks" >&2
    fi
fi
"""
_COMPILER = """
# DeepSpeed compiles what offloading needs, once, unless it was installed with it.
if ! command -v "${{CXX:-c++}}" > /dev/null; then
    for op in {ops}; do
        if compgen -G "${{TORCH_EXTENSIONS_DIR:-${{HOME:-}}/.cache/torch_extensions/*}}/$op/$op.so" > /dev/null; then
            continue
        fi
        built='from deepspeed.git_version_info import installed_ops; print(installed_ops.get("'$op'"))'
        if [[ "$(python -c "$built" 2> /dev/null)" != *True ]]; then
            echo "launch.sh: no C++ compiler (${{CXX:-c++}}): DeepSpeed has to compile $op, with which it offloads." \\
                "Install one, as by apt-get install g++, or name yours in CXX." >&2
            exit 2
        fi
    done
fi
"""
_SINGLE = """
if (( $# > 0 )); then
    echo "launch.sh: one process takes no launcher's options: $*" >&2
    exit 2
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"  # with more the Trainer would take them all
exec python "$SCRIPT"
"""
_ACCELERATE = """
OPTIONS=(--config_file accelerate.yaml --num_machines "$NODES" --num_processes "$((NODES * GPUS_PER_NODE))")
OPTIONS+=(--main_process_port "${MASTER_PORT:-29500}")
if (( NODES > 1 )); then
    : "${NODE_RANK:?is the number of this node, from 0 on; launch.slurm sets it}"
    : "${MASTER_ADDR:?is the address of node 0}"
    OPTIONS+=(--machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR")
fi
exec accelerate launch "${OPTIONS[@]}" "$@" "$SCRIPT"
"""
_DEEPSPEED = """
OPTIONS=()
if (( NODES > 1 )); then
    OPTIONS+=(--hostfile hostfile)
    if [[ -n "${NODE_RANK:-}" ]]; then  # started on every node, as launch.slurm does; else node 0 reaches them by ssh
        OPTIONS+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
        OPTIONS+=(--master_port "${MASTER_PORT:-29500}")
    fi
else
    OPTIONS+=(--master_port "${MASTER_PORT:-29500}")
    if (( $# == 0 )) && [[ -z "${CUDA_VISIBLE_DEVICES:-}" ]]; then  # or the launcher takes those that are chosen
        OPTIONS+=(--num_gpus "$GPUS_PER_NODE")
    fi
fi
exec deepspeed "${OPTIONS[@]}" "$@" --no_local_rank "$SCRIPT"
"""
_SLURM = """\
#!/usr/bin/env bash
# Written by memplan: sbatch launch.slurm. Add your cluster's partition, account and time.
#SBATCH --job-name=memplan
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT="${{MASTER_PORT:-29500}}"
{hostfile}srun --ntasks-per-node=1 bash -c 'NODE_RANK=$SLURM_NODEID bash launch.sh'
"""


def _launch(setup: Setup, cluster: ClusterSpec, strategy: Strategy) -> str:
    exports = [
        f'export {name}="${{{name}:-{value}}}"{_WHY.get(name, "")}'
        for name, value in _environment(setup, cluster).items()
    ]
    choose = "CUDA_VISIBLE_DEVICES=1,3 bash launch.sh     on these GPUs"
    if strategy.is_deepspeed:
        host = "localhost" if cluster.nodes == 1 else "node-0"
        choose += f"; or bash launch.sh --include {host}:1,3"
    head = _HEAD.format(
        what=_what(setup, cluster, strategy),
        choose=choose,
        notes="".join(f"#\n# {note}\n" for note in _notes(setup, cluster)),
        per_node=cluster.gpus_per_node,
        nodes=cluster.nodes,
        exports="".join(f"{line}\n" for line in exports),
        on_cpu=2 if cluster.gpus > 1 else 1,
        fsdp1=_FSDP1_ON_CPU if _broadcasts(strategy) else "",
    )
    if strategy.kind == "single":
        return head + _SINGLE
    if strategy.is_deepspeed:
        ops = _compiled(strategy, setup.training.optim)
        return head + (_COMPILER.format(ops=" ".join(ops)) if ops else "") + _DEEPSPEED
    return head + _ACCELERATE


def _compiled(strategy: Strategy, optim: str) -> list[str]:
    """The ops of DeepSpeed, as it calls them, that it compiles when they are first used."""
    places = (strategy.offload_optimizer, strategy.offload_param)
    ops = ["cpu_adam"] if places[0] != "none" and uses_cpu_adam(strategy.zero, optim) else []
    return [*ops, "async_io"] if "nvme" in places else ops


_WHY = {"NCCL_P2P_DISABLE": "  # no peer-to-peer over PCIe: NCCL may hang; 0 if NVLink bridges join the GPUs"}
_FSDP1_ON_CPU = '''
        # FSDP1 broadcasts weights to accelerators only; here all ranks have the same.
        set -- --fsdp_sync_module_states false --fsdp_cpu_ram_efficient_loading false "$@"'''


def _broadcasts(strategy: Strategy) -> bool:
    return strategy.kind == "fsdp" and strategy.fsdp.version == 1 and strategy.fsdp.sync_module_states


def _what(setup: Setup, cluster: ClusterSpec, strategy: Strategy) -> str:
    name = cluster.gpu.name if isinstance(cluster.gpu, GPUSpec) else "GPU"
    count = f"{cluster.nodes} x {cluster.gpus_per_node}" if cluster.nodes > 1 else str(cluster.gpus)
    places = [
        f"{part} on {place}"
        for part, place in (("optimizer", strategy.offload_optimizer), ("parameters", strategy.offload_param))
        if place != "none"
    ]
    model = re.sub(
        r"[^\w./~@ -]", "?", setup.model.id, flags=re.ASCII
    )  # in a comment of a script, whatever it is called
    return ", ".join([f"{model} on {count} x {name}, {strategy.kind}", *places])


def _notes(setup: Setup, cluster: ClusterSpec) -> list[str]:
    notes: list[str] = []
    pretrained = setup.model.config.get("dtype") or setup.model.config.get("torch_dtype")
    if setup.precision.mixed_precision == "fp16" and str(pretrained).removeprefix("torch.") == "bfloat16":
        notes.append("The checkpoint is in bfloat16, whose range float16 has not: watch for steps skipped by overflow.")
    return notes


def _slurm(cluster: ClusterSpec, strategy: Strategy) -> str:
    hostfile = ""
    if strategy.is_deepspeed:
        hostfile = (
            f"scontrol show hostnames \"$SLURM_JOB_NODELIST\" | sed 's/$/ slots={cluster.gpus_per_node}/' > hostfile\n"
        )
    return _SLURM.format(nodes=cluster.nodes, per_node=cluster.gpus_per_node, hostfile=hostfile)


# -- reading back ------------------------------------------------------------------------------------------------------


def parse(files: Mapping[str, str], source: str = "") -> Written:
    """Read what :func:`files` returns, as text by name; ``source`` is put before the names in messages.

    Raises SpecError for what is missing or wrong, UnsupportedError for what is not modelled.
    """
    return _written(of_texts(files, source))


def read(folder: str | os.PathLike[str]) -> Written:
    """Read a folder that :func:`write` has written. Raises SpecError."""
    return _written(read_folder(Path(folder)))


def _written(run: Run) -> Written:
    for finding in (each for each in run.findings if each.severity == "error"):
        raise SpecError(f"{finding.path}: {finding.message} {finding.remedy}")
    gpus, nodes = run.cluster["gpus"], run.cluster["nodes"]
    training, strategy, notes = setup_of(run, TrainingSpec(), {}, gpus)
    assert run.model is not None
    path = None if run.engine is None else run.engine.cluster.get("nvme_path")
    return Written(run.model, training, strategy, gpus, nodes, path, notes)


# -- writing -----------------------------------------------------------------------------------------------------------


def check_folder(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raise SpecError if :func:`write` would refuse a folder or fail to write it, before it is known what to write."""
    target = _target(folder)
    _check_target(target, _ALWAYS, force=force)
    there = next(path for path in target.absolute().parents if os.path.lexists(path))
    try:
        for place in {there, target} if target.exists() else (there,):
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=place):
                pass
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise SpecError.at("out", str(folder), problem, "Use another folder.") from None


def write(files: Mapping[str, str], folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Write files, by name, into a folder, and return their paths.

    All are written beside the folder first, and then moved, so that none is ever half-written. A new folder appears
    with all of them at once. Raises SpecError if one is there already, unless ``force`` replaces it, and if the folder
    cannot be written. What memplan wrote there for another engine, and does not write now, is taken away by ``force``.
    """
    target = _target(folder)
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise SpecError.at("files", name, "is not a file's name", "Give names without folders.")
    try:
        return _write(files, target, force=force)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise SpecError.at("out", str(error.filename or target), problem, "Use another folder.") from None
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError.at("out", str(target), f"cannot be written ({error})", "Use another folder.") from None


_ALWAYS = ("train.py", "smoke.py", "training_args.json", "smoke_config.json", "launch.sh", "plan.json")
"""Files of every plan."""
_OF_ENGINES = ("ds_config.json", "accelerate.yaml", "launch.slurm", "hostfile", ".deepspeed_env")
"""Files that some plans have."""


def _target(folder: str | os.PathLike[str]) -> Path:
    if not os.fspath(folder):
        raise SpecError.at("out", "", "is no folder", "Use . for this one.")
    return Path(folder)


def _check_target(target: Path, names: Iterable[str], *, force: bool) -> None:
    try:
        if target.exists() and not target.is_dir():
            raise SpecError.at("out", str(target), "is a file, not a folder", "Use another folder.")
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        if isinstance(error, SpecError):
            raise
        problem = f"cannot be written ({getattr(error, 'strerror', None) or error})"
        raise SpecError.at("out", str(target), problem, "Use another folder.") from None
    for path in (target / name for name in names):
        if path.is_dir() and not path.is_symlink():
            raise SpecError.at("out", str(path), "is a folder, where a file would be written", "Use another folder.")
        if os.path.lexists(path) and not force:
            raise SpecError.at("out", str(path), "exists", "Use another folder, or --force to replace it.")


def _stale(target: Path, files: Mapping[str, str]) -> list[Path]:
    """Files of an engine that memplan wrote here before, and that are not among ``files``.

    plan.json says what was written; without it a launch.sh of memplan's does.
    """
    try:
        written = json.loads((target / "plan.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError):
        try:
            own = (target / "launch.sh").read_text(encoding="utf-8").startswith(_MARK)
        except (OSError, ValueError):
            own = False
        written = _OF_ENGINES if own else ()
    if not isinstance(written, (list, tuple)):
        return []
    return [target / name for name in _OF_ENGINES if name in written and name not in files]


def _write(files: Mapping[str, str], target: Path, *, force: bool) -> list[Path]:
    paths = [target / name for name in files]
    _check_target(target, files, force=force)
    stale = [path for path in (_stale(target, files) if force else ()) if os.path.lexists(path) and not path.is_dir()]
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, text in files.items():
            _write_file(beside / name, text)
        if target.exists():
            # What starts a run comes last: until then it is the one before.
            for path in sorted(paths, key=lambda path: path.name == "launch.sh"):
                (beside / path.name).replace(path)
            for path in stale:
                path.unlink()
        else:
            beside.chmod(0o777 & ~_umask())
            _sync(beside)
            try:
                beside.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                raise SpecError.at("out", str(target), "has come to exist", "Try again.") from None
        _sync(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return paths


def _write_file(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if text.startswith("#!"):
        path.chmod(path.stat().st_mode | 0o111 & ~_umask())


def _umask() -> int:
    """What new files may not have; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Make names in a folder last, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

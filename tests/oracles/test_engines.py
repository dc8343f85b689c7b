"""Estimates of the engines that shard, beside the real DeepSpeed and FSDP2 as rank 0 of N (O2)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.oracles import nvme, o2
from tests.oracles.families import CONFIGS

from memplan import estimator, sharded
from memplan.architectures.nn import Build, Inventory
from memplan.architectures.registry import build_model
from memplan.case import model_spec
from memplan.catalog.gpus import find_gpu
from memplan.errors import SpecError
from memplan.memory.course import Ledger
from memplan.specs.hardware import ClusterSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import FsdpSpec, Strategy, ZeroSpec
from memplan.specs.training import TrainingSpec
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import bfloat16

ROWS = [row for archive in o2.load_archives().values() for row in archive.rows if row.result is not None]
AUTO = {
    "fsdp": (),
    "zero0": (),
    "zero1": ("reduce_bucket_size",),
    "zero2": ("reduce_bucket_size",),
    "zero3": ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
}
"""What o2.engine_config leaves to the Trainer."""
IDLE = 0.005
PEAK = 0.01
NOT_SPECS = ("nodes", "two_sides", "save", "fp16", "checkpoints_wrappers", "checkpoints_calls")
"""Options of o2's that are no field of these."""
SCALARS = 16 * 1024
"""Bytes of step counts, losses and norms, 512 for each: nothing, but for the small rest that offloading leaves."""
CPU_KERNEL, CPU_PRODUCT, CPU_NORM, CPU_CHUNK_CAT = o2.CPUS_OWN
CPU_ADD = "aten::empty | liger_kernel/ops/fused_linear_cross_entropy.py"
"""Liger's sum of the head's gradient: CPU's add_ of float32 to 16 bit copies both into float32. There are three copies
then, where the estimate has one and, as it is made, a 16-bit product: half of them is CPU's own."""
PLANS = "torch/distributed/distributed_c10d.py"


def played(row: o2.Row, ledger: Ledger | None = None) -> Ledger:
    """The engine of a row, as its rank 0."""
    cpu = find_gpu("cpu")
    cluster = ClusterSpec(gpu=cpu, gpus=row.setup.options["gpus"], nodes=row.setup.options.get("nodes", 1))
    model, training, strategy = specs(row)
    software = SoftwareSpec()
    for option, version in (("checkpoints_wrappers", "4.52"), ("checkpoints_calls", "5.22")):
        if option in row.setup.options:
            software = SoftwareSpec(transformers=version)
    setup = estimator.resolve(model, training, cluster, strategy, software)
    if row.result is not None and "host" not in row.result["phases"]:  # no mode was on, for which torch works elsewhere
        setup = replace(setup, rules=replace(setup.rules, accumulate_in_place=True))
    ledger = ledger or Ledger(pinned_in_powers_of_two=False)  # the truth has no pinned blocks
    sharded.play_engine(setup, cpu, strategy, cluster.gpus, cluster.gpus_per_node, 0, ledger, full_depth=False)
    return ledger


def specs(row: o2.Row) -> tuple[ModelSpec, TrainingSpec, Strategy]:
    """The specs that a row's options are."""
    options = {name: value for name, value in row.setup.options.items() if name not in NOT_SPECS}
    config = CONFIGS[row.setup.family][row.setup.config] | options.pop("values", {})
    config |= {"dtype": options.pop("pretrained", {"dtype": options["dtype"]})["dtype"]}
    if "num_layers" in options:
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = options.pop("num_layers")
    kind = options.pop("strategy")
    del options["gpus"]
    keys = {**dict.fromkeys(AUTO.get(kind, ()), "auto"), **options.pop("zero", {})}
    keys["zero3_init_flag"] = options.pop("zero_init", True)
    places = {name: options.pop(name) for name in ("offload_optimizer", "offload_param") if name in options}
    strategy = Strategy(kind=kind, zero=ZeroSpec(**keys), fsdp=FsdpSpec(**options.pop("fsdp", {})), **places)
    return model_spec(config), TrainingSpec(**options), strategy


def measured(row: o2.Row, side: str = "device", *, quantizing: bool = False) -> dict[str, int]:
    """The row's peaks by phase and the level between steps: in blocks of 512 bytes, on the host in bytes.

    Loading is without that of a quantized model on the device, but for ``quantizing``.
    """
    assert row.result is not None
    phases = row.result["phases"][side]
    exact = int(side == "host")

    def peak(*beginnings: str) -> int:
        return max(phase["peak"][exact] for name, phase in phases.items() if name.startswith(beginnings))

    quantized = "quantization" in row.setup.options and side == "device"
    loading = peak("init") if quantized and not quantizing else peak("load", "init")
    found = {
        "first_step": peak("0.idle", "1.forward", "1.backward", "1.between", "1.step"),
        "forward": peak("2.forward"),
        "backward": peak("2.backward"),
        "step": peak("2.step"),
        "idle": phases["2.idle"]["start"][exact],
    }
    found |= {"eval": peak("eval")} if "eval" in phases else {}
    return found | ({"load": loading, "save": peak("save")} if "save" in phases else {})


def estimated(ledger: Ledger, place: str = "gpu") -> dict[str, int]:
    names = ("load", "first_step", "forward", "loss", "backward", "step", "idle", "eval", "save")
    totals = {name: sum(ledger.fullest(name, place).values()) for name in names}
    return totals | {"forward": max(totals["forward"], totals["loss"])}


def others(row: o2.Row, side: str) -> int:
    """Bytes when saving that do not grow with the weights: plans of torch.distributed.checkpoint, which are pickled to
    be gathered, and a scalar of each rank in store_flos.
    """
    assert row.result is not None
    phase = row.result["phases"][side].get("save", {"blocks": ()})
    return sum(n * count for n, count, site in phase["blocks"] if PLANS in site) + 512 * row.setup.options["gpus"]


def scratch(row: o2.Row, phase: str) -> int:
    """Bytes of CPU kernels' own at the fullest moment of a phase."""
    assert row.result is not None
    options = row.setup.options
    model = model_spec(dict(CONFIGS[row.setup.family][row.setup.config]) | options.get("values", {}))
    root = build_model(Build(Tape(CPU), bfloat16, attn=options.get("attn", "sdpa")), model, None)
    matrices = [p.shape for p, _ in Inventory(root).parameters if len(p.shape) == 2]
    tokens, rank = options["micro_batch_size"] * options["seq_len"], options.get("lora", {}).get("rank", 0)
    size = 4 if (options["dtype"], options["mixed_precision"]) == ("float32", "no") else 2
    products = {*matrices, *((rows, width) for shape in matrices for width in shape for rows in (tokens, rank))}
    results = {size * rows * width for rows, width in {*products, (tokens, rank)}}
    backward = ("1.backward", "2.backward")
    names = {
        "first_step": ("1.forward", "1.step", *backward),
        "forward": ("2.forward",),
        "backward": backward,
        "step": ("2.step",),
        "eval": ("eval",),
    }[phase]
    found = [each for name, each in row.result["phases"]["device"].items() if name.startswith(names)]
    return max(
        sum(
            n * count
            for n, count, site in each["blocks"]
            if CPU_CHUNK_CAT in site
            or CPU_NORM in site
            or ((CPU_KERNEL in site or site.startswith(CPU_PRODUCT)) and n not in results)
        )
        + sum(n * count * 3 // 2 for n, count, site in each["blocks"] if site.startswith(CPU_ADD))
        for each in found
    )


SHARDED = [row for row in ROWS if row.setup.options["strategy"] != "single"]


@pytest.mark.parametrize("row", SHARDED, ids=lambda row: row.setup.key)
def test_an_engine_holds_what_deepspeed_holds(row: o2.Row) -> None:
    check_gpu(row)


def check_gpu(row: o2.Row) -> None:
    """Between steps, and at the fullest moment of each phase."""
    found, truth = estimated(played(row)), measured(row)
    assert found["idle"] == pytest.approx(truth["idle"], rel=IDLE, abs=SCALARS)
    for phase in truth.keys() - {"idle", "load", "save"}:
        low = truth[phase] - scratch(row, phase)
        assert low * (1 - PEAK) - SCALARS <= found[phase] <= truth[phase] * (1 + PEAK) + SCALARS, phase


PLACES = {"device": "gpu", "host": "host"}
READ = [row for row in ROWS if row.setup.options.get("save") and row.setup.options["strategy"] != "single"]


@pytest.mark.parametrize("side", PLACES)
@pytest.mark.parametrize("row", READ, ids=lambda row: row.setup.key)
def test_loading_and_saving_take_what_they_take_of_gpu_and_host(row: o2.Row, side: str) -> None:
    found, truth = estimated(played(row), PLACES[side]), measured(row, side)
    # Quantizing on CPU takes temporaries in float32, which CUDA's kernels do not.
    most = measured(row, side, quantizing=True)["load"]
    assert truth["load"] * (1 - PEAK) - SCALARS <= found["load"] <= most * (1 + PEAK) + SCALARS
    low = truth["save"] - others(row, side)
    assert low * (1 - PEAK) - SCALARS <= found["save"] <= truth["save"] * (1 + PEAK) + SCALARS


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.setup.options["strategy"] == "single"], ids=lambda row: row.setup.key
)
def test_the_host_holds_a_plain_model_while_it_is_loaded_and_saved(row: o2.Row) -> None:
    cluster = ClusterSpec(gpu=find_gpu("A100-80GB"))
    model, training, strategy = specs(row)
    found = estimator.estimate(model, training, cluster, strategy, SoftwareSpec(), replay=False)
    host = found.host
    on_gpu = {phase.name: phase.allocated for phase in found.gpu.phases}
    device = row.result["phases"]["device"]["save"]
    grows = device["peak"][0] - device["start"][0]
    assert on_gpu["save"] - on_gpu["idle"] == pytest.approx(grows, abs=SCALARS)
    phases = {phase.name: phase.allocated for phase in host.phases}
    truth = measured(row, "host")
    assert phases["idle"] == 0
    for phase in ("load", "save"):
        assert phases[phase] == pytest.approx(truth[phase], rel=IDLE), phase


OFFLOADED = [row for row in SHARDED if "host" in row.result["phases"]]


@pytest.mark.parametrize("row", OFFLOADED, ids=lambda row: row.setup.key)
def test_the_host_holds_what_an_engine_leaves_there(row: o2.Row) -> None:
    check_host(row)


def check_host(row: o2.Row) -> None:
    """As :func:`check_gpu`, of host memory: page-locked blocks as they were asked for."""
    found, truth = estimated(played(row), "host"), measured(row, "host")
    for phase, nbytes in truth.items():
        if phase in ("load", "save"):
            continue  # see above
        assert found[phase] == pytest.approx(nbytes, rel=IDLE if phase == "idle" else PEAK, abs=SCALARS), phase


SWAPPED = [row for row in ROWS if "nvme" in row.result]


def check_nvme(row: o2.Row) -> None:
    """The files, by what they hold, in every pause; and the buffers that DeepSpeed has locked."""
    assert row.result is not None
    ledger, idle = played(row), row.result["phases"]["host"]["2.idle"]
    found, written = ledger.fullest("idle", "nvme"), row.result["nvme"]
    assert written["0.idle"].keys() <= written["1.idle"].keys() == written["2.idle"].keys() == found.keys()
    for name, nbytes in written["2.idle"].items():
        assert found[name] == pytest.approx(nbytes, rel=0.001)
        assert nbytes == written["1.idle"][name] >= written["0.idle"].get(name, 0)  # nothing is ever taken away
    locked = [(size, count) for size, count, site in idle["blocks"] if site == nvme.SITE]
    assert sum(count for _, count in locked) > 0
    pages = sum(-(-size // 4096) * 4096 * count for size, count in locked)
    assert ledger.fullest("idle", "host")["swap_buffers"] == pages


@pytest.mark.parametrize("row", SWAPPED, ids=lambda row: row.setup.key)
def test_deepspeed_writes_and_locks_what_the_engine_says(row: o2.Row) -> None:
    check_nvme(row)


NOT_SWAPPED = [row for row in o2.load_archives()["nvme"].rows if row.result is None]


@pytest.mark.parametrize("row", NOT_SWAPPED, ids=lambda row: row.setup.key)
def test_what_deepspeed_asserts_against_is_refused(row: o2.Row) -> None:
    assert row.unsupported.startswith("AssertionError")
    with pytest.raises(SpecError, match=r"^zero\.(offload_\w+\.buffer_(count|size)|stage3_prefetch_bucket_size): \d+ "):
        played(row)


@pytest.mark.oracle
@pytest.mark.skipif(nvme.unavailable() is not None, reason=f"DeepSpeed's aio cannot run: {nvme.unavailable()}")
def test_the_real_thing_offloads_to_a_folder_here() -> None:
    row = o2.run(o2.groups()["nvme"][1])
    assert row.unsupported is None
    check_nvme(row)
    check_gpu(row)
    check_host(row)


REFUSED = [
    row
    for group in ("fsdp", "fsdp1", "hybrid", "twinflow", "zeropp", "knobs", "quantized", "liger")
    for row in o2.load_archives()[group].rows
    if row.result is None
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.setup.key)
def test_what_accelerate_or_an_optimizer_refuses_is_refused(row: o2.Row) -> None:
    with pytest.raises(SpecError):
        played(row)


def test_there_are_rows() -> None:
    assert len(REFUSED) >= 2
    assert len(ROWS) >= 150

"""Reading and writing checkpoints: the rules that no row of the archive shows."""

from __future__ import annotations

import pytest

from memplan import ClusterSpec, Strategy, TrainingSpec
from memplan.api import estimate
from memplan.engines import checkpoint
from memplan.memory.course import Ledger
from memplan.results import Estimate
from memplan.specs.strategy import FsdpSpec, ZeroSpec

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}


def host(strategy: Strategy, gpus: int = 1, nodes: int = 1, **training: object) -> dict[str, int]:
    """Bytes of a node's host in every phase."""
    found = answer(strategy, ClusterSpec(gpu="A100-80GB", gpus=gpus, nodes=nodes), **training).host
    return {phase.name: phase.allocated for phase in found.phases}


def answer(strategy: Strategy, cluster: ClusterSpec, **training: object) -> Estimate:
    found = estimate(CONFIG, TrainingSpec(seq_len=16, **training), cluster, strategy, replay=False)
    assert isinstance(found, Estimate)
    return found


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp"])
def test_every_rank_of_a_node_casts_the_whole_model(kind: str) -> None:
    strategy = Strategy(kind=kind)
    one = host(strategy, gpus=2, nodes=2, dtype="float32")["load"]
    eight = host(strategy, gpus=16, nodes=2, dtype="float32")["load"]
    assert one > 0
    assert eight == 8 * one


@pytest.mark.parametrize("kind", ["single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_a_checkpoint_of_the_dtype_that_is_asked_for_stays_a_mapped_file(kind: str) -> None:
    # Stage 3 has its partitions on the host for a moment, to put them into one buffer.
    found = host(Strategy(kind=kind), gpus=1 if kind == "single" else 4, dtype="bfloat16")["load"]
    cast_by_fsdp = kind == "fsdp"
    whole = host(Strategy(kind="ddp"), dtype="float32")["load"]
    assert found == (whole * 4 if cast_by_fsdp else whole // 2 if kind == "zero3" else 0)


def test_the_main_process_alone_holds_what_is_gathered_to_be_saved() -> None:
    strategy = Strategy(kind="zero3", zero=ZeroSpec(stage3_gather_16bit_weights_on_model_save=True))
    kept = Strategy(kind="zero3")
    for ranks in (2, 8):
        more = host(strategy, gpus=ranks)["save"] - host(kept, gpus=ranks)["save"]
        assert more == host(Strategy(kind="ddp"), dtype="bfloat16")["save"], ranks
    assert host(Strategy(kind="ddp"), gpus=8)["save"] == host(Strategy(kind="single"))["save"]


def test_stage_3_without_zero_init_has_the_whole_model_on_every_rank() -> None:
    whole, parts = (
        Strategy(kind="zero3", zero=ZeroSpec(reduce_bucket_size=1000, zero3_init_flag=flag)) for flag in (False, True)
    )
    assert host(whole, 64, 8, dtype="float32")["load"] > 2 * host(parts, 64, 8, dtype="float32")["load"]
    cluster = ClusterSpec(gpu="A100-80GB", gpus=64, nodes=8)
    load = [answer(each, cluster).gpu.phases[0].allocated for each in (whole, parts)]
    assert load[0] > 2 * load[1]


def test_a_sharded_checkpoint_of_fsdp_needs_less_of_the_host() -> None:
    full, shards = (
        host(Strategy(kind="fsdp", fsdp=FsdpSpec(state_dict_type=kind)), gpus=8)["save"]
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    )
    assert full == pytest.approx(shards, rel=0.01)  # all shards of a node, or the whole on its main process
    assert host(Strategy(kind="fsdp", fsdp=FsdpSpec(state_dict_type="SHARDED_STATE_DICT")), 16, 2)["save"] < 0.6 * full


def test_loading_is_judged_where_the_hosts_size_is_known() -> None:
    unknown = ClusterSpec(gpu="A100-80GB", gpus=4)
    assert answer(Strategy(kind="ddp"), unknown, dtype="float32").verdict == "fits"
    small = unknown.replace(host_memory="32MiB")
    assert answer(Strategy(kind="ddp"), small, dtype="float32").verdict == "does-not-fit"
    offloaded = Strategy(kind="zero2", offload_optimizer="cpu")
    assert answer(offloaded, unknown).verdict == "unknown"


def test_pinned_blocks_and_the_main_processs_are_of_the_node() -> None:
    ledger = Ledger(ranks=4)
    ledger.allocate("weights", 100, "host")
    ledger.allocate("gradients", 100, "pinned")
    ledger.allocate("weights", 7, "main")
    assert ledger.fullest("load", "host") == {"weights": 407, "gradients": 4 * 128}
    assert ledger.fullest("load", "pinned") == {"gradients": 4 * 128}


def test_a_file_is_as_large_as_its_tensors() -> None:
    assert checkpoint.largest_file([3, 4, 5], limit=7) == 7
    assert checkpoint.largest_file([3, 50, 4], limit=7) == 50

import pytest
from tests.throughput.setups import resolved

from memplan.micro_batch import run_of
from memplan.throughput.kernels import STAGES, Product, work_of


def works(**options):
    setup, cluster, _ = resolved(**options)
    run, micro = run_of(setup, cluster.gpu)
    return run, work_of(micro.unrolled)


def test_products_have_the_shapes_of_the_model() -> None:
    _, work = works(mixed_precision="bf16")
    rows, hidden, inner, kv = 1024, 2048, 5632, 256
    forward = work["forward"].products
    layers = 22
    assert forward[Product(rows, inner, hidden, "bfloat16")] == 2 * layers  # gate and up
    assert forward[Product(rows, hidden, inner, "bfloat16")] == layers  # down
    assert forward[Product(rows, hidden, hidden, "bfloat16")] == 2 * layers  # queries and output
    assert forward[Product(rows, kv, hidden, "bfloat16")] == 2 * layers  # keys and values
    assert forward[Product(rows, 32000, hidden, "bfloat16")] == 1
    assert sum(forward.values()) == 7 * layers + 1
    backward = work["backward"].products
    assert backward[Product(inner, hidden, rows, "bfloat16")] == 2 * layers  # gradients of gate's and up's weights
    assert backward[Product(hidden, inner, rows, "bfloat16")] == layers


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_flop_is_lost(checkpointed: bool) -> None:
    run, work = works(gradient_checkpointing=checkpointed, mixed_precision="bf16")
    assert work["forward"].flops == run.profile.forward_flops
    assert work["backward"].flops + work["recomputation"].flops == run.profile.backward_flops
    assert not any(sum(each.unknown.values()) for each in work.values())


def test_recomputation_is_the_forward_of_the_layers_once_more() -> None:
    _, plain = works(mixed_precision="bf16")
    _, work = works(gradient_checkpointing=True, mixed_precision="bf16")
    assert plain["recomputation"].flops == 0
    head = 2 * 1024 * 2048 * 32000
    # The last product of a layer saves nothing that backward asks for, so a recomputation stops before it.
    down = 22 * 2 * 1024 * 2048 * 5632
    assert work["recomputation"].flops == work["forward"].flops - head - down
    assert work["backward"].products == plain["backward"].products
    assert work["recomputation"].elementwise


def test_a_causal_kernel_computes_half() -> None:
    _, causal = works(mixed_precision="bf16")
    _, masked = works(mixed_precision="bf16", packed=False)
    full = 22 * 4 * 1024 * 1024 * 2048
    assert sum(flops * n for (_, flops), n in causal["forward"].attention.items()) == full // 2
    assert sum(flops * n for (_, flops), n in masked["forward"].attention.items()) == full
    assert causal["forward"].flops == masked["forward"].flops
    backward = causal["backward"].attention
    assert sum(flops * n for (_, flops), n in backward.items()) == full * 5 // 4


def test_eager_attention_moves_its_scores() -> None:
    _, fused = works(mixed_precision="bf16")
    _, eager = works(mixed_precision="bf16", attn="eager")
    scores = 22 * 32 * 1024 * 1024
    assert not eager["forward"].attention
    assert eager["forward"].moved - fused["forward"].moved > 4 * scores


def test_what_a_kernel_moves_is_what_it_writes_and_reads() -> None:
    _, work = works(mixed_precision="no", dtype="bfloat16", seq_len=1024)
    hidden = 1024 * 2048 * 2
    residuals = 3 * hidden  # two operands and a result
    assert work["forward"].elementwise[residuals] >= 2 * 22


@pytest.mark.parametrize("options", [{"lora": True}, {"liger": True}, {"quantization": "nf4"}, {"optim": "adafactor"}])
def test_every_product_finds_its_result(options: dict) -> None:
    from memplan.specs.training import LoraSpec, QuantizationSpec

    if "lora" in options or "quantization" in options:
        options["lora"] = LoraSpec(rank=8)
    if "quantization" in options:
        options["quantization"] = QuantizationSpec(kind="nf4")
    _, work = works(mixed_precision="bf16", **options)
    assert not any(sum(each.unknown.values()) for each in work.values())
    assert all(work[stage].flops == 0 or work[stage].products for stage in STAGES)


def test_dequantizing_moves_the_weights() -> None:
    from memplan.specs.training import LoraSpec, QuantizationSpec

    lora = LoraSpec(rank=8)
    _, plain = works(mixed_precision="bf16", dtype="bfloat16", lora=lora)
    _, packed = works(mixed_precision="bf16", lora=lora, quantization=QuantizationSpec(kind="nf4"))
    weights = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    assert packed["forward"].moved - plain["forward"].moved > 2 * weights

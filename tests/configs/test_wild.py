"""Configs of public repositories, each in a style of its own: a setup, or a precise refusal.

``wild/`` holds their keys and values, put down anew; ``source`` says where they were seen, ``odd`` what is odd in them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from memplan import checks
from memplan.errors import MemplanError, UnsupportedError

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
WILD = Path(__file__).with_name("wild")
LLAMA = "meta-llama/Llama-2-7b"
GPUS: dict[str, Any] = {"gpu": "A100-80GB", "gpus": 8, "host_memory": "2TiB", "nvme": "8TiB"}
OF_FILE = {name: value for name, value in GPUS.items() if name != "gpus"}


@dataclass(frozen=True)
class Wild:
    source: str
    odd: str
    setup: dict[str, Any] = field(default_factory=dict)
    """What it comes to, as the estimate says it; ``gpus`` is the cluster's."""
    findings: tuple[str, ...] = ()
    """Codes of those that are errors."""
    warnings: tuple[str, ...] = ()
    unsaid: bool = False
    """Whether nothing says how long sequences are."""
    refused: str = ""
    model: str | None = LLAMA
    cluster: dict[str, Any] = field(default_factory=lambda: GPUS)


ZERO3_OFFLOADED = {"strategy": "zero3", "offload_optimizer": "cpu", "offload_param": "cpu"}
OWN: dict[str, Any] = {"model": None, "cluster": OF_FILE}
"""Files that name their model, and say on how many GPUs they run."""
CASES: dict[str, Wild] = {
    "hf_tests_zero2.json": Wild(
        "huggingface/transformers, tests/deepspeed/ds_config_zero2.json",
        "both precisions are auto: what decides is which of bf16 and fp16 the Trainer is asked for",
        {"strategy": "zero2", "offload_optimizer": "cpu", "mixed_precision": "bf16"},
    ),
    "hf_tests_zero3.json": Wild(
        "huggingface/transformers, tests/deepspeed/ds_config_zero3.json, a version of 2021",
        "buckets of 0 elements, which DeepSpeed took then; the old name of stage3_gather_16bit_weights_on_model_save",
        refused="zero_optimization.reduce_bucket_size: 0 is refused by DeepSpeed",
    ),
    "fastchat_zero3.json": Wild(
        "lm-sys/FastChat, playground/deepspeed_config_s3.json",
        "no section bf16; sub_group_size 1e12; a persistence threshold of 1e6, ten times the default",
        {**ZERO3_OFFLOADED, "micro_batch_size": 1},
    ),
    "alpaca_offload.json": Wild(
        "tatsu-lab/stanford_alpaca, configs/default_offload_opt_param.json",
        "WarmupDecayLR with everything auto; gathering to save is off, so no weights are saved",
        {**ZERO3_OFFLOADED, "mixed_precision": "bf16", "optim": "adamw_torch_fused"},
        warnings=("no-weights-saved",),
    ),
    "open_assistant_zero3.json": Wild(
        "LAION-AI/Open-Assistant, model/model_training/configs/zero3_config_sft.json",
        "WarmupDecayLR without total_num_steps, which nobody fills in",
        {"strategy": "zero3", "offload_optimizer": "none"},
        ("scheduler-total-steps",),
    ),
    "axolotl_zero3_offload.json": Wild(
        "axolotl-ai-cloud/axolotl, deepspeed_configs/zero3_bf16_cpuoffload_all.json",
        "keys of stage 3 without the stage3_ in front; sub_group_size 0; torch's optimizer on the CPU",
        {**ZERO3_OFFLOADED, "mixed_precision": "bf16"},
    ),
    "axolotl_lora.yaml": Wild(
        "axolotl-ai-cloud/axolotl, examples/llama-3/lora-8b.yml",
        "axolotl's own names, some of which are TrainingArguments'",
        refused="an axolotl config is not read",
        **OWN,
    ),
    "starchat_zero3.json": Wild(
        "bigcode-project/starcoder, chat/deepspeed_z3_config_bf16.json",
        "train_batch_size is fixed, its parts are auto: 8 GPUs need a batch of 4",
        {"strategy": "zero3", "micro_batch_size": 4, "grad_accum_steps": 1},
    ),
    "starchat.yaml": Wild(
        "bigcode-project/starcoder, chat/config.yaml",
        "a YAML of TrainingArguments of 2023; weight_decay '0.'; settings of W&B of its own",
        {"strategy": "ddp", "seq_len": 1024, "packed": True, "micro_batch_size": 4, "grad_accum_steps": 8},
        warnings=("removed-argument",) * 3,
        model=None,
    ),
    "megatron_infinity.json": Wild(
        "microsoft/DeepSpeedExamples, Megatron-LM-v1.1.5-ZeRO3/examples/ds_zero_stage_infinity_config.json",
        "stage3_param_persitance_threshold is misspelt, which DeepSpeed refuses today; thread_count is renamed",
        {"strategy": "zero3", "offload_optimizer": "nvme", "offload_param": "nvme", "micro_batch_size": 4},
        ("unknown-key",),
    ),
    "megatron_zero2_cpu.json": Wild(
        "microsoft/DeepSpeedExamples, Megatron-LM/scripts/ds_zero2_cpu_offload_config.json",
        "cpu_offload of 2020; no micro-batch: it is 16 / 8 GPUs",
        {"strategy": "zero2", "offload_optimizer": "cpu", "mixed_precision": "fp16", "micro_batch_size": 2},
    ),
    "bing_bert_lamb.json": Wild(
        "microsoft/DeepSpeedExamples, bing_bert/deepspeed_bsz64k_lamb_config_seq128.json",
        "LAMB, and a section sparse_attention, which DeepSpeed has removed",
        refused="optimizer.type: 'Lamb' with these params is not modelled",
    ),
    "autotuning.json": Wild(
        "microsoft/DeepSpeedExamples, autotuning/hf/dsconfigs/ds_config_fp16_tune.json",
        "no ZeRO at all: it is what the autotuner starts from; a key with a blank at its end",
        refused="zero_optimization: missing, which accelerate refuses",
    ),
    "accelerate_deepspeed.yaml": Wild(
        "huggingface/accelerate, examples/config_yaml_templates/deepspeed.yaml",
        "it names a DeepSpeed file; zero3_init_flag false, which accelerate does not look at",
        {**ZERO3_OFFLOADED, "mixed_precision": "fp16", "gpus": 2},
        warnings=("no-weights-saved",),
        cluster=OF_FILE,
    ),
    "accelerate_zero3_offload.json": Wild(
        "huggingface/accelerate, examples/deepspeed_config_templates/zero_stage3_offload_config.json",
        "stage3_gather_16bit_weights_on_model_save is auto, of which accelerate makes false",
        {**ZERO3_OFFLOADED, "mixed_precision": "fp16", "grad_accum_steps": 1},
        warnings=("no-weights-saved",),
    ),
    "accelerate_fsdp.yaml": Wild(
        "huggingface/accelerate, examples/config_yaml_templates/fsdp.yaml",
        "no fsdp_version: that is 1",
        {"strategy": "fsdp", "mixed_precision": "bf16", "gpus": 2},
        cluster=OF_FILE,
    ),
    "trl_fsdp2.yaml": Wild(
        "huggingface/trl, examples/accelerate_configs/fsdp2.yaml",
        "version 2, with tpu_* keys that mean nothing here",
        {"strategy": "fsdp", "gpus": 8},
        cluster=OF_FILE,
    ),
    "handbook_zero3.yaml": Wild(
        "huggingface/alignment-handbook, recipes/accelerate_configs/deepspeed_zero3.yaml",
        "DeepSpeed's settings in accelerate's own names; one process",
        {**ZERO3_OFFLOADED, "mixed_precision": "bf16", "gpus": 1},
        cluster=OF_FILE,
    ),
    "zephyr_qlora.yaml": Wild(
        "huggingface/alignment-handbook, recipes/zephyr-7b-beta/sft/config_qlora.yaml",
        "QLoRA of TRL, FlashAttention with padding; a mixture of data sets in a nested section",
        refused="attn_implementation: 'flash_attention_2' with padding (unpadding copies) is not modelled",
        **OWN,
    ),
    "peft_qlora_zero3.yaml": Wild(
        "huggingface/peft, examples/sft/configs/deepspeed_config_z3_qlora.yaml",
        "blanks at the ends of lines",
        {"strategy": "zero3", "offload_param": "none", "gpus": 2},
        cluster=OF_FILE,
    ),
    "peft_qlora_zero3.sh": Wild(
        "huggingface/peft, examples/sft/run_peft_qlora_deepspeed_stage3.sh",
        "a script with the launcher's config and some arguments that only this example has",
        {"strategy": "zero3", "micro_batch_size": 2, "quantization": "nf4-dq", "dtype": "bfloat16", "gpus": 2},
        warnings=("removed-argument",),
        **OWN,
    ),
    "peft_qlora_fsdp.yaml": Wild(
        "huggingface/peft, examples/sft/configs/fsdp_config_qlora.yaml",
        "mixed precision 'no', in quotes as YAML needs; fsdp_use_orig_params false",
        {"strategy": "fsdp", "offload_param": "cpu", "mixed_precision": "no"},
        cluster=OF_FILE,
    ),
    "vicuna_7b.sh": Wild(
        "lm-sys/FastChat, scripts/train_vicuna_7b.sh",
        "FSDP by TrainingArguments' text of 2023, and an argument that transformers has removed",
        {"strategy": "fsdp", "mixed_precision": "fp16", "gpus": 16, "seq_len": 2048, "packed": False},
        ("removed-argument",) * 3,
        **OWN,
    ),
    "qwen_lora.sh": Wild(
        "QwenLM/Qwen, finetune/finetune_lora_ds.sh",
        "arguments of the launcher in a variable over lines; apostrophes in comments; --use_lora without a value",
        {"strategy": "zero2", "micro_batch_size": 2, "grad_accum_steps": 8, "seq_len": 512, "gpus": 8},
        ("removed-argument",) * 2,
        model=LLAMA,  # its own brings code
        cluster=OF_FILE,
    ),
    "qwen_zero2.json": Wild(
        "QwenLM/Qwen, finetune/ds_config_zero2.json",
        "offload_optimizer to the device none",
        {"strategy": "zero2", "offload_optimizer": "none"},
    ),
    "llama_factory_full.yaml": Wild(
        "hiyouga/LLaMA-Factory, examples/train_full/llama3_full_sft.yaml",
        "checkpointing that is on without being said; a DeepSpeed file from the repository's root",
        {"strategy": "zero3", "gradient_checkpointing": True, "dtype": "bfloat16", "packed": False, "seq_len": 2048},
        ("removed-argument",),
        model=None,
    ),
    "llama_factory_zero3.json": Wild(
        "hiyouga/LLaMA-Factory, examples/deepspeed/ds_z3_config.json",
        "comms_config and monitor_config, which DeepSpeed does not know: they look like comms_logger and csv_monitor",
        {"strategy": "zero3"},
    ),
    "llama_factory_qlora.yaml": Wild(
        "hiyouga/LLaMA-Factory, examples/extras/fsdp_qlora/llama3_lora_sft.yaml, with bf16",
        "the same file for one GPU and for FSDP",
        {"strategy": "single", "quantization": "nf4-dq", "seq_len": 1024, "eval_batch_size": 1, "dtype": "bfloat16"},
        ("removed-argument",),
        model=None,
        cluster={**GPUS, "gpus": 1},
    ),
    "llama_factory_fsdp.sh": Wild(
        "hiyouga/LLaMA-Factory, examples/extras/fsdp_qlora/single_node.sh",
        "a script that installs things first; accelerate starts a script that is given a YAML",
        {"strategy": "fsdp", "offload_param": "cpu", "quantization": "nf4-dq", "gpus": 2, "use_reentrant": True},
        ("removed-argument",),
        **OWN,
    ),
    "llama_factory_badam.sh": Wild(
        "hiyouga/LLaMA-Factory, examples/extras/badam/train_zero3.sh",
        "an optimizer that neither transformers nor DeepSpeed has",
        refused="use_badam: true is not modelled",
        **OWN,
    ),
    "llava.sh": Wild(
        "haotian-liu/LLaVA, scripts/finetune.sh",
        "a model of images and text; variables that are to be filled in",
        refused="vision_tower: a model of images and text is not modelled",
        **OWN,
    ),
    "chatglm.sh": Wild(
        "THUDM/ChatGLM-6B, ptuning/ds_train_finetune.sh",
        "a command's output in a variable; lengths of source and target, which memplan does not add up",
        {"strategy": "zero2", "mixed_precision": "fp16", "micro_batch_size": 4, "grad_accum_steps": 4, "gpus": 3},
        warnings=("removed-argument",),
        unsaid=True,
        model=LLAMA,  # its own brings code
        cluster=OF_FILE,
    ),
    "baichuan2.json": Wild(
        "baichuan-inc/Baichuan2, fine-tune/ds_config.json",
        "a fixed clipping beside a batch that is auto; a profiler that is off, with a null in it",
        {"strategy": "zero3", "offload_optimizer": "none", "mixed_precision": "bf16"},
    ),
    "longlora_stage2.json": Wild(
        "dvlab-research/LongLoRA, ds_configs/stage2.json",
        "bf16 with the loss scaling of fp16, which DeepSpeed took then and refuses today",
        {"strategy": "zero2", "offload_optimizer": "none", "mixed_precision": "bf16"},
        ("unknown-key",) * 5,
    ),
    "internvl_stage3.json": Wild(
        "OpenGVLab/InternVL, internvl_chat/zero_stage3_config.json",
        "buckets of 1e9 elements and a persistence threshold of 1e7; auto_cast; both precisions are auto",
        {"strategy": "zero3", "offload_param": "none", "mixed_precision": "bf16"},
    ),
    "moss_sft.yaml": Wild(
        "OpenMOSS/MOSS, configs/sft.yaml",
        "keys of other engines, empty; offloading to none",
        {"strategy": "zero3", "offload_optimizer": "none", "mixed_precision": "fp16", "gpus": 8},
        cluster=OF_FILE,
    ),
    "belle.json": Wild(
        "LianjiaTech/BELLE, train/configs/deepspeed_config.json",
        "DeepSpeed's AdamW as torch's, without betas and eps; WarmupDecayLR with everything auto",
        {"strategy": "zero2", "offload_optimizer": "none", "mixed_precision": "fp16"},
    ),
    "xtuner_zero2_offload.json": Wild(
        "InternLM/xtuner, xtuner/configs/deepspeed/deepspeed_zero2_offload.json",
        "zero_force_ds_cpu_optimizer false, and gradients that are not contiguous",
        {"strategy": "zero2", "offload_optimizer": "cpu", "mixed_precision": "fp16"},
    ),
    "lmflow_fsdp.yaml": Wild(
        "OptimalScale/LMFlow, configs/accelerate_fsdp_config.yaml",
        "units by size, of 1e6 parameters; downcast_bf16 true, and not 'no'",
        {"strategy": "fsdp", "offload_param": "none", "mixed_precision": "bf16", "gpus": 8},
        cluster=OF_FILE,
    ),
    "open_instruct_stage3.json": Wild(
        "allenai/open-instruct, configs/ds_configs/stage3_offloading_accelerate.conf",
        "a JSON that is called .conf; steps_per_print as a float",
        {**ZERO3_OFFLOADED, "mixed_precision": "bf16"},
    ),
}


def test_every_file_has_its_case() -> None:
    assert {path.name for path in WILD.iterdir()} == set(CASES)
    assert len({case.source.partition(",")[0] for case in CASES.values()}) >= 20


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(WILD)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_a_setup(name: str) -> None:
    case = CASES[name]
    of_an_engine = case.model is not None and not name.endswith(".sh")
    asked = {"seq_len": 2048} if of_an_engine else None
    found = checks.check(Path(name), case.model, asked, case.cluster)
    said = {**found.estimate.setup, "gpus": found.estimate.cluster["gpus"]}
    assert {key: said[key] for key in case.setup} == case.setup
    by_severity = {
        severity: sorted(each.code for each in found.findings if each.severity == severity)
        for severity in ("error", "warning", "info")
    }
    assert by_severity == {
        "error": sorted(case.findings),
        "warning": sorted(case.warnings),
        "info": ["padding"] * (not said["packed"]) + ["seq-len-unknown"] * case.unsaid,
    }
    data = Path(name).read_text()
    if name.endswith(".json"):  # as values it is the same
        again = checks.check(json.loads(data), case.model, asked, case.cluster)
        assert (again.estimate.gpu, again.estimate.host) == (found.estimate.gpu, found.estimate.host)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_a_refusal(name: str) -> None:
    case = CASES[name]
    with pytest.raises(MemplanError) as error:
        checks.check(Path(name), case.model, None, case.cluster)
    assert case.refused in str(error.value)


def test_deepspeed_refuses_what_is_refused_for_it() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for name, key in (
        ("hf_tests_zero3.json", "reduce_bucket_size"),
        ("megatron_infinity.json", "stage3_param_persitance_threshold"),
    ):
        values = json.loads(Path(name).read_text())["zero_optimization"]
        with pytest.raises(ValidationError, match=key):
            DeepSpeedZeroConfig(**values)
        DeepSpeedZeroConfig(**{known: value for known, value in values.items() if known != key})
    section = json.loads(Path("longlora_stage2.json").read_text())["bf16"] | {"enabled": True}
    with pytest.raises(ValidationError, match="5 validation errors"):
        DeepSpeedBF16Config(**section)


def test_a_model_with_its_own_code_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="remote code is never run"):
        checks.check(Path("qwen_lora.sh"), None, None, OF_FILE)

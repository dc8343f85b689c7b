"""Commands that start runs, taken apart; what transformers' parser makes of the same words."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.configs.command import is_command, parse_command
from memplan.errors import SpecError, UnsupportedError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchrun --nproc_per_node=4 train.py --bf16 True", True),
        ("#!/bin/bash\nX=1\n", True),
        ("--model_name_or_path gpt2", True),
        ("# a comment\nNCCL_P2P_DISABLE=1 deepspeed --num_gpus 2 a.py --x", True),
        ("python -m torch.distributed.run a.py --x 1", True),
        ('{"zero_optimization": {}}', False),
        ("distributed_type: FSDP\nmain_training_function: main\n", False),
        ("### model\nmodel_name_or_path: a\ndeepspeed: x.json\n", False),
        ("- a\n- b", False),
        ("uv run accelerate launch a.py --x 1", True),
        ("docker run --rm image torchrun a.py --x 1", True),
        ("trl sft --model_name_or_path gpt2", True),
        ("srun: torchrun\nmain: python a.py", False),
    ],
)
def test_commands_are_told_from_configs(text: str, expected: bool) -> None:
    assert is_command(text) is expected


@pytest.mark.parametrize(
    ("text", "launcher", "per_node", "nodes"),
    [
        ("torchrun --nproc_per_node=4 train.py --bf16 True", "torchrun", 4, None),
        ("torchrun --nnodes 2 --nproc-per-node 8 train.py --bf16", "torchrun", 8, 2),
        ("deepspeed --num_gpus=3 main.py --bf16", "deepspeed", 3, None),
        ("deepspeed main.py --bf16", "deepspeed", None, None),
        ("python train.py --bf16", "python", 1, None),
        ("python3 -m torch.distributed.launch --nproc_per_node 2 train.py --bf16", "torchrun", 2, None),
        ("srun torchrun --nproc_per_node 2 -m pkg.train --bf16", "torchrun", 2, None),
        ("accelerate launch --num_processes 8 --num_machines 2 train.py --bf16", "accelerate", 4, 2),
        ("accelerate launch --num-processes 8 --num-machines=2 train.py --bf16 true", "accelerate", 4, 2),
        ("python -m deepspeed.launcher.runner --num_gpus 4 train.py --bf16 true", "deepspeed", 4, None),
        ("FORCE_TORCHRUN=1 NPROC_PER_NODE=4 llamafactory-cli train --bf16 true", "llamafactory-cli", 4, None),
        ("--bf16 True", "", None, None),
        ("deepspeed --include localhost:0,1,3 --master_port 1 a.py --bf16", "deepspeed", 3, 1),
        ("deepspeed --include='worker-0:0,1@worker-1:2,3' a.py --bf16", "deepspeed", 2, 2),
        ("deepspeed --include worker-0@worker-1:2 a.py --bf16", "deepspeed", None, None),
        ("uv run --python 3.12 accelerate launch --num_processes 2 a.py --bf16", "accelerate", 2, None),
        (
            "docker run --gpus all -v /a:/b --ipc=host --rm -it -e A=1 -w /x -u 1 image "
            "torchrun --nproc_per_node 2 a.py --bf16",
            "torchrun",
            2,
            None,
        ),
    ],
)
def test_launchers(text: str, launcher: str, per_node: int | None, nodes: int | None) -> None:
    command = parse_command(text, "run.sh")
    assert (command.launcher, command.per_node, command.nodes) == (launcher, per_node, nodes)
    assert command.arguments["bf16"] is True


def test_a_script_with_variables_over_lines() -> None:
    text = """#!/bin/bash
    # torchrun --nproc_per_node 1 old.py --fp16
    export NCCL_P2P_DISABLE=1
    GPUS=8
    MODEL="a/b" # it's the model
    ARGS="
        --nproc_per_node $GPUS \\
        --master_port 1
    "
    torchrun $ARGS train.py \\
        --model_name_or_path $MODEL \\
        --output_dir out/$UNKNOWN \\
        --learning_rate $LR \\
        --use_lora \\
        --bf16 ${BF16:-True} 2>&1 | tee log.txt
    """
    command = parse_command(text, "run.sh")
    assert command.per_node == 8
    assert command.environment["NCCL_P2P_DISABLE"] == "1"
    assert command.arguments == {
        "model_name_or_path": "a/b",
        "output_dir": "out/$UNKNOWN",
        "learning_rate": "$LR",
        "use_lora": True,
        "bf16": True,
    }


def test_arrays_of_a_script() -> None:
    text = """#!/bin/bash
    LR=1e-4
    ARGS=(
        --output_dir "my out"   # with a space
        --learning_rate $LR
    )
    ARGS+=(--bf16)
    declare -a MORE=(--max_steps 3)
    torchrun --nproc_per_node 2 train.py "${ARGS[@]}" ${MORE[*]}
    """
    arguments = parse_command(text, "run.sh").arguments
    assert arguments == {"output_dir": "my out", "learning_rate": 1e-4, "bf16": True, "max_steps": 3}
    doubled = "A=(--aaaaaaaa)\n" + 'A+=("${A[@]}")\n' * 40 + 'torchrun a.py "${A[@]}"'
    with pytest.raises(SpecError, match="too many for a command"):
        parse_command(doubled, "run.sh")


def test_a_shell_that_is_started_on_each_node() -> None:
    text = """#!/bin/bash
    LAUNCHER="torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES"
    CMD="train.py --output_dir o --max_steps 3"
    srun --jobid $SLURM_JOB_ID bash -c "$LAUNCHER --node_rank \\$SLURM_PROCID $CMD"
    """
    command = parse_command(text, "run.sh")
    assert (command.launcher, command.per_node, command.nodes) == ("torchrun", 8, None)
    assert command.arguments == {"output_dir": "o", "max_steps": 3}


@pytest.mark.parametrize(
    "text",
    [
        "trl sft --bf16 True",
        "axolotl train a.yaml",
        "tune run a --config b.yaml",
        "NPROC_PER_NODE=8 swift sft --bf16 true",
    ],
)
def test_commands_with_defaults_of_their_own_are_refused_by_name(text: str) -> None:
    with pytest.raises(UnsupportedError, match="its defaults are its own"):
        parse_command(text, "run.sh")


def test_words_are_what_transformers_parser_makes_of_them() -> None:
    from transformers import HfArgumentParser, TrainingArguments

    text = (
        "--output_dir out --per_device_train_batch_size 4 --learning_rate 2e-5 --bf16 False --use_cpu yes "
        "--no_dataloader_pin_memory --activation_checkpointing --run_name wandb --warmup_steps=0.1 "
        "--eval_strategy no --adam_beta2 0.95 --max_steps 10"
    )
    command = parse_command(text, "args.txt")
    (real,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(text.split())
    for name, value in command.arguments.items():
        known: Any = getattr(real, name)
        assert value == (getattr(known, "value", known)), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchrun --nproc_per_node 2 --bf16", "starts no script"),
        ("#!/bin/bash\necho hello", "starts no run"),
        ("torchrun a.py --bf16\ntorchrun b.py --bf16", "starts 2 runs"),
        ("torchrun a.py --bf16 maybe", "bf16: 'maybe' is neither true nor false"),
        ("torchrun a.py --per_device_train_batch_size $B", "'$B' is a variable of the shell"),
        ("torchrun a.py --gradient_accumulation_steps many", "'many' is not a number"),
        ('torchrun a.py --output_dir "x', "is not a command"),
    ],
)
def test_what_cannot_be_told_is_said(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_command(text, "run.sh")
    assert str(error.value).startswith("run.sh: ")
    assert message in str(error.value)


_OF_SLURM = "torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES a.py --bf16"


@pytest.mark.parametrize(
    ("text", "cluster"),
    [
        ("torchrun --nproc_per_node 8 a.py --bf16", {"gpus": 8, "nodes": 1}),
        ("torchrun --nproc_per_node gpu a.py --bf16", {"nodes": 1}),
        ("torchrun --nproc_per_node $(nvidia-smi -L | wc -l) a.py --bf16", {"nodes": 1}),
        ("torchrun --nproc_per_node ² a.py --bf16", {"nodes": 1}),
        ("torchrun --nproc_per_node 8 --nnodes 1:4 a.py --bf16", {"per_node": 8}),
        ("srun torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES a.py --bf16", {"per_node": 8}),
        (
            "#!/bin/bash\n#SBATCH --nodes=2\n\nsrun torchrun --nproc_per_node 8 --nnodes $SLURM_NNODES a.py --bf16",
            {"gpus": 16, "nodes": 2},
        ),
        (
            "#!/bin/bash\n#SBATCH -N 2  # both\n#SBATCH --gpus-per-node=a100:4\n"
            "srun torchrun --nproc_per_node=$SLURM_GPUS_ON_NODE --nnodes=${SLURM_JOB_NUM_NODES} a.py --bf16",
            {"gpus": 8, "nodes": 2},
        ),
        (f"#!/bin/bash\n#SBATCH --nodes=2-4\n{_OF_SLURM}", {"per_node": 8}),
        (f"#!/bin/bash\necho\n#SBATCH -N2\n{_OF_SLURM}", {"per_node": 8}),
        ("#!/bin/bash\n#SBATCH -N 2 --ntasks-per-node=8\nsrun python a.py --bf16", {"gpus": 16, "nodes": 2}),
        ("#!/bin/bash\n#SBATCH -N 2 --ntasks-per-node=8\nsrun -N1 python a.py --bf16", {"gpus": 8, "nodes": 1}),
        ("srun -N 2 -n 16 python a.py --bf16", {"gpus": 16, "nodes": 2}),
        ("srun python a.py --bf16", {}),
        ("mpirun -np 4 python a.py --bf16", {"gpus": 4}),
        ("accelerate launch --num_processes 16 --num_machines $N a.py --bf16", {"gpus": 16}),
        ("deepspeed a.py --bf16", {"nodes": 1}),
        ("python a.py --bf16", {"gpus": 1, "nodes": 1}),
    ],
)  # fmt: skip
def test_only_what_is_said_is_known_of_the_ranks(text: str, cluster: dict[str, int]) -> None:
    assert parse_command(text, "run.sh").cluster == cluster


@pytest.mark.parametrize(
    "text",
    [
        "{} >log.txt",
        "{} > 'my log.txt' 2>&1",
        "{} 2>/dev/null",
        "{} &>> log.txt",
        "{} </dev/null",
        "{} > >(tee log.txt) 2>&1 &",
        "{} |& tee log.txt",
        "{}; echo done",
        "cd there && {} || exit 1",
        "({})",
        "if [ -d there ]; then {}; fi",
        "train() {{ {}; }}",
        "bash -c 'cd there; {} | tee log.txt'",
    ],
)
def test_what_a_shell_takes_for_itself_is_no_argument(text: str) -> None:
    command = "torchrun --nproc_per_node $(nvidia-smi -L | wc -l) --nnodes 2 train.py --bf16 True --fp16 False"
    found = parse_command("#!/bin/bash\n" + text.format(command), "run.sh")
    assert dict(found.arguments) == {"bf16": True, "fp16": False}
    assert found.options == {"nproc_per_node": "$(nvidia-smi -L | wc -l)", "nnodes": 2}


def test_quotes_and_templates_are_no_redirections() -> None:
    words = "python train.py --run_name 'a > b; c' --model_name_or_path <model> --note ${A:-x|y} --tag a\\;b"
    found = parse_command(words, "run.sh").arguments
    expected = {"run_name": "a > b; c", "model_name_or_path": "<model>", "note": "x|y", "tag": "a;b"}
    assert dict(found) == expected


def test_a_command_that_variables_hold() -> None:
    text = 'LAUNCHER="torchrun --nproc_per_node 4"\nARGS=" --bf16 True "\nCMD="$LAUNCHER train.py $ARGS"\nsrun $CMD \\'
    command = parse_command(text, "run.sh")
    assert (command.launcher, command.options, dict(command.arguments)) == (
        "torchrun",
        {"nproc_per_node": 4},
        {"bf16": True},
    )


def test_a_switch_has_one_value() -> None:
    with pytest.raises(SpecError, match=r"run\.sh: bf16: 'False twice' is more than one value\. Write one\."):
        parse_command("python train.py --bf16 False twice", "run.sh")


@pytest.mark.parametrize(
    ("text", "cluster"),
    [
        ("export CUDA_VISIBLE_DEVICES=0,1,2,3\ndeepspeed train.py --bf16", {"gpus": 4, "nodes": 1}),
        ("CUDA_VISIBLE_DEVICES=0,1 deepspeed --num_gpus 1 train.py --bf16", {"gpus": 1, "nodes": 1}),
        ("CUDA_VISIBLE_DEVICES=4,5 torchrun --nproc_per_node gpu train.py --bf16", {"gpus": 2, "nodes": 1}),
        ("CUDA_VISIBLE_DEVICES=$IDS torchrun --nproc_per_node gpu train.py --bf16", {"nodes": 1}),
        ("CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train a.yaml", {"gpus": 2, "nodes": 1}),
        ("NNODES=2 NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=0,1 llamafactory-cli train a.yaml", {"gpus": 8, "nodes": 2}),
        ("NNODES=$N NPROC_PER_NODE=4 llamafactory-cli train a.yaml", {"per_node": 4}),
    ],
)
def test_gpus_that_are_visible_and_what_llama_factory_is_told(text: str, cluster: dict[str, int]) -> None:
    assert parse_command(text, "run.sh").cluster == cluster

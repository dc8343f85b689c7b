#!/bin/bash
# DO NOT use GPTQ/AWQ model in FSDP+QLoRA

pip install "transformers>=4.39.1"
pip install "bitsandbytes>=0.43.0"

CUDA_VISIBLE_DEVICES=0,1 accelerate launch \
    --config_file peft_qlora_fsdp.yaml \
    src/train.py llama_factory_qlora.yaml

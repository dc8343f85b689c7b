#!/bin/bash

################## VICUNA ##################
# MODEL_VERSION="vicuna-v1-3-7b"
################## VICUNA ##################

deepspeed llava/train/train_mem.py \
    --deepspeed llama_factory_zero3.json \
    --model_name_or_path ./checkpoints/$MODEL_VERSION \
    --version $PROMPT_VERSION \
    --data_path ./playground/data/llava_instruct_80k.json \
    --vision_tower openai/clip-vit-large-patch14 \
    --mm_vision_select_layer -2 \
    --bf16 True \
    --output_dir ./checkpoints/llava-$MODEL_VERSION-finetune \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --report_to wandb

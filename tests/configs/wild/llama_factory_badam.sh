#!/bin/bash
export CUDA_VISIBLE_DEVICES=0,1,2,3

cd ../../..

llamafactory-cli train \
    --stage sft \
    --do_train True \
    --model_name_or_path meta-llama/Llama-2-13b-hf \
    --finetuning_type full \
    --template default \
    --flash_attn auto \
    --dataset alpaca_en_demo \
    --cutoff_len 1024 \
    --learning_rate 1e-6 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 2 \
    --optim adamw_torch \
    --packing False \
    --use_badam True \
    --output_dir saves/LLaMA2-13B/full/BAdam \
    --fp16 True \
    --badam_mode layer \
    --deepspeed llama_factory_zero3.json 

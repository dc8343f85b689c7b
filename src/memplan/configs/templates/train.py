"""Fine-tune a model with transformers' Trainer. Written by memplan; it is yours to change.

    bash launch.sh

Everything it does is in training_args.json: the fields of ScriptArguments below, and any field of TrainingArguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass
class ScriptArguments:
    """What is trained on what; the rest is TrainingArguments'."""

    model_name_or_path: str
    """A hub id or a folder."""
    model_class: str = "AutoModelForCausalLM"
    """The class of transformers that loads it."""
    dtype: str = "float32"
    """Of the weights as they are loaded; bf16 and fp16 of TrainingArguments say what they are trained in."""
    attn_implementation: str = "sdpa"
    vocab_size: int | None = None
    """Resize the token embeddings to this."""
    dataset: str | None = None
    """A hub id, a folder, or a .json, .jsonl, .csv, .txt or .parquet file; null is random data, made up here."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    """Holds the input; images for an image classifier."""
    target_column: str = "label"
    """Holds the class, or the text to generate; not read for language models."""
    seq_len: int = 2048
    """Tokens per sequence."""
    packed: bool = True
    """Sequences are cut from one stream of tokens, so that all are full; false pads each text, with a mask."""
    lora: dict[str, Any] | None = None
    """Arguments of peft.LoraConfig; null trains all weights."""
    autocast_adapter_dtype: bool = True
    """Keep the adapters of a 16-bit model in float32."""
    quantization: dict[str, Any] | None = None
    """Arguments of BitsAndBytesConfig, for the frozen weights."""
    prepare_for_kbit_training: bool = False
    """Make float32 of what is not quantized."""
    peft_module_casting_to_bf16: bool = False
    """Then make bfloat16 of embeddings and heads, as trl's function of that name does."""
    bf16_adapters: bool = False
    """Make bfloat16 of what is trained."""


def main(values: dict[str, Any]) -> transformers.Trainer:
    """Train, and return the Trainer."""
    parser = transformers.HfArgumentParser((ScriptArguments, transformers.TrainingArguments))
    # Before the model: under ZeRO-3 from_pretrained shards each weight as it loads it, which it must know by then.
    script, args = parser.parse_dict(values)
    check(values)
    transformers.set_seed(args.seed)
    model = load_model(script, args)
    with args.main_process_first():  # the others find what it has downloaded and tokenized
        data = RandomData(script, model.config) if script.dataset is None else load_data(script)
    train_data, eval_data = data, None
    if args.eval_strategy != "no":
        held_out = max(len(data) // 100, 1)
        eval_data = torch.utils.data.Subset(data, range(held_out))
        train_data = torch.utils.data.Subset(data, range(held_out, len(data)))
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=mask_tokens(script) if is_masked(script) and script.dataset is not None else None,
        # Logits are kept for metrics only; without metrics evaluation keeps the losses.
        compute_metrics=partial(accuracy, script=script) if args.eval_accumulation_steps else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def load_model(script: ScriptArguments, args: transformers.TrainingArguments) -> Any:
    """The model, quantized, resized and adapted as planned."""
    options: dict[str, Any] = {"dtype": script.dtype, "attn_implementation": script.attn_implementation}
    if script.quantization is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**script.quantization)
    model_class = getattr(transformers, script.model_class)
    model = model_class.from_pretrained(script.model_name_or_path, **options)
    model.config.use_cache = False
    if script.model_class == "AutoModelForSequenceClassification" and model.config.pad_token_id is None:
        end = model.config.eos_token_id  # it marks where a sequence ends, whose last token is classified
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    if script.vocab_size is not None:
        model.resize_token_embeddings(script.vocab_size)
    if script.prepare_for_kbit_training:
        import peft

        # The Trainer is who switches gradient checkpointing on.
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if script.lora is not None:
        import peft

        config = peft.LoraConfig(**script.lora)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=script.autocast_adapter_dtype)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        if script.peft_module_casting_to_bf16:
            cast_heads(model)
        if script.bf16_adapters:
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.to(torch.bfloat16)
        model.print_trainable_parameters()
    return model


def cast_heads(model: Any) -> None:
    """Norms to float32; embeddings and heads from there to bfloat16."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(word in name for word in ("lm_head", "embed_tokens", "wte", "wpe")) and (
            getattr(getattr(module, "weight", None), "dtype", None) is torch.float32
        ):
            module.to(torch.bfloat16)


def load_data(script: ScriptArguments) -> Any:
    """The dataset, as tensors that the model takes."""
    import datasets

    path = Path(script.dataset or "")
    if path.is_file():
        kind = {".jsonl": "json", ".txt": "text"}.get(path.suffix, path.suffix.removeprefix("."))
        data = datasets.load_dataset(kind, data_files=str(path), split=script.dataset_split)
    else:
        data = datasets.load_dataset(script.dataset, script.dataset_config, split=script.dataset_split)
    if script.model_class == "AutoModelForImageClassification":
        return data.with_transform(image_transform(script))
    tokenizer = load_tokenizer(script)
    is_causal = script.model_class == "AutoModelForCausalLM"

    def padded(texts: list[str]) -> Any:
        return tokenizer(texts, truncation=True, padding="max_length", max_length=script.seq_len)

    def stream(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ends = [tokenizer.eos_token_id] if is_causal and tokenizer.eos_token_id is not None else []
        tokens = [token for ids in tokenizer(rows[script.text_column])["input_ids"] for token in [*ids, *ends]]
        starts = range(0, len(tokens) - script.seq_len + 1, script.seq_len)
        blocks = [tokens[start : start + script.seq_len] for start in starts]
        return {"input_ids": blocks, "labels": blocks} if is_causal else {"input_ids": blocks}

    def rows_of_texts(rows: dict[str, list[Any]]) -> dict[str, Any]:
        found = dict(padded(rows[script.text_column]))
        if is_masked(script):
            return found
        if is_causal:
            labels, masks = found["input_ids"], found["attention_mask"]
        elif script.model_class == "AutoModelForSeq2SeqLM":
            target = padded(rows[script.target_column])
            labels, masks = target["input_ids"], target["attention_mask"]
        else:
            return found | {"labels": rows[script.target_column]}
        pairs = zip(labels, masks, strict=True)
        kept = [[i if m else -100 for i, m in zip(ids, mask, strict=True)] for ids, mask in pairs]
        return found | {"labels": kept}

    make = stream if script.packed and (is_causal or is_masked(script)) else rows_of_texts
    return data.map(make, batched=True, remove_columns=data.column_names)


def load_tokenizer(script: ScriptArguments) -> Any:
    """The model's own, with a token to pad with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(script.model_name_or_path)
    if tokenizer.pad_token is None:  # what pads is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_masked(script: ScriptArguments) -> bool:
    """Whether the model learns to tell tokens that are hidden from it."""
    return script.model_class == "AutoModelForMaskedLM"


def mask_tokens(script: ScriptArguments) -> Callable[[list[dict[str, Any]]], Any]:
    """Hides 15 % of the tokens of a batch, others each time."""
    collate = transformers.DataCollatorForLanguageModeling(load_tokenizer(script))

    def masked(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        if script.packed:
            batch.pop("attention_mask", None)  # there is no padding for it to hide
        return batch

    return masked


def image_transform(script: ScriptArguments) -> Any:
    """Turns images into pixels as they are asked for."""
    processor = transformers.AutoImageProcessor.from_pretrained(script.model_name_or_path)

    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[script.text_column]]
        return {**processor(images, return_tensors="pt"), "labels": rows[script.target_column]}

    return transform


class RandomData(torch.utils.data.Dataset[dict[str, Any]]):
    """Random tokens or pixels, of the shapes that a dataset would have."""

    def __init__(self, script: ScriptArguments, config: Any) -> None:
        self.script, self.config = script, config

    def __len__(self) -> int:
        return 1_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(index)
        kind, config, length = self.script.model_class, self.config, self.script.seq_len
        label = torch.randint(getattr(config, "num_labels", 2), (), generator=random)
        if kind == "AutoModelForImageClassification":
            pixels = torch.randn(config.num_channels, config.image_size, config.image_size, generator=random)
            return {"pixel_values": pixels, "labels": label}
        tokens = torch.randint(3, config.vocab_size, (length,), generator=random)
        row = {"input_ids": tokens, "labels": label if kind == "AutoModelForSequenceClassification" else tokens.clone()}
        return row if self.script.packed else row | {"attention_mask": torch.ones_like(tokens)}


def accuracy(prediction: transformers.EvalPrediction, script: ScriptArguments) -> dict[str, float]:
    """The share of labels that the largest logit hits."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    guesses, labels = logits.argmax(-1), prediction.label_ids
    if script.model_class == "AutoModelForCausalLM":  # whose logits are of the token that follows
        guesses, labels = guesses[:, :-1], labels[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean())}


def check(values: dict[str, Any]) -> None:
    """Ask memplan, where it is installed, whether this fits on this machine's GPUs, before a weight is loaded."""
    try:
        import memplan
    except ImportError:
        return
    if torch.cuda.is_available() and hasattr(memplan, "preflight"):
        memplan.preflight(values["model_name_or_path"], values)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "training_args.json")
    main(json.loads(path.read_text(encoding="utf-8"))).save_model()

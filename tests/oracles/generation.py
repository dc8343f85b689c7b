"""Generation traced: the real model's prefill and decoding steps with its own cache, on fake tensors.

As :func:`memplan.introspect.trace.trace_step`, of whose parts it is made, but without a loss and without gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from memplan.introspect import trace


@dataclass(frozen=True)
class GenerationTrace:
    """Bytes above the weights, storages in blocks of 512."""

    prefill: int
    """Peak of the prefill, sampling included."""
    decode: int
    """Peak of the last step."""
    cache: int
    """Storages of the keys and values after it."""


def trace_generation(
    config: Mapping[str, Any],
    *,
    dtype: str = "float32",
    attn: str = "sdpa",
    micro_batch_size: int = 1,
    seq_len: int = 64,
    new_tokens: int = 3,
    padded: bool = False,
) -> GenerationTrace:
    """Trace a prompt of ``seq_len`` tokens and the calls that make ``new_tokens`` more."""
    fake_mode = trace._fake_mode()
    with trace._quiet():
        model = trace._build_model(config, dtype, attn, None, None, None)
    trace._to_fake(model, fake_mode)
    model.train(False)
    tracker = trace._make_tracker(False)
    quiet = trace._quiet()
    with trace._gc_disabled(), trace._like_a_real_run(), quiet, fake_mode, tracker, torch.no_grad():
        held = tracker.adopt(model.parameters()) + tracker.adopt(model.buffers())
        held += tracker.adopt(trace._loose_tensors(model))
        cache = DynamicCache(config=model.config)
        ids = torch.zeros((micro_batch_size, seq_len), dtype=torch.int64)
        mask = torch.zeros((micro_batch_size, seq_len), dtype=torch.int64) if padded else None
        peaks = []
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        positions = torch.arange(seq_len).repeat(micro_batch_size, 1)  # generate() counts them by the mask
        for _ in range(new_tokens):
            place = {"position_ids": positions} if takes_positions else {}
            tracker.phases = {}
            tracker.enter("call")
            outputs = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **place
            )
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            peaks.append(tracker.phases["call"] - held)
            ids = torch.argmax(logits, dim=-1)[:, None]
            mask = torch.cat([mask, ids], dim=1) if mask is not None else None
            positions = positions[:, -1:] + 1
            del outputs  # _sample keeps the logits, a local of its loop, until the next step's are there
        kept = tracker.bytes_of(tensor for keys, values, *_ in cache for tensor in (keys, values))
    return GenerationTrace(peaks[0], peaks[-1], kept)


def peak_of_generate(
    config: Mapping[str, Any], *, dtype: str, attn: str, micro_batch_size: int, seq_len: int, new_tokens: int
) -> int:
    """Bytes above the weights that the real ``generate`` needs, greedily and on real tensors."""
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    with trace._quiet():
        parsed = transformers.AutoConfig.for_model(config["model_type"], **fields)
        build = getattr(transformers, config["architectures"][0])._from_config
        model = build(parsed, dtype=getattr(torch, dtype), attn_implementation=attn).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        prompt = torch.ones((micro_batch_size, seq_len), dtype=torch.int64)
        tracker = trace.real_tracker()
        with trace._gc_disabled(), tracker:
            held = tracker.adopt(model.parameters()) + tracker.adopt(model.buffers())
            held += tracker.adopt(trace._loose_tensors(model))
            tracker.enter("call")
            model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
    return int(tracker.phases["call"]) - held


def kept_by_generate(config: Mapping[str, Any], *, micro_batch_size: int, seq_len: int, new_tokens: int) -> int:
    """Bytes of keys and values in the cache that the real ``generate`` returns, in float32."""
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    with trace._quiet():
        parsed = transformers.AutoConfig.for_model(config["model_type"], **fields)
        model = getattr(transformers, config["architectures"][0])._from_config(parsed)
        model.generation_config.eos_token_id = None  # no answer ends early
        model.generation_config.pad_token_id = 0
        prompt = torch.zeros((micro_batch_size, seq_len), dtype=torch.int64)
        made = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    assert made.sequences.shape == (micro_batch_size, seq_len + new_tokens)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in made.past_key_values.layers)

"""The modules that run, in their order, beside those of the real models: ZeRO-3 hooks into all, with weights or not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tests.oracles.families import CONFIGS

from memplan.architectures.nn import Build, watch
from memplan.architectures.registry import build_model
from memplan.case import model_spec
from memplan.tape.dispatch import CPU
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Moment = tuple[str, str]
"""A module's ``pre_forward`` or ``pre_backward``, and its name."""
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "n_layers")
BATCH, LENGTH = 2, 12


def moments(values: dict[str, Any], attn: str) -> list[Moment]:
    """Of the real model, by DeepSpeed's kind of hooks: a function of autograd behind each of a module's outputs."""
    found: list[Moment] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(**values)
    config.use_cache = False
    kind = getattr(transformers, values["architectures"][0])
    model = kind._from_config(config, dtype=torch.float32, attn_implementation=attn).train()

    class PreBackward(torch.autograd.Function):  # type: ignore[misc,name-defined]
        @staticmethod
        def forward(ctx: Any, out: Any, name: str) -> Any:
            ctx.name = name
            return out.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found.append(("pre_backward", ctx.name))
            return (*grads, None)

    def behind(out: Any, name: str) -> Any:
        if isinstance(out, torch.Tensor):
            return PreBackward.apply(out, name)
        if isinstance(out, tuple | list):
            return type(out)([behind(each, name) for each in out])
        if isinstance(out, dict):
            for key in out:
                out[key] = behind(out[key], name)
        return out

    def hook(module: Any, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: found.append(("pre_forward", name)))
        module.register_forward_hook(lambda _module, _inputs, out: behind(out, name))

    for name, module in model.named_modules():
        hook(module, name)
    model(**_batch(values, config)).loss.backward()
    return found


def _batch(values: dict[str, Any], config: Any) -> dict[str, Any]:
    labels = torch.zeros(BATCH, dtype=torch.long)
    if values["model_type"] == "vit":
        return {"pixel_values": torch.zeros(BATCH, 3, config.image_size, config.image_size), "labels": labels}
    ids = torch.randint(5, values["vocab_size"], (BATCH, LENGTH))
    return {"input_ids": ids, "labels": labels if "Sequence" in values["architectures"][0] else ids}


def watched(values: dict[str, Any], attn: str) -> list[Moment]:
    tape = Tape(CPU)
    tape.engine_takes_gradients = True
    root: Any = build_model(Build(tape, float32, attn=attn), model_spec(dict(values)), None)
    names = {id(module): name for name, module in root.named_modules()}
    watch(root, tape)
    loss, _ = root(*root.inputs(BATCH, LENGTH))
    tape.backward(loss)
    return [
        (event.kind, names[event.subject]) for event in tape.events if event.kind in ("pre_forward", "pre_backward")
    ]


SAMPLE = ("llama", "gpt2", "t5", "mixtral", "bert")


@pytest.mark.parametrize(
    "family", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.oracle) for name in CONFIGS]
)
def test_the_same_modules_run_in_the_same_order(family: str) -> None:
    values = {**CONFIGS[family]["small"]}
    if family != "gpt_neo":  # its layers' kinds are in a list
        values |= {name: 2 for name in DEPTHS if name in values}
    attn = "eager" if family in ("bloom", "deberta-v2", "gemma2", "gptj", "gpt_neo") else "sdpa"
    # A module with two outputs is hooked into behind both, one after the other; here behind the first.
    assert list(dict.fromkeys(watched(values, attn))) == list(dict.fromkeys(moments(values, attn)))

"""ViT: an image's size decides the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.nn import Build
from memplan.architectures.vit import ViTConfig, ViTForImageClassification
from memplan.errors import SpecError
from memplan.specs.fields import Fields
from memplan.tape.tape import Tape
from memplan.tape.tensor import bfloat16, float32

TINY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def fields(**values: Any) -> Fields:
    return Fields({**TINY, **values}, "config.json")


@pytest.mark.parametrize(
    ("values", "patches"),
    [({}, 196), ({"image_size": 32, "patch_size": 8}, 16), ({"image_size": [32, 50], "patch_size": [16, 8]}, 12)],
)
def test_patches_and_a_class_token(values: dict[str, Any], patches: int) -> None:
    model = ViTForImageClassification(Build(Tape(), float32), fields(**values))
    pixel_values, labels = model.inputs(3, 1)
    sequence_output, pooled = model.vit(pixel_values)
    assert sequence_output.shape == (3, patches + 1, 48)
    assert pooled is None
    assert labels.shape == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": [32]}, r"image_size: .* is not a height and a width"),
        ({"image_size": 0}, "image_size: 0"),
        ({"image_size": 8, "patch_size": 16}, "patch_size: 16 is larger than image_size 8"),
        ({"num_attention_heads": 5}, "not divisible by 5"),
    ],
)
def test_bad_sizes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ViTConfig(fields(**values))


def test_pixels_come_in_float32_and_are_cast_to_the_weights_dtype() -> None:
    names = {}
    for dtype in (float32, bfloat16):
        b = Build(Tape(), dtype)
        model = ViTForImageClassification(b, fields(image_size=32, num_labels=7))
        pixel_values, labels = model.inputs(2, 1)
        assert (pixel_values.shape, pixel_values.dtype) == ((2, 3, 32, 32), float32)
        loss, logits = model(pixel_values, labels)
        assert logits.shape == (2, 7)
        b.tape.backward(loss)
        names[dtype.name] = sum(name == "to" for name, _, _ in b.tape.births)
    assert names["bfloat16"] == names["float32"] + 1


def test_length_has_no_effect() -> None:
    sizes = []
    for length in (1, 4096):
        b = Build(Tape(), bfloat16)
        model = ViTForImageClassification(b, fields(image_size=32))
        loss, _ = model(*model.inputs(2, length))
        b.tape.backward(loss)
        sizes.append(b.tape.sizes)
    assert sizes[0] == sizes[1]

import timeit

import pytest

from memplan.errors import SpecError
from memplan.specs.fields import Fields

CONFIG = {
    "hidden_size": 64,
    "n_embd": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "layers": [1, 2],
    "names": ["a", "b"],
    "rope_parameters": {"rope_theta": 5.0, "factor": -1},
    "sliding_window": None,
}


@pytest.fixture
def fields() -> Fields:
    return Fields(CONFIG, "config.json")


def test_values_come_with_their_type(fields: Fields) -> None:
    assert fields.int("hidden_size") == 64
    assert fields.float("rms_norm_eps") == 1e-6
    assert fields.float("rope_theta") == 10000.0
    assert fields.bool("tie_word_embeddings") is False
    assert fields.str("hidden_act") == "silu"
    assert fields.list_int("layers") == (1, 2)
    assert fields.list_str("names") == ("a", "b")
    assert fields.section("rope_parameters").float("rope_theta") == 5.0
    assert fields.section("absent").int("x", 3) == 3
    assert fields.raw("layers") == [1, 2]


def test_null_counts_as_missing(fields: Fields) -> None:
    assert fields.optional_int("sliding_window") is None
    assert fields.int("sliding_window", 7) == 7
    assert not fields.has("sliding_window")
    assert fields.has("hidden_size")


def test_the_alias_is_read_when_the_name_is_missing(fields: Fields) -> None:
    assert fields.int("width", alias="n_embd") == 32
    assert fields.int("hidden_size", alias="n_embd") == 64


def test_a_missing_field_names_file_and_neighbours(fields: Fields) -> None:
    with pytest.raises(SpecError) as error:
        fields.int("hidden_sizes")
    assert str(error.value) == (
        "config.json: hidden_sizes: missing. Add the field to the config. Did you mean hidden_size or hidden_act?"
    )


@pytest.mark.parametrize("bad", [0, -4, True, 4.0, float("nan"), 1e30, 2**41, "64", [64], {}])
def test_int_refuses(bad) -> None:
    with pytest.raises(SpecError, match=r"^c: n: .* (is not an integer|is out of range)\. Use an integer from 1"):
        Fields({"n": bad}, "c").int("n")


def test_int_has_a_minimum_of_its_own() -> None:
    assert Fields({"n": 0}, "c").int("n", minimum=0) == 0
    with pytest.raises(SpecError, match="from 2 to"):
        Fields({"n": 1}, "c").int("n", minimum=2)


@pytest.mark.parametrize("bad", [-1.0, True, float("nan"), float("inf"), 1e30, "1", [1.0], 10**400])
def test_float_refuses(bad) -> None:
    with pytest.raises(SpecError, match=r"^c: x: .* (is not a number|is out of range)\. Use a number from 0"):
        Fields({"x": bad}, "c").float("x")


@pytest.mark.parametrize("bad", [0, 1, "true", []])
def test_bool_refuses(bad) -> None:
    with pytest.raises(SpecError, match=r"^c: b: .* is not true or false"):
        Fields({"b": bad}, "c").bool("b")


@pytest.mark.parametrize("bad", ["", 1, True, ["a"]])
def test_str_refuses(bad) -> None:
    with pytest.raises(SpecError, match=r"^c: s: .* is not text"):
        Fields({"s": bad}, "c").str("s")


def test_lists_refuse_by_index() -> None:
    with pytest.raises(SpecError, match=r"^c: l\[1\]: 'x' is not an integer"):
        Fields({"l": [1, "x"]}, "c").list_int("l")
    with pytest.raises(SpecError, match=r"^c: l: 3 is not a list of integers"):
        Fields({"l": 3}, "c").list_int("l")
    with pytest.raises(SpecError, match=r"^c: l: \[1\] is not a list of names"):
        Fields({"l": [1]}, "c").list_str("l")


def test_a_section_names_its_path(fields: Fields) -> None:
    with pytest.raises(SpecError, match=r"^config.json: rope_parameters: factor: -1 is out of range"):
        fields.section("rope_parameters").float("factor")
    with pytest.raises(SpecError, match="hidden_size: 64 is not an object"):
        fields.section("hidden_size")


def test_a_read_takes_microseconds(fields: Fields) -> None:
    best = min(timeit.repeat(lambda: fields.int("hidden_size"), number=1000, repeat=5)) / 1000
    assert best < 20e-6  # about 0.3 µs on an idle machine


def test_a_required_field_that_is_null_is_named_so() -> None:
    with pytest.raises(SpecError) as error:
        Fields({"hidden_size": None}, "config.json").int("hidden_size")
    assert str(error.value) == "config.json: hidden_size: is null. Give it a value."

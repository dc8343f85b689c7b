import pytest

from memplan.errors import SpecError
from memplan.specs import SoftwareSpec


def test_parse_keeps_the_defaults_of_the_rest() -> None:
    software = SoftwareSpec.parse("transformers=4.46, torch==2.5.1,liger-kernel=0.4")
    assert (software.transformers, software.torch, software.liger_kernel) == ("4.46", "2.5.1", "0.4")
    assert software.deepspeed == SoftwareSpec().deepspeed
    assert SoftwareSpec.parse("") == SoftwareSpec()


@pytest.mark.parametrize(
    ("have", "want", "answer"),
    [
        ("4.46.0", "4.46", True),
        ("4.46", "4.46.0", True),
        ("5.9", "5.23", False),
        ("5.0.0.dev0", "5.0", True),
        ("4.46.1", "4.46.2", False),
        ("10.0", "9.9", True),
    ],
)
def test_at_least_compares_numbers(have: str, want: str, answer: bool) -> None:
    assert SoftwareSpec(transformers=have).at_least("transformers", want) is answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tranformers=5", "software: 'tranformers' is not a library memplan knows. Did you mean transformers?"),
        ("torch", "software: 'torch' is not a pair. Write library=version, as in torch=2.13."),
        ("torch=", "software: 'torch=' is not a pair. Write library=version, as in torch=2.13."),
        ("torch=new", "torch: 'new' is not a version. Write numbers with dots, as in 5.23.0."),
    ],
)
def test_a_wrong_text_is_named(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        SoftwareSpec.parse(text)
    assert str(error.value) == message


def test_at_least_refuses_an_unknown_library() -> None:
    with pytest.raises(SpecError, match="Did you mean torch"):
        SoftwareSpec().at_least("torhc", "2")


def test_versions_too_old_are_refused_and_others_are_named() -> None:
    with pytest.raises(SpecError, match=r"^transformers: '3' is older than memplan's rules reach. Use 4.30 or later."):
        SoftwareSpec.parse("transformers=3")
    assert SoftwareSpec.parse("transformers=4.46,torch=2.13.1,peft=0.21").others() == {
        "transformers": ("4.46", SoftwareSpec().transformers)
    }
    assert SoftwareSpec().others() == {}

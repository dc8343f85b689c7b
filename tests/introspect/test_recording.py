"""Recordings of a made-up model: how a short one is repeated, and what is refused."""

from __future__ import annotations

import pytest

from memplan.introspect.recording import Birth, NotRepeating, Recording, Segment, expand, same_log, to_tape
from memplan.memory.timeline import unroll
from memplan.tape.dispatch import CPU
from memplan.tape.tape import ACTIVATION, GRADIENT, INPUT, LayerKey

MIB = 2**20
Step = tuple[str, int | None, list[str]]


def recording(steps: list[Step], sizes: dict[str, int], components: dict[str, int] | None = None) -> Recording:
    """Read segments written as (phase, layer, ["+name", "-name", ...])."""
    numbers: dict[str, int] = {}
    segments = []
    births = []
    for phase, layer, events in steps:
        key: LayerKey | None = None if layer is None else (0, layer)
        segment = Segment(phase, key)
        for event in events:
            sign, name = event[0], event[1:]
            if sign == "+":
                numbers[name] = len(births)
                births.append(Birth(sizes[name.rstrip("0123456789")], name.rstrip("0123456789"), (), "float32"))
                segment.events.append(numbers[name])
            else:
                segment.events.append(~numbers[name])
        segments.append(segment)
    kinds = [(components or {}).get(birth.name, ACTIVATION) for birth in births]
    return Recording(segments, births, kinds, 1)


SIZES = {"x": MIB, "h": 3 * MIB, "t": 5 * MIB, "g": 7 * MIB, "d": MIB, "cast": 2 * MIB}


def chain(depth: int) -> Recording:
    """Layers that keep ``h``, cast a weight until the forward's end, hand a gradient down and leave one of theirs."""
    steps: list[Step] = [("forward", None, ["+x"])]
    steps += [("forward", i, [f"+t{i}", f"+cast{i}", f"+h{i}", f"-t{i}"]) for i in range(depth)]
    steps.append(("forward", None, [f"-cast{i}" for i in range(depth)]))
    steps.append(("backward", None, [f"+d{depth}"]))
    steps += [("backward", i, [f"+d{i}", f"-d{i + 1}", f"+g{i}", f"-h{i}"]) for i in reversed(range(depth))]
    steps.append(("backward", None, ["-d0"]))
    return recording(steps, SIZES, {"x": INPUT, "g": GRADIENT})


@pytest.mark.parametrize("depth", [5, 6, 13])
def test_a_short_recording_is_repeated_to_any_depth(depth: int) -> None:
    templates = [0, 1, *[2] * (depth - 4), 3, 4]
    deep = expand(chain(5), {0: templates})
    assert same_log(deep, chain(depth))
    assert len(deep.births) == len(chain(depth).births)


def test_what_a_deep_recording_says_on_a_tape() -> None:
    deep = expand(chain(5), {0: [0, 1, *[2] * 28, 3, 4]})
    tape = to_tape(deep, CPU, {})
    profile = unroll(tape, {0: list(range(32))}).profile()
    # 32 layers keep 3 MiB and have a cast of 2; the last adds 5 before its temporary goes, beside 1 of inputs.
    assert profile.peaks["forward"].total == (1 + 32 * (3 + 2) + 5) * MIB
    assert profile.saved.total == (1 + 32 * 3) * MIB
    assert profile.end.total == (1 + 32 * 7) * MIB
    assert profile.end.parts[GRADIENT] == 32 * 7 * MIB
    assert tape.input_count == 1


def test_what_all_layers_share_goes_with_the_last_of_them() -> None:
    def shared(depth: int) -> Recording:
        steps: list[Step] = [("forward", None, ["+x"])]
        steps += [("forward", i, [f"+h{i}"]) for i in range(depth)]
        steps.append(("backward", None, []))
        # Every layer but the first two saved x, so layer 2 lets go of it in the backward.
        steps += [("backward", i, [f"-h{i}", *(["-x"] if i == 2 else [])]) for i in reversed(range(depth))]
        return recording(steps, SIZES)

    assert same_log(expand(shared(5), {0: [0, 1, 2, 2, 2, 2, 3, 4]}), shared(8))


def test_successive_frees_have_no_order() -> None:
    one = recording([("forward", None, ["+x", "+h", "-x", "-h", "+t"])], SIZES)
    assert same_log(one, recording([("forward", None, ["+x", "+h", "-h", "-x", "+t"])], SIZES))
    assert not same_log(one, recording([("forward", None, ["+x", "+h", "-h", "+t", "-x"])], SIZES))
    assert not same_log(one, recording([("forward", None, ["+x", "+h", "-x", "-h", "+g"])], SIZES))


def test_a_free_that_is_not_in_every_layer_is_refused() -> None:
    """Layer 4 frees what layer 1 made, three layers back: in a deeper model, whose is that?"""
    steps: list[Step] = [("forward", None, ["+x"])]
    steps += [("forward", i, [f"+h{i}"]) for i in range(4)]
    steps.append(("forward", 4, ["+h4", "-h1"]))
    with pytest.raises(NotRepeating):
        expand(recording(steps, SIZES), {0: [0, 1, 2, 2, 2, 3, 4]})


def test_layers_of_unequal_kinds_cannot_stand_in_for_each_other() -> None:
    """Layer 3 frees the second storage of the layer before it, and the template of that one has only one."""
    steps: list[Step] = [("forward", None, ["+x"])]
    steps += [("forward", i, [f"+h{i}"]) for i in range(2)]
    steps += [("forward", 2, ["+h2", "+t2"]), ("forward", 3, ["+h3", "-t2"]), ("forward", 4, ["+h4"])]
    with pytest.raises(NotRepeating, match="does not allocate"):
        expand(recording(steps, SIZES), {0: [0, 1, 1, 3, 2, 4]})

"""Work that copies of this process share."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from memplan import api, parallel
from memplan.errors import SpecError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_answers_come_in_order(processes: int, count: int) -> None:
    assert parallel.shared_out(lambda n: str(n * n), range(count), processes) == [str(n * n) for n in range(count)]


def test_copies_do_it() -> None:
    def takes_a_while(_: int) -> str:
        time.sleep(0.05)
        return str(os.getpid())

    pids = parallel.shared_out(takes_a_while, range(12), 2)
    assert str(os.getpid()) in pids
    assert len({*pids}) == 2


def test_who_is_free_takes_the_next() -> None:
    def is_slow_first(number: int) -> str:
        time.sleep(0.05 if number else 1)
        return str(os.getpid())

    first, *others = parallel.shared_out(is_slow_first, range(6), 2)
    assert first not in others


def test_more_places_than_a_pipe_holds_claims() -> None:
    count = 5000
    assert parallel.shared_out(str, range(count), 2) == list(map(str, range(count)))


def test_what_a_copy_cannot_do_is_done_here() -> None:
    here = os.getpid()

    def dies_in_a_copy(number: int) -> str:
        if os.getpid() != here:
            os._exit(3)
        return str(number)

    assert parallel.shared_out(dies_in_a_copy, range(5), 2) == list("01234")


def test_an_error_is_raised_here() -> None:
    def fails(number: int) -> str:
        raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        parallel.shared_out(lambda number: fails(number) if number == 1 else "", range(3), 2)


def test_no_copies_of_a_process_with_threads() -> None:
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        assert parallel.cores() == 1
    finally:
        waiting.set()
        thread.join()


def test_a_ladder_is_the_same_by_several_processes() -> None:
    arguments = "gpt2", {"seq_len": 64}, "2xT4"
    assert api.ladder(*arguments, processes=3) == api.ladder(*arguments)
    with pytest.raises(SpecError, match="seq_len"):
        api.ladder("gpt2", {"seq_len": 4096}, "2xT4", processes=2)

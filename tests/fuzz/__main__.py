"""``python -m tests.fuzz [--seconds N] [--out FOLDER] [TARGET ...]``: fuzz with atheris, each for its share of N.

Seconds are a processor's, so that a busy machine takes longer and does no less. Each target runs in a process of its
own, whose memory and whose time for one input are bounded: an input that takes more than 2 GiB or ten seconds is a
finding as an exception is. What a target finds is written to FOLDER/TARGET.txt,
as the input that Hypothesis made, and the search goes on past the place that raised it. Needs ``pip install atheris``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import random
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 6 * 2**30
"""Bytes of address space: Python, what it has loaded, the fuzzer's own tables, and 2 GiB for an input."""
NAMES = ("model_config", "deepspeed_json", "accelerate_yaml", "arguments", "raw_file", "command", "lengths")
"""Of the targets, which are imported where they can be instrumented."""
SECONDS = 10
"""Of a processor, for one input: by the clock a process of the lowest priority may wait for minutes."""


def _text(data: Any) -> str:
    """The input as Python has it, integers of thousands of digits too."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return repr(data)
    finally:
        sys.set_int_max_str_digits(limit)


def _child(name: str, seconds: int, folder: Path) -> None:
    import atheris
    from hypothesis import given

    with atheris.instrument_imports(include=["memplan"]):
        _import_all()
        from tests.fuzz.strategies import STRATEGIES
        from tests.fuzz.targets import TARGETS
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found: dict[str, str] = {}
    counts = {"inputs": 0, "answered": 0, "slowest": 0.0}
    started = time.process_time()

    @given(STRATEGIES[name])
    def once(data: Any) -> None:
        counts["inputs"] += 1
        (folder / f"{name}.last").write_text(_text(data))  # a crash or a hang leaves it
        before = time.process_time()
        try:
            counts["answered"] += TARGETS[name](data)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            if place not in found:
                found[place] = f"{place}\n{_text(data)[:4000]}\n{''.join(traceback.format_exception(error)[-6:])}"
                (folder / f"{name}.txt").write_text("\n\n".join(found.values()))
        took = time.process_time() - before
        if took > SECONDS:
            found[f"{took:.0f} seconds"] = _text(data)[:4000]
            (folder / f"{name}.txt").write_text("\n\n".join(found.values()))
        if took > counts["slowest"]:
            counts["slowest"] = took
            (folder / f"{name}.slowest").write_text(f"{took:.2f} s\n{_text(data)[:4000]}")

    def one(data: bytes) -> None:
        once.hypothesis.fuzz_one_input(data)  # type: ignore[attr-defined]
        took = time.process_time() - started
        if counts["inputs"] % 50 == 0 or took > seconds:
            summary = {**counts, "seconds": round(took), "findings": sorted(found)}
            (folder / f"{name}.json").write_text(json.dumps(summary))
        if took > seconds:
            os._exit(0)  # libFuzzer knows the clock alone, and has nothing to put in order

    corpus = folder / f"{name}.corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(64):  # short inputs run out before Hypothesis has made anything of them
        (corpus / f"random{number}").write_bytes(random.Random(number).randbytes(4096))
    limits = ["-timeout=900", "-max_len=8192", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/{name}.", str(corpus)], one)
    atheris.Fuzz()


def _import_all() -> None:
    """Every module, as what functions import later would not be instrumented."""
    import memplan

    for module in pkgutil.walk_packages(memplan.__path__, "memplan."):
        if "templates" not in module.name and not module.name.startswith(("memplan.introspect", "memplan.__main__")):
            importlib.import_module(module.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=600, help="of a processor, for all targets together")
    parser.add_argument("--out", type=Path, default=Path(".fuzz"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("target", nargs="*", choices=[*NAMES, []])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.child:
        _child(given.target[0], given.seconds, given.out)
        return 0
    names = given.target or NAMES
    failed = False
    for name in names:
        share = max(1, given.seconds // len(names))
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--child",
            "--seconds",
            str(share),
            "--out",
            str(given.out),
            name,
        ]
        with (given.out / f"{name}.log").open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        summary = given.out / f"{name}.json"
        said = json.loads(summary.read_text()) if summary.exists() else {"findings": ["no input ran"]}
        failed |= bool(said["findings"]) or code != 0
        sys.stdout.write(f"{name}: exit {code}, {said}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

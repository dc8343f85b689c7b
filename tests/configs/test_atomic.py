"""A process that is killed while it writes leaves the old file or the new one, each whole."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIZE = 2**18
"""Letters of a file: enough that it is not written at once."""
PLAN = """
import sys
from memplan.configs import launch
print("ready", flush=True)
for number in range(10**9):
    text = chr(97 + number % 26)
    launch.write({name: text * %d for name in ("train.py", "launch.sh", "plan.json")}, sys.argv[1], force=True)
"""
RECORD = """
import sys
from pathlib import Path
from memplan.integrations import watch
print("ready", flush=True)
for number in range(10**9):
    watch._replace(Path(sys.argv[1]) / watch.RECORD, chr(97 + number % 26) * %d)
"""


@pytest.mark.parametrize(
    ("script", "names"), [(PLAN, ("train.py", "launch.sh", "plan.json")), (RECORD, ("memplan-memory.json",))]
)
def test_a_kill_leaves_whole_files(script: str, names: tuple[str, ...], tmp_path: Path) -> None:
    rng, seen = random.Random(3), set[str]()
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script.replace("%d", str(SIZE)), str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() / 5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name in names:
            path = tmp_path / name
            if path.exists():
                text = path.read_text()
                assert len(text) == SIZE, name
                assert len(set(text)) == 1, name
                seen.add(text[0])
    assert len(seen) > 1

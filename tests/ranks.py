"""Scripts on two CPU ranks, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

END = """
import os, sys
import torch
torch.distributed.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
"""gloo's threads outlive its process group, even destroyed and collected (torch 2.13). One that still frees a tensor
while the interpreter is torn down aborts the process ("terminate called without an active exception"): on a busy
machine it happened once. And a group that is destroyed waits for its threads: a rehearsal that had said all it had to
say hung there for minutes, once in some hundred."""


def on_two_ranks(script: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in ``folder`` with ``words`` as its arguments; return what all ranks and the launcher have said.

    Each rank writes to files of its own: in one pipe the pieces of two tracebacks get mixed.
    """
    (folder / "script.py").write_text(script + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--redirects", "3", "--log-dir", str(folder / "logs")]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        [*command, "script.py", *words],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()  # ends its ranks too, which a kill leaves behind
            process.communicate(timeout=60)
            raise
    for said in sorted((folder / "logs").rglob("std*.log")):
        if said.name == "stdout.log":
            out += said.read_text()
        else:
            err += said.read_text()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

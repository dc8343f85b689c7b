"""What is fuzzed: each target takes an input that somebody may have written, and calls the public API with it.

A target returns whether there was an answer, and lets everything but a ``MemplanError`` pass, which is a finding.
``strategies.py`` makes the inputs. Two ways lead here: ``test_targets.py`` runs each target a few hundred times under
Hypothesis, and ``python -m tests.fuzz`` for as long as is asked under atheris, which is guided by what was covered.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from memplan import api, checks, cli
from memplan.errors import MemplanError

__all__ = [
    "LLAMA",
    "TARGETS",
    "accelerate_yaml",
    "arguments",
    "command",
    "deepspeed_json",
    "lengths",
    "model_config",
    "raw_file",
]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
SHORT = {"seq_len": 16}
HERE = {"gpu": "T4", "gpus": 2}
_LONGEST_MESSAGE = 4000


def _answered(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except MemplanError as error:
        message = str(error)
        assert message.strip()
        assert len(message) < _LONGEST_MESSAGE, f"{len(message)} letters: {message[:300]}"
        return False
    return True


@contextlib.contextmanager
def _written(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="memplan-fuzz-") as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def _preflighted(model: object, args: object) -> None:
    """``preflight`` lets nothing leave it: what is memplan's own mistake it calls so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checks.preflight(model, args, training=SHORT, cluster=HERE, on_failure="warn")
    assert not [each.message for each in found if each.code == "memplan-error"]


def model_config(config: dict[str, Any]) -> bool:
    """A ``config.json``: estimated under an engine, alone, as a file, and from within a script."""
    with _written(json.dumps(config).encode(), "config.json") as path:
        _answered(lambda: api.estimate(str(path), SHORT, HERE, "zero3"))
    _preflighted(config, {"per_device_train_batch_size": 1, "output_dir": "out"})
    return _answered(lambda: api.estimate(config, SHORT, "1xT4", "single"))


def deepspeed_json(config: dict[str, Any]) -> bool:
    """A DeepSpeed config, as values and as a file, as TrainingArguments have it, and from within a script."""
    with _written(json.dumps(config).encode("utf-8", "surrogatepass"), "ds.json") as path:
        _answered(lambda: api.estimate(LLAMA, SHORT, HERE, engine_config=str(path)))
    of_trainer = {"per_device_train_batch_size": 1, "bf16": True, "output_dir": "out", "deepspeed": config}
    _answered(lambda: checks.check(of_trainer, LLAMA, SHORT, HERE))
    _preflighted(LLAMA, config)
    return _answered(lambda: checks.check(config, LLAMA, SHORT | {"micro_batch_size": 1}, HERE))


def accelerate_yaml(config: dict[str, Any]) -> bool:
    """An accelerate config, as values and as the YAML of them."""
    with _written(yaml.safe_dump(json.loads(json.dumps(config))).encode(), "accelerate.yaml") as path:
        _answered(lambda: checks.check(path, LLAMA, SHORT, {"gpu": "T4"}))
    return _answered(lambda: checks.check(config, LLAMA, SHORT, {"gpu": "T4"}))


def arguments(values: dict[str, Any]) -> bool:
    """TrainingArguments or LLaMA-Factory's, as values, as a YAML, as a list of words, and from within a script."""
    with _written(yaml.safe_dump(json.loads(json.dumps(values))).encode(), "train.yaml") as path:
        _answered(lambda: checks.check(path, LLAMA, None, HERE))
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    _answered(lambda: checks.check(words, LLAMA, None, HERE))
    _preflighted(LLAMA, values)
    return _answered(lambda: checks.check(values, LLAMA, None, HERE))


def raw_file(content: bytes) -> bool:
    """Any bytes, by each name that decides how they are read."""
    found = False
    for name in ("run.json", "run.yaml", "run.sh"):
        with _written(content, name) as path:
            found |= _answered(lambda path=path: checks.check(path, LLAMA, SHORT, HERE))
            _answered(lambda path=path: api.estimate(LLAMA, SHORT, HERE, engine_config=path))
            _answered(lambda path=path: api.estimate(str(path), SHORT, HERE, "single"))
    return found


def lengths(asked: dict[str, Any]) -> bool:
    """A file of lengths, by the name that decides how it is read, or values; and what is asked of them."""
    from memplan.lengths import Lengths, read_lengths

    def ask(found: Lengths) -> None:
        limit, batch, ranks = asked["limit"], asked["micro_batch_size"], asked["ranks"]
        _answered(lambda: found.risk(limit, batch, ranks, order=asked["order"]))
        _answered(lambda: found.step_by_which(limit, batch, ranks, order=asked["order"]))
        _answered(lambda: found.batch_longest(batch))
        _answered(lambda: found.padded(limit, pad_to_multiple_of=batch))

    with _written(asked["content"], f"a{asked['suffix']}") as path:
        answered = _answered(lambda: ask(read_lengths(path)))
    return _answered(lambda: ask(Lengths.of(asked["given"]))) or answered


def command(words: list[str]) -> bool:
    """A command line. Whatever it is, it ends with one of memplan's exit codes, and says so on stderr if it failed."""
    out, err = io.StringIO(), io.StringIO()
    os.environ["MEMPLAN_DEBUG"] = "1"  # a mistake of memplan's is raised, and not turned into its exit code
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    assert code in (0, 1, 2, 3), (code, err.getvalue())
    assert (code == 2) == bool(err.getvalue().strip()), (code, err.getvalue())
    assert len(err.getvalue()) < _LONGEST_MESSAGE
    assert "Traceback" not in err.getvalue()
    return code != 2


TARGETS: dict[str, Callable[[Any], bool]] = {
    each.__name__: each
    for each in (model_config, deepspeed_json, accelerate_yaml, arguments, raw_file, command, lengths)
}

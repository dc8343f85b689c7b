"""O1: the real transformers model's training step, traced under FakeTensorMode and archived.

The archive is the truth that memplan's own estimates are compared with: one JSON file per family under
``benchmarks/measurements/o1``, with the configs, the setups, the traced bytes and the versions of the libraries.

    python -m tests.oracles.o1 --family llama --family gpt2      traces what the archive lacks
    python -m tests.oracles.o1 --all --jobs 2                    every family
    python -m tests.oracles.o1 --family vit --sample 40          adds a stratified sample of the family's grid
    python -m tests.oracles.o1 --check 24 --seed 7               traces a stratified sample again and compares

Nothing here knows memplan's rules: :func:`memplan.introspect.trace.trace_step` runs the libraries' own code.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.oracles.families import CONFIGS, EAGER_ONLY, LORA_TARGETS

from memplan.errors import UnsupportedError
from memplan.introspect.trace import trace_step

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "o1"
SCHEMA = 1

PRECISIONS: dict[str, dict[str, str]] = {
    "pure_bf16": {"dtype": "bfloat16", "mixed_precision": "no"},
    "autocast": {"dtype": "float32", "mixed_precision": "bf16"},
    "fp32": {"dtype": "float32", "mixed_precision": "no"},
}
SHAPES: tuple[tuple[int, int], ...] = ((1, 16), (2, 200), (4, 512))
"""(batch, length): the optimizer step, then logits or activations, decide the peak; see ``peak_phases``."""

NOT_ARCHIVED = ("events", "versions", "seconds", "value_questions")


@dataclass(frozen=True)
class Setup:
    """One cell of a grid: a config by family and name, and the keyword arguments of ``trace_step``."""

    family: str
    config: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """A text that two equal setups share."""
        return json.dumps([self.family, self.config, self.options], sort_keys=True)

    @property
    def stratum(self) -> tuple[Any, ...]:
        """What a sample should cover: everything but sizes."""
        special = sorted(set(self.options) - {"num_layers", "micro_batch_size", "seq_len"})
        return (self.family, *((name, json.dumps(self.options[name])) for name in special))

    @property
    def values(self) -> dict[str, Any]:
        """The values of config.json."""
        return CONFIGS[self.family][self.config]


@dataclass(frozen=True)
class Row:
    """A setup with what the trace found: bytes, or why there is no such run."""

    setup: Setup
    result: dict[str, Any] | None = None
    unsupported: str | None = None


@dataclass
class Archive:
    """The rows of one family and the versions they were traced with."""

    family: str
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Grids


def grid(family: str, config: str, *, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Setup]:
    """Return the acceptance grid of one config: precision x checkpointing x attention x depth x shape, and LoRA.

    The depths are 2 and the config's own.
    """
    lora = {"rank": 8, "targets": LORA_TARGETS.get(family, ["q_proj", "v_proj"])}
    setups = []
    for precision, checkpointed, attn, depth in itertools.product(
        PRECISIONS.values(), (False, True), ("sdpa", "eager"), sorted({2, _depth(CONFIGS[family][config])})
    ):
        base = {**precision, "gradient_checkpointing": checkpointed, "attn": attn, "num_layers": depth}
        setups += [Setup(family, config, _sized(base, shape)) for shape in shapes]
        setups.append(Setup(family, config, {**_sized(base, (2, 200)), "lora": lora}))
    return setups


def large_grid(family: str, config: str) -> list[Setup]:
    """Return a thinner grid for real widths: depth 2 and 6, few shapes."""
    setups = []
    for precision, checkpointed in itertools.product(PRECISIONS.values(), (False, True)):
        for depth, shape, attn in ((2, (1, 512), "sdpa"), (2, (2, 2048), "sdpa"), (6, (4, 1024), "eager")):
            base = {**precision, "gradient_checkpointing": checkpointed, "attn": attn, "num_layers": depth}
            setups.append(Setup(family, config, _sized(base, shape)))
    return setups


def cuda_grid(family: str, config: str) -> list[Setup]:
    """Return autocast setups in which CUDA's float32 list is imposed."""
    return [
        Setup(
            family,
            config,
            {
                **_sized(PRECISIONS["autocast"], (2, 200)),
                "gradient_checkpointing": checkpointed,
                "attn": attn,
                "num_layers": 2,
                "cuda_autocast": True,
            },
        )
        for checkpointed, attn in itertools.product((False, True), ("sdpa", "eager"))
    ]


REENTRANT = {"gradient_checkpointing": True, "use_reentrant": True}


def option_grid(family: str, config: str) -> list[Setup]:
    """Return the other options, one at a time, under pure bf16 and autocast."""
    variants: list[dict[str, Any]] = [
        *({"optim": name} for name in ("adamw_torch", "adamw_torch_foreach", "sgd", "adagrad", "rmsprop", "adafactor")),
        {"optim": "muon"},
        {"grad_accum_steps": 3},
        {"padded": True},
        {"padded": True, "attn": "eager"},
        {"padded": True, "gradient_checkpointing": True},
        {"eval": True, "eval_batch_size": 16},
        {"max_grad_norm": 0.0},
        {"lora": {"rank": 64, "targets": "all-linear", "dropout": 0.1}},
        {"lora": {"rank": 8, "targets": "all-linear"}, "grad_accum_steps": 2},
        {"lora": {"rank": 8, "targets": "all-linear"}, "gradient_checkpointing": True, "padded": True},
        REENTRANT,
        {**REENTRANT, "attn": "eager", "padded": True},
        {**REENTRANT, "lora": {"rank": 8, "targets": "all-linear"}, "grad_accum_steps": 2},
    ]
    shapes = ((1, 16), (2, 200))
    base: dict[str, Any] = {"num_layers": 2, **({"attn": "eager"} if family in EAGER_ONLY else {})}
    setups = [
        Setup(family, config, {**_sized({**PRECISIONS[precision], **base}, shape), **variant})
        for precision, shape, variant in itertools.product(("pure_bf16", "autocast"), shapes, variants)
    ]
    fp16 = {"dtype": "float32", "mixed_precision": "fp16", **base}
    setups += [Setup(family, config, _sized(fp16, shape)) for shape in shapes]
    return list({setup.key: setup for setup in setups}.values())


def family_grid(family: str) -> list[Setup]:
    """Return every setup that ``make oracles`` traces for a family."""
    setups = []
    for config in CONFIGS[family]:
        if config in ("7b", "8b"):
            setups += large_grid(family, config)
        elif config in ("small", "wide"):
            setups += grid(family, config)
        else:
            setups += grid(family, config, shapes=((2, 200),))
    first = next(iter(CONFIGS[family]))
    return setups + cuda_grid(family, first) + option_grid(family, first)


def _depth(values: dict[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    depth: int = next(values[name] for name in names if name in values)
    return depth


def _sized(options: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    return {**options, "micro_batch_size": shape[0], "seq_len": shape[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Running and archiving


def run(setup: Setup) -> tuple[Row, dict[str, str]]:
    """Trace one setup; return its row and the versions of the libraries."""
    try:
        traced = trace_step(setup.values, **setup.options).to_dict()
    except UnsupportedError as error:
        return Row(setup, unsupported=str(error).split(". ")[0]), {}
    except Exception as error:  # a library's refusal is a fact about the setup; it must not end a run of hours
        return Row(setup, unsupported=f"{type(error).__name__}: {str(error)[:200]}"), {}
    versions = traced["versions"]
    return Row(setup, {name: value for name, value in traced.items() if name not in NOT_ARCHIVED}), versions


def run_grid(setups: Sequence[Setup], out_path: Path) -> Archive:
    """Trace the setups that ``out_path`` lacks and write them there with the ones it has.

    Rows traced with other versions of the libraries are traced again. The file is replaced at the end, and on the
    way every 50 rows, so that an interrupted run is taken up where it stopped.
    """
    known = load_archive(out_path) if out_path.exists() else Archive(setups[0].family)
    rows = {row.setup.key: row for row in known.rows}
    versions = known.versions
    traced = 0
    for setup in setups:
        if setup.key in rows:
            continue
        row, found = run(setup)
        if found and versions and not same_versions(found, versions):
            rows = {}
            write_archive(Archive(setup.family, found, [row]), out_path)
            return run_grid(setups, out_path)
        versions = found or versions
        rows[setup.key] = row
        traced += 1
        if traced % 50 == 0:
            write_archive(Archive(setup.family, versions, list(rows.values())), out_path)
    wanted = {setup.key for setup in setups}
    archive = Archive(setups[0].family, versions, [row for key, row in rows.items() if key in wanted])
    write_archive(archive, out_path)
    return archive


def same_versions(one: dict[str, str], other: dict[str, str]) -> bool:
    """Say whether two environments are the same but for the build ("2.13.0+cpu")."""
    short = [{name: value.split("+")[0] for name, value in versions.items()} for versions in (one, other)]
    return short[0] == short[1]


def write_archive(archive: Archive, path: Path) -> None:
    """Write an archive as JSON with one row per line, so that a diff shows what changed."""
    names = sorted({row.setup.config for row in archive.rows})
    head = {
        "schema": SCHEMA,
        "family": archive.family,
        "versions": archive.versions,
        "configs": {name: CONFIGS[archive.family][name] for name in names},
    }
    lines = [
        json.dumps(
            {"config": row.setup.config, "options": row.setup.options}
            | ({"unsupported": row.unsupported} if row.result is None else {"result": row.result}),
            separators=(",", ":"),
        )
        for row in archive.rows
    ]
    text = json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_archive(path: Path) -> Archive:
    """Read an archive; rows whose config has changed since are left out."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    family = stored["family"]
    current = {name for name, values in stored["configs"].items() if CONFIGS[family].get(name) == values}
    rows = [
        Row(Setup(family, row["config"], row["options"]), row.get("result"), row.get("unsupported"))
        for row in stored["rows"]
        if row["config"] in current
    ]
    return Archive(family, stored["versions"], rows)


def load_archives(directory: Path = ARCHIVE) -> dict[str, Archive]:
    """Read every family's archive."""
    return {path.stem: load_archive(path) for path in sorted(directory.glob("*.json"))}


def stratified_sample(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Return ``count`` traced rows, spread over the strata as evenly as they go."""
    traced = {row.setup.key: row for row in rows if row.result is not None}
    return [traced[setup.key] for setup in sampled([row.setup for row in traced.values()], count, seed)]


def sampled(setups: Sequence[Setup], count: int, seed: int) -> list[Setup]:
    """Return ``count`` setups, spread over the strata as evenly as they go."""
    rng = random.Random(seed)
    strata: dict[tuple[Any, ...], list[Setup]] = {}
    for setup in setups:
        strata.setdefault(setup.stratum, []).append(setup)
    piles = [rng.sample(pile, len(pile)) for pile in strata.values()]
    rng.shuffle(piles)
    dealt = itertools.chain.from_iterable(itertools.zip_longest(*piles))
    return list(itertools.islice((setup for setup in dealt if setup is not None), count))


def differences(row: Row) -> dict[str, tuple[Any, Any]]:
    """Trace a row again; return what differs as name -> (archived, now)."""
    again, _ = run(row.setup)
    old, new = row.result or {}, again.result or {}
    return {name: (old.get(name), new.get(name)) for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def peak_phases(rows: Iterable[Row]) -> dict[str, int]:
    """Count the phases that decide ``steady_allocated``, to show that a grid exercises all of them."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.result is not None:
            steady = {name: size for name, size in row.result["phases"].items() if name != "eval"}
            phase = max(steady, key=lambda name: steady[name])
            counts[phase] = counts.get(phase, 0) + 1
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace families, or check the archive; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracles.o1", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", action="append", choices=sorted(CONFIGS), help="may be given several times")
    parser.add_argument("--all", action="store_true", help="every family")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="directory of the archive")
    parser.add_argument("--sample", type=int, metavar="N", help="of each grid, add only N setups to the archive")
    parser.add_argument("--check", type=int, metavar="N", help="trace N archived rows again and compare")
    parser.add_argument("--seed", type=int, default=0, help="of --sample and --check")
    options = parser.parse_args(arguments)
    if options.check is not None:
        return _check(options.out, options.family, options.check, options.seed)
    families = list(CONFIGS) if options.all else options.family
    if not families:
        parser.error("give --family or --all")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        trace = functools.partial(_trace_family, out=options.out, sample=options.sample, seed=options.seed)
        for line in pool.map(trace, families):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return 0


def _trace_family(family: str, out: Path, sample: int | None, seed: int) -> str:
    started = time.perf_counter()
    path = out / f"{family}.json"
    setups = family_grid(family)
    if sample is not None:
        archived = [row.setup for row in load_archive(path).rows] if path.exists() else []
        chosen = {setup.key for setup in [*archived, *sampled(setups, sample, seed)]}
        setups = [setup for setup in setups if setup.key in chosen]
    archive = run_grid(setups, path)
    refused = sum(row.result is None for row in archive.rows)
    seconds = time.perf_counter() - started
    return f"{family}: {len(archive.rows)} rows, {refused} unsupported, {peak_phases(archive.rows)}, {seconds:.0f} s"


def _check(directory: Path, families: Sequence[str] | None, count: int, seed: int) -> int:
    archives = load_archives(directory)
    rows = [row for name, archive in archives.items() if not families or name in families for row in archive.rows]
    wrong = 0
    for row in stratified_sample(rows, count, seed):
        found = differences(row)
        wrong += bool(found)
        if found:
            sys.stdout.write(f"{row.setup.key}\n  {found}\n")
    sys.stdout.write(f"{min(count, len(rows))} rows traced again, {wrong} differ\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

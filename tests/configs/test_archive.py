"""The configs of every archived row of the engines (tests/oracles), read back: the strategy that its estimate takes."""

from __future__ import annotations

import pytest
from tests.oracles import o2
from tests.oracles.test_engines import AUTO

from memplan.configs.deepspeed import parse_deepspeed, to_deepspeed
from memplan.configs.setup import with_training
from memplan.specs.strategy import Strategy, ZeroSpec
from memplan.specs.training import TrainingSpec

ROWS = [
    row
    for archive in o2.load_archives().values()
    for row in archive.rows
    if row.setup.options["strategy"].startswith("zero")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.setup.key)
def test_a_config_is_the_strategy_that_was_measured(row: o2.Row) -> None:
    options = dict(row.setup.options)
    config = o2.engine_config(options)
    if "zero_force_ds_cpu_optimizer" not in options.get("zero", {}):
        config.pop("zero_force_ds_cpu_optimizer")  # the oracle's own
    asked = TrainingSpec(mixed_precision=options["mixed_precision"], micro_batch_size=options["micro_batch_size"])
    training, strategy, notes = with_training(parse_deepspeed(config, "ds.json"), asked, {}, options["gpus"])
    keys = {**dict.fromkeys(AUTO[options["strategy"]], "auto"), **options.get("zero", {})}
    places = {name: options[name] for name in ("offload_optimizer", "offload_param") if name in options}
    expected = Strategy(kind=options["strategy"], zero=ZeroSpec(**keys), **places)
    assert strategy.to_dict() == expected.to_dict()
    assert (training, notes) == (asked.replace(grad_accum_steps=1), [])
    again = parse_deepspeed(to_deepspeed(strategy, training), "again.json")
    assert with_training(again, TrainingSpec(), {}, options["gpus"])[:2] == (training, strategy)

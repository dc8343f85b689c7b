"""Experts that transformers before 5.0 called one by one: estimates beside archived steps of those versions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.oracles import o1
from tests.oracles.compare import compare
from tests.oracles.older_experts import ARCHIVE, FAMILIES, trace_experts, values_of

from memplan.architectures.nn import Build
from memplan.architectures.registry import build_model, name_parameters
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.tape.tape import Tape
from memplan.tape.tensor import float32

FILES = sorted(ARCHIVE.glob("*.json"))
ROUNDING = 6 * 1024
"""Bytes of scalars and counts that the Trainer's step keeps, each a block of 512."""


def rows_of(version: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ARCHIVE / f"{version}.json").read_text(encoding="utf-8"))["rows"]
    return rows


@pytest.mark.parametrize("version", [path.stem for path in FILES])
def test_the_real_steps_to_the_byte(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(version)
    assert len(rows) >= 28
    for row in rows:
        family, options, result = row["family"], row["options"], row["result"]
        monkeypatch.setitem(o1.CONFIGS[family], "older", values_of(family))
        traced = {"phases": result["phases"], "steady_allocated": max(result["phases"].values())}
        found = compare(o1.Row(o1.Setup(family, "older", options), traced), SoftwareSpec(transformers=version))
        mask = (8 * options["micro_batch_size"] * options["seq_len"] + 511) & -512
        for phase, (real, estimated) in found.phases.items():
            # Older attention let its weights go before the experts ran, and older heads made float32 logits in forward.
            if phase == "forward" and version < "4.57":
                continue
            assert abs(estimated + mask - real) <= ROUNDING, (row, phase, estimated + mask - real)
        assert abs(found.saved - result["saved"]) <= ROUNDING, row


@pytest.mark.parametrize("version", [path.stem for path in FILES])
def test_parameters_by_name_in_their_order(version: str) -> None:
    told = {row["family"]: row["result"]["parameters"] for row in rows_of(version) if "parameters" in row["result"]}
    assert told
    for family, real in told.items():
        config = values_of(family)
        architecture = config["architectures"][0]
        model = ModelSpec(id="older", model_type=family, architecture=architecture, config=config, source="test")
        root = build_model(Build(Tape(), float32, software=SoftwareSpec(transformers=version)), model, None)
        name_parameters(root)
        named = [[p.name, list(p.shape)] for _, module in root.named_modules() for _, p in module.parameters()]
        assert [each for each in named if not any(f".{i}." in each[0] for i in (1, 2, 3))] == [
            each for each in real if not any(f".{i}." in each[0] for i in (1, 2, 3))
        ]


def test_every_family_is_archived() -> None:
    assert set(FAMILIES) == {row["family"] for path in FILES for row in rows_of(path.stem)}


class Gated(torch.nn.Module):
    """One expert."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.opens = torch.nn.Linear(width, inner, bias=False)
        self.carries = torch.nn.Linear(width, inner, bias=False)
        self.closes = torch.nn.Linear(inner, width, bias=False)

    def forward(self, x: Any) -> Any:
        return self.closes(torch.nn.functional.silu(self.opens(x)) * self.carries(x))


class Loop(torch.nn.Module):
    """What Mixtral did from transformers 4.53 to 4.57, in few words."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.taken, self.count = config.num_experts_per_tok, config.num_local_experts
        self.router = torch.nn.Linear(config.hidden_size, self.count, bias=False)
        made = (Gated(config.hidden_size, config.intermediate_size) for _ in range(self.count))
        self.experts = torch.nn.ModuleList(made)

    def forward(self, x: Any) -> Any:
        rows = x.view(-1, x.shape[-1])
        scores = self.router(rows)
        shares, chosen = torch.topk(torch.softmax(scores, dim=1, dtype=torch.float), self.taken, dim=-1)
        shares /= shares.sum(dim=-1, keepdim=True)
        shares = shares.to(rows.dtype)
        total = torch.zeros(rows.shape, dtype=rows.dtype)
        table = torch.nn.functional.one_hot(chosen, num_classes=self.count).permute(2, 1, 0)
        for number in torch.greater(table.sum(dim=(-1, -2)), 0).nonzero():
            place, row = torch.where(table[number].squeeze(0))
            part = rows[None, row].reshape(-1, rows.shape[-1])
            out = self.experts[number](part) * shares[row, place, None]
            total.index_add_(0, row, out.to(rows.dtype))
        return total.reshape(x.shape)


def with_loops(model: Any) -> None:
    """Every layer of a Mixtral calls its experts one by one."""
    for layer in model.model.layers:
        layer.mlp = Loop(model.config).to(model.dtype)


@pytest.mark.parametrize("precision", ["pure_bf16", "autocast"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_todays_torch_keeps_what_it_kept(precision: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_of("mixtral") | {"num_hidden_layers": 2}
    monkeypatch.setitem(o1.CONFIGS["mixtral"], "older", values)
    sizes = {"num_layers": 2, "micro_batch_size": 2, "seq_len": 64, "attn": "sdpa", "use_reentrant": False}
    options = {**o1.PRECISIONS[precision], **sizes, "gradient_checkpointing": checkpointed}
    result = trace_experts(values, **options, change=with_loops)
    traced = {"phases": result["phases"], "steady_allocated": max(result["phases"].values())}
    found = compare(o1.Row(o1.Setup("mixtral", "older", options), traced), SoftwareSpec(transformers="4.57.1"))
    for phase, (real, estimated) in found.phases.items():
        assert abs(estimated + 1024 - real) <= ROUNDING, (phase, estimated + 1024 - real)
    assert abs(found.saved - result["saved"]) <= ROUNDING

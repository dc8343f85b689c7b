"""A DeepSpeed config, as the Trainer or ``deepspeed.initialize`` takes it, in memplan's terms.

``"auto"`` is the Trainer's word (``HfTrainerDeepSpeedConfig``): of ``reduce_bucket_size``,
``stage3_prefetch_bucket_size`` and ``stage3_param_persistence_threshold`` it makes numbers from the hidden size, of the
batch, the accumulation and the precision what TrainingArguments say, which are the options here. In every other key of
a ZeRO section DeepSpeed drops it for its own default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.answers import Finding
from memplan.configs.keys import (
    DEEPSPEED,
    LENIENT,
    OPTIMIZER_PARAMS,
    OPTIMIZERS,
    REMOVED,
    RENAMED,
    SCHEDULERS,
    TORCH_SCHEDULERS,
    Key,
)
from memplan.configs.section import Section, quoted
from memplan.configs.setup import Batch, EngineConfig
from memplan.errors import MemplanError, SpecError, UnsupportedError, did_you_mean
from memplan.specs.strategy import AioSpec, Strategy
from memplan.specs.training import TrainingSpec

__all__ = ["parse_deepspeed", "to_deepspeed"]

FROM_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys whose ``auto`` the Trainer makes a number (``trainer_config_finalize``)."""
DTYPES = {
    name: dtype
    for dtype, names in {
        "fp32": ("torch.float32", "fp32", "float32", "float"),
        "fp16": ("torch.float16", "fp16", "float16", "half"),
        "bf16": ("torch.bfloat16", "bf16", "bfloat16"),
    }.items()
    for name in names
}
"""What ``DtypeEnum`` of ``runtime/config.py`` takes for a type."""
_OFF = ("compile", "tensor_parallel", "expert_parallel", "hybrid_engine", "data_efficiency", "torch_autocast")
"""Sections that matter once they are enabled."""
_FURTHER = ("tensor_parallel", "expert_parallel", "hybrid_engine")
"""Sections whose further keys only matter then."""
_OTHER_TORCH_OPTIMIZERS = frozenset(
    {"Adadelta", "Adafactor", "ASGD", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "Rprop", "SparseAdam"}
)
_OF_ZERO = dict.fromkeys(DEEPSPEED["zero_optimization"].keys() - DEEPSPEED[""].keys() - {"stage"}, "zero_optimization")
"""Keys that mean something in ``zero_optimization`` only."""
_OWN_OPTIMIZERS = frozenset({"adam", "adamw", "adagrad", "lamb", "muadam", "muadamw", "musgd", "lion", "muon"})
"""``DEEPSPEED_OPTIMIZERS`` of ``runtime/config.py``; DeepSpeed ignores their case."""


def parse_deepspeed(
    data: Mapping[str, Any], source: str, *, trainer: bool | None = None, findings: list[Finding] | None = None
) -> EngineConfig:
    """Read the values of a DeepSpeed JSON.

    ``trainer`` says whether transformers or accelerate fill in what is left open; None is whether a value is ``auto``.
    With ``findings``, keys that are removed or not known join them, and the rest is read as if they were not there.
    Raises SpecError for what DeepSpeed refuses or would ignore by mistake, UnsupportedError for what is not modelled.
    """
    return _Reader(data, source, _has_auto(data) if trainer is None else trainer, findings).config()


def to_deepspeed(strategy: Strategy, training: TrainingSpec, nvme_path: str | None = None) -> dict[str, Any]:
    """Return the DeepSpeed JSON of a setup, of which :func:`parse_deepspeed` gives the setup back.

    A mixed precision that the setup leaves open is ``"auto"``. Raises SpecError for a strategy of another engine.
    """
    if not strategy.is_deepspeed:
        raise SpecError.at("strategy", strategy.kind, "is not DeepSpeed's", "Use zero0, zero1, zero2 or zero3.")
    values = strategy.zero.model_dump(mode="json", exclude_defaults=True)
    zero: dict[str, Any] = {"stage": strategy.zero_stage}
    zero |= {name: value for name, value in values.items() if name in DEEPSPEED["zero_optimization"]}
    for name, device in (("offload_optimizer", strategy.offload_optimizer), ("offload_param", strategy.offload_param)):
        details = zero.pop(name, {})
        if device != "none":
            path = {"nvme_path": nvme_path} if device == "nvme" else {}
            zero[name] = {"device": device, **path, **details}
    mixed = training.mixed_precision
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.grad_accum_steps,
        "bf16": {"enabled": "auto" if mixed is None else mixed == "bf16"},
        "fp16": {"enabled": "auto" if mixed is None else mixed == "fp16"},
        "zero_optimization": zero,
    }
    if "grad_accum_dtype" in values:
        config["data_types"] = {"grad_accum_dtype": values["grad_accum_dtype"]}
    if strategy.zero.ds_optimizer:
        config["optimizer"] = _section_of(strategy, training)
    config["bf16"] |= {name: True for name in _BF16 if name in values}
    names = ("communication_data_type", "zero_force_ds_cpu_optimizer", "aio")
    return config | {name: values[name] for name in names if name in values}


def _section_of(strategy: Strategy, training: TrainingSpec) -> dict[str, Any]:
    """The section ``optimizer`` that stands for ``training.optim``. Raises SpecError where there is none."""
    torch_adam = {"adamw_torch": {}, "adamw_torch_foreach": {"foreach": True}, "adamw_torch_loop": {"foreach": False}}
    if training.optim == "adamw_torch_fused":
        stage_0 = {"torch_adam": True, "fused": True} if strategy.kind == "zero0" else {}
        return {"type": "AdamW", "params": stage_0}
    if training.optim in torch_adam:
        return {"type": "AdamW", "params": {"torch_adam": True, **torch_adam[training.optim]}}
    kinds = {optim: kind for kind, optim in OPTIMIZERS.items()}
    if training.optim not in kinds:
        raise SpecError.at("optim", training.optim, "is not made by DeepSpeed", f"Use {', '.join(kinds)} or AdamW.")
    return {"type": kinds[training.optim], "params": {}}


def _has_auto(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_auto, value.values()))
    return isinstance(value, str) and value == "auto"


class _Reader:
    """Reads one config; ``notes`` collects what its text does not say."""

    def __init__(
        self, data: Mapping[str, Any], source: str, trainer: bool, findings: list[Finding] | None = None
    ) -> None:
        data = _without_removed(data, source, findings)
        self.source, self.trainer, self.findings = source, trainer, findings
        self.notes: list[str] = []
        self.refused: dict[str, MemplanError] = {}
        self.top = self._section("", data)
        if data and not self.top.raw:
            problem = "is none of DeepSpeed's keys, nor is any other of the file"
            remedy = "Give a DeepSpeed JSON or an accelerate YAML; for the Trainer's fsdp_config use --strategy fsdp."
            raise SpecError.at(f"{source}: {next(iter(data))}", next(iter(data.values())), problem, remedy)
        self.zero = self._zero()
        self.stage = self._stage()

    def config(self) -> EngineConfig:
        strategy, cluster = self._strategy()
        zero = strategy["zero"]
        precision, assumed = self._precision()
        zero |= self._masters()
        mixed = precision.get("mixed_precision")
        zero |= self._data_types(mixed)
        optimizer = self._optimizer(strategy, mixed)
        self._scheduler()
        self._other_sections(strategy)
        self.top.refuse_unmodelled(self.stage)
        return EngineConfig(
            source=self.source,
            strategy=strategy,
            training=precision | optimizer,
            assumed=assumed,
            cluster=cluster,
            batch=self._batch(),
            refused=self.refused,
            keys={"zero.": "zero_optimization."},
            notes=tuple(self.notes),
        )

    # -- sections ------------------------------------------------------------------------------------------------------

    def _section(self, path: str, values: object) -> Section:
        section = Section(
            values,
            DEEPSPEED[path],
            library="DeepSpeed",
            source=self.source,
            path=path,
            lenient=path in LENIENT,
            findings=self.findings,
            elsewhere=None if path else _OF_ZERO,
        )
        if section.ignored and path not in _FURTHER:
            names = ", ".join(section.ignored)
            self.notes.append(f"{section.name()}: DeepSpeed does not know {names}, and ignores it")
        return section

    def _optional(self, path: str, *, null: bool = False) -> Section:
        """A section that may be left out; ``null`` says whether DeepSpeed takes null for that."""
        name = path.rsplit(".", 1)[-1]
        values = (self.zero if "." in path else self.top).raw.get(name, {})
        return self._section(path, {} if values is None and null else values)

    def _zero(self) -> Section:
        values = self.top.raw.get("zero_optimization")
        if "zero_optimization" not in self.top.raw:
            if self.trainer:
                # DeepSpeedPlugin: "Please specify the ZeRO optimization config in the DeepSpeed config."
                remedy = 'Add {"stage": 2}, or another stage.'
                raise SpecError(f"{self.source}: zero_optimization: missing, which accelerate refuses. {remedy}")
            self.notes.append("no zero_optimization: stage 0, as DeepSpeed has it; the Trainer refuses it")
            values = {}
        if isinstance(values, bool):  # read_zero_config_deprecated
            if self.trainer:
                problem = "is DeepSpeed's old form, which accelerate cannot read"
                raise self.top.wrong("zero_optimization", problem, 'Write {"stage": 1}, or another stage.')
            self.notes.append("zero_optimization as true or false is deprecated: DeepSpeed makes it stage 1 or 0")
            values = {"stage": int(values)}
        if isinstance(values, Mapping):
            values = self._renamed(values)
        return self._section("zero_optimization", values)

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Names without ``stage3_`` in front are taken too, but not both; the Trainer does not fill in their auto."""
        found = dict(values)
        for name, alias in RENAMED.items():
            if name not in found:
                continue
            if alias in found:
                path = f"{self.source}: zero_optimization.{name}"
                raise SpecError.at(path, found[name], f"is given twice, as {alias} too", "Leave it out.")
            value = found.pop(name)
            if value != "auto":
                found[alias] = value
        return found

    def _stage(self) -> int:
        stage = self.zero.get("stage", 0)
        if self.zero.is_auto("stage"):
            # DeepSpeedPlugin fills it in from ACCELERATE_DEEPSPEED_ZERO_STAGE, which is 2.
            self.notes.append('"auto" as a stage: accelerate makes it 2')
            return 2
        if stage not in (0, 1, 2, 3):
            raise self.zero.wrong("stage", "is not a stage of ZeRO", "Use 0, 1, 2 or 3.")
        return int(stage)

    # -- strategy ------------------------------------------------------------------------------------------------------

    def _strategy(self) -> tuple[dict[str, Any], dict[str, Any]]:
        zero: dict[str, Any] = {}
        for name, key in DEEPSPEED["zero_optimization"].items():
            if not key.field or name in _NOT_FIELDS:
                continue
            if self.zero.is_auto(name):
                if name in FROM_HIDDEN_SIZE and (name == FROM_HIDDEN_SIZE[0] or self.stage == 3):
                    zero[name] = "auto"
            elif self.zero.has(name):
                zero[name] = self.zero.get(name)
        if self.zero.get("legacy_stage1"):
            raise self.zero.wrong("legacy_stage1", "is refused by DeepSpeed since 0.5.9", "Leave it out.")
        if not self.zero.get("compute_grad_norm", True) and self.stage not in (1, 2):
            raise self.zero.wrong(
                "compute_grad_norm", "is refused by DeepSpeed outside stages 1 and 2", "Leave it out."
            )
        self.zero.refuse_unmodelled(self.stage)
        self._deprecated(zero)
        strategy: dict[str, Any] = {"kind": f"zero{self.stage}", "zero": zero}
        cluster: dict[str, Any] = {}
        for part in ("optimizer", "param"):
            self._offload(part, strategy, cluster)
        if self.top.get("gradient_allreduce_op", "mean").lower() == "sum" and self.stage == 3:
            raise self.top.wrong("gradient_allreduce_op", "is refused by DeepSpeed with stage 3", "Use mean.")
        return strategy, cluster

    def _deprecated(self, zero: dict[str, Any]) -> None:
        """DeepSpeedConfigModel._process_deprecated_field: the new key is set, and may not be there already."""
        new, old = "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"
        if self.zero.has(old):
            if new in self.zero.raw:
                raise self.zero.wrong(old, f"is the old name of {new}, which is given too", "Leave it out.")
            zero[new] = self.zero.get(old)
            self.notes.append(f"{old} is deprecated: it is {new} now")
        if self.zero.has("cpu_offload_use_pin_memory"):
            self.notes.append("cpu_offload_use_pin_memory is deprecated, and DeepSpeed ignores it")

    def _offload(self, part: str, strategy: dict[str, Any], cluster: dict[str, Any]) -> None:
        name, old = f"offload_{part}", {"optimizer": "cpu_offload", "param": "cpu_offload_param"}[part]
        path = f"zero_optimization.{name}"
        section = self._optional(path, null=True)
        device = self._device(section)
        if self.zero.has(old):
            if self.zero.raw.get(name) is not None:
                raise self.zero.wrong(old, f"is the old name of {name}, which is given too", "Leave it out.")
            device = "cpu" if self.zero.get(old) else "none"
            self.notes.append(f'{old} is deprecated: it is {name} {{"device": "cpu"}} now')
        if device == "none":
            return
        if part == "param" and self.stage != 3:
            # Only stage 3 reads it: the ledger of a run at stage 2 is the same with and without it.
            if self.findings is None:  # findings.offload_param_ignored says it too
                self.notes.append(f"{name} {device} has no effect at stage {self.stage}: only ZeRO-3 reads it")
            return
        section.refuse_unmodelled(self.stage)
        if section.get("ratio", 1.0) < 1.0 and self.stage != 3:
            raise section.wrong("ratio", "is refused by DeepSpeed below stage 3", "Leave it out, or use stage 3.")
        if device == "nvme" and self.stage != 3:
            self._nvme_below_3(section)
            device = "cpu"
        strategy[name] = device
        on_nvme = ("buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")
        keys = ["pin_memory", "ratio", *(on_nvme if device == "nvme" else ())]
        details = {key: section.get(key) for key in keys if section.has(key)}
        if details:
            strategy["zero"][name] = details
        if device == "nvme":
            self._nvme(section, cluster)

    def _device(self, section: Section) -> str:
        device = section.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise section.wrong("device", "is not a device of DeepSpeed", "Use none, cpu or nvme.")
        return str(device)

    def _nvme_below_3(self, section: Section) -> None:
        # runtime/zero/offload_config.py: valid with stage 3 only. The ledger of a run at stage 2 is that of cpu.
        problem = f"is for stage 3; at stage {self.stage} DeepSpeed keeps the states in host memory"
        remedy = "Use cpu, or stage 3."
        if self.findings is None:
            raise section.wrong("device", problem, remedy)
        self.findings.append(
            Finding(
                code="nvme-below-stage-3",
                severity="error",
                path=section.name("device"),
                message=f"'nvme' {problem}.",
                remedy=remedy,
            )
        )

    def _nvme(self, section: Section, cluster: dict[str, Any]) -> None:
        path = section.get("nvme_path")
        if path in (None, "", "none"):
            # AsyncPartitionedParameterSwapper joins it with a file's name, and fails.
            remedy = "Add the folder on the NVMe that device nvme needs, or give --nvme-path."
            self.refused["nvme_path"] = SpecError(f"{section.name('nvme_path')}: missing. {remedy}")
            return
        if cluster.get("nvme_path", path) != path:
            raise UnsupportedError(
                f"{section.name('nvme_path')}: {path!r} beside {cluster['nvme_path']!r}: two NVMe folders are not "
                "modelled. Use one."
            )
        cluster["nvme_path"] = path

    # -- training ------------------------------------------------------------------------------------------------------

    def _batch(self) -> Batch:
        names = {
            "train": "train_batch_size",
            "micro": "train_micro_batch_size_per_gpu",
            "steps": "gradient_accumulation_steps",
        }
        numbers = {name: self._number(key) for name, key in names.items()}
        fields = {"micro": "micro_batch_size", "steps": "grad_accum_steps"}
        automatic = frozenset(fields[name] for name in fields if self.top.is_auto(names[name]))
        return Batch(**numbers, automatic=automatic)

    def _number(self, key: str) -> int | None:
        value = self.top.get(key)
        if value is None:
            return None
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
        if not whole or not 1 <= value <= 2**40:
            raise self.top.wrong(key, "is not a positive integer", 'Use an integer from 1, or "auto" for the Trainer.')
        return int(value)

    def _precision(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the sections fix, and what they leave to the option or else amount to."""
        bf16 = self._bf16()
        fp16 = self._section("fp16", self._values_of("fp16"))
        for section in (bf16, fp16):
            section.refuse_unmodelled(self.stage)
        if bf16.get("enabled") and fp16.get("enabled"):
            problem = "cannot go with bf16, which is enabled too"
            raise fp16.wrong("enabled", problem, "Enable one of them.")
        for name, section in (("bf16", bf16), ("fp16", fp16)):
            if section.get("enabled"):
                return {"mixed_precision": name}, {}
        open_ones = [
            name
            for name, section in (("bf16", bf16), ("fp16", fp16))
            if section.is_auto("enabled") or (self.trainer and name not in self.top.raw)
        ]
        if not self.trainer and not open_ones and "bf16" not in self.top.raw and "fp16" not in self.top.raw:
            self.notes.append("neither bf16 nor fp16 is there: DeepSpeed trains weights in the type they are loaded in")
        if not open_ones:
            return {"mixed_precision": "no"}, {}
        return {}, {"mixed_precision": open_ones[0]} if len(open_ones) == 1 else {}

    def _bf16(self) -> Section:
        old = "bf16" not in self.top.raw and "bfloat16" in self.top.raw
        return self._section("bf16", self._values_of("bfloat16" if old else "bf16", null=True))

    def _masters(self) -> dict[str, bool]:
        bf16 = self._bf16()
        found = {name: True for name in _BF16 if bf16.get(name)}
        if not self.top.get("zero_force_ds_cpu_optimizer", True):
            found["zero_force_ds_cpu_optimizer"] = False
        return found

    def _values_of(self, name: str, *, null: bool = False) -> object:
        values = self.top.raw.get(name, {})
        return {} if values is None and null else values

    def _data_types(self, mixed: str | None) -> dict[str, Any]:
        section = self._optional("data_types")
        section.refuse_unmodelled(self.stage)
        found: dict[str, Any] = {}
        accumulation = section.get("grad_accum_dtype")
        if accumulation is not None:
            if accumulation not in DTYPES:
                raise section.wrong("grad_accum_dtype", "is not a type of DeepSpeed", "Use fp32, bf16 or fp16.")
            found["grad_accum_dtype"] = DTYPES[accumulation]
        parameters = section.get("param_dtype")
        expected = "fp32" if mixed == "no" else mixed
        if parameters is not None and expected is not None and DTYPES.get(parameters) != expected:
            raise section.wrong("param_dtype", f"conflicts with the enabled {expected}", "Leave it out.")
        communication = self.top.get("communication_data_type")
        if communication is not None:
            if communication.lower() not in ("fp32", "fp16", "bf16"):
                raise self.top.wrong("communication_data_type", "is refused by DeepSpeed", "Use fp32, bf16 or fp16.")
            found["communication_data_type"] = communication.lower()
        return found

    def _optimizer(self, strategy: Mapping[str, Any], mixed: str | None) -> dict[str, Any]:
        """The optimizer that DeepSpeed makes itself, or nothing: then it is the Trainer's."""
        offloaded = strategy.get("offload_optimizer", "none") != "none"
        if "optimizer" not in self.top.raw:
            return {}
        section = self._optional("optimizer")
        section.refuse_unmodelled(self.stage)
        kind, params = section.get("type"), section.get("params", {})
        if kind is None:
            return {}
        if not isinstance(params, Mapping):
            raise section.wrong("params", "is not an object", "Write {...}.")
        if "max_grad_norm" in params:
            raise SpecError.at(
                section.name("params.max_grad_norm"),
                params["max_grad_norm"],
                "is refused by DeepSpeed as an optimizer's",
                "Use gradient_clipping at the top.",
            )
        self._params("optimizer", params, _taken_by(kind, params, offloaded))
        try:
            strategy["zero"]["ds_optimizer"] = True
            return {"optim": self._optim(section, kind, params, offloaded, mixed)}
        except UnsupportedError as error:
            self.refused["optim"] = error
            return {}

    def _scheduler(self) -> None:
        """``_scheduler_from_config``: a name that is none fails an assertion, a parameter that is none a call."""
        given = self.top.raw.get("scheduler")
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind is None or not isinstance(given, Mapping):
            return
        if not isinstance(kind, str) or kind not in SCHEDULERS.keys() | TORCH_SCHEDULERS:
            where = f"{self.source}: scheduler.type"
            problem, remedy = "is not a schedule of DeepSpeed or torch", did_you_mean(str(kind)[:80], SCHEDULERS)
            if self.findings is None:
                raise SpecError.at(where, kind, problem, remedy)
            message = f"{quoted(kind)} {problem}: it does not start."
            self.findings.append(
                Finding(code="unknown-key", severity="error", path=where, message=message, remedy=remedy)
            )
        elif kind in SCHEDULERS and isinstance(given.get("params"), Mapping):
            self._params("scheduler", given["params"], SCHEDULERS[kind])

    def _params(self, section: str, params: Mapping[str, Any], taken: tuple[str, ...] | None) -> None:
        """What is handed over to an optimizer or a schedule, as it is; ``taken`` None is one that is not modelled."""
        if taken is not None:
            keys = dict.fromkeys(taken, Key(Any))
            Section(
                params, keys, library="DeepSpeed", source=self.source, path=f"{section}.params", findings=self.findings
            )

    def _optim(self, section: Section, kind: str, params: Mapping[str, Any], offloaded: bool, mixed: str | None) -> str:
        name = kind.lower() if kind.lower() in _OWN_OPTIMIZERS else kind
        if name in ("adam", "adamw"):
            return self._adam(section, params, offloaded, mixed)
        if name not in _OWN_OPTIMIZERS | _OTHER_TORCH_OPTIMIZERS | OPTIMIZERS.keys():
            remedy = did_you_mean(kind, ["Adam", "AdamW", "Adagrad", "Lion", "Lamb", "Muon", *OPTIMIZERS])
            raise section.wrong("type", "is not an optimizer of DeepSpeed or torch.optim", remedy)
        if name == "muon":
            raise self._muon(section)
        if name not in OPTIMIZERS or any(params.get(key) for key in ("momentum", "centered", "amsgrad")):
            raise UnsupportedError(
                f"{section.name('type')}: {kind!r} with these params is not modelled. Use AdamW, or give --optim."
            )
        if name in ("SGD", "RMSprop") and self.stage > 0 and not self._allows_untested():
            remedy = 'Add "zero_allow_untested_optimizer": true.'
            raise section.wrong("type", "is refused by DeepSpeed as untested with ZeRO", remedy)
        return OPTIMIZERS[name]

    def _muon(self, section: Section) -> MemplanError:
        """DeepSpeed's own, MuonWithAuxAdam."""
        if self.stage == 3 and self.zero.get("reduce_scatter", True):
            # runtime/zero/stage3.py: "Muon and reduce scatter cannot be used together"
            problem = "is refused by DeepSpeed at stage 3 with reduce_scatter"
            return section.wrong("type", problem, "Use AdamW, or set reduce_scatter to false.")
        return UnsupportedError(
            f"{section.name('type')}: {section.get('type')!r} is not modelled: DeepSpeed orthogonalizes gradients as "
            "it reduces them, by functions that torch.compile fuses, and what these need is not known. Use AdamW, or "
            "give --optim."
        )

    def _allows_untested(self) -> bool:
        return bool(self.top.get("zero_allow_untested_optimizer", False))

    def _adam(self, section: Section, params: Mapping[str, Any], offloaded: bool, mixed: str | None) -> str:
        """get_optimizer_configuration: DeepSpeedCPUAdam where offloaded, torch's AdamW if asked for, else FusedAdam."""
        where = section.name("type")
        if params.get("amsgrad"):
            raise UnsupportedError(f"{where}: amsgrad's third state is not modelled. Leave it out, or give --optim.")
        if params.get("torch_adam"):
            if offloaded:
                raise UnsupportedError(
                    f"{where}: torch_adam on the CPU is not modelled. Leave torch_adam out, or give --optim."
                )
            if params.get("fused"):
                return "adamw_torch_fused"
            foreach = params.get("foreach")
            return "adamw_torch" if foreach is None else f"adamw_torch_{'foreach' if foreach else 'loop'}"
        if offloaded and params.get("fp32_optimizer_states") is False:
            raise UnsupportedError(
                f"{where}: 16-bit optimizer states are not modelled. Leave fp32_optimizer_states out."
            )
        if self.stage == 0 and mixed != "no":
            raise UnsupportedError(
                f"{where}: FusedAdam under stage 0 in 16 bit (FP16_Optimizer) is not modelled. Leave the section "
                'optimizer out, add "torch_adam": true to its params, use stage 1, or give --optim.'
            )
        return "adamw_torch_fused"

    def _other_sections(self, strategy: Mapping[str, Any]) -> None:
        for name in _OFF:
            self._optional(name).refuse_unmodelled(self.stage)
        aio = self._optional("aio", null=True)
        on_nvme = "nvme" in (strategy.get("offload_optimizer"), strategy.get("offload_param"))
        if on_nvme:
            strategy["zero"]["aio"] = {key: aio.get(key) for key in AioSpec.model_fields if aio.has(key)}
        checkpointing = self._optional("activation_checkpointing")
        if any(checkpointing.raw.values()):
            self.notes.append(
                "activation_checkpointing is for models that call deepspeed.checkpointing, which transformers' do not: "
                "gradient_checkpointing is what counts"
            )


def _taken_by(kind: str, params: Mapping[str, Any], offloaded: bool) -> tuple[str, ...] | None:
    """The params of the optimizer that ``_configure_basic_optimizer`` makes; None where memplan does not know it."""
    name = kind.lower() if kind.lower() in _OWN_OPTIMIZERS else kind
    if name in ("adam", "adamw"):
        name = "torch_adam" if params.get("torch_adam") else "adam"
    return OPTIMIZER_PARAMS.get(f"cpu_{name}" if offloaded else name, OPTIMIZER_PARAMS.get(name))


_BF16 = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""Keys of ``bf16`` that are fields of :class:`ZeroSpec`."""
_NOT_FIELDS = frozenset(
    {
        *("stage", "offload_param", "offload_optimizer", "legacy_stage1", "cpu_offload", "cpu_offload_param"),
        "stage3_gather_fp16_weights_on_model_save",
    }
)
"""Keys of ZeRO that are read on their own."""


def _without_removed(data: Mapping[str, Any], source: str, findings: list[Finding] | None) -> Mapping[str, Any]:
    """What is left without the keys of ``_reject_removed_config_keys`` (runtime/config.py), errors or findings."""
    for path, near in REMOVED.items():
        section, _, key = path.rpartition(".")
        there = data.get("zero_optimization") if section else data
        if not isinstance(there, Mapping) or key not in there:
            continue
        remedy = f"Leave it out; see {near}." if "_" in near else "Leave it out."
        problem = "is given to a key that DeepSpeed 0.19 has removed"
        if findings is None:
            raise SpecError.at(f"{source}: {path}", there[key], problem, remedy)
        message = f"{quoted(there[key])} {problem}: it does not start."
        where = f"{source}: {path}"
        findings.append(Finding(code="removed-key", severity="error", path=where, message=message, remedy=remedy))
        left = {name: value for name, value in there.items() if name != key}
        data = {**data, section: left} if section else left
    return data

"""An accelerate config, as ``accelerate launch --config_file`` takes it, in memplan's terms.

``accelerate launch`` hands the values over in environment variables, of which ``DeepSpeedPlugin`` and
``FullyShardedDataParallelPlugin`` make the engine's settings, with the launcher's own defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memplan.answers import Finding
from memplan.configs.deepspeed import parse_deepspeed
from memplan.configs.files import is_there, read_mapping, refuse_outside
from memplan.configs.keys import ACCELERATE
from memplan.configs.section import Section
from memplan.configs.setup import EngineConfig
from memplan.errors import MemplanError, SpecError, UnsupportedError, did_you_mean
from memplan.specs.hardware import ClusterSpec
from memplan.specs.strategy import FsdpSpec, Strategy
from memplan.specs.training import MixedPrecision

__all__ = ["is_accelerate", "of_options", "parse_accelerate", "to_accelerate"]

_KINDS = {"NO": "single", "MULTI_GPU": "ddp", "DEEPSPEED": "zero", "FSDP": "fsdp"}
_OTHER_KINDS = ("MULTI_CPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU",
                "MULTI_NEURON", "XLA", "MEGATRON_LM")  # fmt: skip
_PRECISIONS = ("no", "fp16", "bf16")
_BESIDE_A_FILE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)
"""What DeepSpeedPlugin._deepspeed_config_checks refuses beside deepspeed_config_file, and mixed_precision."""
_OWN = {
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload_optimizer_device",
    "zero_optimization.offload_param.device": "offload_param_device",
    "zero_optimization.offload_optimizer.nvme_path": "offload_optimizer_nvme_path",
    "zero_optimization.offload_param.nvme_path": "offload_param_nvme_path",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Keys of the DeepSpeed config that DeepSpeedPlugin makes -> those of ``deepspeed_config`` that it makes them of."""
_SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
_PREFETCH = ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH")
_STATE_DICTS = ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT")
_WRAPS = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
_KEYS = {"gpus": "num_processes", "nodes": "num_machines", "fsdp.": "fsdp_config.fsdp_"}
"""Fields of specs -> keys, for messages."""
_MARKS = frozenset({"distributed_type", "compute_environment", "deepspeed_config", "fsdp_config", "num_processes"})


def is_accelerate(data: Mapping[str, Any]) -> bool:
    """Whether values are accelerate's rather than DeepSpeed's."""
    return not _MARKS.isdisjoint(data)


def parse_accelerate(
    data: Mapping[str, Any], source: str, folder: Path | None = None, findings: list[Finding] | None = None
) -> EngineConfig:
    """Read the values of an accelerate config; ``folder`` is where its file lies.

    With ``findings``, keys that are removed or not known join them, and the rest is read as if they were not there.

    Raises SpecError for what accelerate or the engine refuses or would ignore by mistake, UnsupportedError for what is
    not modelled.
    """
    return _Reader(data, source, folder, findings).config()


_FLAGS = {"use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "multi_gpu": "MULTI_GPU", "tpu": "XLA",
          "use_megatron_lm": "MEGATRON_LM"}  # fmt: skip


def of_options(options: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that options of ``accelerate launch`` come to; they win over those of a ``config`` file.

    Without ``distributed_type``, neither says how many processes share the work: that is what GPUs there are.
    Source: accelerate 1.15 ``commands/launch.py``, ``_validate_launch_command``.
    """
    given = dict(options)
    merged = dict(config)
    kind = next((kind for flag, kind in _FLAGS.items() if given.get(flag)), None)
    if kind is not None:
        merged["distributed_type"] = kind
    if given.get("cpu"):
        merged["use_cpu"] = True
    merged |= {name: given[name] for name in ACCELERATE[""] if name in given and name != "debug"}
    for path in ("deepspeed_config", "fsdp_config", "parallelism_config"):
        own = {name: given[name] for name in ACCELERATE[path] if name in given}
        before = merged.get(path) or {}
        if own and isinstance(before, Mapping):
            merged[path] = {**before, **own}
    if merged.get("distributed_type") == "DEEPSPEED" and "deepspeed_config_file" in given:
        # What stands beside a file is refused in a config (_deepspeed_config_checks), and idle on the command line.
        kept = {name: value for name, value in merged["deepspeed_config"].items() if name not in _BESIDE_A_FILE}
        merged |= {"deepspeed_config": kept}
        merged.pop("mixed_precision", None)
    return merged


def to_accelerate(strategy: Strategy, cluster: ClusterSpec, mixed_precision: MixedPrecision) -> dict[str, Any]:
    """Return the accelerate config of DDP or FSDP, of which :func:`parse_accelerate` gives the setup back.

    Raises SpecError for a strategy of another engine, and for what accelerate cannot be asked for.
    """
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP"}
    if strategy.kind not in kinds:
        raise SpecError.at("strategy", strategy.kind, "has no accelerate config", f"Use {' or '.join(kinds)}.")
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kinds[strategy.kind],
        "mixed_precision": mixed_precision,
        "num_machines": cluster.nodes,
        "num_processes": cluster.gpus,
    }
    if strategy.kind == "fsdp":
        keys = {"version": strategy.fsdp.version, "offload_params": strategy.offload_param == "cpu"}
        keys |= _fsdp_keys(strategy.fsdp)
        config["fsdp_config"] = {f"fsdp_{name}": value for name, value in keys.items()}
    return config


def _fsdp_keys(fsdp: FsdpSpec) -> dict[str, Any]:
    """Every key is written: the launcher's defaults are not the Trainer's."""
    if not fsdp.limit_all_gathers:
        remedy = "Leave it out: FullyShardedDataParallelPlugin has it on."
        raise SpecError.at("limit_all_gathers", False, "has no key in an accelerate config", remedy)
    names = ["auto_wrap_policy", "state_dict_type", "activation_checkpointing", "cpu_ram_efficient_loading"]
    if fsdp.auto_wrap_policy == "SIZE_BASED_WRAP":
        names.append("min_num_params")
    if fsdp.version == 2:
        names.append("reshard_after_forward")
    else:
        names += ["backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states"]
    keys = {name: getattr(fsdp, name) for name in names}
    if fsdp.auto_wrap_policy == "TRANSFORMER_BASED_WRAP" and fsdp.transformer_layer_cls_to_wrap:
        keys["transformer_layer_cls_to_wrap"] = ",".join(fsdp.transformer_layer_cls_to_wrap)
    if fsdp.version == 1:
        keys["sharding_strategy"] = fsdp.sharding_strategy or "FULL_SHARD"
    return keys


class _Reader:
    def __init__(
        self, data: Mapping[str, Any], source: str, folder: Path | None, findings: list[Finding] | None = None
    ) -> None:
        self.source, self.folder, self.findings = source, folder, findings
        self.notes: list[str] = []
        if data.get("distributed_type") is None:
            # BaseConfig.process_config: "A `distributed_type` must be specified in the config file."
            remedy = "Add DEEPSPEED, FSDP, MULTI_GPU or 'NO'."
            raise SpecError(f"{source}: distributed_type: missing, which accelerate refuses. {remedy}")
        self.top = self._section("", data)

    def config(self) -> EngineConfig:
        kind = self._kind()
        self.top.refuse_unmodelled()
        for name in ("parallelism_config", "dynamo_config"):
            self._optional(name).refuse_unmodelled()
        precision = self._precision()
        if kind == "zero":
            return self._deepspeed(precision)
        training = {} if precision is None else {"mixed_precision": precision}
        if kind == "single" and self.top.get("num_processes", 1) not in (1, -1):
            self.notes.append(f"distributed_type NO starts one process, not {self.top.get('num_processes')}")
        cluster, refused = ({"gpus": 1}, {}) if kind == "single" else self._cluster()
        strategy: dict[str, Any] = {"kind": kind}
        if kind == "fsdp":
            strategy |= self._fsdp()
        elif self._sizes()[0] > 1:
            name = self._optional("parallelism_config").name("parallelism_config_dp_replicate_size")
            raise UnsupportedError(f"{name}: is not modelled without FSDP. Leave it out.")
        return EngineConfig(
            self.source, strategy, training, cluster=cluster, refused=refused, keys=_KEYS, notes=tuple(self.notes)
        )

    def _section(self, path: str, values: object) -> Section:
        """accelerate refuses unknown keys at the top, and ignores them below."""
        section = Section(
            values,
            ACCELERATE[path],
            library="accelerate",
            source=self.source,
            path=path,
            lenient=bool(path),
            automatic=False,
            findings=self.findings,
        )
        if section.ignored:
            names = ", ".join(section.ignored)
            self.notes.append(f"{section.name()}: accelerate does not know {names}, and ignores it")
        return section

    def _optional(self, path: str) -> Section:
        values = self.top.get(path)
        values = {} if values is None else values
        prefix = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}.get(path)
        if prefix is not None and isinstance(values, Mapping):
            # commands/launch.py puts it in front.
            values = {key if str(key).startswith(prefix[:-1]) else f"{prefix}{key}": v for key, v in values.items()}
        return self._section(path, values)

    def _kind(self) -> str:
        kind = self.top.get("distributed_type")
        if kind is False:  # what YAML makes of NO without quotes; accelerate starts one process then too
            kind = "NO"
        if kind in _OTHER_KINDS:
            raise UnsupportedError(
                f"{self.top.name('distributed_type')}: {kind!r} is not modelled. Use one of {', '.join(_KINDS)}."
            )
        if kind not in _KINDS:
            remedy = did_you_mean(str(kind), [*_KINDS, *_OTHER_KINDS])
            raise self.top.wrong("distributed_type", "is not a kind that accelerate knows", remedy)
        return _KINDS[kind]

    def _precision(self) -> str | None:
        precision = self.top.get("mixed_precision")
        if precision is None:
            return "fp16" if self.top.get("fp16") else None
        if precision is False:
            raise self.top.wrong("mixed_precision", "is what YAML makes of no without quotes", "Write 'no'.")
        name = str(precision).lower()
        if name == "fp8":
            raise UnsupportedError(f"{self.top.name('mixed_precision')}: 'fp8' is not modelled. Use bf16, fp16 or no.")
        if name not in _PRECISIONS:
            raise self.top.wrong("mixed_precision", "is refused by accelerate", "Use bf16, fp16 or no.")
        return name

    def _cluster(self) -> tuple[dict[str, Any], dict[str, Any]]:
        processes = self._number("num_processes", -1)
        found: dict[str, Any] = {"nodes": self._number("num_machines", 1)}
        if processes != -1:
            return {"gpus": processes, **found}, {}
        # "You need to manually pass in `--num_processes` using this config yaml."
        remedy = "Add it, or give --gpus."
        return found, {"gpus": SpecError(f"{self.source}: num_processes: missing, which accelerate refuses. {remedy}")}

    def _number(self, key: str, default: int) -> int:
        value = self.top.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not (1 <= value <= 2**40 or value == default):
            raise self.top.wrong(key, "is not a positive integer", "Use 1 or more.")
        return value

    # -- DeepSpeed -----------------------------------------------------------------------------------------------------

    def _deepspeed(self, precision: str | None) -> EngineConfig:
        section = self._optional("deepspeed_config")
        named = section.get("deepspeed_config_file")
        if named is None:
            parsed = self._of_plugin(section, precision)
        else:
            parsed = self._referenced(section, str(named))
        where = "deepspeed_config, as DeepSpeed sees it" if named is None else "deepspeed_config_file"
        stage = parsed.strategy["zero"].get("stage", int(parsed.strategy["kind"][-1]))
        section.refuse_unmodelled(stage)
        if section.get("zero3_init_flag") is False and stage == 3:
            # DeepSpeedPlugin.set_deepspeed_weakref does not look at it.
            self.notes.append(
                "zero3_init_flag false has no effect: accelerate 1.15 tells transformers of ZeRO-3 all the same, which "
                "makes the model under zero.Init"
            )
        cluster, refused = self._cluster()
        return EngineConfig(
            source=self.source,
            strategy=parsed.strategy,
            training=parsed.training,
            assumed=parsed.assumed,
            cluster={**cluster, **parsed.cluster},
            batch=parsed.batch,
            refused={**refused, **parsed.refused},
            keys={**_KEYS, **{field: f"{where}: {key}" for field, key in parsed.keys.items()}},
            notes=(*self.notes, *parsed.notes),
        )

    def _of_plugin(self, section: Section, precision: str | None) -> EngineConfig:
        """What is made of accelerate's own keys, by whose names it is called."""
        seen = f"{section.name()}, as DeepSpeed sees it"

        def own(text: str) -> str:
            for theirs, ours in _OWN.items():
                text = text.replace(f"{seen}: {theirs}:", f"{section.name(ours)}:")
            return text

        findings = None if self.findings is None else list[Finding]()
        try:
            parsed = parse_deepspeed(self._plugin(section, precision), seen, trainer=True, findings=findings)
        except MemplanError as error:
            raise type(error)(own(str(error))) from None
        if self.findings is not None:
            found = (each.model_copy(update={"path": own(f"{each.path}:")[:-1]}) for each in findings or ())
            self.findings += found
        refused = {name: type(error)(own(str(error))) for name, error in parsed.refused.items()}
        return dataclasses.replace(parsed, refused=refused)

    def _plugin(self, section: Section, precision: str | None) -> dict[str, Any]:
        """What DeepSpeedPlugin makes of the environment (__post_init__, set_mixed_precision)."""
        zero: dict[str, Any] = {"stage": section.get("zero_stage", 2)}
        for part in ("optimizer", "param"):
            device = str(section.get(f"offload_{part}_device") or "none").lower()
            path = section.get(f"offload_{part}_nvme_path") if device == "nvme" else None
            zero[f"offload_{part}"] = {"device": device, "nvme_path": path}
        zero["stage3_gather_16bit_weights_on_model_save"] = bool(section.get("zero3_save_16bit_model"))
        enabled: dict[str, Any] = {"bf16": "auto", "fp16": "auto"}
        if precision is not None:
            enabled = {name: name == precision for name in enabled}
        steps = section.get("gradient_accumulation_steps")
        return {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto" if steps is None else steps,
            "zero_optimization": zero,
            **{name: {"enabled": value} for name, value in enabled.items()},
        }

    def _referenced(self, section: Section, named: str) -> EngineConfig:
        beside = [name for name in _BESIDE_A_FILE if name in section.raw]
        if self.top.get("mixed_precision") is not None:
            beside.append("mixed_precision")
        if beside:
            raise SpecError(
                f"{section.name('deepspeed_config_file')}: {named!r} stands beside {', '.join(beside)}, which "
                "accelerate refuses. Say it in the DeepSpeed file, and leave it out here."
            )
        path = Path(named)
        if not is_there(path) and self.folder is not None and is_there(self.folder / path):
            path = self.folder / path
            self.notes.append(f"{named} is read beside {self.source}; accelerate looks in the folder it is started in")
        if self.folder is not None:
            refuse_outside(path, self.folder, section.name("deepspeed_config_file"))
        data, _ = read_mapping(path)
        if "gradient_accumulation_steps" not in data:
            data = {**data, "gradient_accumulation_steps": 1}
        return parse_deepspeed(data, str(path), trainer=True, findings=self.findings)

    # -- FSDP ----------------------------------------------------------------------------------------------------------

    def _fsdp(self) -> dict[str, Any]:
        """What FullyShardedDataParallelPlugin makes of the environment, with the launcher's defaults."""
        keys = self._optional("fsdp_config")
        version = keys.get("fsdp_version", 1)
        if version not in (1, 2):
            raise keys.wrong("fsdp_version", "is not a version of FSDP", "Use 1 or 2.")
        if keys.get("fsdp_activation_checkpointing_offload"):
            self._check_checkpointing_offload(keys, version)
        keys.refuse_unmodelled()
        if keys.get("fsdp_cpu_ram_efficient_loading", True) and not keys.get("fsdp_sync_module_states", True):
            remedy = "Set fsdp_sync_module_states to true, or fsdp_cpu_ram_efficient_loading to false."
            raise keys.wrong(
                "fsdp_sync_module_states", "is refused by accelerate with fsdp_cpu_ram_efficient_loading", remedy
            )
        wrap = self._choice(keys, "fsdp_auto_wrap_policy", _WRAPS, "NO_WRAP")
        fsdp: dict[str, Any] = {
            "version": version,
            "auto_wrap_policy": wrap,
            "activation_checkpointing": keys.get("fsdp_activation_checkpointing", False),
            "cpu_ram_efficient_loading": keys.get("fsdp_cpu_ram_efficient_loading", True),
            "state_dict_type": self._state_dict(keys, version),
        }
        if wrap == "TRANSFORMER_BASED_WRAP" and keys.get("fsdp_transformer_layer_cls_to_wrap"):
            fsdp["transformer_layer_cls_to_wrap"] = keys.get("fsdp_transformer_layer_cls_to_wrap")
        if wrap == "SIZE_BASED_WRAP":
            fsdp["min_num_params"] = keys.get("fsdp_min_num_params", 10**8)
        if version == 2:
            fsdp["reshard_after_forward"] = self._reshard(keys)
        else:
            fsdp |= {
                "sharding_strategy": self._sharding(keys),
                "backward_prefetch": self._choice(keys, "fsdp_backward_prefetch", _PREFETCH, "NO_PREFETCH"),
                "forward_prefetch": keys.get("fsdp_forward_prefetch", False),
                "use_orig_params": keys.get("fsdp_use_orig_params", True),
                "sync_module_states": keys.get("fsdp_sync_module_states", True),
            }
        if self.top.get("parallelism_config"):
            fsdp |= self._hybrid(keys, version)
        offload = "cpu" if keys.get("fsdp_offload_params", False) else "none"
        return {"offload_param": offload, "fsdp": fsdp}

    def _sizes(self) -> tuple[int, int]:
        """ParallelismConfig's groups that have all shards each, and the ranks of such a group."""
        section = self._optional("parallelism_config")
        replicas, shards = (section.get(f"parallelism_config_dp_{name}_size") for name in ("replicate", "shard"))
        return replicas or 1, shards or 1

    def _hybrid(self, keys: Section, version: int) -> dict[str, Any]:
        """A section ``parallelism_config``, whatever it says, has accelerate count the ranks that it names."""
        if self.top.get("num_processes", -1) == 1:
            return {}
        if version == 1:
            remedy = "Leave parallelism_config out, or use version 2."
            raise keys.wrong("fsdp_version", "is refused by accelerate with a parallelism_config", remedy)
        replicas, shards = self._sizes()
        return {"dp_replicate_size": replicas, "dp_shard_size": shards}

    def _check_checkpointing_offload(self, keys: Section, version: int) -> None:
        name = "fsdp_activation_checkpointing_offload"
        if not keys.get("fsdp_activation_checkpointing") or version != 2:
            remedy = "Leave it out, or set fsdp_activation_checkpointing and fsdp_version 2."
            raise keys.wrong(name, "needs fsdp_activation_checkpointing and fsdp_version 2", remedy)

    def _reshard(self, keys: Section) -> bool:
        name = "fsdp_reshard_after_forward"
        truth = {"true": True, "false": False, "1": True, "0": False}.get(str(keys.get(name, True)).lower())
        if truth is None:  # str_to_bool: "invalid truth value"
            raise keys.wrong(name, "is refused by accelerate in FSDP2", "Use true or false.")
        return truth

    def _sharding(self, keys: Section) -> str:
        if "fsdp_reshard_after_forward" in keys.raw and "fsdp_sharding_strategy" not in keys.raw:
            self.notes.append(
                "fsdp_reshard_after_forward has no effect in FSDP1 under accelerate launch, which sets "
                "fsdp_sharding_strategy to FULL_SHARD"
            )
        return self._choice(keys, "fsdp_sharding_strategy", _SHARDING, "FULL_SHARD")

    def _state_dict(self, keys: Section, version: int) -> str:
        default = "FULL_STATE_DICT" if version == 1 else "SHARDED_STATE_DICT"
        name = "fsdp_state_dict_type"
        kind = self._choice(keys, name, _STATE_DICTS, default)
        if kind == "LOCAL_STATE_DICT":
            if version == 2:
                raise keys.wrong(name, "is refused by accelerate in FSDP2", "Use SHARDED_STATE_DICT.")
            raise UnsupportedError(f"{keys.name(name)}: 'LOCAL_STATE_DICT' is not modelled. Use SHARDED_STATE_DICT.")
        return kind

    def _choice(self, keys: Section, name: str, choices: tuple[str, ...], default: str) -> str:
        """A name in any case, or its number from 1 on."""
        value = keys.get(name)
        if value is None:
            return default
        text = str(value).upper()
        if text.isdigit() and 1 <= int(text) <= len(choices):
            return choices[int(text) - 1]
        if text not in choices:
            raise keys.wrong(name, "is refused by accelerate", f"Use {', '.join(choices)}.")
        return text

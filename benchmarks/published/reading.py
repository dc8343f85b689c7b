"""What the words of a row of published measurements mean, column by column. No setup is made here.

Each reader takes the text of a column. It returns what memplan calls that, or raises :class:`RefusedError` with the
column, the text and why it says too little or something memplan does not model. What a reader had to take for granted
goes on the list ``notes`` that it is handed, so that nothing is guessed in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn


class RefusedError(Exception):
    """A row that becomes no setup. ``kind`` is ``scope``, ``not stated`` or ``not known``."""

    def __init__(self, column: str, value: str, why: str, kind: str = "scope") -> None:
        shown = value if len(value) <= 60 else value[:57] + "..."
        super().__init__(f"{column}: {shown!r} {why}" if value else f"{column}: {why}")
        self.kind = kind


def not_stated(column: str, value: str, why: str = "is not stated") -> NoReturn:
    """Refuse a row that says too little."""
    raise RefusedError(column, value, why, "not stated")


Notes = list[str]
BLANK = frozenset({"", "-", "?", "n/a", "na", "nan", "null", "tbd", "todo", "unknown", "not stated", "unspecified"})
_PARENTHESIS = re.compile(r"\([^()]*\)")


def plain(text: str) -> str:
    """A cell without what stands in parentheses, in lower case, with single spaces.

    >>> plain(" AdamW  (fp32 states)")
    'adamw'
    """
    while (shorter := _PARENTHESIS.sub(" ", text)) != text:
        text = shorter
    return " ".join(text.lower().split())


def in_parentheses(text: str) -> str:
    """What :func:`plain` leaves out.

    >>> in_parentheses("8 (script default)")
    'script default'
    """
    return " ".join(re.findall(r"\(([^()]*)\)", text))


_HEDGES = (
    r"assumed", r"probabl[ey]", r"likely", r"(?:\w+ )?defaults?", r"not stated", r"inferred", r"about",
    r"approximately", r"[~≈]", r"script", r"config",
)  # fmt: skip
"""What hedged() notes, and where from."""
_MARKS = re.compile(r"[\s,;:()\[\]+/.=_*'\"|-]+")


def complete(column: str, text: str, *forms: str, whole: str = "") -> None:
    """Refuse a cell of which something is left when its known forms are taken away, each as often as it comes.

    A reader finds what it looks for wherever that stands. A word that it does not know may turn the meaning round, as
    ``not``, ``without`` and ``or`` do, or say more than a setup has; so nothing may be left. ``whole`` is the cell,
    if the text is a part of it.

    >>> complete("optimizer", "AdamW (default)", "adamw")
    >>> complete("optimizer", "AdamW (not fused)", "adamw", "fused")
    Traceback (most recent call last):
    reading.RefusedError: optimizer: 'AdamW (not fused)' says what the adapter does not know: 'not'
    """
    low = " ".join(text.lower().split())
    known = [re.compile(rf"(?:{form})(?![a-z0-9])") for form in (*forms, *_HEDGES)]
    place, left = 0, []
    while place < len(low):
        if mark := _MARKS.match(low, place):
            place = mark.end()
            continue
        end = max((found.end() for form in known if (found := form.match(low, place))), default=place)
        if end == place:
            word = re.compile(r"[a-z0-9]+|.").match(low, place)
            assert word is not None
            left.append(word[0])
            end = word.end()
        place = end
    if left:
        not_stated(column, whole or text, f"says what the adapter does not know: {' '.join(left)!r}")


def hedged(column: str, text: str, notes: Notes) -> None:
    """Note a value that the row itself calls assumed."""
    if re.search(r"assumed|probabl|likely|default|not stated|inferred|~|≈|about", text.lower()):
        notes.append(f"{column}: {text!r} is the source's default, or taken for granted in the row")


# -- metrics ----------------------------------------------------------------------------------------------------------

METRICS = {
    "allocated": "torch.cuda.max_memory_allocated",
    "allocated, probably": "the same, inferred by whoever collected the row",
    "reserved": "torch.cuda.max_memory_reserved",
    "reserved, probably": "the same, inferred by whoever collected the row",
    "device": "what nvidia-smi or NVML shows as used",
    "not stated": "compared with what nvidia-smi shows",
    "OOM": "the run died of memory",
    "fits": "the run went through",
}
"""Metrics of rows, which are never mixed."""


def metric(text: str) -> str:
    """One of :data:`METRICS`.

    >>> metric("max_allocated (Peak Memory Active)"), metric("nvidia-smi"), metric("OOM"), metric('unknown (unit "G")')
    ('allocated', 'device', 'OOM', 'not stated')
    """
    low = " ".join(text.lower().split())
    if re.fullmatch(_DIED, low):
        return "OOM"
    if re.fullmatch(_WENT_THROUGH, low):
        return "fits"
    if low in BLANK or low.startswith("unknown"):
        return "not stated"
    complete("metric", text, *_METRIC_FORMS)
    head = plain(low).replace("-", " ").replace("_", " ")
    kinds = {
        "reserved": re.search(r"\breserved?\b|\bcached\b", head),
        "allocated": re.search(r"\balloc(ated)?\b|\bactive\b", head),
        "device": re.search(r"nvidia smi|\bnvml\b|\bdevice\b|pynvml|\bgpustat\b|memory[ .]used|\bprocess\b", head),
    }
    found = [kind for kind, match in kinds.items() if match]
    if len(found) != 1:
        return "not stated"
    if "device" not in found and re.search(r"probabl|inferred|assumed|likely|not stated", low):
        return f"{found[0]}, probably"
    return found[0]


_DIED = (
    r"(?:cuda|gpu|torch)? ?(?:oom|out[ -]of[ -]memory|outofmemoryerror)(?: error)?"
    r"|(?:died|ran|runs?) (?:of|out of) memory"
)
_WENT_THROUGH = (
    r"(?:it )?fits?(?: \((?:max(?:imum)? batch(?: before oom)?|bs \d+ fits, bs \d+ oom)\))?"
    r"|max(?:imum)? batch"
)
_METRIC_FORMS = (
    r"(?:max_)?reserved or active", r'script prints b2mb\(max\) mib; table says gb', r"screenshot; gb/gib ambiguous",
    r"memory viz", r'unit "?g(?:i?b)?"?', r"peak memory active", r"nvidia[- ]smi", r"(?:py)?nvml", r"gpustat",
    r"memory[ ._]used", r"torch\.cuda", r"torch", r"cuda", r"max(?:imum)?", r"peak", r"gpu", r"mem(?:ory)?", r"vram",
    r"max_memory_(?:allocated|reserved|cached)", r"alloc(?:ated)?", r"max_(?:allocated|reserved)", r"reserved?",
    r"cached", r"active", r"device", r"process", r"used", r"in use", r"usage", r"total", r"gi?b", r"mi?b", r"bytes",
    r"of (?:the )?(?:gpu|process)",
)  # fmt: skip


UNIT_G = {"GiB": 1.0, "10^9 bytes": 1000**3 / 1024**3, "1000 MiB": 1000 / 1024}
"""What the unit G, with no word on what it is, may be, in GiB. The first is what the column is documented to hold."""


def unit_is_open(metric_text: str) -> bool:
    """Whether the row says G and not what that is.

    >>> unit_is_open('unknown (unit "G")'), unit_is_open("max_allocated")
    (True, False)
    """
    return 'unit "g"' in metric_text.lower()


def measured(text: str) -> float | None:
    """GiB of one GPU; None if nothing is there. A bare number is GiB, as the column is documented.

    >>> measured("10.5"), measured("10 GB"), measured(""), measured("1024 MiB")
    (10.5, 9.313225746154785, None, 1.0)
    """
    if plain(text) in BLANK:
        return None
    found = re.fullmatch(r"\s*[~≈]?\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmgt]i?b?|b(?:ytes)?)?\s*", text.lower())
    if found is None:
        not_stated("measured_GiB", text, "is not one number of bytes")
    scales = {"k": 1, "m": 2, "g": 3, "t": 4}
    unit = found[2] or "gib"
    power = scales.get(unit[0], 0)
    scale = 1024**power if unit[1:2] == "i" else 1000**power
    value = float(found[1]) * scale / 1024**3
    if not 0 < value < 1e6:
        not_stated("measured_GiB", text, "is no memory that a GPU has")
    return value


# -- numbers ----------------------------------------------------------------------------------------------------------

LONGEST = 10**7
_COUNT_NOTES = (
    r"one node", r"\d+ nodes?", r"per (?:gpu|device)", r"of that time", r"batch_size_training", r"toml",
    r"issue 8771 command; not in blog text", r"page prints --block_size 12", r"concatdataset", r"tokens",
)  # fmt: skip
"""What may stand in parentheses behind a number."""
_COUNT = re.compile(r"(\d+(?:[ ,_]\d{3})*|\d+(?:\.\d+)?)\s*(k)?")


def count(column: str, text: str, notes: Notes, default: int | None = None) -> int:
    """A positive whole number: ``4``, ``4,096``, ``4k``, ``8 (script default)``.

    >>> count("seq_len", "4k", []), count("micro_batch", "8 (script default)", [])
    (4096, 8)
    """
    low = re.sub(r"\b(micro[-_ ]?)?(batch([-_ ]size)?|bs)\b[ =:]*|\bper[-_ ](gpu|device)\b", "", plain(text))
    low = low.strip().removeprefix("~").strip()
    if low in BLANK:
        if default is None:
            not_stated(column, text)
        if text.strip() not in ("", "-"):
            not_stated(column, text)
        notes.append(f"{column}: is not stated, {default} taken")
        return default
    complete(column, in_parentheses(text), *_COUNT_NOTES, whole=text)
    found = _COUNT.fullmatch(low.removesuffix("tokens").removesuffix("gpus").removesuffix("x").strip())
    if found is None:
        not_stated(column, text, "is not one whole number")
    hedged(column, text, notes)
    value = float(re.sub(r"[ ,_]", "", found[1])) * (1024 if found[2] else 1)
    if value != int(value) or not 1 <= value <= LONGEST:
        not_stated(column, text, "is not a positive whole number")
    return int(value)


def nodes(text: str) -> int | None:
    """How many nodes the GPUs are said to be in; None where nothing is said.

    >>> nodes("16 (4 nodes)"), nodes("8 (one node)"), nodes("8")
    (4, 1, None)
    """
    found = re.search(r"\b(one|\d+) nodes?\b", in_parentheses(text.lower()))
    return None if found is None else 1 if found[1] == "one" else int(found[1]) or not_stated("n_gpus", text)


_GENERATED = (
    re.compile(
        r"~?(\d+)\s*(?:token|prompt|input|in\b)[a-z ]*\s*(?:\+|,|/|and|->)\s*"
        r"~?(\d+)\s*(?:new|gen|output|out\b|decod|token)"
    ),
    re.compile(r"~?(\d+)\s*\+\s*~?(\d+)"),
    re.compile(r"(?:prompt|input|in)[^\d]{0,12}(\d+)[^\d]+(?:new|gen\w*|output|out)[^\d]{0,12}(\d+)"),
)  # fmt: skip


def prompt_and_new(text: str, notes: Notes) -> tuple[int, int]:
    """Tokens of the prompt and tokens generated.

    >>> prompt_and_new("6144 prompt + 2048 generated", []), prompt_and_new("~25 prompt + 60 new tokens", [])
    ((6144, 2048), (25, 60))
    """
    low = plain(text).replace(",", "")
    for pattern in _GENERATED:
        if found := pattern.match(low):
            hedged("seq_len", text, notes)
            prompt, new = int(found[1]), int(found[2])
            if prompt and new and max(prompt, new) <= LONGEST:
                return prompt, new
    not_stated("seq_len", text, "does not state the prompt and what is generated")


def length(text: str, notes: Notes) -> int:
    """Tokens of a sequence in training: a number, an upper limit, ``chunks of N``, ``A source/B target``.

    >>> length("<=768", []), length("128 source/128 target", []), length("8K", [])
    (768, 128, 8192)
    """
    low = plain(text).replace("tokens", "").strip()
    low = re.sub(r"^(fixed|exactly|seq(uence)?|len(gth)?|max)\b[ :=_]*(len(gth)?)?", "", low).strip()
    if found := re.fullmatch(r"(?:<=?|≤|up to|at most)\s*(\d[\d,]*k?)", low):
        notes.append(f"seq_len: {text!r} is a limit, taken for the longest batch")
        return count("seq_len", found[1], notes)
    if found := re.search(r"\bchunks of (\d+)\b", low):
        return count("seq_len", found[1], notes)
    if found := re.fullmatch(r"(\d+) source ?/ ?(\d+) target", low):
        if found[1] != found[2]:
            raise RefusedError("seq_len", text, "has two lengths, and memplan's encoders and decoders share one")
        notes.append(f"seq_len: {text!r} is a limit, taken for the longest batch")
        return count("seq_len", found[1], notes)
    hedged("seq_len", text, notes)
    return count("seq_len", low, notes)


# -- precision --------------------------------------------------------------------------------------------------------

_TYPES = {
    "float32": r"\b(fp|float|f)[-_ ]?32\b|\bfull[- ]precision\b|\bsingle[- ]precision\b",
    "bfloat16": r"\bbf(loat)?[-_ ]?16\b|\bbrain[- ]?float",
    "float16": r"(?<!b)\b(fp|float|f)[-_ ]?16\b|\bhalf\b",
}
_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_OTHER_WEIGHTS = r"gptq|awq|aqlm|hqq|eetq|gguf|exl2|quanto|torchao|mxfp|nvfp|fp8|float8|int2|2[- ]?bit|3[- ]?bit"


def types_in(text: str) -> list[str]:
    """The float types that a text names."""
    return [name for name, pattern in _TYPES.items() if re.search(pattern, text.lower())]


@dataclass(frozen=True)
class Precision:
    """The types of a run."""

    dtype: str | None
    """None where the row leaves it to the library."""
    mixed: str
    quantization: str | None
    bf16_adapters: bool = False
    bf16_heads: bool = False
    """Embeddings and heads of a quantized model that was prepared."""


def precision(weights: str, mixed: str, method: str, infers: bool, double_quant: bool, notes: Notes) -> Precision:
    """What the columns weight_dtype and mixed_precision say, with the quantization that is part of the method.

    >>> precision("fp32 (sharded master), bf16 compute", "bf16", "full", False, False, [])
    Precision(dtype='float32', mixed='bf16', quantization=None, bf16_adapters=False, bf16_heads=False)
    """
    low = weights.lower()
    if found := re.search(_OTHER_WEIGHTS, f"{low} {mixed.lower()} {method.lower()}"):
        raise RefusedError("weight_dtype", f"{weights}, {mixed}", f"is {found[0]}, which memplan does not model")
    for column, text, forms in (("weight_dtype", weights, _WEIGHT_FORMS), ("mixed_precision", mixed, _MIXED_FORMS)):
        if plain(text) not in BLANK:
            complete(column, text, *_TYPE_FORMS, *forms)
    kind = _quantized(low, method.lower(), double_quant, notes)
    named = types_in(plain(weights).split(",")[0].split("+")[0])
    inside = types_in(low) if kind else []
    autocast = _mixed(mixed, infers)
    if re.search(r"\bamp\b", plain(weights)):
        if autocast == "no":
            raise RefusedError("mixed_precision", mixed, f"contradicts weights in {weights!r}", "not stated")
        return Precision("float32", _MIXED[named[0]] if named else autocast or "fp16", kind)
    if len(named) > 1:
        not_stated("weight_dtype", weights, "names several types")
    dtype = named[0] if named else None
    if dtype is None and kind is None:
        not_stated("weight_dtype", weights)
    if autocast is None:
        if infers or (dtype is not None and kind is None and dtype == "float32" and plain(mixed) in ("", "-")):
            autocast = "no"
        else:
            not_stated("mixed_precision", mixed)
    if kind and dtype is None:
        dtype = inside[0] if inside else next((t for t, m in _MIXED.items() if m == autocast and m != "no"), None)
    if kind and dtype is None:
        if not infers:
            not_stated("weight_dtype", weights, "does not state the type that is computed in")
        dtype = "float16"
        notes.append("weight_dtype: what is not quantized is float16, transformers' default for bitsandbytes then")
    if kind is None:
        _of_one_type(weights, mixed, dtype, autocast)
    adapters, heads = (bool(re.search(rf"\b{word}s? bf16\b|\bbf16 {word}s?\b", low)) for word in ("adapter", "head"))
    return Precision(dtype, autocast, kind, adapters, heads)


def _of_one_type(weights: str, mixed: str, dtype: str | None, autocast: str) -> None:
    """Refuse weights of which a second type is named that neither autocast, a master nor an adapter has."""
    computed = {name for name, word in _MIXED.items() if word == autocast != "no"}
    others = set(types_in(weights)) - {dtype} - computed
    if dtype != "float32" and re.search(r"\bmaster|\badapter", weights.lower()):
        others -= {"float32"}
    if others:
        not_stated("weight_dtype", weights, f"names several types, with {mixed or 'nothing'!r} as mixed precision")
    if autocast == "no" and re.search(r"\bpure\b", mixed.lower()) and set(types_in(mixed)) - {dtype}:
        not_stated("mixed_precision", mixed, f"contradicts weights in {weights!r}")


_TYPE_FORMS = (
    r"fp[-_ ]?32", r"float[-_ ]?32", r"f32", r"bf[-_ ]?16", r"bfloat[-_ ]?16", r"fp[-_ ]?16", r"float[-_ ]?16", r"f16",
    r"half(?:[- ]precision)?", r"(?:full|single)[- ]precision", r"brain[- ]?float(?:16)?", r"torch",
)  # fmt: skip
_WEIGHT_FORMS = (
    r"nf4", r"fp4", r"[48][-_ ]?bit", r"int[48]", r"llm\.int8(?:\(\))?", r"bnb", r"bitsandbytes", r"qlora", r"dq",
    r"amp", r"(?:no |without )?double[-_ ]quant(?:i[sz]ation)?", r"pure(?:[_ ]bf16)?", r"sharded master",
    r"(?:fp32 )?master(?: weights)?", r"compute", r"storage", r"adapters?", r"heads?", r"autocast_adapter_dtype",
    r"weights", r"on cpu", r"dtype", r"base", r"model",
)  # fmt: skip
_MIXED_FORMS = (
    r"none", r"no", r"false", r"off", r"n", r"pure", r"disabled", r"use_amp", r"amp", r"autocast", r"fsdp param",
    r"reduce", r"master(?: weights)?", r"mixed(?:[-_ ]precision)?", r"yes", r"true", r"precision", r"accelerate",
    r"trainer",
)  # fmt: skip


def _quantized(low: str, method: str, double_quant: bool, notes: Notes) -> str | None:
    text = f"{low} {method}"
    if re.search(r"\bfp4\b", text):
        notes.append("weight_dtype: FP4 has NF4's sizes")
    if re.search(r"\bnf4\b|\bfp4\b|\b4[-_ ]?bit\b|\bint4\b|\bqlora\b", text):
        if "int8" in low or re.search(r"\b8[-_ ]?bit\b", low):
            not_stated("weight_dtype", low, "names 4 and 8 bits")
        if re.search(r"\b(?:no|without) double[-_ ]quant", text):
            return "nf4"
        return "nf4-dq" if double_quant or re.search(r"\bdq\b|double[-_ ]quant", text) else "nf4"
    if re.search(r"\bint8\b|\b8[-_ ]?bit\b|llm\.int8", low) or re.search(
        r"int8 base|\b8[-_ ]?bit base|in 8[- ]?bit", method
    ):
        return "int8"
    return None


def _mixed(text: str, infers: bool) -> str | None:
    if infers:
        return "no"
    low = plain(text)
    if re.search(r"fp8|float8|mxfp|nvfp|int8", text.lower()):
        raise RefusedError("mixed_precision", text, "is not modelled")
    if low in BLANK:
        return None
    if re.match(r"(none|no|false|off|pure|disabled|n)\b", low):
        return "no"
    found = [_MIXED[name] for name in types_in(low)]
    if len(found) > 1:
        not_stated("mixed_precision", text, "names several types")
    if found:
        return found[0]
    if re.search(r"\bamp\b|\byes\b|\btrue\b|\bautocast\b|\bmixed\b", low):
        not_stated("mixed_precision", text, "does not state the type")
    not_stated("mixed_precision", text, "is not a word for a type")


# -- optimizer --------------------------------------------------------------------------------------------------------

_OPTIMIZERS: tuple[tuple[str, str], ...] = (
    (r"in[-_ ]bwd|in[-_ ]backward|lomo|galore|apollo|badam|fsdp.?optim", ""),
    (r"torchao|adamw?_torch_(4|8)bit|4[-_ ]?bit|fp8", ""),
    (r"paged.*lion.*8|8.*paged.*lion", "paged_lion_8bit"),
    (r"paged.*lion", "paged_lion_32bit"),
    (r"lion.*8[-_ ]?bit|8[-_ ]?bit.*lion", "lion_8bit"),
    (r"\blion", "lion_32bit"),
    (r"paged.*adam.*8|8.*paged.*adam", "paged_adamw_8bit"),
    (r"paged.*adam", "paged_adamw_32bit"),
    (r"adam.*8[-_ ]?bit|8[-_ ]?bit.*adam|(bnb|bitsandbytes).*adam", "adamw_bnb_8bit"),
    (r"apex|anyprecision|fused[-_ ]?adam\b|adamax|nadam|radam|adamod|lamb|sophia|shampoo|soap|adam-?mini", ""),
    (r"prodigy|ademamix|grokadam|schedule|stable|lora-?fa|xla|npu", ""),
    (r"adam\w*.*fused|fused.*adam", "adamw_torch_fused"),
    (r"foreach\s*=?\s*(false|off|no).*adam|(for[-_ ]?loop|single[-_ ]tensor).*adam", "adamw_torch_loop"),
    (r"adam\w*.*foreach\s*=?\s*(false|off|no)|adam\w*.*(for[-_ ]?loop|single[-_ ]tensor)|adamw_hf", "adamw_torch_loop"),
    (r"adam\w*.*foreach", "adamw_torch_foreach"),
    (r"\bada_?factor", "adafactor"),
    (r"\bada_?grad", "adagrad"),
    (r"\brms_?prop", "rmsprop"),
    (r"\bmuon", "muon"),
    (r"\bsgd\b.*(momentum|nesterov)", ""),
    (r"\bsgd\b|\badamw?(_torch)?\b|\b(deepspeed)?cpu_?adamw?\b", "plain"),
)  # fmt: skip


_OPTIMIZER_FORMS = (
    r"embedding stays 32-bit\? see issue 14819", r"foreach\s*=?\s*(?:false|off|no|true)?", r"fused\s*=?\s*(?:true)?",
    r"for[-_ ]?loop", r"single[-_ ]tensor", r"bnb", r"bitsandbytes", r"torch(?:\.optim)?", r"pytorch", r"hf",
    r"deepspeed", r"cpu", r"(?:paged[-_ ]?)?(?:deepspeed)?(?:cpu)?[-_ ]?(?:adamw?|lion)[-_ ]?(?:8|32)?(?:[-_ ]?bit)?",
    r"ada[-_]?factor", r"ada[-_]?grad", r"rms[-_]?prop", r"muon", r"sgd", r"paged", r"(?:8|32)[-_ ]?bit", r"optimizer",
    r"trainer", r"transformers", r"states? in (?:the )?weights' type",
)  # fmt: skip


def optimizer(text: str, notes: Notes) -> str:
    """One of memplan's optimizers; AdamW without more is torch's, foreach on a GPU.

    >>> optimizer("adamw_torch (HF default, foreach)", []), optimizer("bnb PagedAdamW8bit", [])
    ('adamw_torch', 'paged_adamw_8bit')
    """
    low = plain(text)
    if low in BLANK or low.startswith(("unknown", "not stated", "optimizer per", "default")):
        not_stated("optimizer", text)
    if "/" in low:
        not_stated("optimizer", text, "names several")
    whole = " ".join(text.lower().split())
    for pattern, name in _OPTIMIZERS:
        # What stands in parentheses may decide, but for foreach, which is AdamW's default on a GPU.
        if re.search(pattern, low if name == "adamw_torch_foreach" else whole):
            if not name:
                raise RefusedError("optimizer", text, "is not modelled")
            complete("optimizer", text, *_OPTIMIZER_FORMS)
            return ("sgd" if "sgd" in low else "adamw_torch") if name == "plain" else name
    raise RefusedError("optimizer", text, "is not an optimizer memplan knows", "not stated")


# -- method -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How the weights are trained."""

    kind: str
    """full, lora or inference."""
    rank: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    saved: tuple[str, ...] = ()


_OTHER_METHODS = (
    r"\+?dora|ada[-_ ]?lora|lo[-_]?ha|lo[-_]?kr|\bia3|\(ia\)|\bvera\b|\bboft|\boft\b|\bqoft|prefix"
    r"|prompt[-_ ]tuning|p[-_]tuning|ln_tuning|shira|\bosf\b|trainable_tokens|adapter(?!s)|bitfit|freeze"
    r"|\bppo\b|\bdpo\b|\bgrpo\b|rlhf|\bkto\b"
    r"|\borpo\b|reward|distil(?!bert|gpt)|x-?lora|longlora|llama-?pro|lora[-_+ ]?fa|galore|quantize_moe"
)
_FULL_FORMS = (
    r"full(?:[-_ ](?:parameters?|weights?|model))?", r"fft", r"(?:supervised )?(?:fine-?)tun(?:e|ing)", r"finetuned?",
    r"sft", r"pre-?train(?:ing)?", r"from scratch", r"continued", r"training", r"all (?:parameters|weights)", r"bf16",
    r"fp32",
)  # fmt: skip
_LORA_FORMS = (
    r"(?:rs[-_]?|o|pissa[-_]?)?q?lora", r"pissa", r"olora", r"nf4", r"fp4", r"int8", r"[48][-_ ]?bit", r"dq",
    r"bf16 storage", r"gptq int4", r"(?:r|rank)\s*[=:]?\s*\d{1,5}", r"(?:lora_)?alpha\s*[=:]?\s*\d+(?:\.\d+)?",
    r"drop(?:out)?\s*[=:]?\s*(?:0?\.\d+|0|1)", r"(?:on )?all[-_ ]linear(?: layers)?", r"recipes", r"weights after init",
    r"lora (?:base|chat)", r"base", r"in", r"on", r"targets?", r"target_modules", r"(?:fine-?)tun(?:e|ing)",
    r"adapters?",
)  # fmt: skip
_SHORT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")


def method(text: str, task: str, framework: str, notes: Notes) -> Method:
    """How weights are trained: in full, or LoRA with its rank, targets, dropout and modules to save.

    >>> method("lora r8 alpha16 drop0.1 targets=q+v", "train", "", [])
    Method(kind='lora', rank=8, targets=('q_proj', 'v_proj'), dropout=0.1, saved=())
    """
    low = " ".join(text.lower().split())
    if task == "infer":
        if re.search(r"lora|cache (?!bf16|fp16|float16|bfloat16)", low):
            raise RefusedError("method", text, "is not modelled in generation")
        complete("method", text, r"inference", r"generation", r"decoding", r"kv cache (?:bf|fp|float|bfloat)16")
        return Method("inference")
    if low in BLANK:
        not_stated("method", text)
    if found := re.search(_OTHER_METHODS, low):
        raise RefusedError("method", text, f"is not LoRA or full fine-tuning ({found[0].strip('+ ')})")
    if found := re.search(r"\b(rs[-_]?|o|pissa[-_]?)?q?lora\b", low):
        if found[1] or re.search(r"pissa|olora|rs-?lora", low):
            notes.append("method: another scale or start of LoRA's, which changes no size")
        return _lora(text, low, notes)
    if re.search(r"\bfull\b|\bfft\b|\bsft\b|pre-?train|\bfrom scratch\b|full[-_ ]fine|^fine-?tun|continued", low):
        complete("method", text, *_FULL_FORMS)
        return Method("full")
    raise RefusedError("method", text, "is not a word memplan knows for a method", "not stated")


def _lora(text: str, low: str, notes: Notes) -> Method:
    if re.search(r"\blm linear\b", low):
        raise RefusedError("method", text, "adapts the language model of a model with more parts")
    rank = re.search(r"\b(?:r|rank)\s*[=:]?\s*(\d{1,5})\b(?![.-]\d)", low)
    if rank is None or int(rank[1]) < 1:
        not_stated("method", text, "does not state the rank")
    if re.search(r"\bno experts\b|experts not", low):
        raise RefusedError("method", text, "leaves experts out, which memplan's targets cannot")
    dropout = re.search(r"\bdrop(?:out)?\s*[=:]?\s*(0?\.\d+|0|1)\b", low)
    named = re.search(
        r"(?:targets?|target_modules)\s*[=:]?\s*\[?([\w.,+/\- ']+?)\]?"
        r"(?=\s*(?:[()]|$|\+ ?modules|\bmodules_to|\balpha|\bdrop|;))",
        low,
    )
    saved = re.search(r"modules_to_save\s*[=:]?\s*([\w.]+(?:\s*[,+/]\s*[\w.]+)*)", low)
    if named is None and re.search(r"\btargets?\b|target_modules", low) and not re.search(r"all[-_ ]linear", low):
        not_stated("method", text, "does not state the targets in words")
    rest = low
    for found in sorted((found for found in (named, saved) if found), key=lambda found: -found.start()):
        rest = rest[: found.start()] + " " + rest[found.end() :]
    complete("method", rest, *_LORA_FORMS, whole=text)
    targets: tuple[str, ...] = ()
    if re.search(r"all[-_ ]linear", low):
        targets = ("all-linear",)
    elif named:
        words = [word for word in re.split(r"[,+/\s']+", named[1]) if word]
        targets = tuple(dict.fromkeys(name for word in words for name in _target(word)))
    else:
        notes.append("method: targets are not stated, PEFT's for the model taken")
    modules = tuple(word for word in re.split(r"[,+/\s]+", saved[1]) if word) if saved else ()
    return Method("lora", int(rank[1]), targets, float(dropout[1]) if dropout else 0.0, modules)


def _target(word: str) -> tuple[str, ...]:
    if word in ("mlp", "ffn"):
        return _MLP
    if word in ("attn", "attention", "qkvo"):
        return ("q_proj", "k_proj", "v_proj", "o_proj")
    if word == "qkv":
        return ("q_proj", "k_proj", "v_proj")
    return (_SHORT.get(word, "down_proj" if word == "down" else word),)


# -- engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """How a run is spread."""

    kind: str
    version: int = 0
    sharding: str = ""
    prefetch: str = "NO_PREFETCH"
    reshard: bool = True
    cpu_ram_efficient_loading: bool = False
    """As a cell says it; of most the framework's config has to tell."""
    zero: tuple[tuple[str, int | bool], ...] = ()
    """Keys of ``zero_optimization`` that the cell states."""


_OTHER_ENGINES = (
    r"\btp\b|\btp ?\d|\bpp ?\d|\bpp\b|\bcp ?\d|\bep ?\d|(tensor|context|sequence|expert)[- ]par|pipeline"
    r"|simplefsdp|fairscale|sharded_ddp|megatron|colossal|ulysses|\bsp ?\d|mics\b|fsdp ?\d+ ?x|zero\+\+|horovod"
    r"|device_map"
)


def engine(text: str, gpus: int, framework: str, notes: Notes) -> Engine:
    """What the column zero_stage_or_fsdp says, for that number of GPUs.

    >>> engine("DeepSpeed ZeRO-2 (script default)", 4, "HF Trainer", []).kind, engine("none", 1, "", []).kind
    ('zero2', 'single')
    >>> engine("DeepSpeed ZeRO-2 (reduce_bucket_size=1e9, overlap_comm=true)", 8, "HF Trainer", []).zero
    (('reduce_bucket_size', 1000000000), ('overlap_comm', True))
    """
    low = " ".join(text.lower().split())
    if found := re.search(_OTHER_ENGINES, low):
        raise RefusedError("zero_stage_or_fsdp", text, f"is not modelled ({found[0]})")
    bare = plain(text)
    if "/" in bare and "zero" in bare:
        not_stated("zero_stage_or_fsdp", text, "names several")
    if found := re.search(r"(?:\bzero|deepspeed|\bstage|\bz)[-_ ]*(?:stage|zero)?[-_ =:]*([0-3])\b(?!\.\d)", bare):
        _engine_is_complete(text, gpus, _ZERO_FORMS)
        hedged("zero_stage_or_fsdp", text, notes)
        return Engine(f"zero{found[1]}", zero=_zero_keys(text))
    if "infinity" in bare:
        _engine_is_complete(text, gpus, (*_ZERO_FORMS, r"(?:zero[- ]?)?infinity"))
        return Engine("zero3")
    if "zero" in bare or "deepspeed" in bare:
        not_stated("zero_stage_or_fsdp", text, "does not state the stage")
    if re.search(r"fsdp|fully_?shard|\b(full|hybrid)_shard|shard_grad_op", bare):
        found_engine = _fsdp(text, low)
        _engine_is_complete(text, gpus, _FSDP_FORMS)
        return found_engine
    if "ddp" in bare or "dataparallel" in bare.replace(" ", "") or re.fullmatch(r"dp ?\d*", bare):
        if "dataparallel" in bare.replace(" ", "") and "distributed" not in bare:
            raise RefusedError("zero_stage_or_fsdp", text, "is not modelled")
        forms = (r"(?:torch )?ddp", r"distributed ?data ?parallel", r"dp ?\d*", r"fp(?:32|16)", r"bf16")
        _engine_is_complete(text, gpus, forms)
        return Engine("ddp" if gpus > 1 else "single")
    if bare in BLANK or bare in ("none", "no", "single", "single gpu", "single-gpu", "plain", "1 gpu"):
        if gpus > 1:
            not_stated("zero_stage_or_fsdp", text, f"does not state how {gpus} GPUs share the run")
        return Engine("single")
    raise RefusedError("zero_stage_or_fsdp", text, "is not an engine memplan knows", "not stated")


_ZERO_FORMS = (
    # The stage is named once: of two, one is left.
    r"deepspeed", r"for qlora", r"finetune_lora_ds\.sh", r"fp(?:32|16)", r"bf16", r"cpu offload",
    r"zero_?(?:optimization)?", r"(?:reduce|allgather)_bucket_size=\d+(?:e\d+)?", r"overlap_comm=(?:true|false)",
)  # fmt: skip
_FSDP_FORMS = (
    r"(?:pytorch )?fsdp[-_ ]?v?[12]?", r"v[12]", r"fully_?shard", r"(?:full|hybrid)[-_ ]shard(?:[-_ ]zero2)?",
    r"shard[-_ ]grad[-_ ]op", r"no[-_ ]shard", r"backward[-_ ](?:pre|post)", r"no[-_ ]prefetch",
    r"(?:transformer|decoder|block|auto)[-_ ]wrap(?:ping)?", r"limit_all_gathers\s*=?\s*true", r"logits not kept",
    r"reshard(?:_after_forward)?[ =:]*(?:never|always|false|true|no)?", r"zero-2 like", r"(?:each|per) (?:block|layer)",
    r"cpu[-_ ]ram[-_ ]efficient[-_ ]loading(?: ?= ?true)?",
)  # fmt: skip


def _zero_keys(text: str) -> tuple[tuple[str, int | bool], ...]:
    low = text.lower()
    sizes = re.findall(r"\b((?:reduce|allgather)_bucket_size)=(\d+(?:e\d+)?)", low)
    switches = re.findall(r"\b(overlap_comm)=(true|false)", low)
    return (*((name, int(float(size))) for name, size in sizes), *((name, said == "true") for name, said in switches))


def _engine_is_complete(text: str, gpus: int, forms: tuple[str, ...]) -> None:
    low = " ".join(text.lower().split())
    if forms[: len(_ZERO_FORMS)] == _ZERO_FORMS:
        low = re.sub(r"(?:\bzero|deepspeed|\bstage|\bz)[-_ ]*(?:stage|zero)?[-_ =:]*[0-3]\b(?!\.\d)", " ", low, count=1)
    for ranks in re.findall(r"\b(?:n=|dp ?)(\d+)\b", low):
        if int(ranks) != gpus:
            not_stated("zero_stage_or_fsdp", text, f"says {ranks} ranks, of {gpus} GPUs")
    complete("zero_stage_or_fsdp", low, r"n=\d+", r"dp ?\d+", *forms, whole=text)


def _fsdp(text: str, low: str) -> Engine:
    version = (
        2 if re.search(r"fsdp[-_ (]*v?2\b|fully_shard\b", low) else 1 if re.search(r"fsdp[-_ (]*v?1\b", low) else 0
    )
    for name in ("HYBRID_SHARD_ZERO2", "HYBRID_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        if name.lower() in low.replace("-", "_").replace(" ", "_"):
            version = 1
            break
    else:
        name = "FULL_SHARD" if version == 1 else ""
    if re.search(r"limit_all_gathers\s*=?\s*false", low):
        raise RefusedError("zero_stage_or_fsdp", text, "lets the CPU run ahead, whose gathers memplan does not count")
    if re.search(r"\bhsdp\b|hybrid", low) and "HYBRID" not in name:
        not_stated("zero_stage_or_fsdp", text, "does not state the groups")
    prefetch = next((p for p in ("BACKWARD_PRE", "BACKWARD_POST") if p.lower() in low), "NO_PREFETCH")
    reshard = not re.search(r"reshard(_after_forward)?[ =:]*(never|false|no\b)", low)
    loading = "cpu_ram_efficient_loading" in low.replace("-", "_").replace(" ", "_")
    return Engine("fsdp", version, name, prefetch, reshard, loading)


_OFFLOAD_FORMS = (
    r"optim(?:izer)?", r"adam", r"param(?:eter)?s?", r"weights?", r"model", r"states?", r"grad(?:ient)?s?", r"to",
    r"on", r"and", r"in", r"cpu", r"host", r"ram", r"memory", r"nvme", r"disk", r"ssd", r"offload(?:ing|ed)?", r"fsdp",
    r"deepspeed", r"zero[- ]offload",
)  # fmt: skip


def offload(text: str, kind: str, notes: Notes) -> tuple[str, str]:
    """Where the optimizer and the parameters live: none, cpu or nvme each.

    >>> offload("optimizer + params to CPU", "zero3", []), offload("none", "single", [])
    (('cpu', 'cpu'), ('none', 'none'))
    """
    low = plain(text)
    if low in BLANK or low in ("none", "no", "n", "false", "off", "paged optimizer"):
        return "none", "none"
    low = " ".join(text.lower().split())
    if "activation" in low:
        raise RefusedError("offload", text, "moves activations, which is not modelled")
    if re.search(r"\bor\b|/", low):
        not_stated("offload", text, "names several")
    words = {"nvme": r"nvme|disk|ssd", "cpu": r"\bcpu\b|\bhost\b|\bram\b"}
    places = [place for place, pattern in words.items() if re.search(pattern, low)]
    complete("offload", text, *_OFFLOAD_FORMS)
    if len(places) > 1:
        not_stated("offload", text, "names several places")
    where = places[0] if places else ""
    states, weights = bool(re.search(r"optim|adam", low)), bool(re.search(r"param|weight|model", low))
    if kind == "fsdp" and where == "cpu":
        return "none", "cpu"
    if not where or kind in ("single", "ddp", "zero0"):
        raise RefusedError("offload", text, f"is not modelled under {kind}")
    if not states and not weights:
        if kind in ("zero1", "zero2"):
            return where, "none"
        not_stated("offload", text, "does not state what is moved")
    return (where if states else "none"), (where if weights else "none")


# -- switches ---------------------------------------------------------------------------------------------------------

_YES, _NO = r"(y|yes|true|on|full|block|every|all|enabled|1)\b", r"(n|no|none|false|off|disabled|0)\b"


_CHECKPOINTING_FORMS = (
    r"scripts pass --gradient_checkpointing", r"(?:the )?(?:fsdp_)?(?:activation|gradient)[-_ ]checkpointing",
    r"blocks?", r"layers?", r"llama-factory default", r"config 7b_lora\.yaml: false", r"(?:non-?)?reentrant",
    r"use_reentrant[ =:]*(?:true|false)", r"transformers", r"recompute", r"each", r"every", r"of",
)  # fmt: skip


def checkpointing(text: str, notes: Notes) -> bool:
    """Whether every block is checkpointed.

    >>> checkpointing("full (assumed: scripts pass --gradient_checkpointing)", []), checkpointing("none", [])
    (True, False)
    """
    low = plain(text)
    if re.search(r"selective|\bsac\b|policy|per-op|partial|offload|unsloth|every \d|\d+ ?/ ?\d+", text.lower()):
        raise RefusedError("gradient_checkpointing", text, "is not modelled")
    for answer, words in ((True, _YES), (False, _NO)):
        if found := re.match(words, low):
            rest = f"{low[found.end() :]} {in_parentheses(text)}"
            complete("gradient_checkpointing", rest, *_CHECKPOINTING_FORMS, whole=text)
            hedged("gradient_checkpointing", text, notes)
            return answer
    not_stated("gradient_checkpointing", text)


def reentrant(text: str) -> bool | None:
    """``use_reentrant``, where a row's ``gradient_checkpointing`` says it.

    >>> reentrant("yes (non-reentrant)"), reentrant("yes (use_reentrant=true)"), reentrant("yes")
    (False, True, None)
    """
    low = text.lower()
    if "reentrant" not in low:
        return None
    return re.search(r"non-?reentrant|reentrant[ =:]*false", low) is None


_ATTENTION_FORMS = (
    r"flash[-_ ]?(?:attention|attn)?[-_ ]?v?2?", r"fa[-_ ]?2?", r"sdpa",
    r"scaled[-_ ]dot[-_ ]product(?:[-_ ]attention)?", r"eager", r"vanilla", r"naive", r"math", r"auto",
    r"attn_implementation null", r"flex when packed", r"attention", r"attn", r"torch", r"pytorch",
    r"kv-quant disables flash; baseline not stated", r"attn_implementation", r"transformers",
    *sorted(BLANK - {""} - {"-", "?"}), r"\?",
)  # fmt: skip


def attention(text: str, has_sdpa: bool, notes: Notes) -> str:
    """``attn_implementation``; where a row leaves it open, transformers' default: SDPA, but in versions that lack it.

    >>> attention("flash2", True, []), attention("sdpa/flash", True, []), attention("eager/sdpa", False, [])
    ('flash_attention_2', 'sdpa', 'eager')
    """
    low = plain(text)
    if re.search(
        r"flash[-_ ]?(attention|attn)?[-_ ]?v?(3|4)|fa[34]|flex|xformers|triton|te\b|transformer.?engine|ring", low
    ):
        raise RefusedError("attention", text, "is not modelled")
    words = {
        "flash_attention_2": re.search(r"flash|\bfa[-_ ]?2?\b", low),
        "sdpa": re.search(r"\bsdpa\b|scaled_dot", low),
        "eager": re.search(r"\beager\b|\bvanilla\b|\bnaive\b|\bmath\b", low),
    }
    found = [name for name, match in words.items() if match]
    complete("attention", text, *_ATTENTION_FORMS)
    aside = in_parentheses(text.lower())
    if "eager" not in found and re.search(r"\beager\b|\bvanilla\b|\bnaive\b|\bmath\b", aside):
        not_stated("attention", text, "names a kernel of its own beside")  # SDPA's, that keeps all scores
    if found == ["flash_attention_2"] and re.search(r"\bsdpa\b|scaled_dot", aside):
        found.append("sdpa")
    if found == ["flash_attention_2", "sdpa"]:
        return "sdpa"
    if len(found) == 1:
        hedged("attention", text, notes)
        return found[0]
    if not found and low not in BLANK and low not in ("default", "auto"):
        not_stated("attention", text, "is not a kernel memplan knows")
    default = "sdpa" if has_sdpa else "eager"
    notes.append(f"attention: {text or 'not stated'!r}: transformers' default of the time taken, {default}")
    return default


def compiled(text: str) -> None:
    """Refuse a compiled run."""
    low = plain(text)
    if low in BLANK or re.match(_NO, low):
        return
    if re.match(_YES, low):
        raise RefusedError("compile", text, "compiled kernels are not modelled")
    not_stated("compile", text)


_LOSS_FORMS = (
    r"y(?:es)?", r"n(?:o|one)?", r"true", r"false", r"on", r"off", r"liger(?:[-_ ]kernels?)?", r"fused", r"linear",
    r"ce", r"cross[- ]entropy", r"loss", r"disabled", r"enabled", r"use_liger(?:_kernel)?",
    *sorted(BLANK - {"", "-", "?"}), r"\?",
)  # fmt: skip


def fused_loss(text: str, *elsewhere: str) -> bool:
    """Whether Liger's kernels are on; other kernels for the loss are refused.

    >>> fused_loss("n"), fused_loss("y (liger)")
    (False, True)
    """
    low = " ".join(text.lower().split())
    if "liger" in low or any(re.search(r"\bliger\b", other.lower()) for other in elsewhere):
        if re.search(r"without liger|no liger|liger[ =:]*(off|false|no\b)|liger.{0,12}(only|except)", low):
            not_stated("fused_loss", text)
        complete("fused_loss", text, *_LOSS_FORMS)
        return True
    if plain(text) in BLANK or (re.match(_NO, plain(text)) and "chunk" not in low):
        complete("fused_loss", text, *_LOSS_FORMS)
        return False
    raise RefusedError("fused_loss", text, "is a kernel memplan does not model")


_PACKED_FORMS = (
    r"pack(?:ed|ing)", r"fixed", r"forced", r"full", r"unpadded", r"concat(?:enated)?", r"group(?:ed)?", r"lengths?",
    r"random tokens", r"\d+", r"c4", r"alpaca", r"mrpc", r"block_size", r"max_length", r"model_max_length",
    r"pad(?:ded|ding)?", r"to", r"the", r"max", r"longest(?: (?:in|of)(?: the)? batch)?", r"bucketed by length",
    r"batch", r"sequences?", r"tokens", r"group_by_length",
)  # fmt: skip


def packed(text: str, notes: Notes) -> bool:
    """Whether sequences are full; a padded batch has a mask.

    >>> packed("packed (C4)", []), packed("padded to longest in batch", [])
    (True, False)
    """
    low = plain(text)
    if low in BLANK or "not stated" in low:
        notes.append("packed_or_padded: is not stated, full sequences taken")
        return True
    full, pads = re.match(r"pack|fixed|forced|full|unpadded|concat|group", low), re.search(r"(?<!un)\bpad", low)
    if full and pads:
        not_stated("packed_or_padded", text, "says both")
    if full or low.startswith("pad"):
        complete("packed_or_padded", text, *_PACKED_FORMS)
        return bool(full)
    not_stated("packed_or_padded", text, "says neither packed nor padded")

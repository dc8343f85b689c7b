"""The largest micro-batch that fits, asked of the estimate instead of a GPU that runs out of memory."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from memplan.errors import MemplanError, PreflightError, SpecError
from memplan.integrations import live
from memplan.parallel import uncollected
from memplan.solving import MOST
from memplan.space import Setup, changed
from memplan.specs._base import LARGEST_INT

__all__ = ["largest_batch"]


def largest_batch(
    model: Any,
    args: Any = None,
    *,
    training: Any = None,
    cluster: Any = None,
    software: Any = None,
    lengths: Any = None,
    global_batch_size: int | None = None,
) -> int:
    """Return the largest micro-batch, in sequences per GPU, with which a run fits for certain.

    It takes what :func:`memplan.preflight` takes, and estimates what that does, with whatever engine DeepSpeed's or
    FSDP's config asks for. Where ``auto_find_batch_size`` runs out of memory and begins again, which it cannot under
    ZeRO-3, nothing is run here, and no weight has to be there::

        size = memplan.largest_batch(config, args, training={"seq_len": 4096}, global_batch_size=64)
        args = dataclasses.replace(
            args, per_device_train_batch_size=size, gradient_accumulation_steps=64 // (size * args.world_size)
        )

    Args:
        model: as for :func:`memplan.preflight`.
        args: as for :func:`memplan.preflight`; the micro-batch that they have is passed over.
        training: as for :func:`memplan.preflight`.
        cluster: as for :func:`memplan.preflight`.
        software: as for :func:`memplan.preflight`.
        lengths: as for :func:`memplan.preflight`.
        global_batch_size: sequences of one optimizer step over all ranks, which stay as many: the micro-batch, of up to
            4096, divides a rank's share, and what is left is accumulated. None is any micro-batch up to 4096, with the
            accumulation that the arguments have. A DeepSpeed config that fixes ``train_batch_size`` has said it.

    Raises PreflightError, with what would fit, if not even one sequence does: on the first rank, while the others go on
    with 1 until the launcher ends them. SpecError for a wrong argument, for a GPU whose memory is not known, and for a
    DeepSpeed config of the Trainer's that fixes the micro-batch; UnsupportedError for what is not modelled. Where a
    process group is there, all ranks return the least that any of them finds.
    """
    return in_step(
        model, args, training=training, cluster=cluster, software=software, lengths=lengths, total=global_batch_size
    )


def in_step(model: Any, args: Any, *, total: int | None = None, share: int | None = None, **asked: Any) -> int:
    """As :func:`largest_batch`, for ``total`` sequences of a step, or a ``share`` of each rank."""
    error: MemplanError | None = None
    try:
        size = _largest(model, args, total, share, **asked)
    except MemplanError as raised:
        size, error = 0, raised
    except Exception as raised:
        # A mistake of memplan's, or of an object that is asked: the other ranks wait for this one all the same.
        from memplan.checks import said_of_memplan

        size, error = 0, MemplanError(f"memplan: {said_of_memplan(raised)}")
        error.__cause__ = raised
    size = _least_of_all_ranks(size)
    if error is not None and (not isinstance(error, PreflightError) or live.rank() == 0):
        raise error
    return max(size, 1)


def _largest(
    model: Any,
    args: Any,
    total: int | None,
    share: int | None,
    training: Any = None,
    cluster: Any = None,
    software: Any = None,
    lengths: Any = None,
) -> int:
    from memplan import case, checks
    from memplan.lengths import read_lengths

    asked = case.training_spec(training)
    hardware = case.cluster_spec(None) if cluster is None else case.known_cluster(cluster)
    run, known = live.read(model, args), None if lengths is None else read_lengths(lengths)
    versions = checks.installed_software() if software is None else case.software_spec(software)
    with uncollected():
        files, _, _ = checks.as_files(run, asked)
        total = _of_config(files.raw, total, of_a_trainer=run.of_a_trainer)
        examined = checks.examine(run, asked.replace(micro_batch_size=1), hardware, versions, known)
        setup = examined.setup
        if setup is None or examined.check.estimate is None:
            said = "\n".join(f"{each.path}: {each.message} {each.remedy}" for each in examined.check.findings)
            raise PreflightError(f"No batch can be trained.\n{said}", findings=examined.check.findings)
        if examined.check.estimate.gpu.capacity is None:
            raise SpecError("gpu: none is known, so that there is no limit. Name it by cluster=, as in 2xA100-80GB.")
        sizes = _sizes(setup, share * setup.gpus if share is not None else total)
        place = _last_that_fits(examined, sizes)
        if place < 0:
            raise _none(examined, sizes[0])
        return sizes[place].training.micro_batch_size


def _of_config(raw: Any, total: int | None, *, of_a_trainer: bool) -> int | None:
    """The sequences of a step, by a DeepSpeed config if it says so. Raises SpecError for one that leaves no choice."""
    values = raw.get("deepspeed")
    data = {} if values is None else values.data
    micro, train = data.get("train_micro_batch_size_per_gpu"), data.get("train_batch_size")
    if of_a_trainer and isinstance(micro, int):
        where = f"{values.source}: train_micro_batch_size_per_gpu"
        raise SpecError.at(where, micro, "is fixed, and the Trainer refuses another", 'Write "auto" there.')
    if not isinstance(train, int) or isinstance(train, bool):
        return total
    if total not in (None, train):
        where = f"{values.source}: train_batch_size"
        raise SpecError.at(where, train, f"is not global_batch_size, {total}", 'Write "auto" there.')
    return train


def _sizes(setup: Setup, total: int | None) -> Sequence[Setup]:
    """The setups to choose from, the smallest micro-batch first. Raises SpecError."""
    if total is None:
        return _Sizes(setup)
    if isinstance(total, bool) or not isinstance(total, int) or not 1 <= total <= LARGEST_INT or total % setup.gpus:
        problem = f"is no number of sequences that {setup.gpus} ranks can share"
        raise SpecError.at("global_batch_size", total, problem, f"Use a multiple of the ranks, up to {LARGEST_INT}.")
    share = total // setup.gpus
    sizes = (size for size in range(1, min(share, MOST) + 1) if share % size == 0)
    return [changed(setup, micro_batch_size=size, grad_accum_steps=share // size) for size in sizes]


class _Sizes(Sequence[Setup]):
    """A setup with every micro-batch up to ``MOST``."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def __len__(self) -> int:
        return MOST

    def __getitem__(self, place: Any) -> Any:
        return changed(self._setup, micro_batch_size=place + 1)


def _last_that_fits(examined: Any, sizes: Sequence[Setup]) -> int:
    """The place of the largest that fits, or -1; what a micro-batch needs grows with it."""
    fits = examined.case.fits_where_known
    if isinstance(sizes, list):  # with the accumulation, which some engines need memory for, it need not
        return next((place for place in range(len(sizes) - 1, -1, -1) if fits(sizes[place])), -1)
    failing = 1
    while failing <= len(sizes) and fits(sizes[failing - 1]):
        failing *= 2
    return bisect_left(sizes, True, failing // 2, min(failing - 1, len(sizes)), key=lambda each: not fits(each)) - 1


def _none(examined: Any, least: Setup) -> PreflightError:
    """The error that not even the smallest fits, with what would."""
    from memplan import checks

    case, estimate = examined.case, examined.case.estimate(least)
    check = examined.check.model_copy(update={"estimate": estimate, "verdict": estimate.verdict})
    finding = checks.memory_said(checks.Examined(case, least, check, examined.beside))
    findings = () if finding is None else (finding,)
    size = least.training.micro_batch_size
    said = "\n".join(f"{each.path}: {each.message} {each.remedy}" for each in findings)
    head = f"Not even a micro-batch of {size} fits for certain."
    return PreflightError(f"{head}\n{said}", report=estimate, findings=findings)


def _least_of_all_ranks(size: int) -> int:
    """What all ranks go on with: the memory that is free may differ between them."""
    group = live._process_group()
    if group is None or group.get_world_size() == 1:
        return size
    torch = sys.modules["torch"]
    device = "cuda" if group.get_backend() == "nccl" else "cpu"
    least = torch.tensor([size], device=device)
    group.all_reduce(least, op=group.ReduceOp.MIN)
    return int(least.item())

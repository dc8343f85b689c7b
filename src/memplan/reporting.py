"""One setup, the ladder beside it and what a plan finds, for one page."""

from __future__ import annotations

from typing import Any

from memplan import __version__, api, planning
from memplan.answers import Report
from memplan.case import ClusterLike, EngineConfigLike, ModelLike, SoftwareLike, StrategyLike, TrainingLike
from memplan.errors import SpecError
from memplan.planner import Done, nothing
from memplan.render import words
from memplan.space import Target

__all__ = ["report"]


def report(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    strategy: StrategyLike = None,
    *,
    engine_config: EngineConfigLike = None,
    global_batch_size: int | None = None,
    target: Target = "deepspeed",
    software: SoftwareLike = None,
    processes: int = 1,
    done: Done = nothing,
) -> Report:
    """Estimate a setup, and plan beside it: ``report(...).write("report.html")`` makes one page of both.

    Arguments and errors are those of :func:`memplan.estimate` and :func:`memplan.plan`. Without a strategy or an
    engine's config the estimate is that of the plan's best. Without a GPU there is no plan, and the ladder takes its
    place.
    """
    asked = None
    if strategy is not None or engine_config is not None:
        asked = api.estimate(model, training, cluster, strategy, engine_config=engine_config, software=software)
    first = asked or api.estimate(model, training, cluster, software=software, replay=False)  # a mistake is raised here
    if first.setup["task"] != "train":
        problem = "is not a training run, which a report is for"
        raise SpecError.at("task", first.setup["task"], problem, "Leave it out.")
    if words.gpu_name(first) in (None, "cpu"):
        several = api.ladder(model, training, cluster, software=software, processes=processes)
        return Report(version=__version__, estimate=asked or several.best, ladder=several)
    wishes: dict[str, Any] = {"global_batch_size": global_batch_size, "target": target, "software": software}
    plan = planning.plan(model, training, cluster, **wishes, processes=processes, done=done)
    best = plan.rungs[0] if plan.best is None else plan.best
    return Report(version=__version__, estimate=asked or best.estimate, plan=plan)

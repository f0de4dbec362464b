"""The comparison: every optimizer on the same task, initial weights, data order, seeds and limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from natgrad.errors import ArgumentError
from natgrad.tasks import optimizers as catalogue
from natgrad.tasks.measure import machine_facts, memory_of
from natgrad.tasks.optimizers import OptimizerSpec
from natgrad.tasks.results import (
    Comparison,
    OptimizerInfo,
    Run,
    Settings,
    TaskInfo,
    Tuning,
    TuningTrial,
)
from natgrad.tasks.summary import choose_target, summarise
from natgrad.tasks.task import Task, validate
from natgrad.tasks.train import Limit, Progress, train

GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors of the default setting (learning rate or radius) that ``--tune`` tries, the same for every optimizer."""
DEFAULT_LIMIT = Limit(seconds=10.0)
Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Args:
        optimizers: names from natgrad.tasks.optimizers.OPTIMIZERS.
        seeds: one run per optimizer and seed; the seed fixes initial weights and data order.
        limit: of one run.
        tune: None, or the limit of one learning-rate trial.
        evaluation_rows: at most so many rows of each set are evaluated; None takes 16 batches, at most 4096 rows, so
            that one evaluation costs about as much as five steps.
        command: recorded in the results.
    """

    optimizers: tuple[str, ...] = catalogue.DEFAULT
    seeds: tuple[int, ...] = (0, 1, 2)
    limit: Limit = DEFAULT_LIMIT
    tune: Limit | None = None
    evaluation_rows: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        catalogue.find_optimizers(self.optimizers)
        if not self.seeds:
            raise ArgumentError("At least one seed is needed.")
        if self.evaluation_rows is not None and self.evaluation_rows < 1:
            raise ArgumentError(f"evaluation_rows must be at least 1, got {self.evaluation_rows}.")


def compare(
    task: Task,
    plan: Plan | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: Listener | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> Comparison:
    """Runs the comparison and returns every number of it.

    Failed runs are recorded with their reason. KeyboardInterrupt ends the comparison early and keeps what is done, the
    interrupted run included. Seeds are the outer loop, so that a slow drift of the machine meets all optimizers alike.

    Raises:
        ArgumentError: unknown optimizer, or a task whose parts do not fit together; before any training.
    """
    plan = plan or Plan()
    where = torch.device(device)
    task = task.to(where)
    with torch.random.fork_rng():  # a user's model may draw its weights from the global stream
        validate(task)
        return _Comparing(task, plan, where, on_progress, on_run).result()


class _Comparing:
    def __init__(
        self,
        task: Task,
        plan: Plan,
        device: torch.device,
        on_progress: Listener | None,
        on_run: Callable[[Run], None] | None,
    ) -> None:
        self.task, self.plan, self.device = task, plan, device
        self.on_progress, self.on_run = on_progress, on_run
        self.specs = catalogue.find_optimizers(plan.optimizers)
        self.evaluation_rows = plan.evaluation_rows or min(4096, 16 * task.batch_size)
        self.trials: list[TuningTrial] = []
        self.runs: list[Run] = []
        self.memory: dict[str, tuple[int | None, int | None]] = {}
        self.interrupted = False

    def result(self) -> Comparison:
        machine = machine_facts(self.device)
        infos = tuple(OptimizerInfo(s.name, s.family, self.default_lr(s), s.note, s.knob) for s in self.specs)
        rates = {info.name: info.default_lr for info in infos}
        try:
            if self.plan.tune is not None:
                for spec in self.specs:
                    rates[spec.name] = self.tuned_lr(spec, rates[spec.name], self.plan.tune)
            for spec in self.specs:
                self.memory[spec.name] = self.measure(spec, rates[spec.name])
            self.train_all(rates)
        except KeyboardInterrupt:
            self.interrupted = True
        target = choose_target(self.task.target_loss, self.runs)
        return Comparison(
            task=task_info(self.task),
            settings=self.settings(),
            machine=machine,
            optimizers=infos,
            runs=tuple(self.runs),
            target=target,
            summary=summarise(self.runs, [spec.name for spec in self.specs], target),
            interrupted=self.interrupted,
        )

    def default_lr(self, spec: OptimizerSpec) -> float:
        """NaN when the optimizer cannot be built for this model: its runs will then say why."""
        try:
            return spec.lr_of(self.task.model(self.plan.seeds[0]), self.task.likelihood)
        except Exception:
            return math.nan

    def tuned_lr(self, spec: OptimizerSpec, default: float, limit: Limit) -> float:
        """The grid's rate with the lowest final training loss on the first seed; the default when all fail."""
        best, best_loss = default, math.inf
        if not math.isfinite(default):
            return default
        for factor in GRID:
            lr = default * factor
            seed = self.plan.seeds[0]
            run, interrupted = train(
                self.task,
                spec,
                lr,
                seed,
                limit,
                evaluation_rows=self.evaluation_rows,
                detailed=False,
                phase="tune",
                on_progress=self.on_progress,
            )
            if interrupted:
                raise KeyboardInterrupt
            loss = run.final.train_loss if run.final is not None and run.failure is None else math.nan
            self.trials.append(TuningTrial(spec.name, lr, seed, run.steps, loss, run.failure))
            if loss < best_loss:
                best, best_loss = lr, loss
        return best

    def measure(self, spec: OptimizerSpec, lr: float) -> tuple[int | None, int | None]:
        """Memory of a few steps; it also warms up libraries before the clocks start. Failures show in the runs."""
        seed = self.plan.seeds[0]
        if self.on_progress is not None:
            self.on_progress(Progress("measure", spec.name, seed, lr, 0, 0.0, math.nan))
        try:
            return memory_of(self.task, spec, lr, seed, self.device)
        except Exception:
            return None, None

    def train_all(self, rates: dict[str, float]) -> None:
        for seed in self.plan.seeds:
            for spec in self.specs:
                run, interrupted = train(
                    self.task,
                    spec,
                    rates[spec.name],
                    seed,
                    self.plan.limit,
                    evaluation_rows=self.evaluation_rows,
                    on_progress=self.on_progress,
                )
                peak, state = self.memory[spec.name]
                run = replace(run, tuned=self.plan.tune is not None, peak_memory_bytes=peak, state_bytes=state)
                self.runs.append(run)
                if self.on_run is not None:
                    self.on_run(run)
                if interrupted:
                    raise KeyboardInterrupt

    def settings(self) -> Settings:
        tune, limit = self.plan.tune, self.plan.limit
        tuning = None if tune is None else Tuning(GRID, tune.seconds, tune.steps, tuple(self.trials))
        return Settings(self.plan.seeds, limit.seconds, limit.steps, self.evaluation_rows, tuning, self.plan.command)


def task_info(task: Task) -> TaskInfo:
    """The facts of a task that the results keep."""
    metric = task.metric
    return TaskInfo(
        name=task.name,
        description=task.description,
        likelihood=repr(task.likelihood),
        metric=metric.name if metric else "nll",
        metric_higher_is_better=bool(metric and metric.higher_is_better),
        train_rows=task.train_rows,
        test_rows=task.test_rows,
        parameters=sum(p.numel() for p in task.model(0).parameters() if p.requires_grad),
        batch_size=min(task.batch_size, task.train_rows),
    )


def seconds_planned(plan: Plan) -> float | None:
    """Training seconds that the plan asks for, or None when it counts steps."""
    if plan.limit.seconds is None or (plan.tune is not None and plan.tune.seconds is None):
        return None
    tuning = 0.0 if plan.tune is None else len(GRID) * (plan.tune.seconds or 0.0)
    return len(plan.optimizers) * (len(plan.seeds) * plan.limit.seconds + tuning)

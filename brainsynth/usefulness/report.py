"""The usefulness section of an evaluation's page."""

from __future__ import annotations

from brainsynth.report.html import Page
from brainsynth.report.usefulness_figure import arms
from brainsynth.usefulness.scores import METRICS, Estimate
from brainsynth.usefulness.tasks import TaskResult

_ARMS = {
    "real": "real",
    "synthetic": "synthetic",
    "few_real": "few real",
    "few_real_and_synthetic": "few real and synthetic",
}


def usefulness_section(page: Page, results: list[TaskResult]) -> None:
    """A figure and a table per task; nothing where the test was not asked for."""
    if not results:
        return
    budget = results[0].result.config
    page.heading("Usefulness: train on synthetic, test on real")
    page.text(
        f"One small network per task, {budget.steps} steps of {budget.batch_size} volumes whatever it is trained on, "
        f"{len(budget.seeds)} seeds, tested on the real validation scans. (Over seeds) [over test people]: 95 % intervals. "
        "The networks are yardsticks: an arm near chance on real data says nothing about the synthetic.",
        "note",
    )
    for task in results:
        result, unit = task.result, f" [{task.unit}]" if task.unit else ""
        page.text(
            f"{task.name}: {result.n_test} test scans of {result.n_test_people} people; volumes with a label: "
            "{} synthetic, {} real to train on, {} to test on.".format(*task.available)
            + (
                " Labels are those of the segmentation ruler, on real and synthetic alike."
                * (task.name == "ventricles")
            )
            + (
                " Labels are the stored label maps; a scan counts for the structures that its own map has."
                * (result.task == "structures")
            )
            + (f" All ventricles: {', '.join(task.ventricles)}." if task.ventricles else "")
        )
        metric = METRICS[result.task][0]
        estimates = [arm.metrics[metric] for arm in result.arms]
        label = metric.upper() + (unit if metric == "mae" else "")
        figure = arms(
            [_ARMS[arm.name] for arm in result.arms],
            [e.mean for e in estimates],
            [(e.people_low, e.people_high) for e in estimates],
            [e.per_seed for e in estimates],
            result.chance[metric],
            f"{label}; ring: one seed; dashed: chance",
        )
        page.figure(figure, f"usefulness, {task.name}")
        shown = [name for name in METRICS[result.task] if name in result.arms[0].metrics]
        rows: list[list[object]] = [
            [_ARMS[arm.name], arm.n_real, arm.n_synthetic, *(_cell(arm.metrics[name]) for name in shown)]
            for arm in result.arms
        ]
        rows += [
            [f"{_ARMS[d.first]} minus {_ARMS[d.minus]}", "", "", *(_cell(d.metrics[name]) for name in shown)]
            for d in result.differences
        ]
        rows.append(["chance", "", "", *(f"{result.chance[name]:.3g}" for name in shown)])
        page.table(["trained on", "real", "synthetic", *shown], rows)
        if each := [name for name in result.arms[0].metrics if name not in shown]:
            page.table(
                ["trained on", *(_ARMS[arm.name] for arm in result.arms)],
                [[name, *(_cell(arm.metrics[name]) for arm in result.arms)] for name in each],
            )


def _cell(e: Estimate) -> str:
    return f"{e.mean:.3g} ({e.low:.3g}, {e.high:.3g}) [{e.people_low:.3g}, {e.people_high:.3g}]"

"""What an evaluation found: a table for people, rows of a CSV file and content of JSON for programs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinyunet.common.terminal import aligned
from tinyunet.segmentation.evaluation import Measures
from tinyunet.segmentation.metrics import LESION_METRICS, METRICS, interval
from tinyunet.segmentation.scores import Scores, mean, overall, table

Rows = Sequence[tuple[str, Measures]]
_HEADS = METRICS | LESION_METRICS


def dice_of(measures: Measures) -> Scores:
    """Return the Dice of each class and region alone."""
    return {g: {name: m["dice"] for name, m in entries.items()} for g, entries in measures.items()}


def worst_first(rows: Rows) -> list[tuple[str, Measures]]:
    """Return the cases by their mean Dice, the lowest first."""
    return sorted(rows, key=lambda row: overall(dice_of(row[1])))


def summary(rows: Rows) -> dict[str, Any]:
    """Return content for a file.

    "classes" and "regions" hold mean Dice by name, and "cases" the Dice of each case; "metrics" holds, by
    class or region and metric, the "mean" over cases and its 95 % "interval"; "case_metrics" each value.
    """
    dice = [(name, dice_of(measures)) for name, measures in rows]
    return {
        **mean([scores for _, scores in dice]),
        "cases": dict(dice),
        "metrics": {
            group: {
                name: {
                    metric: {"mean": float(np.mean(values)), "interval": interval(values)}
                    for metric, values in _over_cases(rows, group, name)
                }
                for name in entries
            }
            for group, entries in rows[0][1].items()
        },
        "case_metrics": dict(rows),
    }


def _over_cases(rows: Rows, group: str, name: str) -> Iterator[tuple[str, list[float]]]:
    for metric in rows[0][1][group][name]:
        yield metric, [measures[group][name][metric] for _, measures in rows]


def csv_rows(rows: Rows) -> list[list[str]]:
    """Return the lines of a CSV file, the head first: a line for each case and class or region."""
    first = next(iter(rows[0][1]["classes"].values()))
    lines = [["case", "group", "name", *first]]
    for case, measures in rows:
        for group, entries in measures.items():
            for name, values in entries.items():
                lines.append([case, group, name, *(repr(value) for value in values.values())])
    return lines


def report(rows: Rows, metrics: Sequence[str]) -> str:
    """Return a table of Dice by case, the worst first, and a table of the means of some metrics.

    Below each mean stands its 95 % interval, if there are several cases.
    """
    cases = table([(name, dice_of(measures)) for name, measures in worst_first(rows)])
    body: list[list[str]] = []
    for group, entries in rows[0][1].items():
        for name in entries:
            values = dict(_over_cases(rows, group, name))
            body.append([name, *(_digits(metric, np.mean(values[metric])) for metric in metrics)])
            if len(rows) > 1:
                body.append(["", *(_range(metric, values[metric]) for metric in metrics)])
    heads = ["averages" if len(rows) > 1 else "", *(_HEADS[metric][0] for metric in metrics)]
    return f"{cases}\n\n{aligned(heads, body)}"


def _digits(metric: str, value: Any) -> str:
    return f"{value:.{_HEADS[metric][1]}f}"


def _range(metric: str, values: Sequence[float]) -> str:
    low, high = (_digits(metric, end) for end in interval(values) or (0, 0))
    return f"{low} to {high}" if metric == "difference" else f"{low}-{high}"

"""The report of a trained classifier: what it drops, how well its scores are calibrated, where it is in doubt."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.classifier import Threshold
from data_pipelines.quality_training import Point, Trained, curve
from data_pipelines.score_pages import histogram, nearest, thinned


def write_report(folder: Path, name: str, trained: Trained) -> None:
    """Writes report.html, report.md and report.json of a training."""
    from internjax import report

    metrics, settings = trained.metrics, trained.classifier.settings
    points = curve(trained.scores_D, trained.test.labels_D, settings.drop)
    shown = thinned(points, 200)
    reached = (metrics["precision"] or 0.0) >= metrics["wanted_precision"]
    numbers = [
        report.Number("Area under the curve", metrics["area_under_curve"], "0.5 is chance"),
        report.Number(
            "Precision of what is dropped", metrics["precision"], f"wanted {metrics['wanted_precision']:g}",
            "reached" if reached else "below what was wanted", "good" if reached else "bad",
        ),
        report.Number("Recall", metrics["recall"]),
        report.Number("Dropped", metrics["dropped_share"]),
        report.Number("Calibration error", metrics["calibration_error"]),
        report.Number("Agreement of annotators (kappa)", metrics["kappa"]),
    ]  # fmt: skip
    counts = metrics["num_documents"]
    said = (
        f"{sum(counts.values())} labelled documents, {metrics['num_positive']} with label 1; {counts['learn']} to "
        f"learn from, {counts['calibrate']} to calibrate and choose thresholds, {counts['test']} to test. The "
        f"numbers above are those of the test. Left out, as the annotators disagree: {metrics['num_disagreed']}."
    )
    goes = f"Documents {settings.drop} `value` go; `*`: all others"
    sections = [
        report.Section("Result", [report.Numbers(numbers), report.Text(said)]),
        report.Section(
            "Thresholds",
            [
                report.Table(Threshold._fields, trained.classifier.thresholds, goes),
                *([report.Text("\n\n".join(trained.notes))] if trained.notes else []),
                report.Lines(
                    "Precision and recall",
                    {
                        "precision": [(point.threshold, point.precision) for point in reversed(shown)],
                        "recall": [(point.threshold, point.recall) for point in reversed(shown)],
                    },
                    "threshold", "share", baselines={"wanted": metrics["wanted_precision"]},
                ),
                report.Table(Point._fields, thinned(points, 20), "Test part"),
            ],
        ),
        report.Section(
            "Calibration",
            [report.Table(("mean score", "share with label 1", "documents"), metrics["calibration_bins"])],
        ),
        report.Section("Scores per domain", [_histogram(trained)]),
        report.Section("Borderline", [report.Samples(_borderline(trained), "Nearest to the threshold for all")]),
    ]  # fmt: skip
    report.write(folder, f"Classifier {name}", sections, subtitle=f"Documents {settings.drop} the threshold go.")
    values = {"metrics": metrics, "curve": [point._asdict() for point in shown], "notes": trained.notes}
    (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _histogram(trained: Trained) -> Any:
    domains = np.array(trained.test.domains)
    groups = {name: trained.scores_D[domains == name] for name in sorted(set(trained.test.domains))}
    return histogram(groups, [number / 10 for number in range(11)], named="domain")


def _borderline(trained: Trained, each: int = 3) -> list[Any]:
    from internjax import report

    above, below = nearest(trained.scores_D, trained.classifier.thresholds[0].value, each)
    return [
        report.Sample(f"{trained.scores_D[row]:.3f}, label {trained.test.labels_D[row]}", trained.test.texts[row][:600])
        for row in (*above, *below)
    ]

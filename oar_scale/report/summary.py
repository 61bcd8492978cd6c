"""What came out, in sentences: written from the numbers, in whatever direction they point.

A difference counts as measured when it is more than two of its standard errors away from zero; everything else is
reported as not measurably different, with the numbers beside it.
"""

from __future__ import annotations

from oar_scale.observe.console import duration
from oar_scale.registry import BASELINES, MODELS, ModelName, model_label
from oar_scale.report.report_data import ReportData
from oar_scale.results.estimates import Calibration, CaptionDependence, DistanceDifference, Estimate, NllTable

STANDARD_ERRORS = 2.0


def number(value: float, digits: int = 3) -> str:
    """``value`` with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """``value`` with its sign, a true minus sign where it is negative."""
    return f"{value:+.{digits}f}".replace("-", "−")


def plus_minus(estimate: Estimate, sign: bool = False) -> str:
    """``3.214 ± 0.021``"""
    return f"{(signed if sign else number)(estimate.mean)} ± {number(estimate.standard_error)}"


def measured(difference: Estimate) -> bool:
    """Whether the difference is more than two standard errors from zero."""
    return abs(difference.mean) > STANDARD_ERRORS * difference.standard_error


def verdict(difference: Estimate) -> str:
    """The verdict on ``first`` from ``first - second`` of an NLL."""
    if not measured(difference):
        return "not measurably different"
    return "better" if difference.mean < 0 else "worse"


def summarise(report: ReportData) -> list[str]:
    """The sentences of the summary; only what the report has numbers for."""
    lines = [_what_was_done(report)]
    if report.pretrain:
        lines.append(_pretraining(report))
    if report.nll:
        lines += _comparisons(report.nll)
    lines += _calibration(report.calibration)
    novel = next((group for group in report.groups if group.name == "novel"), None)
    if novel is not None:
        lines += _comparisons(novel.nll, f"On the {novel.nll.images} held-out images that training has no variant of:")
    lines += _captions(report.captions)
    lines += _distances(report.distance_differences)
    return lines


def key_numbers(report: ReportData) -> list[tuple[str, str, str]]:
    """(label, value, what it means) of the few numbers to look at first."""
    numbers: list[tuple[str, str, str]] = []
    if report.nll:
        for other in BASELINES:
            difference = _difference(report.nll, "ordered", other, "own max_prob")
            if difference:
                meaning = f"nats per code, own max_prob orders: ordered is {verdict(difference)}"
                numbers.append((f"ordered − {model_label(other)}", plus_minus(difference, sign=True), meaning))
    ordered = next((row for row in report.calibration if row.model == "ordered"), None)
    if ordered:
        meaning = "nats per code, the ordered model's NLL minus its entropy: above 0 is over-confident"
        numbers.append(("calibration gap", plus_minus(ordered.gap, sign=True), meaning))
    dependence = _caption_row(report.captions)
    if dependence:
        meaning = f"nats per code lost with other images' captions ({model_label(dependence.model)} model)"
        numbers.append(("shuffled − own captions", plus_minus(dependence.difference, sign=True), meaning))
    if report.tokenizer:
        meaning = f"held-out images through the tokenizer; {report.tokenizer.codebook_use:.0%} of the codebook in use"
        numbers.append(("tokenizer PSNR", f"{report.tokenizer.psnr_db:.1f} dB", meaning))
    return numbers


def _what_was_done(report: ReportData) -> str:
    took = f"took {duration(report.run.duration_s)} on {report.run.machine}"
    if not (report.data and report.tokenizer):
        return f"This run {took}."
    size = f" of {report.model.parameters / 1e6:.1f} M parameters" if report.model else ""
    grid = report.tokenizer.grid
    text = (
        f"A transformer{size} was trained to place the {grid} × {grid} codes of captioned images "
        f"({report.data.train_images:,} for training, {report.data.heldout_images:,} held out) in any order."
    )
    if report.orders:
        text += (
            f" It was asked in which order it would rather place each of {report.orders.images:,} training images. "
            f"Fine-tuned on {report.trained_on} it is the ordered model."
        )
    if report.nll and any(entry.model == "control" for entry in report.nll.entries):
        text += " The control is the same model, fine-tuned with the same budget on random orders."
    return f"{text} All of it {took}."


def _pretraining(report: ReportData) -> str:
    assert report.pretrain is not None
    effect = report.pretrain
    numbers = f"from {plus_minus(effect.before)} to {plus_minus(effect.after)} nats per code (random orders, {effect.images} images)"
    if not measured(effect.difference):
        return f"Pretraining moved the held-out NLL {numbers}: no measurable change."
    return f"Pretraining {'lowered' if effect.difference.mean < 0 else 'raised'} the held-out NLL {numbers}."


def _comparisons(table: NllTable, prefix: str = "") -> list[str]:
    """Ordered against control and against any-order, first along the orders each would generate in, then in random ones."""
    lines = []
    for order, opening in (
        ("own max_prob", "Along the max_prob orders that each model generates in"),
        ("random", "In random orders"),
    ):
        readings = []
        for other in BASELINES:
            difference = _difference(table, "ordered", other, order)
            if difference:
                readings.append(_against(other, difference))
        if readings:
            lines.append(f"{opening}, the ordered model is {' and '.join(readings)}.")
    if lines and prefix:
        lines[0] = f"{prefix} {lines[0][0].lower()}{lines[0][1:]}"
    return lines


def _against(other: ModelName, difference: Estimate) -> str:
    if not measured(difference):
        return f"not measurably different from {MODELS[other].title} ({plus_minus(difference, sign=True)} nats per code)"
    size = f"{number(abs(difference.mean))} ± {number(difference.standard_error)} nats per code"
    return f"{verdict(difference)} than {MODELS[other].title} by {size}"


def _captions(rows: tuple[CaptionDependence, ...]) -> list[str]:
    row = _caption_row(rows)
    if row is None:
        return []
    phrase = MODELS[row.model].title
    if not measured(row.difference):
        return [f"Captions of other images cost {phrase} nothing measurable ({plus_minus(row.difference, sign=True)} nats per code)."]
    change = f"{number(abs(row.difference.mean))} ± {number(row.difference.standard_error)} nats per code"
    if row.difference.mean > 0:
        return [f"Captions matter: with those of other images {phrase} is worse by {change}."]
    return [f"Captions mislead: with those of other images {phrase} is better by {change}."]


def _caption_row(rows: tuple[CaptionDependence, ...]) -> CaptionDependence | None:
    """One model is enough for the summary (the ordered one if it is there); the table has all."""
    return next((row for row in rows if row.model == "ordered"), rows[-1] if rows else None)


def _calibration(rows: tuple[Calibration, ...]) -> list[str]:
    row = next((row for row in rows if row.model == "ordered"), None)
    if row is None:
        return []
    gap = f"{plus_minus(row.gap, sign=True)} nats per code between its NLL and its entropy"
    if not measured(row.gap):
        return [f"Along its own max_prob orders the ordered model is calibrated ({gap})."]
    sure = "over-confident" if row.gap.mean > 0 else "under-confident"
    top = f"its most likely code has probability {number(row.top_probability.mean, 2)} and is right {number(row.top_accuracy.mean, 2)}"
    return [f"Along its own max_prob orders the ordered model is {sure}: {gap}; {top} of the time."]


def _distances(rows: tuple[DistanceDifference, ...]) -> list[str]:
    row = next((row for row in rows if row.second == "control"), None)
    if row is None:
        return []
    values = f"kid_{row.features} {signed(row.kid.mean, 4)} ± {number(row.kid.standard_error, 4)}, {row.samples} samples each"
    values += ", paired by caption"
    if not measured(row.kid):
        return [f"Samples of the ordered model and of the control are not measurably different in distance to held-out images ({values})."]
    closer = "closer to" if row.kid.mean < 0 else "farther from"
    return [f"Samples of the ordered model are {closer} held-out images than those of the control ({values})."]


def _difference(table: NllTable, first: str, second: str, order: str) -> Estimate | None:
    matching = (d.difference for d in table.differences if (d.first, d.second, d.order) == (first, second, order))
    return next(matching, None)

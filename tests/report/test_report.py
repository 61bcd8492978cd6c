"""The report: self-contained, complete, and as honest about a loss as about a win."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oar_scale.evaluation.pictures import heat_map, known_part
from oar_scale.observe.events import EventLog
from oar_scale.report import render_report, write_report
from oar_scale.report import report_data as d
from oar_scale.report.summary import summarise
from oar_scale.results.estimates import CaptionDependence, DistanceDifference, Estimate, PretrainEffect, estimate
from tests.observe import synthetic

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects what a browser would load, the visible text, and whether the tags match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "data", "xlink:href", "action", "poster") and value]
        if tag != "a" and values.get("href"):
            self.loads.append(str(values["href"]))
        if tag == "img":
            self.images.append(str(values["src"]))
            assert values.get("alt"), "a picture without a description"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(synthetic.report())


def test_the_page_loads_nothing_from_anywhere(html: str) -> None:
    loads = Page(html).loads
    assert loads and all(uri.startswith(("data:", "#")) for uri in loads)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    assert "<script" not in html


def test_tags_match_and_pictures_decode_to_what_went_in(html: str) -> None:
    page = Page(html)
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in page.images]
    original = synthetic.picture(0)
    assert any(p.shape == original.shape and (p == original).all() for p in pixels)
    assert sum(p.shape[:2] == (8, 8) for p in pixels) == 1 + 3  # the mean order map and three single ones


def test_a_drawing_appears_cell_by_cell_and_edits_beside_each_other(html: str) -> None:
    report = synthetic.report()
    assert report.drawing and report.gallery
    (animation,) = (uri for uri in Page(html).images if uri.startswith("data:image/webp"))
    with Image.open(io.BytesIO(base64.b64decode(animation.split(",")[1]))) as film:
        assert film.n_frames == 65
        seen = []
        for frame in (0, 64):
            film.seek(frame)
            seen.append(np.asarray(film.convert("RGB"))[::4, ::4])
    assert (seen[0] == 176).all() and (seen[1] == report.drawing.picture).all()
    section = html[html.index("The same edits by each model") : html.index("What edits would know")]
    assert section.count("<img ") == 5 * len(report.gallery.rows)


def test_all_numbers_given_appear(html: str) -> None:
    text = Page(html).text
    report = synthetic.report()
    assert report.nll and report.orders and report.pretrain
    expected = ["3,557", "396", "12 min 11 s", "21.37 dB", "97.3%", "3,412,480", "6.238", "1f9ff: no caption", "CC BY-SA 4.0", "seed 17"]
    expected += ["187.65", "0.463", "0.218", "0.056", "3,549 of 3,557", "24.0 images/s", "2 min 28 s", "equal those of brute force"]
    for entry in report.nll.entries:
        expected.append(f"{entry.nll.mean:.3f} ± {entry.nll.standard_error:.3f}")
    for row in report.nll.differences:
        expected.append(f"{row.difference.mean:+.3f} ± {row.difference.standard_error:.3f}".replace("-", "−"))
    for group in report.groups:
        expected += [f"{entry.nll.mean:.3f} ± {entry.nll.standard_error:.3f}" for entry in group.nll.entries if entry.order != "raster"]
        expected += [f"{row.difference.mean:+.3f}".replace("-", "−") for row in group.nll.differences]
        expected += [f"{row.kid.standard_error:.4f}" for row in group.distance_differences]
    for sure in report.calibration:
        expected += [f"+{sure.gap.mean:.3f}", f"{sure.top_probability.mean:.3f}", f"{sure.top_accuracy.mean:.3f}"]
    for pair in report.distance_differences:
        expected += [f"{pair.kid.mean:+.4f} ± {pair.kid.standard_error:.4f}".replace("-", "−")]
    for caption in report.captions:
        expected += [f"{caption.shuffled.mean:.3f}", f"+{caption.difference.mean:.3f}"]
    for leak in report.leaks:
        expected += [
            f"{leak.leaky.mean:.3f} ± {leak.leaky.standard_error:.3f}",
            f"{leak.honest.mean:.3f} ± ",
            f"+{leak.difference.mean:.3f}",
        ]
    for distance in report.distances:
        expected += [f"{distance.kid:.4f}", f"{distance.kid_std:.4f}", f"{distance.fd:.1f}"]
    expected += [stage.what for stage in report.stages] + ["kid_efflite0", "fd_efflite0", "These are not FID", *report.notes]
    assert [number for number in expected if number not in text] == []


def test_the_page_says_what_its_errors_are_over(html: str) -> None:
    """Where several images are of one family; an evaluation of an older version does not say."""
    report = synthetic.report()
    assert report.nll
    clustered = Page(render_report(replace(report, nll=replace(report.nll, families=43)))).text
    assert "over 192 held-out images of 43 families;" in clustered and "for which images of one family" in clustered
    plain = Page(html).text
    assert "over 192 held-out images;" in plain and "± is one standard error over images." in plain


def test_captions_and_recipes_are_text_not_markup(html: str) -> None:
    assert "an emoji of &lt;umbrella&gt; &amp; rain" in html
    assert "<umbrella>" not in html


@pytest.mark.parametrize(
    ("ordered_minus_control", "reading", "text"),
    [
        (-0.042, "better", "the ordered model is better than the control by 0.042 ± 0.006 nats per code"),
        (+0.042, "worse", "the ordered model is worse than the control by 0.042 ± 0.006 nats per code"),
        (
            -0.009,
            "not measurably different",
            "the ordered model is not measurably different from the control (−0.009 ± 0.006 nats per code)",
        ),
    ],
)
def test_the_comparison_with_the_control_is_told_whatever_it_is(ordered_minus_control: float, reading: str, text: str) -> None:
    report = synthetic.report(nll=synthetic.nll_table(ordered_minus_control))
    assert f"Along the max_prob orders that each model generates in, {text}" in " ".join(summarise(report))
    assert f"nats per code, own max_prob orders: ordered is {reading}" in Page(render_report(report)).text


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Estimate(-0.0250, 0.0130), "of the ordered model and of the control are not measurably different in distance"),
        (Estimate(-0.0250, 0.0120), "Samples of the ordered model are closer to held-out images than those of the control"),
        (Estimate(+0.0250, 0.0120), "Samples of the ordered model are farther from held-out images than those of the control"),
    ],
)
def test_closer_needs_two_paired_standard_errors(difference: Estimate, text: str) -> None:
    rows = (DistanceDifference("ordered", "control", 256, difference),)
    said = " ".join(summarise(replace(synthetic.report(), distance_differences=rows)))
    assert text in said and f"± {difference.standard_error:.4f}, 256 samples each, paired by caption" in said


def test_a_likelihood_that_leaks_is_read_as_no_comparison(html: str) -> None:
    readings = re.findall(r"own gt_logprob</td>.*?<td[^>]*>([^<]*)</td></tr>", html, re.DOTALL)
    assert readings and set(readings) == {"leaks: how strongly they select"}


def test_novel_images_are_told_apart_in_the_summary() -> None:
    text = " ".join(summarise(synthetic.report()))
    assert "On the 192 held-out images that training has no variant of: along the max_prob orders" in text
    assert "worse than the control by 0.143" in text


def test_over_confidence_is_said() -> None:
    text = " ".join(summarise(synthetic.report()))
    assert "over-confident: +0.550 ± 0.030" in text and "has probability 0.40 and is right 0.35 of the time" in text


def test_the_page_says_what_the_ordered_model_was_trained_on(html: str) -> None:
    """The recipe may have trained it on one order for all images, beside an extraction."""
    assert "Fine-tuned on the extracted orders it is" in Page(html).text
    text = " ".join(Page(render_report(replace(synthetic.report(), trained_on="the order halton"))).text.split())
    assert text.count("ine-tuned on the order halton") == 2 and "ine-tuned on the extracted orders" not in text


def test_unused_captions_and_a_worse_pretraining_are_said() -> None:
    report = synthetic.report()
    flat = CaptionDependence("ordered", 192, Estimate(3.5, 0.03), Estimate(3.51, 0.03), Estimate(0.01, 0.02))
    worse = PretrainEffect(192, Estimate(3.5, 0.03), Estimate(3.7, 0.03), Estimate(0.2, 0.01))
    text = " ".join(summarise(replace(report, captions=(flat,), pretrain=worse)))
    assert "Captions of other images cost the ordered model nothing measurable" in text
    assert "Pretraining raised the held-out NLL from 3.500 ± 0.030 to 3.700 ± 0.030" in text


def test_the_report_of_an_unfinished_run_names_what_is_missing() -> None:
    full = synthetic.report()
    text = Page(render_report(d.ReportData(full.run, full.recipe_yaml, stages=full.stages[:1]))).text
    for missing in ("samples", "held-out likelihoods", "distances", "extracted orders", "tokenizer"):
        assert f"This run has no {missing} yet." in text


def test_the_report_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "report" / "index.html"
    write_report(synthetic.report(), str(path))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_unknown_cells_are_grey_and_known_ones_untouched() -> None:
    picture, known = synthetic.picture(1), np.eye(8, dtype=bool)
    shown = known_part(picture, known)
    assert (shown[:4, :4] == picture[:4, :4]).all()
    assert (shown[:4, 4:] == 176).all()


def test_heat_map_ends_are_the_ends_of_the_colour_map() -> None:
    colours = heat_map(np.array([[0.0, 63.0]]), 0, 63)
    assert colours[0].tolist() == [[68, 1, 84], [253, 231, 37]]  # viridis


def test_curves_come_from_the_events(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as log:
        log.emit("heldout", step=0, nll_random=4.0)
        log.emit("train", step=5, loss=3.5)
        log.emit("train", step=10, loss=float("nan"))
    curve = d.training_curve(str(tmp_path), "pretrain", "pretrain")
    assert curve and curve.loss == d.Series((5,), (3.5,)) and curve.heldout == d.Series((0,), (4.0,))
    assert d.training_curve(str(tmp_path), "finetune", "finetune") is None


def test_estimate_is_mean_and_standard_error() -> None:
    estimated = estimate([1.0, 3.0])
    assert (estimated.mean, estimated.standard_error) == pytest.approx((2.0, 1.0))
    with pytest.raises(ValueError, match="at least 2"):
        estimate([1.0])

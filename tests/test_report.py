from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from featherweight import report, search
from featherweight.allocation import Option
from featherweight.cost_table import Predicted, write_predictions
from featherweight.errors import ArtifactError
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Settings, Trial, best_of, frontier, measurements, nearest, write_trial
from tests.made_up import measurement

SETTINGS = Settings(seed=0, threads=2, batch=1, fingerprint="0" * 16)
NASTY = "<script>alert(1)</script> & `a|b` *c*"
VOID = {"meta", "link", "img", "br", "hr", "input"}


def recipe(*steps: str) -> Recipe:
    return Recipe.from_yaml(f"steps: [{', '.join(steps)}]\ntarget: onnxruntime")


TRIALS = [
    Trial(plain := recipe("fold_batchnorm"), measurement(plain, latency_ms=4.5, bytes=39_900_000)),
    Trial(
        static := recipe("fold_batchnorm", "quantize_static"),
        measurement(
            static,
            latency_ms=1.4,
            bytes=10_200_000,
            drop=0.003,
            doubts=[NASTY],
            kernels={"int8": 0.9, "fp32": 0.1},
            coverage=[{"layer": "conv1", "done": "int8 per channel"}, {"layer": "head", "skipped": NASTY}],
        ),
    ),
    Trial(
        zeros := recipe("prune_magnitude: {share: 0.6}", "quantize_static"),
        measurement(zeros, latency_ms=1.3, bytes=9_000_000, drop=0.012),
    ),
    Trial(
        wild := recipe("prune_magnitude: {share: 0.9}", "quantize_static"),
        measurement(wild, latency_ms=0.9, bytes=8_000_000, drop=0.6),
    ),
    Trial(recipe("quantize_dynamic"), None, f"the target cannot hold it: {NASTY}"),
]


def folder_of(folder: Path, trials: list[Trial] = TRIALS, budget: Budget | None = None, finished: bool = True) -> Path:
    """A search's folder as `compress` leaves it."""
    budget = budget or Budget(0.01)
    original = measurement()
    (folder / "trials").mkdir(parents=True)
    (folder / "baseline.json").write_text(json.dumps({"baseline": {"measurement": dataclasses.asdict(original)}}))
    for trial in trials:
        write_trial(folder, SETTINGS, trial)
    if finished:
        best = best_of(trials, budget) or nearest(trials, budget)
        result = search.Result(
            verdict="accepted" if best_of(trials, budget) else "infeasible",
            budget=budget,
            baseline=original,
            best=best.measurement if best else None,
            frontier=frontier(measurements(trials), budget),
            rejected=[],
            binding="" if best_of(trials, budget) else "max_drop",
            interrupted=False,
            late=False,
            seconds={"measure": 30.0, "distill_soft": 90.0},
            folder=folder,
        )
        (folder / "result.json").write_text(result.to_json())
    return folder


class Outline(html.parser.HTMLParser):
    """What a page is made of; complains about tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[str, str]:
    markdown, page = report.write(folder_of(tmp_path_factory.mktemp("search")))
    return markdown.read_text(), page.read_text()


def test_the_page_is_well_formed_and_loads_nothing(written):
    page = written[1]
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert not {tag for tag, _ in outline.tags} & {"script", "img", "link", "iframe", "object"}
    assert not [name for _, attrs in outline.tags for name in attrs if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in page and "@import" not in page and "://" not in page


def test_text_from_outside_is_escaped(written):
    markdown, page = written
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<script" not in markdown.replace("\\<", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|") and "alert" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) in (4, 10) for row in rows)


def test_light_and_dark_and_narrow(written):
    page = written[1]
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    outline = Outline()
    outline.feed(page)
    scrolling = [attrs for tag, attrs in outline.tags if attrs.get("class") == "wide"]
    tables = [tag for tag, _ in outline.tags if tag == "table"]
    assert len(scrolling) == len(tables) + 1  # each table and the plot scroll by themselves
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)


def luminance(colour: str) -> float:
    parts = (
        [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        if len(colour) == 7
        else [int(c * 2, 16) / 255 for c in colour[1:]]
    )
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_colour_can_be_read_in_both_themes():
    """4.5 to 1, as WCAG 2.2 asks (success criterion 1.4.3)."""
    themes = [
        dict(re.findall(r"--(\w+):(#\w+)", part))
        for part in report.STYLE.split("@media (prefers-color-scheme:dark)")[:2]
    ]
    for theme in themes:
        for ground in ("page", "panel"):
            for ink in ("ink", "soft", "good", "bad"):
                light, dark = sorted([luminance(theme[ground]), luminance(theme[ink])], reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)


def plotted(folder: Path) -> ET.Element:
    return ET.fromstring(report.plot(report.read(folder)))


def test_plot_has_one_mark_per_measured_trial_told_apart_by_shape(tmp_path):
    svg = plotted(folder_of(tmp_path / "a"))
    titles = {element.findtext("title"): element for element in svg if element.findtext("title")}
    assert set(titles) == {
        "original",
        "fold_batchnorm on onnxruntime",
        "fold_batchnorm + quantize_static on onnxruntime",
        "prune_magnitude 0.6 + quantize_static on onnxruntime",
        "prune_magnitude 0.9 + quantize_static on onnxruntime",
    }
    kinds = {
        name: (element.tag, element.get("class"), len(element.get("points", "").split()))
        for name, element in titles.items()
    }
    assert kinds["original"] == ("rect", "original", 0)
    assert kinds["fold_batchnorm on onnxruntime"] == ("circle", "accepted", 0)
    assert kinds["fold_batchnorm + quantize_static on onnxruntime"] == ("polygon", "best", 10)
    assert kinds["prune_magnitude 0.6 + quantize_static on onnxruntime"] == ("polygon", "rejected", 3)
    assert svg.get("role") == "img" and svg.findtext("title") and "0.6000" in (svg.findtext("desc") or "")
    assert {element.text for element in svg if element.tag == "text"} >= {
        "best",
        "original",
        "budget",
        "accepted",
        "rejected",
    }


def test_everything_lies_inside_the_picture(tmp_path):
    svg = plotted(folder_of(tmp_path / "a"))
    for element in svg.iter():
        for name, limit in (
            ("x", 720),
            ("x1", 720),
            ("x2", 720),
            ("cx", 720),
            ("y", 420),
            ("y1", 420),
            ("y2", 420),
            ("cy", 420),
        ):
            assert 0 <= float(element.get(name, 0)) <= limit


def test_an_outlier_does_not_squash_the_rest(tmp_path):
    svg = plotted(folder_of(tmp_path / "a"))
    lines = [float(element.get("x1", 0)) for element in svg if element.get("class") == "limit"]
    assert len(lines) == 1 and lines[0] > 200  # the budget is 0.01, the outlier 0.6


def test_lower_latency_is_lower_and_the_scale_logarithmic():
    scale = report.Scale(1.0, 100.0, 400.0, 0.0, log=True)
    assert (scale(1.0), scale(10.0), scale(100.0), scale(1000.0)) == (400.0, 200.0, 0.0, 0.0)


def test_faster_is_said_only_where_it_is_certain():
    sure = measurement(recipe(), latency_ms=2.0, drop=0.001)
    assert "4.00 times as fast as the original" in report.in_short(sure)
    doubtful = dataclasses.replace(sure, latency_ratio=1.02, latency_ratio_low=0.99)
    assert "not measurably faster" in report.in_short(doubtful)
    assert "not significant" in str(report.cards(doubtful)) and "times as fast" not in str(report.cards(doubtful))
    noisy = dataclasses.replace(sure, latency_ratio=1.1, latency_ratio_low=1.05, control_ratio_high=1.2)
    assert "not measurably faster" in report.in_short(noisy)
    assert "1.25 times larger" in report.in_short(dataclasses.replace(sure, bytes=50_000_000))


def test_markdown_says_it_all(written):
    markdown = written[0]
    assert markdown.startswith(
        "# Featherweight report\n\nAccepted: 5.71 times as fast as the original, 3.92 times smaller"
    )
    for words in (
        *(
            "## Budget",
            "## Trials",
            "## Doubts",
            "quantize\\_static",
            "× failed",
            "int8 90.0 %",
            "a processor",
            "8.00 GB",
        ),
        *("▲ rejected: the drop may be 0.014, above 0.01", "distill\\_soft | 90.0 s | 75.0 %"),
    ):
        assert words in markdown, words


def test_how_many_were_judged_and_what_the_choice_is_worth_is_said(written, tmp_path):
    assert "candidates were judged on the same" in written[1] and "chance of up to 5 %" in written[1]
    findings = report.read(folder_of(tmp_path / "out"))
    assert "No other data confirm it" in report.trust(findings)
    tested = dataclasses.replace(findings.best, test_drop=0.004, test_drop_upper=0.009)
    said = report.trust(dataclasses.replace(findings, best=tested))
    assert "The drop to go by is that on the test data" in said and "0.0040 (at most 0.0090)" in said
    alone = dataclasses.replace(findings, rows=findings.rows[:1])
    assert report.trust(alone).startswith("1 candidate was") and "luck" not in report.trust(alone)


def test_infeasible_names_the_bound(tmp_path):
    markdown, _ = report.write(folder_of(tmp_path / "a", TRIALS[2:4], Budget("1%", max_bytes=9_500_000)))
    text = markdown.read_text()
    assert "Infeasible: no trial keeps to the budget, max\\_drop binds. The nearest is 6.15 times as fast" in text
    assert "at most 0.0090 (1% of 0.9000)" in text


def test_a_search_that_goes_on_is_shown_without_a_verdict(tmp_path):
    markdown, page = report.write(folder_of(tmp_path / "a", finished=False))
    assert "has not ended" in markdown.read_text() and "○ measured" in markdown.read_text()
    assert "rejected" not in page.read_text().partition("<body>")[2]


def test_for_bytes_the_plot_shows_bytes(tmp_path):
    svg = plotted(folder_of(tmp_path / "a", budget=Budget(0.01, objective="bytes")))
    assert "size in MB" in {element.text for element in svg if element.tag == "text"}


def test_what_each_layer_bears_is_shown_beside_what_became_of_it(tmp_path):
    folder = folder_of(tmp_path, budget=Budget(0.01))
    options = [
        Option("conv1", "32 bits", 0.0, 4000.0),
        Option("conv1", "4 bits", 0.25, 520.0),
        Option(NASTY, "4 bits", 0.1, 9.0),
    ]
    (folder / "damages.json").write_text(json.dumps({"key": {}, "options": [dataclasses.asdict(o) for o in options]}))
    markdown, page = report.write(folder)
    said = markdown.read_text()
    assert "| layer | 32 bits | 4 bits | in the best |" in said
    assert re.search(r"\| conv1 \| 0, 4.00 kB \| 0.25, 520 bytes \| int8 per channel \|", said)
    assert NASTY not in page.read_text()
    (folder / "damages.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"damages\.json holds no table of this version"):
        report.write(folder)


@pytest.mark.parametrize("trials", [[], TRIALS[4:], TRIALS[:1]])
def test_few_trials(tmp_path, trials):
    report.write(folder_of(tmp_path / "a", trials))


def test_trials_of_other_settings_or_versions_are_left_out(tmp_path):
    folder = folder_of(tmp_path / "a", TRIALS[:1])
    write_trial(folder, dataclasses.replace(SETTINGS, threads=7), TRIALS[1])
    write_trial(folder, SETTINGS, dataclasses.replace(TRIALS[2], versions={"torch": "1.0", "onnxruntime": "1.0"}))
    assert len(report.read(folder).rows) == 1


def test_the_best_is_shown_as_it_was_measured_in_the_end(tmp_path):
    folder = folder_of(tmp_path / "a")
    result = json.loads((folder / "result.json").read_text())
    result["best"] |= {"latency_ms": 1.234}
    (folder / "result.json").write_text(json.dumps(result))
    assert "1.23 ms" in report.write(folder)[0].read_text()


@pytest.mark.parametrize("name", ["baseline.json", "result.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"baseline": {"measurement": {}}, "best": {"digest": 3}}'])
def test_broken_files_are_named(tmp_path, name, text):
    folder = folder_of(tmp_path / "a")
    (folder / name).write_text(text)
    with pytest.raises(ArtifactError, match=name):
        report.write(folder)


def test_a_folder_without_a_search_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no search.*--out"):
        report.write(tmp_path)


def test_predictions_stand_beside_what_was_measured(tmp_path):
    folder = folder_of(tmp_path / "search")
    before = report.write(folder)[0].read_text()
    rows = [Predicted(plain.digest, 5.4, 4.5), Predicted("f" * 16, 1.0, 1.0)]
    write_predictions(folder / "costs.json", rows)
    after = report.write(folder)[0].read_text()
    assert "What the cost table predicted" in after and "What the cost table predicted" not in before
    assert re.search(r"\| fold_batchnorm \| onnxruntime \| 5\.40 ms \| 4\.50 ms \| \+20% \|", after.replace("\\", ""))

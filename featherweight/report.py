"""The report: what lies in a search's folder, as `report.md` and as one page, `report.html`, that needs nothing else.

It measures nothing: trials on disk go in, text comes out. What is said is put together once, as a list of blocks,
and written twice.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.allocation import Option
from featherweight.artifact import write_text_atomic
from featherweight.cost_table import Predicted, relative_error, stored_predictions
from featherweight.damage_table import stored_table
from featherweight.errors import ArtifactError, FeatherweightError
from featherweight.knobs import Knob
from featherweight.measure import Measurement
from featherweight.trials import (
    BASELINE,
    COSTS,
    DAMAGES,
    RESULT,
    Budget,
    Trial,
    frontier,
    in_words,
    read_json,
    read_trials,
)

# ------------------------------------------------------------------------------------------------ what is known


@dataclass(frozen=True)
class Row:
    """One trial as the report shows it; `status` is best, accepted, rejected, failed, or measured (no verdict yet)."""

    name: str
    target: str
    status: str
    reason: str
    found: Measurement | None


@dataclass(frozen=True)
class Findings:
    """All that a search left behind; `verdict` is accepted, infeasible or unfinished."""

    verdict: str
    budget: Budget | None
    binding: str
    interrupted: bool
    late: bool
    original: Measurement
    best: Measurement | None
    rows: list[Row]
    seconds: dict[str, float]
    damages: Sequence[Option]
    knobs: Sequence[Knob]
    predicted: Sequence[Predicted]

    @property
    def objective(self) -> str:
        """What was made small."""
        return self.budget.objective if self.budget else "latency"

    @property
    def measured(self) -> list[Measurement]:
        """What was found of the trials that did not fail."""
        return [row.found for row in self.rows if row.found]


def write(folder: Path | str) -> tuple[Path, Path]:
    """`report.md` and `report.html` in the folder of a search, finished or not.

    Raises:
        ArtifactError: the folder holds no search, or cannot be written.
    """
    folder = Path(folder)
    blocks = list(document(read(folder)))
    markdown, page = folder / "report.md", folder / "report.html"
    write_text_atomic(markdown, as_markdown(blocks))
    write_text_atomic(page, as_html(blocks))
    return markdown, page


def read(folder: Path) -> Findings:
    """What lies in the folder of a search.

    Raises:
        ArtifactError: it holds no search, or a file of it cannot be read.
    """
    if not (folder / BASELINE).is_file():
        raise ArtifactError(
            f"{folder} holds no search: it has no {BASELINE}. Give the folder that `featherweight compress` "
            "wrote with --out."
        )
    original = _measurement(folder / BASELINE, ("baseline", "measurement"))
    result = read_json(folder / RESULT) if (folder / RESULT).is_file() else {}
    best = _measurement(folder / RESULT, ("best",)) if result.get("best") else None
    budget = _stored_budget(folder, result) if result else None
    rows = []
    for settings, trial in read_trials(folder):
        seed = best.seed if best else settings.seed  # another seed makes another artifact of the same recipe
        other = any(original.versions.get(name, version) != version for name, version in trial.versions.items())
        if not other and (settings.threads, settings.batch, settings.seed) == (original.threads, original.batch, seed):
            rows.append(_row(trial, budget, best if best and best.digest == trial.recipe.digest else None))
    return Findings(
        verdict=result.get("verdict", "unfinished"),
        budget=budget,
        binding=result.get("binding", ""),
        interrupted=result.get("interrupted", False),
        late=result.get("late", False),
        original=original,
        best=best,
        rows=rows,
        seconds=result.get("seconds", {}),
        damages=stored_table(folder / DAMAGES),
        knobs=_stored_knobs(folder, result),
        predicted=stored_predictions(folder / COSTS),
    )


def _stored_knobs(folder: Path, result: dict[str, Any]) -> list[Knob]:
    try:
        return [Knob(int(k["threads"]), int(k["batch"]), float(k["latency_ms"])) for k in result.get("knobs", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / RESULT} was written by hand: {error}. Run the search anew.") from error


def _stored_budget(folder: Path, result: dict[str, Any]) -> Budget:
    try:
        return Budget(**result["budget"])
    except (KeyError, TypeError, FeatherweightError) as error:
        raise ArtifactError(
            f"{folder / RESULT} was written by another version, or by hand: {error}. Run the search anew."
        ) from error


def _measurement(path: Path, keys: Sequence[str]) -> Measurement:
    found: Any = read_json(path)
    try:
        for key in keys:
            found = found[key]
        return Measurement.from_json(json.dumps(found))
    except (KeyError, TypeError, FeatherweightError) as error:
        raise ArtifactError(
            f"{path} was written by another version, or by hand: {error}. Run the search anew."
        ) from error


def _row(trial: Trial, budget: Budget | None, final: Measurement | None) -> Row:
    found = final or trial.measurement
    name, target = in_words(trial.recipe), trial.recipe.target
    if found is None:
        return Row(name, target, "failed", trial.error, None)
    if budget is None:
        return Row(name, target, "measured", "", found)
    reason = budget.objection(found)
    status = "rejected" if reason else "best" if final else "accepted"
    return Row(name, target, status, reason, found)


# ------------------------------------------------------------------------------------------------ figures in words


def number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, never in powers of ten.

    >>> number(1234.5), number(0.01234), number(8.0)
    ('1,234', '0.0123', '8.00')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 9)}f}"


def size(count: int | None) -> str:
    """Bytes for people.

    >>> size(44_700_000), size(900), size(None)
    ('44.7 MB', '900 bytes', 'unknown')
    """
    if count is None:
        return "unknown"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count} bytes"


def interval(value: float | None, low: float | None, high: float | None, form: Callable[[float], str] = number) -> str:
    """`value (low to high)`, without the part that is unknown."""
    if value is None:
        return "–"
    return form(value) if low is None or high is None else f"{form(value)} ({form(low)} to {form(high)})"


def points(value: float) -> str:
    """A score or a drop."""
    return f"{value + 0.0:.4f}"  # + 0.0: no minus before zero


# ------------------------------------------------------------------------------------------------ blocks


@dataclass(frozen=True)
class Heading:
    """Begins a section; `level` 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Cards:
    """Few large figures: value, what it is, and a remark."""

    items: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: list[str]


@dataclass(frozen=True)
class Table:
    """Rows of text; the columns in `numeric` stand to the right, and the first cells of rows name them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()
    folded: bool = False  # whether the page shows it on demand only


@dataclass(frozen=True)
class Code:
    """Text as it lies in a file."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A picture for the page; elsewhere its caption alone."""

    svg: str
    caption: str


Block = Heading | Text | Cards | Bullets | Table | Code | Figure
MARKS = {
    "best": "★ best",
    "accepted": "● accepted",
    "rejected": "▲ rejected",
    "failed": "× failed",
    "measured": "○ measured",
}


def document(findings: Findings) -> Iterator[Block]:
    """The report, block by block."""
    yield Heading("Featherweight report", 1)
    yield Text(headline(findings))
    if findings.best:
        yield Cards(cards(findings.best))
        yield before_and_after(findings.original, findings.best)
    yield from _budget(findings)
    if findings.measured:
        yield Heading("Cost and drop")
        yield Figure(plot(findings), _caption(findings))
    yield Heading("Trials")
    yield _trials(findings)
    if findings.measured:
        yield Text(trust(findings))
    yield from _notes(findings)


def headline(findings: Findings) -> str:
    """What came of it, in a sentence or two."""
    best = findings.best
    if findings.verdict == "unfinished":
        return "The search has not ended: this is what was found so far. Go on with --resume."
    if best is None:
        return f"Nothing was measured before the search ended ({findings.binding})."
    stopped = (
        " The search was interrupted: the best so far was measured briefly, and not on the test data."
        if findings.interrupted
        else " The time limit left no room for all trials."
        if findings.late
        else ""
    )
    if findings.verdict == "accepted":
        return f"Accepted: {in_short(best)}.{stopped}"
    return (
        f"Infeasible: no trial keeps to the budget, {findings.binding} binds. The nearest is {in_short(best)}.{stopped}"
    )


def in_short(best: Measurement) -> str:
    """Speed (if it is certain), size and drop; for the command line too."""
    speed = (
        f"{number(best.latency_ratio)} times as fast as the original"
        if best.faster
        else "not measurably faster than the original"
    )
    smaller = best.original_bytes / best.bytes
    weight = f"{number(smaller)} times smaller" if smaller >= 1 else f"{number(1 / smaller)} times larger"
    drop = f"drop of the score {points(best.drop)} (at most {points(best.drop_upper)})"
    if best.test_drop is None or best.test_drop_upper is None:
        return f"{speed}, {weight}, {drop}"
    return f"{speed}, {weight}, {drop}, on test data {points(best.test_drop)} (at most {points(best.test_drop_upper)})"


def cards(best: Measurement) -> list[tuple[str, str, str]]:
    """The figures that people look for first."""
    ratio = interval(best.latency_ratio, best.latency_ratio_low, best.latency_ratio_high)
    value, _, remark = ratio.partition(" (")
    speed = ("times as fast", f"95 %: {remark.rstrip(')')}") if best.faster else ("latency ratio", "not significant")
    test = (
        []
        if best.test_drop is None
        else [(points(best.test_drop), "drop on test data", f"at most {points(best.test_drop_upper or 0.0)}")]
    )
    return [
        (f"{value}×", *speed),
        (
            f"{number(best.original_bytes / best.bytes)}×",
            "smaller",
            f"{size(best.original_bytes)} to {size(best.bytes)}",
        ),
        (points(best.drop), "drop of the score", f"at most {points(best.drop_upper)}"),
        *test,
    ]


def before_and_after(original: Measurement, best: Measurement) -> Table:
    """The original beside the best."""

    def scored(found: Measurement, prefix: str) -> str:
        value, low, high = (getattr(found, f"{prefix}score{ending}") for ending in ("", "_low", "_high"))
        return interval(value, low, high, points)

    def ratio(found: Measurement, prefix: str) -> str:
        value, low, high = (getattr(found, f"{prefix}_ratio{ending}") for ending in ("", "_low", "_high"))
        return interval(value, low, high)

    rows = [
        ["score", scored(original, ""), scored(best, "")],
        ["score on test data", scored(original, "test_"), scored(best, "test_")],
        ["size of files", size(best.original_bytes), size(best.bytes)],
        ["stored weights", f"{best.original_parameters:,}", f"{best.parameters:,}"],
        ["latency", f"{number(best.original_latency_ms)} ms", f"{number(best.latency_ms)} ms"],
        ["latency of the original over this", ratio(best, "control"), ratio(best, "latency")],
        ["latency of the best fp32 runtime over this", "–", ratio(best, "versus_runtime")],
        ["peak memory", size(best.original_peak_rss_bytes), size(best.peak_rss_bytes)],
        ["outputs that agree", "100 %", _percent(best.fidelity.get("agreement"))],
    ]  # fmt: skip
    rows = [row for row in rows if row[2] != "–"]
    title = f"Before and after: batch {best.batch}, {best.threads} threads, 95 % intervals in brackets"
    return Table(title, ["", "original", f"best, on {best.target}"], rows, frozenset({1, 2}))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _budget(findings: Findings) -> Iterator[Block]:
    if findings.budget is None:
        return
    budget, original = findings.budget, findings.original
    allowed = points(budget.allowed(original.score))
    yield Heading("Budget")
    bounds = [
        f"Drop of the score: at most {allowed}"
        + (f" ({budget.max_drop} of {points(original.score)})" if isinstance(budget.max_drop, str) else "")
    ]
    if budget.max_bytes is not None:
        bounds.append(f"Size: at most {size(budget.max_bytes)}")
    if budget.max_ram is not None:
        bounds.append(f"Memory: at most {size(budget.max_ram)}")
    if budget.max_latency_ms is not None:
        bounds.append(f"Latency: at most {number(budget.max_latency_ms)} ms")
    extreme = "large" if budget.objective == "throughput" else "small"
    yield Bullets([*bounds, f"Made as {extreme} as that allows: {budget.objective}"])


def trust(findings: Findings) -> str:
    """How many candidates were judged on the same examples, and what guards against picking one for its luck."""
    count, original, best = len(findings.measured), findings.original, findings.best
    judged = "candidate was" if count == 1 else "candidates were"
    said = f"{count} {judged} judged on the same {original.examples} examples."
    if count > 1:
        said += (
            " Each that drops more than is allowed has a chance of up to 5 % to pass nevertheless, and what is picked "
            "among many is picked for its luck too."
        )
    if best is None or best.test_drop is None or best.test_drop_upper is None:
        return f"{said} No other data confirm it: the drop may be larger than it seems here."
    return (
        f"{said} The drop to go by is that on the test data, on which the best alone was run: "
        f"{points(best.test_drop)} (at most {points(best.test_drop_upper)})."
    )


def _trials(findings: Findings) -> Table:
    columns = ["recipe", "target", "verdict", "score", "drop", "drop at most", "size", "latency", "latency ratio"]
    rows = []
    for row in findings.rows:
        verdict = MARKS[row.status] + (f": {row.reason}" if row.reason else "")
        cells = ["–"] * 6
        if m := row.found:
            ratio = interval(m.latency_ratio, m.latency_ratio_low, m.latency_ratio_high)
            cells = [
                points(m.score),
                points(m.drop),
                points(m.drop_upper),
                size(m.bytes),
                f"{number(m.latency_ms)} ms",
                ratio,
            ]
        rows.append([row.name, row.target, verdict, *cells])
    title = f"All {len(rows)} trials, in the order in which they were made"
    return Table(title, columns, rows, frozenset(range(3, 9)))


def _notes(findings: Findings) -> Iterator[Block]:
    shown = findings.best or findings.original
    yield Heading("Doubts")
    yield Bullets(shown.doubts) if shown.doubts else Text("None was found.")
    if findings.best:
        yield from _about_best(findings.best)
    if findings.knobs:
        yield Heading("How it runs best")
        rows = [
            [str(k.threads), str(k.batch), f"{number(k.latency_ms)} ms", number(k.examples_per_s)]
            for k in findings.knobs
        ]
        yield Table(
            "The best artifact by threads and inputs per run",
            ["threads", "inputs per run", "latency", "inputs per second"],
            rows,
            frozenset(range(4)),
        )
    if findings.damages:
        yield Heading("What each layer bears")
        yield _damages(findings.damages, findings.best)
    if rows := _predictions(findings):
        yield Heading("What the cost table predicted")
        columns = ["trial", "target", "predicted", "measured", "error"]
        yield Table("Latency before and after it was measured", columns, rows, frozenset({2, 3, 4}), folded=True)
    if findings.seconds:
        yield Heading("Where the time went")
        spent = sorted(findings.seconds.items(), key=lambda item: -item[1])
        total = sum(findings.seconds.values())
        rows = [[stage, f"{seconds:.1f} s", _percent(seconds / total if total else 0.0)] for stage, seconds in spent]
        yield Table(f"{total:.0f} seconds in all", ["stage", "seconds", "share"], rows, frozenset({1, 2}))
    yield Heading("Machine and versions")
    facts = [[name, _plain(name, value)] for name, value in shown.machine.items() if value is not None]
    yield Table(
        "Where it was measured", ["", ""], [*facts, *([name, version] for name, version in shown.versions.items())]
    )


def _about_best(best: Measurement) -> Iterator[Block]:
    yield Heading("The best recipe")
    yield Code(best.recipe)
    if best.kernels:
        shares = ", ".join(
            f"{precision} {_percent(share)}"
            for precision, share in sorted(best.kernels.items(), key=lambda item: -item[1])
        )
        yield Text(f"Time by precision, as {best.target} itself reports it: {shares}.")
    rows = [[row.get("layer") or "the network", row.get("done", "–"), row.get("skipped", "–")] for row in best.coverage]
    if rows:
        yield Table(
            f"What was done to each layer ({len(rows)} entries)", ["layer", "done", "left, and why"], rows, folded=True
        )


def _damages(table: Sequence[Option], best: Measurement | None) -> Table:
    """A row for each layer: what each way to store it does to the outputs, and what became of it in the best."""
    ways = list(dict.fromkeys(option.choice for option in table))
    done = {row.get("layer", ""): row.get("done", "–") for row in best.coverage} if best else {}
    layers: dict[str, dict[str, str]] = {}
    for option in table:
        layers.setdefault(option.layer, {})[option.choice] = f"{option.damage:.2g}, {size(round(option.cost))}"
    rows = [
        [name, *(found.get(way, "–") for way in ways), done.get(name.partition(", ")[0], "–")]
        for name, found in layers.items()
    ]
    title = "Relative squared error of the outputs, and bytes, where one layer alone is stored in fewer bytes"
    return Table(title, ["layer", *ways, "in the best"], rows, frozenset(range(1, 1 + len(ways))), folded=True)


def _predictions(findings: Findings) -> list[list[str]]:
    """A row for each trial of which there is a prediction, and how far off that was."""
    named = {row.found.digest: row for row in findings.rows if row.found}
    return [
        [
            named[one.digest].name,
            named[one.digest].target,
            f"{number(one.predicted_ms)} ms",
            f"{number(one.measured_ms)} ms",
            f"{relative_error(one.predicted_ms, one.measured_ms):+.0%}",
        ]
        for one in findings.predicted
        if one.digest in named
    ]


def _plain(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return size(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _caption(findings: Findings) -> str:
    cost = "size" if findings.objective == "bytes" else "latency"
    return (
        f"Each mark is a trial: how much of the score it loses (to the right) and its {cost} (upwards, logarithmic); "
        "lower left is better. Whiskers end at bounds of 95 % each. The line joins the trials that no other beats in "
        "both. Marks at the right edge lie beyond it."
    )


# ------------------------------------------------------------------------------------------------ markdown


def as_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_inline(text)}"
        case Text(text) | Figure(_, text):
            return _inline(text)
        case Cards(items):
            return "\n".join(
                f"- **{_inline(value)}** {_inline(what)} ({_inline(remark)})" for value, what, remark in items
            )
        case Bullets(items):
            return "\n".join(f"- {_inline(item)}" for item in items)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Table(title, columns, rows, numeric, _):
            rule = ["---:" if index in numeric else "---" for index in range(len(columns))]
            lines = [
                [_inline(column) or " " for column in columns],
                rule,
                *([_inline(cell) for cell in row] for row in rows),
            ]
            return f"{_inline(title)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


# ------------------------------------------------------------------------------------------------ the page


class Markup(str):
    """Text that is markup already; everything else is escaped."""


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """One element of HTML or SVG. Underscores in names of attributes stand for dashes; `class_` is `class`.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for name, value in attributes.items()
    )
    inside = "".join(child if isinstance(child, Markup) else html.escape(child) for child in children)
    return Markup(f"<{tag}{given}>{inside}</{tag}>")


def as_html(blocks: Sequence[Block]) -> str:
    """The blocks as one page that loads nothing."""
    body = element("main", *(_html(block) for block in blocks))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Featherweight report</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _html(block: Block) -> Markup:
    match block:
        case Heading(text, level):
            return element(f"h{level}", text)
        case Text(text):
            return element("p", text)
        case Cards(items):
            return element("div", *(_card(*item) for item in items), class_="cards")
        case Bullets(items):
            return element("ul", *(element("li", item) for item in items))
        case Code(text):
            return element("pre", element("code", text), tabindex=0)
        case Figure(svg, caption):
            picture = element("div", Markup(svg), class_="wide", tabindex=0, role="region", aria_label="Plot")
            return element("figure", picture, element("figcaption", caption))
        case Table():
            return _table(block)


def _card(value: str, what: str, remark: str) -> Markup:
    return element("div", element("strong", value), element("span", what), element("small", remark))


def _table(table: Table) -> Markup:
    def cell(index: int, text: str) -> Markup:
        kind = {"class_": "number"} if index in table.numeric else {}
        status = next((name for name, mark in MARKS.items() if text.startswith(mark)), None)
        if status:
            mark, rest = text[: len(MARKS[status])], text[len(MARKS[status]) :]
            return element("td", element("span", mark, class_=status), rest, **kind)
        return element("th", text, scope="row") if index == 0 else element("td", text, **kind)

    numeric = [{"class_": "number"} if index in table.numeric else {} for index in range(len(table.columns))]
    head = element(
        "tr", *(element("th", name, scope="col", **kind) for name, kind in zip(table.columns, numeric, strict=True))
    )
    rows = [element("tr", *(cell(index, text) for index, text in enumerate(row))) for row in table.rows]
    columns = [element("thead", head)] if any(table.columns) else []
    caption = [] if table.folded else [element("caption", table.title)]
    grid = element("table", *caption, *columns, element("tbody", *rows))
    wide = element("div", grid, class_="wide", tabindex=0, role="region", aria_label=table.title)
    return element("details", element("summary", table.title), wide) if table.folded else wide


STYLE = """
:root{--page:#fff;--ink:#1c2024;--soft:#5b636c;--line:#d9dde2;--panel:#f5f7f9;
--good:#0b6bb5;--bad:#b3440b;--shade:#b3440b14}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e8eaed;--soft:#a3abb3;--line:#343a41;--panel:#1d2125;
--good:#6cb8f5;--bad:#f59b62;--shade:#f59b621a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:64rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem}
p,li,figcaption{max-width:46rem;overflow-wrap:anywhere}
h1+p{font-size:1.15rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.5rem 0}
.cards div,pre{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.8rem 1rem}
.cards div{display:flex;flex-direction:column}
.cards strong{font-size:1.8rem;line-height:1.2;font-variant-numeric:tabular-nums}
small,figcaption,caption{color:var(--soft);font-size:.875rem}
.wide{overflow-x:auto;margin:1rem 0}
.wide:focus-visible,pre:focus-visible,summary:focus-visible{outline:2px solid var(--good);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;padding-bottom:.4rem}
th,td{text-align:left;vertical-align:top;padding:.4rem .75rem .4rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:400;min-width:8.5rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td:not(.number){min-width:8.5rem;overflow-wrap:anywhere}
td span{white-space:nowrap;font-weight:600}
.best,.accepted{color:var(--good)}.rejected,.failed{color:var(--bad)}
pre{overflow-x:auto}
figure{margin:0}
summary{cursor:pointer}
svg{display:block;width:100%;min-width:34rem;height:auto;font:13px system-ui,sans-serif}
svg text{fill:var(--ink);stroke:none!important}svg .soft{fill:var(--soft)}
svg .grid{stroke:var(--line)}svg .limit{stroke:var(--bad);stroke-dasharray:5 4}svg .shade{fill:var(--shade)}
svg .frontier{stroke:var(--soft);fill:none;stroke-width:1.5}
svg .accepted,svg .best{fill:var(--good);stroke:var(--good)}svg .rejected{fill:var(--bad);stroke:var(--bad)}
svg .measured{fill:var(--page);stroke:var(--good);stroke-width:2}svg .original{fill:var(--ink);stroke:var(--ink)}
svg .whisker{opacity:.55;stroke-width:1.5}
@media print{.wide{overflow:visible}}
"""

# ------------------------------------------------------------------------------------------------ the plot

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 48, 56


@dataclass(frozen=True)
class Mark:
    """A point of the plot with its whiskers."""

    label: str
    status: str
    drop: tuple[float, float, float]  # low, value, high
    cost: tuple[float, float, float]


@dataclass(frozen=True)
class Scale:
    """From values to places on the picture; `log` for costs, which are positive."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of `value`, which is brought to the edge where it lies beyond."""
        low, high, at = (
            map(math.log, (self.low, self.high, max(value, 1e-12))) if self.log else (self.low, self.high, value)
        )
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return round(self.begin + share * (self.end - self.begin), 1)


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round values from `low` to `high`.

    >>> ticks(0.0, 0.05), ticks(0.8, 30.0, log=True)
    ([0.0, 0.01, 0.02, 0.03, 0.04, 0.05], [1.0, 2.0, 5.0, 10.0, 20.0])
    """
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [float(f"{digit}e{power}") for power in decades for digit in (1, 2, 5)]
    else:
        step = next(s for p in range(-9, 10) for d in (1, 2, 5) if (s := float(f"{d}e{p}")) * 6 >= high - low)
        values = [float(f"{step * index:.9g}") for index in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9) or value == low]


def plot(findings: Findings) -> Markup:
    """Cost over drop of all trials, as SVG."""
    marks, limit = _marks(findings), findings.budget.allowed(findings.original.score) if findings.budget else None
    x, y = _scales(findings, marks, limit)
    parts = [
        *_axes(x, y, findings.objective),
        *_limit(x, limit),
        _frontier(findings, x, y),
        *(part for mark in marks for part in _drawn(mark, x, y)),
        *_labels(marks, x, y),
        *_legend(sorted({mark.status for mark in marks}, key=[*MARKS, "original"].index)),
    ]
    title = f"{'Size' if findings.objective == 'bytes' else 'Latency'} over drop of the score, one mark per trial"
    told = "; ".join(_told(mark, findings.objective) for mark in marks)
    names = {"role": "img", "aria_labelledby": "plot-title plot-desc"}
    return element(
        "svg",
        element("title", title, id="plot-title"),
        element("desc", told, id="plot-desc"),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        **names,
    )


def _marks(findings: Findings) -> list[Mark]:
    original = findings.original
    marks = [_mark("original", "original", original, findings.objective)]
    return marks + [
        _mark(f"{row.name} on {row.target}", row.status, row.found, findings.objective)
        for row in findings.rows
        if row.found
    ]


def _mark(label: str, status: str, m: Measurement, objective: str) -> Mark:
    low = m.drop if m.drop_low is None else m.drop_low
    if objective == "bytes":
        cost = (m.bytes / 1e6,) * 3
    else:
        slow, fast = m.latency_ratio_low, m.latency_ratio_high
        cost = (m.latency_ms, m.latency_ms, m.latency_ms)
        if slow > 0 and math.isfinite(fast):
            cost = (m.latency_ms * m.latency_ratio / fast, m.latency_ms, m.latency_ms * m.latency_ratio / slow)
    return Mark(label, status, (low, m.drop, max(m.drop, m.drop_upper)), cost)


def _scales(findings: Findings, marks: Sequence[Mark], limit: float | None) -> tuple[Scale, Scale]:
    """Wide enough for what matters: the budget, the original and what is accepted; outliers go to the edge."""
    near = [m.drop[2] for m in marks if m.status != "rejected"]
    far = max(m.drop[2] for m in marks)
    wanted = max(*near, 3 * (limit or 0.0), 1e-4)
    low, high = min(0.0, *(m.drop[0] for m in marks)), min(far, wanted) if far > 0 else wanted
    high = max(high, 1.15 * (limit or 0.0), 1e-4)
    margin = 0.06 * (high - low)
    costs = [value for m in marks for value in m.cost]
    x = Scale(low - margin, high + margin, LEFT, WIDTH - RIGHT)
    y = Scale(min(costs) / 1.3, max(costs) * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    return x, y


def _axes(x: Scale, y: Scale, objective: str) -> Iterator[Markup]:
    floor, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    for value in ticks(x.low, x.high):
        yield _line(x(value), TOP, x(value), floor, "grid")
        yield _text(x(value), floor + 18, f"{value:g}", "soft", "middle")
    for value in ticks(y.low, y.high, log=True):
        yield _line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")
        yield _text(LEFT - 8, y(value) + 4, f"{value:,g}", "soft", "end")
    yield _text(middle, HEIGHT - 14, "drop of the score", "", "middle")
    name = "size in MB" if objective == "bytes" else "latency in ms"
    yield element("text", name, transform=f"translate(18 {(TOP + floor) / 2}) rotate(-90)", text_anchor="middle")


def _limit(x: Scale, limit: float | None) -> Iterator[Markup]:
    if limit is None:
        return
    place = x(limit)
    yield element(
        "rect", x=place, y=TOP, width=round(WIDTH - RIGHT - place, 1), height=HEIGHT - TOP - BOTTOM, class_="shade"
    )
    yield _line(place, TOP, place, HEIGHT - BOTTOM, "limit")
    yield _text(place, TOP - 6, "budget", "rejected", "middle")


def _frontier(findings: Findings, x: Scale, y: Scale) -> Markup:
    budget = findings.budget or Budget(0.0)
    by_bytes = findings.objective == "bytes"
    places = [(x(m.drop), y(m.bytes / 1e6 if by_bytes else m.latency_ms)) for m in frontier(findings.measured, budget)]
    steps = [f"M{places[0][0]} {places[0][1]}"] + [f"L{px} {py}" for px, py in places[1:]]
    return element("path", d="".join(steps), class_="frontier")


def _drawn(mark: Mark, x: Scale, y: Scale) -> Iterator[Markup]:
    px, py = x(mark.drop[1]), y(mark.cost[1])
    yield _line(x(mark.drop[0]), py, x(mark.drop[2]), py, f"{mark.status} whisker")
    yield _line(px, y(mark.cost[0]), px, y(mark.cost[2]), f"{mark.status} whisker")
    yield _shape(mark.status, px, py, mark.label)


def _shape(status: str, x: float, y: float, label: str = "") -> Markup:
    """Marks differ in shape as well as in colour."""
    title = [element("title", label)] if label else []
    if status == "best":
        turns = [(9.5 if i % 2 == 0 else 4.2, math.radians(36 * i - 90)) for i in range(10)]
        corners = " ".join(f"{x + r * math.cos(a):.1f},{y + r * math.sin(a):.1f}" for r, a in turns)
        return element("polygon", *title, points=corners, class_="best")
    if status == "rejected":
        return element("polygon", *title, points=f"{x},{y - 6} {x + 6},{y + 5} {x - 6},{y + 5}", class_="rejected")
    if status == "original":
        return element("rect", *title, x=round(x - 5, 1), y=round(y - 5, 1), width=10, height=10, class_="original")
    return element("circle", *title, cx=x, cy=y, r=5, class_=status)


def _labels(marks: Sequence[Mark], x: Scale, y: Scale) -> Iterator[Markup]:
    for mark in marks:
        if mark.status in ("best", "original"):
            px, py = x(mark.drop[1]), y(mark.cost[1])
            left = px > (LEFT + WIDTH - RIGHT) / 2
            yield _text(px + (-13 if left else 13), py - 9, mark.status, "", "end" if left else "start", weight="600")


def _legend(statuses: Sequence[str]) -> Iterator[Markup]:
    place = LEFT
    for status in statuses:
        yield _shape(status, place + 6, 16)
        yield _text(place + 18, 20, status, "", "start")
        place += 40 + 8 * len(status)


def _told(mark: Mark, objective: str) -> str:
    unit = "MB" if objective == "bytes" else "ms"
    return f"{mark.label}: {mark.status}, drop {points(mark.drop[1])}, {number(mark.cost[1])} {unit}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(x: float, y: float, text: str, kind: str, anchor: str, weight: str = "400") -> Markup:
    return element("text", text, x=round(x, 1), y=round(y, 1), class_=kind, text_anchor=anchor, font_weight=weight)

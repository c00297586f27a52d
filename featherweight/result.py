"""What a search found, as data, as JSON and in words. How a page shows it is `report`'s affair."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.knobs import Knob
from featherweight.measure import Measurement
from featherweight.recipe import Recipe
from featherweight.trials import Budget, in_words


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found.

    Args:
        verdict: "accepted", or "infeasible": then `best` is the nearest point; "unfinished" while the search goes on,
            when `best` is the best so far.
        binding: the bound that no trial met, or why nothing was measured; empty when accepted.
        interrupted: whether a signal ended it.
        late: whether the time limit ended it, before it had tried all that it would have.
        baseline: of the original.
        best: measured fully and on `test_score` too, unless the search was interrupted.
        frontier: the trials that none beats both in cost and in drop.
        rejected: the others' digests, recipes and reasons, with what was measured of them.
        seconds: where the time went, by stage. What a pool of processes built and judged side by side is one stage,
            `pool`; how long each of its networks took is told with the trials.
        knobs: the best by threads and inputs per run, those of the search first; empty where there was no time for it.
    """

    verdict: str
    budget: Budget
    baseline: Measurement | None
    best: Measurement | None
    frontier: list[Measurement]
    rejected: list[dict[str, Any]]
    binding: str
    interrupted: bool
    late: bool
    seconds: dict[str, float]
    folder: Path
    knobs: list[Knob] = field(default_factory=list)

    def to_json(self) -> str:
        """As `result.json` holds it."""
        values = dataclasses.asdict(self)
        del values["folder"]
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    def explain(self) -> str:
        """Why it is this recipe: what was tried, what bound, and what each layer got; some lines of text."""
        return "\n".join([*self._told_trials(), "", self._told_verdict(), *self._told_layers()])

    def _told_trials(self) -> list[str]:
        better = [found for found in self.frontier if found.digest not in {row["digest"] for row in self.rejected}]
        tried = len(self.rejected) + len(better)
        lines = [f"Tried and not taken, of at least {tried} recipes:"]
        for row in self.rejected:
            lines.append(f"  {in_words(Recipe.from_yaml(row['recipe']))} on {row['target']}: {_short(row['reason'])}")
        for found in better:
            if self.best is None or found.digest != self.best.digest:
                words = in_words(Recipe.from_yaml(found.recipe))
                lines.append(f"  {words} on {found.target}: kept to the budget, but is no better ({figures(found)})")
        return lines

    def _told_verdict(self) -> str:
        if self.best is None:
            return f"{self.verdict}: nothing was measured ({self.binding})."
        words = f"{in_words(Recipe.from_yaml(self.best.recipe))} on {self.best.target}, {figures(self.best)}"
        if self.verdict == "infeasible":
            return f"Infeasible: no recipe keeps to {self.binding}. The nearest is {words}."
        closest = max(self._beyond(), key=self.budget.cost, default=None)
        bound = "" if closest is None else f" What is next did not: {self.budget.objection(closest)}."
        extreme = "largest" if self.budget.objective == "throughput" else "smallest"
        said = (
            f"{self.verdict.capitalize()}: {words}, has the {extreme} {self.budget.objective} that keeps to the budget."
        )
        return said + bound

    def _beyond(self) -> list[Measurement]:
        """Of the frontier, what would be smaller than the best, had it kept to the budget."""
        assert self.best is not None
        least = self.budget.cost(self.best)
        return [found for found in self.frontier if self.budget.cost(found) < least and self.budget.objection(found)]

    def _told_layers(self) -> list[str]:
        rows = self.best.coverage if self.best else []
        return [f"  {row['layer']}: {row.get('done') or 'left: ' + row.get('skipped', '')}" for row in rows]


def figures(found: Measurement) -> str:
    """The most important of a measurement on one line."""
    drop = "" if found.digest == "original" else f" (drop at most {found.drop_upper:.4f})"
    return f"score {found.score:.4f}{drop}, {found.bytes / 1e6:.2f} MB, {found.latency_ms:.3g} ms"


def _short(reason: str, most: int = 160) -> str:
    """
    >>> _short("a  b\\nc"), _short("abcdef", most=4)
    ('a b c', 'abc…')
    """
    said = " ".join(reason.split())
    return said if len(said) <= most else said[: most - 1] + "…"

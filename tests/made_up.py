"""Measurements of networks that do not exist, for tests of what is decided and shown on their grounds."""

from __future__ import annotations

from typing import Any

from featherweight.measure import Measurement
from featherweight.recipe import Recipe

SAMPLES = [[1.0, 1.1], [1.0, 1.2], [0.9, 1.0]]


def measurement(recipe: Recipe | None = None, **changes: Any) -> Measurement:
    """Of a classifier that scores 0.9 and whose original takes 8 ms and 40 MB; `changes` replace fields."""
    drop, latency = changes.get("drop", 0.0), changes.get("latency_ms", 8.0)
    ratio = 8.0 / latency
    values: dict[str, Any] = {
        "digest": recipe.digest if recipe else "original",
        "recipe": recipe.to_yaml() if recipe else "",
        "target": recipe.target if recipe else "eager",
        "seed": 0,
        "threads": 2,
        "batch": 1,
        "examples": 1000,
        "score": 0.9 - drop,
        "score_low": 0.88 - drop,
        "score_high": 0.92 - drop,
        "original_score": 0.9,
        "drop": drop,
        "drop_low": drop - 0.002,
        "drop_upper": drop + 0.002 if drop else 0.0,
        "test_score": None,
        "test_score_low": None,
        "test_score_high": None,
        "test_drop": None,
        "test_drop_low": None,
        "test_drop_upper": None,
        "bytes": 40_000_000,
        "packed_bytes": None,
        "original_bytes": 40_000_000,
        "parameters": 10_000_000,
        "original_parameters": 10_000_000,
        "latency_ms": latency,
        "latency_ms_samples": SAMPLES,
        "original_latency_ms": 8.0,
        "original_latency_ms_samples": SAMPLES,
        "latency_ratio": ratio,
        "latency_ratio_low": 0.95 * ratio,
        "latency_ratio_high": 1.06 * ratio,
        "versus_runtime_ratio": None,
        "versus_runtime_ratio_low": None,
        "versus_runtime_ratio_high": None,
        "control_ratio": 1.0,
        "control_ratio_low": 0.99,
        "control_ratio_high": 1.01,
        "peak_rss_bytes": 100_000_000,
        "original_peak_rss_bytes": 400_000_000,
        "fidelity": {"agreement": 0.98, "relative_error": 0.03},
        "coverage": [],
        "kernels": {},
        "waiting_share": {},
        "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": 8_000_000_000},
        "versions": {"torch": "2.13.0"},
        "doubts": [],
    }
    return Measurement(**{**values, **changes})

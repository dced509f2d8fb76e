"""Results as a picture: parts of the limit as bars, and times against sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import BY_ELEMENTS, SCALING_KINDS
from bench.environment import device_name
from bench.results import Result
from bench.tasks import STEP
from bench.timing import median, spread

# Ours are saturated, the others keep one pale color each throughout the picture.
_OURS = ("#c1121f", "#e76f51", "#780000")
_OTHERS = ("#264653", "#457b9d", "#8d99ae", "#2a9d8f", "#8ab17d", "#b5838d", "#6d597a", "#bfa5a0")


def _colors(results: Sequence[Result]) -> dict[str, str]:
    names = {row.name: row.ours for result in results for row in result.rows if row.timed}
    ours = [name for name, mine in names.items() if mine]
    others = [name for name, mine in names.items() if not mine]
    return {
        **{name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)},
        **{name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)},
    }


def _label(result: Result) -> str:
    text = result.case.name.replace("-float32", "\nfloat32").replace("-bfloat16", "\nbfloat16")
    return f"{result.rule.name}\n{text}" + ("*" if result.case.note else "")


def _roofline(axes: Any, results: Sequence[Result], colors: dict[str, str]) -> None:
    """Percent of the limit, a group of bars for each case."""
    names = [n for n in colors if any(r.name == n and r.timed for x in results for r in x.rows)]
    width = 0.85 / max(1, len(names))
    for index, name in enumerate(names):
        places, heights = [], []
        for place, result in enumerate(results):
            for row in result.rows:
                of_limit = result.of_limit(row) if row.name == name else None
                if of_limit is not None:
                    places.append(place + (index - (len(names) - 1) / 2) * width)
                    heights.append(100 * of_limit)
        axes.bar(places, heights, width, label=name, color=colors[name])
    axes.axhline(100, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(results)), [_label(result) for result in results], fontsize=8)
    axes.set_ylabel("% of the memory's limit in the same run")
    axes.set_title("What a step reaches of what the memory allows (* cut to fit)")
    axes.legend(fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _scaling(axes: Any, results: Sequence[Result], colors: dict[str, str], kind: str) -> None:
    """Time of a step against the size of the list."""
    for name, color in colors.items():
        points = []
        for result in results:
            count = result.case.elements if kind == BY_ELEMENTS else result.case.tensors
            for row in result.rows:
                if row.name == name and row.series is not None and row.timed:
                    middle = median(row.series.wall)
                    points.append((count, middle * 1e6, middle * spread(row.series.wall) * 1e6))
        if points:
            counts, times, errors = zip(*sorted(points), strict=True)
            width = 2.5 if color in _OURS else 1.2
            axes.errorbar(
                counts,
                times,
                errors,
                label=name,
                color=color,
                linewidth=width,
                marker=".",
                capsize=2,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("µs a step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if kind == BY_ELEMENTS:
        axes.set_title("One tensor of more and more elements")
        axes.set_xlabel("elements (float32)")
    else:
        axes.set_title("More and more tensors of 1000 elements")
        axes.set_xlabel("tensors (float32)")


def draw(path: Path, results: Sequence[Result]) -> str:
    """Draws what there is something for.

    Args:
        path: a PNG file to write.
        results: of a run.

    Returns:
        Why there is no picture; empty if there is.
    """
    bars = [result for result in results if any(map(result.of_limit, result.rows))]
    kinds = [
        kind
        for kind in SCALING_KINDS
        if any(result.case.kind == kind and result.first for result in results)
    ]
    bars = [r for r in bars if r.case.task is STEP and r.case.kind not in SCALING_KINDS]
    if not bars and not kinds:
        return "nothing to draw: no case runs from memory, and no scaling was measured"
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        return f"matplotlib cannot be imported ({error})"
    colors = _colors(results)
    layout = [["bars"] * 2] * bool(bars) + [kinds if len(kinds) == 2 else kinds * 2] * bool(kinds)
    figure, axes = plt.subplot_mosaic(
        layout,
        figsize=(max(11.0, 1.3 * len(bars)), 5.5 * len(layout)),
        layout="constrained",
    )
    rules = dict.fromkeys(result.rule.name for result in results)
    figure.suptitle(f"{', '.join(rules)} on {device_name(results[0].device)}")
    if bars:
        _roofline(axes["bars"], bars, colors)
    for kind in kinds:
        points = [result for result in results if result.case.kind == kind]
        _scaling(axes[kind], points, colors, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return ""

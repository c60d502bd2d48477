"""Charts of a classifier's results.

Charts come as PNG for papers and slides, and as SVG that takes the colours of the page it is in. Text in an SVG stays
text in the font of the page, so it is sharp and readable wherever the page is opened. A PNG needs a font on the machine
that draws it; names of labels that no font covers are replaced by their numbers.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from lmscripts.evaluation.metrics import by_row

INK = "#24292f"  # in an SVG it becomes the colour of the page's text
BLUE, ORANGE, GREEN, RED = "#3572d6", "#d9770a", "#2a9d6b", "#c8415b"
_COLORS = (BLUE, ORANGE, GREEN, RED, "#8a5fc7", "#5f7d8c")
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 10),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.edgecolor": f"{INK}80", "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.12},
    "svg.fonttype": "none",
}
_FONTS = "DejaVu Sans,Noto Sans CJK JP,Noto Sans JP,IPAexGothic,IPAGothic,TakaoGothic,Hiragino Sans,Yu Gothic,MS Gothic"
_FONTS += ",WenQuanYi Zen Hei"
_MOST_NAMED_CELLS = 20  # a confusion matrix with more labels has no numbers in its cells
_MOST_NAMES = 60  # ... and with more than these their numbers instead of names
MOST_LABELS_IN_MATRIX = 40  # a page shows a table of as many labels, and a picture of more

Chart = tuple[Markup, bytes]  # SVG, PNG


def draw_all(numbers: Mapping[str, Any]) -> tuple[dict[str, Markup], dict[str, bytes]]:
    """Every chart that the numbers of a report allow: name -> HTML (an SVG, as a rule), name -> PNG."""
    curve, what = numbers["coverage_curve"], f"{numbers['level']}s"
    charts = {"training": draw_training(numbers["epochs"])}
    charts["calibration"] = draw_calibration(numbers["calibration"]["before"], numbers["calibration"]["after"])
    charts["coverage"] = draw_coverage(curve["coverage"], curve["accuracy"], what) if curve else None
    images = {name: chart[1] for name, chart in charts.items() if chart}
    pictures = {name: chart[0] for name, chart in charts.items() if chart}
    if not numbers["multi_label"]:
        images["confusion"] = draw_confusion(numbers["levels"][numbers["level"]]["confusion"], numbers["labels"], what)
        if len(numbers["labels"]) > MOST_LABELS_IN_MATRIX:
            data = base64.b64encode(images["confusion"]).decode()
            pictures["confusion"] = Markup('<img alt="confusion matrix" src="data:image/png;base64,{}">').format(data)
    return pictures, images


def draw_training(epochs: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Losses and scores (what is within -1 and 1 and no loss) per epoch; None without any."""
    from matplotlib.ticker import MaxNLocator

    usable = [record for record in epochs if record["value"] is not None and "rate" not in record["metric"]]
    losses = {record["metric"] for record in usable if record["metric"].endswith("loss")}
    scores = {record["metric"] for record in usable if abs(record["value"]) <= 1} - losses - {"mcc"}
    kinds = ((losses, "loss (nats)"), (scores, "score"), ({r["metric"] for r in usable} & {"mcc"}, "correlation"))
    panels = [(sorted(names), label) for names, label in kinds if names]

    def paint(axes: Any) -> None:
        for panel, (names, label) in zip(axes, panels, strict=True):
            alone = len(names) == 1
            for number, name in enumerate(names):
                for part, style, own in (("train", ":", ORANGE), ("validation", "-", BLUE), ("test", "--", GREEN)):
                    found = (r for r in usable if (r["metric"], r["part"]) == (name, part))
                    if points := sorted((r["epoch"], r["value"]) for r in found):
                        title = part if alone else f"{part} {name}".replace("_", " ")
                        look = {"marker": "o", "markersize": 4, "color": own if alone else _COLORS[number % 6]}
                        panel.plot(*zip(*points), style, label=title, **look)
            panel.set(xlabel="epoch", ylabel=names[0].replace("_", " ") if alone and label == "score" else label)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0))

    return _chart("training", (4.4, 3.2 * len(panels)), paint, nrows=len(panels)) if panels else None


def draw_calibration(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Chart:
    """Share that is right against confidence, with the number of statements per bin below.

    Given is what `calibration.judged` says without the temperature, where logits were kept, and as stored.
    """

    def paint(axes: Any) -> None:
        top, bottom = axes
        top.plot((0, 1), (0, 1), "--", color=INK, alpha=0.45, linewidth=1)
        shown = [] if before is None else [(before, "before the temperature", ORANGE, "s")]
        shown.append((after, "as stored", BLUE, "o"))
        for number, (found, name, color, marker) in enumerate(shown):
            bins = [one for one in found["bins"] if one["count"]]
            points = [[one[axis] for one in bins] for axis in ("confidence", "accuracy")]
            top.plot(*points, marker=marker, markersize=5, color=color, label=f"{name}: ECE {found['ece']:.3f}")
            width = (found["bins"][0]["high"] - found["bins"][0]["low"]) / len(shown)
            bars = ([one["low"] + number * width for one in bins], [one["count"] for one in bins])
            bottom.bar(*bars, width * 0.9, align="edge", color=color, alpha=0.85)
        top.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share that is right")
        top.legend(loc="lower left", bbox_to_anchor=(0, 1.0))
        bottom.set(xlabel="confidence", ylabel="count")

    return _chart("calibration", (4.4, 4.6), paint, nrows=2, height_ratios=(4, 1.1), sharex=True)


def draw_coverage(coverage: Sequence[float], accuracy: Sequence[float], what: str) -> Chart:
    """Share that is right among the surest, against their rising share of all; `what` names them in the plural."""

    def paint(axes: Any) -> None:
        axes[0].plot(coverage, accuracy, color=BLUE, drawstyle="steps-post" if len(coverage) < 60 else "default")
        axes[0].axhline(accuracy[-1], linestyle=":", color=INK, alpha=0.6, linewidth=1)
        low = min(accuracy)
        axes[0].set(xlim=(0, 1), ylim=(max(0.0, low - 0.1 * (1 - low) - 0.02), 1.01))
        axes[0].set(xlabel=f"share of {what} that is decided, surest first", ylabel="share of those that is right")

    return _chart("coverage", (4.4, 3.1), paint)


def draw_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], what: str) -> bytes:
    """Counts and shares of each true label as PNG; of many labels only colours, and of very many only their numbers.

    For few labels a page has room for a table, in which the names are whole and the numbers can be copied. The matrix
    has (K, K) counts, a line per true label; `what` names in the plural what is counted.
    """
    counts, number = np.asarray(matrix), len(names)
    percent = 100 * by_row(counts)
    with_cells = number <= _MOST_NAMED_CELLS
    panels = [(counts, what, ".0f")] * with_cells + [(percent, "% of the true label", ".1f")]
    side = max(3.0, 0.34 * number + 1.2) if with_cells else 0.16 * min(number, _MOST_NAMES) + 2.5

    def paint(axes: Any) -> None:
        shown = _drawable(names) if number <= _MOST_NAMES else []
        numbered = "" if shown else " (number of the label)"
        for panel, (values, title, digits) in zip(axes, panels, strict=True):
            panel.imshow(np.nan_to_num(percent), cmap="Blues", vmin=0, vmax=125)
            if shown:
                panel.set_xticks(range(number), shown, rotation=45, ha="right", rotation_mode="anchor")
                panel.set_yticks(range(number), shown)
            panel.set(xlabel=f"predicted{numbered}", ylabel=f"true{numbered}", title=title)
            panel.grid(visible=False)
            for line, column in np.ndindex(*counts.shape) if with_cells else ():
                text = "–" if np.isnan(values[line, column]) else f"{values[line, column]:{digits}}"
                color = "white" if percent[line, column] > 60 else INK
                panel.text(column, line, text, ha="center", va="center", fontsize=8, color=color)

    return _chart("confusion", (len(panels) * (side + 1.1), side + 0.8), paint, ncols=len(panels))[1]


def _chart(name: str, size: tuple[float, float], paint: Callable[[Any], None], **panels: Any) -> Chart:
    """A figure of some panels in both ways; the same one always has the same bytes.

    The SVG can stand in a page beside others: it has no prologue, no clashing ids, and the colours of the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    vector, raster = io.BytesIO(), io.BytesIO()
    settings: dict[Any, Any] = {**_STYLE, "font.family": _installed_fonts(), "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(squeeze=False, **panels).ravel())
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(vector, format="svg", transparent=True, metadata=none)
        figure.savefig(raster, format="png", dpi=170, facecolor="white", metadata={"Software": None})
    svg = vector.getvalue().decode("utf-8")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opening = f'<svg role="img" aria-label="{name}" viewBox="0 0 {width} {height}" '
    opening += f'style="max-width:{1.5 * float(width):.0f}px">'
    svg = opening + re.split("<svg [^>]*>", svg)[1]
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor").strip()
    return Markup(svg), raster.getvalue()


def without_font(names: Sequence[str]) -> list[str]:
    """A sentence on the names that the fonts here cannot draw."""
    signs = _signs_without_font(names)
    lacking = [(number, name) for number, name in enumerate(names) if signs & set(name)]
    if not lacking:
        return []
    number, name = lacking[0]
    return [
        f"No font of this machine has the letters of {len(lacking):,} labels: the picture of confusions calls them by "
        f"their place in the list of labels, {name!r:.60} 'label {number}'. Noto Sans CJK has the Japanese ones."
    ]


def _drawable(names: Sequence[str]) -> list[str]:
    """The names, shortened and no formula of matplotlib's; numbers for those that the fonts here cannot draw."""
    wanted = _signs_without_font(names)
    short = [" ".join((name if len(name) <= 18 else f"{name[:17]}…").replace("$", r"\$").split()) for name in names]
    return [f"label {n}" if wanted & set(name) else short[n] for n, name in enumerate(names)]


def _signs_without_font(names: Sequence[str]) -> set[str]:
    from matplotlib import font_manager

    wanted = set("".join(names)) - {" "}
    for installed in _installed_fonts():
        font = font_manager.get_font(font_manager.findfont(installed))
        wanted -= {letter for letter in wanted if font.get_char_index(ord(letter))}
    return wanted


def _installed_fonts() -> list[str]:
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS.split(",") if name in known]

"""Charts of a classifier's results and the look of its report.

Charts come as PNG for papers and slides, and as SVG that takes the colours of the page it is in. Text in an SVG stays
text in the font of the page, so it is sharp and readable wherever the page is opened. A PNG needs a font on the machine
that draws it; names of labels that no font covers are replaced by their numbers.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#24292f"  # in an SVG it becomes the colour of the page's text
BLUE, ORANGE, GREEN, RED = "#3572d6", "#d9770a", "#2a9d6b", "#c8415b"
_COLORS = (BLUE, ORANGE, GREEN, RED, "#8a5fc7", "#5f7d8c")
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "TakaoGothic",
    "Hiragino Sans",
    "Yu Gothic",
    "MS Gothic",
    "WenQuanYi Zen Hei",
)
_MOST_NAMED_CELLS = 20  # a confusion matrix with more labels has no numbers in its cells
_MOST_NAMES = 60  # ... and with more than these their numbers instead of names
MOST_LABELS_IN_MATRIX = 40  # a page shows a table of as many labels, and a picture of more

Chart = tuple[str, bytes]  # SVG, PNG

# The page of a report, in the reader's light or dark.
STYLE = """
:root{color-scheme:light dark;--ink:#24292f;--dim:#5c6672;--paper:#fff;--line:#d9dee4;--soft:#f4f6f8;--blue:53,114,214;
--orange:217,119,10;--green:#1d7a51;--red:#b3304b;--mark:#ffe9a8}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7ec;--dim:#9aa5b1;--paper:#14181d;--line:#313943;--soft:#1c2229;
--blue:92,147,240;--orange:240,152,60;--green:#5fcf9c;--red:#f08a9f;--mark:#6b5512}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.5rem 6rem;max-width:80rem;background:var(--paper);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI","Hiragino Sans","Yu Gothic UI","Noto Sans CJK JP",sans-serif}
@media(min-width:64rem){body{display:grid;grid-template-columns:13rem minmax(0,1fr);column-gap:3rem}
header{grid-column:1/3}nav{position:sticky;top:1.5rem;align-self:start}}
h1{font-size:1.9rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:2.8rem 0 .8rem;padding-top:.6rem;border-top:1px solid var(--line)}
section:first-child h2{margin-top:0;padding-top:0;border:0}
h3{font-size:1.05rem;margin:1.4rem 0 .3rem;overflow-wrap:anywhere}
p{max-width:46rem}
small,.dim{color:var(--dim);font-size:.85em;font-weight:400}
header .dim{margin:.2rem 0 2rem}
nav ol{list-style:none;margin:0 0 1rem;padding:0;font-size:.92rem;columns:2}
@media(min-width:64rem){nav ol{columns:1}}
a{color:rgb(var(--blue));text-decoration:none}
a:hover{text-decoration:underline}
nav li{margin:.25rem 0}
.wide{overflow-x:auto;margin:.8rem 0 1.4rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;color:var(--dim);padding-bottom:.3rem}
th,td{padding:.3rem .6rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;vertical-align:bottom}
th,td{overflow-wrap:break-word}
th:first-child,td:first-child{min-width:8rem;max-width:22rem}
td.n,th.n{text-align:right}
td.n{white-space:nowrap}
.matrix td{border:0}
.matrix td.n{padding:1px}
.matrix span{display:block;min-width:3.4rem;padding:.3rem .5rem;border-radius:3px}
.hit{background:rgba(var(--blue),calc(var(--p)*.5))}
.miss{background:rgba(var(--orange),calc(var(--p)*.85))}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:0 0 1.2rem}
.tile{flex:1 1 11rem;padding:.9rem 1rem;border:1px solid var(--line);border-radius:8px;background:var(--soft)}
.tile span,.tile small{display:block}
.tile b{display:block;font-size:1.7rem;line-height:1.3;font-variant-numeric:tabular-nums}
.range{display:inline-block;position:relative;width:7rem;height:.5rem;border-radius:9px;background:var(--line)}
.tile .range{width:100%}
.range::before{content:"";position:absolute;left:calc(var(--low)*100%);width:calc((var(--high) - var(--low))*100%);
height:100%;min-width:2px;border-radius:9px;background:rgba(var(--blue),.5)}
.range::after{content:"";position:absolute;left:calc(var(--at)*100% - 1.5px);top:-.15rem;width:3px;height:.8rem;
border-radius:2px;background:var(--ink)}
.notices{margin:1rem 0;padding:.7rem 1rem .7rem 2rem;border-left:4px solid rgb(var(--orange));background:var(--soft)}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.2rem 1.2rem;margin:.6rem 0;font-size:.92rem}
dt{color:var(--dim);max-width:16rem;overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;color:rgb(var(--blue));font-size:.92rem}
figure{margin:.5rem 0 1rem}
.chart{display:block;width:100%;height:auto}
.chart *{stroke-linejoin:round}
blockquote{margin:.4rem 0;padding:.6rem 1rem;border-left:3px solid var(--line);background:var(--soft);
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.95rem}
mark{background:var(--mark);color:inherit;border-radius:2px}
article{margin:0 0 1.8rem}
article p{margin:.2rem 0}
.good{color:var(--green)}
.bad{color:var(--red)}
.strip i{display:inline-block;width:1.3rem;height:.75rem;margin-right:2px;border-radius:2px;
background:rgba(var(--orange),calc(.12 + var(--p)*.88))}
.strip .decisive{outline:2px solid var(--ink);outline-offset:-2px}
@media print{nav{display:none}body{display:block;max-width:none}article,.tile,figure{break-inside:avoid}}
"""


def draw_all(numbers: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, bytes]]:
    """Every chart that the numbers of a report allow: name -> HTML (an SVG, as a rule), name -> PNG.

    Args:
        numbers: what `scripts/analyze_results.py` writes as JSON.
    """
    calibration, curve, level = numbers["calibration"], numbers["coverage_curve"], numbers["level"]
    charts = {"training": draw_training(numbers["epochs"])}
    charts["calibration"] = draw_calibration(calibration["before"], calibration["after"])
    charts["coverage"] = draw_coverage(curve["coverage"], curve["accuracy"], f"{level}s") if curve else None
    images = {name: chart[1] for name, chart in charts.items() if chart}
    pictures = {name: chart[0] for name, chart in charts.items() if chart}
    if not numbers["multi_label"]:
        images["confusion"] = draw_confusion(numbers["levels"][level]["confusion"], numbers["labels"], f"{level}s")
        if len(numbers["labels"]) > MOST_LABELS_IN_MATRIX:
            data = base64.b64encode(images["confusion"]).decode()
            pictures["confusion"] = f'<img class="chart" alt="confusion matrix" src="data:image/png;base64,{data}">'
    return pictures, images


def draw_training(epochs: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Loss and shares per epoch; None without any.

    Args:
        epochs: records with "epoch", "part", "metric" and "value"; what is not a loss is taken for a share.
    """
    from matplotlib.ticker import MaxNLocator

    usable = [record for record in epochs if record["value"] is not None]
    losses = sorted({record["metric"] for record in usable if record["metric"].endswith("loss")})
    shares = sorted({record["metric"] for record in usable if _is_share(record)})
    panels = [(names, label) for names, label in ((losses, "loss (nats)"), (shares, "share")) if names]
    if not panels:
        return None
    figure, axes = _figure(5.4 * len(panels), 3.4, len(panels))
    for panel, (names, label) in zip(axes, panels, strict=True):
        for metric_number, name in enumerate(names):
            for part, style in (("train", ":"), ("validation", "-"), ("test", "--")):
                points = sorted((r["epoch"], r["value"]) for r in usable if (r["metric"], r["part"]) == (name, part))
                if points:
                    color = _COLORS[metric_number % len(_COLORS)] if len(names) > 1 else _part_color(part)
                    title = f"{part} {name.replace('_', ' ')}" if len(names) > 1 else part
                    xs, ys = zip(*points, strict=True)
                    panel.plot(xs, ys, style, marker="o", markersize=4, color=color, label=title)
        panel.set_xlabel("epoch")
        panel.set_ylabel(names[0].replace("_", " ") if len(names) == 1 and label == "share" else label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(frameon=False, fontsize=9)
    return _chart(figure, "training")


def draw_calibration(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Chart:
    """Share that is right against confidence, with the number of statements per bin below.

    Args:
        before: {"bins": [{"low", "high", "count", "confidence", "accuracy"}], "ece"} without the temperature.
        after: the same of the stored probabilities.
    """
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(5.2, 5.2), height_ratios=(4, 1.1), sharex=True, constrained_layout=True
    )
    top.plot((0, 1), (0, 1), "--", color=INK, alpha=0.45, linewidth=1)
    series = [("before the temperature", ORANGE, before), ("as stored", BLUE, after)]
    shown = [(name, color, numbers) for name, color, numbers in series if numbers is not None]
    for number, (name, color, numbers) in enumerate(shown):
        bins = [one for one in numbers["bins"] if one["count"]]
        xs, ys = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
        ece = numbers["ece"]
        top.plot(xs, ys, "-", marker="so"[number % 2], markersize=5, color=color, label=f"{name}: ECE {ece:.3f}")
        width = (numbers["bins"][0]["high"] - numbers["bins"][0]["low"]) / len(shown)
        left = [one["low"] + number * width for one in numbers["bins"]]
        heights = [one["count"] for one in numbers["bins"]]
        bottom.bar(left, heights, width * 0.9, align="edge", color=color, alpha=0.85)
    top.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share that is right")
    top.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.0))
    bottom.set(xlabel="confidence", ylabel="count")
    for panel in (top, bottom):
        _dress(panel)
    return _chart(figure, "calibration")


def draw_coverage(coverage: Sequence[float], accuracy: Sequence[float], what: str) -> Chart:
    """Share that is right among the surest, against their share of all.

    Args:
        coverage: rising shares of documents that are decided.
        accuracy: share of those that is right.
        what: the rows, in the plural.
    """
    figure, (panel,) = _figure(5.4, 3.6, 1)
    panel.plot(coverage, accuracy, color=BLUE, drawstyle="steps-post" if len(coverage) < 60 else "default")
    panel.axhline(accuracy[-1], linestyle=":", color=INK, alpha=0.6, linewidth=1)
    low = min(accuracy)
    panel.set(xlim=(0, 1), ylim=(max(0.0, low - 0.1 * (1 - low) - 0.02), 1.01))
    panel.set(xlabel=f"share of {what} that is decided, surest first", ylabel="share of those that is right")
    return _chart(figure, "coverage")


def draw_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], what: str) -> bytes:
    """Counts and shares of each true label as PNG; of many labels only colours, and of very many only their numbers.

    For few labels a page has room for a table, in which the names are whole and the numbers can be copied.

    Args:
        matrix: (K, K) counts, a line per true label.
        names: of the labels.
        what: the rows, in the plural.
    """
    from lmscripts.evaluation.metrics import by_row

    number = len(names)
    counts = np.asarray(matrix)
    side = max(3.0, 0.34 * number + 1.2) if number <= _MOST_NAMED_CELLS else 0.16 * min(number, _MOST_NAMES) + 2.5
    panels = [(100 * by_row(counts), "% of the true label")]
    panels = [(counts, what), *panels] if number <= _MOST_NAMED_CELLS else panels
    figure, axes = _figure(len(panels) * (side + 1.1), side + 0.8, len(panels))
    shown, fonts = _drawable(names) if number <= _MOST_NAMES else [], _installed_fonts()
    for panel, (values, title) in zip(axes, panels, strict=True):
        shares = np.nan_to_num(by_row(counts))
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1.25)
        if shown:
            panel.set_xticks(range(number), shown, rotation=45, ha="right", rotation_mode="anchor", family=fonts)
            panel.set_yticks(range(number), shown, family=fonts)
        numbered = "" if shown else " (number of the label)"
        panel.set(xlabel=f"predicted{numbered}", ylabel=f"true{numbered}", title=title)
        panel.grid(visible=False)
        for line, column in np.ndindex(*counts.shape) if number <= _MOST_NAMED_CELLS else ():
            value = values[line, column]
            text = "–" if np.isnan(value) else f"{value:.0f}" if values is counts else f"{value:.1f}"
            dark = shares[line, column] > 0.6
            panel.text(column, line, text, ha="center", va="center", fontsize=8, color="white" if dark else "#24292e")
    return _chart(figure, "confusion")[1]


def _is_share(record: Mapping[str, Any]) -> bool:
    return not record["metric"].endswith("loss") and -1.0 <= record["value"] <= 1.0 and "rate" not in record["metric"]


def _part_color(part: str) -> str:
    return {"train": ORANGE, "validation": BLUE}.get(part, GREEN)


def _figure(width: float, height: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width, height), constrained_layout=True, squeeze=False)
    for panel in axes[0]:
        _dress(panel)
    return figure, list(axes[0])


def _dress(panel: Axes) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(INK)
        panel.spines[side].set_alpha(0.5)
    panel.tick_params(colors=INK, labelsize=9)
    panel.grid(color=INK, alpha=0.12, linewidth=0.8)
    panel.set_axisbelow(True)
    for text in (panel.xaxis.label, panel.yaxis.label, panel.title):
        text.set_color(INK)
        text.set_fontsize(10)


def _drawable(names: Sequence[str]) -> list[str]:
    """The names, shortened; numbers in place of those that the fonts of this machine cannot draw."""
    from matplotlib import font_manager

    wanted = set("".join(names)) - {" "}
    for family in _installed_fonts():
        font = font_manager.get_font(font_manager.findfont(family))
        wanted -= {letter for letter in wanted if font.get_char_index(ord(letter))}
    missing = [bool(wanted & set(name)) for name in names]
    return [
        f"label {number}" if lacks else _escaped(name if len(name) <= 18 else f"{name[:17]}…")
        for number, (name, lacks) in enumerate(zip(names, missing, strict=True))
    ]


def _escaped(name: str) -> str:
    """A name that is not read as a formula of matplotlib's."""
    return " ".join(name.replace("$", r"\$").split())


def _installed_fonts() -> list[str]:
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in known]


def _chart(figure: Figure, name: str) -> Chart:
    """Writes a figure in both ways and closes it; the same figure always gives the same bytes."""
    import matplotlib
    from matplotlib import pyplot

    for panel in figure.axes:
        if legend := panel.get_legend():
            for text in legend.get_texts():
                text.set_color(INK)
    vector, raster = io.BytesIO(), io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(raster, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return _inline(vector.getvalue().decode("utf-8"), name), raster.getvalue()


def _inline(svg: str, name: str) -> str:
    """An SVG that can stand in a page beside others: no prologue, no clashing ids, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opening = f'<svg class="chart" role="img" aria-label="{name}" viewBox="0 0 {width} {height}" '
    svg = re.sub("<svg [^>]*>", f'{opening}style="max-width:{1.25 * float(width):.0f}px">', svg, count=1)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return svg.replace(INK, "currentColor").strip()

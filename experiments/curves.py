"""Runs as a picture, an SVG: loss, validation loss and exact match over steps, and α layer by layer.

    python -m experiments.curves RUN ... [--out curves.svg]

All is read from the runs' log.jsonl, in which α by layer stands at each validation. A line is a run, or the
mean of several in a band from the lowest to the highest. α is a map: layers upwards, validations to the
right, the darker or brighter the more.
"""

import json
import math
from html import escape
from pathlib import Path
from statistics import fmean

from cli.process import command
from cli.settings import Setting, new_parser, text

COLOURS = ["#cc6677", "#4499cc", "#ddaa33", "#33a055", "#aa66cc", "#999999", "#aa7744"]
LEFT, TOP, WIDTH, HEIGHT, KEY = 64, 36, 500, 250, 170
STYLE = """<style>
.drawn { background: #ffffff; fill: #444; font: 13px Helvetica, Arial, sans-serif }
.grid { stroke: #e4e4e8 }
@media (prefers-color-scheme: dark) {
    .drawn { background: #15181d; fill: #c4c8d0 } .grid { stroke: #33383f }
}
</style>"""


def colours(names):
    """A colour for each name: Bitune's own, and the others in their order."""
    others = (c for c in COLOURS[1:] * (1 + len(names)))
    return {name: COLOURS[0] if name == "Bitune" else next(others) for name in names}


def label(x, y, words, anchor="start"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(words)}</text>'


def panel(title, lines, colour, low=None, high=None, form="{:g}", level=None, logarithmic=False,
          across="steps"):
    """One diagram as a list of SVG elements, from the height 0 downwards. lines: name -> [(step, values)],
    a value for each seed; colour: name -> colour. low, high: ends of the axis, if not those of the values.
    level: (value, words) of a dashed line. logarithmic: for what falls by factors, as losses do. across: what
    a "step" is."""
    scale, unscale = (lambda v: math.log(max(v, 1e-6)), math.exp) if logarithmic else (float, float)
    values = [v for line in lines.values() for _, seeds in line for v in seeds]
    low = min(values) if low is None else low
    high = max(max(values) if high is None else high, low + 1e-9)
    end = max([step for line in lines.values() for step, _ in line] + [1])
    low, high = scale(low), scale(high)
    x, y = lambda step: LEFT + WIDTH * step / end, lambda v: TOP + HEIGHT * (high - scale(v)) / (high - low)
    path = lambda xy: " ".join(f"{a:.1f},{b:.1f}" for a, b in xy)
    svg = [label(LEFT, TOP - 10, title), label(LEFT + WIDTH / 2, TOP + HEIGHT + 42, across, "middle")]
    for part in range(5):
        v = unscale(low + (high - low) * part / 4)
        svg += [f'<path class="grid" d="M{LEFT},{y(v):.1f}h{WIDTH}"/>',
                label(LEFT - 8, y(v) + 4, form.format(v), "end")]
    for step in range(0, end + 1, max(1, end // 5)):
        svg.append(label(x(step), TOP + HEIGHT + 20, str(step), "middle"))
    if level:
        svg += [f'<path d="M{LEFT},{y(level[0]):.1f}h{WIDTH}" stroke="#999" stroke-dasharray="3 4"/>',
                label(LEFT + WIDTH - 4, y(level[0]) + 18, level[1], "end")]
    for name, line in lines.items():
        lowest, highest = ([(x(step), y(of(seeds))) for step, seeds in line] for of in (min, max))
        mean = [(x(step), y(fmean(seeds))) for step, seeds in line]
        if lowest != highest:
            svg.append(f'<polygon points="{path(lowest + highest[::-1])}" fill="{colour[name]}" '
                       'fill-opacity="0.25"/>')
        svg.append(f'<polyline points="{path(mean)}" fill="none" stroke="{colour[name]}" stroke-width="2"/>')
    for row, name in enumerate(sorted(lines, key=lambda n: -fmean(lines[n][-1][1]))):
        at = TOP + 11 + 22 * row
        svg += [f'<path d="M{LEFT + WIDTH + 16},{at}h18" stroke="{colour[name]}" stroke-width="4"/>',
                label(LEFT + WIDTH + 42, at + 4, name)]
    return svg


def heat(title, grid, rows, columns, across, low=0, high=1, form="{:g}"):
    """A map as such a list: grid[row][column] between low and high, the first row lowest. A cell lets the
    background through where its value is low, so a map is as legible on black as on white."""
    wide, tall = WIDTH / len(columns), HEIGHT / len(rows)
    cell = lambda x, y, w, h, part: (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{COLOURS[0]}" '
        f'fill-opacity="{min(max(part, 0), 1):.3f}"/>')
    svg = [label(LEFT, TOP - 10, title), label(LEFT + WIDTH / 2, TOP + HEIGHT + 42, across, "middle")]
    for i, (name, values) in enumerate(zip(rows, grid)):
        y = TOP + HEIGHT - tall * (i + 1)
        svg += [cell(LEFT + wide * j, y, wide, tall, (v - low) / (high - low)) for j, v in enumerate(values)]
        if i % math.ceil(16 / tall) == 0:
            svg.append(label(LEFT - 8, y + tall / 2 + 4, str(name), "end"))
    every = math.ceil(max(len(str(c)) * 7 + 8 for c in columns) / wide)
    svg += [label(LEFT + wide * (j + 0.5), TOP + HEIGHT + 20, str(c), "middle")
            for j, c in enumerate(columns) if j % every == 0]
    for i in range(5):
        y = TOP + 28 * (4 - i)
        svg += [cell(LEFT + WIDTH + 16, y, 18, 28, i / 4),
                label(LEFT + WIDTH + 42, y + 18, form.format(low + (high - low) * i / 4))]
    return [*svg, f'<path class="grid" d="M{LEFT},{TOP}h{WIDTH}v{HEIGHT}h-{WIDTH}z" fill="none"/>']


def picture(panels):
    """Panels, one below the other, as one SVG."""
    height = TOP + HEIGHT + 56
    body = [f'<g transform="translate(0 {i * height})">\n' + "\n".join(one) + "\n</g>"
            for i, one in enumerate(panels)]
    box = f"0 0 {LEFT + WIDTH + KEY} {len(panels) * height}"
    head = f'<svg class="drawn" xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
    return "\n".join([head, STYLE, *body, "</svg>"]) + "\n"


# ----------------------------------------------------------------------------------------------------------
# From the logs of runs

def smoothed(log, points=60):
    """The training loss as means over so many parts of the run."""
    records = [r for r in log if "loss" in r]
    points = min(points, len(records))
    cut = lambda i: i * len(records) // points
    parts = [records[cut(i):cut(i + 1)] for i in range(points)]
    return [(part[-1]["step"], [fmean(r["loss"] for r in part)]) for part in parts]


def of_runs(logs):
    """The panels of runs, name -> the records of its log."""
    colour, panels = colours(logs), []
    percent, loss = {"low": 0, "high": 1, "form": "{:.0%}"}, {"form": "{:.3g}", "logarithmic": True}
    for title, key, axis in (("validation loss", "val_loss", loss),
                             ("exact match on validation data", "val_exact_match", percent)):
        lines = {name: [(r["step"], [r[key]]) for r in log if key in r] for name, log in logs.items()}
        if lines := {name: line for name, line in lines.items() if line}:
            panels.append(panel(title, lines, colour, **axis))
    losses = {name: line for name, log in logs.items() if (line := smoothed(log))}
    if losses:
        panels.insert(0, panel("training loss", losses, colour, **loss))
    for name, log in logs.items():
        for which in sorted({key for r in log for key in r if key.startswith("alphas_")}):
            steps, at = zip(*[(r["step"], r[which]) for r in log if which in r])
            title = f"α of the {which[7:]}s by layer" + (f", {name}" if len(logs) > 1 else "")
            panels.append(heat(title, [*zip(*at)], range(len(at[0])), steps, "steps"))
    return panels


def read_log(run):
    file = Path(run) / "log.jsonl"
    if not file.exists():
        raise ValueError(f"{run} has no log.jsonl: expected a run of train.py")
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


@command
def main(argv=None):
    parser = new_parser(__doc__, {"out": Setting("where the picture goes", text("FILE"), "curves.svg")})
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    args = parser.parse_args(argv)
    alone = [Path(run).resolve().name for run in args.runs]
    names = alone if len({*alone}) == len(alone) else args.runs         # several of one name: by their paths
    panels = of_runs({name: read_log(run) for name, run in zip(names, args.runs)})
    if not panels:
        raise ValueError(f"{' '.join(args.runs)}: no step is in the logs yet")
    Path(args.out).write_text(picture(panels), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

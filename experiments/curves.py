"""Runs as a picture, an SVG: loss, validation loss and exact match over steps, and α layer by layer.

    python -m experiments.curves RUN ... [--out curves.svg]

All is read from the runs' log.jsonl. α is a map: layers upwards, validations to the right, the darker or
brighter the more.
"""

import math
from html import escape
from pathlib import Path
from statistics import fmean

from cli.process import command
from cli.settings import Setting, new_parser, text
from files.disk import write_file
from files.run import logged
from text.words import listed

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
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(str(words))}</text>'


def axes(title, across, columns, rows):
    """The words around a diagram; columns, rows: [(place, words)] along its two sides."""
    return [label(LEFT, TOP - 10, title), label(LEFT + WIDTH / 2, TOP + HEIGHT + 42, across, "middle"),
            *(label(x, TOP + HEIGHT + 20, words, "middle") for x, words in columns),
            *(label(LEFT - 8, y + 4, words, "end") for y, words in rows)]


def panel(title, lines, colour, losses=False, level=None, across="steps"):
    """One diagram as a list of SVG elements. lines: name -> [(step, values)], a value for each seed, from 0
    to 1; or `losses`, which fall by factors. A line is the seeds' mean, in a band from the lowest to the
    highest. level: (value, words) of a dashed line. across: what a "step" is."""
    scale, unscale = (lambda v: math.log(max(v, 1e-6)), math.exp) if losses else (float, float)
    values = [scale(v) for line in lines.values() for _, seeds in line for v in seeds] if losses else [0, 1]
    low, high = min(values), max(*values, min(values) + 1e-9)
    end = max([step for line in lines.values() for step, _ in line] + [1])
    x, y = lambda step: LEFT + WIDTH * step / end, lambda v: TOP + HEIGHT * (high - scale(v)) / (high - low)
    path = lambda xy: " ".join(f"{a:.1f},{b:.1f}" for a, b in xy)
    ticks = [unscale(low + (high - low) * part / 4) for part in range(5)]
    svg = axes(title, across, [(x(step), step) for step in range(0, end + 1, max(1, end // 5))],
               [(y(v), f"{v:.3g}" if losses else f"{v:.0%}") for v in ticks])
    svg += [f'<path class="grid" d="M{LEFT},{y(v):.1f}h{WIDTH}"/>' for v in ticks]
    if level:
        svg += [f'<path d="M{LEFT},{y(level[0]):.1f}h{WIDTH}" stroke="#999" stroke-dasharray="3 4"/>',
                label(LEFT + WIDTH - 4, y(level[0]) + 18, level[1], "end")]
    for row, name in enumerate(sorted(lines, key=lambda n: -fmean(lines[n][-1][1]))):
        lowest, mean, highest = ([(x(step), y(of(seeds))) for step, seeds in lines[name]]
                                 for of in (min, fmean, max))
        if lowest != highest:
            svg.append(f'<polygon points="{path(lowest + highest[::-1])}" fill="{colour[name]}" '
                       'fill-opacity="0.25"/>')
        at = TOP + 11 + 22 * row
        svg += [f'<polyline points="{path(mean)}" fill="none" stroke="{colour[name]}" stroke-width="2"/>',
                f'<path d="M{LEFT + WIDTH + 16},{at}h18" stroke="{colour[name]}" stroke-width="4"/>',
                label(LEFT + WIDTH + 42, at + 4, name)]
    return svg


def heat(title, grid, rows, columns, across, low=0, high=1):
    """A map as such a list: grid[row][column] between low and high, the first row lowest. A cell lets the
    background through where its value is low, so a map is as legible on black as on white."""
    wide, tall = WIDTH / len(columns), HEIGHT / len(rows)
    x, y = lambda column: LEFT + wide * column, lambda row: TOP + HEIGHT - tall * row
    cell = lambda x, y, w, h, part: (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{COLOURS[0]}" '
        f'fill-opacity="{min(max(part, 0), 1):.3f}"/>')
    every = math.ceil(max(len(str(c)) * 7 + 8 for c in columns) / wide), math.ceil(16 / tall)
    svg = axes(title, across, [(x(j + 0.5), c) for j, c in enumerate(columns)][::every[0]],
               [(y(i + 0.5), name) for i, name in enumerate(rows)][::every[1]])
    svg += [cell(x(j), y(i + 1), wide, tall, (v - low) / (high - low))
            for i, values in enumerate(grid) for j, v in enumerate(values)]
    for i in range(5):
        at = TOP + 28 * (4 - i)
        svg += [cell(LEFT + WIDTH + 16, at, 18, 28, i / 4),
                label(LEFT + WIDTH + 42, at + 18, f"{low + (high - low) * i / 4:g}")]
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

def smoothed(points, most=60):
    """At most so many of [(step, value)], each the mean of those since the one before."""
    n = min(most, len(points))
    parts = [points[i * len(points) // n:(i + 1) * len(points) // n] for i in range(n)]
    return [(part[-1][0], [fmean(value for _, value in part)]) for part in parts]


def of_runs(logs):
    """The panels of runs, name -> the records of its log."""
    colour, panels = colours(logs), []
    for title, key in (("training loss", "loss"), ("validation loss", "val_loss"),
                       ("exact match on validation data", "val_exact_match")):
        points = {name: [(r["step"], r[key]) for r in log if key in r] for name, log in logs.items()}
        if lines := {name: smoothed(found) for name, found in points.items() if found}:
            panels.append(panel(title, lines, colour, losses=key.endswith("loss")))
    for name, log in logs.items():
        for which in sorted({key for r in log for key in r if key.startswith("alphas_")}):
            steps, at = zip(*[(r["step"], r[which]) for r in log if which in r])
            title = f"α of the {which[7:]}s by layer" + (f", {name}" if len(logs) > 1 else "")
            panels.append(heat(title, [*zip(*at)], range(len(at[0])), steps, "steps"))
    return panels


@command
def main(argv=None):
    parser = new_parser(__doc__, {"out": Setting("where the picture goes", text("FILE"), "curves.svg")})
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    args = parser.parse_args(argv)
    alone = [Path(run).resolve().name for run in args.runs]
    names = alone if len({*alone}) == len(alone) else args.runs         # several of one name: by their paths
    logs = {name: logged(Path(run) / "log.jsonl", math.inf) for name, run in zip(names, args.runs)}
    if empty := [name for name, log in logs.items() if not log]:
        raise ValueError(f"no step is logged in {listed(empty)}: expected runs of train.py")
    write_file(Path(args.out), picture(of_runs(logs)).encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

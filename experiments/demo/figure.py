"""Exact match over steps as an SVG: a line a method, its mean over seeds, in a band from worst to best."""

from html import escape

COLOURS = {"Bitune": "#cc6677", "LoRA rank 8": "#88bbdd", "LoRA rank 16": "#4477aa",
           "naive-bidir": "#ddaa33", "no-mixing": "#228833", "shared-weights": "#aa4499",
           "only-causal": "#888888"}
LEFT, TOP, WIDTH, HEIGHT = 64, 36, 500, 250


def curves(validations, chance):
    """validations: method name -> a list for each seed, of what train.py's log.jsonl has of them."""
    points = {}                                     # name -> [(step, exact match of each seed), ...]
    for name, seeds in validations.items():
        marks = [[(r["step"], r["val_exact_match"]) for r in log if "val_exact_match" in r] for log in seeds]
        points[name] = [(at[0][0], [match for _, match in at]) for at in zip(*marks)]
    end = max(step for line in points.values() for step, _ in line)
    x, y = lambda step: LEFT + WIDTH * step / end, lambda match: TOP + HEIGHT * (1 - match)
    path = lambda xy: " ".join(f"{a:.1f},{b:.1f}" for a, b in xy)
    text = lambda a, b, words, anchor="start", more="": (
        f'<text x="{a:.0f}" y="{b:.0f}" text-anchor="{anchor}" {more}>{escape(words)}</text>')

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 170} {TOP + HEIGHT + 56}" '
           'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#444">',
           '<rect width="100%" height="100%" fill="#ffffff"/>']
    for match in (0, 0.25, 0.5, 0.75, 1):
        svg += [f'<path d="M{LEFT},{y(match):.1f}h{WIDTH}" stroke="#e4e4e8"/>',
                text(LEFT - 8, y(match) + 4, f"{match:.0%}", "end")]
    for step in range(0, end + 1, max(1, end // 5)):
        svg.append(text(x(step), TOP + HEIGHT + 20, str(step), "middle"))
    svg += [text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, "steps", "middle"),
            text(LEFT, TOP - 10, "exact match on validation data"),
            f'<path d="M{LEFT},{y(chance):.1f}h{WIDTH}" stroke="#999" stroke-dasharray="3 4"/>',
            text(LEFT + WIDTH - 4, y(chance) + 18, f"chance {chance:.1%}", "end")]
    for name, line in points.items():
        worst, best = ([(x(step), y(of(matches))) for step, matches in line] for of in (min, max))
        mean = [(x(step), y(sum(matches) / len(matches))) for step, matches in line]
        svg += [f'<polygon points="{path(worst + best[::-1])}" fill="{COLOURS[name]}" fill-opacity="0.2"/>',
                f'<polyline points="{path(mean)}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>']
    for row, (name, line) in enumerate(sorted(points.items(), key=lambda p: -sum(p[1][-1][1]))):
        at = TOP + 20 + 22 * row
        svg += [f'<path d="M{LEFT + WIDTH + 16},{at - 4}h18" stroke="{COLOURS[name]}" stroke-width="4"/>',
                text(LEFT + WIDTH + 42, at, name)]
    return "\n".join([*svg, "</svg>"]) + "\n"

"""The tables of a grid: what each model reaches, and whether two of them differ.

A record is one run: its name, lr, seed, trainable (parameters), seconds, val_loss, scores (column -> mean)
and right (column -> a string, for each question 1 or 0), as experiments/ablate.py writes them.
"""

import math
import statistics


def by_rate(records, name):
    """A model's records, a list for each learning rate."""
    own = [r for r in records if r["name"] == name]
    return [[r for r in own if r["lr"] == lr] for lr in dict.fromkeys(r["lr"] for r in own)]


def chosen(records):
    """Each model's records, a seed each, at the learning rate with the lowest mean validation loss; only
    rates at which the most seeds have come to their end are compared."""
    best = {}
    for name in dict.fromkeys(r["name"] for r in records):
        rates = by_rate(records, name)
        most = max(map(len, rates))
        rates = [group for group in rates if len(group) == most]
        best[name] = min(rates, key=lambda group: statistics.fmean(r["val_loss"] or 0 for r in group))
    return best


def spread(values, form):
    """mean ± standard deviation, if there are several"""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def percent(values):
    return spread([100 * v for v in values], "{:.1f}") + "%" if values else ""


def markdown(lines):
    """A table of cells, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * w for w in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def table(groups, first=()):
    """A line for each group, the records of one model at one learning rate; `first` are lines to put above,
    each a list of cells."""
    columns = list(max((r["scores"] for group in groups for r in group), key=len))
    lines = [["", "trainable parameters", "learning rate", "seconds", "validation loss", *columns], *first]
    for group in groups:
        loss = [r["val_loss"] for r in group]
        lines.append([group[0]["name"], f"{group[0]['trainable']:,}", f"{group[0]['lr']:g}",
                      spread([r["seconds"] for r in group], "{:.0f}"),
                      "" if None in loss else spread(loss, "{:.3f}"),
                      *(percent([r["scores"][c] for r in group if c in r["scores"]]) for c in columns)])
    return markdown(lines)


def difference(one, other, column):
    """By how much the group `one` is better than `other`, in percent of a column's questions: by seed, then
    the mean and its standard error, paired on questions: the seeds' mean verdict on each question is one
    observation, to which the spread of the seeds adds."""
    pairs = [(a["right"][column], b["right"][column]) for a in one for b in other if a["seed"] == b["seed"]]
    gains = [[int(x) - int(y) for x, y in zip(*pair)] for pair in pairs]    # seeds, questions
    by_seed = [100 * statistics.fmean(gain) for gain in gains]
    by_question = [100 * statistics.fmean(gain) for gain in zip(*gains)]
    if len(by_question) < 2:
        return by_seed, by_question[0], math.inf
    square = statistics.variance(by_question) / len(by_question)
    if len(by_seed) > 1:
        square += statistics.variance(by_seed) / len(by_seed)
    return by_seed, statistics.fmean(by_seed), math.sqrt(square)


def gaps(groups, name):
    """The group `name` less each of the others, column by column. A gap of up to two standard errors is
    none."""
    one, lines = groups[name], []
    for other, group in groups.items():
        if other == name or not {r["seed"] for r in one} & {r["seed"] for r in group}:
            continue
        for column in one[0]["scores"]:
            if all(column in r.get("right", {}) for r in [*one, *group]):
                by_seed, mean, error = difference(one, group, column)
                gap = "none" if abs(mean) <= 2 * error else name if mean > 0 else other
                lines.append([f"{name} - {other}", column, " ".join(f"{d:+.1f}" for d in by_seed),
                              f"{mean:+.1f} ± {error:.1f}", gap])
    head = ["", "of", "by seed, % of the questions", "mean ± standard error", "better"]
    return markdown([head, *lines]) if lines else ""


def report(records, base, baseline):
    """All tables of a grid: every model at its own best learning rate, then at the one that is best for
    `baseline`, the name of the model that the paper chose it by; differences in both."""
    best = chosen(records)
    rate = best[baseline][0]["lr"] if baseline in best else None
    shared = {name: group for name in best for group in by_rate(records, name) if group[0]["lr"] == rate}
    protocols = {"Each at its own best learning rate, by validation loss": best}
    if shared != best:
        protocols[f"All at {rate:g}, which is best for {baseline}"] = shared
    parts = []
    for title, groups in protocols.items():
        parts += [f"{title}:"] if len(protocols) > 1 else []
        parts.append(table(list(groups.values()), [base]))
        parts.append(gaps(groups, "Bitune") if "Bitune" in groups else "")
    if len({r["lr"] for r in records}) > 1:
        every = [group for name in best for group in by_rate(records, name)]
        parts += ["At each learning rate:", table(every)]
    return "\n\n".join(filter(None, parts))

"""The tables of a grid: what each model reaches, and whether two of them differ.

A record is one run: its name, lr, seed, trainable (parameters), seconds, val_loss and scores (column -> for
each question 1 or 0), as experiments/ablate.py makes them. A group is the records of one model at one rate,
a seed each.
"""

import math
from statistics import fmean, stdev, variance


def grouped(records):
    """name -> learning rate -> the group"""
    groups = {}
    for r in records:
        groups.setdefault(r["name"], {}).setdefault(r["lr"], []).append(r)
    return groups


def chosen(records):
    """Each model's group at the learning rate with the lowest mean validation loss; only rates at which the
    most seeds have come to their end are compared."""
    first = lambda group: (-len(group), fmean(r["val_loss"] or 0 for r in group))
    return {name: min(rates.values(), key=first) for name, rates in grouped(records).items()}


def spread(values, form):
    """mean ± standard deviation, if there are several"""
    mean = form.format(fmean(values))
    return f"{mean} ± {form.format(stdev(values))}" if len(values) > 1 else mean


def percent(seeds):
    """What a column has of several seeds, or models: each the verdicts on its questions."""
    return spread([100 * fmean(right) for right in seeds], "{:.1f}") + "%"


def markdown(lines):
    """A table of cells, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * w for w in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def table(groups, first=(), best=()):
    """A line for each group; `first`: lines to put above; the rates of those in `best` are marked."""
    columns = list(groups[0][0]["scores"])
    lines = [["", "trainable parameters", "learning rate", "seconds", "validation loss", *columns], *first]
    for group in groups:
        loss = [r["val_loss"] for r in group]
        lines.append([group[0]["name"], f"{group[0]['trainable']:,}",
                      f"{group[0]['lr']:g}{' (best)' * (group in best)}",
                      spread([r["seconds"] for r in group], "{:.0f}"),
                      "" if None in loss else spread(loss, "{:.3f}"),
                      *(percent([r["scores"][column] for r in group]) for column in columns)])
    return markdown(lines)


def difference(one, other, column):
    """By how much the group `one` is better than `other`, in percent of a column's questions: by seed, then
    the mean and its standard error, paired on questions: the seeds' mean verdict on each question is one
    observation, to which the spread of the seeds adds."""
    pairs = [(a["scores"], b["scores"]) for a in one for b in other if a["seed"] == b["seed"]]
    gains = [[100 * (x - y) for x, y in zip(a[column], b[column])] for a, b in pairs]   # seeds, questions
    by_seed, by_question = ([*map(fmean, part)] for part in (gains, zip(*gains)))
    square = variance(by_question) / len(by_question) if len(by_question) > 1 else math.inf
    square += variance(by_seed) / len(by_seed) if len(by_seed) > 1 else 0
    return by_seed, fmean(by_seed), math.sqrt(square)


def gaps(protocols, name):
    """The model `name` less each of the others, column by column, in each of the protocols, which say of
    each model the group that is compared. A gap of up to two standard errors is none."""
    lines = [["", "learning rates", "of", "by seed, % of the questions", "mean ± standard error", "better"]]
    pairs = {(other, groups[name][0]["lr"], group[0]["lr"]): (groups[name], group)      # each of them once
             for groups in protocols if name in groups for other, group in groups.items() if other != name}
    for (other, lr, other_lr), (one, group) in pairs.items():
        shared = {r["seed"] for r in one} & {r["seed"] for r in group}
        for column in group[0]["scores"] if shared else ():
            by_seed, mean, error = difference(one, group, column)
            gap = "none" if abs(mean) <= 2 * error else name if mean > 0 else other
            lines.append([f"{name} - {other}", f"{lr:g} - {other_lr:g}", column,
                          " ".join(f"{d:+.1f}" for d in by_seed), f"{mean:+.1f} ± {error:.1f}", gap])
    return markdown(lines) if lines[1:] else ""


def report(records, base, baseline):
    """The tables of a grid: every model at every learning rate; then differences, each model at its own best
    rate and all at the best one of `baseline`, the model that the paper chose it by. base: a line above."""
    best, every = chosen(records), grouped(records)
    rate = best[baseline][0]["lr"] if baseline in best else None
    shared = {name: rates[rate] for name, rates in every.items() if rate in rates}
    groups = [group for rates in every.values() for group in rates.values()]
    several = len({r["lr"] for r in records}) > 1
    tables = table(groups, [base], best.values() if several else ()), gaps([best, shared], "Bitune")
    return "\n\n".join(filter(None, tables))

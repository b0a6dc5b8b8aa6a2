"""The demonstration's small language: who said what, in 150 words of English.

    red foxes sing loudly, says Ann; old owls read here, says Tom. What did Tom say?  ->  old owls read here.

The base is pretrained on `document`s in which a saying comes after its speaker and is asked for, or before
its speaker and is not. So it knows the form of the sentence and the question, but not the two together: that
is the task. Where the name comes last, a causal decoder has read a saying before it knows whose it is, and
cannot go back.
"""

import json
import random
from pathlib import Path

NAMES = "Ann Ben Bob Eva Joe Kim Liz Max Mia Sam Sue Tom".split()
ADJECTIVES = "big blue brave clever fat green grey happy lazy old proud red shy small white young".split()
BEINGS = ("bears birds cats cows dogs ducks foxes frogs ghosts giants goats horses kings lions mice owls "
          "pigs queens witches wolves").split()
VERBS = "cook cry dance dig dream eat fly hide jump paint read run sing sleep swim wait".split()
DOES = ("cooks cries dances digs dreams eats flies hides jumps paints reads runs sings sleeps swims "
        "waits").split()
ADVERBS = "alone badly gladly here indoors loudly now often outside quietly slowly softly today well".split()
THINGS = ("apple bag ball bell book cake coat cup drum egg hat key kite lamp map pen ring rope shoe "
          "spoon").split()
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen").split()
AGAIN = "Tell me again."


def sayings(rng, n):
    """n sayings that have no word in common."""
    return [" ".join(words) for words in
            zip(*(rng.sample(kind, n) for kind in (ADJECTIVES, BEINGS, VERBS, ADVERBS)))]


def told(names, said, behind):
    """One clause a speaker, the name before or behind what was said."""
    clauses = [f"{s}, says {n}" if behind else f"{n} says {s}" for n, s in zip(names, said)]
    return "; ".join(clauses) + "."


# ----------------------------------------------------------------------------------------------------------
# What the base is pretrained on: facts and some questions about them, as (question, answer) turns

def deeds(rng, n):
    """The first lesson: deeds, told once more in another order. A name stands right before what is to be
    recalled, which is the simplest form of looking something up; questions come to it from further off."""
    names = rng.sample(NAMES, n)
    done = [" ".join(words) for words in zip(rng.sample(DOES, n), rng.sample(ADVERBS, n))]
    clauses = [f"{name} {deed}" for name, deed in zip(names, done)]
    again = "; ".join(rng.choices(clauses, k=6)) + "."
    asked = [(f"What does {name} do?", f"{deed}.") for name, deed in zip(names, done)]
    return "; ".join(clauses) + ".", [(AGAIN, again), *asked]


def quotes(rng, n):
    names, said = rng.sample(NAMES, n), sayings(rng, n)
    return told(names, said, False), [(f"What did {n} say?", f"{s}.") for n, s in zip(names, said)]


def quotes_behind(rng, n):
    names, said = rng.sample(NAMES, n), sayings(rng, n)
    return told(names, said, True), [("Who spoke first?", f"{names[0]}."),
                                     ("Who spoke last?", f"{names[-1]}.")]


def lists(rng, n):
    things = rng.sample(THINGS, n)
    return ", ".join(things) + ".", [("Repeat the list.", ", ".join(things) + "."),
                                     ("What comes first?", f"{things[0]}."),
                                     ("What comes last?", f"{things[-1]}.")]


def additions(rng, n):
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(n)]
    return "", [(f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", f"{NUMBERS[a + b]}.") for a, b in pairs]


KINDS = {deeds: 20, quotes: 40, quotes_behind: 15, lists: 20, additions: 5}     # per cent of documents


def document(rng, first_lesson):
    """A document as turns (question, answer), of which the first also tells the facts."""
    kind = deeds if first_lesson else rng.choices(list(KINDS), KINDS.values())[0]
    facts, questions = kind(rng, rng.randint(2, 6))
    turns = questions[:1] if first_lesson else rng.sample(questions, min(4, len(questions)))
    return [(f"{facts} {turns[0][0]}".strip(), turns[0][1]), *turns[1:]]


# ----------------------------------------------------------------------------------------------------------
# What it is finetuned on: rows of a data file

SIZES = {"train": 2000, "val": 500, "test": 1000}
TASKS = {"behind": [True], "front": [False], "either": [True, False]}      # where the names may stand


def row(task, rng):
    n = rng.randint(3, 6)
    names, said, i = rng.sample(NAMES, n), sayings(rng, n), rng.randrange(n)
    facts = told(names, said, rng.choice(TASKS[task]))
    return {"prompt": f"{facts} What did {names[i]} say?", "completion": f"{said[i]}."}


def splits(task, seed=0, **sizes):
    """Rows of a task under the names of `sizes`, with no prompt in two of them, nor twice in one."""
    rng, rows = random.Random(f"{task}/{seed}"), {}
    while len(rows) < sum(sizes.values()):
        new = row(task, rng)
        rows.setdefault(new["prompt"], new)
    rows = iter(rows.values())
    return {name: [next(rows) for _ in range(n)] for name, n in sizes.items()}


def write(task, folder):
    """The files train.jsonl, val.jsonl and test.jsonl of a task."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in splits(task, **SIZES).items():
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (Path(folder) / f"{name}.jsonl").write_text(lines, encoding="utf-8")

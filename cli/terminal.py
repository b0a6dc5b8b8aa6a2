"""What a command says, one line that is rewritten, lines that stay, bars; and what it is asked."""

import importlib
import shutil
import sys
import textwrap
import time
from collections import Counter
from contextlib import suppress

from files.run import alpha_by_layer
from text.examples import dropped_in_words, template_in_words
from text.words import to_type


def clock(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


class Progress:
    """One line that is rewritten in a terminal; in a pipe or file, a plain line every five seconds. With a
    title, all that one of several runs has to say stands on its line, exact matches as bars."""

    def __init__(self, title=""):
        self.live = sys.stdout.isatty()
        self.shown, self.begun = time.monotonic(), None
        self.title, self.bars = title, ""

    def update(self, text, last=False):
        text = f"{self.title}  {self.bars}  {text}" if self.title else text
        if self.live:
            fits = text if last else text[:shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{fits}", end="\n" if last else "", flush=True)
        elif last or time.monotonic() - self.shown > 5:
            print(text, flush=True)
            self.shown = time.monotonic()

    def clear(self):
        if self.live:
            print("\r\033[K", end="", flush=True)

    def note(self, text):
        """A line that stays."""
        if self.title:
            return self.update(text)
        self.clear()
        print(text, flush=True)

    # ---- of a run in training ----------------------------------------------------------------------------

    def step(self, run, record):
        """One step of training; the time that is left is reckoned from the steps seen so far."""
        last, now = run.settings.steps, time.monotonic()
        first, begun = self.begun = self.begun or (run.at - 1, now - record["seconds"])
        eta = (now - begun) / (run.at - first) * (last - run.at)
        self.update(f"step {run.at}/{last}  ETA {clock(eta)}  loss {record['loss']:.3f}  "
                    f"lr {record['lr']:.1e}  grad {record['grad_norm']:.2f}  "
                    f"{record['tokens_per_s']:,} tokens/s", last=run.at == last and not self.title)

    def begins(self, run):
        if not self.title:
            announce(run)

    def validated(self, run, record):
        self.bars += "▁▂▃▄▅▆▇█"[round(7 * record["val_exact_match"])]
        alphas = "".join(f"  α {name.removeprefix('alphas_')} {sum(by_layer) / len(by_layer):.2f}"
                         for name, by_layer in record.items() if name.startswith("alphas_"))
        what = f"step {run.at}" if run.at else run.settings.adapter or "base model"
        self.note(f"{what}: validation loss {record['val_loss']:.4f}  perplexity "
                  f"{record['val_perplexity']:.2f}  answer-token accuracy {record['val_accuracy']:.1%}  "
                  f"exact match {record['val_exact_match']:.1%}{alphas}")

    def finished(self, run):
        took = f" after {clock(time.monotonic() - self.begun[1])}" if self.begun else ""
        if self.title:
            return self.update(took, last=True)
        self.note(f"saved {run.folder}{took}; ask it: {to_type('sample.py', '--adapter', run.folder)}")


# ----------------------------------------------------------------------------------------------------------
# Once

def announce(run):
    """Before the first step: every setting and derived number, what was dropped, the first example."""
    dropped, counts = run.derived["dropped"], Counter()
    for reasons in dropped.values():
        counts.update({reason: n for reason, (n, _) in reasons.items()})
    shown = lambda values: ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)
    derived = run.derived | {"dropped": dict(counts)}
    for text in (f"settings: {shown(vars(run.settings))}", f"derived: {shown(derived)}",
                 *(f"dropped of {file}: {dropped_in_words(own)}" for file, own in dropped.items() if own)):
        print(textwrap.fill(text, 110, subsequent_indent="  "))
    print(template_in_words(run.settings.template, run.tokenizer))
    prompt, answer = run.examples[0]
    first = run.tokenizer.decode(prompt)
    print(f"first example, the answer it learns in [[ ]]:\n"
          f"{first}[[{run.tokenizer.decode(prompt + answer)[len(first):]}]]", flush=True)


def bars(bitune, prompt):
    """Each α, layer by layer, as bars: how much of the cache of a prompt comes from a pass after the first.
    ValueError if there is none."""
    width, alphas = 30, alpha_by_layer(bitune, prompt)
    if not alphas:
        raise ValueError(f"method {bitune.method} mixes nothing of this prompt: there is no α to show")
    lines = [f"{'layer':>5}" + "".join(f"  {f'α {name}':<{width + 6}}" for name in alphas)]
    for layer, values in enumerate(zip(*alphas.values())):
        drawn = [f"{a:.3f} " + ("█" * round(min(max(a, 0), 1) * width)).ljust(width, "·") for a in values]
        lines.append(f"{layer:>5}  " + "  ".join(drawn))
    return "\n".join(line.rstrip() for line in lines)


def say(text):
    """To standard error, if there is something to say: standard output is for answers."""
    if text:
        print(text, file=sys.stderr, flush=True)


def say_loaded(name, tensors, bitune, about, template, tokenizer):
    """Say what answers, and by which template, if a bare base leaves a choice of it."""
    if about:
        steps = f", trained for {about['step']} steps" if about["step"] else ""
        say(f"loaded {name}: {tensors} tensors, method {bitune.method}, template {template}{steps}")
    elif tokenizer.chat:
        say(template_in_words(template, tokenizer))


def whole_prompt(text):
    """The one prompt that is asked for: the text itself or, for a dash, all of standard input."""
    if text != "-":
        return text
    return sys.stdin.read().removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")


class Stream:
    """An answer that goes to standard output as its tokens come, up to one of the texts `stops`."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.ids, self.shown, self.ended = tokenizer, stops, [], "", False
        self.start, self.first = time.perf_counter(), None

    def add(self, token):
        """Show what the token adds; returns whether the answer has come to one of the stops."""
        self.first = self.first or time.perf_counter()
        self.ids.append(token)
        text, self.ended = settled(self.tokenizer.decode(self.ids), self.stops)
        self.show(text)
        return self.ended

    def show(self, text):
        print(text[len(self.shown):], end="", flush=True)
        self.shown += text[len(self.shown):]

    def finish(self, prompt, limit):
        """Show what was held back; returns in words how long a prompt of so many tokens and the answer took,
        and whether it was cut by its limit of tokens."""
        end = time.perf_counter()
        self.show(self.shown if self.ended else self.tokenizer.decode(self.ids))
        print(flush=True)
        n, first = len(self.ids), self.first or end
        said = f"prompt: {prompt} tokens, {prompt / (first - self.start):,.0f} tokens/s"
        if n > 1:
            said += f"; answer: {n} tokens, {(n - 1) / (end - first):,.0f} tokens/s"
        return f"[{said}{'' if self.ended or n < limit else f'; cut by the limit of {limit} tokens'}]"


def settled(text, stops):
    """As much of a growing text as will stay, and whether one of the texts `stops` has ended it."""
    ends = [text.index(stop) for stop in stops if stop in text]
    if ends:
        return text[:min(ends)], True
    text = text.rstrip("\ufffd")                        # the rest of a character is still to come
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[:len(text) - max(begun, default=0)], False


def at_terminal():
    return sys.stdin.isatty()


def prompts():
    """The lines of standard input; in a terminal they are asked for, and an empty one ends."""
    if terminal := at_terminal():
        with suppress(ImportError):     # without it a terminal cuts lines at 4,095 characters
            importlib.import_module("readline")
        say("Ask; an empty line or Ctrl-D ends.")
    while True:
        try:
            if terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            line = input().rstrip("\r").removeprefix("\ufeff")
        except EOFError:
            return
        except KeyboardInterrupt:
            if terminal:
                return
            raise
        if terminal and not line:
            return
        if line:
            yield line
        else:
            print()                     # answers stay beside their lines
            say("an empty line asks nothing")

"""Byte-pair encoding as the tokenizers library computes it: the pieces of a text to ids."""

import heapq
import re
from functools import lru_cache

# GPT-2's alphabet: printable characters stand for their own byte, those from U+0100 on for the others.
PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
LETTERS = {b: chr(b) for b in PRINTED}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTED)}
BYTES = {letter: b for b, letter in LETTERS.items()}


@lru_cache(maxsize=100_000)
def to_letters(text):
    """A piece of text as the letters that stand for its bytes."""
    return "".join(LETTERS[b] for b in text.encode())


class BPE:
    """In each piece, of the pairs of tokens that have one of the `ranks` that of the lowest is merged first,
    from the left. What the vocabulary lacks becomes, with `byte_fallback`, the tokens of its bytes, <0x00>
    to <0xFF>, else `unk`, else nothing. `whole`: pieces that are tokens whatever the ranks say."""

    def __init__(self, vocab, ranks, unk=None, fuse_unk=False, byte_fallback=False, whole=()):
        self.vocab, self.unk, self.fuse_unk, self.byte_fallback = vocab, unk, fuse_unk, byte_fallback
        self.whole, self.ranks = whole, ranks
        # Where no token has U+2581 behind another character, no merge crosses into the next word: a text
        # can be cut there, and each word be merged once. (Some of Gemma's have: its texts stay whole.)
        complete = unk is not None or byte_fallback and all(f"<0x{b:02X}>" in vocab for b in range(256))
        crossing = whole or not complete or "▁" not in vocab or \
            any(re.search("[^▁]▁", a + b) for a, b in ranks)
        self.words = re.compile(r"(?s).+" if crossing else r"▁*[^▁]+|▁+")
        self.word_ids = lru_cache(maxsize=100_000)(self.word_ids)

    def encode(self, pieces):
        return [i for piece in pieces for word in self.words.findall(piece) for i in self.word_ids(word)]

    def word_ids(self, word):
        if word in self.whole:
            return (self.vocab[word],)
        return tuple(self.vocab[symbol] for symbol in merged(self.symbols(word), self.ranks))

    def symbols(self, word):
        """The tokens to begin with: characters, bytes, unk (one for a run, if fuse_unk; one that is due
        comes when the vocabulary has a character again)."""
        symbols, due = [], []
        for c in word:
            as_bytes = [f"<0x{b:02X}>" for b in c.encode()] if self.byte_fallback else [None]
            if c in self.vocab:
                symbols += [*due, c]
                due = []
            elif all(symbol in self.vocab for symbol in as_bytes):
                symbols += as_bytes
            elif self.unk is not None:
                symbols += [] if self.fuse_unk else due
                due = [self.unk]
        return symbols + due


def merged(symbols, ranks):
    """What is left of a list of tokens when all pairs in `ranks` are merged, the lowest rank first."""
    n, queue = len(symbols), []
    symbols = [*symbols, None]              # None: the end, and those that are merged into another
    left, right = [*range(-1, n)], [*range(1, n + 1), n]            # neighbours, as merged symbols drop out

    def offer(i):                                                   # the pair that begins at symbol i
        rank = ranks.get((symbols[i], symbols[right[i]]))
        if rank is not None:
            heapq.heappush(queue, (rank, i))
    for i in range(n):
        offer(i)
    while queue:
        rank, i = heapq.heappop(queue)
        j = right[i]
        if ranks.get((symbols[i], symbols[j])) != rank:
            continue                                                # an earlier merge took one of the two
        symbols[i], symbols[j] = symbols[i] + symbols[j], None
        right[i], left[right[j]] = right[j], i
        offer(left[i])
        offer(i)
    return [symbol for symbol in symbols if symbol is not None]

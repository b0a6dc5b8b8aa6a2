"""Byte-pair encoding as the tokenizers library computes it: the pieces of a text to ids.

`BPE` is all of it, merge by merge. `Tiktoken` is the same, faster, for vocabularies that it can express.
"""

import heapq
import re
from functools import lru_cache

import tiktoken

# GPT-2's alphabet: printable characters stand for their own byte, those from U+0100 on for the others.
PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
LETTERS = {b: chr(b) for b in PRINTED}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTED)}
BYTES = {letter: b for b, letter in LETTERS.items()}


class TooLong(ValueError):
    """A text that the tokenizer cannot take in one piece: a run of very many spaces or letters."""


def to_letters(data):
    return "".join(LETTERS[b] for b in data)


def to_bytes(letters):
    return bytes(BYTES[c] for c in letters)


class BPE:
    """In each piece, the pair of tokens that was merged first in training is merged first, from the left.
    What the vocabulary lacks becomes the tokens of its bytes, <0x00> to <0xFF>, with `byte_fallback` and if
    these are there, else `unk`, else nothing. `whole`: pieces that are tokens whatever the merges say."""

    def __init__(self, vocab, merges, unk=None, fuse_unk=False, byte_fallback=False, whole=()):
        self.vocab, self.unk, self.fuse_unk, self.byte_fallback = vocab, unk, fuse_unk, byte_fallback
        self.whole, self.ranks = whole, {pair: rank for rank, pair in enumerate(merges)}
        # Where no token has U+2581 behind another character, no merge crosses into the next word: a text
        # can be cut there, and each word be merged once. (Some of Gemma's have: its texts stay whole.)
        complete = unk is not None or byte_fallback and all(f"<0x{b:02X}>" in vocab for b in range(256))
        crossing = whole or not complete or "▁" not in vocab or \
            any(re.search("[^▁]▁", a + b) for a, b in merges)
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
            if c in self.vocab:
                symbols += [*due, c]
                due = []
                continue
            as_bytes = [f"<0x{b:02X}>" for b in c.encode()] if self.byte_fallback else [""]
            if all(symbol in self.vocab for symbol in as_bytes):
                symbols += as_bytes
            elif self.unk is not None:
                symbols += [] if self.fuse_unk else due
                due = [self.unk]
        return symbols + due


def merged(symbols, ranks):
    """What is left of a list of tokens when all pairs in `ranks` are merged, the lowest rank first."""
    n = len(symbols)
    left, right = list(range(-1, n)), list(range(1, n + 1))         # neighbours, as merged symbols drop out
    queue = []

    def offer(i):                                                   # the pair that begins at symbol i
        if i >= 0 and right[i] < n:
            rank = ranks.get((symbols[i], symbols[right[i]]))
            if rank is not None:
                heapq.heappush(queue, (rank, i))
    for i in range(n):
        offer(i)
    while queue:
        rank, i = heapq.heappop(queue)
        j = right[i]
        if j >= n or ranks.get((symbols[i], symbols[j])) != rank:
            continue                                                # an earlier merge took one of the two
        symbols[i], symbols[j] = symbols[i] + symbols[j], ""
        right[i], left[right[j]] = right[j], i
        offer(left[i])
        offer(i)
    return [s for s in symbols if s]


# ----------------------------------------------------------------------------------------------------------
# By tiktoken

class Tiktoken:
    """Byte-level BPE where whatever makes a token is merged: `tokens` are (bytes, id) in order of priority,
    all 256 bytes among them; `pattern` cuts a text into the pieces within which merging goes."""

    def __init__(self, pattern, tokens):
        self.ids = [i for _, i in tokens]                           # tiktoken's own ids are the priorities
        ranks = {token: rank for rank, (token, _) in enumerate(tokens)}
        self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, pieces):
        ids = []
        for text in pieces:
            if re.search(r"\s{200000}", text):
                raise TooLong("it has a run of 200,000 spaces, which the tokenizer cannot take")
            try:
                ids += [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]
            except BaseException as problem:        # tiktoken's own panic is no Exception
                if type(problem).__name__ != "PanicException":
                    raise
                raise TooLong("it has a run of spaces or letters that the tokenizer cannot take") from None
        return ids


def merge_order(vocab, merges, ignore_merges):
    """The tokens of a byte-level vocabulary in the order in which they are merged, (bytes, id). None if
    tiktoken, which merges any two tokens that make one, and takes a piece that is a token as it stands,
    would do otherwise than `merges`: so it is where they were extended with another tokenizer's."""
    order, last = dict.fromkeys(BYTES), None
    for a, b in merges:
        if a + b in order and a + b != last:
            return None                                             # one token at two priorities
        last = a + b
        order[last] = None
    if not order.keys() <= vocab.keys() or not set().union(*order) <= BYTES.keys():
        return None
    # Two tokens that make one, and are no pair of `merges`, come to stand side by side only if the token's
    # own bytes are merged to these two.
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for t in order:
        if any((t[:i], t[i:]) not in ranks and t[:i] in order and t[i:] in order for i in range(1, len(t))) \
                and len(merged(list(t), ranks)) == 2:
            return None
    tokens = [to_bytes(token) for token in order]
    if not ignore_merges and not to_themselves(tokens, ranks):
        return None
    return [(data, vocab[token]) for token, data in zip(order, tokens)]


def to_themselves(tokens, ranks):
    """Whether the bytes of each token are merged to it, where it is a part of a piece, too."""
    apart = set(range(128)).difference(*(token for token in tokens if len(token) > 1))
    if not apart:
        return False
    end = chr(min(apart))               # no merge takes it: with it behind, no token is a whole piece
    ranked, texts, expected = {token: rank for rank, token in enumerate(tokens)}, [], []
    for rank, token in enumerate(tokens):
        try:
            texts.append(token.decode() + end)
            expected += [rank, ranked[end.encode()]]
        except UnicodeDecodeError:      # a part of a character, which no text can be
            if len(merged(list(to_letters(token)), ranks)) > 1:
                return False
    pattern = f"[^{re.escape(end)}]*{re.escape(end)}"
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranked, special_tokens={})
    return encoding.encode_ordinary("".join(texts)) == expected

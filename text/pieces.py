"""How tokenizer.json cuts a text into pieces before BPE, and puts tokens together again.

A stretch of text has a `begin`: True where a text begins, None behind an added token, False where it
continues an earlier text, which then gets no dummy space in front. A normalizer is a function of (text,
begin) to a text, a pre-tokenizer one to pieces, each again with a `begin`, a decoder one of a list of tokens
to another. Every step that is read stands in a table: its type, its fields, and what makes its function.
"""

import re
import unicodedata
from functools import lru_cache, partial, reduce
from itertools import groupby

import numpy as np
import tiktoken

from text.bpe import BYTES, to_letters
from text.words import check_fields

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
INSIDE = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
          "decoder": "decoders"}


def steps(part, where):
    """The steps of one part of tokenizer.json: null, a single step, or a Sequence of them."""
    if part is None:
        return []
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"its {where} is {part!r:.60}, expected an object with a type")
    if part["type"] != "Sequence":
        return [part]
    inside = check_fields(part, f"its {where}", {INSIDE[where]: (list, ...)}, neutral=("type",))
    return [step for inner in inside[INSIDE[where]] for step in steps(inner, where)]


def functions(part, where, table):
    """What the steps of a part do, as functions."""
    made = []
    for step in steps(part, where):
        if (kind := step["type"]) not in table:
            raise ValueError(f"its {where} {kind} is not supported")
        fields, make = table[kind]
        made.append(make(**check_fields(step, f"its {kind}", fields, neutral=("type",))))
    return made


@lru_cache
def characters(escape):
    r"""The characters of a class such as \p{L}, in order: by tiktoken, whose tables are Oniguruma's, while
    Python's own are older, and its \s and \w have others."""
    codes = np.arange(0x110000, dtype="<u4")
    every = codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")
    bytes_alone = {bytes([b]): b for b in range(256)}
    try:
        find = tiktoken.Encoding("", pat_str=escape, mergeable_ranks=bytes_alone, special_tokens={})
    except ValueError:
        raise ValueError(f"its pattern has {escape!r}, which is not known here") from None
    return bytes(find.encode_ordinary(every)).decode()


@lru_cache
def ranges(escape):
    """The characters of a class as ranges, to stand within [ ]."""
    escape = {"[:space:]": r"\s", "[:digit:]": r"\d"}.get(escape, escape)
    codes = np.frombuffer(characters(escape).encode("utf-32-le"), "<u4").astype(int)
    last = np.flatnonzero(np.diff(codes, append=-2) != 1)
    first = np.flatnonzero(np.diff(codes, prepend=-2) != 1)
    spans = (f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(codes[first], codes[last]))
    return "".join(spans) or r"\ud800"          # such as \p{Cs}: no text has half of a character


CLASS = r"(?:\\[pP]\{\^?(?!(?i:graph|print|word)\})\w+\}|\\[sSdD]|(?!\A)\[:(?:space|digit):\])"
# What Python reads in a regular expression as Oniguruma does, once classes are spelt out: part by part.
READ = re.compile("|".join([
    rf"\[(?!\^?\])\^?(?:{CLASS}(?!-)|(?!&&|-{CLASS})(?:\\[nrtfv\W_]|[^\[\]\\]))+\]",        # a set
    CLASS, r"\A\\A", r"\\[nrtfv\W_]", r"[^\\\[({^$]", r"\{(?!\d*,?\d*\}[?+])",   # \A: at first
    r"\((?!\?)", r"\(\?(?:[:>=!]|<[=!])", r"\(\?i:(?![^)]*s[st])['|\[\]sdmtlvre]*\)"]))       # groups


@lru_cache
def regular(pattern):
    """A regular expression of Oniguruma's, in Python's words and compiled; ValueError where Python would
    read it otherwise, or where it may fit between two characters."""
    out = bare = ""                     # bare: without what only looks ahead or behind
    looks, at = [], 0                   # for each open group, whether it looks
    while at < len(pattern):
        if not (match := READ.match(pattern, at)):
            raise ValueError(f"its pattern {pattern!r} has {pattern[at:]!r:.20}, which is read otherwise")
        part, at = match[0], match.end()
        said = re.sub(rf"(?s)({CLASS})|\\.", lambda of: ranges(of[1]) if of[1] else of[0], part)
        said = f"[{said}]" if re.fullmatch(CLASS, part) else said
        if part[0] == "(" and part[-1] != ")":
            looks.append(part[-1] in "=!")
        bare += "" if any(looks) else said
        if part == ")" and looks:
            looks.pop()
        out += said
    try:
        found, empty = re.compile(out), re.compile(bare).fullmatch("")
    except (re.error, OverflowError) as problem:
        raise ValueError(f"its pattern {pattern!r} is not supported: {problem}") from None
    if empty:
        raise ValueError(f"its pattern {pattern!r} may fit between two characters, which is not supported")
    return found


def pattern_of(part):
    """A step's own pattern, {"String": ...} or {"Regex": ...}, compiled."""
    fields = check_fields(part, "its pattern", {"String": (str, ""), "Regex": (str, "")})
    if len(part) != 1 or not any(fields.values()):
        raise ValueError(f"its pattern {part!r:.60} is not supported")
    return regular(fields["Regex"]) if fields["Regex"] else re.compile(re.escape(fields["String"]))


def normalizer(part):
    """What is done to a stretch before it is cut, as one function of (text, begin)."""
    made = functions(part, "normalizer", NORMALIZERS)
    return lambda text, begin: reduce(lambda so_far, function: function(so_far, begin), made, text)


def replacing(pattern, content):
    found, at_start = pattern_of(pattern), pattern.get("Regex", "").startswith(r"\A")

    def replace(text, begin):
        return text if begin is False and at_start else found.sub(lambda match: content, text)
    return replace


FLAG, ON, TEXT, PART = (bool, ...), (bool, True), (str, ...), (dict, ...)       # fields, for check_fields
REPLACE = {"pattern": PART, "content": TEXT}
NORMALIZERS = {
    "Prepend": ({"prepend": TEXT}, lambda prepend: lambda text, begin:
                prepend + text if text and begin is not False else text),
    "Replace": (REPLACE, replacing),
    **{form: ({}, lambda form=form: lambda text, begin: unicodedata.normalize(form, text))
       for form in ("NFC", "NFD", "NFKC", "NFKD")},
}


def pre_tokenizer(part):
    """How a normalised stretch is cut, as one function of (text, begin) to a list of pieces."""
    made = functions(part, "pre_tokenizer", PRE_TOKENIZERS)
    further = lambda pieces, function: [new for piece in pieces for new in function(*piece)]
    return lambda text, begin: [piece for piece, _ in reduce(further, made, [(text, begin)])]


def to_byte_level(add_prefix_space, use_regex, trim_offsets):
    gpt2 = regular(GPT2_PATTERN)

    def cut(text, begin):
        if add_prefix_space and begin is not False and not text.startswith(" "):
            text = f" {text}"
        pieces = split(text, begin, gpt2, "Isolated") if use_regex else [(text, begin)]
        return [(to_letters(piece), begin) for piece, begin in pieces]
    return cut


def to_metaspace(replacement, prepend_scheme, add_prefix_space, **fields):
    mark = re.compile(re.escape(replacement))
    if len(replacement) != 1 or not add_prefix_space and prepend_scheme != "never":
        raise ValueError("its Metaspace contradicts itself")

    def cut(text, begin):
        text = text.replace(" ", replacement)
        prepends = begin if prepend_scheme == "first" else prepend_scheme == "always" and begin is not False
        if prepends and not text.startswith(replacement):
            text = replacement + text
        return split(text, begin, mark, "MergedWithNext") if fields["split"] else [(text, begin)]
    return cut


def split(text, begin, found, behavior, invert=False):
    """The pieces of a text, cut at a pattern's matches (inverted: at what is between them). These stand
    alone, are removed, or join the piece before or behind them; Contiguous: neighbours join."""
    parts, at = [], 0                                       # (start, end, whether it matches)
    for start, end in [*(match.span() for match in found.finditer(text)), (len(text), len(text))]:
        if at < start:
            parts.append((at, start, invert))
        if start < end:
            parts.append((start, end, not invert))
        at = end
    if behavior == "Removed":
        parts = [part for part in parts if not part[2]]
    pieces, before = [], False
    for start, end, matches in reversed(parts) if behavior == "MergedWithNext" else parts:
        joins = matches == before if behavior == "Contiguous" else "Merged" in behavior and matches > before
        if pieces and joins:
            start, end = min(start, pieces[-1][0]), max(end, pieces.pop()[1])
        pieces.append((start, end))
        before = matches
    return [(text[start:end], begin if start == 0 else None) for start, end in sorted(pieces)]


METASPACE = {"replacement": TEXT, "prepend_scheme": (("first", "always", "never"), "always"), "split": ON,
             "add_prefix_space": ON, "str_rep": (str, "")}
BEHAVIORS = (("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"), ...)
PRE_TOKENIZERS = {
    "ByteLevel": ({"add_prefix_space": FLAG, "use_regex": ON, "trim_offsets": ON}, to_byte_level),
    "Digits": ({"individual_digits": FLAG}, lambda individual_digits: partial(
        split, found=regular(r"\p{N}"), behavior="Isolated" if individual_digits else "Contiguous")),
    "Split": ({"pattern": PART, "behavior": BEHAVIORS, "invert": FLAG}, lambda pattern, **how: partial(
        split, found=pattern_of(pattern), **how)),
    "Metaspace": (METASPACE, to_metaspace),
}


def decoder(part):
    """How tokens become a text again, as one function."""
    made, between = functions(part, "decoder", DECODERS), " " if part is None else ""
    return lambda tokens: between.join(reduce(lambda so_far, function: function(so_far), made, tokens))


def from_byte_level(tokens):
    """Letters to the bytes that they stand for; a token with any other character is text as it stands."""
    data = b"".join(bytes(BYTES[c] for c in token) if BYTES.keys() >= set(token) else token.encode()
                    for token in tokens)
    return [data.decode("utf-8", errors="replace")]


def byte_fallback(tokens):
    """Runs of <0x00> to <0xFF> to their characters; a run that is no UTF-8 to as many U+FFFD."""
    out = []
    for is_byte, run in groupby(tokens, lambda token: bool(re.fullmatch("<0x[0-9A-Fa-f]{2}>", token))):
        data = bytes(int(token[3:5], 16) for token in run) if is_byte else b""
        try:
            out += [data.decode()] if is_byte else run
        except UnicodeDecodeError:
            out += ["\ufffd"] * len(data)
    return out


def in_each(pattern, content):
    """A pattern replaced in each token."""
    return lambda tokens: [pattern.sub(lambda match: content, token) for token in tokens]


def from_metaspace(replacement, prepend_scheme, **fields):
    first = " " if prepend_scheme == "never" else ""        # the dummy space is dropped
    return lambda tokens: [token.replace(replacement, " " if i else first) for i, token in enumerate(tokens)]


BYTE_LEVEL = {"add_prefix_space": ON, "trim_offsets": ON, "use_regex": ON}      # they matter in cutting only
DECODERS = {
    "ByteLevel": (BYTE_LEVEL, lambda **fields: from_byte_level),
    "ByteFallback": ({}, lambda: byte_fallback),
    "Fuse": ({}, lambda: lambda tokens: ["".join(tokens)]),
    "Replace": (REPLACE, lambda pattern, content: in_each(pattern_of(pattern), content)),
    "Strip": ({"content": TEXT, "start": (int, ...), "stop": (0, ...)}, lambda content, start, stop: in_each(
        re.compile(f"^{re.escape(content)}{{0,{start}}}"), "")),
    "Metaspace": (METASPACE, from_metaspace),
}

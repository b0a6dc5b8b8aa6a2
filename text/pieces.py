"""How tokenizer.json cuts a text into pieces before BPE: normalizers, pre-tokenizers and their patterns.

A stretch of text has a `begin`: True where a text begins, None behind an added token, False where it
continues an earlier text, which then gets no dummy space in front. Every form that is read stands here; each
`take` names all fields of its part, and what they may hold.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np
import tiktoken

from text.bpe import BYTES, to_letters
from text.words import listed

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut off one by one before GPT-2's pattern sees the text: to it, a text ends before each digit.
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
OR_TRUE, PART, TEXT = (bool, True), (dict, ...), (str, ...)         # forms, as `take` takes them
SCHEMES = ("first", "always", "never")
COMPLETE = (GPT2_PATTERN, LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", ""))     # they leave no gaps


def take(part, where, **forms):
    """The values of a part's fields: of each, the form it must have (a type, or a tuple of values) and what
    stands for it where it is left out (... if it may not be). ValueError for another form, and for a field
    that is not among them: nothing is overlooked."""
    if not isinstance(part, dict):
        raise ValueError(f"its {where} is {part!r:.60}, expected an object")
    if odd := part.keys() - {"type", *forms}:
        raise ValueError(f"its {where} has {listed(sorted(odd), ', ')}, which is not known here")
    values = []
    for name, (form, default) in forms.items():
        value = part.get(name, default)
        if value is ...:
            raise ValueError(f"its {where} lacks {name}")
        fits = value in form if isinstance(form, tuple) else form is object or type(value) is form
        if not fits and value is not default:
            raise ValueError(f"its {where} has the {name} {value!r:.60}, which is not supported")
        values.append(value)
    return values


def steps(part, where):
    """The steps of one part of tokenizer.json: null, a single step, or a Sequence of them."""
    inside = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
              "decoder": "decoders"}[where]
    if part is None:
        return []
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"its {where} is {part!r:.60}, expected an object with a type")
    if part["type"] != "Sequence":
        return [part]
    (parts,) = take(part, where, **{inside: (list, ...)})
    return [step for p in parts for step in steps(p, where)]


# ----------------------------------------------------------------------------------------------------------
# Patterns

@lru_cache
def characters(escape):
    r"""The characters of a class such as \p{L}, in order: by tiktoken, whose tables are Oniguruma's, while
    Python's own are older, and its \s and \w have others."""
    codes = np.arange(0x110000, dtype="<u4")
    every = codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")
    try:
        find = tiktoken.Encoding("", pat_str=escape, special_tokens={},
                                 mergeable_ranks={bytes([b]): b for b in range(256)})
    except ValueError:
        raise ValueError(f"its pattern has {escape!r}, which is not known here") from None
    return bytes(find.encode_ordinary(every)).decode()


@lru_cache
def ranges(escape):
    """The characters of a class as ranges, to stand within [ ]."""
    codes = np.frombuffer(characters(escape).encode("utf-32-le"), "<u4").astype(int)
    last = np.flatnonzero(np.diff(codes, append=-2) != 1)
    first = np.concatenate([[0], last[:-1] + 1])
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(codes[first], codes[last]))


@lru_cache
def regular(pattern):
    """A regular expression of Oniguruma's, in Python's words and compiled; ValueError where Python would
    read it otherwise, or where it may fit between two characters."""
    out = bare = before = ""            # bare: without what only looks ahead or behind
    inside, looks = False, []           # within [ ]; for each open group, whether it looks
    parts = r"\\[pP]\{\^?\w+\}|\\.|\[:\w+:\]|\(\?i:[^)]*\)|\(\?<?.|\{\d*,?\d*\}[?+]|."
    for part in re.findall(parts, pattern, re.S):
        said = part = {"[:space:]": r"\s", "[:digit:]": r"\d"}.get(part, part) if inside else part
        if re.match(r"\\[pPsSdD]", part):
            odd = inside and before == "-"
            said = ranges(part) if inside else f"[{ranges(part)}]"
        elif part[0] == "\\":
            odd = part[1].isalnum() and part[1] not in "nrtfv" and (part[1] != "A" or inside or out)
        elif inside:
            odd = part[0] == "[" or part == before == "&" or part == "]" and before in ("[", "^[") \
                or part == "-" and re.match(r"\\[pPsSdD]", before)
        elif part[0] == "(":
            contraction = re.fullmatch(r"\(\?i:['|\[\]sdmtlvre]*\)", part) and not re.search("s[st]", part)
            odd = part not in ("(", "(?:", "(?>", "(?=", "(?!", "(?<=", "(?<!") and not contraction
            looks += [] if contraction else [part[-1] in "=!"]
        else:
            odd = part in ("^", "$") or part[0] == "{" and len(part) > 1
        if odd:
            raise ValueError(f"its pattern {pattern!r} has {part!r}, which is read otherwise here")
        bare += "" if any(looks) else said
        if part == ")" and not inside and looks:
            looks.pop()
        out += said
        before = "^[" if part == "^" and before == "[" else part
        inside = part != "]" if inside else part == "["
    try:
        found, empty = re.compile(out), re.compile(bare).fullmatch("")
    except (re.error, OverflowError) as problem:
        raise ValueError(f"its pattern {pattern!r} is not supported: {problem}") from None
    if empty:
        raise ValueError(f"its pattern {pattern!r} may fit between two characters, which is not supported")
    return found


def replace(found, content, text):
    return found.sub(lambda match: content, text)


def pattern_of(part, where):
    """A step's own pattern, {"String": ...} or {"Regex": ...}, compiled."""
    if isinstance(part, dict) and list(part) == ["String"] and isinstance(part["String"], str):
        if part["String"]:
            return re.compile(re.escape(part["String"]))
    if isinstance(part, dict) and list(part) == ["Regex"] and isinstance(part["Regex"], str):
        return regular(part["Regex"])
    raise ValueError(f"its {where} has the pattern {part!r:.60}, which is not supported")


# ----------------------------------------------------------------------------------------------------------
# Normalizers: functions of (text, begin)

def normalizer(part):
    """What is done to a stretch before it is cut, as one function of (text, begin)."""
    functions = [one_normalizer(p) for p in steps(part, "normalizer")]

    def normalize(text, begin):
        for f in functions:
            text = f(text, begin)
        return text
    return normalize


def one_normalizer(p):
    kind = p["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        take(p, kind)
        return lambda text, begin: unicodedata.normalize(kind, text)
    if kind == "Prepend":
        (mark,) = take(p, kind, prepend=TEXT)
        return lambda text, begin: mark + text if text and begin is not False else text
    if kind == "Replace":
        pattern, content = take(p, kind, pattern=PART, content=TEXT)
        found, at_start = pattern_of(pattern, kind), pattern.get("Regex", "").startswith(r"\A")

        return lambda text, begin: text if begin is False and at_start else replace(found, content, text)
    raise ValueError(f"its normalizer {kind} is not supported")


# ----------------------------------------------------------------------------------------------------------
# Pre-tokenizers: functions of (text, begin) to pieces, each again with a `begin`

def pre_tokenizer(part):
    """How a normalised stretch is cut, as one function of (text, begin) to a list of pieces."""
    functions = [one_pre_tokenizer(p) for p in steps(part, "pre_tokenizer")]

    def cut(text, begin):
        pieces = [(text, begin)]
        for f in functions:
            pieces = [new for piece in pieces for new in f(*piece)]
        return [piece for piece, _ in pieces]
    return cut


def one_pre_tokenizer(p):
    kind, flag = p["type"], (bool, ...)
    if kind == "ByteLevel":
        prefix, own, _ = take(p, kind, add_prefix_space=flag, use_regex=OR_TRUE, trim_offsets=OR_TRUE)
        gpt2 = regular(GPT2_PATTERN)

        def byte_level(text, begin):
            text = f" {text}" if prefix and begin is not False and not text.startswith(" ") else text
            pieces = split(text, begin, gpt2, "Isolated") if own else [(text, begin)]
            return [(to_letters(piece.encode()), begin) for piece, begin in pieces]
        return byte_level
    if kind == "Digits":
        (single,) = take(p, kind, individual_digits=flag)
        digit = regular(r"\p{N}")
        return lambda text, begin: split(text, begin, digit, "Isolated" if single else "Contiguous")
    if kind == "Split":
        behavior, invert, pattern = take(p, kind, behavior=(BEHAVIORS, ...), invert=flag, pattern=PART)
        found = pattern_of(pattern, kind)
        return lambda text, begin: split(text, begin, found, behavior, invert)
    if kind == "Metaspace":
        mark, scheme, cuts, prefix, _ = take(
            p, kind, replacement=TEXT, prepend_scheme=(SCHEMES, "always"), split=OR_TRUE,
            add_prefix_space=OR_TRUE, str_rep=(str, ""))
        if len(mark) != 1 or not prefix and scheme != "never":
            raise ValueError(f"its Metaspace, {p}, contradicts itself")
        found = re.compile(re.escape(mark))

        def metaspace(text, begin):
            text = text.replace(" ", mark)
            if (scheme == "always" and begin is not False or scheme == "first" and begin) \
                    and not text.startswith(mark):
                text = mark + text
            return split(text, begin, found, "MergedWithNext") if cuts else [(text, begin)]
        return metaspace
    raise ValueError(f"its pre_tokenizer {kind} is not supported")


def split(text, begin, found, behavior, invert=False):
    """The pieces of a text, cut at the matches of a pattern (or, inverted, at what is between them): these
    stand alone, or are removed, or join the piece before or behind them; Contiguous: neighbours join."""
    parts, at = [], 0                                       # (start, end, whether it matches)
    for start, end in [*(match.span() for match in found.finditer(text)), (len(text), len(text))]:
        parts += [(at, start, invert)] if at < start else []
        parts += [(start, end, not invert)] if start < end else []
        at = end
    if behavior == "Removed":
        parts = [part for part in parts if not part[2]]
    pieces, before = [], False
    for start, end, matches in reversed(parts) if behavior == "MergedWithNext" else parts:
        joins = matches == before if behavior == "Contiguous" else "Merged" in behavior and matches > before
        if joins and pieces:
            start, end = min(start, pieces[-1][0]), max(end, pieces.pop()[1])
        pieces.append((start, end))
        before = matches
    return [(text[start:end], begin if start == 0 else None) for start, end in sorted(pieces)]


def one_pattern(part):
    """The one pattern that cuts as well as a byte-level pre_tokenizer's steps do, for tiktoken; or None."""
    parts = steps(part, "pre_tokenizer")
    last = {"add_prefix_space": False, "use_regex": True} | parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not last["use_regex"]:
        split_by = [(p.get("pattern"), p.get("behavior"), p.get("invert")) for p in parts[:-1]]
        return next((pattern for pattern in COMPLETE
                     if split_by == [({"Regex": pattern}, "Isolated", False)]
                     or split_by == [({"Regex": pattern}, "Removed", True)]), None)
    digits = {"type": "Digits", "individual_digits": True}
    return {0: GPT2_PATTERN, 1: DIGITS_PATTERN if parts[0] == digits else None}.get(len(parts) - 1)


# ----------------------------------------------------------------------------------------------------------
# Decoders: functions of a list of tokens to another, which are joined in the end

def decoder(part):
    """How tokens become a text again, as one function."""
    functions = [one_decoder(p) for p in steps(part, "decoder")]
    between = " " if part is None else ""

    def decode(tokens):
        for f in functions:
            tokens = f(tokens)
        return between.join(tokens)
    return decode


def one_decoder(p):
    kind = p["type"]
    if kind == "ByteLevel":
        take(p, kind, add_prefix_space=OR_TRUE, trim_offsets=OR_TRUE, use_regex=OR_TRUE)
        return byte_level
    if kind == "ByteFallback":
        take(p, kind)
        return byte_fallback
    if kind == "Fuse":
        take(p, kind)
        return lambda tokens: ["".join(tokens)]
    if kind == "Replace":
        pattern, content = take(p, kind, pattern=PART, content=TEXT)
        found = pattern_of(pattern, kind)
        return lambda tokens: [replace(found, content, token) for token in tokens]
    if kind == "Strip":
        mark, start, stop = take(p, kind, content=TEXT, start=(int, ...), stop=((0,), ...))
        at_start = re.compile(f"^{re.escape(mark)}{{0,{start}}}")
        return lambda tokens: [at_start.sub("", token) for token in tokens]
    if kind == "Metaspace":
        mark, scheme, prefix, *_ = take(
            p, kind, replacement=TEXT, prepend_scheme=(SCHEMES, "always"), add_prefix_space=OR_TRUE,
            split=OR_TRUE, str_rep=(str, ""))
        first = " " if scheme == "never" else ""
        return lambda tokens: [token.replace(mark, " " if i else first) for i, token in enumerate(tokens)]
    raise ValueError(f"its decoder {kind} is not supported")


def byte_level(tokens):
    """Letters to the bytes that they stand for; a token with any other character is text as it stands."""
    data = b"".join(bytes(BYTES[c] for c in token) if BYTES.keys() >= set(token) else token.encode()
                    for token in tokens)
    return [data.decode("utf-8", errors="replace")]


def byte_fallback(tokens):
    """Runs of <0x00> to <0xFF> to their characters; a run that is no UTF-8 to as many U+FFFD."""
    out, data = [], b""
    for token in [*tokens, None]:                           # None ends the last run
        if token is not None and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            data += bytes([int(token[3:5], 16)])
            continue
        try:
            out += [data.decode()] if data else []
        except UnicodeDecodeError:
            out += ["\ufffd"] * len(data)
        out += [] if token is None else [token]
        data = b""
    return out

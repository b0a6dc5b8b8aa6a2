"""Text to token ids and back, from the files that come with public checkpoints.

Three kinds of file are read, told apart by what is in them:

    tokenizer.model   tiktoken's format: base64 bytes and a rank a line (Llama 3)
    tokenizer.json    byte-level BPE (Llama 3, SmolLM2, Qwen2): also run by tiktoken
    tokenizer.json    SentencePiece BPE with byte fallback (Llama 2, TinyLlama, Mistral): run here

Whatever is in a user's text stays text: a special token such as </s> is never made from a string.
"""

import base64
import heapq
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import tiktoken

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut off one by one before GPT-2's pattern sees the text: to it, a text ends before each digit.
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
COMPLETE = (GPT2_PATTERN, LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", ""))     # they leave no gaps
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>",
                  *(f"<|reserved_special_token_{i}|>" for i in range(4)), "<|start_header_id|>",
                  "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
                  *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)))


class TooLong(ValueError):
    """A text that the tokenizer cannot take in one piece: a run of very many spaces or letters."""


class Added(NamedTuple):
    """A token that tokenizer.json adds to the vocabulary, with its flags."""
    content: str
    id: int
    special: bool                   # its string is plain text all the same: it is made by id alone
    single_word: bool = False       # it matches only where no word goes on
    lstrip: bool = False            # it takes the white space before it with it
    rstrip: bool = False
    normalized: bool = False        # it matches in the normalised text, not in the text as it stands


class Cutter:
    """Cuts a text at the added tokens in it, as the tokenizers library does: the longest one first."""

    def __init__(self, tokens, normalize=str):
        self.tokens = {normalize(t.content): t for t in tokens if t.content}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))

    def __call__(self, text):
        """The pieces of a text: stretches (str) and tokens (Added), in turn."""
        if not any(not t.special for t in self.tokens.values()):
            return [text] if text else []
        pieces, at = [], 0
        for match in self.pattern.finditer(text):
            token, (start, end) = self.tokens[match.group()], match.span()
            inside = re.search(r"\w$", text[max(0, start - 1):start]) or re.match(r"\w", text[end:end + 1])
            if token.special or token.single_word and inside:
                continue
            if token.lstrip:
                start = max(at, len(text[:start].rstrip()))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            pieces += [text[at:start], token] if start > at else [token]
            at = end
        return pieces + [text[at:]] if at < len(text) else pieces


class Tokenizer:
    """`encode` and `decode`, the special tokens by name, and those that matter: bos_id, which begins a text
    (None if this model has none), and stop_ids, any of which ends an answer; eos_id is the one to train on
    (None if unknown)."""

    def __init__(self, codec, added, bos_id, eos_id, stop_ids):
        self.codec, self.special = codec, {t.content: t.id for t in added if t.special}
        self.bos_id, self.eos_id, self.stop_ids = bos_id, eos_id, frozenset(stop_ids)
        self.names = {t.id: t.content for t in added}
        self.added = {t.content: t.id for t in added if not t.special}      # they match in plain text
        self.cut_raw = Cutter([t for t in added if not t.normalized])
        self.cut_normalized = Cutter([t for t in added if t.normalized], lambda t: codec.normalize(t, True))

    def limit(self, vocab_size):
        """Forget special tokens beyond the model's vocabulary: as no text makes them, they do no harm (some
        checkpoints come with a <pad> there). ValueError if a text, BOS or a stop token would make one."""
        made = [self.codec.max_id, *self.added.values(), *self.stop_ids, self.bos_id or 0]
        if max(made) >= vocab_size:
            raise ValueError(f"the tokenizer's ids go up to {max(made)}, but the model's vocabulary has "
                             f"{vocab_size} tokens: they do not belong together")
        self.special = {name: i for name, i in self.special.items() if i < vocab_size}

    def encode(self, text, begin=True):
        """The ids of a text, without BOS. begin=False says that it continues an earlier text: then
        SentencePiece's dummy prefix, a space before the first word, is not put in front."""
        ids, first = [], True
        for piece in self.cut_raw(text):
            if isinstance(piece, Added):
                ids.append(piece.id)
            else:
                for part in self.cut_normalized(self.codec.normalize(piece, begin or not first)):
                    ids += [part.id] if isinstance(part, Added) else self.codec.encode(part, begin, first)
                    first = False
            first = False
        return ids

    def decode(self, ids):
        """The text of ids; special tokens are written out, bytes that are no UTF-8 become U+FFFD."""
        return self.codec.decode(ids, self.names)

    @classmethod
    def from_pretrained(cls, path):
        """Read the tokenizer of a checkpoint folder (or one tokenizer file in it); else ValueError."""
        path = Path(path)
        files = [path] if path.is_file() else [path / f for f in ("tokenizer.json", "tokenizer.model")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise ValueError(f"{path} has no tokenizer.json and no tokenizer.model")
        config = read_beside(file.parent / "tokenizer_config.json")
        try:
            read = read_tokenizer_json if file.suffix == ".json" else read_tiktoken
            codec, added, bos = read(file, config)
        except KeyError as error:
            raise ValueError(f"{file} cannot be used: it lacks {error}") from None
        except (ValueError, TypeError, AttributeError) as error:       # the last two: a part of another kind
            raise ValueError(f"{file} cannot be used: {error}") from None

        here = {t.content for t in added}
        for i, t in config.get("added_tokens_decoder", {}).items():     # some were added to the file later
            if t["content"] not in here and t["content"] not in codec.vocab:
                added.append(read_added(t | {"id": int(i)}))
        ids = codec.vocab | {t.content: t.id for t in added}

        def named(key):                         # "</s>", or {"content": "</s>", ...}, or null
            token = config.get(key)
            token = token["content"] if isinstance(token, dict) else token
            if token is not None and token not in ids and key == "eos_token":
                raise ValueError(f"{file.parent}: {file.name} has no {token!r}, the eos_token of "
                                 "tokenizer_config.json")
            return ids.get(token)
        bos_id = ids.get(bos, named("bos_token") if config.get("add_bos_token") else None)
        stop = read_beside(file.parent / "generation_config.json").get("eos_token_id")
        if stop is None:
            stop = read_beside(file.parent / "config.json").get("eos_token_id")
        stop = [stop] if isinstance(stop, int) else stop or []
        eos_id = named("eos_token")
        if eos_id is None:
            eos_id = stop[0] if stop else ids.get("<|end_of_text|>", ids.get("</s>"))
        return cls(codec, added, bos_id, eos_id, {eos_id, *stop} - {None})


def read_added(t):
    """An entry of added_tokens, whose flags are all that there are."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    if odd := t.keys() - {"id", "content", "special", *flags}:
        raise ValueError(f"its added token {t['content']!r} has {', '.join(sorted(odd))}: not known here")
    return Added(t["content"], t["id"], bool(t.get("special", False)), *(bool(t.get(f)) for f in flags))


def read_beside(path):
    """What a JSON file beside the tokenizer says, if it is there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not what it should be: expected a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------
# Byte-level BPE

class ByteLevel:
    """BPE over bytes, run by tiktoken: `tokens` are (bytes, id) in order of merge priority."""

    def __init__(self, pattern, tokens, normalize=lambda text, begin: text, unk=None, vocab={}):
        self.normalize, self.vocab = normalize, vocab
        self.bytes = {i: token for token, i in tokens}
        self.ids = [i for _, i in tokens]                           # tiktoken's own ids are the priorities
        ranks = {token: rank for rank, (token, _) in enumerate(tokens)}
        for byte in (bytes([b]) for b in range(256)):
            if byte not in ranks:
                ranks[byte] = len(ranks)        # a byte that the vocabulary cannot say: unk, or nothing
                self.ids.append(unk)
        self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.max_id = max(self.bytes)

    def encode(self, text, begin, first):
        if re.search(r"\s{200000}", text):
            raise TooLong("it has a run of 200,000 spaces, which the tokenizer cannot take")
        try:
            ranks = self.encoding.encode_ordinary(text)
        except BaseException as problem:        # tiktoken's own panic is no Exception
            if type(problem).__name__ != "PanicException":
                raise
            raise TooLong("it has a run of spaces or letters that the tokenizer cannot take") from None
        return [i for i in (self.ids[rank] for rank in ranks) if i is not None]

    def decode(self, ids, names):
        data = b"".join(names[i].encode() if i in names else self.bytes.get(i, b"") for i in ids)
        return data.decode("utf-8", errors="replace")


def read_tiktoken(file, config):
    """A tokenizer.model of tiktoken's format, with Llama 3's pattern. The special tokens come from
    tokenizer_config.json, or are Llama 3's, which follow the last rank."""
    tokens = []
    for line in file.read_bytes().splitlines():
        if not re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", line):
            raise ValueError("it is not in tiktoken's format (a SentencePiece protobuf?): expected the "
                             "tokenizer.json that is published beside it")
        token, rank = line.split()
        tokens.append((base64.b64decode(token), int(rank)))
    tokens.sort(key=lambda pair: pair[1])
    listed = {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    special = listed or {name: len(tokens) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    return ByteLevel(LLAMA3_PATTERN, tokens), [Added(*t, True) for t in special.items()], "<|begin_of_text|>"


# ----------------------------------------------------------------------------------------------------------
# SentencePiece BPE

class SentencePiece:
    """BPE over characters, U+2581 for a space, bytes (<0x00> to <0xFF>) for what the vocabulary lacks."""

    def __init__(self, vocab, merges, normalize, pre_tokenize, strip, unk):
        self.vocab, self.normalize, self.pre_tokenize = vocab, normalize, pre_tokenize
        self.strip, self.unk = strip, unk       # unk: what stands for a byte without a token, if anything
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.pieces = {i: piece for piece, i in vocab.items()}
        self.byte = {f"<0x{b:02X}>": b for b in range(256)}
        self.max_id = max(self.pieces)
        # Where no token has U+2581 behind another character, no merge crosses into the next word: a text
        # can be cut there, and each word be merged once. (Some of Gemma's have: its texts stay whole.)
        crossing = any(re.search("[^▁]▁", a + b) for a, b in merges)
        self.words = re.compile(r"(?s).+" if crossing else r"▁*[^▁]+|▁+")
        self.word_ids = lru_cache(maxsize=100_000)(self.word_ids)

    def encode(self, text, begin, first):
        text = self.pre_tokenize(text, begin if first else None)
        return [i for word in self.words.findall(text) for i in self.word_ids(word)]

    def word_ids(self, word):
        """The ids of one word: the pair that was merged first in training is merged first, from the left."""
        symbols = []
        for c in word:
            said = [c] if c in self.vocab else [f"<0x{b:02X}>" for b in c.encode()]
            if not all(symbol in self.vocab for symbol in said):        # runs of them make one unk
                said = [self.unk] if self.unk and symbols[-1:] != [self.unk] else []
            symbols += said
        n = len(symbols)
        left, right = list(range(-1, n)), list(range(1, n + 1))     # neighbours, as merged symbols drop out
        queue = []

        def offer(i):                                               # the pair that begins at symbol i
            if i >= 0 and right[i] < n:
                rank = self.ranks.get((symbols[i], symbols[right[i]]))
                if rank is not None:
                    heapq.heappush(queue, (rank, i))
        for i in range(n):
            offer(i)
        while queue:
            rank, i = heapq.heappop(queue)
            j = right[i]
            if j >= n or self.ranks.get((symbols[i], symbols[j])) != rank:
                continue                                            # an earlier merge took one of the two
            symbols[i], symbols[j] = symbols[i] + symbols[j], ""
            right[i], left[right[j]] = right[j], i
            offer(left[i])
            offer(i)
        return tuple(self.vocab[s] for s in symbols if s)

    def decode(self, ids, names):
        text, data = "", b""
        for i in [*ids, None]:                                      # None flushes the last bytes
            piece = names.get(i) or self.pieces.get(i, "")
            if piece in self.byte:
                data += bytes([self.byte[piece]])
                continue
            try:
                text += data.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(data)
            text, data = text + piece.replace("▁", " "), b""
        return text.removeprefix(" ") if self.strip else text


# ----------------------------------------------------------------------------------------------------------
# tokenizer.json

def read_tokenizer_json(file, config):
    """The codec, special tokens, non-special added tokens and BOS of a tokenizer.json."""
    spec = json.loads(file.read_text(encoding="utf-8"))
    model = spec["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise ValueError(f"it is of kind {kind}: expected byte-level or SentencePiece BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r}, which is not supported")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = [read_added(t) for t in spec.get("added_tokens", [])]
    vocab, unk = model["vocab"], model.get("unk_token")

    first = [p["single"][0] for p in steps(spec.get("post_processor")) if p["type"] == "TemplateProcessing"]
    bos = next((p["SpecialToken"]["id"] for p in first if "SpecialToken" in p), None)
    pre, back = steps(spec.get("pre_tokenizer")), steps(spec.get("decoder"))
    byte_level = bool(pre) and pre[-1]["type"] == "ByteLevel"
    if not byte_level and not model.get("byte_fallback"):
        raise ValueError("it is a BPE over characters without byte fallback, which is not supported")
    known = ("ByteLevel",) if byte_level else ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
    if odd := [d["type"] for d in back if d["type"] not in known]:
        raise ValueError(f"its decoder has {', '.join(odd)}, which is not supported")
    if byte_level:
        tokens = merge_order(vocab, merges, model.get("ignore_merges"), [t.content for t in added])
        normalize = normalizer(steps(spec.get("normalizer")))
        codec = ByteLevel(split_pattern(pre), tokens, normalize, vocab.get(unk), vocab)
    else:
        strip = any(d["type"] == "Strip" or d["type"] == "Metaspace" and d.get("prepend_scheme") != "never"
                    for d in back)
        normalize = normalizer(steps(spec.get("normalizer")))
        codec = SentencePiece(vocab, merges, normalize, normalizer(pre), strip, unk)
    return codec, added, bos


def steps(part):
    """The steps of one part of tokenizer.json: null, a single step, or a Sequence of them."""
    inner = {"normalizers", "pretokenizers", "processors", "decoders"} & set(part or ())
    return [s for p in part[inner.pop()] for s in steps(p)] if inner else [part] if part else []


def split_pattern(pre):
    """The regular expression that cuts a text into the stretches within which byte-level BPE merges."""
    names = [p["type"] for p in pre]
    own = pre[-1].get("use_regex", True)
    if not pre[-1].get("add_prefix_space"):
        if names == ["ByteLevel"] and own:
            return GPT2_PATTERN
        if names == ["Digits", "ByteLevel"] and own and pre[0]["individual_digits"]:
            return DIGITS_PATTERN
        if names == ["Split", "ByteLevel"] and not own and "Regex" in pre[0]["pattern"] \
                and (pre[0]["behavior"], pre[0]["invert"]) in (("Isolated", False), ("Removed", True)):
            pattern = pre[0]["pattern"]["Regex"]
            if re.search(r"\[\[:|(?<![\[\\])\^|(?<!\\)\$", pattern):
                raise ValueError(f"its pattern {pattern!r} has parts that are read otherwise here")
            if pre[0]["behavior"] == "Isolated" and pattern not in COMPLETE:    # what it leaves, stays
                pattern = rf"{pattern}|(?s:.)+?(?=(?:{pattern})|\z)"
            return pattern
    raise ValueError(f"its pre_tokenizer, {' + '.join(names)}, is not supported in this form")


def merge_order(vocab, merges, ignore_merges, added):
    """The byte strings of a byte-level vocabulary and their ids, in the order in which they are merged."""
    # GPT-2's alphabet: printable characters stand for their own byte, those from 256 on for the others.
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    byte = {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}

    order = dict.fromkeys(c for c in byte if c in vocab)
    last = None
    for a, b in merges:
        if a + b in order and a + b != last:
            raise ValueError(f"token {a + b!r} is merged at two priorities, which tiktoken cannot express")
        last = a + b
        order[last] = None
    check_pairs(order, merges)
    if ignore_merges:                  # whole stretches that no merge builds are tokens all the same
        order |= dict.fromkeys(t for t in vocab if t not in added)
    return [(bytes(byte[c] for c in token), vocab[token]) for token in order]


def check_pairs(order, merges):
    """ValueError if tiktoken, which merges any two tokens that make one, would merge a pair that `merges`
    does not list: so it is in vocabularies extended with another tokenizer's merges. It comes to such a pair
    only if the merges, applied to the token that the two make, end with just these two."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    none = len(merges)
    for token in order:
        if all((token[:i], token[i:]) in ranks or token[:i] not in order or token[i:] not in order
               for i in range(1, len(token))):
            continue
        parts, best = list(token), 0
        while len(parts) > 1 and best < none:
            here = [ranks.get(pair, none) for pair in zip(parts, parts[1:])]
            best = min(here)
            if best < none:
                i = here.index(best)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            raise ValueError(f"its merges end with {parts[0]!r} and {parts[1]!r}, which make a token: a "
                             "vocabulary extended with another's merges, which is not supported")


def regular(pattern):
    """A regular expression of Oniguruma's, compiled; ValueError where Python would read it otherwise."""
    if re.search(r"\[\[:|\\[pPhHRXKGzZ]", pattern):
        raise ValueError(f"its pattern {pattern!r} has parts that are read otherwise here")
    try:
        return re.compile(pattern, re.MULTILINE)            # there ^ and $ are of every line
    except re.error as problem:
        raise ValueError(f"its pattern {pattern!r} is not supported: {problem}") from None


def normalizer(parts):
    """The steps before BPE, with SentencePiece files' pre-tokenizers, as a function of (text, begin)."""
    def one(p):
        kind = p["type"]
        if kind in ("NFC", "NFD", "NFKC", "NFKD"):
            return lambda text, begin: unicodedata.normalize(kind, text)
        if kind == "Prepend":
            return lambda text, begin: p["prepend"] + text if text and begin else text
        if kind == "Replace" and "String" in p["pattern"]:
            return lambda text, begin: text.replace(p["pattern"]["String"], p["content"])
        if kind == "Replace":
            regex, at_start = regular(p["pattern"]["Regex"]), p["pattern"]["Regex"].startswith(r"\A")
            return lambda text, begin: regex.sub(p["content"], text) if begin or not at_start else text
        if kind == "Metaspace" and not p.get("split", True):
            mark, scheme = p["replacement"], p.get("prepend_scheme", "always")

            def metaspace(text, begin):         # begin: None behind an added token
                text = text.replace(" ", mark)
                here = scheme == "always" and begin is not False or scheme == "first" and begin
                return mark + text if text and here and not text.startswith(mark) else text
            return metaspace
        if kind == "Split" and p["pattern"] == {"String": " "}:
            return lambda text, begin: text     # Gemma's: no space is left to split at
        raise ValueError(f"its {kind} step is not supported in this form")
    functions = [one(p) for p in parts]

    def normalize(text, begin):
        for f in functions:
            text = f(text, begin)
        return text
    return normalize

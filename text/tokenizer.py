"""Text to token ids and back, from the files that come with public checkpoints: tokenizer.json of the model
BPE, byte-level or of characters, and Llama 3's tokenizer.model, in tiktoken's format.

A tokenizer.json is read as the tokenizers library reads it, or refused: this file and text/pieces.py name
every field at every level. Whatever is in a user's text stays text: a string never makes a special token.
"""

import base64
import re
from pathlib import Path
from typing import NamedTuple

from text.bpe import BPE, BYTES, LETTERS
from text.pieces import BYTE_LEVEL, LLAMA3_PATTERN, characters, decoder, functions, normalizer
from text.pieces import pre_tokenizer, steps
from text.words import check_fields, check_kind, fits, number_within, read_json

is_id = number_within(int)
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>",
                  "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]


class Added(NamedTuple):
    """A token that tokenizer.json adds to the vocabulary, with its flags."""
    content: str
    id: int
    special: bool                   # its string is plain text all the same: it is made by id alone
    single_word: bool = False       # it matches only where no word goes on
    lstrip: bool = False            # it takes the white space before it with it
    rstrip: bool = False
    normalized: bool = False        # it matches in the normalised text, not in the text as it stands


def cutter(tokens, normalize=str):
    """What cuts a text at the added tokens in it, the longest one first, as the tokenizers library does: a
    function of it to stretches (str) and tokens (Added), in turn."""
    named = {normalize(t.content): t for t in tokens if t.content}
    pattern = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))) or "(?!)")

    def cut(text):
        pieces, at = [], 0
        for match in pattern.finditer(text):
            token, (start, end) = named[match.group()], match.span()
            beside = text[max(0, start - 1):start] + text[end:end + 1]
            if token.special or token.single_word and any(c in characters(r"\w") for c in beside):
                continue
            if token.lstrip:
                start = max(at, len(text[:start].rstrip(characters(r"\s"))))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(characters(r"\s")))
            if start >= end:                    # the token before, rstrip, has taken this one in
                continue
            pieces += [text[at:start], token] if start > at else [token]
            at = end
        return pieces + [text[at:]] if at < len(text) else pieces
    return cut


class Tokenizer:
    """What a tokenizer file says: a vocabulary, token -> id, the tokens Added to it, functions of
    text/pieces.py, and bos_id, which begins a text (None: nothing does). Any of stop_ids ends an answer;
    eos_id is the one to train on (None if unknown). `chat` is the model's chat template with its bos_token
    and eos_token, or None."""

    def __init__(self, vocab, added, bpe, normalize, cut, join, bos_id=None):
        self.vocab, self.all_added, self.bpe, self.bos_id = vocab, added, bpe, bos_id
        self.normalize, self.cut, self.join = normalize, cut, join
        self.eos_id, self.stop_ids, self.chat = None, frozenset(), None
        self.special = {t.content: t.id for t in added if t.special}
        self.added = {t.content: t.id for t in added if not t.special}      # they match in plain text
        self.names = {i: token for token, i in vocab.items()}
        self.names |= {t.id: normalize(t.content, True) if t.normalized else t.content for t in added}
        self.cut_raw = cutter([t for t in added if not t.normalized])
        self.cut_normalized = cutter([t for t in added if t.normalized], lambda t: normalize(t, True))

    def limit(self, vocab_size):
        """Forget special tokens beyond the model's vocabulary, such as a <pad>: no text makes them.
        ValueError if a text, BOS or a stop token would make one."""
        made = [*self.vocab.values(), *self.added.values(), *self.stop_ids, self.bos_id or 0]
        if max(made) >= vocab_size:
            raise ValueError(f"the tokenizer's ids go up to {max(made)}, but the model's vocabulary has "
                             f"{vocab_size} tokens: they do not belong together")
        self.special = {name: i for name, i in self.special.items() if i < vocab_size}

    def encode(self, text, begin=True):
        """The ids of a text, without BOS. begin=False says that it continues an earlier text: then
        SentencePiece's dummy prefix, a space before the first word, is not put in front."""
        ids, at = [], begin
        for piece in self.cut_raw(text):
            whole = isinstance(piece, Added)
            for part in [piece] if whole else self.cut_normalized(self.normalize(piece, at)):
                ids += [part.id] if isinstance(part, Added) else self.bpe.encode(self.cut(part, at))
                at = None
        return ids

    def decode(self, ids):
        """The text of ids; special tokens are written out, bytes that are no UTF-8 become U+FFFD."""
        return self.join([self.names[i] for i in ids if i in self.names])

    @staticmethod
    def from_pretrained(path):
        """Read the tokenizer of a checkpoint folder (or one tokenizer file in it); else ValueError."""
        path = Path(path)
        files = [f for f in (path, path / "tokenizer.json", path / "tokenizer.model") if f.is_file()]
        if not files:
            what = "has no tokenizer.json and no tokenizer.model" if path.exists() else "is no folder here"
            raise ValueError(f"{path} {what}: expected a Hugging Face checkpoint")
        file = files[0]
        config, special, more, generation, model = (
            read_json(file.parent / f"{name}.json", absent={}) for name in (
                "tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config"))
        old = "added_tokens_decoder" not in config          # then two other files count, as in transformers
        config |= special if old else {}
        try:
            tokenizer = (read_tokenizer_json if file.suffix == ".json" else read_tiktoken)(file, config)
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from None

        added = tokenizer.added | tokenizer.special
        if odd := [token for token, i in more.items() if old and added.get(token) != i]:
            raise ValueError(f"{file.parent}: added_tokens.json adds {odd[0]!r:.60}, {file.name} does not")
        ids = tokenizer.vocab | added
        tokens = config.get("bos_token"), config.get("eos_token")   # null, "</s>", {"content": "</s>", ...}
        bos, eos = (token.get("content") if isinstance(token, dict) else token for token in tokens)
        if not fits(bos, (str, None)) or not fits(eos, (str, None)) or eos not in (None, *ids):
            raise ValueError(f"{file.parent}: bos_token is {bos!r:.60} and eos_token {eos!r:.60}, expected "
                             f"tokens of {file.name}")
        if file.suffix != ".json" and tokenizer.bos_id is None and config.get("add_bos_token"):
            tokenizer.bos_id = ids.get(bos)             # a tokenizer.json says itself what begins a text
        stop = [c["eos_token_id"] for c in (generation, model) if c.get("eos_token_id") is not None][:1]
        stop = stop[0] if stop and isinstance(stop[0], list) else stop
        if not all(map(is_id, stop)):
            raise ValueError(f"{file.parent}: eos_token_id is {stop!r:.60}, expected ids")
        tokenizer.eos_id = ids[eos] if eos else stop[0] if stop else \
            ids.get("<|end_of_text|>", ids.get("</s>"))
        tokenizer.stop_ids = frozenset({tokenizer.eos_id, *stop} - {None})
        chat = read_chat(file.parent, config)
        tokenizer.chat = (chat, bos, eos) if chat else None
        return tokenizer


ADDED = dict.fromkeys(Added._fields, (bool, False)) | {"content": (str, ...), "id": (is_id, ...)}


def read_added(token):
    """An added token, from tokenizer.json or tokenizer_config.json."""
    return Added(**check_fields(token, "its added token", ADDED))


def later_added(config):
    """The tokens that tokenizer_config.json adds, in the order of their ids."""
    try:
        listed = [{"id": int(i) if i.isdecimal() else i, "normalized": not t.get("special")} | t
                  for i, t in (config.get("added_tokens_decoder") or {}).items()]
    except (TypeError, AttributeError):
        raise ValueError("its added_tokens_decoder is not an object of tokens") from None
    return sorted(map(read_added, listed), key=lambda t: t.id)


def read_chat(folder, config):
    """The text of the chat template in a folder, None if there is none: a file of its own comes first. Where
    several have names, it is the one called default."""
    file, chat = folder / "chat_template.jinja", config.get("chat_template")
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")       # and so is none that is known
    if isinstance(chat, list):
        chat = {str(t.get("name")): t.get("template") for t in chat if isinstance(t, dict)}.get("default")
    return chat if isinstance(chat, str) else None


def read_tiktoken(file, config):
    """A tokenizer.model in tiktoken's format, base64 bytes and a rank a line: any two tokens that make one
    are merged, by the rank of what they make. Pattern and special tokens, which follow the last rank, are
    Llama 3's, if tokenizer_config.json has no others."""
    data = file.read_bytes()
    check_kind("it", data)
    if not all(re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", line) for line in data.splitlines()):
        raise ValueError("it is not in tiktoken's format (a SentencePiece protobuf?): expected the "
                         "tokenizer.json that is published beside it")
    lines = [line.split() for line in data.splitlines()]
    vocab = {"".join(LETTERS[b] for b in base64.b64decode(token)): int(rank) for token, rank in lines}
    if not len(vocab) == len(lines) == len(set(vocab.values())) or not BYTES.keys() <= vocab.keys():
        raise ValueError("it has a token or a rank twice, or lacks a byte")
    halves = ((token[:i], token[i:]) for token in vocab for i in range(1, len(token)))
    ranks = {(a, b): vocab[a + b] for a, b in halves if a in vocab and b in vocab}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    llama3 = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    cut = pre_tokenizer({"type": "Sequence", "pretokenizers": [llama3, byte_level]})
    added = [t._replace(special=True) for t in later_added(config)] or \
        [Added(name, len(lines) + i, True) for i, name in enumerate(LLAMA3_SPECIAL)]
    bos = {t.content: t.id for t in added}.get("<|begin_of_text|>")
    bpe = BPE(vocab, ranks, whole=vocab)
    return Tokenizer(vocab, added, bpe, normalizer(None), cut, decoder(byte_level), bos)


ANY = (object, None)
TOP = {"model": (dict, ...), "added_tokens": (list, []), "normalizer": ANY, "pre_tokenizer": ANY,
       "post_processor": ANY, "decoder": ANY}
# transformers sets truncation and padding anew in each call, to none where it is not asked for any.
NEUTRAL = ("truncation", "padding", "version")
MODEL = {"vocab": (dict, ...), "merges": (list, ...), "unk_token": ((str, None), None),
         "fuse_unk": (bool, False), "byte_fallback": (bool, False), "ignore_merges": (bool, False),
         "dropout": ((None, 0, 0.0), None), "continuing_subword_prefix": ((None, ""), None),
         "end_of_word_suffix": ((None, ""), None)}


def read_tokenizer_json(file, config):
    """A tokenizer.json of the model BPE."""
    top = check_fields(read_json(file), "its top level", TOP, NEUTRAL)
    if (kind := top["model"].get("type", "BPE")) != "BPE":
        raise ValueError(f"it is of kind {kind!r:.60}: expected byte-level or SentencePiece BPE")
    model = check_fields(top["model"], "its model", MODEL, neutral=("type",))
    vocab, unk = model["vocab"], model["unk_token"]
    if not all(map(is_id, vocab.values())) or len({*vocab.values()}) < len(vocab):
        raise ValueError("its vocabulary is not an object of tokens with an id each, a whole number")
    ranks = {pair: rank for rank, pair in enumerate(read_merges(model["merges"], vocab))}
    added = read_all_added(top["added_tokens"], later_added(config), vocab)
    whole = vocab.keys() - added.keys() if model["ignore_merges"] else ()
    if unk not in (None, *vocab):
        raise ValueError(f"its unk_token {unk!r} is not in its vocabulary")
    before, pre = top["normalizer"], top["pre_tokenizer"]
    if "Replace" in [step["type"] for step in steps(before, "normalizer")] and \
            "first" in [step.get("prepend_scheme") for step in steps(pre, "pre_tokenizer")]:
        raise ValueError("its Metaspace prepends to the first piece only, behind a Replace: not supported")
    asked = config.get("add_prefix_space")              # some of transformers' classes put it in
    if asked is not None and any(step["type"] == "ByteLevel" and step.get("add_prefix_space") != asked
                                 for step in steps(pre, "pre_tokenizer")):
        raise ValueError(f"its ByteLevel lacks the add_prefix_space {asked!r:.40} of tokenizer_config.json")
    bpe = BPE(vocab, ranks, unk, model["fuse_unk"], model["byte_fallback"], whole)
    bos = sum(functions(top["post_processor"], "post_processor", POST_PROCESSORS), [])
    ids = [*vocab.values(), *(t.id for t in added.values())]
    if len(bos) > 1 or not all(is_id(i) and i in ids for i in bos):
        raise ValueError(f"its post_processor puts {bos!r:.100} before a text, expected one token")
    made = normalizer(before), pre_tokenizer(pre), decoder(top["decoder"])
    return Tokenizer(vocab, [*added.values()], bpe, *made, *bos)


def read_merges(merges, vocab):
    """Pairs of tokens: lists, or strings with a space between, as up to tokenizers 0.19."""
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges if not str(m).startswith("#version")]
    for pair in pairs:
        texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(token, str) for token in pair)
        if not texts or not vocab.keys() >= {*pair, "".join(pair)}:
            raise ValueError(f"its merge {pair!r:.80} is not of two tokens that make a third one")
    return map(tuple, pairs)


def read_all_added(listed, later, vocab):
    """The added_tokens by their texts, and those of tokenizer_config.json, `later`, which may give a known
    one other flags, but special it stays. ValueError for an id that is not the one which the tokenizers
    library gives: the vocabulary's, or the next free one; a token without text gets none."""
    added, ids, free = {}, {*vocab.values()}, len(vocab)
    for token, again in [*((read_added(t), False) for t in listed), *((t, True) for t in later)]:
        before = added.get(token.content) if again else None
        new = not before and token.content not in vocab
        expected = before.id if before else vocab.get(token.content, free if token.content else None)
        if token.id != expected or token.content in added and not before or new and token.id in ids:
            raise ValueError(f"its added token {token.content!r} is there twice, or has the id {token.id}, "
                             f"and would get {expected}")
        free += new
        added[token.content] = token._replace(special=token.special or bool(before and before.special))
    return added


def before_text(single, special_tokens, pair):
    """The ids that are put in front of a text. (`examples.encode_answer` puts an end token behind one.)"""
    try:
        here = [special_tokens[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else
                piece["Sequence"]["id"] for piece in single]
        (at,) = [i for i, ids in enumerate(here) if ids == "A"]
        return [i for ids in here[:at] for i in ids]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its post_processor makes {single!r:.90} of a text: not supported") from None


POST_PROCESSORS = {         # ByteLevel concerns offsets alone
    "ByteLevel": (BYTE_LEVEL, lambda **fields: []),
    "TemplateProcessing": ({"single": (list, ...), "special_tokens": (dict, {}), "pair": ANY}, before_text),
}

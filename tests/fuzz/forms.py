"""Random tokenizer.json files, in the forms that the tokenizers library reads, and texts to try them on."""

import copy

from tokenizers import normalizers, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = [        # of published files, then what engines of regular expressions read in ways of their own
    GPT2, LLAMA3, LLAMA3.replace("{1,3}", ""), r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "[0-9][0-9][0-9]", r"[一-龥぀-ゟ゠-ヿ]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[A-Z]?\p{Ll}+|\s",
    *(r"\d \D+ \s \s+ \S+\s \w+ \w+|[^\w\s]+ \W l+ a|b [^\r\n]+ . ^ $ ^. .$"
      r" ^\s+ \s+$ \A. \A\s* .\z \s*\Z \R \X \t"
      r" (?<=a)l (?<!\s)t \bt \b \s++t (?>\s+)\S [[:space:]]+ [[:alpha:]] [[:punct:]]"
      r" \h+ \Ka \G. (?i:ss|the) (?i)É"
      r" \p{Han} \p{^L} \P{L}+ \p{M} \p{Cf} \p{Alpha}+ \p{N}{1,3} [a-z&&[^t]]+ (l)\1"
      r" (?m:.+) (?s:.+) (?=[A-Z]) l* |"
      r" \x20 \x{e9} [\u0300-\u036f] '(?i:[sdmt]|ll|ve|re) [^\S\n]+ (?<w>l) (?:\p{L}\p{M}*)+"
      r" [\s--\n]").split()]
PARTS = [*("a b A é ß 1 12 12345 _ - . !? 's 'S 're I'll ▁ ▁▁ the The all hello wor ab yes x ss SS 日本 語 、"
           " 😀 👍🏽 | \\ $"
           " 👨‍👩‍👧 fi ﬁ ½ ² ٣ İ ı ſ 'ſ K Ω ÅÅ e\u0301 \u0301 각 ก็ नि 𝐀 ## </w> <tool>"
           " <t <s> </s> <unk> <0x41> ab<tool> A. ^"
           " n't # \u1c89 \U000105c0 \U0001fae8 \U00031350 \u200b \u200d \ufeff \ufffd").split(),
         *" \n\t\r\0\x01\x1c\x1f\x7f\x85\xa0\xad\u3000\u2028", " ", " ", "  ", "   ", "\n\n", "\r\n", " \n"]
CONTENTS = [*"<tool> <t ab yes ! <tool>b é e\u0301 İ The ▁ 1 <0x41> 日本 x l ABC".split(),
            " x", "a ", "\n", "  "]
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FROM_MARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def random_text(rng):
    return "".join(rng.choices(PARTS, k=rng.randint(0, 9)))


def learn_merges(rng, words, n, prefix, suffix):
    """Merges as training makes them, in a random order: each joins two neighbours in the words so far."""
    words = [[prefix * (i > 0) + c + suffix * (i == len(w) - 1) for i, c in enumerate(w)] for w in words]
    merges = []
    while len(merges) < n and (long := [w for w in words if len(w) > 1]):
        word = rng.choice(long)
        i = rng.randrange(len(word) - 1)
        a, b = word[i:i + 2]
        merges.append((a, b))
        for w in long:
            for j in range(len(w) - 1, 0, -1):
                if w[j - 1:j + 1] == [a, b]:
                    w[j - 1:j + 1] = [a + b.removeprefix(prefix)]
    return merges


def sequence(name, steps):
    """The steps of a part, {name: steps}; a single one stands for itself."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", name: steps} if steps else None


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def template(vocab, *single):
    names = [s for s in single if s != "A"]
    one = [{"Sequence" if s == "A" else "SpecialToken": {"id": s, "type_id": 0}} for s in single]
    return {"type": "TemplateProcessing", "single": one,
            "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {s: {"id": s, "ids": [vocab.get(s, 1)], "tokens": [s]} for s in names}}


class Steps:
    """Random steps of each part, as they are in published files and as they are nowhere."""

    def __init__(self, rng):
        self.pick, self.flag = lambda *choices: rng.choice(choices), lambda p=0.5: rng.random() < p

    def any_of(self, step, name, nested=False):
        inner = [step() if nested or self.flag(0.9) else self.any_of(step, name, True)
                 for _ in range(self.pick(0, 1, 2, 3))]
        inner = [s for s in inner if s]
        return {"type": "Sequence", name: inner} if self.flag(0.2) else sequence(name, inner)

    def pattern(self):
        return {"Regex": self.pick(*PATTERNS)} if self.flag(0.7) else {
            "String": self.pick(" ", "▁", "l", "é", "\n", "the", "")}

    def replace(self):
        return {"type": "Replace", "pattern": self.pattern(),
                "content": self.pick("▁", " ", "", "x", "\\1", "$0")}

    def metaspace(self, odd=True):
        old = {"add_prefix_space": True} if odd and self.flag(0.05) else {}
        return {"type": "Metaspace", "replacement": self.pick("▁", "_") if odd else "▁",
                "split": odd and self.flag(), "prepend_scheme": self.pick("first", "always", "never"), **old}

    def byte_level(self, use_regex=True, odd=True):
        return {"type": "ByteLevel", "add_prefix_space": odd and self.flag(0.3), "trim_offsets": self.flag(),
                "use_regex": use_regex}

    def normalizer(self):
        flag, pick = self.flag, self.pick
        kind = pick("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")
        return pick({"type": kind}, self.replace(), self.replace(), {
                        "type": "Strip", "strip_left": flag(), "strip_right": flag()},
                    {"type": "Prepend", "prepend": pick("▁", "x ", " ")}, {
                        "type": "BertNormalizer", "clean_text": flag(), "handle_chinese_chars": flag(),
                        "strip_accents": pick(None, True, False), "lowercase": flag()})

    def pre_tokenizer(self):
        flag, pick = self.flag, self.pick
        return pick(self.byte_level(flag()), self.metaspace(),
                    {"type": "Digits", "individual_digits": flag()},
                    split(self.pattern(), pick(*BEHAVIORS), flag()),
                    split(self.pattern(), pick(*BEHAVIORS), flag()),
                    {"type": pick("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")},
                    {"type": "Punctuation", "behavior": pick(*BEHAVIORS)},
                    {"type": "FixedLength", "length": 3}, {"type": "CharDelimiterSplit", "delimiter": "l"})

    def decoder(self):
        return self.pick(
            {"type": self.pick("ByteFallback", "Fuse")}, self.byte_level(), self.metaspace(),
            self.replace(), FROM_MARK,
            {"type": "Strip", "content": self.pick(" ", "a", "▁"), "start": self.pick(0, 1, 2),
             "stop": self.pick(0, 1)},
            {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "BPEDecoder", "suffix": "</w>"},
            {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": self.flag()})

    def usual(self, byte):
        """The normalizer, pre-tokenizer and decoder of a published file."""
        if byte:
            pattern, last = {"Regex": self.pick(*PATTERNS[:3], *PATTERNS)}, self.byte_level(False, odd=False)
            pre = self.pick([], [{"type": "Digits", "individual_digits": True}], None, None)
            pre = [*pre, {**last, "use_regex": True}] if pre is not None else [
                split(pattern, *self.pick(("Isolated", False), ("Removed", True))), last]
            return self.pick(None, None, {"type": "NFC"}), sequence("pretokenizers", pre), self.byte_level()
        norm, pre = self.pick(
            (sequence("normalizers", [{"type": "Prepend", "prepend": "▁"}, TO_MARK]), None), (TO_MARK, None),
            (None, self.metaspace(odd=False)), (TO_MARK, split({"String": " "}, "MergedWithPrevious")))
        back, meta = [FROM_MARK, {"type": "ByteFallback"}, {"type": "Fuse"}], self.metaspace(odd=False)
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        back = self.pick(back, [*back, strip], [back[1], meta], [meta])
        return norm, pre, sequence("decoders", back)

    def post_processor(self, vocab):
        ends = {"sep": ["</s>", 2], "cls": ["<s>", 1]}
        bos = template(vocab, "<s>", "A")
        return self.pick(None, bos, bos, template(vocab, "<s>", "A", "</s>"), template(
            vocab, "A", "</s>"), sequence(
            "processors", [self.byte_level(), bos])) if self.flag(0.87) else self.pick(
            self.byte_level(), {"type": "BertProcessing", **ends}, sequence("processors", [bos, bos]), {
                "type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": self.flag()},
            template(vocab, "<s>", "<s>", "A"), template(vocab, "A"), template(vocab, "</s>", "A", "<s>"))


def random_model(rng, kind, specials):
    """A vocabulary of special tokens, letters, bytes and merges, of the kind byte, piece, char or word."""
    flag, pick = lambda p=0.5: rng.random() < p, lambda *choices: rng.choice(choices)
    prefix, suffix = (pick("", "##"), pick("", "</w>")) if flag(0.05) else ("", "")
    words = [random_text(rng).replace(" ", " " if kind == "char" else "▁") for _ in range(12)]
    base = [*dict.fromkeys("".join(words) + "▁ethal"),
            *(f"<0x{b:02X}>" for b in range(256) if kind == "piece")]
    if kind == "byte":
        words = [normalizers.ByteLevel().normalize_str(w.replace("▁", " ")) for w in words]
        base = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(rng, words, rng.randint(0, 40), prefix, suffix)
    if flag(0.15):                                      # extended with another's merges
        merges += learn_merges(rng, words, 20, prefix, suffix)
    merges = merges if flag(0.03) else [*dict.fromkeys(merges)]
    if flag(0.1):
        rng.shuffle(merges)
    if flag(0.1):                                       # some characters and bytes are missing
        base = rng.sample(base, int(len(base) * pick(0, 0.5, 0.95)))
    tokens = [*specials, *base,
              *(s for w in words for c in w for s in (prefix + c, c + suffix) if prefix + suffix),
              *(s for a, b in merges for s in (a, b, a + b.removeprefix(prefix))),
              *(rng.sample(CONTENTS, 3) + rng.sample(words, 3) if flag(0.2) else [])]
    tokens = [t for t in dict.fromkeys(tokens) if t]
    if flag(0.1):
        rng.shuffle(tokens)
    ids = range(len(tokens)) if flag(0.87) else sorted(rng.sample(range(2 * len(tokens)), len(tokens)))
    vocab = dict(zip(tokens, ids))
    if kind == "word":
        pieces = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
        scored = [[t, -1.5] for t in vocab]
        return pick({"type": "Unigram", "unk_id": 0, "byte_fallback": flag(), "vocab": scored}, {
            **pick({"type": "WordLevel"}, pieces), "vocab": vocab, "unk_token": "<unk>"})
    written = [[*p] for p in merges] if flag() else [
        *["#version: 0.2"] * flag(0.05), *(" ".join(p) for p in merges)]
    model = {"type": "BPE", "dropout": pick(None, None, 0.0), "fuse_unk": flag(0.8) == (kind == "piece"),
             "unk_token": pick("<unk>", None) if kind == "byte" or flag(0.1) else
             pick(*["<unk>"] * 9, "<nil>"),
             "continuing_subword_prefix": prefix or pick(None, None, ""), "ignore_merges": flag(0.25),
             "end_of_word_suffix": suffix or pick(None, None, ""),
             "byte_fallback": flag(0.87) == (kind == "piece"), "vocab": vocab, "merges": written}
    return {key: value for key, value in model.items() if key in ("vocab", "merges") or not flag(0.02)}


def random_tokenizer_json(rng):
    """A small tokenizer.json: byte-level BPE, SentencePiece BPE or another model. Each part has a form that
    such files are published with or, now and then, any form at all."""
    kind, steps = rng.choices(["byte", "piece", "char", "word"], [9, 9, 1, 1])[0], Steps(rng)
    flag, pick = steps.flag, steps.pick
    specials = [s for s in ("<unk>", "<s>", "</s>") if not flag(0.05)]
    model = random_model(rng, kind, specials)
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = {t: i for i, (t, _) in enumerate(vocab)}
    norm, pre, back = steps.usual(kind == "byte")
    norm = norm if flag(0.87) else steps.any_of(steps.normalizer, "normalizers")
    pre = pre if flag(0.87) else steps.any_of(steps.pre_tokenizer, "pretokenizers")
    if kind == "byte" and pre and flag(0.1):
        pre = {"type": "Sequence", "pretokenizers": [steps.pre_tokenizer(), pre]}
    contents = [*specials, *(rng.sample(CONTENTS, rng.randint(0, 3)) if flag(0.4) else [])]
    new = [c for c in contents if c not in vocab]
    added = [{"id": vocab[c] if c in vocab else len(vocab) + new.index(c) + flag(0.01), "content": c,
              **{f: flag(0.25) and c not in specials
                 for f in ("single_word", "lstrip", "rstrip", "normalized")},
              "special": c in specials if flag(0.87) else flag()} for c in contents]
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 12}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "<unk>"}
    spec = {"version": "1.0", "truncation": cut if flag(0.02) else None,
            "padding": pad if flag(0.02) else None, "added_tokens": added, "normalizer": norm,
            "pre_tokenizer": pre, "post_processor": steps.post_processor(vocab),
            "decoder": back if flag(0.87) else steps.any_of(steps.decoder, "decoders"), "model": model}
    if flag(0.03):                                      # a key that nobody knows
        spec = copy.deepcopy(spec)
        pick(spec, spec["model"], *(spec[k] for k in ("normalizer", "pre_tokenizer", "decoder") if spec[k]),
             *spec["added_tokens"])["new"] = 1
    return {key: value for key, value in spec.items() if key == "model" or not flag(0.003)}

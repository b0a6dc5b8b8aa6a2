"""tokenizer.json files of every form: each is read as the tokenizers library reads it, or refused."""

import json

import pytest

from fuzzing import fill, judge_all, one
from text.examples import encode_prompt
from text.pieces import GPT2_PATTERN, LLAMA3_PATTERN
from text.tokenizer import Tokenizer

library = pytest.importorskip("tokenizers")
PATTERNS = [        # of published files, then what engines of regular expressions read in ways of their own
    GPT2_PATTERN, LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", ""), r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "[0-9][0-9][0-9]", r"[一-龥぀-ゟ゠-ヿ]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[A-Z]?\p{Ll}+|\s",
    *(r"\d \D+ \s \s+ \S+\s \w+ \w+|[^\w\s]+ \W l+ a|b [^\r\n]+ . ^ $ ^. .$"
      r" ^\s+ \s+$ \A. \A\s* .\z \s*\Z \R \X \t"
      r" (?<=a)l (?<!\s)t \bt \b \s++t (?>\s+)\S [[:space:]]+ [[:alpha:]] [[:punct:]]"
      r" \h+ \Ka \G. (?i:ss|the) (?i)É"
      r" \p{Han} \p{^L} \P{L}+ \p{M} \p{Cf} \p{Alpha}+ \p{N}{1,3} [a-z&&[^t]]+ (l)\1 \p{Cs} \p{Word}"
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


def step(kind, **fields):
    return {"type": kind, **fields}


def several(name, each):
    return one(None, each, each, *(step("Sequence", **{name: [each] * n}) for n in range(4)))


def template(*single):
    """A post-processor: what stands around the text A."""
    ids = {"<s>": 1, "</s>": 2}
    one = [{"Sequence" if s == "A" else "SpecialToken": {"id": s, "type_id": 0}} for s in single]
    return step("TemplateProcessing", single=one, pair=[*one, {"Sequence": {"id": "B", "type_id": 1}}],
                special_tokens={s: {"id": s, "ids": [ids[s]], "tokens": [s]} for s in single if s != "A"})


FLAG, SCHEME = one(True, False), one("first", "always", "never")
PATTERN = one(*[{"Regex": one(*PATTERNS)}] * 2, {"String": one(" ", "▁", "l", "é", "\n", "the", "")})
REPLACE = step("Replace", pattern=PATTERN, content=one("▁", " ", "", "x", "\\1", "$0"))
TO_MARK = step("Replace", pattern={"String": " "}, content="▁")
FROM_MARK = step("Replace", pattern={"String": "▁"}, content=" ")
NFC, BYTES, FUSE = step("NFC"), step("ByteFallback"), step("Fuse")
META = step("Metaspace", replacement="▁", prepend_scheme=SCHEME, split=False)
ODD_META = META | {"replacement": one("▁", "_"), "split": FLAG, "add_prefix_space": True}
BYTE_LEVEL = step("ByteLevel", add_prefix_space=one(True, False, False), trim_offsets=FLAG, use_regex=FLAG)
CUT = BYTE_LEVEL | {"add_prefix_space": False, "use_regex": False}
BEHAVIOR = one("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
SPLIT = step("Split", pattern=PATTERN, behavior=BEHAVIOR, invert=FLAG)
USUAL_SPLIT = SPLIT | {"pattern": {"Regex": one(*PATTERNS[:3], *PATTERNS)}}
DIGITS = step("Digits", individual_digits=True)
STRIP = step("Strip", content=" ", start=1, stop=0)
BOS = template("<s>", "A")
ANY = {         # steps that are in published files, and that are nowhere
    "normalizer": several("normalizers", one(
        *map(step, "NFC NFD NFKC NFKD Lowercase StripAccents Nmt ByteLevel".split()), REPLACE, REPLACE,
        step("Strip", strip_left=FLAG, strip_right=FLAG), step("Prepend", prepend=one("▁", "x ", " ")))),
    "pre_tokenizer": several("pretokenizers", one(
        BYTE_LEVEL, META, ODD_META, step("Digits", individual_digits=FLAG), SPLIT, SPLIT,
        *map(step, "Whitespace WhitespaceSplit BertPreTokenizer UnicodeScripts".split()))),
    "decoder": several("decoders", one(
        BYTES, FUSE, BYTE_LEVEL, META, ODD_META, REPLACE, FROM_MARK, step("BPEDecoder", suffix="</w>"),
        step("Strip", content=one(" ", "a", "▁"), start=one(0, 1, 2), stop=one(0, 1)))),
    "post_processor": one(BYTE_LEVEL, step("Sequence", processors=[BOS, BOS]), template("</s>", "A", "<s>"),
                           step("BertProcessing", sep=["</s>", 2], cls=["<s>", 1]), template("A"),
                           template("<s>", "<s>", "A"))}
AROUND = {"post_processor": one(None, BOS, BOS, template("<s>", "A", "</s>"), template("A", "</s>"),
                                 step("Sequence", processors=[BYTE_LEVEL, BOS]))}
USUAL_BYTE = AROUND | {
    "normalizer": one(None, None, NFC), "decoder": BYTE_LEVEL,
    "pre_tokenizer": one(
        CUT | {"use_regex": True}, step("Sequence", pretokenizers=[DIGITS, CUT | {"use_regex": True}]),
        step("Sequence", pretokenizers=[USUAL_SPLIT | {"behavior": "Isolated", "invert": False}, CUT]),
        step("Sequence", pretokenizers=[USUAL_SPLIT | {"behavior": "Removed", "invert": True}, CUT]))}
BACK = one(*(step("Sequence", decoders=steps) for steps in (
    [FROM_MARK, BYTES, FUSE], [FROM_MARK, BYTES, FUSE, STRIP], [BYTES, META], [META])))
PREPEND = step("Sequence", normalizers=[step("Prepend", prepend="▁"), TO_MARK])
TO_WORDS = SPLIT | {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
USUAL_PIECE = one(*(AROUND | {"normalizer": norm, "pre_tokenizer": cut, "decoder": BACK} for norm, cut in (
    (PREPEND, None), (TO_MARK, None), (None, META), (TO_MARK, TO_WORDS))))


def random_text(rng):
    return "".join(rng.choices(PARTS, k=rng.randint(0, 9)))


def learn_merges(rng, words, n):
    """Merges as training makes them, in a random order: each joins two neighbours in the words so far."""
    words, merges = [[*word] for word in words], []
    while len(merges) < n and (long := [w for w in words if len(w) > 1]):
        word = rng.choice(long)
        i = rng.randrange(len(word) - 1)
        a, b = word[i:i + 2]
        merges.append((a, b))
        for w in long:
            for j in range(len(w) - 1, 0, -1):
                if w[j - 1:j + 1] == [a, b]:
                    w[j - 1:j + 1] = [a + b]
    return merges


def random_model(rng, kind, specials):
    """A vocabulary of special tokens, letters, bytes and merges, of the kind byte, piece or char."""
    flag, pick = lambda p=0.5: rng.random() < p, lambda *choices: rng.choice(choices)
    words = [random_text(rng).replace(" ", " " if kind == "char" else "▁") for _ in range(12)]
    base = [*dict.fromkeys("".join(words) + "▁ethal"),
            *(f"<0x{b:02X}>" for b in range(256) if kind == "piece")]
    if kind == "byte":
        words = [library.normalizers.ByteLevel().normalize_str(w.replace("▁", " ")) for w in words]
        base = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(rng, words, rng.randint(0, 40))
    merges += learn_merges(rng, words, 20) if flag(0.15) else []        # extended with another's
    merges = merges if flag(0.03) else [*dict.fromkeys(merges)]
    merges = rng.sample(merges, len(merges)) if flag(0.1) else merges
    if flag(0.1):                                       # some characters and bytes are missing
        base = rng.sample(base, int(len(base) * pick(0, 0.5, 0.95)))
    tokens = [*specials, *base, *(s for a, b in merges for s in (a, b, a + b)),
              *(rng.sample(CONTENTS, 3) + rng.sample(words, 3) if flag(0.2) else [])]
    tokens = [t for t in dict.fromkeys(tokens) if t]
    tokens = rng.sample(tokens, len(tokens)) if flag(0.1) else tokens
    ids = range(len(tokens)) if flag(0.87) else sorted(rng.sample(range(2 * len(tokens)), len(tokens)))
    unk = pick("<unk>", None) if kind == "byte" or flag(0.1) else pick(*["<unk>"] * 9, "<nil>")
    model = step("BPE", vocab=dict(zip(tokens, ids)), dropout=pick(None, None, 0.0), unk_token=unk,
                 fuse_unk=flag(0.8) == (kind == "piece"), byte_fallback=flag(0.87) == (kind == "piece"),
                 continuing_subword_prefix=pick(None, ""), end_of_word_suffix=pick(None, ""),
                 ignore_merges=flag(0.25), merges=[[*p] for p in merges] if flag() else [
                     *["#version: 0.2"] * flag(0.05), *(" ".join(p) for p in merges)])
    return {key: value for key, value in model.items() if key in ("vocab", "merges") or not flag(0.02)}


def random_tokenizer_json(rng):
    """A small tokenizer.json: byte-level BPE, SentencePiece BPE or another model. Each part has a form that
    such files are published with or, now and then, any form at all."""
    kind, flag = rng.choices(["byte", "piece", "char"], [9, 9, 1])[0], lambda p: rng.random() < p
    specials = [s for s in ("<unk>", "<s>", "</s>") if not flag(0.05)]
    model = random_model(rng, kind, specials)
    vocab = model["vocab"]
    parts = fill(rng, USUAL_BYTE if kind == "byte" else USUAL_PIECE)
    parts |= {part: fill(rng, form) for part, form in ANY.items() if flag(0.13)}
    contents = [*specials, *(rng.sample(CONTENTS, rng.randint(0, 3)) if flag(0.4) else [])]
    new = [c for c in contents if c not in vocab]
    added = [{"id": vocab[c] if c in vocab else len(vocab) + new.index(c) + flag(0.01), "content": c,
              **{f: flag(0.25) and c not in specials
                 for f in ("single_word", "lstrip", "rstrip", "normalized")},
              "special": c in specials if flag(0.87) else flag(0.5)} for c in contents]
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    spec = {"version": "1.0", "truncation": cut if flag(0.02) else None, "padding": None,
            "added_tokens": added, **parts, "model": model}
    if flag(0.03):                                      # a key that nobody knows
        rng.choice([spec, model, *(part for part in parts.values() if part), *added])["new"] = 1
    return {key: value for key, value in spec.items() if key == "model" or not flag(0.003)}


def attempt(function, *arguments, **options):
    """What a function returns, or the problem that it raises."""
    try:
        return function(*arguments, **options)
    except BaseException as problem:                    # a panic of Rust's is no Exception
        return problem


def test_files_of_every_form(tmp_path, request):
    def judge(rng):
        spec, texts = random_tokenizer_json(rng), [random_text(rng) for _ in range(6)]
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        theirs = attempt(library.Tokenizer.from_file, str(tmp_path / "tokenizer.json"))
        invalid = isinstance(theirs, BaseException)
        try:
            ours = Tokenizer.from_pretrained(tmp_path)
        except ValueError:
            return "invalid" if invalid else "refused"
        assert not invalid, theirs
        theirs.no_truncation()                          # transformers does so too, unless asked for them
        theirs.no_padding()
        theirs.encode_special_tokens = True
        for text in texts:
            if spec["model"].get("ignore_merges") and any(name in text for name in ours.special):
                continue                                # text never makes a special token, here
            ids, want = ours.encode(text), attempt(theirs.encode, text, add_special_tokens=False)
            assert ids == getattr(want, "ids", want), text
            prompt = encode_prompt(ours, "plain", [("user", text)])
            assert prompt == theirs.encode(text).ids[:len(prompt)], text
            for some in (ids, rng.choices(range(320), k=rng.randint(1, 6))):
                assert ours.decode(some) == attempt(theirs.decode, some, skip_special_tokens=False), some
        return "same"

    judge_all(request, judge)

"""tokenizer.json files of every form: each is read as the tokenizers library reads it, or refused."""

import json
import random
from collections import Counter

import pytest

from text.examples import encode_prompt
from text.tokenizer import Tokenizer

library = pytest.importorskip("tokenizers")
from forms import random_text, random_tokenizer_json    # noqa: E402


def random_ids(spec, rng):
    """Some ids of the vocabulary, none of a special token."""
    special = [t["content"] for t in spec.get("added_tokens", []) if t["special"]]
    vocab = spec["model"]["vocab"]
    ids = [vocab[t] for t in vocab if t not in special] if isinstance(vocab, dict) else range(3, len(vocab))
    return rng.choices([*ids, 0], k=rng.randint(1, 6))


def attempt(function, *arguments, **options):
    """What a function returns, or the problem that it raises."""
    try:
        return function(*arguments, **options)
    except BaseException as problem:                    # a panic of Rust's is no Exception
        return problem


def compare(spec, texts, drawn, folder):
    """What a file shows, {what: an example}: "invalid" (the library refuses it, and so do we), "refused" (we
    do), "same", or disagreements of several kinds."""
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    theirs = attempt(library.Tokenizer.from_file, str(folder / "tokenizer.json"))
    ours = attempt(Tokenizer.from_pretrained, folder)
    if isinstance(ours, ValueError):
        return {"invalid" if isinstance(theirs, BaseException) else "refused": str(ours)}
    if isinstance(ours, BaseException):
        return {"another exception": repr(ours)}
    if isinstance(theirs, BaseException):
        return {"invalid, but read": repr(theirs)}
    theirs.no_truncation()                              # transformers does so too, unless asked for them
    theirs.no_padding()
    theirs.encode_special_tokens, found = True, {}
    for text, some in zip(texts, drawn):
        want = attempt(theirs.encode, text, add_special_tokens=False)
        ids = attempt(ours.encode, text)
        names = [t for t in ours.special if spec["model"].get("ignore_merges") and t in text]
        if names:                                       # text never makes a special token, here
            continue
        if ids != getattr(want, "ids", want):
            found.setdefault("encode", (text, ids, getattr(want, "ids", want)))
        elif isinstance(ids, list):
            prompt, want_prompt = encode_prompt(ours, "plain", [("user", text)]), theirs.encode(text).ids
            if prompt != want_prompt[:len(prompt)]:
                found.setdefault("prompt", (text, prompt, want_prompt))
        for some in (getattr(want, "ids", []), some):
            want, text = attempt(theirs.decode, some, skip_special_tokens=False), attempt(ours.decode, some)
            if text != want:
                found.setdefault("decode", (some, text, want))
    return found or {"same": None}


def test_files_of_every_form(tmp_path, request):
    outcomes, found = Counter(), {}
    for seed in range(request.config.getoption("--fuzz")):
        rng = random.Random(seed)
        spec = random_tokenizer_json(rng)
        texts, drawn = [random_text(rng) for _ in range(6)], [random_ids(spec, rng) for _ in range(6)]
        here = compare(spec, texts, drawn, tmp_path)
        outcomes.update(here.keys())
        found |= {what: (seed, example) for what, example in here.items() if what not in found}
    print(dict(outcomes))
    assert not found.keys() - {"invalid", "refused", "same"}, found

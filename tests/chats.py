"""Conversations, and what transformers' apply_chat_template makes of them: chats.json, which is written by

    python tests/chats.py FOLDER

where transformers and jinja2 are installed, and FOLDER holds the texts of chat templates that text/chat.py
knows, as they are published, one a file (NAME.jinja): all that chats.json does not know yet, and one of each
form. Llama 3.2's is given the date that it falls back to. Of each conversation there is the start of a hash;
of the first ones, all ids.
"""

import hashlib
import json
import random
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "tokenizers"
sys.path[:0] = [str(HERE.parent)]

from text.bpe import LETTERS  # noqa: E402
from text.chat import CHATS, KNOWN, MAY_BE_TEXT, Control  # noqa: E402

OWN = {"chat-llama3": "llama3", "chat-llama3.1": "llama3", "chat-gemma": "gemma_like",
       **dict.fromkeys(("chat-smollm2", "chat-chatml"), "smollm2_like"),
       **dict.fromkeys(("chat-qwen2", "chat-qwen2.5", "chat-qwen3"), "qwen2_like")}
LIKE = {name: OWN.get(name, "llama2") for name in CHATS}       # whose tokenizer has a form's control tokens
NO_SYSTEM = ("chat-gemma", "chat-mistral", "chat-mistral-first")
PIECES = ["Why?", "So.", "a", "  b", "user", "assistant\n", "model", "system", " 12", "3.5", "don't", "é",
          "ß", "日本", "🙂", "\u00a0", "\u200b", "\u2003", "\t", "\r\n", "\n", "\n\n", " ", "   ", "<b>",
          "[/INST", "{{x}}"]


def random_text(r):
    return "".join(r.choice(PIECES) for _ in range(r.randrange(7)))


def answer(r, name, text):
    """An answer as (text, thoughts): Qwen 3's often has some, in its text or apart from it."""
    if name == "chat-qwen3" and r.randrange(2):
        before, thoughts, between = (random_text(r) for _ in range(3))
        if r.randrange(2):
            return text, thoughts
        return f"{before}<think>{thoughts}</think>{between}{text}", None
    return text, None


def conversations(name, n=200):
    """Turns that end with the user's: a system or none, one to five questions, odd white space."""
    r, found = random.Random(20), []
    for _ in range(n):
        system, questions, turns = r.randrange(3), r.randrange(1, 6), []
        if system and name not in NO_SYSTEM:
            turns.append(("system", random_text(r)))
        for q in range(questions):
            turns.append(("user", random_text(r)))
            if q < questions - 1:
                turns.append(("assistant", *answer(r, name, random_text(r))))
        found.append(turns)
    return found


def answers(name, n=200):
    """What is answered, as (text, thoughts)."""
    r = random.Random(21)
    return [answer(r, name, f"{random_text(r)}Yes{random_text(r)}") for _ in range(n)]


def message(role, text, thoughts=None):
    return {"role": role, "content": text} | ({} if thoughts is None else {"reasoning_content": thoughts})


def to_whole(name, turns):
    """The turns of a whole conversation. (Mistral's third writes the system into a last question alone.)"""
    own = (turns[0]["role"] if isinstance(turns[0], dict) else turns[0][0]) == "system"
    return turns[own and name == "chat-mistral-v3":]


def small(name):
    """A tokenizer.json of bytes with a few merges, some of white space, and a form's control tokens."""
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), ("u", "s"), ("us", "er"), ("e", "r"), ("ĊĊ", "Ċ")]
    bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = spec_of([*LETTERS.values()], merges, {"pre_tokenizer": bytes, "decoder": bytes})
    return with_controls(spec, name)


def pieces(name):
    """Llama 2's kind of tokenizer.json, with a space before each stretch. [INST] and such are tokens."""
    merges = [("▁", "▁"), ("▁", "a"), ("u", "s"), ("us", "er"), ("e", "r"), ("▁", "user"), ("S", "o")]
    steps = [{"type": "Prepend", "prepend": "▁"},
             {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    letters = [*(f"<0x{b:02X}>" for b in range(256)),
               *dict.fromkeys("▁abdelmnorstuwyWSY[]/" + "".join(PIECES))]
    spec = spec_of(letters, merges, {"normalizer": {"type": "Sequence", "normalizers": steps}})
    spec["model"]["byte_fallback"] = True
    return with_controls(spec, name, without=())


def spec_of(letters, merges, parts):
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    return {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
            "decoder": None, **parts,
            "model": {"type": "BPE", "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]}}


def like(name):
    """The tokenizer.json of a family, which is not in this repository."""
    spec = json.loads((SHARED / LIKE[name] / "tokenizer.json").read_text(encoding="utf-8"))
    return with_controls(spec, name)


def with_controls(spec, name, without=MAY_BE_TEXT):
    """A tokenizer.json with the control tokens of a form, and Qwen 3's marks of thoughts, which are not."""
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    controls = [p for p in controls_of(name) if p not in without] + [CHATS[name].end]
    for content in dict.fromkeys([*controls, "<think>", "</think>"]):
        if content not in [t["content"] for t in added]:
            free = len(vocab) + sum(t["content"] not in vocab for t in added)
            added.append({"id": free, "content": str(content), "special": content in controls, **flags})
    return spec


KINDS = {"small": small, "pieces": pieces, "like": like}


def names(name):
    """The tokens that a form's template speaks of as bos_token and eos_token."""
    first, end = CHATS[name].prompt([("user", "")])[0], CHATS[name].end
    bos = {"bos_token": str(first)} if first in ("<s>", "<bos>", "<|begin_of_text|>") else {}
    return bos | ({"eos_token": end} if end == "</s>" else {})


def controls_of(name):
    return [piece for piece in CHATS[name].prompt([("user", "")]) if isinstance(piece, Control)]


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def main(folder):
    import tokenizers
    import transformers

    texts = [file.read_text(encoding="utf-8").removesuffix("\n") for file in Path(folder).glob("*.jinja")]
    texts = {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}
    before = json.loads((HERE / "chats.json").read_text())["known"]
    if lacking := KNOWN.keys() - texts.keys() - before.keys():
        sys.exit(f"{folder} lacks templates: {', '.join(KNOWN[h] + ' ' + h for h in lacking)}")
    made = {}
    for name in CHATS:
        asked, said = conversations(name), answers(name)
        messages = [[message(*turn) for turn in turns] for turns in asked]
        made[name] = {"conversations": digest((asked, said))}
        for kind, spec in KINDS.items():
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec(name))), **names(name))
            results = []
            for text in (texts[h] for h in KNOWN if KNOWN[h] == name and h in texts):
                apply = partial(tokenizer.apply_chat_template, chat_template=text, date_string="26 Jul 2024")
                ids = [apply(m, add_generation_prompt=True, return_dict=False) for m in messages]
                results.append((ids, [apply([*to_whole(name, m), message("assistant", *a)], tokenize=False)
                                      for m, a in zip(messages, said)]))
            ids, whole = results[0]
            assert all(other == ids for other, _ in results), name
            made[name] |= {"whole": " ".join(map(digest, whole))} if kind == "small" else {}
            made[name][kind] = {"ids": " ".join(map(digest, ids)), "first": ids[:2]}
    about = f"transformers {transformers.__version__}, tokenizers, jinja2"
    (HERE / "chats.json").write_text(json.dumps({"made_by": about, "forms": made, "known": KNOWN}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Conversations, and what transformers' apply_chat_template makes of them: chats.json, which is written by

    python tests/chats.py FOLDER

where transformers and jinja2 are installed, and FOLDER holds the texts of the chat templates that
text/chat.py knows, as they are published, one a file (NAME.jinja). Llama 3.2's is given the date that it
falls back to. Of each conversation there is the start of a hash; of the first ones, all ids.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "tokenizers"
sys.path[:0] = [str(HERE.parent)]

from text.bpe import LETTERS  # noqa: E402
from text.chat import CHATS, KNOWN, Special  # noqa: E402

LIKE = {"chat-llama3": "llama3", "chat-llama3.1": "llama3", "chat-gemma": "gemma_like"}
LIKE |= dict.fromkeys(("chat-smollm2", "chat-chatml"), "smollm2_like")
LIKE |= dict.fromkeys(("chat-qwen2", "chat-qwen2.5", "chat-qwen3"), "qwen2_like")
PIECES = ["Why?", "So.", "a", "  b", "user", "assistant\n", "model", "system", " 12", "3.5", "don't", "é",
          "ß", "日本", "🙂", "\u00a0", "\u200b", "\u2003", "\t", "\r\n", "\n", "\n\n", " ", "   ", "<b>",
          "</s>", "{{x}}"]


def conversations(name, n=200):
    """Turns that end with the user's: a system or none, one to five questions, odd white space."""
    r = random.Random(20)
    text = lambda: "".join(r.choice(PIECES) for _ in range(r.randrange(7)))
    found = []
    for _ in range(n):
        system, questions, turns = r.randrange(3), r.randrange(1, 6), []
        if system and name != "chat-gemma":
            turns.append(("system", text()))
        for q in range(questions):
            turns.append(("user", text()))
            if q < questions - 1:
                thinks = name == "chat-qwen3" and r.randrange(2)
                thoughts = f"{text()}<think>{text()}</think>{text()}" if thinks else ""
                turns.append(("assistant", thoughts + text()))
        found.append(turns)
    return found


def answers(name, n=200):
    """What is answered: for Qwen 3 often with thoughts."""
    r = random.Random(21)
    text = lambda: "".join(r.choice(PIECES) for _ in range(r.randrange(7)))
    think = lambda: f"<think>{text()}</think>{text()}" if name == "chat-qwen3" and r.randrange(2) else ""
    return [think() + text() + "Yes" + text() for _ in range(n)]


def small(name):
    """A tokenizer.json of bytes with a few merges, some of white space, and a form's control tokens."""
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), ("u", "s"), ("us", "er"), ("e", "r"), ("ĊĊ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*LETTERS.values(), *(a + b for a, b in merges)])}
    bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {"added_tokens": [], "normalizer": None, "post_processor": None, "decoder": bytes,
            "pre_tokenizer": bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]}}
    return with_controls(spec, name)


def like(name):
    """The tokenizer.json of a family, which is not in this repository."""
    spec = json.loads((SHARED / LIKE[name] / "tokenizer.json").read_text(encoding="utf-8"))
    return with_controls(spec, name)


def with_controls(spec, name):
    """A tokenizer.json with the control tokens of a form, and Qwen 3's marks of thoughts, which are not."""
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    controls = [p for p in CHATS[name].prompt([("user", "")]) if isinstance(p, Special)]
    for content in dict.fromkeys([*controls, "<think>", "</think>"]):
        if content not in [t["content"] for t in added]:
            free = len(vocab) + sum(t["content"] not in vocab for t in added)
            added.append({"id": free, "content": str(content), "special": content in controls, **flags})
    return spec


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


def main(folder):
    import tempfile

    import transformers

    texts = [file.read_text(encoding="utf-8").removesuffix("\n") for file in Path(folder).glob("*.jinja")]
    texts = {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}
    if lacking := KNOWN.keys() - texts.keys():
        sys.exit(f"{folder} lacks templates: {', '.join(KNOWN[h] + ' ' + h for h in lacking)}")
    made = {}
    for name in CHATS:
        asked, said = conversations(name), answers(name)
        messages = [[{"role": role, "content": text} for role, text in turns] for turns in asked]
        made[name] = {"conversations": digest((asked, said))}
        for kind, spec in (("small", small(name)), ("like", like(name))):
            with tempfile.TemporaryDirectory() as made_in:
                file = Path(made_in) / "tokenizer.json"
                file.write_text(json.dumps(spec))
                bos = next(str(p) for p in CHATS[name].prompt([("user", "")]) if isinstance(p, Special))
                tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=bos)
            results = []
            for text in (texts[h] for h in KNOWN if KNOWN[h] == name):
                apply = lambda m, **how: tokenizer.apply_chat_template(
                    m, chat_template=text, date_string="26 Jul 2024", **how)
                ids = [apply(m, add_generation_prompt=True, return_dict=False) for m in messages]
                whole = [apply([*m, {"role": "assistant", "content": a}], tokenize=False)
                         for m, a in zip(messages, said)]
                results.append((ids, whole))
            ids, whole = results[0]
            assert all(other == ids for other, _ in results), name
            if kind == "small":
                made[name]["whole"] = " ".join(map(digest, whole))
            made[name][kind] = {"ids": " ".join(map(digest, ids)), "first": ids[:2]}
    about = f"transformers {transformers.__version__}, tokenizers, jinja2"
    (HERE / "chats.json").write_text(json.dumps({"made_by": about, "forms": made, "known": KNOWN}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

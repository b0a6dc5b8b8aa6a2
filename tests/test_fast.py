"""What is in fast/ gives the same numbers as the plain forms in the five files."""

import pytest
import torch

from bitune import METHODS, Bitune
from fast import decoding
from lora import KINDS
from tiny import ANSWERS, RAGGED, tiny_bitune, tiny_model

F64 = torch.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_answers_are_the_unmerged_ones(method, kind):
    bitune = tiny_bitune(method, kind, dtype=F64).eval()
    before = {name: t.clone() for name, t in bitune.state_dict().items()}
    with torch.inference_mode():
        want = bitune(RAGGED, ANSWERS)[0]
        quick = decoding.quick(bitune)
        torch.testing.assert_close(quick(RAGGED, ANSWERS)[0], want, atol=1e-10, rtol=1e-10)
        assert torch.equal(bitune(RAGGED, ANSWERS)[0], want) and quick.answer_set is None
    assert quick.generate(RAGGED, 6) == bitune.generate(RAGGED, 6) and not quick.training
    assert all(torch.equal(t, before[name]) for name, t in bitune.state_dict().items())


def test_without_room_the_set_stays_apart(monkeypatch):
    monkeypatch.setattr(decoding, "fits", lambda model: False)
    bitune = tiny_bitune().eval()
    assert decoding.quick(bitune) is bitune and bitune.answer_set == "answer"
    assert decoding.fits(bitune.model) is False


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"model_type": "phi"}])
def test_laid_out_anew_weights_are_the_same(config):
    bitune = Bitune(tiny_model(**config), "causal").eval()
    with torch.inference_mode():
        want = bitune(RAGGED, ANSWERS)[0]
        state = {name: t.clone() for name, t in bitune.state_dict().items()}
        decoding.lay_out(bitune.model)
        torch.testing.assert_close(bitune(RAGGED, ANSWERS)[0], want, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(t, state[name]) for name, t in bitune.state_dict().items())
    names = {name for name, p in bitune.model.named_parameters() if p.dim() > 1 and not p.is_contiguous()}
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    assert head in names and any("up_proj" in name or "fc1" in name for name in names)
    assert not any("down_proj" in name or "fc2" in name for name in names)
    model = tiny_model(torch.bfloat16)
    decoding.lay_out(model)
    assert all(p.is_contiguous() for p in model.parameters())

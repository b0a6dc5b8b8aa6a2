"""The computed costs, against closed forms and against real tensors."""

import pytest
import torch

from cli.memory import bytes_kept, step_bytes
from experiments import benchmark, cost
from pretended import pretended
from text.examples import Example
from tiny import tiny_bitune

SHAPE = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
         "num_hidden_layers": 3, "num_attention_heads": 4}


def test_parameters_are_the_published_models():
    """As their model cards have them."""
    published = {
        "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "llama-2-7b": 6_738_415_616,
        "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3-8b": 8_030_261_248,
        "phi-2": 2_779_683_840,
    }
    for name, shape in cost.SHAPES.items():
        with torch.device("meta"):
            model = cost.Llama(cost.parse_config(shape))
        assert sum(p.numel() for p in model.parameters()) == published[name]


@pytest.mark.reference          # of today's method
def test_operations_of_a_step_are_those_of_its_tokens():
    """Four a weight and token with a frozen base, forward and backward; in Bitune for each reading."""
    P, A = 40, 24
    n, _, frozen, _, lora = cost.cost(SHAPE, "causal", "lora", {"rank": 2}, P, A)
    _, _, _, _, bitune = cost.cost(SHAPE, "bitune", "lora", {"rank": 2}, P, A)
    layers = n - 2 * 1000 * 256
    assert frozen == 2 * n
    assert abs(lora / (4 * (layers * (P + A - 1) + 1000 * 256 * A)) - 1) < 0.15
    assert 1 < (bitune - lora) / (4 * layers * 2 / 3 * (P - 1)) < 1.6  # the last layer's is but K and V
    _, trained, frozen, _, full = cost.cost(SHAPE, "bitune", "full", {}, P, A)
    assert frozen == 0 and trained == n + 3 * (4 * 256**2 + 3 * 256 * 512) + 6 and full > bitune


def test_what_autograd_keeps_is_counted_once():
    x, w = torch.randn(10, 4), torch.nn.Parameter(torch.randn(4, 4))
    bitune = tiny_bitune()
    bitune.w = w
    y = lambda: (x @ w @ w).exp().sin()  # keeps x, the first product, exp's result (twice); and w
    assert bytes_kept(bitune, y) == 3 * 10 * 4 * 4

    example = Example([5] * 30, [7] * 10)
    with cost.Fused():
        real = step_bytes(bitune, [example])
        assert step_bytes(bitune.to("meta"), [example]) == real > 30 * 32 * 4 * 3  # an activation a layer


def test_what_a_card_does_at_least():
    """Every weight but the embedding's is read once a token, by a prompt's reading in Bitune three times but
    for the last layer, and twice a step with plain LoRA; an operator more a layer is a launch more."""
    P, A, (layer, head) = 40, 24, (4 * 256**2 + 3 * 256 * 512, 1000 * 256)
    lora, bitune = (cost.without_memory(SHAPE, method) for method in ("causal", "bitune"))
    adapters = 4 * sum(p.numel() for p in lora.parameters() if p.requires_grad)
    (_, _, _), (flops, read, launches) = cost.answer_work(lora, P, A)
    assert 0 < read - (2 * (3 * layer + head) + adapters) < 2 * 7 * 256 + 1        # the norms
    assert 0.9 < flops / (2 * (3 * layer + head)) < 1.3
    assert cost.answer_work(bitune, P, A)[1] == (flops, read, launches)


def test_on_a_card_the_benchmark_prints_the_share_that_was_needed(monkeypatch, capsys):
    """On the pretended card, with times that are told: a millisecond, two for an answer of two tokens."""
    def told(device, repeats, functions):
        for function in functions.values():
            function()
        return {name: 0.002 if name[-1] == 2 else 0.001 for name in functions}

    monkeypatch.setattr(benchmark, "medians", told)
    monkeypatch.setattr(benchmark, "READ", (64, 64))
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SHAPE | {"num_hidden_layers": 1})
    for name, answer in (("get_device_name", "a card"), ("reset_peak_memory_stats", None),
                         ("memory_allocated", 0), ("max_memory_allocated", 10**6)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    with pretended():
        benchmark.main("--preset tiny --device cuda --batches 1 --prompts 8 --answer 2 --launch 0.5".split())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0] for row in rows] == ["P", "8", "P", *["8"] * 4]
    train, lora = dict(zip(*rows[:2])), dict(zip(*rows[2:4]))
    bare = cost.without_memory(benchmark.SHAPES["tiny"], "causal")
    works = [cost.step_work(bare, [Example([0] * 8, [0] * 2)]), *cost.answer_work(bare, 8, 2)]
    shares = train["lora of card"], lora["first of card"], lora["token of card"]
    assert (lora["what"], *shares) == ("lora", *(f"{launches * 0.5e-3:.2f}" for _, _, launches in works))

"""On a GPU, where there is one: the same numbers as on the CPU, in float32 and, coarsely, in bfloat16."""

import pytest
import torch

from bitune import Bitune
from text.examples import Example, batches
from tiny import ANSWERS, RAGGED, tiny_bitune
from train import make_optimizer, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("method", ["bitune", "causal"])
def test_a_training_step_and_answers(method, dtype, tolerance):
    """Ragged rows and grouped heads: masks on every pass."""
    cpu, gpu = tiny_bitune(method), tiny_bitune(method).cuda()
    for p in gpu.model.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)
    want, got = cpu.losses(RAGGED, ANSWERS), gpu.losses(RAGGED, ANSWERS).cpu()
    assert (got - want).norm() <= tolerance * want.norm()
    examples = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
    steps = [train_step(b, make_optimizer(b, 1e-3, 1e-6, 0.0), examples, batches, 1.0, 1.0)
             for b in (cpu, gpu)]
    assert steps[1] == pytest.approx(steps[0], rel=2 * tolerance)
    if dtype == torch.float32:
        assert gpu.generate(RAGGED, 8) == cpu.generate(RAGGED, 8)
    assert len(Bitune.generate(gpu, RAGGED, 8, temperature=1.0)) == 4

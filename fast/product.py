"""x W^T on a CPU by oneDNN, which PyTorch carries, instead of by MKL, which its F.linear calls in float32.

On an AMD CPU, MKL leaves AVX-512 unused: a large product is made at 480 GFLOP/s instead of 220 (two cores;
with AVX2 alone, 250). And a single row is spread over all threads, where MKL leaves a weight to one, which
reads memory at half the speed of two.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache
def onednn():
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x, weight, bias=None):
    """F.linear of x (..., in) and weight (out, in). By oneDNN it has no backward pass: it is taken inside of
    autograd functions, and where no gradient flows."""
    in_floats = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel()
    if not in_floats or torch.is_grad_enabled() or not onednn():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

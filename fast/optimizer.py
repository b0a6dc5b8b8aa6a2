"""AdamW, ready at once."""

from inspect import unwrap

import torch


class AdamW(torch.optim.AdamW):
    """torch's own, without the wrappers that keep torch.compile out of these three methods. Nothing is
    compiled here, and for nothing else they import the compiler, which takes longer than some trainings."""
    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))

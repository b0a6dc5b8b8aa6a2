"""A small random model of the same make, on which fast/ finds out whether it computes as the five files do.

An edit of their source may have changed that. It shows on few numbers, in float64, whatever the size, the
dtype and the device of the model that it is about; and that one is left alone.
"""

from dataclasses import replace

import torch

from lora import add_adapter, linears


def small_model(model):
    """A model of three narrow layers in float64, with the kinds of adapters that `model` has on linears of
    the same names, every number of it drawn at random."""
    c = model.config
    config = replace(c, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
                     num_attention_heads=4, rotary_dim=8 if c.rotary_dim == c.head_dim else 4,
                     num_key_value_heads=4 if c.num_key_value_heads == c.num_attention_heads else 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = type(model)(config)
        targets = {path.split(".")[-1] for path, linear in linears(model).items() if linear.sets}
        for name, (kind, options) in model.sets.items():
            add_adapter(small, name, kind, targets, **options)
        return shaken(small)


def small_bitune(bitune):
    """The same for a whole Bitune, its mixing shaken, too."""
    small = type(bitune)(small_model(bitune.model), bitune.method, bitune.c)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return shaken(small).eval()             # no dropout, which would be drawn anew each time


@torch.no_grad()
def shaken(module):
    """Every parameter moved away from where it starts, which may be zero."""
    for p in module.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return module.double()

"""What the commands take from fast/. Without that room the program still runs, by the plain forms of the
five files, only slower; what needs more is refused."""

from pathlib import Path

import torch

if (Path(__file__).parent.parent / "fast").is_dir():
    from fast.decoding import norms_once, quick
    from fast.linear import eight_bits
    from fast.optimizer import AdamW
    from fast.training import hasten
else:
    AdamW = torch.optim.AdamW

    def quick(bitune):
        return bitune

    def norms_once(model):
        pass

    def hasten(bitune, plain=False, checkpointing=False):
        if checkpointing:
            raise ValueError("--checkpointing needs the folder fast/, which is not there")
        return False

    def eight_bits(model):
        raise ValueError("--base-bits needs the folder fast/, which is not there")

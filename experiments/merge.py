"""Write a plain checkpoint that answers as a base with an adapter does:

    python -m experiments.merge --adapter RUN --out FOLDER [--model FOLDER]

For runs of method causal, but those of full finetuning, which are checkpoints already, and for PEFT
adapters. It is refused for a run with prompt passes: these need the base, or two sets of weights, at once.
"""

from pathlib import Path

from cli.process import command
from cli.settings import ASKED, SETTINGS, Setting, new_parser, text
from files.checkpoint import DTYPES, checkpoint_bytes, checkpoint_dtype, load_model, merged_tensors
from files.disk import locked, write_files
from files.run import base_of, load_bitune, read_about
from text.words import to_type

FLAGS = {
    "model": ASKED["model"],
    "adapter": Setting("a run of train.py, or a PEFT adapter", text("RUN", required=True)),
    "out": Setting("where to write the checkpoint", text("FOLDER", required=True)),
    "dtype": Setting("of its weights (default: the base's)", SETTINGS["dtype"].form),
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    run, out = Path(args.adapter), Path(args.out)
    if out.exists():
        raise ValueError(f"--out {out} exists: choose another name")
    if (method := read_about(run).get("method", "causal")) != "causal":
        raise ValueError(f"{run} is of method {method}, whose prompt passes need its adapters apart from "
                         "the base; only causal can be merged. Ask it: "
                         f"{to_type('sample.py', '--adapter', run)}")
    base = args.model or base_of(run)
    bitune, _, _ = load_bitune(load_model(base), run, base)             # which refuses a damaged base
    dtype = DTYPES[args.dtype] if args.dtype else checkpoint_dtype(base)
    before, learned, kept = bitune.eval().model.state_dict(), 0.0, 0.0
    after = {name: (t, t.to(dtype)) for name, t in merged_tensors(bitune.model, "answer").items()}
    for name, (t, written) in after.items():
        if not written.isfinite().all():
            raise ValueError(f"{name}: merged, it is not finite in {dtype}: give --dtype float32")
        change = t - before[name]
        learned += change.square().sum().item()
        kept += (change * (written.float() - before[name])).sum().item()
    kept = kept / learned if learned else 1.0
    print(f"{str(dtype).removeprefix('torch.')} keeps {kept:.1%} of what was learned")
    if kept < 0.5:
        raise ValueError("more than half of what was learned would be rounded away: give --dtype float32")
    with locked(out):
        write_files(out, checkpoint_bytes({name: written for name, (_, written) in after.items()}, base))
    print(f"wrote {out}: use it as --model")


if __name__ == "__main__":
    main()

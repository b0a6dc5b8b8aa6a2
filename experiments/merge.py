"""Write a plain checkpoint that answers as a base with an adapter does:

    python -m experiments.merge --model FOLDER --adapter RUN --out FOLDER

For runs of method causal, but those of full finetuning, which are checkpoints already, and for PEFT
adapters. It is refused for a run with prompt passes: these need the base, or two sets of weights, at once.
"""

from pathlib import Path

from cli.process import before_work, run_main
from cli.settings import new_parser
from files.checkpoint import checkpoint_bytes, checkpoint_dtype, load_model
from files.disk import finish_writing, write_files
from files.run import load_bitune, read_about
from lora import merge


def main(argv=None):
    parser = new_parser(__doc__)
    arg = parser.add_argument
    arg("--model", metavar="FOLDER", required=True, help="base model: a checkpoint folder")
    arg("--adapter", metavar="RUN", required=True, help="a run of train.py, or a PEFT adapter")
    arg("--out", metavar="FOLDER", required=True, help="where to write the checkpoint")
    args = parser.parse_args(argv)
    base, run, out = map(Path, (args.model, args.adapter, args.out))
    with before_work():
        finish_writing(run)
        if out.exists():
            raise ValueError(f"--out {out} exists: choose another name")
        if (method := read_about(run).get("method", "causal")) != "causal":
            raise ValueError(f"{run} is of method {method}, whose prompt passes need its adapters apart "
                             "from the base: ask it with sample.py --adapter; only causal can be merged")
        model = load_model(base, checkpoint_dtype(base))
        bitune, _, _ = load_bitune(model, run, args.model)
        write_files(out, checkpoint_bytes(merge(model, bitune.answers), base))
    print(f"wrote {out}: use it as --model")


if __name__ == "__main__":
    run_main(main)

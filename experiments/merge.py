"""Write a plain checkpoint that answers as a base with an adapter does:

    python -m experiments.merge --model FOLDER --adapter RUN --out FOLDER

For runs of method lora, with any --peft but full (which is a checkpoint already), and for PEFT adapters. It
is refused for a run with prompt passes: these need the base, or two sets of weights, at once.
"""

from pathlib import Path

from bitune import Bitune
from lora import finish_writing, merge, plain_files, read_json, write_files
from model import Llama, checkpoint_dtype
from train import fail, new_parser


def main(argv=None):
    parser = new_parser(__doc__)
    arg = parser.add_argument
    arg("--model", metavar="FOLDER", required=True, help="base model: a checkpoint folder")
    arg("--adapter", metavar="RUN", required=True, help="a run of train.py, or a PEFT adapter")
    arg("--out", metavar="FOLDER", required=True, help="where to write the checkpoint")
    args = parser.parse_args(argv)
    base, run, out = map(Path, (args.model, args.adapter, args.out))
    try:
        finish_writing(run)
        if out.exists():
            raise ValueError(f"--out {out} exists: choose another name")
        method = "lora"
        if (run / "bitune.json").exists():
            method = read_json(run / "bitune.json", "method")["method"]
        if method != "lora":
            raise ValueError(f"{run} is of method {method}, whose prompt passes need its adapters apart "
                             "from the base: ask it with sample.py --adapter; only lora can be merged")
        model = Llama.from_pretrained(base, checkpoint_dtype(base))
        Bitune.load(model, run, args.model)
        write_files(out, plain_files(merge(model, "causal"), base))
    except (ValueError, OSError, RuntimeError) as problem:
        fail(problem)
    print(f"wrote {out}: use it as --model")


if __name__ == "__main__":
    main()

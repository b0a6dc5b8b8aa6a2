"""Verdicts of experiments.evaluate against the evaluation harness's, question by question:

    python -m experiments.evaluate --model MODEL --task arc --data FILE --limit 200 --out results
    python tests/against_harness.py MODEL results/*.jsonl

where transformers and lm_eval (0.4.13) are installed. Its own Hugging Face model answers the same prompts in
float32; gsm8k is the harness's own task, its filters and its metric, on them.
"""

import json
import sys
from pathlib import Path

CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer",
           "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}


def task_of(file, rows):
    """The harness's task on the rows of a results file."""
    task = CHOICES
    if "choices" not in rows[0]:
        import lm_eval
        from lm_eval.tasks._yaml_loader import load_yaml

        own = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml"
        task = load_yaml(own) | {"doc_to_target": "{{answer}}", "num_fewshot": 0}
        for key in ("tag", "dataset_name", "fewshot_split", "training_split", "fewshot_config"):
            task.pop(key, None)
    return task | {"task": file.stem, "dataset_path": "json", "test_split": "test",
                   "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
                   "doc_to_text": "Question: {{prompt}}\n\nAnswer:"}


def main(model, *files):
    import lm_eval

    differ = 0
    for file in map(Path, files):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        done = lm_eval.simple_evaluate("hf", {"pretrained": model, "dtype": "float32"}, device="cpu",
                                       tasks=[task_of(file, rows)], batch_size=8, log_samples=True)
        theirs = {(sample["doc_id"], sample["filter"] if metric == "exact_match" else metric):
                  float(sample[metric]) for sample in done["samples"][file.stem] for metric in sample["metrics"]}
        ours = {(n, key): value for n, row in enumerate(rows) for key, value in row.items()
                if isinstance(value, float)}
        assert ours.keys() == theirs.keys()
        wrong = [f"{rows[n]['place']} {key}: {value:.0f}, the harness {theirs[n, key]:.0f}"
                 for (n, key), value in ours.items() if value != theirs[n, key]]
        differ += len(wrong)
        print(f"{file.stem}: {len(rows)} questions, {len(ours)} verdicts, {len(wrong)} differ", *wrong,
              sep="\n    ", flush=True)
    sys.exit(differ > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

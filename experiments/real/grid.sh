#!/bin/bash
# The table of docs/real.md: SmolLM2-135M-Instruct on ARC-Easy. Start it once or several times at once; killed, it
# goes on when it is started again. Beside it in the working folder:
#   smollm2                              HuggingFaceTB/SmolLM2-135M-Instruct
#   train.jsonl                          ARC-Easy-Train.jsonl, 2,251 rows
#   easy.jsonl                           head -n 1000 ARC-Easy-Test.jsonl
#   challenge.jsonl                      head -n 500 ARC-Challenge-Test.jsonl
#   csqa.jsonl                           head -n 500 dev_rand_split.jsonl
# results.jsonl and base.json beside this file are what the table's runs recorded, by an earlier version of the grid.
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for seeds in "42" "42 43" "42 43 44"; do
    nice -n 19 python -m experiments.ablate --out real --model smollm2 --dtype bfloat16 --task arc --data train.jsonl \
        --steps 225 --eval-every 75 --save-every 25 --methods bitune naive-bidir no-mixing \
        --evaluate arc=easy.jsonl arc=challenge.jsonl csqa=csqa.jsonl --eval-batch-size 24 \
        --lrs 1e-3 3e-3 3e-4 1e-4 --search --seeds $seeds
done

#!/bin/bash
# What docs/real.md tries beside the paper's setting: one run each at the grid's best rate, told apart by validation
# loss. From the working folder of grid.sh, with this project's folder as the argument. Killed, it goes on when it is
# started again.
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
run() {                         # NAME COPY STEPS [flags]: train.py of a copy of the project
    local out=why/$1 copy=$2 steps=$3; shift 3
    local flags="--model smollm2 --dtype bfloat16 --template paper --task arc --data train.jsonl --lr 3e-3 --seed 42
                 --steps $steps --eval-every 75 --save-every 25 --out $out $*"
    [ -e $out/bitune.json ] && flags="--resume $out"
    grep -qs "\"step\": $steps, \"val_loss\"" $out/log.jsonl || PYTHONPATH=$copy nice -n 19 python -m train $flags
    echo "$out: $(grep -o '"val_loss": [0-9.]*' $out/log.jsonl | tail -n +2 | paste -sd' ')"
}
edited() {                      # EDITS: a copy of the project with them
    local copy=../bitune-${1/ /-}
    [ -e "$copy" ] || python "$project"/tests/edits.py $1 "$copy"
    run "${1/ /-}" "$copy" 225
}
project=$1
edited "start clip"
run bitune-longer "$project" 450
run lora-longer "$project" 450 --method causal

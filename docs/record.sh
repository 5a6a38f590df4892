#!/bin/sh
# Prints a row of README's record, for this commit and machine: maps of FashionMNIST, from the command to the report,
# and nine separate trainings by Muon. Needs the classifier (python train_classifier.py --dataset FashionMNIST).
#
#     sh docs/record.sh [FLAGS of train.py, such as --num_epochs 2]      two hours of two cores
set -e
cd "$(dirname "$0")/.."
settings="--dataset FashionMNIST --num_epochs 16 --seed 1 $*"

map() {  # of $1 x $1 cells; prints the hours it took
    begin=$(date +%s)
    python train.py $settings --beta_y "0.1:10:$1" --beta_z "0.1:10:$1" --multi_rate --run_batch_name "record_$1" >&2
    python eval_beta_grid.py --run_batch_name "record_$1" --all --cpu_n "$(nproc)" >&2
    python plot_eval.py --run_batch_name "record_$1" >&2
    echo "$begin $(date +%s)" | awk '{ printf "%.2f", ($2 - $1) / 3600 }'
}

few=$(map 7)
many=$(map 21)
python train.py $settings --beta_y 0.1 1 10 --beta_z 0.1 1 10 --optimizer muon --lr_schedule tail \
    --run_batch_name record_7 >&2
python eval_beta_grid.py --run_batch_name record_7 --exclude_mi --exclude_fid >&2
told=$(python plot_eval.py --run_batch_name record_7 | tr '\n' ' ' | sed -E \
    's/.*separately trained ones[^:]*: loss ([^ ]*) nats on average, [^ ]* to ([^;]*);.*nats\^2 \(([0-9]* %)\).*/\1 | \2 | \3/')
device=$(python -c "import torch; from utils.benchmark.step import machine
print(machine(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))")
echo "| $(date +%F) | $(git rev-parse --short HEAD) | $device | $few | $many | $told |"

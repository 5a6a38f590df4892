#!/usr/bin/env bash
# Prints a row of README's record: hours from the command to an evaluated map of 49 and of 441 cells of FashionMNIST,
# and how far its cells are behind separate trainings by the same optimiser, which are trained after it, untimed.
#
#   docs/record.sh                   in README's environment, on an idle machine: about three hours of two cores
#   docs/record.sh Digits 60 3 5     maps of 3 x 3 and 5 x 5 cells of another data set, trained for 60 epochs; odd
#                                    numbers, so that betas of 1 are among them
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-FashionMNIST} epochs=${2:-16} axes=("${@:3}") hours=
[ ${#axes[@]} -gt 0 ] || axes=(7 21)
first=record_${data}_${axes[0]}
for n in "${axes[@]}"; do
    if [ -e "runs/record_${data}_$n" ]; then
        echo "runs/record_${data}_$n: is there already, and what is repeated takes no time: move it away" >&2
        exit 2
    fi
done
train=(python train.py --dataset "$data" --num_epochs "$epochs")
python train_classifier.py --dataset "$data" --seed 2 3 4
for n in "${axes[@]}"; do
    start=$(date +%s)
    "${train[@]}" --beta_y "0.1:10:$n" --beta_z "0.1:10:$n" --multi_rate --run_batch_name "record_${data}_$n"
    python eval_beta_grid.py --run_batch_name "record_${data}_$n" --all --cpu_n "$(nproc)"
    hours+=" $(python -c "import time; print(f'{(time.time() - $start) / 3600:.2f}')") |"
    echo "hours to the evaluated map: $hours"
done
"${train[@]}" --beta_y 0.1 1 10 --beta_z 0.1 1 10 --optimizer muon --lr_schedule tail --run_batch_name "$first"
python eval_beta_grid.py --run_batch_name "$first" --exclude_mi --exclude_fid
python - "$first" "$hours" << 'END'
import sys
from pathlib import Path

from utils.files import read_json
from utils.plane.excess import areas, excess_rows, share
from utils.plane.reading import read_plane

plane = read_plane(Path("runs", sys.argv[1], "eval_results.csv"))
cell = plane.cells[0]
device = read_json(plane.folder / cell.runs[0] / "training.json")["sessions"][-1]["device"]
excess = [row["excess"] for row in excess_rows(plane)]
((area, of_separate),) = areas(plane).values()
row = f"| {cell.settings.get('date')} | {cell.settings.get('commit')} | {device} |{sys.argv[2]}"
print(f"{row} {sum(excess) / len(excess):+.1f} | {max(excess):+.1f} | {share(area, of_separate)} |")
END

#!/bin/sh
# The study of twenty classes: ten settings, all of one seed before the next seed. Rerun the same command to resume.
#   scripts/study.sh [--dry-run] [FLAG...]    flags of main.py for every run, e.g. --data_path CIFAR
# Environment: SEEDS ("1 2 3"), JOBS runs at a time (1), EPOCHS (60; the learning rate drops at 1/2 and 3/4 of them),
# EXPERIMENTS (experiments/study), PYTHON (python3). A failed run stops no other; the exit status is then 123.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # on any machine, so that runs of different machines belong together
epochs=${EPOCHS:-60} seeds=${SEEDS:-1 2 3}
for number in "$epochs" $seeds; do
    case $number in 0?* | *[!0-9]*) echo "study.sh: '$number' is not a whole number" >&2 && exit 2 ;; esac
done
case $seeds in *[0-9]*) ;; *) echo "study.sh: SEEDS names no seed" >&2 && exit 2 ;; esac
[ "$epochs" -ge 2 ] || { echo "study.sh: EPOCHS is $epochs: too few for two drops of the learning rate" >&2 && exit 2; }
run='"$@" || { echo "FAILED: $*" >&2; exit 1; }'
if [ "${1-}" = --dry-run ]; then
    run='echo "$*"'
    shift
fi

for seed in $seeds; do # a name, and what the setting adds
    while read -r name flags; do
        echo "--run_name ${name}_seed$seed $flags --seed $seed"
    done <<SETTINGS
baseline
BYOT --BYOT
DML --DML
PSKD --PSKD
PSKD+BYOT --PSKD --BYOT
PSKD+DML --PSKD --DML
BYOT+DML --BYOT --DML
PSKD+BYOT+DML --PSKD --BYOT --DML
label_smoothing --label_smoothing 0.1
deep_supervision --BYOT --alpha 0 --beta 0
SETTINGS
done | xargs -L 1 -P "${JOBS:-1}" sh -c "$run" sh "${PYTHON:-python3}" main.py --data_type cifar100 --classes 20 \
    --val_split 0.1 --width 16 --precision fp32 --save_predictions --end_epoch "$epochs" \
    --lr_decay_schedule $(((epochs + 1) / 2)) $(((3 * epochs + 3) / 4)) \
    --experiments_dir "${EXPERIMENTS:-experiments/study}" "$@"

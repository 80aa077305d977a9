#!/bin/sh
# The study of twenty classes: ten settings, all of one seed before the next seed. Rerun the same command to resume.
#   scripts/study.sh [--dry-run] [FLAG...]    flags of main.py for every run, e.g. --data_path CIFAR
# Environment: SEEDS ("1 2 3"), EPOCHS (60), EXPERIMENTS (experiments/study); the rest as scripts/table1.sh --help says.
set -eu
export SEEDS="${SEEDS:-1 2 3}" EPOCHS="${EPOCHS:-60}" EXPERIMENTS="${EXPERIMENTS:-experiments/study}"
export OMP_NUM_THREADS=1 # on any machine, so that runs of different machines belong together
dry_run=
if [ "${1-}" = --dry-run ]; then
    dry_run=$1
    shift
fi
exec "${PYTHON:-python3}" "$(dirname "$0")/train_table.py" study $dry_run -- --data_type cifar100 --classes 20 \
    --val_split 0.1 --width 16 --precision fp32 --save_predictions "$@"

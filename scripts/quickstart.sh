#!/usr/bin/env bash
# The main job in small, from nothing: a virtual environment, two epochs on the synthetic images, the results table.
# Environment: VENV (.venv) where the virtual environment goes, PYTHON (python3) what makes it. Flags are main.py's.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
echo "installing into $venv: PyTorch is some gigabytes and takes minutes the first time"
"$venv/bin/python" -m pip install --quiet --requirement requirements.txt
echo "training; a CPU takes a minute or two an epoch"
"$venv/bin/python" main.py --PSKD --BYOT --DML --data_type synthetic --end_epoch 2 \
    --width 16 --lr_decay_schedule 1 --run_name quickstart "$@"
echo "for the commands above and in the README: source $venv/bin/activate"

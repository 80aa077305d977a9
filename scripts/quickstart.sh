#!/usr/bin/env bash
# A small run from nothing: a virtual environment, three epochs on the synthetic images, the results table.
# Environment: VENV (.venv) is the virtual environment, PYTHON (python3) the interpreter that makes it. Flags are
# main.py's.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
echo "installing into $venv; PyTorch is some gigabytes and takes minutes the first time"
"$venv/bin/python" -m pip install --disable-pip-version-check --requirement requirements.txt
echo "training; one to five minutes on a CPU"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # more threads wait for each other: much slower where the machine is busy
"$venv/bin/python" main.py --PSKD --BYOT --DML --data_type synthetic --limit_train 5000 --end_epoch 3 \
    --width 16 --run_name quickstart "$@"
echo "for the commands above and in the README: source $venv/bin/activate"

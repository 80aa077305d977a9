#!/usr/bin/env bash
# The tests from nothing: a virtual environment with what they need, then pytest.
#
#   bash scripts/test.sh                  all tests
#   bash scripts/test.sh -m "not slow"    without those that take longest; any other flag of pytest may be given too
#
# Environment: VENV (.venv) is the virtual environment, PYTHON (python3) the interpreter that makes it.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
echo "installing into $venv; PyTorch is some gigabytes and takes minutes the first time"
"$venv/bin/python" -m pip install --disable-pip-version-check --requirement requirements.txt \
    --requirement tests/requirements.txt --requirement scripts/requirements.txt
# Files in their order: by number of tests, as otherwise, the golden training runs begin last and alone.
exec "$venv/bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

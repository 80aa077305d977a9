#!/bin/sh
# Kills a small run at random moments, as often as asked (torture.sh 50), and checks that nothing is lost.
# --help explains the rest.
set -eu
export OMP_NUM_THREADS=1
exec "${PYTHON:-python}" "$(dirname "$0")/torture.py" "$@"

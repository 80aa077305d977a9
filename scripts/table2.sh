#!/bin/sh
# Table 2: every classifier's accuracy (rows 1-6), from the runs of Table 1's rows 1, 8, 9, 16, 17 and 24.
# --help explains the rest.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/train_table.py" 2 "$@"

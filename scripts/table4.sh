#!/bin/sh
# Table 4: N = 4, 3, 2 backbone blocks (rows 1-3); N = 4 is Table 1's row 8.
# --help explains the rest.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/train_table.py" 4 "$@"

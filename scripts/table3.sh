#!/bin/sh
# Table 3: self-distillation from block k = 1, 2, 3 on (rows 1-3); k = 1 is Table 1's row 8.
# --help explains the rest.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/train_table.py" 3 "$@"

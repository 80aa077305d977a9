#!/bin/sh
# Table 1: three networks, each with the eight combinations of PSKD, BYOT and DML (rows 1-24).
# --help explains the rest.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/train_table.py" 1 "$@"

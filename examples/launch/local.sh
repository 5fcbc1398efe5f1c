#!/usr/bin/env bash
# One node, by `deepspeed`.
#
#     RANKS=2 examples/launch/local.sh steps=50 embedding=vocab_sharded
#
# Needs: an active environment with `pip install '.[train]'`.
# Without it: "exec: deepspeed: not found"
set -euo pipefail

exec deepspeed --num_gpus "${RANKS:-2}" --master_port "${MASTER_PORT:-29500}" \
    "${SCRIPT:-examples/train_lm.py}" "$@"

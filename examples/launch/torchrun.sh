#!/usr/bin/env bash
# Several nodes, the same command on each, by torchrun and its c10d rendezvous. Which node has rank
# 0 is decided by the rendezvous.
#
#     NODES=2 MASTER_ADDR=node1 RANKS=8 examples/launch/torchrun.sh tp_size=8   # on each node
#
# RANKS is of each node. MASTER_ADDR is the node where they meet.
#
# Needs: on each node, the environment in which `pip install '.[train]'` was run, active; and a
# directory that all nodes share.
# Without it: "exec: torchrun: not found"
# Without a node: "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError"
set -euo pipefail

: "${MASTER_ADDR:?must be the name of the node where the nodes meet}"
# `torchrun` sets it to 1 if it is missing, and says so.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-2}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" \
    --rdzv-id "${RUN:-tp_embed}" --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-600}" \
    "${SCRIPT:-examples/train_lm.py}" "$@"

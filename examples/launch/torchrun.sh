#!/usr/bin/env bash
# Several nodes, the same command on each, by torchrun and its c10d rendezvous, which decides the
# node of rank 0.
#
#     NODES=2 MASTER_ADDR=node1 RANKS=8 examples/launch/torchrun.sh tp_size=8   # on each node
#
# RANKS is per node. MASTER_ADDR is the node where the nodes meet.
#
# Needs: on each node, an active environment with `pip install '.[train]'`; and a directory that all
# nodes share.
# Without it: "exec: torchrun: not found"
# Without a node: "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError"
set -euo pipefail

: "${MASTER_ADDR:?must be the name of the node where the nodes meet}"
# Without it, `torchrun` sets it to 1 and warns.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-2}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" \
    --rdzv-id "${RUN:-tp_embed}" --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-600}" \
    "${SCRIPT:-examples/train_lm.py}" "$@"

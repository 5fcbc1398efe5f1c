#!/usr/bin/env bash
# Several nodes, one command on each, by `deepspeed --no_ssh`: for clusters that start the commands
# themselves.
#
#     HOSTS="node1 node2" NODE_RANK=0 RANKS=8 examples/launch/no_ssh.sh tp_size=8   # on node1
#     HOSTS="node1 node2" NODE_RANK=1 RANKS=8 examples/launch/no_ssh.sh tp_size=8   # on node2
#
# RANKS is per node. HOSTS and the overrides must be the same on all nodes.
#
# Needs: on each node, an active environment with `pip install '.[train]'`; and a directory that all
# nodes share.
# Without it: "deepspeed: command not found"
# Without NODE_RANK: "NODE_RANK: must be the index of this node in HOSTS"
set -euo pipefail

read -ra hosts <<<"${HOSTS:?must be the names of the nodes, such as \"node1 node2\"}"
: "${NODE_RANK:?must be the index of this node in HOSTS}"
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
printf "%s slots=${RANKS:-2}\n" "${hosts[@]}" >"$hostfile"

deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "${MASTER_PORT:-29500}" \
    "${SCRIPT:-examples/train_lm.py}" "$@"

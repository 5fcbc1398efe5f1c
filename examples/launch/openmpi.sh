#!/usr/bin/env bash
# One node or several, by Open MPI's mpirun. The ranks do not use MPI or mpi4py: they read their
# places from mpirun's environment variables.
#
#     HOSTS="node1 node2" RANKS=8 IFNAME=eth0 examples/launch/openmpi.sh tp_size=8
#
# RANKS is per node. IFNAME is the network interface between the nodes, with the same name on all.
# `deepspeed --hostfile FILE --launcher openmpi` starts the same mpirun, and needs
# `--launcher_args "--mca btl_tcp_if_include IFNAME"` if the interface is not eth0.
#
# Needs: Open MPI on all nodes (apt-get install openmpi-bin); for several nodes, passwordless ssh
# from this node to the others, and this directory and the environment under the same paths.
# Without it: "exec: mpirun: not found"; by `deepspeed`: "RuntimeError: launcher 'openmpi' not
# installed."
set -euo pipefail

read -ra hosts <<<"${HOSTS:-localhost}"
ranks=${RANKS:-2}
slots=$(printf ",%s:$ranks" "${hosts[@]}")
options=(-x PATH -x OMP_NUM_THREADS)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if ((${#hosts[@]} > 1)); then
    export MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"
fi
if [[ -n "${IFNAME:-}" ]]; then
    export GLOO_SOCKET_IFNAME="$IFNAME" NCCL_SOCKET_IFNAME="$IFNAME"
    options+=(--mca oob_tcp_if_include "$IFNAME")
fi
for name in DS_ACCELERATOR GLOO_SOCKET_IFNAME MASTER_ADDR MASTER_PORT NCCL_SOCKET_IFNAME \
    TORCH_EXTENSIONS_DIR TP_EMBED_RUN_ID; do
    if [[ -n "${!name:-}" ]]; then options+=(-x "$name"); fi
done

# --bind-to none, since mpirun would give each rank only one or two cores.
exec mpirun -n "$((ranks * ${#hosts[@]}))" --host "${slots#,}" --bind-to none "${options[@]}" \
    python "${SCRIPT:-examples/train_lm.py}" "$@"

#!/usr/bin/env bash
# Several nodes, started from one of them by `deepspeed` over pdsh and ssh.
#
#     HOSTS="node1 node2" RANKS=8 IFNAME=eth0 examples/launch/pdsh.sh tp_size=8
#
# RANKS is per node. IFNAME is the network interface between the nodes, with the same name on all.
# Rank 0 listens on the first host, so all nodes must reach its address.
#
# Needs: pdsh on this node (apt-get install pdsh); passwordless ssh from this node to all nodes,
# including itself; and this directory and the environment under the same paths on all.
# Without pdsh: "RuntimeError: launcher 'pdsh' not installed."
# Without ssh: "RuntimeError: Using hostfile at ... but host=node1 was not reachable via ssh."
set -euo pipefail

read -ra hosts <<<"${HOSTS:?must be the names of the nodes, such as \"node1 node2\"}"
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
printf "%s slots=${RANKS:-2}\n" "${hosts[@]}" >"$directory/hostfile"

# The environment that DeepSpeed sets on the nodes. From this shell it passes only NCCL_*, PYTHON*
# and a few more. Keeps the entries of `.deepspeed_env` at home or here. PATH is for `ninja` and
# `nvcc`, which compile DeepSpeed's operators.
env_file="$directory/env"
{
    grep -hs = ~/".deepspeed_env" "${DS_ENV_FILE:-.deepspeed_env}" || true
    printf 'PATH=%q\n' "$PATH"
    echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
    if [[ -n "${IFNAME:-}" ]]; then
        echo "GLOO_SOCKET_IFNAME=$IFNAME"
        echo "NCCL_SOCKET_IFNAME=$IFNAME"
    fi
    for name in DS_ACCELERATOR TORCH_EXTENSIONS_DIR TP_EMBED_RUN_ID; do
        if [[ -n "${!name:-}" ]]; then echo "$name=${!name}"; fi
    done
} >"$env_file"

# The shells of the nodes parse the arguments again. DeepSpeed puts double quotes around arguments
# with a space.
arguments=()
for argument in "$@"; do
    if [[ "$argument" == *" "* ]]; then
        arguments+=("$(printf %s "$argument" | sed 's/[\\$`]/\\&/g')")
    else
        arguments+=("$(printf %q "$argument")")
    fi
done

# --force_multi, to do the same with one host.
DS_ENV_FILE="$env_file" deepspeed --hostfile "$directory/hostfile" --force_multi \
    --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "${MASTER_PORT:-29500}" \
    "${SCRIPT:-examples/train_lm.py}" "${arguments[@]}"

#!/usr/bin/env bash
# A sweep with a Slurm job for each run, submitted by Hydra. Waits for the jobs.
#
#     NODES=2 RANKS=8 examples/launch/submitit.sh tp_size=8 embedding=sharded,vocab_sharded
#
# RANKS is per node. More Slurm options: `hydra.launcher.partition=...`,
# `hydra.launcher.gpus_per_node=8`, `hydra.launcher.timeout_min=120`, and others that
# `examples/launch/submitit.sh --cfg hydra --package hydra.launcher` shows.
#
# Needs: Slurm, and the plugin of Hydra: pip install '.[train,slurm]'; and a directory that all nodes
# share. Start it there.
# Without the plugin: "hydra/launcher/submitit_slurm is a plugin of Hydra: pip install
# 'tp-embed[slurm]'"
# Without Slurm: "RuntimeError: Could not detect "srun", are you indeed on a slurm cluster?"
set -euo pipefail

script="${SCRIPT:-examples/train_lm.py}"
# The jobs import modules next to the script, but do not run it as a script.
PYTHONPATH="$(cd "$(dirname "$script")" && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

exec python "$script" launcher=submitit_slurm \
    hydra.launcher.nodes="${NODES:-1}" hydra.launcher.tasks_per_node="${RANKS:-2}" "$@"

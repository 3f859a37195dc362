#!/usr/bin/env bash
# Trains a config on one node or several:
#
#   sbatch slurm/train.sh config.yaml
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 slurm/train.sh config.yaml --lr 1e-4
#   phalanx submit config.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00      (checks it first)
#
# Resources come from the lines below or from sbatch's flags (flags win). Put what your site needs (modules, a
# virtual environment, network interfaces) into slurm/site.env: copy slurm/site.env.example.
#SBATCH --job-name=phalanx
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=phalanx-%j.out
#SBATCH --open-mode=append
# SLURM warns the ranks before the time limit: they save, the job is requeued, and it resumes later.
#SBATCH --signal=USR1@180
#SBATCH --requeue

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# These lines are the same in train.sh, array.sh and evaluate.sh: sbatch runs a copy of the script from its spool
# folder, so the script cannot source a file next to it, and phalanx is on the PATH only after the site file. A
# test (tests/slurm) checks that the three are equal.

site=${PHALANX_SITE_ENV:-slurm/site.env}
if [ -f "$site" ]; then
    # shellcheck source=/dev/null
    source "$site"
fi
# From 22.05 on, srun ignores sbatch's --cpus-per-task. Where it binds tasks, it binds them to one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# One task on each node starts the ranks of that node. Rank, address and port are read inside the task, because here
# they would be the same on every node. The tasks restart failed ranks together, so a task that ends early must not
# end the others (--kill-on-bad-exit=0). srun returns the highest of their exit codes.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=0 phalanx train "$@"

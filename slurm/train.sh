#!/usr/bin/env bash
# Trains a config on one node or several:
#
#   sbatch slurm/train.sh config.yaml
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 slurm/train.sh config.yaml --lr 1e-4
#   phalanx submit config.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00      (checks it before)
#
# Resources come from the lines below or from sbatch's flags (they win). What your site needs (modules, a virtual
# environment, network interfaces) stands in slurm/site.env: copy slurm/site.env.example.
#SBATCH --job-name=phalanx
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=phalanx-%j.out
#SBATCH --open-mode=append
# Before the time limit the ranks are warned: they save, and the job goes back into the queue and goes on later.
#SBATCH --signal=USR1@180
#SBATCH --requeue

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# These lines are in train.sh, array.sh and evaluate.sh alike: sbatch runs a copy of the script from its spool
# folder, so it can source no file next to it, and phalanx is on the PATH only after the site file. A test
# (tests/slurm) holds the three equal.

site=${PHALANX_SITE_ENV:-slurm/site.env}
if [ -f "$site" ]; then
    # shellcheck source=/dev/null
    source "$site"
fi
# From 22.05 on srun does not take sbatch's --cpus-per-task over, and where it binds tasks, binds them to one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# One task on each node starts the ranks of that node. Rank, address and port are read inside the task: here they
# would be the same on every node. The tasks restart failed ranks among themselves, so one that ends early is no
# reason to end the others (--kill-on-bad-exit=0); of their exit codes srun gives the highest.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=0 phalanx train "$@"

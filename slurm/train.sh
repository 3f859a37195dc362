#!/usr/bin/env bash
# Trains a config on one node or several:
#
#   sbatch slurm/train.sh config.yaml
#   sbatch --nodes=2 --gpus-per-node=8 --time=12:00:00 slurm/train.sh config.yaml --lr 1e-4
#
# Resources come from the lines below or from sbatch's flags (they win). What your site needs (modules, a virtual
# environment, network interfaces) stands in slurm/site.env: copy slurm/site.env.example.
#SBATCH --job-name=phalanx
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=phalanx-%j.out
#SBATCH --open-mode=append

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

site=${PHALANX_SITE_ENV:-slurm/site.env}
if [ -f "$site" ]; then
    # shellcheck source=/dev/null
    source "$site"
fi

# One task on each node starts the ranks of that node. Rank, address and port are read inside the task: here they
# would be the same on every node. If one node fails, srun ends the others; its exit code is the job's.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 phalanx train "$@"

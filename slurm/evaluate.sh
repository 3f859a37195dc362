#!/usr/bin/env bash
# Evaluates the final model of a run with lm-eval, when its job has ended well:
#
#   job=$(phalanx submit config.yaml --parsable)
#   sbatch --dependency=afterok:$job slurm/evaluate.sh my-run --tasks arc_easy,hellaswag
#SBATCH --job-name=phalanx-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=phalanx-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# If that job fails, this one is not needed, and does not wait for ever.
#SBATCH --kill-on-invalid-dep=yes

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

exec srun --ntasks-per-node=1 phalanx evaluate "$@"

#!/usr/bin/env bash
# Evaluates the final model of a run with lm-eval, after its job has succeeded:
#
#   job=$(phalanx submit config.yaml --parsable)
#   sbatch --dependency=afterok:$job slurm/evaluate.sh my-run --tasks arc_easy,hellaswag
#SBATCH --job-name=phalanx-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=phalanx-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# If that job fails, this one is cancelled instead of waiting forever.
#SBATCH --kill-on-invalid-dep=yes

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

exec srun --ntasks-per-node=1 phalanx evaluate "$@"

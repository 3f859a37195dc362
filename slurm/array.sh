#!/usr/bin/env bash
# Trains many runs, each as a task of one array. Every line of the list has the flags of one run, as words without
# quotes. The arguments after the list are the same for all runs:
#
#   sbatch --array=1-3%2 slurm/array.sh sweep.txt config.yaml
#   phalanx submit config.yaml --array sweep.txt%2                              (checks every line first)
#
#   sweep.txt:  --lr 1e-4 --project-name low
#               --lr 3e-4 --project-name middle
#               --lr 1e-3 --project-name high
#
# A line may also begin with its own config; then no config follows the list.
#SBATCH --job-name=phalanx
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=phalanx-%A_%a.out
#SBATCH --open-mode=append
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

list=$1
shift
mapfile -t lines <"$list"
if [ "$SLURM_ARRAY_TASK_ID" -lt 1 ] || [ "$SLURM_ARRAY_TASK_ID" -gt "${#lines[@]}" ]; then
    echo "error: $list has lines 1 to ${#lines[@]}, and this is task $SLURM_ARRAY_TASK_ID" >&2
    exit 2
fi
read -r -a own <<<"${lines[SLURM_ARRAY_TASK_ID - 1]}"
if [[ ${own[0]-} != -* ]]; then # the line begins with its config
    set -- "${own[@]:0:1}" "$@"
    own=("${own[@]:1}")
fi
exec srun --ntasks-per-node=1 --kill-on-bad-exit=0 phalanx train "$@" "${own[@]}"

"""SLURM: what a run asks for, the job it runs in, and the jobs it had."""

"""SLURM: the resources that a run requests, the job that it runs in, and its earlier jobs."""

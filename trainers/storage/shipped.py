"""Paths of the shipped files. They are next to the packages, both in a checkout and in site-packages."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[2]
ACCELERATE_CONFIGS = SHIPPED / "accelerate_configs"
DEEPSPEED_CONFIGS = SHIPPED / "deepspeed_configs"
SLURM_SCRIPTS = SHIPPED / "slurm"

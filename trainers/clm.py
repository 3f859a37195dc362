"""Generic language modelling (AutoTrain's `default`). By default the loss is on all tokens.

accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m trainers.clm config.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainers.loop.life import run
from trainers.sft import build  # the same loss; only the samples are prepared differently


def main(argv: Sequence[str] | None = None) -> int:
    return run("default", build, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Let the workers of torch's data loaders outlive a signal that goes to all processes of a job."""

from __future__ import annotations

import signal

from trainers.rank.library_patches import replace_in
from trainers.rank.signals import do_nothing


def keep_workers() -> None:
    """Let the workers do nothing on SIGTERM. Call it before a data loader starts one.

    A scheduler sends SIGTERM to all processes of a job. The rank then saves at the end of the step, and needs
    its workers until there. torch's handler in a worker obeys everyone, so the rank's handler comes after it.

    At the end torch asks the workers to end, by a message. It sends SIGTERM only to one that does not, so
    this becomes SIGKILL.
    """
    import torch.multiprocessing
    import torch.utils.data._utils.signal_handling as signal_handling

    class Worker(torch.multiprocessing.Process):
        def terminate(self) -> None:
            self.kill()

    def handle_and_outlive() -> None:
        of_torch()
        signal.signal(signal.SIGTERM, do_nothing)

    of_torch = replace_in(signal_handling, "_set_worker_signal_handlers", handle_and_outlive)
    replace_in(torch.multiprocessing, "Process", Worker)

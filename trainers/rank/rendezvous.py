"""Create the rendezvous store of the ranks, which listens only on loopback if all ranks are on one machine.

torch's own store listens on every interface, without authentication. A second store of one process on the
same port shares the server of the first (multi_tenant), so this store must exist before the process group.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING

from trainers.rank.process import rank, world_size

if TYPE_CHECKING:
    from torch.distributed import TCPStore


def meet_on_loopback() -> TCPStore | None:
    """Create the store for the process group. Keep the result until the group exists.

    Returns None if another process creates the store (rank 0, or torchrun's agent), if the ranks are on
    several machines, or if the port is taken (torch reports that error).
    """
    if rank() != 0 or world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "False":
        return None
    if os.environ["GROUP_WORLD_SIZE"] != "1":  # a machine's own name may resolve to its loopback
        return None
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        return None
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        return None
    listener.listen()
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )

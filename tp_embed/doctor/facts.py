"""What a rank sees of itself and its node."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from pathlib import Path

from tp_embed.launch.environment import Place

from . import agreement, locks, machine, network, versions
from .job import Facts


def look(place: Place, config: str | None) -> Facts:
    """What this process sees, a part for each topic, as JSON can hold it.

    :param config: a file that should be the same on all ranks.
    """
    return {
        "place": asdict(place),
        "node": {"host": socket.gethostname(), "key": _node_key()},
        "versions": versions.look(),
        "locks": locks.look(),
        "machine": machine.look(),
        "network": network.look(place.master_addr),
        "agreement": agreement.look(config),
    }


def _node_key() -> str:
    """What two processes have in common if they see the same network, as containers may not."""
    try:
        network_namespace = os.readlink("/proc/self/ns/net")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{boot} {network_namespace}"

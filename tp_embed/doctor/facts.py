"""Collects facts about a rank and its node."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from pathlib import Path

from tp_embed.launch.environment import Place

from . import agreement, locks, machine, network, versions
from .job import Facts


def look(place: Place, config: str | None) -> Facts:
    """Collects facts about this process, by topic, as JSON values.

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
    """Returns a key that identifies the network this process sees. Containers may differ."""
    try:
        network_namespace = os.readlink("/proc/self/ns/net")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{boot} {network_namespace}"

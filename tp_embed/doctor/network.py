"""Checks the network as a rank sees it: interfaces, names, and the address given to others."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, cast

from .findings import Finding
from .job import Job

_SIOCGIFFLAGS, _SIOCGIFADDR = 0x8913, 0x8915  # linux/sockios.h
_UP, _LOOPBACK = 0x1, 0x8  # linux/if.h

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def look(master_addr: str | None) -> dict[str, Any]:
    """Collects the interfaces of this node, and the addresses that names resolve to."""
    return {
        "interfaces": interfaces(),
        "host_address": _resolve(socket.gethostname()),
        "master": master_addr,
        "master_address": _resolve(master_addr) if master_addr else None,
        "source_address": _source_address(master_addr) if master_addr else None,
        GLOO: os.environ.get(GLOO),
        NCCL: os.environ.get(NCCL),
    }


def interfaces() -> dict[str, dict[str, Any]]:
    """Returns each interface of this node, with its IPv4 address or ``None``, and its flags."""
    found: dict[str, dict[str, Any]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                (flags,) = struct.unpack_from("H", fcntl.ioctl(s, _SIOCGIFFLAGS, request), 16)
            except OSError:
                continue
            try:
                address = socket.inet_ntoa(fcntl.ioctl(s, _SIOCGIFADDR, request)[20:24])
            except OSError:
                address = None
            found[name] = {
                "address": address,
                "up": bool(flags & _UP),
                "loopback": bool(flags & _LOOPBACK),
            }
    return found


def address_of(part: Mapping[str, Any]) -> str | None:
    """Returns the address where others reach a rank: gloo's, or the source address of packets to
    rank 0."""
    for name in (part[GLOO] or "").split(","):
        if name in part["interfaces"]:
            return cast(str | None, part["interfaces"][name]["address"])
    host = part["host_address"]
    if _is_own(part, host) and not _is_loopback(host):
        return str(host)
    return cast(str | None, part["source_address"] or host)


def judge(job: Job) -> Iterator[Finding]:
    """Yields findings on names, addresses and interfaces."""
    parts = job.part("network")
    several = len(job.nodes) > 1
    for rank, part in parts.items():
        yield from _judge_names(rank, part, several, job.part("machine")[rank]["device"])
        if several and not part[GLOO]:
            yield from _judge_host(rank, part)
    yield from _judge_master(job, parts)
    if several:
        shown = ", ".join(f"{node} {_shown(parts[ranks[0]])}" for node, ranks in job.nodes.items())
        yield Finding("ok", "network", f"{len(job.nodes)} nodes: {shown}", tuple(parts))


def _judge_names(
    rank: int, part: Mapping[str, Any], several: bool, device: str
) -> Iterator[Finding]:
    """Yields findings on the interfaces named in the environment."""
    there: Mapping[str, Any] = part["interfaces"]
    usable = [name for name, each in there.items() if _is_usable(each)]
    named = {GLOO: _gloo_names(part[GLOO]), NCCL: _nccl_names(part[NCCL], there)}
    for variable, names in named.items():
        fix = (
            f"set {variable} to a usable interface: {', '.join(usable) or 'there is none'}"
            " (with `deepspeed`, in `.deepspeed_env`)"
        )
        level: Any = "note" if variable == NCCL and device == "cpu" else "error"
        for name in names:
            if name not in there:
                what = f"{variable} names {name}, which is no interface of the node"
            elif not there[name]["up"] or there[name]["address"] is None:
                state = "down" if not there[name]["up"] else "without an IPv4 address"
                what = f"{variable} names {name}, which is {state}"
            elif several and there[name]["loopback"]:
                what = f"{variable} names {name}, which reaches no other node"
            else:
                continue
            yield Finding(level, "network", what, (rank,), fix)
    if several and device != "cpu" and not part[NCCL] and len(usable) > 1:
        yield Finding(
            "note",
            "network",
            f"NCCL chooses among {', '.join(usable)} by itself",
            (rank,),
            f"set {NCCL} if it chooses a slow one",
        )


def _judge_host(rank: int, part: Mapping[str, Any]) -> Iterator[Finding]:
    """Yields findings on the address that gloo gives to others if no interface is named."""
    address = part["host_address"]
    if address is None:
        what = "the node cannot resolve its own host name, so gloo uses the loopback"
    elif _is_loopback(address):
        what = f"the host name resolves to {address}, which gloo gives to the other nodes"
    elif not _is_own(part, address):
        what = f"the host name resolves to {address}, which is no address of the node"
    else:
        return
    to_master = [
        name
        for name, each in part["interfaces"].items()
        if each["address"] == part["source_address"] and not each["loopback"]
    ]
    yield Finding(
        "error",
        "network",
        what,
        (rank,),
        f"{GLOO}={(to_master or ['the interface to the other nodes'])[0]} in the environment of "
        "all ranks (with `deepspeed`, in `.deepspeed_env`), or correct /etc/hosts",
    )


def _judge_master(job: Job, parts: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    """Checks that the master address is an address of rank 0's node."""
    first = parts[0]
    address = first["master_address"]
    if len(parts) > 1 and address and not _is_own(first, address):
        yield Finding(
            "warning",
            "network",
            f"the master address {first['master']} is {address}, which is no address of the node "
            "of rank 0",
            (0,),
            "set it to an address of the node of rank 0, unless it is forwarded there",
        )


def _shown(part: Mapping[str, Any]) -> str:
    address = address_of(part)
    names = [name for name, each in part["interfaces"].items() if each["address"] == address]
    return f"{address}{f' ({names[0]})' if names else ''}"


def _gloo_names(value: str | None) -> list[str]:
    return [name for name in (value or "").split(",") if name]


def _nccl_names(value: str | None, there: Mapping[str, Any]) -> list[str]:
    """Returns the named interfaces. NCCL takes prefixes, ``=`` for exact names, and ``^`` for
    exclusion, where this returns nothing."""
    if not value or value.startswith("^"):
        return []
    names = value.removeprefix("=").split(",")
    if value.startswith("="):
        return names
    return [next((name for name in there if name.startswith(start)), start) for start in names]


def _is_usable(interface: Mapping[str, Any]) -> bool:
    return bool(interface["up"] and interface["address"] and not interface["loopback"])


def _is_loopback(address: str | None) -> bool:
    return bool(address and address.startswith("127."))


def _is_own(part: Mapping[str, Any], address: str | None) -> bool:
    return _is_loopback(address) or any(
        each["address"] == address for each in part["interfaces"].values()
    )


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _source_address(target: str) -> str | None:
    """Returns the source address of packets to ``target``, without sending any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((target, 9))
        except OSError:
            return None
        return str(s.getsockname()[0])

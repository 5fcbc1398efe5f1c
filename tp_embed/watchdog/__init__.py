"""Ends a distributed job when a process is missing, and names it.

Without it, ranks wait for a stopped or disconnected rank until the timeout of their process group,
10 to 30 minutes, and the error only names a socket. With a watchdog, a thread in each process sends
heartbeats to rank 0 over its own connection, and learns there about all other ranks. It needs only
Python's standard library and torch.
"""

from .member import EXIT_CODE, Watchdog, watch

__all__ = ["EXIT_CODE", "Watchdog", "watch"]

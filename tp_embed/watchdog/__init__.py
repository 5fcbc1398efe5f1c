"""Ends a job of many processes when one of them is missing, and says which.

Left alone, the ranks of a job wait for one that is stopped or cut off until the timeout of their
process group, 10 to 30 minutes, and learn the address of a socket. With a watchdog, each process
has a thread that gives signs of life to rank 0 over a connection of its own, and hears of all
others from there. It needs nothing but Python's standard library and torch.
"""

from .member import EXIT_CODE, Watchdog, watch

__all__ = ["EXIT_CODE", "Watchdog", "watch"]

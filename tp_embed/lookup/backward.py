"""Queries autograd about the running backward."""

from __future__ import annotations

import torch

from tp_embed._torch_private import current_graph_task_id, keeps_graph


def is_running() -> bool:
    """Returns whether this thread is running a backward."""
    return current_graph_task_id() != -1


def is_needed_again() -> bool:
    """Returns whether the backward may run again (``retain_graph=True``) or hasn't started."""
    if torch.compiler.is_compiling():
        return True  # Not known yet.
    return not is_running() or keeps_graph()

"""What autograd says of the backward that runs."""

from __future__ import annotations

import torch

from tp_embed._torch_private import current_graph_task_id, keeps_graph


def is_running() -> bool:
    """Whether this thread runs a backward."""
    return current_graph_task_id() != -1


def is_needed_again() -> bool:
    """Whether the backward that runs may run again (``retain_graph=True``), or none runs yet."""
    if torch.compiler.is_compiling():
        return True  # Not known yet.
    return not is_running() or keeps_graph()

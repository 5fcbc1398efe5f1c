"""A log of each rank, for Hydra's ``job_logging``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class RankFileHandler(logging.FileHandler):
    """A :class:`logging.FileHandler` that creates the directory of its file."""

    def __init__(self, filename: str, *args: Any, **kwargs: Any) -> None:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        super().__init__(filename, *args, **kwargs)


@contextmanager
def log_failure() -> Iterator[None]:
    """Writes an exception that ends the block to the log files of this process. Hydra prints it
    too, but among the output of other ranks."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            raise  # A normal exit.
        record = logging.getLogger(__name__).makeRecord(
            __name__, logging.ERROR, __file__, 0, "%s", (type(e).__name__,), sys.exc_info()
        )
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise

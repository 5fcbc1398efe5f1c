"""Runs the command ``tp-embed`` for ``python -m tp_embed``."""

from __future__ import annotations

from tp_embed.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Commands of ``tp-embed`` as Hydra apps."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from tp_embed import cli

from .app import main


def run_command(config_name: str, run: Callable[[DictConfig], int]) -> int:
    """Calls ``run`` with the named config and the overrides of the command line, once for each job
    of a sweep.

    :returns: the largest exit code, or the code for wrong usage if Hydra refused the overrides.
    """
    codes: list[int] = []
    running = False

    @main(config_path="pkg://tp_embed.configs", config_name=config_name)
    def app(config: DictConfig) -> None:
        nonlocal running
        running = True
        codes.append(run(config))
        running = False

    try:
        app()
    except SystemExit as e:
        if e.code == 1:  # From Hydra, which has printed the error.
            return cli.FAILED if running else cli.USAGE
        raise
    return max(codes, default=0)

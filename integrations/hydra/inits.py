"""The parameters of the functions of :mod:`tp_embed.nn.init`, for the group ``init``.

Not derived from the functions, since any Hydra app in an environment with this package may import
this module, and ``tp_embed.nn.init`` would import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class Fan(str, Enum):  # noqa: UP042 (OmegaConf compares `str(choice)`)
    """Which fan :func:`~tp_embed.nn.init.kaiming_normal` takes."""

    fan_in = "fan_in"
    fan_out = "fan_out"


class Nonlinearity(str, Enum):  # noqa: UP042
    """The nonlinearities that :func:`torch.nn.init.calculate_gain` knows."""

    linear = "linear"
    sigmoid = "sigmoid"
    tanh = "tanh"
    relu = "relu"
    leaky_relu = "leaky_relu"
    selu = "selu"


@dataclass
class Init:
    """A function without parameters."""

    _target_: str = MISSING
    _partial_: bool = MISSING


@dataclass
class Constant(Init):
    """The parameters of ``constant``."""

    value: float = MISSING


@dataclass
class Normal(Init):
    """The parameters of ``normal``."""

    mean: float = MISSING
    std: float = MISSING


@dataclass
class Uniform(Init):
    """The parameters of ``uniform``."""

    a: float = MISSING
    b: float = MISSING


@dataclass
class TruncNormal(Normal):
    """The parameters of ``trunc_normal``."""

    a: float = MISSING
    b: float = MISSING


@dataclass
class Xavier(Init):
    """The parameters of ``xavier_normal`` and ``xavier_uniform``."""

    gain: float = MISSING


@dataclass
class Kaiming(Init):
    """The parameters of ``kaiming_normal`` and ``kaiming_uniform``."""

    a: float = MISSING
    mode: Fan = MISSING
    nonlinearity: Nonlinearity = MISSING


@dataclass
class FromTensor(Init):
    """The parameters of ``from_tensor``."""

    source: str = MISSING
    key: str | None = None


INITS: dict[str, type[Init]] = {
    "constant": Constant,
    "from_tensor": FromTensor,
    "kaiming_normal": Kaiming,
    "kaiming_uniform": Kaiming,
    "normal": Normal,
    "scaled": Init,
    "trunc_normal": TruncNormal,
    "uniform": Uniform,
    "xavier_normal": Xavier,
    "xavier_uniform": Xavier,
    "zeros": Init,
}

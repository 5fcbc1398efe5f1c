"""DeepSpeed: a gang over its process groups, and the embedding classes as its layers.

DeepSpeed treats tables sharded over a :class:`DeepSpeedGang` as tensor-parallel layers: AutoTP
skips them, the gradient norm counts every shard once, the engine's consolidated state dict holds
whole tables, and universal checkpoints merge and cut them.
"""

from .checks import check_config
from .config import EmbedConfig, TableConfig
from .export import export
from .gang import DeepSpeedGang
from .initialize import initialize
from .install import install, uninstall
from .resize import resize_vocab
from .sequence import averages_over_sequence
from .table_optimizers import TableOptimizers
from .universal import to_universal
from .universal_load import load_universal

__all__ = [
    "DeepSpeedGang",
    "EmbedConfig",
    "TableConfig",
    "TableOptimizers",
    "averages_over_sequence",
    "check_config",
    "export",
    "initialize",
    "install",
    "load_universal",
    "resize_vocab",
    "to_universal",
    "uninstall",
]

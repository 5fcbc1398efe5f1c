"""Sharded tables for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from tp_embed.integrations.deepspeed.config import read_section
from tp_embed.integrations.deepspeed.full_values import guard_full_values
from tp_embed.integrations.deepspeed.sharding import start_watchdog
from tp_embed.surgery.report import ShardingReport
from tp_embed.watchdog import Watchdog

from .forward import check_forward
from .shard import shard_by_config

logger = logging.get_logger(__name__)


class ShardTables(TrainerCallback):
    """Shards the tables of the model of a ``Trainer`` that uses DeepSpeed::

        trainer = Trainer(model, args, ..., callbacks=[ShardTables()])

    It does so at the end of the Trainer's constructor, as the section ``"tp_embed"`` of the
    DeepSpeed config says, see :class:`tp_embed.integrations.deepspeed.EmbedConfig`. From then on
    training, evaluation, resuming and the best model work as without it, and ``save_model()`` and
    checkpoints hold the whole model, for which ``stage3_gather_16bit_weights_on_model_save`` is set
    unless the config says otherwise. A model whose tables are sharded already is left as it is.

    ``report`` says what was sharded; ``watchdog`` is that of the section, if it has one, from the
    beginning of the training on.
    """

    report: ShardingReport
    watchdog: Watchdog | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = getattr(args, "hf_deepspeed_config", None)
        if config is None:
            raise ValueError(
                "`args.deepspeed` must be a DeepSpeed config, of which `ShardTables` reads what to "
                "do, but there is none. Pass one, or leave the callback out."
            )
        model = kwargs["model"]
        if model is None:
            raise ValueError(
                "`model` must be given to the Trainer for `ShardTables`, but is None. A model of "
                "`model_init` would be built anew after its tables were sharded."
            )
        self.report = shard_by_config(model, config.config, kwargs.get("optimizer"))
        logger.info(f"tp_embed:\n{self.report}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainers of TRL replace the `forward` after their constructor has called this one's.
        check_forward(kwargs["model"])
        # Accelerate wraps the optimizer of the engine.
        guard_full_values(kwargs["model"], getattr(kwargs["optimizer"], "optimizer", None))
        if self.watchdog is None:
            _, section = read_section(args.hf_deepspeed_config.config)
            self.watchdog = start_watchdog(section)

"""Sharded tables for the Trainer of transformers."""

from __future__ import annotations

from typing import Any, Literal

from transformers import TrainerCallback, trainer
from transformers.utils import logging

from tp_embed.integrations.deepspeed.config import SECTION, read_section
from tp_embed.integrations.deepspeed.full_values import guard_full_values
from tp_embed.integrations.deepspeed.sharding import start_watchdog
from tp_embed.surgery.report import ShardingReport
from tp_embed.watchdog import Watchdog

from .forward import check_forward
from .predictions import guard_predictions
from .sampling import check_reference, fit_generations, gang_of, share_random_state
from .shard import shard_by_config

logger = logging.get_logger(__name__)


class ShardTables(TrainerCallback):
    """Shards the tables of a ``Trainer``'s model; requires DeepSpeed::

        trainer = Trainer(model, args, ..., callbacks=[ShardTables()])

    Runs at the end of the Trainer's constructor. The section ``"tp_embed"`` of the DeepSpeed config
    says how to shard, see :class:`tp_embed.integrations.deepspeed.EmbedConfig`. Training,
    evaluation, resuming and loading the best model work as without it. Sets
    ``stage3_gather_16bit_weights_on_model_save`` unless the config does, so that ``save_model()``
    and checkpoints hold the whole model. Keeps tables that are sharded already.

    With ``fuse_loss``, evaluation also fuses the loss if ``args.prediction_loss_only`` is set; else
    it returns whole logits, for ``compute_metrics``. Trainers with ``label_smoothing_factor`` or a
    ``compute_loss_func`` take whole logits: they compute the loss themselves.

    With ``shard_logits``, ``compute_metrics`` and :meth:`Trainer.predict` are refused unless
    ``args.prediction_loss_only`` is set, or ``preprocess_logits_for_metrics`` makes something of
    each rank's logits that is not rank-local.

    The ranks of a gang get the same random state when training begins, so that trainers that
    sample, as TRL's GRPO and RLOO do, sample the same completions on all of them.

    ``report`` lists the sharded tables; ``watchdog`` is the section's watchdog, if it has one, and
    starts with training.
    """

    report: ShardingReport
    watchdog: Watchdog | None = None

    def __init__(self, *, fuse_loss: Literal["always", True, False] | None = None) -> None:
        """
        :param fuse_loss: replaces the key of the section.
        """
        self._fuse_loss = fuse_loss

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = getattr(args, "hf_deepspeed_config", None)
        if config is None:
            raise ValueError(
                "`args.deepspeed` must be a DeepSpeed config, which `ShardTables` reads, but is "
                "missing. Pass one, or leave the callback out."
            )
        model = kwargs["model"]
        if model is None:
            raise ValueError(
                "`model` must be given to the Trainer for `ShardTables`, but is None. A model of "
                "`model_init` would be rebuilt after its tables were sharded."
            )
        self.report = shard_by_config(
            model, config.config, kwargs.get("optimizer"), fuse_loss=self._fused(args)
        )
        if (gang := gang_of(model)) is not None:
            fit_generations(args, gang)
            check_reference(model, args, config.config)
        guard_predictions(model, args)
        logger.info(f"tp_embed:\n{self.report}")

    def _fused(self, args: Any) -> Literal["always", True, False] | None:
        _, section = read_section(args.hf_deepspeed_config.config, fuse_loss=self._fuse_loss)
        if section.fuse_loss and args.label_smoothing_factor:
            logger.warning(
                "`label_smoothing_factor` makes the Trainer compute the loss itself, from whole "
                "logits, so `fuse_loss` saves no memory."
            )
        if section.fuse_loss and args.prediction_loss_only:
            return "always"
        return section.fuse_loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL's trainers replace the `forward` after calling the constructor of `Trainer`.
        check_forward(kwargs["model"])
        if (gang := gang_of(kwargs["model"])) is not None:
            share_random_state(gang)
        # Accelerate wraps the optimizer of the engine.
        guard_full_values(kwargs["model"], getattr(kwargs["optimizer"], "optimizer", None))
        if self.watchdog is None:
            _, section = read_section(args.hf_deepspeed_config.config)
            self.watchdog = start_watchdog(section)


class _ShardTablesIfAsked(ShardTables):
    """Does nothing where there is no section ``"tp_embed"``."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _has_section(args):
            super().on_init_end(args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _has_section(args):
            super().on_train_begin(args, state, control, **kwargs)


def _has_section(args: Any) -> bool:
    config = getattr(args, "hf_deepspeed_config", None)
    return config is not None and SECTION in config.config


def shard_by_default(is_wanted: bool) -> None:
    """Gives each Trainer that is made from now on a :class:`ShardTables`, which acts if its
    DeepSpeed config has a section ``"tp_embed"``, or no longer does so."""
    defaults = trainer.DEFAULT_CALLBACKS
    defaults[:] = [callback for callback in defaults if callback is not _ShardTablesIfAsked]
    if is_wanted:
        defaults.append(_ShardTablesIfAsked)

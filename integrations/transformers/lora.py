"""LoRA of PEFT on models with sharded tables."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn import functional as F  # noqa: N812 (its usual name)

from tp_embed.embedding import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.head import OutputHead, ShardedLayer

from .layers import has_shards, table_shape
from .save import SavesShards


def get_peft_model(model: Module, peft_config: peft.PeftConfig, *args: Any, **options: Any) -> Any:
    """:func:`peft.get_peft_model` for a model with sharded tables: LoRA may name them among its
    ``target_modules`` or ``modules_to_save``, and ``save_pretrained()`` of what it returns writes
    an adapter that plain PEFT loads.

    Without either, :func:`peft.get_peft_model` itself does as well. A model of PEFT of which the
    tables are sharded later, by :func:`tp_embed.shard_embeddings`, needs neither.

    :raises ValueError: LoRA is asked for something that needs the whole table, such as DoRA, or for
        an adapter of a sharded output head.
    """
    if isinstance(peft_config, peft.LoraConfig):
        peft_config._register_custom_module(
            {
                ShardedEmbedding: LoraOfShards,
                VocabShardedEmbedding: LoraOfShards,
                OutputHead: _refuse_head,  # type: ignore[dict-item]
            }
        )
    wrapped = peft.get_peft_model(model, peft_config, *args, **options)
    adapt_lora(wrapped)
    return wrapped


def adapt_lora(model: Module) -> None:
    """Makes what PEFT has put around sharded tables know of it. Doing it twice does no harm."""
    from .classes import give_class  # It calls this.

    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, lora.LoraLayer) and isinstance(module.get_base_layer(), ShardedLayer):
            module.__class__ = LoraOfShards
        elif isinstance(module, peft.PeftModel) and has_shards(module):
            give_class(module, SavesShards)


def check_adapters(model: Module, tables: Collection[Module]) -> None:
    """
    :raises ValueError: an adapter of LoRA on one of the ``tables``, which are about to be sharded,
        would not fit its shard.
    """
    for module in model.modules():
        if isinstance(module, lora.LoraLayer) and module.get_base_layer() in tables:
            if isinstance(module.get_base_layer(), Linear):
                _refuse_head(module)
            if module.lora_variant:  # Such as DoRA.
                _refuse_option("use_dora", True)


class LoraOfShards(lora.Embedding):
    """LoRA of a sharded embedding. A and B are whole on every rank, r (V + E) items, and get the
    same gradients there; what it adds is that of LoRA of the whole table."""

    def _get_in_out_features(self, module: Module) -> tuple[int, int]:
        assert isinstance(module, ShardedLayer)
        return table_shape(module)

    def update_layer(self, adapter_name: str, *args: Any, **options: Any) -> None:
        _check(options["config"])
        super().update_layer(adapter_name, *args, **options)

    def _embed(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        base: Any = self.get_base_layer()
        return F.embedding(input, weight, padding_idx=base.pad_idx)

    def _get_embed_scale(self) -> Any:
        scale = self.get_base_layer().scale
        if scale is None or isinstance(scale, Tensor):
            return scale
        return torch.tensor(scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to this rank's block."""
        base: Any = self.get_base_layer()
        rows, columns = base.rows, base.columns
        whole = super().get_delta_weight(adapter)
        return whole[rows.start : rows.stop, columns.start : columns.stop]


def _check(config: peft.LoraConfig) -> None:
    """
    :raises ValueError: a variant of LoRA would look at a shard as if it were the table.
    """
    if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        what = "use_dora" if config.use_dora else "init_lora_weights"
        _refuse_option(what, getattr(config, what))


def _refuse_option(name: str, value: object) -> None:
    raise ValueError(
        f"`{name}` must be left as it is for LoRA of sharded tables, which it would have to see "
        f"whole, but is {value!r}. Take the tables out of `target_modules`, or leave them whole: "
        "`rules={NAME: 'none'}`."
    )


def _refuse_head(head: Module, *args: Any, **options: Any) -> Module:
    raise ValueError(
        "`target_modules` must not name an output head that is sharded, of which each rank has "
        "some classes. Name it in `modules_to_save`, or leave it whole: `shard_head=False`, or "
        "`tie_head=False` where it is tied."
    )

"""PEFT on models with sharded tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn import functional as F  # noqa: N812 (its usual name)

from tp_embed.nn.embedding import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.nn.head import OutputHead, ShardedLayer

from .layers import has_shards, sharded_layers, table_shape
from .mixins import give_class
from .save import SavesShards


def get_peft_model(model: Module, peft_config: peft.PeftConfig, *args: Any, **options: Any) -> Any:
    """:func:`peft.get_peft_model` for a model with sharded tables. LoRA may name them in
    ``target_modules`` or ``modules_to_save``, and ``save_pretrained()`` of the result writes an
    adapter that plain PEFT loads.

    :func:`peft.get_peft_model` itself works if neither names a sharded table, or if
    :func:`tp_embed.shard_embeddings` shards the tables later.

    Prompt tuning and p-tuning need this function, since plain PEFT does not find a table that is
    sharded over the vocabulary.

    :raises ValueError: PEFT needs the whole table, as for DoRA, ``trainable_token_indices``,
        ``ensure_weight_tying`` for a copy of it, or an adapter of a sharded output head.
    """
    _check_tables(model, peft_config)
    if isinstance(peft_config, peft.LoraConfig):
        peft_config._register_custom_module(
            {
                ShardedEmbedding: LoraOfShards,
                VocabShardedEmbedding: LoraOfShards,
                OutputHead: _refuse_head,  # type: ignore[dict-item]
            }
        )
    with _showing_sizes(model):
        wrapped = peft.get_peft_model(model, peft_config, *args, **options)
    adapt_lora(wrapped)
    return wrapped


def _check_tables(model: Module, config: peft.PeftConfig) -> None:
    layers = {name.removesuffix(".weight"): layer for name, layer in sharded_layers(model)}
    named: Any = getattr(config, "trainable_token_indices", None)
    has_tokens = named is not None
    if isinstance(config, peft.TrainableTokensConfig):
        named, has_tokens = config.target_modules, True
    if isinstance(named, str):
        named = [named]
    if has_tokens and not (named and isinstance(next(iter(named)), str)):
        # Plain ids refer to the input embedding.
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        named = [name for name, layer in layers.items() if layer is table]
    for name in _matching(layers, named or []):
        _refuse_tokens(f"'{name}'")
    tied = [layer.weight for layer in layers.values()]
    copied = _matching(layers, getattr(config, "modules_to_save", None) or [])
    is_tied = any(sum(w is layers[name].weight for w in tied) > 1 for name in copied)
    if is_tied and getattr(config, "ensure_weight_tying", False):
        _refuse_option("ensure_weight_tying", True)


def _matching(layers: Mapping[str, ShardedLayer], patterns: Iterable[str]) -> list[str]:
    """Returns the names that PEFT matches with ``patterns``: by their last parts."""
    return [n for n in layers for p in patterns if n == p or n.endswith(f".{p}")]


@contextmanager
def _showing_sizes(model: Module) -> Iterator[None]:
    """Makes PEFT find the input table by its number of rows, which PEFT also takes from ZeRO 3's
    ``ds_shape``."""
    shown: dict[Any, tuple[int, int]] = {}
    for _, layer in sharded_layers(model):
        if not hasattr(layer.weight, "ds_shape"):
            shown[layer.weight] = table_shape(layer)
    for weight, shape in shown.items():
        weight.ds_shape = shape
    try:
        yield
    finally:
        for weight in shown:
            del weight.ds_shape


def adapt_lora(model: Module) -> None:
    """Adapts the PEFT layers and models around sharded tables. Idempotent."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, lora.LoraLayer) and isinstance(module.get_base_layer(), ShardedLayer):
            module.__class__ = LoraOfShards
        elif isinstance(module, peft.PeftModel) and has_shards(module):
            give_class(module, SavesShards)


def check_adapters(model: Module, tables: Collection[Module]) -> None:
    """
    :raises ValueError: a PEFT adapter on one of ``tables``, which will be sharded, would not fit
        its shard.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and module.get_base_layer() in tables:
            _refuse_tokens("a table that is to be sharded")
        if isinstance(module, lora.LoraLayer) and module.get_base_layer() in tables:
            if isinstance(module.get_base_layer(), Linear):
                _refuse_head(module)
            if module.lora_variant:  # Such as DoRA.
                _refuse_option("use_dora", True)


class LoraOfShards(lora.Embedding):
    """LoRA of a sharded embedding, equal to LoRA of the whole table. A and B are whole on every
    rank, r (V + E) items, and get the same gradients there."""

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
        """Returns the update that merging adds to this rank's block."""
        base: Any = self.get_base_layer()
        rows, columns = base.rows, base.columns
        whole = super().get_delta_weight(adapter)
        return whole[rows.start : rows.stop, columns.start : columns.stop]


def _check(config: peft.LoraConfig) -> None:
    """
    :raises ValueError: a variant of LoRA would treat a shard as the whole table.
    """
    if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        what = "use_dora" if config.use_dora else "init_lora_weights"
        _refuse_option(what, getattr(config, what))


def _refuse_option(name: str, value: object) -> None:
    raise ValueError(
        f"`{name}` must be left as it is for LoRA of sharded tables, since it needs whole ones, "
        f"but is {value!r}. Take the tables out of `target_modules`, or leave them whole: "
        "`rules={NAME: 'none'}`."
    )


def _refuse_tokens(table: str) -> None:
    raise ValueError(
        f"`trainable_token_indices` must name tables that are whole, but name {table}, which is "
        "split over ranks: PEFT writes the new rows into the whole weight. Name it in "
        "`modules_to_save` to train all of its rows, or leave it whole: `rules={NAME: 'none'}`."
    )


def _refuse_head(head: Module, *args: Any, **options: Any) -> Module:
    raise ValueError(
        "`target_modules` must not name an output head that is sharded, since each rank has only "
        "some classes. Name it in `modules_to_save`, or leave it whole: `shard_head=False`, or "
        "`tie_head=False` if it is tied."
    )

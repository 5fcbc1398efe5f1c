"""Base class of all layers that are sharded over a gang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module, Parameter

import tp_embed.parameter.optimizers  # noqa: F401 (checks optimizers before they step)
from tp_embed._torch_private import metadata_of
from tp_embed.gang import Gang
from tp_embed.lookup.train_rows import mask_gradient
from tp_embed.mapped.store import rewriting, store_of
from tp_embed.parameter.sharded import local, mark_shard
from tp_embed.partition import Partition, describe

# The key of a shard's record in the metadata of a state dict.
SHARD_RECORD = "tp_embed_shard"


def _unsupported(layer: Module, name: str) -> TypeError:
    return TypeError(
        f"`{name}` must be given modules of plain operators, but is given a "
        f"`{type(layer).__name__}`, whose collectives it can't record. Use `torch.compile` or "
        "`torch.export`, or shard the tables of the model afterwards."
    )


def _check_kept(weight: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
    """
    :raises ValueError: ``fn`` would change the dtype or the device of a mapped ``weight``.
    """
    moved = fn(torch.empty(0, weight.size(1), dtype=weight.dtype, device=weight.device))
    if (moved.dtype, moved.device) != (weight.dtype, weight.device):
        raise ValueError(
            f"The table in memory-mapped files must stay {weight.dtype} on '{weight.device}', but "
            f"would become {moved.dtype} on '{moved.device}'. Move the other modules of the model, "
            "or map the table afterwards; `map_table(..., dtype=...)` gives it another dtype."
        )


class GangLayer(Module):
    """A module whose ``weight`` is sharded over ``gang`` by ``partition`` along ``shard_dim``.

    Subclasses call :meth:`_adopt` once their Parameters exist. It is called again whenever
    Parameters may have been replaced by new ones that the gang hasn't marked.
    """

    gang: Gang
    weight: Parameter
    train_rows: Tensor | None = None

    def _shard_repr(self, dim: int, partition: Partition) -> str:
        """Describes this rank's shard for ``extra_repr()``."""
        own = partition.shard(self.gang.rank)
        name = "columns" if dim else "rows"
        return f"{name}={describe(own)}, shard={self.gang.rank}/{self.gang.size}"

    def _adopt(self) -> None:
        self._mark()
        self.gang.adopt(self)

    def _mark(self) -> None:
        layer: Any = self
        mark_shard(self.weight, self.gang, layer.partition, layer.shard_dim)
        self._mask_gradient()

    def _mask_gradient(self) -> None:
        """Registers the gradient mask; also in each forward, since a frozen weight takes no hook
        until it requires a gradient."""
        if self.train_rows is not None and not torch.compiler.is_compiling():
            layer: Any = self
            mask_gradient(self.weight, self.train_rows, layer.rows)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        if name == "weight" and param is not None:
            self._check_weight(param)
        if name.startswith("weight_") and self.gang.size > 1:  # By `torch.nn.utils.prune`.
            raise ValueError(
                f"The weight of a `{type(self).__name__}` must not come from `{name}`, which "
                "would treat this rank's shard as the whole table. Prune the table before sharding "
                "it, and make the pruning permanent."
            )
        super().register_parameter(name, param)
        if name == "weight" and param is not None:
            self._mark()

    def _check_weight(self, param: Parameter) -> None:
        """
        :raises ValueError: ``param`` is the whole table, or a shard of another partition.
        """
        self._check_mapped(param)
        layer: Any = self
        dim, own = layer.shard_dim, len(layer.partition.shard(self.gang.rank))
        of = getattr(param, "_shard", None)
        is_cut_otherwise = of and (of.dim, of.partition.size) != (dim, layer.partition.size)
        # ZeRO 3 keeps 1-d weights, and transformers loads files into DTensors.
        is_whole = type(param) is Parameter and param.dim() == 2 and param.shape[dim] != own
        if is_cut_otherwise or is_whole:
            axis = "columns" if dim else "rows"
            found = f"the {of.table}" if of else f"a tensor of the shape {tuple(param.shape)}"
            raise ValueError(
                f"`weight` of a `{type(self).__name__}` must hold {own} {axis}, this rank's shard, "
                f"but is given {found}. Tie tables and heads before they are sharded, by "
                "`shard_embeddings()`; make a layer of a whole table by `from_embedding()`, or "
                "leave it whole: `rules={name: 'none'}`, `shard_head=False`."
            )

    def _check_mapped(self, param: Parameter) -> None:
        held = self._parameters.get("weight")
        if held is not None and param is not held and store_of(held) is not None:
            raise ValueError(
                "`weight` of a table in memory-mapped files must stay in them, but is assigned "
                "another Parameter. Copy values into it: `weight.data.copy_()`."
            )
        if getattr(self, "sparse", None) is not True and store_of(param) is not None:
            raise ValueError(
                f"`weight` of a `{type(self).__name__}` must be in memory, but is in memory-mapped "
                "files, whose gradients must be sparse. Leave it untied, or make the table with "
                "`sparse=True`."
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = local(self.weight)
        if self.gang.size > 1 and (metadata := metadata_of(destination)):
            metadata[prefix[:-1]][SHARD_RECORD] = self.shard_record()

    def shard_record(self) -> dict[str, int]:
        """Describes the shard for the metadata of a state dict."""
        layer: Any = self
        record = {"dim": layer.shard_dim, "rank": self.gang.rank, "num_shards": self.gang.size}
        return record | ({"cyclic": 1} if layer.partition.cyclic else {})

    def _check_input(self, x: object) -> None:
        """
        :raises TypeError: ``x`` comes from a tracer that can't record collectives.
        """
        name = "torch.jit.trace" if torch.jit.is_tracing() else None
        if isinstance(x, Proxy):
            name = "torch.fx.symbolic_trace"
        if name is not None:
            raise _unsupported(self, name)

    def __prepare_scriptable__(self) -> Self:
        raise _unsupported(self, "torch.jit.script")

    def set_apart(self) -> None:
        """Makes ``weight`` a buffer, so that code that trains or partitions ``parameters()`` leaves
        it alone. It stays the same Parameter, in the state dict too, and gets gradients."""
        self.register_buffer("weight", self._parameters.pop("weight"))

    @property
    def is_apart(self) -> bool:
        """Whether :meth:`set_apart` has been called."""
        return "weight" in self._buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if store_of(self.weight) is not None:
            _check_kept(self.weight, fn)
            return self
        apart = self._buffers.pop("weight", None)
        # Return a plain tensor, which can become a Parameter and be swapped with one.
        super()._apply(lambda tensor: local(fn(tensor)), recurse)
        if apart is not None:
            apart.data = local(fn(apart))
            self._buffers["weight"] = apart
        self._adopt()  # `fn` may have replaced Parameters, as `to_empty()` does.
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()  # Copied Parameters lose the marks of their gang.

    def _is_whole(self, found: Any) -> bool:
        layer: Any = self
        dim, shape = layer.shard_dim, self.weight.shape
        is_table = type(found) in (Tensor, Parameter) and found.ndim == len(shape) == 2
        return is_table and found.shape[dim] == layer.partition.size != shape[dim]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        record = local_metadata.get(SHARD_RECORD)
        found = state_dict.get(f"{prefix}weight")
        is_own = found is None or found is self.weight or found.shape != self.weight.shape
        error_msgs: list[str] = args[-1]
        # Hooks of this layer run later, and may cut the table.
        if self._is_whole(found) and not self._load_state_dict_pre_hooks:
            error_msgs.append(
                f"size mismatch for {prefix}weight: it must be this rank's shard, of the shape "
                f"{tuple(self.weight.shape)}, but is the whole table, of the shape "
                f"{tuple(found.shape)}, instead. Load it in `with "
                "tp_embed.checkpoint.hook_state_dict(model):`, which cuts whole tables, or before "
                "`shard_embeddings()`."
            )
            return
        if record not in (None, self.shard_record()) and not is_own:
            error_msgs.append(
                f"`{prefix}weight` must be this rank's shard {self.shard_record()}, but is the "
                f"shard {record} instead. Save whole tables: "
                "`tp_embed.checkpoint.hook_state_dict()`."
            )
            return
        with rewriting(self.weight):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self._adopt()  # `assign=True` replaces Parameters.

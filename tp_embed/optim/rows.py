"""The base of optimizers that update only the rows a gradient touches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from tp_embed._torch_private import parts_of_sparse
from tp_embed.lookup.distinct import find_distinct
from tp_embed.lookup.gradient import sum_by_id
from tp_embed.mapped.optimizers import note_optimizer
from tp_embed.mapped.store import new_zeros, rewriting, step_of, store_of
from tp_embed.optim.masters import State, prepare, read_all, read_rows, write_rows
from tp_embed.parameter.sharded import ShardedParameter, local

# The rows that a step on the CPU updates at a time, and that `decay_all()` copies.
_CACHED, _COPIED = 1 << 9, 1 << 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RowOptimizer(Optimizer):
    """The base of the optimizers of this package. A step reads and writes the rows of the gradient
    and their states; all other rows stay as they are.

    Computes in fp32 for weights in bf16 and fp16, and keeps their fp32 values: 2 more bytes a
    parameter for bf16, exact but for one unit in the last place where a value is halfway between
    two bf16 numbers, and 4 for fp16. After writing weights without the optimizer, call
    :meth:`refresh`.

    **Weight decay** is decoupled, as in :class:`torch.optim.AdamW`, and lazy: a step that touches a
    row first multiplies it by the product of ``1 - lr * weight_decay`` over this step and all steps
    since it was last touched, with the learning rate of each step. So a lookup of a row sees it
    without the decay of the steps that the row has missed, until a step touches the row or
    :meth:`decay_all` is called.

    As other optimizers of torch, it skips a Parameter whose ``grad`` is ``None``: then its step
    does not count, for weight decay and bias corrections too.

    :param params: Parameters, or parameter groups. *Shape:* :math:`(V,E)`.
    :param lr: the learning rate.
    :param eps: added to the denominator of updates.
    :param weight_decay: the coefficient of decoupled weight decay.
    :raises ValueError: a hyperparameter is out of range, or a Parameter is not a matrix.
    :raises TypeError: the dtype of a Parameter is none of fp16, bf16, fp32 and fp64.

    ``is_row_wise`` says whether a class uses the mean of squares of each row of the gradient, and
    ``row_states`` which states have one value for each row, with their shape after the rows.
    """

    is_row_wise: ClassVar[bool]
    row_states: ClassVar[Mapping[str, tuple[int, ...]]] = {"row_decay": ()}
    _tp_embed_keeps_files: ClassVar[bool] = True  # Of mapped tables; checked before each step.

    def __init__(
        self, params: Any, *, lr: float | Tensor, eps: float, weight_decay: float, **defaults: Any
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"`{name}` must be at least 0, but is {value} instead.")
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, **defaults})
        note_optimizer(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        note_optimizer(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.dim() != 2:
                raise ValueError(
                    f"`params` must hold tables of the shape (V, E), but hold a Parameter of the "
                    f"shape {tuple(weight.shape)}. Give it another optimizer."
                )
            if weight.dtype not in _DTYPES:
                raise TypeError(
                    f"`params` must have one of the dtypes {_DTYPES}, but one has {weight.dtype}."
                )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grads: Mapping[Tensor, Tensor] | None = None,
    ) -> float | None:
        """Updates the rows of the gradients.

        Communicates only for row-wise states of a table that is sharded along its embedding
        dimension: then all ranks of the gang must call it, and it all-reduces 8 bytes per row.

        :param closure: computes the loss again, if not ``None``.
        :param grads: gradients by Parameter, to use instead of ``.grad``; of any floating dtype.
        :raises ValueError: a gradient is not row-sparse, or has another shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                grad = weight.grad if grads is None else grads.get(weight)
                if grad is not None:
                    self._step(group, weight, local(grad))
        return loss

    def _step(self, group: dict[str, Any], parameter: Tensor, grad: Tensor) -> None:
        weight, state = local(parameter), self._state_of(parameter)
        self.state[parameter] = state
        rows, grad = rows_of(grad, weight)
        squares = mean_square(grad, parameter) if self.is_row_wise else None
        self._ensure_state(group, weight, state)
        state["step"] += 1
        if "decay" in state:
            state["decay"] += math.log1p(-_decay(group))
        # On the CPU, rows that are written must still be in its cache.
        size = _CACHED if weight.device.type == "cpu" else max(len(rows), 1)
        with step_of(weight, rows, state) as save:
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                save(start, start + size)
                values = read_rows(weight, state, rows[part])
                if "decay" in state:
                    _catch_up(state, rows[part], values)
                square = None if squares is None else squares[part]
                self._update(group, state, rows[part], grad[part], square, values)
                write_rows(weight, state, rows[part], values)

    def _state_of(self, parameter: Tensor) -> State:
        """Returns the state of a Parameter; if it is in files, what these hold."""
        state: State = self.state.get(parameter, {})
        store = store_of(parameter)
        if store is None:
            if any(isinstance(value, Tensor) and store_of(value) for value in state.values()):
                raise ValueError(
                    "The weight of a table in memory-mapped files must stay in them, but was "
                    "replaced. Copy values into it: `weight.data.copy_()`."
                )
            return state
        if any(isinstance(v, Tensor) and store_of(v) is not store for v in state.values()):
            raise ValueError(
                f"The states of the optimizer must be in `{store.path}`, but are in memory. Make "
                "the optimizer again: it goes on with the states in the files."
            )
        store.claim(type(self).__name__)
        state.clear()
        state.update(store.state())
        return state

    def _check_in_memory(self, what: str) -> None:
        for parameter in _flat(group["params"] for group in self.param_groups):
            store = store_of(parameter)
            if store is not None:
                raise ValueError(
                    f"{what} must not be of tables in memory-mapped files, but `{store.path}` is "
                    "one. Use `MappedTable.snapshot()` and `MappedTable.restore()`."
                )

    @abstractmethod
    def _init_state(self, state: State, weight: Tensor, dtype: torch.dtype) -> None:
        """Adds the states of a table, zeros of ``dtype``."""

    @abstractmethod
    def _update(
        self,
        group: dict[str, Any],
        state: State,
        rows: Tensor,
        grad: Tensor,
        square: Tensor | None,
        values: Tensor,
    ) -> None:
        """Updates ``values``, some ``rows`` of the table, in place, and their states.

        :param square: the mean of squares of each row of the gradient, if ``is_row_wise``.
        """

    def _ensure_state(self, group: dict[str, Any], weight: Tensor, state: State) -> None:
        """Adds the states that a step needs and that are missing. For weight decay these are the
        sum of the logarithms of all its factors, and how much of it each row has had."""
        if "step" not in state:
            state["step"] = 0
            self._init_state(state, weight, torch.promote_types(weight.dtype, torch.float32))
        if _decay(group) and "decay" not in state:
            state["decay"] = 0.0
            state["row_decay"] = new_zeros(weight, "row_decay", (len(weight),), torch.float64)

    @torch.no_grad()
    def init_state(self) -> None:
        """Makes the states that are missing, as if before a first step, so that a checkpoint can be
        loaded into them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                weight, state = local(parameter), self._state_of(parameter)
                self.state[parameter] = state
                held = set(state)
                self._ensure_state(group, weight, state)
                prepare(weight, state)
                if state.keys() != held:
                    with rewriting(weight, state):  # Files of states that no record has are lost.
                        pass

    @torch.no_grad()
    def decay_all(self) -> None:
        """Applies the weight decay that rows have missed to all rows, for example before evaluation
        or before saving the model. Walks over whole tables."""
        for group in self.param_groups:
            for parameter in group["params"]:
                weight, state = local(parameter), self._state_of(parameter)
                if "decay" not in state:
                    continue
                with rewriting(weight, state):
                    for start in range(0, len(weight), _COPIED):
                        is_late = state["row_decay"][start : start + _COPIED] != state["decay"]
                        rows = is_late.nonzero()[:, 0] + start
                        values = read_rows(weight, state, rows)
                        _catch_up(state, rows, values)
                        write_rows(weight, state, rows, values)

    def refresh(self) -> None:
        """Takes the weights as they are now, after they were written without the optimizer: the
        fp32 values of weights in bf16 and fp16 are forgotten, and the weight decay that rows have
        missed. If only some rows are written, call :meth:`decay_all` before."""
        for parameter in _flat(group["params"] for group in self.param_groups):
            state = self._state_of(parameter)
            if "step" not in state:
                continue
            with rewriting(parameter, state):
                for name in ("master", "remainder"):
                    state.pop(name, None)
                if "decay" in state:
                    state["row_decay"].fill_(state["decay"])

    def master(self, parameter: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns the fp32 values of a Parameter in bf16 or fp16, or else its own values. May share
        memory with them. *Shape:* :math:`(V,E)`, or this rank's shard of it.

        :param rows: only these rows of it, as a copy, if not ``None``. *Shape:* :math:`(N)`.
        """
        with torch.no_grad():
            weight, state = local(parameter), self._state_of(parameter)
            if rows is not None:
                masters = {key: state[key] for key in ("master", "remainder") if key in state}
                state = {key: value.index_select(0, rows) for key, value in masters.items()}
                weight = weight.index_select(0, rows)
            return read_all(weight, state)

    def state_dict(self) -> dict[str, Any]:
        for parameter in _flat(group["params"] for group in self.param_groups):
            if state := self._state_of(parameter):
                self.state[parameter] = state
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._check_in_memory("Copies of an optimizer")
        state: dict[str, Any] = super().__getstate__()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state, in the dtypes in which it was saved; torch would cast it to the dtype of
        the Parameters."""
        self._check_in_memory("States that are loaded")
        loaded: dict[str, Any] = {}

        def note(_: Optimizer, changed: dict[str, Any]) -> None:
            loaded.update(changed)  # As hooks have left it.

        handle = self.register_load_state_dict_pre_hook(note)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        keys = _flat(group["params"] for group in loaded["param_groups"])
        parameters = _flat(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device)


def _decay(group: Mapping[str, Any]) -> float:
    """Returns by how much weight decay shrinks weights in a step."""
    decay = float(group["lr"]) * float(group["weight_decay"])
    if decay >= 1.0:
        raise ValueError(
            f"`lr * weight_decay` must be less than 1, but is {decay} instead. Weight decay is "
            "decoupled and multiplies weights by 1 - lr * weight_decay."
        )
    return decay


def _catch_up(state: State, rows: Tensor, values: Tensor) -> None:
    """Multiplies ``values`` by the factors of weight decay that ``rows`` have missed."""
    missed = state["decay"] - state["row_decay"].index_select(0, rows)
    values.mul_(missed.exp_().to(values.dtype)[:, None])
    state["row_decay"].index_fill_(0, rows, state["decay"])


def _flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def rows_of(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct rows of a gradient, ascending, and their values in at least fp32. Sums
    repeated rows in the order in which they come."""
    if not grad.is_sparse or grad.sparse_dim() != 1 or grad.shape != weight.shape:
        raise ValueError(
            f"The gradient of a table must be row-sparse, of the shape {tuple(weight.shape)}, but "
            f"is {grad.layout} of the shape {tuple(grad.shape)} instead. Make the table with "
            "`sparse=True`, or use an optimizer of `torch.optim`."
        )
    rows, values = parts_of_sparse(grad)
    values = values.to(torch.promote_types(weight.dtype, torch.float32))
    if grad.is_coalesced():
        return rows, values
    return sum_rows(rows, values)


def sum_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the ``values`` of equal ``rows``, in their order.

    :param rows: *Shape:* :math:`(N)`.
    :param values: *Shape:* :math:`(N,E)`.
    :returns: the U distinct rows, ascending, and their sums. *Shape:* :math:`(U)`, :math:`(U,E)`.
    """
    distinct = find_distinct(rows)
    return distinct.ids, sum_by_id(values, distinct, range(values.size(1)))


def mean_square(grad: Tensor, parameter: Tensor) -> Tensor:
    """Computes the mean of squares of each row of the whole table.

    Sums in fp64, so that the result, rounded to the dtype of ``grad``, hardly depends on how the
    embedding dimension is sharded. Over such a table all ranks of the gang must call it, with the
    same rows; it all-reduces 8 bytes per row.

    :param grad: this rank's columns of the rows. *Shape:* :math:`(U,E_{rank})`.
    :returns: *Shape:* :math:`(U)`.
    """
    sums = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64).square_()
    columns = grad.size(1)
    if isinstance(parameter, ShardedParameter) and parameter.shard_dim == 1:
        gang, columns = parameter.gang, parameter._shard.partition.size
        on_gang = sums.to(gang.device)
        gang.all_reduce(on_gang)
        sums = on_gang.to(sums.device)
    means: Tensor = (sums / columns).to(grad.dtype)
    return means

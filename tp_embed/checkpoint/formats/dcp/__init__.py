"""Reads and writes directories of ``torch.distributed.checkpoint`` (DCP).

They hold a flattened dict of dicts, as training scripts save it. We read a state dict, or a dict
with one under ``model``, and an optimizer under ``optimizer`` or ``optim`` in the form of
``torch.distributed.checkpoint.state_dict.get_state_dict()``, flattened (as torchtitan does) or not.
We write::

    {
        "model": model_state_dict,
        "optimizer": {"state": {name: {"exp_avg": ..., ...}}, "param_groups": [...]},
        "step": step,
        "buffer_names": [...],
    }

both as ``get_state_dict()`` returns them, so that plain torch loads them in any number of
processes. The fp32 copy of a 16-bit weight is the optimizer state ``fp32``, which torch ignores.
Torch refuses to load entries that the checkpoint lacks, such as a hyperparameter that another
library's optimizer does not have, unless the planner is
``DefaultLoadPlanner(allow_partial_load=True)``.

We store tied names once. Torch stores them twice, so they are not tied in torch's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contents import (
    DECAY,
    FP32_STATES,
    WEIGHT,
    Checkpoint,
    Key,
    Optimizer,
    Output,
    ReadOptions,
    Target,
    fits,
    is_row_wise,
)
from ...errors import CheckpointError, shown
from ...files.arrays import Array
from ...files.derived import Held
from ..pt import BUFFERS, MODEL_KEYS, OPTIMIZER_KEYS, STEP_KEYS
from . import metadata
from .files import Files, Layout
from .metadata import BytesItem, Item, Keys, TensorItem

NAME = "dcp"
IS_FILE = False
HAS_RANKS = False
HAS_OPTIMIZER = True
HAS_EXTRA = False
MAIN = WEIGHT
# Larger tensors are no hyperparameters.
_MAX_VALUE = 1024

# Nested dicts, and lists by index, of items.
Tree = dict[str | int, Any]


def recognises(path: Path) -> bool:
    """Returns whether ``path`` is a directory with the metadata of DCP."""
    return path.is_dir() and (path / metadata.NAME).is_file()


def read(path: Path, options: ReadOptions) -> Checkpoint:
    """Reads ``.metadata``. Tensors stay in their files.

    :raises CheckpointError: ``.metadata`` is missing: saving was not finished.
    """
    found = path / metadata.NAME
    if not found.is_file():
        raise CheckpointError(
            f"`{path}` must hold `{metadata.NAME}`, but does not. Saving was not finished, or "
            "each rank has its own, which cannot be read: save it with all ranks together."
        )
    items, nesting = metadata.read(found, allow_unsafe=options.allow_unsafe_pickle)
    return _Reader(path, options).checkpoint(_tree(path, items, nesting), found)


class _Reader:
    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._files = Files(path, allow_unsafe=options.allow_unsafe_pickle)
        self._notes: list[str] = []

    def checkpoint(self, root: Tree, found: Path) -> Checkpoint:
        root, model = self._model(root)
        tensors, ties = self._weights(model)
        shapes = {key.name: array.shape for key, array in tensors.items()}
        optimizer = None
        for key in OPTIMIZER_KEYS:
            if isinstance(root.get(key), dict) and self._options.with_optimizer:
                states, optimizer = self._optimizer(root[key], shapes, ties)
                tensors |= states
                break
        buffers = self._value(root[BUFFERS]) if BUFFERS in root else []
        if not _are_names(buffers):
            raise self._damaged(BUFFERS, "a list of names", buffers)
        return Checkpoint(
            format=NAME,
            path=self._path,
            tensors=tensors,
            ties=ties,
            buffers=frozenset(buffers),
            step=self._step(root),
            optimizer=optimizer,
            notes=tuple(self._notes),
            files=(found, *self._files.used),
        )

    def _model(self, root: Tree) -> tuple[Tree, Tree]:
        """Returns the dict that holds model and optimizer, and the model."""
        # All may be nested in one object, like `{"app": {"model": ...}}` in torch's tutorial.
        for outer in (root, *(each for each in root.values() if isinstance(each, dict))):
            for key in MODEL_KEYS:
                if isinstance(outer.get(key), dict):
                    left = sorted(
                        str(name)
                        for name in outer
                        if name not in (key, BUFFERS, *OPTIMIZER_KEYS, *STEP_KEYS)
                    )
                    if left:
                        self._notes.append(f"{left} was left out")
                    return outer, outer[key]
        if any(str(name).startswith("param_groups.") for name in root):
            # The flattened optimizer is mixed with the flattened model.
            own = {
                name: item
                for name, item in root.items()
                if str(name).startswith(("state.", "param_groups."))
            }
            root = {name: item for name, item in root.items() if name not in own}
            root["optimizer"] = own
        # The model consists of all items outside dicts.
        model = {name: item for name, item in root.items() if not isinstance(item, dict)}
        if not any(isinstance(item, TensorItem) for item in model.values()):
            raise CheckpointError(
                f"`{self._path}` must hold a state dict, or one as {list(MODEL_KEYS)}, but holds "
                f"{[str(name) for name in root][:10]}."
            )
        left = sorted(
            str(name) for name in root if name not in model and name not in OPTIMIZER_KEYS
        )
        if left:
            self._notes.append(f"{left} was left out")
        return {name: item for name, item in root.items() if isinstance(item, dict)}, model

    def _weights(self, model: Tree) -> tuple[dict[Key, Array], dict[str, str]]:
        tensors: dict[Key, Array] = {}
        ties: dict[str, str] = {}
        places: dict[TensorItem, str] = {}
        for name, item in _leaves(model):
            if not isinstance(item, TensorItem):
                self._notes.append(f"`{name}` is no tensor and was left out")
                continue
            first = places.setdefault(item, name) if item.chunks else name
            if first != name:
                ties[name] = first
            elif Key(name) in tensors:
                raise CheckpointError(f"`{self._path}` must not hold `{name}` twice, but does.")
            else:
                tensors[Key(name)] = self._files.tensor(name, item)
        return tensors, ties

    def _optimizer(
        self, saved: Tree, shapes: Mapping[str, tuple[int, ...]], ties: Mapping[str, str]
    ) -> tuple[dict[Key, Array], Optimizer | None]:
        if "param_groups" in saved:
            state, groups = saved.get("state"), self._value(saved["param_groups"])
        elif any(str(key).startswith("param_groups.") for key in saved):
            state, groups = self._unflattened(saved)
        else:
            self._notes.append("the optimizer has no param groups and was left out")
            return {}, None
        state = self._state_dict(state, "state")
        names = {param: ties.get(name, name) for param, name in self._param_names(groups).items()}
        unknown = sorted({*names.values()} - {*shapes}) + sorted(map(str, {*state} - {*names}))
        if unknown or len({*names.values()}) != len(names):
            raise CheckpointError(
                f"The optimizer in `{self._path}` must have Parameters of the model, each once, "
                f"but has {unknown[:5] or [*names.values()][:5]}."
            )
        tensors: dict[Key, Array] = {}
        steps: dict[str, float] = {}
        for param, own in state.items():
            name = names[str(param)]
            for what, item in self._state_dict(own, name).items():
                if what == "step":
                    steps[name] = self._number(f"the step of {name}", item)
                elif what == DECAY and isinstance(item, BytesItem):
                    value = self._number(f"{what} of {name}", item)
                    tensors[Key(name, DECAY)] = Held(torch.tensor(value, dtype=torch.float64))
                elif not isinstance(item, TensorItem) or not fits(
                    Key(name, str(what)), item.shape, shapes[name]
                ):
                    self._notes.append(
                        f"`{what}` of `{name}` in the optimizer has another shape and was left out"
                    )
                elif what == WEIGHT:
                    raise self._damaged(name, "states of an optimizer", what)
                else:
                    key = Key(name, str(what))
                    tensors[key] = self._files.tensor(str(key), item)
        named = tuple(
            {
                **{key: value for key, value in group.items() if key != "param_names"},
                "params": [names[str(param)] for param in group["params"]],
            }
            for group in groups
        )
        return tensors, Optimizer(named, steps)

    def _state_dict(self, node: Any, what: str) -> Tree:
        """Returns a dict of the optimizer's state. DCP stores empty dicts as values."""
        if isinstance(node, BytesItem):
            node = self._value(node) or {}
        if node is None or isinstance(node, dict):
            return {str(key): value for key, value in (node or {}).items()}
        raise self._damaged(what, "a dict of optimizer states", node)

    def _unflattened(self, saved: Tree) -> tuple[Tree, list[dict[str, Any]]]:
        """Undoes ``flatten_optimizer_state_dict``. Returns state and groups: Parameters with the
        same hyperparameters form one group."""
        state: Tree = {}
        hyper: dict[str, dict[str, Any]] = {}
        for key, item in saved.items():
            part, _, rest = str(key).partition(".")
            name, _, what = rest.rpartition(".")
            if part == "state":
                state.setdefault(name, {})[what] = item
            elif part == "param_groups":
                hyper.setdefault(name, {})[what] = self._value(item)
        groups: list[dict[str, Any]] = []
        for name, values in hyper.items():
            for group in groups:
                if repr({**group, "params": None}) == repr({**values, "params": None}):
                    group["params"].append(name)
                    break
            else:
                groups.append({**values, "params": [name]})
        return state, groups

    def _param_names(self, groups: Any) -> dict[str, str]:
        """Maps the members of param groups, names or indices, to names."""
        if not isinstance(groups, list) or not all(
            isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
        ):
            raise self._damaged("param_groups", "a list of dicts with `params`", groups)
        params = list(chain.from_iterable(group["params"] for group in groups))
        if _are_names(params):
            return {param: param for param in params}
        # From an optimizer made with `model.named_parameters()`.
        own = [group.get("param_names", []) for group in groups]
        found = tuple(chain.from_iterable(own)) if all(map(_are_names, own)) else ()
        names = self._options.optimizer_names or found
        if not len({*names}) == len(names) == len({*map(str, params)}) == len(params):
            raise CheckpointError(
                f"The optimizer in `{self._path}` must say the names of its {len(params)} "
                "Parameters, but does not. Save it with `get_state_dict()` of "
                "`torch.distributed.checkpoint.state_dict`, or pass `--optimizer-names`."
            )
        return dict(zip(map(str, params), names, strict=True))

    def _step(self, root: Tree) -> int | None:
        inner = root.get("train_state")  # torchtitan's
        for own in (root, inner if isinstance(inner, dict) else {}):
            for key in STEP_KEYS:
                if key in own and not isinstance(own[key], dict):
                    return int(self._number(key, own[key]))
        return None

    def _number(self, what: str, node: Any) -> float:
        value = self._value(node)
        if type(value) not in (int, float) or value != value or abs(value) == float("inf"):
            raise self._damaged(what, "a number", value)
        return float(value)

    def _value(self, node: Any) -> Any:
        """Loads the values of a part of the tree. One-element tensors become numbers."""
        if isinstance(node, dict):
            if node and all(isinstance(key, int) for key in node):
                return [self._value(node[index]) for index in sorted(node)]
            return {key: self._value(item) for key, item in node.items()}
        value = node
        if isinstance(node, BytesItem):
            value = self._files.value(node)
        elif isinstance(node, TensorItem):
            array = self._files.tensor("a value", node)
            if array.numel > _MAX_VALUE:
                raise self._damaged("a hyperparameter", "small", array)
            value = array.load()
        return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value

    def _damaged(self, what: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(
            f"`{what}` in `{self._path}` must be {expected}, but is {shown(found)}."
        )


def lay_out(checkpoint: Checkpoint, target: Target, path: Path) -> Output:
    """Lays out files with tensors and values, and then ``.metadata``."""
    found = path / metadata.NAME
    if not found.exists():  # Else an earlier run has laid out everything.
        with Layout(path) as layout:
            items = {
                keys: layout.space(value.shape, value.dtype)
                if isinstance(value, Array)
                else layout.tensor(value)
                if isinstance(value, Tensor)
                else layout.value(value)
                for keys, value in _content(checkpoint).items()
            }
        items |= {("model", alias): items["model", name] for alias, name in checkpoint.ties.items()}
        flat = {".".join(map(str, keys)): keys for keys in items}
        metadata.write(found, {name: items[keys] for name, keys in flat.items()}, flat)
    arrays = read(path, ReadOptions()).tensors
    return Output({key: arrays[key] for key in checkpoint.tensors if key.state != DECAY})


def _content(checkpoint: Checkpoint) -> dict[Keys, Any]:
    """Maps paths to what to write: arrays, which get space, and values."""
    content: dict[Keys, Any] = {
        ("model", key.name): array
        for key, array in checkpoint.tensors.items()
        if key.state == WEIGHT
    }
    content["buffer_names",] = sorted(checkpoint.buffers)
    if checkpoint.step is not None:
        content["step",] = checkpoint.step
    if checkpoint.optimizer is None:
        return content
    for key, array in checkpoint.tensors.items():
        if key.state != WEIGHT:
            value = float(array.load()) if key.state == DECAY else array
            content["optimizer", "state", key.name, key.state] = value
    counts_in_int = _with_row_optimizers(checkpoint)
    for name, step in checkpoint.optimizer.steps.items():
        # As the optimizers keep it: torch loads each as it was saved.
        count = int(step) if name in counts_in_int else torch.tensor(step, dtype=torch.float32)
        content["optimizer", "state", name, "step"] = count
    for index, group in enumerate(checkpoint.optimizer.groups):
        # Optimizers made with `model.named_parameters()` expect `param_names`.
        for what, value in {**group, "param_names": group["params"]}.items():
            content["optimizer", "param_groups", index, what] = value
    return content


def _with_row_optimizers(checkpoint: Checkpoint) -> set[str]:
    """Returns the names of tables with an optimizer of :mod:`tp_embed.optim`, as far as their
    states show it."""
    own = {
        key.name
        for key, array in checkpoint.tensors.items()
        if key.state in (DECAY, *FP32_STATES)
        or is_row_wise(key, array.shape, checkpoint.shape(key.name))
    }
    return own | checkpoint.apart


def _tree(path: Path, items: Mapping[str, Item], nesting: Mapping[str, Keys]) -> Tree:
    root: Tree = {}
    for name, item in items.items():
        *outer, last = nesting.get(name, (name,))
        node = root
        for key in outer:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"`{path}` must have one item at each path, but `{name}` collides with another. It "
                "is damaged: copy it again."
            )
        node[last] = item
    return root


def _leaves(tree: Tree) -> Iterator[tuple[str, Item]]:
    """Yields the items with dotted names, like nested modules."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in _leaves(value))
        else:
            yield str(key), value


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)

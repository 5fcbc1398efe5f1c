"""What works with `nn.Embedding` and `nn.Linear` gives the same with ours, or is refused.

A case is a function that does what users do in a :class:`World`, and returns its observations. It
runs once with torch's layers and once with each of ours. `compatibility_page.py` writes the
outcomes as a page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_matrix import is_ours
from parity import SHARDED
from tp_embed import OutputHead, StandardEmbedding, shard_embeddings
from tp_embed.gang.collectives import gather_table

ROWS, DIM = 7, 5
KINDS = ("standard", "embed", "vocab")
SIZES = (1, 2, 3)

Seen = Sequence[Any]


@dataclass(frozen=True)
class Case:
    """``users_do`` is the docstring of the function, ``topic`` its heading on the page."""

    name: str
    topic: str
    users_do: str
    function: Callable[[World], Seen]

    def __str__(self) -> str:
        return self.name


def cases_of(topic: str, functions: Mapping[str, Any]) -> list[Case]:
    """Returns the functions of a module that have a docstring and take only a world."""
    return [
        Case(name, topic, function.__doc__, function)
        for name, function in functions.items()
        if callable(function)
        and getattr(function, "__doc__", None)
        and list(getattr(function, "__annotations__", ())) == ["world", "return"]
        and not name.startswith("_")
    ]


class World:
    """Makes layers with the same values everywhere: torch's without a gang, else ours.

    :param kind: "standard", "embed" or "vocab".
    """

    def __init__(self, kind: str, gang: Any = None) -> None:
        self.kind, self.gang = kind, gang

    @property
    def is_torch(self) -> bool:
        return self.gang is None

    def embedding(self, **options: Any) -> Any:
        table = noise(ROWS, DIM)
        if self.is_torch:
            return nn.Embedding(ROWS, DIM, options.pop("pad_idx", None), _weight=table, **options)
        standard = StandardEmbedding(ROWS, DIM, **options)
        with torch.no_grad():
            standard.weight.copy_(table)
        if self.kind == "standard":
            return standard
        return SHARDED[self.kind].from_embedding(standard, self.gang)

    def head(self, embed: Any) -> Any:
        """Returns a head tied to ``embed``."""
        if not self.is_torch and self.kind != "standard":
            return OutputHead(embed)
        head = nn.Linear(DIM, ROWS, bias=False)
        head.weight = embed.weight
        return head

    def model(self, **options: Any) -> Model:
        embed = self.embedding(**options)
        return Model(embed, self.head(embed))

    def shard(self, model: nn.Module, **options: Any) -> nn.Module:
        """Shards a plain model by `shard_embeddings()`."""
        if not self.is_torch and self.kind != "standard":
            shard_embeddings(model, self.gang, strategy=self.kind, **options)
        return model

    def plain_model(self) -> Model:
        """Returns a model of torch's layers."""
        return World("torch").model()

    def whole(self, embed: Any, block: Tensor | None = None) -> Tensor:
        """Gathers ``block``, shaped like the weight of ``embed``, over the gang."""
        block = plain(embed.weight if block is None else block)
        if self.is_torch or not isinstance(embed, tuple(SHARDED.values())):
            return block.clone()
        table: Any = embed
        whole = block.new_empty(ROWS, DIM)
        gather_table(whole, block, table.shard_dim, self.gang, table.partition)
        return whole


class Model(nn.Module):
    def __init__(self, embed: Any, head: Any) -> None:
        super().__init__()
        self.embed = embed
        self.mix = nn.Linear(DIM, DIM)
        with torch.no_grad():
            self.mix.weight.copy_(noise(DIM, DIM, seed=3))
            self.mix.bias.copy_(noise(DIM, seed=4))
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(self.embed(ids)).tanh())
        return logits

    def loss(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(ids).flatten(0, -2), ids.flatten())


def plain(block: Tensor) -> Tensor:
    """Returns a shard as a plain dense tensor, without its gradient."""
    if hasattr(block, "to_local"):
        block = block.to_local()
    return block.detach().to_dense()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids() -> Tensor:
    return torch.tensor([[1, 6, 1, 3], [0, 2, 5, 1]])


def outcome(gang: Any, kind: str, case: Case) -> str:
    """Returns "same", "error as in torch", "refused: ..." or "FAILED: ..." for this rank."""
    warnings.simplefilter("ignore")
    expected, reference_error = _attempt(case, World(kind))
    found, error = _attempt(case, World(kind, gang))
    if error is not None and reference_error is not None:
        return "error as in torch"
    if reference_error is not None:
        return f"FAILED: torch raises {_text(reference_error)}"
    if error is not None:
        # Torch collects the errors of `load_state_dict()` and raises them itself.
        ours = is_ours(error) or "tp_embed." in str(error)
        return f"refused: {_text(error)}" if ours else f"FAILED: {_text(error)}"
    assert found is not None
    assert expected is not None
    if len(found) != len(expected):
        return f"FAILED: {len(found)} results for {len(expected)}"
    for i, (actual, torchs) in enumerate(zip(found, expected, strict=True)):
        try:
            torch.testing.assert_close(actual, torchs, rtol=1e-5, atol=1e-5)
        except AssertionError:
            return f"FAILED: result {i} is {_numbers(actual)} for {_numbers(torchs)}"
    return "same"


def _attempt(case: Case, world: World) -> tuple[Seen | None, Exception | None]:
    torch.manual_seed(0)
    try:
        return case.function(world), None
    except Exception as error:
        return None, error


def _numbers(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {[round(x, 4) for x in tensor.flatten()[:6].tolist()]}"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

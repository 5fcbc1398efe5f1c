"""Reports what `shard_embeddings()` did, table by table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TableReport:
    """The result for one table: its name in the model, logical sizes, the strategy, the names of
    heads and tables that share it, its bytes on one rank now and before, and a note."""

    name: str
    num_embeddings: int
    embed_dim: int
    strategy: str
    tied: tuple[str, ...]
    bytes_per_rank: int
    bytes_replicated: int
    note: str = ""

    def __str__(self) -> str:
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.name} ({self.num_embeddings} x {self.embed_dim}): strategy '{self.strategy}'"
            f"{note}{tied}; {self.bytes_per_rank / 2**20:.2f} MiB on this rank, "
            f"{self.bytes_replicated / 2**20:.2f} MiB if replicated"
        )


@dataclass(frozen=True)
class ShardingReport:
    """The result of :func:`shard_embeddings`, table by table."""

    tables: tuple[TableReport, ...]

    @property
    def bytes_per_rank(self) -> int:
        """The bytes of all tables on this rank, without gradients and optimizer states, which
        shrink by the same factor."""
        return sum(table.bytes_per_rank for table in self.tables)

    @property
    def bytes_replicated(self) -> int:
        """The bytes of the same tables if every rank holds them whole."""
        return sum(table.bytes_replicated for table in self.tables)

    def __str__(self) -> str:
        if not self.tables:
            return "no embedding tables"
        saved = self.bytes_replicated - self.bytes_per_rank
        summary = (
            f"saves {saved / 2**20:.2f} of {self.bytes_replicated / 2**20:.2f} MiB on this rank, "
            "and the same share of gradients, master copies and optimizer states"
        )
        return "\n".join([*map(str, self.tables), summary])

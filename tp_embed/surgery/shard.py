"""Replaces the embedding tables of a model, and heads tied to them, by sharded ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.gang import Gang
from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.options import GradReduction, Output
from tp_embed.lookup.train_rows import Rows
from tp_embed.nn.embedding import InitFn, Placement
from tp_embed.nn.head import Input
from tp_embed.nn.tiled_values import Deterministic
from tp_embed.surgery.optimizer import Groups
from tp_embed.surgery.options import ShardingOptions, Strategy
from tp_embed.surgery.plan import agree_on_plan, plan_sharding
from tp_embed.surgery.report import ShardingReport


def shard_embeddings(
    model: Module,
    gang: Gang,
    *,
    strategy: Strategy = "auto",
    rules: Mapping[str, Strategy] | None = None,
    tie_head: bool = True,
    shard_head: bool = True,
    output: Output = "replicated",
    head_input: Input = "replicated",
    head_deterministic: Deterministic = None,
    dedup: Dedup = "auto",
    sparse: bool | None = None,
    reuse_grad: bool | None = None,
    check_ids: int | None = None,
    init_fn: InitFn | None = None,
    train_rows: Mapping[str, Rows] | None = None,
    placement: Placement = "block",
    grad_reduction: GradReduction = "sum",
    world: Gang | None = None,
    optimizer: Optimizer | None = None,
    parameters: Groups | None = None,
) -> ShardingReport:
    """Shards every ``nn.Embedding`` and :class:`StandardEmbedding` of ``model`` over ``gang``, in
    place. A ``nn.Linear`` that shares the table becomes an :class:`OutputHead`.

    Keeps ``requires_grad``, dtype, device, hooks and attributes of the modules, and plain
    attributes of the Parameter. Without ``init_fn`` it keeps the values too: every rank cuts its
    block out of its own table. A replaced module raises when called.

    All ranks of the gang must call it. Before anything changes, they compare their plans in an
    all-gather of about a kilobyte: either all continue, or all raise. Call it before an engine is
    built, which would keep the old Parameters; pass an existing optimizer as ``optimizer``.

    :param model: the model. It is unchanged if an error is raised.
    :param gang: the tensor-parallel gang.
    :param strategy: ``"embed"`` shards the embedding dimension, ``"vocab"`` the vocabulary,
        ``"none"`` leaves tables whole. ``"world"`` shards the vocabulary over all processes, each
        with ids of its own, see :class:`RowWiseEmbedding`. ``"auto"`` uses ``"vocab"`` for tables
        tied to a head, whose logits are then gathered and not summed, and ``"embed"``, which sends
        half as much, for others.
    :param rules: strategies by :mod:`fnmatch` patterns on table names; the first match counts:
        ``{"*.wpe": "none"}``. Embeddings that share a Parameter are one table with several names.
        The full name of an untied ``nn.Linear`` selects it as an output head.
    :param tie_head: whether to shard tables tied to a head, together with it; if not, they stay
        whole unless a rule names them.
    :param shard_head: whether to shard an untied ``model.get_output_embeddings()``: over the
        vocabulary, unless a rule names it.
    :param output: the layout of the outputs of all embeddings, position embeddings included; see
        :class:`ShardedEmbedding`. Anything but ``"replicated"`` needs a model written for it.
    :param head_input: what all heads, tied or not, take: hidden states of all positions, the same
        on every rank, or with ``"sequence"`` those of the rank's positions, see
        :class:`OutputHead`.
    :param head_deterministic: with ``"topology"``, values and gradients of all heads have the same
        bits at every size of the gang, see :class:`OutputHead`.
    :param dedup: whether to send a row once if several positions need it, see
        :class:`ShardedEmbedding`.
    :param sparse: whether gradients are sparse; ``None`` keeps each table's setting.
    :param reuse_grad: whether dense gradients reuse the same memory, see
        :class:`ShardedEmbedding`, also for when not to; ``None`` keeps each table's setting.
    :param check_ids: at which lookups ranks compare their ids, see :class:`ShardedEmbedding`.
    :param init_fn: reinitializes every table, sharded or not, to the same values for each strategy.
        Untied heads keep their values.
    :param train_rows: the rows that get a gradient, by patterns on table names:
        ``{"*.embed_tokens": slice(32000, None)}``; see :class:`StandardEmbedding`.
    :param placement: which rows a rank holds of tables with the strategy ``"world"``; see
        :class:`RowWiseEmbedding`, ``grad_reduction`` likewise.
    :param world: the gang for the strategy ``"world"``; if ``None``, all processes of the run. Its
        ranks compare those tables too.
    :param optimizer: an optimizer over the Parameters of ``model``. Its Parameters are replaced,
        and its states cut to the shards.
    :param parameters: a list of Parameters or parameter groups; they are replaced in place.
    :raises ValueError: a strategy, rule or option is unknown, a rule matches no table, or a table
        cannot be sharded: it has options, ties, or hooks and attributes of its Parameter that
        would be lost; see :func:`tp_embed.shardwise` for hooks. ``optimizer`` looks at whole
        matrices, as Adafactor, LAMB and Muon do, or has states that cannot be cut.
    :raises TypeError: the class of a table overrides ``forward``, which would be lost.
        ``parameters`` is no list.
    :raises IndexError: ``train_rows`` names a row that a table does not have.
    :raises GangError: the ranks disagree on strategies, sizes, dtypes, or the values of a table, or
        another rank has failed.
    """
    options = ShardingOptions(
        strategy=strategy,
        rules=rules or {},
        tie_head=tie_head,
        shard_head=shard_head,
        output=output,
        head_input=head_input,
        head_deterministic=head_deterministic,
        dedup=dedup,
        sparse=sparse,
        reuse_grad=reuse_grad,
        check_ids=check_ids,
        init_fn=init_fn,
        train_rows=train_rows,
        placement=placement,
        grad_reduction=grad_reduction,
    )
    world = (world or gang.world()) if options.uses_world else None
    plan = agree_on_plan(
        model,
        gang,
        lambda facts: plan_sharding(
            model, gang, options, optimizer=optimizer, parameters=parameters, world=world
        ),
        world,
    )
    return plan.apply()

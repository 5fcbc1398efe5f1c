"""Replaces the embedding tables of a model by sharded ones, with the heads tied to them."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Module
from torch.optim import Optimizer

from tp_embed.gang import Gang
from tp_embed.lookup.exchange import Dedup
from tp_embed.lookup.options import Output
from tp_embed.lookup.train_rows import Rows
from tp_embed.nn.embedding import InitFn
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
    dedup: Dedup = "auto",
    sparse: bool | None = None,
    reuse_grad: bool | None = None,
    check_ids: int | None = None,
    init_fn: InitFn | None = None,
    train_rows: Mapping[str, Rows] | None = None,
    optimizer: Optimizer | None = None,
    parameters: Groups | None = None,
) -> ShardingReport:
    """Replaces every ``nn.Embedding`` and :class:`StandardEmbedding` of ``model``, in place, by one
    that is sharded over ``gang``; a ``nn.Linear`` that shares the table becomes an
    :class:`OutputHead`. ``requires_grad``, dtype, device, the hooks and attributes of the modules
    and the plain attributes of the Parameter stay. So do the values, unless there is an
    ``init_fn``: every rank cuts its block out of the table that it has. A module that was replaced
    raises when it is called.

    All ranks of the gang have to call it. They meet before anything changes, by an all-gather of
    about a kilobyte, and compare what they are about to do: either all go on, or all raise. Call it
    before an engine is built, which would keep the old Parameters; an optimizer that is there
    already is passed as ``optimizer``.

    :param model: the model. It is left as it was if an error is raised.
    :param gang: the tensor-parallel gang.
    :param strategy: ``"embed"`` shards the embedding dimension, ``"vocab"`` the vocabulary,
        ``"none"`` leaves tables as they are. ``"auto"`` takes ``"vocab"`` for tables that are tied
        to a head, whose logits are then gathered and not summed, and else ``"embed"``, which
        sends half of what ``"vocab"`` does.
    :param rules: strategies for the tables of which a name matches a pattern as in
        :mod:`fnmatch`, the first match counts: ``{"*.wpe": "none"}``. Embeddings that share a
        Parameter are one table with several names. The full name of a ``nn.Linear`` that is tied
        to no table makes it a table of its own: an output head.
    :param tie_head: whether tables that are tied to a head are sharded, together with it; if not,
        they are left whole unless a rule names them.
    :param shard_head: whether the output head that ``model.get_output_embeddings()`` names is
        sharded if it is tied to no table: over the vocabulary, unless a rule names it.
    :param output: the layout of what all embeddings give, those of positions too, see
        :class:`ShardedEmbedding`. For anything but ``"replicated"`` the model has to be written for
        it. Heads, tied or not, take hidden states that are whole and the same on every rank.
    :param dedup: whether a row is sent once that several positions want, see
        :class:`ShardedEmbedding`.
    :param sparse: whether gradients are sparse; if ``None``, where they were.
    :param reuse_grad: whether dense gradients are put into the same memory, one after the other,
        see :class:`ShardedEmbedding`, which also says when not to; if ``None``, where they were.
    :param check_ids: at which lookups ranks compare their ids, see :class:`ShardedEmbedding`.
    :param init_fn: initializes every table anew, those that are not sharded too, to the same values
        for each strategy. Heads that are tied to no table keep their values.
    :param train_rows: the rows that get a gradient, for tables of which a name matches a pattern:
        ``{"*.embed_tokens": slice(32000, None)}``; see :class:`StandardEmbedding`.
    :param optimizer: an optimizer over the Parameters of ``model``; it gets the new ones, with its
        states cut to the shards.
    :param parameters: a list of Parameters or parameter groups; likewise, in place.
    :raises ValueError: a strategy, rule or option is unknown, a rule matches no table, or a table
        cannot be sharded: it has options, ties, or hooks and attributes of its Parameter that
        would be lost; see :func:`tp_embed.shardwise` for hooks. ``optimizer`` looks at whole
        matrices, as Adafactor, LAMB and Muon do, or has states that cannot be cut.
    :raises TypeError: a table is of a class with a ``forward`` of its own, which would be lost.
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
        dedup=dedup,
        sparse=sparse,
        reuse_grad=reuse_grad,
        check_ids=check_ids,
        init_fn=init_fn,
        train_rows=train_rows,
    )
    plan = agree_on_plan(
        model,
        gang,
        lambda facts: plan_sharding(
            model, gang, options, optimizer=optimizer, parameters=parameters
        ),
    )
    return plan.apply()

"""Writes docs/compatibility.md from the outcomes of the cases.

python tests/support/compatibility_page.py
"""

from __future__ import annotations

import re
from functools import cache
from itertools import groupby

import compatibility_autograd
import compatibility_logits
import compatibility_tools
import compatibility_weight
from compatibility import KINDS, SIZES, Case, cases_of, outcome
from compatibility_elsewhere import ELSEWHERE
from launch import ROOT
from pool import Pool, RankError

PAGE = ROOT / "docs" / "compatibility.md"

CASES = [
    *cases_of("Outputs, gradients and transforms", vars(compatibility_autograd)),
    *cases_of("The weight, its gradient and its state", vars(compatibility_weight)),
    *compatibility_logits.logits_cases(),
    *cases_of("Losses from the weight of a head", vars(compatibility_logits)),
    *compatibility_tools.optimizer_cases(),
    *cases_of("Tools around a model", vars(compatibility_tools)),
]

NAMES = {
    "standard": "`StandardEmbedding`",
    "embed": "`ShardedEmbedding`",
    "vocab": "`VocabShardedEmbedding`",
}


HEAD = """# What works as with nn.Embedding and nn.Linear

Look up what you do with a table or its output head. *Same*: it gives the numbers of `nn.Embedding`
and `nn.Linear` in one process, to a relative 1e-5 in fp32. *Refused*: it raises an error, which
says what to do instead. *Error as in torch*: it raises with torch's layers too.

What torch lets nobody notice, and so gives this rank's part in silence:

- `weight.shape`, `size()` and `numel()` are the shard's. Take `embed.num_embeddings` and
  `embed.embed_dim`, `head.out_features` and `head.in_features`.
- Slices of a flat view, `weight.view(-1)[a:b]`, are plain tensors, as the flat buffers of
  optimizers need them.
- `torch.tensor(weight)` and `weight.chunk(...)`, results of `torch._foreach_*` that are not in
  place, and products inside `torch.func` transforms of the weight itself.
- `torch.equal` and `torch.allclose` compare shards.
- Kernels that read the weight by its address.

[1] The message goes on with what fits the case: call the layer, `embed(ids)`, `head(x)`,
`head.loss(x, target)`; take `weight.full_tensor()`, on all ranks; for this rank's part on purpose
take `weight.to_local()`; or leave the table whole by `rules={name: 'none'}`, or the head by
`shard_head=False`.

[2] Such logits were not computed, so that they take no memory. The message goes on with what they
support, and with how to get whole logits: leave out the labels, call `model.eval()`, or turn off
`fuse_loss`. From hidden states take `head.loss()`, `log_probs()`, `entropy()`, `kl_divergence()`
and `top_k()`.

[3] Each rank has the logits of its classes only. The message goes on with the same functions of
hidden states, and `tp_embed.nn.loss.cross_entropy()` of the logits.

P is the number of ranks that a table is cut over. Cases run at P = 1, 2 and 3, with
`StandardEmbedding`, `ShardedEmbedding`, `VocabShardedEmbedding` and `OutputHead`.
`python tests/support/compatibility_page.py` runs them and writes this page; the names of the cases
are in `tests/support/compatibility_*.py`.
"""


@cache
def find_outcomes(pool: Pool, case: Case, kind: str, size: int) -> str:
    """Returns the outcome of a case on all ranks; see :func:`compatibility.outcome`."""
    try:
        ranks = pool(size, outcome, kind, case, timeout=30)
    except RankError as error:
        return f"FAILED: {str(error)[-300:]}"
    if any("failed on rank" in rank for rank in ranks):
        pool.stop()  # The ranks may be at different collectives.
    if len({rank.split(":")[0] for rank in ranks}) > 1:
        return f"FAILED: the ranks differ: {ranks}"
    return next((rank for rank in ranks if rank.startswith("FAILED")), ranks[0])


def page(pool: Pool) -> str:
    lines = [HEAD]
    for topic, cases in groupby(CASES, lambda case: case.topic):
        lines += [f"## {topic}", "", "| What users do | What happens | Case |", "|---|---|---|"]
        lines += [f"| {c.users_do} | {_cell(pool, c)} | `{c.name}` |" for c in cases]
        lines.append("")
    if ELSEWHERE:
        lines += ["## Engines, models and launchers", ""]
        lines += ["| What users do | What happens | P | Test |", "|---|---|---|---|"]
        lines += [f"| {r.users_do} | {r.happens} | {r.sizes} | `{r.test}` |" for r in ELSEWHERE]
    return "\n".join(lines).rstrip() + "\n"


def _cell(pool: Pool, case: Case) -> str:
    """Returns the outcomes, with the classes and sizes of each."""
    found: dict[str, list[tuple[str, int]]] = {}
    for kind in KINDS:
        for size in SIZES:
            text = _without_places(find_outcomes(pool, case, kind, size))
            found.setdefault(text, []).append((kind, size))
    if len(found) == 1:
        text = next(iter(found))
        return text[0].upper() + text[1:]
    return "<br>".join(f"{_where(where)}: {text}" for text, where in found.items())


def _where(where: list[tuple[str, int]]) -> str:
    if {size for _, size in where} == {2, 3} and {kind for kind, _ in where} == {"embed", "vocab"}:
        return "P > 1"
    if len(where) == len(KINDS) * len(SIZES) - 4:
        return "P = 1"
    by_kind = {kind: [size for k, size in where if k == kind] for kind, _ in where}
    return ", ".join(
        NAMES[kind] + ("" if len(sizes) == len(SIZES) else f" at P = {', '.join(map(str, sizes))}")
        for kind, sizes in by_kind.items()
    )


def _without_places(text: str) -> str:
    """Removes parts of an outcome that differ between ranks or machines."""
    text = re.sub(r",? on (rank \d+ of )?\w*Gang\([^)]*\)", "", text)
    text = re.sub(r"shape \(\d*,? ?\d*\)", "shape (...)", text)
    text = re.sub(r"(rows|columns) \d+:\d+ of \d+", "rows or columns ...", text)
    text = re.sub(r": a tensor of the shape .*? for an output head\.", " [1].", text)
    text = re.sub(r", which were not computed: `cross_entropy` takes them .*", " [2]", text)
    text = re.sub(r" of all classes, but is given those of this rank's instead, .*", " [3]", text)
    text = re.sub(r"`\w+Embedding`", "`...Embedding`", text)
    kind, colon, message = " ".join(text.split()).partition(": ")
    return f"*{kind}*: {message.replace('|', '/')[:600]}" if colon else kind


def main() -> None:
    pool = Pool()
    PAGE.write_text(page(pool))
    failed = [line for line in PAGE.read_text().splitlines() if "FAILED" in line]
    print(*failed, f"{len(failed)} of {len(CASES)} cases fail", sep="\n")
    pool.stop()


if __name__ == "__main__":
    main()

"""Trains models of the zoo whole and sharded, and compares the results.

python tests/support/model_matrix.py [--markdown PAGE] [family ...]
"""

from __future__ import annotations

import argparse
import copy
import re
import traceback
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

import model_zoo
from launch import ROOT
from pool import Pool, RankError
from tp_embed import shard_embeddings
from tp_embed.checkpoint import full_state_dict

STRATEGIES = ("embed", "vocab", "auto")
SIZE = 2
# Sharded heads sum in another order. Relative to the largest value, and to the largest change.
# All is rounding: models that run in fp64 agree to 1e-10 and 1e-9 there.
OF_VALUES, OF_CHANGES = 1e-5, 1e-4
OURS = tuple(f"{ROOT}/{name}/" for name in ("tp_embed", "integrations"))


@dataclass(frozen=True)
class Outcome:
    """``what`` is "same", "refused", "failed", or "not built": the whole model does not train."""

    what: str
    message: str = ""


@dataclass(frozen=True)
class Whole:
    """A model before training, and the results of training it."""

    model: nn.Module
    batch: dict[str, Tensor]
    losses: list[float]
    state: dict[str, Tensor]


@lru_cache(maxsize=1)
def whole_of(family: str) -> Whole | Outcome:
    transformers.logging.set_verbosity_error()
    try:
        return _train_whole(model_zoo.build(family))
    except Exception as error:
        return Outcome("not built", _short(error))


def train(gang: Any, family: str, strategy: Any) -> Outcome:
    """Returns the outcome of a family on this rank."""
    whole = whole_of(family)
    return whole if isinstance(whole, Outcome) else _train_sharded(gang, whole, strategy)


def _train_whole(model: nn.Module) -> Whole:
    if not any(isinstance(module, nn.Embedding) for module in model.modules()):
        raise ValueError("It has no tables.")
    first: Exception | None = None
    for batch in model_zoo.inputs(model):
        whole = copy.deepcopy(model)
        try:
            losses = model_zoo.train(whole, batch)
        except Exception as error:
            first = first or error
            continue
        if all(abs(loss) < 1e6 for loss in losses) and losses[0] != losses[1]:
            return Whole(model, batch, losses, whole.state_dict())
    raise first or ValueError("No inputs were found that train it.")


def _train_sharded(gang: Any, whole: Whole, strategy: Any) -> Outcome:
    rules: dict[str, Any] = {}
    while True:
        model = copy.deepcopy(whole.model)
        try:
            shard_embeddings(model, gang, strategy=strategy, rules=rules)
            losses = model_zoo.train(model, whole.batch)
            state = full_state_dict(model)
            break
        except Exception as error:
            # Follow the advice of the message, as a user would.
            advised = re.search(r"`rules=\{'(.+?)': 'none'\}`", str(error))
            if not is_ours(error):
                return Outcome("failed", _short(error))
            if advised is None or advised[1] in rules:
                return Outcome("refused", _short(error))
            rules[advised[1]] = "none"
    found = _differences(losses, state, whole)
    if found:
        return Outcome("failed", "; ".join(found))
    return Outcome("same", f"with `rules={rules}`") if rules else Outcome("same")


def _differences(losses: list[float], state: dict[str, Tensor] | None, whole: Whole) -> list[str]:
    """Returns differences from the whole model; a rank without a state compares losses."""
    found = [
        f"loss {a} for {b}"
        for a, b in zip(losses, whole.losses, strict=True)
        if not abs(a - b) <= OF_VALUES * max(1.0, abs(b))
    ]
    if state is None:
        return found
    if different := sorted(state.keys() ^ whole.state.keys()):
        found.append(f"keys {different}")
    before = whole.model.state_dict()
    keys = sorted(k for k in state.keys() & whole.state.keys() if state[k].is_floating_point())
    moved = {key: _difference(whole.state[key], before[key]) for key in keys}
    most = max(moved.values())
    for key in keys:
        ours, expected = state[key], whole.state[key]
        if ours.shape != expected.shape:
            found.append(f"{key} is of {tuple(ours.shape)} for {tuple(expected.shape)}")
            continue
        size = (
            float(expected.abs().max()) if expected.isfinite().all() and expected.numel() else 0.0
        )
        tolerance = OF_VALUES * max(size, most) + OF_CHANGES * moved[key]
        if not _difference(ours, expected) <= tolerance:
            found.append(f"{key} differs by {_difference(ours, expected):.1e}")
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference; equal infinities and NaNs count as equal."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).masked_fill(same, 0.0).abs().max()) if a.numel() else 0.0


def is_ours(error: Exception) -> bool:
    """Returns whether our code raised it on purpose, and not because a rank was missing."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    on_purpose = last.filename.startswith(OURS) and "raise" in (last.line or "")
    return on_purpose and not re.search("failed on rank .* of ", str(error))


def _short(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if is_ours(error) else f" ({Path(last.filename).name}:{last.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{where}"


def run(pool: Pool, family: str, strategy: str) -> Outcome:
    """Returns the outcome of a family; a failure on any rank counts."""
    try:
        seen = pool(SIZE, train, family, strategy, timeout=120)
    except RankError as error:
        return Outcome("failed", str(error)[:600])
    failed = [outcome for outcome in seen if outcome.what == "failed"]
    if failed:
        if len({outcome.message for outcome in seen}) > 1:
            pool.stop()  # They may be at different collectives.
        return failed[0]
    if len({outcome.what for outcome in seen}) > 1:
        return Outcome("failed", f"The ranks differ: {seen}")
    return seen[0]


def markdown(results: dict[str, dict[str, Outcome]]) -> str:
    """Formats the results as a table, with differences first."""
    built = {f: o for f, o in results.items() if o["embed"].what != "not built"}
    lines = [f"{len(built)} of {len(results)} families train whole.", ""]
    lines += ["| family | class | embed | vocab | auto | message |", "|---|---|---|---|---|---|"]

    def order(item: tuple[str, dict[str, Outcome]]) -> tuple[int, str]:
        kinds = {outcome.what for outcome in item[1].values()}
        return (0 if "failed" in kinds else 1 if "refused" in kinds else 2), item[0]

    classes = model_zoo.families()
    for family, outcomes in sorted(built.items(), key=order):
        messages = dict.fromkeys(o.message.replace("|", "\\|") for o in outcomes.values())
        whats = " | ".join(
            o.what.upper() if o.what == "failed" else o.what for o in outcomes.values()
        )
        lines.append(
            f"| {family} | {classes[family]} | {whats} | {' // '.join(filter(None, messages))} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--markdown", type=Path, help="write the table")
    arguments = parser.parse_args()
    pool = Pool()
    results = {}
    for family in arguments.families or model_zoo.families():
        results[family] = {strategy: run(pool, family, strategy) for strategy in STRATEGIES}
        kinds = {s: o.what for s, o in results[family].items()}
        messages = dict.fromkeys(o.message for o in results[family].values() if o.message)
        print(family, kinds, *messages, flush=True)
        if arguments.markdown:
            arguments.markdown.write_text(markdown(results))
    pool.stop()


if __name__ == "__main__":
    main()

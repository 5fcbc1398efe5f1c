"""Run by the `deepspeed` launcher on two ranks for test_table_saves.py: engines with a table that
has an optimizer of its own, in memory or in files, load what does not fit. Saves what was seen."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import row_tables_job as job
from mapped_tables_job import make, table_of
from tp_embed.integrations.deepspeed import export, initialize, load_universal, to_universal

KIND = "rowwise_adagrad"
WAYS = "memory", "files"


def engine_of(
    out: Path, way: str, name: str, stage: int = 1, half: str | None = None, **options: Any
) -> Any:
    return make(stage, half, KIND, out / way / name if way == "files" else None, **options)


def close(engine: Any) -> None:
    for mapped in engine.tp_embed_tables.mapped.values():
        mapped.close()


def train(engine: Any) -> list[float]:
    losses: list[float] = job.train(engine, job.batches(dist.get_rank()))["losses"]
    return losses


def on_rank_0(action: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def refused(engine: Any, load: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What an engine says that loads what it must not, and whether it has changed."""

    def values() -> list[torch.Tensor]:
        tables = [table_of(engine)] if hasattr(engine, "tp_embed_tables") else []
        return [*tables, engine.module.mix.weight.detach().clone()]

    before, error = values(), "nothing was refused"
    try:
        load(*args, **kwargs)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    same = [torch.equal(*pair) for pair in zip(before, values(), strict=True)]
    return {"error": error, "table": same[0], "model": same[-1]}


def two_saves(out: Path, way: str) -> dict[str, Any]:
    """A save under the tag of another one, that ends when the tables are written, or before."""
    saved, tag = out / way / "two", out / way / "two" / "last"
    engine = engine_of(out, way, "a")
    train(engine)
    engine.save_checkpoint(str(saved), tag="last")
    on_rank_0(lambda: shutil.copytree(tag, out / way / "first"))
    train(engine)
    engine.save_checkpoint(str(saved), tag="last")

    def restore_model() -> None:
        for file in (out / way / "first").glob("*.pt"):
            shutil.copy(file, tag / file.name)

    on_rank_0(restore_model)
    seen: dict[str, Any] = {"converted": "nothing was refused"}
    if dist.get_rank() == 0:
        try:
            to_universal(saved, out / way / "converted")
        except Exception as e:
            seen["converted"] = str(e)
    close(engine)
    again = engine_of(out, way, "b")
    train(again)
    seen["two"] = refused(again, again.load_checkpoint, str(saved), tag="last")
    on_rank_0(lambda: (tag / "tp_embed_tables.json").unlink(missing_ok=True))
    seen["no note"] = refused(again, again.load_checkpoint, str(saved), tag="last")
    close(again)
    return seen


def rates(out: Path, way: str) -> list[Any]:
    """A learning rate that was changed is saved."""
    engine = engine_of(out, way, "c", lr=0.3)
    (group,) = engine.tp_embed_tables.optimizers["ngram"].param_groups
    group |= {"lr": 0.003, "weight_decay": 0.01}
    train(engine)
    engine.save_checkpoint(str(out / way / "rates"), client_state={"mine": 3})
    expected = train(engine)
    close(engine)
    again = engine_of(out, way, "d", lr=0.3)
    _, client = again.load_checkpoint(str(out / way / "rates"))
    (found,) = again.tp_embed_tables.optimizers["ngram"].param_groups
    seen: list[Any] = [{k: v for k, v in g.items() if k != "params"} for g in (group, found)]
    seen += [expected, train(again), client["mine"], "tp_embed_save" in client]
    close(again)
    return seen


def tags(out: Path, way: str) -> dict[str, Any]:
    """The second rank does not see the checkpoint."""
    engine = engine_of(out, way, "e", stage=0)
    train(engine)
    engine.save_checkpoint(str(out / way / "tags"))
    folder = str(out / way / ("tags" if dist.get_rank() == 0 else "nothing"))
    seen = refused(engine, engine.load_checkpoint, folder)
    close(engine)
    return seen


def plain(out: Path) -> Any:
    config = job.config(0, {})
    config["tp_embed"] = {"rules": {"ngram": "world"}}
    return initialize(model=job.build(), config=config)[0]


def others(out: Path) -> dict[str, Any]:
    """Checkpoints of engines that keep the table in another way."""
    seen: dict[str, Any] = {}
    on_rank_0(lambda: to_universal(out / "memory" / "rates", out / "universal"))
    for stage in (0, 1):
        engine = engine_of(out, "files", f"universal{stage}", stage)
        train(engine)
        seen[f"universal {stage}"] = refused(engine, load_universal, engine, out / "universal")
        close(engine)
    engine = engine_of(out, "files", "f", 0)
    train(engine)
    saved = {"in memory": out / "memory" / "tags", "engine's": out / "plain"}
    without = plain(out)
    without.save_checkpoint(str(out / "plain"))
    for name, path in saved.items():
        seen[name] = refused(engine, engine.load_checkpoint, str(path))
    engine.save_checkpoint(str(out / "whole"), tag="t")
    snapshot = out / "whole" / "t" / "tp_embed_mapped_tables" / "ngram"
    on_rank_0(lambda: (snapshot / "rank-1-of-2").rename(snapshot / "rank-1-of-3"))
    train(engine)
    seen["a rank"] = refused(engine, engine.load_checkpoint, str(out / "whole"), tag="t")
    close(engine)
    memory = engine_of(out, "memory", "", 0)
    seen["in files"] = refused(memory, memory.load_checkpoint, str(out / "files" / "tags"))
    for way in WAYS:
        folder = str(out / way / ("tags" if dist.get_rank() == 0 else "nothing"))
        seen[f"no tables, {way}"] = refused(without, without.load_checkpoint, folder)
    seen["no tables, universal"] = refused(without, load_universal, without, out / "universal")
    return seen


def exported(out: Path) -> list[Any]:
    """The fp32 values of a table in files, before a step and after."""
    seen = []
    engine = engine_of(out, "files", "bf16", 1, "bf16")
    optimizer, weight = engine.tp_embed_tables.optimizers["ngram"], engine.module.ngram.weight
    for i in range(2):
        export(engine, out / f"export{i}", dtype=torch.float32)
        seen.append(optimizer.master(weight).clone())
        train(engine)
    close(engine)
    return seen


def old_table(out: Path) -> None:
    """A new model with the table of a run that was killed, and one that loads a checkpoint."""
    engine = engine_of(out, "files", "old")
    print("RUN 1")
    train(engine)
    engine.save_checkpoint(str(out / "old"))
    close(engine)
    for run in (2, 3):
        engine = engine_of(out, "files", "old")
        print(f"RUN {run}")
        if run == 2:
            engine.load_checkpoint(str(out / "old"))
        train(engine)
        close(engine)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    seen: dict[str, Any] = {}
    for way in WAYS:
        seen[way] = {"saves": two_saves(out, way), "rates": rates(out, way), "tags": tags(out, way)}
    seen |= {"others": others(out), "exported": exported(out)}
    old_table(out)
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

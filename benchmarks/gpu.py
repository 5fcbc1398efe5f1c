"""Runs the checks and timings for a machine with one GPU:

    PYTHONPATH=. python benchmarks/gpu.py

Needs torch with CUDA and this repository, which need not be installed, and takes a few minutes.
Prints a line for each check and a table of times next to torch's own layers. `--output` writes both
to a directory, as a page and as JSON. `--device cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from token_ids import draw

TORCH = (2, 13)  # The minimum in pyproject.toml.

try:
    import cuda_checks  # noqa: F401 (registers its checks)
    from accelerator import DTYPES, Step, copy_step, measure, name_of, steps, to_markdown, training
    from accelerator_checks import checks_of
    from tp_embed import FakeGang, OutputHead, StandardEmbedding, VocabShardedEmbedding
except ImportError as e:
    sys.exit(f"tp_embed needs torch {TORCH[0]}.{TORCH[1]} or later and safetensors: {e}.")


def run_checks(device: str) -> dict[str, str | None]:
    """Runs the checks. Returns ``None`` or the failure for each."""
    found: dict[str, str | None] = {}
    for name, check in checks_of(device).items():
        torch.manual_seed(0)
        started, text = time.monotonic(), None
        try:
            check(device)
        except Exception as e:
            traceback.print_exc()
            text = f"{type(e).__name__}: {e}"
        found[name] = text
        result = "FAILED" if text else "ok"
        words = name.replace("_", " ")
        print(f"{result:<7}{words} ({time.monotonic() - started:.1f} s)", flush=True)
    return found


def peak_bytes(device: str, run: Callable[[], object]) -> int | None:
    """Returns the peak of device memory during ``run``, above the memory in use before."""
    if torch.device(device).type == "cpu":
        return None
    run()
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    run()
    torch.accelerator.synchronize()
    return int(torch.accelerator.max_memory_allocated() - before)


def comparisons(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Returns our layers and torch's as functions to time, by name."""
    device, vocab, dim, tokens = args.device, args.vocab, args.dim, args.tokens
    options: dict[str, Any] = {"device": device, "dtype": DTYPES[args.dtype]}
    ids = draw(args.ids, vocab, (tokens,)).to(device)
    grad = torch.randn(tokens, dim, **options)
    whole = torch.nn.Embedding(vocab, dim, **options)
    ours = StandardEmbedding(vocab, dim, **options)
    gang = FakeGang(device, size=args.size)
    cut = VocabShardedEmbedding(gang, vocab, dim, **options)
    deduped = VocabShardedEmbedding(gang, vocab, dim, dedup=True, **options)
    few = slice(0, min(1024, tokens))
    found = {
        "torch.nn.Embedding, forward": lambda: whole(ids),
        "StandardEmbedding, forward": lambda: ours(ids),
        "the check of the ids in it": lambda: ours._lookup.id_check(ids, vocab, "here"),
        "torch.nn.Embedding, forward and backward": training(whole, ids, grad),
        "StandardEmbedding, forward and backward": training(ours, ids, grad),
        f"vocabulary over {args.size} ranks, nothing sent": training(cut, ids, grad),
        f"vocabulary over {args.size} ranks, de-duplicated": training(deduped, ids, grad),
        "torch.nn.Embedding, 1024 ids": training(whole, ids[few], grad[few]),
        "StandardEmbedding, 1024 ids": training(ours, ids[few], grad[few]),
    }
    return {**found, **losses(args, options)}


def losses(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    vocab, dim = args.vocab, args.dim
    x = torch.randn(args.tokens, dim, requires_grad=True, **options)
    target = torch.randint(vocab, (args.tokens,), device=args.device)
    linear = torch.nn.Linear(dim, vocab, bias=False, **options)
    embed = VocabShardedEmbedding(FakeGang(args.device), vocab, dim, **options)
    head = OutputHead(embed)

    def step(loss: Callable[[], Tensor], module: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad()
            x.grad = None
            loss().backward()

        return run

    def of_torch() -> Tensor:
        return cross_entropy(linear(x).float(), target)

    return {
        "torch: linear and cross entropy": step(of_torch, linear),
        "OutputHead.loss": step(lambda: head.loss(x, target), head),
    }


def table_of(args: argparse.Namespace) -> tuple[list[str], list[dict[str, Any]]]:
    lines = ["| what | us | MiB at most |", "|---|---|---|"]
    figures = []
    for name, run in comparisons(args).items():
        peak = peak_bytes(args.device, run)
        seconds = measure(Step(name, run, 0), args.seconds).seconds
        figures.append({"what": name, "seconds": seconds, "peak_bytes": peak})
        mebibytes = "" if peak is None else f"{peak / 2**20:.0f}"
        lines.append(f"| {name} | {seconds * 1e6:.0f} | {mebibytes} |")
    return lines, figures


def warn_of_versions() -> None:
    """Warns if torch is older than `pyproject.toml` requires: some checks may fail then."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < TORCH:
        wanted = ".".join(map(str, TORCH))
        print(f"torch {torch.__version__} is older than {wanted}, which tp_embed requires.")


def versions(device: str) -> str:
    text = f"torch {torch.__version__}, Python {platform.python_version()}"
    if torch.device(device).type == "cuda":
        text += f", CUDA {torch.version.cuda}, compute capability "
        text += ".".join(map(str, torch.cuda.get_device_capability()))
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vocab", type=int, default=1 << 17)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--size", type=int, default=2, help="number of ranks that cut the tables")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--ids", default="zipf", help="a distribution of benchmarks/token_ids.py")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per measurement, about")
    parser.add_argument("--output", type=Path, help="a directory to write a page and JSON to")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"this torch ({torch.__version__}) sees no GPU. Use one that was built with CUDA, with "
            "its driver on this machine, or try out the command with `--device cpu`."
        )
    return args


def main() -> int:
    args = parse()
    name = name_of(args.device)
    warn_of_versions()
    print(f"{name}: {versions(args.device)}")
    found = run_checks(args.device)
    options = (
        f"V={args.vocab}, E={args.dim}, N={args.tokens}, P={args.size}, {args.dtype}, "
        f"{args.ids} ids"
    )
    lines, figures = table_of(args)
    sizes = args.vocab, args.dim, args.tokens, args.size
    of_lookups = steps(args.device, *sizes, DTYPES[args.dtype], args.ids)
    timings = [measure(s, args.seconds) for s in (copy_step(args.device), *of_lookups)]
    failed = [check for check, text in found.items() if text]
    page = [
        to_markdown(name, f"{versions(args.device)}, {options}", timings[0], timings[1:]),
        "## Next to torch",
        "",
        *lines,
        "",
        "## Checks",
        "",
        *(f"- {'FAILED' if text else 'ok'}: {c.replace('_', ' ')}" for c, text in found.items()),
    ]
    text = "\n".join(page) + "\n"
    print("\n" + text)
    if args.output is not None:
        record = {
            "device": name,
            "versions": versions(args.device),
            "options": options,
            "checks": found,
            "times": figures,
            "steps": [vars(timing) for timing in timings],
        }
        args.output.mkdir(parents=True, exist_ok=True)
        file = args.output / f"{name.replace(' ', '-').replace('/', '-')}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        file.with_suffix(".md").write_text(text)
    held = len(found) - len(failed)
    print(f"{held} of {len(found)} checks hold.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Renders the directory of a run as one page: ``tp-embed report runs/train_lm``.

The page, `report.html`, is one file that needs no network. Its charts are inline SVG by matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from .charts import Series, line_charts, to_svg
from .run_log import Run, read_run

_STYLE = """
body { margin: 0; background: #fafafa; color: #222; font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
.sub { color: #666; margin: 2px 0 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 16px; margin-top: 16px; }
.card { background: #fff; border: 1px solid #e6e6e6; border-radius: 8px; padding: 14px 16px;
  min-width: 0; }
.wide { grid-column: 1 / -1; }
.tile b { display: block; font-size: 23px; font-weight: 600; } .tile, .note { color: #666; }
.tile b, .note b { color: #222; } .tile, .note { font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 500; color: #666; } td, th { padding: 4px 14px 4px 0; }
tr + tr td { border-top: 1px solid #f0f0f0; } .num { text-align: right; }
.bar { background: #0072b2; height: 9px; border-radius: 2px; } .bars td { width: 1%;
  white-space: nowrap; } .bars td.fill { width: 99%; }
pre { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; margin: 8px 0 0;
  overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
"""


def write_report(directory: Path | str, output: Path | str | None = None) -> Path:
    """Writes a page about the run in ``directory``: loss, speed, gradients and ids of tables, the
    exchange between ranks, memory, the config, versions and the hosts of ranks.

    Reads `monitor.jsonl`, written by a :class:`tp_embed.monitor.Monitor` with ``directory``, and
    `metrics.csv`, with the columns ``step``, ``loss`` and ``tokens_per_second``. `metrics.csv` has
    every step and takes precedence. Shows `config.yaml` and `result.json` as they are. Call it in
    one process.

    :param output: the file; if ``None``, `report.html` in ``directory``.
    :returns: the file.
    :raises FileNotFoundError: the directory has neither `monitor.jsonl` nor `metrics.csv`.
    :raises MissingPackageError: matplotlib isn't installed.
    """
    directory = Path(directory)
    run = read_run(directory)
    path = Path(output) if output is not None else directory / "report.html"
    cards = [*_charts(run), *_tables(run), *_texts(run, directory)]
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(run.name)}</title>'
        f"<style>{_STYLE}</style></head><body><main>{_head(run)}"
        f'<div class="grid">{"".join(cards)}</div></main></body></html>\n',
        encoding="utf-8",
    )
    return path


def _head(run: Run) -> str:
    about = run.about
    ranks = about.get("ranks", [])
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    engine = about.get("engine", {})
    facts = [
        about.get("started", "").replace("T", " "),
        _count(len(ranks), "rank"),
        f"{_count(len(hosts), 'node')}" if hosts else "",
        ranks[0]["device"] if ranks else "",
        *(f"{_LABELS[key]} {engine[key]}" for key in _LABELS if key in engine),
    ]
    tiles = [
        f'<div class="card tile"><b>{value}</b>{escape(label)}</div>'
        for label, value in _summary(run)
    ]
    return (
        f'<h1>{escape(run.name)}</h1><div class="sub">{escape(" · ".join(filter(None, facts)))}'
        f'</div><div class="tiles">{"".join(tiles)}</div>'
    )


_MOST_BARS = 32
_LABELS = {"tp_size": "tensor parallel", "dp_size": "data parallel", "zero_stage": "ZeRO"}


def _summary(run: Run) -> list[tuple[str, str]]:
    tiles = []
    steps, losses = _of_each_step(run, "loss")
    if losses:
        tiles += [
            ("steps", number(steps[-1])),
            (f"last loss, from {losses[0]:.3f}", f"{losses[-1]:.3f}"),
        ]
    _, speeds = _of_each_step(run, "tokens_per_second")
    if speeds:
        tiles.append(("tokens per second, median", number(median(speeds))))
    rows = run.rows
    if rows:
        sent = mean(_exchange(row, "bytes") for row in rows)
        share = mean(_exchange(row, "seconds") / row["seconds"] for row in rows)
        tiles += [
            ("sent by a rank in a step", _size(sent)),
            ("of a step spent in the exchange", f"{100 * share:.1f}%"),
            ("peak memory of the fullest rank", _size(max(max(row["memory"]) for row in rows))),
        ]
    return tiles


def _charts(run: Run) -> list[str]:
    operations = run.names("traffic")
    charts: list[tuple[str, list[Series]]] = [
        ("Training loss", [("loss", *_of_each_step(run, "loss"))]),
        ("Tokens per second", [("tokens/s", *_of_each_step(run, "tokens_per_second"))]),
        ("Gradient norm of each table", _named(run, "grad_norm")),
        ("Unique ids / ids of a batch", _named(run, "unique_ratio")),
        ("Rows that a step updates", _named(run, "updated_rows")),
    ]
    for title, key, scale in (
        ("Sent by a rank in a step (MiB)", "bytes", 2**-20),
        ("Time in collectives in a step (ms)", "seconds", 1000),
    ):
        lines: list[Series] = []
        for name in operations:
            steps, values = run.series("traffic", name, key)
            lines.append((name, steps, [scale * value for value in values]))
        charts.append((title, lines))
    own: list[tuple[str, list[Series]]] = [
        (name, [(name, *run.series("values", name))]) for name in run.names("values")
    ]
    return [
        _card(title, _chart(lines, from_zero=" in a step " in title))
        for title, lines in [*charts, *own]
        if any(y for _, _, y in lines)
    ]


def _chart(lines: Sequence[Series], *, x_label: str = "step", from_zero: bool) -> str:
    return to_svg(line_charts({"": lines}, x_label=x_label, from_zero=from_zero))


def _tables(run: Run) -> list[str]:
    cards = []
    operations = run.names("traffic")
    if operations:
        rows = []
        for name in operations:
            calls, sent, seconds = (
                mean(run.series("traffic", name, key)[1]) for key in ("calls", "bytes", "seconds")
            )
            speed = _size(sent / seconds) + "/s" if seconds else ""
            rows.append([name, number(calls), _size(sent), f"{1000 * seconds:.2f} ms", speed])
        head = ["operation", "calls", "sent", "time", "sent / time"]
        cards.append(_card("The tables' collectives, in a step, by one rank", _table(head, rows)))
    if run.rows:
        hosts = [rank["host"] for rank in run.about.get("ranks", [])]
        cards.append(_card("Peak memory by rank", _memory(run.rows[-1]["memory"], hosts)))
    tables = run.about.get("tables")
    if tables:
        body = _table(["table", "as a rank has it"], [[k, v] for k, v in tables.items()], "text")
        sharding = run.about.get("sharding")
        body += f"<pre>{escape(str(sharding))}</pre>" if sharding else ""
        cards.append(_card("Tables", body, wide=True))
    return cards


def _memory(memory: Sequence[float], hosts: Sequence[str]) -> str:
    if len(memory) > _MOST_BARS:
        line = [used / 2**30 for used in memory]
        return _chart([("GiB", range(len(memory)), line)], x_label="rank", from_zero=True)
    rows = []
    for rank, used in enumerate(memory):
        name = f"rank {rank}" + (f", {hosts[rank]}" if rank < len(hosts) else "")
        width = f"{100 * used / max(memory):.1f}%"
        rows.append([name, _Html(f'<div class="bar" style="width:{width}"></div>'), _size(used)])
    return _table([], rows, "bars")


def _texts(run: Run, directory: Path) -> list[str]:
    texts = {}
    for name in ("config.yaml", "result.json"):
        if (directory / name).exists():
            texts[name] = (directory / name).read_text(encoding="utf-8")
    shown = ("ranks", "tables", "sharding", "engine", "started")
    about = {key: value for key, value in run.about.items() if key not in shown}
    started = {key: about.pop(key) for key in ("command", "every", "versions") if key in about}
    texts |= {
        key: value if isinstance(value, str) else json.dumps(value, indent=2)
        for key, value in (about | {"how it was started": started} if started else about).items()
    }
    return [
        f'<details class="card wide"><summary>{escape(key.replace("_", " "))}</summary>'
        f"<pre>{escape(text)}</pre></details>"
        for key, text in texts.items()
    ]


def _of_each_step(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Returns steps and finite values from `metrics.csv`, or else from the sampled rows."""
    values = run.metrics.get(key)
    if not values:
        return run.series(key)
    points = zip(run.metrics["step"], values, strict=True)
    kept = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _named(run: Run, key: str) -> list[Series]:
    return [(name, *run.series(key, name)) for name in run.names(key)]


def _exchange(row: Mapping[str, Any], key: str) -> float:
    return float(sum(entry[key] for entry in row["traffic"].values()))


class _Html(str):
    """A string of HTML, not to be escaped."""


def _card(title: str, body: str, *, wide: bool = False) -> str:
    return f'<div class="card{" wide" * wide}"><h2>{escape(title)}</h2>{body}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def cell(tag: str, text: str, column: int) -> str:
        is_fill = isinstance(text, _Html)
        kinds = "fill" if is_fill else "num" if column and kind != "text" else ""
        return f'<{tag} class="{kinds}">{text if is_fill else escape(text)}</{tag}>'

    lines = [("th", head)] * bool(head) + [("td", row) for row in rows]
    body = "".join(
        "<tr>" + "".join(cell(tag, text, i) for i, text in enumerate(line)) + "</tr>"
        for tag, line in lines
    )
    return f'<table class="{kind}">{body}</table>'


def number(value: float) -> str:
    """Formats a number for humans: 1.23M, 3550, 0.0456."""
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def _size(num_bytes: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= size:
            return f"{number(num_bytes / size)} {unit}"
    return f"{num_bytes:.0f} B"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}" if number else ""

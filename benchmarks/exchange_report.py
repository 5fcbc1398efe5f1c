"""Formats the results of `exchange.py` as Markdown, with a chart of the first case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pages import insert
from tp_embed.monitor.charts import COLORS, new_figure, save
from ways import our_name

BEGIN, END = "<!-- The figures of benchmarks/exchange.py: -->", "<!-- End of the figures. -->"

MEGATRON_SEQUENCE = "Megatron-LM, sequence"

Found = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """The ratio of two median times, with the smallest and largest ratio of the rounds."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float], reference: list[float]) -> Ratio:
        each = [a / b for a, b in zip(times, reference, strict=True)]
        return cls(median(times) / median(reference), min(each), max(each))

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Goal:
    """An upper limit for one of our times, relative to the fastest peer with the same output, or to
    the named one.

    :param most: the limits for P = 2, and for more ranks.
    :param ids: the distributions to apply to; ``vocab`` the size, if not all.
    """

    work: str
    most: tuple[float, float]
    key: str
    ids: tuple[str, ...]
    vocab: int | None = None
    gradient: str = "dense"
    output: str = "replicated"
    peer: str | None = None

    def applies(self, case: Found) -> bool:
        return case["ids"] in self.ids and self.vocab in (None, case["vocab"])

    def limit(self, case: Found) -> float:
        return self.most[case["ranks"] > 2]

    @property
    def limits(self) -> str:
        return " / ".join(f"{most:.2f}" for most in dict.fromkeys(self.most))


_GRADIENTS = {"dense": "dense gradient", "reused": "dense, kept", "sparse": "row-sparse"}


def _goals() -> Iterator[Goal]:
    zipf, uniform = ("zipf", "zipf-sorted"), ("uniform",)
    yield Goal("forward", (0.45, 0.45), "forward", zipf)
    yield Goal("forward, uniform ids", (0.60, 0.60), "forward", uniform)
    for gradient in ("dense", "reused"):
        work = f"with backward, {_GRADIENTS[gradient]}"
        yield Goal(work, (0.55, 0.55), "both", zipf, 32_768, gradient)
        yield Goal(work, (0.80, 0.80), "both", zipf, 131_072, gradient)
        yield Goal(f"{work}, uniform ids", (0.75, 0.75), "both", uniform, None, gradient)
    work = "with backward, row-sparse"
    yield Goal(work, (0.28, 0.28), "both", zipf, None, "sparse")
    yield Goal(f"{work}, uniform ids", (0.50, 0.50), "both", uniform, None, "sparse")
    for key, gradient, most in (
        ("forward", "dense", (0.20, 0.13)),
        ("both", "dense", (0.30, 0.30)),
        ("both", "reused", (0.30, 0.30)),
        ("both", "sparse", (0.20, 0.20)),
    ):
        work = "forward" if key == "forward" else f"with backward, {_GRADIENTS[gradient]}"
        work = f"sequence output, {work}"
        yield Goal(work, most, key, zipf, None, gradient, "sequence", MEGATRON_SEQUENCE)


class Report:
    """Formats the results of `exchange.py`."""

    def __init__(self, results: Found) -> None:
        self._results = results
        self._cases: list[Found] = [case for case in results["cases"] if not case["axis"]]
        self._points: list[Found] = [case for case in results["cases"] if case["axis"]]

    def write(self, page: Path) -> None:
        """Writes the goals and the first case to ``page``, between its marks, and a chart next to
        it."""
        chart = page.with_name("exchange.svg")
        self._draw(chart)
        insert(page, BEGIN, END, self._text(f"![The first case]({chart.name})\n", most_cases=1))

    def text(self) -> str:
        """Formats all results as Markdown."""
        return self._text()

    def tables(self) -> str:
        """Formats a table for each case."""
        return "\n".join(self._case(case) for case in self._cases) + "\n" + self._initialisation()

    def goals(self) -> str:
        """Formats a table of ratios for each of our classes, and one for other goals."""
        lines = []
        for cut, name in (("embed", "ShardedEmbedding"), ("vocab", "VocabShardedEmbedding")):
            columns = list(dict.fromkeys((c["ranks"], c["dtype"]) for c in self._cases))
            heads = [f"P = {ranks}, {dtype}" for ranks, dtype in columns]
            lines += [
                _line(f"`{name}`", "at most", *heads),
                "|---" * (len(columns) + 2) + "|",
                *self._timed_goals(cut, columns),
                "",
            ]
        lines += [
            "| | case | at most | `ShardedEmbedding` | `VocabShardedEmbedding` |",
            "|---|---|---|---|---|",
            *self._other_goals(),
        ]
        return "\n".join(lines) + "\n"

    def _text(self, chart: str = "", most_cases: int | None = None) -> str:
        parts = [
            f"On {self._results['machine']}, one thread for each rank.\n",
            "### Goals\n",
            "Ratios to the fastest peer with the same output, or to Megatron-LM's reduce-scatter "
            "for sequence output, with the least and the greatest of the rounds; bold where a goal "
            "is not reached. V = 32768, and E = 4096, N = 8192 with P = 2, E = 1024, N = 4096 with "
            "P = 4, unless said; E = 1024 with V = 131072.\n",
            self.goals(),
            "### Cases\n",
            *(self._case(case) for case in self._cases[:most_cases]),
            chart,
            "### Initialisation\n",
            self._initialisation(),
            "### Growth\n",
        ]
        for axis, symbol in (("vocab", "V"), ("tokens", "N"), ("ranks", "P")):
            if self._curve(axis):
                parts.append(self._growth(axis, symbol))
        return "\n".join(parts)

    # Goals

    def _timed_goals(self, cut: str, columns: list[tuple[int, str]]) -> Iterator[str]:
        for goal in _goals():
            name = our_name(cut, "auto", goal.gradient, goal.output)
            lines: dict[str, list[str]] = {}
            for case in filter(goal.applies, self._cases):
                peer = goal.peer or _fastest(case, goal.output, goal.key)
                ratio = _ratio(case, name, peer, goal.key)
                if ratio:
                    cells = lines.setdefault(_detail(case), ["-"] * len(columns))
                    column = columns.index((case["ranks"], case["dtype"]))
                    cells[column] = _marked(ratio, goal.limit(case))
            for detail, cells in lines.items():
                yield _line(goal.work + detail, goal.limits, *cells)

    def _other_goals(self) -> Iterator[str]:
        shares: dict[str, list[float]] = {"embed": [], "vocab": []}
        for case in self._cases:
            rows = _by_name(case)
            hidden = rows.get("DeepSpeed HiddenParallelEmbedding")
            if hidden is None or case["ids"] == "uniform":
                continue
            for cut in shares:
                sent = rows[our_name(cut)]["sent_forward"] / hidden["sent_forward"]
                shares[cut].append(sent / (case["unique"] / case["tokens"]))
        if shares["embed"]:
            # With cut rows, the busiest rank has more than its share.
            work = "bytes sent by the forward, to U/N of `HiddenParallelEmbedding`, at most"
            columns, rows_cut = map(max, shares.values())
            yield _line(work, "all", "1.02", _value(columns, 1.02), f"({rows_cut:.2f})")
        extra: dict[str, list[float]] = {"embed": [], "vocab": []}
        for case in self._cases:
            rows = _by_name(case)
            for cut in extra:
                auto, plain = rows.get(our_name(cut)), rows.get(our_name(cut, False))
                if auto and plain:
                    extra[cut].append(median(auto["forward"]) / median(plain["forward"]))
        if all(extra.values()):
            cells = [_value(max(each), 1.05) for each in extra.values()]
            yield _line('`dedup="auto"` to `False`, forward, at most', "all", "1.05", *cells)
        for case in self._cases:
            if case["dtype"] == "bf16":
                rows = _by_name(case)
                cells = [
                    _value(rows[name]["error"] / case["torch_error"], 0.1, 3)
                    for name in (our_name("embed"), our_name("vocab"))
                    if name in rows
                ]
                limit = case["rounding_error"] / case["torch_error"]
                work = f"error of the gradient, to torch's; {limit:.3f} is rounding alone"
                yield _line(work, _short(case), "0.10", *cells)
        seconds = {k: median(v) for k, v in self._results["initialisation"]["seconds"].items()}
        made = self._results["initialisation"]
        size = f"P = {made['size']}, V = {made['vocab']}, E = {made['dim']}, fp32"
        times = [
            _value(seconds[f"tp_embed {cut}"] / seconds[f"whole table, {whole}"], 0.25)
            for cut, whole in (("embed", "columns"), ("vocab", "rows"))
        ]
        yield _line("initialisation, time to that of the whole table", size, "0.25", *times)
        memory = [
            _value(max(made["mebibytes"][f"tp_embed {cut}"]) / made["shard"], 1.02)
            for cut in ("embed", "vocab")
        ]
        yield _line("initialisation, peak memory to the shard", size, "1.02", *memory)
        curve = self._curve("vocab")
        if len(curve) > 1:
            first, last = _by_name(curve[0]), _by_name(curve[-1])
            cells = []
            for cut in ("embed", "vocab"):
                name = our_name(cut, "auto", "sparse")
                cells.append(_value(median(last[name]["both"]) / median(first[name]["both"]), 1.15))
            work = f"with backward, row-sparse: V = {curve[-1]['vocab']} to V = {curve[0]['vocab']}"
            yield _line(work, _short(curve[0], vocab=False), "1.15", *cells)

    # Cases

    def _case(self, case: Found) -> str:
        share = case["unique"] / case["tokens"]
        batch = "" if case["batch"] == 1 else f", in {case['batch']} sequences"
        lines = [
            f"#### {_short(case)}{batch}\n",
            f"{case['unique']} of the ids are distinct ({share:.0%}); {case['measured_rounds']} "
            "rounds. Times in ms, MB sent by a rank; ratios to the fastest peer with the same "
            "output.\n",
        ]
        for output in ("replicated", "sequence"):
            rows = [row for row in case["rows"] if row["output"] == output and row["both"]]
            if rows:
                lines += [*self._rows(case, rows, output), ""]
        return "\n".join([*lines, *self._lower_bounds(case)])

    def _lower_bounds(self, case: Found) -> Iterator[str]:
        """Compares lower bounds with the fastest peer, and ours with the bounds."""
        rows = _by_name(case)
        floors = {row["name"]: row["forward"] for row in case["rows"] if row["who"] == "floor"}
        exchange, lookup = floors["exchange of U rows"], floors["lookup of N rows"]
        both = [a + b for a, b in zip(exchange, lookup, strict=True)]
        floors["exchange of U rows, lookup of N"] = both
        yield "| what none can do without | ms | of the forward | of it with backward |"
        yield "|---|---|---|---|"
        output = case["rows"][0]["output"]
        peers = [(_fastest(case, output, key), key) for key in ("forward", "both")]
        for name, times in floors.items():
            shares = [
                f"{median(times) / median(rows[peer][key]):.2f}" if peer else "-"
                for peer, key in peers
            ]
            yield _line(name, f"{median(times):.1f}", *shares)
        yield ""
        ours = rows.get(our_name("embed"))
        if ours:
            yield (
                f"The forward of `{our_name('embed')}` takes {Ratio.of(ours['forward'], both)} of "
                "the last line. The shares are relative to the fastest peer.\n"
            )

    def _rows(self, case: Found, rows: list[Found], output: str) -> Iterator[str]:
        yield "| output: " + output + " | forward | ratio | with backward | ratio | sent | back |"
        yield "|---|---|---|---|---|---|---|"
        for row in rows:
            cells = [row["name"]]
            for key in ("forward", "both"):
                peer = _fastest(case, output, key)
                ratio = _ratio(case, row["name"], peer, key)
                cells += [f"{median(row[key]):.1f}", str(ratio) if ratio else "-"]
            cells += [f"{row[f'sent_{way}'] / 1e6:.2f}" for way in ("forward", "backward")]
            yield _line(*cells)

    def _initialisation(self) -> str:
        made = self._results["initialisation"]
        lines = [
            f"Of one of {made['size']} shards ({made['shard']:.0f} MiB) of a table of "
            f"{made['vocab']} x {made['dim']}, fp32.\n",
            "| | s, median | min | max | peak, MiB |",
            "|---|---|---|---|---|",
        ]
        for name, seconds in made["seconds"].items():
            cells = [f"{of(seconds):.2f}" for of in (median, min, max)]
            lines.append(_line(name, *cells, f"{max(made['mebibytes'][name]):.1f}"))
        return "\n".join(lines) + "\n"

    # Growth

    def _curve(self, axis: str) -> list[Found]:
        """Returns the points along ``axis``. The curves meet at the first point of V."""
        base = [point for point in self._points if point["axis"] == "vocab"][:1]
        points = [point for point in self._points if point["axis"] == axis and point not in base]
        return sorted(base + points, key=lambda point: float(point[axis]))

    def _growth(self, axis: str, symbol: str) -> str:
        curve = self._curve(axis)
        fixed = ", ".join(
            f"{name} = {curve[0][key]}"
            for name, key in (("P", "ranks"), ("V", "vocab"), ("E", "dim"), ("N", "tokens"))
            if key != axis
        )
        lines = [
            f"With {symbol}; {fixed}, {curve[0]['dtype']}, {curve[0]['ids']} ids. Forward / with "
            "backward, ms.\n",
            "| | " + " | ".join(f"{symbol} = {point[axis]}" for point in curve) + " |",
            "|---" * (len(curve) + 1) + "|",
        ]
        for name in _timed_names(curve):
            rows = [_by_name(point)[name] for point in curve]
            cells = [f"{median(row['forward']):.1f} / {median(row['both']):.1f}" for row in rows]
            lines.append(_line(name, *cells))
        return "\n".join(lines) + "\n"

    def _draw(self, file: Path) -> None:
        """Draws the first case: the forward, and the time the backward adds."""
        case = self._cases[0]
        rows = [row for row in case["rows"] if row["both"]][::-1]
        names = [row["name"] for row in rows]
        forward, both = ([median(row[key]) for row in rows] for key in ("forward", "both"))
        figure = new_figure(11, 0.26 * len(rows) + 1.2, _short(case))
        panel = figure.subplots()
        panel.barh(names, both, color=COLORS[5], label="with backward")
        panel.barh(names, forward, color=COLORS[0], height=0.45, label="forward")
        panel.set_xlabel("ms")
        panel.legend()
        panel.grid(alpha=0.3, axis="x")
        save(figure, file)


def _timed_names(curve: Iterable[Found]) -> list[str]:
    """Returns the ways that all points have."""
    first, *others = curve
    return [
        row["name"]
        for row in first["rows"]
        if row["both"] and all(row["name"] in _by_name(other) for other in others)
    ]


def _by_name(case: Found) -> dict[str, Found]:
    return {row["name"]: row for row in case["rows"]}


def _fastest(case: Found, output: str, key: str) -> str | None:
    peers = [row for row in case["rows"] if row["who"] == "peer" and row["output"] == output]
    return min(peers, key=lambda row: median(row[key]))["name"] if peers else None


def _ratio(case: Found, name: str, peer: str | None, key: str) -> Ratio | None:
    rows = _by_name(case)
    if name not in rows or peer not in rows:
        return None
    return Ratio.of(rows[name][key], rows[peer][key])


def _marked(ratio: Ratio, most: float) -> str:
    text = str(ratio)
    return text if ratio.middle <= most else f"**{text}**"


def _value(value: float, most: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if value <= most else f"**{value:.{digits}f}**"


def _short(case: Found, vocab: bool = True) -> str:
    size = f"V = {case['vocab']}, " if vocab else ""
    return (
        f"P = {case['ranks']}, {size}E = {case['dim']}, N = {case['tokens']}, {case['dtype']}, "
        f"{case['ids']}"
    )


def _detail(case: Found) -> str:
    """Describes how a case differs from the first ones."""
    parts = [
        "" if case["vocab"] == 32_768 else f", V = {case['vocab']}",
        ", frequent ids first" if case["ids"] == "zipf-sorted" else "",
        "" if case["batch"] == 1 else f", {case['batch']} sequences",
    ]
    return "".join(parts)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"

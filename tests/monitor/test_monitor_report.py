"""The page about a run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from argparse import ArgumentParser
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tp_embed.command import FAILED
from tp_embed.monitor import write_report
from tp_embed.monitor.charts import line_charts, to_svg
from tp_embed.monitor.command import REPORT
from tp_embed.monitor.report import number
from tp_embed.monitor.run_log import RunLog, read_run


def row(step, every=10, **more):
    return {
        "step": step,
        "every": every,
        "loss": 5.0 - step / 100,
        "seconds": 0.5,
        "tokens_per_second": 2000.0,
        "memory": [2.0**30, 3.0 * 2**29],
        "grad_norm": {"embed": 0.25, "<head>": 0.5},
        "unique_ratio": {"embed": 0.75},
        "traffic": {"all_gather": {"calls": 2.0, "bytes": 3.0 * 2**20, "seconds": 0.125}},
        "values": {},
        **more,
    }


@pytest.fixture
def run_dir(tmp_path):
    log = RunLog(tmp_path / "first")
    log.start(
        {
            "started": "2026-01-02T03:04:05+00:00",
            "ranks": [{"host": "node0", "device": "CPU"}, {"host": "node1", "device": "CPU"}],
            "tables": {"embed": "ShardedEmbedding(20, 8)"},
            "deepspeed_config": {"a & b": "<script>alert(1)</script>"},
        }
    )
    for step in range(10, 60, 10):
        log.add(row(step))
    return tmp_path / "first"


class Page(HTMLParser):
    """Collects the text and elements of a page; raises unless it is well-formed."""

    VOID = ("meta",)

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.ids, self.texts, self.links = [], [], [], [], []
        self.feed(page)
        assert self.open == []
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())


def test_page_has_figures_charts_and_nothing_from_elsewhere(run_dir):
    (run_dir / "config.yaml").write_text("steps: 50\n")
    page = Page(write_report(run_dir).read_text())
    assert page.links == []
    assert "script" not in page.seen
    assert "<script>alert(1)</script>" in page.text  # Text from the config.
    for text in (
        "first",
        "2 ranks · 2 nodes · CPU",
        "4.500 last loss, from 4.900",
        "2000 tokens per second, median",
        "3 MiB sent by a rank in a step",
        "25.0% of a step spent in the exchange",
        "1.5 GiB peak memory of the fullest rank",
        "all_gather 2 3 MiB 125.00 ms 24 MiB/s",
        "rank 1, node1 1.5 GiB",
        "ShardedEmbedding(20, 8)",
        "steps: 50",
        "<head>",
    ):
        assert text in re.sub(r"\s+", " ", page.text)
    assert page.seen.count("svg") == 6
    lines = [name for name in page.ids if name.startswith("line-")]
    assert len(lines) == 7  # One per table, and one per other chart.


def test_metrics_of_each_step_are_enough(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,loss,tokens_per_second\n1,3.5,100\n2,2.5,300\n3,,\n"
    )
    code = "import sys; from tp_embed.monitor import write_report as w; print(w(sys.argv[1]))"
    output = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == str(tmp_path / "report.html")
    assert not re.search(r"\| +torch$", output.stderr, re.MULTILINE)
    page = Page((tmp_path / "report.html").read_text())
    assert "2.500 last loss, from 3.500" in page.text
    assert page.seen.count("svg") == 2


def test_metrics_of_each_step_are_preferred(run_dir):
    (run_dir / "metrics.csv").write_text("step,loss\n1,9.0\n2,8.0\n")
    text = Page(write_report(run_dir).read_text()).text
    assert "8.000 last loss, from 9.000" in text
    assert "2000 tokens per second" in text


def test_a_directory_of_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`directory` must have a `monitor.jsonl`"):
        write_report(tmp_path)


def test_command_writes_a_page_of_any_run(run_dir, tmp_path):
    parser = ArgumentParser()
    REPORT.add_arguments(parser)
    values = parser.parse_args([str(run_dir), "--output", str(tmp_path / "page.html")])
    assert REPORT.run(vars(values)).lines == [str(tmp_path / "page.html")]
    assert "4.500" in Page((tmp_path / "page.html").read_text()).text


def test_a_resumed_run_supersedes_what_it_repeats(run_dir):
    log = RunLog(run_dir)
    log.start({"started": "later"})
    log.add(row(30, loss=1.0))
    with (run_dir / "monitor.jsonl").open("a") as file:
        file.write('{"step": 40, "every": 10, "lo')  # The process was killed here.
    run = read_run(run_dir)
    assert run.series("loss") == ([10, 20, 30], [4.9, 4.8, 1.0])
    assert run.about == {"started": "later"}
    # A restarted run, sampled less often, replaces all.
    (run_dir / "monitor.jsonl").open("a").write("\n" + json.dumps(row(40, every=40)) + "\n")
    assert read_run(run_dir).series("loss") == ([40], [4.6])


SVG = "{http://www.w3.org/2000/svg}"


def drawn(*lines):
    """Returns the SVG of a chart, and the groups of its lines."""
    svg = ElementTree.fromstring(to_svg(line_charts({"": lines})))
    return svg, [g for g in svg.iter(f"{SVG}g") if g.get("id", "").startswith("line-")]


def texts(svg):
    return [text.text for text in svg.iter(f"{SVG}text")]


def test_charts_show_peaks_of_long_series_and_skip_what_is_not_finite():
    steps = list(range(10_000))
    values = [1.0] * 10_000
    values[5_003] = 7.0
    values[17], values[18] = float("nan"), float("inf")
    _, (line,) = drawn(("a & b", steps, values))
    (path,) = line.iter(f"{SVG}path")
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path.get("d")) if p.strip()]
    assert len(points) < 1_000
    assert path.get("d").count("M") == 1  # No gap where points were left out.
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    heights = {y for _, y in points}
    assert len(heights) == 2
    assert sum(y == min(heights) for _, y in points) == 1  # Heights are counted downwards.


@pytest.mark.parametrize("values", [[], [float("nan")]])
def test_charts_of_nothing_say_so(values):
    assert "no data" in texts(drawn(("loss", range(len(values)), values))[0])


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1e-9, 1e12], [5.5, 5.5000001]])
def test_charts_keep_every_point_inside(values):
    svg, (line,) = drawn(("x", range(len(values)), values))
    width, height = map(float, svg.get("viewBox").split()[2:])
    points = list(line.iter(f"{SVG}use"))
    assert len(points) == len(values)
    for point in points:
        assert 0 < float(point.get("x")) < width
        assert 0 < float(point.get("y")) < height
    assert len(texts(svg)) >= 3


def test_names_of_lines_are_shown_as_they_are():
    names = ["_orig_mod.embed", "a$b$c", "$", "<head>", "a & b"]
    svg, lines = drawn(*((name, [1, 2], [3, 4]) for name in names))
    assert len(lines) == len(names)
    assert set(names) < set(texts(svg))


def test_report_without_matplotlib_says_what_to_install(run_dir):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from tp_embed import cli; "
        f"sys.exit(cli.main(['report', {str(run_dir)!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == FAILED
    assert "pip install 'tp-embed[cli]'" in found.stderr
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3550.4, "3550"), (0.04561, "0.0456"), (1_234_567, "1.23M"), (-2e9, "-2G")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_loss_that_is_infinite_is_left_out(tmp_path):
    log = RunLog(tmp_path)
    log.start({})
    for step, loss in enumerate([3.0, math.inf, math.nan, 2.0], start=1):
        log.add({"step": step, "every": 1, "loss": loss, "grad_norm": {"embed": loss}})
    text = (tmp_path / "monitor.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    run = read_run(tmp_path)
    assert run.series("loss") == run.series("grad_norm", "embed") == ([1, 4], [3.0, 2.0])

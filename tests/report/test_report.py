"""The report: complete, self-contained, safe, and alive in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from steps import step_record
from tandem.__main__ import main
from tandem.errors import UserError
from tandem.report.chart import Series, line_chart, number, smoothed, thinned, ticks
from tandem.report.page import render
from tandem.report.run_folder import read_runs
from tandem.training.logs.metrics import METRICS_FILE, MetricsFile
from tandem.training.logs.profiling import write_profile
from tandem.training.run import train
from workspace import Workspace

CHROMIUM = shutil.which("chromium")


class Balanced(html.parser.HTMLParser):
    """Fails on tags that do not close in order; collects what a page would fetch."""

    VOID = ("meta", "path", "circle", "rect", "br", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def folders(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two short runs that differ in their rate; the second was resumed."""
    root = tmp_path_factory.mktemp("runs")
    common = {
        "train_iters": 4,
        "lr_warmup_iters": 0,
        "eval_interval": 2,
        "eval_iters": 1,
        "split": "80,20,0",
        "save_interval": 2,
    }
    train(workspace.settings("torch", save=str(root / "a"), **common))
    slow = {**common, "save": str(root / "b"), "lr": 1e-4}
    train(workspace.settings("torch", exit_interval=2, **slow))
    train(workspace.settings("torch", load=str(root / "b"), **slow))
    write_profile(root / "b", 3, 4, {"attention": 0.25, "mlp": 0.75}, "profile/trace.json")
    return [str(root / "a"), str(root / "b")]


def test_a_page_of_two_runs_holds_everything_and_fetches_nothing(folders: list[str]) -> None:
    page = render(read_runs(folders))
    parser = parse(page)
    assert parser.fetched == []
    assert "http" not in page
    assert parser.seen.count("figure") >= 6
    for part in ("Loss", "of validation", "Gradient norm", "Tokens per second", "<b>lr</b>", "0.0001", "on disk"):
        assert part in page, part
    assert "finished" in page
    assert page.count("started") == 3
    assert "75.0%" in page  # of the profiled time
    assert re.search(r"corpus\.jsonl <small>[0-9a-f]{12}</small>", page)
    assert len(page) < 200_000


def test_the_command_writes_into_the_run_folder(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", folders[0]]) == 0
    path = Path(folders[0]) / "report.html"
    assert str(path) in capsys.readouterr().out
    parse(path.read_text())


def test_answers_of_each_run_are_shown(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    assert main(["report", *folders, "--output", str(page), "--ask", "Sort <31>.", "--max-new-tokens", "3"]) == 0
    text = page.read_text()
    parse(text)
    assert "Sort &lt;31&gt;." in text
    assert text.count("<q>") == 2
    assert "<h2>Answers" not in render(read_runs(folders))


def test_names_and_settings_cannot_break_the_page(folders: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "<script>x"
    shutil.copytree(folders[0], copy)
    page = render(read_runs([str(copy)]))
    assert "<script>x" not in page
    parse(page)


def test_a_run_without_steps_and_one_with_lost_values_are_shown(folders: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "young"
    shutil.copytree(folders[0], copy)
    (copy / METRICS_FILE).write_text("")
    parse(render(read_runs([str(copy)])))
    file = MetricsFile(copy / METRICS_FILE, 0)
    file.on_step(step_record(1, loss=float("nan")))
    file.on_step(step_record(2))
    file.close()
    parse(render(read_runs([str(copy)])))


def test_preferences_have_trls_names(folders: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "dpo"
    shutil.copytree(folders[0], copy)
    (copy / METRICS_FILE).write_text("")
    metrics = {"rewards/margins": 0.25, "nll_loss": 1.5}
    file = MetricsFile(copy / METRICS_FILE, 0)
    file.on_step(step_record(1, metrics=metrics))
    of_sets = {"validation": {"rewards/margins": 0.75}, "held": {"rewards/margins": 0.5}}
    file.on_step(step_record(2, metrics=metrics, validation=dict.fromkeys(of_sets, 0.6), validation_metrics=of_sets))
    file.close()
    page = render(read_runs([str(copy)]))
    parse(page)
    figures = {}
    for figure in page.split("<figure")[1:]:
        (title,) = re.findall("<figcaption>(.*?)<small>", figure)
        figures[title] = figure
    assert "rewards/chosen" not in figures  # no step has it
    assert [point[:2] for point in points_of(figures["nll_loss"])] == [[1, 1.5], [2, 1.5]]
    margins = figures["rewards/margins"]
    assert "eval_held_rewards/margins, eval_rewards/margins" in margins
    assert [(line["name"], [point[:2] for point in line["points"]]) for line in series_of(margins)] == [
        ("dpo", [[1, 0.25], [2, 0.25]]),
        ("dpo: held", [[2, 0.5]]),
        ("dpo: validation", [[2, 0.75]]),
    ]


@pytest.mark.parametrize(("given", "named"), [([], "no run is given"), (["/no/run"], "/no/run"), (["A", "A"], "twice")])
def test_wrong_folders_are_named(folders: list[str], given: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_runs([word.replace("A", folders[0]) for word in given])


def test_runs_of_one_name_get_different_names(folders: list[str], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "other" / "a")
    names = [run.name for run in read_runs([folders[0], str(tmp_path / "other" / "a")])]
    assert len(set(names)) == 2
    assert names[1] == "other/a"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 120) == [0, 25, 50, 75, 100]
    assert ticks(1, 4, whole=True) == [1, 2, 3, 4]
    assert ticks(0.0011, 0.0029) == [0.0015, 0.002, 0.0025]
    assert ticks(-1e-9, 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (12000, "12k"), (3.5e9, "3.5G"), (1.25e-6, "1.25e-6"), (151936, "151.9k")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def series_of(figure: str) -> list[dict[str, Any]]:
    (data,) = re.findall(r'data-series="([^"]*)"', figure)
    series: list[dict[str, Any]] = json.loads(html.unescape(data))
    return series


def points_of(figure: str) -> list[list[float]]:
    points: list[list[float]] = series_of(figure)[0]["points"]
    return points


def test_a_spike_does_not_flatten_the_rest_and_is_counted() -> None:
    values = [(step, 4.0 - step / 100) for step in range(1, 201)]
    values[120] = (121, 5000.0)
    figure = line_chart("Loss", [Series("a", 0, values)])
    heights = [point[3] for point in points_of(figure) if point[1] < 5]
    assert max(heights) - min(heights) > 150  # of 250
    assert "points outside the chart: 1" in figure
    assert "outside" not in line_chart("Loss", [Series("a", 0, values[:100])])


def test_a_logarithmic_scale_leaves_out_what_has_no_logarithm() -> None:
    figure = line_chart("x", [Series("a", 0, [(1, 100.0), (2, 0.0), (3, 10.0), (4, 1.0)])], kind="log")
    assert [point[1] for point in points_of(figure)] == [100.0, 10.0, 1.0]
    high, middle, low = (point[3] for point in points_of(figure))
    assert middle == pytest.approx((high + low) / 2, abs=0.2)
    assert line_chart("x", [Series("a", 0, [(1, 0.0)])], kind="log") == ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [360, 1200])
def test_loss_and_speed_are_seen_on_a_phone(width: int, folders: list[str], tmp_path: Path) -> None:
    """On a narrow screen no cell of the summary lies outside it."""
    probe = (
        "<script>document.title = JSON.stringify([innerWidth, ...[...document.querySelectorAll('.cards td')]"
        ".map(cell => cell.getBoundingClientRect().right)].map(Math.round))</script>"
    )
    (tmp_path / "page.html").write_text(render(read_runs(folders)).replace("</body>", f"{probe}</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" src="page.html"></iframe>'
        "<script>onload = () => document.title = document.querySelector('iframe').contentDocument.title</script>"
    )
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --allow-file-access-from-files --disable-sync"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    window, *cells = json.loads(re.search(r"<title>(.*?)</title>", shown)[1])  # type: ignore[index]
    assert window == width
    assert len(cells) > 10
    assert max(cells) <= window


def test_long_lines_are_thinned_to_means() -> None:
    thin = thinned(Series("x", 0, [(n, float(n)) for n in range(1, 6001)]))
    assert len(thin.points) == 600
    assert thin.points[0] == (10, 5.5)
    assert thin.points[-1][0] == 6000


def test_smoothing_starts_at_the_first_value() -> None:
    assert smoothed([(1, 4.0), (2, 4.0), (3, 4.0)], 0.9) == [(1, 4.0), (2, pytest.approx(4.0)), (3, pytest.approx(4.0))]


def test_losses_below_one_have_a_logarithmic_scale() -> None:
    page = line_chart("Loss", [Series("run", 0, [(1, 0.69), (2, 0.3), (3, 0.02)])], kind="log")
    parse(page)
    assert page.count('text-anchor="middle"') == 3


def test_a_chart_without_points_is_none_and_with_one_is_a_dot() -> None:
    assert line_chart("x", [Series("a", 0, [])]) == ""
    figure = line_chart("x", [Series("a", 0, [(1, 2.0)])])
    assert "circle" in figure
    data = re.search(r'data-series="([^"]*)"', figure)
    assert data
    assert json.loads(html.unescape(data.group(1)))[0]["points"][0][:2] == [1, 2.0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_values_under_the_pointer(folders: list[str], tmp_path: Path) -> None:
    """The page's script runs: a pointer over the first chart makes it name the step, and the losses of both runs."""
    move = (
        "<script>const svg = document.querySelector('svg'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 20, clientY: box.top + 20}))</script>"
    )
    path = tmp_path / "page.html"
    path.write_text(render(read_runs(folders)).replace("</body>", f"{move}</body>"))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    output = re.search(r"<output>(.*?)</output>", shown)
    assert output
    assert "step 4" in output.group(1)
    assert len(re.findall(r'class="run[01]"', output.group(1))) == 4  # of training and of validation

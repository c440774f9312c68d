"""The report: one self-contained HTML page about one or several runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from html import escape, unescape
from typing import Any

from tandem.config.settings import Settings
from tandem.report.chart import Series, both_scales, line_chart, number, smoothed
from tandem.report.expert_maps import STYLE as MAPS
from tandem.report.expert_maps import expert_maps
from tandem.report.run_folder import Run
from tandem.report.style import SCRIPT, STYLE
from tandem.training.logs.log import validation_metric
from tandem.version import __version__

SMOOTH_PARTS = 60  # the loss is averaged over about a 60th of the run; a run with fewer steps is not smoothed
COLOURS = 6  # the number of colours in the style sheet

SUMMARY = (
    *("", "model", "backend", "state", "steps", "tokens", "loss", "validation"),
    *("tokens/s", "TFLOP/s", "MFU", "time"),
)

# Charts of preferences: TRL's name, which is the key in metrics.jsonl, and what it is.
PREFERENCES = (
    ("rewards/accuracies", "share of pairs whose chosen answer has the larger reward"),
    ("rewards/margins", "reward of the chosen answer less that of the rejected one"),
    ("rewards/chosen", "reward of chosen answers"),
    ("rewards/rejected", "reward of rejected answers"),
    ("logps/chosen", "log-probability of chosen answers: sum over the tokens of an answer"),
    ("logps/rejected", "log-probability of rejected answers: sum over the tokens of an answer"),
    ("nll_loss", "mean loss per token of chosen answers"),
    ("kl", "divergence from the reference, as KTO estimates it"),
)

# Charts of mixtures of experts: title, key in metrics.jsonl, note.
EXPERTS = (
    ("Load-balancing loss", "load_balancing_loss", "mean over layers and micro-batches, without the coefficient"),
    ("Load of the busiest expert", "max_expert_load", "its tokens, over those of equally busy experts"),
    ("Idle experts", "idle_experts", "of all layers, in the logged step"),
    ("Dropped tokens", "dropped_tokens", "share of the choices of tokens that experts did not take"),
)

Row = Sequence[str]


def render(runs: Sequence[Run], answers: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """The HTML of the page. It fetches nothing: style, script and data are in it.

    Args:
        answers: prompts, each with the answer of every run.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        ("Summary", summary(runs)),
        ("Curves", curves(runs)),
        ("Load of experts", loads(runs)),
        ("Answers", asked(runs, answers)),
        ("Settings", settings(runs)),
        ("Data", data(runs)),
        ("Time by module", profiles(runs)),
        ("Checkpoints", checkpoints(runs)),
        ("Events", events(runs)),
        ("Made with", provenance(runs)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    made = f"tandem {__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · Tandem</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{MAPS}</style></head><body>'
        f"<header><h1>{escape(title)}</h1><p>{made}</p></header><main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def summary(runs: Sequence[Run]) -> str:
    """A table with a row per run: its model, backend, state, losses and speed."""
    return table(SUMMARY, [_summary_row(number, run) for number, run in enumerate(runs)], kind="cards")


def _summary_row(place: int, run: Run) -> Row:
    start, steps = run.last_start, run.steps
    last = steps[-1] if steps else {}
    best = [f"{name} {min(y for _, y in run.validation_points(name)):.4f}" for name in run.validation_sets()]
    devices = "" if start["processes"] == 1 else f" × {start['processes']}"
    model = f"{start['model']['model_type']} {number(start['model']['parameters'])}"
    backend = f"{run.settings['training']['ai_framework']}, {start['device']}{devices}, {start['param_dtype']}"
    total = run.settings["training"]["train_iters"]
    mfu = run.typical("mfu")
    return (
        swatch(place, run),
        escape(model),
        escape(backend),
        escape(run.state()),
        f"{last.get('iteration', 0):,}" + (f" of {total:,}" if total else ""),
        number(sum(step["tokens"] for step in steps)),
        f"{last['loss']:.4f}" if last.get("loss") is not None else "",
        escape(", ".join(best)),
        _amount(run.typical("tokens_per_second"), "{:,.0f}"),
        _amount(run.typical("tflops_per_device"), "{:.2f}"),
        _amount(mfu, "{:.1%}"),
        duration(sum(step["seconds"] for step in steps)),
    )


def asked(runs: Sequence[Run], answers: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of prompts and the answers of each run."""
    rows = [(escape(prompt), *(f"<q>{escape(text)}</q>" for text in texts)) for prompt, texts in answers]
    return table(("", *(swatch(place, run) for place, run in enumerate(runs))), rows, kind="settings")


def curves(runs: Sequence[Run]) -> str:
    has_validation = any(run.validation_sets() for run in runs)
    charts = [
        both_scales(
            "Loss",
            [line for place, run in enumerate(runs) for line in (*_loss(place, run), *_validation(place, run))],
            "of training; dots on dashed lines are of validation" if has_validation else "by step",
        ),
        *_task_charts(runs),
        *(_preference_chart(runs, key, note) for key, note in PREFERENCES),
        *(_chart(runs, title, key, note) for title, key, note in EXPERTS),
        _chart(runs, "Gradient norm", "grad_norm", "before clipping", draw=both_scales),
        _chart(runs, "Learning rate", "lr"),
        _chart(runs, "Tokens per second", "tokens_per_second", "over all devices, without padding"),
        _chart(runs, "Seconds per step", "seconds", "without evaluation and saving"),
        _chart(runs, "Model FLOPs utilisation", "mfu"),
        _chart(runs, "Peak memory", "memory", "GB of the first rank so far", lambda value: value / 1e9),
        _chart(runs, "Batch size", "global_batch_size") if _changes(runs, "global_batch_size") else "",
    ]
    switch = '<input type="checkbox" id="log"><label for="log">logarithmic scale of loss and gradient norm</label>'
    return f'{switch}<div class="charts">{"".join(charts)}</div>'


def _loss(place: int, run: Run) -> list[Series]:
    points = run.points("loss")
    if len(points) <= SMOOTH_PARTS:
        return [Series(run.name, _colour(place), points)]
    return [
        Series(run.name, _colour(place), points, faint=True),
        Series(run.name, _colour(place), smoothed(points, 1 - SMOOTH_PARTS / len(points))),
    ]


def _validation(place: int, run: Run) -> list[Series]:
    return [
        Series(f"{run.name}: {name}", _colour(place), run.validation_points(name), dots=True)
        for name in run.validation_sets()
    ]


def _preference_chart(runs: Sequence[Run], key: str, note: str) -> str:
    """A metric of training, and as dots those of the validation sets."""
    series = [Series(run.name, _colour(place), run.points(key)) for place, run in enumerate(runs)]
    evaluated = {validation_metric(name, key): name for run in runs for name in run.validation_sets()}
    dots = [
        Series(f"{run.name}: {name}", _colour(place), run.points(metric), dots=True)
        for place, run in enumerate(runs)
        for metric, name in evaluated.items()
    ]
    shown = [metric for metric in evaluated if any(run.points(metric) for run in runs)]
    more = [f"dots on dashed lines are {', '.join(shown)}"] if shown else []
    return line_chart(key, [*series, *dots], "; ".join([note, *more]))


def _task_charts(runs: Sequence[Run]) -> list[str]:
    """A chart for each benchmark and metric."""
    points = [run.task_points() for run in runs]
    names = dict.fromkeys(name for of_run in points for name in of_run)
    return [
        line_chart(
            name,
            [
                Series(run.name, _colour(place), of_run[name], dots=True)
                for place, (run, of_run) in enumerate(zip(runs, points))
                if name in of_run
            ],
            "of a benchmark, while the run trained",
        )
        for name in names
    ]


def _chart(
    runs: Sequence[Run],
    title: str,
    key: str,
    note: str = "",
    scale: Callable[[float], float] = lambda value: value,
    draw: Callable[[str, Sequence[Series], str], str] = line_chart,
) -> str:
    series = [
        Series(run.name, _colour(place), [(x, scale(y)) for x, y in run.points(key)]) for place, run in enumerate(runs)
    ]
    return draw(title, series, note)


def _changes(runs: Sequence[Run], key: str) -> bool:
    return any(len({y for _, y in run.points(key)}) > 1 for run in runs)


def loads(runs: Sequence[Run]) -> str:
    """Pictures of the load of each expert, below the name of its run."""
    maps = [(swatch(place, run), expert_maps(run.expert_loads)) for place, run in enumerate(runs)]
    return "".join(f"<h3>{name}</h3>{of_run}" for name, of_run in maps if of_run)


def settings(runs: Sequence[Run]) -> str:
    """A table of the settings that are not at their default in some run. Names are bold where runs differ."""
    defaults = Settings().to_dict()
    rows = []
    for group, names in defaults.items():
        for name, default in names.items():
            values = [run.settings.get(group, {}).get(name, default) for run in runs]
            if any(value != default for value in values):
                mark = "<b>{}</b>" if any(value != values[0] for value in values) else "{}"
                rows.append((mark.format(name), *(escape(_plain(value)) for value in values)))
    return table(("", *(swatch(place, run) for place, run in enumerate(runs))), rows, kind="settings")


def data(runs: Sequence[Run]) -> str:
    head = ("set", "documents", "tokens", "trained", "template", "made from")
    rows: dict[str, Row] = {}
    for run in runs:
        for prefix, record in run.last_start["data"].items():
            rows.setdefault(prefix, _data_row(prefix, record))
    return table(head, list(rows.values()))


def _data_row(prefix: str, record: dict[str, Any] | None) -> Row:
    if record is None:
        return (escape(prefix), "", "", "", "", "the data has no record")
    counts, template = record["counts"], record["template"]
    sources = [f"{escape(source['file'])} <small>{source['sha256'][:12]}</small>" for source in record["sources"]]
    return (
        escape(prefix),
        f"{counts['documents']:,}",
        f"{counts['tokens']:,}",
        f"{counts['trained_tokens']:,}",
        escape(template["prompt_type"]) if template else "",
        "<br>".join(sources),
    )


def profiles(runs: Sequence[Run]) -> str:
    """Tables with bars: the profiled seconds of each module."""
    parts = []
    for place, run in enumerate(runs):
        for profile in run.profiles:
            total = sum(profile["seconds"].values()) or 1.0
            ordered = sorted(profile["seconds"].items(), key=lambda item: -item[1])
            rows = [
                (
                    escape(name),
                    f"{seconds:.4f} s",
                    f"{seconds / total:.1%}",
                    f'<span class="bar run{_colour(place)}" style="width:{200 * seconds / total:.0f}px"></span>',
                )
                for name, seconds in ordered
            ]
            title = f"{swatch(place, run)} steps {profile['first']} to {profile['last']}"
            note = f"trace: {escape(profile['trace'])}"
            parts.append(f"<h3>{title}</h3>{table(('', 'time', 'share', ''), rows)}<p><small>{note}</small></p>")
    return "".join(parts)


def checkpoints(runs: Sequence[Run]) -> str:
    rows = [
        (
            swatch(place, run),
            f"{save['iteration']:,}",
            escape(save["time"].replace("T", " ")),
            f"{save['seconds']:.2f} s",
            "on disk" if save["present"] else "removed",
        )
        for place, run in enumerate(runs)
        for save in run.saves()
    ]
    return table(("", "step", "saved", "training waited", ""), rows)


def events(runs: Sequence[Run]) -> str:
    """A table of all events except saves, which `checkpoints` shows."""
    rows = [
        (
            swatch(place, run),
            escape(event["time"].replace("T", " ")),
            escape(event["event"]),
            f"{event['iteration']:,}" if "iteration" in event else "",
            escape(", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event", "iteration"))),
        )
        for place, run in enumerate(runs)
        for event in run.events
        if event["event"] != "saved"
    ]
    return table(("", "time", "event", "step", ""), rows)


def provenance(runs: Sequence[Run]) -> str:
    """A table of the versions, code, machine and command of each run's last start."""
    columns = [_provenance(run.last_start) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(escape(name), *(escape(column.get(name, "")) for column in columns)) for name in names]
    return table(("", *(swatch(place, run) for place, run in enumerate(runs))), rows, kind="settings")


def _provenance(start: dict[str, Any]) -> dict[str, str]:
    code = start["code"]
    modified = " with changes" if code and code["modified"] else ""
    return {
        "command": start["command"],
        "directory": start["directory"],
        "weights": start["weights"]["location"],
        "adapters": start["weights"].get("adapters", {}).get("location", ""),
        "code": f"{code['commit']}{modified}" if code else "installed package",
        **start["versions"],
        "system": f"{start['platform']['system']}, {start['platform']['cpus']} CPUs",
        **start["environment"],
    }


def table(head: Row, rows: Sequence[Row], kind: str = "") -> str:
    """An HTML table of cells that are HTML. Empty columns are left out. Without rows it is an empty string."""
    if not rows:
        return ""
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    titles = "".join(f"<th>{head[column]}</th>" for column in kept)
    names = {column: escape(_words(head[column])) for column in kept}  # shown next to the cells on a narrow screen
    cells = ("".join(f'<td data-name="{names[column]}">{row[column]}</td>' for column in kept) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    head_row = f"<thead><tr>{titles}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head_row}<tbody>{lines}</tbody></table></div>'


def _words(cell: str) -> str:
    """The text of an HTML cell."""
    return unescape(re.sub(r"<[^>]*>", "", cell))


def swatch(place: int, run: Run) -> str:
    return f'<span class="swatch run{_colour(place)}"></span>{escape(run.name)}'


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _colour(place: int) -> int:
    return place % COLOURS


def _amount(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)

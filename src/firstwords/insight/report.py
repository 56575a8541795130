"""The report: one HTML file that shows what a run learnt. It needs no network, and its text can do no harm.

What a text or a model says stands in it only as escaped HTML or as JSON that no HTML parser can leave; the browser is told,
by a Content-Security-Policy, to run the report's own scripts alone (by their hashes) and to fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from firstwords import __version__
from firstwords.config import NONE
from firstwords.insight.explain import Explanation
from firstwords.insight.record import Record, Table
from firstwords.insight.surprise import PART, heat
from firstwords.reading import number

Line = dict[str, Any]
Cell = tuple[str, str]  # what it is, and its value

MOST_SAMPLES = 24  # evenly chosen where there are more
# What a plan says of a run before it begins: key, words, and what a value is measured in.
PLANNED = (
    ("steps", "steps", ""),
    ("epochs", "epochs", ""),
    ("tokens_per_s", "tokens a second", ""),
    ("elapsed_s", "time", "s"),
    ("memory_bytes", "memory", "bytes"),
    ("bits_per_byte", "held-out bits per byte", ""),
)
# Charts: title, unit, and lines of (table, column, name, look). The looks are drawn by page/report.js.
CHARTS = (
    (
        "Loss",
        "nats per token",
        (
            ("steps", "nats_per_token", "training, each step", "faint"),
            ("evaluations", "train_nats_per_token", "training, without dropout", "dashed"),
            ("evaluations", "nats_per_token", "held out", "strong"),
        ),
    ),
    (
        "Bits per byte",
        "",
        (
            ("evaluations", "train_bits_per_byte", "training, without dropout", "dashed"),
            ("evaluations", "bits_per_byte", "held out", "strong"),
        ),
    ),
    ("Learning rate", "", (("steps", "lr", "learning rate", "line"),)),
    ("Gradient norm", "L2, before clipping", (("steps", "grad_norm", "gradient norm", "line"),)),
    ("Speed", "tokens a second", (("steps", "tokens_per_s", "speed", "line"),)),
    ("Memory", "bytes, the most so far", (("evaluations", "memory_bytes", "memory", "line"),)),
)
MEMORISATION_CHARTS = (
    (
        "Share of samples",
        "share",
        (
            ("memorisation", "copied_share", "copied from the training text", "strong"),
            ("memorisation", "novel_8grams", "new 8-grams in samples", "line"),
            ("memorisation", "held_out_novel_8grams", "new 8-grams in held-out text", "dashed"),
        ),
    ),
    ("Longest copy", "characters", (("memorisation", "longest_copy_chars", "longest copy", "strong"),)),
    ("Gap", "nats per token, held out - training", (("memorisation", "gap", "gap", "strong"),)),
    (
        "Loops and variety",
        "share",
        (
            ("memorisation", "repeated", "repeated in samples", "strong"),
            ("memorisation", "held_out_repeated", "repeated in held-out text", "dashed"),
            ("memorisation", "distinct", "distinct in samples", "line"),
            ("memorisation", "held_out_distinct", "distinct in held-out text", "faint"),
        ),
    ),
)


def report(records: Sequence[Record], explanation: Explanation | None = None) -> Iterator[bytes]:
    """Yield the page of a run, or of several beside each other, in pieces.

    Args:
        records: At least one.
        explanation: A held-out passage as the first run's model sees it.
    """
    one = records[0] if len(records) == 1 else None
    charts = _charts(CHARTS, records)
    sections = [_headline(records)]
    if one is not None and explanation is not None:
        sections.append(_map(explanation, "How surprised it is by text that it has not seen"))
    elif one is not None:
        sections.append(_section("map", "Surprise map", "<p>No held-out text is at hand, so there is nothing to map.</p>"))
    if one is not None and one.scale:
        sections.append(_scale(one.scale, one.best))
    sections.append(_section("curves", "How it learnt", _axes(records) + _places(charts)))
    if one is not None:
        meter = _charts(MEMORISATION_CHARTS, records, first=len(charts))
        sections += _memorisation(one, meter) + _samples(one) + _plan(one)
        charts += meter
    sections += _differences(records) if one is None else _settings(one)
    names = ", ".join(record.name for record in records)
    tables = [
        {"name": r.name, "steps": r.steps, "evaluations": r.evaluations, "memorisation": r.memorisation} for r in records
    ]
    data = {"runs": tables, "charts": charts, "explanation": None if explanation is None else explanation.as_dict()}
    yield from _page(names, sections, data, plotting=True)


def explained(explanation: Explanation, name: str) -> Iterator[bytes]:
    """Yield a page with the surprise map of a text alone.

    Args:
        explanation: The text as a model sees it.
        name: Of the model.
    """
    data = {"runs": [], "charts": [], "explanation": explanation.as_dict()}
    yield from _page(name, [_map(explanation, "How surprised it is")], data, plotting=False)


def _page(name: str, sections: Iterable[str], data: Mapping[str, Any], *, plotting: bool) -> Iterator[bytes]:
    scripts = [_plotly()] if plotting else []
    scripts.append(_asset("report.js"))
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in scripts)
    before, after = _asset("report.html").split("$scripts")
    values = {"title": escape(name), "css": _asset("report.css"), "hashes": hashes, "sections": "\n".join(sections)}
    yield Template(before).substitute(values, data=_inert_json(data), version=__version__).encode(errors="replace")
    for code in scripts:
        yield f"<script>{code}</script>\n".encode()
    yield after.encode()


def _asset(name: str) -> str:
    return (importlib.resources.files("firstwords.insight") / "page" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Return plotly.js, which the package plotly carries; its Python is not needed."""
    code = (importlib.resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    assert "</script" not in code.lower()
    return code


def _inert_json(value: Mapping[str, Any]) -> str:
    r"""Return JSON in which `<`, `>` and `&` are spelled `\u003c` and so on: nothing in it can end or open an element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def _list(cells: Iterable[Cell]) -> str:
    return "<dl>" + "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in cells) + "</dl>"


def _grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _headline(records: Sequence[Record]) -> str:
    """Return the figures that matter: large for one run, a table for several."""
    if len(records) == 1:
        best = _number_of(records[0].best, "bits_per_byte")
        large = "" if best is None else f'<p class="large"><b>{best:.3f}</b> bits per byte on text that it has not seen</p>'
        return f'<section id="headline">{large}{_list(figures(records[0])[bool(large) :])}</section>'
    columns = [dict(figures(record)) for record in records]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = ((key, *(column.get(key, "–") for column in columns)) for key in keys)
    note = f'<p class="note">{words}</p>' if (words := _unlike(records)) else ""
    return f'<section id="headline">{note}{_grid(("", *(record.name for record in records)), rows)}</section>'


def _unlike(records: Sequence[Record]) -> str:
    """Return what a person should know before comparing the figures of these runs."""
    if len({_judged_on(record) for record in records}) > 1:
        return "These runs are not judged on the same text: which of them is better, their figures do not tell."
    said = []
    if len({_number_of(record.best, "n_bytes") for record in records} - {None}) > 1:
        said.append("They judged themselves by more and by less of the held-out text: firstwords eval RUN --against RUN")
        said.append("holds them against each other on all of it.")
    if not _have_same_tokens(records):
        said.append("Their tokens are not the same: bits per byte compare, nats per token and perplexity do not.")
    return " ".join(said)


def _have_same_tokens(records: Sequence[Record]) -> bool:
    """Whether the tokenizers are the same: by their hashes, or where a run has no checkpoint to tell, by their names."""
    hashes = {record.tokenizer_sha256 for record in records}
    if "" not in hashes:
        return len(hashes) == 1
    names = ((str(record.config.get("tokenizer")), record.config.get("text_sha256")) for record in records)
    return len({(name, text if name.startswith("bpe") else None) for name, text in names}) == 1


def _judged_on(record: Record) -> Any:
    """Return what tells the held-out text of a run from others: a text of its own, or a share of what it learns from."""
    val, own = record.config.get("val", NONE), (record.config.get("text_sha256"), record.config.get("val_fraction"))
    return own if val in (None, NONE) else val


def figures(record: Record) -> list[Cell]:
    """Return what is said of a run in a line each: only what is known of it."""
    best, last = record.best, {name: _last(column) for name, column in record.steps.items()}
    bits, unsure = _number_of(best, "bits_per_byte"), _number_of(best, "perplexity")
    seen, elapsed_s, training = (
        last.get("tokens"),
        last.get("elapsed_s"),
        _last(record.evaluations.get("train_nats_per_token")),
    )
    held_out = _last(record.evaluations.get("nats_per_token"))
    gap = None if held_out is None or training is None else held_out - training
    cells = [
        ("held-out bits per byte", bits, "{:.3f}"),
        ("perplexity", unsure, "{:,.1f}"),
        ("best step", _number_of(best, "step"), "{:,}"),
        ("steps", last.get("step"), "{:,}"),
        ("parameters", record.n_parameters, "{:,}"),
        ("tokens learnt from", seen, "{:,}"),
        ("epochs", last.get("epochs"), "{:.2f}"),
        ("time", elapsed_s, "{:,.0f} s"),
        ("tokens a second", seen / elapsed_s if seen and elapsed_s else None, "{:,.0f}"),
        ("held-out less training loss", gap, "{:+.3f} nats"),
    ]
    shown = [(key, form.format(value)) for key, value, form in cells if value is not None]
    ended = "" if record.ended is None else str(record.ended.get("reason"))
    return shown if ended == "done" else [*shown, ("ended", ended or "not yet, or it was killed")]


def _map(explanation: Explanation, title: str) -> str:
    """Return the passage with each token coloured, and the place where report.js shows the one that is chosen."""
    tokens = "".join(_token(i, token.completes, heat(token.log_probability)) for i, token in enumerate(explanation.tokens))
    steps = "".join(f'<i style="--heat:{level / 4}"></i>' for level in range(5))
    body = (
        '<p class="note">Each token is coloured by -log p: how surprised the model was to read it there. Choose one '
        "(or step through them with the arrow keys) to see what it expected, and how the token enters the loss.</p>"
        f'<p class="legend">expected {steps} surprising</p>'
        f'<div class="passage" role="group" aria-label="the passage, token by token">{tokens}</div>'
        '<div id="chosen" aria-live="polite"></div>'
    )
    return _section("map", title, body)


def _token(index: int, text: str, heat_of_it: float) -> str:
    """Return a token as it is chosen by a click. A line break is shown, and breaks the line; part of a letter is a dot."""
    shown = escape(text.replace("\r", "" if "\n" in text else "␍") or PART).replace("\n", '<span class="break">⏎</span>\n')
    focus = 0 if index == 1 else -1  # one stop for the tab key; the arrows go on from there
    place = f'role="button" tabindex="{focus}" data-i="{index}" style="--heat:{heat_of_it:.3f}"'
    return f'<span class="token" {place}>{shown}</span>'


def _scale(scale: Mapping[str, Any], best: Line | None) -> str:
    """Return the one honest scale: a line for each model, its interval, and what that means in words.

    It is of all held-out text; where the run judged itself by less, its `best` is another figure, and that is said.
    """
    known = [row for row in scale.get("scale") or () if number(row.get("bits_per_byte")) is not None]
    most = max([8.0, *(number(row.get("high")) or row["bits_per_byte"] for row in known)])
    rows = []
    for row in sorted(known, key=lambda row: -row["bits_per_byte"]):
        value = row["bits_per_byte"]
        low, high = number(row.get("low")), number(row.get("high"))
        low, high = (value if low is None else low), (value if high is None else high)
        place = f"--at:{value / most:.4f};--low:{low / most:.4f};--high:{high / most:.4f}"
        interval = "" if low == high else f' <small title="95 % interval">{low:.3f} to {high:.3f}</small>'
        rows.append(
            f'<div class="on-scale" style="{place}"><span>{escape(str(row.get("name")))}</span>'
            f'<span class="track"><i></i><b></b></span><span>{value:.3f}{interval}</span></div>'
        )
    said = [*(scale.get("words") or ()), *filter(None, [scale.get("caveat")])]
    words = "".join(f"<p>{escape(str(line))}</p>" for line in said)
    judged, there, note = _number_of(best, "n_tokens"), number(scale.get("n_tokens")), ""
    if judged is not None and there is not None and judged < there:
        top = f"the figure at the top is of the {judged:,} by which the run judged itself"
        note = f'<p class="note">Of all {there:,} held-out tokens; {top}.</p>'
    return _section("scale", "Bits per byte, beside others", note + "".join(rows) + words)


def _charts(kinds: Any, records: Sequence[Record], first: int = 0) -> list[Line]:
    """Return the charts that there are numbers for, as page/report.js draws them."""
    found: list[Line] = []
    for title, unit, wanted in kinds:
        lines = [
            {"run": run, "table": table, "column": column, "name": name, "look": look}
            for run, record in enumerate(records)
            for table, column, name, look in wanted
            if column in _of(record, table)
        ]
        if lines:
            found.append({"id": f"chart-{first + len(found)}", "title": title, "unit": unit, "lines": lines})
    return found


def _of(record: Record, table: str) -> Table:
    return {"steps": record.steps, "evaluations": record.evaluations, "memorisation": record.memorisation}[table]


def _places(charts: Iterable[Line]) -> str:
    """Return where the charts will stand, each with its title."""
    return (
        '<div class="charts">'
        + "".join(
            f"<figure><figcaption>{escape(chart['title'])} <small>{escape(chart['unit'])}</small></figcaption>"
            f'<div class="chart" id="{chart["id"]}"></div></figure>'
            for chart in charts
        )
        + "</div>"
    )


def _axes(records: Sequence[Record]) -> str:
    """Return the switch of what the curves are drawn against."""
    names = {"step": "steps", "epochs": "epochs", "tokens": "tokens", "elapsed_s": "time"}
    there = [axis for axis in names if all(axis in record.steps for record in records)]
    buttons = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == "step" else ""}>{names[axis]}</label>'
        for axis in there
    )
    every = max(record.every for record in records)
    note = f'<p class="note">Each point of a step\'s curve is the mean of {every} steps.</p>' if every > 1 else ""
    return f'<fieldset class="axes"><legend>against</legend>{buttons}</fieldset>{note}'


def _memorisation(record: Record, charts: list[Line]) -> list[str]:
    """Return the memorisation meter; nothing where the run has none."""
    if not charts:
        return []
    at_the_end = {name: _last(column) for name, column in record.memorisation.items()}
    copied, place = record.longest_copy
    cells = [
        ("longest copy", _formatted(at_the_end.get("longest_copy_chars"), "{:,} characters")),
        ("where it stands", place),
        ("what it is", copied.strip()),
        ("copied", _formatted(at_the_end.get("copied_share"), "{:.0%}")),
        ("new 8-grams", _formatted(at_the_end.get("novel_8grams"), "{:.0%}")),
        ("new 8-grams in held-out text", _formatted(at_the_end.get("held_out_novel_8grams"), "{:.0%}")),
    ]
    note = '<p class="note">What the model says, held against its training text; held-out text is what is natural.</p>'
    body = note + _list(cell for cell in cells if cell[1]) + _places(charts)
    return [_section("memorisation", "Did it learn the text by heart?", body)]


def _samples(record: Record) -> list[str]:
    """Return what the model said at some steps, from the first to the last."""
    n = len(record.samples)
    chosen = range(n) if n <= MOST_SAMPLES else [round(i * (n - 1) / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)]
    said = [record.samples[i] for i in chosen]
    body = "".join(
        f'<li><span>step {step:,}</span><blockquote dir="auto">{escape(text.strip())}</blockquote></li>'
        for step, text in said
    )
    prompt = str(record.config.get("sample_prompt") or "")
    note = f'<p class="note">Each goes on from: {escape(prompt)}</p>' if prompt else ""
    return [_section("samples", "What it said on the way", f"{note}<ol>{body}</ol>")] if said else []


def _plan(record: Record) -> list[str]:
    """Return what was planned beside what came; nothing where there was no plan."""
    actual = {name: _last(column) for name, column in record.steps.items()}
    actual |= {"steps": actual.get("step"), "bits_per_byte": _number_of(record.best, "bits_per_byte")}
    actual["memory_bytes"] = _last(record.evaluations.get("memory_bytes"))
    seen, elapsed_s = actual.get("tokens"), actual.get("elapsed_s")
    actual["tokens_per_s"] = seen / elapsed_s if seen and elapsed_s else None
    rows = [
        (words, _range(record.predicted[key], unit), _range(actual.get(key), unit))
        for key, words, unit in PLANNED
        if key in record.predicted
    ]
    wanted_s = number(record.config.get("for_s"))
    if wanted_s is not None and "elapsed_s" not in record.predicted:
        rows.append(("time", _range(wanted_s, "s"), _range(elapsed_s, "s")))
    for i, plan in enumerate(record.plans):
        name = f"steps, as planned at step {_range(number(plan.get('step')))}"
        rows.append((name, _range(number(plan.get("total_steps"))), _range(actual.get("step")) if not i else ""))
    return [_section("plan", "Planned and actual", _grid(("", "planned", "actual"), rows))] if rows else []


def _range(value: Any, unit: str = "") -> str:
    """Return a number, or a range of them given as [low, mid, high], for a person."""
    if isinstance(value, list | tuple) and len(value) == 3:
        low, mid, high = map(_range, value)
        return f"{mid} ({low} to {high}) {unit}".strip()
    found = number(value)
    if found is None:
        return "–"
    return (f"{found:,.0f}" if float(found).is_integer() or abs(found) >= 100 else f"{found:.3g}") + (
        f" {unit}" if unit else ""
    )


def _settings(record: Record) -> list[str]:
    """Return what one needs to make the run again: machine, configuration, checksums."""
    parts = [
        ("environment", "The machine", {"firstwords": __version__, **record.environment}),
        ("config", "Configuration", {key: value for key, value in record.config.items() if value != "none"}),
        ("checksums", "Checksums (SHA-256)", {"text": record.config.get("text_sha256"), **record.checksums}),
    ]
    lists = [(name, title, _list((key, str(value)) for key, value in cells.items())) for name, title, cells in parts]
    return [f'<details id="{name}"><summary>{title}</summary>{found}</details>' for name, title, found in lists]


def _differences(records: Sequence[Record]) -> list[str]:
    """Return the keys of the configurations that are not the same in all runs."""
    keys = list(dict.fromkeys(key for record in records for key in record.config))
    values = [(key, *(_plainly(record.config.get(key, "none")) for record in records)) for key in keys]
    same = {"tokenizer"} if _have_same_tokens(records) else set()  # wherever the file of each lies
    rows = [row for row in values if len(set(row[1:])) > 1 and row[0] not in same]
    if not rows:
        return []
    return [_section("config", "Where they differ", _grid(("", *(record.name for record in records)), rows))]


def _plainly(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _last(column: Sequence[Any] | None) -> Any:
    """Return the last number of a column, or None."""
    return next((value for value in reversed(column or ()) if value is not None), None)


def _number_of(line: Line | None, key: str) -> Any:
    return None if line is None else number(line.get(key))


def _formatted(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)

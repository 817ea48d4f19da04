"""What people are shown: escaped, offline, the same for the same input, and honest about losses."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from html.parser import HTMLParser

import nbformat
import numpy as np
import polars as pl
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fincoach import show
from fincoach.evaluate.publish import failure, publish_notebook, render
from fincoach.evaluate.report import (
    REQUIRED,
    Gate,
    ReportError,
    Section,
    ValidationReport,
    Verdict,
    alternatives,
    at_least,
    at_most,
    commands,
    comparison,
    decide,
    findings,
    gate_list,
    grid,
    note,
    numbers,
    outcome,
    picture,
    text,
)

EVIL = """<script>alert(1)</script><img src=x onerror="alert(1)">'"&"""
words = st.text(max_size=30) | st.sampled_from([EVIL, "<b", "]]>", "--><script>", "javascript:x", "a&amp;b", "</style><script>"])


class Audit(HTMLParser):
    """What a page holds that it must not: scripts, handlers, anything that would be fetched, unbalanced elements."""

    VOID = frozenset("meta link br hr img col input".split())  # noqa: SIM905

    def __init__(self, page):
        super().__init__()
        self.faults, self.open, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(page)
        self.close()
        self.faults += [f"not closed: {t}" for t in self.open]
        self.faults += [f"a link to nowhere: {i}" for i in self.links if i not in self.ids]

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.faults.append(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.faults.append(f"{tag} {name}")
            if name in ("src", "href", "xlink:href", "action", "srcset") and not re.match(r"#|data:", value or ""):
                self.faults.append(f"{tag} {name}={value}")
            if name == "href" and (value or "").startswith("#"):
                self.links.append(value[1:])
            if name == "id":
                self.ids.append(value)
            if name == "style" and re.search(r"url\((?!#)|@import", value or ""):
                self.faults.append(f"{tag} style={value}")
        if tag == "img" and "alt" not in dict(attrs):
            self.faults.append("img without alt")
        if tag == "svg" and not dict(attrs).get("aria-label"):
            self.faults.append("svg without a label")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"unbalanced: {tag}")

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.faults += re.findall(r"url\(|@import|https?:", data)
        else:
            self.text.append(data)


def audit(page):
    """The faults of a page."""
    return Audit(str(page)).faults


def test_the_audit_sees_faults():
    assert audit('<p onclick="x"><script src="http://x"></script><img src="//x/y.png">') == [
        "p onclick", "script", "script src=http://x", "img src=//x/y.png", "img without alt", "not closed: p"]
    assert audit("<style>a{background:url(x)}</style><a href='#gone'>b</a>") == ["url(", "a link to nowhere: gone"]
    assert audit("<b><i></b></i>") == ["unbalanced: b", "unbalanced: i"]


def a_report(word="fine", **changes):
    """A report in which every text is `word`, with every kind of block."""
    gates = [at_least(word, 0.9, 0.8, word, (0.85, 0.95)), at_most(word, float("nan"), 0.8, word, blocking=False)]
    blocks = [
        text(word), numbers({word: 0.5, "n": 12}, {word: word}), note(word, "warning", word), grid([{"a": word, "b": 0.25, "c": None}], {"a": word, "b": "B", "c": "C"}, {"b": ".1%"}, word, ["b"], word),
        gate_list(gates), findings([{"severity": "note", "what": word or "x", "evidence": word, "advice": word}]),
        alternatives([{"name": word, "why": word, "result": word, "chosen": True}]), commands([(word, word)]),
    ]
    values = {
        "model": "segmentation", "title": word, "version": word, "as_of": "2025-06-30", "verdict": decide(gates, word, word),
        "sections": [Section(i, word, (word.strip() and word) or "x", blocks) for i in REQUIRED], "facts": {word: word}, "made_from": {word: word},
    }
    return ValidationReport(**values | changes)


# Escaping


@settings(max_examples=25, deadline=None)
@given(words)
def test_no_text_becomes_markup_in_a_report(word):
    page = a_report(word).to_html()
    assert audit(page) == []
    assert page.count("<h1") == 1


@settings(max_examples=80, deadline=None)
@given(words, words)
def test_no_text_becomes_markup_in_tables_and_cards(a, b):
    shown = show.page(a, show.join([show.table([{a: b, "x": a}], caption=b, footnote=a, bars=[a]), show.facts({a: b}, {a: b}), show.callout(a, "error", b), show.badge(a), show.prose(b)]))
    assert audit(shown) == []
    assert re.sub(r"\s", "", a) in re.sub(r"\s", "", "".join(Audit(shown).text)).replace("\0", "�") or not a.isprintable() or "`" in a or "*" in a


@settings(max_examples=300, deadline=None)
@given(st.lists(words | st.sampled_from(["<p>", "</p>", "<svg>", "<a href='http://x'>", "<style>", "</style>", "<td style='x:url(//a)'>", "<!--", "-->", "<b/>", "<br/>", "<script>", "</script>", "<![CDATA["]), max_size=8))
def test_clean_makes_anything_harmless_and_stays(pieces):
    once = show.clean("".join(pieces))
    assert [f for f in audit(once) if "alt" not in f and "label" not in f and "nowhere" not in f] == []
    assert show.clean(once) == once


@pytest.mark.parametrize("hostile", [
    '<a href="javascript:alert(1)">x</a>', '<a href=" http://x">x</a>', '<svg><use href="http://x#a"/></svg>', '<svg><image xlink:href="http://x/a.png"/></svg>',
    "<div style=\"background:u\\72l(http://x)\">", "<div style='background:url(//x)'>", "<div style='width:expression(alert(1))'>", '<img src="data:text/html,x">',
    '<img src="data:image/svg+xml;base64,AAAA">', "<meta http-equiv=refresh content='0;url=http://x'>", "<link rel=stylesheet href=http://x>", "<iframe srcdoc='x'></iframe>",
    "<math><mi xlink:href='http://x'>a", "<svg><foreignObject><p>x</p></foreignObject></svg>", "<svg onload=alert(1)>", "<div style='x:image-set(\"http://x\" 1x)'>", "<base href=http://x>",
])
def test_clean_lets_nothing_out(hostile):
    shown = show.clean(hostile)
    assert "http" not in shown.replace("http://www.w3.org", "")
    assert not re.search(r"(?i)javascript:|onload|url\(|expression\(|data:text|svg\+xml|<(meta|link|iframe|base|math|foreignobject)", shown)


def test_a_chart_survives_cleaning():
    chart = show.heatmap([[1, -2], [np.nan, 0.5]], ["a", "b"], ["c", "d"], alt="four cells")
    assert show.clean(chart).count("<path") == chart.count("<path") > 3
    assert "+1.0" in show.clean(chart)
    assert 'viewBox="0 0 ' in show.clean(chart)


# The same input, the same bytes


CHARTS = {
    "intervals": lambda: show.intervals([(EVIL, 0.5, 0.4, 0.6), ("b", None, None, None), ("c", 0.2, None, None)], alt="x", reference=0.5, reference_label=EVIL),
    "heatmap": lambda: show.heatmap(np.eye(3), ["a", EVIL, "c"], ["Conservative Savers", "b", "c"], alt="x"),
    "histogram": lambda: show.histogram({"a": [1, 2, 2, None], EVIL: [3.0, np.nan]}, alt="x", marks={EVIL: 2}),
    "empty": lambda: show.histogram([], alt="nobody"),
    "lines": lambda: show.lines([1, 2, 3], {EVIL: [1, None, 3], "b": ([1, 2, 3], [0, 1, 2], [2, 3, 4])}, alt="x"),
    "shares": lambda: show.shares({EVIL: {"a": 0.4, EVIL: 0.6}, "y": {"a": 1.0}}, alt="x"),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_deterministic_escaped_and_text(name):
    chart = CHARTS[name]()
    assert chart == CHARTS[name]()
    assert audit(chart) == []
    assert "<script" not in chart
    assert "dc:date" not in chart
    assert not re.search(r"[\d.]+ 'DejaVu", chart)


def test_charts_are_the_same_in_another_process():
    code = "from fincoach import show; import hashlib; print(hashlib.sha256(show.lines([1, 2], {'a': [1, 2]}, alt='x').encode()).hexdigest())"
    there = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    assert there == hashlib.sha256(show.lines([1, 2], {"a": [1, 2]}, alt="x").encode()).hexdigest()


def test_two_charts_on_a_page_share_no_id():
    ids = re.findall(r'\bid="([^"]*)"', CHARTS["lines"]() + CHARTS["heatmap"]() + CHARTS["histogram"]())
    assert len(ids) == len(set(ids)) > 0


def test_charts_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    CHARTS["shares"]()
    assert dict(matplotlib.rcParams) == before


def test_show_is_light():
    code = "import sys, fincoach.show; print(sorted({'numpy', 'polars', 'pandas', 'sqlalchemy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip() == "[]"


# Values


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=15))
def test_plain_is_json_and_stays(value):
    once = show.plain(value)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == show.plain(once)


@dataclass(frozen=True)
class Result(show.Card):
    """A card without any override."""

    name: str
    day: date
    scores: tuple
    missing: float = float("nan")


def test_a_card_needs_nothing_but_its_fields(tmp_path):
    card = Result(EVIL, date(2025, 6, 30), (1, 2))
    assert card.to_dict() == {"name": EVIL, "day": "2025-06-30", "scores": [1, 2], "missing": None}
    assert audit(card._repr_html_()) == []
    assert audit(card.save(tmp_path / "a/card.html").read_text()) == []
    assert json.loads(card.save(tmp_path / "card.json").read_text()) == card.to_dict()
    assert pl.read_csv(card.save(tmp_path / "card.csv"))["name"].to_list() == [EVIL]
    with pytest.raises(ValueError, match=r"\.html, \.json or \.csv"):
        card.save(tmp_path / "card.exe")


def test_style_of_a_card_touches_only_cards():
    style = re.search(r"<style>(.*?)</style>", show.styled(show.Html("x"))).group(1)
    selectors = [s for rule in re.findall(r"([^{}]+)\{[^{}]*\}", style) for s in rule.split(",")]
    assert len(selectors) > 40
    assert [s for s in selectors if not re.match(r"\s*\.fc\b", s)] == []


# Verdicts


def test_a_failed_or_unmeasured_blocking_gate_holds():
    good, bad = at_least("good", 1, 0, ""), at_least("bad", -1, 0, "")
    unknown = at_least("unknown", None, 0, "")
    shown = at_least("shown", -1, 0, "", blocking=False)
    assert decide([good, shown], "yes", "no").decision == "promote"
    assert decide([good, bad], "yes", "{failed}").headline == "bad (failed)"
    assert decide([good, unknown], "yes", "{failed}").headline == "unknown (not measured)"
    for gate in (bad, unknown):
        with pytest.raises(ReportError, match="cannot promote"):
            Verdict("promote", "yes", (gate,))


@given(st.floats(), st.floats(allow_nan=False), st.booleans())
def test_gates_judge_as_they_say(value, threshold, least):
    gate = (at_least if least else at_most)("g", value, threshold, "")
    expected = None if not np.isfinite(value) else value >= threshold if least else value <= threshold
    assert gate.passed is expected


def test_a_gate_by_its_interval_needs_one():
    with pytest.raises(ReportError, match="has none"):
        at_least("g", 1.0, 0.0, "", bound=True)


def test_losses_are_printed_as_plainly_as_wins():
    block = comparison("AUC", [{"name": "ours", "value": 0.7, "low": 0.6, "high": 0.8, "role": "ours"}, {"name": "simple", "value": 0.8, "low": 0.75, "high": 0.85},
                               {"name": "oracle", "value": 0.9, "low": None, "high": None, "role": "bound"}],
                       differences=[{"against": "simple", "value": -0.1, "low": -0.2, "high": -0.01}, {"against": "oracle", "value": -0.2, "low": -0.3, "high": -0.1}])
    shown = block.to_html()
    assert [d["outcome"] for d in block.content["differences"]] == ["loss", "short of the best possible"]
    assert '<span class="fc-badge fc-error">loss</span>' in shown
    assert "−0.10" in shown
    assert "<details" not in shown[shown.index("This model against") :]


@given(st.floats(-1, 1), st.floats(0, 1), st.booleans())
def test_outcome_turns_with_the_direction(low, width, higher):
    opposite = {"win": "loss", "loss": "win"}
    said = outcome(low, low + width, higher)
    assert outcome(low, low + width, not higher) == opposite.get(said, said)


# The report


def test_every_section_is_required_once():
    for i in REQUIRED:
        with pytest.raises(ReportError, match=f"lacks the section {i}"):
            a_report(sections=[Section(j, "", "x") for j in REQUIRED if j != i])
    with pytest.raises(ReportError, match="more than once"):
        a_report(sections=[Section(j, "", "x") for j in [*REQUIRED, "data"]])
    with pytest.raises(ReportError, match="there is no section 'nonsense'; there are summary"):
        Section("nonsense", "", "x")
    with pytest.raises(ReportError, match="needs a lead"):
        Section("data", "", " ")


def test_order_and_contents_are_always_the_same():
    report = a_report(sections=[Section(j, "", "x") for j in reversed(REQUIRED)])
    assert re.findall(r'<section id="(\w+)"', report.to_html()) == list(REQUIRED)
    assert re.findall(r'<li><a href="#(\w+)"', report.to_html()) == ["verdict", *REQUIRED]


@settings(max_examples=15, deadline=None)
@given(words)
def test_the_stored_report_is_the_report(word):
    report = a_report(word)
    again = ValidationReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again == report
    assert again.to_html() == report.to_html()


def test_files_are_the_same_twice_and_whole(tmp_path):
    charts = Section("results", "", "x", [picture(CHARTS["lines"](), "cap"), comparison("m", [{"name": "a", "value": 1.0}])])
    report = a_report(sections=[*(Section(j, "", "x") for j in REQUIRED if j != "results"), charts])
    one, two = report.save(tmp_path / "a"), report.save(tmp_path / "b")
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".json").read_bytes() == two.with_suffix(".json").read_bytes()
    assert audit(one.read_text()) == []
    assert "Content-Security-Policy" in one.read_text()
    assert sorted(p.name for p in one.parent.iterdir()) == ["report.html", "report.json"]


def test_a_newer_report_is_refused():
    with pytest.raises(ReportError, match="format 2"):
        ValidationReport.from_dict(a_report().to_dict() | {"format": 2})


def test_gate_from_a_caller_keeps_its_own_rule():
    gate = Gate("Monotone", None, None, True, "Never falls.", rule="in every refit")
    assert "in every refit" in gate_list([gate]).to_html()


# Publishing notebooks


def notebook(*cells):
    """A notebook that starts with a title."""
    return new_notebook(cells=[new_markdown_cell("# Retrain **it**"), *cells])


def html_out(markup):
    """A cell that shows `markup`."""
    return new_code_cell("show", outputs=[new_output("display_data", {"text/html": markup, "text/plain": "x"})])


def test_a_page_from_a_notebook_is_offline_and_harmless():
    cells = [html_out(EVIL + '<link href="http://x"><p>kept</p>'), new_markdown_cell("[a](http://x) ![b](http://y/z.png) <script>no</script> `code`"),
             new_code_cell("1", outputs=[new_output("stream", name="stderr", text="37%\r100%"), new_output("display_data", {"image/png": "iVBORw0KGgo=\n"})]),
             html_out(CHARTS["intervals"]()), html_out(pl.DataFrame({"a": [EVIL]})._repr_html_())]
    page = render(notebook(*cells))
    assert audit(page) == []
    assert "kept" in page
    assert "data:image/png;base64,iVBORw0KGgo=" in page
    assert "http://x" not in page
    assert "37%" not in page


def test_verdict_comes_first_and_code_is_folded():
    report = a_report()
    shown = new_code_cell("report", outputs=[new_output("execute_result", report._repr_mimebundle_())])
    section = new_code_cell("report.section('limits')", outputs=[new_output("execute_result", {"text/html": report.section("limits")._repr_html_()})])
    page = render(notebook(shown, section))
    assert audit(page) == []
    content = page[page.index("<main") :]
    assert content.index("Promote") < content.index("Retrain")
    assert page.count("<h1") == 1
    assert page.count("Every deciding gate passed") == 1
    assert page.count("<style>") == 1
    assert page.count("<details><summary>Code (cell") == 2


def test_a_failed_notebook_becomes_a_failure_report(tmp_path):
    error = new_output("error", ename="ValueError", evalue=EVIL, traceback=["\x1b[0;31mValueError\x1b[0m: " + EVIL])
    failed = notebook(new_code_cell("fine()"), new_code_cell("train()", outputs=[error]), new_code_cell("never()"))
    nbformat.write(failed, tmp_path / "executed.ipynb")
    page = publish_notebook(tmp_path / "executed.ipynb", tmp_path / "r/report.html").read_text()
    assert audit(page) == []
    assert failure(failed).cell == 3
    assert "Cell 3 raised" in page
    assert "Nothing was promoted" in page
    assert "\x1b" not in page
    assert page.index("Cell 3 raised") < page.index("fine()")


def test_a_published_page_is_the_same_twice():
    assert render(notebook(html_out("<p>x</p>"))) == render(notebook(html_out("<p>x</p>")))

"""What is watched is there, is spelled as in the dashboard and the alerts, and says nothing of people."""

import json
import re
import secrets
import shutil
import subprocess
import sys

import promql_parser
import pytest
import yaml
from conftest import ROOT

from fincoach.api.app import close_parts, create_app, parts_of
from fincoach.api.metrics import NAMES, Metrics, alert_rules, dashboard
from fincoach.data.database import connect, upgrade

EXPRESSIONS = [r["expr"] for g in alert_rules()["groups"] for r in g["rules"]] + [t["expr"] for p in dashboard()["panels"] for t in p.get("targets", ())]


def selectors(node):
    """All selectors of metrics below a node of a PromQL expression, and the labels it groups by."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    below = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")] + list(getattr(node, "args", ()))
    return [s for child in below if isinstance(child, promql_parser.Expr) for s in selectors(child)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_is_promql_on_metrics_there_are(expression):
    found = selectors(promql_parser.parse(expression))
    assert found
    for s in found:
        assert s.name in NAMES, f"{s.name} is not counted"
        assert {m.name for m in s.matchers.matchers} <= {*NAMES[s.name], "job", "instance"}
    grouped = {label for part in re.findall(r"by \(([^)]*)\)", expression) for label in part.replace(" ", "").split(",")}
    assert grouped <= {label for s in found for label in NAMES[s.name]}


def test_the_check_sees_what_is_wrong():
    with pytest.raises(AssertionError, match="is not counted"):
        test_every_expression_is_promql_on_metrics_there_are("sum(rate(fincoach_request_total[5m]))")
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse("sum(rate(fincoach_requests_total[5m])")


def test_what_is_deployed_is_what_the_notebook_says():
    run = subprocess.run([sys.executable, "tools/monitoring.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + "run `python tools/monitoring.py`"


def test_rules_are_as_prometheus_wants_them():
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
    assert len({r["alert"] for r in rules}) == len(rules)
    for r in rules:
        assert r.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smhd]", r["for"])
        assert r["labels"]["severity"] in ("page", "ticket")
        assert r["annotations"]["action"], "whoever is woken is told what to do"
    if tool := shutil.which("promtool"):
        said = subprocess.run([tool, "check", "rules", "deploy/prometheus/alerts.yml"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr


def test_the_dashboard_can_be_imported():
    found = json.loads((ROOT / "deploy/grafana/fincoach.json").read_text("utf-8"))
    places = [tuple(p["gridPos"].values()) for p in found["panels"]]
    assert len(set(places)) == len(places), "no panel lies on another"
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in found["panels"])
    assert all(t["datasource"]["uid"] == "${source}" for p in found["panels"] for t in p.get("targets", ()))


def test_the_app_counts_what_the_dashboard_reads(tmp_path):
    """Every name of the table is in what a real app tells, but for what Prometheus adds itself and what one process can have none of yet."""
    engine = connect(url := f"sqlite:///{tmp_path}/fincoach.db")
    upgrade(engine)
    engine.dispose()
    parts = parts_of(url, tmp_path / "artifacts", environ={"FINCOACH_JWT_SECRET": secrets.token_hex(32)})
    try:
        create_app(parts)
        parts.metrics.request("/health", "GET", 200, 0.001)
        parts.metrics.answers.labels("spending", "v", "model").inc()
        parts.metrics.advice.labels("save_more").inc()
        parts.metrics.feedback.labels("accepted").inc()
        parts.manager.preload()
        told = {line.split("{")[0].split(" ")[0] for line in parts.metrics.text().decode().splitlines() if not line.startswith("#")}
        families = {line.split(" ")[2] for line in parts.metrics.text().decode().splitlines() if line.startswith("# TYPE")}
        there = told | families | {f"{f}_total" for f in families}
        assert set(NAMES) - {"up"} <= there
    finally:
        close_parts(parts)


def test_labels_are_few_whatever_is_asked():
    metrics = Metrics()
    for i in range(3):
        metrics.request("unmatched", "GET", 404, i)
    assert metrics.text().decode().count('fincoach_requests_total{') == 1

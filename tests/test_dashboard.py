"""The dashboard for Grafana and the alerts of the documentation, against what a real server exports.

PromQL has no parser in Python, so its expressions are taken apart by words: what is neither a function, nor inside of braces,
brackets, or the parentheses of `by`, is a metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.chat import Mode, Status
from proxy.settings import Settings
from tests.conftest import make_settings, running_proxy
from tests.fakes.upstream import FakeUpstream, finish, role, stream, text, usage
from tests.server.test_metrics import when

ROOT = Path(__file__).parents[1]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "config" / "grafana-dashboard.json").read_text())
ALERTS = re.findall(r"^  expr: (.+)$", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)

# Prometheus gives each sample these.
SCRAPED = {"instance", "job"}
FUNCTIONS = {"sum", "max", "rate", "increase", "histogram_quantile", "topk", "time"}

_WORD = re.compile(r"[a-zA-Z_:][\w:]*")
_SELECTOR = re.compile(r"(\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


class Exported(NamedTuple):
    """One name of a sample: its metric's type, and its labels with the values seen."""

    kind: str
    labels: dict[str, set[str]]


async def exported(settings: Settings) -> dict[str, Exported]:
    """What a server exports after a few calls."""
    async with running_proxy(settings) as proxy:
        await proxy.stream()
        async with proxy.chat(messages="Hi") as response:
            assert response.status == 400
        await when(proxy, "headwater_tokens_total", "prompt", "model-a", "up", is_now=7)
        async with proxy.get("/metrics") as response:
            families = list(text_string_to_metric_families(await response.text()))
    found: dict[str, Exported] = {}
    for family in families:
        for sample in family.samples:
            labels = found.setdefault(sample.name, Exported(family.type, {})).labels
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def panels() -> Iterator[dict[str, Any]]:
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> Iterator[tuple[str, str, str]]:
    """Title, expression, legend."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]
    for alert in ALERTS:
        yield "docs/metrics.md", alert, ""


def names(expression: str) -> set[str]:
    """The metrics of an expression."""
    bare = _GROUPING.sub("", re.sub(r"\[[^\]]*\]|\{[^}]*\}", "", expression))
    words = set(_WORD.findall(bare))
    assert words - FUNCTIONS, expression
    return words - FUNCTIONS


def check(expression: str, legend: str, known: dict[str, Exported]) -> None:
    """AssertionError where an expression asks for what there is not, or in a way that gives nonsense."""
    assert expression.count("(") == expression.count(")")
    found = names(expression)
    assert found <= known.keys(), f"not exported: {found - known.keys()}"
    labels = set.union(SCRAPED, *(set(known[name].labels) for name in found))
    for group in _GROUPING.findall(expression):
        assert set(re.split(r"\s*,\s*", group)) <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels
    rated = re.findall(r"\b(?:rate|increase)\((\w+)(?:\{[^}]*\})?\[[^\]]+\]\)", expression)
    assert len(rated) == len(re.findall(r"\b(?:rate|increase)\(", expression))
    for name in found:
        is_rising = known[name].kind in ("counter", "histogram")
        assert (name in rated) is is_rising, f"{name} is a {known[name].kind}"
    for quantile in re.findall(r"histogram_quantile\((.*)", expression):
        assert re.match(r"0\.\d+, sum by \((\w+, )*le\) \(rate\(\w+_bucket[{\[]", quantile)
    for name, matchers in _SELECTOR.findall(expression):
        for label, wanted in _MATCHER.findall(matchers):
            assert label in SCRAPED | set(known[name].labels), f"{name} has no label {label}"
            if not wanted.startswith("$"):
                assert set(wanted.split("|")) <= values(known[name], label), f'{name}: {label}="{wanted}"'


def values(metric: Exported, label: str) -> set[str]:
    """What a label may say: those of calls are there only when there were such calls."""
    closed: dict[str, set[str]] = {"mode": set(Mode), "status": set(Status)}
    return closed.get(label, metric.labels.get(label, set()))


async def test_every_expression_asks_for_what_a_server_exports(tmp_path: Path, upstream: FakeUpstream) -> None:
    upstream.plays(stream(role(), text("Hello"), finish(), usage()))
    known = await exported(make_settings(tmp_path, upstream.url))
    asked = list(expressions())
    assert len(asked) > 50
    assert len(ALERTS) > 3
    for title, expression, legend in asked:
        try:
            check(expression, legend, known)
        except AssertionError as error:
            raise AssertionError(f"{title}: {expression}: {error}") from None
    shown = {name for _, expression, _ in asked for name in names(expression)}
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if name.startswith("headwater_")}
    assert stems <= {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}, "a metric that no panel shows"


BAD = [
    "sum(rate(headwater_no_total[5m]))",
    "sum(headwater_calls_total)",
    "rate(headwater_in_flight[5m])",
    "sum by (team) (rate(headwater_calls_total[5m]))",
    'sum(rate(headwater_calls_total{status="fine"}[5m]))',
    'sum(rate(headwater_calls_total{team="red"}[5m]))',
    "histogram_quantile(0.5, sum by (mode) (rate(headwater_time_to_first_token_seconds_bucket[5m])))",
    "histogram_quantile(0.5, sum by (le) (rate(headwater_time_to_first_token_seconds_sum[5m])))",
    "sum(rate(headwater_calls_total[5m])",
]


@pytest.mark.parametrize("expression", BAD)
def test_an_expression_that_gives_nothing_is_seen(expression: str) -> None:
    histogram = Exported("histogram", {"mode": {"relay"}, "le": {"1.0"}})
    known = {
        "headwater_calls_total": Exported("counter", {"mode": {"relay"}, "status": {"ok"}}),
        "headwater_in_flight": Exported("gauge", {}),
        "headwater_time_to_first_token_seconds_bucket": histogram,
        "headwater_time_to_first_token_seconds_sum": histogram,
    }
    with pytest.raises(AssertionError):
        check(expression, "", known)


def test_it_can_be_imported_as_it_is() -> None:
    """https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/"""
    assert DASHBOARD["schemaVersion"] >= 39
    assert (DASHBOARD["id"], DASHBOARD["uid"], DASHBOARD["title"]) == (None, "headwater", "Headwater")
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    said = json.dumps(DASHBOARD["panels"]) + json.dumps([each.get("query") for each in variables.values()])
    used = set(re.findall(r"\$\{?(\w+)\}?", said))
    assert {name for name in used if not name.startswith("__")} == variables.keys()
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        for asking in (panel, *panel["targets"]):
            assert asking["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] in range(25 - place["w"])
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Traffic",
        "Latency",
        "Tokens and money",
        "Cache",
        "Upstreams and breakers",
        "Ledger and process",
    ]

"""The reference pages say what the code does: a key, field or metric that they leave out fails here."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from cluster.metrics import EngineMetrics, ExpertMetrics, GatewayMetrics, RouterMetrics
from cluster.serve import openai_requests
from cluster.serve.admin import AdminAccess, Drain, Rebalance, Scale, admin_router
from cluster.serve.openai_requests import (
    ChatCompletionRequest,
    CompletionFields,
    CompletionRequest,
    Message,
    StreamOptions,
)
from cluster.settings import HttpSettings, ModelSettings

REPOSITORY = Path(__file__).parents[1]
CONFIGURATION = (REPOSITORY / "docs" / "configuration.md").read_text()
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
API = (REPOSITORY / "docs" / "api.md").read_text()


def section(page: str, title: str) -> str:
    """Return what stands under a heading of the second level."""
    (text,) = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return text


def table(text: str) -> dict[str, list[str]]:
    """Return the rows of all tables in a text: the name in the first cell -> the other cells."""
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    return {name: cells.split(" | ") for name, cells in rows}


def names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def check_default(name: str, cell: str, is_required: bool, default: object) -> None:
    """A default in code font is the default; in words, it stands for what no value can say."""
    if is_required:
        assert cell == "required", name
    elif cell.startswith("`"):
        assert yaml.safe_load(cell.strip("`")) == default, name
    else:
        assert not default or default == StreamOptions(), f"{name}: the default is {default!r}"
        assert cell != "required", name


@pytest.mark.parametrize(
    ("title", "kind"), [("`http`", HttpSettings), ("`models`, a list", ModelSettings)], ids=["http", "models"]
)
def test_every_key_of_the_configuration_is_documented_with_its_default(title, kind):
    rows = table(section(CONFIGURATION, title))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        default = field.default
        check_default(name, rows[name][0], default is dataclasses.MISSING, default)


@pytest.mark.parametrize(
    ("title", "kinds"),
    [
        ("Fields of both endpoints", [CompletionFields, StreamOptions]),
        ("Fields of `/v1/chat/completions`", [ChatCompletionRequest, Message]),
        ("Fields of `/v1/completions`", [CompletionRequest]),
    ],
)
def test_every_field_of_a_request_is_documented_with_its_default(title, kinds):
    rows = table(section(API, title))
    shared = {} if CompletionFields in kinds else CompletionFields.model_fields
    fields = {
        name: field for kind in kinds for name, field in kind.model_fields.items() if name not in shared
    }
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        check_default(name, rows[name][0], field.is_required(), field.default)


def test_every_field_without_effect_is_documented():
    assert names(section(API, "Accepted without effect")) == openai_requests._WITHOUT_EFFECT


def test_every_field_that_is_refused_is_documented_with_what_is_not():
    text = section(API, "Refused")
    assert names(text) == openai_requests._REFUSED.keys()
    harmless = dict(re.findall(r"`(\w+)` \((.*?)\)", text))
    values = {name: yaml.safe_load(value) for name, value in harmless.items()}
    assert values == {name: value for name, value in openai_requests._REFUSED.items() if value is not None}


def test_every_field_that_a_message_may_hold_empty_is_documented():
    (text,) = re.findall(
        r"only empty.*?:(.*?)\n\n", section(API, "Fields of `/v1/chat/completions`"), re.DOTALL
    )
    assert names(text) == openai_requests._REFUSED_IN_MESSAGE.keys()


def test_every_metric_is_documented_with_its_kind_and_labels():
    registry = CollectorRegistry()
    metrics = [
        metric
        for kind in (GatewayMetrics, EngineMetrics, RouterMetrics, ExpertMetrics)
        for metric in vars(kind(registry)).values()
    ]
    exposed = {}
    for metric in metrics:
        (family,) = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        exposed[name] = (family.type, list(metric._labelnames))
    rows = table(section(API, "For operators"))
    documented = {name: (cells[0], re.findall(r"\w+", cells[1])) for name, cells in rows.items()}
    assert documented == exposed


def test_every_admin_endpoint_is_documented_with_its_body():
    routes = {route.path.removeprefix("/admin/") for route in admin_router(None, None, AdminAccess()).routes}
    rows = re.findall(
        r"^\| `POST /admin/(\S+)` \| `([^`]+)`", section(API, "To change expert groups"), re.MULTILINE
    )
    assert {path.replace("{model}", "MODEL") for path in routes} == {path for path, _ in rows}
    assert {example for _, example in rows} == {kind.example for kind in (Scale, Rebalance, Drain)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_empty(page):
    assert page.read_text().strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing

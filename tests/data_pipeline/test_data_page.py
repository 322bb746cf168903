"""docs/data.md: its recipes load and its messages are those of the code; its commands run in test_documents."""

import re
from pathlib import Path

import pytest
import yaml

from data_pipeline.clean.filters import FILTERS, chosen
from data_pipeline.config import BuildConfig
from ponder_scale.config import RunConfig
from ponder_scale.settings import load

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "data.md").read_text()
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
MESSAGES = re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", PAGE.partition("## By message")[2], flags=re.MULTILINE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_the_page_loads(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    kind = {"# a build": BuildConfig, "# a run": RunConfig}[recipe.splitlines()[0]]
    config = load(kind, path, [])
    if kind is BuildConfig:
        assert [*config.sources] == ["web", "books", "code"]
        for name, source in config.sources.items():
            chosen(name, source.filters)
    assert set(yaml.safe_load(recipe)) <= set(vars(config))


def test_every_message_of_the_page_is_one_of_the_code():
    assert len(MESSAGES) >= 14
    code = ""
    for folder in ("data_pipeline", "ponder_scale"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            code += re.sub(r'"\s*\n\s*f?"', "", path.read_text())
    for message in MESSAGES:
        assert message in code.replace("{MANIFEST}", "manifest.json").replace("{path.name}", "manifest.json"), message


def test_every_filter_is_on_the_page():
    for name in FILTERS:
        assert f"| `{name}` |" in PAGE

"""docs/data.md: its recipes load and its messages are those of the code; its commands run in test_documents.

The recipe of docs/recipes/corpus.md loads, too.
"""

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


def test_the_build_of_the_recipe_for_a_corpus_loads(tmp_path):
    (build,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/recipes/corpus.md").read_text(), flags=re.DOTALL)
    (tmp_path / "corpus.yaml").write_text(build)
    config = load(BuildConfig, tmp_path / "corpus.yaml", [])
    assert {name: source.weight for name, source in config.sources.items()} == {"web": 0.8, "books": 0.2}
    assert [*config.sources["web"].filters] == ["gopher_quality"] and config.deduplicate == "minhash"
    for name, source in config.sources.items():
        chosen(name, source.filters)


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

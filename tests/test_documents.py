"""The commands of README and docs run: the quick start on a small corpus, then every command of a shell block."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from data_pipeline import cli as data
from data_pipeline.config import BuildConfig
from ponder_scale import cli as scale
from ponder_scale.config import RunConfig
from ponder_scale.settings.commandline import parse
from tests.commands import run_command, run_script

REPOSITORY = Path(__file__).parents[1]
GUIDE, RECIPES = (sorted((REPOSITORY / "docs").glob(pages)) for pages in ("*.md", "recipes/*.md"))
DOCUMENTS = [REPOSITORY / "README.md", *GUIDE, *RECIPES]
SMALL = ["model.hidden_size=32", "model.intermediate_size=64", "train.steps=4", "optim.warmup_steps=1"]
SMALL += ["evaluate.sequences=8"]
AGAIN = [*SMALL, "train.steps=5", "train.sanity_step=false"]
SMALL_STEP = "--batch 1 --seq-len 16 --hidden 64 --layers 1 --vocab 100 --policies pass"
# what makes a command quick where the documents measure; the last value of a flag counts
QUICK = {
    "ponder-scale train": "--nproc 1",  # the quick start trains on two
    "ponder-scale evaluate decoding": "--sequences 1 --prompt-tokens 8 --new-tokens 4",
    "ponder-scale plan llama-1.4b --gpus 64 ": "train.global_batch=64",  # leaves one micro-batch to try
    "python -m benchmarks op": "--tokens 64 --hidden 32 --vocab 100 --runs 1",
    "python -m benchmarks step": f"--runs 1 {SMALL_STEP}",
    "python -m benchmarks memory": f"--steps 1 {SMALL_STEP}",
    "python -m benchmarks start": "--runs 1 --steps 3 --stage 1 --hidden 64 --layers 1 --vocab 100 --seq-len 16",
    "python -m benchmarks decode": "--hidden 64 --layers 1 --vocab 100 --runs 1 --context 8",
    "python -m benchmarks comm": "--regimes zero3_bounded --policies pass --pondering-steps 1"
    " model.hidden_size=96 model.num_hidden_layers=1",
    "python -m benchmarks planner": "--rounds 1 --steps 1 --cases 5 --within 1e9"
    " model.hidden_size=96 model.num_hidden_layers=1 data.seq_len=16",
}


def _commands(document: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


def _code(document: Path) -> str:
    """The lines of its blocks of code, fenced or indented."""
    text, fenced = document.read_text(), re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return "\n".join([*fenced.findall(text), *re.findall(r"^    .*", fenced.sub("", text), re.MULTILINE)])


# each once, in the order of reading
COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in _commands(document)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the quick start has run on a part of the standard library; and what it printed."""
    folder = tmp_path_factory.mktemp("readme")
    corpus = folder / "corpus"
    for name in ("asyncio", "email", "encodings", "idlelib", "json", "multiprocessing", "unittest"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / name, corpus / name)
    script = REPOSITORY / "examples" / "quickstart.sh"
    done = run_script("sh", script, "runs/quickstart", corpus, 2, *SMALL, folder=folder, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    return folder, done.stdout


def test_the_quick_start_reaches_generated_text_and_names_what_to_try(workplace: tuple[Path, str]) -> None:
    folder, printed = workplace
    for heading in ("1/6", "2/6", "3/6", "4/6", "5/6", "6/6", "made in", "try next"):
        assert f"== {heading}" in printed or f"   {heading}" in printed, heading
    assert "in a fresh process" in printed and "def read(self, size=-1):" in printed
    assert (folder / "runs/quickstart/huggingface/model.safetensors").is_file()


def test_the_readme_names_what_continuous_integration_runs() -> None:
    assert {"make quickstart", "make test-fast", "make test", "make test-slurm", "make test-vllm"} <= set(COMMANDS)
    targets = ("quickstart", "test-fast", "test", "test-slurm", "mutants")
    done = subprocess.run(["make", "-n", *targets], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (REPOSITORY / ".ci/run").read_text().splitlines()
    assert [line for line in lines if re.match("make .*test", line)] == [
        "make --jobs 2 test",
        "make test-slurm test-vllm",
    ]


RUNNABLE = ("ponder-", "torchrun", "mpiexec", "python -m benchmarks")


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith(RUNNABLE)])
def test_a_command_of_the_documents_runs(command: str, workplace: tuple[Path, str]) -> None:
    command += "".join(f" {words}" for start, words in QUICK.items() if command.startswith(start))
    command = command.replace("--nproc-per-node 2", "--nproc-per-node 1")  # each imports everything anew
    if " train " in command:
        command += " " + " ".join(AGAIN)
    done = run_command(*shlex.split(command.replace('"$STDLIB"', "corpus")), folder=workplace[0])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


SHOWN = sorted(
    {
        command
        for document in (*DOCUMENTS, *REPOSITORY.glob("*/README.md"), *REPOSITORY.glob("examples/*/README.md"))
        for command in re.findall(
            r"^ *(ponder-(?:scale|data) [a-z].*)$", re.sub(r"\\\n\s*", " ", _code(document)), re.MULTILINE
        )
    }
)


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_that_a_document_shows_has_these_arguments(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every block, also of those whose commands cannot run here. Folders of `runs` are there already."""
    monkeypatch.chdir(tmp_path)
    command = re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", re.sub(r"\s#.*| \| .*| &&.*", "", command)).replace("...", "")
    for name in re.findall(r"runs/\w+(?=/)", command):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    program, *words = shlex.split(command)
    if program == "ponder-scale":
        assert parse(scale._parser(), words, RunConfig, "overrides").run
    else:
        assert parse(data._parser(), words, BuildConfig, "settings").run


def test_the_readmes_python_generates(workplace: tuple[Path, str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    done = run_command("python", "-c", block, folder=workplace[0])
    assert done.returncode == 0 and done.stdout.startswith("import os"), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("document", [*DOCUMENTS, *REPOSITORY.glob("*/README.md")], ids=lambda path: path.stem)
def test_every_file_a_document_links_exists(document: Path) -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not name.startswith("http"):
            assert (document.parent / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_heading_a_document_links_exists(document: Path) -> None:
    for name, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", document.read_text()):
        headings = re.findall(r"^#+ (.*)$", ((document.parent / name) if name else document).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{name}#{anchor}"


SITE = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
HOOKS = runpy.run_path(str(REPOSITORY / "docs" / "site_hooks.py"))
# the pages of the site by their place on it
PAGES = {str(path.relative_to(REPOSITORY / "docs")): path for path in (*GUIDE, *RECIPES)}
PAGES |= {page: REPOSITORY / source for source, page in HOOKS["OUTSIDE"].items()}


def test_the_navigation_of_the_site_names_each_page_once_and_nothing_else() -> None:
    named = [page for group in SITE["nav"] for pages in group.values() for entry in pages for page in entry.values()]
    assert sorted(named) == sorted(PAGES)
    assert {"README.md", "docs/configuration.md", "docs/api.md", "docs/recipes/serve.md", "slurm/README.md"} <= {
        str(path.relative_to(REPOSITORY)) for path in PAGES.values()
    }


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_link_leads_to_the_same_file_on_the_site_and_in_the_repository(page: str) -> None:
    document, code = PAGES[page], r"```.*?```|`[^`\n]*`"
    text = document.read_text()
    made = HOOKS["rewritten"](text, str(document.relative_to(REPOSITORY)))
    assert re.findall(code, made, flags=re.DOTALL) == re.findall(code, text, flags=re.DOTALL)
    links = [re.findall(r"\]\(([^)#\s]*)(#[\w-]+)?\)", each) for each in (text, made)]
    for (name, anchor), (target, kept) in zip(*links, strict=True):
        there = document if not name else document.parent / name
        blob = re.fullmatch(re.escape(SITE["repo_url"]) + "/(blob|tree)/main/(.+)", target)
        if name.startswith("https://"):
            assert target == name
        elif blob:
            assert (REPOSITORY / blob[2]).resolve() == there.resolve() not in PAGES.values()
            assert there.is_dir() == (blob[1] == "tree")
        else:
            at = os.path.normpath(Path(page).parent / target) if target else page
            assert PAGES.get(at, REPOSITORY / "docs" / at) == there.resolve()
        assert kept == anchor


ITEM = re.compile(r"^( *)(?:[-*]|\d\.) ", re.MULTILINE)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_list_reads_the_same_on_the_site_and_on_github(page: str) -> None:
    """mkdocs begins an item only behind an item or an empty line, and takes four spaces for what belongs to one."""
    text = re.sub(r"^( *)```.*?^ *```$", r"\1code", PAGES[page].read_text(), flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n(?: *\n)+", text):
        indent = len(block) - len(block.lstrip(" "))
        assert indent == 0 or indent >= 4, block
        items = [] if ITEM.match(block) else [len(item) for item in ITEM.findall(block)]
        assert not [item for item in items if item < indent or item == indent == 0], block


def test_the_comparison_links_what_it_says_of_others_to_lines_at_the_commits_it_names() -> None:
    page = (REPOSITORY / "docs" / "comparison.md").read_text()
    targets = dict(re.findall(r"^\[([a-z0-9-]+)\]: (\S+)$", page, re.MULTILINE))
    assert set(re.findall(r"\]\[([a-z0-9-]+)\]", page)) == set(targets)
    text, _, read = page.partition("## What was read")
    commits = set(re.findall(r"\(https://github\.com/([\w.-]+/[\w.-]+)/tree/([0-9a-f]{40})\)", read))
    blob = r"https://github\.com/([^/]+/[^/]+)/blob/([^/]+)/."
    found = {label: re.match(blob, url) for label, url in targets.items()}
    assert {label for label, match in found.items() if not match or match.groups() not in commits} == set()
    assert {match.groups() for match in found.values() if match} == commits
    rows = re.findall(r"^\| [^|]+\|(.*)\|[^|]*\|$", text, re.MULTILINE)
    others = [cell.strip() for row in rows for cell in row.split("|")]
    assert len(others) > 200
    assert [cell for cell in others if not re.match("\N{EN DASH}", cell) and not re.search(r"\][(\[]", cell)] == []


def test_the_tests_that_the_comparison_names_are_there() -> None:
    page = (REPOSITORY / "docs" / "comparison.md").read_text()
    named = re.findall(r"`(tests/[\w./]+)`", page)
    assert len(named) > 10 and [name for name in named if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize(("document", "name"), [("README", "rooms"), ("docs/code", "tree"), ("CONTRIBUTING", "floors")])
def test_the_maps_of_the_code_are_made_from_it(document: str, name: str) -> None:
    maker = runpy.run_path(str(REPOSITORY / "docs" / "make_tree.py"))
    text = (REPOSITORY / f"{document}.md").read_text()
    assert maker["written"](text, name, maker[name]()) == text, "run: python docs/make_tree.py"


def test_the_configuration_page_is_that_of_the_code() -> None:
    page = runpy.run_path(str(REPOSITORY / "docs" / "make_configuration.py"))["page"]()
    written = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert written == page, "run: python docs/make_configuration.py > docs/configuration.md"


def test_the_configuration_page_speaks_of_numbers_and_text_not_of_types() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    values = {row.split("|")[2].strip() for row in page.splitlines() if row.startswith("| `")}
    assert {"whole number", "number, null", "text", "true, false", "list of whole numbers"} <= values
    assert not [value for value in values if re.search(r"\b(int|float|str|bool|Union|Optional|Any|dict)\b|\[", value)]
    assert not re.search(r"\de[+-]?0|\de\+", page), "a limit is 1,000,000 or 1e12"


PROSE = """# A heading; you skip it

You run [this one](https://you.example/a;b) with `a; b; c` now. Then we wait; it
ends (Rae et al. 2021 say so).

| you | ; |
|---|---|

```sh
you; # and you
```

1. Stop it,

       you; you

   your way
2. Go

   there

Over

    you; indented code

<!-- you; -->
"""


def test_the_prose_of_a_document_is_counted_without_code_tables_headings_and_targets() -> None:
    counts = runpy.run_path(str(REPOSITORY / "docs" / "check_prose.py"))["count"](PROSE)
    # sentences: You run this one with CODE now. | Then we wait; it ends (Rae et al. 2021 say so).
    # Stop it, | your way | Go | there | Over
    assert (counts.words, counts.reader, counts.semicolons) == (7 + 11 + 2 + 2 + 3, 3, 1)
    assert counts.sentence == 2  # of 1, 1, 1, 2, 2, 7, 11


@pytest.mark.parametrize(
    ("text", "missed"),
    [
        ("You see it. " * 100, []),
        ("Nobody is here. " * 100, ["page.md: you/your/we per 1,000 words: 0.0; expected at least 8"]),
        ("You; see. " * 100, ["page.md: semicolons per 1,000 words: 500.0; expected at most 3"]),
        ("You" + " see" * 18 + ". ", ["page.md: words of the median sentence: 19.0; expected at most 18"]),
    ],
)
def test_prose_out_of_a_bound_is_named_with_its_measure_value_and_bound(text: str, missed: list[str]) -> None:
    checker = runpy.run_path(str(REPOSITORY / "docs" / "check_prose.py"))
    assert checker["misses"]("page.md", checker["count"](text)) == missed


def test_the_check_of_prose_fails_with_a_line_for_each_miss(tmp_path: Path) -> None:
    for name, text in (("good.md", "You see it. You do it."), ("bad.md", "It is seen; it is done.")):
        (tmp_path / name).write_text(text)
    checker = [sys.executable, str(REPOSITORY / "docs" / "check_prose.py")]
    good, both = (
        subprocess.run([*checker, *(str(tmp_path / name) for name in names)], capture_output=True, text=True)
        for names in (["good.md"], ["good.md", "bad.md"])
    )
    assert (good.returncode, good.stderr, both.returncode) == (0, "", 1)
    assert good.stdout == (
        f"{tmp_path}/good.md: 6 words, 333.3 you/your/we per 1,000 words, 0.0 semicolons per 1,000 words, "
        "3.0 words of the median sentence\n"
    )
    assert both.stderr.splitlines() == [
        f"{tmp_path}/bad.md: you/your/we per 1,000 words: 0.0; expected at least 8",
        f"{tmp_path}/bad.md: semicolons per 1,000 words: 166.7; expected at most 3",
    ]

"""What builds write, move and delete, beside what is the user's: nothing of it is ever lost."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.write.output import publish
from ponder_scale.files.delete import MARK, delete_made
from ponder_scale.shards.manifest import verify
from tests.data_pipeline.builds import arguments, contents, make_texts, write_jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", make_texts(50))


@pytest.fixture
def build(corpus, tiny_tokenizer, tmp_path):
    """Builds `tmp_path`/web; its exit code."""
    return lambda *more: main(arguments(corpus, tiny_tokenizer, tmp_path / "web", *more))


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Each path under a folder with its content: of links, where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = content
    return found


def put(path: Path, content: str = "years of work") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


EXTENSION = json.dumps({"manifest_version": 3, "name": "an extension", "version": "1.0"})


@pytest.mark.parametrize(
    ("place", "name", "content"),
    [
        ("web.partial", "thesis.txt", "years of work"),
        ("web.partial", ".hidden", "years of work"),
        ("web.partial", "work/plan.jsonl", "{}"),  # a name of ours alone does not make it ours
        ("web.partial", "train-00000.bin", "tokens of another program"),
        ("web.partial", "manifest.json", EXTENSION),
        ("web.partial", "a/b/c.txt", "years of work"),
        ("web", "manifest.json", EXTENSION),
        ("web", "thesis.txt", "years of work"),
        ("web", "manifest.json", "["),
    ],
)
@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_that_no_build_has_made_is_left_as_it_is(
    build, tmp_path, capsys, place, name, content, overwrite, fails
):
    put(tmp_path / place / name, content)
    put(tmp_path / place / "src" / "index.js")
    before = everything(tmp_path)
    assert build(f"overwrite={overwrite}", *(["sources.web.path=nowhere"] if fails else [])) == 2
    assert everything(tmp_path) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / place) in said


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "tokenizer/notes.txt", "packing-16/notes.txt", "own/deep/a"])
def test_what_was_put_into_a_finished_folder_stops_its_replacement(build, tmp_path, capsys, name):
    assert build() == 0
    assert main(["pack", str(tmp_path / "web"), "--seq-len", "16"]) == 0
    put(tmp_path / "web" / name)
    (tmp_path / "web" / "empty").mkdir()
    before = everything(tmp_path)
    capsys.readouterr()
    assert build("overwrite=true", "seed=1") == 2
    assert everything(tmp_path) == before
    assert name in capsys.readouterr().err
    put(tmp_path / "mine" / name.replace("/", "-"))
    (tmp_path / "web" / name).unlink()
    assert build("overwrite=true", "seed=1") == 2
    assert "empty/" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "web" / "empty")
    if name.startswith("own"):
        shutil.rmtree(tmp_path / "web" / "own")
    assert build("overwrite=true", "seed=1") == 0
    assert verify(tmp_path / "web") == [] and not (tmp_path / "web" / "packing-16").exists()


@pytest.mark.parametrize("name", ["notes.txt", "work/notes.txt", "work/shards/notes.txt", "work/scratch/notes/a"])
def test_what_was_put_into_an_unfinished_folder_stops_the_build(build, tmp_path, capsys, name):
    assert build("max_bad_fraction=0", "max_document_bytes=30") == 2
    put(tmp_path / "web.partial" / name)
    before = everything(tmp_path)
    capsys.readouterr()
    for more in ([], ["overwrite=true"], ["seed=1", "overwrite=true"]):
        assert build("max_bad_fraction=1", "max_document_bytes=30", *more) == 2
        assert everything(tmp_path) == before
        assert name in capsys.readouterr().err
    (tmp_path / "web.partial" / name).unlink()
    shutil.rmtree(tmp_path / "web.partial" / "work" / "scratch" / "notes", ignore_errors=True)
    assert build("max_bad_fraction=1", "max_document_bytes=30") == 0


def test_a_folder_under_the_name_of_the_replaced_one_is_not_deleted(build, tmp_path, capsys):
    backup = put(tmp_path / "web.replaced" / "thesis.txt")
    assert build() == 0  # it needs no such name
    assert build("overwrite=true", "seed=1") == 2
    assert "web.replaced" in capsys.readouterr().err
    assert backup.read_text() == "years of work"
    shutil.rmtree(tmp_path / "web.replaced")
    shutil.copytree(tmp_path / "web", tmp_path / "web.replaced")  # shards too are the user's there
    before = everything(tmp_path)
    assert build("overwrite=true", "seed=1") == 2
    assert everything(tmp_path) == before
    shutil.rmtree(tmp_path / "web.replaced")
    assert build("overwrite=true", "seed=1") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "web"]


def test_a_replacement_that_was_killed_between_its_steps_is_finished(build, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*values):
        raise Stop

    assert build() == 0
    for name in ("mark", "delete_file", "_delete_replaced"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data_pipeline.write.output.{name}", stop)
            with pytest.raises(Stop):
                build("overwrite=true", "seed=1")
        assert build("seed=1") == 0
        assert verify(tmp_path / "web") == []
        if name == "mark":  # the one moment at which it is not known whose it is
            assert verify(tmp_path / "web.replaced") == []
            shutil.rmtree(tmp_path / "web.replaced")
        shutil.rmtree(tmp_path / "web")
        assert build() == 0
    assert build("overwrite=true", "seed=1") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "web"]


@pytest.mark.parametrize("place", ["web", "web.partial", "web.replaced"])
@pytest.mark.parametrize("how", ["file", "glob", "folder", "link", "linked folder", "saved data set"])
def test_sources_in_the_folders_that_a_build_writes_are_refused(tiny_tokenizer, tmp_path, capsys, place, how):
    path = write_jsonl(put(tmp_path / place / "in" / "a.jsonl"), make_texts(20))
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "linked").symlink_to(path.parent)
    kind, named = {
        "file": ("jsonl", path),
        "glob": ("jsonl", path.parent / "*.jsonl"),
        "folder": ("folder", path.parent),
        "link": ("jsonl", tmp_path / "link.jsonl"),
        "linked folder": ("jsonl", tmp_path / "linked" / "*.jsonl"),
        "saved data set": ("dataset", path.parent),
    }[how]
    before = everything(tmp_path)
    more = [f"sources.web.kind={kind}", "overwrite=true"]
    assert main(arguments(named, tiny_tokenizer, tmp_path / "web", *more)) == 2
    assert everything(tmp_path) == before
    assert f"which lies in {tmp_path / place}" in capsys.readouterr().err


def test_a_glob_over_the_folder_of_the_build_passes_over_its_own_files_and_says_so(tiny_tokenizer, tmp_path, capsys):
    """Else a build would read its own quarantine, and go on from no interruption."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    same = arguments(tmp_path / "**" / "*.jsonl", tiny_tokenizer, tmp_path / "web", "max_document_bytes=60")
    assert main(same) == 2
    assert "left out" not in capsys.readouterr().err
    assert main([*same, "max_bad_fraction=0.9"]) == 0
    assert "left out of web: 2 files of this build, the first is" in capsys.readouterr().err
    assert main([*same, "max_bad_fraction=0.9"]) == 0
    said = capsys.readouterr()
    assert "was built from these inputs and settings already" in said.out
    assert "left out of web: 2 files of this build, the first is" in said.err


def test_links_under_the_names_of_a_build_are_not_followed(build, tmp_path, capsys):
    mine = put(tmp_path / "mine" / "thesis.txt").parent
    for name in ("web.partial", "web.partial/work", "web.partial/tokenizer"):
        link = tmp_path / name
        if link.parent != tmp_path:
            link.parent.mkdir()
            put(link.parent / MARK)
        link.symlink_to(mine)
        before = everything(tmp_path)
        assert build("overwrite=true") == 2
        assert "web.partial" in capsys.readouterr().err
        assert everything(tmp_path) == before
        link.unlink()
        shutil.rmtree(tmp_path / "web.partial", ignore_errors=True)


def test_a_link_as_out_is_kept_and_what_it_names_is_replaced(build, tmp_path):
    (tmp_path / "disk" / "web").mkdir(parents=True)
    (tmp_path / "web").symlink_to(tmp_path / "disk" / "web")
    assert build() == 0
    first = contents(tmp_path / "disk" / "web")
    assert build("overwrite=true", "seed=1") == 0
    assert (tmp_path / "web").is_symlink() and verify(tmp_path / "web") == []
    assert contents(tmp_path / "disk" / "web") != first
    put(tmp_path / "disk" / "web" / "notes.txt")
    assert build("overwrite=true") == 2
    assert (tmp_path / "disk" / "web" / "notes.txt").read_text() == "years of work"


def test_names_of_unfinished_builds_are_no_out(build, tmp_path, capsys, corpus, tiny_tokenizer):
    for name in ("web.partial", "web.replaced"):
        assert main(arguments(corpus, tiny_tokenizer, tmp_path / name)) == 2
        assert "choose another out" in capsys.readouterr().err


def test_adopted_files_outlive_the_folder_that_is_built_in_their_place(build, tmp_path, tiny_tokenizer):
    assert build() == 0
    (tmp_path / "web").rename(tmp_path / "theirs")
    tokens = tmp_path / "theirs" / "train-00000.bin"
    before = contents(tmp_path / "theirs")
    adopt = ["adopt", str(tokens), "--kind", "megatron", "--tokenizer", str(tiny_tokenizer)]
    assert main([*adopt, "--out", str(tmp_path / "web")]) == 0
    assert build("overwrite=true") == 0
    assert contents(tmp_path / "theirs") == before


@pytest.mark.parametrize("recipe", [["seed=1"], ["sources.web.path=nowhere.jsonl"], ["sources.web.field=body"]])
@pytest.mark.parametrize("with_work", [True, False])
def test_a_build_that_lacks_its_name_only_is_not_emptied_by_another_recipe(
    build, tmp_path, capsys, monkeypatch, recipe, with_work
):
    def killed(*values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "data_pipeline.build.finish.publish" if with_work else "data_pipeline.write.output.delete_file", killed
        )
        assert build() == 130
    before = everything(tmp_path)
    assert build(*recipe) == 2
    assert everything(tmp_path) == before
    if recipe[0] != "sources.web.path=nowhere.jsonl":
        assert "holds a finished build from other" in capsys.readouterr().err
    assert build() == 0
    assert verify(tmp_path / "web") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "web"]


def test_a_build_that_lacks_its_name_is_given_up_when_asked(build, tmp_path):
    assert build() == 0
    (tmp_path / "web").rename(tmp_path / "web.partial")
    assert build("seed=1") == 2
    assert build("seed=1", "overwrite=true") == 0
    assert verify(tmp_path / "web") == [] and not (tmp_path / "web.partial").exists()


def test_what_comes_into_the_folders_while_a_build_runs_is_kept(build, tmp_path, capsys, monkeypatch):
    assert build() == 0

    def publish_later(partial, out):
        put(out / "notes.txt")
        publish(partial, out)

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.finish.publish", publish_later)
        assert build("overwrite=true", "seed=1") == 2
    assert "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "web" / "notes.txt").read_text() == "years of work"
    (tmp_path / "web" / "notes.txt").unlink()
    assert build("overwrite=true", "seed=1") == 0


def train_tokenizer(out: Path, *more: str) -> int:
    (out.parent / "texts").mkdir(exist_ok=True)
    put(out.parent / "texts" / "a.txt", "some text to learn from, again and again and again")
    return main(["train-tokenizer", str(out.parent / "texts"), "--vocab-size", "260", "--out", str(out), *more])


def test_a_tokenizer_is_not_trained_over_what_lies_under_its_unfinished_name(tmp_path, capsys):
    mine = put(tmp_path / "tk.partial" / "thesis.txt")
    assert train_tokenizer(tmp_path / "tk") == 2
    assert "thesis.txt" in capsys.readouterr().err and mine.read_text() == "years of work"
    mine.unlink()
    assert train_tokenizer(tmp_path / "tk") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts", "tk"]
    assert sorted(path.name for path in (tmp_path / "tk").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_what_a_killed_training_of_a_tokenizer_left_is_in_no_ones_way(tmp_path):
    put(tmp_path / "tk.partial" / MARK)
    put(tmp_path / "tk.partial" / "tokenizer.json")
    assert train_tokenizer(tmp_path / "tk") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts", "tk"]


@pytest.mark.parametrize("place", ["packing-16", "packing-16.partial"])
def test_packing_deletes_nothing_that_it_has_not_made(build, tmp_path, capsys, place):
    assert build() == 0
    pack = ["pack", str(tmp_path / "web"), "--seq-len", "16"]
    assert main(pack) == 0
    mine = put(tmp_path / "web" / place / "thesis.txt")
    before = everything(tmp_path)
    capsys.readouterr()
    assert main(pack) == 2
    assert "thesis.txt" in capsys.readouterr().err and everything(tmp_path) == before
    mine.unlink()
    assert main(pack) == 0
    assert verify(tmp_path / "web") == []


def test_a_folder_is_deleted_name_by_name_or_not_at_all(tmp_path):
    folder = tmp_path / "made"
    for name in ("a", "in/b", "in/deep/c", MARK):
        put(folder / name)
    outside = put(tmp_path / "outside" / "thesis.txt")
    (folder / "in" / "link").symlink_to(outside.parent)
    with pytest.raises(Exception, match=r"made holds in/link, which this program has not made"):
        delete_made(folder, lambda name: name != "in/link")
    assert (folder / "a").exists()
    delete_made(folder, lambda name: True)
    assert outside.read_text() == "years of work" and not folder.exists()


DELETING = {"unlink", "rmdir", "rmtree", "remove", "removedirs", "move"}
ELSEWHERE = {  # single files of a run, and of a probe
    "ponder_scale/files/places.py",
    "ponder_scale/train/survive/baton.py",
    "ponder_scale/train/survive/watchdog.py",
}


def test_one_place_deletes():
    found = set()
    for path in (path for package in ("data_pipeline", "ponder_scale") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DELETING:
                if node.func.attr in ("remove", "move") and ast.unparse(node.func.value) not in ("os", "shutil"):
                    continue
                found.add(path.relative_to(ROOT).as_posix())
    assert found - ELSEWHERE == {"ponder_scale/files/delete.py"}

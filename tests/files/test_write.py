"""Files that are whole or as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ponder_scale.files.write import copy_folder, hash_file, write_whole, writing


def test_a_file_has_its_name_once_all_of_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with writing(file) as stream:
        stream.write(b"new")
        stream.flush()
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "file") as stream:
        stream.write(b"half of the n")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("durable", [True, False])
def test_the_file_and_then_its_name_are_waited_for_where_it_must_last(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, (tmp_path / "file").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "file", "text", durable=durable)
    assert seen == ([(".file.tmp", False), (tmp_path.name, True)] if durable else [])


def test_a_copy_of_a_read_only_folder_can_be_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "in").mkdir(parents=True)
    (source / "in" / "a.txt").write_text("text")
    (source / "in" / "a.txt").chmod(0o400)
    copy_folder(source, tmp_path / "copy")
    copy = tmp_path / "copy" / "in" / "a.txt"
    assert hash_file(copy) == hash_file(source / "in" / "a.txt") and copy.stat().st_mode & 0o200

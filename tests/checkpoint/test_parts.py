"""Part files that are not what they say: refused in one sentence, before memory is taken."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.checkpoint.parts import Parts, Stretch, part_name, selected, write_part
from ponder_scale.errors import CheckpointError
from tests.checkpoint.sealing import seal
from tests.faults import Fault

TENSORS = {"weight/a": torch.arange(99.0), "exp_avg/a": torch.arange(99.0) / 7, "weight/b": torch.ones(5).bfloat16()}
BEGINS = {"begins": {"a": 0, "b": 10}}
Header = dict[str, Any]


@pytest.fixture
def part(tmp_path: Path) -> Path:
    path = tmp_path / part_name(0)
    write_part(path, TENSORS, BEGINS)
    return path


def split(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def rewrite(path: Path, header: Header | bytes, body: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


def use(path: Path) -> None:
    """All that a reader does with a part."""
    parts = Parts(path.parent, [path.name])
    for key, stretches in parts.table.items():
        kind, name = key.split("/", 1)
        for stretch in stretches:
            assert stretch.length <= 1000, "memory would be taken"
            parts.read(kind, name, stretch.begin, torch.empty(stretch.length))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        use(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < len(str(path)) + 500
    message.encode()  # it can be printed
    return message


def changed(field: str, value: Any, key: str = "weight/a") -> Callable[[Header], None]:
    return lambda header: header[key].update({field: value})


def begins(value: Any) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].update(begins=value)


HEADERS: dict[str, Callable[[Header], Any]] = {
    "no begins": lambda header: header["__metadata__"].pop("begins"),
    "begins without the name": begins('{"b": 0}'),
    "begins is a list": begins("[1, 2]"),
    "begins is no text": begins({"a": 0}),
    "a negative begin": begins('{"a": -1, "b": 0}'),
    "a begin that is a fraction": begins('{"a": 0.5, "b": 0}'),
    "a begin of 2^70": begins(json.dumps({"a": 2**70, "b": 0})),
    "a begin that is true": begins('{"a": true, "b": 0}'),
    "a begin that is no number": begins('{"a": NaN, "b": 0}'),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata is a list": lambda header: header.update(__metadata__=[]),
    "a shape of 2^60": changed("shape", [2**60]),
    "a shape of 2^64 + 99, which is 99 in a machine word": changed("shape", [2**64 + 99]),
    "a negative shape": changed("shape", [-99]),
    "a shape of two sides": changed("shape", [9, 11]),
    "a shape of none": changed("shape", []),
    "a shape that is a number": changed("shape", 99),
    "a shape of fractions": changed("shape", [99.0]),
    "a shape of text": changed("shape", ["99"]),
    "an offset into the header": changed("data_offsets", [-64, 332]),
    "offsets that run backwards": changed("data_offsets", [396, 0]),
    "offsets beyond the file": changed("data_offsets", [2**40, 2**40 + 396]),
    "offsets of a shorter tensor": changed("data_offsets", [0, 392]),
    "offsets that overlap another's": changed("data_offsets", [0, 396], key="exp_avg/a"),
    "one offset": changed("data_offsets", [0]),
    "offsets that are infinite": changed("data_offsets", [0, float("inf")]),
    "no offsets": lambda header: header["weight/a"].pop("data_offsets"),
    "a dtype of other size": changed("dtype", "BF16"),
    "an unknown dtype": changed("dtype", "F8"),
    "a dtype that is a list": changed("dtype", ["F32"]),
    "no dtype": lambda header: header["weight/a"].pop("dtype"),
    "a tensor too many": lambda header: header.update({"weight/c": header["weight/a"]}),
    "a tensor that is missing, so that bytes are nobody's": lambda header: header.pop("weight/b"),
    "a key without a kind": lambda header: header.update({"a": header.pop("weight/a")}),
    "a key without a name": lambda header: header.update({"weight/": header.pop("weight/a")}),
    "a name of lines": lambda header: header.update({"weight/a\n\n": header.pop("weight/a")}),
    "a name of half a character": lambda header: header.update({"weight/\ud800": header.pop("weight/a")}),
    "a name of a megabyte": lambda header: header.update({"weight/" + "a" * 2**20: header.pop("weight/a")}),
    "a tensor that is null": lambda header: header.update({"weight/a": None}),
    "a tensor that is a list": lambda header: header.update({"weight/a": [1, 2, 3]}),
    "a description too long": changed("more", "?"),
}


@pytest.mark.faults
@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_is_refused_in_one_sentence(what: str, part: Path, fault: Fault) -> None:
    header, body = split(part)
    HEADERS[what](header)
    rewrite(part, header, body)
    refusal(part)
    fault(f"part file: {what}", "resume, export", detected="by its header", after="refused", lost="nothing")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (3).to_bytes(8, "little") + b"NaN",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (9000).to_bytes(8, "little") + b"1" * 9000,
    ],
    ids=lambda content: f"{content[:20]!r} of {len(content)}",
)
def test_what_has_no_header_is_refused_in_one_sentence(content: bytes, part: Path) -> None:
    part.write_bytes(content)
    refusal(part)


def test_a_name_that_comes_twice_is_refused(part: Path) -> None:
    header, body = split(part)
    text = json.dumps(header).replace('"exp_avg/a"', '"weight/a"').encode()
    rewrite(part, text, body)
    assert "a name is given twice" in refusal(part)


def test_a_header_is_not_read_before_its_length_is_known_to_be_sane(part: Path) -> None:
    """Of a file that is said to be 1 GiB of header, which a sparse file is for nothing."""
    with part.open("wb") as stream:
        stream.write((2**30).to_bytes(8, "little"))
        stream.truncate(2**30 + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(part)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_parts_of_two_saves_are_not_mixed(part: Path) -> None:
    shutil.copy(part, part.with_name(part_name(1)))
    with pytest.raises(CheckpointError, match=r"rank-00000.* and rank-00001.* both hold element 0 of 'weight/a'"):
        Parts(part.parent, [part_name(0), part_name(1)])


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank-00003.safetensors: cannot be read: No such file"):
        Parts(tmp_path, [part_name(3)])


def test_a_rank_is_told_of_all_that_it_needs_and_of_nothing_else() -> None:
    dice = random.Random(0)
    for _ in range(200):
        cuts = [0, *sorted(dice.sample(range(1, 60), dice.randint(0, 8))), 60]
        pieces = [Stretch(one, other - one, f"rank-{one}", 0, "F32") for one, other in pairwise(cuts)]
        pieces = [piece for piece in pieces if dice.random() < 0.9]
        begin = dice.randrange(60)
        end = dice.randint(begin + 1, 60)
        table = {"weight/a": pieces, "exp_avg/a": pieces[:1], "weight/b": pieces}
        found = selected(table, {"a": (begin, end - begin)})
        assert found.keys() == {"weight/a", "exp_avg/a"}  # a kind that is elsewhere only is not forgotten
        for key, some in found.items():
            wanted = [one for one in table[key] if one.begin < end and one.begin + one.length > begin]
            assert some == wanted


def test_a_reader_of_many_parts_holds_few_files_open_and_opens_none_twice_in_a_row(tmp_path: Path) -> None:
    for rank in range(100):
        tensors = {f"weight/{name}": torch.full((2,), float(rank)) for name in "ab"}
        write_part(tmp_path / part_name(rank), tensors, {"begins": dict.fromkeys("ab", 2 * rank)})
    parts, out = Parts(seal(tmp_path)), torch.empty(200)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in "ab":
        parts.read("weight", name, 0, out)
        assert torch.equal(out, torch.arange(100.0).repeat_interleave(2))
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 64


def mutations(content: bytes, seed: int) -> Iterator[bytes]:
    """The file with bytes of its header changed, cut, doubled and swapped for those that JSON is made of."""
    dice = random.Random(seed)
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        bytes_ = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(end)
            way = dice.randrange(4)
            if way == 0:
                bytes_[place] = dice.randrange(256)
            elif way == 1:
                bytes_[place] = dice.choice(b'0123456789-e.[]{},:"')
            elif way == 2:
                del bytes_[place : place + dice.randint(1, 30)]
            else:
                bytes_[place:place] = bytes_[dice.randrange(end) :][: dice.randint(1, 30)]
        if dice.random() < 0.8:  # a header as long as it says, so that what it says is looked at
            grown = len(bytes_) - len(content)
            bytes_[:8] = (end - 8 + grown).to_bytes(8, "little")
        yield bytes(bytes_)


@pytest.mark.parametrize("seed", range(3))
def test_a_part_with_any_damage_in_its_header_is_read_within_its_bytes_or_refused(seed: int, part: Path) -> None:
    refused = 0
    for content in mutations(part.read_bytes(), seed):
        part.write_bytes(content)
        try:
            use(part)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200

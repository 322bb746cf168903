"""Folders of somebody else are converted without running their code, and no word of it travels on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data_pipeline.tokenize.tokenizer import open_tokenizer, save
from data_pipeline.tokenize.training import train_tokenizer
from ponder_scale.checkpoint.find import Ranks
from ponder_scale.checkpoint.save import Part, Saver
from ponder_scale.checkpoint.weights import read_folder
from ponder_scale.errors import CheckpointError, ConfigError, SaveError, TokenizerError
from ponder_scale.export.reference import export_reference, import_reference
from ponder_scale.export.tokenizer import bundle_tokenizer
from ponder_scale.setup.build import ARCHITECTURES, auto_map, configuration_from_dict
from tests.export.published import NAMES, published_folder
from tests.faults import Fault
from tests.tiny import TEXTS

HOSTILE = {
    "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    "attn_implementation": "somebody/kernel",
    "_attn_implementation_internal": "somebody/kernel",
    "quantization_config": {"quant_method": "somebody"},
    "per_layer_config": {},
    "to_dict": None,
    "_name_or_path": "somebody/else",
}


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "sentencepiece"
    train_tokenizer(
        [f"{text} {number * 7919}" for number in range(200) for text in TEXTS], 400, "sentencepiece", folder
    )
    return folder


def hostile(folder: Path, tokenizer: Path, marker: Path) -> Path:
    """A folder of the published code whose every file names code that leaves a mark when it is imported."""
    published_folder(folder, NAMES[0], **HOSTILE)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**config, "auto_map": HOSTILE["auto_map"], "vocab_file": "/etc/passwd"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **HOSTILE}))
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Tokenizer:\n    pass\n"
    )
    return folder


def words(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.json") if path.name != "tokenizer.json")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_an_import_runs_no_code_of_the_folder_and_hands_none_on(
    kind: str, tiny_tokenizer: Path, sentencepiece: Path, tmp_path: Path, fault: Fault
) -> None:
    tokenizer = tiny_tokenizer if kind == "bpe" else sentencepiece
    source = hostile(tmp_path / "theirs", tokenizer, tmp_path / "ran")
    ours = import_reference(source, tmp_path / "ours")
    back = export_reference(ours, tmp_path / "back")
    assert not (tmp_path / "ran").exists()
    for folder in (ours, back):
        assert "evil" not in words(folder) and "somebody" not in words(folder) and "/etc/passwd" not in words(folder)
        assert not (folder / "evil.py").exists()
    config = json.loads((ours / "config.json").read_text())
    llama = ARCHITECTURES["llama"]
    assert config["auto_map"] == auto_map(llama.configuration, llama.model)
    assert not config.keys() & (HOSTILE.keys() - {"auto_map"})
    assert "auto_map" not in json.loads((ours / "tokenizer_config.json").read_text())
    fault(f"auto_map beside a {kind} tokenizer", "import-reference", detected="stripped", after="no code ran", lost="-")


def test_the_code_of_these_tests_is_real(sentencepiece: Path, tmp_path: Path) -> None:
    source = hostile(tmp_path / "theirs", sentencepiece, tmp_path / "ran")
    (source / "config.json").unlink()
    with pytest.raises(AttributeError):  # its class has no from_pretrained, which comes after
        AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_what_folders_of_ours_are_given_by_hand_is_not_exported(tiny_tokenizer: Path, tmp_path: Path) -> None:
    source = published_folder(tmp_path / "theirs", NAMES[0])
    shutil.copytree(tiny_tokenizer, source, dirs_exist_ok=True)
    ours = import_reference(source, tmp_path / "ours")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((ours / name).read_text())
        told = {key: HOSTILE[key] for key in ("auto_map", "custom_pipelines", "_name_or_path")}
        (ours / name).write_text(json.dumps({**content, **(told if "tokenizer" in name else HOSTILE)}))
    assert "evil" not in words(export_reference(ours, tmp_path / "back"))


def test_a_configuration_takes_what_its_class_knows() -> None:
    configuration = configuration_from_dict({"model_type": "ponder_llama", "hidden_size": 64, **HOSTILE})
    assert configuration.hidden_size == 64 and callable(configuration.to_dict)
    assert not set(configuration.to_dict()) & (HOSTILE.keys() - {"_name_or_path"})
    for name in ("evil", None, ["ponder_llama"]):
        with pytest.raises(ConfigError, match="model_type is"):
            configuration_from_dict({"model_type": name})


def outside(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    secret.write_text('{"key": "secret"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)


def in_a_circle(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)


def by_a_folder(folder: Path, name: str) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / name).rename(folder.parent / "elsewhere" / name) if (folder / name).exists() else (
        folder.parent / "elsewhere" / name
    ).write_text("{}")
    (folder / "more").symlink_to(folder.parent / "elsewhere")
    (folder / name).symlink_to(Path("more") / name)


LINKS = {"a link to a file elsewhere": outside, "a circle": in_a_circle, "a folder that is a link": by_a_folder}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
@pytest.mark.parametrize("how", LINKS)
def test_links_out_of_a_tokenizer_folder_are_not_followed(
    how: str, name: str, tiny_tokenizer: Path, tmp_path: Path, fault: Fault
) -> None:
    source = published_folder(tmp_path / "theirs", NAMES[0])
    shutil.copytree(tiny_tokenizer, source, dirs_exist_ok=True)
    LINKS[how](source, name)
    (tmp_path / "out").mkdir()
    with pytest.raises(TokenizerError, match=rf"{name}: is a link (out of its folder|that leads to no file)"):
        bundle_tokenizer(source, tmp_path / "out", eod_id=0)
    with pytest.raises(SaveError, match="is a link"):
        Saver(tmp_path / "run", source, ranks=Ranks()).save(1, {}, Part({}, {}))
    assert not list((tmp_path / "run/checkpoints").iterdir())
    fault(f"{name}: {how}", "save, export, import", detected="leads out", after="refused", lost="nothing")


def test_a_build_does_not_follow_what_lies_beside_its_tokenizer(tiny_tokenizer: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_tokenizer, tmp_path / "theirs"))
    outside(source, "special_tokens_map.json")
    with pytest.raises(TokenizerError, match=r"special_tokens_map.json: is a link out of its folder"):
        save(open_tokenizer(source, "<|endoftext|>"), tmp_path / "copy")


def test_links_within_a_folder_and_in_the_hub_s_cache_are_copied(tiny_tokenizer: Path, tmp_path: Path) -> None:
    inside = Path(shutil.copytree(tiny_tokenizer, tmp_path / "inside"))
    (inside / "tokenizer.json").rename(inside / "kept.json")
    (inside / "tokenizer.json").symlink_to("kept.json")
    cached = tmp_path / "models--a--b/snapshots/0123"
    shutil.copytree(tiny_tokenizer, cached)
    (tmp_path / "models--a--b/blobs").mkdir()
    (cached / "tokenizer.json").rename(tmp_path / "models--a--b/blobs/abc")
    (cached / "tokenizer.json").symlink_to("../../blobs/abc")
    for number, source in enumerate((inside, cached)):
        out = tmp_path / str(number)
        out.mkdir()
        bundle_tokenizer(source, out, eod_id=0)
        assert (out / "tokenizer.json").read_bytes() == (tiny_tokenizer / "tokenizer.json").read_bytes()
        assert not (out / "tokenizer.json").is_symlink()


def give(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)  # type: ignore[return-value]


def split_in_two(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_files_that_no_index_names_are_not_read(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "theirs", NAMES[0])
    whole = dict(read_folder(folder))
    shutil.copy(folder / "model.safetensors", folder / "model-extra.safetensors")
    assert [name for name, _ in read_folder(folder)] == list(whole)
    split_in_two(folder)
    shutil.copy(folder / "model-0.safetensors", folder / "consolidated.safetensors")
    assert sorted(name for name, _ in read_folder(folder)) == sorted(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"weight_map": []}', "cannot be read"),
        ('{"weight_map": {"a": [1]}}', "cannot be read"),
        ('{"weight_map": {"a": 1}}', "names 1; expected the name of a file in its folder"),
        ('{"weight_map": {"a": "../secret"}}', "names '../secret'; expected the name of a file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'; expected the name of a file"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "missing, although model.safetensors.index.json names it"),
    ],
)
def test_an_index_of_weights_that_cannot_be_is_answered(content: str, message: str, tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "theirs", NAMES[0])
    give(content)(folder)
    with pytest.raises(CheckpointError, match="remove the one that is not the model's"):
        list(read_folder(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        list(read_folder(folder))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-8,-4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
    ],
)
def test_hostile_safetensors_of_a_folder_are_refused_in_one_sentence(header: bytes, tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "theirs", NAMES[0])
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: ") as caught:
        list(read_folder(folder))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    import torch

    source = published_folder(tmp_path / "theirs", NAMES[0])
    weights = load_file(source / "model.safetensors")
    name = "model.norm.weight"
    for dtype in (torch.int32, torch.float8_e4m3fn):
        save_file({**weights, name: weights[name].to(dtype)}, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{name} has dtype {dtype}; expected floating-point weights"):
            import_reference(source, tmp_path / "ours")
    for content in ([1], {"a": 1}):
        (source / "model.safetensors").unlink(missing_ok=True)
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read: expected tensors"):
            import_reference(source, tmp_path / "ours")

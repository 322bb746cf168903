import json
import re
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from data_pipeline.cli import main
from data_pipeline.tokenize import autotokenizer
from data_pipeline.tokenize.tokenizer import open_tokenizer, save
from data_pipeline.tokenize.training import train_tokenizer
from ponder_scale.errors import ConfigError, TokenizerError
from ponder_scale.shards.format import open_shards
from tests.data_pipeline.tokenizers import bare

TEXTS = [
    "A plain sentence.",
    "  indented\n\tand\r\nmore  \n\n",
    "Größe 数学 \U0001f600 \u0000 e\u0301",
    "<|endoftext|> and </s> and <s> are text here",
    " ",
    "1234567890 " * 50,
]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "sentencepiece"
    corpus = [f"{text} number {i} of many words, {i * 7919}" for i in range(200) for text in TEXTS]
    train_tokenizer(corpus, 400, "sentencepiece", folder)
    return folder


@pytest.fixture(params=["bpe", "sentencepiece"])
def folder(request, tiny_tokenizer, sentencepiece):
    return tiny_tokenizer if request.param == "bpe" else sentencepiece


def split(tokens, lengths):
    ends = lengths.cumsum()
    return [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def test_a_batch_is_its_texts_one_by_one_and_decodes_to_them(folder):
    tokenizer = open_tokenizer(folder)
    tokens, lengths = tokenizer.encode_batch([*TEXTS, ""])
    assert len(tokens) == lengths.sum() and lengths[-1] == 0
    for text, mine in zip(TEXTS, split(tokens, lengths), strict=False):
        alone, _ = tokenizer.encode_batch([text])
        assert mine == alone.tolist()
        assert tokenizer.decode(mine) == text
        assert max(mine) < tokenizer.vocab_size


def test_special_tokens_inside_a_text_are_ordinary_text(folder):
    tokenizer = open_tokenizer(folder)
    tokens, _ = tokenizer.encode_batch(TEXTS)
    assert tokenizer.eod_id not in tokens


def test_no_batch_gives_no_tokens(folder):
    tokens, lengths = open_tokenizer(folder).encode_batch([])
    assert len(tokens) == len(lengths) == 0


def test_transformers_gives_the_same_tokens(folder):
    from transformers import AutoTokenizer

    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eod_id, None, ours.vocab_size)
    for text in TEXTS:
        if "</s>" not in text:
            tokens, _ = ours.encode_batch([text])
            assert theirs(text)["input_ids"] == tokens.tolist()
            assert theirs.decode(tokens) == text


def test_training_twice_gives_the_same_tokenizer(folder, tmp_path):
    kind = "bpe" if (folder / "tokenizer.json").exists() else "sentencepiece"
    texts = [f"{text} number {i}" for i in range(100) for text in TEXTS]
    found = set()
    for name in ("one", "two"):
        train_tokenizer(iter(texts), 380, kind, tmp_path / name)
        found.add(open_tokenizer(tmp_path / name).sha256)
    assert len(found) == 1


def test_a_saved_tokenizer_is_the_same_one(folder, tmp_path):
    (other := tmp_path / "other").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, other)
    (other / "notes.md").write_text("not a part of it")
    tokenizer = open_tokenizer(other)
    files = save(tokenizer, tmp_path / "saved")
    assert sorted(path.name for path in files) == sorted(path.name for path in folder.iterdir())
    again = open_tokenizer(tmp_path / "saved")
    assert (again.sha256, again.eod_id, again.vocab_size) == (
        tokenizer.sha256,
        tokenizer.eod_id,
        tokenizer.vocab_size,
    )


def test_the_file_that_was_named_is_the_one_that_is_saved(tiny_tokenizer, sentencepiece, tmp_path):
    """Also beside another that would be taken of a folder, and under a name that no folder is opened by."""
    (both := tmp_path / "both").mkdir()
    shutil.copy(tiny_tokenizer / "tokenizer.json", both)
    shutil.copy(sentencepiece / "tokenizer.model", both)
    shutil.copy(tiny_tokenizer / "tokenizer.json", both / "mine.json")
    for number, name in enumerate(("tokenizer.model", "mine.json", "tokenizer.json")):
        tokenizer = open_tokenizer(both / name)
        save(tokenizer, tmp_path / str(number))
        assert open_tokenizer(tmp_path / str(number)).sha256 == tokenizer.sha256


def test_a_tokenizer_that_changes_during_a_build_is_noticed(tiny_tokenizer, tmp_path):
    shutil.copytree(tiny_tokenizer, tmp_path / "other")
    tokenizer = open_tokenizer(tmp_path / "other")
    with tokenizer.path.open("a") as stream:
        stream.write("\n")
    with pytest.raises(TokenizerError, match="changed during the build"):
        save(tokenizer, tmp_path / "saved")


def test_the_file_itself_can_be_named(folder):
    (file,) = [path for path in folder.iterdir() if path.name in ("tokenizer.json", "tokenizer.model")]
    assert open_tokenizer(file).sha256 == open_tokenizer(folder).sha256


def test_the_end_token_is_the_one_asked_for_else_declared_else_usual(tmp_path):
    words = ["a", "<end>", "</s>", "<|endoftext|>"]
    assert open_tokenizer(bare(tmp_path / "usual", words)).eod_id == 3
    declared = bare(tmp_path / "declared", words, eos_token={"content": "<end>", "special": True})
    assert open_tokenizer(declared).eod_id == 1
    assert open_tokenizer(bare(tmp_path / "plain", words, eos_token="</s>")).eod_id == 2
    assert open_tokenizer(declared, eod_token="a").eod_id == 0


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path):
    folder = tmp_path / "holes"
    folder.mkdir()
    Tokenizer(models.BPE({"a": 0, "</s>": 41}, [])).save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder).vocab_size == 42


def test_what_is_no_usable_tokenizer_is_refused(tmp_path, folder):
    with pytest.raises(TokenizerError, match="no such file or folder"):
        open_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"expected a tokenizer\.json or a SentencePiece \.model file"):
        open_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"none of <|endoftext|>.*; give eod_token=TOKEN"):
        open_tokenizer(bare(tmp_path / "no_end", ["a"]))
    with pytest.raises(TokenizerError, match="eod_token is '<none>', which is not in its vocabulary"):
        open_tokenizer(folder, eod_token="<none>")
    for name in ("broken.json", "broken.model"):
        (tmp_path / name).write_text("{]")
        with pytest.raises(TokenizerError, match=f"{name}: cannot be read") as error:
            open_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not a JSON object"):
        broken = bare(tmp_path / "settings", ["</s>"], eos_token="</s>")
        (broken / "tokenizer_config.json").write_text("[")
        open_tokenizer(broken)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_bad_training_leaves_nothing_behind(tmp_path, kind):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--vocab-size is 100; "):
        train_tokenizer(TEXTS, 100, kind, out)
    with pytest.raises(ConfigError, match="no text to train on"):
        train_tokenizer([], 400, kind, out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(ConfigError, match="which exists; remove it"):
        train_tokenizer(TEXTS, 400, kind, out)


def test_too_little_text_for_sentencepiece_is_one_clear_line(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot train 5,000 tokens on these texts") as error:
        train_tokenizer(["ab"], 5000, "sentencepiece", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_an_error_while_reading_texts_ends_training(tmp_path, kind):
    def texts():
        yield "some text"
        raise ConfigError("the disk is on fire")

    with pytest.raises(ConfigError, match="the disk is on fire"):
        train_tokenizer(texts(), 400, kind, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


END = "<|endoftext|>"
TOOL = {"content": "<tool>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}


def with_settings(tiny_tokenizer, folder, **settings):
    folder.mkdir()
    shutil.copy(tiny_tokenizer / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **settings}))
    return folder


def build(tokenizer, folder, *settings) -> int:
    corpus = folder / "web.txt"
    corpus.write_text("some words of a text")
    source = ["sources.web.kind=text", f"sources.web.path={corpus}"]
    return main(["build", f"out={folder / 'out'}", f"tokenizer={tokenizer}", *source, "workers=1", *settings])


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("form", [str, lambda name: {"content": name, "special": True}])
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_declared_end_token_that_the_tokenizer_lacks_is_never_replaced(
    tiny_tokenizer, sentencepiece, tmp_path, capsys, file, form, kind
):
    (folder := tmp_path / "chat").mkdir()
    for path in (tiny_tokenizer if kind == "bpe" else sentencepiece).glob("tokenizer.[jm]*"):
        shutil.copy(path, folder)
    (folder / file).write_text(json.dumps({"eos_token": form("<|im_end|>")}))
    assert build(folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{file}: eos_token is '<|im_end|>', which tokenizer." in error and "give eod_token=TOKEN" in error
    assert error.count("\n") == 1
    usual, own = (END, tiny_tokenizer) if kind == "bpe" else ("</s>", sentencepiece)
    assert open_tokenizer(folder, eod_token=usual).eod_id == open_tokenizer(own).eod_id


def test_the_declared_end_token_of_a_sentencepiece_model_is_taken(sentencepiece, tmp_path):
    shutil.copytree(sentencepiece, folder := tmp_path / "other")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    assert open_tokenizer(folder).decode([open_tokenizer(folder).eod_id]) == "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
            r"AutoTokenizer encodes 'word' as \[\d+, .*\], and tokenizer.json as \[",
        ),
        (
            {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"300": TOOL}},
            r"AutoTokenizer has 301 tokens .*, tokenizer.json 300 \(the last is '<tool>'\)",
        ),
        (
            {"added_tokens_decoder": {"40": {**TOOL, "content": "H", "lstrip": True, "rstrip": True}}},
            r"AutoTokenizer encodes 'aHb H  c h' as",
        ),
        (
            {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<x>"}},
            r"AutoTokenizer has 301 tokens .*, tokenizer.json 300 \(the last is '<x>'\)",
        ),
    ],
    ids=["prefix space", "added token", "stripping token", "extra special token"],
)
@pytest.mark.slow  # a process imports transformers
def test_a_tokenizer_that_transformers_reads_otherwise_is_refused_and_can_be_mended(
    tiny_tokenizer, tmp_path, capsys, settings, message
):
    folder = with_settings(tiny_tokenizer, tmp_path / "other", **settings)
    assert build(folder, tmp_path) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "save_pretrained(NEW)" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if "add_prefix_space" in settings:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
        assert build(tmp_path / "new", tmp_path) == 0
        theirs = AutoTokenizer.from_pretrained(tmp_path / "new")("some words of a text")["input_ids"]
        shards = open_shards(tmp_path / "out")
        tokens = [one.tokens.tolist() for split in ("train", "heldout") for one in shards.split(split)]
        assert tokens == [[*theirs, open_tokenizer(folder).eod_id]]
        (folder / "tokenizer_config.json").unlink()
        assert build(folder, tmp_path, f"out={tmp_path / 'alone'}") == 0


def test_a_tokenizer_that_transformers_reads_alike_is_taken_and_no_torch_is_loaded(tiny_tokenizer, tmp_path, capsys):
    folder = with_settings(tiny_tokenizer, tmp_path / "gpt2", tokenizer_class="GPT2TokenizerFast")
    assert build(folder, tmp_path) == 0
    assert "warning" not in capsys.readouterr().err
    code = "import sys, data_pipeline.tokenize.autotokenizer as a; print(a.__name__, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "data_pipeline.tokenize.autotokenizer False\n"


def test_transformers_is_not_asked_where_the_settings_change_nothing(tiny_tokenizer, tmp_path, monkeypatch):
    """It takes longer than a small build."""
    monkeypatch.setattr(autotokenizer, "_ask", lambda *_: pytest.fail("asked"))
    assert build(tiny_tokenizer, tmp_path) == 0
    for number, settings in enumerate(({"pad_token": "!"}, {"add_prefix_space": False}, {"eos_token": "!"})):
        folder = with_settings(
            tiny_tokenizer, tmp_path / str(number), tokenizer_class="PreTrainedTokenizerFast", **settings
        )
        with pytest.raises(pytest.fail.Exception):
            build(folder, tmp_path, f"out={tmp_path / 'other'}")


def test_a_build_goes_on_with_a_warning_where_transformers_cannot_be_asked(
    tiny_tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(autotokenizer, "SECONDS", 0.01)
    folder = with_settings(tiny_tokenizer, tmp_path / "gpt2", tokenizer_class="GPT2TokenizerFast")
    assert build(folder, tmp_path) == 0
    assert "cannot be compared with transformers' AutoTokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_draws_its_tokens_is_refused(tiny_tokenizer, tmp_path, capsys):
    """BPE dropout: two builds of the same texts would differ."""
    content = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert build(tmp_path / "tokenizer.json", tmp_path) == 2
    assert "model.dropout is 0.1: a text would have other tokens each time; set it to null" in capsys.readouterr().err
    content["model"]["dropout"] = 0.0
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert build(tmp_path / "tokenizer.json", tmp_path) == 0

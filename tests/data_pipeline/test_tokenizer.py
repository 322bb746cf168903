import json
import shutil

import pytest
from tokenizers import Tokenizer, models

from data_pipeline.tokenizer import open_tokenizer, save
from data_pipeline.training import train_tokenizer
from ponder_scale.errors import ConfigError, TokenizerError

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


def bare(folder, vocabulary: list[str], **settings):
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


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

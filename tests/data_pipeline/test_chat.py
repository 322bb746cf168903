"""Conversations by the chat template of a tokenizer: what the assistant says counts, as transformers has it."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cli import main
from data_pipeline.read.chat import open_template
from data_pipeline.tokenize.tokenizer import open_tokenizer
from ponder_scale.errors import ConfigError
from ponder_scale.shards.format import open_shards
from ponder_scale.shards.manifest import read_manifest
from tests.data_pipeline.masked import build, documents, write

TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}
    {{- '<|endoftext|>system\\n' + messages[0]['content'] }}
{%- endif %}
{%- for message in messages if message['role'] != 'system' %}
    {%- if message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('no such role') }}
    {%- endif %}
    {{- '<|endoftext|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim + eos_token }}
            {%- if message.tools %}{{- message.tools | tojson }}{% endif %}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
    {{- '\\n' }}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}
"""


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    """A tokenizer with a chat template."""
    made = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer, made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def conversations(count, seed=0):
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        messages = [{"role": "system", "content": "Be <brief> & true."}] if number % 3 else []
        for turn in range(int(generator.integers(1, 4))):
            said = " ".join(generator.choice(["word", "Größe", "12", "数学", "\n", "{% raw %}"], 5))
            messages.append({"role": "user", "content": f"{turn}: {said}"})
            messages.append({"role": "assistant", "content": f" {said} "})
        found.append({"messages": messages, "id": number})
    found[0]["messages"][-1]["tools"] = [{"name": "<b>Größe</b>", "of": 1}]
    return found


def options(template):
    return [
        f"sources.chat.loss={{messages: messages, template: {template}}}",
        "special_tokens_in_text=tokens",
    ]


def test_texts_and_what_counts_are_those_of_transformers(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    render = open_template(folder)
    for record in conversations(12):
        text, spans = render(record["messages"])
        assert text == theirs.apply_chat_template(record["messages"], tokenize=False)
        encoded = theirs.apply_chat_template(
            record["messages"], return_assistant_tokens_mask=True, return_dict=True, tokenizer_kwargs={}
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        counting = theirs.decode([token for token, counts in pairs if counts])
        assert "".join(text[begin:end] for begin, end in spans) == counting and counting


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_tokens_of_the_assistant_count_with_its_end_and_special_tokens_are_tokens(kind, folder, tmp_path):
    records = conversations(30)
    path = write(tmp_path / "a.jsonl", records)
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(records), path)
    assert build(path, folder, tmp_path / "out", *options(folder), kind=kind) == 0
    tokenizer, render = open_tokenizer(folder), open_template(folder)
    for (tokens, counts), record in zip(documents(tmp_path / "out"), records, strict=True):
        text, spans = render(record["messages"])
        assert tokenizer.decode(tokens) == text + "<|endoftext|>"
        counting = tokenizer.decode([token for token, own in zip(tokens, counts, strict=True) if own])
        assert counting == "".join(text[begin:end] for begin, end in spans)
        assert tokens.count(tokenizer.eod_id) == text.count("<|endoftext|>") + 1


def test_a_conversation_that_the_template_does_not_take_is_a_bad_record(folder, tmp_path):
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    bad = [
        None,
        [],
        ["a"],
        "a",
        {"role": "user"},
        [{"role": "tool", "content": "x"}, assistant],
        [{"role": "assistant"}, 1],
    ]
    bad.append([user, {"role": "assistant", "content": "x\ufdd1y\ufdd0z"}])  # what marks its ends
    records = [{"messages": messages} for messages in [*bad, [user], [user, assistant]]] + [{"text": "a"}]
    path = write(tmp_path / "a.jsonl", records)
    assert build(path, folder, tmp_path / "out", *options(folder), "max_bad_fraction=1") == 0
    assert read_manifest(tmp_path / "out").provenance["sources"]["chat"]["drops"] == {
        "field missing": 1,
        "messages are no conversation that the chat template takes": len(bad),
        "nothing in it counts in the loss": 1,
    }
    assert sum(shard.info.documents for shard in open_shards(tmp_path / "out").split("train")) == 1


def test_another_template_is_another_build(folder, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", conversations(4))
    assert build(path, folder, tmp_path / "out", *options(folder)) == 0
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("system\\n", "System\\n"))
    open_template.cache_clear()
    assert build(path, folder, tmp_path / "out", *options(folder)) == 2
    assert "chat templates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
            "which of its text counts cannot be known",
        ),
        (lambda f: (f / "chat_template.jinja").write_text("{% generation %}"), "is no chat template that can be read"),
        (lambda f: (f / "chat_template.jinja").unlink(), "is no chat template; expected a file such as"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_template_that_does_not_say_what_the_assistant_says_is_refused(change, message, folder, tmp_path):
    template = tmp_path / "template"
    shutil.copytree(folder, template)
    change(template)
    with pytest.raises(ConfigError, match=message):
        open_template(template)


def test_the_refusal_names_the_source_and_special_tokens_have_to_be_tokens(folder, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", conversations(2))
    (tmp_path / "plain.jinja").write_text("{{ messages }}")
    assert build(path, folder, tmp_path / "out", *options(tmp_path / "plain.jinja")) == 2
    assert "sources.chat.loss.template: " in capsys.readouterr().err
    assert build(path, folder, tmp_path / "out", options(folder)[0]) == 2
    assert "set special_tokens_in_text=tokens" in capsys.readouterr().err
    assert build(path, folder, tmp_path / "out", "sources.chat.loss={messages: messages}") == 2
    assert "{messages: FIELD, template: PATH}" in capsys.readouterr().err


def test_a_template_of_a_tokenizer_config_is_found_and_the_day_is_not_told(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    for template in (TEMPLATE, named):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        open_template.cache_clear()
        assert open_template(folder)(conversations(1)[0]["messages"])[0].startswith("<|endoftext|>user")
    dated = TEMPLATE + "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
    (folder / "dated.jinja").write_text(dated)
    text = open_template(folder / "dated.jinja")(conversations(1)[0]["messages"])[0]
    assert text == open_template(folder)(conversations(1)[0]["messages"])[0]


def test_a_plan_and_the_training_of_a_tokenizer_read_conversations(folder, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", conversations(40))
    source = ["sources.chat.kind=jsonl", f"sources.chat.path={path}", *options(folder)]
    assert main(["plan", f"out={tmp_path / 'out'}", f"tokenizer={folder}", *source]) == 0
    (tmp_path / "build.yaml").write_text("")
    train = ["train-tokenizer", "--recipe", str(tmp_path / "build.yaml"), "--vocab-size", "280"]
    more = [f"out={tmp_path / 'out'}", f"tokenizer={folder}"]
    assert main([*train, "--out", str(tmp_path / "new"), *source, *more]) == 0
    assert "40 documents" in capsys.readouterr().out

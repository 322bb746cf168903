"""Recipes and overrides: text as typed, paths, mappings that are replaced, bounds of every number, names of keys."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.config import BuildConfig
from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import MISSING, from_dict, known_keys, load, to_dict, to_yaml
from ponder_scale.settings.values import is_text, parts

RUN = ("run_dir=r", "train.steps=100", "train.global_batch=8", "data.sources.a.path=p")
BUILD = ("out=o", "tokenizer=t", "sources.a.kind=text", "sources.a.path=p")
# What YAML would make something else of.
TYPED = (
    *("exp #2", "#2", "0123", "1e3", "1_000", "0x10", "12:30:00", "2026-01-01", ".5", "+7", "-", "1.0", "inf", ".nan"),
    *(
        "on",
        "off",
        "yes",
        "No",
        "y",
        "true",
        "False",
        "null",
        "~x",
        "a: b",
        "a:b",
        "key=value",
        "[x]",
        "[x",
        "{x}",
        "{x: 1",
    ),
    *(
        "*star",
        "&anchor",
        "!tag",
        "%x",
        "@x",
        "`x`",
        "|",
        ">",
        "? x",
        "- x",
        "'x'",
        '"x"',
        "'",
        "a, b",
        "a b",
        " a",
        "???",
    ),
)


def run(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*RUN, *overrides])


def corpus(*overrides: str) -> BuildConfig:
    return load(BuildConfig, None, [*BUILD, *overrides])


def recipe(folder: Path, text: str, schema: type[Any] = RunConfig) -> Any:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    given = RUN if schema is RunConfig else BUILD
    names = yaml.safe_load(text)
    return load(schema, path, [word for word in given if word.partition("=")[0].partition(".")[0] not in names])


def refusal(load_it: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_it()
    message = str(error.value)
    assert "\n" not in message and message, message
    return message


@pytest.mark.parametrize("text", TYPED)
def test_a_text_key_takes_what_was_typed(text: str, tmp_path: Path) -> None:
    path = text.replace("~", "-")  # which stands for the home folder
    config = run(f"log.wandb_project={text}", f"data.sources.a.path={path}")
    assert config.log.wandb_project == text and config.data.sources["a"].path == path
    source = corpus(f"sources.a.field={text}", f"sources.a.path={path}").sources["a"]
    assert (source.field, source.path) == (text, path)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(RunConfig, tmp_path / "again.yaml") == config
    assert from_dict(RunConfig, to_dict(config)) == config


def plain(text: str) -> bool:
    """Whether a text is one word or more in YAML's own syntax, where a space and # begin a comment."""
    return text[0] not in "#&*!%@`|>?-'\"[{ ~" and text not in ("null", "a: b") and " #" not in text


@pytest.mark.parametrize("text", filter(plain, TYPED))
def test_a_text_key_of_a_recipe_takes_what_was_typed(text: str, tmp_path: Path) -> None:
    assert recipe(tmp_path, f"run_dir: {text}  # mine").run_dir == text
    entry = "x" if ":" in text else text
    sources = f"sources:\n  {entry}:\n    kind: text\n    path: {text}"
    made = recipe(tmp_path, sources, BuildConfig).sources
    assert {name: source.path for name, source in made.items()} == {entry: text}
    if "," not in text:
        assert recipe(tmp_path, f"log: {{wandb_project: {text}}}").log.wandb_project == text
        listed = recipe(tmp_path, f"sources:\n  a: {{kind: text, path: p, exclude: [{text}, on]}}", BuildConfig)
        assert listed.sources["a"].exclude == [text, "on"]


def test_choices_take_what_was_typed(tmp_path: Path) -> None:
    assert run("log.wandb=off").log.wandb == "off"
    assert recipe(tmp_path, "log: {wandb: off}").log.wandb == "off"
    assert recipe(tmp_path, "log:\n  wandb: 'off'  # quoted").log.wandb == "off"
    assert "log.wandb is 'False'; expected one of off, online, offline" in refusal(lambda: run("log.wandb=False"))
    assert "data.packing is 'bestfit'; expected one of concat, best-fit" in refusal(lambda: run("data.packing=bestfit"))
    assert run("train.micro_batch=auto").train.micro_batch == "auto"


def test_names_of_entries_are_as_typed(tmp_path: Path) -> None:
    assert list(run("data.sources.on.path=x", "data.sources.0123.path=y").data.sources) == ["a", "on", "0123"]
    made = recipe(tmp_path, "data: {sources: {on: {path: x}, 1e3: {path: y}, 0123: {path: z}}}")
    assert list(made.data.sources) == ["on", "1e3", "0123"]
    phases = run("data.phases=[{tokens: 9, weights: {on: 1, 010: 2}}, {weights: {a: 1}}]").data.phases
    assert phases[0].weights == {"on": 1.0, "010": 2.0}


def test_null_is_null_where_a_key_may_be_null(tmp_path: Path) -> None:
    config = run("model.init_from=null", "optim.grad_clip=null", "checkpoint.keep=Null", "train.time_limit=null")
    assert (config.model.init_from, config.optim.grad_clip, config.checkpoint.keep, config.train.time_limit) == (
        None,
    ) * 4
    config = recipe(tmp_path, "model: {init_from: null}\ncheckpoint: {keep: ~}\noptim:\n  grad_clip:\n")
    assert (config.model.init_from, config.checkpoint.keep, config.optim.grad_clip) == (None, None, None)
    assert corpus("bos_token=null").bos_token is None
    assert recipe(tmp_path, "bos_token: 'null'", BuildConfig).bos_token == "null"
    assert "run_dir is null" in refusal(lambda: recipe(tmp_path, "run_dir: null"))
    assert "run_dir is null" in refusal(lambda: recipe(tmp_path, "run_dir:"))
    assert "train.steps is null; expected a whole number" in refusal(lambda: run("train.steps=null"))


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    config = run(
        "train.steps=1e3", "optim.lr=1e-3", "seed=010", "data.seq_len=2_048", "train.compile=yes", "optim.beta1=.5"
    )
    assert (config.train.steps, config.optim.lr, config.seed, config.data.seq_len) == (1000, 1e-3, 10, 2048)
    assert config.train.compile is True and config.optim.beta1 == 0.5
    assert (
        recipe(tmp_path, "optim: {lr: 1e-3, min_lr: '1e-5'}\nseed: 010\ntrain: {steps: 1e3, global_batch: 8}").seed
        == 10
    )
    for text in ("1.5", "0x10", "many", "*.py", "", "1,000", "12:30", "[1]", "true", "None", "1e", "--1", "${seed}"):
        assert f"train.steps is {text!r}; expected a whole number" in refusal(
            lambda text=text: run(f"train.steps={text}")
        )
    for text in ("2", "None", "maybe", "[true]", ""):
        assert "train.compile is" in refusal(lambda text=text: run(f"train.compile={text}"))


def test_what_no_key_gives_a_type_is_yaml_without_its_guesses(tmp_path: Path) -> None:
    words = "{a: 1e-5, b: on, c: 0123, d: 12:30:00, e: true, f: null, g: '1', h: [1, 2.5], i: {j: 2026-01-01}, k: -3}"
    expected = {"a": 1e-5, "b": "on", "c": "0123", "d": "12:30:00", "e": True, "f": None, "g": "1", "h": [1, 2.5]}
    expected |= {"i": {"j": "2026-01-01"}, "k": -3}
    config = run(f"model.extra={words}")
    assert config.model.extra == expected
    assert recipe(tmp_path, f"model: {{extra: {words}}}").model.extra == expected
    assert from_dict(RunConfig, to_dict(config)) == config
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(RunConfig, tmp_path / "again.yaml") == config
    assert run("model.extra.x=*.py", "model.extra.y=${nope}").model.extra == {"x": "*.py", "y": "${nope}"}


@pytest.mark.parametrize("schema", [RunConfig, BuildConfig])
def test_every_path_key_expands_home_and_variables_or_is_refused(
    schema: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    given = RUN if schema is RunConfig else BUILD
    paths = [known.replace("NAME", "a") for known, _, item in known_keys(schema) if item.metadata["path"]]
    names = {known.replace("NAME", "a") for known, kind, _ in known_keys(schema) if str in parts(kind)}
    assert set(paths) == names & {
        *("run_dir", "model.init_from", "data.sources.a.path", "train.deepspeed", "train.hardware"),
        "evaluate.tasks_include",
        *("out", "tokenizer", "sources.a.path", "sources.a.loss.template"),
    }
    beside = {
        "evaluate.tasks_include": ["evaluate.tasks=[a]", "evaluate.tasks_every_steps=1"],
        "sources.a.loss.template": [
            *("sources.a.kind=jsonl", "sources.a.loss.messages=m", "special_tokens_in_text=tokens")
        ],
    }
    for key in paths:

        def value(text: str, key: str = key) -> Any:
            config = load(schema, None, [*given, *beside.get(key, ()), f"{key}={text}"])
            found: Any = to_dict(config)
            for name in key.split("."):
                found = found[name]
            return found

        for text, path in (
            ("~/x", "/home/me/x"),
            ("~", "/home/me"),
            ("$SCRATCH/x", "/scratch/me/x"),
            ("${SCRATCH}/x", "/scratch/me/x"),
            ("a/$SCRATCH", "a//scratch/me"),
            ("a~/b", "a~/b"),
            ("a$ $(b) $5", "a$ $(b) $5"),
        ):
            assert value(text) == path
        for text, said in (
            ("$NOWHERE/x", "no environment variable NOWHERE"),
            ("${NOWHERE}", "no environment variable NOWHERE"),
            ("${seed}", "no environment variable seed"),
            ("${oc.env:SCRATCH}", "no environment variable oc.env:SCRATCH"),
            ("${model.layers}/x", "no environment variable model.layers"),
            ("${", "expected no $NAME or leading ~"),
            ("$SCRATCH/${", "expected no $NAME or leading ~"),
            ("~nobody-of-this-name/x", "there is no user ~nobody-of-this-name"),
            ("", "is empty; expected a path"),
            (" ", "is empty; expected a path"),
            ("a\nb", "line breaks"),
        ):
            assert said in refusal(lambda text=text, value=value: value(text)) and key in refusal(
                lambda text=text, value=value: value(text)
            )


def test_a_path_of_a_recipe_is_expanded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert recipe(tmp_path, "run_dir: $SCRATCH/run").run_dir == "/scratch/me/run"
    assert recipe(tmp_path, "data: {sources: {a: {path: ~/x}}}").data.sources["a"].path == str(Path.home() / "x")
    monkeypatch.setenv("SCRATCH", "/scratch/$me")
    assert "expected no $NAME or leading ~" in refusal(lambda: recipe(tmp_path, "run_dir: $SCRATCH/run"))


def test_an_override_replaces_a_mapping_or_a_list_as_a_whole(tmp_path: Path) -> None:
    text = (
        "data: {sources: {x: {path: x, weight: 2}, y: {path: y}}, skip: [[1, 2]]}\nmodel: {extra: {a: 1, b: {c: 2}}}\n"
    )

    def mine(*overrides: str) -> RunConfig:
        (tmp_path / "r.yaml").write_text(text)
        return load(RunConfig, tmp_path / "r.yaml", ["run_dir=r", "train.steps=9", "train.global_batch=8", *overrides])

    assert mine("model.extra={}").model.extra == {}
    assert mine("model.extra={d: 1}").model.extra == {"d": 1}
    assert mine("model.extra.b={}").model.extra == {"a": 1, "b": {}}
    assert mine("model.extra.b.c=3", "model.extra.e=4").model.extra == {"a": 1, "b": {"c": 3}, "e": 4}
    assert mine("data.sources={b: {path: b}}").data.sources.keys() == {"b"}
    assert "data.sources is empty" in refusal(lambda: mine("data.sources={}"))
    assert mine("data.sources={}", "data.sources.z.path=z").data.sources.keys() == {"z"}
    assert mine("data.sources.z.path=z").data.sources.keys() == {"x", "y", "z"}
    assert mine("data.sources.x={path: q}").data.sources["x"].weight == 1.0
    assert mine("data.sources.x.path=q").data.sources["x"].weight == 2.0
    assert mine("data.skip=[]").data.skip == [] and mine("data.skip=[[5, 6]]").data.skip == [[5, 6]]
    two = ("data.phases=[{tokens: 5}, {weights: {x: 1}}]", "data.phases.0.tokens=7", "data.phases.1.weights={y: 2}")
    assert [(phase.tokens, phase.weights) for phase in mine(*two).data.phases] == [(7.0, {}), (None, {"y": 2.0})]
    assert "data.phases has 0 entries" in refusal(lambda: mine("data.phases.0.tokens=5"))


def test_of_a_group_of_keys_those_that_are_named_are_set(tmp_path: Path) -> None:
    config = run("optim={lr: 1e-2, beta1: 0.5}", "optim={lr: 2e-2}", "train={pondering: {low: 2}}")
    assert (config.optim.lr, config.optim.beta1, config.train.steps, config.train.pondering.low) == (2e-2, 0.5, 100, 2)
    assert "train is a group of keys" in refusal(lambda: run("train={}"))
    assert "optim is a group of keys" in refusal(lambda: run("optim=null"))
    assert "unknown key optim.l" in refusal(lambda: run("optim={l: 1}"))


def numbers(schema: type[Any]) -> list[tuple[str, Any, Any]]:
    """(key, how a value of it is written, field) of each key that takes numbers."""

    def inner(kind: Any) -> tuple[Any, str]:
        (main, *_) = [part for part in parts(kind) if typing.get_origin(part) is not typing.Literal]
        if typing.get_origin(main) is list:
            kind, form = inner(typing.get_args(main)[0])
            return kind, f"[{form}]"
        if typing.get_origin(main) is dict:
            kind, form = inner(typing.get_args(main)[1])
            return kind, f"{{a: {form}}}"
        return main, "@"

    found = []
    for key, kind, item in known_keys(schema):
        if any(typing.get_origin(part) is not typing.Literal for part in parts(kind)) and inner(kind)[0] in (
            int,
            float,
        ):
            found.append((key.replace("NAME", "a"), inner(kind)[1], item))
    return found


@pytest.mark.parametrize("schema", [RunConfig, BuildConfig])
def test_every_number_has_a_bound_on_either_side(schema: type[Any]) -> None:
    assert len(numbers(schema)) > 5
    for key, _, item in numbers(schema):
        for low, high in (("min", "above"), ("max", "below")):
            bounds = (
                [item.metadata[name] for name in (low, high)]
                if low == "min"
                else [item.metadata[low], item.metadata[high]]
            )
            assert any(bound is not None and math.isfinite(bound) for bound in bounds), key
        defaults = item.default_factory() if callable(item.default_factory) else item.default
        if isinstance(defaults, (int, float)) and not isinstance(defaults, bool):
            assert value_of(schema, key, str(defaults)) == defaults


def value_of(schema: type[Any], key: str, text: str) -> Any:
    """What a key is after an override; entries of lists and phases as the first of them."""
    given = RUN if schema is RunConfig else BUILD
    if ".N." in key:
        group, _, name = key.partition(".N.")
        override = f"{group}=[{{tokens: 5, {name}: {text}}}]" if name != "tokens" else f"{group}=[{{{name}: {text}}}]"
    else:
        override = f"{key}={text}"
    found: Any = to_dict(load(schema, None, [*given, override]))
    for name in key.split("."):
        found = found[0] if name == "N" else found[name]
    return found


ODD = (
    *("inf", "-inf", ".inf", "-.inf", "nan", ".nan", "NaN", "-1", "-5", "0", "-0.0", "1e300", "-1e300", "1e-320"),
    "1e400",
)


@pytest.mark.parametrize("schema", [RunConfig, BuildConfig])
@pytest.mark.parametrize("text", [*ODD, "1" + "0" * 40, "9223372036854775808", "0.5", "1e9999999999", "9" * 5000])
def test_no_number_gets_past_its_bounds(schema: type[Any], text: str) -> None:
    for key, form, item in numbers(schema):
        try:
            found = value_of(schema, key, form.replace("@", text))
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        while isinstance(found, (list, dict)):
            (found,) = found.values() if isinstance(found, dict) else found
        low, high, above, below = (item.metadata[name] for name in ("min", "max", "above", "below"))
        assert math.isfinite(found), (key, text)
        assert (low is None or found >= low) and (high is None or found <= high), (key, text)
        assert (above is None or found > above) and (below is None or found < below), (key, text)


@pytest.mark.parametrize("schema", [RunConfig, BuildConfig])
@pytest.mark.parametrize(
    "text", [*TYPED, *ODD, "", " ", "\n", "\t", "\udcff", "\x00", "[[[", "${", "${a", "<<", "{a: {b: {c: 1}}}"]
)
def test_whatever_is_typed_a_key_takes_it_or_is_refused_in_one_line(schema: type[Any], text: str) -> None:
    given = RUN if schema is RunConfig else BUILD
    for known, kind, item in known_keys(schema):
        key = known.replace("NAME", "a").replace(".N.", ".0.")
        try:
            config = load(schema, None, [*given, f"{key}={text}"])
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1, (key, text)
            continue
        if str in parts(kind) and not item.metadata["path"] and text != "null":
            found: Any = to_dict(config)
            for name in key.split("."):
                found = found[name]
            assert found == text, key
        assert is_text(kind) or from_dict(schema, to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.phases=[{tokens: -5}]", "data.phases.0.tokens is -5.0; expected more than 0"),
        ("data.phases=[{tokens: 5, weights: {a: -1}}]", "data.phases.0.weights.a is -1.0; expected at least 0"),
        ("data.phases=[{tokens: 5}, {weights: {a: .inf}}]", "data.phases.1.weights.a is inf; expected a finite number"),
        ("checkpoint.milestones=[3, -3]", "checkpoint.milestones.1 is -3; expected at least 1"),
        ("log.profile_ranks=[-1]", "log.profile_ranks.0 is -1; expected at least 0"),
        ("data.sources.a.weight=.inf", "data.sources.a.weight is inf; expected a finite number"),
        ("optim.beta1=1", "optim.beta1 is 1.0; expected less than 1"),
        ("optim.beta2=1.0", "optim.beta2 is 1.0; expected less than 1"),
        ("model.norm_eps=1e300", "model.norm_eps is 1e+300; expected at most 1"),
        ("train.steps=-5", "train.steps is -5; expected at least 1 steps"),
        ("optim.lr=nan", "optim.lr is nan; expected a finite number"),
    ],
)
def test_bounds_are_checked_before_keys_are_compared_with_each_other(override: str, message: str) -> None:
    assert message in refusal(lambda: run("optim.warmup_steps=20", override))


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("steps", "train.steps"),
        ("lr", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("batch_size", "train.global_batch"),
        ("train.batch_size", "train.global_batch"),
        ("train.pondering_steps", "model.pondering_steps"),
        ("pondering_steps", "model.pondering_steps"),
        ("model.layers", "model.num_hidden_layers"),
        ("layers", "model.num_hidden_layers"),
        ("train.lr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("seq_len", "data.seq_len"),
        ("train.seq_len", "data.seq_len"),
        ("model.heads", "model.num_attention_heads"),
        ("train.stpes", "train.steps"),
        ("trian.steps", "train.steps"),
        ("optim.warmup", "optim.warmup_steps"),
        ("save_every", "checkpoint.every_steps"),
        ("eval_interval", "evaluate.every_steps"),
        ("log_interval", "log.every_steps"),
        ("every_steps", "checkpoint.every_steps"),
        ("output_dir", "run_dir"),
        ("rundir", "run_dir"),
        ("data.sources.web.pth", "data.sources.web.path"),
        ("train.precison", "train.precision"),
        ("dtype", "train.precision"),
        ("gradient_clipping", "optim.grad_clip"),
        ("zero_stage", "train.deepspeed"),
        ("train.micro-batch", "train.micro_batch"),
        ("Train.Steps", "train.steps"),
    ],
)
def test_an_unknown_key_is_answered_over_all_keys(typed: str, answer: str) -> None:
    said = refusal(lambda: run(f"{typed}=3"))
    assert f"unknown key {typed}; did you mean" in said
    assert answer in said.partition("did you mean ")[2].rstrip("?").split(" or ")


def test_a_key_that_resembles_none_is_sent_to_the_list() -> None:
    assert "unknown key qqq; docs/configuration.md" in refusal(lambda: run("qqq=3"))
    assert "unknown key train.steps.x" in refusal(lambda: run("train.steps.x=3"))
    assert "did you mean sources.a.field?" in refusal(lambda: corpus("sources.a.text_field=x"))
    assert "did you mean deduplicate?" in refusal(lambda: corpus("dedup=exact"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  steps: 9\n  global_batch: 8\n  stepz: 9\n",
            "line 4: unknown key train.stepz; did you mean train.steps?",
        ),
        ("optim: {}\ntrain: {steps: many, global_batch: 8}", "line 2: train.steps is 'many'; expected a whole number"),
        ("train: {steps: 9, global_batch: 8, steps: 10}", "line 1: steps is given twice"),
        ("train.steps: 9", "train.steps is written with dots; in a recipe keys are nested"),
        ("train: [1, 2]", "line 1: train is a list; expected keys and values"),
        ("checkpoint:\n", "checkpoint is null; expected keys and values"),
        ("data: {sources: [x]}", "data.sources is a list; expected keys and values"),
        ("run_dir: [x]", "run_dir is a list; expected text"),
        ("run_dir: !env X", "the tag !env is not known"),
        ("a: &x [*x]", "line 1: "),
        ("seed: 1\n  x: 2", "line 2: cannot be read as YAML"),
        ("seed: 'x", "cannot be read as YAML"),
        ("{{{{", "cannot be read as YAML"),
        ("- a\n- b", "expected keys and values, found a list"),
        ("words", "expected keys and values, found 'words'"),
        ("? [a]\n: b", "expected a name"),
        ("seed: 1\n---\nseed: 2", "cannot be read as YAML"),
        ("a: \x07", "cannot be read as YAML"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    said = refusal(lambda: load(RunConfig, tmp_path / "mine.yaml", []))
    assert message in said and "mine.yaml" in said


def test_a_recipe_that_is_no_text_or_empty_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00run")
    assert "mine.yaml: cannot be read" in refusal(lambda: load(RunConfig, path))
    path.write_bytes(b"")
    assert "run_dir is required; give it as run_dir=VALUE" in refusal(lambda: load(RunConfig, path))
    path.write_text("# nothing yet\n")
    assert load(RunConfig, path, RUN) == run()


def test_anchors_and_merges_of_a_recipe_work(tmp_path: Path) -> None:
    text = "data:\n  sources:\n    x: &web {path: p, weight: 2}\n    y: {<<: *web, weight: 3}\n    z: *web\n"
    (tmp_path / "mine.yaml").write_text(text)
    settings = ("run_dir=r", "train.steps=9", "train.global_batch=8", "data.sources.z.weight=9")
    sources = load(RunConfig, tmp_path / "mine.yaml", settings).data.sources
    assert {name: (source.path, source.weight) for name, source in sources.items()} == {
        "x": ("p", 2.0),
        "y": ("p", 3.0),
        "z": ("p", 9.0),
    }


def test_required_keys_are_asked_for() -> None:
    for schema in (RunConfig, BuildConfig):
        required = [known for known, _, item in known_keys(schema) if item.default == MISSING]
        assert f"{required[0]} is required" in refusal(lambda schema=schema: load(schema, None))


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("a.jsonl", "a.jsonl"),
        ("[a.jsonl, ~/b.jsonl, '$SCRATCH/c d.jsonl']", ["a.jsonl", "/home/me/b.jsonl", "/scratch/me/c d.jsonl"]),
        ("[s3://bucket/*.jsonl, 1]", ["s3://bucket/*.jsonl", "1"]),
        (" [a, b]", ["a", "b"]),
        ("[a]", "[a]"),
        ("[ab]*.jsonl", "[ab]*.jsonl"),
        ("[ab]/x-[cd]", "[ab]/x-[cd]"),
        ("[a, b", "[a, b"),
        ("{a,b}.jsonl", "{a,b}.jsonl"),
        ("null", "null"),
    ],
)
def test_a_key_of_text_or_a_list_takes_either(
    typed: str, path: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load(BuildConfig, None, [*BUILD, f"sources.a.path={typed}"])
    assert config.sources["a"].path == path
    assert config.sources["a"].paths == ([path] if isinstance(path, str) else path)
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    assert load(BuildConfig, tmp_path / "recipe.yaml") == config == from_dict(BuildConfig, to_dict(config))
    if isinstance(path, list):
        typed = typed if len(path) > 2 else f"[{path[0]!r}]"  # in a recipe there is no doubt
        path = path if len(path) > 2 else path[:1]
        (tmp_path / "recipe.yaml").write_text(
            f"{{sources: {{a: {{kind: jsonl, path: {typed}}}}}, out: o, tokenizer: t}}"
        )
        assert load(BuildConfig, tmp_path / "recipe.yaml").sources["a"].path == path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sources.a={kind: jsonl, path: []}"], "sources.a.path is an empty list; name a file"),
        (["sources.a.path=[a, ~]"], "sources.a.path.1 is null; expected text"),
        (["sources.a.path=[a, '$NOWHERE/x']"], "sources.a.path.1 is '$NOWHERE/x': there is no environment variable"),
        (["sources.a.path=[a, '']"], "sources.a.path.1 is empty; expected a path"),
        (["sources.a.path=[a, [b]]"], "sources.a.path.1 is a list; expected text"),
        (["sources.a.path=[a, {b: c}]"], "sources.a.path.1 is keys and values; expected text"),
        (
            ["sources.a={kind: jsonl, path: {b: c}}"],
            "path is keys and values; expected one of text, a list, such as [a",
        ),
        (["sources.a.path=[a, b]", "sources.a.path.2=c"], "sources.a.path has 2 entries, counted from 0"),
        (["sources.a.path=a", "sources.a.path.0=c"], "sources.a.path has 0 entries, counted from 0"),
        (["sources.a.path.b=c"], "unknown key sources.a.path.b"),
        (["out=s3://bucket/shards"], "out is s3://bucket/shards, a URL; expected a path on this machine"),
        (["tokenizer=hf://gpt2"], "tokenizer is hf://gpt2, a URL; expected a path on this machine"),
    ],
)
def test_a_list_of_paths_that_is_wrong_is_refused_with_its_entry(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    assert message in refusal(lambda: load(BuildConfig, None, [*BUILD, *overrides]))


def test_an_entry_of_a_list_of_paths_is_set_by_its_number() -> None:
    config = load(BuildConfig, None, [*BUILD, "sources.a.path=[a, b]", "sources.a.path.1=c"])
    assert config.sources["a"].path == ["a", "c"]

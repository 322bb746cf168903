"""Work with checkpoints and exported folders: `export`, `generate`, `trace` and the reference's format."""

from __future__ import annotations

import argparse
from typing import Any

from ponder_scale.errors import ConfigError
from ponder_scale.settings.commandline import flags, new_file, new_folder, number, path, whole


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    _add_export(commands)
    _add_reference(commands)
    _add_generate(commands)
    _add_trace(commands)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="convert a checkpoint to a Hugging Face folder")
    export.add_argument(
        "source",
        type=path,
        help="a run folder (its newest whole checkpoint), a checkpoint, or a DeepSpeed universal checkpoint",
    )
    export.add_argument("out", type=new_folder, help="folder to create")
    _add_format(export)
    export.add_argument(
        "--ema", action="store_true", help="export the running average of the weights instead of the weights"
    )
    export.add_argument(
        "--like",
        type=path,
        help="for a universal checkpoint: a folder with the config.json and the tokenizer that it lacks",
    )
    export.add_argument(
        "--verify", action="store_true", help="load the export in a fresh process and compare its outputs"
    )
    export.set_defaults(run=_export)


def _add_reference(commands: Any) -> None:
    imported = commands.add_parser(
        "import-reference", help="convert a model of the published PonderingLM code to this format"
    )
    imported.add_argument("source", type=path, help="folder with its config.json and weights")
    imported.add_argument("out", type=new_folder, help="folder to create")
    imported.add_argument(
        "--latent", action="store_true", help="these are weights of PonderLM-2, whose config.json does not say so"
    )
    _add_format(imported)
    imported.set_defaults(run=_import_reference)

    published = commands.add_parser(
        "export-reference", help="convert an exported folder to one that the published PonderingLM code loads"
    )
    published.add_argument("source", type=path, help="an exported folder")
    published.add_argument("out", type=new_folder, help="folder to create")
    published.set_defaults(run=_export_reference)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a prompt with an exported model")
    generate.add_argument("folder", type=path, help="an exported folder")
    generate.add_argument("--prompt", metavar="TEXT", help="text to continue (default: what standard input holds)")
    generate.add_argument(
        "--interactive", action="store_true", help="read prompts from standard input, one a line, and continue each"
    )
    generate.add_argument("--max-new-tokens", type=whole(1), default=64, help="tokens to generate (default: 64)")
    generate.add_argument("--pondering-steps", type=whole(0), help="number of pondering steps (default: as trained)")
    generate.add_argument(
        "--exit-kl",
        type=number(least=0),
        help="stop pondering a token when a pass changes its prediction by less than this KL divergence, in nats",
    )
    generate.add_argument(
        "--draft-steps",
        type=whole(0),
        help="draft tokens with this many pondering steps and check them with all; the text stays the same",
    )
    generate.add_argument(
        "--draft-heads",
        action="store_true",
        help="draft tokens with the extra heads of the model and check them; the text stays the same",
    )
    generate.add_argument(
        "--temperature", type=number(least=0), default=0.0, help="sampling temperature; 0 decodes greedily (default: 0)"
    )
    generate.add_argument(
        "--compile",
        dest="compiled",
        action="store_true",
        help="compile a decoding step; this takes a minute and pays for long texts",
    )
    generate.add_argument("--seed", type=whole(0), default=1, help="seed of the sampling (default: 1)")
    add_trust(generate)
    generate.set_defaults(run=_generate)


def _add_trace(commands: Any) -> None:
    trace = commands.add_parser("trace", help="show what each pass predicts for each token of a text")
    trace.add_argument("folder", type=path, help="an exported folder")
    trace.add_argument("--text", required=True, help="text to trace")
    trace.add_argument(
        "--pondering-steps",
        dest="steps",
        metavar="S",
        type=whole(0),
        help="number of pondering steps (default: as trained)",
    )
    trace.add_argument(
        "--html", dest="html_file", metavar="FILE", type=new_file, help="also write an HTML page with a heat map"
    )
    add_trust(trace)
    trace.set_defaults(run=_trace)


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add the flag that all commands which load an exported folder share."""
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code inside a folder that this version did not make; it runs with your rights, so read it first",
    )


def _add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the weights (default: float32)",
    )
    command.add_argument(
        "--license", dest="licence", help="license for the model card, by its identifier on the hub, such as apache-2.0"
    )


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.export.huggingface import export
    from ponder_scale.export.universal import export_universal, is_universal
    from ponder_scale.export.verify import verify_in_fresh_process

    source, out, like = options.source, options.out, options.like
    if is_universal(source) != (like is not None):
        said = (
            "--like is only for universal checkpoints, which this is not; give one, or leave --like out"
            if like
            else "a universal checkpoint needs --like; give a folder with the model's config.json and tokenizer"
        )
        raise ConfigError(f"{source}: {said}")
    kept: dict[str, Any] = {"dtype": options.dtype, "licence": options.licence}
    if like is None:
        export(source, out, average=options.ema, **kept)
    elif options.ema:
        raise ConfigError("--ema: a universal checkpoint holds no average of the weights")
    else:
        export_universal(source, out, like=like, **kept)
    if options.verify:
        verify_in_fresh_process(source, out, dtype=options.dtype, average=options.ema, like=like)


def _import_reference(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.export.reference import import_reference

    import_reference(**flags(options))


def _export_reference(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.export.reference import export_reference

    export_reference(**flags(options))


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.generate import generate

    generate(**flags(options))


def _trace(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.evaluate.trace import trace_folder

    trace_folder(**flags(options))

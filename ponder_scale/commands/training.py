"""`ponder-scale init`, `train` and `plan`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ponder_scale.config import RunConfig, load_recipe
from ponder_scale.errors import REWOUND, ConfigError
from ponder_scale.figures import span, stored
from ponder_scale.files.places import check_file, check_folder
from ponder_scale.files.shipped import RECIPES
from ponder_scale.files.write import write_whole
from ponder_scale.planning.failures import DEVICE_HOURS, Failures
from ponder_scale.planning.failures import report as failures_report
from ponder_scale.planning.hardware import TABLE, Hardware, read_hardware, write_hardware
from ponder_scale.settings.commandline import new_file, number, path, whole, wholes
from ponder_scale.shards.format import ShardSet, check_vocabulary, open_all
from ponder_scale.shards.manifest import MANIFEST


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    init = commands.add_parser("init", help="write a first recipe for your shards, with a comment on each key")
    init.add_argument("shards", type=path, nargs="+", metavar="SHARDS", help="folders that `ponder-data build` made")
    init.add_argument(
        "--out",
        type=new_file,
        default=Path("recipe.yaml"),
        metavar="FILE",
        help="file to create (default: recipe.yaml)",
    )
    init.add_argument("--run-dir", default="runs/first", help="folder of the run (default: runs/first)")
    init.add_argument("--pondering-steps", type=whole(0), default=3, help="pondering steps S (default: 3)")
    init.set_defaults(run=_init)

    train = commands.add_parser(
        "train", help="train a run; the same command resumes it from its newest whole checkpoint"
    )
    add_recipe(train)
    train.add_argument(
        "--nproc",
        type=whole(1),
        help="ranks to start on this machine (default: one for each GPU, or one); leave it out under a launcher",
    )
    train.set_defaults(run=_train)
    _add_plan(commands)


def add_recipe(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments for a recipe and its overrides to a command."""
    known = "a YAML file, or the name of a shipped recipe: " + ", ".join(
        sorted(path.stem for path in RECIPES.glob("*.yaml"))
    )
    command.add_argument("recipe", nargs="?" if optional else None, help=known)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="set keys, such as train.steps=1000")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="print memory, FLOPs and time of a run before you take a device")
    add_recipe(plan, optional=True)
    plan.add_argument(
        "--gpus",
        type=wholes(1),
        default=[8],
        metavar="N[,N...]",
        help="number of devices (default: 8); give several numbers to see how the run scales",
    )
    plan.add_argument("--gpus-per-node", type=whole(1), default=8, help="devices in each node (default: 8)")
    plan.add_argument("--gpu", choices=sorted(TABLE), default="h100", help="kind of device (default: h100)")
    plan.add_argument(
        "--hardware",
        type=path,
        metavar="FILE",
        help="use the figures that --calibrate measured, instead of --gpu",
    )
    plan.add_argument(
        "--calibrate",
        type=new_file,
        metavar="FILE",
        help="measure this machine in half a minute and write its figures to this file",
    )
    plan.add_argument(
        "--mfu",
        type=number(above=0, most=1),
        help="compute the time from this share of the peak FLOP/s, which your own runs have reached",
    )
    plan.add_argument(
        "--failures",
        nargs="?",
        type=number(above=0),
        const=DEVICE_HOURS,
        metavar="HOURS",
        help="also print how often to save and what failures cost, for this mean time between failures of one device "
        f"(default: {DEVICE_HOURS:,.0f} h, as published for Llama 3)",
    )
    plan.add_argument(
        "--save-seconds",
        type=number(above=0),
        default=60.0,
        help="with --failures: seconds for which a save stops training (default: 60)",
    )
    plan.add_argument(
        "--restart-seconds",
        type=number(above=0),
        default=900.0,
        help="with --failures: seconds from a failure to the next step (default: 900)",
    )
    plan.add_argument(
        "--serve",
        nargs="?",
        type=whole(1),
        const=1,
        metavar="DEVICES",
        help="also print the memory of a vLLM server with this many devices for one model (default: 1)",
    )
    plan.set_defaults(run=_plan)


def _init(options: argparse.Namespace, _: list[str]) -> None:
    from ponder_scale.planning.draft import draft, source_names

    if options.out.exists():
        raise ConfigError(f"--out {options.out} exists already; name another file")
    sources = open_all({name: str(folder) for name, folder in source_names(options.shards).items()}, "SHARDS")
    import torch

    gpu = torch.cuda.is_available()
    made = draft(sources, pondering_steps=options.pondering_steps, gpu=gpu, run_dir=options.run_dir)
    write_whole(options.out, made.text)
    print(f"{options.out}: {made.summary}")
    print(f"next: ponder-scale plan {options.out} --gpus {max(1, torch.cuda.device_count())}")
    print(f"      ponder-scale train {options.out}")


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load_recipe(options.recipe, options.overrides)
    from ponder_scale.train.launch import default_processes, launch
    from ponder_scale.train.survive.control import check_time_limit
    from ponder_scale.train.zero.deepspeed_config import check_ranks, shardings

    check_time_limit(config.train.time_limit)

    launched = "RANK" in os.environ
    if os.environ.get("RANK", "0") == "0":
        _check_run_dir(Path(config.run_dir))
    if not launched:
        _check_data(config)
    processes = options.nproc or (1 if launched else default_processes())
    if not launched and processes > 1:
        for sharding in shardings(config.train, config.optim).values():
            check_ranks(sharding, config.train, processes)
        return launch(arguments, processes)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without this DeepSpeed warns that it found no accelerator
    from ponder_scale.train.loop import train
    from ponder_scale.train.survive import signals

    code = train(config)
    if code == REWOUND:  # all ranks arrive here, so a fresh start can resume as any resumed run does
        signals.start_over()
    return code


def _plan(options: argparse.Namespace, _: list[str]) -> None:
    # argparse takes a recipe that follows a flag for an override, because the recipe is optional.
    recipe, *overrides = [*filter(None, (options.recipe,)), *options.overrides] or [None]
    if recipe is None and options.calibrate is None:
        options.parser.error("the following arguments are required: recipe")
    if options.calibrate is not None:
        _calibrate(options.calibrate)
    if recipe is None:
        return
    config = load_recipe(recipe, overrides)
    file = options.hardware or options.calibrate
    hardware = TABLE[options.gpu] if file is None else read_hardware(file)
    per_node = options.gpus_per_node
    if len(options.gpus) > 1:
        if options.failures is not None:
            raise ConfigError(
                f"--gpus is {','.join(map(str, options.gpus))} with --failures; give one number of devices"
            )
        print_scaling(config, options.gpus, per_node=per_node, hardware=hardware)
    else:
        ranks = options.gpus[0]
        work = print_plan(config, ranks, per_node=per_node, hardware=hardware, utilization=options.mfu)
        if options.failures is not None:
            failures = Failures(options.failures * 3600 / ranks, options.save_seconds, options.restart_seconds)
            print("\n".join(failures_report(failures, devices=ranks, work=work, steps=config.train.steps)))
    if options.serve is not None:
        print_serving(config, options.serve, hardware)


def _calibrate(file: Path) -> None:
    """Measure this machine, print the results and write them to a file."""
    from ponder_scale.planning.calibrate import calibrate

    hardware = calibrate()
    write_hardware(file, hardware)
    print("\n".join(calibration_lines(hardware)))
    print(f"written to {file}")


def check_run(config: RunConfig, ranks: int) -> None:
    """Raise for errors in a run that can be found before a device is used: in its time limit, data and batch sizes."""
    from ponder_scale.train.survive.control import check_time_limit
    from ponder_scale.train.zero.deepspeed_config import check_ranks, shardings

    check_time_limit(config.train.time_limit)
    _check_data(config)
    for sharding in shardings(config.train, config.optim).values():
        check_ranks(sharding, config.train, ranks)


def print_plan(
    config: RunConfig, ranks: int, *, hardware: Hardware, utilization: float | None = None, per_node: int = 8
) -> float:
    """Print what the run needs on `ranks` devices, and return the seconds that its steps take.

    Args:
        utilization: the share of peak FLOPs that the model uses. It replaces the planner's own estimate of the time.

    Raises:
        ConfigError: the devices do not fill whole nodes, or the batch does not divide evenly among them.
    """
    from ponder_scale.planning.auto import settle
    from ponder_scale.planning.plan import plan_run, report, settle_sharding, training_seconds
    from ponder_scale.train.zero.deepspeed_config import check_ranks, shardings

    devices, files = _devices(ranks, per_node, hardware), shardings(config.train, config.optim)
    for sharding in files.values():
        check_ranks(sharding, config.train, ranks)
    configuration = _configuration(config)
    config, said = settle(config, files, configuration, devices)
    sharding = settle_sharding(config, files[config.train.deepspeed], configuration, devices)
    plan = plan_run(config, sharding, configuration, devices)
    print("\n".join([*said, *report(plan, config, devices, utilization=utilization), *_epochs(config)]))
    return training_seconds(plan, devices, config.train.precision, utilization)


def print_scaling(config: RunConfig, numbers: list[int], *, per_node: int, hardware: Hardware) -> None:
    """Print how the run's time and cost grow with devices, under its own sharding and under ZeRO's stages.

    Raises:
        ConfigError: one of the numbers of devices does not fill whole nodes.
    """
    from ponder_scale.planning.scaling import scaling, scaling_lines
    from ponder_scale.train.zero.deepspeed_config import AUTO, shardings

    sizes = [_devices(ranks, per_node, hardware) for ranks in sorted(set(numbers))]
    files = shardings(config.train, config.optim)
    files |= shardings(replace(config.train, deepspeed=AUTO), config.optim)
    rows = scaling(config, files, _configuration(config), sizes)
    print("\n".join(scaling_lines(config, rows, sizes)))


def calibration_lines(hardware: Hardware) -> list[str]:
    """The measurements as lines to print."""
    peak, link = hardware.peak_flops, hardware.inside
    product = hardware.product_share * max(peak.values())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in hardware.vocabulary_share.items())
    rates = ", ".join(f"{kind} {stored(each)}/s" for kind, each in link.bytes_per_second.items())
    return [
        f"products       {product / 1e12:,.3g} TFLOP/s; each side counts as {hardware.product_edge:.0f} longer",
        f"vocabulary     of that peak: {shares}; attention {hardware.attention_share:.0%}",
        f"memory         {stored(hardware.memory_bytes_per_second)}/s, optimizer "
        f"{stored(hardware.optimizer_bytes_per_second)}/s, {span(hardware.call_seconds)} a call",
        f"links          {rates}; {span(link.start_seconds + link.hop_seconds)} a call",
    ]


def _devices(ranks: int, per_node: int, hardware: Hardware) -> Any:
    from ponder_scale.planning.plan import Devices

    in_a_node = min(per_node, ranks)
    if in_a_node < 1 or ranks % in_a_node:
        raise ConfigError(
            f"--gpus is {ranks}; expected a multiple of the {per_node} devices of a node (--gpus-per-node)"
        )
    return Devices(ranks, round(hardware.memory_bytes), in_a_node, hardware.asynchronous, hardware)


def _epochs(config: RunConfig) -> list[str]:
    """Lines that say how often the run reads each source, if its shards are on this machine."""
    from ponder_scale.planning.epochs import epoch_lines

    for name, source in config.data.sources.items():
        if not (Path(source.path) / MANIFEST).is_file():
            return [f"epochs         unknown: data.sources.{name}.path is {source.path}, which holds no shards"]
    return epoch_lines(config, open_data(config))


def print_serving(config: RunConfig, ranks: int, hardware: Hardware) -> None:
    """Print what a server of the model needs on `ranks` devices that share it. Raises the ConfigError of
    `plan_serving`.
    """
    from ponder_scale.planning.serving import plan_serving, report

    plan, memory = plan_serving(_configuration(config), ranks), hardware.memory_bytes
    print("\n".join(report(plan, config.data.seq_len, device=hardware.name, memory_bytes=memory)))


def _configuration(config: RunConfig) -> Any:
    """The configuration of a run's model. If the recipe gives no vocabulary size, takes that of the data."""
    from ponder_scale.setup.build import model_configuration

    vocab_size = config.model.vocab_size
    if vocab_size is None:
        vocab_size = max(shards.manifest.vocab_size for shards in open_data(config).values())
    return model_configuration(config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, eod_id=None)


def open_data(config: RunConfig) -> dict[str, ShardSet]:
    """The shards of each source of a run, by name. Raises ShardError and TokenizerError."""
    return open_all({name: source.path for name, source in config.data.sources.items()})


def _check_run_dir(run_dir: Path) -> None:
    """Raise ConfigError if the run's folder, or a file that an earlier run left in it, cannot be written."""
    check_folder(run_dir, "run_dir")
    for name in ("checkpoints", "heartbeat"):
        check_folder(run_dir / name, f"run_dir is {run_dir}: its {name}")
    for name in ("attempt", "attempts.jsonl", "config.yaml", "latest", "metrics.jsonl"):
        if os.path.lexists(run_dir / name):
            check_file(run_dir / name, f"run_dir is {run_dir}: its {name}")


def _check_data(config: RunConfig) -> None:
    """Raise if the shards are damaged or do not fit the model. Runs once, before slow work and not on every rank."""
    sources = open_data(config)
    if config.model.vocab_size is not None:
        check_vocabulary(sources, config.model.vocab_size)

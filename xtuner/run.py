"""The one command: `python -m xtuner.run train | plan | advise | generate | data | convert | info`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

# Before torch loads its OpenMP runtime: threads that spin between torch's parallel regions would take the cores that
# our own kernels run on next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from xtuner.config import DataConfig, TrainConfig, describe_fields, load_config  # noqa: E402
from xtuner.errors import (  # noqa: E402
    HANG_EXIT_CODE,
    OUT_OF_MEMORY_EXIT_CODE,
    ConfigError,
    OutOfMemoryError,
    XTunerError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. The user's mistakes end in one line on stderr, not in a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"] and {"-h", "--help"} & set(argv) and len(argv) > 2:
        argv = ["fields", *[a for a in argv[1:] if a not in ("-h", "--help")]]
    try:
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except OutOfMemoryError as e:
        print(f"error: {e}", file=sys.stderr)
        return OUT_OF_MEMORY_EXIT_CODE
    except XTunerError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m xtuner.run", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train. CONFIG is a .py file defining `config`, a .toml or .json file, or a recipe's name; "
        "`train --help CONFIG` lists every field.",
    )
    train.add_argument("config", metavar="CONFIG")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value")
    train.add_argument("--resume", choices=("auto", "no"), default="no", help="auto: go on from the newest checkpoint")
    train.add_argument("--nproc", type=int, default=1, help="processes on this node")
    train.add_argument("--nnodes", type=int, default=1, help="nodes of the run")
    train.add_argument("--rdzv", metavar="HOST:PORT", help="where the nodes meet; required with --nnodes > 1")
    train.add_argument(
        "--max-restarts", type=int, default=0, help="how often to go on from the newest checkpoint when a rank fails"
    )
    train.set_defaults(run=_train)

    fields = commands.add_parser("fields", help="list every field of a CONFIG with its type, value and meaning")
    fields.add_argument("config", metavar="CONFIG")
    fields.add_argument("overrides", nargs="*", metavar="key.sub=value")
    fields.set_defaults(run=_fields)

    generate = commands.add_parser("generate", help="sample from a Hugging Face directory")
    _lazy(generate, "xtuner.engine.generate")

    plan = commands.add_parser("plan", help="memory, traffic and speed of a run on a machine you need not have")
    _lazy(plan, "xtuner.plan.plan")

    advise = commands.add_parser("advise", help="what would save how much memory of a run that had not enough")
    _lazy(advise, "xtuner.plan.advise")

    data = commands.add_parser("data", help="show what the model will see of a data file")
    data.add_argument("files", nargs="+", type=Path, metavar="FILE")
    data.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer directory")
    data.add_argument("--samples", type=int, default=3, help="how many samples to print")
    data.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the data section")
    data.set_defaults(run=_data)

    convert = commands.add_parser("convert", help="turn a run's checkpoint into a Hugging Face directory")
    convert.add_argument("checkpoint", type=Path, help="a run directory (its newest checkpoint) or one checkpoint")
    convert.add_argument("out", type=Path, help="the directory to write")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    convert.set_defaults(run=_convert)

    info = commands.add_parser("info", help="versions, backends, instruction set, devices")
    info.set_defaults(run=_info)
    return parser


def _lazy(parser: argparse.ArgumentParser, module: str) -> None:
    """Let `module` (slow to import) define the arguments and the action, only when its command is the one typed."""
    if parser.prog.rsplit(" ", 1)[-1] not in sys.argv[1:2]:
        return
    import importlib

    implementation = importlib.import_module(module)
    implementation.add_arguments(parser)
    parser.set_defaults(run=implementation.main)


def _train(args: argparse.Namespace) -> int:
    loaded = load_config(args.config, args.overrides, TrainConfig)
    resume = args.resume == "auto"
    if "RANK" in os.environ or args.nproc == args.nnodes == 1:
        return _train_here(loaded.config, loaded.prepare, resume)
    return _launch(args, loaded.config)


def _train_here(config: TrainConfig, prepare, resume: bool) -> int:
    from xtuner.engine.out_of_memory import release
    from xtuner.engine.trainer import train

    try:
        summary = train(config, resume=resume, prepare=prepare)
    except OutOfMemoryError as e:
        if "RANK" not in os.environ:  # else the launcher does it, once for all ranks
            print(f"error: {e}", file=sys.stderr, flush=True)
            release(e)
            _advise(e.snapshot)
            return OUT_OF_MEMORY_EXIT_CODE
        raise
    if int(os.environ.get("RANK", 0)) == 0 and not summary["stopped"]:
        _print_samples(config)
    return 0


def _advise(snapshot: Path) -> None:
    """In a process of its own, which has the memory that the failed one had."""
    command = [sys.executable, "-m", "xtuner.run", "advise", str(snapshot)]
    subprocess.run(command)


def _print_samples(config: TrainConfig) -> None:
    if not (config.log.sample_prompts and config.checkpoint.export_hf):
        return
    from rich.console import Console
    from rich.text import Text

    from xtuner.engine.generate import Generator

    generator = Generator(config.run_dir / "hf")
    # Greedy text of a small model runs in circles.
    texts = generator.generate(list(config.log.sample_prompts), max_new_tokens=64, temperature=0.8, top_p=0.95)
    console = Console(highlight=False)
    for prompt, text in zip(config.log.sample_prompts, texts, strict=True):
        console.print(Text(prompt, style="dim") + Text(text))


def _launch(args: argparse.Namespace, config: TrainConfig) -> int:
    """Start workers of this same command with torch's elastic launcher and wait for them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from xtuner.engine.out_of_memory import snapshot_file
    from xtuner.engine.trainer import refuse_used_run_dir

    if args.nnodes > 1 and not args.rdzv:
        raise ConfigError(f"--nnodes={args.nnodes} needs --rdzv HOST:PORT, the same on every node")
    resume = args.resume
    if args.max_restarts and resume == "no":
        refuse_used_run_dir(config.run_dir)  # here, since a restarted worker finds its own run there
        resume = "auto"
    # The store that the launcher would share with its workers survives them, and after a restart they would look up in
    # it the addresses of the dead.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launch = LaunchConfig(
        min_nodes=args.nnodes,
        max_nodes=args.nnodes,
        nproc_per_node=args.nproc,
        run_id=str(config.run_dir),
        rdzv_backend="c10d",
        rdzv_endpoint=args.rdzv or "localhost:0",
        max_restarts=args.max_restarts,
        # On these the launcher would soon kill the workers; we forward them, and the workers save and exit.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _forward_to_workers)
    command = ["-u", "-m", "xtuner.run", "train", args.config, *args.overrides, "--resume", resume]
    try:
        elastic_launch(launch, sys.executable)(*command)
    except ChildFailedError as e:
        rank, failure = _first_cause(e.failures)
        if failure.exitcode < 0:
            print(f"error: rank {rank} (pid {failure.pid}) was killed by {failure.signal_name()}", file=sys.stderr)
            return 1
        print(f"error: rank {rank} ended with exit code {failure.exitcode}; its message is above", file=sys.stderr)
        if failure.exitcode == OUT_OF_MEMORY_EXIT_CODE:
            _advise(snapshot_file(config.run_dir, rank))
        return failure.exitcode
    return 0


def _first_cause(failures: dict):
    """The rank to blame: who found the run hanging or had no memory; else who was killed; else who failed; else whom
    we ended."""

    def order(item) -> int:
        code = item[1].exitcode
        if code in (HANG_EXIT_CODE, OUT_OF_MEMORY_EXIT_CODE):
            return 0
        return 3 if code == -signal.SIGTERM else 1 if code < 0 else 2

    return min(failures.items(), key=order)


def _forward_to_workers(number: int, frame: FrameType | None) -> None:
    import psutil

    for worker in psutil.Process().children():
        worker.send_signal(number)


def _fields(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("field", "type", "value", "meaning")
    for row in describe_fields(load_config(args.config, args.overrides, TrainConfig).config):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def _data(args: argparse.Namespace) -> None:
    values = {}
    for text in args.set:
        name, _, value = text.partition("=")
        values[name] = value
    from xtuner.data import preview

    preview(args.files, DataConfig.parse(values), args.tokenizer, num_samples=args.samples)


def _convert(args: argparse.Namespace) -> None:
    from xtuner.engine.convert import convert

    convert(args.checkpoint, args.out, args.dtype)


def _info(args: argparse.Namespace) -> None:
    from xtuner.engine.info import print_info

    print_info()


if __name__ == "__main__":
    sys.exit(main())

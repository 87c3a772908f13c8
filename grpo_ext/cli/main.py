"""Entry point of the `grpo-ext` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from grpo_ext.cli.convert import SettingsError

#: Modules of the package's extra ``train``, which the command needs.
EXTRAS = (
    "accelerate",
    "datasets",
    "matplotlib",
    "peft",
    "psutil",
    "rich",
    "tensorboard",
    "transformers",
    "yaml",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="grpo-ext",
        description="Train language models by GRPO through compiled losses.",
        epilog="Idle CPU threads sleep by default (OMP_WAIT_POLICY=PASSIVE), so that processes can share cores. "
        "OMP_WAIT_POLICY=ACTIVE makes them spin.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser(
        "train",
        help="train a run described by a YAML file",
        usage="grpo-ext train CONFIG.yaml [--field value ...]",
        description="Set any field of the file or of GRPOConfig with --field value or --field=value, "
        "and a field of a section with --lora.r 8.",
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="the run's settings")
    train.add_argument("fields", nargs=argparse.REMAINDER, help="--field value, overriding the file")

    evaluate = commands.add_parser("eval", help="measure a finished run on its held-out questions")
    evaluate.add_argument("run", metavar="RUN", help="a run folder")
    evaluate.add_argument("--samples", type=_positive, help="answers per question (default: as in training)")
    evaluate.add_argument("--seed", type=int, help="seed of the sampling (default: the run's)")

    plot = commands.add_parser("plot", help="draw a run's reward curve, or compare runs in one HTML file")
    plot.add_argument("runs", metavar="RUN", nargs="+", help="run folders; several are compared")
    plot.add_argument("--output", metavar="FILE", help="PNG for one run, HTML for several (with a PNG)")

    bench = commands.add_parser(
        "bench",
        help="measure this machine: the loss, the fused head, a training step",
        usage="grpo-ext bench row|linear|training|all [options] [-- arguments of the module]",
        allow_abbrev=False,
    )
    bench.add_argument("subject", choices=("row", "linear", "training", "all"))
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if torch sees one")
    bench.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    bench.add_argument(
        "--output", default="bench-results", metavar="FOLDER", help="folder for the CSV, PNG and log files"
    )
    bench.add_argument("--quick", action="store_true", help="small shapes, to try the command")

    commands.add_parser("info", help="print the build, the machine and the versions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; None = ``sys.argv[1:]``.

    Returns:
        The exit status: 0 on success, 2 on wrong settings (message on standard error), 130 after Ctrl-C.
    """
    try:
        own, extra = _split(sys.argv[1:] if argv is None else list(argv))
        _run(build_parser().parse_args(own), extra)
    except SettingsError as error:
        print(f"grpo-ext{_process()}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        print(f"grpo-ext{_process()}: error: {error}; install it with: pip install 'grpo-ext[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("\n".join([f"grpo-ext{_process()}: stopped", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 130
    return 0


def _process() -> str:
    """Label for errors of ranks above 0: each rank prints its own, since torchrun stops all at the first error."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank})"


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of `bench` at ``--``; the second part goes to the measuring module."""
    if argv[:1] != ["bench"] or "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _run(arguments: argparse.Namespace, extra: Sequence[str]) -> None:
    # Import per command, so that --help does not load transformers.
    if arguments.command == "train":
        from grpo_ext.cli.train import final_line, train_command

        summary = train_command(arguments.config, arguments.fields)
        if summary:  # the main process
            print(final_line(summary))
    elif arguments.command == "eval":
        from grpo_ext.cli.eval import eval_command

        report = eval_command(arguments.run, arguments.samples, arguments.seed)
        constant = report["best_constant_reward"]
        print(
            f"held-out reward {report['heldout_reward']:.2f} ± {report['stderr']:.2f} "
            f"({report['questions']} questions, {report['samples']} samples each"
            + (")" if constant is None else f"; best constant answer {constant:.2f})")
        )
    elif arguments.command == "plot":
        from grpo_ext.cli.plot import plot_run

        if len(arguments.runs) == 1 and not (arguments.output or "").endswith((".html", ".htm")):
            print(plot_run(arguments.runs[0], arguments.output))
        else:
            from grpo_ext.cli.compare import compare_runs

            print("\n".join(compare_runs(arguments.runs, arguments.output or "comparison.html")))
    elif arguments.command == "bench":
        from grpo_ext.cli.bench import bench_command

        bench_command(
            arguments.subject,
            device=arguments.device,
            threads=arguments.threads,
            output=arguments.output,
            quick=arguments.quick,
            extra=extra,
        )
    else:
        from grpo_ext.cli.info import print_info

        print_info()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())

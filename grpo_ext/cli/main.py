"""Entry point of the `grpo-ext` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from grpo_ext.cli.convert import SettingsError

#: What the command needs beyond the losses: the extra ``train`` of the package.
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
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="grpo-ext",
        description="Train language models by GRPO through compiled losses.",
        epilog="Idle CPU threads sleep (OMP_WAIT_POLICY=PASSIVE), which shared cores need; OMP_WAIT_POLICY=ACTIVE lets "
        "them spin.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser(
        "train",
        help="train what a YAML file describes",
        usage="grpo-ext train CONFIG.yaml [--field value ...]",
        description="Any field of the file and of GRPOConfig can be given as --field value or --field=value, "
        "a field of a section as --lora.r 8.",
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="the run's settings")
    train.add_argument("fields", nargs=argparse.REMAINDER, help="--field value, over the file's")

    evaluate = commands.add_parser("eval", help="measure a finished run on its held-out questions")
    evaluate.add_argument("run", metavar="RUN", help="a run folder")
    evaluate.add_argument("--samples", type=_positive, help="answers per question (default: as in training)")
    evaluate.add_argument("--seed", type=int, help="of the sampling (default: the run's)")

    plot = commands.add_parser("plot", help="draw a run's reward curve, or compare runs in one HTML file")
    plot.add_argument("runs", metavar="RUN", nargs="+", help="run folders; several are compared")
    plot.add_argument("--output", metavar="FILE", help="PNG of one run, HTML of several (the PNG beside it)")

    bench = commands.add_parser(
        "bench",
        help="measure this machine: the loss, the fused head, a training step",
        usage="grpo-ext bench row|linear|training|all [options] [-- arguments of the script]",
        allow_abbrev=False,
    )
    bench.add_argument("subject", choices=("row", "linear", "training", "all"))
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where torch sees one")
    bench.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    bench.add_argument("--output", default="bench-results", metavar="FOLDER", help="of the CSV, PNG and log files")
    bench.add_argument("--quick", action="store_true", help="small shapes: tries the command, measures little")

    commands.add_parser("info", help="print what this build holds and the versions in use")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, None = those of the process.

    Returns:
        The exit status: 0, 2 when the request was wrong (the message is on standard error), or 130 after Ctrl-C.
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
    """Which process an error is of, where there are several: torchrun ends the others at the first, so all speak."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (process {rank})"


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of `bench`, and what stands behind ``--``: for the measuring script."""
    if argv[:1] != ["bench"] or "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _run(arguments: argparse.Namespace, extra: Sequence[str]) -> None:
    # Each command imports its own needs: --help does not wait for transformers.
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

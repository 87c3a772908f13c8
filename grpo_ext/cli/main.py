"""Entry point of the `grpo-ext` command."""

from __future__ import annotations

import argparse
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

    plot = commands.add_parser("plot", help="draw a run's reward curve as a PNG")
    plot.add_argument("run", metavar="RUN", help="a run folder")
    plot.add_argument("--output", metavar="FILE.png", help="where to (default: reward.png in the run folder)")

    commands.add_parser("info", help="print what this build holds and the versions in use")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, None = those of the process.

    Returns:
        The exit status: 0, or 2 when the request was wrong (the message is on standard error).
    """
    try:
        _run(build_parser().parse_args(argv))
    except SettingsError as error:
        print(f"grpo-ext: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        print(f"grpo-ext: error: {error}; install it with: pip install 'grpo-ext[train]'", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    # Each command imports its own needs: --help does not wait for transformers.
    if arguments.command == "train":
        from grpo_ext.cli.train import final_line, train_command

        print(final_line(train_command(arguments.config, arguments.fields)))
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

        print(plot_run(arguments.run, arguments.output))
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

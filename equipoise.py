"""The command line: `equipoise train|mine|evaluate CONFIG [key=value ...]`. Parses first, imports torch later."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# job -> (module that holds the config class, class, module that holds the function of the same command)
TRAINING = {
    "rl": ("rl.config", "RLConfig", "rl.train"),
    "mbpo": ("offline.config", "MBPOConfig", "offline.hybrid"),
    "preference": ("offline.config", "PreferenceConfig", "offline.train"),
}
JOBS = {
    "train": TRAINING | {"compare": ("offline.config", "CompareConfig", "offline.compare")},
    "mine": {"mine": ("offline.config", "MineConfig", "offline.mine")},
    "evaluate": {job: (module, name, "rl.session") for job, (module, name, _) in TRAINING.items()},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="equipoise", description="Train vision-language models to answer from what they see."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("train", "train with the method the config names (job: rl, mbpo, preference or compare)"),
        ("mine", "mine hard-negative preference pairs (job: mine); run again to resume"),
        ("evaluate", "answer the held-out suites of a training config and print accuracies"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("config", type=Path, help="a YAML file, see configs/")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=1 learner.zero_stage=2")
        command.add_argument("--dry-run", action="store_true", help="check config, data and placement only")
        if name == "train":
            command.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    options, rest = parser.parse_known_args(arguments)  # overrides may stand behind options too
    if unknown := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(options)
    except (ValueError, OSError) as error:  # what a user can mend (a time-out is an OSError too): no traceback
        print(f"equipoise: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("equipoise: interrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from rl.config import load
    from rl.session import prepare

    logging.disable_progress_bar()  # a bar per loaded model buries what the run says

    jobs = JOBS[options.command]
    kinds = {job: getattr(importlib.import_module(module), name) for job, (module, name, _) in jobs.items()}
    config = load(options.config, options.overrides, kinds)
    prepare(config.prepare)
    module = jobs[config.job][2]
    if options.dry_run:
        from offline.check import check

        check(config)
    elif options.command == "evaluate":
        importlib.import_module(module).evaluate_only(config)
    elif options.command == "mine":
        importlib.import_module(module).mine(config)
    else:
        summary = importlib.import_module(module).train(config, resume=options.resume)
        return 143 if summary.stopped_at else 0
    return 0


def interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

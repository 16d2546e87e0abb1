"""The demo's comparison over several seeds, as the table of docs/results.md: `python benchmarks/demo_seeds.py 0 1 2`.

A seed decides which prompts and pairs make a step and what is sampled; base model, data and mined pairs are the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from offline.compare import train
from offline.config import CompareConfig
from rl.config import load
from rl.session import prepare

RESULTS = Path("docs/results.md")
SUITES = ("neutral", "typical", "counterfactual")


def main(seeds: list[int]) -> None:
    demo = load(Path("configs/demo.yaml"), [], {"compare": CompareConfig})
    prepare(demo.prepare)
    summaries = []
    for seed in seeds:
        config = replace(demo, name=f"demo_seeds/{seed}", seed=seed)
        if train(config).stopped_at is not None:
            sys.exit("interrupted")
        summaries.append(json.loads((config.output_dir / config.name / "summary.json").read_text()))
    RESULTS.write_text(page(summaries, seeds))
    print(RESULTS.read_text())


def page(summaries: list[dict[str, Any]], seeds: list[int]) -> str:
    """The results as Markdown: accuracy in percent, mean and standard deviation over the seeds."""
    lines = [
        "# Results of the demo",
        "",
        f"Held-out accuracy in percent, mean ± standard deviation over seeds {', '.join(map(str, seeds))}, "
        f"{summaries[0]['base']['n']['neutral']} questions per suite.",
        f"Made by `python benchmarks/demo_seeds.py {' '.join(map(str, seeds))}`.",
        "",
        "| | " + " | ".join(SUITES) + " | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in summaries[0]:
        cells = [spread([100 * summary[name][suite] for summary in summaries]) for suite in SUITES]
        seconds = "" if name == "base" else spread([sum(summary[name]["seconds"].values()) for summary in summaries])
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(set(values)) > 1 else f"{values[0]:.1f}"


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])

"""Write the data sets of the colored-digits world: `python -m examples.colored_digits --out data/colored_digits`."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.colored_digits.world import RECIPES, write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/colored_digits"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    written = write(options.out, options.seed)
    rows = ", ".join(f"{recipe.num_rows} {name}" for name, recipe in RECIPES.items())
    print(f"{options.out} {'now holds' if written else 'already held'} {rows}")

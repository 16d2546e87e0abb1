"""The house rules that a reader relies on: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "rollout": [],
    "rewards": ["rollout"],
    "rl": ["rewards", "rollout"],
    "offline": ["rl", "rewards", "rollout"],
}
ONLY_IN = {
    "vllm": ["rollout/vllm_engine.py"],
    "ray": ["rl/cluster.py"],
    "deepspeed": ["rl/deepspeed_backend.py"],
    "torchattacks": ["offline/negatives.py"],
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level packages a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import; write the whole name"
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = sorted(imports(path) & ({*MAY_IMPORT, "equipoise", "examples", "tests"} - {package, *MAY_IMPORT[package]}))
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: {package} may import only {MAY_IMPORT[package]}"
    for library, owners in ONLY_IN.items():
        allowed = str(path.relative_to(ROOT)) in owners
        assert allowed or library not in imports(path), f"{path.relative_to(ROOT)} imports {library}; only {owners} may"


def test_rewards_know_only_the_nouns() -> None:
    for path in sorted((ROOT / "rewards").glob("*.py")):
        modules = {
            n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module
        }
        used = {module for module in modules if module.startswith("rollout")}
        assert used <= {"rollout.types"}, f"{path.name} imports {sorted(used)}: rewards may import only rollout.types"


def loaded_by(statement: str, *libraries: str) -> list[str]:
    """Which libraries a fresh Python has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*[name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_importing_the_packages_starts_nothing_heavy() -> None:
    modules = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in FILES]
    light = [m.removesuffix(".__init__") for m in modules if m not in {"rl.cluster", "rl.deepspeed_backend"}]
    assert loaded_by("import " + ", ".join(light), "ray", "vllm", "deepspeed") == []


def test_help_and_rewards_do_not_wait_for_torch() -> None:
    assert loaded_by("import equipoise, rewards", "torch", "transformers") == []

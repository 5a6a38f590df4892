"""What may import what, how long a script may be, and what its --help may cost."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SCRIPTS = ("train", "train_classifier", "eval_beta_grid", "eval_beta_single", "plot_eval")
WINGS = ("utils.training", "utils.evaluation", "utils.plane", "utils.benchmark")
ABOVE = ("utils.plane", "utils.benchmark")  # these show and measure what the other wings do
LEAVES = ("utils.errors", "utils.seeds", "utils.files", "utils.locks")
HEAVY = {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "bokeh", "tensorboard", "joblib"}
MODULES = [p.relative_to(ROOT) for d in ("datasets", "models", "utils") for p in (ROOT / d).rglob("*.py")]


def room(module: str) -> tuple[int, str]:
    """Where a module lies: its floor, 0 being the lowest, and its room there."""
    if module in SCRIPTS:
        return 4, module
    for wing in WINGS:
        if module == wing or module.startswith(wing + "."):
            return 3, wing
    if module in LEAVES:
        return 0, "leaves"
    folder = module.split(".")[0]
    return (2, "ground") if folder == "utils" else (1, folder)


def imported(path: Path, module: str) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    names, package = set(), module.rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, [package, node.module])) if node.level else node.module
            for name in (f"{source}.{alias.name}" for alias in node.names):
                names.add(name if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() else source)
    return {n for n in names if n.split(".")[0] in (*SCRIPTS, "datasets", "models", "utils")}


def test_imports_go_down():
    for path in [*MODULES, *(Path(f"{s}.py") for s in SCRIPTS)]:
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        floor, here = room(module)
        for other in imported(path, module):
            below, there = room(other)
            allowed = there == here if below == floor else below < floor
            allowed |= here in ABOVE and below == 3 and there != "utils.benchmark"
            assert allowed, f"{module} imports {other}"


def test_scripts_are_short_and_their_help_imports_little():
    for script in SCRIPTS:
        assert len((ROOT / f"{script}.py").read_text().splitlines()) < 150
        code = f"import sys, {script}\nprint(*sys.modules)\nsys.argv = ['x', '--help']\n"
        code += f"try: {script}.main()\nexcept SystemExit: print(*sys.modules)"
        out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
        at_import, *usage, at_help = out.splitlines()
        assert usage[0].startswith("usage:") and not HEAVY & set(at_help.split()), script
        assert not {"numpy", "PIL"} & set(at_import.split()), script


def test_an_init_file_holds_no_code():
    for path in (path for path in MODULES if path.name == "__init__.py"):
        body = ast.parse((ROOT / path).read_text()).body
        assert all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body), path

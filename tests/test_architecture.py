"""The rules of the house, read off the syntax tree of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "retrace"
FILES = sorted(SOURCE.rglob("*.py"))
PAPERS = sorted(path.name for path in (SOURCE / "papers").iterdir() if (path / "__init__.py").exists())

# Layer 0 answers at once on a login node: no torch, also not through what it imports.
LAYER_0 = {
    "cli", "core.boards", "core.claims", "core.completion", "core.compose", "core.config", "core.cost",
    "core.dashboard", "core.discovery", "core.doctor", "core.figures", "core.files", "core.identity", "core.launch",
    "core.memo", "core.memory", "core.mirrors", "core.outlook", "core.pages", "core.paper",
    "core.plan", "core.planview", "core.power", "core.progress", "core.provenance", "core.publish",
    "core.record", "core.report", "core.reportfigures", "core.reportruns", "core.reportview", "core.results",
    "core.samplefigure", "core.samples", "core.scales", "core.slurm", "core.slurmjob", "core.snapshot", "core.squeue",
    "core.stats", "core.statusview", "core.store", "core.svg", "core.sweep", "core.tasks", "core.texts",
    "core.tracking", "core.units", "core.upload", "core.verdictfigures", "core.verdicts", "usage",
}  # fmt: skip
HOMES = {
    "hydra": ("core.compose",), "wandb": ("core.mirrors", "core.upload"), "lm_eval": ("core.evaluate", "plugin"),
    "peft": ("papers.quietstar.lora",), "submitit": ("core.slurm", "core.slurmjob"),
    "trackio": ("core.mirrors",), "wandb_workspaces": ("core.boards", "core.upload"),
}  # fmt: skip
PURE = {
    "core.pages",
    "core.report",
    "core.reportfigures",
    "core.reportruns",
    "core.reportview",
    "core.samplefigure",
    "core.scales",
    "core.verdictfigures",
    "core.claims",
    "core.verdicts",
    "core.samples",
    "core.stats",
    "core.figures",
    "core.svg",
}


def name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Every module that a file imports, in full; what only a type checker reads is left out."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden.update(child for statement in node.body for child in ast.walk(statement))
        if top_level_only and isinstance(node, ast.FunctionDef):
            hidden.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_core_knows_no_paper_and_papers_know_no_other_paper(path: Path) -> None:
    used = set(imports(path))
    if name(path).startswith("core."):
        assert not {u for u in used if u.startswith(("retrace.papers", "retrace.cli", "retrace.worker"))}
        words = path.read_text().lower()
        assert not [slug for slug in PAPERS if slug in words]
    if name(path).startswith("papers."):
        own = name(path).split(".")[1]
        foreign = [slug for slug in PAPERS if slug != own]
        assert not {u for u in used for slug in foreign if u.startswith(f"retrace.papers.{slug}")}
        assert not {u for u in used if u.startswith(("retrace.cli", "retrace.worker"))}
    assert not {u for u in used if u.split(".")[0] in {"scripts", "benchmarks", "tests"}}


@pytest.mark.parametrize("module", sorted(LAYER_0))
def test_layer_0_reaches_no_torch_at_import(module: str) -> None:
    heavy = {"torch", "accelerate", "transformers", "datasets", "lm_eval", "wandb", "wandb_workspaces", "trackio"}
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        path = SOURCE / (current.replace(".", "/") + ".py")
        if current in seen or not path.exists():
            continue
        seen.add(current)
        for used in imports(path, top_level_only=True):
            assert used.split(".")[0] not in heavy, f"{module} reaches {used} through {current}"
            if used.startswith("retrace."):
                todo.append(used.removeprefix("retrace."))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_outside_libraries_have_one_home_each(path: Path) -> None:
    """lm_eval has a second: what makes our models known to its command line runs in the midst of other imports."""
    for library, homes in HOMES.items():
        if name(path) not in homes:
            assert library not in {used.split(".")[0] for used in imports(path)}, f"only {homes} import {library}"


def test_report_claims_and_stats_use_no_network_and_no_clock() -> None:
    for path in FILES:
        if name(path) in PURE:
            used = {u.split(".")[0] for u in imports(path)}
            assert not used & {"time", "socket", "urllib", "requests", "http", "subprocess"}
            assert "now(" not in path.read_text().replace("def now(", "")


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
LOADERS = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "eval", "exec"}


def unsafe(source: str) -> list[str]:
    """What in a file may run code that comes with data: unpickling, and what transformers is allowed to."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in PICKLES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in LOADERS or called.endswith((".from_pretrained", ".read_pickle")):
                found.append(called)
            for word in node.keywords:
                allowed = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in ("trust_remote_code", "allow_pickle") and not allowed:
                    found.append(f"{called}({word.arg})")
    return found


def test_nothing_is_unpickled_and_code_of_models_is_not_run() -> None:
    """What transformers loads goes through core/weights.py, and data is read by the libraries' own safe readers."""
    files = [*FILES, *(ROOT / "scripts").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text()) for path in files}
    assert {path: calls for path, calls in found.items() if calls} == {
        "src/retrace/core/weights.py": ["kind.from_pretrained"]
    }


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(x)", "np.load(f, allow_pickle=True)", "eval(text)",
     "AutoModel.from_pretrained(x)", "load(x, trust_remote_code=asked)", "load_dataset(x, trust_remote_code=1)"],
)  # fmt: skip
def test_the_search_for_unsafe_calls_finds_each_of_them(line: str) -> None:
    assert unsafe(line)


def test_configs_hold_data_only() -> None:
    files = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml"}
    assert not [path for path in files if "_target_" in path.read_text()]


def test_code_is_ascii_and_files_stay_small() -> None:
    for path in FILES:
        assert path.read_text().isascii(), name(path)
        assert len(path.read_text().splitlines()) <= 320, f"{name(path)}: look for the second thing in it"

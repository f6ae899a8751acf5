"""The repository itself: its shape, its imports, and what its README promises."""

import ast
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from config import Config
from prepare import AUDIO_SUFFIXES, FOREIGN_SUFFIXES

REPO = Path(__file__).resolve().parents[1]
MODULES = ("config", "prepare", "model", "train", "inference")
TOP_LEVEL = {
    *(f"{name}.py" for name in MODULES),
    "requirements.txt",
    "README.md",
    "LICENSE",
    "assets",
    "tests",
}


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git knows, relative to the repository."""
    git = shutil.which("git")
    if git is None or not (REPO / ".git").exists():
        pytest.skip("no git repository")
    result = subprocess.run([git, "ls-files", "-z"], cwd=REPO, check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"git: {result.stderr}")
    return tuple(Path(name) for name in result.stdout.split("\0") if name)


@cache
def tree(name: str) -> ast.Module:
    """The syntax of a script."""
    return ast.parse((REPO / f"{name}.py").read_text(encoding="utf-8"))


def readme() -> str:
    """The README."""
    return (REPO / "README.md").read_text(encoding="utf-8")


# ---- files ----------------------------------------------------------------------------------------------


def test_top_level_is_exactly_this() -> None:
    """Five scripts and what goes with them; dotfiles are free."""
    assert {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")} == TOP_LEVEL


def test_no_audio_is_tracked() -> None:
    """The corpora are licensed for research only; tests/cases holds broken scraps of synthetic tones."""
    audio = [path for path in tracked() if path.suffix.lower() in AUDIO_SUFFIXES | FOREIGN_SUFFIXES]
    cases = [path for path in audio if path.parent == Path("tests/cases")]
    assert audio == cases
    assert all((REPO / path).stat().st_size <= 2048 for path in cases)


def test_nothing_made_by_the_scripts_is_tracked() -> None:
    """Submissions, caches, runs and models stay where they were made, all but the one that is bundled."""
    made = [path for path in tracked() if path.suffix in {".pth", ".f32"} or path.name == "submission.csv"]
    assert made == [Path("assets/pretrained.pth")]


def test_no_path_of_a_home_is_tracked() -> None:
    """It would work on one machine only."""
    home = re.compile(r"(/" + r"home|/" + r"Users|[A-Z]:\\Users)[/\\]\w+|/" + r"root/")
    for path in tracked():
        try:
            text = (REPO / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a picture, or removed but not yet committed
        assert not home.search(text), path


def test_requirements_are_bounded_on_both_sides() -> None:
    """Below by what is needed, above by what was tested."""
    lines = (REPO / "requirements.txt").read_text().splitlines()
    lines += (REPO / "tests" / "requirements.txt").read_text().splitlines()
    names = [line.partition("#")[0].strip() for line in lines]
    bounded = re.compile(r"[\w-]+>=\d+(\.\d+)*,<=?\d+(\.\d+)*")
    loose = [name for name in names if name and not name.startswith("-r ") and not bounded.fullmatch(name)]
    assert not loose


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    """Module, classes, functions and methods."""
    nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    public = [node for node in nodes if not node.name.startswith("_")]
    assert ast.get_docstring(tree(name))
    assert not [node.name for node in public if not is_nested(node, nodes) and not ast.get_docstring(node)]


def is_nested(node: ast.AST, nodes: list[ast.ClassDef | ast.FunctionDef]) -> bool:
    """Whether a function is local to another."""
    functions = [outer for outer in nodes if isinstance(outer, ast.FunctionDef) and outer is not node]
    return any(node in ast.walk(outer) for outer in functions)


# ---- imports --------------------------------------------------------------------------------------------


def imported(name: str) -> set[str]:
    """The top-level modules that a script imports, at its head or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert all(alias.name != "*" for alias in node.names)
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("config", set()),
        ("prepare", {"config"}),
        ("model", {"config"}),
        ("train", {"config", "prepare", "model"}),
        ("inference", {"config", "prepare", "model"}),
    ],
)
def test_import_graph(name: str, allowed: set[str]) -> None:
    """Data and network know nothing of each other, and inference nothing of training."""
    assert imported(name) & set(MODULES) == allowed


def test_config_needs_the_standard_library_alone() -> None:
    """So that --help is instant."""
    assert imported("config") <= sys.stdlib_module_names


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_required_packages(name: str) -> None:
    """No heavy library of the tests', and none that requirements.txt forgets, plotting included."""
    required = set(re.findall(r"^[\w-]+", (REPO / "requirements.txt").read_text(), re.MULTILINE))
    assert not required & {"librosa", "scikit-learn", "pandas", "scipy"}
    assert imported(name) <= sys.stdlib_module_names | required | set(MODULES)


PROBE = """
import random, sys

import numpy as np
import torch

def state():
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    return generators, torch.get_num_threads()

before = state()
module = __import__(sys.argv[1])
assert state() == before, "random state or threads"
assert module.__file__.startswith(sys.argv[2]), module.__file__
"""


@pytest.mark.parametrize("name", MODULES)
def test_import_does_nothing_else(name: str, tmp_path: Path) -> None:
    """Nothing is printed, written, seeded or configured."""
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, name, str(REPO)],
        cwd=tmp_path / "empty",
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path / "empty")},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list((tmp_path / "empty").iterdir())


# ---- README ---------------------------------------------------------------------------------------------


def test_flags_in_the_readme_exist() -> None:
    """Whether in a command or in a sentence."""
    known = {f"--{field.name}" for field in fields(Config)} | {"--help"}
    known |= {f"--no-{field.name}" for field in fields(Config) if field.type is bool}
    known |= set(re.findall(r'add_argument\("(--\w+)"', (REPO / "tests" / "benchmark.py").read_text()))
    known |= {"--nproc_per_node"}  # torchrun's
    text = re.sub(r"<!--.*?-->", "", readme(), flags=re.DOTALL)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert mentioned
    assert not mentioned - known


def test_commands_in_the_readme_exist() -> None:
    """Every `python x.py` names a file of the repository, every `-m` a tool of the tests."""
    scripts = set(re.findall(r"\bpython3? ([\w./]+\.py)", readme()))
    assert {"train.py", "inference.py"} <= scripts
    assert not [script for script in scripts if not (REPO / script).is_file()]
    assert set(re.findall(r"\bpython3? -m (\w+)", readme())) <= {"venv", "pytest", "pip"}


def test_links_in_the_readme_lead_somewhere() -> None:
    """Pictures and files."""
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", readme())
    assert links
    assert not [link for link in links if not (REPO / link).exists()]


def test_settings_in_the_readme_are_settings() -> None:
    """Each `name: type = value` is a field of that type."""
    edits = re.findall(r"`(\w+): (int|float|str|bool) = [^`]*`", readme())
    types = {field.name: field.type for field in fields(Config)}
    assert edits
    assert not [name for name, kind in edits if getattr(types.get(name), "__name__", None) != kind]


@pytest.mark.parametrize("mark", ["run", "test"])
def test_gate_runs_the_commands_of_the_readme(mark: str) -> None:
    """Literally, so that they are known to work."""
    blocks = re.findall(rf"^<!-- ci: {mark} -->\n```bash\n(.*?)\n```$", readme(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    gate = (REPO / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\n{blocks[0]}\n" in gate


def test_readme_has_no_placeholder() -> None:
    """Such as a number still to be measured."""
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX|RESULTS(?:_TABLE)?|MINUTES|SECONDS)\b", readme())


def test_table_of_faults_names_tests_that_exist() -> None:
    """Whole names, or their beginnings before three dots, or their ends after three."""
    text = (REPO / "tests" / "README.md").read_text(encoding="utf-8")
    programs = "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").glob("test_*.py"))
    defined = re.findall(r"^def (test_\w+)", programs, re.MULTILINE)
    names = re.findall(r"`((?:test|\.\.\.)_\w+(?:\.\.\.)?)`", text)
    assert len(names) > 60
    for name in names:
        pattern = name.replace("...", ".*")
        assert any(re.fullmatch(pattern, other) for other in defined), name


@pytest.mark.parametrize(
    "arguments",
    ["--datadir speech", "--target 0.7", "--repeats 0", "--original --demo --holdout_fraction 0"],
)
def test_benchmark_refuses_what_it_cannot_measure(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not after an hour, nor with figures of the demo corpus for those of a misspelt folder."""
    benchmark = pytest.importorskip("tests.benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2

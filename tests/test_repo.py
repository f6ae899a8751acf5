"""The repository itself: its shape, its packages, and the two commands of its README."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import requires
from pathlib import Path

import pytest

from prepare import AUDIO_SUFFIXES
from tests.conftest import ROOT

SCRIPTS = ("config", "prepare", "model", "train", "inference")
OTHERS = {"requirements.txt", "README.md", "LICENSE", "assets", "tests"}


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git knows and that are there, relative to the repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    result = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"git: {result.stderr}")
    names = (Path(name) for name in result.stdout.split("\0") if name)
    return tuple(name for name in names if (ROOT / name).exists())


@cache
def imported(script: str) -> set[str]:
    """The top-level modules that a script imports, at its head or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def required(path: str) -> dict[str, str]:
    """The packages of a file of requirements, and their bounds."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    pattern = re.compile(r"(\w[\w-]*)\s*([<>=!~][^#]*)?")
    found = (pattern.match(line) for line in lines)
    return {match[1]: (match[2] or "").strip() for match in found if match}


def test_top_level_holds_five_scripts_and_what_goes_with_them() -> None:
    """Names that begin with a dot are free."""
    found = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert found == OTHERS | {f"{name}.py" for name in SCRIPTS}


def test_no_clip_and_no_result_is_tracked() -> None:
    """The corpora are licensed for research only; tests/cases holds broken scraps of synthetic tones."""
    clips = [path for path in tracked() if path.suffix.lower() in AUDIO_SUFFIXES]
    assert {path.parent for path in clips} <= {Path("tests/cases")}
    assert all((ROOT / path).stat().st_size <= 2048 for path in clips)
    models = [path for path in tracked() if path.suffix == ".pth" or path.name == "submission.csv"]
    assert models == [Path("assets/pretrained_any.pth"), Path("assets/pretrained_same.pth")]


def test_requirements_are_what_the_scripts_import() -> None:
    """None too many; what is not named comes with librosa. Bounds: what is needed, and what was tested."""
    packages = set(required("requirements.txt"))
    brought = {re.split(r"[^\w-]", text)[0] for text in requires("librosa") or [] if "extra ==" not in text}
    used = set().union(*map(imported, SCRIPTS)) - sys.stdlib_module_names - set(SCRIPTS)
    used = {{"sklearn": "scikit-learn"}.get(name, name) for name in used}
    assert packages <= used
    assert used <= packages | brought
    for path in ("requirements.txt", "tests/requirements.txt"):
        for name, bounds in required(path).items():
            assert re.fullmatch(r">=[\d.]+, ?<=?[\d.]+", bounds), name


@pytest.mark.parametrize("mark", ["run", "test"])
def test_gate_runs_the_commands_of_the_readme(mark: str) -> None:
    """Literally, so that they are known to work."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^<!-- ci: {mark} -->\n```bash\n(.*?)\n```$", readme, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    assert f"\n{blocks[0]}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_links_of_the_readme_lead_somewhere() -> None:
    """To a file of the repository, or to a heading of the page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = {
        f"#{name.lower().replace(' ', '-')}" for name in re.findall(r"^#+ (.*)$", readme, re.MULTILINE)
    }
    links = {link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("https://")}
    assert "assets/network.svg" in links
    assert {link for link in links if not (ROOT / link).is_file()} <= headings


def test_no_path_of_one_machine_is_tracked() -> None:
    """It would work there only."""
    place = re.compile(r"(?<![\w.:/-])(/" + "(home|Users|root|work)" + r"|[A-Z]:\\Users)[/\\]\w")
    for path in tracked():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        assert not place.search(text), path

"""What the pages say is true: every command parses, every file they draw is there, and every file is drawn."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from firstwords.app.cli import parser
from firstwords.presets import presets

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(start: str) -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("line", [line for line in commands("firstwords ") if "--help" not in line])
def test_every_command_of_the_pages_parses(line: str) -> None:
    parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("line", commands("make "))
def test_every_make_target_of_the_pages_exists(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.mark.system
def test_pytest_understands_what_make_reliability_asks_of_it() -> None:
    """What stands apart from an option of our own would be taken for a test, and the options for unknown."""
    asked = re.search(r"-m pytest (.*--full.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert asked is not None
    args = [*shlex.split(asked[1]), "-n", "0", "--collect-only", "-q"]
    ended = subprocess.run([sys.executable, "-m", "pytest", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_pages_have_commands() -> None:
    assert len(commands("firstwords ")) >= 8
    assert len(commands("make ")) >= 2


def test_the_layout_that_is_drawn_is_the_layout() -> None:
    picture = re.search(r"```\nsrc/firstwords/\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.S)
    assert picture is not None
    drawn, folder = set(), ""
    for line in picture[1].splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            drawn.add(name if line.startswith("  ") and not line.startswith("    ") else folder + name)
    package = ROOT / "src/firstwords"
    there = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert drawn == {name for name in there if name.count("/") == 0 or not name.endswith("__init__.py")}


def test_every_preset_is_named_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in presets() if f"`{name}`" not in text and f"--preset {name}" not in text] == []

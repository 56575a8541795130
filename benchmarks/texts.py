"""Make the texts that the race is run on, of Debian's packages and Python's own library.

    python benchmarks/texts.py FOLDER

The King James Bible, every eighth page of the German manual, every fourth of the Russian one, and every other one of
Python's first 86 modules: the same wherever the packages and Python are. Needs `apt-get` and `dpkg-deb`, installs nothing.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text", "manpages-de", "manpages-ru")


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("folder", type=Path)
    folder: Path = given.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True, stdout=subprocess.DEVNULL)
        for package in Path(root).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:86:2]
        texts = {
            "bible": bible(Path(root)),
            "man-de": manual(Path(root) / "usr/share/man/de", every=8),
            "man-ru": manual(Path(root) / "usr/share/man/ru", every=4),
            "python": "\n".join(path.read_text() for path in modules),
        }
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        path.write_text(text)
        print(f"{path}: {path.stat().st_size:,} bytes")


def bible(root: Path) -> str:
    program = root / "usr/bin/bible"
    command = [str(program), "-p", str(root / "usr/lib"), "-f", "Ge1:1-Re22:21"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def manual(pages: Path, *, every: int) -> str:
    """Return one page of so many, sorted by name: what is said in it, without how it is set."""
    text = "\n".join(gzip.decompress(path.read_bytes()).decode() for path in sorted(pages.glob("man*/*.gz"))[::every])
    return re.sub(r"^[.'](\\\".*|\w+ ?)\n?|\\f.|\\[&/|,]", "", text, flags=re.MULTILINE).replace(r"\-", "-")


if __name__ == "__main__":
    main()

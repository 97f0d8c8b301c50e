"""The documents tell of what is there: every module is on the map, every link and command in them exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsctl.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
#: in every service, and told once for all
OF_EVERY_SERVICE = {"state", "events", "actor"}


def modules(package: Path) -> set[str]:
    """The modules of a package by path within it, without the ones that every package has."""
    paths = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    found = {path for path in paths if Path(path).name not in ("__init__", "__main__")}
    return found - OF_EVERY_SERVICE if package.parent.name == "services" else found


def mapped() -> dict[str, set[str]]:
    """The modules that ARCHITECTURE.md names, by package."""
    found: dict[str, set[str]] = {}
    package = ""
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        if heading := re.match(r"\*\*(ds[a-z]+)\*\*: ", line):
            package = heading[1]
            found[package] = set()
        elif line.startswith("#"):
            package = ""
        elif package and (names := re.match(r"- ((`[\w/]+`(, |: ))+)", line)):
            found[package] |= set(re.findall(r"`([\w/]+)`", names[1]))
    return found


def test_the_map_names_every_module_and_no_other() -> None:
    packages = [
        path.parent for root in ("common", "services", "tools") for path in ROOT.glob(f"{root}/*/__init__.py")
    ]
    assert mapped() == {package.name: modules(package) for package in packages}


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            yield document, target


@pytest.mark.parametrize(("document", "target"), list(links()), ids=lambda value: getattr(value, "name", value))
def test_every_link_leads_somewhere(document: Path, target: str) -> None:
    assert (document.parent / target).exists()


def named(pattern: str) -> set[str]:
    """What the one group of ``pattern`` matches in the documents."""
    return {name for one in DOCUMENTS for name in re.findall(pattern, one.read_text(), re.MULTILINE)}


def test_every_command_in_the_documents_exists() -> None:
    commands = named(r"(?<![\w/-])dsctl ([a-z]+)\b")
    assert {"up", "generate"} <= commands <= set(COMMANDS)


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = named(r"^make ([a-z]+)") | named(r"`make ([a-z]+)`")
    assert {"demo", "test"} <= asked <= targets

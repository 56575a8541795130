"""The layout is the journey, and this holds the code to it."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import firstwords

PACKAGE = Path(firstwords.__file__).parent
PAGE = Path(__file__).parents[1] / "docs/architecture.md"
# The layout as it is drawn there, from text to a model that speaks: names of modules and folders, in order.
ORDER = [
    name.rstrip("/").removesuffix(".py")
    for name in re.findall(
        r"^  ([a-z]\w*(?:\.py|/)) ", PAGE.read_text(encoding="utf-8").partition("src/firstwords/\n")[2], re.M
    )
]
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


def imported(path: Path, *, at_run_time: bool = True) -> set[str]:
    """The firstwords modules that a file imports anywhere, or only those that it imports when it is run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("firstwords"):
            if at_run_time and id(node) in hidden:
                continue
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module.count(".") < 2 else {module}
    return found


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_what_stands_above_it(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = [module for module in imported(path, at_run_time=False) if module.split(".")[1] in ORDER]
    below = [module for module in names if place(module) > ORDER.index(own)]
    assert below == []


def test_every_module_has_its_place_in_the_order() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} == set(ORDER)


def test_no_module_reaches_itself_through_its_imports() -> None:
    graph = {".".join(("firstwords", *path.relative_to(PACKAGE).with_suffix("").parts)): imported(path) for path in MODULES}

    def reach(module: str, seen: set[str]) -> set[str]:
        for name in graph.get(module, set()):
            if name not in seen:
                seen.add(name)
                reach(name, seen)
        return seen

    assert [module for module in graph if module in reach(module, set())] == []


def printing(source: str) -> list[str]:
    """The names in a source that show something to a person."""
    names = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name | ast.Attribute)]
    return [name for name in names if name in ("print", "sys.stdout", "sys.stderr")]


def test_only_the_app_prints() -> None:
    elsewhere = [path for path in MODULES if path.parent.name != "app"]
    found = {path.name: printing(path.read_text(encoding="utf-8")) for path in elsewhere}
    # The process that opens a pickled file talks to the one that started it.
    assert {name for name, calls in found.items() if calls} == {"guarded.py"}
    assert printing("print(1); sys.stdout.write(x); console.out.print(2)") == ["print", "sys.stdout"]  # the negative control


WRITING = {
    "write_text",
    "write_bytes",
    "unlink",
    "rename",
    "renames",
    "rmdir",
    "rmtree",
    "mkdir",
    "makedirs",
    "remove",
    "truncate",
}


def writes(source: str) -> list[str]:
    """The calls in a source that change a disk."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [
        (call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", ""), call) for call in calls
    ]
    found = [name for name, _ in named if name in WRITING]
    modes = [
        argument.value
        for name, call in named
        if name == "open"
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]
    return found + [mode for mode in modes if set(mode) & set("wax+") and len(mode) < 4]


def test_only_store_writes() -> None:
    found = {path.name: writes(path.read_text(encoding="utf-8")) for path in MODULES if path.name != "store.py"}
    assert {name: calls for name, calls in found.items() if calls} == {}
    assert len(writes((PACKAGE / "store.py").read_text(encoding="utf-8"))) > 5  # the negative control


def unpicklers(source: str) -> list[str]:
    """The names in a source that can run code from data."""
    tree, banned = ast.parse(source), {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "eval", "exec", "compile"}
    names = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    dotted = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [name for name in names if name in banned] + [name for name in dotted if name in ("torch.load", "torch.save")]


def test_nothing_can_unpickle() -> None:
    found = {path.name: unpicklers(path.read_text(encoding="utf-8")) for path in MODULES}
    # The process that may, and its rehearsal; and what is written for the chapter's code, which reads nothing else.
    allowed = {"guarded.py": ["torch.load", "torch.load", "torch.save"], "export.py": ["torch.save"]}
    assert {name: sorted(words) for name, words in found.items() if words} == allowed
    assert unpicklers("import pickle; torch.load(x); eval(y)") == ["eval", "pickle", "torch.load"]  # the negative control


def test_no_load_may_run_what_is_in_a_file() -> None:
    tree = ast.parse((PACKAGE / "weights" / "guarded.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert len(calls) == 2
    assert all("weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords] for call in calls)


def test_the_public_names_are_these() -> None:
    assert sorted(firstwords.__all__) == [
        "FirstwordsError",
        "GPTModel",
        "GPT_CONFIG_124M",
        "LanguageModel",
        "ModelConfig",
        "Sampling",
        "__version__",
        "evaluate",
        "explain",
        "generate_text_simple",
        "gpt2_tokenizer",
        "info",
        "load",
        "report",
        "text_to_token_ids",
        "token_ids_to_text",
        "train",
        "verify",
    ]
    assert all(getattr(firstwords, name) is not None for name in firstwords.__all__)
    modules = [module.name for module in pkgutil.iter_modules(firstwords.__path__)]
    assert not {*modules} & {*firstwords.__all__}  # a module takes its name in the package as soon as it is imported


def test_importing_the_package_and_parsing_a_command_line_import_no_torch() -> None:
    program = (
        "import sys, firstwords, firstwords.app.cli as c; c.parser(); print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_three_calls_lead_from_the_command_line_to_backward() -> None:
    """cli.train -> pretraining.train -> loop.fit -> loop.train_step, where backward is; each names the next."""

    def calls(module: str, function: str) -> set[str]:
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        body = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
        found = [node.func for node in ast.walk(body) if isinstance(node, ast.Call)]
        return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in found}

    assert "train" in calls("app/cli.py", "train")
    assert "fit" in calls("pretraining.py", "train")
    assert "train_step" in calls("training/loop.py", "fit")
    assert "backward" in calls("training/loop.py", "train_step")

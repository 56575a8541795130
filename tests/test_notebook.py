"""The chapter's notebook runs from top to bottom, and what it shows is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "chapter05.ipynb"
CHECKPOINT_FILES = (
    "config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
)


def notebook() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return value


def executed(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Execute the code cells in order in one namespace, as a kernel does, and return it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"{NOTEBOOK.name}[{cell['id']}]", "exec", dont_inherit=True)
            exec(code, namespace)
    return namespace


def check_untrained(seen: dict[str, Any]) -> None:
    """The numbers of the chapter; test_chapter.py holds them more closely."""
    assert seen["babble"] == "Every effort moves you rentingetic wasnم refres RexMeCHicular stren"
    assert seen["logits"].shape == (2, 3, 50257)
    expected = [7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06]
    assert seen["target_probabilities"].flatten().tolist() == pytest.approx(expected, rel=1e-4)  # 5 digits are printed
    assert seen["loss"].item() == pytest.approx(10.7940, abs=6e-5)  # half the last printed digit, and float32's rounding
    assert seen["cross_entropy"].item() == pytest.approx(seen["loss"].item(), rel=1e-6)  # a float32 step or two
    assert seen["perplexity"].item() == pytest.approx(48725.82, abs=0.1)  # a float32 step of the loss is 0.046
    assert seen["notes_loss"].item() == pytest.approx(10.8009, abs=6e-5)
    assert seen["notes_babble"] == "Every effort moves you rentingetic wasnم refres RexAngel infieldcigans"


def check_trained(seen: dict[str, Any]) -> None:
    """The first run learns, speaks and is on disk, whole."""
    assert seen["run"].steps == 60
    assert [entry["step"] for entry in seen["evaluations"]] == [0, 15, 30, 45, 60]
    assert seen["evaluations"][-1]["nats_per_token"] < seen["evaluations"][0]["nats_per_token"] - 1  # seen: 2.3 less
    assert seen["spoken"].keys() == {0.0, 0.7, 1.4}
    assert len({*seen["spoken"].values(), seen["from_ten"]}) == 4
    assert seen["from_one"] == seen["spoken"][0.0]
    assert {"config.toml", "corpus.json", "metrics.jsonl", "samples.jsonl"} <= set(seen["saved"])
    assert {f"checkpoints/step-00000060/{name}" for name in CHECKPOINT_FILES} <= set(seen["saved"])


def check_continued(seen: dict[str, Any]) -> None:
    """The second run goes on where the first ended, and the figures are those of its best checkpoint."""
    assert seen["longer"].run == seen["run"].run
    assert seen["longer"].steps == 90
    assert seen["longer"].bits_per_byte < seen["run"].bits_per_byte
    journal = [json.loads(line) for line in (seen["OUT"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in journal if entry["event"] == "step"] == list(range(1, 91))
    # Rounding aside, the evaluation during the run and the one after it are the same computation.
    assert seen["evaluation"].nats_per_token == pytest.approx(seen["longer"].nats_per_token, rel=1e-6)
    tokens = seen["explanation"].tokens
    assert "".join(token.text for token in tokens) == "The import statement is used in a function."
    mean = -sum(token.log_probability for token in tokens[1:]) / (len(tokens) - 1)
    assert seen["explanation"].evaluation.nats_per_token == pytest.approx(mean, rel=1e-9)


@pytest.mark.system
def test_every_cell_runs_in_order_and_shows_what_the_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIRSTWORDS_CACHE", str(tmp_path / "cache"))
    seen = executed(notebook()["cells"])
    check_untrained(seen)
    check_trained(seen)
    check_continued(seen)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "runs"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["chapter05"]


def test_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_notebook_is_nbformat_4_5_for_the_python3_kernel() -> None:
    value = notebook()
    assert (value["nbformat"], value["nbformat_minor"]) == (4, 5)
    assert value["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in value["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in ids)
    assert all(cell["cell_type"] in ("code", "markdown") and "metadata" in cell for cell in value["cells"])

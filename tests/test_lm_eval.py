"""lm-eval says the same of our model through us as through transformers on its export. Needs lm-eval: `make lm-eval`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command import write
from firstwords import api

lm_eval = pytest.importorskip("lm_eval", reason="NOT RUN: lm-eval is not installed")
managers = pytest.importorskip("lm_eval.tasks")
# Warnings of other packages, and the files that they leave open, are not ours.
pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore")]
MODEL = {"emb_dim": 64, "n_heads": 2, "n_layers": 2, "context_length": 256}
RUNS: dict[str, dict[str, Any]] = {
    "qwen3, bpe": {"tokenizer": "bpe:600"},
    "gpt2, bpe": {"tokenizer": "bpe:600", "preset": "gpt2-124m"},
    "gpt2, bytes": {"tokenizer": "bytes", "preset": "gpt2-124m"},
}
TOLERANCE = 1e-3  # of log-likelihoods of 60 to 600 tokens, in float32
PROMPTS = ["The statement", "If a class", "x" * 400]  # the last is longer than the context


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of each kind of block on the built-in text, its tasks, one that asks for text, and its export."""
    folder = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        settings = {"steps": 60, "eval_every": 60, "batch_size": 8, "precision": "float32", "model": MODEL}
        api.train(out=folder / "run", **settings | RUNS[request.param])
        api.evaluate_tasks(folder / "run", out=folder / "tasks")
        api.export(folder / "run", "hf", folder / "hf")
        write(folder / "tasks/says.json", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        options = {"until": ["\n\n", ". "], "max_gen_toks": 40, "do_sample": False}
        says = {"task": "says", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "x"}
        says |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "tasks/says.json")}}}
        says |= {"test_split": "test", "generation_kwargs": options, "metric_list": [{"metric": "exact_match"}]}
        write(folder / "tasks/says.yaml", json.dumps(says))
        yield folder


def evaluated(folder: Path, model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    manager = managers.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )
    return found


def test_lm_evals_figures_are_the_same_through_us_and_through_transformers(run: Path) -> None:
    tasks = ["firstwords", "says"]
    ours = evaluated(run, api.lm_eval_model(run / "run"), tasks, limit=60)
    theirs = {"model": "hf", "model_args": f"pretrained={run / 'hf'},dtype=float32,device=cpu", "batch_size": 8}
    theirs = evaluated(run, tasks=tasks, limit=60, **theirs)
    assert set(ours["results"]) == set(theirs["results"])
    assert {"firstwords_last_word", "firstwords_word_order", "firstwords_text"} <= set(ours["results"])
    answers = 0
    for name in ours["results"]:
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for (said,), (wanted,) in zip(mine["resps"], other["resps"], strict=True):
                answers += 1
                if isinstance(wanted, str):
                    assert said == wanted
                    continue
                log, *greedy = said if isinstance(said, tuple) else (said,)
                wanted_log, *wanted_greedy = wanted if isinstance(wanted, tuple) else (wanted,)
                assert log == pytest.approx(wanted_log, abs=TOLERANCE, rel=1e-6)  # a rolling one is of 40,000 tokens
                assert greedy == wanted_greedy
        figures = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        assert {key: ours["results"][name][key] for key in figures} == pytest.approx(figures, rel=1e-6)
    assert answers > 300


def test_our_own_figures_are_lm_evals(run: Path) -> None:
    scores = {score.name: score.accuracy for score in api.evaluate_tasks(run / "run", folder=run / "tasks")}
    found = evaluated(run, api.lm_eval_model(run / "run"), [f"firstwords_{name}" for name in scores])
    assert {name: found["results"][f"firstwords_{name}"]["acc,none"] for name in scores} == scores

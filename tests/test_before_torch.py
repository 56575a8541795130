"""A mistake that can be found without PyTorch is told before PyTorch is imported: at once, that is."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from command import TEXT, write
from rows import row

FILES: dict[str, str | bytes] = {
    "empty.txt": "",
    "blank.txt": " \n\t" * 100,
    "one.txt": "a",
    "short.txt": "twenty characters ..",
    "utf16.txt": TEXT.encode("utf-16-le"),
    "utf32.txt": TEXT.encode("utf-32-le"),
    "middle.txt": b"caf\xe9 au lait",
    "latin.txt": TEXT.encode("cp1252"),
    "gbk.txt": "从前有一座山，山上有一座庙".encode("gbk"),
    "cut.txt": "山".encode()[:2],
    "overlong.txt": b"a\xc0\x80",
    "nul.txt": bytes(100),
    "image.txt": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "twice.txt": gzip.compress(gzip.compress(b"a", mtime=0), mtime=0),
    "lfs.txt": "version https://git-lfs.github.com/spec/v1\n",
    "surrogate.jsonl": r'{"text": "\ud800"}',
    "bad.jsonl": "{bad}",
    "other.jsonl": '{"body": "a"}',
    "cut.jsonl": '{"text": "a',
    "bom.txt": codecs.BOM_UTF8,
    "no-text/a.csv": "a,b",
    "tokenizer.json": "{}",
    "gaps.json": '{"normalizer": null, "pre_tokenizer": null, "model": {"vocab": {"a": 7}, "merges": []}}',
    "bad.toml": "stesp = 1",
    "taken": "precious",
    "full/cat.png": "a cat",
    "begun/config.toml": "steps = 2",
}
# exit code, kind of input, command
CASES = [
    (66, 1, "train no-such-file.txt"),
    (66, 2, "train no-text"),
    (65, 3, "train empty.txt"),
    (65, 3, "train bom.txt"),
    (65, 4, "train blank.txt"),
    (65, 5, "train one.txt --tokenizer bytes"),
    (65, 6, "train short.txt --tokenizer bytes"),
    (65, 12, "train utf16.txt"),
    (65, 13, "train utf32.txt"),
    (65, 14, "train middle.txt"),
    (65, 15, "train latin.txt"),
    (65, 16, "train gbk.txt"),
    (65, 17, "train cut.txt"),
    (65, 18, "train overlong.txt"),
    (65, 19, "train nul.txt"),
    (65, 20, "train image.txt"),
    (65, 20, "train twice.txt"),
    (65, 22, "train lfs.txt"),
    (65, 31, "train surrogate.jsonl"),
    (65, 32, "train bad.jsonl"),
    (65, 33, "train other.jsonl"),
    (65, 34, "train cut.jsonl"),
    (66, 36, "train circle.txt"),
    (66, 37, "train pipe.txt"),
    (66, 37, "train /dev/zero"),
    (65, 40, "train --resume --out run --steps 3"),
    (65, 41, "train caf\udce9.txt"),
    (73, 43, "train text.txt --out run"),
    (73, 43, "train text.txt --out full"),
    (73, 44, "train text.txt --out taken"),
    (65, 49, "train text.txt --tokenizer tokenizer.json"),
    (65, 50, "train text.txt --tokenizer gaps.json"),
    (78, 51, "train --resume --out run --tokenizer gpt2"),
    (2, 55, "train --stesp 2"),
    (78, 55, "train text.txt --config bad.toml"),
    (78, 55, "train text.txt --preset labtop"),
    (78, 56, "train text.txt --steps 0"),
    (78, 56, "train text.txt --optim.peak-lr nan"),
    (78, 57, "train text.txt --model.emb-dim 33 --model.n-heads 2"),
    (78, 58, "train --resume --out run --model.context-length 64"),
    (78, 59, "train text.txt --precision float16"),
    (66, 62, "train --resume --out nothing"),
    (66, 62, "train --resume --out full"),
    (66, 62, "generate no-such-run"),
    (66, 1, "eval run --tasks no-such-folder"),
    (66, 1, "eval run no-such-file.txt"),
    (66, 1, "eval gpt2"),
    (66, 62, "eval run text.txt --against no-such-run"),
    (73, 44, "eval run --tasks-out taken"),
    (66, 62, "report no-such-run"),
    (78, 64, "train --resume --out run --model.emb-dim 64"),
    (78, 66, "generate no-such-run --samples 0"),
    (78, 66, "generate run --temperature -1"),
    (78, 66, "generate run --top-k 0"),
    (78, 66, "generate run --max-new-tokens 1000000000000"),
]
PROGRAM = """
import json, sys
from firstwords.app.cli import main
print(json.dumps([[main(arguments), "torch" in sys.modules] for arguments in json.load(sys.stdin)]))
"""


def outcomes(commands: list[list[str]]) -> list[list[object]]:
    """The exit code of each command, run one after the other in a new process, and whether torch was there by then."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@row(*{kind for _, kind, _ in CASES})
def test_a_mistake_that_needs_no_torch_is_told_before_torch_is_imported(a_run: Path, here: Path):
    for name, content in FILES.items():
        write(here / name, content)
    write(here / "caf\udce9.txt", TEXT)
    write(here / "text.txt", TEXT + "one more line, so that the run cannot go on\n")
    (here / "circle.txt").symlink_to(here / "circle.txt")
    os.mkfifo("pipe.txt")
    commands = [shlex.split(command) for _, _, command in CASES]
    found = outcomes(commands)
    told = [(expected, command, outcome) for (expected, _, command), outcome in zip(CASES, found, strict=True)]
    assert [case for case in told if case[2] != [case[0], False]] == []
    assert outcomes([["info", "run"]]) == [[0, True]]  # the negative control


def test_a_run_needs_nothing_of_pytorchs_compiler_whose_import_takes_as_long_as_pytorchs(a_run: Path, here: Path):
    program = PROGRAM.replace('"torch" in', '"torch._dynamo" in')
    asked = json.dumps([["train", "--resume", "--out", "run", "--steps", "7"]])
    done = subprocess.run([sys.executable, "-c", program], input=asked, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, False]], done.stderr
    by_torch = "import torch, sys; torch.optim.SGD([torch.ones(1)]); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", by_torch], check=False).returncode == 1  # the negative control

"""The command line: every verb is one thin function over `api`. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from firstwords import __version__, reading
from firstwords.config import choices, did_you_mean, fields_by_key, flag, flatten, key_types, run_config
from firstwords.errors import ConfigError, DataError, FirstwordsError, NoInputError, StoppedError, UsageError, quoted
from firstwords.presets import presets

if TYPE_CHECKING:
    from firstwords.app.console import Console

EXAMPLES = """examples:
  firstwords plan notes/ --for 10m               how good will it be, and will it fit?
  firstwords train notes/ --for 10m              pretrain on your text for ten minutes
  firstwords train --resume --out runs/notes     go on with a run
  firstwords generate runs/notes --prompt "Dear"
  firstwords eval runs/notes other.txt
  firstwords export runs/notes --to hf --out notes-model
  firstwords explain runs/notes "Every effort moves you"
  firstwords report runs/notes                   a page that shows what it learnt
"""
LARGEST_SEED = 2**62  # leaves room for one seed a sample
LARGEST_COUNT, MOST_SAMPLES = 10**9, 10**5  # of tokens, and of samples; more is a slip of the finger
SPINS = "20000"  # how long a thread waits awake: with the default, two cores that others use too do a third of the work
MODEL = "a run folder (its best checkpoint), a checkpoint folder, a model from elsewhere, or gpt2"
FOLLOWING = ("model.vocab_size", "model.drop_rate", "preset")  # keys whose default follows from others
OF_LAPTOP = "the defaults are those of the preset laptop; naming one of these keys takes it, without --preset and --from"
NOT_FLAGS = ("text", "text_sha256")  # keys of the configuration that the command line gives in another way


def entry() -> NoReturn:
    """Run the program and leave with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a result is more than what an old code page can say
        chosen = sys.stdout.isatty() or "PYTHONIOENCODING" in os.environ
        sys.stdout.reconfigure(encoding=None if chosen else "utf-8", errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:  # read when PyTorch is loaded; the process is ours here
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    started_s = time.perf_counter()
    as_json, debug, console = "--json" in arguments, "--debug" in arguments, None
    try:
        options = parser().parse_args(arguments)
        from firstwords.app.console import Console

        run: Callable[[argparse.Namespace, Console], int] = options.run
        console, options.started_s = Console(as_json=as_json), started_s
        return run(options, console)
    except KeyboardInterrupt:
        begun = None if console is None else console.begun
        do = f"to go on: {quoted('firstwords', 'train', '--resume', '--out', str(begun))}" if begun else ""
        return _failed(StoppedError("stopped", do=do), as_json=as_json, debug=debug)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes nowhere
        return 141
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        return _failed(known, as_json=as_json, debug=debug)


def _known(error: Exception) -> FirstwordsError | None:
    """Return what to say of an error; None: it is a fault of the program."""
    if isinstance(error, FirstwordsError):
        return error
    if _is_out_of_memory(error):
        return _out_of_memory(error)
    if _is_of_loading_torch(error):
        return _no_torch(error)
    if isinstance(error, OSError):  # what no module foresaw is still the machine's word
        return _refused_by_the_system(error)
    return None


def _refused_by_the_system(error: OSError) -> FirstwordsError:
    from firstwords import store

    where = os.fsdecode(error.filename) if error.filename else "this machine"
    # What is made is made by `store`, which says so itself: this is what was to be read.
    no_name = error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
    kind = NoInputError if no_name else type(store.as_firstwords_error(error, Path(where)))
    return kind(
        "the system refused", where=where, why=error.strerror or str(error), do="check the name, the disk and the rights"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; PyTorch says so with a RuntimeError, in these words."""
    words = "out of memory|not enough memory|allocate memory"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def _out_of_memory(error: Exception) -> ConfigError:
    return ConfigError(
        "memory ran out",
        where="this machine",
        why=(str(error) or type(error).__name__).partition("\n")[0],
        do="take a smaller preset, --micro-batch-size or --model.context-length, or end other programs",
    )


def _is_of_loading_torch(error: Exception) -> bool:
    """Whether PyTorch is not there, or was being loaded: a library that it lacks may be an OSError or a ValueError."""
    if isinstance(error, ImportError) and "torch" in (error.name or ""):
        return True
    running = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
    return "torch" not in sys.modules and "torch" in running


def _no_torch(error: Exception) -> ConfigError:
    do = "firstwords doctor says more; or: pip install --force-reinstall 'torch>=2.11,<2.14'"
    return ConfigError("PyTorch cannot be loaded", where="this machine", why=str(error).partition("\n")[0], do=do)


def _failed(error: FirstwordsError, *, as_json: bool, debug: bool) -> int:
    from firstwords.app.console import Console

    with suppress(OSError):  # where nobody can be told, the exit code still says it
        if debug:
            traceback.print_exc()
        Console(as_json=as_json).error(error)
    return error.exit_code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the program's own."""

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError, with the nearest flag for an unknown one."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown.split(" ")[0].split("=")[0], known, n=1)
        raise UsageError(message, where=self.prog, do=f"did you mean {near[0]}?" if near else f"see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = did_you_mean(str(value), action.choices)
            raise UsageError(f"no verb {value!r}", where=self.prog, do=f"{near}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown arguments in the verb's own parser, which knows the flags that are near."""
        options, unknown = super().parse_known_args(args, namespace)
        end = unknown.index("--") if "--" in unknown else len(unknown)  # behind it, all are names
        names = [*unknown[:end], *unknown[end + 1 :]]
        several = [action.dest for action in self._actions if not action.option_strings and action.nargs in ("*", "+")]
        if several and all(word == "-" or not word.startswith("-") for word in unknown[:end]):
            # names behind a flag: `eval RUN --no-baselines TEXT`, which argparse has as unknown before Python 3.13
            setattr(options, several[-1], [*getattr(options, several[-1]), *names])
            unknown = []
        if unknown:
            self.error("unrecognized arguments: " + " ".join(unknown))
        return options, unknown


def parser() -> Parser:
    """Return the parser of the whole command line."""
    shared = Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object as the last line; progress to stderr")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top = Parser(
        prog="firstwords",
        description="Pretrain a GPT on your own text, on the laptop you have.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"firstwords {__version__}")
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, run: Callable[..., int], meaning: str) -> Parser:
        made: Parser = verbs.add_parser(name, help=meaning, description=meaning, parents=[shared], allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    _train_flags(verb("train", train, "pretrain a GPT on text"))
    made = verb("plan", plan, "what could be trained on a text, how long it takes and how good it will be")
    made.add_argument("text", nargs="*", metavar="TEXT", help="files and folders, or -; default: a built-in text")
    made.add_argument("--for", dest="for_s", metavar="TIME", help="the time budget, all in (default 3m)")
    made.add_argument("--target-bits-per-byte", metavar="X", help="how good it should be; the answer is how long that takes")
    made.add_argument("--encoding", help="encoding of the text files; by default recognised")
    for name, run, meaning in (
        ("eval", evaluate, "how good a model is on a text"),
        ("generate", generate, "let a model speak"),
        ("explain", explain, "each token of a text: its probability, rank, and what the model would rather have said"),
        ("info", info, "what is in a run or checkpoint"),
        ("verify", verify, "whether every checkpoint of a run is whole, and whether training repeats itself"),
    ):
        made = verb(name, run, meaning)
        made.add_argument("model", metavar="RUN", help="a run folder" if name == "verify" else MODEL)
        _flags_of(name, made)
    made = verb("report", report, "one HTML file that shows what a run learnt, or several runs beside each other")
    made.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    made.add_argument("--out", metavar="FILE", help="default: report.html in the run; for several, comparison.html here")
    made.add_argument("--png", metavar="DIR", help="also draw the loss and the temperatures, for papers")
    made.add_argument("--pdf", metavar="DIR", help="the same as PDF")
    _import_flags(verb("import", import_model, "make a model from elsewhere ours"))
    _export_flags(verb("export", export, "write a model for another tool, and compare what it makes of it"))
    made = verb("bench", bench, "how fast this machine is, and where firstwords stands on it")
    made.add_argument("presets", nargs="*", metavar="PRESET", help="the models that learn and speak; default: two sizes")
    made.add_argument("--compile", action="store_true", help="measure whether compiling pays, for --compile auto")
    verb("doctor", doctor, "what this machine is, what firstwords will use of it, and what is wrong with it")
    return top


def _import_flags(made: Parser) -> None:
    known = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder for transformers, a .pth or .safetensors, nanoGPT's ckpt.pt"
    made.add_argument("source", metavar="SOURCE", help=known)
    made.add_argument("--out", required=True, metavar="RUN", help="the folder to be made")
    made.add_argument("--tokenizer", metavar="NAME", help="where the source has none: gpt2, bytes, or a tokenizer.json")
    made.add_argument(
        "--n-heads", metavar="N", help="of a state dict, which does not say it; default: those of GPT-2's size"
    )


def _export_flags(made: Parser) -> None:
    made.add_argument("model", metavar="RUN", help=MODEL)
    made.add_argument(
        "--to",
        required=True,
        metavar="hf|gguf|pth",
        help="a folder for transformers, a file for llama.cpp, or one for the chapter's code",
    )
    made.add_argument("--out", required=True, metavar="PATH", help="the folder or file to be made")
    made.add_argument("--type", metavar="f32|f16|q8_0", help="of a GGUF file's matrices (default f32)")


def _flags_of(name: str, made: Parser) -> None:
    match name:
        case "eval":
            made.add_argument("text", nargs="*", metavar="TEXT", help="files and folders; default: the run's held-out text")
            made.add_argument("--encoding", help="encoding of the text files; by default recognised")
            made.add_argument(
                "--against", action="extend", nargs="+", default=[], metavar="MODEL", help="other runs or models, gpt2 too"
            )
            made.add_argument("--no-baselines", action="store_true", help="leave out compressors and the n-gram model")
            made.add_argument(
                "--tasks",
                nargs="?",
                const="",
                metavar="FOLDER",
                help="ask for last words and for the better of two sentences, made from the text or taken from FOLDER",
            )
            made.add_argument(
                "--tasks-out", metavar="FOLDER", help="keep the tasks here, for --tasks FOLDER and for lm-eval"
            )
        case "generate":
            made.add_argument(
                "--prompt", action="append", metavar="P", help="how it begins; may be repeated; default: as a document does"
            )
            made.add_argument("--max-new-tokens", default="200", metavar="N", help="at most so many (default 200)")
            made.add_argument("--temperature", default="0.8", metavar="T", help="0: the likeliest (default 0.8)")
            made.add_argument("--top-k", metavar="K", help="draw from the K likeliest")
            made.add_argument("--top-p", metavar="P", help="draw from the likeliest that have this probability together")
            made.add_argument("--min-p", metavar="P", help="leave out what is less than P times as likely as the likeliest")
            made.add_argument(
                "--repetition-penalty", metavar="X", help="above 1: make what was said less likely (1.1 is usual)"
            )
            made.add_argument(
                "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
            )
            made.add_argument("--seed", default="123", metavar="S", help="the same seed, the same text (default 123)")
            made.add_argument("--samples", default="1", metavar="M", help="so many texts, of seeds S, S+1, ... (default 1)")
        case "verify":
            made.add_argument("--replay", metavar="N", help="train N steps again and compare them with the run's record")
        case "explain":
            made.add_argument("text", metavar="TEXT", help="the text itself")
            made.add_argument(
                "--html", metavar="FILE", help="write a page with the text as a map of what surprised the model"
            )


def _train_flags(made: Parser) -> None:
    made.usage = "firstwords train [TEXT ...] [--out RUN] [--for TIME | --steps N | --epochs E] [--resume] [--KEY VALUE ...]"
    made.add_argument("text", nargs="*", metavar="TEXT", help="files and folders, or -; default: a built-in text")
    made.add_argument("--out", metavar="RUN", help="the run folder; default: runs/<name of the text>")
    made.add_argument("--config", metavar="FILE", help="a TOML file of these keys, such as a run's config.toml")
    made.add_argument("--resume", action="store_true", help="go on with the run in --out")
    groups = {
        "": made,
        "model": made.add_argument_group("model", OF_LAPTOP),
        "optim": made.add_argument_group("optimizer", OF_LAPTOP),
    }
    defaults = flatten(dataclasses.asdict(run_config()))
    made.epilog = "presets: " + ", ".join(presets())
    for key, field in fields_by_key().items():
        if key not in NOT_FLAGS:
            default = "" if defaults[key] in (None, "") or key in FOLLOWING else f" (default {_shown(defaults[key])})"
            groups[key.rpartition(".")[0]].add_argument(
                flag(key),
                dest=key,
                default=argparse.SUPPRESS,
                metavar=_metavar(key),
                help=field.metadata["meaning"] + default,
            )


def _shown(value: Any) -> str:
    """Return a value as a flag takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(key: str) -> str:
    """Return what stands for a key's value on the help page: its choices, TIME, N, or TEXT."""
    few = choices(key)
    if few:
        return "|".join(few) if len(few) < 6 else "NAME"
    kind = str(key_types()[key])
    return "TIME" if key.endswith("_s") else "N" if "int" in kind else "X" if "float" in kind else "TEXT"


def train(options: argparse.Namespace, console: Console) -> int:
    """Pretrain, and say what came of it."""
    from firstwords import api
    from firstwords.runs import signals

    overrides = {key: value for key, value in vars(options).items() if key in fields_by_key() and key not in NOT_FLAGS}
    with console.progress() as listener:
        result = api.train(
            options.text or None,
            out=options.out,
            config=options.config,
            resume=options.resume,
            listener=listener,
            started_s=options.started_s,
            **overrides,
        )
    console.trained(result)
    return 0 if result.stopped in ("done", "best") else signals.exit_code(result.stopped)


def plan(options: argparse.Namespace, console: Console) -> int:
    """Say what could be trained."""
    target = _number(options.target_bits_per_byte, float, "--target-bits-per-byte")

    from firstwords import api

    with console.progress() as listener:
        found = api.plan(
            options.text or None,
            for_s=options.for_s,
            target_bits_per_byte=target,
            encoding=options.encoding,
            listener=listener,
        )
    console.planned(found, options.text, options.encoding)
    return 0


def evaluate(options: argparse.Namespace, console: Console) -> int:
    """Say how good a model is."""
    kept, out, text = options.tasks, options.tasks_out, options.text or None
    if options.encoding is not None and text is None:
        raise ConfigError("there is no text to read so", where="--encoding", do="leave it out, or name a text")
    if kept and (options.against or options.no_baselines):
        why, do = "they belong to a text", "leave them out, or the folder"
        raise ConfigError("goes without --against and --no-baselines", where=f"--tasks {kept}", why=why, do=do)
    if "-" in options.text and (kept is not None or out is not None):
        raise ConfigError(
            "standard input can be read only once", where="-", why="tasks and figures both read it", do="name a file"
        )

    from firstwords import api

    figures, scores, memorised = None, None, None
    with console.progress() as listener:
        if kept is not None or out is not None:
            scores = api.evaluate_tasks(
                options.model, text, folder=kept or None, out=out, encoding=options.encoding, listener=listener
            )
        if not kept:
            figures = api.scale(
                options.model,
                text,
                against=options.against,
                with_baselines=not options.no_baselines,
                encoding=options.encoding,
                listener=listener,
            )
            memorised = api.memorisation(options.model, listener=listener)
    console.evaluated(figures, scores, memorised)
    return 0


def generate(options: argparse.Namespace, console: Console) -> int:
    """Let a model speak."""
    prompts = options.prompt or [""]
    for prompt in prompts:
        _require_text(prompt, "--prompt")
    count, seed = _number(options.samples, int, "--samples"), _number(options.seed, int, "--seed")
    max_new_tokens = _number(options.max_new_tokens, int, "--max-new-tokens")
    temperature = _number(options.temperature, float, "--temperature")
    top_k = _number(options.top_k, int, "--top-k")
    top_p, min_p = _number(options.top_p, float, "--top-p"), _number(options.min_p, float, "--min-p")
    penalty = _number(options.repetition_penalty, float, "--repetition-penalty")
    _require_within(count, 1, MOST_SAMPLES, "--samples")
    _require_within(seed, 0, LARGEST_SEED, "--seed")
    _require_within(max_new_tokens, 1, LARGEST_COUNT, "--max-new-tokens")
    from firstwords import api
    from firstwords.events import notices_to
    from firstwords.model.sampling import Sampling, stop_texts

    for word in stop_texts(options.stop):
        _require_text(word, "--stop")
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    with console.progress() as listener:
        lm = api.load(options.model, notice=notices_to(listener))
    if top_k is not None:
        _require_within(top_k, 1, lm.tokenizer.vocab_size, "--top-k")
    if count * len(prompts) == 1 and not console.as_json:
        console.speaks(
            prompts[0],
            lm.stream(
                prompts[0],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop=options.stop,
                notice=console.notice,
            ),
        )
        return 0
    asked = [(prompt, seed + i) for prompt in prompts for i in range(count)]
    said = lm.generate_batch(
        [prompt for prompt, _ in asked],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=[one for _, one in asked],
        stop=options.stop,
        notice=console.notice,
    )
    console.spoke([prompt for prompt, _ in asked], said, lm.tokenizer)
    return 0


def explain(options: argparse.Namespace, console: Console) -> int:
    """Show the six steps on a text."""
    _require_text(options.text, "TEXT")
    from firstwords import api

    with console.progress() as listener:
        explanation = api.explain(options.model, options.text, html=options.html, listener=listener)
    console.explained(explanation, options.html)
    return 0


def report(options: argparse.Namespace, console: Console) -> int:
    """Write a page that shows what runs learnt."""
    from firstwords import api

    pictures = {kind: folder for kind, folder in (("png", options.png), ("pdf", options.pdf)) if folder is not None}
    with console.progress() as listener:
        found = api.report(options.runs, out=options.out, pictures=pictures, listener=listener)
    console.reported(found)
    return 0


def info(options: argparse.Namespace, console: Console) -> int:
    """Say what is in a run."""
    from firstwords import api

    with console.progress() as listener:
        found = api.info(Path(options.model), listener=listener)
    console.described(found)
    return 0


def _require_text(text: str, name: str) -> None:
    if not reading.is_utf8(text):
        raise DataError("is not UTF-8", where=name, why="its bytes make no text", do="check the terminal's encoding")


def verify(options: argparse.Namespace, console: Console) -> int:
    """Say whether a run is whole."""
    replay = _number(options.replay, int, "--replay")

    from firstwords import api

    found = api.verify(options.model, replay=replay)
    console.verified(found)
    return 0 if found.ok else DataError.exit_code


def import_model(options: argparse.Namespace, console: Console) -> int:
    """Make a model from elsewhere ours."""
    n_heads = _number(options.n_heads, int, "--n-heads")
    if n_heads is not None:
        _require_within(n_heads, 1, LARGEST_COUNT, "--n-heads")

    from firstwords import api

    with console.progress() as listener:
        found = api.import_model(
            options.source, options.out, tokenizer=options.tokenizer, n_heads=n_heads, listener=listener
        )
    console.imported(found)
    return 0


def export(options: argparse.Namespace, console: Console) -> int:
    """Write a model for another tool."""
    from firstwords import api

    with console.progress() as listener:
        found = api.export(options.model, options.to, options.out, kind=options.type, listener=listener)
    console.exported(found)
    return 0


def bench(options: argparse.Namespace, console: Console) -> int:
    """Say how fast this machine is."""
    from firstwords import api

    console.benched(api.bench(options.presets or api.BENCH_PRESETS, compiled=options.compile))
    return 0


def doctor(_: argparse.Namespace, console: Console) -> int:
    """Say what this machine is, and what is wrong with it."""
    from firstwords import api

    found = console.examined(api.doctor)
    return 0 if found.ok else ConfigError.exit_code


def _require_within(value: int, least: int, most: int, name: str) -> None:
    if not least <= value <= most:
        raise ConfigError(f"cannot be {value}", where=name, do=f"allowed: from {least} to {most}")


def _number(text: str | None, kind: type, name: str) -> Any:
    """Return what a flag says as a number; None where it was not given."""
    if text is None:
        return None
    try:
        return kind(text)
    except (ValueError, OverflowError) as error:
        kind_name = "whole number" if kind is int else "number"
        raise ConfigError(f"{text!r} is no {kind_name}", where=name, do=f"give a {kind_name}") from error

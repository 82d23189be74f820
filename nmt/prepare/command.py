"""Turns parallel text into what training reads: token arrays, offsets, codec and manifest.

    python -m nmt.prepare download SOURCE             the archives of WMT14 English-German
    python -m nmt.prepare wmt14_en_de SOURCE OUT      the paper's recipe, from these archives or their text
    python -m nmt.prepare files OUT --name NAME --train PREFIX ... --valid PREFIX --test PREFIX --merges N
    python -m nmt.prepare grammar OUT                 generated sentences
    python -m nmt.prepare verify OUT                  compare prepared data with its checksums

After an interruption the same command continues.
"""

import argparse
import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.errors import UserError, positive
from engine.files import hold
from engine.machine import core_count
from engine.manifest import MANIFEST
from nmt.codec import Codec
from nmt.prepare import toy_text
from nmt.prepare.download import get_archives
from nmt.prepare.raw_text import scan_pair
from nmt.prepare.recipes import GRAMMAR, WMT14, Recipe
from nmt.prepare.sources import find_texts
from nmt.prepare.stages import Pair, encode, file_sha256, learn_codec, make_chunks, processes, tokenize
from nmt.prepared import SPLITS, finished, write_json
from nmt.text import RULES, moses


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if options.command == "verify":
        bad = verify(options.out)
        for line in bad:
            print(line)
        print(f"{options.out}: {f'{len(bad)} damaged' if bad else 'whole'}")
        return 1 if bad else 0
    if options.command == "download":
        get_archives(options.source, (*WMT14.train, WMT14.valid, WMT14.test))
        logging.info("next: python -m nmt.prepare wmt14_en_de %s OUT", options.source)
    elif options.command == GRAMMAR.name:
        prepare_grammar(options.out)
    elif options.command == WMT14.name:
        prepare(WMT14, options.source, options.out, options.workers)
    else:
        if options.name in (WMT14.name, GRAMMAR.name):
            raise UserError(f"--name {options.name} is the name of a recipe that comes with this: choose another")
        given = {key: value for key, value in vars(options).items() if key in Recipe.__dataclass_fields__}
        prepare(Recipe(**given), Path(), options.out, options.workers)
    return 0


def prepare(recipe: Recipe, folder: Path, out: Path, workers: int = 1, wait: bool = False) -> None:
    """Prepare the files that `recipe` names, below `folder`, into `out`.

    UserError if another process prepares into `out` (unless `wait`), a file is missing, not UTF-8, empty or does not
    match its other side, or `out` holds other data.
    """
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, "preparing data", wait):
        inputs = _scan(recipe, folder, out / "text")
        task = _describe(recipe, inputs)
        work = out / "work"
        if manifest := finished(out, recipe.name):
            if any(manifest.get(key) != value for key, value in task.items()):
                raise UserError(f"{out} already holds other data, or data of other settings: choose another folder")
            shutil.rmtree(work, ignore_errors=True)
            logging.info("%s is complete: nothing to do", out)
            return
        _claim(work, task)
        chunks = {name: make_chunks(name, inputs[name], recipe, work) for name in SPLITS}
        with processes(workers) as each:
            characters = {name: tokenize(name, chunks[name], recipe, each) for name in reversed(SPLITS)}
            codec = learn_codec(chunks["train"], characters["train"], recipe, work)
            splits = {name: encode(name, chunks[name], codec, recipe, out, each) for name in SPLITS}
        codec.save(out)
        made = {"vocabulary": codec.size, "merges": len(codec.merges), "codec": codec.digest, "splits": splits}
        write_json(out / MANIFEST, task | made)
        shutil.rmtree(work)
    logging.info("%s is complete: %s pieces in the vocabulary; lines left:", out, f"{codec.size:,}")
    logging.info("\n".join(_table(splits)))


def prepare_grammar(out: Path, wait: bool = False) -> None:
    toy_text.write(out / "text")
    prepare(GRAMMAR, out / "text", out, wait=wait)


def verify(out: Path) -> list[str]:
    """One line for each damaged file. UserError if there is no finished preparation."""
    manifest = finished(out)
    if manifest is None:
        raise UserError(f"{out} holds no finished preparation: there is no manifest.json")
    bad = []
    if Codec.load(out).digest != manifest["codec"]:
        bad.append(f"{out / 'codec.json'} is not the one that the data was made with")
    digests = {out / name: digest for split in SPLITS for name, digest in manifest["splits"][split]["sha256"].items()}
    for path, digest in digests.items():
        if not path.exists():
            bad.append(f"{path} is missing")
        elif file_sha256(path) != digest:
            bad.append(f"{path} has changed")
    return bad


def _scan(recipe: Recipe, folder: Path, unpacked: Path) -> dict[str, list[Pair]]:
    """Both sides of each split's files. Small splits come first: their errors show at once."""
    languages = (recipe.source, recipe.target)
    for language in languages:
        moses(language)  # raises if there are no rules
    splits = {"test": [recipe.test], "valid": [recipe.valid], "train": recipe.train}
    paths = find_texts(folder, [text for texts in splits.values() for text in texts], languages, unpacked)
    return {name: [scan_pair(paths[text], recipe.lines.get(text)) for text in texts] for name, texts in splits.items()}


def _describe(recipe: Recipe, inputs: dict[str, list[Pair]]) -> dict[str, Any]:
    """The manifest's head."""
    return {
        "recipe": recipe.name,
        "source": recipe.source,
        "target": recipe.target,
        "text": RULES,
        "libraries": {name: version(name) for name in ("sacremoses", "tokenizers")},
        "settings": {"merges": recipe.merges, "max_length": recipe.max_length, "ratio": recipe.ratio},
        "inputs": {
            name: [{file.path.name: {"lines": file.lines, "sha256": file.sha256} for file in pair} for pair in pairs]
            for name, pairs in inputs.items()
        },
    }


def _claim(work: Path, task: dict[str, Any]) -> None:
    path = work / "task.json"
    if not path.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_json(path, task)
    elif json.loads(path.read_text(encoding="utf-8")) == task:
        logging.info("going on with the preparation in %s", work)
    else:
        raise UserError(f"{work} holds an unfinished preparation of other data or settings: delete it to begin anew")


def _table(splits: dict[str, Any]) -> list[str]:
    filters = list(splits["train"]["lines"])
    rows = [("split", *filters, "unknown")]
    for name, entry in splits.items():
        sides = [side for side in entry.values() if isinstance(side, dict) and "unknown" in side]
        share = sum(side["unknown"] for side in sides) / sum(side["tokens"] for side in sides)
        rows.append((name, *(f"{entry['lines'].get(key, entry['pairs']):,}" for key in filters), f"{share:.4%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nmt.prepare", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    archives = commands.add_parser("download", help="the archives of WMT14 English-German, 1.7 GB")
    archives.add_argument("source", type=Path, help="folder to put them into")
    wmt14 = commands.add_parser(WMT14.name, help="WMT14 English-German as in the paper")
    wmt14.add_argument("source", type=Path, help="folder with the archives, or with the text in them")
    files = commands.add_parser("files", help="parallel text of one's own; PREFIX stands for PREFIX.en and PREFIX.de")
    own = commands.add_parser(GRAMMAR.name, help="generated English-German sentences")
    verified = commands.add_parser("verify", help="compare prepared data with its checksums")
    for command in (wmt14, files, own, verified):
        command.add_argument("out", type=Path, help="folder of the prepared data")
    for command in (wmt14, files):
        command.add_argument("--workers", type=positive, default=core_count(), help="processes (default: all cores)")
    files.add_argument("--name", required=True, help="data.name in the configs")
    files.add_argument("--train", required=True, nargs="+", metavar="PREFIX")
    files.add_argument("--valid", required=True, metavar="PREFIX")
    files.add_argument("--test", required=True, metavar="PREFIX")
    files.add_argument("--merges", type=positive, required=True, help="of the joint BPE, e.g. 8000 for 30,000 pairs")
    files.add_argument("--max-length", type=positive, default=250, help="pieces on a side (default: 250)")
    files.add_argument("--ratio", type=float, default=2.0, help="longer side to shorter, in pieces (default: 2)")
    files.add_argument("--source", default="en", help="language (default: en)")
    files.add_argument("--target", default="de", help="language (default: de)")
    return parser.parse_args(arguments)

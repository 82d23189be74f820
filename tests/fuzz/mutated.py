"""Mutated input: each must work, or end in one line of the project's own. No traceback, hang, crash or loss.

    python -m tests.fuzz.mutated KIND [COUNT] [SEED]      KIND: config checkpoint lmdb shard text image

From the root of the repository. Case n of a seed is the same on every machine. Cases run in forked processes of 200
each, so that a crash or a hang does not end the script.
"""

import io
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from random import Random

import torch

from engine.errors import UserError, settings_of

Case = Callable[[Random, Path], None]  # works, or raises UserError
SECONDS = 600  # for one case, by the clock: other work may hold the machine
AT_ONCE = 200  # cases of one process

WORDS = """
0 -1 1 010 0x10 0o7 1e-4 1e999 .nan -.inf 1:30 1_000 9999999999999999999 0,1 2020-01-01 yes null true ~ "" '' [] {}
[1,2] {a:1} {lr:0,1} {name:sgd,lr:0.1} text "010" !!int !!binary <<: *a &a %YAML --- ... : - ? | > @ ` \\ é
""".split()
WORDS += ["\x00", "\t", "\ufeff", "\u2028", "\ud800", "{name: [}", "a: b: c", "9" * 5000, "[" * 2000, "x" * 10_000]


def mutated(data: bytes, random: Random) -> bytes:
    """`data` after one to four changes of bits, bytes, and pieces."""
    for _ in range(random.choice((1, 1, 2, 4))):
        position, length = random.randrange(len(data) + 1), random.choice((1, 2, 8, 100, len(data) // 2))
        piece = data[position : position + length]
        change = random.randrange(6)
        if change == 0 and position < len(data):
            data = data[:position] + bytes([data[position] ^ 1 << random.randrange(8)]) + data[position + 1 :]
        elif change == 1:
            data = data[:position] + random.randbytes(len(piece)) + data[position + length :]
        elif change == 2:
            data = data[:position]
        elif change == 3:
            data = data[:position] + data[position + length :]
        elif change == 4:
            data = data[:position] + random.choice((piece, bytes(length), b"\xff" * 4, b"\n")) + data[position:]
        else:
            elsewhere = random.randrange(len(data) + 1)
            data = data[:elsewhere] + piece + data[elsewhere + len(piece) :]
    return data


def config_case(work: Path) -> Case:
    """A config of the repository with changed words, and changed overrides."""
    import classification.train
    import language_model.train
    import nmt.train
    from engine.config import dump_config, load_config
    from optim import create_optimizer, create_schedule

    tasks = {"cifar10": classification, "imagenet": classification, "digits": classification}
    tasks |= {"pydoc_topics": language_model, "one_billion_words": language_model, "grammar": nmt, "wmt14_en_de": nmt}
    texts = {
        path: (
            tasks[path.parent.name].train.Config,
            dump_config(load_config(tasks[path.parent.name].train.Config, path)),
        )
        for path in sorted(Path("configs").glob("*/*.yaml"))
        if path.parent.name in tasks and path.stem not in ("base", "published")
    }

    def case(random: Random, work: Path) -> None:
        config, text = texts[random.choice(sorted(texts))]
        if random.random() < 0.5:
            words = text.split(" ")
            for _ in range(random.choice((1, 2, 5))):
                words[random.randrange(len(words))] = random.choice(WORDS) + random.choice(("", "\n", ","))
            data = " ".join(words).encode("utf-8", "surrogatepass")
        else:
            data = mutated(text.encode(), random)
        path = work / "config.yaml"
        path.write_bytes(data)
        keys = [line.split(":")[0].strip() for line in text.splitlines()] + [
            "optimizer.lr",
            "schedule.name",
            "data.root",
            ".",
            "a..b",
        ]
        overrides = [f"{random.choice(keys)}={random.choice(WORDS)}" for _ in range(random.choice((0, 0, 1, 2)))]
        found = load_config(config, path, overrides)
        again = work / "again.yaml"
        again.write_text(dump_config(found), encoding="utf-8")
        if load_config(config, again) != found:
            raise AssertionError(f"another config after saving: {overrides}")
        parameter = torch.nn.Parameter(torch.zeros(2))
        with settings_of("optimizer"):
            optimizer = create_optimizer(found.optimizer.name, [parameter], **found.optimizer.settings)
        with settings_of("schedule"):
            create_schedule(optimizer, found.schedule.name, total=3, **found.schedule.settings)

    return case


def checkpoint_case(work: Path) -> Case:
    """A changed file beside a whole older one, which must be what is used; or a whole file of changed values."""
    from engine.checkpoint import Checkpoints, Progress, write_checkpoint
    from engine.distributed import World

    alone = World(0, 1, 0, torch.device("cpu"))

    def checkpoints(folder: Path) -> tuple[Checkpoints, torch.nn.Module]:
        model = torch.nn.Linear(20, 20)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(2, 20)).sum().backward()
        optimizer.step()
        parts = {"model": model, "optimizer": optimizer}
        return Checkpoints(folder, parts, alone, keep=2, minutes=1, say=lambda text: None), model

    saver, model = checkpoints(work)
    for update in (1, 2):
        saver.save(Progress(update=update), {"window": torch.zeros(3)})
    older, newer = ((work / name).read_bytes() for name in ("checkpoint.1.pt", "checkpoint.pt"))
    whole = torch.load(work / "checkpoint.pt", weights_only=True)

    def case(random: Random, work: Path) -> None:
        for path in work.glob("checkpoint*"):
            path.unlink()
        reader, other = checkpoints(work)
        if random.random() < 0.8:
            data = mutated(newer, random)
            (work / "checkpoint.pt").write_bytes(data)
            (work / "checkpoint.1.pt").write_bytes(older)
            progress = Progress()
            reader.restore(progress)
            if progress.update != (2 if data == newer else 1) or not torch.equal(other.weight, model.weight):
                raise AssertionError("not what was saved")
            if (work / "checkpoint.1.pt").read_bytes() != older:
                raise AssertionError("the whole checkpoint is lost")
        else:
            values = dict(whole)
            place, inside = values, random.choice([None, *values])
            if inside and isinstance(values[inside], dict):
                place = values[inside] = dict(values[inside])
            key = random.choice(list(place))
            other_values = (None, 1, "x", [], {}, torch.ones(3), {"x": torch.ones(2)}, float("nan"))
            place[key if random.random() < 0.8 else "other"] = random.choice(other_values)
            if random.random() < 0.3:
                place.pop(key, None)
            write_checkpoint(work, values, keep=1)
            reader.restore(Progress())

    return case


def lmdb_case(work: Path) -> Case:
    """A changed LMDB of a few images: each record is read as it was, or refused."""
    from PIL import Image

    from classification.image_files import DamagedImage
    from classification.imagenet.lmdb import LmdbSplit, Record, SplitWriter

    images = []
    for number in range(6):
        file = io.BytesIO()
        Image.effect_noise((60, 50), 40 + number).save(file, "JPEG")
        images.append(Record(number % 2, file.getvalue()))
    writer = SplitWriter(work / "train.lmdb", "inputs", ["a", "b"])
    writer.append(images)
    del writer
    content = (work / "train.lmdb").read_bytes()

    def case(random: Random, work: Path) -> None:
        path = work / f"case{random.randrange(1 << 60)}.lmdb"
        path.write_bytes(mutated(content, random))
        try:
            split = LmdbSplit(path, ["a", "b"])
            for index in range(len(split)):
                try:
                    label, image = split[index]
                    if (label, bytes(image)) != images[index]:
                        raise AssertionError("another record than was written")
                except DamagedImage:
                    split.name_of(index)
        finally:
            path.unlink()

    return case


def shard_case(work: Path) -> Case:
    """A prepared corpus with one changed file: it is read as it was, or refused."""
    from language_model.prepared import open_corpus, write_manifest, write_shard
    from language_model.raw_text import Part
    from language_model.vocabulary import count_words, counted_vocabulary, digest

    text = "the dog sees a cat\nthe cat sees\n" * 40
    vocabulary = counted_vocabulary([count_words([text])], 1)
    content = vocabulary.dump().encode()
    (work / "vocabulary.txt").write_bytes(content)
    parts = [Part(split, "news", 0, 0, len(text), data=text.encode()) for split in ("train", "test")]
    shards = [write_shard(part, vocabulary, work) for part in parts]
    described = {"words": len(vocabulary), "sha256": digest(content)}
    write_manifest(
        work,
        {"made_from": {}, "vocabulary": described, "dtype": "<u2", "train": {}, "test": {}, "shards": shards},
    )
    files = {path: path.read_bytes() for path in sorted(work.rglob("*")) if path.is_file()}
    right = [[array.tolist() for array in shard.read()] for shard in open_corpus(work).train]

    def case(random: Random, work: Path) -> None:
        path = random.choice(list(files))
        if path.name == "manifest.json" and random.random() < 0.8:  # its content is trusted where it is JSON
            path = random.choice([one for one in files if one.name != "manifest.json"])
        path.write_bytes(mutated(files[path], random))
        try:
            found = [[array.tolist() for array in shard.read()] for shard in open_corpus(work).train]
            if path.name != "manifest.json" and found != right:
                raise AssertionError("other text than was written")
        finally:
            path.write_bytes(files[path])

    return case


def text_case(work: Path) -> Case:
    """Changed text files of every kind that is read: vocabularies, JSON, sentences."""
    from engine.files import read_json
    from engine.manifest import read_manifest
    from language_model.raw_text import Part
    from language_model.vocabulary import read_vocabulary
    from nmt.prepare.raw_text import scan

    pairs = b"the 150\ndog 50\nsees 50\n<S> 50\n</S> 50\n<UNK> 1\n"
    manifest = (
        b'{"format": 2, "shards": [{"name": "a", "tokens": 12}], "dtype": "<u2", "x": [1.5, null, true, "\\u00e9"]}'
    )
    sentences = "Ein Mann in einem Boot.\r\nZwei Hunde rennen im Gras – schnell.\n\n日本語\u2028x\n".encode() * 3
    readers = {
        "vocabulary.txt": (pairs, read_vocabulary),
        "manifest.json": (manifest, lambda path: read_manifest(path.parent, {"shards": [dict]}, "make it", 2)),
        "result.json": (manifest, read_json),
        "text": (sentences, lambda path: [file.read(chunk) for file in [scan(path)] for chunk in range(file.chunks)]),
        "news": (sentences, lambda path: list(Part("train", "news", 0, 0, path.stat().st_size, path=path).texts())),
    }

    def case(random: Random, work: Path) -> None:
        name = random.choice(list(readers))
        content, read = readers[name]
        (work / name).write_bytes(mutated(content, random))
        read(work / name)

    return case


def image_case(work: Path) -> Case:
    """Changed images of several formats: a square of pixels, or DamagedImage in one line."""
    from PIL import Image

    from classification.image_files import DamagedImage
    from classification.imagenet.decode import DECODERS, central_view, random_view

    images = []
    for mode in ("L", "RGB", "CMYK"):
        picture = Image.effect_noise((90, 70), 60).convert(mode)
        for kind, settings in (("JPEG", {}), ("JPEG", {"progressive": True}), ("TIFF", {}), ("PNG", {}), ("GIF", {})):
            if not (mode == "CMYK" and kind in ("PNG", "GIF")):
                file = io.BytesIO()
                picture.save(file, kind, **settings)
                images.append(file.getvalue())

    def case(random: Random, work: Path) -> None:
        image = mutated(random.choice(images), random)
        for decode in DECODERS.values():
            view = random.choice(
                (lambda w, h: random_view(w, h, 32, Random(1)), lambda w, h: central_view(w, h, 40, 32))
            )
            try:
                pixels = decode(image, view, 32)
            except DamagedImage as error:
                raise UserError(str(error)) from None
            if tuple(pixels.shape) != (32, 32, 3):
                raise AssertionError(f"an image of shape {tuple(pixels.shape)}")

    return case


KINDS = {
    "config": config_case,
    "checkpoint": checkpoint_case,
    "lmdb": lmdb_case,
    "shard": shard_case,
    "text": text_case,
    "image": image_case,
}


def run_case(case: Case, kind: str, seed: int, number: int, work: Path) -> bool:
    """Whether case `number` worked; False where it was refused in one line. Any other end is an error."""
    try:
        with redirect_stderr(io.StringIO()):  # decoders warn
            case(Random(f"{kind} {seed} {number}"), work)
    except UserError as error:
        message = " ".join(str(error).split())
        if not message or "Traceback" in message:
            raise AssertionError(f"case {number}: refused without words") from error
        return False
    return True


def run_forked(case: Case, kind: str, seed: int, numbers: range, work: Path) -> list[str]:
    """Run the cases in a process of their own; returns what went wrong."""
    log = work.parent / "failed"
    log.write_bytes(b"")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process
        with open(log, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
            for number in numbers:
                signal.alarm(SECONDS)
                file.write(f"at {number}\n")
                try:
                    run_case(case, kind, seed, number, work)
                except BaseException as error:
                    file.write(f"case {number}: {type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = log.read_text(encoding="utf-8").splitlines()
    failed = [line for line in lines if line.startswith("case")]
    if status:
        last = next((line for line in reversed(lines) if line.startswith("at")), "at the start")
        failed.append(f"{last}: the process ended with status {os.waitstatus_to_exitcode(status)}")
    return failed


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in KINDS:
        print(__doc__)
        return 2
    kind, count, seed = arguments[0], int(arguments[1]) if arguments[1:] else 10_000, int((arguments[2:] or ["1"])[0])
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        case = KINDS[kind](work)
        failures = 0
        for first in range(0, count, AT_ONCE):
            for failed in run_forked(case, kind, seed, range(first, min(first + AT_ONCE, count)), work):
                print(failed, flush=True)
                failures += 1
    print(f"{kind}: {count:,} cases of seed {seed}, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))

"""A small corpus in the layout of One Billion Words, and the published way to encode it, line by line."""

import codecs
import io
from pathlib import Path

from language_model.toy_text import paragraphs

TRAIN, HELD_OUT = "training-monolingual.tokenized.shuffled", "heldout-monolingual.tokenized.shuffled"
TEST_FILES = ("news.en.heldout-00000-of-00050", "news.en.heldout-00001-of-00050")


def make_corpus(root: Path, files: int = 5, lines: int = 200) -> Path:
    """`files` training and two held-out files of `lines` sentences each: the paragraphs of Python's own manual."""
    text = paragraphs()
    names = [f"{TRAIN}/news.en-{number:05}-of-00100" for number in range(1, files + 1)]
    names += [f"{HELD_OUT}/{name}" for name in TEST_FILES]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join(text[number * lines : (number + 1) * lines]) + "\n", encoding="utf-8")
    return root


def make_vocabulary(path: Path, words: list[str], marks: tuple[str, ...] = ("<S>", "<UNK>")) -> Path:
    """A file of lines `word count` with falling counts."""
    every = [*marks, *words]
    lines = (f"{word} {2 * len(every) - number}\n" for number, word in enumerate(every))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def encode_line_by_line(text: str, ids: dict[str, int]) -> list[list[int]]:
    """The published encoder: one list a sentence, no empty lines."""
    sentences = []
    for line in codecs.getreader("utf-8")(io.BytesIO(text.encode())).readlines():
        if line and not line.isspace():
            words = [ids.get(word, ids["<UNK>"]) for word in line.strip().split()]
            sentences.append([ids["<S>"], *words, ids["</S>"]])
    return sentences

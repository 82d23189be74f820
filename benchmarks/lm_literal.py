"""The published way to encode a corpus: python -m benchmarks.lm_literal SOURCE OUT VOCABULARY"""

import pickle
import sys
from pathlib import Path

from language_model.raw_text import FOLDERS


def main(source: Path, out: Path, vocabulary: Path) -> None:
    ids: dict[str, int] = {}
    with open(vocabulary, encoding="utf-8") as file:
        for line in file:
            ids[line.split()[0]] = len(ids)
    out.mkdir(parents=True)
    for path in sorted((source / FOLDERS["train"]).iterdir()):
        sentences = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.isspace():
                    continue
                words = [ids.get(word, ids["<UNK>"]) for word in line.strip().split()]
                sentences.append([ids["<S>"]] + words + [ids["</S>"]])
        with open(out / f"{path.name}.pickle", "wb") as file:
            pickle.dump(sentences, file)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

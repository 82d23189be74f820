"""Translate standard input, line by line: echo "A dog runs." | python -m nmt.translate RUN|BUNDLE [key=value ...]

RUN is a run folder. BUNDLE comes from `python -m scripts.report --bundle RUN`. An empty line stays empty.
key=value changes the config: decoding.beam=4 average.last=1 eval_batch=8192 device=cpu.
"""

import sys
from contextlib import closing
from pathlib import Path

from engine.errors import UserError, run_main
from nmt.beam_search import translate
from nmt.codec import Codec
from nmt.trained import open_run

USAGE = "usage: python -m nmt.translate RUN|BUNDLE [key=value ...] < TEXT     e.g. runs/grammar/apollo_milestone/seed1"
LONGEST = 1024  # words of the vocabulary in a line


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    config, codec, model, _, world = open_run(Path(arguments[0]), arguments[1:])
    sources = read_sentences(codec)
    filled = [ids for ids in sources if ids]
    decoding = config.decoding
    with closing(world):
        found = iter(translate(model, filled, decoding.beam, decoding.length_penalty, config.eval_batch, progress=True))
    sys.stdout.reconfigure(encoding="utf-8")
    for ids in sources:
        print(codec.decode(next(found).words) if ids else "")
    return 0


def read_sentences(codec: Codec) -> list[list[int]]:
    """Standard input as ids. UserError if a line is not UTF-8 or too long."""
    lines = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            lines.append(line.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of the input is not UTF-8 ({error.reason}): convert it first") from None
    sources = codec.encode_lines(lines)
    for number, ids in enumerate(sources, 1):
        if len(ids) > LONGEST:
            raise UserError(
                f"line {number} of the input has {len(ids):,} words of the vocabulary, and {LONGEST:,} is the most: "
                "put each sentence on a line of its own"
            )
    return sources


if __name__ == "__main__":
    run_main(main)

"""Score a run on its test set: python -m nmt.evaluate RUN|BUNDLE [key=value ...]     (also under torchrun)

RUN is a run folder, finished or not, whose averaged weights are used. BUNDLE comes from
`python -m scripts.report --bundle RUN`. key=value changes the config: average.last=5 decoding.beam=4
decoding.length_penalty=1.0 eval_batch=8192 data.root=... device=cpu.
"""

from contextlib import closing
from pathlib import Path

from engine.errors import UserError, run_main
from nmt.data import load_data
from nmt.scoring import all_scores, translate_split
from nmt.trained import open_run

USAGE = "usage: python -m nmt.evaluate RUN|BUNDLE [key=value ...]    e.g. runs/grammar/apollo_milestone/seed1"


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    config, codec, model, updates, world = open_run(Path(arguments[0]), arguments[1:])
    decoding = config.decoding
    with closing(world):
        data = load_data(config.data.name, config.data.root)
        if data.codec.digest != codec.digest:
            raise UserError(f"{config.data.root} has another vocabulary than {arguments[0]}: set data.root")
        hypotheses = translate_split(model, data.test, decoding, config.eval_batch, world)
    if not world.is_main:
        return 0
    scores = all_scores(hypotheses, data.test.references, codec)
    print(f"{len(data.test):,} pairs, beam {decoding.beam}, length penalty {decoding.length_penalty}")
    if updates:
        print(f"weights averaged over {len(updates)}: those after {', '.join(map(str, updates))} updates")
    else:
        print(f"weights averaged over all updates: decay {config.average.decay}")
    print(f"fairseq's BLEU       {scores['fairseq_bleu']:6.2f}   the one to hold against the published table")
    print(f"sacreBLEU            {scores['sacrebleu']:6.2f}   {scores['signature']}")
    print(f"compound-split BLEU  {scores['compound_split_bleu']:6.2f}")
    print(f"tokenized BLEU       {scores['tokenized_bleu']:6.2f}")
    return 0


if __name__ == "__main__":
    run_main(main)

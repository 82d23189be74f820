"""WMT14 in every form in which people have it, with generated text: {path below the source: bytes}."""

import io
import tarfile
import zipfile

from nmt.prepare.recipes import WMT14
from nmt.prepare.toy_text import generate

TRAINING = {"europarl-v7.de-en": "training/", "commoncrawl.de-en": "", "news-commentary-v9.de-en": "training/"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def toy_texts(lines: int = 20) -> dict[str, str]:
    """The files of the recipe by name. No two texts share a pair of lines."""
    pairs, found = generate(5 * lines), {}
    for number, text in enumerate((*WMT14.train, WMT14.valid, WMT14.test)):
        sides = zip(*pairs[lines * number : lines * (number + 1)], strict=True)
        for language, side in zip(("en", "de"), sides, strict=True):
            found[f"{text}.{language}"] = "".join(f"{line}\n" for line in side)
    return found


def sgm(text):
    segments = "".join(f'<seg id="{number}">{line}</seg>\n' for number, line in enumerate(text.splitlines(), 1))
    return f'<srcset setid="x" srclang="any">\n<doc docid="1">\n<p>\n{segments}</p>\n</doc>\n</srcset>\n'


def plain(texts):
    return {name: text.encode() for name, text in texts.items()}


def with_byte_order_marks(texts):
    return {name: BYTE_ORDER_MARK + text.encode() for name, text in texts.items()}


def orig(texts):
    """What fairseq's prepare-wmt14en2de.sh --icml17 leaves in orig/."""
    files = {
        f"{folder}{text}.{side}": texts[f"{text}.{side}"] for text, folder in TRAINING.items() for side in ("en", "de")
    }
    files |= {f"dev/newstest2013.{side}": texts[f"newstest2013.{side}"] for side in ("en", "de")}
    files |= {f"dev/newstest2013-src.{side}.sgm": "not this one" for side in ("en", "de")}
    files["test-full/newstest2014-deen-src.en.sgm"] = sgm(texts["newstest2014.en"])
    files["test-full/newstest2014-deen-ref.de.sgm"] = sgm(texts["newstest2014.de"])
    files |= {f"test-full/newstest2014-deen-{name}.sgm": "nor this" for name in ("ref.en", "src.de")}
    return {name: text.encode() for name, text in files.items()}


def pack(name, files):
    packed = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(packed, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def training_archives(texts, suffix):
    names = ("training-parallel-europarl-v7", "training-parallel-commoncrawl", "training-parallel-nc-v9")
    return {
        name + suffix: pack(
            name + suffix, {f"{folder}{text}.{side}": texts[f"{text}.{side}"].encode() for side in ("de", "en")}
        )
        for name, (text, folder) in zip(names, TRAINING.items(), strict=True)
    }


def statmt_archives(texts):
    test = {f"test/newstest2013-src.{side}.sgm": sgm(texts[f"newstest2013.{side}"]).encode() for side in ("en", "de")}
    full = {name: content for name, content in orig(texts).items() if name.startswith("test-full/")}
    return training_archives(texts, ".tgz") | {"test.tgz": pack("", test), "test-full.tgz": pack("", full)}


def dev_archive(texts):
    """statmt's dev.tgz beside plain training text. In its test set the sides have exchanged roles."""
    files = {name: content for name, content in orig(texts).items() if name.startswith("dev/")}
    files["dev/newstest2014-deen-ref.en.sgm"] = sgm(texts["newstest2014.en"]).encode()
    files["dev/newstest2014-deen-src.de.sgm"] = sgm(texts["newstest2014.de"]).encode()
    train = {name: content for name, content in plain(texts).items() if "newstest" not in name}
    return train | {"dev.tgz": pack("dev.tgz", files)}


def hub_archives(texts):
    files = {f"dev/newstest2013.{side}": texts[f"newstest2013.{side}"].encode() for side in ("en", "de")}
    files["dev/newstest2014-deen-ref.en.sgm"] = sgm(texts["newstest2014.en"]).encode()
    files["dev/newstest2014-deen-src.de.sgm"] = sgm(texts["newstest2014.de"]).encode()
    return training_archives(texts, ".zip") | {"dev.zip": pack("dev.zip", files)}

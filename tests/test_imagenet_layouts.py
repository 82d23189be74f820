"""Every layout in which people have ImageNet builds the same labelled images."""

import gzip
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
from imagenet_images import CLASSES
from imagenet_layouts import (
    IDS,
    IN_ORDER,
    STREAMED,
    Download,
    build_until,
    caffe,
    caffe_by_option,
    class_folders,
    ground_truth_and_ids_by_option,
    hugging_face_archives,
    hugging_face_parquet,
    kaggle,
    kit_2012_loose,
    kit_2017_unpacked,
    make_toy,
    oddities,
    paddle,
    tars_and_kit_2012,
    tars_and_kit_2017,
    tensorflow,
)

from classification.imagenet.labels import LabelFiles
from classification.imagenet.lmdb import SplitWriter, open_splits
from classification.imagenet.prepare import MD5, build, main, verify, verify_archives
from classification.imagenet.raw import find_source, list_folder
from engine.errors import UserError
from engine.manifest import MANIFEST

TOY = make_toy()
OTHERS = (tars_and_kit_2012, tars_and_kit_2017, ground_truth_and_ids_by_option, caffe_by_option)
IN_FOLDERS = [layout for layout in IN_ORDER if layout not in OTHERS]
TEXTS = [kaggle, caffe, paddle, tensorflow, kit_2012_loose, kit_2017_unpacked, ground_truth_and_ids_by_option]


def write(layout, root, bom=False):
    if layout is hugging_face_parquet:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: the parquet form is not tested")
    return layout(TOY, root, bom)


def found(download):
    return find_source(download.source, LabelFiles(**download.options))


def refused(download) -> str:
    with pytest.raises(UserError) as caught:
        found(download)
    return str(caught.value)


def expected(images):
    return [(CLASSES.index(wnid), content) for _, wnid, content in images]


def records(split):
    return [(record.label, bytes(record.image)) for record in (split[index] for index in range(len(split)))]


@pytest.mark.parametrize("bom", [False, True], ids=["", "byte order mark"])
@pytest.mark.parametrize("layout", IN_ORDER + STREAMED, ids=lambda layout: layout.__name__)
def test_builds_the_same_labelled_images(layout, bom, tmp_path):
    download = write(layout, tmp_path / "download", bom)
    options = [part for name, path in download.options.items() for part in (f"--{name.replace('_', '-')}", str(path))]
    assert main(["build", str(download.source), str(tmp_path / "out"), *options]) == 0
    order = sorted if layout in STREAMED else list
    for split, images in zip(open_splits(tmp_path / "out"), TOY, strict=True):
        assert split.classes == CLASSES
        assert order(records(split)) == order(expected(images))
    assert bom or verify(tmp_path / "out", decode=True) == []


@pytest.mark.parametrize("layout", IN_FOLDERS, ids=lambda layout: layout.__name__)
def test_training_from_folders_takes_the_same_labels(layout, tmp_path):
    download = write(layout, tmp_path)
    assert [records(split) for split in list_folder(download.source)] == [expected(images) for images in TOY]


@pytest.mark.parametrize("layout", TEXTS, ids=lambda layout: layout.__name__)
def test_label_file_cut_anywhere_is_refused(layout, tmp_path):
    """A cut behind the last label is accepted, because nothing is missing."""
    download = write(layout, tmp_path)
    (text,) = download.texts
    whole = text.read_bytes()
    assert [item.label for item in found(download).val] == [label for label, _ in expected(TOY.val)]
    enough = len(whole.rstrip())
    if layout is kaggle:  # of its last line the class is enough
        enough = whole.rindex(b",") + 10
    for size in [*range(0, enough, 7), *range(enough - 12, enough)]:
        text.write_bytes(whole[:size])
        assert str(text) in refused(download) or "nothing tells" in refused(download)


WRONG = {
    "one too many": lambda lines: [*lines, lines[-1]],
    "one too few": lambda lines: lines[:-1],
    "not text": lambda lines: ["\udcff\udcfe", *lines],
    "a stray line": lambda lines: [*lines[:-1], "<html> not found"],
    "of other classes": lambda lines: [line.replace("n0", "n9").replace("3", "9").replace("2", "9") for line in lines],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("layout", TEXTS, ids=lambda layout: layout.__name__)
def test_foreign_label_file_is_refused(layout, wrong, tmp_path):
    download = write(layout, tmp_path)
    (text,) = download.texts
    lines = text.read_text().split("\n")[:-1]
    text.write_bytes("".join(f"{line}\n" for line in WRONG[wrong](lines)).encode("utf-8", "surrogateescape"))
    assert str(text) in refused(download)


def caffe_labels(download, labels):
    lines = [f"{name} {label}\n" for (name, *_), label in zip(TOY.val, labels, strict=True)]
    download.texts[0].write_text("".join(lines))
    return download


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([CLASSES.index(wnid) + 1 for _, wnid, _ in TOY.val], "no list of labels from 0 to 2, .* 0 is missing"),
        ([min(CLASSES.index(wnid), 1) for _, wnid, _ in TOY.val], "no list of labels from 0 to 2, .* 2 is missing"),
        (range(1, len(TOY.val) + 1), "numbers the images from 1 to 14: these are no labels"),
        (["0", *["n01440764"] * 13], "names the class '0'"),
    ],
    ids=["counted from 1", "of fewer classes", "ImageSets' val.txt", "two kinds"],
)
def test_indices_that_are_none_are_refused(labels, message, tmp_path):
    download = caffe_labels(write(caffe, tmp_path), list(labels))
    with pytest.raises(UserError, match=message):
        found(download)


def test_files_that_contradict_each_other_are_refused(tmp_path):
    download = write(kaggle, tmp_path)
    lines = [f"{name} {CLASSES.index(wnid)}\n" for name, wnid, _ in TOY.val]
    other = download.source / "val.txt"
    other.write_text("".join(lines))
    found(download)
    other.write_text("".join([lines[0].replace(" 2", " 1"), *lines[1:]]))
    said = refused(download)
    assert f"{download.texts[0]} and {other} contradict each other" in said
    assert "ILSVRC2012_val_00000001.JPEG is n01484850 or n01443537" in said
    assert found(download._replace(options={"val_labels": download.texts[0]})).val


def test_kaggles_image_of_two_classes_is_refused(tmp_path):
    download = write(kaggle, tmp_path)
    (text,) = download.texts
    text.write_text(text.read_text().replace(f"{CLASSES[0]} 5 6 7 8", f"{CLASSES[1]} 5 6 7 8"))
    assert f"an image of two classes, {CLASSES[0]} and others" in refused(download)


@pytest.mark.parametrize("layout", [tensorflow, kit_2012_loose], ids=lambda layout: layout.__name__)
def test_labels_in_the_order_of_images_need_all_of_them(layout, tmp_path):
    """The first image and the last label are missing. So there are as many labels as images, and all are wrong."""
    download = write(layout, tmp_path)
    text = download.texts[0]
    next(download.source.glob("val*/*_00000001.JPEG")).unlink()
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:-1]))
    assert "they are not numbered from 1 to 13: some are missing" in refused(download)


def test_labels_in_the_order_of_images_need_one_order(tmp_path):
    download = write(tensorflow, tmp_path)
    for path in sorted((download.source / "validation").iterdir()):
        path.rename(path.with_name(f"{int(path.stem[-8:])}.JPEG"))
    assert "their names have two" in refused(download)


def test_ids_in_another_order_than_the_kits_are_refused(tmp_path):
    """The kits' list is not in sorted order. The class of id 1 shows whether a list is."""
    download = write(ground_truth_and_ids_by_option, tmp_path)
    download.options["ids"].write_text("\n".join(["n01440764", "n02119789"]))
    assert "id 1 is n02119789" in refused(download)
    download.options["ids"].write_text("n01440764 tench\n")
    assert "is neither a class alone nor a class with its id" in refused(download)
    download.options["ids"].write_text("".join(f"{wnid} {at} a_name\n" for at, wnid in reversed(IDS.items())))
    assert [item.label for item in found(download).val] == [label for label, _ in expected(TOY.val)]


@pytest.mark.parametrize("content", [b"", b"not a kit's", "cut", "flipped"], ids=str)
def test_damaged_meta_is_one_line(content, tmp_path):
    """Some of these crash scipy."""
    download = write(kit_2012_loose, tmp_path)
    path = download.source / "meta.mat"
    whole = path.read_bytes()
    bits = bytearray(whole)
    for at in range(130, len(whole), 3):
        bits[at] ^= 4
    path.write_bytes({"cut": whole[: len(whole) // 2], "flipped": bytes(bits)}.get(content, content))
    assert refused(download).startswith(f"{path} is damaged, or not the development kit's")


def test_what_is_missing_is_named_by_its_full_path(tmp_path):
    download = write(kaggle, tmp_path / "a")
    download.texts[0].unlink()
    assert str(tmp_path / "a" / "LOC_val_solution.csv") in refused(download)
    for source in (download.source / "ILSVRC", download.source / "ILSVRC" / "Data" / "CLS-LOC"):
        assert str(tmp_path / "a" / "LOC_val_solution.csv") in refused(download._replace(source=source))
    download = write(kit_2012_loose, tmp_path / "b")
    (download.source / "meta.mat").unlink()
    assert str(download.source / "ILSVRC2012_devkit_t12.tar.gz") in refused(download)
    (download.source / "val").rename(download.source / "other")
    assert f"{download.source}/val or {download.source}/validation is not there" in refused(download)
    for name in ("val", "validation"):
        shutil.copytree(download.source / "other", download.source / name)
    assert "is both there" in refused(download)


def test_a_wrong_source_is_told_the_nearest_right_one(tmp_path):
    right = write(kaggle, tmp_path / "downloads" / "kaggle").source
    tree = right / "ILSVRC" / "Data" / "CLS-LOC"
    write(tars_and_kit_2012, tmp_path / "tars")
    for source, near in [
        (tmp_path / "downloads", right),
        (tree / "train", tree),
        (tree / "train" / CLASSES[0], tree),
        (right / "LOC_val_solution.csv", right),
        (right.parent / "kagle", right),
        (tmp_path / "tars" / "ILSVRC2012_img_train.tar", tmp_path / "tars"),
    ]:
        assert refused(Download(source)).endswith(f": give {near}, the nearest folder that has them")
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    assert refused(Download(tmp_path / "a" / "b" / "c" / "d")).endswith(": give the folder that has them")


@pytest.mark.parametrize("layout", [*STREAMED, tars_and_kit_2012], ids=lambda layout: layout.__name__)
def test_archive_that_is_truncated_anywhere_or_missing_is_named(layout, tmp_path):
    download = write(layout, tmp_path)
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        if path.name.endswith("devkit_t12.tar.gz"):
            parts = [0.5]
        else:
            # A tar file ends with at least two blocks of zeros: anything less than one of them is too little.
            parts = [0, 0.02, 0.5, (len(whole.rstrip(b"\0")) - 1) / len(whole)]
        for part in parts:
            path.write_bytes(whole[: int(part * len(whole))])
            assert path.name in refused(download), (path, part)
        path.unlink()
        assert path.name in refused(download)
        path.write_bytes(whole)
    found(download)


def test_tar_file_with_an_unreadable_header_is_refused(tmp_path):
    """tarfile reads such a header as the end of the file, and does not mention the images behind it."""
    download = write(tars_and_kit_2012, tmp_path)
    for name, inside in (
        ("ILSVRC2012_img_val.tar", "ILSVRC2012_val_00000003"),
        ("ILSVRC2012_img_train.tar", "n01440764_11"),
    ):
        path = download.source / name
        whole = path.read_bytes()
        at = whole.index(inside.encode())
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        assert f"{name} is truncated" in refused(download)
        path.write_bytes(whole)


def test_parquet_with_other_labels_columns_or_without_images_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the parquet form is not tested")
    from pyarrow import parquet

    download = write(hugging_face_parquet, tmp_path / "download")
    val = download.source / "data" / "validation-00000-of-00002.parquet"
    whole, rows = val.read_bytes(), parquet.read_table(val).to_pylist()
    rows[1] = {"image": rows[1]["image"] | {"path": None}, "label": None}
    parquet.write_table(pyarrow.Table.from_pylist(rows), val)
    assert "row 1, without a name, has the label -1" in refused(download)
    val.write_bytes(whole)
    path = download.source / "data" / "train-00001-of-00004.parquet"
    rows = parquet.read_table(path).to_pylist()

    def rewritten(change):
        parquet.write_table(pyarrow.Table.from_pylist([change(row) for row in rows]), path)
        return refused(download)

    assert "has the label" in rewritten(lambda row: row | {"label": (row["label"] + 1) % 3})
    assert "has the label 3" in rewritten(lambda row: row | {"label": 3})
    assert "has the label -1" in rewritten(lambda row: row | {"label": -1})
    assert "nothing tells what its label" in rewritten(
        lambda row: row | {"image": {"bytes": row["image"]["bytes"], "path": "1.jpg"}}
    )
    path_of = {row["image"]["path"]: re.sub(r"_n\d+\.", ".", row["image"]["path"]) for row in rows}
    changed = [row | {"image": row["image"] | {"path": path_of[row["image"]["path"]]}} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(changed), path)  # the names that image-net.org gives are understood
    assert found(download).classes == list(CLASSES)
    assert "it is not imagenet-1k's" in rewritten(lambda row: {"text": "x", "label": row["label"]})
    rows[0]["image"]["bytes"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match="row 0 holds no image, only its path"):
        build(download.source, tmp_path / "out")


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00294.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=f"needs pyarrow: {sys.executable} -m pip install pyarrow"):
        find_source(tmp_path)


def test_the_whole_sets_classes_have_50_validation_images_each(tmp_path):
    """The numbers of images and classes are ImageNet's, but one label is wrong."""
    source = find_source(write(class_folders, tmp_path).source)
    classes = [f"n{number:08}" for number in range(1000)]
    val = [source.val[0]._replace(label=at // 50) for at in range(50_000)]
    for wrong in (False, True):
        val[7] = val[7]._replace(label=int(wrong))
        whole = source._replace(classes=classes, val=val)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("classification.imagenet.raw._find", lambda *_: whole)  # noqa: B023
            if wrong:
                with pytest.raises(UserError, match="49 validation images of the class n00000000"):
                    find_source(tmp_path)
            else:
                find_source(tmp_path)


def test_archives_are_compared_with_the_published_md5(tmp_path, monkeypatch, capsys):
    download = write(tars_and_kit_2012, tmp_path)
    assert main(["verify", str(download.source), "--archives"]) == 1
    assert capsys.readouterr().out.count("its MD5 is") == 3
    for name in MD5:
        monkeypatch.setitem(MD5, name, hashlib.md5((download.source / name).read_bytes()).hexdigest())
    assert verify_archives(download.source) == []
    with pytest.raises(UserError, match="holds no train.lmdb and val.lmdb: make them with `bash scripts/"):
        verify(download.source)
    with pytest.raises(UserError, match=r"holds none of ILSVRC2012_img_train\.tar"):
        verify_archives(tmp_path / "elsewhere")


def test_names_that_are_not_utf8_are_built_and_shown(tmp_path, capfdbinary):
    download = write(class_folders, tmp_path / "download")
    for split in ("train", "validation"):
        folder = os.fsencode(download.source / split)
        os.rename(folder + b"/" + CLASSES[2].encode(), folder + b"/\xe9t\xe9")
    first = sorted(os.listdir(folder + b"/\xe9t\xe9"))[0]
    os.rename(folder + b"/\xe9t\xe9/" + first, folder + b"/\xe9t\xe9/ILSVRC2012_val_00000000_caf\xe9.JPEG")
    (download.source / "train" / CLASSES[0] / f"{CLASSES[0]}_10.JPEG").write_bytes(b"no image")
    with open(folder + b"/\xe9t\xe9/broken.JPEG", "wb") as file:
        file.write(b"no image")
    build(download.source, tmp_path / "out")
    train, val = open_splits(tmp_path / "out")
    assert train.classes[2] == os.fsdecode(b"\xe9t\xe9")
    assert len(val) == len(TOY.val) + 1
    assert main(["verify", str(tmp_path / "out"), "--decode"]) == 1
    assert rb"(class \udce9t\udce9) is no image" in capfdbinary.readouterr().out
    assert r"broken.JPEG (class \xe9t\xe9)" in list_folder(download.source)[1].name_of(len(val) - 1)


KILLS = int(os.environ.get("BUILD_KILLS", 3))  # ten in a thorough run


@pytest.mark.parametrize("layout", [class_folders, tars_and_kit_2012, *STREAMED], ids=lambda layout: layout.__name__)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(layout, tmp_path, monkeypatch):
    for module in ("lmdb", "prepare", "raw"):
        monkeypatch.setattr(f"classification.imagenet.{module}.CHUNK", 4)
    monkeypatch.setattr(SplitWriter.__init__, "__defaults__", (1 << 14,))  # bytes of the map, which grows several times
    source, out, whole = write(layout, tmp_path / "download").source, tmp_path / "out", tmp_path / "whole"
    assert build_until(10**6, source, whole) == 0
    moments, kills = random.Random(layout.__name__), 0
    while kills < KILLS:
        status = build_until(moments.randrange(5, 5 + 90 // KILLS), source, out)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if (out / MANIFEST).exists():
            shutil.rmtree(out)
    assert build_until(10**6, source, out) == 0
    for name in ("train.lmdb", "val.lmdb", "manifest.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert verify(out) == []


def test_gzip_of_a_tar_that_was_cut_is_refused(tmp_path):
    """gzip's checksum is right, but the tar file in it is not whole."""
    download = write(hugging_face_archives, tmp_path)
    path = download.source / "data" / "val_images.tar.gz"
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:3000]))
    assert "val_images.tar.gz is truncated or damaged" in refused(download)


def test_damaged_exif_causes_no_warning():
    """Real ImageNet has such files. Pillow would warn of each, although nothing reads EXIF."""
    code = "import sys; from classification.imagenet.decode import open_rgb; open_rgb(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", code], input=oddities()["bad exif"], capture_output=True)
    assert done.returncode == 0 and done.stderr == b""

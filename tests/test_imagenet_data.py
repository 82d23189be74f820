"""ImageNet's decoders against torchvision; its batches are the same with any workers, and each image comes once."""

import io
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from imagenet_images import CLASSES, contents, encoded, make_tree, picture
from PIL import Image
from simplejpeg import encode_jpeg
from torchvision import transforms
from torchvision.transforms import functional

from classification.image_files import DamagedImage
from classification.imagenet import decode as imagenet_decode
from classification.imagenet.data import MEAN, STD, ImageNetData
from classification.imagenet.decode import DECODERS, central_view, exact, fast, random_view
from classification.imagenet.prepare import build
from engine.errors import UserError
from engine.seed import derive

SIZE, RESIZE = 32, 37


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("data") / "tree", train=10, val=5)


@pytest.fixture(scope="module")
def root(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "lmdb"
    build(tree, out)
    return out


def load(root, **settings):
    return ImageNetData(root, **{"size": SIZE, "workers": 0, "seed": 3} | settings)


def decoded(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def train_view(seed):
    return lambda width, height: random_view(width, height, SIZE, Random(seed))


def val_view(width, height):
    return central_view(width, height, RESIZE, SIZE)


KINDS = {
    "rgb": encoded(picture(1, 97, 61)),
    "444": encoded(picture(2, 61, 97), subsampling=0),
    "422": encoded(picture(14, 61, 97), subsampling=1),
    "440": encode_jpeg(np.asarray(picture(15, 61, 97)), colorsubsampling="440", colorspace="RGB"),
    "411": encode_jpeg(np.asarray(picture(16, 61, 97)), colorsubsampling="411", colorspace="RGB"),
    "no chroma": encoded(picture(17, 61, 97), keep_rgb=True, subsampling=0),
    "restarts": encoded(picture(18, 97, 61), restart_marker_blocks=3),
    "coarse": encoded(picture(19, 97, 61), quality=15),
    "progressive": encoded(picture(3, 90, 90), progressive=True),
    "grey": encoded(picture(4, 80, 70, "L")),
    "cmyk": encoded(picture(5, 80, 70, "CMYK")),
    "png": encoded(picture(6, 70, 80), "PNG"),
    "transparent png": encoded(picture(7, 70, 80, "RGBA"), "PNG"),
    "large": encoded(picture(8, 80, 60).resize((640, 480), Image.Resampling.BICUBIC)),
    "tiny": encoded(picture(9, 9, 20)),
    "long": encoded(picture(10, 200, 20)),
    "high": encoded(picture(11, 20, 200)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_torchvision_bit_for_bit(kind):
    image = decoded(KINDS[kind])
    for seed in range(20):
        left, top, right, bottom = train_view(seed)(*image.size).box
        theirs = functional.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])
        assert np.array_equal(exact(KINDS[kind], train_view(seed), SIZE), np.asarray(theirs))
    theirs = transforms.CenterCrop(SIZE)(transforms.Resize(RESIZE)(image))
    assert np.array_equal(exact(KINDS[kind], val_view, SIZE), np.asarray(theirs))


@pytest.mark.parametrize("kind", ["rgb", "444", "progressive", "grey", "no chroma"])
def test_exact_takes_the_fast_way_for_usual_images(kind, monkeypatch):
    assert imagenet_decode._is_pillows_decoder(), "this Pillow is built on another library"
    monkeypatch.setattr(imagenet_decode, "open_rgb", None)
    exact(KINDS[kind], val_view, SIZE)


def test_exact_leaves_all_to_a_pillow_of_other_pixels(monkeypatch):
    ours = [exact(KINDS[kind], val_view, SIZE) for kind in KINDS]
    monkeypatch.setattr(imagenet_decode, "_is_pillows_decoder", lambda: False)
    monkeypatch.setattr(imagenet_decode.simplejpeg, "decode_jpeg", None)
    assert all(torch.equal(exact(KINDS[kind], val_view, SIZE), one) for kind, one in zip(KINDS, ours, strict=True))


def test_exact_accepts_what_only_pillow_does():
    """The data ends before the image does, but the file has its end mark. The rest of the image is grey."""
    content = KINDS["rgb"][:-200] + b"\xff\xd9"
    theirs = transforms.CenterCrop(SIZE)(transforms.Resize(RESIZE)(decoded(content)))
    assert np.array_equal(exact(content, val_view, SIZE), np.asarray(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_fast_differs_by_less_than_a_level(kind):
    for choose in (*map(train_view, range(20)), val_view):
        ours, reference = (DECODERS[name](KINDS[kind], choose, SIZE).int() for name in ("fast", "exact"))
        limit = 2.5 if kind == "large" else 0.6  # the large one is decoded at a fraction of its size
        assert (ours - reference).abs().float().mean() < limit


@pytest.mark.parametrize("settings", [{}, {"subsampling": 0}, {"subsampling": 1}, {"optimize": True}])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("decode", DECODERS.values())
def test_stops_below_the_view_without_a_trace(decode, settings, restart):
    """A view without resizing must show the pixels of the whole image."""
    content = encoded(picture(12, 120, 150), **settings, **({"restart_marker_rows": 2} if restart else {}))
    whole = np.asarray(decoded(content))
    for top in range(0, 150 - SIZE, 7):
        view = random_view(1, 1, SIZE, Random(0))._replace(box=(40, top, 40 + SIZE, top + SIZE))
        assert np.array_equal(
            decode(content, lambda *_, view=view: view, SIZE), whole[top : top + SIZE, 40 : 40 + SIZE]
        )


@pytest.mark.parametrize("settings", [{}, {"progressive": True}])
def test_truncated_image_is_noticed_wherever_the_view_lies(settings):
    content = encoded(picture(13, 120, 150), **settings)
    for decode in DECODERS.values():
        for top in (0, 100):
            view = random_view(1, 1, SIZE, Random(0))._replace(box=(0, top, SIZE, top + SIZE))
            with pytest.raises(DamagedImage, match="cannot be decoded"):
                decode(content[: len(content) * 2 // 3], lambda *_, view=view: view, SIZE)


@pytest.mark.parametrize("kind", ["cmyk", "png", "warns"])
def test_what_fast_leaves_to_exact_is_drawn_once(kind):
    content = KINDS.get(kind) or KINDS["rgb"].replace(b"\xff\xda", b"\x00\x00\xff\xda", 1)  # stray bytes
    for seed in range(5):
        one, other = (
            decode(content, partial(random_view, size=SIZE, random=Random(seed)), SIZE) for decode in (fast, exact)
        )
        assert (one.int() - other.int()).abs().float().mean() < 0.6


def test_random_view_has_torchvisions_distribution():
    image = Image.new("RGB", (500, 375))
    torch.manual_seed(0)
    theirs = [transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    boxes = (random_view(500, 375, SIZE, Random(seed)).box for seed in range(4000))
    ours = [(top, left, bottom - top, right - left) for left, top, right, bottom in boxes]
    for a, b in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        points = np.arange(500)
        distance = np.abs((a[:, None] <= points).mean(0) - (b[:, None] <= points).mean(0)).max()
        assert distance < 1.95 * (2 / 4000) ** 0.5  # Kolmogorov and Smirnov's, at 0.1 %


@pytest.mark.parametrize("size", [(500, 20), (20, 500), (1, 1), (3, 1000)])
def test_image_too_long_for_any_crop_shows_its_middle_as_in_torchvision(size):
    image = Image.new("RGB", size)
    torch.manual_seed(0)
    for seed in range(50):
        left, top, right, bottom = random_view(*size, SIZE, Random(seed)).box
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    top, left, height, width = transforms.RandomResizedCrop.get_params(image, (2.0, 2.0), (3 / 4, 4 / 3))
    never = Random(0)
    never.random = lambda: 1.5  # an area larger than the image, ten times over
    assert random_view(*size, SIZE, never).box == (left, top, left + width, top + height)


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_are_torchvisions_pipeline(root, tree, channels_last):
    """With the same draws: decode, crop, resize, mirror, ToTensor, Normalize."""
    data = load(root, decoder="exact")
    split = data._loader.dataset.splits[0]
    ((_, (images, labels)),) = next(data.train_batches(4, 30, channels_last=channels_last))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(derive(3, "order", 4))).tolist()
    tail = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    mirrored = 0
    for image, label, index in zip(images, labels, order, strict=True):
        draws = Random(derive(3, "augmentation", 4, index))
        mirror = draws.random() < 0.5
        picture_ = decoded(split[index].image)
        left, top, right, bottom = random_view(*picture_.size, SIZE, draws).box
        theirs = functional.resized_crop(picture_, top, left, bottom - top, right - left, [SIZE, SIZE])
        theirs = functional.hflip(theirs) if mirror else theirs
        assert torch.equal(image, tail(theirs))
        assert label == split[index].label
        mirrored += mirror
    assert 0 < mirrored < 30
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    (test_images, test_labels) = next(data.test_batches(100, channels_last=channels_last))
    resize, crop = transforms.Resize(37), transforms.CenterCrop(SIZE)
    content = [path.read_bytes() for name in CLASSES for path in sorted((tree / "val" / name).iterdir())]
    assert torch.equal(test_images, torch.stack([tail(crop(resize(decoded(one)))) for one in content]))
    assert test_labels.tolist() == [label for label in range(3) for _ in range(5)]


def epoch(data, number=0, batch=12, **settings):
    return [batch for passes in data.train_batches(number, batch, **settings) for _, batch in passes]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(("workers", "method"), [(1, None), (2, None), (1, "spawn")])
def test_workers_change_nothing_and_stay_over_epochs(root, workers, method):
    alone, data = load(root), load(root, workers=workers)
    data._loader.multiprocessing_context = method
    for number in range(2):
        assert same(epoch(data, number), epoch(alone, number))
        assert same(list(data.test_batches(4)), list(alone.test_batches(4)))
    processes = data._loader._iterator._workers
    assert len(processes) == workers and all(process.is_alive() for process in processes)


def test_folder_tree_gives_what_the_lmdb_gives(root, tree):
    assert same(epoch(load(tree)), epoch(load(root)))
    assert same(epoch(load(tree, workers=1)), epoch(load(root)))
    assert same(list(load(tree).test_batches(4)), list(load(root).test_batches(4)))


def test_ranks_divide_the_passes_of_the_same_updates(root):
    data = load(root)
    whole = epoch(data)
    assert [len(labels) for _, labels in whole] == [12, 12]
    for ranks, passes in ((2, 2), (3, 6), (1, 4), (12, 12)):
        shares = [list(data.train_batches(0, 12 // passes, passes, rank, ranks)) for rank in range(ranks)]
        updates = [dict(sum(of_ranks, [])) for of_ranks in zip(*shares, strict=True)]
        in_order = [[update[index] for index in range(passes)] for update in updates]
        assert same([tuple(map(torch.cat, zip(*update, strict=True))) for update in in_order], whole)
    with pytest.raises(UserError, match="larger than the training set, 30 images"):
        data.train_batches(0, 31)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_in_mid_epoch_without_reading_what_is_done(root, workers, monkeypatch):
    data = load(root, workers=workers)
    whole = epoch(data, batch=5)
    read = []
    split = data._loader.dataset.splits[0]
    monkeypatch.setattr(type(split), "name_of", None)
    original = type(split).__getitem__
    monkeypatch.setattr(type(split), "__getitem__", lambda self, index: read.append(index) or original(self, index))
    assert same(epoch(data, batch=5, start_update=4), whole[4:])
    assert workers or len(read) == 10


def test_an_epoch_shows_each_image_once_and_each_epoch_another_way(root):
    data = load(root)
    sums = [sorted(float(image.sum()) for image in epoch(data, number, batch=30)[0][0]) for number in (0, 0, 1)]
    assert sums[0] == sums[1] != sums[2]
    assert sorted(epoch(data, batch=30)[0][1].tolist()) == sorted(list(range(3)) * 10)
    assert not same(epoch(data), epoch(load(root, seed=4)))


@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_images_are_seen_as_test_images_are_and_never_trained_on(root, tree, workers):
    data, whole = load(root, validation=0.2, workers=workers), load(root)
    assert (data.train_size, data.valid_size, whole.valid_size) == (24, 6, 0)
    held = data._held_out.tolist()
    assert load(root, validation=0.2, seed=4)._held_out.tolist() == held
    paths = [path for name in CLASSES for path in sorted((tree / "train" / name).iterdir())]
    resize, crop = transforms.Resize(37), transforms.CenterCrop(SIZE)
    tail = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = torch.stack([tail(crop(resize(decoded(paths[index].read_bytes())))) for index in held])
    exact = load(root, validation=0.2, workers=workers, decoder="exact")
    assert torch.equal(torch.cat([images for images, _ in exact.valid_batches(4)]), expected)
    assert sorted(data._kept.tolist() + held) == list(range(30))
    labels = torch.cat([labels for _, labels in epoch(data)] + [labels for _, labels in data.valid_batches(4)])
    assert labels.bincount().tolist() == [10, 10, 10]


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_test_images_come_once_each_over_all_ranks(root, ranks):
    data = load(root)
    whole = torch.cat([images for images, _ in data.test_batches(4)])
    parts = [images for rank in range(ranks) for images, _ in data.test_batches(4, rank, ranks)]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole) == data.test_size == 15


def test_a_number_of_ranks_that_is_none_is_named(root, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE='two', where a whole number of 1 or more belongs: unset it"):
        load(root, workers=None)


def test_an_iteration_that_another_took_over_says_so(root):
    data = load(root, workers=1)
    first = data.train_batches(0, 6)
    next(first)
    next(data.test_batches(3))
    with pytest.raises(RuntimeError, match="another iteration"):
        next(first)


@pytest.fixture(scope="module")
def damaged(tree, tmp_path_factory):
    """A build whose first training image has a flipped bit, whose second is cut short, and whose third is no image."""
    folder = tmp_path_factory.mktemp("damaged")
    paths = sorted((tree / "train" / CLASSES[0]).iterdir())[:3]
    originals = [path.read_bytes() for path in paths]
    paths[1].write_bytes(originals[1][: len(originals[1]) // 2])
    paths[2].write_bytes(b"")
    build(tree, folder / "lmdb")
    for path, original in zip(paths, originals, strict=True):
        path.write_bytes(original)
    file = folder / "lmdb" / "train.lmdb"
    file.write_bytes(file.read_bytes().replace(originals[0][:400], originals[0][:399] + bytes([originals[0][399] ^ 4])))
    return folder / "lmdb"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_damaged_image_is_an_error_that_names_it(damaged, workers, decoder):
    with pytest.raises(UserError, match=rf"train\.lmdb, key [012] \(class {CLASSES[0]}\) .* data\.on_damaged=skip"):
        epoch(load(damaged, workers=workers, decoder=decoder), batch=30)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_skipped_and_counted(damaged, root, workers, caplog):
    data = load(damaged, workers=workers, on_damaged="skip", decoder="exact")
    skipped, whole = (epoch(one, batch=30)[0] for one in (data, load(root, decoder="exact")))
    changed = [not torch.equal(a, b) for a, b in zip(skipped[0], whole[0], strict=True)]
    assert sum(changed) == 3
    # The fourth image, in the place of the first three too.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(derive(3, "order", 0))).tolist()
    fourth = skipped[0][order.index(3)]
    assert all(torch.equal(skipped[0][order.index(index)], fourth) for index in range(3))
    assert data.take_damaged() == 6  # 0, 1, 2 in the place of 0; 1, 2 in the place of 1; 2
    assert data.take_damaged() == 0
    named = {record.getMessage().partition(":")[0] for record in caplog.records}
    assert len(named) == 3 and all(f"(class {CLASSES[0]})" in name for name in named)
    assert load(root).take_damaged() == 0


def test_damaged_validation_image_is_always_an_error(tree, tmp_path):
    path = sorted((tree / "val" / CLASSES[1]).iterdir())[2]
    original = path.read_bytes()
    path.write_bytes(b"no image")
    build(tree, tmp_path)
    path.write_bytes(original)
    with pytest.raises(UserError, match=rf"val\.lmdb, key 7 \(class {CLASSES[1]}\) .* over all validation images"):
        list(load(tmp_path, on_damaged="skip").test_batches(4))


def test_settings_and_data_that_cannot_be(root, tmp_path):
    with pytest.raises(UserError, match=r"data\.resize=20 is smaller than data\.size=32"):
        load(root, resize=20)
    with pytest.raises(UserError, match=r"data\.mean and data\.std"):
        load(root, std=[0.1, 0.2])
    with pytest.raises(UserError, match="neither an LMDB .* nor a folder tree"):
        load(tmp_path)
    for name, content in zip(("train.lmdb", "val.lmdb"), contents(2), strict=True):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="unfinished build"):
        load(tmp_path)


def test_height_given_after_the_pixels():
    """A JPEG's header may give the height 0, and a later marker the real height. No decoder here reads that marker."""
    content = KINDS["rgb"]
    frame = content.index(b"\xff\xc0")
    content = content[: frame + 5] + b"\0\0" + content[frame + 7 :]
    for decode in DECODERS.values():
        for choose in (val_view, train_view(0)):
            with pytest.raises(DamagedImage):
                decode(content, choose, SIZE)

"""The classification data sets: exactly torchvision's pixels, every image once, the same draws on any number of ranks,
and one error line for each thing that can be wrong with a folder or a download."""

import hashlib
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import functional as tv
from training_runs import process

from classification.augment import Augmentation, ImageData, Images, pixel_statistics
from classification.cifar import ARCHIVES
from classification.data import load_data, read_folder
from engine.errors import UserError


def load(name, root="nowhere", seed=1, mean=None, std=None, validation=0.0) -> ImageData:
    settings = SimpleNamespace(name=name, root=str(root), mean=mean, std=std, validation=validation)
    return load_data(settings, "cpu", seed)


def random_images(count: int, height: int = 32, width: int = 32, classes: int = 10) -> Images:
    random = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=random)
    return Images(pixels, torch.randint(classes, (count,), generator=random))


def image_data(train_size=100, test_size=23, augmentation=None, seed=1, size=(32, 32), **settings) -> ImageData:
    augmentation = augmentation or Augmentation(padding=4, flip=True)
    train, test = random_images(train_size, *size), random_images(test_size, *size)
    return ImageData(train, test, [str(i) for i in range(10)], augmentation, seed=seed, **settings)


def flat(updates) -> list:
    return [batch for passes in updates for _, batch in passes]


# --- training batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "flip", "size"), [(4, True, (32, 32)), (4, False, (32, 32)), (2, True, (24, 40)), (0, True, (8, 8))]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_training_batches_are_torchvisions_bit_for_bit(padding, flip, size, channels_last):
    source = random_images(100, *size)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    data = image_data(augmentation=Augmentation(padding, flip), size=size, mean=mean, std=std)
    order, top, left, mirror = data.draws(epoch=3)
    seen, mirrored = 0, 0
    for images, labels in flat(data.train_batches(3, 32, channels_last=channels_last)):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64 and images.shape == (32, 3, *size)
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        for image, label in zip(images, labels, strict=True):
            i = order[seen].item()
            expected = tv.pad(Image.fromarray(source.pixels[i].numpy()), padding, fill=0)
            expected = tv.crop(expected, top[i].item(), left[i].item(), *size)
            expected = tv.hflip(expected) if mirror[i] else expected
            expected = tv.normalize(tv.to_tensor(expected), mean, std)
            assert torch.equal(image, expected)
            assert label == source.labels[i]
            seen, mirrored = seen + 1, mirrored + mirror[i].item()
    assert seen == 96  # 100 images, whole batches only
    assert (mirrored > 0) == flip


def test_draws_cover_all_crops_and_half_of_the_mirrors():
    order, top, left, mirror = image_data(train_size=20_000, size=(4, 4)).draws(0)
    assert torch.equal(order.sort().values, torch.arange(20_000))
    for offset in (top, left):
        counts = torch.bincount(offset)
        assert len(counts) == 9 and (counts / 20_000 - 1 / 9).abs().max() < 0.01
    assert abs(mirror.double().mean().item() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack((top.double(), left.double(), mirror.double()))).triu(1)).max() < 0.03


def test_draws_are_a_function_of_seed_and_epoch_alone():
    data, again, other_seed = image_data(), image_data(), image_data(seed=2)
    flat(data.train_batches(0, 10))  # what was drawn before does not matter
    torch.manual_seed(123)
    for one, other in zip(data.draws(5), again.draws(5), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(data.draws(5).order, data.draws(6).order)
    assert not torch.equal(data.draws(5).top, data.draws(6).top)
    assert not torch.equal(data.draws(5).order, other_seed.draws(5).order)


@pytest.mark.parametrize(("world_size", "passes"), [(1, 4), (2, 2), (4, 4), (2, 6)])
def test_ranks_divide_the_passes_of_the_same_updates(world_size, passes):
    data = image_data()
    whole = flat(data.train_batches(2, 24))
    ranks = [list(data.train_batches(2, 24 // passes, passes, rank, world_size)) for rank in range(world_size)]
    assert len(whole) == 4 and all(len(updates) == 4 for updates in ranks)
    for update, (images, labels) in enumerate(whole):
        parts = dict(pass_ for updates in ranks for pass_ in updates[update])
        assert all(len(updates[update]) == passes // world_size for updates in ranks)
        assert torch.equal(torch.cat([parts[index][0] for index in range(passes)]), images)
        assert torch.equal(torch.cat([parts[index][1] for index in range(passes)]), labels)


def test_an_epoch_can_be_entered_at_any_update():
    data = image_data()
    whole = flat(data.train_batches(1, 16))
    for start in range(len(whole) + 1):
        rest = flat(data.train_batches(1, 16, start_update=start))
        assert len(rest) == len(whole) - start
        for (images, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_updates_per_epoch_counts_whole_batches():
    data = image_data(train_size=100)
    assert [data.updates_per_epoch(batch) for batch in (1, 32, 50, 100)] == [100, 3, 2, 1]
    with pytest.raises(UserError, match="batch=101: an update is larger than the training set, 100 images"):
        data.updates_per_epoch(101)
    with pytest.raises(UserError, match="larger than the training set"):
        data.train_batches(0, 128)
    with pytest.raises(UserError, match="batch=60 passes=2: an update is larger"):
        data.train_batches(0, 60, 2)


# --- test batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "world_size"), [(5, 1), (23, 1), (100, 1), (4, 2), (3, 3), (7, 5), (2, 30)])
def test_each_test_image_comes_once_in_order_without_padding(batch_size, world_size):
    source = random_images(23)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    data = image_data(mean=mean, std=std)
    batches = [batch for rank in range(world_size) for batch in data.test_batches(batch_size, rank, world_size)]
    assert all(0 < len(labels) <= batch_size for _, labels in batches)
    assert torch.equal(torch.cat([labels for _, labels in batches]), source.labels)
    expected = [tv.normalize(tv.to_tensor(Image.fromarray(pixels.numpy())), mean, std) for pixels in source.pixels]
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack(expected))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


# --- mean and standard deviation -------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_pixels():
    pixels = random_images(2000, 6, 5).pixels // torch.tensor([1, 2, 4], dtype=torch.uint8)
    mean, std = pixel_statistics(pixels)
    scaled = pixels.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.flatten(0, 2).std(0, correction=0).tolist(), abs=1e-12)


def test_normalised_training_set_has_mean_0_and_standard_deviation_1():
    data = image_data(train_size=128, augmentation=Augmentation(padding=0, flip=True))
    ((images, _),) = flat(data.train_batches(0, 128))
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5], [0.5]),
        (None, [0.2, 0.2, 0.0]),
        (None, [0.2, -0.2, 0.2]),
        ([0.5] * 4, None),
        ([], None),
        ([125.0] * 3, None),
    ],
)
def test_impossible_mean_or_std_is_refused(mean, std):
    with pytest.raises(UserError, match="three values each"):
        image_data(mean=mean, std=std)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_split_rendering_and_augmentation():
    data = load("digits")
    assert (data.num_classes, data.train_size, data.test_size, data.image_size) == (10, 1442, 355, (32, 32))
    assert data.augmentation == Augmentation(padding=2, flip=False)
    assert not data.draws(0).mirror.any()
    ((images, labels),) = data.test_batches(355)
    ((again, labels_again),) = load("digits", seed=7).test_batches(355)  # the split does not depend on the seed
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert torch.bincount(labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]  # a fifth of each class
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_digits_are_recognisable():
    """A classifier by the nearest class mean must work, so pictures and labels belong together."""
    data = load("digits")
    images, labels = (torch.cat(parts) for parts in zip(*flat(data.train_batches(0, 103)), strict=True))
    test_images, test_labels = next(data.test_batches(355))
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(test_images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test_labels).double().mean() > 0.8


# --- folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A tree of 8x6 PNG images: classes cat and dog, each with 4 training and 2 test images."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("dog", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def refused(root) -> str:
    """The one error line with which the folder is refused."""
    with pytest.raises(UserError) as caught:
        load("folder", root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_reads_every_image_with_its_label(folder):
    data = load("folder", folder, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    assert (data.classes, data.train_size, data.test_size, data.image_size) == (("cat", "dog"), 8, 4, (6, 8))
    ((images, labels),) = data.test_batches(4)
    assert labels.tolist() == [0, 0, 1, 1]
    files = [folder / "test" / name / f"{i}.png" for name in ("cat", "dog") for i in range(2)]
    assert torch.equal(images, torch.stack([tv.to_tensor(Image.open(file)) for file in files]))
    order, labels = data.draws(0).order, torch.cat([labels for _, labels in flat(data.train_batches(0, 2))])
    assert torch.equal(labels, (order >= 4).long())


def test_folder_is_normalised_by_its_training_images(folder):
    data = load("folder", folder)
    files = sorted((folder / "train").rglob("*.png"))
    pixels = torch.stack([tv.to_tensor(Image.open(file)) for file in files]).double()
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-7)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-7)


def test_folder_ignores_what_is_no_image(folder, caplog):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "labels.csv").write_text("x")
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "test" / "cat" / "._0.png").write_bytes(b"x")
    assert load("folder", folder).train_size == 8
    assert not caplog.records
    (folder / "train" / "cat" / "notes.txt").write_text("x")
    data = load("folder", folder)
    assert (data.train_size, data.test_size) == (8, 4)
    assert "notes.txt" in caplog.text


def test_folder_takes_nested_folders_grey_palette_and_upper_case(folder):
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    (folder / "train" / "cat" / "more").mkdir()
    grey.save(folder / "train" / "cat" / "more" / "GREY.PNG")
    grey.convert("P").save(folder / "train" / "cat" / "palette.gif.png")
    data = load("folder", folder, mean=[0.0] * 3, std=[1.0] * 3)
    assert data.train_size == 10
    paths = sorted(str(path) for path in (folder / "train" / "cat").rglob("*.[pP][nN][gG]"))
    at = next(i for i, path in enumerate(paths) if path.endswith("GREY.PNG"))
    order, top, left, mirror = data.draws(0)
    images, _ = (torch.cat(parts) for parts in zip(*flat(data.train_batches(0, 10)), strict=True))
    expected = tv.crop(tv.pad(grey.convert("RGB"), 4), top[at].item(), left[at].item(), 6, 8)
    expected = tv.to_tensor(tv.hflip(expected) if mirror[at] else expected)
    assert torch.equal(images[order == at][0], expected)


def test_folder_that_is_missing_or_has_no_classes(folder, tmp_path):
    assert "train is not there: data.root must hold train/<class>/*" in refused(tmp_path / "elsewhere")
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert "holds no folders" in refused(folder)
    (folder / "test").rmdir()
    assert "test is not there" in refused(folder)


def test_folder_with_an_empty_class_or_different_classes(folder):
    (folder / "train" / "horse").mkdir()
    (folder / "train" / "horse" / "readme.txt").write_text("x")
    assert refused(folder).startswith(f"{folder}/train/horse holds no image")
    Image.new("RGB", (8, 6)).save(folder / "train" / "horse" / "0.png")
    assert refused(folder).startswith(f"{folder}/test lacks the class 'horse'")
    (folder / "train" / "horse").rename(folder / "test" / "horse")
    assert refused(folder).startswith(f"{folder}/train lacks the class 'horse'")


def test_folder_with_a_bad_image_names_the_file(folder):
    bad = folder / "train" / "dog" / "2.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:70])
    assert refused(folder).startswith(f"{bad} cannot be decoded")
    bad.write_bytes(b"this is text")
    assert refused(folder).startswith(f"{bad} is no image")
    bad.write_bytes(b"")
    assert refused(folder).startswith(f"{bad} is no image")
    Image.fromarray(np.zeros((6, 8), dtype=np.float32)).save(bad, "TIFF")
    assert "not of 8 or 16 bits a channel" in refused(folder)
    Image.new("RGB", (8, 7)).save(bad)
    assert refused(folder) == f"{bad} is 8x7 but {folder}/train/cat/0.png is 8x6: all images must have one size"


def test_folder_keeps_the_upper_8_bits_of_16(folder):
    grey = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300
    Image.fromarray(grey).save(folder / "train" / "cat" / "0.png")
    data = read_folder(folder)
    assert np.array_equal(data.train.pixels[0].numpy(), np.repeat((grey >> 8)[..., None], 3, 2))


def test_folder_with_a_loop_of_links_is_refused_and_other_links_are_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "elsewhere" / "9.png")
    before = len(read_folder(folder).train.labels)
    (folder / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(read_folder(folder).train.labels) == before + 1
    (tmp_path / "elsewhere" / "loop").symlink_to(folder / "train")
    assert refused(folder) == (
        f"{folder}/train/cat/more/loop/cat leads back to {folder}/train/cat: remove the link on this way"
    )


# --- CIFAR through torchvision ---------------------------------------------------------------------------------------


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """Small files of CIFAR's format. torchvision is made to expect their checksums, and the address is dead."""
    source, random = request.param, np.random.default_rng(0)
    classes, key = (10, "labels") if source is CIFAR10 else (100, "fine_labels")
    folder = tmp_path / source.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def split(names: list[str]) -> tuple[list, list[int]]:
        entries, targets = [], []
        for name in names:
            labels = random.integers(0, classes, 12).tolist()
            pixels = random.integers(0, 256, (12, 3072), dtype=np.uint8)
            entries.append([name, write(name, {"data": pixels, key: labels})])
            targets += labels
        return entries, targets

    train, train_targets = split([name for name, _ in source.train_list])
    test, test_targets = split([name for name, _ in source.test_list])
    meta = dict(source.meta, md5=write(source.meta["filename"], {source.meta["key"]: [str(i) for i in range(classes)]}))
    archive = tmp_path / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "train_list", train)
    monkeypatch.setattr(source, "test_list", test)
    monkeypatch.setattr(source, "meta", meta)
    name, md5 = source.__name__.lower(), hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(source, "tgz_md5", md5)
    published = ARCHIVES[name]._replace(url="http://localhost:9/" + source.filename, md5=md5)
    monkeypatch.setitem(ARCHIVES, name, published)
    monkeypatch.setenv("no_proxy", "*")
    archive.rename(tmp_path / "archive.tar.gz")
    return SimpleNamespace(
        name=name, source=source, root=tmp_path, folder=folder, classes=classes,
        train_targets=train_targets, test_targets=test_targets,
    )  # fmt: skip


def test_cifar_reads_torchvisions_images_with_the_published_normalisation(cifar):
    data = load(cifar.name, cifar.root)
    assert (data.num_classes, data.image_size) == (cifar.classes, (32, 32))
    assert data.augmentation == Augmentation(padding=4, flip=True)
    assert data.mean[0] == (0.4914 if cifar.classes == 10 else 0.5071)
    assert data.std[2] == (0.2010 if cifar.classes == 10 else 0.2761)
    expected = cifar.source(cifar.root, train=False)
    ((images, labels),) = data.test_batches(1000)
    assert labels.tolist() == cifar.test_targets
    assert torch.equal(
        images, torch.stack([tv.normalize(tv.to_tensor(image), data.mean, data.std) for image, _ in expected])
    )
    order, updates = data.draws(0).order, flat(data.train_batches(0, 4))
    assert torch.cat([labels for _, labels in updates]).tolist() == [cifar.train_targets[i] for i in order]


def test_cifar_takes_mean_and_std_from_the_config(cifar):
    data = load(cifar.name, cifar.root, mean=[0.1, 0.2, 0.3])
    assert data.mean == (0.1, 0.2, 0.3) and data.std[2] == (0.2010 if cifar.classes == 10 else 0.2761)


def test_cifar_missing_without_network_says_what_to_put_where(cifar, tmp_path):
    empty = tmp_path / "empty"
    with pytest.raises(UserError) as caught:
        load(cifar.name, empty)
    message = str(caught.value)
    url = ARCHIVES[cifar.name].url
    assert message.startswith(f"{cifar.name} is not complete in {empty} and cannot be downloaded ({url}: ")
    assert f"get {cifar.source.filename} on a machine with network, and put it, as it is, into {empty}" in message
    assert message.endswith(f" (or: bash scripts/prepare.sh cifar10 SOURCE {empty})") == (cifar.name == "cifar10")
    assert "\n" not in message


def test_cifar_unpacks_the_archive_that_was_put_there(cifar):
    for file in cifar.folder.iterdir():
        file.unlink()
    cifar.folder.rmdir()
    (cifar.root / "archive.tar.gz").rename(cifar.root / cifar.source.filename)
    data = load(cifar.name, cifar.root)
    assert (data.train_size, data.test_size) == (len(cifar.train_targets), len(cifar.test_targets))


def test_cifar_waits_for_another_process_that_downloads_it(cifar):
    """Without the lock it would ask the dead address, and fail at once."""
    shutil.rmtree(cifar.folder)
    program = "import sys, time; from pathlib import Path; from engine.files import hold; root = Path(sys.argv[1])\n"
    program += "lock = hold(root, 'downloading'); print('held', flush=True); time.sleep(1)\n"
    program += "(root / 'archive.tar.gz').rename(root / sys.argv[2])"
    command = [sys.executable, "-c", program, str(cifar.root), cifar.source.filename]
    with process(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as other:
        assert other.stdout.readline() == "held\n"
        assert load(cifar.name, cifar.root).train_size == len(cifar.train_targets)


def test_cifar_never_opens_a_file_with_another_checksum(cifar, tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    damaged = cifar.folder / cifar.source.train_list[-1][0]
    damaged.write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match="is not complete"):
        load(cifar.name, cifar.root)
    assert not (tmp_path / "opened").exists()


# --- the validation split --------------------------------------------------------------------------------------------


def test_a_tenth_of_each_class_is_held_out_whatever_the_seed():
    whole, data, again = load("digits"), load("digits", validation=0.1), load("digits", validation=0.1, seed=2)
    assert whole.valid_size == 0 and data.train_size + data.valid_size == whole.train_size
    ((images, labels),) = data.valid_batches(1000)
    counts = torch.bincount(whole._train_labels)
    assert torch.bincount(labels).tolist() == [round(0.1 * count) for count in counts.tolist()]
    assert torch.equal(next(again.valid_batches(1000))[0], images)
    parts = [part for rank in range(3) for part, _ in data.valid_batches(20, rank, 3)]
    assert torch.equal(torch.cat(parts), images)
    trained_on = torch.cat([data._train_labels, labels]).sort().values
    assert torch.equal(trained_on, whole._train_labels.sort().values)
    area = whole._padded_area
    rows = [set(map(bytes, one._train_pixels.view(-1, area * 3).numpy())) for one in (whole, data)]
    assert len(rows[0]) - len(rows[1]) == data.valid_size and rows[1] < rows[0]


@pytest.mark.parametrize(("share", "which"), [(0.001, "no"), (0.999, "every")])
def test_a_share_that_leaves_a_part_empty_is_refused(share, which):
    with pytest.raises(UserError, match=f"data.validation={share} holds out {which} training image of 1442"):
        load("digits", validation=share)

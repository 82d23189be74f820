"""The advice about a wrong folder: the nearest right one, first above and then below, if there is one."""

import pytest

from engine.errors import UserError
from engine.nearest_folder import nearest_folder


def holds_it(folder):
    return (folder / "it").exists()


@pytest.fixture
def right(tmp_path):
    folder = tmp_path / "a" / "right"
    (folder / "b" / "c" / "d").mkdir(parents=True)
    (folder / "it").touch()
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("place", "is_found"),
    [
        ("a/right/b", True),
        ("a/right/b/c", True),
        ("a/right/b/c/d", False),  # three levels above
        ("a/right/file", True),
        ("a/right/nowhere", True),
        ("a", True),
        (".", True),
        ("../nowhere/nowhere", False),
    ],
)
def test_it_is_found_above_and_below(right, tmp_path, place, is_found):
    assert nearest_folder(tmp_path / place, holds_it) == (right if is_found else None)


def test_above_comes_before_below_and_hidden_folders_are_left_out(right):
    for name in (".hidden", "below"):
        (right / "b" / name).mkdir()
        (right / "b" / name / "it").touch()
    assert nearest_folder(right / "b", holds_it) == right
    (right / "it").unlink()
    assert nearest_folder(right / "b", holds_it) == right / "b" / "below"


def test_a_folder_that_cannot_be_read_is_passed_over(right, tmp_path):
    def fits(folder):
        if folder == tmp_path / "a":
            raise PermissionError
        if folder == tmp_path:
            raise UserError("cannot be read")
        return holds_it(folder)

    assert nearest_folder(tmp_path / "nowhere", fits) == right

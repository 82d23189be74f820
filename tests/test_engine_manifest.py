"""The manifest of prepared data: whole, or refused in one line."""

import json

import pytest

from engine.errors import UserError
from engine.manifest import read_manifest


def test_a_manifest_is_whole_or_refused(tmp_path):
    fields = {"format": int, "words": int, "parts": [{"name": str}]}
    whole = {"format": 3, "words": 1, "parts": [{"name": "a"}, {"name": "b"}]}
    assert read_manifest(tmp_path, fields, "make it", 3) is None
    for content, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 3}', "its field words is missing"),
        ('{"words": 1}', "its field format is missing"),
        (json.dumps(whole | {"words": "1"}), "its field words is .* of a wrong kind"),
        (json.dumps(whole | {"parts": {}}), "its field parts is"),
        (json.dumps(whole | {"parts": [whole["parts"][0], []]}), "its field parts.1 is"),
        (json.dumps(whole | {"parts": [whole["parts"][0], {}]}), "its field parts.1.name is"),
        ('{"format": 2, "words": 1}', "format 2 .* reads format 3"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=rf"manifest\.json .*{message}.*: make it$"):
            read_manifest(tmp_path, fields, "make it", 3)
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    assert read_manifest(tmp_path, fields, "make it", 3) == whole

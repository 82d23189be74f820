"""Getting WMT14: mirrors, interruptions and checksums, against a server on this machine."""

import hashlib
import io
import json
import tarfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from engine.errors import UserError
from nmt.prepare.download import ARCHIVES, Archive, download, sgm_to_text
from nmt.prepare.recipes import WMT14

SGM = (
    '<srcset setid="newstest2014" srclang="any">\n<doc docid="1">\n<p>\n<seg id="1"> A  dog &amp; a cat. </seg>\n'
    '<seg id="2">Two\nlines.</seg>\n</p>\n</doc>\n</srcset>\n'
)
TEXT = "A dog &amp; a cat.\nTwo lines.\n"


def tar(**members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("_dot_", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


ARCHIVE = tar(
    training__a_dot_en=b"one\r\ntwo\n", training__a_dot_de=b"eins\nzwei\n", other=b"x", test_dot_sgm=SGM.encode()
)
MEMBERS = {"training/a.en": "a.en", "training/a.de": "a.de", "test.sgm": "b.en"}


class Handler(BaseHTTPRequestHandler):
    def __init__(self, files, requests, *arguments):
        self.files, self.requests = files, requests
        super().__init__(*arguments)

    def do_GET(self):
        content = self.files.get(self.path)
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.requests.append((self.path, begin))
        if content is None or (begin and begin >= len(content)):
            self.send_error(404 if content is None else 416)
            return
        cut = content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(cut)))
        self.end_headers()
        self.wfile.write(cut[: len(cut) // 2] if "broken" in self.path and not begin else cut)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    files, requests = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files, requests)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files, requests
        server.shutdown()


def archive(*mirrors, content=ARCHIVE, **known):
    known = known or {"sha256": hashlib.sha256(content).hexdigest()}
    return Archive("a.tgz", mirrors, MEMBERS, **known)


def whole(folder):
    texts = [(folder / name).read_bytes() for name in MEMBERS.values()]
    assert texts == [b"one\r\ntwo\n", b"eins\nzwei\n", TEXT.encode()]
    return not list(folder.glob("*.tmp")) and not list(folder.glob("*.part"))


def test_the_next_mirror_where_one_fails_or_gives_something_else(server, tmp_path):
    url, files, requests = server
    files |= {"/wrong/a.tgz": b"<html>sorry</html>", "/right/a.tgz": ARCHIVE}
    download(tmp_path, [archive(f"{url}/nothing", f"{url}/wrong", f"{url}/right")])
    assert whole(tmp_path) and [path for path, _ in requests] == ["/nothing/a.tgz", "/wrong/a.tgz", "/right/a.tgz"]
    download(tmp_path, [archive(f"{url}/nothing")])
    assert len(requests) == 3  # all is there


def test_a_download_goes_on_where_it_was(server, tmp_path):
    url, files, requests = server
    files["/broken/a.tgz"] = ARCHIVE
    with pytest.raises(UserError, match=r"a\.tgz cannot be had \(.*: get it on a machine with network"):
        download(tmp_path, [archive(f"{url}/broken")])
    assert (tmp_path / "a.tgz.part").stat().st_size == len(ARCHIVE) // 2
    download(tmp_path, [archive(f"{url}/broken")])
    assert requests == [("/broken/a.tgz", 0), ("/broken/a.tgz", len(ARCHIVE) // 2)] and whole(tmp_path)


def test_interrupted_after_the_last_byte(server, tmp_path):
    url, files, _ = server
    files["/a/a.tgz"] = ARCHIVE
    (tmp_path / "a.tgz.part").write_bytes(ARCHIVE)
    download(tmp_path, [archive(f"{url}/a")])
    assert whole(tmp_path)


def test_an_archive_that_somebody_put_there(tmp_path):
    (tmp_path / "a.tgz").write_bytes(ARCHIVE)
    download(tmp_path, [archive("http://127.0.0.1:1")])
    assert whole(tmp_path)


def test_one_that_is_not_the_right_one_is_kept_and_named(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the file that is expected, by its checksum") as error:
        download(tmp_path, [archive("http://127.0.0.1:1")])
    assert "\n" not in str(error.value) and (tmp_path / "a.tgz").read_bytes() == b"other"


def test_a_checksum_that_nobody_publishes_is_recorded_and_compared(server, tmp_path):
    url, files, _ = server
    files["/a/a.tgz"] = ARCHIVE
    known = {"md5": hashlib.md5(ARCHIVE).hexdigest()}
    download(tmp_path, [archive(f"{url}/a", **known)])
    recorded = json.loads((tmp_path / "checksums.json").read_text())
    assert recorded == {"a.tgz": hashlib.sha256(ARCHIVE).hexdigest()}
    for name in ("a.tgz", "a.en"):
        (tmp_path / name).unlink()
    (tmp_path / "checksums.json").write_text(json.dumps({"a.tgz": "0" * 64}))
    with pytest.raises(UserError, match="not the file that is expected"):
        download(tmp_path, [archive(f"{url}/a", **known)])
    with pytest.raises(UserError, match="not the file that is expected"):
        download(tmp_path, [archive(f"{url}/a", md5="0" * 32)])


def test_an_archive_without_the_file(tmp_path):
    (tmp_path / "a.tgz").write_bytes(tar(other=b"x"))
    with pytest.raises(UserError, match=r"does not hold training/a\.en, training/a\.de, test\.sgm"):
        download(tmp_path, [archive("http://127.0.0.1:1", content=(tmp_path / "a.tgz").read_bytes())])


def test_sgm_is_read_as_sacrebleu_reads_it():
    assert sgm_to_text(SGM) == TEXT


def test_what_is_downloaded_is_what_the_recipe_reads():
    files = {name for archive in ARCHIVES for name in archive.members.values()}
    assert files == {f"{prefix}.{side}" for prefix in (*WMT14.train, WMT14.valid, WMT14.test) for side in ("en", "de")}
    assert all(len(archive.sha256 or "") == 64 or len(archive.md5 or "") == 32 for archive in ARCHIVES)

"""Getting WMT14: mirrors, interruptions and checksums, against a server on this machine."""

import hashlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from engine.download import download
from engine.errors import UserError
from nmt.prepare.download import ARCHIVES, MIRRORS, Archive, get_archives
from nmt.prepare.recipes import WMT14

CONTENT = bytes(range(256)) * 40
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
NOWHERE = "http://127.0.0.1:1"
VERSIONS = {"ETag": '"{}"', "Last-Modified": "Sat, 26 Sep 2020 1{}:00:00 GMT"}


class Handler(BaseHTTPRequestHandler):
    """Of a path with "broken", the first answer ends early. The last folder names a header with the file's version."""

    def __init__(self, files, requests, *arguments):
        self.files, self.requests = files, requests
        super().__init__(*arguments)

    def do_GET(self):
        content, header = self.files.get(self.path), self.path.split("/")[-2]
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        is_broken = "broken" in self.path and self.path not in dict(self.requests)
        self.requests.append((self.path, begin))
        if content is None or (begin and begin >= len(content)):
            self.send_error(404 if content is None else 416)
            return
        version = VERSIONS.get(header, "{}").format(hashlib.md5(content).hexdigest()[0])
        if self.headers.get("If-Range", version) != version:
            begin = 0
        cut = content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(cut)))
        if header in VERSIONS:
            self.send_header(header, version)
        self.end_headers()
        self.wfile.write(cut[: len(cut) // 2] if is_broken else cut)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    files, requests = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files, requests)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files, requests
        server.shutdown()


def test_a_mirror_gives_what_the_first_place_lacks(server, tmp_path):
    url, files, requests = server
    files |= {"/first/a.tgz": CONTENT, "/first/b.tgz": b"<html>sorry</html>", "/second/bc.zip": CONTENT}
    archives = [Archive(f"{url}/first/{name}.tgz", CHECKSUM, [name]) for name in "abc"]
    mirrors = [Archive(f"{url}/second/{name}.zip", CHECKSUM, list(name)) for name in ("a", "bc")]
    get_archives(tmp_path, ["a", "b", "c"], archives, mirrors)
    assert [path for path, _ in requests] == ["/first/a.tgz", "/first/b.tgz", "/first/c.tgz", "/second/bc.zip"]
    assert {path.name for path in tmp_path.glob("*")} == {"a.tgz", "bc.zip", ".lock"}
    requests.clear()
    get_archives(tmp_path, ["a"], archives, mirrors)
    assert not requests  # it is there
    with pytest.raises(
        UserError, match=r"c cannot be had \(.*404.*put them into .*, and run the same command again"
    ) as error:
        get_archives(tmp_path, ["a", "c"], archives)
    assert "\n" not in str(error.value)


def test_a_download_goes_on_where_it_was(server, tmp_path):
    url, files, requests = server
    files["/broken/a"] = CONTENT
    with pytest.raises(UserError, match=r"the connection ended after 5,120 of 10,240 bytes"):
        download(f"{url}/broken/a", tmp_path / "a", CHECKSUM)
    assert (tmp_path / "a.part").stat().st_size == len(CONTENT) // 2 and not (tmp_path / "a").exists()
    download(f"{url}/broken/a", tmp_path / "a", CHECKSUM)
    assert requests == [("/broken/a", 0), ("/broken/a", len(CONTENT) // 2)]
    assert (tmp_path / "a").read_bytes() == CONTENT and not (tmp_path / "a.part").exists()


@pytest.mark.parametrize("header", [*VERSIONS, "none"])
@pytest.mark.parametrize("is_changed", [False, True])
def test_both_halves_of_a_file_without_a_checksum_are_of_one_version(server, tmp_path, header, is_changed):
    url, files, requests = server
    name = f"/broken/{header}/a"
    files[name] = CONTENT
    with pytest.raises(UserError, match="the connection ended"):
        download(url + name, tmp_path / "a")
    if is_changed:
        files[name] = CONTENT[::-1]
    download(url + name, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == files[name]
    assert requests[1:] == [(name, 0 if header == "none" else len(CONTENT) // 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_interrupted_after_the_last_byte(server, tmp_path):
    url, files, _ = server
    files["/a"] = CONTENT
    (tmp_path / "a.part").write_bytes(CONTENT)
    download(f"{url}/a", tmp_path / "a", CHECKSUM)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_file_that_somebody_put_there(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    download(f"{NOWHERE}/a", tmp_path / "a", f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    with pytest.raises(UserError, match="a is not the file that is expected, by its checksum: delete it"):
        download(f"{NOWHERE}/a", tmp_path / "a", f"md5:{'0' * 32}")
    assert (tmp_path / "a").read_bytes() == CONTENT  # it is the user's to delete


def test_what_is_downloaded_is_what_the_recipe_reads():
    wanted = {*WMT14.train, WMT14.valid, WMT14.test}
    for archives in (ARCHIVES, MIRRORS):
        assert {text for archive in archives for text in archive.texts} == wanted
    lengths = {"sha256": 64, "md5": 32}
    for kind, _, digits in (archive.checksum.partition(":") for archive in (*ARCHIVES, *MIRRORS)):
        assert len(bytes.fromhex(digits)) * 2 == lengths[kind]

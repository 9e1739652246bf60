"""The downloader against a small server of its own: ranges, a connection that is cut, a wrong
checksum."""

import hashlib
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import corpus, librispeech
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.data import load_examples
from diffa2_mini.errors import UserError

TEXTS = {
    "1272-128104-0000": "MISTER QUILTER IS THE APOSTLE",
    "1272-128104-0001": "NOR IS MISTER QUILTER'S MANNER"}


def archive(name: str, texts=TEXTS, seconds=0.5) -> bytes:
    """An archive in the layout of LibriSpeech. Noise, so that it does not compress to nothing."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        def add(path, content):
            info = tarfile.TarInfo(f"LibriSpeech/{path}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        chapter = f"{name}/1272/128104"
        lines = [f"{key} {text}\n" for key, text in texts.items()]
        add(f"{chapter}/1272-128104.trans.txt", "".join(lines).encode())
        for i, key in enumerate(texts):
            flac = io.BytesIO()
            noise = np.random.default_rng(i).uniform(-0.5, 0.5, int(16_000 * seconds))
            soundfile.write(flac, noise, 16_000, format="FLAC")
            add(f"{chapter}/{key}.flac", flac.getvalue())
    return packed.getvalue()


class Site(http.server.BaseHTTPRequestHandler):
    """Serves `files`, by range too; breaks off once in the middle of each name in `cut`; notes what
    was asked for."""

    files, cut, busy, asked, ranges = {}, set(), set(), [], True

    def do_GET(self):
        name = self.path.strip("/")
        wanted = self.headers.get("Range")
        self.asked.append((name, wanted))
        if name not in self.files:
            return self.send_error(404)
        body = self.files[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if name in self.busy:
            self.busy.remove(name)
            return self.send_error(503)
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if name in self.cut:
            self.cut.remove(name)
            self.wfile.write(body[start:start + len(body) // 2])
            self.wfile.flush()
            return self.connection.close()
        self.wfile.write(body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def before_python_3_10_12(monkeypatch):
    """Neither of these had a filter then, so that they are of no use."""
    for name in ("extract", "extractall"):
        monkeypatch.delattr(tarfile.TarFile, name)


@pytest.fixture
def site(monkeypatch):
    """A site with three sets; yields its handler and its address."""
    files = {
        f"{name}.tar.gz": archive(name)
        for name in ("train-clean-100", "dev-clean", "test-clean")}
    lines = [f"{hashlib.md5(body).hexdigest()}  {name}" for name, body in files.items()]
    handler = type(
        "Handler", (Site, ), {
            "files": files | {"md5sum.txt": "\n".join(lines).encode()}, "cut": set(), "busy": set(),
            "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(corpus.time, "sleep", lambda seconds: None)
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_manifests_are_those_that_stage_1_reads(site, tmp_path, capsys):
    assert run_script(librispeech.main, ["--out", str(tmp_path / "out"), "--url", site[1]]) == 0
    assert "stage1.json 2" in capsys.readouterr().out
    config, stages = SIZES["full"]
    examples = load_examples(tmp_path / "out" / "stage1.json", stages[1], config)
    assert [example.answer for example in examples] == [text.lower() for text in TEXTS.values()]
    assert all(example.path.is_file() and example.instruction in librispeech.INSTRUCTIONS
               for example in examples)
    rows = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert {row["type"] for row in rows} == {"asr"} and rows[0]["duration"] == 0.5
    assert len(set(librispeech.INSTRUCTIONS)) == 25
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dev-clean", "stage1.json", "train-clean-100", "validation.json"]
    before = len(site[0].asked)
    librispeech.prepare(["dev-clean"], tmp_path / "out", site[1])
    assert "validation.json 2, stage1.json 2 rows" in capsys.readouterr().out
    assert len(site[0].asked) == before  # nothing is fetched twice


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_goes_on_where_it_was(site, tmp_path, ranges):
    handler, url = site
    handler.cut, handler.ranges = {"dev-clean.tar.gz"}, ranges
    librispeech.prepare(["dev-clean"], tmp_path, url)
    half = len(handler.files["dev-clean.tar.gz"]) // 2
    assert [wanted for name, wanted in handler.asked
            if name != "md5sum.txt"] == [None, f"bytes={half}-"]
    assert len(list(tmp_path.rglob("*.flac"))) == 2


def test_a_download_that_was_stopped_goes_on_the_next_time(site, tmp_path):
    handler, url = site
    body = handler.files["dev-clean.tar.gz"]
    (tmp_path / "dev-clean.tar.gz.part").write_bytes(body[:1000])
    librispeech.prepare(["dev-clean"], tmp_path, url)
    assert ("dev-clean.tar.gz", "bytes=1000-") in handler.asked
    assert len(list(tmp_path.rglob("*.flac"))) == 2


def test_a_download_that_was_stopped_before_its_checksum_is_only_checked(site, tmp_path):
    handler, url = site
    (tmp_path / "dev-clean.tar.gz.part").write_bytes(handler.files["dev-clean.tar.gz"])
    librispeech.prepare(["dev-clean"], tmp_path, url)
    assert len(list(tmp_path.rglob("*.flac"))) == 2


def test_a_server_that_is_busy_is_asked_again(site, tmp_path):
    handler, url = site
    handler.busy = {"dev-clean.tar.gz"}
    librispeech.prepare(["dev-clean"], tmp_path, url)
    assert len(list(tmp_path.rglob("*.flac"))) == 2


def test_a_wrong_checksum_is_refused_and_nothing_is_left(site, tmp_path, capsys):
    handler, url = site
    right = hashlib.md5(handler.files["dev-clean.tar.gz"]).hexdigest().encode()
    handler.files["md5sum.txt"] = handler.files["md5sum.txt"].replace(right, b"0" * 32)
    assert run_script(librispeech.main, ["dev-clean", "--out", str(tmp_path), "--url", url]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected the MD5 000" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [
    "../outside", "LibriSpeech/dev-clean/../../../outside", "/outside", "LibriSpeech/link/outside"])
def test_an_archive_writes_nothing_elsewhere(name, site, tmp_path, capsys):
    handler, url = site
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        link = tarfile.TarInfo("LibriSpeech/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(elsewhere)
        tar.addfile(link)
        info = tarfile.TarInfo(str(elsewhere / "outside") if name == "/outside" else name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    handler.files["dev-clean.tar.gz"] = packed.getvalue()
    md5 = hashlib.md5(packed.getvalue()).hexdigest()
    handler.files["md5sum.txt"] = f"{md5} dev-clean.tar.gz".encode()
    assert run_script(librispeech.main, ["dev-clean", "--out", str(out), "--url", url]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "dev-clean.tar.gz: could not be unpacked" in error and "delete it" in error
    assert [path.name for path in out.iterdir()] == ["dev-clean.tar.gz"]
    assert not [*elsewhere.iterdir()]
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "out"}


def test_what_cannot_be_had_is_one_line(site, tmp_path, capsys):
    handler, url = site
    del handler.files["test-clean.tar.gz"]
    (tmp_path / "file").touch()
    for arguments, message in [
        (["no-such-set"], "train-clean-100"),
        (["test-clean"], "404"),
        (["test-other"], "expected a checksum of test-other.tar.gz"),
        (["dev-clean", "--url", "http://127.0.0.1:9"], "could not be reached"),
        (["dev-clean", "--url", "www.openslr.org"], "check the network or --url"),
        (["dev-clean", "--out", str(tmp_path / "file" / "x")], "expected a folder to write to"),
    ]:
        assert run_script(librispeech.main,
                          ["--out", str(tmp_path / "out"), "--url", url, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and "Traceback" not in error


def test_clips_longer_than_the_model_hears_are_left_out(site, tmp_path):
    handler, url = site
    body = archive("dev-clean", {"1272-128104-0000": "TOO LONG"}, seconds=30.1)
    handler.files["dev-clean.tar.gz"] = body
    handler.files["md5sum.txt"] = f"{hashlib.md5(body).hexdigest()} dev-clean.tar.gz".encode()
    with pytest.raises(UserError, match="got none"):
        librispeech.prepare(["dev-clean"], Path(tmp_path), url)

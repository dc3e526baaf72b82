import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringrl.data.exorl import download
from ringrl.data.exorl.download import download_archive
from ringrl.errors import UserError

FILE = "/cartpole/rnd.zip"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0,) * 5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def fetch(site, folder: Path, **keywords) -> Path:
    return download_archive("cartpole", "rnd", folder, **{"url": site.url, "timeout": 20} | keywords)


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 100_000), max_size=5), etags=st.booleans())
def test_an_interrupted_download_requests_each_byte_once(serving, archive, cuts, etags):
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(files={FILE: archive}, etags=etags, answers=[{"cut": cut} for cut in cuts]) as site,
    ):
        path = fetch(site, Path(folder))
        assert path.read_bytes() == archive
        assert names(Path(folder)) == ["rnd.zip"]
        starts, here = [], 0
        for cut in [*cuts, 0]:
            starts.append(f"bytes={here}-" if here else None)
            here = min(here + cut, len(archive))
        assert site.ranges == starts[: len(site.requests)]


def test_received_bytes_are_kept_after_the_last_retry(site, archive, tmp_path):
    site.answers = [{"cut": 1000} for _ in range(6)]
    with pytest.raises(UserError, match=r"cut after 6,000 of .* run the same command again to resume") as error:
        fetch(site, tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "cartpole" / "rnd.zip") in str(error.value)
    assert len(site.requests) == 6
    assert names(tmp_path) == [".rnd.zip.partial", ".rnd.zip.partial.json"]
    assert fetch(site, tmp_path).read_bytes() == archive
    assert site.ranges[-1] == "bytes=6000-"
    assert names(tmp_path) == ["rnd.zip"]


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("forgets", [True, False])
def test_a_file_that_changed_on_the_server_starts_anew(site, make_zip, tmp_path, etags, forgets):
    """The answer's own version is checked too, because a server may ignore If-Range."""
    site.etags = etags
    site.answers = [{"cut": 1000}, {"ignores_condition": forgets}]
    newer = make_zip(300_000, seed=1)

    def change(done: int, total: int) -> None:
        if done == 1000:
            site.files[FILE], site.date = newer, "Tue, 03 Jan 2006 15:04:05 GMT"

    assert len(newer) == len(site.files[FILE])
    assert fetch(site, tmp_path, progress=change).read_bytes() == newer
    assert site.ranges == [None, "bytes=1000-"] + [None] * forgets


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": None, "Last-Modified": None},
        {"ETag": 'W/"weak"', "Last-Modified": None},
        {"ETag": '"a\tb"', "Last-Modified": "é\x1b"},
    ],
)
def test_without_a_validator_nothing_is_resumed(site, archive, tmp_path, headers):
    site.answers = [{"cut": 1000, "headers": headers}]
    assert fetch(site, tmp_path).read_bytes() == archive
    assert site.ranges == [None, None]


def test_a_server_that_ignores_ranges_starts_anew(site, archive, tmp_path):
    site.answers = [{"cut": 1000}, {"ignores_range": True}]
    assert fetch(site, tmp_path).read_bytes() == archive
    assert site.ranges == [None, "bytes=1000-"]


def test_a_partial_file_of_another_address_or_without_its_record_starts_anew(site, archive, tmp_path):
    (folder := tmp_path / "cartpole").mkdir()
    etag = f'"{hashlib.sha256(archive).hexdigest()}"'
    note = [site.url + FILE, len(archive), etag]
    elsewhere = json.dumps(["http://elsewhere/cartpole/rnd.zip", *note[1:]]).encode()
    too_long = json.dumps([note[0], 2, etag]).encode()
    for content in [None, b"", b"[]", json.dumps(note).encode()[:-1], elsewhere, too_long]:
        (folder / ".rnd.zip.partial").write_bytes(b"junk")
        if content is not None:
            (folder / ".rnd.zip.partial.json").write_bytes(content)
        path = fetch(site, tmp_path)
        assert path.read_bytes() == archive
        assert names(tmp_path) == ["rnd.zip"]
        path.unlink()
    assert set(site.ranges) == {None}
    # After a kill between the last byte and the rename, no request is needed.
    (folder / ".rnd.zip.partial").write_bytes(archive)
    (folder / ".rnd.zip.partial.json").write_text(json.dumps(note))
    asked = len(site.requests)
    assert fetch(site, tmp_path).read_bytes() == archive
    assert len(site.requests) == asked
    assert names(tmp_path) == ["rnd.zip"]


PARTS = {
    "another start": {"Content-Range": "bytes 999-{last}/{size}", "Content-Length": "{one_more}"},
    "another size": {"Content-Range": "bytes 1000-{last}/{more}"},
    "no range": {"Content-Range": None},
    "nonsense": {"Content-Range": "bytes \x1b[31m"},
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_range_that_does_not_continue_the_received_bytes_starts_anew(site, archive, tmp_path, kind):
    size = len(archive)
    headers = {
        name: value and value.format(last=size - 1, size=size, more=size + 1, one_more=size - 999)
        for name, value in PARTS[kind].items()
    }
    site.answers = [{"cut": 1000}, {"headers": headers}]
    assert fetch(site, tmp_path).read_bytes() == archive
    assert site.ranges == [None, "bytes=1000-", None]


def test_an_unrequested_range_is_not_used(site, archive, tmp_path):
    site.answers = [{"status": 206, "headers": {"Content-Range": "bytes 0-0/1"}}]
    assert fetch(site, tmp_path).read_bytes() == archive


def test_a_server_that_promises_more_than_it_has(site, archive, tmp_path):
    more = {"Content-Length": str(len(archive) + 10)}
    site.answers = [{"headers": more, "ignores_range": True} for _ in range(9)]
    with pytest.raises(UserError, match=f"cut after {len(archive):,} of {len(archive) + 10:,} bytes"):
        fetch(site, tmp_path)
    assert len(site.requests) == 6
    site.answers = []
    assert fetch(site, tmp_path).read_bytes() == archive, "416: the file starts anew"
    assert site.ranges[6:] == [f"bytes={len(archive)}-", None]


def test_a_server_that_promises_less_than_it_has(site, archive, tmp_path):
    site.answers = [{"headers": {"Content-Length": str(len(archive) - 1)}}]
    with pytest.raises(UserError, match=r"unusable and was removed: .* cut short"):
        fetch(site, tmp_path)
    assert names(tmp_path) == []


def test_a_body_of_unknown_length_is_rejected(site, tmp_path):
    for length in (None, "-1", "many"):
        site.answers = [{"headers": {"Content-Length": length}}]
        with pytest.raises(UserError, match="does not announce the size"):
            fetch(site, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_tried_again(site, archive, tmp_path, status):
    site.answers = [{"status": status}, {"cut": 10}, {"status": status}]
    assert fetch(site, tmp_path).read_bytes() == archive
    site.answers = [{"status": status} for _ in range(6)]
    with pytest.raises(UserError, match=rf"the server answers {status}.*0 bytes are kept.*run the same command again"):
        fetch(site, tmp_path / "b")
    assert names(tmp_path / "b") == []


@pytest.mark.parametrize("status", [204, 400, 401, 418])
def test_other_answers_are_rejected_at_once(site, tmp_path, status):
    site.answers = [{"status": status}]
    with pytest.raises(UserError, match=f"{status}"):
        fetch(site, tmp_path)
    assert len(site.requests) == 1


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_silent_server_is_an_interruption(site, archive, tmp_path, cut):
    site.answers = [{"cut": cut, "hangs": True}]
    assert fetch(site, tmp_path, timeout=0.2).read_bytes() == archive
    assert site.ranges == [None, "bytes=1000-" if cut else None]


def test_an_unreachable_server(serving, tmp_path):
    with serving() as site:
        pass
    with pytest.raises(UserError, match="Connection refused"):
        fetch(site, tmp_path)
    assert names(tmp_path) == []


def test_redirects_are_followed_to_http_only(site, archive, tmp_path):
    site.answers = [{"status": 302, "headers": {"Location": f"{site.url}{FILE}"}}, {"cut": 7}]
    assert fetch(site, tmp_path).read_bytes() == archive
    for target in (f"file://{tmp_path}/cartpole/rnd.zip", "ftp://127.0.0.1/a", "data:,x", f"{site.url}/circle"):
        site.answers = [{"status": 302, "headers": {"Location": target}} for _ in range(20)]
        with pytest.raises(UserError, match=r"rnd\.zip: "):
            fetch(site, tmp_path / "b")
        assert names(tmp_path / "b") == []


@pytest.mark.parametrize("url", ["file:///etc", "ftp://host/x", "host/x", "http://", ""])
def test_other_addresses_are_rejected(tmp_path, url):
    with pytest.raises(UserError, match="--url takes http"):
        download_archive("cartpole", "rnd", tmp_path, url=url)
    with pytest.raises(UserError, match="is not a usable address"):
        download_archive("cartpole", "rnd", tmp_path, url="http://127.0.0.1:1/a b")
    assert names(tmp_path) == []

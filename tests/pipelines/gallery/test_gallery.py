from __future__ import annotations

import http.client
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from pipelines.gallery.links import (
    ADDED_LINKS,
    ONLY_LINKS,
    REFUSED_LINKS,
    Emoji,
    Gallery,
    GalleryError,
    Link,
    emojis_of,
)
from pipelines.gallery.server import OPT_OUTS, PRIVATE_URL, Site, bomb_png, serving


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def gallery() -> Iterator[Gallery]:
    served = Gallery(port(), limit=60, fault_rate=1.0)
    with serving(served):
        yield served


def entry(gallery: Gallery, link: Link) -> tuple[str, Emoji]:
    """Path and drawing of the first entry of that kind."""
    emoji = next(emoji for kind, emoji in gallery.links() if kind is link)
    return gallery.url(link, emoji).partition(gallery.authority)[2], emoji


def get(gallery: Gallery, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", gallery.port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def on_white(emoji: Emoji) -> np.ndarray:
    drawing = Image.open(io.BytesIO(emoji.file.read_bytes())).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")).astype(
        int
    )


def test_all_drawings_but_skin_tones() -> None:
    for vendor in ("Goog", "Twtr"):
        emojis = emojis_of(vendor)
        assert 1800 < len(emojis) < 1900
        assert len({emoji.name for emoji in emojis}) == len({emoji.codepoints for emoji in emojis}) == len(emojis)
        assert not any(re.search(r"1f3f[b-f]", emoji.codepoints) for emoji in emojis)
        assert not any("skin tone" in emoji.name for emoji in emojis)


def test_captions_are_what_people_would_write() -> None:
    captions = {emoji.caption for vendor in ("Goog", "Twtr") for emoji in emojis_of(vendor)}
    expected = {
        "flag of Norway, noto style",
        "flag of Scotland, twemoji style",
        "flag of Bosnia and Herzegovina, noto style",
        "grinning face, twemoji style",
        "red heart, noto style",
        "twelve o'clock, noto style",
        "pirate flag, noto style",
    }
    assert expected <= captions
    assert not any(re.search(r"[:_&’]", caption) for caption in captions)


def test_the_list_is_the_same_each_time_and_for_both_sides() -> None:
    one, two = Gallery(8377), Gallery(8377)
    assert one.identity() == two.identity()
    assert one.table().equals(two.table())
    others = [
        Gallery(8378),
        Gallery(8377, seed=1),
        Gallery(8377, limit=9),
        Gallery(8377, ("Goog",)),
        Gallery(8377, fault_rate=0.0),
    ]
    assert len({gallery.identity() for gallery in [one, *others]}) == 6
    assert not Gallery(8377, seed=1).table().equals(one.table())


def test_the_whole_list() -> None:
    gallery = Gallery(8377)
    entries = gallery.links()
    kinds = Counter(link for link, _ in entries)
    images = sum(kinds[link] for link in (Link.PLAIN, *ONLY_LINKS))
    assert 3600 < images < 3800
    assert set(kinds) == set(Link)
    assert 0.03 < (len(entries) - kinds[Link.PLAIN]) / len(entries) < 0.05
    reachable = {emoji.place for link, emoji in entries if link in {Link.PLAIN, *ONLY_LINKS}}
    assert len(reachable) == images
    assert all(emoji.place in reachable for _, emoji in entries)
    table = gallery.table()
    assert table.column_names == ["url", "caption", "name", "vendor", "licence"]
    assert len(set(table["url"].to_pylist())) == table.num_rows
    assert set(table["licence"].to_pylist()) == {"Apache-2.0", "CC-BY-4.0"}


def test_no_faults_if_none_are_wanted() -> None:
    entries = Gallery(8377, limit=50, fault_rate=0.0).links()
    assert [link for link, _ in entries] == [Link.PLAIN] * 50


@pytest.mark.parametrize("link", [Link.PLAIN, Link.COPY, Link.SLOW, *OPT_OUTS])
def test_links_to_the_drawing_itself(gallery: Gallery, link: Link) -> None:
    path, emoji = entry(gallery, link)
    started_s = time.monotonic()
    response, body = get(gallery, path)
    assert (response.status, response.headers["Content-Type"]) == (200, "image/png")
    assert body == emoji.file.read_bytes()
    took_s = time.monotonic() - started_s
    assert took_s > 0.5 if link is Link.SLOW else took_s < 5
    signals = {name for name, _ in OPT_OUTS.values() if response.headers[name]}
    assert signals == ({OPT_OUTS[link][0]} if link in OPT_OUTS else set())


def test_flaky_links_fail_once(gallery: Gallery) -> None:
    path, emoji = entry(gallery, Link.FLAKY)
    answers = [get(gallery, path) for _ in range(3)]
    assert [response.status for response, _ in answers] == [503, 200, 200]
    assert answers[1][1] == emoji.file.read_bytes()


def test_dead_and_moved_links(gallery: Gallery) -> None:
    assert get(gallery, entry(gallery, Link.MISSING)[0])[0].status == 404
    assert get(gallery, entry(gallery, Link.GONE)[0])[0].status == 410
    path, emoji = entry(gallery, Link.MOVED_TWICE)
    for _ in range(2):
        response, _ = get(gallery, path)
        assert response.status == 302
        path = response.headers["Location"]
    assert get(gallery, path)[1] == emoji.file.read_bytes()
    assert get(gallery, entry(gallery, Link.PRIVATE)[0])[0].headers["Location"] == PRIVATE_URL


def test_truncated_and_mislabelled_links(gallery: Gallery) -> None:
    with pytest.raises(http.client.IncompleteRead):
        get(gallery, entry(gallery, Link.TRUNCATED)[0])
    response, body = get(gallery, entry(gallery, Link.PAGE)[0])
    assert (response.status, body[:9]) == (200, b"<!DOCTYPE")


def test_rewritten_drawings_show_the_same(gallery: Gallery) -> None:
    path, emoji = entry(gallery, Link.SIDEWAYS)
    lying = Image.open(io.BytesIO(get(gallery, path)[1]))
    assert lying.getexif()[0x0112] == 6
    upright = np.asarray(lying.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(upright - on_white(emoji)).mean() < 5
    path, emoji = entry(gallery, Link.SIXTEEN_BIT)
    body = get(gallery, path)[1]
    assert body[24] == 16
    assert np.abs(np.asarray(Image.open(io.BytesIO(body))).astype(int) - on_white(emoji)).max() <= 1


def test_the_bomb_is_small_and_claims_much(gallery: Gallery) -> None:
    body = get(gallery, entry(gallery, Link.BOMB)[0])[1]
    assert body == bomb_png()
    assert len(body) < 1_000_000
    assert struct.unpack(">II", body[16:24]) == (30_000, 30_000)


@pytest.mark.parametrize(
    "path",
    ["/", "/plain", "/plain/noto/nothing.png", "/plain/noto/../../../../etc/passwd", "/other/noto/1f600.png", "//"],
)
def test_nothing_else_is_served(gallery: Gallery, path: str) -> None:
    assert get(gallery, path)[0].status == 404


def test_other_methods_and_rubbish(gallery: Gallery) -> None:
    assert Site(gallery).answer("POST / HTTP/1.1").status == 405
    with socket.create_connection(("127.0.0.1", gallery.port), timeout=5) as peer:
        peer.sendall(b"\0" * 40_000)
    assert get(gallery, entry(gallery, Link.PLAIN)[0])[0].status == 200


def test_a_port_in_use_is_one_clear_error(gallery: Gallery) -> None:
    with (
        pytest.raises(GalleryError, match=rf"port {gallery.port} .* is in use.*source\.port"),
        serving(Gallery(gallery.port)),
    ):
        pass


def test_the_port_is_free_again_afterwards() -> None:
    served = Gallery(port(), limit=3)
    for _ in range(3):
        with serving(served):
            assert get(served, entry(served, Link.PLAIN)[0])[0].status == 200
    with pytest.raises(ConnectionRefusedError):
        get(served, "/")


def test_it_serves_by_itself_until_it_is_stopped() -> None:
    served = Gallery(port(), limit=5)
    command = [sys.executable, "-m", "pipelines.gallery", "--port", str(served.port), "--limit", "5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"5 URLs on http://127.0.0.1:{served.port}" in process.stderr.readline()
        assert get(served, entry(served, Link.PLAIN)[0])[0].status == 200
        process.send_signal(signal.SIGINT)
        assert "stopped" in process.stderr.readline()
    assert process.returncode == 0


def test_refused_links_are_those_added_but_copies() -> None:
    assert set(REFUSED_LINKS) == set(ADDED_LINKS) - {Link.COPY}

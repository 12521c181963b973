from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.acquire.addresses import (
    AddressBook,
    AddressNotAllowed,
    InvalidUrl,
    SchemeNotAllowed,
    is_global,
    parse_url,
)

PRIVATE_V4 = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10"]
OTHER_V4 = ["0.0.0.0/8", "192.0.2.0/24", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "168.63.129.16",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "192.88.99.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "2002:808:808::1",
        "2001::1",
        "2001:db8::1",
        "3fff::1",
        "100::1",
        "5f00::1",
    ],
)
def test_refuses_what_is_not_a_public_host(address: str) -> None:
    assert not is_global(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_allows_public_hosts(address: str) -> None:
    assert is_global(ipaddress.ip_address(address))


@settings(deadline=None)
@given(st.sampled_from(PRIVATE_V4 + OTHER_V4), st.data())
def test_no_form_of_a_private_address_passes(network: str, data: st.DataObject) -> None:
    members = ipaddress.IPv4Network(network)
    number = data.draw(st.integers(int(members.network_address), int(members.broadcast_address)))
    forms = [
        ipaddress.IPv4Address(number),
        ipaddress.IPv6Address(number),
        ipaddress.IPv6Address((0xFFFF << 32) | number),
        ipaddress.IPv6Address((0x64FF9B << 96) | number),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80)),
        ipaddress.IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF)),
    ]
    assert not any(map(is_global, forms))


@settings(deadline=None)
@given(st.ip_addresses(v=6))
def test_only_global_unicast_and_embedded_public_addresses_pass(address: ipaddress.IPv6Address) -> None:
    if is_global(address):
        assert (
            address in ipaddress.IPv6Network("2000::/3") or address.ipv4_mapped or int(address) >> 32 == 0x64FF9B << 64
        )


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "[::1]", "[::ffff:127.0.0.1]", "①②⑦.0.0.1"],
)
def test_every_way_to_write_loopback_is_refused(host: str) -> None:
    with pytest.raises(AddressNotAllowed, match="no public address"):
        AddressBook().addresses(parse_url(f"http://{host}:8377/a.png"), 5.0)


def test_a_name_is_judged_by_where_it_leads() -> None:
    with pytest.raises(AddressNotAllowed, match="localhost is at"):
        AddressBook().addresses(parse_url("http://localhost/a.png"), 5.0)


def test_only_the_allowed_port_of_an_allowed_host() -> None:
    book = AddressBook(["127.0.0.1:8377", "[::1]:80"])
    assert book.addresses(parse_url("http://127.0.0.1:8377/"), 5.0)[0].address == ("127.0.0.1", 8377)
    assert book.addresses(parse_url("http://[::1]/"), 5.0)[0].address[:2] == ("::1", 80)
    for url in ("http://127.0.0.1:8378/", "http://127.0.0.1/", "http://127.0.0.2:8377/", "http://[::1]:8377/"):
        with pytest.raises(AddressNotAllowed):
            book.addresses(parse_url(url), 5.0)


@pytest.mark.parametrize(
    "entry", ["127.0.0.1", "http://127.0.0.1:80", "", ":80", "127.0.0.1:80/x", "me@127.0.0.1:80", "127.0.0.1:80?x"]
)
def test_a_wrong_allow_list_is_an_error(entry: str) -> None:
    with pytest.raises(ValueError, match="allow_hosts"):
        AddressBook([entry])


def test_the_answer_of_the_resolver_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private when it is used (rebinding) is asked for once."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    real = socket.getaddrinfo

    def rebinding(host: str, port: int, *_: object, flags: int = 0, **__: object) -> object:
        return real(host if flags else next(answers), port, type=socket.SOCK_STREAM, flags=flags)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    book = AddressBook()
    target = parse_url("http://rebind.example/")
    assert [entry.address[0] for entry in book.addresses(target, 5.0)] == ["93.184.216.34"]
    assert [entry.address[0] for entry in book.addresses(target, 5.0)] == ["93.184.216.34"]


def test_private_addresses_among_public_ones_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(host: str, port: int, *_: object, flags: int = 0, **__: object) -> object:
        if flags:
            raise socket.gaierror(socket.EAI_NONAME, "not a literal")
        kind = (socket.SOCK_STREAM, 6, "")
        return [(socket.AF_INET, *kind, ("10.0.0.1", port)), (socket.AF_INET, *kind, ("8.8.8.8", port))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert [entry.address[0] for entry in AddressBook().addresses(parse_url("http://a.example/"), 5.0)] == ["8.8.8.8"]


def test_a_slow_resolver_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()

    def slow(*_: object, flags: int = 0, **__: object) -> object:
        if not flags:
            release.wait(20)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(TimeoutError, match="not resolved"):
        AddressBook().addresses(parse_url("http://slow.example/"), 0.1)
    release.set()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a.example/x", "gopher://a.example/", "data:image/png,x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(SchemeNotAllowed):
        parse_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.example/x.png",
        "http://",
        "http:///x.png",
        "http://[::1/x",
        "http://a.example:99999/",
        "http://a.example:x/",
        "http://user:pass@a.example/",
        "http://127.0.0.1\\@a.example/",
        "http://a example/",
        "http://" + "ä" * 80 + ".example/",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidUrl):
        parse_url(url)


def test_urls_are_taken_apart_as_browsers_do() -> None:
    target = parse_url(" HTTPS://Bücher.example/a b/ü.png?q=ä&x=%20#part ")
    assert (target.scheme, target.host, target.port) == ("https", "xn--bcher-kva.example", 443)
    assert target.path == "/a%20b/%C3%BC.png?q=%C3%A4&x=%20"
    assert target.authority == "xn--bcher-kva.example"
    assert parse_url("http://a.example:8080").authority == "a.example:8080"
    assert parse_url("http://a.example/x\r\nHost: evil").path == "/xHost:%20evil"

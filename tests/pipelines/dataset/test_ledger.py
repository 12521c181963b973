from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.ledger import (
    DROPS,
    ErrorClass,
    Outcome,
    Reason,
    content_digest,
    count,
    ledger_schema,
)
from pipelines.dataset.uid import make_uid, normalised_caption, normalised_url

REASONS = st.one_of(st.none(), st.sampled_from(list(Reason)))


@settings(deadline=None)
@given(st.lists(REASONS, max_size=30))
def test_counts_add_up(reasons: list[Reason | None]) -> None:
    outcomes = [reason.outcome if reason else Outcome.KEPT for reason in reasons]
    schema = pa.schema([("outcome", pa.string()), ("reason", pa.string())])
    counts = count(pa.table({"outcome": outcomes, "reason": reasons}, schema=schema))
    counts.check("here")
    assert counts.total == len(reasons)
    assert counts.kept == reasons.count(None)
    assert set(counts.dropped) <= {str(reason) for reason in DROPS}
    assert not set(counts.failed) & {str(reason) for reason in DROPS}
    assert sum(counts.dropped.values()) == sum(reason in DROPS for reason in reasons if reason)


def test_columns_are_img2datasets_and_ours() -> None:
    source = pa.schema(
        [("url", pa.string()), ("caption", pa.string()), ("uid", pa.string()), ("similarity", pa.float64())]
    )
    schema = ledger_schema(source)
    assert schema.names[:12] == [
        *("url", "caption", "uid", "similarity", "key", "status", "error_message"),
        *("width", "height", "original_width", "original_height", "sha256"),
    ]
    ours = "outcome reason error_class http_status opt_out mime stored_sha256 phash orientation language licence"
    ours += " final_url fetched_at attempts manners original_bytes shard"
    assert set(ours.split()) == set(schema.names[12:])
    with_licence = ledger_schema(source.append(pa.field("licence", pa.string())))
    assert with_licence.names.count("licence") == 1


def test_content_digest_leaves_out_what_varies() -> None:
    def ledger(**changes: str) -> pa.Table:
        row = {"url": "u", "outcome": "kept", "fetched_at": "now", "attempts": "1", "final_url": "u"} | changes
        return pa.Table.from_pylist([row])

    same = content_digest(ledger())
    assert content_digest(ledger(fetched_at="later", attempts="3", final_url="v")) == same
    assert content_digest(ledger(outcome="failed")) != same


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        (" HTTP://A.Example:80 ", "http://a.example/"),
        ("https://a.example:443/X?Y=1#part", "https://a.example/X?Y=1"),
        ("https://a.example:8443/x", "https://a.example:8443/x"),
        ("http://[2001:DB8::1]:80/x", "http://[2001:db8::1]/x"),
        ("http://User@A.example/x", "http://User@a.example/x"),
        ("http://a.example:port/", "http://a.example:port/"),
    ],
)
def test_urls_are_normalised(url: str, normal: str) -> None:
    assert normalised_url(url) == normal
    assert normalised_url(normal) == normal


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalised_caption(text)
    assert normalised_caption(once) == once


def test_uids_depend_on_the_normal_form_and_on_where_parts_end() -> None:
    uid = make_uid("http://a.example/x", "a cat")
    assert len(uid) == 32
    assert int(uid, 16) >= 0
    assert make_uid("HTTP://A.example:80/x", " a \n cat ") == uid
    assert make_uid("http://a.example/x", "a  cats") != uid
    assert make_uid("http://a.example/xa", " cat") != make_uid("http://a.example/x", "a cat")


def test_uids_never_change() -> None:
    assert make_uid("http://a.example/x", "a cat") == "1a2dbbbe64894cfbd58a2afad5d2cccd"


def test_every_reason_has_an_outcome_and_a_name_of_its_own() -> None:
    assert all(reason.outcome in {Outcome.DROPPED, Outcome.FAILED} for reason in Reason)
    assert set(ErrorClass) == {"transient", "permanent"}

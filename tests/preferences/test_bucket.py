"""A bucket is shared: what another process wrote is seen at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.preferences.bucket  # noqa: F401
from preferences.fingerprint import fingerprint
from preferences.records import Candidate
from preferences.store import Artifact, Manifest, Shard, Store

ANSWERS = Artifact("candidates", "f00d")


def test_a_listing_seen_before_hides_nothing_that_came_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", str(tmp_path))
    ours, theirs = Store("bucket://b"), Store("bucket://b")
    assert ours.count(ANSWERS) == 0
    assert ours.manifests("candidates") == []
    rows = [Candidate("c", fingerprint("p"), "m", "answer", "complete")]
    theirs.write_part(ANSWERS, Shard(0, 1), Candidate, rows)
    theirs.finish(ANSWERS, Manifest("candidates", "f00d", "answers", 1, 0, ()))
    assert ours.count(ANSWERS) == 1
    assert list(ours.read(ANSWERS, Candidate)) == rows
    assert len(ours.manifests("candidates")) == 1

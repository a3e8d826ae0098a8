"""A disk that fills up stops a build in one line; with space again, the same build completes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from preferences.errors import ServiceError
from preferences.export import export
from preferences.store import Store
from tests.flows.asking import Models, carry_out, parts, serving, write_recipe
from tests.preferences.small_disk import SmallDisk

ENOUGH = 10_000_000


def imported(folder: Path) -> Path:
    """A recipe of imported answers of some length, judged by who wrote them."""
    rows = [
        {"prompt": f"question {n}", "response": f"{model} {os.urandom(90).hex()}", "model": model}
        for n in range(60)
        for model in ("strong", "weak")
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "small",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "prior", "name": "order", "order": ["strong", "weak"]}],
        "split": {"test": 0.3},
        "runtime": {"shard_size": 20},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def disk(place: Path, room: int) -> Store:
    store = Store(place)
    store.fs = SmallDisk(room)
    return store


def contents(place: Path) -> dict[str, bytes]:
    """Every file of the artifacts, byte for byte."""
    root = place / "artifacts"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_wherever_the_disk_fills_up_the_rerun_ends_with_the_same_bytes(tmp_path: Path) -> None:
    recipe = imported(tmp_path)
    whole = disk(tmp_path / "whole", ENOUGH)
    carry_out(recipe, whole)
    needed = ENOUGH - whole.fs.room
    expected = contents(tmp_path / "whole")
    # Full after each thirtieth of what is needed: in every stage, in texts and in tables.
    for place, room in ((tmp_path / f"{n}", needed * n // 30) for n in range(30)):
        store = disk(place, room)
        with pytest.raises(ServiceError) as stopped:
            carry_out(recipe, store)
        said = str(stopped.value)
        assert f"{place}: no space left on the disk; free some and run the same again" in said
        assert len(said.splitlines()) == 1
        # Whatever stands at its place is whole: it is what an undisturbed run has there.
        left = contents(place)
        assert {name: expected[name] for name in left} == left
        store.fs.room = ENOUGH
        carry_out(recipe, store)
        assert contents(place) == expected


def test_a_journal_on_a_full_disk_keeps_what_it_has_and_the_run_asks_no_further(
    tmp_path: Path,
) -> None:
    models, free = Models(), Models()
    with serving(models) as endpoint, serving(free) as other:
        # A line of the journal has about 250 bytes: there is room for some 30 of 80 answers.
        store = disk(tmp_path / "store", 9_000)
        recipe = write_recipe(tmp_path, endpoint.url)
        with pytest.raises(ServiceError, match="no space left on the disk"):
            carry_out(recipe, store)
        asked = models.by_model["policy"]
        kept = sum(
            line.endswith(b"\n")
            for file in (tmp_path / "store" / "journal").rglob("*.jsonl")
            for line in file.read_bytes().splitlines(keepends=True)
        )
        assert kept > 10
        # What was under way, twice the concurrency of 4, is all that is lost.
        assert asked - kept <= 8
        store.fs.room = ENOUGH
        carry_out(recipe, store)
        assert models.by_model == {"policy": 80 + asked - kept, "judge": 80}
        carry_out(write_recipe(tmp_path, other.url), tmp_path / "free")
    mended, whole = parts(tmp_path / "store"), parts(tmp_path / "free")
    assert mended.keys() == whole.keys()
    assert all(mended[name].equals(whole[name]) for name in mended)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_export_to_a_full_disk_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = carry_out(imported(tmp_path), tmp_path / "store")
    dataset = Path(run.store.folder(run.plan.dataset))

    def full(*_: object, **__: object) -> None:
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"x")

    # The card is written last, after the tables.
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ServiceError, match=r"out: no space left on the disk; free some"):
        export(dataset, tmp_path / "out", "plain", "small")
    assert not list(tmp_path.glob("out*"))


_IN_A_SMALL_DISK = """
build() {
    "$PYTHON" -c "from flows.cli import main; main()" build "$RECIPE" --store "$PLACE/store"
}
set -e
mount -t tmpfs -o size=$SIZE none "$PLACE"
set +e
build >first.out 2>first.err
echo $? >first.code
mount -o remount,size=64m "$PLACE"
build >second.out 2>second.err
echo $? >second.code
cp -r "$PLACE/store/artifacts" copied
"""


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="this system gives no namespaces",
)
def test_on_a_real_disk_that_is_full_the_command_says_one_line_and_then_completes(
    tmp_path: Path,
) -> None:
    recipe = imported(tmp_path)
    carry_out(recipe, tmp_path / "whole")
    (tmp_path / "disk").mkdir()
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", _IN_A_SMALL_DISK],
        cwd=tmp_path,
        check=True,
        env=os.environ
        | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(Path.cwd()),
            "RECIPE": str(recipe),
            "PLACE": str(tmp_path / "disk"),
            "SIZE": "120k",
        },
    )
    first = (tmp_path / "first.err").read_text()
    assert (tmp_path / "first.code").read_text() == "1\n", first
    complaints = [line for line in first.splitlines() if not line.startswith("✓")]
    assert len(complaints) == 1, first
    assert "no space left on the disk" in complaints[0]
    second = (tmp_path / "second.err").read_text()
    assert (tmp_path / "second.code").read_text() == "0\n", second
    copied = tmp_path / "copied"
    found = {str(p.relative_to(copied)): p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    assert found == contents(tmp_path / "whole")

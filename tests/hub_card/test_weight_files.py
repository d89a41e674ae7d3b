"""Weights: found damage, links, and copies that go on after an interruption."""

import os
import shutil
from pathlib import Path

import pytest

from kimi_linear.hub_card import weight_files
from kimi_linear.hub_card.exporter import ExportRequest, export

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(released, tmp_path) -> Path:
    return shutil.copytree(released, tmp_path / "source")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda s: (s / SHARDS[1]).unlink(), f"1 of 2 weight files are missing in .*{SHARDS[1]}"),
        (lambda s: _cut(s / SHARDS[1], 100_000), rf"{SHARDS[1]} has 100000 bytes, but its header says \d+"),
        (lambda s: (s / SHARDS[0]).write_bytes((s / SHARDS[0]).read_bytes() + b"x"), "but its header says"),
        (lambda s: _cut(s / SHARDS[0], 100), f"{SHARDS[0]} .* is cut or not a safetensors file"),
        (lambda s: _cut(s / SHARDS[0], 0), f"{SHARDS[0]} .0 bytes. is cut"),
        (lambda s: (s / SHARDS[0]).write_text("version https://git-lfs\noid sha256:1"), "is a Git LFS pointer"),
        (
            lambda s: (s / SHARDS[0]).write_bytes(b"\x08" + bytes(7) + b"not json" + bytes(9)),
            "damaged safetensors header",
        ),
        (lambda s: shutil.copyfile(s / SHARDS[0], s / SHARDS[1]), rf"{SHARDS[1]} lacks \d+ tensors"),
        (lambda s: (s / INDEX).write_text("{"), "is not an index"),
        (lambda s: (s / INDEX).write_text('{"weight_map": {}}'), "lists no tensors"),
        (lambda s: (s / INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}'), "not the name of a safeten"),
        (lambda s: (s / INDEX).unlink(), f"neither {INDEX} nor model.safetensors"),
    ],
)
def test_damage_is_found_and_named(source, out, spoil, problem):
    spoil(source)
    with pytest.raises(ValueError, match=problem) as error:
        export(ExportRequest(out=out, checkpoint=source))
    assert any(word in str(error.value) for word in ("download", "fetch", "folder"))
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("mode", ["hardlink", "symlink", "copy"])
def test_modes(source, out, mode):
    report = export(ExportRequest(out=out, checkpoint=source, weights=mode))
    assert report.weights == mode
    assert report.weight_bytes == sum((source / name).stat().st_size for name in SHARDS)
    for name in SHARDS:
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert (out / name).is_symlink() == (mode == "symlink")
        assert os.path.samefile(out / name, source / name) == (mode != "copy")


def test_links_of_a_hugging_face_cache_are_resolved(released, tmp_path):
    snapshot = tmp_path / "models--someone--kimi-tuned" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(released.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    for mode in ("hardlink", "symlink"):
        out = tmp_path / mode
        export(ExportRequest(out=out, checkpoint=snapshot, weights=mode))
        assert "base_model: someone/kimi-tuned" in (out / "README.md").read_text()
        for name in SHARDS:
            assert (out / name).resolve() == (out / name if mode == "hardlink" else (snapshot / name).resolve())
            assert os.path.samefile(out / name, snapshot / name)
    with pytest.raises(ValueError, match="one of the folders below its snapshots/"):
        export(ExportRequest(out=tmp_path / "no", checkpoint=snapshot.parent.parent))


def _forbid(monkeypatch, *methods: str) -> None:
    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    for method in methods:
        monkeypatch.setattr(Path, method, refuse)


def test_auto_takes_the_first_that_works(source, tmp_path, monkeypatch):
    def used(name: str) -> str:
        return export(ExportRequest(out=tmp_path / name, checkpoint=source)).weights

    assert used("a") == "hardlink"
    _forbid(monkeypatch, "hardlink_to")
    assert used("b") == "symlink"
    _forbid(monkeypatch, "symlink_to")
    assert used("c") == "copy"
    with pytest.raises(OSError, match=r"cannot symlink .* use --weights auto or copy"):
        export(ExportRequest(out=tmp_path / "d", checkpoint=source, weights="symlink"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "source"]


class _Bar:
    """Stands in for tqdm: counts, and interrupts when told."""

    stop_after: float = float("inf")
    steps: list[int] = []

    def __init__(self, **options):
        type(self).steps = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self, count: int) -> None:
        self.steps.append(count)
        if sum(self.steps) > self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(source, out, monkeypatch) -> ExportRequest:
    """An export by copying that was stopped within the second shard."""
    monkeypatch.setattr(weight_files, "_BLOCK", 4096)
    monkeypatch.setattr(weight_files, "tqdm", _Bar)
    monkeypatch.setattr(_Bar, "stop_after", (source / SHARDS[0]).stat().st_size + 100_000)
    request = ExportRequest(out=out, checkpoint=source, weights="copy")
    with pytest.raises(KeyboardInterrupt):
        export(request)
    monkeypatch.setattr(_Bar, "stop_after", float("inf"))
    assert not out.exists()
    return request


def _part(out: Path) -> Path:
    return out.with_name("out.partial") / "folder" / (SHARDS[1] + ".part")


def test_an_interrupted_copy_goes_on(interrupted, source, out):
    kept = _part(out).stat().st_size
    assert 0 < kept < (source / SHARDS[1]).stat().st_size
    export(interrupted)
    # The first shard is whole and the second goes on: neither is copied again.
    assert _Bar.steps[:2] == [(source / SHARDS[0]).stat().st_size, kept]
    assert sum(_Bar.steps) == sum((source / name).stat().st_size for name in SHARDS)
    for name in SHARDS:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not out.with_name("out.partial").exists()
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("left", ["zeros", "too long"])
def test_a_part_that_is_not_the_source_is_copied_anew(interrupted, source, out, left):
    part = _part(out)
    part.write_bytes(bytes(part.stat().st_size) if left == "zeros" else (source / SHARDS[1]).read_bytes() + b"x")
    export(interrupted)
    assert (out / SHARDS[1]).read_bytes() == (source / SHARDS[1]).read_bytes()


def test_only_the_same_request_goes_on(interrupted, source, out):
    with pytest.raises(ValueError, match="an interrupted export with other arguments"):
        export(ExportRequest(out=out, checkpoint=source, weights="hardlink"))
    # A mistake in what may differ does not cost the copies.
    with pytest.raises(ValueError, match="base_model"):
        export(ExportRequest(out=out, checkpoint=source, weights="copy", base_model="no id"))
    assert _part(out).exists()
    os.utime(source / SHARDS[0], (1, 1))
    with pytest.raises(ValueError, match="with other arguments"):
        export(interrupted)


def test_a_read_error_keeps_what_was_copied_and_says_so(source, out, monkeypatch):
    copy = weight_files.copy_resumable

    def fail_second(reader, part, bar):
        if SHARDS[1] in part.name:
            raise OSError(5, "Input/output error")
        copy(reader, part, bar)

    monkeypatch.setattr(weight_files, "copy_resumable", fail_second)
    request = ExportRequest(out=out, checkpoint=source, weights="copy")
    with pytest.raises(OSError, match=r"out\.partial keeps what was written: run the same command again"):
        export(request)
    monkeypatch.setattr(weight_files, "copy_resumable", copy)
    export(request)
    assert (out / SHARDS[1]).read_bytes() == (source / SHARDS[1]).read_bytes()


def test_a_copy_that_does_not_check_out_is_not_kept(source, out, monkeypatch):
    monkeypatch.setattr(weight_files, "copy_resumable", lambda reader, part, bar: part.write_bytes(b"garbage" * 9))
    with pytest.raises(ValueError, match=SHARDS[0]):
        export(ExportRequest(out=out, checkpoint=source, weights="copy"))
    assert not out.with_name("out.partial").exists()

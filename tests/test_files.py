"""Files appear whole or not at all."""

import os

from covidmask.files import atomic_path


def test_a_name_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / f"{'x' * 250}.json"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """On Windows another one is refused; no bytes are written here, yet a reader may not."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.write(handle, b"")))
    with atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
    assert synced == [0] and (tmp_path / "file.txt").read_text() == "whole"

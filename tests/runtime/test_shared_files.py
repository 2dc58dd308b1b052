"""A cache volume whose files pods of several users have made, as happens where the cluster gives pods their users."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gantline_runtime import cli, volume_lock
from gantline_runtime.artefact import MANIFEST, Manifest, Recipe, Staging
from gantline_runtime.commands import evict
from gantline_runtime.termination import Reason, TerminationMessage

from tests.runtime.checkpoint_files import model_files
from tests.runtime.fetching import last_word
from tests.runtime.hub_server import Hub, serve_hub

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be several users")

FIRST, SECOND = 1_000_640_000, 1_000_650_000
"""Users as OpenShift gives them out."""
NAME = "fetch-0123456789"
FILES = {**model_files({"vocab_size": 4000}), "tokenizer.json": b'{"model": {}}'}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_lock, "POLL_S", 0.02)
    monkeypatch.setattr(volume_lock, "STALE_S", 0.3)
    monkeypatch.setattr(evict, "STALE_S", 0.3)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That every user may enter; pytest's own are root's alone."""
    path = Path(tempfile.mkdtemp(prefix="gantline-shared-"))
    path.chmod(0o777)
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(path / "last-word"))
    monkeypatch.setenv("HF_HOME", str(path / "hf"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def volume(folder: Path, group: int, mode: int) -> Path:
    path = folder / "volume"
    path.mkdir()
    os.chown(path, 0, group)
    path.chmod(mode)
    return path


def as_user(user: int, group: int, groups: list[int], work: Callable[[], int]) -> int:
    """What `work` answers in a process of this user, which has none of root's powers."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.setgroups(groups)
        os.setgid(group)
        os.setuid(user)
        os.umask(0o022)
        os._exit(work())
    except BaseException:
        os._exit(99)


def gantline(folder: Path, user: int, group: int, groups: list[int], *arguments: str) -> tuple[int, TerminationMessage]:
    (folder / "last-word").unlink(missing_ok=True)
    code = as_user(user, group, groups, lambda: cli.main([*arguments]))
    return code, last_word(folder)


SHARING = {
    "a volume of the pods' fsGroup": (1_000_640_000, 0o2775, (FIRST, 0, [1_000_640_000]), (SECOND, 0, [1_000_640_000])),
    "no fsGroup, users of any number in group 0": (0, 0o775, (FIRST, 0, [0]), (SECOND, 0, [0])),
    "user 1000 before, a user of the cluster's now": (1000, 0o2775, (1000, 1000, [1000]), (FIRST, 0, [1000])),
}


@pytest.mark.parametrize("how", SHARING)
def test_what_one_user_fetched_another_goes_on_with_and_evicts(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, mode, first, second = SHARING[how]
    root = volume(folder, group, mode)
    target = root / NAME
    with serve_hub(Hub(files=FILES)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        warm = folder / "warm" / NAME
        assert cli.main(["fetch", "hf://org/name", str(warm)]) == 0  # the children can import nothing: Python is root's here
        assert cli.main(["evict", str(warm.parent)]) == 0
        code, word = gantline(folder, *first, "fetch", "hf://org/name", str(target))
        assert (code, word.reason) == (0, Reason.COMPLETED), word
        for path in [target, *target.rglob("*")]:
            found = path.stat()
            readable = 0o555 if path.is_dir() else 0o444
            assert found.st_uid == first[0] and found.st_mode & readable == readable, path

        # Damaged by the first one's end, mended by the second one.
        (target / "tokenizer.json").write_bytes(b"{}")
        code, word = gantline(folder, *second, "fetch", "hf://org/name", str(target))
        assert (code, word.reason) == (0, Reason.COMPLETED), word
        assert (target / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]

    as_user(*first, lambda: _leave_half(root / "awq-00000000aa"))
    code, word = gantline(folder, *second, "evict", str(root), NAME, "awq-00000000aa")
    assert (code, word.artefact["evicted"], word.artefact["left"]) == (0, [NAME, "awq-00000000aa"], []), word
    assert sorted(path.name for path in root.rglob("*") if LOCKED not in str(path)) == [".gantline-evicted"], "every byte is gone"


LOCKED = volume_lock.LOCKS


def _leave_half(target: Path) -> int:
    """As a quantize Job that was killed leaves it, in a process that shares as the command does."""
    from gantline_runtime.shared_files import share_with_group

    share_with_group()
    with Staging(target) as staging:
        (staging.folder / "deep").mkdir()
        (staging.folder / "deep" / "layer").write_bytes(b"12345")
    return 0


def test_what_another_user_keeps_to_itself_is_left_and_the_answer_says_whose_it_is(folder: Path) -> None:
    """As an earlier release, or somebody's own program, left it."""
    root = volume(folder, 0, 0o777)
    manifest: Any = Manifest("fetch", 1, {}, 1, {})

    def publish() -> int:
        with Staging(root / NAME, Recipe("fetch", 1, {})) as staging:
            (staging.folder / "x").write_text("x")
            staging.publish(manifest)
        (root / NAME).chmod(0o755)
        (root / volume_lock.LOCKS).chmod(0o777)
        return 0

    assert cli.main(["evict", str(root)]) == 0
    assert as_user(1000, 1000, [1000], publish) == 0
    code, word = gantline(folder, FIRST, 0, [0], "evict", str(root), NAME)
    assert code != 0 and word.reason is Reason.DISK_FULL, word
    assert f"{NAME} cannot be removed by user {FIRST}, it is user 1000's and group 1000's" in word.message and "chmod -R g+rwX" in word.cure
    assert {path.name for path in (root / NAME).iterdir()} == {"x", MANIFEST}, "it is whole, and can be served"
    assert stat.S_IMODE((root / NAME / "x").stat().st_mode) & 0o444 == 0o444

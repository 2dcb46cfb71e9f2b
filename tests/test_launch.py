"""The recipes of docs/launch.md do in a dry run what they say, and so do the scripts and manifests that belong to them.

Nothing here reaches another machine: tests/stand_in.sh replaces the programs that a recipe calls (gcloud, ssh, srun, ...).
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from compiling import xla_flags
from jax._src.clusters import ClusterEnv
from pages import LAUNCH, SET, blocks
from short_runs import ROOT, free_port, metrics
from short_runs import settings as tiny

from mutransformer.config import load as settings
from mutransformer.config.schema import Config
from mutransformer.errors import STOPPED, STUCK, USAGE_ERROR

PROGRAMS = "gcloud ssh tmux git sbatch srun scontrol xpk kubectl tensorboard pip sudo mountpoint pkill".split()
PROGRAMS += ["python", "python3.12", "mutransformer"]
# The options of gcloud's TPU commands, as their --help lists them.
EVERYWHERE = {"--project", "--zone", "--quiet", "--format"}
GCLOUD = {
    "create": EVERYWHERE | {"--accelerator-type", "--version", "--spot"},
    "ssh": EVERYWHERE | {"--worker", "--command"},
    "describe": EVERYWHERE,
    "delete": EVERYWHERE,
}


class Box:
    """A folder in which a shell block runs with the stand-ins: a home with the checkout and its .venv, and two empty workers."""

    def __init__(self, folder: Path):
        self.folder, self.checkout, self.output = folder, folder / "home/mutransformer", ""
        for made in (folder / "bin", folder / "shared", self.checkout / ".venv/bin", folder / "worker0", folder / "worker1"):
            made.mkdir(parents=True)
        for entry in ("configs", "docs", "mutransformer", "pyproject.toml", "scripts"):
            (self.checkout / entry).symlink_to(ROOT / entry)
        for path in [*(folder / "bin" / program for program in PROGRAMS), self.checkout / ".venv/bin/python"]:
            shutil.copy(ROOT / "tests/stand_in.sh", path)
        for log in ("shared/train.0.log", "worker0/train.log", "worker1/train.log"):
            (folder / log).touch()
        mine = {
            "BOX": str(folder),
            "HOME": str(folder / "home"),
            "SHARED": str(folder / "shared"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "JAX_"))}
        self.env = {**inherited, **SET, **mine}

    def run(self, code: str, expect: int = 0, env: dict[str, str] | None = None) -> None:
        """Runs a block, until the first command that fails."""
        command = ["bash", "-euo", "pipefail", "-c", code]
        ran = subprocess.run(command, env=self.env | (env or {}), cwd=self.checkout, capture_output=True, text=True, timeout=120)
        self.output = ran.stdout + ran.stderr
        assert ran.returncode == expect, f"exit code {ran.returncode}: {self.output}"

    def calls(self, program: str, *first: str) -> list[list[str]]:
        """The arguments of each call of a program whose first arguments are these."""
        path = self.folder / "calls"
        record = path.read_text(encoding="utf-8") if path.exists() else ""
        split = [call.split("\0") for call in record.split("\0\1\0")[:-1]]
        return [args for name, *args in split if name == program and args[: len(first)] == list(first)]

    def configs(self) -> list[Config]:
        """The resolved settings of each train.py."""
        found = [settings.load([str(path)]) for path in self.folder.glob("config.*")]
        return sorted(found, key=lambda config: config.distributed.process_id or 0)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def block(heading: str, i: int = 0) -> str:
    return [code for at, code in blocks(LAUNCH) if at == heading][i]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Box]:
    """The box in which a block of launch.md has run, by its code; each block runs once."""

    @cache
    def run(code: str) -> Box:
        box = Box(tmp_path_factory.mktemp("box"))
        box.run(code)
        return box

    return run


@pytest.mark.parametrize("heading, code", [pytest.param(*b, id=f"{i}-{b[0]}") for i, b in enumerate(blocks(LAUNCH))])
def test_recipes_run_dry(dry_run: Callable[[str], Box], heading: str, code: str) -> None:
    box = dry_run(code)
    for call in box.calls("gcloud"):
        assert call[:3] == ["compute", "tpus", "tpu-vm"]
        options = {word.partition("=")[0] for word in call[4:] if word.startswith("--") and word != "--"}
        assert options <= GCLOUD[call[3]], f"gcloud {call[3]} has no {options - GCLOUD[call[3]]}"
        assert "tpu" in call and {"--project=project", "--zone=zone"} <= set(call)
    assert len(box.configs()) == len([call for call in box.calls("python") if "scripts/train.py" in call]), box.output


def test_ssh(dry_run: Callable[[str], Box]) -> None:
    box = dry_run(block("Several hosts, by ssh"))
    assert [host for host, _ in box.calls("ssh")] == ["host0", "host1"]
    one, two = box.configs()
    assert (one.distributed.process_id, two.distributed.process_id) == (0, 1)
    for config in (one, two):
        assert config.distributed.coordinator == "host0:8476" and config.distributed.n_process == 2
        assert config.workdir == f"{box.folder}/shared/runs" and config.data.cache_dir == f"{box.folder}/shared/cache"
    assert settings.to_yaml(one).replace("process_id: 0", "process_id: 1") == settings.to_yaml(two)
    assert [(box.folder / f"shared/train.{i}.log").read_text() for i in (0, 1)] == ["exit code 0\n"] * 2


def test_pkill_finds_the_run_and_nothing_else(dry_run: Callable[[str], Box]) -> None:
    boxes = [dry_run(block(heading, 1)) for heading in ("Several hosts, by ssh", "A slice of several hosts")]
    (pattern,) = {call[-1] for box in boxes for call in box.calls("pkill")}
    run = ".venv/bin/python -u scripts/train.py configs/large.yaml"
    assert re.search(pattern, run)
    for other in (f"tmux new-session -d -s train {run}", f"sh -c {run}", f"bash -c pkill -TERM -f '{pattern}'"):
        assert not re.search(pattern, other)


@pytest.mark.slow
def test_ssh_processes_meet(box: Box) -> None:
    code = block("Several hosts, by ssh")
    for written, here in (('HOSTS="host0 host1"', 'HOSTS="127.0.0.1 127.0.0.1"'), (":8476", f":{free_port()}")):
        assert written in code
        code = code.replace(written, here)
    args = [arg for arg in tiny(box.folder, "steps=3") if not arg.startswith(("workdir", "data.cache_dir"))]
    (box.folder / "more").write_text("\n".join(args))
    box.run(code, env={"DETACH": "1", "MORE": str(box.folder / "more"), "XLA_FLAGS": xla_flags(2)})
    logs = [box.folder / f"shared/train.{i}.log" for i in (0, 1)]
    deadline = time.monotonic() + 200
    while not all("exit code" in log.read_text() for log in logs if log.exists()) or not logs[1].exists():
        assert time.monotonic() < deadline, [log.read_text() for log in logs]
        time.sleep(0.2)
    for log in logs:
        assert log.read_text().endswith("exit code 0\n"), log.read_text()
    assert "4 x cpu, mesh x=4 x y=1" in logs[0].read_text()
    assert list(metrics(box.folder / "shared/runs/large")) == [1, 2, 3]


def test_tpu_slice(dry_run: Callable[[str], Box]) -> None:
    box = dry_run(block("A slice of several hosts"))
    (created,) = box.calls("gcloud", "compute", "tpus", "tpu-vm", "create")
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"} <= set(created)
    for worker in ("worker0", "worker1"):  # cloned, set up by the real script, run
        venv = box.folder / worker / "mutransformer/.venv"
        assert ["-m", "venv", str(venv)] in box.calls("python3.12")
        assert [call[-1] for call in box.calls("python", "-m", "pip")].count(f"{venv.parent}[tpu,gcs]") == 1
        assert (box.folder / worker / "train.log").read_text() == "exit code 0\n"
    assert len(box.calls("python", "-", "tpu", "900")) == 2
    assert box.calls("sudo", "mount") == [["mount", "-t", "nfs", "server:/export", "/mnt/shared"]] * 2
    one, two = box.configs()
    assert one == two and one.distributed.enabled and one.distributed.process_id is None
    assert (one.name, one.workdir, one.data.cache_dir) == ("first", "/mnt/shared/runs", "gs://bucket/cache")


def test_tpu_look(dry_run: Callable[[str], Box]) -> None:
    box = dry_run(block("A slice of several hosts", 1))
    workers = [word for call in box.calls("gcloud") for word in call if word.startswith("--worker")]
    assert workers == ["--worker=0", "--worker=all", "--worker=0"]


def test_setup_keeps_an_existing_environment(box: Box) -> None:
    venv = f"{box.checkout}/.venv"
    box.run("scripts/tpu_vm_setup.sh --no-check")
    assert not box.calls("python3.12", "-m", "venv") and len(box.calls("python", "-m", "pip")) == 1
    shutil.rmtree(venv)
    box.run("scripts/tpu_vm_setup.sh --no-check; scripts/tpu_vm_setup.sh --no-check")
    assert len(box.calls("python3.12", "-m", "venv")) == 1 and len(box.calls("python", "-m", "pip")) == 3
    assert not box.calls("sudo")


@pytest.mark.parametrize(
    "args, error",
    [
        ("--bad", "--bad: no such option; see --help"),
        ("--venv", "--venv: needs a value"),
        ("--timeout soon", "--timeout soon: must be a number of seconds"),
        ("--venv /dev/null", "/dev/null: exists and is not a virtual environment"),
        ("--venv new --python /bin/false", "--python /bin/false: must be Python 3.11 or newer"),
    ],
)
def test_setup_reports_mistakes(box: Box, args: str, error: str) -> None:
    box.run(f"scripts/tpu_vm_setup.sh {args}", expect=USAGE_ERROR)
    assert box.output.startswith(f"error: {error}") and box.output.count("\n") == 1
    assert not box.calls("python3.12", "-m", "venv")


def test_setup_checks_the_devices(box: Box) -> None:
    """The check connects through a cluster that JAX detects, here a SLURM step of one task, and looks for the platform."""
    step = {"JOB_ID": f"{free_port()}", "STEP_NODELIST": "localhost", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    env = {f"SLURM_{key}": value for key, value in step.items()} | {"CHECK": "1", "XLA_FLAGS": ""}
    box.run("scripts/tpu_vm_setup.sh --platform cpu", env=env)
    assert box.output.endswith("process 0 of 1: 1 of 1 devices, cpu\n")
    box.run("scripts/tpu_vm_setup.sh", expect=USAGE_ERROR, env=env)
    assert box.output.endswith("error: JAX sees 1 devices of cpu, none of tpu\n")


def test_slurm(dry_run: Callable[[str], Box]) -> None:
    box = dry_run(block("SLURM"))
    one, two = box.configs()
    assert one == two and one.distributed.enabled and one.name == "first" and one.workdir == f"{box.folder}/shared/runs"
    assert not box.calls("scontrol")


@pytest.mark.parametrize("code", [USAGE_ERROR, STOPPED])
def test_slurm_requeues_a_stopped_job(box: Box, code: int) -> None:
    box.run(block("SLURM"), expect=code, env={"SRUN_CODE": str(code)})
    assert box.calls("scontrol") == ([["requeue", "77"]] if code == STOPPED else [])
    box.run("unset SHARED; sbatch docs/slurm.sbatch configs/large.yaml", expect=1)
    assert "SHARED: must be a folder that all nodes see" in box.output


def test_slurm_options(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (ROOT / "docs/slurm.sbatch").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"], "JAX gives a task the GPU of its local number, and no other"
    nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
    last = {"JOB_ID": 77, "STEP_NODELIST": "node[07-08]", "NTASKS": nodes * tasks, "PROCID": nodes * tasks - 1}
    for key, value in {**last, "LOCALID": tasks - 1}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    address, n, i, devices = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    assert (str(address).partition(":")[0], n, i, devices) == ("node07", nodes * tasks, nodes * tasks - 1, [tasks - 1])


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-gpu.yaml"])
def test_jobsets(name: str) -> None:
    found = yaml.safe_load((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["spec"]["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    on = {"containerName": container["name"], "operator": "In", "values": [USAGE_ERROR]}
    assert rule == {"action": "FailJob", "onExitCodes": on}, "exit code 75 and the loss of a host restart it"
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] and replicated["replicas"] == 1
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0, "else the policy is refused, or a pod restarts alone"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["python", "-u", "scripts/train.py"] and (ROOT / container["command"][-1]).exists()
    env = {each["name"]: each["value"] for each in container.get("env", [])}
    ((device, n),) = container["resources"]["limits"].items()
    for i in range(job["completions"]):
        args = [str(ROOT / arg) if arg.endswith(".yaml") else arg for arg in container["args"]]
        config = settings.load([arg.replace("$(JOB_COMPLETION_INDEX)", str(i)) for arg in args])
        assert config.workdir.startswith("/shared/") and config.data.cache_dir.startswith("/shared/")
        if device == "google.com/tpu":
            assert config.distributed.enabled and config.distributed.process_id is None and not env
        else:
            assert (config.distributed.n_process, config.distributed.process_id) == (job["completions"], i)
            first = f"{found['metadata']['name']}-{replicated['name']}-0-0.{found['metadata']['name']}"
            assert re.fullmatch(re.escape(first) + r":\d+", env["JAX_COORDINATOR_ADDRESS"])
    if device == "google.com/tpu":
        x, y = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        assert int(x) * int(y) == n * job["completions"]


def test_jobset_is_filled_in(dry_run: Callable[[str], Box]) -> None:
    box = dry_run(block("Kubernetes"))
    assert box.calls("kubectl", "apply") == [["apply", "-f", "-"]]
    pod = yaml.safe_load((box.folder / "applied.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["spec"]["containers"][0]["image"] == SET["IMAGE"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == SET["CLAIM"]


def test_xpk(dry_run: Callable[[str], Box]) -> None:
    box = dry_run(block("Kubernetes", 1))
    (args,) = box.calls("xpk", "workload", "create")
    codes = f"--restart-on-exit-codes={STOPPED},{STUCK},134"  # 134: process 0 was lost
    assert {"--tpu-type=v5litepod-16", f"--docker-image={SET['IMAGE']}", codes} <= set(args)
    (config,) = box.configs()
    assert config.distributed.enabled and config.workdir == "/shared/runs"

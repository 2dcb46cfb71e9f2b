"""The commands of README and docs/: they parse, their settings and options exist, and the recipes do what they say, dry.

Nothing here reaches another machine: what a recipe calls (gcloud, ssh, srun, ...) is replaced by tests/stand_in.sh.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from jax._src.clusters import ClusterEnv
from runs import ROOT, free_port, metrics
from runs import settings as tiny

from mutransformer.config import load as settings
from mutransformer.config.schema import Config
from mutransformer.errors import STOPPED, USAGE_ERROR, ConfigError

LAUNCH = ROOT / "docs/launch.md"
PAGES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "gcloud ssh tmux git sbatch srun scontrol xpk kubectl tensorboard pip sudo mountpoint pkill python python3.12".split()
SET = {
    "REPO_URL": "https://git.example/mutransformer",
    "PROJECT": "project",
    "ZONE": "zone",
    "TPU": "tpu",
    "BUCKET": "bucket",
    "NFS": "server:/export",
    "IMAGE": "registry.example/image:1",
    "CLAIM": "claim",
    "CLUSTER": "cluster",
}
# Of gcloud's TPU commands, as their --help lists them.
EVERYWHERE = {"--project", "--zone", "--quiet", "--format"}
GCLOUD = {
    "create": EVERYWHERE | {"--accelerator-type", "--version", "--spot"},
    "ssh": EVERYWHERE | {"--worker", "--command"},
    "describe": EVERYWHERE,
    "delete": EVERYWHERE,
}


def blocks(page: Path, language: str = "bash") -> list[tuple[str, str]]:
    """(heading, code) of each block in a language."""
    heading, found = "", []
    for match in re.finditer(r"^#+ ([^\n]*)|^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.append((heading, match[3]))
    return found


def commands(page: Path) -> list[str]:
    """The command lines that begin with `python scripts/...`, as they are written."""
    lines = "\n".join(code for _, code in blocks(page)).replace("\\\n", " ").splitlines()
    return [found[0] for line in lines if (found := re.search(r"(?<![\w/'\"=.*])python (-u )?scripts/.*", line))]


def resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> Config | None:
    """Lets the script's own parser read a command, and `settings.load` its settings; None if it takes none."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda m: {**SET, "SHARED": "/shared"}[m[1]], command), comments=True)
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))

    class Read(Exception):
        pass

    def stopping(method: str) -> Any:
        real = getattr(ArgumentParser, method)

        def parse(self: ArgumentParser, *args: Any) -> None:
            raise Read(real(self, *args))

        return parse

    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(ArgumentParser, method, stopping(method))
        patch.setattr(sys, "argv", words[script:])
        patch.chdir(ROOT)
        try:
            runpy.run_path(words[script], run_name="__main__")
        except Read as read:
            (given,) = read.args
        except SystemExit as ended:
            assert ended.code == 0 and "--help" in words, f"{command}: exit code {ended.code}"
            return None
        else:
            raise AssertionError(f"{command}: it reads no command line")
        if not hasattr(given, "settings"):
            return None
        return settings.load([arg for arg in given.settings if not re.fullmatch(r"runs/\w+/config.yaml", arg)])  # of a future run


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_commands_resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(command, monkeypatch)


@pytest.mark.parametrize(
    "command, error",
    [
        ("python scripts/train.py configs/small.yaml optim.learning_rate=1", ConfigError),
        ("python scripts/train.py configs/smal.yaml", ConfigError),
        ("python scripts/prepare_data.py configs/small.yaml --dryrun", AssertionError),
    ],
)
def test_a_wrong_command_would_be_found(command: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(error):
        resolve(command, monkeypatch)


def test_commands_are_found() -> None:
    assert len(commands(ROOT / "README.md")) >= 12 and len(commands(LAUNCH)) >= 2
    assert all(blocks(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shell_blocks_parse(page: Path) -> None:
    for heading, code in blocks(page):
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{heading}: {done.stderr}"


@pytest.mark.parametrize("script", ["scripts/tpu_vm_setup.sh", "docs/slurm.sbatch", "tests/stand_in.sh"])
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


class Box:
    """A folder in which a shell block runs among the stand-ins: a home with the checkout and its .venv; two empty workers."""

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
        """Runs a block; a command of it that fails ends it."""
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
        """What each train.py resolved its settings to."""
        found = [settings.load([str(path)]) for path in self.folder.glob("config.*")]
        return sorted(found, key=lambda config: config.distributed.process_id or 0)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def block(heading: str, i: int = 0) -> str:
    return [code for at, code in blocks(LAUNCH) if at == heading][i]


@pytest.mark.parametrize("heading, code", [pytest.param(*b, id=f"{i}-{b[0]}") for i, b in enumerate(blocks(LAUNCH))])
def test_recipes_run_dry(box: Box, heading: str, code: str) -> None:
    box.run(code)
    for call in box.calls("gcloud"):
        assert call[:3] == ["compute", "tpus", "tpu-vm"]
        given = [word.partition("=")[0] for word in call[4:] if word.startswith("--") and word != "--"]
        assert set(given) <= GCLOUD[call[3]], f"gcloud {call[3]} has no {set(given) - GCLOUD[call[3]]}"
        assert "tpu" in call and {"--project=project", "--zone=zone"} <= set(call)
    assert len(box.configs()) == len([call for call in box.calls("python") if "scripts/train.py" in call]), box.output


def test_ssh(box: Box) -> None:
    box.run(block("Several hosts, by ssh"))
    assert [host for host, _ in box.calls("ssh")] == ["host0", "host1"]
    one, two = box.configs()
    assert (one.distributed.process_id, two.distributed.process_id) == (0, 1)
    for config in (one, two):
        assert config.distributed.coordinator == "host0:8476" and config.distributed.n_process == 2
        assert config.workdir == f"{box.folder}/shared/runs" and config.data.cache_dir == f"{box.folder}/shared/cache"
    assert settings.to_yaml(one).replace("process_id: 0", "process_id: 1") == settings.to_yaml(two)
    assert [(box.folder / f"shared/train.{i}.log").read_text() for i in (0, 1)] == ["exit code 0\n"] * 2


def test_pkill_finds_the_run_and_nothing_else(box: Box) -> None:
    patterns = {
        call[-1]
        for heading in ("Several hosts, by ssh", "A slice of several hosts")
        for call in (box.run(block(heading, 1)), box.calls("pkill"))[1]
    }
    (pattern,) = patterns
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
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    box.run(code, env={"DETACH": "1", "MORE": str(box.folder / "more"), "XLA_FLAGS": flags})
    logs = [box.folder / f"shared/train.{i}.log" for i in (0, 1)]
    deadline = time.monotonic() + 200
    while not all("exit code" in log.read_text() for log in logs if log.exists()) or not logs[1].exists():
        assert time.monotonic() < deadline, [log.read_text() for log in logs]
        time.sleep(0.2)
    for log in logs:
        assert log.read_text().endswith("exit code 0\n"), log.read_text()
    assert "4 x cpu as mesh 4 x 1" in logs[0].read_text()
    assert list(metrics(box.folder / "shared/runs/large")) == [1, 2, 3]


def test_tpu_slice(box: Box) -> None:
    box.run(block("A slice of several hosts"))
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


def test_tpu_look(box: Box) -> None:
    box.run(block("A slice of several hosts", 1))
    asked = [call for call in box.calls("gcloud") if any(word.startswith("--command=") for word in call)]
    assert [next(word for word in call if word.startswith("--worker")) for call in asked] == [
        "--worker=0",
        "--worker=all",
        "--worker=0",
    ]


def test_setup_keeps_what_is_there(box: Box) -> None:
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
        ("--venv /dev/null", "/dev/null: is in the way, and no virtual environment"),
        ("--venv new --python /bin/false", "--python /bin/false: must be Python 3.11 or newer"),
    ],
)
def test_setup_tells_mistakes(box: Box, args: str, error: str) -> None:
    box.run(f"scripts/tpu_vm_setup.sh {args}", expect=USAGE_ERROR)
    assert box.output.startswith(f"error: {error}") and box.output.count("\n") == 1
    assert not box.calls("python3.12", "-m", "venv")


def test_setup_checks_the_devices(box: Box) -> None:
    """The check joins through a cluster that JAX finds by itself, here a SLURM step of one task, and looks for the platform."""
    step = {"JOB_ID": f"{free_port()}", "STEP_NODELIST": "localhost", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    env = {f"SLURM_{key}": value for key, value in step.items()} | {"CHECK": "1", "XLA_FLAGS": ""}
    box.run("scripts/tpu_vm_setup.sh --platform cpu", env=env)
    assert box.output.endswith("process 0 of 1: 1 of 1 devices, cpu\n")
    box.run("scripts/tpu_vm_setup.sh", expect=USAGE_ERROR, env=env)
    assert box.output.endswith("error: JAX sees 1 devices of cpu, none of tpu\n")


@pytest.mark.parametrize("code", [0, USAGE_ERROR, STOPPED])
def test_slurm_puts_back_what_was_stopped(box: Box, code: int) -> None:
    box.run(block("SLURM"), expect=code, env={"SRUN_CODE": str(code)})
    assert box.calls("scontrol") == ([["requeue", "77"]] if code == STOPPED else [])
    one, two = box.configs()
    assert one == two and one.distributed.enabled and one.name == "first" and one.workdir == f"{box.folder}/shared/runs"
    box.run("unset SHARED; sbatch docs/slurm.sbatch configs/large.yaml", expect=1)
    assert "SHARED: must be a folder that all nodes see" in box.output


def test_slurm_options(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (ROOT / "docs/slurm.sbatch").read_text(encoding="utf-8")
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    assert given["signal"] == "TERM@120" and "requeue" in given and given["open-mode"] == "append"
    assert given["ntasks-per-node"] == given["gpus-per-node"], "JAX gives a task the GPU of its local number, and no other"
    nodes, tasks = int(given["nodes"]), int(given["ntasks-per-node"])
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
    assert rule == {"action": "FailJob", "onExitCodes": on}, "75 and the loss of a host start it anew"
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] and replicated["replicas"] == 1
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0, "or the policy is refused, or a pod is started alone"
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


def test_jobset_is_filled_in(box: Box) -> None:
    box.run(block("Kubernetes").splitlines()[0])
    (args,) = box.calls("kubectl")
    assert args == ["apply", "-f", "-"]
    pod = yaml.safe_load((box.folder / "applied.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["spec"]["containers"][0]["image"] == SET["IMAGE"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == SET["CLAIM"]


def test_xpk(box: Box) -> None:
    box.run(block("Kubernetes", 1))
    (args,) = box.calls("xpk", "workload", "create")
    assert {"--tpu-type=v5litepod-16", f"--docker-image={SET['IMAGE']}", f"--restart-on-exit-codes={STOPPED}"} <= set(args)
    (config,) = box.configs()
    assert config.distributed.enabled and config.workdir == "/shared/runs"

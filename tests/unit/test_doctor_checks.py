import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.doctor import surroundings, system
from mnist_dist.doctor.finding import Finding, examine

FINE = Finding(check="any", state="ok", found="well")


def states(findings):
    return [finding.state for finding in findings]


def write_config(folder: Path, text: str) -> dict[str, str]:
    file = folder / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return {"HF_HOME": str(folder)}


def test_a_check_that_the_machine_breaks_off_is_a_finding_of_its_own():
    def broken():
        raise PermissionError(13, "Permission denied", "/proc/secret")

    (finding,) = examine("secret", broken)
    assert (finding.check, finding.state) == ("secret", "problem")
    assert "PermissionError" in finding.found
    assert "/proc/secret" in finding.found
    assert examine("any", lambda: FINE) == [FINE]


def test_a_bug_in_a_check_keeps_its_traceback():
    with pytest.raises(KeyError):
        examine("bug", lambda: {"any": FINE}["other"])


@pytest.mark.parametrize(
    "files",
    [{"cpu.max": "50000 100000"}, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}],
)
def test_a_cpu_quota_below_the_cores_is_a_warning_with_the_threads_to_take(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    finding = system.cpus(tmp_path)
    assert finding.state == "warning"
    assert "cgroup quota 0.5 CPUs" in finding.found
    assert "OMP_NUM_THREADS=1" in finding.advice


@pytest.mark.parametrize(
    "files",
    [{}, {"cpu.max": "max 100000"}, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}],
)
def test_no_cpu_quota_is_well(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    finding = system.cpus(tmp_path)
    assert finding.state == "ok"
    assert f"of {os.cpu_count()} cores" in finding.found
    assert "no cgroup quota" in finding.found


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="needs cores to leave out")
def test_an_affinity_to_one_core_is_seen():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from mnist_dist.doctor import system; print(system.cpus().found)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f"1 of {os.cpu_count()} cores allowed")


def test_little_shared_memory_is_a_warning_and_none_at_all_is_well(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert system.shared_memory(tmp_path, least=1).state == "ok"
    assert system.shared_memory(tmp_path, least=2 * free).state == "warning"
    assert system.shared_memory(tmp_path / "absent").state == "ok"


def test_a_low_limit_of_open_files_is_a_warning():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    ended = subprocess.run(
        [sys.executable, "-c", "from mnist_dist.doctor import system; print(system.open_files())"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "state='warning', found='limit 300 (at most" in ended.stdout
    assert "ulimit -n" in ended.stdout


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 70])
def test_a_host_name_that_does_not_resolve_is_a_warning(name):
    finding = system.host_name(name)
    assert finding.state == "warning"
    assert finding.found.startswith(f"{name} does not resolve (")
    assert "/etc/hosts" in finding.advice


def test_a_host_name_that_only_this_machine_can_reach_says_so():
    finding = system.host_name("localhost")
    assert finding.state == "ok"
    assert finding.found.endswith("for this machine alone")


def test_a_port_opens_on_the_loopback_interface_and_not_on_another_machines_address():
    assert system.loopback_port().state == "ok"
    assert system.loopback_port("203.0.113.1").state == "problem"  # reserved for documentation: nobody has it


def test_a_missing_package_is_a_problem():
    finding = system.packages(("numpy", "no-such-package"))
    assert (finding.state, finding.found) == ("problem", "not installed: no-such-package")
    assert system.packages().state == "ok"


def test_an_undisturbed_environment_is_well():
    variables = {"PATH": "/bin", "OMP_NUM_THREADS": "2", "ACCELERATE_MIXED_PRECISION": "no", "SLURM_NTASKS": "2"}
    assert states(surroundings.environment(variables, cpus=2)) == ["ok"]


@pytest.mark.parametrize(
    ("variables", "state", "advice"),
    [
        ({"WORLD_SIZE": "2"}, "warning", "RANK and LOCAL_RANK are not set: `unset WORLD_SIZE`."),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "warning", "LOCAL_RANK is not set: `unset RANK WORLD_SIZE`."),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "warning", "`unset RANK LOCAL_RANK WORLD_SIZE`."),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "problem", "`unset RANK LOCAL_RANK WORLD_SIZE`."),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "problem", "`unset RANK LOCAL_RANK WORLD_SIZE`."),
        ({"RANK": "a", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "problem", "`unset RANK LOCAL_RANK WORLD_SIZE`."),
        ({"ACCELERATE_USE_CPU": "true"}, "warning", "`unset ACCELERATE_USE_CPU`."),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "problem", "`unset ACCELERATE_USE_DEEPSPEED`."),
        ({"ACCELERATE_TORCH_DEVICE": "cuda"}, "problem", "use --device instead. `unset ACCELERATE_TORCH_DEVICE`."),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "problem", "set train.micro_batch instead."),
        ({"ACCELERATE_DEBUG_MODE": "abc"}, "ok", "hidden from Accelerate"),
        ({"PMI_SIZE": "4"}, "ok", "hidden from Accelerate"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "ok", "hidden from Accelerate"),
        ({"MNIST_DIST_GROUP_FOLDER": "/gone"}, "problem", ""),
        ({"OMP_NUM_THREADS": "64"}, "warning", "`unset OMP_NUM_THREADS`."),
        ({"OMP_NUM_THREADS": "1"}, "warning", "`unset OMP_NUM_THREADS`."),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "warning", "`unset OMP_WAIT_POLICY`."),
        ({"CUDA_VISIBLE_DEVICES": ""}, "warning", "Hides every GPU"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "warning", "Hides every GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "ok", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_variable_that_would_disturb_a_run_is_shown_with_its_remedy(variables, state, advice):
    (finding,) = surroundings.environment(variables, cpus=2)
    assert finding.state == state
    assert next(iter(variables.values())) in finding.found
    assert advice in finding.advice


def test_a_process_that_accelerate_launch_started_alone_is_told_that_it_is_a_worker():
    worker, accelerate = surroundings.environment({"ACCELERATE_DYNAMO_MODE": "default"}, cpus=2)
    assert states([worker, accelerate]) == ["warning", "ok"]
    assert "starts nothing" in worker.advice


def test_the_config_of_accelerate_is_looked_for_where_accelerate_looks(tmp_path):
    """Asks Accelerate itself, which decides when it is imported."""
    settings = [{"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/x"}, {"XDG_CACHE_HOME": str(tmp_path)}, {}]
    code = (
        "import importlib, json, os, sys\n"
        "from accelerate.commands.config import config_args\n"
        "for setting in json.loads(sys.argv[1]):\n"
        "    for name in ('HF_HOME', 'XDG_CACHE_HOME'): os.environ.pop(name, None)\n"
        "    os.environ.update(setting)\n"
        "    print(importlib.reload(config_args).default_yaml_config_file)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)], capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines() == [str(surroundings.accelerate_config_file(setting)) for setting in settings]


def test_no_config_of_accelerate_is_well(tmp_path):
    assert surroundings.accelerate_config({"HF_HOME": str(tmp_path)}).state == "ok"


def test_a_config_of_accelerate_that_changes_nothing_is_well(tmp_path):
    text = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: no
num_machines: 1
num_processes: 8
dynamo_config: {dynamo_backend: 'NO'}
use_cpu: false
"""
    finding = surroundings.accelerate_config(write_config(tmp_path, text))
    assert finding.state == "ok"
    assert "num_processes 8, distributed_type MULTI_GPU" in finding.found


def test_a_config_of_accelerate_that_changes_a_run_is_a_warning_that_names_the_keys(tmp_path):
    text = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: bf16
num_processes: 2
dynamo_config: {dynamo_backend: INDUCTOR}
"""
    finding = surroundings.accelerate_config(write_config(tmp_path, text))
    assert finding.state == "warning"
    for words in ("default_config.yaml", "num_processes 2", "distributed_type MULTI_CPU", "mixed_precision bf16"):
        assert words in finding.found
    assert "mixed_precision, distributed_type and dynamo_config" in finding.advice


@pytest.mark.parametrize("text", ["mixed_precision: [", "- a\n- b\n", "\x00", "mixed_precision: \xff"])
def test_a_config_of_accelerate_that_cannot_be_read_is_a_warning(tmp_path, text):
    variables = write_config(tmp_path, "")
    surroundings.accelerate_config_file(variables).write_bytes(text.encode("latin-1"))
    assert surroundings.accelerate_config(variables).state == "warning"


def test_a_data_folder_is_counted(tmp_path, folder_of):
    finding = surroundings.pictures(folder_of(tmp_path / "data", classes=3, train=20, test=7))
    assert finding.state == "ok"
    assert "60 train, 21 test; 3 classes with 20 training images each" in finding.found
    (tmp_path / "data" / "train" / "class-1" / "0.png").unlink()
    assert "59 train, 21 test; 3 classes with 19 to 20" in surroundings.pictures(tmp_path / "data").found


def test_a_class_that_only_one_split_has_is_a_problem(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=3)
    shutil.rmtree(root / "test" / "class-1")
    finding = surroundings.pictures(root)
    assert finding.state == "problem"
    assert str(root / "test" / "class-1") in finding.found


def test_links_out_of_a_data_folder_are_a_warning_with_the_option_to_follow_them(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    (root / "train" / "class-0").rename(tmp_path / "outside")
    (root / "train" / "class-0").symlink_to(tmp_path / "outside")
    finding = surroundings.pictures(root)
    assert finding.state == "warning"
    assert "6 train, 2 test" in finding.found
    assert "data.follow_links=true" in finding.advice


def test_no_data_folder_is_well_unless_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finding = surroundings.pictures(None)
    assert finding.state == "ok"
    assert "embedded digits" in finding.found
    assert surroundings.pictures(Path("nowhere")).state == "problem"

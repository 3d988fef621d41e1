"""What is written into scripts and manifests reaches the program as it is, and as nothing else."""

import re
import shutil
import subprocess

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mnist_dist.errors import ConfigError, typed
from mnist_dist.errors.shell import join, quote
from mnist_dist.launch import slurm
from mnist_dist.launch.engines import Cluster, recipes, torchrun
from mnist_dist.launch.kubernetes import KubernetesJob, render
from mnist_dist.launch.slurm import SlurmJob
from mnist_dist.launch.slurm import render as render_script
from mnist_dist.observe.console import next_commands
from mnist_dist.observe.names import shown

ODD = [
    "plain",
    "two words",
    "it's",
    'say "so"',
    "$HOME `id` $(id) \\",
    "a\nb",
    "x\n#SBATCH --exclusive\ntouch gone",
    "tab\tbell\a\x1b[2J",
    "'\n'",
    "\\n\n$'",
    "Käse\u2028\x85ende",
    "a\u00a0b\u200bc\u3164'\\",
    "\\g<0>\\1 {how} %s\nTRAIN=(",
    "",
]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_reads_every_word_as_it_was():
    line = join(["printf", "%s\\0", *ODD])
    assert len(line.splitlines()) == 1
    told = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert told.decode().split("\0")[:-1] == ODD


@given(st.text(st.characters(), max_size=40))
def test_a_quoted_word_is_printed_as_it_is(word):
    assert shown(quote(word)) == quote(word)


def test_a_command_in_a_message_can_be_typed():
    assert typed("resume", "a\u00a0b") == r"`mnist-dist resume $'a\xc2\xa0b'`"
    assert next_commands("a\u00a0b", data="d")[1][0].endswith(r" predict $'a\xc2\xa0b' IMAGE.png")


@pytest.mark.parametrize("word", ODD)
def test_no_word_of_a_command_becomes_a_line_of_a_batch_script(word):
    plain = render_script(SlurmJob(command=("train", "--run-dir", "r"), run="r"))
    job = SlurmJob(command=("train", "--run-dir", word), run=word, python=(word, "-m", "mnist_dist"))
    script = render_script(job)
    assert len(script.splitlines()) == len(plain.splitlines())
    assert [line for line in script.splitlines() if line.startswith("#SBATCH")] == [
        line for line in plain.splitlines() if line.startswith("#SBATCH")
    ]
    assert f"RESULT={quote(f'{word}/result.json')}\n" in script


@pytest.mark.parametrize("line", ["PYTHON=(python -P -m mnist_dist)\n", "#SBATCH --nodes=2\n", "--gpu-bind=none "])
@pytest.mark.parametrize("times", [0, 2])
def test_a_batch_script_without_a_line_that_is_filled_in_is_noticed(monkeypatch, tmp_path, line, times):
    text = (recipes() / "slurm" / "train.sbatch").read_text()
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text(text.replace(line, line * times))
    monkeypatch.setattr(slurm, "recipes", lambda: tmp_path)
    with pytest.raises(AssertionError, match="needs"):
        render_script(SlurmJob(command=("train",), run="r"))


@pytest.mark.parametrize("field", ["name", "partition", "time"])
@pytest.mark.parametrize("value", ["a\ntouch gone", "my job", "a\n", "a#b", "a;b", "$(id)", "", "é", "1\u0661"])
def test_a_value_that_would_be_more_than_its_line_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"--{field} is "):
        SlurmJob(command=("train",), run="r", **{field: value})


def test_names_that_clusters_use_are_taken():
    SlurmJob(command=("train",), run="r", name="mnist_2.b-3", partition="gpu-a100,gpu.h100", time="2-00:00:00")


def expanded(text, variables):
    """Expand as Kubernetes does (third_party/forked/golang/expansion/expand.go)."""

    def replace(match):
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


@pytest.mark.parametrize("kind", ["job", "trainjob"])
@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("word", [*ODD, "a$$b", "$$(HOME)", "$$$(HOME)$", "$", "$(", "$$$$", "$)(", "${HOME}"])
def test_a_pod_gets_every_word_as_it_was(kind, per_node, word):
    job = KubernetesJob(
        name="a", image="i", run_claim="r", kind=kind, processes_per_node=per_node,
        command=("train", "--run-dir", f"/runs/a{word}", "--set", f"data.root={word}"),
    )  # fmt: skip
    (tree,) = [tree for tree in yaml.safe_load_all(render(job)) if tree["kind"] in ("Job", "TrainJob")]
    container = tree["spec"]["trainer"] if kind == "trainjob" else tree["spec"]["template"]["spec"]["containers"][0]
    words = [expanded(text, {"HOME": "/tmp"}) for text in container["command"]]
    assert words[-5:-1] == ["--run-dir", f"/runs/a{word}", "--set", f"data.root={word}"]


@pytest.mark.parametrize(
    ("head", "endpoint"),
    [
        ("node-0", ("node-0", 29400)),
        ("node-0:1", ("node-0", 1)),
        ("node_0.cluster.example.:65535", ("node_0.cluster.example.", 65535)),
        ("10.0.0.1:29400", ("10.0.0.1", 29400)),
        ("[::1]:29401", ("::1", 29401)),
        ("[fd00::1]", ("fd00::1", 29400)),
        ("::1", ("::1", 29400)),
        ("fd00::ffff:10.0.0.1", ("fd00::ffff:10.0.0.1", 29400)),
        (None, ("localhost", 29400)),
    ],
)
def test_the_head_is_a_host_with_or_without_a_port(head, endpoint):
    cluster = Cluster(nodes=2 if head else 1, head=head, dry_run=True)
    assert cluster.endpoint == endpoint
    if head and ":" in endpoint[0]:
        assert ("--rdzv-endpoint", f"[{endpoint[0]}]:{endpoint[1]}") in torchrun(cluster, ("train",)).parts


@pytest.mark.parametrize(
    "head",
    ["", " ", ":", ":29400", "h:", "h:0", "h:65536", "h:70000", "h:-1", "h:1x", "h:\u0663", "[::1", "::1]", "[::1]:",
     "[::1]:0", "[]:1", "[h]:1", "1::2::3", "12345::", "a b", "a\nb", "http://h", "h/x", "-h", "$(id)", "[::1]29400"],
)  # fmt: skip
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_head_that_is_no_address_is_refused(head, nodes):
    with pytest.raises(ConfigError, match="--head"):
        Cluster(nodes=nodes, head=head)

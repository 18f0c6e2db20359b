"""The launchers: real processes on one machine, and stand-ins for what talks to clusters.

A stand-in is a small script, first on PATH, that adds its name and arguments to the file `calls` and then does what the
test says, with `$*` the arguments and the test's folder as its working directory.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from entry_points import ROOT

LAUNCHERS = ["local", "multi_process", "slurm", "sweep", "tpu_pod"]
STAND_INS = ("gcloud", "sbatch", "srun", "squeue", "scontrol", "ssh", "scp")
RECORD = "#!/usr/bin/env bash\nprintf '%s\\037' {name} \"$@\" >>calls\nprintf '\\036' >>calls\n"

# A job for multi_process.sh: --plan has a word per start and process, such as lost,wait/0,0.
JOB = """
import os, pathlib, signal, sys, time

def wait_for(condition):
    while not condition():
        time.sleep(0.005)

def stop(*_):
    note("told to stop")
    if act != "stubborn":
        sys.exit(75)

def note(text):
    with open(f"notes{own}", "a") as file:
        file.write(f"{text}\\n")

given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
own = int(given["process_id"])
start = len(list(pathlib.Path().glob(f"started_*_{own}")))
act = given["plan"].split("/")[min(start, given["plan"].count("/"))].split(",")[own]
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
what = [str(os.getpid()), given["coordinator_address"], given["num_processes"]]
pathlib.Path(f"started_{start}_{own}").write_text(" ".join(what))
print(f"start {start} of process {own}", flush=True)
others = [path for path in given["plan"].split("/")[0].split(",") if path]
wait_for(lambda: len(list(pathlib.Path().glob(f"started_{start}_*"))) == len(others))
if act == "lost":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "saves":  # takes longer than the other, which has left with 75
    other = int(pathlib.Path(f"started_{start}_{1 - own}").read_text().split()[0])
    wait_for(lambda: not pathlib.Path(f"/proc/{other}").exists())
    time.sleep(0.5)
    sys.exit(75)
if act in ("wait", "stubborn"):
    wait_for(lambda: False)
print(f"process {own} ends with {act}", flush=True)
sys.exit(int(act))
"""

# A job for sweep.sh: takes part in a count of those that run at the same time.
COUNTED_JOB = """
import pathlib, sys, time

given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
own = pathlib.Path(f"running_{given['seed']}_{given['dataset'].replace('/', '_')}")
own.touch()
deadline = time.monotonic() + 10
while (most := len(list(pathlib.Path().glob("running_*")))) < int(given["at_once"]) and time.monotonic() < deadline:
    time.sleep(0.005)
time.sleep(0.2)
most = max(most, len(list(pathlib.Path().glob("running_*"))))
own.unlink()
pathlib.Path(given["out"]).write_text(f"{most} {given['dataset']} {given['seed']} {given['title']}")
print("hello", given["seed"])
sys.exit(given["seed"] == "1" and 3)
"""


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a launcher in tmp_path."""
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "counted.py").write_text(COUNTED_JOB)
    for name in STAND_INS:
        stand_in(tmp_path, name, "echo 'not foreseen' >&2; exit 99")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TPU", "JAX", "XLA"))}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def start(name, *arguments, root=ROOT, **variables):
        environment = clean | {"PATH": path, "PYTHON": sys.executable, "POLL": "0"} | variables
        return subprocess.Popen(
            [root / "launch" / f"{name}.sh", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def stand_in(folder, name, script):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(RECORD.format(name=name) + script + "\n")
    path.chmod(0o755)


def calls(folder):
    """Return the arguments of every call of a stand-in, its name first."""
    path = folder / "calls"
    records = path.read_text().split("\036")[:-1] if path.exists() else []
    return [record.split("\037")[:-1] for record in records]


def finish(process):
    """Wait for a launcher and return its exit code, output and errors."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def starts(folder):
    """Return the names of the starts of job.py, (start, process), and what else each of them wrote down."""
    found = {tuple(map(int, path.name.split("_")[1:])): path.read_text().split() for path in folder.glob("started_*")}
    return dict(sorted(found.items()))


def notes(folder, process_id):
    path = folder / f"notes{process_id}"
    return path.read_text().splitlines() if path.exists() else []


# All


def test_scripts_are_clean():
    if shellcheck := shutil.which("shellcheck"):
        paths = [f"launch/{name}.sh" for name in [*LAUNCHERS, "detached", "common"]]
        subprocess.run([shellcheck, "--external-sources", *paths], cwd=ROOT, check=True)
    for name in LAUNCHERS:
        text = (ROOT / "launch" / f"{name}.sh").read_text()
        assert "set -euo pipefail" in text and os.access(ROOT / "launch" / f"{name}.sh", os.X_OK)
        for newer_than_3_2 in ("wait -n", "declare -A", "mapfile", "readarray", "@Q}", ",,}", "^^}", "&>>", "|&"):
            assert newer_than_3_2 not in text, name


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("local", [], ["exec python -m job --workdir=run a\\ b"]),
        ("multi_process", [], [f"--num_processes=2 --process_id={i}" for i in range(2)]),
        ("slurm", ["--nodes=2"], ["sbatch --nodes=2 ", "/launch/slurm.sh job --workdir=run a\\ b"]),
        ("tpu_pod", ["--spot"], ["create pod --node-id=pod --spot --zone=z", "tpu-vm scp", "tpu-vm ssh"]),
    ],
)
def test_dry_run_prints_commands_and_does_nothing(launch, tmp_path, name, options, expected):
    before = sorted(tmp_path.rglob("*"))
    variables = {"PYTHON": "python", "TPU": "pod", "ZONE": "z"}
    code, output, errors = finish(launch(name, *options, "--dry_run", "job", "--workdir=run", "a b", **variables))
    assert (code, errors) == (0, "")
    for text in expected:
        assert text in output
    assert sorted(tmp_path.rglob("*")) == before


# Processes on this machine


def test_local_passes_arguments_and_devices_on(launch, tmp_path):
    (tmp_path / "show.py").write_text("import os, sys; print(sys.argv[1:], os.environ['XLA_FLAGS']); sys.exit(75)")
    code, output, _ = finish(launch("local", "show", "--a=b c", "--d", NUM_DEVICES="3"))
    assert code == 75
    assert output.split("]") == ["['--a=b c', '--d'", "  --xla_force_host_platform_device_count=3\n"]


def test_a_lost_process_starts_all_again(launch, tmp_path):
    code, output, errors = finish(launch("multi_process", "job", "--plan=wait,lost/0,0", "--workdir=run"))
    assert code == 0, errors
    first = starts(tmp_path)
    assert list(first) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert notes(tmp_path, 0) == ["told to stop"]  # it cannot go on without the other
    assert "process 1 ended with 137, log in run/logs/1.log" in errors
    assert "all processes start again (1 of 10)" in errors
    for start in range(2):
        (_, address, number), (_, other, _) = first[start, 0], first[start, 1]
        assert address == other and address.startswith("localhost:") and number == "2"
    for process_id in range(2):
        log = (tmp_path / "run" / "logs" / f"{process_id}.log").read_text()
        lines = [f"start {start} of process {process_id}" for start in range(2)] + [f"process {process_id} ends with 0"]
        assert log.splitlines() == lines
    assert output == (tmp_path / "run" / "logs" / "0.log").read_text()


def test_a_process_that_saved_starts_all_again_and_lets_the_others_save(launch, tmp_path):
    code, _, errors = finish(launch("multi_process", "job", "--plan=saves,75/0,0", LOGS="elsewhere"))
    assert code == 0, errors
    assert list(starts(tmp_path)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert notes(tmp_path, 0) == []
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["0.log", "1.log"]


def test_a_failure_ends_all(launch, tmp_path):
    code, _, errors = finish(launch("multi_process", "job", "--plan=wait,3"))
    assert code == 3
    assert list(starts(tmp_path)) == [(0, 0), (0, 1)]
    assert notes(tmp_path, 0) == ["told to stop"]
    assert "process 1 ended with 3, log in logs/1.log:\nprocess 1 ends with 3\n" in errors


def test_a_process_that_does_not_end_is_killed(launch, tmp_path):
    code, _, _ = finish(launch("multi_process", "job", "--plan=3,stubborn", GRACE="1"))
    assert code == 3
    assert notes(tmp_path, 1) == ["told to stop"]
    assert not os.path.exists(f"/proc/{starts(tmp_path)[0, 1][0]}/cwd")


def test_all_start_again_a_number_of_times(launch, tmp_path):
    code, _, errors = finish(launch("multi_process", "job", "--plan=75,75", MAX_RESTARTS="2"))
    assert code == 75
    assert list(starts(tmp_path)) == [(start, process_id) for start in range(3) for process_id in range(2)]
    assert "(2 of 2)" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_each_process_once_and_nothing_starts_again(launch, tmp_path, number):
    process = launch("multi_process", "job", "--plan=wait,wait")
    while len(starts(tmp_path)) < 2 or not all(starts(tmp_path).values()):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)  # as the terminal does for Ctrl-C
    code, _, errors = finish(process)
    assert code == 75, errors
    assert len(starts(tmp_path)) == 2
    assert [notes(tmp_path, process_id) for process_id in range(2)] == [["told to stop"]] * 2


def test_one_process_of_several_machines(launch, tmp_path):
    code, _, _ = finish(
        launch("multi_process", "job", "--plan=,0", COORDINATOR="host:1", NUM_PROCESSES="3", PROCESS_ID="1")
    )
    assert code == 0
    assert {name: rest for name, (_, *rest) in starts(tmp_path).items()} == {(0, 1): ["host:1", "3"]}


# Sweeps


def test_a_sweep_runs_every_combination_some_at_once(launch, tmp_path):
    command = ["--workdir=runs", "--dataset=a/x,b", "--seed=0,1", f"{ROOT}/launch/local.sh", "counted"]
    code, _, errors = finish(launch("sweep", *command, "--at_once=2", "--title=two words", "--out={}/result", JOBS="2"))
    assert code != 0  # seed 1 fails, and the others run all the same
    assert errors.count("sweep.sh: exit code 3 of: ") == 2
    names = {("a/x", 0): "dataset=a-x_seed=0", ("a/x", 1): "dataset=a-x_seed=1"}
    names |= {("b", 0): "dataset=b_seed=0", ("b", 1): "dataset=b_seed=1"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"commands", *names.values()}
    for (dataset, seed), name in names.items():
        assert (tmp_path / "runs" / name / "result").read_text() == f"2 {dataset} {seed} two words"
        assert (tmp_path / "runs" / name / "output.log").read_text() == f"hello {seed}\n"


def test_the_output_of_a_sweep_can_lie_elsewhere(launch, tmp_path):
    command = ["--workdir=/far/away", "--a=1", "echo", "module"]
    code, output, errors = finish(launch("sweep", *command, OUTPUT="here"))
    assert (code, output, errors) == (0, "", "")
    assert (tmp_path / "here" / "a=1" / "output.log").read_text() == "module --workdir=/far/away/a=1 --a=1\n"


def test_a_sweep_without_lists_takes_the_runs_that_are_there(launch, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    (tmp_path / "runs" / "no run").mkdir()
    code, output, errors = finish(launch("sweep", "--dry_run", "--workdir=runs", "local.sh", "plan", "--out={}/x"))
    assert (code, errors) == (0, "")
    command = "mkdir -p {0} && local.sh plan --out={0}/x --workdir={0} >>{0}/output.log 2>&1\n"
    assert output == command.format("runs/one") + command.format("runs/two")
    code, _, errors = finish(launch("sweep", "--workdir=nothing", "local.sh", "plan"))
    assert (code, errors) == (2, "sweep.sh: there is no run in nothing\n")


def test_a_sweep_on_slurm_is_an_array_of_which_each_task_runs_its_line(launch, tmp_path):
    stand_in(tmp_path, "sbatch", "")
    slurm = f"{ROOT}/launch/slurm.sh"
    command = ["--workdir=runs", "--dataset=a/x,b", "--seed=0,1", slurm, "--nodes=1", "job", "--title=two words"]
    code, output, errors = finish(launch("sweep", *command, JOBS="3"))
    assert (code, output, errors) == (0, "", "")
    assert calls(tmp_path) == [["sbatch", "--nodes=1", "--array=1-4%3", slurm, "runs/commands"]]
    stand_in(tmp_path, "srun", "")
    job = {"SLURM_JOB_ID": "8", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "3"}
    assert finish(launch("slurm", "runs/commands", **job))[0] == 0
    arguments = ["job", "--title=two words", "--workdir=runs/dataset=b_seed=0", "--dataset=b", "--seed=0"]
    assert calls(tmp_path)[1][-7:] == ["-m", *arguments, "--distributed"]


# SLURM


def test_slurm_is_given_the_options_and_the_script(launch, tmp_path):
    stand_in(tmp_path, "sbatch", "echo Submitted")
    code, output, _ = finish(launch("slurm", "--nodes=2", "--partition=p", "job", "--a=b c"))
    assert (code, output) == (0, "Submitted\n")
    assert calls(tmp_path) == [["sbatch", "--nodes=2", "--partition=p", f"{ROOT}/launch/slurm.sh", "job", "--a=b c"]]
    stand_in(tmp_path, "sbatch", "exit 4")
    assert finish(launch("slurm", "job"))[0] == 4
    assert finish(launch("slurm", "--nodes=2"))[0] != 0
    assert len(calls(tmp_path)) == 2


def run_job(launch, folder, script, state="RUNNING", **variables):
    """Run slurm.sh as SLURM does in a job whose processes do what `script` says."""
    stand_in(folder, "srun", script)
    stand_in(folder, "squeue", f"echo {state}")
    stand_in(folder, "scontrol", "")
    process = launch("slurm", "job", "--a=b c", SLURM_JOB_ID="8", SLURM_SUBMIT_DIR=str(folder), **variables)
    return process if script.startswith("touch") else finish(process)[0]


def test_a_job_runs_one_process_per_gpu(launch, tmp_path):
    variables = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    assert run_job(launch, tmp_path, 'echo "${JAX_LOCAL_DEVICE_IDS-unset}" >devices', **variables) == 0
    options = ["--kill-on-bad-exit=0", "--wait=120", "--gpu-bind=none", "--cpus-per-task=8"]
    assert calls(tmp_path) == [["srun", *options, sys.executable, "-m", "job", "--a=b c", "--distributed"]]
    assert (tmp_path / "devices").read_text() == "unset\n"


def test_a_job_runs_one_process_per_node_with_all_of_its_gpus(launch, tmp_path):
    variables = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}
    assert run_job(launch, tmp_path, 'echo "${JAX_LOCAL_DEVICE_IDS-unset}" >devices', **variables) == 0
    assert (tmp_path / "devices").read_text() == "0,1,2,3\n"


@pytest.mark.parametrize(
    "code, state, restarts, requeued",
    [
        (75, "RUNNING", None, True),
        (75, "RUNNING", "19", True),
        (75, "RUNNING", "20", False),
        (75, "COMPLETING", None, False),  # cancelled
        (137, "RUNNING", None, True),
        (1, "RUNNING", None, False),
        (2, "RUNNING", None, False),
        (0, "RUNNING", None, False),
    ],
)
def test_a_job_is_requeued_when_it_saved_or_lost_a_process(launch, tmp_path, code, state, restarts, requeued):
    variables = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    assert run_job(launch, tmp_path, f"exit {code}", state, **variables) == code
    assert calls(tmp_path)[0][0] == "srun"
    assert (["scontrol", "requeue", "8"] in calls(tmp_path)) == requeued


def test_a_job_that_is_preempted_waits_for_its_processes_and_is_requeued(launch, tmp_path):
    process = run_job(launch, tmp_path, "touch up; until [[ -e go ]]; do sleep 0.01; done; exit 75")
    while not (tmp_path / "up").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert finish(process)[0] == 75
    assert calls(tmp_path)[-1] == ["scontrol", "requeue", "8"]


# TPU pods


def pod(launch, folder, *arguments, state="", run="exit 0", **variables):
    """Run tpu_pod.sh with a stand-in that keeps the pod's state in a file; `run` is what starting the command does."""
    (folder / "state").write_text(state)
    script = 'case "$*" in *describe*) cat state; [[ -s state ]] || { echo "describe) NOT_FOUND" >&2; exit 1; } ;;'
    script += ' *" create "*) echo ACTIVE >state ;; *" delete "*) : >state ;;'
    stand_in(folder, "gcloud", f"{script}\n*launch/detached.sh*) {run} ;; esac")
    return finish(launch("tpu_pod", *arguments, TPU="pod", ZONE="z", **variables))


def steps(folder):
    """Return a word for each call of gcloud that does something."""
    words = {"create": "create", "delete": "delete", "scp": "copy", "launch/detached.sh": "run", "tar": "install"}
    found = []
    for call in calls(folder):
        assert call[0] == "gcloud" and "--zone=z" in call
        if "describe" not in call:
            found += [next(word for key, word in words.items() if key in " ".join(call).split())]
    return found


CREATE = ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"]


def test_a_pod_is_made_set_up_and_runs(launch, tmp_path):
    code, _, errors = pod(launch, tmp_path, *CREATE, "job", "--a=b c", SETUP="sudo mount x", EXTRAS="tpu")
    assert code == 0, errors
    assert steps(tmp_path) == ["create", "copy", "install", "run"]
    create, copy, install, run = (call[3:] for call in calls(tmp_path) if "describe" not in call)
    assert create == ["queued-resources", "create", "pod", "--node-id=pod", *CREATE, "--zone=z", "--quiet"]
    assert copy[:2] == ["tpu-vm", "scp"] and copy[2].endswith("/tt_jax.tgz")
    assert copy[3:] == ["pod:tt_jax.tgz", "--worker=all", "--zone=z", "--quiet"]
    assert not os.path.exists(copy[2])  # removed at the end
    for call, command in ((install, "tar -xzf tt_jax.tgz"), (run, "cd tt_jax")):
        assert call[:4] == ["tpu-vm", "ssh", "pod", "--worker=all"]
        assert command in call[5]
    assert "source launch/environment.sh tpu'" in install[5] and "sudo mount x" in install[5]
    assert run[5] == (r"--command=cd tt_jax && launch/detached.sh .run .venv/bin/python -m job --a=b\ c --distributed")


def test_the_copy_of_the_code_has_what_git_tracks(launch, tmp_path):
    stand_in_scp = 'case "$*" in *describe*) echo ACTIVE ;; *" scp "*) tar -tzf "$5" >files ;; esac'
    stand_in(tmp_path, "gcloud", stand_in_scp)
    assert finish(launch("tpu_pod", "job", TPU="pod", ZONE="z"))[0] == 0
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copied = {name for name in (tmp_path / "files").read_text().split() if not name.endswith("/")}
    assert {"setup.py", "launch/detached.sh", "launch/environment.sh"} <= copied == set(tracked)


def test_the_copy_of_the_code_has_its_changes_even_while_git_is_busy(launch, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    git = ["git", "-C", clone, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (clone / "launch" / "detached.sh").write_text("changed")
    (clone / "launch" / "new").write_text("added")
    (clone / "launch" / "untracked").write_text("")
    subprocess.run([*git, "add", "launch/new"], check=True)
    before = subprocess.run([*git, "status", "--short"], check=True, capture_output=True).stdout
    (clone / ".git" / "index.lock").touch()
    stand_in_scp = 'case "$*" in *describe*) echo ACTIVE ;; *" scp "*) tar -xzf "$5" ;; esac'
    stand_in(tmp_path, "gcloud", stand_in_scp)
    code, _, errors = finish(launch("tpu_pod", "job", root=clone, TPU="pod", ZONE="z"))
    assert (code, errors) == (0, "")
    copied = tmp_path / "launch"
    assert (copied / "detached.sh").read_text() == "changed" and (copied / "new").read_text() == "added"
    assert not (copied / "untracked").exists()
    (clone / ".git" / "index.lock").unlink()
    assert subprocess.run([*git, "status", "--short"], check=True, capture_output=True).stdout == before


def test_a_pod_that_is_there_is_used(launch, tmp_path):
    assert pod(launch, tmp_path, "job", state="ACTIVE")[0] == 0
    assert steps(tmp_path) == ["copy", "install", "run"]


def test_a_preempted_pod_is_made_again_and_goes_on(launch, tmp_path):
    preempted_once = "if mkdir once 2>/dev/null; then echo SUSPENDED >state; exit 1; fi"
    code, _, errors = pod(launch, tmp_path, "job", state="ACTIVE", run=preempted_once)
    assert code == 0, errors
    assert steps(tmp_path) == ["copy", "install", "run", "delete", "create", "copy", "install", "run"]
    assert "ended with 1, starts again (1 of 100)" in errors


@pytest.mark.parametrize("code, starts_again", [(75, True), (137, True), (255, True), (1, False), (2, False)])
def test_a_run_on_a_pod_starts_again_when_it_saved_or_lost_a_host(launch, tmp_path, code, starts_again):
    ended, _, _ = pod(launch, tmp_path, "job", state="ACTIVE", run=f"exit {code}", MAX_RESTARTS="1")
    assert ended == code
    assert steps(tmp_path).count("run") == 1 + starts_again


def test_a_pod_that_cannot_be_made_is_an_error(launch, tmp_path):
    stand_in(
        tmp_path, "gcloud", 'case "$*" in *describe*) echo NOT_FOUND >&2 ;; *) echo "no quota" >&2 ;; esac; exit 1'
    )
    code, _, errors = finish(launch("tpu_pod", "job", TPU="pod", ZONE="z"))
    assert (code, errors) == (1, "no quota\n")
    assert steps(tmp_path) == ["create"]


def test_a_pod_of_which_nothing_can_be_learned_is_not_made_anew(launch, tmp_path):
    stand_in(tmp_path, "gcloud", "echo 'no network' >&2; exit 1")
    code, _, errors = finish(launch("tpu_pod", "job", TPU="pod", ZONE="z", MAX_RESTARTS="2"))
    assert code == 255
    assert errors.count("no network") == 3
    assert steps(tmp_path) == []


def test_a_pod_is_deleted_or_followed_on_request(launch, tmp_path):
    assert pod(launch, tmp_path, "--delete", state="ACTIVE")[0] == 0
    assert pod(launch, tmp_path, "--follow", state="ACTIVE", run="exit 75")[0] == 75
    delete, follow = calls(tmp_path)
    assert delete[3:] == ["queued-resources", "delete", "pod", "--force", "--zone=z", "--quiet"]
    assert "--command=tt_jax/launch/detached.sh tt_jax/.run" in follow
    assert pod(launch, tmp_path, "--spot")[0] == 2  # no module: nothing is made
    assert len(calls(tmp_path)) == 2


def test_ctrl_c_ends_the_watching_alone(launch, tmp_path):
    (tmp_path / "state").write_text("ACTIVE")
    watch = "trap 'exit 255' INT; touch up; until [[ -e go ]]; do sleep 0.01; done"
    stand_in(tmp_path, "gcloud", f'case "$*" in *describe*) cat state ;; *launch/detached.sh*) {watch} ;; esac')
    process = launch("tpu_pod", "job", TPU="pod", ZONE="z")
    while not (tmp_path / "up").exists():
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process)[0] == 130
    assert steps(tmp_path) == ["copy", "install", "run"]


def test_code_is_not_replaced_under_what_runs(launch, tmp_path):
    assert pod(launch, tmp_path, "job", state="ACTIVE")[0] == 0
    install = next(call[-3] for call in calls(tmp_path) if "tar -xzf" in call[-3])
    unpack = install.removeprefix("--command=").split(" && cd tt_jax")[0]
    stand_in(tmp_path, "tar", "")
    for pid, unpacked in (("", True), ("999999999", True), (str(os.getpid()), False)):
        (tmp_path / "calls").write_text("")
        (tmp_path / "tt_jax" / ".run").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tt_jax" / ".run" / "pid").write_text(pid)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", unpack], cwd=tmp_path, env=environment, check=True)
        assert bool(calls(tmp_path)) == unpacked


@pytest.mark.skipif(sys.platform != "linux", reason="runs on the hosts of a pod")
def test_a_detached_command_outlives_its_watchers(launch, tmp_path):
    command = ["run", "bash", "-c", "echo began; until [[ -e go ]]; do sleep 0.01; done; echo ended; exit 75"]
    first = launch("detached", *command)
    assert first.stdout.readline() == "began\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = launch("detached", *command)
    assert second.stdout.readline() == "began\n"
    code, _, errors = finish(launch("detached", "run", "true"))
    assert code == 2 and "another command is still running here: bash -c echo began" in errors
    (tmp_path / "go").touch()
    assert finish(second)[:2] == (75, "ended\n")
    assert finish(launch("detached", "run"))[:2] == (75, "began\nended\n")
    assert finish(launch("detached", "run", "bash", "-c", "kill -9 $$"))[0] == 137
    lost = launch("detached", "run", "bash", "-c", "echo began; exec sleep 60")
    assert lost.stdout.readline() == "began\n"
    os.killpg(int((tmp_path / "run" / "pid").read_text()), signal.SIGKILL)
    assert finish(lost)[0] == 137

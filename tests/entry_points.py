"""Entry points as users run them, each command in a process of its own, and the settings that their tests use.

Importing what the entry points share takes seconds. So one process imports it and then forks for every command line,
before jax has started a backend or a thread.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[1]

# The settings of the runs that the tests look at: large enough to learn something, small enough for seconds.
MAZE = [
    f"--config={ROOT}/experiments/configs/maze.py",
    "--dataset=test/maze-v0",
    "--config.data.num_bins=20",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.embed_dim=16",
    "--config.model.max_transitions=3",
    "--config.train.num_steps=420",
    "--config.train.batch_size=8",
    "--config.train.steps_per_call=20",
    "--config.train.log_every=7",
    "--config.train.eval_every=14",
    "--config.train.checkpoint_every=40",
    "--config.plan.window=(3, 2)",
]
# For large programs that run for milliseconds: compiled in half the time. The quickstart is tested without it.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
BOX = [*MAZE, "--config.data.observation_keys=()"]  # for datasets without Dict observations

SERVER = """
import gc, importlib, json, os, pkgutil, sys
from experiments import common
from experiments.common import entry

for module in pkgutil.iter_modules(common.__path__):
    importlib.import_module(f"experiments.common.{module.name}")
gc.freeze()  # commands that end do not clean up what they share
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(request["folder"])
os.environ.update(request["environment"])
for descriptor, name in enumerate(("/dev/null", "stdout", "stderr")):
    os.dup2(os.open(name, os.O_CREAT | (os.O_WRONLY | os.O_TRUNC if descriptor else os.O_RDONLY)), descriptor)
program = importlib.import_module(request["module"])  # only now: a process has the flags of one entry point
sys.argv = [program.__file__, *request["arguments"]]
entry.run(program.main)
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The line on stderr, or the last one after a progress bar."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1 or "\r" in self.stderr, self.stderr
        return lines[-1]


@dataclasses.dataclass(frozen=True)
class EntryPoint:
    """An entry point, ready to be run; the server runs one command at a time."""

    module: str
    server: subprocess.Popen
    folder: pathlib.Path  # working directory of the commands, where their modules are found, too
    environment: dict[str, str]

    def start(self, *arguments, devices=1) -> int:
        """Start a command on `devices` CPU devices and return its process id."""
        flags = f"{FAST_COMPILATION} --xla_force_host_platform_device_count={devices}"
        request = {
            "module": self.module,
            "folder": str(self.folder),
            "environment": {"XLA_FLAGS": flags} | self.environment,
            "arguments": arguments,
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> Finished:
        """Wait for the command to end."""
        code = int(self.server.stdout.readline())
        return Finished(code, *((self.folder / name).read_bytes().decode() for name in ("stdout", "stderr")))

    def start_until(self, condition, *arguments) -> int:
        """Start a command, wait until `condition()` holds and return its process id."""
        child = self.start(*arguments)
        while not condition():
            assert pathlib.Path(f"/proc/{child}/cwd").exists(), (self.folder / "stderr").read_text()
            time.sleep(0.001)
        return child

    def stop_when(self, condition, number, *arguments) -> Finished:
        """Run a command until `condition()` holds, send it the signal `number` and wait for its end."""
        os.kill(self.start_until(condition, *arguments), number)
        return self.wait()

    def __call__(self, *arguments, **kwargs) -> Finished:
        """Run a command to its end."""
        self.start(*arguments, **kwargs)
        return self.wait()


def read_metrics(workdir) -> list[dict]:
    """Read the complete lines of a run's metrics, also while it is running."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def damage(workdir, step) -> None:
    """Flip a bit in the arrays of a checkpoint."""
    files = (pathlib.Path(workdir) / "checkpoints" / str(step) / "arrays").rglob("d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

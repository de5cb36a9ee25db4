"""macOS and Windows are not shut out: planning needs nothing that Python has on Linux or on Unix alone."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from children import HUNG_S

ROOT = Path(__file__).resolve().parent.parent
PROFILE = ROOT / "benchmarks" / "results" / "profile-cpu.json"

UNIX_ALONE = """
import os, signal, sys
class Missing:
    names = {"fcntl", "grp", "posix_ipc", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in Missing.names & set(sys.modules):
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
for name in ("fork", "getuid", "geteuid", "mkfifo", "set_blocking", "sched_getaffinity", "sysconf", "O_NONBLOCK"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "alarm", "pthread_sigmask", "setitimer"):
    delattr(signal, name)
def link(*_, **__):
    raise OSError("no hard links")
os.link = link
from powerplan.cli import interrupts, main, streams
interrupts.install()
streams.prepare()
code = main(sys.argv[1:])
"""
"""Runs a command where what Windows lacks is missing, and the file system makes no hard links."""

COMMANDS = [
    "wsfr llama-3-8b --ctx 64k",
    "compare gpt2-small llama-3-8b --format json",
    "recommend gpt2-small --ctx 64k --write out.yaml",
    "budget gpt2-small --ctx 64k --flops 1e21",
    "train llama-3-8b --ctx 8k --gpu h100-sxm --devices 64 --export torchtitan --write run.toml",
    "decode llama-3-8b --gpu h100-sxm",
    "dims",
    "models llama-3-8b",
    "hardware",
    "reproduce table3",
    "schema",
    f"profile --show {PROFILE}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_planning_needs_no_unix(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", f"{UNIX_ALONE}\nsys.exit(code)", *command.split()]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=HUNG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_doctor_and_the_layers_need_no_unix(tmp_path: Path) -> None:
    """torch, which both import, may need what this machine has, so it is imported before it goes missing."""
    pytest.importorskip("torch")
    script = f"import torch\n{UNIX_ALONE}\nassert code == 0\nfrom powerplan.profile.memory import free_bytes\n"
    script += "assert free_bytes('cpu') > 0"
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HUNG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unknown memory" in done.stdout


def test_what_pip_installs_is_for_every_system() -> None:
    """Packages that exist for Linux alone carry a marker, and only an extra asks for them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not [text for text in project["dependencies"] if re.search(r"triton|cuda|nvidia|;", text)]
    extras = project["optional-dependencies"]
    assert all("sys_platform == 'linux'" in text for texts in extras.values() for text in texts if "triton>" in text)


def test_files_have_names_that_every_system_takes() -> None:
    """Windows takes no colons or question marks, no reserved names, and sees no difference between a and A."""
    folders = ("powerplan", "kernels", "models", "docs", "examples", "benchmarks", "scripts", "tests")
    names = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]
    assert not [name for name in names if re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', name.name)]
    assert not [name for name in names if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)", name.stem)]
    assert len({str(name).lower() for name in names}) == len(names)
    assert max(len(str(name)) for name in names if "__pycache__" not in name.parts) < 120

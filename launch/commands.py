"""Call a scheduler's own program (kubectl, gcloud, ...), and show on paper what would be called."""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence

LOG_LINE = re.compile(r"[EWI]\d{4} \d\d:\d\d")
"""What kubectl writes for its authors before it says the same thing in a sentence."""


class CommandError(OSError):
    """A scheduler's program is missing, or refused; message: one line, the program's own words."""


def call(
    argv: Sequence[str], stdin: str = "", seconds: float = 600.0, environment: Mapping[str, str] | None = None
) -> str:
    """Run a program and return what it wrote to stdout. environment: of the program, default that of this process.

    Raises CommandError where it is not installed, ends with another status than 0, or has not ended after `seconds`.
    """
    name = argv[0]
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=seconds, check=False, env=environment
        )
    except FileNotFoundError:
        raise CommandError(f"{name} is not installed here, or not on PATH: install it, and log in to it") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{shlex.join(argv[:4])} ...: no answer in {seconds:.0f} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        said = " ".join(" ".join(line for line in lines if not LOG_LINE.match(line)).split())
        raise CommandError(f"{name}: {said[:400] or 'it said nothing'} (status {done.returncode})")
    return done.stdout


def shown(argv: Sequence[str], stdin: str = "") -> str:
    """The call as one would type it: quoted for a shell, with its input as a here-document."""
    line = shlex.join(argv)
    return f"{line} <<'END'\n{stdin.rstrip()}\nEND" if stdin else line

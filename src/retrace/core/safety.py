"""Secrets stay in the environment, and what is written stays its owner's.

No config, record, log or error sentence holds a secret: the value of a variable whose name ends in TOKEN, KEY, SECRET
or PASSWORD, that of the hub's token file, a password in ~/.netrc, or the user and password of a URL. Nobody else can
write what Retrace writes, whatever the umask: jobs run code from it.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

_WORDS = "TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?"
_NAME = re.compile(rf"({_WORDS})$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_ASSIGNED = re.compile(rf"(\w*(?:{_WORDS}))=['\"]?[^\s'\"$`]", re.IGNORECASE)
SHORTEST = 8  # characters; what is shorter would be found in innocent words


def known_secrets() -> dict[str, str]:
    """Secrets of this process by the name of what holds them."""
    found = {name: value.strip() for name, value in os.environ.items() if _NAME.search(name)}
    folder = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    with contextlib.suppress(OSError, UnicodeDecodeError):  # nobody is logged in
        found["the hub's token file"] = Path(os.environ.get("HF_TOKEN_PATH") or folder / "token").read_text().strip()
    with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):  # where W&B keeps its key
        found |= {f"~/.netrc for {host}": entry[2] for host, entry in netrc.netrc().hosts.items() if entry[2]}
    return {name: value for name, value in found.items() if len(value) >= SHORTEST}


def redact(text: str) -> str:
    """The text with each secret replaced by the name of its variable, also where it is quoted or escaped."""
    for name, value in known_secrets().items():
        for form in {value, repr(value)[1:-1], repr(value.encode())[2:-1], quote(value, safe="")}:
            text = text.replace(form, f"<{name}>")
    return _IN_URL.sub("<credentials>", text)


def refuse_secrets(text: str, *, where: str) -> None:
    """Raise ValueError where a text that would be recorded holds a secret; `where` says what the text is."""
    for name, value in known_secrets().items():
        if value in text:
            raise ValueError(
                f"{where}: holds the value of {name}, and configs and commands are recorded: leave it out, libraries "
                "read it from the environment"
            )
    if _IN_URL.search(text):
        raise ValueError(f"{where}: holds a URL with a user or password, and configs are recorded: leave them out")


def assigned_secret(line: str) -> str | None:
    """The name of a secret that a shell line sets to a literal value, or None, as where it is read from a file."""
    found = _ASSIGNED.search(line)
    return found[1] if found else None


def deny_others() -> None:
    """Take from group and others the right to write what this process and its children make from now on."""
    os.umask(os.umask(0o077) | 0o022)


def own_folder(path: Path) -> Path:
    """Make a folder that nobody else can enter, or see that it is one; raises ValueError where another user owns it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (path, path.parent):
        found = folder.stat()
        if found.st_uid != os.getuid():
            raise ValueError(
                f"{folder}: belongs to another user, who could change what your jobs run: set RETRACE_HOME to a folder "
                "of yours"
            )
        if found.st_mode & 0o022:
            folder.chmod(found.st_mode & 0o755)
    path.chmod(0o700)
    return path


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines hold no secret, whatever library wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Make an error that nobody catches print a traceback without secrets."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show

"""Nothing in the project points at one particular machine, network or account."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# 10.0.0.x is what examples of several machines use.
PRIVATE = {
    "a home or work folder": re.compile(r"(?<![\w.$}\])~-])/(?:home|root|Users|work|workspace)/\w+"),
    "an address of a private network": re.compile(
        r"\b(?:10\.(?!0\.0\.)\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b"
    ),
    "an access token": re.compile(r"\b(?:hf_[A-Za-z]{30,}|gh[pousr]_\w{30,}|sk-[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def tracked() -> list[Path]:
    """Files under version control."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


def findings(text: str) -> list[str]:
    return [f"{what}: {match.group(0)}" for what, pattern in PRIVATE.items() for match in pattern.finditer(text)]


def test_no_private_paths() -> None:
    guilty: dict[str, list[str]] = {}
    for path in tracked():
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        found = findings(path.read_bytes().decode("utf-8", errors="ignore"))
        if found:
            guilty[str(path.relative_to(ROOT))] = found
    assert not guilty, guilty


@pytest.mark.parametrize("text", ["cd /home/anna/loom", "see /root/x", "http://10.1.2.3:80/", "192.168.0.7"])
def test_a_private_path_is_seen(text: str) -> None:
    assert findings(text)


@pytest.mark.parametrize(
    "text",
    ["https://x.org/home/page", "127.0.0.1", "a/home/b", "$HOME/models", "version 10.2.1", "--master_addr 10.0.0.1"],
)
def test_a_public_one_is_not(text: str) -> None:
    assert not findings(text)

"""The configuration file for InitEx."""

import stat
from pathlib import Path

import pytest

from vddkfs.engines.vddk import configuration
from vddkfs.errors import AccessDenied, SourceMissing, UsageError


def lines(text: str) -> dict[str, str]:
    pairs = [line.split("=", 1) for line in text.splitlines()]
    assert len({key.lower() for key, _ in pairs}) == len(pairs)
    return {key: value for key, value in pairs}


def test_ours_alone() -> None:
    made = configuration.generate("/run/vddkfs/tmp-1")
    assert made.warnings == ()
    values = lines(made.text)
    assert values["tmpDirectory"] == "/run/vddkfs/tmp-1"
    assert values["vixDiskLib.nfc.AcceptTimeoutMs"] == "180000"
    assert values["vixDiskLib.nfc.ReadTimeoutMs"] == "60000"
    assert values["vixDiskLib.nfc.WriteTimeoutMs"] == "600000"
    assert values["vixDiskLib.nfcFssrvrWrite.TimeoutMs"] == "0"
    assert values["vixDiskLib.nfcAio.Session.BufSizeIn64KB"] == "16"
    assert values["vixDiskLib.nfcAio.Session.BufCount"] == "4"
    assert values["vixDiskLib.transport.LogLevel"] == "3"
    assert (
        lines(configuration.generate("/t", debug=True).text)["vixDiskLib.transport.LogLevel"] == "5"
    )


def test_the_operators_lines_win_except_the_temporary_folder() -> None:
    made = configuration.generate(
        "/t",
        "# mine\n\nvixdisklib.nfc.readtimeoutms = 5\n tmpDirectory=/shared\nnonsense\n"
        'vixDiskLib.transport.san.denyList="all"\nlog.fileName=/tmp/x\n',
        name="vddk.conf",
    )
    values = lines(made.text)
    assert values["tmpDirectory"] == "/t"
    assert "vixDiskLib.nfc.ReadTimeoutMs" not in values
    assert values["vixdisklib.nfc.readtimeoutms "] == " 5"
    assert values["vixDiskLib.transport.san.denyList"] == '"all"'
    assert [warning.partition(": ")[0] for warning in made.warnings] == [
        "vddk.conf, line 4",
        "vddk.conf, line 5",
        "vddk.conf, line 7",
    ]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="does not exist"):
        configuration.read_operators(str(tmp_path / "none"))
    with pytest.raises(AccessDenied, match="cannot be read"):
        configuration.read_operators(str(tmp_path))
    binary = tmp_path / "binary"
    binary.write_bytes(b"a=\0")
    with pytest.raises(UsageError):
        configuration.read_operators(str(binary))
    with pytest.raises(ValueError, match="character"):
        configuration.generate("/a\nb")


def test_the_file_is_its_owners_and_keeps_odd_bytes(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"a=\xff\n")
    made = configuration.generate("/t", configuration.read_operators(str(theirs)))
    path = tmp_path / "made"
    configuration.write(made, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().endswith(b"a=\xff\n")
    with pytest.raises(FileExistsError):
        configuration.write(made, path)

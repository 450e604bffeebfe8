"""Mount options: each is read and checked, what is mount(8)'s is dropped, the rest is an error."""

import math
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vddkfs import options
from vddkfs.errors import UsageError
from vddkfs.option_values import MIB, size
from vddkfs.options import OPTIONS, MountOptions, parse_options

GOOD: list[tuple[str, Any]] = [
    ("uid=0", 0),
    ("uid=1000", 1000),
    ("uid=4294967294", 2**32 - 2),
    ("gid=100", 100),
    ("umask=022", 0o022),
    ("umask=0", 0),
    ("umask=777", 0o777),
    ("allow_other", True),
    ("follow_parents=folder", "folder"),
    ("follow_parents=any", "any"),
    ("raw_devices=yes", "yes"),
    ("raw_devices=no", "no"),
    ("writable", True),
    ("restore=yes", "yes"),
    ("restore=no", "no"),
    ("assume=powered-off", "powered-off"),
    ("fence_timeout=0.5", 0.5),
    ("overlay=tmp", "tmp"),
    ("overlay=/var/tmp/over=lay", "/var/tmp/over=lay"),
    ("overlay_force=yes", "yes"),
    ("overlay_force=no", "no"),
    ("cache_size=4M", 4 * MIB),
    ("cache_size=1t", 1024**4),
    ("cache_size=5000000", 5_000_000),
    ("cache=auto", "auto"),
    ("cache=strict", "strict"),
    ("cache=none", "none"),
    ("block_size=4K", 4096),
    ("block_size=1M", MIB),
    ("readahead=0", 0),
    ("readahead=1G", 1024 * MIB),
    ("op_timeout=0.1", 0.1),
    ("op_timeout=5", 5.0),
    ("retry_budget=forever", math.inf),
    ("idle_timeout=1e3", 1000.0),
    ("stop_timeout=30", 30.0),
    ("credentials=/etc/vddkfs/vc.cred", "/etc/vddkfs/vc.cred"),
    ("thumbprint=" + ":".join(["ab"] * 20), ":".join(["AB"] * 20)),
    ("thumbprint=" + ":".join(["0F"] * 32), ":".join(["0F"] * 32)),
    ("transports=san:nbdssl:nbd", ("san", "nbdssl", "nbd")),
    ("transports=hotadd", ("hotadd",)),
    ("san_check=no", "no"),
    ("san_devices=auto", ()),
    ("san_devices=/dev/mapper/mpatha", ("/dev/mapper/mpatha",)),
    (
        "san_devices=/dev/disk/by-path/pci-0000:3b:00.0-fc-lun-1:/dev/sdb",
        ("/dev/disk/by-path/pci-0000:3b:00.0-fc-lun-1", "/dev/sdb"),
    ),
    ("drop_caches=yes", "yes"),
    ("compression=fastlz", "fastlz"),
    ("libdir=/opt/vmware-vix-disklib-distrib", "/opt/vmware-vix-disklib-distrib"),
    ("vddk_config=/etc/vddkfs/vddk.conf", "/etc/vddkfs/vddk.conf"),
    ("nfc_port=902", 902),
    ("keepalive=never", 0.0),
    ("keepalive=30", 30.0),
    ("idle_close=0", 0.0),
    ("max_sessions=0", 0),
    ("max_sessions=50", 50),
    ("log=auto", "auto"),
    ("log=stderr", "stderr"),
    ("log=syslog", "syslog"),
    ("log=/var/log/x=y.log", "/var/log/x=y.log"),
    ("log_level=error", "error"),
    ("log_level=debug", "debug"),
]

BAD = [
    "uid=-1",
    "uid=4294967295",
    "uid=root",
    "credentials=vc.cred",
    "thumbprint=ab:cd",
    "thumbprint=" + ":".join(["gg"] * 20),
    "transports=nbdssl:sna",
    "transports=nbd:nbd",
    "transports=",
    "san_check=maybe",
    "san_devices=",
    "san_devices=sdb",
    "san_devices=/",
    "san_devices=/dev/sdb:",
    "san_devices=:/dev/sdb",
    "drop_caches=1",
    "compression=gzip",
    "libdir=distrib",
    "vddk_config=x",
    "nfc_port=0",
    "nfc_port=65536",
    "keepalive=-1",
    "idle_close=soon",
    "max_sessions=-1",
    "max_sessions=many",
    "uid=",
    "gid=1.5",
    "umask=888",
    "umask=1777",
    "umask=-1",
    "follow_parents=all",
    "follow_parents=",
    "raw_devices=",
    "raw_devices=maybe",
    "restore=",
    "assume=",
    "assume=powered-on",
    "fence_timeout=0",
    "overlay=",
    "overlay=here",
    "overlay_force=1",
    "cache_size=1M",
    "cache_size=2T",
    "cache_size=-4M",
    "cache_size=4X",
    "cache_size=1.5G",
    "cache=",
    "cache=writeback",
    "block_size=2K",
    "block_size=2M",
    "block_size=48K",
    "readahead=2G",
    "readahead=",
    "op_timeout=0",
    "op_timeout=nan",
    "op_timeout=inf",
    "op_timeout=1e12",
    "retry_budget=never",
    "idle_timeout=-1",
    "stop_timeout=soon",
    "log=here.log",
    "log=",
    "log_level=INFO",
]


@pytest.mark.parametrize(("text", "value"), GOOD)
def test_each_option_is_read(text: str, value: Any) -> None:
    name = text.partition("=")[0]
    assert getattr(parse_options([text]), name) == value


def test_every_option_is_tested_has_a_field_and_a_meaning() -> None:
    assert {text.partition("=")[0] for text, _ in GOOD} == {option.name for option in OPTIONS}
    assert {option.name for option in OPTIONS} == set(MountOptions.__struct_fields__)
    assert all(option.meaning for option in OPTIONS)


@pytest.mark.parametrize("text", BAD)
def test_a_bad_value_is_told_with_what_is_wanted(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options([text])
    name = text.partition("=")[0]
    assert str(caught.value).startswith(f"option {text}: ")
    assert f"write {name}=" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_without_options_the_mount_is_private_and_careful() -> None:
    found = parse_options([])
    assert (found.uid, found.gid) == (os.getuid(), os.getgid())
    assert found.umask == 0o077
    assert not found.allow_other
    assert found.follow_parents == "folder"
    assert found.raw_devices == "no"
    assert (found.op_timeout, found.retry_budget) == (60, 100)


def test_options_may_come_in_one_word_or_in_several_and_the_last_counts() -> None:
    assert parse_options(["uid=1,gid=2", "umask=7"]) == parse_options(["uid=1", "gid=2,umask=7"])
    assert parse_options(["uid=1, gid=2 ,,", ""]) == parse_options(["uid=1,gid=2"])
    assert parse_options(["uid=1,uid=3"]).uid == 3


@pytest.mark.parametrize(
    "word",
    [
        "defaults",
        "ro",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "_netdev",
        "nofail",
        "exec",
        "noexec",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "strictatime",
        "lazytime",
        "sync",
        "async",
        "dirsync",
        "silent",
        "loud",
        "default_permissions",
        "x-systemd.automount",
        "x-systemd.requires=/vms",
        "X-mount.mkdir=0755",
        "x-gvfs-show",
        "comment=backup",
        'context="system_u"',
        "rootcontext=x",
    ],
)
def test_the_words_of_mount_and_fstab_are_dropped(word: str) -> None:
    assert parse_options([f"uid=7,{word},gid=8"]) == parse_options(["uid=7", "gid=8"])


def test_nothing_is_written_unless_it_is_asked() -> None:
    found = parse_options([])
    assert (found.writable, found.overlay, found.restore) == (False, "", "no")
    assert (found.assume, found.overlay_force, found.fence_timeout) == ("", "no", 30)


@pytest.mark.parametrize("word", ["rw", "writable", " rw ", "uid=0,rw", "rw,writable"])
def test_rw_and_writable_are_the_same(word: str) -> None:
    assert parse_options([word]).writable


@pytest.mark.parametrize(
    "words",
    [
        ["ro,rw"],
        ["rw", "ro"],
        ["ro,writable"],
        ["overlay=tmp", "ro"],
        ["writable,overlay=tmp"],
        ["overlay=/var/tmp/over", "rw"],
    ],
)
def test_what_excludes_each_other_is_told(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(words)
    assert ("ro does not go with" if "ro" in ",".join(words).split(",") else "exclude") in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("cachesize=4M", "cache_size"),
        ("cache-size=4M", "cache_size"),
        ("read_ahead=1M", "readahead"),
        ("allow-other", "allow_other"),
        ("follow_parent=any", "follow_parents"),
        ("loglevel=debug", "log_level"),
        ("UID=7", ""),
        ("xyzzy", ""),
    ],
)
def test_an_unknown_option_is_told_with_the_nearest_known_one(text: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(["uid=1", text])
    assert caught.value.message == f"unknown option {text.partition('=')[0]}"
    if nearest:
        assert caught.value.advice == f"did you mean {nearest}?"
    else:
        assert all(option.name in caught.value.advice for option in OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_value_too_many_or_too_few_is_an_error(option: options.Option) -> None:
    text = option.name if option.metavar else f"{option.name}=1"
    with pytest.raises(UsageError, match=f"write {option.name}"):
        parse_options([text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("4KiB", 4096),
        ("4kb", 4096),
        (" 1g ", 1024**3),
        ("2TiB", 2 * 1024**4),
        ("7b", 7),
    ],
)
def test_sizes_have_binary_units(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "1 M", "1MM", "1e3", "0x10", "1" * 16])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        size(text)


@given(text=st.text(max_size=20))
def test_whatever_is_typed_is_read_or_refused_in_one_line(text: str) -> None:
    told = []
    for word in [text, *(f"{option.name}={text}" for option in OPTIONS)]:
        try:
            parse_options([word])
        except UsageError as error:
            told.append(str(error))
    assert all(len(line.splitlines()) == 1 for line in told)

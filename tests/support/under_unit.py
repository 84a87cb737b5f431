"""Runs a program as a systemd unit would have it: python3 under_unit.py UNIT PROGRAM [ARGUMENT...]

Not everything that a unit can ask for, but what a program itself may run into, and what needs neither root nor systemd:
SystemCallFilter=, SystemCallErrorNumber=EPERM, MemoryDenyWriteExecute=, RestrictAddressFamilies=, NoNewPrivileges=, UMask=,
WatchdogSec= (as variables). System calls are filtered as systemd does it: by libseccomp, a filter for each subject.
"""

import ctypes
import errno
import os
import socket
import subprocess
import sys

ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
NOT_EQUAL, EQUAL, MASKED = 1, 4, 7
PROT_WRITE, PROT_EXEC = 2, 4


class Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
seccomp.seccomp_init.restype = ctypes.c_void_p
seccomp.seccomp_rule_add_array.argtypes = [
    ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison)
]
seccomp.seccomp_load.argtypes = [ctypes.c_void_p]


def load(otherwise, action, rules):
    """A filter of its own. Names that this machine's architecture lacks are passed over, as systemd does."""
    context = seccomp.seccomp_init(otherwise)
    for name, comparisons in rules:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue
        array = (Comparison * max(1, len(comparisons)))(*comparisons)
        failed = seccomp.seccomp_rule_add_array(context, action, number, len(comparisons), array)
        if failed:
            sys.exit(f"{name} can't be filtered: {os.strerror(-failed)}")
    failed = seccomp.seccomp_load(context)
    if failed:
        sys.exit(f"the filter can't be loaded: {os.strerror(-failed)}")


def members(group):
    """The system calls of a group, and of the groups in it."""
    text = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", group], check=True, capture_output=True, text=True
    ).stdout
    names = [line.strip() for line in text.splitlines()[1:]]
    found = set()
    for name in names:
        if name.startswith("@"):
            found |= members(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return found


unit, *command = sys.argv[1:]
settings = {}
for line in open(unit, encoding="utf-8"):
    if "=" in line and not line.startswith("#"):
        key, value = line.strip().split("=", 1)
        settings.setdefault(key, []).append(value)

# systemd allows these always: without them nothing can be started.
allowed = members("@default")
for words in settings["SystemCallFilter"]:
    removes = words.startswith("~")
    for word in words.removeprefix("~").split():
        names = members(word) if word.startswith("@") else {word}
        allowed = allowed - names if removes else allowed | names
if settings["SystemCallErrorNumber"] != ["EPERM"]:
    sys.exit("what is not allowed has to be answered with EPERM")
families = {getattr(socket, name) for words in settings["RestrictAddressFamilies"] for name in words.split()}

os.environ["WATCHDOG_PID"] = str(os.getpid())
os.umask(int(settings["UMask"][0], 8))
if settings["MemoryDenyWriteExecute"] == ["yes"]:
    both = PROT_WRITE | PROT_EXEC
    load(ALLOW, REFUSE, [
        ("mmap", [Comparison(2, MASKED, both, both)]),
        ("mprotect", [Comparison(2, MASKED, PROT_EXEC, PROT_EXEC)]),
        ("pkey_mprotect", [Comparison(2, MASKED, PROT_EXEC, PROT_EXEC)]),
    ])
load(ALLOW, REFUSE, [
    ("socket", [Comparison(0, EQUAL, family, 0)]) for family in range(0, 46) if family not in families
])
load(REFUSE, ALLOW, [(name, []) for name in sorted(allowed)])
os.execv(command[0], command)

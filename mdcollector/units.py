"""systemd units: template units that are the same everywhere, and drop-ins that say what the fleet file says.

Written by `mdcollector units`. Each process of a fleet is an instance: connector@NAME, arbiter@NAME, writer@NAME, and the
monitor. They are of Type=notify, and the watchdog is fed by what feeds the stats page: the loop that does the work.
Exit code 78 (wrong configuration) is final, everything else is restarted. Rows wait in the rings while a writer is away.
Who fills rings is ordered after who drains them, so that systemd stops connectors first and writers last, also when the
machine goes down; and all of them after the target, so that `systemctl stop` of it returns when all rows are written.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdcollector.config import FleetConfig
from mdcollector.errors import EXIT_CONFIG

USER = "mdcollector"
WATCHDOG_S = 30
DROP_INS = "mdcollector-*@*.service.d/fleet.conf"
STOP_S = {"connector": 30, "arbiter": 60, "writer": 120, "monitor": 20}

_HARDENING = """\
NoNewPrivileges=yes
ProtectHome=yes
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
AmbientCapabilities=
"""

# A service whose writable paths do not exist cannot even begin (226/NAMESPACE), and rings in memory are gone after a boot.
# What exists stays as it is: it may be shared with others.
_DIRECTORIES = """\
[Unit]
Description=mdcollector directories
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'for d; do [ -d "$$d" ] || install -d -m 0750 -o {user} -g {user} "$$d" || exit; done' sh {paths}
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER
ProtectSystem=full
PrivateNetwork=yes
RestrictAddressFamilies=none
IPAddressDeny=any
UMask=0027
{hardening}"""

_SERVICE = """\
[Unit]
Description=mdcollector {what}
PartOf=mdcollector.target
After=mdcollector.target network-online.target mdcollector-directories.service
Wants=network-online.target mdcollector-directories.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
WatchdogSec={watchdog}
Restart=always
RestartSec=1
RestartPreventExitStatus={exit_config}
TimeoutStartSec=90
TimeoutStopSec={stop}
KillMode=mixed
User={user}
Group={user}
UMask=0027
LimitMEMLOCK=infinity
LimitNOFILE=16384
OOMScoreAdjust={oom}
ProtectSystem=strict
ReadWritePaths={writable}
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
CapabilityBoundingSet=
{hardening}EnvironmentFile=-/etc/mdcollector/secrets.env

[Install]
WantedBy=mdcollector.target
"""

_TARGET = """\
[Unit]
Description=mdcollector: all processes of the fleet
Wants={wants}

[Install]
WantedBy=multi-user.target
"""


def units(
    config_path: Path, fleet: FleetConfig, connections: Mapping[str, Sequence[str]], program: Sequence[str] = ()
) -> dict[str, str]:
    """Files by name below the directory of units. `connections`: processes of each connector; `program`: how to start."""
    base = " ".join(map(_word, program or (sys.executable, "-m", "mdcollector"))) + " --log-format json"
    file = _word(str(config_path.absolute()))
    rings = _word(str(Path(fleet.rings).absolute()))
    outs = [_word(str(Path(writer.out).absolute())) for writer in fleet.writers.values() if "://" not in writer.out]
    csv = [_word(str(Path(fleet.monitor.csv).absolute().parent))] if fleet.monitor.csv else []

    def service(role: str, command: str, what: str, *, writable: Sequence[str] = (), oom: int = 0) -> str:
        return _SERVICE.format(
            what=what, command=f"{base} {command}", watchdog=WATCHDOG_S, exit_config=EXIT_CONFIG,
            stop=STOP_S[role], user=USER, writable=" ".join(dict.fromkeys([rings, *writable])), oom=oom,
            hardening=_HARDENING,
        )  # fmt: skip

    found = {
        "mdcollector-connector@.service": service("connector", f"connect %i -c {file}", "connector %i", oom=-800),
        "mdcollector-arbiter@.service": service("arbiter", f"arbitrate %i -c {file}", "arbiter %i", oom=-800),
        "mdcollector-writer@.service": service("writer", f"write %i -c {file}", "writer %i", writable=outs, oom=-500),
        "mdcollector-monitor.service": service("monitor", f"monitor -c {file}", "monitor", writable=csv),
        "mdcollector-directories.service": _DIRECTORIES.format(
            user=USER, paths=" ".join(dict.fromkeys([rings, *outs, *csv])), hardening=_HARDENING
        ),
    }
    instances, drains = ["mdcollector-monitor.service"], list[str]()
    for role, names, cpu in _processes(fleet, connections):
        mine = [f"mdcollector-{role}@{name}.service" for name in names]
        for unit in mine:
            order = f"[Unit]\nAfter={' '.join(drains)}\n" if drains else ""
            pin = f"[Service]\nCPUAffinity={cpu}\n" if cpu is not None else ""
            if order or pin:
                found[f"{unit}.d/fleet.conf"] = order + pin
        instances += mine
        if role != "connector":
            drains += mine
    found["mdcollector.target"] = _TARGET.format(wants=" ".join(instances))
    return found


def _word(text: str) -> str:
    """One word of a unit file, whatever a path has in it: blanks, quotes, the % of specifiers."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if not text or set(text) & set(" \t'\"\\") else text


def _processes(
    fleet: FleetConfig, connections: Mapping[str, Sequence[str]]
) -> list[tuple[str, Sequence[str], int | None]]:
    """Role, process names and CPU of everything in the fleet file: who drains stands before who fills."""
    found: list[tuple[str, Sequence[str], int | None]] = [
        ("writer", [name], settings.cpu) for name, settings in fleet.writers.items()
    ]
    found += [("arbiter", [name], settings.cpu) for name, settings in fleet.arbiters.items()]
    found += [("connector", connections[name], settings.cpu) for name, settings in fleet.connectors.items()]
    return found

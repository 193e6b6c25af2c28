"""systemd units: template units that are the same everywhere, and drop-ins that say what the fleet file says.

Written by `mdcollector units`. Each process of a fleet is an instance: connector@NAME, arbiter@NAME, writer@NAME, and the
monitor. They are of Type=notify, and the watchdog is fed by what feeds the stats page: the loop that does the work.
Exit code 78 (wrong configuration) is final, everything else is restarted. Rows wait in the rings while a writer is away.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdcollector.config import FleetConfig
from mdcollector.errors import EXIT_CONFIG

USER = "mdcollector"
WATCHDOG_S = 30
STOP_S = {"connector": 30, "arbiter": 60, "writer": 120, "monitor": 20}

_SERVICE = """\
[Unit]
Description=mdcollector {what}
PartOf=mdcollector.target
After=network-online.target{after}
Wants=network-online.target
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
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={writable}
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
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
CapabilityBoundingSet=
AmbientCapabilities=
EnvironmentFile=-/etc/mdcollector/secrets.env

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
    base = " ".join(program or (sys.executable, "-m", "mdcollector")) + " --log-format json"
    file = config_path.absolute()
    rings = Path(fleet.rings).absolute()
    outs = [str(Path(writer.out).absolute()) for writer in fleet.writers.values() if "://" not in writer.out]
    csv = [str(Path(fleet.monitor.csv).absolute().parent)] if fleet.monitor.csv else []

    def service(
        role: str, command: str, what: str, *, after: str = "", writable: Sequence[str] = (), oom: int = 0
    ) -> str:
        return _SERVICE.format(
            what=what, command=f"{base} {command}", after=after, watchdog=WATCHDOG_S, exit_config=EXIT_CONFIG,
            stop=STOP_S[role], user=USER, writable=" ".join(dict.fromkeys([str(rings), *writable])), oom=oom,
        )  # fmt: skip

    found = {
        "mdcollector-connector@.service": service("connector", f"connect %i -c {file}", "connector %i", oom=-800),
        "mdcollector-arbiter@.service": service("arbiter", f"arbitrate %i -c {file}", "arbiter %i", oom=-800),
        "mdcollector-writer@.service": service("writer", f"write %i -c {file}", "writer %i", writable=outs, oom=-500),
        "mdcollector-monitor.service": service("monitor", f"monitor -c {file}", "monitor", writable=csv),
    }
    instances = ["mdcollector-monitor.service"]
    for role, names, cpu in _processes(fleet, connections):
        for name in names:
            unit = f"mdcollector-{role}@{name}.service"
            instances.append(unit)
            if cpu is not None:
                found[f"{unit}.d/fleet.conf"] = f"[Service]\nCPUAffinity={cpu}\n"
    found["mdcollector.target"] = _TARGET.format(wants=" ".join(instances))
    return found


def _processes(
    fleet: FleetConfig, connections: Mapping[str, Sequence[str]]
) -> list[tuple[str, Sequence[str], int | None]]:
    """Role, process names and CPU of everything in the fleet file."""
    found: list[tuple[str, Sequence[str], int | None]] = [
        ("connector", connections[name], settings.cpu) for name, settings in fleet.connectors.items()
    ]
    found += [("arbiter", [name], settings.cpu) for name, settings in fleet.arbiters.items()]
    found += [("writer", [name], settings.cpu) for name, settings in fleet.writers.items()]
    return found

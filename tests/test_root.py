"""Writers do not run as root, but in a container or when told so."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from mdcollector import cli, config
from mdcollector.config import ALLOW_ROOT
from mdcollector.errors import EXIT_CONFIG, ConfigError


@pytest.fixture(autouse=True)
def _root_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(config, "CONTAINER_MARKS", ())
    for name in (*config.CONTAINER_VARIABLES, ALLOW_ROOT):
        monkeypatch.delenv(name, raising=False)


def test_root_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"writers do not run as root: .* {ALLOW_ROOT}=1"):
        config.check_user()
    monkeypatch.setenv(ALLOW_ROOT, "0")
    with pytest.raises(ConfigError):
        config.check_user()


def test_whoever_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as told:
        told.setenv(ALLOW_ROOT, "1")
        config.check_user()
    for name in config.CONTAINER_VARIABLES:
        with monkeypatch.context() as contained:
            contained.setenv(name, "podman")
            config.check_user()
    with monkeypatch.context() as contained:
        contained.setattr(config, "CONTAINER_MARKS", (str(tmp_path),))
        config.check_user()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    config.check_user()


@pytest.mark.parametrize("command", [["write", "w"], ["up"]])
def test_the_commands_refuse_before_they_touch_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(cli, "stop_signal", lambda: None)
    monkeypatch.setattr(cli.logs, "set_up", lambda *_: None)
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[connectors.c]\nexchange = "okx"\ntickers = ["BTC-USDT"]\n[writers.w]\nout = "data"\n')
    done = CliRunner().invoke(cli.main, [*command, "-c", str(fleet)])
    assert done.exit_code == EXIT_CONFIG, done.output
    assert "mdcollector: writers do not run as root" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["fleet.toml"]

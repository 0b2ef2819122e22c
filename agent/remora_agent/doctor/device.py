"""Checks of this device as a fleet member: state directory, identity, controller, ports, unit."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

from remora_agent.config import AgentConfig, ServingConfig, check_address
from remora_agent.control.certificates import check_controller as check_fleet_controller
from remora_agent.control.certificates import load_certificate, renew_at
from remora_agent.control.facts import disk_free
from remora_agent.control.identity import Identity, load_identity
from remora_agent.control.join import presented_chain
from remora_agent.control.layout import StateLayout, exclusive
from remora_agent.doctor.check import Check, fail, ok, warn
from remora_agent.serving.address import TcpAddress, parse_address
from remora_contract.errors import InvalidInput, NotFound, Refused, RemoraError, Unauthenticated

GIB = 1 << 30
UNIT = "remora-agent.service"
_HANDSHAKE_S = 5.0
_EXPIRES_SOON = timedelta(days=3)


def device_checks(config: AgentConfig) -> Iterator[Check]:
    layout = StateLayout(Path(config.state_dir))
    now = datetime.now(timezone.utc)
    yield check_state_dir(layout)
    yield check_disk(disk_free(layout.root), config.limits.disk_floor_bytes)
    yield check_threads(config.serving, os.cpu_count() or 1)
    running = agent_runs(layout)
    yield check_port("serving.listen", config.serving.listen, running)
    if config.telemetry.metrics_listen:
        yield check_port("telemetry.metrics_listen", config.telemetry.metrics_listen, running)
    try:
        identity = load_identity(layout.identity)
    except (NotFound, Refused, InvalidInput) as e:
        yield fail("identity", "none", str(e))
    else:
        yield check_certificate(
            identity, config.controller.enrolment_address or identity.enrolment, now
        )
        yield check_controller(identity, config.controller.address or identity.controller, now)
    yield check_unit()


def check_state_dir(layout: StateLayout) -> Check:
    try:
        layout.create()
        with tempfile.TemporaryFile(dir=layout.root) as f:
            f.write(b"remora")
            f.flush()
            os.fsync(f.fileno())
    except (OSError, Refused) as e:
        return fail(
            "state_dir", f"{layout.root} cannot be written: {e}", "run doctor as the agent's user"
        )
    return ok("state_dir", f"{layout.root} is writable")


def check_disk(free: int, floor: int) -> Check:
    text = f"{free / GIB:.1f} GiB free, {floor / GIB:.1f} of them kept"
    if free <= floor:
        return fail("disk", text, "free space, or lower limits.disk_floor_bytes")
    return ok("disk", text)


def check_threads(serving: ServingConfig, cores: int) -> Check:
    if serving.threads is not None and serving.threads > cores:
        found = f"{serving.threads} threads on {cores} cores"
        return warn("threads", found, "lower serving.threads: they will wait for each other")
    return ok("threads", f"{serving.threads or 'automatic'} of {cores}")


def agent_runs(layout: StateLayout) -> bool:
    """Whether an agent holds the state directory now."""
    try:
        with exclusive(layout):
            return False
    except Refused:
        return True
    except OSError:
        return False


def check_port(name: str, listen: str, running: bool) -> Check:
    """Free, or taken by the agent that runs."""
    address = parse_address(listen)
    if not isinstance(address, TcpAddress):
        return ok(name, listen)
    try:
        with socket.create_server((address.host, address.port)):
            return ok(name, f"{listen} is free")
    except OSError as e:
        if running:
            return ok(name, f"{listen} is in use by the running agent")
        return fail(name, f"{listen}: {e.strerror}", f"set {name} to another port or address")


def check_certificate(identity: Identity, enrolment: str, now: datetime) -> Check:
    certificate = load_certificate(identity.certificate_pem)
    until = certificate.not_valid_after_utc
    found = f"{identity.device_id}, certificate until {until:%Y-%m-%d %H:%M} UTC"
    again = f"remora-agent join {enrolment} --token TOKEN --force"
    if now > until:
        renews = f"start the agent: it renews over {enrolment}. If the controller refuses: {again}"
        return fail("identity", found + ": expired", renews)
    if now < certificate.not_valid_before_utc:
        return fail(
            "identity", found + ": not valid yet", "set the clock: timedatectl set-ntp true"
        )
    if until - now < _EXPIRES_SOON:
        return warn("identity", found, f"let the agent reach its controller, or: {again}")
    if now > renew_at(identity.certificate_pem):
        return ok("identity", found + ", renewal is due")
    return ok("identity", found)


def check_controller(identity: Identity, address: str, now: datetime) -> Check:
    """A TLS handshake and the chain check; no request is made."""
    ca = load_certificate(identity.ca_pem)
    try:
        chain = presented_chain(*check_address(address, "controller"), _HANDSHAKE_S)
        if not chain:
            return fail("controller", address, "it presents no certificate: is it a controller?")
        check_fleet_controller(chain[0], ca, now)
    except Unauthenticated as e:
        return fail("controller", address, f"{e}")
    except RemoraError as e:
        return warn("controller", address, f"{e}; meanwhile the device serves what it has")
    return ok("controller", f"{address} answers as this fleet's controller")


def check_unit() -> Check:
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return warn("systemd unit", "no systemctl here", "start `remora-agent run` by other means")
    asked = subprocess.run(
        [systemctl, "is-active", UNIT], capture_output=True, text=True, timeout=10, check=False
    )
    state = asked.stdout.strip() or "unknown"
    if state == "active":
        return ok("systemd unit", f"{UNIT} is active")
    return warn("systemd unit", f"{UNIT} is {state}", f"systemctl enable --now {UNIT}")

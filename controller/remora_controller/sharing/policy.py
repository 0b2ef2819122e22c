"""With whom a device shares engines: the fleet's policy and the device's site. Pure."""

from __future__ import annotations

from typing import Literal

from remora_controller.domain import Device

Policy = Literal["off", "site", "all"]
SITE_LABEL = "site"
EVERYBODY = ""  # the scope of policy `all`


def scope_of(policy: Policy, device: Device) -> str | None:
    """Name of the circle that shares, or None: the device builds alone.

    Only an operator's label counts as a site: one that the device gives itself would let it choose
    whom its engines reach."""
    if policy == "off":
        return None
    if policy == "all":
        return EVERYBODY
    return device.operator_labels.get(SITE_LABEL) or None


def why_alone(policy: Policy, device: Device) -> str:
    """What to tell where `scope_of` is None."""
    if policy == "off":
        return "engine sharing is off"
    return (
        f"{device.device_id} has no label {SITE_LABEL} from an operator (`remora devices label "
        f"{device.device_id} {SITE_LABEL}=NAME`), and engines are shared within a site"
    )

"""The phases of a device, as it reports them and as the controller counts them: one vocabulary.

How a device moves between them is the agent's (`remora_agent.control.phase`), in which order
reports accumulate is the controller's (`remora_controller.phases`). Pure; owns no transition.
"""

from __future__ import annotations

from enum import Enum

# The longest SOAKING that an assignment may ask for, seconds.
MAX_SOAK_S = 7 * 86_400.0


class Phase(Enum):
    ASSIGNED = "ASSIGNED"
    ADMITTED = "ADMITTED"
    REFUSED = "REFUSED"
    STAGING = "STAGING"
    STAGED = "STAGED"
    BUILDING = "BUILDING"
    BUILT = "BUILT"
    PROVING = "PROVING"
    WAIT_WINDOW = "WAIT_WINDOW"
    SWITCHING = "SWITCHING"
    SOAKING = "SOAKING"
    COMMITTED = "COMMITTED"
    REVERTING = "REVERTING"
    REVERTED = "REVERTED"
    FAILED = "FAILED"
    UNASSIGNED = "UNASSIGNED"  # nothing is assigned: the device keeps what it runs


# A generation ends in one of these. One exception: a crash loop of what serves still takes a device
# from there to REVERTING.
FINAL = frozenset({Phase.COMMITTED, Phase.REFUSED, Phase.REVERTED, Phase.FAILED, Phase.UNASSIGNED})

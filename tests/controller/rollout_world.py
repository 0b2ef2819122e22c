"""A fleet and a store in memory, around the pure rollout decisions: what properties are about.

Devices follow a script each. Actions can be applied in part, as a crash would leave them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from remora_contract.device_phase import Phase
from remora_controller.domain import RolloutSpec, RolloutState
from remora_controller.gates.judge import Verdict
from remora_controller.phases import furthest
from remora_controller.rollout import (
    Action,
    AdvanceWave,
    Assign,
    Attempt,
    MemberView,
    RolloutView,
    SetState,
    decide,
)
from remora_controller.transitions import BY_ITSELF

NEW, OLD = "new-release", "old-release"
GOOD = (Phase.ADMITTED, Phase.STAGING, Phase.SWITCHING, Phase.SOAKING, Phase.COMMITTED)
BAD = (Phase.ADMITTED, Phase.STAGING, Phase.SWITCHING, Phase.SOAKING, Phase.REVERTED)


@dataclass
class WorldDevice:
    device_id: str
    wave: int
    is_good: bool = True  # whether the new release works there
    is_online: bool = True
    is_eligible: bool = True
    has_old: bool = True
    forward: Attempt | None = None
    back: Attempt | None = None
    unreported: list[tuple[int, Phase]] = field(default_factory=list)

    def view(self) -> MemberView:
        return MemberView(
            device_id=self.device_id,
            wave=self.wave,
            forward=self.forward,
            back=self.back,
            last_good=OLD if self.has_old else None,
            is_eligible=self.is_eligible,
            is_online=self.is_online,
            is_gone=not self.is_online,
        )


class World:
    def __init__(self, devices: list[WorldDevice], spec: RolloutSpec) -> None:
        self.devices = {d.device_id: d for d in devices}
        self.spec = spec
        self.state, self.reason, self.keep = RolloutState.RUNNING, "", False
        self.wave, self.waves = 1, max(d.wave for d in devices)
        self.clock_at, self.now = 0.0, 0.0
        self.generation = 0
        self.verdicts: tuple[Verdict, ...] = ()
        self.touched: list[Assign] = []

    def view(self) -> RolloutView:
        members = tuple(d.view() for d in sorted(self.devices.values(), key=lambda d: d.wave))
        return RolloutView(
            "r-1",
            NEW,
            self.state,
            self.reason,
            self.keep,
            self.wave,
            self.waves,
            self.clock_at,
            self.spec,
            members,
            verdicts=tuple(v for v in self.verdicts if v.wave <= self.wave),
        )

    def decide(self) -> list[Action]:
        actions = decide(self.view(), self.now)
        states = {a.state for a in actions if isinstance(a, SetState)}
        assert states <= set(BY_ITSELF.get(self.state, {})), "docs/states.md would be wrong"
        return actions

    def apply(self, action: Action) -> None:
        if isinstance(action, Assign):
            self._assign(action)
        elif isinstance(action, AdvanceWave):
            self.wave, self.clock_at = action.wave, self.now
        else:
            assert isinstance(action, SetState)
            self.state, self.reason, self.clock_at = action.state, action.reason, self.now

    def _assign(self, action: Assign) -> None:
        self.touched.append(action)
        self.generation += 1
        device = self.devices[action.device_id]
        nothing = action.release_id is None
        attempt = Attempt(self.generation, self.now, None, is_nothing=nothing)
        if action.is_rollback:
            device.back = attempt
        else:
            device.forward = attempt
        if nothing:
            device.unreported = [(self.generation, Phase.UNASSIGNED)]
        else:
            works = action.is_rollback or device.is_good
            script = GOOD if works else BAD
            device.unreported = [(self.generation, phase) for phase in script]

    def settle_decisions(self) -> None:
        """Until there is nothing to decide. More rounds than any chain of decisions needs."""
        for _ in range(50):
            actions = self.decide()
            if not actions:
                return
            for action in actions:
                self.apply(action)
        raise AssertionError("decisions never settle")

    def report(self, device_id: str, generation: int, phase: Phase) -> None:
        """As the store does: the furthest phase of each generation stays."""
        device = self.devices[device_id]
        for name in ("forward", "back"):
            attempt = getattr(device, name)
            if attempt is not None and attempt.generation == generation:
                moved = replace(attempt, phase=furthest(attempt.phase, phase))
                setattr(device, name, moved)

    def step_device(self, device_id: str) -> bool:
        device = self.devices[device_id]
        if not device.is_online or not device.unreported:
            return False
        self.report(device_id, *device.unreported.pop(0))
        return True

    def changing(self) -> int:
        """Devices that were assigned something and have not settled."""
        attempts = [d.back or d.forward for d in self.devices.values() if d.is_online]
        return sum(a is not None and not a.is_settled for a in attempts)

    def run(self) -> None:
        """Decides and lets devices work until nothing happens; then lets time pass."""
        for _ in range(400):
            self.settle_decisions()
            if self.state.is_final:
                return
            moved = [self.step_device(d) for d in self.devices]
            if not any(moved):
                if self.state is RolloutState.PAUSED:
                    return
                self.now += self.spec.wave_timeout_s / 2
        raise AssertionError(f"never ends: {self.state} {self.reason}")

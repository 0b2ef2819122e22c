"""The operator's calls about experiments."""

from __future__ import annotations

from collections.abc import Mapping

from remora_contract.experiments import ARM_PREFIX, SHADOW_PREFIX, Shadow
from remora_controller import pki
from remora_controller.experiments.laboratory import Laboratory, PromotionRequest, Proposal
from remora_controller.experiments.overview import ArmView, ExperimentView
from remora_controller.experiments.rules import candidate_of, incumbent_of, outcome_for
from remora_controller.governance import Governance
from remora_controller.operations import StartRequest
from remora_controller.planner import Plan
from remora_controller.release_diff import Difference
from remora_controller.services import operator_wire as wire
from remora_controller.services.calls import Context, caller, unary
from remora_controller.services.diagnostics import Asking
from remora_controller.services.engines import EngineOperatorService
from remora_controller.services.gate_wire import verdict_message
from remora_controller.services.operator import OperatorParts
from remora_controller.sharing.desk import Desk
from remora_protos.operator.v1 import operator_pb2 as pb


class WholeOperatorService(EngineOperatorService):
    """All of remora.operator.v1.Operator."""

    def __init__(
        self,
        parts: OperatorParts,
        governance: Governance,
        asking: Asking,
        desk: Desk,
        laboratory: Laboratory,
    ) -> None:
        super().__init__(parts, governance, asking, desk)
        self._laboratory = laboratory

    @unary
    async def ListExperiments(
        self, request: pb.ListExperimentsRequest, context: Context
    ) -> pb.ListExperimentsResponse:
        caller(context, pki.Role.OPERATOR)
        views = await self._parts.thread.call(
            self._laboratory.experiments, request.selector, request.name, request.with_ended
        )
        return pb.ListExperimentsResponse(experiments=map(experiment_message, views))

    @unary
    async def PlanPromotion(self, request: pb.PromotionRequest, context: Context) -> pb.Promotion:
        caller(context, pki.Role.OPERATOR)
        found, differences, plan = await self._parts.thread.call(
            self._laboratory.planned, promotion_request_of(request)
        )
        message = promotion_message(found)
        _add_plan(message, differences, plan, self._parts.operations.sharing)
        return message

    @unary
    async def PromoteExperiment(
        self, request: pb.PromotionRequest, context: Context
    ) -> pb.Promotion:
        by = caller(context, pki.Role.OPERATOR).name
        found, detail = await self._parts.thread.call(
            self._laboratory.promote, promotion_request_of(request), by
        )
        self._parts.on_news()
        message = promotion_message(found)
        message.rollout.CopyFrom(wire.rollout_message(detail, self._parts.clock()))
        return message


def promotion_request_of(message: pb.PromotionRequest) -> PromotionRequest:
    """Raises RequestInvalid."""
    start = StartRequest(
        message.release,
        message.selector,
        wire.spec_of(message.spec),
        message.skip_refused,
        message.supersede,
        message.needs_approval,
    )
    return PromotionRequest(message.name, start, message.arm or None, message.force, message.reason)


def experiment_message(view: ExperimentView) -> pb.Experiment:
    experiment = view.experiment
    candidate = candidate_of(experiment)
    outcome = outcome_for(experiment, candidate, view.verdicts) if candidate else None
    return pb.Experiment(
        name=experiment.name,
        release_ids=view.release_ids,
        salt=experiment.salt,
        devices=view.running,
        arms=[_arm_message(arm, experiment.shadow) for arm in view.arms],
        rules=map(verdict_message, view.verdicts),
        min_requests=experiment.min_requests,
        promote_when=experiment.promote_when or "",
        incumbent=incumbent_of(experiment) or "",
        candidate=candidate or "",
        verdict=outcome.value if outcome else "",
    )


def _arm_message(view: ArmView, shadow: Shadow | None) -> pb.ExperimentArm:
    arm, counts = view.arm, view.sum.counts
    is_candidate = shadow is not None and shadow.candidate == arm.name
    return pb.ExperimentArm(
        name=arm.name,
        percent=arm.percent,
        adapter=arm.adapter or "",
        use_case=arm.use_case or "",
        identity=view.identity,
        devices=view.sum.devices,
        counts=_named(counts, ARM_PREFIX),
        shadow=_named(counts, SHADOW_PREFIX) if is_candidate else {},
    )


def _named(counts: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {n.removeprefix(prefix): v for n, v in counts.items() if n.startswith(prefix)}


def promotion_message(found: Proposal) -> pb.Promotion:
    return pb.Promotion(
        experiment=found.experiment.name,
        arm=found.arm,
        from_release_id=found.base.release_id,
        release_id=found.release.release_id,
        rules=map(verdict_message, found.verdicts),
        refusal=found.refusal or "",
        notes=found.notes,
    )


def _add_plan(
    message: pb.Promotion, differences: list[Difference], plan: Plan, sharing: str
) -> None:
    message.differences.extend(map(wire.difference_message, differences))
    message.plan.CopyFrom(wire.plan_message(plan, sharing))

"""One fault of the engine is one, however many requests it ends."""

from remora_agent.hosting.faults import FaultCount
from remora_agent.runtime.api import Failed
from remora_contract.errors import EngineFault, Unavailable


def test_a_fault_counts_once_for_its_whole_batch_and_other_ends_do_not():
    faults, first = FaultCount(), EngineFault("a step failed")
    for error in (first, first, Unavailable("closing"), first, EngineFault("another")):
        faults.observe(Failed(error))
    assert faults.count == 2

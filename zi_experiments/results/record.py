"""The record of a run: its request, its plan, and what was measured or went wrong. It has one JSON form."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from zi_experiments.cost_model import memory_fit
from zi_experiments.cost_model.bound import lower_bound
from zi_experiments.cost_model.inventory import Held
from zi_experiments.cost_model.machine_bound import machine_bound_s
from zi_experiments.cost_model.plan import Plan
from zi_experiments.cost_model.prediction import Prediction
from zi_experiments.measurement.generated import Generated
from zi_experiments.measurement.timing import Samples
from zi_experiments.measurement.verification import Verification
from zi_experiments.results.metrics import Metrics, Passed

SCHEMA_VERSION = 1

# a plan alone is "predicted", or "bound" where rates that a prediction needs are not known
Status = Literal["ok", "refused", "oom", "killed", "error", "predicted", "bound"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a run is not ok."""

    type: str
    message: str
    hint: str | None = None
    traceback: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    id: str
    name: str
    group: str | None
    started_at: str  # ISO 8601, UTC
    finished_at: str | None
    command: str
    git_revision: str | None
    overrides: list[str] = field(default_factory=list)  # of this run; a sweep's command has those of all its runs
    fingerprint: str | None = None  # of settings, code, machine and weights: results with equal ones are comparable


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One run. Frozen: a later stage makes a new one with `dataclasses.replace`."""

    run: RunInfo
    folder: str
    choices: dict[str, str | None]
    config: dict[str, Any]
    question: dict[str, Any] | None = None  # what the experiment asks, and the figures that answer it
    published: dict[str, Any] | None = None  # a table of published figures to compare with
    status: Status = "error"
    error: Failure | None = None
    ds_config: dict[str, Any] | None = None  # of engine=deepspeed
    engine_config: dict[str, Any] | None = None  # of another engine
    plan: Plan | None = None
    prediction: Prediction | None = None  # of the plan, before the run began; set if the plan is
    environment: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None  # the files that were loaded, with their hashes; None: random weights
    stored: Held | None = None  # the weights that were loaded, over all ranks
    samples: Samples | None = None
    generated: Generated | None = None
    metrics: Metrics | None = None
    bound_passed: Passed | None = None  # by the rates before the machine was measured again; None: it was not
    verification: Verification | None = None  # None: verify=off, or the run did not get as far

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: `result.json`, schema version 1, in bytes and seconds; nothing is rounded."""
        return {
            "schema_version": SCHEMA_VERSION,
            "status": self.status,
            "error": asdict(self.error) if self.error else None,
            "run": asdict(self.run),
            "choices": self.choices,
            "config": self.config,
            "question": self.question,
            "published": self.published,
            "ds_config": self.ds_config,
            "engine_config": self.engine_config,
            "plan": describe_plan(self.plan, self.prediction) if self.plan and self.prediction else None,
            "environment": self.environment,
            "checkpoint": self.checkpoint,
            "stored": asdict(self.stored) if self.stored else None,
            "samples": self.samples.to_dict() if self.samples else None,
            "generated": asdict(self.generated) if self.generated else None,
            "metrics": asdict(self.metrics) if self.metrics and self.status == "ok" else None,
            "bound_passed": self.bound_passed,
            "verification": asdict(self.verification) if self.verification else None,
        }


def describe_plan(plan: Plan, prediction: Prediction) -> dict[str, Any]:
    """Return the JSON form of a plan and its prediction."""
    arch, work = plan.architecture, plan.run.workload
    return {
        "batch_size": work.batch_size,  # a number with workload.batch_size=auto too
        "sequences": work.sequences,
        "device": plan.machine.device,
        "dtype": plan.dtype,
        "revision": plan.run.model.revision,
        "pin_memory": plan.pin_memory,
        "num_parameters": arch.num_parameters,
        "num_layers": arch.num_layers,
        "layer_class": ", ".join(arch.layer_classes),
        "notes": list(plan.notes),
        "formats": [each.name for each in plan.formats],
        "quantized_fraction": plan.quantized_fraction,
        "packed_fraction": plan.packed_fraction,
        "bits_per_weight": plan.bits_per_weight,
        "weight_bytes": plan.weight_bytes,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "placement": asdict(plan.placement),
        "copied_bytes": plan.storage.copied_bytes,
        "parked_bytes": plan.storage.parked_bytes,
        "streamed_bytes_per_pass": plan.streamed_bytes_per_pass,
        "streamed_bytes_per_step": plan.streamed_bytes_per_step,
        "own_bytes_per_step": plan.storage.own_bytes_per_step,
        "host_layers": list(plan.storage.host_layers),
        "host_experts": plan.storage.host_experts,
        "host_bytes_per_step": plan.storage.host_bytes_per_step,
        "host_kv_bytes": plan.storage.host_kv_bytes,
        "disk_bytes_per_pass": plan.disk_bytes_per_pass,
        "disk_bytes_per_step": plan.disk_bytes_per_step,
        "kv_link_bytes_per_pass": plan.kv_link_bytes_per_pass,
        "memory": [asdict(use) | {"total": use.total} for use in memory_fit.uses(plan)],
        "bound": asdict(lower_bound(plan))
        | {
            "machine_bound_s": machine_bound_s(plan),
            "source": plan.machine.ceilings.source,
        },
        "prediction": asdict(prediction),
        "rates": _rates(plan),
    }


def _rates(plan: Plan) -> dict[str, Any]:
    """Return the rates from which bound and prediction were computed."""
    machine = plan.machine
    measured = asdict(machine.calibration) if machine.calibration else None
    return asdict(machine.ceilings) | {"peer_bytes_per_s": machine.peer_bytes_per_s, "calibration": measured}

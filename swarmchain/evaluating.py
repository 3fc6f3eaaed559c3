"""Both ends of an evaluation: from a finished model to the spec that is proposed, and from its run to the sums."""

from __future__ import annotations

from swarmchain.certify import Arrays
from swarmchain.errors import SpecError
from swarmchain.protocol import RunView
from swarmchain.spec import DonorSpec, EvaluationSpec, Limits, RunRef, TrainedSpec
from swarmchain.store import Store, read_checkpoint, read_spec

# Of validation samples and of their donors, where a model calls donors: a site has few, and each is a person.
SAMPLES_MIN = 5


def read_trained(store: Store, view: RunView) -> TrainedSpec:
    """Spec of a run that trained a model and has a checkpoint.

    Raises
    ------
    SpecError
        If the run trained no model, or has no checkpoint yet.
    """
    spec = read_spec(store, view.spec)
    if not isinstance(spec, TrainedSpec):
        raise SpecError(f"run {view.run} trains no model: its task is {spec.task}",
                        hint="`swarmchain run list` shows the tasks")
    if not view.finalized_round:
        raise SpecError(f"run {view.run} has no checkpoint yet", hint="`swarmchain status` shows how far it is")
    return spec


def plan_evaluation(
    trained: TrainedSpec, view: RunView, *, name: str, sites_to_start: int = 0, cells_min: int | None = None,
    donors_min: int | None = None, right_share_min: float | None = None,
) -> EvaluationSpec:
    """An evaluation of the checkpoint that a training run has now.

    Parameters
    ----------
    sites_to_start
        Sites that the first round waits for; 0 for all that joined the training run.
    cells_min, donors_min, right_share_min
        See `EvaluationSpec`; for a model of donors the first two are `SAMPLES_MIN` unless they are named.
    """
    if isinstance(trained, DonorSpec):
        cells_min, donors_min = cells_min or SAMPLES_MIN, SAMPLES_MIN if donors_min is None else donors_min
    chosen = {"cells_min": cells_min, "donors_min": donors_min, "right_share_min": right_share_min}
    return EvaluationSpec.model_validate({
        "name": name, "trained": RunRef(run=view.run, spec=view.spec, checkpoint=view.checkpoint),
        "labels": trained.labels,
        "limits": Limits(rounds=5, one_checkpoint=True, sites_to_start=sites_to_start or len(view.joined)),
        **{key: value for key, value in chosen.items() if value is not None},
    })


def read_evaluation(store: Store, view: RunView, *, of: RunView) -> tuple[EvaluationSpec, Arrays]:
    """Spec and sums of a finished evaluation of the model of another run.

    Raises
    ------
    SpecError
        If the run is no evaluation, has no checkpoint yet, or evaluated another model.
    """
    spec = read_spec(store, view.spec)
    if not isinstance(spec, EvaluationSpec):
        raise SpecError(f"run {view.run} is no evaluation", hint="`swarmchain run list` shows the tasks")
    if not view.finalized_round:
        raise SpecError(f"evaluation {view.run} has no checkpoint yet", hint="wait until its agents are done")
    named = spec.trained
    if (named.run, named.spec, named.checkpoint) != (of.run, of.spec, of.checkpoint):
        raise SpecError(
            f"evaluation {view.run} is of run {named.run}, checkpoint {named.checkpoint[:12]}…, not of run {of.run}, "
            f"checkpoint {of.checkpoint[:12]}…", hint="`swarmchain run new evaluation` plans one of the right model")
    return spec, read_checkpoint(store, view.checkpoint, spec)

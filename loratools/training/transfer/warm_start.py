"""The stage before training that a warm start adds: the adapter carried over by weights, at the rank of the new one."""

from __future__ import annotations

from typing import Any, Final

from loratools.errors import AdapterError, UnchangedError
from loratools.files import load, save
from loratools.ops.measuring import relative_error
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.training.carry import carry
from loratools.training.seeds import order
from loratools.training.transfer.fit import labelled
from loratools.training.transfer.job import START, Job

_TEXTS: Final = 128  # rows whose activations are compared, at most


def warm_start(job: Job) -> dict[str, Any]:
    """Carry the adapter over, by the bases or by what both make of labelled rows, squeeze it, and save it."""
    options, models = job.options, job.models
    assert options.warm_start is not None
    texts = []
    if options.warm_start == "activations":
        rows = labelled(job)
        texts = [rows[i]["prompt"] + rows[i]["answer"] for i in sorted(order(len(rows), options.seed)[:_TEXTS])]
    models.drop()  # both bases are read here, without the adapter

    def steps(total: int, what: str) -> Any:
        step = job.meter(total, what)
        return lambda: step(0)

    with load(models.adapter) as adapter:
        try:
            made, report = carry(
                adapter,
                models.places["source"],
                models.places["target"],
                align=options.warm_start,
                texts=texts,
                device=options.device,
                allow_download=models.allow_download,
                steps=steps,
            )
        except UnchangedError as error:
            raise AdapterError(f"no warm start: {error}; go on with --resume and without --warm-start") from error
        small, _ = squeeze(made, options.adapter.rank, options=Squeeze(allow_unchanged=True))
        save(small, job.files.folder / START, force=True)
    with load(job.files.folder / START) as saved:
        lost = relative_error(made, saved)
    return {
        "targets": len(report.targets),
        "dropped": len(report.dropped),
        "squeezed": lost,
        "warnings": [f"warm start: {warning}" for warning in report.warnings],
    }

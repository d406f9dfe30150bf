"""`loratools neurons`."""

from __future__ import annotations

from loratools_cli import options


def neurons(
    path: options.AdapterPath,
    stats: options.ActivationsPath = None,
    activation: options.Activation = None,
    experts: options.MosaExperts = None,
    petl: options.Petl = None,
    everything: options.Everything = False,
    as_json: options.Json = False,
) -> None:
    """Look at the hidden units of nonlinear bottlenecks.

    AdapterTune, AdaptFormer, Houlsby's and Pfeiffer's adapters of AdapterHub, and MoSA's add
    scale * up(act(down h)) to the residual stream, which is no update of a weight. Shown are their
    units, those that prune-neurons removes exactly, and the singular values of the mean Jacobian
    scale * up diag(E act'(z)) down: over --stats, or else for a standard normal z.

    Example: loratools neurons best.pt --stats activations.safetensors
    """
    import loratools
    from loratools_cli.opening import open_adapter
    from loratools_cli.output import Output

    shown = Output(as_json=as_json, everything=everything)
    adapter = open_adapter(path, petl=petl, weights=False)
    found = None if stats is None else loratools.load_activations(stats)
    shown.show(loratools.neurons(adapter, activations=found, activation=activation, experts=experts))

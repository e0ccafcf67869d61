"""The pages on which experiment trackers show a run."""

import sys
from collections.abc import Callable


def run_pages() -> dict[str, str]:
    """The addresses of the pages that show the runs of this process, by the tracker's name; {} without a tracker.

    A run that a tracker keeps on this machine has no page. Asked while the run goes on: at its end a tracker forgets
    it.
    """
    # Whoever tracks a run has imported the tracker; the others need not be installed.
    urls: dict[str, tuple[str, Callable[[], str | None]]] = {
        "Weights & Biases": ("wandb", _wandb),
        "Trackio": ("trackio", _trackio),
        "Comet": ("comet_ml", _comet),
    }
    pages = {name: url() for name, (module, url) in urls.items() if module in sys.modules}
    return {name: url for name, url in pages.items() if url}


def _wandb() -> str | None:
    run = sys.modules["wandb"].run
    return None if run is None else run.url


def _trackio() -> str | None:
    variables = sys.modules["trackio"].context_vars
    run, space = variables.current_run.get(), variables.current_space_id.get()
    if run is None or not space:
        return None
    return f"https://{space.replace('/', '-')}.hf.space?project={run.project}&runs={run.name}&sidebar=collapsed"


def _comet() -> str | None:
    experiment = sys.modules["comet_ml"].get_running_experiment()
    return None if experiment is None else experiment.url

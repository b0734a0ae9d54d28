"""Where else the metrics of a run go: TensorBoard, Weights & Biases, MLflow.

metrics.jsonl holds everything; a tracker is a view of it. So none is a reason to stop a run: one that raises is
switched off, with one warning.
"""

import importlib
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alpaca_ray.config import UserError

log = logging.getLogger("alpaca_ray")

PROJECT = "alpaca-ray"
PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
HIDDEN = "(hidden)"
MLFLOW_MAX_CHARACTERS = 500  # of a parameter; the oldest limit of its servers

_SECRET_NAME = re.compile(r"(^|_)(key|secret|password|passwd|token|credentials?)$", re.IGNORECASE)
_SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])[^=&\s]+=[^&\s]+")

Values = Mapping[str, float]
Config = Mapping[str, Any]


class Tracker(Protocol):
    """One place that metrics go to."""

    def log(self, step: int, values: Values) -> None:
        """Take the finite values of a step."""
        ...

    def close(self) -> None:
        """Have everything written."""
        ...


class TensorBoard:
    """Event files in the directory; `tensorboard --logdir` shows them."""

    def __init__(self, run_name: str, config: Config, directory: Path) -> None:
        self._make = importlib.import_module("tensorboardX").SummaryWriter
        self._directory = directory
        # indented: its Markdown leaves the lines as they are
        self._config = "\n".join(f"    {name}: {value}" for name, value in flat(config))
        self._writer: Any = None

    def log(self, step: int, values: Values) -> None:
        """See Tracker. What an earlier try logged from the first step of this one on is not shown."""
        if self._writer is None:
            self._writer = self._make(str(self._directory), purge_step=step)
            self._writer.add_text("config", self._config, step)
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """See Tracker."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of its own name; a resumed one goes on in it. Who is asked, and with which key, is in its environment."""

    def __init__(self, run_name: str, config: Config, directory: Path) -> None:
        identifier = re.sub(r"[^\w-]", "-", run_name)  # it allows no / \ # ? % :
        self._run = importlib.import_module("wandb").init(
            project=PROJECT, name=run_name, id=identifier, resume="allow", config=dict(config), dir=str(directory)
        )

    def log(self, step: int, values: Values) -> None:
        """See Tracker. A step that an earlier try has logged already is left out there."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


class MLflow:
    """A run on the server that MLFLOW_TRACKING_URI names; each try of ours is one of its own."""

    def __init__(self, run_name: str, config: Config, directory: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        self._run = self._mlflow.start_run(run_name=run_name)
        self._mlflow.log_params({name: str(value)[:MLFLOW_MAX_CHARACTERS] for name, value in flat(config)})

    def log(self, step: int, values: Values) -> None:
        """See Tracker. Sent by a thread: a server that does not answer must not hold up the steps."""
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._run.info.run_id, synchronous=False)

    def close(self) -> None:
        """See Tracker."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


Maker = Callable[[str, Config, Path], Tracker]
MAKERS: Mapping[str, Maker] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


class Trackers:
    """Those that were asked for and still work. `makers` are a seam for tests."""

    def __init__(self, working: dict[str, Tracker]) -> None:
        self._working = working

    @classmethod
    def start(
        cls,
        names: Sequence[str],
        run_name: str,
        config: Config,
        directory: Path,
        makers: Mapping[str, Maker] = MAKERS,
    ) -> "Trackers":
        """Start each. Files go to `directory`, a local one. What looks like a secret in `config` is hidden.

        Raises UserError for a package that is missing.
        """
        check(names)
        directory.mkdir(parents=True, exist_ok=True)
        started = cls({})
        for name in dict.fromkeys(names):
            started._try(name, started._start, name, makers[name], run_name, hide(config), directory)
        return started

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Hand a step's metrics to each; None and what is not finite is left out."""
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for name, tracker in list(self._working.items()):
            self._try(name, tracker.log, step, finite)

    def close(self) -> None:
        """End each; then none is left."""
        for name, tracker in list(self._working.items()):
            self._try(name, tracker.close)
        self._working.clear()

    def _start(self, name: str, maker: Maker, *run: Any) -> None:
        self._working[name] = maker(*run)

    def _try(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # any: their errors share no class, and none of them may end a run of days
            self._working.pop(name, None)
            log.warning("%s is switched off: %s: %s", name, type(error).__name__, hide(str(error)))


def check(names: Sequence[str], packages: Mapping[str, str] = PACKAGES) -> None:
    """Raises UserError that names the first package that is missing. Imports none."""
    for name in names:
        package = packages[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.trackers names {name}, but the package {package} is not installed here: "
                f"`pip install {package}`, or take {name} out of train.trackers"
            )


def hide(value: Any) -> Any:
    """The same with passwords, keys and the credentials in addresses hidden."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if _SECRET_NAME.search(str(k)) and v else hide(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item) for item in value]
    return _SECRET_IN_ADDRESS.sub(HIDDEN, value) if isinstance(value, str) else value


def flat(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value)."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

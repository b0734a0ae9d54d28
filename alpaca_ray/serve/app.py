"""[RAY SERVE] One application: an HTTP ingress that only waits, and engine replicas that hold the model.

No `from __future__ import annotations` here: Serve validates the args of `build` only where it finds a real class.
"""

import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from alpaca_ray import models
from alpaca_ray.config import Placement, ServeArgs, WatermarkConfig
from alpaca_ray.safety.detection import Detection
from alpaca_ray.safety.moderation import moderator
from alpaca_ray.safety.watermark_key import read_key
from alpaca_ray.serve import access_log
from alpaca_ray.serve.admission import Admission
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.keys import load_keys
from alpaca_ray.serve.moderated import ModeratedModel
from alpaca_ray.serve.monitor import Monitor
from alpaca_ray.serve.resume import Resuming
from alpaca_ray.serve.text import TextDelta, TextRequest, TokenizedModel

ROOM_FOR_PROBES = 100  # requests that need no place in the queue, beside those that do
MAX_ATTEMPTS = 4  # of a completion whose replicas die


def build(args: ServeArgs) -> serve.Application:
    """The `import_path` of serve_config.yaml. Raises UserError for a model, or a file of keys, that is none."""
    if "://" not in args.model:
        # A URI is fetched where the engine runs: here it might fill the disk of a head node.
        models.check(args.model)
    load_keys(args.admission, os.environ)
    engine = serve.deployment(
        num_replicas=args.num_replicas,
        ray_actor_options=actor_options(args.placement),
        # The engine has a queue of its own: with fewer a row would stand empty until the next request is there.
        max_ongoing_requests=2 * args.max_batch_size,
        # A new replica is there before an old one goes, and an old one ends what it has begun.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.admission.request_timeout_s,
    )(EngineReplica)
    # The ingress only waits, so it reserves no CPU. It refuses by itself what is too much, so Serve must not queue.
    ingress = serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=max_in_flight(args) + args.admission.max_waiting + ROOM_FOR_PROBES,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.admission.request_timeout_s,
    )(serve.ingress()(Ingress))
    return ingress.bind(engine.bind(args), args)


def max_in_flight(args: ServeArgs) -> int:
    """Requests that compute at once, at most."""
    return args.admission.max_in_flight or args.num_replicas * 2 * args.max_batch_size


def served_name(args: ServeArgs) -> str:
    """The id that clients use: `model_name`, or the last part of `model`."""
    return args.model_name or args.model.rstrip("/").replace(":", "/").rpartition("/")[2]


def actor_options(placement: Placement) -> dict[str, Any]:
    """What an engine replica asks Ray for."""
    options: dict[str, Any] = {
        "num_cpus": placement.num_cpus,
        "num_gpus": placement.num_gpus,
        # OpenMP's threads spin while they wait for each other, by default. Beside other busy processes that cost 90 %
        # of the tokens per second (2 cores, 16 streams). It has to stand in the environment before torch is loaded.
        "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
    }
    return options | ({"label_selector": placement.label_selector} if placement.label_selector else {})


class EngineReplica:
    """A TextModel in an actor of its own, with the weights and the watermark. Without its key it does not start."""

    def __init__(self, args: ServeArgs) -> None:
        from alpaca_ray.safety.watermark import Watermark, vocab_size  # torch: only where the engine runs
        from alpaca_ray.serve.torch_engine import load_engine

        config, self._tokenizer = args.watermark, models.load_tokenizer(args.model)
        self._watermark = (
            Watermark(
                watermark_key(config),
                config.gamma,
                config.delta,
                vocab_size=vocab_size(args.model),
                allow_public_key=config.allow_public_key,
            )
            if config.enabled
            else None
        )
        engine = load_engine(args, marks=self._watermark.bias if self._watermark else None)
        self._model = TokenizedModel(engine, self._tokenizer, args.prompt_format)

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`."""
        async with aclosing(self._model.complete(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def detect(self, text: str | tuple[int, ...]) -> Detection:
        """Judge a text, or token ids. Raises UserError for ids that are none, EngineError where nothing is marked."""
        if self._watermark is None:
            raise EngineError("this server marks nothing, so it can detect nothing")
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
        return self._watermark.detect(ids)

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._model.health()

    async def check_health(self) -> None:
        """Serve calls it and replaces the replica if it raises."""
        await self._model.health()


def watermark_key(config: WatermarkConfig) -> int:
    """Raises UserError if there is none, or one that others know."""
    key_file = Path(config.key_file) if config.key_file else None
    return read_key(config.key_env, key_file, config.allow_public_key).get_secret_value()


class RemoteModel:
    """A TextModel behind a handle; errors come back as what they were in the replica."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`."""
        remote: Any = self._handle.options(stream=True).complete
        deltas: DeploymentResponseGenerator[TextDelta] = remote.remote(request)
        try:
            async for delta in deltas:
                yield delta
        except RayError as error:
            raise original(error) from error
        finally:
            deltas.cancel()  # type: ignore[no-untyped-call]  # Ray's; nothing happens where it is done

    async def health(self) -> Health:
        """See `TextModel`."""
        try:
            state: Health = await self._handle.health.remote()
        except RayError as error:
            raise original(error) from error
        return state

    async def detect(self, text: str | tuple[int, ...]) -> Detection:
        """See `EngineReplica`."""
        try:
            found: Detection = await self._handle.detect.remote(text)
        except RayError as error:
            raise original(error) from error
        return found


def original(error: RayError) -> Exception:
    """The replica's own exception out of Ray's wrapping; EngineError where the replica itself was lost."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return EngineError(f"no engine replica answered ({type(error).__name__}): try again")


class Ingress:
    """The HTTP side: who may ask, what may be said, and what goes on when a replica dies. It imports no torch."""

    def __init__(self, engine: DeploymentHandle[Any], args: ServeArgs) -> None:
        access_log.start(sys.stdout)
        remote, monitor = RemoteModel(engine), Monitor()
        judged = ModeratedModel(
            Resuming(lambda: remote, MAX_ATTEMPTS), moderator(args.moderation), record=monitor.verdict
        )
        api = create_api(judged, served_name(args), detector=remote.detect if args.watermark.enabled else None)
        self._app = Admission(
            api,
            load_keys(args.admission, os.environ),
            args.admission,
            max_in_flight=max_in_flight(args),
            max_length=args.max_length,
            adds_request_id=False,  # Serve's proxy does
            record=monitor.access,
        )

    def __serve_build_asgi_app__(self) -> Admission:
        """Serve asks for the application after the constructor, when the handle is known."""
        return self._app

"""[RAY SERVE] One application: an HTTP ingress that only waits, and engine replicas that hold the model.

No `from __future__ import annotations` here: Serve validates the args of `build` only where it finds a real class.
"""

import asyncio
import importlib.util
import os
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from alpaca_ray import models
from alpaca_ray.config import Placement, ServeArgs, UserError, WatermarkConfig
from alpaca_ray.safety.detection import Detection
from alpaca_ray.safety.moderation import moderator
from alpaca_ray.safety.watermark_key import read_key
from alpaca_ray.serve import access_log
from alpaca_ray.serve.admission import Admission
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.coalesce import coalesced
from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.engine_metrics import MeteredEngine
from alpaca_ray.serve.keys import load_keys
from alpaca_ray.serve.listening import refuse_exposure
from alpaca_ray.serve.moderated import ModeratedModel
from alpaca_ray.serve.monitor import Monitor
from alpaca_ray.serve.resume import Resuming, retried
from alpaca_ray.serve.text import TextDelta, TextRequest, TokenizedModel

if TYPE_CHECKING:
    from alpaca_ray.safety.watermark import Watermark
    from alpaca_ray.serve.torch_engine import TorchEngine
    from alpaca_ray.serve.vllm_engine import VllmEngine

ROOM_FOR_PROBES = 100  # requests that need no place in the queue, beside those that do
MAX_ATTEMPTS = 8  # of a request whose replicas die: a long stream outlives several, one that kills them all ends
READY_TIMEOUT_S = 5.0  # no replica answers for so long: not ready
# Serve sees that a replica has died when it asks next; at its default of 10 s all would wait for the new one so long.
HEALTH_CHECK_PERIOD_S = 1.0
# How often OpenMP's threads look for work before they sleep, about 0.1 ms: the next operation finds them awake. Its
# default is 3 ms, with which two busy processes beside it make a step three times as long; without any, a step is 10 to
# 40 % longer on quiet cores. It has to stand in the environment before torch is loaded.
OPENMP = {"GOMP_SPINCOUNT": "10000"}


def build(args: ServeArgs) -> serve.Application:
    """The `import_path` of serve_config.yaml. Raises UserError for a model, or a file of keys, that is none."""
    if "://" not in args.model:
        # A URI is fetched where the engine runs: here it might fill the disk of a head node.
        models.check(args.model)
    load_keys(args.admission, os.environ)
    engine = serve.deployment(
        **how_many(args),
        ray_actor_options=actor_options(args.placement),
        # The engine has a queue of its own: with fewer a row would stand empty until the next request is there.
        max_ongoing_requests=2 * args.max_batch_size,
        # A new replica is there before an old one goes, and an old one ends what it has begun.
        max_surge_percent=100,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=args.admission.request_timeout_s,
    )(EngineReplica)
    # The ingress only waits, so it reserves no CPU. It refuses by itself what is too much, so Serve must not queue.
    ingress = serve.deployment(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=max_in_flight(args) + args.admission.max_waiting + ROOM_FOR_PROBES,
        max_surge_percent=100,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=args.admission.request_timeout_s,
    )(serve.ingress()(Ingress))
    return ingress.bind(engine.bind(args), args)


def how_many(args: ServeArgs) -> dict[str, Any]:
    """Engine replicas, as Serve's options say it."""
    if args.autoscaling is None:
        return {"num_replicas": args.num_replicas}
    # Some of Serve's fields take no None.
    given = args.autoscaling.model_dump(exclude_none=True)
    return {"autoscaling_config": {"target_ongoing_requests": args.max_batch_size} | given}


def max_in_flight(args: ServeArgs) -> int:
    """Requests that compute at once, at most."""
    return args.admission.max_in_flight or args.max_replicas * 2 * args.max_batch_size


def served_name(args: ServeArgs) -> str:
    """The id that clients use: `model_name`, or the last part of `model`."""
    return args.model_name or args.model.rstrip("/").replace(":", "/").rpartition("/")[2]


def actor_options(placement: Placement) -> dict[str, Any]:
    """What an engine replica asks Ray for."""
    options: dict[str, Any] = {
        "num_cpus": placement.num_cpus,
        "num_gpus": placement.num_gpus,
        "runtime_env": {"env_vars": OPENMP},
    }
    return options | ({"label_selector": placement.label_selector} if placement.label_selector else {})


class EngineReplica:
    """A TextModel in an actor of its own, with the weights and the watermark. Without its key it does not start."""

    def __init__(self, args: ServeArgs) -> None:
        config = args.watermark
        key = watermark_key(config) if config.enabled else 0  # what is missing is said before anything is loaded

        from alpaca_ray.safety.watermark import Watermark, vocab_size  # torch: only where the engine runs

        self._weights, self._tokenizer = args.model, models.load_tokenizer(args.model)
        self._watermark = (
            Watermark(
                key,
                config.gamma,
                config.delta,
                vocab_size=vocab_size(args.model),
                allow_public_key=config.allow_public_key,
            )
            if config.enabled
            else None
        )
        engine = engine_for(args, self._watermark)
        metered = MeteredEngine(engine, engine.stats, is_marked=config.enabled)
        self._model = TokenizedModel(metered, self._tokenizer, args.prompt_format)
        self._reporting = asyncio.get_running_loop().create_task(metered.report())  # the loop forgets it otherwise

    async def complete(self, request: TextRequest, weights: str | None = None) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`. `weights`: which a request that is begun was begun with; EngineError if they are others."""
        if request.emitted and weights not in (None, self._weights):
            raise EngineError("the model was exchanged, and this text was begun by the one before it")
        async with aclosing(coalesced(self._model.complete(request))) as deltas:
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


def engine_for(args: ServeArgs, watermark: "Watermark | None") -> "TorchEngine | VllmEngine":
    """vLLM marks in a process of its own, which reads the key again. Raises UserError where vLLM is not installed."""
    if args.engine == "torch":
        from alpaca_ray.serve import torch_engine

        if watermark is not None:  # beside the loading of the weights: else the first answers would be slower by it
            threading.Thread(target=watermark.warm, name="watermark-lists", daemon=True).start()
        return torch_engine.load_engine(args, marks=watermark.bias if watermark else None)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("engine: vllm needs vLLM on the nodes of the engine: pip install 'alpaca-ray[vllm]' there")
    from alpaca_ray.serve import vllm_engine

    return vllm_engine.load_engine(args)


def watermark_key(config: WatermarkConfig) -> int:
    """Raises UserError if there is none, or one that others know."""
    key_file = Path(config.key_file) if config.key_file else None
    return read_key(config.key_env, key_file, config.allow_public_key).get_secret_value()


class RemoteModel:
    """A TextModel behind a handle; errors come back as what they were in the replica."""

    def __init__(self, handle: DeploymentHandle[Any], args: ServeArgs) -> None:
        self._handle, self._weights = handle, args.model
        self._may_sleep = args.autoscaling is not None and args.autoscaling.min_replicas == 0

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`. Waits for a replica where there is none."""
        remote: Any = self._handle.options(stream=True).complete
        deltas: DeploymentResponseGenerator[TextDelta] = remote.remote(request, self._weights)
        try:
            async for delta in deltas:
                yield delta
        except RayError as error:
            raise original(error) from error
        finally:
            deltas.cancel()  # type: ignore[no-untyped-call]  # Ray's; nothing happens where it is done

    async def health(self) -> Health:
        """See `TextModel`. A probe wakes nobody: where there is no replica, and need be none, it says so."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                if self._may_sleep and not await asyncio.to_thread(num_running, EngineReplica.__name__):
                    return Health(num_running=0, num_waiting=0, is_asleep=True)
                state: Health = await retried(lambda: self._ask(self._handle.health), MAX_ATTEMPTS)
        except TimeoutError:
            raise EngineError(f"no engine replica answered in {READY_TIMEOUT_S:.0f} s: try again") from None
        return state

    async def detect(self, text: str | tuple[int, ...]) -> Detection:
        """See `EngineReplica`. Waits for a replica where there is none."""
        found: Detection = await retried(lambda: self._ask(self._handle.detect, text), MAX_ATTEMPTS)
        return found

    async def _ask(self, method: Any, *args: Any) -> Any:
        response = method.remote(*args)
        try:
            return await response
        except RayError as error:
            raise original(error) from error
        finally:
            response.cancel()  # nothing happens where it is done


def num_running(deployment: str) -> int:
    """Replicas of a deployment of this application that Serve counts as running; asked of its controller."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    states = application.deployments[deployment].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


def original(error: RayError) -> Exception:
    """The replica's own exception out of Ray's wrapping; EngineError where the replica itself was lost."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return EngineError(f"no engine replica answered ({type(error).__name__}): try again")


class Ingress:
    """The HTTP side: who may ask, what may be said, and what goes on when a replica dies. It imports no torch."""

    def __init__(self, engine: DeploymentHandle[Any], args: ServeArgs) -> None:
        access_log.start(sys.stdout)
        keys = load_keys(args.admission, os.environ)
        refuse_exposure(has_keys=keys.given)
        remote, monitor = RemoteModel(engine, args), Monitor()
        resuming = Resuming(lambda: remote, MAX_ATTEMPTS, record=monitor.resumed)
        judges = moderator(args.moderation)
        judged = ModeratedModel(resuming, judges, record=monitor.verdict)
        api = create_api(judged, served_name(args), detector=remote.detect if args.watermark.enabled else None)
        self._app = Admission(
            api,
            keys,
            args.admission,
            max_in_flight=max_in_flight(args),
            max_length=args.max_length,
            adds_request_id=False,  # Serve's proxy does
            record=monitor.access,
        )
        self._reporting = asyncio.get_running_loop().create_task(monitor.report(self._app.stats, judges.stats))

    def __serve_build_asgi_app__(self) -> Admission:
        """Serve asks for the application after the constructor, when the handle is known."""
        return self._app

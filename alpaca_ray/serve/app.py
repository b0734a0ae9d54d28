"""[RAY SERVE] One application: an HTTP ingress that only waits, and engine replicas that hold the model.

No `from __future__ import annotations` here: Serve validates the args of `build` only where it finds a real class.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from alpaca_ray import models
from alpaca_ray.config import Placement, ServeArgs
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.text import TextDelta, TextRequest, TokenizedModel

MAX_OPEN_REQUESTS = 1000  # of one ingress replica; each costs a coroutine


def build(args: ServeArgs) -> serve.Application:
    """The `import_path` of serve_config.yaml. Raises UserError if `args.model` leads to no model."""
    if "://" not in args.model:
        # A URI is fetched where the engine runs: here it might fill the disk of a head node.
        models.check(args.model)
    engine = serve.deployment(
        num_replicas=args.num_replicas,
        ray_actor_options=actor_options(args.placement),
        # One batch runs while the next one gathers: with fewer the engine would idle between them.
        max_ongoing_requests=2 * args.max_batch_size,
    )(EngineReplica)
    # The ingress only waits, so it reserves no CPU.
    ingress = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_OPEN_REQUESTS)(
        serve.ingress()(Ingress)
    )
    return ingress.bind(engine.bind(args), served_name(args))


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
    """A TextModel in an actor of its own, with the weights."""

    def __init__(self, args: ServeArgs) -> None:
        from alpaca_ray.serve.torch_engine import load_engine  # torch: only where the engine runs

        self._model = TokenizedModel(load_engine(args), models.load_tokenizer(args.model), args.prompt_format)

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`."""
        async with aclosing(self._model.complete(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._model.health()

    async def check_health(self) -> None:
        """Serve calls it and replaces the replica if it raises."""
        await self._model.health()


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


def original(error: RayError) -> Exception:
    """The replica's own exception out of Ray's wrapping; EngineError where the replica itself was lost."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return EngineError(f"no engine replica answered ({type(error).__name__}): try again")


class Ingress:
    """The HTTP side. It imports neither torch nor transformers."""

    def __init__(self, engine: DeploymentHandle[Any], model_name: str) -> None:
        self._api = create_api(RemoteModel(engine), model_name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the application after the constructor, when the handle is known."""
        return self._api

"""[RAY SERVE] The served application with its layers switched, for benchmarks/serve.py.

`serve` is the engine behind Ray Serve and the API; each further name has one layer more; `admission` is the
application itself, as alpaca_ray.serve.app builds it; `float16` and `int8` are that with weights of 16 and 8 bits.
Where the CPU computes in bfloat16, all of it in that stands for `float16`.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from alpaca_ray.config import AdmissionConfig, Quantization, ServeArgs, WatermarkConfig
from alpaca_ray.safety.moderation import moderator
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.app import EngineReplica, RemoteModel, actor_options, build, served_name
from alpaca_ray.serve.keys import make_key
from alpaca_ray.serve.linear import has_bfloat16
from alpaca_ray.serve.moderated import ModeratedModel
from alpaca_ray.serve.resume import Resuming
from benchmarks.serve_sides import ENGINE_ARGS, WATERMARK_KEY, HttpSide, Sides, free_port

Layer = Literal["serve", "watermark", "moderation", "admission", "bfloat16", "float16", "int8"]
LAYERS: tuple[Layer, ...] = ("serve", "watermark", "moderation", "admission")
SMALLER: tuple[Layer, ...] = ("bfloat16" if has_bfloat16() else "float16", "int8")
MAX_ONGOING = 200


class Ingress:
    """The application's ingress without admission, and without moderation below `moderation`."""

    def __init__(self, engine: DeploymentHandle[Any], args: ServeArgs, layer: Layer) -> None:
        remote = RemoteModel(engine, args)
        resuming = Resuming(lambda: remote, 4)
        model = ModeratedModel(resuming, moderator(args.moderation)) if layer == "moderation" else resuming
        self._app = create_api(model, served_name(args))

    def __serve_build_asgi_app__(self) -> Any:
        """Serve asks for the application after the constructor, when the handle is known."""
        return self._app


def application(args: ServeArgs, layer: Layer) -> serve.Application:
    """The layers up to this one. Those between the first and the last share the last one's engine replica."""
    if layer in ("admission", *SMALLER):
        return build(args)
    engine = serve.deployment(ray_actor_options=actor_options(args.placement), max_ongoing_requests=MAX_ONGOING)
    ingress = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING)
    is_first = layer == "serve"
    below = engine(EngineReplica).bind(args) if is_first else serve.get_deployment_handle("EngineReplica", "admission")
    return ingress(serve.ingress()(Ingress)).bind(below, args, layer)


@contextmanager
def served(model: str, sides: Sides) -> Iterator[Callable[[Sequence[Layer]], None]]:
    """One Ray cluster, and what starts layers in it. Those above `serve` need `admission` to be there."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ars", dir="/tmp") as temp:
        # Ray's workers are nice by 15 unless told; the other sides are not.
        ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
                 _temp_dir=f"{temp}/r", _system_config={"worker_niceness": 0})  # fmt: skip
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            key = _secrets(Path(temp))

            def begin(layers: Sequence[Layer]) -> None:
                for layer in layers:
                    sides.add(layer, partial(_side, model, layer, port, Path(temp), key))

            yield begin
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's
            ray.shutdown()


def end(sides: Sides, layers: Sequence[Layer]) -> None:
    """Take them out of the cluster: an application that nobody asks still takes time from those that are asked."""
    for layer in layers:
        sides.end(layer)
        serve.delete(layer)


def _secrets(directory: Path) -> str:
    """Write the watermark's key and an API key; returns the latter."""
    (directory / "watermark_key").write_text(str(WATERMARK_KEY))
    key = make_key("benchmark", ["generate"])
    (directory / "keys.jsonl").write_text(key.line + "\n")
    (directory / "keys.jsonl").chmod(0o600)
    return key.secret


def _side(model: str, layer: Layer, port: int, directory: Path, key: str) -> HttpSide:
    given: dict[Layer, Quantization] = {"float16": "float16", "int8": "int8"}
    dtype = {"dtype": "bfloat16"} if layer == "bfloat16" else {}
    args = ServeArgs(
        model=model,
        **(ENGINE_ARGS | dtype),
        quantization=given.get(layer),
        watermark=WatermarkConfig(enabled=layer != "serve", key_file=str(directory / "watermark_key")),
        admission=AdmissionConfig(key_file=str(directory / "keys.jsonl")),
    )
    serve.run(application(args, layer), name=layer, route_prefix=f"/{layer}")
    return HttpSide(layer, f"http://127.0.0.1:{port}/{layer}", served_name(args), key=key)

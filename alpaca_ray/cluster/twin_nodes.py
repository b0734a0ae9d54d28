"""[RAY] The twin's fake nodes, each with a directory of its own for the packages of jobs."""

import uuid
from typing import Any
from unittest import mock

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class TwinNodeProvider(FakeMultiNodeProvider):
    """Ray's fake nodes, which the autoscaler of the head starts and ends.

    Ray's own share the head's directory of packages, and every node that meets a package first deletes what is there
    and unpacks it again (ray/_private/runtime_env/working_dir.py, `overwrite=True`): workers of another node then
    miss their modules.
    """

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        with self.lock:  # as Ray holds it below: nobody else makes a node meanwhile
            name = f"{ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME}_{uuid.uuid4().hex}"
            with mock.patch.object(ray_constants, "DEFAULT_RUNTIME_ENV_DIR_NAME", name):
                super()._create_node_with_resources_and_labels(*args)  # type: ignore[no-untyped-call]  # Ray's

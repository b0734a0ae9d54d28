"""[RAY SERVE] Where Serve's HTTP proxies listen: only Serve knows, the application's args do not say it."""

from ray.serve.context import _get_global_client  # serve.status() tells where proxies run, not on which address

from alpaca_ray.config import UserError
from alpaca_ray.serve.exposure import check_exposure


def refuse_exposure(has_keys: bool) -> None:
    """For a replica's constructor: what it raises, Serve's status shows.

    Raises UserError where other machines can reach the proxies and there are no API keys.
    """
    client = _get_global_client()
    assert client is not None  # it raises where there is none
    options = client.http_config
    if options.host is None:
        return  # Serve starts no proxy
    location = "EveryNode" if options.location is None else options.location.value
    problem = check_exposure(options.host, location, has_keys)
    if problem is not None:
        raise UserError(problem)

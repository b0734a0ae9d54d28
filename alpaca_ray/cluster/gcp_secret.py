"""Print a secret of Google's Secret Manager: `python -m alpaca_ray.cluster.gcp_secret alpaca-ray-openai`.

For start commands inside the image, which has no gcloud. The machine's service account needs the role
roles/secretmanager.secretAccessor, and the scope cloud-platform.
"""

import base64
import json
import sys
import urllib.error
import urllib.request

from alpaca_ray.config import UserError

METADATA = "http://metadata.google.internal/computeMetadata/v1"
SECRETS = "https://secretmanager.googleapis.com/v1"
TIMEOUT_S = 10.0


def read_secret(name: str, metadata: str = METADATA, secrets: str = SECRETS) -> str:
    """The latest version of the secret in this machine's project.

    Raises UserError where the machine is none of Google's, or may not read it.
    """
    here = {"Metadata-Flavor": "Google"}
    project = _get(f"{metadata}/project/project-id", here)
    token = json.loads(_get(f"{metadata}/instance/service-accounts/default/token", here))["access_token"]
    url = f"{secrets}/projects/{project}/secrets/{name}/versions/latest:access"
    payload = json.loads(_get(url, {"Authorization": f"Bearer {token}"}))["payload"]["data"]
    return base64.b64decode(payload).decode()


def _get(url: str, headers: dict[str, str]) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url} answers {error.code}: 403 asks for roles/secretmanager.secretAccessor on the machine's service "
            "account, 404 for the secret itself (gcloud secrets list)"
        ) from None
    except OSError as error:
        raise UserError(f"{url} cannot be reached ({error}): this works on machines of Google's cloud only") from None


if __name__ == "__main__":
    try:
        print(read_secret(*sys.argv[1:2]), end="")
    except UserError as problem:
        sys.exit(f"error: {problem}")

"""Mistakes put into the files that ship, one at a time: what each is, and what has to be said about it.

A seed replaces `right` by `wrong` at its first place after `after`. What is said must name `field`, hold `says` and
stand on the first line that differs, or on the first line after `after` that holds `on`.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    "cluster.yaml": ROOT / "cluster.yaml",
    "serve_config.yaml": ROOT / "serve_config.yaml",
    "alpaca_7b.yaml": ROOT / "alpaca_ray" / "recipes" / "alpaca_7b.yaml",
}
SHIPPED = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}


@dataclass(frozen=True)
class Seed:
    """One mistake."""

    kind: str  # typo, type, value, contradiction, safety
    file: str
    after: str
    right: str
    wrong: str
    field: str
    says: str
    on: str = ""
    found_in: str = ""  # of two files that contradict each other, the one that asks; "": the one with the mistake

    def __str__(self) -> str:
        return f"{self.file}:{self.field}:{self.wrong.strip()[:40]}"

    @property
    def text(self) -> str:
        """The file with the mistake."""
        head, tail = self._split()
        return head + tail.replace(self.right, self.wrong, 1)

    @property
    def line(self) -> int:
        """Where the mistake has to be reported."""
        head, tail = self._split()
        if self.found_in:
            return SHIPPED[self.found_in].partition(self.on)[0].count("\n") + 1
        if self.on:
            changed = tail.replace(self.right, self.wrong, 1)
            return head.count("\n") + changed[: changed.index(self.on)].count("\n") + 1
        old, new = SHIPPED[self.file].splitlines(), self.text.splitlines()
        return next(i for i, (a, b) in enumerate(zip(old, new, strict=False), 1) if a != b)

    def _split(self) -> tuple[str, str]:
        shipped = SHIPPED[self.file]
        place = shipped.index(self.after)
        assert self.right in shipped[place:], f"{self}: the shipped file has changed: mend this seed"
        return shipped[:place], shipped[place:]


def did(name: str) -> str:
    return f"did you mean {name!r}?"


def _cluster() -> list[Seed]:
    def seed(kind: str, after: str, right: str, wrong: str, field: str, says: str, on: str = "") -> Seed:
        return Seed(kind, "cluster.yaml", after, right, wrong, field, says, on)

    types = "available_node_types"
    head, generate, train, serve = (f"\n  {name}:\n" for name in ("head", "generate", "train", "serve"))
    start_head, start_worker = "head_start_ray_commands:", "worker_start_ray_commands:"
    key = "sk-proj-" + "a1B2c3D4e5F6g7H8i9J0"
    return [
        seed("typo", "", "\nmax_workers:", "\nmax_worker:", "max_worker", did("max_workers")),
        seed("typo", "", "cluster_name:", "clustername:", "clustername", did("cluster_name")),
        seed("typo", "", "idle_timeout_minutes", "idle_timeout_minute", "idle_timeout_minute", did("idle_timeout_minutes")),
        seed("typo", "", "upscaling_speed", "upscaling_sped", "upscaling_sped", did("upscaling_speed")),
        seed("typo", "", "head_node_type", "head_nodetype", "head_nodetype", did("head_node_type")),
        seed("typo", "", "\nsetup_commands", "\nsetup_command", "setup_command", did("setup_commands")),
        seed("typo", "", "file_mounts", "file_mount", "file_mount", did("file_mounts")),
        seed("typo", "", start_worker, "worker_start_commands:", "worker_start_commands", did("worker_start_ray_commands")),
        seed("typo", "", "\nhead_setup_commands", "\nhead_setup_command", "head_setup_command", did("head_setup_commands")),
        seed("typo", "provider:", "region:", "regoin:", "provider.regoin", did("region")),
        seed("typo", "provider:", "cache_stopped_nodes", "cache_stoped_nodes", "provider.cache_stoped_nodes", did("cache_stopped_nodes")),
        seed("typo", "auth:", "ssh_user", "sshuser", "auth.sshuser", did("ssh_user")),
        seed("typo", generate, "min_workers", "min_worker", f"{types}.generate.min_worker", did("min_workers")),
        seed("typo", train, "resources:", "resource:", f"{types}.train.resource", did("resources")),
        seed("typo", train, "labels:", "label:", f"{types}.train.label", did("labels")),
        seed("typo", train, "node_config:", "node_cfg:", f"{types}.train.node_cfg", did("node_config")),
        seed("typo", train, "alpaca-ray.io/group:", "alpaca-ray.io/groups:", f"{types}.train.labels.alpaca-ray.io/groups", "missing: alpaca-ray.io/group"),
        seed("typo", train, "group: train", "group: trian", f"{types}.train.labels.alpaca-ray.io/group", did("train")),
        seed("typo", train, "GPU:", "gpu:", f"{types}.train.resources.gpu", did("GPU")),
        seed("typo", serve, "CPU:", "CPUs:", f"{types}.serve.resources.CPUs", did("CPU")),
        seed("typo", train, "InstanceType", "InstancType", f"{types}.train.node_config.InstancType", did("InstanceType")),
        seed("typo", serve, "ImageId", "ImageID", f"{types}.serve.node_config.ImageID", did("ImageId")),
        seed("typo", train, "BlockDeviceMappings", "BlockDeviceMapping", f"{types}.train.node_config.BlockDeviceMapping", did("BlockDeviceMappings")),
        seed("typo", train, "DeviceName", "DevicName", f"{types}.train.node_config.BlockDeviceMappings.0.DevicName", did("DeviceName")),
        seed("typo", train, "VolumeSize", "VolumSize", f"{types}.train.node_config.BlockDeviceMappings.0.Ebs.VolumSize", did("VolumeSize")),
        seed("typo", generate, "{Name:", "{Nam:", f"{types}.generate.node_config.IamInstanceProfile.Nam", did("Name")),
        seed("typo", generate, "MarketType", "MarketTyp", f"{types}.generate.node_config.InstanceMarketOptions.MarketTyp", did("MarketType")),
        seed("typo", start_head, "--dashboard-host", "--dashbord-host", "head_start_ray_commands.1", did("--dashboard-host")),
        seed("typo", start_worker, "RAY_AUTH_MODE", "RAY_AUTH_MOD", "worker_start_ray_commands.1", did("RAY_AUTH_MODE")),
        seed("typo", start_worker, "OPENAI_API_KEY=", "OPENAI_API_KEI=", "worker_start_ray_commands.1", did("OPENAI_API_KEY")),
        seed("typo", start_head, "proxy_middlewares", "proxy_middleware", "head_start_ray_commands.1", "proxy_middlewares'?"),
        seed("value", "provider:", "type: aws", "type: awz", "provider.type", did("aws")),
        seed("value", "provider:", "us-west-2", "us-wset-2", "provider.region", did("us-west-2")),
        seed("value", train, "p4de.24xlarge", "p4de.24xlarg", f"{types}.train.node_config.InstanceType", did("p4de.24xlarge")),
        seed("value", train, "gp3", "gp33", f"{types}.train.node_config.BlockDeviceMappings.0.Ebs.VolumeType", did("gp3")),
        seed("value", generate, "MarketType: spot", "MarketType: sopt", f"{types}.generate.node_config.InstanceMarketOptions.MarketType", did("spot")),
        seed("value", "\nhead_node_type", "head_node_type: head", "head_node_type: haed", "head_node_type", did("head")),
        seed("value", start_worker, "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=tokn", "worker_start_ray_commands.1", did("token")),
        seed("value", generate, "group: generate", "group: generate!", f"{types}.generate.labels.alpaca-ray.io/group", "Invalid label"),
        seed("type", "", "\nmax_workers: 20", '\nmax_workers: "20"', "max_workers", "is no whole number"),
        seed("type", "", "idle_timeout_minutes: 5", "idle_timeout_minutes: five", "idle_timeout_minutes", "is no number"),
        seed("type", "provider:", "nodes: false", "nodes: never", "provider.cache_stopped_nodes", "is no boolean"),
        seed("type", train, "VolumeSize: 500", "VolumeSize: 500GB", f"{types}.train.node_config.BlockDeviceMappings.0.Ebs.VolumeSize", "is no whole number"),
        seed("type", train, "resources: {CPU: 96,", "resources: {CPU: many,", f"{types}.train.resources.CPU", "is no whole number"),
        seed("type", "", "\ninitialization_commands: []", "\ninitialization_commands: none", "initialization_commands", "is no list"),
        seed("type", serve, "InstanceType: g5.2xlarge", "InstanceType: [g5.2xlarge]", f"{types}.serve.node_config.InstanceType", "is no text"),
        seed("contradiction", "", "\nmax_workers: 20", "\nmax_workers: 3", f"{types}.generate.max_workers", "above max_workers of the whole cluster, 3", "    max_workers: 8"),
        seed("contradiction", generate, "min_workers: 0", "min_workers: 9", f"{types}.generate.min_workers", "above this type's max_workers, 8"),
        seed("contradiction", train, "CPU: 96", "CPU: 128", f"{types}.train.resources.CPU", "p4de.24xlarge has, 96"),
        seed("contradiction", train, ", GPU: 8", "", f"{types}.train.resources.GPU", "p4de.24xlarge has, 8"),
        Seed("contradiction", "cluster.yaml", train, "max_workers: 2", "max_workers: 0", "train.num_workers", "has room for 0", "num_workers: 8", "alpaca_7b.yaml"),
        seed("contradiction", serve, "group: serve", "group: train", f"{types}.serve.labels.alpaca-ray.io/group", "train has this label too"),
        seed("contradiction", "provider:", "region: us-west-2", "availability_zone: us-east-1a\n  region: us-west-2", "provider.availability_zone", "not in the region us-west-2"),
        seed("contradiction", "auth:", "ssh_user: ubuntu", "ssh_user: ubuntu\n  ssh_private_key: ~/.ssh/key.pem", f"{types}.head.node_config.KeyName", "names an ssh_private_key", "node_config:"),
        seed("contradiction", start_worker, "IP:6379", "IP:6380", "worker_start_ray_commands.1", "listens on port 6379"),
        seed("contradiction", "", "\nmax_workers: 20", "\nmax_workers: 20\nmax_workers: 30", "max_workers", "given twice"),
        seed("contradiction", start_head, "--autoscaling-config=~/ray_bootstrap_config.yaml ", "", "head_start_ray_commands.1", "--autoscaling-config", "ray start"),
        seed("safety", head, "{CPU: 0}", "{CPU: 8}", f"{types}.head.resources.CPU", "give {CPU: 0}"),
        seed("safety", head, "InstanceType:", "InstanceMarketOptions: {MarketType: spot}\n      InstanceType:", f"{types}.head.node_config.InstanceMarketOptions.MarketType", "the head on spot"),
        seed("safety", head, "labels:", "max_workers: 1\n    labels:", f"{types}.head.max_workers", "give 0"),
        seed("safety", "", "idle_timeout_minutes: 5\n", "", "idle_timeout_minutes", "missing", "cluster_name"),
        seed("safety", start_head, "127.0.0.1", "0.0.0.0", "head_start_ray_commands.1", "0.0.0.0: give 127.0.0.1"),
        seed("safety", start_worker, " RAY_AUTH_MODE=token", "", "worker_start_ray_commands.1", "RAY_AUTH_MODE=token is missing", "  - >-"),
        seed("safety", "", "  /home/ubuntu/.ray/auth_token: ~/.ray/auth_token\n", "", "file_mounts.auth_token", "a token of its own", "file_mounts:"),
        seed("safety", start_worker, 'OPENAI_API_KEY="$(aws', f'OPENAI_API_KEY={key} OTHER="$(aws', "worker_start_ray_commands.1", "OPENAI_API_KEY gets its value in plain text"),
        seed("safety", "provider:", "region:", "aws_credentials: {aws_access_key_id: AKIAQ3EGRIRXYZ7ABCDE}\n  region:", "provider.aws_credentials.aws_access_key_id", "in plain text"),
        seed("safety", "provider:", "region:", "security_group: {IpPermissions: [{FromPort: 8265, ToPort: 8265, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n  region:", "provider.security_group.IpPermissions.0", "the whole internet"),
        seed("safety", "", "\ninitialization_commands: []", "\ninitialization_commands: [curl -fsSL https://get.docker.com | sudo sh]", "initialization_commands.0", "runs what it downloads"),
        seed("safety", "", "\nhead_setup_commands: []", "\nhead_setup_commands: [wget https://example.org/model.bin]", "head_setup_commands.0", "downloads when a node starts"),
        seed("safety", "", "\nworker_setup_commands: []", "\nworker_setup_commands: ['pip install -U \"ray[default]\"']", "worker_setup_commands.0", "whatever Ray is newest"),
        seed("safety", "", "\nworker_setup_commands: []", "\nworker_setup_commands: [pip install https://s3-us-west-2.amazonaws.com/ray-wheels/latest/ray.whl]", "worker_setup_commands.0", "nightly"),
        seed("safety", start_head, "    ray start --head", "    pip install ray-extras; ray start --head", "head_start_ray_commands.1", "installs when Ray starts"),
        seed("safety", train, "labels:", "docker: {worker_image: 'rayproject/ray:latest'}\n    labels:", f"{types}.train.docker.worker_image", "another one tomorrow"),
    ]  # fmt: skip


def _serve() -> list[Seed]:
    def seed(kind: str, right: str, wrong: str, field: str, says: str, after: str = "", on: str = "") -> Seed:
        return Seed(kind, "serve_config.yaml", after, right, wrong, field, says, on)

    application, args = "applications.0", "applications.0.args"
    return [
        seed("typo", "proxy_location:", "proxy_locaton:", "proxy_locaton", did("proxy_location")),
        seed("typo", "http_options:", "http_option:", "http_option", did("http_options")),
        seed("typo", "  port: 8000", "  prot: 8000", "http_options.prot", did("port")),
        seed("typo", "enable_access_log", "enable_acces_log", "logging_config.enable_acces_log", did("enable_access_log")),
        seed("typo", "route_prefix", "route_prefx", f"{application}.route_prefx", did("route_prefix")),
        seed("typo", "serve.app:build", "serve.app:bild", f"{application}.import_path", did("alpaca_ray.serve.app:build")),
        seed("typo", "prompt_format:", "promt_format:", f"{args}.promt_format", did("prompt_format")),
        seed("typo", "max_wait_s:", "max_wait:", f"{args}.admission.max_wait", did("max_wait_s")),
        seed("typo", "gamma:", "gama:", f"{args}.watermark.gama", did("gamma")),
        seed("typo", "policy: first", "polcy: first", f"{args}.moderation.polcy", did("policy")),
        seed("typo", "num_gpus:", "num_gpu:", f"{args}.placement.num_gpu", did("num_gpus")),
        seed("typo", "label_selector: {}", "label_selector: {alpaca-ray.io/group: serv}", f"{args}.placement.label_selector.alpaca-ray.io/group", did("serve")),
        seed("typo", "label_selector: {}", "label_selector: {alpaca-ray.io/grup: serve}", f"{args}.placement.label_selector.alpaca-ray.io/grup", did("alpaca-ray.io/group")),
        seed("value", "HeadOnly", "HeadOny", "proxy_location", did("HeadOnly")),
        seed("value", "dtype: float32", "dtype: float3", f"{args}.dtype", did("float32"), "      engine:"),
        seed("value", "route_prefix: /", "route_prefix: v1", f"{application}.route_prefix", did("/v1")),
        seed("value", "embedded:smollm2-135m", "embedded:smollm-135m", f"{args}.model", did("embedded:smollm2-135m")),
        seed("value", "engine: torch", "engine: torchh", f"{args}.engine", did("torch")),
        seed("value", "[local]", "[locl]", f"{args}.moderation.backends.0", did("local")),
        seed("type", "port: 8000", "port: web", "http_options.port", "valid integer"),
        seed("type", "max_batch_size: 16", "max_batch_size: some", f"{args}.max_batch_size", "valid integer"),
        seed("type", "cors_origins: []", "cors_origins: https://a.example", f"{args}.admission.cors_origins", "valid list"),
        seed("contradiction", "autoscaling: null", "autoscaling: {min_replicas: 5, max_replicas: 4}", f"{args}.autoscaling.min_replicas", "max_replicas (4)"),
        seed("contradiction", "num_gpus: 0", "num_gpus: 64", f"{args}.placement.num_gpus", "a node of"),
        seed("contradiction", "dtype: float32", "dtype: float32\n      engine: vllm", f"{args}.engine", "given twice", on="engine: vllm\n"),
        seed("contradiction", "label_selector: {}", "label_selector: {alpaca-ray.io/group: generate, example.org/zone: a}", f"{args}.placement.label_selector.example.org/zone", "no group of cluster.yaml has the label"),
        seed("safety", "host: 127.0.0.1", "host: 0.0.0.0", "http_options.host", "no API keys"),
        seed("safety", "key_env: ALPACA_RAY_WATERMARK_KEY", "key_env: 42-4242", f"{args}.watermark.key_env", "no variable's name", "        enabled:"),
        seed("safety", "    args:", f"    runtime_env: {{env_vars: {{OPENAI_API_KEY: sk-{'Ab3' * 10}}}}}\n    args:", f"{application}.runtime_env.env_vars.OPENAI_API_KEY", "in plain text"),
    ]  # fmt: skip


def _recipe() -> list[Seed]:
    def seed(kind: str, after: str, right: str, wrong: str, field: str, says: str, on: str = "") -> Seed:
        return Seed(kind, "alpaca_7b.yaml", after, right, wrong, field, says, on)

    generate, train, evaluate = "\ngenerate:", "\ntrain:", "\nevaluate:"
    return [
        seed("typo", "", "\nevaluate:", "\nevaluat:", "evaluat", did("evaluate")),
        seed("typo", generate, "num_instructions", "num_instruction", "generate.num_instruction", did("num_instructions")),
        seed("typo", generate, "temperature", "temprature", "generate.teacher.temprature", did("temperature")),
        seed("typo", generate, "teacher:", "teachers:", "generate.teachers", did("teacher")),
        seed("typo", train, "learning_rate", "learning_rat", "train.learning_rat", did("learning_rate")),
        seed("typo", train, "num_epochs", "num_epoch", "train.num_epoch", did("num_epochs")),
        seed("typo", train, "num_gpus", "num_gpu", "train.placement.num_gpu", did("num_gpus")),
        seed("typo", train, "group: train", "group: trian", "train.placement.label_selector.alpaca-ray.io/group", did("train")),
        seed("typo", generate, "ray.io/group", "ray.io/grup", "generate.placement.label_selector.alpaca-ray.io/grup", did("alpaca-ray.io/group")),
        seed("typo", evaluate, "max_new_tokens", "max_tokens", "evaluate.max_tokens", did("max_new_tokens")),
        seed("value", train, "export_dtype: bfloat16", "export_dtype: bflot16", "train.export_dtype", did("bfloat16")),
        seed("value", generate, "temperature: 1.0", "temperature: 3.0", "generate.teacher.temperature", "less than or equal to 2"),
        seed("value", "", "name: alpaca_7b", "name: ../alpaca_7b", "name", "match pattern"),
        seed("value", generate, "num_actors: 8", "num_actors: 8\n  prompt_style: chta", "generate.prompt_style", did("chat")),
        seed("value", generate, "num_actors: 8", "num_actors: 8\n  skip_filters: [too_shor]", "generate.skip_filters.0", did("too_short")),
        seed("value", train, "base_model: huggyllama/llama-7b", "base_model: embedded:smollm2", "train.base_model", did("embedded:smollm2-135m")),
        seed("type", train, "global_batch_size: 128", "global_batch_size: big", "train.global_batch_size", "valid integer"),
        seed("type", generate, "top_p: 1.0", "top_p: [1.0]", "generate.teacher.top_p", "valid number"),
        seed("type", train, "{alpaca-ray.io/group: train}", "alpaca-ray.io/group=train", "train.placement.label_selector", "valid dictionary"),
        seed("type", train, "num_workers: 8", "num_workers: 8.5", "train.num_workers", "valid integer"),
        seed("contradiction", generate, "num_examples_per_prompt: 3", "num_examples_per_prompt: 20", "generate.num_tasks_per_prompt", "must be above", "num_tasks_per_prompt"),
        seed("contradiction", generate, "max_requests: 20000", "max_requests: 20", "generate.max_requests", "52002 are asked for"),
        seed("contradiction", train, "num_workers: 8", "num_workers: 8\n  num_workers: 4", "train.num_workers", "given twice"),
        seed("contradiction", train, "num_workers: 8", "num_workers: 32", "train.num_workers", "has room for"),
        seed("contradiction", train, "num_gpus: 1", "num_gpus: 16", "train.placement.num_gpus", "a node of train"),
        seed("contradiction", generate, "{alpaca-ray.io/group: generate}", "{alpaca-ray.io/group: generate}\n    num_gpus: 1", "generate.placement.num_gpus", "a node of generate"),
        seed("contradiction", generate, "num_actors: 8", "num_actors: 8\n  limits: {tokens_per_minute: 1000}", "generate.limits.tokens_per_minute", "reserves"),
        seed("contradiction", train, "num_workers: 8", "num_workers: [8, 4]", "train.num_workers", "is above 4"),
        seed("safety", generate, "top_p: 1.0", f"api_key_env: sk-{'Ab3' * 10}\n    top_p: 1.0", "generate.teacher.api_key_env", "no variable's name"),
    ]  # fmt: skip


SEEDS = [*_cluster(), *_serve(), *_recipe()]

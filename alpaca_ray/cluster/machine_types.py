"""What the instance types of cluster.yaml have, and which machine of Google's cloud is nearest to each.

Read on 2026-11-23 in Amazon's and Google's public pages:
aws.amazon.com/ec2/instance-types (m6i, g4dn, g5, g6, p4, p5), cloud.google.com/compute/docs/general-purpose-machines
(n2), cloud.google.com/compute/docs/accelerator-optimized-machines (g2, a2, a3) and cloud.google.com/compute/docs/gpus.
"""

from typing import NamedTuple


class GcpMachine(NamedTuple):
    """A machine of Compute Engine. Its GPUs come with it, but on n1: there they are named."""

    machine_type: str
    num_cpus: int
    accelerator: str | None = None
    num_accelerators: int = 0


class Machine(NamedTuple):
    """An EC2 instance type. `gcp` has as many GPUs, of the same kind or the same memory, and no fewer CPUs."""

    num_cpus: int
    memory_gib: int
    num_gpus: int
    gcp: GcpMachine


MACHINES = {
    "m6i.large": Machine(2, 8, 0, GcpMachine("n2-standard-2", 2)),
    "m6i.xlarge": Machine(4, 16, 0, GcpMachine("n2-standard-4", 4)),
    "m6i.2xlarge": Machine(8, 32, 0, GcpMachine("n2-standard-8", 8)),
    "m6i.4xlarge": Machine(16, 64, 0, GcpMachine("n2-standard-16", 16)),
    "m6i.8xlarge": Machine(32, 128, 0, GcpMachine("n2-standard-32", 32)),
    "g4dn.2xlarge": Machine(8, 32, 1, GcpMachine("n1-standard-8", 8, "nvidia-tesla-t4", 1)),  # T4, 16 GB
    "g5.xlarge": Machine(4, 16, 1, GcpMachine("g2-standard-4", 4)),  # A10G there, L4 here: 24 GB both
    "g5.2xlarge": Machine(8, 32, 1, GcpMachine("g2-standard-8", 8)),
    "g5.12xlarge": Machine(48, 192, 4, GcpMachine("g2-standard-48", 48)),
    "g6.xlarge": Machine(4, 16, 1, GcpMachine("g2-standard-4", 4)),  # L4
    "g6.2xlarge": Machine(8, 32, 1, GcpMachine("g2-standard-8", 8)),
    "p4d.24xlarge": Machine(96, 1152, 8, GcpMachine("a2-highgpu-8g", 96)),  # A100, 40 GB
    "p4de.24xlarge": Machine(96, 1152, 8, GcpMachine("a2-ultragpu-8g", 96)),  # A100, 80 GB
    "p5.48xlarge": Machine(192, 2048, 8, GcpMachine("a3-highgpu-8g", 208)),  # H100, 80 GB
}

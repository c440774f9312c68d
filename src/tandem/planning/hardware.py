"""Devices to plan for: what their makers state, and what is assumed about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.errors import UserError

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, its node, and the network between nodes.

    Attributes:
        memory: bytes of one device.
        usable: share of it that a plan may fill; the rest is for the framework's context, communication buffers and
            fragmentation. Assumed, not measured.
        retained: freed bytes that the allocator keeps.
        maker: whose kernels it runs: "nvidia", "ascend" or "cpu".
        launch_seconds: what the host takes to launch a kernel. Assumed, not measured.
        half_flops, fp32_flops: peak FLOP/s of dense matrix products, in bf16 or fp16, and in fp32; `half_flops` is None
            where half precision is no faster.
        efficiency: share of the peak that matrix products and attention reach. Assumed.
        memory_bandwidth: bytes/s, peak.
        devices_per_node: devices joined by the fast links.
        node_bandwidth: bytes/s that a device sends over them, one direction, all links together.
        mesh: a link goes to one neighbour, so that a group of n devices uses n - 1 of them.
        network_bandwidth: bytes/s that a device sends to other nodes, one direction.
        source: where the figures come from.
    """

    memory: float
    usable: float = 0.9
    retained: float = 0
    maker: str = "nvidia"
    launch_seconds: float = 8e-6
    half_flops: float | None = None
    fp32_flops: float
    efficiency: float = 0.6
    memory_bandwidth: float
    devices_per_node: int
    node_bandwidth: float
    mesh: bool = False
    network_bandwidth: float
    source: str

    @property
    def is_cpu(self) -> bool:
        """Whether kernels are the CPU's, which form logits and weight gradients in small pieces."""
        return self.maker == "cpu"

    @property
    def capacity(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory * self.usable

    def flops(self, half: bool) -> float:
        """Peak FLOP/s. Raises UserError for half precision where that is no faster."""
        if not half:
            return self.fp32_flops
        if self.half_flops is None:
            raise UserError(
                "--bf16, --fp16: this device is not faster in half precision; training with --bf16 falls back to fp32 "
                "there, and --fp16 is slower: plan without them"
            )
        return self.half_flops

    def bandwidth(self, group: int, stride: int) -> float:
        """Bytes/s that a rank sends in a ring over `group` ranks that lie `stride` ranks apart.

        Within a node, the ring uses the fast links. A ring over several nodes leaves each node once, and there uses the
        network links of all its ranks in the node.

        >>> HARDWARE["h100"].bandwidth(16, 1) / GB
        400.0
        """
        links = (group - 1) / (self.devices_per_node - 1) if self.mesh else 1.0
        if group * stride <= self.devices_per_node:
            return self.node_bandwidth * links
        together = max(1, self.devices_per_node // stride)
        return min(self.node_bandwidth, self.network_bandwidth * min(together, group))


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products in `dtype` (float32, bfloat16 or float16) on a device.

    `device_name` is what its framework calls the device. None for a name that is not in the table.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") / TERA
    989.4
    """
    parts = [part for part in DEVICE_NAMES if part in device_name]
    key = DEVICE_NAMES[max(parts, key=len)] if parts else None
    return None if key is None else HARDWARE[key].flops(half=dtype != "float32")


# Part of a framework's device name -> key of HARDWARE, or None for a device with another peak than a shorter part says.
# The longest part that fits counts. A CPU's peak depends on its cores.
DEVICE_NAMES: dict[str, str | None] = {
    "H100 80GB HBM3": "h100",
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H200": "h200",
    "H200 NVL": "h100-nvl",  # the same chip and clocks; another memory
    "H20": "h20",
    "A100-SXM4-80GB": "a100",
    "A100-SXM4-40GB": "a100",
    "A100-PCIE-40GB": "a100",
    "A100 80GB PCIe": "a100",
    "H800": "h100",  # as H100 and A100, with slower links
    "A800": "a100",
    "B200": "b200",
    "GB200": None,
    "RTX 4090": "rtx4090",
    "RTX 4090 D": None,
    "RTX 4090 Laptop": None,
    "Ascend910B1": "910b1",
    "Ascend910B2": "910b",
    "Ascend910B3": "910b3",
    "Ascend910B4": "910b4",
    "Ascend910_93": "a3",
}

_910B2 = Hardware(
    maker="ascend",
    launch_seconds=15e-6,
    memory=64 * GIB,
    half_flops=376 * TERA,
    fp32_flops=94 * TERA,
    memory_bandwidth=1600 * GB,
    devices_per_node=8,
    node_bandwidth=196 * GB,
    mesh=True,
    network_bandwidth=25 * GB,
    source="Ascend 910B2 of an Atlas 800T A2, as Huawei's open simulators list it (376 TFLOP/s, 64 GB, 1.6 TB/s, "
    "seven HCCS links, 196 GB/s one way); fp32 a quarter (87 TFLOP/s measured by others); 200 Gb/s RoCE each",
)

HARDWARE = {
    "h100": Hardware(
        memory=80 * GIB,
        half_flops=989.4 * TERA,
        fp32_flops=66.9 * TERA,
        memory_bandwidth=3350 * GB,
        devices_per_node=8,
        node_bandwidth=450 * GB,
        network_bandwidth=50 * GB,
        source="NVIDIA H100 SXM5 data sheet (dense, half of the sparse figures); DGX H100: NVLink 900 GB/s both ways, "
        "one 400 Gb/s adapter per GPU",
    ),
    "h100-pcie": Hardware(
        memory=80 * GIB,
        half_flops=756 * TERA,
        fp32_flops=51.2 * TERA,
        memory_bandwidth=2000 * GB,
        devices_per_node=8,
        node_bandwidth=64 * GB,
        network_bandwidth=25 * GB,
        source="NVIDIA H100 PCIe data sheet (dense); PCIe 5.0 x16, 64 GB/s one way, without NVLink bridges",
    ),
    "h100-nvl": Hardware(
        memory=94 * GIB,
        half_flops=835 * TERA,
        fp32_flops=60 * TERA,
        memory_bandwidth=3900 * GB,
        devices_per_node=8,
        node_bandwidth=64 * GB,
        network_bandwidth=25 * GB,
        source="NVIDIA H100 NVL data sheet (dense, one card of the pair); PCIe 5.0 x16, without NVLink bridges",
    ),
    "h200": Hardware(
        memory=140 * GIB,
        half_flops=989.4 * TERA,
        fp32_flops=66.9 * TERA,
        memory_bandwidth=4800 * GB,
        devices_per_node=8,
        node_bandwidth=450 * GB,
        network_bandwidth=50 * GB,
        source="NVIDIA H200 SXM data sheet (dense): H100's products, 4.8 TB/s; NVLink 900 GB/s both ways; memory "
        "as nvidia-smi shows it, 143,771 MiB",
    ),
    "h20": Hardware(
        memory=96 * GIB,
        half_flops=148 * TERA,
        fp32_flops=44 * TERA,
        memory_bandwidth=4000 * GB,
        devices_per_node=8,
        node_bandwidth=450 * GB,
        network_bandwidth=50 * GB,
        source="NVIDIA H20 data sheet as resellers print it (dense)",
    ),
    "a100": Hardware(
        memory=80 * GIB,
        half_flops=312 * TERA,
        fp32_flops=19.5 * TERA,
        memory_bandwidth=2039 * GB,
        devices_per_node=8,
        node_bandwidth=300 * GB,
        network_bandwidth=25 * GB,
        source="NVIDIA A100 SXM4 80 GB data sheet (dense); NVLink 600 GB/s both ways, 200 Gb/s per GPU",
    ),
    "b200": Hardware(
        memory=179 * GIB,
        half_flops=2250 * TERA,
        fp32_flops=75 * TERA,
        memory_bandwidth=7700 * GB,
        devices_per_node=8,
        node_bandwidth=900 * GB,
        network_bandwidth=50 * GB,
        source="NVIDIA HGX B200 data sheet, an eighth of the board (dense); NVLink 1.8 TB/s both ways; memory as "
        "nvidia-smi shows it, 183,359 MiB",
    ),
    "rtx4090": Hardware(
        memory=24 * GIB,
        half_flops=165.2 * TERA,
        fp32_flops=82.6 * TERA,
        memory_bandwidth=1008 * GB,
        devices_per_node=8,
        node_bandwidth=32 * GB,
        network_bandwidth=12.5 * GB,
        source="NVIDIA Ada architecture white paper (bf16 with fp32 sums, dense); PCIe 4.0 x16, no NVLink",
    ),
    "910b1": replace(
        _910B2,
        half_flops=414 * TERA,
        fp32_flops=103 * TERA,
        source="as 910b, with 414 TFLOP/s in fp16 as commonly reported; no document of the maker was at hand",
    ),
    "910b": _910B2,
    "910b3": replace(
        _910B2,
        half_flops=313 * TERA,
        fp32_flops=75 * TERA,
        source="as 910b, with 313 TFLOP/s in fp16 as commonly reported; no document of the maker was at hand",
    ),
    "910b4": replace(
        _910B2,
        memory=32 * GIB,
        half_flops=280 * TERA,
        fp32_flops=75 * TERA,
        memory_bandwidth=800 * GB,
        source="as 910b, with 280 TFLOP/s in fp16 and 32 GB as commonly reported; no document of the maker was at hand",
    ),
    "a3": Hardware(
        maker="ascend",
        launch_seconds=15e-6,
        memory=64 * GIB,
        half_flops=376 * TERA,
        fp32_flops=94 * TERA,
        memory_bandwidth=1600 * GB,
        devices_per_node=768,
        node_bandwidth=196 * GB,
        network_bandwidth=25 * GB,
        source="one die of an Ascend 910C in an Atlas 900 A3 SuperPoD: 384 chips, 768 dies on one non-blocking fabric "
        "(arXiv 2506.12708), 200 Gb/s RDMA each beyond it",
    ),
    "cpu": Hardware(
        memory=24 * GIB,
        retained=64 * 2**20,
        maker="cpu",
        launch_seconds=0,
        fp32_flops=0.46 * TERA,
        memory_bandwidth=40 * GB,
        devices_per_node=1,
        node_bandwidth=5 * GB,
        network_bandwidth=1 * GB,
        source="the machine of docs/lab/performance.md: two cores, of which one multiplied 2048 x 2048 by 2048 x 4096 "
        "at 0.23 TFLOP/s and copied 40 GB/s; bandwidths between processes are guesses. glibc keeps 64 MiB of freed "
        "memory (mallopt(3): M_TRIM_THRESHOLD is twice the largest M_MMAP_THRESHOLD)",
    ),
}

"""Where a process stands is read from flags, variables, SLURM and TPU pods; what does not fit is one clear error."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster
from jax._src.clusters.slurm_cluster import SlurmCluster

from recscale.cluster import SINGLE, Place, find, first_host, from_slurm, from_tpu, slurm_gpus, split_address

THREE = {"RECSCALE_COORD": "host:8476", "RECSCALE_NPROC": "4", "RECSCALE_PROC": "3"}
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
GKE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "w0.svc,w1.svc", "TPU_WORKER_ID": "1"}


def place(environment: dict[str, str], coordinator: str = "", count: int = 1, index: int = 0) -> Place:
    return find(coordinator, count, index, {"TPU_SKIP_MDS_QUERY": "1"} | environment)


def test_nothing_said_is_a_single_process():
    assert place({}) is SINGLE
    assert place({}, "auto") is SINGLE


def test_flags_come_first_then_variables_then_slurm_then_tpu():
    everything = THREE | STEP | GKE
    assert place(everything, "flag:1", 2, 1).address == ("flag", 1)
    assert place(everything).address == ("host", 8476)
    assert place(STEP | GKE).coordinator.startswith("gpu003:")
    assert place(GKE).coordinator == "w0.svc:8482"
    assert place(everything, "none") is SINGLE


def test_variables_name_the_place():
    found = place(THREE)
    assert (found.coordinator, found.count, found.index, found.devices) == ("host:8476", 4, 3, None)
    assert place({"RECSCALE_NPROC": "1"}).count == 1
    assert place({"RECSCALE_COORD": "host:1", "RECSCALE_NPROC": "1", "RECSCALE_PROC": "0"}).count == 1


@pytest.mark.parametrize(
    ("environment", "flags", "complaint"),
    [
        ({}, ("", 2, 0), "--processes=2 needs --coordinator=HOST:PORT"),
        ({}, ("host:1", 2, 2), "process 2 of 2: expected a number from 0 to 1"),
        ({}, ("host", 2, 1), "--process=1: found 'host', expected HOST:PORT"),
        ({}, ("host:65536", 2, 1), "expected HOST:PORT"),
        ({"RECSCALE_COORD": "host:1"}, (), "RECSCALE_COORD set, RECSCALE_NPROC, RECSCALE_PROC not: set all three"),
        ({"RECSCALE_PROC": "1"}, (), "RECSCALE_PROC set, RECSCALE_COORD, RECSCALE_NPROC not"),
        ({"RECSCALE_NPROC": "2", "RECSCALE_PROC": ""}, (), "RECSCALE_NPROC set"),
        (THREE | {"RECSCALE_NPROC": "four"}, (), "RECSCALE_NPROC='four': expected a whole number"),
        (THREE | {"RECSCALE_PROC": "4"}, (), "process 4 of 4"),
        (THREE | {"RECSCALE_PROC": "-1"}, (), "process -1 of 4"),
        (THREE | {"RECSCALE_COORD": "$(COORD_HOST):8476"}, (), "found '$(COORD_HOST):8476', expected HOST:PORT"),
        (THREE | {"RECSCALE_COORD": ":8476"}, (), "found ':8476', expected HOST:PORT"),
        ({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, (), "put `srun` before the command"),
        ({"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2"}, (), "not started by srun"),
        (STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, (), "not started by srun"),
        (STEP | {"JAX_COORDINATOR_PORT": "x"}, (), "SLURM step 4711.0: found 'gpu003:x', expected HOST:PORT"),
        (STEP | {"SLURM_GPUS_ON_NODE": "3"}, (), "cannot share evenly: use --ntasks-per-node=3"),
        (GKE | {"TPU_WORKER_ID": "2"}, (), "TPU_WORKER_ID: process 2 of 2"),
    ],
)
def test_what_does_not_fit_is_one_line_with_a_cure(environment, flags, complaint):
    with pytest.raises(ValueError, match=r"expected|set all three|srun|evenly|needs") as error:
        place(environment, *flags)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_port_is_read_from_ipv6_addresses_too():
    assert split_address("[fe80::1]:80", "") == ("fe80::1", 80)
    assert split_address("10.0.0.1:80", "") == ("10.0.0.1", 80)


def test_a_step_of_one_task_is_a_single_process():
    assert place(STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is SINGLE
    assert place(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is SINGLE
    assert place({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "1"}) is SINGLE


def test_a_step_agrees_with_jax_on_everything_but_the_port_of_later_steps(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    found = from_slurm(STEP)
    assert found is not None
    assert found.coordinator == SlurmCluster.get_coordinator_address(10, None)
    assert (found.count, found.index) == (SlurmCluster.get_process_count(), SlurmCluster.get_process_id())
    ports = {place(STEP | {"SLURM_STEP_ID": str(step)}).address[1] for step in range(50)}
    assert len(ports) == 50 and min(ports) >= 61440 and max(ports) <= 65535
    assert place(STEP | {"SLURM_STEP_ID": "7", "JAX_COORDINATOR_PORT": "20001"}).address == ("gpu003", 20001)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[001-015],x", "n001"), ("n[7,9-11]", "n7"), ("r[1-2]-n[4,6],x", "r1-n4")],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),  # no sign of a GPU
        ({"SLURM_GPUS_ON_NODE": "2"}, (1,)),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}, None),  # --gpu-bind=single:1
        ({"SLURM_GPUS_ON_NODE": "2", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "3", "JAX_PLATFORMS": "cpu"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,GPU-9a", "JAX_PLATFORMS": "cuda,cpu"}, (1,)),
    ],
)
def test_every_task_has_the_gpus_that_are_its_own(changes, expected):
    assert slurm_gpus(STEP | changes, 4) == expected


def test_a_pod_on_gke_is_read_as_jax_reads_it(monkeypatch):
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
    environment = GKE | slices
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = from_tpu(environment)
    assert found is not None and (found.count, found.index) == (4, 3)
    assert found.coordinator == GkeTpuCluster.get_coordinator_address(10, None) == "localhost:8482"
    assert (GkeTpuCluster.get_process_count(), GkeTpuCluster.get_process_id()) == (4, 3)
    assert from_tpu(GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert from_tpu(environment | {"JAX_PLATFORMS": "cpu"}) is None


def test_a_pod_may_be_listed_in_a_file(tmp_path):
    (tmp_path / "addresses").write_text("a:1,b:1,c:1\n")
    found = from_tpu(GKE | {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "addresses")})
    assert found is not None and (found.coordinator, found.count, found.index) == ("a:8482", 3, 1)
    with pytest.raises(OSError, match="none"):
        from_tpu(GKE | {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "none")})


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server as GCE has it: attributes below one path, 404 for others, a header that must be there."""

    attributes: dict[str, str]
    PATH = "/computeMetadata/v1/instance/attributes/"

    def do_GET(self) -> None:
        value = self.attributes.get(self.path.removeprefix(self.PATH))
        known = value is not None and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write((value if known and value else "").encode())

    def log_message(self, format: str, *args) -> None:
        del format, args


@pytest.fixture
def metadata() -> Iterator[type[Metadata]]:
    """A stub; set its `attributes`. `address` is HOST:PORT."""
    handler = type("Stub", (Metadata,), {"attributes": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.address = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore:'maxsplit' is passed as positional argument")  # jax, on newer Python
@pytest.mark.parametrize("endpoints", ["localhost,10.0.0.2", "a:0:localhost,b:1:10.0.0.2"], ids=["names", "triples"])
def test_a_pod_of_tpu_vms_is_read_as_jax_reads_it(metadata, monkeypatch, endpoints):
    pytest.importorskip("requests", reason="jax asks the metadata server through it")
    monkeypatch.setenv("GCE_METADATA_IP", metadata.address)
    metadata.attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": endpoints,
        "tpu-env": "TYPE: 'V5E'\n",
    }
    found = from_tpu({"GCE_METADATA_IP": metadata.address})
    assert found is not None and (found.coordinator, found.count, found.index) == ("localhost:8482", 2, 1)
    assert found.coordinator == GceTpuCluster.get_coordinator_address(10, None)
    assert (GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id()) == (2, 1)
    metadata.attributes["tpu-env"] = "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\nA: 'b'\n"
    found = from_tpu({"GCE_METADATA_IP": metadata.address})
    assert found is not None and (found.count, found.index) == (6, 5)
    assert (GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id()) == (6, 5)


def test_one_tpu_vm_or_a_virtual_machine_without_a_pod_is_a_single_process(metadata):
    assert from_tpu({"GCE_METADATA_IP": metadata.address}) is None
    metadata.attributes = {"agent-worker-number": "0", "worker-network-endpoints": "localhost"}
    assert find("", 1, 0, {"GCE_METADATA_IP": metadata.address}) is SINGLE


def test_a_metadata_server_that_does_not_answer_is_one_line(metadata):
    metadata.do_GET = lambda handler: handler.send_error(503)
    with pytest.raises(ConnectionError, match=r"does not tell agent-worker-number .*503.*TPU_SKIP_MDS_QUERY=1"):
        from_tpu({"GCE_METADATA_IP": metadata.address})

"""A Ray cluster of two nodes on this machine, and runs that are not drawn."""

import os

import pytest


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """Two nodes of one core each; the second can be lost with ``two_nodes.lose()``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes a token there
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TQDM_PATCH_PRINT", "0")  # else print is another function in this process from here on
        patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
        nodes = TwoNodes()
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        try:
            yield nodes
        finally:
            nodes.end()


class TwoNodes:
    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.second = self.cluster.add_node(num_cpus=1)

    def lose(self):
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=1)

    def end(self):
        import ray

        ray.shutdown()
        self.cluster.shutdown()

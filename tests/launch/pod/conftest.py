"""A fake cloud and a laptop for the tests of `launch/tpu.sh`."""

import pytest

from tests.gcs import fake
from tests.launch.pod import fake_cloud


@pytest.fixture
def cloud(tmp_path):
  return fake_cloud.Cloud(tmp_path / "the cloud")


@pytest.fixture
def laptop(tmp_path, cloud):
  with fake_cloud.served(cloud) as port, fake.Server(tmp_path) as store:
    cloud.store = store.store
    yield fake_cloud.Laptop(tmp_path, cloud, port, store)

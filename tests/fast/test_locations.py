"""Addresses of object stores are no local folders."""

import pathlib

import pytest

from atat_jax import data
from atat_jax.errors import UserError
from atat_jax.runs import configuration, files, locations

ADDRESSES = (
  "memory://runs/a",
  "file:///tmp/a",
  "https://example.com/a",
  "weird+store.1://a",
  " http://a",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_never_becomes_a_local_folder(
  address, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  readers = (
    lambda: locations.expand("workdir", address),
    # What pathlib makes of an address has one slash.
    lambda: locations.expand("workdir", pathlib.Path("gs://bucket/run")),
    lambda: configuration.read(address),
    lambda: files.read_results(address),
    lambda: data.spec("folder", data_dir=address),
    lambda: data.load("digits", cache_dir=address),
  )
  for read in readers:
    with pytest.raises(UserError, match="://") as error:
      read()
    assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_names_with_a_colon_remain_local_paths():
  for path in ("runs:2/a", "a/gs://b", "C:/runs", "odd:/x", "gs:", "12://a"):
    assert locations.expand("workdir", path) == pathlib.Path(path)

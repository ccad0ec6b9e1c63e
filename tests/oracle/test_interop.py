"""Files of weights: those of PyTorch itself, damaged ones and malicious ones."""

import collections
import io
import json
import os
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from atat_jax import interop, models
from atat_jax.errors import UserError

torch = pytest.importorskip(
  "torch", reason="PyTorch writes the files of these tests"
)
import torch_zoo  # noqa: E402

FIELDS = dict(stage_sizes=(1, 1), base_channels=4, num_classes=3)


@pytest.fixture(scope="module")
def model():
  return models.create("preact_resnet18", **FIELDS)


@pytest.fixture(scope="module")
def state(model):
  network = torch_zoo.randomize(torch_zoo.PreActResNet(model))
  return dict(network.state_dict())


@pytest.fixture
def path(tmp_path):
  return tmp_path / "weights.pth"


def save_safetensors(tensors, path, metadata=True):
  """Writes a file from the description of the format."""
  kinds = {"float32": "F32", "int64": "I64", "bfloat16": "BF16"}
  header = {"__metadata__": {"format": "pt"}} if metadata else {}
  data = b""
  for name, array in tensors.items():
    end = len(data) + array.nbytes
    header[name] = {
      "dtype": kinds[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": [len(data), end],
    }
    data += array.tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def same(variables, expected):
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.fixture(scope="module")
def loaded(model, state, tmp_path_factory):
  path = tmp_path_factory.mktemp("interop") / "weights.pth"
  torch.save(state, path)
  return interop.load_torch(path, model)


def test_layouts_are_flaxs(loaded, state):
  params, stats = loaded["params"], loaded["batch_stats"]
  kernel = params["stage2_unit1_shortcut"]["kernel"]
  theirs = state["layer2.0.shortcut.0.weight"].numpy()
  assert kernel.shape == (1, 1, 4, 8) and kernel.dtype == np.float32
  for i, o in np.ndindex(4, 8):
    assert kernel[0, 0, i, o] == theirs[o, i, 0, 0]
  head = state["linear.weight"].numpy()
  np.testing.assert_array_equal(params["head"]["kernel"], head.T)
  np.testing.assert_array_equal(
    stats["final_bn"]["var"], state["bn.running_var"].numpy()
  )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
  "wrap",
  [
    lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {k: torch.nn.Parameter(v, False) for k, v in state.items()},
    lambda state: {k: v.half().float() for k, v in state.items()},
  ],
  ids=["checkpoint", "data_parallel", "parameters", "plain"],
)
def test_files_of_pytorch_are_read_as_pytorch_reads_them(
  wrap, legacy, model, state, path
):
  state = {k: v for k, v in state.items() if v.is_floating_point()}
  saved = wrap(state)
  torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
  again = torch.load(path, weights_only=True)
  again = again.get("state_dict", again.get("model", again))
  ours = interop.read_state_dict(path)
  assert list(ours) == [name.removeprefix("module.") for name in again]
  for array, tensor in zip(ours.values(), again.values(), strict=True):
    np.testing.assert_array_equal(array, tensor.detach().numpy())
  interop.load_torch(path, model)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_and_dtypes_of_pytorch_are_read(legacy, path):
  base = torch.arange(24.0).reshape(4, 6)
  tensors = {
    "base": base,
    "transposed": base.T,
    "part": base[1:3, ::2],
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "half": base.half(),
    "double": base.double(),
    "long": base.long() - 5,
    "byte": base.byte(),
    "bool": base > 3,
    "bfloat16": base.bfloat16() / 3,
  }
  torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
  ours = interop.read_state_dict(path)
  assert list(ours) == list(tensors)
  for name, tensor in tensors.items():
    if name == "bfloat16":
      assert ours[name].dtype == ml_dtypes.bfloat16
      tensor, ours[name] = tensor.float(), ours[name].astype(np.float32)
    expected = tensor.numpy()
    assert ours[name].dtype == expected.dtype, name
    np.testing.assert_array_equal(ours[name], expected, err_msg=name)


def test_safetensors_give_the_same_as_pickles(model, state, loaded, tmp_path):
  path = tmp_path / "weights.safetensors"
  save_safetensors({k: v.numpy() for k, v in state.items()}, path)
  same(interop.load_torch(path, model), loaded)


def test_bfloat16_of_safetensors_is_kept(tmp_path):
  path = tmp_path / "weights.safetensors"
  halves = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
  save_safetensors({"x": halves}, path, metadata=False)
  read = interop.read_state_dict(path)["x"]
  assert read.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(read, halves)


def test_old_names_of_dense_layers_are_known(tmp_path):
  fields = dict(stage_sizes=(1, 1), growth=2, base_channels=4, num_classes=2)
  model = models.create("densenet121", **fields)
  network = torch_zoo.randomize(torch_zoo.DenseNet(model))
  path, old = tmp_path / "new.pth", tmp_path / "old.pth"
  torch.save(network.state_dict(), path)
  renamed = {
    name.replace("norm1.", "norm.1.")
    .replace("norm2.", "norm.2.")
    .replace("conv1.", "conv.1.")
    .replace("conv2.", "conv.2."): tensor
    for name, tensor in network.state_dict().items()
  }
  assert "features.denseblock1.denselayer1.norm.1.weight" in renamed
  torch.save(renamed, old)
  same(interop.load_torch(old, model), interop.load_torch(path, model))


def message(path, model=None):
  with pytest.raises(UserError) as error:
    if model is None:
      interop.read_state_dict(path)
    else:
      interop.load_torch(path, model)
  text = str(error.value)
  assert text.startswith(str(path)) and "\n" not in text, text
  return text


def test_every_tensor_that_does_not_fit_is_named(model, state, path):
  state = dict(state)
  state["stranger"] = state["extra.weight"] = torch.zeros(2)
  del state["layer2.0.bn1.running_mean"], state["conv1.weight"]
  state["linear.weight"] = torch.zeros(4, 8)
  state["bn.bias"] = torch.zeros(3)
  torch.save(state, path)
  text = message(path, model)
  assert "missing: layer2.0.bn1.running_mean, conv1.weight;" in text or (
    "missing: conv1.weight, layer2.0.bn1.running_mean;" in text
  )
  assert "not of this network: stranger, extra.weight;" in text
  assert "linear.weight (8, 4), not (8, 3)" in text
  assert "bn.bias (3,), not (8,)" in text


def test_weights_of_another_network_are_refused(model, path):
  other = models.create("preact_resnet18", **(FIELDS | {"base_channels": 5}))
  network = torch_zoo.PreActResNet(other)
  torch.save(network.state_dict(), path)
  text = message(path, model)
  assert "bn.running_mean (10,), not (8,)" in text and "more" in text
  assert "missing" not in text
  with pytest.raises(
    UserError, match=r"WideResNet; allowed: .*shortcut='conv'"
  ):
    interop.load_torch(path, models.create("wide_resnet"))


class Call:
  """Pickled as a call of any function."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def write_zip(path, program, storages=None, byteorder=b"little"):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", program)
    archive.writestr("archive/byteorder", byteorder)
    for key, data in (storages or {}).items():
      archive.writestr(f"archive/data/{key}", data)


@pytest.mark.parametrize("container", ["torch", "zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(container, path, tmp_path):
  trace = tmp_path / "executed"
  evil = {"conv1.weight": Call(os.mkdir, str(trace))}
  if container == "torch":
    torch.save(evil, path)
  elif container == "zip":
    write_zip(path, pickle.dumps(evil))
  elif container == "legacy":
    torch.save(evil, path, _use_new_zipfile_serialization=False)
  else:
    path.write_bytes(pickle.dumps(evil))
  text = message(path)
  assert "the pickle asks for posix.mkdir" in text or "nt.mkdir" in text
  assert "torch.save(model.state_dict(), path)" in text
  assert not trace.exists()
  if container == "zip":  # the program does run where it is allowed to
    pickle.loads(pickle.dumps(evil))
    assert trace.exists()


@pytest.mark.parametrize(
  "call",
  [
    Call(eval, "1 / 0"),
    Call(exec, "raise SystemExit"),
    Call(getattr, "text", "format"),
    Call(__import__, "os"),
    Call(torch.nn.Linear, 1, 1),
  ],
  ids=lambda call: str(call.call[0].__name__),
)
def test_any_other_name_is_refused(call, path):
  write_zip(path, pickle.dumps({"x": call}))
  assert "the pickle asks for " in message(path)


def test_dotted_names_do_not_reach_inside_what_is_allowed(path):
  # Protocol 4: STACK_GLOBAL follows dots, from OrderedDict to its functions.
  program = (
    b"\x80\x04\x8c\x0bcollections\x8c\x1cOrderedDict.__init__.__doc__\x93."
  )
  write_zip(path, program)
  assert "asks for collections.OrderedDict.__init__" in message(path)


@pytest.mark.parametrize(
  "name", ["torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage"]
)
def test_a_file_cannot_change_the_reader(name, path, state):
  # BUILD sets attributes of the object below it: here __call__ of ours.
  program = f"c{name}\n(N}}S'__call__'\nS'x'\nstb.".encode()
  write_zip(path, program)
  assert "sets attributes of a plain value" in message(path)
  torch.save(state, path)
  assert interop.read_state_dict(path)


@pytest.mark.parametrize(
  ("offset", "shape", "strides", "named"),
  [
    (0, (5,), (1,), "element 4 of 4"),
    (3, (2,), (1,), "element 4 of 4"),
    (0, (2, 2), (3, 1), "element 4 of 4"),
    (3, (2,), (-1,), "a tensor of"),
    (-1, (2,), (1,), "a tensor of"),
    (0, (2,), (1, 1), "zip"),
    (0, "ab", (1, 1), "a tensor of"),
  ],
)
def test_tensors_stay_inside_their_storage(offset, shape, strides, named, path):
  class Storage:
    pass

  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      if isinstance(obj, Storage):
        return ("storage", torch.FloatStorage, "0", "cpu", 4)
      return None

  stream = io.BytesIO()
  rebuild = Call(
    torch._utils._rebuild_tensor_v2,
    Storage(),
    offset,
    shape,
    strides,
    False,
    collections.OrderedDict(),
  )
  Pickler(stream, 2).dump({"x": rebuild})
  numbers = np.arange(4, dtype=np.float32)
  write_zip(path, stream.getvalue(), {"0": numbers.tobytes()})
  assert named in message(path)


def test_a_tensor_larger_than_memory_takes_none(model, state, path):
  state = state | {"bn.bias": torch.zeros(1).expand(10**15)}
  torch.save(state, path)
  assert "bn.bias (1000000000000000,), not (8,)" in message(path, model)


def test_numbers_of_the_other_byte_order_are_turned(path, tmp_path):
  torch.save({"x": torch.arange(3.0)}, path)
  with zipfile.ZipFile(path) as archive:
    folder = archive.namelist()[0].split("/")[0]
    program = archive.read(f"{folder}/data.pkl")
  big = np.arange(3, dtype=">f4").tobytes()
  write_zip(path, program, {"0": big}, byteorder=b"big")
  np.testing.assert_array_equal(interop.read_state_dict(path)["x"], [0, 1, 2])
  write_zip(path, program, {"0": big[:-1]})
  assert "11 bytes for" in message(path)
  write_zip(path, program)
  assert "no PyTorch checkpoint (it lacks 'archive/data/0'" in message(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_files_are_named(legacy, state, path):
  torch.save(state, path, _use_new_zipfile_serialization=not legacy)
  content = path.read_bytes()
  for length in (0, 10, len(content) // 2, len(content) - 9):
    path.write_bytes(content[:length])
    assert "no PyTorch checkpoint (" in message(path)


def test_files_without_a_state_dict_are_named(path, tmp_path):
  for content in ({"epoch": 3}, [torch.zeros(2)], {"model": 3}, {}):
    torch.save(content, path)
    assert "no state dict; allowed: tensors by name" in message(path)
  assert "No such file" in message(tmp_path / "missing.pth")
  assert "No such file" in message(tmp_path / "missing.safetensors")
  assert "directory" in message(tmp_path).lower()
  (tmp_path / "folder.safetensors").mkdir()
  assert "directory" in message(tmp_path / "folder.safetensors").lower()


@pytest.mark.parametrize(
  "header",
  [
    b"{",
    b"[]",
    b'{"x": 3}',
    b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}',
    b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    b'{"x": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}',
    b'{"x": {"dtype": "F32", "shape": [2]}}',
  ],
)
def test_damaged_safetensors_are_named(header, tmp_path):
  path = tmp_path / "weights.safetensors"
  path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
  assert "no safetensors file (" in message(path)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_truncated_safetensors_are_named(length, state, tmp_path):
  path = tmp_path / "weights.safetensors"
  save_safetensors({k: v.numpy() for k, v in state.items()}, path)
  assert interop.read_state_dict(path)
  path.write_bytes(path.read_bytes()[:length])
  assert "no safetensors file (" in message(path)


def test_a_huge_header_of_safetensors_is_refused(tmp_path):
  path = tmp_path / "weights.safetensors"
  path.write_bytes(struct.pack("<Q", 10**9) + b"{")
  assert "no safetensors file (" in message(path)

"""Rate at which streamed pictures are read, decoded, cropped and batched.

  python -m benchmarks.input --out=input.json

Writes a folder of JPEG pictures of ImageNet's usual size (500 x 375 pixels,
about 110 kB) in a temporary directory, and reads batches of them as a training
does. Printed are images a second and, as other work on the machine does not
change it, images a second of processor time: the rate of one core. Below it the
parts of that time, and how many cores the networks of configs/imagenet.py need
on a device with a given rate of operations (by default 37 % of an H200's peak
in bfloat16, as a WRN-28-10 had).
"""

import argparse
import contextlib
import io
import math
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atat_jax.runs import tables
from benchmarks.support import machine
from benchmarks.support.machine import number, whole

PICTURE = (500, 375)
LEFT_OUT = 24  # more batches than are read ahead
PEAK_SHARE, PEAK = 0.37, 989e12


def write_pictures(root: pathlib.Path, count: int) -> float:
  """Writes pictures with the spectrum of photographs; returns their mean size.

  Args:
    root: Folder that gets `train` and `val` with two classes.
    count: Number of training pictures.

  Returns:
    Bytes of a file.
  """
  from PIL import Image

  generator = np.random.default_rng(0)
  width, height = PICTURE
  frequency = np.hypot(
    np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  )
  frequency[0, 0] = 1.0
  sizes = []
  for number_ in range(count + 2):
    split = "train" if number_ < count else "val"
    place = root / split / f"c{number_ % 2}"
    place.mkdir(parents=True, exist_ok=True)
    # A photograph's amplitude falls as one over the frequency; colours differ
    # less than brightness.
    noise = np.fft.rfft2(generator.normal(size=(4, height, width)))
    planes = np.fft.irfft2(noise / frequency, (height, width))
    planes /= planes.std((1, 2), keepdims=True)
    pixels = 128 + 52 * planes[:1] + 14 * planes[1:]
    buffer = io.BytesIO()
    array = pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(array).save(buffer, "JPEG", quality=96)
    (place / f"{number_}.jpg").write_bytes(buffer.getvalue())
    sizes.append(len(buffer.getvalue()))
  return float(np.mean(sizes))


def _processor_seconds() -> float:
  """Processor time of this process and of the children that have ended."""
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + children.ru_utime + children.ru_stime


def _stream(
  root: pathlib.Path, *, size: int, batch: int, batches: int, workers: int
) -> Any:
  """Makes the batches of a training of so many steps."""
  from atat_jax import data
  from atat_jax.data import streamed

  found = data.load(
    "folder",
    data_dir=str(root),
    validation_size=2,
    size=size,
    streaming=data.Streaming(workers=workers),
  )
  assert isinstance(found.train, data.Pictures)  # noqa: S101 - as asked for
  return streamed.TrainingBatches(
    found.train,
    rows=np.arange(batch),
    num_steps=batches,
    batch_size=batch,
    seed=0,
  )


def measure(
  root: pathlib.Path, *, size: int, batch: int, batches: int, workers: int
) -> dict[str, Any]:
  """Reads batches as a training does.

  Args:
    root: Folder of pictures.
    size: Side of the images.
    batch: Number of images in a batch.
    batches: Number of batches.
    workers: Processes that read; 0: threads.

  Returns:
    Images a second, and a second of processor time.
  """
  fields = {"size": size, "batch": batch, "workers": workers}
  with _stream(root, batches=1, **fields) as stream:
    stream.batch(0)  # imports
  before, began = _processor_seconds(), time.perf_counter()
  # From the first picture to the last: what is read ahead counts, too.
  with _stream(root, batches=batches, **fields) as stream:
    for step in range(batches):
      stream.follow(step)
    seconds = time.perf_counter() - began
  # Processes are counted when they have ended, their start included.
  spent = _processor_seconds() - before
  return {
    "name": f"{workers} processes" if workers else "threads",
    "images_per_second": batch * batches / seconds,
    "images_per_core_second": batch * batches / spent,
  }


def waits(
  root: pathlib.Path,
  *,
  size: int,
  batch: int,
  batches: int,
  workers: int,
  seconds: float,
  left_out: int = LEFT_OUT,
) -> dict[str, float]:
  """Measures how long a clock that stands for an accelerator waits.

  Args:
    root: Folder of pictures.
    size: Side of the images.
    batch: Number of images in a batch.
    batches: Number of steps.
    workers: Processes that read; 0: threads.
    seconds: Length of a step.
    left_out: Number of the first steps that do not count: what is read ahead is
      not there yet, or has not been used up yet.

  Returns:
    The step's length, and the share of the time and of the steps that waited.
  """
  from atat_jax.data.prefetch import Prefetcher

  found, free, began = [], 0.0, 0.0
  with contextlib.ExitStack() as stack:
    total = left_out + batches
    stream = stack.enter_context(
      _stream(root, size=size, batch=batch, batches=total, workers=workers)
    )
    ahead = stack.enter_context(Prefetcher(stream.follow, range(total)))
    for number_ in range(total):
      if number_ == left_out:
        began = max(free, time.perf_counter())
      spent: list[float] = []
      # The loop of a training hands over steps without waiting for their end.
      ahead.get(lambda: time.perf_counter() >= free, spent.append)  # noqa: B023
      free = max(free, time.perf_counter()) + seconds
      found.append(sum(spent))
  found = found[left_out:]
  return {
    "step_seconds": seconds,
    "waiting_share": sum(found) / (free - began),
    "steps_that_waited": float(np.mean(np.array(found) > 0.002)),
  }


def parts(root: pathlib.Path, size: int) -> dict[str, float]:
  """Measures the parts of a picture's processor time, in seconds.

  Args:
    root: Folder of pictures.
    size: Side of the images.
  """
  from PIL import Image

  from atat_jax.data import pictures, rand_augment, streamed

  paths = sorted(root.glob("train/*/*.jpg"))[:64]
  times: dict[str, float] = {}

  def timed(name: str, function: Callable[[Any], Any], items: Any) -> Any:
    began = time.process_time()
    found = [function(item) for item in items]
    times[name] = (time.process_time() - began) / len(found)
    return found

  def crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    draws = streamed._uniform((0, id(image) & 0xFFFF), 40)
    return image.crop(streamed.random_box(width, height, draws, 0.08))

  def augment(image: Image.Image) -> Image.Image:
    draws = streamed._uniform((0, id(image) & 0xFFFF), rand_augment.NUM_DRAWS)
    return rand_augment.augment(image, draws, 9.0)

  contents = timed("read the file", pathlib.Path.read_bytes, paths)
  images = timed(
    "decode",
    lambda content: pictures.decode_bytes(content).convert("RGB"),
    contents,
  )
  crops = timed("choose a box and crop", crop, images)
  resized = timed(
    "resize",
    lambda image: image.resize((size, size), Image.Resampling.BILINEAR),
    crops,
  )
  timed("RandAugment, where it is on", augment, resized)
  return times


def needs(per_core: float, operations_per_second: float) -> dict[str, Any]:
  """Computes the cores that each network of configs/imagenet.py needs.

  Args:
    per_core: Images that a core reads in a second.
    operations_per_second: Rate of the device, FLOP/s.

  Returns:
    Name of the network to its images a second and cores.
  """
  import jax
  import jax.numpy as jnp

  from atat_jax import models, objectives
  from benchmarks.support import flops

  found = {}
  for name, network, fields, num_steps in (
    ("resnet50, PGD-3", "resnet50", {}, 3),
    ("convnext_t, PGD-2", "convnext", {"conv_stem": (48, 96)}, 2),
    (
      "vit_s, PGD-2",
      "vit",
      {
        "conv_stem": (48, 96, 192, 384),
        "channels": 384,
        "num_heads": 6,
        "hidden": 1536,
      },
      2,
    ),
  ):
    model = models.create(network, num_classes=1000, **fields)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    forward = flops.forward(model, variables, (224, 224, 3))
    passes = flops.passes(objectives.create("at"), num_steps)
    rate = operations_per_second / (forward * passes)
    found[name] = {
      "forward_gflop": forward / 1e9,
      "passes": passes,
      "images_per_second": rate,
      "cores": math.ceil(rate / per_core),
    }
  return found


def page(rows: Sequence[dict[str, Any]]) -> str:
  """Returns the tables of rates, of parts, of waiting, and of cores."""
  rates = tables.markdown(
    [["read by", "images/s", "images/s of a core"]]
    + [
      [
        row["name"],
        f"{row['images_per_second']:.0f}",
        f"{row['images_per_core_second']:.0f}",
      ]
      for row in rows
    ]
  )
  first = rows[0]
  waiting = tables.markdown(
    [["read by", "step / reading", "s a step", "time waited", "steps waited"]]
    + [
      [
        row["name"],
        f"{factor:g}",
        f"{found['step_seconds']:.2f}",
        f"{100 * found['waiting_share']:.1f} %",
        f"{100 * found['steps_that_waited']:.0f} %",
      ]
      for row in rows
      for factor, found in row["waits"]
    ]
  )
  spent = tables.markdown(
    [["part", "ms an image"]]
    + [[name, f"{1e3 * x:.2f}"] for name, x in first["parts"].items()]
  )
  cores = tables.markdown(
    [["network, attack", "GFLOP forward", "passes", "images/s", "cores"]]
    + [
      [
        name,
        f"{found['forward_gflop']:.1f}",
        str(found["passes"]),
        f"{found['images_per_second']:.0f}",
        str(found["cores"]),
      ]
      for name, found in first["needs"].items()
    ]
  )
  return f"{rates}\n\n{spent}\n\n{waiting}\n\n{cores}"


def parser() -> argparse.ArgumentParser:
  """Makes the parser of the flags."""
  made = machine.measurement_parser(__doc__)
  add = made.add_argument
  add("--pictures", type=whole, default=256, help="training pictures")
  add("--size", type=whole, default=224, help="side of the images")
  add("--batch", type=whole, default=64)
  add("--batches", type=whole, default=24, help="batches that are timed")
  add(
    "--workers",
    type=int,
    nargs="+",
    default=[0],
    help="processes that read; 0: threads",
  )
  add(
    "--factors",
    type=number,
    nargs="+",
    default=[2.0, 1.25, 0.5],
    help="lengths of a step, in units of the time that reads its batch",
  )
  add(
    "--operations",
    type=number,
    default=PEAK_SHARE * PEAK,
    help="rate of the device in FLOP/s",
  )
  return made


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  args = parser().parse_args(argv)

  def measured() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
      root = pathlib.Path(name)
      size = write_pictures(root, args.pictures)
      for number_, workers in enumerate(args.workers):
        sizes = {
          "size": args.size,
          "batch": args.batch,
          "batches": args.batches,
          "workers": workers,
        }
        row = measure(root, **sizes)
        reading = args.batch / row["images_per_second"]
        row["waits"] = [
          (factor, waits(root, seconds=factor * reading, **sizes))
          for factor in args.factors
        ]
        if not number_:
          row["bytes_a_file"] = size
          row["parts"] = parts(root, args.size)
          row["needs"] = needs(row["images_per_core_second"], args.operations)
        yield row

  def line(row: dict[str, Any]) -> str:
    return f"{row['name']}: {row['images_per_second']:.0f} images/s"

  machine.run(args, measured(), page, line=line)


if __name__ == "__main__":
  main()

"""scikit-learn's bundled handwritten digits: real data without a download.

1,797 images of 8 x 8 pixels (Alpaydin and Kaynak, UCI Optical Recognition of
Handwritten Digits, the test part). There is no official split, so that a fixed
stratified one takes its place.
"""

import numpy as np

from atat_jax import checks
from atat_jax.data import base

_NUM_TEST = 360

SPEC = base.DatasetSpec(
  name="digits",
  num_classes=10,
  image_shape=(8, 8, 1),
  class_names=tuple("0123456789"),
  mean=(0.3045,),
  std=(0.3757,),
)


def read(
  *,
  data_dir: str | None = None,
  cache_dir: str | None = None,
  source: str = "auto",
) -> tuple[base.Split, base.Split]:
  """Reads the digits: 1,437 training and 360 test images.

  Args:
    data_dir: Ignored, the data come with scikit-learn.
    cache_dir: Ignored.
    source: "auto", the only one.

  Returns:
    The training and the test split; images uint8 `[N, 8, 8, 1]`, the original
    grey values 0 to 16 scaled to 0 to 255.

  Raises:
    UserError: `source` names another source.
  """
  del data_dir, cache_dir
  checks.choice("source", source, ("auto",))
  # Slow to import, and other data sets do not need it.
  from sklearn import datasets

  bunch = datasets.load_digits()
  images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
  digits = base.checked_split(SPEC, images, bunch.target, where="load_digits")
  return base.hold_out(digits, _NUM_TEST)

"""What the sharded train step sends, read from its compiled program."""

import os
import subprocess
import sys

import collectives_of_a_step
import pytest
import tiny

from benchmarks.support import collectives


@pytest.mark.parametrize("attack_batch_norm", ["batch", "running"])
def test_a_step_sends_the_gradient_once_and_the_attack_no_more_than_sums(
  attack_batch_norm, eight_devices
):
  found = collectives_of_a_step.find(eight_devices, attack_batch_norm)
  assert collectives_of_a_step.check(found, attack_batch_norm)


@pytest.mark.slow
def test_64_devices_send_as_often_as_8(eight_devices):
  program = tiny.ROOT / "tests" / "support" / "collectives_of_a_step.py"
  found = subprocess.run(
    [sys.executable, str(program), "64"],
    cwd=tiny.ROOT,
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join(["tests/support", str(tiny.ROOT)]),
      "JAX_NUM_CPU_DEVICES": "64",
    },
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stderr
  lines = [line.strip('"') for line in found.stdout.splitlines()]
  assert lines == [
    collectives_of_a_step.check(
      collectives_of_a_step.find(eight_devices, mode), mode
    )
    for mode in ("batch", "running")
  ]


PROGRAM = """
HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %r = f32[8]{0} all-reduce(%x), to_apply=%add, metadata={op_name="loop/bn"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
  %g = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce-start(%a, %b), to_apply=%add
  ROOT %o = f32[16]{0} all-gather(%a), dimensions={0}
}
"""


def test_a_planted_collective_is_found_with_its_loop():
  assert collectives.find(PROGRAM) == [
    collectives.Collective("all-reduce", 1, (32,), "loop/bn"),
    collectives.Collective("all-reduce", 0, (32, 16), ""),
    collectives.Collective("all-gather", 0, (64,), ""),
  ]

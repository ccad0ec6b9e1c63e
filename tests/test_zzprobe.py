import sys; sys.path.insert(0,"/work/main/tests")
import time
pytest_plugins=("tiny",)
import tiny
def test_a(finished):
  for l in finished.compilations.lines: print(l)
  for l in finished.compilations.evaluations: print(l)
def test_cl(command_line, tmp_path):
  w=tmp_path/"w"
  for extra in (["--config.train.lrr=3"],["--config.train.num_epochs=abc"],["--config.train.num_epochs=1.5"],["--config.train.boundaries=abc"],["--config.evaluation.batch_norm=running"],["--config.evaluation.batch_norm=()"],["--config.train.schedule=piecewise","--config.train.boundaries=()"],["--config.seed=-5"],["--config.seed=99999999999999999999999"],["--config.model.depth=11"],["--config.objective.layers=('foo',)"],["--config.train.batch_size=5000"],["--bogus"],["stray"],["--mode=foo"]):
    t=time.time()
    r=command_line(*tiny.flags(w,*extra,mode="figures"))
    print(extra,time.time()-t,r)
  for a in (["--config=configs/cifar10.py:foo",f"--workdir={w}"],["--config=configs/digits.py"],["--config=nope.py",f"--workdir={w}"],[f"--workdir={w}"],["--help"],["--config=configs/cifar10.py",f"--workdir={w}","--config.data.dir=/nonexistent"],["--config=configs/digits.py","--mode=evaluate",f"--workdir={w}"],["--config=configs/digits.py",f"--workdir=/proc/x"]):
    r=command_line(*a); print(a,r)
    print(list(w.rglob("*")) if w.exists() else None)

"""python -m benchmarks.architectures"""
import sys, collections
from pathlib import Path
from tests.support.architectures.listing import architectures
from tests.support.architectures.sweep import sweep
names=list(architectures())
args=sys.argv[2:]
if args: names=[n for n in names if n in args]
p=Path(sys.argv[1])
rows=sweep(names,p,report=lambda r:print(r['verdict'],r['name'],r['seconds'],r.get('reason','')[:160],flush=True))
print(collections.Counter(rows[n]['verdict'] for n in names if n in rows))

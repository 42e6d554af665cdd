"""Every recorded benchmark as tab-separated text: `make -s bench-report`.

Reads benchmarks/results/*.json and nothing else. `ratio` says how many times better ours is than
the baseline (baseline / ours; for the floor, the fraction of it that is reached), where less is
better. Units: ms (fwd, fwdbwd and their _wall forms), MiB (memory), s (first_call), GB/s (copy),
TFLOP/s (matmul); errors have none.
"""

import sys
from pathlib import Path

from gatebook.measure import records

if __name__ == "__main__":
    try:
        runs = records.load(Path(__file__).parent / "results")
    except records.RecordError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(records.tsv(records.rows(runs)))
